"""What one run of an arm gave, and how processes of other kinds hand it over: a file of rounds, figures, an adapter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

ROUNDS = "metrics.jsonl"
"""In an arm's folder or one below, as the app has it: a line when a round ends, from round 0, before training, on."""
FIGURES, ADAPTER = "figures.json", "adapter.safetensors"


@dataclass(frozen=True)
class ArmRun:
    """What one run of an arm gave."""

    rounds: list[float]
    """Seconds of each measured round."""
    parts: dict[str, float]
    """Seconds of the parts of a measured round, mean."""
    adapter: dict[str, Tensor]
    """Adapter and head after the last round, by name; empty where nothing is trained."""
    cores: dict[str, float] = field(default_factory=dict)
    """How many cores a steady round keeps busy, by whose work it is; empty where that is not measured."""

    def write(self, folder: Path) -> None:
        """Leave all of it in a folder."""
        figures = {"rounds": self.rounds, "parts": self.parts, "cores": self.cores}
        (folder / FIGURES).write_text(json.dumps(figures), encoding="utf-8")
        save_file(self.adapter, folder / ADAPTER)

    @staticmethod
    def read(folder: Path) -> "ArmRun":
        """Read what was left there."""
        return ArmRun(adapter=load_file(folder / ADAPTER), **json.loads((folder / FIGURES).read_text(encoding="utf-8")))


def append_round(folder: Path, parts: Mapping[str, float]) -> None:
    """Say that a round has ended, and what its parts took."""
    with (folder / ROUNDS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(parts) + "\n")


def rounds_ended(folder: Path) -> tuple[int, float]:
    """Count the lines of rounds in an arm's folder; also return when the last was written, seconds since the epoch."""
    found = [*folder.glob(ROUNDS), *folder.glob(f"*/{ROUNDS}")]
    if not found:
        return 0, 0.0
    count = len(found[0].read_bytes().splitlines())
    return count, found[0].stat().st_mtime  # in this order: never that of the line before


def mean_of_each(taken: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the parts of several rounds; where one has them not, they are 0."""
    names = dict.fromkeys(name for parts in taken for name in parts)
    return {name: sum(parts.get(name, 0.0) for parts in taken) / len(taken) for name in names}
