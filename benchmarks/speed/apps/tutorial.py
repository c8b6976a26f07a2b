"""The same federation as a tutorial writes it: every message builds the model and reads the images anew.

Adapter and head travel as one array per tensor, and Flower's own FedAvg averages them. Clients, cohorts, images,
batches and the initial adapter are those of the app, so that the final adapters can be compared.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from strategies.cohort import draw_cohort
from task.backbone import build_backbone
from task.config import TaskConfig, task_from_json
from task.data.batches import Normaliser, eval_batches, train_batches
from task.data.images import ImageSet, decode
from task.data.partitions import local_split, partition_indices
from task.data.sampling import labels_of
from task.data.sources import load_split
from task.model import add_adapter, canonical_name
from task.seeding import derive_seed, generator_for

client = ClientApp()
server = ServerApp()


@dataclass(frozen=True)
class Built:
    """What a message builds."""

    task: TaskConfig
    """The task."""
    module: nn.Module
    """The model with the received values."""
    train: ImageSet
    """Images to train on."""
    test: ImageSet
    """Images to evaluate on."""
    normaliser: Normaliser
    """Maps images to the model's input."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that train as the app does."""
    return {canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad}


def build_module(task: TaskConfig, num_classes: int, arrays: ArrayRecord | None = None) -> nn.Module:
    """Build the model, with received values where there are any."""
    backbone = build_backbone(task.backbone, num_classes, None, task.seed)
    module: nn.Module = add_adapter(backbone, task.lora, task.seed)
    if arrays is not None:
        received = arrays.to_torch_state_dict()
        for name, parameter in trainable(module).items():
            parameter.data.copy_(received[name])
    return module


def build(message: Message, context: Context) -> Built:
    """Build model and data of a client, as every message does."""
    task = task_from_json(str(context.run_config["task"]))
    index, count = int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])
    dataset = load_split(task.dataset, "train", None, derive_seed(task.seed, "dataset"))
    mine = partition_indices(dataset, task.partition, count, derive_seed(task.seed, "partition"))[index]
    seed, fraction = derive_seed(task.seed, "split", str(index)), task.dataset.client_test_fraction
    train, test = local_split(mine, labels_of(dataset), fraction, seed)
    images = decode(dataset.select(np.concatenate([train, test])), task.backbone.image_size)
    module = build_module(task, len(dataset.features["label"].names), message.content.array_records["arrays"])
    normaliser = Normaliser.of(task.backbone.mean, task.backbone.std)
    return Built(task, module, images.part(0, len(train)), images.part(len(train), len(images)), normaliser)


@client.query()
def identify(message: Message, context: Context) -> Message:
    """Tell which partition this node has."""
    found = ConfigRecord({"partition-id": context.node_config["partition-id"]})
    return Message(RecordDict({"config": found}), reply_to=message)


@client.train()
def train_round(message: Message, context: Context) -> Message:
    """Train on this client's images."""
    built = build(message, context)
    options, name = built.task.train, str(context.node_config["partition-id"])
    server_round = int(str(message.content.config_records["config"]["server-round"]))
    parameters = trainable(built.module)
    optimizer = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=options.weight_decay)
    built.module.train()
    for images, labels in train_batches(
        built.train,
        options.batch_size,
        options.local_epochs,
        options.max_steps,
        options.augment,
        built.normaliser,
        generator_for(built.task.seed, "batches", server_round, name),
    ):
        optimizer.zero_grad()
        F.cross_entropy(built.module(images), labels).backward()
        optimizer.step()
    arrays = ArrayRecord({key: value.detach() for key, value in parameters.items()})
    metrics = MetricRecord({"num-examples": len(built.train)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate_round(message: Message, context: Context) -> Message:
    """Evaluate on this client's test images."""
    built = build(message, context)
    score = accuracy(built.module, built.test, built.normaliser)
    metrics = MetricRecord({"num-examples": len(built.test), "accuracy": score})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@torch.no_grad()
def accuracy(module: nn.Module, data: ImageSet, normaliser: Normaliser) -> float:
    """Share of images classified correctly."""
    module.eval()
    hits = [(module(images).argmax(1) == labels).sum().item() for images, labels in eval_batches(data, 256, normaliser)]
    return float(sum(hits)) / len(data)


class SameCohorts(FedAvg):
    """Flower's FedAvg, with the cohorts that the app draws."""

    def __init__(self, seed: int, nodes: dict[str, int], **options: Any) -> None:
        super().__init__(**options)
        self._seed, self._nodes = seed, nodes

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask the round's cohort to train."""
        cohort = draw_cohort(self._nodes, self.fraction_train, self.min_train_nodes, self._seed, server_round)
        config["server-round"] = server_round
        record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
        return self._construct_messages(record, [self._nodes[name] for name in cohort], MessageType.TRAIN)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; write when each ended, and the final adapter."""
    config = context.run_config
    task, out = task_from_json(str(config["task"])), Path(str(config["runs-dir"]))
    split = load_split(task.dataset, "test", None, derive_seed(task.seed, "dataset"))
    num_classes, ended = len(split.features["label"].names), []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        module = build_module(task, num_classes, arrays)
        test = decode(
            load_split(task.dataset, "test", None, derive_seed(task.seed, "dataset")), task.backbone.image_size
        )
        found = accuracy(module, test, Normaliser.of(task.backbone.mean, task.backbone.std))
        ended.append(time.perf_counter())
        return MetricRecord({"accuracy": found})

    initial = {name: value.detach() for name, value in trainable(build_module(task, num_classes)).items()}
    nodes = named_nodes(grid, int(config["clients"]))
    strategy = SameCohorts(task.seed, nodes, fraction_train=float(config["fraction-train"]))
    result = strategy.start(grid, ArrayRecord(initial), num_rounds=int(config["rounds"]), evaluate_fn=evaluate)
    final: dict[str, Tensor] = dict(result.arrays.to_torch_state_dict())
    save_file({name: value.contiguous() for name, value in final.items()}, out / "adapter.safetensors")
    (out / "ended.json").write_text(json.dumps(ended))


def named_nodes(grid: Grid, count: int) -> dict[str, int]:
    """Wait for all nodes and ask which partition each has."""
    while len(nodes := list(grid.get_node_ids())) < count:
        time.sleep(0.1)
    replies = grid.send_and_receive([Message(RecordDict(), node, MessageType.QUERY) for node in nodes])
    return {str(r.content.config_records["config"]["partition-id"]): r.metadata.src_node_id for r in replies}
