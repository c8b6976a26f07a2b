"""The real ClientApp, called without a network."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from client_app.app import _train_head, app
from client_app.node import Node
from client_app.worker import worker_for, worker_of
from server_app.compose import compose_run
from task.arrays import FLAT, flat_to_array
from task.config import task_to_json
from task.data.sources import DATA_VARIABLE
from task.errors import DataError
from task.exchange import Exchange
from task.messages import (
    ARRAYS,
    CONFIG,
    IDENTIFY,
    METRICS,
    NOT_KEPT,
    Instruction,
    classes_digest,
    flat_content,
    received_flat,
)
from task.model import build_model
from tools.debug import InProcessGrid, simulated_nodes

TINY = (
    "backbone=vit_pico_random backbone.image_size=16 backbone.arguments.embed_dim=32 backbone.arguments.depth=2 "
    "backbone.arguments.num_heads=2 dataset.max_train_samples=120 partition=iid train.batch_size=8 lora.dropout=0.1"
)


def task_json(extra=""):
    return task_to_json(compose_run({"overrides": f"{TINY} {extra}"}).settings)


@pytest.fixture(scope="module")
def model():
    return build_model(compose_run({"overrides": TINY}).settings, num_classes=10)


@pytest.fixture
def grid():
    return InProcessGrid(app, simulated_nodes(3))


def ask(grid, node, kind, content):
    (reply,) = grid.send_and_receive([Message(content, node, kind)])
    return reply


def content(model, server_round=1, **fields):
    instruction = Instruction(server_round, fields.pop("task", task_json()), model.layout.digest, **fields)
    return flat_content(flat_to_array(model.read()), instruction)


def test_says_who_it_is(grid, model):
    query = RecordDict({CONFIG: ConfigRecord({"task": task_json(), "layout": model.layout.digest})})
    record = ask(grid, 2, IDENTIFY, query).content[CONFIG]
    assert record["client"] == "1"
    assert record["base"] == model.base
    assert record["layout"] == model.layout.digest
    assert record["classes"] == classes_digest([str(digit) for digit in range(10)])


def test_a_nodes_own_name_wins():
    assert Node.from_config({"name": "site-1", "partition-id": 3, "num-partitions": 4}, 99).name == "site-1"
    assert Node.from_config({}, 99).name == "99"


def test_a_node_trains_with_its_own_batch_size(model):
    def steps(config):
        grid = InProcessGrid(app, [config])
        return ask(grid, 1, MessageType.TRAIN, content(model)).content[METRICS]["steps"]

    config = simulated_nodes(3)[0]
    assert steps(config) == 2 * 4
    assert steps(config | {"batch-size": 4}) == 2 * 8
    assert steps(config | {"batch-size": 400}) == 2 * 4


def test_same_round_same_bits_and_other_round_other_bits(grid, model):
    def trained(server_round):
        reply = ask(grid, 1, MessageType.TRAIN, content(model, server_round))
        return received_flat(reply, model.layout.size)

    first = trained(1)
    assert not np.array_equal(first, model.read())
    assert not np.array_equal(trained(2), first)
    np.testing.assert_array_equal(trained(1), first)


def test_nothing_is_built_or_decoded_again_per_message(grid, model, monkeypatch):
    ask(grid, 1, MessageType.TRAIN, content(model))
    misses = worker_for.cache_info().misses
    for name in ("build_model", "decode", "load_split", "make_optimizer", "partition_indices"):
        monkeypatch.setattr(f"client_app.worker.{name}", None)
    for server_round in (2, 3):
        assert not ask(grid, 1, MessageType.TRAIN, content(model, server_round)).has_error()
    assert not ask(grid, 1, MessageType.EVALUATE, content(model)).has_error()
    assert worker_for.cache_info().misses == misses


def test_the_received_model_is_evaluated_along_with_training_where_asked(grid, model):
    separate = ask(grid, 1, MessageType.EVALUATE, content(model)).content[METRICS]
    along = ask(grid, 1, MessageType.TRAIN, content(model, evaluate="received")).content[METRICS]
    assert along["test-accuracy"] == separate["accuracy"]
    assert along["test-loss"] == separate["loss"]
    assert along["test-num-examples"] == separate["num-examples"]
    assert "test-accuracy" not in ask(grid, 1, MessageType.TRAIN, content(model)).content[METRICS]


def test_an_evaluation_after_tuning_forgets_the_tuning(grid, model):
    plain = ask(grid, 1, MessageType.EVALUATE, content(model)).content[METRICS]
    tuned = ask(grid, 1, MessageType.EVALUATE, content(model, evaluate="tuned")).content[METRICS]
    assert tuned["accuracy"] == plain["accuracy"]
    assert tuned["loss"] == plain["loss"]
    assert tuned["tuned-loss"] < plain["loss"]
    again = ask(grid, 1, MessageType.EVALUATE, content(model)).content[METRICS]
    assert again["loss"] == plain["loss"]
    assert "tuned-loss" not in again


def test_a_client_goes_on_from_what_it_kept(grid, model):
    """Two rounds without any exchange between them are two rounds with one in which nothing changed."""
    everything = content(model, 1, exchange=Exchange(keep=True, run="a"))
    first = received_flat(ask(grid, 1, MessageType.TRAIN, everything), model.layout.size)
    nothing = Instruction(2, task_json(), model.layout.digest, exchange=Exchange(down=(), start=1, run="a"))
    alone = ask(grid, 1, MessageType.TRAIN, flat_content(flat_to_array(np.empty(0, np.float32)), nothing))
    sent = Instruction(2, task_json(), model.layout.digest)
    again = ask(grid, 1, MessageType.TRAIN, flat_content(flat_to_array(np.array(first)), sent))
    np.testing.assert_array_equal(*(received_flat(reply, model.layout.size) for reply in (alone, again)))
    lost = ask(grid, 2, MessageType.TRAIN, flat_content(flat_to_array(np.empty(0, np.float32)), nothing))
    assert NOT_KEPT in lost.error.reason


def test_proximal_training_stays_nearer(grid, model):
    def distance(mu):
        reply = ask(grid, 1, MessageType.TRAIN, content(model, proximal_mu=mu))
        return np.linalg.norm(received_flat(reply, model.layout.size) - model.read())

    assert distance(100.0) < 0.9 * distance(0.0)


def test_the_head_is_trained_first_and_the_adapter_for_it(grid, model):
    """The local epochs leave the head that its own epochs made; without any of those, both are trained at once."""
    head = model.layout.slices["head"]

    def trained(head_epochs, overrides=""):
        message = content(model, task=task_json(f"train.max_steps=0 {overrides}"), head_epochs=head_epochs)
        return received_flat(ask(grid, 1, MessageType.TRAIN, message), model.layout.size)

    one, two, more = trained(1), trained(2), trained(1, "train.local_epochs=3")
    np.testing.assert_array_equal(more[head], one[head])
    assert np.abs(two[head] - one[head]).max() > 0
    assert np.abs(more[: head.start] - one[: head.start]).max() > 0
    assert np.abs(one[: head.start] - model.read()[: head.start]).max() > 0
    assert np.abs(trained(0)[head] - one[head]).max() > 0


@pytest.mark.parametrize("purpose", ["", "tuning-"])
def test_while_the_head_is_trained_the_adapter_keeps_its_bits(model, purpose):
    instruction = Instruction(1, task_json("train.max_steps=1"), model.layout.digest, head_epochs=1)
    node = Node.from_config({"partition-id": 0, "num-partitions": 3}, 1)
    worker = worker_of(node, instruction.task)
    worker.model.load(model.read())
    _train_head(worker, node, instruction, purpose)
    head, flat = model.layout.slices["head"], worker.model.read()
    np.testing.assert_array_equal(flat[: head.start], model.read()[: head.start])
    assert np.abs(flat[head] - model.read()[head]).max() > 0


def test_another_layout_is_refused(grid, model):
    message = content(model, task=task_json("lora.rank=4"))
    reply = ask(grid, 1, MessageType.TRAIN, message)
    assert reply.has_error()
    assert "another layout" in reply.error.reason


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda c: c.pop(CONFIG), "config record"),
        (lambda c: c.pop(ARRAYS), "array record"),
        (lambda c: c[ARRAYS].__setitem__(FLAT, flat_to_array(np.zeros(3, np.float32))), "shape"),
        (lambda c: c[CONFIG].__setitem__("task", "{"), "not JSON"),
        (lambda c: c[CONFIG].__setitem__("task", '{"seed": "${oc.env:HOME}"}'), "interpolation"),
        (lambda c: c[CONFIG].__setitem__("task", '{"train": {"lr": -1}}'), "train.lr=-1"),
        (lambda c: c[CONFIG].__setitem__("server-round", "one"), "server-round"),
    ],
)
def test_bad_messages_get_an_answer_that_explains(grid, model, spoil, reason):
    message = content(model)
    message[ARRAYS] = ArrayRecord(dict(message[ARRAYS]))
    spoil(message)
    reply = ask(grid, 1, MessageType.TRAIN, message)
    assert reply.has_error()
    assert reason in reply.error.reason


def test_a_partition_with_empty_clients_is_refused_with_the_numbers(grid):
    query = RecordDict({CONFIG: ConfigRecord({"task": task_json("partition.min_samples=100"), "layout": ""})})
    problem = ask(grid, 1, IDENTIFY, query).content[CONFIG]["error"]
    assert "40" in problem
    assert "partition.min_samples" in problem


def test_an_unknown_class_is_refused_by_name(grid, tmp_path, monkeypatch):
    from PIL import Image

    for name in ("rose", "tulip", "weed"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    task = task_json("dataset=image_folder dataset.classes=[rose,tulip] partition=whole dataset.max_train_samples=0")
    query = RecordDict({CONFIG: ConfigRecord({"task": task, "layout": ""})})
    assert "weed" in ask(grid, 1, IDENTIFY, query).content[CONFIG]["error"]


def test_a_server_never_tells_a_path(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    node = Node.from_config({}, 1)
    assert node.data is None
    with pytest.raises(DataError, match=DATA_VARIABLE):
        worker_for(task_json("dataset=image_folder partition=whole dataset.path=/etc"), node.data, node.backbones)
