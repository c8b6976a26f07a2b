"""Paired measurements: two actions in turn, one ratio a pair."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """A ratio, measured several times."""

    median: float
    """Over all pairs."""
    min: float
    """Lowest of all pairs."""
    max: float
    """Highest of all pairs."""
    pairs: int
    """How many pairs."""
    target: float | None = None
    """What was aimed at, if anything was."""
    at_most: bool = False
    """Whether the aim is an upper bound."""

    @staticmethod
    def of(values: Iterable[float], target: float | None = None, at_most: bool = False) -> "Ratio":
        """Summarise the ratios of single pairs, at least one."""
        found = list(values)
        return Ratio(statistics.median(found), min(found), max(found), len(found), target, at_most)

    @staticmethod
    def between(over: Sequence[float], under: Sequence[float], target: float | None = None) -> "Ratio":
        """Divide pair by pair.

        Parameters
        ----------
        over, under : Sequence[float]
            Numerators and denominators of the pairs, equally many.
        target : float, optional
            What is aimed at.
        """
        return Ratio.of((a / b for a, b in zip(over, under, strict=True)), target)

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.min:.3f} to {self.max:.3f})"


def in_turn(actions: Sequence[Callable[[], float]], pairs: int) -> list[list[float]]:
    """Take measurements in turn, every other time in reverse order, after once to warm up.

    Parameters
    ----------
    actions : Sequence[Callable]
        Each returns the seconds that it took.
    pairs : int
        How often each is measured.

    Returns
    -------
    list of list of float
        The seconds of each action, pair by pair.
    """
    for action in actions:
        action()
    found: list[list[float]] = [[] for _ in actions]
    for pair in range(pairs):
        order = range(len(actions)) if pair % 2 else reversed(range(len(actions)))
        for number in order:
            found[number].append(actions[number]())
    return found


def seconds_of(action: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Measure an action of one thread: on a CPU its processor time, to which other load adds little."""
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize(device)
    began = clock()
    action()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - began
