"""Metrics of imputation: worked numbers, nulls, and the published simulation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import mannwhitneyu, ttest_ind

from scgenlib import imputers, metrics
from scgenlib.completion import log_counts
from scgenlib.errors import ConfigError, DataError

LN2 = np.log(2)


def imputed(adata: AnnData) -> np.ndarray:
    layer = adata.layers["imputed"]
    return layer.toarray() if sp.issparse(layer) else layer


# ---------------------------------------------------------------- values and mask


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_masked_scores(form):
    values, truth = form(np.array([[1.0, 2], [3, 4]])), form([[9.0, 1], [3, 5]])
    where = form(np.array([[False, True], [True, True]]))
    found = metrics.masked_scores(values, truth, where)
    # Entries (2, 1), (3, 3), (4, 5).
    assert found["rmse"] == pytest.approx(np.sqrt(2 / 3))
    assert found["pcc"] == pytest.approx(1.0)
    assert found["cosine"] == pytest.approx(31 / np.sqrt(29 * 35))
    assert found["n"] == 3


def test_masked_scores_of_nothing():
    zero, one = np.zeros((2, 2)), np.array([[1.0, 2], [3, 4]])
    found = metrics.masked_scores(zero, one, one > 0)
    assert found["rmse"] == pytest.approx(np.sqrt(7.5)) and found["cosine"] == 0
    assert np.isnan(found["pcc"])
    with pytest.raises(DataError, match="no entry"):
        metrics.masked_scores(zero, one, one > 9)
    with pytest.raises(DataError, match="shape"):
        metrics.masked_scores(zero, one[:, :1], one > 0)
    with pytest.raises(DataError, match="mask"):
        metrics.masked_scores(zero, one, one[:1] > 0)


def test_log_truth():
    counts = sp.csr_matrix([[1, 3], [2, 6]])
    own = metrics.log_truth(counts).toarray()  # totals 4 and 8, median 6
    np.testing.assert_allclose(own, np.log1p([[1.5, 4.5], [1.5, 4.5]]), rtol=1e-6)
    given = metrics.log_truth(counts, totals=np.array([2, 8])).toarray()  # median 5
    np.testing.assert_allclose(given, np.log1p([[2.5, 7.5], [1.25, 3.75]]), rtol=1e-6)
    fixed = metrics.log_truth(counts, target_sum=40).toarray()
    np.testing.assert_allclose(fixed, np.log1p([[10, 30], [10, 30]]), rtol=1e-6)
    with pytest.raises(DataError, match="total"):
        metrics.log_truth(sp.csr_matrix([[1, 3], [0, 0]]))
    with pytest.raises(DataError, match="total"):
        metrics.log_truth(counts, totals=np.array([1]))


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_mask_scores(form):
    observed = form(np.array([[0, 0, 0, 1.0], [0, 0, 2, 1]]))
    lost = form(np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool))  # one where it is no zero
    flagged = form(np.array([[1, 0, 1, 0], [1, 0, 1, 0]], bool))  # likewise
    found = metrics.mask_scores(flagged, lost, observed)
    assert found["n"] == 5
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["precision"] == found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["flag_all_accuracy"] == found["flag_all_precision"] == 3 / 5
    assert found["flag_all_recall"] == 1 and found["flag_all_f1"] == 0.75
    nothing = metrics.mask_scores(form(np.zeros((2, 4), bool)), lost, observed)
    assert np.isnan(nothing["precision"]) and nothing["recall"] == 0


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_zeros_filled(form):
    observed, truth = form(np.array([[0, 0, 0, 1.0]])), form(np.array([[0, 0, 5.0, 1]]))
    values = form(np.array([[0.2, 0.05, 3, 1]]))
    assert metrics.zeros_filled(values, truth, observed) == 0.5
    assert metrics.zeros_filled(values, truth, observed, above=0.01) == 1.0


# ---------------------------------------------------------- smoothing within a type


@pytest.fixture(scope="module")
def spread():
    """Two types of 30 cells, 12 independent genes, types far apart."""
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, (60, 12))
    values[30:] += 20
    return values, np.repeat(["a", "b"], 30)


def test_oversmoothing_of_known_changes(spread):
    truth, labels = spread
    centre = np.repeat([truth[:30].mean(0), truth[30:].mean(0)], 30, axis=0)
    half = metrics.oversmoothing(centre + (truth - centre) / 2, truth, labels)
    assert half["variance_ratio"] == pytest.approx(0.25)
    assert half["correlation"] == pytest.approx(1.0)
    assert half["pairs"] == 24 and half["flat"] == 0
    turned = metrics.oversmoothing(centre - (truth - centre), truth, labels)
    assert turned["variance_ratio"] == pytest.approx(1.0)
    assert turned["correlation"] == pytest.approx(-1.0)
    flat = metrics.oversmoothing(centre, truth, labels)
    assert flat["variance_ratio"] == pytest.approx(0, abs=1e-12)
    assert flat["correlation"] == 0 and flat["flat"] == 1
    # Half of the genes flat: those count as 0, they are not left out.
    mixed = np.where(np.arange(12) < 6, centre, truth)
    found = metrics.oversmoothing(mixed, truth, labels)
    assert found["correlation"] == pytest.approx(0.5) and found["flat"] == 0.5


def test_noise_buys_the_ratio_and_not_the_correlation(spread):
    truth, labels = spread
    noise = np.random.default_rng(1).normal(0, 1, truth.shape)
    found = metrics.oversmoothing(noise, truth, labels)
    assert 0.8 < found["variance_ratio"] < 1.2 and abs(found["correlation"]) < 0.1


def test_oversmoothing_is_partial_on_the_totals():
    size = np.array([-1.0, -1, 1, 1])
    own, other = np.array([1.0, -1, 1, -1]), np.array([1.0, -1, -1, 1])
    values, truth = (size + own)[:, None], (size + other)[:, None]
    args = (values, truth, np.array(list("aaaa")))
    plain = metrics.oversmoothing(*args, min_cells=4)
    assert plain["correlation"] == pytest.approx(0.5)
    partial = metrics.oversmoothing(*args, totals=np.exp(size), min_cells=4)
    assert partial["correlation"] == pytest.approx(0, abs=1e-12)
    # What only follows the totals says nothing beyond them.
    only = metrics.oversmoothing(
        size[:, None], truth, args[2], totals=np.exp(size), min_cells=4
    )
    assert only["correlation"] == 0


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_oversmoothing_of_some_entries(spread, form):
    truth, labels = spread
    values = truth.copy()
    lost = np.random.default_rng(2).random(truth.shape) < 0.5
    noise = np.random.default_rng(3).normal(5, 1, truth.shape)
    noise[30:] += 20
    values[lost] = noise[lost]
    everything = metrics.oversmoothing(form(values), form(truth), labels)
    filled = metrics.oversmoothing(form(values), form(truth), labels, where=form(lost))
    assert everything["correlation"] > 0.3 > 0.2 > abs(filled["correlation"])
    assert filled["variance_ratio"] == everything["variance_ratio"]
    expected = [
        np.corrcoef(values[rows, g][lost[rows, g]], truth[rows, g][lost[rows, g]])[0, 1]
        for rows in (slice(0, 30), slice(30, 60))
        for g in range(12)
        if lost[rows, g].sum() >= 10
    ]
    assert filled["correlation"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert filled["pairs"] == len(expected)
    few = metrics.oversmoothing(form(values), form(truth), labels, min_cells=31)
    assert few["pairs"] == 0 and np.isnan(few["correlation"])


def test_gene_correlations_within_type(spread):
    truth, labels = spread
    same = np.repeat(truth[:, :1], 3, axis=1)
    found = metrics.gene_correlation_inflation(same, truth[:, :3], labels)
    assert found["mean_r"] == pytest.approx(1) and found["share_r"] == 1
    corr = [np.corrcoef(t[:, :3].T)[np.triu_indices(3, 1)] for t in np.split(truth, 2)]
    assert found["mean_r_truth"] == pytest.approx(np.abs(corr).mean())
    assert found["share_r_truth"] == pytest.approx((np.abs(corr) > 0.3).mean())
    assert found["null"] == pytest.approx(np.sqrt(2 / (30 * np.pi)))
    assert found["pairs"] == 6 and found["skipped"] == 0
    # The types are far apart: without labels every gene follows every other.
    one = metrics.gene_correlation_inflation(truth, None, ["x"] * 60)
    assert one["mean_r"] > 0.9 and np.isnan(one["mean_r_truth"])
    flat = truth.copy()
    flat[:30, 0] = 1.0
    found = metrics.gene_correlation_inflation(flat, truth, labels)
    assert found["skipped"] == pytest.approx(1 / 24)
    assert found["pairs"] == 12 * 11 / 2 + 11 * 10 / 2


def test_independent_genes_score_the_null():
    values = np.random.default_rng(0).normal(size=(135, 300))
    few = metrics.gene_correlation_inflation(values, None, ["a"] * 135, n_genes=200)
    assert few["mean_r"] == pytest.approx(few["null"], rel=0.02)
    assert few["null"] == pytest.approx(0.0687, abs=1e-4)
    assert few["pairs"] == 200 * 199 / 2


@pytest.fixture(scope="module")
def programme():
    """Poisson counts of two types; in each, one factor moves 15 of 30 genes."""
    rng = np.random.default_rng(0)
    types = np.repeat(["a", "b"], 100)
    factor = np.exp(rng.normal(0, 0.8, (200, 1)))
    rate = 10 * np.where(np.arange(30) < 15, factor, 1.0)
    rate[types == "b", 20:] *= 4
    counts = sp.csr_matrix(rng.poisson(rate), dtype=np.float32)
    obs = pd.DataFrame({"cell_type": pd.Categorical(types)})
    obs.index = obs.index.astype(str)
    return AnnData(counts.log1p(), obs=obs, layers={"counts": counts})


def test_invented_correlation(programme):
    labels = programme.obs["cell_type"].to_numpy()
    real = metrics.gene_correlation_inflation(
        log_counts(programme).values, None, labels
    )
    assert real["mean_r"] > 3 * real["null"]
    seen = []

    def nothing(adata: AnnData) -> AnnData:
        seen.append(adata)
        return imputers.none(adata)

    found = metrics.invented_correlation(nothing, programme, seed=1)
    assert found["before"] == pytest.approx(found["after"])
    assert found["before"] < 1.5 * found["null"]  # the programme is gone
    assert found["null"] == pytest.approx(np.sqrt(2 / (100 * np.pi)))
    # Each gene of each type has the same counts as before, in other cells.
    old, new = (a.layers["counts"].toarray() for a in (programme, seen[0]))
    assert (old != new).mean() > 0.5
    for rows in (slice(0, 100), slice(100, 200)):
        np.testing.assert_array_equal(np.sort(old[rows], 0), np.sort(new[rows], 0))
    rank_one = metrics.invented_correlation(
        lambda a: imputers.alra(a, rank=1, keep_observed=False), programme
    )
    assert rank_one["after"] > 0.9 and rank_one["share_after"] > 0.9
    assert rank_one["share_before"] < 0.05


def test_false_de_of_one_gene_is_scipys():
    values = np.random.default_rng(0).normal(size=(12, 2))
    values[6:, 0] += 3
    halves = np.repeat([0, 1], 6)
    p = [mannwhitneyu(v[:6], v[6:], method="asymptotic").pvalue for v in values.T]
    assert p[0] < 0.025 < 0.05 < p[1]
    found = metrics.false_de(values, halves=halves)
    assert found == {"false": 0.5, "bonferroni": 0.5, "tested": 2, "skipped": 0}


def test_false_de_by_t_is_welchs():
    # The few cells scatter most: Student's p is below 0.05, Welch's is not.
    halves = np.repeat([0, 1], [4, 16])
    small = np.r_[[-6.0, 20, 14, 14], np.tile([-1.0, 1], 8)][:, None]
    assert ttest_ind(small[:4, 0], small[4:, 0]).pvalue < 0.05
    assert metrics.false_de(small, halves=halves, test="t")["false"] == 0.0


@pytest.mark.parametrize("test", ["wilcoxon", "t"])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_false_de_is_right_without_imputation(form, test):
    values = np.random.default_rng(0).gamma(2, size=(80, 2000))
    values[:, :3] = 1.5
    found = metrics.false_de(form(values), seed=1, test=test)
    assert found["false"] == pytest.approx(0.05, abs=0.015)
    assert found["bonferroni"] < 0.002
    assert found["tested"] == 1997 and found["skipped"] == 3
    assert metrics.false_de(values, seed=2, test=test) != found


def test_false_de_catches_labels_that_mean_nothing(programme):
    one = programme[:100].copy()
    counts = one.layers["counts"].toarray()
    counts[np.random.default_rng(0).random(counts.shape) < 0.6] = 0
    one.layers["counts"] = sp.csr_matrix(counts)
    halves = np.random.default_rng(5).permutation(100) % 2
    one.obs["half"] = halves.astype(str)
    told = imputers.type_mean(one, "half", keep_observed=False)
    assert metrics.false_de(told.layers["imputed"], halves=halves)["bonferroni"] == 1
    honest = imputers.gene_mean(one)
    assert metrics.false_de(honest.layers["imputed"], halves=halves)["false"] < 0.2
    constant = imputers.gene_mean(one, keep_observed=False)
    found = metrics.false_de(constant.layers["imputed"], halves=halves)
    assert found["skipped"] == 30 and np.isnan(found["false"])


def test_false_de_refuses(spread):
    with pytest.raises(ConfigError, match="wilcoxon"):
        metrics.false_de(spread[0], test="wilcox")
    with pytest.raises(DataError, match="halves"):
        metrics.false_de(spread[0], halves=np.zeros(60))
    with pytest.raises(DataError, match="label"):
        metrics.false_de(spread[0], halves=np.zeros(9))


def test_neighbour_overlap(spread):
    truth, labels = spread
    same = metrics.neighbour_overlap(3 * truth + 1, truth, labels, k=5)
    assert same["jaccard"] == 1 and same["cells"] == 60
    assert same["chance"] == pytest.approx(5 / 53)
    noise = np.random.default_rng(1).normal(size=truth.shape)
    found = metrics.neighbour_overlap(noise, sp.csr_matrix(truth), labels, k=5)
    assert found["jaccard"] == pytest.approx(found["chance"], abs=0.05)
    # Neighbours within the type: a shift between types changes nothing.
    moved = truth + np.where(labels == "b", 50, 0)[:, None]
    assert metrics.neighbour_overlap(moved, truth, labels, k=5)["jaccard"] == 1
    sizes = ["a"] * 53 + ["b"] * 7
    assert metrics.neighbour_overlap(truth, truth, sizes, k=6)["cells"] == 53
    with pytest.raises(DataError, match="too small"):
        metrics.neighbour_overlap(truth, truth, labels, k=29)


def test_neighbours_shared_by_hand():
    # Six cells on a line; the last moves from the right end to the left.
    before = np.array([[0.0, 0], [1, 0], [3, 0], [6, 0], [10, 0], [15, 0]])
    after = before.copy()
    after[5] = -0.5
    found = metrics.neighbour_overlap(after, before, ["a"] * 6, k=1)
    # Nearest before 1 0 1 2 3 4, after 5 0 1 2 3 0.
    assert found["jaccard"] == pytest.approx(4 / 6)


# ------------------------------------------------------------- what a study would do


def test_cluster_scores(spread):
    values, labels = spread
    found = metrics.cluster_scores(values, labels)
    assert found["ari"] == found["nmi"] == pytest.approx(1)
    assert found["silhouette"] == pytest.approx(found["silhouette_types"])
    assert found["silhouette"] > 0.8
    mixed = np.random.default_rng(0).permutation(labels)
    wrong = metrics.cluster_scores(sp.csr_matrix(values), mixed)
    assert abs(wrong["ari"]) < 0.15 and abs(wrong["silhouette_types"]) < 0.1
    assert wrong["silhouette"] == pytest.approx(found["silhouette"], abs=1e-4)
    four = metrics.cluster_scores(values, labels, n_clusters=4)
    assert 0.3 < four["ari"] < 0.9
    for k in (0, 61):
        with pytest.raises(DataError, match="clusters"):
            metrics.cluster_scores(values, labels, n_clusters=k)
    assert np.isnan(metrics.cluster_scores(values, ["x"] * 60)["silhouette"])


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_thinning_deals_every_molecule(form):
    counts = np.random.default_rng(0).poisson(3, (200, 100))
    train, test = metrics.thin(form(counts), 0.9, seed=1)
    np.testing.assert_array_equal((train + test).toarray(), counts)
    assert train.sum() / counts.sum() == pytest.approx(0.9, abs=0.005)
    # Halves of a Poisson count are independent.
    r = np.corrcoef(train.toarray().ravel(), test.toarray().ravel())[0, 1]
    assert abs(r) < 0.03
    again = metrics.thin(counts, 0.9, seed=1)[0]
    assert (again != train).nnz == 0 and (metrics.thin(counts)[0] != train).nnz > 0
    assert (train.data > 0).all() and (test.data > 0).all()
    with pytest.raises(DataError, match="whole"):
        metrics.thin(counts + 0.5)
    for share in (0, 1):
        with pytest.raises(ConfigError, match="share"):
            metrics.thin(counts, share)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_poisson_loss(form):
    # Nine tenths of the molecules give 9 and 18: expect 1 and 2 in the rest.
    prediction = form(np.array([[9.0, 18.0]]))
    assert metrics.poisson_loss(prediction, form([[1.0, 0.0]]), 0.9) == pytest.approx(
        (1 + 2) / 2
    )
    # 2 at a mean of 2: 2 - 2 ln 2 + ln 2!; 3 at a mean of 1: 1 + ln 3!.
    assert metrics.poisson_loss(prediction, form([[3.0, 2.0]]), 0.9) == pytest.approx(
        (1 + np.log(6) + 2 - LN2) / 2
    )
    none = metrics.poisson_loss(form(np.array([[0.0, 0.0]])), form([[1.0, 0.0]]), 0.5)
    assert none == pytest.approx((1e-6 + 6 * np.log(10) + 1e-6) / 2)
    with pytest.raises(ConfigError, match="share"):
        metrics.poisson_loss(prediction, prediction, 1.0)


def test_keeping_observed_entries_loses_where_counts_are_low():
    counts = np.random.default_rng(0).poisson(0.3, (400, 50)).astype(np.float32)
    train, test = metrics.thin(counts, 0.9)
    mean = np.full(counts.shape, train.mean())
    kept = np.where(train.toarray() > 0, train.toarray(), mean)
    assert (
        metrics.poisson_loss(mean, test, 0.9)
        < metrics.poisson_loss(kept, test, 0.9)
        < metrics.poisson_loss(train, test, 0.9)
    )


def test_order_agreement():
    rng = np.random.default_rng(0)
    stage = np.repeat([1, 2, 3, 4], 25)
    place = stage[:, None] + rng.uniform(-0.5, 0.5, (100, 1))
    values = place @ rng.normal(size=(1, 30)) + 0.05 * rng.normal(size=(100, 30))
    found = metrics.order_agreement(values, stage)
    assert found["spearman"] > 0.9 and found["unreached"] == 0
    mixed = metrics.order_agreement(values, rng.permutation(stage))
    assert mixed["spearman"] < 0.4
    values[stage > 2] += 100
    apart = metrics.order_agreement(values, stage, n_neighbors=5)
    assert apart["unreached"] == 0.5 and apart["spearman"] > 0.8
    equal = metrics.order_agreement(np.tile(values[:1], (100, 1)), stage)
    assert np.isnan(equal["spearman"])
    with pytest.raises(DataError, match="stages"):
        metrics.order_agreement(values, np.ones(100))
    with pytest.raises(DataError, match="ranks"):
        metrics.order_agreement(values, stage[:50])


@pytest.fixture(scope="module")
def wells():
    """Mixtures of three lines, 8 wells each, and their expected expression."""
    mixtures = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.25],
                         [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])  # fmt: skip
    known = np.repeat(mixtures, 8, axis=0)
    return known, known @ np.random.default_rng(0).gamma(0.5, 100, (3, 80))


def test_mixing_error(wells):
    known, clean = wells
    assert metrics.mixing_error(clean, known)["rmse"] == pytest.approx(0, abs=1e-9)
    noisy = np.random.default_rng(1).poisson(clean).astype(float)
    found = metrics.mixing_error(sp.csr_matrix(noisy), pd.DataFrame(known))
    assert 0 < found["rmse"] < 0.1 and found["n"] == 48
    full = metrics.mixing_error(noisy, known)
    assert found == pytest.approx(full, rel=1e-9)
    # Proportions scatter about their mean, 1 / 3 or close to it.
    assert found["guess"] == pytest.approx(np.sqrt(known.var(0).mean()), abs=0.02)
    # Values are linear in the mixture; their logarithms are not.
    assert metrics.mixing_error(np.log1p(clean), known)["rmse"] > 0.02
    # Published proportions are rounded: 3 x 0.33 is taken for 1.
    rounded = metrics.mixing_error(clean, known.round(2))
    assert 0 < rounded["rmse"] < 0.01


def test_no_well_is_judged_by_profiles_made_from_it(wells):
    known, _ = wells
    # Noise and more genes than wells: profiles fitted to all wells would fit theirs.
    noise = np.random.default_rng(0).gamma(1, size=(48, 400))
    found = metrics.mixing_error(noise, known)
    assert found["rmse"] > found["guess"]
    pure = np.linalg.lstsq(known, noise, rcond=None)[0]
    fitted = np.linalg.lstsq(pure.T, noise.T, rcond=None)[0].T
    assert np.sqrt(((fitted - known) ** 2).mean()) < found["rmse"]


def test_wells_of_a_mixture_go_to_both_halves(wells):
    known, clean = (m[[0, 1, 8, 9, 16, 17]] for m in wells)  # two of each pure line
    for seed in range(5):
        assert metrics.mixing_error(clean, known, seed=seed)["rmse"] < 1e-9


def test_mixing_error_refuses(wells):
    known, clean = wells
    with pytest.raises(DataError, match="sum to 1"):
        metrics.mixing_error(clean, known * 2)
    with pytest.raises(DataError, match="wells"):
        metrics.mixing_error(clean[:5], known)
    with pytest.raises(DataError, match="span"):
        metrics.mixing_error(clean[:16], known[:16])


# ------------------------------------------------------------ the published simulation


@pytest.fixture(scope="module")
def published():
    """The cells of the original's simulation, with truth, and what was dropped."""
    folder = Path(os.environ["SCGENLIB_DATA_DIR"]) / "sim_scgacl_scrnmf"
    names = {"counts": "sim.groups3_counts.csv", "true": "sim.groups3_truecounts.csv",
             "dropped": "sim.groups1_Dropout_Pro.csv"}  # fmt: skip
    if not all((folder / name).is_file() for name in names.values()):
        pytest.skip("the files of sim_scgacl_scrnmf are not in SCGENLIB_DATA_DIR")
    read = {k: pd.read_csv(folder / v, index_col=0).T for k, v in names.items()}
    counts, true = (read[k].to_numpy(np.float32) for k in ("counts", "true"))
    kept = counts.any(0)
    types = pd.read_csv(folder / "sim.groups3_groups.csv", index_col=0)["cell_type"]
    layer = sp.csr_matrix(counts[:, kept])
    made = AnnData(layer.log1p(), obs=pd.DataFrame(index=read["counts"].index))
    made.layers.update(counts=layer, true_counts=sp.csr_matrix(true[:, kept]))
    made.layers["dropped"] = sp.csr_matrix(read["dropped"].to_numpy(bool)[:, kept])
    made.obs["cell_type"] = pd.Categorical(types.to_numpy())
    random = np.random.default_rng(0).permutation(types.to_numpy())
    made.obs["random"] = pd.Categorical(random)
    return made


@pytest.fixture(scope="module")
def scales(published):
    """Truth as published (observed totals) and on its own scale; the lost entries."""
    true, seen = published.layers["true_counts"], published.layers["counts"]
    totals = np.asarray(seen.sum(1)).ravel()
    lost = (true > 0).toarray() & (seen.toarray() == 0)
    return metrics.log_truth(true, totals), metrics.log_truth(true), lost


@pytest.mark.data
def test_published_simulation_is_the_one_described(published, scales):
    assert published.shape == (500, 969)
    totals = np.asarray(published.layers["counts"].sum(1)).ravel()
    assert np.median(totals) == 6566.5
    assert np.median(published.layers["true_counts"].sum(1).A1) == 61258.5
    assert scales[2].sum() == 258_901 and published.layers["dropped"].nnz == 273_945
    # Kept entries are equal where both are scaled by the observed totals.
    seen = log_counts(published).values.toarray()
    gap = np.abs(scales[0].toarray() - seen)[seen > 0]
    assert gap.max() < 1e-5
    own = (scales[1].toarray() - seen)[seen > 0]
    assert np.sqrt((own**2).mean()) == pytest.approx(0.165, abs=5e-4)


def arms(published: AnnData) -> dict[str, AnnData]:
    one = published.copy()
    one.obs["one"] = "all"
    return {
        "none": imputers.none(published),
        "gene": imputers.gene_mean(published),
        "type": imputers.type_mean(published),
        "gene + shift": imputers.type_mean(one, "one", cell_shift=True),
        "type + shift": imputers.type_mean(published, cell_shift=True),
        "random": imputers.type_mean(published, "random"),
    }


@pytest.mark.data
def test_published_baselines(published, scales):
    """RMSE, Pearson and cosine to three decimals, in the three usual definitions."""
    as_published, own, lost = scales
    dropped = published.layers["dropped"]
    # Dropped entries, published scale | lost entries, published scale | own scale.
    expected = {
        "none": [(3.739, None, 0.0), (3.846, None), (3.842, None)],
        "gene": [(0.625, 0.934, 0.986), (0.580, 0.934), (0.550, 0.940)],
        "type": [(0.490, 0.960, 0.991), (0.429, 0.963), (0.387, 0.970)],
        "gene + shift": [(0.601, 0.940, 0.987), (0.551, 0.941), (0.569, 0.935)],
        "type + shift": [(0.459, 0.965, 0.992), (0.389, 0.970), (0.415, 0.965)],
    }
    made = arms(published)
    for name, rows in expected.items():
        places = ((as_published, dropped), (as_published, lost), (own, lost))
        for (truth, where), row in zip(places, rows, strict=True):
            found = metrics.masked_scores(made[name].layers["imputed"], truth, where)
            scores = [found["rmse"], found["pcc"], found["cosine"]][: len(row)]
            for value, number in zip(scores, row, strict=True):
                if number is not None:
                    assert value == pytest.approx(number, abs=6e-4), (name, scores)
    # Labels drawn at random: no better than no labels, up to the draw.
    for (truth, where), number in zip(places, (0.633, 0.589, 0.559), strict=True):
        found = metrics.masked_scores(made["random"].layers["imputed"], truth, where)
        assert found["rmse"] == pytest.approx(number, abs=3e-3)


@pytest.mark.data
def test_published_oracles(published, scales):
    """Type means of the TRUTH: with its zeros, and of its non-zeros only."""
    as_published, own, lost = scales
    types = published.obs["cell_type"].to_numpy()

    def oracle(truth: sp.csr_matrix, zeros: bool) -> np.ndarray:
        x, out = truth.toarray(), np.empty(truth.shape)
        for name in np.unique(types):
            rows = types == name
            n = rows.sum() if zeros else np.maximum((x[rows] > 0).sum(0), 1)
            out[rows] = x[rows].sum(0) / n
        return out

    first = metrics.masked_scores(
        oracle(as_published, True), as_published, published.layers["dropped"]
    )
    assert first["rmse"] == pytest.approx(0.468, abs=6e-4)
    assert first["pcc"] == pytest.approx(0.963, abs=6e-4)
    assert first["cosine"] == pytest.approx(0.992, abs=6e-4)
    second = metrics.masked_scores(oracle(own, False), own, lost)
    assert second["rmse"] == pytest.approx(0.370, abs=6e-4)
    assert second["pcc"] == pytest.approx(0.972, abs=6e-4)


@pytest.mark.data
def test_published_clusters_need_no_model(published):
    types, random = (published.obs[k].to_numpy() for k in ("cell_type", "random"))
    made = arms(published)

    def score(name: str, labels: np.ndarray) -> float:
        return metrics.cluster_scores(made[name].layers["imputed"], labels)["ari"]

    assert score("none", types) == pytest.approx(0, abs=0.01)
    assert score("gene", types) == score("type", types) == 1.0
    assert score("random", random) == 1.0
    assert score("random", types) == pytest.approx(0, abs=0.01)


@pytest.mark.data
def test_published_mask_of_all_zeros(published, scales):
    seen, dropped = published.layers["counts"], published.layers["dropped"]
    found = metrics.mask_scores(np.ones(seen.shape, bool), scales[2], seen)
    assert found["n"] == 373_166
    assert found["precision"] == found["flag_all_precision"]
    assert found["flag_all_precision"] == pytest.approx(0.694, abs=5e-4)
    assert found["flag_all_f1"] == pytest.approx(0.819, abs=5e-4)
    other = metrics.mask_scores(dropped, dropped, seen)
    assert other["f1"] == 1
    assert other["flag_all_precision"] == pytest.approx(0.734, abs=5e-4)


@pytest.mark.data
def test_published_types_have_no_structure(published, scales):
    as_published, own, lost = scales
    types = published.obs["cell_type"].to_numpy()
    one = types == "Group1"
    found = metrics.gene_correlation_inflation(own[one], None, types[one])
    assert found["mean_r"] == pytest.approx(0.069, abs=6e-4)
    assert found["null"] == pytest.approx(0.0687, abs=1e-4)
    # A shift per cell follows the truth only through the totals that they share.
    values = arms(published)["gene + shift"].layers["imputed"]
    shared = metrics.oversmoothing(values, as_published, types, where=lost)
    assert shared["correlation"] == pytest.approx(0.43, abs=0.02)
    honest = metrics.oversmoothing(values, own, types, where=lost)
    assert honest["correlation"] == pytest.approx(0, abs=0.015)
    inflated = metrics.gene_correlation_inflation(values, own, types)
    assert inflated["mean_r"] > 5 * inflated["mean_r_truth"]
    halves = np.random.default_rng(0).permutation(one.sum()) % 2
    alone = published[one].copy()
    alone.obs["half"] = halves.astype(str)
    told = imputers.type_mean(alone, "half").layers["imputed"]
    plain = imputers.gene_mean(alone).layers["imputed"]
    assert metrics.false_de(told, halves=halves)["false"] > 0.9
    assert metrics.false_de(plain, halves=halves)["false"] < 0.08
    truth = metrics.false_de(own[one], halves=halves)
    assert truth["false"] == pytest.approx(0.05, abs=0.02)
