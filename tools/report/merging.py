"""Plots of how one run merged: LIVAR's weights, the schedules' unit clock, pFedLA's alpha."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from strategies.report import RoundReport
from tools.report.heat_maps import Axes, Matrix, as_matrix, heat_map, heat_map_by_round
from tools.report.partition import ClassCounts
from tools.report.plots import Missing, Plot
from tools.report.reading import Run


def merging(run: Run, key: str, partition: ClassCounts | Missing) -> list[Plot | Missing]:
    """Draw what the run's strategy and schedule tell of themselves; nothing where they tell nothing."""
    classes = partition.classes if isinstance(partition, ClassCounts) else []
    found = [
        class_weights(run, key, classes),
        layer_weights(run, key),
        unit_clock(run, key),
        unit_scores(run, key, "discrepancy", "Discrepancy of the clients, by unit"),
        unit_scores(run, key, "change", "Relative change of the model, by unit"),
        alpha(run, key),
    ]
    return [plot for plot in found if plot is not None]


def class_weights(run: Run, key: str, classes: Sequence[str]) -> Plot | None:
    """Draw by what weight each client entered each class of the head, round by round."""
    return _weights(
        run, f"{key}-class-weights", "Weights of clients in the head, by class", "head_weights", "class", classes
    )


def layer_weights(run: Run, key: str) -> Plot | None:
    """Draw by what weight each client entered each adapted layer, round by round."""
    layers: object = next((report.details["layers"] for report in run.reports if "layers" in report.details), [])
    title = "Weights of clients in the adapter, by layer"
    return _weights(run, f"{key}-layer-weights", title, "adapter_weights", "layer", layers)


def unit_clock(run: Run, key: str) -> Plot | None:
    """Draw which units clients uploaded in which round."""
    found = {report.server_round: _uploaded(report, run.units) for report in run.reports}
    known = {number: row for number, row in found.items() if row}
    if not known:
        return None
    values = np.array(list(known.values()), dtype=np.float64).T
    axes = Axes("unit", "round", "uploaded (1) or not (0)", run.units, [str(number) for number in known])
    plot = heat_map(f"{key}-clock", "Unit clock: what was uploaded when", axes, values, lambda sent: f"{sent:.0f}")
    plot.figure.update_traces(
        zmax=1, colorscale=[[0, "#6a7a8c"], [0.5, "#6a7a8c"], [0.5, "#e0a000"], [1, "#e0a000"]], xgap=1, ygap=1
    )
    plot.figure.update_traces(colorbar={"tickvals": [0.25, 0.75], "ticktext": ["waited", "uploaded"], "title": None})
    times = ", ".join(f"{unit} {int(count)}" for unit, count in zip(run.units, values.sum(1), strict=True))
    return replace(plot, summary=f"How often each unit was uploaded in {len(known)} rounds: {times}.")


def unit_scores(run: Run, key: str, name: str, title: str) -> Plot | None:
    """Draw what a schedule chooses its units by, in the rounds in which it does."""
    found = {report.server_round: as_matrix(_schedule(report).get(name), 1) for report in run.reports}
    known = {number: row for number, row in found.items() if row is not None}
    width = max((len(row) for row in known.values()), default=0)
    rows = {number: row for number, row in known.items() if len(row) == width}
    if not rows:
        return None
    axes = Axes("unit", "round", name, _named(run.units, width), [str(number) for number in rows])
    return heat_map(f"{key}-{name}", title, axes, np.array(list(rows.values())).T, lambda score: f"{score:.3g}")


def alpha(run: Run, key: str) -> Plot | Missing | None:
    """Draw by what weight each client's unit entered each client's personal model, round by round."""
    title = "pFedLA's alpha: weights of clients in each client's model, by unit"
    known = [(report, weights) for report in run.reports if (weights := _of_used(report, "alpha", 3)) is not None]
    if not known:
        personal = run.options.get("strategy.name") == "pfedla" and any(report.merged for report in run.reports)
        return Missing(title, "It is recorded only up to 20,000 weights per round.") if personal else None
    last, (_, units, sources) = known[-1][0], known[-1][1].shape
    values = {
        report.server_round: [_by_client(weights[:, unit], report, run, sources) for unit in range(units)]
        for report, weights in known
        if weights.shape[1] == units and weights.shape[2] <= sources
    }
    givers = _named(last.details.get("alpha_clients"), sources)
    axes = Axes("receiving client", "giving client", "weight", run.clients, givers)
    return heat_map_by_round(
        f"{key}-alpha", title, axes, values, lambda weight: f"{weight:.4f}", _named(run.units, units)
    )


def _weights(run: Run, key: str, title: str, name: str, row: str, names: object) -> Plot | None:
    """Draw details [clients used, rows] with a column for every client of the run."""
    known = [(report, weights) for report in run.reports if (weights := _of_used(report, name, 2)) is not None]
    width = max((weights.shape[1] for _, weights in known), default=0)
    values = {
        report.server_round: [_by_client(weights, report, run, width).T]
        for report, weights in known
        if weights.shape[1] == width
    }
    if not values:
        return None
    axes = Axes(row, "client", "weight", _named(names, width), run.clients)
    return heat_map_by_round(key, title, axes, values, lambda weight: f"{weight:.3f}")


def _of_used(report: RoundReport, name: str, dimensions: int) -> Matrix | None:
    """Read an array of details whose rows are the clients used."""
    found = as_matrix(report.details.get(name), dimensions)
    return found if found is not None and len(found) == len(report.clients_used) else None


def _by_client(rows: Matrix, report: RoundReport, run: Run, width: int) -> Matrix:
    """Put the rows of the clients used where they stand among all, and NaN elsewhere: [clients, width]."""
    found = np.full((len(run.clients), width), np.nan)
    found[[run.clients.index(client) for client in report.clients_used], : rows.shape[1]] = rows
    return found


def _schedule(report: RoundReport) -> dict[str, Any]:
    found = report.details.get("schedule")
    return found if isinstance(found, dict) else {}


def _uploaded(report: RoundReport, units: Sequence[str]) -> list[bool] | None:
    """Tell of every unit whether it was uploaded, in a round of a schedule that says so."""
    schedule = _schedule(report)
    for name, meaning in (("due", True), ("recycled", False)):
        if isinstance(schedule.get(name), list):
            return [(unit in schedule[name]) is meaning for unit in units]
    return None


def _named(names: object, count: int) -> list[str]:
    """Take the names if there are as many as needed, else numbers."""
    if isinstance(names, list) and len(set(map(str, names))) == len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]
