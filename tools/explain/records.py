"""Reading recorded runs: a record holds the updates and signals of one round."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from logging import INFO
from pathlib import Path

import torch
from flwr.common.logger import log
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor
from yaml import YAMLError

from server_app.compose import RunSettings
from task.backbone import build_backbone, head_name, resolved
from task.config import typed
from task.errors import ConfigError, DataError
from task.model import add_adapter, canonical_name
from task.units import Layout, lora_layers, make_layout

SIGNALS = ("score-a", "score-b", "norm-a", "norm-b", "norm-product", "label-entropy")
"""Signals that a record must hold."""
MIN_RECORDS = 2
"""Fewest records: one is left out to measure what the others say about it."""
MIN_CLIENTS = 2
"""Fewest clients in a record: of a single one all weights are 1."""


@dataclass(frozen=True, eq=False)
class Record:
    """One round of one run; updates are read only when asked for."""

    path: Path
    """The file, ``<run>/updates/round-<n>.safetensors``."""
    digest: str
    """SHA-256 of what is explained of it: updates, examples and :data:`SIGNALS`; hexadecimal."""
    clients: tuple[str, ...]
    """Names of the clients, in the order of all tensors."""
    num_examples: tuple[int, ...]
    """Training examples of every client."""
    num_classes: int
    """Outputs of the head."""
    signals: dict[str, Tensor]
    """:data:`SIGNALS` by name, float32: [clients, layers], of the label entropy [clients, 1]."""

    @property
    def server_round(self) -> int:
        """Server round."""
        return int(self.path.stem.removeprefix("round-"))

    @property
    def label(self) -> str:
        """Run and round, for people."""
        return f"{self.path.parents[1].name} round {self.server_round}"

    def updates(self) -> Tensor:
        """Read the clients' adapters and heads, float32 [clients, n]."""
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor("updates")
        return tensor


@dataclass(frozen=True, eq=False)
class Run:
    """A run folder with records."""

    folder: Path
    """The folder, absolute."""
    settings: RunSettings
    """Its config."""
    layout: Layout
    """Index of the flat arrays."""
    records: tuple[Record, ...]
    """Its records by round."""

    @cached_property
    def config_digest(self) -> str:
        """SHA-256 of ``config.yaml``, hexadecimal."""
        return hashlib.sha256((self.folder / "config.yaml").read_bytes()).hexdigest()

    @property
    def federation(self) -> str:
        """What decides who holds which images: seed, data, partition; runs that share it have the same clients."""
        settings, clients = self.settings, len(set().union(*(record.clients for record in self.records)))
        return json.dumps([settings.seed, asdict(settings.dataset), asdict(settings.partition), clients])


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read runs, and refuse what cannot be explained together.

    A record that says the same as an earlier one is left out: round 1 of runs that differ only in the strategy would
    otherwise be both learned from and predicted.

    Parameters
    ----------
    folders : Sequence[Path]
        Run folders; a folder named twice counts once.

    Returns
    -------
    list[Run]
        The runs, in the order given; all have records of at least :data:`MIN_CLIENTS` clients.

    Raises
    ------
    ConfigError
        If a folder is no recorded run, layouts differ, or there are too few records or clients.
    DataError
        If a record cannot be read.
    """
    runs = [read_run(folder) for folder in dict.fromkeys(folder.expanduser().resolve() for folder in folders)]
    for run in runs[1:]:
        if run.layout.digest != runs[0].layout.digest:
            raise ConfigError(
                f"{runs[0].folder.name} and {run.folder.name} have different adapters or heads "
                f"({runs[0].layout.size} and {run.layout.size} parameters); explain them apart."
            )
    distinct = _without_repeats(runs)
    found = sum(len(run.records) for run in distinct)
    if found < MIN_RECORDS:
        raise ConfigError(
            f"There is {found} record and {MIN_RECORDS} are needed, one to leave out: record more rounds or runs "
            "(num_server_rounds, seed)."
        )
    return distinct


def read_run(folder: Path) -> Run:
    """Read the config and the signals of a recorded run.

    Raises
    ------
    ConfigError
        If the folder is no run, has no records, or one of fewer than :data:`MIN_CLIENTS` clients.
    DataError
        If a record cannot be read, or does not fit the config.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{str(folder)!r} is no run folder: it has no config.yaml.")
    paths = sorted((folder / "updates").glob("round-*.safetensors"))
    if not paths:
        raise ConfigError(f"{str(folder)!r} has no recorded updates; run it again with record_updates=true.")
    try:
        settings = typed(RunSettings, OmegaConf.load(folder / "config.yaml"))
    except (YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"config.yaml of {str(folder)!r} is no intact config.") from error
    settings.backbone = resolved(settings.backbone)
    records = tuple(read_record(path) for path in paths)
    layout = layout_of(settings, records[0].num_classes)
    for record in records:
        _check_fits(record, layout)
    return Run(folder, settings, layout, records)


def read_record(path: Path) -> Record:
    """Read all of a record but its updates.

    Raises
    ------
    DataError
        If the file is no record.
    """
    try:
        with safe_open(path, "pt") as file:
            clients = json.loads(file.metadata()["clients"])
            counts = tuple(int(count) for count in file.get_tensor("num-examples"))
            classes = file.get_tensor("class-count").shape[1]
            signals = {name: file.get_tensor(name) for name in SIGNALS}
            digest = hashlib.sha256(file.get_tensor("updates").numpy())
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is no intact record of updates and signals: {error}.") from error
    digest.update(json.dumps([clients, counts]).encode())
    for name in SIGNALS:
        digest.update(signals[name].numpy())
    return Record(path, digest.hexdigest(), tuple(clients), counts, classes, signals)


def layout_of(settings: RunSettings, num_classes: int) -> Layout:
    """Index a run's flat arrays, as :func:`task.model.build_model` does, without memory for the weights."""
    backbone = replace(settings.backbone, source="random")
    with torch.device("meta"):
        plain = build_backbone(backbone, num_classes)
        head = head_name(plain)
        module = add_adapter(plain, settings.lora, settings.seed)
    shapes = {canonical_name(name): p.shape for name, p in module.named_parameters() if p.requires_grad}
    return make_layout(shapes, settings.lora.units, head)  # type: ignore[arg-type]


def layer_place(name: str) -> tuple[int, str]:
    """Split a layer's name into the index of its block and its kind.

    Parameters
    ----------
    name : str
        Such as ``blocks.3.attn.qkv``.

    Returns
    -------
    tuple[int, str]
        Such as (3, ``attn.qkv``); of a layer outside of all blocks -1 and its name.
    """
    match = re.search(r"(?:^|\.)blocks\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (-1, name)


def _check_fits(record: Record, layout: Layout) -> None:
    if len(record.clients) < MIN_CLIENTS:
        raise ConfigError(f"{record.label} has {len(record.clients)} client and {MIN_CLIENTS} are needed.")
    with safe_open(record.path, "pt") as file:
        updates = tuple(file.get_slice("updates").get_shape())
    clients, layers = len(record.clients), len(lora_layers(layout))
    wanted = {name: (clients, 1 if name == "label-entropy" else layers) for name in SIGNALS}
    found = {name: tuple(signal.shape) for name, signal in record.signals.items()}
    if updates != (clients, layout.size) or found != wanted or len(record.num_examples) != clients:
        raise DataError(f"{str(record.path)!r} does not fit the model of the config.yaml beside it.")


def _without_repeats(runs: Sequence[Run]) -> list[Run]:
    """Keep the first of equal records, and the runs that still have one."""
    first: dict[str, Record] = {}
    kept = []
    for run in runs:
        for record in run.records:
            if first.setdefault(record.digest, record) is not record:
                log(INFO, "%s equals %s and is left out.", record.label, first[record.digest].label)
        records = tuple(record for record in run.records if first[record.digest] is record)
        if records:
            kept.append(replace(run, records=records))
    return kept
