"""Do generated cells look like real ones? Distances, two-sample tests, copying.

Every function takes cells x genes as AnnData, DataFrame, array or sparse matrix.
None of these numbers means much alone: compute the same one between two sets of
real cells (`reference_split`) and put it beside the result.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.optimize import linear_sum_assignment, linprog
from scipy.stats import pearsonr, wasserstein_distance
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from scgenlib._matrix import (
    Cells,
    Matrix,
    as_matrix,
    as_pair,
    dense,
    distances,
    fit_pca,
    moments,
    nearest,
    stack,
    subsample,
)
from scgenlib.errors import ConfigError, DataError, message, unknown

_LINPROG_LIMIT = 250_000  # entries of the transport plan; a few seconds


def reference_split(cells: Cells, *, seed: int = 0) -> tuple[Cells, Cells]:
    """Split real cells at random into two halves of equal size.

    A metric between the halves is what a perfect generator would score: the
    ceiling for similarities, the floor for distances.

    Parameters
    ----------
    cells
        Real cells, n x g.
    seed
        Seed of the random split.

    Returns
    -------
    tuple
        Two disjoint sets of floor(n/2) cells, of the same kind as `cells`.
    """
    n = as_matrix(cells).shape[0]
    if n < 2:
        raise DataError(message("A split needs at least two cells", found=n))
    order = np.random.default_rng(seed).permutation(n)
    first, second = np.sort(order[: n // 2]), np.sort(order[n // 2 : 2 * (n // 2)])
    if isinstance(cells, pd.DataFrame):
        return cells.iloc[first], cells.iloc[second]
    return cells[first], cells[second]


def wasserstein(
    X: Cells,
    Y: Cells,
    *,
    scale: Literal["plain", "published"] = "plain",
    max_cells: int = 2000,
    seed: int = 0,
) -> float:
    """Exact Wasserstein-1 distance between two sets of cells.

    The least mean Euclidean distance by which the cells of `X` must move to
    become the cells of `Y`, every cell carrying the same weight.

    Parameters
    ----------
    X, Y
        Cells x genes, n x g and m x g.
    scale
        'plain' leaves the values alone. 'published' divides each matrix by its
        own number of cells first, as GARAGE's evaluation script did at commit
        36216e2 (no longer at f56180c); for n = m this divides the distance by
        n, for n != m it also shrinks one cloud.
    max_cells
        Larger sets are subsampled to this many cells (seeded).
    seed
        Seed of the subsampling. The two sets are drawn independently, so a large
        set is not 0 away from itself but as far as two samples of it are.

    Returns
    -------
    float
        In the units of the values; without subsampling 0 if and only if the two
        sets are equal.

    Notes
    -----
    Equal sizes are solved as an assignment, unequal ones as a linear program as
    long as n x m is at most 250,000. Beyond that both sets are subsampled to the
    size of the smaller one. The value falls as n grows, even between two samples
    of the same cells: compare only at equal sizes, with a reference.
    """
    if scale not in ("plain", "published"):
        raise unknown("scale", scale, ["plain", "published"])
    x, y = as_pair(X, Y)
    if scale == "published":
        x, y = x / x.shape[0], y / y.shape[0]
    x, y = subsample(x, max_cells, seed), subsample(y, max_cells, seed + 1)
    n, m = x.shape[0], y.shape[0]
    if n != m and n * m > _LINPROG_LIMIT:
        x, y = subsample(x, min(n, m), seed), subsample(y, min(n, m), seed + 1)
        n = m = min(n, m)
    cost = distances(x, y)
    if n == m:
        return float(cost[linear_sum_assignment(cost)].mean())
    leaves = sp.kron(sp.eye(n), np.ones((1, m)))
    arrives = sp.kron(np.ones((1, n)), sp.eye(m))
    plan = linprog(
        cost.ravel(),
        A_eq=sp.vstack([leaves, arrives], "csr"),
        b_eq=np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)]),
        method="highs-ds",
    )
    return float(plan.fun)


def sliced_wasserstein(
    X: Cells,
    Y: Cells,
    n_projections: int = 200,
    *,
    max_cells: int = 2000,
    seed: int = 0,
) -> float:
    """Mean Wasserstein-1 distance over random one-dimensional views.

    Both sets are projected on `n_projections` random unit vectors. A projection
    never lengthens a distance, so the result is at most `wasserstein(X, Y)`.

    Parameters
    ----------
    X, Y
        Cells x genes.
    n_projections
        Number of directions.
    max_cells, seed
        As in `wasserstein`; `seed` also draws the directions.
    """
    x, y = as_pair(X, Y)
    x, y = subsample(x, max_cells, seed), subsample(y, max_cells, seed + 1)
    directions = np.random.default_rng(seed).normal(size=(x.shape[1], n_projections))
    directions /= np.linalg.norm(directions, axis=0)
    px, py = np.sort(x @ directions, axis=0), np.sort(y @ directions, axis=0)
    if len(px) == len(py):
        return float(np.abs(px - py).mean())
    views = range(n_projections)
    return float(np.mean([wasserstein_distance(px[:, i], py[:, i]) for i in views]))


def mmd2(
    X: Cells,
    Y: Cells,
    bandwidth: float | None = None,
    *,
    clamp: bool = False,
    max_cells: int = 2000,
    seed: int = 0,
) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel.

    Mean kernel value within X, plus within Y, minus twice that between them;
    `k(a, b) = exp(-|a - b|^2 / (2 s^2))`. A cell is not compared with itself, so
    the expected value between two samples of the same cells is 0.

    Parameters
    ----------
    X, Y
        Cells x genes, at least two cells each.
    bandwidth
        The s above; None: the median distance between two cells of the pooled sample.
    clamp
        Return 0 in place of a negative estimate. The estimate is then no longer
        unbiased.
    max_cells, seed
        Larger sets are subsampled (seeded).
    """
    x, y = as_pair(X, Y)
    x, y = subsample(x, max_cells, seed), subsample(y, max_cells, seed + 1)
    n, m = x.shape[0], y.shape[0]
    if min(n, m) < 2:
        raise DataError(message("MMD needs two cells in each set", found=min(n, m)))
    squared = distances(stack(x, y), stack(x, y)) ** 2
    upper = squared[np.triu_indices(n + m, 1)]
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(upper))) or 1.0
    if bandwidth <= 0:
        raise ConfigError(
            message("The bandwidth is a length", found=bandwidth, allowed="above 0")
        )
    kernel = np.exp(-squared / (2 * bandwidth**2))
    np.fill_diagonal(kernel, 0.0)
    value = float(
        kernel[:n, :n].sum() / (n * (n - 1))
        + kernel[n:, n:].sum() / (m * (m - 1))
        - 2 * kernel[:n, n:].mean()
    )
    return max(value, 0.0) if clamp else value


def two_sample_auroc(
    X: Cells,
    Y: Cells,
    n_pcs: int = 50,
    n_trees: int = 200,
    folds: int = 5,
    *,
    max_cells: int = 2000,
    seed: int = 0,
) -> float:
    """How well a random forest tells `X` (class 0) from `Y` (class 1).

    Principal components and forest are fitted inside each fold, on training rows
    of both sets; the area under the ROC curve is the mean over the left-out folds.

    Parameters
    ----------
    X, Y
        Real and generated cells x genes; both are subsampled to the size of the
        smaller one (at most `max_cells`).
    n_pcs, n_trees, folds
        Principal components, trees and cross-validation folds.
    seed
        Seed of the subsampling, the folds and the forests.

    Returns
    -------
    float
        0.5: no difference found. 1: every cell told apart. Well below 0.5: `Y`
        holds copies of cells in `X`, whose other copy sits in the training fold.
    """
    x, y = as_pair(X, Y)
    n = min(x.shape[0], y.shape[0], max_cells)
    if n < folds:
        raise DataError(
            message(
                "Each fold needs a cell of each set",
                found=f"{n} cells",
                allowed=f"at least {folds}, the number of folds",
            )
        )
    both = stack(subsample(x, n, seed), subsample(y, n, seed + 1))
    side = np.repeat([0, 1], n)
    areas = []
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for train, test in split.split(side, side):
        pca = fit_pca(both[train], n_pcs, seed)
        forest = RandomForestClassifier(n_trees, random_state=seed)
        forest.fit(pca.transform(both[train]), side[train])
        votes = forest.predict_proba(pca.transform(both[test]))[:, 1]
        areas.append(roc_auc_score(side[test], votes))
    return float(np.mean(areas))


def prdc(
    real: Cells, fake: Cells, k: int = 5, *, max_cells: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Precision, recall, density and coverage (Naeem et al., ICML 2020).

    Around each cell lies a ball that reaches to its k-th nearest neighbour in its
    own set.

    Parameters
    ----------
    real, fake
        Cells x genes, more than k cells each.
    k
        Which neighbour sets the radius.
    max_cells, seed
        Larger sets are subsampled (seeded).

    Returns
    -------
    dict
        'precision': share of fake cells inside some real ball. 'recall': share
        of real cells inside some fake ball. 'density': number of real balls a
        fake cell lies in, over k (can exceed 1). 'coverage': share of real balls
        that hold a fake cell.
    """
    x, y = as_pair(real, fake)
    x, y = subsample(x, max_cells, seed), subsample(y, max_cells, seed + 1)
    if min(x.shape[0], y.shape[0]) <= k:
        raise DataError(
            message(
                "A set of cells is too small for its k-th neighbour",
                found=min(x.shape[0], y.shape[0]),
                allowed=f"more than k = {k}",
            )
        )
    # The k-th neighbour itself is in the ball; the factor absorbs its rounding.
    gaps = distances(x, y) * (1 - 1e-6)
    in_real = gaps <= nearest(x, x, k, itself=True)[0][:, None]
    in_fake = gaps <= nearest(y, y, k, itself=True)[0][None, :]
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float(in_fake.any(1).mean()),
        "density": float(in_real.sum(0).mean() / k),
        "coverage": float(in_real.any(1).mean()),
    }


def memorisation(
    generated: Cells,
    train: Cells,
    heldout: Cells,
    *,
    max_cells: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Are generated cells closer to the training cells than unseen cells are?

    A nearest neighbour is nearer in a larger crowd. So both sides of a ratio look
    for it in the same crowd, whatever the sizes of training and held-out set.

    Parameters
    ----------
    generated
        Generated cells x genes.
    train, heldout
        Real cells that the generator saw, and real cells that it never saw.
    max_cells, seed
        Larger sets are subsampled (seeded). The crowds of the two ratios and of
        'duplicates' never are.

    Returns
    -------
    dict
        'to_train': median distance of a generated cell to the nearest of all
        training cells; 'ratio': the same over that of a held-out cell, 1 for
        real cells and 0 for copies. 'to_heldout' and 'heldout_ratio': likewise
        to the nearest of all held-out cells, over that of a training cell.
        Copying lowers only 'ratio'; cells smoother than real ones are near to
        every real cell and lower both.
        'duplicates': share of generated cells equal to a training cell in every
        gene. 'adversarial_accuracy_train' and '..._heldout': nearest-neighbour
        adversarial accuracy (Yale et al., 2020) between sets of equal size, 0.5
        for the same distribution, towards 0 for copies of every training cell,
        towards 1 for other cells. 'membership_auc': how well the distance to the
        nearest generated cell tells training cells from held-out cells; 0.5 when
        it gives nothing away. These last three thin the larger set, and see less
        where only some training cells are copied.

    Raises
    ------
    DataError
        If a set has fewer than two cells, or the genes differ.
    """
    gen, seen = as_pair(generated, train)
    _, unseen = as_pair(generated, heldout)
    if min(gen.shape[0], seen.shape[0], unseen.shape[0]) < 2:
        raise DataError(
            message(
                "Memorisation needs cells on every side",
                found=[gen.shape[0], seen.shape[0], unseen.shape[0]],
                allowed="2 generated, 2 training and 2 held-out cells at least",
            )
        )
    gen = subsample(gen, max_cells, seed)
    some_seen = subsample(seen, max_cells, seed)
    some_unseen = subsample(unseen, max_cells, seed + 1)
    gaps = nearest(gen, seen)[0]
    to_train, to_heldout = np.median(gaps), np.median(nearest(gen, unseen)[0])
    n = min(some_seen.shape[0], some_unseen.shape[0])
    a, b = subsample(some_seen, n, seed), subsample(some_unseen, n, seed + 1)
    from_real = -np.concatenate([nearest(a, gen)[0], nearest(b, gen)[0]])
    return {
        "to_train": float(to_train),
        "ratio": _ratio(to_train, np.median(nearest(some_unseen, seen)[0])),
        "to_heldout": float(to_heldout),
        "heldout_ratio": _ratio(to_heldout, np.median(nearest(some_seen, unseen)[0])),
        "duplicates": float((gaps == 0).mean()),
        "adversarial_accuracy_train": _adversarial_accuracy(a, gen, seed),
        "adversarial_accuracy_heldout": _adversarial_accuracy(b, gen, seed),
        "membership_auc": float(roc_auc_score(np.repeat([1, 0], n), from_real)),
    }


def gene_moments(real: Cells, fake: Cells) -> pd.DataFrame:
    """Per-gene mean, variance (divisor n) and fraction of zeros, side by side.

    Returns
    -------
    DataFrame
        One row a gene; columns 'mean_real', 'mean_fake', 'variance_real',
        'variance_fake', 'zeros_real', 'zeros_fake'.
    """
    x, y = as_pair(real, fake)
    genes = real.var_names if isinstance(real, AnnData) else pd.RangeIndex(x.shape[1])
    columns = {}
    for name, a, b in zip(
        ("mean", "variance", "zeros"), moments(x), moments(y), strict=True
    ):
        columns[f"{name}_real"], columns[f"{name}_fake"] = a, b
    return pd.DataFrame(columns, index=genes)


def moment_agreement(real: Cells, fake: Cells) -> dict[str, float]:
    """Summarise `gene_moments` in one correlation and one error per moment.

    A correlation forgives a factor; the error does not. Read both.

    Returns
    -------
    dict
        For each of 'mean', 'variance', 'zeros': '<name>_r', the Pearson
        correlation over genes (nan if one side is constant), and
        '<name>_error', the mean absolute difference.
    """
    table = gene_moments(real, fake)
    result = {}
    for name in ("mean", "variance", "zeros"):
        a, b = table[f"{name}_real"].to_numpy(), table[f"{name}_fake"].to_numpy()
        result[f"{name}_r"] = _pearson(a, b)
        result[f"{name}_error"] = float(np.abs(a - b).mean())
    return result


def gene_correlation(
    real: Cells, fake: Cells, *, n_genes: int = 300
) -> dict[str, float]:
    """Agreement of the gene-gene correlations of real and generated cells.

    Parameters
    ----------
    real, fake
        Cells x genes.
    n_genes
        Only the genes that vary most in the real cells are used.

    Returns
    -------
    dict
        'agreement': Pearson correlation between the two sets of gene-gene
        correlations (nan if one set is constant); 'error': their mean absolute
        difference; 'strength_real', 'strength_fake': mean absolute correlation.
        A gene that does not vary counts as uncorrelated.
    """
    x, y = as_pair(real, fake)
    if min(x.shape[0], y.shape[0]) < 3 or x.shape[1] < 3:
        raise DataError(
            message(
                "Correlations need three cells and three genes",
                found=(x.shape[0], y.shape[0], x.shape[1]),
            )
        )
    chosen = np.sort(np.argsort(-moments(x)[1], kind="stable")[:n_genes])
    upper = np.triu_indices(len(chosen), 1)
    a, b = _correlations(x[:, chosen])[upper], _correlations(y[:, chosen])[upper]
    return {
        "agreement": _pearson(a, b),
        "error": float(np.abs(a - b).mean()),
        "strength_real": float(np.abs(a).mean()),
        "strength_fake": float(np.abs(b).mean()),
    }


def _ratio(top: float, bottom: float) -> float:
    return float(top / bottom) if bottom > 0 else 1.0 if top == 0 else float("inf")


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    # Rounding leaves a constant vector with a spread of about 1e-17.
    if min(np.ptp(a), np.ptp(b)) < 1e-12:
        return float("nan")
    return float(pearsonr(a, b).statistic)


def _correlations(matrix: Matrix) -> np.ndarray:
    values = dense(matrix).astype(np.float64)
    values = values - values.mean(0)
    size = np.linalg.norm(values, axis=0)
    values = values / np.where(size > 1e-9, size, np.inf)
    return values.T @ values


def _adversarial_accuracy(real: Matrix, fake: Matrix, seed: int) -> float:
    """Share of cells whose nearest neighbour is of their own set, mean of both."""
    n = min(real.shape[0], fake.shape[0])
    a, b = subsample(real, n, seed), subsample(fake, n, seed + 1)
    own_a = nearest(a, a, itself=True)[0] < nearest(a, b)[0]
    own_b = nearest(b, b, itself=True)[0] < nearest(b, a)[0]
    return float((own_a.mean() + own_b.mean()) / 2)
