"""What README and the pages show works: their Python runs, their commands and settings parse."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import normflows
import pytest
import torch
from support.glow_tts_cases import TextDecoder
from support.pages import code, page

from pyglow_fast import _backend
from pyglow_fast.cli import app, main
from pyglow_fast.cli.train import from_file

EXAMPLE, ACCELERATE = code(page("README.md"), "python")
PAGES = ("index", "commands", "training", "own-net", "memory", "data", "page", "switching")
NEEDS_KERNELS = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
EXAMPLES = [
    pytest.param(example, id=f"{name}{i}", marks=[NEEDS_KERNELS] if name == "memory" else [])  # which gives bytes
    for name in PAGES
    for i, example in enumerate(code(page(f"docs/{name}.md"), "python"))
]


def test_python_of_the_readme_runs() -> None:
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    assert tuple(names["samples"].shape) == (16, 3, 32, 32)
    assert names["log_prob"].isfinite().all()
    blocks = [normflows.flows.GlowBlock(4, 8)]
    exec(ACCELERATE, {"model": normflows.NormalizingFlow(normflows.distributions.DiagGaussian((4, 4, 4)), blocks)})


@pytest.mark.parametrize("example", EXAMPLES)
def test_python_of_the_pages_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(example, {})


def test_python_of_the_page_of_sequences_runs() -> None:
    """The blocks go on from one another, and from a decoder of coqui's interface."""
    names: dict[str, Any] = {"decoder": TextDecoder(4, 6, 2, kernel=3, rate=1, layers=2)}
    for example in code(page("docs/sequences.md"), "python"):
        exec(example, names)
    assert torch.allclose(names["back"], names["x"], atol=1e-3)
    assert len(names["report"].replaced) == 6


def test_settings_of_the_pages_are_known(tmp_path: Path) -> None:
    (text,) = code(page("docs/training.md"), "toml")
    (tmp_path / "x.toml").write_text(text)
    assert from_file(str(tmp_path / "x.toml"))[1] == "fashion-mnist"


def test_commands_parse() -> None:
    """Those of README and of the pages, by the command that is installed."""
    shown = [
        re.sub(r"\[[^]]*\]", "", line.split("#")[0]).split()[1:]  # [what may follow] is for readers
        for name in ("README.md", *(f"docs/{name}.md" for name in (*PAGES, "speed")))
        for line in page(name).splitlines()
        if line.startswith("    pyglow-fast ")
    ]
    assert len(shown) > 20
    for arguments in shown:
        assert app.parser().parse_args(arguments) is not None, arguments
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="pyglow-fast")
    assert entry.load() is main
