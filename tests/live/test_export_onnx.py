"""ONNX files of models and layers, run by onnxruntime and OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live.peers import load
from support.export_cases import ALL, LINEAR_ALGEBRA, LikelihoodMap, assert_same, dynamic_shapes, other_input
from torch import Tensor

from pyglow_fast.interop import accelerate

onnx = pytest.importorskip("onnx", reason="onnx is missing: pip install onnx onnxscript onnxruntime openvino")
pytest.importorskip("onnxscript", reason="onnxscript is missing: torch.onnx.export asks for it")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


def run_by_onnxruntime(path: Path, x: Tensor) -> list[Tensor]:
    runtime: Any = pytest.importorskip("onnxruntime", reason="onnxruntime is missing")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.as_tensor(out) for out in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def run_by_openvino(path: Path, x: Tensor) -> list[Tensor]:
    openvino: Any = pytest.importorskip("openvino", reason="openvino is missing")
    core = openvino.Core()
    # Else it computes in bfloat16 where the processor can.
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [torch.as_tensor(out) for out in compiled([x.numpy()]).values()]


RUNTIMES = {"onnxruntime": run_by_onnxruntime, "openvino": run_by_openvino}


def check(path: Path, name: str, model: torch.nn.Module, x: Tensor, runtime: str) -> None:
    """Standard operators alone; the model's results on one sample, and on another batch and image size."""
    written = onnx.load(path)
    assert {node.domain for node in written.graph.node} <= {"", "ai.onnx"}
    assert not written.functions
    for batch in (x, x[:1], other_input(x, name)):
        with torch.no_grad():
            assert_same(RUNTIMES[runtime](path, batch), model(batch))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", sorted(set(ALL) - set(LINEAR_ALGEBRA)))
def test_onnx(name: str, runtime: str, tmp_path: Path) -> None:
    model, x = ALL[name]()
    path, shapes = tmp_path / "model.onnx", dynamic_shapes(name)
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    check(path, name, model, x, runtime)


@pytest.mark.parametrize("name", ["FrEIA", "FrEIA, reversible", "nflows", "glow", "frozen", "step"])
def test_the_exporter_that_traces(name: str, tmp_path: Path) -> None:
    """Of normflows' LU convolutions it has no operator for torch.diag, which they call themselves."""
    model, x = ALL[name]()
    axes = {"x": {0: "n"} if "glow" in name or "frozen" in name else {0: "n", 2: "height", 3: "width"}}
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes)
    check(path, name, model, x, "onnxruntime")


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("memory", [None, "reversible"])
def test_maps_of_anomalibs_fastflow(memory: str | None, runtime: str, tmp_path: Path) -> None:
    fastflow = load("anomalib.models.image.fastflow.torch_model")
    flow = fastflow.create_fast_flow_block([8, 6, 6], conv3x3_only=False, hidden_ratio=1.0, flow_steps=4)
    assert len(accelerate(flow, memory=memory).replaced) == 4
    model, x = LikelihoodMap(flow).eval(), torch.randn(3, 8, 6, 6)
    shapes = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    check(path, "FrEIA", model, x, runtime)
