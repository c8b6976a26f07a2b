"""One clear line per round, and a table at the end."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from strategies.report import RoundReport


@dataclass
class Progress:
    """Formats round reports as aligned lines, with the change in accuracy and the time left."""

    num_rounds: int
    """Number of server rounds."""
    clients_evaluate: bool = False
    """Whether clients evaluate, in some rounds at least: then every line has a place for it."""
    _accuracy: float | None = field(default=None)
    _seconds: list[float] = field(default_factory=list)

    def line(self, report: RoundReport) -> str:
        """Format a report.

        Parameters
        ----------
        report : RoundReport
            Of the round just finished.

        Returns
        -------
        str
            Round, accuracies, loss, clients, traffic, seconds, ETA.
        """
        parts = [f"round {report.server_round:>{len(str(self.num_rounds))}}/{self.num_rounds}", self._central(report)]
        if report.server_round:
            if self.clients_evaluate:
                parts.append(f"clients' accuracy {_share(report.clients_accuracy_mean, complete=report.complete)}")
            loss = "      -" if report.train_loss is None else f"{report.train_loss:7.4f}"
            refused = f", {len(report.clients_refused)} refused" if report.clients_refused else ""
            parts += [f"train loss {loss}", f"clients {len(report.clients_used)}/{report.cohort}{refused}"]
            parts.append(f"{report.bytes_down / 1e6:.1f} MB down {report.bytes_up / 1e6:.1f} MB up")
            parts += [f"{report.seconds.get('total', 0.0):5.1f} s", f"ETA {self._eta(report)}"]
        return "  ".join(parts).rstrip()

    def _central(self, report: RoundReport) -> str:
        accuracy, before, change = report.central.get("accuracy"), self._accuracy, ""
        if accuracy is not None:
            change = "" if before is None else f"({100 * (accuracy - before):+5.1f})"
            self._accuracy = accuracy
        return f"accuracy {_share(accuracy, complete=report.complete or before is None)} {change:8}"

    def _eta(self, report: RoundReport) -> str:
        """Estimate the time left from the mean of the last three rounds."""
        self._seconds.append(report.seconds.get("total", 0.0))
        recent = self._seconds[-3:]
        left = round((self.num_rounds - report.server_round) * sum(recent) / len(recent))
        return f"{left // 60}:{left % 60:02d}"


def _share(accuracy: float | None, *, complete: bool) -> str:
    """Write an accuracy, or why there is none: inside a window the model is not complete."""
    if accuracy is None:
        return f"{'-':>5}  " if complete else f"{'window':>7}"
    return f"{100 * accuracy:5.1f} %"


def closing(reports: Sequence[RoundReport], folder: Path) -> str:
    """Sum up a run as a table.

    Parameters
    ----------
    reports : Sequence[RoundReport]
        Of all rounds, at least one.
    folder : Path
        The run folder.

    Returns
    -------
    str
        Accuracies, rounds, clients, traffic, time and folder, a line each; the first says how the run ended.
    """
    last, merged = reports[-1], [report for report in reports if report.merged]
    central = {r.server_round: r.central["accuracy"] for r in reports if "accuracy" in r.central}
    personal = {r.server_round: r.clients_accuracy_mean for r in reports if r.clients_accuracy_mean is not None}
    used = sum(len(report.clients_used) for report in reports)
    dropped = sum(len(report.clients_dropped) for report in reports)
    rows = {
        "accuracy": _course(central),
        "clients' accuracy": _course(personal),
        "rounds": f"{len(merged)} merged of {last.server_round}",
        "updates": f"{used} merged, {dropped} dropped",
        "traffic": f"{_megabytes(report.bytes_down for report in reports)} down, "
        f"{_megabytes(report.bytes_up for report in reports)} up",
        "time": f"{sum(report.seconds.get('total', 0.0) for report in reports if report.server_round):.1f} s in rounds",
        "run folder": str(folder),
    }
    head = f"Finished after {last.server_round} round{'' if last.server_round == 1 else 's'}."
    return "\n".join([head, *(f"  {name:<18} {value}" for name, value in rows.items() if value)])


def _megabytes(sizes: Iterable[int]) -> str:
    return f"{sum(sizes) / 1e6:.1f} MB"


def _course(accuracy: dict[int, float]) -> str:
    """Say where an accuracy began and ended, and where it was best."""
    if not accuracy:
        return ""
    first, last, best = min(accuracy), max(accuracy), max(accuracy.values())
    ended = f"{100 * accuracy[first]:.1f} % in round {first}, {100 * accuracy[last]:.1f} % in round {last}"
    if best in (accuracy[first], accuracy[last]):
        return ended
    return f"{ended} (best {100 * best:.1f} % in round {max(accuracy, key=lambda number: accuracy[number])})"
