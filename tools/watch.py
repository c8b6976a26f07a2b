"""Follow a run's folder while it goes on: the rounds so far, and bars for the run and for the clients of the phase.

Run: ``python -m tools.watch runs/20261121-201530-livar``; the folder may be a copy that is synchronised from elsewhere.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server_app.run_folder import STATE, State, read_state
from task.errors import ConfigError, PetalwiseError
from tools.report.reading import Run, read_run

RUNS = Path("runs")
SHOWN_ROUNDS = 15
SECONDS = 0.5
"""Between two looks at the folder."""
SILENT_SECONDS = 60
"""After so long without a word it is said."""
PHASES = {
    "train": "training",
    "evaluate": "evaluating",
    "query.measure": "measuring",
    "query.identify": "saying who they are",
}

WAITING = {True: "", False: "window"}
"""Why a round has no accuracy: inside a window of FedLAMA the model is not complete."""


class Watched:
    """A run folder, whose rounds are read again only when they have changed.

    Parameters
    ----------
    folder : Path
        The run folder.

    Raises
    ------
    ConfigError
        If it is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()
        self._stamp: tuple[int, int] | None = None
        self._run = read_run(self.folder, self.folder.name)

    @property
    def run(self) -> Run:
        """Its config and rounds so far."""
        try:
            found = (self.folder / "metrics.jsonl").stat()
        except FileNotFoundError:
            return self._run
        stamp = (found.st_size, found.st_mtime_ns)
        if stamp != self._stamp:
            self._stamp, self._run = stamp, read_run(self.folder, self.folder.name)
        return self._run

    @property
    def state(self) -> State:
        """What it is at; a run that does not say so has ended when all its rounds are there."""
        state, rounds = read_state(self.folder), self.run.reports
        if state == State() and rounds and rounds[-1].server_round == self.run.options.get("num_server_rounds"):
            return State("finished", server_round=rounds[-1].server_round)
        return state

    @property
    def written(self) -> float:
        """When anything was last written, seconds since the epoch."""
        names = ("config.yaml", "metrics.jsonl", STATE)  # the first is there, or this would be no run folder
        return max(path.stat().st_mtime for name in names if (path := self.folder / name).exists())


def picture(watched: Watched) -> RenderableType:
    """Show a run as lines and bars.

    Parameters
    ----------
    watched : Watched
        The run.

    Returns
    -------
    RenderableType
        For a console of rich.
    """
    run, state = watched.run, watched.state
    options, num_rounds = run.options, int(run.options.get("num_server_rounds", 0))
    title = ", ".join(str(options.get(key, "?")) for key in ("strategy.name", "backbone.name", "dataset.name"))
    notes = [] if state.status == "running" else [Text(note, style="yellow") for note in run.notes]
    head = Text(f"{run.name}: {title}", style="bold")
    return Group(head, _rounds(run), *notes, _bars(run, state, num_rounds), _ending(watched))


def _rounds(run: Run) -> Table:
    """Show the last rounds, a line each."""
    table = Table(box=None, pad_edge=False)
    for heading in ("round", "accuracy", "change", "clients'", "loss", "used", "MB down", "up", "seconds"):
        table.add_column(heading, justify="right")
    before: float | None = None
    rows = []
    for report in run.reports:
        accuracy = report.central.get("accuracy")
        change = "" if accuracy is None or before is None else f"{100 * (accuracy - before):+.1f}"
        before = before if accuracy is None else accuracy
        loss = "" if report.train_loss is None else f"{report.train_loss:.4f}"
        used = f"{len(report.clients_used)}/{report.cohort}" if report.server_round else ""
        megabytes = [f"{size / 1e6:.1f}" for size in (report.bytes_down, report.bytes_up)]
        waiting = "" if before is None else WAITING[report.complete]
        shares = [_percent(accuracy) or waiting, change, _percent(report.clients_accuracy_mean)]
        rows.append(
            [str(report.server_round), *shares, loss, used, *megabytes, f"{report.seconds.get('total', 0):.1f}"]
        )
    for row in rows[-SHOWN_ROUNDS:]:
        table.add_row(*row)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _bars(run: Run, state: State, num_rounds: int) -> RenderableType:
    """One bar for the rounds, one for the replies of the phase that is going on."""
    done = max((report.server_round for report in run.reports), default=0)
    grid = Table.grid(padding=(0, 1))
    grid.add_row("rounds", ProgressBar(max(1, num_rounds), done, width=40), f"{done}/{num_rounds}")
    if state.status == "running" and state.asked:
        doing = PHASES.get(state.phase, state.phase)
        count = f"{state.answered}/{state.asked} in round {state.server_round}"
        grid.add_row(f"clients {doing}", ProgressBar(state.asked, state.answered, width=40), count)
    return grid


def _ending(watched: Watched) -> Text:
    state, silent = watched.state, time.time() - watched.written
    if state.status == "failed":
        return Text(f"failed in round {state.server_round}: {state.reason}", style="red")
    if state.status == "finished":
        return Text("finished", style="green")
    return Text(f"nothing new for {silent:.0f} s" if silent > SILENT_SECONDS else "", style="yellow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and follow the run until it ends; the exit code is 1 if it failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the run folder; by default the newest one in runs/")
    parser.add_argument("--once", action="store_true", help="show how things stand, and end")
    given = parser.parse_args(arguments)
    console = Console()
    try:
        watched = Watched(given.run or (newest(RUNS) if given.once else _awaited(console)))
        if given.once:
            console.print(picture(watched))
        else:
            _follow(watched, console)
    except PetalwiseError as error:
        print(f"Nothing to watch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return int(watched.state.status == "failed")


def newest(runs: Path) -> Path:
    """Find the run folder that was begun last.

    Raises
    ------
    ConfigError
        If there is none.
    """
    folders = [path.parent for path in runs.glob("*/config.yaml")]
    if not folders:
        raise ConfigError(f"There is no run in {str(runs)!r}; say which folder to watch.")
    return max(folders, key=lambda folder: folder.stat().st_ctime_ns)


def _awaited(console: Console) -> Path:
    """Wait for the first run to begin."""
    with console.status(f"No run in {RUNS}/ yet; waiting for one."):
        while not any(RUNS.glob("*/config.yaml")):
            time.sleep(SECONDS)
    return newest(RUNS)


def _follow(watched: Watched, console: Console) -> None:
    with Live(picture(watched), console=console, auto_refresh=False) as live:
        while watched.state.status == "running":
            time.sleep(SECONDS)
            live.update(picture(watched), refresh=True)
        live.update(picture(watched), refresh=True)


if __name__ == "__main__":
    sys.exit(main())
