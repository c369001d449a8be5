"""What every benchmark shares: interleaved timing, the machine's ceilings, and rows that say where a number comes from.

A number is the median over rounds in which all implementations take turns, so that a machine whose speed drifts slows
all of them alike. The first rounds warm up and are not counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyglow_fast import _backend, info

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_ROUNDS = 3
# A malloc that keeps large buffers: fresh ones then cost no page faults. Peers allocate more of them than the kernels.
TUNED_MALLOC = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one implementation: median and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured number with everything needed to judge it.

    ``bytes`` and ``flops`` are what the operation must move and compute at least; ``copy_gigabytes_per_second`` is the
    rate of a copy that touches as many bytes, ``peak_gigaflops`` that of the library's matrix product, both measured in
    the same run.
    """

    op: str
    implementation: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    malloc: str
    seconds: float
    seconds_low: float
    seconds_high: float
    bytes: int
    gigabytes_per_second: float
    copy_gigabytes_per_second: float
    fraction_of_copy: float
    flops: int
    gigaflops: float
    peak_gigaflops: float
    fraction_of_peak: float


def synchronize(device: torch.device) -> None:
    """Wait for the GPU; the CPU is never behind."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(cases: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Time each case once a round, in turn; short cases are repeated within their turn to about 2 ms."""
    repeats = {}
    for name, case in cases.items():
        for _ in range(WARM_UP_ROUNDS):
            case()
        synchronize(device)
        start = time.perf_counter()
        case()
        synchronize(device)
        repeats[name] = max(1, min(1000, int(2e-3 / max(time.perf_counter() - start, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                case()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    timings = {}
    for name, values in seconds.items():
        quantiles = statistics.quantiles(values, n=5)
        timings[name] = Timing(statistics.median(values), quantiles[0], quantiles[-1])
    return timings


def copy_case(n_bytes: int, device: torch.device) -> Callable[[], object]:
    """A copy that touches ``n_bytes`` in all, half of them read and half written, into memory that is already there.

    An operation is compared with the copy of as many bytes as it touches itself: a smaller one may fit in a cache.
    """
    source = torch.zeros(max(1, n_bytes // 8), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def product_peak(device: torch.device, rounds: int = 7) -> float:
    """FLOP/s of the library's float32 matrix product (no TF32): the best of a few sizes and rounds, being a ceiling."""
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        left, right, out = (torch.zeros(size, size, device=device) for _ in range(3))
        torch.mm(left, right, out=out)
        for _ in range(rounds):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def device_name(device: torch.device) -> str:
    """Look up what the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else info.processor()


def commit() -> str:
    """The commit of the source tree, with -dirty if it was changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def malloc_setting() -> str:
    """How malloc treats large buffers in this process: "default", "tuned" (TUNED_MALLOC), or the tunables as set."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return {"": "default", TUNED_MALLOC: "tuned"}.get(tunables, tunables)


def malloc_environments() -> dict[str, dict[str, str]]:
    """Give, by setting, the environment of a process that has it; only the present one where malloc is not glibc's."""
    here = dict(os.environ)
    if platform.libc_ver()[0] != "glibc":
        return {malloc_setting(): here}
    plain = {name: value for name, value in here.items() if name != "GLIBC_TUNABLES"}
    return {"default": plain, "tuned": plain | {"GLIBC_TUNABLES": TUNED_MALLOC}}


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and the settings that decide speed."""
    facts = {
        "device": device_name(device),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit(),
        "malloc": malloc_setting(),
    }
    module = _backend.extension()
    if module is not None:
        facts["kernels"] = module.instruction_set() if device.type == "cpu" else _backend.build_info()["cuda"]
    return facts


def write_json(path: Path, facts: Mapping[str, object], rows: Sequence[Any], **more: object) -> None:
    """The machine, the rows (dataclasses or dictionaries) and what else belongs to them, as one JSON file."""
    plain = [row if isinstance(row, dict) else dataclasses.asdict(row) for row in rows]
    content = {"machine": dict(facts), "rows": plain, **more}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def run_module(name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """``python -m name arguments`` from the source tree, its output passed on; returns its exit code."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", name, *arguments], cwd=ROOT, env=dict(environment), check=False)
    return done.returncode
