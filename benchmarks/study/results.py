"""What is kept of a cell."""

from dataclasses import dataclass
from typing import Any

from tools.results import RunResult


@dataclass(kw_only=True)
class CellResult(RunResult):
    """How the run of a cell ended."""

    setting: str
    """Name of the setting."""
    method: str
    """Name of the method."""
    values: dict[str, Any]
    """Values of the tuned options."""
