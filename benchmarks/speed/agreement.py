"""Arms are compared only where they compute the same."""

from collections.abc import Mapping

import torch
from torch import Tensor

from task.errors import PetalwiseError

MAX_DEVIATION = 1e-3
"""Largest difference of final adapters, as a share of their largest element: summation orders differ, no more."""


def check_same(adapter: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse to compare arms that did not compute the same.

    Raises
    ------
    PetalwiseError
        If names or values of the adapters differ by more than rounding.
    """
    if adapter.keys() != expected.keys():
        raise PetalwiseError(f"The arms train other tensors: {sorted(adapter.keys() ^ expected.keys())[:3]}.")
    a, b = (torch.cat([values[name].flatten() for name in sorted(expected)]) for values in (adapter, expected))
    deviation = float((a - b).abs().max() / b.abs().max())
    if not deviation <= MAX_DEVIATION:
        raise PetalwiseError(f"The arms' final adapters differ by {deviation:.1e} of their largest element.")
