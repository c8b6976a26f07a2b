"""The arms compute the same; how fast they are is no matter of a test."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from benchmarks.speed import step
from benchmarks.speed.agreement import check_same
from benchmarks.speed.apps import bare, empty, tutorial
from benchmarks.speed.arm_run import ArmRun, rounds_ended
from benchmarks.speed.arms import FloorArm, run_alone
from benchmarks.speed.floor import Floor, start_worker
from benchmarks.speed.processor import num_cores
from benchmarks.speed.results import Table
from benchmarks.speed.settings import SETTINGS, Setting, one_phase
from benchmarks.speed.step import Client, step_seconds, step_task
from client_app.app import app
from server_app.app import run_federation
from task.config import task_to_json
from task.errors import PetalwiseError
from task.evaluation import evaluate
from task.model import canonical_name
from tools.debug import InProcessGrid, simulated_nodes

SMALL = Setting(
    "overhead_bound",
    "tiny",
    clients=4,
    rounds=2,
    overrides=(
        "backbone=vit_pico_random",
        "backbone.arguments={patch_size:8,embed_dim:32,depth:2,num_heads:2}",
        "dataset.max_train_samples=200",
        "dataset.max_test_samples=20",
        "partition=iid",
        "strategy.fraction_train=0.5",
        "train.max_steps=3",
    ),
    target=0.0,
)


def in_process(client, config):
    grid = InProcessGrid(client, simulated_nodes(SMALL.clients))
    for context in grid.contexts.values():
        context.run_config.update(config)
    return grid


def server_context(config):
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)


def app_adapter(folder):
    run = SMALL.compose()
    run.settings.runs_dir = str(folder)
    saved = load_file(run_federation(in_process(app, {}), run) / "adapter" / "adapter_model.safetensors")
    return {canonical_name(name): value for name, value in saved.items()}


def tutorial_adapter(folder):
    folder.mkdir()
    config = {
        "task": task_to_json(SMALL.compose().settings),
        "rounds": SMALL.rounds,
        "clients": SMALL.clients,
        "fraction-train": 0.5,
        "runs-dir": str(folder),
    }
    tutorial.server(in_process(tutorial.client, config), server_context(config))
    assert len(json.loads((folder / "ended.json").read_text())) == 1 + SMALL.rounds
    return load_file(folder / "adapter.safetensors")


def bare_adapter(folder):
    folder.mkdir()
    config = {"setting": SMALL.to_json(), "runs-dir": str(folder)}
    bare.server(in_process(bare.client, config), server_context(config))
    found = ArmRun.read(folder)
    assert len(found.rounds) == SMALL.rounds - 1
    assert set(found.parts) == {"train", "aggregate", "evaluate"}
    return found.adapter


def test_all_arms_end_with_the_same_adapter(tmp_path):
    found = run_alone(FloorArm(), SMALL)  # in processes of its own
    assert len(found.rounds) == SMALL.rounds - 1
    assert set(found.parts) == {"train", "aggregate", "evaluate"}
    ours = app_adapter(tmp_path / "runs")
    check_same(found.adapter, ours)
    check_same(tutorial_adapter(tmp_path / "tutorial"), ours)
    check_same(bare_adapter(tmp_path / "bare"), ours)


@pytest.mark.parametrize(("setting", "evaluations"), [(SMALL, [5, 5]), (one_phase(SMALL), [3, 3, 5])])
def test_the_plain_loop_evaluates_what_the_app_does(setting, evaluations, monkeypatch, tmp_path):
    """The server, and all four clients in a phase of their own; or the cohort of two, but after the last round all."""
    calls, ends, whole_round = [], [], Floor._round
    monkeypatch.setattr("benchmarks.speed.floor.evaluate", lambda *given: calls.append(given) or evaluate(*given))
    monkeypatch.setattr(Floor, "_round", lambda *given: (whole_round(*given), ends.append(len(calls)))[0])
    floor = Floor(setting)
    with ThreadPoolExecutor(1, initializer=start_worker, initargs=floor.arguments) as pool:
        found = floor.run(pool, tmp_path)
    assert rounds_ended(tmp_path)[0] == 1 + setting.rounds
    assert [end - before for before, end in pairwise([0, *ends])] == evaluations
    assert len(found.rounds) == 1
    assert 0 < sum(found.cores.values()) <= num_cores() + 0.2


def test_arms_that_differ_are_not_compared():
    adapter = {"a": torch.tensor([1.0, 2.0])}
    check_same({"a": torch.tensor([1.0, 2.0001])}, adapter)
    with pytest.raises(PetalwiseError, match=r"differ by 5\.0e-03"):
        check_same({"a": torch.tensor([1.0, 2.01])}, adapter)
    with pytest.raises(PetalwiseError, match="other tensors"):
        check_same({"b": adapter["a"]}, adapter)


def test_the_step_of_the_app_of_peft_and_by_hand_are_measured_where_they_agree():
    taken = step_seconds(Client(step_task(SMALL)), pairs=2)
    assert {arm: len(seconds) for arm, seconds in taken.items()} == {"hand": 2, "peft": 2, "app": 2}


def test_every_setting_whose_step_is_measured_has_a_number_of_steps(monkeypatch):
    """What is measured of each is in the test above; here, that all of them are asked for."""
    asked = []
    monkeypatch.setattr(step, "Client", lambda task: asked.append(task.train.max_steps))
    monkeypatch.setattr(step, "step_seconds", lambda client, pairs: {"hand": [1.0], "peft": [2.0], "app": [1.0]})
    monkeypatch.setattr(step, "profile_table", lambda setting, client: Table(setting.name, [], []))
    found = step.measure(1)
    assert asked == [step.STEPS["overhead_bound"], step.STEPS["compute_bound"]]
    assert found.ratios["peft_step_efficiency.compute_bound"].median == 0.5
    assert [table.title for table in found.tables] == ["overhead_bound", "compute_bound"]


def test_the_empty_app_measures_its_phases(tmp_path):
    config = {"size": 8, "rounds": 2, "clients": SMALL.clients, "cohort": 2, "runs-dir": str(tmp_path)}
    empty.server(in_process(empty.client, config), server_context(config))
    rounds = json.loads((tmp_path / "rounds.json").read_text())
    assert [set(taken) for taken in rounds] == [{"train", "evaluate"}] * 2


def test_all_settings_are_configs_of_the_app():
    runs = {name: setting.compose() for name, setting in SETTINGS.items()}
    assert [run.settings.backbone.image_size for run in runs.values()] == [64, 64, 112, 112]
    assert [run.strategy.evaluate_clients for run in runs.values()] == ["phase", "train"] * 2
    assert SETTINGS["overhead_bound"].run_config[0].endswith('" num-server-rounds=10')
