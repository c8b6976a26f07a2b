"""The command ``python -m benchmarks.study STUDY.yaml``.

Runs what is missing of a study, shows its tables, and exits with 0, or with 1 if a cell failed or was refused, 2 if the
study itself cannot be run, 130 if interrupted. Finished cells are kept under ``runs/study/<name>/`` and not run again
unless their config has changed.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.study.ledger import Ledger
from benchmarks.study.results import CellResult
from benchmarks.study.runner import StudyRunner
from benchmarks.study.study import read_study
from benchmarks.study.table import study_tables
from task.errors import ConfigError, PetalwiseError
from tools.alone import alone, signals_interrupt
from tools.in_process import InProcessLink
from tools.results import Store
from tools.running import APP
from tools.simulation import SimulationSuperLink


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
        print("Interrupted; finished cells are kept, and the same command goes on.", file=sys.stderr)
        return 130


def _run(arguments: argparse.Namespace) -> int:
    study = read_study(arguments.study)
    if arguments.seeds:
        study = study.with_seeds(arguments.seeds)
    ledger = Ledger(study, Store(arguments.folder / study.name, CellResult))
    if arguments.table:
        print(study_tables(ledger))
        return 0
    for option in ("data", "backbones"):
        if (folder := getattr(arguments, option)) is not None and not folder.is_dir():
            raise ConfigError(f"--{option} {folder} is not a folder.")
    kind = InProcessLink if arguments.in_process else SimulationSuperLink
    open_link = partial(kind, data=arguments.data, backbones=arguments.backbones)
    with signals_interrupt(), alone(ledger.store.folder, "The study"):
        good = StudyRunner(ledger, open_link, arguments.only, arguments.time_limit).run()
    print(f"\n{study_tables(ledger)}")
    return 0 if good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="Run a study and show its tables.")
    add = parser.add_argument
    add("study", type=Path, help="a study file, such as benchmarks/studies/livar_cifar100.yaml")
    add("--data", type=Path, metavar="DIR", help="where the clients find data (PETALWISE_DATA)")
    add("--backbones", type=Path, metavar="DIR", help="where the clients find backbones (PETALWISE_BACKBONES)")
    add("--only", default="*", metavar="PATTERN", help="run cells whose key matches, such as 'beta0.2__livar*'")
    add("--seeds", type=int, nargs="+", metavar="N", help="other seeds than the study's")
    add("--in-process", action="store_true", help="without Ray and SuperLink: one thread, the same results")
    add("--time-limit", type=float, metavar="MINUTES", help="start no cell after so many minutes")
    add("--table", action="store_true", help="show the tables of what is finished, and run nothing")
    add("--folder", type=Path, default=APP / "runs" / "study", metavar="DIR", help="where results are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
