"""MLflow: ``mlflow.db`` and ``mlruns/`` in the run folder, or the server that ``MLFLOW_TRACKING_URI`` names."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from server_app.trackers.tracker import tracked
from strategies.report import RoundReport


class MLflow:
    """Logs a run under its folder's name.

    Parameters
    ----------
    project : str
        Name of the experiment.
    """

    _client: MlflowClient
    _run: str

    def __init__(self, project: str) -> None:
        self._project = project

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Create the run with the config as parameters, or open it again."""
        own = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(own or f"sqlite:///{folder / 'mlflow.db'}")
        experiment = self._experiment(None if own else (folder / "mlruns").as_uri())
        earlier = self._client.search_runs([experiment], f"attributes.run_name = '{folder.name}'", max_results=1)
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in config.items()])

    def round(self, report: RoundReport) -> None:
        """Log the metrics of a round."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, report.server_round) for name, value in tracked(report).items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, finished: bool) -> None:
        """Set the run's status."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "FAILED")

    def _experiment(self, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(self._project)
        return str(found.experiment_id if found else self._client.create_experiment(self._project, artifacts))


def tracker(project: str) -> MLflow:
    """Make the tracker."""
    return MLflow(project)
