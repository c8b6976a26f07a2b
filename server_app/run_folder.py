"""The folder that a run leaves behind: config, metrics per round, adapter."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from strategies.replies import Update
from strategies.report import RoundReport
from task.errors import ConfigError


class RunFolder:
    """A new folder ``<time>-<strategy>`` for one run.

    Parameters
    ----------
    parent : Path
        Folder of all runs; made if it is not there.
    strategy : str
        Name of the strategy.
    config : str
        The composed config as YAML, kept as ``config.yaml``.
    """

    def __init__(self, parent: Path, strategy: str, config: str) -> None:
        self.path = _new_folder(parent.expanduser().resolve(), f"{time.strftime('%Y%m%d-%H%M%S')}-{strategy}")
        (self.path / "config.yaml").write_text(config, encoding="utf-8")

    @property
    def metrics(self) -> Path:
        """One JSON object per round."""
        return self.path / "metrics.jsonl"

    @property
    def adapter(self) -> Path:
        """The trained adapter, as peft saves it."""
        return self.path / "adapter"

    def append(self, report: RoundReport) -> None:
        """Add a round to ``metrics.jsonl``."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(report.to_dict()), allow_nan=False) + "\n")

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


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
