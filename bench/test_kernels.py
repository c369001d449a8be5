"""The cases of bench.kernels under pytest-benchmark: ``python -m pytest bench/test_kernels.py --benchmark-only``.

Not collected with the tests. Grouped by case and shape, so that the implementations stand beside each other.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import SHAPES, Data, kernel_cases
from bench.harness import synchronize
from pyglow_fast import functional, reference

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
PROBE = Data((1, 4, 3, 3), torch.device("cpu"))
NAMES = [case.name for case in kernel_cases(PROBE)]


@pytest.mark.parametrize("library", [functional, reference], ids=["pyglow_fast", "reference"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("device", DEVICES)
def test_kernel(
    benchmark: BenchmarkFixture, device: str, shape: tuple[int, ...], name: str, library: ModuleType
) -> None:
    place = torch.device(device)
    data = Data(shape, place)
    case = next(case for case in kernel_cases(data) if case.name == name)
    if library is functional and not case.is_ours(place):
        pytest.skip(f"{name} has no kernel for {device}")
    run = case.build(library, False)

    def measured() -> None:
        run()
        synchronize(place)

    benchmark.group = f"{name} {'x'.join(map(str, shape))} {device}"
    benchmark(measured)
