"""scAtlasVAE: training against its floor, batches from CSR, the codes, one recovery.

Products of a step, with batch B, genes G and the published widths. The two heads of
the encoder count as one product, and so do the decoder's 3 (scale, dispersion, gate;
2 if the dispersion is a gene's own):

========  ============================================================================
part      products
========  ============================================================================
encoder   forward and weight gradients G x 128 and 128 x 20; input gradient 20 to 128
decoder   forward, weight and input gradients (10 + 8) x 128 and 128 x 3 G
========  ============================================================================

and AdamW once for every weight. A step is the whole of it: drawing the batch from CSR,
noise, loss, gradients, update. All seconds are CPU seconds of one thread, the smallest
of five alternating repetitions, so that other programs on the machine matter little.

prepare   minibatches of 128 random rows made dense, from CSR in memory
embed     codes of cells in memory
recovery  2,000 cells x 500 genes, 4 batches, 5 types: a fit with the default settings

Each line is followed by the bar it is held to, where there is one. With --million
alone: cells x 2,000 genes are written to an .h5ad file in blocks, and a process of its
own fits one epoch out of core and embeds all cells (`python -m scgenlib.atlas`).

Run: python benchmarks/scatlasvae.py [--only step prepare embed recovery]
     python benchmarks/scatlasvae.py --million [--cells 1000000] [--folder scratch]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _floor as floor
import anndata as ad
import h5py
import numpy as np
import pandas as pd
import torch
from anndata.io import sparse_dataset, write_elem

from scgenlib import ScAtlasVAE, ScAtlasVAEConfig, integrators, simatlas, training
from scgenlib.likelihoods import counts_batch
from scgenlib.metrics import integration
from scgenlib.nets import count_parameters

BATCH, STEPS, REPEATS = 128, 20, 5
#: Mean total of a cell, for the number of genes, so that 10 % and 8 % are above 0.
DEPTH = {4000: 590.0, 2000: 215.0}
LINEAGES = {"A": {"A1": 1.0, "A2": 1.0, "A3": 1.0}, "B": {"B1": 1.0, "B2": 1.0}}


def cells_of(n_cells: int, n_genes: int) -> ad.AnnData:
    """Return an atlas of four batches as sparse as the bars ask for."""
    return simatlas.atlas(n_cells, n_genes, depth=DEPTH[n_genes])


def verdict(value: float, bar: float, at_least: bool = True) -> str:
    """Say what the bar is and whether it is reached."""
    holds = value >= bar if at_least else value <= bar
    word = "at least" if at_least else "at most"
    return f"bar: {word} {bar:,g}, {'reached' if holds else 'NOT reached'}"


def smallest(parts: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the CPU seconds of each part, the smallest of alternating repetitions."""
    best = dict.fromkeys(parts, float("inf"))
    for part in parts.values():
        part()
    for _ in range(REPEATS):
        for name, part in parts.items():
            begun = time.process_time()
            part()
            best[name] = min(best[name], time.process_time() - begun)
    return best


# ---------------------------------------------------------------------- one step


def products_of(config: ScAtlasVAEConfig, n_genes: int) -> list[floor.Product]:
    """Return the products of the table above."""
    b, width = config.n_per_batch, config.hidden_stacks[-1]
    outputs = 3 if config.dispersion == "gene-cell" else 2
    encoder = [n_genes, *config.hidden_stacks, 2 * config.n_latent]
    decoder = [config.n_latent + config.batch_hidden_dim, width, outputs * n_genes]
    return [
        *floor.forward(b, encoder),
        *floor.weight_gradients(b, encoder),
        *floor.input_gradients(b, encoder),
        *floor.forward(b, decoder),
        *floor.weight_gradients(b, decoder),
        *floor.input_gradients(b, decoder, first=True),
    ]


def training_step(n_cells: int, n_genes: int, dispersion: str) -> str:
    """Time the steps of a fit against their floor."""
    torch.set_num_threads(1)
    cells = cells_of(n_cells, n_genes)
    config = ScAtlasVAEConfig(
        n_genes=None,
        n_per_batch=BATCH,
        dispersion=dispersion,
        max_epoch=2,
        valid_share=0.0,
    )
    lines: list[str] = []

    def look(event: training.Event) -> bool:
        model: Any = event.model
        memory, at = floor.peak_memory(), iter(range(1, 10**6))
        operands = [
            (torch.rand(m, k), torch.rand(k, n), torch.empty(m, n))
            for _, m, k, n in products_of(config, n_genes)
        ]
        source, target = torch.zeros(2**26), torch.zeros(2**26)

        def steps() -> None:
            for _ in range(STEPS):
                model._step(next(at))

        def products() -> None:
            for _ in range(STEPS):
                for a, b, out in operands:
                    torch.mm(a, b, out=out)

        found = smallest(
            {"step": steps, "products": products, "copy": lambda: target.copy_(source)}
        )
        weights = sum(count_parameters(net) for net in model.modules_.values())
        result = floor.Result(
            found["step"] / STEPS,
            found["products"] / STEPS,
            2 * source.nbytes / found["copy"],
            weights,
        )
        name = f"{n_genes:,} genes, {dispersion}"
        lines.append(floor.row(name, result, BATCH, memory))
        if dispersion == "gene-cell":
            lines.append("  " + verdict(BATCH / result.step, 3500))
        return True  # one look is enough

    density = cells.X.nnz / (n_cells * n_genes)
    lines.append(f"  {n_cells:,} cells, {density:.1%} above 0, CPU seconds")
    ScAtlasVAE(config, device="cpu").fit(cells, callbacks=[look])
    return "\n".join([*lines[1:], lines[0]])


# ------------------------------------------------------------------ cells a second


def prepare(n_cells: int, n_genes: int) -> str:
    """Time how fast minibatches of random cells become dense."""
    torch.set_num_threads(1)
    X = cells_of(n_cells, n_genes).layers["counts"]
    order = np.random.default_rng(0).permutation(n_cells)
    parts = [order[i : i + BATCH] for i in range(0, n_cells, BATCH)]
    seconds = smallest({"": lambda: [counts_batch(X, rows) for rows in parts]})[""]
    density = X.nnz / (n_cells * n_genes)
    return (
        f"prepare: {n_cells:,} x {n_genes:,}, {density:.1%} above 0: "
        f"{n_cells / seconds:,.0f} cells/CPU-s; {verdict(n_cells / seconds, 1e5)}"
    )


def embed(n_cells: int, n_genes: int) -> str:
    """Time the codes of cells in memory, and say what the process took at most."""
    torch.set_num_threads(1)
    cells = cells_of(n_cells, n_genes)
    config = ScAtlasVAEConfig(n_genes=None, max_epoch=1)
    model = ScAtlasVAE(config, device="cpu").fit(cells)
    before = floor.peak_memory()
    seconds = smallest({"": lambda: model.embed(cells)})[""]
    return (
        f"embed: {n_cells:,} x {n_genes:,}: {n_cells / seconds:,.0f} cells/CPU-s; peak "
        f"{before / 1e9:.2f} GB with the fit, {floor.peak_memory() / 1e9:.2f} GB in all"
    )


def recovery(seed: int) -> str:
    """Fit cells whose batches lie further apart than their types."""
    torch.set_num_threads(1)
    cells = simatlas.atlas(2000, 500, lineages=LINEAGES, seed=seed)
    types, batches = cells.obs["cell_type"], cells.obs["batch"]

    def share(Z: ad.AnnData) -> float:
        return integration.same_batch_share(Z, types, batches)["same_batch_share"]

    before = share(integrators.pca(cells, 10))
    begun = time.process_time()
    model = ScAtlasVAE(seed=seed, device="cpu").fit(cells)
    seconds = time.process_time() - begun
    Z = model.embed(cells)
    ari, after = integration.kmeans_agreement(Z, types)["ari_kmeans"], share(Z)
    return (
        f"recovery, seed {seed}: same-batch share {before:.3f} in components, "
        f"{after:.3f} in codes; ARI {ari:.3f}; {seconds:.1f} CPU-s\n"
        f"  share {verdict(after, 0.55, False)}; ARI {verdict(ari, 0.95)}; seconds "
        f"{verdict(seconds, 60, False)}"
    )


# ------------------------------------------------------------- cells from a file


def write_cells(path: Path, n_cells: int, n_genes: int) -> float:
    """Write an atlas to a file block by block; return its entries above 0."""
    blocks = simatlas.atlas_blocks(n_cells, n_genes, depth=DEPTH[n_genes])
    tables: list[pd.DataFrame] = []
    with h5py.File(path, "w") as file:
        # What marks a file as AnnData.
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for counts, obs in blocks:
            if tables:
                sparse_dataset(file["X"]).append(counts)
            else:
                # Long pointers: a large atlas has more than 2^31 values.
                counts.indptr = counts.indptr.astype(np.int64)
                write_elem(file, "X", counts)
            tables.append(obs)
        genes = [f"gene{i + 1}" for i in range(n_genes)]
        write_elem(file, "obs", pd.concat(tables))
        write_elem(file, "var", pd.DataFrame(index=genes))
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            write_elem(file, name, {})
        return float(len(file["X/data"]))


def from_file(path: Path, out: Path, n_cells: int, above_0: float) -> str:
    """Fit one epoch and embed in a child process; say what it took."""
    command = [sys.executable, "-m", "scgenlib.atlas", str(path), "--out", str(out)]
    command += ["--batch-key", "batch", "--threads", "1", "--device", "cpu"]
    command += ["--set", "n_genes=2000", "max_epoch=1"]
    begun = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        return f"from a file: the child ended with status {status}"
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    cpu = used.ru_utime + used.ru_stime
    shape = np.load(out / "codes.npy", mmap_mode="r").shape
    return (
        f"from a file: {n_cells:,} cells, {above_0 / 1e6:.0f} M values, "
        f"{path.stat().st_size / 1e9:.2f} GB; one epoch and codes {shape}: "
        f"{seconds:.0f} s, {cpu:.0f} CPU-s; peak {peak:.2f} GB; "
        f"{verdict(peak, 3, False)}"
    )


def million(n_cells: int, folder: Path | None) -> None:
    """Write and fit in processes of their own, for their memory."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        path, out = Path(made) / "atlas.h5ad", Path(made) / "run"
        begun = time.perf_counter()
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            above_0 = pool.submit(write_cells, path, n_cells, 2000).result()
        print(f"written in {time.perf_counter() - begun:.0f} s", flush=True)
        print(from_file(path, out, n_cells, above_0), flush=True)


JOBS: dict[str, list[tuple[Any, tuple]]] = {
    "step": [(training_step, (20_000, 4000, how)) for how in ("gene-cell", "gene")],
    "prepare": [(prepare, (20_000, 2000))],
    "embed": [(embed, (20_000, 4000))],
    "recovery": [(recovery, (0,))],
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--million", action="store_true", help="cells from a file")
    parser.add_argument("--cells", type=int, default=1_000_000, help="of --million")
    parser.add_argument("--folder", type=Path, default=None, help="of its file")
    arguments = parser.parse_args()
    if arguments.million:
        million(arguments.cells, arguments.folder)
    else:
        floor.table(
            f"scAtlasVAE, published widths, batch {BATCH} (one thread; floor of a step:"
            " its products and AdamW)",
            [job for name in arguments.only for job in JOBS[name]],
        )
