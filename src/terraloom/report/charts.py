"""Charts of the report, drawn with matplotlib's ``Figure`` on the Agg canvas.

No global state, no display, no date in the file: the same input makes the same bytes. Numbers of
a chart also stand in a table beside it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MplPath
from PIL import Image

from terraloom.report.figures import Picture
from terraloom.report.formats import Interval

__all__ = [
    "area_chart", "choropleth", "confusion_chart", "coverage_chart", "curves_chart",
    "folds_chart", "reliability_chart", "skill_chart", "tiles_chart",
]  # fmt: skip

INK, MUTED, RULE, ACCENT, WARM = "#1d2a33", "#66747f", "#d9dfe3", "#17645c", "#b4572b"
_STYLE = {"size": 9.0, "family": "DejaVu Sans"}
_DPI = 200
_WIDTH_IN = 5.2
FOLD_COLORS = (
    "#17645c", "#d08c3f", "#5b6fa8", "#a8475b", "#7a9a3c", "#8a6bb0", "#3f93a0", "#b4572b",
)  # fmt: skip


def _canvas(height_in: float, width_in: float = _WIDTH_IN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=MUTED, length=0, labelsize=_STYLE["size"])
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    return figure, axes


def _finish(figure: Figure, alt: str) -> Picture:
    buffer = io.BytesIO()
    # Naming the software would tie the bytes to a version of matplotlib, not to the content.
    figure.savefig(buffer, format="png", facecolor="none", metadata={"Software": None})
    image = Image.open(buffer)
    width, height = image.size
    text = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/png;base64,{text}", width, height, alt)


def _text(name: str, longest: int = 26) -> str:
    """A name as literal label: no mathtext, cut where it would crowd out the chart."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return cut.replace("$", r"\$")


def _rows(axes: Axes, names: Sequence[str]) -> npt.NDArray[np.float64]:
    y = np.arange(len(names), dtype=float)
    axes.set_yticks(y, [_text(n) for n in names])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    return y


def _whisker(axes: Axes, y: float, value: Interval, color: str, scale: float) -> None:
    if value.has_range:
        ends = [scale * value.low, scale * value.high]
        axes.plot(ends, [y, y], color=color, lw=2.2, alpha=0.55, solid_capstyle="round")
    if value.known:
        axes.plot([scale * value.value], [y], "o", color=color, ms=6.2, mec="white", mew=0.9)


def skill_chart(names: Sequence[str], measures: Mapping[str, Sequence[Interval]]) -> Picture:
    """Dots and whiskers of up to three measures per class, 0-100 %.

    Args:
        names: K class names.
        measures: Name of the measure to its K intervals (shares 0-1; NaN is left out).
    """
    figure, axes = _canvas(0.95 + 0.52 * len(names))
    y = _rows(axes, names)
    colors = (ACCENT, WARM, "#5b6fa8")
    offsets = np.linspace(-0.22, 0.22, len(measures)) if len(measures) > 1 else np.zeros(1)
    for (label, values), color, shift in zip(measures.items(), colors, offsets, strict=False):
        for row, value in zip(y, values, strict=True):
            _whisker(axes, row + shift, value, color, 100)
        axes.plot([], [], color=color, marker="o", ms=6.2, lw=2.2, mec="white", label=label)
    known = [v for vs in measures.values() for v in vs if v.known]
    least = min((100 * (v.low if v.has_range else v.value) for v in known), default=0.0)
    axes.set_xlim(max(0.0, 10 * math.floor(least / 10 - 0.3)), 101)
    axes.xaxis.set_major_formatter("{x:.0f}%")
    figure.legend(
        loc="outside upper left", ncols=3, frameon=False, fontsize=_STYLE["size"], labelcolor=INK
    )
    return _finish(figure, "Held-out skill per class with intervals; the table has the numbers")


def confusion_chart(matrix: npt.NDArray[np.float64], names: Sequence[str]) -> Picture:
    """Confusion matrix as heat map, each row in percent of the row's reference pixels.

    Args:
        matrix: (K, K) counts, rows reference, columns map.
        names: K class names.
    """
    k = len(names)
    total = matrix.sum(axis=1, keepdims=True)
    share = 100 * np.divide(matrix, total, out=np.zeros_like(matrix), where=total > 0)
    figure, axes = _canvas(1.15 + 3.9 * min(1.0, 0.45 + 0.09 * k))
    right = LinearSegmentedColormap.from_list("right", ["#f3f6f4", "#8fbdb3", ACCENT, "#0c3a36"])
    axes.imshow(share, cmap=right, vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(np.arange(k), [_text(n, 18) for n in names], rotation=38, ha="right")
    axes.set_yticks(np.arange(k), [_text(n, 22) for n in names])
    axes.tick_params(labelcolor=INK, labelsize=8.5)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(k + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(k + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("what the model said", color=MUTED, fontsize=_STYLE["size"])
    axes.set_ylabel("what the labels say", color=MUTED, fontsize=_STYLE["size"])
    for (r, c), value in np.ndenumerate(share) if k <= 12 else ():
        if total[r, 0] > 0 and value >= 0.05:
            color = "white" if value > 45 else INK if value >= 1 else MUTED
            text = f"{value:.0f}" if value >= 0.95 else "<1"
            axes.text(c, r, text, ha="center", va="center", color=color, fontsize=8.5)
    return _finish(figure, "Confusion matrix, each row in percent of the reference pixels")


def reliability_chart(curves: Mapping[str, npt.NDArray[np.float64]]) -> Picture:
    """Confidence against accuracy; below, how many pixels carry each confidence.

    Args:
        curves: Name to (bins, 3) array of confidence, accuracy (0-1) and count.
    """
    figure, axes = _canvas(4.3)
    axes.plot([0, 100], [0, 100], color=MUTED, lw=1, ls=(0, (4, 4)))
    colors = (ACCENT, WARM, "#5b6fa8")
    lowest = 100.0
    twin = axes.inset_axes((0.0, -0.42, 1.0, 0.2))
    for n, (label, bins) in enumerate(curves.items()):
        full = bins[bins[:, 2] > 0]
        if not len(full):
            continue
        lowest = min(lowest, 100 * float(full[:, :2].min()))
        size = 14 + 90 * full[:, 2] / full[:, 2].max()
        axes.plot(100 * full[:, 0], 100 * full[:, 1], color=colors[n % 3], lw=1.6)
        axes.scatter(
            100 * full[:, 0], 100 * full[:, 1], s=size, color=colors[n % 3], edgecolor="white",
            linewidth=0.9, zorder=3, label=_text(label),
        )  # fmt: skip
        if n == len(curves) - 1:
            twin.bar(100 * full[:, 0], full[:, 2], width=3.2, color=colors[n % 3], alpha=0.45)
    start = max(0.0, 10 * math.floor(lowest / 10))
    axes.set(xlim=(start, 101), ylim=(start, 101))
    axes.xaxis.set_major_formatter("{x:.0f}%")
    axes.yaxis.set_major_formatter("{x:.0f}%")
    axes.grid(color=RULE, linewidth=0.8)
    axes.set_ylabel("was right", color=MUTED, fontsize=_STYLE["size"])
    axes.set_xlabel("model's confidence", color=MUTED, fontsize=_STYLE["size"])
    twin.set(xlim=(start, 101), yticks=[], xticks=[])
    twin.spines[:].set_visible(False)
    twin.set_facecolor("none")
    twin.set_title("pixels at each confidence", fontsize=8, color=MUTED, loc="left", pad=2)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=_STYLE["size"], labelcolor=INK, loc="upper left")
    return _finish(figure, "Reliability curve: confidence against the share that was right")


def area_chart(
    names: Sequence[str], mapped: Sequence[float], estimates: Sequence[Interval],
    truth: Sequence[float],
) -> Picture:  # fmt: skip
    """Area per class: map, estimate with interval, and truth where it is known (hectares).

    Args:
        names: K class names.
        mapped: K map areas.
        estimates: K design-based estimates; NaN where there is none.
        truth: K true areas; NaN where unknown.
    """
    figure, axes = _canvas(0.95 + 0.5 * len(names))
    y = _rows(axes, names)
    for row, value in zip(y, estimates, strict=True):
        _whisker(axes, row, value, ACCENT, 1)
    if not any(e.known for e in estimates):
        axes.barh(y, mapped, height=0.34, color=WARM, alpha=0.22, lw=0)
    axes.plot(mapped, y, ls="", marker="|", ms=15, mew=2, color=WARM, label="map area")
    if any(e.known for e in estimates):
        axes.plot([], [], color=ACCENT, marker="o", ms=6, lw=2.2, mec="white", label="estimate")
    if any(math.isfinite(t) for t in truth):
        axes.plot(truth, y, ls="", marker="D", ms=5, mfc="none", mec=INK, mew=1.3, label="truth")
    axes.set_xlim(left=0)
    axes.set_xlabel("hectares", color=MUTED, fontsize=_STYLE["size"])
    figure.legend(
        loc="outside upper left", ncols=3, frameon=False, fontsize=_STYLE["size"], labelcolor=INK
    )
    return _finish(figure, "Area per class; the table has the numbers")


def folds_chart(
    rings: Sequence[tuple[int, npt.NDArray[np.float64]]], bounds: tuple[float, float, float, float]
) -> tuple[Picture, dict[int, str]]:
    """Label polygons coloured by the fold that they are held out in.

    Args:
        rings: Fold and outer ring (V, 2) of each polygon, in metres of the grid's CRS.
        bounds: Left, bottom, right, top of the map, metres.

    Returns:
        The picture, and the colour of each fold.
    """
    left, bottom, right, top = bounds
    aspect = (top - bottom) / (right - left)
    figure = Figure(figsize=(_WIDTH_IN, min(_WIDTH_IN * aspect, 7.5)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], facecolor="#eef0ed")
    axes.set_aspect("equal", adjustable="box")
    axes.spines[:].set_visible(False)
    folds = sorted({f for f, _ in rings})
    colors = {f: FOLD_COLORS[n % len(FOLD_COLORS)] for n, f in enumerate(folds)}
    for fold in folds:
        shapes = [r for f, r in rings if f == fold]
        axes.add_collection(
            PolyCollection(shapes, facecolor=colors[fold], edgecolor=colors[fold], linewidth=1.2)
        )
    return _finish(figure, "Label polygons, coloured by fold"), colors


def curves_chart(curves: Mapping[str, npt.NDArray[np.float64]]) -> Picture:
    """Loss of training by step, one panel per task since losses of tasks have no common unit.

    Args:
        curves: Name of the task to (steps, 2) array of step and mean loss of all members.
    """
    n = len(curves)
    figure = Figure(figsize=(_WIDTH_IN, 0.35 + 1.45 * n), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    for row, (name, points) in enumerate(curves.items()):
        axes = figure.add_subplot(n, 1, row + 1)
        axes.plot(points[:, 0], points[:, 1], color=ACCENT, lw=1.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        axes.tick_params(colors=MUTED, length=0, labelsize=8)
        axes.set_facecolor("none")
        axes.grid(color=RULE, linewidth=0.8)
        axes.set_title(_text(name), fontsize=_STYLE["size"], color=INK, loc="left", pad=3)
        axes.margins(x=0.01)
        if row == n - 1:
            axes.set_xlabel("step of training", color=MUTED, fontsize=_STYLE["size"])
    return _finish(figure, "Learning curves: mean loss of the networks by step")


def coverage_chart(names: Sequence[str], shares: Sequence[Interval], target: float) -> Picture:
    """How often sets of classes held the label, per class, against what was asked for.

    Args:
        names: K class names.
        shares: K shares 0-1 with intervals; NaN where a class has no label.
        target: Share that was asked for, 0-1.
    """
    figure, axes = _canvas(0.85 + 0.42 * len(names))
    y = _rows(axes, names)
    axes.axvline(100 * target, color=WARM, lw=1.4, ls=(0, (4, 3)), label="asked for")
    for row, value in zip(y, shares, strict=True):
        _whisker(axes, row, value, ACCENT, 100)
    known = [v.low if v.has_range else v.value for v in shares if v.known]
    least = min([100 * v for v in known] + [100 * target])
    axes.set_xlim(max(0.0, 10 * math.floor(least / 10 - 0.3)), 101)
    axes.xaxis.set_major_formatter("{x:.0f}%")
    figure.legend(loc="outside upper left", frameon=False, fontsize=_STYLE["size"], labelcolor=INK)
    return _finish(figure, "Coverage of the sets per class; the table has the numbers")


def choropleth(
    shapes: Sequence[Any], values: npt.NDArray[np.float64], color: str, alt: str
) -> tuple[Picture, float]:
    """Regions coloured by a value, from nearly white to a colour.

    Args:
        shapes: N polygons in a projected coordinate system; larger ones are drawn first.
        values: (N,) values; NaN is drawn grey.
        color: ``#rrggbb`` of the largest value.
        alt: What it shows.

    Returns:
        The picture, and the value of the full colour.
    """
    order = np.argsort([-s.area for s in shapes], kind="stable")
    bounds = np.array([s.bounds for s in shapes])
    left, bottom = bounds[:, :2].min(axis=0)
    right, top = bounds[:, 2:].max(axis=0)
    aspect = (top - bottom) / max(right - left, 1e-9)
    width = 3.4
    figure = Figure(figsize=(width, min(max(width * aspect, 0.8), 5.0)), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    pad = 0.01 * (right - left)
    axes.set(xlim=(left - pad, right + pad), ylim=(bottom - pad, top + pad))
    axes.set_aspect("equal")
    most = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
    ramp = LinearSegmentedColormap.from_list("class", ["#f6f6f3", color])
    for n in order:
        known = np.isfinite(values[n])
        fill = ramp(values[n] / most if most > 0 else 0.0) if known else "#b9bfc2"
        for part in getattr(shapes[n], "geoms", [shapes[n]]):
            ring = np.asarray(part.exterior.coords)[:, :2]
            holes = [np.asarray(i.coords)[:, :2] for i in part.interiors]
            axes.add_patch(
                PathPatch(_path([ring, *holes]), facecolor=fill, edgecolor=MUTED, lw=0.7)
            )
    return _finish(figure, alt), most


def _path(rings: Sequence[npt.NDArray[np.float64]]) -> MplPath:
    """Outer ring and holes as one path, so that holes stay open."""
    codes = [
        np.r_[MplPath.MOVETO, np.full(len(r) - 2, MplPath.LINETO), MplPath.CLOSEPOLY] for r in rings
    ]
    return MplPath(np.concatenate(rings), np.concatenate(codes))


def tiles_chart(
    places: Sequence[tuple[int, int]], values: Mapping[str, Sequence[float]], unit: str, alt: str
) -> Picture:
    """One small map of tiles per period, all on one scale.

    Args:
        places: Column and row of N tiles.
        values: Period to N values.
        unit: What the values are, for the colour bar.
        alt: What it shows.
    """
    at = np.array(places) - np.min(places, axis=0)
    width, height = at.max(axis=0) + 1
    across = min(4, len(values))
    down = -(-len(values) // across)
    each = _WIDTH_IN * 1.9 / across
    figure = Figure(
        figsize=(each * across, (each * min(height / width, 1.6) * 0.86 + 0.25) * down + 0.5),
        dpi=_DPI, layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    most = max((v for row in values.values() for v in row), default=0.0)
    ramp = LinearSegmentedColormap.from_list("dates", ["#f3ede2", "#8fbdb3", ACCENT, "#0c3a36"])
    shown = None
    for n, (period, row) in enumerate(values.items()):
        axes = figure.add_subplot(down, across, n + 1)
        grid = np.full((height, width), np.nan)
        grid[at[:, 1], at[:, 0]] = row
        shown = axes.imshow(grid, cmap=ramp, vmin=0, vmax=max(most, 1.0), interpolation="none")
        axes.set(xticks=[], yticks=[], facecolor="none")
        axes.spines[:].set_color(RULE)
        axes.set_title(_text(period), fontsize=_STYLE["size"], color=INK, loc="left", pad=3)
    if shown is not None:
        bar = figure.colorbar(
            shown, ax=figure.axes, orientation="horizontal", shrink=0.35, aspect=30, pad=0.03
        )
        bar.set_label(unit, color=MUTED, fontsize=_STYLE["size"])
        bar.ax.tick_params(colors=MUTED, length=0, labelsize=8)
        bar.outline.set_visible(False)
    return _finish(figure, alt)
