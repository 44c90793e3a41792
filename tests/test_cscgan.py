"""scGAN and cscGAN: settings, preparation, training, generation, validation."""

from __future__ import annotations

import itertools

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from scgenlib import cscgan, preprocess, simulate
from scgenlib.cscgan import (
    CscGAN,
    CscGANConfig,
    ScGAN,
    ScGANConfig,
    validate,
)
from scgenlib.errors import ConfigError, DataError, ModelFileError
from scgenlib.preprocess import process
from scgenlib.wgan import Generator

SIZES = {"B": 40, "NK": 15, "T": 60, "pDC": 5}


@pytest.fixture(scope="module")
def cells():
    """Four types, none of whose sizes follows the alphabet, and two batches."""
    made = simulate.simulate(type_sizes=SIZES, n_genes=40, seed=3)
    rng = np.random.default_rng(0)
    batch = rng.permutation(np.resize(["b1", "b2", "b2"], made.n_obs)).astype(object)
    batch[(made.obs["cell_type"] == "pDC").to_numpy()] = "b2"
    made.obs["batch"] = pd.Categorical(batch)
    return made


def config(**changes):
    return CscGANConfig.profile("tiny", **{"max_steps": 3, **changes})


def fit(cells, callbacks=(), seed=0, **changes):
    model = CscGAN(config(**changes), seed=seed, device="cpu")
    return model.fit(cells, callbacks=callbacks)


@pytest.fixture(scope="module")
def model(cells):
    return fit(cells)


@pytest.fixture(scope="module")
def batched(cells):
    return fit(cells, extra_conditions=("batch",))


def during(cells, look, **changes):
    """Return what `look` finds in a model that is being fitted."""
    found = []
    fit(cells, [lambda event: found.append(look(event.model))], max_steps=1, **changes)
    return found[0]


def sizes_of(adata, key="cell_type"):
    return adata.obs[key].value_counts(sort=False).to_dict()


def weights(model, name="generator"):
    state = model.modules_[name].state_dict()
    return {key: value.clone() for key, value in state.items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def largest_gap(one, two):
    return max((one[key] - two[key]).abs().max().item() for key in one)


def counted(monkeypatch):
    """Return lists of the critic's and the generator's updates, filled in order."""
    seen = []
    for name in ("critic_step", "generator_step"):
        plain = getattr(cscgan, name)

        def watched(*args, plain=plain, name=name, **kwargs):
            seen.append((name, kwargs))
            return plain(*args, **kwargs)

        monkeypatch.setattr(cscgan, name, watched)
    return seen


# ------------------------------------------------------------------- settings


def test_the_paper_profile_is_the_published_file():
    expected = {
        "clustering_res": 0.15,
        "min_genes": 10,
        "min_cells": 3,
        "target_sum": 20_000,
        "valid_cells": 2000,
        "test_cells": 0,
        "balanced_split": True,
        "latent_dim": 128,
        "gen_layers": (256, 512, 1024),
        "critic_layers": (1024, 512, 256),
        "output_lsn": 20_000,
        "critic_scale": "linear",
        "bn_momentum": 1e-3,
        "max_steps": 1_000_000,
        "critic_updates": 5,
        "lambd": 10,
        "batch_size": 128,
        "algorithm": "AMSGrad",
        "beta1": 0.5,
        "beta2": 0.9,
        "alpha_0": 1e-4,
        "alpha_final": 1e-5,
        "gen_cond_type": "batchnorm",
        "critic_cond_type": "proj",
    }
    paper = CscGANConfig.profile("paper")
    assert {name: getattr(paper, name) for name in expected} == expected


def test_total_of_generated_and_of_real_cells_must_agree():
    with pytest.raises(ConfigError, match="output_lsn 10000.*target_sum 20000"):
        ScGANConfig(output_lsn=1e4)
    with pytest.raises(ConfigError, match="output_lsn 20000.*target_sum 10000"):
        CscGANConfig.profile("book", target_sum=1e4)
    assert ScGANConfig(output_lsn=1e4, target_sum=1e4).output_lsn == 1e4
    assert ScGANConfig(output_lsn=None, target_sum=1e4).output_lsn is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch_size", 1, "batch_size"),
        ("critic_updates", 0, "critic_updates"),
        ("alpha_0", 0.0, "alpha_0"),
        ("gen_layers", (), "gen_layers"),
        ("fake_labels", "drwn", "Did you mean 'drawn'"),
        ("gen_cond_type", "batch", "batchnorm, layernorm, none"),
        ("critic_cond_type", "projection", "proj, miyato, none"),
        ("critic_scale", "log", "linear, log1p"),
        ("algorithm", "SGD", "AMSGrad, Adam"),
    ],
)
def test_settings_that_cannot_be(field, value, words):
    if field == "gen_layers":
        value = (0,)
    with pytest.raises(ConfigError, match=words):
        CscGANConfig(**{field: value})


# -------------------------------------------------------------------- process


def small(**changes):
    base = {"valid_cells": 20, "test_cells": 10, "min_genes": 0, "min_cells": 0}
    return CscGANConfig.profile("tiny", **{**base, **changes})


def test_process_filters_then_splits_and_records_the_sizes(cells):
    dirty = cells.copy()
    counts = dirty.layers["counts"].toarray()
    counts[0, 3:] = 0  # a cell of at most three genes
    counts[1:, 0] = 0  # a gene that this cell alone may have
    dirty.layers["counts"] = sparse.csr_matrix(counts)
    before = dirty.obs.copy()
    out = process(dirty, small(min_genes=5, min_cells=1))
    assert out.n_obs == 119 and dirty.obs_names[0] not in out.obs_names
    assert cells.var_names[0] not in out.var_names
    # Shares of 20 and of 10 by type, rounded down; what is left trains.
    left = sizes_of(out)
    valid = {name: 20 * n // 119 for name, n in left.items()}
    test = {name: 10 * n // 119 for name, n in left.items()}
    for side, expected in (("valid", valid), ("test", test)):
        assert sizes_of(out[out.obs["split"] == side]) | expected == expected
        assert out.uns["split"]["found"][side] == sum(expected.values())
    assert out.uns["split"]["asked"] == {"valid": 20, "test": 10}
    assert sum(out.uns["split"]["found"].values()) == 119
    pd.testing.assert_frame_equal(dirty.obs, before)
    assert "split" not in dirty.uns


def test_process_without_balance_is_exact(cells):
    out = process(cells, small(balanced_split=False))
    assert out.uns["split"]["found"] == {"train": 90, "valid": 20, "test": 10}
    other = process(cells, small(balanced_split=False, split_seed=1))
    assert (out.obs["split"] != other.obs["split"]).any()


def test_process_finds_types_where_none_are_given():
    cells = simulate.simulate(
        type_sizes={"x": 60, "y": 40}, n_genes=60, programmes=0.0, seed=1
    )
    truth = cells.obs.pop("cell_type")
    out = process(cells, small(clustering_res=0.15), label_key=None)
    assert "cell_type" not in cells.obs
    table = pd.crosstab(truth, out.obs["cell_type"])
    assert table.loc[["x", "y"], ["cluster 0", "cluster 1"]].to_numpy().tolist() == [
        [60, 0],
        [0, 40],
    ]
    assert out.uns["split"]["by_type"]
    # The labels will do for training.
    assert fit(out, max_steps=1).labels_ == ["cluster 0", "cluster 1"]


def test_clusters_are_those_of_the_cells_that_pass_the_filter(cells, monkeypatch):
    seen = []

    def leiden(X, resolution, **kwargs):
        seen.append((X.shape, resolution))
        return np.zeros(X.shape[0], dtype=int)

    monkeypatch.setattr("scgenlib.metrics.leiden", leiden)
    few = cells.copy()
    counts = few.layers["counts"].toarray()
    counts[:7, 1:] = 0
    few.layers["counts"] = sparse.csr_matrix(counts)
    process(few, small(min_genes=2, clustering_res=0.7), label_key=None)
    assert seen == [((113, 40), 0.7)]


def test_process_errors(cells):
    with pytest.raises(ConfigError, match="no labels and no resolution"):
        process(cells, small(clustering_res=None), label_key=None)
    with pytest.raises(DataError, match="Did you mean 'cell_type'"):
        process(cells, small(), label_key="cell_typ")
    with pytest.raises(ConfigError, match="120 cells"):
        process(cells, small(valid_cells=120))
    with pytest.raises(DataError, match="The filter leaves nothing"):
        process(cells, small(min_genes=41))


# ---------------------------------------------------------------- what is seen


def test_real_cells_have_the_total_and_their_own_labels(cells):
    def look(model):
        batch = model._critic_batch()
        rows = cells.obs[["cell_type", "batch"]].astype(str).to_numpy()
        known = preprocess.scale_rows(cells[:, model.genes_].layers["counts"], 2e4)
        known = torch.from_numpy(known.toarray())
        exact = "donot_use_mm_for_euclid_dist"
        gaps = torch.cdist(batch["real"], known, compute_mode=exact)
        nearest = gaps.argmin(1)
        assert gaps.min(1).values.max() < 0.1
        names = [model.labels_, model.facts_["levels"]["batch"]]
        for column, codes in enumerate(batch["codes"].T):
            found = [names[column][code] for code in codes]
            assert found == rows[nearest, column].tolist()
        return batch["real"].sum(1)

    totals = during(cells, look, extra_conditions=("batch",), n_genes=20)
    torch.testing.assert_close(totals, torch.full((32,), 2e4))


def test_the_critic_may_see_logarithms(cells):
    batch = during(cells, lambda model: model._critic_batch(), critic_scale="log1p")
    for side in ("real", "fake"):
        totals = torch.expm1(batch[side].double()).sum(1)
        torch.testing.assert_close(
            totals, torch.full_like(totals, 2e4), rtol=1e-4, atol=0
        )


def test_data_without_counts_lose_their_logarithm(cells):
    bare = cells.copy()
    del bare.layers["counts"]
    one, two = (
        during(adata, lambda model: model._critic_batch()["real"])
        for adata in (bare, cells)
    )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=0.1)


def test_cells_without_chosen_genes_do_not_train(cells, monkeypatch):
    chosen = cells.var_names[:10]
    monkeypatch.setattr(cscgan, "select_genes", lambda adata, n: chosen)
    bare = cells.copy()
    counts = bare.layers["counts"].toarray()
    counts[7, :10] = 0
    bare.layers["counts"] = sparse.csr_matrix(counts)
    model = fit(bare, n_genes=10)
    assert model.facts_["cells_without_chosen_genes"] == 1
    # The others kept their own type and total.
    others = np.arange(120) != 7
    types = [model.labels_[code] for code in model.arrays_["codes"][:, 0]]
    assert types == bare.obs["cell_type"][others].tolist()
    assert model.arrays_["totals"].tolist() == counts[others, :10].sum(1).tolist()


def test_a_fitted_model_keeps_no_cell(model):
    assert not hasattr(model, "_X") and not hasattr(model, "_group")
    assert model.arrays_["crowd"].shape[1] < len(model.genes_)


# ------------------------------------------------------------------- sampling


def unsorted_types():
    """Shares .2, .5 and .3: neither by name nor by size in order; "d" has none."""
    cells = simulate.simulate(
        type_sizes={"a": 20, "b": 50, "c": 30}, n_genes=12, seed=0
    )
    cells.obs["cell_type"] = cells.obs["cell_type"].cat.add_categories("d")
    return cells


def shares_of_draws(draw, n_classes):
    found = np.concatenate([draw() for _ in range(100)])
    return np.bincount(found, minlength=n_classes) / len(found)


def test_drawn_labels_have_the_shares_of_the_types():
    def look(model):
        assert model.labels_ == ["a", "b", "c"] and model.sizes_["n_classes"] == [3]

        def draw():
            return model._codes(model._rows())[:, 0].numpy()

        return shares_of_draws(draw, 4)

    shares = during(unsorted_types(), look, batch_size=5000, fake_labels="drawn")
    assert shares[:3] == pytest.approx([0.2, 0.5, 0.3], abs=0.005)
    assert shares[3] == 0


def test_drawn_labels_are_told_to_the_critic():
    def look(model):
        batch = model._critic_batch()
        assert not torch.equal(batch["codes"], batch["fake_codes"])
        return batch["fake_codes"][:, 0].numpy()

    found = during(unsorted_types(), look, batch_size=2000, fake_labels="drawn")
    shares = np.bincount(found) / 2000
    assert shares == pytest.approx([0.2, 0.5, 0.3], abs=0.04)


def test_class_balance_draws_every_type_equally_often():
    def look(model):
        rows = [model._rows() for _ in range(100)]
        codes = model.arrays_["codes"][:, 0].numpy()
        times = np.bincount(np.concatenate(rows), minlength=100)
        return shares_of_draws(lambda: codes[model._rows()], 3), times, codes

    shares, times, codes = during(
        unsorted_types(), look, batch_size=1000, class_balance=True
    )
    assert shares == pytest.approx([1 / 3] * 3, abs=0.005)
    # Within a type every cell, equally often: 100,000 / 3 draws over its cells.
    for code, n in enumerate((20, 50, 30)):
        usual = 1e5 / 3 / n
        own = times[codes == code]
        assert (abs(own - usual) < 5 * np.sqrt(usual)).all()


def test_class_balance_changes_the_training(cells):
    gap = largest_gap(*(weights(fit(cells, class_balance=on)) for on in (True, False)))
    assert gap > 0


# ------------------------------------------------------------------- training


@pytest.mark.parametrize("labels", ["paired", "drawn"])
@pytest.mark.parametrize("by_hand", [True, False])
def test_passes_of_the_generator(cells, monkeypatch, labels, by_hand):
    passes = []

    def hook(module, given, out):
        if isinstance(module, Generator):
            passes.append((torch.is_grad_enabled(), out.requires_grad, given))

    updates = counted(monkeypatch)
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        fit(
            cells,
            max_steps=2,
            critic_updates=3,
            fake_labels=labels,
            hand_gradient=by_hand,
        )
    finally:
        handle.remove()
    each = 1 if labels == "paired" else 2
    without, graph = (False, False), (True, True)
    assert [p[:2] for p in passes] == 2 * (3 * each * [without] + [graph])
    critic = [kwargs for name, kwargs in updates if name == "critic_step"]
    assert len(critic) == 6
    for i, batch in enumerate(critic):
        assert not any(batch[name].requires_grad for name in ("real", "fake"))
        of_fake, of_partner = passes[i // 3 * (3 * each + 1) + i % 3 * each :][:2]
        if labels == "paired":
            assert "fake_codes" not in batch and "partner" not in batch
            assert torch.equal(of_fake[2][1], batch["codes"])
        else:
            # The same noise twice: with drawn types, and with those of real cells.
            assert not batch["partner"].requires_grad
            assert of_fake[2][0] is of_partner[2][0]
            assert torch.equal(of_fake[2][1], batch["fake_codes"])
            assert torch.equal(of_partner[2][1], batch["codes"])
        assert batch["share"].shape == (32, 1)
        assert 0 <= batch["share"].min() and batch["share"].max() <= 1


@pytest.mark.parametrize("cls", [ScGAN, CscGAN])
def test_number_of_updates(cells, monkeypatch, cls):
    updates = counted(monkeypatch)
    kinds = cls.config_class
    made = kinds.profile("tiny", max_steps=4, critic_updates=5)
    cls(made, device="cpu").fit(cells)
    names = [name for name, _ in updates]
    assert names == 4 * (5 * ["critic_step"] + ["generator_step"])
    updates.clear()
    cls(kinds.published("tiny", max_steps=4), device="cpu").fit(cells)
    names = [name for name, _ in updates]
    assert names.count("critic_step") == 6 * 4 - 5
    assert names.count("generator_step") == 4
    assert names[:2] == ["critic_step", "generator_step"]
    assert names[2:9] == 6 * ["critic_step"] + ["generator_step"]


def test_published_form():
    form = {"critic_updates": 6, "first_critic_updates": 1, "fake_labels": "drawn"}
    paper = CscGANConfig.profile("paper")
    assert CscGANConfig.published() == paper.replace(**form)
    assert ScGANConfig.published().critic_updates == 6
    assert CscGANConfig.published("tiny", critic_updates=2).critic_updates == 2


def test_rate_falls_from_step_to_step(cells):
    made = fit(cells, max_steps=4, summary_freq=1, alpha_0=1e-2, alpha_final=1e-4)
    log = made.history_
    rates = log.loc[log["term"] == "learning_rate", "value"]
    # A factor of ten in two steps of four.
    assert rates.tolist() == pytest.approx([10**-2, 10**-2.5, 10**-3, 10**-3.5])
    flat = fit(cells, max_steps=2, summary_freq=1, decay=False).history_
    assert (flat.loc[flat["term"] == "learning_rate", "value"] == 1e-4).all()


def test_history_terms_and_steps(cells):
    log = fit(cells, max_steps=6, summary_freq=4).history_
    terms = {"critic_loss", "penalty", "wasserstein", "gen_loss", "learning_rate"}
    assert set(log["term"]) == terms
    assert sorted(set(log["step"])) == [0, 4, 5]
    at = log.pivot(index="step", columns="term", values="value")
    expected = 10 * at["penalty"] - at["wasserstein"]
    assert at["critic_loss"].to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-4)


@pytest.mark.parametrize("algorithm", ["AMSGrad", "Adam"])
def test_optimisers(cells, algorithm):
    def look(model):
        for optimiser in model.optimisers_.values():
            (group,) = optimiser.param_groups
            assert group["amsgrad"] == (algorithm == "AMSGrad")
            assert (group["betas"], group["eps"]) == ((0.5, 0.9), 1e-8)
            assert group["weight_decay"] == 0
        return {name: len(o.state) for name, o in model.optimisers_.items()}

    found = during(cells, look, algorithm=algorithm)
    # Two hidden layers: weight, gamma, beta each, and the output's two. The critic:
    # two layers of two, and the head's two tables.
    assert found == {"generator": 8, "critic": 6}


@pytest.mark.parametrize("labels", ["paired", "drawn"])
def test_the_two_forms_of_the_gradient_train_alike(cells, labels):
    both = {"max_steps": 5, "fake_labels": labels, "alpha_0": 1e-4}
    one = fit(cells, hand_gradient=True, **both)
    two = fit(cells, hand_gradient=False, **both)
    start = fit(cells, max_steps=0)
    for name in ("generator", "critic"):
        moved = largest_gap(weights(one, name), weights(start, name))
        assert moved > 2e-4
        pairs = zip(
            weights(one, name).values(), weights(two, name).values(), strict=True
        )
        apart = torch.cat([(a - b).abs().flatten() for a, b in pairs])
        # A step of Adam is as long where the gradient is all but zero, so that
        # rounding shows in a few biases.
        assert (apart > 1e-3 * moved).float().mean() < 0.01, name
        assert apart.max() < 0.5 * moved, name


@pytest.mark.parametrize("gen_cond", ["batchnorm", "layernorm", "none"])
@pytest.mark.parametrize("critic_cond", ["proj", "miyato", "none"])
def test_every_way_to_tell_the_type(cells, gen_cond, critic_cond):
    made = fit(cells, max_steps=1, gen_cond_type=gen_cond, critic_cond_type=critic_cond)
    # Toy widths, 40 genes, 4 types: tables of 2 x 48 x 4, or x 1 for all.
    tables = 96 * (1 if gen_cond == "none" else 4)
    heads = {"proj": 4 * 17, "miyato": 17 + 4 * 16, "none": 17}
    assert made.n_parameters() == {
        "generator": 8 * 16 + 16 * 32 + 33 * 40 + tables,
        "critic": 41 * 32 + 33 * 16 + heads[critic_cond],
    }
    one, two = (made.generate({name: 3}).X.toarray() for name in ("NK", "B"))
    # Classes start alike, so that only training can tell them apart.
    assert np.array_equal(one, two) == (gen_cond == "none")


@pytest.mark.parametrize(
    "changes",
    [
        {"fake_labels": "drawn", "hand_gradient": False},
        {"class_balance": True, "extra_conditions": ("batch",)},
        {"gen_cond_type": "layernorm", "critic_scale": "log1p", "algorithm": "Adam"},
    ],
    ids=["drawn", "balance", "layernorm"],
)
def test_half_and_half_is_the_whole(cells, tmp_path, changes):
    made = config(max_steps=8, **changes)

    def kill(event):
        if event.step == 4:
            raise KeyboardInterrupt

    whole = CscGAN(made, device="cpu").fit(cells)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 4}
    with pytest.raises(KeyboardInterrupt):
        CscGAN(made, device="cpu").fit(cells, callbacks=[kill], **options)
    halves = CscGAN(made, device="cpu").fit(cells, resume=True, **options)
    assert_same(halves._state_tensors(), whole._state_tensors())
    assert halves.history_.equals(whole.history_)


def test_a_checkpoint_of_other_genes_is_refused(cells, tmp_path):
    options = {"checkpoint_dir": tmp_path, "resume": True}
    CscGAN(config(max_steps=1), device="cpu").fit(cells, **options)
    with pytest.raises(ModelFileError, match="another data"):
        CscGAN(config(max_steps=1), device="cpu").fit(cells[:, 1:].copy(), **options)
    renamed = cells.copy()
    renamed.var_names = ["x" + name for name in cells.var_names]
    with pytest.raises(ModelFileError, match="another data"):
        CscGAN(config(max_steps=1), device="cpu").fit(renamed, **options)
    with pytest.raises(ModelFileError, match="another config"):
        CscGAN(config(max_steps=1, n_genes=10), device="cpu").fit(cells, **options)


def test_save_freq_is_the_gap_between_checkpoints(cells, tmp_path, monkeypatch):
    from scgenlib import training

    written, plain = [], training.save_checkpoint

    def save(model, path, phase, step):
        written.append((phase, step))
        plain(model, path, phase, step)

    monkeypatch.setattr(training, "save_checkpoint", save)
    model = CscGAN(config(max_steps=5, save_freq=2), device="cpu")
    model.fit(cells, checkpoint_dir=tmp_path)
    assert written == [(0, 2), (0, 4), (1, 0)]
    written.clear()
    model.fit(cells, checkpoint_dir=tmp_path, checkpoint_every=3)
    assert written == [(0, 3), (1, 0)]


def test_an_error_in_training_is_not_swallowed(cells):
    def fail(event):
        raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        fit(cells, [fail])


# ----------------------------------------------------------------- generation


def test_the_numbers_asked_for_in_the_order_of_the_types(model):
    made = model.generate([1000, 500, 0, 200])
    assert made.n_obs == 1700
    expected = ["B"] * 1000 + ["NK"] * 500 + ["pDC"] * 200
    assert model.labels_ == ["B", "NK", "T", "pDC"]
    assert made.obs["cell_type"].tolist() == expected
    assert list(made.obs["cell_type"].cat.categories) == model.labels_
    assert made.obs_names[0] == "cscgan_0" and made.obs_names.is_unique


def test_a_dict_gives_its_own_order(model):
    made = model.generate({"pDC": 2, "B": 0, "T": np.int64(3)})
    assert made.obs["cell_type"].tolist() == ["pDC"] * 2 + ["T"] * 3


def test_a_number_is_shared_as_the_types_are(model):
    # Of 120 cells, 40, 15, 60 and 5.
    assert list(sizes_of(model.generate(24)).values()) == [8, 3, 12, 1]
    # 3.33, 1.25, 5, 0.42: the cell that rounding leaves goes to the largest rest.
    assert list(sizes_of(model.generate(10)).values()) == [3, 1, 5, 1]
    assert list(sizes_of(model.generate(np.int64(1))).values()) == [0, 0, 1, 0]


def test_rows_are_the_generators_for_those_types(model):
    made = model.generate({"pDC": 3, "B": 2}, seed=7)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(7))
    codes = torch.tensor([3, 3, 3, 0, 0])[:, None]
    with torch.no_grad():
        y = model.modules_["generator"](z, codes)
    torch.testing.assert_close(torch.from_numpy(made.X.toarray()), torch.log1p(y / 2))
    other = model.generate({"B": 3, "T": 2}, seed=7).X.toarray()
    assert not np.allclose(other[:3], made.X.toarray()[:3])


def test_generated_cells_have_the_total_of_X(model):
    made = model.generate(30)
    assert made.X.format == "csr" and made.X.dtype == np.float32
    assert made.X.min() >= 0 and "counts" not in made.layers
    totals = np.expm1(made.X.toarray().astype(float)).sum(1)
    assert totals == pytest.approx(np.full(30, 1e4), rel=1e-4)


def test_a_seed_repeats_and_another_differs(model):
    one, two, three = (model.generate(5, seed=s).X.toarray() for s in (1, 1, 2))
    assert np.array_equal(one, two) and not np.array_equal(one, three)


@pytest.mark.parametrize(
    ("cells_asked", "words"),
    [
        ({"nk": 3}, "Unknown type.*'nk'.*Did you mean 'NK'"),
        ({"monocyte": 3}, "'monocyte'.*B, NK, T, pDC"),
        ([1, 2, 3], "one number for each type.*3 numbers.*4, for B, NK, T, pDC"),
        ([1, 2, 3, 4, 5], "5 numbers"),
        ({"B": -1}, "number of 'B'.*-1.*0 or more"),
        ([1, 2, -3, 4], "number of 'T'.*-3"),
        ({"B": 2.5}, "number of 'B'.*2.5"),
        ([0, 0, 0, 0], "No cell is asked for"),
        ({"B": 0}, "No cell is asked for"),
        ({}, "No cell is asked for"),
        (0, "No cell is asked for"),
        (-5, "No cell is asked for"),
    ],
)
def test_requests_that_cannot_be_met(model, cells_asked, words):
    with pytest.raises(ConfigError, match=words):
        model.generate(cells_asked)


def test_counts_give_cells_a_depth_again(cells, model):
    made = model.generate({"T": 30, "pDC": 20}, seed=1, counts=True)
    counts = made.layers["counts"].toarray()
    assert np.array_equal(counts, np.rint(counts)) and counts.min() >= 0
    totals = np.asarray(cells.layers["counts"].sum(1)).ravel()
    for name in ("T", "pDC"):
        own = set(totals[(cells.obs["cell_type"] == name).to_numpy()])
        found = counts[(made.obs["cell_type"] == name).to_numpy()].sum(1)
        assert set(found) <= own and len(set(found)) > 2, name
    # X follows from the counts, and is what normalising them gives.
    expected = preprocess.normalise(made.layers["counts"], 1e4).toarray()
    np.testing.assert_allclose(made.X.toarray(), expected, rtol=1e-5)
    assert made.uns["scgenlib"]["counts"]
    # The shares behind the molecules are those of the cells without depth.
    plain = np.expm1(model.generate({"T": 30, "pDC": 20}, seed=1).X.toarray())
    assert (counts[plain == 0] == 0).all()
    depth = counts.sum(1, keepdims=True)
    expected = plain / 1e4 * depth
    # Poisson-like: no count is far from its mean.
    assert (np.abs(counts - expected) < 6 * np.sqrt(expected + 1)).all()


def test_counts_of_data_that_had_none(cells):
    bare = cells.copy()
    del bare.layers["counts"]
    made = fit(bare, max_steps=1)
    with pytest.raises(ConfigError, match="had no counts.*leave counts out"):
        made.generate(5, counts=True)
    assert made.generate(5).n_obs == 5


def test_further_conditions(cells, batched):
    assert batched.sizes_["n_classes"] == [4, 2]
    made = batched.generate({"NK": 200}, seed=1)
    # What is not given is drawn as it occurs among the cells of the type.
    own = cells.obs.loc[cells.obs["cell_type"] == "NK", "batch"]
    share = (own == "b1").mean()
    assert 0.1 < share < 0.9
    assert (made.obs["batch"] == "b1").mean() == pytest.approx(share, abs=0.12)
    made = batched.generate({"NK": 20, "T": 10}, given={"batch": "b1"})
    assert (made.obs["batch"] == "b1").all()
    assert list(made.obs["batch"].cat.categories) == ["b1", "b2"]
    assert sizes_of(made)["NK"] == 20


def test_a_combination_that_was_never_seen(cells, batched):
    both = pd.crosstab(cells.obs["cell_type"], cells.obs["batch"])
    assert both.loc["pDC", "b1"] == 0
    assert set(batched.generate({"pDC": 30}).obs["batch"]) == {"b2"}
    new, seen = (
        batched.generate({"pDC": 30}, given={"batch": b}, counts=True, seed=2)
        for b in ("b1", "b2")
    )
    assert set(new.obs["batch"]) == {"b1"}
    assert not np.array_equal(new.X.toarray(), seen.X.toarray())
    # Depth comes from the cells of the type, in whatever batch.
    totals = np.asarray(cells.layers["counts"].sum(1)).ravel()
    own = set(totals[(cells.obs["cell_type"] == "pDC").to_numpy()])
    assert set(np.asarray(new.layers["counts"].sum(1)).ravel()) <= own


def test_conditions_that_are_unknown(cells, model, batched):
    with pytest.raises(ConfigError, match="Unknown condition.*Did you mean 'batch'"):
        batched.generate({"B": 1}, given={"bach": "b1"})
    with pytest.raises(ConfigError, match="value of 'batch'.*'b3'.*b1, b2"):
        batched.generate({"B": 1}, given={"batch": "b3"})
    with pytest.raises(ConfigError, match="Unknown condition.*Allowed: nothing"):
        model.generate({"B": 1}, given={"batch": "b1"})
    with pytest.raises(DataError, match="extra_conditions.*Did you mean 'batch'"):
        fit(cells, extra_conditions=("batches",))


def test_conditions_outlive_saving(batched, tmp_path):
    again = CscGAN.load(batched.save(tmp_path / "model"), device="cpu")
    request = ({"T": 3, "NK": 2}, {"batch": "b1"})
    one, two = (
        made.generate(request[0], given=request[1], counts=True)
        for made in (batched, again)
    )
    assert one.obs.equals(two.obs)
    assert np.array_equal(one.X.toarray(), two.X.toarray())
    assert one.uns["scgenlib"] == two.uns["scgenlib"]


def test_genes_keep_their_names_and_order_to_the_file(cells, tmp_path):
    shuffled = cells[:, np.random.default_rng(1).permutation(40)].copy()
    made = fit(shuffled, max_steps=1, n_genes=15)
    chosen = set(preprocess.select_genes(shuffled, 15))
    assert made.genes_ == [name for name in shuffled.var_names if name in chosen]
    made.generate(6).write_h5ad(tmp_path / "made.h5ad")
    again = anndata.read_h5ad(tmp_path / "made.h5ad")
    assert list(again.var_names) == made.genes_
    assert again.obs["cell_type"].notna().all()


def test_a_column_of_another_name(cells):
    named = cells.copy()
    named.obs["kind"] = named.obs.pop("cell_type")
    model = CscGAN(config(max_steps=1), device="cpu").fit(named, label_key="kind")
    made = model.generate({"NK": 2})
    assert made.obs["kind"].tolist() == ["NK", "NK"] and "cell_type" not in made.obs
    assert model.like(named) == SIZES


def test_report_on_copies(cells, model):
    about = model.generate(20).uns["scgenlib"]
    assert about["memorisation"]["n_training_cells"] == 120
    assert about["memorisation"]["n_cells"] == 20
    assert about["memorisation"]["distance_ratio"] > 0
    assert about["generate_seed"] == 0 and about["total"] == 1e4
    assert "memorisation" not in model.generate(20, report=False).uns["scgenlib"]
    # Real cells on the model's scale are copies, and are called so.
    real = model.align(cells)
    found = cscgan.copies.report(real.X, model.arrays_)
    assert found["distance_ratio"] < 0.01 and found["share_very_near"] == 1


@pytest.mark.parametrize(
    "changes", [{"critic_scale": "log1p"}, {"output_lsn": None}, {"output_lsn": 20_000}]
)
def test_scales_and_the_library_size_layer(cells, changes):
    made = fit(cells, max_steps=5, alpha_0=1e-3, **changes).generate(60)
    assert np.isfinite(made.X.data).all() and made.X.nnz > 0
    totals = np.expm1(made.X.toarray().astype(float)).sum(1)
    spread = totals.std() / totals.mean()
    # Without the layer, nothing holds the totals together.
    assert spread > 1e-2 if changes.get("output_lsn", 1) is None else spread < 1e-4


def test_learning_brings_generated_cells_nearer():
    from scgenlib.metrics import mmd2

    cells = simulate.simulate(
        type_sizes={"a": 60, "b": 60},
        n_genes=30,
        marker_fraction=0.3,
        programmes=0.0,
        seed=0,
    )
    fast = {"alpha_0": 1e-2, "alpha_final": 1e-3, "critic_scale": "log1p", "lambd": 1.0}

    def gap(model, made, real):
        fake = model.generate({made: 60}, report=False)
        cells_of = model.align(cells[cells.obs["cell_type"] == real])
        return mmd2(cells_of, fake)

    first, last = (fit(cells, max_steps=n, **fast) for n in (1, 240))
    for own, other in (("a", "b"), ("b", "a")):
        assert gap(last, own, own) < 0.6 * gap(first, own, own)
        # And nearer to their own type than to the other one.
        assert gap(last, own, own) < 0.8 * gap(last, own, other)


# ----------------------------------------------------------------------- align


def test_align_takes_genes_by_name(cells):
    model = fit(cells, max_steps=1, n_genes=15)
    aligned = model.align(cells)
    assert list(aligned.var_names) == model.genes_
    # Scaled over the model's genes only, as the training cells were.
    counts = cells[:, model.genes_].layers["counts"].toarray()
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    np.testing.assert_allclose(aligned.X.toarray(), expected, rtol=1e-5)
    assert aligned.obs["cell_type"].tolist() == cells.obs["cell_type"].tolist()
    turned = cells[:, ::-1].copy()
    np.testing.assert_allclose(model.align(turned).X.toarray(), expected, rtol=1e-5)
    bare = cells.copy()
    del bare.layers["counts"]
    np.testing.assert_allclose(
        model.align(bare).X.toarray(), expected, rtol=1e-3, atol=1e-3
    )
    with pytest.raises(DataError, match=f"2 of 15, such as '{model.genes_[0]}'"):
        model.align(cells[:, ~cells.var_names.isin(model.genes_[:2])])


# -------------------------------------------------------------------- validate


def fixed_metrics(monkeypatch, mmd=(), auroc=()):
    """Give validation these values in turn, then 0.5."""
    for name, values in (("mmd2", mmd), ("two_sample_auroc", auroc)):
        left = itertools.chain(values, itertools.repeat(0.5))

        def next_value(real, fake, left=left, **kwargs):
            return next(left)

        monkeypatch.setattr(f"scgenlib.metrics.{name}", next_value)


def logged(model, term):
    log = model.history_[model.history_["term"] == term]
    return dict(zip(log["step"], log["value"], strict=True))


def test_validation_logs_its_terms(cells):
    made = fit(cells, [validate(cells, 2, n_cells=60)], max_steps=4)
    for term in ("valid_mmd", "valid_auroc"):
        found = logged(made, term)
        assert list(found) == [0, 2, 3]
        assert all(np.isfinite(value) for value in found.values())
    # After three steps, a forest has no trouble to tell.
    assert logged(made, "valid_auroc")[3] > 0.8
    assert "best_step" not in made.facts_


def test_validation_holds_like_against_like(cells, monkeypatch):
    seen = []

    def mmd2(real, fake):
        seen.append((real, fake))
        return 0.0

    fixed_metrics(monkeypatch)
    monkeypatch.setattr("scgenlib.metrics.mmd2", mmd2)
    made = fit(cells, [validate(cells, n_cells=50)], max_steps=4, validation_freq=3)
    assert len(seen) == 2  # at steps 0 and 3
    real, fake = seen[0]
    assert real.n_obs == fake.n_obs == 50
    # The same held-out cells at every look, and generated ones of the same types.
    assert real is seen[1][0]
    assert sizes_of(real) == sizes_of(fake)
    assert set(real.obs_names) < set(cells.obs_names)
    assert list(real.var_names) == list(fake.var_names) == made.genes_


def test_validation_does_not_touch_the_training(cells, model, monkeypatch):
    fixed_metrics(monkeypatch)
    watched = fit(cells, [validate(cells, 1, n_cells=40)])
    assert_same(watched._state_tensors(), model._state_tensors())


@pytest.mark.parametrize("keep", ["mmd", "auroc"])
def test_the_best_generator_is_kept(cells, monkeypatch, keep):
    # The third look is the best, and equalled later; the other measure says the last.
    values = {"mmd": [4.0, 3, 2, 1, 0], "auroc": [0.9, 0.8, 0.7, 0.6, 0.5]}
    values[keep] = [3.0, 2.0, 1.0, 1.0, 2.0]
    fixed_metrics(monkeypatch, **values)
    states = []
    looks = [
        validate(cells, 2, n_cells=40, keep=keep),
        lambda event: states.append(weights(event.model)),
    ]
    made = fit(cells, looks, max_steps=9)
    assert made.facts_["best_step"] == 4 and made.facts_["best_value"] == 1
    assert_same(weights(made), states[4])
    assert largest_gap(states[4], states[8]) > 0
    assert not any(key.startswith("best/") for key in made.arrays_)


def test_without_keep_the_last_generator_stays(cells, monkeypatch):
    fixed_metrics(monkeypatch, mmd=[1.0, 2.0, 3.0])
    states = []
    looks = [
        validate(cells, 1, n_cells=40),
        lambda event: states.append(weights(event.model)),
    ]
    assert_same(weights(fit(cells, looks)), states[-1])


def test_a_resumed_run_keeps_the_best_of_both_halves(cells, monkeypatch, tmp_path):
    made = config(max_steps=7)

    def run(values, kill_at=None, **options):
        def kill(event):
            if event.step == kill_at:
                raise KeyboardInterrupt

        fixed_metrics(monkeypatch, mmd=values)
        model = CscGAN(made, device="cpu")
        looks = [validate(cells, 2, n_cells=40, keep="mmd"), kill]
        return model.fit(cells, callbacks=looks, **options)

    # Looks at steps 0, 2, 4 and 6; the best is the second.
    whole = run([3.0, 1.0, 2.0, 4.0])
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 3, "resume": True}
    with pytest.raises(KeyboardInterrupt):
        run([3.0, 1.0], kill_at=3, **options)
    resumed = run([2.0, 4.0], **options)
    assert resumed.facts_["best_step"] == whole.facts_["best_step"] == 2
    assert_same(resumed._state_tensors(), whole._state_tensors())
    assert resumed.history_.equals(whole.history_)
    # And the file says the same.
    loaded = CscGAN.load(resumed.save(tmp_path / "model"), device="cpu")
    assert loaded.facts_["best_value"] == 1
    assert_same(weights(loaded), weights(whole))


def test_validation_draws_a_map_at_every_look(cells, monkeypatch, tmp_path):
    fixed_metrics(monkeypatch)
    fitted = []

    def fit_map(real):
        fitted.append(real)
        return lambda some: some.X.toarray()[:, :2]

    monkeypatch.setattr("scgenlib.plots.fit_map", fit_map)
    look = validate(cells, 2, n_cells=40, folder=tmp_path / "maps")
    fit(cells, [look], max_steps=4)
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == ["step_0.png", "step_2.png", "step_3.png"]
    for path in (tmp_path / "maps").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
    # One map, of real cells, for all looks.
    assert len(fitted) == 1 and set(fitted[0].obs_names) < set(cells.obs_names)


def test_validation_errors(cells):
    with pytest.raises(ConfigError, match="Did you mean 'auroc'"):
        validate(cells, keep="auc")
    with pytest.raises(DataError, match="Genes are absent.*10 of 40"):
        fit(cells, [validate(cells[:, :30].copy())], max_steps=1)


def test_validation_of_a_model_without_types(cells):
    made = ScGAN(ScGANConfig.profile("tiny", max_steps=1), device="cpu")
    made.fit(cells, label_key=None, callbacks=[validate(cells, n_cells=45, keep="mmd")])
    assert list(logged(made, "valid_mmd")) == [0]
    assert made.facts_["best_step"] == 0


# ---------------------------------------------------------------- bad data, scGAN


def test_data_that_cannot_be_learned(cells):
    raw = cells.copy()
    raw.X = cells.layers["counts"].copy()
    with pytest.raises(DataError, match="raw counts.*log1p.*normalise"):
        fit(raw)
    scaled = cells.copy()
    scaled.X = preprocess.scale_rows(cells.layers["counts"], 1e4)
    with pytest.raises(DataError, match="normalised, without the logarithm"):
        fit(scaled)
    lone = cells.copy()
    labels = lone.obs["cell_type"].astype(str).to_numpy()
    labels[0] = "lone"
    lone.obs["cell_type"] = pd.Categorical(labels)
    with pytest.raises(DataError, match="'lone' with 1.*Drop the class"):
        fit(lone)
    with pytest.raises(DataError, match="needs cell types.*preprocess.process"):
        CscGAN(config(), device="cpu").fit(cells, label_key=None)
    # For scGAN, which knows no types, a lone cell is a cell.
    ScGAN(ScGANConfig.profile("tiny", max_steps=1), device="cpu").fit(lone)


@pytest.fixture(scope="module")
def plain(cells):
    made = ScGAN(ScGANConfig.profile("tiny", max_steps=2), device="cpu")
    return made.fit(cells, label_key=None)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"B": 3}, "scGAN knows no types, CscGAN does"),
        ([3], "one whole number"),
        (2.5, "one whole number"),
        (0, "at least 1"),
        (-4, "at least 1"),
    ],
)
def test_scgan_takes_a_number_only(plain, asked, words):
    with pytest.raises(ConfigError, match=words):
        plain.generate(asked)


def test_scgan(cells, plain, tmp_path):
    made = plain.generate(30, counts=True)
    assert made.n_obs == 30 and list(made.obs.columns) == []
    assert made.obs_names[0] == "scgan_0"
    totals = set(np.asarray(cells.layers["counts"].sum(1)).ravel())
    assert set(np.asarray(made.layers["counts"].sum(1)).ravel()) <= totals
    # 8 x 16 + 16 x 32 + 33 x 40 and one table of 2 x 48; 41 x 32 + 33 x 16 + 17.
    assert plain.n_parameters() == {"generator": 2056, "critic": 1857}
    assert plain.like(cells) == 120
    again = ScGAN.load(plain.save(tmp_path / "model"), device="cpu")
    assert np.array_equal(again.generate(30, counts=True).X.toarray(), made.X.toarray())
    with pytest.raises(ModelFileError, match="of another method.*'scgan'"):
        CscGAN.load(tmp_path / "model", device="cpu")


def test_scgan_does_not_look_at_the_types(cells, plain):
    other = cells.copy()
    other.obs["cell_type"] = pd.Categorical(np.resize(["u", "v"], 120))
    made = ScGAN(ScGANConfig.profile("tiny", max_steps=2), device="cpu").fit(other)
    assert_same(weights(made), weights(plain))


# ------------------------------------------------------ what a review tripped over


def test_a_series_of_counts_is_read_by_name(cells):
    model = CscGAN(small(), seed=0, device="cpu").fit(cells)
    wanted = pd.Series({"T": 3, "B": 1, "NK": 0, "pDC": 9})
    made = model.generate(wanted)
    assert made.obs["cell_type"].value_counts().to_dict() == {
        "pDC": 9,
        "T": 3,
        "B": 1,
        "NK": 0,
    }
    for wrong in (5.0, None, "B", True):
        with pytest.raises(ConfigError, match="cells cannot be read"):
            model.generate(wrong)


def test_extra_conditions_are_checked(cells):
    config = small(extra_conditions=("donor",))
    known = cells.copy()
    known.obs["donor"] = np.where(np.arange(cells.n_obs) % 2, "d1", "d2")
    missing = known.copy()
    missing.obs["donor"] = missing.obs["donor"].where(np.arange(cells.n_obs) > 3)
    with pytest.raises(DataError, match="have no 'donor'"):
        CscGAN(config, device="cpu").fit(missing)
    with pytest.raises(DataError, match="extra_conditions"):
        CscGAN(small(extra_conditions=("cell_type",)), device="cpu").fit(known)
    # Another donor column is other data: a checkpoint of it must not be taken up.
    swapped = known.copy()
    swapped.obs["donor"] = known.obs["donor"].to_numpy()[::-1]
    one, two = (CscGAN(config, device="cpu").fit(a) for a in (known, swapped))
    assert one.data_hash_ != two.data_hash_


def test_a_callback_serves_a_second_fit_with_other_genes(cells):
    look = validate(cells[:40], every=1, n_cells=20)
    few = cells[:, cells.var_names[:30]].copy()
    for data in (cells, few):
        model = CscGAN(small(max_steps=2), device="cpu").fit(data, callbacks=[look])
        assert (model.history_["term"] == "valid_mmd").any()
    unlabelled = cells[:40].copy()
    del unlabelled.obs["cell_type"]
    look = validate(unlabelled, every=1, n_cells=20)
    with pytest.raises(DataError, match="[Ll]abel column"):
        CscGAN(small(max_steps=2), device="cpu").fit(cells, callbacks=[look])
