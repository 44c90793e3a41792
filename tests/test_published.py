"""What published code does where it differs: reproduced, and told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from scgenlib import published
from scgenlib.garage import GAT, attention_scores, choose_seeds, knn_graph
from scgenlib.nets import count_parameters


@pytest.fixture(scope="module")
def graph():
    rng = np.random.default_rng(0)
    X = rng.random((90, 30)).astype(np.float32)
    return X, knn_graph(X)


def network(seed):
    torch.manual_seed(seed)
    return GAT(30, 4)


def test_edge_index_scores_are_what_the_indexing_gives(graph):
    X, links = graph
    x = torch.from_numpy(X)
    made = []
    for seed in (0, 1):
        # The first part of the returned pair, looked up at the original positions.
        first_part, _ = network(seed).attention(x, links)
        scores = [first_part[:, links[0] == i].float().mean() for i in range(90)]
        made.append(torch.stack(scores))
    assert torch.equal(made[0], made[1])  # whatever the weights
    scores = published.edge_index_scores(links, 90)
    torch.testing.assert_close(scores.float(), made[0])


def test_edge_index_scores_have_a_closed_form(graph):
    scores = published.edge_index_scores(graph[1], 90)
    late = torch.arange(72, 90)
    assert torch.equal(scores[72:], (5 * late - 4 * 90 + 2).double())
    chosen = choose_seeds(18, 90, scores=scores)
    # The last cells of the file and those just below 0.8 n: file order decides.
    assert chosen.min() > 45
    assert 89 in chosen


def test_published_rule_depends_on_the_order_of_cells(graph):
    X, links = graph
    shuffle = np.random.default_rng(1).permutation(90)
    seeds = set(choose_seeds(18, 90, scores=published.edge_index_scores(links, 90)))
    scores = published.edge_index_scores(knn_graph(X[shuffle]), 90)
    again = set(shuffle[choose_seeds(18, 90, scores=scores)])
    assert len(seeds & again) < 12


def test_misaligned_scores(graph):
    X, links = graph
    returned, alpha = network(0).attention(torch.from_numpy(X), links)
    scores = published.misaligned_scores(links, alpha, 90)
    by_hand = torch.stack([alpha[links[0] == i].mean() for i in range(90)])
    torch.testing.assert_close(scores.float(), by_hand)
    # The last cells are given self-links of other cells.
    self_links = alpha[-90:, 0]
    expected = self_links.reshape(-1, 5).mean(1)
    torch.testing.assert_close(scores[72:].float(), expected)
    aligned = attention_scores(returned, alpha, 90)
    assert not torch.allclose(scores, aligned, atol=1e-3)


def test_degree_scores_are_uniform_attention(graph):
    X, links = graph
    gat = network(0)
    for parameter in (gat.layer2.att_src, gat.layer2.att_dst):
        torch.nn.init.zeros_(parameter)
    scores = attention_scores(*gat.attention(torch.from_numpy(X), links), 90)
    torch.testing.assert_close(
        published.degree_scores(links, 90).float(), scores.float()
    )


@pytest.mark.parametrize(
    ("genes", "count"),
    [(10564, 8266121), (14802, 11529381), (2000, 1671841), (19156, 14881961)],
)
def test_discriminator_parameters(genes, count):
    assert 770 * genes + 131841 == count
    with torch.device("meta"):
        assert count_parameters(published.Discriminator(genes)) == count


def test_extra_linear_layer_adds_no_function():
    torch.manual_seed(0)
    d = published.Discriminator(7, (5, 4))
    x = torch.randn(9, 7)
    weight = d.last.weight @ d.extra.weight  # (1, 4): one direction
    bias = d.last.weight @ d.extra.bias + d.last.bias
    torch.testing.assert_close(d.body(x) @ weight.T + bias, d(x))


def test_lowest_fano_genes():
    rng = np.random.default_rng(0)
    X = rng.poisson(5, (200, 4)) * np.array([1.0, 2.0, 3.0, 4.0])
    # Variance over mean of c * Poisson is c.
    assert published.lowest_fano_genes(X, 2).tolist() == [0, 1]
    assert published.lowest_fano_genes(sparse.csr_matrix(X), 4).tolist() == [0, 1, 2, 3]


def test_sizes():
    assert published.generated_sizes(299) == [74, 149, 224, 299, 373, 448]
    assert published.generated_sizes(90) == [22, 45, 67, 90, 112, 135]
    assert published.generated_sizes(2126) == [531, 1063, 1594, 2126, 2657, 3189]


@pytest.mark.parametrize(
    ("n_cells", "n_rare", "sizes"),
    [
        (90, 6, (3, 3, 45, 9, 30)),
        (299, 8, (4, 4, 150, 30, 40)),
        (7895, 49, (25, 24, 3948, 790, 250)),
        (2126, 21, (11, 10, 1064, 213, 110)),
    ],
)
def test_rare_utility_sizes(n_cells, n_rare, sizes):
    found = published.rare_utility_sizes(n_cells, n_rare)
    assert tuple(found.values()) == sizes
