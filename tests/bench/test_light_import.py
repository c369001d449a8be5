"""Single modules of packages whose own ``__init__`` cannot run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.light_import import StandIn, light_import

NAME = "heavy_package_of_a_test"
FILES = {
    "__init__.py": "import a_framework_that_is_missing\n",
    "plain.py": "VALUE = 7\n",
    "parts/__init__.py": "from .block import Block\n",
    "parts/block.py": "class Block:\n    pass\n",
    "models/__init__.py": "from .needy import Model\n",
    "models/needy.py": "import another_that_is_missing\n",
    "models/flow.py": f"from {NAME} import Result, plain\nfrom {NAME}.parts import Block\n",
}


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in FILES.items():
        path = tmp_path / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


def test_a_module_below_packages_that_fail() -> None:
    flow = light_import(f"{NAME}.models.flow")
    assert flow.plain.VALUE == 7
    assert flow.Block.__module__ == f"{NAME}.parts.block"
    assert not isinstance(sys.modules[f"{NAME}.parts"], StandIn)  # it imports, and is itself
    assert isinstance(sys.modules[f"{NAME}.models"], StandIn)
    assert light_import(f"{NAME}.models.flow") is flow


def test_what_its_init_would_have_defined_refuses_to_be_made() -> None:
    flow = light_import(f"{NAME}.models.flow")
    with pytest.raises(ImportError, match=rf"{NAME}\.Result: {NAME} cannot be imported here"):
        flow.Result()


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        (f"{NAME}.models.needy", "another_that_is_missing"),
        (f"{NAME}.absent", rf"{NAME}\.absent"),
        ("no_such_package.part", "no_such_package"),
    ],
)
def test_what_is_missing_is_named(name: str, missing: str) -> None:
    with pytest.raises(ImportError, match=missing):
        light_import(name)
