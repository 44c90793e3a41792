"""REGINA: predict what a perturbation does to a cell that has not had it.

The file reads from top to bottom: configuration, then the estimator. The networks and
one training step of each kind stand in `scgenlib.latentcycle`; names of conditions and
splits in `scgenlib.conditions`; the score that tells stressed cells in
`scgenlib.states`; what published code does otherwise in `scgenlib.published`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor, nn

from scgenlib.conditions import CONTROL, check_conditions, genes_of
from scgenlib.contract import check_anndata
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.estimator import Config, Estimator, option
from scgenlib.latentcycle import (
    MOVES,
    Batch,
    Decoder,
    Encoder,
    LearnedPrompts,
    StateClassifier,
    Transition,
    autoencoder_step,
    classifier_step,
    cosine,
    critic,
    critic_step,
    evaluating,
    freeze,
    mean_changes,
    move,
    noise_sd,
    prompt,
    transition_step,
    watched,
)
from scgenlib.mapping import canonical as canonical_rows
from scgenlib.pairs import (
    Pairs,
    Perturbation,
    annotate,
    check_batches,
    codes_of,
    correlated_order,
    dose_tables,
    row_of,
    targets_of,
    warn_missing,
)
from scgenlib.preprocess import select_genes
from scgenlib.shrinkage import (
    evidence,
    kept_share,
    prompted,
    put_away,
    share_of,
    take_back,
    target_folds,
)
from scgenlib.states import state_labels
from scgenlib.training import Callback, Phase, minibatch, stop_rising

__all__ = ["REGINA", "REGINAConfig"]

#: Cells that pass the networks at once outside of training.
_BLOCK = 512


# --------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class REGINAConfig(Config):
    """Every setting of REGINA.

    Published names are kept but for the loss weights: reconFactr is `w_rec` in phase 1
    and `w_pair` in phase 2, lossRegFactr `w_reg`, lossClassFactr `w_class`,
    lossLatentFactr `w_cons`, centerFactr times z_dim `w_centre`, lossCycleFactr
    `w_cycle`, adversarialFactr `w_adv`. `published` has the published settings, from
    which the defaults depart in `w_centre`, `w_adv`, `w_anchor`, `label_controls`,
    `centred`, `shrink_folds`, `output`, `patience` and `states`.
    """

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "n_tokens": 4,
            "d_model": 16,
            "n_layers": 1,
            "n_heads": 2,
            "z_dim": 8,
            "class_width": 8,
            "transition_width": 16,
            "critic_width": (16, 8),
            "max_epochs": 2,
            "phase_2_epochs": 2,
            "lr": 1e-3,
        },
        "book": {
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "z_dim": 64,
            "class_width": 64,
            "transition_width": 128,
            "critic_width": (128, 64),
            "n_tokens": 8,
            "max_epochs": 10,
            "phase_2_epochs": 10,
            "lr": 1e-3,
            "transition_lr": 2e-3,
            "decoder_lr": 1e-3,
        },
        "paper": {},
    }

    # The cells.
    n_genes: int | None = option(
        None, "variable genes to keep beside the targets; None: all", low=1
    )
    states: str = option(
        "auto",
        "what the classifier reads without a label column: stress by marker genes;"
        " control or perturbed; auto: stress where markers are measured",
        choices=("auto", "stress", "perturbed"),
    )
    label_controls: bool = option(True, "whether states of control cells count")
    valid_share: float = option(
        0.05, "share of cells held out to watch consistency", low=0, high=0.5
    )
    patience: int | None = option(
        5, "epochs of rising inconsistency that end phase 1; None: never", low=1
    )
    # Tokens and networks.
    n_tokens: int = option(16, "tokens that a cell is cut into", low=1)
    grouping: str = option(
        "order",
        "which genes share a token: neighbours in the matrix, or correlated ones",
        choices=("order", "correlation"),
    )
    positions: bool = option(False, "whether tokens are told their place")
    d_model: int = option(512, "width of the transformers", low=1)
    n_layers: int = option(4, "layers of each transformer", low=1)
    n_heads: int = option(8, "attention heads of each layer", low=1)
    dropout: float = option(0.1, "share dropped in transformers", low=0, high=0.9)
    z_dim: int = option(256, "length of the latent code z", low=2)
    class_width: int = option(128, "width of the state classifier", low=1)
    transition_width: int = option(512, "width of the transitions", low=1)
    critic_width: tuple[int, ...] = option((512, 256), "widths in the critic", low=1)
    # The prompt.
    silence_val: float = option(-1.0, "what stands in place of a target's expression")
    prompt_sign: str = option(
        "code",
        "code: E(silenced) - E(x), as published code has it; written: the opposite",
        choices=("code", "written"),
    )
    prompt_skip: bool = option(True, "whether transitions add the prompt itself")
    unmeasured: str = option(
        "learned",
        "training targets that are not measured: learned prompts, or an error",
        choices=("learned", "error"),
    )
    # Phase 1.
    max_epochs: int = option(100, "epochs of phase 1 over the perturbed cells", low=1)
    batch_size: int = option(64, "pairs of cells per update", low=2)
    lr: float = option(1e-4, "learning rate of the auto-encoder", above=0)
    weight_decay: float = option(1e-3, "its weight decay", low=0)
    class_lr: float = option(1e-3, "learning rate of the classifier", above=0)
    w_rec: float = option(1.5, "weight of the reconstruction", low=0)
    w_reg: float = option(1e-4, "weight of the size of the codes", low=0)
    w_class: float = option(1.0, "weight of the classification of the codes", low=0)
    w_cons: float = option(1.0, "weight of the consistency", low=0)
    w_centre: float = option(0.5, "weight of the centre loss, per dimension", low=0)
    consistency: str = option(
        "latent", "what stays the same when decoded", choices=("latent", "class")
    )
    # Phase 2.
    phase_2_epochs: int = option(100, "epochs of phase 2", low=0)
    transition_lr: float = option(4e-4, "first learning rate of transitions", above=0)
    transition_decay: float = option(1e-5, "their weight decay", low=0)
    decoder: str = option(
        "finetune", "what becomes of the decoder", choices=("finetune", "frozen")
    )
    decoder_lr: float = option(5e-5, "its first learning rate in phase 2", above=0)
    last_lr: float = option(1e-6, "last learning rate, along a cosine", low=0)
    critic_lr: float = option(4e-4, "learning rate of the critic", above=0)
    beta_1: float = option(0.5, "Adam's memory of gradients", low=0, high=0.999)
    beta_2: float = option(0.999, "Adam's memory of squares", low=0, high=0.99999)
    clip: float | None = option(0.5, "largest norm of a gradient; None: any", above=0)
    w_cycle: float = option(5.0, "weight of the cycle", low=0)
    w_adv: float = option(0.1, "weight of the adversary", low=0)
    w_pair: float = option(
        1.5, "weight of the distance to random perturbed cells", low=0
    )
    w_anchor: float = option(
        1.5, "weight of the reconstruction of controls in phase 2", low=0
    )
    w_identity: float = option(
        0.0, "weight of leaving cells alone that are there already", low=0
    )
    discriminator_on: str = option(
        "prompt", "what the critic is told", choices=("prompt", "index")
    )
    adversary_both: bool = option(False, "whether controls have a critic too")
    real_target: float = option(0.9, "the critic's target of real codes", above=0)
    critic_every: int = option(5, "batches from one critic update to the next", low=1)
    noise: float = option(0.1, "spread of the noise on the critic's input", low=0)
    noise_until: int = option(20, "epoch from which that noise falls", low=0)
    noise_end: int = option(80, "epoch at which it is 0", low=1)
    # The prediction.
    shrink_folds: int = option(
        2, "parts of the targets that phase 2 is first tried without; 0: none", low=0
    )
    centred: bool = option(
        True, "whether predictions are right on average over the training conditions"
    )
    output: str = option(
        "shift",
        "shift: the cell plus the decoded difference; decoded: the decoded code",
        choices=("shift", "decoded"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.d_model % self.n_heads:
            found = f"d_model {self.d_model}, n_heads {self.n_heads}"
            raise ConfigError(message("n_heads must divide d_model", found=found))
        if self.noise_end <= self.noise_until:
            found = f"{self.noise_until} to {self.noise_end}"
            what = "noise_end must come after noise_until"
            raise ConfigError(message(what, found=found))

    @classmethod
    def published(cls, profile: str = "paper", **overrides: Any) -> Self:
        """Return the published settings for Adamson's cells.

        Dudgit/single_cell, commit c194977. Those for another data set are read by
        `scgenlib.published.regina_config`.
        """
        form: dict[str, Any] = {
            "w_adv": 3.5,
            "w_anchor": 0.0,
            "centred": False,
            "shrink_folds": 0,
            "label_controls": False,
            "output": "decoded",
            "states": "stress",
            "patience": None,
        }
        z_dim = overrides.get("z_dim", cls.profile(profile).z_dim)
        form["w_centre"] = 0.5 * z_dim
        return cls.profile(profile, **{**form, **overrides})


# ---------------------------------------------------------------- the estimator


class REGINA(Estimator):
    """Predict cells under perturbations, seen or not, from control cells.

    Parameters
    ----------
    config, seed, device
        See `Estimator`; the configuration is a `REGINAConfig`.

    Notes
    -----
    `fit` takes X (log1p) and a column of conditions: controls, one gene, or several
    joined by "+". A condition that names no measured gene gets a learned prompt.
    """

    method = "regina"
    config_class: ClassVar[type[Config]] = REGINAConfig
    tasks = frozenset({"embed", "predict"})
    file_format: ClassVar[int] = 2
    config: REGINAConfig
    _asked: dict[str, str | None]

    # ----- fit

    def fit(
        self,
        adata: AnnData,
        *,
        perturbation_key: str = "perturbation",
        label_key: str | None = None,
        batch_key: str | None = None,
        control: str | None = None,
        keep_genes: Iterable[str] = (),
        callbacks: Iterable[Callback] = (),
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> Self:
        """Learn the auto-encoder, then what leads from controls to perturbed cells.

        Between the two come trials of the latter without a part of the targets each;
        `shrinkage` makes of them what predictions for unseen targets keep.

        Parameters
        ----------
        adata
            Training cells under the AnnData contract: controls, and cells of the
            conditions that may be seen. Not changed.
        perturbation_key
            Column of ``obs`` with the conditions.
        label_key
            Column of ``obs`` with the states that the classifier reads, such as cell
            cycle phases. None: what the configuration's `states` says.
        batch_key
            Column of ``obs``: a perturbed cell is then paired with controls of its
            own batch, and the networks are told the batch.
        control
            What the controls are called, if it is not one of the usual names.
        keep_genes
            Genes to keep whatever `n_genes` says, beside the targets: those whose
            perturbation is to be predicted.
        callbacks, checkpoint_dir, checkpoint_every, resume
            See `Estimator.fit`.

        Raises
        ------
        DataError
            The data break the contract, there is no such column, no control cell or
            no perturbed one.
        """
        self._asked = {
            "perturbation": perturbation_key,
            "label": label_key,
            "batch": batch_key,
            "control": control,
        }
        self._keep = sorted({str(gene) for gene in keep_genes})
        return super().fit(
            adata,
            label_key=None,
            callbacks=callbacks,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )

    def _check(self, adata: AnnData, label_key: str | None) -> None:
        check_anndata(adata, label_key=self._asked["label"])
        for gene in self._keep:
            if gene not in adata.var_names:
                raise unknown("gene to keep", gene, adata.var_names, error=DataError)
        n_perturbed = int((self._conditions(adata) != CONTROL).sum())
        if n_perturbed < 2:
            what = "Too few perturbed cells"
            raise DataError(message(what, found=n_perturbed, allowed="at least 2"))
        check_batches(adata, self._asked["batch"])

    def _conditions(self, adata: AnnData) -> pd.Series:
        key = self._asked["perturbation"] or ""
        return check_conditions(adata, key, self._asked["control"])

    def _columns(self, label_key: str | None) -> list[str]:
        keys = ("perturbation", "label", "batch")
        return [self._asked[key] or "" for key in keys]

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        c, asked = self.config, self._asked
        # What a run is depends on the roles of the columns too.
        digest = hashlib.blake2b(self.data_hash_.encode(), digest_size=8)
        digest.update(json.dumps([asked, self._keep]).encode())
        self.data_hash_ = digest.hexdigest()
        conditions = self._conditions(adata)
        names = sorted(set(conditions) - {CONTROL})
        pairs = [genes_of(name, asked["control"]) for name in names]
        targets = sorted({gene for genes in pairs for gene in genes})
        if c.n_genes is not None and c.n_genes < adata.n_vars:
            chosen = {*select_genes(adata, c.n_genes), *targets, *self._keep}
            adata = adata[:, [gene in chosen for gene in adata.var_names]]
        self.genes_ = [str(name) for name in adata.var_names]
        missing = [gene for gene in targets if gene not in set(self.genes_)]
        warn_missing(missing, targets, adata.var_names, c.unmeasured == "error")
        how, label = c.states, asked["label"]
        states, facts = state_labels(adata, conditions, how, label, targets, self.seed)
        self.facts_.update(facts)
        kinds = sorted(set(states))
        batches: list[str] = []
        if asked["batch"] is not None:
            batches = adata.obs[asked["batch"]].astype(str).tolist()
        known = sorted(set(batches))
        self.sizes_ = {
            "n_genes": adata.n_vars,
            "n_states": len(kinds),
            "conditions": names,
            "targets": targets,
            "unmeasured": missing,
            "batches": known,
            "asked": asked,
        }
        self.labels_ = kinds
        self._build()
        told = codes_of(batches, known) if known else None
        # The first row is that of controls: no dose of anything.
        rows = self._doses(names).items()
        tables = {key: nn.functional.pad(v, (0, 0, 1, 0)) for key, v in rows}
        X = canonical_rows(adata.X)
        if c.grouping == "correlation":
            self.arrays_["order"] = correlated_order(X, self.np_rng_)
        state, number = codes_of(states, kinds), codes_of(conditions, [CONTROL, *names])
        self._pairs = Pairs(X, number, state, told, tables, known, c.batch_size)
        self._pairs.hold_out(c.valid_share, self.np_rng_)
        self._all = self._pairs
        self._folds = target_folds(names, asked["control"], c.shrink_folds, self.seed)

    def _doses(
        self,
        wanted: Sequence[Perturbation],
        unmeasured: str = "error",
        untaught: Collection[str] = (),
    ) -> dict[str, Tensor]:
        sizes = self.sizes_
        return dose_tables(
            wanted,
            self.genes_,
            sizes["unmeasured"],
            sizes["targets"],
            control=sizes["asked"]["control"],
            unmeasured=unmeasured,
            untaught=untaught,
        )

    def _build(self) -> None:
        c, sizes = self.config, self.sizes_
        shape = (sizes["n_genes"], c.n_tokens, c.d_model, c.n_layers, c.n_heads)
        rest = (c.z_dim, c.dropout, c.positions, len(sizes["batches"]))
        nets = self.modules_
        nets["encoder"] = Encoder(*shape, *rest)
        nets["decoder"] = Decoder(*shape, *rest)
        nets["classifier"] = StateClassifier(c.z_dim, c.class_width, sizes["n_states"])
        nets["centres"] = nn.Embedding(sizes["n_states"], c.z_dim)
        for name in ("fwd", "bwd"):
            nets[name] = Transition(c.z_dim, c.transition_width, c.prompt_skip)
        nets["critic"] = critic(c.z_dim, c.critic_width)
        if c.adversary_both:
            nets["critic_control"] = critic(c.z_dim, c.critic_width)
        if c.discriminator_on == "index":
            nets["index"] = nn.Linear(len(sizes["targets"]), c.z_dim)
        nets["learned"] = LearnedPrompts(len(sizes["unmeasured"]), c.z_dim)

    # ----- training

    def _phases(self) -> list[Phase]:
        c, n = self.config, self._pairs.n_batches
        first = (self._autoencoder_step, self._begin_autoencoder)
        last = (self._begin_transitions, self._end_transitions)
        phases = [Phase("autoencoder", c.max_epochs * n, *first)]
        for i, out in enumerate(self._folds):
            part = self._pairs.without(self._codes(out))
            ends = (partial(self._begin_trial, part), partial(self._end_trial, out))
            steps = c.phase_2_epochs * part.n_batches
            phases.append(Phase(f"trial {i + 1}", steps, self._transition_step, *ends))
        n *= c.phase_2_epochs
        return [*phases, Phase("transition", n, self._transition_step, *last)]

    def _codes(self, names: Iterable[str]) -> np.ndarray:
        """Return the codes of conditions; controls have 0."""
        return 1 + pd.Index(self.sizes_["conditions"]).get_indexer(list(names))

    def _optimise(
        self, name: str, groups: list[dict[str, Any]], **options: Any
    ) -> torch.optim.Optimizer:
        found = torch.optim.AdamW(groups, fused=True, **options)
        self.optimisers_[name] = found
        return found

    def _begin_autoencoder(self) -> None:
        c, nets = self.config, self.modules_
        self._nets = nn.ModuleDict(nets)
        names = ("encoder", "decoder", "centres")
        weights = [p for name in names for p in nets[name].parameters()]
        self._optimise(
            "main", [{"params": weights}], lr=c.lr, weight_decay=c.weight_decay
        )
        own = [{"params": list(nets["classifier"].parameters())}]
        self._optimise("classifier", own, lr=c.class_lr, weight_decay=0.0)

    def _batch(self, step: int) -> Batch:
        """Return pairs of cells; the perturbed ones are shuffled anew each epoch."""
        if step % self._pairs.n_batches == 0:
            n, rng = len(self._pairs.perturbed), self.rng_
            order = torch.randperm(n, generator=rng, device=self.device_)
            self.arrays_["shuffled"] = order.cpu()
        order = self.arrays_["shuffled"]
        return self._pairs.draw(step, order, self.rng_, self._rows, self._ordered)

    def _rows(self, X: sparse.csr_matrix, rows: np.ndarray | slice) -> Tensor:
        """Return cells, dense, their genes in the order of the tokens."""
        return self._ordered(minibatch(X, rows, self.device_))

    def _cells(self, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return training cells and the codes of their batches."""
        batch = self._pairs.batch
        told = None if batch is None else batch[rows].to(self.device_)
        return self._rows(self._pairs.X, rows), told

    def _ordered(self, x: Tensor) -> Tensor:
        order = self.arrays_.get("order")
        return x if order is None else x[:, order.to(x.device)]

    def _restored(self, x: Tensor) -> Tensor:
        """Undo `_ordered`."""
        order = self.arrays_.get("order")
        return x if order is None else x[:, order.argsort().to(x.device)]

    def _autoencoder_step(self, step: int) -> dict[str, Tensor]:
        c = self.config
        names = ("rec", "reg", "class", "cons", "centre")
        weights = {name: getattr(c, f"w_{name}") for name in names}
        terms, codes, states = autoencoder_step(
            self._nets,
            self.optimisers_["main"],
            self._batch(step),
            weights,
            consistency=c.consistency,
            label_controls=c.label_controls,
            clip=c.clip,
        )
        terms["classifier"] = classifier_step(
            self._nets["classifier"], self.optimisers_["classifier"], codes, states
        )
        if (step + 1) % self._pairs.n_batches == 0 and len(self._pairs.valid):
            self._history.append(step, "autoencoder", self._look())
        return terms

    def _look(self) -> dict[str, float]:
        """Return on held-out cells the reconstruction and the class consistency."""
        return watched(self._nets, *self._cells(self._pairs.valid))

    def _callbacks(self) -> list[Callback]:
        patience = self.config.patience
        if patience is None or not self.config.valid_share:
            return []
        return [stop_rising("valid_inconsistency", patience, "autoencoder")]

    def _begin_transitions(self) -> None:
        c = self.config
        self._nets = nn.ModuleDict(self.modules_)
        nets = self._nets
        freeze(nets["encoder"], nets["classifier"], nets["centres"])
        names = ["fwd", "bwd", "learned"]
        own = [p for name in names for p in nets[name].parameters()]
        groups: list[dict[str, Any]] = [{"params": own, "first": c.transition_lr}]
        if c.decoder == "finetune":
            own = list(nets["decoder"].parameters())
            groups.append({"params": own, "first": c.decoder_lr})
        else:
            freeze(nets["decoder"])
        options = {"betas": (c.beta_1, c.beta_2), "weight_decay": c.transition_decay}
        self._optimise("main", groups, lr=c.transition_lr, **options)
        names = ["critic", "critic_control", "index"]
        own = [p for name in names if name in nets for p in nets[name].parameters()]
        groups = [{"params": own, "first": c.critic_lr}]
        self._optimise("critic", groups, lr=c.critic_lr, **options)

    def _transition_step(self, step: int) -> dict[str, Tensor]:
        c = self.config
        epoch = step // self._pairs.n_batches
        if step % self._pairs.n_batches == 0:
            for optimiser in self.optimisers_.values():
                for group in optimiser.param_groups:
                    low = min(c.last_lr, group["first"])
                    group["lr"] = cosine(epoch, c.phase_2_epochs, group["first"], low)
        names = ("cycle", "adv", "pair", "anchor", "identity")
        weights = {name: getattr(c, f"w_{name}") for name in names}
        on_index = c.discriminator_on == "index"
        terms, seen = transition_step(
            self._nets,
            self.optimisers_["main"],
            self._batch(step),
            weights,
            value=c.silence_val,
            sign=self._sign,
            both=c.adversary_both,
            on_index=on_index,
            shift=c.output == "shift",
            clip=c.clip,
        )
        if c.w_adv and step % self._pairs.n_batches % c.critic_every == 0:
            terms["critic"] = critic_step(
                self._nets,
                self.optimisers_["critic"],
                seen,
                sd=noise_sd(epoch, c.noise, c.noise_until, c.noise_end),
                real_target=c.real_target,
                on_index=on_index,
                rng=self.rng_,
            )
        return terms

    def _begin_trial(self, part: Pairs) -> None:
        """Begin phase 2 without some targets; keep the weights that it starts from."""
        self._pairs = part
        put_away(self.modules_, self.arrays_)
        self._begin_transitions()

    def _end_trial(self, out: Sequence[str]) -> None:
        """Hold predictions for the targets left out against their cells; go back."""
        control = self.sizes_["asked"]["control"]
        taught = [name for name in self.sizes_["conditions"] if name not in set(out)]
        new = set(self.sizes_["targets"])
        new -= {gene for name in taught for gene in genes_of(name, control)}
        self.arrays_["mean_prompt"] = self._mean_prompt(taught, new)
        changes = self._mean_changes([*taught, *out], new)[1]
        start, levels = self._pairs.levels(self._codes([*taught, *out]))
        before = self.arrays_.get("evidence", torch.zeros(0, 2))
        tables = self._doses([*taught, *out], "mean", new)
        rows = evidence(changes[0], levels - start, tables["doses"] != 0, len(taught))
        # Those that have nothing but the mean prompt keep nothing anyway.
        rows = rows[prompted(tables)[len(taught) :]]
        self.arrays_["evidence"] = torch.cat([before, rows])
        self.arrays_.pop("shuffled", None)
        self.arrays_.pop("mean_prompt")
        take_back(self.modules_, self.arrays_)
        self._pairs = self._all

    @property
    def _sign(self) -> float:
        return 1.0 if self.config.prompt_sign == "code" else -1.0

    def _end_transitions(self) -> None:
        """Keep the mean prompt of the training, and check that all went well."""
        names = self.sizes_["conditions"]
        self.arrays_.pop("shuffled", None)
        if "evidence" in self.arrays_:
            self.facts_["kept"] = kept_share(self.arrays_.pop("evidence"))
        self.arrays_["mean_prompt"] = self._mean_prompt()
        start, changes = self._mean_changes(names)
        control, levels = self._pairs.levels(self._codes(names))
        self.arrays_["typical"] = changes.mean(1)
        if self.config.centred:
            # What predictions lack on average over the training conditions, a number
            # for each gene: networks that were trained with dropout and noise are off
            # by that much. Of the cell itself a "shift" lacks nothing.
            own = levels.mean(0) - control - changes.mean(1)
            self.arrays_["lacking"] = torch.stack([own, own + control - start])
        state = self._nets.state_dict().values()
        if not all(part.isfinite().all() for part in state):
            do = "Lower lr, transition_lr or w_adv."
            raise DataError(message("Training diverged: weights are NaN", do=do))

    def _coded(self, n: int = _BLOCK) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return some training controls, their batches and their codes."""
        rows = self._pairs.some_controls(np.random.default_rng(self.seed), n)
        x, batch = self._cells(rows)
        return x, batch, self.modules_["encoder"](x, batch)

    @evaluating
    def _mean_prompt(
        self, names: Sequence[str] = (), untaught: Collection[str] = ()
    ) -> Tensor:
        """Return the mean prompt of conditions, by default all, (z_dim,)."""
        names = names or self.sizes_["conditions"]
        coded, tables = self._coded(), self._doses(names, "mean", untaught)
        prompts = (self._prompt(*coded, row_of(tables, i)) for i in range(len(names)))
        return torch.stack([q.mean(0) for q in prompts]).mean(0).cpu()

    @evaluating
    def _mean_changes(
        self, names: Sequence[str], untaught: Collection[str] = ()
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of decoded controls, and the changes predicted for `names`.

        See `latentcycle.mean_changes`; the genes are in the order of the data.
        """
        tables = self._doses(names, "mean", untaught)
        # About 20,000 predictions are enough, however many conditions there are.
        coded = self._coded(max(32, 20_000 // len(names)))
        prompts = (self._prompt(*coded, row_of(tables, i)) for i in range(len(names)))
        start, changes = mean_changes(self.modules_, coded[2], coded[1], prompts)
        flat = self._restored(changes.flatten(0, 1)).unflatten(0, changes.shape[:2])
        return self._restored(start[None])[0].cpu(), flat.cpu()

    def _release(self) -> None:
        for name in ("_pairs", "_all", "_folds", "_nets", "_keep"):
            self.__dict__.pop(name, None)
        for module in getattr(self, "modules_", {}).values():
            module.requires_grad_(True)

    # ----- what a fitted model offers

    def _own(self, adata: AnnData) -> tuple[sparse.csr_matrix, Tensor | None]:
        """Return cells on the genes of the model, and the codes of their batches."""
        # Fitted, or being fitted: callbacks predict on the way.
        if not hasattr(self, "_nets"):
            self._check_fitted()
        check_anndata(adata, min_cells=1)
        names = pd.Index(self.genes_)
        absent = names.difference(adata.var_names)
        if len(absent):
            what = "Genes of the model are absent from the cells"
            found = f"{len(absent)} of {len(names)}, such as {absent[0]!r}"
            allowed = "cells with all genes that the model was fitted on"
            raise DataError(message(what, found=found, allowed=allowed))
        own = adata if adata.var_names.equals(names) else adata[:, names]
        X, known = canonical_rows(own.X), self.sizes_["batches"]
        if not known:
            return X, None
        key = self.sizes_["asked"]["batch"]
        if key not in adata.obs:
            raise unknown("batch column", key, adata.obs.columns, error=DataError)
        code = pd.Index(known).get_indexer(adata.obs[key].astype(str))
        if (code < 0).any():
            new = adata.obs[key].astype(str)[code < 0].iloc[0]
            raise unknown("batch", new, known, error=DataError)
        return X, torch.from_numpy(code)

    def _blocks(self, X: sparse.csr_matrix, batch: Tensor | None) -> Iterable[Any]:
        """Yield rows, dense cells and codes of batches, a block at a time."""
        for first in range(0, X.shape[0], _BLOCK):
            rows = slice(first, first + _BLOCK)
            told = None if batch is None else batch[rows].to(self.device_)
            yield rows, self._rows(X, rows), told

    def _prompt(
        self, x: Tensor, batch: Tensor | None, z: Tensor, tables: dict[str, Tensor]
    ) -> Tensor:
        """Return the prompts of one condition, (n_cells, z_dim)."""
        nets, n = self.modules_, len(x)
        parts = {k: v.to(x.device).expand(n, -1) for k, v in tables.items()}
        doses = self._ordered(parts["doses"])
        q = torch.zeros_like(z)
        if bool(doses.any()):
            value = self.config.silence_val
            q = self._sign * prompt(nets["encoder"], x, doses, value, batch, z)
        q = q + nets["learned"](parts["learned"])
        if bool(parts["mean"].any()):
            mean = self.arrays_.get("mean_prompt")
            # While training goes on there is none yet: callbacks predict on the way.
            mean = self._mean_prompt() if mean is None else mean
            q = q + parts["mean"] * mean.to(x.device)
        return q

    @evaluating
    def embed(self, adata: AnnData) -> AnnData:
        """Return the latent codes of cells.

        Parameters
        ----------
        adata
            Cells with the genes of the model.

        Returns
        -------
        AnnData
            X: codes, float32 (n_cells, z_dim); ``obsm["states"]``: the probability of
            each state, and ``obs["predicted_state"]`` the likeliest.

        Raises
        ------
        DataError
            Genes are absent, or a batch is unknown.
        """
        X, batch = self._own(adata)
        codes, states = [], []
        for _, x, told in self._blocks(X, batch):
            z = self.modules_["encoder"](x, told)
            codes.append(z.cpu().numpy())
            logits = self.modules_["classifier"](z)
            states.append(logits.softmax(1).cpu().numpy())
        Z, P = np.concatenate(codes), np.concatenate(states)
        out = AnnData(Z, obs=adata.obs.copy(), obsm={"states": P})
        out.var_names = [f"z{i}" for i in range(Z.shape[1])]
        names = np.array(self.labels_, dtype=object)
        out.obs["predicted_state"] = pd.Categorical(names[P.argmax(1)], self.labels_)
        out.uns["scgenlib"] = self.provenance(verb="embed", states=self.labels_)
        return out

    @evaluating
    def prompts(
        self,
        adata: AnnData,
        perturbation: Perturbation,
        *,
        unmeasured: str = "error",
    ) -> np.ndarray:
        """Return the prompt of a perturbation in each cell, (n_cells, z_dim).

        Parameters
        ----------
        adata, perturbation, unmeasured
            As in `predict`, for one perturbation.
        """
        X, batch = self._own(adata)
        tables = self._doses([perturbation], unmeasured=unmeasured)
        out = []
        for _, x, told in self._blocks(X, batch):
            z = self.modules_["encoder"](x, told)
            out.append(self._prompt(x, told, z, tables).cpu().numpy())
        return np.concatenate(out)

    @evaluating
    def predict(
        self,
        adata: AnnData,
        perturbation: Perturbation | Sequence[Perturbation],
        *,
        n_samples: int | None = None,
        unmeasured: str = "error",
        by: str = "transition",
        output: str | None = None,
        kept: float | None = None,
        seed: int | None = None,
    ) -> AnnData:
        """Return what cells would be like under a perturbation.

        Parameters
        ----------
        adata
            Cells to start from, as a rule controls. Each is moved as it is.
        perturbation
            A gene, genes joined by "+", or gene -> dose; or a list of these.
            The order of the genes means nothing. A dose d overwrites a measured gene
            with d times `silence_val`, as published; it is no interpolation, and the
            effect need not grow with it. Learned and mean prompts are multiplied by it.
        n_samples
            Cells drawn, the same for each perturbation; None: all, each once. Score
            the change against the cells drawn: their mean is not that of all cells.
        unmeasured
            What to do with a target that is neither measured nor known from the
            training: "error", or "mean" for the mean prompt of the training.
        by
            What moves the code: the "transition", or the "prompt" alone, which leads
            to the code of the silenced cell.
        output
            "shift" or "decoded"; None: what the configuration says.
        kept
            Share, 0 to 1, that conditions with an unseen target keep of what sets their
            change apart from the typical change of the training. Below 1, conditions
            with nothing but the mean prompt keep none; a target's own expression keeps
            all. None: what the trials of the fit found, or all if there was no trial or
            for ``by="prompt"``.
        seed
            Of the draw of the cells; None: the model's.

        Returns
        -------
        AnnData
            Cells x ``genes_``, the perturbations one after another. X: predicted log1p
            expression, float32, which may be below 0: clip it where a tool asks for
            that, and the means are no longer the predicted ones. ``obs``: that of the
            cell, with "source" (its name), "perturbation" (and the column of the fit,
            whose old value goes to `source_...`), "condition" (GEARS spelling),
            "dose_val" and "prompt" ("gene", "learned", "mean" or several joined by
            "+") and "kept". ``obsm["latent"]``: codes after the transition.

        Raises
        ------
        DataError
            Genes are absent; a target is unknown; or the result would take more than
            1 GB.
        """
        several = not isinstance(perturbation, str | Mapping)
        wanted: list[Any] = list(perturbation) if several else [perturbation]
        if not wanted or n_samples is not None and n_samples < 1:
            raise ConfigError(message("There is nothing to predict", found=wanted))
        output = self.config.output if output is None else output
        if output not in ("shift", "decoded"):
            raise unknown("output", output, ["shift", "decoded"])
        if by not in ("transition", "prompt"):
            raise unknown("by", by, ["transition", "prompt"])
        if kept is not None and not 0 <= kept <= 1:
            raise ConfigError(message("No such share", found=kept, allowed="0 to 1"))
        X, batch = self._own(adata)
        tables = self._doses(wanted, unmeasured=unmeasured)
        rng = np.random.default_rng(self.seed if seed is None else seed)
        n = adata.n_obs if n_samples is None else n_samples
        size = n * len(wanted)
        if 4 * size * len(self.genes_) > 1e9:
            what = "The prediction would take more than 1 GB"
            found = f"{len(wanted)} perturbations x {n} cells"
            do = "Set n_samples, or predict the perturbations in parts."
            raise DataError(message(what, found=found, do=do))
        # The same cells for every perturbation.
        picked = np.arange(adata.n_obs)
        if n_samples is not None:
            picked = rng.choice(picked, n, replace=n > len(picked))
        key, control = (self.sizes_["asked"][k] for k in ("perturbation", "control"))
        frames = annotate(adata.obs.iloc[picked], wanted, tables, key, control)
        made = np.empty((size, len(self.genes_)), dtype=np.float32)
        codes = np.empty((size, self.config.z_dim), dtype=np.float32)
        if kept is None:
            kept = 1.0 if by == "prompt" else self.facts_.get("kept", 1.0)
        known = self.sizes_["targets"]
        keep = [
            share_of(targets_of(one, control), row_of(tables, i), known, kept)
            for i, one in enumerate(wanted)
        ]
        for frame, share in zip(frames, keep, strict=True):
            frame["kept"] = share
        # Callbacks that predict while training goes on have neither yet.
        none = torch.zeros(2, len(MOVES), len(self.genes_))
        lacking = self.arrays_.get("lacking", none)[int(output == "decoded")]
        lacking = lacking[MOVES.index(by)]
        typical = self.arrays_.get("typical", none[0])[MOVES.index(by)]
        nets = self.modules_
        here = None if batch is None else batch[picked]
        for rows, x, told in self._blocks(X[picked], here):
            z = nets["encoder"](x, told)
            start = nets["decoder"](z, told)
            before = self._restored(x if output == "shift" else start).cpu() + lacking
            for i in range(len(frames)):
                q = self._prompt(x, told, z, row_of(tables, i))
                after = move(nets["fwd"], z, q) if by == "transition" else z + q
                change = self._restored(nets["decoder"](after, told) - start).cpu()
                place = slice(i * n + rows.start, i * n + min(rows.stop, n))
                # That a target itself falls is no guess: there all is kept.
                own = torch.where(tables["doses"][i] != 0, 1.0, keep[i])
                made[place] = before + typical + own * (change - typical)
                codes[place] = after.cpu().numpy()
        obs = pd.concat(frames)
        for name in ("perturbation", "condition", "prompt", "dose_val"):
            obs[name] = pd.Categorical(obs[name])
        out = AnnData(made, obs=obs, obsm={"latent": codes})
        out.var_names = self.genes_
        out.uns["scgenlib"] = self.provenance(
            verb="predict", by=by, output=output, unmeasured=unmeasured
        )
        return out
