"""The share of a prediction that unseen targets keep, and the trials that find it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from anndata import AnnData
from torch import nn

from scgenlib import latentcycle, regina
from scgenlib.conditions import CONTROL, genes_of
from scgenlib.errors import ConfigError
from scgenlib.metrics.perturbation import condition_means
from scgenlib.perturbers import train_mean
from scgenlib.regina import REGINA, REGINAConfig
from scgenlib.shrinkage import (
    evidence,
    kept_share,
    prompted,
    put_away,
    share_of,
    take_back,
    target_folds,
)
from scgenlib.simperturb import screen

DIALS = dict(n_targets=6, n_doubles=3, n_unmeasured=1, n_pathways=3, seed=3)
# Targets of these dials: LOST has no column, UNSEEN is left out of the training.
A, B, LOST, DOUBLE, UNSEEN = "G11", "G50", "G53", "G11+G53", "G42"

# They have a target without a column.
pytestmark = pytest.mark.filterwarnings("ignore:.*not among the genes:UserWarning")


# ------------------------------------------------------------------ the share kept


def jackknife(rows) -> float:
    """Return the lower bound of the best share, condition by condition."""
    a, b = np.array(rows, dtype=float).T
    n = len(a)
    others = [np.arange(n) != i for i in range(n)]
    without = np.array([a[rest].sum() / b[rest].sum() for rest in others])
    error = np.sqrt((n - 1) * np.mean((without - without.mean()) ** 2))
    return a.sum() / b.sum() - 1.645 * error


def share(*rows) -> float:
    return kept_share(torch.tensor(rows))


def test_the_share_by_hand():
    # The ratio is 6 / 6; without one condition it is 5/4, 4/4 and 3/4.
    error = np.sqrt(2 / 3 * (1 / 16 + 1 / 16))
    assert share((1.0, 2.0), (2.0, 2.0), (3.0, 2.0)) == pytest.approx(1 - 1.645 * error)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n", [3, 8, 40])
def test_the_share_is_the_lower_end_of_a_jackknife(n, seed):
    rng = np.random.default_rng(seed)
    b = rng.gamma(4.0, 1.0, n)
    rows = np.stack([b * rng.normal(0.7, 0.2, n), b], 1)
    expected = jackknife(rows)
    found = kept_share(torch.from_numpy(rows))
    assert found == pytest.approx(min(max(expected, 0.0), 1.0), abs=1e-12)
    # Whatever the unit of the effects, and the order of the conditions.
    assert kept_share(torch.from_numpy(9 * rows[::-1].copy())) == pytest.approx(found)


def test_evidence_that_agrees_is_taken_at_its_word():
    b = np.random.default_rng(0).gamma(4.0, 1.0, 50)
    rows = np.stack([0.6 * b, b], 1)
    assert kept_share(torch.from_numpy(rows)) == pytest.approx(0.6)
    rows[:, 0] += np.random.default_rng(1).normal(0, 0.05, 50)
    assert kept_share(torch.from_numpy(rows)) == pytest.approx(0.6, abs=0.03)


def test_one_condition_does_not_speak_for_all():
    rest = ((0.1, 1.0), (-0.1, 1.0), (0.05, 1.0), (0.0, 1.0))
    rows = ((100.0, 100.0), *rest)
    a, b = np.sum(rows, 0)
    assert a / b > 0.95 and jackknife(rows) < 0 and share(*rows) == 0
    # Nor does chance: as often wrong as right.
    assert share(*((s, 1.0) for s in (1.0, -1.0, 1.0, -1.0, 1.0, -0.9))) == 0


def test_a_share_is_between_nothing_and_all():
    assert share((2.0, 1.0), (4.0, 2.0), (6.0, 3.0)) == 1
    assert share((-2.0, 1.0), (-4.0, 2.0), (-6.0, 3.0)) == 0
    assert isinstance(share((2.0, 1.0), (4.0, 2.0), (6.0, 3.0)), float)


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(0, 2),
        torch.ones(1, 2),
        torch.ones(2, 2),
        torch.zeros(5, 2),
        torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
        torch.full((4, 2), torch.nan),
        torch.full((4, 2), torch.inf),
    ],
    ids=["none", "one", "two", "nothing", "one of four", "nan", "inf"],
)
def test_what_says_nothing_earns_nothing(rows):
    assert kept_share(rows) == 0


def test_evidence_by_hand():
    made = torch.tensor([[1.0, 0.0], [3.0, 0.0], [4.0, 1.0], [2.0, 0.0]])
    true = torch.tensor([[0.0, 0.0], [2.0, 2.0], [2.0, 3.0], [9.0, 9.0]])
    none = torch.zeros(4, 2, dtype=torch.bool)
    # From (2, 0) and (1, 1): (2, 1) was predicted for (1, 2), then nothing.
    assert evidence(made, true, none, 2).tolist() == [[4.0, 5.0], [0.0, 0.0]]
    # What all predictions have too much of, and all cells, counts for nothing.
    moved = evidence(made + torch.tensor([5.0, -7.0]), true - 3.0, none, 2)
    torch.testing.assert_close(moved, evidence(made, true, none, 2))
    # Of a condition its own target counts neither for it nor against it.
    own = none.clone()
    own[2, 0] = own[3, 1] = True
    assert evidence(made, true, own, 2).tolist() == [[2.0, 1.0], [0.0, 0.0]]
    # Those of the conditions that taught are part of the mean all the same.
    own[0] = own[1] = True
    assert evidence(made, true, own, 2).tolist() == [[2.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_the_best_share_undoes_a_factor(factor):
    true = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    own = torch.zeros(9, 4, dtype=torch.bool)
    rows = evidence(factor * true, true, own, 4)
    assert rows.shape == (5, 2)
    a, b = rows.sum(0)
    assert float(a / b) == pytest.approx(1 / factor)
    assert kept_share(rows) == pytest.approx(min(1 / factor, 1.0), abs=1e-4)


# ------------------------------------------------------------------------- targets


SINGLES = [f"T{i}" for i in range(9)]
DOUBLES = [f"{one}+{two}" for one in SINGLES[:4] for two in SINGLES[5:]]


@pytest.mark.parametrize("n_folds", [2, 3, 4])
@pytest.mark.parametrize("names", [SINGLES, SINGLES + DOUBLES], ids=["singles", "both"])
def test_every_target_is_left_out_once(names, n_folds):
    folds = target_folds(names, None, n_folds, 0)
    parts = [set(fold) & set(SINGLES) for fold in folds]
    assert len(folds) == n_folds
    assert sorted(gene for part in parts for gene in part) == SINGLES
    assert {len(part) for part in parts} <= {9 // n_folds, -(-9 // n_folds)}
    for fold, part in zip(folds, parts, strict=True):
        # With its target goes every condition that has it, and no other.
        assert fold == [name for name in names if part & set(name.split("+"))]
        assert len(names) - len(fold) >= 2
    for name in set(names) - set(SINGLES):
        genes = set(name.split("+"))
        expected = sum(bool(part & genes) for part in parts)
        assert sum(name in fold for fold in folds) == expected in (1, 2)
    # No target without a trial, and none that no trial teaches.
    for gene in SINGLES:
        holds = [gene in {g for n in fold for g in n.split("+")} for fold in folds]
        taught = [gene not in part for part in parts]
        assert any(holds) and sum(taught) == n_folds - 1


def test_a_pair_of_two_parts_stands_in_both():
    names, seen = ["A", "B", "C", "D", "A+B", "C+D"], set()
    for seed in range(9):
        one, two = target_folds(names, None, 2, seed)
        apart = ("A" in one) != ("B" in one)
        assert ("A+B" in one and "A+B" in two) is apart
        seen.add(apart)
    assert seen == {True, False}


def test_folds_hang_on_the_seed_alone():
    folds = [target_folds(SINGLES, None, 2, seed) for seed in range(5)]
    assert folds == [target_folds(SINGLES, None, 2, seed) for seed in range(5)]
    assert len({str(fold) for fold in folds}) > 1
    turned = target_folds(SINGLES[::-1], None, 2, 0)
    assert [sorted(fold) for fold in turned] == [sorted(fold) for fold in folds[0]]
    np.random.seed(1)
    assert target_folds(SINGLES, None, 2, 0) == folds[0]


@pytest.mark.parametrize(
    ("names", "n_folds"),
    [
        (SINGLES, 0),
        (SINGLES, 1),
        (SINGLES, 5),
        (["A", "B", "C"], 2),
        (["A"], 2),
        ([], 2),
        (["A+B", "A", "B", "A+B+C"], 2),
        # Whatever the parts are, one condition at most would be left to teach.
        (["A+B", "C+D", "A+C", "B+D"], 2),
    ],
)
def test_too_few_targets_have_no_trial(names, n_folds):
    assert all(target_folds(names, None, n_folds, seed) == [] for seed in range(5))


def test_two_targets_to_a_part_will_do():
    assert len(target_folds(["A", "B", "C", "D"], None, 2, 0)) == 2
    assert len(target_folds([f"T{i}" for i in range(8)], None, 4, 0)) == 4


def test_the_control_is_no_target():
    named = ["A+nothing", "B+nothing", "C", "D+nothing"]
    folds = target_folds(named, "nothing", 2, 0)
    assert sorted(sum(folds, [])) == named
    # By another name, it is a target like others: it stands in nearly all conditions.
    assert target_folds(named, None, 2, 0) != folds


# ------------------------------------------------------------------ one condition


def row(doses=0.0, learned=0.0, mean=0.0) -> dict[str, torch.Tensor]:
    tables = {"doses": [0.0, doses], "learned": [learned], "mean": [mean]}
    return {name: torch.tensor([values]) for name, values in tables.items()}


def test_the_share_of_one_condition():
    known = ["A", "B"]
    for kept in (0.0, 0.3, 1.0):
        # What the training had, whatever stands for it, and pairs of these.
        assert share_of(["A"], row(doses=1), known, kept) == 1
        assert share_of({"A", "B"}, row(learned=1), known, kept) == 1
        # Another target, alone or with one that is known.
        assert share_of(["C"], row(doses=1), known, kept) == kept
        assert share_of(("A", "C"), row(doses=1, learned=1), known, kept) == kept
        assert share_of(["C", "D"], row(doses=1, mean=1), known, kept) == kept
        assert share_of(["B", "D"], row(learned=1, mean=1), known, kept) == kept
        # Nothing but the mean prompt tells nothing of the target.
        only = share_of(["D"], row(mean=1), known, kept)
        assert only == (1.0 if kept == 1.0 else 0.0)
    # Doses that add up to nothing are doses.
    odd = row() | {"doses": torch.tensor([[1.0, -1.0]])}
    assert share_of(["C", "D"], odd, known, 0.3) == 0.3


def test_which_conditions_have_a_prompt_of_their_own():
    rows = [row(), row(doses=-1), row(learned=0.5), row(mean=1), row(doses=2, mean=1)]
    tables = {key: torch.cat([one[key] for one in rows]) for key in row()}
    assert prompted(tables).tolist() == [False, True, True, False, True]


# -------------------------------------------------------------------- put and take


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    return {"body": body, "empty": nn.Embedding(0, 3), "head": nn.Linear(2, 1)}


def weights(nets) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in nn.ModuleDict(nets).state_dict().items()}


def same(one, two) -> bool:
    equal = [torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one]
    return one.keys() == two.keys() and all(equal)


def train(nets) -> None:
    """Move weights, running means and counters."""
    optimiser = torch.optim.SGD(nn.ModuleDict(nets).parameters(), lr=1.0)
    nets["head"](nets["body"](torch.randn(8, 3))).square().sum().backward()
    optimiser.step()


def test_weights_come_back_bit_by_bit():
    nets, other = networks(), torch.arange(3.0)
    arrays = {"other": other}
    train(nets)
    before = weights(nets)
    put_away(nets, arrays)
    assert set(arrays) == {"other", *(f"kept.{key}" for key in before)}
    train(nets)
    moved = [k for k, v in weights(nets).items() if not torch.equal(v, before[k])]
    assert len(moved) == len([k for k in before if "empty" not in k])
    take_back(nets, arrays)
    assert same(weights(nets), before)
    # Nothing is left behind, and what was there stays.
    assert set(arrays) == {"other"} and arrays["other"] is other


def test_what_was_put_away_first_comes_back():
    nets, arrays = networks(), {}
    before = weights(nets)
    put_away(nets, arrays)
    train(nets)
    put_away(nets, arrays)
    train(nets)
    take_back(nets, arrays)
    assert same(weights(nets), before) and not arrays
    # Another time it is another state.
    train(nets)
    later = weights(nets)
    put_away(nets, arrays)
    train(nets)
    take_back(nets, arrays)
    assert same(weights(nets), later) and not same(later, before)


# ------------------------------------------------------------------------- trials


@pytest.fixture(scope="module")
def cells() -> AnnData:
    """Return training cells, without one of the targets."""
    made = screen(300, 60, **DIALS)
    names = made.obs["perturbation"].astype(str)
    left = made[[UNSEEN not in name.split("+") for name in names]].copy()
    assert {A, B, LOST, DOUBLE} <= set(left.obs["perturbation"])
    return left


@pytest.fixture(scope="module")
def control(cells) -> AnnData:
    return cells[cells.obs["perturbation"] == CONTROL].copy()


def fit(cells, callbacks=(), **changes) -> REGINA:
    # Without cells held out, means are those of all training cells.
    config = REGINAConfig.profile("tiny", **{"valid_share": 0.0, **changes})
    return REGINA(config, seed=0, device="cpu").fit(cells, callbacks=callbacks)


@pytest.fixture(scope="module")
def model(cells) -> REGINA:
    return fit(cells)


@pytest.fixture(scope="module")
def ordered(cells) -> REGINA:
    return fit(cells, grouping="correlation")


@pytest.fixture(scope="module")
def held(cells) -> REGINA:
    return fit(cells, valid_share=0.3)


def phases(model) -> list[str]:
    return list(dict.fromkeys(model.history_["phase"]))


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._state_tensors().items()}


def folds_of(model) -> dict[str, list[str]]:
    names, n = model.sizes_["conditions"], model.config.shrink_folds
    folds = target_folds(names, None, n, model.seed)
    return {f"trial {i + 1}": fold for i, fold in enumerate(folds)}


@pytest.mark.parametrize(("n_folds", "n_trials"), [(0, 0), (1, 0), (2, 2), (3, 0)])
def test_how_many_trials_there_are(n_folds, n_trials, cells):
    # Five targets: a third of them is not two.
    made = fit(cells, shrink_folds=n_folds)
    trials = [f"trial {i + 1}" for i in range(n_trials)]
    assert phases(made) == ["autoencoder", *trials, "transition"]
    assert ("kept" in made.facts_) is bool(n_trials)
    left = {"typical", "lacking", "mean_prompt"}
    assert set(made.arrays_) == left
    assert made.arrays_["typical"].shape == (2, 60)
    assert made.arrays_["lacking"].shape == (2, 2, 60)


def test_three_trials():
    cells = screen(300, 60, **DIALS)
    made = fit(cells, shrink_folds=3)
    assert phases(made)[1:-1] == ["trial 1", "trial 2", "trial 3"]
    assert 0 <= made.facts_["kept"] <= 1


def test_data_with_one_target_have_no_trial(cells, control):
    """As where cells were stimulated or not."""
    names = cells.obs["perturbation"].astype(str)
    for target in (A, LOST):
        made = fit(cells[names.isin([CONTROL, target]).to_numpy()].copy())
        assert phases(made) == ["autoencoder", "transition"]
        assert "kept" not in made.facts_
        # All is kept then.
        out = made.predict(control, [target, UNSEEN])
        assert set(out.obs["kept"]) == {1.0}


def test_published_settings_have_no_trial(cells):
    made = REGINA(REGINAConfig.published("tiny"), seed=0, device="cpu").fit(cells)
    assert phases(made) == ["autoencoder", "transition"]
    assert "kept" not in made.facts_


def test_what_is_left_out_does_not_teach(cells, monkeypatch):
    taught, batches, plain = {}, [], regina.transition_step

    def step(nets, optimiser, batch, *rest, **options):
        batches.append(batch)
        return plain(nets, optimiser, batch, *rest, **options)

    def look(event):
        pairs = event.model._pairs
        taught.setdefault(event.phase, []).append(
            (pairs.code[pairs.perturbed], batches[-1] if batches else None)
        )

    monkeypatch.setattr(regina, "transition_step", step)
    made = fit(cells, [look], valid_share=0.1)
    names, targets = made.sizes_["conditions"], np.array(made.sizes_["targets"])
    folds = folds_of(made)
    assert list(taught) == ["autoencoder", *folds, "transition"]
    every = set(range(1, len(names) + 1))
    assert set.union(*(set(fold) for fold in folds.values())) == set(names)
    for phase, seen in taught.items():
        out = folds.get(phase, [])
        left = {i + 1 for i, name in enumerate(names) if name in out}
        # By the cells that may be drawn, and by those that were.
        assert all(set(codes.tolist()) == every - left for codes, _ in seen)
        if phase == "autoencoder":
            continue
        told = torch.cat([batch.condition for _, batch in seen]).any(0).numpy()
        single = {name for name in out if "+" not in name}
        assert set(targets[told]) == set(targets) - single
        for _, batch in seen:
            drawn = [set(targets[one.numpy() != 0]) for one in batch.condition]
            assert not [d for d in drawn if d & single]


def test_a_learned_prompt_that_is_left_out_stays_where_it_was(cells):
    ends = {}

    def look(event):
        ends[event.phase] = event.model.modules_["learned"].weight.abs().max().item()

    made = fit(cells, [look])
    for phase, fold in folds_of(made).items():
        assert (ends[phase] == 0) is (LOST in fold)
    assert ends["transition"] > 0


def test_each_trial_starts_where_the_first_phase_ended(cells, monkeypatch):
    ends, starts, put, back = [], [], regina.put_away, regina.take_back

    def look(event):
        if event.phase == "autoencoder":
            ends[:] = [weights(event.model.modules_)]
        else:
            # Kept beside the model while a trial goes on, and not longer.
            about = [key for key in event.model.arrays_ if key.startswith("kept.")]
            assert bool(about) is event.phase.startswith("trial")
        # Callbacks that predict on the way meet no mean prompt of an earlier trial.
        assert "mean_prompt" not in event.model.arrays_

    def putting(nets, arrays):
        starts.append(weights(nets))
        put(nets, arrays)

    def taking(nets, arrays):
        assert not same(weights(nets), ends[0])
        back(nets, arrays)
        starts.append(weights(nets))

    monkeypatch.setattr(regina, "put_away", putting)
    monkeypatch.setattr(regina, "take_back", taking)
    fit(cells, [look])
    assert len(starts) == 4 and all(same(start, ends[0]) for start in starts)


@pytest.mark.parametrize("grouping", ["order", "correlation"])
def test_what_a_trial_finds(grouping, cells, control, monkeypatch):
    """Mean changes of its networks, against those of cells it has not learned from."""
    seen, tables, found, made_by = [], [], [], []
    plain, plain_share = regina.evidence, regina.kept_share

    def look_at_evidence(made, true, own, n_taught):
        seen.append((made.clone(), true.clone(), own.clone(), n_taught))
        tables.append(plain(made, true, own, n_taught))
        return tables[-1]

    def look_at_share(rows):
        found.append(rows.clone())
        return plain_share(rows)

    @latentcycle.evaluating
    def changes(m, taught, out):
        """Return the changes that the networks of a trial predict for conditions."""
        x = torch.from_numpy(control.X.toarray())
        order = m.arrays_.get("order", torch.arange(60))
        nets = m.modules_
        z = nets["encoder"](x[:, order])
        own = {name: torch.from_numpy(m.prompts(control, name)) for name in taught}
        mean = torch.stack([q.mean(0) for q in own.values()]).mean(0)
        rows = []
        for name in [*taught, *out]:
            genes, q = set(genes_of(name)), own.get(name)
            if q is None:
                # What the trial has not been told of has the mean prompt.
                rest = "+".join(sorted(genes - new))
                q = mean * len(genes & new) + torch.zeros_like(z)
                q = q + torch.from_numpy(m.prompts(control, rest)) if rest else q
            after = nets["decoder"](latentcycle.move(nets["fwd"], z, q))
            change = torch.zeros(60)
            change[order] = (after - nets["decoder"](z)).mean(0)
            rows.append(change)
        return torch.stack(rows)

    def look(event):
        if not event.phase.startswith("trial") or event.step < event.n_steps - 1:
            return
        out = folds_of(event.model)[event.phase]
        taught = [n for n in event.model.sizes_["conditions"] if n not in out]
        new.clear()
        if all(LOST not in name for name in taught):
            new.add(LOST)
        made_by.append((taught, out, changes(event.model, taught, out)))

    new = set()
    monkeypatch.setattr(regina, "evidence", look_at_evidence)
    monkeypatch.setattr(regina, "kept_share", look_at_share)
    made = fit(cells, [look], grouping=grouping)
    means = condition_means(cells)
    assert len(seen) == len(made_by) == 2 and len(found) == 1
    expected_rows = []
    for args, table, (taught, out, expected) in zip(seen, tables, made_by, strict=True):
        change, true, own, n = args
        names = [*taught, *out]
        assert n == len(taught) and len(change) == len(names)
        truth = means.loc[names] - means.loc[CONTROL]
        np.testing.assert_allclose(true, truth, atol=1e-5)
        np.testing.assert_allclose(change, expected, atol=1e-5)
        targets = [set(np.array(made.genes_)[one.numpy()]) for one in own]
        assert targets == [set(name.split("+")) - {LOST} for name in names]
        # What has nothing but the mean prompt says nothing.
        single = LOST in out and all(LOST not in name for name in taught)
        expected_rows += [
            values
            for name, values in zip(out, table, strict=True)
            if not (single and name == LOST)
        ]
    assert torch.equal(found[0], torch.stack(expected_rows))
    assert len(found[0]) == sum(len(out) for _, out, _ in made_by) - 1
    bound = jackknife(found[0].double().numpy())
    assert made.facts_["kept"] == pytest.approx(min(max(bound, 0), 1), abs=1e-6)


def test_a_share_above_nothing_reaches_the_model(cells, control, monkeypatch):
    monkeypatch.setattr(regina, "kept_share", lambda rows: 0.37)
    made = fit(cells)
    assert made.facts_["kept"] == 0.37
    out = made.predict(control, UNSEEN)
    assert set(out.obs["kept"]) == {0.37}
    np.testing.assert_array_equal(out.X, made.predict(control, UNSEEN, kept=0.37).X)


# -------------------------------------------------------------------- predictions


def plain_prediction(model, control, name, unmeasured="error") -> np.ndarray:
    """Return what the networks say and what is missing on average, nothing else."""
    order = model.arrays_.get("order", torch.arange(60))
    x = torch.from_numpy(control.X.toarray())
    q = torch.from_numpy(model.prompts(control, name, unmeasured=unmeasured))
    nets, change = model.modules_, torch.zeros_like(x)
    with torch.no_grad():
        z = nets["encoder"](x[:, order])
        after = latentcycle.move(nets["fwd"], z, q)
        change[:, order] = nets["decoder"](after) - nets["decoder"](z)
    return (x + change + model.arrays_["lacking"][0, 0]).numpy()


def other_genes(model, *targets) -> np.ndarray:
    return ~np.isin(model.genes_, targets)


@pytest.mark.parametrize("which", ["model", "ordered", "held"])
def test_nothing_kept_is_the_mean_change_of_the_training(
    which, cells, control, request
):
    model = request.getfixturevalue(which)
    goal = train_mean(cells, [UNSEEN]).loc[UNSEEN].to_numpy()
    change = goal - condition_means(cells).loc[CONTROL].to_numpy()
    x, two = control.X.toarray(), "G02+G03"
    # Every cell, not only their mean; but a target's own expression.
    for name in (UNSEEN, two):
        out = model.predict(control, name, kept=0, output="shift")
        rest = other_genes(model, *name.split("+"))
        np.testing.assert_allclose(out.X[:, rest], (x + change)[:, rest], atol=1e-5)
        np.testing.assert_allclose(out.X.mean(0)[rest], goal[rest], atol=1e-5)
        whole = plain_prediction(model, control, name)
        np.testing.assert_allclose(out.X[:, ~rest], whole[:, ~rest], atol=1e-5)
    rest = other_genes(model, UNSEEN)
    few = model.predict(control, UNSEEN, kept=0, n_samples=5)
    started = control[few.obs["source"]].X.toarray()
    np.testing.assert_allclose(few.X[:, rest], (started + change)[:, rest], atol=1e-5)


def test_nothing_kept_of_a_decoded_cell(model, cells, control):
    goal = train_mean(cells, [UNSEEN]).loc[UNSEEN].to_numpy()
    out = model.predict(control, UNSEEN, kept=0, output="decoded")
    rest = other_genes(model, UNSEEN)
    np.testing.assert_allclose(out.X.mean(0)[rest], goal[rest], atol=1e-4)
    # It is what is decoded without any change, moved alike for all cells.
    with torch.no_grad():
        z = model.modules_["encoder"](torch.from_numpy(control.X.toarray()))
        start = model.modules_["decoder"](z).numpy()
    assert np.ptp((out.X - start)[:, rest], axis=0).max() < 1e-5


def test_without_centring_nothing_kept_is_the_mean_prediction(cells, control):
    made = fit(cells, centred=False)
    names = made.sizes_["conditions"]
    x = control.X.toarray()
    every = made.predict(control, names)
    mean = condition_means(every).loc[names].mean() - x.mean(0)
    out = made.predict(control, UNSEEN, kept=0)
    rest = other_genes(made, UNSEEN)
    expected = (x + mean.to_numpy())[:, rest]
    np.testing.assert_allclose(out.X[:, rest], expected, atol=1e-5)


@pytest.mark.parametrize("which", ["model", "ordered"])
def test_all_kept_is_what_the_networks_say(which, control, request):
    model = request.getfixturevalue(which)
    for name in (UNSEEN, f"{A}+{UNSEEN}", "NEW1", f"{A}+NEW1"):
        options = {"unmeasured": "mean"}
        out = model.predict(control, name, kept=1, output="shift", **options)
        expected = plain_prediction(model, control, name, **options)
        np.testing.assert_allclose(out.X, expected, atol=1e-5)
        assert set(out.obs["kept"]) == {1.0}
    one, none = (model.predict(control, UNSEEN, kept=k).X for k in (1, 0))
    rest = other_genes(model, UNSEEN)
    assert np.abs(one - none)[:, rest].max() > 1e-3


@pytest.mark.parametrize("output", ["shift", "decoded"])
@pytest.mark.parametrize("by", ["transition", "prompt"])
def test_predictions_are_linear_in_what_is_kept(by, output, model, control):
    def made(kept):
        options = {"by": by, "output": output, "unmeasured": "mean", "kept": kept}
        return model.predict(control, [UNSEEN, f"{LOST}+NEW1"], **options).X

    nothing, all_of_it = made(0), made(1)
    assert np.abs(all_of_it - nothing).max() > 1e-3
    for kept in (0.25, 0.5, 0.9):
        expected = nothing + kept * (all_of_it - nothing)
        np.testing.assert_allclose(made(kept), expected, atol=1e-5)
    # The codes are those of the networks, whatever is kept.
    codes = [model.predict(control, UNSEEN, kept=k).obsm["latent"] for k in (0, 1)]
    np.testing.assert_array_equal(*codes)


@pytest.mark.parametrize("name", [UNSEEN, f"{A}+{UNSEEN}", f"{A}+NEW1"])
def test_of_a_target_itself_all_is_kept(name, model, control):
    options = {"unmeasured": "mean"}
    whole = plain_prediction(model, control, name, **options)
    rest = other_genes(model, *name.split("+"))
    assert (~rest).sum() == len(set(name.split("+")) - {"NEW1"})
    for kept in (0, 0.4):
        out = model.predict(control, name, kept=kept, **options)
        np.testing.assert_allclose(out.X[:, ~rest], whole[:, ~rest], atol=1e-5)
        assert np.abs(out.X - whole)[:, rest].max() > 1e-3


def test_what_was_seen_is_kept_whole(model, control):
    # Conditions of the training, new pairs of their targets, and other doses.
    wanted = [A, LOST, DOUBLE, f"{A}+{B}", {B: 0.5}, {A: 2.0, LOST: 1.0}]
    whole = model.predict(control, wanted)
    assert set(whole.obs["kept"]) == {1.0}
    for kept in (0, 0.5, 1):
        out = model.predict(control, wanted, kept=kept)
        np.testing.assert_array_equal(out.X, whole.X)
        assert set(out.obs["kept"]) == {1.0}
    # Also beside what was not seen.
    beside = model.predict(control, [UNSEEN, *wanted], kept=0)
    np.testing.assert_array_equal(beside.X[control.n_obs :], whole.X)
    expected = plain_prediction(model, control, A)
    np.testing.assert_allclose(whole.X[: control.n_obs], expected, atol=1e-5)


def test_a_dose_of_nothing_is_no_target(model, control):
    alone = model.predict(control, A, kept=0.5)
    for nothing in (B, UNSEEN):
        out = model.predict(control, {A: 1.0, nothing: 0.0}, kept=0.5)
        np.testing.assert_array_equal(out.X, alone.X)
        assert set(out.obs["kept"]) == {1.0}


def test_the_mean_prompt_alone_keeps_nothing(model, cells, control):
    def made(perturbation, kept):
        return model.predict(control, perturbation, kept=kept, unmeasured="mean")

    # Where no target is measured, no gene is an exception.
    change = condition_means(cells).drop(index=CONTROL).mean()
    change = (change - condition_means(cells).loc[CONTROL]).to_numpy()
    typical = control.X.toarray() + change
    for perturbation in ("NEW1", "NEW1+NEW2", {"NEW1": 2.0}):
        for kept in (0, 0.5, 0.99):
            out = made(perturbation, kept)
            np.testing.assert_allclose(out.X, typical, atol=1e-5)
            assert set(out.obs["kept"]) == {0.0}
        whole = made(perturbation, 1)
        assert np.abs(whole.X - typical).max() > 1e-3
        assert set(whole.obs["kept"]) == {1.0}


def test_the_share_by_default_is_that_of_the_trials(model, control):
    assert 0 <= model.facts_["kept"] <= 1
    other = copy.copy(model)
    wanted = [UNSEEN, A, f"{A}+{UNSEEN}", "NEW1", "NEW1+G02"]
    options = {"unmeasured": "mean", "n_samples": 7}
    for share in (0.0, 0.4, 1.0):
        other.facts_ = {**model.facts_, "kept": share}
        out = other.predict(control, wanted, **options)
        asked = model.predict(control, wanted, kept=share, **options)
        np.testing.assert_array_equal(out.X, asked.X)
        alone = 1.0 if share == 1 else 0.0
        expected = np.repeat([share, 1.0, share, alone, share], 7)
        for frame in (out.obs, asked.obs):
            assert frame["kept"].dtype == float
            np.testing.assert_array_equal(frame["kept"], expected)
        # The trials looked at the transition: by the prompt alone, all is kept.
        by_prompt = other.predict(control, wanted, by="prompt", **options)
        assert set(by_prompt.obs["kept"]) == {1.0}
        asked = model.predict(control, wanted, by="prompt", kept=share, **options)
        np.testing.assert_array_equal(asked.obs["kept"], expected)
    del other.facts_["kept"]
    out = other.predict(control, wanted, **options)
    np.testing.assert_array_equal(
        out.X, model.predict(control, wanted, kept=1, **options).X
    )


@pytest.mark.parametrize("kept", [-0.1, 1.1, 2, np.nan, np.inf])
def test_a_share_that_is_none_is_refused(kept, model, control):
    with pytest.raises(ConfigError, match="share.*0 to 1"):
        model.predict(control, UNSEEN, kept=kept)
