"""The recorded runs of the cscGAN chapter: ladder, dial and contest.

    python experiments/cscgan.py --dataset pbmc_facs --seeds 5

writes three records into book/results:

    cscgan-<dataset>-ladder.json   real cells, simple baselines and the forms of the
                                   GAN against held-out cells
    cscgan-<dataset>-dial.json     training length and critic updates against realism
                                   and copying
    cscgan-<dataset>-contest.json  a large type made rare: F1 and calibration of each
                                   arm on held-out cells

Every number is computed on cells that were held out before anything was fitted.

    python experiments/cscgan.py --dataset pbmc_facs --profile paper --seeds 1 \
        --genes 2000 --arms cscGAN

writes cscgan-<dataset>-paper.json alone: the ladder with the published sizes, for a
GPU, over 50,000 generator steps instead of a million.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from _runs import Rows, add, load, parse, parser, seeds, some
from anndata import AnnData
from sklearn.ensemble import RandomForestClassifier

from scgenlib import (
    CscGAN,
    CscGANConfig,
    ScGAN,
    ScGANConfig,
    baselines,
    metrics,
    preprocess,
    training,
)
from scgenlib._matrix import fit_pca

#: Modules whose code makes the numbers.
MODULES = ["cscgan", "metrics", "baselines", "datasets"]
#: Cells that the pairwise metrics look at; larger sets are subsampled, seeded.
MAX_CELLS = 1000
#: Most cells that are generated; fewer where there are fewer training cells.
MAX_MADE = 5000
#: Trees of the two-sample forest; the published figure is 1000, and costs minutes.
TREES = {"tiny": 200, "book": 200, "paper": 1000}
PAPER_STEPS = 50_000
#: The dial looks at one long run at these multiples of the profile's steps.
STOPS = (1 / 6, 1 / 2, 1, 2, 4)
CRITIC_UPDATES = (1, 5)
SHARES = (0.10, 0.05, 0.02, 0.01)

#: The rungs of the ladder that are trained, and what each changes.
FORMS: dict[str, dict[str, Any]] = {
    "scGAN": {},
    "cscGAN": {},
    "cscGAN, no size layer": {"output_lsn": None},
    "cscGAN, layer norm": {"gen_cond_type": "layernorm"},
    "cscGAN, raw values": {"critic_scale": "linear"},
}


def large_enough(adata: AnnData, n: int = 3) -> AnnData:
    """Return the cells of types that a split leaves with two training cells."""
    types = adata.obs["cell_type"].astype(str)
    return adata[(types.groupby(types).transform("size") >= n).to_numpy()].copy()


# ------------------------------------------------------------------------- fits


def watch(train: AnnData, n: int = 300) -> training.Callback:
    """Return a callback that logs the distance to training cells as it falls."""
    few = some(train, n)
    aligned: list[AnnData] = []

    def log(event: training.Event) -> None:
        model: Any = event.model
        if not aligned:
            aligned.append(model.align(few))
        cells = model.generate(n, seed=0, report=False)
        far = metrics.sliced_wasserstein(cells, aligned[0], n_projections=50)
        event.history.append(event.step, event.phase, {"swd": far})

    return log


def fit(
    train: AnnData,
    config: ScGANConfig,
    seed: int,
    device: str,
    *callbacks: training.Callback,
) -> Any:
    """Fit one model and log 20 distances on the way."""
    kind = CscGAN if isinstance(config, CscGANConfig) else ScGAN
    look = training.every(max(1, config.max_steps // 20), watch(train), phase="gan")
    return kind(config, seed=seed, device=device).fit(
        train, callbacks=[look, *callbacks]
    )


def distance_curve(model: Any, until: int | None = None) -> list[float]:
    """Return the logged distances of a fit: the page says whether they are flat."""
    log = model.history_
    log = log[log["term"] == "swd"]
    if until is not None:
        log = log[log["step"] < until]
    return log["value"].round(4).tolist()


def made_by(model: Any, train: AnnData, seed: int) -> AnnData:
    """Return as many cells as were seen, types in their shares; at most MAX_MADE."""
    return model.generate(min(train.n_obs, MAX_MADE), seed=seed, report=False)


# --------------------------------------------------------------------- measures


def judge_of(train: AnnData, seed: int) -> Callable[[AnnData], float]:
    """Return a function: the share of cells in which a forest sees their type."""
    pca = fit_pca(train.X, 50, seed)
    forest = RandomForestClassifier(200, random_state=seed)
    forest.fit(pca.transform(train.X), train.obs["cell_type"].astype(str))

    def share(cells: AnnData) -> float:
        guess = forest.predict(pca.transform(cells.X))
        return float((guess == cells.obs["cell_type"].astype(str).to_numpy()).mean())

    return share


def score(cells: AnnData, seen: AnnData, unseen: AnnData, trees: int) -> dict[str, Any]:
    """Return the measures of generated (or other) cells against held-out cells."""
    near = metrics.memorisation(cells, seen, unseen, max_cells=MAX_CELLS)
    n = min(unseen.n_obs, cells.n_obs, MAX_CELLS)
    made, real = some(cells, n), some(unseen, n)
    return {
        "auroc": metrics.two_sample_auroc(real, made, n_pcs=50, n_trees=trees),
        "n_trees": trees,
        "mmd2": metrics.mmd2(real, made),
        "sliced_wasserstein": metrics.sliced_wasserstein(real, made),
        **metrics.prdc(real, made),
        "duplicates": near["duplicates"],
        "membership_auc": near["membership_auc"],
        "memorisation_ratio": near["ratio"],
        "n_compared": n,
    }


# ------------------------------------------------------------------- the ladder


def ladder(
    adata: AnnData, config: CscGANConfig, args: argparse.Namespace, seed: int
) -> Rows:
    """Return one row for each rung: real cells, baselines and trained models."""
    train, test = preprocess.split(adata, seed=seed)
    trees = TREES[args.profile]
    rows: Rows = []
    for form in args.arms:
        model = fit(train, form_of(form, config), seed, args.device)
        if not rows:
            # Every form chooses the same genes, for it sees the same cells.
            seen, unseen = model.align(train), model.align(test)
            judge = judge_of(seen, seed)
            rows += rungs_without_model(train, seen, unseen, judge, trees, seed)
        cells = made_by(model, train, seed)
        row = {
            "seed": seed,
            "arm": form,
            **score(cells, seen, unseen, trees),
            "type_agreement": judge(cells) if "cell_type" in cells.obs else None,
            "distance_curve": distance_curve(model),
            "steps": model.config.max_steps,
            "n_parameters": sum(model.n_parameters().values()),
            "fit_seconds": round(model.fit_seconds_, 1),
        }
        print(args.dataset, row, flush=True)
        rows.append(row)
    return rows


def form_of(form: str, config: CscGANConfig) -> ScGANConfig:
    """Return the configuration of one of the `FORMS`."""
    if form != "scGAN":
        return config.replace(**FORMS[form])
    names = [field.name for field in dataclasses.fields(ScGANConfig)]
    return ScGANConfig(**{name: getattr(config, name) for name in names})


def rungs_without_model(
    train: AnnData,
    seen: AnnData,
    unseen: AnnData,
    judge: Callable[[AnnData], float],
    trees: int,
    seed: int,
) -> Rows:
    """Return the rows of real cells and of the baselines."""
    # Real against real: one half of the training cells plays the generator.
    half = np.random.default_rng(seed).permutation(seen.n_obs)
    real, rest = (seen[np.sort(part)].copy() for part in np.array_split(half, 2))
    row = {"arm": "real", **score(real, rest, unseen, trees)}
    rows = [{**row, "type_agreement": judge_of(rest, seed)(real)}]
    makers = {
        "copy": baselines.copy_cells,
        "SMOTE": baselines.smote,
        "PC Gaussian": baselines.pc_gaussian,
        "gene shuffle": baselines.shuffle_genes,
    }
    n = min(seen.n_obs, MAX_MADE)
    made = {arm: make(seen, n, seed=seed) for arm, make in makers.items()}
    if "counts" in train.layers:
        genes = seen.var_names
        counted = baselines.negative_binomial(train[:, genes], n, seed=seed)
        made["NB per type"] = preprocess.on_genes(counted, genes)
    for arm, cells in made.items():
        row = {"arm": arm, **score(cells, seen, unseen, trees)}
        rows.append({**row, "type_agreement": judge(cells)})
    return [{"seed": seed, **row} for row in rows]


# --------------------------------------------------------------------- the dial


def dial(
    adata: AnnData, config: CscGANConfig, args: argparse.Namespace, seed: int
) -> Rows:
    """Return realism and copying at several moments of one long run per setting.

    The learning rate falls over the whole run, so a short look is not what a short
    fit would give.
    """
    train, test = preprocess.split(adata, seed=seed)
    stops = sorted({max(1, round(stop * config.max_steps)) for stop in STOPS})
    rows: Rows = []
    for updates in CRITIC_UPDATES:
        taken: dict[int, tuple[AnnData, float]] = {}

        def take(event: training.Event, taken: dict[int, Any] = taken) -> None:
            # The callback is told the number of a step, from 0, after it was made.
            if event.step + 1 in stops:
                cells = made_by(event.model, train, seed)
                taken[event.step + 1] = cells, event.model.fit_seconds_

        long = config.replace(max_steps=stops[-1], critic_updates=updates)
        model = fit(train, long, seed, args.device, take)
        seen, unseen = model.align(train), model.align(test)
        for step, (cells, seconds) in taken.items():
            row = {
                "seed": seed,
                "critic_updates": updates,
                "steps": step,
                **score(cells, seen, unseen, TREES["book"]),
                "distance_curve": distance_curve(model, until=step),
                "fit_seconds": round(seconds, 1),
            }
            print(args.dataset, row, flush=True)
            rows.append(row)
    return rows


# ------------------------------------------------------------------ the contest


def contest(
    adata: AnnData, config: CscGANConfig, args: argparse.Namespace, seed: int
) -> Rows:
    """Return F1 and calibration of a type that was made rare, for every arm.

    The test cells are the same for every seed; a seed draws the cells that stay, the
    cells that an arm adds, the networks and the forest. Each adding arm adds as many
    cells as were cut away. 'all real cells' adds those that were, so it is the
    ceiling. A share that leaves as many cells as the one before is not run again.
    """
    train, test = preprocess.split(adata, seed=0)
    sizes = train.obs["cell_type"].astype(str).value_counts()
    rare = args.cut_type or str(sizes.index[0])
    rows: Rows = []
    done = {0}
    for share in args.shares:
        cut = metrics.cut_type(train, rare, share, seed)
        lost = train[~train.obs_names.isin(cut.obs_names)]
        if lost.n_obs in done:
            continue
        done.add(lost.n_obs)
        model = fit(cut, config, seed, args.device)
        seen, gone = model.align(cut), model.align(lost)
        arms = metrics.rare_arms(seen, rare, n_extra=lost.n_obs, seed=seed)
        del arms["jittered copies"]
        arms["cscGAN"] = model.generate({rare: lost.n_obs}, seed=seed, report=False)
        arms["all real cells"] = gone
        table = metrics.rare_utility(seen, model.align(test), rare, arms, seed=seed)
        print(args.dataset, f"{rare}, {share:g}", table.to_string(), sep="\n")
        about = {"seed": seed, "cell_type": rare, "share": share}
        about["n_train_rare"] = int(sizes[rare]) - lost.n_obs
        new: Any = [{**about, **row} for row in table.to_dict("records")]
        for row in new:
            if row["arm"] == "cscGAN":
                row["distance_curve"] = distance_curve(model)
                row["fit_seconds"] = round(model.fit_seconds_, 1)
        rows += new
    return rows


# ------------------------------------------------------------------ the records


EXPERIMENTS = {"ladder": ladder, "dial": dial, "contest": contest}


def run(
    adata: AnnData, config: CscGANConfig, args: argparse.Namespace, seed: int
) -> Iterator[tuple[str, Rows]]:
    """Yield the name and the rows of each record that one seed adds to."""
    if args.profile == "paper":
        yield "paper", ladder(adata, config, args, seed)
        return
    for name in args.only or EXPERIMENTS:
        yield name, EXPERIMENTS[name](adata, config, args, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments of one data set and write its records."""
    given = parser(__doc__, CscGANConfig.PROFILES, EXPERIMENTS)
    given.add_argument("--steps", type=int, default=None, help="generator updates")
    given.add_argument("--genes", type=int, default=None, help="most variable ones")
    given.add_argument("--arms", nargs="+", default=FORMS, choices=FORMS)
    given.add_argument("--cut-type", default=None, help="default: the largest type")
    given.add_argument("--shares", type=float, nargs="+", default=SHARES)
    args = parse(given, arguments)
    steps = args.steps or (PAPER_STEPS if args.profile == "paper" else None)
    changed = {"max_steps": steps, "n_genes": args.genes}
    config = CscGANConfig.profile(
        args.profile, **{name: n for name, n in changed.items() if n is not None}
    )
    adata = large_enough(load(args))
    for seed in seeds(args):
        begun = time.perf_counter()
        for name, rows in run(adata, config, args, seed):
            seconds = time.perf_counter() - begun
            add(__file__, name, rows, adata, config, args, seconds, MODULES, key_of)
            begun = time.perf_counter()


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what names a row, so that a second run replaces it."""
    names = ("seed", "arm", "share", "cell_type", "critic_updates", "steps")
    return tuple(row.get(name) for name in names)


if __name__ == "__main__":
    main()
