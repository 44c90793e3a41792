"""Split cells into training and held-out ones, and name the rare types.

Nothing here knows a model; `scgenlib.preprocess` offers these functions too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.errors import ConfigError, DataError, message, unknown

__all__ = ["hide_entries", "rare_types", "split", "train_valid_test"]


def split(
    adata: ad.AnnData,
    *,
    label_key: str = "cell_type",
    test_size: float = 0.3,
    seed: int = 0,
    stratify: bool = True,
) -> tuple[ad.AnnData, ad.AnnData]:
    """Split cells into training and held-out cells.

    Parameters
    ----------
    adata
        All cells.
    label_key
        Column of cell types, used when `stratify` is true.
    test_size
        Share of held-out cells, strictly between 0 and 1.
    seed
        The same seed gives the same split.
    stratify
        Take this share of every type. A type with two or more cells is then on both
        sides; a type with one cell stays in training.

    Returns
    -------
    tuple of AnnData
        Training and held-out cells: copies, cells in their original order.

    Raises
    ------
    ConfigError
        If `test_size` is not between 0 and 1.
    DataError
        If the label column is absent, or a side would be empty.
    """
    if not 0 < test_size < 1:
        raise ConfigError(
            message(
                "test_size is out of range",
                found=test_size,
                allowed="a share strictly between 0 and 1",
            )
        )
    rng = np.random.default_rng(seed)
    groups = [np.arange(adata.n_obs)]
    if stratify:
        if label_key not in adata.obs:
            raise unknown("label column", label_key, adata.obs.columns, error=DataError)
        labels = adata.obs[label_key].astype(str).to_numpy()
        groups = [np.flatnonzero(labels == name) for name in np.unique(labels)]
    held_out = np.zeros(adata.n_obs, dtype=bool)
    for cells in groups:
        if len(cells) >= 2:
            n_test = min(max(round(test_size * len(cells)), 1), len(cells) - 1)
            held_out[rng.permutation(cells)[:n_test]] = True
    if not held_out.any():
        raise DataError(
            message(
                "No cell can be held out: every type has one cell",
                found=f"{adata.n_obs} cells",
                allowed="at least one type with two or more cells",
            )
        )
    return adata[~held_out].copy(), adata[held_out].copy()


def train_valid_test(
    adata: ad.AnnData,
    valid_cells: int,
    test_cells: int = 0,
    *,
    label_key: str | None = "cell_type",
    seed: int = 0,
) -> ad.AnnData:
    """Mark each cell as train, valid or test, in numbers and not in shares.

    Parameters
    ----------
    adata
        All cells.
    valid_cells, test_cells
        Cells to set aside.
    label_key
        Take from each type its share of these, rounded down; the sizes are then a
        little smaller than asked for. None draws from all cells alike.
    seed
        The same seed gives the same split.

    Returns
    -------
    AnnData
        A copy with ``obs["split"]``, and the sizes asked for and found in
        ``uns["split"]``.

    Raises
    ------
    ConfigError
        A number is negative, or no cell would be left to train on.
    DataError
        The label column is absent.
    """
    n = adata.n_obs
    if min(valid_cells, test_cells) < 0 or valid_cells + test_cells >= n:
        raise ConfigError(
            message(
                "valid_cells and test_cells are off",
                found=f"{valid_cells} and {test_cells}",
                allowed=f"0 or more, together fewer than the {n} cells",
            )
        )
    if label_key is not None and label_key not in adata.obs:
        raise unknown("label column", label_key, adata.obs.columns, error=DataError)
    groups = [np.arange(n)]
    if label_key is not None:
        labels = adata.obs[label_key].astype(str).to_numpy()
        groups = [np.flatnonzero(labels == name) for name in np.unique(labels)]
    rng = np.random.default_rng(seed)
    side = np.full(n, "train", dtype=object)
    for cells in groups:
        order = rng.permutation(cells)
        # Whole numbers throughout: 0.15 x 2000 must not become 299.
        n_test = test_cells * len(cells) // n
        n_valid = valid_cells * len(cells) // n
        side[order[:n_test]] = "test"
        side[order[n_test : n_test + n_valid]] = "valid"
    out = adata.copy()
    out.obs["split"] = pd.Categorical(side, ["train", "valid", "test"])
    found = out.obs["split"].value_counts()
    out.uns["split"] = {
        "asked": {"valid": valid_cells, "test": test_cells},
        "found": {name: int(found[name]) for name in ("train", "valid", "test")},
        "seed": seed,
        "by_type": label_key is not None,
    }
    return out


def hide_entries(adata: ad.AnnData, share: float = 0.1, seed: int = 0) -> ad.AnnData:
    """Set some observed counts to 0, so that their true values are known.

    Parameters
    ----------
    adata
        Cells with ``layers["counts"]``. Not changed.
    share
        Share of the observed entries to hide, strictly between 0 and 1. A cell keeps
        at least one.
    seed
        The same seed hides the same entries.

    Returns
    -------
    AnnData
        A copy: counts and X without the hidden entries, X scaled to the card's total
        (10,000 without one), ``layers["true_counts"]`` as the counts were (in place of
        such a layer), and ``layers["hidden"]``, True where an entry was hidden. Other
        layers and ``raw`` are left and may still hold what is hidden.

    Raises
    ------
    ConfigError
        `share` is not between 0 and 1.
    DataError
        There are no counts.
    """
    from scgenlib.contract import card_of
    from scgenlib.preprocess import normalise  # which offers this function too

    if not 0 < share < 1:
        allowed = "a share strictly between 0 and 1"
        raise ConfigError(message("share", found=share, allowed=allowed))
    if "counts" not in adata.layers:
        do = "Use data with counts."
        raise DataError(message("Only counts can be hidden", found="none", do=do))
    full = sp.csr_matrix(adata.layers["counts"], dtype=np.float32, copy=True)
    full.eliminate_zeros()
    rng = np.random.default_rng(seed)
    lost = rng.random(full.nnz) < share
    sizes = np.diff(full.indptr)
    cell = np.repeat(np.arange(full.shape[0]), sizes)
    emptied = (np.bincount(cell, lost, len(sizes)) == sizes) & (sizes > 0)
    lost[full.indptr[:-1][emptied]] = False
    seen, hidden = full.copy(), full.astype(bool)
    seen.data[lost] = 0
    seen.eliminate_zeros()
    hidden.data = lost
    hidden.eliminate_zeros()
    out = adata.copy()
    out.layers.update(counts=seen, true_counts=full, hidden=hidden)
    recipe = card_of(adata).get("recipe", {})
    out.X = normalise(seen, recipe.get("target_sum", 1e4))
    return out


def rare_types(
    labels: Iterable[Any], threshold: int | None = None, rule: str = "<"
) -> list[str]:
    """Name the rare cell types, rarest first.

    Parameters
    ----------
    labels
        One cell type per cell.
    threshold
        Types with fewer cells than this are rare. None: the smallest type (all of
        them if several are equally small) and any type under 5 % of the cells.
    rule
        "<" or "<=": whether a type of exactly `threshold` cells is rare.

    Returns
    -------
    list of str
        Never empty.

    Raises
    ------
    ConfigError
        If `rule` is neither "<" nor "<=".
    DataError
        If no type is rare under the threshold.
    """
    if rule not in ("<", "<="):
        raise unknown("rule", rule, ["<", "<="])
    values = labels if isinstance(labels, pd.Series) else pd.Series(list(labels))
    sizes = values.astype(str).value_counts()
    sizes = sizes.iloc[np.lexsort((sizes.index, sizes.to_numpy()))]
    if threshold is None:
        rare = (sizes == sizes.min()) | (sizes < 0.05 * sizes.sum())
    else:
        rare = sizes < threshold if rule == "<" else sizes <= threshold
    if not rare.any():
        raise DataError(
            message(
                f"No cell type is rare: none has a count {rule} {threshold}",
                found=f"the smallest is {sizes.index[0]!r} with {sizes.iloc[0]} cells",
                allowed=f"a threshold of {sizes.iloc[0] + 1} or more, or None for the"
                " smallest type and any under 5 %",
            )
        )
    return [str(name) for name in sizes.index[rare]]
