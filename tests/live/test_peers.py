"""The modules of other projects that the tests of this folder import are what they are taken for."""

from __future__ import annotations

import importlib.metadata

import pytest
from live.peers import load


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_export_package(name: str) -> None:
    assert load(name).__version__.startswith(importlib.metadata.version(name).split("+")[0])


def test_what_is_missing_is_skipped_by_name() -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_project"):
        load("no_such_project.flow")
