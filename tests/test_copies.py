"""How near generated cells are to training cells, on points whose gaps are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse

from scgenlib import copies


def on_a_line(*places):
    """Cells on one axis of two genes."""
    return np.stack([places, np.zeros(len(places))], axis=1).astype(np.float32)


@pytest.fixture
def crowd():
    """Training cells at 0, 1, ..., 9: each has a neighbour at distance 1."""
    return copies.remember(on_a_line(*range(10)))


def test_what_is_kept_is_components_and_not_cells(crowd):
    assert set(crowd) == {"crowd", "crowd_axes", "crowd_mean", "crowd_gaps"}
    assert all(tensor.dtype == torch.float32 for tensor in crowd.values())
    assert crowd["crowd"].shape == (10, 1) and crowd["crowd_axes"].shape == (1, 2)
    assert crowd["crowd_mean"].tolist() == [4.5, 0]
    assert crowd["crowd_gaps"].tolist() == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("wrap", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize(
    ("places", "ratio", "share"),
    [
        ((0, 4, 9), 0.0, 1.0),  # copies
        ((0.25, 3.75, 9.25), 0.25, 1.0),
        ((-1.5, 10.5, 11), 1.5, 0.0),
        ((2.25, 11, 11, 11.5), 2.0, 0.25),
    ],
)
def test_report_by_hand(crowd, wrap, places, ratio, share):
    found = copies.report(wrap(on_a_line(*places)), crowd)
    assert found["distance_ratio"] == pytest.approx(ratio, abs=1e-5)
    assert found["share_very_near"] == share
    assert (found["n_cells"], found["n_training_cells"]) == (len(places), 10)


def test_most_cells_of_a_large_set_are_left_out(monkeypatch, crowd):
    monkeypatch.setattr(copies, "MAX_CELLS", 4)
    few = copies.remember(on_a_line(*range(10)))
    assert few["crowd"].shape == (4, 1)
    found = copies.report(on_a_line(*range(8)), few, max_cells=5)
    assert (found["n_cells"], found["n_training_cells"]) == (5, 4)


def test_the_choice_of_cells_follows_the_seed(monkeypatch):
    monkeypatch.setattr(copies, "MAX_CELLS", 4)
    X = np.random.default_rng(0).random((30, 5)).astype(np.float32)
    means = [copies.remember(X, seed)["crowd_mean"] for seed in (1, 1, 2)]
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_training_cells_that_are_all_the_same_give_no_ratio():
    crowd = copies.remember(np.ones((5, 3), np.float32))
    assert math.isnan(
        copies.report(np.ones((2, 3), np.float32), crowd)["distance_ratio"]
    )


def test_copies_jitter_and_strangers_are_told_apart():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 60)).astype(np.float32)
    crowd = copies.remember(X[:200])
    copied = copies.report(X[:50], crowd)
    near = copies.report(X[:50] + rng.normal(0, 0.1, (50, 60)), crowd)
    real = copies.report(X[200:], crowd)
    assert copied["distance_ratio"] < 1e-3 < near["distance_ratio"] < 0.3
    assert copied["share_very_near"] == near["share_very_near"] == 1
    assert real["distance_ratio"] > 0.8 and real["share_very_near"] < 0.3
