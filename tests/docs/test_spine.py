"""The files that docs/architecture.md lists are those that a call of log_prob goes through, in that order."""

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

LISTED = re.findall(r"^\d+\. `([\w./]+)`", page("docs/architecture.md"), re.MULTILINE)


def test_the_files_are_there() -> None:
    assert len(LISTED) <= 10
    assert [name for name in LISTED if not (ROOT / name).is_file()] == []


@pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
def test_log_prob_goes_through_the_files_in_their_order() -> None:
    """A state is handed to each after the one before, and by none to one that comes before it."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=3, hidden=16)
    x = torch.rand(4, 3, 16, 16) - 0.5
    model.initialize(x)
    listed = [str(ROOT / name) for name in LISTED if name.endswith(".py")]
    entered: list[str] = []
    backwards: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event != "call" or name not in listed:
            return
        if not any(isinstance(value, Tensor) and value.dim() == x.dim() for value in frame.f_locals.values()):
            return  # it is given no state
        if name not in entered:
            entered.append(name)
        caller = frame.f_back
        while caller is not None and caller.f_code.co_filename not in listed:
            caller = caller.f_back
        if caller is not None and listed.index(caller.f_code.co_filename) > listed.index(name):
            backwards.append(f"{caller.f_code.co_name} calls {frame.f_code.co_name}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        model.log_prob(x)
    finally:
        sys.setprofile(before)
    assert entered == listed
    assert backwards == []
