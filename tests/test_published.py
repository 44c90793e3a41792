"""What published code does where it differs: reproduced, and told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scgenlib import published
from scgenlib.cscgan import CscGANConfig, ScGANConfig
from scgenlib.errors import ConfigError
from scgenlib.garage import GAT, attention_scores, choose_seeds, knn_graph
from scgenlib.nets import count_parameters
from scgenlib.regina import REGINAConfig


@pytest.fixture(scope="module")
def graph():
    rng = np.random.default_rng(0)
    X = rng.random((90, 30)).astype(np.float32)
    return X, knn_graph(X)


def network(seed):
    torch.manual_seed(seed)
    return GAT(30, 4)


def test_edge_index_scores_are_what_the_indexing_gives(graph):
    X, links = graph
    x = torch.from_numpy(X)
    made = []
    for seed in (0, 1):
        # The first part of the returned pair, looked up at the original positions.
        first_part, _ = network(seed).attention(x, links)
        scores = [first_part[:, links[0] == i].float().mean() for i in range(90)]
        made.append(torch.stack(scores))
    assert torch.equal(made[0], made[1])  # whatever the weights
    scores = published.edge_index_scores(links, 90)
    torch.testing.assert_close(scores.float(), made[0])


def test_edge_index_scores_have_a_closed_form(graph):
    scores = published.edge_index_scores(graph[1], 90)
    late = torch.arange(72, 90)
    assert torch.equal(scores[72:], (5 * late - 4 * 90 + 2).double())
    chosen = choose_seeds(18, 90, scores=scores)
    # The last cells of the file and those just below 0.8 n: file order decides.
    assert chosen.min() > 45
    assert 89 in chosen


def test_published_rule_depends_on_the_order_of_cells(graph):
    X, links = graph
    shuffle = np.random.default_rng(1).permutation(90)
    seeds = set(choose_seeds(18, 90, scores=published.edge_index_scores(links, 90)))
    scores = published.edge_index_scores(knn_graph(X[shuffle]), 90)
    again = set(shuffle[choose_seeds(18, 90, scores=scores)])
    assert len(seeds & again) < 12


def test_misaligned_scores(graph):
    X, links = graph
    returned, alpha = network(0).attention(torch.from_numpy(X), links)
    scores = published.misaligned_scores(links, alpha, 90)
    by_hand = torch.stack([alpha[links[0] == i].mean() for i in range(90)])
    torch.testing.assert_close(scores.float(), by_hand)
    # The last cells are given self-links of other cells.
    self_links = alpha[-90:, 0]
    expected = self_links.reshape(-1, 5).mean(1)
    torch.testing.assert_close(scores[72:].float(), expected)
    aligned = attention_scores(returned, alpha, 90)
    assert not torch.allclose(scores, aligned, atol=1e-3)


def test_degree_scores_are_uniform_attention(graph):
    X, links = graph
    gat = network(0)
    for parameter in (gat.layer2.att_src, gat.layer2.att_dst):
        torch.nn.init.zeros_(parameter)
    scores = attention_scores(*gat.attention(torch.from_numpy(X), links), 90)
    torch.testing.assert_close(
        published.degree_scores(links, 90).float(), scores.float()
    )


@pytest.mark.parametrize(
    ("genes", "count"),
    [(10564, 8266121), (14802, 11529381), (2000, 1671841), (19156, 14881961)],
)
def test_discriminator_parameters(genes, count):
    assert 770 * genes + 131841 == count
    with torch.device("meta"):
        assert count_parameters(published.Discriminator(genes)) == count


def test_extra_linear_layer_adds_no_function():
    torch.manual_seed(0)
    d = published.Discriminator(7, (5, 4))
    x = torch.randn(9, 7)
    weight = d.last.weight @ d.extra.weight  # (1, 4): one direction
    bias = d.last.weight @ d.extra.bias + d.last.bias
    torch.testing.assert_close(d.body(x) @ weight.T + bias, d(x))


def test_lowest_fano_genes():
    rng = np.random.default_rng(0)
    X = rng.poisson(5, (200, 4)) * np.array([1.0, 2.0, 3.0, 4.0])
    # Variance over mean of c * Poisson is c.
    assert published.lowest_fano_genes(X, 2).tolist() == [0, 1]
    assert published.lowest_fano_genes(sparse.csr_matrix(X), 4).tolist() == [0, 1, 2, 3]


def test_sizes():
    assert published.generated_sizes(299) == [74, 149, 224, 299, 373, 448]
    assert published.generated_sizes(90) == [22, 45, 67, 90, 112, 135]
    assert published.generated_sizes(2126) == [531, 1063, 1594, 2126, 2657, 3189]


@pytest.mark.parametrize(
    ("n_cells", "n_rare", "sizes"),
    [
        (90, 6, (3, 3, 45, 9, 30)),
        (299, 8, (4, 4, 150, 30, 40)),
        (7895, 49, (25, 24, 3948, 790, 250)),
        (2126, 21, (11, 10, 1064, 213, 110)),
    ],
)
def test_rare_utility_sizes(n_cells, n_rare, sizes):
    found = published.rare_utility_sizes(n_cells, n_rare)
    assert tuple(found.values()) == sizes


# ------------------------------------------------------- scGAN and cscGAN


def parameter_file(**changes):
    """One experiment of the published parameter file, some entries replaced.

    Keys of `changes` are paths with two underscores in place of a dot.
    """
    values = {
        "input_ds": {
            "clustering": {"res": 0.15},
            "filtering": {"min_cells": 3, "min_genes": 10},
            "raw_input": "cells.h5ad",
            "scale": "normalize_per_cell_LS_20000",
            "split": {
                "balanced_split": True,
                "split_seed": "default",
                "test_cells": 0,
                "valid_cells": 2000,
            },
        },
        "training": {
            "batch_size": 128,
            "checkpoint": None,
            "critic_iters": 5,
            "learning_rate": {"alpha_0": 1e-4, "alpha_final": 1e-5, "decay": True},
            "max_steps": 1_000_000,
            "optimizer": {"algorithm": "AMSGrad", "beta1": 0.5, "beta2": 0.9},
            "progress_freq": 10,
            "save_freq": 1000,
            "summary_freq": 50,
            "validation_freq": 1000,
        },
        "model": {
            "type": "cscGAN",
            "latent_dim": 128,
            "output_LSN": 20000,
            "lambd": 10,
            "critic_layers": [1024, 512, 256],
            "gen_layers": [256, 512, 1024],
            "critic_cond_type": "proj",
            "gen_cond_type": "batchnorm",
        },
    }
    for path, value in changes.items():
        *above, last = path.split("__")
        inner = values
        for key in above:
            inner = inner[key]
        inner[last] = value
    return values


def paths(values, above=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from paths(value, f"{above}{key}.")
        else:
            yield above + key


def test_every_entry_of_the_parameter_file_is_known():
    assert set(published.SCGAN_PARAMETERS) == set(paths(parameter_file()))
    fields = set(CscGANConfig.table().index)
    others = {
        "fit(adata)",
        "fit(checkpoint_dir, resume)",
        "the progress bar",
        "ScGAN or CscGAN",
    }
    assert set(published.SCGAN_PARAMETERS.values()) - fields == others


def test_the_parameter_file_gives_the_paper_profile():
    assert published.scgan_config(parameter_file()) == CscGANConfig.profile("paper")
    plain = published.scgan_config(parameter_file(model__type="scGAN"))
    assert type(plain) is ScGANConfig and plain == ScGANConfig.profile("paper")


def test_each_entry_of_the_parameter_file_arrives():
    changes = {
        "input_ds__clustering__res": 0.5,
        "input_ds__filtering__min_cells": 4,
        "input_ds__filtering__min_genes": 11,
        "input_ds__scale": "normalize_per_cell_LS_300",
        "input_ds__split__balanced_split": False,
        "input_ds__split__split_seed": 6,
        "input_ds__split__test_cells": 7,
        "input_ds__split__valid_cells": 8,
        "training__batch_size": 9,
        "training__critic_iters": 2,
        "training__learning_rate__alpha_0": 0.01,
        "training__learning_rate__alpha_final": 0.001,
        "training__learning_rate__decay": False,
        "training__max_steps": 12,
        "training__optimizer__algorithm": "Adam",
        "training__optimizer__beta1": 0.1,
        "training__optimizer__beta2": 0.2,
        "training__save_freq": 13,
        "training__summary_freq": 14,
        "training__validation_freq": 15,
        "model__latent_dim": 16,
        "model__output_LSN": 300,
        "model__lambd": 17,
        "model__critic_layers": [18],
        "model__gen_layers": [19, 20],
        "model__critic_cond_type": "miyato",
        "model__gen_cond_type": "layernorm",
    }
    made = published.scgan_config(parameter_file(**changes))
    for path, value in changes.items():
        name = published.SCGAN_PARAMETERS[path.replace("__", ".")]
        expected = tuple(value) if isinstance(value, list) else value
        expected = 300 if name == "target_sum" else expected
        assert getattr(made, name) == expected, name
    assert len(changes) == 31 - 4  # all but the four that are no field


def test_null_entries_and_overrides():
    file = parameter_file(model__output_LSN=None, input_ds__clustering__res=None)
    made = published.scgan_config(file, max_steps=3, fake_labels="drawn")
    assert made.output_lsn is None and made.clustering_res is None
    assert made.max_steps == 3 and made.fake_labels == "drawn"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__typ": "scGAN"}, "model.typ.*Did you mean 'model.type'"),
        ({"model__type": "csGAN"}, "csGAN.*Did you mean 'cscGAN'"),
        ({"input_ds__scale": "log"}, "log.*normalize_per_cell_LS_<total>"),
        (
            {"input_ds__scale": "normalize_per_cell_LS_"},
            "normalize_per_cell_LS_<total>",
        ),
        ({"model__output_LSN": 10_000}, "output_lsn 10000.*target_sum 20000"),
        ({"training__optimizer__algorithm": "SGD"}, "algorithm"),
        ({"training__batch_size": "many"}, "batch_size.*many"),
    ],
)
def test_a_parameter_file_that_cannot_be_read(changes, words):
    with pytest.raises(ConfigError, match=words):
        published.scgan_config(parameter_file(**changes))


def test_sorted_ratios_lose_the_order_of_the_classes():
    assert published.sorted_ratios({"a": 0.2, "b": 0.5, "c": 0.3}) == [0.5, 0.3, 0.2]
    assert published.sorted_ratios({"a": 0.5, "b": 0.3, "c": 0.2}) == [0.5, 0.3, 0.2]


# -------------------------------------------------------------------- REGINA

REGINA_ENTRIES = {
    "max_epochs": (100, 100),
    "batch_size": (64, 64),
    "perturb_key": ("condition", "condition"),
    "ctrl_key": ("ctrl", "ctrl"),
    "num_paddings": (12, 12),
    "input_dim": (317, 314),
    "seq_len": (16, 16),
    "n_real_genes": (5060, 5012),
    "d_model": (512, 512),
    "n_layers": (4, 4),
    "n_heads": (8, 8),
    "z_dim": (256, 256),
    "silence_val": (-1.0, -0.1),
    "reconFactr": (1.5, 3.0),
    "centerFactr": (0.5, 0.5),
    "lossClassFactr": (1.0, 0.1),
    "lossLatentFactr": (1, 1),
    "lossCycleFactr": (5, 1),
    "adversarialFactr": (3.5, 0.1),
    "lossRegFactr": (1e-4, 1e-4),
    "class_names": (["Homeostasis", "Stressed"], ["Resting", "Activated"]),
}


def regina_entry(which, nested=True):
    """The published entry of Adamson's (0) or of Dixit's cells (1)."""
    values = {name: pair[which] for name, pair in REGINA_ENTRIES.items()}
    if not nested:
        return values
    outer = ("max_epochs", "batch_size", "perturb_key", "ctrl_key", "num_paddings")
    inner = {k: v for k, v in values.items() if k not in outer}
    return {**{k: values[k] for k in outer}, "model_kwargs": inner}


@pytest.mark.parametrize("nested", [True, False])
def test_published_settings_of_regina(nested):
    adamson, dixit = (published.regina_config(regina_entry(i, nested)) for i in (0, 1))
    # The defaults of `published` are Adamson's.
    assert adamson == REGINAConfig.published()
    different = {
        "silence_val": -0.1,
        "w_rec": 3.0,
        "w_pair": 3.0,
        "w_class": 0.1,
        "w_cycle": 1.0,
        "w_adv": 0.1,
    }
    assert dixit == adamson.replace(**different)
    sizes = ("n_tokens", "d_model", "n_layers", "n_heads", "z_dim")
    assert [getattr(dixit, name) for name in sizes] == [16, 512, 4, 8, 256]
    # The published weight is one of a sum over 256 dimensions.
    assert adamson.w_centre == dixit.w_centre == 128
    form = ("w_anchor", "label_controls", "output", "states", "patience")
    assert [getattr(dixit, k) for k in form] == [0, False, "decoded", "stress", None]


def test_each_entry_of_regina_arrives_and_can_be_replaced():
    changes = {
        "max_epochs": (7, "max_epochs"),
        "batch_size": (9, "batch_size"),
        "seq_len": (4, "n_tokens"),
        "d_model": (32, "d_model"),
        "n_layers": (1, "n_layers"),
        "n_heads": (2, "n_heads"),
        "silence_val": (-5.0, "silence_val"),
        "reconFactr": (0.25, "w_rec"),
        "lossClassFactr": (0.3, "w_class"),
        "lossLatentFactr": (0.4, "w_cons"),
        "lossCycleFactr": (0.6, "w_cycle"),
        "adversarialFactr": (0.7, "w_adv"),
        "lossRegFactr": (0.8, "w_reg"),
    }
    for entry, (value, field) in changes.items():
        made = published.regina_config({**regina_entry(0, False), entry: value})
        assert getattr(made, field) == value, entry
        # Two of them are settings of both phases.
        second = {"w_rec": "w_pair", "max_epochs": "phase_2_epochs"}.get(field, field)
        assert made == REGINAConfig.published(**{field: value, second: value}), entry
    small = published.regina_config({"z_dim": 8, "centerFactr": 0.25})
    assert (small.z_dim, small.w_centre) == (8, 2.0)
    assert published.regina_config({"z_dim": 8}).w_centre == 4.0
    given = published.regina_config(regina_entry(0), w_centre=0.5, phase_2_epochs=10)
    assert (given.w_centre, given.phase_2_epochs, given.w_cycle) == (0.5, 10, 5.0)
    small = published.regina_config(regina_entry(0), z_dim=16)
    assert small.w_centre == 8.0


def test_an_unknown_entry_of_regina_is_named():
    with pytest.raises(ConfigError, match="reconFacter.*Did you mean 'reconFactr'"):
        published.regina_config({"reconFacter": 1.0})
    with pytest.raises(ConfigError, match="d_modl.*Did you mean 'd_model'"):
        published.regina_config({"model_kwargs": {"d_modl": 1}})
    with pytest.raises(ConfigError, match="field.*w_rek"):
        published.regina_config({}, w_rek=1.0)


@pytest.mark.parametrize(("n_genes", "places"), [(5060, 5072), (5045, 5056), (64, 64)])
def test_check_12_published_error_counts_the_padding(n_genes, places):
    torch.manual_seed(0)
    made, x = torch.randn(2, 3, n_genes)
    found = published.padded_mse(made, x, 16)
    plain = torch.nn.functional.mse_loss(made, x)
    torch.testing.assert_close(found, plain * n_genes / places)
