"""The page of all config keys, written from the schemas, the presets and the app's own constants."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from inspect import getdoc
from typing import get_type_hints

import client_app.kept
import task.backbone
import task.data.sources
from client_app.node import NODE_KEYS, Node, OwnSettings
from server_app.compose import CONF_FOLDER, RunSettings
from strategies import SCHEDULES, STRATEGIES, LayerwiseStrategy, Schedule, ScheduleConfig, StrategyConfig
from strategies.livar.table import MergeTable
from tools.site.presets import Preset, read_presets
from tools.site.schemas import Key, constant_meanings, field_meanings, override_value, schema_keys

COMMAND = "python -m tools.site"
APP_CONFIG = CONF_FOLDER.parent / "pyproject.toml"
GROUPS = ("backbone", "lora", "dataset", "partition", "train", "wire", "calibration", "privacy", "tracker")
ONE_PRESET = ("lora", "train", "wire")
CHOICES = ("strategy", "schedule")
VARIABLES = (task.data.sources, task.backbone, client_app.kept)
"""Modules with a constant ``*_VARIABLE`` that names an environment variable."""
TEST_VARIABLES = {
    "PETALWISE_TEST_DATA": "Folder of real data sets and backbones, for the tests marked `data`; skipped without it."
}
OF_FLOWER = {
    "resume": "Folder of a run to go on with: an absolute path, or its name below `runs-dir`.",
    "overrides": "Hydra overrides of any key on this page, separated by blanks; they win over the other keys.",
}
HEAD = f"""# Config

Every key with its type, default and meaning. Generated from the code and `conf/` by `{COMMAND}`, which `make docs`
runs; do not edit it.

Keys below the first section are Hydra overrides: of `tools.debug` and `tools.sweep` as they stand, in Flower's run
config inside `overrides`. A wrong key, type or value is refused before anything starts.

```console
python -m tools.debug strategy=fedprox strategy.proximal_mu=0.1 num_server_rounds=2
python -m tools.launch . -c 'strategy="fedprox" overrides="strategy.proximal_mu=0.1"'
```
"""


def reference_page() -> str:
    """Write the page, as Markdown."""
    parts = [HEAD, _run_config(), _run_keys(), *(_group(name) for name in GROUPS)]
    parts += [_choices("strategy"), _choices("schedule"), _merge_table(), _node_config(), _variables()]
    return "\n".join(parts)


def _run_config() -> str:
    """Flower's own keys; their meanings are those of the keys that they become."""
    declared = tomllib.loads(APP_CONFIG.read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    meanings = field_meanings(RunSettings) | OF_FLOWER
    rows = []
    for key, default in declared.items():
        name = key.replace("-", "_")
        preset = (CONF_FOLDER / key).is_dir()
        meaning = f"A preset of [`{key}`](#{key})." if preset else meanings[name]
        rows.append([f"`{key}`", meaning, type(default).__name__, _code(override_value(default))])
    text = "`-c` of `flwr run` and of `python -m tools.launch` takes these; text stands in double quotes, as in TOML."
    return f"## Flower's run config\n\n{text}\n\n{_table(['key', 'meaning', 'type', 'default'], rows)}"


def _run_keys() -> str:
    rows = _key_rows(schema_keys(RunSettings, without=CHOICES))
    return f"## The run\n\n{rows}"


def _group(name: str) -> str:
    """Write of a group with one schema: its keys and its presets."""
    schema = get_type_hints(RunSettings)[name]
    listed = f"\n{_preset_rows(read_presets(name))}" if name not in ONE_PRESET else ""
    return f"## {name}\n\n{_first_line(schema)}\n\n{_key_rows(schema_keys(schema, f'{name}.'))}{listed}"


def _choices(group: str) -> str:
    """Write of a group in which each registered class has options of its own."""
    registry: Mapping[str, type[LayerwiseStrategy] | type[Schedule]] = STRATEGIES if group == "strategy" else SCHEDULES
    presets = read_presets(group)
    meaning = field_meanings(RunSettings)[group].split(";")[0]
    parts = [f"## {group}\n\n{meaning}.\n\n{_preset_rows(presets)}"]
    base = StrategyConfig if group == "strategy" else ScheduleConfig
    parts.append(f"### Options of every {group}\n\n{_key_rows(schema_keys(base, f'{group}.'))}")
    for name, kind in registry.items():
        keys = schema_keys(kind.Config, f"{group}.", without=list(base.__dataclass_fields__))
        if keys:
            parts.append(f"### `{group}.name={name}`\n\n{_text(_first_line(kind))}\n\n{_key_rows(keys)}")
    return "\n".join(parts)


def _merge_table() -> str:
    text = "A file of `conf/livar_table/`, or any YAML file on the server, for `strategy.table` of LIVAR."
    return f"## Merge table\n\n{text}\n\n{_key_rows(schema_keys(MergeTable))}"


def _node_config() -> str:
    meanings = field_meanings(Node) | field_meanings(OwnSettings)
    rows = [[f"`{key}`", meanings[key.replace("-", "_")]] for key in NODE_KEYS]
    text = 'What a site says of itself, by `--node-config` of its SuperNode, as TOML: `name="site-1" batch-size=8`.'
    more = "[Your own data](../own_data.md) says more."
    return f"## Node config\n\n{text} {more}\n\n{_table(['key', 'meaning'], rows)}"


def _variables() -> str:
    rows = []
    for module in VARIABLES:
        meanings = constant_meanings(module)
        rows += [[f"`{getattr(module, name)}`", meanings[name]] for name in meanings if name.endswith("_VARIABLE")]
    rows += [[f"`{name}`", meaning] for name, meaning in TEST_VARIABLES.items()]
    return f"## Environment variables\n\n{_table(['variable', 'meaning'], rows)}"


def _preset_rows(presets: Sequence[Preset]) -> str:
    rows = []
    for preset in presets:
        sets = " ".join(_code(f"{key}={override_value(value)}") for key, value in preset.sets.items())
        name = f"`{preset.name}`" + (" (default)" if preset.default else "")
        rows.append([name, _text(preset.comment or _first_line(STRATEGIES[preset.run.strategy.name])), sets])
    return _table(["preset", "", "sets"], rows)


def _key_rows(keys: Iterable[Key]) -> str:
    rows = [[f"`{key.path}`", key.meaning, key.kind, _code(key.default), key.values] for key in keys]
    return _table(["key", "meaning", "type", "default", "values"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _text(plain: str) -> str:
    """Keep what looks like markup as it is."""
    return plain.replace("<", "&lt;").replace("*", "\\*")


def _first_line(kind: type) -> str:
    return (getdoc(kind) or "").splitlines()[0].replace("``", "`")


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
