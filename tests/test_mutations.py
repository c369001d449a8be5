"""The list of seeded faults is true of the sources as they are; ``make mutants`` shows which tests catch them."""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from types import ModuleType

import pytest
from support import ROOT


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    """The program of tests/mutations."""
    spec = importlib.util.spec_from_file_location("mutations_run", ROOT / "tests" / "mutations" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def test_each_is_one_line_that_stands_once_in_its_file(faults: ModuleType) -> None:
    for fault in faults.load():
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        changed = fault.applied(text)
        different = [a != b for a, b in zip(text.splitlines(), changed.splitlines(), strict=True)]
        assert sum(different) == 1, fault.name
        assert len(fault.breaks) > 10, fault.name


def test_the_tests_named_first_are_there(faults: ModuleType) -> None:
    for fault in faults.load():
        assert fault.first, fault.name
        for argument in fault.first:
            file, *names = argument.split("[")[0].split("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert all(f"def {name}(" in text or f"class {name}" in text for name in names), f"{fault.name}: {argument}"


def test_every_part_has_some(faults: ModuleType) -> None:
    """Of what the suite is there for, nothing is left out."""
    mutants = faults.load()
    counts = Counter(mutant.name for mutant in mutants)
    assert not [name for name, count in counts.items() if count > 1]
    areas = Counter(mutant.area for mutant in mutants)
    for area in (
        "formulas",
        "schedules",
        "strides",
        "edge_tiles",
        "folding",
        "drift",
        "halos",
        "adapters",
        "converters",
        "web",
    ):
        assert areas[area] >= 3, area
    for area in ("checkpoints", "ranks", "threads", "bindings", "caches", "training", "data", "cli"):
        assert areas[area] >= 2, area
    source = (ROOT / "tests" / "emulation" / "seeded.cu").read_text(encoding="utf-8")
    listed = source.split("names[] = {")[1].split("}")[0]
    seeded = {name.strip().strip('"') for name in listed.split(",")} - {"none"}
    emulated = {mutant.name.removeprefix("emu_") for mutant in mutants if mutant.area == "emulator"}
    assert seeded <= emulated, seeded - emulated


def test_a_text_that_moved_is_told(faults: ModuleType) -> None:
    mutant = faults.load()[0]
    for text in ("", mutant.old * 2):
        with pytest.raises(ValueError, match=mutant.name):
            mutant.applied(text)
