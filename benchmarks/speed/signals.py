"""What LIVAR's signals cost a client: rounds with and without them in turn, and their own code's share of a round."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.signals import AIM, Client
from benchmarks.speed.ratios import Ratio, in_turn, seconds_of
from benchmarks.speed.results import Found
from benchmarks.speed.settings import SETTINGS
from client_app.measuring import Recorder
from client_app.signals import FeatureTap, UpdateScores
from strategies.livar import Livar
from task.signals import NOTHING, SignalRequest

IMAGES, CLASSES, PAIRS = 80, 100, 3
OWN = (
    (Recorder, "__init__"),
    (Recorder, "after_forward"),
    (Recorder, "signals"),
    (FeatureTap, "_keep"),
    (UpdateScores, "_note_before"),
    (UpdateScores, "_note_after"),
)
"""All that measuring runs in a round."""


def measure(repeats: int) -> Found:
    """Measure a client's round in one thread, in the overhead-bound setting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        client, livar = Client(SETTINGS["overhead_bound"].compose().settings, IMAGES, CLASSES), Livar().request()
        plain, measured = in_turn([lambda: client.seconds(NOTHING), lambda: client.seconds(livar)], PAIRS * repeats)
        shares = [own_share(client, livar) for _ in range(PAIRS * repeats)]
    finally:
        torch.set_num_threads(threads)
    ratios = [b / a - 1 for a, b in zip(plain, measured, strict=True)]
    return Found(
        {
            "signals_overhead": Ratio.of(ratios, AIM, at_most=True),
            "signals_own_time": Ratio.of(shares, AIM, at_most=True),
        }
    )


def own_share(client: Client, request: SignalRequest) -> float:
    """Divide the seconds of the signals' own code by those of the rest of the same round."""
    with _timed(client.model.device) as taken:
        whole = client.seconds(request)
    return sum(taken) / (whole - sum(taken))


@contextmanager
def _timed(device: torch.device) -> Iterator[list[float]]:
    """Note the seconds of every call of :data:`OWN`, on a CPU of processor time."""
    taken: list[float] = []

    def noted(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            found: list[Any] = []
            taken.append(seconds_of(lambda: found.append(function(*arguments)), device))
            return found[0]

        return call

    with ExitStack() as patches:
        for owner, name in OWN:
            patches.enter_context(patch.object(owner, name, noted(getattr(owner, name))))
        yield taken
