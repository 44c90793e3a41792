"""Manifests, readers, downloads, .h5ad files, and the errors of each."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import yaml

from scgenlib import datasets, download, h5ad, readers
from scgenlib.contract import as_labels, card_of
from scgenlib.errors import DataError, DownloadError, ManifestError, OutputError
from scgenlib.preprocess import filter_genes
from scgenlib.simulate import blobs, simulate

ROOT = Path(__file__).resolve().parents[1]
# Read before the fixture below hides it from the package.
DATA_DIR = os.environ.get("SCGENLIB_DATA_DIR")


def real_data() -> Path:
    """Return the folder of published files, or skip the test saying why."""
    if not DATA_DIR or not Path(DATA_DIR).is_dir():
        pytest.skip("needs the published files: set SCGENLIB_DATA_DIR to their folder")
    return Path(DATA_DIR)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep every test away from the user's cache and data folder."""
    monkeypatch.setattr(datasets, "_cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setenv("SCGENLIB_DATA_DIR", "")
    return tmp_path / "cache"


GEARS = ["adamson", "dixit", "norman"]
DESIGNS = [
    *("RNAmix_celseq2", "RNAmix_sortseq"),
    *("cellmix1", "cellmix2", "cellmix3", "cellmix4", "cellmix5"),
    *("sc_celseq2", "sc_celseq2_5cl_p1", "sc_celseq2_5cl_p2", "sc_celseq2_5cl_p3"),
    *("sc_dropseq", "lines_2protocols"),
]


# --- what ships with the package ---------------------------------------------------


def test_list_and_names():
    table = datasets.list()
    embedded = ["pbmc68k_reduced", "simulated", "simulated_atlas", "simulated_screen"]
    assert table["name"].tolist()[:4] == embedded
    assert set(table["name"]) == {
        *("kang", "pancreas", "pbmc_3batches", "simulated_atlas"),
        *("simulated_screen", "papalexi", "norman_subset", *GEARS),
        *(f"batch_sim/dropout_{share}" for share in ("005", "025")),
        *("pbmc68k_reduced", "simulated", "pollen", "yan", "cbmc", "baron_mouse"),
        *("pbmc_facs", "muraro", "pbmc68k", "scgacl_sim", "deng"),
        *(f"sc_mixology/{design}" for design in DESIGNS),
    }
    row = table.set_index("name").loc["pollen"]
    assert (row["cells"], row["genes"], row["types"]) == (299, 23702, 11)
    unverified = [*GEARS, "muraro", "pbmc68k"]
    assert {*table.loc[~table["verified"], "name"]} == {*unverified}
    assert "pbmc68k" not in datasets.names("garage")
    screens = ["simulated_screen", "kang", "norman_subset", "papalexi", *GEARS]
    assert datasets.names("regina") == screens
    assert [n for n in datasets.names() if datasets.has_perturbation(n)] == screens[1:]


def test_scgacl_gets_counts_only():
    served = datasets.names("scgacl")
    assert {"simulated", "scgacl_sim", "deng", "sc_mixology/RNAmix_sortseq"} <= {
        *served
    }
    # Not molecules; fractions of molecules; ninety cells a well, 21 wells.
    assert not {"yan", "muraro", "sc_mixology/cellmix5"} & {*served}
    for name in served:
        assert min(datasets.card(name)["label_counts"].values()) >= 2


def test_scatlasvae_gets_counts_with_or_without_batches():
    served = datasets.names("scatlasvae")
    assert {"simulated_atlas", "pancreas", "kang", "cbmc"} <= {*served}
    # Screens; not molecules; fractions of molecules; no file to check; 21 wells.
    screens = {*datasets.names("regina")} - {"kang"}
    others = screens | {"yan", "muraro", "pbmc68k", "sc_mixology/cellmix5"}
    assert {*served} == {*datasets.names()} - others


def test_a_family_of_designs_names_them():
    with pytest.raises(
        DataError, match="is a family.*sc_mixology/cellmix1, .*2protocols, .*dropseq"
    ):
        datasets.load("sc_mixology")
    with pytest.raises(DataError, match="Did you mean 'sc_mixology/RNAmix_celseq2'"):
        datasets.load("sc_mixology/RNAmix_celsq2")
    with pytest.raises(ManifestError, match="sc_mixology.yml holds 13 designs"):
        datasets.load(ROOT / "data_manifests" / "sc_mixology.yml")
    assert "designs" not in datasets.card("sc_mixology/cellmix1")
    adata = datasets.load("simulated:sc_mixology/cellmix5", verbose=False)
    assert adata.uns["dataset"]["name"] == "simulated:sc_mixology/cellmix5"


def test_cards_carry_what_a_chapter_needs():
    for name in datasets.names():
        card = datasets.card(name)
        assert sum(card["label_counts"].values()) == card["n_cells"]
        assert {"target_sum", "gene_filter"} <= set(card["recipe"])
        if card["verified"] and not card["simulated"]:
            assert card["sha256"] and card["depth"]["mean"] > 0
    assert datasets.card("simulated:yan")["simulated"] is True
    assert datasets.card("yan")["simulated"] is False
    thresholds = {n: datasets.card(n)["rare_threshold"] for n in datasets.names()}
    documented = {"yan": 10, "pollen": 25, "cbmc": 200, "muraro": 200}
    assert {k: v for k, v in thresholds.items() if v is not None} == documented


def test_embedded_set_without_scanpy_or_network():
    code = (
        "import sys; from scgenlib import datasets as d;"
        "a = d.load('pbmc68k_reduced', verbose=False);"
        "heavy = {'scanpy', 'umap', 'torch', 'torch_geometric', 'pooch'};"
        "print(a.shape, heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "SCGENLIB_DATA_DIR": ""},
    )
    assert done.stdout.strip() == "(700, 765) set()"


def test_pbmc68k_reduced_figures(capsys):
    adata = datasets.load("pbmc68k_reduced")
    line = capsys.readouterr().out
    assert line.startswith("pbmc68k_reduced: 700 cells x 765 genes, 10 types, counts")
    counts = adata.layers["counts"]
    assert (counts.nnz, counts.sum(), counts.max()) == (174400, 486651, 259)
    assert (counts[0].sum(), counts[-1].sum()) == (628, 1169)
    assert adata.var_names[[0, -1]].tolist() == ["HES4", "MT-ND3"]
    assert adata.obs_names[0] == "AAAGCCTGGCTAAC-1"
    # X is the file's: scaled by the total over all genes, not over these 765.
    library = adata.obs["n_counts"].to_numpy()[:, None]
    expected = np.log1p(counts.toarray() / library * 1e4)
    np.testing.assert_allclose(adata.X.toarray(), expected, atol=5e-3)
    assert adata.uns["dataset"]["genes_preselected"] is True


def test_simulated_is_what_its_card_says(capsys):
    adata = datasets.load("simulated")
    assert "SIMULATED, no real cell" in " ".join(capsys.readouterr().out.split())
    assert (
        adata.uns["dataset"]["label_counts"]
        == (datasets.card("simulated")["label_counts"])
    )
    assert adata.uns["dataset"]["truth"]["dropout"] == 0.2
    again = datasets.load("simulated", verbose=False)
    assert (again.X != adata.X).nnz == 0
    assert capsys.readouterr().out == ""


def test_simulated_like_a_card():
    adata = datasets.load("simulated:yan", verbose=False)
    card = datasets.card("yan")
    assert adata.shape == (card["n_cells"], card["n_genes"])
    assert adata.uns["dataset"]["label_counts"] == card["label_counts"]
    with pytest.raises(DataError, match="Did you mean 'pollen'"):
        datasets.load("simulated:polen")


def test_unknown_name_and_path(tmp_path):
    with pytest.raises(DataError, match="'polen'.*Did you mean 'pollen'"):
        datasets.load("polen")
    (tmp_path / "liver.h5ad").touch()
    with pytest.raises(DataError, match="no such file.*Did you mean 'liver.h5ad'"):
        datasets.load(tmp_path / "livr.h5ad")
    with pytest.raises(DataError, match="cannot be read as an .h5ad file"):
        datasets.load(tmp_path / "liver.h5ad")
    with pytest.raises(DataError, match="Unknown label column.*'phase'"):
        datasets.load("pbmc68k_reduced", label_key="phases")


def test_another_label_column():
    adata = datasets.load("pbmc68k_reduced", label_key="phase", verbose=False)
    assert set(adata.obs["cell_type"].cat.categories) == {"G1", "G2M", "S"}
    assert sum(adata.uns["dataset"]["label_counts"].values()) == 700


# --- published files ---------------------------------------------------------------

# Shape, nnz, total, max, first and last cell's sum, first and last gene, first cell:
# figures of the raw files, computed independently of this package.
FIGURES = {
    "pollen": (
        *(299, 23794, 1629338, 477223488.0, 329062.0, 137410.0, 2437599.0),
        *("A1BG-AS1", "ZZZ3", "SRP041736.SRS603484"),
    ),
    "yan": (
        *(90, 20214, 990543, 49287528.0, 49957.30078125, 460069.375, 639042.125),
        *("C9orf152", "AQP7", "Oocyte..1.RPKM."),
    ),
    "cbmc": (
        *(8617, 2000, 1160796, 7817205.0, 5367.0, 17183.0, 158.0),
        *("hvg0000", "hvg1999", "CTGTTTACACCGCTAG"),
    ),
    "baron_mouse": (
        *(1886, 14878, 3094496, 9411303.0, 3656.0, 13600.0, 1591.0),
        *("0610007P14Rik", "l7Rn6", "mouse1_lib1.final_cell_0001"),
    ),
    "pbmc_facs": (
        *(3774, 16791, 2702861, 7500459.0, 135.0, 1784.0, 1640.0),
        *("AL627309.1", "SRSF10-1", "CGTGATGATTTCAC-1-b_cells"),
    ),
    "deng": (
        *(133, 17706, 1213747, 1600726802.0, 375951.0, 9732697.0, 11325056.0),
        *("0610005C13Rik", "l7Rn6", "GSM1112603_early2cell_0r.1_expression"),
    ),
    "scgacl_sim": (
        *(500, 1000, 111334, 3354500.0, 3711.0, 5706.0, 8193.0),
        *("Gene1", "Gene1000", "Cell1"),
    ),
    "batch_sim/dropout_005": (
        *(1400, 712, 909844, 26844964.0, 831.0, 20663.0, 16504.0),
        *("Gene3", "Gene4987", "Cell1"),
    ),
    "batch_sim/dropout_025": (
        *(1400, 740, 929119, 27000171.0, 905.0, 20857.0, 16332.0),
        *("Gene3", "Gene4987", "Cell1"),
    ),
    "pancreas": (
        *(528, 1403, 544181, 115415408.0, 361476.0, 3588.0, 348414.8125),
        *("SCGN", "ZFP36L1", "human2_lib2.final_cell_0117"),
    ),
    "pbmc_3batches": (
        *(1200, 1767, 245676, 1495544.0, 4882.0, 1896.0, 1037.0),
        *("LYZ", "IL1RN", "fivePrime_GATCGCGAGACCGGAT"),
    ),
    "kang": (
        *(1975, 6998, 643449, 2156428.0, 2407.0, 1391.0, 954.0),
        *("AL627309.1", "S100B", "TGCTGAGATGCTAG-1-control"),
    ),
    "papalexi": (
        *(20729, 299, 1390126, 4299765.0, 278.0, 212.0, 238.0),
        *("PCBP3", "NFKBIA", "cell1"),
    ),
    "norman_subset": (  # of the logarithms
        *(5961, 500, 211790, 406134.543524, 6.9484967, 17.9657284, 201.9584333),
        *("PERM1", "LINC00316", "TGGTTAGCACATCCGG-3"),
    ),
    "sc_mixology/RNAmix_celseq2": (
        *(340, 14804, 2412406, 12908075.0, 2946.0, 54107.0, 20801.0),
        *("ENSG00000072858", "ENSG00000224934", "L19"),
    ),
    "sc_mixology/RNAmix_sortseq": (
        *(296, 15571, 2005546, 11219124.0, 2495.0, 97421.0, 13817.0),
        *("ENSG00000245025", "ENSG00000115687", "L19"),
    ),
    "sc_mixology/cellmix1": (
        *(266, 11798, 592071, 1633091.0, 332.0, 6723.0, 2362.0),
        *("ENSG00000250584", "ENSG00000183840", "L19"),
    ),
    "sc_mixology/cellmix2": (
        *(268, 13747, 922398, 3446711.0, 579.0, 13064.0, 9782.0),
        *("ENSG00000250420", "ENSG00000141965", "L19"),
    ),
    "sc_mixology/cellmix3": (
        *(285, 14053, 1008461, 3770483.0, 733.0, 13958.0, 5349.0),
        *("ENSG00000250584", "ENSG00000203880", "L19"),
    ),
    "sc_mixology/cellmix4": (
        *(288, 15149, 1446393, 6174422.0, 993.0, 22557.0, 8174.0),
        *("ENSG00000182912", "ENSG00000130254", "L19"),
    ),
    "sc_mixology/cellmix5": (
        *(21, 29858, 378807, 12763529.0, 4015.0, 805656.0, 877136.0),
        *("ENSG00000222604", "ENSG00000255622", "O1"),
    ),
    "sc_mixology/sc_celseq2": (
        *(274, 28204, 1954979, 10321416.0, 2973.0, 16430.0, 43969.0),
        *("ENSG00000281131", "ENSG00000226887", "A1"),
    ),
    "sc_mixology/sc_celseq2_5cl_p1": (
        *(297, 15564, 1810635, 9783530.0, 2782.0, 34719.0, 43271.0),
        *("ENSG00000154529", "ENSG00000167157", "p1_A1"),
    ),
    "sc_mixology/sc_celseq2_5cl_p2": (
        *(307, 14078, 1737067, 7347615.0, 2368.0, 34992.0, 10445.0),
        *("ENSG00000204977", "ENSG00000269937", "p1_A1"),
    ),
    "sc_mixology/sc_celseq2_5cl_p3": (
        *(305, 13426, 1463083, 5546889.0, 2036.0, 26102.0, 58103.0),
        *("ENSG00000118503", "ENSG00000112343", "p1_A1"),
    ),
    "sc_mixology/sc_dropseq": (
        *(225, 15127, 1290921, 5830998.0, 2324.0, 73523.0, 8484.0),
        *("ENSG00000223849", "ENSG00000146674", "CELL_000001"),
    ),
}


@pytest.mark.data
@pytest.mark.parametrize("name", FIGURES)
def test_reader_against_independent_figures(name):
    folder = real_data()
    manifest = datasets._manifest(name)[0]
    paths = [folder / file["path"] for file in manifest["files"]]
    adata = readers.READERS[manifest["reader"]](paths, manifest["options"])
    cells, genes, nnz, total, top, first, last, gene0, gene1, cell0 = FIGURES[name]
    values = adata.layers.get("counts", adata.X)
    sums = np.asarray(values.sum(1, dtype=np.float64)).ravel()
    assert adata.shape == (cells, genes) and values.nnz == nnz
    np.testing.assert_allclose(
        [sums.sum(), values.max(), sums[0], sums[-1]], [total, top, first, last], 1e-6
    )
    assert adata.var_names[[0, -1]].tolist() == [gene0, gene1]
    assert adata.obs_names[0] == cell0
    assert adata.obs_names.is_unique and adata.var_names.is_unique


@functools.cache
def published(name: str) -> ad.AnnData:
    """Load a published set once for all tests, which must not change it."""
    return datasets.load(name, data_dir=real_data(), verbose=False)


@pytest.mark.data
@pytest.mark.parametrize("name", [*FIGURES, "sc_mixology/lines_2protocols"])
def test_load_published_set(name):
    adata = published(name)
    card = adata.uns["dataset"]
    assert adata.X.format == "csr" and adata.X.dtype == np.float32
    assert adata.shape == (card["n_cells"], card["n_genes"])
    assert adata.obs["cell_type"].dtype == "category"
    sizes = {str(k): int(v) for k, v in adata.obs["cell_type"].value_counts().items()}
    assert sizes == card["label_counts"]
    if name in ("yan", "norman_subset"):
        assert "counts" not in adata.layers
        return
    counts = adata.layers["counts"]
    assert np.array_equal(counts.data, np.rint(counts.data))
    library = np.asarray(counts.sum(1, dtype=np.float64)).ravel()
    assert library.mean() == pytest.approx(card["depth"]["mean"], rel=1e-3)
    assert library.std(ddof=1) == pytest.approx(card["depth"]["sd"], rel=1e-3)
    back = adata.X.copy()
    back.data = np.expm1(back.data)
    target, whole = card["recipe"]["target_sum"], library
    if card["value_scale"] == "log1p":  # scaled before genes were chosen
        (column,) = {"nUMI", "n_counts"} & {*adata.obs}
        whole = adata.obs[column].to_numpy()
        assert (whole > library).all()
    expected = target * library / whole
    np.testing.assert_allclose(np.asarray(back.sum(1)).ravel(), expected, rtol=1e-4)


@pytest.mark.data
def test_what_is_particular_about_each_set():
    pollen = published("pollen")
    assert not pollen.var_names.str.startswith("ERCC-").any()
    yan = published("yan")
    np.testing.assert_allclose(np.expm1(yan.X.max()), 49957.3, rtol=1e-4)
    cbmc = published("cbmc")
    assert not {"Mouse", "Unknown"} & set(cbmc.obs["cell_type"].cat.categories)
    baron = published("baron_mouse")
    sizes = baron.obs["batch"].value_counts().to_dict()
    assert sizes == {"mouse1": 822, "mouse2": 1064}
    facs = published("pbmc_facs")
    assert facs.var.loc["SRSF10-1", "gene_id"] == "ENSG00000215699"
    assert facs.obs["subpop"].value_counts()["T cell"] == 1484


@pytest.mark.data
def test_simulation_of_scgacl_has_its_truth():
    adata = published("scgacl_sim")
    counts, truth = adata.layers["counts"], adata.layers["true_counts"]
    hidden = adata.layers["hidden"]
    assert (hidden.dtype, hidden.format, truth.format) == (bool, "csr", "csr")
    assert (hidden.nnz, truth.nnz, truth.sum()) == (273959, 370237, 30988436)
    assert (truth.max(), truth[0].sum(), truth[-1].sum()) == (7490, 62038, 67823)
    assert hidden.multiply(truth != 0).nnz == 258903
    kept = np.where(hidden.toarray(), 0, truth.toarray())
    np.testing.assert_array_equal(counts.toarray(), kept)
    recipe = adata.uns["dataset"]["recipe"]["gene_filter"]
    assert filter_genes(adata, **recipe).sum() == 969


@pytest.mark.data
@pytest.mark.parametrize("design", DESIGNS[:7])
def test_mixtures_have_their_shares(design):
    adata = published(f"sc_mixology/{design}")
    assert not adata.var_names.str.startswith("ERCC-").any()
    parts = adata.obs["cell_type"].astype(str).str.split(":", expand=True).to_numpy(int)
    shares = adata.obs[["H2228_prop", "H1975_prop", "HCC827_prop"]]
    assert (shares.dtypes == np.float64).all()
    if design.startswith("RNAmix"):
        np.testing.assert_allclose(shares.to_numpy() * 100, parts)
        assert sorted(adata.obs["mRNA_amount"].unique()) == [3.75, 7.5, 15, 30]
        # Two mixes of the plan are the same.
        mixes = adata.obs.groupby("cell_type", observed=True)["mix"].nunique()
        assert mixes[mixes > 1].to_dict() == {"33:33:33": 2}
    else:
        np.testing.assert_allclose(shares.sum(axis=1), 1)
        cells = adata.obs[["H2228", "H1975", "HCC827"]].to_numpy()
        np.testing.assert_array_equal(parts, cells)
        wells = {90} if design == "cellmix5" else {3, 9}
        assert set(cells.sum(axis=1)) == wells


@pytest.mark.data
@pytest.mark.parametrize("design", DESIGNS[7:12])
def test_doublets_of_cell_lines_are_dropped(design):
    adata = published(f"sc_mixology/{design}")
    raw = FIGURES[f"sc_mixology/{design}"][0]
    doublets = {"sc_celseq2": 34, "sc_dropseq": 15}
    doublets |= {f"sc_celseq2_5cl_p{i}": n for i, n in ((1, 141), (2, 144), (3, 53))}
    assert raw - adata.n_obs == doublets[design]
    assert set(adata.obs["demuxlet_cls"]) == {"SNG"}


# The sizes of each type in each batch, types and batches in order.
BATCHES = {
    "batch_sim/dropout_005": {"Batch1": [148, 352], "Batch2": [263, 637]},
    "batch_sim/dropout_025": {"Batch1": [148, 352], "Batch2": [263, 637]},
    "pancreas": {"Smart-seq2": [100, 100], "inDrop": [100, 100]},
    "pbmc_3batches": {
        "3pv1": [39, 2, 2, 3, 50, 27, 17, 97, 53],
        "3pv2": [62, 16, 0, 2, 102, 11, 22, 150, 115],
        "5p": [71, 10, 1, 2, 120, 22, 20, 126, 58],
    },
    "kang": {
        "control": [110, 238, 278, 69, 55, 132, 54],
        "stimulated": [112, 83, 356, 53, 59, 289, 87],
    },
    "sc_mixology/lines_2protocols": {
        "CEL-seq2": [103, 67, 70],
        "Drop-seq": [79, 65, 66],
    },
}


@pytest.mark.data
@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_published_sets(name):
    adata = published(name)
    datasets.check_anndata(adata, label_key="cell_type", need_counts=True)
    table = pd.crosstab(adata.obs["cell_type"], adata.obs["batch"])
    assert adata.obs["batch"].dtype == "category"
    assert {batch: [*sizes] for batch, sizes in table.items()} == BATCHES[name]


@pytest.mark.data
def test_batches_are_what_their_names_say():
    kang = published("kang").obs
    known = kang["batch"].astype(str).replace("control", "ctrl")
    assert (kang["perturbation"].astype(str) == known).all()
    assert kang.index.str.endswith("-control").sum() == 936
    assert (kang["batch"][kang.index.str.endswith("-control")] == "control").all()
    pancreas = published("pancreas")
    indrop = (pancreas.obs["batch"] == "inDrop").to_numpy()
    assert pancreas.obs_names[indrop].str.match(r"human\d_lib\d").all()
    assert pancreas.obs_names[~indrop].str.match("HP1|AZ_").all()
    depth = np.asarray(pancreas.layers["counts"].sum(1)).ravel()
    np.testing.assert_allclose(
        [depth[indrop].mean(), depth[~indrop].mean()], [3341.2, 195742.1], rtol=1e-4
    )
    blood = published("pbmc_3batches").obs
    prefix = {"3pv1": "threepv1", "3pv2": "threepfresh", "5p": "fivePrime"}
    assert (blood.index.str.split("_").str[0] == blood["batch"].map(prefix)).all()


@pytest.mark.data
def test_screens_have_their_conditions():
    papalexi = published("papalexi")
    sizes = papalexi.obs["perturbation"].value_counts()
    found = {name: int(sizes[name]) for name in ("ctrl", "IFNGR1", "STAT1", "SPI1")}
    assert found == {"ctrl": 2386, "IFNGR1": 1341, "STAT1": 444, "SPI1": 48}
    assert len(sizes) == 26 and sizes.sum() == 20729
    assert len({*sizes.index} & {*papalexi.var_names}) == 9
    batches = papalexi.obs["batch"].value_counts().to_dict()
    assert batches == {"rep_1": 9428, "rep_2": 6001, "rep_3": 5300}
    # What the card says about the guides.
    share = papalexi.obs["guide_share"]
    assert share.median() == 0.9375 and share.max() == 1.0
    assert "94 % of the guide molecules" in papalexi.uns["dataset"]["notes"]
    guides = papalexi.obs.drop_duplicates("guide")
    assert len(guides) == 107  # of 110; three are nowhere the top one
    named = guides[guides["target"] != "non-targeting"]
    assert (named["guide"].str.split("g").str[0] == named["target"]).all()
    # Biology: without the receptor, interferon's genes are lower.
    low, high = (
        papalexi.X[(papalexi.obs["perturbation"] == name).to_numpy()].mean(0)
        for name in ("IFNGR2", "ctrl")
    )
    for gene in ("STAT1", "PSMB9", "JAK2", "UBE2L6"):
        at = papalexi.var_names.get_loc(gene)
        assert low[0, at] < high[0, at]
    norman = published("norman_subset")
    table = pd.crosstab(norman.obs["perturbation"], norman.obs["cell_type"])
    is_k562 = table["K562"] > 0
    assert is_k562.sum() == 34 and is_k562.index.str.contains(r"\+").sum() == 15
    assert table["K562"][["ctrl", "KLF1+SET", "PLK4"]].tolist() == [100, 100, 95]
    rest = table.drop(columns="K562").sum(axis=1)
    assert (rest > 0).sum() == 10
    assert rest[["ctrl", "SGK1", "PLK4"]].tolist() == [300, 300, 177]
    activated = pd.crosstab(norman.obs["perturbation_type"], norman.obs["batch"])
    assert activated.loc["CRISPRa"].tolist() == [0, 3375]


@pytest.mark.data
def test_two_protocols_are_their_two_sets_on_shared_genes():
    both = published("sc_mixology/lines_2protocols")
    for protocol, name in (("CEL-seq2", "sc_celseq2"), ("Drop-seq", "sc_dropseq")):
        single = published(f"sc_mixology/{name}")
        mine = both[(both.obs["batch"] == protocol).to_numpy()]
        assert mine.obs_names.tolist() == single.obs_names.tolist()
        expected = single[:, both.var_names].layers["counts"]
        assert (mine.layers["counts"] != expected).nnz == 0
    genes = [
        published(f"sc_mixology/{n}").var_names for n in ("sc_celseq2", "sc_dropseq")
    ]
    assert {*both.var_names} == {*genes[0]} & {*genes[1]}


@pytest.mark.data
def test_deng_is_in_the_order_of_development():
    obs = published("deng").obs
    stages = obs.groupby("stage_order")["cell_type"].unique().map(lambda x: [*x])
    assert stages.to_dict() == {
        **{0: ["early2cell"], 1: ["mid2cell"], 2: ["late2cell"]},
        **{3: ["earlyblast"], 4: ["midblast"]},
    }
    # The names of the cells say the stage as well.
    assert all(t in name for name, t in obs["cell_type"].items())


@pytest.mark.data
def test_cbmc_labels_fit_the_rows():
    # The two files come from different repositories: the matrix's own numeric
    # clusters must agree with the named labels, or the order would be wrong.
    import h5py

    folder = real_data()
    files = [f["path"] for f in datasets._manifest("cbmc")[0]["files"]]
    with h5py.File(folder / files[0]) as file:
        clusters = file["Y"][()]
    options = datasets._manifest("cbmc")[0]["options"]
    adata = readers.h5_counts_csv_labels([folder / f for f in files], options)
    table = pd.crosstab(adata.obs["label"].to_numpy(), clusters)
    assert table.max(axis=0).sum() > 0.9 * adata.n_obs
    assert table.loc["Mouse"].max() == 607


@pytest.mark.data
def test_verify_published(tmp_path):
    report = datasets.verify("cbmc", data_dir=real_data())
    assert report["ok"] and [f["ok"] for f in report["files"]] == [True, True]
    missing = datasets.verify("cbmc", data_dir=tmp_path)
    assert not missing["ok"] and missing["files"][0]["found"] is None


# --- readers on small files of the same layout -------------------------------------


def toy_manifest(**changes):
    facts = {
        **{"name": "toy", "title": "A toy data set", "citation": "Nobody 2024"},
        **{"doi": None, "accession": None, "licence": "CC0", "organism": "none"},
        **{"source": "nowhere", "n_cells": 3, "n_genes": 2},
        **{"label_counts": {"a": 2, "b": 1}, "value_scale": "counts"},
        **{"genes_preselected": False, "depth": {"mean": None, "sd": None}},
        "recipe": {
            "target_sum": 10,
            "gene_filter": {"min_cells_fraction": 0.0, "min_value": 0},
        },
        **{"rare_threshold": None, "tasks": ["data"], "embedded": False},
        **{"verified": True, "notes": ""},
        "reader": "zip_csv",
        "options": {"annotation": 2, "batches": ["one"]},
        "labels": {"column": "kind"},
    }
    content = toy_zip()
    facts["files"] = [
        {
            "path": "toy/toy.zip",
            "urls": [],
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
        }
    ]
    return {**facts, **changes}


def toy_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        text = "cell,kind,G1,G2\nx,a,1,3\ny,a,0,2\nz,b,4,0\n"
        archive.writestr(zipfile.ZipInfo("toy.csv"), text)
    return buffer.getvalue()


def write(folder: Path, manifest: dict, content: bytes | None = None) -> Path:
    path = folder / "toy.yml"
    path.write_text(yaml.safe_dump(manifest))
    if content is not None:
        (folder / "toy").mkdir(exist_ok=True)
        (folder / "toy" / "toy.zip").write_bytes(content)
    return path


def test_manifest_by_path(tmp_path, capsys):
    adata = datasets.load(write(tmp_path, toy_manifest(), toy_zip()))
    np.testing.assert_array_equal(
        adata.layers["counts"].toarray(), [[1, 3], [0, 2], [4, 0]]
    )
    np.testing.assert_allclose(
        adata.X.toarray(), np.log1p([[2.5, 7.5], [0, 10], [10, 0]]), rtol=1e-6
    )
    assert adata.obs["batch"].tolist() == ["one"] * 3
    assert "toy: 3 cells x 2 genes, 2 types, counts" in capsys.readouterr().out


def test_manifest_labels_renamed_and_dropped_genes(tmp_path):
    manifest = toy_manifest(
        labels={"column": "kind", "rename": {"a": "alpha", "b": "beta"}},
        genes={"drop_prefix": "G1"},
        n_genes=1,
        n_cells=2,
        label_counts={"alpha": 2},
    )
    manifest["labels"]["drop"] = ["beta"]
    path = write(tmp_path, manifest, toy_zip())
    with pytest.raises(DataError, match="one class only.*alpha"):
        datasets.load(path)


def test_muraro_layout(tmp_path, capsys):
    folder = tmp_path / "muraro"
    folder.mkdir()
    # R writes no corner; names differ in dash and dot; one cell has no label.
    table = (
        "D28-1_1\tD28-1_2\tD29-3_1\tD30-8_9\n"
        "INS__chr11\t1.00196\t0\t3.0\t2.0\n"
        "GCG__chr2\t0\t6.0714\t1.0\t2.0\n"
        "INS__chr9\t1.0\t2.0\t0\t2.0\n"
    )
    labels = '"x"\n"D28.1_1"\t"beta"\n"D28.1_2"\t"pp"\n"D29.3_1"\t"duct"\n'
    files = [f["path"] for f in datasets._manifest("muraro")[0]["files"]]
    (tmp_path / files[0]).write_bytes(gzip.compress(table.encode()))
    (tmp_path / files[1]).write_text(labels)
    adata = datasets.load("muraro", data_dir=tmp_path)
    out = capsys.readouterr().out
    assert "NOT VERIFIED" in out and "n_cells is 3, not 2126" in out
    assert adata.var_names.tolist() == ["INS", "GCG", "INS-1"]
    assert adata.obs["cell_type"].tolist() == ["beta", "gamma", "ductal"]
    # Fractional molecules are not counts.
    assert "counts" not in adata.layers
    first = np.log1p(np.array([1.00196, 0, 1]) / 2.00196 * 1e4)
    np.testing.assert_allclose(adata.X.toarray()[0], first, rtol=1e-5)
    assert adata.uns["dataset"]["n_cells"] == 3
    assert datasets.verify("muraro", data_dir=tmp_path)["ok"] is False


def test_pbmc68k_layout(tmp_path, capsys):
    (tmp_path / "pbmc68k").mkdir()
    members = {
        "matrix.mtx": "%%MatrixMarket matrix coordinate integer general\n"
        "3 2 4\n1 1 5\n3 1 1\n2 2 7\n3 2 2\n",
        "genes.tsv": "ENSG1\tACTB\nENSG2\tCD3E\nENSG3\tACTB\n",
        "barcodes.tsv": "AAAC-1\nTTTG-1\n",
    }
    files = [f["path"] for f in datasets._manifest("pbmc68k")[0]["files"]]
    with tarfile.open(tmp_path / files[0], "w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(f"filtered_matrices_mex/hg19/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    (tmp_path / files[1]).write_text(
        "TSNE.1\tTSNE.2\tbarcodes\tcelltype\n"
        "1\t2\tTTTG-1\tCD56+ NK\n0\t1\tAAAC-1\tDendritic\n"
    )
    adata = datasets.load("pbmc68k", data_dir=tmp_path)
    assert "NOT VERIFIED" in " ".join(capsys.readouterr().out.split())
    np.testing.assert_array_equal(
        adata.layers["counts"].toarray(), [[5, 0, 1], [0, 7, 2]]
    )
    assert adata.var_names.tolist() == ["ACTB", "CD3E", "ACTB-1"]
    # Labels are matched by barcode, not by row.
    assert adata.obs["cell_type"].tolist() == ["Dendritic", "CD56+ NK"]


def test_designs_of_a_manifest_and_cells_kept(tmp_path, monkeypatch):
    own = {"n_cells": 2, "label_counts": {"a": 1, "b": 1}}
    own["labels"] = {"column": "kind", "keep": {"sure": "yes"}}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        text = "cell,kind,sure,G1,G2\nx,a,yes,1,3\ny,a,no,0,2\nz,b,yes,4,0\n"
        archive.writestr(zipfile.ZipInfo("toy.csv"), text)
    manifest = toy_manifest(options={"annotation": 3, "batches": ["one"]})
    manifest["files"][0]["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    manifest["designs"] = {"All": {"title": "Every cell"}, "sure": own}
    path = write(tmp_path, manifest, buffer.getvalue())
    found = {m["name"]: m for m in datasets._read_manifests(path)}
    monkeypatch.setattr(datasets, "_manifests", lambda: found)
    assert datasets.names() == datasets.list()["name"].tolist() == [*found]
    assert [*found] == ["toy/All", "toy/sure"]
    assert datasets.card("toy/All")["title"] == "Every cell"
    assert datasets.load("toy/All", data_dir=tmp_path).n_obs == 3
    sure = datasets.load("toy/sure", data_dir=tmp_path)
    assert sure.obs_names.tolist() == ["x", "z"]
    assert sure.uns["dataset"]["name"] == "toy/sure"
    assert datasets.verify("toy/sure", data_dir=tmp_path)["ok"]
    assert datasets.fetch("toy/sure", data_dir=tmp_path) == tmp_path / "toy"
    own["labels"]["keep"] = {"sur": "yes"}
    found["toy/sure"] |= own
    with pytest.raises(ManifestError, match="Did you mean 'sure'"):
        datasets.load("toy/sure", data_dir=tmp_path)
    for wrong in (["a"], {"a": 3}):
        with pytest.raises(ManifestError, match="designs"):
            datasets.load(write(tmp_path, {**manifest, "designs": wrong}))
    with pytest.raises(ManifestError, match="at name.*'toy/a b'"):
        datasets.load(write(tmp_path, {**manifest, "designs": {"a b": {}}}))


def test_mixture_layout(tmp_path):
    # R writes no corner here either, and the table has many columns and no "label".
    (tmp_path / "counts.csv").write_text('"x","y"\n"G1",1,0\n"ERCC-1",2,3\n')
    (tmp_path / "about.csv").write_text('"reads","P","Q"\n"y",5,2,7\n"x",6,3,0\n')
    paths = [tmp_path / "counts.csv", tmp_path / "about.csv"]
    options = {"sep": ",", "label_sep": ",", "mixture": {"Q": "Q", "P": "P"}}
    adata = readers.text_table(paths, options)
    assert adata.obs.columns[0] == "reads"
    assert adata.obs["mixture"].tolist() == ["0:3", "7:2"]
    np.testing.assert_allclose(adata.obs["Q_prop"], [0, 7 / 9])
    np.testing.assert_allclose(adata.obs["P_prop"], [1, 2 / 9])
    paths[1].write_text('"reads","P","Q"\n"y",5,0.68,0.32\n"x",6,0.5,0.5\n')
    shares = readers.text_table(paths, options).obs
    assert shares["mixture"].tolist() == ["50:50", "32:68"]
    assert shares["P_prop"].tolist() == [0.5, 0.68]


def test_truth_layout(tmp_path):
    texts = {
        "counts": '"","c1","c2"\n"G1",1,0\n"G2",0,3\n',
        "truth": '"","c1","c2"\n"G1",1,4\n"G2",0,3\n',
        "hidden": '"","c1","c2"\n"G1",FALSE,TRUE\n"G2",TRUE,FALSE\n',
        "groups": '"","kind"\n"1","b"\n"2","a"\n',
    }
    paths = [tmp_path / f"{name}.csv" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    adata = readers.csv_truth(paths, {})
    np.testing.assert_array_equal(adata.X.toarray(), [[1, 0], [0, 3]])
    truth, hidden = adata.layers["true_counts"], adata.layers["hidden"]
    np.testing.assert_array_equal(truth.toarray(), [[1, 0], [4, 3]])
    assert hidden.nnz == 2 and hidden[0, 1] and hidden[1, 0]
    assert adata.obs["kind"].tolist() == ["b", "a"]
    paths[1].write_text(texts["truth"].replace("c2", "c3"))
    with pytest.raises(DataError, match="same genes and cells"):
        readers.csv_truth(paths, {})


def test_two_tables_are_put_together(tmp_path):
    texts = ['"a1"\n"G1",1\n"ERCC-1",2\n"G2",3\n', '"kind","n"\n"a1","P",5\n']
    texts += ['"b1","b2"\n"G2",4,0\n"G3",1,1\n', '"kind"\n"b1","P"\n"b2","Q"\n']
    paths = [tmp_path / f"{i}.csv" for i in range(4)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    # A column beside the labels keeps its name; one that stands alone is the label.
    options = {"sep": ",", "label_sep": ",", "batches": ["one", "two"]}
    adata = readers.text_tables(paths, options)
    assert adata.var_names.tolist() == ["G2"] and adata.var["gene_id"].tolist() == [
        "G2"
    ]
    assert adata.X.toarray().ravel().tolist() == [3, 4, 0]
    assert adata.obs["batch"].tolist() == ["one", "two", "two"]


def test_cells_layout(tmp_path):
    texts = {
        "counts": "G3\tG1\nc1\t5\t0\nc2\t0\t2\n",
        "cells": "kind\nc2\tb\nc1\ta\n",
        "genes": "factor\nG1\t1.5\nG2\t2\nG3\t3\n",
    }
    paths = [tmp_path / f"{name}.txt" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    adata = readers.text_cells(paths, {"sep": "\t"})
    np.testing.assert_array_equal(adata.X.toarray(), [[5, 0], [0, 2]])
    assert adata.obs["kind"].tolist() == ["a", "b"]
    assert adata.var["factor"].tolist() == [3, 1.5]


def old_h5ad(path, counts, total, target=100.0):
    """Write a file as anndata 0.6 did; the last cell has no kind."""
    import h5py

    X = sp.csr_matrix(counts * (target / total)[:, None], dtype=np.float32)
    X.data = np.log1p(X.data)
    names = [b"c1", b"c2", b"c3"]
    obs = np.array(
        [*zip(names, [1, 0, -1], total, strict=True)],
        dtype=[("index", "S2"), ("kind", "i1"), ("n", "f4")],
    )
    with h5py.File(path, "w") as file:
        for key in ("data", "indices", "indptr"):
            file[f"X/{key}"] = getattr(X, key)
        file["obs"] = obs
        file["var"] = np.array([(b"G1",), (b"G2",)], dtype=[("index", "S2")])
        file["uns/kind_categories"] = np.array([b"late", b"early"])


def test_old_h5ad_layout_and_recovered_counts(tmp_path):
    counts, total = np.array([[3, 0], [2, 4], [0, 7]]), np.array([9.0, 6.0, 50.0])
    old_h5ad(tmp_path / "old.h5ad", counts, total)
    options = {"library": "n", "target_sum": 100}
    adata = readers.h5ad_0_6_log1p([tmp_path / "old.h5ad"], options)
    # No cell needs a gene with one molecule: the totals say what a molecule is.
    np.testing.assert_array_equal(adata.layers["counts"].toarray(), counts)
    np.testing.assert_allclose(adata.X.toarray()[0], np.log1p([300 / 9, 0]), rtol=1e-6)
    assert adata.obs["kind"].tolist()[:2] == ["early", "late"]
    assert adata.obs["kind"].isna().tolist() == [False, False, True]
    assert (adata.obs_names[2], adata.var_names[1]) == ("c3", "G2")
    with pytest.raises(DataError, match="cannot be recovered.*0.5 away.*0.1 or less"):
        readers.h5ad_0_6_log1p([tmp_path / "old.h5ad"], options | {"target_sum": 80})


def test_manifest_names_batch_and_perturbation(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        text = "cell,kind,lab,drug,G1,G2\nx,a,1,no,1,3\ny,a,,yes,0,2\nz,b,2,yes,4,0\n"
        archive.writestr(zipfile.ZipInfo("toy.csv"), text + "w,b,3,maybe,4,1\n")
    manifest = toy_manifest(options={"annotation": 4, "batches": ["one"]})
    manifest["files"][0]["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    manifest["labels"]["keep"] = {"drug": ["no", "yes"]}
    manifest["batch"] = {"column": "lab", "rename": {"1": "Ulm"}}
    manifest["perturbation"] = {"column": "drug", "rename": {"no": "Vehicle"}}
    adata = datasets.load(write(tmp_path, manifest, buffer.getvalue()))
    # The cell without a laboratory has no batch; unused categories are gone.
    assert adata.obs["batch"].isna().tolist() == [False, True, False]
    assert adata.obs["batch"].cat.categories.tolist() == ["2", "Ulm"]
    assert adata.obs["perturbation"].tolist() == ["ctrl", "yes", "yes"]
    assert adata.obs["perturbation"].dtype == "category"
    assert not {"batch", "perturbation"} & {*adata.uns["dataset"]}
    manifest["batch"]["column"] = "labs"
    with pytest.raises(ManifestError, match="Unknown column.*Did you mean 'lab'"):
        datasets.load(write(tmp_path, manifest))


def test_stages_layout(tmp_path):
    import rdata

    frame = pd.DataFrame({"c1": [3, 0], "c2": [1, 5]}, index=["G1", "G2"])
    content = {"set": {"data": frame, "kinds": np.array(["late", "early"])}}
    rdata.write_rda(tmp_path / "set.rda", content)
    options = {"object": "set", "frame": "data", "labels": "kinds"}
    options["stages"] = ["early", "late"]
    adata = readers.rda_list_frame([tmp_path / "set.rda"], options)
    np.testing.assert_array_equal(adata.X.toarray(), [[3, 0], [1, 5]])
    assert adata.obs["stage_order"].tolist() == [1, 0]
    assert adata.obs["label"].tolist() == ["late", "early"]


def in_gears_layout(path: Path) -> Path:
    """Write six cells x three genes as GEARS does, with what its files also hold."""
    counts = np.array(
        [[4, 0, 1], [2, 2, 0], [0, 3, 1], [5, 0, 2], [1, 1, 0], [0, 0, 3]]
    )
    adata = ad.AnnData(
        np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(np.float32),
        obs=pd.DataFrame(
            {
                "condition": ["ctrl", "KLF1+ctrl", "ctrl+KLF1", "SET+KLF1", "ctrl"]
                + ["KLF1+SET"],
                "cell_type": "K562(?)",
                "control": [1, 0, 0, 0, 1, 0],
            },
            index=[f"c{i}" for i in range(6)],
        ),
        var=pd.DataFrame(
            {"gene_name": ["KLF1", "SET", "SET"]}, index=["ENSG1", "ENSG2", "ENSG3"]
        ),
        layers={"counts": counts.astype(np.float32)},
        uns={
            "rank_genes_groups_cov_all": {"K562(?)_SET+KLF1_1+1": np.array(["ENSG1"])}
        },
    )
    adata.write_h5ad(path)
    return path


CONDITIONS = ["ctrl", "KLF1", "KLF1", "KLF1+SET", "ctrl", "KLF1+SET"]


def test_gears_layout_bare_and_zipped(tmp_path):
    bare = in_gears_layout(tmp_path / "bare.h5ad")
    zipped = tmp_path / "zipped.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.write(bare, "norman/perturb_processed.h5ad")
        archive.writestr("norman/go.csv", "source,target")
        archive.writestr("__MACOSX/norman/._perturb_processed.h5ad", "no file of ours")
    for path in (bare, zipped):
        adata = readers.h5ad_gears([path], {})
        assert adata.obs["perturbation"].tolist() == CONDITIONS
        assert adata.var_names.tolist() == ["KLF1", "SET", "SET-1"]
        assert adata.X.format == adata.layers["counts"].format == "csr"
        assert adata.layers["counts"].toarray()[0].tolist() == [4, 0, 1]
        assert dict(adata.uns) == {}
    # What is called counts and is none is left out.
    stored = ad.read_h5ad(bare)
    stored.layers["counts"] = stored.X
    stored.write_h5ad(bare)
    assert "counts" not in readers.h5ad_gears([bare], {}).layers
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("norman/other.h5ad", "")
    with pytest.raises(DataError, match="norman/other.h5ad.*one file perturb_proces"):
        readers.h5ad_gears([zipped], {})


@pytest.mark.parametrize("name", GEARS)
def test_gears_manifests_read_what_they_describe(name, tmp_path, capsys):
    (tmp_path / name).mkdir()
    in_gears_layout(tmp_path / name / f"{name}.zip")  # bare, under the archive's name
    adata = datasets.load(name, data_dir=tmp_path)
    out = " ".join(capsys.readouterr().out.split())
    assert "n_cells is 6, not" in out and "NOT VERIFIED" in out
    assert "6 cells x 3 genes, 1 type, 3 conditions" in out
    assert adata.obs["perturbation"].tolist() == CONDITIONS
    assert {*adata.obs["cell_type"]} == {"K562" if name == "adamson" else "K562(?)"}


def test_unique_names_never_collide():
    names = readers.unique_names(["A", "A", "A-1", "A", "B"])
    assert len(set(names)) == 5
    assert names[0] == "A" and names[2] == "A-1" and names[4] == "B"


def test_truncated_unverified_file_is_a_clear_error(tmp_path):
    (tmp_path / "muraro").mkdir()
    files = [f["path"] for f in datasets._manifest("muraro")[0]["files"]]
    whole = gzip.compress(os.urandom(2000).hex().encode())
    (tmp_path / files[0]).write_bytes(whole[: len(whole) // 2])
    (tmp_path / files[1]).write_text("x\n")
    with pytest.raises(DataError, match="muraro cannot be read by text_table"):
        datasets.load("muraro", data_dir=tmp_path)


# --- manifests that do not fit -----------------------------------------------------


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"licens": "CC0"}, "Remove or rename the field 'licens'.*Did you mean 'lic"),
        ({"n_cells": "three"}, "at n_cells.*'three' is not of type 'integer'"),
        ({"value_scale": "tpm"}, "at value_scale.*counts.*rpkm"),
        ({"tasks": ["garag"]}, "at tasks.0"),
        ({"files": [{"path": "../x", "urls": [], "sha256": None, "bytes": 1}]}, "path"),
        ({"label_counts": {"a": 5}}, "label_counts must sum.*5.*3"),
        ({"reader": "zip_cvs"}, "Unknown reader.*Did you mean 'zip_csv'"),
        ({"labels": {"column": "kinds"}}, "Unknown label column.*Did you mean 'kind'"),
    ],
)
def test_bad_manifest_names_the_field(tmp_path, change, pattern):
    path = write(tmp_path, toy_manifest(**change), toy_zip())
    with pytest.raises(ManifestError, match=pattern):
        datasets.load(path)


def test_manifest_without_a_field_or_checksum(tmp_path):
    manifest = toy_manifest()
    del manifest["licence"]
    with pytest.raises(ManifestError, match="'licence' is a required property"):
        datasets.load(write(tmp_path, manifest))
    # Verified asks for a checksum.
    manifest = toy_manifest()
    manifest["files"][0]["sha256"] = None
    with pytest.raises(ManifestError, match=r"files\.0\.sha256"):
        datasets.load(write(tmp_path, manifest))
    (tmp_path / "broken.yml").write_text("a: [1,")
    with pytest.raises(ManifestError, match="broken.yml is not YAML"):
        datasets.load(tmp_path / "broken.yml")


def test_manifest_that_the_file_contradicts(tmp_path):
    wrong = toy_manifest(label_counts={"a": 1, "b": 2})
    with pytest.raises(DataError, match="label_counts differs.*'a': 2"):
        datasets.load(write(tmp_path, wrong, toy_zip()))
    kind = toy_manifest(reader="simulate", options={"kind": "atlass"})
    with pytest.raises(ManifestError, match="Unknown kind.*Did you mean 'atlas'"):
        datasets.load(write(tmp_path, kind))
    bad_options = toy_manifest(options={"annotation": 2})
    with pytest.raises(DataError, match="cannot be read by zip_csv.*batches"):
        datasets.load(write(tmp_path, bad_options, toy_zip()))


# --- downloads ---------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serve `content`; cut the first reply of paths under /cut after half."""

    content = b""
    asked: list[tuple[str, str | None]] = []

    def do_GET(self):
        wanted = self.headers.get("Range")
        first = not any(path == self.path for path, _ in self.asked)
        self.asked.append((self.path, wanted))
        if self.path.startswith("/missing"):
            return self.send_error(404)
        body = self.content if not self.path.startswith("/wrong") else b"wrong" * 9
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        stop = len(body) // 2 if self.path.startswith("/cut") and first else len(body)
        self.wfile.write(body[start:stop])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    Server.content, Server.asked = toy_zip(), []
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def with_urls(*urls: str) -> dict:
    manifest = toy_manifest()
    manifest["files"][0]["urls"] = [*urls]
    return manifest


def test_download_lands_verified_and_once(tmp_path, own_cache, server):
    path = write(tmp_path, with_urls(f"{server}/toy.zip"))
    folder = datasets.fetch(path)
    assert folder == own_cache / "toy"
    assert [p.name for p in folder.iterdir()] == ["toy.zip"]
    assert datasets.verify(path)["ok"]
    assert datasets.load(path, verbose=False).n_obs == 3
    assert len(Server.asked) == 1


def test_interrupted_download_is_resumed(tmp_path, own_cache, server, monkeypatch):
    monkeypatch.setattr(download, "_CHUNK", 16)
    path = write(tmp_path, with_urls(f"{server}/cut/toy.zip"))
    datasets.fetch(path)
    # The first reply broke off half way; whole pieces of it were kept.
    kept = len(toy_zip()) // 2 // 16 * 16
    assert Server.asked == [
        ("/cut/toy.zip", None),
        ("/cut/toy.zip", f"bytes={kept}-"),
    ]
    assert [p.name for p in (own_cache / "toy").iterdir()] == ["toy.zip"]
    assert (own_cache / "toy" / "toy.zip").read_bytes() == toy_zip()


def test_second_mirror(tmp_path, server):
    urls = [f"{server}/missing/toy.zip", f"{server}/wrong/toy.zip", f"{server}/toy.zip"]
    path = write(tmp_path, with_urls(*urls))
    assert datasets.load(path, verbose=False).n_obs == 3


def test_corrupted_download_says_both_hashes(tmp_path, own_cache, server):
    path = write(tmp_path, with_urls(f"{server}/wrong/toy.zip"))
    expected = toy_manifest()["files"][0]["sha256"]
    found = hashlib.sha256(b"wrong" * 9).hexdigest()
    with pytest.raises(DownloadError) as caught:
        datasets.load(path)
    assert expected in str(caught.value) and found in str(caught.value)
    assert not any((own_cache / "toy").iterdir())


def test_corrupted_cache_is_removed_but_a_users_file_is_not(tmp_path, own_cache):
    path = write(tmp_path, toy_manifest())
    (own_cache / "toy").mkdir(parents=True)
    (own_cache / "toy" / "toy.zip").write_bytes(toy_zip()[:-5])
    found = hashlib.sha256(toy_zip()[:-5]).hexdigest()
    with pytest.raises(DownloadError, match=f"{found}.*removed from the cache"):
        datasets.load(path)
    assert not (own_cache / "toy" / "toy.zip").exists()

    mine = tmp_path / "mine" / "toy" / "toy.zip"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="Replace or remove it"):
        datasets.load(path, data_dir=tmp_path / "mine")
    assert mine.read_bytes() == b"mine"


def test_no_network_says_what_to_do(tmp_path, own_cache, monkeypatch):
    import requests

    def refuse(*args, **kwargs):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(DownloadError) as caught:
        datasets.load("pollen")
    text = str(caught.value)
    assert "no connection" in text and "SCGENLIB_DATA_DIR/pollen/pollen.rda" in text
    assert "simulated:pollen" in text
    assert not [p for p in own_cache.rglob("*") if p.is_file()]


def test_full_disk_and_unwritable_cache(tmp_path, own_cache, monkeypatch):
    def full(url, part):
        part.write_bytes(b"begun")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write(tmp_path, with_urls("http://127.0.0.1:1/toy.zip"))
    monkeypatch.setattr(download, "_stream", full)
    with pytest.raises(OutputError, match="disk is full.*SCGENLIB_DATA_DIR"):
        datasets.load(path)
    assert not [p for p in own_cache.rglob("*") if p.is_file()]
    # A file where the cache folder should be: the folder cannot be made.
    blocked = tmp_path / "blocked"
    blocked.touch()
    monkeypatch.setattr(datasets, "_cache_dir", lambda: blocked / "cache")
    with pytest.raises(OutputError, match="cannot be written"):
        datasets.load(path)


def test_data_dir_comes_before_the_cache(tmp_path, own_cache, monkeypatch):
    (tmp_path / "at_hand" / "toy").mkdir(parents=True)
    (tmp_path / "at_hand" / "toy" / "toy.zip").write_bytes(toy_zip())
    path = write(tmp_path, toy_manifest())
    monkeypatch.setenv("SCGENLIB_DATA_DIR", str(tmp_path / "at_hand"))
    assert datasets.load(path, verbose=False).n_obs == 3
    assert datasets.fetch(path) == tmp_path / "at_hand" / "toy"
    assert not own_cache.exists()


def test_nothing_to_fetch():
    with pytest.raises(DataError, match="Nothing to fetch"):
        datasets.fetch("simulated")
    with pytest.raises(DataError, match="simulated:pollen is simulated.*Nothing to fe"):
        datasets.fetch("simulated:pollen")
    with pytest.raises(DataError, match="Did you mean 'pollen'"):
        datasets.verify("simulated:polen")
    report = datasets.verify("simulated:pollen")
    assert (report["name"], report["ok"], report["files"]) == (
        "simulated:pollen",
        True,
        [],
    )
    assert datasets.verify("pbmc68k_reduced")["ok"]


# --- .h5ad by path -----------------------------------------------------------------


@pytest.fixture
def cells():
    adata = simulate(120, 60, rare_fraction=0.1, seed=1)
    adata = ad.AnnData(
        adata.layers["counts"].copy(), obs=adata.obs[["cell_type"]], var=adata.var
    )
    return adata


def save(adata: ad.AnnData, folder: Path) -> Path:
    path = folder / "mine.h5ad"
    adata.write_h5ad(path)
    return path


def logged(counts):
    from scgenlib.preprocess import normalise

    return normalise(counts, 1e4)


def test_h5ad_of_counts(cells, tmp_path, capsys):
    adata = datasets.load(save(cells, tmp_path))
    assert "values from X, which are counts" in capsys.readouterr().out
    assert (adata.layers["counts"] != cells.X).nnz == 0
    np.testing.assert_allclose(adata.X.toarray(), logged(cells.X).toarray())
    card = adata.uns["dataset"]
    assert card["name"] == "mine" and "garage" in card["tasks"]
    assert card["label_counts"]["rare"] == 12
    assert str(tmp_path) not in str(card)


def test_h5ad_of_logs_and_raw_and_layers(cells, tmp_path, capsys):
    counts = cells.X.copy()
    cells.X = logged(counts)
    adata = datasets.load(save(cells, tmp_path))
    assert "counts" not in adata.layers
    assert "values from X, which are log1p" in capsys.readouterr().out
    # Scaled X with log values in raw, as many tutorials leave it.
    cells.raw = cells.copy()
    dense = cells.X.toarray()
    cells.X = (dense - dense.mean(0)) / (dense.std(0) + 1e-3)
    again = datasets.load(save(cells, tmp_path))
    assert "values from raw.X" in capsys.readouterr().out
    np.testing.assert_allclose(again.X.toarray(), adata.X.toarray(), rtol=1e-6)
    # Counts win over logarithms, wherever they are.
    cells.layers["counts"] = counts
    best = datasets.load(save(cells, tmp_path))
    assert "values from layers['counts']" in capsys.readouterr().out
    assert (best.layers["counts"] != counts).nnz == 0


def test_h5ad_of_log2(cells, tmp_path):
    expected = logged(cells.X)
    cells.X = expected / np.float32(np.log(2))
    adata = datasets.load(save(cells, tmp_path), verbose=False)
    np.testing.assert_allclose(adata.X.toarray(), expected.toarray(), rtol=1e-5)


def test_h5ad_false_counts_layer_is_not_believed(cells, tmp_path, capsys):
    cells.layers["counts"] = logged(cells.X)
    cells.X = logged(cells.X)
    adata = datasets.load(save(cells, tmp_path))
    assert "values from X" in capsys.readouterr().out
    assert "counts" not in adata.layers


def test_h5ad_scaled_or_unclear_is_an_error(cells, tmp_path):
    dense = logged(cells.X).toarray()
    cells.X = dense - dense.mean(0)
    with pytest.raises(DataError, match="X is scaled.*layers\\['counts'\\]"):
        datasets.load(save(cells, tmp_path))
    cells.X = np.random.default_rng(0).uniform(0.1, 5, cells.shape)
    with pytest.raises(DataError, match="Cannot tell what kind.*uns\\['log1p'\\]"):
        datasets.load(save(cells, tmp_path))
    cells.uns["log1p"] = {}
    assert datasets.load(save(cells, tmp_path), verbose=False).shape == cells.shape


def test_h5ad_without_labels_is_clustered(cells, tmp_path, capsys):
    cells.obs["group"] = cells.obs.pop("cell_type")
    path = save(cells, tmp_path)
    adata = datasets.load(path)
    out = capsys.readouterr().out
    assert "Warning" in out and "Leiden" in out and "group" in out
    assert adata.obs["cell_type"].str.startswith("cluster ").all()
    assert adata.uns["dataset"]["labels"] == "leiden clusters of all cells"
    datasets.load(path, verbose=False)
    assert capsys.readouterr().out.startswith("Warning")
    known = datasets.load(path, label_key="group", verbose=False)
    assert capsys.readouterr().out == ""
    assert known.uns["dataset"]["labels"] == "given"
    assert set(known.obs["cell_type"]) == set(cells.obs["group"])


FIRST_ROW_0 = np.r_[0, np.ones(119)][:, None]


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lambda a: a.X.data.__setitem__(3, np.nan), "NaN or infinite"),
        (lambda a: a.X.data.__setitem__(3, np.inf), "NaN or infinite"),
        (lambda a: a.X.data.__setitem__(3, -4), "scaled"),
        (lambda a: a.X.__imul__(0), "empty"),
        (
            lambda a: setattr(a, "var_names", ["g"] * a.n_vars),
            "duplicate gene names.*'g'",
        ),
        (
            lambda a: setattr(a, "obs_names", ["c"] * a.n_obs),
            "duplicate cell names.*'c'",
        ),
        (
            lambda a: setattr(a, "obs", a.obs.assign(cell_type="T")),
            "one class only.*'T'",
        ),
        (
            lambda a: setattr(
                a, "obs", a.obs.assign(cell_type=[None, *a.obs["cell_type"][1:]])
            ),
            "1 of 120 cells",
        ),
        (lambda a: setattr(a, "X", a.X.multiply(FIRST_ROW_0).tocsr()), "cell001"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_h5ad_bad_input(cells, tmp_path, spoil, pattern):
    spoil(cells)
    with pytest.raises(DataError, match=pattern):
        datasets.load(save(cells, tmp_path))


def test_h5ad_columns_of_ones_own(cells, tmp_path, capsys):
    kinds = cells.obs.pop("cell_type")
    cells.obs["my_types"] = kinds.to_numpy()
    cells.obs["donor"] = np.resize(["d1", "d2"], cells.n_obs)
    file = save(cells, tmp_path)
    assert datasets.load(file).obs["cell_type"].nunique() > 0
    said = " ".join(capsys.readouterr().out.split())
    assert "column as label_key, such as my_types, donor" in said
    adata = datasets.load(file, label_key="my_types", batch_key="donor")
    assert list(adata.obs["cell_type"]) == list(kinds)
    assert list(adata.obs["batch"].cat.categories) == ["d1", "d2"]
    with pytest.raises(DataError, match="Did you mean 'donor'"):
        datasets.load(file, label_key="my_types", batch_key="doner")
    cells.obs.loc[cells.obs_names[0], "my_types"] = None
    with pytest.raises(DataError, match="no label in 'my_types'.*1 of 120 cells"):
        datasets.load(save(cells, tmp_path), label_key="my_types")


def test_h5ad_conditions_are_named_alike(cells, tmp_path, capsys):
    names = np.resize(["DMSO", "STAT1+ctrl", "SET+KLF1", "KLF1+SET"], cells.n_obs)
    cells.obs["condition"] = names
    cells.obs["cell_type"] = "K562"  # one type will do
    adata = datasets.load(save(cells, tmp_path))
    out = capsys.readouterr().out
    assert "read as perturbations: obs['condition'], 3 conditions" in out
    sizes = adata.obs["perturbation"].value_counts().to_dict()
    assert sizes == {"KLF1+SET": 60, "ctrl": 30, "STAT1": 30}
    assert adata.obs["condition"].tolist() == names.tolist()
    with pytest.raises(DataError, match="one class only"):
        datasets.check_anndata(adata, label_key="cell_type")
    # A column of the right name comes first; gaps stay, and what is no condition too.
    cells.obs["perturbation"] = np.resize(["NT", "CD4+", "B+A"], cells.n_obs)
    cells.obs.loc[cells.obs_names[0], "perturbation"] = None
    own = datasets.load(save(cells, tmp_path), verbose=False).obs["perturbation"]
    assert capsys.readouterr().out == ""
    assert own.cat.categories.tolist() == ["A+B", "CD4+", "ctrl"]
    assert own.isna().sum() == 1 and (own == "ctrl").sum() == 39


def test_h5ad_in_gears_layout_by_path(tmp_path, capsys):
    path = in_gears_layout(tmp_path / "mine.h5ad")
    adata = datasets.load(path)
    assert "var['gene_name'] names the genes" in capsys.readouterr().out
    assert adata.var_names.tolist() == ["KLF1", "SET", "SET-1"]
    assert adata.var["gene_id"].tolist() == ["ENSG1", "ENSG2", "ENSG3"]
    assert adata.obs["perturbation"].tolist() == CONDITIONS
    # Symbols in the index stay, whatever a column of that name holds.
    stored = ad.read_h5ad(path)
    stored.var = pd.DataFrame(
        {"gene_name": ["Kruppel-like factor 1", "SET", "other"]},
        index=["KLF1", "SET", "X"],
    )
    stored.write_h5ad(path)
    assert datasets.load(path, verbose=False).var_names.tolist() == ["KLF1", "SET", "X"]


def test_columns_of_a_file_without_reading_it(cells, tmp_path):
    path = save(cells, tmp_path)
    assert h5ad.obs_columns(path) == ["cell_type"]
    (tmp_path / "no.h5ad").write_text("no file")
    assert h5ad.obs_columns(tmp_path / "no.h5ad") == []
    old_h5ad(tmp_path / "old.h5ad", np.eye(3)[:, :2] + 1, np.full(3, 9.0))
    assert h5ad.obs_columns(tmp_path / "old.h5ad") == ["kind", "n"]


def test_h5ad_label_absent(cells, tmp_path):
    with pytest.raises(DataError, match="Did you mean 'cell_type'"):
        datasets.load(save(cells, tmp_path), label_key="celltype")


# --- the contract itself -----------------------------------------------------------


def test_check_anndata(cells):
    cells.X = logged(cells.X)
    datasets.check_anndata(cells, label_key="cell_type")
    with pytest.raises(DataError, match="needs raw counts.*no such layer"):
        datasets.check_anndata(cells, need_counts=True)
    cells.layers["counts"] = cells.X
    with pytest.raises(DataError, match="needs raw counts.*look log1p"):
        datasets.check_anndata(cells, need_counts=True)
    with pytest.raises(DataError, match="120 cells x 60 genes.*at least 200 cells"):
        datasets.check_anndata(cells, min_cells=200)
    with pytest.raises(DataError, match="0 genes"):
        datasets.check_anndata(cells[:, []])
    with pytest.raises(DataError, match="not an AnnData.*ndarray"):
        datasets.check_anndata(np.ones((3, 3)))


def test_a_gene_may_be_empty_and_coordinates_negative(cells):
    dense = logged(cells.X).toarray()
    dense[:, 5] = 0
    cells.X = sp.csr_matrix(dense)
    datasets.check_anndata(cells)
    points = blobs(50)
    assert points.X.min() < 0
    datasets.check_anndata(points, label_key="cell_type")
    points.uns["dataset"]["value_scale"] = "counts"
    with pytest.raises(DataError, match="negative values"):
        datasets.check_anndata(points)


def test_only_logarithms_are_expression(cells):
    counts = cells.X.copy()
    with pytest.raises(DataError, match="raw counts.*normalise.*layers\\['counts'\\]"):
        datasets.check_anndata(cells)
    cells.X = logged(counts)
    cells.X.data = np.expm1(cells.X.data)
    with pytest.raises(DataError, match="without the logarithm.*normalise"):
        datasets.check_anndata(cells)
    # What cannot be told is let through: a few genes, batches taken out.
    cells.X = np.random.default_rng(0).uniform(0.1, 5, cells.shape)
    datasets.check_anndata(cells)
    points = blobs(50)
    points.X = np.rint(points.X.toarray()) + 6
    datasets.check_anndata(points)
    del points.uns["dataset"]
    with pytest.raises(DataError, match="raw counts"):
        datasets.check_anndata(points)


@pytest.mark.parametrize("note", ["mine", None, 3, {"value_scale": "coordinates"}])
def test_what_is_not_our_card_is_no_card(cells, note):
    cells.uns["dataset"] = note
    assert card_of(cells) == {}
    cells.X = logged(cells.X)
    datasets.check_anndata(cells)


def test_a_card_is_known_after_writing_and_reading(tmp_path):
    points = blobs(50)
    assert card_of(points)["name"] == "blobs"
    points.write_h5ad(tmp_path / "points.h5ad")
    assert card_of(ad.read_h5ad(tmp_path / "points.h5ad"))["name"] == "blobs"


def test_as_labels_keeps_gaps():
    labels = as_labels(pd.Series([1, None, 2.5]))
    assert labels.isna().tolist() == [False, True, False]
    assert labels.cat.categories.tolist() == ["1.0", "2.5"]
