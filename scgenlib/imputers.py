"""The simple imputers that every deep model must beat.

Each takes cells with ``layers["counts"]`` and returns a copy with the completed
matrix in ``layers["imputed"]`` (log scale) and ``layers["imputed_counts"]``, with
provenance in ``uns["scgenlib"]``. All share two keyword arguments:

target_sum
    Total to which every cell is scaled before the logarithm; None takes the median.
keep_observed
    True fills the zeros and keeps every observed count exactly. False returns the
    imputer's own value at every entry, which is what a score for denoising needs.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import randomized_svd

import scgenlib
from scgenlib._matrix import fit_pca, labels_of
from scgenlib.completion import LogCounts, assemble, check_size, completed, log_counts
from scgenlib.errors import ConfigError, DataError, message
from scgenlib.preprocess import normalise

__all__ = [
    "alra",
    "diffusion",
    "gene_mean",
    "knn_smoothing",
    "nb_autoencoder",
    "none",
    "type_mean",
]


def none(
    adata: AnnData, *, target_sum: float | None = None, keep_observed: bool = True
) -> AnnData:
    """Impute nothing: every zero stays 0."""
    log = _begin(adata, target_sum)
    return _done(adata, log, log.values.toarray(), keep_observed, "none")


def gene_mean(
    adata: AnnData, *, target_sum: float | None = None, keep_observed: bool = True
) -> AnnData:
    """Fill every zero of a gene with the mean of its non-zeros, on the log scale.

    Knows no labels and no cells. A gene that is 0 in all cells stays 0. With
    ``keep_observed=False`` all cells become the same.
    """
    log = _begin(adata, target_sum)
    filled = np.broadcast_to(_seen_mean(log.values)[0], adata.shape)
    return _done(adata, log, filled, keep_observed, "gene mean")


def type_mean(
    adata: AnnData,
    label_key: str = "cell_type",
    *,
    cell_shift: bool = False,
    target_sum: float | None = None,
    keep_observed: bool = True,
) -> AnnData:
    """Fill the zeros of a gene with the mean of its non-zeros in the cell's type.

    It is told the types, so that a clustering of the result shows these types,
    true or not.

    Parameters
    ----------
    label_key
        Column of `adata.obs` with the type. A gene that a type never shows takes
        its mean over all cells.
    cell_shift
        Also add one number per cell: the mean residual of its observed non-zeros.
    """
    labels, log = labels_of(adata, label_key), _begin(adata, target_sum)
    filled = np.empty(adata.shape, np.float32)
    overall = _seen_mean(log.values)[0]
    for name in np.unique(labels):
        own = labels == name
        mean, seen = _seen_mean(log.values[own])
        filled[own] = np.where(seen > 0, mean, overall)
    if cell_shift:
        x = log.values
        rows = np.repeat(np.arange(x.shape[0]), np.diff(x.indptr))
        gap = x.data - filled[rows, x.indices].astype(np.float64)
        size = np.maximum(np.diff(x.indptr), 1)
        filled += (np.bincount(rows, gap, x.shape[0]) / size)[:, None].astype("f4")
    about: dict[str, Any] = {"label_key": label_key, "cell_shift": cell_shift}
    return _done(adata, log, filled, keep_observed, "type mean", **about)


def knn_smoothing(
    adata: AnnData,
    k: int = 15,
    *,
    n_pcs: int = 10,
    target_sum: float | None = None,
    keep_observed: bool = True,
    seed: int = 0,
) -> AnnData:
    """Replace each cell by the sum of its counts and those of its k nearest cells.

    Neighbours are found again in the smoothed cells, with 1, 3, 7, ... up to k of
    them (Wagner, Yan and Yanai, 2018): distances in principal components of
    sqrt(x) + sqrt(x + 1) of counts scaled to their median total.

    Parameters
    ----------
    k
        Neighbours beside the cell itself; at least 1, fewer than the cells.
    n_pcs
        Principal components.
    seed
        Seed of the components.
    """
    log = _begin(adata, target_sum)
    _check_k("k", k, adata.n_obs)
    counts = sp.csr_matrix(adata.layers["counts"], dtype=np.float64)
    summed, near = counts, 0
    while near < k:
        near = min(2 * near + 1, k)
        totals = np.asarray(summed.sum(1)).ravel()
        scale = np.median(totals) / np.maximum(totals, 1e-12)
        x = (sp.diags(scale) @ summed).toarray()
        x = np.sqrt(x) + np.sqrt(x + 1)
        scores = fit_pca(x, n_pcs, seed).transform(x)
        search = NearestNeighbors(n_neighbors=near).fit(scores)
        # Of the raw counts, once more and with more neighbours, as published.
        summed = (search.kneighbors_graph() + sp.eye(adata.n_obs)) @ counts
    filled = normalise(summed, log.target).toarray()
    config = {"k": k, "n_pcs": n_pcs}
    return _done(adata, log, filled, keep_observed, "kNN smoothing", seed, **config)


def diffusion(
    adata: AnnData,
    *,
    knn: int = 5,
    decay: float = 1.0,
    t: int = 3,
    n_pca: int = 100,
    target_sum: float | None = None,
    keep_observed: bool = True,
    seed: int = 0,
) -> AnnData:
    """Average each cell over its neighbours on a graph, like MAGIC (2018).

    Weights exp(-(d / e) ** decay), with d the distance in principal components and
    e the cell's distance to its `knn`-th neighbour, for its 3 `knn` nearest cells;
    made symmetric, scaled to rows of sum 1, and applied `t` times to the log values.

    Parameters
    ----------
    knn
        Neighbour that sets a cell's bandwidth; at least 1, fewer than the cells.
    decay
        Above 0; larger gives a sharper edge.
    t
        Steps; at least 1. More steps smooth more.
    n_pca
        Principal components.
    seed
        Seed of the components.
    """
    log = _begin(adata, target_sum)
    _check_k("knn", knn, adata.n_obs)
    for name, value, low in (("decay", decay, 1e-9), ("t", t, 1)):
        if not value >= low:
            raise ConfigError(message(name, found=value, allowed=f"at least {low}"))
    scores = fit_pca(log.values, n_pca, seed).transform(log.values)
    reach = min(3 * knn, adata.n_obs - 1)
    graph = NearestNeighbors(n_neighbors=reach).fit(scores)
    graph = graph.kneighbors_graph(mode="distance")
    far = graph.data.reshape(-1, reach)
    width = np.maximum(np.sort(far, axis=1)[:, knn - 1 : knn], 1e-12)
    graph.data = np.exp(-((far / width) ** decay)).ravel()
    graph = graph + graph.T + 2 * sp.eye(adata.n_obs)
    graph = sp.diags(1 / np.asarray(graph.sum(1)).ravel()) @ graph
    filled = log.values.toarray()
    for _ in range(t):
        filled = graph @ filled
    config = {"knn": knn, "decay": decay, "t": t, "n_pca": n_pca}
    return _done(adata, log, filled, keep_observed, "diffusion", seed, **config)


def alra(
    adata: AnnData,
    *,
    rank: int | None = None,
    target_sum: float | None = None,
    keep_observed: bool = True,
    seed: int = 0,
) -> AnnData:
    """Fill with a low-rank approximation that may leave zeros (ALRA, 2022).

    A zero should come out near 0, as often below as above. So values of a gene up to
    the size of its 0.1 % quantile become 0. The others are scaled to the mean and
    standard deviation of the gene's observed non-zeros.

    Parameters
    ----------
    rank
        Singular values kept, 1 to 100. None looks at the gaps between the first 100:
        it keeps up to the last gap that lies six standard deviations above the mean
        of the last fifth of them, which are taken to be noise. With not many more
        than 100 cells or genes this rule keeps far too many: look at the rank found.
    seed
        Seed of the random projections.
    """
    log = _begin(adata, target_sum)
    most = min(100, min(adata.shape) - 1)
    if rank is not None and not 1 <= rank <= most:
        raise ConfigError(message("rank", found=rank, allowed=f"1 to {most}"))
    if most < 1:
        raise DataError(message("ALRA needs two cells and two genes", found=most + 1))
    u, s, v = randomized_svd(log.values, rank or most, n_iter=10, random_state=seed)
    if rank is None:
        gaps = np.append(np.inf, -np.diff(s))  # never below one
        noise = gaps[-max(2, most // 5) :]
        far = (
            gaps > noise.mean() + 6 * noise.std(ddof=1) if most > 2 else gaps == np.inf
        )
        rank = max(1, int(np.flatnonzero(far)[-1]))
    filled = (u[:, :rank] * s[:rank]) @ v[:rank]
    filled[filled <= np.abs(np.quantile(filled, 0.001, axis=0))] = 0
    kept = filled > 0
    mean, seen = _seen_mean(log.values)
    spread = _spread(log.values.power(2).sum(0), mean, seen)
    n = kept.sum(0)
    mean_now = filled.sum(0) / np.maximum(n, 1)
    spread_now = _spread((filled**2).sum(0), mean_now, n)
    known = (spread > 0) & (spread_now > 0)
    factor = np.where(known, spread / np.where(known, spread_now, 1), 1)
    offset = np.where(known, mean - factor * mean_now, 0)
    filled = np.where(kept, filled * factor + offset, 0)
    return _done(adata, log, filled, keep_observed, "ALRA", seed, rank=rank)


def nb_autoencoder(
    adata: AnnData,
    *,
    hidden: tuple[int, ...] = (64, 32, 64),
    lr: float = 1e-3,
    batch_size: int = 64,
    max_epochs: int = 300,
    patience: int = 15,
    target_sum: float | None = None,
    keep_observed: bool = True,
    seed: int = 0,
) -> AnnData:
    """Fill with the mean of a negative-binomial auto-encoder (after DCA, 2019).

    count ~ NB(mean = size factor x exp(decoder), one dispersion per gene). The size
    factor is the cell's total over the median. A tenth of the cells is held out;
    training stops when their loss has not fallen for `patience` epochs, and the best
    weights are used. Torch's own random state is left as it was.

    Parameters
    ----------
    hidden
        Widths of the hidden layers.
    lr, batch_size, max_epochs, patience
        Adam's learning rate, cells of a step, and when to stop.
    seed
        Seed of weights, held-out cells and batches.
    """
    import torch

    from scgenlib import nets, training

    log = _begin(adata, target_sum)
    if adata.n_obs < 10:
        raise DataError(message("An auto-encoder needs ten cells", found=adata.n_obs))
    counts = sp.csr_matrix(adata.layers["counts"], dtype=np.float32)
    middle = np.median(log.totals[log.totals > 0])
    size = torch.tensor(log.totals / middle, dtype=torch.float32)[:, None]
    # Inputs do not depend on the target, and have mean 0 and spread 1 per gene.
    inputs = normalise(counts, middle)
    mean = np.asarray(inputs.mean(0)).ravel()
    spread = _spread(inputs.power(2).sum(0), mean, np.full(mean.shape, len(size)))
    shift, scale = torch.tensor(mean).float(), torch.tensor(spread).float().clamp(0.1)
    rng = np.random.default_rng(seed)
    held, fitted = np.split(rng.permutation(adata.n_obs), [adata.n_obs // 10])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nets.mlp([adata.n_vars, *hidden, adata.n_vars])
        share = torch.tensor(counts.sum(0) / log.totals.sum() * middle)
        with torch.no_grad():  # start from the gene means
            list(net.parameters())[-1].copy_(share.ravel().clamp(1e-5).log())
        log_theta = torch.nn.Parameter(torch.zeros(adata.n_vars))
        weights = [*net.parameters(), log_theta]
        optimiser = training.adam(weights, lr)

        def rate(rows: np.ndarray) -> torch.Tensor:
            """Return the log mean counts of cells of size factor 1."""
            x = (training.minibatch(inputs, rows) - shift) / scale
            return net(x.clamp(-10, 10)).clamp(-15, 15)

        def loss(rows: np.ndarray) -> torch.Tensor:
            mean = size[rows] * rate(rows).exp()
            return _nb_loss(training.minibatch(counts, rows), mean, log_theta)

        best, since, epoch = np.inf, 0, 0
        kept = [w.detach().clone() for w in weights]
        while epoch < max_epochs and since < patience:
            order = rng.permutation(fitted)
            for first in range(0, len(order), batch_size):
                optimiser.zero_grad()
                loss(order[first : first + batch_size]).backward()
                optimiser.step()
            with torch.no_grad():
                value = float(loss(held))
            epoch, since = epoch + 1, since + 1
            if value < best - 1e-5:
                best, since = value, 0
                kept = [w.detach().clone() for w in weights]
        with torch.no_grad():
            for weight, good in zip(weights, kept, strict=True):
                weight.copy_(good)
            means = rate(np.arange(adata.n_obs)).exp().numpy()
    filled = np.log1p(means * (log.target / middle))
    config = {"hidden": hidden, "lr": lr, "batch_size": batch_size, "epochs": epoch}
    return _done(adata, log, filled, keep_observed, "NB auto-encoder", seed, **config)


def _nb_loss(y: Any, mean: Any, log_theta: Any) -> Any:
    """Negative log likelihood of counts per entry, less ln(y!), which is a constant.

    The variance of a count is mean + mean ** 2 / theta.
    """
    import torch

    theta = log_theta.exp()
    found = torch.lgamma(theta) - torch.lgamma(y + theta) - theta * log_theta
    found = found + (y + theta) * torch.log(theta + mean + 1e-8)
    return (found - y * torch.log(mean + 1e-8)).mean()


def _begin(adata: AnnData, target_sum: float | None) -> LogCounts:
    """Return the log counts, having refused what would not fit."""
    check_size(adata.shape)
    return log_counts(adata, target_sum)


def _check_k(name: str, k: int, n: int) -> None:
    if not 1 <= k < n:
        allowed = f"1 to {n - 1}, one fewer than the cells"
        raise ConfigError(message(name, found=k, allowed=allowed))


def _seen_mean(values: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of each gene's non-zeros (0 without any), and their number."""
    seen = np.bincount(values.indices, minlength=values.shape[1])
    total = np.bincount(values.indices, values.data, values.shape[1])
    return total / np.maximum(seen, 1), seen


def _spread(square: Any, mean: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Return the standard deviation, divisor n - 1, from a sum of squares."""
    left = np.asarray(square).ravel() - n * mean**2
    return np.sqrt(np.maximum(left, 0) / np.maximum(n - 1, 1))


def _done(
    adata: AnnData,
    log: LogCounts,
    filled: np.ndarray,
    keep_observed: bool,
    method: str,
    seed: int = 0,
    **config: Any,
) -> AnnData:
    """Return the completed cells with where they come from."""
    from scgenlib.estimator import data_hash  # brings torch, which is slow to load

    values = np.maximum(filled, 0).astype(np.float32)
    if keep_observed:
        values = assemble(log.values, filled)
    about = {
        "method": f"baseline: {method}",
        "scgenlib": scgenlib.__version__,
        "config": json.dumps({**config, "keep_observed": keep_observed}),
        "seed": seed,
        "data_hash": data_hash(adata),
        "n_training_cells": adata.n_obs,
    }
    return completed(adata, values, log, about, keep_observed=keep_observed)
