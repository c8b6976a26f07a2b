"""The frozen backbone on its way from the server to nodes that lack it: a safetensors file named by its SHA-256."""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord
from safetensors.torch import save
from torch import nn

from task.arrays import FLAT, array_values, flat_to_array
from task.backbone import DELIVERED, head_name
from task.config import BackboneConfig
from task.errors import MessageError, StateError
from task.folders import reason_of

MAX_BYTES = 8_000_000_000
"""Largest backbone that a node takes: float32 values of the largest that is built."""
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")


def packed_backbone(config: BackboneConfig, backbone: nn.Module) -> tuple[BackboneConfig, Array]:
    """Pack a backbone for nodes that lack it.

    Parameters
    ----------
    config : BackboneConfig
        How the server builds it.
    backbone : nn.Module
        A timm model without adapter, its position embeddings resampled.

    Returns
    -------
    tuple[BackboneConfig, Array]
        The config by which nodes build it from what they are sent, and that: the bytes of a file, uint8 [n].
    """
    head = f"{head_name(backbone)}."
    data = save({k: v.contiguous() for k, v in backbone.state_dict().items() if not k.startswith(head)})
    name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
    array = flat_to_array(np.frombuffer(data, np.uint8), "uint8")
    return replace(config, source=DELIVERED, checkpoint=name, deliver=False), array


def delivered_folder(state: Path) -> Path:
    """Name the folder in which a node keeps what it was sent, below its folder for state."""
    return state / "backbones"


def lacks(config: BackboneConfig, folder: Path) -> bool:
    """Tell whether a node has yet to be sent a backbone; a damaged file counts as none."""
    if config.source != DELIVERED:
        return False
    try:
        with (folder / _checked(config.checkpoint)).open("rb") as file:
            return f"{hashlib.file_digest(file, 'sha256').hexdigest()}.safetensors" != config.checkpoint
    except OSError:
        return True


def keep_delivered(record: ArrayRecord, name: str, folder: Path) -> None:
    """Keep a backbone that came from the server, if it is what its name says.

    Parameters
    ----------
    record : ArrayRecord
        One array ``flat``, uint8 [n].
    name : str
        The SHA-256 of its values, and ``.safetensors``.
    folder : Path
        Where; made if it is not there.

    Raises
    ------
    MessageError
        If it is something else, or too large.
    StateError
        If it cannot be written.
    """
    if list(record) != [FLAT] or len(shape := tuple(record[FLAT].shape)) != 1 or not 0 < shape[0] <= MAX_BYTES:
        raise MessageError(f"A backbone must be one array of 1 to {MAX_BYTES} bytes.")
    data = array_values(record[FLAT], shape, "uint8")
    if f"{hashlib.sha256(data.data).hexdigest()}.safetensors" != _checked(name):
        raise MessageError("The backbone that came does not have the SHA-256 that was announced; it is not kept.")
    part = folder / f"{name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data.data)
        os.replace(part, folder / name)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise StateError(f"This client cannot keep the backbone: {reason_of(error)}.") from error


def _checked(name: str) -> str:
    """Return a name that may be a file's."""
    if not _NAME.fullmatch(name):
        raise MessageError(f"{name[:80]!r} is not the name of a backbone: a SHA-256 and .safetensors.")
    return name
