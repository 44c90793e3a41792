"""What only chapters use: start, claim, run card and recorded results.

A chapter is a notebook that papermill may have given other parameters. `start`
checks them before anything is computed; `claim` prints a verdict that nbval can
compare; `recorded` reads the runs that are too long for a page.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
import tempfile
import time
import types
import typing
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scgenlib.contract import card_of
from scgenlib.errors import ConfigError, DataError, OutputError, message, unknown
from scgenlib.records import (
    Record,
    cells_hash,
    code_hash,
    peak_memory_mb,
    recorded,
    recorded_on,
    results_root,
    versions,
)
from scgenlib.words import say

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

__all__ = [
    "Run",
    "check_dataset",
    "claim",
    "read_parameters",
    "recorded",
    "recorded_on",
    "run_card",
    "say",
    "start",
]

PROFILES = ("tiny", "book", "paper")
# Names that IPython itself puts into a fresh namespace.
_IPYTHON = {"In", "Out", "exit", "quit", "open", "get_ipython"}
_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))
#: Name of the variable that says, in a notebook, which chapter was started there.
STARTED = "_scgenlib_chapter"
_claims: list[tuple[str, bool]] = []


def __getattr__(name: str) -> Any:
    # Only class notebooks use these: no chapter's outputs depend on them.
    file = {"check": "selfcheck", "homework": "homework"}.get(name)
    if file is not None:
        return getattr(importlib.import_module(f"scgenlib.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass
class Run:
    """One execution of a chapter: its checked parameters and its cells.

    Attributes
    ----------
    chapter
        Name of the chapter, as in its file name.
    adata
        The cells, under the AnnData contract; None for a chapter without a
        `dataset` parameter.
    dataset, profile, seed, results_dir
        The checked parameters.
    device
        The device that `device` resolved to.
    card
        The card of the data set (`adata.uns["dataset"]`).
    columns
        `label_key` and `batch_key`, as far as they were given.
    t0
        `time.perf_counter()` when the chapter started.
    """

    chapter: str
    adata: AnnData | None
    dataset: str | None
    profile: str
    seed: int
    device: torch.device
    results_dir: Path
    card: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    t0: float = field(default_factory=time.perf_counter)

    def config(self, config_class: Any, **overrides: Any) -> Any:
        """Return the configuration of this run's profile, with `overrides`."""
        return config_class.profile(self.profile, **overrides)

    def recorded(self, experiment: str) -> Record | None:
        """Return the recorded `experiment` of this chapter and data set.

        A file of your own may have changed since, or its types may be read from
        another column: then there is none, and a line says so.
        """
        where = (self.chapter, self.dataset or "none", experiment, self.results_dir)
        found = recorded(*where, **self.columns)
        if found is None or self.adata is None or not found.is_own():
            return found
        made = found.provenance
        whole = made.get("n_cells") == self.adata.n_obs
        if whole and made["data_hash"] != cells_hash(self.adata):
            say(
                f"The record of {experiment} was made from other cells or labels than "
                f"this run has of {self.dataset}; it is not shown. Delete "
                f"{found.path.name} and make it again."
            )
            return None
        return found


# --- parameters -----------------------------------------------------------------


def start(
    namespace: MutableMapping[str, Any],
    chapter: str,
    *,
    task: str | None = None,
    written_for: str = "pbmc68k_reduced",
    threads: int = 2,
) -> Run:
    """Check a chapter's parameters, seed everything and load its cells.

    Call it in the cell after the `parameters` cell::

        run = chapter.start(globals(), "garage")

    The parameters cell is type-hinted, the cell that papermill injects is not.
    So the hints (`__annotations__`) are the declared names, and any other plain
    public value is a misspelt one. Values are cast by their hints, since
    papermill passes `false` and `[16, 8]` as strings, and written back.

    Parameters
    ----------
    namespace
        `globals()` of the notebook; cast values are written into it.
    chapter
        Name of the chapter.
    task
        The task that the data set's manifest must list; the chapter's name when
        left out. A path to an `.h5ad` and `simulated:<name>` are always allowed.
    written_for
        The data set that the chapter's prose was written for.
    threads
        Fixed number of threads, so that a run repeats to the last bit. For nets of
        a few thousand weights one is faster than two.

    Returns
    -------
    Run

    Raises
    ------
    ConfigError
        Unknown name, value of the wrong type, unknown profile, negative seed.
    DataError
        Unknown data set, or one that does not serve `task`.
    DeviceError
        A device that this machine does not have.
    OutputError
        `results_dir` cannot be written to.
    """
    import torch
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from scgenlib import training

    t0 = time.perf_counter()
    values = read_parameters(namespace)
    profile, seed = values.get("profile", "book"), values.get("seed", 0)
    device = training.resolve_device(values.get("device", "auto"))
    dataset = values.get("dataset")
    if dataset is not None:
        check_dataset(dataset, chapter if task is None else task)
    results_dir = _results_dir(values.get("results_dir"))

    training.set_seed(seed)
    torch.set_num_threads(threads)
    threadpool_limits(threads)

    # Some packages ask tqdm for widgets, which a page that loads offline lacks.
    warnings.filterwarnings("ignore", message="IProgress not found")

    namespace.update(values)
    namespace[STARTED] = chapter
    _claims.clear()
    v = versions()
    print(f"python {v['python']}, torch {v['torch']}, scgenlib {v['scgenlib']}")
    plural = "" if threads == 1 else "s"
    print(f"{device.type}, {threads} thread{plural}, seed {seed}, profile {profile}")
    adata, card = None, {}
    keys = ("label_key", "batch_key")
    columns = {key: values[key] for key in keys if values.get(key)}
    if dataset is not None:
        from scgenlib import datasets

        adata = datasets.load(dataset, **columns)
        card = card_of(adata)
        if dataset != written_for:
            say(
                f"The text was written for {written_for!r}; on {dataset!r} the "
                "figures and verdicts may differ from what it leads you to expect."
            )
    checked = (dataset, profile, seed, device, results_dir)
    return Run(chapter, adata, *checked, card, columns, t0)


def read_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declared parameters, cast by their hints and checked.

    Parameters
    ----------
    namespace
        Values by name; `__annotations__` has the hints of the declared ones.

    Raises
    ------
    ConfigError
        Unknown name, value of the wrong type, unknown profile, negative seed.
    """
    hints = dict(namespace.get("__annotations__", {}))
    declared = [name for name in hints if name in namespace]
    if not declared:
        raise ConfigError(
            message(
                "The chapter has no parameters",
                do="Give its parameters cell type hints, as in `seed: int = 0`.",
            )
        )
    # On a second call in one session, later cells have put their own values
    # beside the parameters; papermill's names were checked in the first call.
    if STARTED not in namespace:
        for name, value in namespace.items():
            plain = isinstance(value, _PLAIN) and not name.startswith("_")
            if plain and name not in hints and name not in _IPYTHON:
                raise unknown(
                    "parameter",
                    name,
                    declared,
                    do=f"Correct the name (in a live session, `del {name}` first).",
                )
    scope = dict(namespace)
    values = {
        name: _cast(name, namespace[name], _resolve_hint(hints[name], scope))
        for name in declared
    }
    if values.get("profile", "book") not in PROFILES:
        raise unknown("profile", values["profile"], PROFILES)
    if (seed := values.get("seed", 0)) < 0:
        raise ConfigError(
            message("Parameter 'seed' is negative", found=seed, allowed="0, 1, 2, ...")
        )
    return values


def _resolve_hint(hint: Any, scope: dict[str, Any]) -> Any:
    # `from __future__ import annotations` leaves hints as text.
    return eval(hint, scope) if isinstance(hint, str) else hint


def _cast(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type that `hint` names, or raise ConfigError."""
    try:
        return _as(value, hint)
    except _UNREADABLE:
        text = getattr(hint, "__name__", None) if isinstance(hint, type) else None
        raise ConfigError(
            message(
                f"Parameter {name!r} cannot be read as {text or hint}",
                found="None" if value is None else value,
                allowed=_EXAMPLES.get(hint),
            )
        ) from None


_UNREADABLE = (ValueError, TypeError, SyntaxError, KeyError, OverflowError)
_TRUTH = {"true": True, "yes": True, "1": True}
_TRUTH |= {"false": False, "no": False, "0": False}
_EXAMPLES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list such as '[16, 8]' or '16,8'",
}


def _as(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    arguments = typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or str(value).strip().lower() in ("none", "null", ""):
            if type(None) in arguments:
                return None
        for option in (a for a in arguments if a is not type(None)):
            try:
                return _as(value, option)
            except _UNREADABLE:
                continue
        raise ValueError(value)
    if origin is Any:
        return value
    if origin is bool:
        return _TRUTH[str(value).strip().lower()]
    if origin is int:
        number = float(value)
        if isinstance(value, bool) or number != int(number):
            _refuse(value)
        return value if isinstance(value, int) else int(number)
    if origin is float:
        return _refuse(value) if isinstance(value, bool) else float(value)
    if origin is str:
        return _refuse(value) if isinstance(value, _PLAIN[4:]) else str(value)
    if origin in (list, tuple):
        if isinstance(value, str):
            text = value.strip()
            if text.startswith(("[", "(")):
                value = ast.literal_eval(text)
            else:
                value = [part.strip() for part in text.split(",") if part.strip()]
        elif not isinstance(value, Sequence):
            value = [value]
        element = arguments[0] if arguments else Any
        return origin(_as(v, element) for v in value)
    if origin is dict:
        return dict(ast.literal_eval(value) if isinstance(value, str) else value)
    raise TypeError(f"no cast for {hint}")


def _refuse(value: Any) -> typing.NoReturn:
    raise ValueError(value)


def _check_perturbed(dataset: str) -> None:
    """Raise a DataError if the data set says of no cell how it was perturbed."""
    from scgenlib import datasets
    from scgenlib.h5ad import condition_column, obs_columns

    found: str | list[str] = "no such column in its manifest"
    if dataset.startswith("simulated:"):
        found = "types only: simulated:<name> draws no perturbation"
    elif dataset.endswith(".h5ad"):
        found = obs_columns(Path(dataset))
        if not found or condition_column(found):
            return
    elif datasets.has_perturbation(dataset):
        return
    raise DataError(
        message(
            f"Data set {dataset!r} has no perturbation: no column says which cells are"
            " controls and what was done to the others",
            found=found,
            allowed=f"data sets that have: {', '.join(datasets.names(task='regina'))}",
            do="Your own .h5ad needs obs['perturbation'] or obs['condition'], with"
            " names such as 'ctrl', 'STAT1' and 'STAT1+IRF1'.",
        )
    )


def check_dataset(dataset: str, task: str) -> None:
    """Raise a DataError unless `dataset` can be loaded and serves `task`."""
    from scgenlib import datasets

    if dataset.endswith(".h5ad") or dataset.startswith("simulated:"):
        inner = dataset.partition(":")[2]
        if dataset.endswith(".h5ad") and not Path(dataset).is_file():
            folder = Path(dataset).parent
            beside = sorted(p.name for p in folder.glob("*.h5ad"))
            guess = difflib.get_close_matches(Path(dataset).name, beside, 1)
            hint = f" Did you mean {guess[0]!r}?" if guess else ""
            raise DataError(
                message(
                    "There is no such .h5ad file",
                    found=dataset,
                    do=f"Looked in {folder.absolute()}.",
                )
                + hint
            )
        if not dataset.endswith(".h5ad") and inner not in datasets.names():
            raise unknown("data set", inner, datasets.names(), error=DataError)
        if task == "regina":
            _check_perturbed(dataset)
        return
    manifest = dataset.endswith((".yml", ".yaml"))
    if manifest and not Path(dataset).is_file():
        raise DataError(message("There is no such manifest", found=dataset))
    if not manifest and dataset not in datasets.names():
        raise unknown(
            "data set",
            dataset,
            datasets.names(),
            do="A path to an .h5ad or to a manifest (.yml) works too.",
            error=DataError,
        )
    if task in datasets.card(dataset).get("tasks", ()):
        return
    if task == "regina":
        _check_perturbed(dataset)
    raise DataError(
        message(
            f"Data set {dataset!r} does not serve this chapter's task {task!r}",
            found=list(datasets.card(dataset).get("tasks", ())),
            allowed=f"data sets that do: {', '.join(datasets.names(task=task))}",
            do="A path to your own .h5ad works for every chapter.",
        )
    )


def _results_dir(value: str | os.PathLike[str] | None) -> Path:
    """Return the folder of recorded runs (the book's own for None or empty)."""
    if not value:
        return results_root()
    folder = Path(value).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            message(
                "results_dir cannot be written to",
                found=str(value),
                allowed="a folder you may create or write to",
                do=f"The system says: {error.strerror or error}.",
            )
        ) from error
    return folder


# --- claims ---------------------------------------------------------------------


def claim(sentence: str, condition: Any) -> bool:
    """Print whether `sentence` holds, in a form that nbval can compare.

    Parameters
    ----------
    sentence
        What is claimed, without numbers that another machine would change.
    condition
        A bool, a NumPy bool or a 0-d bool tensor. Anything else is refused: the
        truth of a NaN or a non-empty array is no evidence.

    Returns
    -------
    bool
        The verdict.
    """
    value = condition.item() if hasattr(condition, "item") else condition
    if not isinstance(value, bool):
        raise TypeError(
            message(
                "A claim needs one yes or no",
                found=condition,
                allowed="a bool, such as the result of a comparison",
            )
        )
    _claims.append((sentence, value))
    say(f"{'holds' if value else 'does not hold':<13}  | {sentence}", indent=17)
    return value


# --- run card -------------------------------------------------------------------


def run_card(run: Run) -> None:
    """Print what this execution took, what it ran on, and its verdicts."""
    loaded = [n for n in sys.modules if n.startswith("scgenlib.")]
    v = versions()
    kept = sum(verdict for _, verdict in _claims)
    print(f"chapter   {run.chapter}, profile {run.profile}, seed {run.seed}")
    print(f"took      {time.perf_counter() - run.t0:.0f} s on {run.device}")
    print(f"memory    {peak_memory_mb():.0f} MB at the peak")
    if run.device.type == "cuda":
        import torch

        used = torch.cuda.max_memory_allocated(run.device) / 1e6
        print(f"          {used:.0f} MB on the device")
    say("versions  " + ", ".join(f"{name} {v[name]}" for name in v), indent=10)
    print(f"code      {code_hash(loaded)[:16]}")
    if run.adata is not None:
        from scgenlib.estimator import data_hash

        say(f"data      {data_hash(run.adata)[:16]} ({run.dataset})", indent=10)
    print(f"claims    {kept} hold, {len(_claims) - kept} do not hold")
    for sentence, verdict in _claims:
        if not verdict:
            say(f"          does not hold: {sentence}", indent=25)
