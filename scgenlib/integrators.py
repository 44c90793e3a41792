"""The simple ways to integrate batches and to transfer labels, for comparison.

`pca`, `harmony` and `scvi` return AnnData as `embed` of a model does: X holds the
coordinates (float32), `obs` is kept, ``uns["scgenlib"]`` says where it came from.
`knn_labels` and `logistic_labels` carry labels over in any embedding.
"""

from __future__ import annotations

import inspect
import json
import logging
import warnings
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import scgenlib
from scgenlib._matrix import Cells, as_matrix, fit_pca
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.metrics.clustering import Labels
from scgenlib.metrics.transfer import labelled
from scgenlib.preprocess import select_genes

__all__ = ["harmony", "knn_labels", "logistic_labels", "pca", "scvi"]


def pca(
    adata: AnnData,
    n_pcs: int = 50,
    n_genes: int | None = None,
    seed: int = 0,
    *,
    fit_on: AnnData | None = None,
) -> AnnData:
    """Return principal components: no batch is removed, the floor of a comparison.

    ``pca(train)`` and ``pca(query, fit_on=train)`` with the same settings lie in the
    same space: the second learns nothing from the query.

    Parameters
    ----------
    adata
        Cells to place, X log1p values.
    n_pcs
        Components, at most one fewer than the fitted cells or genes.
    n_genes
        Keep this many highly variable genes (`preprocess.select_genes`); None keeps
        all.
    seed
        Seed of the components.
    fit_on
        Cells that genes, means and components are taken from; None takes `adata`.

    Returns
    -------
    AnnData
        Cells x components, float32, not scaled.

    Raises
    ------
    DataError
        A gene of `fit_on` is absent from `adata`.
    """
    _at_least("n_pcs", n_pcs, 1)
    base = adata if fit_on is None else fit_on
    genes = base.var_names if n_genes is None else select_genes(base, n_genes)
    absent = pd.Index(genes).difference(adata.var_names)
    if len(absent):
        raise DataError(
            message(
                "Genes of the fitted cells are absent",
                found=f"{len(absent)} of {len(genes)}, such as {absent[0]!r}",
                allowed="cells with all genes of fit_on",
            )
        )
    fitted = fit_pca(as_matrix(base[:, genes]), n_pcs, seed)
    Z = fitted.transform(as_matrix(adata[:, genes]))
    config = {"n_pcs": Z.shape[1], "n_genes": n_genes}
    return _done(adata, Z, "PCA", seed, base, **config)


def harmony(
    adata: AnnData,
    batch_key: str = "batch",
    n_pcs: int = 50,
    n_genes: int | None = None,
    seed: int = 0,
    *,
    theta: float = 2.0,
    max_iter: int = 10,
) -> AnnData:
    """Return principal components corrected by Harmony (Korsunsky et al., 2019).

    Soft clusters that no batch may dominate; within each, batches are moved onto one
    another by a linear shift. It places all cells together: new ones need a new run.
    Where batches differ more than types do, the first clusters hold one batch each and
    little is corrected.

    Parameters
    ----------
    adata
        Cells, X log1p values; at least 60, since a cluster is made for every 30.
    batch_key
        Column of `obs` with two or more batches, none missing.
    n_pcs, n_genes, seed
        As in `pca`; `seed` also starts the clusters.
    theta
        Weight of mixing; 0 asks for none.
    max_iter
        Rounds of clustering and correcting.

    Raises
    ------
    DataError
        Too few cells, or a batch column that will not do.
    """
    import harmonypy

    _check_batches(adata, batch_key)
    if adata.n_obs < 60:
        raise DataError(message("Harmony needs 60 cells", found=adata.n_obs))
    before = pca(adata, n_pcs, n_genes, seed)
    batches = pd.DataFrame({"batch": adata.obs[batch_key].astype(str).to_numpy()})
    # It logs to stderr, which a notebook would show.
    logging.getLogger("harmonypy").setLevel(logging.WARNING)
    # One thread: the numbers are the same for any, and a caller's limit holds. The
    # older form, which Windows has, computes with torch and asks for a device.
    is_older = "device" in inspect.signature(harmonypy.run_harmony).parameters
    where = {"device": "cpu"} if is_older else {"ncores": 1}
    found = harmonypy.run_harmony(
        np.asarray(before.X, dtype=np.float64),
        batches,
        "batch",
        theta=theta,
        max_iter_harmony=max_iter,
        verbose=False,
        random_state=seed,
        **where,
    )
    config = {"batch_key": batch_key, "n_pcs": before.n_vars, "n_genes": n_genes}
    config |= {"theta": theta, "max_iter": max_iter}
    return _done(adata, found.Z_corr, "Harmony", seed, adata, **config)


def scvi(
    adata: AnnData,
    batch_key: str | None = "batch",
    n_latent: int = 10,
    n_genes: int | None = None,
    seed: int = 0,
    *,
    max_epochs: int | None = None,
    device: str = "cpu",
) -> AnnData:
    """Return the mean codes of scVI (Lopez et al., 2018), by scvi-tools.

    Needs the extra ``scgenlib[integration]``. Its global seed is set.

    Parameters
    ----------
    adata
        Cells with ``layers["counts"]``; not changed.
    batch_key
        Column of `obs` that the decoder is told; None for none.
    n_latent, n_genes
        Latent dimensions; highly variable genes to keep, as in `pca`.
    max_epochs
        None leaves it to scvi-tools, which takes fewer for more cells.
    device
        'cpu', 'cuda' or 'mps'.

    Raises
    ------
    ConfigError
        scvi-tools is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import scvi as tools
    except ImportError as error:
        raise ConfigError(
            message(
                "scVI needs scvi-tools, which is not installed",
                do="pip install 'scgenlib[integration]', or use pca or harmony.",
            )
        ) from error
    if batch_key is not None:
        _check_batches(adata, batch_key)
    genes = adata.var_names if n_genes is None else select_genes(adata, n_genes)
    own = AnnData(adata[:, genes].layers["counts"].copy(), obs=adata.obs.copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        tools.settings.verbosity = logging.ERROR
        tools.settings.seed = seed
        tools.model.SCVI.setup_anndata(own, batch_key=batch_key)
        model = tools.model.SCVI(own, n_latent=n_latent)
        accelerator = "gpu" if device.startswith("cuda") else device
        model.train(
            max_epochs=max_epochs,
            accelerator=accelerator,
            devices=1,
            enable_progress_bar=False,
            logger=False,
        )
        Z = model.get_latent_representation()
    config = {"batch_key": batch_key, "n_latent": n_latent, "n_genes": n_genes}
    config |= {"max_epochs": max_epochs, "scvi-tools": tools.__version__}
    return _done(adata, Z, "scVI", seed, adata, **config)


def knn_labels(
    train_Z: Cells, train_labels: Labels, query_Z: Cells, k: int = 15
) -> pd.DataFrame:
    """Let the k nearest reference cells vote, each with the same weight.

    A stranger far from everything gets the label of whatever is nearest: its
    probabilities say nothing of the distance.

    Parameters
    ----------
    train_Z, query_Z
        Coordinates in one space, AnnData or arrays, cells x dimensions.
    train_labels
        Label of each reference cell; unlabelled ones do not vote.
    k
        Neighbours (Euclidean); fewer if there are not so many.

    Returns
    -------
    DataFrame
        Query cells x types in alphabetical order, rows that sum to 1. The index holds
        the names of the cells of an AnnData.
    """
    _at_least("k", k, 1)
    x, y = _reference(train_Z, train_labels)
    voters = KNeighborsClassifier(min(k, len(y)))
    return _probabilities(voters.fit(x, y), query_Z)


def logistic_labels(
    train_Z: Cells,
    train_labels: Labels,
    query_Z: Cells,
    *,
    C: float = 1.0,
    max_iter: int = 1000,
) -> pd.DataFrame:
    """Fit a logistic regression on the reference cells, and apply it to the query.

    Coordinates are scaled by the reference's means and deviations. Arguments and result
    are those of `knn_labels`; `C` is the inverse strength of the L2 penalty.
    """
    x, y = _reference(train_Z, train_labels)
    if len(set(y)) < 2:
        raise DataError(message("There is one type only", found=y[0]))
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=max_iter))
    return _probabilities(fitted.fit(x, y), query_Z)


def _reference(Z: Cells, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return coordinates and names of the cells that have a label."""
    x, (names, has) = as_matrix(Z), labelled(labels)
    if len(names) != x.shape[0] or not has.any():
        raise DataError(
            message(
                "The reference needs labels",
                found=f"{x.shape[0]} cells, {len(names)} labels, {has.sum()} known",
                allowed="one a cell, at least one known",
            )
        )
    return x[has].astype(np.float64), names[has]


def _probabilities(fitted: Any, query: Cells) -> pd.DataFrame:
    index = query.obs_names if isinstance(query, AnnData) else None
    p = fitted.predict_proba(as_matrix(query).astype(np.float64))
    return pd.DataFrame(p, index=index, columns=list(fitted.classes_))


def _check_batches(adata: AnnData, batch_key: str) -> None:
    if batch_key not in adata.obs:
        raise unknown("batch column", batch_key, adata.obs.columns, error=DataError)
    column = adata.obs[batch_key]
    if column.isna().any() or column.nunique() < 2:
        raise DataError(
            message(
                f"The batch column {batch_key!r} will not do",
                found=f"{column.nunique()} batches, {column.isna().sum()} missing",
                allowed="two or more batches, every cell in one",
            )
        )


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(message(name, found=value, allowed=f"{low} or more"))


def _done(
    adata: AnnData, Z: Any, method: str, seed: int, fit_on: AnnData, **config: Any
) -> AnnData:
    """Return the coordinates with where they come from."""
    from scgenlib.estimator import data_hash  # brings torch, which is slow to load

    out = AnnData(np.asarray(Z, dtype=np.float32), obs=adata.obs.copy())
    out.var_names = [f"z{i}" for i in range(out.n_vars)]
    out.uns["scgenlib"] = {
        "method": f"baseline: {method}",
        "scgenlib": scgenlib.__version__,
        "config": json.dumps(config),
        "seed": seed,
        "data_hash": data_hash(fit_on),
        "n_training_cells": fit_on.n_obs,
    }
    return out
