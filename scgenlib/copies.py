"""Say how near generated cells are to the cells that a model was trained on.

A fitted model keeps principal components of at most 5,000 training cells. Turned back
into genes they are blurred cells: with confidential data, treat a saved model as you
treat the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scgenlib._matrix import fit_pca, nearest, subsample

__all__ = ["remember", "report"]


#: Most training cells that a fitted model keeps.
MAX_CELLS = 5000


def remember(X: Any, seed: int = 0, *, n_pcs: int = 50) -> dict[str, Tensor]:
    """Return what `report` needs to know of the training cells.

    Parameters
    ----------
    X
        Training cells x genes, log1p values.
    seed
        Seed of the subsample and of the components.
    n_pcs
        Principal components.

    Returns
    -------
    dict
        float32 tensors for a fitted model's ``arrays_``.
    """
    few = subsample(X, MAX_CELLS, seed)
    pca = fit_pca(few, n_pcs, seed)
    crowd = np.asarray(pca.transform(few), dtype=np.float32)
    gaps = nearest(crowd, crowd, itself=True)[0] if len(crowd) > 1 else np.ones(1)
    usual = np.array([np.median(gaps), np.quantile(gaps, 0.01)], dtype=np.float32)
    kept = {
        "crowd": crowd,
        "crowd_axes": pca.components_.astype(np.float32),
        "crowd_mean": pca.mean_.astype(np.float32),
        "crowd_gaps": usual,
    }
    return {name: torch.from_numpy(np.array(a, order="C")) for name, a in kept.items()}


def report(
    X: Any, arrays: Mapping[str, Tensor], max_cells: int = 2000
) -> dict[str, float]:
    """Say how near cells are to the training cells that `remember` kept.

    Parameters
    ----------
    X
        Generated cells x genes, on the scale of `remember`.
    arrays
        Holds what `remember` returned.
    max_cells
        Larger sets are subsampled.

    Returns
    -------
    dict
        'distance_ratio': median distance to the nearest training cell over the same
        between training cells; towards 0 for copies. 'share_very_near': share of
        cells nearer to one than all but the nearest 1 % of training cells are to
        each other. 'n_cells', 'n_training_cells': how many were compared.
    """
    axes, mean = arrays["crowd_axes"].numpy(), arrays["crowd_mean"].numpy()
    crowd = arrays["crowd"].numpy()
    usual, small = arrays["crowd_gaps"].tolist()
    few = subsample(X, max_cells, 0)
    gaps = nearest(few @ axes.T - axes @ mean, crowd)[0]
    return {
        "distance_ratio": float(np.median(gaps)) / usual if usual else float("nan"),
        "share_very_near": float((gaps < small).mean()),
        "n_cells": int(few.shape[0]),
        "n_training_cells": len(crowd),
    }
