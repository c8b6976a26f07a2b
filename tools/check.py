"""Checks a run of this app before Flower is started: a mistake is told in seconds, in one sentence."""

import os
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from server_app.compose import FIRST_CLASS_KEYS, ComposedRun, compose_run
from server_app.resuming import check_past
from strategies import LivarConfig, StrategyConfig
from strategies.livar import read_table
from strategies.livar.table import names_file
from task.backbone import BACKBONES_VARIABLE
from task.config import DatasetConfig
from task.data.sources import DATA_VARIABLE
from task.errors import ConfigError, did_you_mean
from tools.simulation import run_config_pairs

APP = Path(__file__).resolve().parents[1]
KEYS = (*FIRST_CLASS_KEYS, "resume", "overrides")


def check_run(
    app: Path,
    run_config: Sequence[str],
    clients: int,
    *,
    runs_dir: Path = Path("runs"),
    data: Path | None = None,
    backbones: Path | None = None,
) -> None:
    """Check what can be known of a run beforehand; an app of another make is left to Flower.

    Parameters
    ----------
    app : Path
        The app's folder.
    run_config : Sequence[str]
        As given to ``flwr run --run-config``.
    clients : int
        Number of simulated clients.
    runs_dir : Path, default Path("runs")
        Where the run folder is made, unless the run config gives a ``runs-dir``; a run to go on with lies there too,
        unless its absolute path is given.
    data, backbones : Path | None, default None
        The folders that the simulated nodes will be told; by default those of this process's environment.

    Raises
    ------
    PetalwiseError
        On a key that the app does not declare, a value that is not TOML, any mistake in the composed config, fewer
        clients than the strategy waits for, a folder or file that is not there, a folder that cannot be written, or a
        run that cannot go on so.
    """
    if app.resolve() != APP:
        return
    values = run_config_values(run_config)
    run = checked_config({"runs-dir": str(runs_dir.resolve()), **values}, clients)
    if resume := str(values.get("resume", "")):
        run = check_past(str(_found(resume, Path(run.settings.runs_dir))), run)
        check_clients(run.strategy, clients)
    else:
        _check_writable(Path(run.settings.runs_dir).expanduser())
    _check_table(run.strategy)
    dataset, backbone = run.settings.dataset, run.settings.backbone
    in_folder = dataset.source in ("parquet", "folder")
    folder = _checked_folder("--data", data, DATA_VARIABLE, dataset.name if in_folder else "")
    if dataset.source == "folder":
        _check_splits(dataset, folder)
    in_folder = backbone.source == "checkpoint"
    _checked_folder("--backbones", backbones, BACKBONES_VARIABLE, backbone.name if in_folder else "")


def checked_config(values: Mapping[str, Any], clients: int) -> ComposedRun:
    """Compose a run config for so many simulated clients; a ConfigError says what is wrong with it."""
    for key in values:
        if key not in KEYS:
            raise ConfigError(
                f"The run config has no key {key!r}; it has: {', '.join(KEYS)}. Anything else goes into "
                f"overrides.{did_you_mean(key, KEYS)}"
            )
    run = compose_run(values)
    if not values.get("resume"):  # the config of a run to go on with is its own
        check_clients(run.strategy, clients)
    return run


def check_clients(strategy: StrategyConfig, clients: int) -> None:
    """Refuse fewer simulated clients than a strategy waits for, by a ConfigError."""
    needed = max(strategy.min_clients, strategy.min_available_clients)
    if clients < needed:
        raise ConfigError(
            f"{clients} client(s) would be started, but the strategy waits for {needed} (strategy.min_clients, "
            "strategy.min_available_clients)."
        )


def _check_table(strategy: StrategyConfig) -> None:
    """Refuse a merge table in a file that the server, which works in a folder of its own, will not be able to read."""
    if not isinstance(strategy, LivarConfig) or not names_file(strategy.table):
        return
    if not Path(strategy.table).is_absolute():
        raise ConfigError(f"strategy.table={strategy.table!r}: the server works in another folder; give a whole path.")
    read_table(strategy.table)


def _found(resume: str, runs_dir: Path) -> Path:
    """Find a run as the server will: by its absolute path, or by its name below ``runs-dir``."""
    path = Path(resume).expanduser()
    found = path if path.is_absolute() else runs_dir / path.name
    if not (found / "config.yaml").is_file():
        raise ConfigError(f"resume={resume!r}: {found} is no run folder; give its absolute path, or --runs-dir.")
    return found


def _check_writable(runs_dir: Path) -> None:
    """Refuse a folder for runs in which none can be made, as far as its rights tell."""
    nearest = next(path for path in (runs_dir, *runs_dir.parents) if os.path.exists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "is not writable for this user" if nearest.is_dir() else "is no folder"
        raise ConfigError(f"runs_dir={str(runs_dir)!r} cannot be written: {nearest} {what}.")


def _checked_folder(option: str, given: Path | None, variable: str, needed_by: str) -> Path:
    """Return the folder that is told; refuse one that is not there, or none where something lies in one."""
    said, value = (option, str(given)) if given is not None else (variable, os.environ.get(variable, ""))
    if needed_by and not value:
        raise ConfigError(f"{needed_by!r} lies in a folder: say where by {option} /path, or the variable {variable}.")
    folder = Path(value).expanduser()
    if (needed_by or given is not None) and not folder.is_dir():
        raise ConfigError(f"{said} {value} is no folder; give the one that holds the files.")
    return folder


def _check_splits(dataset: DatasetConfig, folder: Path) -> None:
    """Refuse a folder of images that lacks a split that the config names."""
    from task.data.readers import class_root  # brings in the datasets library

    for split in filter(None, (dataset.train_split, dataset.test_split)):
        class_root(dataset, split, folder)


def run_config_values(run_config: Sequence[str]) -> dict[str, Any]:
    """Parse the values as Flower does; those of a file that cannot be read are left to who reads it."""
    if len(run_config) == 1 and run_config[0].endswith(".toml"):
        try:
            return tomllib.loads(Path(run_config[0]).expanduser().read_text())
        except (OSError, tomllib.TOMLDecodeError):
            return {}
    return {key: _value(key, text) for key, text in run_config_pairs(run_config).items()}


def _value(key: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"--run-config {key}={text} is no TOML value: a text needs quotes that the shell leaves in place, as in "
            f"-c '{key}=\"{text}\"'."
        ) from error
