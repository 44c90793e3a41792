"""New cells beside a map: genes, labels, pictures, and new models from old ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from torch.nn import functional as F

from scgenlib import mapping
from scgenlib.errors import ConfigError, DataError, NotFittedError
from scgenlib.scatlasvae import ScAtlasVAE, ScAtlasVAEConfig
from scgenlib.surgery import new_batches

KEYS = ["cell_type", "lineage"]


@pytest.fixture(scope="module")
def atlas(small_atlas) -> AnnData:
    return small_atlas.copy()


@pytest.fixture(scope="module")
def reference(atlas) -> AnnData:
    return atlas[atlas.obs["set"] == "reference"].copy()


@pytest.fixture(scope="module")
def query(atlas) -> AnnData:
    return atlas[atlas.obs["set"] == "query"].copy()


def fit(cells, label_key="cell_type", batch_key="auto", latent=None, **changes):
    settings = {"max_epoch": 1, **changes}
    made = ScAtlasVAE(ScAtlasVAEConfig.profile("tiny", **settings), device="cpu")
    return made.fit(cells, label_key=label_key, batch_key=batch_key, latent=latent)


@pytest.fixture(scope="module")
def model(reference) -> ScAtlasVAE:
    return fit(reference, KEYS, max_epoch=30, lr=1e-2)


def state(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model._state_tensors().items()}


def codes(model, cells) -> np.ndarray:
    return np.asarray(model.embed(cells).X)


# ------------------------------------------------------------------------- genes


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_genes_are_matched_by_name(form):
    values = form(np.array([[1.0, 2.0, 3.0], [0.0, 5.0, 0.0]]))
    out, found = mapping.match_genes(values, ["a", "b", "c"], ["c", "x", "a", "y"])
    assert sparse.issparse(out) and out.format == "csr" and out.dtype == np.float32
    assert out.toarray().tolist() == [[3, 0, 1, 0], [0, 0, 0, 0]]
    assert found == {"genes_missing": 2, "genes_extra": 1}
    same, found = mapping.match_genes(values, ["a", "b", "c"], ["a", "b", "c"])
    assert same.toarray().tolist() == [[1, 2, 3], [0, 5, 0]]
    assert found == {"genes_missing": 0, "genes_extra": 0}
    turned, found = mapping.match_genes(values, ["a", "b", "c"], ["c", "b", "a"])
    assert turned.toarray().tolist() == [[3, 2, 1], [0, 5, 0]]
    assert found == {"genes_missing": 0, "genes_extra": 0}


def test_no_gene_in_common_is_named():
    with pytest.raises(DataError, match="ENSG1.*ACTB"):
        mapping.match_genes(np.ones((2, 2)), ["ENSG1", "ENSG2"], ["ACTB", "CD3E"])


def counted(counts, genes, names, **obs) -> AnnData:
    X = sparse.csr_matrix(np.array(counts, dtype=np.float32))
    made = AnnData(
        X,
        obs=pd.DataFrame(obs, index=names),
        var=pd.DataFrame(index=genes),
        layers={"counts": X},
    )
    return made


def test_joined_cells_share_genes_and_columns():
    one = counted([[1, 2], [3, 0]], ["a", "b"], ["c1", "c2"], kind=["u", "v"])
    two = counted([[5, 1]], ["b", "z"], ["q1"], batch=["s"], other=[1])
    both, part = mapping.joined([one, two], ["b", "a"], ["kind", "batch"])
    assert both.layers["counts"].toarray().tolist() == [[2, 1], [0, 3], [5, 0]]
    assert list(both.obs_names) == ["c1", "c2", "q1"]
    assert list(both.var_names) == ["b", "a"]
    assert part.tolist() == [0, 0, 1]
    assert list(both.obs) == ["kind", "batch"]
    assert both.obs["kind"].isna().tolist() == [False, False, True]
    assert both.obs["kind"][:2].tolist() == ["u", "v"]
    assert both.obs["batch"].isna().tolist() == [True, True, False]
    # X is made anew on these genes: 10,000 a cell.
    np.testing.assert_allclose(np.expm1(both.X.toarray()).sum(1), 1e4, rtol=1e-4)
    # Or it is joined as it is, and there are no counts.
    logs, _ = mapping.joined([one, two], ["b", "a"], ["kind"], on_counts=False)
    assert logs.X.toarray().tolist() == [[2, 1], [0, 3], [5, 0]]
    assert "counts" not in logs.layers


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_joined_cells_keep_their_names_apart_and_are_not_empty():
    one = counted([[1, 2], [0, 0]], ["a", "b"], ["c1", "c2"])
    two = counted([[0, 0], [5, 1]], ["a", "b"], ["c3", "c1"])
    both, part = mapping.joined([one, two], ["a", "b"], [])
    assert list(both.obs_names) == ["c1-0", "c1-1"]
    assert both.layers["counts"].toarray().tolist() == [[1, 2], [5, 1]]
    assert part.tolist() == [0, 1]
    with pytest.raises(DataError, match="batc"):
        mapping.joined([one, two], ["a"], ["batc"])


# ------------------------------------------------------------------------ labels


def test_temperature_of_a_worked_example():
    # Logits (4, 0) that are right three times in four. Of each of the 40 targets a
    # share of 1/42 is spread over both types, so that 4 / T = ln(q / (1 - q)).
    logits = torch.tensor([[4.0, 0.0]] * 40)
    labels = torch.tensor([0, 0, 0, 1] * 10)
    q = 0.75 * 41 / 42 + 0.5 / 42
    expected = 4 / np.log(q / (1 - q))
    assert mapping.temperature(logits, labels) == pytest.approx(expected, rel=1e-3)
    # Unlabelled cells have no say, however they are placed.
    more = torch.cat([logits, torch.tensor([[-9.0, 9.0]] * 30)])
    hidden = torch.cat([labels, torch.full((30,), -1)])
    assert mapping.temperature(more, hidden) == pytest.approx(expected, rel=1e-3)
    # Logits that are too timid are made bolder, twice at the most.
    timid = mapping.temperature(logits / 6, labels)
    assert timid == pytest.approx(expected / 6, rel=1e-3)
    assert mapping.temperature(logits / 40, labels) == pytest.approx(0.5, rel=1e-3)


def test_cells_that_are_all_right_do_not_make_certain():
    logits, right = torch.tensor([[4.0, 0.0]] * 40), torch.zeros(40, dtype=torch.int64)
    # 1 - 1/84 on the type of the cell: 4 / T = ln 83.
    found = mapping.temperature(logits, right)
    assert found == pytest.approx(4 / np.log(83), rel=1e-3)


def test_temperature_needs_twenty_labelled_cells():
    logits, labels = torch.tensor([[4.0, 0.0]] * 20), torch.tensor([0, 0, 0, 1] * 5)
    assert mapping.temperature(logits, labels) != 1
    assert mapping.temperature(logits[:19], labels[:19]) == 1
    labels[0] = -1
    assert mapping.temperature(logits, labels) == 1


def test_temperature_improves_the_log_loss_and_no_answer_changes():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=rng)
    clear = 2.0 * F.one_hot(labels, 4) + torch.randn(300, 4, generator=rng)
    for factor in (0.2, 1.0, 5.0):
        logits = factor * clear
        t = mapping.temperature(logits, labels)
        before, after = (
            F.cross_entropy(logits, labels),
            F.cross_entropy(logits / t, labels),
        )
        assert after <= before + 1e-6
        assert torch.equal((logits / t).argmax(1), logits.argmax(1))
        if factor != 1:
            assert after < 0.95 * before


def test_best_labels_by_hand():
    names = ["c1", "c2", "c3"]
    table = pd.DataFrame(
        [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]], names, ["a", "b", "c"]
    )
    found = mapping.best_labels({"kind": table, "half": table[["a", "b"]]}, 0.6)
    assert list(found.columns) == [
        "kind",
        "kind_probability",
        "half",
        "half_probability",
    ]
    assert found["kind"].tolist() == ["unknown", "c", "b"]  # 0.6 itself will do
    assert found["kind_probability"].tolist() == [0.5, 0.8, 0.6]
    assert found["half"].tolist() == ["unknown", "unknown", "b"]
    assert list(found.index) == names
    assert mapping.best_labels({"kind": table})["kind"].tolist() == ["a", "c", "b"]
    called = table.rename(columns={"c": "unknown"})
    assert mapping.best_labels({"kind": called})["kind"].iloc[1] == "unknown"
    with pytest.raises(ConfigError, match="'unknown'"):
        mapping.best_labels({"kind": called}, 0.5)
    for share in (-0.1, 1.1):
        with pytest.raises(ConfigError, match="min_probability"):
            mapping.best_labels({"kind": table}, share)


def test_matching_pairs_by_hand():
    table = pd.DataFrame(
        [[90, 10, 0], [0, 4, 36], [0, 0, 0]],
        index=pd.Index(["T", "B", "none"], name="coarse"),
        columns=pd.Index(["T1", "T2", "B1"], name="fine"),
    )
    found = mapping.matching_pairs(table, 0.1)
    pairs = list(zip(found["coarse"], found["fine"], strict=True))
    # (T, T2): 10 of 100 and 10 of 14. (B, T2): 4 of 40 and 4 of 14.
    assert pairs == [("T", "T1"), ("B", "B1"), ("T", "T2"), ("B", "T2")]
    assert found["n_cells"].tolist() == [90, 36, 10, 4]
    assert found["share_of_row"].tolist() == pytest.approx([0.9, 0.9, 0.1, 0.1])
    assert found["share_of_column"].tolist() == pytest.approx([1, 1, 10 / 14, 4 / 14])
    strict = mapping.matching_pairs(table, 0.11)
    assert strict["n_cells"].tolist() == [90, 36]
    # A share of the column is asked for as well: 10 of 14.
    assert mapping.matching_pairs(table.T, 0.11)["n_cells"].tolist() == [90, 36]
    assert mapping.matching_pairs(table, 0.0)["n_cells"].tolist() == [90, 36, 10, 4]


# ---------------------------------------------------------------------- pictures


def test_new_cells_lie_where_their_neighbours_are():
    old = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    picture = np.array([[0.0, 0.0], [2.0, 0.0], [4.0, 6.0], [50.0, 50.0], [60.0, 70.0]])
    before = picture.copy()
    found = mapping.place_in_map(old, picture, np.array([[1.1], [10.6]]), 2)
    assert found.tolist() == [[3, 3], [55, 60]]
    np.testing.assert_array_equal(picture, before)
    assert mapping.place_in_map(old, picture, old, 1).tolist() == picture.tolist()
    # More neighbours than cells: all of them.
    everywhere = mapping.place_in_map(old, picture, np.array([[5.0]]), 9)
    np.testing.assert_allclose(everywhere, picture.mean(0)[None])
    # One of five neighbours lies far out.
    assert mapping.place_in_map(old, picture, np.array([[1.0]])).tolist() == [
        picture.mean(0).tolist()
    ]


# -------------------------------------------------------------------- query maps


@pytest.mark.parametrize(
    ("how", "key"), [("heads", KEYS[0]), ("heads", KEYS[1]), ("knn", KEYS[0]),
                     ("knn", KEYS[1]), ("joint", KEYS[1])]
)  # fmt: skip
def test_a_query_is_labelled_three_ways(how, key, model, reference, query):
    before = query.copy()
    given = {} if how == "heads" else {"reference": reference}
    out = model.map_query(query, how=how, label_key=key, **given)
    assert (out.obs["predicted"] == query.obs[key].astype(str)).mean() > 0.8
    table = out.obsm["probabilities"]
    assert list(table.columns) == sorted(reference.obs[key].unique())
    assert list(table.index) == list(query.obs_names)
    np.testing.assert_allclose(table.sum(1), 1, atol=1e-6)
    assert (out.obs["predicted"].astype(str) == table.idxmax(axis=1)).all()
    np.testing.assert_allclose(out.obs["probability"], table.max(axis=1))
    about = out.uns["scgenlib"]
    assert (about["verb"], about["how"], about["genes_missing"]) == (
        "map_query",
        how,
        0,
    )
    if how != "joint":
        np.testing.assert_array_equal(out.X, codes(model, query))
    pd.testing.assert_frame_equal(query.obs, before.obs)
    assert "probabilities" not in query.obsm


def test_neighbours_vote_for_a_query(model, reference, query):
    hidden = reference.copy()
    hidden.obs["cell_type"] = hidden.obs["cell_type"].astype(object)
    hidden.obs.iloc[:40, hidden.obs.columns.get_loc("cell_type")] = None
    hidden.obs.iloc[40:80, hidden.obs.columns.get_loc("cell_type")] = "undefined"
    one, two = (
        model.map_query(query, how="knn", reference=r, n_neighbours=1)
        for r in (hidden, reference[80:])
    )
    # Cells without a label do not vote, and "undefined" is no type.
    pd.testing.assert_frame_equal(one.obsm["probabilities"], two.obsm["probabilities"])
    from sklearn.neighbors import NearestNeighbors

    voters = reference[80:]
    near = NearestNeighbors(n_neighbors=1).fit(codes(model, voters))
    at = near.kneighbors(codes(model, query), return_distance=False)[:, 0]
    expected = voters.obs["cell_type"].astype(str).to_numpy()[at]
    assert (one.obs["predicted"].astype(str).to_numpy() == expected).all()


def test_cells_with_the_marker_of_the_model_do_not_vote(reference, query):
    marked = reference.copy()
    text = reference.obs["lineage"].astype(object).to_numpy(copy=True)
    text[:90] = "to do"
    marked.obs["lineage"] = text
    small = fit(marked, "lineage", unlabel_key="to do")
    for how in ("heads", "knn", "joint"):
        out = small.map_query(query, how=how, reference=marked)
        assert list(out.obsm["probabilities"].columns) == ["A", "B"]


def test_a_doubtful_cell_is_unknown(model, query):
    out = model.map_query(query, min_probability=0.9)
    doubtful = out.obs["probability"] < 0.9
    assert ((out.obs["predicted"] == "unknown") == doubtful).all()


def test_neighbours_need_no_head(reference, query):
    bare = fit(reference, None)
    with pytest.raises(ConfigError, match="no head"):
        bare.map_query(query)
    for how in ("knn", "joint"):
        with pytest.raises(ConfigError, match="label_key"):
            bare.map_query(query, how=how, reference=reference)
        out = bare.map_query(query, how=how, reference=reference, label_key="lineage")
        assert set(out.obs["predicted"]) <= {"A", "B"}


def test_what_a_mapping_needs_is_named(model, reference, query):
    with pytest.raises(ConfigError, match="joint"):
        model.map_query(query, how="joined")
    for how in ("knn", "joint"):
        with pytest.raises(ConfigError, match="reference"):
            model.map_query(query, how=how)
        with pytest.raises(ConfigError, match="cell_typ'"):
            model.map_query(query, how=how, reference=reference, label_key="cell_typ")
    with pytest.raises(ConfigError, match="lineag'.*'lineage'"):
        model.map_query(query, label_key="lineag")
    with pytest.raises(NotFittedError):
        ScAtlasVAE().map_query(query)


# ------------------------------------------------------------------------- refit


def test_a_joint_fit_never_reads_the_labels_of_the_query(model, reference, query):
    settings = {"max_epoch": 2}
    small = fit(reference, "cell_type", **settings)

    def joint(cells):
        made = small.refit(reference, cells)
        return made, state(made)

    shuffled, bare, strange = query.copy(), query.copy(), query.copy()
    shuffled.obs["cell_type"] = query.obs["cell_type"].to_numpy()[::-1]
    assert (shuffled.obs["cell_type"] != query.obs["cell_type"]).any()
    del bare.obs["cell_type"]
    strange.obs["cell_type"] = "never seen"
    made, expected = joint(query)
    for cells in (shuffled, bare, strange):
        again, found = joint(cells)
        assert [k for k in found if not torch.equal(found[k], expected[k])] == []
        assert again.sizes_ == made.sizes_ and again.data_hash_ == made.data_hash_
    # It reads those of the reference, and the cells of both.
    other = reference.copy()
    other.obs["cell_type"] = reference.obs["cell_type"].to_numpy()[::-1]
    changed = state(small.refit(other, query))
    assert any(not torch.equal(changed[k], expected[k]) for k in expected)
    assert made.n_cells_ == reference.n_obs + query.n_obs
    assert made.sizes_["batch"]["batch"] == ["batch1", "batch2", "batch3", "query1"]
    assert small.sizes_["batch"]["batch"] == ["batch1", "batch2", "batch3"]


def test_a_joint_fit_has_the_genes_and_settings_of_the_model(reference, query):
    small = fit(reference, KEYS, n_genes=30)
    fewer = query[:, query.var_names[10:]].copy()
    made = small.refit(reference, fewer)
    assert made.genes_ == small.genes_ and len(made.genes_) == 30
    assert made.config == small.config.replace(n_genes=None)
    assert list(made.sizes_["label"]) == KEYS and made.seed == small.seed
    assert list(small.refit(reference, query, label_key="lineage").sizes_["label"]) == [
        "lineage"
    ]


def test_a_joint_fit_of_logs_needs_no_counts(reference, query):
    logs, more = reference.copy(), query.copy()
    del logs.layers["counts"], more.layers["counts"]
    small = fit(logs, reconstruction_method="gaussian")
    out = small.map_query(more, how="joint", reference=logs)
    assert np.isfinite(out.X).all() and out.n_obs == query.n_obs


@pytest.mark.parametrize("name", ["part", "kind"])
def test_the_columns_of_a_joint_fit_may_have_any_name(name, reference, query):
    cells, more = reference.copy(), query.copy()
    for part in (cells, more):
        part.obs[name] = pd.Categorical([0, 1, 1] * (part.n_obs // 3))
    small = fit(cells, batch_key=name)
    more.obs["cell_type"] = "never seen"
    made = small.refit(cells, more)
    assert made.sizes_["label"] == {"cell_type": ["A1", "A2", "B1", "B2"]}
    assert made.sizes_["batch"] == {name: ["0", "1"]}


# ----------------------------------------------------------------------- surgery


# 11: only the vectors of new batches move.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_embedding": "onehot"},
        {"dispersion": "gene-batch", "reconstruction_method": "nb"},
        {"encode_batch": True},
        {"use_batch_norm": False, "use_layer_norm": True},
    ],
    ids=str,
)
def test_surgery_moves_the_new_rows_only(changes, reference, query):
    old = fit(reference, KEYS, **{"max_epoch": 2, **changes})
    before = state(old)
    new = old.add_batches(query, max_epoch=2)
    after = state(new)
    tables = {k for k in before if "/batch." in k}
    if changes.get("dispersion") == "gene-batch":
        tables.add("module/decoder/rate.weight")
    more = {"encode_batch", "dispersion"} & changes.keys()
    assert len(tables) == 1 + len(more)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name in tables:
            assert len(after[name]) == len(tensor) + 1
            assert torch.equal(after[name][:-1], tensor), name
            # It began at the mean of the others and was learnt.
            assert (after[name][-1] - tensor.mean(0)).abs().max() > 1e-3, name
        else:
            assert torch.equal(after[name], tensor), name
    assert all(torch.equal(v, before[k]) for k, v in state(old).items())
    # Codes and decoded expression of old cells are what they were, also of those
    # whose batch is not known.
    stranger = reference.copy()
    stranger.obs["batch"] = "other"
    np.testing.assert_array_equal(new.denoise(stranger).X, old.denoise(stranger).X)
    np.testing.assert_array_equal(codes(new, reference), codes(old, reference))
    np.testing.assert_array_equal(new.denoise(reference).X, old.denoise(reference).X)
    assert new.sizes_["batch"]["batch"][-1] == "query1"
    assert old.sizes_["batch"]["batch"][-1] == "batch3"
    if not changes.get("encode_batch"):
        np.testing.assert_array_equal(codes(new, query), codes(old, query))
    assert np.abs(new.denoise(query).X - old.denoise(query).X).max() > 1e-4
    assert all(not m.training for m in new.modules_.values())
    assert all(p.requires_grad for m in new.modules_.values() for p in m.parameters())


def test_surgery_makes_the_query_more_likely(model, query):
    """The new vector explains the query better than the mean of the old ones."""
    new = model.add_batches(query, max_epoch=30)

    def gap(of):
        share = np.expm1(of.denoise(query).X).mean(0)
        counts = query.layers["counts"].toarray()
        own = (counts / counts.sum(1, keepdims=True)).mean(0) * 1e4
        return np.abs(share - own).sum()

    assert gap(new) < 0.9 * gap(model)


def test_surgery_is_repeated_and_saved(model, query, tmp_path):
    one, two = (model.add_batches(query, max_epoch=1) for _ in range(2))
    assert one.facts_["added_batches"] == {"batch": ["query1"]}
    found = state(two)
    assert all(torch.equal(v, found[k]) for k, v in state(one).items())
    one.save(tmp_path / "run")
    again = ScAtlasVAE.load(tmp_path / "run", device="cpu")
    for batch in ("query1", "batch1", "other"):
        cells = query.copy()
        cells.obs["batch"] = batch
        np.testing.assert_array_equal(again.denoise(cells).X, one.denoise(cells).X)
    # More batches can be added to it; an unknown one stays what it was.
    more = query[:30].copy()
    more.obs["batch"] = "later"
    last = again.add_batches(more, max_epoch=1)
    assert last.sizes_["batch"]["batch"][-2:] == ["query1", "later"]
    # What it makes says so; what the first model makes does not.
    found = [made.embed(more).uns["scgenlib"] for made in (one, last)]
    assert found[0]["added_batches"] == {"batch": ["query1"]}
    assert found[1]["added_batches"] == {"batch": ["query1", "later"]}
    assert "added_batches" not in model.embed(more).uns["scgenlib"]
    np.testing.assert_array_equal(last.denoise(query).X, one.denoise(query).X)
    np.testing.assert_array_equal(last.denoise(cells).X, one.denoise(cells).X)


def test_surgery_adds_rows_at_the_level_that_has_new_ones(reference, query):
    cells, more = reference.copy(), query[:30].copy()
    cells.obs["study"] = np.where(cells.obs["batch"] == "batch1", "x", "y")
    more.obs["study"] = ["x", None, "a"] * 10
    more.obs["batch"] = "batch2"
    old = fit(cells, None, ["batch", "study"])
    assert new_batches(old, more.obs) == {"batch": [], "study": ["a"]}
    new = old.add_batches(more, max_epoch=1)
    # New names stand behind old ones also where the alphabet says otherwise.
    assert new.sizes_["batch"] == {
        "batch": ["batch1", "batch2", "batch3"],
        "study": ["x", "y", "a"],
    }
    before, after = state(old), state(new)
    name = "module/decoder/batch.{}.weight"
    assert torch.equal(after[name.format(0)], before[name.format(0)])
    assert torch.equal(after[name.format(1)][:2], before[name.format(1)])
    assert len(after[name.format(1)]) == 3


def test_what_surgery_needs_is_named(model, reference, query):
    with pytest.raises(ConfigError, match="no batch that the model does not know"):
        model.add_batches(reference)
    for options in ({"batch_key": None}, {"inject_batch": False}):
        with pytest.raises(ConfigError, match="no vectors of batches"):
            fit(reference, **options).add_batches(query)
    with pytest.raises(ConfigError, match="max_epoch"):
        model.add_batches(query, max_epoch=0)
    bare = query.copy()
    del bare.obs["batch"]
    with pytest.raises(DataError, match="no batch column 'batch'"):
        model.add_batches(bare)
    with pytest.raises(NotFittedError):
        ScAtlasVAE().add_batches(query)


# ------------------------------------------------------------------- other genes


@pytest.mark.parametrize("method", ["mse", "normal"])
def test_a_model_for_other_genes_keeps_the_codes(method, model, reference, query):
    genes = reference.var_names[:60]
    cells, new = (c[:, genes].copy() for c in (reference, query))
    # The divergence is half the square: twice the weight is the same pull.
    weight = {"mse": 1.0, "normal": 2.0}[method]
    settings = {"constrain_latent_method": method, "constrain_weight": weight}
    settings |= {"max_epoch": 20}
    made = model.on_genes(cells, **settings)
    assert made.genes_ == list(genes) and model.genes_ == list(reference.var_names)
    assert made.config == model.config.replace(**settings, n_genes=None)
    assert list(made.sizes_["label"]) == KEYS
    spread = codes(model, cells).var(0).sum()

    def off(made, cells):
        gap = codes(made, cells) - codes(model, cells)
        return (gap**2).sum(1).mean() / spread

    # Codes that are all 0 would be a spread away, and unrelated ones two or more.
    # New cells are held as well.
    assert off(made, cells) < 0.6 and off(made, new) < 0.7
    free = model.on_genes(cells, max_epoch=4, constrain_weight=0.0)
    assert off(free, cells) > 0.9


def test_other_genes_without_the_columns_of_the_model(model, reference):
    bare = reference[:, :40].copy()
    del bare.obs["batch"], bare.obs["lineage"]
    bare.obs["cell_type"] = "A1"
    made = model.on_genes(bare, max_epoch=1)
    assert made.sizes_["batch"] == made.sizes_["label"] == {}


def test_a_row_of_zeros_is_free(reference):
    rng = np.random.default_rng(0)
    given = rng.standard_normal((reference.n_obs, 10)).astype(np.float32)
    given[:100] = 0
    made = fit(reference, None, latent=given, max_epoch=2)
    term = made.history_.query("term == 'latent'")["value"]
    assert (term > 0).all()
    nothing = fit(reference, None, latent=np.zeros_like(given), max_epoch=2)
    assert (nothing.history_.query("term == 'latent'")["value"] == 0).all()
    plain = fit(reference, None, max_epoch=2)
    for name, value in state(plain).items():
        torch.testing.assert_close(state(nothing)[name], value)
    for wrong in (given[:-1], given[:, :3], np.where(given == 0, np.nan, given)):
        with pytest.raises(DataError, match="one code per cell"):
            fit(reference, None, latent=wrong)
