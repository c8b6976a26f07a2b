"""The page: everything in one file, plotly's script among it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from tools.report.clients import accuracy_map, known_partition, partition_map, seconds_by_round
from tools.report.comparison import comparison, overview
from tools.report.differences import differences
from tools.report.merging import merging
from tools.report.partition import ClassCounts
from tools.report.plots import BACKGROUNDS, Missing, Plot, theme
from tools.report.reading import Run

_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """The plots of one run."""

    key: str
    """Its id on the page."""
    run: Run
    """The run."""
    plots: Sequence[Plot | Missing]
    """Its plots."""


def render(runs: Sequence[Run]) -> str:
    """Make the page.

    Parameters
    ----------
    runs : Sequence[Run]
        At least one; in this order they are told apart by colour, dash and symbol.

    Returns
    -------
    str
        HTML that refers to nothing outside of it.
    """
    shared = comparison(runs)
    sections = [_section(run, f"run-{number}") for number, run in enumerate(runs, start=1)]
    plots = [plot for part in (shared, *(section.plots for section in sections)) for plot in part]
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.tests["plot"] = lambda value: isinstance(value, Plot)
    return environment.get_template("page.html").render(
        runs=runs,
        overview=overview(runs),
        differences=differences(runs),
        shared=shared,
        sections=sections,
        backgrounds=BACKGROUNDS,
        style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
        script=(_FOLDER / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
        figures=_in_script({plot.key: _figure(plot) for plot in plots if isinstance(plot, Plot)}),
        themes=_in_script({scheme: theme(scheme).to_plotly_json() for scheme in BACKGROUNDS}),
    )


def _section(run: Run, key: str) -> Section:
    partition = known_partition(run)
    held = partition_map(run, key, partition) if isinstance(partition, ClassCounts) else partition
    plots = [held, accuracy_map(run, key), *merging(run, key, partition), seconds_by_round(run, key)]
    return Section(key, run, plots)


def _figure(plot: Plot) -> dict[str, object]:
    figure = json.loads(plot.figure.to_json(engine="json"))
    return {"rounds": list(plot.rounds), **figure}


def _in_script(value: object) -> str:
    """Write JSON so that nothing in it ends a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
