"""Messages answered by forks of a resident process; one resident for all tests here."""

import os
import signal
import socket
import stat
import subprocess
import tempfile
import time
from multiprocessing.connection import Connection

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict

from client_app import resident
from client_app.app import app as own_app
from client_app.entry import app as entry
from client_app.node import Node
from client_app.resident import connected, private_folder, wants_resident
from task.errors import ConfigError, PetalwiseError
from task.messages import CONFIG, IDENTIFY, METRICS, received_flat
from tests.client_app.test_app import ask, content, model, task_json  # noqa: F401 - a fixture
from tools.debug import InProcessGrid, simulated_nodes

pytestmark = pytest.mark.slow

GONE_SECONDS = 60.0
"""One second on an idle machine."""


class Owner:
    """A process in place of the one that starts Flower's, and what it has started."""

    def __init__(self):
        self.process = subprocess.Popen(["sleep", "3600"])
        self.pid = self.process.pid

    def residents(self):
        own = ["client_app.resident", str(self.pid)]
        found = [process for process in psutil.process_iter(["cmdline"]) if process.info["cmdline"]]
        return [process for process in found if all(word in process.info["cmdline"] for word in own)]

    def resident(self):
        """The one that is no fork of another."""
        (found,) = [process for process in self.residents() if process.ppid() not in [p.pid for p in self.residents()]]
        return found

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def owner():
    found = Owner()
    yield found
    found.end()
    wait_until(lambda: not found.residents())


@pytest.fixture(autouse=True)
def owned(owner, monkeypatch):
    monkeypatch.setattr(resident.os, "getppid", lambda: owner.pid)


def wait_until(true):
    deadline = time.monotonic() + GONE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def grid(app, **config):
    return InProcessGrid(app, [{**simulated_nodes(3)[0], **config}])


def test_the_same_bits_come_back_and_one_process_serves_all_messages(model, owner):  # noqa: F811
    with_resident, without = grid(entry, resident=True), grid(own_app)
    residents = set()
    for server_round in (1, 2):
        sent = content(model, server_round)
        replies = [ask(found, 1, MessageType.TRAIN, sent) for found in (with_resident, without)]
        arrays = [received_flat(reply, model.layout.size) for reply in replies]
        np.testing.assert_array_equal(*arrays)
        assert replies[0].content[METRICS]["train-loss"] == replies[1].content[METRICS]["train-loss"]
        assert replies[0].content[CONFIG]["worker"] != replies[1].content[CONFIG]["worker"]
        residents.add(owner.resident().pid)
    assert len(residents) == 1


def test_errors_of_the_app_come_back_in_its_own_words(model):  # noqa: F811
    sent = content(model, task=task_json("dataset.max_train_samples=2"))
    replies = [ask(found, 1, MessageType.TRAIN, sent) for found in (grid(entry, resident=True), grid(own_app))]
    assert replies[0].error.reason == replies[1].error.reason != ""


def test_the_context_comes_back():
    query = RecordDict({CONFIG: ConfigRecord({"task": task_json(), "layout": ""})})
    found = grid(entry, resident=True)
    found.contexts[1].state["kept"] = ArrayRecord({"a": Array(np.arange(3))})
    assert ask(found, 1, IDENTIFY, query).content[CONFIG]["client"] == "0"
    np.testing.assert_array_equal(found.contexts[1].state["kept"]["a"].numpy(), np.arange(3))


def test_what_is_no_message_ends_its_child_alone(model, owner):  # noqa: F811
    before = owner.resident().pid
    with connected(psutil.Process(owner.pid)) as asking:
        for nonsense in (b"/", b"\xff\xff\xff", b"\xff"):
            asking.send_bytes(nonsense)
        with pytest.raises((EOFError, ConnectionResetError)):
            asking.recv_bytes()
    assert not ask(grid(entry, resident=True), 1, MessageType.EVALUATE, content(model)).has_error()
    assert owner.resident().pid == before


def test_a_killed_child_is_told_in_one_sentence(model, owner, monkeypatch):  # noqa: F811
    """The child is killed as soon as it has been forked."""
    send = Connection.send_bytes

    def send_and_kill(connection, *arguments):
        send(connection, *arguments)
        wait_until(lambda: len(owner.residents()) == 2)
        next(process for process in owner.residents() if process.pid != owner.resident().pid).kill()
        monkeypatch.setattr(Connection, "send_bytes", send)

    wait_until(lambda: len(owner.residents()) == 1)
    monkeypatch.setattr(Connection, "send_bytes", send_and_kill)
    reply = ask(grid(entry, resident=True), 1, MessageType.EVALUATE, content(model))
    assert "ended without a reply" in reply.error.reason


def test_a_child_leaves_with_who_asked(owner):
    asking = connected(psutil.Process(owner.pid))
    asking.send_bytes(b"/")
    wait_until(lambda: len(owner.residents()) == 2)
    asking.close()
    wait_until(lambda: len(owner.residents()) == 1)


def test_a_resident_that_was_killed_is_replaced(model, owner):  # noqa: F811
    before = owner.resident()
    before.send_signal(signal.SIGKILL)
    wait_until(lambda: not owner.residents())
    assert not ask(grid(entry, resident=True), 1, MessageType.EVALUATE, content(model)).has_error()
    assert owner.resident().pid != before.pid


def test_a_resident_leaves_with_its_owner_and_takes_its_socket_along():
    other = Owner()
    connected(psutil.Process(other.pid)).close()
    sockets = {path.name for path in private_folder().glob("*.socket")}
    other.end()
    wait_until(lambda: not other.residents())
    assert {path.name for path in private_folder().glob("*.socket")} < sockets


def test_a_resident_leaves_when_nobody_asks(monkeypatch):
    monkeypatch.setattr(resident, "IDLE_SECONDS", 0.0)
    address = private_folder() / "idle.socket"
    before = signal.getsignal(signal.SIGCHLD)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        resident.serve(listener, address, os.getpid())
    signal.signal(signal.SIGCHLD, before)
    assert not address.exists()


def test_importing_the_app_starts_no_thread_of_python(run_python):
    program = "import sys, threading, client_app.app; sys.exit(threading.active_count() - 1)"
    assert run_python(program).returncode == 0


def test_others_cannot_reach_it(tmp_path, monkeypatch):
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    private_folder().chmod(0o755)
    with pytest.raises(PetalwiseError, match="must be a folder that its user alone can enter; delete it"):
        private_folder()
    folder = tmp_path / f"petalwise-{os.getuid()}"
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(PetalwiseError, match="must be a folder"):
        private_folder()
    query = RecordDict({CONFIG: ConfigRecord({"task": task_json(), "layout": ""})})
    assert "must be a folder" in ask(grid(entry, resident=True), 1, IDENTIFY, query).error.reason


@pytest.mark.parametrize(("given", "wanted"), [({}, False), ({"resident": False}, False), ({"resident": "true"}, True)])
def test_who_wants_it(given, wanted):
    assert wants_resident(given) is wanted
    assert Node.from_config(given, 1).resident is wanted


def test_what_is_neither_yes_nor_no_is_refused(model):  # noqa: F811
    with pytest.raises(ConfigError, match="resident='yes'; it may be true or false"):
        wants_resident({"resident": "yes"})
    reply = ask(grid(entry, resident="yes"), 1, MessageType.EVALUATE, content(model))
    assert reply.error.reason == "The node config has resident='yes'; it may be true or false."


def test_what_flower_loads_imports_next_to_nothing(run_python):
    program = (
        "import sys, client_app.entry; sys.exit(any(name in sys.modules for name in ('torch', 'timm', 'datasets')))"
    )
    assert run_python(program).returncode == 0
