"""Simple predictions of perturbations: worked numbers, and what they may read."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from scgenlib import metrics, perturbers
from scgenlib.errors import ConfigError, DataError

GENES = ["A", "B", "C", "g1"]
every = pytest.mark.parametrize("name", list(perturbers.BASELINES))


def cells(values, conditions, start=0, genes=None, form=sp.csr_matrix) -> AnnData:
    values = np.asarray(values, dtype=np.float32)
    names = [f"c{start + i}" for i in range(len(values))]
    obs = pd.DataFrame({"perturbation": pd.Categorical(conditions)}, index=names)
    var = pd.DataFrame(index=genes or GENES)
    return AnnData(form(values), obs=obs, var=var)


# Control (1, 2, 3, 4); changes A (-1, 1, 0, 0), B (0, -2, 0, 3), C (1, 0, -3, 0).
ORIGIN = np.array([1, 2, 3, 4])
CHANGE = {"A": [-1, 1, 0, 0], "B": [0, -2, 0, 3], "C": [1, 0, -3, 0]}
CHANGE = {name: np.array(change) for name, change in CHANGE.items()}


@pytest.fixture
def train():
    """B has two cells: conditions, not cells, have equal weight."""
    # Over the control cells A goes with B, and against C; g1 does not vary.
    shape = np.array([[1, 1, -2, 0], [-1, -1, 2, 0], [0.5, -0.5, 0, 0]])
    control = ORIGIN + np.vstack([shape, -shape[2]])
    rows = [ORIGIN + CHANGE[name] for name in "ABBC"]
    return cells(np.vstack([control, *rows]), ["ctrl"] * 4 + list("ABBC"))


def changes(table: pd.DataFrame) -> np.ndarray:
    return table.to_numpy() - ORIGIN


@every
def test_every_table(name, train):
    table = perturbers.BASELINES[name](train, ["B+A", "C", "A+ctrl", "C"])
    assert list(table.index) == ["A+B", "C", "A"] and list(table.columns) == GENES
    assert table.attrs["method"] == name.replace("_", " ")
    assert isinstance(table.attrs["fallback"], dict)
    dense = train.copy()
    dense.X = train.X.toarray()
    same = perturbers.BASELINES[name](dense, ["B+A", "C", "A+ctrl"])
    pd.testing.assert_frame_equal(table, same)
    # One name may stand alone.
    one = perturbers.BASELINES[name](train, "C")
    np.testing.assert_allclose(one.loc["C"], table.loc["C"])
    # A table of predictions goes straight into the scores.
    control = train[:2], train[2:4]
    table = perturbers.BASELINES[name](train, list("ABC"), control=control[1])
    scores = metrics.perturbation_scores(
        table, train, control_real=control[0], control_predicted=control[1]
    )
    assert list(scores.index) == list("ABC") and scores["mse"].notna().all()


@every
def test_a_condition_is_never_predicted_from_its_own_cells(name, train):
    double = cells([ORIGIN + [9, 9, 9, 9]], ["A+B"], 50)
    for query, changed in (("B", "B"), ("A+B", "A+B")):
        known = [train, double]
        both = AnnData(
            sp.vstack([part.X for part in known], "csr"),
            obs=pd.concat([part.obs.astype(str) for part in known]),
            var=train.var,
        )
        before = perturbers.BASELINES[name](both, [query])
        own = (both.obs["perturbation"] == changed).to_numpy()
        values = both.X.toarray()
        values[own] = 77
        both.X = sp.csr_matrix(values)
        after = perturbers.BASELINES[name](both, [query])
        pd.testing.assert_frame_equal(before, after)
        without = perturbers.BASELINES[name](both[~own].copy(), [query])
        pd.testing.assert_frame_equal(before, without)


@every
def test_control_can_be_given(name, train):
    """Changes stay those of the training cells; the start is another."""
    other = cells(ORIGIN + [[7, 0, 0, 0], [9, 0, 0, 0]], ["ctrl"] * 2, 80)
    query = ["A+B"]
    own = perturbers.BASELINES[name](train, query)
    found = perturbers.BASELINES[name](train, query, control=other[:, GENES[::-1]])
    if name == "ridge_bilinear":  # its embedding moves by the same number in all means
        assert found.loc["A+B", "A"] != own.loc["A+B", "A"]
    else:
        np.testing.assert_allclose((found - own).loc["A+B"], [8, 0, 0, 0], atol=1e-6)


def test_no_change(train):
    assert np.array_equal(
        changes(perturbers.no_change(train, ["A", "Z"])), np.zeros((2, 4))
    )


def test_train_mean_leaves_the_held_out_condition_out(train):
    found = changes(perturbers.train_mean(train, ["A", "Z"]))
    expected = [(CHANGE["B"] + CHANGE["C"]) / 2, sum(CHANGE.values()) / 3]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_additive(train):
    table = perturbers.additive(train, ["A+B", "C+A", "A+A", "A+B+C", "Z+A", "A"])
    mean = sum(CHANGE.values()) / 3
    expected = [
        CHANGE["A"] + CHANGE["B"],
        CHANGE["A"] + CHANGE["C"],
        2 * CHANGE["A"],
        sum(CHANGE.values()),
        CHANGE["A"] + mean,
        (CHANGE["B"] + CHANGE["C"]) / 2,  # A's own cells are not read
    ]
    np.testing.assert_allclose(changes(table), expected, atol=1e-6)
    assert table.attrs["fallback"] == {"A+Z": ["Z"], "A": ["A"]}
    with pytest.raises(DataError, match="'A\\+Z'.*'Z'.*A, B, C"):
        perturbers.additive(train, ["A+Z"], missing="error")
    with pytest.raises(ConfigError, match="missing"):
        perturbers.additive(train, ["A+B"], missing="skip")


def test_additive_is_exact_where_effects_add_up():
    rng = np.random.default_rng(0)
    names = [f"g{i}" for i in range(30)]
    origin, a, b = rng.normal(size=(3, 30))
    noise = rng.normal(size=(20, 30))
    noise -= noise.mean(0)

    def some(mean, name, start):
        return cells(mean + noise, [name] * 20, start, names, np.asarray)

    parts = [
        some(origin, "ctrl", 0),
        some(origin + a, "x", 20),
        some(origin + b, "y", 40),
    ]
    train = AnnData(
        np.vstack([p.X for p in parts]),
        obs=pd.concat([p.obs for p in parts]),
        var=parts[0].var,
    )
    truth = some(origin + a + b, "x+y", 60)
    table = perturbers.additive(train, ["y+x"])
    np.testing.assert_allclose(table.loc["x+y"], truth.X.mean(0), atol=1e-5)
    halves = {"control_real": train[:10], "control_predicted": train[10:20]}
    assert metrics.perturbation_scores(table, truth, **halves).loc["x+y", "mse"] < 1e-10


def test_matching_mean(train):
    table = perturbers.matching_mean(train, ["A+B", "Z+A", "Z"])
    mean = sum(CHANGE.values()) / 3
    expected = [(CHANGE["A"] + CHANGE["B"]) / 2, (CHANGE["A"] + mean) / 2, mean]
    np.testing.assert_allclose(changes(table), expected, atol=1e-6)
    assert table.attrs["fallback"] == {"A+Z": ["Z"], "Z": ["Z"]}


def test_nearest_perturbation(train):
    query = ["A", "B", "g1", "Z", "A+C", "A+g1"]
    table = perturbers.nearest_perturbation(train, query)
    # Correlations over the control: A with B 1.5 / 2.5, A and B with C -0.89; the sign
    # counts.
    mean = sum(CHANGE.values()) / 3
    expected = [
        CHANGE["B"],
        CHANGE["A"],
        mean,  # does not vary
        mean,  # not measured
        CHANGE["A"] + CHANGE["C"],
        CHANGE["A"] + mean,
    ]
    np.testing.assert_allclose(changes(table), expected, atol=1e-6)
    assert table.attrs["nearest"]["A"] == {"A": "B"}
    assert table.attrs["nearest"]["A+C"] == {"A": "A", "C": "C"}
    assert table.attrs["nearest"]["Z"] == {}
    assert table.attrs["fallback"] == {"g1": ["g1"], "Z": ["Z"], "A+g1": ["g1"]}


def test_a_perturbed_gene_that_is_not_measured_is_its_own_nearest(train):
    train.obs["perturbation"] = train.obs["perturbation"].cat.rename_categories(
        {"B": "Z"}
    )
    table = perturbers.nearest_perturbation(train, ["A+Z", "A"])
    np.testing.assert_allclose(changes(table)[0], CHANGE["A"] + CHANGE["B"], atol=1e-6)
    # It cannot stand in for another.
    assert table.attrs["nearest"]["A"] == {"A": "C"} and not table.attrs["fallback"]


def test_nearest_takes_what_there_is(train):
    kept = (train.obs["perturbation"] != "B").to_numpy()
    table = perturbers.nearest_perturbation(train[kept], ["A"])
    assert table.attrs["nearest"] == {"A": {"A": "C"}}


def test_ridge_bilinear_against_the_formula():
    rng = np.random.default_rng(0)
    names = [f"g{i}" for i in range(25)]
    targets = ["g0", "g1", "g2", "g3+g4", "Z"]
    origin, values = rng.normal(size=25), rng.normal(size=(5, 25))
    train = cells(np.vstack([origin, values]), ["ctrl", *targets], 0, names)
    found = perturbers.ridge_bilinear(train, ["g7", "g5+g6", "g2", "Q"], n_components=3)

    def expected(rows, query):
        y = (values - origin)[rows].T
        pseudobulk = np.column_stack([values[rows].T, origin])
        centred = pseudobulk - pseudobulk.mean(0)
        u, s, vt = np.linalg.svd(centred, full_matrices=False)
        G = centred @ vt[:3].T
        picks = [[int(g[1:]) for g in targets[r].split("+")] for r in rows]
        P = np.array([G[p].sum(0) for p in picks])
        a = 0.1 * np.eye(3)
        mean = y.mean(1)
        W = (
            np.linalg.inv(G.T @ G + a)
            @ G.T
            @ (y - mean[:, None])
            @ P
            @ np.linalg.inv(P.T @ P + a)
        )
        return origin + mean + G @ W @ G[query].sum(0)

    np.testing.assert_allclose(found.loc["g7"], expected([0, 1, 2, 3], [7]), atol=1e-5)
    np.testing.assert_allclose(
        found.loc["g5+g6"], expected([0, 1, 2, 3], [5, 6]), atol=1e-5
    )
    # Left out of its own fit.
    np.testing.assert_allclose(found.loc["g2"], expected([0, 1, 3], [2]), atol=1e-5)
    # Not measured: the mean of all five.
    np.testing.assert_allclose(found.loc["Q"], values.mean(0), atol=1e-5)
    assert found.attrs["fallback"] == {"Q": ["Q"]}


def test_ridge_bilinear_learns_a_bilinear_world():
    """Effects that follow the target's programme carry over to unseen targets."""
    rng = np.random.default_rng(1)
    loadings = np.repeat(np.eye(4), 15, axis=0) * rng.choice([-1, 1], size=(60, 1))
    names = [f"g{i}" for i in range(60)]
    origin = rng.normal(size=60)
    targets = [f"g{i}" for i in range(0, 60, 3)]
    effects = np.array([-2 * loadings @ loadings[int(t[1:])] for t in targets])
    noisy = effects + 0.1 * rng.normal(size=effects.shape)
    train = cells(np.vstack([origin, origin + noisy]), ["ctrl", *targets], 0, names)
    query = ["g1", "g16", "g31", "g46"]
    truth = np.array([-2 * loadings @ loadings[int(t[1:])] for t in query])
    errors = {
        name: np.square(perturbers.BASELINES[name](train, query) - origin - truth).mean(
            None
        )
        for name in ("ridge_bilinear", "train_mean", "no_change")
    }
    assert errors["ridge_bilinear"] < 0.1 * min(
        errors["train_mean"], errors["no_change"]
    )


def test_ridge_bilinear_needs_two_conditions(train):
    kept = train.obs["perturbation"].isin(["ctrl", "A", "B"]).to_numpy()
    table = perturbers.ridge_bilinear(train[kept], ["A"])
    np.testing.assert_allclose(changes(table)[0], CHANGE["B"], atol=1e-6)
    assert table.attrs["fallback"] == {"A": ["A"]}
    for wrong in ({"n_components": 0}, {"penalty": 0.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            perturbers.ridge_bilinear(train, ["A"], **wrong)


def test_shifted_control(train):
    control = train[[0, 2, 1, 3]].copy()
    means = perturbers.additive(train, ["A+B", "A+C"])
    made = perturbers.shifted_control(control, means[GENES[::-1]])
    assert made.shape == (8, 4) and list(made.var_names) == GENES
    assert made.X.dtype == np.float32 and made.obs_names.is_unique
    found = metrics.condition_means(made)
    np.testing.assert_allclose(found.loc[means.index], means, atol=1e-5)
    # The spread of the control is kept, cell by cell.
    first = made[(made.obs["perturbation"] == "A+B").to_numpy()]
    assert list(first.obs["control_cell"]) == list(control.obs_names)
    gap = first.X - control.X.toarray()
    np.testing.assert_allclose(gap, np.tile(gap[0], (4, 1)), atol=1e-5)
    assert made.uns["method"] == "shifted control: additive"
    # Fewer cells are moved as far.
    some = perturbers.shifted_control(control, means, n_cells=2, seed=1)
    assert some.n_obs == 4
    rows = control.obs_names.get_indexer(some.obs["control_cell"])
    shift = np.repeat(means.to_numpy() - ORIGIN, 2, axis=0)
    np.testing.assert_allclose(some.X - control.X.toarray()[rows], shift, atol=1e-5)
    again = perturbers.shifted_control(control, means, n_cells=2, seed=1)
    np.testing.assert_array_equal(some.X, again.X)
    # A row of the control is no condition.
    table = pd.concat([means, means.iloc[:1].set_axis(["ctrl"])])
    assert perturbers.shifted_control(control, table).n_obs == 8


def test_shifted_control_is_refused(train):
    control, means = train[:4], perturbers.no_change(train, ["A"])
    with pytest.raises(ConfigError, match="1 to 4"):
        perturbers.shifted_control(control, means, n_cells=5)
    with pytest.raises(DataError, match="'g1'"):
        perturbers.shifted_control(control, means.drop(columns="g1"))
    with pytest.raises(DataError, match="at least one condition"):
        perturbers.shifted_control(control, means.set_axis(["ctrl"]))
    empty = AnnData(sp.csr_matrix((300_000, 1000), dtype=np.float32))
    table = pd.DataFrame(0.0, ["A"], empty.var_names)
    with pytest.raises(DataError, match="1.2 GB.*n_cells"):
        perturbers.shifted_control(empty, table)


@every
def test_what_cannot_be_predicted(name, train):
    predict = perturbers.BASELINES[name]
    for nothing in ([], ["ctrl"], ["A", "non-targeting"]):
        with pytest.raises(DataError, match="nothing to predict"):
            predict(train, nothing)
    with pytest.raises(DataError, match="no control.*'ctrl'.*control="):
        predict(train[4:], ["A"])
    with pytest.raises(DataError, match="same genes"):
        predict(train, ["A"], control=train[:4, GENES[:3]])
    with pytest.raises(DataError, match="'guide'"):
        predict(train, ["A"], key="guide")
    if name != "no_change":
        alone = train[[0, 1, 2, 3, 4]]
        with pytest.raises(DataError, match="No training condition is left.*'A'"):
            predict(alone, ["A"])


def test_without_controls_in_train_the_given_control_is_the_start(train):
    table = perturbers.train_mean(train[4:], ["Z"], control=train[:4])
    np.testing.assert_allclose(changes(table)[0], sum(CHANGE.values()) / 3, atol=1e-6)
