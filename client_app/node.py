"""What a node says of itself in its node config: who it is, where its data lies, what its machine can do."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from client_app.kept import state_folder
from client_app.resident import RESIDENT, wants_resident
from task.backbone import backbone_folder
from task.config import TaskConfig
from task.data.sources import node_location
from task.device import NODE_DEVICES, is_device
from task.errors import ConfigError, DataError

NODE_KEYS = (
    "name",
    "data",
    "backbones",
    "state",
    "device",
    "batch-size",
    "image-column",
    "label-column",
    RESIDENT,
    "partition-id",
    "num-partitions",
)
"""All keys of a node config that this app reads; the last two are set by Flower's simulation."""
NEAR = 0.75
"""Likeness (difflib) from which an unknown key is taken for one of :data:`NODE_KEYS`, misspelt."""


@dataclass(frozen=True)
class OwnSettings:
    """What a node sets for itself where the federation's config says something else; empty or 0: as the federation."""

    device: str = ""
    """Where to train."""
    batch_size: int = 0
    """Most images per optimizer step."""
    image_column: str = ""
    """Column with the images."""
    label_column: str = ""
    """Column with the class labels."""

    @staticmethod
    def from_config(node_config: Mapping[str, object]) -> "OwnSettings":
        """Read a Flower node config.

        Raises
        ------
        ConfigError
            If a value cannot be used.
        """
        device = _text(node_config, "device")
        if device and not is_device(device):
            raise ConfigError(f"The node config has device={device!r}; it may be {NODE_DEVICES}.")
        return OwnSettings(
            device=device,
            batch_size=_batch_size(node_config),
            image_column=_text(node_config, "image-column"),
            label_column=_text(node_config, "label-column"),
        )

    def applied(self, task: TaskConfig) -> TaskConfig:
        """Return the task as this node does it."""
        train, dataset = task.train, task.dataset
        limit = self.batch_size or train.batch_size
        return replace(
            task,
            train=replace(train, device=self.device or train.device, batch_size=min(train.batch_size, limit)),
            dataset=replace(
                dataset,
                image_column=self.image_column or dataset.image_column,
                label_column=self.label_column or dataset.label_column,
            ),
        )


EVERYTHING_AS_FEDERATION = OwnSettings()


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
    resident: bool
    """Whether a resident process keeps the libraries imported from one message to the next."""
    own: OwnSettings
    """What it sets for itself."""

    @staticmethod
    def from_config(node_config: Mapping[str, object], node_id: int) -> "Node":
        """Read a Flower node config; keys for other apps are let be.

        Raises
        ------
        ConfigError
            On a key that looks like one of this app's, misspelt, or a value that cannot be used.
        DataError
            If a folder that it names does not exist.
        """
        _refuse_misspelt(node_config)
        return Node(
            name=node_name(node_config, node_id),
            partition_id=_text(node_config, "partition-id"),
            num_partitions=_text(node_config, "num-partitions"),
            data=node_location(node_config),
            backbones=backbone_folder(node_config),
            state=state_folder(node_config),
            resident=wants_resident(node_config),
            own=OwnSettings.from_config(node_config),
        )


def node_name(node_config: Mapping[str, object], node_id: int) -> str:
    """Name a node: by its own name, else its partition id, else Flower's node id."""
    return _text(node_config, "name") or _text(node_config, "partition-id") or str(node_id)


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


def unknown_keys(node_config: Mapping[str, object]) -> list[str]:
    """List the keys that this app does not read; a SuperNode may have them for others."""
    return [key for key in node_config if key not in NODE_KEYS]


def _refuse_misspelt(node_config: Mapping[str, object]) -> None:
    for key in unknown_keys(node_config):
        near = difflib.get_close_matches(key.lower().replace("_", "-"), NODE_KEYS, n=1, cutoff=NEAR)
        if near:
            raise ConfigError(
                f"The node config has the key {key!r}, which means nothing here. Did you mean {near[0]!r}?"
            )


def _text(node_config: Mapping[str, object], key: str) -> str:
    return str(node_config.get(key, ""))


def _batch_size(node_config: Mapping[str, object]) -> int:
    given = node_config.get("batch-size", "")
    if given == "":
        return 0
    if isinstance(given, bool) or not str(given).isdecimal() or int(str(given)) < 1:
        raise ConfigError(f"The node config has batch-size={given!r}; it must be a whole number of at least 1.")
    return int(str(given))
