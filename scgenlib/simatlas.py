"""An atlas whose truth is known: batches x types, with a hierarchy among the types.

The model of one cell c of type k, lineage l, batch b, and gene g:

    profile  q[k, g] = abundance[g] * exp(sqrt(h) * u[l, g] + sqrt(1 - h) * v[k, g])
    shift    s[b, k, g] = sd * (sqrt(1 - t) * e[b, g] + sqrt(t) * f[b, k, g])
    mean     mu[c, g] = depth[c] * q[k, g] * exp(s[b, k, g]) / sum_g (the same)
    counts   y[c, g] ~ Poisson(mu[c, g] * Gamma(mean 1, variance dispersion))
    zeros    y[c, g] becomes 0 with probability p[g]

with h the hierarchy, sd the strength of the batches and t its type-specific share. `u`
and `v` are not zero in the markers of a lineage and of a type; `e` and `f` are normal
with variance 1. Each block of cells has a random stream of its own, so that an atlas
larger than memory is the same as one in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.errors import ConfigError, message, unknown
from scgenlib.preprocess import normalise
from scgenlib.simulate import _TARGET_SUM, _TRUTH_BYTES, _annotate, _check_range

__all__ = ["AtlasDials", "atlas", "atlas_blocks"]

_BLOCK = 1024
# Markers of each type and each lineage, as a share of all genes, and their log folds.
_MARKERS = 0.03
_FOLDS = (np.log(6.0), np.log(40.0))
_LINEAGES = {
    "A": {"A1": 20.0, "A2": 14.0, "A3": 8.0},
    "B": {"B1": 18.0, "B2": 12.0, "B3": 6.0},
    "C": {"C1": 14.0, "C2": 8.0},
}


@dataclass(frozen=True)
class AtlasDials:
    """What an atlas is like; see the module's text for the model.

    Parameters
    ----------
    n_batches, n_query_batches
        Batches of the reference, "batch1" and on, and of the query, "query1" and on.
        All have the same number of cells.
    lineages
        Lineage -> type -> relative size.
    batch_strength
        Standard deviation of a batch's log fold shift of each gene; 0: no batch effect.
    type_specific
        0 to 1: the share of the shift's variance that differs between types. At 0 the
        batch is independent of the type.
    hierarchy
        0 to 1: the share of a type's log folds that its lineage gives. At 1 the types
        of a lineage are alike, at 0 a lineage means nothing.
    composition
        0 to 1: how much the shares of the types differ between batches. A share is
        multiplied by a log-normal factor whose sd on the log scale is twice this.
    novel
        A type that only the query batches have; None: there is none.
    depth
        Mean total of the cells: one number, or one for each batch, query last. Cells
        vary around it with a coefficient of variation of 0.4 (log-normal).
    dispersion
        Variance of the gamma noise, 0 or more; 0: Poisson counts.
    zero_inflation
        0 to 0.95: the mean, over genes, of the probability of an extra zero.
    seed
        The same seed gives the same cells.

    Raises
    ------
    ConfigError
        If a dial is out of range.
    """

    n_batches: int = 4
    n_query_batches: int = 0
    lineages: Mapping[str, Mapping[str, float]] = field(
        default_factory=lambda: _LINEAGES
    )
    batch_strength: float = 0.5
    type_specific: float = 0.0
    hierarchy: float = 0.4
    composition: float = 0.2
    novel: str | None = None
    depth: float | Sequence[float] = 1000.0
    dispersion: float = 0.25
    zero_inflation: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, high in (
            ("type_specific", 1.0),
            ("hierarchy", 1.0),
            ("composition", 1.0),
            ("zero_inflation", 0.95),
            ("batch_strength", 5.0),
            ("dispersion", 100.0),
            ("n_batches", 1000),
            ("n_query_batches", 1000),
        ):
            low = 1 if name == "n_batches" else 0
            _check_range(name, getattr(self, name), low, high)
        types = self.types
        sizes = [size for kinds in self.lineages.values() for size in kinds.values()]
        if len(types) < 2 or len(set(types)) < len(types) or min(sizes) <= 0:
            raise ConfigError(
                message(
                    "The lineages do not make an atlas",
                    found={name: dict(kinds) for name, kinds in self.lineages.items()},
                    allowed="two types or more, each once, with sizes above 0",
                )
            )
        if self.novel is not None and self.novel not in types:
            raise unknown("novel type", self.novel, types, error=ConfigError)
        if self.novel is not None and not self.n_query_batches:
            raise ConfigError(
                message(
                    "A novel type needs a query",
                    found="n_query_batches 0",
                    allowed="1 or more",
                )
            )
        depth = np.atleast_1d(self.depth)
        if depth.size not in (1, len(self.batches)) or depth.min() <= 0:
            raise ConfigError(
                message(
                    "depth does not fit the batches",
                    found=self.depth,
                    allowed=f"one number above 0, or {len(self.batches)} of them",
                )
            )

    @property
    def types(self) -> list[str]:
        """Types, in the order of the lineages."""
        return [kind for kinds in self.lineages.values() for kind in kinds]

    @property
    def batches(self) -> list[str]:
        """Batches, the reference first."""
        reference = [f"batch{i + 1}" for i in range(self.n_batches)]
        return reference + [f"query{i + 1}" for i in range(self.n_query_batches)]


class _Plan:
    """The tables of the truth and, for each cell, type, batch and depth."""

    def __init__(self, n_cells: int, n_genes: int, dials: AtlasDials) -> None:
        self.n_cells, self.n_genes, self.dials = n_cells, n_genes, dials
        types, batches = dials.types, dials.batches
        n_types, n_batches = len(types), len(batches)
        parent = np.repeat(
            np.arange(len(dials.lineages)), [len(k) for k in dials.lineages.values()]
        )
        n_groups = len(dials.lineages) + n_types
        if n_genes < n_groups or n_cells < n_batches:
            raise ConfigError(
                message(
                    "The atlas is too small",
                    found=f"{n_cells} cells x {n_genes} genes",
                    allowed=f"at least {n_batches} cells and {n_groups} genes:"
                    " one a batch, one a lineage and one a type",
                )
            )
        rng = np.random.default_rng(dials.seed)
        abundance = rng.lognormal(0.0, 1.2, n_genes)
        n_each = max(1, min(int(_MARKERS * n_genes), n_genes // n_groups))
        markers = rng.permutation(n_genes)[: n_groups * n_each].reshape(n_groups, -1)
        strength = rng.uniform(_FOLDS[0], _FOLDS[1], markers.shape)
        folds = np.zeros((n_groups, n_genes))
        np.put_along_axis(folds, markers, strength, 1)
        names = np.array([*dials.lineages, *types], dtype=object)
        self.lineage_marker_of, self.marker_of = (
            self._owners(names[part], markers[part])
            for part in (slice(n_groups - n_types), slice(n_groups - n_types, None))
        )
        log_profile = np.log(abundance) + np.sqrt(dials.hierarchy) * folds[parent]
        log_profile += np.sqrt(1.0 - dials.hierarchy) * folds[-n_types:]
        profile = np.exp(log_profile)
        self.profile = profile / profile.sum(1, keepdims=True)
        shared = rng.standard_normal((n_batches, 1, n_genes))
        own = rng.standard_normal((n_batches, n_types, n_genes))
        self.shift = dials.batch_strength * (
            np.sqrt(1.0 - dials.type_specific) * shared
            + np.sqrt(dials.type_specific) * own
        )
        weight = self.profile * np.exp(self.shift)
        weight /= weight.sum(2, keepdims=True)
        self.weight = weight.reshape(-1, n_genes).astype(np.float32)
        z = dials.zero_inflation
        self.p_zero = rng.beta(5 * z, 5 * (1 - z), n_genes) if z else np.zeros(n_genes)

        sizes = self._sizes(rng)
        pairs = np.repeat(np.arange(sizes.size), sizes.ravel())
        self.pair = rng.permutation(pairs)
        self.batch, self.kind = np.divmod(self.pair, n_types)
        self.lineage = parent[self.kind]
        mean = np.broadcast_to(np.asarray(dials.depth, float), (n_batches,))
        log_var = np.log1p(0.4**2)
        self.depth = mean[self.batch] * rng.lognormal(
            -log_var / 2, np.sqrt(log_var), n_cells
        )

    def _owners(self, names: np.ndarray, markers: np.ndarray) -> np.ndarray:
        """Return, for each gene, whose marker it is, or ""."""
        owner = np.full(self.n_genes, "", dtype=object)
        owner[markers] = names[:, None]
        return owner

    def _sizes(self, rng: np.random.Generator) -> np.ndarray:
        """Return the number of cells of each batch and type."""
        dials, n_batches = self.dials, len(self.dials.batches)
        base = [s for kinds in dials.lineages.values() for s in kinds.values()]
        tilt = rng.standard_normal((n_batches, len(base)))
        share = np.array(base) * np.exp(2.0 * dials.composition * tilt)
        if dials.novel is not None:
            share[: dials.n_batches, dials.types.index(dials.novel)] = 0.0
        cells = np.full((n_batches, 1), self.n_cells // n_batches)
        cells[: self.n_cells % n_batches] += 1
        exact = cells * share / share.sum(1, keepdims=True)
        sizes = np.floor(exact).astype(int)
        # Largest remainders first, so that each batch has its number of cells.
        rank = np.argsort(np.argsort(sizes - exact, axis=1), axis=1)
        sizes += rank < cells - sizes.sum(1, keepdims=True)
        lost = [t for t, n in zip(dials.types, sizes.sum(0), strict=True) if n == 0]
        if lost:
            raise ConfigError(
                message(
                    "Some types have no cell",
                    found=", ".join(lost),
                    allowed="one cell or more of each type",
                    do="Draw more cells, or turn composition down.",
                )
            )
        return sizes

    def obs(self, rows: slice) -> pd.DataFrame:
        """Return the annotation of some cells; every block has all categories."""
        dials = self.dials
        is_query = (self.batch[rows] >= dials.n_batches).astype(int)
        codes = {
            "cell_type": (self.kind[rows], dials.types),
            "lineage": (self.lineage[rows], [*dials.lineages]),
            "batch": (self.batch[rows], dials.batches),
            "set": (
                is_query,
                ["reference", "query"][: 1 + bool(dials.n_query_batches)],
            ),
        }
        columns: dict[str, Any] = {
            name: pd.Categorical.from_codes(code, pd.Index(categories))
            for name, (code, categories) in codes.items()
        }
        width = len(str(self.n_cells))
        index = [f"cell{i + 1:0{width}d}" for i in range(*rows.indices(self.n_cells))]
        return pd.DataFrame({**columns, "depth": self.depth[rows]}, index=index)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, sp.csr_matrix]]:
        """Yield rows, true means and counts, `_BLOCK` cells at a time."""
        dispersion = self.dials.dispersion
        for number, start in enumerate(range(0, self.n_cells, _BLOCK)):
            rng = np.random.default_rng([self.dials.seed, number])
            rows = slice(start, min(start + _BLOCK, self.n_cells))
            mu = self.weight[self.pair[rows]]
            mu *= self.depth[rows, None].astype(np.float32)
            rate = mu
            if dispersion:
                rate = rng.standard_gamma(1.0 / dispersion, mu.shape, dtype=np.float32)
                rate *= mu
                rate *= dispersion
            counts = rng.poisson(rate)
            if self.dials.zero_inflation:
                row, gene = counts.nonzero()
                lost = rng.random(len(row)) < self.p_zero[gene]
                counts[row[lost], gene[lost]] = 0
            # A cell that is seen has one molecule at least.
            empty = np.flatnonzero(~counts.any(axis=1))
            if len(empty):
                level = mu[empty].cumsum(1)
                at = rng.random((len(empty), 1)) * level[:, -1:]
                counts[empty, (level > at).argmax(1)] = 1
            yield rows, mu, sp.csr_matrix(counts, dtype=np.float32)


def _plan(n_cells: int, n_genes: int, dials: Mapping[str, Any]) -> _Plan:
    known = [f.name for f in fields(AtlasDials)]
    for name in dials:
        if name not in known:
            raise unknown("dial", name, known, error=ConfigError)
    return _Plan(n_cells, n_genes, AtlasDials(**dials))


def atlas_blocks(
    n_cells: int, n_genes: int, **dials: Any
) -> Iterator[tuple[sp.csr_matrix, pd.DataFrame]]:
    """Draw the cells of `atlas` piece by piece, for an atlas larger than memory.

    Parameters
    ----------
    n_cells, n_genes
        Size of the whole atlas.
    **dials
        Fields of `AtlasDials`.

    Yields
    ------
    scipy.sparse.csr_matrix, pandas.DataFrame
        Counts (float32) and annotation of the next 1,024 cells, those of `atlas` under
        the same dials; the annotation's categories are those of the whole.
    """
    plan = _plan(n_cells, n_genes, dials)
    for rows, _, counts in plan.blocks():
        yield counts, plan.obs(rows)


def atlas(
    n_cells: int = 3000,
    n_genes: int = 600,
    *,
    name: str = "simulated_atlas",
    **dials: Any,
) -> ad.AnnData:
    """Draw an atlas with known truth: batches, types, and lineages of types.

    Parameters
    ----------
    n_cells, n_genes
        Size of the matrix.
    name
        Name on the data set card.
    **dials
        Fields of `AtlasDials`.

    Returns
    -------
    AnnData
        Cells x genes under the data contract, cells in random order, with
        `obs["cell_type"]` (fine) and `obs["lineage"]` (coarse), `obs["batch"]`,
        `obs["set"]` ("reference" or "query"), `obs["depth"]`; `var["marker_of"]` and
        `var["lineage_marker_of"]` (a name or ""), `var["zero_probability"]`;
        `varm["profile"]` (genes x types: shares without any batch effect),
        `varm["batch_shift"]` (genes x "batch|type": log folds); and
        `layers["true_expression"]`, the mean mu (left out above 200 MB).

    Raises
    ------
    ConfigError
        If a size or dial is out of range, or there is no such dial.
    """
    plan = _plan(n_cells, n_genes, dials)
    keep_truth = 4.0 * n_cells * n_genes <= _TRUTH_BYTES
    parts, means = [], []
    for _, mu, block in plan.blocks():
        parts.append(block)
        if keep_truth:
            means.append(mu)
    counts = sp.vstack(parts, format="csr")
    used = plan.dials
    width = len(str(n_genes))
    genes = [f"gene{i + 1:0{width}d}" for i in range(n_genes)]
    pairs = [f"{batch}|{kind}" for batch in used.batches for kind in used.types]
    adata = ad.AnnData(
        normalise(counts, _TARGET_SUM),
        obs=plan.obs(slice(None)),
        var=pd.DataFrame(
            {
                "marker_of": plan.marker_of,
                "lineage_marker_of": plan.lineage_marker_of,
                "zero_probability": plan.p_zero,
            },
            index=genes,
        ),
        layers={"counts": counts},
        varm={
            "profile": pd.DataFrame(plan.profile.T, genes, used.types),
            "batch_shift": pd.DataFrame(
                plan.shift.reshape(-1, n_genes).T, genes, pairs
            ),
        },
    )
    if keep_truth:
        adata.layers["true_expression"] = np.vstack(means)
    truth = asdict(used)
    return _annotate(
        adata,
        name,
        "Simulated atlas with known truth (gamma-Poisson, batches x types)",
        truth,
        source="scgenlib.simatlas",
        depth={"mean": float(plan.depth.mean()), "sd": float(plan.depth.std(ddof=1))},
    )
