"""The partition that the page shows is the one that the clients had."""

import numpy as np
import pytest

from client_app.node import Node
from client_app.worker import Worker
from task.config import TaskConfig, typed
from task.errors import DataError
from tools.report.partition import class_counts
from tools.report.reading import read_runs


def config_of(run):
    return typed(TaskConfig, {key: run.config[key] for key in TaskConfig.__dataclass_fields__})


def test_the_counts_are_those_of_the_clients_own_images(folders):
    [run] = read_runs([folders["livar"]])
    found = class_counts(run)
    worker = Worker(config_of(run), None, None)
    assert found.clients == ["0", "1", "2", "3"]
    for client, counts in zip(found.clients, found.counts, strict=True):
        data = worker.client_data(Node.from_config({"partition-id": int(client), "num-partitions": 4}, 1))
        labels = np.concatenate([data.train.labels.numpy(), data.test.labels.numpy()])
        np.testing.assert_array_equal(counts, np.bincount(labels, minlength=10))
    assert found.classes == [str(digit) for digit in range(10)]


def test_an_older_record_names_its_clients_by_their_partitions(written):
    used = {"clients_used": [str(number) for number in range(10)]}
    [run] = read_runs([written({}, used)])
    assert class_counts(run).counts.shape == (10, 10)


SHARES = {"clients_partition": {"site-b": "partition 0 of 3", "site-a": "partition 2 of 3"}}


def test_clients_with_names_of_their_own_have_the_partitions_that_they_told(written):
    [run, numbers] = read_runs([written(SHARES), written({"clients_used": ["0", "1", "2"]})])
    counts, whole = class_counts(run), class_counts(numbers)
    assert counts.clients == ["site-a", "site-b"]
    np.testing.assert_array_equal(counts.counts, whole.counts[[2, 0]])


@pytest.mark.parametrize(
    ("report", "overrides", "reason"),
    [
        ({}, (), "do not tell which part"),
        ({"clients_used": ["0", "2"]}, (), "do not tell which part"),
        ({"clients_used": ["0", "1"]}, ["strategy.fraction_train=0.5"], "do not tell which part"),
        ({"clients_used": ["0", "1"]}, ["partition=whole"], "images of its own"),
        ({"clients_used": ["0", "1"]}, ["dataset=image_folder"], "does not say where"),
        ({"clients_used": ["0", "1"]}, ["dataset=eurosat"], "could not be read"),
    ],
)
def test_why_there_is_none_is_told(written, report, overrides, reason):
    [run] = read_runs([written(report, overrides=overrides)])
    with pytest.raises(DataError, match=reason):
        class_counts(run)
