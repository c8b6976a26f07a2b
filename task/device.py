"""Where to compute."""

import torch

from task.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """Choose the device for ``auto``, ``cpu`` or ``cuda``.

    Raises
    ------
    ConfigError
        If a GPU is asked for and this process sees none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("train.device=cuda, but this process sees no GPU; set train.device=cpu or auto.")
    return torch.device("cuda" if wanted != "cpu" and available else "cpu")
