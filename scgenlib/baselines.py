"""The simple generators that every deep model must beat.

Each takes real training cells and returns AnnData under the same contract as a
model's `generate`: log1p values, at least 0, the same genes, `obs['cell_type']`,
provenance in `uns['scgenlib']` under a model's keys. With `label` only cells of
that type are used. The simple imputers are offered here too (`scgenlib.imputers`).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from sklearn.neighbors import NearestNeighbors

import scgenlib
from scgenlib._matrix import fit_pca
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.imputers import (
    alra,
    diffusion,
    gene_mean,
    knn_smoothing,
    nb_autoencoder,
    none,
    type_mean,
)

__all__ = [
    "alra",
    "copy_cells",
    "diffusion",
    "gene_mean",
    "jitter",
    "knn_smoothing",
    "nb_autoencoder",
    "negative_binomial",
    "none",
    "pc_gaussian",
    "shuffle_genes",
    "smote",
    "type_mean",
]


def copy_cells(
    train: AnnData,
    n: int,
    *,
    seed: int = 0,
    label: str | None = None,
    label_key: str = "cell_type",
) -> AnnData:
    """Return training cells unchanged: perfect in every way but being new.

    Parameters
    ----------
    train
        Real cells x genes with labels.
    n
        Cells to return; with more than there are, cells repeat.
    seed
        Seed of the draw.
    label
        Only cells of this type; None takes all.
    label_key
        Column of `train.obs` with the type.
    """
    rng, pool, types = _begin(train, n, seed, label, label_key)
    rows = _draw(rng, pool.shape[0], n)
    return _cells(train, pool[rows], types[rows], "copy", label_key, seed, label=label)


def jitter(
    train: AnnData,
    n: int,
    *,
    sd: float = 0.25,
    seed: int = 0,
    label: str | None = None,
    label_key: str = "cell_type",
) -> AnnData:
    """Return training cells with Gaussian noise on the genes that they express.

    Zeros stay zero; a value that noise would make negative becomes zero.

    Parameters
    ----------
    train, n, seed, label, label_key
        As in `copy_cells`.
    sd
        Standard deviation of the noise, in log1p units; at least 0.
    """
    if not sd >= 0:
        raise ConfigError(message("The noise", found=sd, allowed="at least 0"))
    rng, pool, types = _begin(train, n, seed, label, label_key)
    rows = _draw(rng, pool.shape[0], n)
    values = pool[rows].copy()
    noise = rng.normal(0, sd, len(values.data)).astype(np.float32)
    values.data = np.maximum(values.data + noise, 0)
    values.eliminate_zeros()
    about = {"label": label, "sd": sd}
    return _cells(train, values, types[rows], "jitter", label_key, seed, **about)


def smote(
    train: AnnData,
    n: int,
    k: int = 5,
    *,
    n_pcs: int | None = None,
    seed: int = 0,
    label: str | None = None,
    label_key: str = "cell_type",
) -> AnnData:
    """Return points between a cell and one of its neighbours of the same type.

    x + u (x' - x) with u uniform on [0, 1] and x' one of the k nearest cells of
    the type of x (Chawla et al., 2002). A type of fewer than k + 1 cells uses all
    its other cells; a type of one cell is copied.

    Parameters
    ----------
    train, n, seed, label, label_key
        As in `copy_cells`. Without `label`, types come in the training shares.
    k
        Neighbours to choose from; at least 1.
    n_pcs
        Look for neighbours in this many principal components of all cells of
        `train`; None looks in the genes. Points lie between cells either way.
    """
    if k < 1:
        raise ConfigError(message("SMOTE's neighbours", found=k, allowed="at least 1"))
    rng, pool, types = _begin(train, n, seed, label, label_key)
    rows = _draw(rng, pool.shape[0], n)
    place = (lambda x: x) if n_pcs is None else fit_pca(train.X, n_pcs, seed).transform
    mates = rows.copy()
    for name in np.unique(types[rows]):
        members = np.flatnonzero(types == name)
        near = min(k, len(members) - 1)
        if near == 0:
            continue
        search = NearestNeighbors(n_neighbors=near, algorithm="brute")
        table = search.fit(place(pool[members])).kneighbors(return_distance=False)
        chosen = np.flatnonzero(types[rows] == name)
        at = np.searchsorted(members, rows[chosen])
        mates[chosen] = members[table[at, rng.integers(near, size=len(chosen))]]
    share = rng.random(n).astype(np.float32)
    values = sp.diags(1 - share) @ pool[rows] + sp.diags(share) @ pool[mates]
    about = {"label": label, "k": k, "n_pcs": n_pcs}
    return _cells(
        train, sp.csr_matrix(values), types[rows], "SMOTE", label_key, seed, **about
    )


def shuffle_genes(
    train: AnnData,
    n: int,
    *,
    seed: int = 0,
    label: str | None = None,
    label_key: str = "cell_type",
) -> AnnData:
    """Draw every gene on its own: its histogram stays, all relations go.

    For n equal to the number of training cells each gene is permuted over the
    cells. The type is permuted like a gene, so it says nothing about the cell.

    Parameters
    ----------
    train, n, seed, label, label_key
        As in `copy_cells`.
    """
    rng, pool, types = _begin(train, n, seed, label, label_key)
    columns = sp.csc_matrix(pool)
    width = max(1, 10_000_000 // max(n, pool.shape[0]))  # genes made dense at a time
    parts = []
    for first in range(0, pool.shape[1], width):
        block = columns[:, first : first + width].toarray()
        rounds = [rng.permuted(block, axis=0) for _ in range(-(-n // len(block)))]
        parts.append(sp.csc_matrix(np.concatenate(rounds)[:n]))
    values = sp.hstack(parts, "csr")
    types = types[_draw(rng, len(types), n)]
    return _cells(train, values, types, "shuffle", label_key, seed, label=label)


def pc_gaussian(
    train: AnnData,
    n: int,
    n_pcs: int = 50,
    *,
    seed: int = 0,
    label: str | None = None,
    label_key: str = "cell_type",
) -> AnnData:
    """Draw from one Gaussian per type in the space of principal components.

    Each Gaussian has the mean and the sample covariance of its type; draws are
    mapped back to genes, and negative values become zero.

    Parameters
    ----------
    train, n, seed, label, label_key
        As in `copy_cells`. Without `label`, types come in the training shares.
    n_pcs
        Principal components; at most one fewer than there are cells or genes.
    """
    rng, pool, types = _begin(train, n, seed, label, label_key)
    if n * pool.shape[1] * 4 > 1e9:
        raise DataError(
            message(
                "These cells would take more than 1 GB",
                found=n,
                do="Draw them in several calls with different seeds.",
            )
        )
    n_pcs = min(n_pcs, min(pool.shape) - 1)
    if n_pcs < 1:
        raise DataError(
            message(
                "A Gaussian needs two cells and two genes",
                found=f"{pool.shape[0]} cells and {pool.shape[1]} genes",
            )
        )
    pca = fit_pca(pool, n_pcs, seed)
    scores = pca.transform(pool)
    drawn = types[_draw(rng, len(types), n)]
    new = np.empty((n, n_pcs))
    for name in np.unique(drawn):
        own, rows = scores[types == name], np.flatnonzero(drawn == name)
        # Random weights on centred cells: exactly their sample covariance.
        weights = rng.normal(size=(len(rows), len(own))) / np.sqrt(max(len(own) - 1, 1))
        new[rows] = own.mean(0) + weights @ (own - own.mean(0))
    values = np.maximum(pca.inverse_transform(new), 0).astype(np.float32)
    about = {"label": label, "n_pcs": n_pcs}
    return _cells(train, values, drawn, "PC-Gaussian", label_key, seed, **about)


def negative_binomial(
    train: AnnData,
    n: int,
    *,
    seed: int = 0,
    label: str | None = None,
    label_key: str = "cell_type",
) -> AnnData:
    """Draw each gene of a type on its own, from a negative binomial of its counts.

    A new cell takes the depth of a training cell of its type. Gene g has the mean
    depth x (share of g in the type) and one dispersion per type, by moments. Within
    a type all relations between genes go, except through depth.

    Parameters
    ----------
    train, n, seed, label, label_key
        As in `copy_cells`; `train` needs ``layers["counts"]``.

    Raises
    ------
    DataError
        There are no counts, or a cell has none.
    """
    rng, pool, types = _begin(train, n, seed, label, label_key)
    if "counts" not in train.layers:
        do = "Use data with counts."
        raise DataError(message("A negative binomial is fitted to counts", do=do))
    kept = np.ones(train.n_obs, bool)
    if label is not None:
        kept = train.obs[label_key].astype(str).to_numpy() == label
    counts = sp.csr_matrix(train.layers["counts"][kept], dtype=np.float64)
    depth = np.asarray(counts.sum(axis=1)).ravel()
    if depth.min() == 0:
        raise DataError(message("Some cells have no counts", found=(depth == 0).sum()))
    # What one molecule is worth in X before the logarithm, cell by cell.
    worth = np.asarray(pool.expm1().sum(axis=1)).ravel() / depth
    rows = _draw(rng, len(types), n)
    drawn = types[rows]
    blocks, order = [], []
    for name in np.unique(drawn):
        own = types == name
        share, spread = _moments(counts[own], depth[own])
        mine = np.flatnonzero(drawn == name)
        for part in np.array_split(mine, -(-len(mine) * len(share) // 10_000_000)):
            mean = depth[rows[part], None] * share
            noise = rng.gamma(1 / spread, spread, mean.shape)
            new = sp.csr_matrix(rng.poisson(mean * noise), dtype=np.float32)
            blocks.append((sp.diags(worth[rows[part]]) @ new).log1p())
            order.append(part)
    back = np.argsort(np.concatenate(order))
    values = sp.vstack(blocks, "csr")[back].astype(np.float32)
    return _cells(train, values, drawn, "NB", label_key, seed, label=label)


def _moments(counts: sp.csr_matrix, depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each gene's share of the molecules, and its dispersion, at least 1e-3."""
    share = np.asarray(counts.sum(axis=0)).ravel() / depth.sum()
    square = np.asarray(counts.power(2).sum(axis=0)).ravel()
    cross = np.asarray(counts.T @ depth).ravel()
    left = square - 2 * share * cross + share**2 * (depth**2).sum()
    poisson, scale = share * depth.sum(), share**2 * (depth**2).sum()
    spread = np.divide(left - poisson, scale, out=np.zeros_like(left), where=scale > 0)
    return share, np.maximum(spread, 1e-3)


def _begin(
    train: AnnData, n: int, seed: int, label: str | None, label_key: str
) -> tuple[np.random.Generator, sp.csr_matrix, np.ndarray]:
    """Return random numbers, and values and types of the cells that may be used."""
    if n < 1:
        raise ConfigError(message("Cells to generate", found=n, allowed="at least 1"))
    if label_key not in train.obs:
        raise unknown("label column", label_key, train.obs.columns, error=DataError)
    types = train.obs[label_key].astype(str).to_numpy()
    rows = np.arange(train.n_obs) if label is None else np.flatnonzero(types == label)
    if len(rows) == 0:
        raise unknown("cell type", label, sorted(set(types)), error=DataError)
    values = sp.csr_matrix(train.X[rows], dtype=np.float32)
    if len(values.data) and values.data.min() < 0:
        raise DataError(
            message(
                "The baselines need log1p values",
                found=f"a value of {values.data.min():.3g}",
                allowed="at least 0",
            )
        )
    return np.random.default_rng(seed), values, types[rows]


def _draw(rng: np.random.Generator, size: int, n: int) -> np.ndarray:
    """Draw n of `size` positions; none repeats before all are used."""
    rounds = [rng.permutation(size) for _ in range(-(-n // size))]
    return np.concatenate(rounds)[:n]


def _cells(
    train: AnnData,
    values: np.ndarray | sp.csr_matrix,
    types: np.ndarray,
    method: str,
    label_key: str,
    seed: int,
    **config: Any,
) -> AnnData:
    from scgenlib.estimator import data_hash  # brings torch, which is slow to load

    names = [f"{method}-{i}" for i in range(len(types))]
    categories = sorted(train.obs[label_key].astype(str).unique())
    obs = pd.DataFrame(index=names)
    obs[label_key] = pd.Categorical(types, categories=categories)
    cells = AnnData(values, obs=obs, var=pd.DataFrame(index=train.var_names))
    cells.uns["scgenlib"] = {
        "method": f"baseline: {method}",
        "scgenlib": scgenlib.__version__,
        "config": json.dumps(config),
        "seed": seed,
        "data_hash": data_hash(train),
        "n_training_cells": train.n_obs,
    }
    return cells
