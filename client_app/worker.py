"""What a ClientApp process builds once and keeps: backbone, optimizer and decoded images."""

import hashlib
import os
import socket
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from logging import INFO, WARNING
from pathlib import Path

import numpy as np
import torch
from flwr.common.logger import log

from client_app.node import EVERYTHING_AS_FEDERATION, Node, OwnSettings, partition_of
from client_app.training import make_optimizer
from task.backbone import DELIVERED, resolved
from task.config import TaskConfig, task_from_json
from task.data.batches import Normaliser
from task.data.images import ImageSet, decode
from task.data.partitions import local_split, partition_indices
from task.data.sampling import labels_of
from task.data.sources import load_split
from task.delivery import delivered_folder, lacks
from task.device import choose_device
from task.errors import PetalwiseError
from task.model import AdaptedModel, build_model
from task.seeding import derive_seed

MAX_KEPT_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8
"""Memory for decoded images in one process, an eighth of the machine's; beyond it, the client whose turn was longest
ago is decoded anew."""


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

    Attributes
    ----------
    dataset : datasets.Dataset
        The images that this node reads, of all partitions.
    """

    def __init__(self, task: TaskConfig, data: Path | None, backbones: Path | None) -> None:
        self.task = replace(task, backbone=resolved(task.backbone))
        self._data, self._backbones = data, backbones
        self.dataset = load_split(task.dataset, "train", data, derive_seed(task.seed, "dataset"))
        self._clients: OrderedDict[Node, ClientData] = OrderedDict()
        self._partitions: dict[int, list[np.ndarray] | PetalwiseError] = {}

    @cached_property
    def device(self) -> torch.device:
        """Where to train."""
        return choose_device(self.task.train.device)

    @property
    def lacks_backbone(self) -> bool:
        """Whether the frozen backbone has yet to come from the server."""
        return lacks(self.task.backbone, self._backbones or Path())

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in order of the head's outputs."""
        return list(self.dataset.features["label"].names)

    @cached_property
    def model(self) -> AdaptedModel:
        """The model; a message only copies values into it."""
        model = build_model(self.task, len(self.dataset.features["label"].names), self._backbones)
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
        return labels_of(self.dataset)

    def _load(self, node: Node) -> ClientData:
        seed, dataset, device = self.task.seed, self.dataset, self.device
        index, count = partition_of(node, self.task.partition.kind)
        mine = self._partition(count)[index]
        split_seed = derive_seed(seed, "split", node.name)
        fraction = self.task.dataset.client_test_fraction
        train, test = local_split(mine, self._labels, fraction, split_seed)
        size = self.task.backbone.image_size
        both = decode(dataset.select(np.concatenate([train, test])), size, self._data).to(device)
        return ClientData(train=both.part(0, len(train)), test=both.part(len(train), len(both)))

    def _partition(self, count: int) -> list[np.ndarray]:
        """Draw the partition once; one that cannot be had is refused to every client alike, without another draw."""
        if count not in self._partitions:
            seed = derive_seed(self.task.seed, "partition")
            try:
                self._partitions[count] = partition_indices(self.dataset, self.task.partition, count, seed)
            except PetalwiseError as error:
                self._partitions[count] = error
        found = self._partitions[count]
        if isinstance(found, PetalwiseError):
            raise type(found)(str(found))
        return found


def worker_of(node: Node, task_json: str) -> Worker:
    """Return this process's worker for a task as a node does it; see :func:`worker_for`."""
    delivered = _task_of(task_json).backbone.source == DELIVERED
    backbones = delivered_folder(node.state) if delivered else node.backbones
    return worker_for(task_json, node.data, backbones, node.own)


@lru_cache(maxsize=1)
def worker_for(
    task_json: str, data: Path | None, backbones: Path | None, own: OwnSettings = EVERYTHING_AS_FEDERATION
) -> Worker:
    """Return this process's worker for a task as a node does it, built at the first call.

    Raises
    ------
    PetalwiseError
        If task, data or model cannot be had.
    """
    given = _task_of(task_json)
    task = own.applied(given)
    if task.train.batch_size < given.train.batch_size:
        log(INFO, "Batches of %d images, not %d (batch-size).", task.train.batch_size, given.train.batch_size)
    return Worker(task, data, backbones)


@lru_cache(maxsize=1)
def _task_of(task_json: str) -> TaskConfig:
    """Read the task that every message brings along; checking it takes 40 ms."""
    return task_from_json(task_json)


@lru_cache(maxsize=1)
def _note_eviction() -> None:
    """Say once that images do not fit."""
    log(WARNING, "The clients' images take more than %.1f GB: some are decoded anew.", MAX_KEPT_BYTES / 1e9)


@lru_cache(maxsize=1)
def worker_name() -> str:
    """Name this process without telling its host's name."""
    return hashlib.sha256(f"{socket.gethostname()}:{os.getpid()}".encode()).hexdigest()[:12]
