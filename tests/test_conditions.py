"""Names of conditions, splits by condition, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from itertools import combinations
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scgenlib.conditions import (
    CONTROL,
    ConditionSplit,
    canonical,
    check_conditions,
    gears_name,
    genes_of,
    leave_out,
    simulation_split,
    split_controls,
)
from scgenlib.errors import ConfigError, DataError, OutputError


def cells(names, **columns) -> ad.AnnData:
    obs = pd.DataFrame({"perturbation": pd.Categorical(list(names)), **columns})
    obs.index = [f"c{i}" for i in range(len(obs))]
    X = np.arange(2.0 * len(obs), dtype=np.float32).reshape(-1, 2)
    return ad.AnnData(X, obs=obs, var=pd.DataFrame(index=["A", "B"]))


def made_list(n_genes: int = 102, n_pairs: int = 128) -> list[str]:
    """Return a list of Norman's size, in GEARS' mixed spellings."""
    rng = np.random.default_rng(0)
    genes = [f"G{i:03d}" for i in range(n_genes)]
    pairs = list(combinations(genes, 2))
    chosen = [pairs[i] for i in rng.choice(len(pairs), n_pairs, replace=False)]
    singles = [f"{g}+ctrl" if i % 2 else f"ctrl+{g}" for i, g in enumerate(genes)]
    return ["ctrl", *singles, *("+".join(pair[::-1]) for pair in chosen)]


@pytest.mark.parametrize(
    ("name", "genes"),
    [
        ("ctrl", ()),
        ("ctrl+ctrl", ()),
        ("A+ctrl", ("A",)),
        ("ctrl+A", ("A",)),
        ("B+A", ("A", "B")),
        (" B + A ", ("A", "B")),
        ("A+A", ("A", "A")),
        ("C+B+A", ("A", "B", "C")),
        ("Non_Targeting", ()),
        ("negative control", ()),
        ("DMSO", ()),
        ("A+NT", ("A",)),
        ("stimulated", ("stimulated",)),
        ("HLA-A", ("HLA-A",)),
        ("NTRK1", ("NTRK1",)),
    ],
)
def test_genes_of(name, genes):
    assert genes_of(name) == genes


@pytest.mark.parametrize("name", ["", "A+", "+", "A++B", "  ", None, 3, float("nan")])
def test_what_is_no_name(name):
    with pytest.raises(DataError, match="not the name of a condition"):
        genes_of(name)


def test_control_of_the_data():
    assert genes_of("WT", control="WT") == genes_of("ctrl", control="WT") == ()
    assert genes_of("A+WT", control="WT") == ("A",)
    assert genes_of("a+b", control="a+b") == ()
    # With a name given, the others are genes: CTRL is one.
    assert genes_of("CTRL", control="WT") == ("CTRL",)
    assert genes_of("CTRL") == ()


def test_canonical_keeps_the_index_and_is_idempotent():
    given = pd.Series(["B+A", "nt", "A+ctrl", "A+A"], index=list("wxyz"), name="p")
    once = canonical(given)
    assert once.to_dict() == {"w": "A+B", "x": "ctrl", "y": "A", "z": "A+A"}
    assert once.name == "p"
    pd.testing.assert_series_equal(canonical(once), once)
    pd.testing.assert_series_equal(canonical(given.astype("category")), once)
    assert canonical([]).tolist() == []
    with pytest.raises(DataError, match="nan"):
        canonical(pd.Series(["A", np.nan]))


def test_gears_name():
    names = ["ctrl", "A", "B+A", "A+A", "ctrl+A"]
    assert [gears_name(n) for n in names] == ["ctrl", "A+ctrl", "A+B", "A+A", "A+ctrl"]
    assert canonical(map(gears_name, names)).tolist() == canonical(names).tolist()


def test_check_conditions_returns_canonical_names():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = check_conditions(cells(["NT", "B+A", "NT", "A+B"]))
    assert found.tolist() == ["ctrl", "A+B", "ctrl", "A+B"]
    assert list(found.index) == ["c0", "c1", "c2", "c3"]


@pytest.mark.parametrize(
    ("names", "options", "match"),
    [
        (["NT", "A"], {"key": "guide"}, "'guide'.*no perturbation.*batch"),
        (["NT", "A", None], {}, "1 of 3 cells"),
        (["WT", "A", "B+A"], {}, "is a control.*A.*non-targeting.*control="),
        (["NT", "A"], {"control": "WT"}, "is a control.*Allowed: WT"),
        (["NT", "ctrl"], {}, "All cells.*controls"),
        (["NT", "A+"], {}, "not the name"),
    ],
)
def test_check_conditions_refuses(names, options, match):
    adata = cells(names, batch="b")
    with pytest.raises(DataError, match=match):
        check_conditions(adata, **options)


def test_conditions_of_one_cell_are_kept_and_reported():
    adata = cells(["NT", "NT", "A", "A", "B", "C"])
    with pytest.warns(UserWarning, match=r"2 condition.*B, C"):
        check_conditions(adata)
    split = ConditionSplit.from_dict({"train": ["A"], "test": ["B"]})
    with pytest.warns(UserWarning, match="one cell"):
        train, valid, test = split.apply(adata)
    assert (train.n_obs, valid.n_obs, test.n_obs) == (4, 0, 1)


def assert_is_honest(split: ConditionSplit, names) -> None:
    """Check 16: what holds for every simulation split."""
    everything = set(canonical(names))
    parts = [set(split.train), set(split.valid), set(split.test)]
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)
    assert CONTROL in parts[0]
    assert split.test
    train_singles = {n for n in split.train if "+" not in n}
    seen = {g for n in (*split.train, *split.valid) for g in genes_of(n)}
    groups = split.groups
    assert sorted(n for members in groups.values() for n in members) == sorted(parts[2])
    for name in groups["unseen_single"]:
        assert len(genes_of(name)) == 1
        assert not set(genes_of(name)) & seen
        assert name not in train_singles
    for n_seen in range(3):
        for name in groups[f"combo_seen{n_seen}"]:
            assert len(genes_of(name)) == 2
            assert len(set(genes_of(name)) & seen) == n_seen
    # No gene that makes a condition a test is a train single, nor anywhere in train.
    new = {g for n in split.test for g in genes_of(n)} - seen
    assert not new & {g for n in split.train for g in genes_of(n)}
    assert new


@pytest.mark.parametrize("seed", range(4))
def test_simulation_split_of_a_list_of_normans_size(seed):
    names = made_list()
    split = simulation_split(names, seed=seed)
    assert_is_honest(split, names)
    # 102 genes: 76 seen, 26 not. Pairs fall by chance around their expectations.
    sizes = {kind: len(members) for kind, members in split.groups.items()}
    assert sizes["unseen_single"] == 26
    assert 0 < sizes["combo_seen0"] < 25
    assert 25 < sizes["combo_seen1"] < 75
    both = sum(len(genes_of(n)) > 1 for n in (*split.train, *split.valid))
    assert both == int(0.75 * (both + sizes["combo_seen2"]))
    # Validation: 7.6 of the 76 seen genes, rounded up, as single perturbations.
    singles = [n for n in split.valid if "+" not in n]
    assert len(singles) == 76 - int(0.9 * 76)
    train_genes = {g for n in split.train for g in genes_of(n)}
    assert not set(singles) & train_genes


@pytest.mark.data
def test_simulation_split_of_normans_subset():
    file = Path(os.environ["SCGENLIB_DATA_DIR"], "norman_mcfaline_devel", "devel.h5ad")
    adata = ad.read_h5ad(file)
    names = adata.obs["condition"]
    for seed in range(5):
        split = simulation_split(names, seed=seed)
        assert_is_honest(split, names)
    assert len(set(canonical(names))) == 34
    parts = split.apply(adata, "condition")
    assert sum(part.n_obs for part in parts) == adata.n_obs
    assert (check_conditions(parts[0], "condition") == CONTROL).sum() == 400
    assert not any((canonical(p.obs["condition"]) == CONTROL).any() for p in parts[1:])
    left = leave_out(names, ["MAP2K3", "MAP2K6"])
    assert set(left.test) == {
        "MAP2K3", "MAP2K6", "KLF1+MAP2K6", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2",
    }  # fmt: skip


def test_same_seed_same_split_whatever_the_spelling_and_the_order():
    names = made_list()
    split = simulation_split(names, seed=3)
    assert simulation_split(names, seed=3) == split
    assert simulation_split(names, seed=4) != split
    turned = ["+".join(reversed(name.split("+"))) for name in reversed(names)]
    assert simulation_split(turned, seed=3) == split
    assert simulation_split([*canonical(names), "A+A"][:-1] * 2, seed=3) == split
    assert simulation_split(["WT", *names[1:]], seed=3, control="WT") == split


def test_simulation_split_by_hand():
    names = ["ctrl", "A", "B", "C", "D", "A+B", "A+C", "C+D", "A+A"]
    for seed in range(6):
        split = simulation_split(names, seed=seed, train_share=0.5, valid_share=None)
        seen = [n for n in split.train if n in "ABCD"]
        assert len(seen) == 2 and split.valid == ()
        assert split.groups["unseen_single"] == tuple(
            n for n in split.test if len(set(genes_of(n))) == 1
        )
        assert ("A+A" in split.train) == ("A" in seen)
        for pair in ("A+B", "A+C", "C+D"):
            n_seen = len(set(genes_of(pair)) & set(seen))
            if n_seen < 2:
                # A gene that is seen elsewhere counts, and "A" is.
                assert pair in split.groups[f"combo_seen{n_seen}"]
    every = simulation_split(names, train_share=1, combo_seen2_share=0.34)
    # 1.02 of 3 pairs are kept; the rest has two seen genes.
    assert len(every.groups["combo_seen2"]) == len(every.test) == 2


def test_held_out_pairs_are_drawn_and_counted_exactly():
    names = made_list(40, 100)
    every = [
        simulation_split(names, train_share=1, combo_seen2_share=0.29, seed=s)
        for s in (0, 1)
    ]
    # 0.29 x 100 is a little less than 29 in floats.
    assert [len(split.test) for split in every] == [71, 71]
    assert every[0].test != every[1].test


def test_a_triple_counts_its_seen_genes():
    groups = ConditionSplit.from_dict(
        {"train": ["A", "B"], "test": ["A+B+C", "C", "A+C"]}
    ).groups
    assert groups == {
        "unseen_single": ("C",),
        "combo_seen0": (),
        "combo_seen1": ("A+C",),
        "combo_seen2": ("A+B+C",),
    }


def test_small_and_wrong_lists():
    split = simulation_split(["ctrl", "A", "B"])
    assert len(split.train) == 2 and len(split.test) == 1
    assert split.valid == ()  # the last gene of train stays there
    for few in (["ctrl"], ["ctrl", "A"], ["A", "A+A"]):
        with pytest.raises(DataError, match="two perturbed genes"):
            simulation_split(few)
    with pytest.raises(DataError, match="nothing to test on"):
        simulation_split(["ctrl", "A", "B"], train_share=1)
    for wrong in ({"train_share": 0}, {"combo_seen2_share": 1.2}):
        with pytest.raises(ConfigError, match="share"):
            simulation_split(made_list(), **wrong)
    with pytest.raises(ConfigError, match="share"):
        simulation_split(made_list(), valid_share=(0.9, -0.1))


def test_leave_out_a_pathway():
    names = ["NT", "A", "B", "C", "D", "B+A", "C+D", "E+C"]
    split = leave_out(names, ["A", "E"], valid_share=None)
    assert split.test == ("A", "A+B", "C+E")
    assert split.train == ("ctrl", "B", "C", "C+D", "D")
    assert split.groups["unseen_single"] == ("A",)
    assert split.groups["combo_seen1"] == ("A+B", "C+E")
    with_valid = leave_out(names, ["A", "E"], seed=2)
    assert with_valid.test == split.test and with_valid.valid
    assert {*with_valid.train, *with_valid.valid} == {*split.train}
    with pytest.raises(DataError, match="Did you mean 'IFNGR1'"):
        leave_out(["ctrl", "IFNGR1", "JAK2"], ["IFNGR7"])


def test_from_dict_reads_any_spelling_and_checks_names():
    names = ["ctrl", "A", "B", "A+B", "C"]
    given = {"train": ["A+ctrl"], "val": ["ctrl+C"], "test": ["B+A", "A+B", "B"]}
    split = ConditionSplit.from_dict(given, names)
    assert split.train == ("A", "ctrl")
    assert split.valid == ("C",)
    assert split.test == ("A+B", "B")
    assert split.groups["combo_seen1"] == ("A+B",)
    assert split.seed is None
    with pytest.raises(DataError, match="Unknown condition.*'CEBPE'"):
        ConditionSplit.from_dict({"train": [], "test": ["CEBPX"]}, ["ctrl", "CEBPE"])


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ({"train": ["A", "B+C"], "test": ["C+B"]}, r"more than once: B\+C"),
        ({"train": ["A"], "valid": ["B"], "test": ["B"]}, "more than once: B"),
        ({"train": ["A"], "test": ["B", "NT"]}, "more than once: ctrl"),
        ({"train": ["A"], "test": []}, "nothing to test on"),
        ({"train": ["A"]}, "parts.*Found: 'train'.*at least train and test"),
        ({"train": ["A"], "test": ["B"], "tset": []}, "tset"),
        ({"train": ["A"], "test": ["B+"]}, "not the name"),
    ],
)
def test_from_dict_refuses(split, match):
    with pytest.raises(DataError, match=match):
        ConditionSplit.from_dict(split)


def test_controls_are_never_held_out():
    with pytest.raises(DataError, match="held-out controls"):
        ConditionSplit(("A",), (), ("B", "ctrl"))


def test_split_survives_json(tmp_path):
    split = simulation_split(made_list(), seed=5)
    path = split.save(tmp_path / "deep" / "split.json")
    back = ConditionSplit.load(path, made_list())
    assert {*back.train} == {*split.train} and back.seed == 5
    assert (back.valid, back.test, back.groups) == (
        split.valid,
        split.test,
        split.groups,
    )
    assert ConditionSplit.load(back.save(tmp_path / "again.json")) == back
    by_hand = tmp_path / "mine.json"
    by_hand.write_text(json.dumps({"train": ["A+ctrl"], "test": ["B+ctrl"]}))
    assert ConditionSplit.load(by_hand).test == ("B",)
    with pytest.raises(DataError, match="Unknown condition"):
        ConditionSplit.load(by_hand, ["ctrl", "A"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        split.save(tmp_path / "file" / "split.json")


def test_a_pickle_is_refused_with_what_to_do(tmp_path):
    path = tmp_path / "split.pkl"
    path.write_bytes(pickle.dumps({"train": ["A"], "test": ["B"]}))
    with pytest.raises(DataError, match=r"split\.pkl.*pickle can run code.*json\.dump"):
        ConditionSplit.load(path)
    (tmp_path / "list.json").write_text('["A", "B"]')
    (tmp_path / "number.json").write_text("3")
    for name in ("list.json", "number.json"):
        with pytest.raises(DataError, match="cannot be read"):
            ConditionSplit.load(tmp_path / name)
    with pytest.raises(DataError, match=r"none\.json.*No such file"):
        ConditionSplit.load(tmp_path / "none.json")


def test_apply_gives_the_cells_of_each_part():
    adata = cells(["ctrl", "A", "B", "A+B", "ctrl", "C", "B", "A", "A+B", "C"])
    split = ConditionSplit.from_dict({"train": ["A"], "valid": ["C"], "test": ["A+B"]})
    train, valid, test = split.apply(adata)
    assert list(train.obs_names) == ["c0", "c1", "c4", "c7"]
    assert list(valid.obs_names) == ["c5", "c9"]
    assert list(test.obs_names) == ["c3", "c8"]
    assert not train.is_view and adata.n_obs == 10
    other = ConditionSplit.from_dict({"train": ["A"], "test": ["CC"]})
    with pytest.raises(DataError, match="Unknown condition.*'CC'"):
        other.apply(adata)


def test_split_controls_sets_half_aside():
    adata = cells(["NT"] * 11 + ["A"] * 5)
    kept, aside = split_controls(adata, seed=1)
    assert aside.n_obs == 6 and kept.n_obs == 10
    assert not set(kept.obs_names) & set(aside.obs_names)
    assert set(canonical(aside.obs["perturbation"])) == {CONTROL}
    assert (kept.obs["perturbation"] == "A").sum() == 5
    assert list(kept.obs_names) == [n for n in adata.obs_names if n in kept.obs_names]
    again = split_controls(adata, seed=1)[1]
    assert list(again.obs_names) == list(aside.obs_names)
    other = split_controls(adata, seed=2)[1]
    assert list(other.obs_names) != list(aside.obs_names)
    # Both sides have a cell, whatever the share.
    assert [split_controls(adata, share=s)[1].n_obs for s in (0.01, 0.99)] == [1, 10]
    for share in (0, 1):
        with pytest.raises(ConfigError, match="share"):
            split_controls(adata, share=share)
    with pytest.raises(DataError, match="two controls"):
        split_controls(cells(["NT", "A", "A"]))
