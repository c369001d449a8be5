"""The benchmark of live models, on two steps of FrEIA's."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import live, live_cases
from bench.live_cases import LiveCase
from bench.live_rows import VARIANTS, LiveRow, faults, table

framework = pytest.importorskip("FrEIA.framework")
modules = pytest.importorskip("FrEIA.modules")


def net(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1))


def call(model: nn.Module, x: Tensor, scale: Tensor) -> live_cases.Latents:
    z, log_det = model(x * scale)
    return [z], log_det


def tiny(batch: int) -> LiveCase:
    stack = framework.SequenceINN(6, 8, 8)
    for _ in range(2):
        stack.append(modules.AllInOneBlock, subnet_constructor=net)
    return LiveCase(stack, (torch.randn(batch, 6, 8, 8), torch.ones(batch, 1, 1, 1)), call, "FrEIA", masks=1)


class Doubled(nn.Module):
    """A flow that no adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.scale.exp(), 64 * self.scale.sum().expand(x.shape[0])


def missing(batch: int) -> LiveCase:
    raise ImportError("No module named 'a_project'")


@pytest.fixture(autouse=True)
def _models(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = dataclasses.replace(tiny(4), model=Doubled())
    for name, make in {"tiny": tiny, "unknown": lambda batch: unknown, "missing": missing}.items():
        monkeypatch.setitem(live_cases.MODELS, name, (make, 4))


def measured(precision: str = "fp32") -> dict[str, LiveRow]:
    rows = live.Measurement("tiny", precision, None, 2, 1.0).run()
    assert tuple(row.variant for row in rows) == VARIANTS
    return {row.variant: row for row in rows}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_variants_are_measured(precision: str) -> None:
    rows = measured(precision)
    assert not any(row.wrong for row in rows.values())
    assert [row.replaced for row in rows.values()] == [0, 2, 2, 2]
    assert [row.joined for row in rows.values()] == [0, 0, 2, 2]
    for row in rows.values():
        assert row.batch == 4
        assert row.train_seconds is not None
        assert row.infer_seconds is not None
        assert row.train_seconds > 0 < row.infer_seconds
        assert row.activation_bytes is not None
        assert row.activation_bytes > 0
        assert row.errors["float64 gradients"] <= 1e-9
        assert 0 < row.errors["gradients"] < (1e-5 if precision == "fp32" else 0.1)
    assert rows["theirs"].train_ratio == rows["theirs"].infer_ratio == rows["theirs"].memory_ratio == 1.0
    assert rows["reversible"].activation_bytes < rows["theirs"].activation_bytes
    assert LiveRow.of(json.loads(json.dumps(dataclasses.asdict(rows["store"])))) == rows["store"]


def test_other_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: Any, memory: str | None) -> Any:
        done = accelerate(model, memory)
        offset = dict(model.named_parameters())["module_list.0.global_offset"]
        offset.data.add_(1e-8 if memory is None else 1e-4)
        return done

    accelerate = live.accelerate
    monkeypatch.setattr(live, "accelerate", spoil)
    rows = measured()
    assert not rows["theirs"].wrong
    assert "outputs in float64 off by" in rows["accelerated"].note
    assert "outputs off by" in rows["store"].note
    assert rows["store"].wrong
    assert rows["store"].train_seconds is None


def test_what_an_adapter_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = live.accelerate

    def fail(model: Any, memory: str | None) -> Any:
        if memory == "store":
            raise KeyError("a weight")
        return accelerate(model, memory)

    monkeypatch.setattr(live, "accelerate", fail)
    rows = measured()
    assert (rows["store"].note, rows["store"].wrong) == ("KeyError: 'a weight'", True)
    assert rows["reversible"].train_ratio is not None
    assert "KeyError" in table(list(rows.values()))


@pytest.mark.parametrize("error", [math.nan, 3e-4])
def test_faults(error: float) -> None:
    values = {"float64 outputs": 0.0, "float64 gradients": 1e-10, "outputs": 1e-7, "gradients": 1e-7}
    theirs = LiveRow("m", "s", 1, "theirs", "fp32", "cpu", "default", errors=values)
    assert faults(theirs, theirs) == ""
    for name in values:
        assert faults(dataclasses.replace(theirs, errors=values | {name: error}), theirs) != ""
    other_signs = dataclasses.replace(theirs, errors=values | {"gradients": 2e-4})
    assert faults(other_signs, theirs) == ""
    assert faults(dataclasses.replace(other_signs, precision="bf16"), theirs) != ""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    options = ["--models", "unknown,missing,tiny", "--precision", "fp32", "--rounds", "2", "--seconds", "1"]
    assert live.main([*options, "--batch", "2", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "live-cpu.json").read_text())
    assert [(row["model"], row["variant"]) for row in content["rows"]] == [
        (model, variant) for model in ("unknown", "tiny") for variant in VARIANTS
    ]
    assert content["notes"] == ["missing is left out: No module named 'a_project' (make test-live installs it)"]
    assert all(row["note"].startswith("nothing replaced: model: expected") for row in content["rows"][1:4])
    assert (tmp_path / "live-cpu.png").stat().st_size > 0
    assert "all copies give the numbers of theirs" in capsys.readouterr().out


def test_refusals(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        live.main(["--models", "glow"])
    with pytest.raises(SystemExit):
        live.main(["--models", "tiny", "--rounds", "1"])
    assert "expected 2 rounds or more and a batch of 1 or more" in capsys.readouterr().err
