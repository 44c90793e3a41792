"""Are types kept and batches mixed? The scIB list in plain numpy and scikit-learn.

`Z` is an embedding, cells x dimensions: an array, or AnnData as `embed` returns, and
then `labels` and `batches` may be names of its `obs` columns. Scores in `BIO` and
`BATCH` run from 0 to 1, 1 the best, and follow Luecken et al. (2022) as scib-metrics
0.5.10 computes them; where ours differ, the docstring says so. Neighbours are exact.
A metric that cannot be computed (one batch, one type, no type in two batches) is nan.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from scipy.sparse.csgraph import connected_components
from scipy.stats import chi2
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_distances
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scgenlib._matrix import Cells, as_matrix, dense, distances
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.metrics.clustering import Labels, _partition, ari, nmi
from scgenlib.metrics.transfer import labelled

#: What 'bio' and 'batch' of `integration_scores` average, as scib-metrics 0.5.10 does.
BIO = ("nmi_kmeans", "ari_kmeans", "silhouette_label", "isolated_labels", "clisi")
BATCH = ("bras", "ilisi", "kbet", "graph_connectivity", "pcr_comparison")
#: Leiden resolutions that are tried.
RESOLUTIONS = tuple(np.arange(1, 11) / 5)

Near: TypeAlias = tuple[np.ndarray, np.ndarray]  # distances, indices: cells x k

_NAN = float("nan")
_BLOCK = 10_000_000  # float64 entries of distances at a time, 80 MB


def integration_scores(
    Z: Cells,
    labels: Labels | str,
    batches: Labels | str,
    before: Cells | None = None,
    *,
    resolutions: Sequence[float] = RESOLUTIONS,
    k: int = 15,
    max_cells: int | None = 20_000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute every metric of this file on the same cells.

    A total is a weighting, not a truth: 'bio' of a method that was given the labels is
    not comparable with one that was not, 'batch' is high for an embedding of pure
    noise, and no part sees structure within a type. Quote the parts.

    Parameters
    ----------
    Z
        Embedding, cells x dimensions. Give all arms the same number of dimensions where
        you can: distances and silhouettes change with it.
    labels, batches
        Type and batch of each cell. Unlabelled cells are left out altogether.
    before
        Embedding of the same cells before integration, for 'pcr_comparison': principal
        components of log values. None leaves that metric out.
    resolutions
        For `leiden_agreement`; () leaves it out.
    k
        Neighbours of `same_batch_share`, and with the cell itself of the graphs.
    max_cells
        With more cells, this many are drawn at random. The same seed and number of
        cells draw the same ones, so that arms are compared on the same cells; a rare
        type may be left with few. None takes all: silhouettes take time n squared.
    seed
        Of that draw, of k-means and of Leiden.

    Returns
    -------
    dict
        Every metric by its name; 'same_batch_share', 'batch_predictability' and their
        chances; 'bio' and 'batch', the means of the metrics in `BIO` and `BATCH` that
        are not nan, and 'total', 0.6 bio + 0.4 batch; 'bio_metrics' and
        'batch_metrics', the names that went in; 'n_cells', how many cells did.
        Which metrics are nan follows from labels, batches and `before`, so it is the
        same for all arms of one data set. Totals of data sets that lack different
        metrics are not comparable.
    """
    x = dense(as_matrix(Z)).astype(np.float64)
    old = None if before is None else dense(as_matrix(before)).astype(np.float64)
    names, has = labelled(_column(Z, labels))
    where, known = labelled(_column(Z, batches))
    sizes = {len(part) for part in (x, names, where, x if old is None else old)}
    if len(sizes) > 1 or not known.all() or not has.any():
        raise DataError(
            message(
                "Embeddings, labels and batches do not belong together",
                found=f"lengths {sorted(sizes)}, {has.sum()} labels, "
                f"{(~known).sum()} cells without a batch",
                allowed="one row, one label and one batch for each cell",
            )
        )
    rows = np.flatnonzero(has)
    if max_cells is not None and len(rows) > max_cells:
        drawn = np.random.default_rng(seed).choice(len(rows), max_cells, replace=False)
        rows = rows[np.sort(drawn)]
    x, t, b = x[rows], names[rows], where[rows]
    near = neighbours(x, 89)
    scores: dict[str, Any] = kmeans_agreement(x, t, seed=seed)
    scores |= leiden_agreement(x, t, resolutions, k=k, seed=seed) if resolutions else {}
    per_cell = _silhouettes(x, _codes(t))
    scores |= {
        "silhouette_label": _mean((per_cell + 1) / 2),
        "isolated_labels": _isolated(per_cell, t, b),
        "clisi": clisi(x, t, near=near),
        "bras": bras(x, t, b),
        "silhouette_batch": silhouette_batch(x, t, b),
        "ilisi": ilisi(x, b, near=near),
        "kbet": kbet(x, t, b),
        "graph_connectivity": graph_connectivity(x, t, k, near=near),
        "pcr_comparison": _NAN if old is None else pcr_comparison(old[rows], x, b),
        **same_batch_share(x, t, b, k, near=near),
        **batch_predictability(x, b, seed=seed),
    }
    for part, every in (("bio", BIO), ("batch", BATCH)):
        used = [name for name in every if np.isfinite(scores[name])]
        scores[part] = _mean([scores[name] for name in used])
        scores[f"{part}_metrics"] = used
    scores["total"] = 0.6 * scores["bio"] + 0.4 * scores["batch"]
    return {**scores, "n_cells": len(rows)}


def neighbours(Z: Cells, k: int) -> Near:
    """Return distances to, and indices of, the k nearest other cells (Euclidean).

    Fewer than k if there are not so many; exact, nearest first.
    """
    x = _points(Z)
    k = min(k, len(x) - 1)
    if k < 1:
        raise DataError(message("Neighbours need two cells", found=len(x)))
    return NearestNeighbors(n_neighbors=k).fit(x).kneighbors()


# ------------------------------------------------------------------ are types kept


def kmeans_agreement(Z: Cells, labels: Labels, *, seed: int = 0) -> dict[str, float]:
    """NMI and ARI of k-means, with as many clusters as there are types.

    Blind to rare types, which add little to either, and partial to round types of one
    size: a type in two separate, pure clusters costs as much as a mixed one. Best of 10
    starts by the k-means criterion; scib-metrics takes one start, whose NMI moved by up
    to 0.12 with the seed on 1,200 blood cells.

    Returns
    -------
    dict
        'nmi_kmeans', 'ari_kmeans'; nan for one type.
    """
    n_types = len(np.unique(_codes(labels)))
    if n_types < 2:
        return {"nmi_kmeans": _NAN, "ari_kmeans": _NAN}
    found = KMeans(n_types, n_init=10, random_state=seed).fit_predict(_points(Z))
    return {"nmi_kmeans": nmi(labels, found), "ari_kmeans": ari(labels, found)}


def leiden_agreement(
    Z: Cells,
    labels: Labels,
    resolutions: Sequence[float] = RESOLUTIONS,
    *,
    k: int = 15,
    seed: int = 0,
) -> dict[str, float]:
    """NMI and ARI of Leiden at the resolution, of a fixed list, with the best NMI.

    The best is chosen with the true labels, so the value is higher than a reader
    without labels can hope for. It flatters every arm alike: all have the same list,
    the same number of tries and the same criterion, and one resolution for all would
    favour the arm it happens to suit. Blind, like all clusterings, to rare types.

    Parameters
    ----------
    k
        Neighbours in the graph, the cell itself included.

    Returns
    -------
    dict
        'nmi_leiden', 'ari_leiden' (of the same clustering) and 'resolution'; nan for
        one type.
    """
    import scanpy as sc

    x = _points(Z)
    names = ("nmi_leiden", "ari_leiden", "resolution")
    if len(np.unique(_codes(labels))) < 2:
        return dict.fromkeys(names, _NAN)
    graph = AnnData(x.astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        k = min(k, len(x) - 1)
        sc.pp.neighbors(graph, k, use_rep="X", transformer="sklearn", random_state=seed)
    tries: list[tuple[float, float, float]] = []
    for resolution in resolutions:
        found = _partition(graph, resolution, seed)
        tries.append((nmi(labels, found), ari(labels, found), float(resolution)))
    best = max(tries, key=lambda found: (found[0], -found[2]))  # ties: the coarser
    return dict(zip(names, best, strict=True))


def silhouette_label(Z: Cells, labels: Labels) -> float:
    """Mean silhouette width of the types, (s + 1) / 2: 0.5 for no structure.

    Blind to curved or stretched types that are well apart, and to rare types.
    """
    return _mean((_silhouettes(_points(Z), _codes(labels)) + 1) / 2)


def isolated_labels(Z: Cells, labels: Labels, batches: Labels) -> float:
    """Silhouette of the types that the fewest batches hold, a mean over these types.

    (s + 1) / 2, the silhouette form; scIB's other form, the F1 of the best cluster, is
    left out, since it needs one more choice of resolution. nan if all types are in
    equally many batches: no type is isolated then, and scib-metrics, which averages
    over all of them, counts the label silhouette twice. Blind to all other types.
    """
    return _isolated(_silhouettes(_points(Z), _codes(labels)), labels, batches)


def clisi(Z: Cells, labels: Labels, *, near: Near | None = None) -> float:
    """Purity of neighbourhoods: (K - median LISI of the types) / (K - 1).

    Blind to everything but the typical cell, being a median, and near 1 for almost any
    sensible embedding of many types; a type torn into two pure parts scores 1.
    """
    n_types = len(np.unique(_codes(labels)))
    if n_types < 2:
        return _NAN
    middle = float(np.median(lisi(Z, labels, near=near)))
    return (n_types - middle) / (n_types - 1)


# ----------------------------------------------------------------- are batches mixed


def lisi(
    Z: Cells, labels: Labels, perplexity: float = 30, *, near: Near | None = None
) -> np.ndarray:
    """Local inverse Simpson's index: how many labels are found around each cell.

    Neighbour i at distance d_i gets the weight exp(-beta d_i), scaled to a sum of 1
    (the distance, not its square); beta is such that the entropy of the weights is
    ln(perplexity). With p_l the weight of label l, LISI = 1 / sum_l p_l^2, from 1 to
    the number of labels (Korsunsky et al., 2019).

    Parameters
    ----------
    perplexity
        Effective number of neighbours; of 3 x perplexity - 1 there are. With few cells
        it is lowered to a third of them.
    near
        From `neighbours`, to search once for several scores.

    Returns
    -------
    ndarray
        Shape (n_cells,).
    """
    near = neighbours(Z, int(3 * perplexity) - 1) if near is None else near
    code = _codes(labels)
    n, k = near[0].shape
    goal = np.log(max(min(perplexity, (k + 1) // 3), 1))
    found = np.empty(n)
    for rows in _slices(n, 4 * k):
        weight = _weights(near[0][rows], goal)
        cell = np.repeat(np.arange(len(weight)), k)
        at = (cell, code[near[1][rows]].ravel())
        share = sp.csr_matrix((weight.ravel(), at))  # adds up equal places
        found[rows] = 1 / np.asarray(share.power(2).sum(1)).ravel()
    return found


def ilisi(Z: Cells, batches: Labels, *, near: Near | None = None) -> float:
    """Mixing: (median LISI of the batches - 1) / (B - 1), B their number.

    Blind to types: pulling different types of two batches together raises it. A perfect
    mix does not reach 1 when batches differ in size, or in their types: its LISI is the
    inverse Simpson's index of the batch sizes. The median hides a type left unmixed.
    """
    n_batches = len(np.unique(_codes(batches)))
    if n_batches < 2:
        return _NAN
    return (float(np.median(lisi(Z, batches, near=near))) - 1) / (n_batches - 1)


def kbet(Z: Cells, labels: Labels, batches: Labels, alpha: float = 0.05) -> float:
    """Share of neighbourhoods whose batches pass a chi-squared test; a mean over types.

    In each type, the cell and its k0 nearest cells of the type are tested against the
    type's own batch shares; k0 is a quarter of the mean batch size, within 10 and 70. A
    perfect mix scores about 0.95, not 1. Blind to mixing of types; very strict, so that
    weak and strong leftovers both score near 0, and stricter with more cells.

    scib-metrics finds these neighbours by diffusion on a graph of the 50 nearest cells
    of any type, and gives a type 0 when its graph falls apart. Here they lie in the
    embedding itself. Permuted batches score the same with both; diffusion blurs small
    leftovers, so that theirs is the more lenient in between: 0.93 where ours is 0.73,
    for Harmony on 1,200 blood cells (`experiments/scib_check.py`). Types with one
    batch, or fewer cells than 10 or than k0 + 1, are left out.
    """
    x, t, b = _points(Z), _codes(labels), _codes(batches)
    accepted = []
    for kind in np.unique(t):
        part, own = x[t == kind], _codes(b[t == kind])
        size = np.bincount(own)
        k0 = int(np.clip(size.mean() // 4, 10, 70))
        if len(size) < 2 or len(part) < max(10, k0 + 1):
            continue
        at = neighbours(part, k0)[1]
        seen = _onehot(own)
        seen = seen + _links(at, len(own)) @ seen
        expected = (k0 + 1) * size / size.sum()
        statistic = ((seen - expected) ** 2 / expected).sum(1)
        accepted.append(_mean(chi2.sf(statistic, len(size) - 1) >= alpha))
    return _mean(accepted)


def graph_connectivity(
    Z: Cells, labels: Labels, k: int = 15, *, near: Near | None = None
) -> float:
    """Share of a type's cells in its largest connected part; a mean over types.

    On the graph of the k - 1 nearest other cells, links taken both ways, without the
    cells of other types. Blind to batches: a type that holds together by one link
    passes, and so does an embedding in which everything is one heap, if a type is
    common.

    scIB takes a symmetric graph too. scib-metrics asks for paths along the arrows in
    both directions, so cells that are nobody's neighbour count as cut off, and it
    scores lower (0.75 where ours is 0.94); made so, ours is the same number.
    """
    t = _codes(labels)
    near = neighbours(Z, k - 1) if near is None else near
    graph = _links(near[1][:, : k - 1], len(t))
    shares = []
    for kind in np.unique(t):
        own = t == kind
        parts = connected_components(graph[own][:, own], directed=False)[1]
        shares.append(np.bincount(parts).max() / own.sum())
    return _mean(shares)


def silhouette_batch(Z: Cells, labels: Labels, batches: Labels) -> float:
    """Batch silhouette, 1 - mean `|s|` of the batches of a type; a mean over types.

    Types with one batch, or one cell a batch, are left out. Blind to batches that
    differ when another lies near: s asks for the nearest other batch only, so that
    nested batches score well. `bras` mends this; this one stays out of the mean.
    """
    return _batch_width(Z, labels, batches, "nearest", cosine=False)


def bras(Z: Cells, labels: Labels, batches: Labels) -> float:
    """Batch-removal adapted silhouette (Rautenstrauch and Ohler, 2025).

    As `silhouette_batch`, but against the mean distance to all cells of other batches,
    and with cosine distances. Blind to mixing in detail: two batches in separate
    islands of one place and spread score well. Cosine distances depend on where the
    origin is.
    """
    return _batch_width(Z, labels, batches, "others", cosine=True)


def pcr(Z: Cells, batches: Labels) -> float:
    """Share of the variance of Z that lies between batches, 0 to 1.

    Principal component regression sums each component's variance times the R^2 of the
    batches. Over all components that is the between-batch sum of squares over the
    total, in any rotation, so no component is computed. nan if Z does not vary.
    """
    x, seen = _points(Z), _onehot(_codes(batches))
    x = x - x.mean(0)
    total = (x**2).sum()
    between = ((seen.T @ x) ** 2 / seen.sum(0)[:, None]).sum()
    return float(between / total) if total > 1e-12 else _NAN


def pcr_comparison(before: Cells, after: Cells, batches: Labels) -> float:
    """How much of the between-batch variance went: (before - after) / before, from 0.

    More batch variance than before counts 0. Blind to all but the means of the batches,
    and to types: if a type is in one batch only, keeping it apart costs here.
    nan for one batch, or if nothing lies between the batches before.
    """
    if len(np.unique(_codes(batches))) < 2:
        return _NAN
    old, new = pcr(before, batches), pcr(after, batches)
    return max(0.0, (old - new) / old) if old > 1e-12 else _NAN


def same_batch_share(
    Z: Cells, labels: Labels, batches: Labels, k: int = 15, *, near: Near | None = None
) -> dict[str, float]:
    """Share of a cell's k nearest cells that are of its own batch, beside chance.

    Chance is (n_b - 1) / (n - 1) for a cell of a batch of n_b cells: any neighbour as
    likely as any other. Batches with different types lie above it even in a perfect
    embedding, so read the pair within types, where neighbours and chance are those of
    the cell's type. Blind to direction: below chance is no better than chance.

    Returns
    -------
    dict
        'same_batch_share', 'same_batch_chance', 'same_batch_share_within',
        'same_batch_chance_within': means over cells. A type of one cell is left out.
    """
    x, t, b = _points(Z), _codes(labels), _codes(batches)

    def pair(at: np.ndarray, own: np.ndarray) -> np.ndarray:
        share = (own[at] == own[:, None]).mean(1)
        chance = (np.bincount(own)[own] - 1) / (len(own) - 1)
        return np.array([share, chance])

    near = neighbours(x, k) if near is None else near
    parts = [np.empty((2, 0))]
    for kind in np.unique(t):
        own = t == kind
        if own.sum() > 1:
            parts.append(pair(neighbours(x[own], k)[1], b[own]))
    all_cells, within = pair(near[1][:, :k], b), np.hstack(parts)
    return {
        "same_batch_share": _mean(all_cells[0]),
        "same_batch_chance": _mean(all_cells[1]),
        "same_batch_share_within": _mean(within[0]),
        "same_batch_chance_within": _mean(within[1]),
    }


def batch_predictability(
    Z: Cells, batches: Labels, *, folds: int = 5, seed: int = 0
) -> dict[str, float]:
    """Balanced accuracy of a logistic regression that reads the batch from Z.

    Cross-validated, coordinates scaled, batches weighted equally. It finds what
    neighbours miss: a small shift that all cells share. Blind to what is not linear,
    and no fault in itself: batches with different types can be told apart in a perfect
    embedding.

    Returns
    -------
    dict
        'batch_predictability' (nan for one batch, or with one cell in a batch) and
        'batch_predictability_chance', 1 / number of batches.
    """
    x, b = _points(Z), _codes(batches)
    n_batches, folds = len(np.unique(b)), min(folds, np.bincount(b).min())
    found = _NAN
    if n_batches > 1 and folds > 1:
        reader = LogisticRegression(class_weight="balanced", max_iter=1000)
        how = "balanced_accuracy"
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
        model = make_pipeline(StandardScaler(), reader)
        found = _mean(cross_val_score(model, x, b, cv=parts, scoring=how))
    return {
        "batch_predictability": found,
        "batch_predictability_chance": 1 / n_batches,
    }


# --------------------------------------------------------------------- the parts


def _column(Z: Cells, labels: Labels | str) -> Labels:
    if not isinstance(labels, str):
        return labels
    if not isinstance(Z, AnnData):
        do = "Give one value for each cell, or AnnData."
        raise ConfigError(message("An array has no columns", found=labels, do=do))
    if labels not in Z.obs:
        raise unknown("column", labels, Z.obs.columns, error=DataError)
    return Z.obs[labels]


def _points(Z: Cells) -> np.ndarray:
    return dense(as_matrix(Z)).astype(np.float64, copy=False)


def _codes(labels: Labels) -> np.ndarray:
    return np.unique(np.asarray(labels).astype(str), return_inverse=True)[1]


def _onehot(code: np.ndarray) -> np.ndarray:
    return np.eye(code.max() + 1)[code]


def _mean(values: Any) -> float:
    return float(np.mean(values)) if len(values) else _NAN


def _slices(n: int, width: int) -> list[slice]:
    size = max(1, _BLOCK // max(width, 1))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _links(at: np.ndarray, n: int) -> sp.csr_matrix:
    """Return the graph in which row i points at its neighbours `at[i]`."""
    start = np.arange(0, at.size + 1, at.shape[1])
    return sp.csr_matrix((np.ones(at.size), at.ravel(), start), shape=(n, n))


def _weights(gap: np.ndarray, goal: float) -> np.ndarray:
    """Return weights exp(-beta gap) of rows, scaled to sum 1 and to entropy `goal`."""
    # Less the nearest: the weights are the same, and one of them is never 0.
    gap = gap - gap.min(1, keepdims=True)
    beta = 1 / np.maximum(gap.mean(1, keepdims=True), 1e-12)
    low, high = np.zeros_like(beta), np.full_like(beta, np.inf)
    for _ in range(60):
        weight = np.exp(-beta * gap)
        total = weight.sum(1, keepdims=True)
        entropy = np.log(total) + beta * (gap * weight).sum(1, keepdims=True) / total
        if (np.abs(entropy - goal) < 1e-6).all():
            break
        flat = entropy > goal
        low, high = np.where(flat, beta, low), np.where(flat, high, beta)
        beta = np.where(np.isinf(high), 2 * beta, (low + np.minimum(high, 1e300)) / 2)
    return weight / total


def _silhouettes(
    x: np.ndarray,
    code: np.ndarray,
    against: Literal["nearest", "others"] = "nearest",
    cosine: bool = False,
) -> np.ndarray:
    """Silhouette of each cell, in blocks; empty for one group, 0 for a cell alone.

    `against`: the nearest other group, or all cells of other groups as one.
    """
    size = np.bincount(code)
    if len(size) < 2:
        return np.empty(0)
    seen, found = _onehot(code), np.empty(len(x))
    for rows in _slices(len(x), len(x)):
        gap = (cosine_distances if cosine else distances)(x[rows], x)
        sums, own = gap @ seen, code[rows][:, None]
        inside = np.take_along_axis(sums, own, 1)[:, 0]
        if against == "others":
            outside = (sums.sum(1) - inside) / (len(x) - size[own[:, 0]])
        else:
            sums = sums / size
            np.put_along_axis(sums, own, np.inf, 1)
            outside = sums.min(1)
        inside = inside / np.maximum(size[own[:, 0]] - 1, 1)
        larger = np.maximum(np.maximum(inside, outside), 1e-300)
        found[rows] = np.where(size[own[:, 0]] > 1, (outside - inside) / larger, 0)
    return found


def _isolated(per_cell: np.ndarray, labels: Labels, batches: Labels) -> float:
    t, b = _codes(labels), _codes(batches)
    n_batches = (_onehot(t).T @ _onehot(b) > 0).sum(1)
    few = np.flatnonzero(n_batches == n_batches.min())
    if len(few) == len(n_batches):
        return _NAN
    return _mean([((per_cell[t == kind] + 1) / 2).mean() for kind in few])


def _batch_width(
    Z: Cells,
    labels: Labels,
    batches: Labels,
    against: Literal["nearest", "others"],
    cosine: bool,
) -> float:
    x, t, b = _points(Z), _codes(labels), np.asarray(batches)
    widths = []
    for kind in np.unique(t):
        own = _codes(b[t == kind])
        if 1 < own.max() + 1 < len(own):
            found = _silhouettes(x[t == kind], own, against, cosine)
            widths.append(1 - np.abs(found).mean())
    return _mean(widths)
