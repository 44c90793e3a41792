"""Names of perturbations, and splits by perturbation.

A condition is a set of perturbed genes. Its canonical name is "ctrl" for none, "A" for
one gene, and "A+B" for several, sorted; "A+A" is gene A at a dose of two. Other
spellings ("A+ctrl", "B+A", "non-targeting") stay outside; see `scgenlib.layouts`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd

from scgenlib.errors import ConfigError, DataError, message, unknown
from scgenlib.files import atomic

__all__ = [
    "CONTROL",
    "CONTROL_NAMES",
    "ConditionSplit",
    "canonical",
    "check_conditions",
    "gears_name",
    "genes_of",
    "Holdout",
    "hold_out",
    "leave_out",
    "simulation_split",
    "split_controls",
    "thin",
]

Shares: TypeAlias = tuple[float, float]

CONTROL = "ctrl"
# Compared in lower case, with "-" for spaces and underscores.
CONTROL_NAMES = frozenset(
    "ctrl control controls non-targeting nontargeting nt ntc unperturbed untreated"
    " unstimulated negative-control vehicle mock dmso pbs scramble scrambled".split()
)


def _bad(problem: str, found: Any, allowed: str, do: str | None = None) -> DataError:
    return DataError(message(problem, found=found, allowed=allowed, do=do))


def _is_control(part: str, control: str | None) -> bool:
    if control is not None:
        return part in (control, CONTROL)
    return part.lower().replace(" ", "-").replace("_", "-") in CONTROL_NAMES


def genes_of(name: Any, control: str | None = None) -> tuple[str, ...]:
    """Return the perturbed genes of a condition, sorted.

    Parameters
    ----------
    name
        A condition in any spelling: "ctrl", "A", "A+ctrl", "B+A".
    control
        How the data call the control, exactly; "ctrl" is understood as well. None: the
        names in `CONTROL_NAMES`, in any case. Give it where a gene bears such a name.

    Returns
    -------
    tuple of str
        () for the control; a gene named twice stands twice.

    Raises
    ------
    DataError
        If the name is no text or has an empty part.
    """
    if control is not None and name == control:
        return ()
    parts = [part.strip() for part in name.split("+")] if isinstance(name, str) else []
    if not parts or not all(parts):
        allowed = '"ctrl", a gene "A", or genes joined as in "A+B"'
        raise _bad("This is not the name of a condition", name, allowed)
    return tuple(sorted(part for part in parts if not _is_control(part, control)))


def canonical(names: Iterable[str], control: str | None = None) -> pd.Series:
    """Return the canonical names of conditions: "ctrl", "A", "A+B".

    Parameters
    ----------
    names
        One name for each cell; the index of a Series is kept.
    control
        As in `genes_of`.

    Returns
    -------
    pandas.Series of str

    Raises
    ------
    DataError
        If one of the names is not the name of a condition.
    """
    series = names if isinstance(names, pd.Series) else pd.Series(list(names))
    codes, unique = pd.factorize(series.astype(object), use_na_sentinel=False)
    spelled = ["+".join(genes_of(name, control)) or CONTROL for name in unique]
    values = np.array(spelled, dtype=object)[codes]
    return pd.Series(values, index=series.index, name=series.name, dtype=object)


def gears_name(name: str) -> str:
    """Return the spelling of GEARS: "ctrl", "A+ctrl", "A+B"."""
    genes = genes_of(name)
    return "+".join([*genes, CONTROL] if len(genes) == 1 else genes) or CONTROL


def check_conditions(
    adata: ad.AnnData, key: str = "perturbation", control: str | None = None
) -> pd.Series:
    """Check that the data are a perturbation experiment.

    Parameters
    ----------
    adata
        Cells.
    key
        Column with the condition of each cell, in any spelling.
    control
        As in `genes_of`.

    Returns
    -------
    pandas.Series of str
        The canonical condition of each cell.

    Raises
    ------
    DataError
        If the column is absent, a cell has no condition, no cell is a control, or
        there is one condition only.

    Warns
    -----
    UserWarning
        If a condition has one cell: it has a mean, but no spread.
    """
    if adata.isbacked:
        found = f"an AnnData backed by {adata.filename}"
        raise _bad("The cells are on disk", found, "cells in memory: to_memory()")
    if key not in adata.obs:
        raise _bad(
            f"The cells have no column {key!r}, so no perturbation is known",
            found=", ".join(map(str, adata.obs.columns)) or "no column at all",
            allowed="a column with the condition of each cell",
            do="Use data of a perturbation experiment, or name its column.",
        )
    missing = int(adata.obs[key].isna().sum())
    if missing:
        raise _bad(
            f"Some cells have no condition in {key!r}",
            found=f"{missing} of {adata.n_obs} cells",
            allowed='a name for each cell, "ctrl" for controls',
            do=f"Drop them: adata = adata[adata.obs[{key!r}].notna()].copy()",
        )
    names = canonical(adata.obs[key], control)
    sizes = names.value_counts()
    if CONTROL not in sizes:
        raise _bad(
            f"No cell in {key!r} is a control",
            found=", ".join(sizes.index[:10]) + ", ..." * (len(sizes) > 10),
            allowed=control or ", ".join(sorted(CONTROL_NAMES)),
            do=f"Name them {CONTROL!r}: adata.obs[{key!r}] = scgenlib.conditions"
            f".canonical(adata.obs[{key!r}], control='...')",
        )
    if len(sizes) < 2:
        allowed = "controls and a perturbation"
        raise _bad(f"All cells in {key!r} are controls", adata.n_obs, allowed)
    single = sorted(sizes.index[sizes == 1])
    if single:
        text = f"{len(single)} condition(s) with one cell: {', '.join(single[:5])}"
        warnings.warn(text, UserWarning, stacklevel=2)
    return names


@dataclass(frozen=True)
class ConditionSplit:
    """Which conditions are trained on, validated on and tested on.

    Parameters
    ----------
    train, valid, test
        Canonical conditions, none in two parts. Controls are in `train` only.
    groups
        Kind -> conditions of `test`: "unseen_single", and "combo_seen0", "combo_seen1"
        and "combo_seen2" by how many genes of a combination training has seen.
    seed
        What it was drawn with; None: it was given.

    Raises
    ------
    DataError
        If a condition is in two parts, controls are held out, or there is no test.
    """

    train: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        parts = pd.Series([*self.train, *self.valid, *self.test], dtype=object)
        twice = sorted(parts[parts.duplicated()].unique())
        for found, is_wrong in (
            (f"more than once: {', '.join(twice[:5])}", twice),
            ("held-out controls", CONTROL in (*self.valid, *self.test)),
            ("nothing to test on", not self.test),
        ):
            if is_wrong:
                allowed = "each condition in one part, controls in train, and a test"
                raise _bad("This is not a split of conditions", found, allowed)

    @classmethod
    def from_dict(
        cls, split: Mapping[str, Any], names: Iterable[str] | None = None
    ) -> ConditionSplit:
        """Take a split of your own.

        Parameters
        ----------
        split
            "train" and "test", and "valid" (or "val") if there is one: lists of
            conditions in any spelling. "ctrl" is added to "train".
        names
            The conditions of the data, to check the split against.

        Raises
        ------
        DataError
            If a part is absent, or a condition is unknown or in two parts.
        """
        known = {"train", "test", "valid", "val", "groups", "seed"}
        if not {"train", "test"} <= set(split) <= known:
            found, allowed = ", ".join(map(str, split)), ", ".join(sorted(known))
            do = "Give at least train and test, each a list of conditions."
            raise _bad("The parts of the split are off", found, allowed, do)
        valid = split.get("valid", split.get("val", []))
        lists = ([*split["train"], CONTROL], valid, split["test"])
        parts = [tuple(sorted(set(canonical(part)))) for part in lists]
        if names is not None:
            _check_known([name for part in parts for name in part], names)
        groups = split.get("groups") or _groups(parts[2], parts[0])
        kinds = {kind: tuple(canonical(members)) for kind, members in groups.items()}
        train, valid, test = parts
        return cls(train, valid, test, kinds, split.get("seed"))

    def apply(
        self, adata: ad.AnnData, key: str = "perturbation"
    ) -> tuple[ad.AnnData, ad.AnnData, ad.AnnData]:
        """Return the cells of train, valid and test; others are left out.

        Raises
        ------
        DataError
            If the data lack a condition of the split.
        """
        names = check_conditions(adata, key)
        parts = (self.train, self.valid, self.test)
        _check_known([name for part in parts for name in part], names.unique())
        train, valid, test = (adata[names.isin(p).to_numpy()].copy() for p in parts)
        return train, valid, test

    def save(self, path: str | Path) -> Path:
        """Write the split as JSON; an OutputError if the place cannot be written to."""
        with atomic(Path(path), "The split cannot be written") as part:
            part.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return Path(path)

    @classmethod
    def load(
        cls, path: str | Path, names: Iterable[str] | None = None
    ) -> ConditionSplit:
        """Read a split from JSON: one of `save`, or one by hand as in `from_dict`.

        Raises
        ------
        DataError
            If the file is absent, a pickle or no JSON, or the split does not fit.
        """
        try:
            split = dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            do = getattr(error, "strerror", None) or (
                "A pickle can run code as it is opened, so none is read. Where it was"
                " made, write the same as JSON: json.dump({part: list(names) for part,"
                " names in split.items()}, file)."
            )
            name, allowed = Path(path).name, 'a JSON file with "train" and "test"'
            raise _bad("The split cannot be read", name, allowed, do) from error
        return cls.from_dict(split, names)


def _check_known(conditions: Iterable[str], names: Iterable[str]) -> None:
    allowed = sorted(set(canonical(names)))
    for name in conditions:
        if name not in allowed:
            raise unknown("condition", name, allowed, error=DataError)


def _all_genes(names: Iterable[str]) -> list[str]:
    return sorted({gene for name in names for gene in genes_of(name)})


def _groups(test: Iterable[str], train: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Sort test conditions by how many of their genes training has seen."""
    seen = set(_all_genes(train))
    kinds: dict[str, tuple[str, ...]] = {"unseen_single": ()}
    kinds |= {f"combo_seen{n}": () for n in range(3)}
    for name in test:
        genes = set(genes_of(name))
        kind = "unseen_single"
        if len(genes) > 1:
            kind = f"combo_seen{len(genes & seen)}"
        kinds[kind] = (*kinds.get(kind, ()), name)
    return kinds


def _hold_out(
    names: Sequence[str], shares: Shares, rng: np.random.Generator
) -> tuple[list[str], list[str]]:
    """Hold out the conditions with an unseen gene, and a share of the seen pairs."""
    genes = _all_genes(names)
    # A share of 0.29 of 100 is 29, whatever the rounding of floats.
    n_seen = max(1, int(shares[0] * len(genes) + 1e-9))
    seen = set(rng.permutation(genes)[:n_seen])
    pairs = [
        n for n in names if len(set(genes_of(n))) > 1 and seen.issuperset(genes_of(n))
    ]
    lost = set(rng.permutation(pairs)[int(shares[1] * len(pairs) + 1e-9) :])
    kept = [n for n in names if n not in lost and seen.issuperset(genes_of(n))]
    return kept, sorted(set(names) - set(kept))


def _finish(
    train: list[str], test: list[str], valid_share: Shares | None, seed: int, rng: Any
) -> ConditionSplit:
    valid: list[str] = []
    groups = _groups(test, train)
    if valid_share is not None and train:
        train, valid = _hold_out(train, valid_share, rng)
    return ConditionSplit((CONTROL, *train), tuple(valid), tuple(test), groups, seed)


def simulation_split(
    names: Iterable[str],
    *,
    seed: int = 1,
    train_share: float = 0.75,
    combo_seen2_share: float = 0.75,
    valid_share: Shares | None = (0.9, 0.9),
    control: str | None = None,
) -> ConditionSplit:
    """Split conditions so that test holds genes that training has not seen perturbed.

    A share of all perturbed genes is called seen. Conditions with an unseen gene are
    test; single perturbations of seen genes are train; combinations of seen genes are
    train by a share, and test otherwise. The same is done again within train for
    validation. This is the "simulation" split of GEARS, drawn from sorted canonical
    names: how a condition is spelled changes nothing, but one condition more can
    change the whole draw.

    Parameters
    ----------
    names
        Conditions, or one for each cell, in any spelling.
    seed
        The same names and seed give the same split.
    train_share, combo_seen2_share
        Share of the genes that are seen, and of their combinations that are train,
        rounded down.
    valid_share
        The same two shares within train; None: no validation.
    control
        As in `genes_of`.

    Returns
    -------
    ConditionSplit
        Its groups count the genes that occur in train or in validation.

    Raises
    ------
    ConfigError
        If a share is not above 0 and up to 1.
    DataError
        If there are fewer than two perturbed genes, or nothing is left to test on.
    """
    shares = (train_share, combo_seen2_share, *(valid_share or ()))
    if not all(0 < share <= 1 for share in shares):
        allowed = "shares above 0 and up to 1"
        raise ConfigError(message("A share is off", found=shares, allowed=allowed))
    perturbed = sorted(set(canonical(names, control)) - {CONTROL})
    if len(_all_genes(perturbed)) < 2:
        found = ", ".join(perturbed) or "controls only"
        raise _bad("Too few conditions to split", found, "two perturbed genes or more")
    rng = np.random.default_rng(seed)
    train, test = _hold_out(perturbed, (train_share, combo_seen2_share), rng)
    return _finish(train, test, valid_share, seed, rng)


def leave_out(
    names: Iterable[str],
    genes: Sequence[str],
    *,
    valid_share: Shares | None = (0.9, 0.9),
    seed: int = 1,
    control: str | None = None,
) -> ConditionSplit:
    """Test on every condition that perturbs one of some genes, as those of a pathway.

    Parameters
    ----------
    names
        Conditions, or one for each cell, in any spelling.
    genes
        Perturbed genes that training must not see.
    valid_share, seed, control
        As in `simulation_split`.

    Raises
    ------
    DataError
        If a gene is perturbed in no condition.
    """
    perturbed = sorted(set(canonical(names, control)) - {CONTROL})
    known = _all_genes(perturbed)
    for gene in genes:
        if gene not in known:
            raise unknown("perturbed gene", gene, known, error=DataError)
    train = [name for name in perturbed if set(genes).isdisjoint(genes_of(name))]
    test = [name for name in perturbed if name not in train]
    return _finish(train, test, valid_share, seed, np.random.default_rng(seed))


def split_controls(
    adata: ad.AnnData, *, share: float = 0.5, seed: int = 0, key: str = "perturbation"
) -> tuple[ad.AnnData, ad.AnnData]:
    """Set control cells aside, which only the scoring of the truth may see.

    A change that is measured and one that is predicted against the same controls share
    the noise of these controls, and correlate without any effect.

    Parameters
    ----------
    adata
        Cells.
    share
        Share of the controls to set aside, strictly between 0 and 1.
    seed
        The same seed gives the same controls.
    key
        Column of the conditions.

    Returns
    -------
    tuple of AnnData
        All cells but these controls, and these controls: copies.

    Raises
    ------
    ConfigError
        If `share` is out of range.
    DataError
        As in `check_conditions`, or if there is one control only.
    """
    if not 0 < share < 1:
        allowed = "a share strictly between 0 and 1"
        raise ConfigError(message("share", found=share, allowed=allowed))
    rows = np.flatnonzero(check_conditions(adata, key) == CONTROL)
    if len(rows) < 2:
        raise _bad("The controls cannot be split", len(rows), "two controls or more")
    n_aside = min(max(round(share * len(rows)), 1), len(rows) - 1)
    aside = np.zeros(adata.n_obs, dtype=bool)
    aside[np.random.default_rng(seed).permutation(rows)[:n_aside]] = True
    return adata[~aside].copy(), adata[aside].copy()


def thin(
    adata: ad.AnnData,
    n_cells: int | None = 200,
    *,
    seed: int = 0,
    key: str = "perturbation",
    controls: bool = False,
) -> ad.AnnData:
    """Return at most so many cells of each condition, drawn at random.

    Parameters
    ----------
    adata
        Cells with conditions in ``obs[key]``.
    n_cells
        Cells of a condition; None keeps all.
    controls
        Whether controls are thinned too.
    """
    if n_cells is None:
        return adata
    if n_cells < 1:
        raise ConfigError(message("n_cells", found=n_cells, allowed="1 or more"))
    rng = np.random.default_rng(seed)
    names = canonical(adata.obs[key]).to_numpy()
    kept = []
    for name in sorted(set(names)):
        rows = rng.permutation(np.flatnonzero(names == name))
        kept.append(rows[:n_cells] if controls or name != CONTROL else rows)
    return adata[np.sort(np.concatenate(kept))].copy()


@dataclass(frozen=True)
class Holdout:
    """What is learned from, what is predicted, and two sets of control cells.

    train: cells that teach. test: cells of the held-out conditions. start: controls
    that predictions start from, part of `train`. half: controls for the truth, which
    nothing else sees. what: what was held out, in words.
    """

    train: ad.AnnData
    test: ad.AnnData
    start: ad.AnnData
    half: ad.AnnData
    what: str
    key: str = "perturbation"

    @property
    def names(self) -> list[str]:
        """Held-out conditions, sorted."""
        return sorted(set(self.test.obs[self.key].astype(str)))

    @property
    def elsewhere(self) -> ad.AnnData:
        """Training cells for baselines, which leave out a condition that they predict.

        Where a type was held out, other types have had the same treatment: its name is
        changed, so that their response is what baselines carry over.
        """
        shared = set(self.names) & set(self.train.obs[self.key].astype(str))
        if not shared:
            return self.train
        out = self.train.copy()
        names = out.obs[self.key].astype(str)
        renamed = names.where(~names.isin(shared), names + " elsewhere")
        out.obs[self.key] = renamed.astype("category")
        return out


def hold_out(
    adata: ad.AnnData,
    held_out: str = "",
    *,
    seed: int = 0,
    key: str = "perturbation",
    type_key: str = "cell_type",
) -> Holdout:
    """Hold out conditions, or the treated cells of one type if there is one treatment.

    Half of the controls go to the scoring of the truth.

    Parameters
    ----------
    adata
        Cells with conditions in ``obs[key]``.
    held_out
        Genes joined by commas: every condition with one of them is held out (see
        `leave_out`). With one treatment, a type of ``obs[type_key]``. "": a quarter of
        the genes (see `simulation_split`), or the first type.
    seed
        Of the split and of the halves.

    Returns
    -------
    Holdout

    Raises
    ------
    DataError
        There is no such gene or type, or nothing is left to learn from.
    """
    names = check_conditions(adata, key)
    taught, half = split_controls(adata, seed=seed, key=key)
    if names.nunique() > 2:
        if held_out:
            genes = [part.strip() for part in held_out.split(",")]
            split = leave_out(names, genes, valid_share=None)
        else:
            split = simulation_split(names, seed=seed, valid_share=None)
        train, _, test = split.apply(taught, key)
        what = f"{len(split.test)} of {names.nunique() - 1} conditions"
        start = train[(train.obs[key].astype(str) == CONTROL).to_numpy()]
    else:
        if type_key not in adata.obs:
            raise unknown("column of types", type_key, adata.obs.columns)
        kinds = sorted(adata.obs[type_key].astype(str).unique())
        held_out = held_out or kinds[0]
        if held_out not in kinds:
            raise unknown("type", held_out, kinds, error=DataError)
        own = (taught.obs[type_key].astype(str) == held_out).to_numpy()
        treated = (taught.obs[key].astype(str) != CONTROL).to_numpy()
        train, test = taught[~(own & treated)].copy(), taught[own & treated].copy()
        start = taught[own & ~treated]
        half = half[(half.obs[type_key].astype(str) == held_out).to_numpy()]
        what = f"treated cells of type {held_out}"
    if not (test.n_obs and start.n_obs and half.n_obs):
        what = "Nothing is left to predict, or no control to start from or to score"
        raise _bad(what, f"{test.n_obs} cells held out", "another choice of held_out")
    return Holdout(train, test, start.copy(), half.copy(), what, key)
