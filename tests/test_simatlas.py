"""The simulated atlas keeps its promises: each dial does what it says."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from scgenlib import datasets, simatlas
from scgenlib.errors import ConfigError
from scgenlib.preprocess import value_scale
from scgenlib.simatlas import atlas, atlas_blocks

TWO = {"A": {"A1": 3.0, "A2": 1.0}, "B": {"B1": 2.0}}


def shares(adata: ad.AnnData, column: str) -> float:
    """Return how often one of a cell's 15 neighbours in PCA has its `column`."""
    codes = PCA(20, random_state=0).fit_transform(adata.X.toarray())
    found = NearestNeighbors(n_neighbors=15).fit(codes).kneighbors()[1]
    values = adata.obs[column].to_numpy(str)
    return float((values[found] == values[:, None]).mean())


def shift_of(adata: ad.AnnData) -> np.ndarray:
    """Return the batches' log folds, batch x type x gene."""
    types = adata.varm["profile"].shape[1]
    return adata.varm["batch_shift"].to_numpy().T.reshape(-1, types, adata.n_vars)


def test_contract_and_truth():
    adata = atlas(500, 120, n_query_batches=1, novel="C2")
    datasets.check_anndata(adata, label_key="cell_type", need_counts=True)
    counts = adata.layers["counts"]
    for matrix in (adata.X, counts):
        assert sp.issparse(matrix) and matrix.dtype == np.float32
    assert (value_scale(adata.X), value_scale(counts)) == ("log1p", "counts")
    obs = adata.obs
    assert obs["batch"].value_counts(sort=False).to_dict() == {
        **dict.fromkeys(["batch1", "batch2", "batch3", "batch4", "query1"], 100)
    }
    assert set(obs["batch"][obs["cell_type"] == "C2"]) == {"query1"}
    assert ((obs["batch"] == "query1") == (obs["set"] == "query")).all()
    assert (obs["cell_type"].astype(str).str[0] == obs["lineage"]).all()
    truth = adata.layers["true_expression"]
    np.testing.assert_allclose(truth.sum(1), obs["depth"], rtol=1e-4)
    # Each true mean follows from the tables: profile, shift, depth.
    cell, pair = 7, f"{obs['batch'].iloc[7]}|{obs['cell_type'].iloc[7]}"
    weight = adata.varm["profile"][obs["cell_type"].iloc[cell]]
    weight = weight * np.exp(adata.varm["batch_shift"][pair])
    expected = obs["depth"].iloc[cell] * weight / weight.sum()
    np.testing.assert_allclose(truth[cell], expected, rtol=1e-4)
    card = adata.uns["dataset"]
    assert card["simulated"] and card["truth"]["novel"] == "C2"


def test_markers_and_hierarchy():
    for hierarchy in (0.0, 0.36, 1.0):
        adata = atlas(100, 200, hierarchy=hierarchy, seed=1)
        logs = np.log(adata.varm["profile"])
        plain = (adata.var[["marker_of", "lineage_marker_of"]] == "").all(axis=1)
        # Against C1, up to the constant that makes shares sum to 1.
        fold = logs["A1"] - logs["C1"]
        fold -= fold[plain].mean()
        owns = {
            "lineage_marker_of": ("A", hierarchy),
            "marker_of": ("A1", 1 - hierarchy),
        }
        for column, (name, share) in owns.items():
            mine = fold[adata.var[column] == name]
            assert len(mine) == 6
            low, high = np.sqrt(share) * np.log([6, 40])
            assert mine.min() >= low - 1e-9 and mine.max() <= high + 1e-9
        siblings = np.abs(logs["A1"] - logs["A2"]).max()
        assert (siblings < 1e-9) == (hierarchy == 1.0)


def test_batch_strength_and_type_specific_share():
    for share in (0.0, 0.5, 1.0):
        adata = atlas(100, 2000, batch_strength=0.7, type_specific=share, seed=2)
        shift = shift_of(adata)
        assert shift.shape == (4, 8, 2000)
        assert shift.std() == pytest.approx(0.7, rel=0.05)
        # What two types share of a batch's shift is the part common to all.
        common = (shift[:, 0] * shift[:, 1]).mean() / 0.7**2
        assert common == pytest.approx(1 - share, abs=0.06)
        assert (shift == shift[:, :1]).all() == (share == 0.0)
    assert not shift_of(atlas(100, 50, batch_strength=0.0)).any()


def test_composition():
    even = atlas(48, 30, n_batches=2, lineages=TWO, composition=0.0)
    table = even.obs.groupby(["batch", "cell_type"], observed=False).size().unstack()
    assert table.to_numpy().tolist() == [[12, 4, 8], [12, 4, 8]]
    # One cell over goes to the first batch, by the largest remainder.
    odd = atlas(49, 30, n_batches=2, lineages=TWO, composition=0.0)
    table = odd.obs.groupby(["batch", "cell_type"], observed=False).size().unstack()
    assert table.to_numpy().tolist() == [[13, 4, 8], [12, 4, 8]]
    spread = []
    for dial in (0.2, 1.0):
        obs = atlas(4000, 30, composition=dial).obs
        table = obs.groupby(["batch", "cell_type"], observed=False).size().unstack()
        spread.append(np.log(table / 1000 + 1e-3).std().mean())
    assert 0.2 < spread[0] < 0.8 < 1.0 < spread[1]


def test_depth_of_each_batch():
    adata = atlas(2000, 60, n_batches=2, lineages=TWO, depth=[300, 900], seed=3)
    total = np.asarray(adata.layers["counts"].sum(1)).ravel()
    for batch, mean in (("batch1", 300), ("batch2", 900)):
        mine = total[(adata.obs["batch"] == batch).to_numpy()]
        assert mine.mean() == pytest.approx(mean, rel=0.06)
    facts = adata.uns["dataset"]["depth"]
    assert facts["mean"] == pytest.approx(600, rel=0.05)


@pytest.mark.parametrize("dispersion", [0.0, 0.5])
def test_dispersion_is_the_excess_variance(dispersion):
    adata = atlas(2000, 60, dispersion=dispersion, depth=600, seed=4)
    counts, mu = adata.layers["counts"].toarray(), adata.layers["true_expression"]
    assert counts.sum() == pytest.approx(mu.sum(), rel=0.01)
    excess = ((counts - mu) ** 2 - mu).sum() / (mu**2).sum()
    assert excess == pytest.approx(dispersion, abs=0.06)


def test_zero_inflation():
    adata = atlas(2000, 100, zero_inflation=0.4, depth=2000, seed=5)
    kept = np.asarray(adata.layers["counts"].sum(0)).ravel()
    kept = kept / adata.layers["true_expression"].sum(0)
    p_zero = adata.var["zero_probability"]
    assert p_zero.mean() == pytest.approx(0.4, abs=0.06) and p_zero.std() > 0.1
    np.testing.assert_allclose(kept, 1 - p_zero, atol=0.12)
    assert not atlas(100, 50).var["zero_probability"].any()


def test_no_cell_is_empty():
    counts = atlas(300, 40, depth=0.5, zero_inflation=0.9).layers["counts"]
    assert np.asarray(counts.sum(1)).min() >= 1


def test_the_seed_decides_and_blocks_are_the_same_cells(monkeypatch):
    monkeypatch.setattr(simatlas, "_BLOCK", 64)
    dials = {"n_query_batches": 1, "novel": "B1", "lineages": TWO, "seed": 6}
    whole = atlas(150, 40, **dials)
    blocks = [*atlas_blocks(150, 40, **dials)]
    assert [counts.shape for counts, _ in blocks] == [(64, 40), (64, 40), (22, 40)]
    counts = sp.vstack([counts for counts, _ in blocks])
    assert (counts != whole.layers["counts"]).nnz == 0
    names = [name for _, obs in blocks for name in obs.index]
    assert names == whole.obs_names.tolist()
    for i, (_, obs) in enumerate(blocks):
        assert obs.equals(whole.obs.iloc[64 * i : 64 * (i + 1)])
    other = atlas(150, 40, **dials | {"seed": 7})
    assert (other.X != whole.X).nnz > 0


def test_a_large_atlas_has_no_dense_layer(monkeypatch):
    monkeypatch.setattr(simatlas, "_TRUTH_BYTES", 4 * 100 * 40 - 1)
    assert [*atlas(100, 40).layers] == ["counts"]


def test_round_trip_through_a_file(tmp_path):
    adata = atlas(60, 40)
    adata.write_h5ad(tmp_path / "atlas.h5ad")
    back = ad.read_h5ad(tmp_path / "atlas.h5ad")
    assert (back.X != adata.X).nnz == 0
    assert back.varm["profile"].equals(adata.varm["profile"])
    assert back.uns["dataset"]["truth"]["lineages"]["A"]["A1"] == 20


@pytest.mark.parametrize(
    ("dials", "what"),
    [
        ({"type_specific": 1.1}, "type_specific.*0 to 1"),
        ({"hierarchy": -0.1}, "hierarchy"),
        ({"composition": 2}, "composition"),
        ({"zero_inflation": 1.0}, "zero_inflation.*0.95"),
        ({"batch_strength": -1}, "batch_strength"),
        ({"dispersion": -1}, "dispersion"),
        ({"n_batches": 0}, "n_batches.*1 to"),
        ({"n_query_batches": -1}, "n_query_batches"),
        ({"novel": "C3", "n_query_batches": 1}, "novel type.*'C3'.*C1, C2"),
        ({"novel": "C2"}, "needs a query"),
        ({"depth": [100, 200]}, "depth.*4 of them"),
        ({"depth": 0}, "depth"),
        ({"lineages": {"A": {"A1": 1}}}, "two types"),
        ({"lineages": {"A": {"A1": 1}, "B": {"A1": 1}}}, "each once"),
        ({"lineages": {"A": {"A1": 1, "A2": 0}}}, "sizes above 0"),
        ({"lineages": {"A": {"A1": 1e4, "A2": 1}}}, "no cell.*A2"),
        ({"n_genes": 10}, "11 genes"),
        ({"n_cells": 3}, "4 cells"),
        ({"batch_strenght": 1}, "Did you mean 'batch_strength'"),
    ],
)
def test_bad_dials(dials, what):
    with pytest.raises(ConfigError, match=what):
        atlas(**{"n_cells": 60, "n_genes": 40, **dials})


def test_the_manifest_holds_batches_apart_and_types_too():
    adata = datasets.load("simulated_atlas", verbose=False)
    assert adata.shape == (3000, 600)
    assert shares(adata, "batch") >= 0.9
    for batch in adata.obs["batch"].cat.categories:
        mine = adata[(adata.obs["batch"] == batch).to_numpy()]
        assert shares(mine, "cell_type") >= 0.95
    reference = adata.obs["set"] == "reference"
    assert set(adata.obs["cell_type"][~reference]) - set(
        adata.obs["cell_type"][reference]
    ) == {"C2"}
    # Without a batch effect the same cells mix: 600 of 3,000 are of the same batch.
    dials = adata.uns["dataset"]["truth"] | {"batch_strength": 0.0, "depth": 900}
    assert shares(atlas(**dials), "batch") < 0.35
