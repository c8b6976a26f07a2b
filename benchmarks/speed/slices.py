"""Runs of several arms that have the machine in turn, some seconds each.

Other machines on the same host make this one slower or faster for minutes, by as much as a quarter. Arms that run one
after another meet other such times; in slices they meet the same. The processes of those whose turn it is not are
stopped, and their clock with them.
"""

import signal
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.speed.arm_run import ArmRun, rounds_ended
from benchmarks.speed.arms import Arm
from benchmarks.speed.settings import Setting
from task.errors import PetalwiseError
from tools.processes import MarkedProcesses

SLICE_SECONDS = 3.0
"""Short beside such times; long beside Flower's waits of a tenth of a second, of which one under way when a slice ends
costs its arm nothing: where they are a seventh of a round, that is 0.2 % of it."""
POLL_SECONDS = 0.02
FIRST = 1
"""The round in which models are built; it is not measured."""


@dataclass
class SlicedRun:
    """One arm's run, and the slices of time that it has had."""

    processes: MarkedProcesses
    """Those of the arm."""
    folder: Path
    """Where it says that rounds have ended."""
    future: Future[ArmRun]
    """What becomes of it."""
    slices: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of each, seconds since the epoch."""
    ends: list[float] = field(default_factory=list)
    """When each round ended, from round 0 on."""

    def have(self, seconds: float) -> None:
        """Let its processes go for so long, or until the run has ended."""
        self.processes.signal(signal.SIGCONT)
        began = time.time()
        while time.time() < began + seconds and not self.future.done():
            time.sleep(POLL_SECONDS)
            self._look()
        self.processes.signal(signal.SIGSTOP)
        self.slices.append((began, time.time()))
        self.processes.signal(signal.SIGSTOP)  # those that were started meanwhile
        self._look()

    def ended(self, server_round: int) -> bool:
        """Tell whether a round has ended."""
        return len(self.ends) > server_round

    def check(self, rounds: int) -> None:
        """Raise what it has failed by, or a PetalwiseError if it is over and has not told of all rounds."""
        if not self.future.done():
            return
        self.future.result()
        self._look()
        if not self.ended(rounds):
            raise PetalwiseError(f"An arm has ended after {len(self.ends) - 1} of {rounds} rounds.")

    def seconds(self) -> list[float]:
        """Say how much time it had in each round, from round 1 on."""
        return [
            sum(max(0.0, min(until, b) - max(since, a)) for a, b in self.slices) for since, until in pairwise(self.ends)
        ]

    def _look(self) -> None:
        count, written = rounds_ended(self.folder)
        self.ends += [written] * (count - len(self.ends))


def run_in_slices(arms: Sequence[Arm], setting: Setting) -> list[ArmRun]:
    """Run arms side by side; those that have ended their first round wait until all have, and so after the last.

    Parameters
    ----------
    arms : Sequence[Arm]
        Each with processes of its own, and not much slower than the others: Flower gives up a run that has been stopped
        for a minute.
    setting : Setting
        What to run.

    Returns
    -------
    list[ArmRun]
        Of each arm; its rounds are those that are steady, in seconds that it had the machine. The parts of rounds and
        the cores used, which arms measure by themselves, are left out.

    Raises
    ------
    Exception
        What an arm raises; the others are ended then.
    """
    with tempfile.TemporaryDirectory(prefix="plw-") as scratch, ThreadPoolExecutor(len(arms)) as pool:
        runs = []
        for number, arm in enumerate(arms):
            (folder := Path(scratch, str(number))).mkdir()
            runs.append(SlicedRun(arm.processes, folder, pool.submit(arm.run, setting, folder)))
        try:
            take_turns(runs, setting.rounds)
            for run in runs:
                run.processes.signal(signal.SIGCONT)
            found = [run.future.result() for run in runs]
        except BaseException:
            _end(runs)
            raise
    return [
        replace(given, rounds=run.seconds()[setting.steady], parts={}, cores={})
        for run, given in zip(runs, found, strict=True)
    ]


def take_turns(runs: Sequence[SlicedRun], rounds: int) -> None:
    """Let runs have slices in turn until all have ended their last round.

    Raises
    ------
    PetalwiseError
        If one ends without having told of all its rounds; if it has failed, its own exception.
    """
    for until in (FIRST, rounds):
        while going := [run for run in runs if not run.ended(until)]:
            for run in going:
                _stop(other for other in runs if other is not run)
                run.have(SLICE_SECONDS)
                for one in runs:
                    one.check(rounds)


def _stop(runs: Iterable[SlicedRun]) -> None:
    for run in runs:
        run.processes.signal(signal.SIGSTOP)


def _end(runs: Sequence[SlicedRun]) -> None:
    """Kill all processes of runs, also those that are about to be started, until every run has ended."""
    while True:
        for run in runs:
            run.processes.kill()
        if all(run.future.done() for run in runs):
            return
        time.sleep(POLL_SECONDS)
