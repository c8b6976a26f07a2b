"""Fisher-weighted merging: every element by how sure each client is of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from strategies.arithmetic import sample_weights
from strategies.base import LayerwiseStrategy
from strategies.options import StrategyConfig
from strategies.replies import Update
from task.config import bounded
from task.errors import MessageError
from task.signals import SignalRequest


@dataclass
class FisherConfig(StrategyConfig):
    """Options of :class:`Fisher`."""

    fisher_samples: int = bounded(64, at_least=1, at_most=1_000_000)
    """Images of each client on which its Fisher information is estimated, one backward pass each."""
    floor: float = bounded(1e-6, above=0.0)
    """Added to the Fisher information, so that elements of which nobody knows anything are merged by samples."""


class Fisher(LayerwiseStrategy):
    """Diagonal Fisher merging: theta = sum_i p_i F_i theta_i / sum_i p_i F_i, element by element.

    References
    ----------
    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 4, with lambda_i the
    client's share p_i of the samples.
    """

    Config: ClassVar[type[StrategyConfig]] = FisherConfig
    lora_merges: ClassVar[tuple[str, ...]] = ("factors",)
    config: FisherConfig

    def request(self) -> SignalRequest:
        """Ask for the diagonal of the Fisher information."""
        return SignalRequest(fisher_samples=self.config.fisher_samples)

    def check(self, update: Update) -> None:
        """Refuse a Fisher information that is negative or not finite."""
        fisher = update.signals["fisher"]
        if not bool((torch.isfinite(fisher) & (fisher >= 0)).all()):
            raise MessageError("its Fisher information is negative or not finite.")

    def merge(self, server_round: int, updates: Sequence[Update]) -> torch.Tensor:
        """Merge element by element; a single client's update is taken as it is."""
        if len(updates) == 1:
            return updates[0].flat.clone()
        numerator, denominator = torch.zeros_like(self.flat).double(), torch.zeros_like(self.flat).double()
        for update, share in zip(updates, sample_weights([u.num_examples for u in updates]), strict=True):
            weight = (update.signals["fisher"].double() + self.config.floor).mul_(share)
            numerator.addcmul_(weight, update.flat.double())
            denominator.add_(weight)
        return numerator.div_(denominator).float()
