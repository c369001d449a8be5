"""The first facts of a device: they are right where the kernels are, and name what is wrong where one is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import cases, gpu_smoke
from bench.gpu_smoke import Failed, hold, model_checks, op_checks, run_checks
from bench.gpu_stages import NO_KERNELS
from bench.harness import ROOT
from pyglow_fast import _backend, functional
from pyglow_fast.models.glow import Glow

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
CPU = torch.device("cpu")
SMALL = [(2, 4, 5, 9), (3, 5, 7, 3)]


def failures(checks: Any) -> list[str]:
    return [str(row["check"]) for row in run_checks(checks, lambda rows: None) if not row["passed"]]


class Kernels(TorchDispatchMode):
    """Notes the names of the ops of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "pyglow_fast":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# Kernels without an op of their own: channel_mix, coupling_mix, step_backward and gradients by an index run them.
GATHERS = {"gather", "gather_backward", "step_gather_backward"}


def test_every_op_that_has_a_cuda_kernel_is_run() -> None:
    """By the list of kernels in csrc/core.h."""
    listed = re.search(r"#define PYGLOW_KERNELS\(K\)(.*?)#define", (ROOT / "csrc" / "core.h").read_text(), re.DOTALL)
    assert listed is not None
    expected = set(re.findall(r"K\((\w+),", listed[1]))
    with Kernels() as ran:
        for case in gpu_smoke.cases_of(gpu_smoke.data_of(SMALL[0], "float32")):
            case.build(functional, False)()
    assert ran.names == expected - GATHERS


def test_right_kernels_pass() -> None:
    assert failures(op_checks(CPU, SMALL)) == []


def test_a_wrong_op_is_named_and_the_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.gaussian_sample
    monkeypatch.setattr(functional, "gaussian_sample", lambda *args: right(*args) * (1 + 1e-5))
    found = failures(op_checks(CPU, SMALL[:1]))
    assert found == [f"gaussian_sample forward 2x4x5x9, net's output {form}" for form in gpu_smoke.FORMS]


def test_an_op_that_raises_does_not_end_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(functional, "channel_moments", broken)
    rows = run_checks(op_checks(CPU, SMALL[:1]), lambda rows: None)
    failed = [row for row in rows if not row["passed"]]
    assert all("an illegal memory access was encountered" in str(row["text"]) for row in failed)
    assert len(failed) == len(gpu_smoke.FORMS) < len(rows) / 20


@pytest.mark.parametrize("wrong", [1.0 + 1e-5, float("nan")])
def test_what_is_off_is_refused(wrong: float) -> None:
    exact = torch.rand(100, dtype=torch.float64)
    plain = exact.float()
    assert hold([plain], [plain], [exact]).startswith("off by")
    with pytest.raises(Failed, match="output 0 is off by"):
        hold([plain * wrong], [plain], [exact])


def test_models_pass_and_wrong_gradients_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert failures(model_checks(CPU)) == []
    right = Glow.log_prob
    monkeypatch.setattr(Glow, "log_prob", lambda self, x: right(self, x) * (1.01 if x.dtype == torch.float32 else 1))
    steps = [f"training step, {memory}" for memory in gpu_smoke.MODES]
    assert failures(model_checks(CPU)) == steps  # what TF32 rounds is more


def test_a_wrong_inverse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Glow.decode
    monkeypatch.setattr(Glow, "decode", lambda self, latents: right(self, latents) + 1e-3)
    assert failures(model_checks(CPU)) == ["decode(encode(x))"]


def test_the_file_is_written_after_every_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "smoke.json"
    written: list[int] = []

    def checks(device: torch.device) -> Any:
        for index in range(3):
            written.append(len(json.loads(out.read_text())["rows"]) if out.is_file() else 0)
            yield f"check {index}", lambda: "fine"

    monkeypatch.setattr(gpu_smoke, "op_checks", checks)
    monkeypatch.setattr(gpu_smoke, "model_checks", lambda device: iter(()))
    assert gpu_smoke.main(["--device", "cpu", "--out", str(out)]) == 0
    assert written == [0, 1, 2]


def test_without_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cases.Case, "is_ours", staticmethod(lambda device: False))
    assert gpu_smoke.main(["--device", "cpu"]) == NO_KERNELS
    assert "no compiled kernels for cpu" in capsys.readouterr().out


@pytest.mark.parametrize("form", gpu_smoke.FORMS)
def test_forms_of_a_nets_output_stay_as_they_are_where_they_run(form: str) -> None:
    data = gpu_smoke.data_of((2, 8, 3, 5), form)
    dtype, layout = gpu_smoke.FORMS[form]
    for found in (data, data.copy(CPU)):
        assert found.net_out.dtype == dtype
        assert found.net_out.is_contiguous(memory_format=layout)
    assert data.copy(dtype=torch.float64).net_out.is_contiguous(memory_format=layout)


def test_shapes_have_ragged_ends_and_channels_of_all_kinds() -> None:
    channels = [shape[1] for shape in gpu_smoke.SHAPES]
    assert any(c % 4 == 0 for c in channels)
    assert any(c % 2 for c in channels)
    assert any(shape[2] * shape[3] % 4 for shape in gpu_smoke.SHAPES)
