"""A graph that links similar cells, and a network that attends over its links."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from scgenlib.errors import ConfigError, DataError, message
from scgenlib.training import minibatch

__all__ = ["GAT", "attention_scores", "gat_input", "knn_graph"]

# Largest dense block that is made on the way to the graph.
_BLOCK_BYTES = 2**27


def knn_graph(X: Any, n_neighbors: int = 5) -> Tensor:
    """Link every cell to its nearest cells by Euclidean distance, itself included.

    Exact: distances are computed in blocks, and the few candidates of each cell are
    compared again in double precision. Ties go to the cell that comes first.

    Parameters
    ----------
    X
        Shape (n_cells, n_genes), sparse or dense.
    n_neighbors
        Links per cell. One of them is the cell itself, also among duplicates.

    Returns
    -------
    torch.Tensor
        int64, shape (2, n_cells * n_neighbors): cells above their neighbours, sorted
        by cell and then by neighbour. Links are not made mutual.

    Raises
    ------
    DataError
        There are fewer cells than `n_neighbors`.
    """
    X = sparse.csr_matrix(X) if sparse.issparse(X) else np.asarray(X)
    n_cells, n_genes = X.shape
    if n_neighbors > n_cells:
        raise DataError(
            message(
                "There are fewer cells than neighbours of a cell",
                found=f"{n_cells} cells, n_neighbors={n_neighbors}",
                do="Lower n_neighbors or give more cells.",
            )
        )
    rows = max(1, _BLOCK_BYTES // (4 * max(n_cells, n_genes)))
    blocks = [slice(i, min(i + rows, n_cells)) for i in range(0, n_cells, rows)]
    square = X.multiply(X) if sparse.issparse(X) else X * X
    norm = torch.from_numpy(np.asarray(square.sum(1), dtype=np.float32).ravel())
    found = [_nearest(X, norm, block, blocks, n_neighbors) for block in blocks]
    neighbours = torch.from_numpy(np.sort(np.concatenate(found), axis=1))
    cells = torch.arange(n_cells).repeat_interleave(n_neighbors)
    return torch.stack([cells, neighbours.reshape(-1)])


def _nearest(
    X: Any, norm: Tensor, block: slice, blocks: list[slice], k: int
) -> np.ndarray:
    """Return the k nearest cells of each cell in a block, shape (n_rows, k)."""
    here = minibatch(X, block)
    own = torch.arange(len(here))
    d = torch.empty(len(here), len(norm))
    for other in blocks:
        there = here if other == block else minibatch(X, other)
        torch.mm(here, there.T, out=d[:, other])
    # Squared distance less the cell's own norm, which does not change the order.
    d.mul_(-2).add_(norm)
    d[own, own + block.start] = -torch.inf
    kth = d.topk(k, largest=False).values[:, -1:]
    # Single precision errs by about 1e-6 of the norms: keep all within 1e-5.
    doubt = 1e-5 * (norm[block, None] + norm.max())
    row, column = (index.numpy() for index in (d <= kth + doubt).nonzero().T)
    exact = np.empty(len(row))
    pairs = max(1, _BLOCK_BYTES // (16 * X.shape[1]))
    for i in range(0, len(row), pairs):
        part = slice(i, i + pairs)
        there = minibatch(X, column[part]).double()
        exact[part] = (here[row[part]].double() - there).square_().sum(1).numpy()
    exact[column == row + block.start] = -1.0
    order = np.lexsort((column, exact, row))
    first = np.searchsorted(row, np.arange(len(here)))
    return column[order][first[:, None] + np.arange(k)]


# -------------------------------------------------------------------- the GAT


class GAT(nn.Module):
    """Two graph attention layers that learn to name the type of each cell.

    The first layer has several heads side by side, the second has one. Messages go
    from the upper to the lower row of the edge index: a cell listens to the cells
    that count it among their neighbours.

    Parameters
    ----------
    n_genes, n_types
        Width of the input and of the output.
    hidden, heads
        Units per head and number of heads in the first layer.
    negative_slope
        Of the leaky ReLU inside the attention.
    """

    def __init__(
        self,
        n_genes: int,
        n_types: int,
        hidden: int = 32,
        heads: int = 8,
        negative_slope: float = 0.2,
    ) -> None:
        # Imported here: torch_geometric takes seconds to load.
        from torch_geometric.nn import GATConv

        super().__init__()
        slope = negative_slope
        self.layer1 = GATConv(n_genes, hidden, heads=heads, negative_slope=slope)
        self.layer2 = GATConv(hidden * heads, n_types, heads=1, negative_slope=slope)

    def forward(
        self, x: Tensor, edge_index: Tensor, boost: Tensor | None = None
    ) -> Tensor:
        """Return one logit per cell and type, shape (n_cells, n_types).

        Parameters
        ----------
        x
            Expression, shape (n_cells, n_genes); dense or sparse CSR.
        edge_index
            From `knn_graph`.
        boost
            Shape (n_cells, 1): 1 + priority weight for rare cells, 1 for others.
        """
        return self.layer2(self._hidden(x, edge_index, boost), edge_index)

    def attention(
        self, x: Tensor, edge_index: Tensor, boost: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the second layer's links (2, n_links) and attention (n_links, 1).

        The layer moves self-links to the end: the attention belongs to the links
        returned here, not to `edge_index`. Over the links that end in one cell it
        sums to 1.
        """
        h = self._hidden(x, edge_index, boost)
        return self.layer2(h, edge_index, return_attention_weights=True)[1]

    def _hidden(self, x: Tensor, edge_index: Tensor, boost: Tensor | None) -> Tensor:
        h = self.layer1(x, edge_index)
        return torch.relu(h if boost is None else h * boost)


def gat_input(
    X: sparse.csr_matrix, device: torch.device | str, dense_bytes: float = 1e9
) -> Tensor:
    """Return cells for `GAT`: dense, or sparse where that would pass `dense_bytes`."""
    if 4 * X.shape[0] * X.shape[1] <= dense_bytes:
        # Dense products were faster at each density measured, 8 to 33 %.
        return minibatch(X, slice(None), device)
    if torch.device(device).type == "mps":
        raise ConfigError(
            message(
                "This device has no sparse products, and the cells are too many",
                found=X.shape,
                do="Lower n_genes or use device 'cpu'.",
            )
        )
    start, column, value = map(torch.from_numpy, (X.indptr, X.indices, X.data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR tensors a beta
        tensor = torch.sparse_csr_tensor(
            start, column, value, X.shape, check_invariants=True
        )
    return tensor.to(device)


def attention_scores(links: Tensor, alpha: Tensor, n_cells: int) -> Tensor:
    """Return the mean attention that each cell receives from those that it reaches.

    .. math:: s_i = \\frac{1}{|\\{j : i \\to j\\}|} \\sum_{i \\to j} \\alpha_{ij}

    The mean over *incoming* links would be one over their number, whatever the
    network learned.

    Parameters
    ----------
    links, alpha
        From `GAT.attention`, shapes (2, n_links) and (n_links, n_heads). Heads are
        summed first.
    n_cells
        Number of cells; a cell without an outgoing link scores 0.

    Returns
    -------
    torch.Tensor
        float64, shape (n_cells,), on the CPU.
    """
    # Not every device has double precision, or sums in a fixed order.
    links, alpha = links.cpu(), alpha.cpu()
    weight = alpha.double().reshape(links.shape[1], -1).sum(1)
    total = weight.new_zeros(n_cells).index_add_(0, links[0], weight)
    return total / torch.bincount(links[0], minlength=n_cells).clamp_min(1)
