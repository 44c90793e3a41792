"""The players of scGACL: sizes, first weights, and what one step of each may move."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from scgenlib import losses, vaegan
from scgenlib.nets import count_parameters
from scgenlib.training import adam
from scgenlib.vaegan import (
    Decoder,
    Discriminator,
    Encoder,
    MixturePrior,
    contrastive_step,
    discriminator_step,
    elbo_step,
    generator_step,
    joint_step,
    seen_by,
    share_of_generated,
    start_small,
)

N_GENES, N_CELLS = 12, 16


def toy(seed=0):
    """Networks that differ in every cell, their optimisers, a source of noise."""
    torch.manual_seed(seed)
    nets = nn.ModuleDict(
        {
            "encoder": Encoder(N_GENES, (16, 8), 3),
            "decoder": Decoder(3, (8, 16), N_GENES),
            "prior": MixturePrior(2, 3),
            "discriminator": Discriminator(N_GENES, (16, 8), (4, 5)),
        }
    )
    for layer in nets.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.uniform_(layer.bias, 0.0, 0.2)
    nn.init.normal_(nets["prior"].centres)
    optimisers = {name: adam(net.parameters(), 1e-2) for name, net in nets.items()}
    return nets, optimisers, torch.Generator().manual_seed(seed + 7)


@pytest.fixture
def x():
    rng = torch.Generator().manual_seed(3)
    values = 3 * torch.rand(N_CELLS, N_GENES, generator=rng)
    return values * (torch.rand(N_CELLS, N_GENES, generator=rng) < 0.5)


@pytest.fixture
def codes():
    return torch.arange(N_CELLS) % 2


def weights(nets):
    """Every parameter, and not the running means of the normalisation."""
    return {name: value.detach().clone() for name, value in nets.named_parameters()}


def moved(nets, before):
    """Names of the networks of which a weight is another number than before."""
    after = weights(nets)
    changed = [key for key in after if not torch.equal(after[key], before[key])]
    return {name.split(".")[0] for name in changed}


def made_by(nets, x, rng):
    z, _, _ = nets["encoder"].sample(x, rng)
    return nets["decoder"](z)


# ----------------------------------------------------------------------- sizes


# 1: parameter counts and shapes.
def test_published_sizes():
    nets = {
        "encoder": Encoder(969, (500, 500, 2000), 10),
        "decoder": Decoder(10, (2000, 500, 500), 969),
        "discriminator": Discriminator(969, (500, 500, 2000), (10, 10)),
        "prior": MixturePrior(4, 10),
    }
    found = {name: count_parameters(net) for name, net in nets.items()}
    x = torch.rand(32, 969)
    z = nets["encoder"].sample(x, torch.Generator().manual_seed(0))
    heads = nets["discriminator"](x)
    out = nets["decoder"](z[0])
    assert found == {
        "encoder": 1_783_520,
        "decoder": 1_758_469,
        "discriminator": 1_785_521,
        "prior": 84,
    }
    assert sum(found.values()) == 5_327_594
    assert [part.shape for part in z] == [(32, 10)] * 3
    assert [part.shape for part in heads] == [(32, 1), (32, 10), (32, 10)]
    assert out.shape == (32, 969)


# 1: parameter counts of any number of genes and components.
@pytest.mark.parametrize(("n_genes", "n_types"), [(2000, 6), (17_789, 10)])
def test_sizes_by_formula(n_genes, n_types):
    with torch.device("meta"):
        encoder = Encoder(n_genes, (500, 500, 2000), 10)
        decoder = Decoder(10, (2000, 500, 500), n_genes)
        judge = Discriminator(n_genes, (500, 500, 2000), (10, 10))
        prior = MixturePrior(n_types, 10)
    assert count_parameters(encoder) == 1_299_020 + 500 * n_genes
    assert count_parameters(decoder) == 1_273_000 + 501 * n_genes
    assert count_parameters(judge) == 1_301_021 + 500 * n_genes
    assert count_parameters(prior) == 21 * n_types


def test_layers():
    encoder, judge = Encoder(9, (4, 5), 3), Discriminator(9, (4, 5), (2, 7))
    kinds = [type(layer).__name__ for layer in encoder.body]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2
    kinds = [type(layer).__name__ for layer in judge.trunk]
    assert kinds == ["Linear", "BatchNorm1d", "LeakyReLU"] * 2
    assert judge.trunk[2].negative_slope == 0.01
    kinds = [type(layer).__name__ for layer in Decoder(3, (4, 5), 9).body]
    assert kinds == ["Linear", "ReLU"] * 3
    x = torch.rand(6, 9)
    logit, cell, kind = judge(x)
    assert logit.shape == (6, 1) and cell.shape == (6, 2) and kind.shape == (6, 7)
    assert Decoder(3, (4, 5), 9)(100 * torch.randn(50, 3)).min() == 0


def test_first_weights():
    torch.manual_seed(0)
    for net in (
        Encoder(800, (500,), 10),
        Discriminator(800, (500,), (10, 10)),
        Decoder(10, (20, 500), 800),
    ):
        layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
        start_small(net)
        for layer in layers:
            assert (layer.bias == 0).all() and layer.weight.abs().max() < 0.12
        large = max(layers, key=lambda layer: layer.weight.numel())
        assert large.weight.std().item() == pytest.approx(0.02, rel=0.01)
        start_small(net, 0.5)
        assert large.weight.std().item() == pytest.approx(0.5, rel=0.01)


def test_decoder_starts_at_the_means_of_the_genes():
    torch.manual_seed(0)
    decoder, mean = Decoder(3, (8, 16), N_GENES), torch.rand(N_GENES) + 0.5
    start_small(decoder)
    decoder.start_at(mean)
    out = decoder(torch.randn(5, 3))
    torch.testing.assert_close(out, mean.expand(5, -1), rtol=0, atol=0.01)


def test_sample_is_the_mean_and_noise_of_its_width():
    nets, _, rng = toy()
    encoder = nets["encoder"].eval()
    x = torch.rand(4, N_GENES).repeat(5000, 1)
    with torch.no_grad():
        z, mean, log_variance = encoder.sample(x, rng)
    noise = (z - mean) / (0.5 * log_variance).exp()
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert len(noise[:, 0].unique()) > 19_000


# 20: weights of the mixture.
def test_weights_of_the_mixture_stay_a_distribution():
    torch.manual_seed(0)
    prior = MixturePrior(3, 4)
    log_pi, centres, log_variance = prior.parts()
    assert log_pi.exp().tolist() == pytest.approx([1 / 3] * 3)
    assert (centres == 0).all() and (log_variance == 0).all()
    nn.init.normal_(prior.logits, 0, 50)
    nn.init.normal_(prior.centres)
    pi = prior.parts()[0].exp()
    assert pi.min() >= 0 and pi.sum().item() == pytest.approx(1, abs=1e-6)
    shares = prior.shares(torch.randn(7, 4) * 60)
    torch.testing.assert_close(shares.sum(1), torch.ones(7))
    assert torch.isfinite(shares).all() and shares.min() >= 0


# 20: also after updates that pull at the weights.
def test_weights_of_the_mixture_after_training(x):
    nets, optimisers, rng = toy()
    optimisers["prior"] = adam(nets["prior"].parameters(), 0.5)
    for _ in range(30):
        elbo_step(nets, optimisers, x, 1.0, rng)
    pi = nets["prior"].parts()[0].exp()
    assert pi.min() >= 0 and pi.sum().item() == pytest.approx(1, abs=1e-6)
    assert abs(pi[0].item() - 0.5) > 0.1


# ------------------------------------------------------------------ adversarial


# 10: cross-entropy against soft targets.
def test_adversarial_losses_where_they_are_known(x):
    rng = torch.Generator().manual_seed(0)
    zero = torch.zeros(50, 1)
    for low, high in ((0.9, 1.0), (0.0, 0.1), (0.3, 0.6)):
        loss = vaegan._soft_bce(zero, low, high, rng).item()
        assert loss == pytest.approx(math.log(2), abs=1e-6)
    # The best answer to a target of 0.95 leaves its entropy.
    best = torch.full((9, 1), math.log(19))
    floor = vaegan._soft_bce(best, 0.95, 0.95, rng).item()
    assert floor == pytest.approx(0.1985152, abs=1e-6)
    # A discriminator that says one half to everything.
    nets, optimisers, rng = toy()
    nn.init.zeros_(nets["discriminator"].head.weight)
    nn.init.zeros_(nets["discriminator"].head.bias)
    loss = generator_step(nets, optimisers, x, rng).item()
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    loss = discriminator_step(nets, optimisers, x, x.flip(0), rng).item()
    assert loss == pytest.approx(2 * math.log(2), abs=1e-6)


def test_targets_are_drawn_anew_for_each_cell():
    rng = torch.Generator().manual_seed(0)
    logit = torch.tensor([[5.0]])
    # softplus(5) - 5 t: the loss of one cell gives its target away.
    top = math.log(1 + math.exp(5))
    drawn = [
        (top - vaegan._soft_bce(logit, 0.9, 1.0, rng).item()) / 5 for _ in range(400)
    ]
    assert 0.9 <= min(drawn) < 0.905 and 0.995 < max(drawn) <= 1 + 1e-6
    assert sum(drawn) / 400 == pytest.approx(0.95, abs=0.005)
    torch.manual_seed(0)
    half = torch.cat([torch.full((2000, 1), 5.0), torch.full((2000, 1), -5.0)])
    # Targets of one value for all cells would give 0.1 times that value's distance.
    both = [vaegan._soft_bce(half, 0.0, 0.1, rng).item() for _ in range(5)]
    assert max(both) - min(both) < 0.01


def targets_told(monkeypatch):
    """Return a list of (low, high) that is filled as losses are computed."""
    told, plain = [], vaegan._soft_bce

    def watched(logits, low, high, rng):
        told.append((low, high))
        return plain(logits, low, high, rng)

    monkeypatch.setattr(vaegan, "_soft_bce", watched)
    return told


def test_what_each_side_is_told(x, monkeypatch):
    told = targets_told(monkeypatch)
    nets, optimisers, rng = toy()
    generator_step(nets, optimisers, x, rng)
    discriminator_step(nets, optimisers, x, x.flip(0), rng)
    assert told == [(0.9, 1.0), (0.9, 1.0), (0.0, 0.1)]


def test_players_pull_in_opposite_directions(x):
    """Enough steps of either one alone decide what D thinks of reconstructions."""

    def belief(nets):
        with torch.no_grad():
            made = made_by(nets, x, torch.Generator().manual_seed(1))
            real = torch.sigmoid(nets["discriminator"](x)[0]).mean()
            return real.item(), torch.sigmoid(nets["discriminator"](made)[0]).mean()

    nets, optimisers, rng = toy()
    for _ in range(100):
        with torch.no_grad():
            made = made_by(nets, x, rng)
        discriminator_step(nets, optimisers, x, made, rng)
    real, made = belief(nets)
    assert real > 0.7 and made < 0.3
    for _ in range(100):
        generator_step(nets, optimisers, x, rng)
    assert belief(nets)[1] > made + 0.1


@pytest.mark.parametrize("kind", ["reconstruction", "masked", "completed"])
def test_generator_step_leaves_the_discriminator_alone(x, kind):
    nets, optimisers, rng = toy()
    before = weights(nets)
    generator_step(nets, optimisers, x, rng, kind)
    assert moved(nets, before) == {"encoder", "decoder"}
    judge = nets["discriminator"]
    assert all(p.requires_grad and p.grad is None for p in judge.parameters())


def test_discriminator_step_leaves_the_others_alone(x):
    nets, optimisers, rng = toy()
    before = weights(nets)
    made = made_by(nets, x, rng)
    discriminator_step(nets, optimisers, x, made, rng)
    assert moved(nets, before) == {"discriminator"}
    # The reconstruction's graph is whole, and no gradient went into it.
    assert all(p.grad is None for p in nets["encoder"].parameters())
    made.sum().backward()
    assert nets["encoder"].mean.weight.grad.abs().max() > 0


def test_contrastive_step_moves_three(x, codes):
    for pair in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)):
        nets, optimisers, rng = toy()
        before = weights(nets)
        made = made_by(nets, x, rng)
        contrastive_step(nets, optimisers, x, made, codes, 0.5, rng, weights=pair)
        assert moved(nets, before) == {"encoder", "decoder", "discriminator"}
        # The head that tells real from made has no part in it, nor a weight of 0.
        after = weights(nets)
        still = ["discriminator.head"]
        still += [["discriminator.cell_projection"], []][bool(pair[0])]
        still += [["discriminator.type_projection"], []][bool(pair[1])]
        for name in still:
            key = f"{name}.weight"
            assert torch.equal(after[key], before[key]), key


@pytest.mark.parametrize(("step", "factor"), [("generator", 5.0), ("judge", 5.0)])
def test_weight_of_an_adversarial_loss_scales_its_gradient(x, step, factor):
    grads = []
    for weight in (1.0, factor):
        nets, optimisers, rng = toy()
        if step == "generator":
            generator_step(nets, optimisers, x, rng, weight=weight)
            grads.append(nets["decoder"].body[-2].weight.grad)
        else:
            discriminator_step(nets, optimisers, x, x.flip(0), rng, weight)
            grads.append(nets["discriminator"].head.weight.grad)
    torch.testing.assert_close(grads[1], factor * grads[0], rtol=1e-3, atol=1e-6)


def test_what_the_discriminator_sees():
    x = torch.tensor([[1.0, 0.0, 2.0]])
    made = torch.tensor([[3.0, 4.0, 5.0]], requires_grad=True)
    real, fake = seen_by("reconstruction", x, made)
    assert real is x and fake is made
    real, fake = seen_by("masked", x, made)
    assert real is x and fake.tolist() == [[3.0, 0.0, 5.0]]
    real, fake = seen_by("completed", x, made)
    assert real.tolist() == [[1.0, 4.0, 2.0]] and fake is made
    assert not real.requires_grad


# -------------------------------------------------------------------- contrasts


# 11: the schedule of reconstructions in the type-level contrast.
def test_share_of_generated():
    shares = [share_of_generated(epoch, 100) for epoch in range(100)]
    # 0.1 first; 0.09 more after epochs 0, 10, 20, and so on.
    expected = [0.1] + [0.1 + 0.09 * (1 + (epoch - 1) // 10) for epoch in range(1, 100)]
    assert shares == pytest.approx(expected, abs=1e-12)
    assert shares[1] == pytest.approx(0.19) and shares[99] == pytest.approx(1.0)
    counts = [int(share * 32 + 1e-9) for share in shares]
    steps = [counts[0]] + [counts[epoch] for epoch in range(1, 100, 10)]
    assert steps == [3, 6, 8, 11, 14, 17, 20, 23, 26, 29, 32]
    assert all(len(set(counts[i : i + 10])) == 1 for i in range(1, 91, 10))
    assert share_of_generated(0, 5) == 0.1 and share_of_generated(1, 5) == 1.0
    assert share_of_generated(0, 0) <= 1


# 11: the counts, where they are used.
@pytest.mark.parametrize(
    ("share", "n", "expected"),
    # 0.1 + 0.09 + 0.09 + ... is a little less than 1, and 0.29 x 100 than 29.
    [(0.1, 32, 3), (0.91, 32, 29), (1 - 2**-53, 32, 32), (0.29, 100, 29)],
)
def test_number_of_reconstructions(monkeypatch, share, n, expected):
    seen = []

    def watched(features, labels, temperature):
        seen.append((features.detach(), labels))
        return losses.sup_con(features, labels, temperature)

    monkeypatch.setattr(vaegan, "sup_con", watched)
    nets, optimisers, rng = toy()
    x = torch.rand(n, N_GENES) + 0.1
    codes = torch.arange(n)
    made = made_by(nets, x, rng)
    nets.eval()  # so that a row's projection depends on this row alone
    with torch.no_grad():
        rows = [nets["discriminator"](part)[2] for part in (x, made)]
    contrastive_step(nets, optimisers, x, made, codes, share, rng)
    ((features, labels),) = seen
    assert len(features) == len(labels) == n + expected
    assert labels[:n].tolist() == codes.tolist()
    torch.testing.assert_close(features[:n], rows[0])
    # Some of the reconstructions, each once, and each with its own cell's label.
    assert len(set(labels[n:].tolist())) == expected
    torch.testing.assert_close(features[n:], rows[1][labels[n:]])
    if expected < n:
        assert labels[n:].tolist() != list(range(expected))


def test_losses_of_the_contrastive_step(x, codes):
    nets, optimisers, rng = toy()
    nets.eval()
    made = made_by(nets, x, rng)
    with torch.no_grad():
        real, fake = (nets["discriminator"](part) for part in (x, made))
        both = torch.cat([real[2], fake[2]]), torch.cat([codes, codes])
        cell = losses.nt_xent(real[1], fake[1], 0.4)
        kind = losses.sup_con(*both, 0.4)
    terms = contrastive_step(
        nets, optimisers, x, made, codes, 1.0, rng, temperature=0.4
    )
    # With all reconstructions, their order changes nothing.
    torch.testing.assert_close(terms["nt_xent"], cell)
    torch.testing.assert_close(terms["sup_con"], kind)


# ------------------------------------------------------------------- whole steps


def test_elbo_step(x):
    nets, optimisers, rng = toy()
    before = weights(nets)
    twin, noise = copy.deepcopy(nets), torch.Generator().manual_seed(7)
    terms = elbo_step(nets, optimisers, x, 4.0, rng)
    assert moved(nets, before) == {"encoder", "decoder", "prior"}
    z, mean, log_variance = twin["encoder"].sample(x, noise)
    rec = losses.masked_mse(x, twin["decoder"](z))
    kl = losses.mixture_kl(mean, log_variance, z, *twin["prior"].parts())
    assert torch.equal(terms["rec"], rec) and torch.equal(terms["kl"], kl)
    (4.0 * rec + kl).backward()
    for name, parameter in twin.named_parameters():
        if not name.startswith("discriminator"):
            found = nets.get_parameter(name).grad
            torch.testing.assert_close(found, parameter.grad, msg=name)


# 19: without the three losses, phase 2 goes on with VaDE.
@pytest.mark.parametrize("kind", ["reconstruction", "masked", "completed"])
def test_joint_step_of_weight_zero_is_the_elbo_step(x, codes, kind):
    one, two = toy(), toy()
    for _ in range(3):
        plain = elbo_step(one[0], one[1], x, 4.0, one[2])
        joint = joint_step(
            two[0], two[1], x, codes, 0.5, 4.0, two[2], weights=(0, 0, 0), kind=kind
        )
        assert plain.keys() == joint.keys()
        assert all(torch.equal(plain[name], joint[name]) for name in plain)
    states = one[0].state_dict(), two[0].state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert torch.equal(one[2].get_state(), two[2].get_state())
    for name, optimiser in one[1].items():
        slots = (optimiser.state_dict()["state"], two[1][name].state_dict()["state"])
        assert slots[0].keys() == slots[1].keys()


TERMS = {"adv": {"g_adv", "d_adv"}, "contrast": {"nt_xent", "sup_con"}}


@pytest.mark.parametrize(
    ("three", "parts"),
    [
        ((1, 1, 1), ["elbo", "generator", "discriminator", "contrastive"]),
        ((1, 0, 0), ["elbo", "generator", "discriminator"]),
        ((0, 1, 0), ["elbo", "contrastive"]),
        ((0, 0, 1), ["elbo", "contrastive"]),
    ],
)
def test_order_of_the_updates(x, codes, monkeypatch, three, parts):
    seen = []
    for name in ("elbo", "generator", "discriminator", "contrastive"):
        plain = getattr(vaegan, f"{name}_step")

        def watched(*args, plain=plain, name=name, **kwargs):
            seen.append(name)
            return plain(*args, **kwargs)

        monkeypatch.setattr(vaegan, f"{name}_step", watched)
    nets, optimisers, rng = toy()
    terms = joint_step(nets, optimisers, x, codes, 0.5, 4.0, rng, weights=three)
    assert seen == parts
    expected = {"rec", "kl"}
    expected |= TERMS["adv"] if three[0] else set()
    expected |= TERMS["contrast"] if three[1] or three[2] else set()
    assert set(terms) == expected
    assert all(torch.isfinite(value) for value in terms.values())
    assert all(p.requires_grad for p in nets.parameters())


@pytest.mark.parametrize("kind", ["reconstruction", "masked", "completed"])
def test_joint_step_is_its_parts(x, codes, kind):
    """The four updates one after the other, written out, give the same bits."""
    nets, optimisers, rng = toy()
    joint_step(
        nets, optimisers, x, codes, 0.5, 4.0, rng,
        weights=(0.5, 0.7, 0.3), temperature=0.4, kind=kind,
    )  # fmt: skip
    two, others, noise = toy()
    elbo_step(two, others, x, 4.0, noise)
    generator_step(two, others, x, noise, kind, 0.5)
    real, made = seen_by(kind, x, made_by(two, x, noise))
    discriminator_step(two, others, real, made, noise, 0.5)
    contrastive_step(
        two, others, real, made, codes, 0.5, noise,
        weights=(0.7, 0.3), temperature=0.4,
    )  # fmt: skip
    states = nets.state_dict(), two.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("three", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_weight_alone_differs_from_vade(x, codes, three):
    one, two = toy(), toy()
    elbo_step(one[0], one[1], x, 4.0, one[2])
    joint_step(two[0], two[1], x, codes, 0.5, 4.0, two[2], weights=three)
    for name in ("encoder", "decoder", "discriminator"):
        states = one[0][name].state_dict(), two[0][name].state_dict()
        assert any(not torch.equal(states[0][k], states[1][k]) for k in states[0])


# 18: one type only.
def test_one_type_and_single_rows_are_finite(x):
    nets, optimisers, rng = toy()
    for codes in (torch.zeros(N_CELLS, dtype=torch.long), torch.arange(N_CELLS)):
        terms = joint_step(nets, optimisers, x, codes, 0.1, 4.0, rng)
        assert all(torch.isfinite(value) for value in terms.values())
    assert all(torch.isfinite(value).all() for value in nets.parameters())
