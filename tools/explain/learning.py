"""Learning the merge weights that clients' layers should have had, by gradient descent on the merged model's loss."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from task.config import bounded
from task.data.images import ImageSet
from task.errors import DataError
from tools.explain.merging import MergedModel


@dataclass
class LearnOptions:
    """How target weights are learned."""

    calibration_images: int = bounded(500, at_least=2)
    """Images of the server's to learn on; at most half of its test images."""
    steps: int = bounded(40, at_least=1)
    """Steps of Adam, each on the loss of all calibration images."""
    learning_rate: float = bounded(0.1, above=0.0)
    """Learning rate of the logits."""
    pull: float = bounded(1e-4, at_least=0.0)
    """The loss is added pull/2 |logits|^2, so that layers which make no difference stay near uniform weights."""


def learn_weights(
    merged: MergedModel,
    shape: Sequence[int],
    data: ImageSet,
    options: LearnOptions,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Learn merge weights by Adam on logits per client and layer, whose softmax over clients they are.

    Starts from uniform weights and keeps the step at which the loss with its pull was lowest, so that the loss never
    ends above that of uniform weights. Nothing is drawn: equal records give equal weights.

    Parameters
    ----------
    merged : MergedModel
        The model as a function of its weights.
    shape : Sequence[int]
        Numbers of clients and of layers.
    data : ImageSet
        Images to learn on, on the model's device.
    options : LearnOptions
        Steps, learning rate, pull.
    on_step : callable
        Is given the number of every finished step.

    Returns
    -------
    Tensor, float64, [clients, layers]
        Weights that sum to one over clients for every layer, on the CPU.

    Raises
    ------
    DataError
        If the loss of uniform weights is not finite.
    """
    logits = torch.zeros(*shape, dtype=torch.float64, device=data.labels.device, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=options.learning_rate)
    best, lowest = logits.detach().clone(), math.inf
    for step in range(options.steps + 1):
        adam.zero_grad()
        value = _objective_backward(merged, logits, data, options.pull)
        if step == 0 and not math.isfinite(value):
            raise DataError("the loss of the uniformly merged model is not finite.")
        if value < lowest:
            best, lowest = logits.detach().clone(), value
        if step < options.steps:
            adam.step()
            on_step(step + 1)
    return best.softmax(0).cpu()


def _objective_backward(merged: MergedModel, logits: Tensor, data: ImageSet, pull: float) -> float:
    """Add the gradient of loss and pull to that of the logits; return their sum."""
    penalty = pull / 2 * logits.square().sum()
    penalty.backward()
    return merged.loss_backward(logits.softmax(0), data) + float(penalty.detach())
