"""The parts of pages that are made from manifests, records and run times.

A page in `book/` holds a line `% generated: <name>`; `tools/book.py` replaces it
by the text from here when it lays out the build.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat

import apidocs

NOT_RUN = "not run yet"


def pages(
    root: Path, notebooks: Sequence[Path], reference: apidocs.Reference
) -> Iterator[tuple[str, str]]:
    """Yield (file name, text) for each page with a generated part.

    Parameters
    ----------
    root
        The root of the repository.
    notebooks
        The notebooks as they will be shown, with their outputs.
    reference
        The API reference of the package.
    """
    yield "datasets.md", datasets_text()
    yield "status.md", status_text(root, notebooks)
    if (root / "book" / "scale.md").is_file():
        yield "scale.md", loader_text(root)
    if (root / "book" / "api").is_dir():
        yield "api/index.md", reference.index()
        for name in apidocs.PAGES:
            yield f"api/{name}.md", reference.page(name)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table; a bar in a cell cannot end the cell."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(c).replace("|", "\\|").replace("\n", " ") for c in r] for r in lines)
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


# --- data sets ------------------------------------------------------------------


def datasets_text() -> str:
    """Return the table of all data sets and a section with the card of each."""
    from scgenlib import datasets

    cards = [datasets.card(name) for name in datasets.names()]
    rows = [
        [
            f"[`{card['name']}`](data-{slug(card['name'])})",
            card.get("title", ""),
            number(card.get("n_cells")),
            number(card.get("n_genes")),
            len(card.get("label_counts") or {}) or "?",
            ", ".join(card.get("tasks") or []),
            card.get("licence", "?"),
        ]
        for card in cards
    ]
    head = ["name", "what", "cells", "genes", "types", "tasks", "licence"]
    return table(head, rows) + "\n" + "\n".join(card_text(card) for card in cards)


def card_text(card: dict[str, Any]) -> str:
    """Return one data set's section."""
    rows: list[list[Any]] = [
        ["citation", card.get("citation")],
        ["DOI", card.get("doi") and f"[{card['doi']}](https://doi.org/{card['doi']})"],
        ["accession", card.get("accession")],
        ["source", re.sub(r"https?://[^\s,;)]+", r"<\g<0>>", card.get("source") or "")],
        ["organism", card.get("organism")],
        ["licence", card.get("licence")],
        ["values in the file", card.get("value_scale")],
        ["rare types", rare(card.get("rare_threshold"))],
        ["checksum known", "yes" if card.get("verified") else "no"],
        ["genes chosen upstream", "yes" if card.get("genes_preselected") else "no"],
    ]
    text = f"(data-{slug(card['name'])})=\n## `{card['name']}`\n\n"
    text += f"{card.get('title', '')}\n\n"
    text += table(["", ""], [[k, v] for k, v in rows if v not in (None, "", [])])
    counts = card.get("label_counts") or {}
    if counts:
        text += "\nCells of each type: "
        text += ", ".join(f"{label} {n:,}" for label, n in counts.items()) + ".\n"
    if card.get("notes"):
        notes = card["notes"]
        text += "\n" + (notes if isinstance(notes, str) else " ".join(notes)).strip()
        text += "\n"
    return text


def rare(threshold: int | None) -> str:
    """Return in words which types count as rare."""
    if threshold is None:
        return "the smallest type, and any under 5 % of the cells"
    return f"fewer than {threshold} cells"


def slug(name: str) -> str:
    """Return `name` as a link target."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def number(value: Any) -> str:
    """Return a whole number with separators, or a question mark."""
    return f"{value:,}" if isinstance(value, int) else "?"


# --- status ---------------------------------------------------------------------


def status_text(root: Path, notebooks: Sequence[Path]) -> str:
    """Return the three tables of the status page."""
    return "\n".join(
        [
            "## The pages of this build\n",
            pages_table(notebooks),
            "## Chapters on data sets\n",
            "Each cell is one run of `scgenlib run`, made by `make matrix`.\n",
            matrix_table(root),
            "## Recorded runs\n",
            records_table(root, notebooks),
        ]
    )


def pages_table(notebooks: Sequence[Path]) -> str:
    """Return what the shown outputs took, one row per notebook."""
    rows = []
    for path in notebooks:
        about = nbformat.read(path, as_version=4).metadata.get("scgenlib")
        name = f"[{path.stem}]({path.stem})"
        if about is None or "seconds" not in about:
            rows.append([name, NOT_RUN, "", "", "", ""])
            continue
        rows.append([name, "passed", *measured(about)])
    return table(["page", "result", *MEASURED], rows)


MEASURED = ("seconds", "memory", "device", "versions", "date")


def measured(about: dict[str, Any]) -> list[str]:
    """Return the cells of a row that say what a run took, and when."""
    used = about.get("versions", {})
    names = [n for n in ("scgenlib", "torch") if n in used]
    memory = about.get("peak_memory_mb", about.get("memory_mb"))
    return [
        f"{about['seconds']:.0f}",
        "?" if memory is None else f"{memory:,.0f} MB",
        str(about.get("device", "?")),
        ", ".join(f"{name} {used[name]}" for name in names),
        str(about.get("date", "?")),
    ]


def matrix(root: Path) -> tuple[list[str], list[str], dict[tuple[str, str], str]]:
    """Return chapters, data sets, and the text for each pair that was run."""
    path = root / "book" / "status.json"
    runs = json.loads(path.read_text()) if path.is_file() else []
    cells = {}
    for run in runs:
        text = f"{'passed' if run['ok'] else 'failed'}, {run['seconds']:.0f} s"
        text += f", {run['memory_mb'] / 1000:.1f} GB"
        cells[run["chapter"], run["dataset"]] = text
    chapters = list(dict.fromkeys(run["chapter"] for run in runs))
    names = list(dict.fromkeys(run["dataset"] for run in runs))
    return chapters, names, cells


def matrix_table(root: Path) -> str:
    """Return data sets down, chapters across."""
    chapters, names, cells = matrix(root)
    if not chapters:
        return f"{NOT_RUN.capitalize()}.\n"
    from scgenlib import cli, datasets

    # A data set without counts, say, is no candidate for every chapter.
    fits = {}
    for chapter in chapters:
        page = root / "book" / f"{chapter}.ipynb"
        task = cli._declared(page)[1] if page.is_file() else chapter
        fits[chapter] = set(datasets.names(task=task))

    def cell(chapter: str, name: str) -> str:
        default = NOT_RUN if name in fits[chapter] else "does not apply"
        return cells.get((chapter, name), default)

    rows = [
        [f"`{name}`", *(cell(chapter, name) for chapter in chapters)] for name in names
    ]
    runs = json.loads((root / "book" / "status.json").read_text())
    made = {
        f"{run['date']}, {run['device']}, scgenlib {run['version']}" for run in runs
    }
    return table(["data set", *chapters], rows) + "\nMade: " + "; ".join(sorted(made))


def records_table(root: Path, notebooks: Sequence[Path]) -> str:
    """Return every recorded run, then those that its chapter could still have."""
    from scgenlib import cli, datasets, records

    folder = root / "book" / "results"
    known = datasets.names()
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        for chapter in (p.stem for p in notebooks):
            for name in known:
                # Up to the experiment: a name with a slash is stored with "_".
                head = records.record_path(chapter, name, "", folder).stem
                if path.stem.startswith(head):
                    about = json.loads(path.read_text())["provenance"]
                    found[chapter, name, path.stem[len(head) :]] = about
    rows, open_ = [], []
    for path in notebooks:
        experiments = sorted({e for chapter, _, e in found if chapter == path.stem})
        _, task = cli._declared(path)
        for experiment in experiments:
            absent = []
            for name in datasets.names(task=task):
                if about := found.get((path.stem, name, experiment)):
                    who = [path.stem, f"`{name}`", experiment]
                    rows.append([*who, *measured(about)])
                else:
                    absent.append(f"`{name}`")
            if absent:
                open_.append([path.stem, experiment, ", ".join(absent)])
    if not rows:
        return f"{NOT_RUN.capitalize()}.\n"
    done = table(["chapter", "data set", "experiment", *MEASURED], rows)
    left = table(["chapter", "experiment", NOT_RUN], open_)
    return f"{done}\nWhat a chapter could still have:\n\n{left}"


# --- large atlases --------------------------------------------------------------


def loader_text(root: Path) -> str:
    """Return the recorded race of the loader, and what made it."""
    from scgenlib import records

    where = "scale", "simulated_atlas", "loader", root / "book" / "results"
    is_there = records.record_path(*where).is_file()
    found = records.recorded(*where) if is_there else None
    if found is None:
        line = "python benchmarks/loader.py --record"
        return f"{NOT_RUN.capitalize()}. `{line}` makes the record.\n"
    speeds = ("cells_per_s", "cells_per_cpu_s")
    rows = [
        [
            row["form"] + ", cold" * row["cold"],
            row["way"],
            *(f"{float(f'{row[k]:.2g}'):,.0f}" for k in speeds),
            f"{row['bits']:.2f}",
            f"{row['peak_gb']:.2f}",
        ]
        for row in found.rows
    ]
    c, made = found.config, found.describe()
    head = ["from", "way", "cells/s", "cells/CPU-s", "bits", "peak GB"]
    return (
        f"{c['cells']:,} cells x {c['genes']:,} genes in {c['samples']} samples, "
        f"about {c['per_cell']} values a cell, minibatches of {c['batch']}. "
        f"`blocks`: {c['block']} rows together, a pool of {c['pool']:,} cells. "
        f"`small pool`: a pool of one minibatch. `single rows`: each row alone. "
        f"{math.log2(c['samples']):.2f} bits are the most.\n\n"
        f"{table(head, rows)}\n{made[0].upper()}{made[1:]}.\n"
    )
