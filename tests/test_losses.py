"""Each loss against a number worked out on paper or an independent route."""

from __future__ import annotations

import math

import pytest
import torch

from scgenlib import losses


def test_discriminator_loss_landmarks():
    zero = torch.zeros(4, 1)
    assert losses.discriminator_loss(zero, zero, 0.9, 0.1).item() == pytest.approx(
        2 * math.log(2), abs=1e-6
    )
    # The best answer to the targets 0.9 and 0.1 are the logits +-ln 9.
    best = torch.full((4, 1), math.log(9))
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    floor = losses.discriminator_loss(best, -best, 0.9, 0.1).item()
    assert floor == pytest.approx(2 * entropy, abs=1e-6)
    assert floor == pytest.approx(0.6502, abs=1e-4)
    for shift in (-1.0, 0.5, 3.0):
        worse = losses.discriminator_loss(best + shift, -best, 0.9, 0.1)
        assert worse.item() > floor


def test_generator_loss_landmarks():
    assert losses.generator_loss(torch.zeros(3)).item() == pytest.approx(math.log(2))
    perfect = losses.generator_loss(torch.full((3,), -math.log(9)))
    assert perfect.item() == pytest.approx(math.log(10), abs=1e-6)


def test_critic_loss_is_a_difference_of_means():
    got = losses.wasserstein_critic_loss(torch.tensor([3.0, 5.0]), torch.tensor([1.0]))
    assert got.item() == -3.0


def test_gradient_penalty_of_a_linear_critic_is_known():
    # D(x) = w.x has slope w everywhere: the penalty is (|w| - 1)^2.
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    real, fake = torch.randn(7, 2), torch.randn(7, 2)
    penalty = losses.gradient_penalty(lambda x: x @ w, real, fake)
    assert penalty.item() == pytest.approx(16.0, rel=1e-6)
    penalty.backward()
    # d/dw (|w| - 1)^2 = 2 (|w| - 1) w / |w|
    torch.testing.assert_close(w.grad, torch.tensor([4.8, 6.4]))


def test_gradient_penalty_at_a_point_of_ones_choice():
    # D(x) = |x|^2 / 2 has slope x: at (3, 4) the penalty is (5 - 1)^2.
    def critic(x):
        return (x**2).sum(1) / 2

    real, fake = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.6, 0.8]])
    for share, expected in ((0.0, 16.0), (1.0, 0.0), (0.5, 4.0)):
        at = torch.tensor([[share]])
        penalty = losses.gradient_penalty(critic, real, fake, share=at)
        assert penalty.item() == pytest.approx(expected, abs=1e-6)
    # One share for each cell: slopes of length 5 and 1.
    at = torch.tensor([[0.0], [1.0]])
    both = losses.gradient_penalty(
        critic, *(x.expand(2, 2) for x in (real, fake)), share=at
    )
    assert both.item() == pytest.approx(8.0)


def test_gradient_penalty_draws_a_share_for_each_cell():
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.sum(1)

    def draw():
        rng = torch.Generator().manual_seed(4)
        losses.gradient_penalty(critic, torch.zeros(50, 3), torch.ones(50, 3), rng)
        return seen[-1]

    first = draw()
    assert (first == first[:, :1]).all()
    assert len(first[:, 0].unique()) == 50
    assert 0 <= first.min() < 0.1 and 0.9 < first.max() <= 1
    assert torch.equal(first, draw())


def test_gradient_penalty_where_the_slope_is_zero():
    w = torch.zeros(2, requires_grad=True)
    penalty = losses.gradient_penalty(
        lambda x: x @ w, torch.rand(3, 2), torch.rand(3, 2)
    )
    assert penalty.item() == 1
    penalty.backward()
    assert torch.isfinite(w.grad).all()


def test_kl_equals_torch_distributions():
    mean, log_variance = torch.randn(6, 3), torch.randn(6, 3)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(
        normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)
    )
    torch.testing.assert_close(
        losses.kl_to_standard_normal(mean, log_variance), kl.sum(1).mean()
    )


def test_nt_xent_by_hand():
    # Two cells on orthogonal axes, both views equal: similarity 1 to the
    # positive, 0 to the two negatives, so the loss is ln(1 + 2 e^(-1/t)).
    a = torch.eye(2)
    for temperature in (0.5, 1.0):
        want = math.log(1 + 2 * math.exp(-1 / temperature))
        got = losses.nt_xent(a, a * 3, temperature).item()
        assert got == pytest.approx(want, abs=1e-6)
    assert losses.nt_xent(a, a.flip(0)).item() > losses.nt_xent(a, a).item()


# ------------------------------------------------------------ losses of a mixture VAE


# 2: masked MSE.
def test_masked_mse_by_hand():
    x = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])
    made = torch.tensor([[2.0, 9.0, 2.0], [9.0, 1.0, 9.0]], requires_grad=True)
    # Squares 1, 0 and 4 where something was observed, over all six entries.
    loss = losses.masked_mse(x, made)
    assert loss.item() == pytest.approx(5 / 6, abs=1e-7)
    loss.backward()
    expected = torch.tensor([[2.0, 0.0, 0.0], [0.0, -4.0, 0.0]]) / 6
    torch.testing.assert_close(made.grad, expected)
    assert (made.grad[x == 0] == 0).all()
    other = torch.where(x == 0, torch.tensor(-50.0), made.detach())
    assert torch.equal(losses.masked_mse(x, other), loss.detach())


# 3: density of a Gaussian.
def test_gaussian_log_density_by_hand():
    zero = torch.zeros(1, 10)
    at_centre = losses.gaussian_log_density(zero, zero, zero).item()
    assert at_centre == pytest.approx(-9.1893853, abs=1e-5)
    z, log_variance = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, math.log(4)]])
    found = losses.gaussian_log_density(z, torch.zeros(1, 2), log_variance)
    assert found.item() == pytest.approx(-3.5310242, abs=1e-6)
    # Many points and components at once, against torch.
    torch.manual_seed(0)
    z, centres, log_variance = torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3)
    found = losses.gaussian_log_density(z, centres, log_variance)
    assert found.shape == (5, 4)
    normal = torch.distributions.Normal(centres, (0.5 * log_variance).exp())
    torch.testing.assert_close(found, normal.log_prob(z[:, None]).sum(2))


def mixture(pi, centres, variances):
    """Log weights, centres and log variances."""
    return (
        torch.tensor(pi).log(),
        torch.tensor(centres),
        torch.tensor(variances).log(),
    )


# 4: divergence from the mixture where it is known.
def test_mixture_kl_landmarks():
    z, zero = torch.randn(7, 10), torch.zeros(7, 10)
    one = mixture([1.0], [[0.0] * 10], [[1.0] * 10])
    assert losses.mixture_kl(zero, zero, z, *one).item() == pytest.approx(0, abs=1e-6)
    # One component: whatever the draw, it is the divergence of two Gaussians.
    shifted = losses.mixture_kl(zero + 1, zero, z, *one)
    assert shifted.item() == pytest.approx(5, abs=1e-5)
    mean, log_variance = torch.randn(7, 10), torch.randn(7, 10)
    torch.testing.assert_close(
        losses.mixture_kl(mean, log_variance, z, *one),
        losses.kl_to_standard_normal(mean, log_variance),
    )
    # Two components that are the same are one.
    two = mixture([0.5, 0.5], [[0.0] * 10] * 2, [[1.0] * 10] * 2)
    assert losses.mixture_kl(zero, zero, z, *two).item() == pytest.approx(0, abs=1e-6)
    uneven = mixture([0.9, 0.1], [[0.0] * 10] * 2, [[1.0] * 10] * 2)
    again = losses.mixture_kl(zero + 1, zero, z, *uneven)
    assert again.item() == pytest.approx(5, abs=1e-5)


# 5 and 6: divergence from the mixture at the mean code.
@pytest.mark.parametrize(
    ("mean", "variance", "parts", "shares", "expected"),
    [
        (
            [1.0, 0.0],
            [1.0, 1.0],
            ([0.5, 0.5], [[1.0, 0.0], [-1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]),
            [0.8807971, 0.1192029],
            0.5662192,
        ),
        (
            [0.5, -1.0],
            [0.25, 2.0],
            ([0.3, 0.7], [[0.0, 0.0], [2.0, 1.0]], [[1.0, 1.0], [0.5, 4.0]]),
            [0.8353840, 0.1646160],
            2.0177975,
        ),
    ],
)
def test_mixture_kl_by_hand(mean, variance, parts, shares, expected):
    mean, log_variance = torch.tensor([mean]), torch.tensor([variance]).log()
    parts = mixture(*parts)
    found = losses.responsibilities(mean, *parts).exp()
    assert found[0].tolist() == pytest.approx(shares, abs=1e-6)
    loss = losses.mixture_kl(mean, log_variance, mean, *parts)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    # It is a mean over cells: the same cell twice changes nothing.
    twice = [torch.cat([x, x]) for x in (mean, log_variance, mean)]
    torch.testing.assert_close(losses.mixture_kl(*twice, *parts), loss)


def test_mixture_kl_is_a_mean_over_draws_of_the_divergence():
    """On average over draws it lies at most ln K above the exact divergence."""
    rng = torch.Generator().manual_seed(0)
    parts = mixture([0.3, 0.7], [[0.0, 0.0], [2.0, 1.0]], [[1.0, 1.0], [0.5, 4.0]])
    mean, log_variance = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 2.0]).log()
    z = mean + (0.5 * log_variance).exp() * torch.randn(200_000, 2, generator=rng)
    inside = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    density = losses.gaussian_log_density(z, *parts[1:]) + parts[0]
    exact = (inside.log_prob(z).sum(1) - density.logsumexp(1)).mean().item()
    spread = [x.expand(len(z), 2) for x in (mean, log_variance)]
    bound = losses.mixture_kl(*spread, z, *parts).item()
    assert exact - 0.01 < bound < exact + math.log(2)


# 7: a point far from every component.
def test_far_points_have_their_true_shares():
    near, far = torch.full((1, 10), 0.1), torch.full((1, 10), 60.0)
    parts = mixture([0.2, 0.8], [[0.0] * 10, [0.01] * 10], [[1.0] * 10] * 2)
    for z in (near, far):
        # Equal variances: the log odds are linear in z. At 60: 600 x 0.01 - 0.0005.
        odds = math.log(0.8 / 0.2) + 0.01 * z.sum().item() - 0.5 * 10 * 1e-4
        shares = losses.responsibilities(z, *parts).exp()[0]
        assert shares[1].item() == pytest.approx(1 / (1 + math.exp(-odds)), abs=2e-4)
        assert shares.sum().item() == pytest.approx(1, abs=1e-6)
    assert shares[1] > 0.999  # and not one half
    # The densities themselves are 0 there.
    assert losses.gaussian_log_density(far, *parts[1:]).exp().max() == 0
    z = far.clone().requires_grad_(True)
    losses.mixture_kl(z, torch.zeros(1, 10), z, *parts).backward()
    assert torch.isfinite(z.grad).all()


# 20: shares sum to 1.
def test_shares_sum_to_one():
    torch.manual_seed(0)
    z, centres, log_variance = (torch.randn(n, 4) * 5 for n in (50, 3, 3))
    log_pi = torch.randn(3).log_softmax(0)
    shares = losses.responsibilities(z, log_pi, centres, log_variance).exp()
    assert shares.shape == (50, 3) and shares.min() >= 0
    torch.testing.assert_close(shares.sum(1), torch.ones(50))
    # They are pi times density over the sum of these.
    weight = (losses.gaussian_log_density(z, centres, log_variance) + log_pi).double()
    expected = weight.exp() / weight.exp().sum(1, keepdim=True)
    torch.testing.assert_close(shares.double(), expected, rtol=1e-4, atol=1e-6)


# 8: cell-level contrast.
def test_nt_xent_landmarks():
    t, eye = 0.9, torch.eye(2)
    swapped = eye.flip(0)
    assert losses.nt_xent(eye, eye, t).item() == pytest.approx(0.5058448, abs=1e-6)
    found = losses.nt_xent(eye, swapped, t).item()
    assert found == pytest.approx(1.6169560, abs=1e-6)
    for n in (2, 32):
        same = torch.ones(n, 3)
        expected = math.log(2 * n - 1)
        assert losses.nt_xent(same, same, t).item() == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx(4.1431347, abs=1e-7)
    apart = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    found = losses.nt_xent(apart, apart, t).item()
    assert found == pytest.approx(0.1961719, abs=1e-6)
    torch.manual_seed(0)
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    loss = losses.nt_xent(a, b, t)
    torch.testing.assert_close(losses.nt_xent(b, a, t), loss)
    scale = torch.rand(6, 1) * 9 + 0.1
    torch.testing.assert_close(losses.nt_xent(a * scale, b / scale, t), loss)
    assert losses.nt_xent(a[:1], b[:1], t).item() == 0


# 9: type-level contrast.
def test_sup_con_landmarks():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def loss(labels, features=rows, **options):
        return losses.sup_con(features, torch.tensor(labels), **options).item()

    expected = 0.9 / 0.7 * math.log(1 + 2 * math.exp(-1 / 0.9))
    assert loss([0, 0, 1, 1]) == pytest.approx(expected, abs=1e-6)
    assert expected == pytest.approx(0.6503719, abs=1e-7)
    assert loss([0, 1, 0, 1]) == pytest.approx(2.0789433, abs=1e-6)
    assert loss([0, 0, 0, 0], torch.ones(4, 2)) == pytest.approx(1.4125015, abs=1e-6)
    assert loss([0, 1, 2, 3]) == 0
    # Two of four rows have no mate: they add nothing and count in the mean.
    assert loss([0, 0, 1, 2]) == pytest.approx(0.3251860, abs=1e-6)
    assert loss([0, 0, 1, 1], 3 * rows) == pytest.approx(expected, abs=1e-6)
    plain = loss([0, 0, 1, 1], 3 * rows.double(), normalise=False)
    assert plain == pytest.approx(0.0001167, abs=1e-7)
    # The names of the labels mean nothing.
    assert loss([7, 7, -2, -2]) == loss([0, 0, 1, 1])


def test_sup_con_row_by_row():
    """With types of 3, 2 and 1 rows, against loops."""
    torch.manual_seed(0)
    rows, labels = torch.randn(6, 4), [0, 0, 1, 0, 2, 1]
    z = rows / rows.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        near = [math.exp((z[i] @ z[j]).item() / 0.9) for j in range(6)]
        mates = [j for j in range(6) if j != i and labels[j] == labels[i]]
        others = sum(near) - near[i]
        if mates:
            total -= sum(math.log(near[j] / others) for j in mates) / len(mates)
    found = losses.sup_con(rows, torch.tensor(labels)).item()
    assert found == pytest.approx(0.9 / 0.7 * total / 6, abs=1e-5)


def test_sup_con_without_any_mate_has_a_gradient_of_zero():
    rows = torch.randn(3, 2, requires_grad=True)
    losses.sup_con(rows, torch.arange(3)).backward()
    assert (rows.grad == 0).all()


# ------------------------------------------------------------ losses of an atlas VAE


def test_gaussian_kl_by_hand():
    zero = torch.zeros(2, 3)
    assert losses.gaussian_kl(zero, zero).tolist() == [0, 0]
    # 0.5 (mu^2 + v - 1 - ln v): 2 for mu 2, v 1; 0.5 (4 - 1 - ln 4) for mu 0, v 4.
    mean, variance = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 4.0]])
    expected = 2 + 0.5 * (3 - math.log(4))
    found = losses.gaussian_kl(mean, variance.log())
    assert found.shape == (1,) and found.item() == pytest.approx(expected, abs=1e-6)
    torch.manual_seed(0)
    mean, log_variance, centre = torch.randn(3, 6, 4)
    normal = torch.distributions.Normal
    own = normal(mean, (0.5 * log_variance).exp())
    for at in (None, centre):
        other = normal(torch.zeros(6, 4) if at is None else at, 1.0)
        kl = torch.distributions.kl_divergence(own, other).sum(1)
        torch.testing.assert_close(losses.gaussian_kl(mean, log_variance, at), kl)
    torch.testing.assert_close(
        losses.kl_to_standard_normal(mean, log_variance),
        losses.gaussian_kl(mean, log_variance).mean(),
    )


def test_class_weights_by_hand():
    codes = torch.tensor([0, 0, 0, 1, -1, -1, 3, 3])
    # Six labelled cells, three types that have some: 6 / (3 n_k).
    found = losses.class_weights(codes, 5)
    assert found.tolist() == pytest.approx([2 / 3, 2, 0, 1, 0])
    assert losses.class_weights(torch.tensor([-1, -1]), 2).tolist() == [0, 0]
    # The mean weight of a labelled cell is 1.
    assert found[codes[codes >= 0]].mean().item() == pytest.approx(1)


def test_more_cells_of_a_class_do_not_give_it_more_weight():
    torch.manual_seed(0)
    logits, codes = torch.randn(9, 3), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2])

    def loss(rows):
        weights = losses.class_weights(codes[rows], 3)
        of_class = []
        for k in range(3):
            own = torch.where(codes[rows] == k, k, -1)
            part = losses.weighted_cross_entropy(logits[rows], own, weights)
            of_class.append([float(v) for v in part])
        total = sum(weight for _, weight in of_class)
        return [value / total for value, _ in of_class]

    rows = torch.arange(9)
    once = loss(rows)
    for copies in (2, 7):
        more = torch.cat([rows, rows[codes == 1].repeat(copies - 1)])
        assert loss(more) == pytest.approx(once, rel=1e-5)


def test_weighted_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [9.0, -9.0]])
    weights = torch.tensor([2.0, 0.5])
    codes = torch.tensor([1, 0, -1])
    value, total = losses.weighted_cross_entropy(logits, codes, weights)
    # ln 2 with weight 1/2, ln(4/3) with weight 2; the third cell has no label.
    expected = 0.5 * math.log(2) + 2 * math.log(4 / 3)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert total.item() == 2.5
    # The quotient is torch's weighted mean.
    known = torch.nn.functional.cross_entropy(logits[:2], codes[:2], weights)
    assert (value / total).item() == pytest.approx(known.item(), abs=1e-6)


def test_no_label_gives_no_gradient_and_no_number():
    logits = torch.randn(4, 3, requires_grad=True)
    codes = torch.tensor([-1, 2, -1, 0])
    value, _ = losses.weighted_cross_entropy(logits, codes, torch.ones(3))
    value.backward()
    assert (logits.grad[codes < 0] == 0).all()
    assert (logits.grad[codes >= 0].abs().sum(1) > 0).all()
    logits.grad = None
    value, total = losses.weighted_cross_entropy(
        logits, torch.full((4,), -1), torch.ones(3)
    )
    value.backward()
    assert value == total == 0 and (logits.grad == 0).all()


def test_rbf_mmd_landmarks():
    torch.manual_seed(0)
    x, y = torch.randn(30, 3), torch.randn(20, 3)
    assert losses.rbf_mmd(x, x).item() == pytest.approx(0, abs=1e-5)
    assert losses.rbf_mmd(x, x[torch.randperm(30)]).item() == pytest.approx(0, abs=1e-5)
    near, far = (losses.rbf_mmd(x, y + shift).item() for shift in (0.5, 3.0))
    assert 0.01 < near < far
    torch.testing.assert_close(losses.rbf_mmd(x, y + 3), losses.rbf_mmd(y + 3, x))


def test_rbf_mmd_by_hand():
    # Two points at distance 2, width 1: 1 + 1 - 2 exp(-4/2).
    a, b = torch.tensor([[0.0]]), torch.tensor([[2.0]])
    found = losses.rbf_mmd(a, b, (1.0,)).item()
    assert found == pytest.approx(2 - 2 * math.exp(-2), abs=1e-6)
    # Two points against one, widths 1/2 and 2, every pair and itself.
    x = torch.tensor([[0.0], [1.0]])

    def kernel(gap, s):
        return math.exp(-(gap**2) / (2 * s))

    expected = sum(
        (2 + 2 * kernel(1, s)) / 4 + 1 - 2 * (kernel(2, s) + kernel(1, s)) / 2
        for s in (0.5, 2.0)
    )
    assert losses.rbf_mmd(x, b, (0.5, 2.0)).item() == pytest.approx(expected, abs=1e-6)
    assert len(losses.BANDWIDTHS) == 19
    assert (min(losses.BANDWIDTHS), max(losses.BANDWIDTHS)) == (1e-6, 1e6)
    # The gradient is finite, also where points coincide.
    points = torch.zeros(3, 2, requires_grad=True)
    losses.rbf_mmd(points, torch.zeros(3, 2)).backward()
    assert points.grad.isfinite().all()


def test_least_squares_losses_by_hand():
    """Number 10 of REGINA's checks: the numbers of two real and two generated cells."""
    real, fake = torch.tensor([1.0, 0.8]), torch.tensor([0.0, 0.2])
    of_critic, of_generator = losses.least_squares_gan_losses(real, fake, 0.9)
    assert of_critic.item() == pytest.approx(0.5 * (0.01 + 0.02), abs=1e-7)
    assert of_critic.item() == pytest.approx(0.015, abs=1e-7)
    assert of_generator.item() == pytest.approx((1 + 0.64) / 2)
    # Without smoothing; and each side alone.
    assert losses.least_squares_gan_losses(real, fake)[0].item() == pytest.approx(0.02)
    only_real = losses.least_squares_gan_losses(real, real_target=0.9)
    assert [v.item() for v in only_real] == pytest.approx([0.005, 0.0])
    only_fake = losses.least_squares_gan_losses(fake=fake)
    assert [v.item() for v in only_fake] == pytest.approx([0.01, 0.82])
    # Any shape, cells of either kind may be more.
    column = losses.least_squares_gan_losses(real[:, None], fake.repeat(3), 0.9)
    torch.testing.assert_close(column, (of_critic, of_generator))


def test_centre_loss_by_hand():
    """Number 6 of REGINA's checks."""
    z, codes = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
    centres = torch.zeros(2, 2, requires_grad=True)
    found = losses.centre_loss(z, codes, centres)
    assert found.item() == (1 + 4) / 2
    found.backward()  # centres are drawn to their own codes
    assert centres.grad.tolist() == [[-1, 0], [0, -2]]
    assert losses.centre_loss(z, codes, z).item() == pytest.approx(0, abs=1e-11)
    assert losses.centre_loss(z, codes, z.flip(0)).item() == 5
    # A sum over dimensions: two independent normal vectors of 256 are 512 apart.
    torch.manual_seed(0)
    far = losses.centre_loss(
        torch.randn(2000, 256), torch.zeros(2000).long(), torch.randn(1, 256)
    )
    assert 400 < far.item() < 620
