"""Plots that runs share: accuracy by rounds and by traffic, clients' accuracy, time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from plotly import graph_objects as go

from strategies.cohort import identity_order
from strategies.report import RoundReport
from tools.report.plots import PALETTE, PATTERNS, SYMBOLS, Missing, Plot, Table, label, line_of, new_figure, percent
from tools.report.reading import Run, is_number

Points = list[tuple[int, float]]
PARTS = {
    "train": "clients train",
    "wait": "queues and transfers",
    "aggregate": "merge",
    "calibrate": "calibrate",
    "evaluate": "evaluate",
    "other": "everything else",
}
"""What a round's seconds go into, in order."""
MOST_TICKS = 12
"""Of so many rounds each is marked."""


@dataclass(frozen=True)
class Measure:
    """A way to say how accurate a model is."""

    key: str
    """Part of the plots' ids."""
    title: str
    """Of the plots."""
    points: Callable[[Run], Points]
    """Round and accuracy in [0, 1], ascending."""


def central_accuracy(run: Run) -> Points:
    """Accuracy on the server's test images."""
    return [(r.server_round, r.central["accuracy"]) for r in run.reports if "accuracy" in r.central]


def clients_accuracy(run: Run) -> Points:
    """Mean over clients of the accuracy on their own test images, by the round whose model they had."""
    found = {evaluated_round(r): r.clients_accuracy_mean for r in run.reports}
    return sorted((number, mean) for number, mean in found.items() if mean is not None)


MEASURES = (
    Measure("central", "Accuracy on the server's test images", central_accuracy),
    Measure("clients", "Mean accuracy of clients on their own test images", clients_accuracy),
)


def comparison(runs: Sequence[Run]) -> list[Plot | Missing]:
    """Draw all plots that runs share."""
    accuracies = [plot for measure in MEASURES for plot in _accuracy(runs, measure)]
    return [*accuracies, client_accuracies(runs), mean_seconds(runs)]


def evaluated_round(report: RoundReport) -> int:
    """Tell which round's model the clients evaluated in a round."""
    return report.server_round if report.clients_evaluated_round is None else report.clients_evaluated_round


def traffic(run: Run) -> dict[int, float]:
    """Sum up the bytes of message contents, both ways, from the first round to each round."""
    sums = accumulate(report.bytes_down + report.bytes_up for report in run.reports)
    return {report.server_round: float(total) for report, total in zip(run.reports, sums, strict=True)}


def seconds_of(report: RoundReport) -> dict[str, float]:
    """Split a round's seconds into those of :data:`PARTS`, without those that are not recorded."""
    given = dict(report.seconds)
    total = given.pop("total", None)
    if total is not None:
        given["other"] = max(total - sum(value for part, value in given.items() if part != "wait"), 0.0)
    if "train" in given:
        given["train"] -= given.get("wait", 0.0)
    return {part: given[part] for part in PARTS if part in given}


def _accuracy(runs: Sequence[Run], measure: Measure) -> list[Plot | Missing]:
    series = {run: points for run in runs if (points := measure.points(run))}
    if not series:
        return [Missing(f"{measure.title}, by round", "No run has recorded any.")]
    by_round = {run: [(float(number), value) for number, value in points] for run, points in series.items()}
    by_bytes = {run: _by_traffic(run, points) for run, points in series.items()}
    rows = [
        [run.name, str(number), f"{sent / 1e6:.2f}", percent(value)]
        for run, points in series.items()
        for (number, value), (sent, _) in zip(points, by_bytes[run], strict=True)
    ]
    table = _of_runs(runs, Table(["run", "round", "traffic, MB", "accuracy"], rows))
    told = _told(runs, {run.name: _course(points) for run, points in series.items()})
    megabytes = {run: [(sent / 1e6, value) for sent, value in points] for run, points in by_bytes.items()}
    spent = _told(runs, {run.name: f"{points[-1][0]:.1f} MB in all." for run, points in megabytes.items()})
    return [
        Plot(f"{measure.key}-by-round", f"{measure.title}, by round", told, _lines(runs, by_round, "round"), table),
        Plot(
            f"{measure.key}-by-bytes",
            f"{measure.title}, by traffic",
            f"Message contents, both ways. {spent}",
            _lines(runs, megabytes, "traffic since the start, MB"),
            table,
        ),
    ]


def _by_traffic(run: Run, points: Points) -> list[tuple[float, float]]:
    """Put the bytes sent until then in place of a round; those of the last recorded round before, where it lacks."""
    sums = traffic(run)
    return [(max((sent for r, sent in sums.items() if r <= number), default=0.0), value) for number, value in points]


def _told(runs: Sequence[Run], sentences: Mapping[str, str]) -> str:
    """Join sentences, each led by the name of what it is of; of one run alone that needs no name."""
    if len(runs) == len(sentences) == 1:
        return "".join(sentences.values())
    return " ".join(f"{name}: {sentence}" for name, sentence in sentences.items())


def _of_runs(runs: Sequence[Run], table: Table) -> Table:
    """Leave out a table's first column, the names of runs, where there is one run alone."""
    return table if len(runs) > 1 else Table(table.columns[1:], [row[1:] for row in table.rows])


def _course(points: Points) -> str:
    (first, start), (last, end) = points[0], points[-1]
    best = max(points, key=lambda point: point[1])
    ends = f"{percent(start)} in round {first}, {percent(end)} in round {last}"
    return f"{ends}, best {percent(best[1])} in round {best[0]}."


def _lines(runs: Sequence[Run], series: dict[Run, list[tuple[float, float]]], x: str) -> go.Figure:
    figure = new_figure(x, "accuracy")
    for number, run in enumerate(runs):
        if run in series:
            across, up = zip(*series[run], strict=True)
            name = label(run.name) if len(runs) > 1 else ""
            figure.add_trace(go.Scatter(x=across, y=up, name=name, **line_of(number)))
    if x == "round" and max(number for points in series.values() for number, _ in points) <= MOST_TICKS:
        figure.update_xaxes(dtick=1)  # plotly would mark half rounds
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_layout(showlegend=len(runs) > 1, hovermode="closest")
    return figure


def client_accuracies(runs: Sequence[Run]) -> Plot | Missing:
    """Draw every client's accuracy at its last evaluation, as received and, where asked for, after tuning."""
    title = "Accuracy of every client on its own test images, last evaluation"
    found = {run: report for run in runs for report in run.reports if report.clients_accuracy}
    if not found:
        return Missing(title, "No clients have evaluated (strategy.evaluate_clients).")
    named = {client for report in found.values() for client in report.clients_accuracy}
    clients = sorted(named, key=identity_order)
    figure, columns = new_figure("client", "accuracy"), _evaluations(runs, found)
    for name, (number, shape, accuracy) in columns.items():
        symbol = f"{SYMBOLS[number % len(SYMBOLS)]}{shape}"
        marker = {"symbol": symbol, "size": 9, "color": PALETTE[number % len(PALETTE)]}
        up = [accuracy.get(client) for client in clients]
        figure.add_trace(
            go.Scatter(x=[label(c) for c in clients], y=up, name=label(name), mode="markers", marker=marker)
        )
    figure.update_xaxes(type="category")
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    figure.update_layout(showlegend=len(columns) > 1)
    measured = {name: accuracy for name, (_, _, accuracy) in columns.items()}
    rows = [[client, *(percent(a[client]) if client in a else "-" for a in measured.values())] for client in clients]
    told = _told(runs, {name: _spread(accuracy) for name, accuracy in measured.items()})
    return Plot("client-accuracies", title, told, figure, Table(["client", *columns], rows))


def _evaluations(runs: Sequence[Run], found: Mapping[Run, RoundReport]) -> dict[str, tuple[int, str, dict[str, float]]]:
    """Name what clients measured: the run's number, the form of its symbol, and the accuracies."""
    numbers = {run: number for number, run in enumerate(runs)}
    received, tuned = {}, {}
    for run, report in found.items():
        names = (run.name, f"{run.name}, tuned") if len(runs) > 1 else ("As received", "After tuning")
        received[names[0]] = (numbers[run], "", report.clients_accuracy)
        if report.tuned_accuracy:
            tuned[names[1]] = (numbers[run], "-open", report.tuned_accuracy)
    return received | tuned


def _spread(accuracy: dict[str, float]) -> str:
    worst, best = min(accuracy, key=accuracy.__getitem__), max(accuracy, key=accuracy.__getitem__)
    return (
        f"worst {percent(accuracy[worst])} (client {worst}), best {percent(accuracy[best])} (client {best}), "
        f"mean {percent(sum(accuracy.values()) / len(accuracy))}."
    )


def mean_seconds(runs: Sequence[Run]) -> Plot | Missing:
    """Draw what a round's time goes into, on average over the rounds that train."""
    title = "Time of a round, mean over rounds"
    means = {run: mean for run in runs if (mean := _mean([seconds_of(r) for r in run.reports if r.server_round]))}
    if not means:
        return Missing(title, "No run has recorded any.")
    figure = new_figure("seconds", "", 200 + 34 * len(means))
    places = [label(run.name) if len(runs) > 1 else "" for run in means]
    stack_parts(figure, places, list(means.values()), "h")
    figure.update_yaxes(type="category", autorange="reversed")
    rows = [[run.name, *(f"{mean.get(part, 0.0):.2f} s" for part in PARTS)] for run, mean in means.items()]
    table = _of_runs(runs, Table(["run", *PARTS.values()], rows))
    told = _told(runs, {run.name: f"{sum(mean.values()):.1f} s a round." for run, mean in means.items()})
    return Plot("mean-seconds", title, told, figure, table)


def _mean(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    known = [seconds for seconds in rounds if seconds]
    return {part: sum(s.get(part, 0.0) for s in known) / len(known) for part in PARTS} if known else {}


def stack_parts(
    figure: go.Figure, places: Sequence[str], seconds: Sequence[dict[str, float]], orientation: str
) -> None:
    """Add a stacked bar of :data:`PARTS` at every place."""
    for number, (part, name) in enumerate(PARTS.items()):
        lengths = [one.get(part, 0.0) for one in seconds]
        if any(lengths):
            x, y = (lengths, places) if orientation == "h" else (places, lengths)
            marker = {"color": PALETTE[number], "pattern": {"shape": PATTERNS[number], "solidity": 0.25}}
            figure.add_trace(go.Bar(x=x, y=y, name=name, orientation=orientation, marker=marker))
    figure.update_layout(barmode="stack", showlegend=True, legend={"traceorder": "normal"})


def overview(runs: Sequence[Run]) -> Table:
    """Say in a row for every run what came of it."""
    columns = ["run", "server's accuracy", "clients' accuracy", "strategy", "rounds", "clients", "traffic", "time"]
    rows = []
    for run in runs:
        ends = [percent(points[-1][1]) if (points := measure.points(run)) else "-" for measure in MEASURES]
        last = run.reports[-1].server_round if run.reports else 0
        planned = run.options.get("num_server_rounds")
        rounds = f"{last} of {planned}" if is_number(planned) else str(last)
        sent = max(traffic(run).values(), default=0.0)
        time = sum(report.seconds.get("total", 0.0) for report in run.reports)
        rows.append(
            [run.name, *ends, _method(run), rounds, str(len(run.clients)), f"{sent / 1e6:.1f} MB", f"{time:.0f} s"]
        )
    return _of_runs(runs, Table(columns, rows))


def _method(run: Run) -> str:
    """Name the strategy and what goes with it."""
    groups = ("strategy", "schedule", "calibration", "privacy")
    names = [str(run.options.get(f"{group}.name", "")) for group in groups]
    return " + ".join(name for name in names if name not in ("", "every_round", "none")) or "-"
