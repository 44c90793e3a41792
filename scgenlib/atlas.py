r"""Fit scAtlasVAE to cells on disk, in one process or in several.

    torchrun --nproc-per-node 2 -m scgenlib.atlas atlas.h5ad --out run \
        --batch-key sample

What only large atlases need stands here. Cells are read in shuffled blocks
(`scgenlib.rowblocks`); with several processes each reads its own part of every
minibatch, and the numbers of cells that losses are divided by are those of all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import Tensor, distributed, nn

from scgenlib.cells import BLOCK
from scgenlib.countvae import CellBatch, Noise
from scgenlib.errors import ConfigError, ScgenError, message
from scgenlib.likelihoods import counts_batch
from scgenlib.mapping import match_genes
from scgenlib.preprocess import genes_by_dispersion, normalise
from scgenlib.rowblocks import Batch, CountSource, RowBlocks, open_counts, stored_order
from scgenlib.scatlasvae import Keys, ScAtlasVAE, ScAtlasVAEConfig, as_list
from scgenlib.training import Callback, resolve_device

__all__ = ["Group", "embed", "fit", "join_group", "main"]

#: Held-out cells stay in memory; more than these tell nothing more.
_MOST_VALID = 20_000


# ------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Group:
    """Which of how many processes this is."""

    rank: int = 0
    world: int = 1

    def add_up(self, values: Tensor) -> Tensor:
        """Return the sum of a vector over all processes."""
        total = values.clone()
        distributed.all_reduce(total)
        return total

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def join_group(device: str = "auto", minutes: float = 10.0) -> Iterator[Group]:
    """Join the processes that ``torchrun`` started; one process alone is a group too.

    Parameters
    ----------
    device
        See `training.resolve_device`. GPUs talk through NCCL, CPUs through gloo.
    minutes
        How long a process waits for the others before it gives up.
    """
    if "RANK" not in os.environ:
        yield Group()
        return
    is_cuda = resolve_device(device).type == "cuda"
    if is_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(
        "nccl" if is_cuda else "gloo", timeout=timedelta(minutes=minutes)
    )
    try:
        yield Group(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


# ------------------------------------------------------------------ cells on disk


class OnDisk:
    """Minibatches from blocks of rows; see `cells.Minibatches`.

    The noise of a row depends on seed, step and lane alone, and a lane's cells are the
    same for every number of processes. So one process and two compute the same losses,
    up to the order in which numbers are added.

    Parameters
    ----------
    model
        Its configuration and seed.
    blocks
        Where minibatches come from.
    batches, labels
        Codes of all cells, by row number.
    valid
        Counts of the held-out cells, and their row numbers.
    group
        This process.
    """

    def __init__(
        self,
        model: ScAtlasVAE,
        blocks: RowBlocks,
        batches: np.ndarray,
        labels: np.ndarray,
        valid: tuple[sparse.csr_matrix, np.ndarray],
        group: Group,
    ) -> None:
        self.model, self.blocks, self.group = model, blocks, group
        self.batches, self.labels, self.valid = batches, labels, valid
        self.n_batches, self.world = blocks.n_batches, group.world
        self.add_up: Callable[[Tensor], Tensor] | None = None
        if group.world > 1:
            self.add_up = group.add_up
        self._stream: Iterator[Batch] = iter(())
        self._next = -1

    def wrap(self, net: nn.Module) -> nn.Module:
        """Return the networks so that processes share their gradients."""
        if self.world == 1:
            return net
        cuda = self.model.device_.type == "cuda"
        if "batch" in self.model.config.norm:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        ids = [torch.cuda.current_device()] if cuda else None
        return nn.parallel.DistributedDataParallel(net, device_ids=ids)

    def _cells(
        self, X: sparse.csr_matrix, rows: np.ndarray, weight: np.ndarray
    ) -> CellBatch:
        device, real = self.model.device_, rows >= 0
        batches = np.where(real[:, None], self.batches[rows], 0)
        labels = np.where(real[:, None], self.labels[rows], -1)
        return CellBatch(
            counts_batch(X, slice(None), device),
            torch.from_numpy(batches).to(device),
            torch.from_numpy(labels).to(device),
            torch.from_numpy(weight).to(device),
        )

    def step(self, step: int) -> tuple[CellBatch, Noise]:
        """Return this process's cells of a step, and their noise."""
        if step != self._next or step % self.n_batches == 0:
            epoch, first = divmod(step, self.n_batches)
            self._stream = self.blocks.epoch(epoch, first)
        self._next = step + 1
        batch = next(self._stream)
        X, rows, weight, lanes = batch.X, batch.rows, batch.weight, batch.lanes
        noise = self._noise(step, lanes)
        if self.world == 1 and (rows >= 0).sum() > 1:
            # Alone there is nobody to keep in step with: padding can go.
            real = np.flatnonzero(rows >= 0)
            X, rows, weight = X[real], rows[real], weight[real]
            noise = Noise(noise.latent[real], tuple(k[real] for k in noise.keep))
        device = self.model.device_
        noise = Noise(noise.latent.to(device), tuple(k.to(device) for k in noise.keep))
        return self._cells(X, rows, weight), noise

    def _noise(self, step: int, lanes: np.ndarray) -> Noise:
        c, parts, places = self.model.config, [], []
        for lane in np.unique(lanes):
            seed = np.random.SeedSequence([self.model.seed, step, int(lane)])
            rng = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
            at = np.flatnonzero(lanes == lane)
            parts.append(
                Noise.draw(len(at), c.n_latent, c.hidden_stacks, c.dropout_rate, rng)
            )
            places.append(at)
        back = np.argsort(np.concatenate(places))
        keep = zip(*(part.keep for part in parts), strict=True)
        return Noise(
            torch.cat([part.latent for part in parts])[back],
            tuple(torch.cat(layer)[back] for layer in keep),
        )

    def held_out(self, share: bool = True) -> Iterator[CellBatch]:
        """Yield held-out cells in blocks, this process's share of them or all."""
        X, rows = self.valid
        mine = np.arange(len(rows))
        if share:
            mine = mine[self.group.rank :: self.world]
        for first in range(0, len(mine), BLOCK):
            part = mine[first : first + BLOCK]
            yield self._cells(X[part], rows[part], np.ones(len(part), np.float32))


@dataclass
class _Survey:
    """What one pass over all cells finds."""

    digest: str
    empty: np.ndarray
    valid: sparse.csr_matrix
    mean: np.ndarray
    variance: np.ndarray


def _survey(source: CountSource, valid: np.ndarray, moments: bool) -> _Survey:
    """Read all cells once: totals, held-out cells and, if asked, genes' moments."""
    digest = hashlib.blake2b("\n".join(source.var_names).encode(), digest_size=8)
    digest.update("\n".join(map(str, source.obs_names)).encode())
    empty = np.zeros(source.n_obs, bool)
    kept, sums, squares = [], np.zeros(source.n_vars), np.zeros(source.n_vars)
    for rows, X in stored_order(source):
        digest.update(X.data.data)
        digest.update(X.indices.data)
        empty[rows] = np.asarray(X.sum(axis=1)).ravel() == 0
        kept.append(X[valid[rows]])
        if moments:
            # Held-out cells have no say in the choice of genes.
            log = normalise(X[~valid[rows]], 1e4)
            values = log.data.astype(np.float64)
            sums += np.bincount(log.indices, values, source.n_vars)
            squares += np.bincount(log.indices, values**2, source.n_vars)
    n = max(int((~valid).sum()), 2)
    mean = sums / n
    variance = np.maximum(squares - n * mean**2, 0) / (n - 1)
    held = sparse.vstack(kept, format="csr")
    return _Survey(digest.hexdigest(), empty, held, mean, variance)


# --------------------------------------------------------------------- fit, embed


def fit(
    where: Any,
    *,
    batch_key: Keys = None,
    label_key: Keys = None,
    config: ScAtlasVAEConfig | None = None,
    layer: str = "auto",
    seed: int = 0,
    device: str = "auto",
    group: Group | None = None,
    pool: int = 8192,
    lanes: int = 8,
    callbacks: Iterable[Callback] = (),
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
) -> ScAtlasVAE:
    """Fit to cells that need not fit into memory.

    Parameters
    ----------
    where
        Path of an .h5ad file or a .zarr store, or an AnnData; counts in rows.
    batch_key, label_key
        As in `ScAtlasVAE.fit`; here the batch column must be named.
    config
        The ``book`` profile by default.
    layer
        Where the counts are: "auto" takes layers/counts, or X.
    seed, device
        See `Estimator`.
    group
        This process among others; None: alone.
    pool, lanes
        See `rowblocks.RowBlocks`.
    callbacks, checkpoint_dir, checkpoint_every, resume
        See `Estimator.fit`. The first process writes, all read.

    Returns
    -------
    ScAtlasVAE
        The fitted model, the same in every process.

    Raises
    ------
    ConfigError
        Processes on CPUs with batch normalisation, or sizes that do not divide.
    DataError
        The file does not hold counts, or a column is absent.
    """
    group = Group() if group is None else group
    model = ScAtlasVAE(config, seed=seed, device=device)
    c = model.config
    if c.reconstruction_method == "gaussian" or c.n_per_batch % lanes:
        raise ConfigError(
            message(
                "These settings do not go with reading from disk",
                found=f"{c.reconstruction_method}, {c.n_per_batch} cells per update",
                allowed=f"a likelihood of counts, a multiple of {lanes} cells",
            )
        )
    kind = resolve_device(device).type
    if group.world > 1 and "batch" in c.norm and kind != "cuda":
        raise ConfigError(
            message(
                "Batch normalisation over processes needs GPUs",
                found=f"{group.world} processes on {kind}",
                do="Set use_batch_norm=False and use_layer_norm=True.",
            )
        )
    keys = {"batch_keys": as_list(batch_key), "label_keys": as_list(label_key)}
    model.writes = group.rank == 0
    model._latent = None
    with open_counts(where, layer=layer, **keys) as source:

        def begin() -> None:
            obs = source.obs.set_index(pd.Index(source.obs_names.astype(str)))
            model._ask(obs, batch_key, label_key)
            valid = model._held_out(obs)
            held_out = np.flatnonzero(valid)
            if len(held_out) > _MOST_VALID:
                # From all over the file, which may be sorted by sample.
                at = np.arange(_MOST_VALID) * len(held_out) // _MOST_VALID
                valid[np.delete(held_out, at)] = False
            n_genes = c.n_genes or source.n_vars
            choose = n_genes < source.n_vars
            found = _survey(source, valid, choose)
            names = source.var_names.astype(str)
            if choose:
                moments = found.mean, found.variance
                names = pd.Index(genes_by_dispersion(*moments, names, n_genes))
            batches, labels = model._set_up(obs, list(names), valid)
            columns = source.var_names.get_indexer(names) if choose else None
            held = found.valid if columns is None else found.valid[:, columns]
            seen = np.flatnonzero(held.sum(axis=1))
            blocks = RowBlocks(
                source,
                c.n_per_batch,
                seed=seed,
                pool=pool,
                lanes=lanes,
                rank=group.rank,
                world=group.world,
                columns=columns,
                keep=~valid & ~found.empty,
            )
            model.n_cells_ = source.n_obs
            text = json.dumps([found.digest, model._asked, pool, lanes])
            digest = hashlib.blake2b(text.encode(), digest_size=8)
            digest.update(batches.tobytes() + labels.tobytes())
            model.data_hash_ = digest.hexdigest()
            model._cells = OnDisk(
                model,
                blocks,
                batches,
                labels,
                (held[seen], np.flatnonzero(valid)[seen]),
                group,
            )

        return model._run(begin, callbacks, checkpoint_dir, checkpoint_every, resume)


def embed(
    model: ScAtlasVAE,
    where: Any,
    out: str | Path,
    *,
    layer: str = "auto",
    group: Group | None = None,
) -> Path:
    """Write the codes of all cells as a .npy file, in the order of the file.

    Each process writes a range of rows of its own. Only a block is in memory.

    Returns
    -------
    pathlib.Path
        The file, float32 (n_cells, n_latent); `numpy.load(out, mmap_mode="r")`.
    """
    model._check_fitted()
    group = Group() if group is None else group
    keys = list(model.sizes_["batch"]) if model.config.encode_batch else []
    out = Path(out)
    part = out.with_name(out.name + ".part")
    with open_counts(where, layer=layer, batch_keys=keys) as source:
        shape = (source.n_obs, model.config.n_latent)
        if group.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(part, "w+", np.float32, shape).flush()
        group.wait()
        codes = np.lib.format.open_memmap(part, "r+")
        for rows, X in stored_order(source, rank=group.rank, world=group.world):
            own, _ = match_genes(X, source.var_names, model.genes_)
            codes[rows] = model._codes(own, source.obs.iloc[rows])
        codes.flush()
    group.wait()
    if group.rank == 0:
        os.replace(part, out)
    group.wait()
    return out


# ------------------------------------------------------------------- command line


def _settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Return name=value pairs as settings; values are JSON where they can be."""
    made: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(
                message("--set takes name=value", found=pair, allowed="max_epoch=5")
            )
        try:
            made[name] = json.loads(text)
        except ValueError:
            made[name] = text
    return made


def _parser() -> argparse.ArgumentParser:
    about = "Fit scAtlasVAE to cells on disk and write their codes."
    parser = argparse.ArgumentParser("python -m scgenlib.atlas", description=about)
    # Given twice, both count.
    several: Any = {"nargs": "*", "action": "extend", "default": []}
    parser.add_argument("where", help=".h5ad file or .zarr store with counts in rows")
    parser.add_argument("--out", required=True, help="folder for model and codes.npy")
    parser.add_argument("--batch-key", **several, help="columns of batches")
    parser.add_argument("--label-key", **several, help="columns of types")
    parser.add_argument("--layer", default="auto", help="X, or the name of a layer")
    parser.add_argument("--profile", default="book", choices=ScAtlasVAEConfig.PROFILES)
    parser.add_argument("--set", **several, metavar="NAME=VALUE", help="other settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument(
        "--lanes", type=int, default=8, help="a multiple of the number of processes"
    )
    parser.add_argument("--checkpoint-every", type=int, default=500, metavar="STEPS")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out"
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="wait for other processes so long"
    )
    return parser


def _stopped(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 after an error that was told."""
    args = _parser().parse_args(arguments)
    rank = int(os.environ.get("RANK", 0))
    torch.set_num_threads(args.threads)
    # torchrun ends the other processes when one is gone: say so, and leave tidily.
    signal.signal(signal.SIGTERM, _stopped)
    advice = "Start the same line again with --resume."
    try:
        with join_group(args.device, args.minutes) as group:
            _work(args, group)
    except ScgenError as error:
        print(error, file=sys.stderr)
        return 1
    except SystemExit as stop:
        text = f"Process {rank} was told to stop. {advice}"
        print(text, file=sys.stderr, flush=True)
        return int(stop.code or 0)
    except (RuntimeError, torch.distributed.DistError) as error:
        if "RANK" not in os.environ or isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"Process {rank} stopped: another process of the group is gone, or the"
            f" connection to it ({first}). {advice}",
            file=sys.stderr,
            flush=True,
        )
        # The group cannot be left in good order any more.
        os._exit(1)
    return 0


def _work(args: argparse.Namespace, group: Group) -> None:
    out = Path(args.out)
    config = ScAtlasVAEConfig.profile(args.profile, **_settings(args.set))
    model = fit(
        args.where,
        batch_key=args.batch_key or None,
        label_key=args.label_key or None,
        config=config,
        layer=args.layer,
        seed=args.seed,
        device=args.device,
        group=group,
        lanes=args.lanes,
        checkpoint_dir=out,
        checkpoint_every=args.checkpoint_every,
        resume=args.resume,
    )
    if group.rank == 0:
        model.save(out / "model")
    path = embed(model, args.where, out / "codes.npy", layer=args.layer, group=group)
    if group.rank == 0:
        steps = model.history_["step"].max() + 1
        print(f"{model}\n{steps} steps in {model.fit_seconds_:.0f} s; {path}")


if __name__ == "__main__":
    sys.exit(main())
