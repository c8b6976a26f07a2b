"""Find and end processes by a mark in their environment, whatever session or parent they have ended up with."""

import signal
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil

KILL_SECONDS = 10.0
"""How long killed processes may take to be gone."""


class MarkedProcesses:
    """The live processes that inherited one environment variable with one value.

    Parents and process groups do not tell whose a process is: Flower and Ray put their helpers in sessions of their
    own, and some outlive their parent.

    Parameters
    ----------
    name : str
        Name of the variable.
    value : str
        A value that nobody else uses, such as the path of a fresh folder.
    """

    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value

    def find(self) -> list[psutil.Process]:
        """Return those that live now."""
        return [p for p in psutil.process_iter(["environ"]) if (p.info["environ"] or {}).get(self.name) == self.value]

    def signal(self, number: int, command: str | None = None) -> int:
        """Send a signal to those that run `command`, or to all; return how many there were."""
        reached = 0
        for process in self.find():
            if command is None or _runs(process, command):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
                    reached += 1
        return reached

    def terminate(self, command: str) -> None:
        """Send SIGTERM to those that run `command`."""
        self.signal(signal.SIGTERM, command)

    def wait_gone(self, command: str, seconds: float) -> None:
        """Wait until none runs `command` any more, at most `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(_runs(process, command) for process in self.find()):
            time.sleep(0.2)

    def kill(self, *, without: Sequence[str] = ()) -> None:
        """Kill them, and those that they start meanwhile, save those that run one of the commands in `without`."""
        deadline = time.monotonic() + KILL_SECONDS
        while time.monotonic() < deadline:
            left = [process for process in self.find() if not any(_runs(process, command) for command in without)]
            if not left:
                return
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.1)


def _runs(process: psutil.Process, command: str) -> bool:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:  # it has just ended
        return False
    return any(word.rpartition("/")[2] == command for word in words[:2])  # after the interpreter for a script
