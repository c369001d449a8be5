"""What the README shows works: its Python runs, its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pyglow_fast.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].split()[1:] for line in README.splitlines() if line.startswith("    pyglow-fast ")]


def test_python_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert tuple(names["samples"].shape) == (16, 3, 32, 32)
    assert names["log_prob"].isfinite().all()


@pytest.mark.parametrize("arguments", COMMANDS, ids=shlex.join)
def test_command_parses(arguments: list[str]) -> None:
    assert app.parser().parse_args(arguments) is not None


def test_files_it_shows_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert pictures
    for name in pictures:
        assert (Path(__file__).parents[1] / name).is_file(), name
