"""Likelihoods against scipy, their limits, and the fast form against the plain one."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import sparse, stats
from torch.nn import functional as F

from scgenlib import likelihoods as lk

X = torch.tensor([0.0, 1.0, 7.0, 30.0, 1000.0])
N, G = 9, 12


def grid(*axes):
    """Every combination of some values, as one float64 tensor for each axis."""
    rows = torch.tensor(list(product(*axes)), dtype=torch.float64)
    return [rows[:, i] for i in range(len(axes))]


def counts(n=N, genes=G, seed=0):
    """Counts with an empty cell, a cell with one non-zero, and a large count."""
    rng = np.random.default_rng(seed)
    x = rng.poisson(rng.gamma(0.4, 3.0, (n, genes))) * (rng.random((n, genes)) < 0.4)
    x[1], x[2] = 0, 0
    x[2, 5], x[3, 4] = 1, 1000
    return lk.Counts.of(torch.tensor(x))


def plain(batch, log_mean, log_theta=None, gate=None):
    """The loss of each cell by the readable formulas, in float64."""
    x, mean = batch.dense.double(), log_mean.double().exp()
    if log_theta is None:
        log_prob = lk.poisson_log_prob(x, mean)
    else:
        theta = log_theta.double().clamp(*lk.LOG_THETA_RANGE).exp()
        log_prob = lk.nb_log_prob(x, mean, theta)
        if gate is not None:
            return -lk.zinb_log_prob(x, mean, theta, gate.double()).sum(1)
    if gate is not None:
        kept = F.logsigmoid(-gate.double()) + log_prob
        zero = torch.logaddexp(F.logsigmoid(gate.double()), kept)
        log_prob = torch.where(x == 0, zero, kept)
    return -log_prob.sum(1)


def inputs(theta, gate, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def draw(shape, spread, shift=0.0):
        if shape is None:
            return None
        drawn = torch.randn(shape, generator=rng, dtype=torch.float64) * spread + shift
        return drawn.to(dtype).requires_grad_()

    return [draw((N, G), 2, -1), draw(theta, 2), draw(gate, 3)]


def value_and_gradients(nll, given):
    weight = torch.linspace(0.5, 2, len(nll), dtype=nll.dtype)
    wanted = [t for t in given if t is not None]
    return nll.detach(), torch.autograd.grad((nll * weight).sum(), wanted)


# ------------------------------------------------------- the readable formulas


def test_zinb_is_the_mixture_of_scipy():
    thetas, means = (1e-2, 0.5, 3.0, 1e2, 1e4), (1e-4, 0.1, 2.0, 50.0, 1e4)
    x, theta, mean, gate = grid(X.tolist(), thetas, means, (-30.0, -2.0, 0.0, 30.0))
    got = lk.zinb_log_prob(x, mean, theta, gate)
    size, share = theta.numpy(), (theta / (theta + mean)).numpy()
    log_nb = stats.nbinom.logpmf(x.numpy(), size, share)
    log_kept = -np.logaddexp(0, gate.numpy()) + log_nb
    log_extra = -np.logaddexp(0, -gate.numpy())
    expected = np.where(x == 0, np.logaddexp(log_extra, log_kept), log_kept)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    # So does what `count_nll` computes of one gene, in float32.
    batch = lk.Counts.of(x[:, None])
    fast = lk.count_nll(
        batch, *(t.float()[:, None] for t in (mean.log(), theta.log(), gate))
    )
    np.testing.assert_allclose(fast, -expected, rtol=1e-5, atol=1e-5)


def test_probabilities_sum_to_one_and_have_the_moments_of_the_parameters():
    x = torch.arange(4000.0, dtype=torch.float64)
    mean, theta, gate = (torch.tensor(v, dtype=torch.float64) for v in (6.0, 1.5, -1.0))
    nb = lk.nb_log_prob(x, mean, theta).exp()
    assert nb.sum().item() == pytest.approx(1, abs=1e-9)
    assert (nb * x).sum().item() == pytest.approx(6)
    assert (nb * (x - 6) ** 2).sum().item() == pytest.approx(6 + 36 / 1.5)
    mixed = lk.zinb_log_prob(x, mean, theta, gate).exp()
    assert mixed.sum().item() == pytest.approx(1, abs=1e-9)
    assert (mixed * x).sum().item() == pytest.approx(
        lk.expected(mean.log(), gate).item()
    )
    zero = lk.zero_probability(mean.log(), theta.log(), gate)
    assert mixed[0].item() == pytest.approx(zero.item())
    # pi = 1 / (1 + e), (theta / (theta + m))^theta = 0.2^1.5
    pi = 1 / (1 + math.e)
    assert zero.item() == pytest.approx(pi + (1 - pi) * 0.2**1.5)
    poisson = lk.poisson_log_prob(x, mean).exp()
    assert poisson.sum().item() == pytest.approx(1, abs=1e-9)
    assert poisson[0].item() == pytest.approx(lk.zero_probability(mean.log()).item())
    assert lk.expected(mean.log()).item() == pytest.approx(6)


def test_limits():
    x, mean = grid([0.0, 1.0, 7.0, 30.0], [0.1, 2.0, 20.0])
    ones = torch.ones_like(x)
    poisson = torch.tensor(stats.poisson.logpmf(x, mean))
    torch.testing.assert_close(lk.poisson_log_prob(x, mean), poisson)
    torch.testing.assert_close(
        lk.nb_log_prob(x, mean, 1e6 * ones), poisson, rtol=1e-3, atol=1e-3
    )
    nb = lk.nb_log_prob(x, mean, 2 * ones)
    torch.testing.assert_close(lk.zinb_log_prob(x, mean, 2 * ones, -30 * ones), nb)
    closed = lk.zinb_log_prob(x, mean, 2 * ones, 30 * ones)
    assert (closed[x == 0] > -1e-9).all() and (closed[x > 0] < -29).all()


def test_gaussian_is_that_of_scipy():
    x, mean, variance = grid([-1.0, 0.0, 2.5], [0.0, 1.0], [0.1, 4.0])
    expected = stats.norm.logpdf(x, mean, variance.sqrt())
    got = lk.gaussian_log_prob(x, mean, variance.log())
    np.testing.assert_allclose(got, expected)


# ----------------------------------------------------------------- the fast form

SHAPES = ((N, G), (G,), (1, G), (N, 1), ())


@pytest.mark.parametrize("chunk", [10**6, 3 * G])
@pytest.mark.parametrize("gate", [None, *SHAPES])
@pytest.mark.parametrize("theta", [None, *SHAPES])
def test_fast_form_equals_the_plain_one(theta, gate, chunk, monkeypatch):
    monkeypatch.setattr(lk, "_CHUNK", chunk)  # also in pieces: 3 cells, 9 non-zeros
    batch, given = counts(), inputs(theta, gate)
    value, slopes = value_and_gradients(lk.count_nll(batch, *given), given)
    expected, wanted = value_and_gradients(plain(batch, *given), given)
    assert value.dtype == torch.float32 and value.shape == (N,)
    # Float32 resolves the loss of a zero to 1e-7, whatever its size.
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7 * G)
    for a, b in zip(slopes, wanted, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-5 * b.norm()
    with torch.no_grad():
        bare = lk.count_nll(batch, *given)
    assert torch.equal(bare, value) and not bare.requires_grad


@pytest.mark.parametrize("theta, gate", [((N, G), (N, G)), ((G,), (N, 1)), (None, ())])
def test_gradient_is_that_of_finite_differences(theta, gate):
    batch, given = counts(), inputs(theta, gate, torch.float64)
    given = [None if t is None else t for t in given]
    tensors = [t for t in given if t is not None]

    def loss(*parts):
        parts = iter(parts)
        return lk.count_nll(batch, *(None if t is None else next(parts) for t in given))

    assert torch.autograd.gradcheck(loss, tensors, rtol=1e-4, atol=1e-4)


def test_series_is_lgamma_and_digamma():
    theta, x = grid([1e-7, 1e-3, 0.1, 1.0, 5.0, 100.0], [1.0, 2.0, 9.0, 100.0, 1e4])
    value, slope = lk._log_rising(theta, x)
    exact = torch.lgamma(theta + x) - torch.lgamma(theta)
    torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-6)
    exact = torch.digamma(theta + x) - torch.digamma(theta)
    torch.testing.assert_close(slope, exact, rtol=1e-9, atol=2e-6)


def test_steps_of_a_small_count_are_lgamma_and_digamma_in_float32():
    low, high = (math.exp(v) for v in lk.LOG_THETA_RANGE)
    thetas = (low, 1e-3, 0.1, 1.0, 5.0, 100.0, 1e4, high)
    theta, x = grid(thetas, range(1, lk._FEW + 1))
    value, slope = lk._few_rising(theta.float(), x.float())
    j = torch.arange(1, lk._FEW, dtype=torch.float64) * (
        torch.arange(1, lk._FEW) < x[:, None]
    )
    exact = torch.log1p(j / theta[:, None]).sum(1)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-6)
    exact = (j / (theta[:, None] + j)).sum(1)
    torch.testing.assert_close(slope.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "theta, gate", [((N, G), (N, G)), ((G,), None), (None, (N, 1))]
)
def test_small_and_large_counts_meet(theta, gate):
    x = torch.arange(N * G).view(N, G) % (2 * lk._FEW)
    # Given as transposed, so that no row of it lies in one piece.
    batch, given = lk.Counts.of(x), inputs(theta, gate)
    turned = [
        t if t is None else t.mT.contiguous().mT if t.ndim == 2 else t for t in given
    ]
    value, slopes = value_and_gradients(lk.count_nll(batch, *turned), given)
    expected, wanted = value_and_gradients(plain(batch, *given), given)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)
    for a, b in zip(slopes, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one():
    batch, (log_mean, log_theta, gate) = counts(), inputs((G,), (N, G))
    lk.count_nll(batch, log_mean, log_theta.detach(), gate).sum().backward()
    assert log_theta.grad is None
    expected, wanted = inputs((G,), (N, G)), []
    plain(batch, *expected).sum().backward()
    wanted = [expected[0].grad, expected[2].grad]
    for a, b in zip((log_mean.grad, gate.grad), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_can_be_taken_twice_in_turn_but_not_of_itself():
    batch, given = counts(), inputs((N, G), (N, G))
    nll = lk.count_nll(batch, *given).square().sum()
    first = torch.autograd.grad(nll, given, retain_graph=True)
    second = torch.autograd.grad(nll, given, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second[0].sum().backward()


@pytest.mark.parametrize("theta, gate", [((N, G), (N, G)), ((G,), None), (None, ())])
def test_a_minibatch_of_zeros_is_as_likely_as_its_zeros(theta, gate):
    batch, given = lk.Counts.of(torch.zeros(N, G)), inputs(theta, gate, torch.float64)
    value, slopes = value_and_gradients(lk.count_nll(batch, *given), given)
    zero = lk.zero_probability(*given).log().expand(N, G)
    torch.testing.assert_close(value, -zero.sum(1).detach())
    assert all(slope.abs().sum() > 0 for slope in slopes)


def test_extremes_are_finite():
    x = torch.tensor([[0.0, 0, 0], [1, 30, 1000]]).repeat(4, 1)
    for mean, theta, gate in product(
        (-60.0, 0.0, 60.0), (-99.0, 99.0), (-99.0, 0.0, 99.0)
    ):
        given = [torch.full((8, 3), v, requires_grad=True) for v in (mean, theta, gate)]
        batch = lk.Counts.of(x)
        for parts in (given, given[:2], given[:1], [given[0], None, given[2]]):
            value, slopes = value_and_gradients(lk.count_nll(batch, *parts), parts)
            assert value.isfinite().all()
            assert all(slope.isfinite().all() for slope in slopes)


def test_outside_its_range_log_theta_has_no_gradient():
    batch, (log_mean, log_theta, gate) = counts(), inputs((N, G), (N, G))
    with torch.no_grad():
        log_theta[:, :3], log_theta[:, 3:5] = -40, 40
        gate[:, 5:7] = 200
    nll = lk.count_nll(batch, log_mean, log_theta, gate)
    inside = log_theta.clamp(*lk.LOG_THETA_RANGE), gate.clamp(-80, 80)
    torch.testing.assert_close(nll, lk.count_nll(batch, log_mean, *inside))
    nll.sum().backward()
    assert (log_theta.grad[:, :5] == 0).all() and (log_theta.grad[:, 5:] != 0).any()
    assert (gate.grad[:, 5:7] == 0).all() and (gate.grad[:, :5] != 0).any()


def test_autocast_stays_in_float32():
    batch, given = counts(), inputs((G,), (N, G))
    expected, wanted = value_and_gradients(lk.count_nll(batch, *given), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, slopes = value_and_gradients(lk.count_nll(batch, *given), given)
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip(slopes, wanted, strict=True))
    # A half-precision head gets a gradient of its own kind.
    half = given[0].detach().bfloat16().requires_grad_()
    nll = lk.count_nll(batch, half, *given[1:])
    nll.sum().backward()
    assert nll.dtype == torch.float32 and half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "log_mean, log_theta", [((N, 1), (G,)), ((N, G), (N,)), ((N, G), (1, N, G))]
)
def test_shapes_that_do_not_fit_are_refused(log_mean, log_theta):
    with pytest.raises(ValueError, match="does not fit the counts"):
        lk.count_nll(counts(), torch.zeros(log_mean), torch.zeros(log_theta))


# ------------------------------------------------------------------- minibatches


def test_counts_batch_is_the_rows_in_three_forms():
    dense = np.array([[0, 2, 0, 1], [0, 0, 0, 0], [5, 0, 0, 7]], np.float32)
    X = sparse.csr_matrix(dense)
    batch = lk.counts_batch(X, np.array([2, 1, 0, 2]))
    np.testing.assert_array_equal(batch.dense, dense[[2, 1, 0, 2]])
    assert batch.at.tolist() == [0, 3, 9, 11, 12, 15]
    assert batch.values.tolist() == [5, 7, 2, 1, 5, 7]
    for a, b in zip(batch, lk.Counts.of(batch.dense), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    batch.dense.zero_()
    batch.values.zero_()
    np.testing.assert_array_equal(X.toarray(), dense)
    np.testing.assert_array_equal(lk.counts_batch(X, slice(1, 3)).dense, dense[1:])
    whole = lk.counts_batch(X.astype(np.int32), slice(None))
    assert whole.values.dtype == torch.float32
    whole.values.zero_()
    lk.counts_batch(X, slice(None)).values.zero_()
    np.testing.assert_array_equal(X.toarray(), dense)


def test_zeros_that_are_spelled_out_do_no_harm():
    plainly = sparse.csr_matrix(np.array([[0, 3, 0], [0, 0, 0], [1, 0, 0]], np.float32))
    spelled = sparse.csr_matrix(
        (np.array([0, 3, 0, 1, 0], np.float32), [0, 1, 2, 0, 2], [0, 2, 3, 5]), (3, 3)
    )
    given = [torch.randn(3, 3), torch.randn(3), torch.randn(3, 3)]
    rows = np.array([2, 0, 1])
    a, b = (lk.counts_batch(X, rows) for X in (plainly, spelled))
    assert len(spelled.data) == 5 and len(b.at) == 2
    assert torch.equal(lk.count_nll(a, *given), lk.count_nll(b, *given))
