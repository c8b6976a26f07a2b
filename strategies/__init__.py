"""Flower strategies that merge adapters layer by layer, one paper per module."""

from strategies.base import LayerwiseStrategy
from strategies.ccvr import Calibration, CalibrationConfig
from strategies.context import TaskContext
from strategies.fedavg import FedAvg, FedAvgConfig
from strategies.fedlama import FedLama, FedLamaConfig
from strategies.fedluar import FedLuar, FedLuarConfig
from strategies.fedper import FedPer, FedPerConfig, LocalOnly
from strategies.fedprox import FedProx, FedProxConfig
from strategies.fedrep import FedRep, FedRepConfig
from strategies.ffa_lora import FfaLora, FfaLoraConfig
from strategies.fisher import Fisher, FisherConfig
from strategies.livar import Livar, LivarConfig
from strategies.options import StrategyConfig
from strategies.pfedla import PFedLa, PFedLaConfig
from strategies.regmean import RegMean, RegMeanConfig
from strategies.schedule import Schedule, ScheduleConfig

STRATEGIES: dict[str, type[LayerwiseStrategy]] = {
    "fedavg": FedAvg,
    "fedper": FedPer,
    "fedprox": FedProx,
    "fedrep": FedRep,
    "ffa_lora": FfaLora,
    "fisher": Fisher,
    "livar": Livar,
    "local": LocalOnly,
    "pfedla": PFedLa,
    "regmean": RegMean,
}
"""Strategy classes by the name that ``strategy=`` takes."""

SCHEDULES: dict[str, type[Schedule]] = {"every_round": Schedule, "fedlama": FedLama, "fedluar": FedLuar}
"""Schedule classes by the name that ``schedule=`` takes; any goes with any strategy."""

__all__ = [
    "SCHEDULES",
    "STRATEGIES",
    "Calibration",
    "CalibrationConfig",
    "FedAvg",
    "FedAvgConfig",
    "FedLama",
    "FedLamaConfig",
    "FedLuar",
    "FedLuarConfig",
    "FedPer",
    "FedPerConfig",
    "FedProx",
    "FedProxConfig",
    "FedRep",
    "FedRepConfig",
    "FfaLora",
    "FfaLoraConfig",
    "Fisher",
    "FisherConfig",
    "LayerwiseStrategy",
    "Livar",
    "LivarConfig",
    "LocalOnly",
    "PFedLa",
    "PFedLaConfig",
    "RegMean",
    "RegMeanConfig",
    "Schedule",
    "ScheduleConfig",
    "StrategyConfig",
    "TaskContext",
]
