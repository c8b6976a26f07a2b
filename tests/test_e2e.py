"""The app through Flower's own commands: a real SuperLink, a real `flwr run`, real simulated nodes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tools.simulation import SimulationSuperLink

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

APP = Path(__file__).resolve().parents[1]
TINY = (
    "dataset.max_train_samples=200 dataset.max_test_samples=50 train.batch_size=8 train.max_steps=2 "
    "strategy.fraction_train=0.5 lora.dropout=0.1 schedule=fedlama wire.dtype=int8"
)
RUN_SECONDS = 300.0


@pytest.fixture(scope="module")
def superlink():
    with SimulationSuperLink() as link:
        yield link


def run(superlink, runs_dir, *pairs, clients=4):
    options = {"clients": clients, "runs_dir": runs_dir, "timeout": RUN_SECONDS, "output": None}
    return superlink.run(APP, run_config=pairs, **options)


def only_folder(runs_dir):
    (folder,) = runs_dir.iterdir()
    return folder


def test_a_run_completes_and_has_the_same_bits_as_in_one_process(superlink, tmp_path):
    """With the default backbone, whose weights the nodes have only if the app bundle holds them.

    Clients go from worker to worker between the rounds of a window, and find there what they kept.
    """
    outcome = run(
        superlink,
        tmp_path / "flower",
        'num-server-rounds=3 strategy="fedprox"',
        f'overrides="{TINY}"',
    )
    assert outcome.completed, outcome.summary
    assert "round 3/3" in outcome.log

    folder = only_folder(tmp_path / "flower")
    assert folder.name.endswith("-fedprox")
    reports = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [report["server_round"] for report in reports] == [0, 1, 2, 3]
    assert all(len(report["clients_used"]) == 2 and not report["clients_dropped"] for report in reports[1:])
    assert [len(report["clients_accuracy"]) for report in reports[1:]] == [0, 4, 4]
    parts = {"train", "wait", "steps", "aggregate", "evaluate", "total", "keep"}
    assert all(set(report["seconds"]) == parts for report in reports[2:])

    overrides = ["strategy=fedprox", "num_server_rounds=3", *TINY.split()]
    command = [sys.executable, "-m", "tools.debug", "--clients", "4", f"runs_dir={tmp_path / 'process'}", *overrides]
    subprocess.run(command, cwd=APP, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=RUN_SECONDS)
    ours = load_file(only_folder(tmp_path / "process") / "adapter" / "adapter_model.safetensors")
    theirs = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("pairs", "reasons"),
    [
        (['strategy="fedavgg"'], ["fedavgg", "fedavg", "fedprox"]),
        (['overrides="partition.min_samples=900"'], ["partition.min_samples", "min_clients"]),
    ],
)
def test_a_run_that_fails_says_why(superlink, tmp_path, pairs, reasons):
    outcome = run(superlink, tmp_path, *pairs)
    assert outcome.status == "finished:failed"
    assert 'File "' not in outcome.log
    assert "task.errors." not in outcome.log
    assert all(reason in outcome.summary for reason in reasons), outcome.summary
