"""What a ClientApp process builds once and keeps: backbone, optimizer and decoded images."""

import hashlib
import os
import socket
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from logging import WARNING
from pathlib import Path

import numpy as np
import torch
from flwr.common.logger import log

from client_app.kept import state_folder
from client_app.training import make_optimizer
from task.backbone import backbone_folder, resolved
from task.config import TaskConfig, task_from_json
from task.data.batches import Normaliser
from task.data.images import ImageSet, decode
from task.data.partitions import local_split, partition_indices
from task.data.sampling import labels_of
from task.data.sources import load_split, node_location
from task.device import choose_device
from task.errors import DataError, PetalwiseError
from task.model import AdaptedModel, build_model
from task.seeding import derive_seed

MAX_KEPT_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
"""Memory for decoded images in one process, an eighth of the machine's; beyond it, the client whose turn was longest
ago is decoded anew."""


@dataclass(frozen=True)
class Node:
    """A client's own view of itself, from its node config."""

    name: str
    """Stable identity: the node's own name, else its partition id, else Flower's node id."""
    partition_id: str
    """Index of its partition, as its node config gives it; empty where the node has data of its own."""
    num_partitions: str
    """Number of partitions, likewise."""
    data: Path | None
    """Where its data lies, for data sets that lie on disk."""
    backbones: Path | None
    """Where its backbone files lie."""
    state: Path
    """Where it keeps what it needs in later rounds."""

    @staticmethod
    def from_config(node_config: Mapping[str, object], node_id: int) -> "Node":
        """Read a Flower node config."""
        partition_id = str(node_config.get("partition-id", ""))
        return Node(
            name=str(node_config.get("name", partition_id or node_id)),
            partition_id=partition_id,
            num_partitions=str(node_config.get("num-partitions", "")),
            data=node_location(node_config),
            backbones=backbone_folder(node_config),
            state=state_folder(node_config),
        )


def partition_of(node: Node, kind: str) -> tuple[int, int]:
    """Say which partition of how many a node has.

    Parameters
    ----------
    node : Node
        The node; where it names no partition, all its data is one.
    kind : str
        The task's ``partition.kind``; with ``whole``, all its data is one whatever it names.

    Returns
    -------
    tuple of int
        Index and number of partitions.

    Raises
    ------
    DataError
        If the node config names no partition that there is.
    """
    given = (node.partition_id, node.num_partitions)
    if kind == "whole" or given == ("", ""):
        return 0, 1
    if not all(text.isdecimal() for text in given) or not int(given[0]) < int(given[1]):
        shown = [f"{text!r}" if text else "(not set)" for text in given]
        raise DataError(
            f"The node config has partition-id={shown[0]} and num-partitions={shown[1]}; give both as whole "
            "numbers, 0 <= partition-id < num-partitions, or neither."
        )
    return int(given[0]), int(given[1])


@dataclass(frozen=True)
class ClientData:
    """A client's images, decoded, on the training device."""

    train: ImageSet
    """Images it trains on."""
    test: ImageSet
    """Images it evaluates on."""

    @property
    def nbytes(self) -> int:
        """Memory that the images take."""
        return self.train.images.nbytes + self.test.images.nbytes


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
        self.task = replace(task, backbone=resolved(task.backbone))
        self._backbones = backbones
        self._dataset = load_split(task.dataset, "train", data, derive_seed(task.seed, "dataset"))
        self._clients: OrderedDict[Node, ClientData] = OrderedDict()
        self._partitions: dict[int, list[np.ndarray] | PetalwiseError] = {}

    @cached_property
    def device(self) -> torch.device:
        """Where to train."""
        return choose_device(self.task.train.device)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in order of the head's outputs."""
        return list(self._dataset.features["label"].names)

    @cached_property
    def model(self) -> AdaptedModel:
        """The model; a message only copies values into it."""
        model = build_model(self.task, len(self._dataset.features["label"].names), self._backbones)
        model.to(self.device)
        return model

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer; its state is replaced at the start of every round."""
        return make_optimizer(self.model, self.task.train)

    @cached_property
    def normaliser(self) -> Normaliser:
        """Maps uint8 batches to the backbone's input."""
        return Normaliser.of(self.task.backbone.mean, self.task.backbone.std, self.device)

    def client_data(self, node: Node) -> ClientData:
        """Return a client's images, decoded at the first call and again where they had to give place."""
        if node not in self._clients:
            self._clients[node] = self._load(node)
        self._clients.move_to_end(node)
        while len(self._clients) > 1 and sum(data.nbytes for data in self._clients.values()) > MAX_KEPT_BYTES:
            self._clients.popitem(last=False)
            _note_eviction()
        return self._clients[node]

    def share(self, node: Node) -> str:
        """Name the partition that a node has, which no other may have; empty where its data are its own."""
        index, count = partition_of(node, self.task.partition.kind)
        return f"partition {index} of {count}" if count > 1 else ""

    @cached_property
    def _labels(self) -> np.ndarray:
        return labels_of(self._dataset)

    def _load(self, node: Node) -> ClientData:
        seed, dataset = self.task.seed, self._dataset
        index, count = partition_of(node, self.task.partition.kind)
        mine = self._partition(count)[index]
        split_seed = derive_seed(seed, "split", node.name)
        fraction = self.task.dataset.client_test_fraction
        train, test = local_split(mine, self._labels, fraction, split_seed)
        size = self.task.backbone.image_size
        return ClientData(
            train=decode(dataset.select(train), size).to(self.device),
            test=decode(dataset.select(test), size).to(self.device),
        )

    def _partition(self, count: int) -> list[np.ndarray]:
        """Draw the partition once; one that cannot be had is refused to every client alike, without another draw."""
        if count not in self._partitions:
            seed = derive_seed(self.task.seed, "partition")
            try:
                self._partitions[count] = partition_indices(self._dataset, self.task.partition, count, seed)
            except PetalwiseError as error:
                self._partitions[count] = error
        found = self._partitions[count]
        if isinstance(found, PetalwiseError):
            raise type(found)(str(found))
        return found


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
def _note_eviction() -> None:
    """Say once that images do not fit."""
    log(WARNING, "The clients' images take more than %.1f GB: some are decoded anew.", MAX_KEPT_BYTES / 1e9)


@lru_cache(maxsize=1)
def worker_name() -> str:
    """Name this process without telling its host's name."""
    return hashlib.sha256(f"{socket.gethostname()}:{os.getpid()}".encode()).hexdigest()[:12]
