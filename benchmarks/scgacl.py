"""scGACL: a step of phase 2 against its floor, the dropout mixtures, many cells.

Products of one step of phase 2, with batch B. The encoder E has 4 layers (its two
heads count as one), the decoder 4, and the discriminator D 3 and its heads:

==========  ==========================================================================
update      products
==========  ==========================================================================
ELBO        4 + 4 forward through E and the decoder, B rows
            4 + 4 weight gradients, 4 + 3 input gradients: to z, not to the cells
generator   4 + 4 forward, 4 + 4 weight and 4 + 3 input gradients again
            4 forward through D, 4 back through D to the reconstruction, B rows
third pass  4 + 4 forward: E and the decoder have changed; D and the contrasts share it
D           4 forward, 4 weight and 3 input gradients, 2 B rows: cells and made ones
contrasts   4 forward and 4 weight gradients with D as it is now, 2 B rows
            3 input gradients, 2 B rows; 1 more to the reconstruction, B rows
            4 + 4 weight and 4 + 3 input gradients of E and the decoder, B rows
==========  ==========================================================================

Those of the similarities, 2 B x 2 B with an inner width of 10, are left out. Adam: E
and the decoder three times, the mixture once, D twice, each time with other heads.

The second job fits the dropout mixtures of 5,000 genes in 30 groups of 3,000 cells,
one entry in ten above 0, with the filter of genes that are nearly always 0 and without.
The third trains on 100,000 cells x 5,000 genes, one epoch a phase, without labels, and
streams the completed cells to a file.

Run: python benchmarks/scgacl.py [--only step mixtures large]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import _floor as floor
import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scgenlib import ScGACL, ScGACLConfig, training
from scgenlib.dropout import dropout_probability
from scgenlib.nets import count_parameters
from scgenlib.preprocess import normalise

BATCH = 256
BLOCK = 1000


def random_cells(n_cells: int, n_genes: int, n_types: int, seed: int = 0) -> ad.AnnData:
    """Return gamma-Poisson counts of types that differ, about one entry in ten above 0.

    Row blocks are written into arrays of the final size: nothing is held twice.
    """
    rng = np.random.default_rng(seed)
    # Every gene is seen: none is left out, and sizes are those stated.
    profile = np.maximum(rng.lognormal(-3.3, 1.5, n_genes), 0.005)
    profile = profile * rng.lognormal(0, 0.5, (n_types, n_genes))
    kind = rng.integers(0, n_types, n_cells)
    room = int(0.125 * n_cells * n_genes)
    values, genes = np.empty(room, np.float32), np.empty(room, np.int32)
    ends = np.zeros(n_cells + 1, np.int64)
    for begin in range(0, n_cells, BLOCK):
        mean = profile[kind[begin : begin + BLOCK]]
        mean *= rng.standard_gamma(4.0, mean.shape, dtype=np.float32) / 4
        mean *= rng.lognormal(0, 0.3, (len(mean), 1))
        block = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
        first = ends[begin]
        part = slice(first, first + block.nnz)
        values[part], genes[part] = block.data, block.indices
        ends[begin + 1 : begin + 1 + len(mean)] = first + block.indptr[1:]
    shape = n_cells, n_genes
    counts = sparse.csr_matrix((values[: ends[-1]], genes[: ends[-1]], ends), shape)
    types = pd.Categorical([f"type {i}" for i in kind])
    names = pd.Index([f"cell {i}" for i in range(n_cells)])
    obs = pd.DataFrame({"cell_type": types}, index=names)
    return ad.AnnData(normalise(counts, 1e4), obs=obs, layers={"counts": counts})


# ---------------------------------------------------------------------- one step


def products_of(config: ScGACLConfig, n_genes: int) -> list[floor.Product]:
    """Return the products of the table above."""
    b = config.batch_size
    e = [n_genes, *config.en_size, 2 * config.z_size]
    g = [config.z_size, *config.de_size, n_genes]
    d = [n_genes, *config.di_size]
    adversarial = [*d, 1]
    contrast = [*d, config.project_size1 + config.project_size2]
    back = [
        *floor.weight_gradients(b, e, 3),
        *floor.weight_gradients(b, g, 3),
        *floor.input_gradients(b, e, 3),
        *floor.input_gradients(b, g, 3, first=True),
    ]
    return [
        *floor.forward(b, e, 3),
        *floor.forward(b, g, 3),
        *back,
        # The generator's update goes through D, which learns nothing from it.
        *floor.forward(b, adversarial),
        *floor.input_gradients(b, adversarial, first=True),
        *floor.forward(2 * b, adversarial),
        *floor.weight_gradients(2 * b, adversarial),
        *floor.input_gradients(2 * b, adversarial),
        *floor.forward(2 * b, contrast),
        *floor.weight_gradients(2 * b, contrast),
        *floor.input_gradients(2 * b, contrast),
        *floor.input_gradients(b, d[:2], first=True),
    ]


def updated_by(nets: dict[str, Any]) -> int:
    """Return the weights that a step updates; each counts as often as it is."""
    n = {name: count_parameters(net) for name, net in nets.items()}
    d = nets["discriminator"]
    heads = count_parameters(d) - count_parameters(d.trunk)
    # The adversarial head in D's update, the projections in that of the contrasts.
    both = 2 * count_parameters(d.trunk) + heads
    return 3 * (n["encoder"] + n["decoder"]) + n["prior"] + both


def joint_step(n_genes: int) -> str:
    """Time one step of phase 2, with the drawing of its batch."""
    torch.set_num_threads(1)
    config = ScGACLConfig(
        pre_epoch=1, vaeepoch=0, epoch=1, batch_size=BATCH, valid_share=0.0
    )
    rows: list[str] = []

    def look(event: training.Event) -> None:
        if rows:
            return
        model: Any = event.model
        memory = floor.peak_memory()
        result = floor.measure(
            lambda: model._joint_step(1, 8),
            products_of(config, n_genes),
            updated_by(model.modules_),
            repeats=15,
        )
        name = f"phase 2, {n_genes:,} genes"
        rows.append(floor.row(name, result, BATCH, memory))

    looking = training.every(1, look, phase="joint")
    cells = random_cells(8 * BATCH, n_genes, 10)
    ScGACL(config, device="cpu").fit(cells, callbacks=[looking])
    return rows[0]


# ------------------------------------------------------- the mixtures, many cells


def mixtures(n_cells: int, n_genes: int, n_groups: int, max_zeros: float) -> str:
    """Time the dropout fits of all genes and groups."""
    cells = random_cells(n_cells, n_genes, n_groups)
    counts, groups = cells.layers["counts"], cells.obs["cell_type"]
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        table = dropout_probability(counts, groups, max_zeros=max_zeros)
        best = min(best, time.perf_counter() - begun)
    density = counts.nnz / (n_cells * n_genes)
    found = int((table > 0).to_numpy().sum())
    return (
        f"{n_genes:,} genes x {n_groups} groups, {n_cells:,} cells, {density:.1%} "
        f"dense, max_zeros {max_zeros:g}: {found:,} of {table.size:,} with a "
        f"probability above 0, {best:.1f} s"
    )


def large_fit(n_cells: int, n_genes: int) -> str:
    """Train an epoch a phase on many cells, stream the result; say what it took."""
    torch.set_num_threads(1)
    cells = random_cells(n_cells, n_genes, 10)
    before = floor.peak_memory()
    config = ScGACLConfig(
        pre_epoch=1,
        vaeepoch=1,
        epoch=1,
        pre_batch_size=BATCH,
        vae_batch_size=BATCH,
        batch_size=BATCH,
        n_cluster=10,
    )
    begun = time.perf_counter()
    model = ScGACL(config, device="cpu").fit(cells, label_key=None)
    fitted, after_fit = time.perf_counter(), floor.peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        path = model.impute(cells, to=Path(folder) / "imputed.h5ad")
        seconds, size = time.perf_counter() - fitted, path.stat().st_size
    return (
        f"{n_cells:,} x {n_genes:,}, {cells.X.nnz / 1e6:.0f} M values: fit "
        f"{fitted - begun:.0f} s, {n_cells / (fitted - begun):,.0f} cells/s; impute "
        f"{seconds:.0f} s to a file of {size / 1e9:.1f} GB; peak {before / 1e9:.2f} GB "
        f"before, {after_fit / 1e9:.2f} GB with the fit, "
        f"{floor.peak_memory() / 1e9:.2f} GB in all"
    )


JOBS: dict[str, list[tuple[Any, tuple]]] = {
    "step": [(joint_step, (2000,))],
    "mixtures": [(mixtures, (3000, 5000, 30, share)) for share in (0.95, 1.0)],
    "large": [(large_fit, (100_000, 5000))],
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=JOBS)
    jobs = [job for name in parser.parse_args().only for job in JOBS[name]]
    made = sum(times for times, *_ in products_of(ScGACLConfig(), 2000))
    floor.table(
        f"scGACL, published widths, batch {BATCH} (one thread; floor of a step: {made} "
        "products and Adam)",
        jobs,
    )
