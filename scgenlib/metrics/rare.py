"""Do extra cells of a rare type help a classifier to find that type?"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import sklearn
from anndata import AnnData
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import precision_recall_fscore_support
from sklearn.utils.class_weight import compute_sample_weight

from scgenlib import baselines
from scgenlib._matrix import as_matrix, as_pair, fit_pca, labels_of, stack
from scgenlib.errors import ConfigError, DataError, message, unknown

Arm: TypeAlias = "AnnData | str | None"
CLASS_WEIGHTS = "class weights"
#: Fewest cells that `cut_type` leaves.
MIN_CELLS = 3


def rare_arms(
    train: AnnData,
    rare_type: str,
    *,
    n_extra: int | None = None,
    label_key: str = "cell_type",
    n_pcs: int = 50,
    seed: int = 0,
) -> dict[str, Arm]:
    """The arms that every generator is set against in `rare_utility`.

    Parameters
    ----------
    train
        Real training cells with labels.
    rare_type
        The type to add cells of.
    n_extra
        Cells to add; None takes ten for each training cell of the type.
    n_pcs
        Principal components in which 'SMOTE in PCs' looks for neighbours; as many
        as `rare_utility` gives the forest.
    seed
        Seed of the baselines.

    Returns
    -------
    dict
        'real only', 'class weights' (the forest weights types equally),
        'over-sampling', 'SMOTE', 'SMOTE in PCs' (see Notes), 'jittered copies'.

    Notes
    -----
    A principal component is linear in the genes. A point between two cells
    therefore has scores between theirs, and only the choice of the neighbours
    tells SMOTE in the components from SMOTE in the genes. So 'SMOTE in PCs'
    also holds points between cells, with genes that are at least 0.
    """
    _need_type(train, rare_type, label_key, "training")
    if n_extra is None:
        n_extra = 10 * int((labels_of(train, label_key) == rare_type).sum())
    extra: dict[str, Any] = {"seed": seed, "label": rare_type, "label_key": label_key}
    return {
        "real only": None,
        CLASS_WEIGHTS: CLASS_WEIGHTS,
        "over-sampling": baselines.copy_cells(train, n_extra, **extra),
        "SMOTE": baselines.smote(train, n_extra, **extra),
        "SMOTE in PCs": baselines.smote(train, n_extra, n_pcs=n_pcs, **extra),
        "jittered copies": baselines.jitter(train, n_extra, **extra),
    }


def cut_type(
    train: AnnData,
    cell_type: str,
    share: float,
    seed: int = 0,
    *,
    label_key: str = "cell_type",
) -> AnnData:
    """Make a type rare: keep a share of its cells, and never fewer than three.

    Parameters
    ----------
    train
        Training cells with labels. Cut these only, not the cells that test.
    cell_type
        The type to cut.
    share
        Share of its cells to keep, above 0 and at most 1, rounded to whole cells.
    seed
        Seed of the draw. With one seed a smaller share keeps some of the cells
        that a larger one keeps.

    Returns
    -------
    AnnData
        A copy, in the original order.

    Raises
    ------
    ConfigError
        The share is out of range.
    DataError
        The type is absent or has fewer than three cells.
    """
    _need_type(train, cell_type, label_key, "training")
    if not 0 < share <= 1:
        allowed = "above 0 and at most 1"
        raise ConfigError(message("The share to keep", found=share, allowed=allowed))
    is_type = labels_of(train, label_key) == cell_type
    cells = np.random.default_rng(seed).permutation(np.flatnonzero(is_type))
    if len(cells) < MIN_CELLS:
        raise DataError(
            message(
                f"{cell_type!r} is too small to be cut",
                found=f"{len(cells)} cells",
                allowed=f"{MIN_CELLS} or more",
            )
        )
    kept = np.ones(train.n_obs, dtype=bool)
    kept[cells[max(MIN_CELLS, round(share * len(cells))) :]] = False
    return train[kept].copy()


def rare_utility(
    train: AnnData,
    test: AnnData,
    rare_type: str,
    arms: Mapping[str, Arm],
    *,
    label_key: str = "cell_type",
    n_pcs: int = 50,
    n_trees: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Train one forest per arm and score it on real held-out cells.

    All arms share the principal components (fitted on the real training cells),
    the forest with its settings and seed, and the labels. They differ only in
    the rows that are added.

    Parameters
    ----------
    train, test
        Real cells with labels, split before anything was fitted; no cell in both.
    rare_type
        The type whose recall, precision and F1 are reported.
    arms
        Name to what is added: None nothing, 'class weights' no cells but equal
        total weight for each type, or AnnData of extra cells whose `label_key`
        column says what each claims to be. See `rare_arms`.
    n_pcs, n_trees
        Principal components and trees.
    seed
        Seed of the components and the forest.

    Returns
    -------
    DataFrame
        One row an arm: 'arm', 'added', 'recall', 'precision', 'f1' (of the rare
        type), 'macro_f1', 'balanced_accuracy', 'brier', 'ece' (of the forest's
        probability of the rare type, see `calibration`), 'n_test_rare',
        'classifier_hash' (equal in all rows).

    Raises
    ------
    DataError
        If the type is absent on one side, test cells are among the training
        cells, or an arm holds a type that the training cells do not.
    """
    x_train, x_test = as_pair(train, test)
    y_train, y_test = labels_of(train, label_key), labels_of(test, label_key)
    _need_type(train, rare_type, label_key, "training")
    _need_type(test, rare_type, label_key, "test")
    shared = train.obs_names.intersection(test.obs_names)
    if len(shared):
        raise DataError(
            message(
                "Test cells are among the training cells",
                found=list(shared[:3]),
                do="Split first, then fit.",
            )
        )
    if not arms:
        raise ConfigError(message("There is no arm to compare"))
    pca = fit_pca(x_train, n_pcs, seed)
    x_test = pca.transform(x_test)
    rows = []
    for name, arm in arms.items():
        x, y = x_train, y_train
        if isinstance(arm, AnnData):
            extra = labels_of(arm, label_key)
            new = sorted(set(extra) - set(y_train))
            if new:
                raise unknown(f"cell type in arm {name!r}", new[0], set(y_train))
            x = stack(x_train, as_matrix(as_pair(train, arm)[1]))
            y = np.concatenate([y_train, extra])
        elif arm not in (None, CLASS_WEIGHTS):
            raise unknown(f"arm {name!r}", arm, [CLASS_WEIGHTS, "None", "AnnData"])
        weights = compute_sample_weight("balanced", y) if isinstance(arm, str) else None
        forest = RandomForestClassifier(n_trees, random_state=seed)
        forest.fit(pca.transform(x), y, sample_weight=weights)
        votes = forest.predict_proba(x_test)
        guess = forest.classes_[votes.argmax(1)]
        of_rare = votes[:, forest.classes_ == rare_type].ravel()
        rows.append(
            {
                "arm": name,
                "added": len(y) - len(y_train),
                **_scores(y_test, guess, rare_type),
                **calibration(of_rare, y_test == rare_type),
                "n_test_rare": int((y_test == rare_type).sum()),
                "classifier_hash": classifier_hash(forest),
            }
        )
    table = pd.DataFrame(rows)
    if table["classifier_hash"].nunique() != 1:
        raise AssertionError("the arms were not scored by the same classifier")
    return table


def calibration(
    probability: np.ndarray, is_it: np.ndarray, n_bins: int = 10
) -> dict[str, float]:
    """Say whether the probabilities of one type are as large as they should be.

    Parameters
    ----------
    probability
        Probability of the type for each cell, shape (n_cells,), from 0 to 1.
    is_it
        Whether the cell is of the type, shape (n_cells,), bool.
    n_bins
        Bins of equal width from 0 to 1; a bin holds its lower edge, the last one
        both.

    Returns
    -------
    dict
        'brier': mean squared difference between probability and truth (Brier,
        1950). 'ece': expected calibration error, the difference between mean
        probability and share of the type in each bin, weighted by the cells in
        it (Naeini et al., 2015). 0 is best for both. Where a type is rare both
        are small even if it is never found: compare arms, not data sets.
    """
    p, y = np.asarray(probability, dtype=float), np.asarray(is_it, dtype=float)
    # Votes are averages of many trees: 0.3 may come as 0.29999999999999993.
    bins = np.minimum((p * n_bins + 1e-9).astype(int), n_bins - 1)
    gaps = np.bincount(bins, weights=p - y, minlength=n_bins)
    return {
        "brier": float(((p - y) ** 2).mean()),
        "ece": float(np.abs(gaps).sum() / len(p)),
    }


def classifier_hash(classifier: RandomForestClassifier) -> str:
    """Short hash of a classifier's class, settings and library version."""
    facts = [
        type(classifier).__name__,
        sklearn.__version__,
        classifier.get_params(),
    ]
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _scores(true: np.ndarray, guess: np.ndarray, rare: str) -> dict[str, float]:
    types = sorted(set(true))
    precision, recall, f1, _ = precision_recall_fscore_support(
        true, guess, labels=types, zero_division=0
    )
    at = types.index(rare)
    return {
        "recall": float(recall[at]),
        "precision": float(precision[at]),
        "f1": float(f1[at]),
        "macro_f1": float(f1.mean()),
        "balanced_accuracy": float(recall.mean()),
    }


def _need_type(cells: AnnData, rare_type: str, label_key: str, side: str) -> None:
    labels = labels_of(cells, label_key)
    if rare_type not in labels:
        raise unknown(
            f"cell type among the {side} cells",
            rare_type,
            sorted(set(labels)),
            error=DataError,
        )
