"""Going on with a run that was cut short."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

from flwr.common.logger import log
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from server_app.checkpoints import Checkpoint, versions
from server_app.compose import ComposedRun, check_composed, compose_run
from server_app.run_folder import RunFolder, State, read_state
from strategies.report import RoundReport
from task.config import first_line
from task.errors import ConfigError, OtherClientsError

MAY_CHANGE = (
    "num_server_rounds",
    "round_timeout",
    "runs_dir",
    "strategy.max_failed_rounds",
    "strategy.min_available_clients",
    "strategy.wait_for_clients",
    "tracker.name",
    "tracker.project",
    "train.device",
)
"""Config keys that a run may be gone on with in another way."""

FIRST_CLASS = ("strategy.name", "backbone.name", "dataset.name", "partition.kind", "num_server_rounds", "seed")
"""What is told of a run's config where it is not that of a run without any options."""


@dataclass(frozen=True)
class Past:
    """What there is of a run that is to go on."""

    run: ComposedRun
    """Its config, with what was changed of it."""
    folder: RunFolder
    """Its folder, held."""
    checkpoint: Checkpoint | None
    """Its last checkpoint; None if it was cut short in its first round, so that it starts anew."""
    reports: list[RoundReport]
    """Reports of the rounds up to the checkpoint."""
    config: str
    """Its ``config.yaml`` as it was."""
    state: State
    """What it was at."""

    @contextmanager
    def kept_if_refused(self) -> Iterator[None]:
        """Put config and state back as they were if other clients than the run's are there."""
        try:
            yield
        except OtherClientsError:
            self.folder.write_config(self.config)
            self.folder.note(self.state)
            raise


def open_past(resume: str, given: ComposedRun) -> Past:
    """Open a run to go on with; its own config holds.

    Parameters
    ----------
    resume : str
        Path of the run folder, as seen from the server's process; or its name, below ``runs_dir``.
    given : ComposedRun
        What the new submission asks for. Keys that it leaves at their defaults are those of the run.

    Returns
    -------
    Past
        The run; ``metrics.jsonl`` is cut behind the checkpoint's round.

    Raises
    ------
    ConfigError
        If there is no such run, it is still going on, or other values are asked for than it has.
    StateError
        If its checkpoints or reports cannot be read.
    """
    folder = RunFolder(_existing(resume, Path(given.settings.runs_dir)))
    run, checkpoint = _agreed(folder, given)
    config, state = folder.config.read_text(encoding="utf-8"), read_state(folder.path)
    folder.write_config(run.yaml)
    if checkpoint is None:
        folder.metrics.unlink(missing_ok=True)
        log(INFO, "%s has no checkpoint: the run starts anew in its folder.", folder.path.name)
        return Past(run, folder, None, [], config, state)
    folder.checkpoints.forget_after(checkpoint.server_round)
    _compare_versions(checkpoint)
    return Past(run, folder, checkpoint, folder.reports(checkpoint.metrics_bytes), config, state)


def check_past(resume: str, given: ComposedRun) -> ComposedRun:
    """Compose the config that a run goes on with, and change nothing of the run.

    What :func:`open_past` refuses of config and checkpoint is refused.
    """
    folder = RunFolder(_existing(resume, Path(given.settings.runs_dir)))
    try:
        return _agreed(folder, given)[0]
    finally:
        folder.release()


def _agreed(folder: RunFolder, given: ComposedRun) -> tuple[ComposedRun, Checkpoint | None]:
    """Compose the config that a run goes on with, and read its last checkpoint."""
    checkpoint = folder.checkpoints.latest()
    saved = _read_config(folder)
    if checkpoint is not None and checkpoint.config != config_digest(saved):
        raise ConfigError(f"{folder.config} is not the config that the checkpoints were made with; bring that back.")
    changes = _changes(saved, given)
    config = OmegaConf.create(saved)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    choice = checkpoint.strategy if checkpoint else str(saved["strategy"]["name"])
    run = check_composed(config, choice)
    _check_rounds(run, checkpoint)
    return run, checkpoint


def config_digest(config: Mapping[str, Any]) -> str:
    """Digest a config without what may change: SHA-256, hexadecimal."""
    fixed = {key: value for key, value in flat(config) if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def container(yaml: str) -> dict[str, Any]:
    """Read a config from YAML."""
    found = OmegaConf.to_container(OmegaConf.create(yaml))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _existing(resume: str, runs_dir: Path) -> Path:
    """Find the run folder."""
    for path in (Path(resume).expanduser(), runs_dir.expanduser() / Path(resume).name):
        if (path / "config.yaml").is_file():
            return path.resolve()
    raise ConfigError(
        f"resume={resume!r} is no run folder as seen from the server's process, which works in {Path.cwd()}; give its "
        "absolute path, or its name and runs-dir."
    )


def _read_config(folder: RunFolder) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.load(folder.config))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{folder.config} cannot be read: {first_line(error)}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("strategy"), dict) or "name" not in config["strategy"]:
        raise ConfigError(f"{folder.config} is not the config of a run.")
    return {str(key): value for key, value in config.items()}


def _changes(saved: Mapping[str, Any], given: ComposedRun) -> dict[str, Any]:
    """Return what is to be changed: what is asked for, other than by default, and is not as saved.

    Raises
    ------
    ConfigError
        If any of it may not change, with the keys and both values.
    """
    was = dict(flat(saved))
    default = dict(flat(container(compose_run({}).yaml)))
    asked = {key: value for key, value in flat(container(given.yaml)) if value != default.get(key)}
    changes = {key: value for key, value in asked.items() if value != was.get(key)}
    if own := [f"{key}={was[key]}" for key in FIRST_CLASS if key not in asked and was.get(key) != default.get(key)]:
        log(INFO, "The run's own config holds: %s.", ", ".join(own))
    if fixed := _leading([key for key in changes if key not in MAY_CHANGE]):
        shown = "; ".join(f"{key}={changes[key]} instead of {was.get(key, '(not there)')}" for key in fixed)
        raise ConfigError(
            f"The run was begun with another config: {shown}. Leave that out, or begin a new run; what may "
            f"change is: {', '.join(MAY_CHANGE)}."
        )
    return changes


def _leading(keys: Sequence[str]) -> list[str]:
    """Leave out the options of a group, such as ``strategy.head``, whose ``name`` is among the keys."""
    groups = {key.removesuffix(".name") for key in keys if key.endswith(".name")}
    return [key for key in keys if key.endswith(".name") or key.rpartition(".")[0] not in groups]


def _check_rounds(run: ComposedRun, checkpoint: Checkpoint | None) -> None:
    done, wanted = checkpoint.server_round if checkpoint else 0, run.settings.num_server_rounds
    if wanted < done:
        raise ConfigError(f"num-server-rounds={wanted}, but the run has done {done} rounds already.")
    if wanted == done:
        log(INFO, "All %d rounds are done; num-server-rounds makes it longer (any number but the default).", done)


def _compare_versions(checkpoint: Checkpoint) -> None:
    now = versions()
    if other := [
        f"{name} {was} -> {now.get(name)}" for name, was in checkpoint.versions.items() if was != now.get(name)
    ]:
        log(WARNING, "Other versions than before (%s): the result may differ in the last bits.", ", ".join(other))


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Walk over a nested config: its keys, joined by dots, and their values."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
