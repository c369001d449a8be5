"""The list of faults that ``make faults`` seeds is true of the sources as they are."""

from __future__ import annotations

import faults
from support import ROOT


def test_every_fault_can_be_seeded() -> None:
    for fault in faults.load():
        assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1, fault.breaks
        assert fault.new != fault.old, fault.breaks
