"""The simple predictions of a perturbation's effect that every deep model must beat.

Each takes training cells and the conditions to predict, and returns a table of log1p
means: conditions (canonical names, `scgenlib.conditions`) x genes. All share

train
    Cells with ``obs[key]``. A condition is never predicted from its own cells: if it is
    in `train`, it is left out of its own prediction, and of that alone (leave-one-out).
    To hold out several together, take them out of `train`.
control
    The control cells to start from; None takes those of `train`. For scores, give the
    half that the truth is not scored with (`metrics.perturbation_scores`).

A change is the mean of a condition less the mean of the control. ``attrs["method"]``
of a table names the baseline; ``attrs["fallback"]`` holds, for each condition that the
method itself cannot predict, the genes for which the train mean stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData

from scgenlib._matrix import Matrix, as_matrix, as_pair, dense, mean_variance
from scgenlib.conditions import CONTROL, canonical, genes_of
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.metrics.perturbation import condition_means

__all__ = [
    "BASELINES",
    "additive",
    "effects",
    "matching_mean",
    "nearest_perturbation",
    "no_change",
    "ridge_bilinear",
    "shifted_control",
    "train_mean",
]

_LIMIT = 1_000_000_000  # bytes of shifted cells


def no_change(
    train: AnnData,
    conditions: Sequence[str],
    *,
    key: str = "perturbation",
    control: AnnData | None = None,
) -> pd.DataFrame:
    """Predict the mean of the control for every condition."""
    seen = _seen(train, conditions, key, control)
    return seen.table("no change", [np.zeros(train.n_vars)] * len(seen.queries))


def train_mean(
    train: AnnData,
    conditions: Sequence[str],
    *,
    key: str = "perturbation",
    control: AnnData | None = None,
) -> pd.DataFrame:
    """Predict the mean change of all training conditions, each with equal weight."""
    seen = _seen(train, conditions, key, control)
    return seen.table("train mean", map(seen.mean, seen.queries))


def additive(
    train: AnnData,
    conditions: Sequence[str],
    *,
    key: str = "perturbation",
    control: AnnData | None = None,
    missing: Literal["mean", "error"] = "mean",
) -> pd.DataFrame:
    """Predict the sum of the changes of a condition's genes, one by one.

    Parameters
    ----------
    missing
        For a gene that `train` has not perturbed alone: "mean" takes the mean change of
        all conditions, "error" stops.
    """
    if missing not in ("mean", "error"):
        raise unknown("missing", missing, ["mean", "error"])
    seen, changes = _seen(train, conditions, key, control), []
    for name in seen.queries:
        parts = seen.parts(name)
        if missing == "error" and name in seen.fallback:
            kind = f"single perturbation, needed for {name!r}"
            gene = seen.fallback[name][0]
            raise unknown(kind, gene, seen.singles(name), error=DataError)
        changes.append(np.sum(parts, axis=0))
    return seen.table("additive", changes)


def matching_mean(
    train: AnnData,
    conditions: Sequence[str],
    *,
    key: str = "perturbation",
    control: AnnData | None = None,
) -> pd.DataFrame:
    """Predict the mean of the changes of a condition's genes (Systema).

    A gene that `train` has not perturbed alone counts with the mean change of all
    conditions; for an unseen single this is the train mean.
    """
    seen = _seen(train, conditions, key, control)
    changes = (np.mean(seen.parts(name), axis=0) for name in seen.queries)
    return seen.table("matching mean", changes)


def nearest_perturbation(
    train: AnnData,
    conditions: Sequence[str],
    *,
    key: str = "perturbation",
    control: AnnData | None = None,
) -> pd.DataFrame:
    """Predict the change of the perturbed gene most correlated with the target.

    Correlations are Pearson's over the control cells, their sign counts, and a gene
    that `train` has perturbed alone is its own nearest. Several genes add up. A target
    that is not measured or does not vary over the controls takes the mean change of all
    conditions. ``attrs["nearest"]``: the choice for each condition and gene.
    """
    seen = _seen(train, conditions, key, control)
    names, changes = train.var_names, []
    chosen: dict[str, dict[str, str]] = {}
    for name in seen.queries:
        known = seen.singles(name)
        measured = [gene for gene in known if gene in names]
        parts, used = [], chosen.setdefault(name, {})
        for gene in genes_of(name):
            near = gene if gene in known else None
            if near is None and gene in names and measured:
                columns = names.get_indexer(pd.Index([gene, *measured]))
                with np.errstate(all="ignore"):  # nan for a gene that does not vary
                    r = np.corrcoef(dense(seen.cells[:, columns]).T)[0, 1:]
                if np.isfinite(r).any():
                    near = measured[int(np.nanargmax(r))]
            if near is not None:
                used[gene] = near
            parts.append(seen.single(name, gene, near))
        changes.append(np.sum(parts, axis=0))
    table = seen.table("nearest perturbation", changes)
    table.attrs["nearest"] = chosen
    return table


def ridge_bilinear(
    train: AnnData,
    conditions: Sequence[str],
    *,
    key: str = "perturbation",
    control: AnnData | None = None,
    n_components: int = 10,
    penalty: float = 0.1,
) -> pd.DataFrame:
    """Predict changes by ridge regression on gene embeddings from both sides.

    Y holds the training changes (genes x conditions) less their mean y over
    conditions, G the first principal component scores of the genes in the means of
    training conditions and control, P the rows of G of each condition's genes, summed.
    For a condition whose genes have the row p, the prediction is y + G W p with
    W = (G'G + aI)^-1 G'YP (P'P + aI)^-1 (Ahlmann-Eltze, Huber and Anders, Nature
    Methods 2025). A condition with a gene that is not measured is not fitted, and is
    predicted by the train mean.

    Parameters
    ----------
    n_components
        Columns of G, at most; fewer where `train` has fewer conditions.
    penalty
        a, above 0.
    """
    if n_components < 1 or penalty <= 0:
        found = {"n_components": n_components, "penalty": penalty}
        raise ConfigError(message("Ridge needs a component and a penalty", found=found))
    seen, changes = _seen(train, conditions, key, control), []
    names = train.var_names
    absent = {
        name: [gene for gene in genes_of(name) if gene not in names]
        for name in [*seen.deltas.index, *seen.queries]
    }
    usable = seen.deltas[[not absent[name] for name in seen.deltas.index]]

    @cache
    def fit(left_out: str | None) -> tuple[np.ndarray, ...]:
        y = (known := usable.drop(left_out or [])).to_numpy()
        scores = np.vstack([y, np.zeros(len(names))]).T + seen.origin[:, None]
        u, s, _ = np.linalg.svd(scores - scores.mean(0), full_matrices=False)
        # Singular values fall; only the components that are used are kept in memory.
        n = min(n_components, int((s > 1e-9 * s[0]).sum()))
        G = u[:, :n] * s[:n]
        P = np.array([_rows(G, names, name) for name in known.index])
        ridge = penalty * np.eye(G.shape[1])
        right = np.linalg.solve(P.T @ P + ridge, P.T @ (y - y.mean(0)) @ G).T
        return y.mean(0), G, np.linalg.solve(G.T @ G + ridge, right)

    for name in seen.queries:
        if absent[name] or len(usable.index.difference([name])) < 2:
            seen.fallback[name] = absent[name] or list(genes_of(name))
            changes.append(seen.mean(name))
            continue
        y, G, W = fit(name if name in usable.index else None)
        changes.append(y + G @ (W @ _rows(G, names, name)))
    return seen.table("ridge bilinear", changes)


#: The baselines by name.
BASELINES: dict[str, Callable[..., pd.DataFrame]] = {
    f.__name__: f
    for f in (no_change, train_mean, additive, matching_mean, nearest_perturbation)
} | {"ridge_bilinear": ridge_bilinear}


def shifted_control(
    control: AnnData,
    means: pd.DataFrame,
    *,
    n_cells: int | None = None,
    seed: int = 0,
) -> AnnData:
    """Return control cells, moved so that their mean is that of each condition.

    With true means it is the oracle of distances between distributions: right in the
    mean, with the spread of the control. With the means of a baseline it is the cells
    of this baseline. Values may fall below 0: raising them to 0 would move the mean.

    Parameters
    ----------
    control
        Control cells, log1p.
    means
        Conditions x genes; a row of the control is left out.
    n_cells
        Cells for each condition, drawn without replacement (seeded) and moved by the
        difference to the mean of *all* control cells; None takes all.

    Returns
    -------
    AnnData
        ``obs["perturbation"]``, and ``obs["control_cell"]``, the name of the cell.
    """
    names = canonical(list(means.index)).to_numpy()
    means = means.set_axis(names, axis=0)[names != CONTROL]
    absent = control.var_names.difference(means.columns)
    if len(absent):
        raise unknown("gene for the means", absent[0], means.columns, error=DataError)
    x, rng = as_matrix(control), np.random.default_rng(seed)
    n = control.n_obs if n_cells is None else n_cells
    if not 1 <= n <= control.n_obs:
        allowed = f"1 to {control.n_obs}, the control cells"
        raise ConfigError(message("No such draw", found=n_cells, allowed=allowed))
    size = n * len(means) * control.n_vars * 4
    if not 0 < size <= _LIMIT:
        raise DataError(
            message(
                "The shifted cells are made dense",
                found=f"{len(means)} conditions of {n} cells, {size / 1e9:.1f} GB",
                allowed="at least one condition, up to 1 GB",
                do="Give n_cells, or fewer conditions.",
            )
        )
    origin, blocks, barcodes = mean_variance(x)[0], [], []
    for shift in means[control.var_names].to_numpy() - origin:
        rows = np.sort(rng.permutation(control.n_obs)[:n])
        blocks.append((dense(x[rows]) + shift).astype(np.float32))
        barcodes.append(control.obs_names[rows].to_numpy())
    condition, cell = np.repeat(list(means.index), n), np.concatenate(barcodes)
    obs = pd.DataFrame(
        {"perturbation": pd.Categorical(condition), "control_cell": cell},
        index=[f"{a}|{b}" for a, b in zip(cell, condition, strict=True)],
    )
    made = AnnData(np.vstack(blocks), obs=obs, var=control.var.copy())
    made.uns["method"] = f"shifted control: {means.attrs.get('method', 'given means')}"
    return made


# --------------------------------------------------------------------------- helpers


@dataclass
class _Seen:
    """What a baseline may know: control mean and changes of the training conditions."""

    cells: Matrix  # of the control
    origin: np.ndarray  # their mean
    deltas: pd.DataFrame  # training conditions x genes
    queries: list[str]
    fallback: dict[str, list[str]] = field(default_factory=dict)

    def others(self, name: str) -> pd.DataFrame:
        """Return the changes of all training conditions but `name`."""
        found = self.deltas.drop(name, errors="ignore")
        if found.empty:
            what = f"No training condition is left to predict {name!r} from"
            raise DataError(message(what, found=list(self.deltas.index)))
        return found

    def mean(self, name: str) -> np.ndarray:
        return self.others(name).to_numpy().mean(0)

    def singles(self, name: str) -> list[str]:
        names = self.deltas.index
        return [one for one in names if one != name and genes_of(one) == (one,)]

    def single(self, name: str, gene: str, stand_in: str | None = None) -> np.ndarray:
        """Return the change of `gene` alone (or its stand-in's), else the mean."""
        if (used := stand_in or gene) in self.singles(name):
            return self.deltas.loc[used].to_numpy()
        self.fallback.setdefault(name, []).append(gene)
        return self.mean(name)

    def parts(self, name: str) -> list[np.ndarray]:
        return [self.single(name, gene) for gene in genes_of(name)]

    def table(self, method: str, changes: Iterable[np.ndarray]) -> pd.DataFrame:
        index = pd.Index(self.queries, name="condition")
        values = self.origin + np.vstack(list(changes))
        made = pd.DataFrame(values, index=index, columns=self.deltas.columns)
        made.attrs = {"method": method, "fallback": self.fallback}
        return made


def _seen(
    train: AnnData, conditions: Sequence[str], key: str, control: AnnData | None
) -> _Seen:
    if isinstance(conditions, str):
        conditions = [conditions]
    queries = list(dict.fromkeys(canonical(list(conditions))))
    if not queries or CONTROL in queries:
        allowed = "perturbed conditions, at least one"
        what = "There is nothing to predict for the control or for no condition"
        raise DataError(message(what, found=list(conditions), allowed=allowed))
    means = condition_means(train, key)
    if control is None and CONTROL not in means.index:
        raise DataError(
            message(
                "The training cells have no control",
                found=list(means.index)[:10],
                do="Name it 'ctrl' (conditions.canonical), or give control=.",
            )
        )
    if control is None:
        control = train[(canonical(train.obs[key]) == CONTROL).to_numpy()]
    cells = as_pair(train, control)[1]
    origin = mean_variance(cells)[0]
    # A training change is from the training cells' own control, where they have one.
    start = means.loc[CONTROL].to_numpy() if CONTROL in means.index else origin
    deltas = means.drop(CONTROL, errors="ignore") - start
    return _Seen(cells, origin, deltas, queries)


def _rows(G: np.ndarray, names: pd.Index, condition: str) -> np.ndarray:
    return G[names.get_indexer(pd.Index(genes_of(condition)))].sum(0)


def effects(
    models: Sequence[Any],
    adata: AnnData,
    perturbation: str | Mapping[str, float],
    *,
    unmeasured: str = "error",
) -> pd.DataFrame:
    """Return the predicted change of each gene, and how sure it is.

    Parameters
    ----------
    models
        Fitted `REGINA` models of several seeds, on the same cells; one will do.
    adata
        Control cells.
    perturbation, unmeasured
        As in `REGINA.predict`.

    Returns
    -------
    pandas.DataFrame
        Index: genes. "effect": mean change of log1p expression over cells and models;
        "sd_cells": standard deviation of the change between cells, mean over the
        models; "sd_models": between models, NaN for one.
    """
    means, spreads = [], []
    if not models:
        raise ConfigError(message("No model was given", allowed="one or more"))
    for model in models:
        made = model.predict(adata, perturbation, unmeasured=unmeasured, output="shift")
        start = dense(as_matrix(adata[:, model.genes_]))
        change = pd.DataFrame(made.X - start, columns=model.genes_)
        means.append(change.mean())
        spreads.append(change.std(ddof=0))
    table = pd.concat(means, axis=1)
    return pd.DataFrame(
        {
            "effect": table.mean(axis=1),
            "sd_cells": pd.concat(spreads, axis=1).mean(axis=1),
            "sd_models": table.std(axis=1),
        }
    )
