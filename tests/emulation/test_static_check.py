"""What nvcc makes of the kernels, without a GPU: registers, spills, local and shared memory, vector accesses."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from toolchain import CUDA_SOURCES, JOBS, ROOT

pytestmark = pytest.mark.slow

ARCHITECTURES = ("80", "90", "100", "120")
# As CMake compiles them: optimised, C++17, no fast math. All warnings of the assembler about memory count as errors.
FLAGS = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-cubin"]
REGISTERS = 64 * 1024  # of a multiprocessor, all architectures
BLOCK_THREADS = 256


@dataclass(frozen=True)
class Limit:
    """What the comment above a kernel's launcher promises."""

    blocks: dict[str, int]  # that fit on a multiprocessor, by type (f: float, d: double), as far as registers go
    shared_bytes: int  # static; the emulator refuses more than 48 KB of dynamic
    variants: int  # instantiations per type
    # Global accesses of less than 128 bits that the vector path (last template argument true) may have, or None if
    # there is no such path. They are: what is one per sample or part, weights, what repeats along a row, and results of
    # kernels that store nothing but sums.
    narrow_loads: int | None = None
    narrow_stores: int = 0
    nets: bool = False  # float kernels also have 64-bit accesses there, for four numbers of a 16-bit net
    only_sums: bool = False


LIMITS = {
    "fused_kernel": Limit({"f": 2, "d": 1}, 16, 10, narrow_loads=19, narrow_stores=2, nets=True),
    "finish_kernel": Limit({"f": 6, "d": 6}, 0, 1),
    "clear_kernel": Limit({"f": 6, "d": 6}, 0, 1),
    "sums_kernel": Limit({"f": 2, "d": 1}, 0, 4, narrow_loads=10, narrow_stores=20, nets=True, only_sums=True),
    "reduce_kernel": Limit({"f": 4, "d": 4}, 2048, 1),
    "coupling_kernel": Limit({"f": 4, "d": 1}, 64, 44, narrow_loads=0, narrow_stores=2, nets=True),
    "log_det_kernel": Limit({"f": 4, "d": 4}, 64, 1),
    "moments_kernel": Limit({"f": 2, "d": 2}, 0, 3, narrow_loads=0, narrow_stores=20, only_sums=True),
    "merge_kernel": Limit({"f": 6, "d": 6}, 0, 1),
    "log_prob_kernel": Limit({"f": 4, "d": 3}, 64, 2, narrow_loads=2, narrow_stores=2, only_sums=True),
    "log_prob_backward_kernel": Limit({"f": 4, "d": 3}, 0, 2, narrow_loads=3),
    "sample_kernel": Limit({"f": 4, "d": 3}, 0, 2, narrow_loads=2),
    "sample_sums_kernel": Limit({"f": 6, "d": 6}, 64, 1),
    "coupling_backward_kernel": Limit({"f": 3, "d": 2}, 0, 44, narrow_loads=1, nets=True),
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation, as the assembler reports it."""

    symbol: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared_bytes: int

    @property
    def parts(self) -> re.Match[str]:
        """name, type and the rest of the template arguments, from the mangled name."""
        found = re.search(r"\d([a-z_]+_kernel)I([fd])(.*?)EEv", self.symbol)
        assert found is not None, f"no kernel's name: {self.symbol}"
        return found

    @property
    def name(self) -> str:
        return self.parts[1]

    @property
    def dtype(self) -> str:
        return self.parts[2]

    @property
    def vector(self) -> bool:
        return self.parts[3].endswith("Lb1E")


@dataclass(frozen=True)
class Cubin:
    source: Path
    path: Path
    kernels: list[Kernel]


def parse(report: str) -> Iterator[Kernel]:
    """The kernels in what ptxas -v prints."""
    pattern = (
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s+: Used (\d+) registers([^\n]*)"
    )
    for found in re.finditer(pattern, report):
        shared = re.search(r"(\d+) bytes smem", found[6])
        numbers = (int(found[i]) for i in range(2, 6))
        yield Kernel(found[1], *numbers, int(shared[1]) if shared else 0)


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def cubins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Cubin]:
    """Every source compiled for one architecture, two at a time."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc (the CUDA toolkit) on the PATH")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")

    def compile_one(source: Path) -> Cubin:
        target = folder / f"{source.stem}.cubin"
        command = [nvcc, *FLAGS, f"-arch=sm_{request.param}", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr.lower(), result.stderr
        return Cubin(source, target, list(parse(result.stderr)))

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


def test_registers_and_memory(cubins: list[Cubin]) -> None:
    """No spills, no stack, no more registers than the claimed occupancy leaves, the shared memory that was declared."""
    kernels = [kernel for cubin in cubins for kernel in cubin.kernels]
    for name, limit in LIMITS.items():
        for dtype in "fd":
            group = [k for k in kernels if k.name == name and k.dtype == dtype]
            assert len(group) == limit.variants, f"{name}<{dtype}>: {len(group)} instantiations"
            assert any(k.vector for k in group) == (limit.narrow_loads is not None)
    for kernel in kernels:
        limit = LIMITS[kernel.name]
        assert kernel.stack == kernel.spill_stores == kernel.spill_loads == 0, f"{kernel} uses local memory"
        # Registers are allotted to warps in units of 8 for each thread.
        blocks = REGISTERS // (BLOCK_THREADS * -(-kernel.registers // 8) * 8)
        assert blocks >= limit.blocks[kernel.dtype], f"{kernel}: {blocks} blocks on a multiprocessor"
        assert kernel.shared_bytes <= limit.shared_bytes, f"{kernel} has more shared memory than declared"


def disassembler() -> tuple[str, dict[str, str]]:
    """cuobjdump and an environment in which it finds nvdisasm, from the toolkit or from their pip packages."""
    folders = [os.environ.get("PATH", "")]
    package = importlib.util.find_spec("nvidia")
    for base in package.submodule_search_locations or [] if package else []:
        folders += [str(tool.parent) for tool in Path(base).glob("*/bin/cuobjdump")]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return tool, {**os.environ, "PATH": path}


def machine_code(cubin: Cubin) -> dict[str, str]:
    """The instructions of each kernel by symbol."""
    tool, environment = disassembler()
    command = [tool, "-sass", str(cubin.path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    blocks = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)[1:]
    return dict(zip(blocks[::2], blocks[1::2], strict=True))


def test_machine_code(cubins: list[Cubin]) -> None:
    """128-bit loads and stores in every vector path; no local memory; no atomics, which would make results vary."""
    for cubin in cubins:
        code = machine_code(cubin) if cubin.kernels else {}
        assert set(code) == {kernel.symbol for kernel in cubin.kernels}
        for kernel in cubin.kernels:
            operations = re.findall(r"\b(?:LDG|STG|LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG)\b[.\w]*", code[kernel.symbol])
            assert not [op for op in operations if not op.startswith(("LDG", "STG"))], f"{kernel}: {operations}"
            limit = LIMITS[kernel.name]
            if kernel.vector and limit.narrow_loads is not None:
                net = re.compile(r"\.64\b") if limit.nets and kernel.dtype == "f" else re.compile(r"(?!)")
                narrow = Counter(op[:3] for op in operations if ".128" not in op and not net.search(op))
                wide = Counter(op[:3] for op in operations if ".128" in op)
                assert narrow["LDG"] <= limit.narrow_loads, f"{kernel}: {operations}"
                assert narrow["STG"] <= limit.narrow_stores, f"{kernel}: {operations}"
                assert wide["LDG"] >= 2, f"{kernel}: {operations}"
                assert wide["STG"] >= 1 or limit.only_sums, f"{kernel}: {operations}"


def test_the_report_is_understood() -> None:
    """A spill and its numbers are read from what ptxas prints."""
    report = """ptxas info    : 0 bytes gmem
ptxas info    : Function properties for _ZN6pyglow4cuda14product_kernelIfLb1EEEvNS0_7ProductIT_EE
    16 bytes stack frame, 12 bytes spill stores, 64 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 2048 bytes smem
"""
    (kernel,) = parse(report)
    assert (kernel.stack, kernel.spill_stores, kernel.spill_loads) == (16, 12, 64)
    assert (kernel.registers, kernel.shared_bytes) == (64, 2048)
    assert (kernel.name, kernel.dtype, kernel.vector) == ("product_kernel", "f", True)
