"""From Flower's run config to one typed, checked config, by Hydra's compose API over ``conf/``."""

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from strategies import STRATEGIES, StrategyConfig
from task.config import TaskConfig, bounded, typed
from task.errors import ConfigError

CONF_FOLDER = Path(__file__).resolve().parents[1] / "conf"
FIRST_CLASS_KEYS = ("strategy", "backbone", "dataset", "partition", "num-server-rounds", "seed", "runs-dir")


@dataclass
class RunSettings(TaskConfig):
    """The whole config of a run: the task, the strategy, and how long it goes on."""

    strategy: dict[str, Any] = field(default_factory=dict)
    """Options of the strategy; checked against the schema of the strategy named in ``strategy.name``."""
    num_server_rounds: int = bounded(5, at_least=1)
    """Number of server rounds."""
    round_timeout: float = bounded(3600.0, above=0.0)
    """Seconds to wait for the replies of a phase; later ones are not used."""
    runs_dir: str = "runs"
    """Folder for run folders; relative to the working directory of the server's process."""


@dataclass(frozen=True)
class ComposedRun:
    """A composed config and its two typed views."""

    settings: RunSettings
    """Everything, typed."""
    strategy: StrategyConfig
    """The strategy's options, typed."""
    yaml: str
    """The composed config as YAML, as saved with the run."""


def compose_run(run_config: Mapping[str, Any]) -> ComposedRun:
    """Compose the config of a run.

    Parameters
    ----------
    run_config : Mapping[str, Any]
        Flower's run config: the first-class keys, and ``overrides`` with Hydra overrides separated by blanks.

    Returns
    -------
    ComposedRun
        The checked config.

    Raises
    ------
    ConfigError
        Naming the wrong key or value and the choices there are.
    """
    overrides = _overrides(run_config)
    composed = _compose(overrides)
    settings = typed(RunSettings, composed)
    name = settings.strategy.get("name")
    if name not in STRATEGIES:
        raise ConfigError(f"strategy.name={name!r} is not one of: {', '.join(sorted(STRATEGIES))}.")
    strategy = typed(STRATEGIES[name].Config, settings.strategy)
    return ComposedRun(settings, strategy, OmegaConf.to_yaml(composed))


def _overrides(run_config: Mapping[str, Any]) -> list[str]:
    """Turn Flower's run config into a list of Hydra overrides."""
    given = {key: run_config[key] for key in FIRST_CLASS_KEYS if key in run_config}
    first_class = [f"{key.replace('-', '_')}={_quoted(key, value)}" for key, value in given.items()]
    text = str(run_config.get("overrides", ""))
    try:
        return [*first_class, *shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"overrides={text!r} cannot be split into words: {error}.") from error


def _quoted(key: str, value: Any) -> Any:
    """Quote a path so that Hydra's grammar takes it as it is."""
    return f'"{value}"' if key == "runs-dir" else value


def _compose(overrides: Sequence[str]) -> DictConfig:
    ConfigStore.instance().store(name="schema", node=RunSettings)
    with initialize_config_dir(config_dir=str(CONF_FOLDER), version_base=None):
        try:
            return compose(config_name="config", overrides=list(overrides))
        except MissingConfigException as error:
            raise ConfigError(_missing_option(error)) from error
        except HydraException as error:
            raise ConfigError(_wrong_override(error, overrides)) from error


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    choices = [choice for choice in error.options or [] if choice != "schema"]
    near = difflib.get_close_matches(option, choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{group}={option!r} is not one of: {', '.join(sorted(choices))}.{hint}"


def _wrong_override(error: HydraException, overrides: Sequence[str]) -> str:
    """Say which override is wrong and what could stand there."""
    cause = error.__cause__
    text = str(cause if isinstance(cause, OmegaConfBaseException) else error).splitlines()[0]
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0]
        if (unknown := _unknown_key(key)) is not None:
            return f"overrides: {override!r} is wrong: {unknown}"
        if key in f"{error} {getattr(cause, 'full_key', '')}":
            return f"overrides: {override!r} is wrong: {text}"
    return f"overrides: {text}"


def _unknown_key(key: str) -> str | None:
    """Say where a dotted key leaves the default config, and which keys there are; None if it exists."""
    node: Any = compose(config_name="config")
    path = key.split(".")
    for depth, part in enumerate(path):
        if not isinstance(node, DictConfig):
            return f"{'.'.join(path[:depth])!r} is a value, it has no keys."
        if part not in node:
            near = difflib.get_close_matches(part, list(map(str, node)), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            where = ".".join(path[:depth]) or "the config"
            return f"{where} has no key {part!r}; it has: {', '.join(map(str, node))}.{hint}"
        node = node[part]
    return None
