"""The command: which cases run, where figures go."""

import json
from pathlib import Path

import pytest

from benchmarks.speed import __main__ as command
from benchmarks.speed.ratios import Ratio
from benchmarks.speed.results import Found
from task.errors import PetalwiseError


def refuse(repeats):
    raise PetalwiseError("The arms train other tensors.")


@pytest.fixture
def files(tmp_path):
    return ["--json", str(tmp_path / "speed.json"), "--markdown", str(tmp_path / "speed.md")]


def test_only_the_cases_asked_for_run(monkeypatch, files, capsys):
    cases = {"step": lambda repeats: Found({"step": Ratio.of([0.5] * repeats)}), "simulation": refuse}
    monkeypatch.setattr(command, "CASES", cases)
    assert command.main(["--only", "step", "--repeats", "3", *files]) == 0
    assert capsys.readouterr().out.startswith("step: 0.500 (0.500 to 0.500), 3 pairs\n")
    found = json.loads(Path(files[1]).read_text())
    assert found["step"] == 0.5
    assert found["cases"]["step"]["machine"]["cores"]


def test_a_case_that_fails_says_why_and_what_was_measured_before_stays(monkeypatch, files, capsys):
    cases = {"step": lambda repeats: Found({"step": Ratio.of([0.5])}), "simulation": refuse}
    monkeypatch.setattr(command, "CASES", cases)
    assert command.main(["--only", "step", "simulation", *files]) == 1
    assert "The arms train other tensors." in capsys.readouterr().err
    assert json.loads(Path(files[1]).read_text())["step"] == 0.5
