"""The players of scGAN and cscGAN: layers, sizes, losses, and one step of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scgenlib import training
from scgenlib.nets import (
    ClassHead,
    ConditionalBatchNorm,
    ConditionalLayerNorm,
    LibrarySizeNorm,
    count_parameters,
)
from scgenlib.wgan import (
    Critic,
    Generator,
    critic_gradient,
    critic_loss,
    critic_step,
    generator_step,
    learning_rate,
)


@pytest.fixture
def in_doubles():
    """Make float64 the type of new tensors, so that only the formulas differ."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def codes_of(*classes):
    """One condition: (n_cells,) -> (n_cells, 1)."""
    return torch.tensor(classes)[:, None]


def toy_generator(n_classes=(3,), **options):
    torch.manual_seed(0)
    made = Generator(50, n_classes, 8, (16, 32), **options)
    # Classes start alike; as if trained, they differ here.
    for name, table in made.named_parameters():
        if "gamma" in name or "beta" in name:
            nn.init.normal_(table, 1.0 if "gamma" in name else 0.0, 0.5)
    return made


def weights(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


# ----------------------------------------------------------------------- sizes


def pair(n_genes, n_classes, latent=128, g=(256, 512, 1024), d=(1024, 512, 256)):
    """Parameters of G and D; without classes, those of scGAN."""
    with torch.device("meta"):
        kinds = ("batchnorm", "proj" if n_classes else "none")
        classes = (n_classes or 1,)
        generator = Generator(n_genes, classes, latent, g, cond_type=kinds[0])
        critic = Critic(n_genes, classes, d, cond_type=kinds[1])
    return count_parameters(generator), count_parameters(critic)


@pytest.mark.parametrize(
    ("n_genes", "expected"),
    [(1000, (1_716_712, 1_681_409)), (17_789, (18_925_437, 18_873_345))],
)
def test_parameters_of_scgan(n_genes, expected):
    assert pair(n_genes, None) == expected
    assert sum(expected) == 2049 * n_genes + 1_349_121


@pytest.mark.parametrize(
    ("n_genes", "n_classes", "expected"),
    [(1000, 10, (1_748_968, 1_683_722)), (1000, 5, (1_731_048, 1_682_437))],
)
def test_parameters_of_cscgan(n_genes, n_classes, expected):
    assert pair(n_genes, n_classes) == expected
    assert sum(expected) == 2049 * n_genes + 1_345_280 + 3841 * n_classes


def test_parameters_of_cscgan_with_all_genes():
    assert sum(pair(17_789, 10)) == 37_833_351


def test_parameters_of_a_toy():
    small = {"latent": 8, "g": (16, 32), "d": (32, 16)}
    assert pair(50, None, **small) == (2_386, 2_177)
    assert pair(50, 3, **small) == (2_578, 2_211)


def test_biases_and_tables():
    generator = Generator(50, (10,), 8, (16, 32))
    assert [layer.bias for layer in generator.hidden] == [None, None]
    assert generator.output.bias.shape == (50,)
    for norm, width in zip(generator.norms, (16, 32), strict=True):
        assert norm.gamma[0].shape == norm.beta[0].shape == (10, width)
        assert (norm.gamma[0] == 1).all() and (norm.beta[0] == 0).all()
    critic = Critic(50, (10,))
    assert all(layer.bias is not None for layer in critic.trunk)
    assert critic.head.weight[0].shape == (10, 256)
    assert critic.head.bias[0].shape == (10,)


def test_first_weights():
    torch.manual_seed(0)
    generator = Generator(2000, (10,), 128, (256, 512, 1024))
    hidden = generator.hidden[0].weight  # 128 -> 256: sqrt(6 / 384)
    assert 0.1245 < hidden.abs().max() <= 0.125
    assert hidden.std().item() == pytest.approx(0.125 / math.sqrt(3), rel=0.01)
    # Cut at two sigmas, a normal keeps 0.8796 of its standard deviation.
    sigma = math.sqrt(2.6 / ((1024 + 2000) / 2))
    output = generator.output.weight
    assert output.std().item() == pytest.approx(0.8796 * sigma, rel=0.005)
    assert 1.95 * sigma < output.abs().max() <= 2 * sigma
    assert (generator.output.bias == 0).all()
    # At 17,789 genes the same formula gives 0.0146, cut at 2 x 0.0166.
    assert math.sqrt(2.6 / ((1024 + 17789) / 2)) == pytest.approx(0.01663, abs=1e-5)
    head = Critic(50, (10,)).head.weight[0]
    assert 0.0478 < head.abs().max() <= math.sqrt(6 / (257 * 10)) < 0.0484


# ---------------------------------------------------------------------- layers


def test_library_size_by_hand():
    norm = LibrarySizeNorm(20_000)
    x = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0]])
    expected = [[5000, 15_000, 0], [0, 0, 0], [10_000, 0, 10_000]]
    assert norm(x).tolist() == expected
    torch.testing.assert_close(norm(7 * x), norm(x))
    # No row depends on another one.
    x[2] = 1e6
    assert norm(x)[0].tolist() == expected[0]
    many = norm(torch.rand(100, 500))
    torch.testing.assert_close(many.sum(1), torch.full((100,), 2e4), rtol=1e-6, atol=0)


def test_slope_of_library_size():
    norm = LibrarySizeNorm(20_000)
    slope = torch.autograd.functional.jacobian(norm, torch.tensor([[1.0, 3.0, 0.0]]))
    expected = [[3750, -1250, -1250], [-3750, 1250, -3750], [0, 0, 5000]]
    torch.testing.assert_close(slope[0, :, 0], torch.tensor(expected).float())
    # The total cannot move: columns sum to 0.
    assert slope[0, :, 0].sum(0).abs().max() < 1e-2


def test_running_variance_is_the_biased_one():
    norm = ConditionalBatchNorm(1, (2,))
    norm(torch.tensor([[0.0], [2.0]]), codes_of(0, 1))
    # Of the values 0 and 2: mean 1, variance 1 with divisor 2, but 2 with divisor 1.
    assert norm.running_var.item() == pytest.approx(0.999 * 1 + 0.001 * 1, abs=1e-7)
    assert norm.running_mean.item() == pytest.approx(0.001, abs=1e-9)
    torchs = nn.BatchNorm1d(1, momentum=1e-3)
    torchs(torch.tensor([[0.0], [2.0]]))
    assert torchs.running_var.item() == pytest.approx(1.001, abs=1e-6)
    norm.eval()
    norm(torch.tensor([[5.0], [9.0]]), codes_of(0, 1))
    assert norm.running_mean.item() == pytest.approx(0.001, abs=1e-9)


def test_conditional_batch_norm_with_equal_tables_is_batch_norm():
    torch.manual_seed(0)
    norm, plain = ConditionalBatchNorm(5, (3,)), nn.BatchNorm1d(5)
    with torch.no_grad():
        norm.gamma[0][:] = plain.weight[:] = torch.randn(5)
        norm.beta[0][:] = plain.bias[:] = torch.randn(5)
    x, codes = torch.randn(9, 5), torch.arange(9)[:, None] % 3
    torch.testing.assert_close(norm(x, codes), plain(x))


def test_a_label_moves_its_own_row_of_one_layer_only():
    torch.manual_seed(0)
    norm = ConditionalBatchNorm(5, (3,))
    nn.init.normal_(norm.gamma[0])
    x, before, after = torch.randn(4, 5), codes_of(0, 1, 2, 1), codes_of(2, 1, 0, 1)
    change = norm(x, after) - norm(x, before)
    assert (change[[1, 3]] == 0).all() and (change[[0, 2]] != 0).all()


def test_conditional_layer_norm():
    torch.manual_seed(0)
    norm = ConditionalLayerNorm(5, (3,))
    x, codes = torch.randn(4, 5), codes_of(0, 1, 2, 1)
    torch.testing.assert_close(norm(x, codes), F.layer_norm(x, (5,)))
    with torch.no_grad():
        norm.gamma[0][1], norm.beta[0][1] = 2.0, 3.0
    expected = F.layer_norm(x, (5,)) * torch.tensor([1.0, 2, 1, 2])[:, None]
    expected += torch.tensor([0.0, 3, 0, 3])[:, None]
    torch.testing.assert_close(norm(x, codes), expected)


def test_scale_and_shift_of_two_conditions_add_up():
    norm = ConditionalLayerNorm(2, (2, 3))
    with torch.no_grad():
        norm.gamma[0][:] = torch.tensor([[1.0], [2.0]])
        norm.gamma[1][:] = torch.tensor([[0.0], [0.5], [4.0]])
        norm.beta[0][:] = torch.tensor([[0.0], [10.0]])
        norm.beta[1][:] = torch.tensor([[0.0], [1.0], [2.0]])
    x = torch.tensor([[-1.0, 1.0]] * 3)  # normalised already, up to eps
    out = norm(x, torch.tensor([[0, 0], [1, 1], [1, 2]]))
    expected = torch.tensor([[-1.0, 1.0], [8.5, 13.5], [6.0, 18.0]])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_heads_by_hand():
    phi, codes = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), codes_of(0, 1)

    def score(head):
        vector, bias = head(codes)
        return ((phi * vector).sum(1) + bias).tolist()

    table, own = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([10.0, 20.0])
    head = ClassHead(2, (2,), "proj")
    with torch.no_grad():
        head.weight[0][:], head.bias[0][:] = table, own
    assert score(head) == [11.0, 24.0]
    assert count_parameters(head) == 6
    head = ClassHead(2, (2,), "miyato")
    with torch.no_grad():
        head.weight[0][:], head.shared[:], head.shared_bias[:] = table, 1.0, 100.0
    # v . phi + b + w_c . phi: 3 + 100 + 1 and 7 + 100 + 4
    assert score(head) == [104.0, 111.0]
    assert count_parameters(head) == 7
    head = ClassHead(2, (2,), "none")
    with torch.no_grad():
        head.shared[:], head.shared_bias[:] = 1.0, 100.0
    assert score(head) == [103.0, 107.0]
    assert count_parameters(head) == 3


@pytest.mark.parametrize("kind", ["proj", "miyato"])
def test_a_further_condition_starts_without_effect(kind):
    torch.manual_seed(0)
    critic, generator = Critic(6, (2, 3), (5,), cond_type=kind), Generator(6, (2, 3))
    generator.eval()
    x, z = torch.rand(3, 6), torch.randn(3, 128)
    one, two = (torch.tensor([[0, b]] * 3) for b in (0, 2))
    assert torch.equal(critic(x, one), critic(x, two))
    assert torch.equal(generator(z, one), generator(z, two))
    other = torch.tensor([[1, 0]] * 3)
    assert not torch.equal(critic(x, one), critic(x, other))


# ------------------------------------------------------------------- generator


@pytest.mark.parametrize("kind", ["batchnorm", "layernorm", "none"])
@pytest.mark.parametrize("mode", [True, False])
def test_generated_rows_have_the_total(kind, mode):
    generator = toy_generator(cond_type=kind, output_lsn=2e4).train(mode)
    out = generator(torch.randn(40, 8), torch.arange(40)[:, None] % 3)
    assert out.shape == (40, 50) and out.dtype == torch.float32
    assert out.min() >= 0
    torch.testing.assert_close(out.sum(1), torch.full((40,), 2e4), rtol=1e-6, atol=0)


def test_generator_without_the_layer_and_on_the_log_scale():
    z, codes = torch.randn(20, 8), torch.zeros(20, 1, dtype=torch.long)
    free = toy_generator(output_lsn=None)(z, codes)
    fixed = toy_generator(output_lsn=300.0)(z, codes)
    logged = toy_generator(output_lsn=300.0, log1p=True)(z, codes)
    assert free.sum(1).std() > 0.01 * free.sum(1).mean()
    torch.testing.assert_close(
        fixed, 300 * free / free.sum(1, keepdim=True), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(logged, torch.log1p(fixed))


@pytest.mark.parametrize("kind", ["batchnorm", "layernorm", "none"])
def test_one_class_alone_and_in_a_mixed_batch(kind):
    generator = toy_generator(cond_type=kind)
    z, mixed = torch.randn(30, 8), torch.arange(30)[:, None] % 3
    ones = (mixed[:, 0] == 1).nonzero()[:, 0]
    generator.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            generator(z[ones], mixed[ones]), generator(z, mixed)[ones]
        )
        generator.train()
        alone, among = generator(z[ones], mixed[ones]), generator(z, mixed)[ones]
        # In training, batch statistics tie a row to the rows beside it.
        tied = not torch.allclose(alone, among, rtol=1e-3)
        assert tied == (kind != "layernorm")
        generator.eval()
        moved = not torch.equal(generator(z, mixed), generator(z, 2 - mixed))
        assert moved == (kind != "none")


# ---------------------------------------------------------------- critic's loss


def straight_critic():
    """A critic that is 3 x1 + 4 x2 where cells are positive."""
    critic = Critic(2, (1,), (1,), cond_type="none")
    with torch.no_grad():
        critic.trunk[0].weight[:] = torch.tensor([[3.0, 4.0]])
        critic.head.shared[:] = 1.0
    return critic


def gradient_of(form, critic, *args, **kwargs):
    """Terms of the loss, and each parameter's gradient."""
    critic.zero_grad(set_to_none=True)
    terms = form(critic, *args, **kwargs)
    if form is critic_loss:
        terms["critic_loss"].backward()
    return terms, {name: p.grad for name, p in critic.named_parameters()}


@pytest.mark.parametrize("form", [critic_loss, critic_gradient])
def test_penalty_of_a_straight_critic(form):
    x, codes = torch.rand(7, 2) + 0.1, torch.zeros(7, 1, dtype=torch.long)
    # The same cells on both sides: only the penalty is left.
    terms, grads = gradient_of(form, straight_critic(), x, x, codes, torch.rand(7, 1))
    assert terms["penalty"].item() == pytest.approx(16)  # (|w| - 1)^2, |w| = 5
    assert terms["critic_loss"].item() == pytest.approx(160, abs=1e-3)
    assert terms["wasserstein"].item() == pytest.approx(0, abs=1e-6)
    # 10 times 2 (|w| - 1) w / |w|, and 10 times 2 (|w| - 1) |w| for the head.
    expected = torch.tensor([[48.0, 64.0]])
    torch.testing.assert_close(grads["trunk.0.weight"], expected, rtol=1e-5, atol=1e-3)
    assert grads["head.shared"].item() == pytest.approx(400, abs=1e-2)
    assert grads["trunk.0.bias"].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("form", [critic_loss, critic_gradient])
def test_loss_by_hand(form):
    real, fake = torch.tensor([[1.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0, 0.0]] * 2)
    args = (real, fake, codes_of(0, 0), torch.zeros(2, 1), 2.0)
    terms, _ = gradient_of(form, straight_critic(), *args)
    # Scores of real cells 7 and 10, of generated ones 3: 3 - 8.5 + 2 x 16.
    assert terms["wasserstein"].item() == pytest.approx(5.5)
    assert terms["critic_loss"].item() == pytest.approx(26.5)
    assert terms["penalty"].item() == pytest.approx(16)


@pytest.mark.parametrize("form", [critic_loss, critic_gradient])
def test_a_slope_of_zero_is_no_trouble(form):
    critic = Critic(4, (2,), (3, 3))
    for parameter in critic.parameters():
        nn.init.zeros_(parameter)
    codes = codes_of(0, 1, 1)
    args = (torch.rand(3, 4), torch.rand(3, 4), codes, torch.rand(3, 1))
    terms, grads = gradient_of(form, critic, *args)
    assert terms["penalty"].item() == 1 and terms["critic_loss"].item() == 10
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("kind", ["proj", "miyato", "none"])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("n_classes", [(4,), (4, 3)])
@pytest.mark.parametrize("paired", [True, False])
def test_gradient_by_hand_is_autograds(in_doubles, kind, n_layers, n_classes, paired):
    torch.manual_seed(1)
    critic = Critic(11, n_classes, (9, 7, 5)[:n_layers], cond_type=kind)
    for parameter in critic.parameters():
        # Biases and further tables start at zero: give them a part in this.
        nn.init.normal_(parameter, 0, 0.5)

    def some_codes(n):
        # The last class of each condition does not occur.
        return torch.stack([torch.randint(k - 1, (n,)) for k in n_classes], 1)

    real, fake, partner = torch.rand(3, 8, 11) * 3
    args = (critic, real, fake, some_codes(8), torch.rand(8, 1), 7.0)
    more = {} if paired else {"fake_codes": some_codes(8), "partner": partner}
    wanted, by_autograd = gradient_of(critic_loss, *args, **more)
    found, by_hand = gradient_of(critic_gradient, *args, **more)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    for name in ("critic_loss", "penalty", "wasserstein"):
        torch.testing.assert_close(found[name], wanted[name].detach(), **exact)
        assert not found[name].requires_grad
    assert wanted["penalty"] > 0.01
    for name, grad in by_autograd.items():
        torch.testing.assert_close(by_hand[name], grad, **exact, msg=name)
    if kind != "none":
        # A class that is absent asks nothing of its tables.
        assert (by_hand["head.weight.0"][-1] == 0).all()
        assert (by_hand["head.weight.0"][:-1] != 0).any()


def test_gradient_by_hand_leaves_its_input_alone():
    torch.manual_seed(0)
    real, fake, partner, share = *torch.rand(3, 6, 11), torch.rand(6, 1)
    codes, others = torch.randint(3, (2, 6, 1))
    given = [real, fake, codes, share, others, partner]
    before = [tensor.clone() for tensor in given]
    critic = Critic(11, (3,), (5, 4))
    kept = weights(critic)
    more = {"fake_codes": others, "partner": partner}
    critic_gradient(critic, real, fake, codes, share, **more)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(kept[k], p) for k, p in critic.named_parameters())


def test_points_between_take_the_real_labels():
    torch.manual_seed(0)
    critic = Critic(5, (3,), (4,))
    seen = []
    critic.register_forward_hook(lambda module, given, out: seen.append(given))
    real = LibrarySizeNorm(100.0)(torch.rand(6, 5))
    fake = LibrarySizeNorm(100.0)(torch.rand(6, 5))
    partner = LibrarySizeNorm(100.0)(torch.rand(6, 5))
    codes, others = codes_of(0, 1, 2, 0, 1, 2), codes_of(1, 1, 1, 1, 1, 1)
    share = torch.tensor([0.0, 1.0, 0.25, 0.5, 0.75, 0.9])[:, None]
    critic_loss(critic, real, fake, codes, share, fake_codes=others, partner=partner)
    between, labels = seen[-1]
    assert torch.equal(labels, codes)
    # 0 is the real cell, 1 the generated one of the same class, one share a row.
    torch.testing.assert_close(between, (1 - share) * real + share * partner)
    torch.testing.assert_close(between.sum(1), torch.full((6,), 100.0))
    # Real and generated cells go through in one pass, each with its own labels.
    both, labels = seen[0]
    assert torch.equal(both, torch.cat([real, fake]))
    assert torch.equal(labels, torch.cat([codes, others]))


# ----------------------------------------------------------------------- steps


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_critic_step_moves_the_critic_downhill(by_hand):
    torch.manual_seed(0)
    critic = Critic(11, (3,), (9, 7))
    optimiser = training.adam(critic.parameters(), 1e-3)
    real, fake, share = torch.rand(20, 11), torch.rand(20, 11), torch.rand(20, 1)
    args = (real, fake, torch.randint(3, (20, 1)), share)
    before = weights(critic)
    terms = critic_step(critic, optimiser, *args, hand_gradient=by_hand)
    moved = {k for k, p in critic.named_parameters() if (before[k] != p).any()}
    # Real and generated cells share their labels: a class's bias cancels.
    assert moved >= before.keys() - {"head.bias.0"}
    assert not any(term.requires_grad for term in terms.values())
    after = critic_loss(critic, *args)["critic_loss"]
    assert after < terms["critic_loss"]


def test_a_generator_step_moves_the_generator_only():
    torch.manual_seed(0)
    generator, critic = toy_generator(), Critic(50, (3,), (32, 16))
    optimiser = training.adam(generator.parameters(), 1e-3)
    z, codes = torch.randn(20, 8), torch.randint(3, (20, 1))
    of_g, of_c = weights(generator), weights(critic)
    loss = generator_step(generator, critic, optimiser, z, codes)
    assert not loss.requires_grad
    assert all((of_g[k] != p).any() for k, p in generator.named_parameters())
    assert all(torch.equal(of_c[k], p) for k, p in critic.named_parameters())
    # The critic's weights were not even differentiated.
    assert all(p.grad is None for p in critic.parameters())
    with torch.no_grad():
        after = -critic(generator(z, codes), codes).mean()
        generator.load_state_dict(of_g, strict=False)
        before = -critic(generator(z, codes), codes).mean()
    assert loss.item() == pytest.approx(before.item(), rel=1e-4)
    assert after < loss


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-4),
        (1, 9.99997697e-5),
        (1_000, 9.97700e-5),
        (100_000, 7.94328e-5),
        (250_000, 5.62341e-5),
        (500_000, 3.16228e-5),
        (750_000, 1.77828e-5),
        (1_000_000, 1e-5),
    ],
)
def test_schedule(step, rate):
    assert learning_rate(step, 1_000_000) == pytest.approx(rate, rel=2e-6)


def test_schedule_of_no_steps():
    assert learning_rate(0, 0) == 1e-4


@pytest.mark.parametrize(
    ("amsgrad", "second"), [(True, 5.51362e-5), (False, 5.77984e-5)]
)
def test_three_updates_of_the_optimiser(in_doubles, amsgrad, second):
    x = nn.Parameter(torch.zeros(1))
    optimiser = training.adam([x], 1e-4, betas=(0.5, 0.9), amsgrad=amsgrad)
    moves = []
    for gradient in (1.0, 0.1, -0.5):
        before, x.grad = x.item(), torch.tensor([gradient])
        optimiser.step()
        moves.append(before - x.item())
    # epsilon stands at another place than in TensorFlow: the eighth digit.
    assert moves[0] == pytest.approx(9.99999968e-5, rel=1e-7)
    assert moves[1] == pytest.approx(second, rel=1e-5)
    if amsgrad:
        assert moves[1:] == pytest.approx([5.51361933e-5, -1.81964943e-5], rel=2e-7)


@pytest.mark.parametrize("by_hand", [True, False])
def test_an_absent_class_still_moves_by_its_momentum(by_hand):
    torch.manual_seed(0)
    critic, generator = Critic(50, (3,), (9,)), toy_generator()
    of_c = training.adam(critic.parameters(), 1e-3, betas=(0.5, 0.9), amsgrad=True)
    of_g = training.adam(generator.parameters(), 1e-3, betas=(0.5, 0.9), amsgrad=True)
    tables = (critic.head.weight[0], generator.norms[0].gamma[0])
    for classes in (codes_of(0, 1, 2, 0), codes_of(0, 1, 1, 0)):
        before = [table.detach().clone() for table in tables]
        args = (torch.rand(4, 50), torch.rand(4, 50), classes, torch.rand(4, 1))
        critic_step(critic, of_c, *args, hand_gradient=by_hand)
        generator_step(generator, critic, of_g, torch.randn(4, 8), classes)
    for table, old in zip(tables, before, strict=True):
        assert (table.grad[2] == 0).all() and (table.grad[:2] != 0).any()
        assert (table[2] != old[2]).any()


def test_forms_agree_over_many_steps(in_doubles):
    ends = []
    for by_hand in (True, False):
        torch.manual_seed(5)
        critic = Critic(11, (3,), (9, 7))
        start = weights(critic)
        optimiser = training.adam(critic.parameters(), 1e-3, amsgrad=True)
        for _ in range(20):
            real, fake, partner = torch.rand(3, 8, 11)
            codes, others = torch.randint(3, (2, 8, 1))
            more = {"fake_codes": others, "partner": partner, "hand_gradient": by_hand}
            critic_step(critic, optimiser, real, fake, codes, torch.rand(8, 1), **more)
        ends.append(weights(critic))
    for name, one in ends[0].items():
        assert not torch.equal(one, start[name]), name
        torch.testing.assert_close(one, ends[1][name], rtol=1e-9, atol=1e-9)
