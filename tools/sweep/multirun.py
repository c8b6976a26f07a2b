"""Hydra's multirun over the app's config."""

from collections.abc import Callable, Sequence
from pathlib import Path

from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from server_app.compose import CONF_FOLDER, RunSettings, refused_by_hydra

Job = Callable[[DictConfig, str, list[str]], float]
"""From composed config, strategy's file and overrides to what an optimising sweeper is told: the final accuracy."""


def multirun(job: Job, overrides: Sequence[str], folder: Path) -> None:
    """Let Hydra's sweeper make jobs of overrides and run them one after another.

    Parameters
    ----------
    job : callable
        Does a job.
    overrides : Sequence[str]
        Hydra overrides, with sweeps such as ``seed=1,2`` and choices such as ``hydra/sweeper=optuna``.
    folder : Path
        Where Hydra leaves its ``multirun.yaml``, and Optuna's sweeper its best parameters.

    Raises
    ------
    ConfigError
        If Hydra refuses the overrides; nothing has run then.
    PetalwiseError
        If no job can be run.
    """

    def task(composed: DictConfig) -> float:
        hydra = HydraConfig.get()
        return job(composed, str(hydra.runtime.choices["strategy"]), list(hydra.overrides.task))

    ConfigStore.instance().store(name="schema", node=RunSettings)
    with initialize_config_dir(config_dir=str(CONF_FOLDER), version_base=None), refused_by_hydra(overrides):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun("config", task, [*_own_options(folder), *overrides])


def _own_options(folder: Path) -> list[str]:
    """Keep Hydra from changing how this process logs, and from making a folder for every job."""
    return [
        f'hydra.sweep.dir="{folder}"',
        "hydra.sweep.subdir=.",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]
