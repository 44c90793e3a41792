"""The networks of scAtlasVAE and the loss of one minibatch.

The encoder sees a cell's counts and nothing else. The decoder sees the latent code
and, for each level of batches, a vector of the cell's batch. One linear classifier
per vocabulary of cell types reads the latent code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scgenlib.likelihoods import Counts, count_nll, gaussian_log_prob
from scgenlib.losses import gaussian_kl, rbf_kernel, weighted_cross_entropy

__all__ = [
    "BatchTable",
    "CellBatch",
    "CountVAE",
    "Decoder",
    "Encoder",
    "LossWeights",
    "Noise",
    "batch_mmd",
]

#: Added to the encoder's variance, as published, so that no code becomes a point.
_LEAST_VARIANCE = 1e-4


class Noise(NamedTuple):
    """All that is random in one step: drawn before it, so that a step is a function.

    latent: standard normal, (n_cells, n_latent). keep: for each hidden layer of the
    encoder what dropout multiplies by, 0 or 1 / (1 - rate), (n_cells, width).
    """

    latent: Tensor
    keep: tuple[Tensor, ...] = ()

    @classmethod
    def draw(
        cls,
        n_cells: int,
        n_latent: int,
        hidden: Sequence[int],
        dropout: float,
        rng: torch.Generator,
    ) -> Noise:
        """Draw the noise of a step on the device of `rng`."""
        latent = torch.randn(n_cells, n_latent, generator=rng, device=rng.device)
        keep = []
        for width in hidden if dropout else ():
            drawn = torch.rand(n_cells, width, generator=rng, device=rng.device)
            keep.append((drawn >= dropout).float() / (1 - dropout))
        return cls(latent, tuple(keep))


@dataclass
class CellBatch:
    """Cells of one minibatch on the device.

    Parameters
    ----------
    counts
        Counts of shape (n_cells, n_genes); for the Gaussian likelihood log values.
    batches
        Batch of each cell at each level, (n_cells, n_levels). The number of known
        batches of a level stands for "another one".
    labels
        Cell type in each vocabulary, (n_cells, n_vocabularies); -1 is unlabelled.
    weight
        1 for a cell, 0 for a row that only fills a short minibatch; (n_cells,).
    latent
        Codes to stay close to, (n_cells, n_latent), a row of zeros for none.
    """

    counts: Counts
    batches: Tensor
    labels: Tensor
    weight: Tensor
    latent: Tensor | None = None


def _layers(n_in: int, n_out: int, norm: str, bias: bool = True) -> nn.Sequential:
    """Return a linear layer with what normalises its outputs, without the unit."""
    parts: list[nn.Module] = [nn.Linear(n_in, n_out, bias=bias)]
    if "batch" in norm:
        parts.append(nn.BatchNorm1d(n_out, momentum=0.01, eps=1e-3))
    if "layer" in norm:
        parts.append(nn.LayerNorm(n_out, elementwise_affine=False))
    return nn.Sequential(*parts)


class Encoder(nn.Module):
    """Map counts to a Gaussian over latent codes, q(z | x); no batch goes in.

    Parameters
    ----------
    n_genes, hidden, n_latent
        Widths from the input to the code.
    norm
        Which normalisations follow each layer: "batch", "layer", both or none.
    log, target_sum, with_total
        Whether counts enter as ln(1 + x), scaled to this total before (None: as they
        are), and whether the logarithm of the total is one more input.
    n_batches
        Batches of each level that enter too, as vectors added to the first layer.
        Empty, except to show what such an encoder does.
    """

    def __init__(
        self,
        n_genes: int,
        hidden: Sequence[int],
        n_latent: int,
        norm: str = "batch",
        *,
        log: bool = True,
        target_sum: float | None = None,
        with_total: bool = False,
        n_batches: Sequence[int] = (),
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.log, self.target_sum, self.with_total = log, target_sum, with_total
        sizes = [n_genes + with_total, *hidden]
        self.layers = nn.ModuleList(
            _layers(a, b, norm, bias)
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.batch = nn.ModuleList(BatchTable(n, hidden[0]) for n in n_batches)
        self.mean = nn.Linear(hidden[-1], n_latent)
        self.log_variance = nn.Linear(hidden[-1], n_latent)

    def inputs(self, x: Tensor) -> Tensor:
        """Return what enters the first layer for counts (n_cells, n_genes)."""
        total = x.sum(1, keepdim=True)
        out = x
        if self.target_sum is not None:
            out = out * (self.target_sum / total.clamp_min(1.0))
        if self.log:
            out = torch.log1p(out)
        return torch.cat([out, torch.log1p(total)], 1) if self.with_total else out

    def forward(
        self, x: Tensor, keep: Sequence[Tensor] = (), batches: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mean and log variance, (n_cells, n_latent) each.

        Parameters
        ----------
        x
            Counts, (n_cells, n_genes).
        keep
            What dropout multiplies each hidden layer by; empty: no dropout.
        batches
            Read only by an encoder that was made with batches.
        """
        h = self.inputs(x)
        for i, layer in enumerate(self.layers):
            linear, *rest = cast(nn.Sequential, layer)
            h = linear(h)
            if i == 0 and self.batch and batches is not None:
                columns = zip(self.batch, batches.unbind(1), strict=True)
                h = torch.stack([table(codes) for table, codes in columns]).sum(0) + h
            for part in rest:
                h = part(h)
            h = F.relu(h)
            h = h * keep[i] if keep else h
        variance = self.log_variance(h).exp() + _LEAST_VARIANCE
        return self.mean(h), variance.log()


class BatchTable(nn.Module):
    """One vector per batch; a batch that is not known has the mean of the first ones.

    Parameters
    ----------
    n_batches, width
        Shape of the table.
    n_first
        How many rows that mean is over; None: all. Rows that are added later leave
        the mean, and with it the unknown batch, as it was.
    """

    def __init__(self, n_batches: int, width: int, n_first: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_batches, width))
        self.n_first = n_batches if n_first is None else n_first

    def forward(self, codes: Tensor) -> Tensor:
        """Return the vectors of codes (n_cells,); n_batches is the unknown batch."""
        mean = self.weight[: self.n_first].mean(0, keepdim=True)
        return F.embedding(codes, torch.cat([self.weight, mean]))


class Decoder(nn.Module):
    """Map a latent code and the batch to the parameters of p(x | z, batch).

    Parameters
    ----------
    n_latent, width, n_genes
        Widths from the code to the genes.
    n_batches
        Number of batches at each level; empty for no batch at all.
    inject
        Whether the batch's vector enters; without it only "gene-batch" knows batches.
    batch_dim
        Length of a batch's vector beside z; None adds it to the hidden layer
        instead, which is what a one-hot code beside z amounts to.
    norm
        As in `Encoder`.
    likelihood
        "zinb", "nb", "poisson" or "gaussian".
    dispersion
        "gene", "gene-batch" (batches of the first level) or "gene-cell".
    gate
        "gene": one dropout logit per cell and gene; "cell": one per cell.
    """

    def __init__(
        self,
        n_latent: int,
        width: int,
        n_genes: int,
        n_batches: Sequence[int] = (),
        *,
        inject: bool = True,
        batch_dim: int | None = 8,
        norm: str = "batch",
        likelihood: str = "zinb",
        dispersion: str = "gene-cell",
        gate: str = "gene",
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.beside = batch_dim is not None
        self.likelihood = likelihood
        dim = width if batch_dim is None else batch_dim
        told = n_batches if inject else ()
        self.batch = nn.ModuleList(BatchTable(n, dim) for n in told)
        n_in = n_latent + (dim * len(told) if self.beside else 0)
        self.hidden = _layers(n_in, width, norm, bias)
        self.scale = nn.Linear(width, n_genes)
        self.rate: nn.Module | None = None
        if likelihood != "poisson":
            if dispersion == "gene-cell":
                self.rate = nn.Linear(width, n_genes)
            else:
                rows = n_batches[0] if dispersion == "gene-batch" and n_batches else 1
                self.rate = BatchTable(rows, n_genes)
                nn.init.zeros_(self.rate.weight)
        self.gate: nn.Linear | None = None
        if likelihood == "zinb":
            self.gate = nn.Linear(width, n_genes if gate == "gene" else 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(
        self, z: Tensor, batches: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return log shares of the genes, log dispersion and dropout logits.

        Parameters
        ----------
        z
            Shape (n_cells, n_latent).
        batches
            Shape (n_cells, n_levels).

        Returns
        -------
        tuple
            The shares of a cell sum to 1; times its total they are the mean. With the
            Gaussian likelihood: means of the log values and their log variances. The
            dispersion has shape (n_cells or 1, n_genes) and is None for Poisson; the
            logits have shape (n_cells, n_genes or 1) and are None but for "zinb".
        """
        pairs = zip(self.batch, batches.unbind(1), strict=False)
        vectors = [table(codes) for table, codes in pairs]
        linear, *rest = self.hidden
        if self.beside:
            h = linear(torch.cat([z, *vectors], 1))
        else:
            h = torch.stack([linear(z), *vectors]).sum(0)
        for part in rest:
            h = part(h)
        h = F.relu(h)
        share = self.scale(h)
        if self.likelihood != "gaussian":
            share = torch.log_softmax(share, 1)
        rate = self.rate
        if isinstance(rate, BatchTable):
            one = rate.weight.shape[0] == 1
            rate_of = rate.weight if one else rate(batches[:, 0])
        else:
            rate_of = None if rate is None else rate(h)
        return share, rate_of, None if self.gate is None else self.gate(h)


class LossWeights(NamedTuple):
    """What each term of the loss is multiplied by in one step."""

    kl: float = 1.0
    gate: float = 0.0
    labels: float = 1.0
    mmd: float = 0.0
    latent: float = 1.0


def batch_mmd(codes: Tensor, batches: Tensor) -> Tensor:
    """Sum `rbf_mmd` of the latent codes over all pairs of batches.

    Batches with fewer than three cells in the minibatch are left out, as published.

    Parameters
    ----------
    codes
        Latent means, (n_cells, n_latent).
    batches
        Batch of each cell, (n_cells,).
    """
    member = F.one_hot(batches).to(codes.dtype)
    member = member[:, member.sum(0) > 2]
    # Mean kernel of every pair of batches; the cells need one kernel for all pairs.
    inside = member / member.sum(0)
    mean = inside.T @ rbf_kernel(codes, codes) @ inside
    own = mean.diagonal()
    apart = own[:, None] + own[None, :] - 2 * mean
    return apart.triu(1).clamp_min(0.0).sum()


class CountVAE(nn.Module):
    """Encoder, decoder and label heads with the loss of a minibatch.

    Parameters
    ----------
    encoder, decoder
        The two networks.
    heads
        One linear classifier per vocabulary.
    class_weights
        For each head the weights of its types, (n_types,).
    mmd_level
        Level of batches whose codes `LossWeights.mmd` pulls together.
    pull
        How codes are held: "mse" or "normal" (see `ScAtlasVAEConfig`).
    detach_heads
        Whether the label loss stops at the codes and leaves the encoder alone.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        heads: nn.ModuleList,
        class_weights: Sequence[Tensor] = (),
        mmd_level: int | None = None,
        pull: str = "mse",
        detach_heads: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.heads = encoder, decoder, heads
        for i, weights in enumerate(class_weights):
            self.register_buffer(f"class_weights_{i}", weights, persistent=False)
        self.mmd_level, self.pull = mmd_level, pull
        self.detach_heads = detach_heads

    def reconstruction(
        self, batch: CellBatch, z: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return minus ln p(x | z, batch) per cell, and the dropout logits."""
        log_share, log_theta, gate = self.decoder(z, batch.batches)
        if self.decoder.likelihood == "gaussian":
            assert log_theta is not None
            each = gaussian_log_prob(batch.counts.dense, log_share, log_theta)
            return -each.sum(1), None
        # An empty cell counts as one of a single molecule: no logarithm of zero.
        total = batch.counts.dense.sum(1, keepdim=True).clamp_min(1.0)
        each = count_nll(batch.counts, log_share + total.log(), log_theta, gate)
        return each, gate

    def forward(
        self,
        batch: CellBatch,
        noise: Noise,
        weights: LossWeights,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return the loss of a minibatch and its terms.

        .. math:: L = \\frac1n \\sum_c \\left[-\\ln p(x_c \\mid z_c, b_c)
            + w_{KL} KL_c\\right] + w_y \\frac1A \\sum_a CE_a + \\dots

        Each mean is a sum over cells divided by a count of cells. With several
        processes the counts are those of all of them.

        Parameters
        ----------
        batch, noise, weights
            What the step works on; see the classes.
        add_up
            Adds a vector of counts over all processes; None for one process.

        Returns
        -------
        dict
            "loss", with a gradient; and "rec", "kl", "gate", "latent", "mmd" and
            "ce_0", "ce_1", ... as means, before their weights.
        """
        mean, log_variance = self.encoder(batch.counts.dense, noise.keep, batch.batches)
        z = mean + (0.5 * log_variance).exp() * noise.latent
        w = batch.weight
        each, gate = self.reconstruction(batch, z)
        sums = {
            "rec": (w * each).sum(),
            "kl": (w * gaussian_kl(mean, log_variance)).sum(),
        }
        counts = {"rec": w.sum(), "kl": w.sum()}
        if weights.gate and gate is not None:
            # A logit that all genes share counts once for each of them.
            genes = self.decoder.scale.out_features / gate.shape[1]
            sums["gate"] = genes * (w * torch.sigmoid(gate).sum(1)).sum()
            counts["gate"] = w.sum()
        if batch.latent is not None:
            held = w * (batch.latent != 0).any(1)
            far = (batch.latent - mean).square().sum(1)
            if self.pull == "normal":
                far = gaussian_kl(mean, log_variance, batch.latent)
            sums["latent"], counts["latent"] = (held * far).sum(), held.sum()
        for i, head in enumerate(self.heads):
            codes = torch.where(w > 0, batch.labels[:, i], -1)
            of_types = getattr(self, f"class_weights_{i}")
            sums[f"ce_{i}"], counts[f"ce_{i}"] = weighted_cross_entropy(
                head(z.detach() if self.detach_heads else z), codes, of_types
            )
        n = torch.stack(list(counts.values())).detach()
        if add_up is not None:
            n = add_up(n)
        # A mean over no cells is 0, and its sum is 0 too, with a gradient of zeros.
        terms = {k: sums[k] / n[i].clamp_min(1e-8) for i, k in enumerate(sums)}
        if self.mmd_level is not None and weights.mmd:
            real = w > 0
            codes = batch.batches[real, self.mmd_level]
            terms["mmd"] = batch_mmd(mean[real], codes)
        loss = terms["rec"] + weights.kl * terms["kl"]
        for name in ("gate", "latent", "mmd"):
            if name in terms:
                loss = loss + getattr(weights, name) * terms[name]
        if len(self.heads):
            first = len(n) - len(self.heads)
            active = (n[first:] > 0).sum().clamp_min(1)
            heads = [terms[f"ce_{i}"] for i in range(len(self.heads))]
            loss = loss + weights.labels * torch.stack(heads).sum() / active
        return {"loss": loss, **{k: v.detach() for k, v in terms.items()}}
