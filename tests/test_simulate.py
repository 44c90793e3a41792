"""The simulator keeps its promises: each dial does what it says."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scgenlib import datasets
from scgenlib.errors import ConfigError
from scgenlib.preprocess import value_scale
from scgenlib.simulate import _dropout_table, blobs, simulate, simulate_like


def test_contract_and_truth():
    adata = simulate(400, 120, dropout=0.3, seed=0)
    datasets.check_anndata(adata, label_key="cell_type", need_counts=True)
    assert sp.issparse(adata.X) and adata.X.dtype == np.float32
    assert value_scale(adata.X) == "log1p"
    assert adata.uns["dataset"]["simulated"] is True
    assert adata.obs["cell_type"].value_counts()["rare"] == 12
    # Dropout only removes.
    lost = adata.layers["true_counts"] - adata.layers["counts"]
    assert lost.min() == 0 and lost.max() > 0
    # The true means of a cell sum to its depth.
    truth = adata.layers["true_expression"]
    np.testing.assert_allclose(truth.sum(1), adata.obs["depth"], rtol=1e-4)


def test_the_seed_decides():
    a, b, c = (simulate(100, 50, seed=s).layers["counts"] for s in (3, 3, 4))
    assert (a != b).nnz == 0
    assert (a != c).nnz > 0


def test_counts_follow_the_truth():
    adata = simulate(1500, 60, depth_mean=600, seed=1)
    counts = adata.layers["counts"].toarray()
    truth = adata.layers["true_expression"]
    # Means agree, and the variance exceeds Poisson's by the gamma's 0.25 * mu^2.
    np.testing.assert_allclose(counts.sum(), truth.sum(), rtol=0.01)
    excess = ((counts - truth) ** 2 - truth).sum() / (truth**2).sum()
    assert 0.18 < excess < 0.32
    depth = adata.obs["depth"]
    assert depth.mean() == pytest.approx(600, rel=0.05)
    assert depth.std() == pytest.approx(240, rel=0.12)


def test_markers_are_raised_in_their_type():
    adata = simulate(600, 200, seed=2)
    truth = adata.layers["true_expression"]
    share = truth / truth.sum(1, keepdims=True)
    for name in adata.obs["cell_type"].cat.categories:
        genes = (adata.var["marker_of"] == name).to_numpy()
        cells = (adata.obs["cell_type"] == name).to_numpy()
        assert genes.sum() == 10
        ratio = share[cells][:, genes].mean(0) / share[~cells][:, genes].mean(0)
        assert ratio.min() > 2


@pytest.mark.parametrize(("dial", "low", "high"), [(0.0, -0.1, 0.1), (1.0, 0.95, 1.01)])
def test_programme_dial_sets_the_correlation_only(dial, low, high):
    adata = simulate(600, 200, {"a": 400, "b": 200}, programmes=dial, seed=3)
    cells = (adata.obs["cell_type"] == "a").to_numpy()
    genes = (adata.var["programme"] == "a").to_numpy()
    # Compare with a gene outside every programme: the scaling to depth cancels.
    outside = (adata.var["programme"] == "").to_numpy() & ~genes
    truth = np.log(adata.layers["true_expression"][cells])
    shift = truth[:, genes] - truth[:, outside][:, :1]
    correlation = np.corrcoef(shift.T)
    off = correlation[~np.eye(len(correlation), dtype=bool)]
    assert low < off.mean() < high
    # Each gene's own spread does not move with the dial.
    assert shift.std(0).mean() == pytest.approx(0.7, rel=0.08)
    activity = adata.obs["programme_activity"][cells]
    followed = np.corrcoef(shift.mean(1), activity)[0, 1]
    assert followed > 0.99 if dial else abs(followed) < 0.2


@pytest.mark.parametrize("slope", [-1.0, 0.0, 1.0])
def test_dropout_slope(slope):
    mean = np.random.default_rng(0).lognormal(0, 1, (3, 200))
    p = _dropout_table(mean, 0.4, slope)
    assert p.mean() == pytest.approx(0.4, abs=1e-9)
    order = p.ravel()[np.argsort(mean.ravel())]
    if slope:
        assert (np.sign(np.diff(order)) == -slope).all()
    else:
        np.testing.assert_allclose(order, 0.4)


def test_dropout_slope_in_the_cells():
    for slope in (-1.0, 1.0):
        adata = simulate(500, 100, dropout=0.4, dropout_slope=slope, seed=5)
        true = adata.layers["true_counts"].toarray()
        kept = (adata.layers["counts"].toarray() > 0).sum(0) / (true > 0).sum(0)
        order = np.argsort(true.mean(0))
        rise = kept[order[-25:]].mean() - kept[order[:25]].mean()
        assert np.sign(rise) == slope and abs(rise) > 0.2


def test_no_cell_is_empty_even_at_full_dropout():
    adata = simulate(50, 30, depth_mean=1.0, dropout=1.0, seed=6)
    totals = np.asarray(adata.layers["counts"].sum(1)).ravel()
    assert totals.min() >= 1
    assert (adata.layers["true_counts"] - adata.layers["counts"]).min() == 0


def test_type_sizes_are_met():
    sizes = {"big": 40, "tiny": 1}
    adata = simulate(n_genes=20, type_sizes=sizes)
    assert adata.obs["cell_type"].value_counts().to_dict() == sizes
    assert "rare" not in simulate(50, 20, rare_fraction=0.0).obs["cell_type"].unique()


@pytest.mark.parametrize(
    "bad",
    [
        {"rare_fraction": 1.5},
        {"programmes": -0.1},
        {"dropout": 2.0},
        {"dropout_slope": -1.1},
        {"depth_mean": 0.0},
        {"type_sizes": {"a": 0, "b": 3}},
        {"n_genes": 3},
    ],
)
def test_bad_dials(bad):
    with pytest.raises(ConfigError, match="Allowed"):
        simulate(**{"n_cells": 30, "n_genes": 20, **bad})


def test_like_a_card():
    card = {
        "name": "toy",
        "n_genes": 300,
        "label_counts": {"a": 150, "b": 40, "c": 10},
        "depth": {"mean": 900.0, "sd": 200.0},
        "rare_threshold": 20,
        "tasks": ["garage"],
    }
    adata = simulate_like(card)
    assert adata.shape == (200, 300)
    facts = adata.uns["dataset"]
    assert facts["label_counts"] == card["label_counts"]
    assert facts["name"] == "simulated:toy" and "none is real" in facts["title"]
    assert facts["simulated"] and facts["rare_threshold"] == 20
    totals = np.asarray(adata.layers["counts"].sum(1)).ravel()
    assert totals.mean() == pytest.approx(900, rel=0.05)
    assert totals.std() == pytest.approx(200, rel=0.2)
    unknown = simulate_like({**card, "depth": {"mean": None, "sd": None}})
    assert "not the depth (unknown)" in unknown.uns["dataset"]["notes"]


def test_muraro_size_stays_sparse():
    adata = datasets.load("simulated:muraro", verbose=False)
    assert adata.shape == (2126, 19156)
    assert adata.obs["cell_type"].value_counts()["epsilon"] == 3
    for layer in (adata.X, adata.layers["counts"], adata.layers["true_counts"]):
        assert sp.issparse(layer) and layer.nnz < 0.2 * 2126 * 19156
    dense = [v.nbytes for v in adata.layers.values() if not sp.issparse(v)]
    assert sum(dense) < 200e6


def test_round_trip_through_a_file(tmp_path):
    adata = simulate(40, 20)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    back = ad.read_h5ad(tmp_path / "cells.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert back.uns["dataset"]["name"] == "simulated"


def test_blobs():
    adata = blobs(1000, seed=0)
    assert adata.shape == (1000, 2) and adata.var_names.tolist() == ["x", "y"]
    sizes = adata.obs["cell_type"].value_counts()
    assert sizes["rare"] == 30 and sizes.drop("rare").tolist() == [194] * 5
    datasets.check_anndata(adata, label_key="cell_type")
    points, centres = adata.X.toarray(), adata.uns["centres"]
    for i, name in enumerate(adata.obs["cell_type"].cat.categories):
        mine = points[(adata.obs["cell_type"] == name).to_numpy()]
        np.testing.assert_allclose(mine.mean(0), centres[i], atol=0.15)
        assert mine.std(0).mean() == pytest.approx(0.25, rel=0.25)
    gaps = np.linalg.norm(centres[:, None] - centres, axis=-1)
    assert gaps[gaps > 0].min() > 8 * 0.25
