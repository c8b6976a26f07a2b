"""A run folder is followed while the run goes on, and afterwards."""

import io
import json
import os
import threading
import time

import pytest
from rich.console import Console

from client_app.app import app as client_app
from server_app.run_folder import STATE
from tests.server_app.test_app import DIGITS, run
from tools.debug import InProcessGrid, simulated_nodes
from tools.watch import Watched, main, newest, picture


def shown(folder, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(picture(Watched(folder)))
    return console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A real run, and what was seen of it while its clients worked."""
    runs, seen = tmp_path_factory.mktemp("watched"), []

    class Watching(InProcessGrid):
        def _deliver(self, message):
            seen.extend(shown(folder) for folder in (runs / "runs").iterdir())
            return super()._deliver(message)

    return run(runs, DIGITS, Watching(client_app, simulated_nodes(3))), seen


def test_while_clients_work_the_phase_and_its_replies_are_shown(finished):
    _, seen = finished
    assert any("clients training" in one and "0/3 in round 1" in one for one in seen)
    assert any("clients evaluating" in one and "in round 2" in one for one in seen)
    assert "1/2" in seen[-1]


def test_at_the_end_all_rounds_and_how_it_ended(finished, capsys):
    folder, _ = finished
    text = shown(folder)
    assert "2/2" in text
    assert text.rstrip().endswith("finished")
    assert "clients training" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert main([str(folder)]) == 0
    assert "finished" in capsys.readouterr().out


def test_a_round_says_why_it_has_no_accuracy(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    rounds = [{"server_round": number, "central": {"accuracy": 0.5}} for number in (0, 2)]
    rounds.insert(1, {"server_round": 1, "complete": False})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    text = shown(tmp_path)
    assert [line.split()[:2] for line in text.splitlines() if "window" in line] == [["1", "window"]]


def test_a_run_that_failed_says_why_and_ends_with_1(finished, tmp_path, capsys):
    folder, _ = finished
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    (tmp_path / STATE).write_text(json.dumps({"status": "failed", "reason": "No clients.", "server_round": 1}))
    assert main([str(tmp_path)]) == 1
    assert "failed in round 1: No clients." in capsys.readouterr().out


def test_it_follows_until_the_run_ends(finished, tmp_path):
    folder, _ = finished
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    (tmp_path / STATE).write_text(json.dumps({"server_round": 1, "phase": "train", "asked": 3, "answered": 1}))
    codes = []
    watcher = threading.Thread(target=lambda: codes.append(main([str(tmp_path)])))
    watcher.start()
    time.sleep(0.2)
    assert not codes
    (tmp_path / STATE).write_text(json.dumps({"status": "finished"}))
    watcher.join(20)
    assert codes == [0]


def test_a_run_that_says_nothing_for_long_is_told(finished, tmp_path):
    folder, _ = finished
    for name in ("config.yaml", STATE):
        (tmp_path / name).write_text("{}" if name == STATE else (folder / name).read_text())
        os.utime(tmp_path / name, (time.time() - 300,) * 2)
    assert "nothing new for 30" in shown(tmp_path)


@pytest.mark.parametrize("state", ["", "[1]", '{"status": 3, "more": 1}', "\x00"])
def test_a_state_that_is_none_does_no_harm(finished, tmp_path, state):
    folder, _ = finished
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_text((folder / name).read_text())
    (tmp_path / STATE).write_text(state)
    assert "finished" in shown(tmp_path)


def test_no_run_folder_is_a_sentence(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "is no run folder" in capsys.readouterr().err


def test_the_newest_run_is_the_one_to_watch(tmp_path):
    for name in ("20260101-000000-fedavg", "20250101-000000-livar"):
        (tmp_path / name).mkdir()
        time.sleep(0.02)
        (tmp_path / name / "config.yaml").write_text("{}")
    assert newest(tmp_path).name == "20250101-000000-livar"


def test_before_the_first_run_it_waits_for_one(finished, tmp_path, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(tmp_path)
    codes = []
    watcher = threading.Thread(target=lambda: codes.append(main([])))
    watcher.start()
    time.sleep(0.7)
    assert not codes
    begun = tmp_path / "runs" / "20260101-000000-fedavg"
    begun.mkdir(parents=True)
    for name in (STATE, "metrics.jsonl", "config.yaml"):
        (begun / name).write_text((folder / name).read_text())
    watcher.join(20)
    assert codes == [0]
