"""Integration and transfer metrics: worked numbers, both ends, what is left out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.optimize import brentq
from sklearn.metrics import silhouette_samples

from scgenlib import metrics
from scgenlib.errors import ConfigError, DataError
from scgenlib.metrics import integration, transfer


@pytest.fixture(scope="module")
def world():
    """Three types of 100 cells, two batches; `shift` moves the second batch."""
    rng = np.random.default_rng(0)
    types, batches = np.repeat(["a", "b", "c"], 100), np.tile(["x", "y"], 150)
    centres = 20 * np.eye(3, 6)[np.repeat([0, 1, 2], 100)]
    noise = rng.normal(size=(300, 6))

    def make(shift: float = 0.0) -> np.ndarray:
        move = np.zeros((300, 6))
        move[batches == "y", 5] = shift
        return centres + noise + move

    return make, types, batches


# ---------------------------------------------------------------------- LISI


def test_lisi_by_hand():
    # Cell 0 sees cells 1, 2, 3 at distances 1, 2, 4; perplexity 2 fixes beta.
    near = (np.array([[1.0, 2.0, 4.0]]), np.array([[1, 2, 3]]))

    def weights(beta):
        w = np.exp(-beta * near[0][0])
        return w / w.sum()

    def gap(beta):
        w = weights(beta)
        return -(w * np.log(w)).sum() - np.log(2)

    w = weights(brentq(gap, 1e-3, 50))
    np.testing.assert_allclose(
        integration._weights(near[0], np.log(2))[0], w, atol=1e-5
    )
    # Labels p, q, p: 1 / ((w1 + w3)^2 + w2^2).
    near = (np.repeat(near[0], 4, 0), np.repeat(near[1], 4, 0))
    found = integration.lisi(None, ["p", "p", "q", "p"], near=near)
    flat = 1 / ((2 / 3) ** 2 + (1 / 3) ** 2)  # 3 neighbours allow perplexity 1 at most
    assert found.shape == (4,) and 1 <= found[0] < flat
    many = (np.arange(1.0, 9)[None], np.arange(1, 9)[None])
    w = integration._weights(many[0], np.log(3))[0]
    code = np.array(["p", *"pqpqpqpq"])
    many = tuple(np.repeat(part, 9, 0) for part in many)
    want = 1 / (w[code[1:] == "p"].sum() ** 2 + w[code[1:] == "q"].sum() ** 2)
    np.testing.assert_allclose(integration.lisi(None, code, near=many), want, rtol=1e-6)


def test_lisi_counts_the_labels_of_equal_distances():
    # All distances equal: weights are uniform whatever beta is.
    near = (np.ones((5, 4)), np.tile([1, 2, 3, 4], (5, 1)))
    for labels, want in (("paabb", 2.0), ("pabcd", 4.0), ("paaaa", 1.0)):
        found = metrics.lisi(None, list(labels), near=near)
        np.testing.assert_allclose(found, want)


def test_lisi_is_blind_to_scale_and_finite_for_copies(world):
    make, types, batches = world
    small, large = (metrics.lisi(make() * f, batches) for f in (1e-6, 1e6))
    np.testing.assert_allclose(small, large, rtol=1e-5)
    copies = metrics.lisi(np.zeros((40, 2)), ["p", "q"] * 20)
    assert np.isfinite(copies).all() and (copies >= 1).all()


def test_scaled_lisi_at_both_ends(world):
    make, types, batches = world
    assert metrics.clisi(make(), types) == pytest.approx(1, abs=1e-6)
    assert metrics.ilisi(make(), batches) > 0.9
    assert metrics.ilisi(make(500), batches) == pytest.approx(0, abs=1e-6)
    shuffled = np.random.default_rng(1).permutation(types)
    assert metrics.clisi(make(), shuffled) < 0.2


def test_ilisi_of_a_perfect_mix_of_unequal_batches_is_below_one():
    # Batches of 3:1 give an index of at most 1 / (0.75^2 + 0.25^2) = 1.6.
    rng = np.random.default_rng(0)
    Z, batches = (
        rng.normal(size=(2000, 2)),
        rng.choice(["x", "y"], 2000, p=[0.75, 0.25]),
    )
    assert metrics.ilisi(Z, batches) == pytest.approx(0.6, abs=0.03)


# ------------------------------------------------------------ types are kept


def test_clusterings_find_types_and_not_permuted_ones(world):
    make, types, _ = world
    good = metrics.kmeans_agreement(make(), types)
    good |= metrics.leiden_agreement(make(), types, [0.2, 1.0])
    assert [good[f"{a}_{b}"] for a in ("nmi", "ari") for b in ("kmeans", "leiden")] == [
        pytest.approx(1)
    ] * 4
    assert good["resolution"] == 0.2  # the coarser of two that are right
    mixed = np.random.default_rng(0).permutation(types)
    bad = metrics.kmeans_agreement(make(), mixed) | metrics.leiden_agreement(
        make(), mixed
    )
    assert (
        max(bad[f"{a}_{b}"] for a in ("nmi", "ari") for b in ("kmeans", "leiden")) < 0.1
    )


def test_leiden_takes_the_best_by_nmi(world):
    make, types, _ = world
    each = [metrics.leiden_agreement(make(), types, [r]) for r in (0.2, 1.0, 2.0)]
    best = metrics.leiden_agreement(make(), types, (0.2, 1.0, 2.0))
    assert best == max(each, key=lambda found: found["nmi_leiden"])


def test_silhouettes_are_those_of_scikit_learn(world, monkeypatch):
    make, types, _ = world
    Z, odd = make(), types.copy()
    odd[0] = "z"  # a type of one cell
    want = silhouette_samples(Z, odd)
    code = np.unique(odd, return_inverse=True)[1]
    np.testing.assert_allclose(integration._silhouettes(Z, code), want, atol=1e-9)
    assert want[0] == 0 and want[-1] > 0.5
    assert metrics.silhouette_label(Z, odd) == pytest.approx((want.mean() + 1) / 2)
    monkeypatch.setattr(integration, "_BLOCK", 2000)  # blocks of six cells
    np.testing.assert_allclose(integration._silhouettes(Z, code), want, atol=1e-9)


def test_isolated_labels_look_at_the_types_in_fewest_batches(world):
    make, types, batches = world
    Z = make()
    s = silhouette_samples(Z, types)
    one = batches.copy()
    one[types == "b"] = "x"
    want = (s[types == "b"].mean() + 1) / 2
    assert metrics.isolated_labels(Z, types, one) == pytest.approx(want)
    assert np.isnan(metrics.isolated_labels(Z, types, batches))


# --------------------------------------------------------- batches are mixed


def test_batch_metrics_at_both_ends(world):
    make, types, batches = world
    for score, mixed, apart in (
        (lambda Z: metrics.kbet(Z, types, batches), 0.9, 0.0),
        (lambda Z: metrics.bras(Z, types, batches), 0.93, 0.35),
        (lambda Z: metrics.silhouette_batch(Z, types, batches), 0.95, 0.1),
        (lambda Z: metrics.pcr_comparison(make(500), Z, batches), 0.99, 0.0),
    ):
        assert score(make()) >= mixed
        assert score(make(500)) <= apart + 1e-9


def test_bras_by_hand():
    # One type, batches p = {0, 10}, q = {50} degrees: silhouettes of cosine distances.
    def at(*degrees):
        a = np.deg2rad(degrees)
        return np.stack([np.cos(a), np.sin(a)], 1)

    d10, d40, d50 = (1 - np.cos(np.deg2rad(x)) for x in (10, 40, 50))
    widths = [(d50 - d10) / d50, (d40 - d10) / d40, 0]  # a batch of one cell: 0
    Z, t = at(0, 10, 50), ["t"] * 3
    assert metrics.bras(Z, t, list("ppq")) == pytest.approx(1 - np.mean(widths))
    # Three batches of two: against the mean over the four other cells.
    a = np.deg2rad([0, 10, 50, 60, 150, 170])
    d = 1 - np.cos(a[:, None] - a)
    inside = d[np.arange(6), [1, 0, 3, 2, 5, 4]]
    outside = (d.sum(1) - inside) / 4
    want = 1 - np.abs((outside - inside) / np.maximum(outside, inside)).mean()
    Z = at(0, 10, 50, 60, 150, 170)
    assert metrics.bras(Z, ["t"] * 6, list("ppqqrr")) == pytest.approx(want)
    # A third batch far away: 'others' sees it, 'nearest' does not.
    Z, b = np.array([[0.0], [1], [2], [3], [99], [101]]), list("ppqqrr")
    nearest = metrics.silhouette_batch(Z, ["t"] * 6, b)
    others = integration._batch_width(Z, ["t"] * 6, b, "others", cosine=False)
    # Cell 0: inside 1; nearest (2 + 3) / 2; others (2 + 3 + 99 + 101) / 4.
    s = integration._silhouettes(Z, np.repeat([0, 1, 2], 2), "others")
    assert s[0] == pytest.approx((51.25 - 1) / 51.25)
    assert others < nearest
    # Negative widths count by their size: -1/2, -1/2, 1/3, 1/3.
    Z = np.array([[0.0], [3], [1], [2]])
    assert metrics.silhouette_batch(Z, ["t"] * 4, list("ppqq")) == pytest.approx(7 / 12)


def test_kbet_counts_accepted_neighbourhoods():
    # 200 cells in one place alternate; of 200 others each side is one batch.
    rng = np.random.default_rng(0)
    mixed, pure = rng.normal(size=(200, 2)), rng.normal(size=(200, 2))
    pure[:100] += 1000
    Z = np.concatenate([mixed, pure])
    t, b = np.repeat(["m", "p"], 200), np.tile(["x", "y"], 200)
    b[200:] = np.repeat(["x", "y"], 100)
    alone = metrics.kbet(mixed, t[:200], b[:200])
    assert alone > 0.85 and metrics.kbet(pure, t[200:], b[200:]) == 0
    assert metrics.kbet(Z, t, b) == pytest.approx(alone / 2)
    # Eleven cells are one neighbourhood, with the type's own batches: p is 1.
    few = metrics.kbet(mixed[:11], ["t"] * 11, list("xxxxxxxyyyy"), alpha=0.999)
    assert few == 1
    # Nine cells are too few: the type is left out.
    t = np.where(np.arange(400) < 9, "few", t)
    rest = metrics.kbet(Z[9:], t[9:], b[9:])
    assert metrics.kbet(Z, t, b) == pytest.approx(rest)


def test_graph_connectivity_by_hand():
    # A type in islands of 30 and 10 cells: 0.75; the other type in one piece.
    rng = np.random.default_rng(0)
    Z = rng.normal(size=(80, 2))
    Z[30:40] += 500
    Z[40:] += [0, 500]
    t = np.repeat(["a", "b"], 40)
    assert metrics.graph_connectivity(Z, t, 6) == pytest.approx((0.75 + 1) / 2)
    # Links count both ways: a cell that is nobody's neighbour still holds on.
    line = np.array([[0.0], [1], [2], [50]])
    assert metrics.graph_connectivity(line, list("aaaa"), 2) == 1


def test_pcr_by_hand():
    # Means -1 and 1 in one dimension, noise of variance 1 in another: 1 / 2.
    Z = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]])
    b = list("xxyy")
    assert metrics.pcr(Z, b) == pytest.approx(0.5)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    assert metrics.pcr(Z @ turn + 7, b) == pytest.approx(0.5)
    assert metrics.pcr(Z, list("xyxy")) == pytest.approx(0.5)
    assert metrics.pcr(Z, list("xyyx")) == pytest.approx(0)
    assert metrics.pcr(Z[:, :1], b) == pytest.approx(1)
    assert np.isnan(metrics.pcr(np.ones((4, 2)), b))


def test_pcr_is_the_sum_over_components():
    rng = np.random.default_rng(0)
    Z, b = rng.normal(size=(60, 5)) * [5, 3, 2, 1, 1], rng.choice(list("xyz"), 60)
    Z[b == "x"] += 1
    x = Z - Z.mean(0)
    scores = x @ np.linalg.svd(x, full_matrices=False)[2].T
    design = np.eye(3)[np.unique(b, return_inverse=True)[1]]
    fitted = design @ np.linalg.lstsq(design, scores, rcond=None)[0]
    r2 = (fitted**2).sum(0) / (scores**2).sum(0)
    want = (r2 * scores.var(0)).sum() / scores.var(0).sum()
    assert metrics.pcr(Z, b) == pytest.approx(want)


def test_pcr_comparison_at_its_ends():
    Z, b = np.array([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]), list("xxyy")
    assert metrics.pcr_comparison(Z, Z, b) == 0
    assert metrics.pcr_comparison(Z, Z[:, 1:], b) == 1
    assert metrics.pcr_comparison(Z, Z[:, :1], b) == 0  # more than before counts 0
    assert metrics.pcr_comparison(Z, Z * [1 / np.sqrt(3), 1], b) == pytest.approx(0.5)
    assert np.isnan(metrics.pcr_comparison(Z[:, 1:], Z, b))
    assert np.isnan(metrics.pcr_comparison(Z, Z, list("xxxx")))


def test_same_batch_share_by_hand():
    Z, b = np.array([[0.0], [1], [10], [11]]), list("xxyy")
    t = list("abab")
    found = metrics.same_batch_share(Z, t, b, k=1)
    # Nearest cells are of the own batch; within a type the only other cell is not.
    assert found == {
        "same_batch_share": 1.0,
        "same_batch_chance": pytest.approx(1 / 3),
        "same_batch_share_within": 0.0,
        "same_batch_chance_within": 0.0,
    }
    assert metrics.same_batch_share(Z, list("aaab"), b, 1)[
        "same_batch_share_within"
    ] == pytest.approx(2 / 3)


def test_same_batch_share_is_near_chance_when_mixed(world):
    make, types, batches = world
    uneven = np.where(np.random.default_rng(0).random(300) < 0.8, "x", "y")
    found = metrics.same_batch_share(make(), types, uneven)
    for part in ("", "_within"):
        share, chance = (found[f"same_batch_{n}{part}"] for n in ("share", "chance"))
        assert chance > 0.6 and share == pytest.approx(chance, abs=0.03)
    apart = metrics.same_batch_share(make(500), types, batches)
    assert apart["same_batch_share"] == apart["same_batch_share_within"] == 1


def test_batch_predictability_finds_a_shift_that_neighbours_miss(world):
    make, types, batches = world
    mixed = metrics.batch_predictability(make(), batches)
    assert mixed["batch_predictability"] == pytest.approx(0.5, abs=0.1)
    assert mixed["batch_predictability_chance"] == 0.5
    shifted = metrics.batch_predictability(make(3), batches)["batch_predictability"]
    assert shifted > 0.9
    # The cells of a small batch weigh as much as those of a large one together.
    small = np.where(np.arange(300) % 10 == 0, "y", "x")
    Z = make() + 2 * np.outer(small == "y", np.eye(6)[5])
    assert metrics.batch_predictability(Z, small)["batch_predictability"] > 0.7
    alone = np.array(["x"] * 299 + ["y"])
    assert np.isnan(metrics.batch_predictability(make(), alone)["batch_predictability"])


# ------------------------------------------------------------------ together


def test_scores_average_what_can_be_computed(world):
    make, types, batches = world
    found = metrics.integration_scores(make(), types, batches, make(5), resolutions=())
    bio = [n for n in integration.BIO if n != "isolated_labels"]
    assert np.isnan(found["isolated_labels"]) and found["bio_metrics"] == bio
    assert found["batch_metrics"] == list(integration.BATCH)
    assert found["bio"] == pytest.approx(np.mean([found[n] for n in bio]))
    batch = np.mean([found[n] for n in integration.BATCH])
    assert found["batch"] == pytest.approx(batch)
    want = 0.6 * found["bio"] + 0.4 * found["batch"]
    assert found["total"] == pytest.approx(want) and found["total"] > 0.9
    assert found["n_cells"] == 300 and "nmi_leiden" not in found
    # The shared neighbours give what each metric finds alone.
    Z = make()
    assert found["pcr_comparison"] == metrics.pcr_comparison(make(5), Z, batches) > 0.9
    assert found["ilisi"] == pytest.approx(metrics.ilisi(Z, batches))
    assert found["clisi"] == pytest.approx(metrics.clisi(Z, types))
    assert found["graph_connectivity"] == metrics.graph_connectivity(Z, types)
    share = metrics.same_batch_share(Z, types, batches)
    assert share == {name: found[name] for name in share}


def test_one_batch_one_type_no_before(world):
    make, types, batches = world
    one = metrics.integration_scores(make(), types, ["x"] * 300)
    wide = set(integration.BATCH) - {"graph_connectivity"}
    assert all(np.isnan(one[name]) for name in wide | {"batch_predictability"})
    assert one["batch_metrics"] == ["graph_connectivity"] and np.isfinite(one["total"])
    flat = metrics.integration_scores(make(), ["t"] * 300, batches)
    assert (
        flat["bio_metrics"] == [] and np.isnan(flat["bio"]) and np.isnan(flat["total"])
    )
    # Each type in one batch: nothing within a type can be compared.
    nested = metrics.integration_scores(make(), types, types, resolutions=())
    assert np.isnan([nested[n] for n in ("bras", "kbet", "silhouette_batch")]).all()


def test_unlabelled_cells_are_left_out(world):
    make, types, batches = world
    labels = types.astype(object)
    labels[:50:2], labels[1:50:2] = "undefined", None
    obs = pd.DataFrame({"t": labels, "b": batches}, index=[f"c{i}" for i in range(300)])
    Z = AnnData(make().astype(np.float32), obs=obs)
    found = metrics.integration_scores(Z, "t", "b", make(2), resolutions=())
    rest = metrics.integration_scores(
        Z.X[50:], types[50:], batches[50:], make(2)[50:], resolutions=()
    )
    assert found["n_cells"] == 250
    for name, value in rest.items():
        assert found[name] == value or np.isnan(value)


def test_subsample_is_the_same_for_all_arms(world, monkeypatch):
    make, types, batches = world
    seen = []
    monkeypatch.setattr(
        integration, "kmeans_agreement", lambda x, t, seed: seen.append((x, t)) or {
            "nmi_kmeans": 1.0, "ari_kmeans": 1.0}
    )  # fmt: skip
    for Z in (make(), make() + 1):
        found = metrics.integration_scores(Z, types, batches, max_cells=100, seed=3)
        assert found["n_cells"] == 100
    (a, t), (b, u) = seen
    np.testing.assert_allclose(a + 1, b)
    np.testing.assert_array_equal(t, u)
    metrics.integration_scores(make(), types, batches, max_cells=100, seed=4)
    assert not np.array_equal(seen[2][0], a)


def test_scores_repeat_and_leave_the_random_state(world):
    make, types, batches = world
    state = np.random.get_state()[1].copy()
    first = metrics.integration_scores(make(), types, batches)
    second = metrics.integration_scores(make(), types, batches)
    np.testing.assert_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_wrong_input_is_refused(world):
    make, types, batches = world
    with pytest.raises(DataError, match="do not belong together"):
        metrics.integration_scores(make(), types[1:], batches)
    gap = batches.astype(object)
    gap[3] = None
    with pytest.raises(DataError, match="1 cells without a batch"):
        metrics.integration_scores(make(), types, gap)
    with pytest.raises(ConfigError, match="no columns"):
        metrics.integration_scores(make(), "cell_type", batches)
    cells = AnnData(
        make(),
        obs=pd.DataFrame({"cell_type": types}, index=[f"c{i}" for i in range(300)]),
    )
    with pytest.raises(DataError, match="Did you mean 'cell_type'"):
        metrics.integration_scores(cells, "cell_typ", batches)
    with pytest.raises(DataError, match="two cells"):
        metrics.graph_connectivity(np.zeros((1, 2)), ["x"])


# -------------------------------------------------------------------- transfer


@pytest.fixture
def four():
    p = pd.DataFrame(
        [[0.8, 0.1, 0.1], [0.4, 0.5, 0.1], [0.2, 0.7, 0.1], [0.4, 0.3, 0.3]],
        columns=list("abc"),
    )
    return ["a", "a", "b", "new"], p


def test_transfer_by_hand(four):
    true, p = four
    found = metrics.transfer_scores(true, p)
    # Guesses a, b, b for a, a, b.
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["balanced_accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["auroc"] == 1  # both columns order these cells right
    brier = (0.2**2 + 2 * 0.1**2) + (0.6**2 + 0.5**2 + 0.1**2)
    brier += 0.2**2 + 0.3**2 + 0.1**2
    assert found["brier"] == pytest.approx(brier / 3)
    want = -np.log([0.8, 0.4, 0.7]).mean()
    assert found["log_loss"] == pytest.approx(want)
    assert (found["n"], found["n_unseen"], found["n_unlabelled"]) == (3, 1, 0)
    # Bins of 1/15 hold one cell each: gaps 0.2, 0.5, 0.3.
    assert found["ece"] == pytest.approx((0.2 + 0.5 + 0.3) / 3)
    more = metrics.transfer_scores([*true, None, "undefined"], pd.concat([p, p[:2]]))
    assert more == found | {"n_unlabelled": 2}


def test_auroc_is_the_mean_over_types_present():
    p = pd.DataFrame(
        [[0.6, 0.4, 0], [0.7, 0.3, 0], [0.65, 0.35, 0]], columns=list("abc")
    )
    # a against b: of the pairs (0.6, 0.65) and (0.7, 0.65), one is right.
    assert metrics.transfer_scores(list("aab"), p)["auroc"] == pytest.approx(0.5)
    assert np.isnan(metrics.transfer_scores(list("aaa"), p)["auroc"])


def test_reliability_by_hand():
    p = pd.DataFrame([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2, columns=list("ab"))
    true = list("aaabab")
    table = metrics.reliability(true, p, 5)
    assert list(table["n"]) == [0, 0, 0, 2, 4]
    np.testing.assert_allclose(table["low"], [0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(table["confidence"][3:], [0.6, 0.9])
    np.testing.assert_allclose(table["accuracy"][3:], [0.5, 0.75])
    assert table["accuracy"][:3].isna().all()
    want = 2 / 6 * 0.1 + 4 / 6 * 0.15
    assert metrics.transfer_scores(true, p)["ece"] == pytest.approx(want)
    sure = pd.DataFrame([[1.0, 0.0]], columns=list("ab"))
    assert list(metrics.reliability(["a"], sure, 5)["n"]) == [0, 0, 0, 0, 1]


def test_reject_by_hand(four):
    true, p = four
    found = metrics.reject_scores(true, p)
    # The new cell has the smallest maximum and the largest entropy.
    assert found["auroc_max"] == found["auroc_entropy"] == 1
    assert (found["n_seen"], found["n_unseen"]) == (3, 1)
    # At 0.5: three of four are covered, two right; at 0.7 the wrong one goes too.
    assert found["coverage@0.5"] == 0.75 and found["unseen_rejected@0.5"] == 1
    assert found["accuracy@0.5"] == pytest.approx(2 / 3)
    assert found["coverage@0.7"] == 0.5 and found["accuracy@0.7"] == 1
    assert found["coverage@0.9"] == 0 and np.isnan(found["accuracy@0.9"])
    blind = p.copy()
    blind.iloc[3] = [1, 0, 0]
    found = metrics.reject_scores(true, blind)
    assert found["auroc_max"] == found["auroc_entropy"] == 0
    assert found["accuracy@0.9"] == 0  # the stranger alone is covered, and wrong
    assert np.isnan(metrics.reject_scores(true[:3], p[:3])["auroc_max"])


def test_unseen_types_can_be_named(four):
    true, p = four
    both = [*true, "other"], pd.concat([p, p[:1]])
    assert metrics.reject_scores(*both)["n_unseen"] == 2
    found = metrics.reject_scores(*both, unseen=["new"])
    np.testing.assert_equal(found, metrics.reject_scores(true, p))
    with pytest.raises(ConfigError, match="unseen and known"):
        metrics.reject_scores(true, p, unseen=["a"])


def test_coverage_table_falls(four):
    true, p = four
    table = metrics.coverage_table(true, p)
    assert table["coverage"].is_monotonic_decreasing and table["coverage"][0] == 1
    assert table["accuracy"][0] == 0.5 and table["unseen_rejected"][0] == 0


@pytest.mark.parametrize(
    "rows", [[[0.5, 0.4]], [[1.5, -0.5]], [[np.nan, 1]]], ids=["sum", "sign", "nan"]
)
def test_what_is_no_probability_is_refused(rows):
    with pytest.raises(DataError, match="not probabilities"):
        metrics.transfer_scores(["a"], pd.DataFrame(rows, columns=list("ab")))


def test_labels_must_fit(four):
    true, p = four
    with pytest.raises(DataError, match="belong together"):
        metrics.transfer_scores(true[:2], p)
    with pytest.raises(DataError, match="No cell"):
        metrics.transfer_scores(["new"] * 4, p)
    with pytest.raises(DataError, match="two columns"):
        metrics.transfer_scores(true, p.set_axis(list("aab"), axis=1))


def test_labelled_knows_both_ways_of_saying_nothing():
    column = pd.Series(["a", None, "undefined", np.nan, "b"], dtype="category")
    names, has = transfer.labelled(column)
    assert list(has) == [True, False, False, False, True] and names[4] == "b"
