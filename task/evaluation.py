"""Accuracy and loss of a model on labelled images."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from task.data.batches import Normaliser, eval_batches
from task.data.images import ImageSet
from task.model import AdaptedModel


@dataclass(frozen=True)
class Score:
    """Result of an evaluation."""

    accuracy: float
    """Share of images classified correctly, in [0, 1]."""
    loss: float
    """Mean cross-entropy, nats."""
    num_examples: int
    """Number of images."""


@torch.inference_mode()
def evaluate(model: AdaptedModel, data: ImageSet, normaliser: Normaliser, batch_size: int = 256) -> Score:
    """Evaluate a model.

    Parameters
    ----------
    model : AdaptedModel
        Is put into evaluation mode.
    data : ImageSet
        At least one image, on the model's device.
    normaliser : Normaliser
        Maps uint8 batches to the model's input.
    batch_size : int
        Images per forward pass.

    Returns
    -------
    Score
        Accuracy and loss; sums are taken in float64.
    """
    model.set_training(False)
    hits = torch.zeros((), dtype=torch.int64, device=model.device)
    loss = torch.zeros((), dtype=torch.float64, device=model.device)
    for images, labels in eval_batches(data, batch_size, normaliser):
        logits = model(images)
        hits += (logits.argmax(1) == labels).sum()
        loss += F.cross_entropy(logits, labels, reduction="sum").double()
    return Score(hits.item() / len(data), loss.item() / len(data), len(data))
