"""The base class and the training loop, on the smallest estimator there can be."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest
import torch

from scgenlib import errors, simulate, training
from scgenlib.estimator import Config, Estimator, data_hash, option
from scgenlib.nets import count_parameters, mlp


@dataclasses.dataclass(frozen=True)
class ToyConfig(Config):
    PROFILES = {"tiny": {"steps": 12}, "book": {"steps": 40}, "paper": {}}

    steps: int = option(100, "updates of each phase", low=1)
    lr: float = option(1e-2, "learning rate", above=0)
    widths: tuple[int, ...] = option((8,), "hidden widths", low=1)
    mode: str = option("sum", "which loss", choices=("sum", "mean"))
    kind: Literal["nb", "zinb"] = option("nb", "which likelihood")
    betas: tuple[float, float] = option((0.9, 0.999), "two numbers")
    cap: int | None = option(None, "a limit, or none")


class Toy(Estimator):
    """Two phases of least squares, with noise from every random generator."""

    method = "toy"
    config_class = ToyConfig
    tasks = frozenset({"predict"})

    def _prepare(self, adata: Any, label_key: str | None) -> None:
        self.sizes_ = {"n_genes": adata.n_vars}
        self.X = adata.X
        self._build()

    def _release(self) -> None:
        del self.X

    def _build(self) -> None:
        g = self.sizes_["n_genes"]
        self.modules_ = {"net": mlp([g, *self.config.widths, g])}

    def _phases(self) -> list[training.Phase]:
        net = self.modules_["net"]

        def begin() -> None:
            self.optimisers_["net"] = training.adam(net.parameters(), self.config.lr)

        def step(i: int) -> dict[str, torch.Tensor]:
            rows = self.np_rng_.integers(0, self.X.shape[0], 16)
            x = training.minibatch(self.X, rows, self.device_)
            noise = torch.randn(x.shape, generator=self.rng_) * 0.01
            x = torch.nn.functional.dropout(x + noise, 0.1)
            loss = ((net(x) - x) ** 2).mean()
            self.optimisers_["net"].zero_grad()
            loss.backward()
            self.optimisers_["net"].step()
            return {"mse": loss.detach()}

        def end() -> None:
            self.arrays_["scale"] = torch.randn(3, generator=self.rng_)

        return [
            training.Phase("first", self.config.steps, step, begin, end),
            training.Phase("second", self.config.steps, step, begin),
        ]


@pytest.fixture(scope="module")
def cells():
    return simulate.simulate(n_cells=60, n_genes=30, seed=1)


def weights(model: Estimator) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._state_tensors().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------- configuration


def test_profiles_change_only_what_they_name():
    assert ToyConfig.profile("paper") == ToyConfig()
    assert ToyConfig.profile("tiny").steps == 12
    assert ToyConfig.profile("tiny", lr=1).lr == 1.0
    assert list(ToyConfig.table().columns) == ["tiny", "book", "paper", "doc"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ToyConfig.profile("bok"), ["bok", "tiny", "Did you mean 'book'"]),
        (lambda: ToyConfig.profile("tiny", stepz=3), ["stepz", "'steps'"]),
        (lambda: ToyConfig(steps=0), ["steps", "0", "at least 1"]),
        (lambda: ToyConfig(lr=0), ["lr", "more than 0"]),
        (lambda: ToyConfig(lr=float("nan")), ["lr", "nan", "float"]),
        (lambda: ToyConfig(mode="summ"), ["summ", "Did you mean 'sum'"]),
        (lambda: ToyConfig(steps="many"), ["steps", "many", "int"]),
        (lambda: ToyConfig(steps=True), ["steps", "True"]),
        (lambda: ToyConfig(kind="znib"), ["znib", "'zinb'"]),
        (lambda: ToyConfig(betas=(0.1, 0.2, 0.3)), ["betas", "0.3"]),
        (lambda: ToyConfig(widths=(8, 0)), ["widths", "at least 1"]),
    ],
)
def test_wrong_configuration_is_named(make, words):
    with pytest.raises(errors.ConfigError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_config_survives_json_and_its_hash_follows_its_values():
    config = ToyConfig(widths=(4, 5), cap=3)
    again = ToyConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.hash() == config.hash()
    assert config.replace(lr=0.5).hash() != config.hash()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 3  # type: ignore[misc]


# --------------------------------------------------------------- fit and repeat


def test_fit_keeps_data_and_the_callers_random_state(cells):
    before, state = data_hash(cells), torch.get_rng_state()
    model = Toy(ToyConfig.profile("tiny"), device="cpu").fit(cells)
    assert data_hash(cells) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.genes_ == list(cells.var_names)
    assert model.labels_ == sorted(cells.obs["cell_type"].unique())
    table = model.history_
    assert list(table.columns) == ["step", "phase", "term", "value"]
    assert table.groupby("phase").size().to_dict() == {"first": 12, "second": 12}


def test_same_seed_same_weights_other_seed_others(cells):
    tiny = ToyConfig.profile("tiny")
    one = weights(Toy(tiny, seed=3, device="cpu").fit(cells))
    two = weights(Toy(tiny, seed=3, device="cpu").fit(cells))
    other = weights(Toy(tiny, seed=4, device="cpu").fit(cells))
    assert same(one, two) and not same(one, other)


class Killed(Exception):
    pass


def killer(phase: str, step: int):
    def kill(event: training.Event) -> None:
        if event.phase == phase and event.step == step:
            raise Killed

    return kill


@pytest.mark.parametrize(
    "at", [("first", 0), ("first", 7), ("first", 11), ("second", 0), ("second", 9)]
)
def test_a_killed_run_goes_on_to_the_same_numbers(cells, tmp_path, at):
    tiny = ToyConfig.profile("tiny")
    unbroken = Toy(tiny, device="cpu").fit(cells)
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 5, "resume": True}
    with pytest.raises(Killed):
        Toy(tiny, device="cpu").fit(cells, callbacks=[killer(*at)], **options)
    resumed = Toy(tiny, device="cpu").fit(cells, **options)
    assert same(weights(unbroken), weights(resumed))
    pd.testing.assert_frame_equal(unbroken.history_, resumed.history_)


def test_a_checkpoint_of_another_run_is_refused(cells, tmp_path):
    tiny = ToyConfig.profile("tiny")
    Toy(tiny, device="cpu").fit(cells, checkpoint_dir=tmp_path)
    with pytest.raises(errors.ModelFileError, match="another seed"):
        Toy(tiny, seed=1, device="cpu").fit(cells, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(errors.ModelFileError, match="another config"):
        Toy(tiny.replace(lr=0.5), device="cpu").fit(
            cells, checkpoint_dir=tmp_path, resume=True
        )
    other = cells.copy()
    other.obs["other"] = other.obs["cell_type"].to_numpy()[::-1].copy()
    with pytest.raises(errors.ModelFileError, match="another data"):
        Toy(tiny, device="cpu").fit(
            other, label_key="other", checkpoint_dir=tmp_path, resume=True
        )
    fewer = cells[:50].copy()
    with pytest.raises(errors.ModelFileError, match="another data"):
        Toy(tiny, device="cpu").fit(fewer, checkpoint_dir=tmp_path, resume=True)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x08\x00\x00")
    with pytest.raises(errors.ModelFileError, match="cannot be read"):
        Toy(tiny, device="cpu").fit(cells, checkpoint_dir=tmp_path, resume=True)


# ---------------------------------------------------------------- save and load


def test_load_gives_back_the_same_model(cells, tmp_path):
    model = Toy(ToyConfig.profile("tiny", widths=(5, 4)), device="cpu").fit(cells)
    model.save(tmp_path / "run")
    again = Toy.load(tmp_path / "run", device="cpu")
    assert same(weights(model), weights(again))
    assert repr(again) == repr(model)
    assert again.provenance() == model.provenance()
    pd.testing.assert_frame_equal(again.history_, model.history_)
    model.save(tmp_path / "run")  # an earlier model is replaced
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "history.csv", "model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_wrong_model_folders_are_refused(cells, tmp_path):
    model = Toy(ToyConfig.profile("tiny"), device="cpu").fit(cells)
    folder = model.save(tmp_path / "run")
    with pytest.raises(errors.ModelFileError, match="no readable model"):
        Toy.load(tmp_path / "rum")

    class Other(Toy):
        method = "other"

    with pytest.raises(errors.ModelFileError, match="Found: 'toy'. Allowed: other"):
        Other.load(folder)

    class Newer(Toy):
        file_format = 2

    with pytest.raises(errors.ModelFileError, match="another file format"):
        Newer.load(folder)
    tensors = folder / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-4])
    with pytest.raises(errors.ModelFileError, match="not the one that was saved"):
        Toy.load(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(errors.ModelFileError, match="no readable model"):
        Toy.load(folder)


def test_save_refuses_a_folder_with_other_things(cells, tmp_path):
    model = Toy(ToyConfig.profile("tiny"), device="cpu").fit(cells)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(errors.OutputError, match="holds something else"):
        model.save(tmp_path)
    # A config.json alone does not make a folder ours.
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "config.json").write_text("{}")
    with pytest.raises(errors.OutputError, match="holds something else"):
        model.save(notes)
    folder = model.save(tmp_path / "model")
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(errors.OutputError, match="holds something else"):
        model.save(folder)
    assert (folder / "thesis.txt").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputError, match="cannot be written"):
        model.save(tmp_path / "file" / "run")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_earlier_model(cells, tmp_path, monkeypatch):
    model = Toy(ToyConfig.profile("tiny"), device="cpu").fit(cells)
    model.save(tmp_path / "run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(errors.OutputError, match="No space left"):
        model.save(tmp_path / "run")
    monkeypatch.undo()
    assert same(weights(Toy.load(tmp_path / "run", device="cpu")), weights(model))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_ctrl_c_while_saving_leaves_the_earlier_model(cells, tmp_path, monkeypatch):
    model = Toy(ToyConfig.profile("tiny"), device="cpu").fit(cells)
    folder = model.save(tmp_path / "run")
    replace, calls = os.replace, []

    def interrupted(a: Any, b: Any) -> None:
        if str(b) == str(folder) and not calls:
            calls.append(1)
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr("scgenlib.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(folder)
    monkeypatch.undo()
    assert calls and same(weights(Toy.load(folder, device="cpu")), weights(model))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --------------------------------------------------------------------- helpers


def test_devices():
    assert training.resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(errors.DeviceError, match="'gpu'.*cuda"):
        training.resolve_device("gpu")
    with pytest.raises(errors.DeviceError, match="not on this machine"):
        training.resolve_device("cuda:99")


def test_early_stop_reads_the_history(cells):
    calls: list[int] = []

    def log(event: training.Event) -> None:
        calls.append(event.step)
        value = 1.0 if event.step < 3 else 2.0
        event.history.append(event.step, event.phase, {"held_out": value})

    stop = training.early_stop("held_out", patience=4, phase="first")
    Toy(ToyConfig.profile("book"), device="cpu").fit(cells, callbacks=[log, stop])
    first = calls[: calls.index(0, 1)]
    # Lowest at step 0; four entries later none is lower than the lowest (1.0).
    assert first == list(range(7))


def test_every_calls_at_multiples_and_at_the_last_step(cells):
    seen: list[tuple[str, int]] = []
    call = training.every(5, lambda e: seen.append((e.phase, e.step)), phase="second")
    Toy(ToyConfig.profile("tiny"), device="cpu").fit(cells, callbacks=[call])
    assert seen == [("second", 0), ("second", 5), ("second", 10), ("second", 11)]


def test_is_flat_tells_a_falling_curve_from_a_settled_one():
    step = np.arange(200)
    noise = np.random.default_rng(0).normal(0, 0.1, 200)

    def flat(values: np.ndarray) -> bool:
        table = {"step": step[: len(values)], "phase": "p", "term": "t"}
        return training.is_flat(pd.DataFrame({**table, "value": values}), "t")

    assert flat(np.exp(-step / 10)) and flat(np.exp(-step / 10) + noise)
    assert flat(np.ones(200))
    assert not flat(-step.astype(float)) and not flat(noise - step / 100)
    # A large first drop must not hide that the curve still falls.
    still_falling = np.r_[np.full(20, 10.0), np.linspace(1, 0.2, 180)]
    assert not flat(still_falling)
    # Noise wider than the rise must not hide a rise that its average shows.
    assert not flat(noise + step / 500)
    assert not flat(np.zeros(4))
    # A record keeps the values only.
    assert training.is_flat([2.0, *[1.0] * 20]) and not training.is_flat(range(20))


def test_minibatch_makes_only_its_rows_dense(cells):
    rows = np.array([4, 1])
    got = training.minibatch(cells.X, rows)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), cells.X[rows].toarray())


def test_a_batch_is_a_copy(cells):
    X = cells.X.toarray()
    before = X.copy()
    training.minibatch(X, slice(0, 5)).zero_()
    np.testing.assert_array_equal(X, before)


def test_the_hash_names_values_and_labels_not_storage(cells):
    dense = cells.copy()
    dense.X = cells.X.toarray()
    assert data_hash(dense) == data_hash(cells)
    assert data_hash(cells, ["cell_type"]) != data_hash(cells)
    fewer = cells.copy()
    fewer.layers["counts"] = fewer.layers["counts"] * 2
    assert data_hash(fewer) != data_hash(cells)


def test_mlp_counts():
    # 3*8 + 8 and 8*2 + 2
    assert count_parameters(mlp([3, 8, 2])) == 50
