"""What is kept of rounds, also where the disk is full."""

import json
import os

import pytest

from server_app.compose import compose_run
from server_app.keeping import RoundKeeping
from server_app.run_folder import RunFolder
from strategies import FedAvg
from strategies.report import RoundReport


@pytest.fixture
def keeping(tmp_path):
    run = compose_run({"runs-dir": str(tmp_path)})
    strategy = FedAvg()
    strategy.run = "ab"
    return RoundKeeping(RunFolder.new(tmp_path, "fedavg", run.yaml), run, strategy, [])


def rounds(keeping):
    return [json.loads(line)["server_round"] for line in keeping.folder.metrics.read_text().splitlines()]


def test_a_round_is_recorded_and_made_safe(keeping):
    for server_round in range(3):
        keeping.note(RoundReport(server_round))
    assert rounds(keeping) == [0, 1, 2]
    found = keeping.folder.checkpoints.latest()
    assert (found.server_round, found.run, found.strategy) == (2, "ab", "fedavg")
    assert found.metrics_bytes == keeping.folder.metrics.stat().st_size
    assert [report.server_round for report in keeping.folder.reports(found.metrics_bytes)] == [0, 1, 2]


@pytest.mark.parametrize("what", ["fsync", "replace"])
def test_a_full_disk_is_told_and_the_run_goes_on(keeping, monkeypatch, caplog, what):
    keeping.note(RoundReport(0))
    keeping.note(RoundReport(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, what, full)
        keeping.note(RoundReport(2))
    assert "Round 2 is not kept" in caplog.text
    assert keeping.folder.checkpoints.latest().server_round == 1
    keeping.note(RoundReport(3))
    assert rounds(keeping) == [0, 1, *([2] if what == "replace" else []), 3]
    assert keeping.folder.checkpoints.latest().server_round == 3


def test_numbers_that_json_does_not_have_are_none_wherever_they_stand(keeping):
    keeping.note(RoundReport(0, details={"change": [1.0, float("inf"), {"deep": (float("nan"),)}]}))
    (report,) = [json.loads(line) for line in keeping.folder.metrics.read_text().splitlines()]
    assert report["details"]["change"] == [1.0, None, {"deep": [None]}]
