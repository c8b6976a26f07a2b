"""Find every block and every command in the docs: blocks by a CommonMark parser, commands inside them and inside lines.

An indented block, and one fenced as ``console``, is of commands. One fenced as ``text`` is a picture or what a program
prints.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import REPOSITORY

PAGES = ("README.md", "CONTRIBUTING.md", *(str(p.relative_to(REPOSITORY)) for p in (REPOSITORY / "docs").rglob("*.md")))
PROGRAMS = (
    "make|python3?|flwr|flower-supernode|flower-superlink|pip|petalwise|tensorboard|mlflow|wandb|apt-get|ssh-keygen"
)
_LOOP = re.compile(r"for (?P<name>\w+) in (?P<first>\S+)[^;]*; do (?P<body>.*); done")


@dataclass(frozen=True)
class Block:
    """A code block; ``language`` is ``console`` where it is indented, ``title`` what its fence says after that."""

    page: str
    line: int
    language: str
    title: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command; ``mention`` where it stands inside a line, which may leave out its arguments."""

    page: str
    line: int
    text: str
    mention: bool = False

    @property
    def words(self) -> list[str]:
        """What a shell would hand on; three dots at the end stand for more of the same."""
        words = shlex.split(re.sub(r"\$\(echo (.*?)\)", r"\1", self.text), comments=True)
        return [word for word in words if word != "..."][len(self.environment) :]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that are set for this command alone, before its name."""
        words = takewhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(self.text, comments=True))
        return dict(word.split("=", 1) for word in words)


def read_blocks() -> Iterator[Block]:
    """Walk over the code blocks of all pages."""
    for page in sorted(PAGES):
        for token in _tokens(page):
            if token.type in ("fence", "code_block"):
                language, _, title = token.info.strip().partition(" ")
                yield Block(
                    page, token.map[0] + 1, language if token.type == "fence" else "console", title, token.content
                )


def read_commands() -> Iterator[Command]:
    """Walk over the commands of all pages: those of blocks, and those in lines that have an argument."""
    for block in read_blocks():
        if block.language == "console":
            yield from commands_of(block)
    for page in sorted(PAGES):
        for token in _tokens(page):
            for child in token.children or []:
                if child.type == "code_inline" and re.match(rf"({PROGRAMS}) \S", child.content):
                    yield Command(page, token.map[0] + 1, child.content, mention=True)


def commands_of(block: Block) -> Iterator[Command]:
    """Split a block at its line ends, but for those behind a backslash; of a loop, take its first turn."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        text = line.strip()
        if loop := _LOOP.fullmatch(text):
            text = loop["body"].replace(f"${loop['name']}", loop["first"])
        if text and not text.startswith("#"):
            yield Command(block.page, block.line, text)


def _tokens(page: str) -> list[Token]:
    return MarkdownIt().enable("table").parse((REPOSITORY / page).read_text("utf-8"))
