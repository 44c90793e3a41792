"""Every figure style of the book.

Each function draws one figure, returns its axes and never shows it. What it shows
in words, read from the data, is kept for `describe`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import sparse

from scgenlib.errors import DataError, unknown
from scgenlib.figure import (
    COLOURS,
    GENERATED,
    REAL,
    Style,
    describe,
    legend,
    new_axes,
    palette,
    plane,
    points,
    rounded,
    tell,
)

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "GENERATED",
    "REAL",
    "bars",
    "contest",
    "describe",
    "dial",
    "embedding",
    "filmstrip",
    "fit_map",
    "heatmap",
    "learning_curves",
    "marker_dots",
    "moments",
    "new_axes",
    "palette",
    "scatter_types",
]


# --- cells in a plane -----------------------------------------------------------


def scatter_types(
    xy: np.ndarray,
    labels: Sequence[str] | pd.Series,
    *,
    styles: Mapping[str, Style] | None = None,
    names: tuple[str, str] = ("x", "y"),
    title: str = "",
    ticks: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw cells in a plane, a colour and a marker for each type.

    Parameters
    ----------
    xy
        Shape (n_cells, 2).
    labels
        Cell type of each cell.
    styles
        From `palette`; made from `labels` when left out.
    names
        Names of the two axes, with units where there are any.
    ticks
        Whether the values on the axes mean something; those of a UMAP do not.
    """
    types = np.asarray(labels, dtype=str)
    styles = styles or palette(list(types))
    ax = new_axes() if ax is None else ax
    counts = pd.Series(types).value_counts()
    for name in sorted(counts.index):
        points(ax, xy[types == name], styles[name], label=f"{name} ({counts[name]})")
    plane(ax, names, ticks)
    ax.set_title(title, fontsize=10)
    legend(ax, title="type (cells)", markerscale=1.6)
    text = f"{len(types)} cells of {len(counts)} types"
    text += f"; most are {counts.index[0]} ({counts.iloc[0]})"
    tell(ax, f"{text}, fewest {counts.index[-1]} ({counts.iloc[-1]}).")
    return ax


def fit_map(
    train: AnnData, *, n_pcs: int = 30, seed: int = 0
) -> Callable[[AnnData], np.ndarray]:
    """Fit PCA and UMAP on real training cells; return the map for any cells.

    Other cells are placed into the fitted map and never change it.

    Returns
    -------
    callable
        Takes an AnnData with the genes of `train` (in any order, or more of
        them), returns shape (n_cells, 2).
    """
    from sklearn.decomposition import PCA

    pca = PCA(min(n_pcs, min(train.shape) - 1), svd_solver="arpack", random_state=seed)
    genes = list(train.var_names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import umap

        reducer = umap.UMAP(n_neighbors=15, min_dist=0.3, random_state=seed, n_jobs=1)
        scores = pca.fit_transform(train.X)
        fitted = np.array(reducer.fit_transform(scores))
        # Training cells never yield when `transform` places new ones, so at full
        # repulsion new cells gather on the rim of their cluster: held-out real cells
        # would look like rings. At 0.4 they spread as the training cells do.
        reducer.repulsion_strength = 0.4

    def place(adata: AnnData) -> np.ndarray:
        moved = pca.transform(adata[:, genes].X)
        # The training cells stay where the fit put them: `transform` treats every
        # cell as new and would move them a little.
        if moved.shape == scores.shape and np.allclose(moved, scores, atol=1e-4):
            return fitted
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(reducer.transform(moved))

    return place


def embedding(
    train: AnnData,
    others: Mapping[str, AnnData],
    *,
    label_key: str = "cell_type",
    styles: Mapping[str, Style] | None = None,
    place: Callable[[AnnData], np.ndarray] | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Draw a UMAP of real training cells, and other cells placed into it.

    Parameters
    ----------
    train
        Real training cells; the map is fitted on these alone.
    others
        Title to cells, such as `{"generated": cells, "held out": test}`; each has
        a panel of its own, with the training cells in grey.
    place
        From `fit_map`, to use one map in several figures.

    Returns
    -------
    numpy.ndarray of matplotlib.axes.Axes
        The training cells first.
    """
    genes = [
        g for g in train.var_names if all(g in a.var_names for a in others.values())
    ]
    place = place or fit_map(train[:, genes], seed=seed)
    styles = styles or palette(list(train.obs[label_key]))
    axes = new_axes(1, 1 + len(others), (2.6 * (1 + len(others)) + 1.6, 3.0))
    axes = np.atleast_1d(axes)
    ground = place(train)
    real = train.obs[label_key].astype(str).to_numpy()
    panels: dict[str, tuple[np.ndarray, np.ndarray]] = {
        "real, training": (ground, real)
    }
    for title, cells in others.items():
        panels[title] = (place(cells), cells.obs[label_key].astype(str).to_numpy())
    for ax, (title, (xy, labels)) in zip(axes, panels.items(), strict=True):
        if xy is not ground:
            points(ax, ground, ("#DDDDDD", "o"), s=8)
        for name in sorted(styles):
            if (labels == name).any():
                points(ax, xy[labels == name], styles[name])
        plane(ax, ("UMAP 1", "UMAP 2"))
        ax.set_title(f"{title}: {len(xy)} cells", fontsize=10)
        share = pd.Series(labels).value_counts(normalize=True)
        top = ", ".join(f"{n} {100 * v:.0f} %" for n, v in share.head(3).items())
        tell(ax, f"{title}: {len(xy)} cells of {len(share)} types, mostly {top}.")
    for ax in axes[1:]:
        ax.set(xlim=axes[0].get_xlim(), ylim=axes[0].get_ylim())
    for name in sorted(set(real)):
        points(axes[-1], np.full((1, 2), np.nan), styles[name], label=name)
    legend(axes[-1], markerscale=1.6)
    return axes


_MET = (
    "A real cell is met when a generated cell is nearer to it than its fifth real "
    "neighbour."
)


def filmstrip(
    snapshots: Mapping[int, np.ndarray],
    real: np.ndarray,
    *,
    names: tuple[str, str] = ("x", "y"),
    unit: str = "step",
) -> np.ndarray:
    """Draw generated cells at several training steps on the same axes.

    The axes are those of the real cells, so that the panels can be compared. A
    panel says how many generated cells lie beyond them.

    Parameters
    ----------
    snapshots
        Training step to generated cells, shape (n_cells, 2) each; five by custom.
    real
        Real cells in grey, shape (n_cells, 2).
    """
    from sklearn.neighbors import NearestNeighbors

    axes = new_axes(1, len(snapshots), (2.0 * len(snapshots), 2.3), squeeze=False)[0]
    near = NearestNeighbors(n_neighbors=6).fit(real).kneighbors(real)[0][:, 5]
    pad = 0.15 * np.ptp(real, axis=0)
    low, high = real.min(axis=0) - pad, real.max(axis=0) + pad
    for ax, (step, cells) in zip(axes, snapshots.items(), strict=True):
        points(ax, real, ("#CCCCCC", "o"), s=7)
        points(ax, cells, (GENERATED, "^"), s=9)
        plane(ax, names)
        ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), title=f"{unit} {step:,}")
        gap = NearestNeighbors(n_neighbors=1).fit(cells).kneighbors(real)[0][:, 0]
        text = f"{unit} {step:,}: {100 * float((gap <= near).mean()):.0f} % met"
        outside = int(((cells < low) | (cells > high)).any(axis=1).sum())
        if outside:
            count = f"{outside} of" if outside < len(cells) else "all"
            text += f"; {count} {len(cells)} generated cells lie outside the panel"
            note = f"{count} {len(cells)} outside"
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
            place = {"transform": ax.transAxes, "ha": "center", "bbox": ground}
            ax.text(0.5, 0.03, note, fontsize=8, **place)
        lead = [_MET] if ax is axes[0] else []
        tell(ax, *lead, text + ".")
    for ax in axes[1:]:
        ax.set_ylabel("")
    return axes


# --- training -------------------------------------------------------------------


def learning_curves(
    history: pd.DataFrame,
    *,
    terms: Sequence[str] | None = None,
    landmarks: Mapping[str, float] | None = None,
    unit: str = "loss (nats)",
    ax: Axes | None = None,
) -> Axes:
    """Draw the terms of a training history against the step.

    Parameters
    ----------
    history
        Tidy: step, phase, term, value (`model.history_`).
    terms
        Which terms; all when left out.
    landmarks
        Values with a meaning, drawn as dashed lines under these names.
    """
    known = list(dict.fromkeys(history["term"]))
    for term in terms or ():
        if term not in known:
            raise unknown("term", term, known, error=DataError)
    ax = new_axes() if ax is None else ax
    sentences = []
    for i, term in enumerate(terms or known):
        curve = history[history["term"] == term]
        colour = COLOURS[i % len(COLOURS)]
        # The dash pattern says the same as the colour.
        dash = ("-", (0, (6, 2)), (0, (2, 2)), "-.")[i % 4]
        look: dict[str, Any] = {"color": colour, "lw": 1.4, "ls": dash, "label": term}
        ax.plot(curve["step"], curve["value"], **look)
        tail = max(1, len(curve) // 10)
        first, last = curve["value"].head(tail).mean(), curve["value"].tail(tail).mean()
        sentences.append(f"{term}: from {rounded(first)} to {rounded(last)}.")
    for name, value in (landmarks or {}).items():
        ax.axhline(value, color="#555555", lw=0.9, ls="--")
        x = ax.get_xlim()[1]
        ax.annotate(name, (x, value), ha="right", va="bottom", fontsize=8)
    ax.set(xlabel="training step", ylabel=unit)
    legend(ax)
    tell(ax, *sentences)
    return ax


# --- results over seeds ---------------------------------------------------------


def dial(
    table: pd.DataFrame,
    x: str,
    ys: Mapping[str, str] | Sequence[str],
    *,
    xlabel: str | None = None,
) -> np.ndarray:
    """Draw what one setting trades: a panel per measure, a point per seed.

    Parameters
    ----------
    table
        Tidy, one row per setting and seed.
    x
        Column of the setting.
    ys
        Columns of the measures, or a dict from column to axis label.
    """
    labels = dict(ys) if isinstance(ys, Mapping) else {y: y for y in ys}
    axes = new_axes(
        len(labels), 1, (5.6, 2.1 * len(labels)), sharex=True, squeeze=False
    )
    for i, (ax, (y, label)) in enumerate(zip(axes[:, 0], labels.items(), strict=True)):
        colour = COLOURS[(0, 3, 2, 4)[i % 4]]
        mean = table.groupby(x)[y].mean()
        ax.plot(mean.index, mean, color=colour, lw=1.5)
        ax.scatter(table[x], table[y], color=colour, s=14, alpha=0.7, linewidths=0)
        ax.set_ylabel(label)
        best, worst = mean.idxmax(), mean.idxmin()
        ends = f"{rounded(mean.iloc[0])} to {rounded(mean.iloc[-1])}"
        tell(
            ax,
            f"{label}: {ends} as {xlabel or x} goes from {mean.index[0]} to "
            f"{mean.index[-1]}; highest at {best}, lowest at {worst} (means).",
        )
    axes[-1, 0].set_xlabel(xlabel or x)
    return axes[:, 0]


def contest(
    table: pd.DataFrame,
    metric: str,
    *,
    arm: str = "arm",
    label: str | None = None,
    floor: Sequence[float] | None = None,
    ceiling: Sequence[float] | None = None,
    floor_name: str = "floor",
    ceiling_name: str = "real against real",
    order: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw every seed of every arm as a dot, with floor and ceiling as bands.

    A bar marks the median of an arm. Dots of one arm lie a little apart, in the
    order of the table, so that equal seeds do not hide each other.

    Parameters
    ----------
    table
        Tidy, one row per arm and seed.
    metric, arm
        Columns of the measure and of the arm's name.
    label
        Axis label of the measure, with its unit and which way is better.
    floor, ceiling
        Values over the seeds of what anything should beat, and of real cells
        against real cells; each is drawn as a band from its smallest to largest.
    floor_name, ceiling_name
        Names of the two bands.
    order
        Arms from top to bottom; by median when left out.
    """
    medians = table.groupby(arm, observed=True)[metric].median()
    names = list(order or medians.sort_values(ascending=False).index)
    alone = ax is None
    ax = new_axes(size=(6.2, 0.9 + 0.36 * len(names))) if ax is None else ax
    ranks = "; ".join(f"{n} {rounded(medians[n])}" for n in names)
    sentences = [f"{label or metric}, median over the dots: {ranks}."]
    bands = (  # told apart without colour too
        (floor_name, floor, "#F0C9A8", "//"),
        (ceiling_name, ceiling, "#B9D8EC", ""),
    )
    for name, band, colour, hatch in bands:
        if band is None or not len(band):
            continue
        low, high = float(np.min(band)), float(np.max(band))
        pad = 0.004 * (float(np.ptp(table[metric])) or 1.0) * (high == low)
        low_high = (low - pad, high + pad)
        ax.axvspan(*low_high, fc=colour, ec="white", hatch=hatch, lw=0, label=name)
        sides = {
            "Above": [n for n in names if medians[n] > high],
            "Within": [n for n in names if low <= medians[n] <= high],
            "Below": [n for n in names if medians[n] < low],
        }
        where = [f"{s} it: {'; '.join(arms)}." for s, arms in sides.items() if arms]
        reach = rounded(low) + (f" to {rounded(high)}" if high > low else "")
        sentences.append(f"The band ({name}): {reach}. {' '.join(where)}")
    for row, name in enumerate(names):
        values = table.loc[table[arm] == name, metric].to_numpy(float)
        apart = np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else np.zeros(1)
        ax.scatter(values, row + apart, s=16, alpha=0.8, color="#0072B2")
        of_all = None if row or not alone else "median"
        x, y = [medians[name]] * 2, [row - 0.3, row + 0.3]
        ax.plot(x, y, color="black", lw=1.6, label=of_all)
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel=label or metric)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="x", color="#E5E5E5", lw=0.6)
    ax.set_axisbelow(True)
    if ax.get_legend_handles_labels()[0]:
        legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1), ncol=3)
    tell(ax, *sentences)
    return ax


def bars(
    values: pd.Series,
    *,
    base: float | pd.Series | None = None,
    base_name: str = "base rate",
    label: str = "value",
) -> Axes:
    """Draw one horizontal bar per entry, with what to compare it to.

    `base` is one number, drawn as a line, or one for each entry, drawn as ticks.
    """
    ax = new_axes(size=(6, 0.9 + 0.28 * len(values)))
    ax.barh([str(n) for n in values.index], values.to_numpy(float), color="#56B4E9")
    ax.invert_yaxis()
    ax.set_xlabel(label)
    text = f"{label}: highest {values.idxmax()} ({rounded(values.max())}), "
    text += f"lowest {values.idxmin()} ({rounded(values.min())})"
    if base is not None:
        if isinstance(base, pd.Series):
            each: Any = base[values.index]
            said = f"their {base_name}"
            ax.scatter(
                each, range(len(each)), s=120, c="k", marker="|", label=base_name
            )
        else:
            each, said = base, f"the {base_name} ({rounded(base)})"
            ax.axvline(base, color="black", ls="--", lw=1, label=base_name)
        legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1))
        text += f"; {int((values > each).sum())} of {len(values)} above {said}"
    tell(ax, text + ".")
    return ax


def heatmap(
    table: pd.DataFrame,
    *,
    label: str,
    names: tuple[str, str] = ("", ""),
    limits: tuple[float | None, float | None] = (None, None),
    digits: int | None = None,
) -> Axes:
    """Draw a table as colours, with its numbers when `digits` is given.

    What is missing stays blank.
    `label` names the colour bar; `names` the columns' and the rows' axis.
    """
    rows, columns = table.shape
    ax = new_axes(size=(2.6 + 0.45 * columns, 1.6 + 0.3 * rows))
    image = ax.imshow(
        table, cmap="cividis", vmin=limits[0], vmax=limits[1], aspect="auto"
    )
    ax.set_xticks(
        range(columns), [str(c) for c in table.columns], rotation=45, ha="right"
    )
    ax.set_yticks(range(rows), [str(r) for r in table.index])
    ax.set(xlabel=names[0], ylabel=names[1])
    if digits is not None:
        middle = float(np.mean(image.get_clim()))
        for (i, j), value in np.ndenumerate(table.to_numpy(float)):
            colour = "black" if value > middle else "white"
            text = "" if np.isnan(value) else f"{value:.{digits}f}"
            ax.text(j, i, text, ha="center", va="center", color=colour)
    ax.figure.colorbar(image, ax=ax, label=label)
    stacked: Any = table.stack()
    top, bottom = stacked.idxmax(), stacked.idxmin()
    tell(
        ax,
        f"{label}: highest {rounded(stacked.max())} at {top[0]}, {top[1]}; "
        f"lowest {rounded(stacked.min())} at {bottom[0]}, {bottom[1]}.",
    )
    return ax


# --- genes, real and generated --------------------------------------------------


def marker_dots(
    real: AnnData,
    generated: AnnData,
    genes: Sequence[str],
    *,
    label_key: str = "cell_type",
) -> np.ndarray:
    """Draw marker genes by type: colour is mean expression, size the share above 0.

    Parameters
    ----------
    real, generated
        Log1p-normalised cells with labels.
    genes
        Names of the genes, present in both.
    """
    sets = {"real": real, "generated": generated}
    for title, adata in sets.items():
        missing = [g for g in genes if g not in adata.var_names]
        if missing:
            raise unknown(f"gene in the {title} cells", missing[0], adata.var_names)
    types = sorted({str(t) for a in sets.values() for t in a.obs[label_key]})
    means, shares = {}, {}
    for title, adata in sets.items():
        values = sparse.csr_matrix(adata[:, list(genes)].X).toarray()
        by_type = adata.obs[label_key].astype(str).to_numpy()
        frame = pd.DataFrame(values, columns=list(genes))
        means[title] = frame.groupby(by_type).mean().reindex(types)
        shares[title] = (frame > 0).groupby(by_type).mean().reindex(types)
    top = max(float(np.nanmax(m.to_numpy())) for m in means.values())
    size = (0.5 * len(genes) + 4.4, 1.5 + 0.3 * len(types))
    axes = new_axes(1, 2, size, sharey=True)
    column, row = np.meshgrid(range(len(genes)), range(len(types)))
    for ax, title in zip(axes, sets, strict=True):
        dots = ax.scatter(
            column.ravel(),
            row.ravel(),
            s=110 * shares[title].fillna(0).to_numpy().ravel(),
            c=means[title].fillna(0).to_numpy().ravel(),
            cmap="viridis_r",
            vmin=0,
            vmax=top,
        )
        ax.set_xticks(range(len(genes)), list(genes), rotation=60, ha="right")
        ax.set(
            title=title, xlim=(-0.6, len(genes) - 0.4), ylim=(len(types) - 0.4, -0.6)
        )
    axes[0].set_yticks(range(len(types)), types)
    axes[0].figure.colorbar(dots, ax=axes, label="mean log1p expression", shrink=0.7)
    for share in (0.25, 1.0):
        axes[-1].scatter([], [], s=110 * share, c=REAL, label=f"{100 * share:.0f} %")
    legend(axes[-1], title="cells above 0")
    best = "; ".join(f"{g} in {t}" for g, t in means["real"].idxmax().items())
    tell(axes[0], f"Real cells, each gene highest in: {best}.")
    gap: Any = (means["generated"] - means["real"]).abs().stack()
    of_type, gene = gap.idxmax()
    tell(
        axes[1],
        f"Generated against real: largest gap {rounded(gap.max())} "
        f"({gene} in {of_type}), mean gap {rounded(gap.mean())}.",
    )
    return axes


def moments(real: Any, generated: Any) -> np.ndarray:
    """Draw each gene's variance and zero fraction against its mean.

    Parameters
    ----------
    real, generated
        AnnData or matrix, shape (n_cells, n_genes), the same genes in both, on
        the log1p scale.
    """
    from scgenlib.metrics import gene_moments

    table = gene_moments(real, generated)
    axes = new_axes(1, 2, (8.2, 3.4))
    for end, name, style in (
        ("real", "real", (REAL, "o")),
        ("fake", "generated", (GENERATED, "^")),
    ):
        for ax, what in zip(axes, ("variance", "zeros"), strict=True):
            xy = table[[f"mean_{end}", f"{what}_{end}"]].to_numpy()
            points(ax, xy, style, s=9, alpha=0.6, label=name)
    axes[0].set(xlabel="mean log1p expression", ylabel="variance over cells")
    axes[1].set(
        xlabel="mean log1p expression", ylabel="share of zeros", ylim=(-0.03, 1.03)
    )
    legend(axes[1], markerscale=2)
    for ax, what in zip(axes, ("variance", "zeros"), strict=True):
        a, b = table[f"{what}_real"], table[f"{what}_fake"]
        tell(
            ax,
            f"{what.capitalize()}, mean over genes: real {rounded(a.mean())}, "
            f"generated {rounded(b.mean())}; "
            f"largest gap {rounded(np.abs(a - b).max())}.",
        )
    return axes
