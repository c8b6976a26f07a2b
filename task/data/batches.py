"""Batches from decoded images: shuffled, augmented and normalised as whole tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from task.data.images import ImageSet
from task.errors import ConfigError

SHIFTS_PER_SIDE = 8
"""``crop_flip`` shifts by up to one part in so many of the side."""


@dataclass(frozen=True, eq=False)
class Normaliser:
    """Map uint8 images to float32: scaled to [0, 1], less the mean, divided by the deviation.

    Parameters
    ----------
    scale, shift : Tensor
        Per-channel factor and offset, float32, shape [3, 1, 1]; see :meth:`of`.
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu") -> "Normaliser":
        """Precompute the factors on a device from the backbone's mean and deviation (images in [0, 1])."""
        means = torch.tensor(mean, dtype=torch.float64).reshape(-1, 1, 1)
        stds = torch.tensor(std, dtype=torch.float64).reshape(-1, 1, 1)
        return cls((1 / (255 * stds)).float().to(device), (-means / stds).float().to(device))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images [n, 3, h, w], uint8, on the factors' device; a new float32 tensor."""
        return images.to(torch.float32).mul_(self.scale).add_(self.shift)


def augment(images: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Augment each image of a batch by its own draw.

    Parameters
    ----------
    images : Tensor
        uint8, shape [n, 3, h, w].
    kind : str
        ``none``; ``flip``: mirrored left to right with probability 1/2; ``crop_flip``: also shifted by up
        to an eighth of the side in both directions, the border filled by reflection.
    generator : torch.Generator
        CPU generator of the draws, so that they do not depend on the images' device.

    Returns
    -------
    Tensor
        uint8, shape [n, 3, h, w].

    Raises
    ------
    ConfigError
        On another kind.
    """
    if kind == "none":
        return images
    if kind not in ("flip", "crop_flip"):
        raise ConfigError(f"train.augment={kind!r} is not one of: none, flip, crop_flip.")
    count, _, height, width = images.shape
    flipped = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    if kind == "flip":
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)
    rows = _shifted(count, height, generator).to(images.device)
    columns = _shifted(count, width, generator).to(images.device)
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    index, channel = torch.arange(count, device=images.device), torch.arange(images.shape[1], device=images.device)
    return images[index[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _shifted(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Source coordinates [count, side] of images shifted by one draw each, reflected at the border."""
    reach = side // SHIFTS_PER_SIDE
    shift = torch.randint(-reach, reach + 1, (count, 1), generator=generator)
    coordinates = (torch.arange(side) + shift).abs()
    return (side - 1) - ((side - 1) - coordinates).abs()


def train_batches(
    data: ImageSet,
    batch_size: int,
    epochs: int,
    max_steps: int,
    augment: str,
    normaliser: Normaliser,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a round's training batches; a generator in the same state yields the same bits.

    Parameters
    ----------
    data : ImageSet
        The client's training images.
    batch_size : int
        Images per batch; the last batch of an epoch may be smaller.
    epochs : int
        Passes over the data, each in its own order.
    max_steps : int
        Number of batches to end after; 0: no limit.
    augment : str
        Kind of augmentation, see :func:`augment`.
    normaliser : Normaliser
        Normalisation, on the data's device.
    generator : torch.Generator
        CPU generator of order and augmentation.

    Yields
    ------
    tuple of Tensor
        Images, float32 [batch, 3, h, w], and labels, int64 [batch].
    """
    yield from islice(_epochs(data, batch_size, epochs, augment, normaliser, generator), max_steps or None)


def _epochs(
    data: ImageSet, batch_size: int, epochs: int, kind: str, normaliser: Normaliser, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(epochs):
        order = torch.randperm(len(data), generator=generator).to(data.labels.device)
        for chosen in order.split(batch_size):
            yield normaliser(augment(data.images[chosen], kind, generator)), data.labels[chosen]


def eval_batches(data: ImageSet, batch_size: int, normaliser: Normaliser) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once, in order, normalised.

    Parameters
    ----------
    data : ImageSet
        Images to evaluate on.
    batch_size : int
        Images per batch; the last batch may be smaller.
    normaliser : Normaliser
        Normalisation, on the data's device.

    Yields
    ------
    tuple of Tensor
        Images, float32 [batch, 3, h, w], and labels, int64 [batch].
    """
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        yield normaliser(images), labels
