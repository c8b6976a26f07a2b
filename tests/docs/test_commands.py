"""Every command of README.md and docs/ is one that its program takes, with a config that composes."""

import re
import tomllib

import pytest
from _pytest.outcomes import Failed
from click import ClickException

from task.errors import PetalwiseError
from tests.conftest import REPOSITORY
from tests.docs.blocks import PAGES, PROGRAMS, Command, read_blocks, read_commands
from tests.docs.checks import UNCHECKED, check
from tools.site.__main__ import PAGE
from tools.site.reference import CHOICES, GROUPS

LANGUAGES = {
    "console": "commands, checked here",
    "python": "executed by test_python.py, or by test_own_strategy.py where a title names the file",
    "yaml": "a file, which test_own_strategy.py writes",
    "text": "a picture, or what a program prints",
    "mermaid": "a picture that GitHub draws",
}
COMMANDS = [
    command for command in read_commands() if "trimmed_mean" not in command.text
]  # test_own_strategy.py runs it

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("command", COMMANDS, ids=[f"{command.page}:{command.line}" for command in COMMANDS])
def test_the_command_is_taken(command, tmp_path):
    check(command, tmp_path)


def test_every_block_is_of_a_known_kind():
    assert {f"{block.page}:{block.line}" for block in read_blocks() if block.language not in LANGUAGES} == set()


def test_no_command_hides_in_a_block_of_text():
    hidden = [
        block
        for block in read_blocks()
        if block.language == "text" and re.search(rf"^\s*({PROGRAMS}) ", block.text, re.M)
    ]
    assert hidden == []


def test_what_is_not_checked_is_there():
    assert {
        pattern for pattern in UNCHECKED if not any(re.match(pattern, command.text) for command in COMMANDS)
    } == set()


def test_the_trial_speaks_of_one_superlink_and_of_ports_of_their_own():
    of_trial = [command for command in COMMANDS if command.environment.get("FLWR_HOME", "").startswith("runs/trial/")]
    told = [dict(zip(command.words, command.words[1:], strict=False)) for command in of_trial]
    [superlink], nodes = ([one for one in told if flag in one] for flag in ("--host", "--superlink"))
    address = f"{superlink['--host']}:{superlink['--port']}"
    connection = tomllib.loads((REPOSITORY / "deploy/trial.toml").read_text("utf-8"))["superlink"]["trial"]
    assert connection == {"address": address, "insecure": True}
    assert [node["--superlink"] for node in nodes] == [address] * 2
    assert len({one["--port"] for one in (superlink, *nodes)}) == 3
    assert len({command.environment["FLWR_HOME"] for command in of_trial if "flwr" not in command.words}) == 3


@pytest.mark.parametrize(
    "text",
    [
        "python -m tools.launch . -c 'overrides=\"strategy.proximal=1\"'",
        "python -m tools.launch . --supernodes 3",
        "python -m tools.sweep strategy=fedavg,fedbest",
        "python -m benchmarks.study benchmarks/studies/lost.yaml",
        "make debug ARGS='strategy=fedbest'",
        "make dinner",
        "flwr run . --stream -c 'round=3'",
        "flower-supernode --node-config 'nickname=\"site-1\"'",
        "pip install -c constraints.txt -e '.[dinner]'",
        "curl example.org",
    ],
)
def test_a_command_that_is_wrong_is_refused(text, tmp_path):
    with pytest.raises((Failed, AssertionError, PetalwiseError, ClickException)):
        check(Command("page.md", 1, text), tmp_path)


def test_every_key_that_a_page_names_is_a_key():
    groups = "|".join((*GROUPS, *CHOICES))
    keys = set(re.findall(r"^\| `([^`]+)`", PAGE.read_text("utf-8"), re.MULTILINE))
    named = {
        (page, key)
        for page in PAGES
        for key in re.findall(rf"`({groups})\.(?!safetensors)([a-z_]+)(?:=[^`]*)?`", texts(page))
    }
    assert len(named) > 50
    of_an_example = ("docs/own_strategy.md", "strategy", "trimmed")
    assert {(page, *key) for page, key in named if ".".join(key) not in keys} - {of_an_example} == set()


def texts(page):
    return (REPOSITORY / page).read_text("utf-8")
