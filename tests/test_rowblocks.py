"""Row blocks: every cell once, one order for all, what is refused, no thread left."""

from __future__ import annotations

import gc
import threading

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scgenlib import rowblocks
from scgenlib.errors import ConfigError, DataError
from scgenlib.rowblocks import RowBlocks, hash_split, open_counts, stored_order

N, GENES = 1003, 12  # the last block of 20 rows has 3
SMALL = {"batch_size": 32, "block": 20, "pool": 128, "lanes": 4, "seed": 3}


def counts(n: int = N) -> np.ndarray:
    """Counts that tell each row: the first gene holds the row number + 1."""
    values = np.random.default_rng(0).poisson(0.5, (n, GENES)).astype(np.float32)
    values[:, 0] = np.arange(n) + 1
    return values


def cells(n: int = N, kind=sp.csr_matrix) -> ad.AnnData:
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    obs["batch"] = pd.Categorical([f"b{i * 5 // n}" for i in range(n)])
    obs["depth"] = np.arange(n) / 2
    var = pd.DataFrame(index=[f"g{i}" for i in range(GENES)])
    return ad.AnnData(kind(counts(n)), obs=obs, var=var)


@pytest.fixture(scope="module")
def memory():
    return open_counts(cells())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The same cells in every form that can be read."""
    folder = tmp_path_factory.mktemp("stored")
    data, dense = cells(), cells(kind=np.asarray)
    layered = ad.AnnData(data.X.log1p(), data.obs, data.var, layers={"counts": data.X})
    paths = {name: folder / name for name in ("s.h5ad", "z.h5ad", "d.h5ad", "l.h5ad")}
    data.write_h5ad(paths["s.h5ad"])
    data.write_h5ad(paths["z.h5ad"], compression="gzip")
    dense.write_h5ad(paths["d.h5ad"])
    layered.write_h5ad(paths["l.h5ad"])
    for name, kind in (("s.zarr", data), ("d.zarr", dense), ("l.zarr", layered)):
        kind.write_zarr(folder / name)
        paths[name] = folder / name
    wide = data.copy()
    wide.X.indices, wide.X.indptr = (
        part.astype(np.int64) for part in (wide.X.indices, wide.X.indptr)
    )
    wide.X.data = wide.X.data.astype(np.uint16)
    backed = ad.read_h5ad(paths["s.h5ad"], backed="r")
    yield paths | {"backed": backed, "dense": dense, "layer": layered, "wide": wide}
    backed.file.close()


FORMS = ["s.h5ad", "z.h5ad", "d.h5ad", "l.h5ad", "s.zarr", "d.zarr", "l.zarr"]
FORMS += ["backed", "dense", "layer", "wide"]


def run(source, number=0, first=0, **options):
    return list(RowBlocks(source, **SMALL | options).epoch(number, first))


def real(batches) -> np.ndarray:
    rows = np.concatenate([batch.rows for batch in batches])
    return rows[rows >= 0]


def same(one, two) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.rows, b.rows)
        np.testing.assert_array_equal(a.lanes, b.lanes)
        np.testing.assert_array_equal(a.X.toarray(), b.X.toarray())


def threads() -> list[str]:
    gc.collect()
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("rowblocks")]


# ---------------------------------------------------------------------- the source


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_order_and_values(form, stored, memory):
    with open_counts(stored[form], batch_keys=["batch"]) as source:
        assert (source.n_obs, source.n_vars) == (N, GENES)
        assert list(source.obs.columns) == ["batch"]
        assert list(source.obs.index[:2]) == [0, 1]
        assert source.obs["batch"].dtype == "category"
        assert list(source.obs["batch"].astype(str)[[0, N - 1]]) == ["b0", "b4"]
        assert list(source.obs_names) == [f"c{i}" for i in range(N)]
        assert list(source.var_names) == [f"g{i}" for i in range(GENES)]
        assert source.layer == ("layers/counts" if form[0] == "l" else "X")
        same(run(source), run(memory))
        block = source.read(5, 6)
        assert block.dtype == np.float32 and block.shape == (1, GENES)
        np.testing.assert_array_equal(block.toarray(), counts()[5:6])


def test_rows_hold_their_counts(memory):
    for batch in run(memory):
        expected = np.where(batch.rows[:, None] >= 0, counts()[batch.rows], 0)
        np.testing.assert_array_equal(batch.X.toarray(), expected)


@pytest.mark.parametrize("form", ["s.h5ad", "dense", "layer"])
def test_genes_that_are_missing_are_zero(form, stored):
    genes = np.array([3, -1, 0, -1, 11])
    expected = np.where(genes >= 0, counts()[:, genes], 0)
    with open_counts(stored[form]) as source:
        np.testing.assert_array_equal(source.read(7, 9, genes).toarray(), expected[7:9])
        for batch in run(source, columns=list(genes))[:-1]:
            np.testing.assert_array_equal(batch.X.toarray(), expected[batch.rows])
        none = RowBlocks(source, columns=np.array([-1])).epoch(0)
        assert next(none).X.nnz == 0
        for wrong in ([GENES], [-2], [0.5], [], [[1]]):
            with pytest.raises(ConfigError, match="-1 to 11"):
                RowBlocks(source, columns=wrong)


def test_what_is_read_is_a_copy():
    data = cells()
    block = open_counts(data).read(0, N)
    block.data[:], block.indices[:] = -1, 0
    np.testing.assert_array_equal(data.X.toarray(), counts())


def test_layer_and_columns(stored):
    assert open_counts(stored["layer"], layer="counts").layer == "layers/counts"
    assert open_counts(stored["dense"], layer="X").layer == "X"
    both = open_counts(stored["s.zarr"], batch_keys="batch", label_keys=["depth"]).obs
    assert list(both["depth"][:3]) == [0, 0.5, 1] and list(both) == ["batch", "depth"]
    for form in ("s.h5ad", "dense"):
        with pytest.raises(ConfigError, match="Did you mean 'batch'"):
            open_counts(stored[form], label_keys=["bach"])
        with pytest.raises(ConfigError, match="Unknown layer.*Allowed: X"):
            open_counts(stored[form], layer="raw")
    assert list(open_counts(stored["s.h5ad"]).obs.index[-1:]) == [N - 1]


@pytest.mark.parametrize("kind", [sp.csr_matrix, np.asarray])
@pytest.mark.parametrize("value", [0.5, -1.0, np.nan, np.inf])
def test_what_is_no_count_is_named_by_row(kind, value):
    data = cells(kind=kind)
    data.X[[400, 700], [5, 0]] = value
    source = open_counts(data)
    source.read(0, 400)
    with pytest.raises(DataError, match=f"X does not .*{value:.4g}; .*rows 400, 700"):
        source.read(300, N)
    # In a thread, as in the call: the error reaches the loop, the thread ends.
    with pytest.raises(DataError, match="whole numbers"):
        run(source)
    assert not threads()


def test_negative_integers_are_refused():
    data = cells(kind=np.asarray)
    data.X = data.X.astype(np.int32)
    data.X[9, 2] = -3
    with pytest.raises(DataError, match="-3; such values in rows 9"):
        open_counts(data).read(0, 20)


def test_stored_by_column(tmp_path, memory):
    data = cells(kind=sp.csc_matrix)
    same(run(open_counts(data)), run(memory))  # turned in memory
    data.write_h5ad(tmp_path / "c.h5ad")
    data.write_zarr(tmp_path / "c.zarr")
    for name in ("c.zarr", "c.h5ad"):
        with pytest.raises(DataError, match="gene by gene.*csr_matrix") as kept:
            open_counts(tmp_path / name)
        assert kept.traceback  # as a notebook keeps the last one
    with h5py.File(tmp_path / "c.h5ad", "r+"):  # nothing holds it open
        pass


def test_files_that_will_not_do(tmp_path, stored):
    with pytest.raises(DataError, match="no such file"):
        open_counts(tmp_path / "a.h5ad")
    (tmp_path / "b.h5ad").write_bytes(b"text")
    with h5py.File(tmp_path / "c.h5ad", "w") as file:
        file["X"] = np.ones((2, 2))
    (tmp_path / "d.zarr").mkdir()
    for name in ("b.h5ad", "c.h5ad", "d.zarr"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            open_counts(tmp_path / name)
    data = cells(4)
    data.var_names = ["g"] * GENES
    with pytest.warns(UserWarning), pytest.raises(DataError, match="such as 'g'"):
        open_counts(data.copy())
    with pytest.raises(DataError, match="backed"):
        open_counts(stored["backed"][:5])


def test_held_out_cells_depend_on_names_alone():
    names = [f"c{i}" for i in range(20_000)]
    out = hash_split(names, 0.1)
    assert out.dtype == bool and abs(out.mean() - 0.1) < 0.01
    order = np.random.default_rng(0).permutation(len(names))
    again = hash_split(pd.Index(names)[order[:500]], 0.1)
    np.testing.assert_array_equal(again, out[order[:500]])
    np.testing.assert_array_equal(hash_split(pd.CategoricalIndex(names), 0.1), out)
    # A larger share holds out the same cells, and more; these stay so for good.
    assert (hash_split(names, 0.2) >= out).all()
    assert list(np.flatnonzero(out)[:6]) == [0, 1, 10, 14, 20, 21]
    assert not hash_split(names, 0).any() and hash_split(names, 1).all()
    with pytest.raises(ConfigError, match="share"):
        hash_split(names, 1.5)


# ----------------------------------------------------------------------- the order


@pytest.mark.parametrize("n", [1, 3, 20, 31, 33, 40, 128, 257, N])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_cell_once_and_one_order_for_all_worlds(n, world):
    source = open_counts(cells(n))
    alone = run(source)
    ranks = [run(source, rank=rank, world=world) for rank in range(world)]
    assert sorted(real(sum(ranks, []))) == list(range(n))
    assert len({len(part) for part in ranks}) == 1
    assert len(alone) == RowBlocks(source, **SMALL, world=world).n_batches
    for k, batch in enumerate(alone):
        parts = [part[k] for part in ranks]
        assert sorted(real(parts)) == sorted(real([batch]))
        assert len({len(part.rows) for part in parts}) == 1
        for rank, part in enumerate(parts):
            assert set(part.lanes) == set(range(rank, 4, world))
            for lane in set(part.lanes):
                theirs = batch.rows[batch.lanes == lane]
                np.testing.assert_array_equal(part.rows[part.lanes == lane], theirs)
            np.testing.assert_array_equal(part.weight, part.rows >= 0)
            assert part.weight.dtype == np.float32 and part.rows.dtype == np.int64
            assert part.X.shape == (len(part.rows), GENES)
            assert not part.X[part.rows < 0].nnz
    # Full ones are full; the last is padded by at most one row a lane.
    assert all(len(b.rows) == 32 and b.weight.all() for b in alone[:-1])
    assert (alone[-1].weight == 0).sum() < 4


@pytest.mark.parametrize("first", [0, 1, 3, 4, 5, 8, 30, 31, 32])
def test_seek_equals_running_through(first, memory):
    for options in ({}, {"rank": 1, "world": 2}):
        same(run(memory, 2, first, **options), run(memory, 2, **options)[first:])


def test_seek_reads_only_what_it_must(memory, monkeypatch):
    read, seen = memory.read, []

    def look(start, stop, genes=None):
        seen.append(stop - start)
        return read(start, stop, genes)

    monkeypatch.setattr(memory, "read", look)
    assert len(run(memory, first=31)) == 1
    # The last minibatch has 11 rows; a range skips less than a block each.
    assert sum(seen) < 4 * 20
    seen.clear()
    run(memory)
    assert sum(seen) == N
    # With cells left out, still one range a block: not one for each gap.
    seen.clear()
    run(memory, keep=np.arange(N) % 2 == 0)
    assert len(seen) < 2 * N / 20


def test_order_is_that_of_seed_and_epoch(memory):
    first = real(run(memory))
    np.testing.assert_array_equal(real(run(memory)), first)
    for other in (run(memory, 1), run(memory, seed=4)):
        assert (real(other) != first).mean() > 0.9
        assert sorted(real(other)) == sorted(first)
        # Not only the order within a pool: other blocks come first.
        assert len(np.intersect1d(real(other)[:128], first[:128])) < 64


def test_a_lane_that_ends_with_a_pool_and_a_block():
    source = open_counts(cells(161))
    for number in range(5):
        batches = run(source, number, pool=160)
        assert sorted(real(batches)) == list(range(161)) and len(batches) == 6


def test_cells_left_out_are_never_read(memory):
    keep = np.random.default_rng(0).random(N) < 0.4
    keep[100:300] = False  # ten blocks without any
    for world in (1, 2):
        parts = [run(memory, keep=keep, rank=r, world=world) for r in range(world)]
        assert sorted(real(sum(parts, []))) == list(np.flatnonzero(keep))
        assert len({len(part) for part in parts}) == 1
    for batch in parts[0]:
        expected = np.where(batch.rows[:, None] >= 0, counts()[batch.rows], 0)
        np.testing.assert_array_equal(batch.X.toarray(), expected)
    with pytest.raises(DataError, match="No cell"):
        RowBlocks(memory, keep=np.zeros(N, bool))
    for wrong in (keep[1:], keep.astype(int)):
        with pytest.raises(ConfigError, match="keep does not fit"):
            RowBlocks(memory, keep=wrong)


def batch_entropy(batches, codes) -> float:
    """Mean entropy, in bits, of the samples of whole minibatches."""
    shares = [np.bincount(codes[b.rows]) / len(b.rows) for b in batches[:-1]]
    return float(np.mean([-(p[p > 0] * np.log2(p[p > 0])).sum() for p in shares]))


def test_a_larger_pool_mixes_samples_better():
    source = open_counts(cells(4000))
    codes = np.arange(4000) * 8 // 4000  # sorted by sample: log2(8) = 3 bits at best
    mixed = {
        pool: batch_entropy(run(source, pool=pool, block=block), codes)
        for pool, block in ((32, 32), (128, 32), (1024, 32))
    }
    # A pool of one minibatch holds a block a lane: four of eight samples at most.
    assert mixed[32] < 1.8 < mixed[128] < 2.3 < mixed[1024]
    assert 2.6 < mixed[1024] < 3
    assert batch_entropy(run(source, block=1), codes) > 2.75


@pytest.mark.parametrize(
    "options",
    [
        {"world": 3}, {"world": 8, "rank": 1}, {"lanes": 5}, {"batch_size": 30},
        {"pool": 31}, {"block": 0}, {"lanes": 0}, {"batch_size": 0}, {"lanes": 64},
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide(options, memory):
    with pytest.raises(ConfigError, match="dealt evenly.*lanes a multiple of world"):
        RowBlocks(memory, **SMALL | options)


@pytest.mark.parametrize(("rank", "world"), [(-1, 2), (2, 2), (0, 0)])
def test_no_such_process(rank, world, memory):
    with pytest.raises(ConfigError, match="No such process"):
        RowBlocks(memory, **SMALL, rank=rank, world=world)
    with pytest.raises(ConfigError, match="No such process"):
        stored_order(memory, rank=rank, world=world)


# ------------------------------------------------------------------------ the thread


def test_no_thread_is_left(memory):
    epoch = RowBlocks(memory, **SMALL).epoch(0)
    assert not threads()  # nothing runs before it is asked for
    next(epoch)
    assert len(threads()) == 1
    del epoch
    assert not threads()
    for _ in stored_order(memory, 10):
        break
    assert not threads()
    run(memory)
    assert not threads()


def test_the_thread_works_ahead_and_no_further():
    taken, made, go = [], [], threading.Event()

    def todo():
        for item in range(20):
            taken.append(item)
            yield item

    def make(item):
        made.append(item)
        if item == 1:
            go.wait(5)  # never for good: a failure must not hang
        return item

    ahead = rowblocks._ahead(make, todo())
    assert next(ahead) == 0 and taken == [0, 1, 2]
    # What waits behind the one under way is not begun after the end.
    threading.Timer(0.5, go.set).start()
    ahead.close()
    assert made in ([0], [0, 1]) and not threads()


def test_an_error_of_the_reader_comes_in_its_place(memory, monkeypatch):
    read, calls = RowBlocks._gather, []

    def fail(self, rows):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("disk gone")
        return read(self, rows)

    monkeypatch.setattr(RowBlocks, "_gather", fail)
    seen = []
    with pytest.raises(OSError, match="disk gone"):
        for batch in RowBlocks(memory, **SMALL).epoch(0):
            seen.append(batch)
    assert len(seen) == 8 and not threads()  # two pools of four minibatches


# --------------------------------------------------------------------- stored order


@pytest.mark.parametrize("form", ["s.h5ad", "s.zarr", "dense"])
def test_stored_order(form, stored):
    with open_counts(stored[form]) as source:
        parts = [list(stored_order(source, 100, rank=r, world=3)) for r in range(3)]
        starts = [(p[0][0].start, p[-1][0].stop) for p in parts]
        assert starts == [(0, 334), (334, 668), (668, 1003)]
        whole = sp.vstack([X for part in parts for _, X in part]).toarray()
        np.testing.assert_array_equal(whole, counts())
        rows, X = next(stored_order(source, 100, columns=[-1, 2]))
        assert rows == slice(0, 100)
        np.testing.assert_array_equal(X.toarray()[:, 1], counts()[:100, 2])
        assert not X[:, 0].nnz
    few = open_counts(cells(2))
    assert [len(list(stored_order(few, rank=r, world=4))) for r in range(4)] == [
        0, 1, 0, 1,
    ]  # fmt: skip


def test_two_at_once_do_not_disturb_each_other(stored):
    with open_counts(stored["z.h5ad"]) as source:
        blocks = RowBlocks(source, **SMALL)
        pairs = list(zip(blocks.epoch(0), blocks.epoch(0), strict=True))
        same([a for a, _ in pairs], [b for _, b in pairs])
