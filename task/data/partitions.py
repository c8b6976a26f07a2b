"""Spread a data set over simulated clients, and split a client's images into training and test."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from task.config import PartitionConfig
from task.data.over_represented import over_represented
from task.data.sampling import ROW, labels_of, stratified_sample
from task.errors import ConfigError, DataError
from task.seeding import derive_seed

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner

Indices = NDArray[np.int64]


def partition_indices(dataset: "Dataset", config: PartitionConfig, num_partitions: int, seed: int) -> list[Indices]:
    """Say which images each client has, by flwr-datasets' partitioners; no image is decoded.

    Parameters
    ----------
    dataset : datasets.Dataset
        Data set with a column ``label``, and ``config.column`` for the kinds that go by a column.
    config : PartitionConfig
        Kind of partition and its parameters. A Dirichlet partition is drawn up to 11 times until every
        client has ``min_samples`` images; for ``natural_dirichlet`` that of each value's images is.
    num_partitions : int
        Number of clients.
    seed : int
        Seed of the draw.

    Returns
    -------
    list of NDArray[np.int64]
        Sorted row numbers per client, disjoint but for the kind ``whole``.

    Raises
    ------
    ConfigError
        If the data cannot be partitioned so, or a client gets fewer than ``min_samples`` images.
    """
    if config.kind == "whole":
        partitions = [np.arange(len(dataset))] * num_partitions
    elif config.kind == "natural":
        partitions = _natural(dataset, config, num_partitions)
    else:
        partitions = _drawn(dataset, config, num_partitions, seed)
    _check_sizes(partitions, config)
    return partitions


def local_split(indices: Indices, labels: Indices, test_fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Split a client's images into training and test, both with at least one image.

    Parameters
    ----------
    indices : NDArray[np.int64]
        The client's row numbers, shape [m].
    labels : NDArray[np.int64]
        Class of every row of the data set that ``indices`` points into, shape [n].
    test_fraction : float
        Share of the images to test on; each class keeps its share as nearly as whole images allow.
    seed : int
        Seed of the draw.

    Returns
    -------
    train, test : tuple of NDArray[np.int64]
        Row numbers; disjoint, together ``indices``.

    Raises
    ------
    DataError
        If there are fewer than two images.
    """
    if len(indices) < 2:
        raise DataError(
            f"A client needs an image to train on and one to test on; this one has {len(indices)} image(s)."
        )
    count = min(max(round(len(indices) * test_fraction), 1), len(indices) - 1)
    is_test = np.zeros(len(indices), dtype=bool)
    is_test[stratified_sample(labels[indices], count, seed)] = True
    return indices[~is_test], indices[is_test]


def partition_table(labels: Indices, partitions: Sequence[Indices], num_classes: int) -> Indices:
    """Count the images per client and class.

    Parameters
    ----------
    labels : NDArray[np.int64]
        Class of every row of the data set, shape [n].
    partitions : sequence of NDArray[np.int64]
        Row numbers per client.
    num_classes : int
        Number of classes.

    Returns
    -------
    NDArray[np.int64]
        Counts, shape [clients, num_classes].
    """
    return np.stack([np.bincount(labels[indices], minlength=num_classes) for indices in partitions]).astype(np.int64)


def _natural(dataset: "Dataset", config: PartitionConfig, num_partitions: int) -> list[Indices]:
    values = _column_values(dataset, config)
    distinct = set(values)
    if len(distinct) != num_partitions:
        raise ConfigError(
            f"partition.column={config.column!r} has {len(distinct)} distinct values and so makes {len(distinct)} "
            f"clients, but {num_partitions} were started; start {len(distinct)} clients."
        )
    return _by_value(values)


def _column_values(dataset: "Dataset", config: PartitionConfig) -> list[Any]:
    """Read the column that separates the clients, or refuse it."""
    columns = [column for column in dataset.column_names if column not in ("image", ROW)]
    if config.column not in columns:
        raise ConfigError(f"partition.column={config.column!r} is not a column of the data: {', '.join(columns)}.")
    values = dataset[config.column][:]
    odd = next((value for value in values if not isinstance(value, str | int)), "")
    if odd != "":
        raise ConfigError(
            f"partition.column={config.column!r} holds {odd!r}; it needs text or whole numbers in all rows."
        )
    return list(values)


def _by_value(values: Sequence[Any]) -> list[Indices]:
    """Part rows by their value, in the order of the sorted values."""
    from flwr_datasets.partitioner import NaturalIdPartitioner

    return _apply(NaturalIdPartitioner(partition_by="key"), np.arange(len(values)), values, len(set(values)))


def _drawn(dataset: "Dataset", config: PartitionConfig, num_partitions: int, seed: int) -> list[Indices]:
    labels = labels_of(dataset)
    if not 1 <= num_partitions <= len(labels):
        raise ConfigError(f"{len(labels)} images cannot be shared by {num_partitions} clients; start fewer clients.")
    draw = _DRAWS.get(config.kind)
    try:
        with warnings.catch_warnings():  # the library's hints name its own arguments, not this config's
            warnings.simplefilter("ignore")
            if draw is not None:
                partitions = draw(labels, config, num_partitions, seed)
            else:
                partitions = _natural_dirichlet(_column_values(dataset, config), labels, config, num_partitions, seed)
    except ValueError as error:
        raise ConfigError(
            f"A {config.kind} partition of {len(labels)} images over {num_partitions} clients failed: {error}"
        ) from error
    _warn_of_unused_classes(dataset, labels, partitions)
    return partitions


def _warn_of_unused_classes(dataset: "Dataset", labels: Indices, partitions: Sequence[Indices]) -> None:
    unused = np.setdiff1d(labels, labels[np.concatenate(partitions)])
    if unused.size:
        names = ", ".join(dataset.features["label"].int2str(unused[:5].tolist()))
        warnings.warn(
            f"No client has images of {unused.size} of the classes ({names}{', ...' if unused.size > 5 else ''}); "
            f"start more clients or raise partition.classes_per_client to use them.",
            stacklevel=4,
        )


def _iid(labels: Indices, config: PartitionConfig, num_partitions: int, seed: int) -> list[Indices]:
    from flwr_datasets.partitioner import IidPartitioner

    rows = np.random.default_rng(seed).permutation(len(labels))  # the partitioner itself cuts without shuffling
    return _apply(IidPartitioner(num_partitions), rows, labels[rows], num_partitions)


def _dirichlet(labels: Indices, config: PartitionConfig, num_partitions: int, seed: int) -> list[Indices]:
    from flwr_datasets.partitioner import DirichletPartitioner

    def draw(min_samples: int) -> list[Indices]:
        partitioner = DirichletPartitioner(
            num_partitions, partition_by="key", alpha=config.alpha, min_partition_size=min_samples, seed=seed
        )
        return _apply(partitioner, np.arange(len(labels)), labels, num_partitions)

    try:
        return draw(config.min_samples)
    except ValueError:
        return draw(0)  # one draw without the minimum: its sizes tell the user what goes wrong


def _natural_dirichlet(
    values: Sequence[Any], labels: Indices, config: PartitionConfig, num_partitions: int, seed: int
) -> list[Indices]:
    """Give each value, in sorted order, clients of its own and spread its images over them by Dirichlet draws."""
    distinct = sorted(set(values))
    if num_partitions < len(distinct):
        raise ConfigError(
            f"partition.column={config.column!r} has {len(distinct)} distinct values, each of which has clients of its "
            f"own, but {num_partitions} were started; start at least {len(distinct)} clients."
        )
    counts = [len(clients) for clients in np.array_split(np.arange(num_partitions), len(distinct))]
    partitions: list[Indices] = []
    for value, rows, count in zip(distinct, _by_value(values), counts, strict=True):
        if len(rows) < count:
            raise ConfigError(
                f"{len(rows)} images with {config.column}={value!r} cannot be shared by {count} clients; "
                "start fewer clients."
            )
        parts = _dirichlet(labels[rows], config, count, derive_seed(seed, "value", value))
        partitions += [rows[part] for part in parts]
    return partitions


def _pathological(labels: Indices, config: PartitionConfig, num_partitions: int, seed: int) -> list[Indices]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    _check_classes(labels, config)
    partitioner = PathologicalPartitioner(
        num_partitions,
        partition_by="key",
        num_classes_per_partition=config.classes_per_client,
        class_assignment_mode="first-deterministic",  # the original paper's: no class unused if clients >= classes
        seed=seed,
    )
    return _apply(partitioner, np.arange(len(labels)), labels, num_partitions)


def _over_represented(labels: Indices, config: PartitionConfig, num_partitions: int, seed: int) -> list[Indices]:
    _check_classes(labels, config)
    return over_represented(labels, num_partitions, config.classes_per_client, config.share, seed)


def _check_classes(labels: Indices, config: PartitionConfig) -> None:
    present = len(np.unique(labels))
    if config.classes_per_client > present:
        raise ConfigError(
            f"partition.classes_per_client={config.classes_per_client}, but the data has {present} classes."
        )


_DRAWS = {"iid": _iid, "dirichlet": _dirichlet, "pathological": _pathological, "over_represented": _over_represented}


def _apply(partitioner: "Partitioner", rows: Indices, keys: Any, num_partitions: int) -> list[Indices]:
    """Run a partitioner on a light table of row numbers and the values it goes by."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"row": rows, "key": keys}).with_format("arrow")
    parts = [partitioner.load_partition(client)["row"] for client in range(num_partitions)]
    return [np.sort(np.asarray(part, dtype=np.int64)) for part in parts]


def _check_sizes(partitions: Sequence[Indices], config: PartitionConfig) -> None:
    sizes = [len(indices) for indices in partitions]
    if config.kind == "whole" and sizes[0] < config.min_samples:
        raise ConfigError(
            f"This node has {sizes[0]} images, fewer than partition.min_samples={config.min_samples}; add images, or "
            "lower partition.min_samples for the whole federation."
        )
    if min(sizes) < config.min_samples:
        raise ConfigError(
            f"The {config.kind} partition leaves a client {min(sizes)} images, fewer than partition.min_samples="
            f"{config.min_samples}; images per client: {', '.join(map(str, sizes))}. Start fewer clients, "
            f"use more images, choose another partition or seed, or lower partition.min_samples."
        )
