"""FedAvg: the mean of the clients' models, weighted by their numbers of examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from strategies.arithmetic import sample_weights, weighted_sum
from strategies.base import LayerwiseStrategy
from strategies.merging import same_for_all_layers
from strategies.options import StrategyConfig
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
    only_sums: ClassVar[bool] = True

    def merge(self, server_round: int, updates: Sequence[Update]) -> torch.Tensor:
        """Return sum_i n_i / n x_i."""
        vectors, weights = [u.flat for u in updates], sample_weights([u.num_examples for u in updates])
        merged = weighted_sum(vectors, weights)
        if self.context.lora_merge != "factors":
            self.merge_adapters(merged, vectors, same_for_all_layers(weights, self.codec.layout))
        return merged
