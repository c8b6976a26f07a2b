"""From Flower's run config to one typed, checked config, by Hydra's compose API over ``conf/``."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from server_app.trackers import TrackerConfig
from strategies import (
    SCHEDULES,
    STRATEGIES,
    CalibrationConfig,
    LayerwiseStrategy,
    ScheduleConfig,
    StrategyConfig,
)
from task.config import TaskConfig, bounded, explained, first_line, typed
from task.errors import ConfigError, did_you_mean
from task.privacy import PrivacyConfig
from task.wire import WireConfig

T = TypeVar("T")
CONF_FOLDER = Path(__file__).resolve().parents[1] / "conf"
FIRST_CLASS_KEYS = ("strategy", "backbone", "dataset", "partition", "num-server-rounds", "seed", "runs-dir")
_WORD = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\S)+""")  # ends at a blank outside of quotes


@dataclass
class RunSettings(TaskConfig):
    """The whole config of a run: the task, the strategy, and how long it goes on."""

    strategy: dict[str, Any] = field(default_factory=dict)
    """Options of the strategy; checked against the schema of the strategy named in ``strategy.name``."""
    schedule: dict[str, Any] = field(default_factory=dict)
    """Which layer units travel when; checked against the schema of the schedule named in ``schedule.name``."""
    wire: WireConfig = field(default_factory=WireConfig)
    """How adapter and head travel."""
    num_server_rounds: int = bounded(5, at_least=1)
    """Number of server rounds."""
    round_timeout: float = bounded(3600.0, above=0.0)
    """Seconds to wait for the replies of a phase; later ones are not used."""
    runs_dir: str = "runs"
    """Folder for run folders; relative to the working directory of the server's process."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    """Differential privacy of what clients send, or secure aggregation."""
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    """Recalibration of the head, carried by any strategy."""
    record_updates: bool = False
    """Keep every client's update and signals of every round in the run folder, for ``make explain``."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Who else is told of the rounds."""


@dataclass(frozen=True)
class ComposedRun:
    """A composed config and its two typed views."""

    settings: RunSettings
    """Everything, typed."""
    strategy: StrategyConfig
    """The strategy's options, typed."""
    schedule: ScheduleConfig
    """The schedule's options, typed."""
    choice: str
    """What ``strategy=`` was given: the name of the strategy, or of a preset such as ``livar_ccvr``."""
    yaml: str
    """The composed config as YAML without interpolations, as saved with the run."""


def compose_run(run_config: Mapping[str, Any], overrides: Sequence[str] = ()) -> ComposedRun:
    """Compose the config of a run.

    Parameters
    ----------
    run_config : Mapping[str, Any]
        Flower's run config: the first-class keys, and ``overrides`` with Hydra overrides separated by blanks.
        Quotes belong to the overrides, as in ``dataset.classes=["rose, wild",tulip]``; blanks inside them separate
        nothing.
    overrides : Sequence[str], default ()
        Further Hydra overrides, one each; they win.

    Returns
    -------
    ComposedRun
        The checked config.

    Raises
    ------
    ConfigError
        Naming the wrong key or value and the choices there are.
    """
    return check_composed(*_compose([*_overrides(run_config), *overrides]))


def check_composed(composed: DictConfig, choice: str) -> ComposedRun:
    """Check a composed config and give it its types.

    Parameters
    ----------
    composed : DictConfig
        The config, all groups filled in.
    choice : str
        What ``strategy=`` was given.

    Raises
    ------
    ConfigError
        As :func:`compose_run`.
    """
    settings = typed(RunSettings, OmegaConf.to_container(composed))  # plain, as ``+key=value`` may add unknown keys
    kind = _named("strategy", settings.strategy, STRATEGIES)
    strategy = typed(kind.Config, settings.strategy, "strategy.")
    moves = _named("schedule", settings.schedule, SCHEDULES)
    schedule = typed(moves.Config, settings.schedule, "schedule.")
    if kind.freezes_a and not settings.lora.freeze_a:
        raise ConfigError(f"strategy={choice} needs lora.freeze_a=true: without it A would be trained and averaged.")
    kind.check_lora_merge(settings.lora.merge)
    if kind.plans_exchanges and (schedule.name, settings.calibration.name) != ("every_round", "none"):
        raise ConfigError(f"strategy={choice} has models of its own for every client: no schedule or calibration goes.")
    moves.check_merge(settings.lora.merge, kind.merges_products)
    if settings.record_updates and kind.plans_exchanges:
        raise ConfigError(f"record_updates=true needs one model for all, which strategy={choice} has not.")
    if settings.record_updates and schedule.name != "every_round":
        raise ConfigError(
            f"record_updates=true needs schedule=every_round, not {schedule.name}: records are of all units."
        )
    if settings.privacy.name != "none":
        _check_privacy(kind, settings, schedule.name, choice)
    return ComposedRun(settings, strategy, schedule, choice, OmegaConf.to_yaml(composed, resolve=True))


def _check_privacy(kind: type[LayerwiseStrategy], settings: RunSettings, schedule: str, choice: str) -> None:
    """Refuse what clipping, noise or a sum would not cover, with the reason."""
    privacy = f"privacy={settings.privacy.name}"
    why = "of which the server sees none" if settings.privacy.masked else "which no noise covers"
    if not kind.only_sums:
        able = ", ".join(sorted(name for name, one in STRATEGIES.items() if one.only_sums))
        raise ConfigError(
            f"{privacy} does not go with strategy={choice}, which needs more of every client than its share in a mean: "
            f"weights or signals of its own, {why}. It goes with: {able}."
        )
    others = {
        "schedule": schedule if schedule != "every_round" else "",
        "wire.dtype": settings.wire.dtype if settings.wire.lossy else "",
        "calibration": settings.calibration.name if settings.calibration.name != "none" else "",
        "lora.merge": settings.lora.merge if settings.lora.merge != "factors" else "",
        "record_updates": "true" if settings.record_updates else "",
    }
    if found := [f"{key}={value}" for key, value in others.items() if value]:
        raise ConfigError(f"{privacy} is for a plain mean of whole float32 updates: it does not go with {found[0]}.")


def _named(group: str, options: Mapping[str, Any], registry: Mapping[str, T]) -> T:
    """Find what ``<group>.name`` names in a registry."""
    name, names = options.get("name"), sorted(registry)
    if not isinstance(name, str) or name not in registry:
        raise ConfigError(f"{group}.name={name!r} is not one of: {', '.join(names)}.{did_you_mean(str(name), names)}")
    return registry[name]


def _overrides(run_config: Mapping[str, Any]) -> list[str]:
    """Turn Flower's run config into a list of Hydra overrides."""
    given = {key: run_config[key] for key in FIRST_CLASS_KEYS if key in run_config}
    first_class = [f"{key.replace('-', '_')}={_quoted(value)}" for key, value in given.items()]
    return [*first_class, *_WORD.findall(str(run_config.get("overrides", "")))]


def _quoted(value: Any) -> Any:
    """Quote a text so that Hydra's grammar takes it as it is."""
    if not isinstance(value, str):
        return value
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: 2 * match[1] + (match[2] and '\\"'), value) + '"'


def _compose(overrides: Sequence[str]) -> tuple[DictConfig, str]:
    """Compose the config, and say which file of ``conf/strategy`` it took."""
    ConfigStore.instance().store(name="schema", node=RunSettings)
    with initialize_config_dir(config_dir=str(CONF_FOLDER), version_base=None), refused_by_hydra(overrides):
        composed = compose(config_name="config", overrides=list(overrides), return_hydra_config=True)
    choice = str(OmegaConf.select(composed, "hydra.runtime.choices.strategy", default=""))
    with open_dict(composed):
        del composed["hydra"]
    return composed, choice


@contextmanager
def refused_by_hydra(overrides: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra says of wrong overrides into a :class:`ConfigError` of one sentence."""
    try:
        yield
    except MissingConfigException as error:
        raise ConfigError(_missing_option(error)) from error
    except HydraException as error:
        raise ConfigError(_wrong_override(error)) from error
    except ValueError as error:  # a group, such as ``train``, set to a number or to null
        raise ConfigError(f"overrides={' '.join(overrides)!r} cannot be used: {error}.") from error


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").partition("/")
    choices = sorted(choice for choice in error.options or [] if choice != "schema")
    return f"{group}={option!r} is not one of: {', '.join(choices)}.{did_you_mean(option, choices)}"


def _wrong_override(error: HydraException) -> str:
    """Say which override is wrong and why; of an unknown key, which keys there are."""
    cause = error.__cause__
    if isinstance(error, OverrideParseException):
        return f"The override {error.override!r} is not of the form key=value: {first_line(error)}."
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return explained(cause) + _who_has_it(cause)
    if isinstance(cause, OmegaConfBaseException):
        override = first_line(error).removeprefix("Error merging override ")
        return f"The override {override!r} cannot be used: {first_line(cause)}."
    return " ".join(str(error).splitlines()[:2])


def _who_has_it(error: ConfigAttributeError | ConfigKeyError) -> str:
    """Name the strategies or schedules that have a key which the chosen one has not, in a sentence after a blank."""
    group, _, key = (error.full_key or "").rpartition(".")
    kinds: Mapping[str, Any] = STRATEGIES if group == "strategy" else SCHEDULES if group == "schedule" else {}
    found = [name for name, kind in kinds.items() if key in {item.name for item in fields(kind.Config)}]
    return f" It is an option of {' or '.join(f'{group}={name}' for name in found)}." if found else ""
