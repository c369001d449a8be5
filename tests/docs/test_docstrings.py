"""The examples of docstrings run: what one would type at Python's prompt, imports and all, with what it prints.

They run with one thread, from one seed, without a network, in an empty folder, and print the same with and without the
compiled extension.
"""

from __future__ import annotations

import doctest
import importlib
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from support.machine import no_network
from support.program import expect_passed

PACKAGE = "pyglow_fast"
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [path for path in sorted((ROOT / PACKAGE).rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


def is_ours(error: BaseException) -> bool:
    """Whether an ImportError is of something that is always installed."""
    return (getattr(error, "name", None) or "").split(".")[0] in (PACKAGE, "torch", "numpy", "safetensors")


class _Runner(doctest.DocTestRunner):
    """Runs examples; where one needs a library that is missing, its test is skipped."""

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        if issubclass(exc_info[0], ImportError) and not is_ours(exc_info[1]):
            pytest.skip(str(exc_info[1]))
        super().report_unexpected_exception(out, test, example, exc_info)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_examples(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        module = importlib.import_module(module_of(path))
    except ImportError as error:
        if is_ours(error):
            raise
        pytest.skip(str(error))  # the library that the module is made for is missing
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__, globs={})
    assert tests
    said: list[str] = []
    for test in tests:
        torch.manual_seed(20180710)
        _Runner(optionflags=OPTIONS).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.full
def test_examples_print_the_same_without_the_extension() -> None:
    expect_passed("-k", "test_examples and not print", __file__, PYGLOW_FORCE_REFERENCE="1")
