"""The server's arithmetic: the cases of :mod:`benchmarks.scale`, each in a process of its own."""

from benchmarks.scale import CASES, ROWS, in_own_process
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found, Table


def measure(repeats: int) -> Found:
    """Run the cases as often as asked; the table has all figures of the last run."""
    found = [{name: in_own_process(name) for name in CASES} for _ in range(repeats)]
    ratios = {
        f"server.{row.case}.{row.key}": Ratio.of((run[row.case][row.key] for run in found), row.aim, at_most=True)
        for row in ROWS
        if row.aim is not None
    }
    rows = [[case, key.replace("_", " "), f"{value:.3f}"] for case, v in found[-1].items() for key, value in v.items()]
    return Found(ratios, [Table("The server's arithmetic", ["case", "figure", "value"], rows)])
