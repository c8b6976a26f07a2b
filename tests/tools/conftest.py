"""Small finished runs, made once: of digits, with personal models, with a fixed A, with a delivered backbone."""

import pytest
from PIL import Image
from safetensors.torch import save_file

from client_app.app import app as client_app
from server_app.app import run_federation
from server_app.compose import compose_run
from task.backbone import BACKBONES_VARIABLE
from task.data.sources import DATA_VARIABLE
from task.libraries import timm
from tools.debug import InProcessGrid, simulated_nodes

ARGUMENTS = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
TINY = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    f"backbone.arguments={{{','.join(f'{name}:{value}' for name, value in ARGUMENTS.items())}}}",
    "partition=iid",
    "train.max_steps=3",
    "num_server_rounds=2",
]
DIGITS = [*TINY, "dataset.max_train_samples=100", "dataset.max_test_samples=40"]


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Make a run, or begin the one anew that has left a config; returns its folder."""

    def run(*overrides, resume="", **environment):
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"PETALWISE_STATE": folder, **environment}.items():
                patch.setenv(name, str(value))
            composed = compose_run({"runs-dir": str(folder / "runs")}, overrides)
            return run_federation(InProcessGrid(client_app, simulated_nodes(3)), composed, resume)

    return run


@pytest.fixture(scope="session")
def digits_run(finished):
    """A run of the packaged backbone that has learned something."""
    return finished("num_server_rounds=1", "dataset.max_train_samples=240", "partition=iid", "train.max_steps=8")


@pytest.fixture(scope="session")
def personal_run(finished):
    return finished(*DIGITS, "strategy=pfedla", "train.lr=0.05")


@pytest.fixture(scope="session")
def fixed_a_run(finished):
    return finished(*DIGITS, "strategy=ffa_lora")


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """A folder of backbone files."""
    folder = tmp_path_factory.mktemp("backbones")
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **ARGUMENTS)
    save_file(model.state_dict(), folder / "mine.safetensors")
    return folder


@pytest.fixture(scope="session")
def flowers(tmp_path_factory):
    """Train and test images of two classes, told apart by colour."""
    data = tmp_path_factory.mktemp("flowers")
    for split, count in (("train", 12), ("test", 4)):
        for name, colour in (("rose", (200, 0, 0)), ("tulip, red", (0, 200, 0))):
            folder = data / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 16), tuple(min(255, c + 3 * i) for c in colour)).save(folder / f"{i}.png")
    return data


@pytest.fixture(scope="session")
def flowers_run(finished, flowers, backbones):
    """A run of two classes whose clients were sent a backbone that the server had as a file."""
    source = ["backbone.source=checkpoint", "backbone.checkpoint=mine.safetensors", "backbone.deliver=true"]
    folders = {DATA_VARIABLE: flowers, BACKBONES_VARIABLE: backbones}
    return finished(*TINY, "dataset=image_folder", *source, **folders)
