"""Runs of several arms that have the machine in turn, some seconds each.

Other machines on the same host make this one slower or faster for minutes, by as much as a quarter. Arms that run one
after another meet other such times; in slices they meet the same. The processes of those whose turn it is not are
stopped, and their clock with them.
"""

import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from benchmarks.speed.arm_run import ArmRun, rounds_ended
from benchmarks.speed.arms import Arm
from benchmarks.speed.settings import Setting
from tools.processes import MarkedProcesses

SLICE_SECONDS = 1.0
"""Short beside such times, long beside the milliseconds that stopping takes and Flower's waits of a tenth of a second,
which go on meanwhile."""
POLL_SECONDS = 0.02
STARTED = 2
"""Rounds that an arm ends before it is measured: round 0, without training, and the one in which models are built."""


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
        began = time.time()
        self.processes.signal(signal.SIGCONT)
        while time.time() < began + seconds and not self.future.done():
            time.sleep(POLL_SECONDS)
            self._look()
        if not self.future.done():
            self.stop()
        self.slices.append((began, time.time()))
        self._look()

    def stop(self) -> None:
        """Stop its processes; twice, for those that were started meanwhile."""
        for _ in range(2):
            self.processes.signal(signal.SIGSTOP)

    def seconds(self) -> list[float]:
        """Say how much time it had in each round, from round 1 on."""
        return [
            sum(max(0.0, min(until, b) - max(since, a)) for a, b in self.slices) for since, until in pairwise(self.ends)
        ]

    def _look(self) -> None:
        count, written = rounds_ended(self.folder)
        self.ends += [written] * (count - len(self.ends))


def run_in_slices(arms: Sequence[Arm], setting: Setting) -> list[ArmRun]:
    """Run arms side by side; those that have ended their first round wait until all have.

    Parameters
    ----------
    arms : Sequence[Arm]
        Each with processes of its own.
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
            take_turns(runs)
        except BaseException:
            for run in runs:
                run.processes.kill()
            raise
        finally:
            for run in runs:
                run.processes.signal(signal.SIGCONT)
    found = zip(runs, [run.future.result() for run in runs], strict=True)
    return [replace(given, rounds=run.seconds()[setting.steady], parts={}, cores={}) for run, given in found]


def take_turns(runs: Sequence[SlicedRun]) -> None:
    """Let runs have slices in turn until all have ended, or one has failed, whose exception is raised."""
    while going := [run for run in runs if not run.future.done()]:
        for run in [run for run in going if len(run.ends) < STARTED] or going:
            for other in going:
                if other is not run and not other.future.done():
                    other.stop()
            run.have(SLICE_SECONDS)
            if run.future.done():
                run.future.result()
