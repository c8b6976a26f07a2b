"""What the server does with every finished round: it is shown, recorded, and made safe."""

from dataclasses import dataclass, field
from logging import ERROR, INFO

from flwr.common.logger import log
from safetensors import SafetensorError

from server_app.checkpoints import Checkpoint, versions
from server_app.compose import ComposedRun
from server_app.progress import Progress
from server_app.resuming import config_digest, container
from server_app.run_folder import RunFolder
from server_app.trackers import Tracking
from strategies import LayerwiseStrategy
from strategies.report import RoundReport
from task.errors import StateError


@dataclass
class RoundKeeping:
    """Keeps the rounds of one run."""

    folder: RunFolder
    """Where."""
    run: ComposedRun
    """The run's config."""
    strategy: LayerwiseStrategy
    """The strategy that runs."""
    reports: list[RoundReport]
    """Reports of all rounds so far; those of a run that goes on are there from the beginning."""
    tracking: Tracking = field(default_factory=Tracking)
    """Who else is told."""
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        """Bring the progress line to where the run is."""
        evaluate = self.strategy.config.evaluate_clients != "off"
        self.progress = Progress(self.run.settings.num_server_rounds, evaluate)
        self._config = config_digest(container(self.run.yaml))
        self._versions = versions()
        for report in self.reports:
            self.progress.line(report)

    def note(self, report: RoundReport) -> None:
        """Keep a finished round; only then the checkpoint is written that counts it as done.

        A disk that is full does not end the run.
        """
        self.reports.append(report)
        try:
            self.folder.append(report)
            if self.run.settings.record_updates and report.merged:
                self.folder.record(report.server_round, self.strategy.received, self.strategy.updates)
            if report.server_round:
                self._checkpoint(report.server_round)
        except (OSError, SafetensorError, StateError) as error:
            log(
                ERROR,
                "Round %d is not kept (%s); a resume would go on from an earlier one.",
                report.server_round,
                error,
            )
        log(INFO, "%s", self.progress.line(report))
        self.tracking.round(report)

    def _checkpoint(self, server_round: int) -> None:
        checkpoint = Checkpoint(
            server_round=server_round,
            run=self.strategy.run,
            strategy=self.run.choice,
            config=self._config,
            metrics_bytes=self.folder.metrics.stat().st_size,
            versions=self._versions,
            state=self.strategy.state_dict(),
        )
        self.folder.checkpoints.save(checkpoint)
