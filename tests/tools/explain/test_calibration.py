"""The server's images, in two parts."""

import numpy as np
import pytest
import torch
from PIL import Image

from task.data.sources import DATA_VARIABLE
from task.errors import DataError
from tests.tools.explain.recorded import record_run
from tools.explain.calibration import server_images
from tools.explain.records import read_run


@pytest.fixture
def run(tmp_path):
    return read_run(record_run(tmp_path))


def keys(part):
    return {bytes(image.numpy().tobytes()) for image in part.images}


def test_parts_are_distinct_equal_in_size_and_seeded(run):
    images = server_images(run, 12)
    assert len(images.calibration) == len(images.held_out) == 12
    assert not keys(images.calibration) & keys(images.held_out)
    again = server_images(run, 12)
    assert torch.equal(again.calibration.images, images.calibration.images)
    assert torch.equal(again.held_out.labels, images.held_out.labels)


def test_each_part_is_at_most_half(run):
    """The run has 40 test images."""
    images = server_images(run, 500)
    assert len(images.calibration) == len(images.held_out) == 20
    for part in (images.calibration, images.held_out):
        assert np.bincount(part.labels.numpy(), minlength=10).max() <= 4


def test_runs_of_other_seeds_have_images_of_their_own(tmp_path, run):
    other = read_run(record_run(tmp_path, seed=1))
    assert keys(server_images(run, 12).calibration) != keys(server_images(other, 12).calibration)


@pytest.fixture
def folder_run(tmp_path, monkeypatch):
    """A run on one's own folder of images, of ten classes; makes the folder with so many classes and test images."""

    def make(classes, count):
        for label in range(classes):
            for split, number in (("train", 2), ("test", count if label == 0 else 0)):
                folder = tmp_path / "data" / split / f"class-{label}"
                folder.mkdir(parents=True)
                for i in range(number):
                    Image.new("RGB", (16, 16), (10 * i, 20 * label, 0)).save(folder / f"{i}.png")
        monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
        return read_run(record_run(tmp_path, overrides=["dataset=image_folder"]))

    return make


def test_images_of_other_classes_are_refused(folder_run):
    with pytest.raises(DataError, match=r"has 10 classes, but the server's images have 3; set PETALWISE_DATA"):
        server_images(folder_run(classes=3, count=4), 12)


def test_too_few_images_are_refused(folder_run):
    with pytest.raises(DataError, match="the server has 3 test images and 4 are needed"):
        server_images(folder_run(classes=10, count=3), 12)
