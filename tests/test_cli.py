"""The command line: what it accepts, what it refuses, what it leaves behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import anndata as ad
import nbformat
import numpy as np
import pytest
import scipy.sparse as sp

import scgenlib
from scgenlib import cli
from scgenlib.errors import ConfigError, ModelFileError, OutputError

PARAMETERS = """dataset: str = "pbmc68k_reduced"  # name or path
profile: str = "tiny"  # size
seed: int = 0  # any whole number from 0
device: str = "cpu"  # auto, cpu, cuda
results_dir: str | None = None  # recorded runs
layers: list[int] = [4, 2]  # widths"""


def write_chapter(folder: Path, *code: str, name: str = "garage") -> Path:
    """Write a chapter with the usual parameters cell and `code`."""
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(text) for text in code]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a book of one chapter, with the parent as current folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "book"
    write_chapter(folder, "print(dataset, seed + 1, sum(layers))")
    return folder


def run(*arguments: str) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"scgenlib {scgenlib.__version__}\n"


def test_help_needs_no_heavy_package():
    code = (
        "import sys; from scgenlib import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'scanpy', 'papermill', 'pandas', 'umap'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_run_chooses_a_path_and_leaves_the_chapter_alone(book, tmp_path, capsys):
    chapter = book / "garage.ipynb"
    before = chapter.read_bytes()
    arguments = ["-p", "seed", "6", "-p", "layers", "[3, 4]", "--book", book]
    assert run("run", "garage", *arguments) == 0
    printed = capsys.readouterr().out.strip()
    assert re.fullmatch(r"runs/garage-pbmc68k_reduced-\d{8}-\d{6}\.ipynb", printed)
    notebook = nbformat.read(tmp_path / printed, as_version=4)
    outputs = [o.text for c in notebook.cells for o in c.get("outputs", [])]
    assert outputs == ["pbmc68k_reduced 7 7\n"]
    assert chapter.read_bytes() == before
    assert [p.name for p in (tmp_path / "runs").iterdir()] == [Path(printed).name]


def test_run_fails_with_the_error_and_keeps_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_chapter(tmp_path / "book", "print('first')", "1 / 0", "print('never')")
    status = run("run", "garage", "--book", tmp_path / "book", "-o", "out/x.ipynb")
    assert status == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero" in error
    assert "Traceback" not in error
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x.ipynb"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["garge"], ["Unknown chapter", "'garge'", "Did you mean 'garage'?"]),
        (["garage", "-p", "datset", "yan"], ["Unknown parameter", "'dataset'"]),
        (["garage", "-p", "dataset", "polen"], ["Unknown data set", "'pollen'"]),
        (["garage", "-p", "profile", "huge"], ["Unknown profile", "'huge'", "paper"]),
        (["garage", "-p", "seed", "one"], ["'seed'", "'one'", "a whole number"]),
        (["garage", "-p", "seed", "-1"], ["'seed'", "-1"]),
        (["garage", "-p", "seed", "1", "-p", "seed", "2"], ["given twice", "seed"]),
        (["garage", "-p", "device", "quantum"], ["device", "'quantum'", "cpu"]),
        (["garage", "-p", "dataset", "no.h5ad"], [".h5ad", "'no.h5ad'"]),
        (["garage", "-o", "out.html"], ["not a notebook", "out.html"]),
        (["garage", "-o", "book/garage.ipynb"], ["overwrite the book"]),
    ],
)
def test_run_refuses_in_one_line_before_anything_starts(
    book, tmp_path, capsys, monkeypatch, arguments, words
):
    def never(*_: object) -> int:
        raise AssertionError("the chapter was started")

    monkeypatch.setattr(cli, "_execute", never)
    assert run("run", *arguments, "--book", book) == 2
    error = capsys.readouterr().err
    assert error.startswith("scgenlib: ") and error.count("\n") == 1
    for word in words:
        assert word in error
    assert [p.name for p in tmp_path.iterdir()] == ["book"]


def test_run_refuses_a_data_set_that_does_not_serve_the_task(tmp_path, capsys):
    from scgenlib import datasets

    book = tmp_path / "book"
    write_chapter(
        book, 'run = chapter.start(globals(), "toy",\n    task="garage")', name="toy"
    )
    assert "garage" not in datasets.card("pbmc68k")["tasks"]
    assert run("run", "toy", "-p", "dataset", "pbmc68k", "--book", book) == 2
    error = capsys.readouterr().err
    assert "'garage'" in error and "pollen" in error


def test_run_says_when_the_output_folder_cannot_be_made(book, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("run", "garage", "--book", book, "-o", "file/sub/x.ipynb") == 2
    assert "cannot be made" in capsys.readouterr().err


def test_default_output_of_a_file_is_named_after_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = cli._output_file(None, tmp_path / "book", "toy", "/data/my cells.h5ad")
    assert re.fullmatch(r"toy-my_cells-[\d-]+\.ipynb", output.name)


def test_run_repeats_what_changes_its_meaning(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_chapter(tmp_path / "book", "print('fine')\nprint('Warning: clusters')")
    assert run("run", "garage", "--book", "book", "-o", "out.ipynb") == 0
    said = capfd.readouterr().err
    assert "scgenlib: Warning: clusters" in said and "fine" not in said


def test_datasets_list_and_card(capsys):
    assert run("datasets", "list") == 0
    short = capsys.readouterr().out
    assert "pbmc68k_reduced" in short and "licence" not in short
    assert run("datasets", "list", "--long") == 0
    assert "licence" in capsys.readouterr().out
    assert run("datasets", "card", "pollen") == 0
    assert "n_cells: 299" in capsys.readouterr().out
    assert run("datasets", "card", "polen") == 2
    assert "Did you mean 'pollen'?" in capsys.readouterr().err


def test_datasets_verify_tells_a_wrong_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCGENLIB_DATA_DIR", str(tmp_path))
    (tmp_path / "pollen").mkdir()
    (tmp_path / "pollen" / "pollen.rda").write_bytes(b"not it")
    assert run("datasets", "verify", "pollen") == 1
    printed = capsys.readouterr().out
    assert "differs" in printed and "b7b3e69ca63999e8" in printed
    assert run("datasets", "verify", "pbmc68k_reduced") == 0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["500"], 500),
        (["CD4 T=500", "pDC=50"], {"CD4 T": 500, "pDC": 50}),
        (["a=b=3"], {"a=b": 3}),
        (["1000", "500", "0", "200"], [1000, 500, 0, 200]),
        (["T=0", "B=1"], {"T": 0, "B": 1}),
    ],
)
def test_cells(given, expected):
    assert cli._cells(given) == expected


@pytest.mark.parametrize("given", [["-3"], ["x"], ["T="], ["5", "T=3"],
                                   ["T=1", "T=2"], ["2.5"]])  # fmt: skip
def test_cells_refused(given):
    with pytest.raises(ConfigError, match="--cells"):
        cli._cells(given)


def tiny_cells() -> ad.AnnData:
    """Return 40 cells of two types."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b"], [30, 10])
    counts = rng.poisson(2.0 + 3.0 * (labels == "b")[:, None], (40, 12))
    adata = ad.AnnData(sp.csr_matrix(np.log1p(counts).astype(np.float32)))
    adata.var_names = [f"g{j}" for j in range(12)]
    adata.obs["cell_type"] = labels
    adata.obs["cell_type"] = adata.obs["cell_type"].astype("category")
    return adata


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = scgenlib.GARAGEConfig.profile("tiny")
    model = scgenlib.GARAGE(config, seed=5, device="cpu").fit(tiny_cells())
    return model.save(tmp_path_factory.mktemp("models") / "garage")


def test_generate_writes_cells_of_the_model(model_folder, tmp_path, capsys):
    output = tmp_path / "new" / "cells.h5ad"
    arguments = ["--model", model_folder, "--cells", 7, "--seed", 3, "-o", output]
    assert run("generate", *arguments) == 0
    assert capsys.readouterr().out.startswith("7 cells, 12 genes")
    cells = ad.read_h5ad(output)
    assert cells.shape == (7, 12)
    assert list(cells.var_names) == [f"g{j}" for j in range(12)]
    assert [p.name for p in output.parent.iterdir()] == ["cells.h5ad"]
    again = scgenlib.GARAGE.load(model_folder, device="cpu").generate(7, seed=3)
    np.testing.assert_allclose(cells.X.toarray(), again.X.toarray(), rtol=1e-6)
    # Without --seed the model's own seed draws the cells.
    assert run("generate", "--model", model_folder, "--cells", 7, "-o", output) == 0
    own = scgenlib.GARAGE.load(model_folder, device="cpu").generate(7)
    assert ad.read_h5ad(output).uns["scgenlib"]["generate_seed"] == 5
    np.testing.assert_allclose(ad.read_h5ad(output).X.toarray(), own.X.toarray())


def test_generate_refuses(model_folder, tmp_path, capsys):
    output = tmp_path / "cells.h5ad"
    base = ["generate", "-o", output]
    assert run(*base, "--model", model_folder, "--cells", "a=5") == 2
    assert "one number" in capsys.readouterr().err
    assert run(*base, "--model", tmp_path, "--cells", "5") == 2
    assert "no readable model" in capsys.readouterr().err
    wrong = ["generate", "-o", tmp_path / "x.csv", "--model", model_folder]
    assert run(*wrong, "--cells", "5") == 2
    assert "*.h5ad" in capsys.readouterr().err
    assert not output.exists()


@pytest.fixture(scope="module")
def typed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    adata = tiny_cells()
    adata.layers["counts"] = adata.X.expm1().rint()
    adata.obs["batch"] = ["b1", "b2"] * 20
    tiny = {"max_steps": 2, "min_cells": 0, "extra_conditions": ("batch",)}
    config = scgenlib.CscGANConfig.profile("tiny", **tiny)
    model = scgenlib.CscGAN(config, seed=5, device="cpu").fit(adata)
    return model.save(tmp_path_factory.mktemp("models") / "cscgan")


def test_generate_cells_of_a_type(typed_folder, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    base = ["generate", "--model", typed_folder, "-o", output]
    # The flag may be given again; each time adds a type.
    assert run(*base, "--cells", "b=4", "--cells", "a=3") == 0
    cells = ad.read_h5ad(output)
    assert cells.obs["cell_type"].tolist() == ["b"] * 4 + ["a"] * 3
    assert list(cells.var_names) == [f"g{j}" for j in range(12)]
    assert set(cells.uns["scgenlib"]["memorisation"]) >= {"distance_ratio"}
    assert run(*base, "--cells", "0", "2", "--counts", "--given", "batch=b2") == 0
    cells = ad.read_h5ad(output)
    assert cells.obs["cell_type"].tolist() == ["b", "b"]
    assert cells.obs["batch"].tolist() == ["b2", "b2"]
    counts = cells.layers["counts"].toarray()
    assert counts.sum() > 0 and (counts == counts.round()).all()
    capsys.readouterr()
    for wrong, told in (
        (["--cells", "c=3"], "Unknown type. Found: 'c'"),
        (["--cells", "1", "2", "3"], "one number for each type"),
        (["--cells", "3", "--given", "batch"], "NAME=VALUE"),
        (["--cells", "3", "--given", "batch=b3"], "b1"),
    ):
        assert run(*base, *wrong) == 2
        assert told in capsys.readouterr().err


def test_generate_refuses_what_a_method_has_no_use_for(model_folder, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    base = ["generate", "--model", model_folder, "-o", output, "--cells", "3"]
    assert run(*base, "--counts") == 2
    assert "no use for --counts" in capsys.readouterr().err
    assert not output.exists()


def test_generate_names_an_unknown_method(model_folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    about = json.loads((model_folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**about, "method": "future"}))
    with pytest.raises(ModelFileError, match="future"):
        cli._model_class(other)


def test_unwritable_parent_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        cli._make_folder(tmp_path / "file" / "below")
