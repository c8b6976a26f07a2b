"""Sweeps of real runs by the command itself: killed, gone on with, and led by Optuna."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.conftest import REPOSITORY
from tools.sweep.__main__ import main

TINY = ["num_server_rounds=1", "train.max_steps=1", "dataset.max_train_samples=120", "dataset.max_test_samples=20"]
DEADLINE = 600.0


def command(folder, *overrides):
    return [*overrides, *TINY, "--clients", "2", "--in-process", "--folder", str(folder)]


@pytest.mark.slow
@pytest.mark.e2e
def test_a_killed_sweep_goes_on_where_it_was(tmp_path, capsys):
    arguments = command(tmp_path, "strategy=fedavg,livar", "seed=1,2")
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.sweep", *arguments], cwd=REPOSITORY, start_new_session=True
    )
    began = time.monotonic()
    while not list(tmp_path.glob("cells/*.json")):
        assert process.poll() is None, "the sweep ended by itself"
        assert time.monotonic() - began < DEADLINE
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("cells/*.json")}
    assert len(before) < 4

    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert {name: (tmp_path / "cells" / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.glob("cells/*.json"))) == 4
    assert len(list(tmp_path.glob("runs/*/*/adapter/adapter_model.safetensors"))) == 4
    assert len(re.findall(r"^\[\d\] strategy=\w+ seed=\d .*: \d+\.\d %, took", out, re.MULTILINE)) == 4
    assert re.search(r"^\| strategy=fedavg \| \d+\.\d ± \d+\.\d \(2\) \|", out, re.MULTILINE)
    assert re.search(r"^\| strategy=livar \| ", out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.e2e
def test_optuna_leads_a_sweep(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="the extra optuna is not installed")
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    optuna += ["hydra.sweeper.direction=maximize", "hydra.sweeper.sampler.seed=1"]
    assert main(command(tmp_path, *optuna, "train.lr=interval(1e-4,1e-2)")) == 0
    found = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert 1e-4 <= found["best_params"]["train.lr"] <= 1e-2
    assert len(list(tmp_path.glob("cells/*.json"))) == 2


def test_wrong_overrides_and_folders_are_refused(tmp_path, capsys):
    assert main(command(tmp_path, "strategy=fedavgg,local")) == 2
    assert "Did you mean 'fedavg'?" in capsys.readouterr().err
    assert main([*command(tmp_path, "seed=1,2"), "--data", str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
