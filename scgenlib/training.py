"""What every training run needs: device, seeds, minibatches, history, checkpoints.

A method describes its training as a list of `Phase` objects. The estimator base
runs them, records the loss terms, calls the callbacks and writes checkpoints from
which a killed run goes on to the same numbers.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from scipy import sparse
from torch import nn

from scgenlib.errors import (
    ConfigError,
    DeviceError,
    ModelFileError,
    OutputError,
    message,
    unknown,
)

if TYPE_CHECKING:
    from scgenlib.estimator import Estimator

__all__ = [
    "Event",
    "History",
    "Phase",
    "adam",
    "early_stop",
    "even_part",
    "every",
    "is_flat",
    "minibatch",
    "progress_bar",
    "resolve_device",
    "set_seed",
    "stop_rising",
    "tensorboard",
]

Terms = Mapping[str, "float | torch.Tensor"]


# --------------------------------------------------------------------- machine


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """Return the device asked for, or the best one present for ``"auto"``.

    Parameters
    ----------
    device
        ``"auto"`` (CUDA, then Apple's MPS, then CPU), ``"cpu"``, ``"cuda"``,
        ``"cuda:1"`` or ``"mps"``.

    Raises
    ------
    DeviceError
        The name is not a device, or this machine does not have it.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = str(device)
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdigit()):
        allowed = ["auto", "cpu", "cuda", "cuda:<number>", "mps"]
        raise unknown("device", name, allowed, error=DeviceError)
    present = {"cpu": True, "cuda": cuda, "mps": mps}[kind]
    if kind == "cuda" and index:
        present = cuda and int(index) < torch.cuda.device_count()
    if not present:
        have = ["auto", "cpu"] + ["cuda"] * cuda + ["mps"] * mps
        raise DeviceError(
            message(
                "The device asked for is not on this machine",
                found=name,
                allowed=", ".join(have),
                do="Use device='auto' to take the best one present.",
            )
        )
    return torch.device(name)


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------ data


def minibatch(
    X: Any,
    rows: np.ndarray | slice,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return some rows of `X` as a dense float32 tensor on `device`.

    Data stay sparse until here: only the rows of one minibatch are ever dense.

    Parameters
    ----------
    X
        Shape (n_cells, n_genes), CSR or dense.
    rows
        Row numbers of shape (n_rows,), or a slice.

    Returns
    -------
    torch.Tensor
        Shape (n_rows, n_genes).
    """
    block = X[rows]
    # A copy also of a dense slice: what is done to a batch must not reach the data.
    dense = block.toarray() if sparse.issparse(block) else np.array(block)
    return torch.from_numpy(np.ascontiguousarray(dense, dtype=np.float32)).to(device)


def even_part(n: int, n_parts: int, i: int) -> slice:
    """Return part `i` of `n` things in parts that differ by at most one."""
    size, more = divmod(n, n_parts)
    begin = i * size + min(i, more)
    return slice(begin, begin + size + (i < more))


def adam(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    **options: Any,
) -> torch.optim.Adam:
    """Return Adam in its fused form: the same numbers with fewer passes over memory."""
    return torch.optim.Adam(parameters, lr=lr, betas=betas, fused=True, **options)


# --------------------------------------------------------------------- history


class History:
    """Loss terms by step, kept as plain lists and shown as a tidy table."""

    def __init__(self) -> None:
        self.step: list[int] = []
        self.phase: list[str] = []
        self.term: list[str] = []
        self.value: list[float] = []

    def append(self, step: int, phase: str, terms: Terms) -> None:
        """Add one value per term."""
        for term, value in terms.items():
            self.step.append(step)
            self.phase.append(phase)
            self.term.append(term)
            self.value.append(float(value))

    def frame(self) -> pd.DataFrame:
        """Return a DataFrame with the columns step, phase, term and value."""
        columns = {name: getattr(self, name) for name in _HISTORY}
        return pd.DataFrame(columns)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> History:
        """Rebuild a history from its table."""
        history = cls()
        for name in _HISTORY:
            getattr(history, name).extend(frame[name].tolist())
        return history


_HISTORY = ("step", "phase", "term", "value")


def is_flat(
    history: pd.DataFrame | Sequence[float], term: str = "", phase: str | None = None
) -> bool:
    """Say whether a curve has stopped moving.

    Give a history with the name of one of its terms, or the values of a curve.

    The mean of its last quarter is held against the mean of the quarter before.
    The curve is flat when they differ by at most two standard errors of that
    difference, or by at most 1 % of the range of the whole curve. Each quarter is
    cut into at most ten blocks and the standard error is that of the block means,
    because neighbouring steps of a training run resemble each other. Fewer than
    eight values are never flat.
    """
    if isinstance(history, pd.DataFrame):
        chosen = history["term"] == term
        if phase is not None:
            chosen &= history["phase"] == phase
        values = history.loc[chosen, "value"].to_numpy(dtype=float)
    else:
        values = np.asarray(history, dtype=float)
    if len(values) < 8:
        return False
    quarter = len(values) // 4
    late = values[-2 * quarter :].reshape(2, quarter)
    blocks = [
        np.array([part.mean() for part in np.array_split(side, min(10, quarter))])
        for side in late
    ]
    drift = abs(late[1].mean() - late[0].mean())
    error = np.sqrt(sum(side.var(ddof=1) / len(side) for side in blocks))
    return bool(drift <= max(2.0 * error, 0.01 * np.ptp(values)))


# ------------------------------------------------------------ phases, callbacks


def _nothing() -> None:
    return None


@dataclass
class Phase:
    """One part of a training run.

    Parameters
    ----------
    name
        Shown by the progress bar and stored in the history.
    n_steps
        Number of calls of `step`.
    step
        ``step(i)`` does one update and returns its loss terms.
    begin
        Called first: builds this phase's optimisers. It may read what earlier
        phases left in ``model.arrays_``, and must not change weights.
    end
        Called last: keeps what the phase found, for example in ``model.arrays_``.
    log_every
        Steps between two history entries; by default about 400 entries a phase.
    """

    name: str
    n_steps: int
    step: Callable[[int], Terms]
    begin: Callable[[], None] = _nothing
    end: Callable[[], None] = _nothing
    log_every: int | None = None

    def is_logged(self, step: int) -> bool:
        """Say whether this step's terms go into the history."""
        gap = self.log_every or max(1, self.n_steps // 400)
        return step % gap == 0 or step == self.n_steps - 1


@dataclass
class Event:
    """What a callback is told after each step."""

    model: Estimator
    phase: str
    step: int
    n_steps: int
    terms: Terms
    history: History = field(repr=False, default_factory=History)


Callback = Callable[[Event], "bool | None"]


def progress_bar(file: Any = None) -> Callback:
    """Return a callback that shows a bar with the time left, one bar a phase."""
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(event: Event) -> None:
        bar = bars.get(event.phase)
        if bar is None:
            # disable=None: silent where no person is looking (files, notebooks).
            bar = bars[event.phase] = tqdm(
                total=event.n_steps,
                initial=event.step,
                desc=event.phase,
                file=file,
                disable=None if file is None else False,
                mininterval=0.5,
            )
        bar.update(1)
        if event.step == event.n_steps - 1:
            bar.close()

    return show


def tensorboard(log_dir: str | Path) -> Callback:
    """Return a callback that writes the logged terms for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            message(
                "TensorBoard is not installed",
                do="Install it: pip install tensorboard.",
            )
        ) from error
    writer = SummaryWriter(str(log_dir))

    def write(event: Event) -> None:
        for term, value in event.terms.items():
            writer.add_scalar(f"{event.phase}/{term}", float(value), event.step)
        if event.step == event.n_steps - 1:
            writer.flush()

    return every(10, write)


def every(n: int, call: Callable[[Event], Any], phase: str | None = None) -> Callback:
    """Return a callback that calls another one every `n` steps and at the last."""

    def maybe(event: Event) -> bool | None:
        if phase is not None and event.phase != phase:
            return None
        if event.step % n == 0 or event.step == event.n_steps - 1:
            return bool(call(event))
        return None

    return maybe


def early_stop(term: str, patience: int, phase: str | None = None) -> Callback:
    """Return a callback that ends a phase when a term has stopped falling.

    It reads the history and keeps no state of its own, so that a resumed run
    stops at the same step as an unbroken one.

    Parameters
    ----------
    term
        A term of the loss, or one that an earlier callback logged.
    patience
        Number of history entries without a new lowest value.
    """

    def check(event: Event) -> bool:
        if phase is not None and event.phase != phase:
            return False
        log = event.history
        # A scan only when the term is new: one that is logged once an epoch is not
        # looked for at every step.
        if term not in log.term[-20:] or log.step[-1] != event.step:
            return False
        values = [
            value
            for name, kind, value in zip(log.phase, log.term, log.value, strict=True)
            if name == event.phase and kind == term
        ]
        return len(values) > patience and min(values[-patience:]) > min(values)

    return check


def stop_rising(term: str, patience: int, phase: str) -> Callback:
    """Return a callback that ends a phase when a term rises again and again.

    Parameters
    ----------
    term
        A term that is logged now and then, as after an epoch.
    patience
        Number of rises in a row.
    """

    def check(event: Event) -> bool:
        log = event.history
        # Only when the term is new.
        new = term in log.term[-20:] and log.step[-1] == event.step
        if event.phase != phase or not new:
            return False
        entries = zip(log.phase, log.term, log.value, strict=True)
        last = [v for p, name, v in entries if p == phase and name == term]
        last = last[-patience - 1 :]
        return len(last) > patience and bool(np.all(np.diff(last) > 0))

    return check


# ----------------------------------------------------------------- checkpoints


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON text beside them, in one file, all or nothing."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(whole, str(part), metadata={"about": json.dumps(about)})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            message(
                f"Could not write {path.name}",
                found=str(error),
                do=f"Check that {str(path.parent)!r} is writable and has room.",
            )
        ) from error


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote; nothing is unpickled."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, about
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelFileError(
            message(
                f"{Path(path).name} cannot be read as saved tensors",
                found=str(error),
                do="The file is damaged or not ours: save the model again.",
            )
        ) from error


def save_checkpoint(model: Estimator, path: Path, phase: int, step: int) -> None:
    """Write everything a killed run needs to go on to the same numbers."""
    if not model.writes:
        return
    tensors: dict[str, torch.Tensor] = dict(model._state_tensors())
    groups: dict[str, Any] = {}
    for name, optimiser in model.optimisers_.items() if step else ():
        state = optimiser.state_dict()
        groups[name] = state["param_groups"]
        for index, slots in state["state"].items():
            for slot, value in slots.items():
                tensors[f"optimiser/{name}/{index}/{slot}"] = torch.as_tensor(value)
    tensors["rng/global"] = torch.get_rng_state()
    tensors["rng/model"] = model.rng_.get_state()
    if model.device_.type == "cuda":
        tensors["rng/cuda"] = torch.cuda.get_rng_state(model.device_)
    history = model._history
    names = {key: sorted(set(getattr(history, key))) for key in ("phase", "term")}
    for key, known in names.items():
        index_of = {name: i for i, name in enumerate(known)}
        codes = [index_of[name] for name in getattr(history, key)]
        tensors[f"history/{key}"] = torch.tensor(codes, dtype=torch.int64)
    tensors["history/step"] = torch.tensor(history.step, dtype=torch.int64)
    tensors["history/value"] = torch.tensor(history.value, dtype=torch.float64)
    about = {
        "phase": phase,
        "step": step,
        "groups": groups,
        "numpy": model.np_rng_.bit_generator.state,
        "history": names,
        "seconds": model.fit_seconds_,
        "device": model.device_.type,
        **model._identity(),
        "facts": model.facts_,
    }
    write_tensors(path, tensors, about)


class Checkpoint:
    """A checkpoint read back from disk.

    Raises
    ------
    ModelFileError
        The checkpoint is of another method, configuration, seed or data set.
    """

    def __init__(self, path: Path, model: Estimator) -> None:
        self.tensors, self.about = read_tensors(path)
        self.phase, self.step = int(self.about["phase"]), int(self.about["step"])
        # Random numbers of another kind of device would not go on where these ended.
        for key, value in {
            "device": model.device_.type,
            **model._identity(),
        }.items():
            if self.about.get(key) != value:
                raise ModelFileError(
                    message(
                        f"The checkpoint was written with another {key}",
                        found=self.about.get(key),
                        allowed=str(value),
                        do="Use another checkpoint_dir, or fit with resume=False.",
                    )
                )

    def restore_model(self, model: Estimator) -> None:
        """Put back weights, fitted arrays, facts, history and random states."""
        model.facts_ = dict(self.about["facts"])
        model._load_state_tensors(self.tensors)
        model.fit_seconds_ = float(self.about["seconds"])
        log, names = model._history, self.about["history"]
        log.step = self.tensors["history/step"].tolist()
        log.value = self.tensors["history/value"].tolist()
        log.phase = [names["phase"][i] for i in self.tensors["history/phase"]]
        log.term = [names["term"][i] for i in self.tensors["history/term"]]
        self.restore_random(model)

    def restore_random(self, model: Estimator) -> None:
        """Put back the state of every random generator."""
        torch.set_rng_state(self.tensors["rng/global"])
        model.rng_.set_state(self.tensors["rng/model"])
        if "rng/cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["rng/cuda"], model.device_)
        model.np_rng_.bit_generator.state = self.about["numpy"]

    def restore_optimisers(self, model: Estimator) -> None:
        """Put back the optimisers' moments, once the phase has built them."""
        for name, groups in self.about["groups"].items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            prefix = f"optimiser/{name}/"
            for key, value in self.tensors.items():
                if key.startswith(prefix):
                    index, slot = key.removeprefix(prefix).split("/")
                    state.setdefault(int(index), {})[slot] = value
            model.optimisers_[name].load_state_dict(
                {"state": state, "param_groups": groups}
            )


def run_phases(
    model: Estimator,
    phases: list[Phase],
    callbacks: Iterable[Callback] = (),
    checkpoint: Path | None = None,
    checkpoint_every: int = 500,
    resume: bool = False,
) -> None:
    """Run the phases in order; see `Estimator.fit` for the parameters."""
    callbacks = [*([progress_bar()] if model.writes else []), *callbacks]
    saved = None
    begun = time.perf_counter()
    if resume and checkpoint is not None and checkpoint.exists():
        saved = Checkpoint(checkpoint, model)
        saved.restore_model(model)
    for index, phase in enumerate(phases):
        first = 0
        if saved is not None and index < saved.phase:
            continue
        model.optimisers_.clear()
        phase.begin()
        if saved is not None and index == saved.phase and saved.step:
            first = saved.step
            saved.restore_optimisers(model)
            saved.restore_random(model)
        for step in range(first, phase.n_steps):
            terms = phase.step(step)
            if phase.is_logged(step):
                model._history.append(step, phase.name, terms)
            # Callbacks are the caller's: their time does not count as the fit's.
            paused = time.perf_counter()
            model.fit_seconds_ += paused - begun
            event = Event(model, phase.name, step, phase.n_steps, terms, model._history)
            # Every callback is called, also when an earlier one ends the phase.
            stop = any([bool(callback(event)) for callback in callbacks])
            begun = time.perf_counter()
            if stop:
                break
            done = step + 1
            if checkpoint and done % checkpoint_every == 0 and done < phase.n_steps:
                save_checkpoint(model, checkpoint, index, done)
        phase.end()
        if checkpoint is not None:
            save_checkpoint(model, checkpoint, index + 1, 0)
    model.optimisers_.clear()
    model.fit_seconds_ += time.perf_counter() - begun
