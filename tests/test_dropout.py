"""Dropout mixtures: against a slow fit, the rules around it, published behaviour."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from scipy import stats
from scipy.optimize import brentq
from scipy.special import digamma

from scgenlib import datasets, dropout, published
from scgenlib.dropout import (
    dropout_mixtures,
    dropout_probability,
    fit_mixtures,
    fraction_of_zeros,
)
from scgenlib.errors import ConfigError, DataError
from scgenlib.simulate import simulate

NAMES = ["rate", "shape", "inverse_scale", "mean", "sd", "p_zero", "iterations"]


def shape_by_search(v: float) -> float:
    """Return a in ln a - digamma(a) = v by root search; never above 20."""
    if v <= np.log(20) - digamma(20):
        return 20.0
    return brentq(lambda a: np.log(a) - digamma(a) - v, 1e-6, 20.0, xtol=1e-14)


def slow_fit(counts, rate=None, steps=100, tolerance=0.5):
    """Fit one mixture to the counts of one gene in one group, cell by cell."""
    x = np.log(1.01 + np.asarray(counts, float))
    seen = x[x > np.log(1.01)]
    zeros = np.mean(np.asarray(counts) == 0)
    r = rate if rate is not None else zeros if zeros > 0 else 0.01
    a, b, m, s = 1.5, 1.0, seen.mean(), max(seen.std() or 0.01, 0.01)

    def parts():
        gamma = np.log(r) + stats.gamma.logpdf(x, a, scale=1 / b)
        normal = np.log1p(-r) + stats.norm.logpdf(x, m, s)
        return gamma, normal, np.logaddexp(gamma, normal)

    old, n = 0.0, 0
    while n < steps:
        gamma, _, both = parts()
        w = np.exp(gamma - both)
        r = w.mean()
        m = np.sum((1 - w) * x) / np.sum(1 - w)
        s = max(np.sqrt(np.sum((1 - w) * (x - m) ** 2) / np.sum(1 - w)), 0.01)
        of_value = np.sum(w * x) / np.sum(w)
        a = shape_by_search(np.log(of_value) - np.sum(w * np.log(x)) / np.sum(w))
        b = a / of_value
        n += 1
        new = parts()[2].sum() / np.log(10)
        if (new - old) ** 2 <= tolerance:
            break
        old = new
    gamma, _, both = parts()
    p = np.exp(gamma - both)[x == np.log(1.01)]
    return [r, a, b, m, s, p[0] if len(p) else np.nan, n]


def as_segment(counts):
    """Return one gene in one group as `fit_mixtures` takes it."""
    value, weight = np.unique(
        np.asarray(counts)[np.asarray(counts) > 0], return_counts=1
    )
    return (
        np.zeros(len(value), int),
        value.astype(float),
        weight,
        np.array([len(counts)]),
    )


def draw(n_cells, n_genes, seed=0):
    """Counts of genes that differ in level, in spread and in dropout."""
    rng = np.random.default_rng(seed)
    level, size = rng.lognormal(2.0, 1.2, n_genes), rng.uniform(0.5, 10, n_genes)
    counts = rng.negative_binomial(size, size / (size + level), (n_cells, n_genes))
    return counts * (rng.random(counts.shape) > rng.uniform(0, 0.9, n_genes))


# ----------------------------------------------------------------- the fit itself


def test_one_fit_against_a_slow_one():
    counts = np.repeat([0, 1, 2, 19, 20, 24, 31], [60, 3, 2, 10, 14, 9, 2])
    table = fit_mixtures(*as_segment(counts))
    expected = slow_fit(counts)
    np.testing.assert_allclose(table[NAMES].to_numpy()[0], expected, atol=1e-6)
    # The Gamma part took the zeros, the Normal part the counts around 20.
    row = table.iloc[0]
    assert 0.6 < row["rate"] < 0.67 and row["p_zero"] > 0.999
    assert row["mean"] == pytest.approx(np.log(21), abs=0.1)


@pytest.mark.parametrize("rate", [None, 0.01])
def test_a_fit_goes_on_until_it_stops_moving(rate):
    counts = draw(400, 1, seed=5)[:, 0]
    for tolerance, steps in ((0.5, 100), (0.0001, 100), (0.0, 7)):
        table = fit_mixtures(
            *as_segment(counts),
            start_rate=rate,
            tolerance=tolerance,
            max_iterations=steps,
        )
        expected = slow_fit(counts, rate, steps, tolerance)
        np.testing.assert_allclose(table[NAMES].to_numpy()[0], expected, rtol=1e-6)
    assert table["iterations"][0] == 7


def test_many_fits_at_once_are_the_same_as_one_by_one():
    counts = draw(240, 50)
    groups = np.resize(["b", "a", "d", "c"], 240)
    p, table = dropout_mixtures(sp.csr_matrix(counts), groups, max_zeros=1, min_mean=0)
    assert p.shape == (50, 4) and list(p.columns) == ["a", "b", "c", "d"]
    assert table.shape == (200, 7)
    steps, compared = [], 0
    for gene in range(50):
        for group in "abcd":
            own = counts[groups == group, gene]
            found = table.loc[(gene, group)]
            if not own.any():
                assert (found == 0).all()
                continue
            expected = slow_fit(own)
            if (own > 0).all():
                expected[5] = found["p_zero"]  # no zero to speak of
            np.testing.assert_allclose(
                found[NAMES], expected, rtol=1e-6, atol=1e-6, err_msg=f"{gene} {group}"
            )
            assert p.loc[gene, group] == found["p_zero"]
            steps.append(found["iterations"])
            compared += 1
    # They do not all stop together.
    assert compared > 190 and len(set(steps)) > 5
    assert 0.3 < table["rate"].max() and table["rate"].std() > 0.1


def test_shape_is_the_root():
    v = np.array([1e-3, 0.02, 0.1, 0.7, 3.0, 40.0, 0.0, -1.0, np.nan])
    found = dropout._shape(v)
    expected = [shape_by_search(x) for x in v[:6]] + [20.0] * 3
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert found[0] == 20.0 and found[2] < 20


def test_blocks_and_form_of_the_counts_change_nothing(monkeypatch):
    counts, groups = draw(90, 23, seed=1), np.resize(list("xyz"), 90)
    expected = dropout_probability(sp.csr_matrix(counts), groups)
    monkeypatch.setattr(dropout, "_BLOCK", 4)
    explicit = sp.csr_matrix(counts + 1.0)
    explicit.data -= 1
    for form in (counts, sp.csc_matrix(counts), explicit):
        pd.testing.assert_frame_equal(dropout_probability(form, groups), expected)


def test_order_of_cells_changes_nothing():
    counts, groups = draw(90, 12, seed=2), np.resize(list("xyz"), 90)
    order = np.random.default_rng(0).permutation(90)
    one = dropout_probability(counts, groups)
    two = dropout_probability(counts[order], groups[order])
    pd.testing.assert_frame_equal(one, two)
    # Nor does it matter what other groups there are.
    own = groups == "y"
    alone = dropout_probability(counts[own], groups[own])
    pd.testing.assert_frame_equal(alone, one[["y"]])


# ------------------------------------------------------------- rules around the fit


def test_genes_that_are_not_fitted():
    counts = np.zeros((100, 5), int)
    counts[:5, 0] = counts[:4, 1] = 20  # 95 and 96 % zeros
    counts[:, 2] = 20  # no zeros
    counts[:1, 3] = 1  # a mean of 0.0068 above that of a zero
    groups = ["a"] * 100
    p = dropout_probability(counts, groups)["a"]
    assert p[0] > 0.99 and p[1] == p[3] == p[4] == 0
    p = dropout_probability(counts, groups, max_zeros=0.96)["a"]
    assert p[1] > 0.99 and p[3] == 0
    p = dropout_probability(counts, groups, max_zeros=1.0, min_mean=0.0)["a"]
    assert p[3] > 0 and p[4] == 0


def test_smallest_deviation():
    counts = [0] * 10 + [7] * 10
    for smallest in (0.01, 0.3):
        table = fit_mixtures(*as_segment(counts), min_sd=smallest)
        assert table["sd"][0] == smallest
        assert np.isfinite(table.to_numpy()).all()


def test_start_rate_is_that_of_the_zeros_unless_given():
    counts = [0] * 30 + [1] * 5 + [2] * 40 + [5] * 25
    none, same, other = (
        fit_mixtures(*as_segment(counts), start_rate=rate, max_iterations=1)["rate"][0]
        for rate in (None, 0.3, 0.01)
    )
    assert none == pytest.approx(same, rel=1e-12) and abs(none - other) > 0.01
    for rate in (0.0, 1.0, -0.2, 1.5):
        with pytest.raises(ConfigError, match="start_rate.*between 0 and 1"):
            fit_mixtures(*as_segment(counts), start_rate=rate)


def test_fraction_of_zeros():
    counts = np.array([[0, 1], [2, 0], [0, 3], [0, 4]])
    table = fraction_of_zeros(sp.csr_matrix(counts), ["b", "b", "a", "b"])
    expected = pd.DataFrame({"a": [1.0, 0.0], "b": [2 / 3, 1 / 3]})
    pd.testing.assert_frame_equal(table, expected)


def test_small_groups_and_empty_genes_are_finite():
    counts = np.array([[0, 3, 0, 9], [5, 0, 0, 0], [2, 1, 0, 0], [0, 2, 0, 0]])
    p, table = dropout_mixtures(counts, ["alone", "a", "a", "a"], max_zeros=1)
    assert np.isfinite(table.to_numpy()).all()
    assert ((p >= 0) & (p <= 1)).all(axis=None)
    assert (p.loc[2] == 0).all() and p.loc[0, "alone"] == 0


@pytest.mark.parametrize(
    ("counts", "groups", "words"),
    [
        (simulate(20, 30).X, ["a"] * 20, "look log1p.*whole numbers"),
        (draw(20, 6) - 1, ["a"] * 20, "look scaled"),
        (draw(20, 6), ["a"] * 19, "19 groups for 20 cells"),
        (np.zeros((20, 6)), ["a"] * 20, "no value other than 0"),
    ],
)
def test_what_cannot_be_fitted(counts, groups, words):
    with pytest.raises(DataError, match=words):
        dropout_probability(counts, groups)


# -------------------------------------------------------------- published behaviour


@pytest.fixture(scope="module")
def far():
    """Zeros, a Normal part that is narrow, and one count far from either part."""
    return np.repeat([0, 1, 100, 101], [4000, 1, 300, 300])[:, None]


# 14: a value of which both densities are 0.
def test_densities_of_zero_have_no_share(far):
    groups = ["a"] * len(far)
    options = {"min_sd": 0.0, "start_rate": 0.01}
    p, table = dropout_mixtures(far, groups, **options)
    # On the log scale the one count is nearer to the Gamma part, with the zeros.
    assert p.loc[0, "a"] > 0.999
    assert table["rate"].item() == pytest.approx(4001 / 4601, abs=1e-6)
    assert table["sd"].item() == pytest.approx(0.004926, abs=1e-6)
    # Plain densities leave it to the Normal part, whatever that makes of it.
    options["expect"] = published.plain_densities
    _, table = dropout_mixtures(far, groups, **options)
    assert table["rate"].item() == pytest.approx(4000 / 4601, abs=1e-6)
    assert table["sd"].item() == pytest.approx(0.159925, abs=1e-6)


# 14: a Normal part of one value has no density, and then no zero is a dropout.
def test_a_gene_of_one_count_has_no_share_as_published():
    counts = np.repeat([0, 7], [50, 40])[:, None]
    groups = ["a"] * 90
    assert published.scgacl_dropout(counts, groups).loc[0, "a"] == 0
    p, table = dropout_mixtures(counts, groups)
    assert p.loc[0, "a"] > 0.999 and table["sd"].item() == 0.01
    assert table["rate"].item() == pytest.approx(50 / 90, abs=1e-6)
    assert np.isfinite(table.to_numpy()).all()


def test_plain_densities_are_the_same_where_there_are_any():
    counts, groups = draw(120, 10, seed=3), np.resize(["a", "b"], 120)
    options = {"start_rate": 0.01, "max_zeros": 1.0}
    plain = dropout_probability(
        counts, groups, expect=published.plain_densities, **options
    )
    logs = dropout_probability(counts, groups, **options)
    np.testing.assert_allclose(plain, logs, atol=1e-9)
    assert 0.1 < (plain.to_numpy() > 0.5).mean() < 1
    pd.testing.assert_frame_equal(
        published.scgacl_dropout(counts, groups),
        dropout_probability(
            counts, groups, expect=published.plain_densities, min_sd=0.0, **options
        ),
    )


@pytest.fixture(scope="module")
def simulation() -> AnnData:
    try:
        return datasets.load("scgacl_sim", verbose=False)
    except Exception as error:
        pytest.skip(f"scgacl_sim is not at hand: {error}")


def tally(adata, table):
    """Return zeros of the genes that are seen: filled, not filled, and of null rows."""
    counts = adata.layers["counts"].toarray()
    types = adata.obs["cell_type"].astype(str).to_numpy()
    seen = counts.any(axis=0)
    zeros = pd.DataFrame(
        {name: (counts[types == name] == 0).sum(0) for name in table.columns}
    )
    table, zeros = table.to_numpy()[seen], zeros.to_numpy()[seen]
    level = np.column_stack(
        [np.log(1.01 + counts[types == name]).mean(0) for name in sorted(set(types))]
    )
    null = level[seen] - np.log(1.01) < 1e-2
    return null, table, zeros


# 14: which zeros the published code fills.
@pytest.mark.data
def test_published_table_of_the_simulation(simulation):
    types = simulation.obs["cell_type"].astype(str)
    p = published.scgacl_dropout(simulation.layers["counts"], types)
    null, p, zeros = tally(simulation, p)
    assert null.sum() == 134
    assert zeros[p >= 0.5].sum() == 343_723
    assert zeros[null].sum() == 16_571 and (p[null] == 0).all()
    assert zeros[(p < 0.5) & ~null].sum() == 12_872
    assert zeros.sum() == 373_166


# 14: which zeros are filled here.
@pytest.mark.data
def test_table_of_the_simulation(simulation):
    types = simulation.obs["cell_type"].astype(str)
    counts = simulation.layers["counts"]
    null, p, zeros = tally(simulation, dropout_probability(counts, types))
    share = tally(simulation, fraction_of_zeros(counts, types))[1]
    assert ((share > 0.95) & ~null).sum() == 247
    assert (p[share > 0.95] == 0).all()
    assert zeros[p >= 0.5].sum() == 326_558
    # Without the filter nothing is left out but genes that are hardly seen.
    free = dropout_probability(counts, types, max_zeros=1.0)
    assert zeros[tally(simulation, free)[1] >= 0.5].sum() > 343_723
    # The probability is nearly always close to 0 or to 1.
    assert ((p < 0.1) | (p > 0.9)).mean() > 0.9
