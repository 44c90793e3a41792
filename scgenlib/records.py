"""Recorded runs: numbers too long in the making for a page, with their provenance.

A record is one JSON file with tidy rows, the configuration, and what made them:
versions, device, seconds, memory, and hashes of the cells and of the code.
"""

from __future__ import annotations

import ast
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import scgenlib
from scgenlib.errors import ConfigError, DataError, message
from scgenlib.files import atomic
from scgenlib.words import say

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = [
    "Record",
    "asked",
    "cells_hash",
    "code_hash",
    "fingerprint",
    "imported_modules",
    "notebook_hash",
    "peak_memory_mb",
    "record_path",
    "recorded",
    "recorded_on",
    "results_root",
    "versions",
    "write_record",
]

_PACKAGE = Path(__file__).resolve().parent
# How the records of a file of one's own begin, after the chapter.
_OWN = "own_"
# What decides on the numbers of a record besides X, if the cells have it.
_COLUMNS = ("cell_type", "batch", "perturbation", "condition")
# What a number cannot come from: a new wording makes no record an old one.
_NO_NUMBERS = {"errors", "words", "figure", "plots", "files", "download"}
_asked: dict[str, str] = {}


@dataclass(frozen=True)
class Record:
    """A recorded run: tidy rows, the configuration, and where they came from."""

    rows: list[dict[str, Any]]
    config: dict[str, Any]
    provenance: dict[str, Any]
    path: Path

    def table(self) -> pd.DataFrame:
        """Return the rows as a DataFrame, one row per measurement."""
        import pandas as pd

        return pd.DataFrame(self.rows)

    def is_own(self) -> bool:
        """Return whether the record is of somebody's own file: no page shows those."""
        return _is_own(self.path)

    def is_current(self) -> bool:
        """Return whether the code that made the record is still the same."""
        modules = self.provenance["modules"]
        return bool(code_hash(modules) == self.provenance["code_hash"])

    def describe(self) -> str:
        """Return one line: profile, seeds, device, seconds, memory, versions, date."""
        p = self.provenance
        size = ""
        if {"profile", "n_seeds"} <= p.keys():
            plural = "" if p["n_seeds"] == 1 else "s"
            size = f" with profile {p['profile']}, {p['n_seeds']} seed{plural},"
        return (
            f"recorded {p['date']}{size} on {p['device']} in {p['seconds']:.0f} s, "
            f"peak {p['peak_memory_mb']:.0f} MB, torch {p['versions']['torch']}, "
            f"scgenlib {p['versions']['scgenlib']}, code {p['code_hash'][:12]}"
        )


def results_root() -> Path:
    """Return the folder of the recorded runs.

    `SCGENLIB_RESULTS_DIR` if set, otherwise `book/results` beside the package.
    """
    default = _PACKAGE.parent / "book" / "results"
    return Path(os.environ.get("SCGENLIB_RESULTS_DIR") or default)


def record_path(
    chapter: str,
    dataset: str,
    experiment: str,
    results_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return where a record lies: `<chapter>-<dataset>-<experiment>.json`.

    A file of your own is named after its place too: its cells are neither those of a
    data set of that name, nor those of a file of that name elsewhere.
    """
    folder = results_root() if results_dir is None else Path(results_dir)
    name = dataset
    if dataset.endswith((".h5ad", ".yml", ".yaml")):
        place = Path(dataset).expanduser().resolve()
        digest = hashlib.sha256(str(place).encode()).hexdigest()[:6]
        name = f"{_OWN}{place.stem}_{digest}"
    slug = re.sub(r"[^A-Za-z0-9_.]+", "_", name)
    return folder / f"{chapter}-{slug}-{experiment}.json"


def _is_own(path: Path) -> bool:
    return f"-{_OWN}" in path.name


def write_record(
    path: str | os.PathLike[str],
    rows: pd.DataFrame | Sequence[Mapping[str, Any]],
    config: Any,
    *,
    device: Any,
    seconds: float,
    data_hash: str,
    modules: Iterable[str],
    **extra: Any,
) -> Path:
    """Write a record of a run, all at once or not at all.

    Parameters
    ----------
    path
        Where; see `record_path`.
    rows
        A tidy table, or a list of one dict per measurement.
    config
        A `Config`, or a dict of what was varied.
    device
        The device, or its name in words.
    seconds
        Wall-clock seconds of the whole run.
    data_hash
        Hash of the cells that were used.
    modules
        Names of the scgenlib modules whose code made the numbers; the modules
        that they import are added, but for those that only speak, draw or store.
    **extra
        Further JSON-able facts for the provenance.

    Raises
    ------
    OutputError
        The file cannot be written; nothing is left behind.
    """
    named = {_short(m) for m in modules}
    names = sorted(named | (_closure(named) - _NO_NUMBERS))
    table = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    provenance = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": _device_words(device),
        "seconds": round(float(seconds), 2),
        "peak_memory_mb": peak_memory_mb(),
        "versions": versions(),
        "data_hash": data_hash,
        "code_hash": code_hash(names),
        "modules": names,
        **extra,
    }
    document = {
        "rows": list(table),
        "config": settings,
        "provenance": provenance,
    }
    # A NaN has no place in JSON; a missing measurement is null.
    text = json.dumps(_jsonable(document), indent=1, allow_nan=False) + "\n"
    target = Path(path)
    with atomic(target, "The record cannot be written") as part:
        part.write_text(text, encoding="utf-8")
    return target


def recorded(
    chapter: str,
    dataset: str,
    experiment: str,
    results_dir: str | os.PathLike[str] | None = None,
    **columns: str,
) -> Record | None:
    """Return a recorded run, or None after printing the line that makes one.

    That line names `columns` (label_key, batch_key) too.
    """
    path = record_path(chapter, dataset, experiment, results_dir)
    _note(path.name, path.parent)
    if not path.is_file():
        line = _make_line(chapter, dataset, experiment, columns)
        say(
            f"Not run yet: {experiment} on {dataset}. To make this record, in minutes "
            "to hours:"
        )
        print(line)  # to be copied, so in one piece
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows, config = document["rows"], document["config"]
        return Record(rows, config, document["provenance"], path)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(
            message(
                "A recorded run cannot be read",
                found=path.name,
                do="Delete it and run:\n"
                + _make_line(chapter, dataset, experiment, columns),
            )
        ) from error


def recorded_on(
    chapter: str, experiment: str, results_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """Return the data sets that have this record, as their names stand in files."""
    folder = results_root() if results_dir is None else Path(results_dir)
    pattern = f"{chapter}-*-{experiment}.json"
    _note(pattern, folder)
    found = (p.stem for p in sorted(folder.glob(pattern)) if not _is_own(p))
    return [stem[len(chapter) + 1 : -len(experiment) - 1] for stem in found]


def fingerprint(pattern: str, results_dir: str | os.PathLike[str] | None = None) -> str:
    """Return twelve hexadecimal digits that name what the records `pattern` say.

    Records of somebody's own files do not count.
    """
    folder = results_root() if results_dir is None else Path(results_dir)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.glob(pattern) if not _is_own(p)):
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def asked() -> dict[str, str]:
    """Return the records that this process asked for, with their fingerprints then.

    So a notebook can be held to the records that its outputs show. A record that is
    not there has a fingerprint too: once it is, the outputs are stale.
    """
    return dict(sorted(_asked.items()))


def _note(pattern: str, folder: Path) -> None:
    _asked[pattern] = fingerprint(pattern, folder)


def cells_hash(adata: AnnData) -> str:
    """Return the hash of the cells of a record: values, names, types and conditions."""
    from scgenlib.estimator import data_hash

    return data_hash(adata, [name for name in _COLUMNS if name in adata.obs])


def _make_line(
    chapter: str, dataset: str, experiment: str, columns: Mapping[str, str]
) -> str:
    given = {"CHAPTER": chapter, "DATASET": dataset}
    given |= {key.upper(): value for key, value in columns.items()}
    given |= {"PROFILE": "paper", "SEEDS": "1"} if experiment == "paper" else {}
    words = (shlex.quote(f"{name}={value}") for name, value in given.items())
    return "  make results " + " ".join(words)


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if hasattr(value, "tolist"):
        return _jsonable(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def _device_words(device: Any) -> str:
    import torch

    name = str(device)
    if name.startswith("cuda") and torch.cuda.is_available():
        return f"{name} ({torch.cuda.get_device_name(torch.device(name))})"
    return name


# --- versions, memory, hashes ---------------------------------------------------


def versions() -> dict[str, str]:
    """Return the versions that numbers depend on, without build suffixes."""
    names = ("torch", "numpy", "scipy", "scikit-learn", "anndata")
    found = {name: importlib.metadata.version(name).split("+")[0] for name in names}
    python = ".".join(platform.python_version_tuple()[:2])
    return {"python": python, "scgenlib": scgenlib.__version__, **found}


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    try:
        import resource
    except ImportError:  # Windows has no such record
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3), 1)


def code_hash(modules: Iterable[str]) -> str:
    """Return a SHA-256 over modules' code without docstrings and comments.

    Parameters
    ----------
    modules
        Names of scgenlib modules, with or without the leading `scgenlib.`.
    """
    digest = hashlib.sha256()
    for name in sorted({_short(m) for m in modules}):
        digest.update(f"{name}\n{_bare_code(_source(name))}\n".encode())
    return digest.hexdigest()


def notebook_hash(path: str | os.PathLike[str]) -> str:
    """Return a SHA-256 over a notebook's code and the scgenlib code it uses."""
    cells = _code_cells(path)
    digest = hashlib.sha256(code_hash(imported_modules(path)).encode())
    for cell in cells:
        lines = [line.rstrip() for line in cell.strip().splitlines()]
        digest.update(("\n".join(lines) + "\n\n").encode())
    return digest.hexdigest()


def imported_modules(path: str | os.PathLike[str]) -> list[str]:
    """Return the scgenlib modules a notebook imports, and those they import."""
    direct: set[str] = set()
    for cell in _code_cells(path):
        kept = [
            ln for ln in cell.splitlines() if not ln.lstrip().startswith(("%", "!"))
        ]
        direct |= _imports(ast.parse("\n".join(kept)), "")
    return sorted(_closure(direct))


def _code_cells(path: str | os.PathLike[str]) -> list[str]:
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    return [
        "".join(cell["source"])
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        and "injected-parameters" not in cell["metadata"].get("tags", [])
    ]


def _short(module: str) -> str:
    return module.removeprefix("scgenlib").removeprefix(".")


def _file(name: str) -> Path | None:
    """Return the file of module `name` (such as 'metrics.generation')."""
    stem = _PACKAGE.joinpath(*name.split("."))
    for candidate in (stem.with_name(stem.name + ".py"), stem / "__init__.py"):
        if name and candidate.is_file():
            return candidate
    return None


def _source(name: str) -> str:
    file = _file(name)
    if file is None:
        raise ConfigError(message("scgenlib has no such module", found=name))
    return file.read_text(encoding="utf-8")


def _bare_code(source: str) -> str:
    """Return `source` without docstrings and comments, in one fixed layout."""
    tree = ast.parse(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if (
            isinstance(node, holders)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _closure(modules: Iterable[str]) -> set[str]:
    """Return `modules` and every scgenlib module that they import, at any depth."""
    waiting = {_short(m) for m in modules} - {""}
    done: set[str] = set()
    while waiting:
        name = waiting.pop()
        done.add(name)
        waiting |= _imports(ast.parse(_source(name)), name) - done
    return done


def _imports(tree: ast.Module, inside: str) -> set[str]:
    """Return the scgenlib modules that the code `tree` of module `inside` names."""
    found: set[str] = set()
    package_names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "scgenlib":
                    package_names.add(alias.asname or "scgenlib")
                elif alias.name.startswith("scgenlib."):
                    found |= _resolve(_short(alias.name))
                    package_names |= set() if alias.asname else {"scgenlib"}
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, inside)
            if base is not None:
                for alias in node.names:
                    found |= _resolve(f"{base}.{alias.name}".strip("."))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in package_names:
                found |= _resolve(node.attr)
    return found


def _base(node: ast.ImportFrom, inside: str) -> str | None:
    """Return the package part of a `from ... import`, or None if not ours."""
    module = node.module or ""
    if node.level == 0:
        ours = module == "scgenlib" or module.startswith("scgenlib.")
        return _short(module) if ours else None
    parts = inside.split(".") if inside else []
    if (file := _file(inside)) is not None and file.name == "__init__.py":
        parts = [*parts, ""]
    kept = parts[: len(parts) - node.level]
    return ".".join([*kept, *([module] if module else [])])


def _resolve(name: str) -> set[str]:
    """Return the modules that hold `name`, which may end in a function's name."""
    name = ".".join(
        [
            scgenlib._EXPORTS.get(name.split(".")[0], name.split(".")[0]),
            *name.split(".")[1:],
        ]
    )
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return {prefix for prefix in prefixes if _file(prefix) is not None}
