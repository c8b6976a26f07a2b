"""Whose processor time it is."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.speed.processor import FLOWER, RAY, SERVER, WORKERS, RoundWatch, owner, processor_seconds_here
from tools.processes import MarkedProcesses

BUSY = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ninput()"


@pytest.mark.parametrize(
    ("command", "whose"),
    [
        (["ray::ClientAppActor.run"], WORKERS),
        (["ray::ClientAppActor"], WORKERS),
        (["/env/bin/python", "/env/bin/flwr-simulation", "--run-once"], SERVER),
        (["/env/bin/python", "/env/bin/flower-superlink", "--simulation"], FLOWER),
        (["/env/bin/python", "/env/bin/flwr", "log", "1"], FLOWER),
        (["/env/ray/core/src/ray/raylet/raylet"], RAY),
        (["/env/bin/python", "-u", "/env/ray/dashboard/agent.py"], RAY),
        ([], RAY),
    ],
)
def test_a_process_is_known_by_its_command(command, whose):
    assert owner(command) == whose


def test_what_processes_use_between_the_ends_of_rounds_is_averaged(tmp_path):
    mark = str(tmp_path)
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    with RoundWatch(MarkedProcesses("SPEED_TEST", mark), tmp_path) as watch:
        for rounds in range(1, 5):
            if rounds == 3:
                child = subprocess.Popen(
                    [sys.executable, "-c", BUSY],
                    env={**os.environ, "SPEED_TEST": mark},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                child.stdout.readline()
            file.write_text("".join(f"{json.dumps({'round': number})}\n" for number in range(rounds)))
            deadline = time.monotonic() + 30
            while len(watch._noted) < rounds and time.monotonic() < deadline:
                time.sleep(0.01)
    child.communicate(b"\n")
    found = watch.per_round()
    assert found[RAY] >= 0.3  # one round between the first and the last, in which an unknown command ran
    assert found[WORKERS] == found[SERVER] == 0.0


def test_processes_below_this_one_are_the_clients():
    child = subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    used = processor_seconds_here()
    child.communicate(b"\n")
    assert used[WORKERS] >= 0.3
    assert used[SERVER] == pytest.approx(sum(psutil.Process().cpu_times()[:2]), abs=1.0)
