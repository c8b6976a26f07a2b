"""Replies are fetched as they come, and what a run is at can be read while it waits."""

import json

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from client_app.app import app as client_app
from server_app.app import run_federation
from server_app.compose import compose_run
from server_app.gathering import GatheringGrid
from server_app.run_folder import STATE
from task.errors import StateError, TooFewClientsError
from tests.server_app.test_app import DIGITS, run
from tools.debug import InProcessGrid, simulated_nodes

app = ClientApp()


@app.train()
def train(message, context):
    return Message(RecordDict({"config": ConfigRecord({"node": context.node_id})}), reply_to=message)


class Late(InProcessGrid):
    """Each look for replies finds one more; of the node named last, none ever comes."""

    def __init__(self, clients, lost=0):
        super().__init__(app, simulated_nodes(clients))
        self.lost, self.looks = lost, 0

    def pull_messages(self, message_ids):
        self.looks += 1
        found = [i for i in sorted(message_ids) if self._replies[i].metadata.src_node_id != self.lost]
        return super().pull_messages(found[:1])


def ask(grid, told, clients, timeout=None):
    messages = [Message(RecordDict(), node, "train") for node in range(1, clients + 1)]
    gathering = GatheringGrid(grid, lambda sent, answered: told.append((len(sent), answered)))
    return [reply.content["config"]["node"] for reply in gathering.send_and_receive(messages, timeout=timeout)]


def test_replies_are_told_as_they_come_and_the_last_ends_the_wait():
    told, grid = [], Late(3)
    assert ask(grid, told, 3) == [1, 2, 3]
    assert told == [(3, 0), (3, 1), (3, 2), (3, 3)]
    assert grid.looks == 3


def test_after_the_time_limit_the_replies_that_are_there_count():
    told = []
    assert ask(Late(3, lost=2), told, 3, timeout=0.5) == [1, 3]
    assert told[-1] == (3, 2)


def test_a_message_that_could_not_be_sent_is_not_waited_for():
    class Refusing(Late):
        def push_messages(self, messages):
            return [None, *list(super().push_messages(messages))[1:]]

    assert ask(Refusing(2), [], 2) == [2]


def test_no_message_no_wait():
    told = []
    assert ask(Late(1), told, 0) == []
    assert told == []


def state(folder):
    return json.loads((folder / STATE).read_text())


def test_a_run_says_what_it_is_at_and_how_it_ended(tmp_path):
    seen = []

    class Watching(InProcessGrid):
        def _deliver(self, message):
            seen.extend(state(folder) for folder in (tmp_path / "runs").iterdir())
            return super()._deliver(message)

    folder = run(tmp_path, [*DIGITS, "num_server_rounds=1"], Watching(client_app, simulated_nodes(3)))
    assert {"status": "running", "reason": "", "server_round": 1, "phase": "train", "asked": 3, "answered": 0} in seen
    assert any(one["phase"] == "evaluate" for one in seen)
    assert state(folder) == {
        "status": "finished",
        "reason": "",
        "server_round": 1,
        "phase": "",
        "asked": 0,
        "answered": 0,
    }


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(TooFewClientsError):
        run(tmp_path, [*DIGITS, "strategy.min_clients=4", "strategy.wait_for_clients=0.1"])
    (folder,) = (tmp_path / "runs").iterdir()
    assert state(folder)["status"] == "failed"
    assert "3 client(s) can take part, 4 are needed" in state(folder)["reason"]


def test_a_phase_is_of_the_round_that_is_going_on(tmp_path):
    """Under secure aggregation a round has messages of Flower's own, which name no round."""
    seen = []

    class Watching(InProcessGrid):
        def _deliver(self, message):
            seen.extend(state(folder) for folder in (tmp_path / "runs").iterdir())
            return super()._deliver(message)

    run(tmp_path, [*DIGITS, "privacy=secagg"], Watching(client_app, simulated_nodes(3)))
    rounds = [one["server_round"] for one in seen if one["phase"] == "train"]
    assert rounds == sorted(rounds)
    assert set(rounds) == {1, 2}


def test_an_adapter_that_cannot_be_saved_is_a_sentence_and_a_failed_run(tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server_app.app.save_adapter", full)
    with pytest.raises(StateError, match=r"the adapter cannot be saved .*No space left.* resume"):
        run(tmp_path, [*DIGITS, "num_server_rounds=1"])
    (folder,) = (tmp_path / "runs").iterdir()
    assert state(folder)["status"] == "failed"
    monkeypatch.undo()
    again = compose_run({"runs-dir": str(tmp_path / "runs")}, [*DIGITS, "num_server_rounds=1"])
    run_federation(InProcessGrid(client_app, simulated_nodes(3)), again, str(folder))
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert state(folder)["status"] == "finished"
