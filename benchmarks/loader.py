"""Speed and mixing of the row blocks: how many cells a second, and how well mixed.

A table of 200,000 cells x 2,000 genes, one entry in thirteen above 0, sorted by sample:
20 samples, one after another, as atlases are stored. It is read for one epoch in
minibatches of 128, each made dense, as a training step does; with

single rows       every row read alone, in random order, no pool
blocks            blocks of 256 rows, a pool of 8,192, as by default
small pool        the same blocks, a pool of one minibatch: a block a lane
in stored order   neighbours stay neighbours; no mixing

from memory, from .h5ad without and with compression, and from zarr. The columns: cells
per second of wall time and of CPU time, the mean entropy of the samples in a minibatch
(log2 20 = 4.32 bits is the most; 128 cells drawn at random have about 4.21), and the
peak memory. Files are read once before, so that the system holds them; with ``cold``
it is asked to forget them before the epoch.

Run: python benchmarks/loader.py [--only memory h5ad gzip zarr] [--cells 200000]
With ``--record`` the table goes to book/results, for the page on large atlases.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import _floor as floor
import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scgenlib import records, training
from scgenlib.estimator import data_hash
from scgenlib.rowblocks import CountSource, RowBlocks, open_counts, stored_order

GENES, SAMPLES, PER_CELL, BATCH = 2000, 20, 160, 128
FILES = {"memory": "a.h5ad", "h5ad": "a.h5ad", "gzip": "b.h5ad", "zarr": "c.zarr"}
WAYS: dict[str, dict[str, int]] = {
    "blocks": {},
    "small pool": {"pool": BATCH},
    "single rows": {"block": 1, "pool": BATCH},
    "in stored order": {},
}


def write(folder: Path, n_cells: int) -> str:
    """Write the same cells in each form; return their hash."""
    rng = np.random.default_rng(0)
    genes = rng.integers(0, GENES, (n_cells, PER_CELL), dtype=np.int32)
    values = 1 + rng.poisson(1.0, genes.size).astype(np.float32)
    ends = np.arange(0, genes.size + 1, PER_CELL)
    counts = sparse.csr_matrix((values, genes.ravel(), ends), (n_cells, GENES))
    counts.sum_duplicates()
    samples = pd.Categorical.from_codes(
        np.arange(n_cells) * SAMPLES // n_cells, [f"s{i}" for i in range(SAMPLES)]
    )
    names = pd.Index([f"cell {i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"gene {i}" for i in range(GENES)])
    obs = pd.DataFrame({"sample": samples}, index=names)
    cells = ad.AnnData(counts, obs=obs, var=var)
    cells.write_h5ad(folder / FILES["h5ad"])
    cells.write_h5ad(folder / FILES["gzip"], compression="gzip")
    cells.write_zarr(folder / FILES["zarr"])
    return data_hash(cells, ["sample"])


def batch_entropy(codes: np.ndarray) -> float:
    """Return the entropy, in bits, of the samples of one minibatch."""
    share = np.bincount(codes) / len(codes)
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum())


def touch(path: Path, forget: bool) -> None:
    """Have the system hold the files of `path`, or ask it to forget them."""
    for part in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
        with part.open("rb") as file:
            if forget:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def batches(source: CountSource, way: str) -> Iterator[tuple[np.ndarray, Any]]:
    """Give row numbers and counts of minibatches."""
    if way == "in stored order":
        for rows, X in stored_order(source):
            for at in range(0, X.shape[0], BATCH):
                part = X[at : at + BATCH]
                yield rows.start + at + np.arange(part.shape[0]), part
    else:
        for batch in RowBlocks(source, BATCH, **WAYS[way]).epoch(0):
            yield batch.rows[batch.rows >= 0], batch.X


def one_epoch(
    folder: Path, form: str, way: str, cold: bool, seconds: float
) -> dict[str, Any]:
    """Read for one epoch, or until the seconds are over; return what was measured."""
    torch.set_num_threads(1)
    path = folder / FILES[form]
    where = ad.read_h5ad(path) if form == "memory" else path
    with open_counts(where, batch_keys="sample") as source:
        codes = source.obs["sample"].cat.codes.to_numpy()
        next(batches(source, way))  # what is loaded at the first use
        touch(path, cold)
        seen, entropies = 0, []
        begun, cpu = time.perf_counter(), time.process_time()
        for rows, X in batches(source, way):
            training.minibatch(X, slice(None))
            entropies.append(batch_entropy(codes[rows]))
            seen += len(rows)
            if time.perf_counter() - begun > seconds:
                break
        wall = time.perf_counter() - begun
        cpu = time.process_time() - cpu
    return {
        "form": form,
        "cold": cold,
        "way": way,
        "cells_per_s": seen / wall,
        "cells_per_cpu_s": seen / cpu,
        "bits": float(np.mean(entropies)),
        "peak_gb": floor.peak_memory() / 1e9,
    }


def line(found: dict[str, Any]) -> str:
    """Return one line of the table."""
    name = f"{found['form']}{', cold' if found['cold'] else ''}: {found['way']}"
    return (
        f"{name:<34}{found['cells_per_s']:>12,.0f}{found['cells_per_cpu_s']:>14,.0f}"
        f"{found['bits']:>12.2f}{found['peak_gb']:>10.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, default=20.0, help="at most, each")
    parser.add_argument("--record", action="store_true", help="keep the table")
    arguments = parser.parse_args()
    print(f"Row blocks: {arguments.cells:,} cells x {GENES:,} genes, batch {BATCH}")
    print(
        f"{'':<34}{'cells/s':>12}{'cells/CPU-s':>14}{'bits':>12}{'peak GB':>10}",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    begun, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as made:
        jobs = [
            (Path(made), form, way, cold, arguments.seconds)
            for form in arguments.only
            for way in WAYS
            for cold in (False, True)
            if not cold or (form != "memory" and way == "blocks")
        ]
        # Each in a process of its own, for its memory.
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            digest = pool.submit(write, Path(made), arguments.cells).result()
        for job in jobs:
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                rows.append(pool.submit(one_epoch, *job).result())
            print(line(rows[-1]), flush=True)
    if arguments.record:
        records.write_record(
            records.record_path("scale", "simulated_atlas", "loader"),
            rows,
            {
                "cells": arguments.cells,
                "genes": GENES,
                "per_cell": PER_CELL,
                "samples": SAMPLES,
                "batch": BATCH,
                "block": 256,
                "pool": 8192,
                "seconds": arguments.seconds,
            },
            device="cpu",
            seconds=time.perf_counter() - begun,
            data_hash=digest,
            modules=["rowblocks", "training"],
        )
