"""What each op allocates beyond its outputs: scratch that the threads keep (CPU), or workspace of a call (CUDA).

    python -m bench.op_memory [--device cpu] [--threads N] [--out FILE]

CPU: every case runs in a process of its own, forked before any thread exists. `kept` is the growth of malloc's memory
in use over the first call, less its outputs: the threads' scratch, which stays for later calls. `peak` is the growth
of the largest resident size, less the outputs: temporary buffers too, and touched pages of code and stacks. CUDA:
`peak` is that of torch's allocator, less what was there before and the outputs; nothing is kept.

The bound: scratch grows with threads x channels^2, not with the data, and stays below 16 MB up to 768 channels.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.cases import Case, Data, Run, op_cases, parse_shapes
from bench.harness import machine, write_json
from pyglow_fast import functional

SHAPES = [(2, 12, 64, 64), (1, 12, 512, 512), (4, 96, 16, 16), (4, 768, 32, 32)]
LIMIT, LIMIT_CHANNELS = 16 * 2**20, 768
Prepared = tuple[Case, Run]


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Bytes of one op on one shape; ``kept`` and ``peak`` are beyond the outputs."""

    op: str
    mode: str
    shape: tuple[int, ...]
    device: str
    threads: int
    outputs: int
    kept: int
    peak: int


class _Mallinfo(ctypes.Structure):
    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = [(name, ctypes.c_size_t) for name in names]


def malloc_in_use() -> int:
    """Bytes that malloc has given out, over all arenas and mapped blocks (glibc 2.33 or newer)."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    facts = mallinfo()
    return int(facts.uordblks + facts.hblkhd)


def resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and the most since :func:`forget_peak`."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (1024 * int(status[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    """Let the most resident bytes start from now."""
    Path("/proc/self/clear_refs").write_text("5")


def _in_thread(work: Callable[[], Prepared]) -> Prepared:
    """Run it in a thread that ends, and whose scratch ends with it."""
    results: list[Prepared] = []
    worker = threading.Thread(target=lambda: results.append(work()))
    worker.start()
    worker.join()
    if not results:
        raise RuntimeError("the case could not be prepared: see the error above")
    while len(list(Path("/proc/self/task").iterdir())) > 1:  # Python's join does not wait for the thread's own end
        time.sleep(1e-3)
    return results[0]


def _find(shape: tuple[int, ...], device: torch.device, index: int) -> Case:
    return op_cases(Data(shape, device))[index]


def _cpu_case(shape: tuple[int, ...], index: int, threads: int) -> MemoryRow:
    """Measure a case in a fresh process: preparation and warm-up leave no scratch behind."""
    device = torch.device("cpu")

    def prepare() -> Prepared:
        torch.set_num_threads(1)
        _find((1, 4, 3, 3), device, index).build(functional, False)()
        case = _find(shape, device, index)
        return case, case.build(functional, False)

    case, run = _in_thread(prepare)
    torch.set_num_threads(threads)
    torch.zeros(2**20).add_(1.0)  # the other threads of the pool exist now
    ctypes.CDLL(None).malloc_trim(0)  # freed pages that are still resident would hide what the call touches
    before = malloc_in_use()
    forget_peak()
    resident_before, _ = resident()
    outputs = run()
    after = malloc_in_use()
    _, most = resident()
    size = sum(value.untyped_storage().nbytes() for value in outputs)
    return MemoryRow(
        case.op, case.mode, shape, "cpu", threads, size, after - before - size, most - resident_before - size
    )


def _forked(work: Callable[[], MemoryRow]) -> MemoryRow:
    """The result of ``work`` in a child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            with os.fdopen(writing, "w") as stream:
                json.dump(dataclasses.asdict(work()), stream)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    if not text:
        raise RuntimeError("a measuring process failed: see the error above")
    content = json.loads(text)
    return MemoryRow(**(content | {"shape": tuple(content["shape"])}))


def _cuda_case(case: Case, device: torch.device) -> MemoryRow:
    run = case.build(functional, False)
    run()  # the first call loads code
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    outputs = run()
    torch.cuda.synchronize(device)
    size = sum(value.untyped_storage().nbytes() for value in outputs)
    peak = torch.cuda.max_memory_allocated(device) - before - size
    kept = torch.cuda.memory_allocated(device) - before - size
    return MemoryRow(case.op, case.mode, case.shape, "cuda", 0, size, kept, peak)


def measure(device: torch.device, threads: int, shapes: Sequence[tuple[int, ...]] = tuple(SHAPES)) -> list[MemoryRow]:
    """Every op that has a kernel for the device, on every shape."""
    rows = []
    torch.set_num_threads(1)  # no pool of threads before the forks: it would be missing in the children
    names = [case.is_ours(device) for case in op_cases(Data((1, 4, 3, 3), torch.device("cpu")))]
    for shape in shapes:
        if device.type == "cuda":
            cases = op_cases(Data(shape, device))
            rows += [_cuda_case(case, device) for case, ours in zip(cases, names, strict=True) if ours]
            continue
        for index, ours in enumerate(names):
            if ours:
                rows.append(_forked(lambda shape=shape, index=index: _cpu_case(shape, index, threads)))  # type: ignore[misc]
    return rows


def table(rows: Sequence[MemoryRow]) -> str:
    """Kilobytes by op and shape; kept also per thread and channel^2."""
    lines = [f"{'':36} {'shape':>20} {'outputs kB':>11} {'kept kB':>9} {'peak kB':>9} {'kept B/(threads C^2)':>21}"]
    for row in rows:
        share = f"{max(row.kept, 0) / (row.threads * row.shape[1] ** 2):21.1f}" if row.threads else ""
        lines.append(
            f"{f'{row.op}, {row.mode}':36} {row.shape!s:>20} {row.outputs / 1e3:11.0f} {row.kept / 1e3:9.0f}"
            f" {row.peak / 1e3:9.0f} {share}"
        )
    return "\n".join(lines)


def beyond_bound(rows: Sequence[MemoryRow]) -> list[MemoryRow]:
    """The rows that break the bound."""
    return [r for r in rows if r.shape[1] <= LIMIT_CHANNELS and max(r.kept, r.peak if r.threads == 0 else 0) > LIMIT]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if an op breaks the bound.

    Args:
        argv: the options; those of the process if None.
    """
    options = argparse.ArgumentParser(prog="bench op_memory", description="scratch of each op", allow_abbrev=False)
    options.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    options.add_argument("--shapes", type=parse_shapes, default=SHAPES, help="such as 4x12x64x64, separated by commas")
    options.add_argument("--quick", action="store_true", help="one shape, the one with most channels")
    arguments = options.parse_args(argv)
    shapes = SHAPES[-1:] if arguments.quick else arguments.shapes
    rows = measure(arguments.device, arguments.threads, shapes)
    print(table(rows))
    if arguments.out is not None:
        write_json(arguments.out, machine(arguments.device), rows)
    beyond = beyond_bound(rows)
    for row in beyond:
        print(f"{row.op}, {row.mode}, {row.shape}: more than {LIMIT >> 20} MB beyond its outputs")
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main())
