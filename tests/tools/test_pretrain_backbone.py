"""Pretraining on a CIFAR-100 of a few images: what it writes, and what an interruption costs."""

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage

from task.config import BackboneConfig, TaskConfig
from task.model import build_model
from task.packaged_weights import read_packaged_weights
from tools import pretrain_backbone
from tools.pretrain_backbone import main, read_images

LABELS = [3, 99, 0, 41, 3, 7, 99, 12]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two files of parquet with the columns and types of CIFAR-100."""
    folder = tmp_path_factory.mktemp("cifar100")
    for seed, split in enumerate(("train", "test")):
        pixels = np.random.default_rng(seed).integers(0, 256, (len(LABELS), 32, 32, 3), dtype=np.uint8)
        images = [PillowImage.fromarray(image) for image in pixels]
        features = Features({"img": Image(), "fine_label": ClassLabel(100)})
        table = Dataset.from_dict({"img": images, "fine_label": LABELS}, features=features)
        table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        np.save(folder / f"{split}.npy", pixels)
    return folder


def pretrain(data, out, *options):
    main([str(data), "--out", str(out), "--batch-size", "4", *options])


def pretrain_interrupted(data, out, *options):
    """Pretrain until the first epoch is kept."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_backbone, "accuracy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(data, out, *options)


def test_the_images_are_read_as_they_are(data):
    train = read_images(data, "train")
    assert train.labels.tolist() == LABELS
    assert (train.images.permute(0, 2, 3, 1).numpy() == np.load(data / "train.npy")).all()


def test_it_writes_weights_that_the_packaged_backbone_can_have(data, tmp_path):
    out = tmp_path / "weights.json"
    pretrain(data, out, "--epochs", "1", "--seed", "5")
    model = build_model(TaskConfig(backbone=BackboneConfig(source="random", arguments=arguments_of(out))), 10)
    plain = {name.replace(".base_layer", "").removeprefix("base_model.model.") for name in model.module.state_dict()}
    weights = read_packaged_weights(out)
    assert set(weights) <= plain
    assert len(weights) > 70
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in weights.values())
    record = json.loads(out.read_text())
    assert record["data"] == "CIFAR-100, 8 training images"
    assert record["recipe"] == {"epochs": 1, "batch_size": 4, "lr": 2e-3, "weight_decay": 0.05, "seed": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["weights.json"]


def arguments_of(out):
    arguments = json.loads(out.read_text())["arguments"]
    del arguments["img_size"]
    return arguments


def test_an_interrupted_run_goes_on_to_the_same_bits(data, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.json", tmp_path / "broken.json"
    pretrain(data, whole, "--epochs", "2")
    pretrain_interrupted(data, broken, "--epochs", "2")
    assert (tmp_path / "broken.partial.pt").exists()
    assert not broken.exists()
    epochs = []
    train_epoch = pretrain_backbone.train_epoch
    monkeypatch.setattr(
        pretrain_backbone, "train_epoch", lambda *given: (epochs.append(given[3]), train_epoch(*given))[1]
    )
    pretrain(data, broken, "--epochs", "2")
    assert epochs == [1]
    assert broken.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("other", [("--seed", "1"), ("--epochs", "3"), ("--lr", "0.1")])
def test_progress_of_another_recipe_is_refused(data, tmp_path, other):
    out = tmp_path / "weights.json"
    pretrain_interrupted(data, out, "--epochs", "2")
    with pytest.raises(SystemExit, match=r"weights\.partial\.pt was left by a run with another recipe"):
        pretrain(data, out, "--epochs", "2", *other)


def test_missing_data_is_told_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="no parquet file whose name starts with 'train'"):
        pretrain(tmp_path, tmp_path / "weights.json")
