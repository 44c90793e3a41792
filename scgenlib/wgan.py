"""The two players of scGAN and cscGAN, and one training step of each.

Generator and critic; the critic's step in a readable form (autograd) and in a fast
one (its gradient by hand, with the same numbers); the generator's step; the falling
learning rate. The layers stand in `scgenlib.nets`, the estimators in `scgenlib.cscgan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from scgenlib.losses import gradient_penalty, wasserstein_critic_loss
from scgenlib.nets import (
    ClassHead,
    ConditionalBatchNorm,
    ConditionalLayerNorm,
    LibrarySizeNorm,
)

__all__ = [
    "Critic",
    "Generator",
    "critic_gradient",
    "critic_loss",
    "critic_step",
    "generator_step",
    "learning_rate",
]


# -------------------------------------------------------------------- the networks


class Generator(nn.Module):
    """Map noise and class to a cell that has exactly the library size asked for.

    Hidden layers: linear without bias, normalisation whose scale and shift belong
    to the class, ReLU. Last layer: linear with bias, ReLU, library-size
    normalisation.

    Parameters
    ----------
    n_genes
        Width of the output.
    n_classes
        Classes of each condition; ``(1,)`` for no condition.
    latent_dim
        Length of z.
    layers
        Hidden widths.
    cond_type
        ``"batchnorm"``, ``"layernorm"``, or ``"none"`` for batch normalisation
        that all classes share.
    output_lsn
        Total of a generated cell; None leaves the layer out.
    log1p
        Whether the output is log(1 + y), for a critic that sees logarithms.
    bn_momentum
        Share of a new batch in the running statistics.
    """

    def __init__(
        self,
        n_genes: int,
        n_classes: Sequence[int] = (1,),
        latent_dim: int = 128,
        layers: Sequence[int] = (256, 512, 1024),
        *,
        cond_type: str = "batchnorm",
        output_lsn: float | None = 2e4,
        log1p: bool = False,
        bn_momentum: float = 1e-3,
    ) -> None:
        super().__init__()
        widths = [latent_dim, *layers]
        self.is_conditional = cond_type != "none"
        tables = tuple(n_classes) if self.is_conditional else (1,)
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairs)
        self.norms = nn.ModuleList(
            ConditionalLayerNorm(width, tables)
            if cond_type == "layernorm"
            else ConditionalBatchNorm(width, tables, bn_momentum)
            for width in layers
        )
        self.output = nn.Linear(widths[-1], n_genes)
        self.size_norm = None if output_lsn is None else LibrarySizeNorm(output_lsn)
        self.log1p = log1p
        for linear in self.hidden:
            nn.init.xavier_uniform_(cast(nn.Linear, linear).weight)
        _truncated_normal(self.output)

    def forward(self, z: Tensor, codes: Tensor) -> Tensor:
        """Map z (n, latent_dim) and codes (n, n_conditions) to (n, n_genes)."""
        if not self.is_conditional:
            codes = torch.zeros_like(codes[:, :1])
        for linear, norm in zip(self.hidden, self.norms, strict=True):
            z = torch.relu(norm(linear(z), codes))
        x = torch.relu(self.output(z))
        if self.size_norm is not None:
            x = self.size_norm(x)
        return torch.log1p(x) if self.log1p else x


class Critic(nn.Module):
    """Score a cell, high for real: linear layers with ReLU, then a `ClassHead`."""

    def __init__(
        self,
        n_genes: int,
        n_classes: Sequence[int] = (1,),
        layers: Sequence[int] = (1024, 512, 256),
        *,
        cond_type: str = "proj",
    ) -> None:
        super().__init__()
        widths = [n_genes, *layers]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.trunk = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.head = ClassHead(widths[-1], n_classes, cond_type)
        for linear in self.layers():
            _truncated_normal(linear)

    def layers(self) -> list[nn.Linear]:
        """Return the linear layers below the head, the first one first."""
        return [cast(nn.Linear, layer) for layer in self.trunk]

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Map cells (n, n_genes) and codes (n, n_conditions) to scores (n,)."""
        for linear in self.trunk:
            x = torch.relu(linear(x))
        vector, bias = self.head(codes)
        return (x * vector).sum(1) + bias


def _truncated_normal(linear: nn.Linear) -> None:
    """Start a layer as published: normal, cut at two sigmas; biases at zero."""
    sigma = (1.3 * 2 / ((linear.in_features + linear.out_features) / 2)) ** 0.5
    nn.init.trunc_normal_(linear.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    nn.init.zeros_(linear.bias)


# ---------------------------------------------------------------- one critic step


def critic_loss(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    codes: Tensor,
    share: Tensor,
    lambd: float = 10.0,
    *,
    fake_codes: Tensor | None = None,
    partner: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the critic's loss and its parts: the readable form.

    .. math:: L_D = E[D(\\tilde x)] - E[D(x)]
        + \\lambda E[(\\lVert\\nabla_{\\hat x} D(\\hat x)\\rVert_2 - 1)^2]

    Parameters
    ----------
    critic
        Scores cells, given their classes.
    real, fake
        Cells, shape (n_cells, n_genes) each; `fake` carries no gradient.
    codes
        Classes of the real cells, (n_cells, n_conditions). The points between take
        them too.
    share
        Weight of the generated cell at each point between, (n_cells, 1).
    lambd
        Weight of the penalty.
    fake_codes
        Classes of `fake`, where they are not those of the real cells.
    partner
        Generated cells of the classes `codes`, for the points between; `fake` if
        its classes are these already.

    Returns
    -------
    dict
        'critic_loss', 'penalty' (not weighted) and 'wasserstein', the mean score of
        real cells minus that of generated ones.
    """
    # One pass over both: fewer and larger products.
    both = torch.cat([codes, codes if fake_codes is None else fake_codes])
    scores = critic(torch.cat([real, fake]), both)
    gap = -wasserstein_critic_loss(*scores.split([len(real), len(fake)]))
    ends = real, fake if partner is None else partner
    penalty = gradient_penalty(lambda x: critic(x, codes), *ends, share=share)
    loss = lambd * penalty - gap
    return {"critic_loss": loss, "penalty": penalty, "wasserstein": gap}


@torch.no_grad()
def critic_gradient(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    codes: Tensor,
    share: Tensor,
    lambd: float = 10.0,
    *,
    fake_codes: Tensor | None = None,
    partner: Tensor | None = None,
) -> dict[str, Tensor]:
    """Put the gradient of `critic_loss` into ``.grad``, worked out by hand.

    The critic is piecewise linear. Between the kinks of its ReLUs the slope at a
    point is a product of weights and masks, so the gradient of the penalty needs one
    pass back (the slope), one pass forward (how the penalty moves each layer) and
    one product a layer, with no second derivative. A point between a real and a
    generated cell never has to be formed: the first layer is linear, so its value
    there lies between its values at the two ends.

    Parameters and returned values are those of `critic_loss`.
    """
    n, layers = len(real), critic.layers()
    fake_codes = codes if fake_codes is None else fake_codes
    with torch.enable_grad():
        vector, bias = critic.head(torch.cat([codes, fake_codes, codes]))
    # Rows of every table from here on: real, generated, between.
    cells = real.new_empty(3 * n, real.shape[1])
    torch.cat([real, fake], out=cells[: 2 * n])
    value = cells.new_empty(3 * n, layers[0].out_features)
    first = layers[0](cells[: 2 * n])
    end = first[n:] if partner is None else layers[0](partner)
    value[: 2 * n] = first
    torch.lerp(first[:n], end, share, out=value[2 * n :])
    values = [value.relu_()]
    for layer in layers[1:]:
        values.append(torch.relu_(layer(values[-1])))
    scores = (values[-1] * vector).sum(1) + bias
    # Back: the loss's gradient for real and generated rows, the slope for the others.
    sign = torch.cat([cells.new_full((n, 1), s) for s in (-1 / n, 1 / n, 1.0)])
    back = [vector * sign * (values[-1] > 0)]
    for layer, value in zip(layers[:0:-1], values[-2::-1], strict=True):
        back.append((back[-1] @ layer.weight) * (value > 0))
    back.reverse()
    slope = torch.mm(back[0][2 * n :], layers[0].weight, out=cells[2 * n :])
    norm = slope.norm(dim=1, keepdim=True)
    penalty = ((norm - 1) ** 2).mean()
    # Forward: what the penalty asks of each layer. A slope of zero asks nothing.
    slope *= 2 * lambd / n * (norm - 1) / norm.clamp_min(1e-12)
    source = cells
    for layer, value, delta in zip(layers, values, back, strict=True):
        ask = (source[2 * n :] @ layer.weight.T) * (value[2 * n :] > 0)
        layer.weight.grad = delta.T @ source
        layer.bias.grad = delta[: 2 * n].sum(0)
        value[2 * n :] = ask
        source = value
    sign[2 * n :] = 1.0
    for parameter in critic.head.parameters():
        parameter.grad = None
    zero = torch.cat([sign[: 2 * n, 0], sign.new_zeros(n)])
    torch.autograd.backward([vector, bias], [source * sign, zero])
    gap = scores[:n].mean() - scores[n : 2 * n].mean()
    loss = lambd * penalty - gap
    return {"critic_loss": loss, "penalty": penalty, "wasserstein": gap}


def critic_step(
    critic: Critic,
    optimiser: torch.optim.Optimizer,
    real: Tensor,
    fake: Tensor,
    codes: Tensor,
    share: Tensor,
    lambd: float = 10.0,
    *,
    fake_codes: Tensor | None = None,
    partner: Tensor | None = None,
    hand_gradient: bool = True,
) -> dict[str, Tensor]:
    """Update the critic once; see `critic_loss` for parameters and what it returns."""
    optimiser.zero_grad()
    form = critic_gradient if hand_gradient else critic_loss
    more = {"fake_codes": fake_codes, "partner": partner}
    terms = form(critic, real, fake, codes, share, lambd, **more)
    if not hand_gradient:
        terms["critic_loss"].backward(inputs=list(critic.parameters()))
    optimiser.step()
    return {name: term.detach() for name, term in terms.items()}


def generator_step(
    generator: Generator,
    critic: Critic,
    optimiser: torch.optim.Optimizer,
    z: Tensor,
    codes: Tensor,
) -> Tensor:
    """Update the generator once and return its loss, minus the mean score.

    Parameters
    ----------
    z, codes
        Noise (n_cells, latent_dim) and classes (n_cells, n_conditions).
    """
    optimiser.zero_grad()
    loss = -critic(generator(z, codes), codes).mean()
    # The critic's own gradients are not computed.
    loss.backward(inputs=list(generator.parameters()))
    optimiser.step()
    return loss.detach()


def learning_rate(
    step: int, max_steps: int, alpha_0: float = 1e-4, alpha_final: float = 1e-5
) -> float:
    """Return the rate after `step` generator updates: exponential decay."""
    return alpha_0 * (alpha_final / alpha_0) ** (step / max(1, max_steps))
