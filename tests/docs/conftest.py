"""A folder in which the commands of the docs find what they speak of: small finished runs, images, a site's folders."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from client_app.app import app
from server_app.app import run_federation
from server_app.compose import compose_run
from tools.debug import InProcessGrid, simulated_nodes

DATA = [
    "dataset.max_train_samples=300",
    "dataset.max_test_samples=40",
    "partition.min_samples=2",
    "train.max_steps=2",
    "num_server_rounds=2",
]
SMALL = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    "backbone.arguments={patch_size:4,embed_dim:32,depth:2,num_heads:2}",
    *DATA,
]
"""What makes a command of the docs a matter of seconds."""
RUN = re.compile(r"runs/(?:\d{8}-\d{6}-(?P<strategy>\w+)|[ab])")


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Make a small run of a strategy, once; returns its folder."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides):
        if overrides not in made:
            folder = tmp_path_factory.mktemp("run")
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PETALWISE_STATE", str(folder))
                composed = compose_run({"runs-dir": str(folder / "runs")}, overrides)
                made[overrides] = run_federation(InProcessGrid(app, simulated_nodes(4)), composed)
        return made[overrides]

    return run


@pytest.fixture
def workspace(tmp_path, finished, monkeypatch):
    """Go to a folder of images, with a place for what lies below ``/srv``; returns what puts a command's runs there."""
    monkeypatch.chdir(tmp_path)
    for name in ("srv/state", "srv/backbones", "new_images", *(f"srv/images/{kind}" for kind in ("rose", "tulip"))):
        Path(name).mkdir(parents=True)
    for number in range(8):
        for folder in ("new_images", "srv/images/rose", "srv/images/tulip"):
            Image.new("RGB", (20, 16), (20 * number, 100, 30)).save(Path(folder, f"{number}.png"))

    def provide(words):
        for run in filter(None, map(RUN.fullmatch, words)):
            shutil.copytree(finished(*SMALL, f"strategy={run['strategy'] or 'livar'}"), run[0])
        here = [word.replace("/srv/", f"{tmp_path}/srv/") for word in words]
        return here if torch.cuda.is_available() else ["cpu" if word == "cuda" else word for word in here]

    return provide


@pytest.fixture
def start(monkeypatch):
    """Run a module as ``python -m`` does, and expect success."""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        code = None
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            code = left.code
        assert not code, code

    return run
