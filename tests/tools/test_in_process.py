"""Runs in processes of their own that are forked with the libraries imported."""

import json
import os

import pytest

from tools.in_process import InProcessLink
from tools.running import APP

TINY = "backbone=vit_pico_random dataset.max_train_samples=80 dataset.max_test_samples=20 train.max_steps=1"

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path):
    """Run the app with a run config; returns how that ended."""

    def start(timeout=None, link=None, **config):
        path, pairs = tmp_path / "run-config.toml", {"runs-dir": str(tmp_path / "runs"), **config}
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in pairs.items()))
        link = InProcessLink() if link is None else link
        return link.run(APP, run_config=[str(path)], clients=2, runs_dir=tmp_path, timeout=timeout, output=None)

    return start


def test_a_run_ends_with_its_folder_and_its_log(run, tmp_path):
    outcome = run(overrides=f"{TINY} num_server_rounds=1")
    assert outcome.completed, outcome.log
    [folder] = (tmp_path / "runs").iterdir()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert str(folder) in outcome.log.splitlines()[-1]


def test_a_mistake_is_the_reason_and_the_next_run_is_another(run):
    outcome = run(strategy="nope")
    assert not outcome.completed
    assert outcome.details.startswith("The run stops: strategy='nope' is not one of")
    assert run(overrides=f"{TINY} num_server_rounds=1").completed


def test_a_run_that_takes_too_long_is_killed(run):
    outcome = run(timeout=0.2, overrides=TINY)
    assert (outcome.completed, outcome.details) == (False, "it took too long")


def test_folders_are_those_of_the_link_and_not_left_behind(run, tmp_path):
    outcome = run(link=InProcessLink(data=tmp_path / "nowhere"), dataset="cifar100_parquet", overrides=TINY)
    assert str(tmp_path / "nowhere") in outcome.log
    assert "PETALWISE_DATA" not in os.environ
