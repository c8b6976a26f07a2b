"""Check a command as its own program would: by that program's parser, and configs by Hydra."""

import argparse
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from flwr.cli.app import app as flwr_app
from flwr.common.config import parse_config_args

from benchmarks.study.study import read_study
from client_app.node import OwnSettings, unknown_keys
from server_app.compose import check_composed, compose_run
from tests.conftest import REPOSITORY
from tests.docs.blocks import Command
from tools.check import checked_config, run_config_values
from tools.sweep.multirun import multirun

UNCHECKED = {
    r"(cd|export|source) ": "changes the reader's shell",
    r"rm ": "removes what the reader has made",
    r"(mkdir -p|cp) ": "prepares the reader's folders",
    r"(useradd|install -d|python3 -m venv|apt-get) ": "prepares an operator's host, as root",
    r"(tensorboard --logdir|mlflow ui|wandb sync)\b": "a program of another project",
}
"""Beginnings of commands that no test can check, and why."""
NUMBERS = {"RUN_ID": "1", "NODE_ID": "1"}


class _Parsed(BaseException):
    """Carries a parser's outcome past the program that asked for it."""


def check(command: Command, folder: Path) -> None:
    """Refuse a command that its program, make, the app's config or a study file would refuse."""
    if any(re.match(pattern, command.text) for pattern in UNCHECKED):
        return
    program, *arguments = command.words
    match Path(program).name, arguments:
        case "make", _:
            check_make(arguments, folder)
        case "python", ["-m", module] if command.mention:
            assert find_spec(module), f"there is no module {module}"
        case "python", ["-m", module, *rest]:
            check_module(module, rest, folder)
        case "petalwise", _:
            check_module("tools.launch", arguments, folder)
        case "flwr", _:
            check_flwr(arguments)
        case "flower-supernode" | "flower-superlink", _:
            check_flower(program, arguments)
        case "pip", ["install", *rest]:
            check_pip(rest)
        case _:
            pytest.fail(f"{command.page}:{command.line}: nobody checks {command.text!r}")


def make_commands(arguments: list[str]) -> list[Command]:
    """List what make would run of this repository's tools."""
    made = subprocess.run(
        ["make", "--dry-run", "--old-file", ".venv/.installed", *arguments],
        capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False,
        env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    lines = [line.replace(".venv/bin/", "") for line in made.stdout.splitlines()]
    return [Command("Makefile", 0, line) for line in lines if line.startswith("python -m ")]


def check_make(arguments: list[str], folder: Path) -> None:
    """Check the target, and what it runs where anything but a target was given."""
    commands = make_commands(arguments)
    if any("=" in word for word in arguments):
        for command in commands:
            check(command, folder)


def parse(run, argv: list[str]) -> argparse.Namespace:
    """Start a program and stop it as soon as its parser has read the command line."""
    real = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        raise _Parsed(real(parser, args, namespace))

    refused = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(refused):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", argv)
        try:
            run()
        except _Parsed as parsed:
            return parsed.args[0]
        except SystemExit:
            pytest.fail(f"{argv}: {refused.getvalue()}")
    return pytest.fail(f"{argv} has no parser")


def check_module(module: str, arguments: list[str], folder: Path) -> None:
    """Parse the arguments and read the config or the study that they speak of."""
    given = parse(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True), [module, *arguments])
    if module == "tools.launch":
        assert (REPOSITORY / given.app).resolve() == REPOSITORY
        checked_config(run_config_values(given.run_config), given.clients)
    elif module == "tools.sweep":
        less = ["hydra.sweeper.n_trials=2"] if "hydra/sweeper=optuna" in given.overrides else []
        multirun(
            lambda config, choice, _: 0.0 * check_composed(config, choice).settings.seed,
            [*given.overrides, *less],
            folder,
        )
    elif module == "benchmarks.study":
        read_study(REPOSITORY / given.study)
    elif overrides := getattr(given, "overrides", None):
        compose_run({}, overrides)


def check_flwr(arguments: list[str]) -> None:
    """Parse by Flower's own command line; of a run, compose its config."""
    command, left = typer.main.get_command(flwr_app), [NUMBERS.get(word, word) for word in arguments]
    while hasattr(command, "commands"):
        command = command.commands[left.pop(0)]
    given = command.make_context(command.name, left).params
    if command.name == "run":
        checked_config(run_config_values(given["run_config_overrides"]), clients=10)
        parse_config_args(list(given["federation_config_overrides"]))


def check_flower(program: str, arguments: list[str]) -> None:
    """Parse by Flower's own parser; of a node, read its node config."""
    [script] = entry_points(group="console_scripts", name=program)
    given = parse(script.load(), [program, *arguments])
    if config := getattr(given, "node_config", None):
        node_config = parse_config_args([config] if isinstance(config, str) else config)
        assert unknown_keys(node_config) == []
        OwnSettings.from_config(node_config)


def check_pip(arguments: list[str]) -> None:
    """Check that extras and the file of constraints are there."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for word in arguments:
        for name in re.findall(r"\[(.*)\]", word):
            assert name in extras, f"there is no extra {name!r}"
    assert (REPOSITORY / "constraints.txt").is_file()
    assert "constraints.txt" in arguments
