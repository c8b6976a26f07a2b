"""FedAvg: the mean of the clients' models, weighted by their numbers of examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from strategies.arithmetic import sample_weights, weighted_sum
from strategies.base import LayerwiseStrategy, StrategyConfig
from strategies.replies import Update


@dataclass
class FedAvgConfig(StrategyConfig):
    """Options of :class:`FedAvg`."""


class FedAvg(LayerwiseStrategy):
    """Federated averaging of adapter and head.

    References
    ----------
    McMahan, Moore, Ramage, Hampson, Agüera y Arcas, "Communication-Efficient Learning of Deep Networks from
    Decentralized Data", AISTATS 2017, Algorithm 1.
    """

    Config: ClassVar[type[StrategyConfig]] = FedAvgConfig

    def merge(self, server_round: int, updates: Sequence[Update]) -> torch.Tensor:
        """Return sum_i n_i / n x_i."""
        weights = sample_weights([update.num_examples for update in updates])
        return weighted_sum([update.flat for update in updates], weights)
