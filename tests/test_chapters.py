"""Every notebook of the book keeps the rules that readers and tools rely on."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

import book
from scgenlib import records

PATHS = [
    path
    for path in (book.ROOT / f"{name}.ipynb" for name in book.documents())
    if path.is_file()
]
FOUNDATIONS = {"data", "evaluation", "machines"}
METHODS = [path for path in PATHS if path.stem not in FOUNDATIONS | {"compare"}]
LANES = {"core", "deep", "shelf"}
TAGS = LANES | {"parameters", "hide-input", "nbval-ignore-output", "solution"}
IMAGES = set(book.IMAGES)

every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
every_method = pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[Any]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def lane(cell: Any) -> str:
    """Return the lane of a cell; one without a lane is core."""
    return next((t for t in cell.metadata.get("tags", []) if t in LANES), "core")


def images(cell: Any) -> int:
    outputs = cell.get("outputs", [])
    return sum(bool(IMAGES & set(out.get("data", {}))) for out in outputs)


def test_pages_of_the_table_of_contents_exist():
    assert [path.stem for path in book.notebooks()] == [path.stem for path in PATHS]
    assert METHODS


@every_notebook
def test_executed_in_order_without_errors(path):
    cells = code(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
            assert not {k for k in output.get("data", {}) if "widget" in k}
    assert any(cell.outputs for cell in cells)


@every_notebook
def test_outputs_are_up_to_date(path):
    stored = read(path).metadata["scgenlib"]["code_hash"]
    assert stored == records.notebook_hash(path), f"make refresh ONLY={path.stem}"


@every_notebook
def test_outputs_show_the_records_as_they_are(path):
    about = read(path).metadata["scgenlib"]
    assert book.shows_records(about), f"make refresh ONLY={path.stem}"
    reads = "recorded(" in "".join(cell.source for cell in code(path))
    assert bool(about["records"]) == reads


@every_notebook
def test_stored_cleanly(path):
    notebook = read(path)
    assert path.stat().st_size <= 1_000_000
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info", "scgenlib"}
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    again = nbformat.from_dict(notebook)
    assert book.tidy(again) == []
    assert [cell.id for cell in again.cells] == ids, "make refresh"


@every_notebook
def test_code_cells_fit_a_page(path):
    for cell in code(path):
        lines = cell.source.splitlines()
        assert 1 <= len(lines) <= 20, cell.source
        assert max(map(len, lines)) <= 79, cell.source
        assert not any(line.lstrip().startswith(("%", "!")) for line in lines)


@every_notebook
def test_cells_are_tagged_from_the_closed_list(path):
    for cell in read(path).cells:
        tags = cell.metadata.get("tags", [])
        assert set(tags) <= TAGS, tags
        assert len(LANES & set(tags)) <= 1, tags
        if cell.cell_type == "code":
            assert cell.metadata.get("minutes", -1) >= 0, cell.source
    first = [cell for cell in code(path) if "parameters" in cell.metadata.tags]
    assert len(first) == 1


@every_notebook
def test_one_described_figure_per_cell(path):
    for cell in code(path):
        drawn = images(cell)
        assert drawn <= 1, cell.source
        if not drawn:
            continue
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert 40 <= len(alt) <= 400, (len(alt), cell.source)
        assert not re.search(r"[\w/]+\.(png|svg)\b|\w+/\w+/\w+", alt), alt


@every_notebook
def test_text_images_are_described(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for alt in re.findall(r"!\[([^\]]*)\]\(", cell.source):
                assert 40 <= len(alt) <= 400, alt
            for figure in re.split(r"^```+\{(?:figure|image)\}", cell.source,
                                   flags=re.MULTILINE)[1:]:  # fmt: skip
                found = re.search(r"^:alt: (.+)$", figure, re.MULTILINE)
                assert found and 40 <= len(found[1]) <= 400, figure[:200]


@every_notebook
def test_parameters_cell_is_the_manual(path):
    (cell,) = (c for c in code(path) if "parameters" in c.metadata.get("tags", []))
    for line in cell.source.splitlines():
        assert re.fullmatch(r"\w+: .+ = .+  # .+", line), line
    names = [node.target.id for node in ast.parse(cell.source).body]
    usual = ["dataset", "profile", "seed", "device", "results_dir"]
    assert [name for name in names if name in usual] == [n for n in usual if n in names]
    if path in METHODS:
        assert names[:5] == usual


@every_notebook
def test_no_relative_path_and_no_private_name(path):
    for cell in code(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.match(r"\.{1,2}/|(book|runs|results)/", node.value)
            if isinstance(node, ast.ImportFrom) and "scgenlib" in (node.module or ""):
                assert not [a.name for a in node.names if a.name.startswith("_")]
            if isinstance(node, ast.Attribute):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not private, ast.unparse(node)


@every_method
def test_core_fits_a_class(path):
    minutes = {name: 0.0 for name in LANES}
    for cell in read(path).cells:
        minutes[lane(cell)] += cell.metadata.get("minutes", 0)
    assert 0 < minutes["core"] <= 50
    assert minutes["core"] + minutes["deep"] <= 90


@every_method
def test_core_is_short(path):
    cells = [cell for cell in read(path).cells if lane(cell) == "core"]
    core_code = [cell for cell in cells if cell.cell_type == "code"]
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown")
    claims = sum(cell.source.count("chapter.claim(") for cell in core_code)
    assert len(core_code) <= 25
    assert words <= 2500
    assert sum(map(images, core_code)) <= 8
    assert 1 <= claims <= 10


def test_most_printed_outputs_are_compared():
    # nbval compares what is printed unless the cell says otherwise; a claim that nobody
    # compares may rot.
    printed = compared = 0
    for path in PATHS:
        for cell in code(path):
            kinds = {output.output_type for output in cell.outputs}
            if kinds & {"stream", "execute_result"}:
                printed += 1
                compared += "nbval-ignore-output" not in cell.metadata.get("tags", [])
    assert compared >= 0.6 * printed, f"{compared} of {printed}"
