"""The schema of what client and server share: backbone, adapter, data, partition, training.

Hydra composes these dataclasses from ``conf/``; their types are checked by OmegaConf, ranges and
choices by :func:`validate`. The :class:`TaskConfig` part travels to the clients as JSON.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from task.errors import ConfigError, did_you_mean

MAX_TASK_JSON_BYTES = 65_536
T = TypeVar("T")


def bounded(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] = (),
    items: int | None = None,
    unset: Any = None,
) -> Any:
    """Declare a config field with a default and the values it may take (of a list: each item, and how many items).

    ``unset`` is one more value it may take, outside the bounds.
    """
    bounds = {"above": above, "at_least": at_least, "at_most": at_most, "choices": choices, "items": items}
    bounds["unset"] = unset
    metadata = {key: bound for key, bound in bounds.items() if bound is not None and bound != ()}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class BackboneConfig:
    """The frozen Vision Transformer."""

    name: str = "vit_tiny_patch16_224"
    """timm model name, as in ``timm.create_model``."""
    source: str = bounded("packaged", choices=("packaged", "hub", "checkpoint", "random", "delivered"))
    """Where the weights come from: with the app, timm's hub, a local safetensors file, or a seeded random draw;
    ``delivered`` is what the server tells nodes with ``deliver``."""
    deliver: bool = False
    """Send the weights to nodes that lack them, once: they keep them by their SHA-256. Only the server needs the
    source then."""
    checkpoint: str = ""
    """File name of the weights: inside the app for ``packaged``, else in each party's own backbone folder."""
    image_size: int = bounded(32, at_least=8, at_most=1024, unset=0)
    """Side of the square input, pixels, to which timm resamples position embeddings; 0: as pretrained."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of ``timm.create_model`` (patch_size, embed_dim, ...)."""
    mean: list[float] = bounded([0.5, 0.5, 0.5], at_least=0.0, at_most=1.0, items=3, unset=[])
    """Per-channel mean subtracted from images scaled to [0, 1]; empty: as pretrained."""
    std: list[float] = bounded([0.5, 0.5, 0.5], above=0.0, at_most=1.0, items=3, unset=[])
    """Per-channel deviation that divides images scaled to [0, 1]; empty: as pretrained."""


@dataclass
class LoraConfig:
    """The trainable low-rank adapter (peft)."""

    rank: int = bounded(8, at_least=1, at_most=1024)
    """Rank r of every A [r, in] and B [out, r]."""
    alpha: float = bounded(16.0, above=0.0)
    """LoRA alpha; the product B A is scaled by alpha / rank."""
    dropout: float = bounded(0.0, at_least=0.0, at_most=0.9)
    """Dropout probability on the adapter's input."""
    targets: list[str] = field(default_factory=lambda: ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    """Endings of the names of the linear layers that get an adapter."""
    units: str = bounded("block", choices=("block", "module"))
    """Granularity of a layer unit: one per transformer block, or one per adapted module. The head is its own unit."""
    merge: str = bounded("factors", choices=("factors", "product_svd"))
    """How adapters are averaged: A and B apart, or their product by its best factors of the same rank."""
    freeze_a: bool = False
    """Keep A as drawn at the start, the same everywhere; only B is trained and sent."""


@dataclass
class DatasetConfig:
    """Labelled images and how to read them."""

    name: str = "digits"
    """Name shown to people and, for ``packaged``, which data set of the dependencies to read."""
    source: str = bounded("packaged", choices=("packaged", "hub", "parquet", "folder"))
    """Kind of storage: a package's own data, a hub data set, parquet files, or one folder of images per class."""
    path: str = ""
    """Hub repository for ``hub``. Never a path: local data lies where each node's own config says."""
    train_split: str = "train"
    """Hub split, or the start of the parquet file names / the sub-folder that holds the training images."""
    test_split: str = "test"
    """The same for the server's central test images; empty: hold out a share of the training split."""
    image_column: str = "image"
    """Column with the images."""
    label_column: str = "label"
    """Column with the class labels."""
    classes: list[str] = field(default_factory=list)
    """Class names in order of their index; empty: as the data declares them."""
    other_classes: str = bounded("refuse", choices=("refuse", "leave_out"))
    """What becomes of images whose class ``classes`` lacks: the data is refused, or they are left out."""
    central_test_fraction: float = bounded(0.2, above=0.0, at_most=0.9)
    """Share of the training split held out for the server where the data has no test split."""
    client_test_fraction: float = bounded(0.2, above=0.0, at_most=0.9)
    """Share of a client's images kept for its own evaluation."""
    max_train_samples: int = bounded(0, at_least=0)
    """Use a seeded subset of so many training images before partitioning; 0: all."""
    max_test_samples: int = bounded(0, at_least=0)
    """Use a seeded subset of so many central test images; 0: all."""


@dataclass
class PartitionConfig:
    """How a data set is spread over simulated clients (flwr-datasets partitioners)."""

    kind: str = bounded(
        "dirichlet",
        choices=("iid", "dirichlet", "pathological", "over_represented", "natural", "natural_dirichlet", "whole"),
    )
    """``natural`` makes one client of each value of a column. ``natural_dirichlet`` gives each value as many clients
    as the others (the first in sorted order one more where that does not come out even) and spreads its images over
    them by Dirichlet draws. ``whole`` leaves every client its own data set, as in a deployment."""
    alpha: float = bounded(0.3, above=0.0)
    """Dirichlet concentration; smaller is more skewed (dirichlet, natural_dirichlet)."""
    classes_per_client: int = bounded(2, at_least=1)
    """Number of classes each client sees (pathological), or has more of than others (over_represented)."""
    share: float = bounded(0.5, at_least=0.0, at_most=1.0)
    """Share of a class's images that goes to the clients that have more of it (over_represented)."""
    column: str = ""
    """Column whose values separate the clients (natural, natural_dirichlet)."""
    min_samples: int = bounded(5, at_least=2)
    """Fewest images a client may have; a partition below it is refused."""


@dataclass
class TrainConfig:
    """Local training on a client."""

    optimizer: str = bounded("adamw", choices=("adamw", "sgd"))
    """Optimizer, fresh in every round."""
    lr: float = bounded(3e-3, above=0.0)
    """Learning rate of adapter and head."""
    weight_decay: float = bounded(0.01, at_least=0.0)
    """Decoupled (AdamW) or L2 (SGD) weight decay."""
    momentum: float = bounded(0.9, at_least=0.0, at_most=0.999)
    """Momentum (SGD)."""
    batch_size: int = bounded(16, at_least=1)
    """Images per optimizer step; the last batch of an epoch may be smaller."""
    local_epochs: int = bounded(2, at_least=1)
    """Passes over the client's training images per round."""
    max_steps: int = bounded(0, at_least=0)
    """End a round's training after so many optimizer steps; 0: no limit."""
    augment: str = bounded("none", choices=("none", "flip", "crop_flip"))
    """Augmentation of training batches: nothing, horizontal flips, or shifts by an eighth of the side and flips."""
    device: str = bounded("auto", choices=("auto", "cpu", "cuda"))
    """Where to train; ``auto`` takes a GPU if the process sees one."""
    precision: str = bounded("float32", choices=("float32", "bfloat16"))
    """Numbers of the forward and backward pass; with ``bfloat16`` torch's autocast chooses by operator. Adapter, head,
    optimizer and what travels stay float32. For GPUs: a CPU without bfloat16 arithmetic gets slower."""
    compile: bool = False
    """Compile the model by ``torch.compile``: a minute in every process, for long runs on GPUs."""
    channels_last: bool = False
    """Hold images and the patch embedding with the channels innermost."""


@dataclass
class TaskConfig:
    """Everything a client needs to know of the task; sent by the server as JSON."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = bounded(0, at_least=0)
    """Seed of every draw: initial adapter, partition, splits, cohorts, shuffling."""


def validate(config: Any, path: str = "") -> None:
    """Check the declared ranges and choices of a config dataclass and of those inside it.

    Raises
    ------
    ConfigError
        Naming the first key whose value is out of range, the value, and what is allowed.
    """
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{path}{item.name}"
        if "unset" in item.metadata and value == item.metadata["unset"]:
            continue
        items = item.metadata.get("items")
        if items and len(value) != items:
            raise ConfigError(f"{name}={value} must have {items} items.")
        if dataclasses.is_dataclass(value):
            validate(value, f"{name}.")
        entries = value if isinstance(value, list) else [value]
        nested = isinstance(value, list) and any(isinstance(entry, list | dict) for entry in value)
        if nested and "list[list" not in str(item.type):  # OmegaConf lets it pass
            raise ConfigError(f"{name}={value} must be a list of single values.")
        for entry in entries:
            _check_bounds(name, entry, dict(item.metadata))


def _check_bounds(name: str, value: Any, bounds: dict[str, Any]) -> None:
    if "choices" in bounds and value not in bounds["choices"]:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(bounds['choices'])}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not a finite number.")
    if "above" in bounds and not value > bounds["above"]:
        raise ConfigError(f"{name}={value} must be greater than {bounds['above']}.")
    if "at_least" in bounds and not value >= bounds["at_least"]:
        raise ConfigError(f"{name}={value} must be at least {bounds['at_least']}.")
    if "at_most" in bounds and not value <= bounds["at_most"]:
        raise ConfigError(f"{name}={value} must be at most {bounds['at_most']}.")


def typed(schema: type[T], values: Any, path: str = "") -> T:
    """Build a config dataclass from plain values, checking keys, types, ranges and choices.

    Parameters
    ----------
    schema : type
        The dataclass.
    values : Any
        A dict, or what OmegaConf takes for one.
    path : str
        Where the values stand in the whole config, such as ``strategy.``; errors name their keys with it.

    Returns
    -------
    T
        The dataclass, complete.

    Raises
    ------
    ConfigError
        On an unknown key, a value of the wrong type, or one out of range.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    except OmegaConfBaseException as error:
        raise ConfigError(explained(error, path)) from error
    except (RecursionError, OverflowError) as error:
        raise ConfigError("The config is nested too deeply or holds too large a number; it was not read.") from error
    validate(config, path)
    return config  # type: ignore[return-value]


def explained(error: OmegaConfBaseException, path: str = "") -> str:
    """Turn OmegaConf's error into a sentence with the whole key; of an unknown key, also which keys there are."""
    key, parent = f"{path}{error.full_key or ''}", error.parent_node
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and isinstance(parent, DictConfig):
        last = str(error.key)
        where = key.removesuffix(last).rstrip(".")
        names = [str(name) for name in parent if name != "hydra"]  # Hydra's own settings are of no use here
        meant = _same_key_elsewhere(parent, last) or did_you_mean(last, names)
        return f"{where or 'The config'} has no key {last!r}; it has: {', '.join(names)}.{meant}"
    return f"{key or 'The config'}: {first_line(error)}."


def _same_key_elsewhere(parent: DictConfig, key: str) -> str:
    """Suggest one or two groups of the whole config that have a key, as a sentence with a blank before it; else ""."""
    root = parent._get_root()
    groups = root.items_ex(resolve=False) if isinstance(root, DictConfig) else ()
    found = [name for name, group in groups if isinstance(group, DictConfig) and key in group and name != "hydra"]
    meant = " or ".join(f"'{name!s}.{key}'" for name in found)
    return f" Did you mean {meant}?" if 0 < len(found) <= 2 else ""


def first_line(error: Exception) -> str:
    """Take the first line of an error, without its full stop: OmegaConf and Hydra append details on further lines."""
    return str(error).splitlines()[0].rstrip(".")


def task_to_json(config: TaskConfig) -> str:
    """Serialise a task config; equal configs give equal text."""
    names = [item.name for item in dataclasses.fields(TaskConfig)]
    plain = {name: value for name, value in dataclasses.asdict(config).items() if name in names}
    return json.dumps(plain, sort_keys=True, separators=(",", ":"))


def task_from_json(text: str) -> TaskConfig:
    """Rebuild a task config from received JSON.

    Raises
    ------
    ConfigError
        If the text is too long, is not JSON, holds an interpolation (``${...}`` is never resolved on
        a client), or does not fit the schema.
    """
    if len(text) > MAX_TASK_JSON_BYTES:
        raise ConfigError("The received task config is too long; it was not read.")
    try:
        values = json.loads(text)
        decoded = json.dumps(values, ensure_ascii=False)  # without escapes, which could hide an interpolation
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"The received task config is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError("The received task config is not a JSON object.")
    if "${" in decoded:
        raise ConfigError("The received task config holds an interpolation; it was not read.")
    return typed(TaskConfig, values)
