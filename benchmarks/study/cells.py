"""The cells of a study: which there are, in which order, and the run config of each."""

import itertools
from dataclasses import dataclass
from typing import Any

from benchmarks.study.study import Study
from task.errors import ConfigError
from tools.configs import composed_config, without_folder

Values = tuple[tuple[str, Any], ...]
"""Values of tuned options by Hydra key."""


@dataclass(frozen=True)
class Cell:
    """One method in one setting with one seed.

    Parameters
    ----------
    setting : str
        Name of the setting.
    method : str
        Name of the method.
    seed : int
        Seed of the run.
    values : Values, default ()
        Values of the tuned options.
    tuning : bool, default False
        Whether it is there to choose among such values, or to be compared.
    """

    setting: str
    method: str
    seed: int
    values: Values = ()
    tuning: bool = False

    @property
    def key(self) -> str:
        """Name of the cell's files; of a compared cell the same whatever values are chosen."""
        if self.tuning:
            return f"tune__{self.method}__{shown(self.values).replace(' ', ',').replace('/', '-')}"
        return f"{self.setting}__{self.method}__seed{self.seed}"


def shown(values: Values) -> str:
    """Write values of tuned options as Hydra overrides, ``train.lr=0.001``."""
    return " ".join(f"{key}={value}" for key, value in values)


def tuning_cells(study: Study) -> list[Cell]:
    """List the cells that choose options, by method and in the order of the grid."""
    tuning = study.tuning
    return [
        Cell(tuning.setting, method.name, tuning.seed, tuple(zip(grid, values, strict=True)), tuning=True)
        for method in study.methods
        if (grid := study.grid_of(method.name))
        for values in itertools.product(*grid.values())
    ]


def compared_cells(study: Study) -> list[Cell]:
    """List the cells of the table, without tuned values: the first seed over everything, then the next."""
    return [
        Cell(setting.name, method.name, seed)
        for seed in study.seeds
        for setting in study.settings
        for method in study.methods
    ]


def clients_of(study: Study, cell: Cell) -> int:
    """Return the number of simulated clients of a cell."""
    return study.setting(cell.setting).clients or study.clients


def run_config_of(study: Study, cell: Cell) -> dict[str, Any]:
    """Put together Flower's run config for a cell, without ``runs-dir``."""
    setting, method = study.setting(cell.setting), study.method(cell.method)
    parts = [study.base, setting, method]
    config = {key: value for part in parts for key, value in part.config.items()}
    overrides = [override for part in parts for override in part.overrides]
    if cell.tuning:
        overrides += study.tuning.overrides
    overrides += [f"{key}={value}" for key, value in cell.values]
    return {**config, "strategy": method.strategy, "seed": cell.seed, "overrides": " ".join(overrides)}


def config_of(study: Study, cell: Cell) -> dict[str, Any]:
    """Compose a cell's config.

    Returns
    -------
    dict[str, Any]
        As plain values; wherever its results lie plays no part.

    Raises
    ------
    ConfigError
        If the app refuses the config; the sentence begins with the cell's key.
    """
    run_config = run_config_of(study, cell)
    seed = run_config.pop("seed")
    try:
        composed = composed_config(run_config)
    except ConfigError as error:
        raise ConfigError(f"{cell.key}: {error}") from error
    return without_folder({**composed, "seed": seed})
