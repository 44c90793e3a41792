"""How fast could a step be? Its matrix products alone, plus the optimiser's bytes.

A step is held against a floor: the products that a minimal derivation of the step
needs, run alone with ``torch.mm`` at the same shapes, and the weights updated times
28 bytes for Adam (read and write weight and two moments, read the gradient), or 36 for
AMSGrad (a third moment), over the bandwidth of a 256 MB copy. One thread; step,
products and copy take turns, and the smallest of the repetitions counts, so that
another program on the machine disturbs all three alike.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

ADAM_BYTES = 28
AMSGRAD_BYTES = 36

#: (how often, rows, inner width, columns) of one product.
Product = tuple[int, int, int, int]


def forward(rows: int, widths: Sequence[int], times: int = 1) -> list[Product]:
    """Products of a forward pass through linear layers."""
    return [(times, rows, a, b) for a, b in zip(widths, widths[1:], strict=False)]


def weight_gradients(rows: int, widths: Sequence[int], times: int = 1) -> list[Product]:
    """Products that give the gradients of the layers' weights."""
    return [(times, b, rows, a) for a, b in zip(widths, widths[1:], strict=False)]


def input_gradients(
    rows: int, widths: Sequence[int], times: int = 1, first: bool = False
) -> list[Product]:
    """Products that carry the gradient back; to the input itself only with `first`."""
    pairs = list(zip(widths, widths[1:], strict=False))
    return [(times, rows, b, a) for a, b in (pairs if first else pairs[1:])]


@dataclass
class Result:
    """Seconds of one step and of what its floor is made of."""

    step: float
    products: float
    bandwidth: float
    updated: int
    bytes_each: int = ADAM_BYTES

    @property
    def floor(self) -> float:
        """Seconds of the products and of the optimiser's memory traffic."""
        return self.products + self.updated * self.bytes_each / self.bandwidth


def measure(
    step: Callable[[], object],
    products: Iterable[Product],
    updated: int,
    repeats: int = 5,
    bytes_each: int = ADAM_BYTES,
) -> Result:
    """Time a step against its floor.

    Parameters
    ----------
    step
        Runs one step.
    products
        What `forward`, `weight_gradients` and `input_gradients` return.
    updated
        Weights updated in one step; a weight updated twice counts twice.
    repeats
        Alternating repetitions; the smallest time of each part counts.
    bytes_each
        What the optimiser reads and writes for each weight.
    """
    torch.set_num_threads(1)
    operands = [
        (times, torch.rand(m, k), torch.rand(k, n), torch.empty(m, n))
        for times, m, k, n in products
    ]
    source = torch.zeros(2**26)
    target = torch.zeros(2**26)

    def run_products() -> None:
        for times, a, b, out in operands:
            for _ in range(times):
                torch.mm(a, b, out=out)

    parts = {
        "step": step,
        "products": run_products,
        "copy": lambda: target.copy_(source),
    }
    best = dict.fromkeys(parts, float("inf"))
    for part in parts.values():
        part()
    for _ in range(repeats):
        for name, part in parts.items():
            begun = time.perf_counter()
            part()
            best[name] = min(best[name], time.perf_counter() - begun)
    bandwidth = 2 * source.nbytes / best["copy"]
    return Result(best["step"], best["products"], bandwidth, updated, bytes_each)


def peak_memory() -> float:
    """Return the largest resident memory of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(size if sys.platform == "darwin" else size * 1024)


def row(name: str, result: Result, cells: int, memory: float) -> str:
    """Return one line of a benchmark's table."""
    return (
        f"{name:<34}{1e3 * result.step:>10.1f}{1e3 * result.floor:>10.1f}"
        f"{result.step / result.floor:>8.2f}{cells / result.step:>12,.0f}"
        f"{memory / 1e9:>9.2f}"
    )


def table(title: str, jobs: Iterable[tuple[Callable[..., str], tuple]]) -> None:
    """Print one line per job; each runs in a process of its own, for its memory."""
    print(title)
    print(
        f"{'':<34}{'step ms':>10}{'floor ms':>10}{'ratio':>8}"
        f"{'cells/CPU-s':>12}{'peak GB':>9}",
        flush=True,
    )
    context = multiprocessing.get_context("spawn")
    for function, arguments in jobs:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            print(pool.submit(function, *arguments).result(), flush=True)
