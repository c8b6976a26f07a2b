"""The command ``python -m benchmarks.study STUDY.yaml``.

Runs what is missing of a study, shows its tables, and exits with 0, or with 1 if a cell failed or was refused, 2 if the
study itself cannot be run, 130 if interrupted. Finished cells are kept under ``runs/study/<name>/`` and not run again
unless their config has changed.
"""

import argparse
import fcntl
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.study.in_process import InProcessLink
from benchmarks.study.ledger import Ledger
from benchmarks.study.results import Store
from benchmarks.study.runner import StudyRunner
from benchmarks.study.running import APP
from benchmarks.study.study import read_study
from benchmarks.study.table import study_tables
from task.errors import ConfigError, PetalwiseError
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
    ledger = Ledger(study, Store(arguments.folder / study.name))
    if arguments.table:
        print(study_tables(ledger))
        return 0
    for option in ("data", "backbones"):
        if (folder := getattr(arguments, option)) is not None and not folder.is_dir():
            raise ConfigError(f"--{option} {folder} is not a folder.")
    kind = InProcessLink if arguments.in_process else SimulationSuperLink
    open_link = partial(kind, data=arguments.data, backbones=arguments.backbones)
    with _signals_interrupt(), _alone(ledger.store.folder):
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


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let requests to stop end the study as Ctrl-C does, so that what was started is stopped."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a study's results for one process; two would delete each other's runs."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"The study is being run by another process: {folder / '.lock'} is locked.") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
