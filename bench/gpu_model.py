"""Predicts what each op of `bench kernels` takes on an H100, from its launches, its machine code and its bytes.

No GPU is needed, and nothing here is a measurement. bench/results/gpu-model.json holds what the compiled kernels do
(``python -m bench.gpu_tables --write`` counts it). A launch takes

    gap + max(issue, arithmetic, shared, l2, memory, latency)

where each is the time that it would take if there were nothing but: instructions to issue; the busiest unit that
executes them; shared memory and L1; L2; the memory itself; and dependent instructions, one block after another.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.cases import traffic
from bench.harness import ROOT

RESULT = ROOT / "bench" / "results" / "gpu-model.json"
SECTOR = 32
LIMITS = ("issue", "arithmetic", "shared", "l2", "memory", "latency")
# Cycles from a load to its value, assumed: what all blocks read is in L2, tensors of more bytes come from memory.
L2_LATENCY, MEMORY_LATENCY, SMALL = 270, 600, 2**18


@dataclasses.dataclass(frozen=True)
class Device:
    """What a prediction assumes of a GPU; rates are those of one multiprocessor and cycle unless said."""

    name: str = "H100 SXM"
    multiprocessors: int = 132
    clock: float = 1.98e9  # Hz, boost
    bandwidth: float = 3.35e12  # bytes/s of the memory, by the data sheet
    copy_share: float = 0.90  # of it that a copy of large tensors reaches
    l2_bytes: float = 50e6
    l2_bandwidth: float = 5.5e12  # bytes/s, all multiprocessors
    l2_port: float = 64.0  # bytes
    issue: float = 4.0  # instructions of a warp
    issue_share: float = 0.85  # of these slots that are filled where issuing is the limit
    fma: float = 4.0  # float32 multiply-adds of a warp
    imad: float = 2.0  # integer ones, which the same units do
    alu: float = 2.0  # other integer arithmetic, comparisons, logic
    fp64: float = 2.0
    special: float = 0.5  # exp2, log2, reciprocals, conversions
    l1: float = 128.0  # bytes of shared memory and L1
    registers: int = 65536
    shared_bytes: int = 227 << 10
    reserved_bytes: int = 1024  # of shared memory for each block
    threads: int = 2048
    blocks: int = 32
    gap: float = 1.2e-6  # s from the end of a kernel to the work of the next in a CUDA graph
    eager_gap: float = 4e-6  # s that a launch takes of the host's thread

    @property
    def copy_rate(self) -> float:
        """Bytes/s, read and written, of a copy."""
        return self.bandwidth * self.copy_share


H100 = Device()


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one launch by each limit; ``seconds`` is the largest and the gap before it."""

    kernel: str
    limits: dict[str, float]
    gap: float

    @property
    def bound(self) -> str:
        """Names the limit that decides."""
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def seconds(self) -> float:
        """What the launch is predicted to take."""
        return self.gap + self.limits[self.bound]


def resident(launch: Mapping[str, Any], device: Device = H100) -> int:
    """Blocks of a launch that a multiprocessor holds at once."""
    threads = launch["threads"][0] * launch["threads"][1]
    warps = -(-threads // 32)
    by_registers = device.registers // (warps * 32 * -(-launch["registers"] // 8) * 8)
    used = launch["dynamic_bytes"] + launch["static_bytes"] + device.reserved_bytes
    return max(1, min(by_registers, device.shared_bytes // used, device.threads // (warps * 32), device.blocks))


def launch_limits(
    launch: Mapping[str, Any], tensors: Mapping[str, int], cached: Iterable[str], device: Device = H100
) -> dict[str, float]:
    """Seconds of one launch by each limit.

    Args:
        launch: as in the JSON.
        tensors: bytes of the case's tensors by name.
        cached: names of those that lie in L2 when it begins.
        device: the GPU.
    """
    blocks, units = launch["blocks"], launch["units"]
    busiest = -(-blocks // device.multiprocessors)  # blocks of the multiprocessor that has most
    cycle = 1 / device.clock
    busy = {
        "fma": units.get("fma", 0) / device.fma + units.get("imad", 0) / device.imad,
        "alu": units.get("alu", 0) / device.alu,
        "fp64": units.get("fp64", 0) / device.fp64,
        "special": units.get("special", 0) / device.special,
    }
    sectors = sum(launch["sectors"].values())
    l1 = launch["shared_cycles"] + sectors * SECTOR / device.l1
    waves = -(-blocks // (device.multiprocessors * resident(launch, device)))
    l2 = max(blocks * sectors * SECTOR / device.l2_bandwidth, busiest * sectors * SECTOR / device.l2_port * cycle)
    return {
        "issue": busiest * launch["issued"] / (device.issue * device.issue_share) * cycle,
        "arithmetic": busiest * max(busy.values()) * cycle,
        "shared": busiest * l1 * cycle,
        "l2": l2,
        "memory": memory_bytes(launch, tensors, cached) / device.copy_rate,
        "latency": ((waves - 1) * launch["cycles"] + launch["longest"]) * cycle,
    }


def memory_bytes(launch: Mapping[str, Any], tensors: Mapping[str, int], cached: Iterable[str] = ()) -> float:
    """What a launch reads from and writes to memory, in bytes.

    A launch moves of each tensor not more than it has; scratch, and reads of what is in L2, are not counted.
    """
    total, cached = 0.0, set(cached)
    for key, count in launch["sectors"].items():
        name, way = key.split()
        if name == "other" or (way == "load" and name in cached):
            continue
        total += min(tensors[name], count * SECTOR * launch["blocks"])
    return total


def case_predictions(case: Mapping[str, Any], device: Device = H100) -> list[Prediction]:
    """Every launch of a case, in order.

    Tensors that an earlier launch touched are in L2 if all of the case's fit there; between two runs of a case they
    are not, as the benchmark rotates its buffers.
    """
    tensors = case["tensors"]
    stays = sum(tensors.values()) <= device.l2_bytes
    touched: set[str] = set()
    found = []
    for launch in case["launches"]:
        limits = launch_limits(launch, tensors, touched if stays else (), device)
        found.append(Prediction(launch["kernel"], limits, device.gap))
        touched |= {key.split()[0] for key in launch["sectors"]} - {"other"}
    for name, moved in case["others"]:
        found.append(Prediction(name, {"memory": moved / device.copy_rate}, device.gap))
    return found


def case_seconds(case: Mapping[str, Any], device: Device = H100) -> float:
    """What all launches of a case are predicted to take."""
    return sum(prediction.seconds for prediction in case_predictions(case, device))


def copy_seconds(op: str, mode: str, shape: tuple[int, ...], device: Device = H100) -> float:
    """What a copy is predicted to take that touches as many bytes as the operation must."""
    return device.gap + traffic(op, mode, shape) / device.copy_rate


@functools.cache
def content(path: Path = RESULT) -> dict[str, Any]:
    """Reads the counts that ``bench.gpu_tables --write`` has written."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def predictions(shape: tuple[int, ...]) -> dict[tuple[str, str], float]:
    """Microseconds that each (op, mode) of `bench kernels` is predicted to take on an H100, launched from a CUDA graph.

    Args:
        shape: (N, C, H, W), one of bench.cases.SHAPES.

    Returns:
        By (op, mode); nothing for a shape that was not counted.
    """
    cases = [case for case in content()["cases"] if tuple(case["shape"]) == tuple(shape)]
    return {(case["op"], case["mode"]): 1e6 * case_seconds(case) for case in cases}
