"""Runs that are killed and go on: real ServerApp and ClientApp code, in a process that dies by SIGKILL."""

import dataclasses
import json
import os
import re
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from client_app.app import app as client_app
from client_app.kept import STATE_VARIABLE
from server_app import checkpoints
from server_app.app import run_federation
from server_app.compose import compose_run
from server_app.resuming import MAY_CHANGE, check_past, config_digest
from server_app.saving import open_adapter
from strategies.report import RoundReport
from task.errors import ConfigError, OtherClientsError, StateError
from tests.conftest import REPOSITORY
from tests.server_app.test_app import DIGITS
from tools.debug import InProcessGrid, simulated_nodes

TINY = [*DIGITS, "num_server_rounds=4", "partition.min_samples=2"]
CLIENTS = 3
FEDLAMA = ["schedule=fedlama", "wire.dtype=int8"]
EVERY_STRATEGY = [
    "fedavg",
    "fedprox",
    "ffa_lora",
    "regmean",
    "fisher",
    "ccvr",
    "livar",
    "livar_ccvr",
    "livar_published_code",
    "fedlama",
    "fedluar",
    "fedper",
    "fedrep",
    "local",
    "pfedla",
    "heur_pfedla",
]


class DyingGrid(InProcessGrid):
    """Kills its process when a message of a round, by its number in the round, is about to be delivered."""

    def __init__(self, server_round, number):
        super().__init__(client_app, simulated_nodes(CLIENTS))
        self._where, self._number = str(server_round), number

    def _deliver(self, message):
        if message.metadata.group_id == self._where:
            if self._number == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self._number -= 1
        return super()._deliver(message)


def run(runs, overrides, grid=None, resume=""):
    composed = compose_run({"runs-dir": str(runs)}, overrides=[*TINY, *overrides])
    return run_federation(grid or InProcessGrid(client_app, simulated_nodes(CLIENTS)), composed, resume)


def killed(runs, overrides, grid=None, before=lambda: None, resume=""):
    """Run in a child process that must die by SIGKILL; return the folder it leaves."""
    if (child := os.fork()) == 0:
        try:
            before()
            run(runs, overrides, grid, resume)
        finally:
            os._exit(1)  # alive at the end, or by an error that it shows
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder,) = runs.iterdir()
    return folder


def adapter(folder):
    found = {name: load_file(folder / "adapter" / name) for name in ("adapter_model.safetensors", "head.safetensors")}
    personal = folder / "adapter" / "personal.safetensors"
    return {**found, **({"personal": load_file(personal)} if personal.exists() else {})}


def same(one, other):
    assert one.keys() == other.keys()
    assert all(one[name].keys() == other[name].keys() for name in one)
    return all(one[name][key].equal(other[name][key]) for name in one for key in one[name])


def told(folder):
    """What is reported of the rounds, save for seconds and the bytes of finding the clients once more."""
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in report.items() if k not in ("seconds", "bytes_down", "bytes_up")} for report in rounds]


@pytest.fixture
def state(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EVERY_STRATEGY)
def test_every_strategy_ends_with_the_same_bits_as_without_the_kill(tmp_path, state, strategy):
    """Killed inside a window of FedLAMA, when one client of three has trained in round 2."""
    overrides = [f"strategy={strategy}", *(["schedule.recycled=1"] if strategy == "fedluar" else [])]
    whole = run(tmp_path / "whole", overrides)
    folder = killed(tmp_path / "cut", overrides, DyingGrid(2, 1))
    assert not (folder / "adapter").exists()
    assert run(tmp_path / "cut", [], resume=str(folder)) == folder
    assert same(adapter(folder), adapter(whole))
    assert told(folder) == told(whole)


@pytest.mark.slow
@pytest.mark.parametrize("server_round", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_kill_in_any_phase_of_any_round(tmp_path, state, server_round, number):
    """Before the first client trains, before the last does, and in the phase after training."""
    overrides = ["strategy=livar_ccvr", *FEDLAMA, "strategy.evaluate_clients=phase"]
    whole = run(tmp_path / "whole", overrides)
    if number == 3 and server_round % 2:
        pytest.skip("rounds inside a window have no phase after training")
    folder = killed(tmp_path / "cut", overrides, DyingGrid(server_round, number))
    run(tmp_path / "cut", [], resume=str(folder))
    assert same(adapter(folder), adapter(whole))
    assert told(folder) == told(whole)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def in_the_middle_of_a_checkpoint():
    write, count = checkpoints.save_file, iter(range(100))

    def half(tensors, path, metadata):
        write(tensors, path, metadata)
        if next(count) == 2:
            os.truncate(path, path.stat().st_size // 2)
            die()

    checkpoints.save_file = half


def before_the_checkpoint_counts():
    replace, count = checkpoints.os.replace, iter(range(100))

    def replaced(part, path):
        if path.suffix == ".safetensors" and "checkpoints" in str(path) and next(count) == 2:
            die()
        replace(part, path)

    checkpoints.os.replace = replaced


def before_the_adapter_is_saved():
    import server_app.app

    server_app.app.save_adapter = lambda *_: die()


@pytest.mark.parametrize(
    "when", [in_the_middle_of_a_checkpoint, before_the_checkpoint_counts, before_the_adapter_is_saved]
)
def test_a_kill_while_something_is_written(tmp_path, state, when):
    whole = run(tmp_path / "whole", FEDLAMA)
    folder = killed(tmp_path / "cut", FEDLAMA, before=when)
    run(tmp_path / "cut", [], resume=folder.name)
    assert same(adapter(folder), adapter(whole))
    assert told(folder) == told(whole)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "round-000003.safetensors",
        "round-000004.safetensors",
    ]


def test_a_run_can_be_killed_and_go_on_twice(tmp_path, state):
    whole = run(tmp_path / "whole", FEDLAMA)
    folder = killed(tmp_path / "cut", FEDLAMA, DyingGrid(2, 1))
    assert killed(tmp_path / "cut", [], DyingGrid(4, 2), resume=str(folder)) == folder
    run(tmp_path / "cut", [], resume=str(folder))
    assert same(adapter(folder), adapter(whole))


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, state):
    whole = run(tmp_path / "whole", [])
    folder = killed(tmp_path / "cut", [], DyingGrid(4, 1))
    last = folder / "checkpoints" / "round-000003.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    run(tmp_path / "cut", [], resume=str(folder))
    assert same(adapter(folder), adapter(whole))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A run of four rounds that was killed in its third."""
    return killed(tmp_path_factory.mktemp("runs"), ["strategy=livar", "train.lr=0.002"], DyingGrid(3, 1))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["train.lr=0.5"], r"train\.lr=0\.5 instead of 0\.002"),
        (["strategy=fedprox"], r"strategy\.name=fedprox instead of livar"),
        (["seed=9", "lora.rank=2"], r"lora\.rank=2 instead of 8; seed=9 instead of 0"),
        (["num_server_rounds=1"], r"num-server-rounds=1, but the run has done 2 rounds"),
    ],
)
def test_another_config_is_refused_with_the_keys_that_differ(tmp_path, cut, overrides, reason):
    with pytest.raises(ConfigError, match=reason):
        run(tmp_path, overrides, resume=str(cut))
    with pytest.raises(ConfigError, match=reason):
        check_past(str(cut), compose_run({}, [*TINY, *overrides]))
    assert len(told(cut)) == 3


def test_the_docs_name_every_key_that_may_change():
    text = (REPOSITORY / "docs" / "faults.md").read_text("utf-8")
    said = text.partition("one of those that may change:")[2].partition("A run")[0]
    assert sorted(re.findall(r"`([\w.]+)`", said)) == sorted(MAY_CHANGE)


def test_a_run_that_is_only_checked_stays_as_it_was(cut):
    def contents():
        return {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}

    before = contents()
    for _ in range(2):  # it lets go of the folder
        assert check_past(str(cut), compose_run({}, ["num_server_rounds=9"])).settings.num_server_rounds == 9
    assert contents() == before


def test_a_config_that_was_edited_is_refused(cut):
    text = (cut / "config.yaml").read_text()
    try:
        (cut / "config.yaml").write_text(text.replace("lr: 0.002", "lr: 0.003"))
        with pytest.raises(ConfigError, match="not the config that the checkpoints were made with"):
            run(cut.parent, [], resume=str(cut))
    finally:
        (cut / "config.yaml").write_text(text)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"resume='runs/nothing' is no run folder as seen from"):
        run(tmp_path, [], resume="runs/nothing")


def test_a_run_that_is_still_going_on_is_left_alone(cut):
    class Trying(InProcessGrid):
        def get_node_ids(self):
            with pytest.raises(ConfigError, match="still going on"):
                run(cut.parent, [], resume=str(cut))
            with pytest.raises(ConfigError, match="still going on"):
                check_past(str(cut), compose_run({}))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cut.parent, [], Trying(client_app, simulated_nodes(CLIENTS)), resume=str(cut))


def test_a_finished_run_goes_on_for_more_rounds(tmp_path, state):
    whole = run(tmp_path / "whole", ["num_server_rounds=4", "strategy.evaluate_clients=off"])
    folder = run(tmp_path / "cut", ["num_server_rounds=2", "strategy.evaluate_clients=off"])
    run(tmp_path / "cut", ["num_server_rounds=4"], resume=str(folder))
    assert same(adapter(folder), adapter(whole))
    assert yaml.safe_load((folder / "config.yaml").read_text())["num_server_rounds"] == 4
    assert [report["server_round"] for report in told(folder)] == [0, 1, 2, 3, 4]


def test_a_run_that_was_finished_has_its_adapter_saved_again(tmp_path, state):
    folder = run(tmp_path, [])
    before = adapter(folder)
    for file in (folder / "adapter").iterdir():
        file.unlink()
    run(tmp_path, [], resume=str(folder))
    assert same(adapter(folder), before)
    assert open_adapter(folder).get_base_model().num_classes == 10


def test_what_may_change_is_no_part_of_the_digest():
    config = {"seed": 0, "num_server_rounds": 3, "strategy": {"name": "fedavg", "wait_for_clients": 1.0}}
    other = {"seed": 0, "num_server_rounds": 5, "strategy": {"name": "fedavg", "wait_for_clients": 9.0}}
    assert config_digest(config) == config_digest(other)
    assert config_digest(config) != config_digest({**config, "seed": 1})


def test_reports_that_are_shorter_than_the_checkpoint_says_are_refused(tmp_path):
    from server_app.run_folder import RunFolder

    folder = RunFolder.new(tmp_path, "fedavg", "seed: 0\n")
    folder.append(RoundReport(0))
    with pytest.raises(StateError, match="cannot be gone on with"):
        folder.reports(10_000)


def test_a_state_that_does_not_fit_is_refused_and_the_adapter_stays_as_it_was(tmp_path):
    folder = run(tmp_path, [])
    before = adapter(folder)
    kept = checkpoints.Checkpoints(folder / "checkpoints")
    latest = kept.latest()
    state = {**latest.state, "flat": torch.zeros_like(latest.state["flat"])}
    del state["schedule"]
    kept.save(dataclasses.replace(latest, state=state))
    with pytest.raises(StateError, match="The saved state is none of FedAvg"):
        run(tmp_path, ["num_server_rounds=5"], resume=str(folder))
    assert same(before, adapter(folder))


@pytest.mark.parametrize("clients", [CLIENTS - 1, CLIENTS + 3])
def test_another_number_of_clients_would_have_other_images_and_is_refused(tmp_path, clients):
    folder = run(tmp_path, [])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    grid = InProcessGrid(client_app, simulated_nodes(clients))
    sentence = f"the images are shared by {clients} clients, but by {CLIENTS} in this run's earlier rounds"
    with pytest.raises(OtherClientsError, match=sentence):
        run(tmp_path, ["num_server_rounds=6"], grid, resume=str(folder))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    run(tmp_path, ["num_server_rounds=6"], resume=str(folder))


def test_every_key_that_differs_is_named_but_for_what_comes_with_another_strategy(tmp_path):
    folder = run(tmp_path, [])
    others = ["strategy=livar", "lora.rank=3", "train.lr=0.5", "train.batch_size=5", "train.local_epochs=3"]
    others += ["dataset.max_test_samples=7", "partition=dirichlet"]
    with pytest.raises(ConfigError) as refusal:
        run(tmp_path, others, resume=str(folder))
    for key in ("strategy.name=livar instead of fedavg", "lora.rank", "train.lr", "batch_size", "local_epochs"):
        assert key in str(refusal.value)
    assert "max_test_samples=7 instead of 20" in str(refusal.value)
    assert "strategy.head" not in str(refusal.value)
