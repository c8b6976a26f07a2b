"""FFA-LoRA: A is fixed and shared, only B and the head are trained, sent and averaged."""

from dataclasses import dataclass
from typing import ClassVar

from strategies.fedavg import FedAvg
from strategies.options import StrategyConfig


@dataclass
class FfaLoraConfig(StrategyConfig):
    """Options of :class:`FfaLora`; its config sets ``lora.freeze_a`` as well."""


class FfaLora(FedAvg):
    """FedAvg over B alone, which makes the average of the products B A exact.

    References
    ----------
    Sun, Li, Li, Ding, "Improving LoRA in Privacy-preserving Federated Learning", ICLR 2024, arXiv 2403.12313.
    """

    Config: ClassVar[type[StrategyConfig]] = FfaLoraConfig
    freezes_a: ClassVar[bool] = True
