"""The frozen Vision Transformer: building it with timm, loading its weights, naming its bits."""

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from task.config import BackboneConfig
from task.errors import ModelError
from task.folders import node_folder, reason_of
from task.libraries import timm
from task.packaged_weights import read_packaged_weights
from task.seeding import derive_seed

PACKAGED_FOLDER = Path(__file__).resolve().parent / "weights"
BACKBONES_VARIABLE = "PETALWISE_BACKBONES"
"""Folder of backbone files, of a client whose node config names none, and of the server's own process."""
REFUSED_ARGUMENTS = ("checkpoint_path", "cache_dir", "features_only", "img_size", "num_classes", "pretrained")
"""Starts of timm's arguments that say what other keys say, or make timm read or write other files."""
DELIVERED = "delivered"
"""The source of a backbone that came from the server."""
MAX_PARAMETERS = 2_000_000_000
"""Largest backbone that is built: the architecture's arguments come from the server, the memory is the client's."""
MAX_ARGUMENT = 16_384
"""Largest whole number among the architecture's arguments: far above any width or depth."""


def backbone_folder(node_config: Mapping[str, object]) -> Path | None:
    """Find the folder in which this party keeps backbone files.

    Parameters
    ----------
    node_config : Mapping[str, object]
        The node's own config; its key ``backbones`` wins over the environment's ``PETALWISE_BACKBONES``.

    Returns
    -------
    Path or None
        The folder, or None where neither is set.

    Raises
    ------
    DataError
        If there is no such folder.
    """
    return node_folder(node_config, "backbones", BACKBONES_VARIABLE)


def resolved(config: BackboneConfig) -> BackboneConfig:
    """Fill in what a config leaves to the pretrained model: image size 0, empty mean, empty deviation.

    Raises
    ------
    ModelError
        If timm does not know the model, or not how it was pretrained.
    """
    if not config.name:
        raise ModelError("backbone.name is empty; give the name of any timm model, such as vit_tiny_patch16_224.")
    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, timm.list_models(), n=5)
        raise ModelError(f"backbone.name={config.name!r} is no timm model. Similar: {', '.join(near) or 'none'}.")
    if config.image_size and config.mean and config.std:
        return config
    pretrained = timm.get_pretrained_cfg(config.name)
    if pretrained is None:
        raise ModelError(f"timm has no weights of {config.name!r}; set backbone.image_size, mean and std.")
    return replace(
        config,
        image_size=config.image_size or pretrained.input_size[-1],
        mean=config.mean or list(pretrained.mean),
        std=config.std or list(pretrained.std),
    )


def build_backbone(config: BackboneConfig, num_classes: int, folder: Path | None = None, seed: int = 0) -> nn.Module:
    """Build a timm model with the configured weights and a new head.

    Parameters
    ----------
    config : BackboneConfig
        Architecture, input size, and where the weights come from.
    num_classes : int
        Number of outputs of the new head.
    folder : Path, optional
        This party's own folder of backbone files (source ``checkpoint``).
    seed : int
        Seed of the weights for source ``random``.

    Returns
    -------
    nn.Module
        The model in evaluation mode on the CPU, float32; position embeddings resampled to the image size.

    Raises
    ------
    ModelError
        If timm does not know the model, its weights cannot be had or do not fit it, or it is one that
        cannot be trained on here: too large, with batch normalisation, of another image size.
    """
    config = resolved(config)
    with torch.device("meta"):  # without memory for the weights
        _check_architecture(_create(config, num_classes), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "backbone"))
        if config.source == "random":
            model = _create(config, num_classes)
        elif config.source == "hub":
            model = _create(config, num_classes, pretrained=True)
        else:
            model = _from_state(config, num_classes, _read_state(config, folder))
    return model.eval()


def base_hash(model: nn.Module) -> str:
    """Hash the frozen weights of a backbone.

    Position embeddings are left out: resampling them may differ in the last bit between processors.

    Parameters
    ----------
    model : nn.Module
        A timm model without adapter.

    Returns
    -------
    str
        SHA-256 over names, shapes and float32 bytes of all parameters but head and position embeddings.
    """
    digest, head = hashlib.sha256(), head_name(model)
    for name, parameter in model.named_parameters():
        if name.startswith(f"{head}.") or name.endswith("pos_embed"):
            continue
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().float().contiguous().numpy().data)
    return digest.hexdigest()


def head_name(model: nn.Module) -> str:
    """Find the module path of the classification head, as timm records it."""
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    if not isinstance(classifier, str):
        raise ModelError(f"{type(model).__name__} has several heads ({classifier}); choose a model with one.")
    return classifier


def _check_architecture(model: nn.Module, config: BackboneConfig) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MAX_PARAMETERS:
        raise ModelError(f"{config.name!r} would have {count} parameters, more than {MAX_PARAMETERS}.")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise ModelError(
            f"{config.name!r} has batch normalisation, whose running statistics no client would share; "
            "choose a Vision Transformer with layer normalisation."
        )
    embedding, size = getattr(model, "patch_embed", None), config.image_size
    patch = getattr(embedding, "patch_size", None) or 1
    patch = max(patch) if isinstance(patch, tuple) else patch
    if size % patch and not getattr(embedding, "dynamic_img_pad", False):
        below = size - size % patch
        nearest = " or ".join(str(side) for side in (below, below + patch) if side)
        raise ModelError(
            f"backbone.image_size={size} is no multiple of the patch size {patch} of {config.name!r}; take {nearest}."
        )


def _create(config: BackboneConfig, num_classes: int, **options: Any) -> nn.Module:
    refused = [name for name in config.arguments if name.startswith(REFUSED_ARGUMENTS)]
    if refused:
        raise ModelError(
            f"backbone.arguments: {refused[0]!r} is not allowed; use the other keys of backbone instead "
            "(source, checkpoint, image_size)."
        )
    for name, value in config.arguments.items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, int) and number > MAX_ARGUMENT for number in numbers):
            raise ModelError(f"backbone.arguments: {name}={value} is more than {MAX_ARGUMENT}.")
    arguments = {"img_size": config.image_size, **config.arguments, **options}
    try:
        return timm.create_model(config.name, num_classes=num_classes, **arguments)
    except Exception as error:  # models raise many unrelated types on arguments that do not fit
        raise ModelError(
            f"timm cannot build {config.name!r} at {config.image_size} px from source {config.source!r}: "
            f"{reason_of(error)}"
        ) from error


def _read_state(config: BackboneConfig, folder: Path | None) -> dict[str, torch.Tensor]:
    file_name = config.checkpoint
    if not file_name or Path(file_name).name != file_name:
        raise ModelError(f"backbone.checkpoint={file_name!r} must be a bare file name, without a folder.")
    if config.source == "packaged":
        return _read_packaged(file_name)
    if config.source == DELIVERED and (folder is None or not (folder / file_name).is_file()):
        raise ModelError("The backbone was to come from the server, and has not been kept here.")
    if folder is None or not (folder / file_name).is_file():
        raise ModelError(
            f"The backbone file {file_name!r} is not in this party's backbone folder"
            f"{'' if folder else ', as none is set'}. "
            f'Set the node config backbones="/folder" or the environment variable {BACKBONES_VARIABLE}.'
        )
    try:
        return load_file(folder / file_name)
    except (OSError, SafetensorError) as error:
        reason = reason_of(error)
        raise ModelError(f"The backbone file {file_name!r} is no intact safetensors file: {reason}.") from error


def _read_packaged(file_name: str) -> dict[str, torch.Tensor]:
    if not (PACKAGED_FOLDER / file_name).is_file():
        packaged = ", ".join(sorted(path.name for path in PACKAGED_FOLDER.glob("*.json"))) or "none"
        raise ModelError(f"backbone.checkpoint={file_name!r} does not come with the app, which has: {packaged}.")
    return read_packaged_weights(PACKAGED_FOLDER / file_name)


def _from_state(config: BackboneConfig, num_classes: int, state: dict[str, torch.Tensor]) -> nn.Module:
    plain = _create(config, num_classes)
    head = f"{head_name(plain)}."
    missing = [name for name, _ in plain.named_parameters() if name not in state and not name.startswith(head)]
    if missing:
        raise ModelError(
            f"{config.checkpoint!r} lacks {len(missing)} tensors of {config.name!r}, first {missing[:3]}. "
            "It must hold this model under timm's parameter names."
        )
    body = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    overlay = {"state_dict": body, "num_classes": -1, "custom_load": False}
    return _create(config, num_classes, pretrained=True, pretrained_cfg_overlay=overlay)
