"""The recorded runs of the scGACL chapter: contest, dial, heterogeneity, invention.

    python experiments/scgacl.py --dataset scgacl_sim --seeds 5

writes these records into book/results:

    scgacl-<dataset>-choose.json     settings, scored on held-out observed entries
    scgacl-<dataset>-contest.json    every imputer against the truth
    scgacl-<dataset>-dial.json       the weight of the reconstruction, from 1 to the
                                     number of genes: does the code collapse?
                                     2 seeds
    scgacl-<dataset>-invention.json  false tests, false correlations, noise in draws

where all the truth is known

    scgacl-<dataset>-ablation.json   the three losses of phase 2 on and off, 2 seeds

and for `simulated` alone

    scgacl-simulated-heterogeneity.json    gene programmes within a type, none to full

The truth is the layer of true counts where there is one. Elsewhere a tenth of the
observed counts is hidden, and the truth is what they were; which zeros are true is
not known then. The same entries are hidden for every seed: a seed is a method's.
Genes are chosen after entries were hidden and before a method starts, so that all
methods get the same matrix. A method without labels gets cells without any
annotation; scGACL is told how many types there are.

    python experiments/scgacl.py --dataset scgacl_sim --profile paper --seeds 1

writes scgacl-<dataset>-paper.json alone: scGACL with the published sizes and the
default settings, for a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from _runs import Rows, add, load, parse, parser, seeds, short
from anndata import AnnData
from scipy import sparse

from scgenlib import (
    ScGACL,
    ScGACLConfig,
    baselines,
    metrics,
    preprocess,
    published,
    simulate,
)
from scgenlib.scgacl import CollapseWarning

#: Modules whose code makes the numbers.
MODULES = ["scgacl", "published", "baselines", "metrics", "datasets", "simulate"]
#: Share of the observed entries that are hidden where no truth is known.
HIDDEN = 0.1
#: The grid of `choose`; `rec_weight` is a share of the number of genes.
REC_SHARES = (0.25, 0.5, 1.0)
CLUSTER_ON = ("log", "observed")
THRESHOLDS = (0.0, 0.5)
#: The dial; the number of genes comes last.
REC_WEIGHTS = (1, 10, 30, 100)
ONE, PUBLISHED = "one component", "published start"
FORMS = ("mixture", ONE, PUBLISHED)
PROGRAMMES = (0.0, 0.5, 1.0)
SWEEP_SEEDS = 2
N_DRAWS = 20
#: The largest type gets two random halves, and methods are told that they are types.
HALVES = "halves"
LABELS = "cell_type"

#: Cells, the column with the labels it is told, seed -> completed cells.
Impute = Callable[[AnnData, str, int], AnnData]

#: Baselines that see no labels, and those that do.
UNLABELLED: dict[str, Impute] = {
    "none": lambda cells, key, seed: baselines.none(cells),
    "gene mean": lambda cells, key, seed: baselines.gene_mean(cells),
    "kNN smoothing": lambda cells, key, seed: baselines.knn_smoothing(cells, seed=seed),
    "diffusion": lambda cells, key, seed: baselines.diffusion(cells, seed=seed),
    "ALRA": lambda cells, key, seed: baselines.alra(cells, seed=seed),
    "NB auto-encoder": lambda cells, key, seed: baselines.nb_autoencoder(
        cells, seed=seed
    ),
}
LABELLED: dict[str, Impute] = {
    "type mean": lambda cells, key, seed: baselines.type_mean(cells, key),
    "type mean + cell shift": lambda cells, key, seed: baselines.type_mean(
        cells, key, cell_shift=True
    ),
}


# ------------------------------------------------------------ what is to be solved


@dataclass
class Puzzle:
    """Cells with lost entries, and what these were.

    Attributes
    ----------
    cells
        What a method may see: counts, and the annotation in `obs`.
    true_counts
        Of the same cells and genes.
    zeros_known
        Whether a zero of `true_counts` is truly one.
    truth
        Log true counts, on their own scale.
    lost
        True where the truth is above 0 and nothing was observed.
    """

    cells: AnnData
    true_counts: sparse.csr_matrix
    zeros_known: bool
    truth: sparse.csr_matrix = field(init=False)
    lost: sparse.csr_matrix = field(init=False)

    def __post_init__(self) -> None:
        self.truth = metrics.log_truth(self.true_counts)
        seen = (self.cells.layers["counts"] > 0).astype(np.int8)
        self.lost = ((self.true_counts > 0).astype(np.int8) - seen) > 0

    @property
    def types(self) -> np.ndarray:
        """The type of each cell."""
        return self.cells.obs[LABELS].astype(str).to_numpy()

    @property
    def totals(self) -> np.ndarray:
        """The observed total of each cell."""
        return sums(self.cells.layers["counts"], 1)


def sums(matrix: Any, axis: int) -> np.ndarray:
    """Return the sums of a sparse matrix as a flat array."""
    return np.asarray(matrix.sum(axis), dtype=float).ravel()


def puzzle_of(adata: AnnData, n_genes: int | None) -> Puzzle:
    """Return the puzzle that a data set makes."""
    zeros_known = "true_counts" in adata.layers
    if not zeros_known:
        adata = preprocess.hide_entries(adata, HIDDEN, seed=0)
    adata = adata[:, sums(adata.layers["counts"], 0) > 0]
    if n_genes is not None and n_genes < adata.n_vars:
        adata = adata[:, preprocess.select_genes(adata, n_genes)]
    adata = adata[sums(adata.layers["counts"], 1) > 0].copy()
    layers = {"counts": adata.layers["counts"]}
    cells = AnnData(adata.X, obs=adata.obs, var=adata.var[[]], layers=layers)
    return Puzzle(cells, sparse.csr_matrix(adata.layers["true_counts"]), zeros_known)


def blind(cells: AnnData) -> AnnData:
    """Return cells without any annotation."""
    layers = {"counts": cells.layers["counts"]}
    return AnnData(cells.X, obs=cells.obs[[]], var=cells.var[[]], layers=layers)


def layer(imputed: AnnData, like: AnnData, name: str = "imputed") -> np.ndarray:
    """Return a layer on the genes of `like`; 0 for those that a method left out."""
    values = imputed.layers[name]
    values = values.toarray() if sparse.issparse(values) else np.asarray(values)
    out = np.zeros(like.shape, np.float32)
    out[:, like.var_names.get_indexer(imputed.var_names)] = values
    return out


# ---------------------------------------------------------------------------- fits


class Lab:
    """The fits of one seed to one puzzle; the same fit is made once."""

    def __init__(self, puzzle: Puzzle, config: ScGACLConfig, seed: int, device: str):
        self.puzzle, self.config = puzzle, config
        self.seed, self.device = seed, device
        self._made: dict[tuple[str, str | None, str], ScGACL] = {}

    def fit(
        self,
        label_key: str | None = None,
        kind: type[ScGACL] = ScGACL,
        **changed: Any,
    ) -> ScGACL:
        """Return a model of the puzzle's cells, label-free without a column."""
        config = self.config.replace(**changed)
        key = config.hash(), label_key, kind.__name__
        if key not in self._made:
            self._made[key] = self.fit_to(self.puzzle.cells, config, label_key, kind)
        return self._made[key]

    def fit_to(
        self,
        cells: AnnData,
        config: ScGACLConfig,
        label_key: str | None,
        kind: type[ScGACL] = ScGACL,
    ) -> ScGACL:
        """Return a model of any cells."""
        cells = blind(cells) if label_key is None else cells
        model = kind(config, seed=self.seed, device=self.device)
        with warnings.catch_warnings():
            # Some rows are there to show a collapse; their `spread` tells it.
            warnings.simplefilter("ignore", CollapseWarning)
            return model.fit(cells, label_key=label_key)


def imputed_by(
    model: ScGACL, cells: AnnData, threshold: float | None = None, **options: Any
) -> AnnData:
    """Return what a model imputes, with another threshold for zeros if given."""
    cells = blind(cells) if model.label_key_ is None else cells
    before = model.config
    if threshold is not None:
        model.config = before.replace(drop_threshold=threshold)
    try:
        return model.impute(cells, **options)
    finally:
        model.config = before


def facts_of(model: ScGACL) -> dict[str, Any]:
    """Return the settings of a fit, and what tells a collapsed code."""
    log, config = model.history_, model.config
    joint = log[log["phase"] != "pre"]
    kl = joint.loc[joint["term"] == "kl", "value"]
    rec = joint.loc[joint["term"] == "rec", "value"].to_numpy()
    parts = np.array_split(rec, min(10, len(rec)))
    weight = config.rec_weight
    return {
        "rec_weight": model.sizes_["n_genes"] if weight is None else weight,
        "drop_threshold": config.drop_threshold,
        "cluster_on": config.cluster_on,
        "n_components": model.sizes_["n_components"],
        "kl": float(kl.tail(10).mean()),
        "components": model.facts_.get("components"),
        "spread": model.facts_.get("spread"),
        # Reconstruction error in tenths of phases 1 and 2: is it flat?
        "rec_curve": [float(part.mean()) for part in parts],
        "fit_seconds": round(model.fit_seconds_, 1),
    }


# ------------------------------------------------------------------------ measures


def score(values: np.ndarray, puzzle: Puzzle) -> dict[str, Any]:
    """Return the measures of completed log values, on the truth's own scale."""
    p, n_types = puzzle, np.unique(puzzle.types, return_counts=True)[1]
    lost = metrics.masked_scores(values, p.truth, p.lost)
    within = metrics.oversmoothing(
        values, p.truth, p.types, totals=p.totals, where=p.lost
    )
    row = {
        "rmse": lost["rmse"],
        "pcc": lost["pcc"],
        "cosine": lost["cosine"],
        **metrics.cluster_scores(values, p.types),
        "variance_ratio": within["variance_ratio"],
        "within_correlation": within["correlation"],
        "within_pairs": within["pairs"],
    }
    k = min(15, int(n_types.max()) - 2)
    if k >= 2:
        near = metrics.neighbour_overlap(values, p.truth, p.types, k)
        row |= {"neighbours": near["jaccard"], "neighbours_chance": near["chance"]}
    if p.zeros_known:
        counts = p.cells.layers["counts"]
        row["zeros_filled"] = metrics.zeros_filled(values, p.true_counts, counts)
        mask = metrics.mask_scores(values > 0.1, p.lost, counts)
        row |= {f"mask_{name}": mask[name] for name in ("precision", "recall", "f1")}
        # The published scale: true counts over the totals that were observed.
        observed = metrics.log_truth(p.true_counts, p.totals)
        lost = metrics.masked_scores(values, observed, p.lost)
        row |= {f"{name}_observed_scale": lost[name] for name in ("rmse", "pcc")}
    shares = [name for name in p.cells.obs if name.endswith("_prop")]
    if shares:
        known = p.cells.obs[shares].to_numpy(float)
        linear = np.expm1(values)
        mixing = metrics.mixing_error(
            linear / linear.sum(1, keepdims=True), known / known.sum(1, keepdims=True)
        )
        row |= {"mixing_rmse": mixing["rmse"], "mixing_guess": mixing["guess"]}
    if "stage_order" in p.cells.obs:
        order = metrics.order_agreement(values, p.cells.obs["stage_order"])
        row["order_spearman"] = order["spearman"]
    return row


def variances(values: np.ndarray, types: np.ndarray) -> tuple[float, float]:
    """Return variance between and within types, the means over genes."""
    total = values.var(0, dtype=float).mean()
    parts = [(types == name) for name in np.unique(types)]
    within = sum(own.mean() * values[own].var(0, dtype=float).mean() for own in parts)
    return float(total - within), float(within)


# --------------------------------------------------------------------- the choice


def choose(puzzle: Puzzle, config: ScGACLConfig, device: str) -> Rows:
    """Return every candidate with its error at held-out observed entries.

    No truth and no label is looked at. A held-out entry was above 0: this score
    cannot see that a true zero is filled, and so favours filling all.
    """
    inner = puzzle_of(blind(puzzle.cells), None)
    rows: Rows = []
    for share, cluster_on in itertools.product(REC_SHARES, CLUSTER_ON):
        chosen = {"rec_share": share, "cluster_on": cluster_on}
        settings = settled(config, chosen, puzzle.cells.n_vars)
        model = Lab(inner, settings, 0, device).fit()
        for threshold in THRESHOLDS:
            made = imputed_by(model, inner.cells, threshold)
            error = metrics.masked_scores(
                layer(made, inner.cells), inner.truth, inner.lost
            )
            rows.append(
                {
                    "seed": 0,
                    **chosen,
                    **facts_of(model),
                    "drop_threshold": threshold,
                    "heldout_rmse": error["rmse"],
                }
            )
    best = min(rows, key=lambda row: row["heldout_rmse"])
    return [{**row, "chosen": row is best} for row in rows]


def settled(config: ScGACLConfig, chosen: dict[str, Any], n_genes: int) -> ScGACLConfig:
    """Return a configuration with what was chosen."""
    names = ("drop_threshold", "cluster_on")
    changed = {name: chosen[name] for name in names if name in chosen}
    return config.replace(rec_weight=chosen["rec_share"] * n_genes, **changed)


# -------------------------------------------------------------------- experiments


def contest(lab: Lab, args: argparse.Namespace) -> Rows:
    """Return one row for each arm: beat the mean."""
    p, seed = lab.puzzle, lab.seed
    rows: Rows = []
    hidden, told = blind(p.cells), p.cells[:].copy()
    told.obs["permuted"] = np.random.default_rng(seed).permutation(p.types)
    arms = [(arm, make, hidden, "") for arm, make in UNLABELLED.items()]
    arms += [(arm, make, told, LABELS) for arm, make in LABELLED.items()]
    arms.append(("type mean, permuted", LABELLED["type mean"], told, "permuted"))
    for arm, make, cells, key in arms:
        begun = time.perf_counter()
        values = layer(make(cells, key, seed), p.cells)
        seconds = round(time.perf_counter() - begun, 2)
        row = {"arm": arm, "uses_labels": bool(key), **score(values, p)}
        if key == "permuted":
            found = metrics.cluster_scores(values, told.obs[key])
            row["ari_told"] = found["ari"]
        rows.append({"seed": seed, **row, "seconds": seconds})
    return rows + models(lab, args)


def models(lab: Lab, args: argparse.Namespace) -> Rows:
    """Return the rows of scGACL in its forms, and of its parts."""
    p, rows = lab.puzzle, []
    arms: list[tuple[str, ScGACL, float | None]] = []
    fills_all = lab.config.drop_threshold == 0
    free = lab.fit()
    arms.append(("scGACL", free, None))
    other = "zeros by table" if fills_all else "all zeros filled"
    arms.append((f"scGACL, {other}", free, 0.5 if fills_all else 0.0))
    arms.append(("scGACL with labels", lab.fit(LABELS), None))
    arms.append(("VaDE only", lab.fit(epoch=0), None))
    if args.dataset == "scgacl_sim" and lab.seed < SWEEP_SEEDS:
        # The published number of epochs, in the sizes of the profile.
        long = ScGACLConfig.profile("paper")
        form = ScGACLConfig.published(
            args.profile,
            n_cluster=lab.config.n_cluster,
            pre_epoch=long.pre_epoch,
            vaeepoch=long.vaeepoch,
            epoch=long.epoch,
        )
        model = lab.fit_to(p.cells, form, None, published.ScGACLAsPublished)
        arms.append(("scGACL, published weights", model, None))
        arms.append(("scGACL, published weights, all zeros filled", model, 0.0))
    for arm, model, threshold in arms:
        begun = time.perf_counter()
        values = layer(imputed_by(model, p.cells, threshold), p.cells)
        seconds = time.perf_counter() - begun + model.fit_seconds_
        row = {
            "seed": lab.seed,
            "arm": arm,
            "uses_labels": model.label_key_ is not None,
            **score(values, p),
            **facts_of(model),
            "seconds": round(seconds, 2),
        }
        if threshold is not None:
            row["drop_threshold"] = threshold
        rows.append(row)
    return rows


def dial(lab: Lab, args: argparse.Namespace) -> Rows:
    """Return what becomes of code and reconstruction as its weight grows.

    Two phases and no third, in two forms: as everywhere in this book, and with one
    component in place of a mixture. On the data that come with the published code there
    is a third: the published start of weights and of the code's variance, with the
    published number of epochs.
    """
    n_genes = lab.puzzle.cells.n_vars
    weights = [weight for weight in REC_WEIGHTS if weight < n_genes]
    rows: Rows = []
    for form in FORMS if args.dataset == "scgacl_sim" else FORMS[:2]:
        # The published number of epochs takes long: the two ends of the dial.
        some = weights[:1] if form == PUBLISHED else weights
        for weight in [*some, n_genes]:
            rows.append({"form": form, **code_of(lab, float(weight), form=form)})
            print(args.dataset, rows[-1], flush=True)
    return rows


def ablation(lab: Lab, args: argparse.Namespace) -> Rows:
    """Return the same for the losses of phase 2, on and off, at the full weight."""
    names = ("lambda_g_adv", "lambda_simcl", "lambda_supcl")
    rows = []
    for on in itertools.product((0.0, 1.0), repeat=3):
        weights = dict(zip(names, on, strict=True))
        rows.append(code_of(lab, float(lab.puzzle.cells.n_vars), **weights))
    return rows


def code_of(
    lab: Lab, rec_weight: float, form: str = "", **weights: float
) -> dict[str, Any]:
    """Return one fit's code, reconstruction and completed matrix, in numbers."""
    p = lab.puzzle
    options: dict[str, Any] = {"rec_weight": rec_weight, "valid_share": 0.0, **weights}
    kind: type[ScGACL] = ScGACL
    if form:
        options["epoch"] = 0
    if form == ONE:
        options["n_cluster"] = 1
    if form == PUBLISHED:
        kind, long = published.ScGACLAsPublished, ScGACLConfig.published()
        names = ("pre_epoch", "vaeepoch", "init_sd", "shuffle")
        options |= {name: getattr(long, name) for name in names}
    model = lab.fit(kind=kind, **options)
    decoded = layer(imputed_by(model, p.cells, keep_observed=False), p.cells)
    between, within = variances(decoded, p.types)
    full = score(layer(imputed_by(model, p.cells), p.cells), p)
    code = model.embed(blind(p.cells))
    kept = ("rmse", "pcc", "ari", "variance_ratio", "within_correlation")
    return {
        "seed": lab.seed,
        **weights,
        **facts_of(model),
        "between_types": between,
        "within_types": within,
        "ari_of_code": metrics.ari(p.types, code.obs["component"]),
        **{name: full[name] for name in kept},
    }


def heterogeneity(lab: Lab, args: argparse.Namespace) -> Rows:
    """Return what is left of programmes within types, weak to strong."""
    rows: Rows = []
    share = float(lab.config.rec_weight or 0) / lab.puzzle.cells.n_vars
    for programmes in PROGRAMMES:
        full = simulate.simulate(
            1000,
            300,
            programmes=programmes,
            dropout=0.4,
            dropout_slope=0.5,
            seed=lab.seed,
        )
        p = puzzle_of(full, lab.config.n_genes)
        config = settled(lab.config, {"rec_share": share}, p.cells.n_vars)
        config = config.replace(n_cluster=len(np.unique(p.types)))
        own = Lab(p, config, lab.seed, lab.device)
        made = {
            "type mean": baselines.type_mean(p.cells, LABELS),
            "kNN smoothing": baselines.knn_smoothing(blind(p.cells), seed=lab.seed),
            "ALRA": baselines.alra(blind(p.cells), seed=lab.seed),
            "VaDE only": imputed_by(own.fit(epoch=0), p.cells),
            "scGACL": imputed_by(own.fit(), p.cells),
        }
        for arm, cells in made.items():
            values = layer(cells, p.cells)
            rows.append(
                {
                    "seed": lab.seed,
                    "programmes": programmes,
                    "arm": arm,
                    "uses_labels": arm in LABELLED,
                    "rmse": metrics.masked_scores(values, p.truth, p.lost)["rmse"],
                    **within_programmes(values, p, full),
                }
            )
    return rows


def within_programmes(
    values: np.ndarray, puzzle: Puzzle, full: AnnData
) -> dict[str, float]:
    """Return spread and agreement in each type's programme genes, types averaged.

    `correlation` is with the true counts at the lost entries, noise included;
    `correlation_mean` with the means they were drawn from.
    """
    p, found = puzzle, []
    full = full[p.cells.obs_names, p.cells.var_names]
    means = np.asarray(full.layers["true_expression"], dtype=float)
    means = np.log1p(means / means.sum(1, keepdims=True) * np.median(means.sum(1)))
    for name in np.unique(p.types):
        own = np.flatnonzero(p.types == name)
        genes = np.flatnonzero((full.var["programme"] == name).to_numpy())
        part = np.ix_(own, genes)
        options: Any = {"totals": p.totals[own], "where": p.lost[own][:, genes]}
        true = p.truth[own][:, genes]
        types = p.types[own]
        one = metrics.oversmoothing(values[part], true, types, **options)
        two = metrics.oversmoothing(values[part], means[part], types, **options)
        if one["pairs"]:
            found.append(
                [one["variance_ratio"], one["correlation"], two["correlation"]]
            )
    names = ("variance_ratio", "correlation", "correlation_mean")
    return dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))


def invention(lab: Lab, args: argparse.Namespace) -> Rows:
    """Return what each arm invents, with true labels, without, and with false ones."""
    p, seed = lab.puzzle, lab.seed
    sizes = p.cells.obs[LABELS].value_counts()
    split = np.flatnonzero(p.types == str(sizes.index[0]))
    half = np.random.default_rng(seed).permutation(len(split)) % 2
    cells = p.cells.copy()
    false_types = p.types.astype(object)
    false_types[split] = [f"{sizes.index[0]}, half {i}" for i in half]
    cells.obs[HALVES] = false_types.astype(str)

    def deep(cells: AnnData, key: str, seed: int) -> AnnData:
        # The cells of the puzzle were fitted before; permuted ones were not.
        label_key = key or None
        if cells is whole and key != HALVES:
            return imputed_by(lab.fit(label_key), p.cells)
        return imputed_by(lab.fit_to(cells, lab.config, label_key), cells)

    whole = cells
    arms = [(arm, make, "") for arm, make in UNLABELLED.items()]
    arms += [(arm, make, key) for arm, make in LABELLED.items() for key in KEYS]
    arms += [("scGACL", deep, "")]
    arms += [("scGACL with labels", deep, key) for key in KEYS]
    rows: Rows = [
        {"arm": "truth", "told": "", **de(p.truth.toarray()[split], half)},
    ]
    for arm, make, key in arms:
        values = layer(make(whole, key, seed), p.cells)
        row = {"arm": arm, "told": key, **de(values[split], half)}
        if key != HALVES:
            found = metrics.invented_correlation(
                lambda mixed, make=make, key=key: make(mixed, key, seed),
                p.cells,
                seed=seed,
            )
            row |= {f"r_{name}": value for name, value in found.items()}
        rows.append(row)
    for arm, model in (("scGACL", lab.fit()), ("VaDE only", lab.fit(epoch=0))):
        rows.append({"arm": arm, "told": "", "draws": N_DRAWS, **noise(model, lab)})
    return [{"seed": seed, **row} for row in rows]


#: What a method with labels is told.
KEYS = (LABELS, HALVES)


def de(values: np.ndarray, half: np.ndarray) -> dict[str, Any]:
    """Return the share of genes that differ between two random halves of a type."""
    found = metrics.false_de(values, halves=half)
    return {f"de_{name}": value for name, value in found.items()}


def noise(model: ScGACL, lab: Lab) -> dict[str, float]:
    """Return the variance within types of drawn imputations: cells, or draws?"""
    p = lab.puzzle
    made = imputed_by(
        model, p.cells, n_draws=N_DRAWS, seed=lab.seed, keep_observed=False
    )
    mean, sd = layer(made, p.cells), layer(made, p.cells, "imputed_sd")
    # The deviations are those of the draws at hand: n and not n - 1.
    between_draws = float((sd.astype(float) ** 2).mean()) * N_DRAWS / (N_DRAWS - 1)
    between_cells = variances(mean, p.types)[1] - between_draws / N_DRAWS
    within = metrics.oversmoothing(
        mean, p.truth, p.types, totals=p.totals, where=p.lost
    )
    return {
        "between_draws": between_draws,
        "between_cells": max(between_cells, 0.0),
        "noise_share": between_draws / (between_draws + max(between_cells, 0.0)),
        "within_truth": variances(p.truth.toarray(), p.types)[1],
        "within_correlation": within["correlation"],
    }


# ------------------------------------------------------------------ the records


EXPERIMENTS: dict[str, Callable[[Lab, argparse.Namespace], Rows]] = {
    "contest": contest,
    "dial": dial,
    "ablation": ablation,
    "invention": invention,
    "heterogeneity": heterogeneity,
}


def run(lab: Lab, args: argparse.Namespace) -> Iterator[tuple[str, Rows]]:
    """Yield the name and the rows of each record that one seed adds to."""
    if args.profile == "paper":
        yield "paper", models(lab, args)
        return
    for name in args.only or EXPERIMENTS:
        # One draws cells of its own, one is for data whose zeros are known.
        fits = {
            "heterogeneity": args.dataset == "simulated",
            "ablation": lab.puzzle.zeros_known and lab.seed < SWEEP_SEEDS,
            "invention": lab.seed < SWEEP_SEEDS,
            "dial": lab.seed < SWEEP_SEEDS,
        }
        if fits.get(name, True):
            yield name, EXPERIMENTS[name](lab, args)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments of one data set and write its records."""
    given = parser(__doc__, ScGACLConfig.PROFILES, EXPERIMENTS)
    given.add_argument("--genes", type=int, default=None, help="most variable ones")
    args = parse(given, arguments)
    changed = {} if args.genes is None else {"n_genes": args.genes}
    config = ScGACLConfig.profile(args.profile, **changed)
    adata = load(args)
    puzzle = puzzle_of(adata, config.n_genes)
    config = config.replace(n_cluster=len(np.unique(puzzle.types)))

    def write(name: str, rows: Rows, begun: float) -> None:
        seconds = time.perf_counter() - begun
        rows = [short(row) for row in rows]
        add(__file__, name, rows, adata, config, args, seconds, MODULES, key_of)

    settings = config
    if args.profile != "paper":
        begun = time.perf_counter()
        rows = choose(puzzle, config, args.device)
        write("choose", rows, begun)
        chosen = next(row for row in rows if row["chosen"])
        settings = settled(config, chosen, puzzle.cells.n_vars)
    for seed in seeds(args):
        begun = time.perf_counter()
        for name, rows in run(Lab(puzzle, settings, seed, args.device), args):
            write(name, rows, begun)
            begun = time.perf_counter()


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what names a row, so that a second run replaces it."""
    names = ("seed", "arm", "told", "draws", "programmes", "form")
    if "arm" not in row:  # a sweep over settings, which are chosen elsewhere
        names += ("rec_weight", "drop_threshold", "cluster_on", "lambda_g_adv")
        names += ("lambda_simcl", "lambda_supcl")
    return tuple(row.get(name) for name in names)


if __name__ == "__main__":
    main()
