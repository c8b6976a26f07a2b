"""Plots of one run's clients and rounds: who holds what, how accurate each is, where the time goes."""

import numpy as np

from task.errors import PetalwiseError
from tools.report.comparison import PARTS, evaluated_round, seconds_of, stack_parts
from tools.report.heat_maps import Axes, heat_map
from tools.report.partition import ClassCounts, class_counts
from tools.report.plots import Missing, Plot, Table, new_figure, percent
from tools.report.reading import Run


def known_partition(run: Run) -> ClassCounts | Missing:
    """Work out who holds what, or say why that cannot be done."""
    try:
        return class_counts(run)
    except PetalwiseError as error:
        return Missing("Images by class and client", str(error))


def partition_map(run: Run, key: str, partition: ClassCounts) -> Plot:
    """Draw how many images of every class each client holds."""
    axes = Axes("class", "client", "images", partition.classes, partition.clients)
    sizes = partition.counts.sum(1)
    note = (
        f"Clients hold {sizes.min()} to {sizes.max()} images, training and test together. Worked out from config.yaml "
        "and the data set as it is on the machine that made this page."
    )
    values = partition.counts.T.astype(np.float64)
    return heat_map(f"{key}-partition", "Images by class and client", axes, values, lambda count: f"{count:.0f}", note)


def accuracy_map(run: Run, key: str) -> Plot | Missing:
    """Draw every client's accuracy over the rounds."""
    title = "Clients' accuracy on their own test images, by round"
    found = {evaluated_round(report): report.clients_accuracy for report in run.reports if report.clients_accuracy}
    if not found:
        return Missing(title, "No clients have evaluated (strategy.evaluate_clients).")
    clients = [client for client in run.clients if any(client in accuracy for accuracy in found.values())]
    rounds = sorted(found)
    values = np.array([[found[number].get(client, np.nan) for number in rounds] for client in clients])
    axes = Axes("client", "round", "accuracy", clients, [str(number) for number in rounds], ".0%")
    return heat_map(f"{key}-clients", title, axes, values, percent)


def seconds_by_round(run: Run, key: str) -> Plot | Missing:
    """Draw what every round's time went into."""
    title = "Time, by round"
    found = {report.server_round: seconds for report in run.reports if (seconds := seconds_of(report))}
    if not found:
        return Missing(title, "The run has recorded none.")
    figure = new_figure("round", "seconds")
    stack_parts(figure, [str(number) for number in found], list(found.values()), "v")
    figure.update_xaxes(type="category")
    rows = [[str(number), *(f"{seconds.get(part, 0.0):.2f} s" for part in PARTS)] for number, seconds in found.items()]
    longest = max(found, key=lambda number: sum(found[number].values()))
    total, most = sum(sum(seconds.values()) for seconds in found.values()), sum(found[longest].values())
    told = f"{total:.1f} s in all; the longest is round {longest}, {most:.1f} s."
    return Plot(f"{key}-seconds", title, told, figure, Table(["round", *PARTS.values()], rows))
