"""Flower strategies that merge adapters layer by layer, one paper per module."""

from strategies.base import LayerwiseStrategy, StrategyConfig
from strategies.ccvr import Calibration, CalibrationConfig
from strategies.context import TaskContext
from strategies.fedavg import FedAvg, FedAvgConfig
from strategies.fedprox import FedProx, FedProxConfig
from strategies.ffa_lora import FfaLora, FfaLoraConfig
from strategies.fisher import Fisher, FisherConfig
from strategies.livar import Livar, LivarConfig
from strategies.regmean import RegMean, RegMeanConfig

STRATEGIES: dict[str, type[LayerwiseStrategy]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "ffa_lora": FfaLora,
    "fisher": Fisher,
    "livar": Livar,
    "regmean": RegMean,
}
"""Strategy classes by the name that ``strategy=`` takes."""

__all__ = [
    "STRATEGIES",
    "Calibration",
    "CalibrationConfig",
    "FedAvg",
    "FedAvgConfig",
    "FedProx",
    "FedProxConfig",
    "FfaLora",
    "FfaLoraConfig",
    "Fisher",
    "FisherConfig",
    "LayerwiseStrategy",
    "Livar",
    "LivarConfig",
    "RegMean",
    "RegMeanConfig",
    "StrategyConfig",
    "TaskContext",
]
