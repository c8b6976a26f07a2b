"""The merge as a differentiable function of its weights, and the merged model's loss."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812

from strategies.arithmetic import sample_weights, weighted_sum
from task.data.batches import Normaliser, eval_batches
from task.data.images import ImageSet
from task.model import AdaptedModel, canonical_name
from task.units import Layout, lora_layers


def stacked_factors(updates: Tensor, layout: Layout) -> list[dict[str, Tensor]]:
    """View the clients' adapters layer by layer, without copying.

    Parameters
    ----------
    updates : Tensor, float32, [clients, n]
        The clients' adapters and heads.
    layout : Layout
        Index of the flat arrays.

    Returns
    -------
    list[dict[str, Tensor]]
        Per adapted layer its exchanged factors by name: A [clients, r, in] and B [clients, out, r], float32.
    """
    return [
        {spec.name: updates[:, spec.offset : spec.offset + spec.size].unflatten(1, spec.shape) for spec in layer.specs}
        for layer in lora_layers(layout)
    ]


def merged_factors(weights: Tensor, factors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge every layer by its own weights, differentiably: A_l = sum_m W[m,l] A_m,l and B_l = sum_m W[m,l] B_m,l.

    Parameters
    ----------
    weights : Tensor, [clients, layers]
        W; sums to one over clients for every layer.
    factors : Sequence[dict[str, Tensor]]
        Of :func:`stacked_factors`.

    Returns
    -------
    dict[str, Tensor]
        A [r, in] and B [out, r] by name, float32.
    """
    columns = weights.float().unbind(1)
    return {
        name: torch.einsum("m,mij->ij", column, stack)
        for column, layer in zip(columns, factors, strict=True)
        for name, stack in layer.items()
    }


class MergedModel:
    """The model merged from a record's updates, as a function of the weights of its adapted layers.

    Backbone and clients' factors are fixed. So are the head and whatever else is not the adapter: they are the
    clients' mean weighted by numbers of examples.

    Parameters
    ----------
    model : AdaptedModel
        Gives structure and backbone; its own adapter and head are left alone.
    updates : Tensor, float32, [clients, n]
        The clients' adapters and heads, on the model's device.
    num_examples : Sequence[int]
        Training examples of every client.
    normaliser : Normaliser
        Maps uint8 images to the model's input.
    batch_size : int
        Images per forward pass.
    """

    def __init__(
        self,
        model: AdaptedModel,
        updates: Tensor,
        num_examples: Sequence[int],
        normaliser: Normaliser,
        batch_size: int,
    ) -> None:
        self.module, self.normaliser, self.batch_size = model.module.eval(), normaliser, batch_size
        self.factors = stacked_factors(updates, model.layout)
        self._full_names = {canonical_name(n): n for n, p in model.module.named_parameters() if p.requires_grad}
        adapted = {name for layer in self.factors for name in layer}
        mean = model.layout.views(weighted_sum(updates.unbind(), sample_weights(num_examples)))
        self._fixed = {name: tensor for name, tensor in mean.items() if name not in adapted}

    @torch.no_grad()
    def loss(self, weights: Tensor, data: ImageSet) -> float:
        """Mean cross-entropy (nats) on labelled images of the model merged by weights [clients, layers]."""
        merged = merged_factors(weights.to(data.labels.device), self.factors)
        return sum(float(part) for part in self._parts(merged, data))

    def loss_backward(self, weights: Tensor, data: ImageSet) -> float:
        """Mean cross-entropy (nats), whose gradient is added to that of whatever ``weights`` is computed from.

        The merge is done once; its gradient is summed over batches before it is taken back to the weights.

        Parameters
        ----------
        weights : Tensor, [clients, layers]
            W, part of a graph.
        data : ImageSet
            At least one image, on the model's device.

        Returns
        -------
        float
            The loss.
        """
        merged = merged_factors(weights, self.factors)
        leaves = {name: factor.detach().requires_grad_() for name, factor in merged.items()}
        total = 0.0
        for part in self._parts(leaves, data):
            part.backward()
            total += float(part.detach())
        torch.autograd.backward(list(merged.values()), [leaf.grad for leaf in leaves.values()])
        return total

    def _parts(self, adapter: dict[str, Tensor], data: ImageSet) -> Iterator[Tensor]:
        """Yield every batch's share of the mean loss."""
        values = {self._full_names[name]: tensor for name, tensor in (self._fixed | adapter).items()}
        for images, labels in eval_batches(data, self.batch_size, self.normaliser):
            logits = functional_call(self.module, values, (images,))
            yield F.cross_entropy(logits, labels, reduction="sum") / len(data)
