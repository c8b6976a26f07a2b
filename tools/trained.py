"""What a run has learned, opened to be used: the model of all or of one client, and what its outputs and inputs are."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from yaml import YAMLError

from server_app.compose import RunSettings
from server_app.saving import open_adapter
from task.backbone import resolved
from task.config import first_line, typed
from task.errors import ConfigError, DataError
from task.libraries import peft


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A finished run, or one that was cut short after its first merge."""

    folder: Path
    """The run folder, absolute."""
    client: str
    """The client whose personal model it is; empty: the global model."""
    settings: RunSettings
    """Its config; image size, mean and deviation are filled in."""
    facts: dict[str, Any]
    """``adapter/petalwise.json``: ``base``, the hash of the frozen weights, ``classes`` and others."""
    model: peft.PeftModel
    """Backbone, adapter and head on the CPU, in evaluation mode."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes in order of the model's outputs."""
        return list(self.facts["classes"])


def open_run(folder: Path, backbones: Path | None = None, client: str = "") -> TrainedRun:
    """Open a run folder.

    Parameters
    ----------
    folder : Path
        The run folder, with ``config.yaml`` and ``adapter/``.
    backbones : Path, optional
        Folder of backbone files; default ``PETALWISE_BACKBONES``.
    client : str
        The client whose personal model it is to be; empty: the global model.

    Raises
    ------
    ConfigError
        If the folder is none of a run, nothing was merged in it, or there is no personal model of that client.
    DataError
        If something in it is damaged.
    ModelError
        If the backbone cannot be had, or is another than the run's.
    """
    folder = folder.expanduser().resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{str(folder)!r} is no run folder: it has no config.yaml.")
    if not (folder / "adapter" / "petalwise.json").is_file():
        raise ConfigError(f"{str(folder)!r} has no adapter: the run has not ended, or has merged nothing.")
    try:
        settings = typed(RunSettings, OmegaConf.load(folder / "config.yaml"))
        facts = json.loads((folder / "adapter" / "petalwise.json").read_text(encoding="utf-8"))
        model = open_adapter(folder, backbones, client)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"What {str(folder)!r} holds is damaged: {first_line(error)}.") from error
    settings.backbone = resolved(settings.backbone)
    return TrainedRun(folder, client, settings, facts, model)
