"""Which zeros are dropouts: a Gamma and a Normal for each gene and group of cells.

With L = ln(1.01 + count), the values of one gene in one group are modelled as

    f(L) = r Gamma(L; a, b) + (1 - r) Normal(L; m, s)

where the Gamma part stands for dropouts and the Normal part for expression. The
model and its fit by expectation-maximisation are those of scImpute (Li and Li, 2018).

A value is a whole count, so few values differ. All cells of a group with the same
count share one entry of weight w, and every gene and group is fitted at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.special import digamma, gammaln, polygamma

from scgenlib.errors import ConfigError, DataError, message
from scgenlib.preprocess import value_scale

__all__ = [
    "Entries",
    "dropout_mixtures",
    "dropout_probability",
    "expect_log",
    "fit_mixtures",
    "fraction_of_zeros",
]

Parameters = tuple[np.ndarray, ...]
Expect = Callable[["Entries", Parameters], tuple[np.ndarray, np.ndarray]]

PSEUDO = 1.01
#: Genes that are fitted together: bounds the memory, changes no number.
_BLOCK = 500
_MAX_SHAPE = 20.0


def dropout_probability(counts: Any, groups: Any, **options: Any) -> pd.DataFrame:
    """Return the probability that a zero of a gene in a group is a dropout.

    All zeros of one gene in one group are the same number, so they share one
    probability: it is a table of genes by groups and cannot differ between cells.

    Parameters
    ----------
    counts, groups, **options
        See `dropout_mixtures`.

    Returns
    -------
    pandas.DataFrame
        Genes (rows, by position) x groups (sorted names), 0 to 1.
    """
    return dropout_mixtures(counts, groups, **options)[0]


def dropout_mixtures(
    counts: Any,
    groups: Any,
    *,
    max_zeros: float = 0.95,
    min_mean: float = 1e-2,
    min_cells: int = 3,
    **options: Any,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the probabilities of `dropout_probability` and the fits behind them.

    Parameters
    ----------
    counts
        Whole numbers, cells x genes, CSR or dense.
    groups
        One name per cell.
    max_zeros
        A gene with a larger share of zeros in a group is not fitted there: there is
        too little to tell a dropout from silence, and its probability is 0.
    min_mean
        Nor is a gene whose mean of L lies this close to that of a zero.
    min_cells
        Nor is any gene in a group of fewer cells.
    **options
        Passed to `fit_mixtures`.

    Returns
    -------
    probability : pandas.DataFrame
        Genes (rows, by position) x groups (sorted names), 0 to 1.
    mixtures : pandas.DataFrame
        The fits by gene and group, see `fit_mixtures`.

    Raises
    ------
    DataError
        The counts are not whole numbers, or there is not one group name per cell.
    """
    counts = _checked(counts)
    names = np.asarray(groups).astype(str)
    if len(names) != counts.shape[0]:
        raise DataError(
            message(
                "There must be one group per cell",
                found=f"{len(names)} groups for {counts.shape[0]} cells",
            )
        )
    known, code = np.unique(names, return_inverse=True)
    sizes = np.bincount(code)
    n_groups, n_genes = len(known), counts.shape[1]
    columns = counts.tocsc() if counts.nnz < 2e7 else counts
    parts, fitted = [], []
    for first in range(0, n_genes, _BLOCK):
        block = columns[:, first : first + _BLOCK].tocoo()
        width = block.shape[1]
        # One segment for each gene of the block and group, genes first.
        segment = block.col.astype(np.int64) * n_groups + code[block.row]
        seg, count, weight = _distinct(segment, block.data)
        n_all = np.tile(sizes, width)
        n_seen = np.bincount(seg, weight, width * n_groups)
        total = np.bincount(seg, weight * np.log(PSEUDO + count), width * n_groups)
        zero = np.log(PSEUDO)
        mean = (total + (n_all - n_seen) * zero) / n_all
        fit = (
            (n_all >= min_cells)
            & (mean - zero >= min_mean)
            & (n_all - n_seen <= max_zeros * n_all)
        )
        table = fit_mixtures(seg, count, weight, n_all, fit=fit, **options)
        parts.append(table["p_zero"].to_numpy().reshape(width, n_groups))
        fitted.append(table)
    p = pd.DataFrame(np.concatenate(parts), columns=known)
    where = [range(n_genes), known]
    index = pd.MultiIndex.from_product(where, names=["gene", "group"])
    return p, pd.concat(fitted).set_axis(index)


def fraction_of_zeros(counts: Any, groups: Any) -> pd.DataFrame:
    """Return the share of zeros of each gene in each group, genes x groups."""
    counts = _checked(counts)
    known, code = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    member = sp.csr_matrix((np.ones(len(code)), (code, np.arange(len(code)))))
    seen = (member @ (counts > 0)).toarray() / np.bincount(code)[:, None]
    return pd.DataFrame(1 - seen.T, columns=known)


def _checked(counts: Any) -> sp.csr_matrix:
    counts = sp.csr_matrix(counts)
    if value_scale(counts) != "counts":
        raise DataError(
            message(
                "Dropouts are found in counts",
                found=f"values that look {value_scale(counts)}",
                allowed="whole numbers, 0 or more",
                do="Give adata.layers['counts'].",
            )
        )
    return counts


def _distinct(
    segment: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each segment's distinct counts above 0 and how often they occur."""
    seen = count > 0
    segment, count = segment[seen], count[seen].astype(np.int64)
    base = int(count.max()) + 1 if len(count) else 1
    key, weight = np.unique(segment * base + count, return_counts=True)
    return key // base, (key % base).astype(float), weight.astype(float)


def fit_mixtures(
    segment: np.ndarray,
    count: np.ndarray,
    weight: np.ndarray,
    n_cells: np.ndarray,
    *,
    fit: np.ndarray | None = None,
    start_rate: float | None = None,
    min_sd: float = 0.01,
    max_iterations: int = 100,
    tolerance: float = 0.5,
    expect: Expect | None = None,
) -> pd.DataFrame:
    """Fit one mixture to each segment by expectation-maximisation, all at once.

    Parameters
    ----------
    segment, count, weight
        For each distinct count above 0: its segment (a gene in a group), sorted;
        the count; and in how many cells it occurs.
    n_cells
        Cells of each segment; those without a count above are zeros.
    fit
        Segments to fit; None fits all that have a count above 0.
    start_rate
        First share of the Gamma part; None takes the segment's share of zeros.
    min_sd
        Smallest standard deviation. A gene seen once, or with one count only, has
        none of its own, and the Normal part would become a spike.
    max_iterations, tolerance
        A fit ends when the square of the change of its log10 likelihood is at most
        `tolerance`, or after this many iterations.
    expect
        Stands in for `expect_log`, see `scgenlib.published`.

    Returns
    -------
    pandas.DataFrame
        One row a segment: rate, shape (a), inverse_scale (b), mean, sd, p_zero (the
        probability that a zero is a dropout; 0 where not fitted), iterations.

    Raises
    ------
    ConfigError
        `start_rate` is not between 0 and 1.
    """
    if start_rate is not None and not 0 < start_rate < 1:
        allowed = "strictly between 0 and 1, or None"
        raise ConfigError(message("start_rate", found=start_rate, allowed=allowed))
    n_segments = len(n_cells)
    n_seen = np.bincount(segment, weight, n_segments)
    active = np.flatnonzero((n_seen > 0) & (True if fit is None else fit))
    names = ["rate", "shape", "inverse_scale", "mean", "sd", "p_zero", "iterations"]
    out = np.zeros((n_segments, len(names)))
    # The zeros of a segment are one entry more, put in front of its counts.
    kept = np.isin(segment, active)
    seg = np.concatenate([active, segment[kept]])
    value = np.log(PSEUDO + np.concatenate([np.zeros(len(active)), count[kept]]))
    w = np.concatenate([(n_cells - n_seen)[active], weight[kept]])
    order = np.argsort(seg, kind="stable")
    x = Entries(np.searchsorted(active, seg[order]), value[order], w[order])
    p = _start(x, n_cells[active], n_seen[active], start_rate, min_sd)
    old = np.zeros(len(active))
    at = active
    for iteration in range(1, max_iterations + 2):
        responsibility, likelihood = (expect or expect_log)(x, p)
        # The likelihood of the parameters so far: it is known before the next step.
        moved = (likelihood - old) ** 2 > tolerance
        going = moved if iteration > 1 else np.ones(len(at), bool)
        if iteration > max_iterations:
            going[:] = False
        done = ~going
        if done.any():
            out[at[done], :5] = np.column_stack(p)[done]
            out[at[done], 5] = np.nan_to_num(responsibility[x.first[done]])
            out[at[done], 6] = iteration - 1
            x, p, responsibility = x.keep(going, p, responsibility)
            at, likelihood = at[going], likelihood[going]
        if not len(at):
            break
        # The start has no likelihood to be compared with: 0, as in scImpute.
        old = likelihood if iteration > 1 else np.zeros(len(at))
        p = _maximise(x, responsibility, min_sd)
    return pd.DataFrame(out, columns=names)


class Entries:
    """Distinct values of many segments, stored one after the other."""

    def __init__(self, seg: np.ndarray, value: np.ndarray, weight: np.ndarray) -> None:
        self.seg, self.value, self.weight = seg, value, weight
        self.log = np.log(value)
        self.first = np.flatnonzero(np.diff(seg, prepend=-1))
        self.n = self.sum(np.ones(len(seg)))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the weighted sums over each segment."""
        if not len(self.first):
            return np.zeros(0)
        return np.add.reduceat(values * self.weight, self.first)

    def keep(
        self, going: np.ndarray, p: Parameters, values: np.ndarray
    ) -> tuple[Entries, tuple[np.ndarray, ...], np.ndarray]:
        """Return what belongs to the segments that are not finished."""
        rows = going[self.seg]
        number = np.cumsum(going) - 1
        left = Entries(number[self.seg[rows]], self.value[rows], self.weight[rows])
        return left, tuple(part[going] for part in p), values[rows]


def _start(
    x: Entries,
    n_cells: np.ndarray,
    n_seen: np.ndarray,
    rate: float | None,
    min_sd: float,
) -> Parameters:
    zeros = 1 - n_seen / n_cells
    first = (
        np.where(zeros > 0, zeros, 0.01) if rate is None else np.full(len(zeros), rate)
    )
    is_seen = x.value > np.log(PSEUDO)
    mean = x.sum(x.value * is_seen) / n_seen
    gap = (x.value - mean[x.seg]) ** 2
    sd = np.sqrt(x.sum(gap * is_seen) / n_seen)
    sd = np.where(sd > 0, sd, 0.01)
    ones = np.ones(len(zeros))
    return first, 1.5 * ones, ones, mean, np.maximum(sd, min_sd)


def expect_log(x: Entries, p: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gamma part's share in each value, and the log10 likelihoods.

    On the log scale throughout: a value far from both parts still has a share.
    """
    rate, a, b, mean, sd = p
    with np.errstate(divide="ignore", invalid="ignore"):
        const = np.log(rate) + a * np.log(b) - gammaln(a)
        gamma = const[x.seg] + (a - 1)[x.seg] * x.log - b[x.seg] * x.value
        const = np.log1p(-rate) - np.log(sd) - 0.5 * np.log(2 * np.pi)
        normal = const[x.seg] - 0.5 * ((x.value - mean[x.seg]) / sd[x.seg]) ** 2
        both = np.logaddexp(gamma, normal)
        share = np.exp(gamma - both)
    return share, x.sum(both) / np.log(10)


def _maximise(x: Entries, share: np.ndarray, min_sd: float) -> Parameters:
    """Return the parameters that fit best with the shares as they are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gamma, normal = x.sum(share), x.sum(1 - share)
        mean = x.sum((1 - share) * x.value) / normal
        gap = (x.value - mean[x.seg]) ** 2
        sd = np.sqrt(x.sum((1 - share) * gap) / normal)
        of_value = x.sum(share * x.value) / gamma
        of_log = x.sum(share * x.log) / gamma
        a = _shape(np.log(of_value) - of_log)
        b = a / of_value
    # A part that explains nothing keeps neutral values: its rate is 0 or 1.
    gone = ~np.isfinite(mean)
    mean, sd = np.where(gone, 0.0, mean), np.where(gone, 1.0, sd)
    gone = ~np.isfinite(b) | ~np.isfinite(a)
    a, b = np.where(gone, 1.5, a), np.where(gone, 1.0, b)
    return gamma / x.n, a, b, mean, np.maximum(sd, min_sd)


def _shape(v: np.ndarray) -> np.ndarray:
    """Solve ln a - digamma(a) = v; a is at most 20, also where v is not above 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a = (3 - v + np.sqrt((v - 3) ** 2 + 24 * v)) / (12 * v)
    a = np.where((v > 0) & (a < _MAX_SHAPE), a, _MAX_SHAPE)
    inside = np.flatnonzero(a < _MAX_SHAPE)
    for _ in range(4):  # Newton's method on 1/a, from a start within 1.5 %
        t = a[inside]
        f = np.log(t) - digamma(t) - v[inside]
        a[inside] = 1 / (1 / t + f / (t**2 * (1 / t - polygamma(1, t))))
    return a
