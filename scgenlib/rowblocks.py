"""Count matrices that need not fit in memory, read in shuffled blocks of rows.

Reading single rows at random from a disk is slow; reading in stored order is fast but
gives minibatches of one sample, because files are sorted by sample. In between: blocks
of neighbouring rows in random order, and a pool of many blocks shuffled in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.errors import ConfigError, DataError, message, unknown

__all__ = ["Batch", "CountSource", "RowBlocks"]
__all__ += ["hash_split", "open_counts", "stored_order"]

_AHEAD = 2  # pools that are read before they are asked for


class CountSource:
    """A matrix of counts, cells x genes, read a range of rows at a time.

    Made by `open_counts`. A file is open for reading only, until `close` or the end
    of a `with`.

    Attributes
    ----------
    n_obs, n_vars
        Cells and genes.
    var_names
        Gene names, unique.
    obs
        The columns that were asked for, by row number.
    layer
        Where the counts are: ``"X"`` or ``"layers/counts"``.
    """

    def __init__(
        self, matrix: Any, layer: str, obs: Any, var: Any, keys: list, file: Any = None
    ) -> None:
        self.layer, self._table, self._file = layer, obs, file
        self.n_obs, self.n_vars = (int(n) for n in matrix.shape)
        self.obs = _columns(obs, keys, self.n_obs)
        self.var_names = _index(var)
        if not self.var_names.is_unique:
            twice = self.var_names[self.var_names.duplicated()].unique()
            found = f"{len(twice)} names more than once, such as {twice[0]!r}"
            do = "Call adata.var_names_make_unique() and write the file again."
            raise DataError(
                message("There are duplicate gene names", found=found, do=do)
            )
        kind = getattr(matrix, "format", None)
        if sp.issparse(matrix):
            m = matrix.tocsr()
            self._parts: tuple = m.indptr, m.indices, m.data
        elif kind == "csr":
            group = matrix.group
            self._parts = group["indptr"][:], group["indices"], group["data"]
        elif kind is None:
            self._parts = (matrix,)
        else:
            raise DataError(
                message(
                    f"{layer} is stored gene by gene: no block of cells can be read",
                    found=kind,
                    allowed="CSR, or a dense matrix",
                    do="Convert it where it fits in memory: adata.X ="
                    " scipy.sparse.csr_matrix(adata.X), or that layer; then write it.",
                )
            )

    @cached_property
    def obs_names(self) -> pd.Index:
        """Names of the cells; read when first asked for."""
        return _index(self._table)

    def read(
        self, start: int, stop: int, genes: np.ndarray | None = None
    ) -> sp.csr_matrix:
        """Return rows `start` to `stop` as CSR float32, never a view of the data.

        Parameters
        ----------
        start, stop
            Row numbers.
        genes
            Columns to return, in this order; -1 is a gene that the data do not have,
            a column of zeros. None: all.

        Raises
        ------
        DataError
            If a value is not a whole number, 0 or more; names the rows.
        """
        if len(self._parts) == 1:
            dense = np.asarray(self._parts[0][start:stop])
            self._check(dense.ravel(), np.arange(len(dense) + 1) * self.n_vars, start)
            block = sp.csr_matrix(dense, dtype=np.float32)
        else:
            pointers, indices, data = self._parts
            ends = pointers[start : stop + 1].astype(np.int64)
            part = slice(ends[0], ends[-1])
            ends -= ends[0]
            values = data[part]
            self._check(values, ends, start)
            # Copies: what is done to a block must not reach the data.
            places = np.array(indices[part], np.int32)
            parts = np.array(values, np.float32), places, ends.astype(np.int32)
            block = sp.csr_matrix(parts, shape=(stop - start, self.n_vars))
        if genes is None:
            return block
        there = np.flatnonzero(genes >= 0)
        block = block[:, genes[there]]
        parts = block.data, there.astype(np.int32)[block.indices], block.indptr
        return sp.csr_matrix(parts, shape=(stop - start, len(genes)))

    def _check(self, values: np.ndarray, ends: np.ndarray, start: int) -> None:
        """Refuse values that are not whole numbers >= 0; row i ends at ends[i + 1]."""
        if values.dtype.kind in "ub" or not len(values):
            return
        is_whole = values.dtype.kind == "i" or (np.rint(values) == values).all()
        if is_whole and values.min() >= 0 and values.max() < np.inf:
            return
        good = (values >= 0) & (np.rint(values) == values) & (values < np.inf)
        wrong = np.flatnonzero(~good)
        rows = np.unique(np.searchsorted(ends, wrong, "right") - 1) + start
        named = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise DataError(
            message(
                f"{self.layer} does not hold counts",
                found=f"{values[wrong[0]]:.4g}; such values in rows {named}",
                allowed="whole numbers, 0 or more",
                do="Name the layer with the raw counts.",
            )
        )

    def close(self) -> None:
        """Close the file, if `open_counts` opened one."""
        if isinstance(self._file, h5py.File):
            self._file.close()

    def __enter__(self) -> CountSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_counts(
    where: ad.AnnData | str | Path,
    *,
    layer: str = "auto",
    batch_keys: Sequence[str] = (),
    label_keys: Sequence[str] = (),
) -> CountSource:
    """Open a matrix of counts without reading it.

    Parameters
    ----------
    where
        An AnnData, in memory or backed, or the path of an .h5ad file or of a .zarr
        folder that anndata wrote. Sparse by row (CSR) or dense.
    layer
        ``"X"`` or the name of a layer. ``"auto"``: the layer counts, otherwise X.
    batch_keys, label_keys
        Columns of obs to read; a name or several.

    Raises
    ------
    ConfigError
        If there is no such layer or column.
    DataError
        If the file is not there or cannot be read so, or gene names repeat.
    """
    # One name is a name, not a list of letters.
    keys = [*np.atleast_1d(batch_keys).tolist(), *np.atleast_1d(label_keys).tolist()]
    if isinstance(where, ad.AnnData):
        if where.isbacked and where.is_view:
            problem = "A part of a backed AnnData cannot be read in blocks"
            do = "Give the whole one, and the wanted cells as a mask."
            raise DataError(message(problem, do=do))
        place = _choose(layer, where.layers, where.X is not None)
        matrix = where.X if place == "X" else where.layers[place.split("/", 1)[1]]
        return CountSource(matrix, place, where.obs, where.var, keys)
    file = _open(Path(where))
    try:
        place = _choose(layer, file.get("layers", {}), "X" in file)
        matrix = file[place]
        if hasattr(matrix, "keys"):
            matrix = ad.io.sparse_dataset(matrix)
        obs, var = _table(file["obs"]), _table(file["var"])
        return CountSource(matrix, place, obs, var, keys, file)
    except BaseException:
        if isinstance(file, h5py.File):
            file.close()
        raise


def _open(path: Path) -> Any:
    """Return the root group of a file, for reading only."""
    if not path.exists():
        raise DataError(message("There is no such file", found=str(path)))
    try:
        if path.is_dir():
            import zarr

            file: Any = zarr.open_group(str(path), mode="r")
        else:
            file = h5py.File(path, "r")
        if "obs" in file and "var" in file:
            return file
        found = "no obs and var"
    except (OSError, ValueError) as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
    problem = f"{path.name} cannot be read as data that anndata wrote"
    allowed = "an .h5ad file or a .zarr folder"
    raise DataError(message(problem, found=found, allowed=allowed))


def _choose(layer: str, layers: Iterable[str], has_x: bool) -> str:
    """Return the place of a matrix that is there: X or layers/name."""
    names = [*layers, *["X"] * has_x]
    if layer == "auto":
        layer = "counts" if "counts" in names else "X"
    if layer not in names:
        raise unknown("layer", layer, names)
    return layer if layer == "X" else f"layers/{layer}"


def _table(group: Any) -> Any:
    """Return a stored table as it is, or read it whole if it is of an old form."""
    is_new = group.attrs.get("encoding-version") == "0.2.0"
    return group if is_new else ad.io.read_elem(group)


def _columns(table: Any, keys: Sequence[str], n: int) -> pd.DataFrame:
    """Return some columns of a table in memory or on disk, by row number."""
    is_frame = isinstance(table, pd.DataFrame)
    there = list(table.columns if is_frame else table.attrs["column-order"])
    for key in keys:
        if key not in there:
            raise unknown("column of obs", key, there)
    get = (lambda c: c.array) if is_frame else ad.io.read_elem
    return pd.DataFrame({key: get(table[key]) for key in keys}, index=range(n))


def _index(table: Any) -> pd.Index:
    """Return the row names of a table, without its columns."""
    if isinstance(table, pd.DataFrame):
        return table.index
    return pd.Index(ad.io.read_elem(table[table.attrs["_index"]]), dtype=object)


def hash_split(
    obs_names: Iterable[str], share: float, buckets: int = 10_000
) -> np.ndarray:
    """Return which cells are held out, decided by the name of each cell alone.

    The same cell is on the same side in every run, in every process, in any order,
    and whatever other cells there are.

    Parameters
    ----------
    obs_names
        Names of the cells; cells of one name are on one side.
    share
        Expected share of held-out cells, rounded to a multiple of 1 / buckets.

    Returns
    -------
    ndarray
        Boolean, True where held out.
    """
    if not 0 <= share <= 1:
        raise ConfigError(message("share is out of range", found=share, allowed="0..1"))
    names = pd.Index(obs_names).astype(str).to_numpy(dtype=object)
    bucket = pd.util.hash_array(names, categorize=False) % np.uint64(buckets)
    return bucket < round(share * buckets)


# ---------------------------------------------------------------- the shuffled order


class Batch(NamedTuple):
    """What one process gets of one minibatch."""

    rows: np.ndarray  #: int64 row numbers of the source; -1 is padding
    X: sp.csr_matrix  #: float32 counts; rows of padding are empty
    weight: np.ndarray  #: float32, 1 for a cell and 0 for padding
    lanes: np.ndarray  #: the lane that each row came from


class RowBlocks:
    """Minibatches of shuffled cells, the same for any number of processes.

    The blocks of an epoch are put into random order, and the row of cells that this
    makes is cut into `lanes` parts of equal length, to within one cell. Each lane
    reads pool / lanes cells at a time, shuffles them, and gives batch_size / lanes of
    them to every minibatch. Process `rank` of `world` serves lanes rank, rank + world,
    ...: together, the processes see the same minibatches as one process alone. Every
    cell comes once in an epoch. The last minibatch is shorter, and has at most one
    row of padding a lane. The order depends on seed and epoch, and on the sizes here.

    Parameters
    ----------
    source
        What `open_counts` returns.
    batch_size
        Cells of a minibatch, over all processes.
    seed
        Of the order.
    block
        Neighbouring rows that are read together.
    pool
        Cells that are shuffled in memory together, over all lanes: a minibatch mixes
        pool / block blocks. A thread reads two pools ahead of the one in use; with
        its copies, a process holds at most about five times its share of a pool.
    lanes
        Parts of a minibatch; a multiple of every `world` that is to give the same.
    rank, world
        Which process this is, and of how many.
    columns
        Genes to return, as in `CountSource.read`.
    keep
        Boolean, one value a cell: False is never read into a minibatch.

    Raises
    ------
    ConfigError
        If world does not divide lanes, or lanes does not divide batch_size, or a
        size or a column is out of range.
    DataError
        If no cell is left.
    """

    def __init__(
        self,
        source: CountSource,
        batch_size: int = 128,
        *,
        seed: int = 0,
        block: int = 256,
        pool: int = 8192,
        lanes: int = 8,
        rank: int = 0,
        world: int = 1,
        columns: Sequence[int] | np.ndarray | None = None,
        keep: np.ndarray | None = None,
    ) -> None:
        _check_rank(rank, world)
        sizes = {"batch_size": batch_size, "pool": pool, "lanes": lanes, "world": world}
        fits = 0 < lanes <= batch_size <= pool and block > 0
        if not fits or lanes % world or batch_size % lanes:
            raise ConfigError(
                message(
                    "The minibatches cannot be dealt evenly",
                    found=sizes | {"block": block},
                    allowed="lanes a multiple of world, batch_size one of lanes, a pool"
                    " of at least one minibatch, blocks of at least one row",
                )
            )
        self.source, self.seed, self.block = source, seed, block
        self.columns = _genes(source, columns)
        self.own = np.arange(rank, lanes, world)
        self._keep = np.ones(source.n_obs, bool) if keep is None else np.asarray(keep)
        if self._keep.shape != (source.n_obs,) or self._keep.dtype != bool:
            found = f"{self._keep.dtype}, shape {self._keep.shape}"
            allowed = f"bool, shape ({source.n_obs},)"
            raise ConfigError(
                message("keep does not fit the cells", found=found, allowed=allowed)
            )
        self.n_rows = int(self._keep.sum())
        if not self.n_rows:
            raise DataError(message("No cell is left to train on"))
        starts = np.arange(0, source.n_obs, block)
        self._kept = np.add.reduceat(self._keep, starts, dtype=np.int64)
        self._width = batch_size // lanes
        self._per_pool = pool // batch_size
        self._bounds = self.n_rows * np.arange(lanes + 1) // lanes

    @property
    def n_batches(self) -> int:
        """Minibatches of an epoch, the same for every process."""
        return -(-int(np.diff(self._bounds).max()) // self._width)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """Give the minibatches of an epoch, from minibatch `first` on.

        Nothing that only minibatches before `first` need is read. A thread reads
        ahead; it ends with the iterator, also where that is dropped early.
        """
        order = np.random.default_rng([self.seed, number]).permutation(len(self._kept))
        ends = np.cumsum(self._kept[order])

        def read(at: int) -> tuple[list[np.ndarray], sp.csr_matrix]:
            pool, skip = divmod(at, self._per_pool)
            batches = self._pool(order, ends, number, pool)[skip:]
            return batches, self._gather(np.concatenate(batches))

        later = -(-(first + 1) // self._per_pool) * self._per_pool
        todo = [first, *range(later, self.n_batches, self._per_pool)]
        for batches, X in _ahead(read, todo if first < self.n_batches else []):
            begin = 0
            for rows in batches:
                part = X[begin : begin + len(rows)]
                begin += len(rows)
                lanes = np.repeat(self.own, len(rows) // len(self.own))
                yield Batch(rows, part, (rows >= 0).astype(np.float32), lanes)

    def _pool(
        self, order: np.ndarray, ends: np.ndarray, epoch: int, pool: int
    ) -> list[np.ndarray]:
        """Return the rows of each minibatch of a pool, lane by lane."""
        begins = self._bounds[:-1] + pool * self._per_pool * self._width
        stops = np.minimum(begins + self._per_pool * self._width, self._bounds[1:])
        table = np.full((len(self.own), int((stops - begins).max())), -1, np.int64)
        for line, lane in zip(table, self.own, strict=True):
            begin, stop = begins[lane], stops[lane]
            low, high = np.searchsorted(ends, [begin, stop], "right")
            rows = np.concatenate([self._rows(b) for b in order[low : high + 1]])
            begin -= ends[low] - self._kept[order[low]]
            rows = rows[begin : begin + stop - begins[lane]]
            draw = np.random.default_rng([self.seed, epoch, int(lane), pool])
            line[: len(rows)] = draw.permutation(rows)
        cuts = range(0, table.shape[1], self._width)
        return [table[:, at : at + self._width].ravel() for at in cuts]

    def _rows(self, block: int) -> np.ndarray:
        """Return the row numbers of a block, without cells that are left out."""
        start = block * self.block
        return start + np.flatnonzero(self._keep[start : start + self.block])

    def _gather(self, rows: np.ndarray) -> sp.csr_matrix:
        """Read rows in stored order, a range per block; give them in that of `rows`."""
        needed = np.sort(rows[rows >= 0])
        is_cut = (np.diff(needed) > 1) & (np.diff(needed // self.block) > 0)
        parts = []
        for piece in np.split(needed, np.flatnonzero(is_cut) + 1):
            if len(piece):
                start, stop = int(piece[0]), int(piece[-1]) + 1
                part = self.source.read(start, stop, self.columns)
                whole = stop - start == len(piece)
                parts.append(part if whole else part[piece - start])
        width = self.source.n_vars if self.columns is None else len(self.columns)
        parts.append(sp.csr_matrix((1, width), dtype=np.float32))
        at = np.where(rows >= 0, np.searchsorted(needed, rows), len(needed))
        return sp.vstack(parts, "csr")[at]


def stored_order(
    source: CountSource,
    rows: int = 4096,
    *,
    rank: int = 0,
    world: int = 1,
    columns: Sequence[int] | np.ndarray | None = None,
) -> Iterator[tuple[slice, sp.csr_matrix]]:
    """Give all cells as they are stored; each process a range of its own.

    Parameters
    ----------
    source
        What `open_counts` returns.
    rows
        Cells read at a time.
    rank, world
        Which process this is, and of how many.
    columns
        Genes to return, as in `CountSource.read`.

    Yields
    ------
    tuple
        The range of row numbers, and its counts as CSR float32.
    """
    _check_rank(rank, world)
    genes = _genes(source, columns)
    begin, end = (source.n_obs * part // world for part in (rank, rank + 1))
    parts = [slice(at, min(at + rows, end)) for at in range(begin, end, rows)]
    return _ahead(lambda part: (part, source.read(part.start, part.stop, genes)), parts)


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        allowed = "0 <= rank < world"
        raise ConfigError(
            message("No such process", found=f"{rank} of {world}", allowed=allowed)
        )


def _genes(
    source: CountSource, columns: Sequence[int] | np.ndarray | None
) -> np.ndarray | None:
    """Return columns as an array of numbers that the source has, or -1."""
    if columns is None:
        return None
    genes = np.asarray(columns)
    is_number = genes.ndim == 1 and len(genes) and genes.dtype.kind in "iu"
    if is_number and genes.min() >= -1 and genes.max() < source.n_vars:
        return genes.astype(np.int64)
    found, last = f"{genes.dtype}, shape {genes.shape}", source.n_vars - 1
    do = f"Use source.var_names.get_indexer(names): -1 to {last}."
    raise ConfigError(message("The columns are not gene numbers", found=found, do=do))


def _ahead(make: Callable[[Any], Any], todo: Iterable[Any]) -> Iterator[Any]:
    """Give make(item) for each item; a thread works up to `_AHEAD` items ahead."""
    items = iter(todo)
    with ThreadPoolExecutor(1, "rowblocks") as thread:
        waiting = deque(thread.submit(make, item) for item in islice(items, _AHEAD))
        try:
            while waiting:
                done = waiting.popleft().result()
                waiting.extend(thread.submit(make, item) for item in islice(items, 1))
                yield done
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
