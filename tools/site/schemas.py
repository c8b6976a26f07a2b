"""Config dataclasses as rows of a table: key, type, default, values, and the docstring under the field."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any, get_type_hints

from task.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """One config key."""

    path: str
    """The whole key, such as ``train.lr``."""
    kind: str
    """Its type."""
    default: str
    """Its default, as an override would have it."""
    values: str
    """Which values it may take, in words; empty where the type says all."""
    meaning: str
    """What it does, in Markdown."""


def schema_keys(schema: type, path: str = "", without: Sequence[str] = ()) -> list[Key]:
    """List the keys of a config dataclass, those of dataclasses inside it left out.

    Parameters
    ----------
    schema : type
        The dataclass.
    path : str
        Where its keys stand, such as ``train.``.
    without : Sequence[str]
        Fields that are told elsewhere.

    Raises
    ------
    ConfigError
        If there is no docstring under a field.
    """
    kinds, meanings = get_type_hints(schema), field_meanings(schema)
    found = []
    for item in dataclasses.fields(schema):
        if item.name in without or dataclasses.is_dataclass(kinds[item.name]):
            continue
        if item.name not in meanings:
            raise ConfigError(f"{schema.__name__}.{item.name} has no meaning: write a docstring under the field.")
        kind = kinds[item.name]
        shown = kind.__name__ if kind in (bool, float, int, str) else str(kind).replace("typing.", "")
        bounds = _values(dict(item.metadata))
        found.append(Key(f"{path}{item.name}", shown, override_value(_default(item)), bounds, meanings[item.name]))
    return found


def field_meanings(schema: type) -> dict[str, str]:
    """Read the docstrings under a dataclass's fields, those that it inherits among them."""
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if dataclasses.is_dataclass(base):
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
            found |= _documented(tree.body if isinstance(tree, ast.ClassDef) else [])
    return found


def constant_meanings(module: ModuleType) -> dict[str, str]:
    """Read the docstrings under a module's constants, by the constants' names."""
    return _documented(ast.parse(inspect.getsource(module)).body)


def override_value(value: Any) -> str:
    """Write a value as Hydra's override grammar has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(override_value(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{override_value(item)}' for key, item in value.items())}}}"
    return str(value)


def _documented(body: Sequence[ast.stmt]) -> dict[str, str]:
    """Pair every assignment with the string that follows it."""
    found = {}
    for statement, follower in pairwise(body):
        match statement, follower:
            case (
                ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split()).replace("``", "`")
    return found


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


def _values(bounds: dict[str, Any]) -> str:
    """Say in words what :func:`task.config.bounded` was given."""
    words = [f"`{choice}`" for choice in bounds.get("choices", ())]
    named = {"above": "above", "at_least": "at least", "at_most": "at most"}
    limits = [f"{word} {_number(bounds[key])}" for key, word in named.items() if key in bounds]
    words += [" and ".join(limits)] if limits else []
    words += [f"{bounds['items']} items"] if "items" in bounds else []
    words += [f"or `{override_value(bounds['unset'])}`"] if "unset" in bounds else []
    return ", ".join(words)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
