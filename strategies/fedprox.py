"""FedProx: FedAvg whose clients are held near the model they received."""

from dataclasses import dataclass, replace
from typing import ClassVar

from strategies.fedavg import FedAvg
from strategies.options import StrategyConfig
from task.config import bounded
from task.messages import Instruction


@dataclass
class FedProxConfig(StrategyConfig):
    """Options of :class:`FedProx`."""

    proximal_mu: float = bounded(0.01, at_least=0.0)
    """Weight mu of the proximal term; 0 is FedAvg."""


class FedProx(FedAvg):
    """FedAvg with the local objective F_i(w) + mu/2 ||w - w_t||^2.

    References
    ----------
    Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020,
    Algorithm 2.
    """

    Config: ClassVar[type[StrategyConfig]] = FedProxConfig
    config: FedProxConfig

    def instruction(self, server_round: int) -> Instruction:
        """Ask for the proximal term."""
        return replace(super().instruction(server_round), proximal_mu=self.config.proximal_mu)
