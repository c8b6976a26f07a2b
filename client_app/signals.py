"""What ordinary training reveals: moments of the head's input per class, update scores and norms per adapted layer.

Taken by hooks from the forward passes and optimizer steps that training makes anyway; kept on the device until one
transfer at the end of the round.

References
----------
Fiorini et al., "Intrinsic Training Signals for Federated Learning Aggregation", arXiv 2507.06813, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from task.model import AdaptedModel
from task.units import Layout, LoraLayer, TensorSpec, lora_layers


@dataclass
class ClassMoments:
    """Count, mean and sum of squared deviations per class, accumulated batch by batch.

    Chan, Golub, LeVeque 1983, pairwise update; float64, so that a mean far above the deviation does no harm.

    Parameters
    ----------
    num_classes, dimension : int
        Shape of the accumulators.
    device : torch.device
        Where the batches lie.
    """

    num_classes: int
    dimension: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        shape = (self.num_classes, self.dimension)
        self.count = torch.zeros(self.num_classes, dtype=torch.float64, device=self.device)
        self.mean = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.squares = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, features: Tensor, labels: Tensor, chosen: Tensor) -> None:
        """Take in a batch.

        Parameters
        ----------
        features : Tensor, float, [batch, dimension]
            Inputs of the head.
        labels : Tensor, int64, [batch]
            Classes.
        chosen : Tensor, bool, [batch]
            Which samples count.
        """
        z = features.detach().double()
        member = membership(labels, self.num_classes) * chosen.double()[:, None]
        count = member.sum(0)
        mean = member.T @ z / count.clamp_min(1.0)[:, None]
        squares = member.T @ (z - mean[labels]).square()
        total = self.count + count
        share = (count / total.clamp_min(1.0))[:, None]
        delta = mean - self.mean
        self.squares += squares + delta.square() * share * self.count[:, None]
        self.mean += delta * share
        self.count = total

    def variances(self) -> Tensor:
        """Unbiased variance per dimension, float64 [classes, dimension]; 0 where a class has fewer than two."""
        return self.squares / (self.count - 1).clamp_min(1.0)[:, None]

    def variance(self) -> Tensor:
        """Mean over dimensions of the unbiased variance v, float64 [classes]; 0 where a class has fewer than two."""
        return self.variances().mean(1)


def membership(labels: Tensor, num_classes: int) -> Tensor:
    """Ones where a sample is of a class, float64 [n, classes]; without one_hot's checks, which wait for the device."""
    return (labels[:, None] == torch.arange(num_classes, device=labels.device)).double()


class FeatureTap:
    """Keeps the input of the head at each forward pass, by a forward hook; a context manager.

    Attributes
    ----------
    features : Tensor, float32, [batch, dimension]
        That of the last forward pass.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._head = model.head
        self.features = torch.empty(0)

    def __enter__(self) -> "FeatureTap":
        self._handle: RemovableHandle = self._head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.features = arguments[0].detach().float()


class UpdateScores:
    """Accumulates s[t] += |<G, before - after>| per tensor over optimizer steps, by optimizer hooks.

    G is the gradient that the optimizer uses, before and after are the values around its step, weight decay included.
    A dot product that is not finite counts as 0 and is counted in :attr:`refused`.

    Parameters
    ----------
    model : AdaptedModel
        Its flat array is what the optimizer steps.
    optimizer : Optimizer
        Is hooked while the object is used as a context manager.
    specs : Sequence[TensorSpec]
        The tensors to score.

    Attributes
    ----------
    scores : Tensor, float64, [specs]
        The sums s.
    refused : Tensor, float64, [1]
        How many dot products were not finite.
    """

    def __init__(self, model: AdaptedModel, optimizer: torch.optim.Optimizer, specs: Sequence[TensorSpec]) -> None:
        self._flat, self._optimizer = model.flat, optimizer
        self._move = torch.empty_like(model.flat, requires_grad=False)
        gradient, parts = model.flat.grad, [slice(spec.offset, spec.offset + spec.size) for spec in specs]
        assert gradient is not None
        self._pairs = [(gradient[part], self._move[part]) for part in parts]  # views: both arrays stay where they are
        self.scores = torch.zeros(len(specs), dtype=torch.float64, device=model.device)
        self.refused = torch.zeros(1, dtype=torch.float64, device=model.device)

    def __enter__(self) -> "UpdateScores":
        self._handles = [
            self._optimizer.register_step_pre_hook(self._note_before),
            self._optimizer.register_step_post_hook(self._note_after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note_before(self, *_: Any) -> None:
        self._move.copy_(self._flat.detach())

    def _note_after(self, *_: Any) -> None:
        self._move.sub_(self._flat.detach())
        dots = torch.stack([torch.dot(gradient, move) for gradient, move in self._pairs]).double().abs_()
        finite = torch.isfinite(dots)
        self.scores += torch.where(finite, dots, 0.0)
        self.refused += (~finite).sum()


def product_change_norm(a0: Tensor, b0: Tensor, a1: Tensor, b1: Tensor) -> Tensor:
    """Frobenius norm ||B1 A1 - B0 A0||_F from the factors, without forming the product.

    With U = [B1 - B0, B0] and V = [A1; A1 - A0] the difference is U V, and ||U V||_F^2 = <U^T U, V V^T>; so taken,
    small changes do not cancel.

    Parameters
    ----------
    a0, a1 : Tensor, [r, in]
        A before and after.
    b0, b1 : Tensor, [out, r]
        B before and after.

    Returns
    -------
    Tensor, float64, []
        The norm.
    """
    a0, b0, a1, b1 = a0.double(), b0.double(), a1.double(), b1.double()
    u, v = torch.cat([b1 - b0, b0], dim=1), torch.cat([a1, a1 - a0])
    square: Tensor = ((u.T @ u) * (v @ v.T)).sum()
    return square.clamp_min(0.0).sqrt()


def update_norms(layout: Layout, before: Tensor, after: Tensor) -> dict[str, Tensor]:
    """Norms of a round's change of A, of B and of the product B A, per adapted layer.

    Parameters
    ----------
    layout : Layout
        Index of the flat arrays.
    before, after : Tensor, float32, [n]
        Adapter and head before and after local training.

    Returns
    -------
    dict[str, Tensor]
        ``norm-a``, ``norm-b``, ``norm-product``, each float64 [layers]; where A is frozen, those of A are 0 and those
        of the product are those of B.
    """
    old, new, layers = layout.views(before), layout.views(after), lora_layers(layout)
    zero = torch.zeros((), dtype=torch.float64, device=after.device)

    def norm(spec: TensorSpec) -> Tensor:
        return (new[spec.name] - old[spec.name]).double().square().sum().sqrt()

    def product(layer: LoraLayer) -> Tensor:
        if layer.a is None:
            return norm(layer.b)
        return product_change_norm(old[layer.a.name], old[layer.b.name], new[layer.a.name], new[layer.b.name])

    return {
        "norm-a": torch.stack([norm(layer.a) if layer.a else zero for layer in layers]),
        "norm-b": torch.stack([norm(layer.b) for layer in layers]),
        "norm-product": torch.stack([product(layer) for layer in layers]),
    }


def label_entropy(labels: Tensor) -> Tensor:
    """Entropy of the empirical distribution of labels, nats, float64 []."""
    p = torch.bincount(labels).double() / len(labels)
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy
