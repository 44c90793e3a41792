"""The recorded runs of the GARAGE chapter: dials, seed rules and the contest.

    python experiments/garage.py --dataset pollen --seeds 5

writes four records into book/results:

    garage-<dataset>-seeds.json    what each seed rule picks, at three priority weights
    garage-<dataset>-dial.json     one GAN per leak fraction and seed rule
    garage-<dataset>-contest.json  rare-cell utility of each arm on held-out cells
    garage-<dataset>-forms.json    default, documented and published form of the GAN,
                                   for data small enough to be one batch

Every number is computed on cells that were held out before anything was fitted.

    python experiments/garage.py --dataset blobs

writes garage-blobs-toy.json: the chapter's six islands, with two widths of G.

    python experiments/garage.py --dataset pollen --profile paper --seeds 1

writes garage-<dataset>-paper.json alone: the published sizes, for a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from _runs import add, load, parse, parser, seeds, some
from anndata import AnnData

from scgenlib import (
    GARAGE,
    GARAGEConfig,
    baselines,
    metrics,
    preprocess,
    published,
    simulate,
    training,
)

LEAKS = (0.0, 0.2, 0.5)
RULES = ("random",)
PRIORITY_WEIGHTS = (0.0, 2.0, 8.0)
#: Modules whose code makes the numbers.
MODULES = ["garage", "published", "metrics", "baselines", "datasets"]
#: Cells that the pairwise metrics look at; larger sets are subsampled, seeded.
MAX_CELLS = 1000


def rare_share(labels: Any, rare: list[str]) -> float:
    """Return the share of cells whose type is rare."""
    return float(np.isin(np.asarray(labels, dtype=str), rare).mean())


def watch(train: AnnData, n: int = 300) -> training.Callback:
    """Return a callback that logs the distance to training cells as it falls."""
    few = some(train, n)

    def log(event: training.Event) -> None:
        cells = event.model.generate(n, seed=0)
        far = metrics.sliced_wasserstein(
            cells, few[:, cells.var_names], n_projections=50
        )
        event.history.append(event.step, event.phase, {"swd": far})

    return log


def fit(train: AnnData, config: GARAGEConfig, seed: int, device: str) -> GARAGE:
    """Fit one model and log 20 distances on the way."""
    gap = max(1, config.gan_total_iters // 20)
    look = training.every(gap, watch(train), phase="gan")
    return GARAGE(config, seed=seed, device=device).fit(train, callbacks=[look])


def distance_curve(model: GARAGE) -> list[float]:
    """Return the logged distances of a fit: the page says whether they are flat."""
    log = model.history_
    return log.loc[log["term"] == "swd", "value"].round(4).tolist()


def score(cells: AnnData, train: AnnData, test: AnnData) -> dict[str, float]:
    """Return the measures of generated (or other) cells against held-out cells."""
    genes = list(cells.var_names)
    train, test = train[:, genes], test[:, genes]
    near = metrics.memorisation(cells, train, test, max_cells=MAX_CELLS)
    n = min(test.n_obs, train.n_obs, cells.n_obs, MAX_CELLS)
    made, seen, unseen = some(cells, n), some(train, n), some(test, n)
    quality = metrics.prdc(unseen, made)
    return {
        "w1_heldout": metrics.wasserstein(made, unseen),
        "w1_train": metrics.wasserstein(made, seen),
        "coverage": quality["coverage"],
        "density": quality["density"],
        "duplicates": near["duplicates"],
        "membership_auc": near["membership_auc"],
        "types_made": int(cells.obs["cell_type"].astype(str).nunique()),
    }


def seed_rules(
    train: AnnData,
    config: GARAGEConfig,
    weights: Sequence[float],
    seed: int,
    device: str,
) -> list[dict[str, Any]]:
    """Return the rare share of the seeds of every rule, without training a GAN."""
    rows = []
    base = config.replace(gan_total_iters=0)
    for weight in weights:
        model = GARAGE(base.replace(priority_weight=weight), seed=seed, device=device)
        model.fit(train)
        is_rare = model.arrays_["is_rare"].numpy()
        chosen = model.arrays_["seeds"].numpy()
        k = len(chosen)
        edges = model.arrays_["edge_index"]
        picks = {"attention": chosen}
        if weight == weights[0]:
            degree = published.degree_scores(edges, train.n_obs)
            index = published.edge_index_scores(edges, train.n_obs)
            picks["degree only"] = np.argsort(-np.asarray(degree), kind="stable")[:k]
            picks["file order"] = np.argsort(-np.asarray(index), kind="stable")[:k]
            rng = np.random.default_rng(seed)
            picks["random"] = rng.permutation(train.n_obs)[:k]
        for rule, cells in picks.items():
            rows.append(
                {
                    "seed": seed,
                    "rule": rule,
                    "priority_weight": weight,
                    "n_seeds": k,
                    "rare_share": float(is_rare[cells].mean()),
                    "base_rate": float(is_rare.mean()),
                }
            )
    return rows


def islands(points: np.ndarray, centres: np.ndarray, share: float = 0.02) -> int:
    """Count islands that hold at least this share of the points."""
    far = np.linalg.norm(points[:, None] - centres, axis=2)
    near = far.argmin(1)[far.min(1) < 1]
    counts = np.bincount(near, minlength=len(centres))
    return int((counts >= share * len(points)).sum())


TOY = GARAGEConfig(
    gat_epochs=30,
    gan_total_iters=1000,
    batch_size=128,
    generator_hidden=(16,),
    discriminator_hidden=(64, 64),
    hidden_slope=0.2,
    g_lr=1e-3,
    d_lr=1e-3,
    output_activation="linear",
    scaling="none",
)


def toy(
    adata: AnnData, config: GARAGEConfig, args: argparse.Namespace, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return how many of six islands a GAN populates, by width and leak fraction."""
    rows = []
    for width, leak in itertools.product((16, 128), (0.0, 0.2, 0.5)):
        one = config.replace(generator_hidden=(width,), leakage_fraction=leak)
        model = GARAGE(one, seed=seed, device=args.device).fit(adata)
        made = model.generate(1000, seed=1).X.toarray()
        found = islands(made, adata.uns["centres"] + 6)
        rows.append(
            {"seed": seed, "width": width, "leakage_fraction": leak, "islands": found}
        )
    return {"toy": rows}


def spread(cells: AnnData) -> float:
    """Return the mean distance of a cell to the centre of all."""
    X = cells.X.toarray()
    return float(np.linalg.norm(X - X.mean(0), axis=1).mean())


def form_row(
    form: str, model: GARAGE, train: AnnData, test: AnnData, seed: int
) -> dict[str, Any]:
    """Return the measures of one form of the GAN."""
    cells = model.generate(train.n_obs, seed=seed)
    real = test[:, cells.var_names]
    return {
        "seed": seed,
        "form": form,
        "config_hash": model.config.hash(),
        "spread": spread(cells) / spread(real),
        "fit_seconds": round(model.fit_seconds_, 1),
        **score(cells, train, test),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments of one data set and write its records."""
    given = parser(__doc__, GARAGEConfig.PROFILES, ["contest"])
    given.add_argument("--weights", type=float, nargs="*", default=PRIORITY_WEIGHTS)
    given.add_argument("--leaks", type=float, nargs="*", default=LEAKS)
    given.add_argument("--rules", nargs="*", default=RULES, help="beside attention")
    args = parse(given, arguments)
    config = GARAGEConfig.profile(args.profile)
    if args.dataset == "blobs":
        adata, config = simulate.blobs(1000), TOY
        adata.X = adata.X.toarray() + 6
        run = toy
    else:
        adata = load(args)
        run = full_size if args.profile == "paper" else experiments
    for seed in seeds(args):
        begun = time.perf_counter()
        for name, rows in run(adata, config, args, seed).items():
            seconds = time.perf_counter() - begun
            add(__file__, name, rows, adata, config, args, seconds, MODULES)


def full_size(
    adata: AnnData, config: GARAGEConfig, args: argparse.Namespace, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Fit the published sizes and score them on held-out cells."""
    train, test = preprocess.split(adata, seed=seed)
    model = fit(train, config, seed, args.device)
    row = form_row("paper profile", model, train, test, seed)
    row["distance_curve"] = distance_curve(model)
    return {"paper": [row | {"n_parameters": sum(model.n_parameters().values())}]}


def experiments(
    adata: AnnData, config: GARAGEConfig, args: argparse.Namespace, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Run the seed rules, the dial, the contest and the forms of one seed."""
    tables: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("seeds", "dial", "contest", "forms")
    }
    settings = [(leak, "attention") for leak in args.leaks]
    settings += [(config.leakage_fraction, rule) for rule in args.rules]
    if args.only:
        settings = [(config.leakage_fraction, "attention")]
    train, test = preprocess.split(adata, seed=seed)
    if not args.only:
        tables["seeds"] += seed_rules(train, config, args.weights, seed, args.device)
    for leak, rule in settings:
        one = config.replace(leakage_fraction=leak, seed_rule=rule)
        model = fit(train, one, seed, args.device)
        cells = model.generate(train.n_obs, seed=seed)
        rare = model.facts_["rare_types"]
        row = {
            "seed": seed,
            "arm": "GARAGE",
            "leakage_fraction": leak,
            "seed_rule": rule,
            "rare_share": rare_share(cells.obs["cell_type"], rare),
            "distance_curve": distance_curve(model),
            "fit_seconds": round(model.fit_seconds_, 1),
            **score(cells, train, test),
        }
        if not args.only:
            tables["dial"].append(row)
        print(args.dataset, row, flush=True)
        if leak == config.leakage_fraction and rule == "attention":
            tables["contest"] += rare_contest(model, train, test, seed)
            usual = form_row("book", model, train, test, seed)
    if args.only:
        return {"contest": tables["contest"]}
    tables["dial"] += controls(train, test, model.genes_, rare, seed)
    # The published form takes all cells in each batch: small data only.
    if train.n_obs * len(model.genes_) <= 5e5:
        tables["forms"].append(usual)
        for form in ("documented", "published"):
            other = getattr(GARAGEConfig, form)(args.profile)
            made = fit(train, other, seed, args.device)
            tables["forms"].append(form_row(form, made, train, test, seed))
            print(args.dataset, tables["forms"][-1], flush=True)
    return {name: rows for name, rows in tables.items() if rows}


def controls(
    train: AnnData, test: AnnData, genes: list[str], rare: list[str], seed: int
) -> list[dict[str, Any]]:
    """Return the dial's rows for the arms without a model, and real against real."""
    n, few = train.n_obs, train[:, genes].copy()
    makers = {
        "copy": baselines.copy_cells,
        "SMOTE": baselines.smote,
        "gene shuffle": baselines.shuffle_genes,
        "PC Gaussian": baselines.pc_gaussian,
    }
    rows = [
        control(name, make(few, n, seed=seed), train, test, rare, seed)
        for name, make in makers.items()
    ]
    # Real against real: one half of the training cells plays the generator.
    half = np.random.default_rng(seed).permutation(n)
    real, rest = few[half[: n // 2]].copy(), train[half[n // 2 :]]
    return [*rows, control("real", real, rest, test, rare, seed)]


def control(
    arm: str, made: AnnData, train: AnnData, test: AnnData, rare: list[str], seed: int
) -> dict[str, Any]:
    """Return the dial's row of something that needs no model."""
    share = rare_share(made.obs["cell_type"], rare)
    return {"seed": seed, "arm": arm, "rare_share": share, **score(made, train, test)}


def rare_contest(
    model: GARAGE, train: AnnData, test: AnnData, seed: int
) -> list[dict[str, Any]]:
    """Return recall, precision and F1 of each rare type for every arm.

    Each arm is asked for ten new cells per training cell of the type. GARAGE has
    two arms: the cells that its classifier names as the type, and the cells grown
    from seeds of the type, which take their seed's label. Both may find none; the
    column `added` says how many.
    """
    counts = train.obs["cell_type"].value_counts()
    held_out = test.obs["cell_type"].value_counts()
    genes = model.genes_
    a, b = train[:, genes].copy(), test[:, genes].copy()
    usual = model.generate(10 * a.n_obs, seed=seed + 1)
    grown = model.generate(10 * a.n_obs, seed=seed + 1, seed_share=1.0)
    origin = train.obs["cell_type"].astype(str)[grown.obs["seed_cell"]].to_numpy()
    rows = []
    for rare in model.facts_["rare_types"]:
        if counts.get(rare, 0) < 3 or held_out.get(rare, 0) < 2:
            continue
        wanted = 10 * int(counts[rare])
        arms = metrics.rare_arms(a, rare, seed=seed)
        named = usual[usual.obs["cell_type"].astype(str) == rare][:wanted].copy()
        anchored = grown[origin == rare][:wanted].copy()
        anchored.obs["cell_type"] = rare
        arms["GARAGE, named rare"] = named if named.n_obs else None
        arms["GARAGE, grown from rare"] = anchored if anchored.n_obs else None
        table = metrics.rare_utility(a, b, rare, arms, seed=seed)
        table["seed"], table["rare_type"] = seed, rare
        table["n_train_rare"] = int(counts[rare])
        rows += table.to_dict("records")
    return rows


if __name__ == "__main__":
    main()
