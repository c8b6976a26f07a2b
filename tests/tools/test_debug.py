"""The app in one process: its command line, from the overrides to the run folder or the one sentence."""

import subprocess
import sys

from tests.conftest import REPOSITORY

TINY = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    "backbone.arguments.embed_dim=32",
    "backbone.arguments.depth=2",
    "backbone.arguments.num_heads=2",
    "dataset.max_train_samples=60",
    "dataset.max_test_samples=20",
    "partition=iid",
    "train.max_steps=1",
    "num_server_rounds=1",
]


def debug(*arguments):
    command = [sys.executable, "-m", "tools.debug", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


def test_a_tiny_run_completes(tmp_path):
    runs = tmp_path / "runs with a blank"
    result = debug("--clients", "2", *TINY, f"runs_dir={runs}")
    assert result.returncode == 0, result.stderr
    [folder] = runs.iterdir()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert result.stdout.splitlines()[-1].startswith(f"{folder} after ")


def test_a_wrong_strategy_ends_in_one_sentence():
    result = debug("strategy=fedavgg")
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert line.startswith("The run stops: strategy='fedavgg' is not one of: ")
    assert line.endswith("Did you mean 'fedavg'?")


def test_no_clients_are_refused():
    result = debug("--clients", "0")
    assert result.returncode == 1
    assert "at least 1 client" in result.stderr
    assert "Traceback" not in result.stderr
