"""Decode images once into one uint8 tensor."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from task.data.sampling import labels_of
from task.errors import DataError
from task.folders import reason_of
from task.torchvision_mend import mend_torchvision

if TYPE_CHECKING:
    from datasets import Dataset


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


def decode(dataset: "Dataset", image_size: int) -> ImageSet:
    """Decode every image: RGB, shorter side resized to ``image_size`` (bicubic), centre cropped to a square.

    Parameters
    ----------
    dataset : datasets.Dataset
        Columns ``image`` and ``label``. Any Pillow mode is read: transparency goes over white, 16 bits
        per pixel are scaled to 8, the camera's orientation is applied.
    image_size : int
        Side of the result, pixels.

    Returns
    -------
    ImageSet
        Images of shape [n, 3, image_size, image_size] on the CPU, in the order of the rows.

    Raises
    ------
    DataError
        If an image cannot be read, naming its row and file.
    """
    from datasets import Image as ImageFeature

    to_square = _square_transform(image_size)
    images = torch.empty(len(dataset), 3, image_size, image_size, dtype=torch.uint8)
    pixels = images.numpy()  # the same memory; small copies by torch would each wake its threads
    stored = dataset.select_columns(["image"]).cast_column("image", ImageFeature(decode=False))
    for row, record in enumerate(stored):
        try:
            pixels[row] = np.asarray(to_square(_to_rgb(_open(record["image"])))).transpose(2, 0, 1)
        except Exception as error:  # Pillow's decoders raise dozens of unrelated types on broken files
            path = (record["image"] or {}).get("path")
            name = Path(path).name if path else "stored in the table"
            raise DataError(
                f"Image {row} of {len(dataset)} ({name}) could not be read: {reason_of(error)}. Repair or remove it."
            ) from error
    return ImageSet(images, torch.from_numpy(labels_of(dataset)))


def _square_transform(image_size: int) -> Callable[[Image.Image], Image.Image]:
    mend_torchvision()
    from torchvision.transforms import v2  # takes 2 s to import

    resize = v2.Resize(image_size, interpolation=v2.InterpolationMode.BICUBIC)
    square: Callable[[Image.Image], Image.Image] = v2.Compose([resize, v2.CenterCrop(image_size)])
    return square


def _open(stored: dict[str, Any] | None) -> Image.Image:
    """Open a stored image: bytes, or a file on this machine (never an address)."""
    if stored is None:
        raise ValueError("the row has no image")
    image = Image.open(BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])
    return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
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
