"""The page of all config keys is the one that the code gives, and lacks nothing."""

import re
import subprocess
from dataclasses import dataclass

import pytest

from client_app.node import NODE_KEYS
from server_app.compose import CONF_FOLDER
from task.config import bounded
from task.errors import ConfigError
from tests.conftest import REPOSITORY
from tools.site.__main__ import PAGE
from tools.site.presets import read_presets
from tools.site.reference import COMMAND, GROUPS, ONE_PRESET, reference_page
from tools.site.schemas import Key, schema_keys


@dataclass
class Base:
    count: int = bounded(3, at_least=1, at_most=2_000, unset=0)
    """How many;
    ``0``: all."""


@dataclass
class Schema(Base):
    kind: str = bounded("b", choices=("a", "b"))
    """Which kind."""
    mean: list[float] = bounded([0.5], above=0.0, items=1)
    """Mean."""
    inner: Base = bounded(None)


@dataclass
class Wordless:
    count: int = 1


@pytest.mark.slow
def test_the_page_is_not_stale():
    assert PAGE.read_text("utf-8") == reference_page(), f"docs/reference/config.md is stale; run: {COMMAND}"


def test_the_page_has_every_environment_variable_that_the_code_reads():
    command = [
        "git",
        "grep",
        "-hoE",
        "PETALWISE_[A-Z_]+",
        "--",
        "*.py",
        "Makefile",
        "deploy",
        ":!tests/task",
        ":!benchmarks",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, timeout=60).stdout
    assert {name for name in found.split() if f"`{name}`" not in PAGE.read_text("utf-8")} == set()


def test_the_page_has_every_preset_and_every_node_key():
    rows = set(re.findall(r"^\| `([^`]+)`", PAGE.read_text("utf-8"), re.MULTILINE))
    assert {path.stem for group in (*GROUPS, "strategy") for path in (CONF_FOLDER / group).glob("*.yaml")} - rows == {
        "default"
    }
    assert set(NODE_KEYS) <= rows
    assert all([path.stem for path in (CONF_FOLDER / group).glob("*.yaml")] == ["default"] for group in ONE_PRESET)


def test_a_schema_becomes_rows_with_defaults_values_and_inherited_meanings():
    assert schema_keys(Schema, "group.") == [
        Key("group.count", "int", "3", "at least 1 and at most 2,000, or `0`", "How many; `0`: all."),
        Key("group.kind", "str", "b", "`a`, `b`", "Which kind."),
        Key("group.mean", "list[float]", "[0.5]", "above 0, 1 items", "Mean."),
    ]


def test_a_field_without_meaning_is_refused():
    with pytest.raises(ConfigError, match=r"Wordless.count has no meaning: write a docstring under the field"):
        schema_keys(Wordless)


def test_a_preset_says_what_it_changes_in_its_own_group_and_in_others():
    presets = {preset.name: preset for preset in read_presets("schedule")}
    assert presets["periodic"].sets == {"schedule.interval": 2, "schedule.factor": 1}
    assert [name for name, preset in presets.items() if preset.default] == ["every_round"]
    assert presets["every_round"].comment == "Every unit travels both ways in every round."
