"""Put a completed matrix together: what was observed stays, zeros are filled.

Methods and simple baselines alike predict a value for every entry. This module turns
predictions into a result: in memory as layers of an AnnData, or block by block into
a file, on the log scale and back on the scale of counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp

from scgenlib.errors import DataError, OutputError, message
from scgenlib.files import atomic
from scgenlib.preprocess import normalise

__all__ = ["LogCounts", "assemble", "completed", "log_counts", "to_counts", "write"]

#: Rows, their completed log values, and standard deviations or None.
Block = tuple[slice, np.ndarray, np.ndarray | None]

#: No result larger than this is made in memory.
MAX_BYTES = 1e9


@dataclass
class LogCounts:
    """Counts on the scale on which values are imputed.

    Attributes
    ----------
    values
        ln(1 + count x target / total of the cell), CSR float32.
    totals
        Total count of each cell over its genes, float64, shape (n_cells,).
    target
        The total to which every cell is scaled before the logarithm.
    """

    values: sp.csr_matrix
    totals: np.ndarray
    target: float


def log_counts(adata: ad.AnnData, target_sum: float | None = None) -> LogCounts:
    """Scale counts to one total and take the logarithm.

    Parameters
    ----------
    adata
        Cells with whole numbers in ``layers["counts"]``.
    target_sum
        Total of every cell; None takes the median total of these cells.

    Raises
    ------
    DataError
        There are no counts, or they are not whole numbers.
    """
    if "counts" not in adata.layers:
        do = "Use data with counts."
        raise DataError(message("Imputation starts from counts", found="none", do=do))
    counts = _canonical(adata.layers["counts"])
    if not np.array_equal(counts.data, np.rint(counts.data)):
        found, do = "values that are not whole", "Give raw counts, not logarithms."
        raise DataError(message("Imputation starts from counts", found=found, do=do))
    # Totals of read counts pass the whole numbers that float32 holds exactly.
    totals = np.asarray(counts @ np.ones(counts.shape[1]), dtype=np.float64)
    if target_sum is None:
        seen = totals[totals > 0]
        target_sum = float(np.median(seen)) if len(seen) else 1.0
    return LogCounts(normalise(counts, target_sum), totals, float(target_sum))


def _canonical(counts: Any) -> sp.csr_matrix:
    """Return counts with one entry a place and none of 0: that was not observed."""
    out = sp.csr_matrix(counts)
    if out.nnz and not (out.has_canonical_format and out.data.all()):
        out = out.copy()
        out.sum_duplicates()
        out.eliminate_zeros()
    return out


def assemble(
    observed: sp.csr_matrix, filled: np.ndarray, flagged: np.ndarray | None = None
) -> np.ndarray:
    """Return observed values where there are any, and a filled value elsewhere.

    Parameters
    ----------
    observed
        Log values, shape (n_cells, n_genes); what is not stored is a zero.
    filled
        A value for every entry; below 0 counts as 0.
    flagged
        Zeros to fill, bool of the same shape; the others stay 0. None fills all.

    Returns
    -------
    numpy.ndarray
        float32. Observed values are the same bits as in `observed`.
    """
    out = np.maximum(filled, 0).astype(np.float32)
    if flagged is not None:
        out[~flagged] = 0.0
    rows = np.repeat(np.arange(observed.shape[0]), np.diff(observed.indptr))
    out[rows, observed.indices] = observed.data
    return out


def to_counts(
    values: np.ndarray, log: LogCounts, counts: Any, rows: slice
) -> np.ndarray:
    """Return completed log values of some cells as counts; observed ones are exact.

    Parameters
    ----------
    values
        From `assemble`, shape (n_rows, n_genes).
    log
        Scale of the values.
    counts
        Raw counts of all cells, CSR or dense; None if no entry is to be kept.
    rows
        Which cells `values` has.
    """
    scale = (log.totals[rows] / log.target)[:, None]
    out = (np.expm1(values) * scale).astype(np.float32)
    if counts is None:
        return out
    raw = _canonical(counts[rows])
    at = np.repeat(np.arange(raw.shape[0]), np.diff(raw.indptr))
    out[at, raw.indices] = raw.data
    return out


def completed(
    adata: ad.AnnData,
    blocks: np.ndarray | Iterable[Block],
    log: LogCounts,
    about: Mapping[str, Any],
    keep_observed: bool = True,
) -> ad.AnnData:
    """Return a copy of the cells with the completed matrix as two layers.

    Parameters
    ----------
    adata
        Cells with counts; not changed.
    blocks
        Completed log values: one array of the shape of `adata`, or rows, values and
        standard deviations (or None) block by block.
    log
        Scale of the values, from `log_counts`.
    about
        Goes to ``uns["scgenlib"]``, with the scale.
    keep_observed
        Whether observed counts are kept exactly; False for a denoised matrix.

    Returns
    -------
    AnnData
        ``layers["imputed"]`` on the log scale and ``layers["imputed_counts"]`` on
        that of counts (all 0 in a cell without a count, whose depth is 0), and
        ``layers["imputed_sd"]`` where deviations were given; CSR where under half of
        the imputed entries are above 0.

    Raises
    ------
    DataError
        The dense result would take more than 1 GB.
    """
    check_size(adata.shape)
    made = {"imputed": np.empty(adata.shape, np.float32)}
    made["imputed_counts"] = np.empty(adata.shape, np.float32)
    if isinstance(blocks, np.ndarray):
        blocks = [(slice(0, adata.n_obs), blocks.astype(np.float32), None)]
    # Once: a layer of a view is cut out anew at each access.
    counts = sp.csr_matrix(adata.layers["counts"]) if keep_observed else None
    for rows, values, sd in blocks:
        made["imputed"][rows] = values
        made["imputed_counts"][rows] = to_counts(values, log, counts, rows)
        if sd is not None:
            made.setdefault("imputed_sd", np.zeros(adata.shape, np.float32))[rows] = sd
    out = adata.copy()
    sparse = np.count_nonzero(made["imputed"]) < 0.5 * made["imputed"].size
    for name, values in made.items():
        out.layers[name] = sp.csr_matrix(values) if sparse else values
    out.uns["scgenlib"] = {**about, "target_sum": log.target}
    return out


def check_size(shape: tuple[int, int]) -> None:
    """Refuse a dense result above 1 GB."""
    size = 4.0 * shape[0] * shape[1]
    if size > MAX_BYTES:
        raise DataError(
            message(
                "The completed matrix is too large for memory",
                found=f"{shape[0]:,} x {shape[1]:,}, {size / 1e9:.1f} GB",
                allowed="up to 1 GB",
                do="Give a file to stream to: impute(adata, to='imputed.h5ad').",
            )
        )


def write(
    adata: ad.AnnData,
    blocks: Iterable[Block],
    log: LogCounts,
    path: str | Path,
    about: Mapping[str, Any],
    sd: bool = False,
    keep_observed: bool = True,
) -> Path:
    """Write a completed matrix block by block; it is never in memory as a whole.

    Parameters
    ----------
    adata
        Cells with counts; not changed.
    blocks
        Rows, their completed log values and their standard deviations or None, in the
        order of the cells.
    log
        Scale of the values.
    path
        Ends in .h5ad: the cells with the layers of `completed`, dense and
        compressed. Ends in .csv: the log values, one row a cell, names in the first
        row and column.
    about
        Goes to ``uns["scgenlib"]`` of an .h5ad.
    sd
        Whether the blocks have standard deviations, for ``layers["imputed_sd"]``. A
        .csv has no place for them.
    keep_observed
        As in `completed`.

    Raises
    ------
    OutputError
        Another ending, or a place that cannot be written to.
    """
    path = Path(path)
    writers = {".h5ad": _write_h5ad, ".csv": _write_csv}
    if path.suffix not in writers:
        allowed = "a name that ends in .h5ad or .csv"
        raise OutputError(message("to", found=path.name, allowed=allowed))
    with atomic(path, "The imputed matrix cannot be written") as part:
        writers[path.suffix](adata, blocks, log, part, about, sd, keep_observed)
    return path


def _write_h5ad(
    adata: ad.AnnData,
    blocks: Iterable[Block],
    log: LogCounts,
    path: Path,
    about: Mapping[str, Any],
    sd: bool,
    keep_observed: bool,
) -> None:
    import h5py

    counts = sp.csr_matrix(adata.layers["counts"]) if keep_observed else None
    # Of an AnnData that is no view, nothing is copied for writing.
    shell = ad.AnnData(
        adata.X,
        obs=adata.obs,
        var=adata.var,
        layers={k: v for k, v in adata.layers.items() if not k.startswith("imputed")},
        obsm=dict(adata.obsm),
        varm=dict(adata.varm),
        obsp=dict(adata.obsp),
        varp=dict(adata.varp),
        uns={**adata.uns, "scgenlib": {**about, "target_sum": log.target}},
    )
    shell.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        made = {}
        for name in ("imputed", "imputed_counts", "imputed_sd")[: 2 + sd]:
            made[name] = file["layers"].create_dataset(
                name,
                adata.shape,
                dtype=np.float32,
                chunks=(min(128, adata.n_obs), min(1024, adata.n_vars)),
                compression="lzf",
            )
            made[name].attrs["encoding-type"] = "array"
            made[name].attrs["encoding-version"] = "0.2.0"
        for rows, values, deviation in blocks:
            made["imputed"][rows] = values
            made["imputed_counts"][rows] = to_counts(values, log, counts, rows)
            if deviation is not None:
                made["imputed_sd"][rows] = deviation


def _write_csv(
    adata: ad.AnnData,
    blocks: Iterable[Block],
    log: LogCounts,
    path: Path,
    about: Mapping[str, Any],
    sd: bool,
    keep_observed: bool,
) -> None:
    import pandas as pd

    with path.open("w", encoding="utf-8", newline="") as file:
        for rows, values, _ in blocks:
            frame = pd.DataFrame(values, adata.obs_names[rows], adata.var_names)
            frame.to_csv(file, header=rows.start == 0)
