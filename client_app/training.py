"""Local training of adapter and head."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from client_app.measuring import Recorder
from task.config import TrainConfig
from task.errors import ModelError
from task.model import AdaptedModel


@dataclass(frozen=True)
class TrainOutcome:
    """What a round of local training came to."""

    loss: float
    """Mean cross-entropy over all training batches, without the proximal term; weighted by batch size."""
    steps: int
    """Number of optimizer steps."""


def make_optimizer(model: AdaptedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Make the optimizer over the flat array of trainable values."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            [model.flat], lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.AdamW([model.flat], lr=config.lr, weight_decay=config.weight_decay, fused=True)


def train(
    model: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    proximal_mu: float = 0.0,
    recorder: Recorder | None = None,
    optimizer_state: Mapping[str, torch.Tensor] | None = None,
    frozen: Collection[str] = (),
) -> TrainOutcome:
    """Train adapter and head in place.

    Parameters
    ----------
    model : AdaptedModel
        Holds the received values; is put into training mode.
    optimizer : Optimizer
        Over ``model.flat``; its state is replaced first.
    batches : Iterable[tuple[Tensor, Tensor]]
        Normalised images [b, 3, h, w] and labels [b], on the model's device.
    proximal_mu : float
        Weight of mu/2 ||w - w_received||^2 (FedProx); 0 leaves it out.
    recorder : Recorder, optional
        Sees every batch.
    optimizer_state : Mapping[str, Tensor], optional
        The optimizer's state of ``model.flat`` to go on from; by default a fresh one.
    frozen : Collection[str]
        Layer units that keep their values; no gradient is computed for them.

    Returns
    -------
    TrainOutcome
        Mean loss and number of steps.

    Raises
    ------
    ModelError
        If a loss is not finite, before the optimizer steps.
    """
    model.set_training(True)
    flat, gradient = model.flat, model.flat.grad
    optimizer.state.clear()
    if optimizer_state:
        optimizer.state[flat] = {name: value.to(flat.device) for name, value in optimizer_state.items()}
    assert gradient is not None
    received = flat.detach().clone() if proximal_mu else None
    kept = [(part, flat.detach()[part].clone()) for unit, part in model.layout.slices.items() if unit in frozen]
    trained = model.parameters(without=frozen) if frozen else None
    total, seen, steps = 0.0, 0, 0
    for images, labels in batches:
        gradient.zero_()
        if recorder is not None:
            recorder.before_step(steps)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        value = loss.item()
        if not math.isfinite(value):
            raise ModelError(f"The loss is {value} at local step {steps + 1}; lower train.lr.")
        if recorder is not None:
            recorder.after_forward(steps, logits, labels)
        torch.autograd.backward(loss, inputs=trained)
        if received is not None:
            gradient.add_(flat.detach() - received, alpha=proximal_mu)
        optimizer.step()
        for part, values in kept:
            flat.detach()[part] = values
        total, seen, steps = total + value * len(labels), seen + len(labels), steps + 1
    return TrainOutcome(total / seen, steps)
