"""What the pages show, taken out of their Markdown: code by language, and commands as words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

from support import ROOT

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page, and the number of its first line."""

    language: str
    code: str
    line: int


def page(name: str) -> str:
    """The text of a page, by its path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in _BLOCK.finditer(text)]


def shell_commands(shell: str) -> Iterator[list[str]]:
    """The words of each command; a backslash at the end of a line continues it, # begins a comment."""
    for line in shell.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words
