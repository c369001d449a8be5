"""What the README and the pages show works: their Python runs, their commands and settings parse."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import normflows
import pytest
from support import ROOT
from support.pages import code, page

from pyglow_fast import GlowConfig
from pyglow_fast.cli import app
from pyglow_fast.cli.train import from_file
from pyglow_fast.data import DataConfig
from pyglow_fast.train import TrainConfig

README = page("README.md")
PAGES = {
    name: page(f"docs/{name}")
    for name in ("index.md", "commands.md", "training.md", "data.md", "page.md", "switching.md")
}
COMMANDS = [
    re.sub(r"\[[^]]*\]", "", line.split("#")[0]).split()[1:]  # [what may follow] is for readers
    for text in (README, *PAGES.values(), page("docs/speed.md"))
    for line in text.splitlines()
    if line.startswith("    pyglow-fast ")
]


EXAMPLE, ACCELERATE = code(README, "python")


def test_switching_example_runs() -> None:
    blocks = [normflows.flows.GlowBlock(4, 8)]
    exec(ACCELERATE, {"model": normflows.NormalizingFlow(normflows.distributions.DiagGaussian((4, 4, 4)), blocks)})


def test_python_example_runs() -> None:
    example, names = EXAMPLE, dict[str, object]()
    exec(example, names)
    assert tuple(names["samples"].shape) == (16, 3, 32, 32)
    assert names["log_prob"].isfinite().all()


@pytest.mark.parametrize(
    ("name", "example"),
    [(name, example) for name, text in PAGES.items() for example in code(text, "python")],
)
def test_examples_of_the_pages_run(name: str, example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example, {})


def test_settings_of_the_pages_are_known(tmp_path: Path) -> None:
    (text,) = code(PAGES["training.md"], "toml")
    (tmp_path / "x.toml").write_text(text)
    settings, images, _ = from_file(str(tmp_path / "x.toml"))
    assert images == "fashion-mnist"
    known = {item.name for section in (TrainConfig, DataConfig, GlowConfig) for item in fields(section)}
    assert set(settings) <= known


@pytest.mark.parametrize("arguments", COMMANDS, ids=shlex.join)
def test_command_parses(arguments: list[str]) -> None:
    assert app.parser().parse_args(arguments) is not None


def test_every_command_has_an_example() -> None:
    (commands,) = [action for action in app.parser()._actions if action.dest == "command"]
    shown = {line.split()[1] for line in PAGES["commands.md"].splitlines() if line.startswith("    pyglow-fast ")}
    assert shown == set(commands.choices)
    table = {name for row in README.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row)}
    assert table <= set(commands.choices)


def test_readme_is_short() -> None:
    """What is not for everybody is in docs."""
    assert len(README) < 9_000
    assert len(re.findall(r"^\|[-|]+\|$", README, re.MULTILINE)) == 5  # tables


def test_files_it_shows_exist() -> None:
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    pages = re.findall(r"\((docs/.*?\.md|CONTRIBUTING\.md)\)", README)
    assert pictures
    assert pages
    for name in (*pictures, *pages):
        assert (ROOT / name).is_file(), name


def test_contributing_lists_the_files_that_there_are() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)/?` \| (.*) \|$", page("CONTRIBUTING.md"), re.MULTILINE))
    for part in ("latents", "experiments"):
        files = {path.name for path in (ROOT / "pyglow_fast" / part).glob("*.py")} - {"__init__.py"}
        assert set(re.findall(r"`(\w+\.py)`", rows[part])) == files
    for part, text in rows.items():
        for name in re.findall(r"`(\w+\.py)`", text):
            assert (ROOT / "pyglow_fast" / part / name).is_file(), (part, name)
