"""Figures are checked by what they hold and what they say, not by their pixels."""

from __future__ import annotations

import warnings

import anndata as ad
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scgenlib import plots
from scgenlib.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def told(capsys):
    """Return a function that gives back what `describe` prints, a line a sentence."""

    def read(axes):
        capsys.readouterr()
        plots.describe(axes)
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines()), default=0) <= 75
        return text.replace("\n  ", " ")

    return read


def cells(X, labels):
    X = np.asarray(X, np.float32)
    adata = ad.AnnData(sparse.csr_matrix(X))
    adata.var_names = [f"g{i}" for i in range(X.shape[1])]
    adata.obs_names = [f"c{i}" for i in range(X.shape[0])]
    adata.obs["cell_type"] = pd.Categorical(labels)
    return adata


def test_palette_is_stable_and_never_repeats():
    styles = plots.palette([f"type {i:02d}" for i in range(60)])
    assert len(set(styles.values())) == 60
    assert len({colour for colour, _ in list(styles.values())[:12]}) == 12
    assert plots.palette(["b", "a", "b"]) == plots.palette(["a", "b"])


def test_figures_have_an_opaque_white_ground():
    ax = plots.new_axes()
    assert ax.figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert not ax.spines["top"].get_visible()
    # What a reader draws afterwards keeps the reader's own style.
    assert plt.rcParams["axes.spines.top"]


def test_scatter_types_says_who_is_rare(told):
    xy = np.zeros((4, 2))
    ax = plots.scatter_types(xy, ["B", "T", "B", "B"], names=("PC 1", "PC 2"))
    assert told(ax) == "4 cells of 2 types; most are B (3), fewest T (1).\n"
    assert ax.get_xlabel() == "PC 1"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["B (3)", "T (1)"]


def test_filmstrip_counts_the_real_cells_that_are_met(told):
    rng = np.random.default_rng(0)
    real = np.r_[rng.normal(0, 1, (50, 2)), rng.normal(50, 1, (50, 2))]
    axes = plots.filmstrip({0: real[:50], 100: real}, real)
    text = told(axes).splitlines()
    assert text[0].startswith("A real cell is met when")
    assert text[1:] == ["step 0: 50 % met.", "step 100: 100 % met."]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert not axes[0].texts and not axes[1].texts


def test_filmstrip_counts_the_cells_outside_its_panels(told):
    real = np.stack(np.meshgrid(range(5), range(5)), -1).reshape(-1, 2).astype(float)
    # The panel ends 0.15 x 4 = 0.6 beyond the real cells: at -0.6 and at 4.6.
    edge = np.array([[4.59, 2], [4.61, 2], [2, -0.61], [-9, 2]])
    axes = plots.filmstrip({0: np.full((3, 2), 9.0), 50: edge, 100: real}, real)
    notes = [[text.get_text() for text in ax.texts] for ax in axes]
    assert notes == [["all 3 outside"], ["3 of 4 outside"], []]
    text = told(axes)
    assert "step 0: 0 % met; all 3 generated cells lie outside the panel." in text
    assert "; 3 of 4 generated cells lie outside the panel." in text


def test_learning_curves(told):
    rows = [(s, "gan", "loss", 4.0 if s < 10 else 1.0) for s in range(100)]
    history = pd.DataFrame(rows, columns=["step", "phase", "term", "value"])
    ax = plots.learning_curves(history, landmarks={"equilibrium": 1.386})
    assert told(ax) == "loss: from 4.0 to 1.0.\n"
    assert ax.lines[1].get_ydata()[0] == 1.386
    with pytest.raises(DataError, match="Did you mean 'loss'"):
        plots.learning_curves(history, terms=["los"])


def test_dial_shows_each_seed_and_the_means(told):
    table = pd.DataFrame(
        {"leak": [0, 0, 1, 1], "coverage": [0.2, 0.4, 0.6, 0.8], "gap": [1, 1, 3, 3]}
    )
    axes = plots.dial(table, "leak", {"coverage": "coverage (share)", "gap": "gap"})
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), [0.3, 0.7])
    assert len(axes[0].collections[0].get_offsets()) == 4
    assert "coverage (share): 0.30 to 0.70 as leak goes from 0 to 1" in told(axes)


def test_contest_ranks_by_median_and_draws_bands(told):
    table = pd.DataFrame(
        {"arm": ["a", "a", "a", "b", "b", "b"], "f1": [0.1, 0.2, 0.9, 0.4, 0.5, 0.6]}
    )
    ax = plots.contest(table, "f1", floor=[0.05, 0.1], ceiling=[0.9, 0.95])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["b", "a"]
    assert told(ax) == (
        "f1, median over the dots: b 0.50; a 0.20.\n"
        "The band (floor): 0.050 to 0.10. Above it: b; a.\n"
        "The band (real against real): 0.90 to 0.95. Below it: b; a.\n"
    )
    names = [t.get_text() for t in ax.get_legend().get_texts()]
    assert names == ["floor", "real against real", "median"]
    assert sum(len(c.get_offsets()) for c in ax.collections) == 6


def test_contest_shows_equal_seeds_apart_and_says_where_the_medians_lie(told):
    table = pd.DataFrame({"arm": list("aaabbbccc"), "f1": [1.0] * 6 + [0.2, 0.3, 0.4]})
    ax = plots.contest(table, "f1", floor=[1.0, 1.0], floor_name="nothing added")
    heights = ax.collections[0].get_offsets()[:, 1]
    np.testing.assert_allclose(heights, [-0.2, 0, 0.2])
    left, right = ax.patches[0].get_x(), ax.patches[0].get_x() + 0.0064
    # One value is still a band that can be seen: 0.004 of the range to either side.
    np.testing.assert_allclose([left, right], [0.9968, 1.0032])
    assert "band (nothing added): 1.0. Within it: a; b. Below it: c.\n" in told(ax)


def test_bars_against_a_base_rate(told):
    ax = plots.bars(pd.Series({"B": 0.3, "T": 0.02}), base=0.1, label="share")
    assert told(ax) == (
        "share: highest B (0.30), lowest T (0.020); "
        "1 of 2 above the base rate (0.10).\n"
    )


def test_bars_against_a_base_rate_each(told):
    base = pd.Series({"T": 0.01, "B": 0.4})
    ax = plots.bars(pd.Series({"B": 0.3, "T": 0.02}), base=base, base_name="chance")
    assert told(ax).endswith("1 of 2 above their chance.\n")
    ticks = ax.collections[0].get_offsets()
    np.testing.assert_allclose(ticks, [[0.4, 0], [0.01, 1]])


def test_heatmap_leaves_out_what_is_missing(told):
    table = pd.DataFrame([[0.1, np.nan], [0.5, 0.4]], index=["r", "s"])
    ax = plots.heatmap(table, label="ARI", digits=1)
    assert [t.get_text() for t in ax.texts] == ["0.1", "", "0.5", "0.4"]
    assert told(ax) == "ARI: highest 0.50 at s, 0; lowest 0.10 at r, 0.\n"


def test_heatmap_writes_its_numbers(told):
    table = pd.DataFrame([[0.1, 0.9], [0.5, 0.4]], index=["r", "s"], columns=["x", "y"])
    ax = plots.heatmap(table, label="ARI", digits=1)
    assert [t.get_text() for t in ax.texts] == ["0.1", "0.9", "0.5", "0.4"]
    assert told(ax) == "ARI: highest 0.90 at r, y; lowest 0.10 at r, x.\n"


def test_marker_dots_mean_and_share(told):
    real = cells([[2, 0], [4, 0], [0, 3], [0, 0]], ["B", "B", "T", "T"])
    made = cells([[2, 0], [2, 0], [0, 3], [0, 0]], ["B", "B", "T", "T"])
    axes = plots.marker_dots(real, made, ["g0", "g1"])
    dots = axes[0].collections[0]
    np.testing.assert_allclose(dots.get_array(), [3, 0, 0, 1.5])
    np.testing.assert_allclose(dots.get_sizes(), [110, 0, 0, 55])
    text = told(axes)
    assert "g0 in B; g1 in T" in text
    assert "largest gap 1.0 (g0 in B), mean gap 0.25" in text


def test_marker_dots_without_a_type_among_the_generated(told):
    real = cells([[2, 0], [0, 3]], ["B", "T"])
    axes = plots.marker_dots(real, cells([[2, 0]], ["B"]), ["g0", "g1"])
    assert len(axes) == 2
    assert "largest gap 0" in told(axes)
    with pytest.raises(ConfigError, match="gene in the real cells.*'g9'"):
        plots.marker_dots(real, real, ["g9"])


def test_moments(told):
    real = cells([[0, 2], [2, 2]], ["B", "B"])
    axes = plots.moments(real, cells([[1, 2], [1, 2]], ["B", "B"]))
    text = told(axes).splitlines()
    assert text[0] == (
        "Variance, mean over genes: real 0.50, generated 0; largest gap 1.0."
    )
    assert text[1] == (
        "Zeros, mean over genes: real 0.25, generated 0; largest gap 0.50."
    )


def test_embedding_never_moves_the_training_cells(told):
    rng = np.random.default_rng(0)
    X = rng.normal(4, 1, (60, 8)) + np.repeat([0, 6], 30)[:, None] * (np.arange(8) < 4)
    train = cells(np.clip(X, 0, None), ["B"] * 30 + ["T"] * 30)
    place = plots.fit_map(train, n_pcs=5)
    ground = place(train)
    # A mirrored gene order is put right by name.
    np.testing.assert_allclose(place(train[:, ::-1].copy()), ground)
    moved = place(train[:20].copy())
    assert moved.shape == (20, 2)
    gap = np.linalg.norm(moved - ground[:30].mean(axis=0), axis=1)
    other = np.linalg.norm(moved - ground[30:].mean(axis=0), axis=1)
    assert (gap < other).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = plots.embedding(train, {"generated": train[40:].copy()}, place=place)
    assert "generated: 20 cells of 1 types, mostly T 100 %" in told(axes)
    assert axes[0].get_xlim() == axes[1].get_xlim()
