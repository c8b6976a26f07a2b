"""Read one split as it is stored: a package's own data, a hub data set, parquet files, or a folder per class."""

import os
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from task.config import DatasetConfig
from task.errors import ConfigError, DataError
from task.folders import reason_of

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_split(config: DatasetConfig, split: str, location: Path | None) -> datasets.Dataset:
    """Read a split with the columns that the data itself has.

    Parameters
    ----------
    config : DatasetConfig
        Kind of storage and names of the columns.
    split : str
        Hub split, start of the parquet file names, or sub-folder; not used for packaged data.
    location : Path | None
        Folder of the data on this node, for the sources ``parquet`` and ``folder``.

    Returns
    -------
    datasets.Dataset
        At least one image.

    Raises
    ------
    ConfigError
        If the config names data that cannot exist.
    DataError
        If the data is missing, unreadable or empty.
    """
    if config.source == "packaged":
        dataset = _read_packaged(config)
    elif config.source == "hub":
        dataset = _read_hub(config, split)
    elif location is None:
        raise DataError(
            f"The data set '{config.name}' (source {config.source}) lies on each node, and this node does not say "
            f'where: set the node\'s own config data="/path" or the environment variable PETALWISE_DATA.'
        )
    else:
        dataset = _read_local(config, split, location)
    if len(dataset) == 0:
        raise DataError(f"The split '{split}' of the data set '{config.name}' has no images.")
    return dataset


def _read_packaged(config: DatasetConfig) -> datasets.Dataset:
    if config.name != "digits":
        raise ConfigError(f"dataset.name={config.name!r}: the only packaged data set is 'digits'.")
    from sklearn.datasets import load_digits  # takes 2 s to import

    digits = load_digits()
    images = np.rint(digits.images * (255 / digits.images.max())).astype(np.uint8)
    return _labelled(config, list(images), digits.target.tolist(), [str(name) for name in digits.target_names])


def _read_hub(config: DatasetConfig, split: str) -> datasets.Dataset:
    # The config may come from another party: it must not make this node read its own files.
    if not _HUB_REPOSITORY.fullmatch(config.path) or Path(config.path).exists():
        raise ConfigError(f"dataset.path={config.path!r} must name a hub data set as owner/name, and no local folder.")
    return _loaded(f"The split '{split}' of the hub data set {config.path}", config.path, split=split)


def _read_local(config: DatasetConfig, split: str, location: Path) -> datasets.Dataset:
    try:
        return _read_parquet(split, location) if config.source == "parquet" else _read_folder(config, split, location)
    except OSError as error:
        raise DataError(f"The data folder '{location.name}' cannot be read: {reason_of(error)}.") from error


def _read_parquet(split: str, location: Path) -> datasets.Dataset:
    files = sorted(
        str(file) for file in location.iterdir() if file.suffix == ".parquet" and file.name.startswith(split)
    )
    if not files:
        raise DataError(
            f"The data folder '{location.name}' has no parquet file whose name starts with '{split}'; "
            "correct dataset.train_split or dataset.test_split (an empty test_split holds out a part of the "
            "training split)."
        )
    return _loaded(f"The parquet files {split}* in '{location.name}'", "parquet", data_files=files, split="train")


def _loaded(what: str, *arguments: str, **options: Any) -> datasets.Dataset:
    try:
        return datasets.load_dataset(*arguments, **options)
    except Exception as error:  # storage, network and format libraries raise dozens of unrelated types here
        reason = error.__cause__ or error  # "an error occurred while generating the dataset" hides its cause
        raise DataError(f"{what} could not be read: {reason_of(reason)}") from error


def _read_folder(config: DatasetConfig, split: str, location: Path) -> datasets.Dataset:
    # Not the library's "imagefolder": it guesses splits from names, so that a class "test_tube" would go missing.
    folder = class_root(config, split, location)
    splits = [location / name for name in (config.train_split, config.test_split) if name]
    parents = {folder, *(path for path in splits if path.is_dir())}
    names = sorted({path.name for parent in parents for path in parent.iterdir() if _is_class(path)})
    files = {name: images_in(folder / name) for name in names}
    images = [str(path) for paths in files.values() for path in paths]
    if not images:
        raise DataError(
            f"The data folder '{folder.name}' holds no images; expected one folder per class, as in cat/1.png."
        )
    labels = [code for code, paths in enumerate(files.values()) for _ in paths]
    return _labelled(config, images, labels, names)


def class_root(config: DatasetConfig, split: str, location: Path) -> Path:
    """Find the folder whose sub-folders are the classes: the split's own, or the location where it has no splits.

    Raises
    ------
    ConfigError
        If a split is no name of a folder.
    DataError
        If there is no such folder.
    """
    for name in (config.train_split, config.test_split):
        if Path(name).name != name or name == "..":
            raise ConfigError(f"The split {name!r} must be the name of a folder inside the data, not a path.")
    if (location / split).is_dir():
        return location / split
    if split == config.train_split and not (config.test_split and (location / config.test_split).is_dir()):
        return location
    raise DataError(
        f"The data folder '{location.name}' has no folder '{split}'; correct dataset.train_split or dataset.test_split "
        f"(an empty test_split holds out a part of the training images)."
    )


def images_in(folder: Path) -> list[Path]:
    """List the images of a folder, such as a class's, and of the folders inside it; hidden ones are passed over.

    Not by ``Path.rglob``, which passes over folders that it may not read.

    Returns
    -------
    list[Path]
        Sorted; empty where there is no such folder.

    Raises
    ------
    DataError
        If the name of a file is not UTF-8.
    OSError
        If a folder cannot be read.
    """
    if not folder.exists():
        return []
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for path in map(Path(parent).joinpath, files) if _is_image(path)]
    undecodable = next((path.name for path in found if not _is_utf8(str(path))), None)
    if undecodable is not None:
        raise DataError(f"The name of the file {undecodable!r} in '{folder.name}' is not UTF-8; rename it.")
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _labelled(config: DatasetConfig, images: list[Any], labels: list[int], names: list[str]) -> datasets.Dataset:
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({config.image_column: datasets.Image(), config.label_column: label})
    columns = {config.image_column: images, config.label_column: labels}
    return datasets.Dataset.from_dict(columns, features=features)
