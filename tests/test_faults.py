"""The list of faults that ``make faults`` seeds is true of the sources as they are."""

from __future__ import annotations

import shutil
from pathlib import Path

import faults
import pytest
from support import ROOT


def test_every_fault_can_be_seeded(tmp_path: Path) -> None:
    for fault in faults.load():
        copy = tmp_path / fault.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / fault.file, copy)
        fault.seed(copy.parents[len(Path(fault.file).parts) - 1])
        assert copy.read_text(encoding="utf-8") != (ROOT / fault.file).read_text(encoding="utf-8"), fault.breaks


def test_a_text_that_moved_is_refused(tmp_path: Path) -> None:
    fault = faults.Fault("kernel.h", "x + y", "x - y", "A sum is a difference.")
    for text in ("", "x + y; x + y;"):
        (tmp_path / fault.file).write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="once in kernel"):
            fault.seed(tmp_path)
