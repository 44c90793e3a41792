"""Normalise, filter, choose genes, split, and tell what kind of numbers a matrix holds.

Nothing here knows a model. Every function leaves its input unchanged and keeps
sparse matrices sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib._matrix import mean_variance
from scgenlib.errors import ConfigError, DataError, message
from scgenlib.splits import hide_entries, rare_types, split, train_valid_test

__all__ = [
    "draw_molecules",
    "filter_cells_and_genes",
    "filter_genes",
    "genes_by_dispersion",
    "hide_entries",
    "linear_values",
    "normalise",
    "on_genes",
    "process",
    "rare_types",
    "scale_rows",
    "select_genes",
    "split",
    "train_valid_test",
    "value_scale",
]

# log1p of anything a cell can hold stays far below this (e^30 = 1e13 molecules).
_LOG_LIMIT = 30.0


def _values(X: Any) -> np.ndarray:
    """Return the stored values: the non-zeros of a sparse matrix, or all."""
    return X.data if sp.issparse(X) else np.asarray(X)


def _library(X: Any) -> np.ndarray:
    """Return the row sums as float64."""
    return np.asarray(X.sum(axis=1), dtype=np.float64).ravel()


def normalise(counts: Any, target_sum: float | None = 1e4) -> sp.csr_matrix:
    """Scale every cell to one total and take log(1 + x).

    Parameters
    ----------
    counts
        Cells x genes, dense or sparse, not negative.
    target_sum
        The total of every cell after scaling. A constant, so that no cell's value
        depends on other cells. None takes the logarithm only.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32, same shape. A cell without counts stays zero.

    Raises
    ------
    DataError
        If a value is negative.
    """
    out = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    if out.nnz and out.data.min() < 0:
        raise DataError(
            message(
                "Negative values cannot be normalised",
                found=float(out.data.min()),
                allowed="counts, 0 or more",
            )
        )
    if target_sum is not None:
        total = _library(out)
        scale = np.divide(target_sum, total, out=np.zeros_like(total), where=total > 0)
        out.data *= np.repeat(scale, np.diff(out.indptr))
    np.log1p(out.data, out=out.data)
    return out.astype(np.float32)


def _unit_steps(X: sp.csr_matrix, inverse: Callable[..., np.ndarray]) -> bool:
    """Whether each cell, put through `inverse`, holds whole multiples of one value.

    Counts divided by a cell's total are multiples of the value of a single
    molecule, which most cells hold at least once.
    """
    passed = tested = 0
    for row in range(X.shape[0]):
        x = inverse(X.data[X.indptr[row] : X.indptr[row + 1]].astype(np.float64))
        # Cells with one distinct value prove nothing.
        if len(x) < 5 or np.ptp(x) <= 1e-6 * x.max():
            continue
        steps = x / x.min()
        steps = steps[steps < 1000]
        if len(np.unique(np.rint(steps))) < 3:
            continue
        tested += 1
        passed += bool(np.abs(steps - np.rint(steps)).max() < 0.02)
    return tested > 0 and passed >= 0.8 * tested


def _constant_sums(X: sp.csr_matrix, inverse: Callable[..., np.ndarray]) -> bool:
    """Whether all cells, put through `inverse`, have the same total."""
    Y = X.astype(np.float64)
    Y.data = inverse(Y.data)
    total = _library(Y)
    return len(total) > 1 and bool(np.ptp(total) <= 1e-3 * total.mean())


def value_scale(X: Any, *, log1p_mark: bool = False, max_cells: int = 200) -> str:
    """Tell what kind of numbers an expression matrix holds.

    The answer rests on checks: whole numbers are counts; negative numbers have been
    centred; logarithms are recognised because undoing them gives either equal cell
    totals or whole multiples of one molecule's value.

    Parameters
    ----------
    X
        Cells x genes, dense or sparse.
    log1p_mark
        True if the file says that X is log1p data (scanpy writes `uns["log1p"]`).
        It decides only where the checks find no contradiction.
    max_cells
        How many cells the slower checks look at (evenly spaced).

    Returns
    -------
    str
        "counts" (whole numbers), "log1p" (natural logarithm of 1 + x), "log2"
        (log2 of 1 + x), "normalised" (scaled, no logarithm) or "scaled" (centred).

    Raises
    ------
    DataError
        If a value is NaN or infinite, or if no check is decisive.
    """
    values = _values(X)
    if values.size == 0 or not np.any(values):
        raise DataError(
            message(
                "The matrix is empty: it has no value other than 0",
                found=X.shape,
                allowed="a matrix of cells x genes with some expression",
            )
        )
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise DataError(
            message(
                "The matrix holds NaN or infinite values",
                found=f"{bad} of them",
                allowed="finite numbers",
                do="Remove or replace them before loading.",
            )
        )
    if values.min() < 0:
        return "scaled"
    if np.array_equal(values, np.rint(values)):
        return "counts"
    rows = np.unique(np.linspace(0, X.shape[0] - 1, max_cells).astype(int))
    sample = sp.csr_matrix(X[rows])
    sample.eliminate_zeros()
    if values.max() <= _LOG_LIMIT:
        inverses: dict[str, Callable[..., np.ndarray]] = {
            "log1p": np.expm1,
            "log2": lambda x: np.expm1(x * np.log(2.0)),
        }
        for name, inverse in inverses.items():
            if _constant_sums(sample, inverse) or _unit_steps(sample, inverse):
                return name
    if values.max() > _LOG_LIMIT or _constant_sums(sample, np.asarray):
        return "normalised"
    if _unit_steps(sample, np.asarray):
        return "normalised"
    if log1p_mark:
        return "log1p"
    raise DataError(
        message(
            "Cannot tell what kind of numbers the matrix holds: they are neither whole"
            " nor negative, and undoing a logarithm gives neither equal cell totals"
            " nor multiples of one molecule",
            found=f"values from 0 to {values.max():.4g}",
            allowed="raw counts, or log1p of normalised counts",
            do="Put the raw counts in adata.layers['counts'], or, if X is log1p data,"
            " say so with adata.uns['log1p'] = {'base': None}.",
        )
    )


def _counts_or_X(adata: ad.AnnData) -> tuple[Any, bool]:
    """Return the counts if there are any, else X, and whether they are counts."""
    if "counts" in adata.layers:
        return adata.layers["counts"], True
    return adata.X, False


def linear_values(adata: ad.AnnData) -> sp.csr_matrix:
    """Return the counts, or X without its logarithm where there are none.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32, cells x genes; the data's own matrix where no change was needed.
    """
    X, is_counts = _counts_or_X(adata)
    X = sp.csr_matrix(X, dtype=np.float32)
    return X if is_counts else X.expm1()


def scale_rows(X: Any, total: float) -> sp.csr_matrix:
    """Scale every cell to one total, without a logarithm.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32. A cell without any value stays zero.
    """
    out = sp.csr_matrix(X, dtype=np.float32, copy=True)
    sums = _library(out)
    scale = np.divide(total, sums, out=np.zeros_like(sums), where=sums > 0)
    out.data *= np.repeat(scale.astype(np.float32), np.diff(out.indptr))
    return out


def on_genes(
    adata: ad.AnnData, genes: Iterable[str], target_sum: float = 1e4
) -> ad.AnnData:
    """Return the cells on some genes only, scaled to one total over these genes.

    Cells that are scaled over all their genes and then lose some no longer have
    equal totals. A generator that works on these genes alone is compared with this.

    Parameters
    ----------
    adata
        Data under the contract.
    genes
        Names, in the order wanted.
    target_sum
        Total of each cell before the logarithm.

    Returns
    -------
    AnnData
        X log1p-normalised, ``obs`` as in `adata`.

    Raises
    ------
    DataError
        A gene is absent.
    """
    genes = [str(gene) for gene in genes]
    absent = pd.Index(genes).difference(adata.var_names)
    if len(absent):
        raise DataError(
            message(
                "Genes are absent from the cells",
                found=f"{len(absent)} of {len(genes)}, such as {absent[0]!r}",
                allowed="genes that the cells have",
            )
        )
    few = adata[:, genes]
    X = normalise(linear_values(few), target_sum)
    return ad.AnnData(X, obs=few.obs.copy(), var=few.var.copy())


def draw_molecules(
    X: Any, totals: np.ndarray, rng: np.random.Generator
) -> sp.csr_matrix:
    """Draw whole counts: each cell its number of molecules, genes by their shares.

    Parameters
    ----------
    X
        Cells x genes, not negative; a row's values need not sum to 1.
    totals
        Molecules of each cell, shape (n_cells,), whole numbers.
    rng
        Source of the random numbers.

    Returns
    -------
    scipy.sparse.csr_matrix
        float32 whole numbers. A row without any value stays empty.
    """
    out = sp.csr_matrix(X, dtype=np.float64, copy=True)
    for i, total in enumerate(totals):
        part = slice(out.indptr[i], out.indptr[i + 1])
        share = out.data[part]
        if share.sum() > 0:
            out.data[part] = rng.multinomial(int(total), share / share.sum())
    out.eliminate_zeros()
    return out.astype(np.float32)


def filter_cells_and_genes(
    adata: ad.AnnData, min_genes: int = 10, min_cells: int = 3
) -> ad.AnnData:
    """Drop cells with few genes, then genes seen in few of the cells left.

    Parameters
    ----------
    adata
        Data under the contract.
    min_genes
        Fewest genes of a cell.
    min_cells
        Fewest cells of a gene.

    Returns
    -------
    AnnData
        A copy.

    Raises
    ------
    DataError
        Nothing is left.
    """
    X, _ = _counts_or_X(adata)
    cells = np.asarray((X > 0).sum(axis=1)).ravel() >= min_genes
    genes = np.asarray((X[cells] > 0).sum(axis=0)).ravel() >= min_cells
    if not cells.any() or not genes.any():
        raise DataError(
            message(
                "The filter leaves nothing",
                found=f"{int(cells.sum())} cells and {int(genes.sum())} genes",
                do=f"Lower min_genes (now {min_genes}) or min_cells ({min_cells}).",
            )
        )
    return adata[cells, genes].copy()


def filter_genes(
    adata: ad.AnnData, min_cells_fraction: float = 0.1, min_value: float = 0.0
) -> np.ndarray:
    """Mark the genes that are seen in enough cells.

    Parameters
    ----------
    adata
        Data under the contract. `layers["counts"]` is used if present; otherwise the
        logarithm of X is undone, so that `min_value` is always on the linear scale.
    min_cells_fraction
        Share of cells, 0 to 1, in which the gene must exceed `min_value`.
    min_value
        A cell counts if its value is greater than this.

    Returns
    -------
    numpy.ndarray
        One bool per gene.

    Raises
    ------
    ConfigError
        If `min_cells_fraction` is outside [0, 1] or `min_value` is negative.
    """
    if not 0 <= min_cells_fraction <= 1:
        raise ConfigError(
            message(
                "min_cells_fraction is out of range",
                found=min_cells_fraction,
                allowed="0 to 1",
            )
        )
    if min_value < 0:
        raise ConfigError(
            message("min_value is out of range", found=min_value, allowed="0 or more")
        )
    X, is_counts = _counts_or_X(adata)
    limit = min_value if is_counts else np.log1p(min_value)
    seen = np.asarray((X > limit).sum(axis=0)).ravel()
    return np.asarray(seen >= min_cells_fraction * adata.n_obs)


def select_genes(adata: ad.AnnData, n_genes: int, n_bins: int = 20) -> np.ndarray:
    """Choose highly variable genes: more dispersed than genes of similar mean.

    Give training cells only. The dispersion (variance / mean) of the log1p values is
    compared with the median of genes of similar mean, in units of the bin's median
    absolute deviation.

    Parameters
    ----------
    adata
        Training cells, X log1p-normalised.
    n_genes
        How many genes to choose. If fewer vary, all that vary are returned.
    n_bins
        Number of bins with equally many genes.

    Returns
    -------
    numpy.ndarray
        Gene names in the order of `adata.var_names`.

    Raises
    ------
    ConfigError
        If `n_genes` is below 1.
    DataError
        If no gene varies over the cells.
    """
    if n_genes < 1:
        raise ConfigError(
            message("n_genes is out of range", found=n_genes, allowed="1 or more")
        )
    mean, var = mean_variance(adata.X, ddof=1)
    return genes_by_dispersion(mean, var, adata.var_names, n_genes, n_bins)


def genes_by_dispersion(
    mean: np.ndarray,
    var: np.ndarray,
    names: pd.Index,
    n_genes: int,
    n_bins: int = 20,
) -> np.ndarray:
    """Choose genes as `select_genes` does, given mean and variance of each.

    Parameters
    ----------
    mean, var
        Of the log1p-normalised values of training cells, (n_genes,) each.
    names
        Gene names, in the same order.
    n_genes, n_bins
        As in `select_genes`.
    """
    varies = np.flatnonzero((mean > 0) & (var > 1e-12))
    if not len(varies):
        raise DataError(
            message(
                "No gene varies over the cells",
                found=f"{len(names)} genes, none with a variance above 0",
                do="Check that the training cells are not all the same cell.",
            )
        )
    if n_genes < len(varies):
        dispersion = var[varies] / mean[varies]
        by_mean = np.argsort(mean[varies], kind="stable")
        score = np.empty(len(varies))
        for group in np.array_split(by_mean, min(n_bins, len(varies))):
            centred = dispersion[group] - np.median(dispersion[group])
            spread = np.median(np.abs(centred))
            score[group] = centred / spread if spread > 0 else centred
        varies = varies[np.argsort(-score, kind="stable")[:n_genes]]
    return np.asarray(names)[np.sort(varies)].astype(str)


def process(
    adata: ad.AnnData,
    config: Any,
    *,
    label_key: str | None = "cell_type",
) -> ad.AnnData:
    """Filter cells and genes, name the types and split, as the original does.

    Parameters
    ----------
    adata
        Cells under the AnnData contract.
    config
        A `ScGANConfig` or `CscGANConfig`: its fields min_genes, min_cells,
        clustering_res, valid_cells, test_cells, balanced_split and split_seed.
    label_key
        Column of the types. None finds them: Leiden clusters at `clustering_res`,
        after the filter, into ``obs["cell_type"]``, named from the largest on.

    Returns
    -------
    AnnData
        A copy with ``obs["split"]`` (train, valid or test) and the sizes that the
        split really has in ``uns["split"]``.

    Raises
    ------
    ConfigError
        More cells are to be set aside than there are.
    DataError
        Nothing passes the filter, or the label column is absent.
    """
    from scgenlib.metrics import leiden

    c = config
    kept = filter_cells_and_genes(adata, c.min_genes, c.min_cells)
    if label_key is None:
        if c.clustering_res is None:
            do = "Give label_key, or a number as clustering_res."
            raise ConfigError(message("There are no labels and no resolution", do=do))
        few = kept[:, select_genes(kept, 1000)]
        clusters = leiden(few, c.clustering_res, n_pcs=50, n_neighbors=15)
        kept.obs["cell_type"] = pd.Categorical([f"cluster {i}" for i in clusters])
        label_key = "cell_type"
    return train_valid_test(
        kept,
        c.valid_cells,
        c.test_cells,
        label_key=label_key if c.balanced_split else None,
        seed=c.split_seed,
    )
