"""One case of the memory benchmark, in a process of its own: ``python -m bench.memory_case JSON`` prints a JSON line.

Training memory is that of one forward and backward beyond the parameters and their gradients (there is no optimizer):

- ``tensor_bytes``: what torch's allocator gave out in the step and was alive at one time, at most (on CUDA less what
  of the earlier was freed); gradients allocated before, as when they accumulate over batches.
- ``tensor_bytes_fresh``: the same where gradients begin as None (zero_grad's default) and a tensor that becomes one is
  not counted. On CUDA the most that was given out, less parameters and all gradients.
- ``resident_bytes``: growth of the largest resident size over the step, gradients allocated before, libraries warm;
  ``resident_bytes_fresh``: the same where gradients begin as None, less their bytes. Not on CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import synchronize
from bench.memory_meter import AllocatorTrace, MemoryTrace
from bench.memory_models import OURS, PARTLY, SAME_FUNCTION, Shape, build, images
from bench.op_memory import forget_peak, resident
from pyglow_fast import Glow, _backend

PARTS = 8  # largest parts of a peak that are reported
OVERHEAD = 2**30  # bytes that a process may have besides what is measured


@dataclasses.dataclass(frozen=True)
class Case:
    """A case to measure: a model, an implementation, and what of it.

    ``budget``: memory_budget, of one net. ``passes``: training steps before tensors are counted (the anchors' spacing
    adapts in them); the median of their times is reported, the first one left out if there are more. 0 (on the CPU):
    one step, then two in a row whose tensors are counted, and no resident sizes: the fewest steps that tell of a
    steady state. ``errors``: gradients against float64, too. ``memory``: bytes that are given to a model of ours in
    place of its mode. ``parts``: of a model of ours, what is alive at the peak, which takes long to find.
    """

    implementation: str
    shape: Shape
    budget: str | int = "auto"
    passes: int = 3
    errors: bool = False
    device: str = "cpu"
    threads: int = 2
    limit: int = 8 * 2**30
    memory: int | None = None
    parts: bool = False

    def text(self) -> str:
        """Write the case as JSON."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def of(cls, text: str) -> Case:
        """Read a case from JSON."""
        values = json.loads(text)
        shape = values.pop("shape")
        return cls(shape=Shape(**shape | {"image": tuple(shape["image"])}), **values)


def gradient_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float]:
    """sqrt(sum |g - e|^2 / sum |e|^2) over all tensors, and the largest |g - e| / |e| of one; NaN if a g has one.

    A tensor whose exact gradient is below 1e-6 of the norm of all is held against that: it is rounding alone.
    """
    squares = [
        (float((g.double() - e).square().sum()), float(e.square().sum())) for g, e in zip(found, exact, strict=True)
    ]
    error, norm = (sum(pair[i] for pair in squares) for i in (0, 1))
    if error != error:
        return float("nan"), float("nan")
    worst = max((wrong / max(size, 1e-12 * norm)) ** 0.5 for wrong, size in squares)
    return (error / norm) ** 0.5, worst


def training_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Run forward and backward of the mean of -log_prob."""
    log_prob: Any = model.log_prob
    return lambda: (-log_prob(x)).mean().backward()


def _gradients(case: Case, double: bool) -> list[Tensor]:
    """Compute the gradients of float32 weights in either precision; in float64 ours by its formulas in plain torch."""
    device = torch.device(case.device)
    implementation = case.implementation
    if double and implementation in (*OURS, *SAME_FUNCTION):
        implementation = "torch checkpoint"
    model = build(implementation, case.shape, case.budget, device)
    x = images(case.shape, device)
    if double:
        model, x = model.double(), x.double()
    training_step(model, x)()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _trim() -> None:
    gc.collect()
    extension = _backend.extension()
    if extension is not None:
        extension.release_idle()
    if platform.libc_ver()[0] == "glibc":  # freed pages that are still resident would hide what the step touches
        ctypes.CDLL(None).malloc_trim(0)


def _on_cuda(model: nn.Module, step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    parameters = list(model.parameters())
    found: dict[str, Any] = {}
    for name in ("tensor_bytes", "tensor_bytes_fresh"):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if name == "tensor_bytes" and parameter.requires_grad else None
        gc.collect()
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        given = sum(p.grad.nbytes for p in parameters if p.grad is not None) if name != "tensor_bytes" else 0
        found[name] = torch.cuda.max_memory_allocated(device) - before - given
    return found


def _on_cpu(model: nn.Module, step: Callable[[], object], parts: bool) -> dict[str, Any]:
    parameters = list(model.parameters())
    found: dict[str, Any] = {}
    for suffix in ("", "_fresh"):
        gradients = []
        gc.collect()
        trace = MemoryTrace()
        with AllocatorTrace() as allocator, trace if parts else contextlib.nullcontext():
            step()
        if suffix:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        found[f"tensor_bytes{suffix}"] = allocator.peak_without(gradients)
        if parts:
            largest = trace.peak_without(gradients)[1][:PARTS]
            found[f"at_the_peak{suffix}"] = [part._asdict() for part in largest]
        for parameter in parameters:
            parameter.grad = None
    return found


def _resident_growth(step: Callable[[], object], seconds: list[float]) -> int | None:
    _trim()
    try:
        forget_peak()
    except OSError:  # not on this system
        step()
        return None
    before, _ = resident()
    start = time.perf_counter()
    step()
    seconds.append(time.perf_counter() - start)
    return resident()[1] - before


def measure(case: Case) -> dict[str, Any]:
    """Bytes, seconds, gradient errors and the drift control's report of one case."""
    device = torch.device(case.device)
    # What the libraries load when they first run is no part of a step: of PARTLY the fourth step is surely wrapped.
    small = dataclasses.replace(case.shape.small(), n_steps=4 if case.implementation in PARTLY else 1)
    first = case.implementation if case.memory is None else "reversible"  # bytes may ask for any of the modes
    training_step(build(first, small, case.budget, device), images(small, device))()
    model = build(case.implementation, case.shape, case.budget, device)
    if case.memory is not None:
        model.memory = case.memory
    x = images(case.shape, device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    step = training_step(model, x)
    seconds: list[float] = []
    result: dict[str, Any] = {"parameter_bytes": sum(parameter.nbytes for parameter in parameters)}
    if device.type == "cpu" and case.passes > 0:
        result["resident_bytes"] = _resident_growth(step, seconds)
        for parameter in parameters:
            parameter.grad = None
        growth = _resident_growth(step, seconds)
        given = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
        result["resident_bytes_fresh"] = None if growth is None else growth - given
    for _ in range(max(case.passes, 1) - len(seconds)):
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    result["seconds"] = statistics.median(seconds[1:] or seconds)
    result |= _on_cuda(model, step, device) if device.type == "cuda" else _on_cpu(model, step, case.parts)
    if isinstance(model, Glow):
        result["report"] = model.memory_report()
    if case.errors:
        del model, step, parameters
        gc.collect()
        errors = gradient_error(_gradients(case, double=False), _gradients(case, double=True))
        result["gradient_error"], result["gradient_error_worst"] = errors
    return result


def run_case(case: Case) -> dict[str, Any]:
    """The result, or why there is none: ``missing`` a library, ``refused`` bytes, or ``too_large`` for the limit."""
    try:
        return measure(case)
    except ValueError as error:  # when they are given, or by the first step, which tells the shapes
        if case.memory is None:
            raise
        return {"refused": str(error)}
    except ImportError as error:
        return {"missing": str(error)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error).lower():
            return {"too_large": str(error).splitlines()[0] if str(error) else "MemoryError"}
        raise


def in_own_process(case: Case) -> dict[str, Any]:
    """:func:`run_case` with the case's threads; allocations beyond its limit fail rather than take others' memory."""
    torch.set_num_threads(case.threads)
    if case.device == "cpu":
        import resource  # posix only, as the resident size of /proc

        resource.setrlimit(resource.RLIMIT_DATA, (case.limit + OVERHEAD, case.limit + OVERHEAD))
    return run_case(case)


if __name__ == "__main__":
    print(json.dumps(in_own_process(Case.of(sys.argv[1]))))
