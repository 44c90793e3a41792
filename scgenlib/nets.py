"""Building blocks that more than one method uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "ClassHead",
    "ConditionalBatchNorm",
    "ConditionalLayerNorm",
    "LibrarySizeNorm",
    "count_parameters",
    "mlp",
]


def mlp(
    sizes: Sequence[int],
    hidden: Callable[[], nn.Module] = nn.ReLU,
    output: Callable[[], nn.Module] | None = None,
) -> nn.Sequential:
    """Return a chain of linear layers with an activation after each.

    Parameters
    ----------
    sizes
        Widths from the input to the output, at least two.
    hidden
        Makes the activation after every layer but the last.
    output
        Makes the activation after the last layer; None leaves it linear.

    Returns
    -------
    torch.nn.Sequential
        Maps (n_cells, sizes[0]) to (n_cells, sizes[-1]).

    Examples
    --------
    >>> mlp([3, 8, 2])(torch.zeros(5, 3)).shape
    torch.Size([5, 2])
    """
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers.append(nn.Linear(n_in, n_out))
        if i < len(sizes) - 2:
            layers.append(hidden())
    if output is not None:
        layers.append(output())
    return nn.Sequential(*layers)


def count_parameters(module: nn.Module) -> int:
    """Return the number of weights that training may change."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


class LibrarySizeNorm(nn.Module):
    """Scale every cell to one total: y = x L / (sum of x + eps).

    Parameters
    ----------
    total
        L, the total of every row that is not all zero.
    eps
        Keeps an all-zero row at zero.
    """

    def __init__(self, total: float, eps: float = 2.0**-52) -> None:
        super().__init__()
        self.total, self.eps = total, eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (n_cells, n_genes) to rows that sum to `total`."""
        return x * (self.total / (x.sum(dim=1, keepdim=True) + self.eps))


class _ClassTables(nn.Module):
    """Scale and shift that depend on the classes of a row.

    A cell may have several conditions (a type and a batch, say). Each condition has
    one table of scales and one of shifts; a row's values are the sums over its
    conditions, so that combinations never seen together can still be asked for. The
    first condition starts at scale 1, the others at 0.
    """

    def __init__(self, width: int, n_classes: Sequence[int]) -> None:
        super().__init__()
        tables = [
            torch.full((k, width), float(i == 0)) for i, k in enumerate(n_classes)
        ]
        self.gamma = nn.ParameterList(nn.Parameter(table) for table in tables)
        self.beta = nn.ParameterList(
            nn.Parameter(torch.zeros(k, width)) for k in n_classes
        )

    def scale_shift(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return gamma x + beta for codes of shape (n_cells, n_conditions)."""
        columns = codes.unbind(1)
        pairs = zip(self.gamma, columns, strict=True)
        gamma = torch.stack([table[code] for table, code in pairs]).sum(0)
        pairs = zip(self.beta, columns, strict=True)
        beta = torch.stack([table[code] for table, code in pairs]).sum(0)
        return torch.addcmul(beta, gamma, x)


class ConditionalBatchNorm(_ClassTables):
    """Batch normalisation whose scale and shift belong to the class of the row.

    Mean and variance are those of the whole mixed batch. The running variance takes
    the biased variance of a batch (divisor n), as TensorFlow does; torch's own layer
    takes the unbiased one.

    Parameters
    ----------
    width
        Number of features.
    n_classes
        Number of classes of each condition; ``(1,)`` is plain batch normalisation.
    momentum
        Share of a new batch in the running statistics.
    eps
        Added to the variance.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        width: int,
        n_classes: Sequence[int] = (1,),
        momentum: float = 1e-3,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(width, n_classes)
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Normalise (n_cells, width), given codes of (n_cells, n_conditions)."""
        mean, var = self.running_mean, self.running_var
        if self.training:
            var, mean = torch.var_mean(x, dim=0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
        return self.scale_shift((x - mean) * torch.rsqrt(var + self.eps), codes)


class ConditionalLayerNorm(_ClassTables):
    """Normalise each row over its own features; scale and shift belong to its class.

    No row depends on another, so that a cell does not change with its batch.
    """

    def __init__(
        self, width: int, n_classes: Sequence[int] = (1,), eps: float = 1e-5
    ) -> None:
        super().__init__(width, n_classes)
        self.eps = eps

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Normalise (n_cells, width), given codes of (n_cells, n_conditions)."""
        var, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        return self.scale_shift((x - mean) * torch.rsqrt(var + self.eps), codes)


class ClassHead(nn.Module):
    """The last layer of a critic that knows the class: one vector and bias a row.

    The score of a row with features phi and class c is ``vector(c) . phi + bias(c)``.

    Parameters
    ----------
    width
        Length of phi.
    n_classes
        Number of classes of each condition.
    kind
        ``"proj"``: a vector and a bias for each class (the published head).
        ``"miyato"``: one vector and bias for all, plus a vector for each class (the
        projection of Miyato and Koyama). ``"none"``: one for all.
    """

    def __init__(
        self, width: int, n_classes: Sequence[int] = (1,), kind: str = "proj"
    ) -> None:
        super().__init__()

        def table(k: int, first: bool) -> nn.Parameter:
            # Xavier's bound for a table of k heads, as published.
            bound = math.sqrt(6 / ((width + 1) * k)) if first else 0.0
            return nn.Parameter(torch.empty(k, width).uniform_(-bound, bound))

        sizes = [] if kind == "none" else list(n_classes)
        self.weight = nn.ParameterList(table(k, i == 0) for i, k in enumerate(sizes))
        self.bias = nn.ParameterList()
        if kind == "proj":
            self.bias.extend(nn.Parameter(torch.zeros(k)) for k in sizes)
        else:
            self.shared = table(1, True)
            self.shared_bias = nn.Parameter(torch.zeros(1))

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (n_cells, width) and biases (n_cells,)."""
        columns = codes.unbind(1)
        vectors = [w[c] for w, c in zip(self.weight, columns, strict=False)]
        biases = [b[c] for b, c in zip(self.bias, columns, strict=False)]
        if hasattr(self, "shared"):
            vectors.append(self.shared.expand(len(codes), -1))
            biases.append(self.shared_bias.expand(len(codes)))
        return torch.stack(vectors).sum(0), torch.stack(biases).sum(0)
