"""The modules of other projects that the tests of this folder import are what they are taken for."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from live.peers import load


def test_blocks_are_the_projects_own() -> None:
    fastflow = load("anomalib.models.image.fastflow.torch_model")
    stack = fastflow.create_fast_flow_block([8, 4, 4], conv3x3_only=False, hidden_ratio=1.0, flow_steps=2)
    assert {type(block).__module__ for block in stack.module_list} == {
        "anomalib.models.components.flow.all_in_one_block"
    }
    z, log_det = stack(torch.randn(2, 8, 4, 4))
    assert z.shape == (2, 8, 4, 4)
    assert log_det.shape == (2,)


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime", "openvino"])
def test_export_package(name: str) -> None:
    assert load(name).__version__.startswith(importlib.metadata.version(name).split("+")[0])


def test_what_is_missing_is_skipped_by_name() -> None:
    with pytest.raises(pytest.skip.Exception, match="no_such_project"):
        load("no_such_project.flow")
