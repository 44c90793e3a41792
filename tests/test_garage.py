"""GARAGE: the graph, the attention, the seeds, the GAN, and the facts of the method."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn

from scgenlib import datasets, garage, graph, losses, preprocess, simulate
from scgenlib.errors import ConfigError, DataError
from scgenlib.garage import (
    GARAGE,
    GAT,
    Discriminator,
    GARAGEConfig,
    Generator,
    attention_scores,
    choose_seeds,
    discriminator_step,
    generator_step,
    knn_graph,
    mixed_batch,
    seed_count,
)
from scgenlib.nets import count_parameters

# Shapes and type sizes of the four data sets that the method was published with.
SHAPES = {
    "yan": (90, 10564, 6),
    "pollen": (299, 14802, 11),
    "cbmc": (7895, 2000, 13),
    "muraro": (2126, 19156, 10),
}
TYPE_SIZES = {
    "yan": [6, 6, 12, 20, 16, 30],
    "pollen": [8, 15, 15, 17, 22, 24, 25, 37, 40, 42, 54],
    "cbmc": [49, 70, 96, 105, 119, 182, 230, 273, 350, 1089, 1248, 1791, 2293],
    "muraro": [3, 4, 21, 80, 101, 193, 219, 245, 448, 812],
}


def real(name):
    """A data set that is not in the package, or a skip that says why."""
    try:
        return datasets.load(name, verbose=False)
    except DataError as error:
        pytest.skip(f"{name} is not at hand: {error}")


@pytest.fixture(scope="module")
def cells():
    return simulate.simulate(n_cells=150, n_genes=60, seed=2)


@pytest.fixture(scope="module")
def network(cells):
    """A GAT on simulated cells: expression, graph, network."""
    x = torch.from_numpy(cells.X.toarray())
    torch.manual_seed(0)
    return x, knn_graph(cells.X), GAT(60, 6)


def config(**changes):
    small = {"gat_epochs": 3, "gan_total_iters": 4}
    return GARAGEConfig.profile("tiny", **{**small, **changes})


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


# ---------------------------------------------------------------------- graph


def test_graph_by_hand():
    # On a line at 0, 1, 3, 7: the neighbour of each is the cell before it.
    X = np.array([[0.0], [1.0], [3.0], [7.0]])
    links = knn_graph(X, 2).tolist()
    assert links == [[0, 0, 1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 1, 2, 2, 3]]


def test_graph_is_exact_in_blocks_and_from_sparse_or_dense(monkeypatch):
    rng = np.random.default_rng(0)
    X = sparse.random(120, 40, 0.3, "csr", np.float32, random_state=rng)
    whole = knn_graph(X, 4)
    assert torch.equal(whole, knn_graph(X.toarray(), 4))
    monkeypatch.setattr(graph, "_BLOCK_BYTES", 4 * 120 * 7)  # seven rows a block
    assert torch.equal(whole, knn_graph(X, 4))
    d = np.linalg.norm(X.toarray()[:, None] - X.toarray()[None], axis=2)
    nearest = np.sort(np.argsort(d, axis=1, kind="stable")[:, :4], axis=1)
    assert np.array_equal(whole[1].reshape(120, 4), nearest)


def test_duplicates_keep_their_own_link_and_ties_go_to_the_first():
    X = np.zeros((5, 3))
    assert knn_graph(X, 2)[1].reshape(5, 2).tolist() == [
        [0, 1],
        [0, 1],
        [0, 2],
        [0, 3],
        [0, 4],
    ]


def test_fewer_cells_than_neighbours():
    with pytest.raises(DataError, match="4 cells, n_neighbors=5"):
        knn_graph(np.eye(4))


def test_graph_equals_ball_tree_on_yan():
    from sklearn.neighbors import NearestNeighbors

    X = real("yan").X
    tree = NearestNeighbors(n_neighbors=5, algorithm="ball_tree").fit(X.toarray())
    expected = np.sort(tree.kneighbors(X.toarray(), return_distance=False), axis=1)
    assert np.array_equal(knn_graph(X)[1].reshape(-1, 5), expected)
    assert knn_graph(X).shape == (2, 450)


# ------------------------------------------------------------------------ GAT


@pytest.mark.parametrize(
    ("name", "count"),
    [("yan", 2706706), ("pollen", 3792929), ("cbmc", 516135), ("muraro", 4907294)],
)
def test_gat_parameters(name, count):
    _, genes, types = SHAPES[name]
    assert 256 * genes + 768 + 259 * types == count
    assert count_parameters(GAT(genes, types)) == count


def test_gat_shapes_and_attention(network):
    x, links, gat = network
    assert gat(x, links).shape == (150, 6)
    assert gat.layer1(x, links).shape == (150, 256)
    _, (_, alpha1) = gat.layer1(x, links, return_attention_weights=True)
    links2, alpha2 = gat.attention(x, links)
    assert (alpha1.shape, alpha2.shape) == ((750, 8), (750, 1))
    # What arrives at a cell sums to 1: its mean is one over the in-degree, always.
    arriving = torch.zeros(150).index_add_(0, links2[1], alpha2[:, 0])
    torch.testing.assert_close(arriving, torch.ones(150))
    degree = torch.bincount(links2[1], minlength=150)
    backwards = attention_scores(links2.flip(0), alpha2, 150).float()
    torch.testing.assert_close(backwards, 1 / degree)
    assert alpha2.sum().item() == pytest.approx(150, rel=1e-5)


def test_boost(network):
    x, links, gat = network
    rare = torch.zeros(150, 1)
    rare[:10] = 1
    plain = torch.relu(gat.layer1(x, links))
    assert torch.equal(gat(x, links, 1 + 0 * rare), gat.layer2(plain, links))
    assert torch.equal(gat(x, links, 1 + 0 * rare), gat(x, links))
    tripled = torch.cat([3 * plain[:10], plain[10:]])
    expected = gat.layer2(tripled, links)
    torch.testing.assert_close(gat(x, links, 1 + 2.0 * rare), expected)


def test_gat_reads_sparse_input(network, cells):
    x, links, gat = network
    assert not graph.gat_input(cells.X, "cpu").is_sparse_csr
    stored = graph.gat_input(cells.X, "cpu", dense_bytes=1000)
    assert stored.is_sparse_csr
    torch.testing.assert_close(gat(stored, links), gat(x, links))


# ---------------------------------------------------------------------- seeds


def test_attention_scores_by_hand():
    # 0 -> 1 (0.4), 0 -> 2 (0.2), 1 -> 0 (0.6); cell 2 reaches nobody.
    links = torch.tensor([[0, 0, 1], [1, 2, 0]])
    scores = attention_scores(links, torch.tensor([[0.4], [0.2], [0.6]]), 3)
    torch.testing.assert_close(scores.float(), torch.tensor([0.3, 0.6, 0.0]))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("yan", (9, 18, 27)),
        ("pollen", (30, 60, 90)),
        ("cbmc", (790, 1579, 2369)),
        ("muraro", (213, 426, 638)),
    ],
)
def test_seed_counts(name, counts):
    n = SHAPES[name][0]
    assert tuple(seed_count(n, share) for share in (0.1, 0.2, 0.3)) == counts
    assert (seed_count(n, 0.0), seed_count(n, 1.0)) == (0, n)
    assert seed_count(100, 0.07) == 7  # 7.000000000000001 in floating point


@pytest.mark.parametrize(
    ("name", "threshold", "below", "at_most"),
    [
        ("yan", 10, 12, 12),
        ("pollen", 25, 101, 126),
        ("cbmc", 200, 621, 621),
        ("muraro", 200, 402, 402),
    ],
)
def test_priority_cells(name, threshold, below, at_most):
    sizes = {f"t{i}": n for i, n in enumerate(TYPE_SIZES[name])}
    labels = np.repeat(list(sizes), list(sizes.values()))
    assert len(labels) == SHAPES[name][0]
    for rule, expected in (("<", below), ("<=", at_most)):
        rare = preprocess.rare_types(labels, threshold, rule)
        assert sum(sizes[name] for name in rare) == expected


def test_choose_seeds():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9])
    assert choose_seeds(3, 4, scores=scores).tolist() == [1, 3, 2]
    rare = np.array([False, False, True, True])
    rng = np.random.default_rng(0)
    first = choose_seeds(3, 4, "rare-first", is_rare=rare, rng=rng)
    assert set(first[:2]) == {2, 3} and first[2] in (0, 1)
    drawn = choose_seeds(4, 4, "random", rng=rng)
    assert sorted(drawn) == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="0 to 4"):
        choose_seeds(5, 4, scores=scores)
    with pytest.raises(ConfigError, match="Did you mean 'rare-first'"):
        choose_seeds(1, 4, "rare_first", rng=rng)
    with pytest.raises(ConfigError, match="needs scores"):
        choose_seeds(1, 4, "attention")


def test_seeds_do_not_depend_on_the_order_of_cells(network):
    x, links, gat = network
    shuffle = torch.from_numpy(np.random.default_rng(1).permutation(150))
    with torch.no_grad():
        scores = attention_scores(*gat.attention(x, links), 150)
        shuffled_links = knn_graph(x[shuffle].numpy())
        shuffled = attention_scores(*gat.attention(x[shuffle], shuffled_links), 150)
    torch.testing.assert_close(shuffled, scores[shuffle], rtol=1e-4, atol=1e-6)
    # Where two scores are equal up to rounding, the order of the cells decides.
    ranked = np.sort(scores.numpy())
    k = 20 + int(np.argmax(np.diff(ranked)[-41:-20][::-1]))
    chosen = set(choose_seeds(k, 150, scores=scores).tolist())
    again = shuffle[choose_seeds(k, 150, scores=shuffled)].tolist()
    assert set(again) == chosen


# ---------------------------------------------------------------- mixed input


def test_mixed_batch_of_pollen():
    seeds = torch.rand(60, 14802)
    rng = torch.Generator().manual_seed(0)
    batch, origin = mixed_batch(
        299, seeds, 0.2, noise="uniform", generator=rng, picks=torch.arange(60)
    )
    assert batch.shape == (299, 14802)
    assert (origin[:239] == -1).all()
    assert origin[239:].tolist() == list(range(60))
    assert torch.equal(batch[239:], seeds)
    noise = batch[:239]
    assert noise.abs().max() <= 1
    assert noise.mean().item() == pytest.approx(0, abs=2e-3)
    assert noise.var().item() == pytest.approx(1 / 3, abs=2e-3)
    normal, origin = mixed_batch(299, seeds, 0.2, generator=rng)
    assert normal[:239].var().item() == pytest.approx(1, abs=5e-3)
    assert torch.equal(normal[239:], seeds[origin[239:]])


def test_leakage_of_none_and_all():
    seeds = torch.rand(5, 3)
    rngs = [torch.Generator().manual_seed(7) for _ in range(2)]
    batch, origin = mixed_batch(16, seeds, 0.0, generator=rngs[0])
    assert torch.equal(batch, torch.randn(16, 3, generator=rngs[1]))
    assert (origin == -1).all()
    batch, origin = mixed_batch(16, seeds, 1.0, generator=rngs[0])
    assert torch.equal(batch, seeds[origin])


# ------------------------------------------------------------------------ GAN


@pytest.mark.parametrize(
    ("name", "of_g", "of_d"),
    [
        ("yan", 22696260, 5540865),
        ("pollen", 31379922, 7710721),
        ("cbmc", 5148624, 1156097),
        ("muraro", 40301268, 9939969),
    ],
)
def test_gan_parameters(name, of_g, of_d):
    genes = SHAPES[name][1]
    assert (2049 * genes + 1050624, 512 * genes + 132097) == (of_g, of_d)
    with torch.device("meta"):
        assert count_parameters(Generator(genes)) == of_g
        assert count_parameters(Discriminator(genes)) == of_d


def test_output_activations():
    torch.manual_seed(0)
    z = 50 * torch.randn(64, 20)
    out = {
        kind: Generator(20, (32,), output_activation=kind)(z)
        for kind in ("sigmoid", "relu", "linear")
    }
    assert 0 <= out["sigmoid"].min() and out["sigmoid"].max() <= 1
    assert out["relu"].min() == 0 and out["relu"].max() > 1
    assert out["linear"].min() < 0 and out["linear"].max() > 1


def test_loss_landmarks():
    def d_loss(real_logit, fake_logit):
        logits = torch.tensor([[real_logit]]), torch.tensor([[fake_logit]])
        return losses.discriminator_loss(*logits, 0.9, 0.1).item()

    best = math.log(9)
    assert d_loss(best, -best) == pytest.approx(0.6502, abs=1e-4)
    assert d_loss(best + 0.1, -best) > d_loss(best, -best)
    assert d_loss(0.0, 0.0) == pytest.approx(1.3863, abs=1e-4)
    assert losses.generator_loss(torch.tensor([-best])).item() == pytest.approx(
        2.3026, abs=1e-4
    )
    assert losses.generator_loss(torch.zeros(1)).item() == pytest.approx(
        0.6931, abs=1e-4
    )


def test_each_step_moves_one_player():
    torch.manual_seed(0)
    g, d = Generator(6, (8,)), Discriminator(6, (8,))
    g0, d0 = Generator(6, (8,)), Discriminator(6, (8,))
    g0.load_state_dict(g.state_dict())
    d0.load_state_dict(d.state_dict())
    of_g, of_d = (torch.optim.SGD(net.parameters(), 0.1) for net in (g, d))
    z = torch.randn(4, 6)
    loss = discriminator_step(d, of_d, torch.rand(4, 6), g(z).detach())
    assert loss.item() == pytest.approx(1.386, abs=0.1)
    assert same(g, g0) and not same(d, d0)
    d0.load_state_dict(d.state_dict())
    generator_step(g, d, of_g, z, clip_norm=1e-3)
    assert same(d, d0) and not same(g, g0)
    norm = torch.cat([p.grad.reshape(-1) for p in g.parameters()]).norm()
    assert norm <= 1e-3 * 1.0001


def plain_gan(X, scale, c, seed):
    """A GAN written out with nothing but torch."""
    torch.manual_seed(seed)
    n, genes = X.shape
    (w1, w2), (v1, v2) = c.generator_hidden, c.discriminator_hidden

    def net(*widths):
        layers = []
        for a, b in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return layers[:-1]

    g = nn.Sequential(*net(genes, w1, w2, genes), nn.Sigmoid())
    d = nn.Sequential(*net(genes, v1, v2, 1))
    of_g = torch.optim.Adam(g.parameters(), c.g_lr, fused=True)
    of_d = torch.optim.Adam(d.parameters(), c.d_lr, fused=True)
    bce = nn.functional.binary_cross_entropy_with_logits
    rng = torch.Generator().manual_seed(seed)
    cells, size = torch.from_numpy(X.toarray()) / scale, c.batch_size
    for _ in range(c.gan_total_iters):
        rows = torch.randint(n, (5 * size,), generator=rng).split(size)
        zs = [torch.randn(size, genes, generator=rng) for _ in range(5)]
        for row, z in zip(rows, zs, strict=True):
            on_real, on_fake = d(cells[row]), d(g(z).detach())
            loss = bce(on_real, torch.full_like(on_real, 0.9))
            loss = loss + bce(on_fake, torch.full_like(on_fake, 0.1))
            of_d.zero_grad()
            loss.backward()
            of_d.step()
        for _ in range(2):
            out = d(g(torch.randn(size, genes, generator=rng)))
            loss = bce(out, torch.ones_like(out))
            of_g.zero_grad()
            loss.backward()
            of_g.step()
    return g, d


def test_without_leakage_it_is_a_plain_gan(cells):
    c = GARAGEConfig.documented("tiny", leakage_fraction=0.0, gan_total_iters=10)
    model = GARAGE(c, seed=4, device="cpu").fit(cells)
    assert set(model.modules_) == {"generator", "discriminator"}
    assert len(model.select_seeds()) == 0
    g, d = plain_gan(cells.X, cells.X.max(), c, seed=4)
    # The same up to the order of sums: D sees both halves in one product.
    for ours, theirs in (("generator", g), ("discriminator", d)):
        pairs = zip(model.modules_[ours].parameters(), theirs.parameters(), strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_number_of_updates_and_history(cells, monkeypatch):
    calls = {"generator": 0, "discriminator": 0, "gat": 0}
    for kind in (torch.optim.Adam, torch.optim.RMSprop):
        plain = kind.step

        def counted(self, *args, plain=plain, **kwargs):
            size = sum(p.numel() for g in self.param_groups for p in g["params"])
            calls[sizes[size]] += 1
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(kind, "step", counted)
    model = GARAGE(config(), device="cpu")
    c = model.config
    sizes = {
        count_parameters(GAT(60, 6)): "gat",
        count_parameters(Generator(60, c.generator_hidden)): "generator",
        count_parameters(Discriminator(60, c.discriminator_hidden)): "discriminator",
    }
    model.fit(cells)
    assert calls == {"gat": 3, "discriminator": 20, "generator": 8}
    history = model.history_
    d_loss = history.loc[history["term"] == "d_loss", "value"]
    assert len(d_loss) == 4 and (d_loss >= 0.6502).all()
    paper = GARAGEConfig.profile("paper")
    assert paper.gan_total_iters * paper.nd_steps == 100005
    assert paper.gan_total_iters * paper.ng_steps == 40002


# ------------------------------------------------------------------ estimator


def test_reference_table_is_the_paper_profile():
    expected = {
        "gat_epochs": 7501,
        "gan_total_iters": 20001,
        "leakage_fraction": 0.2,
        "nd_steps": 5,
        "ng_steps": 2,
        "g_lr": 2e-4,
        "d_lr": 4e-4,
        "label_smooth_real": 0.9,
        "label_smooth_fake": 0.1,
        "generator_hidden": (1024, 1024),
        "discriminator_hidden": (512, 256),
        "priority_weight": 2.0,
        "n_neighbors": 5,
        "gat_hidden": 32,
        "gat_heads": 8,
        "gat_lr": 5e-3,
        "negative_slope": 0.2,
    }
    paper = GARAGEConfig.profile("paper")
    assert {name: getattr(paper, name) for name in expected} == expected
    documented = GARAGEConfig.documented()
    assert documented.output_activation == "sigmoid"
    assert (documented.optimiser, documented.noise) == ("adam", "normal")
    assert (documented.adam_beta1, documented.hidden_slope) == (0.9, 0.0)
    published = GARAGEConfig.published()
    assert published.output_activation == "linear"
    assert (published.optimiser, published.noise) == ("rmsprop", "uniform")
    assert (published.batch_size, published.clip_norm) == (None, 1.0)


@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_leakage_fraction_outside_0_to_1(value):
    with pytest.raises(ConfigError, match="leakage_fraction is out of range"):
        GARAGEConfig(leakage_fraction=value)


def test_clear_errors(cells):
    with pytest.raises(DataError, match="needs cell types to learn from"):
        GARAGE(config(), device="cpu").fit(cells, label_key=None)
    with pytest.raises(DataError, match="No cell type is rare"):
        GARAGE(config(rare_threshold=2), device="cpu").fit(cells)
    with pytest.raises(DataError, match="3 cells, n_neighbors=5"):
        few = [int(np.argmax(cells.obs["cell_type"] == t)) for t in ("A", "B", "C")]
        GARAGE(config(), device="cpu").fit(cells[few].copy())


@pytest.mark.parametrize("rule", ["attention", "random", "rare-first"])
def test_select_seeds(cells, rule):
    model = GARAGE(config(seed_rule=rule), seed=1, device="cpu").fit(cells)
    seeds = model.select_seeds()
    assert list(seeds) == ["rank", "cell", "cell_type", "score", "is_rare"]
    assert len(seeds) == 30 and seeds["cell"].is_unique
    assert seeds["rank"].tolist() == list(range(1, 31))
    of_type = cells.obs.loc[seeds["cell"], "cell_type"].astype(str)
    assert of_type.tolist() == seeds["cell_type"].tolist()
    if rule == "attention":
        assert seeds["score"].is_monotonic_decreasing
        assert "gat" in model.modules_
    else:
        assert seeds["score"].isna().all()
        assert "gat" not in model.modules_
    if rule == "rare-first":
        n_rare = int((cells.obs["cell_type"] == "rare").sum())
        assert seeds["is_rare"].sum() == min(30, n_rare)
        assert seeds["is_rare"].is_monotonic_decreasing


def test_start_of_the_gan_does_not_depend_on_the_seed_rule(cells):
    nets = [
        GARAGE(config(seed_rule=rule, gan_total_iters=0), device="cpu").fit(cells)
        for rule in ("attention", "random")
    ]
    assert same(nets[0].modules_["generator"], nets[1].modules_["generator"])


def test_card_threshold_is_scaled_to_the_cells_given(cells):
    cells = cells.copy()
    sizes = cells.obs["cell_type"].value_counts()
    second = int(sizes.sort_values().iloc[1])
    cells.uns["dataset"]["rare_threshold"] = 2 * (second + 1)
    cells.uns["dataset"]["n_cells"] = 300
    model = GARAGE(config(), device="cpu").fit(cells)
    assert len(model.facts_["rare_types"]) == 2
    model = GARAGE(config(rare_threshold=second), device="cpu").fit(cells)
    assert model.facts_["rare_types"] == ["rare"]


def test_generate(cells):
    model = GARAGE(config(output_activation="linear"), device="cpu").fit(cells)
    made = model.generate(40, seed=1, seed_share=0.25)
    assert made.X.format == "csr" and made.X.dtype == np.float32
    assert made.X.min() >= 0
    about = made.uns["scgenlib"]
    assert 0 < about["clipped_share"] < 1
    assert (about["method"], about["seed_share"]) == ("garage", 0.25)
    assert made.obs["from_seed"].sum() == 10
    assert not made.obs["from_seed"].iloc[:30].any()
    names = made.obs.loc[made.obs["from_seed"], "seed_cell"]
    assert set(names) <= set(model.select_seeds()["cell"])
    assert (made.obs.loc[~made.obs["from_seed"], "seed_cell"] == "").all()
    assert made.obs["label_confidence"].between(1 / 6, 1).all()
    assert list(made.obs["cell_type"].cat.categories) == model.labels_
    assert list(made.var_names) == list(cells.var_names)
    for bad in (-0.1, 1.5):
        with pytest.raises(ConfigError, match="seed_share"):
            model.generate(5, seed_share=bad)
    with pytest.raises(ConfigError, match="n_cells"):
        model.generate(0)


def test_labels_of_real_cells_are_found(cells):
    model = GARAGE(config(gat_epochs=0, gan_total_iters=0), device="cpu").fit(cells)
    found = model._describe(cells.X, np.full(150, -1))["cell_type"].to_numpy()
    assert (found == cells.obs["cell_type"].to_numpy()).mean() > 0.9


def test_callbacks_may_generate(cells):
    shots = []

    def shoot(event):
        if event.phase == "gan":
            shots.append(event.model.generate(5).X.toarray())

    alone = GARAGE(config(), device="cpu").fit(cells).generate(5).X.toarray()
    GARAGE(config(), device="cpu").fit(cells, callbacks=[shoot])
    assert len(shots) == 4
    assert np.array_equal(shots[-1], alone)
    assert not np.array_equal(shots[0], shots[-1])


def test_coordinates_are_not_clipped():
    blobs = simulate.blobs(n_cells=120)
    c = config(output_activation="linear", scaling="none")
    made = GARAGE(c, device="cpu").fit(blobs).generate(50)
    assert made.X.min() < 0
    assert made.uns["scgenlib"]["clipped_share"] == 0


@pytest.mark.parametrize("preset", ["documented", "published"])
def test_presets_run(cells, preset):
    make = getattr(GARAGEConfig, preset)
    c = make("tiny", gat_epochs=2, gan_total_iters=2)
    made = GARAGE(c, device="cpu").fit(cells).generate(30)
    assert np.isfinite(made.X.data).all()
    if preset == "documented":
        assert 0 < made.X.max() <= cells.X.max()


def test_two_types_and_gene_choice(cells):
    two = cells[cells.obs["cell_type"].isin(["A", "B"])].copy()
    model = GARAGE(config(n_genes=20), device="cpu").fit(two)
    assert len(model.genes_) == 20
    assert model.genes_ == list(preprocess.select_genes(two, 20))
    made = model.generate(12)
    assert made.shape == (12, 20)
    found = model._describe(two[:, model.genes_].X, np.full(len(two), -1))
    right = found["cell_type"].to_numpy() == two.obs["cell_type"].to_numpy()
    assert right.mean() > 0.8


def test_all_genes_of_the_card_in_the_paper_profile(cells):
    cells = cells.copy()
    cells.uns["dataset"]["recipe"] = {
        "gene_filter": {"min_cells_fraction": 0.99, "min_value": 0}
    }
    model = GARAGE(config(n_genes=None), device="cpu").fit(cells)
    expected = cells.var_names[preprocess.filter_genes(cells, 0.99, 0)]
    assert 0 < len(expected) < 60
    assert model.genes_ == list(expected)


def test_no_held_out_cell_enters_any_stage(cells, monkeypatch):
    train, test = preprocess.split(cells, seed=3)
    held_out = cells.obs_names.isin(test.obs_names)
    # In a view of all cells the held-out ones are within reach, and told by their 50.
    whole = cells.copy()
    X = cells.X.toarray()
    X[held_out] = 50
    whole.X = sparse.csr_matrix(X)
    seen = {}

    def spy(name):
        stage = getattr(garage, name)

        def watched(given, *rest):
            values = given.X if isinstance(given, AnnData) else given
            seen[name] = (values.shape[0], bool(values.max() < 50))
            return stage(given, *rest)

        monkeypatch.setattr(garage, name, watched)

    for name in ("select_genes", "knn_graph", "_scale"):
        spy(name)
    model = GARAGE(config(n_genes=40), device="cpu").fit(whole[~held_out])
    clean = (train.n_obs, True)
    assert seen == {"select_genes": clean, "knn_graph": clean, "_scale": clean}
    assert set(model.select_seeds()["cell"]) <= set(train.obs_names)
    # Without the held-out cells, the same model: bit for bit.
    alone = GARAGE(config(n_genes=40), device="cpu").fit(train)
    one, two = model._state_tensors(), alone._state_tensors()
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("note", ["my cells", None, {"recipe": 3, "n_cells": "many"}])
def test_a_stranger_in_place_of_the_card_does_not_steer(cells, note):
    plain, strange = cells.copy(), cells.copy()
    del plain.uns["dataset"]
    strange.uns["dataset"] = note
    c = config(n_genes=None)
    models = [GARAGE(c, device="cpu").fit(one) for one in (plain, strange)]
    assert models[0].genes_ == models[1].genes_ == list(cells.var_names)
    assert models[0].facts_ == models[1].facts_


def test_generated_cells_have_the_column_that_was_fitted(cells, tmp_path):
    named = cells.copy()
    named.obs["kind"] = named.obs.pop("cell_type")
    model = GARAGE(config(), device="cpu").fit(named, label_key="kind")
    made = model.generate(10)
    assert "cell_type" not in made.obs
    assert list(made.obs["kind"].cat.categories) == model.labels_
    again = GARAGE.load(model.save(tmp_path / "model"), device="cpu").generate(10)
    assert again.obs.equals(made.obs)


def test_attention_scores_are_on_the_cpu():
    # Half precision stands in for a device without doubles.
    links, alpha = torch.tensor([[0, 0, 1], [0, 1, 1]]), torch.tensor([0.5, 0.25, 0.75])
    scores = attention_scores(links, alpha.half()[:, None], 2)
    assert scores.dtype == torch.float64 and scores.device.type == "cpu"
    assert scores.tolist() == [0.375, 0.75]


def test_same_seed_same_seeds_and_cells(cells):
    models = [GARAGE(config(), seed=s, device="cpu").fit(cells) for s in (5, 5, 6)]
    first, second, third = (model.generate(20).X.toarray() for model in models)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)
    assert models[0].select_seeds().equals(models[1].select_seeds())


def test_nothing_is_dense_above_a_gigabyte(cells, monkeypatch):
    monkeypatch.setattr("scgenlib.garage._DENSE_BYTES", 4 * 150 * 60 - 1)
    # The GAT falls back to sparse products, and learns the same.
    sparse_fit = GARAGE(config(), device="cpu").fit(cells)
    with pytest.raises(ConfigError, match="Set batch_size"):
        GARAGE(config(batch_size=None), device="cpu").fit(cells)
    with pytest.raises(ConfigError, match="Lower leakage_fraction"):
        GARAGE(config(leakage_fraction=1.0), device="cpu").fit(cells)
    monkeypatch.undo()
    dense_fit = GARAGE(config(), device="cpu").fit(cells)
    torch.testing.assert_close(
        sparse_fit.arrays_["scores"], dense_fit.arrays_["scores"], rtol=1e-3, atol=1e-5
    )


def test_many_cells_are_made_in_blocks(cells, monkeypatch):
    model = GARAGE(config(leakage_fraction=0.2), device="cpu").fit(cells)
    monkeypatch.setattr(garage, "_DENSE_BYTES", 4 * len(model.genes_) * 10)
    made = model.generate(35, seed=1)
    # Blocks of 10, 10, 10 and 5 rows, each with a fifth of seed rows, rounded up.
    assert made.n_obs == 35 and made.obs["from_seed"].sum() == 2 + 2 + 2 + 1
    assert made.obs_names.is_unique
