"""What a command needs that makes many runs in one folder: to be alone there, and to stop what it started."""

import fcntl
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from task.errors import ConfigError


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Let requests to stop end the command as Ctrl-C does, so that what was started is stopped."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder of results for one process; two would delete each other's runs.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    what : str
        What is refused to be run by a second process, such as ``The study``.

    Raises
    ------
    ConfigError
        If another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{what} is being run by another process: {folder / '.lock'} is locked.") from None
        yield
