"""Metrics of perturbation: worked numbers, nulls, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy.stats import pearsonr

from scgenlib import metrics
from scgenlib.errors import ConfigError, DataError

GENES = ["A", "B", "g1", "g2", "g3"]


def cells(values, conditions, start=0, genes=None, form=sp.csr_matrix) -> AnnData:
    values = np.asarray(values, dtype=np.float32)
    names = [f"c{start + i}" for i in range(len(values))]
    obs = pd.DataFrame({"perturbation": pd.Categorical(conditions)}, index=names)
    var = pd.DataFrame(index=genes or [f"g{i}" for i in range(values.shape[1])])
    return AnnData(form(values), obs=obs, var=var)


@pytest.fixture
def real():
    """Means: A (0, 1, 3, 1, 2), A+B (0, 0, 1, 4, 2)."""
    values = [[0, 1, 2, 1, 2], [0, 1, 4, 1, 2], [0, 0, 1, 5, 2], [0, 0, 1, 3, 2]]
    return cells(values, ["A", "A+ctrl", "A+B", "B+A"], genes=GENES)


@pytest.fixture
def controls():
    """Means: (2, 1, 1, 2, 2) and (2, 1, 1, 2, 3)."""
    first = cells([[2, 1, 0, 2, 2], [2, 1, 2, 2, 2]], ["ctrl"] * 2, 10, GENES)
    second = cells([[2, 1, 1, 2, 3], [2, 1, 1, 2, 3]], ["ctrl"] * 2, 20, GENES)
    return {"control_real": first, "control_predicted": second}


@pytest.fixture
def guess():
    return pd.DataFrame(
        [[1.0, 1, 2, 3, 3], [1, 1, 1, 3, 3]], index=["A", "B+A"], columns=GENES
    )


def many(n=40, g=30, seed=0, start=0):
    """Return cells of ctrl, A, B with real effects."""
    rng = np.random.default_rng(seed)
    names = np.repeat(["ctrl", "A", "B"], n)
    effects = np.random.default_rng(99).normal(size=(3, g)) * [[0], [1], [1]]
    values = 3 + np.repeat(effects, n, axis=0) + rng.normal(size=(3 * n, g))
    return cells(values, names, start)


# ------------------------------------------------------------------- tables of means


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_condition_means_take_every_spelling(form):
    values = [[0, 2], [4, 0], [2, 6], [9, 1], [1, 1]]
    names = ["B+A", "A+B", "A+B", "A+ctrl", "non-targeting"]
    found = metrics.condition_means(cells(values, names, form=form))
    assert list(found.index) == ["A", "A+B", "ctrl"]
    np.testing.assert_allclose(found, [[9, 1], [2, 8 / 3], [1, 1]])
    assert (found.dtypes == np.float64).all()


def test_condition_means_need_the_column():
    some = cells([[1, 2]], ["A"])
    some.obs["guide"] = "A"
    with pytest.raises(DataError, match="'pertubation'.*Did you mean 'perturbation'"):
        metrics.condition_means(some, "pertubation")


def test_pairwise_correlation():
    rows = np.array([[1.0, 2, 3], [2, 4, 6], [3, 2, 1], [5, 5, 5]])
    # 1, -1 and -1; the last row does not vary.
    assert metrics.pairwise_correlation(pd.DataFrame(rows)) == pytest.approx(-1 / 3)
    assert metrics.pairwise_correlation(pd.DataFrame(rows[:2])) == pytest.approx(1)
    assert np.isnan(metrics.pairwise_correlation(pd.DataFrame(rows[2:])))


def test_split_half():
    names = ["ctrl"] * 5 + ["A"] * 4 + ["B"]
    some = cells(np.arange(20).reshape(10, 2), names)
    first, second = metrics.split_half(some, seed=1)
    assert not set(first.obs_names) & set(second.obs_names)
    assert first.obs["perturbation"].value_counts()[["ctrl", "A"]].tolist() == [2, 2]
    assert second.obs["perturbation"].value_counts()[["ctrl", "A"]].tolist() == [3, 2]
    assert first.n_obs + second.n_obs == 9  # B has one cell
    again, other = (metrics.split_half(some, seed=s)[0] for s in (1, 2))
    assert list(again.obs_names) == list(first.obs_names) != list(other.obs_names)
    with pytest.raises(DataError, match="two cells"):
        metrics.split_half(some[[0, 5]])


# ---------------------------------------------------------------------------- scores


def test_scores_by_hand(real, controls, guess):
    found = metrics.perturbation_scores(guess, real, top=2, **controls)
    assert list(found.index) == ["A", "A+B"] and list(found["n_cells"]) == [2, 2]
    # A is left out. Truth of A less its control: B 0, g1 2, g2 -1, g3 0;
    # predicted: 0, 1, 1, 0. Means differ by 0, -1, 2, 1.
    row = found.loc["A"]
    assert row["mse"] == pytest.approx((1 + 4 + 1) / 4)
    assert row["nmse"] == pytest.approx((1 + 4) / (4 + 1))
    r = pearsonr([0, 1, 1, 0], [0, 2, -1, 0]).statistic
    assert row["pearson_delta"] == pytest.approx(r)
    # The top genes are g1 and g2: predicted 1 and 1 do not vary.
    assert np.isnan(row["pearson_delta_top"])
    assert row["mse_top"] == pytest.approx((1 + 4) / 2)
    # g1: the variance is 2 on both sides, so one error is sqrt(2/2 + 2/2) < 2. g2 has
    # no error and the wrong sign; B and g3 are undecided.
    assert row["direction_error"] == pytest.approx(1 / 2)
    assert row["undecided"] == pytest.approx(1 / 2)
    # A and B left out: truth 0, 2, 0, predicted 0, 1, 0, means off by 0, -1, 1.
    row = found.loc["A+B"]
    assert row["mse"] == pytest.approx(2 / 3)
    assert row["nmse"] == pytest.approx(1 / 4)
    assert row["pearson_delta"] == pytest.approx(1)
    # g2 has error sqrt(2/2 + 0) = 1 < 2, g1 sqrt(0 + 2/2) but no change.
    assert row["direction_error"] == 0 and row["undecided"] == pytest.approx(2 / 3)


def test_the_target_can_be_scored(real, controls, guess):
    own = metrics.perturbation_scores(guess, real, exclude_target=False, **controls)
    # A changes by -2, predicted -1: mean 1 off.
    assert own.loc["A", "mse"] == pytest.approx((1 + 6) / 5)
    assert own.loc["A", "nmse"] == pytest.approx((1 + 5) / (4 + 5))


def test_genes_can_be_chosen_and_are_matched_by_name(real, controls, guess):
    some = ["g3", "g1", "g2"]
    found = metrics.perturbation_scores(
        guess[GENES[::-1]], real, genes=some, **controls
    )
    assert found.loc["A", "mse"] == pytest.approx((1 + 4 + 1) / 3)
    # The two controls are matched as well.
    mixed = {**controls, "control_real": controls["control_real"][:, GENES[::-1]]}
    expected = metrics.perturbation_scores(guess, real, **controls)
    found = metrics.perturbation_scores(guess, real, **mixed)
    pd.testing.assert_frame_equal(found, expected)


def test_top_genes_are_those_of_the_truth(controls):
    genes = {name: half[:, GENES[1:]] for name, half in controls.items()}
    some = cells([[4, 5, 2, 1], [4, 5, 2, 1]], ["X"] * 2, genes=GENES[1:])
    guess = pd.DataFrame([[2.0, 3, 9, 8]], ["X"], GENES[1:])
    found = metrics.perturbation_scores(guess, some, top=2, **genes).loc["X"]
    # True changes 3, 4, 0, -1; predicted 1, 2, 7, 5.
    assert found["mse_top"] == pytest.approx((2**2 + 2**2) / 2)
    assert found["pearson_delta_top"] == pytest.approx(1)
    assert found["pearson_delta"] < 0


def test_no_change(real, controls):
    controls["control_predicted"].X = controls["control_predicted"].X * 1.1
    mean = metrics.condition_means(controls["control_predicted"]).loc["ctrl"]
    mean += 1e-7 * np.arange(5)  # rounding of float32 is no change
    table = pd.DataFrame([mean, mean], index=["A", "A+B"]).astype(np.float32)
    found = metrics.perturbation_scores(table, real, top=3, **controls)
    assert found["nmse"].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert found["undecided"].tolist() == [1, 1]
    for name in ("pearson_delta", "pearson_delta_top", "direction_error"):
        assert found[name].isna().all()


def test_errors_divide_by_one_cell_less(controls):
    some = cells([[0, 1, 1, 1.9, 2], [0, 1, 1, 3.9, 2]], ["A"] * 2, genes=GENES)
    table = pd.DataFrame([[0, 1, 1, 9.0, 3]], index=["A"], columns=GENES)
    # g2 changes by 0.9; its variance is 2 in two cells, so one error is 1.
    assert metrics.perturbation_scores(table, some, **controls)["undecided"].item() == 1
    some.X = some.X * 1.1  # 1.19 against 1.1
    found = metrics.perturbation_scores(table, some, **controls)
    assert found["undecided"].item() == 0.75


def test_one_cell_takes_the_error_of_the_control(controls):
    one = cells([[0, 1, 2.6, 2, 2]], ["A"], genes=GENES)
    table = pd.DataFrame([[0, 1, 5.0, 2, 3]], index=["A"], columns=GENES)
    # g1 changes by 1.6; its control has variance 2: one error is sqrt(2/1 + 2/2).
    found = metrics.perturbation_scores(table, one, **controls)
    assert found.loc["A", "undecided"] == 1
    one.X[0, 2] = 2.8
    found = metrics.perturbation_scores(table, one, **controls)
    assert found.loc["A", "undecided"] == 0.75
    made = cells([[0, 1, 5, 2, 3]], ["A"], 30, GENES)
    found = metrics.perturbation_scores(made, one, **controls)
    assert found[["mmd", "sd_pearson", "sd_ratio"]].isna().all(axis=None)
    assert found.loc["A", "energy"] == pytest.approx(2 * np.sqrt(2.2**2 + 1), rel=1e-6)


def test_shared_control_is_refused():
    n = 400
    null = [many(n, 50, seed, 1000 * seed) for seed in range(3)]
    null = [part[(part.obs["perturbation"] == "ctrl").to_numpy()] for part in null]
    truth, fake = (part.copy() for part in null[:2])
    for part in (truth, fake):
        part.obs["perturbation"] = "X"
    control = null[2]
    with pytest.raises(DataError, match="Shared control.*400 cells.*allow_shared"):
        metrics.perturbation_scores(
            fake, truth, control_real=control, control_predicted=control
        )
    both = {"control_real": control, "control_predicted": control}
    inflated = metrics.perturbation_scores(fake, truth, allow_shared=True, **both)
    halves = {"control_real": control[: n // 2], "control_predicted": control[n // 2 :]}
    fair = metrics.perturbation_scores(fake, truth, **halves)
    assert inflated.loc["X", "pearson_delta"] > 0.3
    assert abs(fair.loc["X", "pearson_delta"]) < 0.3
    # A single cell is enough.
    halves["control_real"] = control[: n // 2 + 1]
    with pytest.raises(DataError, match="1 cells"):
        metrics.perturbation_scores(fake, truth, **halves)
    tables = [metrics.condition_means(part) for part in (fake, truth)]
    with pytest.raises(DataError, match="Shared control"):
        metrics.ranks(*tables, **both)


def test_cells_are_compared():
    parts = [many(n, 30, seed, 1000 * seed) for seed, n in enumerate((60, 20))]
    first, second = parts
    control = [p[(p.obs["perturbation"] == "ctrl").to_numpy()] for p in parts]
    pair = {"control_real": control[0], "control_predicted": control[1]}
    second.X = sp.csr_matrix(second.X)
    found = metrics.perturbation_scores(second, first, **pair)
    assert list(found.index) == ["A", "B"]  # the control is not scored
    flat = second.copy()
    means = metrics.condition_means(second)
    flat.X = sp.csr_matrix(means.loc[second.obs["perturbation"]].to_numpy("f4"))
    collapsed = metrics.perturbation_scores(flat, first, **pair)
    np.testing.assert_allclose(collapsed["mse"], found["mse"], rtol=1e-4)
    assert found["sd_ratio"].between(0.9, 1.1).all()
    assert (collapsed["sd_ratio"] < 1e-3).all() and collapsed["sd_pearson"].isna().all()
    for name in ("energy", "mmd"):
        assert (collapsed[name] > 3 * found[name]).all()
    assert (collapsed["sliced_wasserstein"] > 2 * found["sliced_wasserstein"]).all()
    a = [p[(p.obs["perturbation"] == "A").to_numpy()] for p in parts]
    # As many cells on both sides.
    n = {"max_cells": min(len(p) for p in a), "seed": 0}
    assert found.loc["A", "energy"] == pytest.approx(metrics.energy_distance(*a, **n))
    assert found.loc["A", "mmd"] == pytest.approx(metrics.mmd(*a, **n))
    spread = [p.X.toarray().std(0, ddof=1) for p in a]
    assert found.loc["A", "sd_ratio"] == pytest.approx(
        spread[1].mean() / spread[0].mean(), rel=1e-5
    )
    assert found.loc["A", "sd_pearson"] == pytest.approx(
        pearsonr(*spread).statistic, rel=1e-4
    )
    # Means alone give the same scores of means.
    short = metrics.perturbation_scores(second, first, cells=False, **pair)
    table = metrics.perturbation_scores(means, first, **pair)
    pd.testing.assert_frame_equal(short, table)
    pd.testing.assert_frame_equal(short, found[list(short)])
    assert "energy" not in short and "energy" in found
    few = metrics.perturbation_scores(second, first, max_cells=5, **pair)
    assert few["energy"].sum() > found["energy"].sum()


def test_the_ceiling_is_near_the_truth():
    halves = metrics.split_half(many(200, 30), seed=0)
    predicted, real = halves
    control = [p[(p.obs["perturbation"] == "ctrl").to_numpy()] for p in halves]
    pair = {"control_real": control[1], "control_predicted": control[0]}
    found = metrics.perturbation_scores(predicted, real, **pair)
    assert (found["pearson_delta"] > 0.95).all() and (found["nmse"] < 0.1).all()
    tables = [metrics.condition_means(half) for half in halves]
    assert (metrics.ranks(*tables, **pair)[["pds", "centroid_accuracy"]] == 1).all(None)


def test_what_cannot_be_scored(real, controls, guess):
    score = metrics.perturbation_scores
    with pytest.raises(DataError, match="'A\\+C'.*Did you mean 'A\\+B'"):
        score(guess.set_axis(["A", "A+C"]), real, **controls)
    with pytest.raises(DataError, match="table of means.*'g3'"):
        score(guess.drop(columns="g3"), real, **controls)
    with pytest.raises(DataError, match="control of the prediction.*'g3'"):
        less = controls["control_predicted"][:, GENES[:4]]
        score(guess, real, **{**controls, "control_predicted": less})
    with pytest.raises(DataError, match="'g9'"):
        score(guess, real, genes=["g9", "g1"], **controls)
    with pytest.raises(DataError, match="two rows.*'A\\+B'"):
        score(guess.set_axis(["A+B", "B+A"]), real, **controls)
    with pytest.raises(DataError, match="no perturbed"):
        score(guess.iloc[:1].set_axis(["ctrl"]), real, **controls)
    with pytest.raises(DataError, match="NaN"):
        score(guess.replace(1, np.nan), real, **controls)
    with pytest.raises(DataError, match="two genes"):
        score(guess, real, genes=["A", "g1"], **controls)
    with pytest.raises(ConfigError, match="top"):
        score(guess, real, top=1, **controls)
    with pytest.raises(DataError, match="twice"):
        score(guess, real, genes=["g1", "g2", "g1"], **controls)


# ----------------------------------------------------------------------------- ranks


@pytest.fixture
def three():
    """Controls with mean 0 for the truth, and 1 in every gene for the prediction."""
    genes = ["g1", "g2"]
    pair = {
        "control_real": cells([[0, 0], [0, 0]], ["ctrl"] * 2, 0, genes),
        "control_predicted": cells([[1, 1]], ["ctrl"], 10, genes),
    }
    truth = pd.DataFrame([[0.0, 0], [4, 0], [0, 10]], list("XYZ"), genes)
    return truth, pair


def test_ranks_by_hand(three):
    truth, pair = three
    guess = pd.DataFrame([[4.0, 0], [3, 1], [1, 11]], list("XYZ"), truth.columns)
    found = metrics.ranks(guess, truth, **pair)
    # Predicted changes (3, -1), (2, 0), (0, 10). L1 from X's to the true ones is
    # 4, 2, 14: one of three is nearer. From Y's 2, 2, 12: a tie.
    assert found["pds"].tolist() == pytest.approx([1 - 1 / 3, 1 - 0.5 / 3, 1])
    # The mean (4, 0) of X is that of Y: Y is nearer, Z farther.
    assert found["centroid_accuracy"].tolist() == [0.5, 1, 1]
    # Less the mean of the others, (2, 5), X is (2, -5) and (-2, -5): two genes.
    assert found["systema_pearson"].tolist() == pytest.approx([1, 1, 1])
    other = metrics.ranks(
        guess, truth, reference=pd.Series([5, 0], ["g2", "g1"]), **pair
    )
    # Less (0, 5): (4, -5) and (0, -5).
    assert other.loc["X", "systema_pearson"] == pytest.approx(1)
    other = metrics.ranks(
        guess, truth, reference=pd.Series([9, 2], ["g1", "g2"]), **pair
    )
    # Less (9, 2): (-5, -2) and (-9, -2).
    assert other.loc["X", "systema_pearson"] == pytest.approx(1)
    other = metrics.ranks(
        guess, truth, reference=pd.Series([3, 2], ["g1", "g2"]), **pair
    )
    # Less (3, 2): (1, -2) and (-3, -2).
    assert other.loc["X", "systema_pearson"] == pytest.approx(-1)


def test_systema_leaves_the_own_truth_out_of_the_reference():
    genes = ["g1", "g2", "g3"]
    pair = {
        "control_real": cells(np.zeros((2, 3)), ["ctrl"] * 2, 0, genes),
        "control_predicted": cells(np.zeros((2, 3)), ["ctrl"] * 2, 10, genes),
    }
    truth = pd.DataFrame([[5.0, 1, 0], [0, 2, 4], [2, 0, 2]], list("XYZ"), genes)
    guess = pd.DataFrame([[3.0, 3, 1]], ["X"], genes)
    found = metrics.ranks(guess, truth, **pair).loc["X", "systema_pearson"]
    # Less (1, 1, 3): (2, 2, -2) and (4, 0, -3).
    expected = pearsonr([2, 2, -2], [4, 0, -3]).statistic
    assert found == pytest.approx(expected)


def test_one_prediction_for_all_ranks_at_chance():
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(20)]
    names = [f"p{i}" for i in range(41)]
    pair = {
        "control_real": cells(np.zeros((2, 20)), ["ctrl"] * 2, 0, genes),
        "control_predicted": cells(np.zeros((2, 20)), ["ctrl"] * 2, 10, genes),
    }
    truth = pd.DataFrame(rng.normal(size=(41, 20)), names, genes)
    same = pd.DataFrame(np.ones((41, 20)), names, genes)
    found = metrics.ranks(same, truth, **pair)
    # Ranks are 0 to 40 of 41, and 0 to 40 of 40.
    assert found["pds"].mean() == pytest.approx(1 - 20 / 41)
    assert found["centroid_accuracy"].mean() == pytest.approx(0.5)
    assert found["systema_pearson"].isna().sum() == 0
    exact = metrics.ranks(truth, truth, **pair)
    assert (exact[["pds", "centroid_accuracy"]] == 1).all(None)
    assert exact["systema_pearson"].min() == pytest.approx(1)


def test_ranks_leave_the_target_out():
    genes = ["X", "g1", "g2", "g3"]
    pair = {
        "control_real": cells(np.zeros((2, 4)), ["ctrl"] * 2, 0, genes),
        "control_predicted": cells(np.zeros((2, 4)), ["ctrl"] * 2, 10, genes),
    }
    truth = pd.DataFrame([[9.0, 0, 1, 0], [0, 2, 0, 0]], ["X", "Y"], genes)
    guess = pd.DataFrame([[0.0, 0, 1, 0]], ["X"], genes)
    kept = metrics.ranks(guess, truth, exclude_target=False, **pair)
    left = metrics.ranks(guess, truth, **pair)
    assert kept["pds"].tolist() == [0.5] and left["pds"].tolist() == [1]
    assert kept["centroid_accuracy"].tolist() == [0]
    assert left["centroid_accuracy"].tolist() == [1]
    with pytest.raises(DataError, match="two real"):
        metrics.ranks(guess, truth.iloc[:1], **pair)
    with pytest.raises(DataError, match="condition.*'Q'"):
        metrics.ranks(guess.set_axis(["Q"]), truth, **pair)


# ------------------------------------------------------------------ the null experiment


def test_null_experiment():
    found = metrics.null_experiment(n_genes=2000, n=100, n_repeats=12, seed=1)
    assert len(found) == 12 * 4
    mean = found.groupby(["control", "prediction"]).mean(numeric_only=True)
    r, wrong = mean["pearson_delta"], mean["direction_error"]
    assert r["shared", "cells"] == pytest.approx(0.5, abs=0.03)
    assert r["shared", "mean"] == pytest.approx(np.sqrt(0.5), abs=0.03)
    assert r["independent"].tolist() == pytest.approx([0, 0], abs=0.05)
    # Two normals with correlation r differ in sign with probability arccos(r) / pi.
    assert wrong["shared", "cells"] == pytest.approx(1 / 3, abs=0.01)
    assert wrong["shared", "mean"] == pytest.approx(1 / 4, abs=0.01)
    assert wrong["independent"].tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    top = mean["pearson_delta_top"]
    assert top["shared", "cells"] > 0.8 and top["shared", "mean"] > 0.9
    assert top["independent"].abs().max() < 0.3
    # Single repeats hold too.
    one = found[(found["control"] == "shared") & (found["prediction"] == "cells")]
    assert one["pearson_delta"].between(0.44, 0.56).all()
    again = metrics.null_experiment(n_genes=2000, n=100, n_repeats=12, seed=1)
    pd.testing.assert_frame_equal(found, again)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_null_experiment_on_given_cells(form):
    rng = np.random.default_rng(0)
    # Genes of very different spread, and one that no cell shows.
    values = rng.gamma(1, rng.gamma(1, 2, 400), size=(300, 400))
    values[:, 3] = 0
    found = metrics.null_experiment(values=form(values), n=50, n_repeats=30)
    r = found.groupby(["control", "prediction"])["pearson_delta"].mean()
    assert r["shared", "cells"] == pytest.approx(0.5, abs=0.06)
    assert r["shared", "mean"] == pytest.approx(0.71, abs=0.06)
    assert r["independent"].abs().max() < 0.06
    with pytest.raises(ConfigError, match="n_repeats"):
        metrics.null_experiment(n_repeats=0)


# ------------------------------------------------------------- distances between cells


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_energy_distance(form):
    first, second = form(np.array([[0.0], [2]])), form(np.array([[1.0], [1]]))
    assert metrics.energy_distance(first, second) == pytest.approx(1.0)
    assert metrics.energy_distance(first, first) == 0
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(11, 4)) + 1

    def mean(a, b):
        return np.mean([np.linalg.norm(i - j) for i in a for j in b])

    expected = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    assert metrics.energy_distance(form(x), form(y)) == pytest.approx(expected)
    assert metrics.energy_distance(x, y[::-1]) == pytest.approx(expected)
    assert metrics.energy_distance(x, rng.permutation(x)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_mmd_against_plain_loops(form):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(9, 3)) + 0.5
    pairs = [np.sum((x[i] - x[j]) ** 2) for i in range(20) for j in range(i)]
    width = np.median(pairs)  # of the real cells only

    def kernel(a, b):
        return np.mean(
            [
                np.exp(-np.sum((i - j) ** 2) / (scale * width))
                for i in a
                for j in b
                for scale in (0.25, 0.5, 1, 2, 4)
            ]
        )

    expected = kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)
    assert metrics.mmd(form(x), form(y)) == pytest.approx(expected)
    assert metrics.mmd(form(x), form(rng.permutation(x))) == pytest.approx(0, abs=1e-12)


def test_mmd_is_measured_on_the_real_cells_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    far = x + 1e4
    # Each kernel between the sets is 0: what is left is within them, and equal.
    within = metrics.mmd(x, far)
    assert within == pytest.approx(metrics.mmd(x, far + 1e5)) and within > 0.5
    # Stretching both leaves it.
    assert metrics.mmd(7 * x, 7 * (x + 1)) == pytest.approx(metrics.mmd(x, x + 1))
    with pytest.raises(DataError, match="two real"):
        metrics.mmd(x[:1], x)


def test_distances_draw_from_larger_sets():
    x = np.random.default_rng(0).normal(size=(50, 3))
    for distance in (metrics.energy_distance, metrics.mmd):
        some = [distance(x, x, max_cells=20, seed=seed) for seed in (0, 0, 1)]
        assert some[0] == some[1] != some[2] and some[0] > 0
