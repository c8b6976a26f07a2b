"""Messages answered by forks of a resident process; one resident for all tests here."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MessageType, RecordDict

from client_app import resident
from client_app.app import app as own_app
from client_app.entry import app as entry
from client_app.node import Node
from client_app.resident import connected, private_folder, started_at, wants_resident
from task.errors import ConfigError
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


@pytest.fixture(scope="module", autouse=True)
def folder():
    """A folder of temporary files of its own, with a path as short as sockets want it."""
    found, before = tempfile.mkdtemp(prefix="plw-"), tempfile.tempdir
    tempfile.tempdir = found
    yield Path(found)
    tempfile.tempdir = before
    shutil.rmtree(found)


@pytest.fixture(scope="module")
def owner(folder):
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
    with connected() as asking:
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
    asking = connected()
    asking.send_bytes(b"/")
    wait_until(lambda: len(owner.residents()) == 2)
    asking.close()
    wait_until(lambda: len(owner.residents()) == 1)


def test_a_resident_that_was_killed_is_replaced_and_its_socket_removed(model, owner):  # noqa: F811
    before = owner.resident()
    before.kill()
    before.wait(GONE_SECONDS)
    assert not ask(grid(entry, resident=True), 1, MessageType.EVALUATE, content(model)).has_error()
    assert owner.resident().pid != before.pid
    assert len(list(private_folder().glob("*.socket"))) == 1


def test_first_messages_at_once_start_one_resident(monkeypatch):
    other = Owner()
    monkeypatch.setattr(resident.os, "getppid", lambda: other.pid)
    found = []
    threads = [threading.Thread(target=lambda: found.append(connected())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(other.residents()) == 1
    for connection in found:
        connection.close()
    other.end()
    wait_until(lambda: not other.residents())


@pytest.mark.parametrize("reaped", [True, False])
def test_a_resident_leaves_with_its_owner_and_takes_its_socket_along(monkeypatch, reaped):
    other, sockets = Owner(), set(private_folder().glob("*.socket"))
    monkeypatch.setattr(resident.os, "getppid", lambda: other.pid)
    connected().close()
    other.process.kill()  # and a zombie until it is waited for
    if reaped:
        other.end()
    wait_until(lambda: not other.residents())
    assert set(private_folder().glob("*.socket")) == sockets
    other.end()


@pytest.mark.parametrize(("idle", "there"), [(0.0, True), (3600.0, False)])
def test_a_resident_leaves_when_nobody_asks_or_can_ask(monkeypatch, folder, idle, there):
    """A message that waits already is answered: here its child finds that nobody asks any more."""
    monkeypatch.setattr(resident, "IDLE_SECONDS", idle)
    address = folder / "served.socket"
    before = signal.getsignal(signal.SIGCHLD)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as asking:
        listener.bind(str(address))
        listener.listen()
        asking.connect(str(address))
        if not there:
            address.unlink()
        resident.serve(listener, address, os.getpid())
        signal.signal(signal.SIGCHLD, before)
        asking.shutdown(socket.SHUT_WR)
        assert asking.recv(1) == b""
    assert not address.exists()


def test_importing_the_app_starts_no_thread_of_python(run_python):
    program = "import sys, threading, client_app.app; sys.exit(threading.active_count() - 1)"
    assert run_python(program).returncode == 0


def answered_without(owner, caplog, reason):
    """Tell whether a message is answered, without a further resident, and the reason is in the log."""
    query = RecordDict({CONFIG: ConfigRecord({"task": task_json(), "layout": ""})})
    known = owner.residents()
    caplog.clear()
    with caplog.at_level("WARNING", "flwr"):
        reply = ask(grid(entry, resident=True), 1, IDENTIFY, query)
    return reply.content[CONFIG]["client"] == "0" and reason in caplog.text and owner.residents() == known


def test_others_cannot_reach_it(owner, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resident.log.__self__, "propagate", True)
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    private_folder().chmod(0o755)
    assert answered_without(owner, caplog, "must be a folder that its user alone can enter; delete it, or set TMPDIR")
    private_folder_of = tmp_path / f"petalwise-{os.getuid()}"
    private_folder_of.rmdir()
    private_folder_of.symlink_to(tmp_path)
    assert answered_without(owner, caplog, "must be a folder that its user alone can enter")


def test_where_there_can_be_none_messages_are_answered_all_the_same(owner, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(resident.log.__self__, "propagate", True)
    with monkeypatch.context() as changed:
        changed.setattr(resident.os, "getppid", lambda: 0)  # as in a container of this one process
        assert answered_without(owner, caplog, "the process that starts ClientApps cannot be seen")
    with monkeypatch.context() as changed:
        changed.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
        Path(tempfile.tempdir).mkdir()
        assert answered_without(owner, caplog, "AF_UNIX path too long")
    monkeypatch.setenv("VIRTUAL_ENV", f"{tmp_path}/runtime-envs/1")
    assert answered_without(owner, caplog, "dependencies are installed anew for every message")


def test_when_a_process_began():
    assert started_at(os.getpid()) == started_at(os.getpid()) != started_at(os.getppid())
    assert started_at(0) is None


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
