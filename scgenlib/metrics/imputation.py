"""Is an imputed matrix right, and what did it cost? Errors, smoothing, inventions.

`values` and `truth` are cells x genes, ndarray or CSR, on the log scale unless a
function says otherwise. Scores on two scales cannot be compared: put the truth on
its scale with `log_truth`, once, and use it for every method. A cheap baseline
(`scgenlib.baselines`) belongs beside every number here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.optimize import nnls
from scipy.special import gammaln
from scipy.stats import mannwhitneyu, spearmanr, ttest_ind
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from scgenlib._matrix import Matrix, as_matrix, dense, fit_pca, labels_of, mean_variance
from scgenlib.completion import log_counts
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.metrics.clustering import Labels, ari, nmi
from scgenlib.metrics.generation import _correlations, _pearson

_BLOCK = 20_000_000  # entries of a matrix that are dense at a time
_CONSTANT = 1e-12  # a variance up to this is rounding


# ---------------------------------------------------------------- values and mask


def log_truth(
    true_counts: Matrix,
    totals: np.ndarray | None = None,
    target_sum: float | None = None,
) -> sp.csr_matrix:
    """Return ln(1 + true count x target / total), the scale of a comparison.

    Parameters
    ----------
    true_counts
        Counts before dropout, cells x genes.
    totals
        Total of each cell. None takes those of `true_counts`, the cells' own scale.
        The totals of the observed counts make kept entries equal to the input's; this
        is the published choice. It shares the noise of these totals with the input, so
        that a method is paid for predicting it.
    target_sum
        None takes the median of `totals`.
    """
    counts = sp.csr_matrix(true_counts, dtype=np.float64)
    own = np.asarray(counts.sum(1)).ravel() if totals is None else np.asarray(totals)
    if own.shape != (counts.shape[0],) or not (own > 0).all():
        found = f"{own.shape} totals, the smallest {own.min()}"
        raise DataError(
            message("Every cell needs a total", found=found, allowed="above 0")
        )
    target = np.median(own) if target_sum is None else target_sum
    return sp.csr_matrix((sp.diags(target / own) @ counts).log1p(), dtype=np.float32)


def masked_scores(values: Matrix, truth: Matrix, where: Matrix) -> dict[str, float]:
    """Error and agreement over some entries, all cells and genes in one pool.

    Blind to structure within a gene: most of the variance in the pool lies between
    genes, so that a mean per gene already has a high correlation and cosine.

    Parameters
    ----------
    values, truth
        Imputed and true values on one scale.
    where
        Entries to score, bool; for lost ones, truth above 0 and observed 0.

    Returns
    -------
    dict
        'rmse'; 'pcc', Pearson's correlation (nan if a side is constant); 'cosine' (0
        if a side is all 0); 'n', the number of entries.
    """
    x, y = _pair(values, truth)
    rows, columns = _mask(where, x.shape).nonzero()
    if len(rows) == 0:
        raise DataError(message("There is no entry to score", found=0))
    a, b = _pick(x, rows, columns), _pick(y, rows, columns)
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return {
        "rmse": float(np.sqrt(np.mean((a - b) ** 2))),
        "pcc": _pearson(a, b) if len(a) > 1 else float("nan"),
        "cosine": float(a @ b / size) if size > 0 else 0.0,
        "n": len(a),
    }


def mask_scores(flagged: Matrix, lost: Matrix, observed: Matrix) -> dict[str, float]:
    """Score which zeros were called dropouts, beside calling all of them so.

    Blind to the values filled in. With most zeros lost, flagging everything has a
    high F1; accuracy is the score that it does not buy.

    Parameters
    ----------
    flagged, lost
        Bool, cells x genes: called a dropout, and truly one (truth above 0).
    observed
        Observed counts or values; only its zeros are scored.

    Returns
    -------
    dict
        'accuracy', 'precision', 'recall', 'f1', the same as `flag_all_...`, and 'n',
        the number of zeros. A score without a denominator is nan.
    """
    shape = observed.shape
    zeros = shape[0] * shape[1] - _mask(observed, shape).nnz
    called, true = (_outside(_mask(m, shape), observed) for m in (flagged, lost))
    hits = called.multiply(true).nnz

    def scores(hits: int, called: int) -> dict[str, float]:
        right = zeros - called - true.nnz + 2 * hits
        pairs = {
            "accuracy": (right, zeros),
            "precision": (hits, called),
            "recall": (hits, true.nnz),
            "f1": (2 * hits, called + true.nnz),
        }
        return {k: a / b if b else float("nan") for k, (a, b) in pairs.items()}

    everything = scores(true.nnz, zeros)
    reference = {f"flag_all_{name}": value for name, value in everything.items()}
    return {**scores(hits, called.nnz), **reference, "n": zeros}


def zeros_filled(
    values: Matrix, truth: Matrix, observed: Matrix, above: float = 0.1
) -> float:
    """Share of true zeros (truth and observed 0) with an imputed value over `above`.

    Blind to the lost entries: imputing nothing scores a perfect 0.
    """
    x, shape = as_matrix(values), truth.shape
    positive = _mask(truth, shape) + _mask(observed, shape)
    n = shape[0] * shape[1] - positive.nnz
    found = _outside(_mask(x > above, shape), positive).nnz
    return found / n if n else float("nan")


# ---------------------------------------------------------- smoothing within a type


def oversmoothing(
    values: Matrix,
    truth: Matrix,
    labels: Labels,
    *,
    totals: np.ndarray | None = None,
    where: Matrix | None = None,
    min_cells: int = 10,
) -> dict[str, float]:
    """How much of the spread within a type is left, and is it the right spread?

    Noise buys any variance ratio, and tiny but well-ordered values buy correlation:
    read the two together. Blind to differences between types.

    Parameters
    ----------
    values, truth, labels
        Imputed and true values; the type of each cell.
    totals
        Totals of the cells; the correlation is then partial on their logarithm. This
        cannot mend a truth that was scaled with the observed totals: take the truth
        on its own scale (`log_truth`).
    where
        Entries that count for the correlation, bool; give the lost entries, or the
        entries that were kept answer for the method. None takes all.
    min_cells
        Pairs of gene and type with fewer entries are left out.

    Returns
    -------
    dict
        'variance_ratio': squared deviations from the mean of the type, summed over
        genes and types, imputed over true; 1 is right, 0 is a type mean.
        'correlation': with the truth over the cells of a type, the mean over pairs of
        gene and type in which the truth varies; a pair in which `values` do not vary
        counts 0. 'pairs': their number. 'flat': the share that does not vary.
    """
    x, y = _pair(values, truth)
    kept = None if where is None else _mask(where, x.shape)
    found, flat, spread = [], [], np.zeros(2)
    for _, rows in _groups(labels, x.shape[0]):
        size = np.zeros((len(rows), 1))
        if totals is not None:
            size = np.log(np.asarray(totals, dtype=np.float64)[rows, None])
        for part in _columns(x.shape[1], len(rows)):
            a, b = _block(x, rows, part), _block(y, rows, part)
            spread += [(m.var(0) * len(rows)).sum() for m in (a, b)]
            weight = np.ones_like(a) if kept is None else _block(kept, rows, part)
            n = weight.sum(0)
            usable = n >= max(min_cells, 2)
            a, b, c = (_standard(m, weight, n) for m in (a, b, size))
            ab, ac, bc = (_sum(weight, i, j, n) for i, j in ((a, b), (a, c), (b, c)))
            varies = _sum(weight, a, a, n) > 0.5
            usable &= _sum(weight, b, b, n) > 0.5
            rest = (1 - ac**2) * (1 - bc**2)
            r = np.divide(ab - ac * bc, np.sqrt(np.maximum(rest, 1e-12)))
            found.append(np.where(varies & (rest > 1e-9), r, 0)[usable])
            flat.append(~varies[usable])
    r, still = np.concatenate(found), np.concatenate(flat)
    return {
        "variance_ratio": float(spread[0] / spread[1]) if spread[1] else float("nan"),
        "correlation": float(r.mean()) if len(r) else float("nan"),
        "pairs": len(r),
        "flat": float(still.mean()) if len(r) else float("nan"),
    }


def gene_correlation_inflation(
    values: Matrix,
    truth: Matrix | None,
    labels: Labels,
    *,
    n_genes: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Strength of the correlations between genes within a type, beside the truth's.

    Blind to which genes are correlated: the same strength in other pairs passes.

    Parameters
    ----------
    values, truth, labels
        Imputed values; true ones or None; the type of each cell.
    n_genes, seed
        With more genes, this many are drawn.

    Returns
    -------
    dict
        'mean_r' and 'share_r': mean absolute correlation and share above 0.3, over
        pairs of genes in all types; 'mean_r_truth' and 'share_r_truth' (nan without
        truth); 'null': sqrt(2 / (pi n)), expected of independent genes in n cells;
        'pairs'; 'skipped': share of genes that do not vary in a type.
        Types of fewer than 4 cells are left out.
    """
    x = as_matrix(values)
    y = x if truth is None else _pair(values, truth)[1]
    genes = np.arange(x.shape[1])
    if len(genes) > n_genes:
        genes = np.sort(np.random.default_rng(seed).choice(genes, n_genes, False))
    sums, pairs, skipped, types = np.zeros(5), 0, 0, 0
    for _, rows in _groups(labels, x.shape[0]):
        if len(rows) < 4:
            continue
        parts = [m[rows][:, genes] for m in (x, y)]
        varies = np.all([mean_variance(p)[1] > _CONSTANT for p in parts], axis=0)
        upper = np.triu_indices(varies.sum(), 1)
        n, types = len(upper[0]), types + 1
        pairs, skipped = pairs + n, skipped + (~varies).sum()
        if n == 0:
            continue
        r, s = (np.abs(_correlations(p[:, varies])[upper]) for p in parts)
        null = n * np.sqrt(2 / (np.pi * len(rows)))
        sums += [r.sum(), (r > 0.3).sum(), s.sum(), (s > 0.3).sum(), null]
    names = ["mean_r", "share_r", "mean_r_truth", "share_r_truth", "null"]
    means = sums / pairs if pairs else np.full(5, np.nan)
    if truth is None:
        means[2:4] = np.nan
    result = dict(zip(names, map(float, means), strict=True))
    share = skipped / (types * len(genes)) if types else float("nan")
    return {**result, "pairs": pairs, "skipped": float(share)}


def invented_correlation(
    impute: Callable[[AnnData], AnnData],
    adata: AnnData,
    label_key: str = "cell_type",
    *,
    n_genes: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Impute cells whose genes are independent within a type; what appears is invented.

    The counts of each gene are permuted over the cells of a type, which leaves its
    histogram and the types. Blind to correlation that a method invents only where
    there is some to start from.

    Parameters
    ----------
    impute
        Takes the permuted cells (``layers["counts"]``, X from them, `obs`) and
        returns AnnData with ``layers["imputed"]``.
    adata, label_key
        Cells with counts, and the column with their types.
    n_genes, seed
        As in `gene_correlation_inflation`; `seed` also permutes.

    Returns
    -------
    dict
        'before' and 'after': mean absolute correlation within a type of the permuted
        log counts and of the imputed values; 'share_before' and 'share_after' above
        0.3; 'null' as in `gene_correlation_inflation`.
    """
    labels = labels_of(adata, label_key)
    counts, rng = adata.layers["counts"], np.random.default_rng(seed)
    blocks, order = [], []
    for _, rows in _groups(labels, adata.n_obs):
        parts = [
            sp.csc_matrix(rng.permuted(_block(counts, rows, part), axis=0))
            for part in _columns(adata.n_vars, len(rows))
        ]
        blocks.append(sp.hstack(parts, "csr"))
        order.append(rows)
    mixed = sp.vstack(blocks, "csr")[np.argsort(np.concatenate(order))]
    shuffled = AnnData(mixed.astype(np.float32), obs=adata.obs, var=adata.var)
    shuffled.layers["counts"] = shuffled.X
    shuffled.X = log_counts(shuffled).values
    after = impute(shuffled).layers["imputed"]
    found = gene_correlation_inflation(
        after, shuffled.X, labels, n_genes=n_genes, seed=seed
    )
    return {
        "before": found["mean_r_truth"],
        "after": found["mean_r"],
        "share_before": found["share_r_truth"],
        "share_after": found["share_r"],
        "null": found["null"],
    }


def false_de(
    values: Matrix,
    seed: int = 0,
    test: Literal["wilcoxon", "t"] = "wilcoxon",
    *,
    halves: np.ndarray | None = None,
) -> dict[str, float]:
    """Test for differences between two random halves of ONE type: all are false.

    Blind to differences that should be found; imputing a constant scores 0. Worst for
    a method that is told the halves as if they were types: impute with them as labels,
    and give the same ones here.

    Parameters
    ----------
    values
        Imputed values of the cells of one type.
    seed
        Draws the halves.
    test
        'wilcoxon' (rank sum, normal approximation) or 't' (Welch).
    halves
        One of two values for each cell; None draws them.

    Returns
    -------
    dict
        'false': share of tested genes with p < 0.05, right at 0.05; 'bonferroni':
        the same after correction for their number, right at 0; 'tested';
        'skipped': genes without variation.
    """
    x = as_matrix(values)
    if test not in ("wilcoxon", "t"):
        raise unknown("test", test, ["wilcoxon", "t"])
    if halves is None:
        halves = np.random.default_rng(seed).permutation(x.shape[0]) % 2
    groups = [rows for _, rows in _groups(halves, x.shape[0])]
    if len(groups) != 2 or min(map(len, groups)) < 2:
        found = [len(rows) for rows in groups]
        raise DataError(message("Two halves of two cells are needed", found=found))
    p = []
    for part in _columns(x.shape[1], x.shape[0]):
        a, b = (_block(x, rows, part) for rows in groups)
        varies = np.ptp(np.vstack([a, b]), axis=0) > 1e-6
        if varies.any():
            a, b = a[:, varies], b[:, varies]
            done = (
                mannwhitneyu(a, b, axis=0, method="asymptotic")
                if test == "wilcoxon"
                else ttest_ind(a, b, axis=0, equal_var=False)
            )
            p.append(done.pvalue)
    pvalue = np.concatenate([*p, np.empty(0)])
    n = len(pvalue)
    return {
        "false": float((pvalue < 0.05).mean()) if n else float("nan"),
        "bonferroni": float((pvalue * n < 0.05).mean()) if n else float("nan"),
        "tested": n,
        "skipped": x.shape[1] - n,
    }


def neighbour_overlap(
    values: Matrix,
    truth: Matrix,
    labels: Labels,
    k: int = 15,
    *,
    n_pcs: int = 20,
    seed: int = 0,
) -> dict[str, float]:
    """Do cells keep their neighbours within the type? Jaccard index of the k nearest.

    Neighbours by principal components of each type on its own. Blind to the scale of
    the values. Where a type has no structure, the truth's own neighbours are noise:
    read it beside 'chance'.

    Returns
    -------
    dict
        'jaccard': mean over cells; 'chance': what random neighbours share, about
        k / (2 (n - 1) - k) in a type of n cells; 'cells': how many were scored.
        Types of fewer than k + 2 cells are left out.
    """
    x, y = _pair(values, truth)
    found, chance = [], []
    for _, rows in _groups(labels, x.shape[0]):
        if len(rows) < k + 2:
            continue
        sets = []
        for m in (x[rows], y[rows]):
            scores = fit_pca(m, n_pcs, seed).transform(m)
            search = NearestNeighbors(n_neighbors=k).fit(scores)
            sets.append(search.kneighbors_graph())
        both = np.asarray(sets[0].multiply(sets[1]).sum(1)).ravel()
        found.append(both / (2 * k - both))
        chance.append(np.full(len(rows), k / (2 * (len(rows) - 1) - k)))
    if not found:
        allowed = f"at least k + 2 = {k + 2} cells"
        raise DataError(message("Every type is too small", allowed=allowed))
    overlap = np.concatenate(found)
    return {
        "jaccard": float(overlap.mean()),
        "chance": float(np.concatenate(chance).mean()),
        "cells": len(overlap),
    }


# ------------------------------------------------------------- what a study would do


def cluster_scores(
    values: Matrix,
    labels: Labels,
    n_clusters: int | None = None,
    n_pcs: int = 20,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Agreement of k-means clusters with the types, and how well groups stand apart.

    Blind to whatever the labels told the method: a fill by random labels clusters
    perfectly by them. Filling with one mean per gene can be enough for an ARI of 1.

    Parameters
    ----------
    values, labels
        Imputed values; the type of each cell.
    n_clusters
        None takes the number of types.
    n_pcs, seed
        Principal components; k-means is the best of ten starts.

    Returns
    -------
    dict
        'ari', 'nmi'; 'silhouette' of the clusters and 'silhouette_types' of the types,
        in the components, from at most 5,000 cells (nan with one group).
    """
    x = as_matrix(values)
    names = np.asarray(labels).astype(str)
    k = len(np.unique(names)) if n_clusters is None else n_clusters
    if not 1 <= k <= x.shape[0] or len(names) != x.shape[0]:
        found = f"{k} clusters, {len(names)} labels, {x.shape[0]} cells"
        raise DataError(message("Clusters, labels or cells are off", found=found))
    scores = fit_pca(x, n_pcs, seed).transform(x)
    found = KMeans(k, n_init=10, random_state=seed).fit_predict(scores)

    def silhouette(groups: np.ndarray) -> float:
        if not 1 < len(np.unique(groups)) < len(groups):
            return float("nan")
        n = min(5000, len(groups))
        return float(silhouette_score(scores, groups, sample_size=n, random_state=seed))

    return {
        "ari": ari(names, found),
        "nmi": nmi(names, found),
        "silhouette": silhouette(found),
        "silhouette_types": silhouette(names),
    }


def thin(
    counts: Matrix, share: float = 0.9, seed: int = 0
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Deal every molecule to a training or a held-out matrix (binomial thinning).

    The two add up to `counts`; if the counts are Poisson, they are independent
    (molecular cross-validation, Batson et al., 2019).

    Parameters
    ----------
    counts
        Whole numbers, cells x genes.
    share
        Probability that a molecule goes to the training matrix, between 0 and 1.
    seed
        Seed of the draw.
    """
    whole = sp.csr_matrix(counts, dtype=np.float64)
    if not 0 < share < 1:
        raise ConfigError(message("share", found=share, allowed="between 0 and 1"))
    if len(whole.data) and (whole.data.min() < 0 or (whole.data % 1).any()):
        raise DataError(message("Only whole numbers can be thinned", found="fractions"))
    train, test = whole.copy(), whole.copy()
    rng = np.random.default_rng(seed)
    train.data = rng.binomial(whole.data.astype(np.int64), share).astype(np.float32)
    test.data = (whole.data - train.data).astype(np.float32)
    for part in (train, test):
        part.eliminate_zeros()
    return train, test


def poisson_loss(predicted_counts: Matrix, held_out: Matrix, share: float) -> float:
    """Mean negative Poisson log likelihood of held-out molecules, per entry.

    For counts without a known truth. The mean is `predicted_counts` x (1 - share) /
    share, at least 1e-6. A matrix that keeps observed entries is not a denoiser: it
    repeats the sampling noise of the training half, and with low counts it loses by
    construction. (Where counts are high, or scatter more than Poisson, the cell's own
    count can be the better guess.) Score methods with ``keep_observed=False``. Blind
    to errors in genes with few counts.

    Parameters
    ----------
    predicted_counts
        From the training matrix of `thin`, on its scale of counts.
    held_out
        The other matrix.
    share
        As given to `thin`.
    """
    if not 0 < share < 1:
        raise ConfigError(message("share", found=share, allowed="between 0 and 1"))
    x, y = _pair(predicted_counts, held_out)
    scale, total = (1 - share) / share, 0.0
    for rows in _columns(x.shape[0], x.shape[1]):
        mean = np.maximum(dense(x[rows]).astype(np.float64) * scale, 1e-6)
        part = sp.csr_matrix(y[rows]).tocoo()
        seen = np.log(mean[part.row, part.col])
        total += mean.sum() - part.data @ seen + gammaln(part.data + 1.0).sum()
    return float(total / (x.shape[0] * x.shape[1]))


def order_agreement(
    values: Matrix, order: Labels, *, n_neighbors: int = 15, seed: int = 0
) -> dict[str, float]:
    """Does diffusion pseudotime follow a known order of stages?

    The root is the cell of the first stage nearest to the middle of that stage in 20
    principal components. Blind to the order of cells within a stage, and to branches.

    Parameters
    ----------
    values
        Imputed values.
    order
        Rank of the stage of each cell, the first stage smallest.
    n_neighbors, seed
        Neighbours of the graph; seed of components and graph.

    Returns
    -------
    dict
        'spearman': absolute rank correlation (nan if all cells are equal);
        'unreached': share of cells not connected to the root, which count as last.
        Where many are, only that split is scored: use more neighbours.
    """
    import scanpy as sc

    x, rank = as_matrix(values), np.asarray(order, dtype=np.float64)
    if len(rank) != x.shape[0] or len(np.unique(rank)) < 2 or len(rank) < 4:
        found = f"{len(rank)} ranks for {x.shape[0]} cells"
        raise DataError(message("Each cell needs one of two stages", found=found))
    if mean_variance(x)[1].max() <= _CONSTANT:  # equal cells have no order
        return {"spearman": float("nan"), "unreached": 0.0}
    graph = AnnData(fit_pca(x, 20, seed).transform(x).astype(np.float32))
    first = np.flatnonzero(rank == rank.min())
    middle = graph.X[first].mean(0)
    root = first[np.linalg.norm(graph.X[first] - middle, axis=1).argmin()]
    near = min(n_neighbors, len(rank) - 1)
    sc.pp.neighbors(graph, n_neighbors=near, use_rep="X", random_state=seed)
    sc.tl.diffmap(graph, n_comps=min(15, len(rank) - 1), random_state=seed)
    graph.uns["iroot"] = int(root)
    sc.tl.dpt(graph)
    time = graph.obs["dpt_pseudotime"].to_numpy(dtype=np.float64)
    lost = ~np.isfinite(time)
    time[lost] = np.nanmax(time[~lost]) + 1
    r = abs(spearmanr(time, rank).statistic) if np.ptp(time) > 0 else float("nan")
    return {"spearman": float(r), "unreached": float(lost.mean())}


def mixing_error(
    values: Matrix, proportions: Any, *, seed: int = 0
) -> dict[str, float]:
    """Recover known mixing proportions from LINEAR values, such as ``expm1(imputed)``.

    The wells of each mixture are dealt to two halves. Pure profiles are fitted by
    least squares of one half on its proportions, and used for the wells of the other
    half (non-negative least squares, scaled to sum 1); then the halves change places.
    So no well helps to make the profiles that it is judged by, in no method. Every
    method makes its own profiles, as each distorts expression in its own way.

    Blind to genes of low expression, and to collapse onto the mixtures: replacing each
    well by the mean of its mixture scores well. The dealing moves the score by about a
    tenth: average over seeds.

    Parameters
    ----------
    values
        Wells x genes, each well scaled to one total, not logarithms.
    proportions
        Wells x lines (array or DataFrame); rows sum to 1, within 0.02 of rounding.
    seed
        Deals the wells.

    Returns
    -------
    dict
        'rmse' over wells and lines; 'guess', that of the mean proportions of the other
        half; 'n', the wells.
    """
    x, known = as_matrix(values), np.asarray(proportions, dtype=np.float64)
    if (
        known.ndim != 2
        or len(known) != x.shape[0]
        or (abs(known.sum(1) - 1) > 0.02).any()
    ):
        shape = f"shape {known.shape} for {x.shape[0]} wells"
        raise DataError(message("Proportions must sum to 1 in each well", found=shape))
    known = known / known.sum(1, keepdims=True)
    rng = np.random.default_rng(seed)
    mixtures = pd.factorize(pd.Series(map(tuple, known.round(4))))[0]
    # Sorted by mixture, random within: every second well of each mixture.
    half = np.empty(len(known), int)
    half[np.lexsort((rng.random(len(known)), mixtures))] = np.arange(len(known)) % 2
    found, guess = np.empty_like(known), np.empty_like(known)
    for fitted, judged in ((half == 0, half == 1), (half == 1, half == 0)):
        if np.linalg.matrix_rank(known[fitted]) < known.shape[1]:
            do = "Use more wells, or fewer lines."
            raise DataError(message("Half of the wells do not span the lines", do=do))
        profiles = (x[fitted].T @ np.linalg.pinv(known[fitted]).T).clip(min=0)
        q, r = np.linalg.qr(profiles)
        parts = np.array([nnls(r, well)[0] for well in x[judged] @ q])
        total = parts.sum(1, keepdims=True)
        even = np.full_like(parts, 1 / known.shape[1])
        found[judged] = np.divide(parts, total, out=even, where=total > 0)
        guess[judged] = known[fitted].mean(0)
    rmse = [float(np.sqrt(((m - known) ** 2).mean())) for m in (found, guess)]
    return {"rmse": rmse[0], "guess": rmse[1], "n": len(known)}


# ------------------------------------------------------------------------- helpers


def _pair(values: Matrix, truth: Matrix) -> tuple[Matrix, Matrix]:
    x, y = as_matrix(values), as_matrix(truth)
    if x.shape != y.shape:
        found = f"{x.shape} and {y.shape}"
        raise DataError(message("Values and truth differ in shape", found=found))
    return x, y


def _mask(where: Matrix, shape: tuple[int, int]) -> sp.csr_matrix:
    """Return what is not 0, as sparse bool."""
    if where.shape != shape:
        found = f"{where.shape} for values of {shape}"
        raise DataError(message("A mask has the shape of the values", found=found))
    mask = sp.csr_matrix(where).astype(bool)
    mask.eliminate_zeros()
    return mask


def _outside(mask: sp.csr_matrix, other: Matrix) -> sp.csr_matrix:
    """Return the entries of a mask at which `other` is 0."""
    left = mask.astype(np.int8) - mask.multiply(_mask(other, mask.shape)).astype(
        np.int8
    )
    left.eliminate_zeros()
    return left


def _pick(matrix: Matrix, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.asarray(matrix[rows, columns], dtype=np.float64).ravel()


def _groups(labels: Labels, n: int) -> Iterator[tuple[Any, np.ndarray]]:
    """Yield each type with its rows."""
    names = np.asarray(labels)
    if names.shape != (n,):
        found = f"{names.shape} labels for {n} cells"
        raise DataError(message("Each cell needs one label", found=found))
    for name in np.unique(names.astype(str)):
        yield name, np.flatnonzero(names.astype(str) == name)


def _columns(n: int, other: int) -> Iterator[slice]:
    """Cut `n` columns (or rows) of length `other` into slices of limited size."""
    width = max(1, _BLOCK // max(other, 1))
    for first in range(0, n, width):
        yield slice(first, first + width)


def _block(matrix: Matrix, rows: np.ndarray, part: slice) -> np.ndarray:
    block = matrix[rows][:, part]
    return (block.toarray() if sp.issparse(block) else np.array(block)).astype(float)


def _sum(weight: np.ndarray, a: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
    return (weight * a * b).sum(0) / np.maximum(n, 1)


def _standard(m: np.ndarray, weight: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return each column with weighted mean 0 and variance 1, or 0 if constant."""
    m = m - (weight * m).sum(0) / np.maximum(n, 1)
    spread = _sum(weight, m, m, n)
    return np.where(spread > _CONSTANT, m / np.sqrt(np.maximum(spread, _CONSTANT)), 0)
