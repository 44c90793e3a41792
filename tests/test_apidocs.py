"""Every public name has its entry in the reference, with ways there and back."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

import apidocs
import book
import pages


@pytest.fixture(scope="module")
def package() -> apidocs.Package:
    return apidocs.Package(book.HOME / "scgenlib")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> apidocs.Reference:
    """Return the reference for the pages of the book, with labels on all headings."""
    tree = tmp_path_factory.mktemp("reference")
    for path in (book.HOME / "book").glob("*.md"):
        shutil.copy(path, tree)
    shutil.copytree(book.HOME / "book" / "ledger", tree / "ledger")
    shutil.copytree(book.HOME / "book" / "api", tree / "api")
    staged = [Path(shutil.copy(path, tree)) for path in book.notebooks()]
    pages.label_all(staged)
    return apidocs.Reference(book.HOME, tree, staged)


@pytest.fixture(scope="module")
def texts(reference: apidocs.Reference) -> dict[str, str]:
    return {name: reference.page(name) for name in apidocs.PAGES}


def test_modules_stand_on_one_page(package):
    owners = {entry.owner for entry in package.entries.values()}
    placed = [m for page, ms in apidocs.PAGES.items() for m in ms]
    assert owners == set(placed)
    # The five methods come twice: their classes first, their parts later.
    twice = {m for m in placed if placed.count(m) > 1}
    assert twice == set(apidocs.METHODS)
    assert owners == set(apidocs.HOME)


def test_names_are_those_that_python_sees(package):
    """The files are read as text: hold the result against the imported package."""
    code = (
        "import importlib, pkgutil, scgenlib\n"
        "for m in pkgutil.iter_modules(scgenlib.__path__):\n"
        "    if m.name.startswith('_'): continue\n"
        "    module = importlib.import_module(f'scgenlib.{m.name}')\n"
        "    for name in module.__all__:\n"
        "        found = getattr(module, name)\n"
        "        print(m.name, name, getattr(found, '__qualname__', ''))\n"
    )
    out = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    lines = [line.split() for line in out.splitlines()]
    assert len(lines) > 300
    for module, name, *qualified in lines:
        here = package.resolve(module, name)
        assert here in package.entries, f"{module}.{name} has no entry"
        if qualified and not isinstance(package.entries[here].node, ast.Assign):
            assert here.rsplit(".", 1)[1] == qualified[0]


def test_every_name_has_one_entry(package, texts):
    whole = "\n".join(texts.values())
    for name, entry in package.entries.items():
        head = rf"^\.\. py:\w+:: {re.escape(entry.short)}(?![\w.]).*\n"
        head += rf" +:module: scgenlib\.{re.escape(entry.owner)}$"
        assert len(re.findall(head, whole, re.MULTILINE)) == 1, name


def test_every_name_is_explained(package, reference):
    bare = [name for name in package.entries if not reference.explained(name)]
    assert not bare, bare
    # And most of them down to a section, not to a page as a whole.
    deep = [n for n in package.entries if ":ref:" in reference.explained(n)]
    assert len(deep) > 0.6 * len(package.entries)


def test_equations_exist_and_lead_to_names_that_exist(package, reference):
    for label, names in apidocs.EQUATIONS.items():
        for name in names:
            assert name in package.entries, f"{label}: {name}"
            assert label in reference.equations.get(name, []), f"{label} is nowhere"


def test_every_equation_of_a_chapter_leads_to_code():
    for path in book.notebooks():
        text = path.read_text(encoding="utf-8")
        labels = set(re.findall(r"\$\$ ?\((eq-[\w-]+)\)", text))
        labels |= set(re.findall(r":label: (eq-[\w-]+)", text))
        assert labels <= set(apidocs.EQUATIONS), labels - set(apidocs.EQUATIONS)


def test_there_and_back(reference):
    """An entry names a section; the page of that section lists the entry."""
    lines = apidocs.used_on("garage", reference)
    (line,) = (text for text in lines if "garage.mixed_batch`" not in text
               and "scgenlib.garage.mixed_batch>" in text)  # fmt: skip
    assert "{ref}`at-garage-by-hand-the-mixed-batch`" in line
    assert "{eq}`eq-garage-batch`" in line
    there = reference.explained("garage.mixed_batch")
    assert ":ref:`at-garage-by-hand-the-mixed-batch`" in there
    assert ":eq:`eq-garage-batch`" in there
    for path in book.notebooks():
        assert apidocs.used_on(path.stem, reference), path.stem


def test_methods_show_fit_and_verbs(texts):
    text = texts["methods"]
    for verb in ("Estimator.fit", "Estimator.save", "GARAGE.select_seeds",
                 "GARAGE.generate", "REGINA.predict", "ScGACL.impute",
                 "CscGAN.generate", "ScAtlasVAE.map_query"):  # fmt: skip
        assert re.search(rf"\.\. py:method:: {re.escape(verb)}\(", text), verb
    assert text.index("Estimator.fit") < text.index("Estimator.save")
    row = ["``leakage_fraction``", "``float``", "``0.2``", "same"]
    assert "   * - " + "\n        - ".join(row) in text


# --- small packages -------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    root = tmp_path / "scgenlib"
    root.mkdir()
    (root / "__init__.py").write_text('_EXPORTS = {"Box": "boxes"}\n')
    (root / "boxes.py").write_text(
        '"""Boxes.\n\nMore *about* them, 2 * 3.\n"""\n'
        "from scgenlib.tools import turn\n"
        '__all__ = ["Box", "LIMIT", "turn"]\n'
        "#: The most boxes.\nLIMIT = 3\n\n\n"
        "class Box:\n"
        '    """A box; see `turn`.\n\n'
        "    Parameters\n    ----------\n"
        "    width, height\n        Sizes in `mm`, not_in_cm.\n"
        '    """\n\n'
        "    def __init__(self, width: int, height: int = 2) -> None: ...\n\n"
        '    def open(self) -> Box:\n        """Open it."""\n'
    )
    (root / "tools.py").write_text(
        '"""Tools."""\n__all__ = ["Stuck", "turn"]\n\n\n'
        'class Stuck(Exception):\n    """It does not turn."""\n\n\n'
        "def turn(x: float, *, by: float = 1.0) -> float:\n"
        '    """Turn.\n\n    Returns\n    -------\n    float\n        Turned.\n\n'
        "    Raises\n    ------\n    ValueError\n        Never.\n"
        '    Stuck\n        If tight.\n    """\n'
    )
    return tmp_path


def notebook(path: Path, *cells: tuple[str, str]) -> Path:
    made = nbformat.v4.new_notebook()
    for kind, source in cells:
        new = getattr(nbformat.v4, f"new_{kind}_cell")
        made.cells.append(new(source))
    nbformat.write(made, path)
    return path


def test_an_alias_is_no_second_entry(small):
    package = apidocs.Package(small / "scgenlib")
    assert set(package.entries) == {
        *("boxes.Box", "boxes.LIMIT", "tools.Stuck", "tools.turn")
    }
    assert package.entries["tools.turn"].aliases == ("boxes.turn",)


def test_docstrings_become_directives(small, tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    monkeypatch.setattr(apidocs, "PAGES", {"all": ("boxes", "tools")})
    reference = apidocs.Reference(small, tmp_path / "book", [])
    text = reference.page("all")
    assert "More *about* them, 2 * 3." in text
    assert ".. py:class:: Box(width: int, height: int=2)\n" in text
    assert ":py:obj:`turn <scgenlib.tools.turn>`" in text
    assert "**width, height** (*int*) -- Sizes in ``mm``, not_in_cm." in text
    assert ".. py:method:: Box.open() -> ~scgenlib.boxes.Box\n" in text
    assert ":returns: *float* -- Turned." in text
    assert ":raises ValueError: Never." in text
    assert ":raises ~scgenlib.tools.Stuck: If tight." in text
    assert "The most boxes." in text and "Value: ``3``" in text
    assert "Also as ``scgenlib.boxes.turn``." in text


def test_code_in_a_docstring_is_shown_as_written(small, tmp_path):
    reference = apidocs.Reference(small, tmp_path, [])
    module = reference.package.modules["boxes"]
    for text in ("obs['a']", "~/data", ".h5ad", "x <y>", "a *b* c", "|x - y|"):
        assert reference.linked(f"see `{text}`.", module) == f"see ``{text}``."
    for text in ("``done``", ":math:`x`", "``a`` and ``b``"):
        assert reference.linked(text, module) == text


def test_uses_are_found_in_code_and_text(small, tmp_path):
    package = apidocs.Package(small / "scgenlib")
    path = notebook(
        tmp_path / "toy.ipynb",
        ("markdown", "(toy-start)=\n# Toy"),
        ("code", "from scgenlib import Box, boxes\nimport scgenlib as sg"),
        ("markdown", "(toy-turn)=\n## Turn\n\n```python\n# no heading\n```"),
        ("code", "box = Box(1)\nbox.open()\nsg.boxes.turn(2)\nother.turn(1)"),
        ("markdown", "(toy-text)=\n## Text\n\nSee `tools.turn()` and `turn`."),
    )
    found = {s.label: s.names for s in apidocs.sections(path, package)}
    assert found["toy-start"] == []  # an import is no use
    assert found["toy-turn"] == ["boxes.Box", "boxes.Box.open", "tools.turn"]
    assert found["toy-text"] == ["tools.turn"]
