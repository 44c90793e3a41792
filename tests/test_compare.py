"""The side-by-side runs give every arm the same cells, and the rule reads them."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scgenlib import chapter, records, training

REPO = Path(__file__).resolve().parent.parent
CONTROLS = {"copy", "jitter", "SMOTE", "PC Gaussian", "gene shuffle", "NB per type"}
NETWORKS = {"scGAN", "cscGAN", "GARAGE"}
CODERS = {"scVI-like", "scAtlasVAE", "scGACL"}
JUDGED = {"w1", "sliced_wasserstein", "mmd2", "auroc", "precision", "recall",
          "density", "coverage", "gene_means", "gene_pairs", "ratio",
          "heldout_ratio", "duplicates", "membership_auc"}  # fmt: skip
MIXED = {"nmi_kmeans", "ari_kmeans", "ilisi", "kbet", "same_batch_share_within",
         "batch_predictability", "ari_mean", "ari_best", "ari_grid",
         "transfer_accuracy", "transfer_macro_f1"}  # fmt: skip


@pytest.fixture(scope="module")
def compare() -> Any:
    """Return the script of the comparisons, as a module."""
    folder = str(REPO / "experiments")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("compare")
    finally:
        sys.path.remove(folder)
        sys.modules.pop("compare", None)


def lab_of(compare: Any, cells: AnnData, **changed: Any) -> Any:
    few = {"steps": 8, "critic_updates": 2, "n_trees": 10, "epochs": 3}
    config = compare.CompareConfig.profile("tiny", **{**few, "n_genes": 60, **changed})
    return compare.Lab(cells, config, "tiny", 0, "cpu")


# ------------------------------------------------------------------ generators


@pytest.fixture(scope="module")
def made(compare: Any, small_atlas: AnnData) -> Any:
    """Return the rows of the generators, and what each of them was scored on."""
    seen: list[tuple[AnnData, AnnData, AnnData]] = []
    usual = compare.score

    def spy(cells: AnnData, train: AnnData, test: AnnData, config: Any) -> Any:
        seen.append((cells, train, test))
        return usual(cells, train, test, config)

    lab = lab_of(compare, compare.drawn(small_atlas, 300))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "score", spy)
        rows = compare.generators(lab)
    return SimpleNamespace(rows=rows, seen=seen, lab=lab)


def test_every_generator_has_every_metric(made):
    table = pd.DataFrame(made.rows).set_index("arm")
    assert set(table.index) == {"real"} | CONTROLS | NETWORKS
    assert set(table.columns) >= JUDGED
    assert np.isfinite(table[sorted(JUDGED)].to_numpy(float)).all()
    assert set(table.index[table["kind"] == "network"]) == NETWORKS
    nets = table.loc[sorted(NETWORKS)]
    assert (nets["cpu_seconds"] > 0).all()
    assert all(len(curve) >= 8 for curve in nets["distance_curve"])
    assert nets["converged"].map(type).eq(bool).all()


def test_every_generator_gets_the_same_cells(made):
    arms = [row["arm"] for row in made.rows]
    sets = dict(zip(arms, made.seen, strict=True))
    _, train, test = sets["copy"]
    assert not set(train.obs_names) & set(test.obs_names)
    for arm, (cells, seen, unseen) in sets.items():
        assert list(cells.var_names) == list(train.var_names), arm
        assert list(unseen.obs_names) == list(test.obs_names), arm
        if arm != "real":
            assert list(seen.obs_names) == list(train.obs_names), arm
            assert cells.n_obs == train.n_obs, arm
    real, rest, _ = sets["real"]
    assert set(real.obs_names) | set(rest.obs_names) == set(train.obs_names)
    assert not set(real.obs_names) & set(rest.obs_names)
    assert len({(r["n_train"], r["n_heldout"], r["n_genes"]) for r in made.rows}) == 1
    assert len({row["n_compared"] for row in made.rows}) == 1


def test_all_cells_are_on_one_scale(made):
    for cells, train, test in made.seen[:2]:
        for part in (cells, train, test):
            totals = np.expm1(part.X.toarray()).sum(1)
            np.testing.assert_allclose(totals, 1e4, rtol=1e-3)


def test_critics_see_as_many_real_cells(compare, made):
    c = made.lab.config
    nets = [row for row in made.rows if row["kind"] == "network"]
    assert {row["cells_seen"] for row in nets} == {
        c.steps * c.critic_updates * c.batch_size
    }
    for arm, model in compare.networks(made.lab).items():
        own = model.config
        steps = own.gan_total_iters if arm == "GARAGE" else own.max_steps
        updates = own.nd_steps if arm == "GARAGE" else own.critic_updates
        budget = (c.steps, c.critic_updates, c.batch_size)
        assert (steps, updates, own.batch_size) == budget


def test_controls_come_out_as_they_must(made):
    table = pd.DataFrame(made.rows).set_index("arm")
    assert table.loc["copy", "duplicates"] == 1
    assert table.loc["copy", "ratio"] == pytest.approx(0, abs=1e-6)
    assert abs(table.loc["gene shuffle", "gene_pairs"]) < 0.3
    assert table.loc["real", "gene_pairs"] > table.loc["gene shuffle", "gene_pairs"]
    assert 0.8 < table.loc["real", "ratio"] < 1.2


# --------------------------------------------------------------------- latents


@pytest.fixture(scope="module")
def coded(compare: Any, small_atlas: AnnData) -> Any:
    lab = lab_of(compare, compare.drawn(small_atlas, 300))
    return pd.DataFrame(compare.latents(lab)).set_index("arm")


def test_every_code_has_every_metric(compare, coded):
    assert set(coded.index) == {"PCA", "Harmony", "noise", "types alone"} | CODERS
    assert set(coded.columns) >= MIXED
    numbers = sorted(MIXED - {"ari_grid"})
    assert np.isfinite(coded[numbers].to_numpy(float)).all()
    assert coded["n_cells"].nunique() == coded["n_latent"].nunique() == 1
    assert all(len(grid) == len(compare.RESOLUTIONS) for grid in coded["ari_grid"])
    assert coded.loc[sorted(CODERS), "cells_seen"].gt(0).all()
    # A total without one of its parts would be read as that of the chapter.
    assert not {"bio", "batch", "total"} & set(coded.columns)


def test_blind_spots_show(coded):
    assert coded.loc["types alone", "nmi_kmeans"] > 0.95
    assert abs(coded.loc["noise", "ari_mean"]) < 0.1
    chance = coded.loc["noise", "same_batch_chance_within"]
    for arm in ("noise", "types alone"):
        share = coded.loc[arm, "same_batch_share_within"]
        assert share == pytest.approx(chance, abs=0.08)


def test_networks_see_no_label(compare, small_atlas):
    lab = lab_of(compare, small_atlas)
    cells = compare.bare(lab)
    other = cells.copy()
    order = np.random.default_rng(1).permutation(other.n_obs)
    other.obs["cell_type"] = other.obs["cell_type"].to_numpy()[order]
    for make in (compare.atlas, compare.gacl):
        first, second = make(lab, cells)[0], make(lab, other)[0]
        np.testing.assert_array_equal(np.asarray(first.X), np.asarray(second.X))


def test_labels_are_carried_from_other_batches_only(compare):
    rng = np.random.default_rng(0)
    kind = np.tile(["a", "b"], 100)
    batch = np.repeat(["one", "two"], 100)
    obs = pd.DataFrame({"cell_type": kind, "batch": batch}).astype("category")
    obs.index = [f"c{i}" for i in range(200)]
    side = np.where(kind == "a", 1.0, -1.0)
    apart = np.where(batch == "one", side, -side)[:, None]
    noise = 0.01 * rng.normal(size=(200, 2))
    right = AnnData((side[:, None] + noise).astype(np.float32), obs=obs)
    wrong = AnnData((apart + noise).astype(np.float32), obs=obs)
    assert compare.carried(right)["transfer_accuracy"] == 1
    # Within a batch these types lie apart; a neighbour of one's own would know.
    assert compare.carried(wrong)["transfer_accuracy"] == 0


# ----------------------------------------------------------------- the records


def test_a_seed_that_stands_is_not_made_again(
    compare, small_atlas, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "mine.h5ad"
    small_atlas.write_h5ad(path)
    calls = []

    def quick(lab: Any) -> Any:
        calls.append(lab.seed)
        return [{"seed": lab.seed, "arm": "copy", "auroc": 0.123456789}]

    monkeypatch.setattr(compare, "EXPERIMENTS", {"generators": quick})
    monkeypatch.setattr(compare, "allowed", lambda cells: ["generators"])
    line = ["--dataset", str(path), "--profile", "tiny", "--device", "cpu"]
    line += ["--results-dir", str(tmp_path / "out")]
    compare.main([*line, "--seeds", "1"])
    compare.main([*line, "--seeds", "2"])
    assert calls == [0, 1]
    assert "stands in the record" in capsys.readouterr().out
    found = chapter.recorded("compare", str(path), "generators", tmp_path / "out")
    assert [row["seed"] for row in found.rows] == [0, 1]
    assert found.rows[0]["auroc"] == 0.123457
    assert found.config["steps"] == 20 and found.is_current()


def test_latents_need_two_batches(compare, small_atlas):
    assert compare.allowed(small_atlas) == ["generators", "latents"]
    one = small_atlas[small_atlas.obs["batch"] == small_atlas.obs["batch"].iloc[0]]
    assert compare.allowed(one.copy()) == ["generators"]


# ---------------------------------------------------------- the rule, the guide


@pytest.fixture
def page(tmp_path: Path) -> dict[str, Any]:
    """Return what the page defines, its records being in an empty folder."""
    notebook = nbformat.read(REPO / "book" / "compare.ipynb", as_version=4)
    kept: list[ast.stmt] = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        for node in ast.parse(cell.source).body:
            constant = (
                isinstance(node, (ast.Assign, ast.AugAssign))
                and "QUESTIONS" in (ast.unparse(node)[:40])
            )
            constant |= isinstance(node, ast.Assign) and ast.unparse(
                node.targets[0]
            ) in ("NETWORKS", "REFERENCES", "SAME_CELLS", "ONE_OF", "no_labels",
                  "new_batch", "stranger", "blind")  # fmt: skip
            if constant or isinstance(node, ast.FunctionDef):
                kept.append(node)
    scope: dict[str, Any] = {
        "np": np, "pd": pd, "chapter": chapter, "training": training,
        "where": tmp_path,
    }  # fmt: skip
    exec(compile(ast.Module(kept, []), "compare.ipynb", "exec"), scope)
    return scope


def rows_of(gaps: list[float], network: str = "scGAN") -> list[dict[str, Any]]:
    base = np.random.default_rng(0).normal(0.5, 0.2, len(gaps))
    rows = [{"seed": s, "arm": "SMOTE", "f1": b} for s, b in enumerate(base)]
    pairs = enumerate(zip(base, gaps, strict=True))
    return rows + [{"seed": s, "arm": network, "f1": b + g} for s, (b, g) in pairs]


@pytest.mark.parametrize(
    ("gaps", "higher", "ahead"),
    [
        # Seeds differ by far more than arms: only pairs can show the gap.
        ([0.10, 0.12, 0.09, 0.11, 0.10], True, "network"),
        ([0.10, 0.12, 0.09, 0.11, 0.10], False, "simple"),
        ([-0.10, -0.12, -0.09], True, "simple"),
        ([0.10, -0.10, 0.05, -0.02, 0.00], True, "level"),
        ([0.010, 0.012, 0.009, 0.011], True, "level"),
        ([0.10, 0.12], True, "too few seeds"),
        ([0.10], True, "too few seeds"),
        ([0.0, 0.0, 0.0], True, "level"),
    ],
)
def test_the_rule(page, gaps, higher, ahead):
    found = page["verdict"](pd.DataFrame(rows_of(gaps)), "f1", higher=higher)
    assert found["ahead"] == ahead
    assert (found["network"], found["simple"]) == ("scGAN", "SMOTE")
    sign = 1 if higher else -1
    assert found["gap"] == pytest.approx(sign * np.mean(gaps))
    assert found["seeds"] == len(gaps)


def test_references_and_unfinished_arms_stand_for_no_side(page):
    rows = rows_of([0.1, 0.1, 0.1])
    rows += [{"seed": s, "arm": "real", "f1": 1.0} for s in range(3)]
    rows += [{"seed": s, "arm": "ceiling", "f1": 1.0} for s in range(3)]
    # Best in the seeds that it has, but it lacks one.
    rows += [{"seed": s, "arm": "GARAGE", "f1": 0.99} for s in range(2)]
    found = page["verdict"](pd.DataFrame(rows), "f1")
    assert (found["ahead"], found["network"]) == ("network", "scGAN")
    alone = [row for row in rows if row["arm"] not in ("scGAN", "GARAGE")]
    assert page["verdict"](pd.DataFrame(alone), "f1") == {"ahead": "not run"}


def test_an_added_arm_of_a_network_is_a_network(page):
    rows = rows_of([-0.2, -0.21, -0.2], "REGINA")
    more = rows_of([0.1, 0.11, 0.1], "REGINA, not shrunk")
    rows += [row | {"kept": 0.5} for row in more if row["arm"] != "SMOTE"]
    found = page["verdict"](pd.DataFrame(rows), "f1")
    assert (found["ahead"], found["network"]) == ("network", "REGINA, not shrunk")


def write(folder: Path, rows: list[dict[str, Any]], dataset: str = "yan") -> None:
    records.write_record(
        records.record_path("garage", dataset, "contest", folder),
        rows, {}, device="cpu", seconds=1, data_hash="x", modules=["baselines"],
    )  # fmt: skip


def test_the_guide_follows_the_records(page, tmp_path):
    guide = page["guide"]
    questions = [q for q in page["QUESTIONS"] if q[1] == "garage"]
    assert len(questions) == 1
    (ask, *_) = questions[0]
    write(tmp_path, rows_of([0.1, 0.11, 0.1, 0.1, 0.1]))
    write(tmp_path, rows_of([-0.1, -0.11, -0.1]), "sc_mixology/cellmix1")
    found = guide(questions).set_index("data")
    assert found["ahead"].to_dict() == {
        "yan": "network",
        "sc_mixology_cellmix1": "simple",
    }
    assert set(found["question"]) == {ask}
    assert found.loc["yan", "caveat"] == "none found"
    assert found.loc["sc_mixology_cellmix1", "caveat"] == "seeds: 3"
    write(tmp_path, rows_of([0.1, -0.1, 0.0, 0.05, -0.06]))
    assert guide(questions).set_index("data").loc["yan", "ahead"] == "level"


def test_curves_that_are_not_flat_are_a_caveat(page, tmp_path):
    rows = rows_of([0.1, 0.11, 0.1, 0.1, 0.1])
    for row in rows:
        if row["arm"] == "scGAN":
            row["distance_curve"] = list(np.linspace(1, 0.1, 20))
    write(tmp_path, rows)
    questions = [q for q in page["QUESTIONS"] if q[1] == "garage"]
    assert "100% of fits not flat" in guide_note(page, questions)


def test_one_condition_that_stands_for_all_is_a_caveat(page, tmp_path):
    questions = [q for q in page["QUESTIONS"] if q[0].startswith("gene of a seen")]
    rows = [
        {"pearson_delta" if key == "f1" else key: value for key, value in row.items()}
        | {"split": "one", "condition": "JAK2"}
        for row in rows_of([0.1] * 5, "REGINA")
    ]
    path = records.record_path("regina", "papalexi", "contest", tmp_path)
    about = {"device": "cpu", "seconds": 1, "data_hash": "", "modules": ["errors"]}
    records.write_record(path, rows, {}, **about)
    assert guide_note(page, questions) == "one condition held out"
    for row in rows[:3]:
        row["condition"] = "STAT1"
    records.write_record(path, rows, {}, **about)
    assert guide_note(page, questions) == "none found"


def guide_note(page: dict[str, Any], questions: list[Any]) -> str:
    return str(page["guide"](questions)["caveat"].iloc[0])


def test_a_question_without_a_record_is_not_run(page):
    questions = page["QUESTIONS"]
    asked = {(name, experiment) for _, name, experiment, *_ in questions}
    chapters = {name for name, _ in asked}
    assert chapters == {"scatlasvae", "cscgan", "garage", "scgacl", "regina", "compare"}
    found = page["guide"](questions)
    assert set(found["ahead"]) == {"not run"}
    assert len(found) == len(questions)
    text = page["in_words"](found).to_string()
    assert text.count("not run") == len(questions) and "nan" not in text


def test_every_row_of_the_guide_can_be_read(page):
    """The book's own records fit the questions: columns, filters, arms."""
    page["where"] = records.results_root()
    found = page["guide"](page["QUESTIONS"])
    with_record = found["data"].notna()
    words = {"network", "simple", "level", "too few seeds"}
    assert set(found.loc[with_record, "ahead"]) <= words | {"not run"}
    assert with_record.sum() >= 5
    assert not page["in_words"](found).isna().any(axis=None)


def test_every_letter_is_committed_before_its_box_opens():
    cells = json.loads((REPO / "book" / "compare.ipynb").read_text())["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    letters = [i for i, t in enumerate(text) if " letter: " in t and "### The" in t]
    assert len(letters) == 5
    for here, after in zip(letters, [*letters[1:], len(text)], strict=True):
        part = text[here:after]
        commit = next(i for i, t in enumerate(part) if t.startswith("my_answers["))
        box = next(i for i, t in enumerate(part) if "solution-start" in t)
        told = next(i for i, t in enumerate(part) if "chapter.recorded(" in t)
        assert commit < box < told


def test_every_script_reads_the_columns_it_is_told(compare, tmp_path):
    import _runs  # beside the scripts, whose folder `compare` puts on the path

    cells = AnnData(np.ones((40, 9), np.float32))
    cells.X[:20, :4] = 3
    cells.layers["counts"] = cells.X.copy()
    cells.obs["my types"], cells.obs["site"] = list("ab") * 20, list("xxyy") * 10
    cells.write_h5ad(tmp_path / "mine.h5ad")
    line = ["--dataset", str(tmp_path / "mine.h5ad"), "--label-key=my types"]
    for name in ("garage", "cscgan", "scgacl", "scatlasvae", "regina", "compare"):
        script = importlib.import_module(name)
        assert script.parser is _runs.parser and script.load is _runs.load
    given = _runs.parser("Doc.", ["book"], ["contest"])
    loaded = _runs.load(given.parse_args([*line, "--batch-key=site"]))
    assert list(loaded.obs["cell_type"]) == list("ab") * 20
    assert list(loaded.obs["batch"]) == list("xxyy") * 10
