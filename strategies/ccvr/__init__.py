"""CCVR: calibration of the head by virtual features."""

from strategies.ccvr.calibration import Calibration, CalibrationConfig, retrain_head
from strategies.ccvr.gaussians import Gaussian, draw, gaussians, pooled

__all__ = ["Calibration", "CalibrationConfig", "Gaussian", "draw", "gaussians", "pooled", "retrain_head"]
