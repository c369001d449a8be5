"""Rows of kernels on a GPU, made on a CPU: what is in them, what is predicted, and what is not measured says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, gpu_kernels
from bench.gpu_kernels import KernelRow, Kernels
from pyglow_fast import _backend, functional

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
CPU = torch.device("cpu")
SHAPE = (1, 4, 3, 5)


def rows(only: str = "") -> list[KernelRow]:
    return Kernels(CPU, only).rows(SHAPE)


def test_every_case_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    assert gpu_kernels.main(["--device", "cpu", "--shapes", "1x4x3x5", "--only", "coupling", "--out", str(out)]) == 0
    content = json.loads(out.read_text())
    expected = [(c.op, c.mode) for c in cases.kernel_cases(cases.Data(SHAPE, CPU)) if "coupling" in c.name]
    assert [(row["op"], row["mode"]) for row in content["rows"]] == expected
    for row in content["rows"]:
        assert row["bytes"] == cases.traffic(row["op"], row["mode"], SHAPE)
        assert row["copies"] * row["bytes"] > 2 * 2**14  # beyond what the stand-in has as an L2
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert min(row["copy_seconds"], row["plain_seconds"]) > 0
        assert (row["predicted_seconds"], row["implementation"]) == (None, "pyglow_fast")
    assert "| coupling_mix | backward |" in capsys.readouterr().out


def test_every_copy_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    right = functional.channel_moments

    def moments(x: torch.Tensor) -> Any:
        seen.append(x.data_ptr())
        return right(x)

    monkeypatch.setattr(functional, "channel_moments", moments)
    (row,) = rows("channel_moments")
    assert len(set(seen)) == row.copies > 100


def test_the_share_of_the_copy() -> None:
    row = KernelRow("x", "forward", SHAPE, "GPU", 12_000_000, 2, 4e-6, 3.9e-6, 4.1e-6, 3e-6, None, 8e-6)
    assert row.share_of_copy == pytest.approx(0.75)
    shown = "| x | forward | 4.00 | 3.90 to 4.10 | 12.00 | 3000 | 3.00 | 0.75 | - | 8.00 |  |"
    assert shown in gpu_kernels.table([row])


def test_predictions_stand_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {("channel_moments", "forward"): 7.25}
    monkeypatch.setattr(gpu_kernels, "predictions", lambda shape: found if shape == SHAPE else {})
    (row,) = rows("channel_moments")
    assert row.predicted_seconds == pytest.approx(7.25e-6)
    assert "| 7.25 |" in gpu_kernels.table([row])


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = functional.channel_moments
    monkeypatch.setattr(functional, "channel_moments", lambda x: tuple(1.01 * value + 1 for value in right(x)))
    (row,) = rows("channel_moments")
    assert row.seconds is None
    assert "differs" in row.note
    assert row.plain_seconds is not None
    assert gpu_kernels.main(["--device", "cpu", "--shapes", "1x4x3x5", "--only", "channel_moments"]) == 1
    assert "| channel_moments | forward | - | - |" in capsys.readouterr().out


def test_what_cannot_be_captured_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels(CPU, "channel_moments")
    right = kernels.timer.device.record
    calls = 0

    def record(function: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the copy is recorded first
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return right(function)

    monkeypatch.setattr(kernels.timer.device, "record", record)
    (row,) = kernels.rows(SHAPE)
    assert (row.seconds, row.note) == (None, "operation not permitted when stream is capturing")


@pytest.mark.parametrize("text", ["8x12x64", "8x6x64x64", "8x12x0x64", "8,12", ""])
def test_shapes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_kernels.main(["--shapes", text])
    assert "expected shapes such as 8x12x64x64" in capsys.readouterr().err


def test_without_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cases.Case, "is_ours", staticmethod(lambda device: False))
    assert gpu_kernels.main(["--device", "cpu"]) == 1
    assert "no compiled kernels for cpu" in capsys.readouterr().out
