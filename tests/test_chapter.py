"""Parameters, claims, records and hashes of chapters."""

from __future__ import annotations

import json
import os
import random
import sys
import types

import numpy as np
import pandas as pd
import pytest
import torch

from scgenlib import chapter, records
from scgenlib.errors import ConfigError, DataError, DeviceError, OutputError

HINTS = {
    "profile": str,
    "seed": int,
    "device": str,
    "results_dir": str | None,
    "hidden": list[int],
    "use_log": bool,
    "leak": float,
}


@pytest.fixture
def namespace(tmp_path):
    """What a notebook holds after its parameters cell."""
    return {
        "__annotations__": dict(HINTS),
        "__name__": "__main__",
        "In": [""],
        "Out": {},
        "_i1": "seed: int = 0",
        "np": np,
        "profile": "tiny",
        "seed": 3,
        "device": "cpu",
        "results_dir": None,
        "hidden": [8],
        "use_log": True,
        "leak": 0.5,
    }


@pytest.fixture
def registry(monkeypatch):
    """Stand in for the data sets, so that these tests read no files."""
    tasks = {"pollen": ["demo"], "atlas": ["integration"]}
    fake = types.ModuleType("scgenlib.datasets")
    fake.names = lambda task=None: [n for n in tasks if not task or task in tasks[n]]
    fake.card = lambda name: {"name": name, "tasks": tasks[name]}
    fake.has_perturbation = lambda name: name == "atlas"

    def load(name, label_key=None, batch_key=None):
        import anndata

        adata = anndata.AnnData(np.ones((4, 2), np.float32))
        adata.obs["cell_type"] = pd.Categorical(["a", "a", "b", "b"])
        card = {"name": name, "value_scale": "log1p", "recipe": {}, "n_cells": 4}
        adata.uns["dataset"] = card | {"asked": (label_key, batch_key)}
        return adata

    fake.load = load
    monkeypatch.setitem(sys.modules, "scgenlib.datasets", fake)
    import scgenlib

    monkeypatch.setattr(scgenlib, "datasets", fake, raising=False)


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- start ----------------------------------------------------------------------


def test_start_casts_what_papermill_passes_as_text(namespace):
    namespace |= {"use_log": "false", "hidden": "[16, 8]", "seed": 7.0, "leak": 1}
    run = chapter.start(namespace, "demo")
    assert namespace["use_log"] is False
    assert namespace["hidden"] == [16, 8]
    assert namespace["seed"] == 7 and isinstance(namespace["seed"], int)
    assert namespace["leak"] == 1.0 and isinstance(namespace["leak"], float)
    assert (run.seed, run.profile, run.device.type) == (7, "tiny", "cpu")
    assert run.adata is None and run.card == {}


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (list[int], "16,8", [16, 8]),
        (list[int], 16, [16]),
        (list, "[1, 'a']", [1, "a"]),
        (tuple[float, ...], "(1, 2)", (1.0, 2.0)),
        (int | None, "none", None),
        (int | None, "12", 12),
        (str | None, None, None),
        (bool, 0, False),
        (float, "1e-3", 0.001),
        (int, 1e3, 1000),
        (str, 68, "68"),
        (dict, "{'a': 1}", {"a": 1}),
        ("list[int]", "3,4", [3, 4]),
    ],
)
def test_casts_by_hint(namespace, hint, value, expected):
    namespace["__annotations__"]["extra"] = hint
    namespace["extra"] = value
    chapter.start(namespace, "demo")
    assert namespace["extra"] == expected
    assert type(namespace["extra"]) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (bool, "maybe"),
        (bool, 2),
        (int, 1.5),
        (int, True),
        (int, "inf"),
        (float, "much"),
        (list[int], "[1, 'a']"),
        (list, "[1,"),
        (str, None),
        (int | None, "many"),
    ],
)
def test_value_of_the_wrong_type_is_named(namespace, hint, value):
    namespace["__annotations__"]["extra"] = hint
    namespace["extra"] = value
    with pytest.raises(ConfigError, match="'extra' cannot be read as") as caught:
        chapter.start(namespace, "demo")
    assert str(value) in str(caught.value)


def test_misspelt_parameter_stops_with_the_nearest_name(namespace):
    namespace["use_lgo"] = True
    with pytest.raises(ConfigError, match="'use_lgo'.*Did you mean 'use_log'"):
        chapter.start(namespace, "demo")


def test_names_of_ipython_and_imports_are_no_parameters(namespace):
    namespace |= {"exit": "x", "quit": "x", "_oh": {}, "pd": pd, "__doc__": "text"}
    assert chapter.start(namespace, "demo").chapter == "demo"


def test_second_start_tolerates_values_of_later_cells(namespace):
    chapter.start(namespace, "demo")
    namespace["threshold"] = 3
    assert chapter.start(namespace, "demo").seed == 3


def test_no_hints_is_an_error():
    with pytest.raises(ConfigError, match="no parameters"):
        chapter.start({"seed": 0}, "demo")


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("profile", "bok", ConfigError, "'bok'.*Did you mean 'book'"),
        ("seed", -1, ConfigError, "negative.*-1"),
        ("device", "gpu", DeviceError, "gpu"),
    ],
)
def test_bad_value(namespace, name, value, error, text):
    namespace[name] = value
    with pytest.raises(error, match=text):
        chapter.start(namespace, "demo")


def test_results_dir_is_made(namespace, tmp_path):
    namespace["results_dir"] = str(tmp_path / "new" / "results")
    run = chapter.start(namespace, "demo")
    assert run.results_dir == tmp_path / "new" / "results"
    assert list(run.results_dir.iterdir()) == []


def test_results_dir_that_cannot_be_made(namespace, tmp_path):
    (tmp_path / "file").write_text("in the way")
    namespace["results_dir"] = str(tmp_path / "file" / "results")
    with pytest.raises(OutputError, match="cannot be written"):
        chapter.start(namespace, "demo")


def test_start_seeds_every_generator(namespace):
    draws = []
    for _ in range(2):
        chapter.start(namespace, "demo")
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    assert torch.get_num_threads() == 2
    namespace["seed"] = 4
    chapter.start(namespace, "demo")
    assert torch.rand(1).item() != draws[0][2]


def test_start_loads_and_names_the_cells(namespace, registry, capsys):
    namespace["__annotations__"]["dataset"] = str
    namespace["dataset"] = "pollen"
    run = chapter.start(namespace, "demo", written_for="pollen")
    text = capsys.readouterr().out
    assert run.adata.n_obs == 4 and run.card["name"] == "pollen"
    assert "seed 3, profile tiny" in text
    assert "written for" not in text
    chapter.start(namespace, "demo", written_for="atlas")
    text = capsys.readouterr().out
    assert "written for 'atlas'; on 'pollen'" in text
    assert max(map(len, text.splitlines())) <= 75
    namespace["dataset"] = "atlas"
    chapter.start(namespace, "other", task="integration")


def test_start_hands_on_the_columns_of_ones_own_file(namespace, registry):
    namespace["__annotations__"] |= {"dataset": str, "label_key": str, "batch_key": str}
    namespace |= {"dataset": "pollen", "label_key": "my_types", "batch_key": ""}
    assert chapter.start(namespace, "demo").card["asked"] == ("my_types", None)


@pytest.mark.parametrize(
    ("dataset", "text"),
    [
        ("polen", "Unknown data set.*Did you mean 'pollen'"),
        ("simulated:polen", "Unknown data set.*Did you mean 'pollen'"),
        ("atlas", "does not serve.*'demo'.*data sets that do: pollen"),
        ("missing.h5ad", "no such .h5ad file"),
        ("missing.yml", "no such manifest"),
    ],
)
def test_bad_dataset(namespace, registry, tmp_path, dataset, text):
    namespace["__annotations__"]["dataset"] = str
    namespace["dataset"] = dataset
    namespace["results_dir"] = str(tmp_path / "never")
    with pytest.raises(DataError, match=text):
        chapter.start(namespace, "demo")
    assert not (tmp_path / "never").exists()


def test_a_screen_is_asked_for(registry, tmp_path):
    import anndata

    with pytest.raises(DataError, match="'pollen' has no perturbation.*STAT1.IRF1"):
        chapter.check_dataset("pollen", "regina")
    with pytest.raises(DataError, match="'simulated:atlas' has no pert.*draws no pert"):
        chapter.check_dataset("simulated:atlas", "regina")
    with pytest.raises(DataError, match="'atlas' does not serve.*'regina'"):
        chapter.check_dataset("atlas", "regina")
    path = tmp_path / "mine.h5ad"
    cells = anndata.AnnData(np.ones((4, 2), np.float32))
    for column, pattern in (
        ("treated", "no perturbation.*Found: .'treated'.*data sets that have: "),
        ("condition", None),
        ("perturbation", None),
    ):
        cells.obs = pd.DataFrame({column: list("abab")}, index=cells.obs_names)
        cells.write_h5ad(path)
        chapter.check_dataset(str(path), "demo")
        if pattern is None:
            chapter.check_dataset(str(path), "regina")
            continue
        with pytest.raises(DataError, match=pattern):
            chapter.check_dataset(str(path), "regina")


def test_the_public_screens_are_named():
    with pytest.raises(DataError, match="simulated_screen, kang, norman_subset, papal"):
        chapter.check_dataset("pollen", "regina")
    for name in ("simulated_screen", "papalexi", "norman"):
        chapter.check_dataset(name, "regina")


def test_simulated_twin_needs_no_task(namespace, registry):
    namespace["__annotations__"]["dataset"] = str
    namespace["dataset"] = "simulated:atlas"
    assert chapter.start(namespace, "demo").adata is not None


def test_misspelt_file_names_its_neighbour(namespace, registry, tmp_path):
    (tmp_path / "mine.h5ad").touch()
    namespace["__annotations__"]["dataset"] = str
    namespace["dataset"] = str(tmp_path / "mien.h5ad")
    with pytest.raises(DataError, match="Did you mean 'mine.h5ad'"):
        chapter.start(namespace, "demo")


def test_run_config_uses_the_profile(namespace):
    class Config:
        @classmethod
        def profile(cls, name, **overrides):
            return name, overrides

    run = chapter.start(namespace, "demo")
    assert run.config(Config, leak=0.3) == ("tiny", {"leak": 0.3})


# --- claims and run card --------------------------------------------------------


def test_claim_prints_one_comparable_line(capsys):
    assert chapter.claim("two is more than one", 2 > 1) is True
    assert chapter.claim("one is more than two", np.bool_(False)) is False
    assert chapter.claim("tensors agree", torch.tensor(True)) is True
    assert capsys.readouterr().out.splitlines() == [
        "holds          | two is more than one",
        "does not hold  | one is more than two",
        "holds          | tensors agree",
    ]


def test_a_long_claim_goes_on_below_its_beginning(capsys):
    sentence = "the mean of the arms with added cells buys recall with precision"
    chapter.claim(sentence, True)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("holds          | the mean") and len(first) <= 75
    assert second.startswith(" " * 17 + "precision")
    assert f"{first[17:]} {second.strip()}" == sentence


@pytest.mark.parametrize("condition", [float("nan"), 1, None, "yes"])
def test_claim_refuses_what_is_no_verdict(condition):
    with pytest.raises(TypeError, match="one yes or no"):
        chapter.claim("anything", condition)


def test_run_card_counts_the_verdicts(namespace, capsys):
    run = chapter.start(namespace, "demo")
    chapter.claim("a", True)
    chapter.claim("b", False)
    capsys.readouterr()
    chapter.run_card(run)
    text = capsys.readouterr().out
    assert "1 hold, 1 do not hold" in text and "does not hold: b" in text
    assert f"scgenlib {records.versions()['scgenlib']}" in text
    assert max(map(len, text.splitlines())) <= 75
    chapter.start(namespace, "demo")
    capsys.readouterr()
    chapter.run_card(run)
    assert "0 hold, 0 do not hold" in capsys.readouterr().out


# --- records --------------------------------------------------------------------


def write(folder, rows=({"seed": 0, "coverage": 0.5},), **extra):
    path = records.record_path("demo", "pollen", "dial", folder)
    return records.write_record(
        path,
        rows,
        {"n_steps": 5},
        device="cpu",
        seconds=1.25,
        data_hash="abc",
        modules=["errors"],
        **extra,
    )


def test_record_round_trip(tmp_path):
    path = write(tmp_path, repeats=3)
    assert path.name == "demo-pollen-dial.json"
    record = chapter.recorded("demo", "pollen", "dial", tmp_path)
    assert record.table().to_dict("records") == [{"seed": 0, "coverage": 0.5}]
    assert record.config == {"n_steps": 5}
    provenance = record.provenance
    assert provenance["seconds"] == 1.25 and provenance["device"] == "cpu"
    assert provenance["data_hash"] == "abc" and provenance["repeats"] == 3
    assert provenance["modules"] == ["errors"]
    assert provenance["peak_memory_mb"] > 50
    assert record.is_current()
    assert "in 1 s" in record.describe() and "seed" not in record.describe()
    write(tmp_path, profile="tiny", n_seeds=1)
    record = chapter.recorded("demo", "pollen", "dial", tmp_path)
    assert "with profile tiny, 1 seed, on cpu" in record.describe()


def test_record_of_an_own_file_is_shown_for_its_own_cells(tmp_path, capsys):
    import anndata

    file = str(tmp_path / "mine.h5ad")
    cells = anndata.AnnData(np.ones((4, 2), np.float32))
    cells.obs["cell_type"] = list("aabb")
    other = cells.copy()
    other.X[0, 0] = 2
    relabelled = cells.copy()
    relabelled.obs["cell_type"] = list("abab")
    path = records.record_path("demo", file, "dial", tmp_path)
    about = {"device": "cpu", "seconds": 1, "modules": ["errors"], "n_cells": 4}
    digest = records.cells_hash(cells)
    records.write_record(path, [{"seed": 0}], {}, data_hash=digest, **about)
    for held, is_shown in ((cells, True), (other, False), (relabelled, False)):
        run = chapter.Run("demo", held, file, "tiny", 0, torch.device("cpu"), tmp_path)
        found = run.recorded("dial")
        assert (found is not None and found.is_own()) == is_shown
        assert ("from other cells or labels" in capsys.readouterr().out) != is_shown


def test_line_that_makes_a_record_of_an_own_file_names_its_columns(tmp_path, capsys):
    import anndata

    file = str(tmp_path / "mine.h5ad")
    cells = anndata.AnnData(np.ones((40, 9), np.float32))
    cells.X[:20, :4] = 3
    cells.obs["my types"] = ["a"] * 20 + ["b"] * 20
    cells.layers["counts"] = cells.X.copy()
    cells.write_h5ad(file)
    names = {"dataset": str, "label_key": str, "results_dir": str}
    given = {"dataset": file, "label_key": "my types", "results_dir": str(tmp_path)}
    run = chapter.start({"__annotations__": names, **given}, "garage")
    assert run.recorded("dial") is None
    line = f"make results CHAPTER=garage DATASET={file} 'LABEL_KEY=my types'"
    assert line in capsys.readouterr().out


def test_data_sets_that_have_a_record(tmp_path):
    for name in ("pollen", "sc_mixology/cellmix1", "simulated:yan"):
        records.record_path("demo", name, "dial", tmp_path).write_text("{}")
    records.record_path("demo", "mine.h5ad", "dial", tmp_path).write_text("{}")
    records.record_path("demo", "pollen", "contest", tmp_path).write_text("{}")
    found = chapter.recorded_on("demo", "dial", tmp_path)
    assert found == ["pollen", "sc_mixology_cellmix1", "simulated_yan"]
    # What is found is a name that `recorded` takes.
    assert {records.record_path("demo", name, "dial", tmp_path) for name in found} <= (
        set(tmp_path.iterdir())
    )


def test_record_of_numpy_rows_and_missing_values(tmp_path):
    rows = pd.DataFrame({"a": np.array([1.5, np.nan]), "b": np.array([1, 2])})
    document = json.loads(write(tmp_path, rows).read_text())
    assert document["rows"] == [{"a": 1.5, "b": 1}, {"a": None, "b": 2}]


def test_absent_record_prints_the_line_that_makes_it(tmp_path, capsys):
    assert chapter.recorded("demo", "yan", "dial", tmp_path) is None
    assert "make results CHAPTER=demo DATASET=yan" in capsys.readouterr().out


def test_unreadable_record_says_what_to_do(tmp_path):
    write(tmp_path).write_text("{")
    with pytest.raises(DataError, match="demo-pollen-dial.json.*Delete it"):
        chapter.recorded("demo", "pollen", "dial", tmp_path)


def test_record_is_whole_or_absent(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        ("simulated:pollen", "demo-simulated_pollen-dial.json"),
        ("sc_mixology/cellmix1", "demo-sc_mixology_cellmix1-dial.json"),
    ],
)
def test_record_names_are_file_names(tmp_path, dataset, name):
    assert records.record_path("demo", dataset, "dial", tmp_path).name == name


def test_files_of_ones_own_take_no_records_of_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        records.record_path("demo", dataset, "dial").name
        for dataset in ("pollen", "a/pollen.h5ad", "b/pollen.h5ad", "pollen.h5ad")
    }
    assert len(names) == 4 and "demo-pollen-dial.json" in names
    # The same file, however it is written.
    here = records.record_path("demo", str(tmp_path / "pollen.h5ad"), "dial").name
    assert here in names


def test_results_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SCGENLIB_RESULTS_DIR", str(tmp_path))
    assert records.results_root() == tmp_path


# --- hashes ---------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A small package in scgenlib's place, whose code can be edited."""
    files = {
        "errors.py": "class Wrong(ValueError):\n    pass\n",
        "nets.py": '"""Doc."""\nfrom scgenlib.errors import Wrong\nX = 1  # one\n',
        "garage.py": "def fit():\n    from . import nets\n    return nets.X\n",
        "metrics/__init__.py": "from .clustering import ari\n",
        "metrics/clustering.py": "from ..errors import Wrong\ndef ari(): ...\n",
        "metrics/generation.py": "import scgenlib.nets\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(records, "_PACKAGE", tmp_path)
    return tmp_path


def notebook(folder, *cells):
    path = folder / "chapter.ipynb"
    content = [
        {"cell_type": "code", "metadata": {}, "source": text.splitlines(True)}
        for text in cells
    ]
    path.write_text(json.dumps({"cells": content}))
    return path


@pytest.mark.parametrize(
    ("cell", "modules"),
    [
        ("from scgenlib import GARAGE", ["errors", "garage", "nets"]),
        ("import scgenlib as sg\nsg.GARAGE()", ["errors", "garage", "nets"]),
        ("import scgenlib\nscgenlib.nets.X", ["errors", "nets"]),
        (
            "from scgenlib.metrics import ari",
            ["errors", "metrics", "metrics.clustering"],
        ),
        (
            "import scgenlib.metrics.generation as g",
            ["errors", "metrics", "metrics.clustering", "metrics.generation", "nets"],
        ),
        ("%matplotlib inline\nfrom scgenlib.errors import Wrong", ["errors"]),
        ("import numpy as np\nnp.nets", []),
    ],
)
def test_imports_are_followed(package, cell, modules):
    assert records.imported_modules(notebook(package, cell)) == modules


def test_hash_ignores_docstrings_and_comments_only(package):
    before = records.code_hash(["nets"])
    text = (package / "nets.py").read_text()
    (package / "nets.py").write_text(text.replace("Doc.", "Other.") + "# note\n")
    assert records.code_hash(["scgenlib.nets"]) == before
    (package / "nets.py").write_text(text.replace("X = 1", "X = 2"))
    assert records.code_hash(["nets"]) != before


def test_notebook_hash_sees_its_code_and_the_package(package):
    path = notebook(package, "from scgenlib import GARAGE", "x = 1  ")
    before = records.notebook_hash(path)
    notebook(package, "from scgenlib import GARAGE", "x = 1")
    assert records.notebook_hash(path) == before
    notebook(package, "from scgenlib import GARAGE", "x = 2")
    assert records.notebook_hash(path) != before
    notebook(package, "from scgenlib import GARAGE", "x = 1")
    (package / "errors.py").write_text("class Wrong(TypeError):\n    pass\n")
    assert records.notebook_hash(path) != before
    (package / "metrics/clustering.py").write_text("def ari(): return 1\n")
    after = records.notebook_hash(path)
    (package / "metrics/clustering.py").write_text("def ari(): return 2\n")
    assert records.notebook_hash(path) == after


def test_hash_of_an_unknown_module():
    with pytest.raises(ConfigError, match="no such module.*'nest'"):
        records.code_hash(["nest"])


def test_hash_of_the_real_package():
    modules = records.code_hash(["chapter"]), records.code_hash(["errors"])
    assert all(len(h) == 64 for h in modules) and modules[0] != modules[1]


def test_a_record_follows_the_code_that_makes_numbers(tmp_path):
    about = {"device": "cpu", "seconds": 1, "data_hash": "", "modules": ["baselines"]}
    records.write_record(tmp_path / "a.json", [{"seed": 0}], {}, **about)
    made = json.loads((tmp_path / "a.json").read_text())["provenance"]["modules"]
    assert {"baselines", "_matrix", "imputers"} <= set(made)
    assert not {"errors", "words", "plots", "figure", "files", "download"} & set(made)
