"""Loss functions, one formula each. They hold no state and know no model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "centre_loss",
    "class_weights",
    "discriminator_loss",
    "gaussian_kl",
    "generator_loss",
    "gradient_penalty",
    "kl_to_standard_normal",
    "least_squares_gan_losses",
    "masked_mse",
    "mixture_kl",
    "nt_xent",
    "rbf_kernel",
    "rbf_mmd",
    "responsibilities",
    "sup_con",
    "wasserstein_critic_loss",
    "weighted_cross_entropy",
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
    return gaussian_kl(mean, log_variance).mean()


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, centre: Tensor | None = None
) -> Tensor:
    """KL divergence of each cell's Gaussian from N(centre, I), in nats.

    .. math:: \\frac12 \\sum_d \\left[(\\mu_d - c_d)^2 + v_d - 1 - \\ln v_d\\right]

    Parameters
    ----------
    mean, log_variance
        Shape (n_cells, n_latent) each.
    centre
        Shape (n_cells, n_latent); None is 0, the standard normal.

    Returns
    -------
    torch.Tensor
        Shape (n_cells,).
    """
    gap = mean if centre is None else mean - centre
    return 0.5 * (gap**2 + log_variance.exp() - 1 - log_variance).sum(dim=1)


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


def sup_con(
    features: Tensor,
    labels: Tensor,
    temperature: float = 0.9,
    base_temperature: float = 0.7,
    normalise: bool = True,
) -> Tensor:
    """Supervised contrastive loss: rows of one label must find each other.

    Khosla et al. (2020), the form with the sum outside the logarithm.

    Parameters
    ----------
    features
        Shape (n_rows, n_features).
    labels
        One label per row, shape (n_rows,).
    temperature
        Divides the similarities.
    base_temperature
        The loss is multiplied by temperature / base_temperature.
    normalise
        Whether rows are scaled to length 1 first; without it the similarities are
        plain products, as in the published code until April 2026.

    Returns
    -------
    torch.Tensor
        Mean over all rows, in nats times that factor. A row without another of its
        label adds 0 and still counts in the mean.
    """
    z = F.normalize(features, dim=1) if normalise else features
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = similarity.masked_fill(itself, float("-inf"))
    log_share = similarity - similarity.logsumexp(dim=1, keepdim=True)
    mates = (labels[:, None] == labels[None, :]) & ~itself
    total = log_share.masked_fill(~mates, 0.0).sum(1)
    per_row = -total / mates.sum(1).clamp_min(1)
    return temperature / base_temperature * per_row.mean()


def masked_mse(x: Tensor, reconstruction: Tensor) -> Tensor:
    """Squared error over the entries that were observed, per entry of the matrix.

    .. math:: \\frac{1}{n g} \\sum_{c,i} 1[x_{ci} \\ne 0] (x_{ci} - \\hat x_{ci})^2

    It divides by all entries, so it shrinks with the share of zeros.

    Parameters
    ----------
    x, reconstruction
        Shape (n_cells, n_genes).
    """
    return ((x - reconstruction) * (x != 0)).square().mean()


def responsibilities(
    z: Tensor, log_pi: Tensor, centres: Tensor, log_variance: Tensor
) -> Tensor:
    """Return the logarithm of each component's share in each point.

    Parameters
    ----------
    z
        Points, shape (n_cells, n_latent).
    log_pi
        Log weights of the components, shape (n_components,).
    centres, log_variance
        Diagonal Gaussians, shape (n_components, n_latent).

    Returns
    -------
    torch.Tensor
        Shape (n_cells, n_components); the exponentials of a row sum to 1, however
        far the point lies from every component.
    """
    return torch.log_softmax(
        log_pi + gaussian_log_density(z, centres, log_variance), dim=1
    )


def gaussian_log_density(z: Tensor, centres: Tensor, log_variance: Tensor) -> Tensor:
    """Return ln N(z; centre, diag variance) for each point and component."""
    gap = (z[:, None, :] - centres).square() * (-log_variance).exp()
    norm = log_variance.sum(1) + z.shape[1] * math.log(2 * math.pi)
    return -0.5 * (gap.sum(2) + norm)


def mixture_kl(
    mean: Tensor,
    log_variance: Tensor,
    z: Tensor,
    log_pi: Tensor,
    centres: Tensor,
    centre_log_variance: Tensor,
) -> Tensor:
    """KL divergence of VaDE: from q(z, k | x) to a mixture of Gaussians.

    With the shares g_k of the components at one draw z,

    .. math:: \\frac12 \\sum_k g_k \\sum_d \\left[\\ln s_{kd} + \\frac{v_d}{s_{kd}}
        + \\frac{(\\mu_d - m_{kd})^2}{s_{kd}}\\right]
        - \\sum_k g_k \\ln\\frac{\\pi_k}{g_k} - \\frac12 \\sum_d (1 + \\ln v_d)

    (Jiang et al., 2017, equation 9, less the reconstruction.)

    Parameters
    ----------
    mean, log_variance
        The encoder's Gaussian, shape (n_cells, n_latent).
    z
        A draw from it, same shape.
    log_pi, centres, centre_log_variance
        The mixture, see `responsibilities`.

    Returns
    -------
    torch.Tensor
        Mean over cells, in nats. Its expectation over z is at least 0; at one draw
        it may lie below.
    """
    log_share = responsibilities(z, log_pi, centres, centre_log_variance)
    share = log_share.exp()
    gap = (mean[:, None, :] - centres).square() + log_variance.exp()[:, None, :]
    spread = (gap * (-centre_log_variance).exp() + centre_log_variance).sum(2)
    per_cell = (share * (0.5 * spread - log_pi + log_share)).sum(1)
    return (per_cell - 0.5 * (1 + log_variance).sum(1)).mean()


def class_weights(codes: Tensor, n_classes: int) -> Tensor:
    """Return weights under which every class has the same share of a loss.

    .. math:: w_k = n / (m \\, n_k)

    for n labelled cells, m classes that have cells, and n_k cells of class k. A class
    without cells has weight 0.

    Parameters
    ----------
    codes
        Class of each cell, shape (n_cells,); -1 is a cell without a label.
    n_classes
        Number of classes.
    """
    sizes = torch.bincount(codes[codes >= 0], minlength=n_classes).float()
    present = (sizes > 0).sum()
    return torch.where(sizes > 0, sizes.sum() / (present * sizes), sizes)


def weighted_cross_entropy(
    logits: Tensor, codes: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of cross-entropies, and the sum of the weights.

    Their quotient is the loss. They are given apart so that a minibatch without any
    label has the loss 0 / 0, which the caller reads as 0, and so that several
    processes may add theirs before they divide.

    Parameters
    ----------
    logits
        Shape (n_cells, n_classes).
    codes
        Class of each cell, (n_cells,); a cell with -1 adds nothing to either sum.
    weights
        One weight per class, (n_classes,).
    """
    known = codes >= 0
    each = torch.where(known, weights[codes.clamp_min(0)], 0.0)
    loss = F.cross_entropy(logits, codes.clamp_min(0), reduction="none")
    return (each * loss).sum(), each.sum()


#: Widths of the kernels of `rbf_mmd`: the published list of nineteen.
BANDWIDTHS = tuple(10.0**k for k in range(-6, 1)) + (
    *(5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 35.0),
    *(1e2, 1e3, 1e4, 1e5, 1e6),
)


def rbf_kernel(
    x: Tensor, y: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS
) -> Tensor:
    """Return the sum of Gaussian kernels, `exp(-|a - b|^2 / 2s)`, of all pairs.

    Parameters
    ----------
    x, y
        Shape (n, n_latent) and (m, n_latent).
    bandwidths
        The values s, squared lengths.

    Returns
    -------
    torch.Tensor
        Shape (n, m).
    """
    gap = (x[:, None, :] - y[None, :, :]).square().sum(2)
    return torch.stack([torch.exp(-gap / (2 * s)) for s in bandwidths]).sum(0)


def rbf_mmd(x: Tensor, y: Tensor, bandwidths: tuple[float, ...] = BANDWIDTHS) -> Tensor:
    """Squared maximum mean discrepancy of two sets of points, summed over kernels.

    .. math:: E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)]

    with k of `rbf_kernel` (Gretton et al., 2012). Every pair counts, a point with
    itself too: it is 0 for equal sets, and never below 0.

    Parameters
    ----------
    x, y
        Shape (n, n_latent) and (m, n_latent).
    bandwidths
        See `rbf_kernel`.
    """
    pairs = ((x, x), (y, y), (x, y))
    own, other, cross = (rbf_kernel(a, b, bandwidths).mean() for a, b in pairs)
    return (own + other - 2 * cross).clamp_min(0.0)


def least_squares_gan_losses(
    real: Tensor | None = None,
    fake: Tensor | None = None,
    real_target: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Least-squares losses of a discriminator and of its generator.

    .. math:: L_D = \\frac12 (E[(D(x) - t)^2] + E[D(G(z))^2]), \\quad
              L_G = E[(D(G(z)) - 1)^2]

    Parameters
    ----------
    real, fake
        Scores without a sigmoid, any shape. One left out adds nothing.
    real_target
        The target t of real cells; below 1 it is one-sided label smoothing.

    Returns
    -------
    tuple of torch.Tensor
        L_D and L_G.
    """
    zero = torch.zeros(())
    of_real = zero if real is None else (real - real_target).square().mean()
    of_fake = zero if fake is None else fake.square().mean()
    fooled = zero if fake is None else (fake - 1.0).square().mean()
    return 0.5 * (of_real + of_fake), fooled


def centre_loss(z: Tensor, codes: Tensor, centres: Tensor) -> Tensor:
    """Squared distance of each code to the centre of its class.

    .. math:: \\frac{1}{n} \\sum_c ||z_c - \\mu_{y_c}||^2

    It pulls codes to their centre and centres to their codes; nothing in it pushes two
    centres apart. It is a sum over dimensions, so it grows with their number.

    Parameters
    ----------
    z, centres
        Shape (n_cells, d) and (n_classes, d).
    codes
        Class of each cell, shape (n_cells,).
    """
    return (z - centres[codes]).square().sum(1).mean()
