"""The machine code of the CUDA kernels in the built module: registers, memory, widths of accesses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest
from support import ROOT

from pyglow_fast._core import backend

ARCHITECTURES = ("80", "90", "100", "120")  # all that the package ships code for
BLOCK_THREADS, REGISTERS = 256, 64 * 1024  # of a block; of a multiprocessor


class Limit(NamedTuple):
    """The properties that the comment above a kernel's launcher promises.

    ``loads`` and ``stores`` count accesses of less than 16 bytes in a kernel that takes 16 bytes at a time: numbers of
    which there is one per sample or part, weights, what repeats along a row, results that are sums, and what a
    channels-last net's backward adds.
    """

    float_blocks: int  # that a multiprocessor has registers for
    double_blocks: int
    shared_bytes: int  # static
    loads: int | None = None  # None: no instantiation takes 16 bytes at a time
    stores: int = 0
    nets: bool = False  # reads a net's output, whose four numbers are 8 bytes if it has 16 bits


LIMITS = {
    "fused_kernel": Limit(2, 1, 16, 18, 2, nets=True),
    "finish_kernel": Limit(6, 6, 0),
    "sums_kernel": Limit(2, 1, 0, 18, 20, nets=True),
    "reduce_kernel": Limit(4, 4, 2048),
    "coupling_kernel": Limit(4, 1, 64, 0, 2, nets=True),
    "log_prob_kernel": Limit(4, 3, 64, 2, 2),
    "log_prob_backward_kernel": Limit(4, 3, 0, 3),
    "sample_kernel": Limit(4, 3, 0, 2),
    "sample_sums_kernel": Limit(6, 6, 64),
    "coupling_backward_kernel": Limit(3, 2, 0, 1, nets=True),
    "spline_kernel": Limit(4, 2, 0),
    "spline_backward_kernel": Limit(3, 2, 0),
    "gather_kernel": Limit(4, 3, 64, 4, 2, nets=True),
    "gather_backward_kernel": Limit(3, 2, 64 + 2048, 8, 2, nets=True),
    "fold_kernel": Limit(3, 3, 64),
    "fold_backward_kernel": Limit(3, 3, 64),
    "invert_kernel": Limit(2, 2, 64 + 64),
    "patches_kernel": Limit(4, 4, 17 * 1024 + 512),
    "tap_sums_kernel": Limit(4, 4, 17 * 1024),
    "relu_backward_kernel": Limit(4, 4, 4096, 0, nets=True),
    "step_gather_backward_kernel": Limit(4, 2, 0, 4, nets=True),
}


class Kernel(NamedTuple):
    """One instantiation of a kernel: its mangled name, what it takes, and its machine code."""

    symbol: str
    registers: int
    stack: int
    local: int
    shared_bytes: int
    code: str


def parts_of(symbol: str) -> tuple[str, str, str]:
    """The kernel's name without namespaces, the type of its values (f or d), and the rest of the template arguments."""
    found = re.search(r"\d([a-z_]+_kernel)I([fd])(.*?)EEv", symbol)
    assert found is not None, f"no kernel's name: {symbol}"
    return found[1], found[2], found[3]


def faults(kernel: Kernel) -> list[str]:
    """Reasons why a kernel is slower than promised, or may give other bits in a second run."""
    name, dtype, rest = parts_of(kernel.symbol)
    limit, is_float = LIMITS[name], dtype == "f"
    vector = rest.endswith("Lb1E")  # as its last template argument says
    # The hardware gives registers to whole warps, 8 at a time to a thread.
    blocks = REGISTERS // (BLOCK_THREADS * -(-kernel.registers // 8) * 8)
    accesses = re.findall(r"\b(?:ST|LDG|STG|LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG)\b[.\w]*", kernel.code)
    # Atomics add in any order; a store that is not STG waits to learn where it goes, a strong one for other threads.
    found = [access for access in accesses if not access.startswith(("LDG", "STG")) or ".STRONG" in access]
    if blocks < (limit.float_blocks if is_float else limit.double_blocks):
        found.append(f"{kernel.registers} registers leave room for {blocks} blocks")
    if kernel.stack or kernel.local:
        found.append(f"{kernel.stack} bytes of stack, {kernel.local} of local memory: registers are spilled")
    if kernel.shared_bytes > limit.shared_bytes:
        found.append(f"{kernel.shared_bytes} bytes of shared memory")
    if vector and limit.loads is not None:
        wide = r"\.(128|64)\b" if limit.nets and is_float else r"\.128\b"
        for kind, most in (("LDG", limit.loads), ("STG", limit.stores)):
            narrow = [access for access in accesses if access.startswith(kind) and not re.search(wide, access)]
            if len(narrow) > most:
                found.append(f"{len(narrow)} accesses of less than 16 bytes, more than {most}: {narrow}")
    return found


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    """The tool's output; it and nvdisasm, which it calls, come with the CUDA toolkit or as pip packages."""
    packages = Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*/bin")
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, packages)])
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = {**os.environ, "PATH": path}
    command = [tool, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True).stdout


def kernels_of(cubin: str, reserved: int) -> list[Kernel]:
    """The kernels of a file; the system reserves some shared memory itself."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", cuobjdump("-sass", cubin), flags=re.MULTILINE)[1:]
    codes = dict(zip(parts[::2], parts[1::2], strict=True))
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    return [
        Kernel(symbol, int(registers), int(stack), int(local), max(0, int(shared) - reserved), codes[symbol])
        for symbol, registers, stack, shared, local in re.findall(pattern, cuobjdump("-res-usage", cubin))
    ]


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_are_as_promised(arch: str, tmp_path: Path) -> None:
    """No spills, enough registers for the blocks that hide latency, 16-byte accesses, no atomics."""
    extension = backend.extension()
    if extension is None or arch not in re.findall(r"\d+", backend.build_info().get("cuda_archs", "")):
        pytest.skip(f"the built module has no code for sm_{arch}: make venv, with nvcc on the PATH")
    module = Path(str(extension.__file__))
    sources = [path for folder in ("cuda", "math") for path in (ROOT / "csrc" / folder).iterdir()]
    if max(path.stat().st_mtime for path in sources) > module.stat().st_mtime:
        pytest.skip("the built module is older than a source: make venv")
    cuobjdump("-xelf", f"sm_{arch}", str(module), cwd=tmp_path)
    found: set[str] = set()
    wrong = []
    for cubin in sorted(map(str, tmp_path.glob("*.cubin"))):
        for kernel in kernels_of(cubin, 1024 if int(arch) >= 90 else 0):
            found.add(parts_of(kernel.symbol)[0])
            wrong += [f"{kernel.symbol}: {fault}" for fault in faults(kernel)]
    assert found == set(LIMITS)
    assert not wrong, "\n".join(wrong)


SAMPLE = Kernel("_ZN6pyglow4cuda13sample_kernelIfLb1EEEvv", 64, 0, 0, 0, "LDG.E.128; LDG.E.128; LDG.E; STG.E.128;")


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 65},
        {"local": 8},
        {"shared_bytes": 4},
        {"code": SAMPLE.code.replace("STG.E.128", "STG.E.128.STRONG.SM")},
        {"code": SAMPLE.code.replace("STG.E.128", "STG.E; STG.E")},
        {"code": SAMPLE.code + "LDG.E.64; LDG.E"},
        {"code": SAMPLE.code + "RED.E.ADD"},
    ],
    ids=lambda change: "-".join(map(str, change.values())),
)
def test_faults_are_found(change: dict[str, object]) -> None:
    assert faults(SAMPLE) == []
    assert faults(SAMPLE._replace(**change)) != []  # type: ignore[arg-type]
