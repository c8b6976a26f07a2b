"""Every Python block of the docs is executed, those of a page one after another, in the place that the page names."""

from itertools import groupby

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from PIL import Image

from server_app.saving import open_adapter
from tests.docs.blocks import read_blocks, read_commands
from tests.docs.conftest import DATA, SMALL
from tools.debug import InProcessGrid, simulated_nodes

UNTITLED = [block for block in read_blocks() if block.language == "python" and not block.title]
PAGES = {page: list(blocks) for page, blocks in groupby(UNTITLED, key=lambda block: block.page)}

pytestmark = pytest.mark.slow


@pytest.fixture
def execute():
    """Execute the blocks of a page with some names; returns all names."""

    def run(page, **names):
        for block in PAGES[page]:
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
        return names

    return run


def test_all_pages_with_python_are_executed_here():
    assert set(PAGES) == {"README.md", "docs/carry_away.md", "docs/index.md", "docs/own_backbone.md"}


def test_a_strategy_works_in_a_server_app_of_ones_own(execute):
    app = ClientApp()

    @app.train()
    def train(message, context):
        moved = {name: Array(array.numpy() + np.float32(1)) for name, array in message.content["arrays"].items()}
        content = {"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 8})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 8, "accuracy": 0.5})}), reply_to=message)

    initial = {"w": Array(np.zeros((2, 3), np.float32))}
    names = execute("README.md", grid=InProcessGrid(app, simulated_nodes(4)), initial_arrays=ArrayRecord(initial))
    np.testing.assert_array_equal(names["result"].arrays["w"].numpy(), np.full((2, 3), 3, np.float32))


def test_exported_forms_open_and_agree(execute, finished, start, monkeypatch):
    few = ["num_server_rounds=1", "dataset.max_train_samples=240", "partition=iid", "train.max_steps=8"]
    run = finished(*few)
    start("tools.export", str(run))
    monkeypatch.chdir(run / "export")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save("image.png")
    with torch.inference_mode():
        names = execute("docs/carry_away.md")
        for form in ("adapted", "merged"):
            logits = names[form](names["images"])
            torch.testing.assert_close(logits, torch.from_numpy(names["logits"]), rtol=1e-4, atol=1e-5)
    assert np.abs(names["logits"]).max() > 0.01


def test_digits_are_made_that_a_run_classifies(execute, finished, start, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    execute("docs/index.md")
    start("tools.predict", str(finished(*SMALL)), "new_images")
    out = capsys.readouterr().out
    assert [f"{number}.png" in out for number in range(9)] == [True] * 8 + [False]


def test_a_backbone_of_ones_own_is_saved_and_trained_on(execute, start, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    execute("docs/own_backbone.md")
    [command] = [one for one in read_commands() if one.page == "docs/own_backbone.md" and one.environment]
    monkeypatch.setenv("PETALWISE_BACKBONES", command.environment["PETALWISE_BACKBONES"])
    module, *overrides = command.words[2:]
    start(module, *DATA, *overrides)
    [run] = (tmp_path / "runs").iterdir()
    assert open_adapter(run, tmp_path / "backbones")(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
