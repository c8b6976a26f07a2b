"""Heat maps: one matrix, or one for every round, with a slider."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from plotly import graph_objects as go

from tools.report.plots import Plot, Table, label, new_figure

Matrix = NDArray[np.float64]
Format = Callable[[float], str]

MAX_VALUES = 400_000
"""Most numbers in the frames of one plot, 2.1 MB of page; of more rounds some are left out."""
MAX_CELLS = 600
"""Largest matrix that is written out as a table; of a larger one every row's range is."""


@dataclass(frozen=True)
class Axes:
    """What rows, columns and values of a matrix are."""

    row: str
    """A row, in the singular, such as ``client``."""
    column: str
    """A column."""
    value: str
    """A value."""
    rows: Sequence[str]
    """Names of the rows."""
    columns: Sequence[str]
    """Names of the columns."""
    ticks: str = ""
    """How values are written on the scale of colours, in the format of d3; empty: as plotly likes."""


def heat_map(key: str, title: str, axes: Axes, values: Matrix, written: Format, note: str = "") -> Plot:
    """Draw one matrix, its colours from zero.

    Parameters
    ----------
    key, title : str
        Of the plot.
    axes : Axes
        What is what.
    values : Matrix, [rows, columns]
        NaN where there is none.
    written : Format
        How values are written.
    note : str
        What else there is to know.
    """
    figure = _figure(axes, values, (0.0, _range([values])[1]))
    extremes = _extremes(axes, values, written)
    summary = " ".join(filter(None, [extremes[:1].upper() + extremes[1:], note]))
    return Plot(key, title, summary, figure, matrix_table(axes, values, written), across=axes.column)


def heat_map_by_round(
    key: str,
    title: str,
    axes: Axes,
    values: Mapping[int, Sequence[Matrix]],
    written: Format,
    choices: Sequence[str] = ("",),
) -> Plot:
    """Draw a matrix for every round, and in a round for every choice; the colours span the values of all.

    Parameters
    ----------
    key, title : str
        Of the plot.
    axes : Axes
        What is what.
    values : Mapping[int, Sequence[Matrix]]
        By round, ascending, a matrix [rows, columns] per choice.
    written : Format
        How values are written.
    choices : Sequence[str]
        Names of a round's matrices.
    """
    rounds = _thinned(list(values), len(choices) * len(axes.rows) * len(axes.columns))
    last = values[rounds[-1]][0]
    figure = _figure(axes, last, _range([matrix for number in rounds for matrix in values[number]]))
    figure.frames = [
        go.Frame(name=f"{number}/{place}", data=[{"type": "heatmap", "z": matrix.astype(np.float32)}])
        for number in rounds
        for place, matrix in enumerate(values[number])
    ]
    of_what = f" ({choices[0]})" if choices[0] else ""
    parts = [f"In round {rounds[-1]}{of_what}: {_extremes(axes, last, written)}"]
    if len(rounds) < len(values):
        parts.append(f"The slider has {len(rounds)} of {len(values)} rounds, evenly spaced, to keep the page small.")
    table = matrix_table(axes, last, written)
    return Plot(key, title, " ".join(parts), figure, table, rounds, choices, axes.column)


def as_matrix(value: Any, dimensions: int = 2) -> Matrix | None:
    """Read nested lists of numbers, NaN for null; None if they are no array of so many dimensions."""
    try:
        found = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return found if found.ndim == dimensions and found.size else None


def matrix_table(axes: Axes, values: Matrix, written: Format) -> Table:
    """Write a matrix out, or of a large one what each row spans."""
    if values.size <= MAX_CELLS:
        rows = [[name, *_cells(row, written)] for name, row in zip(axes.rows, values, strict=True)]
        return Table([f"{axes.row} \\ {axes.column}", *axes.columns], rows)
    rows = []
    for name, row in zip(axes.rows, values, strict=True):
        known = row[np.isfinite(row)]
        if known.size:
            where = axes.columns[int(np.nanargmax(row))]
            rows.append([name, *_cells([known.min(), known.mean(), known.max()], written), where])
    return Table([axes.row, "lowest", "mean", "highest", f"highest at {axes.column}"], rows)


def _range(matrices: Sequence[Matrix]) -> tuple[float, float]:
    """Find the lowest and the highest of all values."""
    known = np.concatenate([matrix[np.isfinite(matrix)] for matrix in matrices])
    return (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)


def _figure(axes: Axes, values: Matrix, span: tuple[float, float]) -> go.Figure:
    height = 130 + min(max(18 * len(axes.rows), 130), 1150)
    figure = new_figure("", axes.row, height)  # beside a horizontal scale, plotly 7 sets this title onto the labels
    figure.update_layout(margin={"t": 0})
    hover = f":{axes.ticks}" if axes.ticks else ""
    figure.add_trace(
        go.Heatmap(
            z=values.astype(np.float32),
            x=[label(name) for name in axes.columns],
            y=[label(name) for name in axes.rows],
            zmin=span[0],
            zmax=span[1] if span[1] > span[0] else span[0] + 1.0,
            colorscale="Cividis",
            hovertemplate=f"{axes.row} %{{y}}<br>{axes.column} %{{x}}<br>{axes.value} %{{z{hover}}}<extra></extra>",
            colorbar={
                "orientation": "h",
                "y": 1.0,
                "yanchor": "bottom",
                "thickness": 10,
                "title": {"text": axes.value, "side": "top"},
                "tickformat": axes.ticks,
            },
        )
    )
    figure.update_xaxes(type="category", showgrid=False, title=None)
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    return figure


def _thinned(rounds: list[int], per_round: int) -> list[int]:
    """Keep the first, the last and some between, evenly, so that there are at most :data:`MAX_VALUES` numbers."""
    most = max(MAX_VALUES // max(per_round, 1), 2)
    if len(rounds) <= most:
        return rounds
    return [rounds[place] for place in np.linspace(0, len(rounds) - 1, most).round().astype(int)]


def _extremes(axes: Axes, values: Matrix, written: Format) -> str:
    """Say where the lowest and the highest value are."""
    if not np.isfinite(values).any():
        return "no values."
    found = []
    for word, place in (("lowest", np.nanargmin(values)), ("highest", np.nanargmax(values))):
        row, column = divmod(int(place), values.shape[1])
        where = f"{axes.row} {axes.rows[row]}, {axes.column} {axes.columns[column]}"
        found.append(f"{word} {written(float(values[row, column]))} ({where})")
    return f"{'; '.join(found)}."


def _cells(values: Sequence[float] | Matrix, written: Format) -> list[str]:
    return [written(float(value)) if np.isfinite(value) else "-" for value in values]
