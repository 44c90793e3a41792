"""Baselines of integration and label transfer: contract, projection, both ends."""

from __future__ import annotations

import importlib.util
import json
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scgenlib import integrators, metrics
from scgenlib.errors import ConfigError, DataError
from scgenlib.estimator import data_hash
from scgenlib.preprocess import normalise, select_genes
from scgenlib.simulate import simulate


@pytest.fixture(scope="module")
def cells():
    """Two batches of the same types; in the second some genes are raised."""
    made = simulate(400, 80, seed=0)
    batch = np.array(["x", "y"])[np.arange(400) % 2]
    raised = np.random.default_rng(0).choice([1.0, 3.0], 80)
    counts = made.layers["counts"].toarray()
    counts[batch == "y"] = np.rint(counts[batch == "y"] * raised)
    made.layers["counts"] = sp.csr_matrix(counts, dtype=np.float32)
    made.X = normalise(made.layers["counts"])
    made.obs["batch"] = pd.Categorical(batch)
    return made


@pytest.mark.parametrize("integrate", [integrators.pca, integrators.harmony])
def test_contract(integrate, cells, capfd):
    before, state = data_hash(cells), np.random.get_state()[1].copy()
    out = integrate(cells, n_pcs=10)
    assert out.shape == (400, 10) and out.X.dtype == np.float32
    assert list(out.var_names[:2]) == ["z0", "z1"]
    pd.testing.assert_frame_equal(out.obs, cells.obs)
    about = out.uns["scgenlib"]
    assert about["method"].startswith("baseline: ") and about["n_training_cells"] == 400
    assert about["data_hash"] == before == data_hash(cells)
    assert json.loads(about["config"])["n_pcs"] == 10
    np.testing.assert_array_equal(integrate(cells, n_pcs=10).X, out.X)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    printed = capfd.readouterr()
    assert printed.err == printed.out == ""


def test_the_result_can_be_written(cells, tmp_path):
    out = integrators.pca(cells, n_pcs=3)
    out.write_h5ad(tmp_path / "z.h5ad")
    assert ad.read_h5ad(tmp_path / "z.h5ad").uns["scgenlib"]["seed"] == 0


def test_pca_of_the_fitted_cells_and_of_new_ones(cells):
    Z = integrators.pca(cells, n_pcs=5).X
    x = cells.X.toarray() - cells.X.toarray().mean(0)
    s = np.linalg.svd(x, compute_uv=False)
    # Squared lengths are the squared singular values, largest first.
    np.testing.assert_allclose((Z**2).sum(0), s[:5] ** 2, rtol=1e-3)
    train, query = cells[:300], cells[300:]
    placed = integrators.pca(query, n_pcs=5, fit_on=train)
    both = integrators.pca(cells, n_pcs=5, fit_on=train)
    np.testing.assert_allclose(both.X[300:], placed.X, atol=1e-4)
    np.testing.assert_allclose(both.X[:300], integrators.pca(train, 5).X, atol=1e-4)
    # A cell's place depends on no other query cell.
    one = integrators.pca(query[7:8], n_pcs=5, fit_on=train)
    np.testing.assert_allclose(one.X, placed.X[7:8], atol=1e-4)
    assert placed.uns["scgenlib"]["data_hash"] == data_hash(train)
    assert list(placed.obs_names) == list(query.obs_names)


def test_genes_are_chosen_and_matched_by_the_fitted_cells(cells):
    train, query = cells[:300], cells[300:]
    want = integrators.pca(query, 5, n_genes=20, fit_on=train)
    chosen = select_genes(train, 20)
    mixed = query[:, np.random.default_rng(0).permutation(80)]
    few = integrators.pca(query[:, chosen], 5, fit_on=train[:, chosen])
    for found in (integrators.pca(mixed, 5, n_genes=20, fit_on=train), few):
        np.testing.assert_allclose(found.X, want.X, atol=1e-4)
    with pytest.raises(DataError, match="such as"):
        integrators.pca(query[:, :40], 5, fit_on=train)
    with pytest.raises(ConfigError, match="n_pcs"):
        integrators.pca(cells, 0)


def test_harmony_mixes_what_pca_does_not(cells):
    arms = {
        f.__name__: f(cells, n_pcs=10) for f in (integrators.pca, integrators.harmony)
    }
    found = {
        name: metrics.integration_scores(
            Z, "cell_type", "batch", arms["pca"], resolutions=()
        )
        for name, Z in arms.items()
    }
    assert found["pca"]["ilisi"] < 0.3 and found["pca"]["pcr_comparison"] == 0
    assert found["harmony"]["ilisi"] > found["pca"]["ilisi"] + 0.5
    assert found["harmony"]["pcr_comparison"] > 0.9
    assert found["harmony"]["bio"] > found["pca"]["bio"] > 0.8


def test_harmony_needs_batches(cells):
    one = cells.copy()
    one.obs["batch"] = "x"
    with pytest.raises(DataError, match="will not do"):
        integrators.harmony(one)
    one.obs["batch"] = [None, *["x", "y"] * 199, "x"]
    with pytest.raises(DataError, match="1 missing"):
        integrators.harmony(one)
    with pytest.raises(DataError, match="Did you mean 'batch'"):
        integrators.harmony(cells, "btch")
    with pytest.raises(DataError, match="60 cells"):
        integrators.harmony(cells[:50])


def test_scvi_absent_says_what_to_do(cells, monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ConfigError, match=r"scgenlib\[integration\]"):
        integrators.scvi(cells)


@pytest.mark.skipif(not importlib.util.find_spec("scvi"), reason="an extra")
def test_scvi_when_there(cells):
    before = data_hash(cells)
    out = integrators.scvi(cells, n_latent=4, max_epochs=2)
    assert out.shape == (400, 4) and np.isfinite(out.X).all()
    assert list(out.obs_names) == list(cells.obs_names) and data_hash(cells) == before
    again = integrators.scvi(cells, n_latent=4, max_epochs=2)
    np.testing.assert_array_equal(out.X, again.X)


# ------------------------------------------------------------- label transfer

TRAIN = np.array([[0.0], [1], [2], [10], [11], [12]])
LABELS = list("bbbaaa")


def test_knn_votes_by_hand():
    query = np.array([[1.0], [11], [5.9]])
    p = integrators.knn_labels(TRAIN, LABELS, query, k=3)
    assert list(p.columns) == ["a", "b"]
    np.testing.assert_allclose(p, [[0, 1], [1, 0], [1 / 3, 2 / 3]])
    # With more neighbours than cells, all vote.
    np.testing.assert_allclose(integrators.knn_labels(TRAIN, LABELS, query, 99), 0.5)
    with pytest.raises(ConfigError, match="1 or more"):
        integrators.knn_labels(TRAIN, LABELS, query, 0)


def test_logistic_is_a_logistic_curve():
    query = np.array([[1.0], [6], [11]])
    p = integrators.logistic_labels(TRAIN, LABELS, query)
    np.testing.assert_allclose(p.sum(1), 1)
    assert p["b"][0] == pytest.approx(p["a"][2]) and p["b"][0] > 0.75
    assert p["a"][1] == pytest.approx(0.5, abs=1e-3)  # midway, by symmetry
    # Units do not matter: coordinates are scaled.
    scaled = integrators.logistic_labels(TRAIN * 1e4, LABELS, query * 1e4)
    np.testing.assert_allclose(scaled, p, atol=1e-6)


@pytest.mark.parametrize("carry", [integrators.knn_labels, integrators.logistic_labels])
def test_labels_of_anndata_and_unlabelled_cells(carry):
    labels = pd.Series([*LABELS, "undefined", None])
    Z = np.vstack([TRAIN, [[1.0], [1.0]]])
    query = AnnData(np.array([[1.0], [11]]), obs=pd.DataFrame(index=["c1", "c2"]))
    p = carry(Z, labels, query)
    assert list(p.index) == ["c1", "c2"] and list(p.columns) == ["a", "b"]
    pd.testing.assert_frame_equal(p, carry(TRAIN, LABELS, query))
    assert metrics.transfer_scores(["b", "a"], carry(Z, labels, query))["n"] == 2
    with pytest.raises(DataError, match="needs labels"):
        carry(TRAIN, [None] * 6, query)
    with pytest.raises(DataError, match="needs labels"):
        carry(TRAIN, LABELS[:3], query)


def test_logistic_needs_two_types():
    with pytest.raises(DataError, match="one type only"):
        integrators.logistic_labels(TRAIN, ["a"] * 6, TRAIN)
