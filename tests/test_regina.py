"""REGINA: settings, training, and what a fitted model offers."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scgenlib import latentcycle, regina
from scgenlib.conditions import CONTROL, canonical
from scgenlib.errors import ConfigError, DataError, NotFittedError
from scgenlib.metrics.perturbation import condition_means
from scgenlib.perturbers import effects
from scgenlib.regina import REGINA, REGINAConfig
from scgenlib.shrinkage import target_folds
from scgenlib.simperturb import screen
from scgenlib.states import StressScore

DIALS = dict(n_targets=6, n_doubles=3, n_unmeasured=1, n_pathways=3, seed=3)
# Targets of these dials. A and B have a double; LOST has no column.
A, B, LOST, DOUBLE = "G11", "G42", "G53", "G11+G53"
SECOND_PHASES = ["trial 1", "trial 2", "transition"]

# They have a target without a column: one test looks at what is said of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*not among the genes:UserWarning")


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return screen(300, 60, **DIALS)


@pytest.fixture(scope="module")
def few() -> AnnData:
    return screen(100, 60, **DIALS)


@pytest.fixture(scope="module")
def control(cells) -> AnnData:
    return cells[cells.obs["perturbation"] == CONTROL].copy()


def config(**changes) -> REGINAConfig:
    return REGINAConfig.profile("tiny", **changes)


def fit(cells, seed=0, fitting=None, cls=REGINA, **changes) -> REGINA:
    made = cls(config(**changes), seed=seed, device="cpu")
    return made.fit(cells, **(fitting or {}))


@pytest.fixture(scope="module")
def model(cells) -> REGINA:
    return fit(cells)


@pytest.fixture(scope="module")
def batched(cells) -> REGINA:
    return fit(cells, fitting={"batch_key": "batch"}, grouping="correlation")


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._state_tensors().items()}


def facts(model) -> str:
    return json.dumps(model.facts_)


def differing(one, two) -> list[str]:
    assert one.keys() == two.keys()
    return [k for k in one if not torch.equal(one[k], two[k])]


def with_obs(cells, **columns) -> AnnData:
    out = cells.copy()
    for name, values in columns.items():
        out.obs[name] = values
    return out


def renamed(cells, names) -> AnnData:
    """Return cells with other names of genes, in the matrix and in the conditions."""
    out = cells.copy()
    out.var_names = [names.get(gene, gene) for gene in cells.var_names]
    words = [name.split("+") for name in cells.obs["perturbation"]]
    spelled = ["+".join(names.get(word, word) for word in part) for part in words]
    out.obs["perturbation"] = pd.Categorical(spelled)
    return out


def watched(monkeypatch, name) -> list:
    """Return a list to which each call of a step adds its batch of cells."""
    seen, plain = [], getattr(regina, name)

    def step(nets, optimiser, batch, weights, **options):
        seen.append(batch)
        return plain(nets, optimiser, batch, weights, **options)

    monkeypatch.setattr(regina, name, step)
    return seen


def watched_evidence(monkeypatch) -> list:
    """Return a list to which each fit adds what its trials found."""
    seen, plain = [], regina.kept_share

    def share(rows):
        seen.append(rows.clone())
        return plain(rows)

    monkeypatch.setattr(regina, "kept_share", share)
    return seen


def new_gene(model) -> str:
    """Return a measured gene that is no target of the training."""
    targets = model.sizes_["targets"]
    return next(gene for gene in model.genes_ if gene not in targets)


# ----------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_model": 16, "n_heads": 3}, "n_heads must divide.*16.*3"),
        ({"noise_until": 30, "noise_end": 30}, "noise_end.*30 to 30"),
        ({"states": "stres"}, "states.*Did you mean 'stress'"),
        ({"output": "decode"}, "output.*Did you mean 'decoded'"),
        ({"batch_size": 1}, "batch_size.*at least 2"),
        ({"valid_share": 0.6}, "valid_share"),
        ({"w_cicle": 1.0}, "w_cicle.*Did you mean 'w_cycle'"),
        ({"clip": 0.0}, "clip"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        config(**changes)


def test_published_settings_and_what_the_defaults_depart_in():
    paper, plain = REGINAConfig.published(), REGINAConfig.profile("paper")
    apart = {
        f.name
        for f in dataclasses.fields(plain)
        if getattr(plain, f.name) != getattr(paper, f.name)
    }
    named = {"w_centre", "w_adv", "w_anchor", "label_controls", "output", "states"}
    assert apart == named | {"patience", "centred", "shrink_folds"}
    assert (paper.w_adv, paper.w_cycle, paper.w_centre) == (3.5, 5.0, 128.0)
    small = REGINAConfig.published("tiny", w_adv=1.0)
    assert (small.w_centre, small.z_dim, small.w_adv) == (4.0, 8, 1.0)
    assert REGINAConfig.published("tiny", z_dim=4).w_centre == 2.0
    assert REGINAConfig.published("tiny", w_centre=9.0).w_centre == 9.0


def test_sizes_at_the_cells_of_adamson():
    made = REGINA(REGINAConfig.published(), device="cpu")
    made._reset(torch.device("cpu"))
    made.sizes_ = {
        "n_genes": 5060,
        "n_states": 2,
        "targets": [A],
        "unmeasured": [],
        "batches": [],
    }
    made._build()
    made.is_fitted_ = True
    counts = made.n_parameters()
    assert counts == {
        "encoder": 14_870_272,
        "decoder": 14_877_501,
        "classifier": 33_410,
        "centres": 512,
        "fwd": 1_449_216,
        "bwd": 1_449_216,
        "critic": 394_241,
        "learned": 0,
    }
    assert sum(counts.values()) == 33_074_368


BASE = {"batch_size": 50, "critic_every": 3, "noise_until": 0}
FIRST = {
    "n_genes": 40,
    "states": "perturbed",
    "label_controls": False,
    "valid_share": 0.2,
    "n_tokens": 7,
    "grouping": "correlation",
    "positions": True,
    "d_model": 24,
    "n_layers": 2,
    "n_heads": 4,
    "dropout": 0.3,
    "z_dim": 6,
    "class_width": 5,
    "transition_width": 12,
    "critic_width": (8,),
    "max_epochs": 3,
    "batch_size": 30,
    "lr": 2e-3,
    "weight_decay": 0.1,
    "class_lr": 1e-2,
    "w_rec": 1.0,
    "w_reg": 1.0,
    "w_class": 0.5,
    "w_cons": 0.0,
    "w_centre": 0.0,
    "consistency": "class",
    # The networks that it adds are drawn before any training.
    "discriminator_on": "index",
    "adversary_both": True,
    "clip": None,
}
SECOND = {
    "silence_val": -0.5,
    "prompt_sign": "written",
    "prompt_skip": False,
    "phase_2_epochs": 3,
    "transition_lr": 1e-3,
    "transition_decay": 0.1,
    "decoder": "frozen",
    "decoder_lr": 1e-3,
    "last_lr": 1e-4,
    "critic_lr": 1e-3,
    "beta_1": 0.9,
    "beta_2": 0.9,
    "w_cycle": 1.0,
    "w_adv": 1.0,
    "w_pair": 0.0,
    "w_anchor": 0.0,
    "w_identity": 1.0,
    "real_target": 1.0,
    "critic_every": 1,
    "noise": 0.0,
    "noise_until": 1,
    "noise_end": 1,
    # Trials leave nothing behind, but they draw numbers.
    "shrink_folds": 0,
    "output": "decoded",
}


@pytest.fixture(scope="module")
def base(few) -> REGINA:
    return fit(few, **BASE)


@pytest.mark.parametrize("name", sorted(FIRST | SECOND))
def test_every_option_changes_something(name, few, base):
    value = (FIRST | SECOND)[name]
    start = BASE | ({"noise_end": 50} if name == "noise_until" else {})
    one = base if start == BASE else fit(few, **start)
    assert getattr(one.config, name) != value
    one, two = state(one), state(fit(few, **{**start, name: value}))
    other = [
        k
        for k in one.keys() | two.keys()
        if k not in one or k not in two or not torch.equal(one[k], two[k])
    ]
    assert other
    if name in SECOND:
        # What belongs to the second phase does not reach back into the first.
        kept = ("module/encoder", "module/classifier", "module/centres")
        assert not [k for k in other if k.startswith(kept)]


def test_every_option_is_looked_at():
    elsewhere = {"unmeasured", "patience", "centred"}  # tests of their own
    fields = {field.name for field in dataclasses.fields(REGINAConfig)}
    assert set(FIRST) | set(SECOND) | elsewhere == fields
    assert not set(FIRST) & set(SECOND)


# --------------------------------------------------------------- cells and states


def test_no_model_no_prediction(cells):
    for call in ("predict", "prompts"):
        with pytest.raises(NotFittedError):
            getattr(REGINA(config()), call)(cells, A)
    with pytest.raises(ConfigError, match="No model"):
        effects([], cells, A)


def test_columns_that_are_absent_are_named(cells):
    bare = cells.copy()
    del bare.obs["perturbation"]
    with pytest.raises(DataError, match="no column 'perturbation'.*condition"):
        fit(bare)
    with pytest.raises(DataError, match="no column 'guide'"):
        fit(cells, fitting={"perturbation_key": "guide"})
    with pytest.raises(DataError, match="label column.*stat.*'state'"):
        fit(cells, fitting={"label_key": "stat"})
    with pytest.raises(DataError, match="batch column.*bach.*'batch'"):
        fit(cells, fitting={"batch_key": "bach"})
    holes = cells.obs["batch"].astype(object).mask(np.arange(300) % 9 == 0)
    with pytest.raises(DataError, match="no batch in 'batch'.*34 cells"):
        fit(with_obs(cells, batch=holes), fitting={"batch_key": "batch"})


def test_conditions_that_cannot_be_learned_from(cells, control):
    perturbed = cells[cells.obs["perturbation"] != CONTROL].copy()
    with pytest.raises(DataError, match="No cell.*is a control.*control="):
        fit(perturbed)
    with pytest.raises(DataError, match="All cells.*controls"):
        fit(control)
    half = cells.obs["perturbation"].astype(object).mask(np.arange(300) % 9 == 0)
    with pytest.raises(DataError, match="no condition"):
        fit(with_obs(cells, perturbation=half))


def test_any_spelling_of_the_conditions_is_one(cells, model):
    names = cells.obs["perturbation"].astype(str)
    turned = names.map(lambda n: "+".join(reversed(n.split("+"))))
    gears = cells.obs["condition"].astype(str)
    spelled = (
        turned.replace(CONTROL, "Non-Targeting"),
        gears.where(names.str.contains(r"\+"), turned),
    )
    for one in spelled:
        again = fit(with_obs(cells, perturbation=one.to_numpy()))
        assert not differing(state(model), state(again))
    own = names.replace(CONTROL, "nothing done").to_numpy()
    again = fit(
        with_obs(cells, guide=own),
        fitting={"perturbation_key": "guide", "control": "nothing done"},
    )
    assert not differing(state(model), state(again))


def test_a_gene_may_bear_a_name_of_the_control(cells, control):
    named = renamed(cells, {A: "MOCK", CONTROL: "none"})
    made = fit(named, fitting={"control": "none"})
    assert "MOCK" in made.sizes_["targets"] and "MOCK" in made.sizes_["conditions"]
    out = made.predict(renamed(control, {A: "MOCK"}), "MOCK")
    about = out.obs[["perturbation", "condition", "prompt"]].astype(str)
    assert about.drop_duplicates().to_numpy().tolist() == [
        ["MOCK", "MOCK+ctrl", "gene"]
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_condition_of_one_cell_is_learned_from(seed, cells):
    """Also where that cell might have been held out: its prompt is never zero."""
    names = cells.obs["perturbation"].astype(str).to_numpy()
    drop = np.isin(names, (LOST, DOUBLE))
    drop[np.flatnonzero(names == LOST)[0]] = False
    seen = []

    def look(event):
        pairs = event.model._pairs
        codes = pairs.code[pairs.perturbed]
        seen.append(set(codes.tolist()))

    with pytest.warns(UserWarning, match="one cell: " + LOST):
        made = fit(
            cells[~drop].copy(), seed, {"callbacks": [look]}, valid_share=0.5, lr=1e-3
        )
    n = len(made.sizes_["conditions"])
    assert seen[0] == set(range(1, n + 1))
    assert (made.modules_["learned"].weight != 0).any()


@pytest.mark.parametrize("label_controls", [False, True])
def test_two_perturbed_cells_will_do(label_controls, cells):
    names = cells.obs["perturbation"].astype(str).to_numpy()
    control = np.flatnonzero(names == CONTROL)[:1]
    both = np.r_[control, np.flatnonzero(names == A)[:2]]
    changes = {"label_controls": label_controls, "valid_share": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = fit(cells[both].copy(), **changes)
        with pytest.raises(DataError, match="Too few perturbed cells.*1.*at least 2"):
            fit(cells[both[:2]].copy(), **changes)
    assert np.isfinite(made.predict(cells[control].copy(), A).X).all()


@pytest.mark.parametrize("kind", ["text", "number"])
def test_states_of_a_column(kind, cells):
    text = cells.obs["state"].astype(str)
    values = text if kind == "text" else (text == "Stressed").astype(int) + 4
    made = fit(with_obs(cells, phase=values), fitting={"label_key": "phase"})
    expected = {"text": ["Homeostasis", "Stressed"], "number": ["4", "5"]}
    assert made.labels_ == expected[kind]
    assert made.facts_ == {"states": "column phase", "kept": made.facts_["kept"]}
    # The same states by another name: the same model.
    same = fit(cells, fitting={"label_key": "state"})
    assert not differing(state(made), state(same))
    out = made.embed(cells)
    assert list(out.obs["predicted_state"].cat.categories) == made.labels_


def test_states_fall_back_and_say_so(cells, model):
    assert model.facts_["states"] == "stress score"
    assert model.labels_ == ["Homeostasis", "Stressed"]
    names = {gene: f"N{i}" for i, gene in enumerate(cells.var_names) if gene[0] != "G"}
    blank = renamed(cells, names)
    made = fit(blank, shrink_folds=0)
    assert made.facts_ == {"states": "control or perturbed"}
    assert made.labels_ == ["control", "perturbed"]
    same = fit(blank, states="perturbed", shrink_folds=0)
    assert not differing(state(made), state(same))
    with pytest.raises(DataError, match="stress score"):
        fit(blank, states="stress")
    asked = fit(cells, states="perturbed", shrink_folds=0)
    assert asked.facts_ == {"states": "control or perturbed"}


def test_states_by_default_are_those_of_the_stress_score(cells, model, monkeypatch):
    seen = watched(monkeypatch, "autoencoder_step")
    fit(cells, states="perturbed", max_epochs=1)
    assert all((b.state_control == 0).all() for b in seen)
    assert all((b.state_perturbed == 1).all() for b in seen)
    targets = model.sizes_["targets"]
    score = StressScore.fit(cells, exclude=targets, seed=0)
    column = pd.Categorical(score.states(cells).astype(str))
    made = fit(with_obs(cells, mine=column), fitting={"label_key": "mine"})
    assert not differing(state(made), state(model))


def test_the_stress_threshold_is_that_of_the_training_cells(cells, control):
    train = cells[::2].copy()
    made = fit(train)
    about = made.facts_["stress"]
    targets = made.sizes_["targets"]
    assert StressScore.from_dict(about) == StressScore.fit(train, exclude=targets)
    assert about["threshold"] != StressScore.fit(cells, exclude=targets).threshold
    assert not set(about["genes"]) & set(targets)
    # What is looked at later moves nothing.
    made.embed(cells)
    made.predict(control, A)
    assert made.facts_["stress"] == about


@pytest.mark.parametrize("n_genes", [20, 59, 60, 1000])
def test_variable_genes_and_all_measured_targets(n_genes, cells, control):
    made = fit(cells, n_genes=n_genes)
    targets = set(made.sizes_["targets"]) - {LOST}
    assert targets <= set(made.genes_)
    order = [gene for gene in cells.var_names if gene in made.genes_]
    assert made.genes_ == order
    n = min(n_genes, 60)
    assert n <= len(made.genes_) <= min(60, n + len(targets))
    assert list(made.predict(control, A).var_names) == made.genes_
    out = [gene for gene in cells.var_names if gene not in made.genes_]
    if out:
        with pytest.raises(DataError, match=f"target gene.*{out[0]}"):
            made.predict(control, out[0])


def test_genes_that_are_kept_for_later(cells, control):
    dropped = set(cells.var_names) - set(fit(cells, n_genes=20).genes_)
    gene = sorted(dropped)[0]
    made = fit(cells, fitting={"keep_genes": [gene]}, n_genes=20)
    assert gene in made.genes_ and len(made.genes_) < 60
    assert set(made.predict(control, gene).obs["prompt"]) == {"gene"}


def test_what_is_said_of_targets_without_a_column(cells):
    with pytest.warns(UserWarning, match=f"1 of 6 targets.*{LOST}.*learned prompts"):
        fit(cells)
    odd = renamed(cells, {})
    names = odd.obs["perturbation"].astype(str).str.replace("HSPX1", "HspX1")
    odd.obs["perturbation"] = pd.Categorical(names)
    with pytest.raises(DataError, match="spelled otherwise.*HspX1.*HSPX1"):
        fit(odd)
    other = cells.copy()
    other.var_names = [f"ENSG{i}" for i in range(60)]
    with pytest.warns(UserWarning, match="6 of 6.*Are var_names symbols"):
        fit(other)


@pytest.mark.filterwarnings("error")
def test_data_without_a_peculiarity_give_no_warning(cells, control):
    names = cells.obs["perturbation"].astype(str)
    measured = cells[~names.isin([LOST, DOUBLE]).to_numpy()].copy()
    fit(measured).predict(control, [A, B], n_samples=5)


# ------------------------------------------------------------------------ training


def test_all_phases_are_logged(model):
    table = model.history_
    terms = table.groupby("phase", sort=False)["term"].unique()
    assert list(terms.index) == ["autoencoder", *SECOND_PHASES]
    first = {"rec", "reg", "class", "cons", "centre", "classifier"}
    assert set(terms["autoencoder"]) == first | {"valid_rec", "valid_inconsistency"}
    for phase in SECOND_PHASES:
        assert set(terms[phase]) == {"cycle", "adv", "pair", "anchor", "critic"}


def test_check_11_the_critic_learns_every_fifth_batch(cells):
    made = fit(cells, batch_size=32, max_epochs=1)
    table = made.history_
    n = table.query("phase == 'autoencoder'")["step"].max() + 1
    for phase in SECOND_PHASES:
        own = table[table["phase"] == phase]
        log = own.loc[own["term"] == "critic", "step"].tolist()
        if phase == "transition":
            # Counted from the first batch of each of the two epochs.
            assert n == 8 and log == [0, 5, 8, 13]
            continue
        few = (own["step"].max() + 1) // 2
        assert 1 < few < n and log == sorted({0, *range(5, few, 5)} | {few})
    assert "critic" not in set(fit(cells, w_adv=0.0).history_["term"])


def test_every_perturbed_cell_is_in_each_epoch_once(cells, monkeypatch):
    marked = with_obs(cells)
    X = marked.X.toarray()
    X[:, 1] = np.arange(1, 301) / 100  # a name that is a number
    marked.X = sparse.csr_matrix(X)
    seen = {"autoencoder": watched(monkeypatch, "autoencoder_step")}
    second, phases = watched(monkeypatch, "transition_step"), []
    look = [lambda event: phases.append(event.phase)]
    made = fit(marked, fitting={"callbacks": look}, valid_share=0.0)
    phases = phases[len(seen["autoencoder"]) :]
    for phase, batch in zip(phases, second, strict=True):
        seen.setdefault(phase, []).append(batch)
    assert list(seen) == ["autoencoder", *SECOND_PHASES]
    # Each trial goes without some conditions, the other phases have them all.
    out = dict.fromkeys(seen, [CONTROL])
    folds = target_folds(made.sizes_["conditions"], None, 2, 0)
    for phase, fold in zip(SECOND_PHASES, folds, strict=False):
        out[phase] = [CONTROL, *fold]
    names = cells.obs["perturbation"].to_numpy()
    for phase, batches in seen.items():
        ids = [(b.perturbed[:, 1] * 100).round().int().tolist() for b in batches]
        half = len(ids) // 2
        epochs = [sum(ids[:half], []), sum(ids[half:], [])]
        perturbed = np.flatnonzero(~np.isin(names, out[phase])) + 1
        for epoch in epochs:
            assert sorted(epoch) == perturbed.tolist()
        assert epochs[0] != epochs[1]
        # And beside each a control; all of them get their turn.
        mates = torch.cat([b.control[:, 1] for b in batches]) * 100
        mates = mates.round().int().numpy() - 1
        assert set(names[mates]) == {CONTROL}
        assert len(set(mates)) > 0.9 * (names == CONTROL).sum()


@pytest.mark.parametrize("grouping", ["order", "correlation"])
def test_batches_hold_the_doses_of_their_cells(grouping, cells, monkeypatch):
    seen = watched(monkeypatch, "transition_step")
    marked = cells.copy()
    X = marked.X.toarray()
    X[:, 1] = np.arange(1, 301) / 100
    marked.X = sparse.csr_matrix(X)
    order = []

    def look(event):
        found = event.model.arrays_.get("order")
        order[:] = range(60) if found is None else found.tolist()

    made = fit(marked, fitting={"callbacks": [look]}, grouping=grouping)
    assert sorted(order) == list(range(60))
    assert (order == list(range(60))) is (grouping == "order")
    genes, targets = np.array(made.genes_)[order], made.sizes_["targets"]
    for batch in seen:
        rows = (batch.perturbed[:, order.index(1)] * 100).round().int().numpy() - 1
        names = cells.obs["perturbation"].astype(str).iloc[rows]
        for i, name in enumerate(names):
            wanted = set(name.split("+"))
            assert set(genes[batch.doses[i].numpy() != 0]) == wanted - {LOST}
            assert bool(batch.learned[i].any()) is (LOST in wanted)
            told = np.array(targets)[batch.condition[i].numpy() != 0]
            assert set(told) == wanted
        assert set(batch.doses.unique().tolist()) <= {0.0, 1.0}
        np.testing.assert_array_equal(batch.perturbed.numpy(), X[rows][:, order])


def test_cells_meet_controls_of_their_own_batch_only(cells, monkeypatch):
    marked = cells.copy()
    X = marked.X.toarray()
    second = (cells.obs["batch"] == "batch2").to_numpy()
    X[:, 1] = np.where(second, 2.0, 1.0)
    marked.X = sparse.csr_matrix(X)
    for name in ("autoencoder_step", "transition_step"):
        for key in ("batch", None):
            seen = watched(monkeypatch, name)
            fit(marked, fitting={"batch_key": key})
            pairs = [(b.control[:, 1], b.perturbed[:, 1]) for b in seen]
            same = torch.cat([own == other for own, other in pairs])
            assert bool(same.all()) is (key == "batch")
            if key is None:
                assert 0.3 < same.float().mean() < 0.7
                continue
            for batch in seen:
                for kind in ("control", "perturbed"):
                    codes = getattr(batch, f"batch_{kind}")
                    x = getattr(batch, kind)
                    assert torch.equal(codes, (x[:, 1] == 2).long())


def test_a_batch_without_control_is_named(cells):
    alone = (cells.obs["batch"] == "batch2") & (cells.obs["perturbation"] == CONTROL)
    lone = cells[~alone.to_numpy()].copy()
    with pytest.raises(DataError, match="no control.*batch2"):
        fit(lone, fitting={"batch_key": "batch"})
    fit(lone)
    # The other way round is no problem, and few controls are not held out.
    only = (cells.obs["batch"] == "batch2") & (cells.obs["perturbation"] != CONTROL)
    fit(cells[~only.to_numpy()].copy(), fitting={"batch_key": "batch"})
    names = np.flatnonzero(alone)
    one = cells[~np.isin(np.arange(300), names[1:])].copy()
    for seed in range(3):
        fit(one, seed, {"batch_key": "batch"}, valid_share=0.5, max_epochs=1)


class Rising(REGINA):
    """Its consistency is what a list says, epoch by epoch."""

    values = [3.0, 1.0, 2.0, 2.5, 2.6, 2.7, 2.8, 2.9]

    def _look(self):
        log = self._history
        done = log.term.count("valid_inconsistency")
        return {"valid_rec": 1.0, "valid_inconsistency": self.values[done]}


def test_rising_inconsistency_ends_the_first_phase_and_only_that(cells, tmp_path):
    changes = {"max_epochs": 8, "patience": 3, "dropout": 0.0}
    made = fit(cells, cls=Rising, **changes)
    last = made.history_.groupby("phase")["step"].max() + 1
    n = last["autoencoder"] // 5
    # Up, up, up: after the fifth of eight epochs. The second phase has its two.
    assert n == 4 and last["autoencoder"] == 5 * n
    assert last["transition"] == 2 * n
    longer = fit(cells, cls=Rising, **{**changes, "patience": 7}).history_
    assert longer.query("phase == 'autoencoder'")["step"].max() == 8 * n - 1
    # A run that goes on from a checkpoint stops there as well.
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 4 * n + 1}

    def kill(event):
        if event.phase == "autoencoder" and event.step == 4 * n + 1:
            raise Killed

    with pytest.raises(Killed):
        fit(cells, 0, {"callbacks": [kill], **options}, Rising, **changes)
    again = fit(cells, 0, {"resume": True, **options}, Rising, **changes)
    assert not differing(state(made), state(again))


def test_without_patience_or_held_out_cells_nothing_ends_early(cells):
    for changes in ({"patience": None}, {"valid_share": 0.0, "patience": 1}):
        made = fit(cells, cls=Rising, max_epochs=8, phase_2_epochs=1, **changes)
        last = made.history_.groupby("phase")["step"].max() + 1
        assert last["autoencoder"] == 8 * last["transition"]


def test_inconsistency_is_between_states_before_and_after(cells):
    found = []

    @latentcycle.evaluating
    def measure(m):
        x = torch.from_numpy(m._pairs.X[m._pairs.valid].toarray())
        z = m.modules_["encoder"](x)
        made = m.modules_["decoder"](z)
        before = m.modules_["classifier"](z).softmax(1)
        after = m.modules_["classifier"](m.modules_["encoder"](made))
        gap = before.log() - after.log_softmax(1)
        gap = (before * gap).sum(1).mean()
        found.append((float((made - x).square().mean()), float(gap)))

    def look(event):
        ended = (event.step + 1) % event.model._pairs.n_batches == 0
        if event.phase == "autoencoder" and ended:
            measure(event.model)

    made = fit(cells, fitting={"callbacks": [look]})
    log = made.history_.set_index("term")["value"]
    names = ["valid_rec", "valid_inconsistency"]  # the second a divergence, 0 or more
    logged = np.stack([log[name].to_numpy() for name in names], 1)
    np.testing.assert_allclose(logged, found, rtol=1e-4, atol=1e-7)
    assert len(found) == 2


def test_training_that_diverges_says_so(cells):
    with pytest.raises(DataError, match="diverged.*lr"):
        fit(cells, lr=1e38, clip=None)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adversary_both": True, "discriminator_on": "index"},
        {
            "batch_key": "batch",
            "grouping": "correlation",
            "positions": True,
            "adversary_both": True,
            "discriminator_on": "index",
            "decoder": "frozen",
            "consistency": "class",
        },
        {"batch_key": "batch", "n_genes": 30, "valid_share": 0.0, "w_adv": 0.0},
    ],
    ids=lambda c: "-".join(c) or "plain",
)
def test_a_killed_fit_goes_on_to_the_same_numbers(
    changes, few, control, tmp_path, monkeypatch
):
    changes = {"batch_size": 17, **changes}
    told = {"batch_key": changes.pop("batch_key", None)}
    evidence = watched_evidence(monkeypatch)
    whole = fit(few, fitting=told, **changes)
    n = whole.history_.groupby("phase")["step"].max() + 1
    assert n["transition"] == 10 and (n["trial 1"], n["trial 2"]) == (6, 4)
    wanted = [A, LOST, new_gene(whole)]
    # In the middle of an epoch of each phase, and behind the ends of them.
    points = {
        ("autoencoder", 7): ("autoencoder", 6),
        ("trial 1", 1): ("trial 1", 0),
        ("trial 1", 4): ("trial 1", 3),
        ("trial 2", 3): ("trial 2", 3),
        ("transition", 1): ("transition", 0),
        ("transition", 8): ("transition", 6),
    }
    for number, (phase, at) in enumerate(points):
        fitting = {"checkpoint_dir": tmp_path / str(number), "checkpoint_every": 3}

        def kill(event, phase=phase, at=at):
            if (event.phase, event.step) == (phase, at):
                raise Killed

        with pytest.raises(Killed):
            fit(few, 0, {**told, **fitting, "callbacks": [kill]}, **changes)
        begun = []
        watch = [lambda event, begun=begun: begun.append((event.phase, event.step))]
        again = fit(
            few,
            0,
            {**told, **fitting, "resume": True, "callbacks": watch},
            **changes,
        )
        assert begun[0] == points[phase, at]
        assert not differing(state(whole), state(again))
        assert facts(whole) == facts(again) and "kept" in whole.facts_
        pd.testing.assert_frame_equal(whole.history_, again.history_)
        for kept in (None, 0.5):
            one, two = (m.predict(control, wanted, kept=kept) for m in (whole, again))
            np.testing.assert_array_equal(one.X, two.X)
    # A run that had ended is only read.
    done = fit(few, 0, {**told, **fitting, "resume": True}, **changes)
    assert not differing(state(whole), state(done))
    # The share itself may well be 0: what it was made of is the same.
    assert len(evidence) == 1 + len(points) and len(evidence[0]) > 3
    assert all(torch.equal(rows, evidence[0]) for rows in evidence)


@pytest.mark.parametrize("every", [1, 3, 500])
def test_a_fit_that_is_killed_again_and_again(every, few, control, tmp_path):
    """At the first, at some and at the last step of each phase, one run in all."""
    whole = fit(few, batch_size=17)
    sizes = whole.history_.groupby("phase", sort=False)["step"].max() + 1
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": every, "resume": True}
    begun, files = [], []

    def watch(event, at):
        if not begun[-1]:
            begun[-1] = (event.phase, event.step)
        if (event.phase, event.step) == at:
            raise Killed

    points = [(k, at) for k, n in sizes.items() for at in (0, 1, n // 2, n - 1)]
    for at in points:
        begun.append(())
        with pytest.raises(Killed):
            calls = [lambda event, at=at: watch(event, at)]
            fit(few, 0, {**options, "callbacks": calls}, batch_size=17)
        files.append((tmp_path / "checkpoint.safetensors").exists())
    # What was done last is done again, from the last checkpoint on.
    starts = [(phase, at - at % every) for phase, at in points]
    assert begun == [("autoencoder", 0), *starts[:-1]]
    assert files[0] is False and files[4:] == [True] * (len(points) - 4)
    again = fit(few, 0, options, batch_size=17)
    assert not differing(state(whole), state(again))
    assert facts(whole) == facts(again)
    pd.testing.assert_frame_equal(whole.history_, again.history_)
    wanted = [A, LOST, DOUBLE, new_gene(whole)]
    one, two = (m.predict(control, wanted, kept=0.5) for m in (whole, again))
    np.testing.assert_array_equal(one.X, two.X)


def test_a_fit_that_is_killed_while_a_trial_ends(few, tmp_path, monkeypatch):
    """Before its weights are put back, and before what it found is written."""
    whole = fit(few, batch_size=17)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 3, "resume": True}
    plain, calls = regina.take_back, []

    def killed(nets, arrays):
        calls.append(1)
        if len(calls) % 2:
            raise Killed
        plain(nets, arrays)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(regina, "take_back", killed)
        for _ in range(2):
            with pytest.raises(Killed):
                fit(few, 0, options, batch_size=17)
    again = fit(few, 0, options, batch_size=17)
    assert not differing(state(whole), state(again))
    assert facts(whole) == facts(again)
    pd.testing.assert_frame_equal(whole.history_, again.history_)


def test_predicting_on_the_way_changes_nothing(cells, control, model):
    seen, gene = [], new_gene(model)

    def look(event):
        if event.step % 3 == 1:
            made = event.model.predict(control, [A, LOST, "NEW1"], unmeasured="mean")
            draw = event.model.predict(control, [B, gene], n_samples=5, kept=0.5)
            event.model.predict(control, gene, by="prompt", output="decoded")
            event.model.embed(control)
            event.model.prompts(control, DOUBLE)
            if event.step:  # the mean prompt of the moment, never a silent zero
                q = event.model.prompts(control, "NEW1", unmeasured="mean")
                assert np.abs(q).max() > 0
            seen.append((event.phase, made.X.copy(), draw.n_obs))

    made = fit(cells, fitting={"callbacks": [look]})
    assert not differing(state(model), state(made))
    pd.testing.assert_frame_equal(model.history_, made.history_)
    phases = [phase for phase, *_ in seen]
    assert set(phases) == {"autoencoder", *SECOND_PHASES}
    assert model.facts_ == made.facts_
    assert not np.array_equal(seen[0][1], seen[-1][1])


def test_no_second_phase_leaves_prompts_alone(cells, control):
    made = fit(cells, phase_2_epochs=0, output="decoded")
    made_of = made.embed(control).X + made.prompts(control, A)
    out = made.predict(control, A)
    np.testing.assert_allclose(out.obsm["latent"], made_of, atol=1e-5)


# ---------------------------------------------------------------------- embedding


def test_codes_and_states(model, control):
    out = model.embed(control)
    assert out.X.dtype == np.float32 and out.shape == (control.n_obs, 8)
    x = torch.from_numpy(control.X.toarray())
    z = model.modules_["encoder"](x).detach()
    np.testing.assert_allclose(out.X, z.numpy(), atol=1e-5)
    shares = out.obsm["states"]
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    likely = np.array(model.labels_)[shares.argmax(1)]
    assert out.obs["predicted_state"].tolist() == likely.tolist()
    assert list(out.obs_names) == list(control.obs_names)


@pytest.mark.parametrize("sign", ["code", "written"])
@pytest.mark.parametrize("grouping", ["order", "correlation"])
def test_prompts_are_those_of_the_encoder(sign, grouping, cells, control):
    made = fit(cells, prompt_sign=sign, grouping=grouping, silence_val=-0.7)
    X = control.X.toarray()
    X[:, cells.var_names.get_loc(A)] = -0.7
    order = made.arrays_.get("order", torch.arange(60))
    with torch.no_grad():
        z = [
            made.modules_["encoder"](torch.from_numpy(part)[:, order])
            for part in (control.X.toarray(), X)
        ]
    expected = (z[1] - z[0]).numpy() * (1 if sign == "code" else -1)
    np.testing.assert_allclose(made.prompts(control, A), expected, atol=1e-5)
    assert np.abs(expected).max() > 1e-3


def test_more_cells_than_pass_at_once(model, control):
    many = AnnData(control.X[np.arange(1200) % control.n_obs])
    many.var_names = control.var_names
    once, out = model.predict(control, A).X, model.predict(many, A)
    np.testing.assert_allclose(out.X, once[np.arange(1200) % len(once)], atol=1e-5)


# --------------------------------------------------------------------- prediction


def test_check_17_what_a_prediction_holds(model, control):
    wanted = [A, f"{B}+{A}", LOST]
    out = model.predict(control, wanted, n_samples=7)
    assert out.shape == (3 * 7, 60) and out.X.dtype == np.float32
    assert list(out.var_names) == list(control.var_names) == model.genes_
    expected = {
        "perturbation": [A, f"{A}+{B}", LOST],
        "condition": [f"{A}+ctrl", f"{A}+{B}", f"{LOST}+ctrl"],
        "prompt": ["gene", "gene", "learned"],
        "dose_val": ["1", "1+1", "1"],
        "source_perturbation": [CONTROL] * 3,
    }
    for column, of_each in expected.items():
        assert out.obs[column].tolist() == np.repeat(of_each, 7).tolist(), column
    assert out.obs_names.is_unique and out.obs_names.name is None
    assert set(out.obs["source"]) <= set(control.obs_names)
    drawn = out.obs["source"].to_numpy().reshape(3, 7)
    assert (drawn == drawn[0]).all()  # the same cells for each perturbation
    own = control.obs.loc[out.obs["source"], "depth"].to_numpy()
    np.testing.assert_array_equal(out.obs["depth"].to_numpy(), own)
    assert out.obsm["latent"].shape == (21, 8)
    about = out.uns["scgenlib"]
    assert (about["verb"], about["output"]) == ("predict", "shift")
    # The same seed draws the same cells and gives the same numbers; another does not.
    again = model.predict(control, wanted, n_samples=7)
    np.testing.assert_array_equal(again.X, out.X)
    assert list(again.obs_names) == list(out.obs_names)
    other = model.predict(control, wanted, n_samples=7, seed=1)
    assert list(other.obs["source"]) != list(out.obs["source"])
    np.testing.assert_array_equal(
        model.predict(control, wanted, n_samples=7, seed=0).X, out.X
    )


def test_all_cells_each_once(model, control):
    out = model.predict(control, [A, B])
    n = control.n_obs
    assert out.n_obs == 2 * n
    assert out.obs["source"].tolist() == 2 * control.obs_names.tolist()
    np.testing.assert_allclose(out.X[:n], model.predict(control, A).X, atol=1e-5)
    np.testing.assert_allclose(out.X[n:], model.predict(control, B).X, atol=1e-5)


def test_cells_drawn_twice_have_names_of_their_own(model, control):
    two = control[:2].copy()
    two.obs_names = ["AC", "AC-1"]
    out = model.predict(two, [A, B], n_samples=9)
    assert out.n_obs == 18 and out.obs_names.is_unique
    assert set(out.obs["source"]) == {"AC", "AC-1"}
    # As many as there are: each once.
    n = control.n_obs
    assert model.predict(control, A, n_samples=n).obs["source"].is_unique


def test_one_perturbation_asked_for_twice(model, control):
    for wanted in ([A, f"{A}+ctrl"], [f"{A}+{B}", A, f"{B}+{A}"], [{A: 1}, A]):
        with pytest.raises(DataError, match="asked for twice"):
            model.predict(control, wanted)


def test_the_order_of_the_genes_means_nothing(model, control):
    one, two = (model.predict(control, name) for name in (f"{A}+{B}", f"{B}+{A}"))
    np.testing.assert_array_equal(one.X, two.X)
    pd.testing.assert_frame_equal(one.obs, two.obs)
    single = model.predict(control, A)
    assert not np.allclose(one.X, single.X, atol=1e-4)


def test_doses(model, control):
    def made(perturbation):
        return model.predict(control, perturbation)

    twice = made(f"{A}+{A}")
    np.testing.assert_array_equal(twice.X, made({A: 2.0}).X)
    np.testing.assert_array_equal(made(A).X, made({A: 1}).X)
    assert not np.allclose(twice.X, made(A).X, atol=1e-5)
    np.testing.assert_array_equal(made({A: 1, B: 0.0}).X, made(A).X)
    assert set(made({B: 2, A: 0.5}).obs["dose_val"]) == {"0.5+2"}
    # A prompt of a dose: the value times the dose stands in the input.
    X = control.X.toarray()
    X[:, model.genes_.index(A)] = -2.0
    z = [
        model.modules_["encoder"](torch.from_numpy(x)) for x in (control.X.toarray(), X)
    ]
    expected = (z[1] - z[0]).detach().numpy()
    np.testing.assert_allclose(model.prompts(control, {A: 2}), expected, atol=1e-5)
    half = model.prompts(control, {LOST: 0.5})
    np.testing.assert_allclose(half, 0.5 * model.prompts(control, LOST), atol=1e-6)
    with pytest.raises(DataError, match="dose must be a number"):
        made({A: np.nan})


def test_conditions_have_their_canonical_names(model, control):
    """So that predicted and real cells of one condition are compared."""
    for name in (A, f"{B}+{A}", f"{A}+{A}", f"ctrl+{A}"):
        out = model.predict(control, name, n_samples=2)
        assert set(out.obs["perturbation"]) == {canonical([name])[0]}
    assert set(model.predict(control, {A: 0.5}).obs["perturbation"]) == {f"{A}(0.5)"}


def test_check_20_a_target_that_is_not_measured(cells, model, control):
    # Known from the training: a prompt of its own, the same for every cell.
    q = model.prompts(control, LOST)
    assert model.sizes_["unmeasured"] == [LOST]
    assert np.abs(q).max() > 0 and np.ptp(q, axis=0).max() == 0
    np.testing.assert_array_equal(
        q[0], model.modules_["learned"].weight[0].detach().numpy()
    )
    double = model.predict(control, DOUBLE)
    assert set(double.obs["prompt"]) == {"gene+learned"}
    np.testing.assert_allclose(
        model.prompts(control, DOUBLE), model.prompts(control, A) + q, atol=1e-6
    )
    # Not known: an error, or what was asked for, and said so.
    for call in (model.predict, model.prompts):
        with pytest.raises(DataError, match="target gene.*NEW1.*no prompt.*'mean'"):
            call(control, "NEW1")
        with pytest.raises(DataError, match="NEW1"):
            call(control, f"{A}+NEW1")
        with pytest.raises(ConfigError, match="unmeasured.*zero"):
            call(control, "NEW1", unmeasured="zero")
    out = model.predict(control, ["NEW1", f"{A}+NEW1", A], unmeasured="mean")
    kinds = out.obs.groupby("perturbation", observed=True)["prompt"].unique()
    assert {k: list(v) for k, v in kinds.items()} == {
        "NEW1": ["mean"],
        f"{A}+NEW1": ["gene+mean"],
        A: ["gene"],
    }
    names = model.sizes_["conditions"]
    mean = model.prompts(control, "NEW1", unmeasured="mean")[0]
    every = [model.prompts(control, name).mean(0) for name in names]
    assert np.abs(mean).max() > 0
    # The mean over conditions, each the mean of its controls but a few held out.
    assert np.corrcoef(mean, np.mean(every, 0))[0, 1] > 0.95
    # And in the training, by the configuration.
    with pytest.raises(DataError, match=f"targets.*{LOST}.*unmeasured='learned'"):
        fit(cells, unmeasured="error")
    names = cells.obs["perturbation"].astype(str)
    measured = cells[~names.isin([LOST, DOUBLE]).to_numpy()].copy()
    made = fit(measured, unmeasured="error")
    assert not differing(state(made), state(fit(measured)))


def test_the_mean_prompt_is_that_of_the_controls(cells, control):
    made = fit(cells, valid_share=0.0)
    every = [made.prompts(control, name).mean(0) for name in made.sizes_["conditions"]]
    mean = made.prompts(control[:3].copy(), "NEW1", unmeasured="mean")
    np.testing.assert_allclose(mean, np.tile(np.mean(every, 0), (3, 1)), atol=1e-5)


def test_a_typo_in_a_gene_names_the_nearest(model, control):
    with pytest.raises(DataError, match="HSPXX1.*Did you mean 'HSPX1'"):
        model.predict(control, "HSPXX1")
    with pytest.raises(DataError, match=f"GO11.*Did you mean '{A}'"):
        model.predict(control, {"GO11": 1.0})
    with pytest.raises(DataError, match="name of a condition"):
        model.predict(control, f"{A}++{B}")
    with pytest.raises(ConfigError, match="output.*Did you mean 'shift'"):
        model.predict(control, A, output="shft")
    with pytest.raises(ConfigError, match="by.*Did you mean 'prompt'"):
        model.predict(control, A, by="promt")
    for nothing in ("ctrl", {}, {A: 0.0}, [A, "control"]):
        with pytest.raises(DataError, match="no perturbation"):
            model.predict(control, nothing)
    for perturbation, n in (([], None), (A, 0)):
        with pytest.raises(ConfigError, match="nothing to predict"):
            model.predict(control, perturbation, n_samples=n)


@pytest.mark.parametrize("form", [{}, {"grouping": "correlation"}])
def test_predictions_are_centred_on_the_training_conditions(form, cells):
    """Averaged over conditions, the predicted change is that of the training cells."""
    model = fit(cells, valid_share=0.0, **form)
    plain = fit(cells, valid_share=0.0, centred=False, **form)
    assert not differing(state(plain), {k: state(model)[k] for k in state(plain)})
    names = model.sizes_["conditions"]
    controls = cells[(cells.obs["perturbation"] == CONTROL).to_numpy()].copy()
    goal = condition_means(cells)
    truth = (goal.loc[names] - goal.loc[CONTROL]).mean()

    def gap(made, output):
        out = made.predict(controls, names, output=output)
        change = condition_means(out).loc[names] - goal.loc[CONTROL]
        return np.abs(change.mean() - truth).max()

    for output in ("shift", "decoded"):
        assert gap(model, output) < 1e-4 < 0.01 < gap(plain, output)
    alone = model.predict(controls, names, by="prompt")
    change = condition_means(alone).loc[names] - goal.loc[CONTROL]
    assert np.abs(change.mean() - truth).max() < 1e-4


@pytest.mark.parametrize("which", ["model", "batched"])
def test_a_shift_is_the_cell_and_the_decoded_difference(which, control, request):
    model = request.getfixturevalue(which)
    out = model.predict(control, A)
    decoded = model.predict(control, A, output="decoded")
    order = model.arrays_.get("order", torch.arange(60))
    told = None
    if which == "batched":
        told = torch.from_numpy(
            (control.obs["batch"] == "batch2").to_numpy().astype(int)
        )
    x = control.X.toarray()
    encoder, decoder, forward = (
        model.modules_[k] for k in ("encoder", "decoder", "fwd")
    )

    def decode(z):
        made = np.empty_like(x)
        made[:, order] = decoder(z, told).numpy()
        return made

    with torch.no_grad():
        z = encoder(torch.from_numpy(x)[:, order], told)
        moved = latentcycle.move(
            forward, z, torch.from_numpy(model.prompts(control, A))
        )
        start, after = decode(z), decode(moved)
    np.testing.assert_allclose(out.obsm["latent"], moved.numpy(), atol=1e-5)
    lacking = model.arrays_["lacking"].numpy()
    np.testing.assert_allclose(out.X, x + after - start + lacking[0, 0], atol=1e-5)
    np.testing.assert_allclose(decoded.X, after + lacking[1, 0], atol=1e-5)
    mean = x.mean(0) + (after - start).mean(0) + lacking[0, 0]
    np.testing.assert_allclose(out.X.mean(0), mean, atol=1e-5)
    assert decoded.uns["scgenlib"]["output"] == "decoded"
    assert np.abs(out.X - decoded.X).max() > 0.1


@pytest.mark.parametrize("which", ["model", "batched"])
def test_genes_in_another_order_and_more_of_them(which, control, request):
    model = request.getfixturevalue(which)
    rng = np.random.default_rng(0)
    extra = sparse.csr_matrix(rng.random((control.n_obs, 5)), dtype=np.float32)
    X = sparse.hstack([control.X, extra], "csr")
    more = AnnData(X, obs=control.obs.copy())
    more.var_names = [*control.var_names, *(f"extra{i}" for i in range(5))]
    more = more[:, rng.permutation(65)].copy()
    for name in (A, DOUBLE):
        one, two = model.predict(control, name), model.predict(more, name)
        np.testing.assert_array_equal(one.X, two.X)
        assert list(two.var_names) == model.genes_
    np.testing.assert_array_equal(model.embed(control).X, model.embed(more).X)
    pd.testing.assert_frame_equal(
        effects([model], control, A), effects([model], more, A)
    )
    with pytest.raises(DataError, match="absent.*1 of 60.*'G02'"):
        model.predict(control[:, control.var_names != "G02"].copy(), A)


def test_cells_that_are_no_controls_keep_what_they_were(cells, model):
    some = cells[cells.obs["perturbation"] == B][:4].copy()
    with pytest.warns(UserWarning, match="Not all cells.*source_perturbation"):
        out = model.predict(some, A)
    assert set(out.obs["perturbation"]) == {A}
    assert set(out.obs["source_perturbation"]) == {B}
    # Under the name of the column that the model was fitted with.
    own = with_obs(cells, guide=cells.obs["perturbation"].to_numpy())
    del own.obs["perturbation"]
    made = fit(own, fitting={"perturbation_key": "guide"})
    out = made.predict(own[own.obs["guide"] == CONTROL].copy(), A)
    assert set(out.obs["guide"]) == set(out.obs["perturbation"]) == {A}
    assert set(out.obs["source_guide"]) == {CONTROL}


def test_the_prompt_alone_leads_to_the_silenced_cell(model, control):
    out = model.predict(control, A, by="prompt", output="decoded")
    X = control.X.toarray()
    X[:, model.genes_.index(A)] = model.config.silence_val
    with torch.no_grad():
        z = model.modules_["encoder"](torch.from_numpy(X))
        expected = model.modules_["decoder"](z).numpy()
    np.testing.assert_allclose(out.obsm["latent"], z.numpy(), atol=1e-5)
    expected += model.arrays_["lacking"][1, 1].numpy()
    np.testing.assert_allclose(out.X, expected, atol=1e-4)
    assert out.uns["scgenlib"]["by"] == "prompt"


def test_an_unknown_batch_is_named(batched, control):
    odd = control.obs["batch"].astype(object).replace("batch2", "batch3")
    for call in (batched.embed, lambda cells: batched.predict(cells, A)):
        with pytest.raises(DataError, match="batch.*batch3.*'batch1'|'batch2'"):
            call(with_obs(control, batch=odd))
        bare = control.copy()
        del bare.obs["batch"]
        with pytest.raises(DataError, match="batch column"):
            call(bare)
    other = control.obs["batch"].map({"batch1": "batch2", "batch2": "batch1"})
    moved = batched.predict(with_obs(control, batch=other), A)
    assert np.abs(moved.X - batched.predict(control, A).X).max() > 1e-4


@pytest.mark.parametrize("n_tokens", [4, 7, 64], ids=["divide", "padded", "few genes"])
def test_genes_and_tokens(n_tokens, cells, control, tmp_path):
    made = fit(cells, n_tokens=n_tokens, max_epochs=1, phase_2_epochs=1)
    out = made.predict(control, A)
    assert out.shape == control.shape and np.isfinite(out.X).all()
    made.save(tmp_path / "run")
    again = REGINA.load(tmp_path / "run", device="cpu")
    np.testing.assert_array_equal(out.X, again.predict(control, A).X)


@pytest.mark.parametrize("which", ["model", "batched"])
def test_a_loaded_model_predicts_the_same(which, control, tmp_path, request):
    model = request.getfixturevalue(which)
    model.save(tmp_path / "run")
    again = REGINA.load(tmp_path / "run", device="cpu")
    assert not differing(state(model), state(again))
    wanted = [A, f"{A}+{B}", LOST, DOUBLE, {LOST: 2.0, B: 0.5}, "NEW1", f"{A}+NEW1"]
    wanted.append(new_gene(model))
    # Also where the fit found another share than nothing.
    for kept in (None, 0.7):
        options = {"unmeasured": "mean", "n_samples": 12, "kept": kept}
        one, two = (m.predict(control, wanted, **options) for m in (model, again))
        np.testing.assert_array_equal(one.X, two.X)
        np.testing.assert_array_equal(one.obsm["latent"], two.obsm["latent"])
        pd.testing.assert_frame_equal(one.obs, two.obs)
    assert facts(model) == facts(again) and "kept" in again.facts_
    np.testing.assert_array_equal(model.embed(control).X, again.embed(control).X)
    assert again.facts_["states"] == model.facts_["states"]
    assert StressScore.from_dict(again.facts_["stress"]) == StressScore.from_dict(
        model.facts_["stress"]
    )


def test_a_prediction_can_be_written(model, control, tmp_path):
    import anndata

    out = model.predict(control, [A, DOUBLE], n_samples=60)
    out.write_h5ad(tmp_path / "out.h5ad")
    again = anndata.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(again.X, out.X)
    assert list(again.obs_names) == list(out.obs_names)


def test_a_prediction_above_a_gigabyte_is_refused(model, control):
    n = int(1e9 / 4 / 60)
    # Refused before anything of that size is made.
    for wanted, size in ((A, 10**12), (A, n + 1), ([A, B], n // 2 + 1)):
        with pytest.raises(DataError, match="1 GB.*n_samples"):
            model.predict(control, wanted, n_samples=size)


def test_a_subset_of_the_cells_is_predicted_alike(model, control):
    """No cell's prediction hangs on the cells beside it."""
    whole = model.predict(control, A)
    part = model.predict(control[5:9].copy(), A)
    np.testing.assert_allclose(part.X, whole.X[5:9], atol=1e-5)
    one = model.predict(control[5:6].copy(), A)
    np.testing.assert_allclose(one.X, whole.X[5:6], atol=1e-5)


# ------------------------------------------------------------------------ effects


def test_effects_over_models(model, cells, control):
    other = fit(cells, seed=1)
    x = control.X.toarray()
    changes = [m.predict(control, A, output="shift").X - x for m in (model, other)]
    table = effects([model, other], control, A)
    means = np.stack([change.mean(0) for change in changes])
    assert list(table.index) == model.genes_
    np.testing.assert_allclose(table["effect"], means.mean(0), atol=1e-5)
    sd = np.mean([change.std(0) for change in changes], 0)
    np.testing.assert_allclose(table["sd_cells"], sd, atol=1e-5)
    gap = np.abs(means[0] - means[1]) / np.sqrt(2)
    np.testing.assert_allclose(table["sd_models"], gap, atol=1e-5)
    one = effects([model], control, A)
    assert one["sd_models"].isna().all() and one["effect"].notna().all()
    # A model that decodes by default: the change is asked for all the same.
    decoding = fit(cells, output="decoded")
    shift = decoding.predict(control, A, output="shift").X - x
    found = effects([decoding], control, A)["effect"]
    np.testing.assert_allclose(found, shift.mean(0), atol=1e-5)
    with pytest.raises(DataError, match="NEW1"):
        effects([model], control, "NEW1")
    assert effects([model], control, "NEW1", unmeasured="mean")["effect"].any()
