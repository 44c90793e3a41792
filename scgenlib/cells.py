"""Where a training step gets its cells: memory here, a disk in `scgenlib.atlas`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from scgenlib.countvae import CellBatch, Noise
from scgenlib.errors import DataError, message
from scgenlib.likelihoods import counts_batch
from scgenlib.training import even_part

if TYPE_CHECKING:
    from scgenlib.scatlasvae import ScAtlasVAE

__all__ = ["BLOCK", "InMemory", "Minibatches"]

#: Cells that pass the networks at once outside of training.
BLOCK = 1024


class Minibatches(Protocol):
    """What training reads: minibatches by step, and the held-out cells.

    With several processes each has its share of every minibatch; `add_up` adds a
    vector over all of them, `world` is their number, and `wrap` makes them share
    gradients. One process has None, 1 and the networks as they are.
    """

    n_batches: int
    world: int
    add_up: Callable[[Tensor], Tensor] | None

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the networks in the form that a step calls."""

    def step(self, step: int) -> tuple[CellBatch, Noise]:
        """Return the cells and the noise of a step."""

    def held_out(self, share: bool = True) -> Iterator[CellBatch]:
        """Yield held-out cells in blocks, this process's share of them or all."""


class InMemory:
    """Cells of a CSR matrix, in a new order each epoch, dense by the minibatch.

    Parameters
    ----------
    model
        Its random generator draws order and noise; its ``arrays_`` keep the order,
        so that a run can be resumed inside an epoch.
    X
        Counts, (n_cells, n_genes).
    valid
        Which cells are held out, (n_cells,).
    latent
        Codes to hold on to, (n_cells, n_latent), or None.
    """

    def __init__(
        self,
        model: ScAtlasVAE,
        X: sparse.csr_matrix,
        batches: np.ndarray,
        labels: np.ndarray,
        valid: np.ndarray,
        latent: np.ndarray | None = None,
    ) -> None:
        self.model, self.X, self.latent = model, X, latent
        self.batches, self.labels = batches, labels
        # A cell without any of the chosen genes teaches nothing.
        seen = np.asarray((X != 0).sum(axis=1)).ravel() > 0
        self.train = np.flatnonzero(~valid & seen)
        self.valid = np.flatnonzero(valid & seen)
        # Batches differ by at most one cell, and none has one: no variance of one.
        n = len(self.train)
        if n < 2:
            raise DataError(
                message(
                    "Too few cells have counts of the chosen genes",
                    found=n,
                    allowed="at least 2 to train on",
                    do="Raise n_genes, or give more cells.",
                )
            )
        size = model.config.n_per_batch
        self.n_batches = max(1, min(math.ceil(n / size), n // 2))
        self.world = 1
        self.add_up: Callable[[Tensor], Tensor] | None = None

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the networks as they are."""
        return net

    def _cells(self, rows: np.ndarray) -> CellBatch:
        device = self.model.device_
        latent = None
        if self.latent is not None:
            latent = torch.from_numpy(self.latent[rows]).to(device)
        return CellBatch(
            counts_batch(self.X, rows, device),
            torch.from_numpy(self.batches[rows]).to(device),
            torch.from_numpy(self.labels[rows]).to(device),
            torch.ones(len(rows), device=device),
            latent,
        )

    def step(self, step: int) -> tuple[CellBatch, Noise]:
        """Return the cells and the noise of a step."""
        model, n = self.model, len(self.train)
        if step % self.n_batches == 0:
            order = torch.randperm(n, generator=model.rng_, device=model.device_)
            model.arrays_["order"] = order.cpu()
        part = even_part(n, self.n_batches, step % self.n_batches)
        rows = self.train[model.arrays_["order"][part].numpy()]
        c = model.config
        noise = Noise.draw(
            len(rows), c.n_latent, c.hidden_stacks, c.dropout_rate, model.rng_
        )
        return self._cells(rows), noise

    def held_out(self, share: bool = True) -> Iterator[CellBatch]:
        """Yield the held-out cells in blocks."""
        for first in range(0, len(self.valid), BLOCK):
            yield self._cells(self.valid[first : first + BLOCK])
