"""The layouts of GEARS and cell-eval: exact round trips, and what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scgenlib.conditions import canonical
from scgenlib.errors import DataError
from scgenlib.layouts import for_cell_eval, from_gears, to_gears

CONDITIONS = ["ctrl", "A+ctrl", "ctrl", "A+B", "A+ctrl", "A+B", "B+ctrl", "B+ctrl"]


def gears(conditions=CONDITIONS) -> ad.AnnData:
    """Return cells laid out as GEARS writes them."""
    n = len(conditions)
    X = sp.random(n, 4, 0.7, "csr", np.float32, np.random.default_rng(0))
    obs = pd.DataFrame({"condition": conditions}, [f"c{i}" for i in range(n)])
    obs["cell_type"] = "K562"
    obs["dose_val"] = ["1+1" if "+" in name else "1" for name in conditions]
    obs["control"] = [int(name == "ctrl") for name in conditions]
    obs["condition_name"] = "K562_" + obs["condition"] + "_" + obs["dose_val"]
    for name in ("condition", "cell_type", "dose_val", "condition_name"):
        obs[name] = obs[name].astype("category")
    var = pd.DataFrame({"gene_name": ["A", "B", "C", "B"]}, ["E1", "E2", "E3", "E4"])
    adata = ad.AnnData(X, obs=obs, var=var, layers={"counts": X.ceil()})
    adata.uns["top_non_zero_de_20"] = {"K562_A+ctrl_1+1": ["E1", "E2"]}
    return adata


def assert_same(first: ad.AnnData, second: ad.AnnData) -> None:
    pd.testing.assert_frame_equal(first.obs, second.obs)
    pd.testing.assert_frame_equal(first.var, second.var)
    assert first.layers.keys() == second.layers.keys()
    for layer in (None, *first.layers):
        a, b = (adata.layers[layer] if layer else adata.X for adata in (first, second))
        assert a.dtype == b.dtype and (a != b).nnz == 0
    assert str(first.uns) == str(second.uns)


def test_from_gears():
    given = gears()
    found = from_gears(given)
    names = ["ctrl", "A", "ctrl", "A+B", "A", "A+B", "B", "B"]
    assert list(found.obs["perturbation"]) == names
    assert list(found.obs) == ["cell_type", "dose_val", "control", "perturbation"]
    assert list(found.var_names) == ["A", "B", "C", "B-1"]
    assert list(found.var["gears_index"]) == ["E1", "E2", "E3", "E4"]
    assert found.X.format == "csr" and found.X.dtype == np.float32
    assert_same(given, gears())  # not changed


def test_gears_in_out_in_is_exact():
    given = gears()
    first = from_gears(given)
    out = to_gears(first)
    assert_same(from_gears(out), first)
    # And the layout itself comes back, columns in another order.
    out.obs = out.obs[given.obs.columns]
    assert_same(out, given)


def test_gears_in_out_in_is_exact_after_a_file(tmp_path):
    gears().write_h5ad(tmp_path / "given.h5ad")
    first = from_gears(ad.read_h5ad(tmp_path / "given.h5ad"))
    to_gears(first).write_h5ad(tmp_path / "perturb_processed.h5ad")
    assert_same(from_gears(ad.read_h5ad(tmp_path / "perturb_processed.h5ad")), first)


def test_other_spellings_become_one():
    turned = [
        "+".join(reversed(name.split("+"))) if i % 2 else name
        for i, name in enumerate(CONDITIONS)
    ]
    assert turned != CONDITIONS
    assert_same(from_gears(gears(turned)), from_gears(gears()))
    assert set(to_gears(from_gears(gears(turned))).obs["condition"]) == {
        "ctrl", "A+ctrl", "A+B", "B+ctrl",
    }  # fmt: skip


def test_doses_follow_their_genes():
    given = gears(["ctrl", "ctrl", "B+A", "A+B", "ctrl+A", "A+ctrl"])
    given.obs["dose_val"] = ["1", "1", "3+2", "2+3", "1+5", "5+1"]
    found = from_gears(given)
    assert list(found.obs["dose_val"]) == ["1", "1", "2+3", "2+3", "5+1", "5+1"]
    out = to_gears(found)
    assert list(out.obs["dose_val"]) == list(found.obs["dose_val"])
    assert out.obs["condition_name"].iloc[2] == "K562_A+B_2+3"
    # "ctrl" comes last, also before a name that follows it in the alphabet.
    given = gears(["ctrl", "ctrl+drug", "B+A"])
    given.obs["dose_val"] = ["1", "1+5", "2+1+3"]
    with pytest.warns(UserWarning, match="one cell"):
        assert list(from_gears(given).obs["dose_val"]) == ["1", "5+1", "2+1+3"]
    # Doses of the control cells that a prediction was made from do not fit it.
    found.obs["dose_val"] = "1"
    doses = to_gears(found).obs["dose_val"]
    assert list(doses) == ["1", "1", "1+1", "1+1", "1+1", "1+1"]


def test_to_gears_from_other_data():
    X = np.array([[0, 1], [2, 0], [1, 1], [0, 3]], dtype=np.float32)
    obs = pd.DataFrame({"guide": ["NT", "B+A", "NT", "B"]}, list("wxyz"))
    adata = ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["A", "B"]))
    with pytest.warns(UserWarning, match="one cell"):
        out = to_gears(adata, "guide", cell_type="THP-1")
    assert list(out.obs["condition"]) == ["ctrl", "A+B", "ctrl", "B+ctrl"]
    assert list(out.obs["dose_val"]) == ["1", "1+1", "1", "1+1"]
    assert list(out.obs["control"]) == [1, 0, 1, 0]
    assert list(out.obs["condition_name"])[1:3] == ["THP-1_A+B_1+1", "THP-1_ctrl_1"]
    assert set(out.obs["cell_type"]) == {"THP-1"}
    assert list(out.var["gene_name"]) == ["A", "B"]
    assert list(adata.obs) == ["guide"] and "guide" not in out.obs
    with pytest.warns(UserWarning), pytest.raises(DataError, match="cell_type="):
        to_gears(adata, "guide")


def test_from_gears_refuses_other_layouts():
    given = gears()
    del given.var["gene_name"]
    with pytest.raises(DataError, match=r"symbols.*adata\.var\[.gene_name.\] ="):
        from_gears(given)
    with pytest.raises(DataError, match="'pert'.*condition"):
        from_gears(gears(), "pert")
    with pytest.raises(DataError, match="is a control"):
        from_gears(gears()[[1, 3]])


def test_dense_values_become_sparse():
    given = gears()
    given.X = given.X.toarray().astype(np.float64)
    assert_same(from_gears(given), from_gears(gears()))


def test_a_missing_symbol_is_replaced_by_the_index():
    given = gears()
    given.var["gene_name"] = ["A", None, "C", "D"]
    assert list(from_gears(given).var_names) == ["A", "E2", "C", "D"]


def test_for_cell_eval(tmp_path):
    real = from_gears(gears())
    control = real[real.obs["perturbation"] == "ctrl"][[0], ["C", "B", "A", "B-1"]]
    shifted = real.copy()
    shifted.X = sp.csr_matrix(real.X.toarray() - 0.5)
    out = for_cell_eval(shifted, control, tmp_path / "deep" / "predicted.h5ad")
    target = ["A", "A+B", "A", "A+B", "B", "B", "non-targeting"]
    assert list(out.obs["target_gene"]) == target
    assert list(out.var_names) == ["A", "B", "C", "B-1"]
    expected = np.maximum(real.X.toarray()[[1, 3, 4, 5, 6, 7]] - 0.5, 0)
    np.testing.assert_array_equal(out.X[:-1].toarray(), expected)
    np.testing.assert_array_equal(out.X[-1].toarray(), real.X[0].toarray())
    assert (out.X.data > 0).all() and out.X.dtype == np.float32
    assert set(canonical(out.obs["target_gene"])) == {"A", "A+B", "B", "ctrl"}
    back = ad.read_h5ad(tmp_path / "deep" / "predicted.h5ad")
    pd.testing.assert_frame_equal(back.obs, out.obs)
    assert (back.X != out.X).nnz == 0


def test_for_cell_eval_of_cells_that_share_names():
    real = from_gears(gears())
    control = real[:1]
    predicted = ad.AnnData(
        np.ones((2, 4)), {"perturbation": ["A", "A"]}, real.var[[]]
    )  # dense, and made from the same control cell
    predicted.obs_names = ["c0", "c7"]
    out = for_cell_eval(predicted, control)
    assert out.obs_names.is_unique and out.n_obs == 3
    assert sp.issparse(out.X)


def test_for_cell_eval_refuses():
    real = from_gears(gears())
    control, perturbed = real[[0]], real[[1, 3]]
    with pytest.raises(DataError, match="Unknown column"):
        for_cell_eval(perturbed, control, key="guide")
    with pytest.raises(DataError, match="0 perturbed cells, 1 controls"):
        for_cell_eval(control, control)
    with pytest.raises(DataError, match="0 controls"):
        for_cell_eval(perturbed, real[[]])
    with pytest.raises(DataError, match="1 genes that the controls lack"):
        for_cell_eval(perturbed, control[:, :3])
