"""Labelled images in one common form, whatever they are stored as: the entry to a party's data."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from task.config import DatasetConfig
from task.data.readers import read_split
from task.data.sampling import ROW, labels_of, stratified_sample
from task.errors import ConfigError, DataError, did_you_mean, shortened
from task.folders import node_folder

DATA_VARIABLE = "PETALWISE_DATA"
"""Folder of the data, of a client whose node config names none, and of the server's own process."""
MAX_LABEL = 100_000
"""Highest label of classes without names; a larger one is an identifier, not a class."""


def node_location(node_config: Mapping[str, object]) -> Path | None:
    """Find where a node's own data lies.

    Parameters
    ----------
    node_config : Mapping[str, object]
        The node's own config; its key ``data`` wins over the environment's ``PETALWISE_DATA``.

    Returns
    -------
    Path or None
        The folder, or None where neither is set.

    Raises
    ------
    DataError
        If there is no such folder.
    """
    return node_folder(node_config, "data", DATA_VARIABLE)


def load_split(
    config: DatasetConfig, role: Literal["train", "test"], location: Path | None, seed: int
) -> datasets.Dataset:
    """Load the images to train on, or the server's central test images.

    Where the data has no test split (``test_split`` empty, or packaged data), both come from the
    training split: a share of it, stratified by class, is held out for the test.

    Parameters
    ----------
    config : DatasetConfig
        What to read.
    role : Literal["train", "test"]
        Which of the two.
    location : Path or None
        Folder of the data on this node, for the sources ``parquet`` and ``folder``.
    seed : int
        Seed of the held-out part and of the subsets; must be the same for both roles.

    Returns
    -------
    datasets.Dataset
        Columns ``image`` (datasets.Image), ``label`` (datasets.ClassLabel) and what else the data has.
        Class names are ``config.classes``, or what the data declares, or for bare text and numbers what
        occurs in the splits at hand: parties with different data must be given ``config.classes`` then.

    Raises
    ------
    ConfigError
        If the config names data that cannot exist.
    DataError
        If the data is missing, unreadable or not what the config says.
    """
    _check(config)
    held_out = config.source == "packaged" or not config.test_split
    split = config.train_split if role == "train" or held_out else config.test_split
    dataset = _in_common_form(read_split(config, split, location), config, split, location)
    labels, chosen = labels_of(dataset), np.arange(len(dataset))
    if held_out:
        test = _held_out(labels, config.central_test_fraction, seed)
        chosen = test if role == "test" else np.setdiff1d(chosen, test)
    limit = config.max_train_samples if role == "train" else config.max_test_samples
    if 0 < limit < len(chosen):
        chosen = chosen[stratified_sample(labels[chosen], limit, seed)]
    return dataset if len(chosen) == len(dataset) else dataset.select(chosen)


def _check(config: DatasetConfig) -> None:
    repeated = [name for position, name in enumerate(config.classes) if name in config.classes[:position]]
    if repeated:
        raise ConfigError(f"dataset.classes names {repeated[0]!r} twice; every class needs a name of its own.")
    if config.source != "packaged" and not config.train_split:
        raise ConfigError(f"dataset.train_split is empty; the source {config.source!r} needs the name of a split.")


def _held_out(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    if len(labels) < 2:
        raise DataError("A single image cannot be shared between training and a held-out test; add images.")
    return stratified_sample(labels, min(max(round(len(labels) * fraction), 1), len(labels) - 1), seed)


def _in_common_form(
    raw: datasets.Dataset, config: DatasetConfig, split: str, location: Path | None
) -> datasets.Dataset:
    """Name the columns ``image`` and ``label`` and give them their types; other columns stay."""
    for key, column in (("image_column", config.image_column), ("label_column", config.label_column)):
        if column not in raw.column_names:
            raise DataError(
                f"The split '{split}' of '{config.name}' has no column '{column}' (dataset.{key}, or "
                f"{key.replace('_', '-')} in the node config); its columns are: {', '.join(raw.column_names)}."
            )
    codes, names = _classes(raw, config, split, location)
    replaced = {"image", "label", config.label_column} - {config.image_column}
    dataset = raw.remove_columns([column for column in raw.column_names if column in replaced])
    if config.image_column != "image":
        dataset = dataset.rename_column(config.image_column, "image")
    try:
        dataset = dataset.cast_column("image", datasets.Image())
    except (TypeError, ValueError, NotImplementedError) as error:
        kind = raw.features[config.image_column]
        raise DataError(f"The column '{config.image_column}' of '{config.name}' is {kind}, not images.") from error
    if config.source != "folder":
        _require_bytes(dataset, config)
        dataset = dataset.add_column(ROW, np.arange(len(dataset)))
    dataset = dataset.add_column("label", codes, feature=datasets.ClassLabel(names=names))
    return _without_others(dataset, codes, config, split)


def _without_others(
    dataset: datasets.Dataset, codes: NDArray[np.int64], config: DatasetConfig, split: str
) -> datasets.Dataset:
    """Leave out the rows whose class is none of ``dataset.classes``, which have the code -1."""
    if not config.classes or config.other_classes != "leave_out":
        return dataset
    rows = np.flatnonzero(codes >= 0)
    if not len(rows):
        raise DataError(f"The split '{split}' of '{config.name}' has no image of the classes in dataset.classes.")
    return dataset.select(rows)


def _require_bytes(dataset: datasets.Dataset, config: DatasetConfig) -> None:
    """Refuse rows that name a file instead: whoever wrote the table would choose which of this node's files to open."""
    if any(chunk.field("bytes").null_count for chunk in dataset.data.column("image").chunks):
        raise DataError(
            f"'{config.name}' has rows without the bytes of an image (missing, or only a file's name), "
            f"which the source {config.source!r} needs; embed the images, or use the source 'folder'."
        )


def _classes(
    raw: datasets.Dataset, config: DatasetConfig, split: str, location: Path | None
) -> tuple[NDArray[np.int64], list[str]]:
    """Find every image's class index, and the names of the classes in order."""
    feature, values = raw.features[config.label_column], raw[config.label_column][:]
    missing = next((row for row, value in enumerate(values) if value is None or value == -1), None)
    if missing is not None:
        raise DataError(f"Row {missing} of the split '{split}' of '{config.name}' has no label; remove or label it.")
    if isinstance(feature, datasets.ClassLabel):
        names, codes = list(feature.names), np.asarray(values, dtype=np.int64)
    elif _dtype(feature).endswith("string"):
        names = sorted(set(values) | _labels_of_other_split(config, split, location))
        index = {name: code for code, name in enumerate(names)}
        codes = np.asarray([index[value] for value in values], dtype=np.int64)
    elif _dtype(feature).startswith(("int", "uint")):
        highest = max(set(values) | _labels_of_other_split(config, split, location))
        if highest > MAX_LABEL:
            raise DataError(
                f"'{config.name}' has the label {highest}, more than {MAX_LABEL}: the column "
                f"'{config.label_column}' (dataset.label_column) seems to hold no classes."
            )
        names = config.classes or [str(code) for code in range(highest + 1)]
        return _numbered(np.asarray(values, dtype=np.int64), names, config)
    else:
        raise DataError(f"The label column '{config.label_column}' has the type {feature}; use text or whole numbers.")
    return _renumbered(codes, names, config) if config.classes else (codes, names)


def _dtype(feature: object) -> str:
    return str(getattr(feature, "dtype", ""))


def _labels_of_other_split(config: DatasetConfig, split: str, location: Path | None) -> set[Any]:
    """Labels of the other split if this party has it, so that a class absent from one split moves no index."""
    other = config.test_split if split == config.train_split else config.train_split
    if other and not config.classes:
        with suppress(DataError):
            return set(read_split(config, other, location)[config.label_column][:]) - {None, -1}
    return set()


def _numbered(codes: NDArray[np.int64], names: list[str], config: DatasetConfig) -> tuple[NDArray[np.int64], list[str]]:
    """Take numbers without names as positions in the list of classes."""
    outside = (codes < 0) | (codes >= len(names))
    if config.classes and config.other_classes == "leave_out":
        return np.where(outside, -1, codes), names
    if outside.any():
        raise DataError(
            f"'{config.name}' has the label {codes[outside][0]}; dataset.classes names 0 to {len(names) - 1}."
        )
    return codes, names


def _renumbered(
    codes: NDArray[np.int64], names: list[str], config: DatasetConfig
) -> tuple[NDArray[np.int64], list[str]]:
    """Follow the order of ``dataset.classes``; classes without images may be missing from the data, not the reverse."""
    unknown = [names[code] for code in np.unique(codes) if names[code] not in config.classes]
    if unknown and config.other_classes == "refuse":
        raise DataError(
            f"'{config.name}' has images of classes that dataset.classes lacks: {shortened(unknown)}."
            f"{did_you_mean(unknown[0], config.classes)}"
        )
    order = [config.classes.index(name) if name in config.classes else -1 for name in names]
    return np.asarray(order, dtype=np.int64)[codes], list(config.classes)
