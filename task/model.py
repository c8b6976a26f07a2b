"""A backbone with a LoRA adapter, its trainable tensors lying in one flat array."""

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from task.backbone import base_hash, build_backbone, head_name
from task.config import LoraConfig, TaskConfig, TrainConfig
from task.errors import ModelError
from task.libraries import peft
from task.lora import make_lean
from task.seeding import derive_seed
from task.units import Layout, head_specs, make_layout


class AdaptedModel:
    """A frozen backbone, a LoRA adapter and a head that trains in full.

    All trainable tensors and their gradients are views into two flat arrays, so that loading, reading
    and stepping an optimizer each touch one tensor.

    Parameters
    ----------
    module : peft.PeftModel
        The model; its trainable parameters are re-seated as views.
    layout : Layout
        Index of the trainable tensors.
    base : str
        Hash of the frozen weights.
    computing : TrainConfig
        Precision, and the order of the images' dimensions.
    """

    def __init__(self, module: peft.PeftModel, layout: Layout, base: str, computing: TrainConfig) -> None:
        self.module = module
        self._computing = computing
        self.layout = layout
        self.base = base
        self._trainable = {canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad}
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the model; :attr:`flat` and its gradient are made anew on the device."""
        order = torch.channels_last if self._computing.channels_last else torch.preserve_format
        self.module.to(device=device, memory_format=order)  # type: ignore[call-overload]  # missing in torch's stubs
        flat = torch.empty(self.layout.size, dtype=torch.float32, device=device)
        gradient = torch.zeros_like(flat)
        views, gradient_views = self.layout.views(flat), self.layout.views(gradient)
        for name, parameter in self._trainable.items():
            views[name].copy_(parameter.detach())
            parameter.data = views[name]
            parameter.grad = gradient_views[name]
        self.flat = nn.Parameter(flat)
        self.flat.grad = gradient

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.flat.device

    def set_training(self, training: bool) -> None:
        """Put the model into training or evaluation mode; its many modules are visited only if it is in the other."""
        if self.module.training != training:
            self.module.train(training)

    def load(self, flat: np.ndarray) -> None:
        """Copy adapter and head into place.

        Parameters
        ----------
        flat : ndarray, float32, [layout.size]
            The values, in order of the layout.
        """
        if self.device.type == "cpu":
            np.copyto(self.flat.detach().numpy(), flat)
        else:
            self.flat.detach().copy_(torch.from_numpy(np.array(flat)))

    def put(self, values: torch.Tensor, units: Sequence[str] | None) -> None:
        """Copy some of the units into place, one after another in the values; None stands for all."""
        self.layout.put(self.flat.detach(), units, values)

    def read(self) -> np.ndarray:
        """Copy adapter and head out as float32 [layout.size]."""
        return self.flat.detach().cpu().numpy().copy()

    def parameters(self, without: Collection[str]) -> list[nn.Parameter]:
        """List the trained parameters, without those of some units."""
        return [self._trainable[spec.name] for spec in self.layout.tensors if spec.unit not in without]

    def submodule(self, name: str) -> Any:
        """Find a module by timm's path, such as ``blocks.0.attn.qkv`` or the head's."""
        return self.module.base_model.model.get_submodule(name)  # type: ignore[union-attr]

    @property
    def head(self) -> nn.Module:
        """The classification head, whose input are the features."""
        head: nn.Module = self.submodule(head_specs(self.layout)[0].name.removesuffix(".weight"))
        return head

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes], float32, of normalised images [n, 3, h, w]."""
        if self._computing.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._computing.precision == "bfloat16"):
            logits: torch.Tensor = self.module(images)
        return logits.float()


def canonical_name(peft_name: str) -> str:
    """Strip peft's wrappers from a parameter name: ``blocks.0.attn.qkv.lora_A.weight``, ``head.weight``."""
    name = peft_name.removeprefix("base_model.model.")
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def add_adapter(backbone: nn.Module, config: LoraConfig, seed: int) -> peft.PeftModel:
    """Wrap a backbone with a LoRA adapter (A Kaiming-uniform, B zero) and a fresh head, drawn from a seed.

    With ``freeze_a`` the matrices A are no trainable values and do not travel.

    Raises
    ------
    ModelError
        If a target matches no linear layer, or anything else; lists what the model has.
    """
    head = head_name(backbone)
    _check_targets(backbone, head, config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets),
        modules_to_save=[head],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapter"))
        _reset_head(backbone.get_submodule(head))
        adapted = peft.get_peft_model(backbone, settings)
    for name, parameter in adapted.named_parameters():
        if config.freeze_a and ".lora_A." in name:
            parameter.requires_grad = False
    return adapted


def build_model(task: TaskConfig, num_classes: int, folder: Path | None = None) -> AdaptedModel:
    """Build the model of a task with its initial adapter, the same on every machine.

    Parameters
    ----------
    task : TaskConfig
        Backbone, adapter and seed.
    num_classes : int
        Number of classes of the head.
    folder : Path, optional
        This party's own folder of backbone files.

    Returns
    -------
    AdaptedModel
        On the CPU, in evaluation mode.

    Raises
    ------
    ModelError
        If the backbone or the adapter cannot be built.
    """
    backbone = build_backbone(task.backbone, num_classes, folder, task.seed)
    base, head = base_hash(backbone), head_name(backbone)
    module = add_adapter(backbone, task.lora, task.seed).eval()
    if task.train.compile:
        _compile(module)
    else:
        make_lean(module)
    if task.lora.freeze_a:
        base = with_frozen_factors(base, module)
    shapes = {canonical_name(name): p.shape for name, p in module.named_parameters() if p.requires_grad}
    return AdaptedModel(module, make_layout(shapes, task.lora.units, head), base, task.train)  # type: ignore[arg-type]


def _compile(module: nn.Module) -> None:
    """Compile a model in place, at its first call; hooks that come later, which measure signals, are followed."""
    import torch._dynamo  # takes 2 s to import

    torch._dynamo.config.skip_nnmodule_hook_guards = False
    module.compile()


def with_frozen_factors(base: str, module: peft.PeftModel) -> str:
    """Digest the hash of the backbone together with the matrices A that nobody trains or sends."""
    digest = hashlib.sha256(base.encode())
    for name, parameter in module.named_parameters():
        if ".lora_A." in name:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def _check_targets(backbone: nn.Module, head: str, targets: Sequence[str]) -> None:
    """Refuse targets by which peft would adapt nothing, or a convolution."""
    modules = {name: module for name, module in backbone.named_modules() if name not in ("", head)}
    is_linear = {name: isinstance(module, nn.Linear) for name, module in modules.items()}
    if not targets:
        raise ModelError("lora.targets: name at least one linear layer, such as attn.qkv.")
    for target in targets:
        matched = [name for name in is_linear if name == target or name.endswith(f".{target}")]
        other = [name for name in matched if not is_linear[name]]
        if other or not matched:
            found = f"{other[0]}, which is no linear layer" if other else "no linear layer"
            endings = sorted({".".join(name.split(".")[-2:]) for name, linear in is_linear.items() if linear})
            raise ModelError(f"lora.targets: {target!r} matches {found}. The model has: {', '.join(endings)}.")


def _reset_head(head: nn.Module) -> None:
    """Draw the head from the current seed: truncated normal with deviation 0.02, zero bias (timm's ViT default)."""
    if not isinstance(head, nn.Linear):
        raise ModelError(f"The head is a {type(head).__name__}, not a linear layer.")
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
