"""What REGINA reads: pairs of a perturbed cell and a control, and doses of targets.

No cell is measured before and after. A minibatch of training therefore holds perturbed
cells and, for each, a control cell that was drawn at random.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor

from scgenlib.conditions import CONTROL, canonical, genes_of
from scgenlib.errors import DataError, message, unknown
from scgenlib.latentcycle import Batch
from scgenlib.training import even_part

__all__ = [
    "Pairs",
    "Perturbation",
    "annotate",
    "check_batches",
    "codes_of",
    "correlated_order",
    "dose_tables",
    "doses_of",
    "name_of",
    "row_of",
    "targets_of",
    "warn_missing",
]

#: A condition by name, or gene -> dose.
Perturbation = str | Mapping[str, float]

#: Cells that the checks between epochs look at.
_WATCHED = 512


# ------------------------------------------------------------------------ doses


def doses_of(perturbation: Any, control: str | None = None) -> dict[str, float]:
    """Return gene -> dose of "A+B", of "A+A" (a dose of 2) or of a mapping.

    Raises
    ------
    DataError
        Nothing is perturbed, or a dose is no number.
    """
    if isinstance(perturbation, Mapping):
        try:
            doses = {str(gene): float(dose) for gene, dose in perturbation.items()}
            bad = not all(math.isfinite(dose) for dose in doses.values())
        except (TypeError, ValueError):
            bad = True
        if bad:
            raise DataError(message("A dose must be a number", found=perturbation))
    else:
        doses = {}
        for gene in genes_of(perturbation, control):
            doses[gene] = doses.get(gene, 0.0) + 1.0
    if not any(doses.values()):
        raise DataError(
            message(
                "There is no perturbation here",
                found=perturbation,
                allowed="a gene, genes joined by '+', or gene -> dose other than 0",
            )
        )
    return doses


def targets_of(perturbation: Any, control: str | None = None) -> list[str]:
    """Return the genes whose dose is not 0."""
    doses = doses_of(perturbation, control)
    return [gene for gene, dose in doses.items() if dose]


def name_of(doses: Mapping[str, float]) -> str:
    """Return the canonical name; a dose that is not whole stands in brackets."""
    parts = []
    for gene, dose in sorted(doses.items()):
        whole = dose == int(dose) and 0 <= dose <= 9
        parts += [gene] * int(dose) if whole else [f"{gene}({dose:g})"]
    return "+".join(parts)


def dose_tables(
    wanted: Sequence[Perturbation],
    genes: Sequence[str],
    missing: Sequence[str],
    targets: Sequence[str],
    *,
    control: str | None = None,
    unmeasured: str = "error",
    untaught: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return the doses of conditions, one row each.

    Parameters
    ----------
    wanted
        Conditions.
    genes, missing, targets
        Measured genes; targets of the training that are not among them; all targets
        of the training.
    unmeasured
        What to do with a target that is none of these: "error" or "mean".
    untaught
        Targets that have no learned prompt yet.

    Returns
    -------
    dict of torch.Tensor
        "doses" (conditions x genes), "learned" (x missing), "condition" (x targets),
        "mean" (x 1, doses of targets that are neither measured nor known).

    Raises
    ------
    DataError
        A target has no prompt.
    """
    if unmeasured not in ("error", "mean"):
        raise unknown("unmeasured", unmeasured, ["error", "mean"])
    index = {
        "doses": {gene: i for i, gene in enumerate(genes)},
        "learned": {gene: i for i, gene in enumerate(missing) if gene not in untaught},
        "condition": {gene: i for i, gene in enumerate(targets)},
    }
    widths = (len(genes), len(missing), len(targets))
    keys = zip(index, widths, strict=True)
    out = {key: torch.zeros(len(wanted), width) for key, width in keys}
    out["mean"] = torch.zeros(len(wanted), 1)
    for i, name in enumerate(wanted):
        for gene, dose in doses_of(name, control).items():
            for key, at in index.items():
                if gene in at:
                    out[key][i, at[gene]] += dose
            if gene in index["doses"] or gene in index["learned"]:
                continue
            if unmeasured == "error":
                raise unknown(
                    "target gene",
                    gene,
                    [*missing, *genes],
                    do="A target that the model neither measures nor was trained on has"
                    " no prompt: name it in keep_genes when fitting, if the data have"
                    " it, or ask for the mean prompt with unmeasured='mean'.",
                    error=DataError,
                )
            out["mean"][i] += dose
    return out


def row_of(tables: Mapping[str, Tensor], i: int) -> dict[str, Tensor]:
    """Return the `dose_tables` of one condition."""
    return {name: table[i : i + 1] for name, table in tables.items()}


def check_batches(adata: AnnData, key: str | None) -> None:
    """Raise DataError for a column of batches that is not there or not filled."""
    if key is None:
        return
    if key not in adata.obs:
        raise unknown("batch column", key, adata.obs.columns, error=DataError)
    if adata.obs[key].isna().any():
        found = f"{int(adata.obs[key].isna().sum())} cells"
        do = "Drop these cells, or fit with batch_key=None."
        what = f"Some cells have no batch in {key!r}"
        raise DataError(message(what, found=found, do=do))


def codes_of(values: Iterable[str], kinds: Sequence[str]) -> Tensor:
    """Return the place of each value among `kinds`, -1 where it is none of them."""
    return torch.from_numpy(pd.Index(kinds).get_indexer(pd.Index(values)))


def warn_missing(
    missing: Sequence[str], targets: Sequence[str], genes: pd.Index, refuse: bool
) -> None:
    """Warn of unmeasured targets, or refuse them; refuse another spelling."""
    if not missing:
        return
    spelled = {str(gene).lower(): str(gene) for gene in genes}
    for gene in missing:
        if gene.lower() in spelled:
            raise DataError(
                message(
                    "A target is spelled otherwise than its gene",
                    found=gene,
                    allowed=spelled[gene.lower()],
                    do="Rename the conditions or var_names so that they agree.",
                )
            )
    if refuse:
        what = "Some targets are not among the genes"
        do = "Drop their cells, or set unmeasured='learned'."
        raise DataError(message(what, found=", ".join(missing), do=do))
    shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    text = (
        f"{len(missing)} of {len(targets)} targets are not among the genes ({shown}):"
        " they get learned prompts, which nothing unseen can share."
    )
    if len(missing) == len(targets) and len(targets) > 1:
        text += " Are var_names symbols, as the conditions are?"
    warnings.warn(text, UserWarning, stacklevel=7)


# ------------------------------------------------------------------------ pairs


def correlated_order(X: sparse.csr_matrix, rng: np.random.Generator) -> Tensor:
    """Return the genes so ordered that correlated ones stand side by side.

    By average linkage over at most 2,000 cells, for at most about 11,000 genes.
    """
    from scipy.cluster import hierarchy
    from scipy.spatial.distance import squareform

    if 8 * X.shape[1] ** 2 > 1e9:
        raise DataError(
            message(
                "Too many genes to correlate each with each",
                found=X.shape[1],
                allowed="about 11,000",
                do="Set n_genes, or grouping='order'.",
            )
        )
    values = X[np.sort(rng.permutation(X.shape[0])[:2000])].toarray()
    values -= values.mean(0)
    values /= np.maximum(np.linalg.norm(values, axis=0), 1e-8)
    far = np.clip(1.0 - values.T @ values, 0.0, 2.0)
    np.fill_diagonal(far, 0.0)
    if len(far) < 3:
        return torch.arange(len(far))
    tree = hierarchy.linkage(squareform(far, checks=False), "average")
    return torch.from_numpy(hierarchy.leaves_list(tree).astype(np.int64))


@dataclass
class Pairs:
    """Training cells, which of them are held out, and pairs by step.

    X: (n_cells, n_genes). code: condition of each cell, 0 for controls. state: code of
    its state. batch: code of its batch, or None. tables: see `dose_tables`, the first
    row that of controls. batch_names: of the batches.
    """

    X: sparse.csr_matrix
    code: Tensor
    state: Tensor
    batch: Tensor | None
    tables: dict[str, Tensor]
    batch_names: Sequence[str]
    size: int

    def hold_out(self, share: float, rng: np.random.Generator) -> None:
        """Hold out cells to watch; find the controls, by batch if there are any."""
        code = self.code.numpy()
        n = len(code)
        held = np.zeros(n, dtype=bool)
        held[rng.permutation(n)[: int(share * n)]] = True
        batch = np.zeros(n, int) if self.batch is None else self.batch.numpy()
        numbers = range(int(batch.max()) + 1)
        controls = (code == 0) & ~held
        for b in numbers:
            if not (controls & (batch == b)).any():
                # Few controls: all of them teach.
                controls |= (code == 0) & (batch == b)
        # Every condition keeps a cell that teaches.
        held[np.unique(code, return_index=True)[1]] = False
        if ((code > 0) & ~held).sum() < 2:
            held[code > 0] = False
        held &= ~controls
        self.valid = np.sort(rng.permutation(np.flatnonzero(held))[:_WATCHED])
        self.perturbed = torch.from_numpy(np.flatnonzero((code > 0) & ~held))
        self.controls = []
        for b in numbers:
            own = np.flatnonzero(controls & (batch == b))
            if not len(own) and ((code > 0) & (batch == b)).any():
                raise DataError(
                    message(
                        "A batch has perturbed cells and no control",
                        found=self.batch_names[b],
                        allowed="one control cell or more in each batch",
                        do="Drop the batch, or fit with batch_key=None.",
                    )
                )
            self.controls.append(torch.from_numpy(own))

    @property
    def n_batches(self) -> int:
        """Minibatches of an epoch; none has one cell: the classifier normalises."""
        n = len(self.perturbed)
        return max(1, min(math.ceil(n / self.size), n // 2))

    def some_controls(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Return rows of at most `n` and 512 controls, of all batches."""
        rows = np.concatenate([own.numpy() for own in self.controls])
        return np.sort(rng.permutation(rows)[: min(n, _WATCHED)])

    def without(self, codes: np.ndarray) -> Pairs:
        """Return the same cells, of which those of some conditions do not teach."""
        part, out = copy.copy(self), np.isin(self.code[self.perturbed].numpy(), codes)
        part.perturbed = self.perturbed[torch.from_numpy(~out)]
        return part

    def levels(self, codes: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the mean of the controls, and those of conditions, one row each."""
        every = self.code.numpy()
        own = [self.X[np.flatnonzero(every == i)].mean(0) for i in (0, *codes)]
        means = torch.from_numpy(np.concatenate(own)).float()
        return means[0], means[1:]

    def draw(
        self,
        step: int,
        order: Tensor,
        rng: torch.Generator,
        dense: Callable[[Any, np.ndarray], Tensor],
        arrange: Callable[[Tensor], Tensor],
    ) -> Batch:
        """Return perturbed cells, each once an epoch, and a random control for each.

        Parameters
        ----------
        step
            Number of the step.
        order
            A permutation of the perturbed cells, the same through an epoch.
        rng
            Source of the draw; the batch is made on its device.
        dense, arrange
            Make rows dense with their genes in the order of the tokens; and bring the
            genes of a table into that order.
        """
        part = even_part(len(self.perturbed), self.n_batches, step % self.n_batches)
        rows = self.perturbed[order[part]]
        lot = torch.rand(len(rows), generator=rng, device=rng.device).cpu()
        batch = torch.zeros_like(rows) if self.batch is None else self.batch[rows]
        mates = torch.empty_like(rows)
        for b, own in enumerate(self.controls):
            here = batch == b
            mates[here] = own[(lot[here] * len(own)).long().clamp_max(len(own) - 1)]
        code = self.code[rows]
        told = None if self.batch is None else batch.to(rng.device)
        tables = {k: self.tables[k][code].to(rng.device) for k in self.tables}
        return Batch(
            dense(self.X, mates.numpy()),
            dense(self.X, rows.numpy()),
            self.state[mates].to(rng.device),
            self.state[rows].to(rng.device),
            arrange(tables["doses"]),
            tables["learned"],
            tables["condition"],
            told,
            told,
        )


# ------------------------------------------------------------------ predictions


def annotate(
    obs: pd.DataFrame,
    wanted: Sequence[Perturbation],
    tables: Mapping[str, Tensor],
    key: str,
    control: str | None = None,
) -> list[pd.DataFrame]:
    """Return the annotation of predicted cells, a table for each condition.

    Parameters
    ----------
    obs
        Annotation of the cells that predictions start from; a cell may stand twice.
    wanted, tables
        Conditions and their `dose_tables`.
    key
        Column of the conditions; its old values go to "source_<key>".

    Raises
    ------
    DataError
        A condition is asked for twice.
    """
    source = pd.Series(obs.index.astype(str), obs.index)
    again = source.groupby(source.to_numpy()).cumcount().to_numpy()
    marks = np.where(again == 0, "", "-" + again.astype(str).astype(object))
    kinds = [("doses", "gene"), ("learned", "learned"), ("mean", "mean")]
    before = obs[key].astype(str) if key in obs else None
    if before is not None:
        if set(canonical(before.tolist(), control)) != {CONTROL}:
            text = (
                "Not all cells to start from are controls: each is moved from where it"
                f" is, and its own condition stands in obs['source_{key}']."
            )
            warnings.warn(text, UserWarning, stacklevel=4)
    frames: list[pd.DataFrame] = []
    used: set[str] = set()
    for i, one in enumerate(wanted):
        doses = doses_of(one, control)
        name = name_of(doses)
        if name in used:
            raise DataError(message("A perturbation is asked for twice", found=name))
        used.add(name)
        out = obs.copy()
        if before is not None:
            out[f"source_{key}"] = before
        how = [word for kind, word in kinds if bool(tables[kind][i].any())]
        out["source"] = source
        out["perturbation"] = out[key] = name
        out["condition"] = "+".join([name] + [CONTROL] * ("+" not in name))
        out["dose_val"] = "+".join(f"{doses[gene]:g}" for gene in sorted(doses))
        out["prompt"] = "+".join(how)
        text = (source + "|" + name).to_numpy() + marks
        out.index = pd.Index(text, name=obs.index.name)
        frames.append(out)
    return frames
