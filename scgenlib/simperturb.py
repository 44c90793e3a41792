"""A perturbation screen whose truth is known: pathways, knock-outs, and doubles.

The model of one cell c under condition s, with targets T(s), and gene g::

    co-variation  w[c, g] = covariation * sum_p L[g, p] a[c, p],   a ~ N(0, 1)
    through       d[j] = -L L[j]                   what falls and rises with gene j
    direction     b[j] = sqrt(pathway) * d[j] + sqrt(1 - pathway) * own[j]
    one target    e[j] = strength[j] * b[j] + shared * strength * common,  e[j, j] = 0;
                  e[j] = 0 for a target without an effect
    condition     e[s] = k * sum_j e[j] + log(1 - knockdown) at each target, j in T(s)
    mean          mu[c] = depth[c] * softmax(log abundance + w[c] + e[s] + type + batch)
    counts        y[c, g] ~ Poisson(mu[c, g] * Gamma(mean 1, variance dispersion))

`L` holds the loadings of the genes on the pathways: a main one, and a weaker one on a
second pathway. `d[j]` is thus the regression of all genes on gene j in control cells,
followed to where j falls. `own[j]` has the values of `d[j]` at genes drawn at random,
so that both are of one size: `pathway` says how far an effect can be read from control
cells, not how large it is. k is 1, but 1 - epistasis if two targets share a main
pathway. With activation the signs of `b` and of the knock-down turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.errors import ConfigError, message, unknown
from scgenlib.preprocess import normalise
from scgenlib.simulate import _TARGET_SUM, _TRUTH_BYTES, _annotate, _check_range

__all__ = ["ScreenDials", "screen"]

_BLOCK = 1024
_SECOND = 0.4  # a gene's second loading, as a share of its main one
_STRESS_NAMES = ("HSP", "DNAJ", "ATF", "ERN", "EIF2", "CEBP")
_STRESSED = 0.3
_TYPES = {"A": 0.6, "B": 0.4}


@dataclass(frozen=True)
class ScreenDials:
    """What a screen is like; see the module's text for the model.

    Parameters
    ----------
    pathway
        0 to 1: the share of an effect's squared size that follows the co-variation of
        control cells. At 1 it can be read from them, at 0 it is unrelated to them.
    shared
        0 to 1: size of the direction that all perturbations share, against `strength`.
    strength, strength_spread
        Median size of an effect, as the root mean square log fold of as many genes as
        a pathway has; and the standard deviation of its logarithm between targets.
    share_null
        0 to 1: targets of strength 0, as a share. Only the target itself changes.
    epistasis
        0 to 1: what a double of one pathway lacks of the sum of its two effects.
    knockdown
        0 to 0.99: the share of its expression that a target loses.
    activation
        The targets rise, by 1 / (1 - knockdown), and their effects turn the sign.
    n_targets, n_doubles
        Single conditions, at least one a pathway where they suffice; and pairs of
        targets, in turn of one pathway and of two.
    n_unmeasured
        Targets whose own gene is not among the genes of the matrix.
    n_pathways
        Groups of genes; the first is "stress", with genes named HSP..., DNAJ...
    covariation
        Root mean square log fold of a pathway's genes at an activity of one standard
        deviation; 0: nothing co-varies.
    control_share
        Share of the cells that are controls.
    n_batches, batch_strength, type_strength
        Batches, and the standard deviations of the log folds of each batch and of the
        second of the two cell types, of each gene.
    depth, dispersion
        Mean total of the cells, and the variance of the gamma noise (0: Poisson).
    seed
        The same seed gives the same cells.

    Raises
    ------
    ConfigError
        If a dial is out of range.
    """

    pathway: float = 0.8
    shared: float = 0.3
    strength: float = 1.0
    strength_spread: float = 0.4
    share_null: float = 0.2
    epistasis: float = 0.5
    knockdown: float = 0.8
    activation: bool = False
    n_targets: int = 24
    n_doubles: int = 8
    n_unmeasured: int = 2
    n_pathways: int = 10
    covariation: float = 0.5
    control_share: float = 0.15
    n_batches: int = 2
    batch_strength: float = 0.1
    type_strength: float = 0.3
    depth: float = 2000.0
    dispersion: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for names, low, high in (
            ("pathway shared share_null epistasis", 0, 1),
            ("strength batch_strength type_strength", 0, 5),
            ("strength_spread covariation", 0, 2),
            ("knockdown", 0, 0.99),
            ("control_share", 0.01, 0.9),
            ("dispersion", 0, 100),
            ("depth", 1, 1e6),
            ("n_batches", 1, 1000),
            ("n_pathways", 2, 1000),
            ("n_targets", 2, 500),
            ("n_doubles", 0, self.n_targets * (self.n_targets - 1) // 2),
            ("n_unmeasured", 0, self.n_targets),
        ):
            for name in names.split():
                _check_range(name, getattr(self, name), low, high)


class _Plan:
    """The tables of the truth and, for each cell, its condition, type and batch."""

    def __init__(self, n_cells: int, n_genes: int, dials: ScreenDials) -> None:
        self.n_cells, self.dials = n_cells, dials
        total = n_genes + dials.n_unmeasured
        n_each = 2 * total // 3 // dials.n_pathways  # two thirds of the genes
        n_sets = 1 + dials.n_targets + dials.n_doubles
        most = -(-dials.n_targets // dials.n_pathways)
        # Half a pathway's genes, the more abundant ones, may be targets.
        if n_each < 2 * most or n_cells < 2 * n_sets / (1 - dials.control_share):
            genes = 3 * most * dials.n_pathways - dials.n_unmeasured
            cells = int(np.ceil(2 * n_sets / (1 - dials.control_share)))
            raise ConfigError(
                message(
                    "The screen is too small",
                    found=f"{n_cells} cells x {n_genes} genes",
                    allowed=f"at least {cells} cells, two a condition, and {genes}"
                    " genes: a pathway has twice as many as targets",
                )
            )
        # Every table is drawn whatever the dials say, so that one dial moves one thing.
        rng = np.random.default_rng(dials.seed)
        self.log_abundance = rng.standard_normal(total)
        self._loadings(rng, total, n_each)
        self._targets(rng, n_each)
        self._effects(rng, n_each)
        self._cells(rng)

    def _loadings(self, rng: np.random.Generator, total: int, n_each: int) -> None:
        n_pathways = self.dials.n_pathways
        members = rng.permutation(total)[: n_pathways * n_each].reshape(n_pathways, -1)
        self.members = np.sort(members, axis=1)
        self.main = np.full(total, -1)
        self.main[self.members] = np.arange(n_pathways)[:, None]
        values = rng.uniform(0.5, 1.5, members.shape) / np.sqrt(13 / 12)
        values *= rng.choice([-1.0, 1.0], members.shape)
        values[0] = np.abs(values[0])  # all stress genes rise with stress
        step = rng.integers(1, n_pathways, members.shape)
        turn = rng.choice([-1.0, 1.0], members.shape)
        self.loadings = np.zeros((total, n_pathways))
        own = np.arange(n_pathways)[:, None]
        self.loadings[self.members, own] = values
        self.loadings[self.members, (own + step) % n_pathways] = _SECOND * values * turn
        self.pathways = np.array(
            ["stress", *(f"pathway{i}" for i in range(1, n_pathways))]
        )
        width = len(str(total))
        self.genes = np.array([f"G{i + 1:0{width}d}" for i in range(total)], object)
        self.genes[self.members[0]] = [
            f"{_STRESS_NAMES[i % 6]}X{i // 6 + 1}" for i in range(n_each)
        ]

    def _targets(self, rng: np.random.Generator, n_each: int) -> None:
        dials = self.dials
        rank = np.argsort(-self.log_abundance[self.members], axis=1)
        likely = np.take_along_axis(self.members, rank, 1)[:, : n_each // 2]
        likely = rng.permuted(likely, axis=1)
        # One of each pathway, then a second of each: 2 or 3 a pathway by default.
        self.targets = likely.T.ravel()[: dials.n_targets]
        n_null = round(dials.share_null * dials.n_targets)
        order = rng.permutation(dials.n_targets)
        self.null, working = order[:n_null], order[n_null:]
        self.unmeasured = order[dials.n_targets - dials.n_unmeasured :]
        where = self.main[self.targets]
        pairs = rng.permutation([*combinations(range(dials.n_targets), 2)]).tolist()
        # First those of two working, measured targets; of one pathway and of two.
        good = {*working.tolist()} - {*self.unmeasured.tolist()}
        pairs.sort(key=lambda pair: -len(good & {*pair}))
        one = [pair for pair in pairs if where[pair[0]] == where[pair[1]]]
        two = [pair for pair in pairs if where[pair[0]] != where[pair[1]]]
        n_one = max(
            min(len(one), (dials.n_doubles + 1) // 2), dials.n_doubles - len(two)
        )
        self.doubles = one[:n_one] + two[: dials.n_doubles - n_one]

    def _effects(self, rng: np.random.Generator, n_each: int) -> None:
        dials, targets = self.dials, self.targets
        n, total = len(targets), len(self.genes)
        through = -self.loadings[targets] @ self.loadings.T
        own = rng.permuted(through, axis=1)
        common = rng.standard_normal((1, total))
        at = np.arange(n), targets
        own[at] = through[at] = 0.0
        for rows in (through, own, common):
            rows *= np.sqrt(n_each) / np.linalg.norm(rows, axis=1, keepdims=True)
        self.strength = dials.strength * np.exp(
            dials.strength_spread * rng.standard_normal(n)
        )
        self.strength[self.null] = 0.0
        sign = -1.0 if dials.activation else 1.0
        body = np.sqrt(dials.pathway) * through + np.sqrt(1.0 - dials.pathway) * own
        body = sign * self.strength[:, None] * body
        # A target without an effect has no share in the common one.
        works = (self.strength > 0)[:, None]
        body = body + dials.shared * dials.strength * works * common
        body[at] = 0.0
        change = np.zeros((n, total))
        change[at] = sign * np.log1p(-dials.knockdown)
        effects = {"ctrl": np.zeros(total)}
        groups = [""]
        for members in [*((j,) for j in range(n)), *self.doubles]:
            part = [*members]
            where = sorted({*self.main[targets[part]].tolist()})
            k = 1.0 - dials.epistasis * (len(part) > len(where))
            name = "+".join(sorted(self.genes[targets[part]]))
            effects[name] = k * body[part].sum(0) + change[part].sum(0)
            groups.append("+".join(self.pathways[where]))
        self.conditions, self.groups = [*effects], np.array(groups, object)
        self.effect = np.stack([*effects.values()])

    def _cells(self, rng: np.random.Generator) -> None:
        dials, n = self.dials, self.n_cells
        n_control = max(2, round(dials.control_share * n))
        turn = np.arange(n - n_control) % (len(self.conditions) - 1)
        self.condition = rng.permutation(np.r_[np.zeros(n_control, int), 1 + turn])
        self.kind = rng.choice(len(_TYPES), n, p=[*_TYPES.values()])
        self.batch = rng.integers(dials.n_batches, size=n)
        self.activity = rng.standard_normal((n, dials.n_pathways))
        log_var = np.log1p(0.3**2)
        self.depth = dials.depth * rng.lognormal(-log_var / 2, np.sqrt(log_var), n)
        total = len(self.genes)
        self.type_shift = np.zeros((len(_TYPES), total))
        self.type_shift[1:] = dials.type_strength * rng.standard_normal((1, total))
        self.batch_shift = dials.batch_strength * rng.standard_normal(
            (dials.n_batches, total)
        )
        # Stress of a cell: the mean log fold of the stress genes, for whatever reason.
        genes = self.members[0]
        stress = self.activity @ self.loadings[genes].mean(0) * dials.covariation
        stress += self.effect[:, genes].mean(1)[self.condition]
        self.stressed = stress > np.quantile(stress, 1 - _STRESSED)

    def blocks(self) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Yield true means and counts of the measured genes, `_BLOCK` cells a time."""
        dials, measured = self.dials, self.measured
        for number, start in enumerate(range(0, self.n_cells, _BLOCK)):
            rng = np.random.default_rng([dials.seed, number])
            rows = slice(start, start + _BLOCK)
            log = self.activity[rows] @ self.loadings.T * dials.covariation
            log += self.effect[self.condition[rows]] + self.log_abundance
            log += self.type_shift[self.kind[rows]] + self.batch_shift[self.batch[rows]]
            mu = np.exp(log)
            mu *= self.depth[rows, None] / mu.sum(1, keepdims=True)
            mu = mu[:, measured].astype(np.float32)
            rate = mu
            if dials.dispersion:
                noise = rng.standard_gamma(1.0 / dials.dispersion, mu.shape)
                rate = mu * noise * dials.dispersion
            counts = rng.poisson(rate)
            # A cell that is seen has one molecule at least: of its highest gene.
            empty = np.flatnonzero(~counts.any(axis=1))
            counts[empty, mu[empty].argmax(1)] = 1
            yield mu, sp.csr_matrix(counts, dtype=np.float32)

    @property
    def measured(self) -> np.ndarray:
        """Which genes are in the matrix, bool."""
        return ~np.isin(np.arange(len(self.genes)), self.targets[self.unmeasured])

    def obs(self) -> pd.DataFrame:
        names, n_batches = self.conditions, self.dials.n_batches
        spelled = [n if n == "ctrl" or "+" in n else f"{n}+ctrl" for n in names]
        codes = {
            "perturbation": (self.condition, names),
            "condition": (self.condition, spelled),
            "cell_type": (self.kind, [*_TYPES]),
            "batch": (self.batch, [f"batch{i + 1}" for i in range(n_batches)]),
            "state": (self.stressed.astype(int), ["Homeostasis", "Stressed"]),
        }
        columns: dict[str, Any] = {
            name: pd.Categorical.from_codes(code, pd.Index(categories))
            for name, (code, categories) in codes.items()
        }
        columns["pathway"] = pd.Categorical(self.groups[self.condition])
        width = len(str(self.n_cells))
        index = [f"cell{i + 1:0{width}d}" for i in range(self.n_cells)]
        return pd.DataFrame({**columns, "depth": self.depth}, index=index)


def screen(
    n_cells: int = 4000,
    n_genes: int = 300,
    *,
    name: str = "simulated_screen",
    **dials: Any,
) -> ad.AnnData:
    """Draw a perturbation screen with known effects, pathways and doubles.

    Parameters
    ----------
    n_cells, n_genes
        Size of the matrix. All conditions but the control have as many cells, give or
        take one.
    name
        Name on the data set card.
    **dials
        Fields of `ScreenDials`.

    Returns
    -------
    AnnData
        Cells x genes under the data contract, cells in random order, with
        `obs["perturbation"]` ("ctrl", "A", "A+B"), `obs["condition"]` (the same as
        GEARS spells it), `obs["pathway"]` (of the targets, "" for the control),
        `obs["state"]` ("Stressed": the 30 % of cells with the highest stress),
        `obs["cell_type"]`, `obs["batch"]`, `obs["depth"]`; `var["pathway"]` (main one
        of the gene, or ""); `varm["effect"]` (genes x conditions: log folds against the
        control, before a cell's shares are made to sum to 1), `varm["loadings"]` (genes
        x pathways: log fold at one standard deviation of activity);
        `uns["targets"]` (a row each: pathway, strength, measured);
        `uns["simulation"]`, the dials; and `layers["true_expression"]`, the mean mu
        (left out above 200 MB).

    Raises
    ------
    ConfigError
        If a size or dial is out of range, or there is no such dial.
    """
    known = [f.name for f in fields(ScreenDials)]
    for dial in dials:
        if dial not in known:
            raise unknown("dial", dial, known, error=ConfigError)
    used = ScreenDials(**dials)
    plan = _Plan(n_cells, n_genes, used)
    keep_truth = 4.0 * n_cells * n_genes <= _TRUTH_BYTES
    parts, means = [], []
    for mu, block in plan.blocks():
        parts.append(block)
        if keep_truth:
            means.append(mu)
    counts = sp.vstack(parts, format="csr")
    keep = plan.measured
    genes = plan.genes[keep]
    where = np.array([*plan.pathways, ""])[plan.main]
    adata = ad.AnnData(
        normalise(counts, _TARGET_SUM),
        obs=plan.obs(),
        var=pd.DataFrame({"pathway": where[keep]}, index=genes),
        layers={"counts": counts},
        varm={
            "effect": pd.DataFrame(plan.effect.T[keep], genes, plan.conditions),
            "loadings": pd.DataFrame(
                used.covariation * plan.loadings[keep], genes, plan.pathways
            ),
        },
    )
    if keep_truth:
        adata.layers["true_expression"] = np.vstack(means)
    adata.uns["targets"] = pd.DataFrame(
        {
            "pathway": where[plan.targets],
            "strength": plan.strength,
            "measured": keep[plan.targets],
        },
        index=plan.genes[plan.targets],
    )
    adata.uns["simulation"] = asdict(used)
    return _annotate(
        adata,
        name,
        "Simulated screen with known truth (gamma-Poisson, knock-outs x pathways)",
        asdict(used),
        source="scgenlib.simperturb",
        depth={"mean": float(plan.depth.mean()), "sd": float(plan.depth.std(ddof=1))},
    )
