"""The networks of REGINA and one training step of each kind.

A transformer auto-encoder maps a cell to a latent code and back; it reads the cell as
a few tokens, each a block of genes. In that latent space two transition blocks lead
from control cells to perturbed cells and back. What they are told about a perturbation
is a prompt: how the code of the very cell moves when the target gene is silenced in the
input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import Optimizer

from scgenlib.errors import DataError, message
from scgenlib.losses import centre_loss, least_squares_gan_losses
from scgenlib.nets import mlp

__all__ = [
    "MOVES",
    "Batch",
    "Decoder",
    "Encoder",
    "LearnedPrompts",
    "StateClassifier",
    "Transition",
    "autoencoder_step",
    "classifier_step",
    "cosine",
    "critic",
    "critic_step",
    "dose_matrix",
    "evaluating",
    "freeze",
    "mean_changes",
    "move",
    "noise_sd",
    "prompt",
    "silenced",
    "to_genes",
    "to_tokens",
    "token_width",
    "transition_step",
    "watched",
]


_In = ParamSpec("_In")
_Out = TypeVar("_Out")

#: What moves a code.
MOVES = ("transition", "prompt")


# ----------------------------------------------------------------------- tokens


def token_width(n_genes: int, n_tokens: int) -> int:
    """Return the genes of one token, the last token padded if they do not divide."""
    return -(-n_genes // n_tokens)


def to_tokens(x: Tensor, n_tokens: int) -> Tensor:
    """Cut cells into tokens of consecutive genes: (n, g) to (n, n_tokens, width).

    Zeros fill the last tokens where the genes do not divide; see `to_genes`.
    """
    width = token_width(x.shape[1], n_tokens)
    return F.pad(x, (0, n_tokens * width - x.shape[1])).view(len(x), n_tokens, width)


def to_genes(tokens: Tensor, n_genes: int) -> Tensor:
    """Undo `to_tokens`: drop the padding, also where there is none."""
    return tokens.flatten(1)[:, :n_genes]


class _Dropout(nn.Module):
    """Dropout that draws 16 random bits for each value, four values from one number.

    torch draws a number for each value, which takes as long as a quarter of all
    products of a small transformer.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.least = p, round(p * 2**16) - 2**15

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        n = x.numel()
        bits = torch.empty(-(-n // 4), dtype=torch.int64, device=x.device)
        kept = bits.random_(-(2**63), None).view(torch.int16)[:n].view(x.shape)
        return x * (kept >= self.least) * (1.0 / (1.0 - self.p))


class _Body(nn.Module):
    """What encoder and decoder share: the transformer and what is added to tokens."""

    def __init__(
        self,
        n_genes: int,
        n_tokens: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        dropout: float,
        positions: bool,
        n_batches: int,
    ) -> None:
        super().__init__()
        self.n_genes, self.shape = n_genes, (n_tokens, d_model)
        # Pre-norm layers without a last norm; the hidden layer is four times as wide.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                d_model,
                n_heads,
                4 * d_model,
                dropout,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(n_layers)
        )
        for layer in self.layers:
            for name in ("dropout", "dropout1", "dropout2"):
                setattr(layer, name, _Dropout(dropout))
        self.positions = nn.Parameter(torch.empty(self.shape)) if positions else None
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)
        self.batches = nn.Embedding(n_batches, d_model) if n_batches else None
        if self.batches is not None:
            nn.init.zeros_(self.batches.weight)

    def transform(self, h: Tensor, batch: Tensor | None) -> Tensor:
        """Pass tokens (n_cells, n_tokens, d_model) through the layers."""
        if self.positions is not None:
            h = h + self.positions
        if self.batches is not None:
            h = h + self.batches(batch)[:, None]
        for layer in self.layers:
            h = layer(h)
        return h


class Encoder(_Body):
    """Map a cell to its latent code.

    Parameters
    ----------
    n_genes, n_tokens, d_model, n_layers, n_heads
        Sizes of the input and of the transformer.
    z_dim
        Length of the code. A layer normalisation comes last: a fresh encoder's codes
        have mean 0 and variance 1, and so the length of sqrt(z_dim).
    dropout
        Share of values dropped in training.
    positions
        Whether tokens are told their place. Without, order counts after the
        transformer only, in the last linear layer.
    n_batches
        Batches to tell apart, with one learned vector each; 0: none.
    """

    def __init__(
        self,
        n_genes: int,
        n_tokens: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        z_dim: int,
        dropout: float = 0.1,
        positions: bool = False,
        n_batches: int = 0,
    ) -> None:
        super().__init__(
            n_genes, n_tokens, d_model, n_layers, n_heads, dropout, positions, n_batches
        )
        self.inward = nn.Linear(token_width(n_genes, n_tokens), d_model)
        self.outward = nn.Linear(n_tokens * d_model, z_dim)
        self.norm = nn.LayerNorm(z_dim)

    def forward(self, x: Tensor, batch: Tensor | None = None) -> Tensor:
        """Map (n_cells, n_genes) to codes (n_cells, z_dim)."""
        h = self.transform(self.inward(to_tokens(x, self.shape[0])), batch)
        return self.norm(self.outward(h.flatten(1)))


class Decoder(_Body):
    """Map a latent code to expression; see `Encoder`. Values may be below 0."""

    def __init__(
        self,
        n_genes: int,
        n_tokens: int,
        d_model: int,
        n_layers: int,
        n_heads: int,
        z_dim: int,
        dropout: float = 0.1,
        positions: bool = False,
        n_batches: int = 0,
    ) -> None:
        super().__init__(
            n_genes, n_tokens, d_model, n_layers, n_heads, dropout, positions, n_batches
        )
        self.inward = nn.Linear(z_dim, n_tokens * d_model)
        self.outward = nn.Linear(d_model, token_width(n_genes, n_tokens))

    def forward(self, z: Tensor, batch: Tensor | None = None) -> Tensor:
        """Map codes (n_cells, z_dim) to (n_cells, n_genes)."""
        h = self.transform(self.inward(z).view(len(z), *self.shape), batch)
        return to_genes(self.outward(h), self.n_genes)


class StateClassifier(nn.Module):
    """Read the state of a cell from its code; both linear layers are spectral-normed.

    Parameters
    ----------
    z_dim, width, n_states
        Sizes; at least two states.
    """

    def __init__(self, z_dim: int, width: int, n_states: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            spectral_norm(nn.Linear(z_dim, width)),
            nn.BatchNorm1d(width),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.2),
            spectral_norm(nn.Linear(width, n_states)),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Map codes (n_cells, z_dim) to logits (n_cells, n_states)."""
        return self.net(z)


class _Residual(nn.Module):
    """a + two normalised linear layers of a, then a leaky unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),
            nn.LayerNorm(width),
        )

    def forward(self, a: Tensor) -> Tensor:
        return F.leaky_relu(a + self.inner(a), 0.2)


class Transition(nn.Module):
    """Say by how much a code moves: T(z, q) = q + h(z, q).

    The last layer of h starts at zero, so a fresh block moves every code by its prompt.

    Parameters
    ----------
    z_dim, width
        Length of the code and width of the layers.
    skip
        Whether the prompt itself is part of the move. Without it a fresh block leaves
        every code where it is.
    """

    def __init__(self, z_dim: int, width: int, skip: bool = True) -> None:
        super().__init__()
        self.skip = skip
        self.code = nn.Linear(z_dim, width)
        self.prompt = nn.Linear(z_dim, width)
        self.blocks = nn.Sequential(_Residual(width), _Residual(width))
        self.outward = nn.Linear(width, z_dim)
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self, z: Tensor, q: Tensor) -> Tensor:
        """Map codes and prompts, both (n_cells, z_dim), to moves of that shape."""
        h = F.leaky_relu(self.code(z), 0.2) + F.leaky_relu(self.prompt(q), 0.2)
        move = self.outward(self.blocks(h))
        return q + move if self.skip else move


class LearnedPrompts(nn.Module):
    """A prompt for each target that is not measured, learned from its cells."""

    def __init__(self, n_targets: int, z_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_targets, z_dim))

    def forward(self, doses: Tensor) -> Tensor:
        """Map doses (n_cells, n_targets) to prompts (n_cells, z_dim)."""
        return doses @ self.weight


def critic(z_dim: int, hidden: Iterable[int] = (512, 256)) -> nn.Sequential:
    """Return D(z, q): a code and what conditions it, joined, to one score."""
    return mlp([2 * z_dim, *hidden, 1], lambda: nn.LeakyReLU(0.2))


def move(transition: nn.Module, z: Tensor, q: Tensor) -> Tensor:
    """Return where a transition leads: z + T(z, q)."""
    return z + transition(z, q)


# ---------------------------------------------------------------------- prompts


def dose_matrix(targets: Tensor, n_cells: int, n_genes: int) -> Tensor:
    """Return the dose of each gene in each cell, (n_cells, n_genes).

    Parameters
    ----------
    targets
        Whole numbers of shape (n_cells,): the one target gene of each cell, dose 1.
        Or doses of shape (n_cells, n_genes), floating point, 0 where a gene is not a
        target.

    Raises
    ------
    DataError
        Another shape, an index that is no gene, or whole numbers in two dimensions: a
        table of indices would be taken for doses.
    """
    whole = not targets.is_floating_point() and targets.dtype != torch.bool
    if whole and targets.shape == (n_cells,):
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < n_genes:
            raise DataError(
                message(
                    "There is no gene of this index",
                    found=f"{int(targets.min())} to {int(targets.max())}",
                    allowed=f"0 to {n_genes - 1}",
                )
            )
        return F.one_hot(targets.long(), n_genes).float()
    if not whole and targets.shape == (n_cells, n_genes):
        return targets.float()
    raise DataError(
        message(
            "Targets are neither one index per cell nor a table of doses",
            found=f"{targets.dtype} of shape {tuple(targets.shape)}",
            allowed=f"whole numbers ({n_cells},) or floats ({n_cells}, {n_genes})",
            do="Put the doses of several genes into a float table, 0 elsewhere.",
        )
    )


def silenced(x: Tensor, doses: Tensor, value: float = -1.0) -> Tensor:
    """Return cells with their target genes overwritten by dose times a value.

    .. math:: \\tilde x_g = x_g 1[d_g = 0] + d_g v
    """
    return torch.where(doses != 0, doses * value, x)


@torch.no_grad()
def prompt(
    encoder: nn.Module,
    x: Tensor,
    targets: Tensor,
    value: float = -1.0,
    batch: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """Return E(silenced x) - E(x): which way the code goes when targets are silenced.

    Parameters
    ----------
    encoder
        In evaluation mode; it gets no gradient.
    x
        Cells, (n_cells, n_genes).
    targets
        See `dose_matrix`.
    value
        What stands in place of a target's expression, for a dose of 1.
    z
        E(x) if it is known.

    Returns
    -------
    torch.Tensor
        (n_cells, z_dim); zero for a cell without a target.
    """
    doses = dose_matrix(targets, *x.shape)
    # Any map of cells to codes will do where there are no batches.
    told = () if batch is None else (batch,)
    z = encoder(x, *told) if z is None else z
    return encoder(silenced(x, doses, value), *told) - z


# --------------------------------------------------------------- training steps


@dataclass
class Batch:
    """Perturbed cells and, row by row, a control cell drawn for each.

    control, perturbed: (n, g). state_*: codes of the states, (n,). batch_*: codes of
    the batches, (n,), or None. doses: (n, g). learned: (n, n_unmeasured), doses of the
    targets that are not measured. condition: doses of all targets, (n, n_targets).
    """

    control: Tensor
    perturbed: Tensor
    state_control: Tensor
    state_perturbed: Tensor
    doses: Tensor
    learned: Tensor
    condition: Tensor
    batch_control: Tensor | None = None
    batch_perturbed: Tensor | None = None


def _both(control: Tensor | None, perturbed: Tensor | None) -> Tensor | None:
    if control is None or perturbed is None:
        return None
    return torch.cat([control, perturbed])


def _step(loss: Tensor, optimiser: Optimizer, clip: float | None) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if clip is not None:
        weights = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(weights, clip)
    optimiser.step()


def autoencoder_step(
    nets: nn.ModuleDict,
    optimiser: Optimizer,
    cells: Batch,
    weights: Mapping[str, float],
    *,
    consistency: str = "latent",
    label_controls: bool = True,
    clip: float | None = 0.5,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One update of encoder, decoder and centres; the classifier passes gradients on.

    Parameters
    ----------
    nets
        "encoder", "decoder", "classifier" and "centres" (an embedding of the states).
    optimiser
        Of encoder, decoder and centres.
    weights
        "rec", "reg", "class", "cons" and "centre".
    consistency
        "latent": the code of a decoded cell shall be the code it came from; "class":
        its state shall be the same.
    label_controls
        Whether the states of control cells count too.
    clip
        Largest norm of the gradient.

    Returns
    -------
    terms, codes, states
        Loss terms; and what `classifier_step` learns from, without a gradient.
    """
    encoder, decoder, classifier = (
        nets[name] for name in ("encoder", "decoder", "classifier")
    )
    x = torch.cat([cells.control, cells.perturbed])
    batch = _both(cells.batch_control, cells.batch_perturbed)
    z = encoder(x, batch)
    made = decoder(z, batch)
    n = len(cells.control)
    # Both halves count as in a sum of their means.
    terms = {"rec": 2 * F.mse_loss(made, x), "reg": 2 * z.square().mean()}
    labelled, states = z[n:], cells.state_perturbed
    if label_controls:
        labelled, states = z, torch.cat([cells.state_control, states])
    classifier.requires_grad_(False)
    if weights["class"]:
        terms["class"] = F.cross_entropy(classifier(labelled), states)
    if weights["cons"]:
        again = encoder(made[n:], cells.batch_perturbed)
        if consistency == "latent":
            terms["cons"] = F.mse_loss(again, z[n:].detach())
        else:
            shares = classifier(z[n:]).detach().softmax(1)
            terms["cons"] = F.cross_entropy(classifier(again), shares)
    if weights["centre"]:
        # Per dimension, so that a weight means the same for every length of the code.
        far = centre_loss(labelled, states, cast(nn.Embedding, nets["centres"]).weight)
        terms["centre"] = far / z.shape[1]
    loss = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
    _step(loss, optimiser, clip)
    classifier.requires_grad_(True)
    return {k: v.detach() for k, v in terms.items()}, labelled.detach(), states


def classifier_step(
    classifier: nn.Module, optimiser: Optimizer, codes: Tensor, states: Tensor
) -> Tensor:
    """One update of the classifier on codes that pass no gradient on."""
    loss = F.cross_entropy(classifier(codes.detach()), states)
    _step(loss, optimiser, None)
    return loss.detach()


def noise_sd(epoch: float, start: float, until: float, end: float) -> float:
    """Return the noise on the critic's input: `start`, from `until` falling to 0."""
    return start * min(1.0, max(0.0, (end - epoch) / (end - until)))


def transition_step(
    nets: nn.ModuleDict,
    optimiser: Optimizer,
    cells: Batch,
    weights: Mapping[str, float],
    *,
    value: float = -1.0,
    sign: float = 1.0,
    both: bool = False,
    on_index: bool = False,
    shift: bool = True,
    clip: float | None = 0.5,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One update of both transitions, of learned prompts and of the decoder.

    Parameters
    ----------
    nets
        "encoder" (frozen, in evaluation mode), "decoder", "fwd" and "bwd",
        "learned" (from doses of unmeasured targets to prompts), "critic", with `both`
        "critic_control", and with `on_index` "index" (from doses to a vector).
    optimiser
        Of what is to learn. Weights without a gradient stay as they are.
    cells
        Pairs of a perturbed cell and a control cell.
    weights
        "cycle", "adv", "pair", "anchor" and "identity". What needs no computation at
        a weight of 0 is not computed.
    value, sign
        The silenced value; and -1 for the prompt with the opposite sign.
    both
        Whether cells that were led back must pass for controls too.
    on_index
        Whether the critic is told which genes were perturbed, and not the prompt.
    shift
        Whether the pairs are compared with the control cell moved by the decoded
        difference, or with the decoded code alone.
    clip
        Largest norm of the gradient.

    Returns
    -------
    terms, seen
        Loss terms; and what `critic_step` learns from, without a gradient.
    """
    encoder, decoder = nets["encoder"], nets["decoder"]
    forward, backward = nets["fwd"], nets["bwd"]
    n = len(cells.control)
    with torch.no_grad():
        batch = _both(cells.batch_control, cells.batch_perturbed)
        fake = silenced(cells.control, cells.doses, value)
        x = torch.cat([cells.control, cells.perturbed, fake])
        if batch is not None:
            batch = torch.cat([batch, batch[:n]])
        control, perturbed, at = encoder(x, batch).split(n)
        q = sign * (at - control)
    q = q + nets["learned"](cells.learned)
    made = move(forward, control, q)
    led_back = move(backward, perturbed, q)
    terms = {}
    if weights["cycle"]:
        terms["cycle"] = F.mse_loss(move(backward, made, q), control) + F.mse_loss(
            move(forward, led_back, q), perturbed
        )
    told = nets["index"](cells.condition) if on_index else q
    pairs = [("critic", made, perturbed), ("critic_control", led_back, control)]
    pairs = pairs[: 1 + both]
    if weights["adv"]:
        adv = []
        for name, generated, _ in pairs:
            nets[name].requires_grad_(False)
            score = nets[name](torch.cat([generated, told.detach()], 1))
            adv.append(least_squares_gan_losses(fake=score)[1])
            nets[name].requires_grad_(True)
        terms["adv"] = torch.stack(adv).sum()
    if weights["pair"] or weights["anchor"]:
        codes = [made, control] if shift or weights["anchor"] else [made]
        told_out = cells.batch_control
        if told_out is not None:
            told_out = told_out.repeat(len(codes))
        out = decoder(torch.cat(codes), told_out).split(n)
        guess = out[0]
        if shift:
            # What will be predicted: the cell itself, moved by the difference.
            guess = guess + (cells.control - out[1]).detach()
        terms["pair"] = F.mse_loss(guess, cells.perturbed)
        if weights["anchor"]:
            # Controls too, or the decoder itself would learn what all effects share.
            terms["anchor"] = F.mse_loss(out[1], cells.control)
    if weights["identity"]:
        terms["identity"] = F.mse_loss(
            move(forward, perturbed, q), perturbed
        ) + F.mse_loss(move(backward, control, q), control)
    if terms:
        total = [weights[name] * value for name, value in terms.items()]
        _step(torch.stack(total).sum(), optimiser, clip)
    seen = {"told": q.detach(), "condition": cells.condition}
    for name, generated, real in pairs:
        seen[name] = torch.stack([real, generated.detach()])
    return {k: v.detach() for k, v in terms.items()}, seen


def critic_step(
    nets: nn.ModuleDict,
    optimiser: Optimizer,
    seen: Mapping[str, Tensor],
    *,
    sd: float = 0.0,
    real_target: float = 0.9,
    on_index: bool = False,
    rng: torch.Generator | None = None,
) -> Tensor:
    """One update of the critics: real codes to `real_target`, generated ones to 0.

    Parameters
    ----------
    nets, on_index
        As in `transition_step`.
    seen
        What `transition_step` gave back.
    sd
        Spread of the noise that is added to all codes; see `noise_sd`.
    rng
        Source of that noise.
    """
    told = nets["index"](seen["condition"]) if on_index else seen["told"]
    losses = []
    for name in ("critic", "critic_control"):
        if name not in seen:
            continue
        codes = seen[name]
        if sd:
            noise = torch.randn(codes.shape, generator=rng, device=codes.device)
            codes = codes + sd * noise
        real, made = (nets[name](torch.cat([z, told], 1)) for z in codes)
        losses.append(least_squares_gan_losses(real, made, real_target=real_target)[0])
    loss = torch.stack(losses).sum()
    _step(loss, optimiser, None)
    return loss.detach()


def evaluating(call: Callable[_In, _Out]) -> Callable[_In, _Out]:
    """Make a method of a model put its networks into evaluation mode and back.

    Callbacks predict while training goes on. No gradients are kept.
    """

    @functools.wraps(call)
    def inside(*args: _In.args, **named: _In.kwargs) -> _Out:
        # A model that was never fitted has none; the method says so.
        nets: Iterable[Any] = getattr(args[0], "modules_", {}).values()
        was = [net.training for net in nets]
        for net in nets:
            net.eval()
        try:
            with torch.no_grad():
                return call(*args, **named)
        finally:
            for net, training in zip(nets, was, strict=True):
                net.train(training)

    return inside


@torch.no_grad()
def watched(
    nets: nn.ModuleDict, x: Tensor, batch: Tensor | None = None
) -> dict[str, float]:
    """Return how well cells are decoded, and whether their states stay.

    Parameters
    ----------
    nets
        "encoder", "decoder" and "classifier", in training mode; they go back to it.
    x, batch
        Held-out cells, (n_cells, n_genes), and the codes of their batches.

    Returns
    -------
    dict of float
        "valid_rec", the mean squared error; "valid_inconsistency", the divergence of
        the states of decoded cells from those of the cells.
    """
    nets.eval()
    z = nets["encoder"](x, batch)
    made = nets["decoder"](z, batch)
    shares = nets["classifier"](z).softmax(1)
    again = nets["classifier"](nets["encoder"](made, batch)).log_softmax(1)
    nets.train()
    apart = F.kl_div(again, shares, reduction="batchmean")
    return {
        "valid_rec": float((made - x).square().mean()),
        "valid_inconsistency": float(apart),
    }


@torch.no_grad()
def mean_changes(
    nets: Mapping[str, nn.Module], z: Tensor, batch: Tensor | None, prompts: Any
) -> tuple[Tensor, Tensor]:
    """Return the mean over cells of what is decoded, and by how much moves change it.

    Parameters
    ----------
    nets
        "decoder" and "fwd", in evaluation mode.
    z, batch
        Codes of cells, (n_cells, z_dim), and the codes of their batches.
    prompts
        Those of one condition after another, (n_cells, z_dim) each.

    Returns
    -------
    start : torch.Tensor
        (n_genes,).
    changes : torch.Tensor
        (2, n_conditions, n_genes), in the order of `MOVES`.
    """
    start = nets["decoder"](z, batch).mean(0)
    rows = []
    for q in prompts:
        ends = (move(nets["fwd"], z, q), z + q)
        own = [nets["decoder"](after, batch).mean(0) - start for after in ends]
        rows.append(torch.stack(own))
    return start, torch.stack(rows, dim=1)


def cosine(epoch: int, n_epochs: int, start: float, end: float) -> float:
    """Return a learning rate that falls from `start` to `end` along half a cosine."""
    share = 0.5 * (1.0 + math.cos(math.pi * min(epoch, n_epochs) / n_epochs))
    return end + (start - end) * share


def freeze(*modules: nn.Module) -> None:
    """Put networks into evaluation mode and ask no gradients of them."""
    for module in modules:
        module.eval().requires_grad_(False)
