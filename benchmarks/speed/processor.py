"""Whose processor time a round is: that of clients, of the server, of Flower's own processes, of Ray's."""

import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from tools.processes import MarkedProcesses

POLL_SECONDS = 0.1
WORKERS, SERVER, FLOWER, RAY = "clients' processes", "the ServerApp and Flower's engine", "Flower's others", "Ray's own"
COMMANDS = {
    "ray::ClientAppActor": WORKERS,
    "flwr-simulation": SERVER,
    "flower-superlink": FLOWER,
    "flower-superexec": FLOWER,
    "flwr": FLOWER,
}
"""Who runs a command; all else that a run starts is Ray's."""


def owner(command: Sequence[str]) -> str:
    """Say whose process runs a command line."""
    for word in command[:2]:  # after the interpreter for a script
        for name, whose in COMMANDS.items():
            if word.rpartition("/")[2] == name or word.startswith(f"{name}."):
                return whose
    return RAY


def processor_seconds(processes: Iterable[psutil.Process]) -> dict[str, float]:
    """Sum the processor time that live processes have used, user's and system's, by whose they are."""
    found = dict.fromkeys((WORKERS, SERVER, FLOWER, RAY), 0.0)
    for process in processes:
        with suppress(psutil.Error):  # it has just ended
            times = process.cpu_times()
            found[owner(process.cmdline())] += times.user + times.system
    return found


def processor_seconds_here() -> dict[str, float]:
    """Sum the same for this process, as the server, and all below it, as clients."""
    this = psutil.Process()
    used = [sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True))]
    return {WORKERS: sum(used[1:]), SERVER: used[0]}


class RoundWatch:
    """Notes the processor time of a run's processes whenever a round has ended; use it in a ``with`` statement.

    Parameters
    ----------
    processes : MarkedProcesses
        Those of the run.
    runs_dir : Path
        Where the run's folder appears, the only one.
    """

    def __init__(self, processes: MarkedProcesses, runs_dir: Path) -> None:
        self._processes, self._runs_dir = processes, runs_dir
        self._noted: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            ended = sum(len(file.read_bytes().splitlines()) for file in self._runs_dir.glob("*/metrics.jsonl"))
            if ended > len(self._noted):
                found = processor_seconds(self._processes.find())
                self._noted += [found] * (ended - len(self._noted))

    def per_round(self) -> dict[str, float]:
        """Average the rounds between the first and the last; at the end of that one, processes may have gone."""
        first, last, rounds = self._noted[1], self._noted[-2], len(self._noted) - 3
        return {whose: (last[whose] - first[whose]) / rounds for whose in first}
