"""Measure how fast the app is, and write docs/results/speed.md and runs/bench/speed.json.

Run: ``python -m benchmarks.speed`` (``--only CASE``, ``--repeats N``). Every figure is a ratio of two measurements
taken in turn, or in slices of time, in one run; other load on the machine widens its spread.
Cases not run keep the figures that the JSON file has of them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.speed import computing, deployed, growth, machine, server, signals, simulation, startup, step
from benchmarks.speed.results import Found, write
from task.errors import PetalwiseError
from tools.alone import signals_interrupt

REPOSITORY = Path(__file__).resolve().parents[2]
CASES: dict[str, Callable[[int], Found]] = {
    "step": step.measure,
    "computing": computing.measure,
    "signals": signals.measure,
    "server": server.measure,
    "simulation": simulation.measure,
    "deployed": deployed.measure,
    "startup": startup.measure,
    "growth": growth.measure,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases asked for; return the process's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=2, help="repetitions of every pair of runs (default: 2)")
    parser.add_argument("--json", type=Path, default=REPOSITORY / "runs" / "bench" / "speed.json", metavar="FILE")
    parser.add_argument("--markdown", type=Path, default=REPOSITORY / "docs" / "results" / "speed.md", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {arguments.repeats}")
    try:
        with signals_interrupt():
            for case in arguments.only:
                described = machine.describe()
                found = CASES[case](arguments.repeats)
                write(arguments.json, arguments.markdown, case, found, described, CASES)
                for key, ratio in found.ratios.items():
                    print(f"{key}: {ratio}, {ratio.pairs} pairs", flush=True)
    except PetalwiseError as error:
        print(f"The benchmark stops: {error}", file=sys.stderr)
        return 1
    print(f"Written: {arguments.json}, {arguments.markdown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
