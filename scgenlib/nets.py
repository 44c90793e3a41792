"""Building blocks that more than one method uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

__all__ = ["count_parameters", "mlp"]


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
