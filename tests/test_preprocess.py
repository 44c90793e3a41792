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
