"""scAtlasVAE: settings, training, and what a fitted model offers."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from scgenlib import simatlas
from scgenlib.errors import ConfigError, DataError
from scgenlib.losses import rbf_mmd
from scgenlib.mapping import matching_pairs
from scgenlib.metrics.integration import same_batch_share
from scgenlib.preprocess import normalise
from scgenlib.rowblocks import hash_split
from scgenlib.scatlasvae import InMemory, ScAtlasVAE, ScAtlasVAEConfig

KEYS = ["cell_type", "lineage"]


@pytest.fixture(scope="module")
def atlas(small_atlas) -> AnnData:
    return small_atlas.copy()


@pytest.fixture(scope="module")
def cells(atlas) -> AnnData:
    return atlas[atlas.obs["set"] == "reference"].copy()


@pytest.fixture(scope="module")
def query(atlas) -> AnnData:
    return atlas[atlas.obs["set"] == "query"].copy()


@pytest.fixture(scope="module")
def few() -> AnnData:
    lineages = {"A": {"A1": 30.0, "A2": 20.0}, "B": {"B1": 30.0, "B2": 20.0}}
    return simatlas.atlas(90, 30, seed=3, lineages=lineages, n_batches=2)


def config(**changes) -> ScAtlasVAEConfig:
    return ScAtlasVAEConfig.profile("tiny", **{"max_epoch": 1, **changes})


def fit(cells, label_key=None, seed=0, batch_key="auto", fitting=None, **changes):
    made = ScAtlasVAE(config(**changes), seed=seed, device="cpu")
    return made.fit(cells, label_key=label_key, batch_key=batch_key, **(fitting or {}))


@pytest.fixture(scope="module")
def model(cells) -> ScAtlasVAE:
    return fit(cells, KEYS, max_epoch=30, lr=1e-2)


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._state_tensors().items()}


def differing(one, two) -> list[str]:
    assert one.keys() == two.keys()
    return [k for k in one if not torch.equal(one[k], two[k])]


def codes(model, cells) -> np.ndarray:
    return np.asarray(model.embed(cells).X)


def with_obs(cells, **columns) -> AnnData:
    out = cells.copy()
    for name, values in columns.items():
        out.obs[name] = values
    return out


def last_step(found: dict):
    """Return a callback that keeps the weights of the last step it sees."""

    def look(event):
        found.update(state(event.model), step=torch.tensor(event.step))

    return look


# ----------------------------------------------------------------- configuration


def test_warm_up_of_the_divergence():
    c = config(kl_weight=0.8)

    def kl(step, n_steps=1000, **changes):
        made = ScAtlasVAE(c.replace(**changes), device="cpu")
        return made.loss_weights(step, n_steps, 10).kl

    # By default half of all steps, then the full weight up to the end.
    assert [kl(s) for s in (0, 250, 499, 500, 999)] == pytest.approx(
        [0, 0.4, 0.8 * 0.998, 0.8, 0.8]
    )
    assert [kl(s, kl_warmup=100) for s in (0, 50, 100, 999)] == pytest.approx(
        [0, 0.4, 0.8, 0.8]
    )
    assert kl(0, kl_warmup=0) == kl(0, n_steps=1) == 0.8
    assert kl(999, kl_warmup=4000) == pytest.approx(0.8 * 999 / 4000)


def test_other_weights_of_the_loss():
    made = ScAtlasVAE(
        config(gate_weight=0.1, pred_weight=0.2, mmd_weight=0.3, constrain_weight=0.4)
    )
    found = made.loss_weights(5, 100, 10)
    assert (found.gate, found.labels, found.mmd, found.latent) == (0.1, 0.2, 0.3, 0.4)

    def labels(step, late):
        made = ScAtlasVAE(config(pred_weight=0.7, pred_last_n_epoch=late))
        return made.loss_weights(step, 100, 10).labels

    # Ten epochs of ten steps; the last three begin at step 70.
    assert [labels(s, 3) for s in (0, 69, 70, 99)] == [0, 0, 0.7, 0.7]
    assert [labels(s, 0) for s in (0, 99)] == [0, 0]
    assert [labels(s, n) for s in (0, 99) for n in (None, 10, 50)] == [0.7] * 6


def test_learning_rate():
    made = ScAtlasVAE(config(lr=0.1))
    rates = [made.rate_at(s, 1000) for s in range(1000)]
    assert rates[0] == pytest.approx(0.1 / 20) and rates[9] == pytest.approx(0.05)
    assert rates[19] == rates[20] == pytest.approx(0.1)
    assert rates[510] == pytest.approx(0.1 * (0.01 + 0.99 / 2))
    assert rates[999] == pytest.approx(0.001, rel=0.01)
    assert (np.diff(rates[:20]) > 0).all() and (np.diff(rates[20:]) < 0).all()
    assert made.rate_at(0, 1) == pytest.approx(0.1)
    flat = ScAtlasVAE(config(lr=0.1, lr_schedule="constant"))
    assert {flat.rate_at(s, 1000) for s in (0, 5, 500, 999)} == {0.1}


def test_the_schedule_is_what_the_optimiser_gets(cells):
    seen, weights = [], []

    def look(event):
        seen.append(event.model.optimisers_["all"].param_groups[0]["lr"])

    made = fit(cells, fitting={"callbacks": [look]}, max_epoch=8)
    n = len(seen)
    assert seen == [made.rate_at(s, n) for s in range(n)]
    log = made.history_.pivot_table(index="step", columns="term", values="value")
    for step in (0, n // 4, n - 1):
        weights = made.loss_weights(step, n, n // 8)
        row = log.loc[step]
        assert row["loss"] == pytest.approx(row["rec"] + weights.kl * row["kl"])


# 19: at least one epoch.
def test_epochs():
    free = ScAtlasVAEConfig(n_per_batch=128)
    sizes = (0, 1, 2, 7681, 10**6, 16_000_001, 10**9)
    assert all(1 <= free.epochs(n) <= 400 for n in sizes)
    # 1, 10, 20, 60, 100 and 6,000 minibatches an epoch: 2,000 to 6,000 steps.
    found = [free.epochs(128 * n) for n in (1, 10, 20, 60, 100, 6000)]
    assert found == [400, 200, 100, 100, 60, 1]
    assert free.epochs(10**9) == 1
    assert ScAtlasVAEConfig(max_epoch=7).epochs(10**9) == 7
    for n in (1, 2000, 104_805, 1_151_678, 16_000_001, 10**9):
        assert ScAtlasVAEConfig.published(n).max_epoch >= 1


def test_published_settings():
    found = [
        ScAtlasVAEConfig.published(n).max_epoch
        for n in (2000, 20_000, 104_805, 1_151_678, 16_000_001)
    ]
    assert found == [400, 400, 76, 7, 1]
    c = ScAtlasVAEConfig.published(20_000, dropout_rate=0.2)
    assert (c.lr, c.lr_schedule, c.gate_weight) == (5e-5, "constant", 1.0)
    assert (c.pred_last_n_epoch, c.valid_share, c.patience) == (10, 0.2, 400)
    assert c.dropout_rate == 0.2
    assert (c.hidden_stacks, c.n_latent, c.batch_hidden_dim) == ((128,), 10, 8)
    assert (c.dispersion, c.weight_decay, c.n_per_batch) == ("gene-cell", 1e-6, 128)
    # 125 steps an epoch of 16,000 cells; the weight nearly reaches 1 at the end.
    assert c.kl_warmup == 50_000
    last = ScAtlasVAE(c).loss_weights(49_999, 50_000, 125)
    assert last.kl == pytest.approx(1, abs=1e-4) and last.labels == 1
    tiny = ScAtlasVAEConfig.published(20_000, "tiny", max_epoch=3)
    assert tiny.hidden_stacks == (32,) and tiny.max_epoch == 3 and tiny.lr == 5e-5


# ------------------------------------------------------------------ every option


OPTIONS = list(
    itertools.product(
        ("zinb", "nb", "poisson", "gaussian"),
        ("gene", "gene-batch", "gene-cell"),
        ("gene", "cell"),
        ("embedding", "onehot"),
    )
)
SMALL = {"hidden_stacks": (8,), "n_latent": 3}


def check_works(made, cells, folder):
    """A model embeds, denoises, labels, and says the same after a reload."""
    Z, X = codes(made, cells), made.denoise(cells).X
    assert Z.shape == (cells.n_obs, made.config.n_latent) and Z.dtype == np.float32
    assert X.shape == cells.shape and np.isfinite(Z).all() and np.isfinite(X).all()
    if made.config.reconstruction_method != "gaussian":
        np.testing.assert_allclose(np.expm1(X).sum(1), 1e4, rtol=1e-3)
    made.save(folder / "run")
    again = ScAtlasVAE.load(folder / "run", device="cpu")
    assert differing(state(again), state(made)) == []
    assert again.sizes_ == made.sizes_ and again.facts_ == made.facts_
    np.testing.assert_array_equal(codes(again, cells), Z)
    np.testing.assert_array_equal(again.denoise(cells).X, X)
    if made.sizes_["label"]:
        pd.testing.assert_frame_equal(
            again.predict_labels(cells), made.predict_labels(cells)
        )


@pytest.mark.parametrize(("method", "dispersion", "gate", "how"), OPTIONS)
def test_every_likelihood_works(method, dispersion, gate, how, few, tmp_path):
    made = fit(
        few,
        reconstruction_method=method,
        dispersion=dispersion,
        rna_dropout=gate,
        batch_embedding=how,
        gate_weight=0.5,
        **SMALL,
    )
    assert ("gate" in set(made.history_["term"])) == (method == "zinb")
    check_works(made, few, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"encode_batch": True},
        {"encode_libsize": True},
        {"total_variational": True, "log_variational": False},
        {"use_batch_norm": False, "use_layer_norm": True, "bias": False},
        {"use_batch_norm": True, "use_layer_norm": True},
        {"use_batch_norm": False, "dropout_rate": 0.0},
        {"hidden_stacks": (8, 6)},
        {"inject_batch": False, "dispersion": "gene-batch"},
        {"batch_hidden_dim": 2, "class_weights": False},
        {"lr_schedule": "constant", "kl_warmup": 0, "valid_share": 0.0},
        {"mmd_key": "batch", "mmd_weight": 0.5},
        {"pred_last_n_epoch": 1, "pred_last_n_epoch_fconly": True},
    ],
    ids=str,
)
def test_every_option_works(changes, few, tmp_path):
    made = fit(few, KEYS, **{**SMALL, "max_epoch": 2, **changes})
    check_works(made, few, tmp_path)
    # What was asked for is what was built.
    encoder, decoder = made.modules_["encoder"], made.modules_["decoder"]
    kinds = {type(m).__name__ for m in encoder.modules()}
    assert ("BatchNorm1d" in kinds) == made.config.use_batch_norm
    assert ("LayerNorm" in kinds) == made.config.use_layer_norm
    assert encoder.layers[0][0].in_features == 30 + made.config.encode_libsize
    assert (encoder.layers[0][0].bias is not None) == made.config.bias
    assert (encoder.log, encoder.target_sum) == (
        made.config.log_variational,
        1e4 if made.config.total_variational else None,
    )
    assert len(encoder.batch) == made.config.encode_batch
    assert len(decoder.batch) == made.config.inject_batch
    for table in decoder.batch:
        assert table.weight.shape == (2, made.config.batch_hidden_dim)
    assert decoder.hidden[0].out_features == made.config.hidden_stacks[-1]
    if not made.config.class_weights:
        assert set(made.arrays_["class_weights_0"].tolist()) == {1.0}
    if made.config.mmd_key:
        assert "mmd" in set(made.history_["term"])


def test_gaussian_models_take_logs_and_need_no_counts(few, tmp_path):
    bare = few.copy()
    del bare.layers["counts"]
    made = fit(bare, reconstruction_method="gaussian", **SMALL)
    check_works(made, bare, tmp_path)
    with pytest.raises(DataError, match="counts"):
        fit(bare, **SMALL)
    # The logs enter as they are.
    x = torch.from_numpy(bare.X.toarray())
    assert torch.equal(made.modules_["encoder"].inputs(x), x)


def test_a_pull_on_the_codes_brings_batches_together(cells):
    def gap(weight):
        made = fit(cells, mmd_key="batch", mmd_weight=weight, max_epoch=10, lr=1e-2)
        Z = torch.from_numpy(codes(made, cells))
        own = (cells.obs["batch"] == "batch1").to_numpy()
        return rbf_mmd(Z[own], Z[~own]).item()

    assert gap(200.0) < 0.7 * gap(0.0)


def test_heads_may_learn_in_the_last_epochs_only(cells):
    seen = []

    def look(event):
        heads = event.model.modules_["heads"].state_dict()
        seen.append({k: v.clone() for k, v in heads.items()})

    settings = {"max_epoch": 4, "pred_last_n_epoch": 2, "weight_decay": 0.0}
    fit(cells, KEYS, fitting={"callbacks": [look]}, **settings)
    half = len(seen) // 2
    assert all(differing(seen[0], s) == [] for s in seen[:half])
    assert len(differing(seen[0], seen[half])) == 4


def test_heads_may_leave_the_encoder_alone(cells):
    def encoder(apart, weight):
        settings = {"pred_last_n_epoch_fconly": apart, "pred_weight": weight}
        made = fit(cells, KEYS, **settings)
        return {k: v for k, v in state(made).items() if k.startswith("module/enc")}

    assert differing(encoder(True, 1.0), encoder(True, 0.0)) == []
    assert differing(encoder(False, 1.0), encoder(False, 0.0)) != []


# ------------------------------------------------------------- labels in training


# 8: whatever the marker of a missing label, and wherever it sorts.
def test_the_marker_of_a_missing_label_does_not_matter(cells):
    hidden = np.arange(cells.n_obs) % 3 == 0

    def run(marker, unlabel_key="undefined"):
        text = cells.obs["cell_type"].astype(object).to_numpy(copy=True)
        text[hidden] = marker
        made = fit(with_obs(cells, kind=text), "kind", unlabel_key=unlabel_key)
        assert made.sizes_["label"]["kind"] == ["A1", "A2", "B1", "B2"]
        return state(made)

    expected = run(None)
    assert differing(run("undefined"), expected) == []
    assert differing(run("AAA", "AAA"), expected) == []
    assert differing(run("zzz", "zzz"), expected) == []
    assert differing(run(np.nan, "AAA"), expected) == []
    text = cells.obs["cell_type"].astype(str).where(~hidden, "undefined")
    category = pd.Categorical(text, ["undefined", "B2", "B1", "A2", "A1"])
    made = fit(with_obs(cells, kind=category), "kind")
    assert differing(state(made), expected) == []


# 9: a type weighs the same however many cells it has.
def test_weights_of_types_are_those_of_training_cells(cells):
    made = fit(cells, "cell_type")
    valid = hash_split(cells.obs_names, 0.1)
    sizes = cells.obs["cell_type"][~valid].value_counts().sort_index()
    expected = sizes.sum() / (4 * sizes)
    assert made.arrays_["class_weights_0"].tolist() == pytest.approx(list(expected))
    plain = fit(cells, "cell_type", class_weights=False)
    assert plain.arrays_["class_weights_0"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["batch_key", "label_key"])
def test_a_type_or_batch_of_held_out_cells_alone_is_trained_on(kind, cells):
    valid = hash_split(cells.obs_names, 0.1)
    text = cells.obs["cell_type"].astype(object).to_numpy(copy=True)
    own = np.flatnonzero(valid)[:3]
    text[own] = "rare"
    made = ScAtlasVAE(config(), device="cpu")
    marked = with_obs(cells, kind=text)
    made._ask(marked.obs, *(("kind", None) if kind == "batch_key" else (None, "kind")))
    expected = valid.copy()
    expected[own] = False
    assert (made._held_out(marked.obs) == expected).all()
    found = fit(marked, **{"label_key": None, kind: "kind"})
    assert "rare" in found.sizes_[kind.removesuffix("_key")]["kind"]
    if kind == "label_key":
        sizes = pd.Series(text)[~expected].value_counts().sort_index()
        weights = found.arrays_["class_weights_0"].tolist()
        assert weights == pytest.approx(list(sizes.sum() / (5 * sizes)))


def test_all_cells_without_label_are_refused(cells):
    for marker in (None, "undefined"):
        with pytest.raises(DataError, match="no labelled cell at all.*'undefined'"):
            fit(with_obs(cells, kind=marker), "kind")
    with pytest.raises(DataError, match="too few cell types.*only"):
        fit(with_obs(cells, kind=["only", None, "undefined"] * 75), "kind")


def test_vocabularies_may_share_names_and_be_numbers(cells):
    fine = cells.obs["cell_type"].astype(str)
    swap = fine.map({"A1": "B1", "B1": "A1", "A2": "A2", "B2": "other"})
    number = fine.map({"A1": 10, "A2": 2, "B1": 10, "B2": 3})
    made = fit(with_obs(cells, other=swap, number=number), ["cell_type", "other"])
    assert made.sizes_["label"] == {
        "cell_type": ["A1", "A2", "B1", "B2"],
        "other": ["A1", "A2", "B1", "other"],
    }
    found = fit(with_obs(cells, number=number), "number")
    assert found.labels_ == ["10", "2", "3"] and found.label_key_ == "number"
    assert set(found.predict_labels(cells)["number"]) <= {"10", "2", "3"}


# -------------------------------------------------------------------- minibatches


def source(n, size, n_empty=0, valid=None, seed=0):
    """Cells whose first count is their number."""
    made = ScAtlasVAE(config(n_per_batch=size), seed=seed, device="cpu")
    made._reset(torch.device("cpu"))
    X = np.ones((n + n_empty, 3), np.float32)
    X[:, 0] = np.arange(1, n + n_empty + 1)
    X[n:] = 0
    valid = np.zeros(n + n_empty, bool) if valid is None else valid
    none = np.zeros((n + n_empty, 0), np.int64)
    return InMemory(made, sparse.csr_matrix(X), none, none, valid)


# 16: every cell once in an epoch.
@pytest.mark.parametrize(("n", "size"), [(50, 16), (33, 32), (3, 2), (64, 32), (2, 2)])
def test_every_cell_once_an_epoch(n, size):
    made = source(n, size, n_empty=2)
    epochs = []
    for epoch in range(2):
        parts = []
        for i in range(made.n_batches):
            batch, noise = made.step(epoch * made.n_batches + i)
            assert len(noise.latent) == len(batch.weight) == len(batch.labels)
            parts.append(batch.counts.dense[:, 0].tolist())
        sizes = [len(p) for p in parts]
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2
        assert max(sizes) <= max(size, 3)
        epochs.append([cell for part in parts for cell in part])
        assert sorted(epochs[-1]) == list(range(1, n + 1))
    if n > 3:
        assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_held_out_cells_are_not_trained_on():
    valid = np.arange(40) % 4 == 0
    made = source(40, 16, valid=valid)
    seen = torch.cat([made.step(i)[0].counts.dense[:, 0] for i in range(4)])
    kept = torch.cat([b.counts.dense[:, 0] for b in made.held_out()])
    assert kept.tolist() == (np.flatnonzero(valid) + 1).tolist()
    assert not set(seen.tolist()) & set(kept.tolist())


def test_held_out_cells_take_no_part(cells):
    """Neither in the choice of genes nor in any update."""
    valid = hash_split(cells.obs_names, 0.1)
    assert 15 <= valid.sum() <= 40
    changed = cells.copy()
    counts = cells.layers["counts"].toarray()
    noise = np.random.default_rng(0).permuted(counts[valid], axis=1)
    counts[valid] = noise
    changed.layers["counts"] = sparse.csr_matrix(counts)
    changed.X = normalise(changed.layers["counts"], 1e4)
    settings = {"n_genes": 25, "max_epoch": 3}
    one, two, third = {}, {}, {}
    a = fit(cells, KEYS, fitting={"callbacks": [last_step(one)]}, **settings)
    b = fit(changed, KEYS, fitting={"callbacks": [last_step(two)]}, **settings)
    assert a.genes_ == b.genes_ and len(a.genes_) == 25
    assert [k for k in differing(one, two) if not k.startswith("array/best")] == []
    scores = [m.history_.query("term == 'valid_loss'")["value"] for m in (a, b)]
    assert len(scores[0]) == 3 and (scores[0] != scores[1]).all()
    # Without held-out cells they do take part.
    fit(
        cells,
        KEYS,
        fitting={"callbacks": [last_step(third)]},
        **{**settings, "valid_share": 0.0},
    )
    weight = "module/encoder/mean.weight"
    assert not torch.equal(one[weight], third[weight])


def test_the_genes_are_those_that_vary_most(cells):
    made = fit(cells, n_genes=25)
    order = [name for name in cells.var_names if name in set(made.genes_)]
    assert made.genes_ == order
    assert fit(cells, n_genes=80).genes_ == list(cells.var_names)
    assert fit(cells, n_genes=None).genes_ == list(cells.var_names)
    # Cells on all genes go in.
    assert made.embed(cells).uns["scgenlib"]["genes_extra"] == 55


def test_the_best_weights_are_kept_and_training_ends_early(cells):
    best = {}

    def look(event):
        if event.model.facts_.get("best_step") == event.step:
            best.update(state(event.model))

    settings = {"lr": 3e-2, "lr_schedule": "constant", "kl_warmup": 0, "patience": 3}
    made = fit(
        cells,
        KEYS,
        fitting={"callbacks": [look]},
        **{**settings, "max_epoch": 60, "dropout_rate": 0.0},
    )
    curve = made.history_.query("term == 'valid_loss'").set_index("step")["value"]
    assert curve.idxmin() == made.facts_["best_step"]
    assert curve.min() == made.facts_["best_loss"]
    assert 4 <= len(curve) < 60 and curve.index[-4] == curve.idxmin()
    kept = {k: v for k, v in state(made).items() if k.startswith("module/")}
    assert differing(kept, {k: best[k] for k in kept}) == []
    # Nothing of the search is left in the model.
    assert set(made.arrays_) == {"class_weights_0", "class_weights_1"}
    assert not {"_cells", "_vae", "_net", "_latent", "_asked"} & set(vars(made))


def test_heads_of_a_late_start_are_not_those_of_before(cells):
    """The best weights are sought among those whose heads have learnt."""

    class Rough(ScAtlasVAE):
        def rate_at(self, step, n_steps):
            return 0.01 if step < 0.7 * n_steps else 0.3

    made = Rough(config(max_epoch=10, pred_last_n_epoch=3, patience=2), device="cpu")
    made.fit(cells, label_key=KEYS)
    curve = made.history_.query("term == 'valid_loss'").set_index("step")["value"]
    # Held-out cells were best off before; no early stop kept the heads from learning.
    assert len(curve) == 10 and curve.idxmin() < 49
    assert made.facts_["best_step"] == curve.iloc[-3:].idxmin() >= 49
    # Without labels there is nothing to wait for.
    free = Rough(made.config, device="cpu").fit(cells)
    curve = free.history_.query("term == 'valid_loss'").set_index("step")["value"]
    assert len(curve) < 10 and free.facts_["best_step"] == curve.idxmin()


def test_a_look_at_a_model_during_a_fit_changes_nothing(few):
    seen = []

    def show(event):
        event.model.denoise(few)
        seen.append(codes(event.model, few))

    look = [show]
    watched = fit(few, KEYS, fitting={"callbacks": look})
    assert differing(state(watched), state(fit(few, KEYS))) == []
    assert np.isfinite(seen[-1]).all() and not np.array_equal(seen[0], seen[-1])


# 16: one seed, one result; and a run that was killed.
class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("every", "at"), [(3, 9), (7, 13), (7, 7), (1, 6), (50, 20), (7, 27)]
)
def test_a_killed_fit_goes_on_to_the_same_numbers(every, at, cells, tmp_path):
    """Inside an epoch of seven steps, at its end, and after the last."""
    settings = {"max_epoch": 4, "n_genes": 40}
    folder = {"checkpoint_dir": tmp_path, "checkpoint_every": every, "resume": True}

    def kill(event):
        if event.step == at:
            raise Killed

    with pytest.raises(Killed):
        fit(cells, KEYS, fitting={"callbacks": [kill], **folder}, **settings)
    whole = fit(cells, KEYS, **settings)
    assert whole.history_["step"].max() == 27
    for _ in range(2):  # the second finds the checkpoint of a run that has ended
        again = fit(cells, KEYS, fitting=folder, **settings)
        assert differing(state(again), state(whole)) == []
        pd.testing.assert_frame_equal(again.history_, whole.history_)
        assert again.facts_ == whole.facts_


def test_the_seed_decides(few):
    one, two, other = (fit(few, KEYS, seed=s) for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one.history_, two.history_)
    assert differing(state(one), state(two)) == []
    assert not one.history_["value"].equals(other.history_["value"])


# ------------------------------------------------------------------------- codes


# 4: whatever is said of the batch.
def test_codes_do_not_know_the_batch(model, cells):
    expected = codes(model, cells)
    bare = cells.copy()
    del bare.obs["batch"]
    rng = np.random.default_rng(0)
    relabelled = rng.permutation(cells.obs["batch"].to_numpy())
    for other in (
        with_obs(cells, batch=relabelled),
        with_obs(cells, batch="never seen"),
        with_obs(cells, batch=None),
        bare,
    ):
        np.testing.assert_array_equal(codes(model, other), expected)
    # What the decoder makes of them does.
    moved = model.denoise(with_obs(cells, batch=relabelled)).X
    assert np.abs(moved - model.denoise(cells).X).max() > 0.05


def test_an_encoder_with_batches_knows_them(few):
    made = fit(few, encode_batch=True)
    other = with_obs(few, batch=few.obs["batch"].to_numpy()[::-1])
    gap = np.abs(codes(made, other) - codes(made, few)).max(1)
    same = (other.obs["batch"] == few.obs["batch"].astype(str)).to_numpy()
    assert (gap[same] == 0).all() and (gap[~same] > 1e-4).all()


# 14: nothing is drawn, and no cell depends on others.
def test_codes_are_those_of_each_cell_alone(model, cells):
    expected = codes(model, cells)
    np.testing.assert_array_equal(codes(model, cells), expected)
    np.testing.assert_array_equal(codes(model, cells[:7]), expected[:7])
    np.testing.assert_array_equal(codes(model, cells[:1]), expected[:1])
    order = np.random.default_rng(0).permutation(cells.n_obs)
    found = codes(model, cells[order])
    np.testing.assert_allclose(found, expected[order], rtol=1e-5, atol=1e-5)
    labels = model.predict_labels(cells)
    pd.testing.assert_frame_equal(model.predict_labels(cells), labels)
    shuffled = model.predict_labels(cells[order])
    assert list(shuffled.index) == list(cells.obs_names[order])
    assert (shuffled["cell_type"] == labels["cell_type"].iloc[order]).all()
    # Also over several blocks.
    many = AnnData(
        sparse.vstack([cells.X] * 10, "csr"), layers={
            "counts": sparse.vstack([cells.layers["counts"]] * 10, "csr")
        }, var=cells.var[[]],
    )  # fmt: skip
    found = codes(model, many).reshape(10, cells.n_obs, -1)
    np.testing.assert_allclose(found, np.stack([expected] * 10), atol=1e-5)


def test_codes_are_means(model, cells):
    """In evaluation mode, of the counts on the genes of the model."""
    x = torch.from_numpy(cells.layers["counts"].toarray())
    encoder = copy.deepcopy(model.modules_["encoder"]).eval()
    with torch.no_grad():
        expected, _ = encoder(x)
    out = model.embed(cells)
    np.testing.assert_allclose(out.X, expected.numpy(), rtol=1e-4, atol=1e-5)
    pd.testing.assert_frame_equal(out.obs, cells.obs)
    assert list(out.var_names) == [f"z{i}" for i in range(10)]


# 13: genes by name.
def test_query_genes_are_aligned(model, query):
    rng = np.random.default_rng(0)
    names = list(query.var_names)
    expected = codes(model, query)
    permuted = query[:, rng.permutation(names)].copy()
    np.testing.assert_array_equal(codes(model, permuted), expected)
    extra = AnnData(
        layers={
            "counts": sparse.hstack(
                [query.layers["counts"], query.layers["counts"][:, :9]], "csr"
            )
        },
        obs=query.obs,
        var=pd.DataFrame(index=[*names, *(f"new{i}" for i in range(9))]),
    )
    out = model.embed(extra)
    np.testing.assert_array_equal(out.X, expected)
    about = out.uns["scgenlib"]
    assert (about["genes_missing"], about["genes_extra"]) == (0, 9)
    kept = sorted(rng.choice(80, 50, replace=False))
    filled = query.copy()
    counts = query.layers["counts"].toarray()
    counts[:, [i for i in range(80) if i not in kept]] = 0
    filled.layers["counts"] = sparse.csr_matrix(counts)
    fewer = query[:, [names[i] for i in reversed(kept)]].copy()
    out = model.embed(fewer)
    np.testing.assert_array_equal(out.X, codes(model, filled))
    assert out.uns["scgenlib"]["genes_missing"] == 30
    assert model.denoise(fewer).uns["scgenlib"]["genes_missing"] == 30
    assert list(model.denoise(fewer).var_names) == names
    other = query.copy()
    other.var_names = [f"ENSG{i}" for i in range(80)]
    with pytest.raises(DataError, match="ENSG0.*gene"):
        model.embed(other)


# 12: batches of a query.
def test_queries_of_any_batch_go_in(model, query):
    kinds = ["batch2", "new", None, "batch3", np.nan]
    mixed = with_obs(query, batch=pd.Categorical([*kinds] * 15))
    X = model.denoise(mixed).X
    assert np.isfinite(X).all() and len(model.predict_labels(mixed)) == 75
    known = {name: model.denoise(query, batch=name).X for name in ("batch2", "batch3")}
    np.testing.assert_allclose(X[::5], known["batch2"][::5], atol=1e-5)
    np.testing.assert_allclose(X[3::5], known["batch3"][3::5], atol=1e-5)
    # Those that are not known are decoded with the mean of all.
    made = copy.deepcopy(model)
    table = made.modules_["decoder"].batch[0].weight
    table.data[0] = table.data.mean(0)
    mean = made.denoise(query, batch="batch1").X
    for i in (1, 2, 4):
        np.testing.assert_allclose(X[i::5], mean[i::5], atol=1e-4)


# 17 and the other bad input.
def test_cells_without_counts_do_no_harm(cells):
    empty = cells.copy()
    counts = cells.layers["counts"].toarray()
    counts[:4] = 0
    empty.layers["counts"] = sparse.csr_matrix(counts)
    made = fit(empty, KEYS)
    assert np.isfinite(made.history_["value"]).all()
    assert np.isfinite(codes(made, empty)).all()
    assert np.isfinite(made.denoise(empty).X).all()
    assert np.isfinite(made.predict_labels(empty)["lineage_probability"]).all()
    changed = empty.copy()
    changed.obs["cell_type"] = cells.obs["cell_type"]
    changed.obs.iloc[:4, 0] = "B2"
    # They teach nothing: whatever their labels, but for the weights of the types.
    one, two = (state(fit(c, KEYS, class_weights=False)) for c in (empty, changed))
    assert differing(one, two) == []


@pytest.mark.parametrize("value", [-1.0, 0.5, np.nan, np.inf])
@pytest.mark.parametrize("dense", [False, True])
def test_what_is_no_count_is_refused(value, dense, model, few, query):
    for cells, call in ((few, fit), (query, model.embed), (query, model.denoise)):
        wrong = cells.copy()
        counts = cells.layers["counts"].toarray()
        counts[3, np.flatnonzero(counts[3])[0]] = value
        wrong.layers["counts"] = counts if dense else sparse.csr_matrix(counts)
        with pytest.raises(DataError, match="counts|NaN"):
            call(wrong)


def test_dense_counts_are_as_good(few):
    dense = few.copy()
    dense.layers["counts"] = few.layers["counts"].toarray().astype(int)
    one, two = fit(few, KEYS), fit(dense, KEYS)
    assert differing(state(one), state(two)) == []
    np.testing.assert_array_equal(codes(one, dense), codes(one, few))


# 18: any number of batches.
def test_no_batch_and_one_batch_work(few, tmp_path):
    bare = few.copy()
    del bare.obs["batch"]
    for n, (cells, key) in enumerate(
        [(bare, "auto"), (few, None), (with_obs(few, batch="one"), "batch")]
    ):
        made = fit(cells, KEYS, batch_key=key, dispersion="gene-batch")
        assert made.sizes_["batch"] == ({"batch": ["one"]} if n == 2 else {})
        check_works(made, cells, tmp_path / str(n))
    with pytest.raises(ConfigError, match="no batches"):
        fit(bare).denoise(bare, batch="batch1")


def test_a_batch_of_one_cell_works(few, tmp_path):
    names = few.obs["batch"].astype(str).to_numpy().copy()
    names[5] = "alone"
    cells = with_obs(few, batch=names)
    settings = {"dispersion": "gene-batch", "mmd_key": "batch"}
    made = fit(cells, KEYS, max_epoch=2, **settings)
    assert made.sizes_["batch"]["batch"] == ["alone", "batch1", "batch2"]
    check_works(made, cells, tmp_path)


def test_two_cells_work(few):
    made = fit(few[:2].copy(), batch_key=None)
    assert np.isfinite(codes(made, few)).all()


def test_columns_that_are_not_there_are_named(few):
    with pytest.raises(DataError, match="No cell has a batch in 'batch'"):
        fit(with_obs(few, batch=None), batch_key="batch")
    assert fit(with_obs(few, batch=None)).sizes_["batch"] == {}
    with pytest.raises(DataError, match="batch column.*'bach'.*'batch'"):
        fit(few, batch_key="bach")
    with pytest.raises(DataError, match="label column.*'lineag'.*'lineage'"):
        fit(few, ["cell_type", "lineag"])
    with pytest.raises(ConfigError, match="mmd_key.*'donor'"):
        fit(few, mmd_key="donor")
    with pytest.raises(ConfigError, match="mmd_key"):
        fit(few, batch_key=None, mmd_key="batch")


@pytest.mark.parametrize(
    "changes",
    [
        {"dispersion": "gene_cell"},
        {"reconstruction_method": "mse"},
        {"rna_dropout": "none"},
        {"batch_embedding": "one-hot"},
        {"constrain_latent_method": "l2"},
        {"lr_schedule": "step"},
        {"n_per_batch": 1},
        {"valid_share": 0.6},
        {"lr": 0.0},
        {"hidden_stacks": (8, 0)},
        {"hidden_stacks": ()},
        {"max_epoch": 0},
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        config(**changes)


def test_a_fit_that_diverges_says_so(few):
    with pytest.raises(DataError, match="diverged.*learning rate"):
        fit(few, lr=1e6, valid_share=0.0)


# ------------------------------------------------------------------------ labels


def test_probabilities_are_those_of_the_head(model, cells):
    embedded = torch.from_numpy(codes(model, cells))
    for i, key in enumerate(KEYS):
        table = model.label_probabilities(cells, key)
        assert list(table.columns) == sorted(cells.obs[key].unique())
        np.testing.assert_allclose(table.sum(1), 1, atol=1e-9)
        with torch.no_grad():
            logits = model.modules_["heads"][i](embedded).double()
        expected = torch.softmax(logits / model.facts_["temperature"][i], 1)
        np.testing.assert_allclose(table, expected.numpy(), atol=1e-6)
        # The temperature changes no answer.
        best = table.columns[logits.argmax(1).numpy()]
        assert (model.predict_labels(cells)[key].to_numpy() == best).all()
    first = model.label_probabilities(cells)
    pd.testing.assert_frame_equal(first, model.label_probabilities(cells, "cell_type"))
    with pytest.raises(ConfigError, match="'lineag'.*'lineage'"):
        model.label_probabilities(cells, "lineag")


def test_the_temperature_is_that_of_held_out_cells(cells):
    made = fit(cells, KEYS, max_epoch=8, lr=1e-2, valid_share=0.4)
    valid = hash_split(cells.obs_names, 0.4)
    Z = torch.from_numpy(codes(made, cells[valid]))
    for i, key in enumerate(KEYS):
        with torch.no_grad():
            logits = made.modules_["heads"][i](Z).double()
        names = made.sizes_["label"][key]
        true = torch.tensor([names.index(t) for t in cells.obs[key][valid]])
        t = made.facts_["temperature"][i]
        smooth = 1 / (len(true) + 2)
        loss = {
            f: F.cross_entropy(logits / (f * t), true, label_smoothing=smooth)
            for f in (0.9, 1, 1.1)
        }
        assert t != 1 and loss[1] < loss[1.1]
        assert loss[1] < loss[0.9] or t == pytest.approx(0.5, rel=1e-3)
        assert F.cross_entropy(logits / t, true) < F.cross_entropy(logits, true)
    # Nothing to calibrate on: as it is.
    assert fit(cells, KEYS, valid_share=0.0).facts_["temperature"] == [1.0, 1.0]


def test_labels_are_predicted_and_doubt_is_said(model, query):
    found = model.predict_labels(query)
    assert list(found.columns) == [
        "cell_type",
        "cell_type_probability",
        "lineage",
        "lineage_probability",
    ]
    for key in KEYS:
        right = found[key].to_numpy() == query.obs[key].astype(str).to_numpy()
        assert right.mean() > 0.9
    one = model.predict_labels(query, label_key="lineage", min_probability=0.99)
    assert list(one.columns) == ["lineage", "lineage_probability"]
    doubtful = one["lineage_probability"] < 0.99
    assert ((one["lineage"] == "unknown") == doubtful).all()
    # A query with labels of its own, known or not, is named all the same.
    other = with_obs(query, cell_type="strange", lineage=None)
    pd.testing.assert_frame_equal(model.predict_labels(other), found)
    with pytest.raises(ConfigError, match="min_probability"):
        model.predict_labels(query, min_probability=2)
    with pytest.raises(ConfigError, match="'lineag'.*'lineage'"):
        model.predict_labels(query, label_key="lineag")


def test_a_model_without_labels_has_no_head(few):
    made = fit(few)
    for call in (made.predict_labels, made.label_probabilities, made.map_query):
        with pytest.raises(ConfigError, match="no head"):
            call(few)
    assert made.labels_ == [] and made.label_key_ is None


def test_two_vocabularies_are_aligned(model, query):
    table = model.align_labels(query)
    assert (table.index.name, table.columns.name) == ("cell_type", "lineage")
    assert list(table.index) == ["A1", "A2", "B1", "B2"]
    assert list(table.columns) == ["A", "B"]
    assert table.to_numpy().sum() == query.n_obs
    named = model.predict_labels(query)
    for kind, group in itertools.product(table.index, table.columns):
        both = (named["cell_type"] == kind) & (named["lineage"] == group)
        assert table.loc[kind, group] == both.sum()
    pairs = matching_pairs(table)
    assert set(zip(pairs["cell_type"], pairs["lineage"], strict=True)) == {
        ("A1", "A"),
        ("A2", "A"),
        ("B1", "B"),
        ("B2", "B"),
    }
    pd.testing.assert_frame_equal(
        model.align_labels(query, "lineage", "cell_type"), table.T
    )
    pd.testing.assert_frame_equal(model.align_labels(query, "lineage"), table.T)
    # Types that nobody was called are there, with 0.
    one = model.align_labels(query[query.obs["cell_type"] == "A1"].copy())
    assert one.shape == (4, 2)
    with pytest.raises(ConfigError, match="'lineag'.*'lineage'"):
        model.align_labels(query, "lineag")


def test_one_vocabulary_cannot_be_aligned(few):
    with pytest.raises(ConfigError, match="Two vocabularies.*1 in this model"):
        fit(few, "lineage").align_labels(few)


def test_a_fit_on_two_half_labelled_atlases(cells):
    """Each vocabulary stands in half of the cells alone."""
    first = (cells.obs["batch"] == "batch1").to_numpy()
    fine = cells.obs["cell_type"].astype(object).where(first, None)
    coarse = cells.obs["lineage"].astype(object).where(~first, "undefined")
    made = fit(
        with_obs(cells, fine=fine, coarse=coarse),
        ["fine", "coarse"],
        max_epoch=30,
        lr=1e-2,
    )
    found = made.predict_labels(cells)
    right = found["coarse"].to_numpy() == cells.obs["lineage"].astype(str).to_numpy()
    assert right[first].mean() > 0.9
    right = found["fine"].to_numpy() == cells.obs["cell_type"].astype(str).to_numpy()
    assert right[~first].mean() > 0.7


# -------------------------------------------------------------------- expression


# 5: shares sum to 1.
def test_denoised_cells_have_their_total(model, cells):
    for total in (1.0, 1e4):
        out = model.denoise(cells, target_sum=total)
        np.testing.assert_allclose(np.expm1(out.X).sum(1), total, rtol=1e-3)
    out = model.denoise(cells)
    assert list(out.var_names) == model.genes_ and out.X.dtype == np.float32
    pd.testing.assert_frame_equal(out.obs, cells.obs)
    with torch.no_grad():
        share, _, _ = model.modules_["decoder"](
            torch.from_numpy(codes(model, cells)),
            torch.from_numpy(cells.obs["batch"].cat.codes.to_numpy(np.int64))[:, None],
        )
    expected = torch.log1p(1e4 * share.exp()).numpy()
    np.testing.assert_allclose(out.X, expected, rtol=1e-4, atol=1e-4)
    # It is nearer to the truth than what was counted.
    truth = np.asarray(cells.layers["true_expression"])
    truth = np.log1p(1e4 * truth / truth.sum(1, keepdims=True))
    gap, raw = (np.square(x - truth).mean() for x in (out.X, cells.X.toarray()))
    assert gap < 0.5 * raw


def test_the_rate_of_extra_zeros_is_a_mean_over_cells(few):
    made = fit(few, KEYS, gate_weight=1.0, max_epoch=3, **SMALL)
    Z = torch.from_numpy(codes(made, few))
    batches = torch.from_numpy(few.obs["batch"].cat.codes.to_numpy(np.int64))[:, None]
    with torch.no_grad():
        gate = made.modules_["decoder"](Z, batches)[2]
    found = made.dropout_rate(few)
    assert found.shape == (30,)
    np.testing.assert_allclose(found, torch.sigmoid(gate).mean(0).numpy(), rtol=1e-4)
    assert (fit(few, reconstruction_method="nb").dropout_rate(few) == 0).all()


def test_cells_can_be_decoded_as_of_one_batch(model, cells):
    as_one = model.denoise(cells, batch="batch2").X
    own = model.denoise(cells).X
    of_it = (cells.obs["batch"] == "batch2").to_numpy()
    np.testing.assert_allclose(as_one[of_it], own[of_it], atol=1e-5)
    assert np.abs(as_one[~of_it] - own[~of_it]).max() > 0.05
    np.testing.assert_array_equal(
        as_one, model.denoise(cells, batch={"batch": "batch2"}).X
    )
    assert model.denoise(cells, batch="batch2").uns["scgenlib"]["batch"] == "batch2"
    for batch, words in (("batch9", "batch9"), ({"donor": "x"}, "donor.*batch")):
        with pytest.raises(ConfigError, match=words):
            model.denoise(cells, batch=batch)


def test_batches_of_several_levels(few, tmp_path):
    study = np.where(np.arange(few.n_obs) % 3 == 0, "x", "y")
    cells = with_obs(few, study=study)
    made = fit(cells, batch_key=["study", "batch"], max_epoch=2, mmd_key="batch")
    assert made.sizes_["batch"] == {"study": ["x", "y"], "batch": ["batch1", "batch2"]}
    check_works(made, cells, tmp_path)
    np.testing.assert_array_equal(
        made.denoise(cells, batch="x").X, made.denoise(cells, batch={"study": "x"}).X
    )
    X = [
        made.denoise(cells, batch={"study": s, "batch": b}).X
        for s in "xy"
        for b in ("batch1", "batch2")
    ]
    for one, two in itertools.combinations(X, 2):
        assert np.abs(one - two).max() > 1e-4


def test_a_result_that_is_too_large_is_refused(model, cells, monkeypatch):
    monkeypatch.setattr(
        model, "_own", lambda _: (sparse.csr_matrix((4_000_000, 80)), {})
    )
    with pytest.raises(DataError, match="4,000,000 cells x 80 genes"):
        model.denoise(cells)


# ---------------------------------------------------------------- save and recover


# 15: nothing is unpickled.
def test_a_saved_model_says_the_same(model, cells, query, tmp_path, monkeypatch):
    model.save(tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["config.json", "history.csv", "model.safetensors"]
    monkeypatch.setattr(torch, "load", None)
    again = ScAtlasVAE.load(tmp_path / "run", device="cpu")
    assert again.sizes_ == model.sizes_ and again.config == model.config
    np.testing.assert_array_equal(codes(again, query), codes(model, query))
    for key in KEYS:
        pd.testing.assert_frame_equal(
            again.label_probabilities(query, key), model.label_probabilities(query, key)
        )
    pd.testing.assert_frame_equal(again.align_labels(query), model.align_labels(query))
    np.testing.assert_array_equal(again.denoise(query).X, model.denoise(query).X)


# 22: types are found again and batches mix.
def test_types_are_recovered_and_batches_mix():
    lineages = {
        "A": {"A1": 30.0, "A2": 20.0},
        "B": {"B1": 20.0, "B2": 15.0},
        "C": {"C1": 15.0},
    }
    cells = simatlas.atlas(2000, 500, lineages=lineages)
    types, batches = cells.obs["cell_type"], cells.obs["batch"]

    def share(Z):
        return same_batch_share(Z, types, batches)["same_batch_share"]

    assert share(PCA(10, random_state=0).fit_transform(cells.X.toarray())) >= 0.9
    made = ScAtlasVAE(ScAtlasVAEConfig.profile("book"), device="cpu").fit(cells)
    Z = codes(made, cells)
    found = KMeans(5, n_init=10, random_state=0).fit_predict(Z)
    assert adjusted_rand_score(types, found) > 0.95
    assert share(Z) <= 0.55
    curve = made.history_.query("term == 'valid_loss'")["value"]
    assert math.isfinite(curve.iloc[-1]) and curve.iloc[-1] < curve.iloc[0]
