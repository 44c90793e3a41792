"""A completed matrix: what was observed stays, on both scales and on disk."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scgenlib import completion, datasets
from scgenlib.completion import assemble, completed, log_counts, to_counts, write
from scgenlib.errors import DataError, OutputError
from scgenlib.estimator import data_hash
from scgenlib.simulate import simulate


def cells(counts) -> ad.AnnData:
    counts = sp.csr_matrix(np.asarray(counts, np.float32))
    obs = pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])])
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    return ad.AnnData(counts.log1p(), obs=obs, var=var, layers={"counts": counts})


def dense(layer) -> np.ndarray:
    return layer.toarray() if sp.issparse(layer) else np.asarray(layer)


@pytest.fixture(scope="module")
def some() -> ad.AnnData:
    made = simulate(50, 30, dropout=0.4, dropout_slope=1.0, seed=0)
    made.obsm["place"] = np.random.default_rng(0).random((50, 2))
    return made


@pytest.fixture(scope="module")
def filled(some) -> np.ndarray:
    return np.random.default_rng(1).gamma(2.0, 1.0, some.shape).astype(np.float32)


def blocks(values, step=17, sd=None):
    """Yield the rows of a matrix a few at a time, as a method would."""
    for first in range(0, len(values), step):
        rows = slice(first, min(first + step, len(values)))
        yield rows, values[rows], None if sd is None else sd[rows]


# ----------------------------------------------------------------------- scales


def test_log_counts_by_hand():
    adata = cells([[1, 3, 0], [0, 0, 0], [2, 4, 2]])
    log = log_counts(adata)
    # Totals 4, 0 and 8; the median of those above 0 is 6.
    assert log.totals.tolist() == [4, 0, 8] and log.totals.dtype == np.float64
    assert log.target == 6.0
    expected = np.log1p([[1.5, 4.5, 0], [0, 0, 0], [1.5, 3, 1.5]])
    assert log.values.format == "csr" and log.values.dtype == np.float32
    np.testing.assert_allclose(log.values.toarray(), expected, rtol=1e-6)
    log = log_counts(adata, 8)
    expected = np.log1p([[2, 6, 0], [0, 0, 0], [2, 4, 2]])
    np.testing.assert_allclose(log.values.toarray(), expected, rtol=1e-6)
    assert log.target == 8.0 and isinstance(log.target, float)
    del adata.layers["counts"]
    with pytest.raises(DataError, match="starts from counts"):
        log_counts(adata)


def test_large_totals_are_exact():
    # float32 cannot tell 2^24 + 1 from 2^24.
    big = cells([[2.0**24, 1, 1, 1], [1, 1, 1, 1]])
    for form in (sp.csr_matrix, np.asarray):
        big.layers["counts"] = form(dense(big.layers["counts"]))
        assert log_counts(big).totals.tolist() == [2**24 + 3, 4]


def test_assemble_by_hand():
    observed = sp.csr_matrix(np.array([[0, 0.7, 0], [1.2, 0, 0]], np.float32))
    made = np.array([[1.0, 2.0, -3.0], [4.0, 5.0, 6.0]])
    out = assemble(observed, made)
    assert out.dtype == np.float32
    expected = np.array([[1, 0.7, 0], [1.2, 5, 6]], np.float32)
    assert (out == expected).all()
    flagged = np.array([[True, False, True], [False, False, True]])
    out = assemble(observed, made, flagged)
    expected = np.array([[1, 0.7, 0], [1.2, 0, 6]], np.float32)
    assert (out == expected).all()
    assert made[0, 2] == -3 and observed.nnz == 2


def test_to_counts_undoes_the_logarithm():
    adata = cells([[1, 3, 0], [0, 0, 7]])
    log = log_counts(adata, 8)
    values = assemble(log.values, np.full((2, 3), np.log1p(4)))
    out = to_counts(values, log, adata.layers["counts"], slice(0, 2))
    # 4 of a total of 8, in cells of total 4 and 7.
    np.testing.assert_allclose(out, [[1, 3, 2], [3.5, 3.5, 7]], rtol=1e-6)
    assert out.dtype == np.float32 and (out[:, 1:][[0, 1], [0, 1]] == [3, 7]).all()
    second = to_counts(values[1:], log, adata.layers["counts"], slice(1, 2))
    assert (second == out[1:]).all()
    free = to_counts(values + 1, log, None, slice(0, 2))
    np.testing.assert_allclose(free, np.expm1(values + 1) * [[0.5], [7 / 8]], rtol=1e-6)


# -------------------------------------------------------------------- in memory


def test_completed_keeps_what_was_observed(some, filled):
    before = some.copy()
    log = log_counts(some)
    values = assemble(log.values, filled)
    out = completed(some, values, log, {"method": "a test"})
    assert data_hash(some) == data_hash(before) and "imputed" not in some.layers
    assert out.uns["scgenlib"] == {"method": "a test", "target_sum": log.target}
    assert set(out.layers) == {*some.layers, "imputed", "imputed_counts"}
    seen = some.layers["counts"].toarray() > 0
    kept = dense(out.layers["imputed"])[seen]
    assert (kept == log.values.toarray()[seen]).all()
    counts = dense(out.layers["imputed_counts"])
    assert (counts[seen] == some.layers["counts"].toarray()[seen]).all()
    expected = np.expm1(filled.astype(float)) * (log.totals / log.target)[:, None]
    np.testing.assert_allclose(counts[~seen], expected[~seen], rtol=1e-5)
    assert list(out.obs_names) == list(some.obs_names)
    # Block by block it is the same.
    parts = completed(some, blocks(values), log, {})
    for name in ("imputed", "imputed_counts"):
        assert (dense(parts.layers[name]) == dense(out.layers[name])).all()


def test_a_denoised_matrix_keeps_nothing(some, filled):
    log = log_counts(some)
    out = completed(some, filled, log, {}, keep_observed=False)
    assert (dense(out.layers["imputed"]) == filled).all()
    expected = np.expm1(filled.astype(float)) * (log.totals / log.target)[:, None]
    np.testing.assert_allclose(dense(out.layers["imputed_counts"]), expected, rtol=1e-5)


def test_layers_are_sparse_where_most_is_zero(some, filled):
    log = log_counts(some)
    rest = np.random.default_rng(0).random(some.shape) < 0.4
    few = completed(some, np.where(rest, filled, 0), log, {}, False)
    many = completed(some, filled, log, {}, False)
    for name in ("imputed", "imputed_counts"):
        assert few.layers[name].format == "csr"
        assert isinstance(many.layers[name], np.ndarray)
        assert few.layers[name].dtype == many.layers[name].dtype == np.float32
    assert "imputed_sd" not in few.layers
    sd = completed(some, blocks(filled, sd=filled / 2), log, {}).layers["imputed_sd"]
    assert (sd == filled / 2).all()


def test_a_matrix_too_large_for_memory_is_refused(some, filled, monkeypatch):
    log = log_counts(some)
    monkeypatch.setattr(completion, "MAX_BYTES", 4 * 50 * 30)
    completed(some, filled, log, {})
    monkeypatch.setattr(completion, "MAX_BYTES", 4 * 50 * 30 - 1)
    with pytest.raises(DataError, match="50 x 30.*file to stream to"):
        completed(some, filled, log, {})
    # A method is not asked for anything before that.
    with pytest.raises(DataError, match="too large"):
        completed(some, (1 / 0 for _ in range(1)), log, {})


# ---------------------------------------------------------------------- on disk


@pytest.mark.parametrize("with_sd", [False, True])
def test_h5ad_is_the_result_in_memory(some, filled, tmp_path, with_sd):
    log = log_counts(some)
    values = assemble(log.values, filled)
    sd = filled / 3 if with_sd else None
    about = {"method": "a test", "seed": 4}
    made = completed(some, blocks(values, sd=sd), log, about)
    path = tmp_path / "out.h5ad"
    parts = blocks(values, 7, sd)
    assert write(some, parts, log, path, about, sd=with_sd) == path
    read = ad.read_h5ad(path)
    assert set(read.layers) == set(made.layers)
    for name in made.layers:
        assert (dense(read.layers[name]) == dense(made.layers[name])).all(), name
        assert read.layers[name].dtype == made.layers[name].dtype
    assert data_hash(read) == data_hash(made)
    pd.testing.assert_frame_equal(read.obs, made.obs)
    pd.testing.assert_frame_equal(read.var.astype(str), made.var.astype(str))
    assert read.uns["scgenlib"] == made.uns["scgenlib"]
    assert read.uns["dataset"]["name"] == made.uns["dataset"]["name"]
    assert ("imputed_sd" in read.layers) == with_sd
    assert [p.name for p in tmp_path.iterdir()] == ["out.h5ad"]


def test_csv_is_the_result_in_memory(some, filled, tmp_path):
    log = log_counts(some)
    values = assemble(log.values, filled)
    path = write(some, blocks(values, 7), log, tmp_path / "result.csv", {})
    table = pd.read_csv(path, index_col=0)
    assert list(table.index) == list(some.obs_names)
    assert list(table.columns) == list(some.var_names)
    np.testing.assert_allclose(table.to_numpy(), values, atol=1e-6)
    assert (table.to_numpy().astype(np.float32) == values).all()
    # Text or path, and an older file makes room.
    write(some, blocks(values * 0, 50), log, str(path), {})
    assert (pd.read_csv(path, index_col=0) == 0).all(axis=None)


def test_places_that_will_not_do(some, filled, tmp_path):
    log = log_counts(some)
    for name in ("out.h5", "out.txt", "out"):
        with pytest.raises(OutputError, match=rf"{name}.*\.h5ad or \.csv"):
            write(some, blocks(filled), log, tmp_path / name, {})
    (tmp_path / "file").write_text("")
    for name in ("file/out.csv", "file/out.h5ad"):
        with pytest.raises(OutputError, match="cannot be written"):
            write(some, blocks(filled), log, tmp_path / name, {})


@pytest.mark.parametrize("name", ["out.csv", "out.h5ad"])
def test_a_broken_run_leaves_nothing(some, filled, tmp_path, name):
    def breaks():
        yield from list(blocks(filled))[:2]
        raise KeyboardInterrupt

    log = log_counts(some)
    with pytest.raises(KeyboardInterrupt):
        write(some, breaks(), log, tmp_path / name, {})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------- real cells


# 12: observed entries are the same bits, and the way back gives the counts.
@pytest.mark.filterwarnings("ignore")
def test_real_cells(tmp_path):
    real = datasets.load("pbmc68k_reduced", verbose=False)
    log = log_counts(real)
    made = np.random.default_rng(0).gamma(1.0, 1.0, real.shape)
    values = assemble(log.values, made)
    out = completed(real, values, log, {})
    raw = real.layers["counts"].toarray()
    seen = raw > 0
    again = log_counts(real).values.toarray()
    bits = dense(out.layers["imputed"])[seen].view(np.int32)
    assert (bits == again[seen].view(np.int32)).all()
    assert (dense(out.layers["imputed_counts"])[seen] == raw[seen]).all()
    scale = (log.totals / log.target)[:, None]
    back = np.expm1(dense(out.layers["imputed"]).astype(float)) * scale
    np.testing.assert_allclose(back[seen], raw[seen], rtol=1e-4)
    path = write(real, blocks(values, 128), log, tmp_path / "real.h5ad", {})
    read = ad.read_h5ad(path)
    for name in ("imputed", "imputed_counts"):
        assert (dense(read.layers[name]) == dense(out.layers[name])).all()
