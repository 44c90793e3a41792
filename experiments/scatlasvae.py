"""The recorded runs of the scAtlasVAE chapter: integration, transfer, steps, ...

    python experiments/scatlasvae.py --dataset pbmc_3batches --seeds 5

writes these records into book/results:

    scatlasvae-<dataset>-integration.json   every arm, scored on all cells and on the
                                            half of them whose labels one arm is not
                                            given; needs two batches
    scatlasvae-<dataset>-transfer.json      labels for held-out cells, for a held-out
                                            batch, and with a type that the reference
                                            does not have

for `simulated_atlas` and `pbmc_3batches`

    scatlasvae-<dataset>-steps.json         learning rates: what is reached after how
                                            many steps; 3 seeds

and for `simulated_atlas` alone

    scatlasvae-simulated_atlas-assumption.json     batch shifts of the types' own, from
                                                   none to all; cells of each seed; 3
    scatlasvae-simulated_atlas-vocabularies.json   lineages known in some batches, types
                                                   in the others

Genes are chosen before any arm starts, so that all get the same ones: on all cells for
integration, on the reference for transfer. Nothing is tuned for any arm; neighbours
that vote are 15 everywhere. Seconds are CPU seconds, of the fit alone in `integration`,
and from the cells to the labels in `transfer`.

A seed is written when it is done, and one that stands in the record is not made again
if cells, code and settings are the same: start the same line again after an
interruption.

    python experiments/scatlasvae.py --dataset pancreas --profile paper --seeds 1

writes scatlasvae-<dataset>-paper.json alone: the arms of `integration` with the
published sizes, and one with the published rates and epochs too, for a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from _runs import Rows, load, parse, parser, run_seed, seeds, timed
from anndata import AnnData
from scipy import sparse
from torch import nn

from scgenlib import (
    ScAtlasVAE,
    ScAtlasVAEConfig,
    integrators,
    mapping,
    preprocess,
    simatlas,
    training,
)
from scgenlib.countvae import CellBatch, CountVAE, LossWeights, Noise
from scgenlib.likelihoods import counts_batch
from scgenlib.metrics import integration as scores_of
from scgenlib.metrics.transfer import reject_scores, transfer_scores
from scgenlib.rowblocks import hash_split

#: Modules whose code makes the numbers.
MODULES = ["scatlasvae", "integrators", "metrics.integration", "metrics.transfer"]
MODULES += ["datasets", "simatlas"]
LABELS, BATCH, HALF = "cell_type", "batch", "half_of_cell_type"
LINEAGE, FINE = "lineage_where_told", "type_where_told"
UNLABELLED = "undefined"
NEIGHBOURS = 15
#: Components of the baselines of label transfer; beside it, as many as codes.
N_PCS = 50
#: With more batches than this, only the last one is held out.
MOST_BATCHES = 4
#: An unseen type has at least so many cells in the query.
LEAST_UNSEEN = 10
TYPE_SPECIFIC = (0.0, 0.5, 1.0)
#: Cells and genes of the atlases of `assumption`: fifteen fits must be affordable.
SMALL = (1500, 400)
#: Epochs at the end in which late heads learn, as published.
LATE = 10
#: Experiments with fewer seeds, and the data sets of those that are not for all.
FEWER = {"steps": 3, "assumption": 3}
ONLY_FOR = {
    "steps": ("simulated_atlas", "pbmc_3batches"),
    "assumption": ("simulated_atlas",),
    "vocabularies": ("simulated_atlas",),
}


# ---------------------------------------------------------------------- the parts


def bare(cells: AnnData, n_genes: int | None = None, by: AnnData | None = None) -> Any:
    """Return cells with counts and annotation alone, on the variable genes of `by`.

    Cells that have none of these genes are left out, for all arms alike.
    """
    by, genes = cells if by is None else by, cells.var_names
    if n_genes is not None and n_genes < cells.n_vars:
        genes = preprocess.select_genes(by, n_genes)
    part = cells[:, genes]
    part = part[np.asarray(part.layers["counts"].sum(1)).ravel() > 0]
    layers = {"counts": sparse.csr_matrix(part.layers["counts"])}
    var = pd.DataFrame(index=part.var_names)
    return AnnData(part.X.copy(), obs=part.obs.copy(), var=var, layers=layers)


@dataclass
class Lab:
    """One seed on one data set."""

    cells: AnnData
    config: ScAtlasVAEConfig
    seed: int
    device: str

    @property
    def settings(self) -> ScAtlasVAEConfig:
        """The settings of a fit to cells whose genes are chosen already."""
        return self.config.replace(n_genes=None)

    def fit(
        self,
        cells: AnnData,
        label_key: Any = None,
        callbacks: Sequence[training.Callback] = (),
        config: ScAtlasVAEConfig | None = None,
        **changed: Any,
    ) -> ScAtlasVAE:
        """Return a fitted model."""
        config = (config or self.settings).replace(**changed)
        model = ScAtlasVAE(config, seed=self.seed, device=self.device)
        return model.fit(
            cells, batch_key=BATCH, label_key=label_key, callbacks=callbacks
        )

    def published(self, n_cells: int, **changed: Any) -> ScAtlasVAEConfig:
        """Return the published settings in the sizes of this profile."""
        sizes = {
            name: getattr(self.config, name)
            for name in ("hidden_stacks", "n_latent", "n_per_batch")
        }
        form = {**sizes, "n_genes": None, **changed}
        return ScAtlasVAEConfig.published(n_cells, **form)


def facts_of(model: ScAtlasVAE) -> dict[str, Any]:
    """Return how long a fit went on, and whether its curve is flat."""
    log = model.history_
    return {
        "steps": int(log["step"].max()) + 1,
        "best_step": model.facts_.get("best_step"),
        "converged": training.is_flat(log, "loss", "train"),
    }


def scored(Z: AnnData, before: AnnData, seed: int, **options: Any) -> dict[str, Any]:
    """Return all metrics of an embedding, `before` being the components."""
    return scores_of.integration_scores(Z, LABELS, BATCH, before, seed=seed, **options)


# -------------------------------------------------------------------- integration


def hide_half(labels: pd.Series, seed: int) -> np.ndarray:
    """Return which half of the cells of each type is hidden; no type is lost."""
    rank = np.random.default_rng(seed).permutation(len(labels))
    order = pd.Series(rank, labels.index).groupby(labels, observed=True).rank()
    sizes = labels.groupby(labels, observed=True).transform("size").astype(int)
    return (order <= sizes // 2).to_numpy()


#: Arm -> changed settings, and the column of labels that it is given.
DEEP: dict[str, tuple[dict[str, Any], str | None]] = {
    "VAE, not told the batch": ({"inject_batch": False}, None),
    "scVI-like": ({"dispersion": "gene", "batch_embedding": "onehot"}, None),
    "scAtlasVAE": ({}, None),
    "scAtlasVAE, all labels": ({}, LABELS),
    "scAtlasVAE, half the labels": ({}, HALF),
}
TOLD = {None: "none", LABELS: "all", HALF: "half"}


def integration(lab: Lab) -> Rows:
    """Return every arm with every metric, on all cells and on the hidden half."""
    cells, n, seed = bare(lab.cells, lab.config.n_genes), lab.config.n_latent, lab.seed
    hidden = hide_half(cells.obs[LABELS], seed)
    text = cells.obs[LABELS].astype(str)
    cells.obs[HALF] = text.where(~hidden, UNLABELLED).astype("category")
    rows: Rows = []

    def note(arm: str, Z: AnnData, told: str, seconds: float, **facts: Any) -> None:
        for where, part in (("all", slice(None)), ("hidden half", hidden)):
            if told == "half" and where == "all":
                continue  # half of these labels it has seen
            row = {"seed": seed, "arm": arm, "scored_on": where, "labels": told}
            row |= {"saw_scored_labels": told == "all", "seconds": seconds, **facts}
            rows.append({**row, **scored(Z[part], before[part], seed)})

    before, seconds = timed(integrators.pca, cells, n, seed=seed)
    note("PCA", before, "none", seconds)
    Z, seconds = timed(integrators.harmony, cells, BATCH, n, seed=seed)
    note("Harmony", Z, "none", seconds)
    arms = {arm: (lab.settings.replace(**own), key) for arm, (own, key) in DEEP.items()}
    if lab.config == ScAtlasVAEConfig.profile("paper"):
        arms["published settings"] = lab.published(cells.n_obs), None
    for arm, (config, key) in arms.items():
        model, seconds = timed(lab.fit, cells, key, config=config)
        note(arm, model.embed(cells), TOLD[key], seconds, **facts_of(model))
    return rows


# ----------------------------------------------------------------- label transfer


@dataclass
class Design:
    """Reference and query, and what the query has that the reference has not."""

    name: str
    held_out: str
    reference: AnnData
    query: AnnData
    unseen: str = ""


def designs(cells: AnnData, seed: int) -> Iterator[Design]:
    """Yield the designs that a data set allows.

    Where `obs["set"]` names a query, it is the one with the unseen type, and the other
    designs are made of the reference. Elsewhere the last batch is the query, and the
    seeds take turns to remove its types, the most frequent first.
    """
    base, given = cells, "set" in cells.obs and "query" in set(cells.obs["set"])
    if given:
        is_query = (cells.obs["set"] == "query").to_numpy()
        base, query = cells[~is_query], cells[is_query]
    out = np.random.default_rng(seed).random(base.n_obs) < 0.2
    yield Design("held-out cells", "20 %", base[~out], base[out])
    batch = base.obs[BATCH].astype(str).to_numpy() if BATCH in base.obs else None
    names = [] if batch is None else sorted(set(batch))
    if len(names) > 1:
        for name in names if len(names) <= MOST_BATCHES else names[-1:]:
            out = batch == name
            yield Design("held-out batch", name, base[~out], base[out])
    if given:
        new = set(query.obs[LABELS]) - set(base.obs[LABELS])
        held_out = ", ".join(sorted(set(query.obs[BATCH])))
        yield Design("unseen type", held_out, base, query, ", ".join(sorted(new)))
    elif len(names) > 1:
        out = batch == names[-1]
        types = base.obs[LABELS].astype(str).to_numpy()
        sizes = pd.Series(types[out]).value_counts()
        common = sorted(sizes.index[sizes >= LEAST_UNSEEN], key=lambda t: -sizes[t])
        if len(set(types[~out])) > 2 and common:
            new = common[seed % len(common)]
            reference = base[~out & (types != new)]
            yield Design("unseen type", names[-1], reference, base[out], new)


def transfer(lab: Lab) -> Rows:
    """Return the transferred labels' scores, arm by arm and design by design."""
    rows: Rows = []
    for design in designs(lab.cells, lab.seed):
        n_genes, n_latent = lab.config.n_genes, lab.config.n_latent
        reference, query = (
            bare(part, n_genes, design.reference)
            for part in (design.reference, design.query)
        )
        for arm, dimensions, seconds, table, facts in transferred(
            lab, reference, query, n_latent, design.name == "held-out batch"
        ):
            row = {
                "seed": lab.seed,
                "design": design.name,
                "held_out": design.held_out,
                "unseen": design.unseen,
                "arm": arm,
                "dimensions": dimensions,
                "seconds": seconds,
                **facts,
                "n_reference": reference.n_obs,
                **transfer_scores(query.obs[LABELS], table),
            }
            if row["n_unseen"]:
                found = reject_scores(query.obs[LABELS], table)
                row |= {f"reject_{k}": v for k, v in found.items() if k[:2] != "n_"}
            rows.append(row)
    return rows


def transferred(
    lab: Lab, reference: AnnData, query: AnnData, n_latent: int, joint: bool
) -> Iterator[tuple[str, int, float, pd.DataFrame, dict[str, Any]]]:
    """Yield arm, dimensions, CPU seconds, probabilities and facts of a fit."""
    model, fitting = timed(lab.fit, reference, LABELS)
    facts = facts_of(model)
    for name, how in (("heads", "heads"), ("kNN on codes", "knn")):
        mapped, seconds = timed(
            model.map_query,
            query,
            how=how,
            reference=reference,
            n_neighbours=NEIGHBOURS,
        )
        table = mapped.obsm["probabilities"]
        yield name, n_latent, fitting + seconds, table, facts
    if joint:
        begun = time.process_time()
        both = model.refit(reference, query)
        table = both.label_probabilities(query)
        seconds = time.process_time() - begun
        yield "joint refit", n_latent, seconds, table, facts_of(both)
    labels = reference.obs[LABELS]
    for n_pcs in (n_latent, N_PCS):
        begun = time.process_time()
        known = integrators.pca(reference, n_pcs, seed=lab.seed)
        new = integrators.pca(query, n_pcs, seed=lab.seed, fit_on=reference)
        placing = time.process_time() - begun
        arms: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "kNN on PCA": (integrators.knn_labels, {"k": NEIGHBOURS}),
            "logistic on PCA": (integrators.logistic_labels, {}),
        }
        for name, (learn, options) in arms.items():
            table, seconds = timed(learn, known, labels, new, **options)
            yield name, known.n_vars, placing + seconds, table, {}


# ------------------------------------------------------------- learning rate, steps


def held_out_loss(model: ScAtlasVAE, cells: AnnData) -> float:
    """Return reconstruction plus divergence per cell, the codes being the means."""
    parts = [model.modules_[name] for name in ("encoder", "decoder")]
    vae = CountVAE(*parts, nn.ModuleList()).eval()
    pairs = model.sizes_["batch"].items()
    codes = [pd.Index(names).get_indexer(cells.obs[key]) for key, names in pairs]
    n, device = cells.n_obs, model.device_
    batch = CellBatch(
        counts_batch(sparse.csr_matrix(cells.layers["counts"]), slice(None), device),
        torch.from_numpy(np.array(codes, dtype=np.int64).T.copy()).to(device),
        torch.empty(n, 0, dtype=torch.int64, device=device),
        torch.ones(n, device=device),
    )
    zeros = torch.zeros(n, model.config.n_latent, device=device)
    with torch.no_grad():
        terms = vae(batch, Noise(zeros), LossWeights())
    vae.train()
    return float(terms["rec"] + terms["kl"])


class Watch:
    """A callback that scores a model at some steps, and leaves its own time out."""

    def __init__(
        self, train: AnnData, test: AnnData, wanted: set[Any], per_epoch: int
    ) -> None:
        self.train, self.test = train, test
        self.wanted, self.per_epoch = wanted, per_epoch
        self.rows: Rows = []
        self.begun = time.process_time()

    def __call__(self, event: training.Event) -> None:
        """Add a row if the step is one of those that are wanted."""
        step, now = event.step + 1, time.process_time()
        if step not in self.wanted:
            return
        model: Any = event.model
        Z = np.asarray(model.embed(self.train).X)
        types, batches = self.train.obs[LABELS], self.train.obs[BATCH]
        self.rows.append(
            {
                "step": step,
                "epoch": step / self.per_epoch,
                "seconds": now - self.begun,
                **scores_of.kmeans_agreement(Z, types, seed=model.seed),
                **scores_of.same_batch_share(Z, types, batches),
                "heldout_loss": held_out_loss(model, self.test),
            }
        )
        self.begun += time.process_time() - now


def steps(lab: Lab) -> Rows:
    """Return what each learning rate reaches, at steps on a log scale.

    Scores are those of the training cells, the loss that of cells that no arm sees.
    """
    out = hash_split(lab.cells.obs_names, 0.1)
    train, test = (
        bare(lab.cells[part], lab.config.n_genes, lab.cells[~out])
        for part in (~out, out)
    )
    n = lab.settings.epochs(train.n_obs)
    per_epoch = int(np.ceil(train.n_obs / lab.config.n_per_batch))
    flat = lab.settings.replace(valid_share=0.0, lr_schedule="constant")
    slow = flat.replace(lr=5e-5, max_epoch=4 * n)
    total = 4 * n * per_epoch
    arms = {
        "published": lab.published(
            train.n_obs, max_epoch=4 * n, kl_warmup=total, valid_share=0.0
        ),
        "5e-5": slow,
        "1e-3": flat.replace(lr=1e-3, max_epoch=n),
        "ours": flat.replace(lr_schedule="cosine", max_epoch=n),
    }
    points = np.unique(np.geomspace(min(8, n), total, 12).round().astype(int))
    rows: Rows = []
    for arm, config in arms.items():
        watch = Watch(train, test, {*points, config.max_epoch * per_epoch}, per_epoch)
        model = lab.fit(train, callbacks=[watch], config=config)
        about = ("lr", "lr_schedule", "gate_weight", "max_epoch")
        named = {name: getattr(config, name) for name in about}
        converged = facts_of(model)["converged"]
        for row in watch.rows:
            row = {"seed": lab.seed, "arm": arm, **named, **row}
            rows.append({**row, "converged_at_end": converged})
    return rows


# ---------------------------------------------------------- on the simulated atlas


def assumption(lab: Lab) -> Rows:
    """Return the arms on atlases whose batch shifts are more and more of types' own."""
    rows: Rows = []
    n = lab.config.n_latent
    for share in TYPE_SPECIFIC:
        cells = simatlas.atlas(*SMALL, type_specific=share, seed=lab.seed)
        cells = bare(cells)
        before, seconds = timed(integrators.pca, cells, n, seed=lab.seed)
        made = {"PCA": (before, seconds, {})}
        made["Harmony"] = (
            *timed(integrators.harmony, cells, BATCH, n, seed=lab.seed),
            {},
        )
        model, seconds = timed(lab.fit, cells)
        made["scAtlasVAE"] = model.embed(cells), seconds, facts_of(model)
        for arm, (Z, seconds, facts) in made.items():
            row = {"seed": lab.seed, "type_specific": share, "arm": arm}
            row |= {"seconds": seconds, **facts}
            # Without Leiden, which would be most of the time.
            rows.append({**row, **scored(Z, before, lab.seed, resolutions=())})
    return rows


def vocabularies(lab: Lab) -> Rows:
    """Return how well two heads find the hierarchy that no cell shows.

    Half of the batches tell the lineage of their cells and the others the type.
    """
    cells = bare(lab.cells, lab.config.n_genes)
    names = np.random.default_rng(lab.seed).permutation(sorted(set(cells.obs[BATCH])))
    coarse = cells.obs[BATCH].isin(names[: len(names) // 2]).to_numpy()
    lineage, kind = (cells.obs[c].astype(str).to_numpy() for c in ("lineage", LABELS))
    cells.obs[LINEAGE] = pd.Categorical(np.where(coarse, lineage, UNLABELLED))
    cells.obs[FINE] = pd.Categorical(np.where(coarse, UNLABELLED, kind))
    # A type that only the other batches have is in no vocabulary.
    known = np.isin(kind, kind[~coarse]) & np.isin(lineage, lineage[coarse])
    true = set(zip(lineage[known], kind[known], strict=True))
    n = lab.settings.epochs(cells.n_obs)
    rows: Rows = []
    for arm, late in (
        ("heads from the start", None),
        ("heads at the end", min(LATE, max(1, n // 2))),
    ):
        # To the end and without a choice of the best step: late heads need the end.
        own = {"pred_last_n_epoch": late, "valid_share": 0.0}
        model, seconds = timed(lab.fit, cells, [LINEAGE, FINE], **own)
        pairs = mapping.matching_pairs(model.align_labels(cells, LINEAGE, FINE))
        found = set(zip(pairs[LINEAGE], pairs[FINE], strict=True))
        said = model.predict_labels(cells)
        one, two = (said[c].astype(str).to_numpy() for c in (LINEAGE, FINE))
        fits = [pair in true for pair in zip(one, two, strict=True)]
        rows.append(
            {
                "seed": lab.seed,
                "arm": arm,
                "pred_last_n_epoch": late,
                "batches_with_lineages": sorted(map(str, names[: len(names) // 2])),
                "seconds": seconds,
                **facts_of(model),
                "right": float(((one == lineage) & (two == kind))[known].mean()),
                "consistent": float(np.mean(fits)),
                "lineage_untold": float((one == lineage)[~coarse & known].mean()),
                "type_untold": float((two == kind)[coarse & known].mean()),
                "n_pairs": len(found),
                "precision": len(found & true) / max(1, len(found)),
                "recall": len(found & true) / len(true),
                "pairs": [f"{a} - {b}" for a, b in sorted(found)],
            }
        )
    return rows


# ------------------------------------------------------------------ the records


EXPERIMENTS: dict[str, Callable[[Lab], Rows]] = {
    "integration": integration,
    "transfer": transfer,
    "steps": steps,
    "assumption": assumption,
    "vocabularies": vocabularies,
}


def wanted(adata: AnnData, args: argparse.Namespace, seed: int) -> list[str]:
    """Return the experiments that a seed of a data set adds to."""
    if args.only:
        return list(args.only)
    n_batches = adata.obs[BATCH].nunique() if BATCH in adata.obs else 0
    return [
        name
        for name in EXPERIMENTS
        if (name != "integration" or n_batches > 1)
        and args.dataset in ONLY_FOR.get(name, [args.dataset])
        and seed < FEWER.get(name, seed + 1)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments of one data set and write its records."""
    args = parse(parser(__doc__, ScAtlasVAEConfig.PROFILES, EXPERIMENTS), arguments)
    config, adata = ScAtlasVAEConfig.profile(args.profile), load(args)
    for seed in seeds(args):
        lab = Lab(adata, config, seed, args.device)
        names = ["paper"] if args.profile == "paper" else wanted(adata, args, seed)
        calls = {name: EXPERIMENTS.get(name, integration) for name in names}
        run_seed(__file__, lab, calls, adata, config, args, lambda _: MODULES)


if __name__ == "__main__":
    main()
