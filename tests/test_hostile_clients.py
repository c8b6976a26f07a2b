"""Clients that answer nonsense, each in its own way, through a simulated `flwr run`: rounds go on without them."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests.conftest import REPOSITORY
from tools.simulation import SimulationSuperLink

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

MODEL = (
    "backbone.image_size=16 backbone.arguments.embed_dim=32 backbone.arguments.depth=2 backbone.arguments.num_heads=2 "
    "train.batch_size=8 train.max_steps=2 dataset.max_train_samples=300 dataset.max_test_samples=50"
)
RUN_SECONDS = 600.0


def reports_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_replies_that_cannot_be_used_are_dropped_each_with_its_reason(tmp_path):
    app, runs = tmp_path / "app", tmp_path / "runs"
    shutil.copytree(REPOSITORY / "tests" / "faulty_app", app)
    shutil.copy(REPOSITORY / "LICENSE", app)
    with SimulationSuperLink() as link:
        outcome = link.run(
            app,
            run_config=[
                'backbone="vit_pico_random" partition="iid" num-server-rounds=2',
                f'overrides="{MODEL} strategy.evaluate_clients=phase"',
            ],
            clients=12,
            runs_dir=runs,
            timeout=RUN_SECONDS,
            output=None,
        )
    assert outcome.completed, outcome.summary
    (folder,) = runs.iterdir()
    for report in reports_of(folder)[1:]:
        assert report["merged"]
        assert report["clients_used"] == ["0", "1"]
        dropped = report["clients_dropped"]
        reasons = {
            "2": "update is not finite",
            "3": "The array has shape",
            "4": "The array has shape [50000000]",
            "5": "0 array records",
            "6": "'num-examples' is None",
            "7": "'num-examples' is 0",
            "8": "'num-examples' is -5",
            "9": "'num-examples' is 1000000000000000",
            "10": "out of memory, say",
            "11": "its frozen backbone has hash 000000000000",
        }
        assert dropped.keys() == reasons.keys()
        assert {client: dropped[client] for client, reason in reasons.items() if reason not in dropped[client]} == {}
        assert len(report["clients_accuracy"]) == 12
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(bool(values.isfinite().all()) for values in adapter.values())
