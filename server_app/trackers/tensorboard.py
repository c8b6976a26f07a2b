"""TensorBoard: event files in ``tensorboard/`` of the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from server_app.trackers.tracker import tracked
from strategies.report import RoundReport


class TensorBoard:
    """Writes event files; a run that goes on adds a file, which TensorBoard shows as one."""

    _writer: SummaryWriter

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Open an event file and keep the config in it."""
        self._writer = SummaryWriter(str(folder / "tensorboard"))
        lines = [f"    {key}: {value}" for key, value in config.items()]
        self._writer.add_text("config", "\n".join(lines))

    def round(self, report: RoundReport) -> None:
        """Write the scalars of a round, to disk."""
        for name, value in tracked(report).items():
            self._writer.add_scalar(name, value, report.server_round)
        self._writer.flush()

    def end(self, finished: bool) -> None:
        """Close the event file."""
        self._writer.close()


def tracker(project: str) -> TensorBoard:
    """Make the tracker; TensorBoard knows folders instead of projects."""
    return TensorBoard()
