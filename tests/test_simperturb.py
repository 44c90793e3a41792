"""The simulated screen keeps its promises: each dial does what it says."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from scgenlib import datasets, simperturb
from scgenlib.conditions import canonical, gears_name
from scgenlib.errors import ConfigError
from scgenlib.preprocess import value_scale
from scgenlib.simperturb import screen

QUIET = {"batch_strength": 0.0, "type_strength": 0.0, "covariation": 0.0}


def singles(adata: ad.AnnData) -> list[str]:
    """Return the measured targets whose knock-out changes other genes."""
    targets = adata.uns["targets"]
    return [*targets.index[targets["measured"] & (targets["strength"] > 0)]]


def along_pathways(adata: ad.AnnData) -> list[float]:
    """Return, for each target, how its effect follows the control's co-variation."""
    loadings = adata.varm["loadings"].to_numpy()
    found = []
    for target in singles(adata):
        rest = adata.var_names != target
        falls = -loadings @ adata.varm["loadings"].loc[target].to_numpy()
        effect = adata.varm["effect"][target].to_numpy()
        found.append(np.corrcoef(effect[rest], falls[rest])[0, 1])
    return found


def test_contract_and_names():
    adata = screen(400, 120, n_targets=8, n_doubles=3, n_pathways=4)
    datasets.check_anndata(adata, label_key="cell_type", need_counts=True)
    counts = adata.layers["counts"]
    for matrix in (adata.X, counts):
        assert sp.issparse(matrix) and matrix.dtype == np.float32
    assert (value_scale(adata.X), value_scale(counts)) == ("log1p", "counts")
    sizes = adata.obs["perturbation"].value_counts()
    # 15 % controls, and 340 cells over 11 conditions: 30 or 31 each.
    assert sizes["ctrl"] == 60 and sorted(set(sizes)) == [30, 31, 60]
    names = adata.varm["effect"].columns.tolist()
    assert names[0] == "ctrl" and set(names) == set(sizes.index)
    assert sum("+" in name for name in names) == 3
    assert canonical(names).tolist() == names
    conditions = adata.obs["condition"].astype(str)
    assert (conditions == [gears_name(n) for n in adata.obs["perturbation"]]).all()
    assert ((adata.obs["pathway"] == "") == (conditions == "ctrl")).all()
    targets = adata.uns["targets"]
    assert targets["pathway"].value_counts().to_dict() == dict.fromkeys(
        adata.varm["loadings"].columns, 2
    )
    measured = targets.index[targets["measured"]]
    where = adata.var["pathway"][measured]
    assert (where == targets["pathway"][measured]).all()
    assert adata.uns["simulation"]["n_doubles"] == 3
    assert adata.uns["dataset"]["simulated"]


def test_means_follow_from_the_effects():
    adata = screen(400, 120, **QUIET, n_targets=8, n_doubles=3, n_unmeasured=0)
    mu = adata.layers["true_expression"]
    np.testing.assert_allclose(mu.sum(1), adata.obs["depth"], rtol=1e-4)
    share = np.log(mu / mu.sum(1, keepdims=True))
    control = share[(adata.obs["perturbation"] == "ctrl").to_numpy()]
    np.testing.assert_allclose(control, control[:1].repeat(len(control), 0), atol=1e-4)
    for name, effect in adata.varm["effect"].items():
        cell = np.flatnonzero(adata.obs["perturbation"] == name)[0]
        fold = share[cell] - control[0] - effect.to_numpy()
        np.testing.assert_allclose(fold, fold[0], atol=1e-4)  # the sum of the shares


def test_control_cells_co_vary_along_the_loadings():
    adata = screen(
        3000,
        90,
        control_share=0.8,
        n_targets=6,
        n_pathways=3,
        n_doubles=2,
        batch_strength=0.0,
        type_strength=0.0,
        n_unmeasured=0,
    )
    control = adata[adata.obs["perturbation"] == "ctrl"]
    logs = np.log(control.layers["true_expression"])
    logs -= logs[:, adata.var["pathway"] == ""].mean(1, keepdims=True)
    loadings = adata.varm["loadings"].to_numpy()
    np.testing.assert_allclose(np.cov(logs.T), loadings @ loadings.T, atol=0.06)
    main = loadings[adata.var["pathway"] == "pathway1", 1]
    assert np.sqrt((main**2).mean()) == pytest.approx(0.5, rel=0.1)
    assert (loadings[adata.var["pathway"] == "stress", 0] > 0).all()


def test_pathway_is_what_control_cells_tell_of_an_effect():
    follow = {
        dial: along_pathways(screen(400, 300, pathway=dial, shared=0.0, n_unmeasured=0))
        for dial in (0.0, 0.5, 1.0)
    }
    np.testing.assert_allclose(follow[1.0], 1.0, atol=1e-9)
    assert np.mean(follow[0.5]) == pytest.approx(np.sqrt(0.5), abs=0.05)
    assert abs(np.mean(follow[0.0])) < 0.05
    # The dial changes the direction and not the size, nor anything else.
    low, high = (
        screen(400, 300, pathway=d, shared=0.0, n_unmeasured=0) for d in (0, 1)
    )
    assert low.varm["loadings"].equals(high.varm["loadings"])
    assert low.obs["perturbation"].equals(high.obs["perturbation"])
    for target, row in low.uns["targets"].iterrows():
        rest = low.var_names != target
        for adata in (low, high):
            size = np.linalg.norm(adata.varm["effect"][target][rest])
            # A pathway has two thirds of 300 genes over ten: 20.
            assert size == pytest.approx(row["strength"] * np.sqrt(20))


def test_strength_shared_and_null():
    adata = screen(400, 300, strength=2.0, strength_spread=0.0, shared=0.0)
    strength = adata.uns["targets"]["strength"]
    assert strength.value_counts().to_dict() == {2.0: 19, 0.0: 5}
    for target in strength.index[strength == 0]:
        effect = adata.varm["effect"][target]
        changed = effect[effect != 0]
        assert changed.index.tolist() == [target] and changed.iloc[0] == np.log(1 - 0.8)

    def alike(shared):
        adata = screen(
            400,
            300,
            strength_spread=0.0,
            share_null=0.0,
            shared=shared,
            pathway=0.0,
            n_doubles=0,
        )
        table = np.corrcoef(adata.varm["effect"].to_numpy()[:, 1:].T)
        return table[np.triu_indices_from(table, 1)].mean()

    # Two effects of size 1 share a part of size s: correlation s^2 / (1 + s^2).
    assert alike(0.0) == pytest.approx(0.0, abs=0.03)
    assert alike(0.5) == pytest.approx(0.2, abs=0.04)
    assert alike(1.0) == pytest.approx(0.5, abs=0.06)


def test_doubles_are_sums_but_for_epistasis():
    for epistasis in (0.0, 0.4):
        adata = screen(600, 300, epistasis=epistasis, knockdown=0.0, shared=0.2)
        effects, where = adata.varm["effect"], adata.uns["targets"]["pathway"]
        kinds = []
        for name in effects.columns[effects.columns.str.contains(r"\+")]:
            first, second = name.split("+")
            same = where[first] == where[second]
            total = (effects[first] + effects[second]) * (1 - epistasis * same)
            np.testing.assert_allclose(effects[name], total, atol=1e-12)
            kinds.append(bool(same))
            (group,) = {*adata.obs["pathway"][adata.obs["perturbation"] == name]}
            assert {*group.split("+")} == {where[first], where[second]}
        assert kinds == [True] * 4 + [False] * 4


def test_knockdown_and_activation():
    down, up = (screen(400, 300, shared=0.0, activation=a) for a in (False, True))
    effect = down.varm["effect"]
    assert effect.equals(-up.varm["effect"])
    plain = screen(400, 300, shared=0.5).varm["effect"]
    for target in singles(down):
        assert effect.loc[target, target] == pytest.approx(np.log(0.2))
        assert plain.loc[target, target] == pytest.approx(np.log(0.2))
        control, own = (
            down.X[(down.obs["perturbation"] == n).to_numpy()].mean(0)
            for n in ("ctrl", target)
        )
        at = down.var_names.get_loc(target)
        assert own[0, at] < 0.8 * control[0, at]


def test_unmeasured_targets_are_out_of_the_matrix():
    adata = screen(400, 300, n_unmeasured=3)
    targets = adata.uns["targets"]
    missing = targets.index[~targets["measured"]]
    assert len(missing) == 3 and (targets.loc[missing, "strength"] > 0).all()
    assert not {*missing} & {*adata.var_names}
    assert {*targets.index[targets["measured"]]} <= {*adata.var_names}
    assert adata.n_vars == 300 and adata.var_names.is_unique
    assert np.abs(adata.varm["effect"][missing[0]]).max() > 0.1


def test_stress_is_a_state():
    adata = screen(4000, 300, seed=2)
    stress = adata.var["pathway"] == "stress"
    prefixes = ("HSP", "DNAJ", "ATF", "ERN", "EIF2", "CEBP")
    assert adata.var_names[stress].str.startswith(prefixes).all()
    assert adata.var_names[~stress].str.match(r"G\d{3}$").all()
    stressed = (adata.obs["state"] == "Stressed").to_numpy()
    assert stressed.mean() == pytest.approx(0.3, abs=1e-3)
    score = np.asarray(adata.X[:, stress.to_numpy()].mean(1)).ravel()
    assert score[stressed].mean() - score[~stressed].mean() > score.std()
    # What lowers stress genes lowers the share of stressed cells.
    lost = adata.varm["effect"][stress.to_numpy()].mean()
    share = adata.obs.groupby("perturbation", observed=True)["state"].agg(
        lambda states: (states == "Stressed").mean()
    )
    assert np.corrcoef(lost, share[lost.index])[0, 1] > 0.7


def test_depth_noise_types_and_batches():
    adata = screen(
        3000,
        100,
        n_pathways=4,
        n_targets=6,
        dispersion=0.5,
        depth=800,
        n_unmeasured=0,
        n_batches=3,
    )
    counts, mu = adata.layers["counts"].toarray(), adata.layers["true_expression"]
    assert counts.sum(1).mean() == pytest.approx(800, rel=0.03)
    excess = ((counts - mu) ** 2 - mu).sum() / (mu**2).sum()
    assert excess == pytest.approx(0.5, abs=0.06)
    assert adata.obs["batch"].value_counts(normalize=True).between(0.3, 0.37).all()
    logs = np.log(mu / mu.sum(1, keepdims=True))
    for column, first, second, sd in (
        ("cell_type", "A", "B", 0.3),
        ("batch", "batch1", "batch2", 0.1 * np.sqrt(2)),
    ):
        groups = adata.obs[column]
        fold = logs[groups == second].mean(0) - logs[groups == first].mean(0)
        assert fold.std() == pytest.approx(sd, rel=0.25)


def test_no_cell_is_empty():
    counts = screen(300, 120, n_targets=8, n_doubles=0, depth=1.0).layers["counts"]
    assert np.asarray(counts.sum(1)).min() >= 1


def test_the_seed_decides(monkeypatch):
    dials = {"n_targets": 8, "n_doubles": 2, "seed": 6}
    first, again, other = (
        screen(200, 120, **dials | {"seed": seed}) for seed in (6, 6, 7)
    )
    assert (first.X != again.X).nnz == 0 and (first.X != other.X).nnz > 0
    monkeypatch.setattr(simperturb, "_TRUTH_BYTES", 4 * 200 * 120 - 1)
    assert [*screen(200, 120, **dials).layers] == ["counts"]


def test_round_trip_through_a_file(tmp_path):
    adata = screen(200, 120, n_targets=8, n_doubles=2)
    adata.write_h5ad(tmp_path / "screen.h5ad")
    back = ad.read_h5ad(tmp_path / "screen.h5ad")
    assert back.varm["effect"].equals(adata.varm["effect"])
    assert back.uns["targets"]["measured"].tolist() == (
        adata.uns["targets"]["measured"].tolist()
    )
    assert back.uns["simulation"]["epistasis"] == 0.5


@pytest.mark.parametrize(
    ("dials", "what"),
    [
        ({"pathway": 1.1}, "pathway.*0 to 1"),
        ({"shared": -0.1}, "shared"),
        ({"epistasis": 2}, "epistasis"),
        ({"knockdown": 1.0}, "knockdown.*0.99"),
        ({"share_null": 1.5}, "share_null"),
        ({"strength": -1}, "strength"),
        ({"n_targets": 1}, "n_targets.*2 to"),
        ({"n_targets": 3, "n_doubles": 4}, "n_doubles.*0 to 3"),
        ({"n_targets": 4, "n_doubles": 2, "n_unmeasured": 5}, "n_unmeasured.*0 to 4"),
        ({"control_share": 0.0}, "control_share"),
        ({"depth": 0}, "depth"),
        ({"n_cells": 70}, "at least 78 cells, two a condition"),
        ({"n_genes": 87}, "88 genes: a pathway has twice"),
        ({"pathwya": 1}, "Did you mean 'pathway'"),
    ],
)
def test_bad_dials(dials, what):
    with pytest.raises(ConfigError, match=what):
        screen(**{"n_cells": 400, "n_genes": 200, **dials})


def test_as_small_as_the_error_says():
    assert screen(78, 88).shape == (78, 88)


def test_the_manifest_is_a_screen_with_signal():
    adata = datasets.load("simulated_screen", verbose=False)
    assert adata.shape == (4000, 300)
    sizes = adata.obs["perturbation"].value_counts()
    assert len(sizes) == 33 and sizes["ctrl"] == 600 and sizes.min() >= 106
    means = {
        name: np.asarray(
            adata.X[(adata.obs["perturbation"] == name).to_numpy()].mean(0)
        )
        for name in sizes.index
    }
    for target in singles(adata):
        rest = adata.var_names != target
        change = (means[target] - means["ctrl"]).ravel()[rest]
        truth = adata.varm["effect"][target].to_numpy()[rest]
        assert np.corrcoef(change, truth)[0, 1] > 0.7
