"""Backbones that come from the server: kept if they are what they are said to be, and only then."""

import hashlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from task.arrays import FLAT, array_values, flat_to_array
from task.backbone import base_hash, build_backbone
from task.delivery import delivered_folder, keep_delivered, lacks, packed_backbone
from task.errors import MessageError, ModelError, StateError


@pytest.fixture(scope="module")
def packed(tiny_task):
    backbone = build_backbone(tiny_task.backbone, 5, seed=3)
    return backbone, *packed_backbone(tiny_task.backbone, backbone)


def record(array):
    return ArrayRecord({FLAT: array})


def test_what_was_sent_builds_the_same_backbone_under_any_seed(tmp_path, packed):
    backbone, config, array = packed
    assert lacks(config, tmp_path)
    keep_delivered(record(array), config.checkpoint, tmp_path / "backbones")
    assert not lacks(config, tmp_path / "backbones")
    built = build_backbone(config, 7, tmp_path / "backbones", seed=8)
    assert base_hash(built) == base_hash(backbone)
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    with torch.no_grad():
        assert torch.equal(built.forward_features(images), backbone.forward_features(images))


def test_the_name_is_the_sha256_of_the_file(tmp_path, packed):
    _, config, array = packed
    keep_delivered(record(array), config.checkpoint, tmp_path)
    data = (tmp_path / config.checkpoint).read_bytes()
    assert config.checkpoint == f"{hashlib.sha256(data).hexdigest()}.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == [config.checkpoint]


def test_a_damaged_file_counts_as_none(tmp_path, packed):
    _, config, array = packed
    keep_delivered(record(array), config.checkpoint, tmp_path)
    (tmp_path / config.checkpoint).write_bytes(b"damaged")
    assert lacks(config, tmp_path)


def test_other_bytes_are_not_kept(tmp_path, packed):
    _, config, array = packed
    values = array_values(array, array.shape, "uint8").copy()
    values[-1] ^= 1
    with pytest.raises(MessageError, match="does not have the SHA-256"):
        keep_delivered(record(flat_to_array(values, "uint8")), config.checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../x.safetensors", "a" * 64, "A" * 64 + ".safetensors", "/etc/passwd", ""])
def test_a_name_that_is_no_digest_is_never_used_as_a_path(tmp_path, packed, name):
    _, config, array = packed
    with pytest.raises(MessageError, match="is not the name of a backbone"):
        keep_delivered(record(array), name, tmp_path / "backbones")
    with pytest.raises(MessageError, match="is not the name of a backbone"):
        lacks(replace(config, checkpoint=name), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"other": flat_to_array(np.zeros(3, np.uint8), "uint8")},
        {FLAT: flat_to_array(np.zeros(0, np.uint8), "uint8")},
        {FLAT: flat_to_array(np.zeros((2, 2), np.uint8), "uint8")},
        {FLAT: Array(dtype="uint8", shape=(2**60,), stype="numpy.ndarray", data=b"")},
    ],
)
def test_anything_but_one_array_of_bytes_is_refused(tmp_path, arrays):
    with pytest.raises(MessageError, match="one array of 1 to"):
        keep_delivered(ArrayRecord(arrays), "0" * 64 + ".safetensors", tmp_path)


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, packed, monkeypatch):
    _, config, array = packed

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StateError, match="cannot keep the backbone: .*No space left"):
        keep_delivered(record(array), config.checkpoint, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_it_the_model_cannot_be_built(tmp_path, packed):
    with pytest.raises(ModelError, match="was to come from the server"):
        build_backbone(packed[1], 5, delivered_folder(tmp_path))


def test_backbones_of_other_sources_are_never_lacking(tmp_path, tiny_task):
    assert not lacks(tiny_task.backbone, tmp_path)
