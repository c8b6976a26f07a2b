"""The folder of a run."""

import json
import re
import time
from pathlib import Path

import pytest

from server_app.run_folder import RunFolder
from strategies.report import RoundReport
from task.errors import ConfigError


def test_a_folder_is_named_by_time_and_strategy_and_holds_the_config(tmp_path):
    folder = RunFolder(tmp_path / "new" / "runs", "fedavg", "seed: 0\n")
    assert folder.path.parent == tmp_path / "new" / "runs"
    assert re.fullmatch(r"\d{8}-\d{6}-fedavg", folder.path.name)
    assert (folder.path / "config.yaml").read_text() == "seed: 0\n"
    assert folder.adapter.parent == folder.metrics.parent == folder.path


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "20300101-000000")
    folders = [RunFolder(tmp_path, "fedavg", f"run: {run}\n") for run in range(3)]
    assert [folder.path.name for folder in folders] == [
        "20300101-000000-fedavg",
        "20300101-000000-fedavg-2",
        "20300101-000000-fedavg-3",
    ]
    assert [(folder.path / "config.yaml").read_text() for folder in folders] == [f"run: {run}\n" for run in range(3)]


def test_a_relative_parent_is_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunFolder(Path("runs"), "fedavg", "").path.parent == tmp_path / "runs"


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(ConfigError, match="runs_dir=.*cannot be written"):
        RunFolder(tmp_path / "runs", "fedavg", "")
    assert (tmp_path / "runs").read_text() == "a file"


def test_every_line_of_the_metrics_is_one_round(tmp_path):
    folder = RunFolder(tmp_path, "fedavg", "")
    reports = [
        RoundReport(0, central={"accuracy": 0.1, "loss": 2.3}),
        RoundReport(1, merged=True, clients_used=["a"], clients_dropped={"b": "said\n“no”"}, train_loss=0.5),
    ]
    for report in reports:
        folder.append(report)
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    assert [RoundReport(**json.loads(line)) for line in lines] == reports


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    folder = RunFolder(tmp_path, "fedavg", "")
    folder.append(RoundReport(1, central={"accuracy": 0.5, "loss": float("nan")}, train_loss=float("inf")))
    (line,) = folder.metrics.read_text().splitlines()
    report = json.loads(line, parse_constant=pytest.fail)
    assert report["central"] == {"accuracy": 0.5, "loss": None}
    assert report["train_loss"] is None
