"""Threads and data for all tests; set before numpy or torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# One setting is enough: the other two follow it.
os.environ.setdefault("OMP_NUM_THREADS", "2")
for _name in ("MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, os.environ["OMP_NUM_THREADS"])
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")

# Tests and the kernels they start run in other folders.
if os.environ.get("SCGENLIB_DATA_DIR"):
    os.environ["SCGENLIB_DATA_DIR"] = str(
        Path(os.environ["SCGENLIB_DATA_DIR"]).expanduser().resolve()
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `data`, and say why, where the files are not at hand."""
    folder = os.environ.get("SCGENLIB_DATA_DIR")
    if folder and Path(folder).is_dir():
        return
    reason = "needs the published files: set SCGENLIB_DATA_DIR to their folder"
    for item in items:
        if item.get_closest_marker("data"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the root of the repository."""
    return Path(__file__).resolve().parent.parent


#: Two lineages of two types each, for atlases that are quick to fit.
LINEAGES = {"A": {"A1": 30.0, "A2": 20.0}, "B": {"B1": 30.0, "B2": 20.0}}


@pytest.fixture(scope="session")
def small_atlas():
    """Return 300 cells x 80 genes: three reference batches and a query batch."""
    from scgenlib import simatlas

    return simatlas.atlas(
        300, 80, seed=1, lineages=LINEAGES, n_batches=3, n_query_batches=1, depth=3000
    )
