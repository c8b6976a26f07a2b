"""FedPer: the head stays with each client; and its limit, in which everything does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from strategies.arithmetic import sample_weights, weighted_sum
from strategies.keeping import KeepingStrategy
from strategies.merging import same_for_all_layers
from strategies.options import StrategyConfig
from strategies.replies import Update
from task.exchange import Exchange
from task.units import HEAD


@dataclass
class FedPerConfig(StrategyConfig):
    """Options of :class:`FedPer` and :class:`LocalOnly`."""


class FedPer(KeepingStrategy):
    """Federated averaging of the adapter; every client trains and keeps a head of its own.

    The global model has the initial head, so that its accuracy on the server says nothing.

    References
    ----------
    Arivazhagan, Aggarwal, Singh, Choudhary, "Federated Learning with Personalization Layers", arXiv 1912.00818.
    """

    Config: ClassVar[type[StrategyConfig]] = FedPerConfig
    lora_merges: ClassVar[tuple[str, ...]] = ("factors", "product_svd")

    @property
    def shared(self) -> tuple[str, ...]:
        """Units that are averaged."""
        return tuple(unit for unit in self.codec.layout.units if unit != HEAD)

    def exchange(self, server_round: int, client: str) -> Exchange:
        """Let shared units travel; a client's first round starts from the whole initial model."""
        start = self.last_round.get(client, 0)
        return Exchange(down=self.shared if start else None, up=self.shared, start=start, keep=True)

    def exchange_without_training(self, client: str) -> Exchange:
        """Send the shared units, to go with the client's own."""
        start = self.last_round.get(client, 0)
        return Exchange(down=self.shared if start else None, start=start)

    def merge(self, server_round: int, updates: Sequence[Update]) -> Tensor:
        """Average the shared units by numbers of examples, their adapters as ``lora.merge`` says."""
        vectors, weights = [u.flat for u in updates], sample_weights([u.num_examples for u in updates])
        merged = self.flat.clone()
        for unit in self.shared:
            part = self.codec.layout.slices[unit]
            merged[part] = weighted_sum([vector[part] for vector in vectors], weights)
        if self.context.lora_merge != "factors":
            self.merge_adapters(merged, vectors, same_for_all_layers(weights, self.codec.layout))
        return merged


class LocalOnly(FedPer):
    """Every client trains alone, from the common initial model: what federation is to be better than."""

    lora_merges: ClassVar[tuple[str, ...]] = ("factors",)

    @property
    def shared(self) -> tuple[str, ...]:
        """Nothing is averaged."""
        return ()
