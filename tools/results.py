"""What is kept of a run: one JSON file, and its run folder."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Generic, TypeVar

from task.errors import ConfigError

FINISHED = "finished"
FAILED = "failed"
REFUSED = "refused"


@dataclass(kw_only=True)
class RunResult:
    """How a run ended. ``cells/<key>.json`` has these fields."""

    key: str
    """Name of its files."""
    seed: int
    """Seed of the run."""
    clients: int
    """Number of simulated clients."""
    config: dict[str, Any]
    """The composed config; another config or number of clients makes it another run."""
    status: str
    """``finished``; ``refused``: the app said before training why it cannot run, as where a partition leaves a client
    too few images; ``failed``: anything else."""
    reason: str = ""
    """Why it did not finish."""
    accuracy: dict[str, float] = field(default_factory=dict)
    """Accuracy in [0, 1] on the server's test images by round, in rounds with an evaluation."""
    final: float | None = None
    """The last of these."""
    best: float | None = None
    """The highest of these."""
    clients_accuracy: dict[str, float] = field(default_factory=dict)
    """Final accuracy by client on its own test images."""
    clients_mean: float | None = None
    """Mean of these over clients, unweighted."""
    clients_worst: float | None = None
    """Lowest of these."""
    clients_deviation: float | None = None
    """Standard deviation of these over clients (divided by their number)."""
    tuned_accuracy: dict[str, float] = field(default_factory=dict)
    """Accuracy by client after a further round of its own training, where that was evaluated."""
    tuned_mean: float | None = None
    """Mean of these over clients, unweighted."""
    tuned_worst: float | None = None
    """Lowest of these."""
    tuned_deviation: float | None = None
    """Standard deviation of these over clients."""
    lengthened_share: float | None = None
    """FedLAMA's lambda*: share of the values whose units waited longer, mean over the windows that were chosen so."""
    dropped: int = 0
    """Replies that did not count, and clients that were refused, over all rounds."""
    rounds: int = 0
    """Rounds of training."""
    bytes_down: int = 0
    """Bytes of message contents sent to clients in the rounds of training."""
    bytes_up: int = 0
    """Bytes of message contents received from clients in the rounds of training."""
    round_seconds: float | None = None
    """Mean duration of a round of training, evaluation included."""
    seconds: float = 0.0
    """Duration of the run from its submission to its end."""
    commit: str = ""
    """Git commit of the checkout at the start of the run."""
    dirty: bool = False
    """Whether files of the app differed from that commit."""

    @property
    def finished(self) -> bool:
        """Whether the run went through to its end."""
        return self.status == FINISHED


R = TypeVar("R", bound=RunResult)


class Store(Generic[R]):
    """A folder of results.

    Parameters
    ----------
    folder : Path
        Is made when something is written.
    kind : type
        The results that it holds.
    """

    def __init__(self, folder: Path, kind: type[R]) -> None:
        self.folder = folder
        self._kind = kind

    def read(self, key: str) -> R | None:
        """Return what is kept of a run, if anything is.

        Raises
        ------
        ConfigError
            If the file is damaged.
        """
        path = self._file(key)
        if not path.exists():
            return None
        try:
            return self._kind(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} is not the result of a run ({error}); delete it to run that again.") from error

    def write(self, result: R) -> None:
        """Keep a result in place of an earlier one; an interrupt leaves the one or the other whole."""
        path = self._file(result.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    def new_runs_dir(self, key: str) -> Path:
        """Return an empty folder for a run; an earlier run of the same key is deleted."""
        folder = self.folder / "runs" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _file(self, key: str) -> Path:
        return self.folder / "cells" / f"{key}.json"


def run_folder_in(runs_dir: Path) -> Path | None:
    """Return the folder that a run has left in its ``runs-dir``, if it came so far."""
    return next((path for path in runs_dir.iterdir() if (path / "config.yaml").exists()), None)


def measured(metrics: Path) -> dict[str, Any]:
    """Read what a run has measured.

    Parameters
    ----------
    metrics : Path
        The ``metrics.jsonl`` of a completed run.

    Returns
    -------
    dict
        Fields of a :class:`RunResult` with their values.
    """
    reports = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    accuracy = {str(r["server_round"]): r["central"]["accuracy"] for r in reports if "accuracy" in r["central"]}
    trained = [report for report in reports if report["server_round"] > 0]
    last = reports[-1]
    return {
        "accuracy": accuracy,
        "final": accuracy.get(str(last["server_round"])),
        "best": max(accuracy.values(), default=None),
        "clients_accuracy": last["clients_accuracy"],
        "clients_mean": last["clients_accuracy_mean"],
        "clients_worst": last["clients_accuracy_worst"],
        "clients_deviation": last["clients_accuracy_deviation"],
        "tuned_accuracy": last["tuned_accuracy"],
        "tuned_mean": last["tuned_accuracy_mean"],
        "tuned_worst": last["tuned_accuracy_worst"],
        "tuned_deviation": last["tuned_accuracy_deviation"],
        "lengthened_share": _lengthened_share(trained[:-1]),
        "dropped": sum(len(report["clients_dropped"]) for report in reports) + len(last["clients_refused"]),
        "rounds": len(trained),
        "bytes_down": sum(report["bytes_down"] for report in trained),
        "bytes_up": sum(report["bytes_up"] for report in trained),
        "round_seconds": mean(report["seconds"]["total"] for report in trained),
    }


def _lengthened_share(reports: Sequence[dict[str, Any]]) -> float | None:
    """Average what the schedule chose in these rounds; the choice of a run's last round is never used."""
    chosen = [report["details"].get("schedule", {}).get("lengthened_share") for report in reports]
    shares = [share for share in chosen if share is not None]
    return mean(shares) if shares else None
