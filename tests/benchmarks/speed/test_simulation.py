"""What is made of the runs of the arms; the runs themselves are in test_arms.py."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed import simulation
from benchmarks.speed.arm_run import ArmRun
from benchmarks.speed.processor import FLOWER, RAY, SERVER, WORKERS
from benchmarks.speed.settings import SETTINGS
from task.errors import PetalwiseError

ADAPTER, OTHER = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
APP_PARTS = {"train": 4.0, "wait": 0.5, "steps": 3.0, "aggregate": 0.1, "evaluate": 0.7, "total": 4.8, "keep": 0.2}
APP = ArmRun([5.0, 5.0], APP_PARTS, ADAPTER, {WORKERS: 1.5, SERVER: 0.2, FLOWER: 0.0, RAY: 0.1})
FLOOR_PARTS = {"train": 3.5, "aggregate": 0.05, "evaluate": 0.7}
FLOOR = ArmRun([4.0, 4.5], FLOOR_PARTS, ADAPTER, {WORKERS: 1.75, SERVER: 0.125})
EMPTY = ArmRun([0.2], {"train": 0.1, "evaluate": 0.1}, {})


def test_rounds_are_the_pairs_and_arms_must_agree(monkeypatch):
    monkeypatch.setattr(simulation, "run_in_slices", lambda arms, setting: [FLOOR, APP])
    floors, apps = simulation.repeated(("floor", "app"), SETTINGS["overhead_bound"], repeats=2)
    ratio = simulation.paired(floors, apps, 0.95)
    assert (ratio.min, ratio.max, ratio.pairs) == (0.8, 0.9, 4)
    monkeypatch.setattr(simulation, "run_in_slices", lambda arms, setting: [FLOOR, replace(APP, adapter=OTHER)])
    with pytest.raises(PetalwiseError, match="final adapters differ"):
        simulation.repeated(("floor", "app"), SETTINGS["overhead_bound"], repeats=1)


def test_the_parts_of_a_round_and_their_shares():
    table = simulation.parts_table(SETTINGS["overhead_bound"], APP, FLOOR, EMPTY)
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells["round"] == ["5.000", "100.0 %", "4.250", "0.200"]
    assert cells["training phase, all of the above"] == ["4.000", "80.0 %", "3.500", "0.100"]
    assert sum(float(row[1]) for row in table.rows[:3]) == 4.0


def test_whose_work_the_cores_do(monkeypatch):
    monkeypatch.setattr(simulation, "num_cores", lambda: 2)
    cells = {row[0]: row[1:] for row in simulation.cores_table(SETTINGS["overhead_bound"], APP, FLOOR).rows}
    assert cells[WORKERS] == ["1.500", "1.750"]
    assert cells[RAY] == ["0.100", "0.000"]
    assert cells["idle, or other load"] == ["0.200", "0.125"]


def test_a_round_of_one_phase_has_the_clients_evaluate_in_it():
    cells = simulation.parts_table(SETTINGS["overhead_bound_one_phase"], APP, FLOOR, EMPTY).rows
    assert cells[1][0].endswith("copied into the model, evaluation")
    assert cells[5][0] == "evaluation by the server"
