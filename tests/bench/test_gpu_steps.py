"""Launches of a training step: counted where they run, ours told apart, and a captured step beside the eager one."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch.autograd import DeviceType

from bench import gpu_steps
from bench.gpu_steps import GRAPH, StepRow, launched
from bench.model_cases import CONFIGS, PLAIN
from bench.models import quick
from pyglow_fast import _backend, functional

compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
CPU = torch.device("cpu")
SHAPE = quick(CONFIGS["d"])


def step() -> None:
    x = torch.rand(1, 4, 3, 3)
    with torch.no_grad():
        functional.channel_moments(x)
    torch.add(x, x)


@compiled
def test_our_launches_are_told_apart() -> None:
    launches, own, milliseconds = launched(step, CPU)
    assert own == 1
    assert launches >= 3  # rand has launches of its own
    assert milliseconds > 0


class Event:
    def __init__(self, name: str, device: Any, microseconds: float = 1.0, annotation: bool = False) -> None:
        self.name, self.device_type, self.is_user_annotation = name, device, annotation
        self.time_range = self
        self.microseconds = microseconds

    def elapsed_us(self) -> float:
        return self.microseconds


class Profile:
    """What the profiler would tell on a GPU."""

    found: ClassVar[list[Event]] = []

    def __init__(self, activities: list[Any]) -> None:
        assert len(activities) == 2

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *failure: object) -> None:
        pass

    def events(self) -> list[Event]:
        return self.found


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "profile", Profile)
    monkeypatch.setattr(gpu_steps, "synchronize", lambda device: None)


def test_on_a_gpu_kernels_are_counted(like_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    events = [Event("void pyglow::cuda::mix<float>", DeviceType.CUDA, 5.0), Event("Memset", DeviceType.CUDA, 2.0)]
    events += [Event("aten::add", DeviceType.CPU, 9.0), Event("a range", DeviceType.CUDA, 9.0, annotation=True)]
    monkeypatch.setattr(Profile, "found", events)
    assert launched(lambda: None, torch.device("cuda")) == (2, 1, 7e-3)


def test_a_profiler_that_is_blind_is_no_zero(like_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Profile, "found", [Event("aten::add", DeviceType.CPU)])
    with pytest.raises(RuntimeError, match="saw no kernel"):
        launched(lambda: None, torch.device("cuda"))


@compiled
def test_rows_of_all_precisions() -> None:
    found = list(gpu_steps.rows("d", SHAPE, CPU))
    rows = [row for row in found if isinstance(row, StepRow)]
    expected = [(name, how) for how in ("fp32", "tf32", "bf16") for name in (*gpu_steps.MODES, PLAIN)]
    assert [(row.implementation, row.precision) for row in rows] == expected
    for row in rows:
        assert row.own_launches > 0 if row.implementation != PLAIN else row.own_launches == 0
        assert row.launches > row.own_launches
    store, plain = (next(row for row in rows if row.implementation == name) for name in ("store", PLAIN))
    assert store.launches < plain.launches
    assert [row for row in found if isinstance(row, str)] == 3 * [
        "CUDA graphs are left out: they are captured on a GPU alone"
    ]


def test_a_captured_step_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Graphs:
        def train_step(self, x: torch.Tensor) -> None:
            calls.append("step")

    class Model:
        memory = "store"

        def make_graphed(self, x: torch.Tensor) -> Graphs:
            assert self.memory == "reversible"
            return Graphs()

        def zero_grad(self, set_to_none: bool) -> None:
            pass

        def memory_report(self) -> list[dict[str, int]]:
            return [{"skipped": 2}, {"skipped": 0}]

    row = gpu_steps.graph_row(Model(), torch.rand(1), "reversible", "d", "fp32", SHAPE)
    assert (row.implementation, row.variant, row.note) == ("reversible", GRAPH, "2 steps skipped")
    assert len(calls) == 1 + gpu_steps.ROUNDS + 1  # warm-up, the clock, the profiler


def test_the_table_says_how_long_the_gpu_waits() -> None:
    row = StepRow("store", "eager", "bf16", "b", SHAPE, 1200, 300, 2.0, 8.0, "x")
    assert gpu_steps.table([row]).splitlines()[-1] == "| store | eager | bf16 | 1200 | 300 | 2.00 | 8.00 | 75 % | x |"
