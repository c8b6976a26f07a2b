"""Flower strategies that merge adapters layer by layer, one paper per module."""

from strategies.base import LayerwiseStrategy, StrategyConfig
from strategies.context import TaskContext
from strategies.fedavg import FedAvg, FedAvgConfig
from strategies.fedprox import FedProx, FedProxConfig

STRATEGIES: dict[str, type[LayerwiseStrategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
}
"""Strategy classes by the name that ``strategy=`` takes."""

__all__ = [
    "STRATEGIES",
    "FedAvg",
    "FedAvgConfig",
    "FedProx",
    "FedProxConfig",
    "LayerwiseStrategy",
    "StrategyConfig",
    "TaskContext",
]
