"""The recorded runs of the last chapter: methods side by side, everything equal.

    python experiments/compare.py --dataset pbmc68k_reduced --only generators --seeds 3
    python experiments/compare.py --dataset pbmc_3batches --only latents --seeds 3

writes these records into book/results:

    compare-<dataset>-generators.json   every method that generates cells, controls that
                                        need no network, and real cells
    compare-<dataset>-latents.json      every method that gives a cell a code, PCA and
                                        Harmony; needs two batches

Without `--only` a data set gets what it allows.

Generators. One split a seed; genes are chosen on its training cells, and all cells are
scaled over these genes, so that every arm learns and is judged on one scale. The budget
is counted in cells that a critic sees: `steps` generator steps, each with
`critic_updates` updates of the critic on `batch_size` real cells. Arms of one network
have the sizes of the profile. Every arm is asked for as many cells as it has seen, and
all go through the same metrics and the same two forests: one that tells real from
generated, one that names types. Nothing is tuned for any arm.

Latents. All cells, no labels; codes have one length, but for REGINA's. The budget is
`epochs` times all cells for each network; each may stop earlier by its own rule, on
cells or entries that it holds out itself. ScGACL is told how many types there are.
REGINA takes part where cells were perturbed, with the epochs of its profile. Noise, and
types alone without any cell, show what a metric is blind to.

CPU seconds are those of the fit, without the looks at the learning curve. A seed is
written when it is done, and one that stands in the record is not made again if cells,
code and settings are the same.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from _runs import Rows, load, parse, parser, run_seed, seeds, some, timed
from anndata import AnnData
from scipy import sparse
from sklearn.ensemble import RandomForestClassifier

from scgenlib import (
    GARAGE,
    REGINA,
    CscGAN,
    CscGANConfig,
    GARAGEConfig,
    REGINAConfig,
    ScAtlasVAE,
    ScAtlasVAEConfig,
    ScGACL,
    ScGACLConfig,
    ScGAN,
    ScGANConfig,
    baselines,
    integrators,
    metrics,
    preprocess,
    training,
)
from scgenlib._matrix import fit_pca
from scgenlib.estimator import Config, option

#: Experiment -> modules whose code makes the numbers; REGINA's are added to those of
#: cells that were perturbed.
MODULES = {
    "generators": ["garage", "cscgan", "baselines", "metrics", "datasets"],
    "latents": ["scatlasvae", "scgacl", "integrators", "metrics", "datasets"],
}
LABELS, BATCH, PERTURBED = "cell_type", "batch", "perturbation"
NEIGHBOURS = 15
RESOLUTIONS = tuple(round(0.2 * i, 1) for i in range(1, 11))


@dataclasses.dataclass(frozen=True)
class CompareConfig(Config):
    """What all arms share."""

    PROFILES: ClassVar[dict[str, dict[str, Any]]] = {
        "tiny": {
            "most_cells": 400,
            "n_genes": 100,
            "steps": 20,
            "critic_updates": 2,
            "batch_size": 32,
            "n_trees": 20,
            "epochs": 4,
        },
        "book": {
            "most_cells": 1500,
            "n_genes": 1000,
            "steps": 1000,
            "batch_size": 64,
            "n_trees": 200,
            "epochs": 200,
        },
        "paper": {},
    }

    most_cells: int = option(20_000, "cells drawn from a larger data set", low=20)
    n_genes: int = option(2000, "variable genes of the training cells", low=2)
    steps: int = option(20_000, "generator steps", low=1)
    critic_updates: int = option(5, "critic updates in each step", low=1)
    batch_size: int = option(128, "real cells in each critic update", low=2)
    n_trees: int = option(1000, "trees of both forests", low=1)
    max_compared: int = option(1000, "cells that pairwise metrics look at", low=10)
    epochs: int = option(400, "how often an encoder sees each cell", low=3)
    n_latent: int = option(10, "length of a code", low=2)


@dataclasses.dataclass
class Lab:
    """One seed on one data set."""

    cells: AnnData
    config: CompareConfig
    profile: str
    seed: int
    device: str


def drawn(adata: AnnData, most: int) -> AnnData:
    """Return at most so many cells, of types that a split leaves two cells."""
    few = adata if adata.n_obs <= most else some(adata, most)
    types = few.obs[LABELS].astype(str)
    return few[(types.groupby(types).transform("size") >= 3).to_numpy()].copy()


# ------------------------------------------------------------------- generators


def sides(lab: Lab) -> tuple[AnnData, AnnData]:
    """Return training and held-out cells, on one scale over the chosen genes."""
    parts = preprocess.split(lab.cells, seed=lab.seed)
    genes = parts[0].var_names
    if lab.config.n_genes < len(genes):
        genes = preprocess.select_genes(parts[0], lab.config.n_genes)
    made = []
    for part in parts:
        scaled = preprocess.on_genes(part, genes)
        if "counts" in part.layers:
            scaled.layers["counts"] = sparse.csr_matrix(part[:, genes].layers["counts"])
        # A cell with none of these genes has no total to be scaled to.
        made.append(scaled[np.asarray(scaled.X.sum(1)).ravel() > 0].copy())
    return made[0], made[1]


class Watch:
    """Logs the distance to training cells as it falls; counts its own time."""

    def __init__(self, train: AnnData, n: int = 300) -> None:
        self.few, self.seconds = some(train, n), 0.0

    def __call__(self, event: training.Event) -> None:
        """Log one distance."""
        begun = time.process_time()
        model: Any = event.model
        options = {"report": False} if isinstance(model, ScGAN) else {}
        cells = model.generate(self.few.n_obs, seed=0, **options)
        far = metrics.sliced_wasserstein(
            cells, self.few[:, cells.var_names], n_projections=50
        )
        event.history.append(event.step, event.phase, {"swd": far})
        self.seconds += time.process_time() - begun


def networks(lab: Lab) -> dict[str, Any]:
    """Return the arms with a network, each with the same budget of real cells."""
    c, own = lab.config, {"seed": lab.seed, "device": lab.device}
    gan = {"n_genes": None, "max_steps": c.steps, "batch_size": c.batch_size}
    gan |= {"critic_updates": c.critic_updates}
    seeds = {"n_genes": c.n_genes, "gan_total_iters": c.steps}
    seeds |= {"nd_steps": c.critic_updates, "batch_size": c.batch_size}
    return {
        "scGAN": ScGAN(ScGANConfig.profile(lab.profile, **gan), **own),
        "cscGAN": CscGAN(CscGANConfig.profile(lab.profile, **gan), **own),
        "GARAGE": GARAGE(GARAGEConfig.profile(lab.profile, **seeds), **own),
    }


#: Arms without a network.
CONTROLS: dict[str, Callable[..., AnnData]] = {
    "copy": baselines.copy_cells,
    "jitter": baselines.jitter,
    "SMOTE": baselines.smote,
    "PC Gaussian": baselines.pc_gaussian,
    "gene shuffle": baselines.shuffle_genes,
}


def judge_of(train: AnnData, n_trees: int, seed: int) -> Callable[[AnnData], Any]:
    """Return a function: the share of cells in which a forest sees their type."""
    pca = fit_pca(train.X, 50, seed)
    forest = RandomForestClassifier(n_trees, random_state=seed)
    forest.fit(pca.transform(train.X), train.obs[LABELS].astype(str))

    def share(cells: AnnData) -> float | None:
        if LABELS not in cells.obs:
            return None
        guess = forest.predict(pca.transform(cells.X))
        return float((guess == cells.obs[LABELS].astype(str).to_numpy()).mean())

    return share


def score(
    cells: AnnData, seen: AnnData, unseen: AnnData, config: CompareConfig
) -> dict[str, Any]:
    """Return every measure of the evaluation chapter, against held-out cells."""
    n = min(unseen.n_obs, cells.n_obs, config.max_compared)
    made, real = some(cells, n), some(unseen, n)
    near = metrics.memorisation(cells, seen, unseen, max_cells=config.max_compared)
    kept = ("ratio", "heldout_ratio", "duplicates", "membership_auc")
    moments = metrics.moment_agreement(real, made)
    return {
        "w1": metrics.wasserstein(real, made),
        "sliced_wasserstein": metrics.sliced_wasserstein(real, made),
        "mmd2": metrics.mmd2(real, made),
        "auroc": metrics.two_sample_auroc(real, made, n_trees=config.n_trees),
        **metrics.prdc(real, made),
        "gene_means": moments["mean_r"],
        "gene_pairs": metrics.gene_correlation(real, made)["agreement"],
        **{name: near[name] for name in kept},
        "n_compared": n,
    }


def generators(lab: Lab) -> Rows:
    """Return one row for real cells, each control and each trained model."""
    c, seed = lab.config, lab.seed
    seen, unseen = sides(lab)
    judge = judge_of(seen, c.n_trees, seed)
    about = {"n_train": seen.n_obs, "n_heldout": unseen.n_obs, "n_genes": seen.n_vars}
    rows: Rows = []

    def note(arm: str, cells: AnnData, named: Any, **facts: Any) -> None:
        """Add the row of an arm."""
        kind = "network" if "cpu_seconds" in facts else "control"
        row = {"seed": seed, "arm": arm, "kind": kind, **about, **facts}
        row |= score(cells, seen, unseen, c)
        rows.append({**row, "type_agreement": named(cells)})

    # Real against real: one half of the training cells plays the generator.
    order = np.random.default_rng(seed).permutation(seen.n_obs)
    real, rest = (seen[np.sort(part)].copy() for part in np.array_split(order, 2))
    row = {"seed": seed, "arm": "real", "kind": "reference", **about}
    row |= score(real, rest, unseen, c)
    rows.append({**row, "type_agreement": judge_of(rest, c.n_trees, seed)(real)})
    for arm, make in CONTROLS.items():
        note(arm, make(seen, seen.n_obs, seed=seed), judge)
    if "counts" in seen.layers:
        drawn_counts = baselines.negative_binomial(seen, seen.n_obs, seed=seed)
        note("NB per type", preprocess.on_genes(drawn_counts, seen.var_names), judge)
    for arm, model in networks(lab).items():
        watch = Watch(seen)
        look = training.every(max(1, c.steps // 20), watch, phase="gan")
        told = None if arm == "scGAN" else LABELS
        _, seconds = timed(model.fit, seen, label_key=told, callbacks=[look])
        options = {"report": False} if isinstance(model, ScGAN) else {}
        cells = model.generate(seen.n_obs, seed=seed, **options)
        cells = cells[:, seen.var_names].copy()
        log = model.history_
        curve = log.loc[log["term"] == "swd", "value"]
        note(
            arm,
            cells,
            judge,
            cpu_seconds=seconds - watch.seconds,
            cells_seen=c.steps * c.critic_updates * c.batch_size,
            converged=training.is_flat(curve.tolist()),
            distance_curve=curve.tolist(),
            n_parameters=sum(model.n_parameters().values()),
        )
        print(lab.seed, arm, f"{seconds:.0f} CPU seconds", flush=True)
    return rows


# ---------------------------------------------------------------------- latents


def bare(lab: Lab) -> AnnData:
    """Return counts and annotation of cells, on the variable genes."""
    cells, genes = lab.cells, lab.cells.var_names
    # Genes are those of integration, where no cell is held out.
    n_genes = ScAtlasVAEConfig.profile(lab.profile).n_genes
    if n_genes is not None and n_genes < cells.n_vars:
        genes = preprocess.select_genes(cells, n_genes)
    part = cells[:, genes]
    # Cells without any of these genes are left out, for all arms alike.
    part = part[np.asarray(part.layers["counts"].sum(1)).ravel() > 0]
    layers = {"counts": sparse.csr_matrix(part.layers["counts"])}
    var = pd.DataFrame(index=part.var_names)
    return AnnData(part.X.copy(), obs=part.obs.copy(), var=var, layers=layers)


def atlas(lab: Lab, cells: AnnData, **own: Any) -> tuple[AnnData, dict[str, Any]]:
    """Return the codes of scAtlasVAE, and facts of the fit."""
    c = lab.config
    config = ScAtlasVAEConfig.profile(
        lab.profile, n_genes=None, n_latent=c.n_latent, max_epoch=c.epochs, **own
    )
    model = ScAtlasVAE(config, seed=lab.seed, device=lab.device)
    model.fit(cells, batch_key=BATCH)
    log = model.history_
    steps = int(log["step"].max()) + 1
    facts = {"converged": training.is_flat(log, "loss", "train")}
    return model.embed(cells), facts | {"cells_seen": steps * config.n_per_batch}


def gacl(lab: Lab, cells: AnnData) -> tuple[AnnData, dict[str, Any]]:
    """Return the codes of ScGACL, which is told the number of types."""
    c, usual = lab.config, ScGACLConfig.profile(lab.profile)
    # The budget is shared among the phases as the profile shares its own.
    parts = {name: getattr(usual, name) for name in ("pre_epoch", "vaeepoch", "epoch")}
    total = sum(parts.values())
    parts = {name: max(1, round(c.epochs * n / total)) for name, n in parts.items()}
    config = usual.replace(
        n_genes=None, z_size=c.n_latent, n_cluster=cells.obs[LABELS].nunique(), **parts
    )
    # It sees no annotation at all.
    plain = AnnData(cells.X, var=cells.var, layers={"counts": cells.layers["counts"]})
    plain.obs_names = cells.obs_names
    model = ScGACL(config, seed=lab.seed, device=lab.device)
    model.fit(plain, label_key=None)
    log = model.history_
    rec = log[(log["term"] == "rec") & (log["phase"] != log["phase"].iloc[0])]
    codes = model.embed(plain)
    codes.obs = cells.obs.copy()
    seen = sum(
        (int(part["step"].max()) + 1) * getattr(config, size)
        for (_, part), size in zip(
            log.groupby("phase", sort=False),
            ("pre_batch_size", "vae_batch_size", "batch_size"),
            strict=False,
        )
    )
    facts = {"converged": training.is_flat(rec["value"].tolist()), "cells_seen": seen}
    return codes, facts


def screen(lab: Lab, cells: AnnData) -> tuple[AnnData, dict[str, Any]]:
    """Return the codes of REGINA, with the epochs of its profile.

    It is not told the batch: it would need control cells in each.
    """
    config = REGINAConfig.profile(lab.profile, n_genes=None)
    model = REGINA(config, seed=lab.seed, device=lab.device)
    model.fit(cells)
    log = model.history_
    first = log["phase"].iloc[0]
    term = log.loc[log["phase"] == first, "term"].iloc[0]
    return model.embed(cells), {"converged": training.is_flat(log, term, first)}


def controls_of(cells: AnnData, n: int, seed: int) -> dict[str, AnnData]:
    """Return codes that show what a metric is blind to: noise, and types alone."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(cells.n_obs, n)).astype(np.float32)
    names = np.unique(cells.obs[LABELS].astype(str), return_inverse=True)[1]
    # Types in random directions, far apart; cells of a type are alike but for noise.
    places = 10 * rng.normal(size=(names.max() + 1, n)).astype(np.float32)
    made = {"noise": noise, "types alone": places[names] + noise}
    return {arm: AnnData(Z, obs=cells.obs.copy()) for arm, Z in made.items()}


def carried(Z: AnnData) -> dict[str, Any]:
    """Return the scores of labels that each batch gets from all the others."""
    batch = Z.obs[BATCH].astype(str).to_numpy()
    tables = [
        integrators.knn_labels(
            Z[batch != name], Z.obs[LABELS][batch != name], Z[batch == name], NEIGHBOURS
        )
        for name in sorted(set(batch))
    ]
    table = pd.concat(tables).fillna(0.0)
    found = metrics.transfer_scores(Z.obs.loc[table.index, LABELS], table)
    names = ("accuracy", "balanced_accuracy", "macro_f1")
    return {f"transfer_{name}": found[name] for name in names}


def latents(lab: Lab) -> Rows:
    """Return every arm with batch mixing, types, clusters and carried labels."""
    c, seed, cells = lab.config, lab.seed, bare(lab)
    before, seconds = timed(integrators.pca, cells, c.n_latent, seed=seed)
    rows: Rows = []

    def note(arm: str, kind: str, Z: AnnData, **facts: Any) -> None:
        """Add the row of an arm."""
        grid = metrics.ari_over_resolutions(
            Z, Z.obs[LABELS], RESOLUTIONS, c.n_latent, NEIGHBOURS, seed=seed
        )
        row = {"seed": seed, "arm": arm, "kind": kind, "n_latent": Z.n_vars, **facts}
        row |= metrics.integration_scores(
            Z, LABELS, BATCH, before, resolutions=(), seed=seed
        )
        # Totals lack Leiden's part here, so that they would mislead.
        for name in ("bio", "batch", "total", "bio_metrics", "batch_metrics"):
            row.pop(name)
        row |= {"resolutions": list(RESOLUTIONS), "ari_grid": grid["ari"].tolist()}
        row |= {"ari_mean": grid["ari"].mean(), "ari_best": grid["ari"].max()}
        rows.append({**row, **carried(Z)})

    note("PCA", "simple", before, cpu_seconds=seconds)
    Z, seconds = timed(integrators.harmony, cells, BATCH, c.n_latent, seed=seed)
    note("Harmony", "simple", Z, cpu_seconds=seconds)
    for arm, Z in controls_of(cells, c.n_latent, seed).items():
        note(arm, "control", Z)
    alike = {"dispersion": "gene", "batch_embedding": "onehot"}
    arms: dict[str, Callable[[], tuple[AnnData, dict[str, Any]]]] = {
        "scVI-like": lambda: atlas(lab, cells, **alike),
        "scAtlasVAE": lambda: atlas(lab, cells),
        "scGACL": lambda: gacl(lab, cells),
    }
    if PERTURBED in cells.obs:
        arms["REGINA"] = lambda: screen(lab, cells)
    for arm, make in arms.items():
        (Z, facts), seconds = timed(make)
        note(arm, "network", Z, cpu_seconds=seconds, **facts)
        print(lab.seed, arm, f"{seconds:.0f} CPU seconds", flush=True)
    return rows


# ------------------------------------------------------------------ the records


EXPERIMENTS: dict[str, Callable[[Lab], Rows]] = {
    "generators": generators,
    "latents": latents,
}


def allowed(adata: AnnData) -> list[str]:
    """Return the experiments that the cells allow."""
    has_batches = BATCH in adata.obs and adata.obs[BATCH].nunique() > 1
    return ["generators", *(["latents"] if has_batches else [])]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparisons of one data set and write their records."""
    args = parse(parser(__doc__, CompareConfig.PROFILES, EXPERIMENTS), arguments)
    config = CompareConfig.profile(args.profile)
    adata = drawn(load(args), config.most_cells)

    def modules(name: str) -> list[str]:
        screens = name == "latents" and PERTURBED in adata.obs
        return [*MODULES[name], *(["regina"] if screens else [])]

    for seed in seeds(args):
        lab = Lab(adata, config, args.profile, seed, args.device)
        calls = {name: EXPERIMENTS[name] for name in args.only or allowed(adata)}
        run_seed(__file__, lab, calls, adata, config, args, modules)


if __name__ == "__main__":
    main()
