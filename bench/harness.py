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
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from pyglow_fast import _backend

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one implementation: median and the 20 and 80 % quantiles."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured number with everything needed to judge it; ``bytes`` is what the operation must move at least."""

    op: str
    implementation: str
    mode: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    seconds: float
    seconds_low: float
    seconds_high: float
    bytes: int
    gigabytes_per_second: float
    fraction_of_copy: float


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(cases: Mapping[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, Timing]:
    """Time each case once a round, in turn; short cases are repeated within their turn to about 2 ms."""
    repeats = {}
    for name, case in cases.items():
        for _ in range(WARM_UP_ROUNDS):
            case()
        _synchronize(device)
        start = time.perf_counter()
        case()
        _synchronize(device)
        repeats[name] = max(1, min(1000, int(2e-3 / max(time.perf_counter() - start, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            _synchronize(device)
            start = time.perf_counter()
            for _ in range(repeats[name]):
                case()
            _synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    timings = {}
    for name, values in seconds.items():
        quantiles = statistics.quantiles(values, n=5)
        timings[name] = Timing(statistics.median(values), quantiles[0], quantiles[-1])
    return timings


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and the settings that decide speed."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": commit.stdout.strip() or "unknown",
        "malloc": os.environ.get("GLIBC_TUNABLES", "default"),
    }
    module = _backend.extension()
    if module is not None:
        facts["kernels"] = module.instruction_set() if device.type == "cpu" else _backend.build_info()["cuda"]
    return facts


def write_json(path: Path, facts: Mapping[str, str], rows: list[Row]) -> None:
    """The machine and the rows as one JSON file."""
    content = {"machine": dict(facts), "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
