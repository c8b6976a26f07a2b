"""What a strategy knows of the task."""

from dataclasses import dataclass, field

from flwr.app import Array

from task.privacy import PrivacyConfig
from task.units import Layout
from task.wire import EXACT, WireConfig


@dataclass(frozen=True)
class TaskContext:
    """The task as the server sees it; all of it optional in a Flower app of another make."""

    task: str = ""
    """The task config as JSON, sent to clients."""
    layout: Layout | None = None
    """Index of the flat array; without it the initial arrays' names and shapes are the index."""
    base: str = ""
    """Hash of the frozen weights that every client must have; empty: nothing is compared."""
    classes: str = ""
    """Digest of the class names that every client must have, in their order."""
    seed: int = 0
    """Seed of the cohorts."""
    lora_merge: str = "factors"
    """How adapters are averaged: A and B apart (``factors``), or their product by its best factors."""
    wire: WireConfig = EXACT
    """How adapter and head travel."""
    backbone: Array | None = None
    """The frozen backbone for nodes that lack it, uint8 [n]."""
    backbone_name: str = ""
    """Its name: SHA-256 and ``.safetensors``."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """What is clipped and where noise is added."""
    run: str = ""
    """Name of the run, under which clients keep things for it; empty: a random one is made up."""
