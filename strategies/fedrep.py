"""FedRep: FedPer whose clients first fit their own head to the shared features, then the features to it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from strategies.fedper import FedPer
from strategies.options import StrategyConfig
from task.config import bounded
from task.messages import MAX_HEAD_EPOCHS, Instruction


@dataclass
class FedRepConfig(StrategyConfig):
    """Options of :class:`FedRep`."""

    head_epochs: int = bounded(5, at_least=0, at_most=MAX_HEAD_EPOCHS)
    """Epochs tau_h of the head alone, before ``train.local_epochs`` of the adapter alone; 0 is FedPer."""


class FedRep(FedPer):
    """Federated averaging of the adapter; in every round a client trains its head first, and the adapter for that head.

    References
    ----------
    Collins, Hassani, Mokhtari, Shakkottai, "Exploiting Shared Representations for Personalized Federated Learning",
    ICML 2021, arXiv 2102.07078, Algorithm 1.
    """

    Config: ClassVar[type[StrategyConfig]] = FedRepConfig
    config: FedRepConfig

    def instruction(self, server_round: int) -> Instruction:
        """Ask for the head's epochs."""
        return replace(super().instruction(server_round), head_epochs=self.config.head_epochs)

    def without_training(self, server_round: int) -> Instruction:
        """Ask for them as well where a client evaluates what tuning would bring."""
        return replace(super().without_training(server_round), head_epochs=self.config.head_epochs)
