"""Put a user's own .h5ad file under the data contract."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.contract import (
    as_conditions,
    as_labels,
    check_anndata,
    check_labels,
    check_shape,
)
from scgenlib.errors import DataError, message
from scgenlib.preprocess import normalise, select_genes, value_scale
from scgenlib.readers import unique_names

__all__ = ["condition_column", "load_h5ad", "obs_columns"]

_TARGET_SUM = 1e4


def _candidates(stored: ad.AnnData) -> dict[str, Any]:
    """Return the matrices that may hold expression, all on the genes of X."""
    out: dict[str, Any] = {}
    if "counts" in stored.layers:
        out["layers['counts']"] = stored.layers["counts"]
    if stored.X is not None:
        out["X"] = stored.X
    raw = stored.raw
    if raw is not None and raw.var_names.is_unique:
        where = raw.var_names.get_indexer(stored.var_names)
        if (where >= 0).all():
            out["raw.X"] = raw.X[:, where]
    return out


def _choose(stored: ad.AnnData) -> tuple[str, str, Any]:
    """Return where the best values are, their scale, and the values.

    Counts come before logarithms, because X can be made from counts.
    """
    matrices, scales, reasons = _candidates(stored), {}, []
    for where, matrix in matrices.items():
        mark = "log1p" in stored.uns and not where.startswith("layers")
        try:
            scales[where] = value_scale(matrix, log1p_mark=mark)
            reasons.append(f"{where} is {scales[where]}")
        except DataError as error:
            reasons.append(f"{where}: {error}")
    for wanted in ("counts", "log1p", "log2"):
        for where, scale in scales.items():
            if scale == wanted and (wanted == "counts" or where != "layers['counts']"):
                return where, scale, matrices[where]
    raise DataError(
        message(
            "No matrix of the file holds raw counts or log1p values",
            found="; ".join(reasons) or "no matrix at all",
            allowed="raw counts in layers['counts'], X or raw.X, or log1p of"
            " normalised counts in X or raw.X",
            do="Put the raw counts in adata.layers['counts'] and save the file again.",
        )
    )


def _clusters(adata: ad.AnnData) -> pd.Series:
    """Return Leiden clusters, for a file without labels."""
    import scanpy as sc

    work = ad.AnnData(adata[:, select_genes(adata, 2000)].X, obs=adata.obs[[]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.pca(work, n_comps=min(50, work.n_obs - 1, work.n_vars - 1))
        sc.pp.neighbors(work, n_neighbors=min(15, work.n_obs - 1), random_state=0)
        sc.tl.leiden(
            work, flavor="igraph", n_iterations=2, directed=False, random_state=0
        )
    return "cluster " + work.obs["leiden"].astype(str)


def condition_column(columns: Collection[str]) -> str | None:
    """Return the column of `obs` that says how cells were perturbed, if any does."""
    return next((c for c in ("perturbation", "condition") if c in columns), None)


def obs_columns(path: Path) -> list[str]:
    """Return the columns of `obs` of an .h5ad file, without reading it.

    Empty for a file that is none: `load_h5ad` says what is wrong with it.
    """
    import h5py

    try:
        with h5py.File(path) as file:
            obs = file["obs"]
            names = list(obs) if isinstance(obs, h5py.Group) else obs.dtype.names
            return [n for n in names if n != "index" and not n.startswith("_")]
    except (OSError, KeyError):
        return []


def _name_conditions(adata: ad.AnnData, verbose: bool) -> None:
    """Add `obs["perturbation"]`; name the genes as the perturbations name theirs."""
    column = condition_column(adata.obs.columns)
    if column is None:
        return
    adata.obs["perturbation"] = as_conditions(adata.obs[column])
    names = adata.obs["perturbation"].cat.categories
    if verbose:
        print(f"read as perturbations: obs[{column!r}], {len(names)} conditions")
    if "gene_name" not in adata.var:
        return
    # As GEARS keeps them: identifiers in the index, symbols in a column.
    symbols = adata.var["gene_name"].astype(object)
    symbols = symbols.where(symbols.notna(), adata.var_names).astype(str)
    targets = {gene for name in names for gene in name.split("+")}
    if len(targets & {*symbols}) > len(targets & {*adata.var_names}):
        adata.var["gene_id"] = adata.var_names.to_numpy()
        adata.var_names = unique_names([*symbols])
        if verbose:
            print("var['gene_name'] names the genes, as the conditions do")


def load_h5ad(path: Path, label_key: str | None, verbose: bool) -> ad.AnnData:
    """Load an .h5ad file whose values are counts or log1p-normalised.

    Parameters
    ----------
    path
        An existing file.
    label_key
        Column of cell types. None: "cell_type", or Leiden clusters without it.
    verbose
        Say which matrix was used. That labels had to be made is always said.

    Returns
    -------
    AnnData
        Under the contract except for the final check, which `datasets.load` makes.

    Raises
    ------
    DataError
        If the file cannot be read, or holds neither counts nor log1p values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # files of older formats read well
            stored = ad.read_h5ad(path)
    except Exception as error:
        raise DataError(
            message(
                f"{path.name} cannot be read as an .h5ad file",
                found=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
                if str(error)
                else type(error).__name__,
                do="It may be truncated: compare its size with the original's.",
            )
        ) from error
    check_shape(stored)
    if label_key is not None:
        check_labels(stored.obs, label_key, 1)

    where, scale, values = _choose(stored)
    adata = ad.AnnData(obs=stored.obs.copy(), var=stored.var.copy())
    if scale == "counts":
        adata.layers["counts"] = sp.csr_matrix(values, dtype=np.float32)
        adata.X = normalise(adata.layers["counts"], _TARGET_SUM)
    else:
        adata.X = sp.csr_matrix(values, dtype=np.float32)
        if scale == "log2":
            adata.X *= np.float32(np.log(2.0))
    if verbose:
        print(f"{path.name}: values from {where}, which are {scale}")

    label_key = label_key or "cell_type"
    is_labelled = label_key in stored.obs
    if is_labelled:
        labels = stored.obs[label_key]
    else:
        check_anndata(adata)
        labels = _clusters(adata)
        others = [
            name
            for name in stored.obs.columns
            if not pd.api.types.is_float_dtype(stored.obs[name])
            and 2 <= stored.obs[name].nunique() <= 100
        ]
        hint = f", such as {', '.join(others)}" if others else ""
        print(
            f"Warning: {path.name} has no column 'cell_type'; Leiden clusters of all"
            " cells, held-out ones too, stand in for cell types. To use known labels,"
            f" give their column as label_key{hint}."
        )
    adata.obs["cell_type"] = as_labels(labels)
    if "batch" in adata.obs:
        adata.obs["batch"] = as_labels(adata.obs["batch"])
    _name_conditions(adata, verbose)
    sizes = adata.obs["cell_type"].value_counts()
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    depth: dict[str, float | None] = {"mean": None, "sd": None}
    if scale == "counts":
        total = np.asarray(adata.layers["counts"].sum(axis=1, dtype=np.float64))
        depth = {"mean": float(total.mean()), "sd": float(total.std(ddof=1))}
    adata.uns["dataset"] = {
        "name": path.stem,
        "title": path.name,
        "citation": "your own file",
        "doi": None,
        "accession": None,
        "licence": "not stated",
        "organism": "not stated",
        "source": path.name,
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "label_counts": {str(k): int(v) for k, v in sizes.items()},
        "labels": "given" if is_labelled else "leiden clusters of all cells",
        "value_scale": scale,
        "genes_preselected": False,
        "depth": depth,
        "recipe": {
            "target_sum": _TARGET_SUM if scale == "counts" else None,
            "gene_filter": {"min_cells_fraction": 0.0, "min_value": 0.0},
        },
        "rare_threshold": None,
        "tasks": [],
        "embedded": False,
        "verified": True,
        "notes": f"Values from {where}.",
        "sha256": sha256,
        "simulated": False,
    }
    return adata
