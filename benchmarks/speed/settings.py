"""What is simulated and measured: bound by what happens around training or by training, in two phases or in one."""

import json
from dataclasses import asdict, dataclass, replace

from server_app.compose import ComposedRun, compose_run
from task.backbone import resolved

NUM_WORKERS = 2
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
    """Server rounds; which are measured, says :attr:`steady`."""
    overrides: tuple[str, ...]
    """Hydra overrides of the app's config."""
    target: float
    """Share of the floor's images per second that is aimed at."""
    one_phase: bool = False
    """Whether clients evaluate what they receive while they train, rather than all clients in a phase of its own."""

    @property
    def steady(self) -> slice:
        """The rounds that are measured: not the first, nor the last where all clients evaluate after that alone."""
        return slice(1, -1 if self.one_phase else None)

    def compose(self) -> ComposedRun:
        """Compose the app's config, everything resolved."""
        run = compose_run({}, [*self.overrides, f"num_server_rounds={self.rounds}"])
        run.settings.backbone = resolved(run.settings.backbone)
        return run

    def to_json(self) -> str:
        """Serialise it, for another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Setting":
        """Rebuild it."""
        values = json.loads(text)
        return Setting(**values | {"overrides": tuple(values["overrides"])})

    @property
    def run_config(self) -> list[str]:
        """The same as Flower's run config."""
        return [f'overrides="{" ".join(self.overrides)}" num-server-rounds={self.rounds}']


def one_phase(setting: Setting) -> Setting:
    """Make one phase of each round of a setting, and call it so."""
    return replace(
        setting,
        name=f"{setting.name}_one_phase",
        shown=f"{setting.shown}, one phase per round",
        rounds=setting.rounds + 1,
        overrides=(*setting.overrides, "strategy.evaluate_clients=train"),
        one_phase=True,
    )


RANDOM = ("backbone.source=random", "dataset.max_test_samples=64", "partition=iid", "train.lr=1e-4")
TWO_PHASES = (
    Setting(
        "overhead_bound",
        "ViT-Ti at 64 px, 20 clients, 10 per round, 5 steps of 16 images",
        clients=20,
        rounds=10,
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
        "DINOv2-S at 112 px, 4 clients, 10 steps of 16 images",
        clients=4,
        rounds=5,
        overrides=(
            "backbone=dinov2_small",
            "backbone.image_size=112",
            "dataset.max_train_samples=800",
            "train.max_steps=10",
            *RANDOM,
        ),
        target=0.98,
    ),
)
SETTINGS = {setting.name: setting for given in TWO_PHASES for setting in (given, one_phase(given))}
