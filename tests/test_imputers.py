"""Simple imputers: worked numbers, what is kept, and the output contract."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy.special import gammaln
from scipy.stats import nbinom

from scgenlib import baselines, imputers
from scgenlib.errors import ConfigError, DataError
from scgenlib.estimator import data_hash
from scgenlib.simulate import simulate

LN2 = np.log(2)
ALL = [getattr(imputers, name) for name in imputers.__all__]
RANDOM = [imputers.knn_smoothing, imputers.diffusion, imputers.alra]
every = pytest.mark.parametrize("impute", ALL, ids=lambda f: f.__name__)


def cells(counts, types=None) -> AnnData:
    counts = sp.csr_matrix(np.asarray(counts, dtype=np.float32))
    obs = pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])])
    obs["cell_type"] = pd.Categorical(types or ["a"] * len(obs))
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    return AnnData(counts.log1p(), obs=obs, var=var, layers={"counts": counts})


def dense(layer) -> np.ndarray:
    return layer.toarray() if sp.issparse(layer) else np.asarray(layer)


def imputed(adata: AnnData) -> np.ndarray:
    return dense(adata.layers["imputed"])


@pytest.fixture
def four():
    """Every total is 10, so that values are ln(1 + count) for a target of 10."""
    return cells([[1, 0, 9], [3, 7, 0], [0, 5, 5], [0, 2, 8]], list("aabb"))


@pytest.fixture(scope="module")
def some():
    made = simulate(120, 60, dropout=0.3, dropout_slope=1.0, seed=0)
    counts = made.layers["counts"].tolil()
    counts[:, 7] = 0  # a gene that no cell shows
    made.layers["counts"] = sp.csr_matrix(counts, dtype=np.float32)
    return made


@every
def test_contract(impute, some):
    before = some.copy()
    out = impute(some)
    assert data_hash(before) == data_hash(some) and "imputed" not in some.layers
    log = imputers.log_counts(some)
    seen = some.layers["counts"].toarray() > 0
    values, counts = imputed(out), dense(out.layers["imputed_counts"])
    # Observed entries are the same bits, on both scales.
    assert values.dtype == counts.dtype == np.float32
    np.testing.assert_array_equal(values[seen], log.values.toarray()[seen])
    np.testing.assert_array_equal(counts[seen], some.layers["counts"].toarray()[seen])
    assert np.isfinite(values).all() and values.min() >= 0
    # Filled ones are the same number on both scales.
    scale = (log.totals / log.target)[:, None]
    np.testing.assert_allclose(counts, np.expm1(values) * scale, rtol=1e-4, atol=1e-5)
    assert ((values > 0) & ~seen).any() == (impute is not imputers.none)
    assert list(out.obs_names) == list(some.obs_names)
    assert list(out.var_names) == list(some.var_names)
    about = out.uns["scgenlib"]
    assert about["method"].startswith("baseline: ")
    assert about["data_hash"] == data_hash(some) and about["n_training_cells"] == 120
    assert json.loads(about["config"])["keep_observed"] is True
    assert about["target_sum"] == pytest.approx(np.median(log.totals))


@every
def test_dense_counts_and_repeats_give_the_same(impute, some):
    full = some.copy()
    full.layers["counts"] = some.layers["counts"].toarray()
    state = np.random.get_state()[1].copy()
    first = imputed(impute(some))
    np.testing.assert_allclose(imputed(impute(full)), first, atol=1e-6)
    np.testing.assert_array_equal(imputed(impute(some)), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@every
def test_without_keeping_observed_it_is_the_imputers_own_value(impute, some):
    kept, own = imputed(impute(some)), imputed(impute(some, keep_observed=False))
    seen = some.layers["counts"].toarray() > 0
    np.testing.assert_array_equal(kept[~seen], own[~seen])
    if impute is imputers.none:
        np.testing.assert_array_equal(kept, own)
    else:
        assert (np.abs(kept - own)[seen] > 1e-3).mean() > 0.9


@every
def test_a_cell_and_a_gene_without_counts(impute, some):
    counts = some.layers["counts"].toarray()[:30]
    counts[3] = 0
    out = impute(cells(counts, some.obs["cell_type"].astype(str).tolist()[:30]))
    assert np.isfinite(imputed(out)).all()
    # No count can be said of a cell without a total.
    assert (dense(out.layers["imputed_counts"])[3] == 0).all()
    if impute is not imputers.nb_autoencoder:
        np.testing.assert_allclose(imputed(out)[:, 7], 0, atol=1e-6)


@every
def test_scale_is_the_one_asked_for(impute, four, some):
    data = some if impute is imputers.nb_autoencoder else four
    options = {"k": 2} if impute is imputers.knn_smoothing else {}
    options |= {"knn": 2} if impute is imputers.diffusion else {}
    out = impute(data, target_sum=1e4, **options)
    seen = data.layers["counts"].toarray() > 0
    totals = data.layers["counts"].toarray().sum(1, keepdims=True)
    expected = np.log1p(data.layers["counts"].toarray() * 1e4 / totals)
    np.testing.assert_allclose(imputed(out)[seen], expected[seen], rtol=1e-5)
    assert out.uns["scgenlib"]["target_sum"] == 1e4


@every
def test_needs_counts(impute, four):
    del four.layers["counts"]
    with pytest.raises(DataError, match="counts"):
        impute(four)


def test_none_leaves_zeros(four):
    out = imputers.none(four, target_sum=10)
    expected = np.log1p(four.layers["counts"].toarray())
    np.testing.assert_allclose(imputed(out), expected, rtol=1e-6)


def test_gene_mean(four):
    out = imputers.gene_mean(four, target_sum=10)
    # g0: (ln 2 + ln 4) / 2; g1: (ln 8 + ln 6 + ln 3) / 3; g2: (ln 10 + ln 6 + ln 9) / 3
    found = imputed(out)
    assert found[2, 0] == found[3, 0] == pytest.approx(1.5 * LN2)
    assert found[0, 1] == pytest.approx(np.log(144) / 3)
    assert found[1, 2] == pytest.approx(np.log(540) / 3)
    assert dense(out.layers["imputed_counts"])[2, 0] == pytest.approx(2**1.5 - 1)
    flat = imputed(imputers.gene_mean(four, target_sum=10, keep_observed=False))
    np.testing.assert_allclose(flat, np.tile([1.5 * LN2, *flat[0, 1:]], (4, 1)))
    assert flat[2, 1] == pytest.approx(np.log(144) / 3)


def test_counts_come_back_at_each_cells_own_depth(four):
    twice = four.layers["counts"].toarray()
    twice[2] *= 2
    out = imputers.gene_mean(cells(twice), target_sum=10)
    counts = dense(out.layers["imputed_counts"])
    assert counts[2, 0] == pytest.approx(2 * (2**1.5 - 1), rel=1e-6)
    assert counts[3, 0] == pytest.approx(2**1.5 - 1, rel=1e-6)
    assert counts[2, 1] == 10  # observed


def test_type_mean(four):
    found = imputed(imputers.type_mean(four, target_sum=10))
    assert found[0, 1] == pytest.approx(3 * LN2)
    assert found[1, 2] == pytest.approx(np.log(10))
    # Type b never shows g0: the mean over all cells.
    assert found[2, 0] == found[3, 0] == pytest.approx(1.5 * LN2)
    with pytest.raises(DataError, match="cluster"):
        imputers.type_mean(four, "cluster")


def test_type_mean_with_a_shift_per_cell(four):
    found = imputed(imputers.type_mean(four, cell_shift=True, target_sum=10))
    # c0 shows ln 2 against a mean of 1.5 ln 2, and ln 10 against ln 10.
    assert found[0, 1] == pytest.approx(3 * LN2 - LN2 / 4)
    # c2 shows ln 6 against (ln 6 + ln 3) / 2, and ln 6 against (ln 6 + ln 9) / 2.
    assert found[2, 0] == pytest.approx(1.5 * LN2 + np.log(4 / 3) / 4)


def test_labels_are_only_used_by_the_type_mean(four):
    other = four.copy()
    other.obs["cell_type"] = pd.Categorical(list("abab"))
    assert not np.array_equal(
        imputed(imputers.type_mean(four)), imputed(imputers.type_mean(other))
    )
    np.testing.assert_array_equal(
        imputed(imputers.gene_mean(four)), imputed(imputers.gene_mean(other))
    )


def test_knn_smoothing_adds_up_neighbours():
    pairs = cells([[8, 2, 0, 0], [6, 3, 0, 1], [0, 0, 5, 5], [0, 1, 4, 5]])
    out = imputers.knn_smoothing(pairs, 1, target_sum=10, keep_observed=False)
    # Totals are 10, so a pair sums to 20 counts.
    expected = np.log1p(np.array([[7, 2.5, 0, 0.5], [0, 0.5, 4.5, 5]]))
    np.testing.assert_allclose(imputed(out), np.repeat(expected, 2, 0), rtol=1e-5)
    # With all other cells as neighbours, every cell is the sum of all.
    flat = imputed(imputers.knn_smoothing(pairs, 3, target_sum=10, keep_observed=False))
    np.testing.assert_allclose(flat[0], np.log1p([3.5, 1.5, 2.25, 2.75]), rtol=1e-5)
    assert np.ptp(flat, axis=0).max() < 1e-6


def test_knn_smoothing_of_fewer_cells_than_asked(four):
    for k in (0, 4):
        with pytest.raises(ConfigError, match="1 to 3"):
            imputers.knn_smoothing(four, k)


def test_diffusion_against_a_plain_loop(some):
    knn, decay, t = 4, 2.0, 3
    out = imputers.diffusion(some, knn=knn, decay=decay, t=t, keep_observed=False)
    x = imputers.log_counts(some).values.toarray().astype(float)
    n = len(x)
    gaps = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))  # 59 components: all of them
    kernel = np.zeros((n, n))
    for i in range(n):
        order = [j for j in np.argsort(gaps[i]) if j != i]
        width = gaps[i, order[knn - 1]]
        for j in order[: 3 * knn]:
            kernel[i, j] = np.exp(-((gaps[i, j] / width) ** decay))
        kernel[i, i] = 1
    kernel = (kernel + kernel.T) / 2
    kernel /= kernel.sum(1, keepdims=True)
    expected = np.linalg.matrix_power(kernel, t) @ x
    np.testing.assert_allclose(imputed(out), expected, atol=2e-4)


def test_diffusion_smooths_more_with_more_steps(some):
    spread = [
        imputed(imputers.diffusion(some, t=t, keep_observed=False)).var(0).sum()
        for t in (1, 3, 9)
    ]
    assert spread[0] > 1.2 * spread[1] > 1.4 * spread[2]
    for wrong in ({"t": 0}, {"decay": 0.0}, {"knn": 0}, {"knn": 120}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            imputers.diffusion(some, **wrong)


def three_types(n: int, g: int) -> AnnData:
    """Return n cells of each of 3 types with g own genes; a third of counts is lost."""
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b", "c"], n)
    rate = np.zeros((3 * n, 3 * g))
    for i, name in enumerate("abc"):
        rate[np.ix_(types == name, np.arange(g * i, g * i + g))] = 20
    rate[:, ::10] = 5  # some genes for all, or totals would be the only link
    truth = rng.poisson(rate)
    lost = rng.random(truth.shape) < 0.33
    made = cells(np.where(lost, 0, truth), types.tolist())
    made.layers["true_counts"] = sp.csr_matrix(truth)
    return made


@pytest.fixture(scope="module")
def blocks():
    return three_types(80, 40)


def test_alra_finds_the_rank():
    # The rule takes the last of 100 components for noise: it needs many more cells.
    out = imputers.alra(three_types(300, 250))
    assert json.loads(out.uns["scgenlib"]["config"])["rank"] == 3


def test_alra_leaves_true_zeros(blocks):
    out = imputers.alra(blocks, rank=3)
    found, truth = imputed(out) > 0, blocks.layers["true_counts"].toarray()
    empty = blocks.layers["counts"].toarray() == 0
    assert found[empty & (truth > 0)].mean() > 0.95
    assert found[truth == 0].mean() < 0.1


def test_alra_keeps_the_moments_of_the_non_zeros(blocks):
    own = imputed(imputers.alra(blocks, rank=3, keep_observed=False))
    seen = imputers.log_counts(blocks).values.toarray()
    for gene in (0, 1, 55, 119):
        a, b = own[:, gene][own[:, gene] > 0], seen[:, gene][seen[:, gene] > 0]
        assert a.mean() == pytest.approx(b.mean(), rel=0.02)
        assert a.std(ddof=1) == pytest.approx(b.std(ddof=1), rel=0.1)


def test_alra_rank_can_be_chosen(blocks):
    one = imputers.alra(blocks, rank=1)
    assert json.loads(one.uns["scgenlib"]["config"])["rank"] == 1
    truth = blocks.layers["true_counts"].toarray()
    # One component cannot tell the types apart.
    assert (imputed(one) > 0)[truth == 0].mean() > 0.5
    for rank in (0, 101):
        with pytest.raises(ConfigError, match="1 to 100"):
            imputers.alra(blocks, rank=rank)


def test_autoencoder_learns_the_types(blocks):
    truth = blocks.layers["true_counts"].toarray()
    own = dense(
        imputers.nb_autoencoder(blocks, keep_observed=False).layers["imputed_counts"]
    )
    # It sees a third of the counts as zeros, and rightly expects 20 x 0.67 of them.
    within = own[truth >= 8].mean()
    assert 11 < within < 16
    assert own[truth == 0].mean() < 0.2 * within


def test_negative_binomial_loss_is_scipys():
    import torch

    y, mean = np.array([[0.0, 3, 7]]), np.array([[0.5, 2, 9]])
    theta = np.array([0.4, 1.0, 5.0])
    found = imputers._nb_loss(*map(torch.tensor, (y, mean, np.log(theta))))
    logs = nbinom.logpmf(y, theta, theta / (theta + mean)) + gammaln(y + 1)
    assert float(found) == pytest.approx(-logs.mean(), rel=1e-6)


def test_autoencoder_takes_depth_out_and_scales_to_the_target():
    rng = np.random.default_rng(0)
    depth = np.where(np.arange(300) % 2, 4.0, 1.0)
    rate = rng.gamma(2, 2, 30)
    data = cells(rng.poisson(depth[:, None] * rate))
    out = imputers.nb_autoencoder(data, target_sum=1e4, keep_observed=False)
    totals = np.expm1(imputed(out)).sum(1)
    assert totals.mean() == pytest.approx(1e4, rel=0.05)
    assert totals[depth == 4].mean() == pytest.approx(
        totals[depth == 1].mean(), rel=0.1
    )
    counts = dense(out.layers["imputed_counts"])
    ratio = counts[depth == 4].mean() / counts[depth == 1].mean()
    assert ratio == pytest.approx(4, rel=0.1)


def test_autoencoder_leaves_the_random_state_and_follows_its_seed(some):
    import torch

    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first = imputers.nb_autoencoder(some, max_epochs=3)
    assert torch.equal(torch.rand(4), expected)
    torch.manual_seed(99)
    again = imputers.nb_autoencoder(some, max_epochs=3)
    other = imputers.nb_autoencoder(some, max_epochs=3, seed=1)
    np.testing.assert_array_equal(imputed(first), imputed(again))
    assert not np.array_equal(imputed(first), imputed(other))


def test_autoencoder_stops_early_and_needs_cells(some, four):
    out = imputers.nb_autoencoder(some, max_epochs=200, patience=1, lr=0.05)
    assert json.loads(out.uns["scgenlib"]["config"])["epochs"] < 100
    with pytest.raises(DataError, match="ten cells"):
        imputers.nb_autoencoder(four)


@pytest.mark.parametrize("impute", RANDOM, ids=lambda f: f.__name__)
def test_seed_is_recorded(impute, some):
    assert impute(some, seed=5).uns["scgenlib"]["seed"] == 5


def test_what_would_not_fit_is_refused():
    empty = sp.csr_matrix((300_000, 1000), dtype=np.float32)
    with pytest.raises(DataError, match="1 GB"):
        imputers.gene_mean(AnnData(empty, layers={"counts": empty}))


def test_baselines_offer_them_without_loading_torch():
    for name in imputers.__all__:
        assert getattr(baselines, name) is getattr(imputers, name)
        assert name in baselines.__all__
    code = (
        "import sys, scgenlib.baselines, scgenlib.metrics\n"
        "assert not {'torch', 'scanpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
