"""The plots of all reports: rows of bars, stacked bars, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scalellm.report.figures import INK, WIDTH_IN, styled

COLOURS = (
    "#3b82c4",
    "#e08a2e",
    "#3f9d5d",
    "#9b6fd0",
    "#d9534f",
    "#2aa6a6",
    "#d46aa8",
    "#8f8f2f",
    "#8a94a3",
    "#a5714b",
)
_ROW_IN = 0.25  # a bar with its label
_LONGEST_LABEL = 44  # characters
_MOST_POINTS = 1000  # of a line: more would be narrower than a pixel


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Args:
        value: length of the bar; None: `note` stands in its place.
        text: written at its end.
        low, high: ends of the whisker.
        mark: where a thick tick is drawn, such as theory.
        points: a small circle each, such as every rank's figure.
    """

    label: str
    value: float | None
    text: str = ""
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    points: Sequence[float] = ()
    colour: str = COLOURS[0]
    note: str = ""


@dataclass(frozen=True)
class Stack:
    """A row of a stacked bar chart: a length for every part, and what is hatched of them.

    `mark` is where a thick tick is drawn, such as what was measured.
    """

    label: str
    parts: Sequence[float]
    text: str = ""
    hatched_from: float = 0.0
    hatched_to: float = 0.0
    mark: float | None = None


@dataclass(frozen=True)
class Line:
    """A curve; one without a label is not in the legend. A value that is None leaves a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    dashed: bool = False
    faint: bool = False
    markers: bool = False


@styled
def bars(
    rows: Sequence[Bar],
    axis: str,
    *,
    mark: str = "",
    points: str = "",
    reference: float | None = None,
) -> Any:
    """Draws horizontal bars from top to bottom.

    Args:
        mark, points: what these stand for, in the legend.
        reference: where a dashed line goes across all bars.
    """
    figure, axes = _figure_of_rows([row.label for row in rows])
    ends = [reference or 0.0]
    for y, row in enumerate(rows):
        if row.value is None:
            axes.text(0, y, f" {_shortened(row.note)}", va="center", style="italic", alpha=0.8)
            continue
        axes.barh(y, row.value, height=0.72, color=row.colour)
        ends_of_row = (row.value, row.low, row.high, row.mark, reference)
        extents = [x for x in ends_of_row if x is not None]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=INK, linewidth=1.6)
        if row.mark is not None:
            axes.plot([row.mark, row.mark], [y - 0.42, y + 0.42], color=INK, linewidth=2.2)
        if len(row.points) > 1:
            extents += row.points
            axes.plot(row.points, [y] * len(row.points), "o", color=INK, markersize=3, mfc="none")
        ends.append(max(extents))
        _write_beside(axes, max(extents), y, row.text)
    if reference is not None:
        axes.axvline(reference, color=INK, linestyle="--", linewidth=1)
    axes.set_xlim(0, max(ends) * _room_for([row.text for row in rows]) or 1)
    axes.set_xlabel(axis)
    handles = []
    if mark:
        handles.append(_key(mark, linestyle="", marker="|", markersize=11, markeredgewidth=2.2))
    if points:
        handles.append(_key(points, linestyle="", marker="o", markersize=4, mfc="none"))
    _legend(figure, handles)
    return figure


@styled
def stacks(
    rows: Sequence[Stack],
    parts: Sequence[str],
    axis: str,
    *,
    hatched: str = "",
    mark: str = "",
    reference: float | None = None,
    reference_name: str = "",
) -> Any:
    """Draws stacked horizontal bars.

    Args:
        hatched, mark, reference_name: what these stand for, in the legend.
        reference: where a dashed line goes across all bars.
    """
    from matplotlib.patches import Patch

    figure, axes = _figure_of_rows([row.label for row in rows])
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(parts))]
    ends = [reference or 0.0]
    for y, row in enumerate(rows):
        start = 0.0
        for length, colour in zip(row.parts, colours, strict=True):
            axes.barh(y, length, left=start, height=0.72, color=colour)
            start += length
        inside = row.hatched_to - row.hatched_from
        if inside > 0:
            style = {"facecolor": "none", "edgecolor": INK, "linewidth": 0}
            axes.barh(y, inside, left=row.hatched_from, height=0.72, hatch="////", **style)
        if row.mark is not None:
            axes.plot([row.mark, row.mark], [y - 0.42, y + 0.42], color=INK, linewidth=2.2)
        ends.append(max(start, row.mark or 0.0))
        _write_beside(axes, ends[-1], y, row.text)
    if reference is not None:
        axes.axvline(reference, color=INK, linestyle="--", linewidth=1)
    axes.set_xlim(0, max(ends) * _room_for([row.text for row in rows]) or 1)
    axes.set_xlabel(axis)
    handles: list[Any] = [Patch(color=c, label=p) for p, c in zip(parts, colours, strict=True)]
    if hatched:
        handles.append(Patch(facecolor="none", edgecolor=INK, hatch="////", label=hatched))
    if mark:
        handles.append(_key(mark, linestyle="", marker="|", markersize=11, markeredgewidth=2.2))
    if reference_name:
        handles.append(_key(reference_name, linestyle="--", linewidth=1))
    _legend(figure, handles)
    return figure


@styled
def lines(series: Sequence[Line], x_label: str, y_label: str, *, log_y: bool = False) -> Any:
    """Draws curves over each other."""
    labelled = [line for line in series if line.label]
    figure, axes = _figure(3.2 + 0.09 * len(labelled))
    for line in series:
        x, y = _thinned(line)
        axes.plot(
            x,
            y,
            color=line.colour,
            alpha=0.25 if line.faint else 0.9,
            linestyle="--" if line.dashed else "-",
            linewidth=1 if line.faint else 1.6,
            marker="o" if line.markers or len(x) == 1 else None,
            markersize=4,
        )
    if log_y:
        _label_decades(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid()
    if all(isinstance(x, int) for line in series for x in line.x):
        axes.xaxis.get_major_locator().set_params(integer=True)
    handles = [
        _key(
            _shortened(line.label),
            color=line.colour,
            linestyle="--" if line.dashed else "-",
            marker="o" if line.markers else None,
            markersize=4,
        )
        for line in labelled
    ]
    _legend(figure, handles)
    return figure


def _label_decades(axes: Any) -> None:
    """Makes the axis logarithmic; one too short for two powers of ten has labels between them."""
    axes.set_yscale("log", subs=[2, 5])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.yaxis.set_minor_formatter("{x:.0e}" if high < 100 * low else "")


def _figure_of_rows(labels: Sequence[str]) -> tuple[Any, Any]:
    figure, axes = _figure(1.0 + _ROW_IN * len(labels))
    axes.set_yticks(range(len(labels)), [_shortened(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.get_major_locator().set_params(nbins=6)
    axes.grid(axis="x")
    return figure, axes


def _figure(height_in: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    return figure, figure.subplots()


def _room_for(texts: Sequence[str]) -> float:
    """Returns how much longer than its longest bar an axis must be for what is written there."""
    return 1.08 + 0.018 * max(map(len, texts), default=0)


def _write_beside(axes: Any, x: float, y: float, text: str) -> None:
    style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
    axes.annotate(text, (x, y), (5, 0), **style)


def _key(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    # matplotlib leaves out of the legend what begins with an underscore.
    label = f" {label}" if label.startswith("_") else label
    return Line2D([], [], label=label, **{"color": INK, **style})


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """Puts the legend below, where it hides no curve, in as many columns as its words allow."""
    if handles:
        longest = max(len(handle.get_label()) for handle in handles)
        columns = max(1, min(len(handles), int(84 / (longest + 7))))
        figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8)


def _shortened(label: str) -> str:
    """Returns a long label without its middle: what tells cells apart is at both ends."""
    label = " ".join(label.split())
    if len(label) <= _LONGEST_LABEL:
        return label
    half = (_LONGEST_LABEL - 1) // 2
    return f"{label[:half]}…{label[-half:]}"


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    pairs = list(zip(line.x, line.y, strict=True))
    stride = math.ceil(len(pairs) / _MOST_POINTS)
    kept = pairs[::stride] if stride > 1 else pairs
    if pairs and kept[-1] is not pairs[-1]:
        kept.append(pairs[-1])
    return [x for x, _ in kept], [math.nan if y is None else y for _, y in kept]
