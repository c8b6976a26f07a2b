"""Read labelled images from a package, the hub, parquet files or a folder, in one common form."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from numpy.typing import NDArray

from task.config import DatasetConfig
from task.data.sampling import labels_of, stratified_sample
from task.errors import ConfigError, DataError

LOCATION_VARIABLE = "PETALWISE_DATA"
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def node_location(node_config: Mapping[str, object]) -> Path | None:
    """Find where a node's own data lies.

    Parameters
    ----------
    node_config : Mapping[str, object]
        Flower's node config; its key ``data`` goes before the environment variable PETALWISE_DATA.

    Returns
    -------
    Path | None
        The folder, or None if neither names one.

    Raises
    ------
    DataError
        If the folder does not exist.
    """
    named = {'the node config key "data"': node_config.get("data"), LOCATION_VARIABLE: os.environ.get(LOCATION_VARIABLE)}
    for origin, value in named.items():
        if value:
            location = Path(str(value)).expanduser()
            if not location.is_dir():
                raise DataError(f"{origin} names the folder {location}, which does not exist on this node.")
            return location
    return None


def load_split(
    config: DatasetConfig, role: Literal["train", "test"], location: Path | None, seed: int
) -> datasets.Dataset:
    """Load the images to train on, or the server's central test images.

    Parameters
    ----------
    config : DatasetConfig
        What to read. Without ``test_split``, and for packaged data, ``central_test_fraction`` of the
        training split is held out, stratified by class.
    role : Literal["train", "test"]
        Which of the two.
    location : Path | None
        Folder of the data on this node, for the sources ``parquet`` and ``folder``.
    seed : int
        Seed of the held-out part and of the subsets; both roles must be given the same.

    Returns
    -------
    datasets.Dataset
        Columns ``image`` (datasets.Image) and ``label`` (datasets.ClassLabel), and what else the data has.

    Raises
    ------
    ConfigError
        If the config names data that cannot exist.
    DataError
        If the data is missing, unreadable or not as the config says.
    """
    held_out = config.source == "packaged" or not config.test_split
    split = config.train_split if role == "train" or held_out else config.test_split
    dataset = _in_common_form(_read(config, split, location), config, split, location)
    labels, chosen = labels_of(dataset), np.arange(len(dataset))
    if held_out:
        test = _central_test(labels, config.central_test_fraction, seed)
        chosen = test if role == "test" else np.setdiff1d(chosen, test)
    limit = config.max_train_samples if role == "train" else config.max_test_samples
    if 0 < limit < len(chosen):
        chosen = chosen[stratified_sample(labels[chosen], limit, seed)]
    return dataset if len(chosen) == len(dataset) else dataset.select(chosen)


def _central_test(labels: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int64]:
    if len(labels) < 2:
        raise DataError("Holding out test images needs at least 2 images; the training split has 1.")
    return stratified_sample(labels, min(max(round(len(labels) * fraction), 1), len(labels) - 1), seed)


def _read(config: DatasetConfig, split: str, location: Path | None) -> datasets.Dataset:
    """Read a split with the columns the data has, refusing an empty one."""
    dataset = _READERS[config.source](config, split, location)
    if len(dataset) == 0:
        raise DataError(f"The split '{split}' of the data set '{config.name}' has no images.")
    return dataset


def _read_packaged(config: DatasetConfig, split: str, location: Path | None) -> datasets.Dataset:
    if config.name != "digits":
        raise ConfigError(f"dataset.name={config.name!r}: the only packaged data set is 'digits'.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        {config.image_column: datasets.Image(), config.label_column: datasets.ClassLabel(names=[*"0123456789"])}
    )
    columns = {config.image_column: list(images), config.label_column: digits.target.tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def _read_hub(config: DatasetConfig, split: str, location: Path | None) -> datasets.Dataset:
    # The config may come from another party: it must not make this node read its own files.
    if not _HUB_REPOSITORY.fullmatch(config.path) or Path(config.path).exists():
        raise ConfigError(f"dataset.path={config.path!r} must name a hub data set as owner/name, and no local folder.")
    return _loaded(f"The split '{split}' of the hub data set {config.path}", config.path, split=split)


def _read_parquet(config: DatasetConfig, split: str, location: Path | None) -> datasets.Dataset:
    folder = _required(location, config)
    files = sorted(str(path) for path in folder.iterdir() if path.name.startswith(split) and path.suffix == ".parquet")
    if not files:
        raise DataError(
            f"{folder} has no parquet file whose name starts with '{split}'; check dataset.train_split and "
            f"dataset.test_split (leave test_split empty to hold out part of the training split)."
        )
    return _loaded(f"The parquet files {split}* in {folder}", "parquet", data_files=files, split="train")


def _read_folder(config: DatasetConfig, split: str, location: Path | None) -> datasets.Dataset:
    root = _required(location, config)
    folder = _class_root(root, split, fallback=split == config.train_split)
    others = {_class_root(root, name, fallback=True) for name in (config.train_split, config.test_split) if name}
    names = sorted({path.name for parent in {folder, *others} for path in parent.iterdir() if _visible_folder(path)})
    rows = [
        (str(path), name)
        for name in names
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]
    if not rows:
        raise DataError(f"{folder} holds no images; put them into one folder per class, as in {folder}/<class>/1.png.")
    features = datasets.Features(
        {config.image_column: datasets.Image(), config.label_column: datasets.ClassLabel(names=names)}
    )
    images, labels = zip(*rows, strict=True)
    columns = {config.image_column: list(images), config.label_column: list(labels)}
    return datasets.Dataset.from_dict(columns, features=features)


def _class_root(root: Path, split: str, fallback: bool) -> Path:
    """Folder whose sub-folders are the classes: the split's own, or the root itself where there are no splits."""
    if Path(split).name != split or split == "..":
        raise ConfigError(f"The split {split!r} must be the name of a folder inside the data, not a path.")
    if (root / split).is_dir():
        return root / split
    if fallback:
        return root
    raise DataError(f"{root} has no folder '{split}'; set dataset.test_split, or leave it empty to hold out a part.")
