"""cscGAN against its floor: one generator step with its five critic updates.

Products of one generator step, with batch B, a generator of 4 layers and a critic of 3
below its head, which is a sum over 256 values and no product:

================  =====  ==========================================================
part              times  products
================  =====  ==========================================================
critic update       5    4 forward through G, B rows
                         1 forward through D's first layer, 2 B rows: real, generated
                         2 forward through D's further layers, 3 B rows: and between
                         2 back through D's further layers, 3 B rows
                         1 slope in the genes, B rows
                         3 forward of what the penalty asks, B rows
                         3 weight gradients, 3 B rows
generator update    1    4 + 3 forward through G and D, B rows
                         3 back through D, to the genes, B rows
                         4 weight and 3 input gradients of G, B rows
================  =====  ==========================================================

That is 5 x 16 + 17 = 97. Kept apart, the points between cost 3 forward, 2 back and 3
weight products a critic update of their own: 5 x 24 + 17 = 137. The floor is the 97.
The table shows how many products a step really ran: `counted` looks at each call that
reaches torch's matrix product. No product of G's weight or input gradients is among
those of a critic update, and G runs forward once in each.

The last job fits a few steps on 100,000 cells x 17,789 genes, X sparse, one gene in
twelve seen (8.3 %), float32 log1p and no layer of counts, and prints the peak memory.

Run: python benchmarks/cscgan.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import _floor as floor
import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode

from scgenlib import training
from scgenlib.cscgan import CscGAN, CscGANConfig
from scgenlib.nets import count_parameters

N_TYPES = 10
ONE_IN = 12


def random_cells(n_cells: int, n_genes: int) -> ad.AnnData:
    """Return sparse random cells with types, one gene in twelve seen in each.

    Row blocks are written into arrays of the final size: nothing is held twice.
    """
    rng = np.random.default_rng(0)
    seen = n_genes // ONE_IN
    values = np.empty((n_cells, seen), dtype=np.float32)
    genes = np.empty((n_cells, seen), dtype=np.int32)
    first = ONE_IN * np.arange(seen, dtype=np.int32)
    for begin in range(0, n_cells, 1000):
        part = slice(begin, min(begin + 1000, n_cells))
        shape = genes[part].shape
        values[part] = 0.5 + 3 * rng.random(shape, dtype=np.float32)
        genes[part] = first + rng.integers(0, ONE_IN, shape, dtype=np.int32)
    ends = np.arange(n_cells + 1, dtype=np.int32) * seen
    X = sparse.csr_matrix((values.ravel(), genes.ravel(), ends), (n_cells, n_genes))
    types = pd.Categorical([f"type {i % N_TYPES}" for i in range(n_cells)])
    names = pd.Index([f"cell {i}" for i in range(n_cells)])
    return ad.AnnData(X, obs=pd.DataFrame({"cell_type": types}, index=names))


class Counter(TorchDispatchMode):
    """Count the matrix products that torch runs."""

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.mm.out,
                torch.ops.aten.addmm.default, torch.ops.aten.addmm.out,
                torch.ops.aten.bmm.default)  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Pass a call on, counted if it is a product."""
        self.n += func in self.PRODUCTS
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], object]) -> int:
    """Return how many matrix products a step runs."""
    with Counter() as counter:
        step()
    return counter.n


def products_of(config: CscGANConfig, n_genes: int) -> list[floor.Product]:
    """Return the products of the table above."""
    n, batch = config.critic_updates, config.batch_size
    g = [config.latent_dim, *config.gen_layers, n_genes]
    d = [n_genes, *config.critic_layers]
    return [
        *floor.forward(batch, g, n),
        *floor.forward(2 * batch, d[:2], n),
        *floor.forward(3 * batch, d[1:], n),
        *floor.input_gradients(3 * batch, d, n),
        *floor.input_gradients(batch, d[:2], n, first=True),
        *floor.forward(batch, d, n),
        *floor.weight_gradients(3 * batch, d, n),
        *floor.forward(batch, g),
        *floor.forward(batch, d),
        *floor.input_gradients(batch, d, first=True),
        *floor.weight_gradients(batch, g),
        *floor.input_gradients(batch, g),
    ]


def generator_step(n_genes: int, by_hand: bool) -> str:
    """Time one generator step including its critic updates."""
    torch.set_num_threads(1)
    config = CscGANConfig.profile("paper", max_steps=1, hand_gradient=by_hand)
    rows = []

    def look(event: training.Event) -> None:
        model: Any = event.model
        nets = model.modules_
        updated = config.critic_updates * count_parameters(nets["critic"])
        updated += count_parameters(nets["generator"])
        memory = floor.peak_memory()
        result = floor.measure(
            lambda: model._step(0),
            products_of(config, n_genes),
            updated,
            bytes_each=floor.AMSGRAD_BYTES,
        )
        n = counted(lambda: model._step(0))
        name = f"{n_genes:,} genes, {'hand' if by_hand else 'autograd'}, {n} products"
        cells = config.critic_updates * config.batch_size
        rows.append(floor.row(name, result, cells, memory))

    cells = random_cells(2000, n_genes)
    CscGAN(config, device="cpu").fit(cells, callbacks=[look])
    return rows[0]


def large_fit(n_cells: int, n_genes: int, n_steps: int) -> str:
    """Fit a few steps on many sparse cells and say how much memory that took."""
    torch.set_num_threads(1)
    cells = random_cells(n_cells, n_genes)
    before = floor.peak_memory()
    config = CscGANConfig.profile("paper", max_steps=n_steps)
    begun = time.perf_counter()
    model = CscGAN(config, device="cpu").fit(cells)
    seconds = time.perf_counter() - begun
    return (
        f"{n_cells:,} x {n_genes:,}, X sparse, {cells.X.nnz / 1e6:.0f} M values: "
        f"{model.history_['step'].max() + 1} steps, {seconds:.0f} s in all, "
        f"peak {before / 1e9:.2f} GB before the fit, "
        f"{floor.peak_memory() / 1e9:.2f} GB with it"
    )


if __name__ == "__main__":
    sizes = CscGANConfig()
    made = sum(times for times, *_ in products_of(sizes, 2000))
    floor.table(
        f"cscGAN, a generator step and its {sizes.critic_updates} critic updates, "
        f"batch {sizes.batch_size}, {N_TYPES} types\n(one thread; floor: {made} "
        "products and AMSGrad; cells: real cells that D sees)",
        [
            (generator_step, (2000, True)),
            (generator_step, (2000, False)),
            (generator_step, (17789, True)),
            (generator_step, (17789, False)),
            (large_fit, (100_000, 17789, 3)),
        ],
    )
