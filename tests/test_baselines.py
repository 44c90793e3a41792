"""Baselines: what each keeps, what each destroys, and the output contract."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scgenlib import GARAGE, baselines
from scgenlib.errors import ConfigError, DataError
from scgenlib.estimator import data_hash

SIZES = {"alpha": 50, "beta": 30, "lone": 1, "pair": 2}
ALL = [
    baselines.copy_cells,
    baselines.jitter,
    baselines.smote,
    baselines.shuffle_genes,
    baselines.pc_gaussian,
    baselines.negative_binomial,
]
name = pytest.mark.parametrize("generator", ALL, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    types = np.repeat(list(SIZES), list(SIZES.values()))
    rate = np.full((len(types), 25), 1.0)
    rate[types == "alpha", :6] = 6
    rate[types == "beta", 6:12] = 6
    values = sp.csr_matrix(np.log1p(rng.poisson(rate)), dtype=np.float32)
    obs = pd.DataFrame({"cell_type": pd.Categorical(types)})
    obs.index = [f"c{i}" for i in range(len(types))]
    made = AnnData(
        values, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(25)])
    )
    made.layers["counts"] = values.expm1().rint()
    return made


def dense(cells):
    return cells.X.toarray() if sp.issparse(cells.X) else cells.X


@name
def test_output_contract(generator, train):
    before = train.X.copy()
    made = generator(train, 40, seed=1)
    assert made.shape == (40, 25)
    assert list(made.var_names) == list(train.var_names)
    assert made.obs_names.is_unique
    assert dense(made).dtype == np.float32 and dense(made).min() >= 0
    assert np.isfinite(dense(made)).all()
    assert list(made.obs["cell_type"].cat.categories) == sorted(SIZES)
    about = made.uns["scgenlib"]
    assert about["method"].startswith("baseline: ") and about["seed"] == 1
    assert json.loads(about["config"])["label"] is None
    assert about["n_training_cells"] == 83 and about["data_hash"] == data_hash(train)
    # The keys are those of a model.
    model = GARAGE()
    model.data_hash_, model.n_cells_ = "", 0
    assert set(about) == set(model.provenance()) - {"config_hash"}
    assert (train.X != before).nnz == 0
    assert set(train.uns) == set()


@name
def test_same_seed_same_cells(generator, train):
    first, again, other = (generator(train, 30, seed=s) for s in (3, 3, 4))
    assert (dense(first) == dense(again)).all()
    assert not np.array_equal(dense(first), dense(other))


@name
def test_label_restricts_to_one_type(generator, train):
    made = generator(train, 60, seed=0, label="beta")
    assert (made.obs["cell_type"] == "beta").all()
    marker = dense(made).mean(0)
    assert marker[6:12].mean() > 2 * marker[:6].mean()


@name
def test_survives_writing_and_reading(generator, train, tmp_path):
    import anndata

    made = generator(train, 5, seed=0)
    made.write_h5ad(tmp_path / "made.h5ad")
    back = anndata.read_h5ad(tmp_path / "made.h5ad")
    assert (dense(back) == dense(made)).all()
    assert back.uns["scgenlib"]["method"] == made.uns["scgenlib"]["method"]


@name
def test_bad_requests_are_refused(generator, train):
    with pytest.raises(ConfigError, match="at least 1"):
        generator(train, 0)
    with pytest.raises(DataError, match="Did you mean 'alpha'"):
        generator(train, 5, label="alhpa")
    with pytest.raises(DataError, match="Did you mean 'cell_type'"):
        generator(train, 5, label_key="celltype")
    scaled = train.copy()
    scaled.X = scaled.X.toarray() - 1.0
    with pytest.raises(DataError, match="log1p"):
        generator(scaled, 5)


def test_copies_are_training_cells_and_none_repeats_early(train):
    rows = {tuple(row) for row in dense(train)}
    made = dense(baselines.copy_cells(train, train.n_obs))
    assert all(tuple(row) in rows for row in made)
    assert made.sum() == pytest.approx(dense(train).sum())
    thrice = baselines.copy_cells(train, 6, label="pair")
    assert len(np.unique(dense(thrice), axis=0)) == 2


def test_jitter_moves_only_expressed_genes(train):
    made = baselines.jitter(train, 83, sd=0.3, seed=0)
    source = baselines.copy_cells(train, 83, seed=0)
    gap = dense(made) - dense(source)
    expressed = dense(source) > 0
    assert (gap[~expressed] == 0).all()
    assert gap[expressed].std() == pytest.approx(0.3, rel=0.1)
    still = baselines.jitter(train, 83, sd=0, seed=0)
    assert (dense(still) == dense(source)).all()
    with pytest.raises(ConfigError, match="at least 0"):
        baselines.jitter(train, 5, sd=-1)


def test_smote_lies_between_two_cells_of_the_type(train):
    own = dense(train)[(train.obs["cell_type"] == "beta").to_numpy()]
    made = dense(baselines.smote(train, 40, seed=0, label="beta")).astype(float)
    ends = own.astype(float)
    on_a_line = 0
    for point in made:
        to = np.linalg.norm(ends - point, axis=1)
        pairs = to[:, None] + to[None, :]
        apart = np.linalg.norm(ends[:, None] - ends[None], axis=2)
        # On the segment: the two legs add up to the distance of its ends.
        on_a_line += bool((np.abs(pairs - apart)[apart > 0] < 1e-4).any())
    assert on_a_line == 40
    assert len(np.unique(made, axis=0)) == 40


def test_smote_with_fewer_neighbours_than_k(train):
    pair = dense(train)[(train.obs["cell_type"] == "pair").to_numpy()]
    made = dense(baselines.smote(train, 10, k=5, label="pair"))
    low, high = pair.min(0), pair.max(0)
    assert ((made >= low - 1e-5) & (made <= high + 1e-5)).all()
    lone = dense(train)[(train.obs["cell_type"] == "lone").to_numpy()]
    assert np.allclose(dense(baselines.smote(train, 4, label="lone")), lone)


def test_smote_without_label_stays_within_types(train):
    made = baselines.smote(train, train.n_obs, seed=0)
    shares = made.obs["cell_type"].value_counts()
    assert shares.to_dict() == SIZES


def test_shuffle_keeps_each_histogram_and_breaks_each_row(train):
    made = dense(baselines.shuffle_genes(train, train.n_obs, seed=0))
    real = dense(train)
    assert (np.sort(made, axis=0) == np.sort(real, axis=0)).all()
    markers = lambda x: np.corrcoef(x[:, 0], x[:, 6])[0, 1]  # noqa: E731
    assert markers(real) < -0.5 and abs(markers(made)) < 0.3


def test_gaussian_has_the_mean_and_covariance_of_its_type(train):
    made = dense(baselines.pc_gaussian(train, 4000, n_pcs=24, label="alpha"))
    own = dense(train)[(train.obs["cell_type"] == "alpha").to_numpy()]
    high = own.min(0) > 0.3  # genes where cutting at zero hardly bites
    assert high.sum() >= 4
    assert np.allclose(made[:, high].mean(0), own[:, high].mean(0), atol=0.05)
    assert np.allclose(np.cov(made[:, high].T), np.cov(own[:, high].T), atol=0.03)
    with pytest.raises(DataError, match="two cells"):
        baselines.pc_gaussian(train, 5, label="lone")


def test_negative_binomial_keeps_means_and_spread_and_drops_pairs():
    # Two genes that move together, one Poisson gene, in one type of constant depth.
    rng = np.random.default_rng(0)
    shared = rng.gamma(2.0, 0.5, 4000)  # mean 1, variance 1/2: dispersion 0.5
    counts = rng.poisson(np.c_[shared * 20, shared * 20, np.full(4000, 60.0)])
    counts = np.c_[counts, 400 - counts.sum(1)]  # the rest: depth is 400
    counts = counts[(counts >= 0).all(1)]
    real = AnnData(sp.csr_matrix(np.log1p(counts * 2.0).astype(np.float32)))
    real.layers["counts"] = sp.csr_matrix(counts)
    real.obs["cell_type"] = pd.Categorical(["a"] * len(counts))
    new = baselines.negative_binomial(real, 3000, seed=1)
    made = new.X.expm1().toarray() / 2.0  # one molecule is worth 2
    np.testing.assert_allclose(made, made.round(), atol=1e-3)
    np.testing.assert_allclose(made[:, :3].mean(0), [20, 20, 60], rtol=0.06)
    # Variance of a negative binomial: mean + dispersion x mean^2.
    np.testing.assert_allclose(made[:, :2].var(0), 20 + 0.5 * 400, rtol=0.2)
    assert made[:, 2].var() < 1.3 * 60
    assert np.corrcoef(counts[:, 0], counts[:, 1])[0, 1] > 0.8
    assert abs(np.corrcoef(made[:, 0], made[:, 1])[0, 1]) < 0.1


def test_negative_binomial_needs_counts(train):
    bare = train.copy()
    bare.layers.clear()
    with pytest.raises(DataError, match="counts"):
        baselines.negative_binomial(bare, 5)
