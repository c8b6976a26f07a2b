"""What a tracker is, and what it is told of a round."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from strategies.report import RoundReport


class Tracker(Protocol):
    """Follows one run."""

    def start(self, config: Mapping[str, Any], folder: Path) -> None:
        """Begin with a run, or go on with it if its folder was tracked before.

        Parameters
        ----------
        config : Mapping[str, Any]
            The composed config by key, nested keys joined by dots.
        folder : Path
            The run folder; its name is the run's.
        """
        ...

    def round(self, report: RoundReport) -> None:
        """Take in a finished round."""
        ...

    def end(self, finished: bool) -> None:
        """End, with a run that went through or failed."""
        ...


def tracked(report: RoundReport) -> dict[str, float]:
    """Return what is tracked of a round: the numbers that it has, by name."""
    values = {
        "central/accuracy": report.central.get("accuracy"),
        "central/loss": report.central.get("loss"),
        "clients/accuracy_mean": report.clients_accuracy_mean,
        "clients/accuracy_worst": report.clients_accuracy_worst,
        "clients/tuned_accuracy_mean": report.tuned_accuracy_mean,
        "clients/used": len(report.clients_used),
        "clients/dropped": len(report.clients_dropped),
        "train/loss": report.train_loss,
        "bytes/down": report.bytes_down,
        "bytes/up": report.bytes_up,
        **{f"seconds/{name}": value for name, value in report.seconds.items()},
    }
    return {name: float(value) for name, value in values.items() if value is not None}
