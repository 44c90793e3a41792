"""The stress score: worked numbers, a threshold from training cells, JSON."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scgenlib.errors import ConfigError, DataError
from scgenlib.states import STATES, StressScore


def cells(X, genes) -> ad.AnnData:
    return ad.AnnData(
        sp.csr_matrix(np.asarray(X, dtype=np.float32)),
        obs=pd.DataFrame(index=[f"c{i}" for i in range(len(X))]),
        var=pd.DataFrame(index=list(genes)),
    )


@pytest.fixture
def few():
    X = [[3, 3, 3, 1, 1], [1, 2, 0, 2, 0], [0, 0, 0, 1, 3], [4, 1, 1, 0, 0]]
    return cells(X, ["HSPA1A", "DNAJB1", "ATF4", "ACTB", "GAPDH"])


@pytest.fixture(scope="module")
def many():
    """Markers and others at two levels; half of the cells express the markers more."""
    rng = np.random.default_rng(0)
    genes = [f"HSP{i}" for i in range(6)] + [f"G{i}" for i in range(400)]
    level = rng.uniform(0.5, 4, 406)
    X = level + rng.normal(0, 0.05, (200, 406))
    X[::2, :6] += 0.5
    return cells(np.clip(X, 0, None), genes)


def test_score_by_hand(few):
    # Five genes: each alone in its bin, so that markers are compared to all others.
    fitted = StressScore.fit(few, quantile=0.5)
    assert fitted.genes == ("HSPA1A", "DNAJB1", "ATF4")
    assert set(fitted.background) == {"ACTB", "GAPDH"}
    np.testing.assert_allclose(fitted.score(few), [2, 0, -2, 2], atol=1e-12)
    assert fitted.threshold == pytest.approx(1.0)
    states = fitted.states(few)
    assert list(states) == ["Stressed", "Homeostasis", "Homeostasis", "Stressed"]
    assert list(states.categories) == list(STATES) == ["Homeostasis", "Stressed"]
    # Sparse or dense, genes in any order.
    dense = few[:, ::-1].copy()
    dense.X = dense.X.toarray()
    np.testing.assert_allclose(fitted.score(dense), fitted.score(few), atol=1e-12)


def test_background_is_of_like_expression(many):
    fitted = StressScore.fit(many)
    means = pd.Series(np.asarray(many.X.mean(0)).ravel(), many.var_names)
    order = means.rank(method="first") - 1
    bins = (order * 25 // len(means)).astype(int)
    assert set(bins[list(fitted.background)]) == set(bins[list(fitted.genes)])
    assert not set(fitted.background) & set(fitted.genes)
    # 16 or 17 genes a bin, all taken since there are fewer than 50.
    assert len(fitted.background) == sum(bins.isin(bins[list(fitted.genes)])) - 6


def test_threshold_is_a_quantile_of_training(many):
    fitted = StressScore.fit(many, quantile=0.7)
    assert np.mean(fitted.states(many) == "Stressed") == pytest.approx(0.3)
    half = StressScore.fit(many, quantile=0.5)
    assert half.background == fitted.background
    assert list(half.states(many)) == ["Stressed", "Homeostasis"] * 100


def test_threshold_is_not_that_of_the_cells_scored(many):
    fitted = StressScore.fit(many, quantile=0.5)
    stressed = many[::2]
    assert set(fitted.states(stressed)) == {"Stressed"}
    assert set(fitted.states(many[1::2])) == {"Homeostasis"}
    np.testing.assert_allclose(fitted.score(stressed), fitted.score(many)[::2])


def test_seed_draws_the_background():
    rng = np.random.default_rng(1)
    wide = cells(rng.gamma(1, 1, (20, 3000)), [f"G{i}" for i in range(3000)])
    wide.var_names = ["ATF1", "ATF2", "ATF3", *wide.var_names[3:]]
    first, again, other = (StressScore.fit(wide, seed=s) for s in (0, 0, 1))
    assert first == again
    assert set(first.background) != set(other.background)
    n_bins = len(first.background) / 50
    assert n_bins in (1, 2, 3) and len(set(first.background)) == n_bins * 50


def test_excluded_genes_take_no_part(many):
    exclude = ["HSP0", "G1", *[f"G{i}" for i in range(100, 200)]]
    fitted = StressScore.fit(many, exclude=exclude)
    assert fitted.genes == ("HSP1", "HSP2", "HSP3", "HSP4", "HSP5")
    assert not {*fitted.background} & {*exclude}
    assert "HSP0" not in fitted.background


def test_prefixes_in_any_case_and_own_ones(few):
    mouse = few.copy()
    mouse.var_names = ["Hspa1a", "Dnajb1", "Atf4", "Actb", "Gapdh"]
    assert StressScore.fit(mouse).genes == ("Hspa1a", "Dnajb1", "Atf4")
    own = StressScore.fit(few, ("ACT", "gap", "Atf"))
    assert own.genes == ("ATF4", "ACTB", "GAPDH")


def test_too_few_markers(few):
    match = r"2 expressed markers \(HSPA1A, DNAJB1\).*prefixes of your own"
    with pytest.raises(DataError, match=match):
        StressScore.fit(few, exclude=["ATF4"])
    silent = few.copy()
    silent.X = silent.X.multiply([1, 1, 0, 1, 1]).tocsr()
    with pytest.raises(DataError, match=match):
        StressScore.fit(silent)
    with pytest.raises(DataError, match="0 other genes"):
        StressScore.fit(few[:, :3])
    for quantile in (0, 1):
        with pytest.raises(ConfigError, match="quantile"):
            StressScore.fit(few, quantile=quantile)


def test_a_gene_that_is_not_measured(few):
    fitted = StressScore.fit(few)
    with pytest.raises(DataError, match="1 genes, such as DNAJB1"):
        fitted.score(few[:, [0, 2, 3, 4]])


def test_survives_json(many):
    fitted = StressScore.fit(many, quantile=0.37)
    back = StressScore.from_dict(json.loads(json.dumps(fitted.to_dict())))
    assert back == fitted
    np.testing.assert_array_equal(back.score(many), fitted.score(many))
