"""One process of a deployment: followed, frozen, killed with all that it started, and started again."""

import time

import psutil
import pytest

from task.errors import PetalwiseError
from tools.deployed import DeployedSuperLink, DeployedSuperNode, FlowerProcess, Place, Site

CHILD = "import subprocess, sys, time; "
CHILD += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True); "
CHILD += "print('child', child.pid, 'READY', flush=True); time.sleep(60)"
SECONDS = 30.0


@pytest.fixture
def process(tmp_path):
    """Stands in for a Flower command: Python, which lies beside itself."""
    made = FlowerProcess(tmp_path / "process", Place(), [], {"SAID": "hello"}, "READY")
    made.command = ["python", "-c", CHILD]
    yield made
    made.kill()


def child(process):
    return int(process.output.split()[1])


def states(process):
    return {psutil.Process(child(process)).status(), psutil.Process(process._process.pid).status()}


def test_it_is_killed_with_what_it_started_in_a_session_of_its_own(process):
    process.start()
    pid = child(process)
    assert process.alive
    process.kill()
    assert not process.alive
    assert process.exit_code() == -9
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_it_can_be_started_again_and_then_shows_only_its_new_output(process):
    process.start()
    first = child(process)
    process.kill()
    process.start()
    assert child(process) != first
    with pytest.raises(PetalwiseError, match="runs already"):
        process.launch()


def test_it_is_frozen_and_goes_on_with_what_it_started(process):
    process.start()
    process.pause()
    deadline = time.monotonic() + SECONDS
    while states(process) != {psutil.STATUS_STOPPED} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert states(process) == {psutil.STATUS_STOPPED}
    assert process.alive
    process.resume()
    while psutil.STATUS_STOPPED in states(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert psutil.STATUS_STOPPED not in states(process)


def test_one_that_ends_early_is_told_with_its_last_lines(process):
    process.command = ["python", "-c", "print('no such key'); raise SystemExit(3)"]
    with pytest.raises(PetalwiseError, match=r"python ended with code 3.*\nno such key"):
        process.start()


def test_one_that_is_not_ready_in_time_is_told(process):
    process.command = ["python", "-c", "import time; time.sleep(60)"]
    process.launch()
    with pytest.raises(PetalwiseError, match=r"did not say 'READY' within 0 seconds"):
        process.wait_for("READY", 0.1)


def test_the_words_of_its_place_come_before_its_command(tmp_path):
    place = Place("10.0.0.1", ("env", "WHERE=site-1"))
    process = FlowerProcess(tmp_path / "process", place, [place.host], {"SAID": "hello"}, "READY")
    process.command = [
        "python",
        "-c",
        "import os; print(os.environ['WHERE'], os.environ['SAID'], os.environ['NO_PROXY'])",
    ]
    process.launch()
    assert process.exit_code(SECONDS) == 0
    assert process.output.startswith("site-1 hello ")
    assert process.output.strip().endswith("127.0.0.1,10.0.0.1")


def test_folders_that_were_set_for_other_runs_are_not_handed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PETALWISE_DATA", "/somewhere")
    process = FlowerProcess(tmp_path / "process", Place(), [], {}, "READY")
    process.command = [
        "python",
        "-c",
        "import os; print(os.environ.get('PETALWISE_DATA'), os.environ['PETALWISE_STATE'])",
    ]
    process.launch()
    assert process.exit_code(SECONDS) == 0
    assert process.output == f"None {tmp_path / 'process' / 'state'}\n"


def test_commands_have_keys_and_never_say_insecure(tmp_path):
    link = DeployedSuperLink(tmp_path / "link", Place("127.0.0.1"), tmp_path / "keys", {})
    site = Site("site-1", {"data": "/srv/a b", "partition-id": 0, "fast": True})
    node = DeployedSuperNode(tmp_path / "node", site, link.address, tmp_path / "ca.crt", tmp_path / "site-1", {})
    assert "--enable-supernode-auth" in link.command
    assert str(tmp_path / "keys" / "server.key") in link.command
    assert node.command[node.command.index("--superlink") + 1] == link.address
    assert node.command[-1] == 'name="site-1" data="/srv/a b" partition-id=0 fast=true'
    assert not {"--insecure"} & {*link.command, *node.command}
