"""Are transferred labels right, are their probabilities, and are strangers noticed?

`probabilities` is a DataFrame, cells x the types that the reference knows, rows that
sum to 1. `true` holds one label a cell, in the same order. A cell whose true type is
no column is *unseen*: no classifier can name it. A cell without a label (missing, or
the marker "undefined") is *unlabelled* and counts nowhere.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from scgenlib.errors import ConfigError, DataError, message
from scgenlib.metrics.clustering import Labels

#: The label of a cell whose type nobody gave; a missing value says the same.
UNLABELLED = "undefined"


def labelled(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return labels as strings, and which cells have one (not missing, not marked)."""
    column = pd.Series(np.asarray(labels, dtype=object))
    names = column.astype(str).to_numpy(dtype=str)
    return names, (column.notna() & (names != UNLABELLED)).to_numpy()


def transfer_scores(true: Labels, probabilities: pd.DataFrame) -> dict[str, float]:
    """Score transferred labels on the cells whose type the reference knows.

    Blind to unseen cells, which are left out: see `reject_scores`. Accuracy is blind to
    rare types, the macro scores to how many cells a type has. AUROC asks only for the
    order of the cells within a column: it can be high while the largest column is
    wrong.

    Parameters
    ----------
    true
        True label of each cell.
    probabilities
        Cells x known types. The guess is the largest column, the first one on a tie.

    Returns
    -------
    dict
        'accuracy'; 'balanced_accuracy', the mean recall, and 'macro_f1', both over the
        types present among the cells; 'auroc', one type against the rest, the mean over
        types present (nan if there is only one); 'ece', see `reliability`; 'brier', the
        squared distance to the 0/1 vector of the true type, 0 to 2 (the form for many
        classes: twice that of `calibration` where there are two); 'log_loss' in nats,
        probabilities raised to at least 1e-15; 'n', cells that count; 'n_unseen' and
        'n_unlabelled', cells left out.

    Raises
    ------
    DataError
        The rows are not probabilities, lengths differ, or no cell can be scored.
    """
    names, has, p = _checked(true, probabilities)
    code = probabilities.columns.astype(str).get_indexer(pd.Index(names))
    use = has & (code >= 0)
    counts = {
        "n": int(use.sum()),
        "n_unseen": int((has & (code < 0)).sum()),
        "n_unlabelled": int((~has).sum()),
    }
    if not use.any():
        raise DataError(message("No cell has a type that the reference knows"))
    code, p = code[use], p[use]
    guess, present = p.argmax(1), np.unique(code)
    own = np.take_along_axis(p, code[:, None], 1)
    areas = [roc_auc_score(code == k, p[:, k]) for k in present if len(present) > 1]
    how: dict[str, Any] = {"labels": present, "average": "macro", "zero_division": 0}
    table = reliability(np.asarray(names)[use], probabilities[use])
    gaps = (table["accuracy"] - table["confidence"]).abs() * table["n"]
    return {
        "accuracy": float((guess == code).mean()),
        "balanced_accuracy": float(recall_score(code, guess, **how)),
        "macro_f1": float(f1_score(code, guess, **how)),
        "auroc": float(np.mean(areas)) if areas else float("nan"),
        "ece": float(gaps.sum() / len(code)),
        "brier": float(((p**2).sum(1) - 2 * own[:, 0] + 1).mean()),
        "log_loss": float(-np.log(own.clip(1e-15)).mean()),
        **counts,
    }


def reliability(
    true: Labels, probabilities: pd.DataFrame, n_bins: int = 15
) -> pd.DataFrame:
    """Set the confidence of guesses beside the share that is right, in bins.

    The expected calibration error is the mean over cells of
    `|accuracy - confidence|` of their bin (Guo et al., 2017). Blind to all but the
    largest column, and to over- and under-confidence that cancel within a bin.
    `calibration` does this for one type.

    Parameters
    ----------
    true, probabilities
        As in `transfer_scores`; an unseen cell is never right here, so leave such cells
        out to judge the classifier on what it was trained for. Unlabelled ones drop
        out.
    n_bins
        Bins of equal width from 0 to 1; a bin holds its lower edge, the last one both.

    Returns
    -------
    DataFrame
        One row a bin: 'low', 'high', 'n', 'confidence' (mean of the largest column) and
        'accuracy'; nan in a bin without cells.
    """
    names, has, p = _checked(true, probabilities)
    if n_bins < 1:
        raise ConfigError(message("n_bins", found=n_bins, allowed="1 or more"))
    right = probabilities.columns.astype(str).to_numpy()[p.argmax(1)] == names
    top = p.max(1)
    # A mean of many trees or neighbours may come as 0.29999999999999993.
    bins = np.minimum((top * n_bins + 1e-9).astype(int), n_bins - 1)
    cells = pd.DataFrame({"confidence": top, "accuracy": right.astype(float)})[has]
    grouped = cells.groupby(bins[has])
    edges = np.arange(n_bins + 1) / n_bins
    table = pd.DataFrame({"low": edges[:-1], "high": edges[1:]})
    table["n"] = grouped.size().reindex(table.index, fill_value=0)
    return table.join(grouped.mean())


def reject_scores(
    true: Labels,
    probabilities: pd.DataFrame,
    unseen: Collection[str] | None = None,
    thresholds: Sequence[float] = (0.5, 0.7, 0.9),
) -> dict[str, float]:
    """Do low probabilities give away the cells whose type the reference lacks?

    Blind to which strangers: one type that is always noticed hides one that never is.
    A classifier that is unsure everywhere can order cells well and still be no use.

    Parameters
    ----------
    true, probabilities
        As in `transfer_scores`.
    unseen
        Types that count as unseen. None takes those that are no column. A name of a
        column is refused: the reference knows it.
    thresholds
        Cells whose largest probability is below are rejected.

    Returns
    -------
    dict
        'auroc_max' and 'auroc_entropy': chance that an unseen cell has a smaller
        largest probability, or a larger entropy, than a seen one; 0.5 is blind, nan
        where one kind is missing. 'n_unseen', 'n_seen'. For each threshold the columns
        of `coverage_table`, as `coverage@0.5` and so on.
    """
    names, has, p = _checked(true, probabilities)
    known = set(probabilities.columns.astype(str))
    strange = set(names[has]) - known if unseen is None else set(map(str, unseen))
    if strange & known:
        found = sorted(strange & known)
        raise ConfigError(message("Types cannot be unseen and known", found=found))
    is_new = np.isin(names, sorted(strange))
    use = has & (is_new | np.isin(names, sorted(known)))
    is_new, p = is_new[use], p[use]
    entropy = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum(1)
    both = is_new.any() and not is_new.all()

    def area(score: np.ndarray) -> float:
        return float(roc_auc_score(is_new, score)) if both else float("nan")

    table = coverage_table(names[use], probabilities[use], thresholds)
    flat = {
        f"{name}@{row['threshold']:g}": float(row[name])
        for _, row in table.iterrows()
        for name in table.columns[1:]
    }
    return {
        "auroc_max": area(-p.max(1)),
        "auroc_entropy": area(entropy),
        "n_unseen": int(is_new.sum()),
        "n_seen": int((~is_new).sum()),
        **flat,
    }


def coverage_table(
    true: Labels,
    probabilities: pd.DataFrame,
    thresholds: Sequence[float] = tuple(np.arange(0, 20) / 20),
) -> pd.DataFrame:
    """Say what is gained by leaving cells without a label, threshold by threshold.

    Returns
    -------
    DataFrame
        'threshold'; 'coverage': share of all labelled cells, unseen ones included,
        whose largest probability reaches it; 'accuracy': share of the covered cells
        that are right, an unseen cell never (nan without one); 'unseen_rejected': share
        of the unseen cells below it (nan without one).
    """
    names, has, p = _checked(true, probabilities)
    columns = probabilities.columns.astype(str).to_numpy()
    right, top = (columns[p.argmax(1)] == names)[has], p.max(1)[has]
    is_new = ~np.isin(names, columns)[has]
    rows = []
    for threshold in thresholds:
        kept = top >= threshold - 1e-9
        parts = (kept, right[kept], ~kept[is_new])
        rows.append([threshold, *(m.mean() if len(m) else np.nan for m in parts)])
    names_of = ["threshold", "coverage", "accuracy", "unseen_rejected"]
    return pd.DataFrame(rows, columns=names_of)


def _checked(
    true: Labels, probabilities: pd.DataFrame
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the labels, which cells have one, and float64 rows that sum to 1."""
    p = np.asarray(probabilities, dtype=np.float64)
    names, has = labelled(true)
    if p.ndim != 2 or p.shape[1] == 0 or len(names) != len(p):
        raise DataError(
            message(
                "Labels and probabilities do not belong together",
                found=f"{len(names)} labels, probabilities {p.shape}",
                allowed="one row a cell and one column a known type",
            )
        )
    sums = p.sum(1)
    # Written so that NaN fails.
    if not ((p >= -1e-6).all() and (np.abs(sums - 1) < 1e-3).all()):
        raise DataError(
            message(
                "These rows are not probabilities",
                found=f"values from {p.min():.4g}, sums {sums.min():.4g} to "
                f"{sums.max():.4g}",
                allowed="0 or more, rows that sum to 1",
                do="Apply a softmax to scores first.",
            )
        )
    columns = probabilities.columns.astype(str)
    if not columns.is_unique:
        twice = list(columns[columns.duplicated()])
        raise DataError(message("A type has two columns", found=twice))
    p = p.clip(0)
    return names, has, p / p.sum(1, keepdims=True)
