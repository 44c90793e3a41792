"""Class material from the chapters; `make classroom` and `make wheelhouse` call it.

    python tools/classroom.py notebooks [NAME ...]
    python tools/classroom.py slides [NAME ...]
    python tools/classroom.py wheelhouse --out DIR [--platform ...] [--only ...]

`notebooks` writes a student's and an instructor's notebook for each chapter, `slides`
one page each that opens without a network, `wheelhouse` a folder from which a class is
installed and taught offline. Everything is made from `book/`; nothing there changes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import book
import classroom_bundle as bundle
import classroom_notebooks
import classroom_slides
from classroom_myst import ROOT, ClassroomError
from scgenlib.errors import ScgenError, unknown

OUT = ROOT / "_build" / "classroom"


def chosen(names: list[str]) -> list[str]:
    """Return the chapters called `names`, or all; raise and name the nearest match."""
    known = [path.stem for path in book.notebooks()]
    for name in names:
        if name not in known:
            raise unknown("chapter", name, known)
    return names or known


def write_notebooks(names: list[str], out: Path = OUT) -> list[Path]:
    """Write the student's and the instructor's notebook of each chapter."""
    names = chosen(names)
    labels = classroom_notebooks.all_labels(chosen([]))
    written = []
    for name in names:
        for role in ("student", "instructor"):
            notebook = getattr(classroom_notebooks, role)(name, labels)
            path = out / role / f"{name}.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            book.write_notebook(notebook, path)
            written.append(path)
    return written


def write_slides(names: list[str], out: Path = OUT) -> list[Path]:
    """Write one page of slides for each chapter."""
    names = chosen(names)
    labels = classroom_notebooks.all_labels(chosen([]))
    written = []
    for name in names:
        path = out / "slides" / f"{name}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(classroom_slides.page(name, labels), encoding="utf-8")
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("notebooks", "slides"):
        one = commands.add_parser(name)
        one.add_argument("names", nargs="*", help="chapters; all by default")
        one.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    wheels = commands.add_parser("wheelhouse")
    wheels.add_argument("--out", type=Path, required=True, help="folder to fill")
    wheels.add_argument("--platform", action="append", choices=[*bundle.PLATFORMS],
                        help="repeat for several; all by default")  # fmt: skip
    wheels.add_argument("--only", help="packages of the lock, with commas, for a test")
    wheels.add_argument("--dry-run", action="store_true", help="say what would be done")
    given = parser.parse_args(arguments)
    try:
        if given.command == "wheelhouse":
            bundle.wheelhouse(
                given.out,
                given.platform or [*bundle.PLATFORMS],
                only=[x.strip() for x in (given.only or "").split(",") if x.strip()],
                dry_run=given.dry_run,
                makers=(write_notebooks, write_slides),
            )
            return 0
        write = write_notebooks if given.command == "notebooks" else write_slides
        for path in write(given.names, given.out):
            print(path)
    except (ClassroomError, ScgenError, book.BookError) as error:
        print(f"classroom: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
