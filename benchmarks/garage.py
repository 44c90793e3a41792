"""GARAGE against its floor: one GAN iteration and one epoch of the graph network.

Products of one GAN iteration, with batch B, 5 D and 2 G updates:

==========  ==================================  =======================================
part        rows                                products
==========  ==================================  =======================================
fakes       5 B, once (G stands still)          3 forward
D update    2 B (real and generated), 5 times   3 forward, 3 weight, 2 input gradients
G update    B, 2 times                          3 + 3 forward, 3 input gradients of D,
                                                3 weight and 2 input gradients of G
==========  ==================================  =======================================

The first layer of either player needs no gradient of its input, except D's in a G
update. An epoch of the GAT needs the forward and the weight product of its wide first
layer and forward, weight and input product of its second.

Run: python benchmarks/garage.py
"""

from __future__ import annotations

import _floor as floor
import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scgenlib import training
from scgenlib.garage import GARAGE, GARAGEConfig
from scgenlib.nets import count_parameters

N_TYPES = 11


def random_cells(n_cells: int, n_genes: int, density: float) -> ad.AnnData:
    """Return random sparse cells with types."""
    rng = np.random.default_rng(0)
    X = sparse.random(n_cells, n_genes, density, "csr", np.float32, random_state=rng)
    types = pd.Categorical([f"type {i % N_TYPES}" for i in range(n_cells)])
    names = pd.Index([f"cell {i}" for i in range(n_cells)])
    return ad.AnnData(X, obs=pd.DataFrame({"cell_type": types}, index=names))


def in_training(cells: ad.AnnData, look: training.Callback, **options: object) -> None:
    """Fit GARAGE and look at it after its first step."""
    torch.set_num_threads(1)
    config = GARAGEConfig.profile("paper", n_genes=None, **options)
    GARAGE(config, device="cpu").fit(cells, callbacks=[look])


def gan_iteration(n_genes: int, batch: int) -> str:
    """Time one iteration of the GAN."""
    rows = []

    def look(event: training.Event) -> None:
        c, sizes = event.model.config, event.model.modules_
        g = [n_genes, *c.generator_hidden, n_genes]
        d = [n_genes, *c.discriminator_hidden, 1]
        n, m = c.nd_steps, c.ng_steps
        products = [
            *floor.forward(n * batch, g),
            *floor.forward(2 * batch, d, n),
            *floor.weight_gradients(2 * batch, d, n),
            *floor.input_gradients(2 * batch, d, n),
            *floor.forward(batch, g, m),
            *floor.forward(batch, d, m),
            *floor.input_gradients(batch, d, m, first=True),
            *floor.weight_gradients(batch, g, m),
            *floor.input_gradients(batch, g, m),
        ]
        updated = n * count_parameters(sizes["discriminator"])
        updated += m * count_parameters(sizes["generator"])
        memory = floor.peak_memory()
        result = floor.measure(lambda: event.model._gan_step(0), products, updated)
        name = f"GAN iteration, {n_genes:,} genes, batch {batch}"
        rows.append(floor.row(name, result, n * batch, memory))

    cells = random_cells(299, n_genes, 0.3)
    once = {"seed_rule": "random", "gan_total_iters": 1}
    in_training(cells, look, batch_size=batch, **once)
    return rows[0]


def gat_epoch(n_cells: int, n_genes: int, density: float) -> str:
    """Time one epoch of the graph network."""
    rows = []

    def look(event: training.Event) -> None:
        c, gat = event.model.config, event.model.modules_["gat"]
        widths = [n_genes, c.gat_hidden * c.gat_heads, N_TYPES]
        products = [
            *floor.forward(n_cells, widths),
            *floor.weight_gradients(n_cells, widths),
            *floor.input_gradients(n_cells, widths),
        ]
        memory = floor.peak_memory()
        step = event.model._gat_step
        result = floor.measure(lambda: step(0), products, count_parameters(gat))
        name = f"GAT epoch, {n_cells:,} x {n_genes:,}"
        rows.append(floor.row(name, result, n_cells, memory))

    cells = random_cells(n_cells, n_genes, density)
    in_training(cells, look, gat_epochs=1, gan_total_iters=0)
    return rows[0]


if __name__ == "__main__":
    floor.table(
        "GARAGE (one thread; cells: real cells that D, or the GAT, sees)",
        [
            (gan_iteration, (765, 64)),
            (gan_iteration, (2000, 64)),
            (gan_iteration, (14802, 64)),
            (gat_epoch, (490, 765, 0.33)),
            (gat_epoch, (299, 14802, 0.5)),
            (gat_epoch, (2126, 19156, 0.3)),
            (gat_epoch, (5526, 2000, 0.08)),
        ],
    )
