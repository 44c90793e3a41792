"""Loss functions, one formula each. They hold no state and know no model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "kl_to_standard_normal",
    "nt_xent",
    "wasserstein_critic_loss",
]


def discriminator_loss(
    real_logits: Tensor,
    fake_logits: Tensor,
    real_target: float = 1.0,
    fake_target: float = 0.0,
) -> Tensor:
    """Binary cross-entropy of a discriminator on real and generated cells.

    .. math:: L_D = H(t_r, \\sigma(D(x))) + H(t_f, \\sigma(D(G(z))))

    Parameters
    ----------
    real_logits, fake_logits
        Outputs before the sigmoid, any shape.
    real_target, fake_target
        Targets; 0.9 and 0.1 are two-sided label smoothing. Smoothed targets bound
        the loss from below: at 0.9 and 0.1 by twice the entropy of 0.9, 0.6502.

    Returns
    -------
    torch.Tensor
        The sum of the two means, in nats.
    """
    real = F.binary_cross_entropy_with_logits(
        real_logits, torch.full_like(real_logits, real_target)
    )
    fake = F.binary_cross_entropy_with_logits(
        fake_logits, torch.full_like(fake_logits, fake_target)
    )
    return real + fake


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Non-saturating generator loss: mean of minus log sigmoid of D(G(z)), in nats."""
    return F.softplus(-fake_logits).mean()


def wasserstein_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Critic loss of a Wasserstein GAN: mean score of fakes minus that of real."""
    return fake_scores.mean() - real_scores.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    generator: torch.Generator | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """Two-sided gradient penalty at random points between real and generated cells.

    .. math:: E[(\\lVert\\nabla_{\\hat x} D(\\hat x)\\rVert_2 - 1)^2]

    Parameters
    ----------
    critic
        Maps (n_cells, n_genes) to one score per cell.
    real, fake
        Shape (n_cells, n_genes) each.
    generator
        Source of the mixing weights, for a run that repeats.
    share
        The weight of `fake` for each cell, shape (n_cells, 1), in place of a draw
        from 0 to 1: 0 is the real cell, 1 the generated one.

    Returns
    -------
    torch.Tensor
        Scalar, still part of the graph.
    """
    if share is None:
        share = torch.rand(len(real), 1, generator=generator, device=real.device)
    between = (real + share * (fake - real)).detach().requires_grad_(True)
    scores = critic(between).sum()
    (slope,) = torch.autograd.grad(scores, between, create_graph=True)
    return ((slope.norm(dim=1) - 1) ** 2).mean()


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from a diagonal Gaussian to N(0, I), mean over cells, in nats.

    Parameters
    ----------
    mean, log_variance
        Shape (n_cells, n_latent) each.
    """
    per_unit = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    return per_unit.sum(dim=1).mean()


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Contrastive loss of two views: each cell must find its own other view.

    Parameters
    ----------
    a, b
        Two views of the same cells in the same order, shape (n_cells, n_features).
    temperature
        Divides the cosine similarities.

    Returns
    -------
    torch.Tensor
        Mean over the 2 n_cells anchors, in nats; each has one positive and
        2 n_cells - 2 negatives.
    """
    z = F.normalize(torch.cat([a, b]), dim=1)
    n = len(a)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    target = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, target)
