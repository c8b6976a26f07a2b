"""The command ``python -m tools.sweep OVERRIDES``.

Hydra's sweeper makes jobs of the overrides; each is a real run. A table of all jobs is printed at the end. The command
exits with 0, or with 1 if a run failed or was refused, 2 if the sweep itself cannot be run, 130 if interrupted.
Finished runs are kept in the folder and not run again unless their config has changed.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from task.errors import ConfigError, PetalwiseError
from tools.alone import alone, signals_interrupt
from tools.in_process import InProcessLink
from tools.results import Store
from tools.running import Runner
from tools.simulation import SimulationSuperLink
from tools.sweep.jobs import JobResult, Sweep
from tools.sweep.multirun import multirun
from tools.sweep.table import sweep_table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except PetalwiseError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; finished runs are kept, and the same command goes on.", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    if arguments.clients < 1:
        raise ConfigError(f"A run needs at least 1 client, not {arguments.clients}.")
    for option in ("data", "backbones"):
        if (folder := getattr(arguments, option)) is not None and not folder.is_dir():
            raise ConfigError(f"--{option} {folder} is not a folder.")
    kind = InProcessLink if arguments.in_process else SimulationSuperLink
    runner = Runner(partial(kind, data=arguments.data, backbones=arguments.backbones))
    folder = arguments.folder.resolve()
    with signals_interrupt(), alone(folder, "A sweep in this folder"), runner:
        sweep = Sweep(runner, Store(folder, JobResult), arguments.clients)
        multirun(sweep.job, arguments.overrides, folder)
    print(f"\n{sweep_table(sweep.results)}")
    return 0 if all(result.finished for result in sweep.results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description="Run a sweep and show its table.")
    add = parser.add_argument
    add("overrides", nargs="+", help="Hydra overrides, such as strategy=fedavg,livar seed=1,2,3 train.lr=1e-3")
    add("--clients", type=int, default=10, metavar="N", help="number of simulated clients (default: 10)")
    add("--data", type=Path, metavar="DIR", help="where the clients find data (PETALWISE_DATA)")
    add("--backbones", type=Path, metavar="DIR", help="where the clients find backbones (PETALWISE_BACKBONES)")
    add("--in-process", action="store_true", help="without Ray and SuperLink: one thread, the same results")
    add("--folder", type=Path, default=Path("runs", "sweep"), metavar="DIR", help="where runs are kept (runs/sweep)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
