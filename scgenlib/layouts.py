"""Perturbation data in the layouts of other tools: GEARS in and out, cell-eval out."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.conditions import CONTROL, _bad, canonical, check_conditions, gears_name
from scgenlib.errors import DataError, unknown
from scgenlib.files import atomic

__all__ = ["for_cell_eval", "from_gears", "to_gears"]


def _dose_in_order(condition: str, dose: str) -> str:
    """Return "2+1" for "B+A" at "1+2": doses in the order of the canonical genes."""
    parts, doses = condition.split("+"), dose.split("+")
    order = sorted(zip(parts, doses, strict=False), key=lambda p: (p[0] == CONTROL, p))
    return "+".join(d for _, d in order) if len(parts) == len(doses) else dose


def from_gears(adata: ad.AnnData, key: str = "condition") -> ad.AnnData:
    """Read cells in the layout of GEARS.

    Parameters
    ----------
    adata
        X log-normalised, `obs[key]` ("ctrl", "A+ctrl", "ctrl+A", "A+B") and
        `var["gene_name"]` (symbols). Not changed.
    key
        Column of the conditions.

    Returns
    -------
    AnnData
        A copy with X as CSR float32, `var_names` the symbols, made unique (the former
        index stands in `var["gears_index"]`), and `obs["perturbation"]` canonical in
        place of `key` and "condition_name". All else is kept; doses in "dose_val"
        follow the order of the genes.

    Raises
    ------
    DataError
        If a column is absent, a condition is missing, or there are no controls.
    """
    names = check_conditions(adata, key)
    if "gene_name" not in adata.var:
        raise _bad(
            "These cells are not in the layout of GEARS: their genes have no symbols",
            found=", ".join(map(str, adata.var.columns)) or "no column of var",
            allowed='var["gene_name"]',
            do='If var_names are symbols: adata.var["gene_name"] = adata.var_names',
        )
    out = adata.copy()
    out.X = sp.csr_matrix(adata.X, dtype=np.float32)
    if "dose_val" in out.obs:
        pairs = zip(adata.obs[key], adata.obs["dose_val"].astype(str), strict=True)
        out.obs["dose_val"] = pd.Categorical([_dose_in_order(*pair) for pair in pairs])
    out.obs = out.obs.drop(columns=[key, "condition_name"], errors="ignore")
    out.obs["perturbation"] = pd.Categorical(names)
    symbols = adata.var["gene_name"].astype(object)
    symbols = symbols.where(symbols.notna(), adata.var_names).astype(str)
    out.var["gears_index"] = adata.var_names.to_numpy()
    out.var_names = ad.utils.make_index_unique(pd.Index(symbols.to_numpy()))
    return out


def to_gears(
    adata: ad.AnnData, key: str = "perturbation", cell_type: str | None = None
) -> ad.AnnData:
    """Write cells in the layout of GEARS; `from_gears` gives the same cells back.

    Parameters
    ----------
    adata
        Cells with a column of conditions. Not changed.
    key
        That column; "condition" takes its place.
    cell_type
        The one type of all cells, for cells without `obs["cell_type"]`.

    Returns
    -------
    AnnData
        A copy with "condition", "cell_type", "dose_val" ("1" for each gene and
        "ctrl", unless known), "control" (1 or 0) and "condition_name" in `obs`, and
        `var["gene_name"]`. The tables of marker genes in `uns` are left to GEARS.

    Raises
    ------
    DataError
        As in `check_conditions`, or if no type is known.
    """
    names = check_conditions(adata, key)
    out = adata.copy()
    out.obs = out.obs.drop(columns=key)
    if cell_type is not None:
        out.obs["cell_type"] = pd.Categorical([cell_type] * out.n_obs)
    elif "cell_type" not in out.obs:
        problem, do = "The layout of GEARS needs a cell type", 'Give cell_type="K562".'
        raise _bad(problem, "none", 'obs["cell_type"] or one for all cells', do)
    spelled = names.map({name: gears_name(name) for name in names.unique()})
    dose = spelled.str.replace(r"[^+]+", "1", regex=True)
    if "dose_val" in out.obs:
        known = out.obs["dose_val"].astype(str)
        dose = known.where(known.str.count(r"\+") == spelled.str.count(r"\+"), dose)
    whole = out.obs["cell_type"].astype(str) + "_" + spelled + "_" + dose
    columns = {"condition": spelled, "dose_val": dose, "condition_name": whole}
    for column, values in columns.items():
        out.obs[column] = pd.Categorical(values)
    out.obs["control"] = (names == CONTROL).astype(int)
    if "gene_name" not in out.var:
        out.var["gene_name"] = out.var_names.to_numpy()
    if "gears_index" in out.var:
        out.var_names = pd.Index(out.var.pop("gears_index").astype(str).to_numpy())
    return out


def for_cell_eval(
    predicted: ad.AnnData,
    control: ad.AnnData,
    path: str | Path | None = None,
    *,
    key: str = "perturbation",
) -> ad.AnnData:
    """Lay cells out as the tool cell-eval reads them; for predicted and for real cells.

    Parameters
    ----------
    predicted
        Cells with conditions in `obs[key]`, log1p. Controls among them are left out.
    control
        The control cells that go into the file. With two files, give each its own
        half (`split_controls`).
    path
        Where to write an `.h5ad`; None: nowhere.
    key
        Column of the conditions.

    Returns
    -------
    AnnData
        Both sets of cells on the genes of `predicted`, X log1p as CSR float32 with
        negative values set to 0, and `obs["target_gene"]`: the condition, or
        "non-targeting".

    Raises
    ------
    DataError
        If genes of `predicted` are absent in `control`, or there is nothing to write.
    """
    if key not in predicted.obs:
        raise unknown("column", key, predicted.obs.columns, error=DataError)
    names = canonical(predicted.obs[key])
    kept = predicted[(names != CONTROL).to_numpy()]
    lost = predicted.var_names.difference(control.var_names)
    if len(lost) or not kept.n_obs or not control.n_obs:
        sizes = f"{kept.n_obs} perturbed cells, {control.n_obs} controls"
        found = f"{sizes}, {len(lost)} genes that the controls lack"
        raise _bad("Nothing to compare", found, "both kinds, on the same genes")
    parts = (kept.X, control[:, predicted.var_names].X)
    X = sp.vstack([sp.csr_matrix(part, dtype=np.float32) for part in parts], "csr")
    X.data = np.maximum(X.data, 0)
    X.eliminate_zeros()
    cells = pd.Index([*kept.obs_names, *control.obs_names])
    obs = pd.DataFrame(index=ad.utils.make_index_unique(cells))
    target = [*names[names != CONTROL], *["non-targeting"] * control.n_obs]
    obs["target_gene"] = pd.Categorical(target)
    out = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=predicted.var_names))
    if path is not None:
        with atomic(Path(path), "The cells cannot be written") as part:
            out.write_h5ad(part, compression="gzip")
    return out
