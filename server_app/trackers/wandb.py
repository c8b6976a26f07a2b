"""Weights & Biases: ``wandb/`` in the run folder, offline unless ``WANDB_MODE`` says otherwise."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from server_app.trackers.tracker import tracked
from strategies.report import RoundReport


class WandB:
    """Logs a run under its folder's name; parts of a run that went on have one id, under which they are synced.

    Parameters
    ----------
    project : str
        Name of the project.
    """

    _run: wandb.Run

    def __init__(self, project: str) -> None:
        self._project = project

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Open the run with the config."""
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project=self._project,
            name=folder.name,
            id=folder.name,
            dir=folder,
            config=dict(config),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def round(self, report: RoundReport) -> None:
        """Log the metrics of a round."""
        self._run.log(tracked(report), step=report.server_round)

    def end(self, finished: bool) -> None:
        """Close the run with an exit code."""
        self._run.finish(exit_code=0 if finished else 1)


def tracker(project: str) -> WandB:
    """Make the tracker."""
    return WandB(project)
