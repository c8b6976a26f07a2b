"""Real runs with every tracker, gone on with, and read back by the tracker's own reader."""

import json
import struct

import pytest

from client_app.app import app as client_app
from server_app.app import run_federation
from server_app.compose import compose_run
from server_app.trackers import TrackerConfig, Tracking
from strategies.report import RoundReport
from task.errors import ConfigError
from tests.server_app.test_app import DIGITS
from tools.debug import InProcessGrid, simulated_nodes


def run(tmp_path, tracker, rounds=2, resume=""):
    overrides = [*DIGITS, f"tracker={tracker}", "tracker.project=flowers", f"num_server_rounds={rounds}"]
    composed = compose_run({"runs-dir": str(tmp_path / "runs")}, overrides=overrides)
    return run_federation(InProcessGrid(client_app, simulated_nodes(2)), composed, str(resume))


def gone_on_with(tmp_path, tracker):
    """Make a run of one round, and go on with it to a second one."""
    folder = run(tmp_path, tracker, rounds=1)
    assert run(tmp_path, tracker, rounds=2, resume=folder) == folder
    return folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _own_mode(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_tensorboard_shows_every_round(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, reports = gone_on_with(tmp_path, "tensorboard")
    found = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    for name, values in expected(reports).items():
        assert [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)] == values


@pytest.mark.slow
def test_mlflow_has_one_run_with_every_round(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    folder, reports = gone_on_with(tmp_path, "mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("flowers")
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (folder.name, "FINISHED")
    assert found.data.params["partition.kind"] == "iid"
    for name, values in expected(reports).items():
        history = client.get_metric_history(found.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == values


@pytest.mark.slow
def test_wandb_keeps_offline_parts_of_one_run(tmp_path):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    folder, reports = gone_on_with(tmp_path, "wandb")
    parts = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert [part.name for part in parts] == [f"run-{folder.name}.wandb"] * 2
    rows = [row for part in parts for row in offline_history(part)]
    for name, values in expected(reports).items():
        assert [(int(row["_step"]), float(row[name])) for row in rows if name in row] == values


def offline_history(path):
    """Read history records by W&B's own messages; its Python has no reader of the LevelDB log that holds them."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in leveldb_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            yield {item.key or "/".join(item.nested_key): item.value_json for item in items}


def leveldb_records(log, block=32_768, header=7):
    """Join the fragments of records; seven bytes of W&B's own come first, and blocks end in padding."""
    position, parts = header, []
    while position + header <= len(log):
        if block - position % block < header:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", log, position)
        parts.append(log[position + header : position + header + length])
        position += header + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield b"".join(parts)
            parts = []


def expected(reports):
    """Take some of what metrics.jsonl says, by the trackers' names and with the rounds."""
    assert [report["server_round"] for report in reports] == [0, 1, 2]
    return {
        "central/accuracy": [(report["server_round"], report["central"]["accuracy"]) for report in reports],
        "bytes/up": [(report["server_round"], report["bytes_up"]) for report in reports],
        "clients/used": [(report["server_round"], len(report["clients_used"])) for report in reports],
    }


def test_a_failure_is_told_once_and_ends_the_tracking_alone(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    tracking = Tracking(TrackerConfig("tensorboard"))
    (tmp_path / "tensorboard").write_text("a file where a folder is to be")
    tracking.start({}, tmp_path)
    tracking.round(RoundReport(1))
    tracking.end(finished=True)
    [record] = [record for record in caplog.records if "no longer tracked" in record.message]
    assert record.message.startswith("The run is no longer tracked: tensorboard: ")


def test_a_missing_package_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr("server_app.trackers.tracking.PACKAGES", {"wandb": ("no_such_package",)})
    with pytest.raises(ConfigError, match=r"no_such_package must be installed: pip install .*\[wandb\]"):
        Tracking(TrackerConfig("wandb"))


def test_without_a_tracker_nothing_happens(tmp_path):
    tracking = Tracking()
    tracking.start({}, tmp_path)
    tracking.round(RoundReport(0))
    tracking.end(finished=True)
    assert not list(tmp_path.iterdir())
