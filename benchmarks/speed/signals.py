"""What LIVAR's signals cost a client: its round with and without them, in turn."""

import torch

from benchmarks.signals import AIM, Client
from benchmarks.speed.ratios import Ratio, in_turn
from benchmarks.speed.results import Found
from benchmarks.speed.settings import SETTINGS
from strategies.livar import Livar
from task.signals import NOTHING

IMAGES, CLASSES, PAIRS = 80, 100, 3


def measure(repeats: int) -> Found:
    """Measure a client's round in one thread, in the overhead-bound setting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        client, livar = Client(SETTINGS["overhead_bound"].compose().settings, IMAGES, CLASSES), Livar().request()
        plain, measured = in_turn([lambda: client.seconds(NOTHING), lambda: client.seconds(livar)], PAIRS * repeats)
    finally:
        torch.set_num_threads(threads)
    ratios = [b / a - 1 for a, b in zip(plain, measured, strict=True)]
    return Found({"signals_overhead": Ratio.of(ratios, AIM, at_most=True)})
