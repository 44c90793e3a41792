"""scGAN and cscGAN: a Wasserstein GAN that draws cells, and cells of a chosen type.

The file reads from top to bottom: configuration, then the two estimators. The two
networks and one training step of each stand in `scgenlib.wgan`, validation while
training in `scgenlib.validation`, the filter and the split in
`scgenlib.preprocess.process`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from scgenlib import copies, training
from scgenlib._matrix import subsample
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.estimator import Config, Estimator, option
from scgenlib.preprocess import (
    draw_molecules,
    linear_values,
    normalise,
    on_genes,
    scale_rows,
    select_genes,
)
from scgenlib.validation import validate
from scgenlib.wgan import Critic, Generator, critic_step, generator_step, learning_rate

__all__ = [
    "CscGAN",
    "CscGANConfig",
    "ScGAN",
    "ScGANConfig",
    "validate",
]

#: The total to which generated cells are scaled before the logarithm, as in X.
TARGET = 1e4


# --------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class ScGANConfig(Config):
    """Every setting of scGAN.

    `scgenlib.published.SCGAN_PARAMETERS` maps the published parameter file to these.
    """

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "n_genes": 200,
            "max_steps": 20,
            "valid_cells": 20,
            "validation_freq": 10,
            "batch_size": 32,
            "critic_updates": 2,
            "latent_dim": 8,
            "gen_layers": (16, 32),
            "critic_layers": (32, 16),
            "bn_momentum": 0.05,
        },
        "book": {
            "n_genes": 2000,
            "max_steps": 500,
            "valid_cells": 200,
            "validation_freq": 100,
            "batch_size": 64,
            "critic_scale": "log1p",
            "alpha_0": 1e-3,
            "alpha_final": 1e-4,
            "latent_dim": 64,
            "gen_layers": (128, 256, 512),
            "critic_layers": (256, 128, 64),
            "bn_momentum": 0.02,
        },
        "paper": {},
    }

    # Preparation of the cells (`process` and `fit`).
    clustering_res: float | None = option(
        0.15, "Leiden resolution where no labels are given", above=0
    )
    min_genes: int = option(10, "cells with fewer genes are dropped", low=0)
    min_cells: int = option(3, "genes seen in fewer cells are dropped", low=0)
    target_sum: float = option(2e4, "total of every real cell in training", above=0)
    valid_cells: int = option(2000, "cells set aside for validation", low=0)
    test_cells: int = option(0, "cells set aside for a test", low=0)
    balanced_split: bool = option(True, "whether the split keeps the shares of types")
    split_seed: int = option(0, "seed of the split", low=0)
    n_genes: int | None = option(
        None, "genes chosen on training cells; None: all that pass", low=1
    )
    # The networks.
    latent_dim: int = option(128, "length of the noise vector z", low=1)
    gen_layers: tuple[int, ...] = option((256, 512, 1024), "widths in G", low=1)
    critic_layers: tuple[int, ...] = option((1024, 512, 256), "widths in D", low=1)
    output_lsn: float | None = option(
        2e4, "library-size layer: total of a generated cell; None: no layer", above=0
    )
    critic_scale: str = option(
        "linear",
        "values that D sees: as normalised, or log1p",
        choices=("linear", "log1p"),
    )
    bn_momentum: float = option(
        1e-3, "share of a batch in the running statistics", above=0, high=1
    )
    # The training.
    max_steps: int = option(1_000_000, "updates of the generator", low=0)
    critic_updates: int = option(5, "critic updates before each of G's", low=1)
    first_critic_updates: int | None = option(
        None, "critic updates before G's first; None: as many as always", low=1
    )
    lambd: float = option(10.0, "weight of the gradient penalty", low=0)
    batch_size: int = option(128, "cells per update", low=2)
    algorithm: str = option(
        "AMSGrad", "optimiser of both nets", choices=("AMSGrad", "Adam")
    )
    beta1: float = option(0.5, "memory of gradients", low=0, high=0.999)
    beta2: float = option(0.9, "memory of squared gradients", low=0, high=0.99999)
    alpha_0: float = option(1e-4, "first learning rate", above=0)
    alpha_final: float = option(1e-5, "learning rate after max_steps", above=0)
    decay: bool = option(True, "whether the rate falls from alpha_0 to alpha_final")
    hand_gradient: bool = option(
        True, "the critic's gradient by hand; False: by autograd, slower, the same"
    )
    # How often.
    summary_freq: int = option(50, "steps between two entries of the history", low=1)
    validation_freq: int = option(1000, "steps between two validations", low=1)
    save_freq: int = option(1000, "steps between two checkpoints", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_lsn not in (None, self.target_sum):
            do = "Give both the same value, or output_lsn=None to leave the layer out."
            raise ConfigError(
                message(
                    "Generated and real cells would have different totals, and the "
                    "critic would see nothing else",
                    found=f"output_lsn {self.output_lsn:g}",
                    allowed=f"target_sum {self.target_sum:g}, or None",
                    do=do,
                )
            )

    @classmethod
    def published(cls, profile: str = "paper", **overrides: Any) -> Self:
        """Return what the published code runs: 6 T - 5 critic updates in T steps.

        imsb-uke/scGAN, commit 0fc1bdf. Five runs of the critic and a sixth beside
        the generator's, but one alone before the first generator update; the rate
        falls whatever `decay` says, and fakes draw their own labels.
        """
        form: dict[str, Any] = {"critic_updates": 6, "first_critic_updates": 1}
        if issubclass(cls, CscGANConfig):
            form["fake_labels"] = "drawn"
        return cls.profile(profile, **{**form, **overrides})


@dataclasses.dataclass(frozen=True)
class CscGANConfig(ScGANConfig):
    """Every setting of cscGAN: those of scGAN, and how the type enters."""

    gen_cond_type: str = option(
        "batchnorm",
        "where G learns of the type; none: plain batch normalisation",
        choices=("batchnorm", "layernorm", "none"),
    )
    critic_cond_type: str = option(
        "proj",
        "D's last layer: one for each type, Miyato and Koyama's, or one for all",
        choices=("proj", "miyato", "none"),
    )
    fake_labels: str = option(
        "paired",
        "types of the cells made in a critic update: those of the real ones, or drawn",
        choices=("paired", "drawn"),
    )
    class_balance: bool = option(
        False, "whether every type is drawn equally often in training"
    )
    extra_conditions: tuple[str, ...] = option(
        (), "further columns of obs that G and D are told, such as batch"
    )


# ------------------------------------------------------------------ the estimators


class ScGAN(Estimator):
    """Draw cells from a Wasserstein GAN that knows nothing of types.

    Parameters
    ----------
    config, seed, device
        See `Estimator`; the configuration is a `ScGANConfig`.

    Notes
    -----
    `fit` takes ``layers["counts"]``, or X without its logarithm where there are none,
    and scales each cell to the total `target_sum` over the chosen genes.
    """

    method = "scgan"
    config_class: ClassVar[type[Config]] = ScGANConfig
    tasks = frozenset({"generate"})
    config: ScGANConfig

    # ----- preparation

    def _codes_of(self, adata: AnnData, label_key: str | None) -> np.ndarray:
        """Return the classes of the cells, (n_cells, n_conditions)."""
        return np.zeros((adata.n_obs, 1), dtype=np.int64)

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        c = self.config
        if c.n_genes is not None and c.n_genes < adata.n_vars:
            adata = adata[:, select_genes(adata, c.n_genes)]
        linear = linear_values(adata)
        self.genes_ = [str(name) for name in adata.var_names]
        totals = np.asarray(linear.sum(axis=1), dtype=np.float64).ravel()
        # A cell without any of the chosen genes has no library to be scaled.
        kept = totals > 0
        linear = linear if kept.all() else linear[kept]
        self._X = scale_rows(linear, c.target_sum)
        del linear
        codes = self._codes_of(adata[kept], label_key)
        self.sizes_ = {
            "n_genes": adata.n_vars,
            "n_classes": [int(k) for k in self._class_numbers(codes)],
        }
        self.facts_ = {
            "has_counts": "counts" in adata.layers,
            "cells_without_chosen_genes": int((~kept).sum()),
        }
        self._build()
        self.arrays_["codes"] = torch.from_numpy(codes)
        self.arrays_["totals"] = torch.from_numpy(totals[kept])
        few = subsample(self._X, copies.MAX_CELLS, self.seed)
        self.arrays_ |= copies.remember(normalise(few, TARGET), self.seed)
        if c.critic_scale == "log1p":
            self._X.data = np.log1p(self._X.data)

    def _class_numbers(self, codes: np.ndarray) -> Sequence[int]:
        return (1,)

    def _build(self) -> None:
        c = self.config
        n_genes, n_classes = self.sizes_["n_genes"], self.sizes_["n_classes"]
        self.modules_["generator"] = Generator(
            n_genes,
            n_classes,
            c.latent_dim,
            c.gen_layers,
            cond_type=getattr(c, "gen_cond_type", "batchnorm"),
            output_lsn=c.output_lsn,
            log1p=c.critic_scale == "log1p",
            bn_momentum=c.bn_momentum,
        )
        head = getattr(c, "critic_cond_type", "none")
        self.modules_["critic"] = Critic(
            n_genes, n_classes, c.critic_layers, cond_type=head
        )

    # ----- training

    def _phases(self) -> list[training.Phase]:
        n, gap = self.config.max_steps, self.config.summary_freq
        phase = training.Phase("gan", n, self._step, self._begin, self._end, gap)
        return [phase]

    def _begin(self) -> None:
        c = self.config
        for name, module in self.modules_.items():
            self.optimisers_[name] = training.adam(
                module.parameters(),
                c.alpha_0,
                betas=(c.beta1, c.beta2),
                amsgrad=c.algorithm == "AMSGrad",
            )
        codes = self.arrays_["codes"].numpy()
        _, self._group = np.unique(codes[:, 0], return_inverse=True)

    def _step(self, step: int) -> dict[str, Any]:
        c, optimisers = self.config, self.optimisers_
        generator = cast(Generator, self.modules_["generator"])
        critic = cast(Critic, self.modules_["critic"])
        rate = c.alpha_0
        if c.decay:
            rate = learning_rate(step, c.max_steps, c.alpha_0, c.alpha_final)
        for optimiser in optimisers.values():
            optimiser.param_groups[0]["lr"] = rate
        n_updates = c.critic_updates
        if step == 0 and c.first_critic_updates is not None:
            n_updates = c.first_critic_updates
        for _ in range(n_updates):
            terms = critic_step(
                critic,
                optimisers["critic"],
                **self._critic_batch(),
                lambd=c.lambd,
                hand_gradient=c.hand_gradient,
            )
        codes = self._codes(self._rows())
        z = self._noise(len(codes))
        loss = generator_step(generator, critic, optimisers["generator"], z, codes)
        return {**terms, "gen_loss": loss, "learning_rate": rate}

    def _critic_batch(self) -> dict[str, Tensor]:
        """Return the cells of one critic update: real ones and new ones."""
        rows = self._rows()
        codes = self._codes(rows)
        z = self._noise(len(rows))
        share = torch.rand(len(rows), 1, generator=self.rng_, device=self.device_)
        batch = {
            "real": training.minibatch(self._X, rows, self.device_),
            "codes": codes,
            "share": share,
        }
        # No graph of the generator is built here: only the critic learns.
        with torch.no_grad():
            generator = self.modules_["generator"]
            if getattr(self.config, "fake_labels", "paired") == "drawn":
                batch["fake_codes"] = other = self._codes(self._rows())
                batch["fake"] = generator(z, other)
                batch["partner"] = generator(z, codes)
            else:
                batch["fake"] = generator(z, codes)
        return batch

    def _rows(self) -> np.ndarray:
        """Draw the training cells of one batch."""
        n, size, device = len(self._group), self.config.batch_size, self.device_
        if not getattr(self.config, "class_balance", False):
            return _draw(n, size, self.rng_, device)
        # Equal numbers of every type in the long run: first a type, then a cell of it.
        classes = _draw(int(self._group.max()) + 1, size, self.rng_, device)
        share = torch.rand(size, generator=self.rng_, device=device).cpu().numpy()
        order = np.argsort(self._group, kind="stable")
        sizes = np.bincount(self._group)
        begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        at = np.minimum((share * sizes[classes]).astype(int), sizes[classes] - 1)
        return order[begins[classes] + at]

    def _codes(self, rows: np.ndarray) -> Tensor:
        return self.arrays_["codes"][torch.from_numpy(rows)].to(self.device_)

    def _noise(self, n: int) -> Tensor:
        shape = (n, self.config.latent_dim)
        return torch.randn(shape, generator=self.rng_, device=self.device_)

    def keep_if_best(self, step: int, value: float) -> None:
        """Keep the generator if `value` is the lowest so far; see `validate`."""
        best = self.facts_.get("best_value")
        if best is not None and value >= best:
            return
        self.facts_.update(best_step=step, best_value=float(value))
        for key, tensor in self.modules_["generator"].state_dict().items():
            self.arrays_[f"best/{key}"] = tensor.detach().cpu().clone()

    def _end(self) -> None:
        kept = [key for key in self.arrays_ if key.startswith("best/")]
        state = {key.removeprefix("best/"): self.arrays_.pop(key) for key in kept}
        if state:
            self.modules_["generator"].load_state_dict(state)

    def _release(self) -> None:
        for name in ("_X", "_group"):
            self.__dict__.pop(name, None)

    # ----- what a fitted model offers

    def align(self, adata: AnnData) -> AnnData:
        """Return real cells on the genes and the scale of generated ones.

        Counts (or X without its logarithm) of the model's genes, scaled to one
        total and logged: the values that a generated cell is compared with.

        Raises
        ------
        DataError
            A gene of the model is absent.
        """
        self._check_started()
        return on_genes(adata, self.genes_, TARGET)

    def like(self, cells: AnnData) -> Any:
        """Return what to ask `generate` for, to get cells in the numbers of `cells`."""
        return cells.n_obs

    def generate(
        self,
        n_cells: int,
        *,
        seed: int | None = None,
        counts: bool = False,
        report: bool = True,
    ) -> AnnData:
        """Generate cells; a callback may call this while the model is trained.

        Parameters
        ----------
        n_cells
            How many cells.
        seed
            The same seed gives the same cells; the model's own by default.
        counts
            Give the cells a depth again: each takes the library size of a random
            training cell and draws that many molecules, into ``layers["counts"]``,
            and X follows from these. Training data carry the noise of sampling
            already; it is then there twice.
        report
            Whether to add a report on copies to ``uns["scgenlib"]``: the median
            distance to the nearest training cell over that between training cells
            (below 1: nearer than real cells are to each other) and the share of
            cells nearer than the nearest 1 % of these. Both in 50 principal
            components and over at most 5,000 training cells.

        Returns
        -------
        AnnData
            X: CSR float32, log(1 + y) with y scaled to 10,000 a cell. (Without the
            library-size layer totals vary, in the same unit.)

        Raises
        ------
        ConfigError
            `n_cells` is below 1, or counts are asked of data that had none.
        """
        self._check_started()
        if isinstance(n_cells, Mapping) or not isinstance(n_cells, int | np.integer):
            allowed = "one whole number: scGAN knows no types, CscGAN does"
            raise ConfigError(message("n_cells", found=n_cells, allowed=allowed))
        if n_cells < 1:
            raise ConfigError(message("n_cells must be at least 1", found=n_cells))
        codes = np.zeros((n_cells, 1), dtype=np.int64)
        return self._draw_cells(codes, pd.DataFrame(), seed, counts, report)

    def _check_started(self) -> None:
        # Fitted, or being fitted: callbacks generate cells on the way.
        if "codes" not in getattr(self, "arrays_", {}):
            self._check_fitted()

    @torch.no_grad()
    def _draw_cells(
        self,
        codes: np.ndarray,
        obs: pd.DataFrame,
        seed: int | None,
        counts: bool,
        report: bool,
    ) -> AnnData:
        """Return one generated cell for each row of codes."""
        if counts and not self.facts_["has_counts"]:
            do = "Fit on data with counts, or leave counts out."
            raise ConfigError(message("The training cells had no counts", do=do))
        seed = self.seed if seed is None else seed
        rng = torch.Generator(self.device_).manual_seed(seed)
        generator = self.modules_["generator"]
        was_training = generator.training
        generator.eval()
        blocks = []
        for part in torch.from_numpy(codes).split(1024):
            shape = (len(part), self.config.latent_dim)
            z = torch.randn(shape, generator=rng, device=self.device_)
            y = generator(z, part.to(self.device_)).cpu().numpy()
            blocks.append(sparse.csr_matrix(y))
        generator.train(was_training)
        Y = sparse.vstack(blocks, format="csr")
        if self.config.critic_scale == "log1p":
            Y.data = np.expm1(Y.data)
        layers = {}
        if counts:
            layers["counts"] = Y = self._with_depth(Y, codes, seed)
            Y = scale_rows(Y, TARGET)
        else:
            Y = Y * np.float32(TARGET / self.config.target_sum)
        X = Y.log1p()
        about = self.provenance(
            verb="generate", generate_seed=seed, total=TARGET, counts=counts
        )
        if report:
            about["memorisation"] = copies.report(X, self.arrays_)
        obs.index = pd.Index([f"{self.method}_{i}" for i in range(len(codes))])
        var = pd.DataFrame(index=pd.Index(self.genes_, dtype=str))
        return AnnData(X, obs=obs, var=var, layers=layers, uns={"scgenlib": about})

    def _with_depth(
        self, Y: sparse.csr_matrix, codes: np.ndarray, seed: int
    ) -> sparse.csr_matrix:
        """Return whole counts: library sizes of training cells, molecules drawn."""
        rng = np.random.default_rng(seed)
        known = self.arrays_["codes"].numpy()
        totals = self.arrays_["totals"].numpy()
        size = np.empty(len(codes), dtype=np.int64)
        for row in np.unique(codes, axis=0):
            wanted = (codes == row).all(1)
            same = (known == row).all(1)
            # A combination that was never seen borrows the depth of its first class.
            same = same if same.any() else known[:, 0] == row[0]
            size[wanted] = rng.choice(totals[same], wanted.sum()).round()
        return draw_molecules(Y, size, rng)


class CscGAN(ScGAN):
    """Draw cells of the types asked for, from a conditional Wasserstein GAN.

    Parameters
    ----------
    config, seed, device
        See `Estimator`; the configuration is a `CscGANConfig`.
    """

    method = "cscgan"
    config_class = CscGANConfig
    by_type = True
    config: CscGANConfig

    def _codes_of(self, adata: AnnData, label_key: str | None) -> np.ndarray:
        if label_key is None:
            do = "Give label_key, or find types first with preprocess.process."
            raise DataError(message("cscGAN needs cell types to learn from", do=do))
        sizes = adata.obs[label_key].astype(str).value_counts()
        sizes = sizes.reindex(self.labels_, fill_value=0)
        if sizes.min() < 2:
            raise DataError(
                message(
                    f"A class of {label_key!r} has too few cells to learn from",
                    found=f"{sizes.idxmin()!r} with {sizes.min()}",
                    allowed="two or more cells in each class",
                    do="Drop the class or merge it with another.",
                )
            )
        columns = [np.searchsorted(self.labels_, adata.obs[label_key].astype(str))]
        self._levels = []
        for name in self.config.extra_conditions:
            others = [column for column in adata.obs if column != label_key]
            if name not in others:
                raise unknown(
                    "column for extra_conditions", name, others, error=DataError
                )
            if adata.obs[name].isna().any():
                do = "Drop these cells, or name what is missing."
                raise DataError(message(f"Some cells have no {name!r}", do=do))
            column = adata.obs[name].astype(str)
            self._levels.append(sorted(column.unique()))
            columns.append(np.searchsorted(self._levels[-1], column))
        return np.stack(columns, axis=1).astype(np.int64)

    def _class_numbers(self, codes: np.ndarray) -> Sequence[int]:
        return [len(self.labels_), *(len(levels) for levels in self._levels)]

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        super()._prepare(adata, label_key)
        names = self.config.extra_conditions
        self.facts_["levels"] = dict(zip(names, self._levels, strict=True))

    def like(self, cells: AnnData) -> dict[str, int]:
        """Return what to ask `generate` for, to get cells in the numbers of `cells`."""
        key = str(self.label_key_)
        if key not in cells.obs:
            raise unknown("label column", key, cells.obs, error=DataError)
        sizes = cells.obs[key].astype(str).value_counts()
        return {name: int(sizes[name]) for name in self.labels_ if name in sizes}

    def generate(
        self,
        cells: Mapping[str, int] | Sequence[int] | int,
        *,
        given: Mapping[str, str] | None = None,
        seed: int | None = None,
        counts: bool = False,
        report: bool = True,
    ) -> AnnData:
        """Generate cells of chosen types.

        Parameters
        ----------
        cells
            Number for each type, such as ``{"CD4 T": 500, "pDC": 50}``; or one
            number for each type in the order of ``labels_``; or one number, shared
            out as in the training cells.
        given
            Value of further conditions, such as ``{"batch": "b1"}``. A condition
            that is not given is drawn as it occurs among the type's training cells.
        seed, counts, report
            See `ScGAN.generate`. Depth comes from training cells of the same type.

        Returns
        -------
        AnnData
            Rows in the order of the types asked for; ``obs`` has the fitted label
            column and further conditions.

        Raises
        ------
        ConfigError
            An unknown type or condition, a negative number, a list of the wrong
            length, or no cell at all.
        """
        self._check_started()
        rng = np.random.default_rng(self.seed if seed is None else seed)
        known = self.arrays_["codes"].numpy()
        rows = []
        for name, n in self._wanted(cells).items():
            code = self.labels_.index(name)
            seen = known[known[:, 0] == code]
            rows.append(seen[rng.integers(len(seen), size=n)])
        codes = np.concatenate(rows)
        levels: dict[str, list[str]] = self.facts_["levels"]
        for name, value in (given or {}).items():
            if name not in levels:
                raise unknown("condition", name, levels)
            if value not in levels[name]:
                raise unknown(f"value of {name!r}", value, levels[name])
            codes[:, 1 + list(levels).index(name)] = levels[name].index(value)
        names = {str(self.label_key_): self.labels_, **levels}
        obs = {
            name: pd.Categorical(np.asarray(values, dtype=object)[code], values)
            for (name, values), code in zip(names.items(), codes.T, strict=True)
        }
        return self._draw_cells(codes, pd.DataFrame(obs), seed, counts, report)

    def _wanted(self, cells: Any) -> dict[str, int]:
        """Return the number of cells of each type, in the order asked for."""
        labels = self.labels_
        if isinstance(cells, np.ndarray):
            cells = cells.tolist()
        if isinstance(cells, int | np.integer) and not isinstance(cells, bool):
            if cells < 1:
                raise ConfigError(message("No cell is asked for", found=cells))
            known = self.arrays_["codes"][:, 0].numpy()
            exact = np.bincount(known, minlength=len(labels)) * cells / len(known)
            share = np.floor(exact).astype(int)
            # What rounding left over goes to the largest remainders.
            rest = np.argsort(share - exact, kind="stable")[: cells - share.sum()]
            share[rest] += 1
            cells = share.tolist()
        if isinstance(cells, pd.Series):
            cells = cells.to_dict()
        if isinstance(cells, str) or not isinstance(cells, Mapping | Sequence):
            allowed = "a number, one for each type, or a dict of type to number"
            raise ConfigError(
                message("cells cannot be read", found=cells, allowed=allowed)
            )
        if not isinstance(cells, Mapping):
            if len(cells) != len(labels):
                raise ConfigError(
                    message(
                        "A list needs one number for each type",
                        found=f"{len(cells)} numbers",
                        allowed=f"{len(labels)}, for {', '.join(labels)}",
                    )
                )
            cells = dict(zip(labels, cells, strict=True))
        for name, n in cells.items():
            if name not in labels:
                raise unknown("type", name, labels)
            if not isinstance(n, int | np.integer) or n < 0:
                allowed = "a whole number, 0 or more"
                raise ConfigError(
                    message(f"The number of {name!r}", found=n, allowed=allowed)
                )
        wanted = {name: int(n) for name, n in cells.items() if n}
        if not wanted:
            raise ConfigError(message("No cell is asked for", found=dict(cells)))
        return wanted


def _draw(n: int, size: int, rng: torch.Generator, device: torch.device) -> np.ndarray:
    """Draw numbers below n, with replacement."""
    return torch.randint(n, (size,), generator=rng, device=device).cpu().numpy()
