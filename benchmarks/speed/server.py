"""The server's arithmetic: the cases of :mod:`benchmarks.scale`, each in a process of its own."""

from benchmarks.scale import CASES, in_own_process
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table

READINGS = 1.5
"""Time of averaging, by the time of reading the adapters once: at most that."""


def measure(repeats: int) -> Found:
    """Run the cases as often as asked; the table has the medians' case, the last run."""
    found = [{name: in_own_process(name) for name in CASES} for _ in range(repeats)]
    name = "aggregation_100_vit_b_r16"
    ratios = {"aggregation_by_reading_once": Ratio.of([run[name]["by_reading_once"] for run in found], READINGS, True)}
    rows = [[case, key.replace("_", " "), f"{value:.3f}"] for case, v in found[-1].items() for key, value in v.items()]
    return Found(ratios, [Table("The server's arithmetic", ["case", "figure", "value"], rows)])
