"""Fits from disk: one result for every form and number of processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scgenlib import atlas, simatlas
from scgenlib.countvae import LossWeights, Noise
from scgenlib.errors import ConfigError
from scgenlib.preprocess import normalise, select_genes
from scgenlib.rowblocks import RowBlocks, hash_split
from scgenlib.scatlasvae import ScAtlasVAE, ScAtlasVAEConfig
from scgenlib.training import read_tensors

LINEAGES = {"A": {"A1": 30.0, "A2": 20.0}, "B": {"B1": 30.0, "B2": 20.0}}
EMPTY = [4, 60]
KEYS = {"batch_key": "batch", "label_key": ["cell_type", "few"]}
SETTINGS = {
    "n_genes": 60,
    "n_per_batch": 32,
    "hidden_stacks": (8,),
    "n_latent": 3,
    "max_epoch": 5,
    "use_batch_norm": False,
    "use_layer_norm": True,
    "mmd_key": None,
}
SAVE, KILL = 10, 23  # steps; an epoch has 7


@pytest.fixture(scope="module")
def cells() -> AnnData:
    """Cells sorted by batch, two without counts, and labels that few cells have."""
    made = simatlas.atlas(225, 120, seed=2, lineages=LINEAGES, n_batches=3, depth=300)
    made = made[np.argsort(made.obs["batch"].cat.codes, kind="stable")].copy()
    counts = made.layers["counts"].tolil()
    counts[EMPTY] = 0
    made.X = counts.tocsr().astype(np.float32)
    known = np.random.default_rng(0).choice(made.n_obs, 12, replace=False)
    few = np.full(made.n_obs, "undefined", dtype=object)
    few[known] = np.where(np.arange(12) % 2, "x", "y")
    made.obs["few"] = pd.Categorical(few)
    return AnnData(made.X, obs=made.obs[["batch", "cell_type", "few"]], var=made.var)


@pytest.fixture(scope="module")
def paths(cells, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("atlas")
    found = {name: folder / name for name in ("a.h5ad", "a.zarr", "c.h5ad", "l.h5ad")}
    cells.write_h5ad(found["a.h5ad"])
    cells.write_zarr(found["a.zarr"])
    AnnData(cells.X.tocsc(), cells.obs, cells.var).write_h5ad(found["c.h5ad"])
    logs = AnnData(normalise(cells.X, 1e4), cells.obs, cells.var)
    logs.write_h5ad(found["l.h5ad"])
    return found


@pytest.fixture(scope="module")
def valid(cells) -> np.ndarray:
    """Which cells are held out."""
    return hash_split(cells.obs_names, 0.1)


def config(**changes) -> ScAtlasVAEConfig:
    return ScAtlasVAEConfig.profile("tiny", **SETTINGS | changes)


def fit(where, fitting=None, **changes) -> ScAtlasVAE:
    options = {"device": "cpu", **KEYS, **(fitting or {})}
    return atlas.fit(where, config=config(**changes), **options)


@pytest.fixture(scope="module")
def alone(paths) -> tuple[ScAtlasVAE, list[np.ndarray]]:
    """A fit in one process, and the rows of its minibatches."""
    with pytest.MonkeyPatch.context() as patch:
        rows = watch(patch)
        return fit(paths["a.h5ad"]), rows


def watch(patch) -> list[np.ndarray]:
    """Return a list that fills with the row numbers of minibatches."""
    seen, epoch = [], RowBlocks.epoch

    def look(self, number, first=0):
        for batch in epoch(self, number, first):
            seen.append(batch.rows)
            yield batch

    patch.setattr(RowBlocks, "epoch", look)
    return seen


def state(model) -> dict[str, torch.Tensor]:
    return dict(model._state_tensors())


def same(one, two) -> None:
    """Two models are the same, to the bit."""
    pd.testing.assert_frame_equal(one.history_, two.history_, check_exact=True)
    a, b = state(one), state(two)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert (one.genes_, one.sizes_, one.facts_) == (two.genes_, two.sizes_, two.facts_)


def codes(model, where, out, **options) -> np.ndarray:
    return np.load(atlas.embed(model, where, out / "codes.npy", **options))


# ------------------------------------------------------------------- one process


@pytest.mark.parametrize("form", ["a.h5ad", "a.zarr", "memory"])
def test_every_form_gives_the_same_fit(form, alone, cells, paths, tmp_path):
    where = paths.get(form, cells)
    model = fit(where)
    same(model, alone[0])
    assert model.data_hash_ == alone[0].data_hash_
    Z = codes(model, where, tmp_path)
    assert Z.dtype == np.float32 and Z.shape == (cells.n_obs, 3)
    np.testing.assert_array_equal(Z, codes(alone[0], paths["a.h5ad"], tmp_path))
    np.testing.assert_array_equal(Z, model._codes(cells[:, model.genes_].X, cells.obs))


def test_other_seeds_labels_and_lanes_are_other_fits(alone, cells, paths):
    other = cells.copy()
    other.obs["few"] = other.obs["few"].cat.rename_categories({"x": "y", "y": "x"})
    hashes = {alone[0].data_hash_}
    for where, fitting in (
        (other, {}),
        (paths["a.h5ad"], {"lanes": 4}),
        (paths["a.h5ad"], {"pool": 64}),
        (paths["a.h5ad"], {"label_key": "few"}),
    ):
        hashes.add(fit(where, fitting, max_epoch=1).data_hash_)
    assert len(hashes) == 5
    again = fit(paths["a.h5ad"], {"seed": 1}, max_epoch=1)
    first = alone[0].history_["value"][0]
    assert again.history_["value"][0] != first


def test_genes_are_chosen_on_training_cells(alone, cells, valid):
    logs = cells[~valid].copy()
    logs.X = normalise(logs.X, 1e4)
    expected = list(select_genes(logs, 60))
    assert alone[0].genes_ == expected
    logs = AnnData(normalise(cells.X, 1e4), var=cells.var)
    assert list(select_genes(logs, 60)) != expected
    # Nothing to choose: all, in the order of the file.
    assert fit(cells, n_genes=None, max_epoch=1).genes_ == list(cells.var_names)


def test_each_training_cell_comes_once_an_epoch(alone, cells, valid):
    train = np.setdiff1d(np.flatnonzero(~valid), EMPTY)
    rows = alone[1]
    assert not (valid[EMPTY]).any() and len(rows) == 5 * 7
    for first in range(0, 35, 7):
        epoch = np.concatenate(rows[first : first + 7])
        np.testing.assert_array_equal(np.sort(epoch[epoch >= 0]), train)
    # What the tests below rest on: the last minibatch is short, with padding.
    assert len(train) % 32 and (rows[6] < 0).any()


def test_held_out_cells_teach_nothing(alone, cells, valid):
    other = cells.copy()
    X = other.X.tolil()
    X[valid] = 1
    other.X = X.tocsr()
    model = fit(other, patience=50)
    one, two = (m.history_.query("term == 'loss'")["value"] for m in (model, alone[0]))
    np.testing.assert_array_equal(one, two)
    one, two = (m.history_.query("term == 'valid_loss'") for m in (model, alone[0]))
    assert len(one) == 5 and (one["value"].to_numpy() != two["value"]).all()


def test_empty_cells_are_not_held_out_either(cells, valid, paths):
    """They would have a say in the held-out loss."""
    out = np.flatnonzero(valid)[:3]
    X = cells.X.tolil()
    X[out] = 0
    seen = []

    def look(event):
        seen.append(event.model._cells.valid[1])

    emptied = AnnData(X.tocsr(), obs=cells.obs, var=cells.var)
    fit(emptied, {"callbacks": [look]}, max_epoch=1)
    np.testing.assert_array_equal(seen[0], np.setdiff1d(np.flatnonzero(valid), out))


def test_many_held_out_cells_come_from_the_whole_file(cells, monkeypatch):
    monkeypatch.setattr(atlas, "_MOST_VALID", 6)
    seen = []
    fit(
        cells,
        {"callbacks": [lambda e: seen.append(e.model._cells.valid[1])]},
        max_epoch=1,
    )
    assert len(seen[0]) == 6
    assert set(cells.obs["batch"].iloc[seen[0]]) == {"batch1", "batch2", "batch3"}


def test_padding_has_no_weight_and_no_gradient(paths):
    found = []

    def look(event):
        model, counts = event.model, np.random.default_rng(1).poisson(2.0, (5, 60))
        noise = Noise.draw(5, 3, (8,), 0.1, torch.Generator().manual_seed(0))
        rows = np.array([3, -1, 70, -1, 200])
        # Without padding, with it, and with padding that is not even empty.
        for keep, scale in (([0, 2, 4], 1), (range(5), 0), (range(5), 1000)):
            X = sparse.csr_matrix(counts * np.where(rows < 0, scale, 1)[:, None])
            at = rows[keep]
            batch = model._cells._cells(X[keep], at, (at >= 0).astype(np.float32))
            model._vae.zero_grad()
            drawn = Noise(noise.latent[keep], (noise.keep[0][keep],))
            terms = model._vae(batch, drawn, LossWeights())
            terms["loss"].backward()
            grads = [p.grad.flatten() for p in model._vae.parameters()]
            found.append((batch, terms, torch.cat(grads).clone()))
        model._vae.zero_grad()
        return True

    fit(paths["a.h5ad"], {"callbacks": [look]}, max_epoch=1)
    (_, loss, grad), *padded = found
    for batch, other, theirs in padded:
        assert batch.weight.tolist() == [1, 0, 1, 0, 1]
        assert (batch.labels[[1, 3]] == -1).all()
        for name, value in loss.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs, grad, rtol=1e-4, atol=1e-5)
    assert grad.abs().max() > 0.1


def test_noise_is_that_of_step_and_lane(paths):
    found = []

    def look(event):
        draw, lanes = event.model._cells._noise, np.arange(8).repeat(4)
        whole, later = draw(0, lanes), draw(1, lanes)
        found.append((whole, later, draw(0, lanes[lanes % 2 == 1]), lanes % 2 == 1))
        return True

    fit(paths["a.h5ad"], {"callbacks": [look]}, max_epoch=1)
    whole, later, part, odd = found[0]
    for one, other in ((whole.latent, part.latent), (whole.keep[0], part.keep[0])):
        assert torch.equal(one[odd], other)
    assert not torch.isclose(whole.latent, later.latent).any()
    assert len(whole.latent.unique()) == 32 * 3
    kept = whole.keep[0].unique().tolist()
    assert kept == pytest.approx([0, 1 / 0.9])


def test_a_broken_fit_goes_on_to_the_same_numbers(alone, paths, tmp_path):
    def stop(event):
        if event.step == KILL:
            raise KeyboardInterrupt

    where = {"checkpoint_dir": tmp_path, "checkpoint_every": SAVE}
    with pytest.raises(KeyboardInterrupt):
        fit(paths["a.h5ad"], {**where, "callbacks": [stop]})
    same(fit(paths["a.h5ad"], {**where, "resume": True}), alone[0])


# ------------------------------------------------------------------------- codes


def test_codes_are_those_of_other_files_with_the_same_counts(alone, cells, tmp_path):
    model, order = alone[0], np.random.default_rng(0).permutation(cells.n_vars)
    expected = codes(model, cells, tmp_path)
    np.testing.assert_array_equal(codes(model, cells[:, order], tmp_path), expected)
    # Neither batch nor labels are needed.
    bare = AnnData(cells.X, var=cells.var)
    np.testing.assert_array_equal(codes(model, bare, tmp_path), expected)


def test_codes_are_written_whole_or_not_at_all(alone, cells, tmp_path, monkeypatch):
    model, out = alone[0], tmp_path / "new" / "codes.npy"
    before = np.load(atlas.embed(model, cells, out))
    assert [p.name for p in out.parent.iterdir()] == ["codes.npy"]
    with monkeypatch.context() as patch:
        patch.setattr(model, "_codes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            atlas.embed(model, cells[:9], out)
    np.testing.assert_array_equal(np.load(out), before)
    assert len(np.load(atlas.embed(model, cells[:9], out))) == 9
    assert [p.name for p in out.parent.iterdir()] == ["codes.npy"]


# ------------------------------------------------------------------ what is refused


def test_batch_normalisation_needs_gpus(paths):
    changes = {"use_batch_norm": True, "use_layer_norm": False}
    with pytest.raises(ConfigError, match=r"2 processes on cpu.*use_layer_norm=True"):
        fit(paths["a.h5ad"], {"group": atlas.Group(0, 2)}, **changes)
    fit(paths["a.h5ad"], max_epoch=1, **changes)  # alone it is fine


@pytest.mark.parametrize(
    ("fitting", "changes", "words"),
    [
        ({}, {"reconstruction_method": "gaussian"}, "likelihood of counts"),
        ({}, {"n_per_batch": 30}, "30 cells.*multiple of 8"),
        ({"group": atlas.Group(0, 3)}, {}, "dealt evenly.*lanes a multiple of world"),
        ({"batch_key": "bach"}, {}, "'bach'.*Did you mean 'batch'"),
        ({"batch_key": None}, {"mmd_key": "batch"}, "mmd_key"),
    ],
)
def test_settings_that_do_not_go_together(fitting, changes, words, paths):
    with pytest.raises(ConfigError, match=words):
        fit(paths["a.h5ad"], fitting, **changes)


# ------------------------------------------------------------------- command line


@pytest.fixture
def main() -> Iterator[object]:
    """The command line in this process; what it sets is put back."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: atlas.main([str(a) for a in arguments])
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def command(path, out, **changes) -> list[str]:
    pairs = [f"{k}={json.dumps(v)}" for k, v in (SETTINGS | changes).items()]
    line = [str(path), "--out", str(out), "--batch-key", "batch", "--device", "cpu"]
    line += ["--label-key", "cell_type", "--label-key", "few", "--profile", "tiny"]
    return [*line, "--checkpoint-every", str(SAVE), "--set", *pairs]


def test_settings_are_read_as_json_or_as_text():
    pairs = ["lr=1e-3", "hidden_stacks=[8, 4]", "use_batch_norm=false", "n_genes=null",
             "dispersion=gene", "mmd_key=a=b", 'unlabel_key="0"']  # fmt: skip
    assert atlas._settings(pairs) == {
        "lr": 1e-3,
        "hidden_stacks": [8, 4],
        "use_batch_norm": False,
        "n_genes": None,
        "dispersion": "gene",
        "mmd_key": "a=b",
        "unlabel_key": "0",
    }
    with pytest.raises(ConfigError, match="name=value.*max_epoch"):
        atlas._settings(["max_epoch"])
    line = ["f", "--out", "o", "--set", "a=1", "--batch-key", "x", "--set", "b=2"]
    assert atlas._parser().parse_args(line).set == ["a=1", "b=2"]


def test_the_command_writes_model_and_codes(
    main, alone, cells, paths, tmp_path, capsys
):
    line = command(paths["a.zarr"], tmp_path / "run")
    assert main(*line) == 0
    assert "35 steps" in capsys.readouterr().out
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"checkpoint.safetensors", "codes.npy", "model"}
    model = ScAtlasVAE.load(tmp_path / "run" / "model", device="cpu")
    assert model.genes_ == alone[0].genes_
    Z = np.load(tmp_path / "run" / "codes.npy")
    np.testing.assert_array_equal(Z, codes(alone[0], paths["a.h5ad"], tmp_path))
    np.testing.assert_array_equal(Z, codes(model, paths["a.zarr"], tmp_path))
    counted = AnnData(
        normalise(cells.X, 1e4), cells.obs, cells.var, layers={"counts": cells.X}
    )
    np.testing.assert_array_equal(Z, model.embed(counted).X)
    # A finished run that is started again ends where it ended.
    assert main(*line, "--resume") == 0
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "codes.npy"), Z)
    # Not the same run: it says so.
    assert main(*line, "max_epoch=6", "--resume") == 1
    assert "another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("l.h5ad", (), "X does not hold counts"),
        ("c.h5ad", (), "stored gene by gene"),
        ("no.h5ad", (), "no such file"),
        ("a.h5ad", ("--batch-key", "bach"), "Did you mean 'batch'"),
        ("a.h5ad", ("--layer", "raw"), "Unknown layer"),
        ("a.h5ad", ("--set", "max_epochs=3"), "Did you mean 'max_epoch'"),
        ("a.h5ad", ("--set", "max_epoch=x"), "max_epoch has the wrong type"),
        ("a.h5ad", ("--set", "max_epoch"), "name=value"),
        ("a.h5ad", ("--device", "gpu"), "Unknown device"),
    ],
)
def test_errors_are_told_in_words(name, more, words, main, paths, tmp_path, capsys):
    path = paths.get(name, tmp_path / name)
    assert main(*command(path, tmp_path / "run"), *more) == 1
    shown = capsys.readouterr()
    assert words in shown.err and "Traceback" not in shown.err and not shown.out
    assert not (tmp_path / "run").exists()


def test_told_to_stop(main, tmp_path, capsys, monkeypatch):
    stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(atlas, "_work", stop)
    assert main("a.h5ad", "--out", tmp_path) == 128 + signal.SIGTERM
    assert "Start the same line again with --resume" in capsys.readouterr().err


def test_the_page_shows_the_record(repo):
    import generated_pages  # here: the processes below cannot see it

    text = generated_pages.loader_text(repo)
    record = json.loads(
        (repo / "book" / "results" / "scale-simulated_atlas-loader.json").read_text()
    )
    # Head, line, and one row for each measurement.
    assert text.count("\n| ") == len(record["rows"]) + 2
    row = next(r for r in record["rows"] if r["way"] == "blocks")
    assert f"| {row['bits']:.2f} |" in text
    assert "\n% generated: scale\n" in (repo / "book" / "scale.md").read_text()
    assert "not run yet" in generated_pages.loader_text(repo / "nowhere").lower()


# ------------------------------------------------------------------ two processes


def work(folder: Path) -> int:
    """Do what a process of two does: a whole fit, then one in which the other dies."""
    torch.set_num_threads(1)
    path = folder / "a.h5ad"
    with pytest.MonkeyPatch.context() as patch, atlas.join_group("cpu", 2) as group:
        rows = watch(patch)
        model = fit(path, {"group": group})
        atlas.embed(model, path, folder / "codes.npy", group=group)
        if group.rank == 0:
            model.save(folder / "unbroken")
    weights = torch.cat([v.double().flatten() for v in state(model).values()])
    found = {"rows": [r.tolist() for r in rows], "weights": weights.tolist()}
    (folder / f"rank{group.rank}.json").write_text(json.dumps(found))
    step = atlas.OnDisk.step

    def last(self, number):
        if number == KILL and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    atlas.OnDisk.step = last
    os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
    return atlas.main(command(path, folder / "run"))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    # Threads of one, and the network of this machine alone.
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


@pytest.fixture(scope="module")
def pair(paths) -> tuple[Path, list[int], list[str]]:
    """Folder, exit codes and messages of two processes, of which one was killed."""
    if not torch.distributed.is_gloo_available() or sys.platform != "linux":
        pytest.skip("needs gloo and the loopback interface of Linux")
    folder, ports = paths["a.h5ad"].parent, [free_port(), free_port()]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=ports[0],
                SECOND_PORT=ports[1],
            ),
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return folder, [process.returncode for process in started], said


@pytest.fixture(scope="module")
def ranks(pair) -> list[dict]:
    files = [pair[0] / f"rank{rank}.json" for rank in (0, 1)]
    assert all(path.is_file() for path in files), pair[2]
    return [json.loads(path.read_text()) for path in files]


def test_two_processes_see_the_minibatches_of_one(ranks, alone):
    for step, both in enumerate(alone[1]):
        one, two = (np.array(rank["rows"][step]) for rank in ranks)
        assert len(one) == len(two)
        rows = np.concatenate([one, two])
        np.testing.assert_array_equal(np.sort(rows), np.sort(both))
    assert len(ranks[0]["rows"]) == len(alone[1]) == 35
    # One had padding where the other had cells.
    padding = [sum(r < 0 for r in rank["rows"][6]) for rank in ranks]
    assert padding[0] != padding[1] or min(padding) > 0


def test_two_processes_compute_the_losses_and_codes_of_one(pair, ranks, alone):
    folder, model = pair[0], alone[0]
    other = ScAtlasVAE.load(folder / "unbroken", device="cpu")
    one, two = model.history_, other.history_
    assert one[["step", "term"]].equals(two[["step", "term"]])
    np.testing.assert_allclose(two["value"], one["value"], rtol=1e-5, atol=1e-7)
    Z = np.load(folder / "codes.npy")
    expected = codes(model, folder / "a.h5ad", folder / "alone")
    np.testing.assert_allclose(Z, expected, atol=1e-5)
    assert np.abs(Z).max() > 0.1
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_a_label_loss_of_which_a_process_has_no_cell(pair, ranks, alone, cells):
    """The mean is over the labelled cells of both, not over processes."""
    known = np.append(cells.obs["few"] != "undefined", False)  # last: padding
    alike = []
    for step in range(35):
        has = [known[rank["rows"][step]].any() for rank in ranks]
        alike.append(has[0] == has[1])
    other = ScAtlasVAE.load(pair[0] / "unbroken", device="cpu").history_
    one, two = (
        h.query("term == 'ce_1'")["value"].to_numpy()
        for h in (alone[0].history_, other)
    )
    mixed = ~np.array(alike)
    assert mixed.sum() >= 5 and (one[mixed] > 0).all()
    np.testing.assert_allclose(two[mixed], one[mixed], rtol=1e-5)


def test_a_process_that_lost_the_other_says_so(pair):
    folder, status, said = pair
    assert status == [1, -signal.SIGKILL], said
    assert "Process 0 stopped: another process" in said[0], said
    assert "Start the same line again with --resume." in said[0]
    assert "Traceback" not in said[0]
    assert [p.name for p in (folder / "run").iterdir()] == ["checkpoint.safetensors"]


def test_one_process_goes_on_where_two_broke_off(pair, alone, tmp_path):
    (tmp_path / "run").mkdir()
    saved = (pair[0] / "run" / "checkpoint.safetensors").read_bytes()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(saved)
    where = {"checkpoint_dir": tmp_path / "run", "resume": True}
    model = fit(pair[0] / "a.h5ad", where)
    one, two = alone[0].history_["value"], model.history_["value"]
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-7)


def test_started_again_they_reach_the_same_numbers(pair):
    folder = pair[0]
    _, about = read_tensors(folder / "run" / "checkpoint.safetensors")
    assert about["step"] == 2 * SAVE
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += ["--nproc-per-node", "2", "-m", "scgenlib.atlas", "--resume"]
    line += command(folder / "a.h5ad", folder / "run")
    done = subprocess.run(
        line, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "35 steps" in done.stdout
    one = ScAtlasVAE.load(folder / "run" / "model", device="cpu")
    two = ScAtlasVAE.load(folder / "unbroken", device="cpu")
    same(one, two)
    Z = np.load(folder / "run" / "codes.npy")
    np.testing.assert_array_equal(Z, np.load(folder / "codes.npy"))


if __name__ == "__main__":
    sys.exit(work(Path(sys.argv[1])))
