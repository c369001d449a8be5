"""docs/architecture.md lists all files that a call of log_prob hands a state to, the spine in its order."""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from support import ROOT
from support.pages import page
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import _backend

PAGE = page("docs/architecture.md").partition("## The spine")[2].partition("**The Python executor**")[0]
SPINE = re.findall(r"^\d+\. `([\w./]+)`", PAGE, re.MULTILINE)
BESIDE = [
    name for line in PAGE.splitlines() if line.startswith("- ") for name in re.findall(r"`(pyglow_fast/[\w./]+)`", line)
]


def test_the_files_are_there() -> None:
    assert len(SPINE) <= 10
    assert [name for name in (*SPINE, *BESIDE) if not (ROOT / name).is_file()] == []


@pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
def test_log_prob_goes_through_the_files_in_their_order() -> None:
    """A state is handed to each after the one before, and by none to one that comes before it; and to no other file."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=3, hidden=23)  # no other test has this shape
    x = torch.rand(5, 3, 16, 16) - 0.5
    model.initialize(x)
    spine = [str(ROOT / name) for name in SPINE if name.endswith(".py")]
    package = str(ROOT / "pyglow_fast")
    entered: list[str] = []
    backwards: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(package):
            return
        if not any(isinstance(value, Tensor) and value.dim() == x.dim() for value in frame.f_locals.values()):
            return  # it is given no state
        if name not in entered:
            entered.append(name)
        caller = frame.f_back
        while caller is not None and caller.f_code.co_filename not in spine:
            caller = caller.f_back
        if caller is not None and name in spine and spine.index(caller.f_code.co_filename) > spine.index(name):
            backwards.append(f"{caller.f_code.co_name} calls {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        model.log_prob(x)
    finally:
        sys.setprofile(before)
    assert [name for name in entered if name in spine] == spine
    assert {name for name in entered if name not in spine} == {str(ROOT / name) for name in BESIDE}
    assert backwards == []


@pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_python_of_a_step_is_bounded(memory: str) -> None:
    """Calls of functions of the package for each flow step of a training step, their files, and those given a state."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=3, n_steps=8, hidden=16, memory=memory)
    x, package = torch.rand(4, 3, 16, 16) - 0.5, str(ROOT / "pyglow_fast")
    for _ in range(3):  # until what is known of these shapes is known
        model.log_prob(x).mean().backward()
    calls, files, given = 0, set(), set()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(package):
            calls += 1
            files.add(frame.f_code.co_filename)
            if any(isinstance(value, Tensor) and value.dim() == 4 for value in frame.f_locals.values()):
                given.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        model.log_prob(x).mean().backward()
    finally:
        sys.setprofile(before)
    assert calls / 24 <= 40
    assert len(files) <= 26
    assert len(given) <= 16
