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


def is_said(message, of_flower=False):
    """Whether some text of the code has all pieces of a message, one after another, a value behind each."""
    pieces = [re.escape(piece.strip()) for piece in message.split("...") if piece.strip(" .")]
    between = rf"[\s'\"(=]*{HOLE}.*?"
    return any(re.search(f"(?s){between.join(pieces)}", text) for text in texts(of_flower))


@pytest.mark.parametrize("message", messages(OWN))
def test_the_app_still_says_so(message):
    assert is_said(message)


@pytest.mark.slow
@pytest.mark.parametrize("message", messages(OF_FLOWER))
def test_flower_still_says_so(message):
    assert is_said(message, of_flower=True)


def test_a_message_that_nobody_says_is_found():
    assert len(messages(OWN)) > 40
    assert not is_said("The loss is ... at local step ...; raise train.lr.")
    assert not is_said("its update is not finite ... lower train.lr")
