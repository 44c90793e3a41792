"""How every figure of the book looks, and how it is told in words.

`plots` draws the figures on this ground. A figure keeps a few sentences read from
its data, which `describe` prints: told so, it stays true on other cells and reaches
readers who cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scgenlib.words import say

__all__ = [
    "COLOURS",
    "GENERATED",
    "REAL",
    "Style",
    "describe",
    "legend",
    "new_axes",
    "palette",
    "plane",
    "points",
    "rounded",
    "tell",
]

# Okabe and Ito's colours for all kinds of colour vision, without the yellow that
# fades on white, then Tol's muted ones; markers tell types apart without colour.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"),
    *("#882255", "#999933", "#332288", "#44AA99", "#AA4499"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
REAL = "#8A8A8A"
GENERATED = "#D55E00"
_words: WeakKeyDictionary[Axes, list[str]] = WeakKeyDictionary()

#: Colour and marker.
Style = tuple[str, str]


def new_axes(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (6.0, 3.6),
    **options: Any,
) -> Any:
    """Return the axes of a new figure in the book's style.

    Parameters
    ----------
    rows, columns
        Grid of panels.
    size
        Width and height of the whole figure in inches.
    **options
        For `matplotlib.pyplot.subplots`, such as `sharex=True`.

    Returns
    -------
    matplotlib.axes.Axes or numpy.ndarray of them
    """
    # Loading a notebook's backend switches drawing on. Inside the context that would
    # be undone, and only the first figure would be shown; so load it before.
    plt.draw_if_interactive()
    # An opaque white ground, so that a dark page does not swallow the labels.
    figure, axes = plt.subplots(
        rows, columns, figsize=size, facecolor="white", layout="constrained", **options
    )
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=9)
    return axes


def palette(labels: Sequence[str] | pd.Series) -> dict[str, Style]:
    """Return one (colour, marker) per cell type, by the sorted list of types.

    Make it once from all types of a data set and hand it to every figure, so that
    a type keeps its look where another type is missing.
    """
    types = sorted({str(label) for label in labels})
    n = len(COLOURS)
    return {
        name: (COLOURS[i % n], _MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(types)
    }


def describe(axes: Axes | np.ndarray) -> None:
    """Print in words what a figure of `plots` shows, read from its data."""
    for ax in np.ravel(np.asarray(axes, dtype=object)):
        for sentence in _words.get(ax, []):
            say(sentence)


def tell(ax: Axes, *sentences: str) -> None:
    """Keep the sentences that `describe` prints for these axes."""
    _words[ax] = list(sentences)


def rounded(value: float) -> str:
    """Return two significant digits, without an exponent for usual sizes."""
    if not np.isfinite(value):
        return "undefined"
    if value == 0:
        return "0"
    digits = max(0, 1 - int(np.floor(np.log10(abs(value)))))
    return f"{round(value, digits):,.{min(digits, 4)}f}"


def points(ax: Axes, xy: np.ndarray, style: Style, **options: Any) -> None:
    """Draw points, shape (n, 2), in one style."""
    settings: dict[str, Any] = {"s": 14, "alpha": 0.8, "linewidths": 0} | options
    ax.scatter(xy[:, 0], xy[:, 1], color=style[0], marker=style[1], **settings)


def plane(ax: Axes, names: tuple[str, str], ticks: bool = False) -> None:
    """Name the two axes; without `ticks` their values mean nothing."""
    ax.set(xlabel=names[0], ylabel=names[1])
    if not ticks:
        ax.set(xticks=[], yticks=[])


def legend(ax: Axes, **options: Any) -> None:
    """Put the legend to the right of the axes, or where `options` say."""
    settings = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} | options
    ax.legend(frameon=False, fontsize=8, **settings)
