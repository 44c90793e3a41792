"""The recorded runs of the REGINA chapter: contest, dial, losses, ...

    python experiments/regina.py --dataset papalexi --seeds 5

writes these records into book/results:

    regina-<dataset>-contest.json   every arm and the ceiling, for each split and each
                                    condition that was held out
    regina-<dataset>-losses.json    what moves cells: phase 2 with some of its losses
    regina-<dataset>-choices.json   the settings where README and code differ

and for `simulated_screen` alone

    regina-simulated_screen-dial.json   effects that follow the control cells, from
                                        none to all; other cells for each seed

Splits. "random": a quarter of the perturbed genes is unseen (GEARS' simulation split).
"pathway": all targets of one pathway are held out; on `papalexi` the interferon-gamma
receptor, its kinase, and what they switch on. "one": one of these alone, while the
others teach. On `kang`, whose treatment is one for all cells, the treated cells of one
type are held out, another type for each seed.

Half of the control cells teach and start the predictions, the other half scores the
truth. At most 200 cells of a condition teach; all held-out cells are the truth. Where
there are more than 1,000 genes, the variable ones of the training cells are kept, and
the targets. Nothing is tuned for any arm. Seconds are CPU seconds of a fit.

A seed is written when it is done, and is not made again if cells, code and settings
are the same.

    python experiments/regina.py --dataset norman --profile paper --seeds 1

writes regina-<dataset>-paper.json alone: the contest with the published sizes, for a
GPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from _runs import Rows, load, parse, parser, run_seed, seeds
from anndata import AnnData
from scipy import sparse

from scgenlib import (
    REGINA,
    REGINAConfig,
    conditions,
    perturbers,
    preprocess,
    simperturb,
    training,
)
from scgenlib.metrics import perturbation as scores_of

#: Modules whose code makes the numbers.
MODULES = ["regina", "perturbers", "conditions", "metrics.perturbation"]
MODULES += ["datasets", "simperturb"]
KEY, CONTROL = "perturbation", conditions.CONTROL
PATHWAYS = {"papalexi": ("IFNGR1", "IFNGR2", "JAK2", "STAT1", "IRF1")}
#: The one whose mates stay in training, in the split "one".
ONE = {"papalexi": "JAK2"}
#: One experiment of those that a data set holds: column and value.
PART = {"norman_subset": ("cell_type", "K562")}
MOST_TRAINING, MOST_GENES = 200, 1000
#: Controls that predictions start from; cells that distances are measured on.
MOST_STARTS, MOST_MEASURED = 2000, 300
DIAL = (0.0, 0.5, 1.0)
#: What a fitted model is asked for.
ARMS: dict[str, dict[str, Any]] = {
    "prompt alone": {"by": "prompt"},
    "REGINA": {},
    "REGINA, not shrunk": {"kept": 1.0},
}
FEWER = {"dial": 3, "losses": 3, "choices": 2}
ONLY_FOR = {"dial": ("simulated_screen",)}
WITHOUT_LOSSES = ("kang", "norman_subset")


@dataclass
class Lab:
    """One seed on one data set."""

    cells: AnnData
    config: REGINAConfig
    seed: int
    device: str
    dataset: str

    def fit(self, cells: AnnData, **changed: Any) -> REGINA:
        """Return a fitted model; targets without a gene get learned prompts."""
        config = self.config.replace(**changed)
        return REGINA(config, seed=self.seed, device=self.device).fit(cells)


@dataclass
class Design:
    """What is learned from, and what is held out."""

    split: str
    train: AnnData
    test: AnnData
    half: AnnData

    @property
    def control(self) -> AnnData:
        """The control cells that teach."""
        return self.train[self.train.obs[KEY] == CONTROL]

    @property
    def names(self) -> list[str]:
        """Conditions that are held out."""
        return sorted(set(self.test.obs[KEY].astype(str)))


def fewer_genes(design: Design) -> Design:
    """Keep variable genes of the training cells, and the targets."""
    train = design.train
    if train.n_vars <= MOST_GENES:
        return design
    kept = set(preprocess.select_genes(train, MOST_GENES))
    for name in {*train.obs[KEY].astype(str), *design.names}:
        kept |= set(conditions.genes_of(name))
    genes = [gene for gene in train.var_names if gene in kept]
    parts = (train[:, genes], design.test[:, genes], design.half[:, genes])
    return Design(design.split, *(part.copy() for part in parts))


def designs(lab: Lab) -> Iterator[Design]:
    """Yield the splits that a data set allows."""
    cells, seed = lab.cells, lab.seed
    if lab.dataset in PART:
        column, value = PART[lab.dataset]
        cells = cells[cells.obs[column] == value]
    # Annotation that only the whole needs would slow every copy down.
    cells = AnnData(sparse.csr_matrix(cells.X), obs=cells.obs, var=cells.var[[]])
    names = cells.obs[KEY].astype(str)
    genes = {gene for name in set(names) for gene in conditions.genes_of(name)}
    taught, half = conditions.split_controls(cells, seed=seed)
    if len(genes) < 2:
        types = sorted(cells.obs["cell_type"].astype(str).unique())
        held = types[seed % len(types)]
        own = taught.obs["cell_type"].astype(str) == held
        out = (own & (taught.obs[KEY] != CONTROL)).to_numpy()
        same = (half.obs["cell_type"].astype(str) == held).to_numpy()
        yield fewer_genes(
            Design(f"type {held}", taught[~out].copy(), taught[out], half[same])
        )
        return
    splits = {"random": conditions.simulation_split(names, seed=seed, valid_share=None)}
    if lab.dataset in PATHWAYS:
        splits["pathway"] = conditions.leave_out(
            names, PATHWAYS[lab.dataset], valid_share=None
        )
        splits["one"] = conditions.leave_out(
            names, [ONE[lab.dataset]], valid_share=None
        )
    for name, split in splits.items():
        train, _, test = split.apply(taught, KEY)
        if test.n_obs:
            train = conditions.thin(train, MOST_TRAINING, seed=seed)
            yield fewer_genes(Design(name, train, test, half))


# ------------------------------------------------------------------------ contest


def start_of(design: Design, lab: Lab) -> AnnData:
    """Return the controls that predictions start from; of the held-out type alone."""
    control = design.control
    if design.split.startswith("type "):
        held = design.split.removeprefix("type ")
        control = control[(control.obs["cell_type"].astype(str) == held).to_numpy()]
    return conditions.thin(control, MOST_STARTS, seed=lab.seed, controls=True)


def scored(
    design: Design, start: AnnData, made: AnnData | pd.DataFrame, seed: int
) -> pd.DataFrame:
    """Return scores and ranks of one arm, a row for each condition."""
    given = {"control_real": design.half, "control_predicted": start}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # conditions of one cell
        table = scores_of.perturbation_scores(
            made, design.test, seed=seed, max_cells=MOST_MEASURED, **given
        )
        means = made if isinstance(made, pd.DataFrame) else None
        means = scores_of.condition_means(made) if means is None else means
        if len(design.names) > 1:
            truth = scores_of.condition_means(design.test)
            table = table.join(scores_of.ranks(means, truth, **given))
            deltas = means.loc[design.names] - mean_of(start)
            table["pairwise"] = scores_of.pairwise_correlation(deltas)
            real = truth.loc[design.names] - mean_of(design.half)
            table["pairwise_truth"] = scores_of.pairwise_correlation(real)
    return table


def mean_of(cells: AnnData) -> np.ndarray:
    """Return the mean of each gene."""
    return np.asarray(cells.X.mean(axis=0)).ravel()


def simple(design: Design, start: AnnData) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield the name and the means of each baseline."""
    names = design.names
    if not design.split.startswith("type "):
        for method in perturbers.BASELINES.values():
            means = method(design.train, names, control=start)
            yield means.attrs["method"], means
        return
    # One treatment, seen in other types: their changes are what can be carried over.
    changes = {"no change": np.zeros(design.train.n_vars)}
    own = []
    for kind in sorted(set(design.train.obs["cell_type"].astype(str))):
        part = design.train[(design.train.obs["cell_type"] == kind).to_numpy()]
        is_control = (part.obs[KEY] == CONTROL).to_numpy()
        if is_control.any() and not is_control.all():
            own.append(mean_of(part[~is_control]) - mean_of(part[is_control]))
    changes["mean change of other types"] = np.mean(own, axis=0)
    for arm, change in changes.items():
        values = np.tile(mean_of(start) + change, (len(names), 1))
        yield arm, pd.DataFrame(values, names, design.train.var_names)


def contest(lab: Lab) -> Rows:
    """Return every arm on every split."""
    rows: Rows = []
    for design in designs(lab):
        start, names = start_of(design, lab), design.names

        def note(
            arm: str,
            table: pd.DataFrame,
            seconds: float | None = None,
            how: pd.DataFrame | None = None,
            design: Design = design,
        ) -> None:
            for name, values in table.iterrows():
                row = {
                    "seed": lab.seed,
                    "split": design.split,
                    "arm": arm,
                    "condition": str(name),
                    "prompt": None if how is None else str(how["prompt"][name]),
                    "kept": None if how is None else float(how["kept"][name]),
                    "n_cells": int(values["n_cells"]),
                    "seconds": seconds,
                }
                others = [c for c in table.columns if c != "n_cells"]
                rows.append(row | {c: float(values[c]) for c in others})

        for arm, means in simple(design, start):
            cells = perturbers.shifted_control(start, means, seed=lab.seed)
            note(arm, scored(design, start, cells, lab.seed))
        begun = time.process_time()
        model = lab.fit(design.train)
        seconds = time.process_time() - begun
        for arm, asked in {**ARMS, "REGINA, decoded": {"output": "decoded"}}.items():
            cells = model.predict(start, names, unmeasured="mean", **asked)
            how = cells.obs.groupby(KEY, observed=True)[["prompt", "kept"]].first()
            note(arm, scored(design, start, cells, lab.seed), seconds, how)
        # What cells of the truth itself reach, and controls with the true mean.
        first, second = halves(design.test, lab.seed)
        if first.n_obs:
            split = Design(design.split, design.train, second, design.half)
            note("ceiling", scored(split, start, first, lab.seed))
            truth = scores_of.condition_means(design.test).loc[split.names]
            cells = perturbers.shifted_control(start, truth, seed=lab.seed)
            note("true mean", scored(split, start, cells, lab.seed))
    return rows


def halves(cells: AnnData, seed: int) -> tuple[AnnData, AnnData]:
    """Return two halves of the cells of each condition; none for a single cell."""
    rng = np.random.default_rng(seed)
    names = cells.obs[KEY].astype(str).to_numpy()
    first, second = [], []
    for name in sorted(set(names)):
        rows = rng.permutation(np.flatnonzero(names == name))
        if len(rows) > 1:
            first.append(rows[: len(rows) // 2])
            second.append(rows[len(rows) // 2 :])
    if not first:
        return cells[:0], cells[:0]
    return cells[np.concatenate(first)], cells[np.concatenate(second)]


# ------------------------------------------------------------ losses and settings


#: Phase 2 with some of its losses; what stands nowhere is as in the profile.
LOSSES: dict[str, dict[str, Any]] = {
    "all": {},
    "adversary and pairs": {"w_cycle": 0.0},
    "pairs alone": {"w_cycle": 0.0, "w_adv": 0.0},
    "cycle and pairs": {"w_adv": 0.0},
    "cycle alone": {"w_adv": 0.0, "w_pair": 0.0, "w_anchor": 0.0},
    "cycle and adversary": {"w_adv": 3.5, "w_pair": 0.0, "w_anchor": 0.0},
    "cycle alone, no skip": {
        "w_adv": 0.0,
        "w_pair": 0.0,
        "w_anchor": 0.0,
        "prompt_skip": False,
    },
    "cycle and adversary, no skip": {
        "w_adv": 3.5,
        "w_pair": 0.0,
        "w_anchor": 0.0,
        "prompt_skip": False,
    },
    "all, no skip": {"prompt_skip": False},
}
#: Where README, code and this book differ, one setting at a time.
CHOICES: dict[str, dict[str, Any]] = {
    "as here": {},
    "published weights": {"w_adv": 3.5, "w_anchor": 0.0, "label_controls": False},
    "not centred": {"centred": False},
    "decoded": {"output": "decoded"},
    "prompt as written": {"prompt_sign": "written"},
    "class consistency": {"consistency": "class"},
    "critic on the index": {"discriminator_on": "index"},
    "critics in both directions": {"adversary_both": True},
    "decoder frozen": {"decoder": "frozen"},
    "with identity loss": {"w_identity": 1.0},
    "no centre loss": {"w_centre": 0.0},
    "centre loss, summed": {"w_centre": "0.5 z_dim"},
    "no classification": {"w_class": 0.0},
    "silenced to 0": {"silence_val": 0.0},
    "silenced to -0.1": {"silence_val": -0.1},
    "silenced to -5": {"silence_val": -5.0},
    "told positions": {"positions": True},
    "correlated genes in a token": {"grouping": "correlation"},
}


def looked_at(lab: Lab, design: Design, arm: str, **changed: Any) -> dict[str, Any]:
    """Fit with changed settings; return scores and what happened in latent space.

    Nothing is shrunk: this is about what the settings do to a prediction.
    """
    model = lab.fit(design.train, shrink_folds=0, **changed)
    start, names = start_of(design, lab), design.names
    cells = model.predict(start, names, unmeasured="mean")
    table = scored(design, start, cells, lab.seed)
    log = model.history_
    return {
        "seed": lab.seed,
        "split": design.split,
        "arm": arm,
        **{name: float(table[name].mean()) for name in table.columns},
        **latent(model, design, start, cells),
        "flat": training.is_flat(log, "pair", "transition"),
        "reconstruction": float(log.loc[log["term"] == "valid_rec", "value"].iloc[-1]),
        "states": model.facts_["states"],
    }


def latent(
    model: REGINA, design: Design, start: AnnData, made: AnnData
) -> dict[str, float]:
    """Return how prompts and moves compare with the true shifts of the codes.

    The codes of half the controls stand for the start of the truth, those of the other
    half for that of the prediction.
    """
    real, base = model.embed(design.test), model.embed(design.half).X.mean(0)
    codes, begin = made.obsm["latent"], model.embed(start).X
    found: dict[str, list[float]] = {"prompt": [], "move": [], "length": []}
    for name in design.names:
        shift = real.X[(real.obs[KEY] == name).to_numpy()].mean(0) - base
        went = codes[(made.obs[KEY] == name).to_numpy()].mean(0) - begin.mean(0)
        q = model.prompts(start, name, unmeasured="mean").mean(0)
        found["prompt"].append(cosine(q, shift))
        found["move"].append(cosine(went, shift))
        size = max(float(np.linalg.norm(shift)), 1e-9)
        found["length"].append(float(np.linalg.norm(went)) / size)
    return {
        "cosine_prompt": float(np.mean(found["prompt"])),
        "cosine_move": float(np.mean(found["move"])),
        "length": float(np.median(found["length"])),
        "code_variance": float(begin.var(0).mean()),
    }


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Return the cosine of two vectors, 0 if one has no length."""
    size = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / size) if size > 1e-12 else 0.0


def first_design(lab: Lab) -> Design:
    """Return the split on which settings are compared: the pathway if there is one."""
    found = list(designs(lab))
    return next((d for d in found if d.split == "pathway"), found[0])


def losses(lab: Lab) -> Rows:
    """Return phase 2 with some of its losses."""
    design = first_design(lab)
    # Not centred: that would give every arm what all conditions have in common.
    return [
        looked_at(lab, design, arm, centred=False, **own) for arm, own in LOSSES.items()
    ]


def choices(lab: Lab) -> Rows:
    """Return one setting after another; beside it the train mean."""
    design, rows = first_design(lab), []
    for arm, own in CHOICES.items():
        if own.get("w_centre") == "0.5 z_dim":
            own = {"w_centre": 0.5 * lab.config.z_dim}
        rows.append(looked_at(lab, design, arm, **own))
    return rows


def dial(lab: Lab) -> Rows:
    """Return arms on cells whose effects follow control cells to some degree."""
    rows: Rows = []
    for share in DIAL:
        cells = simperturb.screen(seed=lab.seed, pathway=share)
        for design in designs(Lab(cells, lab.config, lab.seed, lab.device, "")):
            start, names = start_of(design, lab), design.names
            for arm, means in simple(design, start):
                table = scored(design, start, means, lab.seed)
                row = {"seed": lab.seed, "pathway": share, "arm": arm}
                rows.append(row | averages(table))
            model = lab.fit(design.train)
            for arm, asked in ARMS.items():
                made = model.predict(start, names, unmeasured="mean", **asked)
                means = scores_of.condition_means(made)
                table = scored(design, start, means, lab.seed)
                row = {"seed": lab.seed, "pathway": share, "arm": arm}
                row |= averages(table)
                if arm == "REGINA":
                    row |= latent(model, design, start, made)
                rows.append(row)
            first, second = halves(design.test, lab.seed)
            split = Design(design.split, design.train, second, design.half)
            means = scores_of.condition_means(first)
            row = {"seed": lab.seed, "pathway": share, "arm": "ceiling"}
            rows.append(row | averages(scored(split, start, means, lab.seed)))
    return rows


def averages(table: pd.DataFrame) -> dict[str, float]:
    """Return the mean of each score over conditions."""
    return {name: float(table[name].mean()) for name in table.columns}


# -------------------------------------------------------------------- the records


EXPERIMENTS: dict[str, Callable[[Lab], Rows]] = {
    "contest": contest,
    "dial": dial,
    "losses": losses,
    "choices": choices,
}


def wanted(args: argparse.Namespace, seed: int) -> list[str]:
    """Return the experiments that a seed of a data set adds to."""
    if args.profile == "paper":
        return ["paper"]
    if args.only:
        return list(args.only)
    out = [n for n, known in ONLY_FOR.items() if args.dataset not in known]
    out += ["losses", "choices"] if args.dataset in WITHOUT_LOSSES else []
    return [
        name
        for name in EXPERIMENTS
        if name not in out and seed < FEWER.get(name, seed + 1)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments of one data set and write its records."""
    args = parse(parser(__doc__, REGINAConfig.PROFILES, EXPERIMENTS), arguments)
    config, adata = REGINAConfig.profile(args.profile), load(args)
    for seed in seeds(args):
        lab = Lab(adata, config, seed, args.device, args.dataset)
        calls = {name: EXPERIMENTS.get(name, contest) for name in wanted(args, seed)}
        run_seed(__file__, lab, calls, adata, config, args, lambda _: MODULES)


if __name__ == "__main__":
    main()
