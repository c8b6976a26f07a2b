"""What a node says of itself in its node config."""

import pytest

from client_app.node import EVERYTHING_AS_FEDERATION, NODE_KEYS, Node, OwnSettings, partition_of, unknown_keys
from task.config import DatasetConfig, TaskConfig, TrainConfig
from task.errors import ConfigError


def node(**node_config):
    return Node.from_config({key.replace("_", "-"): value for key, value in node_config.items()}, node_id=99)


def test_a_node_is_named_by_itself_its_partition_or_flower():
    assert node(name="site", partition_id=3).name == "site"
    assert node(name=5).name == "5"
    assert node(partition_id=0, num_partitions=2).name == "0"
    assert node().name == "99"
    assert node(name="").name == "99"


def test_partitions_are_taken_as_they_are_given():
    assert partition_of(node(partition_id=3, num_partitions="4"), "iid") == (3, 4)
    assert partition_of(node(), "iid") == (0, 1)


def test_without_settings_of_its_own_a_node_does_what_the_federation_says():
    task = TaskConfig()
    assert node(partition_id=0, num_partitions=2).own == EVERYTHING_AS_FEDERATION
    assert EVERYTHING_AS_FEDERATION.applied(task) == task


def test_settings_of_its_own_win_and_the_batch_size_is_a_limit():
    task = TaskConfig(train=TrainConfig(batch_size=16), dataset=DatasetConfig(image_column="img"))
    own = node(device="cpu", batch_size=8, label_column="kind").own.applied(task)
    assert (own.train.device, own.train.batch_size) == ("cpu", 8)
    assert (own.dataset.image_column, own.dataset.label_column) == ("img", "kind")
    assert (task.train.device, task.train.batch_size, task.dataset.label_column) == ("auto", 16, "label")
    assert node(batch_size="64").own.applied(task).train.batch_size == 16
    assert node(image_column="photo").own.applied(task).dataset.image_column == "photo"


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:11"])
def test_devices(device):
    assert node(device=device).own.device == device


@pytest.mark.parametrize("device", ["gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "meta", "1", 0])
def test_what_is_no_device_is_refused(device):
    with pytest.raises(ConfigError, match=r"device='.*'; it may be auto, cpu, cuda, .*cuda:1\."):
        OwnSettings.from_config({"device": device})


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "many", "1.0", "-3"])
def test_what_is_no_batch_size_is_refused(size):
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        OwnSettings.from_config({"batch-size": size})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("batch_size", "batch-size"),
        ("batchsize", "batch-size"),
        ("Device", "device"),
        ("nmae", "name"),
        ("image_column", "image-column"),
        ("backbone", "backbones"),
        ("partition_id", "partition-id"),
    ],
)
def test_a_misspelt_key_is_refused_with_the_one_that_is_near(key, meant):
    with pytest.raises(ConfigError, match=f"the key '{key}', which means nothing here. Did you mean '{meant}'"):
        Node.from_config({key: 1}, 99)


def test_keys_for_other_apps_are_let_be(tmp_path):
    others = {"dataset-path": "/data", "dataset": "mnist", "num-classes": 3, "region": "north", "gpu": True}
    assert Node.from_config(others, 99) == node()
    assert unknown_keys({**others, "name": "a"}) == list(others)
    folders = dict.fromkeys(("data", "backbones", "state"), str(tmp_path))
    values = {**dict.fromkeys(NODE_KEYS, 1), **folders, "device": "cpu", "resident": True}
    assert Node.from_config(values, 99).data == tmp_path
    assert not unknown_keys(values)
