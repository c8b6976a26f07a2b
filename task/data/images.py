"""Decode images once into one uint8 tensor."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.common.logger import log
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from task.data.sampling import ROW, labels_of
from task.errors import DataError, shortened
from task.folders import without_folders
from task.torchvision_mend import mend_torchvision

if TYPE_CHECKING:
    from datasets import Dataset


MAX_TOLD = 3
"""So many of the images that cannot be read are named to the server; the reasons of all would be too long."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Decoded images and their classes.

    Parameters
    ----------
    images : Tensor
        RGB, uint8, shape [n, 3, h, w].
    labels : Tensor
        Class indices, int64, shape [n].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Count the images."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageSet":
        """Copy both tensors to a device, unless they are there."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def part(self, start: int, end: int) -> "ImageSet":
        """Take the images from ``start`` to before ``end``; the memory is shared."""
        return ImageSet(self.images[start:end], self.labels[start:end])


def decode(dataset: "Dataset", image_size: int, root: Path | None = None) -> ImageSet:
    """Decode every image: RGB, shorter side resized to ``image_size`` (bicubic), centre cropped to a square.

    Parameters
    ----------
    dataset : datasets.Dataset
        Columns ``image`` and ``label``. Any Pillow mode is read: transparency goes over white, 16 bits
        per pixel are scaled to 8, the camera's orientation is applied.
    image_size : int
        Side of the result, pixels.
    root : Path, optional
        Folder of the data, from which errors name files.

    Returns
    -------
    ImageSet
        Images of shape [n, 3, image_size, image_size] on the CPU, in the order of the rows.

    Raises
    ------
    DataError
        If images cannot be read: how many, and the first by file or row. The log has them all.
    """
    from datasets import Image as ImageFeature

    decode_one = image_decoder(image_size)
    images = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8)
    pixels = images.numpy()  # the same memory; small copies by torch would each wake its threads
    stored = dataset.select_columns(["image"]).cast_column("image", ImageFeature(decode=False))
    failures = []
    for row, record in enumerate(stored):
        try:
            pixels[row] = decode_one(record["image"])
        except Exception as error:  # Pillow's decoders raise dozens of unrelated types on broken files
            failures.append(f"{_name(dataset, row, record['image'], root)} ({unreadable_reason(error)})")
    if failures:
        failures.sort()
        log(ERROR, "Images that could not be read:\n%s", "\n".join(failures))
        raise DataError(
            f"{len(failures)} of {len(dataset)} images could not be read: {shortened(failures, MAX_TOLD)}. "
            "Repair or remove them."
        )
    return ImageSet(images, torch.from_numpy(labels_of(dataset)))


def image_decoder(image_size: int) -> Callable[[dict[str, Any] | None], NDArray[np.uint8]]:
    """Make the function that decodes one image as :func:`decode` does all.

    Parameters
    ----------
    image_size : int
        Side of the result, pixels.

    Returns
    -------
    callable
        Maps a stored image, ``{"bytes": ..., "path": ...}``, to uint8 [3, image_size, image_size]. It raises whatever
        Pillow does of an image that cannot be read; see :func:`unreadable_reason`.
    """
    to_square = _square_transform(image_size)
    return lambda stored: np.asarray(to_square(_to_rgb(open_stored(stored)))).transpose(2, 0, 1)


def unreadable_reason(error: Exception) -> str:
    """Say in a few words why an image could not be decoded, without the folders of this machine."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind that Pillow cannot read"
    return without_folders(str(error).strip() or type(error).__name__)


def _name(dataset: "Dataset", row: int, stored: dict[str, Any] | None, root: Path | None) -> str:
    """Name an image by its file inside the data folder, or by its row, from 0, in all parquet files of the split."""
    path = (stored or {}).get("path")
    if path and (stored or {}).get("bytes") is None:
        return os.path.relpath(path, root) if root and Path(path).is_relative_to(root) else Path(path).name
    stored_row = dataset.select_columns([ROW])[row][ROW] if ROW in dataset.column_names else row
    return f"row {stored_row}" + (f", {Path(path).name}" if path else "")


def _square_transform(image_size: int) -> Callable[[Image.Image], Image.Image]:
    mend_torchvision()
    from torchvision.transforms import v2  # takes 2 s to import

    resize = v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC)
    square: Callable[[Image.Image], Image.Image] = v2.Compose([resize, v2.CenterCrop(image_size)])
    return square


def open_stored(stored: dict[str, Any] | None) -> Image.Image:
    """Open a stored image, without decoding it yet: bytes, or a file on this machine (never an address)."""
    if stored is None:
        raise ValueError("the row has no image")
    return Image.open(BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; save it with 8 or 16 bits per channel")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale a grey image of 16 bits per pixel, which Pillow would clip at 255."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65_535:
        raise ValueError("grey values outside 16 bits; save it with 8 or 16 bits per channel")
    return Image.fromarray(((pixels * 255 + 32_767) // 65_535).astype(np.uint8))
