"""scAtlasVAE: one map for cells of many batches, and labels for new cells.

The file reads from top to bottom: configuration, then the estimator. Minibatches come
from `scgenlib.cells`; the networks and the loss stand in `scgenlib.countvae`, the
likelihoods in `scgenlib.likelihoods`, what puts new cells beside a map in
`scgenlib.mapping` and `scgenlib.surgery`, and what only large atlases need in
`scgenlib.atlas`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional as F

from scgenlib import mapping, surgery
from scgenlib.cells import BLOCK, InMemory, Minibatches
from scgenlib.contract import (
    as_labels,
    check_anndata,
    check_counts,
    check_shape,
    check_values,
)
from scgenlib.countvae import (
    CountVAE,
    Decoder,
    Encoder,
    LossWeights,
    Noise,
)
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.estimator import Config, Estimator, option
from scgenlib.integrators import knn_labels
from scgenlib.losses import class_weights
from scgenlib.preprocess import select_genes
from scgenlib.rowblocks import hash_split
from scgenlib.training import Callback, Event, Phase, minibatch

__all__ = ["ScAtlasVAE", "ScAtlasVAEConfig"]

#: The automatic budget: steps for many cells, for few, and epochs for very few.
_MOST_STEPS, _LEAST_STEPS, _EPOCHS, _MOST_EPOCHS = 6000, 2000, 100, 400

Keys = str | Sequence[str] | None


# --------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class ScAtlasVAEConfig(Config):
    """Every setting of scAtlasVAE, under its published name where it has one.

    Departures from the published code, in ``paper`` too: the learning rate and its
    schedule, the budget of steps and the warm-up counted in steps (`lr`,
    `lr_schedule`, `max_epoch`, `kl_warmup`), no penalty on dropout (`gate_weight`;
    published 1, in code only), heads trained from the first step on
    (`pred_last_n_epoch`; published 10), and held-out cells that stay held out
    (`valid_share`, `patience`). `published` has the published values.
    """

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "n_genes": 200,
            "hidden_stacks": (32,),
            "n_latent": 10,
            "n_per_batch": 32,
            "max_epoch": 4,
            "lr": 3e-3,
        },
        "book": {"n_genes": 2000},
        "paper": {},
    }

    # The cells.
    n_genes: int | None = option(4000, "variable genes to keep; None: all", low=1)
    unlabel_key: str = option("undefined", "label of a cell that has no label")
    valid_share: float = option(
        0.1, "share of cells held out to stop early and to calibrate", low=0, high=0.5
    )
    # The encoder.
    hidden_stacks: tuple[int, ...] = option((128,), "widths in the encoder", low=1)
    n_latent: int = option(10, "length of the latent code z", low=1)
    log_variational: bool = option(True, "whether counts enter as ln(1 + x)")
    total_variational: bool = option(False, "whether cells are scaled to 10,000 first")
    encode_libsize: bool = option(False, "whether the log total is one more input")
    encode_batch: bool = option(False, "whether the batch enters (not in the paper)")
    use_batch_norm: bool = option(True, "batch normalisation in every hidden layer")
    use_layer_norm: bool = option(False, "layer normalisation in every hidden layer")
    bias: bool = option(True, "whether hidden layers have a bias")
    dropout_rate: float = option(0.1, "dropout in the encoder", low=0, high=0.9)
    # The decoder.
    inject_batch: bool = option(True, "whether the decoder is told the batch")
    batch_embedding: str = option(
        "embedding", "how it is told", choices=("embedding", "onehot")
    )
    batch_hidden_dim: int = option(8, "length of a batch's vector", low=1)
    reconstruction_method: str = option(
        "zinb", "likelihood", choices=("zinb", "nb", "poisson", "gaussian")
    )
    dispersion: str = option(
        "gene-cell",
        "what has a dispersion of its own",
        choices=("gene", "gene-batch", "gene-cell"),
    )
    rna_dropout: str = option(
        "gene", "a dropout logit per gene, or one per cell", choices=("gene", "cell")
    )
    # The loss.
    kl_weight: float = option(1.0, "weight of the divergence after warm-up", low=0)
    kl_warmup: int | None = option(
        None, "steps until that weight; None: half of all steps", low=0
    )
    gate_weight: float = option(0.0, "weight of the sum of dropout rates", low=0)
    pred_weight: float = option(1.0, "weight of the label loss", low=0)
    pred_last_n_epoch: int | None = option(
        None, "epochs at the end in which heads learn; None: all", low=0
    )
    pred_last_n_epoch_fconly: bool = option(
        False, "whether heads leave the encoder alone"
    )
    class_weights: bool = option(True, "whether every type weighs the same")
    mmd_key: str | None = option(None, "batch column whose codes are pulled together")
    mmd_weight: float = option(1.0, "weight of that pull", low=0)
    constrain_latent_method: str = option(
        "mse", "how given codes are held", choices=("mse", "normal")
    )
    constrain_weight: float = option(1.0, "weight of that hold", low=0)
    # The training.
    n_per_batch: int = option(128, "cells per update", low=2)
    max_epoch: int | None = option(None, "epochs; None: see `epochs`", low=1)
    lr: float = option(2e-3, "largest learning rate", above=0)
    lr_schedule: str = option(
        "cosine", "how it falls after its first steps", choices=("cosine", "constant")
    )
    weight_decay: float = option(1e-6, "decoupled weight decay", low=0)
    patience: int = option(20, "epochs without a better held-out loss", low=1)

    @classmethod
    def published(cls, n_cells: int, profile: str = "paper", **overrides: Any) -> Self:
        """Return the published settings (WanluLiuLab/scAtlasVAE, commit baa7cdf).

        Parameters
        ----------
        n_cells
            The published number of epochs depends on it: 400 up to 20,000 cells, and
            then so many that 8 million cells are seen in all, each several times.
        profile, overrides
            As in `profile`.
        """
        epochs = max(1, round(min(20_000 / max(n_cells, 1), 1) * 400))
        form: dict[str, Any] = {
            "max_epoch": epochs,
            "lr": 5e-5,
            "lr_schedule": "constant",
            "gate_weight": 1.0,
            "pred_last_n_epoch": 10,
            "valid_share": 0.2,
            "patience": epochs,
            **overrides,
        }
        made = cls.profile(profile, **form)
        per_epoch = math.ceil((1 - made.valid_share) * n_cells / made.n_per_batch)
        warm = made.epochs(n_cells) * per_epoch
        return made.replace(kl_warmup=form.get("kl_warmup", warm))

    def epochs(self, n_cells: int) -> int:
        """Return how often each cell is seen: `max_epoch`, or a budget of steps.

        The budget is 100 epochs, but not more than 6,000 steps and not less than
        2,000; with very few cells 400 epochs, with very many one.
        """
        if self.max_epoch is not None:
            return self.max_epoch
        per_epoch = max(1, math.ceil(n_cells / self.n_per_batch))
        steps = min(max(_EPOCHS * per_epoch, _LEAST_STEPS), _MOST_STEPS)
        return max(1, min(_MOST_EPOCHS, round(steps / per_epoch)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden_stacks:
            raise ConfigError(
                message("hidden_stacks is empty", allowed="one width or more")
            )

    @property
    def norm(self) -> str:
        """Return which normalisations are on, in words."""
        return "batch" * self.use_batch_norm + "layer" * self.use_layer_norm


# ---------------------------------------------------------------- the estimator


class ScAtlasVAE(Estimator):
    """Integrate cells of many batches and carry labels over to new cells.

    Parameters
    ----------
    config, seed, device
        See `Estimator`; the configuration is a `ScAtlasVAEConfig`.

    Notes
    -----
    `fit` takes ``layers["counts"]``, or X for the Gaussian likelihood. The code of a
    cell depends on its counts alone, and not on its batch (unless `encode_batch` lets
    it in) or on other cells.
    """

    method = "scatlasvae"
    config_class: ClassVar[type[Config]] = ScAtlasVAEConfig
    tasks = frozenset(
        {"embed", "denoise", "predict_labels", "map_query", "align_labels"}
    )
    config: ScAtlasVAEConfig
    _asked: dict[str, Any]

    needs_counts = True

    @property
    def _on_counts(self) -> bool:
        return self.config.reconstruction_method != "gaussian"

    # ----- fit

    def fit(
        self,
        adata: AnnData,
        *,
        batch_key: Keys = "auto",
        label_key: Keys = None,
        latent: np.ndarray | None = None,
        callbacks: Iterable[Callback] = (),
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> Self:
        """Learn a map of cells, with or without labels.

        Parameters
        ----------
        adata
            Cells under the AnnData contract (see the data chapter). Not changed.
        batch_key
            One or more columns of ``obs``: sample, donor, study. "auto" takes
            "batch" if there is such a column; None is no batch at all.
        label_key
            One or more columns with cell types, each a vocabulary with a head of its
            own; None integrates without labels. Cells marked `unlabel_key`, or
            without a value, have no label and teach no head.
        latent
            Codes to stay close to, (n_cells, n_latent); rows of zeros are free. So a
            model for other genes keeps an older map (see `on_genes`).
        callbacks, checkpoint_dir, checkpoint_every, resume
            See `Estimator.fit`.

        Raises
        ------
        DataError
            The data break the contract, a column is absent, or a vocabulary has
            fewer than two types.
        """
        self._ask(adata.obs, batch_key, label_key)
        self._latent = latent
        return super().fit(
            adata,
            label_key=None,
            callbacks=callbacks,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )

    def _ask(self, obs: pd.DataFrame, batch_key: Keys, label_key: Keys) -> None:
        """Keep which columns were asked for, after checking that they exist."""
        if batch_key == "auto":
            known = "batch" in obs and obs["batch"].notna().any()
            batch_key = "batch" if known else None
        self._asked = {"batch": as_list(batch_key), "label": as_list(label_key)}
        for kind, keys in self._asked.items():
            for key in keys:
                if key not in obs:
                    raise unknown(f"{kind} column", key, obs.columns, error=DataError)
        mmd = self.config.mmd_key
        if mmd is not None and mmd not in self._asked["batch"]:
            raise unknown("mmd_key", mmd, self._asked["batch"])

    def _check(self, adata: AnnData, label_key: str | None) -> None:
        check_anndata(adata, need_counts=self._on_counts)
        if self._latent is not None:
            shape = (adata.n_obs, self.config.n_latent)
            self._latent = np.ascontiguousarray(self._latent, dtype=np.float32)
            if self._latent.shape != shape or not np.isfinite(self._latent).all():
                raise DataError(
                    message(
                        "latent must hold one code per cell",
                        found=f"shape {self._latent.shape}",
                        allowed=f"finite numbers of shape {shape}",
                    )
                )

    def _columns(self, label_key: str | None) -> list[str]:
        return [*self._asked["batch"], *self._asked["label"]]

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        c = self.config
        valid = self._held_out(adata.obs)
        if c.n_genes is not None and c.n_genes < adata.n_vars:
            # Held-out cells have no say in the choice of genes.
            adata = adata[:, select_genes(adata[~valid], c.n_genes)]
        obs, genes = adata.obs, [str(name) for name in adata.var_names]
        batches, labels = self._set_up(obs, genes, valid)
        # What a run is depends on the roles of the columns and on the codes given.
        digest = hashlib.blake2b(self.data_hash_.encode(), digest_size=8)
        digest.update(json.dumps(self._asked).encode())
        digest.update(b"" if self._latent is None else self._latent.tobytes())
        self.data_hash_ = digest.hexdigest()
        values = adata.layers["counts"] if self._on_counts else adata.X
        X = mapping.canonical(values)
        self._cells: Minibatches = InMemory(
            self, X, batches, labels, valid, self._latent
        )

    def _held_out(self, obs: pd.DataFrame) -> np.ndarray:
        """Return which cells are held out, by their names.

        A batch or type that would have no cell to learn from keeps its cells.
        """
        valid = hash_split(obs.index, self.config.valid_share)
        if (~valid).sum() < 2:
            valid[:] = False
        for key in (*self._asked["batch"], *self._asked["label"]):
            names = as_labels(obs[key])
            lost = set(names[valid]) - set(names[~valid])
            valid &= ~names.isin(lost).to_numpy()
        return valid

    def _set_up(
        self, obs: pd.DataFrame, genes: list[str], valid: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Make the tables of batches and types and the networks; return codes."""
        self.genes_ = genes
        tables: dict[str, dict[str, Any]] = {"batch": {}, "label": {}, "first": {}}
        for kind, keys in self._asked.items():
            for key in keys:
                found = set(as_labels(obs[key]).dropna())
                if kind == "label":
                    found -= {self.config.unlabel_key}
                    self._need_types(key, found)
                elif not found:
                    do = "Choose another column, or leave batch_key at None."
                    text = f"No cell has a batch in {key!r}"
                    raise DataError(message(text, do=do))
                tables[kind][key] = sorted(found)
        self.sizes_ = {"n_genes": len(genes), **tables}
        self.label_key_ = next(iter(tables["label"]), None)
        self.labels_ = tables["label"].get(self.label_key_ or "", [])
        self._build()
        batches, labels = self._batch_codes(obs), self._label_codes(obs)
        for i, names in enumerate(tables["label"].values()):
            of_training = torch.from_numpy(labels[~valid, i])
            weights = class_weights(of_training, len(names))
            if not self.config.class_weights:
                weights = (weights > 0).float()
            self.arrays_[f"class_weights_{i}"] = weights
        return batches, labels

    def _need_types(self, key: str, names: set[str]) -> None:
        if len(names) >= 2:
            return
        raise DataError(
            message(
                f"The label column {key!r} has too few cell types to learn from",
                found=", ".join(names) or "no labelled cell at all",
                allowed="two or more types besides "
                f"{self.config.unlabel_key!r} and missing values",
                do="Choose another column, or leave label_key at None.",
            )
        )

    def _build(self) -> None:
        c, n_genes = self.config, self.sizes_["n_genes"]
        levels = self.sizes_["batch"]
        n_batches = [len(names) for names in levels.values()]
        gaussian = c.reconstruction_method == "gaussian"
        self.modules_["encoder"] = Encoder(
            n_genes,
            c.hidden_stacks,
            c.n_latent,
            c.norm,
            log=c.log_variational and not gaussian,
            target_sum=1e4 if c.total_variational and not gaussian else None,
            with_total=c.encode_libsize,
            n_batches=n_batches if c.encode_batch else (),
            bias=c.bias,
        )
        self.modules_["decoder"] = Decoder(
            c.n_latent,
            c.hidden_stacks[-1],
            n_genes,
            n_batches,
            inject=c.inject_batch,
            batch_dim=c.batch_hidden_dim if c.batch_embedding == "embedding" else None,
            norm=c.norm,
            likelihood=c.reconstruction_method,
            dispersion=c.dispersion,
            gate=c.rna_dropout,
            bias=c.bias,
        )
        for table, level in surgery.tables(self):
            # Batches that were added later are not part of the mean.
            table.n_first = self.sizes_["first"].get(level, len(levels[level]))
        heads = [nn.Linear(c.n_latent, len(v)) for v in self.sizes_["label"].values()]
        self.modules_["heads"] = nn.ModuleList(heads)

    # ----- codes of batches and types

    def _batch_codes(self, obs: pd.DataFrame) -> np.ndarray:
        """Return the batch of each cell at each level; unknown ones have code n."""
        columns = []
        for key, names in self.sizes_["batch"].items():
            codes = np.full(len(obs), -1)
            if key in obs:
                codes = pd.Index(names).get_indexer(as_labels(obs[key]))
            columns.append(np.where(codes < 0, len(names), codes))
        return np.array(columns, dtype=np.int64).reshape(len(columns), len(obs)).T

    def _label_codes(self, obs: pd.DataFrame) -> np.ndarray:
        """Return the type of each cell in each vocabulary, -1 without one."""
        columns = [
            pd.Index(names).get_indexer(as_labels(obs[key]))
            for key, names in self.sizes_["label"].items()
        ]
        return np.array(columns, dtype=np.int64).reshape(len(columns), len(obs)).T

    # ----- training

    @property
    def _n_steps(self) -> int:
        n = self._cells.n_batches
        return n * self.config.epochs(n * self.config.n_per_batch)

    def _phases(self) -> list[Phase]:
        return [Phase("train", self._n_steps, self._step, self._begin, self._end)]

    def _begin(self) -> None:
        c, keys = self.config, list(self.sizes_["batch"])
        n_heads = len(self.sizes_["label"])
        self._vae = CountVAE(
            cast(Encoder, self.modules_["encoder"]),
            cast(Decoder, self.modules_["decoder"]),
            cast(nn.ModuleList, self.modules_["heads"]),
            class_weights=[self.arrays_[f"class_weights_{i}"] for i in range(n_heads)],
            mmd_level=None if c.mmd_key is None else keys.index(c.mmd_key),
            pull=c.constrain_latent_method,
            detach_heads=c.pred_last_n_epoch_fconly,
        ).to(self.device_)
        self._net = self._cells.wrap(self._vae)
        self.optimisers_["all"] = torch.optim.AdamW(
            [p for p in self._vae.parameters() if p.requires_grad],
            c.lr,
            weight_decay=c.weight_decay,
            fused=True,
        )

    def rate_at(self, step: int, n_steps: int) -> float:
        """Return the learning rate of a step.

        "constant": `lr` throughout. "cosine": it rises to `lr` over the first fiftieth
        of all steps and falls to a hundredth of it along half a cosine.
        """
        c = self.config
        warm = max(1, n_steps // 50)
        if c.lr_schedule == "constant":
            return c.lr
        if step < warm:
            return c.lr * (step + 1) / warm
        share = (step - warm) / max(1, n_steps - warm)
        return c.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))

    def loss_weights(self, step: int, n_steps: int, n_batches: int) -> LossWeights:
        """Return what the terms of the loss are multiplied by at a step.

        The divergence starts at 0 and has its full weight from step `kl_warmup` on.
        Heads learn in the last `pred_last_n_epoch` epochs of `n_batches` steps.
        """
        c = self.config
        warm = n_steps // 2 if c.kl_warmup is None else c.kl_warmup
        late = c.pred_last_n_epoch
        return LossWeights(
            kl=c.kl_weight * (min(1.0, step / warm) if warm else 1.0),
            gate=c.gate_weight,
            labels=c.pred_weight * (late is None or step >= n_steps - late * n_batches),
            mmd=c.mmd_weight,
            latent=c.constrain_weight,
        )

    def _step(self, step: int) -> dict[str, Tensor]:
        cells, n_steps = self._cells, self._n_steps
        optimiser = self.optimisers_["all"]
        for group in optimiser.param_groups:
            group["lr"] = self.rate_at(step, n_steps)
        optimiser.zero_grad()
        weights = self.loss_weights(step, n_steps, cells.n_batches)
        # Processes add their losses up, except for this one, which they average.
        weights = weights._replace(mmd=weights.mmd / cells.world)
        batch, noise = cells.step(step)
        terms: dict[str, Tensor] = self._net(batch, noise, weights, cells.add_up)
        # Gradients are averaged over processes, losses are shares of a sum.
        (terms["loss"] * cells.world).backward()
        optimiser.step()
        terms["loss"] = terms["loss"].detach()
        if cells.add_up is not None:
            whole = cells.add_up(torch.stack(list(terms.values())))
            terms = dict(zip(terms, whole, strict=True))
            if "mmd" in terms:
                terms["mmd"] = terms["mmd"] / cells.world
        if step % cells.n_batches == cells.n_batches - 1:
            self._look(step)
        return terms

    @torch.no_grad()
    def _look(self, step: int) -> None:
        """Score the held-out cells, and keep the weights that do best on them."""
        sums = torch.zeros(3, dtype=torch.float64)
        self._vae.eval()
        for batch in self._cells.held_out():
            nothing = torch.zeros(len(batch.weight), self.config.n_latent)
            terms = self._vae(batch, Noise(nothing.to(self.device_)), LossWeights())
            n = batch.weight.sum()
            seen = torch.stack([n * terms["rec"], n * terms["kl"], n])
            sums += seen.cpu().double()
        self._vae.train()
        if self._cells.add_up is not None:
            sums = self._cells.add_up(sums.float().to(self.device_)).cpu().double()
        rec, kl, n_cells = sums.tolist()
        if not n_cells:
            return
        loss = (rec + self.config.kl_weight * kl) / n_cells
        if not math.isfinite(loss):
            raise _diverged("a held-out loss that is no number")
        self._history.append(step, "train", {"valid_loss": loss})
        # Codes of the warm-up still hold the batch, and heads that have not learnt yet
        # know nothing: neither is the best, however low its loss.
        c = self.config
        full = self.loss_weights(step, self._n_steps, self._cells.n_batches)
        is_ready = full.labels == c.pred_weight or not self.sizes_["label"]
        if full.kl < c.kl_weight or not is_ready:
            return
        if loss < self.facts_.get("best_loss", math.inf):
            self.facts_.update(best_loss=loss, best_step=step)
            for name, module in self.modules_.items():
                for key, tensor in module.state_dict().items():
                    self.arrays_[f"best/{name}/{key}"] = tensor.detach().cpu().clone()

    def _callbacks(self) -> list[Callback]:
        return [self._is_over]

    def _is_over(self, event: Event) -> bool:
        """End the training after `patience` epochs without a better held-out loss."""
        best = self.facts_.get("best_step", event.step)
        return event.step - best >= self.config.patience * self._cells.n_batches

    def _end(self) -> None:
        for name, module in self.modules_.items():
            prefix = f"best/{name}/"
            kept = [key for key in self.arrays_ if key.startswith(prefix)]
            state = {k.removeprefix(prefix): self.arrays_.pop(k) for k in kept}
            if state:
                module.load_state_dict(state)
            module.eval()
        self.arrays_.pop("order", None)
        values = [v for m in self.modules_.values() for v in m.state_dict().values()]
        if not all(value.isfinite().all() for value in values):
            raise _diverged("weights that are no numbers")
        self._calibrate()

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Find for each head the temperature that suits the held-out cells best."""
        heads = cast(nn.ModuleList, self.modules_["heads"])
        logits: list[list[Tensor]] = [[] for _ in self.sizes_["label"]]
        codes: list[Tensor] = []
        for batch in self._cells.held_out(share=False):
            z, _ = self._encode(batch.counts.dense, batch.batches)
            codes.append(batch.labels.cpu())
            for i, head in enumerate(heads):
                logits[i].append(head(z).cpu())
        self.facts_["temperature"] = [
            mapping.temperature(torch.cat(found), torch.cat(codes)[:, i])
            if found
            else 1.0
            for i, found in enumerate(logits)
        ]

    def _encode(self, x: Tensor, batches: Tensor) -> tuple[Tensor, Tensor]:
        return self.modules_["encoder"](x, batches=batches)

    def _release(self) -> None:
        for name in ("_cells", "_vae", "_net", "_latent", "_asked"):
            self.__dict__.pop(name, None)

    # ----- what a fitted model offers

    def _own(self, adata: AnnData) -> tuple[sparse.csr_matrix, dict[str, int]]:
        """Return counts on the genes of the model, and how many were not there."""
        if not hasattr(self, "_cells"):  # callbacks look at a model on the way
            self._check_fitted()
        check_shape(adata, min_cells=1)
        if self._on_counts:
            check_counts(adata)
        else:
            check_values(adata)
        values = adata.layers["counts"] if self._on_counts else adata.X
        return mapping.match_genes(values, adata.var_names, self.genes_)

    @torch.no_grad()
    def _codes(self, X: sparse.csr_matrix, obs: pd.DataFrame) -> np.ndarray:
        """Return the mean code of each cell, float32 (n_cells, n_latent)."""
        encoder = self.modules_["encoder"]
        was_training = encoder.training
        encoder.eval()
        batches = torch.from_numpy(self._batch_codes(obs))
        out = np.empty((X.shape[0], self.config.n_latent), dtype=np.float32)
        for first in range(0, X.shape[0], BLOCK):
            rows = slice(first, first + BLOCK)
            # Rows are padded to one shape: products of other shapes may round
            # differently, and a cell's code must not depend on its neighbours.
            x = minibatch(X, rows, self.device_)
            n = len(x)
            x = F.pad(x, (0, 0, 0, BLOCK - n))
            b = F.pad(batches[rows].to(self.device_), (0, 0, 0, BLOCK - n))
            out[rows] = self._encode(x, b)[0][:n].cpu().numpy()
        encoder.train(was_training)
        return out

    def embed(self, adata: AnnData) -> AnnData:
        """Return the latent codes of cells.

        Parameters
        ----------
        adata
            Cells with counts. Genes are matched by name; those of the model that are
            absent count as 0. Batches need not be known, and matter only to a model
            with `encode_batch`.

        Returns
        -------
        AnnData
            X: mean codes, float32 (n_cells, n_latent); ``obs`` as it was.
        """
        X, found = self._own(adata)
        Z = self._codes(X, adata.obs)
        out = AnnData(Z, obs=adata.obs.copy())
        out.var_names = [f"z{i}" for i in range(Z.shape[1])]
        out.uns["scgenlib"] = self.provenance(verb="embed", **found)
        return out

    def label_probabilities(
        self, adata: AnnData, label_key: str | None = None
    ) -> pd.DataFrame:
        """Return the probability of each cell type, n_cells x n_types.

        They are those of the head of `label_key` (the first, if None), with the
        temperature that suited the held-out cells best. A row sums to 1.
        """
        return self._probabilities(self.embed(adata), label_key)

    @torch.no_grad()
    def _probabilities(self, embedded: AnnData, label_key: str | None) -> pd.DataFrame:
        vocabularies = list(self.sizes_["label"])
        if not vocabularies:
            raise ConfigError(
                message(
                    "The model was fitted without labels and has no head",
                    do="Fit with label_key, or use map_query(how='knn').",
                )
            )
        key = vocabularies[0] if label_key is None else label_key
        if key not in vocabularies:
            raise unknown("label_key", key, vocabularies)
        i = vocabularies.index(key)
        head = cast(nn.ModuleList, self.modules_["heads"])[i]
        Z = torch.from_numpy(np.asarray(embedded.X)).to(self.device_)
        # A callback may ask before there is a temperature.
        scale = self.facts_.get("temperature", {i: 1.0})[i]
        shares = torch.softmax(head(Z).cpu().double() / scale, 1).numpy()
        return pd.DataFrame(shares, embedded.obs_names, self.sizes_["label"][key])

    def predict_labels(
        self,
        adata: AnnData,
        *,
        label_key: str | None = None,
        min_probability: float = 0.0,
    ) -> pd.DataFrame:
        """Name the cell type of each cell, with its probability.

        Parameters
        ----------
        adata
            Cells with counts.
        label_key
            One of the vocabularies that the model was fitted with; None: all.
        min_probability
            Below it a cell is "unknown": its type may not be among those that the
            model has seen.

        Returns
        -------
        pandas.DataFrame
            For each vocabulary the columns ``<key>`` and ``<key>_probability``.
        """
        embedded = self.embed(adata)
        keys = list(self.sizes_["label"]) if label_key is None else [label_key]
        tables = {key: self._probabilities(embedded, key) for key in keys or [None]}
        return mapping.best_labels(tables, min_probability)

    def map_query(
        self,
        query: AnnData,
        *,
        how: str = "heads",
        reference: AnnData | None = None,
        label_key: str | None = None,
        min_probability: float = 0.0,
        n_neighbours: int = 15,
    ) -> AnnData:
        """Put new cells on the map and label them.

        Parameters
        ----------
        query
            New cells with counts; other genes, batches and labels do no harm.
        how
            "heads": the model as it is, with its own heads (zero-shot). "knn": the
            model as it is; labels from the nearest cells of `reference`. "joint": a
            new model is fitted on `reference` and `query` together, the query without
            labels, and codes and labels are that model's: its map is another one. To
            keep it, call `refit`.
        reference
            Cells with labels in ``obs[label_key]``, for "knn" and "joint".
        label_key
            Vocabulary; None: the first of the model.
        min_probability
            Below it a cell is "unknown".
        n_neighbours
            Cells that vote with "knn".

        Returns
        -------
        AnnData
            The query as `embed` returns it, with ``obs["predicted"]`` and
            ``obs["probability"]``; ``obsm["probabilities"]`` holds all of them, and
            ``uns["scgenlib"]`` says how many genes were missing or left out.
        """
        if how not in ("heads", "knn", "joint"):
            raise unknown("value of how", how, ("heads", "knn", "joint"))
        self._check_fitted()
        key = self.label_key_ if label_key is None else label_key
        if how == "heads":
            out = self.embed(query)
            table = self._probabilities(out, key)
        else:
            if reference is None or key is None:
                raise ConfigError(
                    message(
                        f"how={how!r} needs cells whose labels are known",
                        do="Give reference, and label_key if the model has no head.",
                    )
                )
            if key not in reference.obs:
                raise unknown("label column", key, reference.obs.columns)
            if how == "knn":
                out = self.embed(query)
                labels = as_labels(reference.obs[key])
                known = (
                    labels.notna() & (labels != self.config.unlabel_key)
                ).to_numpy()
                table = knn_labels(
                    self.embed(reference[known]), labels[known], out, n_neighbours
                )
            else:
                model = self.refit(reference, query, label_key=key)
                out = model.embed(query)
                table = model._probabilities(out, key)
        best = mapping.best_labels({"predicted": table}, min_probability)
        out.obs["predicted"] = pd.Categorical(best["predicted"])
        out.obs["probability"] = best["predicted_probability"]
        out.obsm["probabilities"] = table
        out.uns["scgenlib"] |= {"verb": "map_query", "how": how}
        return out

    def provenance(self, **extra: Any) -> dict[str, Any]:
        """Return where an output came from, and which batches surgery has added."""
        added = self.facts_.get("added_batches", {})
        found = {key: names for key, names in added.items() if names}
        if found:
            extra["added_batches"] = found
        return super().provenance(**extra)

    # ----- new models from old ones

    def refit(
        self, reference: AnnData, query: AnnData, *, label_key: Keys = None
    ) -> Self:
        """Fit a new model on reference and query together, the query unlabelled.

        Batch columns are those of this model, labels those of `label_key` (None: of
        this model), genes those of this model. Labels that the query has are not read.
        """
        keys = as_list(label_key) or None
        return cast(Self, surgery.refit(self, reference, query, keys))

    def on_genes(self, adata: AnnData, **settings: Any) -> Self:
        """Fit a model for the genes of `adata` whose codes stay where they are.

        The old model embeds the cells, and the new one is held to these codes: so a
        map survives when a query has other genes.

        Parameters
        ----------
        adata
            Cells on the genes to use, of which the model knows enough to embed them.
        settings
            Fields of the configuration to change, such as max_epoch.
        """
        return cast(Self, surgery.on_genes(self, adata, settings))

    def add_batches(self, query: AnnData, *, max_epoch: int = 20) -> Self:
        """Return a model that knows the query's batches too (surgery).

        Only the vectors of the new batches are learnt; everything else, down to the
        running means of batch normalisation, stays as it is. The codes of all cells
        are therefore the same as before (unless `encode_batch` lets the batch in); what
        changes is how query cells are decoded.
        """
        return cast(Self, surgery.add_batches(self, query, max_epoch))

    # ----- expression, vocabularies

    @torch.no_grad()
    def denoise(
        self,
        adata: AnnData,
        *,
        batch: str | Mapping[str, str] | None = None,
        target_sum: float = 1e4,
    ) -> AnnData:
        """Return the expression that the model expects of each cell.

        Parameters
        ----------
        adata
            Cells with counts.
        batch
            None: as in the cell's own batch (the mean of all, if it is not known). A
            name, or one for each level of batches: as if all cells came from there.
        target_sum
            Total of each cell before the logarithm.

        Returns
        -------
        AnnData
            X: ln(1 + target_sum x share of the gene), float32, genes of the model;
            with the Gaussian likelihood its mean. Above 1 GB it is refused.
        """
        X, found = self._own(adata)
        obs = adata.obs.copy()
        for key, name in self._one_batch(batch).items():
            obs[key] = name
        if 4 * X.shape[0] * X.shape[1] > 1e9:
            raise DataError(
                message(
                    "The result is dense and would pass 1 GB",
                    found=f"{X.shape[0]:,} cells x {X.shape[1]:,} genes",
                    do="Denoise the cells in parts.",
                )
            )
        out = np.empty(X.shape, dtype=np.float32)
        for rows, share, _ in self._decoded(X, adata.obs, obs):
            if self._on_counts:
                share = torch.log1p(share.exp() * target_sum)
            out[rows] = share.cpu().numpy()
        made = AnnData(out, obs=adata.obs.copy(), var=pd.DataFrame(index=self.genes_))
        made.uns["scgenlib"] = self.provenance(
            verb="denoise", batch=str(batch), **found
        )
        return made

    @torch.no_grad()
    def dropout_rate(self, adata: AnnData) -> np.ndarray:
        """Return the mean probability of an extra zero for each gene, (n_genes,).

        It is 0 without the likelihood "zinb", which alone has such a probability.
        """
        X, _ = self._own(adata)
        total = np.zeros(X.shape[1])
        for _, _, gate in self._decoded(X, adata.obs, adata.obs):
            if gate is not None:
                total += torch.sigmoid(gate).double().sum(0).cpu().numpy()
        return total / X.shape[0]

    def _decoded(
        self, X: sparse.csr_matrix, obs: pd.DataFrame, as_of: pd.DataFrame
    ) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """Yield rows, log shares and dropout logits, decoded in the batches `as_of`."""
        decoder = self.modules_["decoder"]
        was_training = decoder.training
        decoder.eval()
        Z = torch.from_numpy(self._codes(X, obs)).to(self.device_)
        batches = torch.from_numpy(self._batch_codes(as_of)).to(self.device_)
        for first in range(0, len(Z), BLOCK):
            rows = slice(first, first + BLOCK)
            share, _, gate = decoder(Z[rows], batches[rows])
            yield rows, share, gate
        decoder.train(was_training)

    def _one_batch(self, batch: str | Mapping[str, str] | None) -> dict[str, str]:
        """Return the batch to decode as, by level, after checks."""
        levels = self.sizes_["batch"]
        if batch is None:
            return {}
        if not isinstance(batch, Mapping):
            if not levels:
                do = "Fit with batch_key first."
                raise ConfigError(message("The model knows no batches", do=do))
            batch = {next(iter(levels)): str(batch)}
        for key, name in batch.items():
            if key not in levels:
                raise unknown("batch column", key, levels)
            if name not in levels[key]:
                raise unknown(f"batch in {key!r}", name, levels[key])
        return dict(batch)

    def align_labels(
        self, adata: AnnData, first: str | None = None, second: str | None = None
    ) -> pd.DataFrame:
        """Cross two vocabularies: how often do both heads name which pair of types.

        Parameters
        ----------
        adata
            Cells with counts, of either atlas.
        first, second
            Two of the model's vocabularies; None: the first two.

        Returns
        -------
        pandas.DataFrame
            Numbers of cells; rows are types of `first`, columns of `second`. See
            `mapping.matching_pairs`.
        """
        self._check_fitted()
        keys = list(self.sizes_["label"])
        if len(keys) < 2:
            raise ConfigError(
                message(
                    "Two vocabularies are needed",
                    found=f"{len(keys)} in this model",
                    do="Fit with label_key=['one', 'other'].",
                )
            )
        one = next(k for k in keys if k != second) if first is None else first
        other = next(k for k in keys if k != one) if second is None else second
        chosen = [one, other]
        embedded = self.embed(adata)
        names = [
            self._probabilities(embedded, key).idxmax(axis=1).rename(key)
            for key in chosen
        ]
        table = pd.crosstab(names[0], names[1])
        return table.reindex(
            index=self.sizes_["label"][chosen[0]],
            columns=self.sizes_["label"][chosen[1]],
            fill_value=0,
        )


def _diverged(found: str) -> DataError:
    do = "Lower the learning rate lr."
    return DataError(message("Training diverged", found=found, do=do))


def as_list(keys: Keys) -> list[str]:
    if keys is None:
        return []
    return [keys] if isinstance(keys, str) else [str(key) for key in keys]
