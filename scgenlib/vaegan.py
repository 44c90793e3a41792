"""The networks of scGACL and one training step of each kind.

A VAE whose prior is a mixture of Gaussians (VaDE) makes reconstructions; a
discriminator with three heads compares them with the cells: real or not, the same
cell or not, the same type or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from scgenlib.losses import masked_mse, mixture_kl, nt_xent, responsibilities, sup_con

__all__ = [
    "Decoder",
    "Discriminator",
    "Encoder",
    "MixturePrior",
    "contrastive_step",
    "discriminator_step",
    "elbo_step",
    "generator_step",
    "joint_step",
    "seen_by",
    "share_of_generated",
    "start_small",
    "update",
]


@torch.no_grad()
def start_small(module: nn.Module, sd: float = 0.02) -> None:
    """Give all linear layers the published start: weights N(0, sd^2), biases 0.

    Through four layers such weights let hardly any signal pass, so that the first
    hundreds of steps change little; torch's own start does not have this.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.weight.normal_(0.0, sd)
            part.bias.zero_()


def _body(sizes: Sequence[int], unit: nn.Module, normalise: bool) -> nn.Sequential:
    """Return linear layers, each with batch normalisation if asked, and a unit."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers.append(nn.Linear(n_in, n_out))
        if normalise:
            layers.append(nn.BatchNorm1d(n_out))
        layers.append(unit)
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Map a cell to a Gaussian over latent codes: q(z | x)."""

    def __init__(self, n_genes: int, hidden: Sequence[int], z_size: int) -> None:
        super().__init__()
        self.body = _body([n_genes, *hidden], nn.ReLU(), normalise=True)
        self.mean = nn.Linear(hidden[-1], z_size)
        self.log_variance = nn.Linear(hidden[-1], z_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map (n_cells, n_genes) to mean and log variance, (n_cells, z_size) each."""
        h = self.body(x)
        return self.mean(h), self.log_variance(h)

    def sample(self, x: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return a draw z beside mean and log variance."""
        mean, log_variance = self(x)
        noise = torch.randn(mean.shape, generator=rng, device=mean.device)
        return mean + (0.5 * log_variance).exp() * noise, mean, log_variance


class Decoder(nn.Module):
    """Map latent codes to expression, at least 0."""

    def __init__(self, z_size: int, hidden: Sequence[int], n_genes: int) -> None:
        super().__init__()
        self.body = _body([z_size, *hidden, n_genes], nn.ReLU(), normalise=False)

    def forward(self, z: Tensor) -> Tensor:
        """Map (n_cells, z_size) to (n_cells, n_genes)."""
        return self.body(z)

    @torch.no_grad()
    def start_at(self, expression: Tensor) -> None:
        """Start the last bias at this expression, (n_genes,), at least 0."""
        cast(nn.Linear, self.body[-2]).bias.copy_(expression)


class MixturePrior(nn.Module):
    """A mixture of Gaussians over latent codes: weights, centres and variances."""

    def __init__(self, n_components: int, z_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(n_components))
        self.centres = nn.Parameter(torch.zeros(n_components, z_size))
        self.log_variance = nn.Parameter(torch.zeros(n_components, z_size))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return log weights (they sum to 1), centres and log variances."""
        return self.logits.log_softmax(0), self.centres, self.log_variance

    def shares(self, z: Tensor) -> Tensor:
        """Return each component's share in each point, (n_cells, n_components)."""
        return responsibilities(z, *self.parts()).exp()


class Discriminator(nn.Module):
    """One trunk with three heads: real or not, and two projections for contrast."""

    def __init__(self, n_genes: int, hidden: Sequence[int], sizes: Sequence[int]):
        super().__init__()
        self.trunk = _body([n_genes, *hidden], nn.LeakyReLU(0.01), normalise=True)
        self.head = nn.Linear(hidden[-1], 1)
        self.cell_projection = nn.Linear(hidden[-1], sizes[0])
        self.type_projection = nn.Linear(hidden[-1], sizes[1])

    def is_real(self, x: Tensor) -> Tensor:
        """Return the logits of the first last layer alone, (n_cells, 1)."""
        return self.head(self.trunk(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (n_cells, 1) and two projections of (n_cells, n_genes)."""
        h = self.trunk(x)
        return self.head(h), self.cell_projection(h), self.type_projection(h)


# --------------------------------------------------------------- training steps


def _soft_bce(logits: Tensor, low: float, high: float, rng: torch.Generator) -> Tensor:
    """Cross-entropy against targets drawn anew for each cell from low to high."""
    noise = torch.rand(logits.shape, generator=rng, device=logits.device)
    target = low + (high - low) * noise
    return F.binary_cross_entropy_with_logits(logits, target)


def update(loss: Tensor, optimisers: Iterable[Optimizer]) -> None:
    """Make one update of the weights that these optimisers hold."""
    optimisers = list(optimisers)
    for optimiser in optimisers:
        optimiser.zero_grad()
    loss.backward()
    for optimiser in optimisers:
        optimiser.step()


def elbo_step(
    nets: nn.ModuleDict,
    optimisers: dict[str, Optimizer],
    x: Tensor,
    rec_weight: float,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """One update of encoder, decoder and mixture: reconstruction and divergence.

    Parameters
    ----------
    nets
        "encoder", "decoder" and "prior".
    optimisers
        One for each of them.
    x
        Cells, shape (n_cells, n_genes).
    rec_weight
        Weight of `masked_mse`; the number of genes makes it a sum over genes.
    rng
        Source of the noise.
    """
    z, mean, log_variance = cast(Encoder, nets["encoder"]).sample(x, rng)
    rec = masked_mse(x, nets["decoder"](z))
    kl = mixture_kl(mean, log_variance, z, *cast(MixturePrior, nets["prior"]).parts())
    names = ("encoder", "decoder", "prior")
    update(rec_weight * rec + kl, [optimisers[name] for name in names])
    return {"rec": rec.detach(), "kl": kl.detach()}


def seen_by(kind: str, x: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Return what D takes for real and for made; see `discriminator_input`."""
    if kind == "masked":
        return x, made * (x != 0)
    if kind == "completed":
        return torch.where(x != 0, x, made.detach()), made
    return x, made


def generator_step(
    nets: nn.ModuleDict,
    optimisers: dict[str, Optimizer],
    x: Tensor,
    rng: torch.Generator,
    kind: str = "reconstruction",
    weight: float = 1.0,
) -> Tensor:
    """One update of encoder and decoder: D shall take the reconstruction for real."""
    critic = cast(Discriminator, nets["discriminator"])
    # D passes the gradient on and learns nothing, so its weights need none.
    critic.requires_grad_(False)
    z, _, _ = cast(Encoder, nets["encoder"]).sample(x, rng)
    _, made = seen_by(kind, x, nets["decoder"](z))
    loss = _soft_bce(critic.is_real(made), 0.9, 1.0, rng)
    update(weight * loss, [optimisers["encoder"], optimisers["decoder"]])
    critic.requires_grad_(True)
    return loss.detach()


def discriminator_step(
    nets: nn.ModuleDict,
    optimisers: dict[str, Optimizer],
    real: Tensor,
    made: Tensor,
    rng: torch.Generator,
    weight: float = 1.0,
) -> Tensor:
    """One update of D: tell cells from their reconstructions."""
    critic = cast(Discriminator, nets["discriminator"])
    loss = _soft_bce(critic.is_real(real), 0.9, 1.0, rng)
    loss = loss + _soft_bce(critic.is_real(made.detach()), 0.0, 0.1, rng)
    update(weight * loss, [optimisers["discriminator"]])
    return loss.detach()


def share_of_generated(epoch: int, n_epochs: int) -> float:
    """Return the share of reconstructions in the type-level contrast at an epoch.

    It starts at 0.1 and grows by 0.9 / (n_epochs / 10) after epochs 0, 10, 20, ...,
    up to 1.
    """
    grown = 0.1 + 9 * math.ceil(epoch / 10) / max(n_epochs, 1)
    return min(1.0, grown)


def contrastive_step(
    nets: nn.ModuleDict,
    optimisers: dict[str, Optimizer],
    real: Tensor,
    made: Tensor,
    codes: Tensor,
    share: float,
    rng: torch.Generator,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
    temperature: float = 0.9,
) -> dict[str, Tensor]:
    """One update of encoder, decoder and D by both contrasts.

    Parameters
    ----------
    nets, optimisers, rng
        As in `elbo_step`, with "discriminator".
    real, made
        Cells and their reconstructions, which carry the graph; (n_cells, n_genes).
    codes
        Label of each cell, (n_cells,).
    share
        Share of reconstructions that join the type-level contrast.
    weights
        Of the cell-level and the type-level loss.
    temperature
        Of both.
    """
    _, cell_real, type_real = nets["discriminator"](real)
    _, cell_made, type_made = nets["discriminator"](made)
    n = int(share * len(codes) + 1e-9)  # 1.0 must not become 31 of 32
    picked = torch.randperm(len(codes), generator=rng, device=codes.device)[:n]
    same_cell = nt_xent(cell_real, cell_made, temperature)
    same_type = sup_con(
        torch.cat([type_real, type_made[picked]]),
        torch.cat([codes, codes[picked]]),
        temperature,
    )
    names = ("encoder", "decoder", "discriminator")
    loss = weights[0] * same_cell + weights[1] * same_type
    update(loss, [optimisers[name] for name in names])
    return {"nt_xent": same_cell.detach(), "sup_con": same_type.detach()}


def joint_step(
    nets: nn.ModuleDict,
    optimisers: dict[str, Optimizer],
    x: Tensor,
    codes: Tensor,
    share: float,
    rec_weight: float,
    rng: torch.Generator,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    temperature: float = 0.9,
    kind: str = "reconstruction",
) -> dict[str, Tensor]:
    """One step of phase 2: four updates in the published order.

    Parameters
    ----------
    nets, optimisers, x, rec_weight, rng
        As in `elbo_step`, with "discriminator".
    codes, share, temperature
        As in `contrastive_step`.
    weights
        Of the adversarial losses, the cell-level and the type-level contrast. A loss
        of weight 0 is left out; with three zeros this is `elbo_step`.
    kind
        What D sees, see `seen_by`.
    """
    terms = elbo_step(nets, optimisers, x, rec_weight, rng)
    w_adv, w_cell, w_type = weights
    if w_adv:
        adv = generator_step(nets, optimisers, x, rng, kind, w_adv)
        terms["g_adv"] = adv
    if not (w_adv or w_cell or w_type):
        return terms
    # D's update changes neither encoder nor decoder: one pass serves what is left.
    with torch.set_grad_enabled(bool(w_cell or w_type)):
        z, _, _ = cast(Encoder, nets["encoder"]).sample(x, rng)
        real, made = seen_by(kind, x, nets["decoder"](z))
    if w_adv:
        loss = discriminator_step(nets, optimisers, real, made, rng, w_adv)
        terms["d_adv"] = loss
    if w_cell or w_type:
        options: Any = {"weights": weights[1:], "temperature": temperature}
        terms |= contrastive_step(
            nets, optimisers, real, made, codes, share, rng, **options
        )
    return terms
