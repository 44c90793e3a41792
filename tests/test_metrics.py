"""Metrics: worked numbers, properties that must hold, and refusals."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from sklearn.ensemble import RandomForestClassifier

from scgenlib import _matrix, baselines, metrics
from scgenlib.errors import ConfigError, DataError
from scgenlib.metrics.rare import classifier_hash


def cells(sizes=(60, 40, 12), n_genes=40, seed=0, prefix="cell"):
    """Log1p Poisson counts of a few types, each with its own marker genes."""
    rng = np.random.default_rng(seed)
    types = np.repeat([f"type {i}" for i in range(len(sizes))], sizes)
    rate = np.full((len(types), n_genes), 0.8)
    for i in range(len(sizes)):
        rate[types == f"type {i}", 5 * i : 5 * i + 5] = 6.0
    counts = rng.poisson(rate)
    obs = pd.DataFrame({"cell_type": pd.Categorical(types)})
    obs.index = [f"{prefix} {i}" for i in range(len(types))]
    var = pd.DataFrame(index=[f"gene {i}" for i in range(n_genes)])
    return AnnData(sp.csr_matrix(np.log1p(counts), dtype=np.float32), obs=obs, var=var)


@pytest.fixture(scope="module")
def train():
    return cells()


@pytest.fixture(scope="module")
def heldout():
    return cells(seed=1, prefix="test")


# -- Wasserstein ----------------------------------------------------------------


def test_wasserstein_of_points_worked_on_paper():
    x = np.array([[0.0, 0.0], [4.0, 0.0]])
    y = np.array([[4.0, 3.0], [0.0, 3.0]])  # 3 away, in the other order
    assert metrics.wasserstein(x, y) == pytest.approx(3.0)
    # Mass 1/2 at 0 and at 2 against mass 1 at 1: everything moves by 1.
    assert metrics.wasserstein(np.array([[0.0], [2.0]]), np.array([[1.0]])) == (
        pytest.approx(1.0)
    )
    # One third of the mass of {0} is at 3: mean distance 1.
    three = np.array([[0.0], [0.0], [3.0]])
    assert metrics.wasserstein(np.array([[0.0]]), three) == pytest.approx(1.0)


def test_wasserstein_of_a_set_with_itself_is_zero(train):
    assert metrics.wasserstein(train, train) == 0.0
    shifted = train.X.toarray() + 2.0
    gap = 2.0 * np.sqrt(train.n_vars)
    assert metrics.wasserstein(train.X.toarray(), shifted) == pytest.approx(gap)


def test_unequal_sizes_agree_with_the_assignment_of_repeated_cells():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(30, 3)) + 0.5
    repeated = metrics.wasserstein(np.repeat(x, 3, axis=0), np.repeat(y, 2, axis=0))
    assert metrics.wasserstein(x, y) == pytest.approx(repeated, rel=1e-9)


def test_published_scale_divides_by_the_number_of_cells():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 4)) + 1.0
    plain = metrics.wasserstein(x, y)
    assert metrics.wasserstein(x, y, scale="published") == pytest.approx(plain / 30)
    assert metrics.wasserstein(x / 30, y / 30) == pytest.approx(plain / 30)
    # Unequal sizes: no longer a rescaling, a cloud against its own copy is not 0.
    copy = np.concatenate([x, x, x]) + 0.0
    assert metrics.wasserstein(x, copy) == pytest.approx(0.0, abs=1e-9)
    assert metrics.wasserstein(x, copy, scale="published") > 0.01


def test_large_sets_are_subsampled_reproducibly(train, heldout):
    a = metrics.wasserstein(train, heldout, max_cells=50, seed=3)
    assert a == metrics.wasserstein(train, heldout, max_cells=50, seed=3)
    assert a != metrics.wasserstein(train, heldout, max_cells=50, seed=4)


@pytest.mark.parametrize("seed", range(3))
def test_sliced_is_at_most_full_wasserstein(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(25, 6)), rng.gamma(2.0, size=(35, 6))
    sliced = metrics.sliced_wasserstein(x, y, seed=seed)
    assert 0 < sliced <= metrics.wasserstein(x, y)
    same = metrics.sliced_wasserstein(x, y[:25], seed=seed)
    assert 0 < same <= metrics.wasserstein(x, y[:25])


def test_sliced_in_one_dimension_is_wasserstein():
    x, y = np.array([[0.0], [1.0], [5.0]]), np.array([[2.0], [2.0], [6.0]])
    # Sorted pairs: |0-2|, |1-2|, |5-6|.
    assert metrics.sliced_wasserstein(x, y) == pytest.approx(4 / 3)
    assert metrics.wasserstein(x, y) == pytest.approx(4 / 3)


# -- MMD ------------------------------------------------------------------------


def test_mmd_worked_on_paper():
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [4.0]])
    k = lambda d: np.exp(-(d**2) / 2)  # noqa: E731
    expected = k(1) + k(1) - 2 * (k(3) + k(4) + k(2) + k(3)) / 4
    assert metrics.mmd2(x, y, bandwidth=1.0) == pytest.approx(expected)


def test_mmd_is_unbiased_and_can_be_clamped():
    rng = np.random.default_rng(0)
    values, clamped = [], []
    for seed in range(40):
        x, y = rng.normal(size=(40, 5)), rng.normal(size=(40, 5))
        values.append(metrics.mmd2(x, y, seed=seed))
        clamped.append(metrics.mmd2(x, y, seed=seed, clamp=True))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error
    assert min(values) < 0
    assert min(clamped) == 0
    assert metrics.mmd2(x, y + 3.0) > 0.5


# -- two samples, precision and recall ------------------------------------------


def test_two_sample_auroc_on_same_and_other_cells(train, heldout):
    same = metrics.two_sample_auroc(train, heldout, n_pcs=10, n_trees=50)
    other = metrics.two_sample_auroc(
        train, baselines.shuffle_genes(train, 112), n_pcs=10, n_trees=50
    )
    copies = metrics.two_sample_auroc(
        train, baselines.copy_cells(train, 112), n_pcs=10, n_trees=50
    )
    assert 0.35 < same < 0.65
    assert other > 0.75
    assert copies < 0.3


def test_prdc_worked_on_paper():
    real = np.array([[0.0], [1.0], [10.0], [11.0]])
    fake = np.array([[0.4], [0.6], [50.0], [51.0]])
    # k = 1: every ball has radius 1, fake balls 0.2, 0.2, 1, 1.
    # Inside real balls: both low ones, each in the balls of 0 and of 1.
    scores = metrics.prdc(real, fake, k=1)
    assert scores == pytest.approx(
        {"precision": 0.5, "recall": 0.0, "density": 1.0, "coverage": 0.5}
    )


def test_prdc_of_a_set_with_itself_is_perfect(train):
    scores = metrics.prdc(train, train)
    assert scores["precision"] == scores["recall"] == scores["coverage"] == 1
    assert scores["density"] > 0.9


def test_prdc_sees_a_lost_type(train, heldout):
    one = heldout[heldout.obs["cell_type"] == "type 0"]
    scores = metrics.prdc(train, one)
    assert scores["precision"] > 0.9
    assert scores["coverage"] < 0.7


# -- memorisation ---------------------------------------------------------------


def test_memorisation_finds_copies_and_clears_new_cells(train, heldout):
    copied = metrics.memorisation(baselines.copy_cells(train, 100), train, heldout)
    assert copied["duplicates"] == 1.0
    assert copied["to_train"] == 0.0 and copied["ratio"] == 0.0
    assert copied["adversarial_accuracy_train"] < 0.2
    assert copied["membership_auc"] > 0.9
    fresh = metrics.memorisation(cells(seed=2), train, heldout)
    assert fresh["duplicates"] == 0.0
    assert fresh["ratio"] == pytest.approx(1.0, abs=0.1)
    assert fresh["heldout_ratio"] == pytest.approx(1.0, abs=0.1)
    assert 0.35 < fresh["adversarial_accuracy_heldout"] < 0.65
    assert 0.35 < fresh["membership_auc"] < 0.65


def test_memorisation_worked_on_paper():
    train = np.array([[0.0], [10.0], [20.0], [30.0]])
    heldout = np.array([[2.0], [12.0], [24.0]])
    # To the nearest training cell: generated 1, 1, 3, held-out 2, 2, 4. To the
    # nearest held-out cell: generated 1, 1, 1, training 2, 2, 4, 6.
    found = metrics.memorisation(np.array([[1.0], [11.0], [23.0]]), train, heldout)
    assert (found["to_train"], found["ratio"]) == (1.0, 0.5)
    assert found["to_heldout"] == 1.0
    assert found["heldout_ratio"] == pytest.approx(1 / 3)


def test_a_bigger_training_set_is_not_taken_for_copying(heldout):
    many = cells(sizes=(600, 400, 120), seed=5, prefix="many")
    result = metrics.memorisation(cells(seed=2), many, heldout)
    assert result["ratio"] == pytest.approx(1.0, abs=0.1)


def test_copies_are_accused_when_less_than_half_is_held_out():
    many = cells(sizes=(140, 93, 28), seed=5, prefix="many")  # 70 to 30
    few = cells(seed=6, prefix="few")
    copies = baselines.copy_cells(many, few.n_obs)
    assert metrics.memorisation(copies, many, few)["ratio"] == 0.0
    for close in (baselines.jitter, baselines.smote):
        found = metrics.memorisation(close(many, few.n_obs), many, few)
        assert found["ratio"] < 0.8 and found["duplicates"] == 0.0
    smooth = baselines.pc_gaussian(many, few.n_obs, n_pcs=3)
    found = metrics.memorisation(smooth, many, few)
    assert found["ratio"] == pytest.approx(found["heldout_ratio"], abs=0.1)
    assert found["heldout_ratio"] < 0.9  # smooth, not copied


def test_memorisation_needs_cells_on_every_side(train, heldout):
    with pytest.raises(DataError, match="2 held-out cells at least"):
        metrics.memorisation(heldout, train, heldout[:1])


# -- genes ----------------------------------------------------------------------


def test_gene_moments_worked_on_paper():
    real = np.array([[0.0, 1.0], [2.0, 1.0]])
    fake = sp.csr_matrix([[0.0, 3.0], [0.0, 0.0], [3.0, 0.0]])
    table = metrics.gene_moments(real, fake)
    assert table["mean_real"].tolist() == [1, 1]
    assert table["mean_fake"].tolist() == [1, 1]
    assert table["variance_real"].tolist() == [1, 0]
    assert table["variance_fake"].tolist() == pytest.approx([2, 2])
    assert table["zeros_real"].tolist() == [0.5, 0]
    assert table["zeros_fake"].tolist() == pytest.approx([2 / 3, 2 / 3])


@pytest.mark.parametrize("ddof", [0, 1])
def test_gene_moments_match_numpy(ddof):
    X = sp.random(50, 20, 0.3, "csr", np.float32, rng=np.random.default_rng(3))
    for matrix in (X, X.toarray()):
        mean, variance = _matrix.mean_variance(matrix, ddof=ddof)
        np.testing.assert_allclose(mean, X.toarray().mean(0), rtol=1e-5)
        np.testing.assert_allclose(variance, X.toarray().var(0, ddof=ddof), rtol=1e-4)


def test_shuffling_keeps_moments_and_loses_correlations(train, heldout):
    shuffled = baselines.shuffle_genes(train, train.n_obs)
    agreement = metrics.moment_agreement(train, shuffled)
    assert agreement["mean_error"] == pytest.approx(0, abs=1e-6)
    assert agreement["zeros_r"] == pytest.approx(1)
    lost = metrics.gene_correlation(train, shuffled)
    kept = metrics.gene_correlation(train, heldout)
    assert kept["agreement"] > 0.6 > 0.3 > abs(lost["agreement"])
    assert lost["strength_fake"] < lost["strength_real"]


def test_a_constant_generator_has_no_correlation(train):
    flat = np.tile(train.X.toarray().mean(0), (30, 1))
    result = metrics.gene_correlation(train, flat)
    assert np.isnan(result["agreement"]) and result["strength_fake"] == 0


# -- clusterings ----------------------------------------------------------------


def test_perfect_clusters_under_other_names():
    true = ["a"] * 4 + ["b"] * 3 + ["c"] * 2
    pred = [1] * 4 + [2] * 3 + [0] * 2
    assert metrics.ari(true, pred) == 1 and metrics.nmi(true, pred) == pytest.approx(1)
    assert metrics.macro_f1(true, pred, matched=False) == 0
    assert metrics.macro_f1(true, pred) == 1
    assert metrics.matched_labels(true, pred).tolist() == true


def test_surplus_clusters_keep_their_name_and_score_nothing():
    true, pred = ["a"] * 4 + ["b"] * 4, [0, 0, 0, 2, 1, 1, 1, 1]
    names = metrics.matched_labels(true, pred).tolist()
    assert names == ["a", "a", "a", "cluster 2", "b", "b", "b", "b"]
    assert metrics.macro_f1(true, pred) == pytest.approx((6 / 7 + 1) / 2)


def test_a_cluster_is_not_named_after_a_type_it_does_not_hold():
    true, pred = ["a"] * 9 + ["b"], [1] + [0] * 9  # the cell of b is in cluster 0
    names = metrics.matched_labels(true, pred).tolist()
    assert names == ["cluster 1"] + ["a"] * 9


@pytest.mark.parametrize("seed", range(20))
def test_matching_never_lowers_macro_f1(seed):
    rng = np.random.default_rng(seed)
    true = rng.integers(4, size=50).astype(str)
    pred = rng.integers(rng.integers(2, 8), size=50)
    before = metrics.macro_f1(true, pred, matched=False)
    assert metrics.macro_f1(true, pred) >= before
    # On equal code sets this is scikit-learn's score on the two codes.
    from sklearn.metrics import f1_score

    codes = f1_score(
        true.astype(int), pred, labels=range(4), average="macro", zero_division=0
    )
    assert before == pytest.approx(codes)


def test_leiden_finds_types_and_repeats(train):
    found = metrics.leiden(train, 0.5, n_pcs=5, n_neighbors=10, seed=1)
    again = metrics.leiden(train, 0.5, n_pcs=5, n_neighbors=10, seed=1)
    assert (found == again).all()
    assert metrics.ari(train.obs["cell_type"], found) > 0.6
    # Numbered from the largest on, whatever igraph's order was.
    assert (np.diff(np.bincount(found)) <= 0).all()


def test_best_over_a_grid_is_at_least_the_score_at_one(train):
    table = metrics.ari_over_resolutions(
        train, train.obs["cell_type"], [0.3, 1.0, 2.0], n_pcs=5, n_neighbors=10
    )
    at_one = table.loc[table["resolution"] == 1.0, "ari"].item()
    assert table["ari"].max() >= at_one
    assert table["clusters"].is_monotonic_increasing
    single = metrics.leiden(train, 1.0, n_pcs=5, n_neighbors=10)
    assert metrics.ari(train.obs["cell_type"], single) == at_one


@pytest.mark.parametrize("method", ["cv2", "fano", "pca"])
def test_gene_scores_prefer_genes_that_differ_between_types(method):
    few = cells((60, 40, 30))
    rate = np.linspace(0.3, 6.0, 160)  # other genes cover the markers' means
    noise = np.log1p(np.random.default_rng(1).poisson(rate, (few.n_obs, 160)))
    values = sp.hstack([few.X[:, :15], noise.astype(np.float32)], "csr")
    chosen = metrics.informative_genes(values, method, 15)
    assert len(chosen) == len(set(chosen)) == 15
    assert np.mean(chosen < 15) > 0.5  # by chance 9 % would be markers


def test_fano_takes_the_highest():
    x = np.array([[1.0, 0.0, 2.0], [1.0, 2.0, 3.0]])
    assert metrics.informative_genes(x, "fano", 3).tolist() == [1, 2]


def test_feature_selection_scores_real_cells(train, heldout):
    options = {"n_genes": 15, "n_pcs": 5, "n_neighbors": 10, "resolution": 0.5}
    turned = heldout[:, ::-1]  # genes in another order are matched by name
    good = metrics.feature_selection_utility(train, turned, "pca", **options)
    assert set(good) == {"ari", "nmi", "macro_f1", "clusters", "genes"}
    markers = set(train.var_names[:15])
    assert len(markers & set(good["genes"])) > 10
    # Generated cells whose types differ in other genes point to useless ones.
    misled = heldout.copy()
    misled.X = heldout.X[:, ::-1]
    poor = metrics.feature_selection_utility(train, misled, "pca", **options)
    assert len(markers & set(poor["genes"])) < 5
    assert good["ari"] > 0.6 > 0.3 > poor["ari"]
    collapsed = np.tile(train.X[0].toarray(), (20, 1))
    with pytest.raises(DataError, match="collapsed"):
        metrics.feature_selection_utility(train, collapsed)


# -- rare cells -----------------------------------------------------------------


@pytest.fixture(scope="module")
def rare_table(train, heldout):
    arms = metrics.rare_arms(train, "type 2", seed=0)
    return metrics.rare_utility(train, heldout, "type 2", arms, n_pcs=10, n_trees=30)


def test_every_arm_has_the_same_forest(rare_table):
    forest = RandomForestClassifier(30, random_state=0)
    assert set(rare_table["classifier_hash"]) == {classifier_hash(forest)}
    forest.fit([[0], [1]], [0, 1])  # the data do not enter, the settings do
    assert set(rare_table["classifier_hash"]) == {classifier_hash(forest)}
    for weaker in ({"n_estimators": 10}, {"max_depth": 5}, {"random_state": 1}):
        other = RandomForestClassifier(**{**forest.get_params(), **weaker})
        assert classifier_hash(other) not in set(rare_table["classifier_hash"])
    assert rare_table["arm"].tolist() == [
        "real only",
        "class weights",
        "over-sampling",
        "SMOTE",
        "SMOTE in PCs",
        "jittered copies",
    ]
    assert rare_table["added"].tolist() == [0, 0, 120, 120, 120, 120]
    assert (rare_table["n_test_rare"] == 12).all()


def test_rare_scores_are_those_of_the_predictions(train, heldout, rare_table):
    scores = rare_table[["recall", "precision", "f1", "macro_f1", "balanced_accuracy"]]
    assert ((scores >= 0) & (scores <= 1)).all(axis=None)
    # Cells of the common type sold as rare ones must cost precision.
    liars = baselines.copy_cells(train, 60, label="type 0", seed=1)
    liars.obs["cell_type"] = pd.Categorical(["type 2"] * 60)
    arms = {"real only": None, "liars": liars}
    table = metrics.rare_utility(
        train, heldout, "type 2", arms, n_pcs=10, n_trees=30
    ).set_index("arm")
    assert table.loc["liars", "precision"] < table.loc["real only", "precision"]
    first = rare_table.set_index("arm").loc["real only", "f1"]
    assert table.loc["real only", "f1"] == first


def test_calibration_worked_on_paper():
    # Brier: (0.01 + 0.16 + 0.01 + 0.04) / 4. The bins of 0.1 and 0.9 are off by 0.1,
    # that of 0.6 by 0.4 and that of 0.2 by 0.2, one cell in four each.
    p, y = np.array([0.1, 0.6, 0.9, 0.2]), np.array([False, True, True, False])
    assert metrics.calibration(p, y) == pytest.approx({"brier": 0.055, "ece": 0.2})
    # One bin: mean probability 0.55 of 0.5, however wrong each cell is.
    p = np.array([0.53, 0.57])
    found = metrics.calibration(p, np.array([True, False]))
    assert found["ece"] == pytest.approx(0.05)
    assert found["brier"] == pytest.approx((0.47**2 + 0.57**2) / 2)
    # A probability of 1 belongs to the last bin; 0.1 + 0.2 to that of 0.3.
    assert metrics.calibration(np.ones(3), np.ones(3, bool)) == {"brier": 0, "ece": 0}
    pair = np.array([0.3, 0.3 - 1e-16]), np.array([True, False])
    assert metrics.calibration(*pair)["ece"] == pytest.approx(0.2)


def test_rare_utility_reports_the_calibration_of_its_forest(train, heldout):
    # Common cells sold as rare ones make the forest too sure of the rare type.
    arms = {"real only": None, "liars": baselines.copy_cells(train, 60, label="type 0")}
    arms["liars"].obs["cell_type"] = "type 2"
    table = metrics.rare_utility(
        train, heldout, "type 2", arms, n_pcs=10, n_trees=30
    ).set_index("arm")
    assert (table[["brier", "ece"]] >= 0).all(axis=None)
    assert table.loc["liars", "brier"] > 2 * table.loc["real only", "brier"]
    assert table.loc["liars", "ece"] > 2 * table.loc["real only", "ece"]
    # Worked again from the same forest.
    pca = _matrix.fit_pca(train.X, 10, 0)
    forest = RandomForestClassifier(30, random_state=0)
    forest.fit(pca.transform(train.X.toarray()), train.obs["cell_type"].astype(str))
    votes = forest.predict_proba(pca.transform(heldout.X.toarray()))[:, 2]
    off = votes - (heldout.obs["cell_type"] == "type 2").to_numpy()
    assert table.loc["real only", "brier"] == pytest.approx((off**2).mean())


def test_smote_in_components_lies_between_neighbours_there(train):
    made = metrics.rare_arms(train, "type 2", n_extra=30, n_pcs=3)["SMOTE in PCs"]
    pca = _matrix.fit_pca(train.X, 3, 0)
    own = train[train.obs["cell_type"] == "type 2"].X.toarray()
    scores, points = pca.transform(own), pca.transform(made.X.toarray())
    gaps = np.linalg.norm(scores[:, None] - scores, axis=2)
    near = np.argsort(gaps, axis=1)[:, 1:6]
    for point in points:
        # Distance to the nearest of the lines from a cell to its five neighbours.
        apart = [
            np.linalg.norm(point - scores[i]) + np.linalg.norm(point - scores[j])
            - gaps[i, j]
            for i in range(len(own))
            for j in near[i]
        ]  # fmt: skip
        assert min(apart) < 1e-4
    assert made.X.min() >= 0 and sp.issparse(made.X)
    assert set(made.obs["cell_type"]) == {"type 2"} and made.n_obs == 30
    again = metrics.rare_arms(train, "type 2", n_extra=30, n_pcs=3)["SMOTE in PCs"]
    assert (again.X != made.X).nnz == 0
    # The other components would have chosen other neighbours.
    more = metrics.rare_arms(train, "type 2", n_extra=30)["SMOTE in PCs"]
    assert (more.X != made.X).nnz > 0
    one = cells((20, 1))
    lone = metrics.rare_arms(one, "type 1", n_extra=4)["SMOTE in PCs"]
    assert np.allclose(lone.X.toarray(), one.X[-1].toarray())


def test_cut_type_keeps_a_share_and_three_cells(train, heldout):
    def left(share, seed=0):
        few = metrics.cut_type(train, "type 0", share, seed)
        others = train.obs_names[train.obs["cell_type"] != "type 0"]
        assert list(few.obs_names[-len(others) :]) == list(others)
        return list(few.obs_names[: -len(others)])

    # 60 cells: 10 % are 6, 5 % are 3, 2 % would be 1.
    assert [len(left(share)) for share in (1, 0.1, 0.05, 0.02)] == [60, 6, 3, 3]
    assert left(0.1) == sorted(left(0.1), key=list(train.obs_names).index)
    assert set(left(0.05)) < set(left(0.1))
    assert left(0.1) == left(0.1) != left(0.1, seed=1)
    assert train.n_obs == 112  # the cells given are not changed
    for share in (0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="at most 1"):
            metrics.cut_type(train, "type 0", share)
    with pytest.raises(DataError, match="Did you mean 'type 0'"):
        metrics.cut_type(train, "type0", 0.5)
    with pytest.raises(DataError, match="2 cells"):
        metrics.cut_type(cells((20, 2)), "type 1", 0.5)


def test_class_weights_decide_where_two_types_look_alike():
    # 5 rare and 20 common cells are the same to the forest, 100 are common for sure.
    def alike(prefix):
        values = np.repeat([[0, 3, 1], [3, 0, 2]], [25, 100], axis=0)
        types = np.repeat(["rare", "common"], [5, 120])
        obs = pd.DataFrame({"cell_type": pd.Categorical(types)})
        obs.index = [f"{prefix} {i}" for i in range(125)]
        return AnnData(values.astype(np.float32), obs=obs)

    arms = {"real only": None, "class weights": "class weights"}
    table = metrics.rare_utility(
        alike("train"), alike("test"), "rare", arms, n_pcs=2, n_trees=20
    ).set_index("arm")
    assert table.loc["real only", "recall"] == 0
    assert table.loc["class weights", "recall"] == 1
    assert table.loc["class weights", "precision"] == pytest.approx(5 / 25)
    assert (table["added"] == 0).all()


def test_rare_utility_refuses_unfair_set_ups(train, heldout):
    with pytest.raises(DataError, match="among the training cells"):
        metrics.rare_utility(train, train, "type 2", {"real only": None})
    with pytest.raises(DataError, match="Did you mean 'type 2'"):
        metrics.rare_utility(train, heldout, "type2", {"real only": None})
    with pytest.raises(ConfigError, match="Did you mean 'class weights'"):
        metrics.rare_utility(train, heldout, "type 2", {"w": "class weight"})
    stranger = baselines.copy_cells(train, 5)
    stranger.obs["cell_type"] = "type 9"
    with pytest.raises(ConfigError, match="type 9"):
        metrics.rare_utility(train, heldout, "type 2", {"s": stranger})


# -- what all share -------------------------------------------------------------

PAIRWISE = [
    metrics.wasserstein,
    metrics.sliced_wasserstein,
    metrics.mmd2,
    metrics.prdc,
    metrics.moment_agreement,
    metrics.gene_correlation,
]


@pytest.mark.parametrize("metric", PAIRWISE, ids=lambda f: f.__name__)
def test_dense_sparse_and_anndata_agree(metric, train, heldout):
    x, y = train.X, heldout.X
    expected = metric(train, heldout)
    for form in [(x, y), (x.toarray(), y), (x.toarray(), y.toarray())]:
        found = metric(*form)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("metric", PAIRWISE, ids=lambda f: f.__name__)
def test_bad_input_is_refused(metric, train):
    broken = train.X.toarray()
    broken[3, 4] = np.nan
    with pytest.raises(DataError, match="NaN"):
        metric(train, broken)
    with pytest.raises(DataError, match="40 and 39 genes"):
        metric(train, train[:, :39])
    with pytest.raises(DataError, match=r"shape \(0, 40\)"):
        metric(train, train.X[:0])


def test_genes_are_matched_by_name(train, heldout):
    turned = heldout[:, ::-1]
    assert metrics.wasserstein(train, turned) == metrics.wasserstein(train, heldout)


def test_reference_split_is_disjoint_and_seeded(train):
    a, b = metrics.reference_split(train, seed=1)
    assert a.n_obs == b.n_obs == 56
    assert not set(a.obs_names) & set(b.obs_names)
    c, _ = metrics.reference_split(train, seed=2)
    assert list(a.obs_names) != list(c.obs_names)


def test_unknown_options_name_the_nearest(train):
    with pytest.raises(ConfigError, match="Did you mean 'published'"):
        metrics.wasserstein(train, train, scale="publishd")
    with pytest.raises(ConfigError, match="Did you mean 'fano'"):
        metrics.informative_genes(train, "Fanoo")
    with pytest.raises(ConfigError, match="above 0"):
        metrics.leiden(train, resolution=0)


def test_nothing_dense_above_one_gigabyte():
    wide = sp.csr_matrix((60_000, 5_000), dtype=np.float32)
    with pytest.raises(DataError, match="1.2 GB"):
        _matrix.dense(wide)
    x, y = _matrix.as_pair(wide, np.zeros((3, 5_000), np.float32))
    assert sp.issparse(x) and sp.issparse(y)
