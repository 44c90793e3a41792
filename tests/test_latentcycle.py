"""REGINA's networks and steps against facts that hold at any weights, by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scgenlib import latentcycle as lc
from scgenlib.errors import DataError
from scgenlib.losses import centre_loss
from scgenlib.nets import count_parameters

SHAPE = dict(n_genes=11, n_tokens=4, d_model=8, n_layers=1, n_heads=2, z_dim=6)
REST = dict.fromkeys(("reg", "class", "cons", "centre"), 0.0)
PHASE_1 = {"rec": 1.5, "reg": 1e-4, "class": 1.0, "cons": 1.0, "centre": 0.5}
NOTHING = dict.fromkeys(("cycle", "adv", "pair", "anchor", "identity"), 0.0)
PHASE_2 = {"cycle": 5.0, "adv": 1.0, "pair": 1.5, "anchor": 1.5, "identity": 0.5}


def networks(seed=0, skip=True, dropout=0.0, n_batches=0) -> nn.ModuleDict:
    torch.manual_seed(seed)
    shape, more = SHAPE, {"dropout": dropout, "n_batches": n_batches}
    z_dim = shape["z_dim"]
    nets = nn.ModuleDict(
        {
            "encoder": lc.Encoder(**shape, **more),
            "decoder": lc.Decoder(**shape, **more),
            "classifier": lc.StateClassifier(z_dim, 5, 2),
            "centres": nn.Embedding(2, z_dim),
            "fwd": lc.Transition(z_dim, 7, skip),
            "bwd": lc.Transition(z_dim, 7, skip),
            "critic": lc.critic(z_dim, (9, 5)),
            "critic_control": lc.critic(z_dim, (9, 5)),
            "index": nn.Linear(3, z_dim),
            "learned": lc.LearnedPrompts(1, z_dim),
        }
    )
    if n_batches:  # as after some training
        for name in ("encoder", "decoder"):
            nn.init.normal_(nets[name].batches.weight)
    return nets


def cells(n=9, seed=1, batches=False) -> lc.Batch:
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(2, n, 11, generator=rng)
    condition = F.one_hot(torch.arange(n) % 3, 3).float()
    doses = torch.zeros(n, 11)
    doses[:, :2] = condition[:, :2]  # the third target is not measured
    states = torch.randint(2, (2, n), generator=rng)
    told = torch.arange(n) % 2 if batches else None
    return lc.Batch(*x, *states, doses, condition[:, 2:], condition, told, told)


def sgd(*modules, lr=0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for m in modules for p in m.parameters()], lr=lr)


def weights(net) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in net.named_parameters()}


def changed(before, net) -> set[str]:
    """Return the first part of the names of the weights that are not as before."""
    after = weights(net)
    return {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}


# ------------------------------------------------------------------------ tokens


@pytest.mark.parametrize(
    ("n_genes", "n_tokens", "width", "padding"),
    [
        (5060, 16, 317, 12),
        (5045, 16, 316, 11),
        (5012, 16, 314, 12),
        (64, 16, 4, 0),
        (3, 16, 1, 13),
        (7, 1, 7, 0),
    ],
)
def test_check_1_tokens_and_back(n_genes, n_tokens, width, padding):
    x = torch.randn(2, n_genes)
    tokens = lc.to_tokens(x, n_tokens)
    assert tokens.shape == (2, n_tokens, width)
    assert lc.token_width(n_genes, n_tokens) == width
    assert n_tokens * width - n_genes == padding
    assert torch.equal(lc.to_genes(tokens, n_genes), x)
    assert (tokens.flatten(1)[:, n_genes:] == 0).all()
    # A token is a block of neighbours.
    assert torch.equal(tokens[:, 0], x[:, :width])


def test_check_2_codes_of_a_fresh_encoder():
    torch.manual_seed(0)
    z = lc.Encoder(50, 16, 32, 2, 4, 256).eval()(torch.rand(5, 50)).detach()
    assert z.shape == (5, 256)
    assert z.mean(1).abs().max() < 1e-5
    torch.testing.assert_close(z.var(1, correction=0), torch.ones(5), atol=1e-3, rtol=0)
    torch.testing.assert_close(z.norm(dim=1), torch.full((5,), 16.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("positions", [False, True])
def test_check_3_order_of_tokens_and_of_genes(positions):
    torch.manual_seed(0)
    net = lc.Encoder(12, 4, 8, 1, 2, 6, positions=positions).eval()
    x = torch.rand(5, 12)
    z = net(x)
    moved = lc.to_genes(lc.to_tokens(x, 4)[:, [1, 0, 2, 3]], 12)
    assert (net(moved) - z).abs().max() > 1e-3
    # The same permutation within all tokens and in the weights that read them.
    order = torch.tensor([2, 0, 1])
    inside = lc.to_genes(lc.to_tokens(x, 4)[:, :, order], 12)
    assert (net(inside) - z).abs().max() > 1e-3
    net.inward.weight.data = net.inward.weight.data[:, order]
    torch.testing.assert_close(net(inside), z, atol=1e-5, rtol=0)


def test_tokens_are_told_their_place_by_positions_alone():
    torch.manual_seed(0)
    for positions in (False, True):
        net = lc.Encoder(12, 4, 8, 1, 2, 6, positions=positions).eval()
        h = net.inward(lc.to_tokens(torch.rand(5, 12), 4))
        turned = net.transform(h[:, [1, 0, 2, 3]], None)[:, [1, 0, 2, 3]]
        same = torch.allclose(turned, net.transform(h, None), atol=1e-5)
        assert same is not positions


def test_batches_are_told_apart_once_they_are_learned():
    net = networks(n_batches=2).eval()
    for part in ("encoder", "decoder"):
        net[part] = type(net[part])(**SHAPE, n_batches=2).eval()
    x, codes = torch.rand(3, 11), torch.zeros(3, dtype=torch.long)
    for part, given in (("encoder", x), ("decoder", torch.randn(3, 6))):
        first = net[part](given, codes)
        assert torch.equal(first, net[part](given, codes + 1))  # they start at zero
        nn.init.normal_(net[part].batches.weight)
        assert not torch.allclose(first, net[part](given, codes), atol=1e-3)


def test_the_decoder_may_go_below_zero():
    out = networks()["decoder"].eval()(10 * torch.randn(50, 6))
    assert out.shape == (50, 11) and out.min() < 0 < out.max()


def test_sizes_at_the_cells_of_adamson():
    shape = (5060, 16, 512, 4, 8, 256)
    with torch.device("meta"):
        parts = {
            "encoder": lc.Encoder(*shape),
            "decoder": lc.Decoder(*shape),
            "classifier": nn.Identity(),
            "centres": nn.Embedding(2, 256),
            "fwd": lc.Transition(256, 512),
            "bwd": lc.Transition(256, 512),
            "critic": lc.critic(256),
        }
    parts["classifier"] = lc.StateClassifier(256, 128, 2)
    counts = {name: count_parameters(net) for name, net in parts.items()}
    assert counts == {
        "encoder": 14_870_272,
        "decoder": 14_877_501,
        "classifier": 33_410,
        "centres": 512,
        "fwd": 1_449_216,
        "bwd": 1_449_216,
        "critic": 394_241,
    }
    assert sum(counts.values()) == 33_074_368


# --------------------------------------------------------------- state and centres


def test_check_4_what_the_classifier_learns_from_passes_no_gradient_on():
    nets, batch = networks().train(), cells()
    z = nets["encoder"](batch.perturbed)
    lc.classifier_step(
        nets["classifier"], sgd(nets["classifier"]), z, batch.state_perturbed
    )
    assert all(p.grad is None for p in nets["encoder"].parameters())
    grads = {k: p.grad for k, p in nets["classifier"].named_parameters()}
    assert len(grads) == 6 and all(grad is not None for grad in grads.values())
    # The batch norm takes out what the first bias adds, so that one is zero but for
    # rounding.
    live = [k for k, g in grads.items() if g.abs().max() > 1e-5]
    assert set(grads) - set(live) <= {"net.0.bias"}


def test_check_5_a_main_step_leaves_the_classifier_and_moves_the_centres():
    nets = networks()
    main = sgd(*(nets[k] for k in ("encoder", "decoder", "centres")))
    before = weights(nets)
    terms, codes, states = lc.autoencoder_step(nets, main, cells(), PHASE_1)
    assert changed(before, nets) == {"encoder", "decoder", "centres"}
    assert set(terms) == set(PHASE_1) and not codes.requires_grad
    assert all(p.requires_grad for p in nets["classifier"].parameters())
    # And the classifier's own step moves nothing else.
    before = weights(nets)
    lc.classifier_step(nets["classifier"], sgd(nets["classifier"]), codes, states)
    assert changed(before, nets) == {"classifier"}


@pytest.mark.parametrize("label_controls", [False, True])
def test_terms_of_an_auto_encoder_step_by_hand(label_controls):
    # With batches where controls are labelled too.
    nets = networks(n_batches=2 * label_controls)
    batch = cells(batches=label_controls)
    told = batch.batch_control
    nets["classifier"].eval()
    main = sgd(*(nets[k] for k in ("encoder", "decoder", "centres")), lr=0.0)
    options = {"label_controls": label_controls}
    terms, codes, states = lc.autoencoder_step(nets, main, batch, PHASE_1, **options)
    with torch.no_grad():
        of = {"control": nets["encoder"](batch.control, told)}
        of["perturbed"] = nets["encoder"](batch.perturbed, told)
        made = {k: nets["decoder"](z, told) for k, z in of.items()}
        again = nets["encoder"](made["perturbed"], told)
        kinds = ["control", "perturbed"] if label_controls else ["perturbed"]
        z = torch.cat([of[kind] for kind in kinds])
        y = torch.cat([getattr(batch, f"state_{kind}") for kind in kinds])
        expected = {
            "rec": F.mse_loss(made["control"], batch.control)
            + F.mse_loss(made["perturbed"], batch.perturbed),
            "reg": of["control"].square().mean() + of["perturbed"].square().mean(),
            "class": F.cross_entropy(nets["classifier"](z), y),
            "cons": F.mse_loss(again, of["perturbed"]),
            "centre": centre_loss(z, y, nets["centres"].weight) / 6,
        }
    torch.testing.assert_close(terms, expected)
    torch.testing.assert_close(codes, z)
    assert torch.equal(states, y)
    # A fresh code has length sqrt(d): the mean of its squares is 1 for each half.
    assert terms["reg"].item() == pytest.approx(2, abs=1e-3)


def test_consistency_of_the_class_is_a_cross_entropy_to_fixed_shares():
    nets, batch = networks(), cells()
    nets["classifier"].eval()
    main = sgd(nets["encoder"], nets["decoder"], nets["centres"], lr=0.0)
    terms, _, _ = lc.autoencoder_step(
        nets, main, batch, {**REST, "rec": 0.0, "cons": 1.0}, consistency="class"
    )
    with torch.no_grad():
        z = nets["encoder"](batch.perturbed)
        shares = nets["classifier"](z).softmax(1)
        again = nets["classifier"](nets["encoder"](nets["decoder"](z))).log_softmax(1)
    expected = -(shares * again).sum(1).mean()
    torch.testing.assert_close(terms["cons"], expected)


def test_a_gradient_is_clipped_over_all_its_weights():
    nets, batch = networks(), cells()
    batch.control = batch.control * 100
    parts = [nets[k] for k in ("encoder", "decoder", "centres")]
    before = weights(nets)
    lc.autoencoder_step(nets, sgd(*parts, lr=1.0), batch, PHASE_1, clip=0.5)
    after = weights(nets)
    moved = math.sqrt(sum(float((after[k] - before[k]).square().sum()) for k in before))
    assert moved == pytest.approx(0.5, rel=1e-3)


def test_check_12_padding_takes_no_part_in_the_reconstruction():
    nets, batch = networks(), cells()
    main = sgd(nets["encoder"], nets["decoder"], nets["centres"], lr=0.0)
    terms, _, _ = lc.autoencoder_step(nets, main, batch, {**REST, "rec": 1.0})
    tokens = []
    hook = nets["decoder"].outward.register_forward_hook(
        lambda *a: tokens.append(a[2].detach().clone())
    )
    x = torch.cat([batch.control, batch.perturbed])
    with torch.no_grad():
        nets["decoder"](nets["encoder"](x))
    hook.remove()
    (made,) = tokens
    assert made.shape == (18, 4, 3)  # twelve places for eleven genes
    made[:, -1, -1] = 1e6
    # The sum is divided by the genes and cells alone, the two halves are added.
    error = (lc.to_genes(made, 11) - x).square().sum() / (11 * 9)
    torch.testing.assert_close(terms["rec"], error)


# ----------------------------------------------------------------------- prompts


def test_check_7_a_prompt_is_what_the_encoder_makes_of_silence():
    net = networks()["encoder"].eval()
    x = torch.rand(3, 11) + 0.1
    targets = torch.tensor([4, 0, 10])
    fake = lc.silenced(x, lc.dose_matrix(targets, 3, 11))
    assert ((fake != x).sum(1) == 1).all() and (fake[range(3), targets] == -1).all()
    q = lc.prompt(net, x, targets)
    assert not q.requires_grad and q.shape == (3, 6)
    torch.testing.assert_close(q, (net(fake) - net(x)).detach())
    torch.testing.assert_close(lc.prompt(net, x, targets, z=net(x).detach()), q)
    # A dose of two, two genes, half a dose, and no target.
    doses = torch.zeros(4, 11)
    doses[0, 2], doses[1, [3, 5]], doses[2, 7] = 2, 1, 0.5
    x = torch.rand(4, 11) + 0.1
    fake = lc.silenced(x, doses, -1.0)
    assert fake[0, 2] == -2 and (fake[1, [3, 5]] == -1).all() and fake[2, 7] == -0.5
    assert torch.equal(fake[3], x[3])
    assert (lc.prompt(net, x, doses)[3] == 0).all()
    assert (lc.silenced(x, doses, 0.0)[doses != 0] == 0).all()


def test_check_8_an_index_and_its_one_hot_row_are_one_prompt():
    net, x = networks()["encoder"].eval(), torch.rand(3, 11)
    index = torch.tensor([4, 0, 10])
    table = F.one_hot(index, 11)
    assert torch.equal(lc.prompt(net, x, index), lc.prompt(net, x, table.float()))
    assert torch.equal(lc.prompt(net, x, index), lc.prompt(net, x, table.bool()))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor([[4, 1], [0, 2], [3, 3]]), "int64 of shape.*float table"),
        (torch.zeros(3, 11, dtype=torch.long), "int64 of shape.*float table"),
        (torch.tensor([4.0, 0.0, 1.0]), "float32 of shape"),
        (torch.zeros(3, 10), "float32 of shape"),
        (torch.tensor([4, 0]), "int64 of shape"),
        (torch.tensor([4, 0, 11]), "0 to 11.*0 to 10"),
        (torch.tensor([4, 0, -1]), "-1 to 4.*0 to 10"),
    ],
)
def test_check_8_a_table_of_indices_is_refused(targets, words):
    with pytest.raises(DataError, match=words):
        lc.dose_matrix(targets, 3, 11)


# ------------------------------------------------------------------- transitions


def test_check_9_a_fresh_transition_moves_by_its_prompt():
    nets, batch = networks().eval(), cells()
    q = lc.prompt(nets["encoder"], batch.control, batch.doses)
    z = nets["encoder"](batch.control)
    assert torch.equal(nets["fwd"](z, q), q)
    there = lc.move(nets["fwd"], z, q)
    fake = nets["encoder"](lc.silenced(batch.control, batch.doses))
    torch.testing.assert_close(there, fake)
    back = lc.move(nets["bwd"], there, q)
    torch.testing.assert_close(back, z + 2 * q)
    # Each direction of the cycle is off by twice the prompt.
    nets["learned"].weight.requires_grad_(False)
    steps = {**NOTHING, "cycle": 1.0}
    terms, seen = lc.transition_step(
        nets, sgd(nets["fwd"], nets["bwd"], lr=0.0), batch, steps
    )
    torch.testing.assert_close(seen["told"], q)
    torch.testing.assert_close(terms["cycle"], 2 * (2 * q).square().mean())


def test_without_the_skip_a_fresh_transition_leaves_codes_where_they_are():
    nets = networks(skip=False).eval()
    z, q = torch.randn(2, 4, 6)
    assert torch.equal(lc.move(nets["fwd"], z, q), z)


@pytest.mark.parametrize("batches", [False, True])
def test_terms_of_a_transition_step_by_hand(batches):
    nets, batch = networks(n_batches=2 * batches).eval(), cells(batches=batches)
    told = batch.batch_control
    for name in ("fwd", "bwd"):  # away from the start
        nn.init.normal_(nets[name].outward.weight, std=0.3)
    nn.init.normal_(nets["learned"].weight)
    names = ("fwd", "bwd", "decoder", "learned")
    still = sgd(*(nets[k] for k in names), lr=0.0)
    for sign, value, both, shift in (
        (1.0, -1.0, True, True),
        (-1.0, 0.5, False, False),
    ):
        options = {"sign": sign, "value": value, "both": both, "shift": shift}
        terms, seen = lc.transition_step(nets, still, batch, PHASE_2, **options)
        with torch.no_grad():
            encoder, decoder = nets["encoder"], nets["decoder"]
            c, p = encoder(batch.control, told), encoder(batch.perturbed, told)
            fake = lc.silenced(batch.control, batch.doses, value)
            q = sign * (encoder(fake, told) - c)
            q = q + batch.learned @ nets["learned"].weight
            made, led = c + nets["fwd"](c, q), p + nets["bwd"](p, q)
            guess, start = decoder(made, told), decoder(c, told)
            if shift:
                guess = guess + batch.control - start
            there = nets["critic"](torch.cat([made, q], 1))
            back = nets["critic_control"](torch.cat([led, q], 1))
            mse = F.mse_loss
            expected = {
                "cycle": mse(made + nets["bwd"](made, q), c)
                + mse(led + nets["fwd"](led, q), p),
                "adv": mse(there, torch.ones(9, 1))
                + both * mse(back, torch.ones(9, 1)),
                "pair": mse(guess, batch.perturbed),
                "anchor": mse(start, batch.control),
                "identity": mse(p + nets["fwd"](p, q), p)
                + mse(c + nets["bwd"](c, q), c),
            }
        torch.testing.assert_close(terms, expected)
        torch.testing.assert_close(seen["told"], q)
        torch.testing.assert_close(seen["critic"], torch.stack([p, made]))
        assert ("critic_control" in seen) is both


def test_check_11_each_step_moves_its_own_networks():
    """When the critic has its turn is tested with the estimator."""
    nets = networks().train()
    lc.freeze(nets["encoder"], nets["classifier"], nets["centres"])
    names = ("fwd", "bwd", "decoder", "learned")
    main = sgd(*(nets[k] for k in names))
    critics = sgd(nets["critic"], nets["critic_control"], nets["index"])
    for options in ({}, {"both": True}, {"both": True, "on_index": True}):
        before = weights(nets)
        _, seen = lc.transition_step(nets, main, cells(), PHASE_2, **options)
        assert changed(before, nets) == set(names)
        assert not any(part.requires_grad for part in seen.values())
        before, on_index = weights(nets), "on_index" in options
        lc.critic_step(nets, critics, seen, on_index=on_index)
        moved = ["critic", "critic_control", "index"][: 1 + len(options)]
        assert changed(before, nets) == set(moved)
    assert all(p.requires_grad for p in nets["critic"].parameters())


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_a_weight_of_zero_is_not_computed(name):
    nets = networks()
    main = sgd(*(nets[k] for k in ("fwd", "bwd", "decoder", "learned")))
    terms, seen = lc.transition_step(nets, main, cells(), {**NOTHING, name: 1.0})
    assert name in terms and set(terms) <= {name, "pair"}
    assert "critic" in seen
    # Nothing to learn from is no error.
    before = weights(nets)
    terms, _ = lc.transition_step(nets, main, cells(), NOTHING)
    assert terms == {} and not changed(before, nets)


def test_which_loss_moves_what():
    """The cycle alone does not reach the decoder; the pairs reach no backward block."""
    found = {}
    for name in NOTHING:
        nets = networks()
        main = sgd(*(nets[k] for k in ("fwd", "bwd", "decoder", "learned")))
        # A fresh block's last layer is zero: one step, and then the one looked at.
        for _ in range(2):
            before = weights(nets)
            lc.transition_step(nets, main, cells(), {**NOTHING, name: 1.0})
        found[name] = changed(before, nets)
    assert found == {
        "cycle": {"fwd", "bwd", "learned"},
        "adv": {"fwd", "learned"},
        "pair": {"fwd", "decoder", "learned"},
        "anchor": {"decoder"},
        "identity": {"fwd", "bwd", "learned"},
    }


def test_pairs_do_not_teach_the_decoder_where_to_start():
    """Or its last bias, which both decoded cells share, would have no gradient."""
    nets = networks()
    main = sgd(*(nets[k] for k in ("fwd", "decoder")))
    before = nets["decoder"].outward.bias.detach().clone()
    lc.transition_step(nets, main, cells(), {**NOTHING, "pair": 1.0}, clip=None)
    assert (nets["decoder"].outward.bias - before).abs().max() > 1e-4


def test_check_10_a_critic_step_has_the_loss_of_the_page():
    nets = networks()
    n, told = 4, torch.randn(4, 6)
    seen = {"told": told, "condition": torch.rand(n, 3)}
    seen["critic"] = torch.randn(2, n, 6)
    real, made = (
        nets["critic"](torch.cat([z, told], 1)).detach() for z in seen["critic"]
    )
    expected = 0.5 * ((real - 0.9).square().mean() + made.square().mean())
    still = sgd(nets["critic"], lr=0.0)
    torch.testing.assert_close(lc.critic_step(nets, still, seen), expected)
    other = lc.critic_step(nets, still, seen, real_target=1.0)
    torch.testing.assert_close(other - expected, 0.095 - 0.1 * real.mean())
    # Noise comes from the generator that is given, and from nowhere else.
    state = torch.get_rng_state()
    rngs = [torch.Generator().manual_seed(seed) for seed in (5, 5, 6)]
    noisy = [float(lc.critic_step(nets, still, seen, sd=0.5, rng=r)) for r in rngs]
    assert noisy[0] == noisy[1] != noisy[2] and noisy[0] != float(expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_check_13_noise_stays_falls_and_ends():
    sd = [lc.noise_sd(epoch, 0.1, 20, 80) for epoch in range(100)]
    assert sd[:21] == pytest.approx([0.1] * 21)
    assert sd[50] == pytest.approx(0.05) and sd[65] == pytest.approx(0.025)
    assert sd[80:] == [0] * 20
    assert lc.noise_sd(3, 0.0, 20, 80) == 0


def test_the_learning_rate_falls_along_half_a_cosine():
    rates = [lc.cosine(epoch, 10, 4e-4, 1e-6) for epoch in range(12)]
    assert rates[0] == 4e-4 and rates[10] == rates[11] == pytest.approx(1e-6)
    assert rates[5] == pytest.approx((4e-4 + 1e-6) / 2)
    # The reference: torch's own schedule.
    weight = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=4e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 10, eta_min=1e-6)
    for epoch in range(10):
        assert optimiser.param_groups[0]["lr"] == pytest.approx(rates[epoch])
        optimiser.step()
        schedule.step()
