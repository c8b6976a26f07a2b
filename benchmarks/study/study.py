"""What a study file says."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from yaml import YAMLError

from server_app.compose import FIRST_CLASS_KEYS
from task.config import bounded, first_line, typed
from task.errors import ConfigError, did_you_mean

RUN_KEYS = tuple(key for key in FIRST_CLASS_KEYS if key not in ("strategy", "seed", "runs-dir"))
"""The first-class keys of Flower's run config that a study may set; it fills in the others itself."""
_NAME = re.compile(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*")  # part of a file's name, in which two underscores separate


@dataclass
class RunOptions:
    """A part of a run's config."""

    config: dict[str, Any] = field(default_factory=dict)
    """First-class keys of Flower's run config: backbone, dataset, partition, num-server-rounds."""
    overrides: list[str] = field(default_factory=list)
    """Hydra overrides."""


@dataclass
class Setting(RunOptions):
    """A column of the table: conditions under which all methods are compared."""

    name: str = MISSING
    """Name of the setting."""
    clients: int = bounded(0, at_least=0)
    """Number of simulated clients; 0: the study's."""


@dataclass
class Method(RunOptions):
    """A row of the table."""

    name: str = MISSING
    """Name of the method."""
    strategy: str = MISSING
    """File of ``conf/strategy``."""
    tune: dict[str, list[Any]] | None = None
    """Its own grid instead of the study's; ``{}``: it is not tuned."""


@dataclass
class Tuning:
    """How options are chosen for each method before the comparison, by final accuracy on the server's images."""

    setting: str = ""
    """The setting in which it is done; what is chosen holds for all settings."""
    seed: int = bounded(100, at_least=0)
    """The seed with which it is done, none of those compared."""
    overrides: list[str] = field(default_factory=list)
    """Further Hydra overrides of these cells, such as ``dataset.test_split=`` to choose by images held out of the
    training split, which no test image is among."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values to try by Hydra key, such as ``train.lr``; all combinations of several keys."""


@dataclass
class Study:
    """A comparison of methods over settings and seeds."""

    name: str = MISSING
    """Name of the folder with its results."""
    clients: int = bounded(10, at_least=1)
    """Number of simulated clients."""
    base: RunOptions = field(default_factory=RunOptions)
    """What all runs have in common; settings, methods, tuning come after it and win."""
    settings: list[Setting] = field(default_factory=list)
    """Columns of the table."""
    methods: list[Method] = field(default_factory=list)
    """Rows of the table; the others are compared with the first."""
    seeds: list[int] = bounded([0, 1, 2], at_least=0)
    """Seeds over which means and deviations are taken."""
    tuning: Tuning = field(default_factory=Tuning)
    """How options are chosen for each method before the comparison."""

    def setting(self, name: str) -> Setting:
        """Return the setting of a name."""
        return next(setting for setting in self.settings if setting.name == name)

    def method(self, name: str) -> Method:
        """Return the method of a name."""
        return next(method for method in self.methods if method.name == name)

    def grid_of(self, method: str) -> dict[str, list[Any]]:
        """Return the values to try for a method, empty if it is not tuned."""
        own = self.method(method).tune
        return self.tuning.grid if own is None else own

    def with_seeds(self, seeds: list[int]) -> "Study":
        """Return the study over other seeds, checked."""
        other = replace(self, seeds=seeds)
        _check(other)
        return other


def read_study(path: Path) -> Study:
    """Read and check a study file; options of the app itself are checked when a cell is composed.

    Parameters
    ----------
    path : Path
        The YAML file.

    Returns
    -------
    Study
        The study.

    Raises
    ------
    ConfigError
        In one sentence that begins with the file's name.
    """
    try:
        values = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"The study {path} cannot be read: {first_line(error)}.") from error
    if not isinstance(values, DictConfig):
        raise ConfigError(f"{path}: a study has keys, such as name, settings and methods; this file has none.")
    try:
        study = typed(Study, values)
        _check(study)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return study


def _check(study: Study) -> None:
    _check_names("name", [study.name])
    _check_names("settings", [setting.name for setting in study.settings])
    _check_names("methods", [method.name for method in study.methods])
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"seeds={study.seeds} must hold at least one seed, and none twice.")
    for where, part in [("base", study.base), *_named("settings", study.settings), *_named("methods", study.methods)]:
        if unknown := [key for key in part.config if key not in RUN_KEYS]:
            near = did_you_mean(unknown[0], RUN_KEYS)
            raise ConfigError(f"{where}.config has {unknown[0]!r}; it may have: {', '.join(RUN_KEYS)}.{near}")
    _check_tuning(study)


def _check_names(where: str, names: list[str]) -> None:
    if not names:
        raise ConfigError(f"{where} is empty; a study needs at least one of them.")
    for position, name in enumerate(names):
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where} has the name {name!r}; use letters, digits, dots, dashes, single underscores.")
        if name in names[:position]:
            raise ConfigError(f"{where} has the name {name!r} twice.")


def _named(where: str, parts: Iterable[Setting] | Iterable[Method]) -> list[tuple[str, RunOptions]]:
    return [(f"{where}.{part.name}", part) for part in parts]


def _check_tuning(study: Study) -> None:
    grids = {method.name: study.grid_of(method.name) for method in study.methods}
    for method, grid in grids.items():
        if empty := [key for key, values in grid.items() if not values]:
            raise ConfigError(f"The tuning grid of {method} has no values for {empty[0]!r}.")
    if not any(grids.values()):
        return
    names = [setting.name for setting in study.settings]
    if study.tuning.setting not in names:
        raise ConfigError(f"tuning.setting={study.tuning.setting!r} is not one of the settings: {', '.join(names)}.")
    if study.tuning.seed in study.seeds:
        raise ConfigError(
            f"tuning.seed={study.tuning.seed} is among the compared seeds {study.seeds}; what is chosen on a seed "
            "must not be compared on it."
        )
