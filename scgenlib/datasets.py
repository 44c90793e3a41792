"""Manifests to AnnData: load, list, card; download, checksum, cache.

A manifest (`data_manifests/<name>.yml`) says where the files are, who may use them,
how they are read and what must come out. `load` checks all of it.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scgenlib.contract import as_conditions, as_labels, check_anndata
from scgenlib.download import download
from scgenlib.errors import (
    DataError,
    DownloadError,
    ManifestError,
    ScgenError,
    message,
    nearest,
)
from scgenlib.errors import unknown as unknown_error
from scgenlib.preprocess import normalise
from scgenlib.words import say

__all__ = [
    "card",
    "check_anndata",
    "fetch",
    "has_perturbation",
    "list",
    "load",
    "names",
    "verify",
]

_HERE = Path(__file__).resolve().parent
# Columns of obs that a manifest may name, beside the labels.
_COLUMNS = ("batch", "perturbation")
# What the card leaves to the manifest.
_NOT_ON_CARD = ("files", "reader", "options", "labels", "genes", *_COLUMNS)


# --- manifests ---------------------------------------------------------------------


def _manifest_dir() -> Path:
    """Return the folder of manifests: beside the package, or inside a wheel."""
    for folder in (_HERE / "data_manifests", _HERE.parent / "data_manifests"):
        if (folder / "schema.json").is_file():
            return folder
    raise ManifestError(
        message(
            "The data manifests are missing from this installation",
            do="Install scgenlib again.",
        )
    )


@functools.cache
def _schema() -> dict[str, Any]:
    return json.loads((_manifest_dir() / "schema.json").read_text())


def _read_manifests(path: Path) -> builtins.list[dict[str, Any]]:
    """Read one file: a manifest, or one for each of its designs."""
    import yaml

    try:
        shared = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError(
            message(f"{path.name} is not YAML", found=str(error).splitlines()[0])
        ) from error
    designs = shared.get("designs") if isinstance(shared, dict) else None
    if not isinstance(designs, dict) or not all(
        isinstance(own, dict) for own in designs.values()
    ):
        return [_checked(shared, path)]
    rest = {field: value for field, value in shared.items() if field != "designs"}
    return [
        _checked(rest | own | {"name": f"{rest.get('name')}/{key}"}, path)
        for key, own in designs.items()
    ]


def _checked(manifest: Any, path: Path) -> dict[str, Any]:
    """Return a manifest that fits the schema, or raise naming the field."""
    import jsonschema

    from scgenlib.readers import READERS

    errors = builtins.list(
        jsonschema.Draft202012Validator(_schema()).iter_errors(manifest)
    )
    if errors:
        # Fields that do not exist explain most others, so they are told first.
        worst = max(errors, key=lambda e: e.validator == "additionalProperties")
        where = ".".join(str(part) for part in worst.absolute_path) or "top level"
        allowed: Any = None
        do = f"Mend the field {where!r} in {path.name}."
        if worst.validator == "additionalProperties":
            allowed = sorted(worst.schema["properties"])
            wrong = next(k for k in worst.instance if k not in allowed)
            do = f"Remove or rename the field {wrong!r} in {path.name}."
            guess = nearest(wrong, allowed)
            do += f" Did you mean {guess!r}?" if guess else ""
        elif worst.validator == "enum":
            allowed = worst.validator_value
        raise ManifestError(
            message(
                f"The manifest {path.name} does not fit its schema at {where}",
                found=worst.message,
                allowed=allowed,
                do=do,
            )
        )
    if manifest["reader"] not in {*READERS, "simulate"}:
        raise unknown_error(
            f"reader in {path.name}",
            manifest["reader"],
            [*READERS, "simulate"],
            error=ManifestError,
        )
    total = sum(manifest["label_counts"].values())
    if total != manifest["n_cells"]:
        raise ManifestError(
            message(
                f"The manifest {path.name} contradicts itself: label_counts must sum"
                " to n_cells",
                found=total,
                allowed=str(manifest["n_cells"]),
            )
        )
    return manifest


@functools.cache
def _manifests() -> dict[str, dict[str, Any]]:
    paths = sorted(_manifest_dir().glob("*.yml"))
    found = [manifest for path in paths for manifest in _read_manifests(path)]
    # What loads without a network comes first.
    found.sort(key=lambda m: (not m["embedded"], not m["verified"], m["name"]))
    return {manifest["name"]: manifest for manifest in found}


def _manifest(name: str | Path) -> tuple[dict[str, Any], Path | None]:
    """Return a manifest by name or path, and the folder it lies in if by path."""
    if str(name).endswith((".yml", ".yaml")):
        path = _existing(Path(name))
        manifest, *others = _read_manifests(path)
        if others:
            raise ManifestError(
                message(
                    f"{path.name} holds {len(others) + 1} designs",
                    allowed="one data set in a manifest that is given by path",
                    do="Copy the design that you mean, without `designs`.",
                )
            )
        return manifest, path.parent
    known = _manifests()
    if str(name) not in known:
        designs = [design for design in known if design.startswith(f"{name}/")]
        raise DataError(
            message(
                f"{name} is a family of data sets" if designs else "Unknown data set",
                found=str(name),
                allowed=", ".join(designs) or [*known],
                do="Also allowed: 'simulated:<name>', a path to an .h5ad file, or a"
                " path to a manifest (.yml).",
            )
        )
    return known[str(name)], None


def _plain(name: str | Path) -> tuple[str, bool]:
    """Return a name without 'simulated:', and whether that stood before it."""
    text = str(name)
    return text.removeprefix("simulated:"), text.startswith("simulated:")


def _existing(path: Path) -> Path:
    if path.is_file():
        return path
    others = sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))
    raise DataError(
        message(
            f"There is no such file in {path.parent}",
            found=path.name,
            allowed=others or f"an existing {path.suffix} file",
            do="Check the path; a relative path starts from the working directory.",
        )
    )


def _card_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card: the manifest's facts without the instructions to read it."""
    facts = {k: v for k, v in manifest.items() if k not in _NOT_ON_CARD}
    hashes = [file["sha256"] for file in manifest["files"]]
    facts["sha256"] = hashes[0] if len(hashes) == 1 else (hashes or None)
    facts["simulated"] = manifest["reader"] == "simulate"
    return json.loads(json.dumps(facts))


def card(name: str | Path) -> dict[str, Any]:
    """Return the card of a data set without loading it.

    Parameters
    ----------
    name
        A name from `list`, 'simulated:<name>', or a path to a manifest.

    Returns
    -------
    dict
        Name, title, citation, licence, size, label counts, value scale, recipe,
        tasks, notes.

    Raises
    ------
    DataError
        If there is no such data set.
    """
    inner, simulated = _plain(name)
    facts = _card_of(_manifest(inner)[0])
    if simulated:
        facts |= {
            "name": str(name),
            "title": f"Simulated cells at the size of {facts['name']}; none is real",
            "source": "scgenlib.simulate",
            "citation": "simulated by scgenlib",
            "sha256": None,
            "simulated": True,
            "embedded": True,
            "value_scale": "counts",
        }
    return facts


def names(task: str | None = None) -> builtins.list[str]:
    """Return the names of all data sets, or of those that serve a task."""
    return [n for n, m in _manifests().items() if task is None or task in m["tasks"]]


def has_perturbation(name: str | Path) -> bool:
    """Say whether the manifest of a data set names a column of perturbations."""
    return "perturbation" in _manifest(name)[0]


# --- files -------------------------------------------------------------------------


def _cache_dir() -> Path:
    import pooch

    return Path(pooch.os_cache("scgenlib"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_package(file: Mapping[str, Any]) -> Path | None:
    """Return the file inside an installed package, found without importing it."""
    inside = file.get("in_package")
    spec = importlib.util.find_spec(inside["package"]) if inside else None
    if inside is None or spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / inside["path"]
    # Another version of the package may ship another file: then look elsewhere.
    ours = path.is_file() and _sha256(path) in _allowed_hashes(file)
    return path if ours else None


def _folders(data_dir: str | Path | None, beside: Path | None) -> builtins.list[Path]:
    """Return the folders of files at hand, in the order in which they are tried."""
    at_hand = data_dir or os.environ.get("SCGENLIB_DATA_DIR")
    folders = [Path(at_hand).expanduser()] if at_hand else []
    return [*folders, beside] if beside else folders


def _find(
    file: Mapping[str, Any], data_dir: str | Path | None, beside: Path | None
) -> Path | None:
    """Return where a file lies: package, folder at hand, or cache."""
    inside = _in_package(file)
    if inside is not None:
        return inside
    for folder in [*_folders(data_dir, beside), _cache_dir()]:
        if (folder / file["path"]).is_file():
            return folder / file["path"]
    return None


def _allowed_hashes(file: Mapping[str, Any]) -> builtins.list[str]:
    hashes = [file["sha256"], file.get("in_package", {}).get("sha256")]
    return [h for h in hashes if h is not None]


def _locate(
    name: str, file: Mapping[str, Any], data_dir: str | Path | None, beside: Path | None
) -> Path:
    """Return a verified file, downloading it if it is not at hand."""
    path = _find(file, data_dir, beside)
    if path is None:
        path = _cache_dir() / file["path"]
        download(name, file["urls"], path, file["sha256"])
        return path
    allowed = _allowed_hashes(file)
    if allowed and (actual := _sha256(path)) not in allowed:
        ours = path.is_relative_to(_cache_dir())
        if ours:
            path.unlink()
        raise DownloadError(
            message(
                f"The file {file['path']} of {name} is not the one the manifest means",
                found=f"sha256 {actual}",
                allowed=f"sha256 {' or '.join(allowed)}",
                do="It was removed from the cache: load again to download it."
                if ours
                else "Replace or remove it, or unset SCGENLIB_DATA_DIR.",
            )
        )
    return path


def fetch(name: str, *, data_dir: str | Path | None = None) -> Path:
    """Bring the files of a data set to this machine and verify them.

    Returns
    -------
    pathlib.Path
        The folder of the first file.

    Raises
    ------
    DownloadError
        If a file cannot be had, or is not the one the manifest means.
    DataError
        If the data set is unknown, or has no files because it is simulated.
    """
    inner, simulated = _plain(name)
    manifest, beside = _manifest(inner)
    if simulated or not manifest["files"]:
        raise DataError(
            message(
                f"{name} is simulated and has no files",
                do=f"Nothing to fetch: load({name!r}) draws the cells.",
            )
        )
    paths = [_locate(name, file, data_dir, beside) for file in manifest["files"]]
    return paths[0].parent


def verify(name: str, *, data_dir: str | Path | None = None) -> dict[str, Any]:
    """Say whether the files of a data set are here and are the right ones.

    Nothing is downloaded. Simulated cells have no files, and nothing to be wrong.

    Returns
    -------
    dict
        "name"; "ok", True only if every file is here with the manifest's checksum;
        "verified", whether the manifest has checksums at all; "files", a list with
        "path", "found" (where, or None), "sha256", "expected" and "ok" for each.
    """
    inner, simulated = _plain(name)
    manifest, beside = _manifest(inner)
    files = []
    for file in [] if simulated else manifest["files"]:
        path = _find(file, data_dir, beside)
        actual = _sha256(path) if path else None
        expected = _allowed_hashes(file)
        files.append(
            {
                "path": file["path"],
                "found": str(path) if path else None,
                "sha256": actual,
                "expected": expected,
                "ok": actual in expected,
            }
        )
    return {
        "name": str(name) if simulated else manifest["name"],
        "ok": all(file["ok"] for file in files),
        "verified": simulated or manifest["verified"],
        "files": files,
    }


# --- loading -----------------------------------------------------------------------


def load(
    name: str | Path,
    *,
    label_key: str | None = None,
    batch_key: str | None = None,
    data_dir: str | Path | None = None,
    verbose: bool = True,
) -> ad.AnnData:
    """Load a data set under the data contract.

    Parameters
    ----------
    name
        A name from `list`; 'simulated:<name>' for simulated cells at that set's size;
        a path to a manifest (.yml); or a path to an .h5ad file.
    label_key
        Column that becomes `obs["cell_type"]`. None: the manifest's column; for an
        .h5ad file "cell_type", or Leiden clusters if there is no such column.
    batch_key
        Column that becomes `obs["batch"]`. None: the manifest's column; for an .h5ad
        file "batch", if there is one.
    data_dir
        Folder of files already at hand; None takes SCGENLIB_DATA_DIR.
    verbose
        Print one sentence about what was loaded.

    Returns
    -------
    AnnData
        X is CSR float32, log1p-normalised; `layers["counts"]` only if the values
        really are counts; `obs["cell_type"]` categorical; `obs["perturbation"]`, if
        known, with the names "ctrl", "A" and "A+B"; `uns["dataset"]` the card.

    Raises
    ------
    DataError
        If the data set is unknown or does not fulfil the contract.
    ManifestError
        If a manifest does not fit its schema.
    DownloadError
        If a file cannot be had or has the wrong checksum.
    """
    from scgenlib.simatlas import atlas
    from scgenlib.simperturb import screen
    from scgenlib.simulate import simulate, simulate_like

    inner, simulated = _plain(name)
    if inner.endswith(".h5ad") and not simulated:
        from scgenlib.h5ad import load_h5ad

        adata = load_h5ad(_existing(Path(inner)), label_key, verbose)
        adata.uns["dataset"]["tasks"] = sorted(
            {task for m in _manifests().values() for task in m["tasks"]}
        )
    elif simulated:
        adata = simulate_like(card(inner))
        _use_label(adata, label_key)
    else:
        manifest, beside = _manifest(name)
        if manifest["reader"] == "simulate":
            options = dict(manifest["options"])
            draws: dict[str, Callable[..., ad.AnnData]] = {
                "cells": simulate,
                "atlas": atlas,
                "screen": screen,
            }
            kind = options.pop("kind", "cells")
            if kind not in draws:
                raise unknown_error("kind", kind, draws, error=ManifestError)
            adata = draws[kind](**options)
            adata.uns["dataset"] |= _card_of(manifest)
            _use_label(adata, label_key)
        else:
            adata = _from_files(manifest, beside, data_dir, label_key)
        _compare(adata, manifest, own_labels=label_key is None)
    if batch_key is not None:
        if batch_key not in adata.obs:
            raise unknown_error(
                "batch column", batch_key, adata.obs.columns, error=DataError
            )
        adata.obs["batch"] = as_labels(adata.obs[batch_key])
    # A screen is often of one cell line; methods that need types ask for them again.
    few = 1 if simulated or "perturbation" in adata.obs else 2
    check_anndata(adata, label_key="cell_type", min_classes=few)
    if verbose:
        say(_line(adata))
    return adata


def _from_files(
    manifest: dict[str, Any],
    beside: Path | None,
    data_dir: str | Path | None,
    label_key: str | None,
) -> ad.AnnData:
    """Read the files of a manifest and put the values under the contract."""
    from scgenlib.readers import READERS

    name, reader = manifest["name"], manifest["reader"]
    paths = [_locate(name, file, data_dir, beside) for file in manifest["files"]]
    try:
        adata = READERS[reader](paths, manifest.get("options", {}))
    except ScgenError:
        raise
    except Exception as error:
        raise DataError(
            message(
                f"The files of {name} cannot be read by {reader}",
                found=f"{type(error).__name__}: {error}",
                do="Check the manifest's options, and that no file is truncated.",
            )
        ) from error
    labels = manifest["labels"]
    wanted = labels.get("keep", {})
    named = {key: manifest[key] for key in _COLUMNS if key in manifest}
    for column in (labels["column"], *wanted, *(n["column"] for n in named.values())):
        if column not in adata.obs:
            raise unknown_error(
                f"label column in the manifest of {name}"
                if column == labels["column"]
                else f"column in the manifest of {name}",
                column,
                adata.obs.columns,
                error=ManifestError,
            )
    types = adata.obs[labels["column"]].astype(str).replace(labels.get("rename", {}))
    adata.obs["cell_type"] = types
    keep = ~types.isin(labels.get("drop", [])).to_numpy()
    for column, value in wanted.items():
        values = [value] if isinstance(value, str) else value
        keep &= adata.obs[column].astype(str).isin(values).to_numpy()
    for key, about in named.items():
        column = as_labels(adata.obs[about["column"]])
        adata.obs[key] = column.cat.rename_categories(about.get("rename", {}))
    prefix = manifest.get("genes", {}).get("drop_prefix")
    genes = (
        ~adata.var_names.str.startswith(prefix)
        if prefix
        else np.ones(adata.n_vars, bool)
    )
    adata = adata[keep, genes].copy()
    if manifest["value_scale"] == "counts":
        adata.layers["counts"] = adata.X
    if manifest["value_scale"] != "log1p":
        adata.X = normalise(adata.X, manifest["recipe"]["target_sum"])
    adata.obs["cell_type"] = as_labels(adata.obs["cell_type"])
    for key in {*_COLUMNS} & {*adata.obs}:
        adata.obs[key] = as_labels(adata.obs[key])
    if "perturbation" in adata.obs:
        adata.obs["perturbation"] = as_conditions(adata.obs["perturbation"])
    adata.uns["dataset"] = _card_of(manifest)
    _use_label(adata, label_key)
    return adata


def _use_label(adata: ad.AnnData, label_key: str | None) -> None:
    """Make another column the cell type, and say so on the card."""
    if label_key is None:
        return
    if label_key not in adata.obs:
        raise unknown_error(
            "label column", label_key, adata.obs.columns, error=DataError
        )
    adata.obs["cell_type"] = as_labels(adata.obs[label_key])
    counts = adata.obs["cell_type"].value_counts()
    adata.uns["dataset"]["label_counts"] = {str(k): int(v) for k, v in counts.items()}
    adata.uns["dataset"]["rare_threshold"] = None


def _compare(adata: ad.AnnData, manifest: Mapping[str, Any], own_labels: bool) -> None:
    """Check what was read against the manifest.

    A verified manifest must be met. An unverified one was written without the files,
    so a difference is printed and the card says what was found.
    """
    found: dict[str, Any] = {"n_cells": adata.n_obs, "n_genes": adata.n_vars}
    if own_labels:
        sizes = adata.obs["cell_type"].value_counts()
        found["label_counts"] = {str(k): int(v) for k, v in sizes.items()}
    for field, value in found.items():
        if value == manifest[field]:
            continue
        if manifest["verified"]:
            raise DataError(
                message(
                    f"What was read from {manifest['name']} is not what its manifest"
                    f" says: {field} differs",
                    found=value,
                    allowed=str(manifest[field]),
                    do="The file, the reader or the manifest has changed.",
                )
            )
        say(f"{manifest['name']}: {field} is {value}, not {manifest[field]}")
        adata.uns["dataset"][field] = value


def _line(adata: ad.AnnData) -> str:
    """Return the sentence that `load` prints."""
    facts = adata.uns["dataset"]
    what = "counts" if "counts" in adata.layers else facts["value_scale"]
    if facts["simulated"]:
        origin = "SIMULATED, no real cell"
    else:
        origin = f"{facts['citation']}; {facts['licence']}"
    warning = "" if facts["verified"] else "; NOT VERIFIED (no checksum, see its notes)"
    n_types = adata.obs["cell_type"].nunique()
    kinds = f"{n_types} type{'s' * (n_types != 1)}"
    if "perturbation" in adata.obs:
        kinds += f", {adata.obs['perturbation'].nunique()} conditions"
    return (
        f"{facts['name']}: {adata.n_obs:,} cells x {adata.n_vars:,} genes,"
        f" {kinds}, {what}; {origin}{warning}"
    )


def list() -> pd.DataFrame:
    """Return one row per data set: name, size, tasks, licence, and whether it is here.

    Returns
    -------
    pandas.DataFrame
        Columns name, title, cells, genes, types, tasks, embedded, verified, licence.
    """
    rows = [
        {
            "name": m["name"],
            "title": m["title"],
            "cells": m["n_cells"],
            "genes": m["n_genes"],
            "types": len(m["label_counts"]),
            "tasks": ", ".join(m["tasks"]),
            "embedded": m["embedded"],
            "verified": m["verified"],
            "licence": m["licence"],
        }
        for m in _manifests().values()
    ]
    return pd.DataFrame(rows)
