"""Every block to take along runs alone; every shell line of the book is run or planned.

Two things are replaced, as text, so that this takes seconds: the profile of a fit
(`book` by `tiny`), and the path of the reader's own cells. Nothing else.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from anndata import AnnData
from terminal import BIN, on_a_terminal

import apidocs
import apinames
import book
from scgenlib import cli, datasets

pytestmark = pytest.mark.timeout(900)
BOOK = book.HOME / "book"


def markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def fenced(text: str, language: str) -> list[str]:
    pattern = rf"^( *)```{language}\n(.*?)^\1```"
    return [found[2] for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL)]


def section(path: Path, title: str) -> str:
    """Return the Markdown and code of a section of a notebook, or ""."""
    found, inside = [], False
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            if inside:
                found.append(f"```python\n{cell.source}\n```")
            continue
        lines, heads = cell.source.splitlines(), list(apinames.headings(cell.source))
        bounds = [0, *(number for number, *_ in heads), len(lines)]
        for index, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if index:
                inside = heads[index - 1][2] == title
            if inside:
                found.append("\n".join(lines[start:end]))
    return "\n\n".join(found)


def take_along() -> dict[str, str]:
    """Return the first Python block under "Take it with you" of each page."""
    blocks = {}
    for path in book.notebooks():
        found = fenced(section(path, "Take it with you"), "python")
        if found:
            blocks[path.stem] = found[0]
    return blocks


TAKE_ALONG = take_along()


def test_every_method_has_a_block_to_take_along():
    assert set(apidocs.METHODS) <= set(TAKE_ALONG)
    for name, block in TAKE_ALONG.items():
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) <= 14, name
        compile(block, name, "exec")


def small(block: str) -> str:
    """Return a block with the tiny profile in place of the one it names."""
    block = re.sub(r'(Config\.profile\()"(?:book|paper)"', r'\1"tiny"', block)
    tiny = r'\1(__import__("scgenlib").\1Config.profile("tiny"), seed=0)'
    return re.sub(r"\b([A-Z]\w+)\(seed=0\)", tiny, block)


def test_only_the_profile_is_replaced():
    assert small('X(XConfig.profile("book", a=1), seed=0)') == (
        'X(XConfig.profile("tiny", a=1), seed=0)'
    )
    assert small("model = REGINA(seed=0)").count("REGINA") == 2
    assert small("preprocess.split(a, seed=0)") == "preprocess.split(a, seed=0)"


def run_alone(name: str, block: str, folder: Path) -> str:
    """Run a block in a fresh process from an empty folder; return what it printed."""
    for data in re.findall(r'datasets\.load\("([\w/]+)"', block):
        if not has_data(data):
            pytest.skip(f"needs the data set {data}: set SCGENLIB_DATA_DIR")
    done = subprocess.run(
        [sys.executable, "-c", small(block)],
        cwd=folder, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, f"{name}\n{done.stderr[-2000:]}"
    return done.stdout


def has_data(name: str) -> bool:
    """Return whether a data set can be loaded without the network."""
    return bool(datasets.verify(name)["ok"])


@pytest.mark.parametrize("name", sorted(TAKE_ALONG))
def test_block_runs_alone(name, tmp_path):
    printed = run_alone(name, TAKE_ALONG[name], tmp_path)
    assert printed.strip(), f"{name}: the block shows nothing"
    saved = re.findall(r'\.save\("([^"]+)"\)', TAKE_ALONG[name])
    assert all((tmp_path / folder / "config.json").is_file() or
               any((tmp_path / folder).iterdir()) for folder in saved)  # fmt: skip
    after = [line for line in lines_of(BOOK / f"{name}.ipynb")
             if line.startswith("scgenlib generate")]  # fmt: skip
    for line in after:
        status, shown = typed(line, tmp_path)
        assert status == 0, shown
        assert (tmp_path / shlex.split(line)[-1]).is_file()


# --- shell lines ---------------------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    """Return the shell lines of a page; a line that goes on is one."""
    found = []
    for block in fenced(markdown(path), "bash"):
        if block.lstrip().startswith("#!"):
            continue  # a script for a cluster, told apart by its first line
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            line = line.split("  #")[0].strip()
            if line and not line.startswith("#"):
                found.append(line)
    return found


def pages_with_lines() -> Iterator[Path]:
    yield book.HOME / "README.md"
    yield book.HOME / "CONTRIBUTING.md"
    yield from sorted(BOOK.glob("*.md"))
    yield from book.notebooks()


LINES = sorted({line for path in pages_with_lines() for line in lines_of(path)})

#: How a line is tried -> what it starts with. The first that fits counts.
WAYS: dict[str, tuple[str, ...]] = {
    # Run as typed, on a pseudo-terminal, in a folder that shows the repository.
    "run": (
        "mkdir -p", "scgenlib datasets list", "scgenlib datasets verify",
        "scgenlib datasets fetch", "python -c", ".venv/bin/jupyter kernelspec list",
        ".venv/bin/python -m ipykernel install",
    ),
    # Prepared up to the first cell: the cells are run by other tests.
    "prepare": ("papermill ",),
    # Read by the command line, up to where the notebook would start.
    "accept": ("scgenlib run ",),
    # Shown by make: what its targets do is tested one by one.
    "plan": ("make ", "BOOK_PUBLIC_URL="),
    # Run by the test of a block, on the model that it saved.
    "block": ("scgenlib generate ",),
    # Asked for its options.
    "help": ("python -m scgenlib.atlas", "torchrun ", "python benchmarks/"),
    # A dry run, with a profile like that of the page.
    "dry": (".venv/bin/snakemake ",),
    # What this machine may not have: the file that it reads is tested in test_house.
    "elsewhere": ("conda ", ".venv/bin/python -m pip install"),
}  # fmt: skip


def way(line: str) -> str:
    fit = (w for w, starts in WAYS.items() if line.startswith(starts))
    return next(fit, "unknown")


def chosen(name: str) -> list[str]:
    return [line for line in LINES if way(line) == name]


def test_every_shell_line_has_a_way_to_be_tried():
    unknown = chosen("unknown")
    assert not unknown, "name in WAYS how to try:\n" + "\n".join(unknown)
    assert all(chosen(name) for name in WAYS)


def typed(command: str, cwd: Path) -> tuple[int, str]:
    """Run a line of a page on a pseudo-terminal, with a home of its own."""
    command = command.replace(".venv/bin/", f"{BIN}{os.sep}")
    home = {"HOME": str(cwd), "JUPYTER_DATA_DIR": str(cwd / "jupyter")}
    return on_a_terminal(command, cwd, 300, **home)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Return a folder that looks like a clone, and may be written to."""
    for name in ("book", "experiments", "benchmarks", "scgenlib", "data_manifests"):
        (tmp_path / name).symlink_to(book.HOME / name)
    return tmp_path


@pytest.mark.parametrize("line", chosen("run"))
def test_line_runs_on_a_terminal(line, clone):
    if line.startswith(("scgenlib datasets verify", "scgenlib datasets fetch")):
        if not has_data(line.split()[-1]):
            pytest.skip(f"needs the data set {line.split()[-1]}")
    status, shown = typed(line, clone)
    assert status == 0, shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("line", chosen("prepare"))
def test_papermill_line_prepares_its_notebook(line, clone):
    if "--help-notebook" in line:
        status, shown = typed(line, clone)
        assert status == 0 and "dataset" in shown
        return
    (clone / "runs").mkdir()
    status, shown = typed(f"{line} --prepare-only", clone)
    assert status == 0, shown
    assert "unknown parameter" not in shown
    output = clone / shlex.split(line)[2]
    given = re.findall(r"-p (\w+) (\S+)", line)
    text = output.read_text()
    for name, value in given:
        assert f'{name} = \\"{value}\\"' in text, name


@pytest.mark.parametrize("line", chosen("accept"))
def test_run_line_is_accepted(line, clone, monkeypatch):
    own = clone / "cells.h5ad"
    if "/path/to/cells.h5ad" in line:
        datasets.load("pbmc68k_reduced", verbose=False).write_h5ad(own)
    line = line.replace("/path/to/cells.h5ad", str(own))
    started = []
    monkeypatch.chdir(clone)
    monkeypatch.setattr(cli, "_execute", lambda *a: started.append(a) or 0)
    assert cli.main(shlex.split(line)[1:]) == 0
    ((chapter, output, parameters),) = started
    assert chapter.is_file() and output.parent.name == "runs"
    assert parameters == dict(re.findall(r"-p (\w+) (\S+)", line))


@pytest.mark.parametrize("line", chosen("plan"))
def test_make_line_is_planned(line):
    words = [word for word in shlex.split(line) if not word.startswith("BOOK_")]
    done = subprocess.run([*words, "-n"], cwd=book.HOME, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    for name in re.findall(r"\b([A-Z]{4,})=", " ".join(words)):
        makefile = (book.HOME / "Makefile").read_text()
        assert f"$({name})" in makefile, f"{name} is no variable of the Makefile"


@pytest.mark.parametrize("line", chosen("help"))
def test_options_of_a_line_exist(line):
    words = shlex.split(line)
    program = words[words.index("-m") + 1] if "-m" in words else words[1]
    command = [sys.executable, *(["-m"] if "-m" in words else []), program, "--help"]
    done = subprocess.run(command, cwd=book.HOME, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = words[words.index(program) + 1 :]
    for option in (word for word in after if word.startswith("--")):
        assert option in done.stdout, option


def test_workflow_takes_the_profile_of_the_page(clone):
    tool = BIN / "snakemake"
    if not tool.is_file():
        pytest.skip("needs the workflow tools: make results installs them")
    (page,) = fenced((BOOK / "upkeep.md").read_text(), "yaml")[:1]
    (clone / "cluster").mkdir()
    # Without the plug-in the jobs stay here; the rest is read as it stands.
    local = re.sub(r"executor: slurm\njobs: 20", "cores: 2", page)
    assert local != page
    (clone / "cluster" / "config.yaml").write_text(local)
    for line in chosen("dry"):
        line = line if line.endswith(" -n") else f"{line} -n"
        status, shown = typed(f"{line} --config chapter=garage", clone)
        assert status == 0, shown
        assert "Using profile cluster" in shown


def test_workflow_says_what_it_takes_for_types(clone, tmp_path):
    tool = BIN / "snakemake"
    if not tool.is_file():
        pytest.skip("needs the workflow tools of `make results`")
    cells = AnnData(np.ones((5, 3), np.float32))
    cells.obs["my_types"] = list("aabbb")
    for column, is_said in (("my_types", True), ("cell_type", False)):
        cells.obs.columns = [column]
        cells.write_h5ad(tmp_path / "mine.h5ad")
        line = [tool, "-s", "experiments/Snakefile", "-n", "--config"]
        line += ["chapter=garage", f"dataset={tmp_path / 'mine.h5ad'}"]
        for told in ([], [f"label_key={column}"]):
            full = [*line, *told]
            done = subprocess.run(full, cwd=clone, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert ("no column cell_type" in done.stderr) == (is_said and not told)
