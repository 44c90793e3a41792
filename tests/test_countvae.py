"""The networks of scAtlasVAE, and each term of its loss by another route."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import nn

from scgenlib import losses
from scgenlib.countvae import (
    BatchTable,
    CellBatch,
    CountVAE,
    Decoder,
    Encoder,
    LossWeights,
    Noise,
    batch_mmd,
)
from scgenlib.likelihoods import (
    counts_batch,
    gaussian_log_prob,
    nb_log_prob,
    poisson_log_prob,
    zinb_log_prob,
)

GENES, LATENT = 12, 3


def cells(n=9, labels=2, levels=1, seed=0, weight=None, latent=None) -> CellBatch:
    rng = np.random.default_rng(seed)
    X = sparse.csr_matrix(rng.poisson(1.0, (n, GENES)).astype(np.float32))
    return CellBatch(
        counts_batch(X, np.arange(n)),
        torch.from_numpy(rng.integers(0, 3, (n, levels))),
        torch.from_numpy(rng.integers(0, 4, (n, labels))),
        torch.ones(n) if weight is None else weight,
        latent,
    )


def vae(norm="layer", heads=(4, 4), seed=0, levels=1, decoder=None, **options):
    torch.manual_seed(seed)
    made = CountVAE(
        Encoder(GENES, (7,), LATENT, norm),
        Decoder(LATENT, 7, GENES, (3,) * levels, norm=norm, **(decoder or {})),
        nn.ModuleList(nn.Linear(LATENT, k) for k in heads),
        **{"class_weights": [torch.ones(k) for k in heads], **options},
    )
    torch.manual_seed(seed)  # the same whatever the heads
    for part in (made.decoder.gate, made.decoder.rate):
        if part is not None:
            nn.init.normal_(part.weight, std=0.3)
    return made


def noise(n=9, seed=1) -> Noise:
    rng = torch.Generator().manual_seed(seed)
    return Noise(torch.randn(n, LATENT, generator=rng))


def gradients(net, loss):
    net.zero_grad()
    loss.backward()
    return {k: v.grad for k, v in net.named_parameters() if v.grad is not None}


# ------------------------------------------------------------------------- noise


def test_noise_is_that_of_its_generator():
    def draw(rate):
        rng = torch.Generator().manual_seed(3)
        return Noise.draw(500, LATENT, (40, 20), rate, rng)

    one, two = draw(0.25), draw(0.25)
    assert one.latent.shape == (500, LATENT)
    assert [k.shape for k in one.keep] == [(500, 40), (500, 20)]
    assert torch.equal(one.latent, two.latent) and torch.equal(one.keep[1], two.keep[1])
    assert one.keep[0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (one.keep[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    # What is kept is scaled up, so that the mean stays.
    assert one.keep[0].mean().item() == pytest.approx(1, abs=0.02)
    assert draw(0.0).keep == ()


# ----------------------------------------------------------------------- encoder


def test_what_enters_the_encoder_by_hand():
    x = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]])

    def inputs(**options):
        return Encoder(3, (4,), 2, **options).inputs(x)

    torch.testing.assert_close(inputs(), torch.log1p(x))
    assert torch.equal(inputs(log=False), x)
    scaled = inputs(target_sum=8.0)
    torch.testing.assert_close(scaled[0], torch.log1p(torch.tensor([2.0, 6.0, 0.0])))
    assert (scaled[1] == 0).all()  # an empty cell is not divided by 0
    total = inputs(with_total=True)
    assert total.shape == (2, 4)
    assert total[:, 3].tolist() == pytest.approx([math.log(5), 0])


def test_scaling_makes_the_code_blind_to_depth():
    torch.manual_seed(0)
    x = cells().counts.dense
    plain, scaled = (Encoder(GENES, (7,), 2, "", target_sum=t) for t in (None, 1e4))
    torch.testing.assert_close(scaled(3 * x), scaled(x))
    assert (plain(3 * x)[0] - plain(x)[0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("norm", "kinds"),
    [
        ("", []),
        ("batch", [nn.BatchNorm1d]),
        ("layer", [nn.LayerNorm]),
        ("batchlayer", [nn.BatchNorm1d, nn.LayerNorm]),
    ],
)
def test_layers_have_their_norms_and_biases(norm, kinds):
    made = Encoder(GENES, (7, 5), 2, norm, bias=False)
    assert [m.in_features for m, *_ in made.layers] == [GENES, 7]
    for linear, *rest in made.layers:
        assert [type(m) for m in rest] == kinds and linear.bias is None
    assert Encoder(GENES, (7,), 2, norm).layers[0][0].bias is not None
    hidden = Decoder(2, 7, GENES, norm=norm, bias=False).hidden
    assert [type(m) for m in hidden[1:]] == kinds and hidden[0].bias is None
    mean, log_variance = made(cells().counts.dense)
    assert mean.shape == log_variance.shape == (9, 2)


def test_dropout_multiplies_each_hidden_layer():
    torch.manual_seed(0)
    x, made = cells().counts.dense, Encoder(GENES, (7, 5), 2, "")
    ones = [torch.ones(9, 7), torch.ones(9, 5)]
    assert torch.equal(made(x, ones)[0], made(x)[0])
    assert not torch.equal(made(x, [ones[0] * 0, ones[1]])[0], made(x)[0])
    silent = made(x, [ones[0], ones[1] * 0])[0]
    assert torch.equal(silent, made.mean.bias.expand(9, 2))


def test_the_variance_has_a_floor():
    made = Encoder(GENES, (7,), 2)
    nn.init.zeros_(made.log_variance.weight)
    for bias, expected in ((-80.0, 1e-4), (1.0, math.e + 1e-4)):
        nn.init.constant_(made.log_variance.bias, bias)
        found = made(cells().counts.dense)[1]
        assert found.exp()[0, 0].item() == pytest.approx(expected, rel=1e-5)


# 4: the code does not know the batch.
def test_the_encoder_reads_no_batch_unless_it_was_made_to():
    batch = cells(levels=2)
    other = (batch.batches + 1) % 4
    torch.manual_seed(0)
    free = Encoder(GENES, (7,), LATENT)
    assert not len(free.batch)
    for codes in (other, None):
        for a, b in zip(
            free(batch.counts.dense, (), batch.batches),
            free(batch.counts.dense, (), codes),
            strict=True,
        ):
            assert torch.equal(a, b)
    told = Encoder(GENES, (7,), LATENT, "", n_batches=(3, 3))
    x = batch.counts.dense
    for level in (0, 1):
        moved = batch.batches.clone()
        moved[:, level] = other[:, level]
        gap = told(x, (), moved)[0] - told(x, (), batch.batches)[0]
        assert gap.abs().max() > 1e-3
    # The vectors are added to what the first layer gives.
    linear = told.layers[0][0]
    h = linear(told.inputs(x)) + sum(
        table.weight[torch.where(c < 3, c, 0)]
        for table, c in zip(told.batch, batch.batches.T, strict=True)
    )
    torch.testing.assert_close(
        told(x, (), batch.batches)[0], told.mean(torch.relu(h)), rtol=1e-4, atol=1e-5
    )


# ----------------------------------------------------------------------- decoder


# 12: the row of a batch that nobody knows.
def test_an_unknown_batch_has_the_mean_of_all():
    table = BatchTable(2, 3)
    table.weight.data = torch.tensor([[1.0, 2.0, 3.0], [3.0, 6.0, -3.0]])
    found = table(torch.tensor([1, 2, 0]))
    assert found.tolist() == [[3, 6, -3], [2, 4, 0], [1, 2, 3]]


# 4 and 5: the decoder is told the batch, and its shares sum to 1.
@pytest.mark.parametrize("batch_dim", [4, None])
def test_shares_sum_to_one_and_depend_on_every_level(batch_dim):
    torch.manual_seed(0)
    made = Decoder(LATENT, 7, GENES, (3, 2), batch_dim=batch_dim, norm="")
    z, batches = torch.randn(5, LATENT), torch.tensor([[0, 1]]).expand(5, 2)
    share = made(z, batches)[0].exp()
    torch.testing.assert_close(share.sum(1), torch.ones(5))
    for other in ([1, 1], [0, 0], [3, 1], [0, 2]):
        moved = made(z, torch.tensor([other]).expand(5, 2))[0].exp()
        torch.testing.assert_close(moved.sum(1), torch.ones(5))
        assert (moved - share).abs().max() > 1e-4


def test_adding_to_the_hidden_layer_is_a_one_hot_code():
    torch.manual_seed(0)
    made = Decoder(LATENT, 7, GENES, (3, 2), batch_dim=None, norm="")
    z, batches = torch.randn(6, LATENT), torch.tensor([[0, 1], [2, 0], [1, 1]] * 2)
    linear = made.hidden[0]
    one_hot = torch.cat(
        [nn.functional.one_hot(batches[:, i], n) for i, n in ((0, 3), (1, 2))], 1
    )
    wide = torch.cat([linear.weight, *(t.weight.T for t in made.batch)], 1)
    h = torch.relu(torch.cat([z, one_hot.float()], 1) @ wide.T + linear.bias)
    expected = torch.log_softmax(made.scale(h), 1)
    torch.testing.assert_close(made(z, batches)[0], expected)


def test_a_decoder_without_batches_ignores_them():
    torch.manual_seed(0)
    made = Decoder(LATENT, 7, GENES, (), norm="", dispersion="gene-batch")
    z = torch.randn(4, LATENT)
    one, two = (made(z, torch.full((4, 1), b)) for b in (0, 1))
    assert torch.equal(one[0], two[0])
    assert one[1].shape == (1, GENES)


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "gaussian"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch", "gene-cell"])
@pytest.mark.parametrize("gate", ["gene", "cell"])
def test_shapes_of_dispersion_and_gate(likelihood, dispersion, gate):
    made = Decoder(
        LATENT,
        7,
        GENES,
        (3, 2),
        likelihood=likelihood,
        dispersion=dispersion,
        gate=gate,
    )
    batches = torch.tensor([[2, 0], [0, 1], [3, 1], [0, 0]])
    share, rate, logits = made(torch.randn(4, LATENT), batches)
    assert share.shape == (4, GENES)
    if likelihood == "gaussian":
        assert (share.exp().sum(1) - 1).abs().max() > 0.1  # means, not shares
    if likelihood == "poisson":
        assert rate is None
    else:
        assert rate.shape == ((1 if dispersion == "gene" else 4), GENES)
    if likelihood == "zinb":
        assert logits.shape == (4, GENES if gate == "gene" else 1)
        assert (logits == 0).all()  # one half everywhere at the start
    else:
        assert logits is None


def test_dispersion_per_batch_is_that_of_the_first_level():
    made = Decoder(LATENT, 7, GENES, (3, 2), dispersion="gene-batch")
    made.rate.weight.data = torch.arange(3.0)[:, None].expand(3, GENES).clone()
    batches = torch.tensor([[2, 0], [0, 1], [3, 1], [1, 1]])
    rate = made(torch.randn(4, LATENT), batches)[1]
    assert rate[:, 0].tolist() == [2, 0, 1, 1]


# -------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson", "gaussian"])
@pytest.mark.parametrize("gate", ["gene", "cell"])
def test_reconstruction_and_loss_gene_by_gene(likelihood, gate):
    net = vae("", decoder={"likelihood": likelihood, "gate": gate})
    batch, eps = cells(), noise()
    x = batch.counts.dense
    mean, log_variance = net.encoder(x)
    z = mean + log_variance.exp().sqrt() * eps.latent
    share, rate, logits = net.decoder(z, batch.batches)
    mu = share.exp() * x.sum(1, keepdim=True)
    if likelihood != "gaussian":
        torch.testing.assert_close(mu.sum(1), x.sum(1), rtol=1e-4, atol=1e-4)
    each = {
        "zinb": lambda: zinb_log_prob(x, mu, rate.exp(), logits.expand(9, GENES)),
        "nb": lambda: nb_log_prob(x, mu, rate.exp()),
        "poisson": lambda: poisson_log_prob(x, mu),
        "gaussian": lambda: gaussian_log_prob(x, share, rate),
    }[likelihood]()
    terms = net(batch, eps, LossWeights(kl=0.3))
    torch.testing.assert_close(
        terms["rec"], -each.sum(1).mean().detach(), rtol=1e-4, atol=1e-4
    )
    kl = losses.gaussian_kl(mean, log_variance).mean()
    torch.testing.assert_close(terms["kl"], kl.detach())
    labels = (terms["ce_0"] + terms["ce_1"]) / 2
    torch.testing.assert_close(
        terms["loss"].detach(), terms["rec"] + 0.3 * terms["kl"] + labels
    )


# 17: an empty cell.
@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_an_empty_cell_has_a_finite_loss_and_gradient(likelihood):
    net = vae(decoder={"likelihood": likelihood})
    batch = cells()
    x = batch.counts.dense.clone()
    x[2] = 0
    batch.counts = counts_batch(sparse.csr_matrix(x.numpy()), np.arange(9))
    terms = net(batch, noise(), LossWeights(gate=1.0))
    assert all(v.isfinite() for v in terms.values())
    assert all(g.isfinite().all() for g in gradients(net, terms["loss"]).values())
    # It is decoded as a cell of one molecule: a Poisson of mean 1 that gave none.
    each, _ = net.reconstruction(batch, torch.randn(9, LATENT))
    if likelihood == "poisson":
        assert each[2].item() == pytest.approx(1, abs=1e-5)
    else:
        assert 0 < each[2].item() < 1


# 11: an unknown batch stays where it was when batches are added.
def test_rows_that_are_added_leave_the_mean():
    table = BatchTable(3, 2, n_first=2)
    table.weight.data = torch.tensor([[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]])
    assert table(torch.tensor([2, 3])).tolist() == [[50, 50], [2, 4]]


@pytest.mark.parametrize("gate", ["gene", "cell"])
def test_the_gate_term_counts_every_gene(gate):
    net = vae(decoder={"gate": gate})
    for part in (net.decoder.gate.weight, net.decoder.gate.bias):
        nn.init.zeros_(part)
    off, on = (net(cells(), noise(), LossWeights(gate=g)) for g in (0.0, 0.5))
    assert "gate" not in off
    # One half of the genes at the start, whether they have logits of their own or not.
    assert on["gate"].item() == pytest.approx(GENES / 2)
    assert (on["loss"] - off["loss"]).item() == pytest.approx(GENES / 4, rel=1e-4)


# ------------------------------------------------------------------------ labels


# 8: cells without a label.
def test_an_unlabelled_cell_gives_heads_no_gradient():
    net, batch = vae(), cells()
    batch.labels[4] = -1
    rows = torch.tensor([i for i in range(9) if i != 4])
    mean, log_variance = net.encoder(batch.counts.dense)
    z = mean + (0.5 * log_variance).exp() * noise().latent
    terms = net(batch, noise(), LossWeights())
    for i, head in enumerate(net.heads):
        by_hand = nn.functional.cross_entropy(head(z)[rows], batch.labels[rows, i])
        torch.testing.assert_close(terms[f"ce_{i}"], by_hand.detach())
    found = gradients(net, terms["loss"])
    ce = sum(
        nn.functional.cross_entropy(h(z.detach()[rows]), batch.labels[rows, i])
        for i, h in enumerate(net.heads)
    )
    for name, grad in gradients(net, ce / 2).items():
        torch.testing.assert_close(found[name], grad)


def test_a_minibatch_without_labels_has_the_unlabelled_loss():
    net, bare = vae(), vae(heads=())
    batch = cells()
    batch.labels[:] = -1
    terms = net(batch, noise(), LossWeights())
    expected = bare(batch, noise(), LossWeights())["loss"]
    assert terms["loss"].item() == expected.item()
    assert terms["ce_0"] == terms["ce_1"] == 0
    found, without = gradients(net, terms["loss"]), gradients(bare, expected)
    # Every weight has a gradient, which several processes need; those of heads are 0.
    assert set(found) == {k for k, _ in net.named_parameters()}
    for name, grad in found.items():
        if name.startswith("heads"):
            assert (grad == 0).all()
        else:
            torch.testing.assert_close(grad, without[name])


# 10: the mean over heads that have a label.
def test_only_heads_with_labels_count():
    two, one, batch = vae(), vae(), cells()
    one.heads = one.heads[:1]
    both = two(batch, noise(), LossWeights(labels=0.7))
    kept = both["rec"] + both["kl"]
    mean = (both["ce_0"] + both["ce_1"]) / 2
    torch.testing.assert_close(both["loss"].detach(), kept + 0.7 * mean)
    batch.labels[:, 1] = -1
    single = one(batch, noise(), LossWeights(labels=0.7))
    torch.testing.assert_close(
        two(batch, noise(), LossWeights(labels=0.7))["loss"], single["loss"]
    )
    torch.testing.assert_close(
        single["loss"].detach(), kept + 0.7 * single["ce_0"], rtol=1e-5, atol=1e-5
    )


# 9: weights of the types.
def test_types_have_their_weights():
    weights = torch.tensor([0.0, 2.0, 0.5, 1.0])
    net, batch = vae(heads=(4,), class_weights=[weights]), cells(labels=1)
    mean, log_variance = net.encoder(batch.counts.dense)
    z = mean + (0.5 * log_variance).exp() * noise().latent
    by_hand = nn.functional.cross_entropy(net.heads[0](z), batch.labels[:, 0], weights)
    found = net(batch, noise(), LossWeights())["ce_0"]
    torch.testing.assert_close(found, by_hand.detach())


def test_heads_may_leave_the_encoder_alone():
    batch = cells()

    def of_encoder(net, labels):
        terms = net(batch, noise(), LossWeights(labels=labels))
        found = gradients(net, terms["loss"])
        return found["encoder.mean.weight"], found["heads.0.weight"]

    apart, joint = vae(detach_heads=True), vae()
    assert torch.equal(of_encoder(apart, 1.0)[0], of_encoder(apart, 0.0)[0])
    assert not torch.equal(of_encoder(joint, 1.0)[0], of_encoder(joint, 0.0)[0])
    assert torch.equal(of_encoder(apart, 1.0)[1], of_encoder(joint, 1.0)[1])
    assert of_encoder(apart, 1.0)[1].abs().max() > 0


# -------------------------------------------------------- padding, several processes


def padded(batch: CellBatch, more=3) -> CellBatch:
    n = len(batch.weight)
    X = sparse.csr_matrix(batch.counts.dense.numpy())
    X = sparse.vstack([X, X[:more]], "csr")
    return CellBatch(
        counts_batch(X, np.arange(n + more)),
        torch.cat([batch.batches, batch.batches[:more]]),
        torch.cat([batch.labels, batch.labels[:more]]),
        torch.cat([batch.weight, torch.zeros(more)]),
        None
        if batch.latent is None
        else torch.cat([batch.latent, batch.latent[:more]]),
    )


ALL = LossWeights(kl=0.5, gate=0.2, labels=0.8, mmd=0.4, latent=0.6)


@pytest.mark.parametrize("pull", ["mse", "normal"])
def test_rows_that_only_fill_count_for_nothing(pull):
    net = vae(mmd_level=0, pull=pull)
    batch = cells(n=12, latent=torch.randn(12, LATENT))
    plain = net(batch, noise(12), ALL)
    filled = net(padded(batch), Noise(torch.cat([noise(12).latent] * 2)[:15]), ALL)
    assert plain.keys() == filled.keys() >= {"gate", "latent", "mmd", "ce_1"}
    for name, value in plain.items():
        torch.testing.assert_close(filled[name], value, rtol=1e-5, atol=1e-5)
    one = gradients(net, plain["loss"])
    two = gradients(net, filled["loss"])
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, rtol=1e-4, atol=1e-5)


# 16: the shares of two processes add up to the loss of one.
def test_shares_of_two_processes_add_up():
    net = vae()
    whole = cells(n=10, latent=torch.randn(10, LATENT))
    # Uneven in every count: labels, held codes and cells.
    whole.labels[:4, 0] = -1
    whole.labels[5:, 1] = -1
    whole.latent[7:] = 0
    eps, weights = noise(10), ALL._replace(mmd=0.0)
    X = sparse.csr_matrix(whole.counts.dense.numpy())
    counted = []

    def part(rows, add_up=None):
        batch = CellBatch(
            counts_batch(X, rows.numpy()),
            whole.batches[rows],
            whole.labels[rows],
            torch.ones(len(rows)),
            whole.latent[rows],
        )
        return net(batch, Noise(eps.latent[rows]), weights, add_up)

    halves = [torch.arange(6), torch.arange(6, 10)]
    for rows in halves:
        part(rows, lambda n: counted.append(n) or n)
    total = sum(counted)
    assert total[0] == 10 and not total.requires_grad
    together = part(torch.arange(10))
    shares = [part(rows, lambda _: total) for rows in halves]
    for name, value in together.items():
        torch.testing.assert_close(shares[0][name] + shares[1][name], value)
    one = gradients(net, together["loss"])
    two = gradients(net, shares[0]["loss"] + shares[1]["loss"])
    for name, grad in one.items():
        torch.testing.assert_close(two[name], grad, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------- held codes and MMD


# 20: codes that are held.
def test_held_codes_by_hand():
    net = vae()
    batch = cells()
    mean, log_variance = (t.detach() for t in net.encoder(batch.counts.dense))
    batch.latent = mean.clone()
    assert net(batch, noise(), LossWeights())["latent"] == 0
    batch.latent[:3] += 2.0
    # Three of nine cells, each off by 2 in three directions: 12 / 3.
    found = net(batch, noise(), LossWeights())["latent"].item()
    assert found == pytest.approx(4, rel=1e-5)
    batch.latent[5:] = 0  # free: the mean is over five now, nothing is pulled to 0
    free = net(batch, noise(), LossWeights())
    assert free["latent"].item() == pytest.approx(36 / 5, rel=1e-5)
    batch.latent[:] = 0
    assert net(batch, noise(), LossWeights())["latent"] == 0
    half = net(batch, noise(), LossWeights(latent=0.5))["loss"]
    assert half.isfinite()
    for pull, extra in (("mse", 12.0), ("normal", 6.0)):
        net.pull = pull
        batch.latent = mean + 2.0
        own = losses.gaussian_kl(mean * 0, log_variance).mean().item()
        expected = extra + (own if pull == "normal" else 0)
        terms = net(batch, noise(), LossWeights(latent=0.5))
        assert terms["latent"].item() == pytest.approx(expected, rel=1e-5)
        labels = (terms["ce_0"] + terms["ce_1"]) / 2
        by_hand = terms["rec"] + terms["kl"] + labels + 0.5 * terms["latent"]
        torch.testing.assert_close(terms["loss"].detach(), by_hand)


def test_mmd_over_pairs_of_batches():
    codes = torch.randn(14, 2, generator=torch.Generator().manual_seed(0))
    batches = torch.tensor([0] * 5 + [2] * 4 + [4] * 3 + [5] * 2)
    a, b, c = codes[:5], codes[5:9], codes[9:12]
    expected = sum(losses.rbf_mmd(x, y) for x, y in ((a, b), (a, c), (b, c)))
    torch.testing.assert_close(batch_mmd(codes, batches), expected)
    # Fewer than three cells: left out; one batch: nothing to compare.
    assert batch_mmd(codes, torch.zeros(14, dtype=torch.int64)) == 0
    codes.requires_grad_(True)
    batch_mmd(codes, torch.arange(14)).backward()
    assert (codes.grad == 0).all()


def test_mmd_is_that_of_its_level_and_of_the_means():
    batch = cells(n=12, levels=2)
    batch.batches[:, 1] = torch.tensor([0, 1] * 6)
    net = vae(levels=2, mmd_level=1)
    means = net.encoder(batch.counts.dense)[0].detach()
    expected = losses.rbf_mmd(means[::2], means[1::2])
    terms = net(batch, noise(12), LossWeights(mmd=2.0))
    torch.testing.assert_close(terms["mmd"], expected)
    off = net(batch, noise(12), LossWeights())
    assert "mmd" not in off
    torch.testing.assert_close(terms["loss"] - off["loss"], 2 * expected)
    assert "mmd" not in vae(levels=2)(batch, noise(12), LossWeights(mmd=2.0))
