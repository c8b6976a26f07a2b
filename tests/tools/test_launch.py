"""The launcher against the real Flower: an app of a few lines, completed, failing, refused, too long, interrupted."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from task.errors import ConfigError, PetalwiseError
from tools import superlink
from tools.launch import RunOutcome, SimulationSuperLink, main, run_app
from tools.simulation import _complete_run_config, _RunLog

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 120.0

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "tiny"
version = "1.0.0"
description = "An app that does as it is told"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "tester"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "tiny.server_app:app"
clientapp = "tiny.client_app:app"

[tool.flwr.app.config]
mode = "query"
runs-dir = ""
"""

SERVER_APP = """
import time

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()


@app.main()
def main(grid, context):
    mode = context.run_config["mode"]
    print(f"mode {mode}, runs in {context.run_config['runs-dir']}")
    if mode == "raise":
        raise ValueError("told to fail")
    while mode == "sleep":
        print("still asleep")
        time.sleep(0.5)
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.1)
    content = RecordDict({"config": ConfigRecord({})})
    asked = [Message(content, dst_node_id=node, message_type=MessageType.QUERY) for node in nodes]
    for reply in grid.send_and_receive(asked):
        print("client sees", reply.content["config"]["data"], "from", reply.content["config"]["file"])
    print("the last line")
"""

CLIENT_APP = """
import os

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query()
def query(message, context):
    seen = ConfigRecord({"data": os.environ["PETALWISE_DATA"], "file": __file__})
    return Message(RecordDict({"config": seen}), reply_to=message)
"""


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    package = folder / "tiny"
    package.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "LICENSE").write_text("None needed.\n")
    (package / "__init__.py").write_text("")
    (package / "server_app.py").write_text(SERVER_APP)
    (package / "client_app.py").write_text(CLIENT_APP)
    return folder


def processes_that_see(data: Path) -> list[Path]:
    """All processes with `data` as PETALWISE_DATA: what a launcher with ``--data`` started, whatever became of it."""
    mark = f"PETALWISE_DATA={data}\0".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or just ended
            if mark in environment.read_bytes():
                found.append(environment.parent)
    return found


@pytest.mark.e2e
@pytest.mark.slow
def test_completed_run_exits_0_and_shows_its_log(app: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--data", str(tmp_path), "--runs-dir", str(tmp_path / "runs")]
    code = main([str(app), "--clients", "2", *where, "--timeout", str(PATIENCE)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines.count(f"mode query, runs in {tmp_path / 'runs'}") == 1
    replies = [line for line in lines if line.startswith(f"client sees {tmp_path} ")]
    assert len(replies) == 2
    assert all("/home/apps/" in reply for reply in replies), "the client must be the installed app's"
    assert lines.count("the last line") == 1
    assert "finished:completed" in lines[-1]
    assert not processes_that_see(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulationSuperLink]:
    """One SuperLink for several command lines, which thus need not start their own."""
    data = tmp_path_factory.mktemp("data")
    with SimulationSuperLink(data=data) as link:
        yield link
    assert not processes_that_see(data)


def run_on(link: SimulationSuperLink, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> int:
    def run_app_there(app: Path, *, data: None, backbones: None, keep: bool, **options: Any) -> RunOutcome:
        return link.run(app, **{**options, "timeout": options["timeout"] or PATIENCE})

    monkeypatch.setattr("tools.launch.run_app", run_app_there)
    return main(arguments)


@pytest.mark.e2e
@pytest.mark.slow
def test_undeclared_key_exits_2_and_names_the_key(
    app: Path, shared: SimulationSuperLink, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(shared, monkeypatch, [str(app), "-c", 'colour="red"']) == 2
    assert "'colour'" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.slow
def test_run_that_lasts_too_long_exits_1(
    app: Path, shared: SimulationSuperLink, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(shared, monkeypatch, [str(app), "-c", 'mode="sleep"', "--timeout", "8"]) == 1
    assert re.search("finished:stopped .* longer than 8 seconds", capsys.readouterr().err)


@pytest.mark.e2e
@pytest.mark.slow
def test_raising_server_app_exits_1_with_the_reason(
    app: Path, shared: SimulationSuperLink, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_on(shared, monkeypatch, [str(app), "--clients", "2", "-c", 'mode="raise"']) == 1
    error = capsys.readouterr().err
    assert "finished:failed" in error
    assert "ValueError: told to fail" in error


@pytest.mark.e2e
@pytest.mark.slow
def test_interrupt_stops_everything(app: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.launch", str(app), "--clients", "2", "--data", str(tmp_path)]
    command += ["-c", 'mode="sleep"', "--timeout", str(PATIENCE), "--runs-dir", str(tmp_path / "runs")]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        assert launcher.stdout is not None
        assert any("still asleep" in line for line in launcher.stdout)
        started = processes_that_see(tmp_path)
        assert started
        [home] = set(re.findall(r"\0FLWR_HOME=([^\0]*)", "".join((p / "environ").read_text() for p in started)))
        begun = tmp_path / "runs" / "20261122-080000-fedavg"  # as an app would that keeps its runs
        begun.mkdir(parents=True)
        (begun / "config.yaml").touch()
        launcher.send_signal(signal.SIGINT)
        _, error = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 128 + signal.SIGINT
    assert "SIGINT" in error
    assert f"""To go on, add -c 'resume="{begun}"' to the command.""" in error
    assert not processes_that_see(tmp_path)
    assert not Path(home).parent.exists()


def test_refusal_and_failure_have_different_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code in [(ConfigError("no such key"), 2), (PetalwiseError("no SuperLink"), 1)]:

        def fail(*_: object, error: PetalwiseError = error, **__: object) -> RunOutcome:
            raise error

        monkeypatch.setattr("tools.launch.run_app", fail)
        assert main([]) == code
        assert capsys.readouterr().err == f"{error}\n"


def test_superlink_that_does_not_start_is_told_with_its_output(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "flower-superlink"
    broken.write_text("#!/bin/sh\necho the port is taken\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(superlink, "executable", lambda name: str(broken))
    with pytest.raises(PetalwiseError, match=r"exited with code 3 before it answered(?s:.*)the port is taken"):
        run_app(app, output=None)


def test_runs_dir_is_added_to_pairs_unless_given(tmp_path: Path) -> None:
    runs = Path("/data/my runs")
    assert _complete_run_config(["seed=1"], runs, tmp_path) == ["seed=1", 'runs-dir="/data/my runs"']
    assert _complete_run_config(["runs-dir='/elsewhere' seed=1"], runs, tmp_path) == ["runs-dir='/elsewhere' seed=1"]


def test_runs_dir_is_added_to_a_file_unless_given(tmp_path: Path) -> None:
    given = tmp_path / "mine.toml"
    given.write_text("seed = 1\n[train]\nlr = 0.1\n")
    [completed] = _complete_run_config([str(given)], Path("/runs"), tmp_path)
    assert Path(completed).read_text() == 'runs-dir = "/runs"\nseed = 1\n[train]\nlr = 0.1\n'
    given.write_text("seed = \n")
    with pytest.raises(ConfigError, match=r"mine\.toml cannot be read"):
        _complete_run_config([str(given)], Path("/runs"), tmp_path)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["lr = 0.3"], "would ignore 'lr = 0.3'"),
        (["seed=1", "mine.toml"], "must be the only value"),
        (['runs-dir="runs"'], "'runs' is relative"),
    ],
)
def test_run_config_that_would_not_do_what_it_says_is_refused(given: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        _complete_run_config(given, Path("/runs"), tmp_path)


def test_log_that_breaks_off_is_resumed_without_loss_or_repeat() -> None:
    def stream(text: str) -> subprocess.Popen[str]:
        return subprocess.Popen(["printf", "%s", text], stdout=subprocess.PIPE, text=True)

    log = _RunLog(None)
    log.copy(stream("Using SuperLink: own (127.0.0.1:1)\none\n\ntwo\nth"), float("inf"))
    log.copy(
        stream("Using SuperLink: own (127.0.0.1:1)\none\n\ntwo\nthree\n\x1b[92mINFO \x1b[0m:   \nfour\n"), float("inf")
    )
    assert log.text.replace("th\nree", "three") == "one\ntwo\nthree\nfour\n"


def test_summary_repeats_the_last_errors_once() -> None:
    log = (
        "ERROR :   first\nINFO :   well\nValueError: told to fail\nValueError: told to fail\nERROR :   Exit Code: 700\n"
    )
    outcome = RunOutcome(1, "finished:failed", "it failed", 2.0, log)
    assert outcome.summary == (
        "Run 1 ended as finished:failed after 2 s: it failed\nERROR :   first\nValueError: told to fail"
    )
    log += "ERROR :   The run stops: no data.\ntask.errors.DataError: no data.\n"
    outcome = RunOutcome(1, "finished:failed", "Simulation failed with exception: no data.", 2.0, log)
    assert outcome.summary.count("no data.") == 1
    assert RunOutcome(1, "finished:completed", "", 2.0, log).summary == "Run 1 ended as finished:completed after 2 s"
