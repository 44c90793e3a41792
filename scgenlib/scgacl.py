"""scGACL: fill dropouts with a mixture VAE, a discriminator and two contrasts.

The file reads from top to bottom: configuration, then the estimator. The networks
and one training step of each kind stand in `scgenlib.vaegan`. Which zeros are
dropouts is decided in `scgenlib.dropout`, a completed matrix is put together in
`scgenlib.completion`, and what published code does otherwise stands in
`scgenlib.published`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor, nn

from scgenlib import completion
from scgenlib._matrix import fit_pca
from scgenlib.dropout import dropout_probability
from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.estimator import Config, Estimator, option
from scgenlib.losses import masked_mse
from scgenlib.preprocess import select_genes
from scgenlib.training import (
    Callback,
    Phase,
    adam,
    early_stop,
    even_part,
    minibatch,
)
from scgenlib.vaegan import (
    Decoder,
    Discriminator,
    Encoder,
    MixturePrior,
    elbo_step,
    joint_step,
    share_of_generated,
    start_small,
    update,
)

__all__ = ["CollapseWarning", "ScGACL", "ScGACLConfig"]

#: Cells that the checks between epochs look at.
_WATCHED = 2000
#: Cells on which preliminary clusters are found; all others go to the nearest one.
_CLUSTERED = 20_000


class CollapseWarning(UserWarning):
    """The latent code says nothing about the cell: every cell gets the same fill."""


# --------------------------------------------------------------- configuration


@dataclasses.dataclass(frozen=True)
class ScGACLConfig(Config):
    """Every setting of scGACL, under its published name in lower case.

    GENENUM is `n_genes`, at most that many; N_CLASS is counted from the labels; CUDA
    and DEVICE are the argument `device`. Six settings depart from the published code,
    in ``paper`` too:
    `rec_weight` (published: 1), because at 1 the code collapses; `init_sd` (0.02),
    at which training hardly starts; `shuffle` (False); `cluster_on` ("log");
    `valid_share` (0); and `max_zeros`, stated as here, but without effect there (1).
    See `published`.
    """

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "n_genes": 200,
            "pre_epoch": 4,
            "pre_lr": 1e-2,
            "vaeepoch": 4,
            "vaelr": 1e-2,
            "epoch": 3,
            "lr": 3e-3,
            "en_size": (32, 16),
            "de_size": (16, 32),
            "di_size": (32, 16),
        },
        "book": {
            "n_genes": 2000,
            "pre_epoch": 20,
            "vaeepoch": 20,
            "epoch": 8,
            "en_size": (256, 128),
            "de_size": (128, 256),
            "di_size": (256, 128),
        },
        "paper": {},
    }

    # Preparation of the cells.
    n_genes: int | None = option(5000, "variable genes to keep; None: all", low=1)
    target_sum: float | None = option(
        None, "total of each cell before the logarithm; None: the median", above=0
    )
    n_cluster: int | None = option(
        None, "components of the mixture; None: as many as there are labels", low=1
    )
    cluster_on: str = option(
        "observed",
        "preliminary clusters from log values, or from observed entries only",
        choices=("log", "observed"),
    )
    valid_share: float = option(
        0.05, "share of observed entries held out to stop early", low=0, high=0.5
    )
    patience: int = option(10, "epochs without a better held-out error", low=1)
    # Which zeros to fill.
    drop_threshold: float = option(
        0.5, "fill zeros from this probability on; 0 fills all", low=0, high=1
    )
    max_zeros: float = option(
        0.95, "genes with a larger share of zeros in a group stay", low=0, high=1
    )
    identify_use_celltype: bool = option(True, "whether labels group the dropout fits")
    model_use_celltype: bool = option(True, "whether labels enter the contrast")
    # The networks.
    z_size: int = option(10, "length of the latent code z", low=1)
    project_size1: int = option(10, "outputs of the cell-level projection", low=1)
    project_size2: int = option(10, "outputs of the type-level projection", low=1)
    en_size: tuple[int, ...] = option((500, 500, 2000), "widths in the encoder", low=1)
    de_size: tuple[int, ...] = option((2000, 500, 500), "widths in the decoder", low=1)
    di_size: tuple[int, ...] = option((500, 500, 2000), "widths in D", low=1)
    init_sd: float | None = option(
        None, "spread of the first weights; None: torch's own start", above=0
    )
    discriminator_input: str = option(
        "reconstruction",
        "what D sees: cells and reconstructions; these with the cells' own zeros"
        " (masked); or cells whose zeros were filled by them (completed)",
        choices=("reconstruction", "masked", "completed"),
    )
    # The training: pre-training, phase 1 (VaDE), phase 2 (all losses).
    pre: bool = option(True, "whether the auto-encoder is trained before the mixture")
    pre_epoch: int = option(100, "epochs of pre-training", low=1)
    pre_lr: float = option(1e-3, "learning rate of pre-training", above=0)
    pre_batch_size: int = option(32, "cells per update in pre-training", low=2)
    vaeepoch: int = option(100, "epochs of phase 1", low=0)
    vaelr: float = option(1e-3, "learning rate of phase 1", above=0)
    vae_batch_size: int = option(32, "cells per update in phase 1", low=2)
    epoch: int = option(100, "epochs of phase 2", low=0)
    lr: float = option(1e-4, "learning rate of phase 2", above=0)
    batch_size: int = option(32, "cells per update in phase 2", low=2)
    rec_weight: float | None = option(
        None, "weight of the reconstruction; None: the number of genes", low=0
    )
    lambda_g_adv: float = option(1.0, "weight of the adversarial losses", low=0)
    lambda_simcl: float = option(1.0, "weight of the cell-level contrast", low=0)
    lambda_supcl: float = option(1.0, "weight of the type-level contrast", low=0)
    temperature: float = option(0.9, "temperature of both contrasts", above=0)
    b1: float = option(0.5, "Adam's memory of gradients", low=0, high=0.999)
    b2: float = option(0.99, "Adam's memory of squares", low=0, high=0.99999)
    decay: float = option(2.5e-5, "weight decay, as an L2 term", low=0)
    shuffle: bool = option(True, "whether batches are drawn anew in each epoch")

    @classmethod
    def published(cls, profile: str = "paper", **overrides: Any) -> Self:
        """Return the published settings (Hhjyl/scGACL, commit 6d4d2dd).

        What the code does besides, without a setting, stands in `scgenlib.published`:
        `ScGACLAsPublished` (start of the variance) and `scgacl_dropout` (the table).
        """
        form: dict[str, Any] = {
            "rec_weight": 1.0,
            "shuffle": False,
            "cluster_on": "log",
            "valid_share": 0.0,
            "max_zeros": 1.0,
            "init_sd": 0.02,
        }
        return cls.profile(profile, **{**form, **overrides})


# ---------------------------------------------------------------- the estimator


class ScGACL(Estimator):
    """Impute dropouts: fill the zeros that a mixture model takes for lost counts.

    Parameters
    ----------
    config, seed, device
        See `Estimator`; the configuration is a `ScGACLConfig`.

    Notes
    -----
    `fit` takes ``layers["counts"]``. With ``label_key=None`` there are no labels:
    preliminary clusters then stand in for them, in the dropout fits and in the
    contrast alike, and `n_cluster` must be given.
    """

    method = "scgacl"
    config_class: ClassVar[type[Config]] = ScGACLConfig
    tasks = frozenset({"impute", "embed", "dropout_mask"})
    needs_counts = True
    config: ScGACLConfig

    # ----- preparation

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        c = self.config
        adata = self._on_useful_genes(adata)
        log = completion.log_counts(adata, c.target_sum)
        # A cell without any of the chosen genes teaches nothing; it can be imputed.
        kept = log.totals > 0
        if kept.sum() < 2:
            raise DataError(
                message(
                    "Too few cells have counts of the chosen genes",
                    found=int(kept.sum()),
                    allowed="at least 2",
                    do="Raise n_genes, or leave it at None for all genes.",
                )
            )
        self._X = log.values[kept]
        counts = sparse.csr_matrix(adata.layers["counts"])[kept]
        labels = None
        if label_key is not None:
            labels = adata.obs[label_key].astype(str).to_numpy()[kept]
        n_components = self._n_components(labels, int(kept.sum()))
        self.sizes_ = {"n_genes": adata.n_vars, "n_components": n_components}
        self._build()
        self.facts_ = {"target": log.target, "n_fitted": int(kept.sum())}
        mean = self.arrays_["gene_mean"] = _mean_of_observed(self._X)
        gap = self._X.data - mean.numpy()[self._X.indices]
        variance = float(np.mean(gap**2)) * adata.n_vars
        self.facts_["observed_variance"] = variance or 1.0
        clusters = None
        if labels is None or not (c.identify_use_celltype and c.model_use_celltype):
            clusters = self._cluster(n_components)
        groups = labels if c.identify_use_celltype else None
        groups = clusters if groups is None else groups
        assert groups is not None
        table = dropout_probability(counts, groups, max_zeros=c.max_zeros)
        if groups is labels:
            table = table.reindex(columns=self.labels_, fill_value=0.0)
        self.facts_["by_label"] = groups is labels
        self.facts_["groups"] = list(table.columns)
        self.arrays_["table"] = torch.from_numpy(table.to_numpy(np.float32))
        kinds = labels if c.model_use_celltype and labels is not None else clusters
        codes = np.unique(np.asarray(kinds), return_inverse=True)[1]
        self.arrays_["codes"] = torch.from_numpy(codes.astype(np.int64))
        self._hold_out()
        decoder = cast(Decoder, self.modules_["decoder"])
        decoder.start_at(self.arrays_["gene_mean"])

    def _on_useful_genes(self, adata: AnnData) -> AnnData:
        """Return the cells on genes that are seen, the variable ones if too many."""
        seen = np.asarray((adata.layers["counts"] > 0).sum(axis=0)).ravel() > 0
        if not seen.all():
            adata = adata[:, seen]
        if self.config.n_genes is not None and self.config.n_genes < adata.n_vars:
            adata = adata[:, select_genes(adata, self.config.n_genes)]
        self.genes_ = [str(name) for name in adata.var_names]
        return adata

    def _n_components(self, labels: np.ndarray | None, n_cells: int) -> int:
        """Return the number of components, after checks of it and of the labels."""
        n = self.config.n_cluster
        if labels is not None:
            sizes = np.unique(labels, return_counts=True)[1]
            if sizes.max() < 2:
                raise DataError(
                    message(
                        "Every cell has a label of its own",
                        found=f"{len(sizes)} labels for {n_cells} cells",
                        allowed="at least one type with two cells",
                        do="Choose the column of types, or fit with label_key=None.",
                    )
                )
            n = len(sizes) if n is None else n
        if n is None:
            do = "Set n_cluster in the configuration, or give label_key."
            raise ConfigError(message("How many types are there?", do=do))
        if n > n_cells:
            raise ConfigError(
                message(
                    "n_cluster is larger than the number of cells",
                    found=n,
                    allowed=f"at most {n_cells}",
                )
            )
        return n

    def _cluster(self, n_clusters: int) -> np.ndarray:
        """Find preliminary clusters; what assigns new cells to them is kept."""
        from sklearn.cluster import KMeans

        X = self._for_clusters(self._X)
        rows = np.sort(self.np_rng_.permutation(X.shape[0])[:_CLUSTERED])
        pca = fit_pca(X[rows], 50, self.seed)
        axes = pca.components_.T.astype(np.float32)
        # The mean is subtracted after the projection: X stays sparse.
        centre = pca.mean_.astype(np.float32) @ axes
        points = X @ axes - centre
        means = KMeans(n_clusters, n_init=10, random_state=self.seed % 2**32)
        labels = means.fit(points[rows]).predict(points)
        # Fewer distinct cells than clusters leave some empty.
        used, labels = np.unique(labels, return_inverse=True)
        centres = (means.cluster_centers_[used] + centre).astype(np.float32)
        self.arrays_["pca_axes"] = torch.from_numpy(axes.T.copy())
        self.arrays_["cluster_centres"] = torch.from_numpy(centres)
        return _cluster_names(labels, len(used))

    def _for_clusters(self, X: sparse.csr_matrix) -> sparse.csr_matrix:
        """Return the values on which preliminary clusters are found.

        "observed" subtracts a gene's mean over its non-zeros from these, so that an
        entry that was not observed stands at the mean and says nothing.
        """
        if self.config.cluster_on == "log":
            return X
        out = X.copy()
        out.data -= self.arrays_["gene_mean"].numpy()[X.indices]
        return out

    def _hold_out(self) -> None:
        """Hide some observed entries: the error there says when to stop."""
        n = self._X.shape[0]
        self._watched = np.sort(self.np_rng_.permutation(n)[:_WATCHED])
        self._valid: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        if not self.config.valid_share:
            return
        # Only of the cells that are watched: nobody looks at the others.
        rows = self._X[self._watched]
        lost = self.np_rng_.random(rows.nnz) < self.config.valid_share
        cell = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
        emptied = np.bincount(cell, ~lost, rows.shape[0]) == 0
        lost[rows.indptr[:-1][emptied]] = False  # every cell keeps an entry
        self._valid = cell[lost], rows.indices[lost], rows.data[lost]
        begins = self._X.indptr[self._watched] - rows.indptr[:-1]
        self._X.data[np.flatnonzero(lost) + begins[cell[lost]]] = 0
        self._X.eliminate_zeros()

    def _build(self) -> None:
        c, n_genes = self.config, self.sizes_["n_genes"]
        n_components = self.sizes_["n_components"]
        self.modules_["encoder"] = Encoder(n_genes, c.en_size, c.z_size)
        self.modules_["decoder"] = Decoder(c.z_size, c.de_size, n_genes)
        self.modules_["prior"] = MixturePrior(n_components, c.z_size)
        self.modules_["discriminator"] = Discriminator(
            n_genes, c.di_size, (c.project_size1, c.project_size2)
        )
        if c.init_sd is not None:
            for module in self.modules_.values():
                start_small(module, c.init_sd)

    # ----- training

    def _phases(self) -> list[Phase]:
        c = self.config
        plan = [
            ("pre", c.pre_epoch * c.pre, c.pre_batch_size, c.pre_lr, self._pre_step),
            ("vae", c.vaeepoch, c.vae_batch_size, c.vaelr, self._vae_step),
            ("joint", c.epoch, c.batch_size, c.lr, self._joint_step),
        ]
        phases = []
        for name, epochs, size, rate, step in plan:
            n = self._n_batches(size)
            watched = functools.partial(self._watch, name, n, step)
            begin = functools.partial(self._begin, rate)
            end = functools.partial(self._end, name)
            phases.append(Phase(name, epochs * n, watched, begin, end))
        return phases

    def _n_batches(self, size: int) -> int:
        # Batches differ by at most one cell, and none has one: no variance of one.
        n = self._X.shape[0]
        return max(1, min(math.ceil(n / size), n // 2))

    def _begin(self, rate: float) -> None:
        c = self.config
        for name, module in self.modules_.items():
            self.optimisers_[name] = adam(
                module.parameters(), rate, (c.b1, c.b2), weight_decay=c.decay
            )
        self._nets = nn.ModuleDict(self.modules_)

    def _batch(self, step: int, n_batches: int) -> tuple[Tensor, Tensor]:
        """Return the cells of one step and their codes; each epoch has every cell."""
        if step % n_batches == 0:
            n = self._X.shape[0]
            order = torch.arange(n)
            if self.config.shuffle:
                rng, device = self.rng_, self.device_
                order = torch.randperm(n, generator=rng, device=device).cpu()
            self.arrays_["order"] = order
        part = even_part(self._X.shape[0], n_batches, step % n_batches)
        rows = self.arrays_["order"][part]
        x = minibatch(self._X, rows.numpy(), self.device_)
        return x, self.arrays_["codes"][rows].to(self.device_)

    def _pre_step(self, step: int, n_batches: int) -> dict[str, Tensor]:
        x, _ = self._batch(step, n_batches)
        mean, _ = self._nets["encoder"](x)
        rec = masked_mse(x, self._nets["decoder"](mean))
        update(rec, [self.optimisers_["encoder"], self.optimisers_["decoder"]])
        return {"rec": rec.detach()}

    def _vae_step(self, step: int, n_batches: int) -> dict[str, Tensor]:
        x, _ = self._batch(step, n_batches)
        return elbo_step(self._nets, self.optimisers_, x, self._rec_weight, self.rng_)

    def _joint_step(self, step: int, n_batches: int) -> dict[str, Tensor]:
        c, (x, codes) = self.config, self._batch(step, n_batches)
        share = share_of_generated(step // n_batches, c.epoch)
        return joint_step(
            self._nets,
            self.optimisers_,
            x,
            codes,
            share,
            self._rec_weight,
            self.rng_,
            weights=(c.lambda_g_adv, c.lambda_simcl, c.lambda_supcl),
            temperature=c.temperature,
            kind=c.discriminator_input,
        )

    @property
    def _rec_weight(self) -> float:
        weight = self.config.rec_weight
        return float(self.sizes_["n_genes"]) if weight is None else weight

    def _watch(self, name: str, n: int, update: Any, step: int) -> dict[str, Tensor]:
        """Make one update and, after an epoch, look at cells that are watched."""
        terms = update(step, n)
        if step % n == n - 1:
            seen = self._look()
            self._history.append(step, name, seen)
            self.facts_["spread"] = seen["spread"]
            self.facts_["components"] = seen["components"]
            self._keep_if_best(seen.get("valid_rmse"), step // n)
        return terms

    @torch.no_grad()
    def _look(self) -> dict[str, float]:
        """Return the held-out error and what tells a collapsed code.

        spread: variance of the reconstructions between cells, over the variance of
        the observed values around their gene's mean. components: those that are the
        largest share of at least one cell in a hundred.
        """
        encoder, decoder = self._nets["encoder"].eval(), self._nets["decoder"].eval()
        prior = cast(MixturePrior, self._nets["prior"])
        total = torch.zeros(self.sizes_["n_genes"], device=self.device_)
        square, error, best = 0.0, 0.0, []
        for first in range(0, len(self._watched), 512):
            rows = self._watched[first : first + 512]
            z, _ = encoder(minibatch(self._X, rows, self.device_))
            made = decoder(z)
            best.append(prior.shares(z).argmax(1))
            total += made.sum(0)
            square += float(made.square().sum())
            if self._valid is not None:
                cell, gene, value = self._valid
                own = (cell >= first) & (cell < first + 512)
                guess = made.cpu().numpy()[cell[own] - first, gene[own]]
                error += float(((guess - value[own]) ** 2).sum())
        encoder.train()
        decoder.train()
        n = len(self._watched)
        between = square / n - float((total / n).square().sum())
        sizes = torch.bincount(torch.cat(best))
        seen = {
            "spread": max(between, 0.0) / self.facts_["observed_variance"],
            "components": float((sizes >= max(1.0, 0.01 * n)).sum()),
        }
        if self._valid is not None and len(self._valid[0]):
            seen["valid_rmse"] = math.sqrt(error / len(self._valid[0]))
        return seen

    def _keep_if_best(self, value: float | None, epoch: int) -> None:
        """Keep the weights of the epoch with the lowest held-out error."""
        # Not >=: an error that is no number is never the best.
        if value is None or not value < self.facts_.get("best_value", math.inf):
            return
        self.facts_.update(best_value=value, best_epoch=epoch)
        self.facts_["best_seen"] = [self.facts_["spread"], self.facts_["components"]]
        for key, tensor in self._nets.state_dict().items():
            self.arrays_[f"best/{key}"] = tensor.detach().cpu().clone()

    def _callbacks(self) -> list[Callback]:
        if not self.config.valid_share:
            return []
        return [early_stop("valid_rmse", self.config.patience)]

    def _end(self, name: str) -> None:
        kept = [key for key in self.arrays_ if key.startswith("best/")]
        state = {key.removeprefix("best/"): self.arrays_.pop(key) for key in kept}
        if state:
            self._nets.load_state_dict(state)
            self.facts_[f"epoch_{name}"] = self.facts_.pop("best_epoch")
            self.facts_[f"valid_rmse_{name}"] = self.facts_.pop("best_value")
            spread, components = self.facts_.pop("best_seen")
            self.facts_.update(spread=spread, components=components)
        self.arrays_.pop("order", None)
        if not all(part.isfinite().all() for part in self._nets.state_dict().values()):
            raise DataError(
                message(
                    f"Training diverged in phase {name!r}",
                    found="weights that are no numbers",
                    do="Lower the learning rate of this phase.",
                )
            )
        if name == "pre":
            self._start_mixture()
        elif self.facts_.get("spread", 1.0) < 0.01:
            text = (
                f"After phase {name!r} all cells are reconstructed alike (spread "
                f"{self.facts_['spread']:.1g}, {self.facts_['components']:.0f} of "
                f"{self.sizes_['n_components']} components in use): zeros are filled "
                "with one value per gene. Raise rec_weight, or leave it at None."
            )
            warnings.warn(text, CollapseWarning, stacklevel=2)

    @torch.no_grad()
    def _start_mixture(self) -> None:
        """Fit the mixture to the codes that the auto-encoder found."""
        from sklearn.mixture import GaussianMixture

        encoder = cast(Encoder, self.modules_["encoder"])
        prior = cast(MixturePrior, self.modules_["prior"])
        codes = self._codes_of(self._X)
        n, seed = self.sizes_["n_components"], self.seed
        options: Any = {"covariance_type": "diag", "reg_covar": 1e-5}
        with warnings.catch_warnings():
            # A start need not have converged.
            warnings.simplefilter("ignore")
            found = GaussianMixture(n, random_state=seed, **options).fit(
                codes.astype(np.float64)
            )
        prior.logits.copy_(torch.from_numpy(found.weights_).log())
        prior.centres.copy_(torch.from_numpy(found.means_))
        prior.log_variance.copy_(torch.from_numpy(found.covariances_).log())
        # Codes start a good deal sharper than the components that hold them.
        within = float(np.average(found.covariances_.mean(1), weights=found.weights_))
        nn.init.zeros_(encoder.log_variance.weight)
        nn.init.constant_(encoder.log_variance.bias, math.log(0.1 * within))

    def _release(self) -> None:
        for name in ("_X", "_nets", "_watched", "_valid"):
            self.__dict__.pop(name, None)

    # ----- what a fitted model offers

    @torch.no_grad()
    def _codes_of(self, X: sparse.csr_matrix) -> np.ndarray:
        """Return the mean code of each cell, float32 (n_cells, z_size)."""
        encoder = self.modules_["encoder"]
        was_training = encoder.training
        encoder.eval()
        blocks = [
            encoder(minibatch(X, slice(i, i + 1024), self.device_))[0].cpu()
            for i in range(0, X.shape[0], 1024)
        ]
        encoder.train(was_training)
        return torch.cat(blocks).numpy()

    def _own(self, adata: AnnData) -> tuple[AnnData, completion.LogCounts]:
        """Return cells on the genes and the scale of the model."""
        # Fitted, or being fitted: callbacks impute on the way.
        if not hasattr(self, "_nets"):
            self._check_fitted()
        names = pd.Index(self.genes_)
        absent = names.difference(adata.var_names)
        if len(absent):
            raise DataError(
                message(
                    "Genes of the model are absent from the cells",
                    found=f"{len(absent)} of {len(names)}, such as {absent[0]!r}",
                    allowed="cells with all genes that the model was fitted on",
                )
            )
        own = adata if adata.var_names.equals(names) else adata[:, names]
        return own, completion.log_counts(own, self.facts_["target"])

    def _group_codes(self, adata: AnnData, X: sparse.csr_matrix) -> np.ndarray:
        """Return the column of the dropout table that belongs to each cell."""
        groups = pd.Index(self.facts_["groups"])
        if not self.facts_["by_label"]:
            axes = self.arrays_["pca_axes"].numpy()
            centres = self.arrays_["cluster_centres"].numpy()
            points = self._for_clusters(X) @ axes.T
            gap = (centres**2).sum(1) - 2 * points @ centres.T
            names = _cluster_names(gap.argmin(1), len(centres))
            return groups.get_indexer(names)
        if self.label_key_ not in adata.obs:
            columns = adata.obs.columns
            raise unknown("label column", self.label_key_, columns, error=DataError)
        labels = adata.obs[self.label_key_].astype(str)
        codes = groups.get_indexer(labels)
        if (codes < 0).any():
            new = labels[codes < 0].iloc[0]
            do = "Drop such cells, or fit with label_key=None."
            raise unknown("cell type", new, groups, do=do, error=DataError)
        return codes

    def dropout_mask(self, adata: AnnData) -> sparse.csr_matrix:
        """Return which zeros are taken for dropouts.

        Parameters
        ----------
        adata
            Cells with counts of the model's genes.

        Returns
        -------
        scipy.sparse.csr_matrix
            bool, cells x ``genes_``. It is the same for all cells of a group in which
            a gene is zero: `dropout_table` has the probabilities.

        Raises
        ------
        DataError
            Genes are absent, or the cells would take more than 1 GB when dense.
        """
        own, log = self._own(adata)
        completion.check_size(own.shape)
        groups = self._group_codes(own, log.values)
        blocks = []
        for rows in self._slices(own.n_obs):
            zero = log.values[rows].toarray() == 0
            blocks.append(sparse.csr_matrix(zero & self._flagged(groups[rows])))
        return sparse.vstack(blocks, format="csr")

    def dropout_table(self) -> pd.DataFrame:
        """Return the probability that a zero is a dropout, genes x groups."""
        self._check_fitted()
        table = self.arrays_["table"].numpy()
        return pd.DataFrame(table, self.genes_, self.facts_["groups"])

    def _flagged(self, groups: np.ndarray) -> np.ndarray:
        table = self.arrays_["table"].numpy() >= self.config.drop_threshold
        return table.T[groups]

    def _slices(self, n_cells: int) -> list[slice]:
        """Return blocks of cells of about 40 MB each."""
        size = max(1, min(1024, int(1e7 / len(self.genes_))))
        return [slice(i, min(i + size, n_cells)) for i in range(0, n_cells, size)]

    def embed(self, adata: AnnData) -> AnnData:
        """Return the latent codes of cells.

        Parameters
        ----------
        adata
            Cells with counts of the model's genes.

        Returns
        -------
        AnnData
            X: mean codes, float32 (n_cells, z_size); ``obsm["shares"]``: each
            component's share in the cell; ``obs["component"]``: the largest.
        """
        own, log = self._own(adata)
        Z = self._codes_of(log.values)
        prior = cast(MixturePrior, self.modules_["prior"])
        with torch.no_grad():
            parts = torch.from_numpy(Z).split(1024)
            found = [prior.shares(z.to(self.device_)).cpu().numpy() for z in parts]
        shares = np.concatenate(found)
        out = AnnData(Z, obs=own.obs.copy(), obsm={"shares": shares})
        out.var_names = [f"z{i}" for i in range(Z.shape[1])]
        out.obs["component"] = pd.Categorical(shares.argmax(1).astype(str))
        out.uns["scgenlib"] = self.provenance(verb="embed")
        return out

    def impute(
        self,
        adata: AnnData,
        *,
        n_draws: int = 0,
        seed: int | None = None,
        keep_observed: bool = True,
        to: str | Path | None = None,
    ) -> Any:
        """Fill the zeros that are taken for dropouts.

        Parameters
        ----------
        adata
            Cells with counts of the model's genes: those of the fit, or new ones.
            Not changed.
        n_draws
            0 decodes the mean code of a cell. A larger number decodes that many draws
            of the code, fills in their mean and returns their standard deviation: it
            is the doubt about the code, not about a count.
        seed
            Of the draws; the model's own by default. The draws of a cell depend on the
            cells that come with it.
        keep_observed
            False returns the decoder's value for every entry, zeros or not.
        to
            File to stream to: .h5ad (all layers) or .csv (log values, cells x genes,
            as the published result.csv). Without it the result is made in memory.

        Returns
        -------
        AnnData or pathlib.Path
            The cells on the model's genes with ``layers["imputed"]``, ln(1 + count
            scaled to the target), ``layers["imputed_counts"]``, the same as counts,
            and with draws ``layers["imputed_sd"]``; or the path of the file. Observed
            entries are as they were, to the bit; other zeros stay 0.

        Raises
        ------
        DataError
            A gene or label is unknown, or the result would pass 1 GB and `to` is None.
        """
        if n_draws < 0:
            raise ConfigError(message("n_draws must be at least 0", found=n_draws))
        own, log = self._own(adata)
        groups = self._group_codes(own, log.values)
        seed = self.seed if seed is None else seed
        about = self.provenance(verb="impute", n_draws=n_draws, impute_seed=seed)
        blocks = self._blocks(log, groups, n_draws, seed, keep_observed)
        if to is not None:
            return completion.write(
                own, blocks, log, to, about, n_draws > 0, keep_observed
            )
        return completion.completed(own, blocks, log, about, keep_observed)

    @torch.no_grad()
    def _blocks(
        self,
        log: completion.LogCounts,
        groups: np.ndarray,
        n_draws: int,
        seed: int,
        keep_observed: bool,
    ) -> Iterator[completion.Block]:
        """Yield rows, their completed values and, with draws, the deviations."""
        encoder, decoder = self.modules_["encoder"], self.modules_["decoder"]
        rng = torch.Generator(self.device_).manual_seed(seed)
        for rows in self._slices(log.values.shape[0]):
            was_training = encoder.training
            x = minibatch(log.values, rows, self.device_)
            mean, log_variance = encoder.eval()(x)
            encoder.train(was_training)
            filled, sd = decoder(mean).cpu().numpy(), None
            if n_draws:
                sums = np.zeros((2, *x.shape))
                for _ in range(n_draws):
                    noise = torch.randn(mean.shape, generator=rng, device=self.device_)
                    z = mean + (0.5 * log_variance).exp() * noise
                    made = decoder(z).cpu().double().numpy()
                    sums += made, made**2
                filled, square = sums / n_draws
                sd = np.sqrt(np.maximum(square - filled**2, 0)).astype(np.float32)
            if not keep_observed:
                yield rows, filled.astype(np.float32), sd
                continue
            flagged, observed = self._flagged(groups[rows]), log.values[rows]
            if sd is not None:
                sd = completion.assemble(observed * 0, sd, flagged)
            yield rows, completion.assemble(observed, filled, flagged), sd


def _mean_of_observed(X: sparse.csr_matrix) -> Tensor:
    """Return each gene's mean over its non-zeros, float32 (n_genes,)."""
    n = X.shape[1]
    total = np.bincount(X.indices, X.data.astype(np.float64), n)
    seen = np.maximum(np.bincount(X.indices, minlength=n), 1)
    return torch.from_numpy((total / seen).astype(np.float32))


def _cluster_names(numbers: np.ndarray, n: int) -> np.ndarray:
    """Return names that sort as the numbers do."""
    width = len(str(n - 1))
    return np.array([f"cluster {i:0{width}d}" for i in numbers])
