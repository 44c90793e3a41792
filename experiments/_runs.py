"""What the scripts of the recorded runs share."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from anndata import AnnData

from scgenlib import records, training
from scgenlib.estimator import Config, data_hash

Rows = list[dict[str, Any]]


def some(cells: AnnData, n: int, seed: int = 0) -> AnnData:
    """Return n cells at random: generated rows come in an order of their own."""
    return cells[np.random.default_rng(seed).permutation(cells.n_obs)[:n]]


def by_seed(row: dict[str, Any]) -> Any:
    """Return what names the rows of one seed, so that a second run replaces them."""
    return row["seed"]


def add(
    script: str,
    name: str,
    rows: Rows,
    adata: AnnData,
    config: Config,
    args: argparse.Namespace,
    seconds: float,
    modules: Sequence[str],
    key_of: Callable[[dict[str, Any]], Any] = by_seed,
) -> None:
    """Write one seed's rows, beside those of other seeds of the same experiment.

    So a long run that was stopped keeps its finished seeds, and seeds can run side
    by side. Rows made by other code, settings, cells or devices are not kept.
    """
    chapter = Path(script).stem
    path = records.record_path(chapter, args.dataset, name, args.results_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    device = training.resolve_device(args.device)
    same = {
        "data_hash": data_hash(adata),
        "script": hashlib.sha256(Path(script).read_bytes()).hexdigest()[:12],
        "profile": args.profile,
        "threads": args.threads,
        "device_type": device.type,
    }
    # The folder is the lock: no file is left that another run may wait for.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        if path.is_file():
            old = json.loads(path.read_text())
            made = old["provenance"]
            fits = old["config"] == config.to_dict() and same.items() <= made.items()
            # Rows that other code made stand beside no new ones.
            if fits and made["code_hash"] == records.code_hash(made["modules"]):
                new = {key_of(row) for row in rows}
                rows = [row for row in old["rows"] if key_of(row) not in new] + rows
                rows.sort(key=lambda row: row["seed"])
                seconds += made["seconds"]
        records.write_record(
            path,
            rows,
            config,
            device=device,
            seconds=seconds,
            modules=modules,
            n_seeds=len({row["seed"] for row in rows}),
            n_cells=adata.n_obs,
            n_genes=adata.n_vars,
            **same,
        )
    finally:
        os.close(folder)
    print(path.name, f"{len(rows)} rows", flush=True)


def stands(
    script: str, name: str, seed: int, adata: AnnData, config: Config, args: Any
) -> bool:
    """Say whether the record has the seed, made by this code from these cells."""
    path = records.record_path(Path(script).stem, args.dataset, name, args.results_dir)
    if not path.is_file():
        return False
    old = json.loads(path.read_text())
    made = old["provenance"]
    same = {
        "data_hash": data_hash(adata),
        "code_hash": records.code_hash(made["modules"]),
        "script": hashlib.sha256(Path(script).read_bytes()).hexdigest()[:12],
        "profile": args.profile,
        "threads": args.threads,
        "device_type": training.resolve_device(args.device).type,
    }
    fits = same.items() <= made.items() and old["config"] == config.to_dict()
    return fits and seed in {row["seed"] for row in old["rows"]}


def short(value: Any) -> Any:
    """Return numbers with five digits: more would not repeat elsewhere."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
