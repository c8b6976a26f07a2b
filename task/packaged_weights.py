"""Backbone weights that travel inside the Flower app bundle.

A Flower App Bundle carries only text files (.py, .toml, .md, .yaml, .json), so the safetensors bytes
stand base64-encoded in a JSON file beside what they were trained on.
"""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from task.errors import ConfigError


def write_packaged_weights(path: Path, state: Mapping[str, torch.Tensor], record: Mapping[str, object]) -> None:
    """Write a state dict as float16 safetensors, base64-encoded in JSON.

    Parameters
    ----------
    path : Path
        The .json file to write.
    state : Mapping[str, torch.Tensor]
        Parameters and buffers under timm's names.
    record : Mapping[str, object]
        What a reader should know of the weights: architecture, data, recipe, accuracy.
    """
    payload = save({name: tensor.to(torch.float16).contiguous() for name, tensor in state.items()})
    document = {
        **record,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "safetensors_base64": base64.b64encode(payload).decode("ascii"),
    }
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_packaged_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict written by :func:`write_packaged_weights`.

    Parameters
    ----------
    path : Path
        The .json file.

    Returns
    -------
    dict[str, torch.Tensor]
        float16 tensors under timm's names.

    Raises
    ------
    ConfigError
        If the bytes do not have the SHA-256 written beside them.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    payload = base64.b64decode(document["safetensors_base64"])
    if hashlib.sha256(payload).hexdigest() != document["sha256"]:
        raise ConfigError(f"The weights in {path.name} are damaged: their SHA-256 is not {document['sha256']}.")
    return load(payload)
