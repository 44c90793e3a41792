"""New models from a fitted scAtlasVAE: more batches, more cells, other genes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn

from scgenlib.contract import as_labels
from scgenlib.countvae import (
    BatchTable,
    CellBatch,
    CountVAE,
    Decoder,
    Encoder,
    LossWeights,
    Noise,
)
from scgenlib.errors import ConfigError, DataError, message
from scgenlib.likelihoods import counts_batch
from scgenlib.mapping import joined
from scgenlib.training import adam, even_part

if TYPE_CHECKING:
    from scgenlib.scatlasvae import ScAtlasVAE

__all__ = ["add_batches", "on_genes", "refit"]


def refit(
    model: ScAtlasVAE, reference: AnnData, query: AnnData, label_key: list[str] | None
) -> ScAtlasVAE:
    """Fit a new model on two sets of cells, the second without labels.

    See `ScAtlasVAE.refit`.
    """
    model._check_fitted()
    keys = label_key or list(model.sizes_["label"])
    batches = list(model.sizes_["batch"])
    columns, on_counts = [*batches, *keys], model._on_counts
    both, part = joined([reference, query], model.genes_, columns, on_counts)
    for key in keys:
        text = both.obs[key].to_numpy(object)
        both.obs[key] = np.where(part == 0, text, model.config.unlabel_key)
    made = _like(model, {})
    return made.fit(both, batch_key=batches or None, label_key=keys or None)


def on_genes(
    model: ScAtlasVAE, adata: AnnData, settings: Mapping[str, Any]
) -> ScAtlasVAE:
    """Fit a model for other genes that is held to the codes of this one.

    See `ScAtlasVAE.on_genes`.
    """
    codes = np.asarray(model.embed(adata).X)
    batches = [key for key in model.sizes_["batch"] if key in adata.obs]
    labels = []
    for key in model.sizes_["label"]:
        names = set(as_labels(adata.obs[key]).dropna()) if key in adata.obs else set()
        # A vocabulary of which these cells have one type at most has nothing to teach.
        if len(names - {model.config.unlabel_key}) > 1:
            labels.append(key)
    if model.config.mmd_key not in batches:
        settings = {"mmd_key": None, **settings}
    made = _like(model, settings)
    return made.fit(
        adata, batch_key=batches or None, label_key=labels or None, latent=codes
    )


def _like(model: ScAtlasVAE, settings: Mapping[str, Any]) -> ScAtlasVAE:
    config = model.config.replace(**{"n_genes": None, **settings})
    return type(model)(config, seed=model.seed, device=model.device)


def new_batches(model: ScAtlasVAE, obs: pd.DataFrame) -> dict[str, list[str]]:
    """Return the names at each level of batches that the model does not know."""
    found = {}
    for key, names in model.sizes_["batch"].items():
        if key not in obs:
            raise DataError(
                message(
                    f"The cells have no batch column {key!r}",
                    found=", ".join(map(str, obs.columns)),
                    do="Add the column; the model was fitted with it.",
                )
            )
        found[key] = sorted(set(as_labels(obs[key]).dropna()) - set(names))
    return found


def _widen(table: BatchTable, more: int) -> None:
    """Put `more` rows below those of a table, each the mean of the old ones."""
    old = table.weight.detach()
    rows = old.mean(0, keepdim=True).expand(more, -1)
    table.weight = nn.Parameter(torch.cat([old, rows]))


def add_batches(model: ScAtlasVAE, query: AnnData, max_epoch: int = 20) -> ScAtlasVAE:
    """Return a copy of a model with vectors for the query's batches.

    Parameters
    ----------
    model
        A fitted model; not changed.
    query
        Cells with counts and the model's batch columns.
    max_epoch
        How often each query cell is seen.

    Raises
    ------
    ConfigError
        The model knows no batches, or the query brings no new one.
    """
    model._check_fitted()
    if max_epoch < 1:
        raise ConfigError(message("max_epoch", found=max_epoch, allowed="1 or more"))
    if not tables(model):
        do = "Fit with batch_key and inject_batch=True."
        raise ConfigError(message("The model has no vectors of batches", do=do))
    added = new_batches(model, query.obs)
    if not any(added.values()):
        raise ConfigError(
            message(
                "The query has no batch that the model does not know",
                found=str({k: len(v) for k, v in model.sizes_["batch"].items()}),
                do="Embed the query as it is.",
            )
        )
    out = copy.deepcopy(model)
    for table, level in tables(out):
        _widen(table, len(added[level]))
    for key, names in added.items():
        # New names stand behind the old ones, whose codes stay what they were.
        old = out.sizes_["batch"][key]
        out.sizes_["first"].setdefault(key, len(old))
        out.sizes_["batch"][key] = [*old, *names]
    before = out.facts_.get("added_batches", {})
    out.facts_["added_batches"] = {
        key: [*before.get(key, []), *names] for key, names in added.items()
    }
    _train(out, query, {k: len(v) for k, v in added.items()}, max_epoch)
    return out


def _train(
    model: ScAtlasVAE, query: AnnData, n_new: dict[str, int], max_epoch: int
) -> None:
    """Fit the new rows to the query; nothing else moves.

    The networks stay in evaluation mode: no dropout, and the running means of batch
    normalisation are read and not written.
    """
    c, device = model.config, model.device_
    X, _ = model._own(query)
    batches = torch.from_numpy(model._batch_codes(query.obs))
    labels = torch.empty(X.shape[0], 0, dtype=torch.int64)
    encoder = cast(Encoder, model.modules_["encoder"])
    decoder = cast(Decoder, model.modules_["decoder"])
    vae = CountVAE(encoder, decoder, nn.ModuleList()).eval()
    vae.requires_grad_(False)
    found = tables(model)
    for table, _ in found:
        table.weight.requires_grad_(True)
    # No weight decay, and Adam moves nothing whose gradients were all zero.
    optimiser = adam([table.weight for table, _ in found], 10 * c.lr)
    rng = torch.Generator(device).manual_seed(model.seed)
    n_batches = max(1, math.ceil(X.shape[0] / c.n_per_batch))
    for step in range(max_epoch * n_batches):
        if step % n_batches == 0:
            order = torch.randperm(X.shape[0], generator=rng, device=device).cpu()
        rows = order[even_part(X.shape[0], n_batches, step % n_batches)].numpy()
        cells = CellBatch(
            counts_batch(X, rows, device),
            batches[rows].to(device),
            labels[rows].to(device),
            torch.ones(len(rows), device=device),
        )
        noise = Noise.draw(len(rows), c.n_latent, (), 0.0, rng)
        optimiser.zero_grad()
        vae(cells, noise, LossWeights())["loss"].backward()
        for table, level in found:
            if table.weight.grad is not None:
                table.weight.grad[: len(table.weight) - n_new[level]] = 0
        optimiser.step()
    vae.requires_grad_(True)
    model.modules_["heads"].requires_grad_(True)


def tables(model: ScAtlasVAE) -> list[tuple[BatchTable, str]]:
    """Return the tables with a row per batch, and the level of each."""
    levels = list(model.sizes_["batch"])
    found = []
    for name in ("encoder", "decoder"):
        own = cast(nn.ModuleList, model.modules_[name].batch)
        found += [
            (cast(BatchTable, t), key) for t, key in zip(own, levels, strict=False)
        ]
    rate = model.modules_["decoder"].rate
    by_batch = model.config.dispersion == "gene-batch" and levels
    if isinstance(rate, BatchTable) and by_batch:
        found.append((rate, levels[0]))
    return found
