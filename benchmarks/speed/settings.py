"""The two settings in which a simulation is measured: one bound by what happens around training, one by training."""

from dataclasses import dataclass

from server_app.compose import ComposedRun, compose_run
from task.backbone import resolved

WORKERS = 2
"""Worker processes of one thread each, for all arms alike."""


@dataclass(frozen=True)
class Setting:
    """A simulation, the same for every arm."""

    name: str
    """Key of its figures."""
    shown: str
    """What it is, in a phrase."""
    clients: int
    """Number of simulated clients."""
    rounds: int
    """Server rounds; all but the first are measured."""
    overrides: tuple[str, ...]
    """Hydra overrides of the app's config."""
    target: float
    """Share of the floor's images per second that is aimed at."""

    def compose(self) -> ComposedRun:
        """Compose the app's config, everything resolved."""
        run = compose_run({}, [*self.overrides, f"num_server_rounds={self.rounds}"])
        run.settings.backbone = resolved(run.settings.backbone)
        return run

    @property
    def run_config(self) -> list[str]:
        """The same as Flower's run config."""
        return [f'overrides="{" ".join(self.overrides)}" num-server-rounds={self.rounds}']


RANDOM = ("backbone.source=random", "dataset.max_test_samples=64", "partition=iid", "train.lr=1e-4")
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "overhead_bound",
            "ViT-Ti at 64 px, 20 clients, 10 per round, 5 steps of 16 images",
            clients=20,
            rounds=6,
            overrides=(
                "backbone=vit_tiny_augreg_in21k",
                "backbone.image_size=64",
                "strategy.fraction_train=0.5",
                "train.max_steps=5",
                *RANDOM,
            ),
            target=0.95,
        ),
        Setting(
            "compute_bound",
            "DINOv2-S at 112 px, 4 clients, 3 steps of 16 images",
            clients=4,
            rounds=4,
            overrides=(
                "backbone=dinov2_small",
                "backbone.image_size=112",
                "dataset.max_train_samples=280",
                "train.max_steps=3",
                *RANDOM,
            ),
            target=0.98,
        ),
    )
}
