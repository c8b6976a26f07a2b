"""Real runs of a tiny model over real data, made once; and run folders written by the app's own RunFolder."""

import pytest

from client_app.app import app
from server_app.app import run_federation
from server_app.compose import compose_run
from server_app.run_folder import RunFolder
from strategies.report import RoundReport
from tools.debug import InProcessGrid, simulated_nodes

CLIENTS = 4
TINY = [
    "backbone=vit_pico_random",
    "backbone.image_size=16",
    "backbone.arguments.embed_dim=32",
    "backbone.arguments.depth=2",
    "backbone.arguments.num_heads=2",
    "dataset.max_train_samples=120",
    "dataset.max_test_samples=40",
    "partition.min_samples=2",
    "train.device=cpu",
    "train.max_steps=2",
]
RUNS = {
    "livar": ["num_server_rounds=3"],
    "fedlama": ["num_server_rounds=4", "strategy.evaluate_clients=off"],
    "pfedla": ["num_server_rounds=3", "strategy.evaluate_tuned=true"],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Run folders by strategy."""
    parent = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PETALWISE_STATE", str(parent))
        return {
            name: run_federation(
                InProcessGrid(app, simulated_nodes(CLIENTS)),
                compose_run({}, [*TINY, f"strategy={name}", f"runs_dir={parent / 'runs'}", *options]),
            )
            for name, options in RUNS.items()
        }


@pytest.fixture
def written(tmp_path):
    """Write a run folder of given reports, and return its path."""

    def write(*reports, name="fedavg", overrides=()):
        folder = RunFolder.new(tmp_path / "runs", name, compose_run({}, overrides).yaml)
        for number, report in enumerate(reports):
            folder.append(RoundReport(**({"server_round": number} | report)))
        return folder.path

    return write
