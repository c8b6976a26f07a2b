"""Run the app in simulation and tell the truth about it: ``python -m tools.launch [APP] [options]``.

``flwr run --stream`` exits with 0 even when the run fails and may return while it still goes on. This command starts a
SuperLink of its own, submits the app, copies the run's log to stdout, stops everything it started, and exits with

- 0 only if Flower says ``finished:completed``,
- 1 if the run failed, was stopped or lasted longer than ``--timeout``, with the reason on stderr,
- 2 if the run was refused, such as for a wrong name or value in its config,
- 128 plus the number of the signal that interrupted it.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from task.errors import ConfigError, PetalwiseError
from tools.check import check_run
from tools.simulation import RunOutcome, SimulationSuperLink

__all__ = ["RunOutcome", "SimulationSuperLink", "main", "run_app"]


def run_app(
    app: Path,
    *,
    data: Path | None = None,
    backbones: Path | None = None,
    keep: bool = False,
    **options: Any,
) -> RunOutcome:
    """Run `app` once on a SuperLink of its own.

    The parameters are those of :class:`SimulationSuperLink`, and `options` those of :meth:`SimulationSuperLink.run`,
    which see also for the errors. Use that class where several runs follow one another.

    Returns
    -------
    RunOutcome
        How the run ended, whether well or badly.
    """
    with SimulationSuperLink(data=data, backbones=backbones, keep=keep) as superlink:
        return superlink.run(app, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options, began = vars(_parser().parse_args(argv)), time.time()
    try:
        with _signals_raise():
            folders = {name: options[name] for name in ("runs_dir", "data", "backbones")}
            check_run(options["app"], options["run_config"], options["clients"], **folders)
            outcome = run_app(options.pop("app"), **options, output=sys.stdout)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except PetalwiseError as error:
        print(error, file=sys.stderr)
        return 1
    except _Interrupted as interrupt:
        stopped = f"Interrupted by {interrupt.signal.name}; everything that was started is stopped."
        print(stopped + _how_to_go_on(options["runs_dir"], began), file=sys.stderr)
        return 128 + interrupt.signal
    print(outcome.summary, file=sys.stdout if outcome.completed else sys.stderr)
    return 0 if outcome.completed else 1


def _how_to_go_on(runs_dir: Path, began: float) -> str:
    """Say how to go on with the run that was begun since; nothing where none was."""
    begun = [config for config in runs_dir.glob("*/config.yaml") if config.stat().st_mtime >= began]
    if not begun:
        return ""
    folder = max(begun, key=lambda config: config.stat().st_mtime).parent
    return f""" To go on, add -c 'resume="{folder.resolve()}"' to the command."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="petalwise", description="Run a Flower app in simulation, to its true end.")
    add = parser.add_argument
    add("app", nargs="?", type=Path, default=Path(), help="folder of the app's pyproject.toml (default: here)")
    add(
        "-c",
        "--run-config",
        action="append",
        default=[],
        help="""as in 'strategy="fedprox"'; may be repeated with other keys""",
    )
    add("--clients", type=int, default=10, metavar="N", help="number of simulated clients (default: 10)")
    add("--cpus-per-client", type=int, default=1, metavar="N", help="CPUs a working client takes (default: 1)")
    add("--gpus-per-client", type=float, default=0.0, metavar="SHARE", help="GPU share it takes (default: 0)")
    add("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="where results go (default: ./runs)")
    add("--data", type=Path, metavar="DIR", help="where the clients find data (PETALWISE_DATA)")
    add("--backbones", type=Path, metavar="DIR", help="where the clients find backbones (PETALWISE_BACKBONES)")
    add("--timeout", type=float, metavar="SECONDS", help="stop a run that lasts longer (default: never)")
    add("--keep", action="store_true", help="keep the SuperLink's log files and say where they are")
    return parser


class _Interrupted(BaseException):
    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal = signal.Signals(signum)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn the signals that ask to stop into an exception, so that what was started is stopped."""

    def interrupt(signum: int, _: FrameType | None) -> NoReturn:
        raise _Interrupted(signum)

    asked = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        asked.append(signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
