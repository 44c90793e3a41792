"""Put new cells beside a map: their genes, their labels, their place in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.optimize import minimize_scalar
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from scgenlib.contract import as_labels, check_counts, check_shape
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.preprocess import normalise

__all__ = [
    "best_labels",
    "joined",
    "match_genes",
    "matching_pairs",
    "place_in_map",
    "temperature",
]

#: The label of a cell whose best type is not probable enough.
UNKNOWN = "unknown"


def canonical(values: Any) -> sparse.csr_matrix:
    """Return a matrix as CSR float32 in which every entry stands once."""
    X = sparse.csr_matrix(values, dtype=np.float32)
    if not X.has_canonical_format:
        X = X.copy()
        X.sum_duplicates()
    return X


def match_genes(
    values: Any, names: Sequence[str] | pd.Index, genes: Sequence[str]
) -> tuple[sparse.csr_matrix, dict[str, int]]:
    """Put a matrix on another list of genes: matched by name, absent ones are 0.

    Parameters
    ----------
    values
        Shape (n_cells, len(names)).
    names
        Gene of each column, unique.
    genes
        The genes to have, in order.

    Returns
    -------
    tuple
        CSR float32 (n_cells, len(genes)); and a dict with ``genes_missing``, those of
        `genes` that were absent, and ``genes_extra``, columns that were left out.

    Raises
    ------
    DataError
        No gene is shared: the names are of another kind.
    """
    names, X = pd.Index(names), canonical(values)
    if len(names) == len(genes) and (names == pd.Index(genes)).all():
        return X, {"genes_missing": 0, "genes_extra": 0}
    where = names.get_indexer(pd.Index(genes))
    here = np.flatnonzero(where >= 0)
    if not len(here):
        raise DataError(
            message(
                "None of the model's genes is among those of the cells",
                found=f"names such as {', '.join(map(str, names[:3]))}",
                allowed=f"names such as {', '.join(genes[:3])}",
                do="Use the same kind of gene names as the cells of the fit.",
            )
        )
    # A column picked by a matrix product: sorted or not, the result is the same.
    pick = sparse.csr_matrix(
        (np.ones(len(here), np.float32), (where[here], here)),
        (len(names), len(genes)),
    )
    out = sparse.csr_matrix(X @ pick)
    out.sort_indices()
    missing = len(genes) - len(here)
    return out, {"genes_missing": missing, "genes_extra": len(names) - len(here)}


def joined(
    parts: Sequence[AnnData],
    genes: Sequence[str],
    columns: Sequence[str],
    on_counts: bool = True,
) -> tuple[AnnData, np.ndarray]:
    """Put sets of cells under each other, on the same genes and columns of ``obs``.

    A column that a set does not have is missing for its cells, and one that no set
    has is an error. Cells without any of the genes are left out. All names get the
    number of their set if one occurs twice.

    Parameters
    ----------
    parts, genes, columns
        The sets of cells, and what to keep of them.
    on_counts
        Whether to join ``layers["counts"]``, from which X is made, or X.

    Returns
    -------
    tuple
        The cells, and for each the number of its set.
    """
    for column in columns:
        if not any(column in part.obs for part in parts):
            raise unknown("column", column, parts[0].obs.columns, error=DataError)
    made, kept = [], []
    names = pd.Index(np.concatenate([part.obs_names.astype(str) for part in parts]))
    apart = names.is_unique
    for i, part in enumerate(parts):
        check_shape(part, min_cells=1)
        if on_counts:
            check_counts(part)
        values = part.layers["counts"] if on_counts else part.X
        X, _ = match_genes(values, part.var_names, genes)
        obs = pd.DataFrame(
            index=part.obs_names.astype(str) + ("" if apart else f"-{i}")
        )
        for column in columns:
            here = column in part.obs
            found = as_labels(part.obs[column]).to_numpy(object) if here else None
            obs[column] = found
        some = np.asarray(abs(X).sum(axis=1)).ravel() > 0
        cells = AnnData(X, obs=obs, var=pd.DataFrame(index=list(genes)))
        made.append(cells[some].copy())
        kept.append(np.full(int(some.sum()), i))
    both = ad.concat(made, merge="same")
    if on_counts:
        both.layers["counts"] = both.X
        both.X = normalise(both.X, 1e4)
    return both, np.concatenate(kept)


# ----------------------------------------------------------------------- labels


def temperature(logits: Tensor, codes: Tensor) -> float:
    """Return the temperature T under which softmax(logits / T) fits labels best.

    Guo et al. (2017): one number cannot change which type is the most probable, only
    how sure the model says it is. Targets are smoothed as by Platt, since n cells that
    are all right do not show that errors are rarer than 1 in n, and T stays above 0.5:
    a smaller one would make the model sure of cells unlike any it has seen. Fewer than
    20 labelled cells leave T at 1.

    Parameters
    ----------
    logits
        Of held-out cells, (n_cells, n_types).
    codes
        Their types, (n_cells,); -1 is unlabelled.
    """
    known = codes >= 0
    n = int(known.sum())
    if n < 20:
        return 1.0
    own, true = logits[known].double(), codes[known]

    def loss(log_t: float) -> float:
        scaled = own / np.exp(log_t)
        return float(F.cross_entropy(scaled, true, label_smoothing=1 / (n + 2)))

    found = minimize_scalar(loss, bounds=(np.log(0.5), np.log(20.0)), method="bounded")
    return float(np.exp(found.x))


def best_labels(
    tables: Mapping[str, pd.DataFrame], min_probability: float = 0.0
) -> pd.DataFrame:
    """Return the most probable type of each cell, for each table of probabilities.

    Parameters
    ----------
    tables
        Name -> probabilities, n_cells x n_types.
    min_probability
        Below it a cell is called "unknown".

    Returns
    -------
    pandas.DataFrame
        The columns ``<name>`` and ``<name>_probability`` for each table.
    """
    if not 0 <= min_probability <= 1:
        raise ConfigError(
            message("min_probability", found=min_probability, allowed="0 to 1")
        )
    columns: dict[str, Any] = {}
    for name, table in tables.items():
        if UNKNOWN in table and min_probability:
            raise ConfigError(
                message(
                    f"A cell type is called {UNKNOWN!r}, as rejected cells are",
                    found=name,
                    do="Rename that type and fit again, or leave min_probability at 0.",
                )
            )
        best = table.max(axis=1)
        labels = table.idxmax(axis=1).astype(object)
        columns[name] = labels.where(best >= min_probability, UNKNOWN)
        columns[f"{name}_probability"] = best
    return pd.DataFrame(columns)


def matching_pairs(table: pd.DataFrame, min_share: float = 0.1) -> pd.DataFrame:
    """Return which types of two vocabularies go together.

    Parameters
    ----------
    table
        Numbers of cells, as `ScAtlasVAE.align_labels` returns them.
    min_share
        A pair is kept when it holds this share of its row and of its column.

    Returns
    -------
    pandas.DataFrame
        One row per pair: the two types, cells, share of row and of column; largest
        first.
    """
    cells = table.to_numpy(float)
    of_row = cells / np.maximum(cells.sum(1, keepdims=True), 1)
    of_column = cells / np.maximum(cells.sum(0, keepdims=True), 1)
    kept = (np.minimum(of_row, of_column) >= min_share) & (cells > 0)
    i, j = np.nonzero(kept)
    pairs = {
        str(table.index.name or "first"): table.index[i],
        str(table.columns.name or "second"): table.columns[j],
    }
    numbers = {
        "n_cells": cells[i, j].astype(int),
        "share_of_row": of_row[i, j],
        "share_of_column": of_column[i, j],
    }
    long = pd.DataFrame({**pairs, **numbers})
    return long.sort_values("n_cells", ascending=False, ignore_index=True)


# ---------------------------------------------------------------------- pictures


def place_in_map(
    reference: np.ndarray, picture: np.ndarray, query: np.ndarray, k: int = 5
) -> np.ndarray:
    """Place new cells in a picture of old ones: the mean place of their neighbours.

    The picture (UMAP, say) is that of the old cells alone and stays as it is, so that
    new cells cannot bend it. A new cell gets a place also when no old one is like it,
    on a group or between groups: look at the distance to its neighbours too.

    Parameters
    ----------
    reference
        Codes of the old cells, (n_old, n_latent).
    picture
        Their coordinates, (n_old, 2).
    query
        Codes of new cells, (n_new, n_latent).
    k
        Neighbours to average over.

    Returns
    -------
    numpy.ndarray
        Coordinates (n_new, 2).
    """
    search = NearestNeighbors(n_neighbors=min(k, len(reference))).fit(reference)
    near = search.kneighbors(query, return_distance=False)
    return np.asarray(picture)[near].mean(axis=1)
