"""Whose processor time it is."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context

import psutil
import pytest

from benchmarks.speed.processor import FLOWER, RAY, SERVER, WORKERS, ProcessorTime, RoundWatch, cores_used, owner
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


def busy(**environment):
    """Start a process that has used some 0.4 s of a core, and goes on when it reads a line."""
    given = {**os.environ, **environment}
    child = subprocess.Popen([sys.executable, "-c", BUSY], env=given, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    return child


def test_what_processes_use_between_the_ends_of_two_rounds_is_averaged(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()
    children, began = [], time.monotonic()
    with RoundWatch(MarkedProcesses("SPEED_TEST", str(tmp_path)), tmp_path, (1, 3)) as watch:
        for server_round in range(5):
            if server_round in (1, 3):
                children.append(busy(SPEED_TEST=str(tmp_path)))
            file.write_text("".join(f"{json.dumps({'round': number})}\n" for number in range(server_round + 1)))
            time.sleep(1.0)
            if server_round == 1:
                children[0].communicate(b"\n")  # what has ended is not taken off again
    seconds = time.monotonic() - began
    children[1].communicate(b"\n")
    found = watch.cores_used()
    assert 0.3 / seconds < found[RAY] < 0.7  # of an unknown command; the first child's time was before round 1 ended
    assert found[WORKERS] == found[SERVER] == 0.0


def test_a_fault_while_watching_is_told(tmp_path):
    file = tmp_path / "run" / "metrics.jsonl"
    file.parent.mkdir()

    class Faulty:
        def find(self):
            raise RuntimeError("no processes here")

    def watched():
        with RoundWatch(Faulty(), tmp_path, (0, 1)) as watch:
            file.write_text("{}\n")
            wait([watch._watching], 30)

    with pytest.raises(RuntimeError, match="no processes here"):
        watched()


def test_only_processes_made_by_multiprocessing_are_the_clients_here():
    child = busy()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        used = pool.submit(spend, 0.4).result()
        found = ProcessorTime().note_here()
    child.communicate(b"\n")
    assert found[WORKERS] >= used - 0.1
    assert found[WORKERS] < 10
    assert found[SERVER] == pytest.approx(sum(psutil.Process().cpu_times()[:2]), abs=1.0)
    assert found[RAY] == found[FLOWER] == 0.0


def spend(seconds):
    while time.process_time() < seconds:
        pass
    return time.process_time()


def test_cores_are_seconds_by_seconds():
    first, last = {RAY: 1.0, "clock": 10.0}, {RAY: 4.0, "clock": 12.0}
    assert cores_used(first, last) == {RAY: 1.5}
