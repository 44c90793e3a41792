"""Normalising, value scales, gene choice, splits, rare types."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scgenlib import preprocess
from scgenlib.errors import ConfigError, DataError
from scgenlib.simulate import simulate


def small(X, labels=None, **kwargs):
    X = sp.csr_matrix(np.asarray(X, dtype=np.float32))
    obs = pd.DataFrame(index=[f"c{i}" for i in range(X.shape[0])])
    if labels is not None:
        obs["cell_type"] = labels
    var = pd.DataFrame(index=[f"g{i}" for i in range(X.shape[1])])
    return ad.AnnData(X, obs=obs, var=var, **kwargs)


# --- normalise ---------------------------------------------------------------------


def test_normalise_by_hand():
    # Totals 4 and 2 scaled to 8: the first cell doubles, the second is times 4.
    out = preprocess.normalise(np.array([[1, 3, 0], [0, 2, 0]]), target_sum=8)
    expected = np.log1p([[2, 6, 0], [0, 8, 0]])
    assert sp.issparse(out) and out.format == "csr" and out.dtype == np.float32
    np.testing.assert_allclose(out.toarray(), expected, rtol=1e-6)


def test_normalise_without_target_takes_the_logarithm_only():
    out = preprocess.normalise(sp.csr_matrix([[1.5, 0.0], [0.0, 4.0]]), None)
    np.testing.assert_allclose(out.toarray(), np.log1p([[1.5, 0], [0, 4]]), rtol=1e-6)


def test_normalise_leaves_input_and_empty_cells_alone():
    X = sp.csr_matrix(np.array([[0, 0], [1, 1]], dtype=np.float32))
    before = X.toarray().copy()
    out = preprocess.normalise(X, 10)
    np.testing.assert_array_equal(X.toarray(), before)
    assert out[0].nnz == 0
    with pytest.raises(DataError, match="Negative"):
        preprocess.normalise(np.array([[1.0, -2.0]]))


def test_normalise_does_not_depend_on_other_cells():
    counts = np.random.default_rng(0).poisson(1.0, (20, 30)) + np.eye(20, 30)
    all_cells = preprocess.normalise(counts).toarray()
    np.testing.assert_array_equal(
        preprocess.normalise(counts[:5]).toarray(), all_cells[:5]
    )


def test_linear_values_are_counts_where_there_are_any():
    counts = np.array([[1.0, 3.0, 0.0], [0.0, 2.0, 5.0]])
    logged = small(np.log1p(2 * counts))
    linear = preprocess.linear_values(logged)
    assert linear.format == "csr" and linear.dtype == np.float32
    np.testing.assert_allclose(linear.toarray(), 2 * counts, rtol=1e-6)
    # The logarithms themselves stay.
    np.testing.assert_allclose(logged.X.toarray(), np.log1p(2 * counts), rtol=1e-6)
    logged.layers["counts"] = counts
    assert np.array_equal(preprocess.linear_values(logged).toarray(), counts)


def test_scale_rows_by_hand():
    X = sp.csr_matrix(np.array([[1, 3, 0], [0, 0, 0], [0, 2, 0]], np.float32))
    out = preprocess.scale_rows(X, 20_000)
    assert out.toarray().tolist() == [[5000, 15_000, 0], [0, 0, 0], [0, 20_000, 0]]
    assert out.format == "csr" and out.dtype == np.float32
    assert X.sum() == 6
    assert np.array_equal(preprocess.scale_rows(X.toarray(), 8).toarray()[0], [2, 6, 0])


def test_on_genes_scales_over_these_genes_only():
    counts = np.array([[1.0, 3.0, 4.0], [6.0, 2.0, 0.0]])
    adata = small(np.log1p(counts), ["a", "b"], layers={"counts": counts})
    out = preprocess.on_genes(adata, ["g1", "g0"], 8)
    # 3 and 1 of 4, 2 and 6 of 8; the gene that is left out does not count.
    np.testing.assert_allclose(out.X.toarray(), np.log1p([[6, 2], [2, 6]]), rtol=1e-6)
    assert list(out.var_names) == ["g1", "g0"]
    assert out.obs["cell_type"].tolist() == ["a", "b"]
    out.obs["cell_type"] = "c"
    assert adata.obs["cell_type"].tolist() == ["a", "b"]
    with pytest.raises(DataError, match="2 of 3, such as 'g8'"):
        preprocess.on_genes(adata, ["g0", "g8", "g9"])


def test_draw_molecules():
    X = sp.csr_matrix(np.array([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]]))
    totals = np.array([40_000, 50, 7])
    counts = preprocess.draw_molecules(X, totals, np.random.default_rng(0))
    assert counts.format == "csr" and counts.dtype == np.float32
    found = counts.toarray()
    assert np.array_equal(found, np.rint(found))
    assert found.sum(1).tolist() == [40_000, 0, 7]
    # A quarter of 40,000, give or take five standard deviations of 87.
    assert abs(found[0, 0] - 10_000) < 435 and found[0, 2] == found[2, 1] == 0
    # What no molecule was drawn for is not stored.
    few = preprocess.draw_molecules(X, np.array([1, 1, 1]), np.random.default_rng(0))
    assert few.nnz == 2
    # Ten times the values are the same shares; another source, other counts.
    again = preprocess.draw_molecules(10 * X, totals, np.random.default_rng(0))
    assert np.array_equal(again.toarray(), found)
    other = preprocess.draw_molecules(X, totals, np.random.default_rng(1))
    assert not np.array_equal(other.toarray(), found)
    assert X.sum() == 8


# --- value scale -------------------------------------------------------------------


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(1)
    X = rng.poisson(rng.gamma(0.5, 2.0, (60, 80)))
    X[:, 0] = 1
    return X.astype(np.float32)


@pytest.mark.parametrize("sparse", [True, False])
def test_value_scale_of_each_kind(counts, sparse):
    wrap = sp.csr_matrix if sparse else np.asarray
    scaled_up = counts / counts.sum(1, keepdims=True) * 1e4
    logged = np.log1p(scaled_up)
    assert preprocess.value_scale(wrap(counts)) == "counts"
    assert preprocess.value_scale(wrap(scaled_up)) == "normalised"
    assert preprocess.value_scale(wrap(logged)) == "log1p"
    assert preprocess.value_scale(wrap(logged / np.log(2))) == "log2"
    assert preprocess.value_scale(wrap(logged - logged.mean(0))) == "scaled"


def test_value_scale_of_a_gene_subset(counts):
    # Totals are no longer equal: only the steps of one molecule give it away.
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)[:, :30]
    totals = np.expm1(logged).sum(1)
    assert np.ptp(totals) > 0.1 * totals.mean()
    assert preprocess.value_scale(logged) == "log1p"


def test_value_scale_does_not_guess():
    X = np.random.default_rng(2).uniform(0, 5, (40, 30))
    with pytest.raises(DataError, match="Cannot tell.*layers.*uns"):
        preprocess.value_scale(X)
    # The file's own word counts where nothing contradicts it ...
    assert preprocess.value_scale(X, log1p_mark=True) == "log1p"
    # ... and not where something does.
    assert preprocess.value_scale(X - 1, log1p_mark=True) == "scaled"
    assert preprocess.value_scale(X * 100, log1p_mark=True) == "normalised"


def test_value_scale_refuses_nan_and_nothing():
    with pytest.raises(DataError, match="NaN or infinite"):
        preprocess.value_scale(np.array([[1.0, np.nan], [2.0, np.inf]]))
    with pytest.raises(DataError, match="empty"):
        preprocess.value_scale(sp.csr_matrix((3, 4)))


# --- genes -------------------------------------------------------------------------


def test_filter_genes_by_hand():
    X = np.array([[6, 1, 0, 5], [7, 0, 0, 5], [0, 9, 0, 5], [0, 0, 0, 5]], float)
    adata = small(np.log1p(X), layers={"counts": sp.csr_matrix(X)})
    kept = preprocess.filter_genes(adata, min_cells_fraction=0.5, min_value=5)
    assert kept.tolist() == [True, False, False, False]
    kept = preprocess.filter_genes(adata, min_cells_fraction=0.25, min_value=0)
    assert kept.tolist() == [True, True, False, True]
    # Without counts the logarithm is undone: the answer is the same.
    del adata.layers["counts"]
    kept = preprocess.filter_genes(adata, min_cells_fraction=0.25, min_value=5.5)
    assert kept.tolist() == [True, True, False, False]
    for bad in ({"min_cells_fraction": 1.5}, {"min_value": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            preprocess.filter_genes(adata, **bad)


def test_filter_cells_and_genes_by_hand():
    X = np.array(
        [
            [1, 1, 0, 0],
            [1, 0, 9, 0],
            [0, 0, 1, 0],  # one gene: dropped before genes are counted
            [5, 1, 0, 2],
        ],
        float,
    )
    adata = small(np.log1p(X), ["a", "b", "c", "d"])
    kept = preprocess.filter_cells_and_genes(adata, min_genes=2, min_cells=2)
    # Gene g2 is seen in two cells at first, and in one of the cells that are left.
    assert kept.obs_names.tolist() == ["c0", "c1", "c3"]
    assert kept.var_names.tolist() == ["g0", "g1"]
    assert kept.obs["cell_type"].tolist() == ["a", "b", "d"]
    # Exactly as many as asked for is enough.
    kept = preprocess.filter_cells_and_genes(adata, min_genes=3, min_cells=1)
    assert kept.shape == (1, 3)
    kept.X.data[:] = 0
    assert adata.X.toarray()[3, 0] == np.float32(np.log1p(5))
    # Counts decide where there are any.
    adata.layers["counts"] = sp.csr_matrix(np.ones_like(X))
    assert preprocess.filter_cells_and_genes(adata, 4, 4).shape == (4, 4)


def test_filter_cells_and_genes_that_leaves_nothing():
    adata = small(np.eye(3) + 1.5)
    with pytest.raises(DataError, match=r"0 cells and 0 genes.*min_genes \(now 4\)"):
        preprocess.filter_cells_and_genes(adata, 4, 1)
    with pytest.raises(DataError, match=r"3 cells and 0 genes.*min_cells \(4\)"):
        preprocess.filter_cells_and_genes(adata, 1, 4)


def test_select_genes_finds_the_markers():
    adata = simulate(600, 400, programmes=0.0, rare_fraction=0.2, seed=4)
    is_marker = adata.var["marker_of"].to_numpy() != ""
    chosen = preprocess.select_genes(adata, 60)
    share = is_marker[adata.var_names.get_indexer(chosen)].mean()
    # 120 of 400 genes are markers: chance is 0.3.
    assert is_marker.sum() == 120 and share > 0.8


def test_select_genes_sparse_dense_and_order():
    adata = simulate(200, 100, seed=5)
    chosen = preprocess.select_genes(adata, 30)
    dense = adata.copy()
    dense.X = adata.X.toarray()
    assert chosen.tolist() == preprocess.select_genes(dense, 30).tolist()
    assert chosen.tolist() == sorted(chosen, key=adata.var_names.get_loc)
    shuffled = adata[np.random.default_rng(0).permutation(200)].copy()
    assert set(chosen) == set(preprocess.select_genes(shuffled, 30))


def test_select_genes_at_the_edges():
    X = np.array([[1, 2, 0], [3, 2, 0], [5, 2, 0]], float)
    assert preprocess.select_genes(small(X), 3).tolist() == ["g0"]
    with pytest.raises(ConfigError, match="n_genes"):
        preprocess.select_genes(small(X), 0)
    with pytest.raises(DataError, match="No gene varies"):
        preprocess.select_genes(small(X[:, 1:]), 2)


# --- split -------------------------------------------------------------------------


def test_split_is_stratified_and_complete():
    labels = ["a"] * 70 + ["b"] * 20 + ["c"] * 2 + ["d"]
    adata = small(np.arange(1, 94).reshape(-1, 1), labels)
    train, test = preprocess.split(adata, test_size=0.3, seed=1)
    assert test.obs["cell_type"].value_counts().to_dict() == {"a": 21, "b": 6, "c": 1}
    assert sorted([*train.obs_names, *test.obs_names]) == sorted(adata.obs_names)
    assert not set(train.obs_names) & set(test.obs_names)
    # Original order, and copies: changing one side leaves the data alone.
    assert (np.diff(train.X.toarray().ravel()) > 0).all()
    train.X.data[:] = 0
    assert adata.X.sum() == 93 * 94 / 2


def test_split_follows_the_seed():
    adata = small(np.ones((50, 1)), ["a"] * 25 + ["b"] * 25)
    first, again, other = (
        preprocess.split(adata, seed=s)[1].obs_names.tolist() for s in (0, 0, 1)
    )
    assert first == again != other
    plain = preprocess.split(adata, seed=0, stratify=False, test_size=0.2)[1]
    assert plain.n_obs == 10


def test_split_errors():
    adata = small(np.ones((3, 1)), ["a", "b", "c"])
    with pytest.raises(ConfigError, match="test_size.*1.0"):
        preprocess.split(adata, test_size=1.0)
    with pytest.raises(DataError, match="Did you mean 'cell_type'"):
        preprocess.split(adata, label_key="celltype")
    with pytest.raises(DataError, match="No cell can be held out"):
        preprocess.split(adata)


def sizes_by_type(adata, side):
    part = adata.obs[adata.obs["split"] == side]
    return part["cell_type"].value_counts(sort=False).sort_index().tolist()


def test_train_valid_test_takes_each_type_by_its_share():
    labels = np.repeat(list("abcde"), [3000, 2500, 2000, 1500, 1000])
    adata = small(np.ones((10_000, 1)), labels)
    out = preprocess.train_valid_test(adata, 2000, seed=0)
    assert sizes_by_type(out, "valid") == [600, 500, 400, 300, 200]
    assert sizes_by_type(out, "train") == [2400, 2000, 1600, 1200, 800]
    assert out.uns["split"]["found"] == {"train": 8000, "valid": 2000, "test": 0}
    assert "split" not in adata.obs and "split" not in adata.uns


def test_train_valid_test_records_what_rounding_left():
    # Of 10 cells 4 and 3 are asked for; shares .7, .2 and .1 are rounded down.
    adata = small(np.ones((10, 1)), ["a"] * 7 + ["b"] * 2 + ["c"])
    out = preprocess.train_valid_test(adata, 4, 3, seed=0)
    assert sizes_by_type(out, "valid") == [2] and sizes_by_type(out, "test") == [2]
    assert out.uns["split"] == {
        "asked": {"valid": 4, "test": 3},
        "found": {"train": 6, "valid": 2, "test": 2},
        "seed": 0,
        "by_type": True,
    }


def test_train_valid_test_without_types_is_exact():
    adata = small(np.ones((101, 1)))
    out = preprocess.train_valid_test(adata, 30, 21, label_key=None)
    found = {"train": 50, "valid": 30, "test": 21}
    assert out.uns["split"]["found"] == found
    # Each cell is on one side, and only on one.
    assert out.obs["split"].value_counts().to_dict() == found
    assert not out.uns["split"]["by_type"]
    first = out.obs["split"].tolist()
    for seed, same in ((0, True), (1, False)):
        again = preprocess.train_valid_test(adata, 30, 21, label_key=None, seed=seed)
        assert (again.obs["split"].tolist() == first) == same


def test_train_valid_test_errors():
    adata = small(np.ones((10, 1)), ["a"] * 10)
    for sizes in ((10, 0), (5, 5), (-1, 0), (3, -1)):
        with pytest.raises(ConfigError, match=f"{sizes[0]} and {sizes[1]}.*10 cells"):
            preprocess.train_valid_test(adata, *sizes)
    with pytest.raises(DataError, match="Did you mean 'cell_type'"):
        preprocess.train_valid_test(adata, 2, label_key="celltype")


# --- rare types --------------------------------------------------------------------


def test_rare_types_by_threshold_and_rule():
    labels = ["x"] * 30 + ["y"] * 25 + ["z"] * 8
    assert preprocess.rare_types(labels, 25) == ["z"]
    assert preprocess.rare_types(labels, 25, "<=") == ["z", "y"]
    assert preprocess.rare_types(pd.Series(labels).astype("category"), 26) == ["z", "y"]


def test_rare_types_without_threshold():
    # 100 cells: the smallest (tied) and those under 5 %.
    labels = ["a"] * 60 + ["b"] * 30 + ["c"] * 4 + ["d"] * 3 + ["e"] * 3
    assert preprocess.rare_types(labels) == ["d", "e", "c"]
    assert preprocess.rare_types(["a"] * 6 + ["b"] * 4) == ["b"]


def test_rare_types_errors():
    with pytest.raises(DataError, match="smallest is 'b' with 4.*5 or more"):
        preprocess.rare_types(["a"] * 6 + ["b"] * 4, 4)
    with pytest.raises(ConfigError, match="rule"):
        preprocess.rare_types(["a", "b"], 2, ">")


# --- entries that are hidden -------------------------------------------------------


@pytest.fixture(scope="module")
def molecules():
    made = simulate(80, 50, seed=4)
    made.uns["dataset"]["recipe"]["target_sum"] = 5000
    return made


def test_hidden_entries_are_the_ones_that_are_gone(molecules):
    before = molecules.copy()
    out = preprocess.hide_entries(molecules, 0.2, seed=3)
    full, seen, hidden = (
        out.layers[name] for name in ("true_counts", "counts", "hidden")
    )
    assert (full != before.layers["counts"]).nnz == 0
    assert hidden.format == seen.format == "csr" and hidden.dtype == bool
    gone = hidden.toarray()
    assert (full.toarray()[gone] > 0).all() and (seen.toarray()[gone] == 0).all()
    assert (seen.toarray()[~gone] == full.toarray()[~gone]).all()
    assert seen.nnz + hidden.nnz == full.nnz and (seen.data > 0).all()
    assert hidden.nnz / full.nnz == pytest.approx(0.2, abs=0.02)
    # In every part of the matrix alike.
    for part in (gone[:40], gone[40:], gone[:, :25], gone[:, 25:]):
        base = full.toarray() > 0
        own = base[:40] if part.shape == (40, 50) else base[:, :25]
        assert part.sum() / own.sum() == pytest.approx(0.2, abs=0.06)
    # X is made again of what is left, on the scale of the card.
    expected = preprocess.normalise(seen, 5000)
    assert (out.X != expected).nnz == 0
    assert list(out.obs_names) == list(before.obs_names)
    assert list(out.var_names) == list(before.var_names)
    assert (molecules.layers["counts"] != before.layers["counts"]).nnz == 0
    assert "hidden" not in molecules.layers


def test_hidden_entries_follow_the_seed(molecules):
    one, two, other = (preprocess.hide_entries(molecules, 0.3, s) for s in (1, 1, 2))
    assert (one.layers["hidden"] != two.layers["hidden"]).nnz == 0
    assert (one.layers["hidden"] != other.layers["hidden"]).nnz > 0


def test_a_cell_keeps_an_entry():
    counts = sp.csr_matrix(
        np.eye(30, 40) + np.eye(30, 40, 1) * (np.arange(30) < 15)[:, None]
    )
    adata = small(np.log1p(counts.toarray()), layers={"counts": counts})
    out = preprocess.hide_entries(adata, 0.9, seed=0)
    left = np.asarray((out.layers["counts"] > 0).sum(1)).ravel()
    assert (left >= 1).all() and (left[15:] == 1).all()
    assert out.layers["hidden"].nnz > 5
    # Without a card: 10,000 a cell.
    totals = np.expm1(out.X.toarray().astype(float)).sum(1)
    np.testing.assert_allclose(totals, 1e4, rtol=1e-4)


def test_zeros_that_are_stored_cannot_be_hidden():
    stored = sp.csr_matrix(np.full((20, 30), 2.0))
    stored.data[::2] = 0
    adata = small(np.log1p(stored.toarray()), layers={"counts": stored})
    out = preprocess.hide_entries(adata, 0.5, seed=0)
    assert out.layers["true_counts"].nnz == 300
    assert (
        out.layers["true_counts"].toarray()[out.layers["hidden"].toarray()] == 2
    ).all()
    assert stored.nnz == 600  # the caller's matrix is as it was
    dense = small(np.log1p(stored.toarray()), layers={"counts": stored.toarray()})
    again = preprocess.hide_entries(dense, 0.5, seed=0)
    assert (again.layers["hidden"] != out.layers["hidden"]).nnz == 0


def test_entries_that_cannot_be_hidden(molecules):
    for share in (0.0, 1.0, -0.1, 2.0):
        with pytest.raises(ConfigError, match="share.*strictly between 0 and 1"):
            preprocess.hide_entries(molecules, share)
    bare = molecules.copy()
    del bare.layers["counts"]
    with pytest.raises(DataError, match="Only counts can be hidden"):
        preprocess.hide_entries(bare)
