"""Every message that docs/troubleshooting.md quotes is one that the app, or Flower, still has."""

import ast
import re
from functools import cache
from pathlib import Path

import flwr
import pytest

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
APP = [REPOSITORY / folder for folder in ("client_app", "server_app", "strategies", "task", "tools")]
FLOWER = [Path(flwr.__file__).parent]
HOLE = "\0"
OWN, OF_FLOWER = PAGE.split("## What Flower says")


def messages(text):
    """First cells that are nothing but a quoted message."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


@cache
def texts(of_flower):
    """All texts of the code, with a hole for each value."""
    found = set()
    for folder in FLOWER if of_flower else APP:
        for path in folder.rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            found |= {re.sub(r"%\.?\d*[dsf]", HOLE, text) for node in nodes if len(text := template(node)) > 8}
    return found


def template(node):
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in parts)
    return ""


def says(text, message):
    """Whether a text of the code has all pieces of a message, one after another, a value behind each."""
    pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip(" .")]
    between = rf"[\s'\"(=]*{HOLE}.*?"
    return re.search(f"(?s){between.join(pieces)}", text) is not None


def is_said(message, of_flower=False):
    return any(says(text, message) for text in texts(of_flower))


def refusals(path):
    """All texts with which a module raises."""
    raised = [node.exc for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Raise)]
    return [template(error.args[0]) for error in raised if isinstance(error, ast.Call) and error.args]


@pytest.mark.parametrize("message", messages(OWN))
def test_the_app_still_says_so(message):
    assert is_said(message)


@pytest.mark.slow
@pytest.mark.parametrize("message", messages(OF_FLOWER))
def test_flower_still_says_so(message):
    assert is_said(message, of_flower=True)


@pytest.mark.parametrize("text", refusals(REPOSITORY / "tools" / "check.py"))
def test_what_a_run_is_refused_for_before_it_starts_is_on_the_page(text):
    assert any(says(text, message) for message in messages(OWN))


def test_a_message_that_nobody_says_is_found():
    assert len(messages(OWN)) > 40
    assert not is_said("The loss is ... at local step ...; raise train.lr.")
    assert not is_said("its update is not finite ... lower train.lr")
