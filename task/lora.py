"""LoRA layers that compute what peft's do, with fewer passes over memory; they stay peft's in all else."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from task.libraries import peft

Linear = peft.tuners.lora.Linear


class _LoraProduct(torch.autograd.Function):
    """x W^T + b + s (x A^T) B^T; the low-rank parts are added by the matrix products themselves, in place."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        low = (x @ a.T).mul_(scaling)
        out = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        out.addmm_(low, b.T)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling  # type: ignore[attr-defined]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        of_low = (gradient @ b).mul_(ctx.scaling)
        of_x = (gradient @ weight).addmm_(of_low, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.T @ x, gradient.T @ low, None


class LeanLoraLinear(Linear):
    """peft's LoRA layer, whose training step makes no intermediate array of the layer's full width.

    What it does not know, such as merged or disabled adapters, it leaves to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Apply the frozen layer and the adapter."""
        names, frozen = self.active_adapters, self.base_layer
        others = args or kwargs or self.merged or self.disable_adapters or names != list(self.lora_A)
        if others or x.dim() < 2 or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        arguments = (x.flatten(0, -2), frozen.weight, frozen.bias, a, b, self.scaling[names[0]])
        out: Tensor = _LoraProduct.apply(*arguments)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], out.shape[1])


def make_lean(module: peft.PeftModel) -> None:
    """Turn the adapted layers of a model into :class:`LeanLoraLinear`, where it computes the same.

    A frozen A keeps peft's own step: what goes through it is measured there.
    """
    for layer in module.modules():
        if type(layer) is Linear and _is_plain(layer):
            layer.__class__ = LeanLoraLinear


def _is_plain(layer: Linear) -> bool:
    """Tell whether a layer is linear with one trainable adapter, without dropout and variants."""
    names = list(layer.lora_A)
    return bool(
        len(names) == 1
        and type(layer.base_layer) is nn.Linear
        and isinstance(layer.lora_dropout[names[0]], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[names[0]]
        and layer.lora_A[names[0]].weight.requires_grad
    )
