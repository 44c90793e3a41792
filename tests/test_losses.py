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
