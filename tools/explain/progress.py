"""One clear line per record, and on a terminal the step at hand."""

import sys
from dataclasses import dataclass, field

from tools.explain.targets import Target


@dataclass
class LearningProgress:
    """Formats targets as aligned lines, with the change in loss and the time left."""

    labels: list[str]
    """Labels of all records."""
    to_learn: int
    """How many of them are not kept from before."""
    num_steps: int
    """Steps per record."""
    _lines: int = field(default=0)
    _seconds: list[float] = field(default_factory=list)

    def line(self, label: str, target: Target, seconds: float | None) -> str:
        """Format the target of a record.

        Parameters
        ----------
        label : str
            Label of the record.
        target : Target
            What was learned of it.
        seconds : float or None
            How long that took; None for a target kept from before.

        Returns
        -------
        str
            Number, record, clients, losses of uniform and learned weights, time, ETA.
        """
        self._lines += 1
        number = f"[{self._lines:>{len(str(len(self.labels)))}}/{len(self.labels)}]"
        parts = [f"{number} {label:<{max(map(len, self.labels))}}", f"{len(target.weights):>3} clients"]
        for part, name in enumerate(("loss", "held out")):
            before, after = target.losses["uniform"][part], target.losses["learned"][part]
            parts.append(f"{name} {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+5.1f} %)")
        if seconds is None:
            return "  ".join([*parts, "kept from before"])
        self._seconds.append(seconds)
        left = round((self.to_learn - len(self._seconds)) * sum(self._seconds) / len(self._seconds))
        return "  ".join([*parts, f"{seconds:6.1f} s", f"ETA {left // 60}:{left % 60:02d}"])

    def show_step(self, step: int) -> None:
        """Show the number of a finished step, if a person is looking."""
        if sys.stdout.isatty():
            shown = f"step {step}/{self.num_steps}"
            print(f"\r{shown}" if step < self.num_steps else "\r" + " " * len(shown) + "\r", end="", flush=True)
