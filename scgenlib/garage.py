"""GARAGE: a graph picks seed cells, and a GAN grows new cells from them and noise.

The file reads from top to bottom in the order of the method: configuration, seed
choice, mixed input, the two players of the GAN, and the estimator that runs them. The
cell graph and its attention network (GAT) stand in `scgenlib.graph`, what published
code does otherwise in `scgenlib.published`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from scgenlib.contract import card_of
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.estimator import Config, Estimator, option
from scgenlib.graph import GAT, attention_scores, gat_input, knn_graph
from scgenlib.losses import discriminator_loss, generator_loss
from scgenlib.nets import mlp
from scgenlib.preprocess import filter_genes, rare_types, select_genes
from scgenlib.training import Phase, adam, minibatch

__all__ = [
    "GARAGE",
    "GARAGEConfig",
    "GAT",
    "Discriminator",
    "Generator",
    "attention_scores",
    "choose_seeds",
    "discriminator_step",
    "generator_step",
    "knn_graph",
    "mixed_batch",
    "seed_count",
]

# No matrix of cells x genes larger than this is ever made dense.
_DENSE_BYTES = 1e9


# --------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class GARAGEConfig(Config):
    """Every setting of GARAGE, under its published name where there is one.

    Three settings depart from the documented GAN, in ``paper`` too, because that GAN
    collapses: `output_activation` (documented: sigmoid), `hidden_slope` (0) and
    `adam_beta1` (0.9). No source states `scaling`. See `documented`, `published`.
    """

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "n_genes": 200,
            "gat_epochs": 30,
            "gan_total_iters": 60,
            "generator_hidden": (32, 32),
            "discriminator_hidden": (32, 16),
        },
        "book": {
            "n_genes": 2000,
            "gat_epochs": 100,
            "gan_total_iters": 1000,
            "generator_hidden": (256, 256),
            "discriminator_hidden": (128, 64),
            "d_lr": 2e-4,
        },
        "paper": {},
    }

    # The cell graph and the GAT.
    n_genes: int | None = option(None, "genes to choose; None: as the card says", low=1)
    n_neighbors: int = option(5, "neighbours of a cell, itself included", low=1)
    gat_epochs: int = option(7501, "full-batch epochs of the GAT", low=0)
    gat_hidden: int = option(32, "units per attention head", low=1)
    gat_heads: int = option(8, "attention heads of the first layer", low=1)
    gat_lr: float = option(5e-3, "learning rate of the GAT", above=0)
    negative_slope: float = option(0.2, "leaky ReLU inside the attention", low=0)
    priority_weight: float = option(2.0, "rare rows of the GAT times 1 + this", low=0)
    rare_threshold: int | None = option(
        None, "fewer cells are rare; None: the card's, else under 5 %", low=1
    )
    rare_rule: str = option("<", "how the threshold is read", choices=("<", "<="))
    # The seeds.
    seed_rule: str = option(
        "attention", "who is a seed", choices=("attention", "random", "rare-first")
    )
    leakage_fraction: float = option(
        0.2, "share of seed cells, of all cells and in each batch", low=0, high=1
    )
    # The GAN.
    gan_total_iters: int = option(20001, "iterations of the GAN", low=0)
    nd_steps: int = option(5, "discriminator updates per iteration", low=1)
    ng_steps: int = option(2, "generator updates per iteration", low=1)
    g_lr: float = option(2e-4, "learning rate of the generator", above=0)
    d_lr: float = option(4e-4, "learning rate of the discriminator", above=0)
    label_smooth_real: float = option(0.9, "D's target for real", low=0, high=1)
    label_smooth_fake: float = option(0.1, "D's target for generated", low=0, high=1)
    generator_hidden: tuple[int, ...] = option((1024, 1024), "widths in G", low=1)
    discriminator_hidden: tuple[int, ...] = option((512, 256), "widths in D", low=1)
    hidden_slope: float = option(0.2, "hidden units below 0; 0 is ReLU", low=0)
    output_activation: str = option(
        "relu", "last layer of G", choices=("sigmoid", "relu", "linear")
    )
    scaling: str = option(
        "global", "divide by the largest value", choices=("gene", "global", "none")
    )
    noise: str = option("normal", "of G's input", choices=("normal", "uniform"))
    batch_size: int | None = option(
        64, "cells per update; None: all, one input per iteration", low=2
    )
    optimiser: str = option("adam", "of D and G", choices=("adam", "rmsprop"))
    adam_beta1: float = option(0.5, "Adam's memory of gradients", low=0, high=0.999)
    clip_norm: float | None = option(None, "largest gradient norm", above=0)

    @classmethod
    def documented(cls, profile: str = "paper", **overrides: Any) -> Self:
        """Return the GAN as the method's documentation describes it."""
        form = {"hidden_slope": 0.0, "output_activation": "sigmoid", "adam_beta1": 0.9}
        return cls.profile(profile, **{**form, "d_lr": 4e-4, **overrides})

    @classmethod
    def published(cls, profile: str = "paper", **overrides: Any) -> Self:
        """Return the combination that the published code runs.

        RitwikGanguly/GARAGE, commit f56180c, data_generation/garage.py. The seed rule
        of that code stands in `scgenlib.published`.
        """
        form = {
            "rare_rule": "<=",
            "d_lr": 4e-4,
            "output_activation": "linear",
            "scaling": "none",
            "noise": "uniform",
            "batch_size": None,
            "optimiser": "rmsprop",
            "clip_norm": 1.0,
        }
        return cls.profile(profile, **{**form, **overrides})


# ------------------------------------------------------------------- the seeds


def seed_count(n: int, leakage_fraction: float) -> int:
    """Return how many of n rows are seeds: the share of n, rounded up."""
    # 0.07 * 100 is 7.000000000000001 in floating point and must not become 8.
    return math.ceil(round(n * leakage_fraction, 9))


def choose_seeds(
    n_seeds: int,
    n_cells: int,
    rule: str = "attention",
    *,
    scores: Tensor | np.ndarray | None = None,
    is_rare: np.ndarray | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Choose seed cells.

    Parameters
    ----------
    n_seeds, n_cells
        How many to choose, from how many.
    rule
        ``"attention"``: the highest `scores`, ties to the cell that comes first.
        ``"random"``: uniformly. ``"rare-first"``: the cells marked `is_rare`, then
        the others, each group in random order.
    scores, is_rare
        Shape (n_cells,), for the rules that use them.
    rng
        For the two random rules.

    Returns
    -------
    numpy.ndarray
        int64, shape (n_seeds,): cell numbers, the first choice first.
    """
    if not 0 <= n_seeds <= n_cells:
        limits = f"0 to {n_cells}"
        raise ConfigError(message("n_seeds is off", found=n_seeds, allowed=limits))
    if rule == "attention" and scores is not None:
        values = torch.as_tensor(scores).detach().cpu().numpy()
        return np.argsort(-values, kind="stable")[:n_seeds]
    if rule == "random" and rng is not None:
        return rng.permutation(n_cells)[:n_seeds]
    if rule == "rare-first" and rng is not None and is_rare is not None:
        order = rng.permutation(n_cells)
        return order[np.argsort(~is_rare[order], kind="stable")][:n_seeds]
    needs = {"attention": "scores", "random": "rng", "rare-first": "is_rare and rng"}
    if rule not in needs:
        raise unknown("seed rule", rule, needs)
    raise ConfigError(message(f"The seed rule {rule!r} needs {needs[rule]}"))


def mixed_batch(
    batch_size: int,
    seeds: Tensor,
    leakage_fraction: float,
    *,
    noise: str = "normal",
    generator: torch.Generator | None = None,
    picks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the generator's input: rows of noise above rows of seed cells.

    Parameters
    ----------
    batch_size
        Number of rows B. ``seed_count(B, leakage_fraction)`` of them are seeds.
    seeds
        Seed cells, shape (n_seeds, n_genes). Gives width and device, also if empty.
    leakage_fraction
        Share of seed rows; 0 is a plain GAN and draws the same noise as one.
    noise
        ``"normal"`` for N(0, 1), ``"uniform"`` for (-1, 1).
    generator
        Source of the random numbers.
    picks
        Rows of `seeds` to use, in this order, in place of a draw with replacement.

    Returns
    -------
    batch, origin
        Shapes (B, n_genes) and (B,). `origin` is the row of `seeds`, or -1 for noise.
    """
    n_seed = seed_count(batch_size, leakage_fraction) if picks is None else len(picks)
    n_noise = max(0, batch_size - n_seed)
    batch = seeds.new_empty(n_noise + n_seed, seeds.shape[1])
    if noise == "normal":
        batch[:n_noise].normal_(generator=generator)
    else:
        batch[:n_noise].uniform_(-1, 1, generator=generator)
    origin = torch.full((len(batch),), -1, device=seeds.device)
    if n_seed:
        if picks is None:
            shape, device = (n_seed,), seeds.device
            picks = torch.randint(len(seeds), shape, generator=generator, device=device)
        batch[n_noise:] = seeds[picks]
        origin[n_noise:] = picks
    return batch, origin


# --------------------------------------------------------------------- the GAN


class Generator(nn.Sequential):
    """Map noise or a seed cell to a cell: genes -> hidden -> genes.

    Parameters
    ----------
    n_genes
        Width of input and output; the input is as wide because seeds are cells.
    hidden
        Widths of the hidden layers.
    output_activation
        ``"sigmoid"`` (0 to 1), ``"relu"`` (from 0, with true zeros) or ``"linear"``.
    hidden_slope
        Slope of the hidden units below zero; 0 is ReLU.
    """

    def __init__(
        self,
        n_genes: int,
        hidden: tuple[int, ...] = (1024, 1024),
        *,
        output_activation: str = "sigmoid",
        hidden_slope: float = 0.0,
    ) -> None:
        last = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "linear": None}
        widths = [n_genes, *hidden, n_genes]
        super().__init__(*mlp(widths, _unit(hidden_slope), last[output_activation]))


class Discriminator(nn.Sequential):
    """Map a cell to one logit, high for real: genes -> hidden -> 1."""

    def __init__(
        self,
        n_genes: int,
        hidden: tuple[int, ...] = (512, 256),
        *,
        hidden_slope: float = 0.0,
    ) -> None:
        super().__init__(*mlp([n_genes, *hidden, 1], _unit(hidden_slope)))


def _unit(slope: float) -> Any:
    return nn.ReLU if slope == 0 else lambda: nn.LeakyReLU(slope)


def discriminator_step(
    discriminator: nn.Module,
    optimiser: Optimizer,
    real: Tensor,
    fake: Tensor,
    *,
    real_target: float = 0.9,
    fake_target: float = 0.1,
    clip_norm: float | None = None,
) -> Tensor:
    """Update the discriminator once and return its loss before the update.

    Parameters
    ----------
    real, fake
        Cells, shape (n, n_genes) each; `fake` carries no gradient.
    real_target, fake_target
        Smoothed labels.
    clip_norm
        Largest norm of the gradient.
    """
    # One pass over both halves: fewer and larger products.
    logits = discriminator(torch.cat([real, fake]))
    of_real, of_fake = logits.split([len(real), len(fake)])
    loss = discriminator_loss(of_real, of_fake, real_target, fake_target)
    return _update(discriminator, optimiser, loss, clip_norm)


def generator_step(
    generator: nn.Module,
    discriminator: nn.Module,
    optimiser: Optimizer,
    batch: Tensor,
    *,
    clip_norm: float | None = None,
) -> Tensor:
    """Update the generator once and return its loss before the update.

    Parameters
    ----------
    batch
        From `mixed_batch`, shape (n_rows, n_genes).
    clip_norm
        Largest norm of the gradient.
    """
    loss = generator_loss(discriminator(generator(batch)))
    return _update(generator, optimiser, loss, clip_norm)


def _update(
    net: nn.Module, optimiser: Optimizer, loss: Tensor, clip_norm: float | None = None
) -> Tensor:
    parameters = list(net.parameters())
    optimiser.zero_grad()
    # Only this player's gradients are computed; the other one is left alone.
    loss.backward(inputs=parameters)
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimiser.step()
    return loss.detach()


# --------------------------------------------------------------- the estimator


class GARAGE(Estimator):
    """Generate cells with a GAN that is fed seed cells chosen by graph attention.

    Parameters
    ----------
    config, seed, device
        See `Estimator`; the configuration is a `GARAGEConfig`.
    """

    method = "garage"
    config_class = GARAGEConfig
    tasks = frozenset({"select_seeds", "generate"})
    config: GARAGEConfig

    # ----- preparation

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        c = self.config
        if label_key is None:
            do = "Give label_key, a column of adata.obs."
            raise DataError(message("GARAGE needs cell types to learn from", do=do))
        adata = self._choose_genes(adata)
        self.genes_ = [str(name) for name in adata.var_names]
        self._X = sparse.csr_matrix(adata.X, dtype=np.float32)
        labels = adata.obs[label_key].astype(str)
        codes = np.searchsorted(self.labels_, labels)
        rare = rare_types(labels, self._rare_threshold(adata), c.rare_rule)
        is_rare = labels.isin(rare).to_numpy()
        n_seeds = seed_count(adata.n_obs, c.leakage_fraction)
        self.sizes_ = {
            "n_genes": adata.n_vars,
            "n_types": len(self.labels_),
            "has_gat": c.seed_rule == "attention" and n_seeds > 0,
        }
        self.facts_ = {
            "rare_types": rare,
            "cells": [str(name) for name in adata.obs_names],
            "non_negative": bool(self._X.min() >= 0),
        }
        self._build()
        self.arrays_["codes"] = torch.from_numpy(codes)
        self.arrays_["is_rare"] = torch.from_numpy(is_rare)
        self.arrays_["scale"] = _scale(self._X, c.scaling)
        self._fit_labels(codes)
        if self.sizes_["has_gat"]:
            self.arrays_["edge_index"] = knn_graph(self._X, c.n_neighbors)
        else:
            rule = c.seed_rule if n_seeds else "random"
            n_cells, rng = adata.n_obs, self.np_rng_
            seeds = choose_seeds(n_seeds, n_cells, rule, is_rare=is_rare, rng=rng)
            self._keep_seeds(seeds)

    def _choose_genes(self, adata: AnnData) -> AnnData:
        """Return the training cells with the genes that the model uses."""
        n_genes = self.config.n_genes
        if n_genes is not None:
            few = n_genes >= adata.n_vars
            return adata if few else adata[:, select_genes(adata, n_genes)]
        rule = (card_of(adata).get("recipe") or {}).get("gene_filter")
        return adata[:, filter_genes(adata, **rule)] if rule else adata

    def _rare_threshold(self, adata: AnnData) -> int | None:
        """Return the threshold; the card's is scaled to the share of cells given."""
        if self.config.rare_threshold is not None:
            return self.config.rare_threshold
        card = card_of(adata)
        threshold, n_cells = card.get("rare_threshold"), card.get("n_cells")
        if threshold is None or not n_cells:
            return None
        # A threshold of 200 cells means 140 of them in a training set of 70 %.
        return max(1, round(threshold * min(1.0, adata.n_obs / n_cells)))

    def _build(self) -> None:
        c, n_genes = self.config, self.sizes_["n_genes"]
        slope, last = c.hidden_slope, c.output_activation
        # The GAN comes first, so that its start does not depend on the seed rule.
        self.modules_["generator"] = Generator(
            n_genes, c.generator_hidden, output_activation=last, hidden_slope=slope
        )
        self.modules_["discriminator"] = Discriminator(
            n_genes, c.discriminator_hidden, hidden_slope=slope
        )
        if self.sizes_["has_gat"]:
            widths = (n_genes, self.sizes_["n_types"], c.gat_hidden, c.gat_heads)
            self.modules_["gat"] = GAT(*widths, c.negative_slope)

    def _fit_labels(self, codes: np.ndarray) -> None:
        """Fit the classifier that names generated cells, on real training cells."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        with warnings.catch_warnings():
            # 200 steps settle the labels, if not the last digits of the weights.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=0.1, max_iter=200, tol=1e-3)
            model.fit(self._X, codes)
        weight, bias = model.coef_, model.intercept_
        if len(weight) == 1:  # two types: scikit-learn keeps one row
            weight, bias = np.vstack([-weight, weight]) / 2, np.append(-bias, bias) / 2
        self.arrays_["label_weight"] = torch.from_numpy(weight.astype(np.float32))
        self.arrays_["label_bias"] = torch.from_numpy(bias.astype(np.float32))

    def _keep_seeds(self, seeds: np.ndarray, scores: Tensor | None = None) -> None:
        if scores is None:
            scores = torch.full((self.n_cells_,), torch.nan, dtype=torch.float64)
        self.arrays_["scores"] = scores
        self.arrays_["seeds"] = torch.from_numpy(seeds)
        advice = "Lower leakage_fraction or n_genes."
        self.arrays_["seed_rows"] = _dense(self._X[seeds], "cpu", advice)

    # ----- training

    def _phases(self) -> list[Phase]:
        c = self.config
        gat = (c.gat_epochs, self._gat_step, self._begin_gat, self._end_gat)
        gan = (c.gan_total_iters, self._gan_step, self._begin_gan)
        phases = [Phase("gat", *gat), Phase("gan", *gan)]
        return phases if self.sizes_["has_gat"] else phases[1:]

    def _begin_gat(self) -> None:
        rare = self.arrays_["is_rare"].float()
        boost = (1 + self.config.priority_weight * rare)[:, None].to(self.device_)
        edges = self.arrays_["edge_index"].to(self.device_)
        self._gat_input = (gat_input(self._X, self.device_, _DENSE_BYTES), edges, boost)
        self._codes = self.arrays_["codes"].to(self.device_)
        weights = self.modules_["gat"].parameters()
        self.optimisers_["gat"] = adam(weights, self.config.gat_lr)

    def _gat_step(self, step: int) -> dict[str, Tensor]:
        gat = self.modules_["gat"]
        logits = gat(*self._gat_input)
        loss = F.cross_entropy(logits, self._codes)
        right = (logits.detach().argmax(1) == self._codes).float().mean()
        loss = _update(gat, self.optimisers_["gat"], loss)
        return {"gat_loss": loss, "gat_accuracy": right}

    def _end_gat(self) -> None:
        n_cells = self.n_cells_
        with torch.no_grad():
            gat = cast(GAT, self.modules_["gat"])
            scores = attention_scores(*gat.attention(*self._gat_input), n_cells)
        n_seeds = seed_count(n_cells, self.config.leakage_fraction)
        self._keep_seeds(choose_seeds(n_seeds, n_cells, scores=scores), scores)

    def _begin_gan(self) -> None:
        c = self.config
        inverse = sparse.diags(1 / self.arrays_["scale"].numpy())
        self._real = (self._X @ inverse).tocsr()
        self._seeds = self._scaled_seeds()
        for name, lr in (("generator", c.g_lr), ("discriminator", c.d_lr)):
            weights = self.modules_[name].parameters()
            self.optimisers_[name] = (
                adam(weights, lr, betas=(c.adam_beta1, 0.999))
                if c.optimiser == "adam"
                else torch.optim.RMSprop(weights, lr)
            )
        self._whole = torch.empty(0)
        if c.batch_size is None:
            self._whole = _dense(self._real, self.device_, "Set batch_size, say to 64.")

    def _release(self) -> None:
        # A fitted model keeps its seed cells and no other cell.
        for name in ("_X", "_real", "_whole", "_seeds", "_codes", "_gat_input"):
            self.__dict__.pop(name, None)

    def _scaled_seeds(self) -> Tensor:
        return (self.arrays_["seed_rows"] / self.arrays_["scale"]).to(self.device_)

    def _gan_step(self, step: int) -> dict[str, Tensor]:
        c, players = self.config, ("generator", "discriminator")
        generator, discriminator = (self.modules_[name] for name in players)
        of_g, of_d = (self.optimisers_[name] for name in players)
        whole, clip = c.batch_size is None, c.clip_norm
        aims = {"real_target": c.label_smooth_real, "fake_target": c.label_smooth_fake}
        real = self._real_cells()
        inputs = [self._input() for _ in range(1 if whole else c.nd_steps)]
        # G does not change while D learns: one pass makes the cells of all D updates.
        with torch.no_grad():
            fake = generator(torch.cat(inputs)).chunk(len(inputs))
        for i in range(c.nd_steps):
            x, made = real[i % len(real)], fake[i % len(fake)]
            d_loss = discriminator_step(
                discriminator, of_d, x, made, **aims, clip_norm=clip
            )
        for _ in range(c.ng_steps):
            z = inputs[0] if whole else self._input()
            g_loss = generator_step(generator, discriminator, of_g, z, clip_norm=clip)
        return {"d_loss": d_loss, "g_loss": g_loss}

    def _real_cells(self) -> tuple[Tensor, ...]:
        """Return the real cells of one iteration's D updates."""
        c = self.config
        if c.batch_size is None:
            return (self._whole,)
        shape, rng, device = (c.nd_steps * c.batch_size,), self.rng_, self.device_
        rows = torch.randint(self.n_cells_, shape, generator=rng, device=device)
        real = minibatch(self._real, rows.cpu().numpy(), device)
        return real.chunk(c.nd_steps)

    def _input(self) -> Tensor:
        """Return one batch of the generator's input."""
        c, seeds, picks = self.config, self._seeds, None
        if c.batch_size is None:  # every seed once, in order
            picks = torch.arange(len(seeds), device=self.device_)
        n, leak, rng = c.batch_size or self.n_cells_, c.leakage_fraction, self.rng_
        return mixed_batch(n, seeds, leak, noise=c.noise, generator=rng, picks=picks)[0]

    # ----- what a fitted model offers

    def select_seeds(self) -> pd.DataFrame:
        """Return the seed cells, first choice first.

        Returns
        -------
        pandas.DataFrame
            Columns rank (from 1), cell, cell_type, score and is_rare. The score is
            NaN where the seed rule uses none.
        """
        self._check_fitted()
        seeds = self.arrays_["seeds"].numpy()
        columns = {
            "rank": np.arange(1, len(seeds) + 1),
            "cell": np.asarray(self.facts_["cells"], dtype=object)[seeds],
            "cell_type": np.asarray(self.labels_)[self.arrays_["codes"].numpy()[seeds]],
            "score": self.arrays_["scores"].numpy()[seeds],
            "is_rare": self.arrays_["is_rare"].numpy()[seeds],
        }
        return pd.DataFrame(columns)

    @torch.no_grad()
    def generate(
        self, n_cells: int, *, seed: int | None = None, seed_share: float | None = None
    ) -> AnnData:
        """Generate cells; a callback may call this while the GAN is trained.

        Parameters
        ----------
        n_cells
            How many cells.
        seed
            The same seed gives the same cells; the model's own by default.
        seed_share
            Share of cells grown from seed cells, 0 to 1; the rest come from noise.
            By default the leakage fraction of the training.

        Returns
        -------
        AnnData
            X: CSR float32 on the scale of the training data. ``obs``: the fitted
            label column and label_confidence (a classifier trained on real cells),
            from_seed and seed_cell (empty for noise). Values below 0 become 0 if the
            training data has none; ``uns["scgenlib"]`` has their clipped_share.

        Raises
        ------
        ConfigError
            `n_cells` is below 1, or `seed_share` is outside 0 to 1.
        """
        if "seeds" not in getattr(self, "arrays_", {}):
            self._check_fitted()
        if n_cells < 1:
            raise ConfigError(message("n_cells must be at least 1", found=n_cells))
        share = self.config.leakage_fraction if seed_share is None else seed_share
        if not 0 <= share <= 1 or (share > 0 and not len(self.arrays_["seeds"])):
            limits = "0 to 1, and only 0 without seeds"
            raise ConfigError(message("seed_share is off", found=share, allowed=limits))
        seed = self.seed if seed is None else seed
        rng = torch.Generator(self.device_).manual_seed(seed)
        seeds, noise = self._scaled_seeds(), self.config.noise
        scale = self.arrays_["scale"].to(self.device_)
        most = max(1, int(_DENSE_BYTES // (4 * len(self.genes_))))
        blocks, origins, clipped = [], [], 0
        for n in (min(most, n_cells - i) for i in range(0, n_cells, most)):
            z, origin = mixed_batch(n, seeds, share, noise=noise, generator=rng)
            origins.append(origin.cpu().numpy())
            for part in z.split(1024):
                x = self.modules_["generator"](part) * scale
                if self.facts_["non_negative"]:
                    clipped += int((x < 0).sum())
                    x = x.clamp_min(0)
                blocks.append(sparse.csr_matrix(x.cpu().numpy()))
        X = sparse.vstack(blocks, format="csr")
        about = self.provenance(verb="generate", generate_seed=seed, seed_share=share)
        about["clipped_share"] = clipped / (n_cells * X.shape[1])
        var = pd.DataFrame(index=pd.Index(self.genes_, dtype=str))
        obs = self._describe(X, np.concatenate(origins))
        return AnnData(X, obs=obs, var=var, uns={"scgenlib": about})

    def _describe(self, X: sparse.csr_matrix, origin: np.ndarray) -> pd.DataFrame:
        """Return the obs table of generated cells."""
        weight, bias = self.arrays_["label_weight"], self.arrays_["label_bias"]
        logits = torch.from_numpy(X @ weight.numpy().T) + bias
        confidence, code = torch.softmax(logits, 1).max(1)
        labels = np.asarray(self.labels_, dtype=object)
        names = [self.facts_["cells"][i] for i in self.arrays_["seeds"]]
        return pd.DataFrame(
            {
                self.label_key_: pd.Categorical(labels[code.numpy()], self.labels_),
                "label_confidence": confidence.numpy(),
                "from_seed": origin >= 0,
                "seed_cell": [names[i] if i >= 0 else "" for i in origin],
            },
            index=[f"garage_{i}" for i in range(len(origin))],
        )


def _scale(X: sparse.csr_matrix, scaling: str) -> Tensor:
    """Return what each gene is divided by before the GAN, float32 (n_genes,)."""
    largest = abs(X).max(axis=0).toarray().ravel()
    if scaling == "global":
        largest[:] = largest.max()
    largest[(largest == 0) | (scaling == "none")] = 1
    return torch.from_numpy(largest.astype(np.float32))


def _dense(X: sparse.csr_matrix, device: torch.device | str, do: str) -> Tensor:
    """Return all rows as one dense tensor, or say what to do if they pass 1 GB."""
    if 4 * X.shape[0] * X.shape[1] > _DENSE_BYTES:
        raise ConfigError(message("Too many cells for 1 GB", found=X.shape, do=do))
    return minibatch(X, slice(None), device)
