"""What published code does where it differs from its description or from this package.

Each function is one difference, small enough to read, and names where it was seen:
repository, commit, file. Chapters show the effect; the methods stay free of it.
Paths without a repository are those of RitwikGanguly/GARAGE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.special import gammaln
from torch import Tensor, nn

from scgenlib.cscgan import CscGANConfig, ScGANConfig
from scgenlib.dropout import Entries, Parameters, dropout_probability
from scgenlib.errors import ConfigError, message, unknown
from scgenlib.garage import seed_count
from scgenlib.nets import mlp
from scgenlib.regina import REGINAConfig
from scgenlib.scgacl import ScGACL, ScGACLConfig
from scgenlib.vaegan import Encoder

__all__ = [
    "Discriminator",
    "SCGAN_PARAMETERS",
    "ScGACLAsPublished",
    "degree_scores",
    "edge_index_scores",
    "generated_sizes",
    "lowest_fano_genes",
    "misaligned_scores",
    "padded_mse",
    "plain_densities",
    "rare_utility_sizes",
    "regina_config",
    "scgacl_config",
    "scgacl_dropout",
    "scgan_config",
    "sorted_ratios",
]


def _self_links_last(edge_index: Tensor, n_cells: int) -> Tensor:
    """Return the links in the order in which GATConv of torch_geometric keeps them."""
    others = edge_index[:, edge_index[0] != edge_index[1]]
    cells = torch.arange(n_cells, device=edge_index.device)
    return torch.cat([others, cells.expand(2, -1)], dim=1)


def _mean_where(values: Tensor, edge_index: Tensor, n_cells: int) -> Tensor:
    """Mean of `values` over the positions at which a cell is in the upper row."""
    cell = edge_index[0].cpu()
    total = torch.zeros(n_cells, dtype=torch.float64)
    total.index_add_(0, cell, values.cpu().double())
    return total / torch.bincount(cell, minlength=n_cells).clamp_min(1)


def edge_index_scores(edge_index: Tensor, n_cells: int) -> Tensor:
    """Score cells as the main script does: by cell numbers, not by attention.

    GATConv returns (output, (links, attention)). The script takes the first part of
    the pair, so it averages the numbers of linked cells; and it looks them up with
    the positions of the original links, while GATConv has moved self-links to the
    end. The result does not depend on any weight of the network. With k links per
    cell, a cell i from (k - 1) n / k on scores exactly k i - (k - 1) n + (k - 1) / 2.

    Commits e58732f, f56180c and c00b333: data_generation/garage.py.

    Parameters
    ----------
    edge_index
        From `garage.knn_graph`, shape (2, n_links).
    n_cells
        Number of cells.

    Returns
    -------
    torch.Tensor
        float64, shape (n_cells,).
    """
    links = _self_links_last(edge_index, n_cells)
    return _mean_where(links.double().mean(0), edge_index, n_cells)


def misaligned_scores(edge_index: Tensor, alpha: Tensor, n_cells: int) -> Tensor:
    """Score cells by attention looked up at the positions of the original links.

    The attention is the right one, but in GATConv's order, with self-links last. So
    a cell is given attention that belongs to other cells.

    Commit c00b333: biological_analysis/rare_cell_utility.py.

    Parameters
    ----------
    edge_index
        From `garage.knn_graph`, shape (2, n_links).
    alpha
        From `garage.GAT.attention`, shape (n_links, 1).
    n_cells
        Number of cells.
    """
    return _mean_where(alpha.reshape(-1), edge_index, n_cells)


def degree_scores(edge_index: Tensor, n_cells: int) -> Tensor:
    """Score cells by the graph alone: what attention gives if it is uniform.

    Each cell gives one over its number of incoming links to each of them; a cell's
    score is the mean of what it receives. A reference for `garage.attention_scores`.
    """
    listeners = torch.bincount(edge_index[1], minlength=n_cells).clamp_min(1)
    return _mean_where(1 / listeners[edge_index[1]].double(), edge_index, n_cells)


class Discriminator(nn.Module):
    """The discriminator of the code: one more linear layer, as wide as the genes.

    No activation stands between that layer and the last one, so the two together can
    express what one linear layer can. The documentation has genes -> 512 -> 256 -> 1.

    Commit f56180c: data_generation/garage.py.
    """

    def __init__(self, n_genes: int, hidden: tuple[int, ...] = (512, 256)) -> None:
        super().__init__()
        unit = nn.LeakyReLU
        self.body = mlp([n_genes, *hidden], lambda: unit(0.2), output=lambda: unit(0.2))
        self.extra = nn.Linear(hidden[-1], n_genes)
        self.last = nn.Linear(n_genes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return one logit per cell, shape (n_cells, 1)."""
        return self.last(self.extra(self.body(x)))


def lowest_fano_genes(X: Any, n_genes: int = 100) -> np.ndarray:
    """Return the genes of *lowest* variance over mean, lowest first.

    The documentation describes the highest.

    Commit c00b333: data_validation/feature_selection.py.

    Parameters
    ----------
    X
        Shape (n_cells, n_genes), dense or sparse.
    n_genes
        How many.
    """
    X = sparse.csr_matrix(X, dtype=np.float64)
    mean = np.asarray(X.mean(axis=0)).ravel()
    variance = np.asarray(X.multiply(X).mean(axis=0)).ravel() - mean**2
    return np.argsort(variance / (mean + 1e-12), kind="stable")[:n_genes]


def generated_sizes(n_cells: int) -> list[int]:
    """Return the sizes of the six generated files: 25 % to 150 % of the real cells.

    Commit f56180c: data_generation/garage.py.
    """
    return [int(share * n_cells) for share in np.arange(0.25, 1.75, 0.25)]


def rare_utility_sizes(n_cells: int, n_rare: int) -> dict[str, int]:
    """Return the sizes of the published rare-cell experiment.

    Half of the rare and half of the other cells are held out, each half rounded
    down; the synthetic cells are ten times the rare training cells.

    Commit c00b333: biological_analysis/rare_cell_utility.py.
    """
    n_others = n_cells - n_rare
    rare_test = max(1, n_rare // 2)
    rare_train = n_rare - rare_test
    n_train = rare_train + n_others - max(1, n_others // 2)
    return {
        "rare_train": rare_train,
        "rare_test": rare_test,
        "n_train": n_train,
        "n_seeds": seed_count(n_train, 0.2),
        "n_generated": 10 * rare_train,
    }


# ------------------------------------------------------- scGAN and cscGAN


def sorted_ratios(ratios: Mapping[str, float]) -> list[float]:
    """Return the class shares in the order in which they are sampled: largest first.

    imsb-uke/scGAN, commit 0fc1bdf: shares are ordered by class and then sorted by
    size, and cell i of the result gets class i. That is right only where the classes
    are numbered by falling size, as Louvain clusters are and labels need not be.
    """
    return sorted(ratios.values(), reverse=True)


#: Entry of the published parameter file (imsb-uke/scGAN, parameters.json) -> field of
#: `ScGANConfig` or `CscGANConfig`, or the argument that takes its place.
SCGAN_PARAMETERS = {
    "input_ds.clustering.res": "clustering_res",
    "input_ds.filtering.min_cells": "min_cells",
    "input_ds.filtering.min_genes": "min_genes",
    "input_ds.raw_input": "fit(adata)",
    "input_ds.scale": "target_sum",
    "input_ds.split.balanced_split": "balanced_split",
    "input_ds.split.split_seed": "split_seed",
    "input_ds.split.test_cells": "test_cells",
    "input_ds.split.valid_cells": "valid_cells",
    "training.batch_size": "batch_size",
    "training.checkpoint": "fit(checkpoint_dir, resume)",
    "training.critic_iters": "critic_updates",
    "training.learning_rate.alpha_0": "alpha_0",
    "training.learning_rate.alpha_final": "alpha_final",
    "training.learning_rate.decay": "decay",
    "training.max_steps": "max_steps",
    "training.optimizer.algorithm": "algorithm",
    "training.optimizer.beta1": "beta1",
    "training.optimizer.beta2": "beta2",
    "training.progress_freq": "the progress bar",
    "training.save_freq": "save_freq",
    "training.summary_freq": "summary_freq",
    "training.validation_freq": "validation_freq",
    "model.type": "ScGAN or CscGAN",
    "model.latent_dim": "latent_dim",
    "model.output_LSN": "output_lsn",
    "model.lambd": "lambd",
    "model.critic_layers": "critic_layers",
    "model.gen_layers": "gen_layers",
    "model.critic_cond_type": "critic_cond_type",
    "model.gen_cond_type": "gen_cond_type",
}


def scgan_config(
    parameters: Mapping[str, Any], **overrides: Any
) -> ScGANConfig | CscGANConfig:
    """Read one experiment of a published parameter file.

    Parameters
    ----------
    parameters
        The dictionary of one experiment: the keys ``input_ds``, ``training`` and
        ``model`` of parameters.json.
    **overrides
        Fields to set in place of the file's.

    Returns
    -------
    ScGANConfig or CscGANConfig
        By the entry ``model.type``. Rates and counts are the file's own; see
        `ScGANConfig.published` for the number of critic updates.

    Raises
    ------
    ConfigError
        An entry is unknown, or its value cannot be read.
    """
    entries = dict(_flat(parameters))
    kinds = {"scGAN": ScGANConfig, "cscGAN": CscGANConfig}
    kind = entries.get("model.type", "cscGAN")
    if kind not in kinds:
        raise unknown("model.type", kind, kinds)
    fields = set(kinds[kind].table().index)
    values: dict[str, Any] = {}
    for key, value in entries.items():
        if key not in SCGAN_PARAMETERS:
            raise unknown("entry of the parameter file", key, SCGAN_PARAMETERS)
        name = SCGAN_PARAMETERS[key]
        if name == "target_sum":
            value = _total_in(value)
        elif name == "split_seed" and value == "default":
            value = 0
        if name in fields:
            values[name] = value
    return kinds[kind].from_dict({**values, **overrides})


def _flat(values: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def _total_in(scale: Any) -> float:
    """Return the total that a text such as normalize_per_cell_LS_20000 ends in."""
    head, _, total = str(scale).rpartition("_")
    if head != "normalize_per_cell_LS" or not total.isdigit():
        allowed = "normalize_per_cell_LS_<total>"
        raise ConfigError(
            message("The scale cannot be read", found=scale, allowed=allowed)
        )
    return float(total)


# ------------------------------------------------------------------- scGACL


def plain_densities(x: Entries, p: Parameters) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gamma part's shares from densities that are not logarithms.

    Hhjyl/scGACL, commit 6d4d2dd, its dropout identification. The share is 0 where the
    Gamma's density is 0. Where the Normal part has shrunk to one value its standard
    deviation is 0 and its density no number; that spreads to all parameters of the gene
    in the group, whose zeros then count as no dropouts. Stands in for
    `dropout.expect_log`.
    """
    rate, a, b, mean, sd = (part[x.seg] for part in p)
    with np.errstate(all="ignore"):
        log_gamma = a * np.log(b) - gammaln(a) + (a - 1) * x.log - b * x.value
        gamma = rate * np.exp(log_gamma)
        gap = (x.value - mean) / sd
        normal = (1 - rate) * np.exp(-0.5 * gap**2) / (sd * np.sqrt(2 * np.pi))
        share = np.where(gamma == 0, 0.0, gamma / (gamma + normal))
        return share, x.sum(np.log10(gamma + normal))


def scgacl_dropout(counts: Any, groups: Any) -> pd.DataFrame:
    """Return the dropout table that the published code computes.

    Hhjyl/scGACL, commit 6d4d2dd. The values are read as float32, in which ln 1.01 is
    another number than in float64. No value equals it, so the share of zeros is
    counted as 0: the filter of genes with more than 95 % zeros never acts, and every
    fit starts with the rate 0.01.

    Parameters
    ----------
    counts, groups
        As in `dropout.dropout_probability`.
    """
    options: Any = {"start_rate": 0.01, "min_sd": 0.0, "expect": plain_densities}
    return dropout_probability(counts, groups, max_zeros=1.0, **options)


class ScGACLAsPublished(ScGACL):
    """scGACL with the published start of the code's variance.

    Hhjyl/scGACL, commit 6d4d2dd: after pre-training the head of the log variance is a
    copy of the head of the mean, so that a cell far from the origin gets a code of huge
    or of vanishing variance.
    """

    method = "scgacl-as-published"

    @torch.no_grad()
    def _start_mixture(self) -> None:
        super()._start_mixture()
        encoder = cast(Encoder, self.modules_["encoder"])
        encoder.log_variance.load_state_dict(encoder.mean.state_dict())


def scgacl_config(published: Mapping[str, Any], **overrides: Any) -> ScGACLConfig:
    """Read the published configuration dictionary of scGACL.

    Hhjyl/scGACL, commit 6d4d2dd. The names are those of the code or of the README,
    which has VAE_EPOCH, VAE_LR where the code has VAEEPOCH, VAELR. What runs is
    `ScGACLConfig.published` with these values.

    Parameters
    ----------
    published
        Upper-case names and values; the dictionary TRAIN may be nested.
    **overrides
        Fields to set in place of the dictionary's.

    Raises
    ------
    ConfigError
        A name is unknown.
    """
    names = {name.rpartition(".")[2]: v for name, v in _flat(published)}
    known = {name.upper(): name for name in ScGACLConfig.table().index}
    known |= {"VAE_EPOCH": "vaeepoch", "VAE_LR": "vaelr"}
    known |= {"GENENUM": "n_genes"}
    values = {}
    for name, value in names.items():
        # Counted from the data, or an argument of the estimator.
        if name in ("CUDA", "DEVICE", "N_CLASS"):
            continue
        if name not in known:
            raise unknown("entry of the configuration", name, [*known, "N_CLASS"])
        values[known[name]] = value
    return ScGACLConfig.published(**{**values, **overrides})


def regina_config(published: Mapping[str, Any], **overrides: Any) -> REGINAConfig:
    """Read the published settings of REGINA for one data set.

    Dudgit/single_cell, commit c194977, ``config.yaml``: the entry of a data set, with
    or without its nested ``model_kwargs``. What it says of the data (paths, keys,
    classes, sizes of the padding) is left out. What runs is `REGINAConfig.published`
    with these values.

    Parameters
    ----------
    published
        Names and values.
    **overrides
        Fields to set in place of these.

    Raises
    ------
    ConfigError
        A name is unknown.
    """
    names = {name.rpartition(".")[2]: v for name, v in _flat(published)}
    known = {
        "reconFactr": ("w_rec", "w_pair"),
        "lossRegFactr": ("w_reg",),
        "lossClassFactr": ("w_class",),
        "lossLatentFactr": ("w_cons",),
        "centerFactr": ("w_centre",),
        "lossCycleFactr": ("w_cycle",),
        "adversarialFactr": ("w_adv",),
        "seq_len": ("n_tokens",),
        "max_epochs": ("max_epochs", "phase_2_epochs"),
        **{name: (name,) for name in _SAME_IN_REGINA},
    }
    values: dict[str, Any] = {}
    for name, value in names.items():
        if name in _NOT_IN_REGINA:
            continue
        if name not in known:
            raise unknown("entry of the configuration", name, [*known, *_NOT_IN_REGINA])
        values |= dict.fromkeys(known[name], value)
    values |= overrides
    if "centerFactr" in names and "w_centre" not in overrides:
        # Published as a weight of the sum over the code, here of its mean.
        values["w_centre"] *= values.get("z_dim", REGINAConfig().z_dim)
    return REGINAConfig.published(**values)


_SAME_IN_REGINA = (
    *("batch_size", "d_model", "n_layers", "n_heads", "z_dim"),
    "silence_val",
)
_NOT_IN_REGINA = (
    *("perturb_key", "ctrl_key", "num_paddings", "input_dim", "n_real_genes"),
    *("classes", "class_names"),
)


def padded_mse(made: Tensor, x: Tensor, n_tokens: int) -> Tensor:
    """Squared error over genes and padding, as published phase 2 has it.

    Dudgit/single_cell, commit c194977. The padding adds nothing to the sum and counts
    in the mean, so the error is smaller by the share of padding.
    """
    width = -(-x.shape[1] // n_tokens)
    return (made - x).square().sum() / (len(x) * width * n_tokens)
