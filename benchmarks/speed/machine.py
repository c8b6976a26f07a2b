"""What the figures were taken on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("flwr", "ray", "torch", "timm", "peft", "numpy")


def describe() -> dict[str, str]:
    """Describe processor, memory, software and how busy the machine is at this moment."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{gigabytes:.0f} GB",
        "system": f"{platform.system()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "load at the start": f"{os.getloadavg()[0]:.1f} (average of a minute; 0 is an idle machine)",
    }


def _processor() -> str:
    """Name the processor as Linux does, with its widest vector unit."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    unit = next((name for name in ("avx512f", "avx2", "avx") if f" {name} " in text), "")
    return ", ".join(filter(None, [names[0] if names else platform.processor(), unit]))
