"""One suite that every estimator must pass."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import scgenlib
from scgenlib import errors, simulate, training
from scgenlib.estimator import Config, Estimator, data_hash


@dataclass
class Case:
    """An estimator, one call of each of its verbs, and what its fit is told."""

    name: str
    verbs: dict[str, Callable[[Any, AnnData], Any]]
    fit: dict[str, Any] = field(default_factory=dict)

    @property
    def cls(self) -> type[Estimator]:
        return getattr(scgenlib, self.name)

    def make(self, seed: int = 0) -> Estimator:
        return self.cls(self.cls.config_class.profile("tiny"), seed=seed, device="cpu")


CASES = [
    Case(
        "GARAGE",
        {
            "generate": lambda model, adata: model.generate(25, seed=3),
            "select_seeds": lambda model, adata: model.select_seeds(),
        },
    ),
    Case("ScGAN", {"generate": lambda model, adata: model.generate(25, seed=3)}),
    Case("CscGAN", {"generate": lambda model, adata: model.generate(25, seed=3)}),
    Case(
        "ScGACL",
        {
            "impute": lambda model, adata: model.impute(adata, n_draws=2),
            "embed": lambda model, adata: model.embed(adata),
            "dropout_mask": lambda model, adata: model.dropout_mask(adata),
        },
    ),
    Case(
        "ScAtlasVAE",
        {
            "embed": lambda model, adata: model.embed(adata),
            "denoise": lambda model, adata: model.denoise(adata),
            "predict_labels": lambda model, adata: model.predict_labels(adata),
            "map_query": lambda model, adata: model.map_query(adata),
            "align_labels": lambda model, adata: model.align_labels(adata),
        },
        {"label_key": ["cell_type", "lineage"]},
    ),
    Case(
        "REGINA",
        {
            "embed": lambda model, adata: model.embed(adata),
            "predict": lambda model, adata: model.predict(
                adata, ["gene03", {"gene01": 2.0, "lost": 1.0}, "gene11"], n_samples=20
            ),
        },
        {"label_key": "cell_type", "batch_key": "batch"},
    ),
]
# Length of the codes in the smallest settings; other outputs have the model's genes.
Z_DIM = {"ScGACL": 10, "ScAtlasVAE": 10, "REGINA": 8}

# The smallest settings need not learn anything; one target has no column.
pytestmark = [
    pytest.mark.filterwarnings("ignore::scgenlib.scgacl.CollapseWarning"),
    pytest.mark.filterwarnings("ignore:.*not among the genes:UserWarning"),
    pytest.mark.filterwarnings("ignore:Not all cells to start:UserWarning"),
]


@pytest.fixture(scope="module")
def cells() -> AnnData:
    made = simulate.simulate(n_cells=150, n_genes=60, seed=2)
    made.obs["batch"] = pd.Categorical(["one", "two", "three"] * 50)
    coarse = made.obs["cell_type"].isin(["A", "B"]).map({True: "x", False: "y"})
    made.obs["lineage"] = pd.Categorical(coarse)
    # Three of each batch in turn: controls in all of them.
    names = ["ctrl", "gene03", "gene01+lost", "gene05", "gene07", "gene09"]
    in_turn = np.arange(150) // 3 % len(names)
    made.obs["perturbation"] = pd.Categorical(np.array(names)[in_turn])
    return made


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def fitted(case, cells) -> Estimator:
    return case.make().fit(cells, **case.fit)


def state(model: Estimator) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._state_tensors().items()}


def assert_same_state(a: Estimator, b: Estimator) -> None:
    one, two = state(a), state(b)
    assert one.keys() == two.keys()
    assert [k for k in one if not torch.equal(one[k], two[k])] == []


def values(result: Any) -> np.ndarray:
    if isinstance(result, AnnData):
        # What was imputed stands in layers, beside cells that are not changed.
        made = [name for name in sorted(result.layers) if name.startswith("imputed")]
        parts = [result.layers[name] for name in made] or [result.X]
        return np.hstack([values(part) for part in parts])
    if isinstance(result, pd.DataFrame):
        return result.select_dtypes("number").to_numpy()
    return result.toarray() if sparse.issparse(result) else np.asarray(result)


def test_making_an_estimator_does_no_work(case):
    made = case.make(seed=7)
    assert made.seed == 7 and not hasattr(made, "modules_")
    assert "not fitted" in repr(made)
    with pytest.raises(errors.NotFittedError, match="not fitted"):
        made.save("never")
    for verb, call in case.verbs.items():
        with pytest.raises(errors.NotFittedError, match="not fitted"):
            call(made, None)
        assert verb in case.cls.tasks


def test_every_task_is_a_verb_with_a_call_here(case):
    assert case.cls.tasks == set(case.verbs)
    for verb in case.cls.tasks:
        assert callable(getattr(case.cls, verb))


def test_every_profile_and_every_field_is_documented(case):
    config: type[Config] = case.cls.config_class
    assert set(config.PROFILES) == {"tiny", "book", "paper"}
    assert config.PROFILES["paper"] == {}
    table = config.table()
    assert (table["doc"].str.len() >= 10).all()


def test_fit_returns_itself_and_changes_nothing(case, cells):
    before, rng = cells.copy(), torch.get_rng_state()
    model = case.make()
    assert model.fit(cells, **case.fit) is model
    assert data_hash(cells, cells.obs) == data_hash(before, before.obs)
    pd.testing.assert_frame_equal(cells.obs, before.obs)
    pd.testing.assert_frame_equal(cells.var, before.var)
    assert (
        set(cells.layers) == set(before.layers)
        and cells.uns.keys() == before.uns.keys()
    )
    for name, layer in before.layers.items():
        assert (layer != cells.layers[name]).sum() == 0, name
    assert torch.equal(torch.get_rng_state(), rng)


def test_fit_twice_is_fit_once(case, cells, fitted):
    model = case.make().fit(cells[:100].copy(), **case.fit)
    assert_same_state(model.fit(cells, **case.fit), fitted)


def test_same_seed_repeats_and_another_differs(case, cells, fitted):
    assert_same_state(case.make().fit(cells, **case.fit), fitted)
    other = state(case.make(seed=1).fit(cells, **case.fit))
    mine = state(fitted)
    assert any(
        not torch.equal(mine[k], other[k])
        for k in mine
        if k in other and mine[k].shape == other[k].shape
    )


def test_dense_and_sparse_input_agree(case, cells, fitted):
    dense = cells.copy()
    dense.X = cells.X.toarray()
    model = case.make().fit(dense, **case.fit)
    for verb, call in case.verbs.items():
        np.testing.assert_allclose(
            values(call(model, dense)),
            values(call(fitted, cells)),
            atol=1e-5,
            err_msg=verb,
        )


def test_history_is_tidy_and_finite(fitted):
    table = fitted.history_
    assert list(table.columns) == ["step", "phase", "term", "value"]
    assert len(table) and np.isfinite(table["value"]).all()


def test_verbs_repeat_and_outputs_are_cells(case, cells, fitted):
    for verb, call in case.verbs.items():
        one, two = call(fitted, cells), call(fitted, cells)
        np.testing.assert_array_equal(values(one), values(two), err_msg=verb)
        if isinstance(one, AnnData):
            names = fitted.genes_
            if verb in ("embed", "map_query"):
                names = [f"z{i}" for i in range(Z_DIM[case.name])]
            assert list(one.var_names) == names
            assert one.obs_names.is_unique
            assert np.isfinite(values(one)).all()
            about = one.uns["scgenlib"]
            assert about["method"] == case.cls.method
            assert about["config_hash"] == fitted.config.hash()
            assert about["data_hash"] == fitted.data_hash_


def test_outputs_can_be_written_as_h5ad(case, cells, fitted, tmp_path):
    import anndata

    for verb, call in case.verbs.items():
        result = call(fitted, cells)
        if isinstance(result, AnnData):
            result.write_h5ad(tmp_path / f"{verb}.h5ad")
            again = anndata.read_h5ad(tmp_path / f"{verb}.h5ad")
            np.testing.assert_array_equal(values(again), values(result))


def test_save_and_load_give_the_same_answers(case, cells, fitted, tmp_path):
    fitted.save(tmp_path / "run")
    again = case.cls.load(tmp_path / "run", device="cpu")
    assert_same_state(again, fitted)
    for verb, call in case.verbs.items():
        np.testing.assert_array_equal(
            values(call(again, cells)), values(call(fitted, cells)), err_msg=verb
        )


class Killed(Exception):
    pass


def test_a_killed_fit_goes_on_to_the_same_numbers(case, cells, fitted, tmp_path):
    sizes = fitted.history_.groupby("phase", sort=False)["step"].max()
    for number, (phase, last) in enumerate(sizes.items()):
        folder = tmp_path / str(number)
        options = {"checkpoint_dir": folder, "checkpoint_every": 3, "resume": True}
        options |= case.fit

        def kill(event: training.Event, phase=phase, at=int(last * 0.7)) -> None:
            if event.phase == phase and event.step == at:
                raise Killed

        with pytest.raises(Killed):
            case.make().fit(cells, callbacks=[kill], **options)
        assert_same_state(case.make().fit(cells, **options), fitted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_fit_on_a_gpu_and_load_on_the_cpu(case, cells, tmp_path):
    config = case.cls.config_class.profile("tiny")
    made = case.cls(config, device="cuda")
    model = made.fit(cells, checkpoint_dir=tmp_path / "c", **case.fit)
    model.save(tmp_path / "run")
    again = case.cls.load(tmp_path / "run", device="cpu")
    for call in case.verbs.values():
        assert np.isfinite(values(call(model, cells))).all()
        assert values(call(again, cells)).shape == values(call(model, cells)).shape


def broken(cells: AnnData, **change: Any) -> AnnData:
    out = cells.copy()
    X = out.X.toarray()
    if "value" in change:
        X[3, 5] = change["value"]
    if "empty_cell" in change:
        X[7] = 0
    out.X = sparse.csr_matrix(X)
    if "names" in change:
        out.var_names = [change["names"]] * 2 + list(out.var_names[2:])
    if "one_class" in change:
        out.obs["cell_type"] = pd.Categorical(["only"] * out.n_obs)
    return out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": np.nan}, ["NaN"]),
        ({"value": np.inf}, ["inf"]),
        ({"value": -1.0}, ["negative"]),
        ({"empty_cell": True}, ["cell"]),
        ({"names": "ACTB"}, ["ACTB"]),
        ({"one_class": True}, ["only"]),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_cells_are_named(case, cells, change, words):
    with pytest.raises(errors.DataError) as caught:
        case.make().fit(broken(cells, **change), **case.fit)
    for word in words:
        assert word.lower() in str(caught.value).lower()


def test_bad_labels_and_devices_are_named(case, cells):
    with pytest.raises(errors.DataError, match="cell_typ.*'cell_type'"):
        case.make().fit(cells, label_key="cell_typ")
    made = case.cls(case.cls.config_class.profile("tiny"), device="cuda:7")
    with pytest.raises(errors.DeviceError, match="cuda:7"):
        made.fit(cells, **case.fit)
    with pytest.raises(errors.ConfigError, match="config"):
        case.cls(config={"epochs": 3})
    with pytest.raises(errors.ConfigError, match="seed"):
        case.cls(seed=-1)


def test_importing_the_package_stays_light():
    heavy = "('scanpy', 'umap', 'torch_geometric')"
    code = (
        "import sys, scgenlib, scgenlib.garage, scgenlib.datasets, scgenlib.metrics;"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
