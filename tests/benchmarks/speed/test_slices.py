"""Arms that have the machine in turn: whose clock runs when. The arms are processes that count rounds."""

import os
import subprocess
import sys
import time
from concurrent.futures import Future
from uuid import uuid4

import pytest
import torch

from benchmarks.speed import slices
from benchmarks.speed.arm_run import ArmRun, append_round, rounds_ended
from benchmarks.speed.settings import SETTINGS
from benchmarks.speed.slices import SlicedRun, run_in_slices
from task.errors import PetalwiseError
from tools.processes import MarkedProcesses

SETTING = SETTINGS["overhead_bound"]
WORK = """
import sys, time
from pathlib import Path
from benchmarks.speed.arm_run import append_round
folder, rounds, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
append_round(folder, {})
for _ in range(rounds):
    began = time.process_time()
    while time.process_time() < began + seconds:
        pass
    append_round(folder, {})
sys.exit(int(sys.argv[4]))
"""


class Working:
    """Uses so many seconds of a core in each of its rounds."""

    def __init__(self, seconds, code=0, rounds=SETTING.rounds):
        self.rounds = rounds
        self.processes, self.seconds, self.code = MarkedProcesses("SLICES_TEST", uuid4().hex), seconds, code

    def run(self, setting, folder):
        command = [sys.executable, "-c", WORK, str(folder), str(self.rounds), str(self.seconds), str(self.code)]
        environment = {**os.environ, self.processes.name: self.processes.value}
        if subprocess.run(command, env=environment, check=False).returncode:
            raise PetalwiseError("It ended badly.")
        return ArmRun([], {"train": 1.0}, {"a": torch.ones(1)}, {"clients": 1.0})


def test_a_round_lasts_as_long_as_its_arm_had_the_machine(monkeypatch):
    monkeypatch.setattr(slices, "SLICE_SECONDS", 0.2)
    began = time.monotonic()
    short, long = run_in_slices((Working(0.3), Working(0.6)), SETTING)
    whole = time.monotonic() - began
    assert len(short.rounds) == len(long.rounds) == SETTING.rounds - 1
    assert all(seconds > 0.28 for seconds in short.rounds)  # no less than it worked
    assert all(seconds > 0.58 for seconds in long.rounds)
    assert sum(short.rounds) + sum(long.rounds) < whole  # no second is both arms'
    assert short.parts == short.cores == {}


def test_an_arm_that_fails_ends_the_others():
    failing, other = Working(0.01, code=3, rounds=0), Working(60.0)  # later, it would be held until the other's end
    with pytest.raises(PetalwiseError, match="It ended badly"):
        run_in_slices((failing, other), SETTING)
    assert other.processes.find() == []


@pytest.mark.parametrize(
    ("error", "sentence"), [(PetalwiseError("Flower lost it."), "Flower lost it"), (None, "ended after 1 of 10 rounds")]
)
def test_an_arm_that_ends_too_early_is_noticed_in_the_slice_of_another(error, sentence):
    class Short(Working):
        def run(self, setting, folder):
            append_round(folder, {})
            append_round(folder, {})
            if error:
                raise error
            return ArmRun([], {}, {})

    other = Working(60.0)
    with pytest.raises(PetalwiseError, match=sentence):
        run_in_slices((other, Short(1.0)), SETTING)
    assert other.processes.find() == []


def test_seconds_of_a_round_are_those_of_its_slices():
    run = SlicedRun(None, None, Future(), slices=[(0.0, 2.0), (5.0, 6.0), (9.0, 12.0)], ends=[1.0, 5.5, 10.0, 12.0])
    assert run.seconds() == [1.5, 1.5, 2.0]


def test_rounds_are_counted_with_the_time_of_the_last(tmp_path):
    assert rounds_ended(tmp_path) == (0, 0.0)
    (tmp_path / "run").mkdir()
    for server_round in range(3):
        append_round(tmp_path / "run", {})
        count, written = rounds_ended(tmp_path)
        assert count == server_round + 1
        assert written == pytest.approx(time.time(), abs=5.0)
