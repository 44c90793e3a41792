"""The data contract, checked in one place: by `datasets.load` and by every `fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.conditions import canonical
from scgenlib.errors import DataError, message, unknown
from scgenlib.preprocess import value_scale

__all__ = [
    "as_conditions",
    "as_labels",
    "card_of",
    "check_anndata",
    "check_counts",
    "check_labels",
    "check_shape",
    "check_values",
]

# What tells our card from anything else that a file may keep in its place.
_ON_EVERY_CARD = {"name", "value_scale", "recipe", "n_cells"}
_IN_A_FILE = " between adata = anndata.read_h5ad(path) and adata.write_h5ad(path)"


def card_of(adata: ad.AnnData) -> dict[str, Any]:
    """Return the card in `uns["dataset"]`, or {} if what is there is not a card."""
    found = adata.uns.get("dataset")
    is_card = isinstance(found, Mapping) and set(found) >= _ON_EVERY_CARD
    return dict(found) if is_card else {}


def as_labels(column: pd.Series) -> pd.Series:
    """Return a column as a categorical of strings; missing labels stay missing."""
    values = column.astype(object)
    numbers = column.dropna()
    if pd.api.types.is_float_dtype(column) and (numbers % 1 == 0).all():
        # Whole numbers beside a missing value are stored as floats: 1.0 is "1".
        values = column.astype("Int64").astype(object)
    return values.where(column.isna(), values.astype(str)).astype("category")


def as_conditions(column: pd.Series) -> pd.Series:
    """Return `as_labels` of a column of conditions, as "ctrl", "A" and "A+B".

    What cannot be the name of a condition is kept for `conditions` to refuse: only a
    method that reads conditions need care.
    """
    labels = as_labels(column)
    names = {}
    for label in labels.cat.categories:
        try:
            names[label] = canonical([label])[0]
        except DataError:
            names[label] = label
    return as_labels(labels.astype(object).map(names))


def check_anndata(
    adata: ad.AnnData,
    *,
    label_key: str | None = None,
    need_counts: bool = False,
    min_cells: int = 2,
    min_classes: int = 2,
) -> None:
    """Check the data contract.

    Parameters
    ----------
    adata
        Cells x genes, X log1p-normalised unless the card calls it coordinates. A
        gene without expression is allowed, a cell is not.
    label_key
        Column that must exist and be complete. None: not checked.
    need_counts
        Ask for whole numbers in `layers["counts"]`.
    min_cells
        Fewest cells that will do.
    min_classes
        Fewest classes in `label_key` that will do.

    Raises
    ------
    DataError
        Naming what was found, what is allowed and what to do.
    """
    check_shape(adata, min_cells)
    X = adata.X
    if X is None:
        raise DataError(message("X is empty", allowed="a matrix of cells x genes"))
    is_expression = card_of(adata).get("value_scale") != "coordinates"
    _check_values(X, adata.obs_names, is_expression)
    if is_expression:
        _check_scale(X)
    if need_counts:
        check_counts(adata)
    if label_key is not None:
        check_labels(adata.obs, label_key, min_classes)


def check_shape(adata: ad.AnnData, min_cells: int = 2) -> None:
    """Check type, size and names: the part of `check_anndata` that reads no values."""
    if not isinstance(adata, ad.AnnData):
        raise DataError(
            message(
                "The data are not an AnnData object",
                found=type(adata).__name__,
                allowed="anndata.AnnData",
                do="Use scgenlib.datasets.load, or anndata.AnnData(matrix).",
            )
        )
    if adata.n_vars == 0 or adata.n_obs < max(min_cells, 1):
        raise DataError(
            message(
                "The data have too few cells or genes",
                found=f"{adata.n_obs} cells x {adata.n_vars} genes",
                allowed=f"at least {max(min_cells, 1)} cells and 1 gene",
            )
        )
    if adata.isbacked:
        raise DataError(
            message(
                "The cells are on disk and not in memory",
                found=f"an AnnData backed by {adata.filename}",
                do="Call adata.to_memory(), or see scgenlib.atlas for large files.",
            )
        )
    for axis, index in (("obs", adata.obs_names), ("var", adata.var_names)):
        if not index.is_unique:
            twice = index[index.duplicated()].unique()
            raise DataError(
                message(
                    f"There are duplicate {'cell' if axis == 'obs' else 'gene'} names",
                    found=f"{len(twice)} names more than once, such as {twice[0]!r}",
                    allowed="unique names",
                    do=f"Call adata.{axis}_names_make_unique(){_IN_A_FILE}.",
                )
            )


def check_values(adata: ad.AnnData) -> None:
    """Raise DataError if X holds values that are no finite numbers."""
    _check_values(adata.X, adata.obs_names, is_expression=False)


def _check_values(X: Any, cells: pd.Index, is_expression: bool) -> None:
    values = X.data if sp.issparse(X) else np.asarray(X)
    if not np.isfinite(values).all():
        raise DataError(
            message(
                "X holds NaN or infinite values",
                found=f"{int((~np.isfinite(values)).sum())} of them",
                allowed="finite numbers",
                do="Remove or replace them first.",
            )
        )
    if not is_expression:
        return
    if values.size and values.min() < 0:
        raise DataError(
            message(
                "X holds negative values, as after centring or scaling",
                found=f"{int((values < 0).sum())} of them, down to {values.min():.4g}",
                allowed="log1p-normalised expression, 0 or more",
                do="Go back to counts or log1p values: scgenlib.preprocess.normalise.",
            )
        )
    empty = np.flatnonzero(np.asarray(X.sum(axis=1)).ravel() == 0)
    if len(empty):
        shown = ", ".join(str(cell) for cell in cells[empty[:3]])
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        raise DataError(
            message(
                "Some cells have no expression at all",
                found=f"{len(empty)} of {X.shape[0]} cells: {shown}{more}",
                allowed="at least one value above 0 in each cell",
                do="Drop them: adata = adata[adata.X.sum(axis=1) > 0].copy()"
                f"{_IN_A_FILE}.",
            )
        )


def _check_scale(X: Any) -> None:
    """Refuse what is certainly not logarithms; the benefit of doubt goes to X."""
    scale = value_scale(X, log1p_mark=True)
    if scale not in ("counts", "normalised"):
        return
    do = "Use scgenlib.preprocess.normalise(adata.X) as X"
    if scale == "counts":
        do += " and keep the counts in adata.layers['counts']"
    found = "raw counts" if scale == "counts" else "normalised, without the logarithm"
    raise DataError(
        message(
            "X does not hold logarithms",
            found=found,
            allowed="log1p-normalised expression",
            do=do + ".",
        )
    )


def check_counts(adata: ad.AnnData) -> None:
    """Raise DataError unless ``layers["counts"]`` holds whole numbers."""
    found = "no such layer"
    if "counts" in adata.layers:
        scale = value_scale(adata.layers["counts"])
        if scale == "counts":
            return
        found = f"values that look {scale}"
    raise DataError(
        message(
            "This method needs raw counts in adata.layers['counts']",
            found=found,
            allowed="whole numbers, 0 or more",
            do="Use a data set with counts, or put yours into that layer.",
        )
    )


def check_labels(obs: pd.DataFrame, label_key: str, min_classes: int) -> None:
    """Raise a DataError unless every cell has a label, of so many classes at least."""
    if label_key not in obs:
        raise unknown("label column", label_key, obs.columns, error=DataError)
    labels = obs[label_key]
    if labels.isna().any():
        raise DataError(
            message(
                f"Some cells have no label in {label_key!r}",
                found=f"{int(labels.isna().sum())} of {len(labels)} cells",
                allowed="one label per cell",
                do=f"Drop them: adata = adata[adata.obs[{label_key!r}].notna()].copy()"
                f"{_IN_A_FILE}.",
            )
        )
    if labels.nunique() < min_classes:
        raise DataError(
            message(
                f"The label column {label_key!r} has one class only",
                found=str(labels.iloc[0]),
                allowed="two or more classes",
                do="Choose another column with label_key.",
            )
        )
