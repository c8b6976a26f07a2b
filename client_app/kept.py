"""What a client keeps between rounds, in a folder of its own node."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from task.errors import MessageError, StateError
from task.folders import node_folder
from task.messages import NOT_KEPT

STATE_VARIABLE = "PETALWISE_STATE"
"""Existing folder for what clients keep between rounds, where the node config names none; by default
``petalwise/state`` in the user's cache (``XDG_CACHE_HOME``, ``~/.cache``)."""
DAYS_UNTOUCHED = 7
DIGEST_LENGTH = 32


def state_folder(node_config: Mapping[str, object]) -> Path:
    """Find where this node keeps its clients' state: ``state`` in its config, PETALWISE_STATE, or the user's cache.

    Raises
    ------
    DataError
        If a folder that is named does not exist.
    """
    named = node_folder(node_config, "state", STATE_VARIABLE)
    return named or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petalwise" / "state"


class Keeper:
    """Keep one client's state of one run: the last rounds, each written in one go.

    Parameters
    ----------
    folder : Path
        The node's folder for state; made when something is kept.
    run : str
        Name of the run, as the server gives it; never used as a path.
    client : str
        The client's identity.
    """

    def __init__(self, folder: Path, run: str, client: str) -> None:
        self._root = folder
        self._run = folder / _digest(run)
        self.folder = self._run / _digest(client)

    def save(self, server_round: int, tensors: Mapping[str, Tensor], start: int = 0) -> None:
        """Keep tensors after a round, and drop all rounds but this and the one that it started from.

        The server may ask to start there again, if this round does not count. Without ``start`` the last round before
        this one takes its place.

        Raises
        ------
        StateError
            If it cannot be written; what was there before is untouched.
        """
        path = self._path(server_round)
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            if not self._run.exists():
                _drop_old_runs(self._root)
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._run)
            save_file(dict(tensors), part)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise StateError(f"This client cannot keep its state of round {server_round}: {reason}.") from error
        for other in set(self._rounds()) - {server_round, start or self.last_before(server_round)}:
            self._path(other).unlink(missing_ok=True)

    def load(self, server_round: int, size: int) -> dict[str, Tensor]:
        """Read what was kept after a round.

        Parameters
        ----------
        server_round : int
            The round.
        size : int
            Number of values that the flat array has; all tensors have as many or are single numbers.

        Returns
        -------
        dict[str, Tensor]
            By name.

        Raises
        ------
        MessageError
            If it is not there, or cannot be used.
        """
        try:
            with safe_open(self._path(server_round), "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
                if any(shape not in ([], [size]) for shape in shapes.values()):
                    raise MessageError(f"What this client kept of round {server_round} is of another model.")
                return {name: file.get_tensor(name) for name in shapes}
        except FileNotFoundError:
            had = ", ".join(map(str, self._rounds())) or "none"
            raise MessageError(f"This client {NOT_KEPT} {server_round}; it has: {had}.") from None
        except (OSError, SafetensorError) as error:
            raise MessageError(f"What this client kept of round {server_round} cannot be read.") from error

    def last_before(self, server_round: int) -> int:
        """Find the last round before one of which something is kept; 0 for none."""
        return max((kept for kept in self._rounds() if kept < server_round), default=0)

    def clear(self, but: int = 0) -> None:
        """Drop everything kept for this client and run, except that of one round."""
        if self._path(but).exists():
            for other in set(self._rounds()) - {but}:
                self._path(other).unlink(missing_ok=True)
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # where other clients keep something still
            self._run.rmdir()

    def _path(self, server_round: int) -> Path:
        return self.folder / f"round-{server_round:06d}.safetensors"

    def _rounds(self) -> list[int]:
        names = [file.stem.removeprefix("round-") for file in self.folder.glob("round-*.safetensors")]
        return sorted(int(name) for name in names if name.isdecimal())


def _digest(name: str) -> str:
    """Turn a name into one that is safe as a file's."""
    return hashlib.sha256(json.dumps(name).encode()).hexdigest()[:DIGEST_LENGTH]


def _drop_old_runs(root: Path) -> None:
    """Remove what runs kept that nobody has touched for days."""
    before = time.time() - DAYS_UNTOUCHED * 86400
    for run in root.iterdir() if root.is_dir() else ():
        with suppress(OSError):  # another process may have removed it
            if run.is_dir() and len(run.name) == DIGEST_LENGTH and run.stat().st_mtime < before:
                shutil.rmtree(run, ignore_errors=True)
