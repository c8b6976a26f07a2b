"""The YAML presets of ``conf/``: what each sets, and what its first comment says."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import takewhile
from typing import Any

from server_app.compose import CONF_FOLDER, ComposedRun, compose_run


@dataclass(frozen=True)
class Preset:
    """One file of a group of presets."""

    name: str
    """What the group's key is given, such as ``livar_ccvr`` of ``strategy=livar_ccvr``."""
    comment: str
    """The comment at its head."""
    sets: dict[str, Any]
    """Keys of its group whose values differ from the schema's defaults, and of others that it changes."""
    run: ComposedRun
    """What a run with it and no other override is."""
    default: bool
    """Whether a run without overrides has it."""


def read_presets(group: str) -> list[Preset]:
    """Compose every preset of a group, such as ``backbone``, in the order of their names."""
    plain = _without_overrides()
    by_default = _values(plain)
    found = []
    for path in sorted((CONF_FOLDER / group).glob("*.yaml")):
        run = compose_run({}, [f"{group}={path.stem}"])
        schema = dict(_schema_values(run))
        expected = schema | by_default | {key: schema[key] for key in schema if key.startswith(f"{group}.")}
        sets = {key: value for key, value in _values(run).items() if value != expected.get(key)}
        if sets.get(f"{group}.name") == path.stem:
            del sets[f"{group}.name"]
        default = run.yaml == plain.yaml
        found.append(Preset(path.stem, _comment(path.read_text("utf-8")), sets, run, default))
    return found


@cache
def _without_overrides() -> ComposedRun:
    return compose_run({})


def _values(run: ComposedRun) -> dict[str, Any]:
    """All values of a composed run by their whole keys."""
    return dict(_flat(asdict(run.settings) | {"strategy": asdict(run.strategy), "schedule": asdict(run.schedule)}))


def _schema_values(run: ComposedRun) -> Iterator[tuple[str, Any]]:
    """Walk over the defaults of the schemas that a run's values were checked by."""
    defaults = {name: type(getattr(run, name))() for name in ("settings", "strategy", "schedule")}
    named = {name: asdict(defaults[name]) for name in ("strategy", "schedule")}
    return _flat(asdict(defaults["settings"]) | named)


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Walk over the values of all groups; a dict inside a group is one value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", one) for name, one in value.items())
        else:
            yield key, value


def _comment(text: str) -> str:
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    return " ".join(line.lstrip("# ") for line in head if not line.startswith("# @package"))
