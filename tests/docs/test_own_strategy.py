"""The strategy of docs/own_strategy.md, put into a copy of the app, trains and passes what every strategy must pass."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY
from tests.docs.blocks import read_blocks, read_commands
from tests.docs.conftest import SMALL

PAGE = "docs/own_strategy.md"
FOLDERS = ("client_app", "conf", "server_app", "strategies", "task", "tests/strategies", "tools")
FILES = ("pyproject.toml", "tests/__init__.py", "tests/conftest.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the app with the page's files in it, registered as the page says."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(REPOSITORY / file, copy / file)
    files = {block.title.split('"')[1]: block.text for block in read_blocks() if block.page == PAGE and block.title}
    imported, entry = files.pop("strategies/__init__.py").splitlines()
    for path, text in files.items():
        assert not (copy / path).exists()
        (copy / path).write_text(text, "utf-8")
    registry = copy / "strategies" / "__init__.py"
    text = re.sub(r"(?m)^(STRATEGIES: .*)$", rf"{imported}\n\n\1\n{entry}", registry.read_text("utf-8"))
    registry.write_text(text, "utf-8")
    return copy


def run(checkout, *arguments):
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def commands():
    """The page's commands that take the strategy, by module."""
    found = [
        command.words[2:] for command in read_commands() if command.page == PAGE and "trimmed_mean" in command.text
    ]
    return {module: arguments for module, *arguments in found}


def test_it_trains_as_the_page_says(checkout, commands):
    ended = run(checkout, "tools.debug", *SMALL, *commands["tools.debug"])
    assert ended.returncode == 0, ended.stderr
    [folder] = (checkout / "runs").iterdir()
    assert folder.name.endswith("-trimmed_mean")
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["merged"] for one in rounds] == [False, True, True]
    assert "trimmed: 0.25" in (folder / "config.yaml").read_text()


def test_it_passes_the_suite_that_every_strategy_passes(checkout, commands):
    ended = run(checkout, "pytest", *commands["pytest"], "-p", "no:cacheprovider")
    assert ended.returncode == 0, ended.stdout
    assert int(re.search(r"(\d+) passed", ended.stdout)[1]) > 10


def test_it_leaves_out_the_clients_furthest_out(checkout):
    program = """
import torch
from strategies.trimmed_mean import TrimmedMean, TrimmedMeanConfig
from types import SimpleNamespace
values = [[0.0, 5.0], [1.0, 1e9], [2.0, 6.0], [-1e9, 7.0]]
updates = [SimpleNamespace(flat=torch.tensor(value)) for value in values]
print(TrimmedMean(TrimmedMeanConfig(trimmed=0.25)).merge(1, updates).tolist())
"""
    (checkout / "shown.py").write_text(program)
    assert run(checkout, "shown").stdout.strip() == "[0.5, 6.5]"


def test_a_share_beyond_its_bounds_is_refused(checkout):
    ended = run(checkout, "tools.debug", "strategy=trimmed_mean", "strategy.trimmed=0.7")
    assert "strategy.trimmed=0.7 must be at most 0.49." in ended.stderr


def test_it_is_as_long_as_promised():
    [code] = [block.text for block in read_blocks() if block.page == PAGE and "trimmed_mean.py" in block.title]
    assert len(code.strip().splitlines()) <= 40
