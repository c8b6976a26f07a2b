"""Whose work keeps the cores busy in a round: clients', the server's, that of Flower's own processes, of Ray's."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.speed.arm_run import rounds_ended
from tools.processes import MarkedProcesses

POLL_SECONDS = 0.1
WORKERS, SERVER, FLOWER, RAY = (
    "clients' processes",
    "the server's process, with Flower's engine",
    "Flower's others",
    "Ray's own",
)
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


@dataclass
class ProcessorTime:
    """Processor time, user's and system's, added up by whose it is, as it is noted from time to time.

    A process that has ended since the last note keeps what was noted of it.
    """

    used: dict[str, float] = field(default_factory=lambda: dict.fromkeys((WORKERS, SERVER, FLOWER, RAY), 0.0))
    """Seconds."""
    _seen: dict[psutil.Process, float] = field(default_factory=dict)

    def note(self, processes: Iterable[psutil.Process], whose: str | None = None) -> dict[str, float]:
        """Add what processes have used since the last note; return the sums, and the time under ``clock``."""
        for process in processes:
            with suppress(psutil.Error):  # it has just ended
                times = process.cpu_times()
                seconds = times.user + times.system
                self.used[whose or owner(process.cmdline())] += seconds - self._seen.get(process, 0.0)
                self._seen[process] = seconds
        return {**self.used, "clock": time.monotonic()}

    def note_here(self) -> dict[str, float]:
        """Do so for this process, as the server, and for those that it has made by multiprocessing, as clients."""
        self.note([psutil.Process()], SERVER)
        return self.note([psutil.Process(child.pid) for child in multiprocessing.active_children()], WORKERS)


def cores_used(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
    """Divide what was used between two notes by the time between them: how many cores were busy, by whose work."""
    seconds = last["clock"] - first["clock"]
    return {whose: (last[whose] - first[whose]) / seconds for whose in first if whose != "clock"}


def num_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0))


class RoundWatch:
    """Notes the processor time of a run's processes when two of its rounds end; use it in a ``with`` statement.

    Parameters
    ----------
    processes : MarkedProcesses
        Those of the run.
    runs_dir : Path
        Where the run's folder appears, the only one.
    rounds : Sequence[int]
        After which to note, ascending; not after the last of the run, where processes may have gone.
    """

    def __init__(self, processes: MarkedProcesses, runs_dir: Path, rounds: Sequence[int]) -> None:
        self._processes, self._runs_dir, self._rounds = processes, runs_dir, rounds
        self._stop, self._pool = threading.Event(), ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        self._watching = self._pool.submit(self._watch)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown()
        self._noted = self._watching.result()

    def _watch(self) -> list[dict[str, float]]:
        spent, noted = ProcessorTime(), list[dict[str, float]]()
        while len(noted) < len(self._rounds) and not self._stop.wait(POLL_SECONDS):
            if rounds_ended(self._runs_dir)[0] > self._rounds[len(noted)]:  # the first is of round 0
                noted.append(spent.note(self._processes.find()))
        return noted

    def cores_used(self) -> dict[str, float]:
        """Average from the first note to the last."""
        return cores_used(self._noted[0], self._noted[-1])
