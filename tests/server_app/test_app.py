"""Whole runs in one process: the real ServerApp code and the real ClientApp."""

import io
import json
import logging
from pathlib import Path

import pytest
import yaml
from flwr.app import Context, RecordDict
from flwr.common.logger import FLOWER_LOGGER
from PIL import Image
from safetensors.torch import load_file

from client_app.app import app as client_app
from server_app.app import main, run_federation
from server_app.compose import compose_run
from server_app.saving import open_adapter
from task.data.sources import DATA_VARIABLE
from task.errors import ConfigError, TooFewClientsError
from tools.debug import InProcessGrid, simulated_nodes

TINY = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    "backbone.arguments={patch_size:4,embed_dim:32,depth:2,num_heads:2}",
    "train.max_steps=2",
    "num_server_rounds=2",
]
DIGITS = [*TINY, "dataset.max_train_samples=100", "dataset.max_test_samples=20", "partition=iid"]


def run(tmp_path, overrides, grid=None):
    composed = compose_run({"runs-dir": str(tmp_path / "runs")}, overrides=overrides)
    return run_federation(grid or InProcessGrid(client_app, simulated_nodes(3)), composed)


def reports(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("level", "told"), [("", [True, False]), ("debug", [True, True])])
def test_the_sentence_of_an_error_stands_in_the_log_once(monkeypatch, level, told):
    monkeypatch.setenv("FLWR_LOG_LEVEL", level)
    monkeypatch.setattr(FLOWER_LOGGER, "filters", [])
    written, handler = io.StringIO(), logging.StreamHandler()
    handler.setStream(written)
    monkeypatch.setattr(FLOWER_LOGGER, "handlers", [handler])
    context = Context(0, 0, {}, RecordDict(), {"strategy": "nope"})
    with pytest.raises(ConfigError, match="strategy='nope' is not one of: ") as caught:
        main(InProcessGrid(client_app, []), context)
    FLOWER_LOGGER.error("Simulation raised an exception", exc_info=caught.value)
    ours, flowers = written.getvalue().split("Simulation raised an exception")
    assert [str(caught.value) in part for part in (ours, flowers)] == told
    assert ('File "' in flowers) is told[1]


@pytest.fixture
def flowers(tmp_path):
    """A folder per class, told apart by colour, in train/ and test/."""
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in (("rose", (200, 0, 0)), ("tulip", (0, 200, 0))):
            folder = tmp_path / "flowers" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 16), tuple(min(255, c + 3 * i) for c in colour)).save(folder / f"{i}.png")
    return tmp_path / "flowers"


def test_a_run_leaves_config_metrics_and_an_adapter_that_opens(tmp_path):
    folder = run(tmp_path, [*DIGITS, "strategy=fedprox", "strategy.proximal_mu=0.5"])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["strategy"]["proximal_mu"] == 0.5
    assert config["backbone"]["arguments"]["depth"] == 2
    rounds = reports(folder)
    assert [report["merged"] for report in rounds] == [False, True, True]
    assert all(0 <= report["central"]["accuracy"] <= 1 for report in rounds)
    assert open_adapter(folder).get_base_model().num_classes == 10


def test_ones_own_folder_of_images(tmp_path, flowers, monkeypatch):
    monkeypatch.setenv(DATA_VARIABLE, str(flowers))
    folder = run(tmp_path, [*TINY, "dataset=image_folder", "partition=iid"])
    assert reports(folder)[-1]["clients_used"] == ["0", "1", "2"]
    assert "rose, tulip" in (folder / "adapter" / "README.md").read_text()


def test_a_server_without_data_takes_the_classes_from_the_config(tmp_path, flowers, monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    sites = [{"name": f"site-{i}", "data": str(flowers)} for i in range(2)]
    overrides = [*TINY, "dataset=image_folder", "partition=whole", "dataset.classes=[rose,tulip]"]
    folder = run(tmp_path, overrides, InProcessGrid(client_app, sites))
    last = reports(folder)[-1]
    assert last["central"] == {}
    assert set(last["clients_accuracy"]) == {"site-0", "site-1"}


def test_a_run_that_fails_late_keeps_what_it_has_learned(tmp_path):
    class FailingGrid(InProcessGrid):
        def _deliver(self, message):
            return "lost" if message.metadata.group_id == "2" else super()._deliver(message)

    grid = FailingGrid(client_app, simulated_nodes(3))
    with pytest.raises(TooFewClientsError, match="no reply within the timeout"):
        run(tmp_path, [*DIGITS, "strategy.max_failed_rounds=1", "round_timeout=0.2"], grid)
    (folder,) = (tmp_path / "runs").iterdir()
    assert open_adapter(folder).get_base_model().num_classes == 10
    assert [report["merged"] for report in reports(folder)] == [False, True, False]


def test_a_backbone_that_the_server_alone_has_is_sent_once_to_every_node(tmp_path):
    """Each node has a folder of its own; one finds its file damaged before the second run."""
    nodes = [{**config, "state": str(tmp_path / f"node-{i}")} for i, config in enumerate(simulated_nodes(3))]
    for node in nodes:
        Path(node["state"]).mkdir()
    plain = run(tmp_path / "plain", DIGITS, InProcessGrid(client_app, nodes))
    first = run(tmp_path / "first", [*DIGITS, "backbone.deliver=true"], InProcessGrid(client_app, nodes))
    files = [next((Path(node["state"]) / "backbones").iterdir()) for node in nodes]
    assert len({file.name for file in files}) == 1
    files[1].write_bytes(b"damaged")
    size = files[0].stat().st_size
    second = run(tmp_path / "second", [*DIGITS, "backbone.deliver=true"], InProcessGrid(client_app, nodes))
    asked = reports(plain)[0]["bytes_down"]
    sent = [reports(folder)[0]["bytes_down"] // size for folder in (plain, first, second)]
    assert sent == [0, 3, 1]
    assert reports(first)[1]["bytes_down"] == pytest.approx(reports(plain)[1]["bytes_down"], abs=500)
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (plain, first, second)]
    assert all(adapters[0][name].equal(other[name]) for other in adapters[1:] for name in other)
    assert asked < 10_000
    assert open_adapter(first).get_base_model().num_classes == 10
