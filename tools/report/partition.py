"""Which client has how many images of which class, worked out anew from a run's config."""

import re
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from task.config import TaskConfig, typed
from task.data.partitions import partition_indices, partition_table
from task.data.sampling import labels_of
from task.data.sources import load_split, node_location
from task.errors import DataError
from task.seeding import derive_seed
from tools.report.reading import Run

_SHARE = re.compile(r"partition (\d+) of (\d+)")


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """A partition of a data set."""

    clients: list[str]
    """Names of the clients, in identity order."""
    classes: list[str]
    """Names of the classes, in order of the head's outputs."""
    counts: NDArray[np.int64]
    """Images, training and test, [clients, classes]."""


def class_counts(run: Run) -> ClassCounts:
    """Count the images of every client by class, by the draw that its clients made; no image is decoded.

    Raises
    ------
    PetalwiseError
        Where that cannot be known: why.
    """
    places, total = _places(run)
    task = typed(
        TaskConfig, {item.name: run.config[item.name] for item in fields(TaskConfig) if item.name in run.config}
    )
    dataset = load_split(task.dataset, "train", node_location({}), derive_seed(task.seed, "dataset"))
    partitions = partition_indices(dataset, task.partition, total, derive_seed(task.seed, "partition"))
    classes = list(dataset.features["label"].names)
    table = partition_table(labels_of(dataset), partitions, len(classes))
    return ClassCounts(list(places), classes, table[list(places.values())])


def _places(run: Run) -> tuple[dict[str, int], int]:
    """Find the number of every client's partition, and how many there are."""
    if run.options.get("partition.kind") == "whole":
        raise DataError("Every client holds images of its own (partition.kind=whole), which only that client knows.")
    shares = {client: share for report in run.reports for client, share in report.clients_partition.items()}
    found = {client: _SHARE.fullmatch(str(share)) for client, share in shares.items()}
    places = {client: (int(match[1]), int(match[2])) for client, match in found.items() if match}
    totals = {total for _, total in places.values()}
    if len(totals) == 1 and all(place < total for place, total in places.values()):
        return {client: places[client][0] for client in run.clients if client in places}, totals.pop()
    return _places_by_name(run)


def _places_by_name(run: Run) -> tuple[dict[str, int], int]:
    """Take the clients of a simulation, whose names are the numbers of their partitions."""
    everyone = run.options.get("strategy.fraction_train", 1.0) == 1.0
    if not everyone or not run.clients or run.clients != [str(number) for number in range(len(run.clients))]:
        raise DataError("The run's rounds do not tell which part of the data set each client holds.")
    return {client: int(client) for client in run.clients}, len(run.clients)
