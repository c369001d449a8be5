"""Facts on what is installed, what was built, and which backend each op uses: the text of ``pyglow-fast info``."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from pathlib import Path
from types import ModuleType

import torch

from pyglow_fast._core import backend
from pyglow_fast.functional import ops

_PACKAGES = ("numpy", "safetensors", "torchvision", "pillow")


def collect() -> dict[str, dict[str, str]]:
    """Collect all facts by section, as text. Only this function asks for devices, and only when it is called."""
    return {
        "versions": _versions(),
        "build": _build(),
        "devices": _devices(),
        "backends": {"cpu": _backend_of("cpu"), "cpu, nets in bfloat16": _half_nets(), "cuda": _backend_of("cuda")},
        "ops": _ops(),
    }


def report() -> str:
    """Format the facts of :func:`collect` as lines to print."""
    lines = []
    for section, facts in collect().items():
        lines.append(section)
        width = max(map(len, facts))
        for name, value in facts.items():
            line = f"  {name.ljust(width)}  {value}"
            lines.append(textwrap.fill(line, 118, subsequent_indent=" " * (width + 4), break_on_hyphens=False))
    return "\n".join(lines)


def cuda_reason() -> str:
    """Say why CUDA tensors do not run on the compiled kernels; empty if they do."""
    if backend.extension() is None:
        return backend.reason()
    if not backend.build_info()["cuda"]:
        return "the extension was built without its CUDA kernels (no nvcc, a torch without CUDA, or PYGLOW_CUDA=0)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA support"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU"
    left_out = [i for i in range(torch.cuda.device_count()) if not ops.runs_on_gpu(i)]
    if left_out:
        found = ", ".join(f"cuda:{i} ({'.'.join(map(str, torch.cuda.get_device_capability(i)))})" for i in left_out)
        archs = backend.build_info()["cuda_archs"]
        return f"compiled for {archs}, which does not run on {found}; see TORCH_CUDA_ARCH_LIST"
    return ""


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(distribution: str) -> str:
    """The version of an installed distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> dict[str, str]:
    facts = {
        "pyglow_fast": version_of("pyglow-fast"),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__ + (f", CUDA {torch.version.cuda}" if torch.version.cuda else ", no CUDA"),
    }
    return facts | {name: version_of(name) for name in _PACKAGES}


def _build() -> dict[str, str]:
    info = backend.build_info()
    if not info:
        return {"extension": f"none: {backend.reason()}"}
    stale = "" if info["version"] == version_of("pyglow-fast") else " (another version than the package's: rebuild)"
    return {
        "extension": info["version"] + stale,
        "built for torch": info["torch"],
        "compiler": info["compiler"],
        "instruction sets": info["instruction_sets"].replace(",", ", "),
        "threads": "torch's OpenMP pool" if info["parallel"] == "yes" else "one: not compiled by GCC",
        "cuda": f"nvcc {info['cuda']} for {info['cuda_archs'].replace(',', ', ')}" if info["cuda"] else "not built",
    }


def _devices() -> dict[str, str]:
    module = backend.extension()
    facts = {"cpu": f"{torch.get_num_threads()} threads"}
    if module is not None:
        facts["cpu"] += f", {_instruction_set(module)}"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    return facts


def _instruction_set(module: ModuleType) -> str:
    try:
        return f"{module.instruction_set()} kernels"
    except ValueError as error:  # PYGLOW_CPU names what this processor does not have
        return f"no kernels: {error}"


def _backend_of(device: str) -> str:
    why = backend.reason() if device == "cpu" else cuda_reason()
    return f"reference: {why}" if why else "compiled kernels for float32 and float64, reference for other dtypes"


_HALF = {
    "amx kernels": "products of ours in the processor's tiles (AMX-BF16)",
    "avx512_bf16 kernels": "products of ours by the processor's dot products (AVX512-BF16)",
}


def _half_nets() -> str:
    """Name the instructions that multiply in coupling nets in bfloat16."""
    module = backend.extension()
    if module is None or backend.nets() != "auto":
        return f"the library's layers: {backend.reason() or f'PYGLOW_NETS is {backend.nets()}'}"
    kernels = _instruction_set(module)
    found = _HALF.get(kernels, f"products of ours, whose numbers are widened to float32 ({kernels})")
    return f"{found}; float16 is the library's"


def _runs(op: str, device: str, why_not: str) -> str:
    """Name what an op runs on, given why the device's tensors do not run on compiled kernels (empty if they do)."""
    if why_not:
        return "reference"
    if ops.is_compiled(op, device):
        return "compiled"
    return "reference: the library's convolutions" if op.startswith("net_chain") else "reference"


def _ops() -> dict[str, str]:
    """List what the dispatcher runs for each op and its backward, on float32 and float64 tensors of each device."""
    devices = {"cpu": backend.reason(), "cuda": cuda_reason()}
    facts = {op: ", ".join(f"{name}: {_runs(op, name, why)}" for name, why in devices.items()) for op in ops.names()}
    facts["scale maps"] = (
        "a map that is given as a callable runs on the reference everywhere: kernels know the named ones"
    )
    return facts
