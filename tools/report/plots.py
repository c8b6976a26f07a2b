"""What a plot on the page consists of, and the look that plots share."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from plotly import graph_objects as go

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b8649c", "#9a7600", "#6a7a8c")
"""Colours of lines and bars: told apart with any colour vision, contrast at least 3 on both backgrounds."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")
PATTERNS = ("", "/", "x", ".", "\\", "+")
BACKGROUNDS = {"light": "#ffffff", "dark": "#14181d"}
"""Of the page, by ``prefers-color-scheme``."""
_INKS = {"light": ("#1c2126", "#d4d9de"), "dark": ("#e6e9ec", "#3a424b")}


@dataclass(frozen=True)
class Table:
    """Rows of text under a head."""

    columns: Sequence[str]
    """The head."""
    rows: Sequence[Sequence[str]]
    """A cell for every column; the first names the row."""


@dataclass(frozen=True, eq=False)
class Plot:
    """A plot with what stands for it where it cannot be seen."""

    key: str
    """Its id on the page."""
    title: str
    """What it shows."""
    summary: str
    """What is to be seen, in sentences."""
    figure: go.Figure
    """The plot; its frames, if any, are named ``<round>/<choice>``."""
    table: Table
    """Its numbers, or of many the gist."""
    rounds: Sequence[int] = ()
    """The rounds of its frames, ascending; a slider goes through them, and the plot begins with the last."""
    choices: Sequence[str] = field(default=("",))
    """What of a round its frames show, to be chosen from."""
    across: str = ""
    """What runs from left to right, where the figure itself does not say it."""


@dataclass(frozen=True)
class Missing:
    """A plot that cannot be drawn."""

    title: str
    """What it would show."""
    reason: str
    """A sentence for people."""


def theme(scheme: str) -> go.layout.Template:
    """Give plots the colours of text and grid for ``light`` or ``dark``."""
    ink, grid = _INKS[scheme]
    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "automargin": True}
    layout = go.Layout(
        font={"color": ink, "size": 12},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis=axis,
        yaxis=axis,
        hoverlabel={"bgcolor": BACKGROUNDS[scheme], "font": {"color": ink}},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": ink, "activecolor": PALETTE[0]},
    )
    return go.layout.Template(layout=layout)


def new_figure(x: str, y: str, height: int = 380) -> go.Figure:
    """Begin a figure with titled axes; dragging is left to the page, so that a phone scrolls over it."""
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        dragmode=False,
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    figure.update_xaxes(title={"text": x, "standoff": 12}, automargin=True)
    figure.update_yaxes(title={"text": y, "standoff": 12}, automargin=True)
    return figure


def line_of(number: int) -> dict[str, object]:
    """Give a run's line a colour, a dash and a symbol of its own."""
    return {
        "mode": "lines+markers",
        "line": {"color": PALETTE[number % len(PALETTE)], "dash": DASHES[number % len(DASHES)], "width": 2},
        "marker": {"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 8, "color": PALETTE[number % len(PALETTE)]},
    }


def label(name: str) -> str:
    """Have plotly, which knows some HTML, show a name as it is."""
    return html.escape(name, quote=False)


def percent(share: float) -> str:
    """Format a share in [0, 1]."""
    return f"{100 * share:.1f} %"
