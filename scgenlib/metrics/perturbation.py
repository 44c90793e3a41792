"""Is the predicted effect of a perturbation right, and is it more than noise?

An effect is a difference from control cells, so a score has two controls: one for the
truth and one for the prediction. If they are the same cells, their noise stands in both
differences and is counted as agreement (`null_experiment`); here they must differ.
Values are log1p. A table of means has conditions as rows, under their canonical names
(`scgenlib.conditions`), and genes as columns. Put the ceiling (`split_half`) and a
cheap baseline (`scgenlib.perturbers`) beside every number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scgenlib._matrix import (
    Cells,
    Matrix,
    as_matrix,
    as_pair,
    distances,
    mean_variance,
    subsample,
)
from scgenlib.conditions import CONTROL, canonical, genes_of
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.metrics.generation import _pearson, sliced_wasserstein

_ROUNDING = 1e-6  # a change of a float32 mean up to this is none

# ------------------------------------------------------------------- tables of means


def condition_means(adata: AnnData, key: str = "perturbation") -> pd.DataFrame:
    """Return the mean of each gene over the cells of each condition.

    Parameters
    ----------
    adata
        Cells; sparse stays sparse.
    key
        Column of `adata.obs` with the condition, in any spelling.

    Returns
    -------
    DataFrame
        float64, a row for each canonical name in alphabetical order, controls
        ("ctrl") included, and a column for each gene.
    """
    x, rows = as_matrix(adata), _rows(adata, key)
    means = np.vstack([mean_variance(x[own])[0] for own in rows.values()])
    index = pd.Index(list(rows), name="condition")
    return pd.DataFrame(means, index=index, columns=adata.var_names)


def pairwise_correlation(deltas: pd.DataFrame) -> float:
    """Return the mean Pearson correlation between the changes of two perturbations.

    Near 1: one and the same change is predicted for all. Set that of the truth beside
    it, with the same control for all rows and as many cells: a shared control
    correlates even changes that are noise.

    Parameters
    ----------
    deltas
        Perturbations x genes, means less the control's. Rows that do not vary over
        genes are left out; with fewer than two others the result is nan.
    """
    values = deltas.to_numpy(dtype=np.float64)
    values = values[np.ptp(values, axis=1) > _ROUNDING]
    if len(values) < 2:
        return float("nan")
    return float(np.corrcoef(values)[np.triu_indices(len(values), 1)].mean())


def split_half(
    real: AnnData, key: str = "perturbation", seed: int = 0
) -> tuple[AnnData, AnnData]:
    """Split the cells of every condition, controls too, at random into two halves.

    The first half as `predicted` and the second as `real`, each with its own controls,
    is the ceiling: what a simulator that draws real cells would score. Both halves are
    noisier than all cells, so a prediction without noise may score above it.

    Parameters
    ----------
    real
        Cells. A condition of one cell is left out of both halves.
    key, seed
        Column with the condition; seed of the split.

    Returns
    -------
    tuple of AnnData
        Halves of floor(n / 2) and of the other cells of each condition.
    """
    rng = np.random.default_rng(seed)
    halves: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for own in _rows(real, key).values():
        mixed = rng.permutation(own)
        if len(own) > 1:
            halves[0].append(mixed[: len(own) // 2])
            halves[1].append(mixed[len(own) // 2 :])
    if not halves[0]:
        raise DataError(message("No condition has two cells to split", found=key))
    first, second = (real[np.sort(np.concatenate(half))].copy() for half in halves)
    return first, second


# ---------------------------------------------------------------------------- scores


def perturbation_scores(
    predicted: AnnData | pd.DataFrame,
    real: AnnData,
    *,
    control_real: AnnData,
    control_predicted: AnnData,
    top: int = 20,
    genes: Sequence[str] | None = None,
    key: str = "perturbation",
    exclude_target: bool = True,
    allow_shared: bool = False,
    cells: bool = True,
    max_cells: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Score each predicted condition against the real cells of that condition.

    A change is the mean of the condition less the mean of a control: `control_real`
    for the truth, `control_predicted` for the prediction.

    Parameters
    ----------
    predicted
        Predicted cells with ``obs[key]``, or a table of means.
    real
        Real cells with ``obs[key]``. What they have beyond the predicted conditions is
        not scored.
    control_real, control_predicted
        Two sets of control cells without a common name, of which the prediction has
        seen only the second (`scgenlib.conditions.split_controls`).
    top
        How many genes of the largest true change '..._top' takes. They are chosen on
        the truth that is then scored, so that part of their change is chance; the
        prediction does not take part in the choice.
    genes
        Genes to score; None takes those of `real`.
    key
        Column with the condition; any spelling.
    exclude_target
        Leave the perturbed genes out of the scores of their condition.
    allow_shared
        Accept a cell in both controls. The scores are then too good.
    cells
        Also compare the cells, if `predicted` holds cells.
    max_cells, seed
        For distances between cells, both sides are subsampled to the smaller of them,
        and to at most so many (seeded). Such distances fall with the number of cells
        even where both sides are alike, so arms need equally many.

    Returns
    -------
    DataFrame
        A row for each predicted condition, with the columns

        - 'n_cells': real cells.
        - 'mse', 'mse_top': mean squared difference of the means (not of the changes).
        - 'nmse': squared difference of the changes over the squared true change; 1 for
          no change, 0 is right.
        - 'pearson_delta', 'pearson_delta_top': Pearson correlation over genes of the
          changes; nan if one does not vary.
        - 'direction_error': share of genes with opposite signs among those whose sign
          is decided on both sides, nan if there are none. 'undecided': share of genes
          whose predicted change is 0, or whose true change is at most one standard
          error.
        - for cells: 'energy', 'mmd', 'sliced_wasserstein' (`energy_distance`, `mmd`,
          `sliced_wasserstein`); over the genes' standard deviations 'sd_pearson', and
          'sd_ratio', their mean, predicted over real. nan where a set has too few
          cells.

    Raises
    ------
    DataError
        If the two controls share a cell, a gene or a predicted condition is absent
        from the real cells, or a value is not finite.
    """
    names = pd.Index(real.var_names if genes is None else list(genes))
    _check_controls(control_real, control_predicted, allow_shared)
    if top < 2:
        raise ConfigError(message("A correlation needs two genes", found={"top": top}))
    x, rows = _values(real, names, "the real cells"), _rows(real, key)
    means = _means(predicted, names, key)
    _check_known(means.index, list(rows))
    zero, spread, n_zero = _moments(control_real, names, "the control of the truth")
    origin = _moments(control_predicted, names, "the control of the prediction")[0]
    if cells := cells and isinstance(predicted, AnnData):
        y, made = _values(predicted, names, "the prediction"), _rows(predicted, key)
    table = []
    for condition, row in zip(means.index, means.to_numpy(), strict=True):
        own = rows[condition]
        keep = ~names.isin(genes_of(condition)) | (not exclude_target)
        if keep.sum() < 2:
            raise DataError(message("A score needs two genes", found=list(names)))
        mean, variance = mean_variance(x[own], ddof=1)
        # One cell has no variance of its own: the control's stands for it.
        noise = (variance if len(own) > 1 else spread) / len(own) + spread / n_zero
        delta, guess = (mean - zero)[keep], (row - origin)[keep]
        gap = (row - mean)[keep] ** 2
        best = np.argsort(-np.abs(delta), kind="stable")[:top]
        size = np.mean(delta**2)
        wrong, undecided = _direction(guess, delta, np.sqrt(noise)[keep])
        scores = {
            "condition": condition,
            "n_cells": len(own),
            "mse": gap.mean(),
            "nmse": np.mean((delta - guess) ** 2) / size if size > 0 else np.nan,
            "pearson_delta": _agreement(guess, delta),
            "pearson_delta_top": _agreement(guess[best], delta[best]),
            "mse_top": gap[best].mean(),
            "direction_error": wrong,
            "undecided": undecided,
        }
        if cells:
            a, b = x[own][:, keep], y[made[condition]][:, keep]
            scores |= _cell_scores(a, b, max_cells, seed)
        table.append(scores)
    return pd.DataFrame(table).set_index("condition")


def ranks(
    predicted_means: pd.DataFrame,
    real_means: pd.DataFrame,
    *,
    control_real: AnnData,
    control_predicted: AnnData,
    reference: pd.Series | None = None,
    exclude_target: bool = True,
    allow_shared: bool = False,
) -> pd.DataFrame:
    """Is a prediction nearer to its own truth than to the other perturbations'?

    One prediction for all conditions scores about .5, however near it is. Blind to
    the size of an error that all predictions share.

    Parameters
    ----------
    predicted_means, real_means
        Tables of means; every predicted condition is among at least two real ones.
        The scores depend on the number and kind of the real ones.
    control_real, control_predicted, exclude_target, allow_shared
        As in `perturbation_scores`.
    reference
        Mean of perturbed centroids for 'systema_pearson', best from the training
        cells. None takes, for each condition, the mean of the other real ones.

    Returns
    -------
    DataFrame
        A row for each predicted condition. 'pds': 1 - rank / N, where rank is the
        number of other true changes nearer in L1 distance to the predicted change, of
        N (Virtual Cell Challenge). 'centroid_accuracy': share of the other true means
        farther from the predicted mean, in Euclidean distance, than its own; no
        control is used (Systema). 'systema_pearson': correlation of prediction and
        truth, both less `reference`. Ties count half.
    """
    _check_controls(control_real, control_predicted, allow_shared)
    names = real_means.columns
    truth, means = _means(real_means, names), _means(predicted_means, names)
    _check_known(means.index, list(truth.index))
    if len(truth) < 2:
        raise DataError(message("A rank needs two real conditions", found=len(truth)))
    zero = _moments(control_real, names, "the control of the truth")[0]
    origin = _moments(control_predicted, names, "the control of the prediction")[0]
    table, real = [], truth.to_numpy()
    if reference is not None:
        reference = _means(reference.to_frame("mean").T, names).iloc[0]
    places = truth.index.get_indexer(means.index)
    for condition, own, guess in zip(
        means.index, places, means.to_numpy(), strict=True
    ):
        keep = ~names.isin(genes_of(condition)) | (not exclude_target)
        others = np.delete(real, own, axis=0)
        middle = others.mean(0) if reference is None else reference.to_numpy()
        shifts = (real - zero - guess + origin)[:, keep]
        nearer = _nearer(np.abs(shifts).sum(1), own)
        closer = _nearer(np.square((real - guess)[:, keep]).sum(1), own)
        scores = {
            "condition": condition,
            "pds": 1 - nearer / len(real),
            "centroid_accuracy": 1 - closer / len(others),
            "systema_pearson": _agreement(
                (guess - middle)[keep], (real[own] - middle)[keep]
            ),
        }
        table.append(scores)
    return pd.DataFrame(table).set_index("condition")


def null_experiment(
    n_genes: int = 2000,
    n: int = 100,
    n_repeats: int = 20,
    *,
    values: Cells | None = None,
    top: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predictions where nothing has an effect: 'perturbed' cells are controls.

    Truth, prediction and controls are samples of n cells of one population. With one
    control for both changes the expected correlation is s_c / sqrt((s_c + s_p)
    (s_c + s_q)), with s the variances of the three means: 1/2 for equal n, and
    1/sqrt(2) if the prediction is a mean without noise. Two controls give 0.

    Parameters
    ----------
    n_genes
        Independent normal genes of variance 1.
    n
        Cells in each sample.
    n_repeats
        How often.
    values
        Real cells from which to draw instead, with replacement; their genes are
        correlated, so that single repeats scatter more.
    top
        Genes of the largest 'true' change for 'pearson_delta_top'.
    seed
        Seed of all draws.

    Returns
    -------
    DataFrame
        Rows: 'repeat' x 'control' ("shared", "independent") x 'prediction' ("cells",
        "mean"). Values: 'pearson_delta', 'pearson_delta_top', and 'direction_error'
        with every sign counted as decided (expected 1/3 and 1/4 with a shared control,
        1/2 with two).
    """
    for name, value in (("n_genes", n_genes), ("n", n), ("n_repeats", n_repeats)):
        if value < 1:
            found = {name: value}
            raise ConfigError(message("It must be at least 1", found=found))
    x = None if values is None else as_matrix(values)
    rng, table = np.random.default_rng(seed), []

    def sample() -> np.ndarray:
        if x is None:
            return rng.normal(size=(n, n_genes)).mean(0)
        return mean_variance(x[rng.integers(x.shape[0], size=n)])[0]

    exact = np.zeros(n_genes) if x is None else mean_variance(x)[0]
    for repeat in range(n_repeats):
        truth, guess, control, second = (sample() for _ in range(4))
        for name, other in (("shared", control), ("independent", second)):
            for kind, mean in (("cells", guess), ("mean", exact)):
                a, b = mean - other, truth - control
                best = np.argsort(-np.abs(b), kind="stable")[:top]
                scores = {
                    "repeat": repeat,
                    "control": name,
                    "prediction": kind,
                    "pearson_delta": _agreement(a, b),
                    "pearson_delta_top": _agreement(a[best], b[best]),
                    "direction_error": _direction(a, b, np.zeros_like(b))[0],
                }
                table.append(scores)
    return pd.DataFrame(table)


# ------------------------------------------------------------- distances between cells


def energy_distance(
    X: Cells, Y: Cells, *, max_cells: int = 2000, seed: int = 0
) -> float:
    """Return 2 E|x - y| - E|x - x'| - E|y - y'| over all pairs, without a root.

    A V-statistic: a cell is paired with itself too, so the value is never negative, 0
    for equal sets, and above 0 between two samples of the same cells.

    Parameters
    ----------
    X, Y
        Cells x genes.
    max_cells, seed
        Larger sets are subsampled (seeded).
    """
    x, y = _sampled(X, Y, max_cells, seed)
    within = distances(x, x).mean() + distances(y, y).mean()
    return float(2 * distances(x, y).mean() - within)


def mmd(
    real: Cells, predicted: Cells, *, max_cells: int = 2000, seed: int = 0
) -> float:
    """Return the squared maximum mean discrepancy at five scales, on the real cells'.

    The kernel is the mean of exp(-d^2 / (s m)) over s = 1/4, 1/2, 1, 2, 4, where m is
    the median squared distance between two *real* cells: predictions that lie far away
    or close together do not move their own yardstick. All pairs count (a V-statistic,
    0 for equal sets); `mmd2` is unbiased, with one bandwidth from the pooled cells.

    Parameters
    ----------
    real, predicted
        Cells x genes, at least two real cells.
    max_cells, seed
        Larger sets are subsampled (seeded).
    """
    x, y = _sampled(real, predicted, max_cells, seed)
    if x.shape[0] < 2:
        raise DataError(message("A bandwidth needs two real cells", found=x.shape[0]))
    within = distances(x, x) ** 2
    width = float(np.median(within[np.triu_indices(len(within), 1)])) or 1.0

    def kernel(squared: np.ndarray) -> float:
        value, total = np.exp(-squared / (4 * width)), 0.0
        for _ in range(5):  # each square halves the scale
            total, value = total + value.mean() / 5, value**2
        return total

    both = kernel(distances(x, y) ** 2)
    return kernel(within) + kernel(distances(y, y) ** 2) - 2 * both


# --------------------------------------------------------------------------- helpers


def _cell_scores(
    real: Matrix, predicted: Matrix, max_cells: int, seed: int
) -> dict[str, float]:
    # As many on both sides: distances of small sets are larger, whatever they hold.
    n = min(real.shape[0], predicted.shape[0], max_cells)
    sizes: dict[str, Any] = {"max_cells": n, "seed": seed}
    a, b = (np.sqrt(mean_variance(m, ddof=1)[1]) for m in (real, predicted))
    enough = min(real.shape[0], predicted.shape[0]) > 1
    return {
        "energy": energy_distance(real, predicted, **sizes),
        "mmd": mmd(real, predicted, **sizes) if real.shape[0] > 1 else np.nan,
        "sliced_wasserstein": sliced_wasserstein(real, predicted, 100, **sizes),
        "sd_pearson": _agreement(b, a) if enough else np.nan,
        "sd_ratio": b.mean() / a.mean() if enough and a.any() else np.nan,
    }


def _direction(
    guess: np.ndarray, delta: np.ndarray, error: np.ndarray
) -> tuple[float, float]:
    """Return the share of wrong signs among decided ones, and that of undecided."""
    decided = (np.abs(guess) > _ROUNDING) & (np.abs(delta) > error)
    wrong = (np.sign(guess) != np.sign(delta))[decided]
    return float(wrong.mean()) if len(wrong) else np.nan, float(1 - decided.mean())


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    flat = min(np.ptp(a), np.ptp(b)) <= _ROUNDING
    return float("nan") if flat else _pearson(a, b)


def _nearer(gaps: np.ndarray, own: Any) -> float:
    return (gaps < gaps[own]).sum() + ((gaps == gaps[own]).sum() - 1) / 2


def _sampled(X: Cells, Y: Cells, n: int, seed: int) -> tuple[Matrix, Matrix]:
    x, y = as_pair(X, Y)
    return subsample(x, n, seed), subsample(y, n, seed + 1)


def _rows(adata: AnnData, key: str) -> dict[str, np.ndarray]:
    """Return the rows of each condition, under canonical names."""
    if key not in adata.obs:
        raise DataError(
            message(
                "There is no column with the perturbation",
                found=key,
                allowed=list(adata.obs.columns),
            )
        )
    codes, names = pd.factorize(canonical(adata.obs[key]), sort=True)
    order = np.argsort(codes, kind="stable")
    parts = np.split(order, np.searchsorted(codes[order], np.arange(1, len(names))))
    return dict(zip(names, parts, strict=True))


def _means(
    table: AnnData | pd.DataFrame, genes: pd.Index, key: str = "perturbation"
) -> pd.DataFrame:
    """Return the means of the perturbed conditions for `genes`, checked."""
    means = condition_means(table, key) if isinstance(table, AnnData) else table
    means = means.set_axis(pd.Index(canonical(list(means.index))), axis=0)
    means = means[means.index != CONTROL]
    _check_genes(genes, means.columns, "the table of means")
    if means.index.has_duplicates:
        found = sorted(means.index[means.index.duplicated()])
        raise DataError(message("A condition has two rows of means", found=found))
    if means.empty:
        raise DataError(message("There is no perturbed condition", found=len(table)))
    means = means.loc[:, genes].astype(np.float64)
    as_matrix(means)  # finite
    return means


def _values(adata: AnnData, genes: pd.Index, what: str) -> Matrix:
    _check_genes(genes, adata.var_names, what)
    return as_matrix(adata if adata.var_names.equals(genes) else adata[:, genes])


def _moments(
    control: AnnData, genes: pd.Index, what: str
) -> tuple[np.ndarray, np.ndarray, int]:
    x = _values(control, genes, what)
    return *mean_variance(x, ddof=1), x.shape[0]


def _check_genes(genes: pd.Index, present: pd.Index, what: str) -> None:
    absent = genes[~genes.isin(present)]
    if len(absent):
        more = f"{what} ({len(absent)} of {len(genes)} absent)"
        raise unknown(f"gene for {more}", absent[0], present, error=DataError)
    if genes.has_duplicates or present.has_duplicates:
        raise DataError(message(f"A gene stands twice in {what}"))


def _check_known(conditions: pd.Index, known: list[str]) -> None:
    for condition in conditions:
        if condition not in known:
            kind = "condition (no real cells to score it on)"
            raise unknown(kind, condition, known, error=DataError)


def _check_controls(first: AnnData, second: AnnData, allowed: bool) -> None:
    shared = first.obs_names.intersection(second.obs_names)
    if len(shared) and not allowed:
        raise DataError(
            message(
                "Shared control: the noise of its mean stands in the true and in the "
                "predicted change, and is scored as agreement",
                found=f"{len(shared)} cells in both controls, as {shared[0]}",
                do="Give each side its own control cells (conditions.split_controls), "
                "or allow_shared=True to see the inflated scores.",
            )
        )
