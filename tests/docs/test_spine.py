"""docs/architecture.md lists all files that a call of log_prob hands a state to, the spine in its order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from traceback import walk_stack
from types import FrameType
from typing import Any

import pytest
import torch
from support import ROOT
from support.pages import page
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast._core import backend

PAGE = page("docs/architecture.md").partition("## The spine")[2].partition("**The Python executor**")[0]
SPINE = re.findall(r"^\d+\. `([\w./]+)`", PAGE, re.MULTILINE)
BESIDE = [
    name for line in PAGE.splitlines() if line.startswith("- ") for name in re.findall(r"`(pyglow_fast/[\w./]+)`", line)
]


def calls_of(run: Callable[[], object]) -> list[tuple[list[str], bool]]:
    """Lists the calls of the package's functions: files on the stack, its own first; whether it is given a state."""
    package, found = str(ROOT / "pyglow_fast"), list[tuple[list[str], bool]]()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            given = any(isinstance(value, Tensor) and value.dim() == 4 for value in frame.f_locals.values())
            found.append(([each.f_code.co_filename for each, _ in walk_stack(frame)], given))

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


def test_the_files_are_there() -> None:
    assert len(SPINE) <= 10
    assert [name for name in (*SPINE, *BESIDE) if not (ROOT / name).is_file()] == []


@pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")
def test_log_prob_goes_through_the_files_in_their_order() -> None:
    """A state is handed to each after the one before, and by none to one that comes before it; and to no other file."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=3, hidden=23)  # no other test has this shape
    x = torch.rand(5, 3, 16, 16) - 0.5
    model.initialize(x)
    spine = [str(ROOT / name) for name in SPINE if name.endswith(".py")]
    entered = [files for files, given in calls_of(lambda: model.log_prob(x)) if given]
    assert list(dict.fromkeys(name for name, *_ in entered if name in spine)) == spine
    assert {name for name, *_ in entered if name not in spine} == {str(ROOT / name) for name in BESIDE}
    for name, *callers in entered:
        caller = next((each for each in callers if each in spine), spine[0])
        assert name not in spine or spine.index(caller) <= spine.index(name), f"{caller} calls {name}"


@pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")
@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_python_of_a_step_is_bounded(memory: str) -> None:
    """Calls of functions of the package for each flow step of a training step, their files, and those given a state."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=3, n_steps=8, hidden=16, memory=memory)
    x = torch.rand(4, 3, 16, 16) - 0.5
    for _ in range(3):  # until what is known of these shapes is known
        model.log_prob(x).mean().backward()
    calls = calls_of(lambda: model.log_prob(x).mean().backward())
    assert len(calls) / 24 <= 40
    assert len({name for (name, *_), _ in calls}) <= 26
    assert len({name for (name, *_), given in calls if given}) <= 17
