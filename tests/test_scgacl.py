"""scGACL: settings, preparation, training, and what it fills in."""

from __future__ import annotations

import copy
import math
import os
import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scgenlib import completion, datasets, imputers, metrics, published, scgacl
from scgenlib.dropout import dropout_probability
from scgenlib.errors import ConfigError, DataError, OutputError
from scgenlib.losses import masked_mse
from scgenlib.scgacl import CollapseWarning, ScGACL, ScGACLConfig
from scgenlib.simulate import simulate

SIZES = {"b": 40, "a": 36, "c": 25}
# Rates at which toy networks learn something in a few epochs.
FAST = {"pre_lr": 1e-2, "vaelr": 1e-2, "lr": 3e-3}
BRIEF = {**FAST, "pre_epoch": 1, "vaeepoch": 1, "epoch": 1}


@pytest.fixture(scope="module")
def cells() -> AnnData:
    """101 cells: one more than batches of 20 or 25 hold."""
    options = {"depth_mean": 600, "dropout": 0.3, "dropout_slope": 0.5, "seed": 2}
    made = simulate(type_sizes=SIZES, n_genes=60, **options)
    # Some genes are silent in two types: their zeros there are no dropouts.
    silent = (made.obs["cell_type"] != "b").to_numpy()

    def change(counts):
        counts[np.ix_(silent, [4, 11, 30, 45])] = 0

    return with_counts(made, change)


def config(**changes):
    return ScGACLConfig.profile("tiny", **{**BRIEF, **changes})


def fit(cells, callbacks=(), seed=0, label_key="cell_type", folder=None, **changes):
    made = ScGACL(config(**changes), seed=seed, device="cpu")
    options = {"label_key": label_key, "callbacks": callbacks}
    if folder is not None:
        options |= {"checkpoint_dir": folder, "checkpoint_every": 2, "resume": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CollapseWarning)
        return made.fit(cells, **options)


@pytest.fixture(scope="module")
def model(cells) -> ScGACL:
    """A model with types whose codes differ between cells."""
    made = fit(cells, pre_epoch=5, vaeepoch=5, epoch=3)
    assert made.facts_["spread"] > 0.05
    return made


@pytest.fixture(scope="module")
def unlabelled(cells) -> ScGACL:
    return fit(cells, label_key=None, n_cluster=3, pre_epoch=5, vaeepoch=5, epoch=3)


@pytest.fixture(scope="module")
def simulation() -> AnnData:
    """The published simulation, on the genes that are seen."""
    folder = Path(os.environ["SCGENLIB_DATA_DIR"]) / "sim_scgacl_scrnmf"
    if not folder.is_dir():
        pytest.skip("the files of sim_scgacl_scrnmf are not in SCGENLIB_DATA_DIR")
    made = datasets.load("scgacl_sim", verbose=False)
    return made[:, (made.layers["counts"] > 0).sum(axis=0).A1 > 0].copy()


def dense(layer) -> np.ndarray:
    return layer.toarray() if sparse.issparse(layer) else np.asarray(layer)


def imputed(result, name="imputed") -> np.ndarray:
    return dense(result.layers[name])


def with_counts(cells, change) -> AnnData:
    """Return cells whose counts, dense, went through `change`; X stays."""
    out = cells.copy()
    counts = out.layers["counts"].toarray()
    change(counts)
    out.layers["counts"] = sparse.csr_matrix(counts)
    return out


def during(cells, look, **changes):
    """Return what `look` finds in a model that is being fitted, at each step."""
    found = []
    fit(cells, [lambda event: found.append(look(event))], **changes)
    return found


def watched(monkeypatch, name):
    """Return a list of the arguments of a step, filled as it is called."""
    seen, plain = [], getattr(scgacl, name)

    def call(*args, **kwargs):
        seen.append((args, kwargs))
        return plain(*args, **kwargs)

    monkeypatch.setattr(scgacl, name, call)
    return seen


def terms_of(model, term, phase):
    log = model.history_
    return log[(log["term"] == term) & (log["phase"] == phase)]["value"].to_numpy()


# ------------------------------------------------------------------- settings


PUBLISHED = {
    "Z_SIZE": 10,
    "PROJECT_SIZE1": 10,
    "PROJECT_SIZE2": 10,
    "TEMPERATURE": 0.9,
    "CUDA": True,
    "DEVICE": "cuda:2",
    "N_CLASS": 4,
    "DROP_THRESHOLD": 0.5,
    "IDENTIFY_USE_CELLTYPE": True,
    "MODEL_USE_CELLTYPE": True,
    "EN_SIZE": [500, 500, 2000],
    "DI_SIZE": [500, 500, 2000],
    "DE_SIZE": [2000, 500, 500],
    "TRAIN": {
        "B1": 0.5,
        "B2": 0.99,
        "DECAY": 2.5e-5,
        "PRE": True,
        "PRE_EPOCH": 100,
        "PRE_LR": 1e-3,
        "PRE_BATCH_SIZE": 32,
        "VAEEPOCH": 100,
        "VAELR": 1e-3,
        "VAE_BATCH_SIZE": 32,
        "EPOCH": 100,
        "LR": 1e-4,
        "BATCH_SIZE": 32,
        "LAMBDA_G_ADV": 1,
        "LAMBDA_SIMCL": 1,
        "LAMBDA_SUPCL": 1,
    },
}


def test_the_paper_profile_has_the_published_settings():
    made = published.scgacl_config(PUBLISHED)
    assert made == ScGACLConfig.published() and made.rec_weight == 1
    departures = {"rec_weight", "shuffle", "cluster_on", "valid_share", "max_zeros"}
    departures |= {"init_sd"}
    paper = ScGACLConfig.profile("paper").to_dict()
    differ = {key for key, value in made.to_dict().items() if value != paper[key]}
    assert differ == departures
    other = published.scgacl_config(
        {"GENENUM": 969, "N_CLUSTER": 4, "TRAIN": {"VAE_EPOCH": 7, "VAE_LR": 0.1}},
        shuffle=True,
    )
    assert (other.n_genes, other.n_cluster, other.vaeepoch) == (969, 4, 7)
    assert other.vaelr == 0.1 and other.shuffle
    with pytest.raises(ConfigError, match="Z_SIZ.*Did you mean 'Z_SIZE'"):
        published.scgacl_config({"Z_SIZ": 3})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("batch_size", 1, "batch_size"),
        ("valid_share", 0.7, "at most 0.5"),
        ("n_cluster", 0, "n_cluster"),
        ("cluster_on", "logs", "Did you mean 'log'"),
        ("discriminator_input", "mask", "reconstruction, masked, completed"),
        ("temperature", 0.0, "temperature"),
        ("rec_weight", -1.0, "rec_weight"),
        ("en_size", (0,), "en_size"),
        ("pre_epoch", 0, "pre_epoch"),
    ],
)
def test_settings_that_cannot_be(field, value, words):
    with pytest.raises(ConfigError, match=words):
        ScGACLConfig(**{field: value})


# ----------------------------------------------------------------- preparation


def test_values_are_those_of_the_completion(cells):
    log = completion.log_counts(cells)
    values, target = during(
        cells,
        lambda event: (event.model._X.copy(), event.model.facts_["target"]),
        valid_share=0.0,
    )[0]
    assert target == log.target == np.median(log.totals)
    assert (values != log.values).nnz == 0
    other = fit(cells, target_sum=1000.0)
    assert other.facts_["target"] == 1000.0
    assert (other.impute(cells).uns["scgenlib"]["target_sum"]) == 1000.0


def test_genes_without_a_count_are_left_out(cells):
    def change(counts):
        counts[:, [3, 17]] = 0

    bare = with_counts(cells, change)
    model = fit(bare)
    assert model.genes_ == [g for i, g in enumerate(bare.var_names) if i not in (3, 17)]
    out = model.impute(bare)
    assert list(out.var_names) == model.genes_ and out.shape == (101, 58)
    assert np.isfinite(imputed(out)).all()


def test_a_choice_of_genes(cells):
    model = fit(cells, n_genes=20)
    assert len(model.genes_) == 20 and set(model.genes_) < set(cells.var_names)
    # In the order of the file, and totals are those of these genes.
    assert model.genes_ == [g for g in cells.var_names if g in set(model.genes_)]
    own = np.asarray(cells[:, model.genes_].layers["counts"].sum(1)).ravel()
    assert model.facts_["target"] == np.median(own[own > 0])
    assert fit(cells, n_genes=None).genes_ == list(cells.var_names)
    with pytest.raises(DataError, match="absent from the cells.*20"):
        model.impute(cells[:, :0].copy())


def test_a_cell_without_chosen_genes(cells, monkeypatch):
    chosen = cells.var_names[:10]
    monkeypatch.setattr(scgacl, "select_genes", lambda adata, n: chosen)

    def change(counts):
        counts[7, :10] = 0

    bare = with_counts(cells, change)
    model = fit(bare, n_genes=10)
    without = bare[np.arange(101) != 7].copy()
    assert model.facts_["n_fitted"] == len(model.arrays_["codes"]) == 100
    # It taught nothing: the same fit without it.
    again = fit(without, n_genes=10)
    assert all(torch.equal(v, again.arrays_[k]) for k, v in model.arrays_.items())
    assert model.facts_ == again.facts_
    # It can be imputed; on the scale of counts its total of 0 stays 0.
    out = model.impute(bare)
    assert out.n_obs == 101 and imputed(out)[7].max() > 0
    assert (imputed(out, "imputed_counts")[7] == 0).all()


def test_the_last_cell_of_a_type_may_have_no_chosen_gene(cells, monkeypatch):
    chosen = cells.var_names[:10]
    monkeypatch.setattr(scgacl, "select_genes", lambda adata, n: chosen)

    def change(counts):
        counts[7, :10] = 0

    bare = with_counts(cells, change)
    bare.obs["cell_type"] = bare.obs["cell_type"].cat.add_categories("one")
    bare.obs.iloc[7, bare.obs.columns.get_loc("cell_type")] = "one"
    model = fit(bare, n_genes=10)
    out = model.impute(bare)
    assert np.isfinite(imputed(out)).all()
    # Nothing is known about zeros of a type without a count.
    assert (imputed(out)[7] == 0).all()


def test_mean_of_observed():
    X = sparse.csr_matrix(np.array([[1, 0, 2], [3, 0, 0]], np.float32))
    assert scgacl._mean_of_observed(X).tolist() == [2, 0, 2]


def test_labels_group_the_fits_and_the_contrast(cells, model):
    expected = dropout_probability(cells.layers["counts"], cells.obs["cell_type"])
    table = model.dropout_table()
    assert list(table.columns) == ["a", "b", "c"]
    assert list(table.index) == model.genes_
    np.testing.assert_allclose(table, expected, rtol=1e-6)
    names = np.array(["a", "b", "c"])[model.arrays_["codes"].numpy()]
    assert (names == cells.obs["cell_type"].to_numpy()).all()
    assert model.sizes_["n_components"] == 3
    assert "cluster_centres" not in model.arrays_
    assert fit(cells, n_cluster=7).sizes_["n_components"] == 7


def test_clusters_stand_in_for_labels(cells, unlabelled):
    model = unlabelled
    codes = model.arrays_["codes"].numpy()
    assert model.facts_["groups"] == ["cluster 0", "cluster 1", "cluster 2"]
    # One clustering: that of the fits is that of the contrast, and of new cells.
    names = np.array([f"cluster {code}" for code in codes])
    expected = dropout_probability(cells.layers["counts"], names)
    np.testing.assert_allclose(model.dropout_table(), expected, rtol=1e-6)
    log = completion.log_counts(cells, model.facts_["target"])
    assert (model._group_codes(cells, log.values) == codes).all()
    few = cells[10:17].copy()
    log = completion.log_counts(few, model.facts_["target"])
    assert (model._group_codes(few, log.values) == codes[10:17]).all()
    # They are near the types, and no label is asked for.
    table = pd.crosstab(codes, cells.obs["cell_type"].to_numpy())
    assert table.max(axis=1).sum() > 90
    bare = cells.copy()
    del bare.obs["cell_type"]
    assert (imputed(model.impute(bare)) == imputed(model.impute(cells))).all()


def test_names_of_clusters_sort_as_their_numbers():
    names = scgacl._cluster_names(np.arange(12), 12)
    assert names[0] == "cluster 00" and list(np.sort(names)) == list(names)


def test_clusters_from_all_values_or_from_those_observed(cells):
    """Where types differ in dropout alone, only "log" tells them apart."""
    rng = np.random.default_rng(0)
    counts = np.full((80, 40), 5.0)
    counts += rng.poisson(1.0, counts.shape)
    lost = rng.random(counts.shape) < np.where(np.arange(40) < 20, 0.7, 0.1)
    lost[40:] = rng.random((40, 40)) < np.where(np.arange(40) < 20, 0.1, 0.7)
    counts[lost] = 0
    made = AnnData(sparse.csr_matrix(np.log1p(counts), dtype=np.float32))
    made.layers["counts"] = sparse.csr_matrix(counts, dtype=np.float32)
    halves = np.arange(80) < 40
    found = {}
    for kind in ("log", "observed"):
        codes = fit(made, label_key=None, n_cluster=2, cluster_on=kind).arrays_["codes"]
        hits = np.mean(codes.numpy() == halves)
        found[kind] = max(hits, 1 - hits)
    assert found["log"] == 1.0 and found["observed"] < 0.8


@pytest.mark.parametrize(("identify", "contrast"), [(True, False), (False, True)])
def test_labels_for_one_use_only(cells, identify, contrast):
    model = fit(
        cells, identify_use_celltype=identify, model_use_celltype=contrast, n_cluster=4
    )
    assert model.facts_["by_label"] == identify
    assert len(model.facts_["groups"]) == (3 if identify else 4)
    assert int(model.arrays_["codes"].max()) + 1 == (3 if contrast else 4)
    bare = cells.copy()
    del bare.obs["cell_type"]
    if identify:
        with pytest.raises(DataError, match="label column"):
            model.impute(bare)
    else:
        assert model.impute(bare).n_obs == 101


def test_entries_held_out_are_not_seen_in_training(cells, monkeypatch):
    log = completion.log_counts(cells)
    seen = watched(monkeypatch, "elbo_step")
    X, valid = during(
        cells,
        lambda event: (event.model._X.copy(), event.model._valid),
        valid_share=0.2,
        shuffle=False,
    )[0]
    cell, gene, value = valid
    lost = log.values.nnz - X.nnz
    assert lost == len(value)
    assert lost / log.values.nnz == pytest.approx(0.2, abs=0.03)
    full = log.values.toarray()
    assert (full[cell, gene] == value).all() and (value > 0).all()
    full[cell, gene] = 0
    assert (full == X.toarray()).all()
    trained = torch.cat([args[2] for args, _ in seen])
    assert (trained.numpy() == full).all()


def test_without_held_out_entries_all_are_trained_on(cells):
    model, valid, n = during(
        cells,
        lambda event: (event.model, event.model._valid, event.model._X.nnz),
        valid_share=0.0,
    )[0]
    assert valid is None and n == completion.log_counts(cells).values.nnz
    assert "valid_rmse" not in set(model.history_["term"])


# 13: the published simulation as the method sees it.
@pytest.mark.data
def test_published_simulation_as_input(simulation):
    full = datasets.load("scgacl_sim", verbose=False)
    assert full.n_vars == 1000
    X, model = during(
        full,
        lambda event: (event.model._X.copy(), event.model),
        **{"valid_share": 0.0, "n_genes": 5000, "di_size": (4,)},
    )[0]
    assert len(model.genes_) == 969 and model.genes_ == list(simulation.var_names)
    assert model.facts_["target"] == 6566.5
    assert X.nnz / np.prod(X.shape) == pytest.approx(0.2298, abs=5e-5)
    counts = simulation.layers["counts"].toarray().astype(float)
    size = counts.sum(1) / 6566.5
    np.testing.assert_allclose(
        X[:5].toarray(), np.log1p(counts[:5] / size[:5, None]), rtol=1e-6
    )
    x = torch.from_numpy(X.toarray())
    mean = model.arrays_["gene_mean"]
    assert masked_mse(x, mean.expand_as(x)).item() == pytest.approx(0.0703465, abs=1e-6)
    types = simulation.obs["cell_type"].astype(str).to_numpy()
    by_type = torch.zeros_like(x)
    for name in np.unique(types):
        rows = types == name
        by_type[rows] = scgacl._mean_of_observed(X[rows]).expand(rows.sum(), -1)
    assert masked_mse(x, by_type).item() == pytest.approx(0.0476600, abs=1e-6)


# ------------------------------------------------------------------- training


def batches(seen):
    return [args[2] for args, _ in seen]


# 18: N mod batch = 1, and batches of any size.
@pytest.mark.parametrize("size", [20, 25, 100, 101, 300, 2])
def test_batches_have_every_cell_once(cells, monkeypatch, size):
    seen = watched(monkeypatch, "elbo_step")
    fit(cells, vae_batch_size=size, vaeepoch=2, valid_share=0.0)
    n = {20: 6, 25: 5, 100: 2, 101: 1, 300: 1, 2: 50}[size]
    assert len(seen) == 2 * n
    values = completion.log_counts(cells).values.toarray()
    orders = []
    for epoch in (seen[:n], seen[n:]):
        parts = batches(epoch)
        sizes = {len(part) for part in parts}
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2
        assert max(sizes) <= max(size, 3)
        whole = torch.cat(parts).numpy()
        order = [np.flatnonzero((values == row).all(1))[0] for row in whole]
        assert sorted(order) == list(range(101))
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])


# 18: a file sorted by type.
def test_a_file_sorted_by_type(cells, monkeypatch):
    order = np.argsort(cells.obs["cell_type"].to_numpy(), kind="stable")
    ordered = cells[order].copy()
    seen = watched(monkeypatch, "joint_step")
    one = fit(ordered, shuffle=False)
    kinds = [len(args[3].unique()) for args, _ in seen]
    assert kinds[0] == 1  # as published: batches of one type
    seen.clear()
    two = fit(ordered)
    assert all(len(args[3].unique()) == 3 for args, _ in seen)
    # Each cell comes with its own code.
    values = completion.log_counts(ordered).values
    types = ordered.obs["cell_type"].to_numpy()
    for args, _ in seen[:2]:
        x, codes = args[2].numpy(), args[3].numpy()
        own = (x > 0) @ (values > 0).T.astype(np.float32)
        names = types[np.asarray(own).argmax(1)]
        assert (np.array(["a", "b", "c"])[codes] == names).mean() > 0.95
    for model in (one, two):
        assert np.isfinite(imputed(model.impute(ordered))).all()


def test_updates_of_each_phase(cells, monkeypatch):
    names = ("elbo_step", "joint_step", "update")
    seen = {name: watched(monkeypatch, name) for name in names}
    sizes = {"pre_batch_size": 50, "vae_batch_size": 30, "batch_size": 20}
    model = fit(cells, pre_epoch=2, vaeepoch=3, epoch=4, valid_share=0.0, **sizes)
    assert len(seen["update"]) == 2 * 3  # 101 cells in batches of 50
    assert len(seen["elbo_step"]) == 3 * 4 and len(seen["joint_step"]) == 4 * 6
    # Reconstruction counts once a gene unless a weight is given.
    assert {args[3] for args, _ in seen["elbo_step"]} == {60.0}
    assert {args[5] for args, _ in seen["joint_step"]} == {60.0}
    shares = [args[4] for args, _ in seen["joint_step"]]
    assert shares == [0.1] * 6 + [1.0] * 18
    assert set(model.history_["phase"]) == {"pre", "vae", "joint"}
    expected = {"rec", "kl", "g_adv", "d_adv", "nt_xent", "sup_con"}
    log = model.history_
    own = set(log[log["phase"] == "joint"]["term"]) - {"spread", "components"}
    assert own == expected
    assert len(terms_of(model, "spread", "vae")) == 3


def test_first_weights(cells):
    def look(event):
        nets = event.model.modules_
        return {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}

    # A rate at which one step moves nothing.
    still = {"pre_lr": 1e-9, "decay": 0.0, "en_size": (400,), "di_size": (400,)}
    small = during(cells, look, init_sd=0.02, **still)[0]
    for name, key in (("encoder", "body.0"), ("discriminator", "trunk.0")):
        assert small[name][f"{key}.weight"].std().item() == pytest.approx(
            0.02, rel=0.03
        )
        assert small[name][f"{key}.bias"].abs().max() < 1e-6
    usual = during(cells, look, **still)[0]["encoder"]["body.0.weight"]
    # torch's own start is uniform up to one over the root of 60 genes.
    assert 0.99 < usual.abs().max().item() * 60**0.5 <= 1.0001


def test_settings_arrive_at_the_joint_step(cells, monkeypatch):
    seen = watched(monkeypatch, "joint_step")
    fit(
        cells,
        lambda_g_adv=0.2,
        lambda_simcl=0.3,
        lambda_supcl=0.4,
        temperature=0.6,
        discriminator_input="completed",
        rec_weight=2.5,
    )
    for args, options in seen:
        assert args[5] == 2.5
        assert options == {
            "weights": (0.2, 0.3, 0.4),
            "temperature": 0.6,
            "kind": "completed",
        }


def test_rates_of_each_phase(cells):
    def look(event):
        rows = []
        for name, optimiser in event.model.optimisers_.items():
            (group,) = optimiser.param_groups
            rows.append((name, group["lr"], *group["betas"], group["weight_decay"]))
        return event.phase, tuple(sorted(rows))

    options = {"b1": 0.4, "b2": 0.8, "decay": 0.01}
    options |= {"pre_lr": 0.03, "vaelr": 0.02, "lr": 0.01}
    nets = ("decoder", "discriminator", "encoder", "prior")
    assert set(during(cells, look, **options)) == {
        (phase, tuple((net, rate, 0.4, 0.8, 0.01) for net in nets))
        for phase, rate in (("pre", 0.03), ("vae", 0.02), ("joint", 0.01))
    }


def test_pretraining_knows_no_mixture_and_no_noise(cells):
    def look(event):
        nets = event.model.modules_
        parts = [p.clone() for p in nets["prior"].parameters()]
        return event.phase, [*parts, nets["encoder"].log_variance.weight.clone()]

    states = [s for phase, s in during(cells, look, pre_epoch=2) if phase == "pre"]
    for part, same in zip(states[0], states[-1], strict=True):
        assert torch.equal(part, same)


def test_start_of_the_mixture(cells):
    """It is scikit-learn's mixture of the codes that pre-training found."""
    from sklearn.mixture import GaussianMixture

    model = fit(cells, vaeepoch=0, epoch=0, pre_epoch=3, valid_share=0.0)
    codes = model.embed(cells).X
    form = {"covariance_type": "diag", "reg_covar": 1e-5, "random_state": 0}
    found = GaussianMixture(3, **form).fit(codes)
    prior = model.modules_["prior"]
    log_pi, centres, log_variance = (part.detach().numpy() for part in prior.parts())
    np.testing.assert_allclose(np.exp(log_pi), found.weights_, atol=1e-4)
    np.testing.assert_allclose(centres, found.means_, atol=1e-3)
    np.testing.assert_allclose(np.exp(log_variance), found.covariances_, rtol=1e-2)
    # The noise of a code is the same everywhere: a tenth of a component's variance.
    head = model.modules_["encoder"].log_variance
    within = found.weights_ @ found.covariances_.mean(1)
    assert (head.weight == 0).all()
    np.testing.assert_allclose(head.bias.exp().detach(), 0.1 * within, rtol=1e-2)


# 20: responsibilities and weights of a fitted mixture.
def test_codes_and_shares(cells, model):
    out = model.embed(cells)
    assert out.shape == (101, 10) and list(out.obs_names) == list(cells.obs_names)
    shares = out.obsm["shares"]
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)
    assert shares.shape == (101, 3) and shares.min() >= 0
    assert (out.obs["component"].astype(int) == shares.argmax(1)).all()
    pi = model.modules_["prior"].parts()[0].exp()
    assert pi.min() >= 0 and pi.sum().item() == pytest.approx(1, abs=1e-5)
    assert out.uns["scgenlib"]["verb"] == "embed"


def test_without_pretraining(cells):
    model = fit(cells, pre=False)
    assert set(model.history_["phase"]) == {"vae", "joint"}
    assert np.isfinite(imputed(model.impute(cells))).all()


# 19: without the three losses, phase 2 goes on with phase 1.
def test_phase_2_without_its_losses_is_phase_1(cells, monkeypatch):
    off = {"lambda_g_adv": 0.0, "lambda_simcl": 0.0, "lambda_supcl": 0.0}
    same = {"lr": 1e-2, "batch_size": 32, "vae_batch_size": 32, "valid_share": 0.0}
    joint = fit(cells, epoch=3, **off, **same)

    def only_elbo(nets, optimisers, x, codes, share, rec_weight, rng, **_):
        return scgacl.elbo_step(nets, optimisers, x, rec_weight, rng)

    monkeypatch.setattr(scgacl, "joint_step", only_elbo)
    vade = fit(cells, epoch=3, **same)
    for name in ("encoder", "decoder", "prior", "discriminator"):
        one, two = (m.modules_[name].state_dict() for m in (joint, vade))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert (imputed(joint.impute(cells)) == imputed(vade.impute(cells))).all()


def test_stops_early_and_keeps_the_best_epoch(cells):
    kept = {}

    def keep(event):
        kept.update(X=event.model._X, valid=event.model._valid)

    options = {"pre_epoch": 25, "vaeepoch": 25, "epoch": 8, "patience": 2}
    model = fit(cells, [keep], valid_share=0.2, pre_lr=0.05, vaelr=0.05, **options)
    stopped = 0
    for phase, epochs in (("pre", 25), ("vae", 25), ("joint", 8)):
        values = terms_of(model, "valid_rmse", phase)
        best = int(values.argmin())
        assert len(values) in (epochs, best + 3)
        stopped += len(values) < epochs
        assert model.facts_[f"epoch_{phase}"] == best
        assert model.facts_[f"valid_rmse_{phase}"] == values.min()
        assert set(terms_of(model, "components", phase)) <= {0.0, 1.0, 2.0, 3.0}
    assert stopped
    # The weights are those of that epoch: the same error by hand.
    cell, gene, value = kept["valid"]
    with torch.no_grad():
        code, _ = model.modules_["encoder"](torch.from_numpy(kept["X"].toarray()))
        made = model.modules_["decoder"](code).numpy()
    error = math.sqrt(np.mean((made[cell, gene] - value) ** 2))
    assert error == pytest.approx(model.facts_["valid_rmse_joint"], rel=1e-5)
    assert not any(key.startswith("best/") for key in model.arrays_)
    assert "best_value" not in model.facts_


@pytest.mark.parametrize("n_watched", [2000, 530])
def test_held_out_error_of_many_cells(monkeypatch, n_watched):
    """More cells than are looked at in one go, or at all."""
    many = simulate(type_sizes={"a": 330, "b": 270}, n_genes=12, depth_mean=80, seed=1)
    monkeypatch.setattr(scgacl, "_WATCHED", n_watched)
    kept = {}

    def keep(event):
        model = event.model
        kept.update(X=model._X, valid=model._valid, watched=model._watched)

    model = fit(many, [keep], pre_epoch=2, vaeepoch=0, epoch=0, batch_size=300)
    watched = kept["watched"]
    assert len(set(watched)) == min(n_watched, 600) and (np.diff(watched) > 0).all()
    cell, gene, value = kept["valid"]
    full = completion.log_counts(many).values[watched].toarray()
    assert (full[cell, gene] == value).all() and cell.max() > 512
    with torch.no_grad():
        code, _ = model.modules_["encoder"](
            torch.from_numpy(kept["X"][watched].toarray())
        )
        made = model.modules_["decoder"](code).numpy()
    error = math.sqrt(np.mean((made[cell, gene] - value) ** 2))
    assert error == pytest.approx(model.facts_["valid_rmse_pre"], rel=1e-5)


def test_spread_is_the_share_of_variance_between_cells(cells):
    def look(event):
        if event.phase == "vae" and event.step == event.n_steps - 1:
            nets = event.model.modules_
            X = torch.from_numpy(event.model._X.toarray())
            with torch.no_grad():
                made = nets["decoder"].eval()(nets["encoder"].eval()(X)[0])
            nets["encoder"].train()
            values, mean = X.numpy(), event.model.arrays_["gene_mean"].numpy()
            return made.numpy().var(0).sum(), values, mean
        return None

    (found,) = [
        x
        for x in during(cells, look, vaeepoch=4, pre_epoch=4, epoch=0)
        if x is not None
    ]
    model = fit(cells, vaeepoch=4, pre_epoch=4, epoch=0)
    full = completion.log_counts(cells).values.toarray()
    seen = full > 0
    observed = ((full - found[2]) ** 2)[seen].mean() * 60
    assert model.facts_["observed_variance"] == pytest.approx(observed, rel=1e-4)
    spread = terms_of(model, "spread", "vae")[-1]
    assert spread == pytest.approx(found[0] / observed, rel=1e-2) and spread > 0.01


def test_collapse_is_told(cells):
    settings = config(rec_weight=1e-6, valid_share=0.0, vaeepoch=8, epoch=0, decay=0.0)
    with pytest.warns(CollapseWarning, match="'vae' all cells.*rec_weight"):
        model = ScGACL(settings, device="cpu").fit(cells)
    assert model.facts_["spread"] < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = config(pre_epoch=5, vaeepoch=5, valid_share=0.0)
        ScGACL(settings, device="cpu").fit(cells)


def test_collapse_is_told_of_the_weights_that_are_kept(cells):
    """The best epoch is the first, before the codes collapse: no warning then."""
    model = fit(cells, vaeepoch=12, epoch=0, pre_epoch=6, rec_weight=1e-3,
                valid_share=0.2, patience=20)  # fmt: skip
    best = int(terms_of(model, "valid_rmse", "vae").argmin())
    spreads = terms_of(model, "spread", "vae")
    assert model.facts_["spread"] == spreads[best]
    assert model.facts_["components"] == terms_of(model, "components", "vae")[best]


def test_a_fitted_model_keeps_no_cell(model):
    for name in ("_X", "_nets", "_watched", "_valid"):
        assert not hasattr(model, name)
    assert "order" not in model.arrays_


# ------------------------------------------------------------------- imputing


# 12: what the result keeps and what it fills.
@pytest.mark.parametrize("kind", ["model", "unlabelled"])
def test_observed_entries_are_kept(cells, kind, request):
    model = request.getfixturevalue(kind)
    before = cells.copy()
    out = model.impute(cells)
    raw, log = cells.layers["counts"].toarray(), completion.log_counts(cells)
    values, counts = imputed(out), imputed(out, "imputed_counts")
    seen, mask = raw > 0, model.dropout_mask(cells).toarray()
    assert (
        values[seen].view(np.int32) == log.values.toarray()[seen].view(np.int32)
    ).all()
    assert (counts[seen] == raw[seen]).all()
    assert values.dtype == counts.dtype == np.float32
    assert np.isfinite(values).all() and values.min() >= 0 and counts.min() >= 0
    # Of the zeros, those that are flagged and no others.
    assert not (mask & seen).any() and mask.any() and (~mask & ~seen).any()
    assert (values[~seen & ~mask] == 0).all()
    assert (values[mask] > 0).mean() > 0.9
    made = imputed(model.impute(cells, keep_observed=False))
    assert (values[mask] == made[mask]).all()
    # Back on the scale of counts.
    scale = (log.totals / log.target)[:, None]
    back = np.expm1(values.astype(float)) * scale
    np.testing.assert_allclose(back[seen], raw[seen], rtol=1e-4)
    np.testing.assert_allclose(counts[mask], back[mask], rtol=1e-4, atol=1e-6)
    assert list(out.obs_names) == list(cells.obs_names)
    assert list(out.var_names) == list(cells.var_names) == model.genes_
    # The cells themselves are as they were.
    assert set(cells.layers) == set(before.layers)
    assert (cells.layers["counts"] != before.layers["counts"]).nnz == 0


# 12: one decision for all zeros of a gene in a group.
@pytest.mark.parametrize("kind", ["model", "unlabelled"])
def test_the_mask_is_a_table(cells, kind, request):
    model = request.getfixturevalue(kind)
    mask = model.dropout_mask(cells)
    assert mask.format == "csr" and mask.dtype == bool
    table = model.dropout_table()
    log = completion.log_counts(cells, model.facts_["target"])
    groups = model._group_codes(cells, log.values)
    for code, name in enumerate(table.columns):
        rows = groups == code
        zeros = cells.layers["counts"][rows].toarray() == 0
        fill = table[name].to_numpy() >= 0.5
        assert fill.any()
        assert (mask[rows].toarray() == (zeros & fill)).all()
    assert 0.02 < (table < 0.5).to_numpy().mean() < 0.5


def test_threshold_of_the_table(cells, model):
    zeros = cells.layers["counts"].toarray() == 0
    masks = {}
    for threshold in (0.0, 0.5, 0.999, 1.0):
        other = fit(cells, drop_threshold=threshold)
        masks[threshold] = other.dropout_mask(cells).toarray()
        filled = imputed(other.impute(cells)) > 0
        assert not (filled & zeros & ~masks[threshold]).any()
    assert (masks[0.0] == zeros).all() and masks[1.0].sum() < masks[0.999].sum()
    with pytest.raises(ConfigError, match="at most 1"):
        ScGACLConfig(drop_threshold=50)
    sums = [mask.sum() for mask in masks.values()]
    assert sums == sorted(sums, reverse=True) and sums[1] < sums[0]


def test_zeros_that_are_stored_are_zeros(cells, model):
    """A count of 0 that a sparse matrix keeps is no observation."""
    stored = cells.copy()
    counts = stored.layers["counts"].toarray()
    full = sparse.csr_matrix(counts + 1)
    full.data -= 1
    assert full.nnz == counts.size
    stored.layers["counts"] = full
    again = fit(stored, pre_epoch=5, vaeepoch=5, epoch=3)
    for key, value in model.arrays_.items():
        assert torch.equal(value, again.arrays_[key]), key
    for one in (model, again):
        for name in ("imputed", "imputed_counts"):
            expected = imputed(model.impute(cells), name)
            np.testing.assert_array_equal(imputed(one.impute(stored), name), expected)


# 18: counts of any form.
def test_dense_and_other_counts(cells, model):
    expected = imputed(model.impute(cells), "imputed_counts")
    forms = [
        np.asarray(cells.layers["counts"].toarray()),
        cells.layers["counts"].tocsc(),
    ]
    for form in forms:
        other = cells.copy()
        other.layers["counts"] = form
        found = imputed(model.impute(other), "imputed_counts")
        np.testing.assert_array_equal(found, expected)
        again = fit(other, pre_epoch=5, vaeepoch=5, epoch=3)
        np.testing.assert_array_equal(
            imputed(again.impute(other), "imputed_counts"), expected
        )


# 16: the mean is the same every time; draws differ by their seed alone.
def test_mean_and_draws(cells, model):
    plain = imputed(model.impute(cells))
    assert (imputed(model.impute(cells)) == plain).all()
    same = fit(cells, pre_epoch=5, vaeepoch=5, epoch=3)
    assert (imputed(same.impute(cells)) == plain).all()
    one, two, other = (model.impute(cells, n_draws=4, seed=s) for s in (1, 1, 2))
    for name in ("imputed", "imputed_counts", "imputed_sd"):
        assert (imputed(one, name) == imputed(two, name)).all()
    assert (imputed(one) != imputed(other)).any()
    assert (imputed(one) != plain).any()
    default = model.impute(cells, n_draws=4)
    assert (imputed(default) == imputed(model.impute(cells, n_draws=4, seed=0))).all()
    assert one.uns["scgenlib"]["n_draws"] == 4
    assert one.uns["scgenlib"]["impute_seed"] == 1
    assert "imputed_sd" not in model.impute(cells).layers
    # What was observed is not in doubt, nor what is not filled.
    mask = model.dropout_mask(cells).toarray()
    sd = imputed(one, "imputed_sd")
    assert (sd[~mask] == 0).all() and (sd[mask] > 0).mean() > 0.9
    seen = cells.layers["counts"].toarray() > 0
    assert (imputed(one)[seen] == plain[seen]).all()


def test_draws_are_draws_of_the_code(cells, model):
    few = cells[:6].copy()
    out = model.impute(few, n_draws=3, seed=5, keep_observed=False)
    log = completion.log_counts(few, model.facts_["target"])
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        mean, log_variance = model.modules_["encoder"](
            torch.from_numpy(log.values.toarray())
        )
        sd = (0.5 * log_variance).exp()
        made = torch.stack(
            [
                model.modules_["decoder"](mean + sd * torch.randn(6, 10, generator=rng))
                for _ in range(3)
            ]
        ).double()
    np.testing.assert_allclose(imputed(out), made.mean(0), rtol=1e-5, atol=1e-6)
    expected = made.var(0, correction=0).sqrt()
    np.testing.assert_allclose(imputed(out, "imputed_sd"), expected, atol=2e-3)
    single = model.impute(few, n_draws=1)
    assert imputed(single, "imputed_sd").max() == 0


# 17: the order of cells.
def test_permuted_cells_have_permuted_results(cells, model):
    order = np.random.default_rng(0).permutation(101)
    one, two = model.impute(cells), model.impute(cells[order].copy())
    np.testing.assert_allclose(imputed(two), imputed(one)[order], atol=1e-5)
    assert list(two.obs_names) == list(one.obs_names[order])
    # A cell does not depend on those beside it.
    alone = model.impute(cells[[42]].copy())
    np.testing.assert_allclose(imputed(alone)[0], imputed(one)[42], atol=1e-5)


def test_blocks_change_nothing(cells, model, monkeypatch):
    expected = model.impute(cells)
    mask = model.dropout_mask(cells)
    monkeypatch.setattr(
        ScGACL,
        "_slices",
        lambda self, n: [slice(i, min(i + 8, n)) for i in range(0, n, 8)],
    )
    np.testing.assert_allclose(
        imputed(model.impute(cells)), imputed(expected), atol=1e-6
    )
    assert (model.dropout_mask(cells) != mask).nnz == 0


def test_blocks_cover_every_cell(model):
    for n in (1, 1024, 1025, 3000):
        parts = model._slices(n)
        assert [i for part in parts for i in range(n)[part]] == list(range(n))


def test_genes_in_another_order_and_more_genes(cells, model):
    out = model.impute(cells[:, cells.var_names[::-1]].copy())
    assert list(out.var_names) == model.genes_
    np.testing.assert_array_equal(imputed(out), imputed(model.impute(cells)))
    fewer = fit(cells[:, :40].copy())
    out = fewer.impute(cells)
    assert out.shape == (101, 40)
    expected = imputed(fewer.impute(cells[:, :40].copy()))
    np.testing.assert_array_equal(imputed(out), expected)


@pytest.mark.parametrize("options", [{}, {"n_draws": 3}, {"keep_observed": False}])
def test_streamed_results_are_those_in_memory(cells, model, tmp_path, options):
    made = model.impute(cells, **options)
    path = model.impute(cells, to=tmp_path / "out.h5ad", **options)
    assert path == tmp_path / "out.h5ad"
    read = anndata.read_h5ad(path)
    assert set(read.layers) == set(made.layers)
    for name in made.layers:
        np.testing.assert_array_equal(imputed(read, name), imputed(made, name), name)
    assert dict(read.uns["scgenlib"]) == made.uns["scgenlib"]
    path = model.impute(cells, to=str(tmp_path / "result.csv"), **options)
    table = pd.read_csv(path, index_col=0)
    np.testing.assert_allclose(table.to_numpy(), imputed(made), atol=1e-6)
    assert list(table.index) == list(cells.obs_names)
    assert list(table.columns) == model.genes_


# 12: the same of real cells.
@pytest.mark.filterwarnings("ignore")
def test_real_cells(tmp_path):
    real = datasets.load("pbmc68k_reduced", verbose=False)
    model = fit(real)
    made = model.impute(real)
    own = real[:, model.genes_]
    raw, log = own.layers["counts"].toarray(), completion.log_counts(own.copy())
    seen = raw > 0
    assert len(model.genes_) == 200 and (~seen).any()
    bits = imputed(made)[seen].view(np.int32)
    assert (bits == log.values.toarray()[seen].view(np.int32)).all()
    assert (imputed(made, "imputed_counts")[seen] == raw[seen]).all()
    read = anndata.read_h5ad(model.impute(real, to=tmp_path / "real.h5ad"))
    for name in ("imputed", "imputed_counts"):
        np.testing.assert_array_equal(imputed(read, name), imputed(made, name))
    # A cell of another file, on the scale of the fit.
    few = model.impute(real[:50].copy())
    np.testing.assert_allclose(imputed(few), imputed(made)[:50], atol=1e-5)
    assert few.uns["scgenlib"]["target_sum"] == made.uns["scgenlib"]["target_sum"]


# ------------------------------------------------------------- save and resume


@pytest.mark.parametrize("kind", ["model", "unlabelled"])
def test_saved_models_fill_in_the_same(cells, tmp_path, kind, request):
    model = request.getfixturevalue(kind)
    again = ScGACL.load(model.save(tmp_path / "run"), device="cpu")
    for options in ({}, {"n_draws": 2}):
        one, two = (m.impute(cells, **options) for m in (model, again))
        for name in one.layers:
            np.testing.assert_array_equal(imputed(one, name), imputed(two, name))
    assert (model.dropout_mask(cells) != again.dropout_mask(cells)).nnz == 0
    pd.testing.assert_frame_equal(model.dropout_table(), again.dropout_table())
    assert again.facts_ == model.facts_


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [("pre", 5), ("vae", 6), ("joint", 3), ("joint", 9)])
def test_a_killed_fit_goes_on(cells, tmp_path, stop):
    """In the middle of an epoch, with clusters and entries held out."""
    options = {"label_key": None, "n_cluster": 3, "pre_epoch": 3, "vaeepoch": 3}
    options |= {"epoch": 3, "valid_share": 0.1}
    whole = fit(cells, **options)

    def kill(event):
        if (event.phase, event.step) == stop:
            raise Killed

    with pytest.raises(Killed):
        fit(cells, [kill], folder=tmp_path, **options)
    again = fit(cells, folder=tmp_path, **options)
    one, two = whole._state_tensors(), again._state_tensors()
    assert one.keys() == two.keys()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []
    assert whole.facts_ == again.facts_
    pd.testing.assert_frame_equal(whole.history_, again.history_)
    assert (imputed(whole.impute(cells)) == imputed(again.impute(cells))).all()


# ------------------------------------------------------------------- bad input


def test_values_on_the_wrong_scale(cells, model):
    logged = cells.copy()
    logged.layers["counts"] = cells.X.copy()
    with pytest.raises(DataError, match="raw counts in adata.layers"):
        fit(logged)
    raw = cells.copy()
    raw.X = cells.layers["counts"].copy()
    with pytest.raises(DataError, match="does not hold logarithms"):
        fit(raw)
    bare = cells.copy()
    del bare.layers["counts"]
    with pytest.raises(DataError, match="no such layer"):
        fit(bare)
    with pytest.raises(DataError, match="starts from counts"):
        model.impute(bare)


def test_logarithms_are_not_imputed_as_counts(cells, model):
    logged = cells.copy()
    logged.layers["counts"] = cells.X.copy()
    with pytest.raises(DataError, match="starts from counts"):
        model.impute(logged)


def test_number_of_components(cells):
    with pytest.raises(ConfigError, match="n_cluster is larger.*102.*at most 101"):
        fit(cells, n_cluster=102)
    with pytest.raises(ConfigError, match="How many types.*n_cluster"):
        fit(cells, label_key=None)
    # 18: one type: the contrast has all cells as mates.
    model = fit(cells, label_key=None, n_cluster=1)
    assert np.isfinite(model.history_["value"]).all()
    assert np.isfinite(imputed(model.impute(cells))).all()
    many = fit(cells[:12].copy(), label_key=None, n_cluster=12)
    assert np.isfinite(imputed(many.impute(cells))).all()


def test_labels_that_will_not_do(cells):
    each = cells.copy()
    each.obs["cell_type"] = pd.Categorical([f"t{i}" for i in range(101)])
    with pytest.raises(DataError, match="label of its own.*101 labels for 101 cells"):
        fit(each)
    assert fit(each, label_key=None, n_cluster=2).facts_["n_fitted"] == 101


def test_a_type_of_one_cell(cells):
    one = cells.copy()
    names = one.obs["cell_type"].astype(str).to_numpy(object)
    names[5] = "rare"
    one.obs["cell_type"] = pd.Categorical(names)
    model = fit(one)
    assert model.facts_["groups"] == ["a", "b", "c", "rare"]
    assert np.isfinite(model.history_["value"]).all()
    # It has no zero beside a count of the same gene: none of them is filled.
    zero = one.layers["counts"][[5]].toarray()[0] == 0
    assert zero.any() and (model.dropout_table()["rare"][zero] == 0).all()
    assert (imputed(model.impute(one))[5][zero] == 0).all()


def test_cells_the_model_does_not_know(cells, model):
    other = cells.copy()
    other.obs["cell_type"] = other.obs["cell_type"].cat.rename_categories({"c": "bb"})
    for call in (model.impute, model.dropout_mask):
        with pytest.raises(DataError, match="cell type.*'bb'"):
            call(other)
        with pytest.raises(DataError, match=r"1 of 60, such as 'gene0?5'"):
            call(cells[:, np.arange(60) != 4].copy())
        bare = cells.copy()
        del bare.obs["cell_type"]
        with pytest.raises(DataError, match="label column.*'cell_type'"):
            call(bare)
    # Codes need no label.
    assert model.embed(bare).n_obs == 101


def test_arguments_of_impute(cells, model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="n_draws must be at least 0.*-1"):
        model.impute(cells, n_draws=-1)
    with pytest.raises(OutputError, match=r"out\.txt.*\.h5ad or \.csv"):
        model.impute(cells, to=tmp_path / "out.txt")
    monkeypatch.setattr(completion, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="too large.*to='imputed.h5ad'"):
        model.impute(cells)
    assert model.impute(cells, to=tmp_path / "out.h5ad").exists()


# -------------------------------------------------------- the published simulation


# 15: simple baselines on the scale of each matrix's own median.
@pytest.mark.data
def test_rows_to_beat(simulation):
    truth = metrics.log_truth(simulation.layers["true_counts"])
    raw = simulation.layers["counts"].toarray()
    lost = (simulation.layers["true_counts"].toarray() > 0) & (raw == 0)
    made = {
        "gene": imputers.gene_mean(simulation),
        "type": imputers.type_mean(simulation),
        "type + shift": imputers.type_mean(simulation, cell_shift=True),
    }
    expected = {"gene": (0.550, 0.940), "type": (0.387, 0.970)}
    expected["type + shift"] = (0.415, 0.965)
    for name, (rmse, pcc) in expected.items():
        found = metrics.masked_scores(made[name].layers["imputed"], truth, lost)
        assert found["rmse"] == pytest.approx(rmse, abs=6e-4), name
        assert found["pcc"] == pytest.approx(pcc, abs=6e-4), name


# 15b: with a weight of 1 the code collapses, with one for each gene it does not.
@pytest.mark.data
def test_collapse_on_the_simulation(simulation):
    size = {"en_size": (128,), "de_size": (128,), "di_size": (4,), "n_genes": None}
    rates = {"pre_lr": 3e-3, "vaelr": 1e-2, "valid_share": 0.0}
    plan = {"pre_epoch": 8, "vaeepoch": 20, "epoch": 0, "n_cluster": 4}
    types = simulation.obs["cell_type"].to_numpy()
    truth = metrics.log_truth(simulation.layers["true_counts"])
    raw = simulation.layers["counts"].toarray()
    lost = (simulation.layers["true_counts"].toarray() > 0) & (raw == 0)
    found = {}
    for weight in (1.0, None):
        settings = config(rec_weight=weight, **size, **rates, **plan)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", CollapseWarning)
            model = ScGACL(settings, device="cpu").fit(simulation, label_key=None)
        made = imputed(model.impute(simulation, keep_observed=False))
        means = [made[types == name].mean(0) for name in np.unique(types)]
        rmse = metrics.masked_scores(made, truth, lost)["rmse"]
        found[weight] = (
            model.facts_["components"],
            float(np.var(means, axis=0).mean()),
            rmse,
            bool(told),
        )
    components, between, rmse, told = found[1.0]
    assert components == 1 and between < 1e-3 and told
    # All cells get one value a gene: the error is that of the gene's mean, or worse.
    assert rmse > 0.54
    components, between, rmse, told = found[None]
    assert components == 4 and between > 0.05 and not told
    assert rmse == pytest.approx(0.415, abs=0.03)
