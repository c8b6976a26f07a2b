"""Where to compute."""

import re

import torch

from task.errors import ConfigError

NODE_DEVICES = "auto, cpu, cuda, or one GPU of several, such as cuda:1"
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")


def is_device(wanted: str) -> bool:
    """Say whether this is the name of a device, there or not."""
    return _DEVICE.fullmatch(wanted) is not None


def choose_device(wanted: str) -> torch.device:
    """Choose the device for ``auto``, ``cpu``, ``cuda`` or, of several GPUs, such as ``cuda:1``.

    Raises
    ------
    ConfigError
        If a GPU is asked for that this process does not see.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= count:
        seen = {0: "no GPU", 1: "one GPU, cuda:0"}.get(count, f"{count} GPUs, cuda:0 to cuda:{count - 1}")
        raise ConfigError(
            f"The device is to be {wanted} (train.device, or device in the node config), but this process sees {seen}; "
            "set it to cpu or auto."
        )
    return device
