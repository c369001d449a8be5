"""What bench/results/gpu-model.json says of the compiled kernels is true of the code as it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import toolchain
from support.case_launches import case_launches
from support.launch_cases import AllKernels

from bench import gpu_counts, gpu_model
from bench.cases import BETWEEN, SHAPES, SQUEEZED, Case, Data, kernel_cases, op_cases
from bench.machine_code import Cubin
from pyglow_fast import ops, reference

AGAIN = "python -m bench.gpu_tables --write counts anew"
# Another nvcc makes other code.
SAME, OTHER_COMPILER = 0.02, 0.3


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> list[Cubin]:
    return toolchain.cubins(tmp_path_factory, gpu_counts.ARCH)


@pytest.fixture(scope="module")
def executed(cubins: list[Cubin]) -> gpu_counts.Executed:
    return gpu_counts.Executed(gpu_counts.Codes(cubins))


@pytest.fixture
def emulator(_library: Path) -> AllKernels:
    return AllKernels(_library)


def written() -> dict[tuple[str, str, tuple[int, ...]], dict[str, Any]]:
    """The cases of the file."""
    return {(case["op"], case["mode"], tuple(case["shape"])): case for case in gpu_model.content()["cases"]}


def sectors(launch: dict[str, Any], way: str) -> float:
    """Of tensors; where scratch memory begins, and so how many sectors it has, differs from call to call."""
    return sum(count for key, count in launch["sectors"].items() if key.endswith(way) and not key.startswith("other"))


def check_same(entry: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """The same launches, and of each what an average block does."""
    what = f"{entry['op']}, {entry['mode']}, {entry['shape']}: {AGAIN}"
    assert entry["others"] == expected["others"], what
    exact = ("kernel", "arguments", "blocks", "threads", "dynamic_bytes", "static_bytes")
    assert [[launch[name] for name in exact] for launch in entry["launches"]] == [
        [launch[name] for name in exact] for launch in expected["launches"]
    ], what
    for launch, wanted in zip(entry["launches"], expected["launches"], strict=True):
        for name in ("registers", "issued", "shared_cycles", "cycles"):
            assert launch[name] == pytest.approx(wanted[name], rel=tolerance, abs=1), (
                f"{launch['kernel']}, {name}; {what}"
            )
        for way in ("load", "store"):
            found = sectors(launch, way)
            assert found == pytest.approx(sectors(wanted, way), rel=tolerance, abs=2), (
                f"{launch['kernel']}, {way}; {what}"
            )


@pytest.mark.parametrize(
    "shape", [pytest.param(shape, marks=pytest.mark.full) if shape != SHAPES[0] else shape for shape in SHAPES], ids=str
)
def test_the_file_is_of_this_code(emulator: AllKernels, executed: gpu_counts.Executed, shape: tuple[int, ...]) -> None:
    expected = written()
    same = gpu_model.content()["code"]["nvcc"] == gpu_counts.nvcc_version()
    cases = kernel_cases(Data(shape, torch.device("cpu")))
    assert {(case.op, case.mode) for case in cases} == {key[:2] for key in expected if key[2] == shape}, AGAIN
    for case in cases:
        entry = gpu_counts.case_entry(case, emulator, executed)
        check_same(entry, expected[case.op, case.mode, shape], SAME if same else OTHER_COMPILER)


def test_another_count_is_seen() -> None:
    entry = written()["channel_mix", "forward", SHAPES[0]]
    (launch,) = entry["launches"]
    check_same(entry, entry, SAME)
    changes = {
        "blocks": launch["blocks"] + 1,
        "issued": 1.1 * launch["issued"],
        "cycles": 0.9 * launch["cycles"],
        "sectors": {**launch["sectors"], "more store": 0.2 * sectors(launch, "store")},
    }
    for name, value in changes.items():
        with pytest.raises(AssertionError, match="counts anew"):
            check_same(entry | {"launches": [launch | {name: value}]}, entry, SAME)
    with pytest.raises(AssertionError, match="counts anew"):
        check_same(entry | {"others": [["aten::sum", 4]]}, entry, SAME)


def test_the_compiled_facts_are_of_this_code(cubins: list[Cubin]) -> None:
    if gpu_model.content()["code"]["nvcc"] != gpu_counts.nvcc_version():
        pytest.skip("another nvcc than the one that the file names")
    assert gpu_counts.compiled_facts(cubins) == gpu_model.content()["compiled"][f"sm_{gpu_counts.ARCH}"], AGAIN


@pytest.mark.parametrize("shape", [(2, 12, 16, 16), (3, 40, 4, 8)], ids=str)
def test_stores_are_the_outputs(emulator: AllKernels, executed: gpu_counts.Executed, shape: tuple[int, ...]) -> None:
    """All blocks together store each output once, whatever the kernel: the sectors add up to its bytes."""
    seen = 0
    for case in op_cases(Data(shape, torch.device("cpu"))):
        if case.op == SQUEEZED:  # halves of a sector are two stores
            continue
        for record in case_launches(case, emulator).ours:
            tensors = {str(key): (begin, end) for key, begin, end in record.tensors}
            code = executed.codes.of(record.launch.kernel, record.launch.arguments)
            counts = gpu_counts.execute(code, record.launch, record.parameters, tensors, record.indices, 10**6)
            for (name, way), count in counts.sectors.items():
                begin, end = tensors.get(name, (0, 0))
                if way == "store" and end - begin >= 4 * math.prod(shape):
                    assert 32 * count * record.launch.blocks == pytest.approx(end - begin), case.name
                    seen += 1
    assert seen >= 25


def test_torchs_own_kernels_are_counted(emulator: AllKernels) -> None:
    """Of the reference every op would be a launch, of ours none is."""
    case = next(case for case in op_cases(Data((2, 12, 4, 4), torch.device("cpu"))) if case.op == "coupling")
    plain = Case(case.op, case.mode, case.shape, lambda library, compiled: case.build(reference, compiled))
    ours, torchs = case_launches(case, emulator), case_launches(plain, emulator)
    assert ours.others == []
    assert [record.launch.kernel for record in ours.ours] == ["coupling_kernel"]
    assert torchs.ours == []
    assert len(torchs.others) > 5
    assert all(moved > 0 for _, moved in torchs.others)


def test_an_op_that_is_not_known_is_an_error(emulator: AllKernels) -> None:
    x = torch.randn(2, 6, 4, 4)
    halves = Case("split", "forward", (2, 6, 4, 4), lambda *_: lambda: (ops.checkerboard_split(x, 0, False),))
    with pytest.raises(NotImplementedError, match=r"split forward: expected an op that .* found checkerboard_split"):
        case_launches(halves, emulator)


def test_launches_of_a_step_share_tensors() -> None:
    """What a forward wrote is what the backward reads, by its name."""
    entry = written()[BETWEEN, "forward+backward", SHAPES[0]]
    reads = [{key.split()[0] for key in launch["sectors"] if key.endswith("load")} for launch in entry["launches"]]
    assert len((reads[0] & reads[2]) - {"other"}) >= 3  # x, the net's output, the matrix
