"""No number from a run is typed into the text: results are printed by code."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

import book
import pages

#: A metric in words, followed or led by a number: this is what must be printed.
METRIC = re.compile(
    r"""\b(?:ARI|NMI|F1|AUC|AUROC|RMSE|MMD|LISI|iLISI|cLISI|kBET|BRAS|PCR|PDS|ELBO|
        accuracy|precision|recall|coverage|density|silhouette|correlation|score|
        spread|loss|error|distance|ranks?|share)\b""",
    re.VERBOSE,
)
NUMBER = re.compile(r"(?<![\w.\-–/])(\d+\.\d+|\d+(?:\.\d+)? ?%)(?![\w-]|\.\d)")

#: Sentences with a metric and a number that is no result: a definition, arithmetic on
#: paper, a setting, a threshold or a number from the literature. Page -> a piece of
#: each sentence. An entry that no longer stands on its page must go.
ALLOWED: dict[str, tuple[str, ...]] = {
    "evaluation": (
        # What chance gives, by definition of the metric.
        "0.5 means it cannot",
        "0.5 is guessing",
        "an accuracy near 0.5, but its types",
        # On paper.
        "The upper bin has 0.9 against one half",
    ),
    "machines": ("the floor of 0.650",),  # worked out on paper, on that page
    "cscgan": (
        "0.5 gives nothing away",  # chance
        "0.5 cannot, 1 always",  # chance
        "The slope is 0.5, so the penalty is 0.25",  # on paper
    ),
    "garage": (
        "so its score is (1/2 + 1)/2 = 0.75",  # on paper
        "0.5 gives nothing away",  # chance
    ),
    "scgacl": ("5 % are held out",),  # a setting
    "regina": (
        "the score 0.9 and made ones 0",  # targets of a loss
        "gives all codes 0.45",  # on paper
    ),
    # Invented, for the reader to judge.
    "teach/project": ("on average by 0.08 over training",),
    "teach/regina": (
        "The correlation with the true changes is 0.6 on average",
        "has a rank of 0.5, the value of chance",
    ),
}


def prose(path: Path) -> str:
    """Return the text of a page without code, formulas, tables, links and quotes."""
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        text = "\n\n".join(c.source for c in cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    kept = "".join(part for is_prose, part in pages.blocks(text) if is_prose)
    return pages._MASKED.sub(" ", kept)


def sentences(path: Path) -> list[str]:
    joined = re.sub(r"[ \t]*\n(?!\s*(?:\n|[-*] |\d+\. ))[ \t]*", " ", prose(path))
    parts = re.split(r"\n+|(?<=[.!?:])\s+(?=[A-Z*(])", joined)
    return [" ".join(part.split()) for part in parts if part.strip()]


def bare(path: Path) -> list[str]:
    """Return the sentences that speak of a metric and hold a number like a result."""
    return [s for s in sentences(path) if METRIC.search(s) and NUMBER.search(s)]


def name(path: Path) -> str:
    """Return a page as in `teach/regina`."""
    return path.relative_to(book.HOME / "book").with_suffix("").as_posix()


def texts() -> list[Path]:
    names = [Path(book.HOME, f"{name}.ipynb") for name in book.documents()]
    found = [p for p in names if p.is_file()]
    found += [p for p in sorted((book.HOME / "book").glob("*.md"))
              if p.stem not in ("glossary", "notation")]  # fmt: skip
    # Numbers in a ledger are effects measured once, with what measured them.
    return found + sorted((book.HOME / "book" / "teach").glob("**/*.md"))


@pytest.mark.parametrize("path", texts(), ids=name)
def test_no_number_of_a_run_stands_in_the_text(path):
    allowed = ALLOWED.get(name(path), ())
    found = [s for s in bare(path) if not any(piece in s for piece in allowed)]
    assert not found, "print it, or add to ALLOWED why it is none:\n" + "\n".join(found)


def test_what_is_allowed_still_stands_there():
    by_name = {name(path): path for path in texts()}
    for page, pieces in ALLOWED.items():
        whole = " ".join(bare(by_name[page]))
        for piece in pieces:
            assert piece in whole, f"{page}: {piece!r} is gone: take it off the list"


def test_the_rule_can_fail(tmp_path):
    page = tmp_path / "toy.md"
    page.write_text(
        "# Toy\n\nThe ARI is 0.83 here. The score\nrises by 12 % for `0.91`.\n\n"
        "The width is 0.2. We have ARI of one.\n\n```python\nloss = 0.25\n```\n"
        "\nThe loss $L = 0.7$ is small. Version 1.2.3 has a loss.\n"
    )
    assert bare(page) == ["The ARI is 0.83 here.", "The score rises by 12 % for ."]
