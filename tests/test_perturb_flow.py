"""From a screen to scores, without any deep model: facts that hold by construction."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scgenlib.conditions import (
    CONTROL,
    ConditionSplit,
    canonical,
    leave_out,
    simulation_split,
    split_controls,
)
from scgenlib.errors import DataError
from scgenlib.layouts import for_cell_eval, from_gears, to_gears
from scgenlib.metrics.perturbation import (
    condition_means,
    pairwise_correlation,
    perturbation_scores,
    ranks,
)
from scgenlib.perturbers import BASELINES, shifted_control
from scgenlib.simperturb import screen

DIALS = dict(n_targets=8, n_doubles=4, n_unmeasured=1, n_pathways=4, seed=3)
DISTANCES = ["energy", "mmd", "sliced_wasserstein"]


@pytest.fixture(scope="module")
def flow():
    """Return train, test, the controls of truth and prediction, and the split."""
    kept, aside = split_controls(screen(900, 60, **DIALS), seed=0)
    split = simulation_split(kept.obs["perturbation"], seed=1)
    train, valid, test = split.apply(kept)
    control = train[train.obs["perturbation"] == CONTROL].copy()
    assert train.n_obs + valid.n_obs + test.n_obs == kept.n_obs
    return train, test, aside, control, split


@pytest.fixture(scope="module")
def tables(flow):
    train, test, _, control, split = flow
    made = {name: f(train, split.test) for name, f in BASELINES.items()}
    made["truth"] = condition_means(test)
    return made


def both(flow) -> dict:
    return {"control_real": flow[2], "control_predicted": flow[3]}


def test_every_baseline_is_scored_on_every_test_condition(flow, tables):
    _, test, _, _, split = flow
    for name, table in tables.items():
        assert list(table.index) == list(split.test), name
        scores = perturbation_scores(table, test, **both(flow))
        assert list(scores.index) == list(split.test)
        assert np.isfinite(scores[["mse", "mse_top", "nmse"]]).all(axis=None)
        sizes = canonical(test.obs["perturbation"]).value_counts()
        assert (scores["n_cells"] == sizes[scores.index]).all()
        placed = ranks(table, tables["truth"], **both(flow))
        assert placed[["pds", "centroid_accuracy"]].stack().between(0, 1).all()


def test_no_change_and_the_truth_are_the_two_ends(flow, tables):
    test = flow[1]
    nothing = perturbation_scores(tables["no_change"], test, **both(flow))
    np.testing.assert_allclose(nothing["nmse"], 1.0)
    assert (nothing["undecided"] == 1).all()
    assert nothing[["pearson_delta", "direction_error"]].isna().all(axis=None)
    placed = ranks(tables["no_change"], tables["truth"], **both(flow))
    # One prediction for all cannot be near every truth.
    assert placed["centroid_accuracy"].mean() == pytest.approx(0.5, abs=0.1)
    perfect = perturbation_scores(tables["truth"], test, **both(flow))
    np.testing.assert_allclose(perfect["mse"], 0, atol=1e-10)
    placed = ranks(tables["truth"], tables["truth"], **both(flow))
    np.testing.assert_array_equal(placed["centroid_accuracy"], 1.0)
    delta = tables["train_mean"] - tables["no_change"].iloc[0]
    assert pairwise_correlation(delta) == pytest.approx(1.0)
    assert pairwise_correlation(tables["truth"] - tables["no_change"].iloc[0]) < 0.99


def test_the_oracle_beats_no_change(flow, tables):
    _, test, _, control, _ = flow
    scores = {
        name: perturbation_scores(
            shifted_control(control, tables[name]), test, **both(flow)
        )
        for name in ("truth", "no_change")
    }
    oracle, nothing = scores["truth"], scores["no_change"]
    assert (oracle["mse"] < 1e-8).all() and (nothing["mse"] > 1e-3).all()
    for name in ("energy", "sliced_wasserstein"):
        assert oracle[name].mean() < nothing[name].mean()
    # Both have the spread of the control, and no other.
    np.testing.assert_allclose(oracle["sd_ratio"], nothing["sd_ratio"], rtol=1e-4)
    assert np.isfinite(oracle[DISTANCES]).all(axis=None)


def test_the_two_controls_must_differ(flow, tables):
    shared = {"control_real": flow[3], "control_predicted": flow[3]}
    for score, truth in ((perturbation_scores, flow[1]), (ranks, tables["truth"])):
        with pytest.raises(DataError, match="[Ss]hared control"):
            score(tables["train_mean"], truth, **shared)
        assert len(score(tables["train_mean"], truth, allow_shared=True, **shared))


def test_exported_files_hold_what_was_scored(flow, tables, tmp_path):
    _, test, aside, control, split = flow
    cells = shifted_control(control, tables["truth"], n_cells=20, seed=0)
    made = {
        "predicted": for_cell_eval(cells, control, tmp_path / "predicted.h5ad"),
        "real": for_cell_eval(test, aside, tmp_path / "real.h5ad"),
    }
    for name, given in made.items():
        back = ad.read_h5ad(tmp_path / f"{name}.h5ad")
        assert list(back.var_names) == list(test.var_names)
        assert set(back.obs["target_gene"]) == {*split.test, "non-targeting"}
        assert back.X.min() >= 0 and (back.X != given.X).nnz == 0
    # The controls of the two files are two sets of cells.
    assert not set(made["real"].obs_names) & set(control.obs_names)
    means = condition_means(made["real"], "target_gene").loc[list(split.test)]
    np.testing.assert_allclose(means, tables["truth"], atol=1e-6)


def test_the_layout_of_gears_changes_no_score(flow, tables):
    adata = screen(900, 60, **DIALS)
    back = from_gears(to_gears(adata))
    pd.testing.assert_frame_equal(condition_means(back), condition_means(adata))
    assert simulation_split(to_gears(adata).obs["condition"]) == flow[4]


def without_noise() -> ad.AnnData:
    """Return cells without any noise, and two doubles that are the sum of singles."""
    rng = np.random.default_rng(0)
    genes = ["A", "B", "C", *(f"G{i}" for i in range(12))]
    base = rng.uniform(2, 3, len(genes))
    effect = dict(zip("ABC", rng.normal(0, 0.3, (3, len(genes))), strict=True))
    names = ["ctrl", "A", "B", "C", "A+B", "B+C"]
    rows = [base + sum(effect[g] for g in n.split("+") if n != CONTROL) for n in names]
    obs = pd.DataFrame({"perturbation": np.repeat(names, 4)})
    obs.index = [f"c{i}" for i in range(len(obs))]
    X = np.repeat(np.array(rows), 4, axis=0)
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=genes))


def test_additive_is_exact_where_doubles_are_sums():
    kept, aside = split_controls(without_noise())
    given = {"train": ["A", "B", "C"], "test": ["B+A", "C+B"]}
    split = ConditionSplit.from_dict(given, kept.obs["perturbation"])
    assert split.groups["combo_seen2"] == ("A+B", "B+C")
    train, _, test = split.apply(kept)
    control = train[train.obs["perturbation"] == CONTROL]
    options = {"control_real": aside, "control_predicted": control}
    truth = condition_means(test)
    scores, placed = {}, {}
    for name, baseline in BASELINES.items():
        table = baseline(train, split.test)
        scores[name] = perturbation_scores(table, test, **options)
        placed[name] = ranks(table, truth, **options)
    exact = scores["additive"]
    assert (exact["mse"] < 1e-20).all() and (exact["nmse"] < 1e-20).all()
    np.testing.assert_allclose(exact["pearson_delta"], 1.0)
    assert (exact["direction_error"] == 0).all()
    assert (placed["additive"][["pds", "centroid_accuracy"]] == 1).all(axis=None)
    for name in ("no_change", "train_mean", "matching_mean"):
        assert (scores[name]["mse"] > 1e-4).all()
    # The mean of two singles is half the way.
    np.testing.assert_allclose(scores["matching_mean"]["nmse"], 0.25)
    np.testing.assert_allclose(scores["matching_mean"]["pearson_delta"], 1.0)
    # Without the single of B, it is no longer the sum.
    left = leave_out(kept.obs["perturbation"], ["B"], valid_share=None)
    assert left.test == ("A+B", "B", "B+C")
    train, _, test = left.apply(kept)
    table = BASELINES["additive"](train, left.test)
    assert set(table.attrs["fallback"]) == {"A+B", "B", "B+C"}
    assert (perturbation_scores(table, test, **options)["mse"] > 1e-4).all()
