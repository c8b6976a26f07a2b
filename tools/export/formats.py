"""The forms of a model: a peft adapter with its backbone, a merged timm state dict, ONNX."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from task.config import BackboneConfig, first_line
from task.errors import ModelError
from task.libraries import peft

FORMATS = ("peft", "timm", "onnx")
"""The forms, in the order in which they are made: merging the adapter into the weights comes after ``peft``."""
EXTRA = ("onnx", "onnxruntime", "onnxscript")
"""Packages of the extra ``export``, for ONNX."""
MAX_INLINE_BYTES = 1_900_000_000
"""Weights of more bytes go into a file beside the ONNX model's, which cannot be larger than 2 GiB."""
TOLERANCE = 1e-3
"""Largest difference of logits between ONNX and torch, in parts of the largest logit."""


def save_peft(folder: Path, model: peft.PeftModel) -> None:
    """Save adapter and head for ``PeftModel.from_pretrained``, and the frozen backbone under timm's names.

    Parameters
    ----------
    folder : Path
        Gets ``adapter_config.json``, ``adapter_model.safetensors`` and ``backbone.safetensors``; the backbone has an
        untrained head, which the adapter's replaces.
    model : PeftModel
        The model.
    """
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink()  # peft's own, which is an empty form
    backbone = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    _save(folder / "backbone.safetensors", backbone)


def save_timm(folder: Path, merged: nn.Module) -> None:
    """Save a model without adapter as ``model.safetensors``, which timm loads by ``checkpoint_path``."""
    folder.mkdir()
    _save(folder / "model.safetensors", merged.state_dict())


def save_onnx(folder: Path, merged: nn.Module, backbone: BackboneConfig, classes: list[str]) -> float:
    """Save a model without adapter as ``model.onnx`` and compare its logits in onnxruntime with torch's.

    Parameters
    ----------
    folder : Path
        Is made; weights of more than :data:`MAX_INLINE_BYTES` go into ``model.onnx.data``.
    merged : nn.Module
        The model, on the CPU. Its input is ``images``, float32 [batch, 3, h, w], normalised; its output ``logits``,
        float32 [batch, classes].
    backbone : BackboneConfig
        Image size, mean and deviation, which go into the file's metadata with the classes, as JSON.
    classes : list[str]
        Names of the outputs in order.

    Returns
    -------
    float
        Largest difference between a logit in onnxruntime and in torch.

    Raises
    ------
    ModelError
        If the model cannot be exported, or not with the same logits.
    """
    folder.mkdir()
    path, side = folder / "model.onnx", backbone.image_size
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    program = _program(merged, images[:2], backbone.name)
    facts = {"classes": classes, "image_size": side, "mean": list(backbone.mean), "std": list(backbone.std)}
    program.model.metadata_props.update({name: json.dumps(fact) for name, fact in facts.items()})
    size = sum(tensor.nbytes for tensor in merged.state_dict().values())
    program.save(path, external_data=size > MAX_INLINE_BYTES)
    return _difference(path, merged, images)


def _save(path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"format": "pt"})


def _program(merged: nn.Module, images: torch.Tensor, name: str) -> torch.onnx.ONNXProgram:
    """Trace the model with any number of images."""
    try:
        with _quiet():
            program = torch.onnx.export(
                merged,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except Exception as error:  # tracing raises dozens of unrelated types
        raise ModelError(
            f"{name!r} cannot be exported to ONNX ({first_line(error)}); leave it out by --format peft timm."
        ) from error
    assert program is not None  # as it is where dynamo=True
    return program


@torch.inference_mode()
def _difference(path: Path, merged: nn.Module, images: torch.Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [found] = session.run(["logits"], {"images": images.numpy()})
    wanted = merged(images)
    difference = float((torch.from_numpy(found) - wanted).abs().max())
    if not difference <= TOLERANCE * max(wanted.abs().max().item(), 1.0):
        raise ModelError(
            f"The ONNX model's logits differ from torch's by up to {difference:.2g}; it is not kept. Leave ONNX out by "
            "--format peft timm."
        )
    return difference


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter from telling of its own workings."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
