"""What metrics and baselines share: matrices in any form, distances, PCA."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.metrics import euclidean_distances
from sklearn.neighbors import NearestNeighbors

from scgenlib.errors import DataError, message

Matrix: TypeAlias = Any  # ndarray or csr_matrix; no common type covers both
Cells: TypeAlias = Any  # AnnData, DataFrame, array or sparse matrix: cells x genes

_DENSE_LIMIT = 1_000_000_000  # bytes; nothing larger is ever made dense


def as_matrix(cells: Cells) -> Matrix:
    """Return the values of `cells` as a 2-D float array or CSR matrix.

    Parameters
    ----------
    cells
        AnnData (its `X`), DataFrame, array or sparse matrix, cells x genes.

    Returns
    -------
    ndarray or csr_matrix
        Sparse stays sparse; the values are not copied where that can be avoided.

    Raises
    ------
    DataError
        If there are no cells or genes, the shape is not 2-D, or a value is NaN
        or infinite.
    """
    values = cells.X if isinstance(cells, AnnData) else cells
    if isinstance(values, pd.DataFrame):
        values = values.to_numpy()
    if sp.issparse(values):
        matrix = sp.csr_matrix(values)
        finite = np.isfinite(matrix.data).all()
    else:
        matrix = np.asarray(values)
        finite = matrix.dtype.kind in "fiub" and bool(np.isfinite(matrix).all())
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DataError(
            message(
                "A metric needs a table of cells x genes",
                found=f"shape {tuple(matrix.shape)}",
                allowed="two dimensions, at least one cell and one gene",
            )
        )
    if not finite:
        raise DataError(
            message(
                "A metric needs finite numbers",
                found="NaN, infinity or text among the values",
                do="Look at the generated cells: training may have diverged.",
            )
        )
    if matrix.dtype.kind != "f":
        matrix = matrix.astype(np.float32)
    return matrix


def as_pair(first: Cells, second: Cells) -> tuple[Matrix, Matrix]:
    """Return two sets of cells with the same genes in the same order.

    Two AnnData are matched by gene name; everything else by position.

    Raises
    ------
    DataError
        If the genes differ in number or in name.
    """
    if isinstance(first, AnnData) and isinstance(second, AnnData):
        names = second.var_names
        if not first.var_names.equals(names):
            absent = first.var_names.difference(names)
            if len(absent) or second.n_vars != first.n_vars:
                raise DataError(
                    message(
                        "Two sets of cells are compared on the same genes",
                        found=f"{first.n_vars} and {second.n_vars} genes, "
                        f"{len(absent)} of the first not in the second",
                        do="Restrict both to the genes that they share.",
                    )
                )
            second = second[:, first.var_names]
    x, y = as_matrix(first), as_matrix(second)
    if x.shape[1] != y.shape[1]:
        raise DataError(
            message(
                "Two sets of cells are compared on the same genes",
                found=f"{x.shape[1]} and {y.shape[1]} genes",
            )
        )
    if sp.issparse(x) != sp.issparse(y):
        # Products of a sparse with a full matrix in sparse form are slow.
        n_bytes = (x.shape[0] + y.shape[0]) * x.shape[1] * 8
        form = dense if n_bytes <= _DENSE_LIMIT else sp.csr_matrix
        return form(x), form(y)
    return x, y


def labels_of(cells: AnnData, label_key: str) -> np.ndarray:
    """Return a label column as an array of strings, or raise a DataError."""
    if label_key not in cells.obs:
        raise DataError(
            message(
                "The label column is absent",
                found=label_key,
                allowed=list(cells.obs.columns),
            )
        )
    return cells.obs[label_key].astype(str).to_numpy()


def dense(matrix: Matrix) -> np.ndarray:
    """Return a dense copy, refusing to make one above 1 GB."""
    if not sp.issparse(matrix):
        return np.asarray(matrix)
    n_bytes = _dense_bytes(matrix)
    if n_bytes > _DENSE_LIMIT:
        raise DataError(
            message(
                "This matrix is too large to be made dense",
                found=f"{n_bytes / 1e9:.1f} GB",
                allowed="up to 1 GB",
                do="Use fewer cells or genes.",
            )
        )
    return matrix.toarray()


def stack(first: Matrix, second: Matrix) -> Matrix:
    """Put two matrices on top of each other; sparse if either is sparse."""
    if sp.issparse(first) or sp.issparse(second):
        return sp.vstack([sp.csr_matrix(first), sp.csr_matrix(second)], "csr")
    return np.vstack([first, second])


def subsample(matrix: Matrix, n: int, seed: int) -> Matrix:
    """Return `n` rows drawn without replacement, or all if there are fewer."""
    if matrix.shape[0] <= n:
        return matrix
    rows = np.random.default_rng(seed).choice(matrix.shape[0], n, replace=False)
    return matrix[np.sort(rows)]


def distances(x: Matrix, y: Matrix) -> np.ndarray:
    """Euclidean distances, n x m float64; equal rows are exactly 0 apart.

    The fast formula |x|^2 + |y|^2 - 2xy leaves rounding noise between equal
    rows. Squared distances below 1e-12 of the squared norms are that noise.
    """
    squared = euclidean_distances(x, y, squared=True).astype(np.float64)
    size = _square_norms(x)[:, None] + _square_norms(y)[None, :]
    noise = 1e-12 if x.dtype == y.dtype == np.float64 else 1e-11
    squared[squared < noise * size] = 0.0
    return np.sqrt(squared)


def nearest(
    x: Matrix, y: Matrix, k: int = 1, *, itself: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to, and index of, the k-th nearest row of `y` for each row of `x`.

    With `itself`, `x` and `y` are the same cells and a cell is not its own
    neighbour. Distances are recomputed without rounding noise.
    """
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(y)
    found = search.kneighbors(None if itself else x, return_distance=False)[:, -1]
    gap = x - y[found]
    return np.sqrt(_square_norms(gap)), found


def fit_pca(matrix: Matrix, n_pcs: int, seed: int) -> PCA:
    """Fit at most `n_pcs` principal components.

    A sparse matrix of up to 1 GB is made dense, which is faster; a larger one is
    not.
    """
    n_pcs = max(1, min(n_pcs, min(matrix.shape) - 1))
    if sp.issparse(matrix) and _dense_bytes(matrix) > _DENSE_LIMIT:
        return PCA(n_pcs, svd_solver="arpack", random_state=seed).fit(matrix)
    return PCA(n_pcs, svd_solver="randomized", random_state=seed).fit(dense(matrix))


def mean_variance(matrix: Matrix, *, ddof: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Per-gene mean and variance (divisor n - ddof), in float64."""
    n = matrix.shape[0]
    if sp.issparse(matrix):
        matrix = sp.csr_matrix(matrix)
        # bincount sums in float64 without a second copy of the matrix.
        values, at = matrix.data.astype(np.float64), matrix.indices
        total = np.bincount(at, weights=values, minlength=matrix.shape[1])
        square = np.bincount(at, weights=values**2, minlength=matrix.shape[1])
    else:
        total = matrix.sum(axis=0, dtype=np.float64)
        square = np.einsum("ij,ij->j", matrix, matrix, dtype=np.float64)
    mean = total / n
    return mean, np.maximum(square - n * mean**2, 0.0) / max(n - ddof, 1)


def moments(matrix: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per-gene mean, variance (divisor n) and fraction of zeros, in float64."""
    seen = np.asarray((matrix != 0).sum(axis=0)).ravel()
    return *mean_variance(matrix), 1 - seen / matrix.shape[0]


def _square_norms(matrix: Matrix) -> np.ndarray:
    if sp.issparse(matrix):
        return np.asarray(matrix.power(2).sum(1, dtype=np.float64)).ravel()
    return np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64)


def _dense_bytes(matrix: Matrix) -> int:
    return matrix.shape[0] * matrix.shape[1] * matrix.dtype.itemsize
