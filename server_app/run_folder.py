"""The folder that a run leaves behind: config, metrics per round, checkpoints, adapter."""

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file

from server_app.checkpoints import Checkpoints
from strategies.replies import Update
from strategies.report import RoundReport
from task.errors import ConfigError, StateError

STATE = "state.json"


@dataclass
class State:
    """What a run is at, for those who watch it."""

    status: str = "running"
    """``running``, ``finished`` or ``failed``."""
    reason: str = ""
    """Why it failed, a sentence."""
    server_round: int = 0
    """Server round."""
    phase: str = ""
    """Flower's type of the messages that clients have been sent: ``train``, ``evaluate``, ``query.measure``, ..."""
    asked: int = 0
    """Number of clients that have been sent one."""
    answered: int = 0
    """Number of clients that have replied, well or badly."""


class RunFolder:
    """The folder of one run, which no other process writes to meanwhile.

    Parameters
    ----------
    path : Path
        A folder that is there.

    Raises
    ------
    ConfigError
        If another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock = _hold(path)

    @staticmethod
    def new(parent: Path, strategy: str, config: str) -> "RunFolder":
        """Make a folder ``<time>-<strategy>`` for a new run.

        Parameters
        ----------
        parent : Path
            Folder of all runs; made if it is not there.
        strategy : str
            Name of the strategy.
        config : str
            The composed config as YAML, kept as ``config.yaml``.
        """
        folder = RunFolder(_new_folder(parent.expanduser().resolve(), f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy}"))
        folder.write_config(config)
        return folder

    def release(self) -> None:
        """Let other processes have the folder."""
        self._lock.close()

    @property
    def config(self) -> Path:
        """The composed config as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per round."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as peft saves it."""
        return self.path / "adapter"

    def append(self, report: RoundReport) -> None:
        """Add a round to ``metrics.jsonl``.

        Raises
        ------
        OSError
            If it cannot be written; nothing of it is left then.
        """
        line = (json.dumps(_finite(report.to_dict()), allow_nan=False) + "\n").encode()
        with self.metrics.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(size)
                raise

    def reports(self, size: int) -> list[RoundReport]:
        """Read the first ``size`` bytes of ``metrics.jsonl`` and drop what is behind them.

        Raises
        ------
        StateError
            If there are fewer, or they are no reports.
        """
        try:
            if (there := self.metrics.stat().st_size) < size:
                raise ValueError(f"it has {there} bytes of {size}")
            with self.metrics.open("rb+") as file:
                kept = file.read(size)
                file.truncate(size)
            return [RoundReport(**json.loads(line)) for line in kept.decode().splitlines()]
        except (OSError, ValueError, TypeError) as error:
            raise StateError(f"{self.metrics.name} in {self.path.name} cannot be gone on with: {error}.") from error

    def write_config(self, config: str) -> None:
        """Write ``config.yaml`` in one go."""
        _replace(self.config, config)

    def note(self, state: State) -> None:
        """Write ``state.json``, what the run is at, in one go; a disk that is full is none of its business."""
        with suppress(OSError):
            _replace(self.path / STATE, json.dumps(asdict(state)))

    def record(self, server_round: int, received: torch.Tensor, updates: Sequence[Update]) -> None:
        """Keep a round's updates and signals as ``updates/round-<n>.safetensors``.

        Parameters
        ----------
        server_round : int
            Server round.
        received : Tensor, float32, [n]
            The model that clients started from, kept under ``received``.
        updates : Sequence[Update]
            Of the clients used: ``updates`` [clients, n], ``num-examples`` [clients], and every signal [clients, ...]
            under its name; the clients' names are in the file's metadata.
        """
        tensors = {"received": received, "updates": torch.stack([update.flat for update in updates])}
        tensors["num-examples"] = torch.tensor([update.num_examples for update in updates])
        tensors |= {name: torch.stack([u.signals[name] for u in updates]) for name in updates[0].signals}
        folder = self.path / "updates"
        folder.mkdir(exist_ok=True)
        metadata = {"clients": json.dumps([update.client for update in updates])}
        save_file(tensors, folder / f"round-{server_round:04d}.safetensors", metadata)


def read_state(folder: Path) -> State:
    """Read what a run is at from its folder; of a run that has not said it yet, or not in this form, a fresh state."""
    try:
        return State(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return State()


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader finds either the old text or the new one."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _new_folder(parent: Path, name: str) -> Path:
    """Make a folder of that name, or with a number behind it where one exists already."""
    for attempt in range(1, 1000):
        path = parent / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"runs_dir={str(parent)!r} cannot be written: {error.strerror}.") from error
        return path
    raise FileExistsError(f"{parent / name} and 998 more exist already.")


def _hold(path: Path) -> BinaryIO:
    """Lock a folder for as long as the returned file is open, which ends with the process at the latest."""
    try:
        lock = (path / ".lock").open("wb")
    except OSError as error:
        raise ConfigError(f"The run folder {path} cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"The run folder {path} belongs to a run that is still going on; stop that first.") from None
    except OSError:  # a file system without locks
        pass
    return lock


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
