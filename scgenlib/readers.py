"""One small function per file layout: files in, AnnData of the values as stored out.

A manifest names its reader and gives the options. Every reader returns cells x genes
with a sparse X, unique cell names, and the file's annotation in `obs`. It neither
normalises nor drops anything: `datasets` does that, from the manifest.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from scgenlib.errors import DataError, message
from scgenlib.preprocess import value_scale

__all__ = ["READERS", "unique_names"]

Options = dict[str, Any]


def unique_names(names: Sequence[str]) -> list[str]:
    """Append -1, -2, ... to the second and later copies of a name."""
    seen: dict[str, int] = {}
    taken = set(names)
    out = []
    for name in names:
        new = name
        while name in seen and new in taken:
            new = f"{name}-{seen[name]}"
            seen[name] += 1
        seen.setdefault(name, 1)
        taken.add(new)
        out.append(new)
    return out


def _anndata(X: Any, obs: pd.DataFrame, genes: Sequence[str]) -> ad.AnnData:
    X = sp.csr_matrix(X, dtype=np.float32)
    X.eliminate_zeros()
    obs.index = obs.index.astype(str)
    obs.index.name = None
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=[str(g) for g in genes]))


# --- R files: the parsed tree is walked, no R object is built --------------------


def _r_follow(obj: Any) -> Any:
    return obj.referenced_object if obj.info.type.name == "REF" else obj


def _r_pairs(obj: Any) -> dict[str, Any]:
    """Return the entries of a pairlist: named objects, or attributes."""
    out: dict[str, Any] = {}
    while obj is not None and obj.info.type.name == "LIST":
        if obj.tag is not None:
            out[_r_follow(obj.tag).value.value.decode()] = _r_follow(obj.value[0])
        obj = obj.value[1]
    return out


def _r_attributes(obj: Any) -> dict[str, Any]:
    return _r_pairs(obj.attributes)


def _r_strings(obj: Any) -> list[str]:
    return [
        value.value.decode("utf-8", "replace") if value.value is not None else ""
        for value in obj.value
    ]


def _r_list(obj: Any) -> dict[str, Any]:
    """Return the named elements of a list or data frame."""
    names = _r_strings(_r_attributes(obj)["names"])
    return dict(zip(names, obj.value, strict=True))


def _r_vector(obj: Any) -> np.ndarray:
    """Return an atomic vector; a factor as its level names."""
    if obj.info.type.name == "STR":
        return np.array(_r_strings(obj), dtype=object)
    attributes = _r_attributes(obj)
    if "levels" in attributes:
        levels = np.array(_r_strings(attributes["levels"]), dtype=object)
        return levels[np.asarray(obj.value) - 1]
    return np.asarray(obj.value)


def _r_frame(obj: Any) -> pd.DataFrame:
    """Return a data frame (or a list of equally long vectors)."""
    columns = {k: _r_vector(v) for k, v in _r_list(obj).items()}
    frame = pd.DataFrame(columns)
    rows = _r_attributes(obj).get("row.names")
    if rows is not None and rows.info.type.name == "STR":
        frame.index = pd.Index(_r_strings(rows))
    return frame


def _r_environment(obj: Any) -> dict[str, Any]:
    """Return the variables of an environment."""
    value = obj.value
    out = _r_pairs(value.frame)
    if value.hash_table is not None:
        for bucket in value.hash_table.value:
            out |= _r_pairs(bucket)
    return out


def _r_names(obj: Any) -> list[list[str]]:
    """Return row and column names from a `dimnames` list."""
    return [_r_strings(part) if part.value else [] for part in obj.value]


def _r_sparse(obj: Any) -> tuple[sp.csc_matrix, list[str], list[str]]:
    """Return a dgCMatrix or dgTMatrix, with the names of its rows and columns."""
    matrix = _r_attributes(obj)
    shape = tuple(int(n) for n in matrix["Dim"].value)
    x, rows = matrix["x"].value, matrix["i"].value
    if "j" in matrix:
        values = sp.coo_matrix((x, (rows, matrix["j"].value)), shape).tocsc()
    else:
        values = sp.csc_matrix((x, rows, matrix["p"].value), shape)
    return (values, *_r_names(matrix["Dimnames"]))


def _r_objects(path: Path) -> dict[str, Any]:
    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _r_pairs(rdata.parser.parse_file(path).object)


def rda_summarized_experiment(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a Bioconductor SummarizedExperiment with one dense assay.

    Options: `object`, its name in the file; `cells`, the column of colData that names
    the cells (without it, its row names do). All columns of colData go to `obs`.
    """
    experiment = _r_attributes(_r_objects(paths[0])[options["object"]])
    assays = _r_attributes(experiment["assays"])
    if ".xData" in assays:  # as Bioconductor wrote it before 3.10
        listed = _r_environment(assays[".xData"])[".->data"]
    else:
        listed = assays["data"]
    assay = _r_attributes(listed)["listData"].value[0]
    attributes = _r_attributes(assay)
    shape = tuple(int(n) for n in attributes["dim"].value)
    genes = _r_names(attributes["dimnames"])[0]
    matrix = np.asarray(assay.value).reshape(shape, order="F")
    about = _r_attributes(experiment["colData"])
    obs = _r_frame(about["listData"])
    if "cells" in options:
        obs = obs.set_index(options["cells"])
    else:
        obs.index = pd.Index(_r_strings(about["rownames"]))
    return _anndata(matrix.T, obs, genes)


def rda_data_frame(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a data frame of genes x cells and a data frame of annotation.

    Options: `object` and `annotation`, their names in the file.
    """
    objects = _r_objects(paths[0])
    frame = _r_frame(objects[options["object"]])
    obs = _r_frame(objects[options["annotation"]])
    if list(obs.index) != list(frame.columns):
        raise DataError("The annotation's rows are not the matrix's cells.")
    return _anndata(frame.to_numpy().T, obs, list(frame.index))


def rda_list(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a list with a dgCMatrix of cells x genes and frames of samples and genes.

    Options: `object`, `counts`, `samples`, `genes`: names in the file; `gene_id` and
    `symbol`: columns of the frame of genes. Symbols name the genes, made unique where
    two identifiers share one; `var["gene_id"]` keeps the identifiers.
    """
    parts = _r_list(_r_objects(paths[0])[options["object"]])
    counts, cells, columns = _r_sparse(parts[options["counts"]])
    genes = _r_frame(parts[options["genes"]])
    if [str(g) for g in genes[options["gene_id"]]] != columns:
        raise DataError("The frame of genes does not follow the matrix's columns.")
    obs = _r_frame(parts[options["samples"]])
    obs.index = pd.Index(cells)
    adata = _anndata(
        counts, obs, unique_names([str(g) for g in genes[options["symbol"]]])
    )
    adata.var["gene_id"] = columns
    return adata


def rda_list_frame(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a list with a data frame of genes x cells and a vector of labels.

    Options: `object`, `frame`, `labels`: names in the file; `stages`, the labels in
    the order of development, which `obs["stage_order"]` counts from 0.
    """
    parts = _r_list(_r_objects(paths[0])[options["object"]])
    frame = _r_frame(parts[options["frame"]])
    labels = _r_vector(parts[options["labels"]])
    obs = pd.DataFrame({"label": labels}, index=frame.columns)
    obs["stage_order"] = [options["stages"].index(label) for label in labels]
    return _anndata(frame.to_numpy().T, obs, list(frame.index))


def rda_log1p(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a dgCMatrix of genes x cells, log1p, and a data frame of annotation.

    The integer counts are recovered, see `_with_counts`. Options: `object` and
    `annotation`, their names in the two files; `cells`, the annotation's column of cell
    names; `library` and `target_sum`.
    """
    X, genes, cells = _r_sparse(_r_objects(paths[0])[options["object"]])
    obs = _r_frame(_r_objects(paths[1])[options["annotation"]])
    obs = obs.set_index(options["cells"])
    if list(obs.index) != cells:
        raise DataError("The annotation's rows are not the matrix's cells.")
    return _with_counts(_anndata(X.T, obs, genes), options)


def rda_guides(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a screen: genes x cells, guides x cells, and the target of each guide.

    A cell's target is that of its guide with the most molecules, the first of several.
    Options: `object`, and the names in it of `counts`, `guides`, `targets` (a frame of
    guide and target) and `covariates` (a frame of the cells); `obs`, values that are
    the same for all cells. Adds `obs` "target", "guide", "guide_count" and
    "guide_share", the share of the cell's guide molecules that are this guide's.
    """
    parts = _r_list(_r_objects(paths[0])[options["object"]])
    counts, genes, cells = _r_sparse(parts[options["counts"]])
    guides, names, _ = _r_sparse(parts[options["guides"]])
    known = _r_frame(parts[options["targets"]])
    target = dict(zip(known.iloc[:, 0], known.iloc[:, 1], strict=True))
    obs = _r_frame(parts[options["covariates"]])
    shapes = {counts.shape[1], guides.shape[1], len(obs)}
    if len(shapes) > 1 or not {*names} <= {*target}:
        raise DataError("The parts do not have the same cells, or a guide no target.")
    obs.index = pd.Index(cells or [f"cell{i + 1}" for i in range(len(obs))])
    top = np.asarray(guides.argmax(axis=0)).ravel()
    obs["guide"] = np.array(names, dtype=object)[top]
    obs["target"] = obs["guide"].map(target)
    obs["guide_count"] = guides.max(axis=0).toarray().ravel()
    obs["guide_share"] = obs["guide_count"] / np.asarray(guides.sum(axis=0)).ravel()
    return _anndata(counts.T, obs.assign(**options.get("obs", {})), genes)


# --- other layouts -----------------------------------------------------------------


def h5_counts_csv_labels(paths: list[Path], options: Options) -> ad.AnnData:
    """Read an HDF5 matrix of cells x genes without names, and a csv of labels.

    The csv has one row per cell, in the matrix's order and without
    header: barcode, label. Options:
    `key`, the matrix; `gene_prefix`, for the invented gene names.
    """
    import h5py

    with h5py.File(paths[0]) as file:
        X = sp.csr_matrix(file[options["key"]][()])
    # Universal newlines: the file ends its lines with a bare carriage return.
    text = paths[1].read_text()
    obs = pd.read_csv(io.StringIO(text), names=["barcode", "label"], header=None)
    obs = obs.set_index("barcode")
    if len(obs) != X.shape[0]:
        raise DataError(
            message(
                "The label file does not fit the matrix",
                found=f"{len(obs)} labels for {X.shape[0]} cells",
                allowed="one label per cell",
            )
        )
    width = len(str(X.shape[1] - 1))
    prefix = options["gene_prefix"]
    genes = [f"{prefix}{i:0{width}d}" for i in range(X.shape[1])]
    return _anndata(X, obs, genes)


def zip_csv(paths: list[Path], options: Options) -> ad.AnnData:
    """Read zip archives of one csv each: cells in rows, annotation columns first.

    Options: `annotation`, how many columns come before the genes (the first names
    the cells); `batches`, one name per file.
    """
    n_annotation, parts = int(options["annotation"]), []
    for path, batch in zip(paths, options["batches"], strict=True):
        with zipfile.ZipFile(path) as archive:
            (member,) = archive.namelist()
            table = pd.read_csv(archive.open(member), low_memory=False)
        obs = table.iloc[:, 1:n_annotation].set_index(table.iloc[:, 0].to_numpy())
        obs["batch"] = batch
        values = table.iloc[:, n_annotation:]
        parts.append(_anndata(values.to_numpy(), obs, list(values.columns)))
    if any(list(p.var_names) != list(parts[0].var_names) for p in parts):
        raise DataError("The files do not have the same genes in the same order.")
    return ad.concat(parts)


def text_table(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a text table of genes x cells with names, and a table of labels.

    The header may lack the corner, as R writes it. Cells are matched by name; cells
    without a label are left out; a label column that stands alone is called "label".
    Options: `sep`, `label_sep`; `gene_pattern`, a regular expression that is removed
    from gene names; `cell_replace`, [old, new] applied to the cell names of both
    files; `mixture`, see `_add_mixture`.
    """
    table = pd.read_csv(paths[0], sep=options["sep"], index_col=0)
    labels = pd.read_csv(paths[1], sep=options["label_sep"], index_col=0)
    old, new = options.get("cell_replace", ["", ""])
    if old:
        table.columns = table.columns.str.replace(old, new, regex=False)
        labels.index = labels.index.astype(str).str.replace(old, new, regex=False)
    cells = [name for name in table.columns if name in labels.index]
    if not cells:
        raise DataError(
            message(
                "No cell name of the matrix has a label",
                found=str(table.columns[0]),
                allowed=f"names such as {labels.index[0]!r}",
            )
        )
    obs = labels.loc[cells].copy()
    if obs.shape[1] == 1:
        obs.columns = ["label"]
    if "mixture" in options:
        _add_mixture(obs, options["mixture"])
    genes = [re.sub(options.get("gene_pattern", "$^"), "", g) for g in table.index]
    adata = _anndata(table[cells].to_numpy().T, obs, unique_names(genes))
    adata.var["gene_id"] = [str(g) for g in table.index]
    return adata


def _add_mixture(obs: pd.DataFrame, columns: dict[str, str]) -> None:
    """Add `<part>_prop`, and `mixture`: all parts in order, such as 68:16:16.

    `columns` maps each part to its column, of shares (`mixture` shows per cent) or of
    numbers of cells (`mixture` shows them; the shares are of their sum).
    """
    amounts = obs[list(columns.values())].to_numpy(np.float64)
    is_share = amounts.max() <= 1
    shown = amounts * (100 if is_share else 1)
    obs["mixture"] = [":".join(f"{part:.0f}" for part in row) for row in shown]
    obs[[f"{part}_prop" for part in columns]] = (
        amounts if is_share else amounts / amounts.sum(axis=1, keepdims=True)
    )


def csv_truth(paths: list[Path], options: Options) -> ad.AnnData:
    """Read csv files of simulated cells: counts, true counts, what was hidden, labels.

    The first three are genes x cells with names: the second goes to
    `layers["true_counts"]`, the third, of TRUE and FALSE, to `layers["hidden"]`. The
    labels have one row per cell, in the matrix's order.
    """
    counts, truth, hidden = (pd.read_csv(path, index_col=0) for path in paths[:3])
    if not all(
        other.axes[i].equals(counts.axes[i])
        for other in (truth, hidden)
        for i in (0, 1)
    ):
        raise DataError("The three matrices do not have the same genes and cells.")
    obs = pd.read_csv(paths[3], index_col=0).set_axis(counts.columns)
    adata = _anndata(counts.to_numpy().T, obs, list(counts.index))
    adata.layers["true_counts"] = sp.csr_matrix(truth.to_numpy(np.float32).T)
    adata.layers["hidden"] = sp.csr_matrix(hidden.to_numpy(bool).T)
    return adata


def tar_mtx(paths: list[Path], options: Options) -> ad.AnnData:
    """Read a 10x archive (matrix, genes, barcodes) and a table of labels by barcode.

    Options: `folder` in the archive; `label_column` and `barcode_column`.
    """
    from scipy.io import mmread

    def member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
        handle = archive.extractfile(f"{options['folder']}/{name}")
        assert handle is not None
        return io.BytesIO(handle.read())

    with tarfile.open(fileobj=gzip.open(paths[0])) as archive:
        X = sp.csr_matrix(mmread(member(archive, "matrix.mtx")).T)
        genes = pd.read_csv(member(archive, "genes.tsv"), sep="\t", header=None)
        cells = pd.read_csv(member(archive, "barcodes.tsv"), sep="\t", header=None)
    table = pd.read_csv(paths[1], sep="\t").set_index(options["barcode_column"])
    names = cells[0].astype(str)
    if set(names) - set(table.index):
        raise DataError("The label table lacks some barcodes of the matrix.")
    labels = table[options["label_column"]].reindex(names)
    obs = pd.DataFrame({"label": labels.to_numpy()}, index=names)
    adata = _anndata(X, obs, unique_names(list(genes[1].astype(str))))
    adata.var["gene_id"] = list(genes[0].astype(str))
    return adata


def text_tables(paths: list[Path], options: Options) -> ad.AnnData:
    """Read several pairs of files for `text_table` and put their cells together.

    Only genes and columns that all pairs have are kept. Options: those of
    `text_table`, and `batches`, one name per pair.
    """
    parts = [
        text_table([*pair], options)
        for pair in zip(paths[::2], paths[1::2], strict=True)
    ]
    batches = options["batches"]
    return ad.concat(
        dict(zip(batches, parts, strict=True)), label="batch", merge="same"
    )


def text_cells(paths: list[Path], options: Options) -> ad.AnnData:
    """Read text tables of cells x genes, of the cells, and of the genes, by name.

    The table of the genes may know more of them. Option: `sep`.
    """
    table, obs, var = (
        pd.read_csv(path, sep=options["sep"], index_col=0) for path in paths
    )
    adata = _anndata(table.to_numpy(), obs.loc[table.index], list(table.columns))
    adata.var = var.loc[table.columns]
    return adata


def _with_counts(adata: ad.AnnData, options: Options) -> ad.AnnData:
    """Add the integer counts that X, log1p of counts scaled to a total, stands for.

    They are expm1(x) divided by the value of one molecule. Options: `library`, the obs
    column of the cells' totals before genes were chosen; `target_sum`.
    """
    X = adata.X
    total = adata.obs[options["library"]].to_numpy(np.float64)
    exact = np.expm1(X.data.astype(np.float64))
    exact *= np.repeat(total / options["target_sum"], np.diff(X.indptr))
    away = np.abs(exact - np.rint(exact)).max()
    if away > 0.1:
        raise DataError(
            message(
                "The integer counts cannot be recovered from the logarithms",
                found=f"a value {away:.2g} away from a whole number",
                allowed="0.1 or less",
                do="Check the options `library` and `target_sum`.",
            )
        )
    adata.layers["counts"] = X.copy()
    adata.layers["counts"].data = np.rint(exact).astype(np.float32)
    return adata


def h5ad_raw_log1p(paths: list[Path], options: Options) -> ad.AnnData:
    """Read an .h5ad whose raw.X is log1p of counts scaled to a known total.

    The integer counts are recovered, see `_with_counts` for the options.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is written in an older format
        stored = ad.read_h5ad(paths[0])
    X = sp.csr_matrix(stored.raw.X, dtype=np.float32)
    adata = ad.AnnData(X, obs=stored.obs, var=pd.DataFrame(index=stored.raw.var_names))
    return _with_counts(adata, options)


def h5ad_0_6_log1p(paths: list[Path], options: Options) -> ad.AnnData:
    """Read an .h5ad of anndata 0.6, X in CSR form, as `h5ad_raw_log1p` reads raw.X.

    There, obs and var are tables of records, and `uns` holds the names of categories.
    """
    import h5py

    with h5py.File(paths[0]) as file:
        obs, var = (pd.DataFrame(file[key][()]) for key in ("obs", "var"))
        parts = [file["X"][key][()] for key in ("data", "indices", "indptr")]
        for column in obs:
            if f"{column}_categories" in file["uns"]:
                known = file["uns"][f"{column}_categories"].asstr()[()]
                obs[column] = pd.Categorical.from_codes(obs[column], known)
    obs.index, genes = (
        pd.Index(f.pop("index").str.decode("utf-8")) for f in (obs, var)
    )
    X = sp.csr_matrix(tuple(parts), shape=(len(obs), len(genes)))
    X.sort_indices()
    return _with_counts(_anndata(X, obs, list(genes)), options)


def h5ad_log1p(paths: list[Path], options: Options) -> ad.AnnData:
    """Read an .h5ad whose X is log1p of normalised counts, which it does not hold."""
    stored = ad.read_h5ad(paths[0])
    return _anndata(stored.X, stored.obs, list(stored.var_names))


def h5ad_gears(paths: list[Path], options: Options) -> ad.AnnData:
    """Read GEARS' `perturb_processed.h5ad`, bare or in a zip archive.

    See `layouts.from_gears` for the layout. A layer "counts" is kept if it holds
    counts.
    """
    from scgenlib.layouts import from_gears

    path, inside = paths[0], "perturb_processed.h5ad"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files of older formats read well
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found = [n for n in archive.namelist() if n.split("/")[-1] == inside]
                if len(found) != 1:
                    raise DataError(
                        message(
                            f"{path.name} is not an archive of GEARS",
                            found=", ".join(archive.namelist()[:5]),
                            allowed=f"one file {inside}",
                        )
                    )
                path = Path(archive.extract(found[0], folder))
        stored = ad.read_h5ad(path)
    stored.uns.clear()  # tables of marker genes, larger than the cells
    counts = stored.layers.get("counts")
    stored.layers.clear()
    adata = from_gears(stored)
    if counts is not None and value_scale(counts) == "counts":
        adata.layers["counts"] = sp.csr_matrix(counts, dtype=np.float32)
    return adata


READERS: dict[str, Callable[[list[Path], Options], ad.AnnData]] = {
    reader.__name__: reader
    for reader in (
        rda_summarized_experiment,
        rda_data_frame,
        rda_list,
        rda_list_frame,
        rda_log1p,
        rda_guides,
        h5_counts_csv_labels,
        zip_csv,
        text_table,
        text_tables,
        text_cells,
        csv_truth,
        tar_mtx,
        h5ad_raw_log1p,
        h5ad_0_6_log1p,
        h5ad_log1p,
        h5ad_gears,
    )
}
