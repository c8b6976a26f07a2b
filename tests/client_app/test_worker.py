"""A process's memory between rounds: which images a node has, and how many clients' images are kept."""

from dataclasses import replace

import numpy as np
import pytest

from client_app import worker as worker_module
from client_app.node import Node, partition_of
from client_app.worker import Worker, worker_for, worker_of
from task.config import BackboneConfig, DatasetConfig, PartitionConfig, task_from_json, task_to_json
from task.errors import DataError, ModelError, PetalwiseError


def node(**node_config):
    return Node.from_config({key.replace("_", "-"): value for key, value in node_config.items()}, node_id=99)


@pytest.fixture
def task(tiny_task):
    dataset = DatasetConfig(max_train_samples=40)
    return replace(tiny_task, dataset=dataset, partition=PartitionConfig(kind="iid"))


@pytest.fixture
def worker(task):
    return Worker(task, None, None)


@pytest.mark.parametrize(
    "node_config",
    [
        {"partition_id": "one", "num_partitions": 4},
        {"partition_id": 1.5, "num_partitions": 4},
        {"partition_id": -1, "num_partitions": 4},
        {"partition_id": 4, "num_partitions": 4},
        {"partition_id": 0, "num_partitions": "many"},
        {"partition_id": 0, "num_partitions": 0},
        {"partition_id": 0},
        {"num_partitions": 4},
    ],
)
def test_a_partition_that_there_is_not_is_refused_by_the_keys(worker, node_config):
    with pytest.raises(DataError, match=r"node config has partition-id=.* and num-partitions=.* whole numbers"):
        worker.client_data(node(**node_config))
    assert partition_of(node(**node_config), "whole") == (0, 1)


def test_with_whole_a_node_has_all_its_data_whatever_its_partition(task):
    worker = Worker(replace(task, partition=PartitionConfig(kind="whole")), None, None)
    data = worker.client_data(node(partition_id=2))
    assert len(data.train) + len(data.test) == 40


def test_nodes_of_one_partition_but_other_names_split_it_each_in_their_own_way(worker):
    first, second = (worker.client_data(node(name=name)) for name in ("first", "second"))
    assert not np.array_equal(first.test.images.numpy(), second.test.images.numpy())


def test_images_are_kept_up_to_a_bound_and_the_longest_unused_go_first(worker, monkeypatch):
    clients = [node(partition_id=index, num_partitions=4) for index in range(4)]
    size = worker.client_data(clients[0]).nbytes
    assert size == 10 * 3 * 16 * 16
    monkeypatch.setattr(worker_module, "MAX_KEPT_BYTES", 2 * size)
    kept = worker.client_data(clients[0])
    worker.client_data(clients[1])
    assert worker.client_data(clients[0]) is kept
    worker.client_data(clients[2])
    assert worker.client_data(clients[0]) is kept
    monkeypatch.setattr(worker_module, "decode", None)
    with pytest.raises(TypeError):
        worker.client_data(clients[1])


def test_a_client_above_the_bound_is_still_served(worker, monkeypatch):
    monkeypatch.setattr(worker_module, "MAX_KEPT_BYTES", 1)
    for index in (0, 1):
        client = node(partition_id=index, num_partitions=2)
        assert worker.client_data(client) is worker.client_data(client)


def test_labels_are_read_once_for_all_clients(worker, monkeypatch):
    reads = []
    labels_of = worker_module.labels_of
    monkeypatch.setattr(worker_module, "labels_of", lambda dataset: reads.append(1) or labels_of(dataset))
    for index in range(3):
        worker.client_data(node(partition_id=index, num_partitions=3))
    assert len(reads) == 1


def test_size_and_normalisation_left_open_are_those_of_the_pretrained_model(task):
    backbone = replace(task.backbone, name="deit_tiny_patch16_224", image_size=0, mean=[], std=[])
    worker = Worker(replace(task, backbone=backbone), None, None)
    assert worker.client_data(node(partition_id=0, num_partitions=8)).train.images.shape[-1] == 224
    assert worker.normaliser.shift.flatten().tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    with pytest.raises(ModelError, match="no timm model"):
        Worker(replace(task, backbone=BackboneConfig(name="nothing")), None, None)


def test_a_partition_that_cannot_be_had_is_drawn_once_for_all_clients(task, monkeypatch):
    draws = []
    partition_indices = worker_module.partition_indices
    monkeypatch.setattr(worker_module, "partition_indices", lambda *a: draws.append(1) or partition_indices(*a))
    worker = Worker(replace(task, partition=PartitionConfig(kind="iid", min_samples=10_000)), None, None)
    for index in range(3):
        with pytest.raises(PetalwiseError, match="min_samples"):
            worker.client_data(node(partition_id=index, num_partitions=3))
    assert len(draws) == 1


def test_the_task_is_read_once_for_all_messages_and_anew_where_it_is_another(task, monkeypatch):
    reads = []
    monkeypatch.setattr(worker_module, "task_from_json", lambda text: reads.append(1) or task_from_json(text))
    texts = [task_to_json(replace(task, seed=seed)) for seed in (71, 72)]
    workers = [worker_of(node(partition_id=i % 2, num_partitions=2), texts[i // 3]) for i in range(6)]
    assert len(reads) == 2
    assert [worker.task.seed for worker in workers] == [71] * 3 + [72] * 3


def test_a_node_trains_within_its_own_limits(task):
    small = node(name="a", batch_size=3, device="cpu").own
    worker = worker_for(task_to_json(task), None, None, small)
    assert worker.task.train.batch_size == 3
    assert worker.device.type == "cpu"
    assert worker_for(task_to_json(task), None, None, small) is worker
    other = worker_for(task_to_json(task), None, None)
    assert other.task.train.batch_size == task.train.batch_size
