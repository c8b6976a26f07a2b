"""Composed configs as plain values, and whether two of them make the same run."""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from server_app.compose import compose_run
from server_app.resuming import container


def composed_config(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Compose Flower's run config to plain values.

    Raises
    ------
    ConfigError
        If the app refuses it.
    """
    found: dict[str, Any] = json.loads(_composed(json.dumps(run_config, sort_keys=True)))
    return found


def without_folder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out where a run's results lie."""
    return {key: value for key, value in config.items() if key != "runs_dir"}


def same_config(kept: Mapping[str, Any], now: Mapping[str, Any], default: Mapping[str, Any] | None = None) -> bool:
    """Tell whether a run with one composed config would be the run with another.

    Parameters
    ----------
    kept : Mapping[str, Any]
        Of a run in the past.
    now : Mapping[str, Any]
        As composed today. A key that ``kept`` has not, since the app had it not, must have its default value.
    default : Mapping[str, Any], optional
        The values of a run without any options; by default composed.

    Returns
    -------
    bool
        Whether they are the same.
    """
    default = composed_config({}) if default is None else default
    for key, value in now.items():
        if key not in kept:
            same = value == default.get(key)
        elif isinstance(value, dict) and isinstance(kept[key], dict):
            same = same_config(kept[key], value, default.get(key) or {})
        else:
            same = kept[key] == value
        if not same:
            return False
    return kept.keys() <= now.keys()


@cache
def _composed(run_config: str) -> str:
    """Compose a run config, which takes a quarter of a second, once; JSON to JSON."""
    return json.dumps(container(compose_run(json.loads(run_config)).yaml))
