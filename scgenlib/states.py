"""A stress score of cells, and the two states that a threshold on it makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scgenlib._matrix import as_matrix, mean_variance
from scgenlib.conditions import CONTROL
from scgenlib.errors import ConfigError, DataError, message

__all__ = ["STATES", "STRESS_PREFIXES", "StressScore", "state_labels"]

STATES = ("Homeostasis", "Stressed")
STRESS_PREFIXES = ("HSP", "ATF", "DNAJ", "ERN", "EIF2", "CEBP")
_BINS = 25  # of genes by mean expression
_PER_BIN = 50  # background genes drawn from each bin that holds a marker


@dataclass(frozen=True)
class StressScore:
    """Mean of the marker genes minus mean of a background of like expression.

    Everything is chosen on the cells given to `fit`, which must be training cells:
    a threshold of its own for each part of a split would tell what the part is made of.

    Parameters
    ----------
    genes, background
        Markers, and the genes that they are compared to.
    threshold
        Cells above it are "Stressed".
    """

    genes: tuple[str, ...]
    background: tuple[str, ...]
    threshold: float

    @classmethod
    def fit(
        cls,
        train: ad.AnnData,
        prefixes: Sequence[str] = STRESS_PREFIXES,
        *,
        quantile: float = 0.7,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> StressScore:
        """Choose markers, background and threshold.

        Parameters
        ----------
        train
            Training cells, X log1p.
        prefixes
            A gene is a marker if its symbol begins with one of these, in any case. A
            prefix can catch genes that have nothing to do with stress (HSPG2).
        quantile
            Share of the training cells that is not stressed.
        exclude
            Genes that take no part: the perturbed genes, or the score tells which
            perturbation a cell got, and not its state.
        seed
            The same seed draws the same background.

        Returns
        -------
        StressScore

        Raises
        ------
        ConfigError
            If `quantile` is not between 0 and 1.
        DataError
            If fewer than three markers are expressed, or no other gene is.
        """
        if not 0 < quantile < 1:
            allowed = "a share strictly between 0 and 1"
            raise ConfigError(message("quantile", found=quantile, allowed=allowed))
        mean = pd.Series(mean_variance(as_matrix(train))[0], index=train.var_names)
        mean = mean[mean > 0]
        starts = tuple(prefix.upper() for prefix in prefixes)
        like = mean.index.str.upper().str.startswith(starts)
        left_out = mean.index.isin(list(exclude))
        marker, other = like & ~left_out, ~like & ~left_out
        genes = mean.index[marker]
        if len(genes) < 3 or not other.any():
            raise DataError(
                message(
                    "Too few genes for a stress score",
                    found=f"{len(genes)} expressed markers ({', '.join(genes)}), "
                    f"{int(other.sum())} other genes",
                    allowed="three markers and one other gene, or more",
                    do="Give prefixes of your own, keep the markers when genes are"
                    " selected, or use a column of states in place of the score.",
                )
            )
        # Bins of about equal size, by the rank of the mean.
        bins = mean.rank(method="first").sub(1) * _BINS // len(mean)
        rng, drawn = np.random.default_rng(seed), []
        for number in np.unique(bins[marker]):
            others = mean.index[(bins == number) & other]
            drawn += list(rng.permutation(others)[:_PER_BIN])
        # Markers alone in their bins, as with few genes, are compared to all others.
        background = drawn or mean.index[other]
        chosen = cls(tuple(map(str, genes)), tuple(map(str, background)), 0.0)
        threshold = float(np.quantile(chosen.score(train), quantile))
        return cls(chosen.genes, chosen.background, threshold)

    def score(self, adata: ad.AnnData) -> np.ndarray:
        """Return the score of each cell, float64.

        Raises
        ------
        DataError
            If a gene of the score is not measured.
        """
        at = adata.var_names.get_indexer(pd.Index([*self.genes, *self.background]))
        if (at < 0).any():
            lost = np.array([*self.genes, *self.background])[at < 0]
            raise DataError(
                message(
                    "The cells lack genes of the stress score",
                    found=f"{len(lost)} genes, such as {lost[0]}",
                    allowed="all genes that the score was fitted on",
                    do="Fit the score on training cells with the same genes.",
                )
            )
        weight = np.zeros(adata.n_vars)
        n = len(self.genes)
        weight[at[:n]], weight[at[n:]] = 1 / n, -1 / len(self.background)
        return np.asarray(as_matrix(adata) @ weight, dtype=np.float64).ravel()

    def states(self, adata: ad.AnnData) -> pd.Categorical:
        """Return "Homeostasis" or "Stressed" for each cell."""
        above = (self.score(adata) > self.threshold).astype(int)
        return pd.Categorical.from_codes(above, pd.Index(STATES, dtype=object))

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, for a saved model."""
        return asdict(self)

    @classmethod
    def from_dict(cls, about: Mapping[str, Any]) -> StressScore:
        """Return the score of `to_dict`, also after a way through JSON."""
        genes, background = tuple(about["genes"]), tuple(about["background"])
        return cls(genes, background, float(about["threshold"]))


def state_labels(
    adata: ad.AnnData,
    conditions: pd.Series,
    how: str,
    label_key: str | None,
    targets: Iterable[str],
    seed: int = 0,
) -> tuple[list[str], dict[str, Any]]:
    """Return the state of each training cell, and what it was made of.

    Parameters
    ----------
    adata
        Training cells.
    conditions
        Canonical conditions, see `conditions.check_conditions`.
    how
        "stress"; "perturbed" for control or perturbed; "auto" for stress where its
        markers are measured.
    label_key
        Column to take instead.
    targets
        Genes that the stress score leaves out: their change is the perturbation.
    seed
        Of the stress score's background.
    """
    if label_key is not None:
        return list(adata.obs[label_key].astype(str)), {"states": f"column {label_key}"}
    if how != "perturbed":
        try:
            score = StressScore.fit(adata, exclude=targets, seed=seed)
        except DataError:
            if how == "stress":
                raise
        else:
            facts = {"states": "stress score", "stress": score.to_dict()}
            return list(score.states(adata)), facts
    names = conditions.eq(CONTROL).map({True: "control", False: "perturbed"})
    return list(names), {"states": "control or perturbed"}
