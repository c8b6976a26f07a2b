"""What the strategies share of arithmetic: pure functions on flat tensors."""

import math
from collections.abc import Sequence

import torch

from task.errors import MessageError

BLOCK = 1 << 20
"""Elements of the accumulator that are summed at once: 4 MB, few calls and still in the last cache."""


def sample_weights(num_examples: Sequence[int]) -> list[float]:
    """Weigh clients by their number of examples: p_i = n_i / sum_j n_j (McMahan et al. 2017, FedAvg).

    Parameters
    ----------
    num_examples : Sequence[int]
        Positive counts n_i, one per client.

    Returns
    -------
    list[float]
        Weights that sum to one.

    Raises
    ------
    MessageError
        If there is no client or a count is not positive.
    """
    if not num_examples or min(num_examples) <= 0:
        raise MessageError(f"Cannot weigh clients by their examples: {list(num_examples)}.")
    total = math.fsum(num_examples)
    return [n / total for n in num_examples]


def weighted_sum(vectors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Sum w_i x_i over one float32 accumulator, in the order given.

    Block by block, so that the accumulator stays in the processor's cache and memory is read once.

    Parameters
    ----------
    vectors : Sequence[Tensor], float32, each [n]
        The x_i; only read.
    weights : Sequence[float]
        The w_i.

    Returns
    -------
    Tensor, float32, [n]
        The sum.

    Raises
    ------
    ValueError
        If there are no vectors, or not one weight for each.
    """
    if not vectors or len(vectors) != len(weights):
        raise ValueError(
            f"{len(vectors)} vectors and {len(weights)} weights: give one weight per vector, at least one."
        )
    total = torch.zeros_like(vectors[0])
    for start in range(0, len(total), BLOCK):
        accumulator = total[start : start + BLOCK]
        for vector, weight in zip(vectors, weights, strict=True):
            accumulator.add_(vector[start : start + BLOCK], alpha=weight)
    return total
