"""What `make book`, `make refresh` and the strict build do, on a book of one page."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import yaml

import book
import generated_pages
import matrix
from scgenlib.records import record_path

REPO = Path(__file__).resolve().parent.parent
DRAW = (
    "import matplotlib.pyplot as plt\n\n"
    "figure, axes = plt.subplots()\n"
    "_ = axes.plot([1, 2])"
)
ALT = "A straight line that rises from the lower left to the upper right corner."


def write(path: Path, *cells: nbformat.NotebookNode) -> Path:
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    notebook.metadata["kernelspec"] = {
        "name": "elsewhere",
        "display_name": "x",
        "language": "python",
    }
    nbformat.write(notebook, path)
    return path


def cell(source: str, **metadata: object) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata=metadata)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the root of a book with one notebook and the two made pages."""
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(book, "EXECUTED", tmp_path / "_build" / "executed")
    pages = tmp_path / "book"
    (pages / "results").mkdir(parents=True)
    toc = {
        "format": "jb-book",
        "root": "book/index",
        "chapters": [{"file": f"book/{n}"} for n in ("datasets", "status", "toy")],
    }
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(toc))
    config = (REPO / "_config.yml").read_text()
    (tmp_path / "_config.yml").write_text(config)
    (pages / "references.bib").write_text("")
    (pages / "index.md").write_text("# Start\n\n$x^2$\n")
    for name in ("datasets", "status"):
        (pages / f"{name}.md").write_text(f"# {name}\n\n% generated: {name}\n")
    write(
        pages / "toy.ipynb",
        nbformat.v4.new_markdown_cell("# Toy\n\nOld text."),
        cell("import sys\n\nprint('a')\nprint('b')\nprint('noise', file=sys.stderr)"),
        cell(DRAW, tags=["core"], minutes=1, mystnb={"image": {"alt": ALT}}, other=1),
    )
    return tmp_path


def stored(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_runs_again_only_what_changed(small, capsys):
    source = small / "book" / "toy.ipynb"
    before = source.read_bytes()
    book.execute([])
    assert "cell 1 wrote to stderr: noise" in capsys.readouterr().out
    assert source.read_bytes() == before
    book.execute([])
    assert "toy: unchanged" in capsys.readouterr().out

    notebook = stored(source)
    notebook.cells[0].source = "# Toy\n\nNew text."
    nbformat.write(notebook, source)
    book.execute([])
    assert "toy: unchanged" in capsys.readouterr().out

    notebook.cells[1].source = "print('c')"
    nbformat.write(notebook, source)
    book.execute([])
    assert "unchanged" not in capsys.readouterr().out
    done = stored(small / "_build" / "executed" / "book" / "toy.ipynb")
    assert done.cells[1].outputs[0].text == "c\n"


def test_refresh_stores_clean_outputs(small):
    source = small / "book" / "toy.ipynb"
    book.refresh([])
    done = stored(source)
    text, draw = (c for c in done.cells if c.cell_type == "code")
    assert [text.execution_count, draw.execution_count] == [1, 2]
    assert [(o.name, o.text) for o in text.outputs] == [("stdout", "a\nb\n")]
    assert [c for c in draw.outputs[0].data if c.startswith("image")] == ["image/png"]
    assert set(draw.metadata) == {"tags", "minutes", "mystnb"}
    assert done.metadata.kernelspec.name == "python3"
    about = done.metadata.scgenlib
    assert about.code_hash == book.code_hash(source)
    assert about.memory_mb > 10 and about.device == "cpu"
    # A second time, nothing changes but what was measured.
    book.refresh([], force=True)
    again = stored(source)
    assert again.cells == done.cells


def test_a_new_record_makes_only_those_stale_that_asked_for_it(small, monkeypatch):
    results = small / "book" / "results"
    monkeypatch.setenv("SCGENLIB_RESULTS_DIR", str(results))
    source = small / "book" / "toy.ipynb"
    read = "from scgenlib import chapter\n\n"
    one = cell(read + "record = chapter.recorded('toy', 'yan', 'dial')")
    every = cell("print(chapter.recorded_on('toy', 'contest'))")
    write(source, one, every)
    book.refresh([])
    target = small / "_build" / "executed" / "book" / "toy.ipynb"
    seen = set(stored(source).metadata.scgenlib.records)
    assert seen == {"toy-yan-dial.json", "toy-*-contest.json"}
    assert book.stale() == [] and book.is_current(source, target)

    others = ("toy-pollen-dial.json", "toy-own_mine_0a1b2c-contest.json")
    for name in others:
        (results / name).write_text("{}")
    assert book.stale() == [] and book.is_current(source, target)

    written = {"rows": [], "config": {}, "provenance": {}}
    for name in ("toy-yan-dial.json", "toy-pollen-contest.json"):
        (results / name).write_text(json.dumps(written))
        assert book.stale() == ["toy"] and not book.is_current(source, target)
        book.refresh([])
        assert book.stale() == []


def test_a_failing_cell_fails_the_build_and_leaves_no_page(small, capsys, monkeypatch):
    book.execute([])
    write(small / "book" / "toy.ipynb", cell("x = 1"), cell("x / 0"))
    monkeypatch.setattr("sys.argv", ["book.py", "execute"])
    assert book.main() == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "cell 2 of 2" in error
    assert "1 of 1 failed: toy" in error
    assert not (small / "_build" / "executed" / "book" / "toy.ipynb").exists()
    with pytest.raises(book.BookError, match="was not executed"):
        book.assemble(book.EXECUTED, executed=True)


def test_pages_that_do_not_exist_are_named(small):
    (small / "book" / "toy.ipynb").unlink()
    with pytest.raises(book.BookError, match="do not exist: book/toy"):
        book.notebooks()


def test_unknown_chapter(small):
    with pytest.raises(book.BookError, match="'tyo'; allowed: toy"):
        book.execute(["tyo"])


def test_strict_build_counts_what_came_out(small):
    book.refresh([])
    book.strict()
    site = small / "_build" / "strict" / "_build" / "html"
    page = site / "book" / "toy.html"
    assert f'alt="{ALT}"' in page.read_text()
    status = (site / "book" / "status.html").read_text()
    assert "passed" in status and "not run yet" in status.lower()
    assert "pbmc68k_reduced" in (site / "book" / "datasets.html").read_text()
    # Formulas come from a file beside the pages.
    assert 'src="../_static/../mathjax/tex-svg.js' in (
        (site / "book" / "index.html").read_text()
    )
    assert (site / "mathjax" / "tex-svg.js").stat().st_size > 1_000_000

    tree = small / "_build" / "strict" / "source"
    whole = page.read_text()
    page.write_text(whole.replace('class="cell_output ', 'class="'))
    with pytest.raises(book.BookError, match="toy: 0 code cells with output"):
        book.check_pages(tree, site)
    page.write_text(whole.replace(ALT, "figure.png"))
    with pytest.raises(book.BookError, match="without a description"):
        book.check_pages(tree, site)
    page.write_text(whole + '<p id="here"></p><p id="here"></p>')
    with pytest.raises(book.BookError, match="toy: ids that stand .* once: here"):
        book.check_pages(tree, site)
    page.unlink()
    with pytest.raises(book.BookError, match="toy: no page"):
        book.check_pages(tree, site)


def test_strict_build_fails_on_a_warning(small):
    book.refresh([])
    (small / "book" / "index.md").write_text("# Start\n\n{term}`no such term`\n")
    with pytest.raises(book.BookError, match="jupyter-book failed"):
        book.strict()


def test_strict_build_fails_without_outputs(small):
    notebook = stored(small / "book" / "toy.ipynb")
    assert book.expected(small / "book" / "toy.ipynb")["images"] == 0
    assert notebook.cells[1].outputs == []
    with pytest.raises(book.BookError, match="no code cells with output"):
        book.strict()


def test_matrix_writes_results_and_readme(small, monkeypatch):
    (small / "README.md").write_text(f"before\n{matrix.BEGIN}x\n{matrix.END}after\n")
    monkeypatch.setattr(matrix, "STATUS", small / "book" / "status.json")
    monkeypatch.setattr(matrix, "pairs", lambda: [("toy", "simulated")])
    result = {"chapter": "toy", "dataset": "simulated", "ok": False, "seconds": 12,
              "memory_mb": 1500, "device": "cpu", "version": "0.1.0",
              "date": "2026-01-02"}  # fmt: skip
    monkeypatch.setattr(matrix, "run", lambda *pair: result)
    monkeypatch.setattr("sys.argv", ["matrix.py"])
    assert matrix.main() == 1
    text = (small / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "| `simulated` | failed, 12 s, 1.5 GB |" in text


def test_matrix_names_no_folder_after_a_data_set(small, monkeypatch):
    commands = []

    class Started:
        pid = 1

        def __init__(self, command: list[str], **options: object) -> None:
            commands.append(command)

    used = SimpleNamespace(ru_maxrss=2_000_000)
    monkeypatch.setattr(matrix.subprocess, "Popen", Started)
    monkeypatch.setattr(matrix.os, "wait4", lambda pid, options: (pid, 0, used))
    result = matrix.run("scgacl", "sc_mixology/cellmix1")
    assert result["ok"] and result["dataset"] == "sc_mixology/cellmix1"
    output = Path(commands[0][commands[0].index("-o") + 1])
    assert output.name == "scgacl-sc_mixology_cellmix1.ipynb"
    assert output.parent == small / "_build" / "matrix"


def test_records_of_a_data_set_with_a_slash_are_found(small):
    page = write(small / "book" / "scgacl.ipynb", cell("x = 1"))
    about = {"seconds": 7.2, "device": "cpu", "peak_memory_mb": 512.0,
             "versions": {"torch": "2.9"}, "date": "2026-01-02"}  # fmt: skip
    # Neither of two names is the beginning of the other's records.
    name = "sc_mixology/sc_celseq2_5cl_p1"
    record = record_path("scgacl", name, "dial", small / "book" / "results")
    record.write_text(json.dumps({"provenance": about}))
    text = generated_pages.records_table(small, [page])
    made, left = text.split("What a chapter could still have:")
    row = f"| scgacl | `{name}` | dial | 7 | 512 MB | cpu | torch 2.9 | 2026-01-02 |"
    assert made.strip().splitlines()[2:] == [row]
    head, _, *rows = left.strip().splitlines()
    assert "not run yet" in head
    assert len(rows) == 1 and rows[0].startswith("| scgacl | dial | `")
    assert "`sc_mixology/sc_celseq2`" in rows[0] and f"`{name}`" not in rows[0]


def test_a_table_cell_cannot_break_the_table():
    assert generated_pages.table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"
