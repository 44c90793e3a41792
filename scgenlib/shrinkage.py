"""How much of a prediction for an unseen target has earned trust.

REGINA tries itself on targets that its own training leaves out. What sets predictions
apart from the mean change of the training is kept to the degree that it was right
there, and to none where that could be chance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from scgenlib.conditions import genes_of

__all__ = [
    "evidence",
    "kept_share",
    "prompted",
    "put_away",
    "share_of",
    "take_back",
    "target_folds",
]

#: One-sided 95 % bound of a normal distribution.
_BOUND = 1.645


def target_folds(
    names: Sequence[str], control: str | None, n_folds: int, seed: int
) -> list[list[str]]:
    """Split targets into parts; return the conditions that contain one of each part.

    Parameters
    ----------
    names
        Conditions.
    control
        What controls are called, see `conditions.genes_of`.
    n_folds
        Number of parts; below 2 there are none.
    seed
        Of the random order of the targets.

    Returns
    -------
    list of list of str
        No parts if one would have fewer than two targets, or would leave fewer than two
        conditions. A pair of targets of two parts stands in both.
    """
    genes = sorted({gene for name in names for gene in genes_of(name, control)})
    if n_folds < 2 or len(genes) < 2 * n_folds:
        return []
    order = np.random.default_rng(seed).permutation(genes)
    parts = [set(part) for part in np.array_split(order, n_folds)]
    folds = [[n for n in names if part & set(genes_of(n, control))] for part in parts]
    return folds if all(len(fold) < len(names) - 1 for fold in folds) else []


def evidence(made: Tensor, true: Tensor, own: Tensor, n_taught: int) -> Tensor:
    """Return what says, for conditions left out, whether their predictions were right.

    Parameters
    ----------
    made, true
        Predicted and true mean changes, (n_conditions, n_genes); those that taught
        come first.
    own
        Where a gene is a target of the condition itself, of bool. It is left out: that
        a target falls is known beforehand.
    n_taught
        How many conditions taught.

    Returns
    -------
    torch.Tensor
        (n_left_out, 2): the product of predicted and true deviation from the mean
        change of the conditions that taught, and the square of the predicted one.
    """
    made = (made - made[:n_taught].mean(0)).masked_fill(own, 0.0)[n_taught:]
    true = (true - true[:n_taught].mean(0))[n_taught:]
    return torch.stack([(made * true).sum(1), made.square().sum(1)], dim=1)


def kept_share(rows: Tensor) -> float:
    r"""Return the share of a deviation that unseen conditions keep, from 0 to 1.

    The share that would have been best for the conditions left out is
    :math:`\sum a_i / \sum b_i`. What is kept is the lower end of its one-sided 95 %
    interval, by the jackknife over conditions: one condition with a large effect must
    not speak for all.

    Parameters
    ----------
    rows
        See `evidence`, (n_left_out, 2).

    Returns
    -------
    float
        0 for fewer than three conditions, or where nothing was predicted.
    """
    a, b = rows.double().T
    n, total = len(a), float(b.sum())
    if n < 3 or not total > float(b.max()):
        return 0.0
    without = (a.sum() - a) / (b.sum() - b)
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return float((a.sum() / total - _BOUND * error).clamp(0.0, 1.0))


def prompted(tables: Mapping[str, Tensor]) -> Tensor:
    """Say which conditions have a prompt of their own, (n_conditions,) of bool.

    Parameters
    ----------
    tables
        See `pairs.dose_tables`.
    """
    return (tables["doses"] != 0).any(1) | (tables["learned"] != 0).any(1)


def share_of(
    genes: Collection[str],
    row: Mapping[str, Tensor],
    known: Collection[str],
    kept: float,
) -> float:
    """Return the share that one condition keeps.

    Parameters
    ----------
    genes
        Its targets.
    row
        Its `pairs.dose_tables`.
    known
        Targets of the training: with these alone, all is kept.
    kept
        What conditions with another target keep; they keep nothing if all that stands
        for their targets is the mean prompt.
    """
    if set(genes) <= set(known) or kept == 1.0:
        return 1.0
    return kept if bool(prompted(row)) else 0.0


def put_away(nets: Mapping[str, nn.Module], arrays: dict[str, Tensor]) -> None:
    """Keep weights among the arrays of a model, unless they are there already."""
    for key, value in nn.ModuleDict(nets).state_dict().items():
        arrays.setdefault(f"kept.{key}", value.detach().cpu().clone())


def take_back(nets: Mapping[str, nn.Module], arrays: dict[str, Tensor]) -> None:
    """Undo `put_away`."""
    kept = [key for key in arrays if key.startswith("kept.")]
    state = {key.removeprefix("kept."): arrays.pop(key) for key in kept}
    nn.ModuleDict(nets).load_state_dict(state)
