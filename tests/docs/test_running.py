"""Commands of the docs that take seconds are run; what each leaves behind is looked at."""

import json
from pathlib import Path

import pytest

from tests.docs.blocks import read_commands
from tests.docs.checks import make_commands
from tests.docs.conftest import SMALL

LEAVES = {
    "tools.certificates": "deploy/keys/ca.crt",
    "tools.check_node": "",
    "tools.debug": "runs/**/adapter/adapter_model.safetensors",
    "tools.export": "**/classes.json",
    "tools.node_key": "deploy/keys/site-1.pub",
    "tools.predict": "",
    "tools.report": "**/report.html",
}
"""Modules that are run, and what each must leave."""
ELSEWHERE = ("RUN", "--resume", "strategy=trimmed_mean")
"""Words of commands that are no example to run, that go on with a run (tests/server_app/test_resuming.py does), or that
take the strategy which test_own_strategy.py makes."""


def runnable():
    """Commands by what is really run of them, each once."""
    found = {}
    for command in read_commands():
        words = command.words
        if command.environment:  # its files come from a block before it: test_python.py
            continue
        made = [words] if words[:2] == ["python", "-m"] else []
        if words[0] == "make" and any("=" in word for word in words[1:]):
            made = [one.words for one in make_commands(words[1:])]
        for one in made:
            if one[2] in LEAVES and len(one) > 3 and not set(ELSEWHERE) & set(one):
                found.setdefault(" ".join(one[2:]), one[2:])
    return found


COMMANDS = runnable()

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_the_command_runs(words, workspace, start, capsys):
    module, *arguments = workspace(words)
    start(module, *(SMALL if module == "tools.debug" else []), *arguments)
    if LEAVES[module]:
        assert list(Path().glob(LEAVES[module]))
    else:
        assert capsys.readouterr().out or Path("found.csv").read_text().startswith("file,class_1,")


def test_every_module_has_a_command_that_runs():
    assert {words[0] for words in COMMANDS.values()} == set(LEAVES)


def test_predictions_as_json_have_the_keys_that_the_page_shows(workspace, start, capsys):
    [run, images] = workspace(["runs/20261121-201530-livar", "new_images"])
    start("tools.predict", run, images, "--format", "json")
    [first, *_] = json.loads(capsys.readouterr().out)
    [sample] = [
        line.split(",") for line in Path(__file__).parents[2].joinpath("docs/carry_away.md").read_text().splitlines()
        if line.startswith("file,class_1")
    ]  # fmt: skip
    assert list(first) == sample
