"""What a ClientApp process builds once and keeps: backbone, optimizer and decoded images."""

import hashlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch

from client_app.training import make_optimizer
from task.backbone import backbone_folder
from task.config import TaskConfig, task_from_json
from task.data.batches import Normaliser
from task.data.images import ImageSet, decode
from task.data.partitions import local_split, partition_indices
from task.data.sampling import labels_of
from task.data.sources import load_split, node_location
from task.errors import ConfigError
from task.model import AdaptedModel, build_model
from task.seeding import derive_seed


@dataclass(frozen=True)
class Node:
    """A client's own view of itself, from its node config."""

    name: str
    """Stable identity: the node's own name, else its partition id, else Flower's node id."""
    partition_id: int
    """Index of its partition; 0 where the node has data of its own."""
    num_partitions: int
    """Number of partitions; 1 where the node has data of its own."""
    data: Path | None
    """Where its data lies, for data sets that lie on disk."""
    backbones: Path | None
    """Where its backbone files lie."""

    @staticmethod
    def from_config(node_config: Mapping[str, object], node_id: int) -> "Node":
        """Read a Flower node config."""
        partition_id = node_config.get("partition-id")
        name = node_config.get("name", node_id if partition_id is None else partition_id)
        return Node(
            name=str(name),
            partition_id=int(str(partition_id or 0)),
            num_partitions=int(str(node_config.get("num-partitions", 1))),
            data=node_location(node_config),
            backbones=backbone_folder(node_config),
        )


@dataclass(frozen=True)
class ClientData:
    """A client's images, decoded, on the training device."""

    train: ImageSet
    """Images it trains on."""
    test: ImageSet
    """Images it evaluates on."""


class Worker:
    """Everything of one task that does not depend on the round.

    Parameters
    ----------
    task : TaskConfig
        The task.
    data, backbones : Path, optional
        Where this node's data and backbone files lie.
    """

    def __init__(self, task: TaskConfig, data: Path | None, backbones: Path | None) -> None:
        self.task = task
        self._backbones = backbones
        self._dataset = load_split(task.dataset, "train", data, derive_seed(task.seed, "dataset"))
        self._clients: dict[tuple[int, int], ClientData] = {}
        self._partitions: dict[int, list[np.ndarray]] = {}

    @cached_property
    def device(self) -> torch.device:
        """Where to train."""
        wanted = self.task.train.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if wanted == "cuda" and not torch.cuda.is_available():
            raise ConfigError("train.device=cuda, but this process sees no GPU; set train.device=cpu or auto.")
        return torch.device(wanted)

    @cached_property
    def model(self) -> AdaptedModel:
        """The model; a message only copies values into it."""
        model = build_model(self.task, len(self._dataset.features["label"].names), self._backbones)
        model.to(self.device)
        return model

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; its state is dropped at the start of every round."""
        return make_optimizer(self.model, self.task.train)

    @cached_property
    def normaliser(self) -> Normaliser:
        """Maps uint8 batches to the backbone's input."""
        return Normaliser.of(self.task.backbone.mean, self.task.backbone.std, self.device)

    def client_data(self, node: Node) -> ClientData:
        """Return a client's images, decoded at the first call."""
        key = (node.partition_id, node.num_partitions)
        if key not in self._clients:
            self._clients[key] = self._load(node)
        return self._clients[key]

    def _load(self, node: Node) -> ClientData:
        seed, dataset = self.task.seed, self._dataset
        if node.num_partitions not in self._partitions:
            self._partitions[node.num_partitions] = partition_indices(
                dataset, self.task.partition, node.num_partitions, derive_seed(seed, "partition")
            )
        mine = self._partitions[node.num_partitions][node.partition_id]
        split_seed = derive_seed(seed, "split", node.name)
        fraction = self.task.dataset.client_test_fraction
        train, test = local_split(mine, labels_of(dataset), fraction, split_seed)
        size = self.task.backbone.image_size
        return ClientData(
            train=decode(dataset.select(train), size).to(self.device),
            test=decode(dataset.select(test), size).to(self.device),
        )


@lru_cache(maxsize=1)
def worker_for(task_json: str, data: Path | None, backbones: Path | None) -> Worker:
    """Return this process's worker for a task, built at the first call.

    Raises
    ------
    PetalwiseError
        If task, data or model cannot be had.
    """
    return Worker(task_from_json(task_json), data, backbones)


@lru_cache(maxsize=1)
def worker_name() -> str:
    """Name this process without telling its host's name."""
    return hashlib.sha256(f"{socket.gethostname()}:{os.getpid()}".encode()).hexdigest()[:12]
