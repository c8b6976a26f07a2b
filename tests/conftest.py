"""A tiny task and its model, markers that need something, and one thread in a process that never looks at a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch

from task.config import BackboneConfig, LoraConfig, TaskConfig
from task.model import build_model

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_CLASSES = 5

torch.set_num_threads(1)
hypothesis.settings.register_profile("petalwise", deadline=None, derandomize=True)
hypothesis.settings.load_profile("petalwise")


def pytest_collection_modifyitems(items):
    """Begin with the tests that start processes, so that no worker is left with them alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


def pytest_runtest_setup(item):
    if item.get_closest_marker("data") and not os.environ.get("PETALWISE_TEST_DATA"):
        pytest.skip("PETALWISE_TEST_DATA names no folder")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def no_folders_of_this_machine(monkeypatch, tmp_path_factory):
    """Whoever runs the tests may have set these for real runs; clients' state goes to a folder of the tests."""
    monkeypatch.setenv("PETALWISE_STATE", str(tmp_path_factory.getbasetemp()))
    monkeypatch.delenv("PETALWISE_BACKBONES", raising=False)
    monkeypatch.delenv("PETALWISE_DATA", raising=False)


@pytest.fixture(scope="session")
def test_data():
    """The folder of real data and backbones; for tests marked ``data``."""
    return Path(os.environ["PETALWISE_TEST_DATA"])


@pytest.fixture(scope="session")
def tiny_task():
    """A ViT of two blocks at 16 px with seeded random weights. Not to be changed: use ``dataclasses.replace``."""
    arguments = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone = BackboneConfig(name="vit_tiny_patch16_224", source="random", image_size=16, arguments=arguments)
    return replace(TaskConfig(), backbone=backbone, lora=LoraConfig(rank=4, alpha=8.0))


@pytest.fixture(scope="session")
def built_model(tiny_task):
    """The tiny task's model, built once; tests take :func:`tiny_model`."""
    model = build_model(tiny_task, NUM_CLASSES)
    return model, model.read()


@pytest.fixture
def tiny_model(built_model):
    """The tiny task's model with its initial adapter, zero gradient, in evaluation mode."""
    model, initial = built_model
    model.load(initial)
    model.flat.grad.zero_()
    model.module.eval()
    return model


@pytest.fixture(scope="session")
def images():
    """Eight normalised images for the tiny model, [8, 3, 16, 16]."""
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run_python():
    """Run a program in a fresh process that finds the app, with ``first`` before all else on its path."""

    def run(program, first=""):
        paths = os.pathsep.join(filter(None, [str(first), str(REPOSITORY)]))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300, check=False
        )

    return run
