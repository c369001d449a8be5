"""What nvcc made of the kernels, without a GPU: registers, local and shared memory, vector accesses.

Looked at is the code in the module that was built, as users get it. Where it has none for an architecture, or is older
than a source, nvcc compiles the kernels anew as the build would.
"""

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
from functools import cached_property
from pathlib import Path

import pytest
from support import ROOT
from support.toolchain import CUDA_SOURCES, JOBS

from pyglow_fast import _backend

# The others differ in what their instructions cost, hardly in which ones there are.
ARCHITECTURES = ("90", *(pytest.param(arch, marks=pytest.mark.full) for arch in ("80", "100", "120")))
# As CMake compiles them: optimised, C++17, no fast math. All warnings of the assembler about memory count as errors.
FLAGS = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-warn-spills,-warn-lmem-usage", "-cubin"]
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
    in_flight: int = 0  # 128-bit loads of a vector path that a thread issues before it stores what came of one
    copies: bool = False  # some go to shared memory without passing the thread's registers
    nets: bool = False  # float kernels also have 64-bit accesses there, for four numbers of a 16-bit net
    only_sums: bool = False


LIMITS = {
    "fused_kernel": Limit({"f": 2, "d": 1}, 16, 26, 18, 2, in_flight=4, copies=True, nets=True),
    "finish_kernel": Limit({"f": 6, "d": 6}, 0, 1),
    "sums_kernel": Limit({"f": 2, "d": 1}, 0, 5, 10, 20, in_flight=4, nets=True, only_sums=True),
    "reduce_kernel": Limit({"f": 4, "d": 4}, 2048, 1),
    "coupling_kernel": Limit({"f": 4, "d": 1}, 64, 44, narrow_loads=0, narrow_stores=2, nets=True),
    "moments_kernel": Limit({"f": 2, "d": 2}, 0, 3, narrow_loads=0, narrow_stores=20, only_sums=True),
    "merge_kernel": Limit({"f": 6, "d": 6}, 0, 1),
    "log_prob_kernel": Limit({"f": 4, "d": 3}, 64, 2, narrow_loads=2, narrow_stores=2, only_sums=True),
    "log_prob_backward_kernel": Limit({"f": 4, "d": 3}, 0, 2, narrow_loads=3),
    "sample_kernel": Limit({"f": 4, "d": 3}, 0, 2, narrow_loads=2),
    "sample_sums_kernel": Limit({"f": 6, "d": 6}, 64, 1),
    "coupling_backward_kernel": Limit({"f": 3, "d": 2}, 0, 44, narrow_loads=1, nets=True),
    "gather_kernel": Limit({"f": 4, "d": 3}, 64, 2, narrow_loads=4, narrow_stores=2, nets=True),
    "gather_backward_kernel": Limit({"f": 3, "d": 2}, 64 + 2048, 2, narrow_loads=4, narrow_stores=2, nets=True),
    "step_gather_backward_kernel": Limit({"f": 4, "d": 2}, 0, 2, narrow_loads=4, nets=True),
    "coupling_patches_kernel": Limit({"f": 2, "d": 2}, 64, 1, 0, 3, in_flight=7, nets=True),
    "coupling_backward_patches_kernel": Limit({"f": 2, "d": 2}, 0, 1, 1, in_flight=10, nets=True),
    "gather_patches_kernel": Limit({"f": 2, "d": 2}, 64, 1, 4, 2, in_flight=6, nets=True),
    "gather_backward_patches_kernel": Limit({"f": 2, "d": 2}, 2048, 1, 4, 1, in_flight=10, nets=True),
    "step_gather_backward_patches_kernel": Limit({"f": 2, "d": 2}, 0, 1, 4, in_flight=8, nets=True),
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation, as cuobjdump reports it."""

    symbol: str
    registers: int
    stack: int
    local: int
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
        return self.parts[3].endswith("Lb1E") or "_patches_" in self.name

    @property
    def patches(self) -> bool:
        """Whether it takes a channels-last net's output in patches."""
        return "_patches_" in self.name or re.search(r"(Source|Sink)I[fd]Lb1E", self.symbol) is not None

    @property
    def writes_net(self) -> bool:
        """Whether it also gives the gradient for the net's output."""
        return "backward_patches" in self.name or re.search(r"(StepSource|CouplingSink)", self.symbol) is not None

    @property
    def pairs_only(self) -> bool:
        """Whether its threads have but two channels of the net's output."""
        return re.search(r"CouplingSinkI.*Li2E", self.symbol) is not None and self.dtype == "f"


def parse(report: str, reserved: int) -> Iterator[Kernel]:
    """The kernels in what cuobjdump -res-usage prints; it counts bytes reserved by the system for those that share."""
    pattern = r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
    for symbol, registers, stack, shared, local in re.findall(pattern, report):
        yield Kernel(symbol, int(registers), int(stack), int(local), max(0, int(shared) - reserved))


@dataclass(frozen=True)
class Cubin:
    """Compiled kernels of one architecture."""

    path: Path
    arch: int

    @cached_property
    def kernels(self) -> list[Kernel]:
        return list(parse(cuobjdump("-res-usage", str(self.path)), 1024 if self.arch >= 90 else 0))

    @cached_property
    def code(self) -> dict[str, str]:
        """The instructions of each kernel by symbol."""
        text = cuobjdump("-sass", str(self.path))
        blocks = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)[1:]
        return dict(zip(blocks[::2], blocks[1::2], strict=True))


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    """What the tool prints; it and nvdisasm, which it calls, are those of the toolkit or of their pip packages."""
    folders = [os.environ.get("PATH", "")]
    package = importlib.util.find_spec("nvidia")
    for base in package.submodule_search_locations or [] if package else []:
        folders += [str(tool.parent) for tool in Path(base).glob("*/bin/cuobjdump")]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        pytest.skip("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        [tool, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    ).stdout


def built_module(arch: str) -> Path | None:
    """The extension, if it has code for the architecture and no CUDA source is newer."""
    extension = _backend.extension()
    if extension is None or arch not in re.findall(r"\d+", _backend.build_info().get("cuda_archs", "")):
        return None
    module = Path(extension.__file__)
    sources = [path for folder in ("cuda", "math") for path in (ROOT / "csrc" / folder).iterdir()]
    return module if max(path.stat().st_mtime for path in sources) <= module.stat().st_mtime else None


def extract(module: Path, arch: str, folder: Path) -> list[Cubin]:
    """The module's code for an architecture."""
    cuobjdump("-xelf", f"sm_{arch}", str(module), cwd=folder)
    return [Cubin(path, int(arch)) for path in sorted(folder.glob("*.cubin"))]


def compiled(arch: str, folder: Path) -> list[Cubin]:
    """Every source compiled for one architecture, two at a time."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc (the CUDA toolkit) on the PATH")

    def compile_one(source: Path) -> Cubin:
        target = folder / f"{source.stem}.cubin"
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr.lower(), result.stderr
        return Cubin(target, int(arch))

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def cubins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Cubin]:
    """The kernels' code for one architecture."""
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    module = built_module(request.param)
    return compiled(request.param, folder) if module is None else extract(module, request.param, folder)


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
        assert kernel.stack == kernel.local == 0, f"{kernel} uses local memory"
        # Registers are allotted to warps in units of 8 for each thread.
        blocks = REGISTERS // (BLOCK_THREADS * -(-kernel.registers // 8) * 8)
        assert blocks >= limit.blocks[kernel.dtype], f"{kernel}: {blocks} blocks on a multiprocessor"
        assert kernel.shared_bytes <= limit.shared_bytes, f"{kernel} has more shared memory than declared"


def loads_in_flight(code: str) -> int:
    """The longest row of 128-bit loads that no store to shared memory, which would wait for them, interrupts."""
    rows = re.split(r"\bSTS\b|\bBAR\b", code)
    return max(len(re.findall(r"\bLDG\b[.\w]*\.128\b", row)) for row in rows)


def check_accesses(kernel: Kernel, code: str) -> None:
    """128-bit loads and stores in a vector path, none that order more than their thread needs; no local memory; no
    atomics, which would make results vary.
    """
    operations = re.findall(r"\b(?:ST|LDG|STG|LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG)\b[.\w]*", code)
    assert not [op for op in operations if not op.startswith(("LDG", "STG"))], f"{kernel}: {operations}"
    assert not [op for op in operations if ".STRONG" in op], f"{kernel}: {operations}"
    limit = LIMITS[kernel.name]
    if kernel.vector and limit.narrow_loads is not None:
        net = re.compile(r"\.64\b") if limit.nets and kernel.dtype == "f" else re.compile(r"(?!)")
        narrow = Counter(op[:3] for op in operations if ".128" not in op and not net.search(op))
        wide = Counter(op[:3] for op in operations if ".128" in op)
        # Where two halves of a patch begin or end between its four channels, two pairs at four positions of a 16-bit
        # net are 32 bits each.
        pairs = 2 * 2 * 4 if kernel.patches and kernel.dtype == "f" else 0
        assert narrow["LDG"] <= limit.narrow_loads + pairs, f"{kernel}: {operations}"
        assert narrow["STG"] <= limit.narrow_stores + pairs * kernel.writes_net, f"{kernel}: {operations}"
        if kernel.patches and not kernel.pairs_only:  # both halves at every position of a patch
            halves = 2 * (4 if kernel.dtype == "f" else 2)
            assert wide["LDG"] >= halves, f"{kernel}: {operations}"
            assert wide["STG"] >= halves * kernel.writes_net, f"{kernel}: {operations}"
        assert wide["LDG"] >= 2, f"{kernel}: {operations}"
        assert wide["STG"] >= 1 or limit.only_sums, f"{kernel}: {operations}"
        assert loads_in_flight(code) >= limit.in_flight, f"{kernel}: a thread waits for one load before the next"
        assert bool(re.search(r"\bLDGSTS\b", code)) == limit.copies, f"{kernel}: copies to shared memory"


def test_machine_code(cubins: list[Cubin]) -> None:
    for cubin in cubins:
        code = cubin.code if cubin.kernels else {}
        assert set(code) == {kernel.symbol for kernel in cubin.kernels}
        for kernel in cubin.kernels:
            check_accesses(kernel, code[kernel.symbol])


def test_loads_in_flight() -> None:
    """Loads count together up to the next store to shared memory."""
    assert loads_in_flight("LDG.E.128; STS.128; LDG.E.128; STS.128; BAR.SYNC; LDG.E; LDG.E.64") == 1
    assert loads_in_flight("LDG.E.128; LDG.E; LDG.E.128.CONSTANT; STS.128; STS.128; LDG.E.128") == 2


@pytest.mark.parametrize(
    "code",
    [
        "LDG.E.128 R4; LDG.E.128 R8; STG.E.128.STRONG.SM [R2], R4;",
        "LDG.E.128 R4; LDG.E.128 R8; STG.E.128 [R2], R4; STG.E [R2], R8; STG.E [R2+0x4], R9;",
        "LDG.E.128 R4; LDG.E.128 R8; ST.E.128 [R2], R4;",
        "LDG.E.128 R4; LDG.E.128 R8; STG.E.128 [R2], R4; STL [R1], R4;",
    ],
    ids=["ordered", "split", "generic", "local"],
)
def test_accesses_are_told_apart(code: str) -> None:
    """Stores that are ordered, split, not known to be global or to local memory are found in what cuobjdump prints."""
    kernel = Kernel("_ZN6pyglow4cuda13sample_kernelIfLb1EEEvv", 32, 0, 0, 0)
    check_accesses(kernel, "LDG.E.128 R4; LDG.E.128 R8; STG.E.128 [R2], R4;")
    with pytest.raises(AssertionError):
        check_accesses(kernel, code)


@pytest.mark.parametrize(("loads", "stores"), [(7, 8), (8, 7)])
def test_narrow_accesses_of_patches_are_found(loads: int, stores: int) -> None:
    """Of a patch each half is read and written in 128 bits at each of its positions; otherwise the check fails."""
    symbol = "_ZN6pyglow4cuda12fused_kernelIfNS0_10StepSourceIfLb1EEENS0_9PlainSinkIfEELi8ELb1EEEvv"
    kernel = Kernel(symbol, 128, 0, 0, 0)
    assert kernel.patches
    assert kernel.writes_net

    def code(loads: int, stores: int) -> str:
        return "LDG.E.128 R4; " * loads + "LDGSTS [R2], [R4]; " + "STG.E.128 [R2], R4; " * stores

    check_accesses(kernel, code(8, 8))
    check_accesses(kernel, code(8, 8) + "LDG.E R4; " * 34 + "STG.E [R2], R4; " * 18)
    for wrong in (code(loads, stores), code(8, 8) + "LDG.E R4; " * 35, code(8, 8) + "STG.E [R2], R4; " * 19):
        with pytest.raises(AssertionError):
            check_accesses(kernel, wrong)


def test_the_report_is_understood() -> None:
    """Local memory and its size are read from what cuobjdump prints."""
    report = """
 Function _ZN6pyglow4cuda14product_kernelIfLb1EEEvNS0_7ProductIT_EE:
  REG:64 STACK:16 SHARED:3072 LOCAL:12 CONSTANT[0]:776 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    (kernel,) = parse(report, 1024)
    assert (kernel.stack, kernel.local) == (16, 12)
    assert (kernel.registers, kernel.shared_bytes) == (64, 2048)
    assert (kernel.name, kernel.dtype, kernel.vector) == ("product_kernel", "f", True)
