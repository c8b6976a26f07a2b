"""Checkpoints: what a run must know to go on, in one file per round, written in one go."""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from logging import WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from task.errors import StateError
from task.folders import reason_of

KEPT = 2
"""How many checkpoints of a run are kept: the last, and the one before it should that be damaged."""
MAX_FACTS = 64 << 20
"""Longest text that is read beside the tensors, in bytes."""
PACKAGES = ("petalwise", "flwr", "torch", "peft", "timm", "numpy")
"""Packages whose versions may decide about the last bit."""
_FACTS, _TENSOR, _PATTERN = "petalwise", "$tensor", "round-*.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A run after one of its rounds."""

    server_round: int
    """The round, from 1."""
    run: str
    """Name of the run, under which its clients keep things for it."""
    strategy: str
    """What ``strategy=`` was given."""
    config: str
    """Digest of the run's config."""
    metrics_bytes: int
    """Size of ``metrics.jsonl`` after the round."""
    versions: dict[str, str] = field(default_factory=dict)
    """Version by package, of :data:`PACKAGES`."""
    state: dict[str, Any] = field(default_factory=dict)
    """The strategy's ``state_dict()``."""


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that may decide about the last bit."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):  # the app may run from a bundle that is not installed
            found[name] = version(name)
    return found


class Checkpoints:
    """The checkpoints of one run.

    Parameters
    ----------
    folder : Path
        Where they lie; made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in one go and drop all but the last two.

        Raises
        ------
        StateError
            If it cannot be written; the ones before it are untouched then.
        """
        path = self.folder / f"round-{checkpoint.server_round:06d}.safetensors"
        part = path.with_suffix(".part")
        tensors: dict[str, Tensor] = {}
        facts = {item.name: getattr(checkpoint, item.name) for item in fields(checkpoint)}
        facts["state"] = _without_tensors(checkpoint.state, tensors)
        try:
            self.folder.mkdir(exist_ok=True)
            save_file(tensors, part, {_FACTS: json.dumps(facts)})
            _to_disk(part)
            os.replace(part, path)
            with suppress(OSError):  # some file systems cannot do that for folders
                _to_disk(self.folder)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise StateError(
                f"The checkpoint of round {checkpoint.server_round} cannot be written: {reason_of(error)}."
            ) from error
        for old in self._paths()[:-KEPT]:
            with suppress(OSError):
                old.unlink(missing_ok=True)

    def latest(self) -> Checkpoint | None:
        """Read the last checkpoint that can be read; None if there is none.

        Raises
        ------
        StateError
            If there are checkpoints and none of them can be read.
        """
        damaged: list[str] = []
        for path in reversed(self._paths()):
            try:
                found = read_checkpoint(path)
            except StateError as error:
                damaged.append(str(error))
                continue
            for problem in damaged:
                log(WARNING, "%s The one before it is taken.", problem)
            return found
        if damaged:
            raise StateError(" ".join(damaged))
        return None

    def forget_after(self, server_round: int) -> None:
        """Drop checkpoints of later rounds, which are about to be repeated."""
        for path in self._paths():
            if path.stem > f"round-{server_round:06d}":
                path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(_PATTERN))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Parameters
    ----------
    path : Path
        A file that :meth:`Checkpoints.save` wrote. Nothing in it is executed; sizes are safetensors' to check.

    Returns
    -------
    Checkpoint
        The checkpoint.

    Raises
    ------
    StateError
        If it is not such a file, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_FACTS, "")
            if len(text) > MAX_FACTS:
                raise StateError(f"The checkpoint {path.name} is damaged: its text is too long.")
            facts = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts["state"] = _with_tensors(facts["state"], tensors)
        return _checked(facts)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StateError(f"The checkpoint {path.name} is damaged or none of this app: {reason_of(error)}.") from error


def _checked(facts: Mapping[str, Any]) -> Checkpoint:
    """Make a checkpoint of what was read, after a look at every field's type."""
    blank = asdict(Checkpoint(1, "", "", "", 0))
    if facts.keys() != blank.keys():
        raise ValueError("its fields are others")
    for name, value in blank.items():
        if type(facts[name]) is not type(value):
            raise TypeError(f"{name} is {type(facts[name]).__name__}, not {type(value).__name__}")
    if facts["server_round"] < 1 or facts["metrics_bytes"] < 0:
        raise ValueError("its numbers are out of range")
    return Checkpoint(**facts)


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn a nested state into one of JSON, its tensors going into ``tensors`` under numbers."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = _apart(value, tensors.values())
        return {_TENSOR: name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value) or _TENSOR in value:
            raise TypeError(f"A state's keys must be strings other than {_TENSOR!r}, not {list(value)[:3]}.")
        return {key: _without_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_tensors(entry, tensors) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A state may hold tensors, numbers, strings, lists and dicts, not {type(value).__name__}.")


def _apart(tensor: Tensor, others: Iterable[Tensor]) -> Tensor:
    """Return a tensor that shares memory with no other, as a file wants it: a copy only where it does not yet."""
    plain = tensor.detach().cpu().contiguous()
    memory, taken = plain.untyped_storage(), {other.untyped_storage().data_ptr() for other in others}
    return plain if memory.nbytes() == plain.nbytes and memory.data_ptr() not in taken else plain.clone()


def _with_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo :func:`_without_tensors`."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _with_tensors(entry, tensors) for key, entry in value.items()}
    if isinstance(value, list):
        return [_with_tensors(entry, tensors) for entry in value]
    return value


def _to_disk(path: Path) -> None:
    """Have the system write a file, or a folder's list of files, to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
