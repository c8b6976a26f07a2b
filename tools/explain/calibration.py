"""The server's images that target weights are learned on, and those that they are measured on."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from task.data.images import ImageSet, decode
from task.data.sampling import labels_of, stratified_sample
from task.data.sources import DATA_VARIABLE, load_split, node_location
from task.errors import DataError
from task.seeding import derive_seed
from tools.explain.records import Run

MIN_IMAGES = 4
"""Fewest test images of a server: two parts of two."""


@dataclass(frozen=True, eq=False)
class ServerImages:
    """The server's images of a run, in two parts of equal size."""

    calibration: ImageSet
    """Target weights are learned on these; they must not be used to report an accuracy."""
    held_out: ImageSet
    """On these the learned weights are only measured."""

    def to(self, device: torch.device) -> "ServerImages":
        """Copy both parts to a device."""
        return ServerImages(self.calibration.to(device), self.held_out.to(device))


def server_images(run: Run, wanted: int) -> ServerImages:
    """Draw two parts of a run's server test images, seeded by the run's seed, in balance of classes.

    Parameters
    ----------
    run : Run
        Its config says what the images are; the environment's ``PETALWISE_DATA`` where they lie.
    wanted : int
        Size of each part; where there are not twice as many images, each part is half of them.

    Returns
    -------
    ServerImages
        Distinct images, on the CPU.

    Raises
    ------
    PetalwiseError
        If the images cannot be had, are too few, or have other classes than the run.
    """
    settings, classes = run.settings, run.records[0].num_classes
    split = load_split(settings.dataset, "test", node_location({}), derive_seed(settings.seed, "dataset"))
    labels, found = labels_of(split), len(split.features["label"].names)
    if found != classes:
        raise DataError(
            f"{run.folder.name} has {classes} classes, but the server's images have {found}; "
            f"set {DATA_VARIABLE} to the folder that the run had."
        )
    if len(labels) < MIN_IMAGES:
        raise DataError(f"{run.folder.name}: the server has {len(labels)} test images and {MIN_IMAGES} are needed.")
    count = min(wanted, len(labels) // 2)
    drawn = stratified_sample(labels, 2 * count, derive_seed(settings.seed, "explain", "images"))
    chosen = stratified_sample(labels[drawn], count, derive_seed(settings.seed, "explain", "calibration")).tolist()
    images = decode(split.select(drawn), settings.backbone.image_size)
    others = sorted(set(range(2 * count)) - set(chosen))
    return ServerImages(_part(images, chosen), _part(images, others))


def _part(images: ImageSet, positions: Sequence[int]) -> ImageSet:
    return ImageSet(images.images[positions], images.labels[positions])
