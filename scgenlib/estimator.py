"""The one base class: configuration, fit, save and load, and what every fit checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn

import scgenlib
from scgenlib import training
from scgenlib.errors import (
    ConfigError,
    ModelFileError,
    NotFittedError,
    OutputError,
    message,
    unknown,
)
from scgenlib.files import atomic
from scgenlib.nets import count_parameters

__all__ = ["Config", "Estimator", "data_hash", "option"]


# --------------------------------------------------------------- configuration


def option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
) -> Any:
    """Declare one field of a `Config`.

    Parameters
    ----------
    default
        The published value.
    doc
        One line that says what the field does.
    low, high
        Smallest and largest allowed value.
    above
        The value must be larger than this.
    choices
        The allowed values.
    """
    about = {"doc": doc, "low": low, "high": high, "above": above, "choices": choices}
    return dataclasses.field(default=default, metadata=about)


@dataclasses.dataclass(frozen=True)
class Config:
    """Base of every configuration: checked when made, never changed after.

    The fields' defaults are the ``paper`` profile: the published sizes and rates,
    less what a method's own docstring says it departs from. `PROFILES` says what
    ``tiny`` (tests) and ``book`` (chapters) change.
    """

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {"paper": {}}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _cast(field.name, getattr(self, field.name), hints[field.name])
            _check_range(field.name, value, field.metadata)
            object.__setattr__(self, field.name, value)

    @classmethod
    def profile(cls, name: str = "book", **overrides: Any) -> Self:
        """Return the configuration of a profile, with some fields replaced.

        Raises
        ------
        ConfigError
            The profile or a field is unknown, or a value is out of range.
        """
        if name not in cls.PROFILES:
            raise unknown("profile", name, cls.PROFILES)
        cls._check_names(overrides)
        return cls(**{**cls.PROFILES[name], **overrides})

    def replace(self, **overrides: Any) -> Self:
        """Return a copy with some fields replaced."""
        self._check_names(overrides)
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON types."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from `to_dict`."""
        cls._check_names(values)
        return cls(**values)

    def hash(self) -> str:
        """Return 12 hexadecimal digits that name this configuration."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @classmethod
    def table(cls) -> pd.DataFrame:
        """Return one row per field: its value in each profile, and what it does."""
        made = {name: cls.profile(name) for name in cls.PROFILES}
        rows = []
        for field in dataclasses.fields(cls):
            values = {name: getattr(made[name], field.name) for name in made}
            rows.append({"name": field.name, **values, "doc": field.metadata["doc"]})
        return pd.DataFrame(rows).set_index("name")

    @classmethod
    def _check_names(cls, values: Iterable[str]) -> None:
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise unknown(f"field of {cls.__name__}", name, known)


def _cast(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type that the field declares."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        inner = typing.get_args(kind)
        if origin is typing.Literal:
            if value in inner:
                return value
            raise unknown(f"value of {name}", value, inner)
        if origin is tuple and isinstance(value, list | tuple):
            if Ellipsis in inner or len(value) == len(inner):
                return tuple(_cast(name, part, inner[0]) for part in value)
        if origin is float and isinstance(value, int | float | np.number):
            if not isinstance(value, bool) and np.isfinite(value):
                return float(value)
        if origin is int and isinstance(value, int | np.integer):
            if not isinstance(value, bool):
                return int(value)
        if origin in (bool, str) and isinstance(value, origin):
            return value
    shown = getattr(hint, "__name__", str(hint))
    raise ConfigError(
        message(f"{name} has the wrong type", found=value, allowed=f"{shown}")
    )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _check_range(name: str, value: Any, about: Mapping[str, Any]) -> None:
    """Raise ConfigError for a value outside what the field allows."""
    if about.get("choices") is not None and value not in about["choices"]:
        raise unknown(f"value of {name}", value, about["choices"])
    low, high, above = about.get("low"), about.get("high"), about.get("above")
    for part in value if isinstance(value, tuple) else (value,):
        if part is None or not isinstance(part, int | float):
            continue
        inside = (
            (low is None or part >= low)
            and (high is None or part <= high)
            and (above is None or part > above)
        )
        if not inside:
            bounds = [f"at least {low}"] if low is not None else []
            bounds += [f"more than {above}"] if above is not None else []
            bounds += [f"at most {high}"] if high is not None else []
            raise ConfigError(
                message(
                    f"{name} is out of range", found=value, allowed=" and ".join(bounds)
                )
            )


# ------------------------------------------------------------------- estimator


def data_hash(adata: AnnData, columns: Iterable[str] = ()) -> str:
    """Return 16 hexadecimal digits that name a data set.

    Equal cells have equal hashes, sparse or dense: values of X and of
    ``layers["counts"]`` as float32, names, and the given columns of ``obs``.
    """
    digest = hashlib.blake2b(digest_size=8)
    counts = [adata.layers["counts"]] if "counts" in adata.layers else []
    for values in (adata.X, *counts):
        X = sparse.csr_matrix(values, dtype=np.float32)
        if not X.has_canonical_format or (X.data == 0).any():
            X = X.copy()
            X.sum_duplicates()
            X.eliminate_zeros()
        for part in (X.data, X.indices.astype(np.int64), X.indptr.astype(np.int64)):
            digest.update(np.ascontiguousarray(part).data)
    names: list[Iterable[Any]] = [adata.obs_names, adata.var_names]
    for texts in (*names, *(adata.obs[column] for column in columns)):
        digest.update("\n".join(map(str, texts)).encode())
    return digest.hexdigest()


class Estimator:
    """Base of the methods: scikit-learn's manners on AnnData.

    Making an estimator stores its parameters and does no work. `fit` learns from
    an AnnData and never changes it. What was learned ends in an underscore.

    Parameters
    ----------
    config
        A configuration of this method; its ``book`` profile by default.
    seed
        Whole number from 0; the same seed gives the same numbers on one machine
        at a fixed thread count.
    device
        See `training.resolve_device`.
    """

    method: ClassVar[str]
    config_class: ClassVar[type[Config]]
    #: Names of the methods that a fitted model offers.
    tasks: ClassVar[frozenset[str]]
    #: Raised when the saved files of this method change their meaning.
    file_format: ClassVar[int] = 1
    genes_: list[str]
    labels_: list[str]
    label_key_: str | None
    #: Whether `generate` takes a number of cells for each type.
    by_type: ClassVar[bool] = False
    #: Whether this process writes checkpoints and shows progress: of several, one.
    writes: bool = True
    #: Whether `fit` needs ``layers["counts"]``.
    needs_counts: ClassVar[bool] = False

    def __init__(
        self, config: Any = None, *, seed: int = 0, device: str = "auto"
    ) -> None:
        config = self.config_class.profile("book") if config is None else config
        if not isinstance(config, self.config_class):
            raise ConfigError(
                message(
                    f"{type(self).__name__} needs its own configuration",
                    found=type(config).__name__,
                    allowed=self.config_class.__name__,
                )
            )
        whole = isinstance(seed, int | np.integer) and not isinstance(seed, bool)
        if not whole or seed < 0:
            raise ConfigError(message("seed must be a whole number from 0", found=seed))
        self.config = config
        self.seed = int(seed)
        self.device = device

    # ----- what a method fills in

    def _prepare(self, adata: AnnData, label_key: str | None) -> None:
        """Read the data, set ``sizes_`` and ``genes_``, and call `_build`."""
        raise NotImplementedError

    def _build(self) -> None:
        """Fill ``modules_`` from ``sizes_``; also called by `load`."""
        raise NotImplementedError

    def _phases(self) -> list[training.Phase]:
        """Return the parts of the training, in order."""
        raise NotImplementedError

    def _callbacks(self) -> list[training.Callback]:
        """Return callbacks of the method's own, called before the caller's."""
        return []

    def _release(self) -> None:
        """Drop what only training needed, such as the training cells."""

    # ----- fit

    def fit(
        self,
        adata: AnnData,
        *,
        label_key: str | None = "cell_type",
        callbacks: Iterable[training.Callback] = (),
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int | None = None,
        resume: bool = False,
    ) -> Self:
        """Learn from cells.

        Parameters
        ----------
        adata
            Cells under the AnnData contract (see the data chapter). Not changed.
        label_key
            Column of ``adata.obs`` with the cell types.
        callbacks
            Functions called with a `training.Event` after each step; one that
            returns True ends the phase.
        checkpoint_dir
            Folder for a checkpoint, written every `checkpoint_every` steps (the
            configuration's ``save_freq`` if it has one, otherwise 500) and after
            each phase.
        resume
            Go on from the checkpoint in `checkpoint_dir`, if there is one, to the
            same numbers as an unbroken run.

        Returns
        -------
        Self
            The fitted estimator.

        Raises
        ------
        DataError
            The data break the contract; the message says where.
        """
        self._check(adata, label_key)

        def begin() -> None:
            self.label_key_ = label_key
            self.genes_ = [str(name) for name in adata.var_names]
            if label_key is not None:
                self.labels_ = sorted(map(str, adata.obs[label_key].unique()))
            self.n_cells_ = adata.n_obs
            columns = [k for k in self._columns(label_key) if k in adata.obs]
            self.data_hash_ = data_hash(adata, columns)
            begun = time.perf_counter()
            self._prepare(adata, label_key)
            self.fit_seconds_ = time.perf_counter() - begun

        return self._run(begin, callbacks, checkpoint_dir, checkpoint_every, resume)

    def _check(self, adata: AnnData, label_key: str | None) -> None:
        """Raise DataError for data that this method cannot learn from."""
        from scgenlib.contract import check_anndata

        check_anndata(adata, label_key=label_key, need_counts=self.needs_counts)

    def _columns(self, label_key: str | None) -> list[str]:
        """Return the columns of ``obs`` that are part of the data's identity."""
        own = getattr(self.config, "extra_conditions", ())
        return [label_key or "", "batch", "perturbation", *own]

    def _run(
        self,
        begin: Callable[[], None],
        callbacks: Iterable[training.Callback],
        checkpoint_dir: str | Path | None,
        checkpoint_every: int | None,
        resume: bool,
    ) -> Self:
        """Reset, call `begin`, which reads the data, and run the phases."""
        if checkpoint_every is None:
            checkpoint_every = int(getattr(self.config, "save_freq", 500))
        if checkpoint_every < 1:
            raise ConfigError(
                message("checkpoint_every must be at least 1", found=checkpoint_every)
            )
        device = training.resolve_device(self.device)
        cuda = [device] if device.type == "cuda" else []
        # The caller's own random state is left as it was.
        with torch.random.fork_rng(devices=cuda):
            torch.manual_seed(self.seed)
            self._reset(device)
            path = None
            if checkpoint_dir is not None:
                path = Path(checkpoint_dir) / "checkpoint.safetensors"
            try:
                begin()
                for module in self.modules_.values():
                    module.to(device).train()
                callbacks = [*self._callbacks(), *callbacks]
                training.run_phases(
                    self, self._phases(), callbacks, path, checkpoint_every, resume
                )
            finally:
                self._release()
        for module in self.modules_.values():
            module.eval()
        self.is_fitted_ = True
        return self

    def _reset(self, device: torch.device) -> None:
        self.device_ = device
        self.genes_ = []
        self.labels_ = []
        self.modules_: dict[str, nn.Module] = {}
        self.optimisers_: dict[str, torch.optim.Optimizer] = {}
        self.sizes_: dict[str, Any] = {}
        self.arrays_: dict[str, torch.Tensor] = {}
        self.facts_: dict[str, Any] = {}
        self.n_cells_ = 0
        self.data_hash_ = ""
        self.label_key_ = None
        self.fit_seconds_ = 0.0
        self.is_fitted_ = False
        self._history = training.History()
        self.rng_ = torch.Generator(device).manual_seed(self.seed)
        self.np_rng_ = np.random.default_rng(self.seed)

    def _check_fitted(self) -> None:
        if not getattr(self, "is_fitted_", False):
            raise NotFittedError(
                message(
                    f"This {type(self).__name__} is not fitted yet",
                    do="Call fit(adata) first, or load a saved model.",
                )
            )

    @property
    def history_(self) -> pd.DataFrame:
        """Loss terms by step: the columns step, phase, term and value."""
        self._check_fitted()
        return self._history.frame()

    # ----- state, shared by checkpoints and saved models

    def _identity(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "file_format": self.file_format,
            "config": self.config.hash(),
            "seed": self.seed,
            "data": self.data_hash_,
        }

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        state = {f"array/{k}": torch.as_tensor(v) for k, v in self.arrays_.items()}
        for name, module in self.modules_.items():
            for key, value in module.state_dict().items():
                state[f"module/{name}/{key}"] = value
        return state

    def _load_state_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.arrays_ = {
            key.removeprefix("array/"): value
            for key, value in tensors.items()
            if key.startswith("array/")
        }
        for name, module in self.modules_.items():
            prefix = f"module/{name}/"
            own = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            module.load_state_dict(own)

    # ----- save and load

    def save(self, folder: str | Path) -> Path:
        """Write the model as safetensors, JSON and CSV; nothing is pickled.

        The folder appears whole or not at all. An earlier model of the same name
        is replaced; a folder that holds anything else is refused.
        """
        self._check_fitted()
        folder = Path(folder)
        if folder.exists() and not _is_ours(folder):
            raise OutputError(
                message(
                    "The place to save to holds something else",
                    found=str(folder),
                    do="Choose a new folder.",
                )
            )
        advice = "Choose a place with room that you may write to."
        with atomic(folder, "The model cannot be written", advice) as part:
            part.mkdir()
            tensors = part / "model.safetensors"
            training.write_tensors(tensors, self._state_tensors(), self._identity())
            self._history.frame().to_csv(part / "history.csv", index=False)
            about = {
                **self._identity(),
                "scgenlib": scgenlib.__version__,
                "sha256": hashlib.sha256(tensors.read_bytes()).hexdigest(),
                "config": self.config.to_dict(),
                "sizes": self.sizes_,
                "facts": self.facts_,
                "genes": self.genes_,
                "labels": self.labels_,
                "label_key": self.label_key_,
                "n_cells": self.n_cells_,
                "fit_seconds": round(self.fit_seconds_, 3),
                "fit_device": str(self.device_),
            }
            (part / "config.json").write_text(json.dumps(about, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "auto") -> Self:
        """Read a model that `save` wrote.

        Raises
        ------
        ModelFileError
            No model, a damaged one, or one of another method or file format.
        """
        folder = Path(folder)
        about = read_about(folder)
        if about["method"] != cls.method:
            raise ModelFileError(
                message(
                    f"The model in {folder.name!r} is of another method",
                    found=about["method"],
                    allowed=cls.method,
                    do="Load it with that method's class.",
                )
            )
        if about["file_format"] != cls.file_format:
            raise ModelFileError(
                message(
                    "The model was saved in another file format, by scgenlib "
                    + str(about["scgenlib"]),
                    found=about["file_format"],
                    allowed=str(cls.file_format),
                    do="Fit and save it again with this version.",
                )
            )
        path = folder / "model.safetensors"
        whole = path.exists() and (
            hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]
        )
        if not whole:
            raise ModelFileError(
                message(
                    "model.safetensors is missing or not the one that was saved",
                    found=str(folder),
                    do="Copy the folder again or save the model again.",
                )
            )
        model = cls(
            cls.config_class.from_dict(about["config"]),
            seed=about["seed"],
            device=device,
        )
        model._reset(training.resolve_device(device))
        model.sizes_, model.facts_ = about["sizes"], about["facts"]
        model.genes_, model.labels_ = about["genes"], about["labels"]
        model.label_key_ = about["label_key"]
        model.n_cells_, model.data_hash_ = about["n_cells"], about["data"]
        model.fit_seconds_ = about["fit_seconds"]
        model._build()
        tensors, _ = training.read_tensors(path)
        model._load_state_tensors(tensors)
        for module in model.modules_.values():
            module.to(model.device_).eval()
        history = pd.read_csv(folder / "history.csv", float_precision="round_trip")
        model._history = training.History.from_frame(history)
        model.is_fitted_ = True
        return model

    # ----- what a model says of itself

    def provenance(self, **extra: Any) -> dict[str, Any]:
        """Return what ``uns["scgenlib"]`` of an output holds: where it came from."""
        return {
            "method": self.method,
            "scgenlib": scgenlib.__version__,
            "config": json.dumps(self.config.to_dict()),
            "config_hash": self.config.hash(),
            "seed": self.seed,
            "data_hash": self.data_hash_,
            "n_training_cells": self.n_cells_,
            **extra,
        }

    def n_parameters(self) -> dict[str, int]:
        """Return the number of trainable weights of each network."""
        self._check_fitted()
        return {name: count_parameters(net) for name, net in self.modules_.items()}

    def __repr__(self) -> str:
        head = f"{type(self).__name__}(config {self.config.hash()}, seed {self.seed}"
        if not getattr(self, "is_fitted_", False):
            return head + ", not fitted)"
        nets = ", ".join(f"{k} {v:,}" for k, v in self.n_parameters().items())
        return f"{head}, {self.n_cells_} cells x {len(self.genes_)} genes; {nets})"


def _is_ours(folder: Path) -> bool:
    """Say whether a folder is empty or holds a saved model and nothing else."""
    if not folder.is_dir():
        return False
    files = {"config.json", "history.csv", "model.safetensors"}
    names = {path.name for path in folder.iterdir()}
    if not names:
        return True
    try:
        read_about(folder)
    except ModelFileError:
        return False
    return names <= files


def read_about(folder: str | Path) -> dict[str, Any]:
    """Return the JSON part of a saved model: method, configuration, genes, labels.

    Raises
    ------
    ModelFileError
        The folder holds no model, or its ``config.json`` is damaged.
    """
    path = Path(folder) / "config.json"
    try:
        about = json.loads(path.read_text())
        missing = {"method", "file_format", "sha256", "sizes", "genes"} - set(about)
        if missing:
            raise ValueError("no " + ", ".join(sorted(missing)))
    except (OSError, ValueError, TypeError) as error:
        raise ModelFileError(
            message(
                f"There is no readable model in {str(folder)!r}",
                found=str(error),
                do="Give the folder that save() wrote; it holds config.json.",
            )
        ) from error
    return about
