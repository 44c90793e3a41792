"""Cells whose truth is known, and a dial for each assumption that a method makes.

The model of one cell c of type k and gene g:

    weight   w[c, g]  = abundance[g] * fold[k, g] * exp(s * e[c, g] - s**2 / 2)
    mean     mu[c, g] = depth[c] * w[c, g] / sum_g w[c, g]
    counts   y[c, g] ~ Poisson(mu[c, g] * Gamma(mean 1, variance dispersion))
    dropout  y[c, g] becomes 0 with probability p[k, g]

`e` has unit variance and is not zero only in the genes of the type's programme.
Cells are drawn in blocks, so that counts stay sparse at any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import rankdata

from scgenlib.errors import ConfigError, message
from scgenlib.preprocess import normalise

__all__ = ["blobs", "simulate", "simulate_like"]

_TARGET_SUM = 1e4
_BLOCK = 256
# Relative sizes of the common types; the rare type comes on top.
_COMMON = {"A": 0.30, "B": 0.24, "C": 0.19, "D": 0.15, "E": 0.12}
_PROGRAMME_SD = 0.7
_DISPERSION = 0.25
# A layer of true means is dense: it is left out above this size.
_TRUTH_BYTES = 200e6


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(
            message(
                f"{name} is out of range", found=value, allowed=f"{low:g} to {high:g}"
            )
        )


def _default_sizes(n_cells: int, rare_fraction: float) -> dict[str, int]:
    """Split `n_cells` over five common types and one rare type."""
    rare = round(rare_fraction * n_cells)
    sizes = {name: int(share * (n_cells - rare)) for name, share in _COMMON.items()}
    sizes["A"] += n_cells - rare - sum(sizes.values())
    if rare:
        sizes["rare"] = rare
    return sizes


def _dropout_table(mean: np.ndarray, dropout: float, slope: float) -> np.ndarray:
    """Return the dropout probability of each type and gene, on average `dropout`.

    The log odds fall with the rank of the mean expression by 6 * `slope`; the offset
    that keeps the average is found by root search.
    """
    if dropout in (0.0, 1.0):
        return np.full(mean.shape, dropout)
    rank = rankdata(mean, axis=None).reshape(mean.shape) / mean.size - 0.5
    tilt = -6.0 * slope * rank
    offset = brentq(lambda a: expit(a + tilt).mean() - dropout, -50.0, 50.0)
    return expit(offset + tilt)


def _annotate(
    adata: ad.AnnData, name: str, title: str, truth: dict[str, Any], **card: Any
) -> ad.AnnData:
    """Add the data set card of simulated cells."""
    labels = adata.obs["cell_type"].value_counts()
    adata.uns["dataset"] = {
        "name": name,
        "title": title,
        "citation": "simulated by scgenlib",
        "source": "scgenlib.simulate",
        "sha256": None,
        "licence": "BSD-3-Clause",
        "organism": "none (simulated)",
        "value_scale": "counts",
        "recipe": {
            "target_sum": _TARGET_SUM,
            "gene_filter": {"min_cells_fraction": 0.0, "min_value": 0.0},
        },
        "rare_threshold": None,
        "n_cells": adata.n_obs,
        "n_genes": adata.n_vars,
        "label_counts": {str(k): int(v) for k, v in labels.items()},
        "simulated": True,
        "verified": True,
        "genes_preselected": False,
        "tasks": [],
        "notes": "",
        **card,
        "truth": truth,
    }
    return adata


def simulate(
    n_cells: int = 2000,
    n_genes: int = 500,
    type_sizes: Mapping[str, int] | None = None,
    *,
    rare_fraction: float = 0.03,
    depth_mean: float = 2000.0,
    depth_sd: float | None = None,
    marker_fraction: float = 0.05,
    programmes: float = 0.5,
    dropout: float = 0.0,
    dropout_slope: float = 0.0,
    seed: int = 0,
    name: str = "simulated",
) -> ad.AnnData:
    """Draw cells from a gamma-Poisson model with known truth.

    Parameters
    ----------
    n_cells, n_genes
        Size of the matrix. `n_cells` is ignored when `type_sizes` is given.
    type_sizes
        Cells per type. None: five common types and "rare".
    rare_fraction
        Share of the rare type, used only without `type_sizes`.
    depth_mean, depth_sd
        Mean and standard deviation of the cells' totals before dropout (log-normal).
        `depth_sd` None is 0.4 times the mean.
    marker_fraction
        Share of all genes that are markers of each type (at least one; types share
        the genes equally if there are too few). Markers are raised four- to
        twenty-fold.
    programmes
        0 to 1: the correlation, on the log scale, of the programme genes within a
        type. Each gene's own spread is the same at every setting.
    dropout
        0 to 1: the average probability, over types and genes, that a count is lost.
    dropout_slope
        -1 to 1: above 0, dropout falls with expression; below 0, it rises; at 0, it
        is blind to expression.
    seed
        The same seed gives the same cells.
    name
        Name on the data set card.

    Returns
    -------
    AnnData
        Cells x genes under the data contract, cells in random order, with
        `layers["true_counts"]` before dropout, `layers["true_expression"]` the mean
        mu (left out above 200 MB, because it is dense), `obs["depth"]`,
        `obs["programme_activity"]` (the shared factor of the cell's programme),
        `var["marker_of"]`, `var["programme"]` (type name or ""), and
        `varm["dropout_probability"]` (genes x types, types sorted by name).

    Raises
    ------
    ConfigError
        If a size or dial is out of range.
    """
    for label, value, low in (
        ("rare_fraction", rare_fraction, 0.0),
        ("programmes", programmes, 0.0),
        ("dropout", dropout, 0.0),
        ("marker_fraction", marker_fraction, 0.0),
        ("dropout_slope", dropout_slope, -1.0),
    ):
        _check_range(label, value, low, 1.0)
    sizes = dict(type_sizes or _default_sizes(n_cells, rare_fraction))
    if min(sizes.values()) < 1 or n_genes < len(sizes) or depth_mean <= 0:
        raise ConfigError(
            message(
                "The simulation is too small",
                found=f"type sizes {sizes}, {n_genes} genes, depth {depth_mean:g}",
                allowed="at least one cell a type, one gene a type, depth above 0",
            )
        )
    rng = np.random.default_rng(seed)
    types = sorted(sizes)
    n_types, n_cells = len(types), sum(sizes.values())
    kind = rng.permutation(np.repeat(np.arange(n_types), [sizes[t] for t in types]))

    abundance = rng.lognormal(0.0, 1.2, n_genes)
    # Disjoint genes: first the markers of each type, then its programme.
    n_each = max(1, min(int(marker_fraction * n_genes), n_genes // (2 * n_types)))
    order = rng.permutation(n_genes)
    markers = order[: n_types * n_each].reshape(n_types, n_each)
    rest = order[n_types * n_each :]
    n_prog = min(n_each, len(rest) // n_types)
    members = rest[: n_types * n_prog].reshape(n_types, n_prog)
    profile = np.tile(abundance, (n_types, 1))
    fold = np.exp(rng.uniform(np.log(4.0), np.log(20.0), markers.shape))
    np.put_along_axis(
        profile, markers, np.take_along_axis(profile, markers, 1) * fold, 1
    )
    # Programme genes must be seen to co-vary: they start at the upper quartile.
    profile[:, members.ravel()] = np.quantile(abundance, 0.75)

    depth_sd = 0.4 * depth_mean if depth_sd is None else depth_sd
    log_var = np.log1p((depth_sd / depth_mean) ** 2)
    depth = rng.lognormal(np.log(depth_mean) - log_var / 2, np.sqrt(log_var), n_cells)
    activity = rng.standard_normal(n_cells)

    expected = depth_mean * profile / profile.sum(1, keepdims=True)
    p_drop = _dropout_table(expected, dropout, dropout_slope)
    keep_truth = 4.0 * n_cells * n_genes <= _TRUTH_BYTES
    truth = np.empty((n_cells if keep_truth else 0, n_genes), np.float32)
    full_blocks, seen_blocks = [], []
    for start in range(0, n_cells, _BLOCK):
        rows = slice(start, min(start + _BLOCK, n_cells))
        k = kind[rows]
        own = rng.standard_normal((len(k), n_prog))
        factor = np.sqrt(programmes) * activity[rows, None]
        factor = factor + np.sqrt(1.0 - programmes) * own
        mu = profile[k]
        cells = np.arange(len(k))[:, None]
        mu[cells, members[k]] *= np.exp(_PROGRAMME_SD * factor - _PROGRAMME_SD**2 / 2)
        mu *= (depth[rows] / mu.sum(1))[:, None]
        if keep_truth:
            truth[rows] = mu
        noise = rng.standard_gamma(1.0 / _DISPERSION, mu.shape, dtype=np.float32)
        full = sp.csr_matrix(rng.poisson(mu * noise * _DISPERSION).astype(np.float32))
        full_blocks.append(full)
        if dropout:
            seen = full.tocoo()
            kept = rng.random(seen.nnz) >= p_drop[k[seen.row], seen.col]
            seen_blocks.append(
                sp.csr_matrix(
                    (seen.data[kept], (seen.row[kept], seen.col[kept])), full.shape
                )
            )
    true_counts = sp.vstack(full_blocks, format="csr")
    counts = sp.vstack(seen_blocks, format="csr") if dropout else true_counts.copy()
    _refill_empty(counts, true_counts, expected, kind, rng)

    width = len(str(n_genes))
    marker_of = np.full(n_genes, "", dtype=object)
    programme = np.full(n_genes, "", dtype=object)
    for i, label in enumerate(types):
        marker_of[markers[i]] = label
        programme[members[i]] = label
    adata = ad.AnnData(
        normalise(counts, _TARGET_SUM),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical(np.array(types)[kind]),
                "depth": depth,
                "programme_activity": activity,
            },
            index=[f"cell{i + 1:0{len(str(n_cells))}d}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(
            {"marker_of": marker_of, "programme": programme},
            index=[f"gene{i + 1:0{width}d}" for i in range(n_genes)],
        ),
        layers={"counts": counts, "true_counts": true_counts},
    )
    if keep_truth:
        adata.layers["true_expression"] = truth
    adata.varm["dropout_probability"] = p_drop.T.copy()
    dials = {
        "programmes": programmes,
        "dropout": dropout,
        "dropout_slope": dropout_slope,
        "seed": seed,
    }
    return _annotate(
        adata,
        name,
        "Simulated cells with known truth (gamma-Poisson)",
        dials,
        depth={"mean": float(depth_mean), "sd": float(depth_sd)},
    )


def _refill_empty(
    counts: sp.csr_matrix,
    true_counts: sp.csr_matrix,
    expected: np.ndarray,
    kind: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Give a cell without any count one molecule: a cell that is seen has some."""
    for layer in (true_counts, counts):
        empty = np.flatnonzero(np.diff(layer.indptr) == 0)
        if not len(empty):
            continue
        rows = layer.tolil()
        for cell in empty:
            known = true_counts[cell].indices
            p = expected[kind[cell]] / expected[kind[cell]].sum()
            gene = known[0] if len(known) else rng.choice(len(p), p=p)
            rows[cell, gene] = max(float(true_counts[cell, gene]), 1.0)
        filled = rows.tocsr()
        layer.data, layer.indices, layer.indptr = (
            filled.data.astype(np.float32),
            filled.indices,
            filled.indptr,
        )


def simulate_like(card: Mapping[str, Any], seed: int = 0) -> ad.AnnData:
    """Draw simulated cells at the size of a real data set.

    Parameters
    ----------
    card
        A data set card: `label_counts`, `n_genes`, `depth` (mean and sd; None where
        unknown, then `simulate`'s defaults are used), `rare_threshold`, `tasks`.
    seed
        The same seed gives the same cells.

    Returns
    -------
    AnnData
        As `simulate`. The name is "simulated:<name>" and the card says that no cell
        is real: genes, markers and expression levels are invented.
    """
    depth = card.get("depth") or {}
    known = depth.get("mean") is not None
    adata = simulate(
        n_genes=int(card["n_genes"]),
        type_sizes={str(k): int(v) for k, v in card["label_counts"].items()},
        depth_mean=float(depth["mean"]) if known else 2000.0,
        depth_sd=float(depth["sd"]) if known and depth.get("sd") is not None else None,
        marker_fraction=0.02,
        seed=seed,
        name=f"simulated:{card['name']}",
    )
    adata.uns["dataset"] |= {
        "title": f"Simulated cells at the size of {card['name']}; none is real",
        "rare_threshold": card.get("rare_threshold"),
        "tasks": [*card.get("tasks", [])],
        "notes": f"Label counts, {'depth' if known else 'not the depth (unknown)'} and"
        f" size follow the card of {card['name']}; all else is invented.",
    }
    return adata


def blobs(
    n_cells: int = 1000, *, rare_fraction: float = 0.03, sd: float = 0.25, seed: int = 0
) -> ad.AnnData:
    """Draw points in the plane: five Gaussian blobs and a rare one.

    The five common blobs lie on a circle of radius 3; the rare blob lies outside it,
    at radius 5 between two of them.

    Parameters
    ----------
    n_cells
        Number of points.
    rare_fraction
        Share of the rare blob, 0 to 1.
    sd
        Standard deviation of every blob along each axis.
    seed
        The same seed gives the same points.

    Returns
    -------
    AnnData
        Points x (x, y). X holds coordinates, not expression, and may be negative;
        `uns["dataset"]["value_scale"]` is "coordinates". `uns["centres"]` has the
        true centres, rows as the sorted types.
    """
    _check_range("rare_fraction", rare_fraction, 0.0, 1.0)
    rng = np.random.default_rng(seed)
    rare = round(rare_fraction * n_cells)
    common = np.full(5, (n_cells - rare) // 5)
    common[: n_cells - rare - common.sum()] += 1
    angle = 2 * np.pi * np.arange(5) / 5
    centres = 3.0 * np.column_stack([np.cos(angle), np.sin(angle)])
    rare_at = 5.0 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    centres = np.vstack([centres, rare_at])
    kind = rng.permutation(np.repeat(np.arange(6), [*common, rare]))
    points = centres[kind] + sd * rng.standard_normal((n_cells, 2))
    types = [*_COMMON, "rare"]
    adata = ad.AnnData(
        sp.csr_matrix(points.astype(np.float32)),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(np.array(types)[kind])},
            index=[f"point{i + 1:0{len(str(n_cells))}d}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=["x", "y"]),
    )
    adata.uns["centres"] = centres
    return _annotate(
        adata,
        "blobs",
        "Six blobs in the plane, one of them rare",
        {"sd": sd, "seed": seed},
        value_scale="coordinates",
    )
