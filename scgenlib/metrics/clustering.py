"""Do clusters find the cell types? Agreement scores, Leiden, gene choice."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from scgenlib._matrix import (
    Cells,
    Matrix,
    as_matrix,
    as_pair,
    fit_pca,
    labels_of,
    moments,
    subsample,
)
from scgenlib.errors import ConfigError, DataError, message, unknown

Labels: TypeAlias = Sequence[Any] | np.ndarray | pd.Series
GeneScore = Literal["cv2", "fano", "pca"]


def ari(true: Labels, pred: Labels) -> float:
    """Adjusted Rand index: 1 same grouping, 0 as random; names do not matter."""
    return float(adjusted_rand_score(_strings(true), _strings(pred)))


def nmi(true: Labels, pred: Labels) -> float:
    """Normalised mutual information (arithmetic mean), 0 to 1; not for chance."""
    return float(normalized_mutual_info_score(_strings(true), _strings(pred)))


def matched_labels(true: Labels, pred: Labels) -> np.ndarray:
    """Rename clusters to the types that they fit best, one to one.

    The assignment (Hungarian algorithm) maximises the summed F1 of the pairs.

    Parameters
    ----------
    true
        Type of each cell.
    pred
        Cluster of each cell; any names.

    Returns
    -------
    ndarray of str
        For each cell the type that its cluster is matched to. Clusters left over,
        or without a cell of their type, keep their name, as 'cluster <name>'.
    """
    types, clusters, f1 = _f1_table(true, pred)
    rows, columns = linear_sum_assignment(-f1)
    names = {cluster: f"cluster {cluster}" for cluster in clusters}
    for row, column in zip(rows, columns, strict=True):
        if f1[row, column] > 0:  # a leftover type and cluster may share no cell
            names[clusters[column]] = types[row]
    return np.array([names[cluster] for cluster in _strings(pred)], dtype=str)


def macro_f1(true: Labels, pred: Labels, matched: bool = True) -> float:
    """F1 of each true type, averaged over types.

    Parameters
    ----------
    true, pred
        Type and cluster of each cell.
    matched
        True renames clusters first (`matched_labels`). False takes cluster
        number i for the i-th type in alphabetical order, as GARAGE's evaluation
        did: a perfect clustering can then score 0.

    Returns
    -------
    float
        0 to 1. Both variants average over the true types, so matching can only
        raise the score. A type without a cluster counts 0.
    """
    types, clusters, f1 = _f1_table(true, pred)
    if matched:
        rows, columns = linear_sum_assignment(-f1)
        return float(f1[rows, columns].sum() / len(types))
    column = {cluster: index for index, cluster in enumerate(clusters)}
    hits = [f1[i, column[str(i)]] for i in range(len(types)) if str(i) in column]
    return float(np.sum(hits) / len(types))


def leiden(
    X: Cells,
    resolution: float = 1.0,
    n_pcs: int = 20,
    n_neighbors: int = 30,
    *,
    seed: int = 0,
) -> np.ndarray:
    """Leiden clusters of the cells in principal-component space.

    Parameters
    ----------
    X
        Cells x genes, log1p values.
    resolution
        Above 0; larger gives more clusters.
    n_pcs, n_neighbors
        Principal components and neighbours of the graph (Euclidean).
    seed
        Seed of the components and of Leiden (igraph flavour).

    Returns
    -------
    ndarray of int
        Cluster of each cell, 0 the largest.
    """
    return _partition(_graph(as_matrix(X), n_pcs, n_neighbors, seed), resolution, seed)


def ari_over_resolutions(
    X: Cells,
    labels: Labels,
    resolutions: Sequence[float] = tuple(np.arange(1, 21) / 10),
    n_pcs: int = 20,
    n_neighbors: int = 30,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Score Leiden clusterings of one graph over a grid of resolutions.

    The best row is chosen against the truth: quote it for all arms or for none.

    Returns
    -------
    DataFrame
        Columns 'resolution', 'clusters' (their number), 'ari', 'nmi'.
    """
    graph = _graph(as_matrix(X), n_pcs, n_neighbors, seed)
    rows = []
    for resolution in resolutions:
        found = _partition(graph, resolution, seed)
        n_clusters = len(np.unique(found))
        scores = (ari(labels, found), nmi(labels, found))
        rows.append((float(resolution), n_clusters, *scores))
    return pd.DataFrame(rows, columns=["resolution", "clusters", "ari", "nmi"])


def informative_genes(
    X: Cells, method: GeneScore = "cv2", n_genes: int = 100, *, seed: int = 0
) -> np.ndarray:
    """Positions of the genes that vary most by one of three scores.

    Parameters
    ----------
    X
        Cells x genes, log1p values.
    method
        'cv2': squared coefficient of variation, on a log scale, above the median
        of genes with a similar mean, in units of their median absolute
        deviation. 'fano': variance over mean. 'pca': largest absolute loading on
        the first three principal components of genes scaled to unit variance.
    n_genes
        How many; fewer if there are not so many that vary.

    Returns
    -------
    ndarray of int
        Columns of `X`, best first.
    """
    matrix = as_matrix(X)
    mean, variance, _ = moments(matrix)
    varies = (variance > 1e-12) & (mean > 0)
    score = np.full(len(mean), -np.inf)
    if method == "fano":
        score[varies] = variance[varies] / mean[varies]
    elif method == "cv2":
        score[varies] = _excess_cv2(mean[varies], variance[varies])
    elif method == "pca":
        scale = sp.diags((1 / np.sqrt(variance[varies])).astype(matrix.dtype))
        # Loadings need no more cells than this, and dense input stays small.
        scaled = subsample(matrix, 5000, seed)[:, varies] @ scale
        score[varies] = np.abs(fit_pca(scaled, 3, seed).components_).max(0)
    else:
        raise unknown("gene score", method, ["cv2", "fano", "pca"])
    best = np.argsort(-score, kind="stable")[:n_genes]
    return best[np.isfinite(score[best])]


def feature_selection_utility(
    real: AnnData,
    generated: Cells,
    method: GeneScore = "cv2",
    n_genes: int = 100,
    *,
    label_key: str = "cell_type",
    resolution: float = 1.0,
    n_pcs: int = 20,
    n_neighbors: int = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """Choose genes on generated cells, cluster the REAL cells on these genes.

    Parameters
    ----------
    real
        Real cells with labels.
    generated
        Cells x the same genes; pass real cells for the reference.
    method, n_genes
        As in `informative_genes`.
    resolution, n_pcs, n_neighbors, seed
        As in `leiden`; the same for every arm of a comparison.

    Returns
    -------
    dict
        'ari', 'nmi', 'macro_f1' (matched), 'clusters' (their number), 'genes'
        (names, best first).
    """
    labels = labels_of(real, label_key)
    x, y = as_pair(real, generated)
    chosen = informative_genes(y, method, n_genes, seed=seed)
    if len(chosen) < 2:
        raise DataError(
            message(
                "Too few generated genes vary to choose from",
                found=len(chosen),
                allowed="at least 2",
                do="The generator may have collapsed to one cell.",
            )
        )
    found = leiden(x[:, chosen], resolution, n_pcs, n_neighbors, seed=seed)
    return {
        "ari": ari(labels, found),
        "nmi": nmi(labels, found),
        "macro_f1": macro_f1(labels, found),
        "clusters": len(np.unique(found)),
        "genes": list(real.var_names[chosen]),
    }


def _strings(labels: Labels) -> np.ndarray:
    return np.asarray(labels).astype(str)


def _f1_table(true: Labels, pred: Labels) -> tuple[list[str], list[str], np.ndarray]:
    """F1 of every type with every cluster: 2 x overlap / (sum of sizes)."""
    if len(true) != len(pred) or len(true) == 0:
        raise DataError(
            message(
                "Types and clusters are compared cell by cell",
                found=f"{len(true)} types and {len(pred)} clusters",
                allowed="the same number, at least one",
            )
        )
    overlap = pd.crosstab(_strings(true), _strings(pred))
    counts = overlap.to_numpy()
    sizes = counts.sum(1)[:, None] + counts.sum(0)[None, :]
    return list(overlap.index), list(overlap.columns), 2 * counts / sizes


def _graph(matrix: Matrix, n_pcs: int, n_neighbors: int, seed: int) -> AnnData:
    import scanpy as sc

    if matrix.shape[0] < 3:
        raise DataError(
            message("Clustering needs at least three cells", found=matrix.shape[0])
        )
    scores = fit_pca(matrix, n_pcs, seed).transform(matrix)
    graph = AnnData(scores.astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.neighbors(
            graph,
            n_neighbors=min(n_neighbors, matrix.shape[0] - 1),
            use_rep="X",
            random_state=seed,
        )
    return graph


def _partition(graph: AnnData, resolution: float, seed: int) -> np.ndarray:
    import scanpy as sc

    if not resolution > 0:
        raise ConfigError(
            message("Leiden's resolution", found=resolution, allowed="above 0")
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.tl.leiden(
            graph,
            resolution=resolution,
            flavor="igraph",
            n_iterations=2,
            directed=False,
            random_state=seed,
        )
    found = graph.obs["leiden"].astype(int).to_numpy()
    # igraph's numbers follow no rule: 0 becomes the largest cluster.
    by_size = np.argsort(-np.bincount(found), kind="stable")
    return np.argsort(by_size)[found]


def _excess_cv2(mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    cv2 = pd.Series(np.log(variance / mean**2))
    n_bins = max(1, min(20, len(cv2) // 5))
    bins = pd.qcut(pd.Series(mean).rank(method="first"), n_bins, labels=False)
    gap = cv2 - cv2.groupby(bins).transform("median")
    spread = gap.abs().groupby(bins).transform("median")
    return (gap / spread.clip(lower=1e-9)).to_numpy()
