"""What the scripts of the recorded runs share."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scgenlib import datasets, records, training
from scgenlib.estimator import Config

Rows = list[dict[str, Any]]


def parser(
    doc: str, profiles: Iterable[str], experiments: Collection[str]
) -> argparse.ArgumentParser:
    """Return the arguments that every script takes."""
    made = argparse.ArgumentParser(description=doc.split("\n")[0])
    made.add_argument("--dataset", required=True)
    made.add_argument("--label-key", help="your own file's column of types")
    made.add_argument("--batch-key", help="your own file's column of batches")
    made.add_argument("--profile", default="book", choices=list(profiles))
    made.add_argument("--seeds", type=int, default=5, help="how many")
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--only", nargs="+", choices=list(experiments))
    made.add_argument("--device", default="auto")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--results-dir")
    return made


def parse(
    given: argparse.ArgumentParser, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Read the arguments and fix the threads."""
    args = given.parse_args(arguments)
    torch.set_num_threads(args.threads)
    return args


def load(args: argparse.Namespace) -> AnnData:
    """Return the cells that the arguments ask for."""
    return datasets.load(
        args.dataset, label_key=args.label_key, batch_key=args.batch_key
    )


def seeds(args: argparse.Namespace) -> range:
    """Return the seeds that the arguments ask for."""
    return range(args.first_seed, args.first_seed + args.seeds)


def timed(call: Callable[..., Any], *given: Any, **named: Any) -> tuple[Any, float]:
    """Return what a call returns, and its CPU seconds."""
    begun = time.process_time()
    made = call(*given, **named)
    return made, time.process_time() - begun


def run_seed(
    script: str,
    lab: Any,
    experiments: Mapping[str, Callable[[Any], Rows]],
    adata: AnnData,
    config: Config,
    args: argparse.Namespace,
    modules: Callable[[str], Sequence[str]],
) -> None:
    """Write the rows of one seed, but for experiments whose record has the seed."""
    for name, experiment in experiments.items():
        if stands(script, name, lab.seed, adata, config, args):
            print(f"{name}, seed {lab.seed}: stands in the record", flush=True)
            continue
        begun = time.perf_counter()
        rows, cpu = timed(experiment, lab)
        rows = [short(row) for row in rows]
        seconds = time.perf_counter() - begun
        add(script, name, rows, adata, config, args, seconds, modules(name))
        print(f"{name}, seed {lab.seed}: {cpu:.0f} CPU seconds", flush=True)


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
    same = origin(script, adata, args)
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
    same = origin(script, adata, args)
    same["code_hash"] = records.code_hash(made["modules"])
    fits = same.items() <= made.items() and old["config"] == config.to_dict()
    return fits and seed in {row["seed"] for row in old["rows"]}


def origin(script: str, adata: AnnData, args: argparse.Namespace) -> dict[str, Any]:
    """Return what the rows of one record share, besides settings and package."""
    return {
        "data_hash": records.cells_hash(adata),
        "script": hashlib.sha256(Path(script).read_bytes()).hexdigest()[:12],
        "profile": args.profile,
        "threads": args.threads,
        "device_type": training.resolve_device(args.device).type,
    }


def short(value: Any) -> Any:
    """Return numbers with six digits: more would not repeat elsewhere."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, list):
        return [short(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
