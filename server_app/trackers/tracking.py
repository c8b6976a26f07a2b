"""Tracking that cannot end a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from server_app.trackers.tracker import Tracker
from strategies.report import RoundReport
from task.config import bounded, first_line
from task.extras import require_extra

PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic"), "wandb": ("wandb",)}
"""What must be importable, by tracker; the app's extra and the module here have the tracker's name."""


@dataclass
class TrackerConfig:
    """Who else is told of the rounds."""

    name: str = bounded("none", choices=("none", *PACKAGES))
    """The tracker."""
    project: str = "petalwise"
    """MLflow's experiment, W&B's project."""


class Tracking:
    """A tracker, or none, whose first failure is logged and ends the tracking alone.

    Parameters
    ----------
    config : TrackerConfig, optional
        Which tracker; by default none.

    Raises
    ------
    ConfigError
        If its package is not installed, with the extra that has it.
    """

    def __init__(self, config: TrackerConfig | None = None) -> None:
        self._name = "none" if config is None else config.name
        self._tracker: Tracker | None = None
        if config is not None and config.name != "none":
            require_extra(config.name, PACKAGES[config.name])
            self._tracker = import_module(f"server_app.trackers.{config.name}").tracker(config.project)

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Begin with a run, or go on with it."""
        self._tell(lambda tracker: tracker.start(config, folder))

    def round(self, report: RoundReport) -> None:
        """Tell of a finished round."""
        self._tell(lambda tracker: tracker.round(report))

    def end(self, finished: bool) -> None:
        """Tell that the run is over."""
        self._tell(lambda tracker: tracker.end(finished))
        self._tracker = None

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            what(self._tracker)
        except Exception as error:  # whatever a client of another project raises
            log(WARNING, "The run is no longer tracked: %s: %s.", self._name, first_line(error).rstrip("."))
            self._tracker = None
