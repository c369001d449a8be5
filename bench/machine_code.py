"""What nvcc made of the CUDA kernels, read without a GPU: registers, stack, shared memory, constants, instructions.

The tests hold these against the limits that the sources promise (tests/emulation/test_static_check.py);
bench/gpu_model.py predicts times from them.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bench.harness import ROOT
from pyglow_fast import _backend

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# The options by which CMake compiles the sources: optimised, C++17, no fast math. All warnings of the assembler about
# memory are shown.
FLAGS = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", "-Xptxas", "-warn-spills,-warn-lmem-usage", "-cubin"]
JOBS = 2
REGISTERS = 64 * 1024  # of a multiprocessor, all architectures


class MissingTool(RuntimeError):
    """Raised when a tool of the CUDA toolkit is not there; the text says how to get it."""


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
        """The kernel's name without namespaces, such as "fused_kernel"."""
        return self.parts[1]

    @property
    def dtype(self) -> str:
        """The type of its values: f for float, d for double."""
        return self.parts[2]

    @property
    def vector(self) -> bool:
        """Whether it takes 16 bytes at a time: by its last template argument, or as all do that work in patches."""
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

    def blocks(self, threads: int) -> int:
        """Blocks of so many threads that a multiprocessor's registers have room for: whole warps, 8 for a thread."""
        return REGISTERS // (-(-threads // 32) * 32 * -(-self.registers // 8) * 8)


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
        """All kernels of the file, with what they use."""
        return list(parse(cuobjdump("-res-usage", str(self.path)), 1024 if self.arch >= 90 else 0))

    @cached_property
    def code(self) -> dict[str, str]:
        """The instructions of each kernel by symbol."""
        text = cuobjdump("-sass", str(self.path))
        blocks = re.split(r"^\s*Function : (\S+)\s*$", text, flags=re.MULTILINE)[1:]
        return dict(zip(blocks[::2], blocks[1::2], strict=True))

    def constants(self, symbol: str) -> bytes:
        """A kernel's constant bank 2: tables of the branches of its switches."""
        return sections(self.path.read_bytes()).get(f".nv.constant2.{symbol}", b"")


def sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file by name."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + size * i) for i in range(count)]
    text = elf[headers[names][4] : headers[names][4] + headers[names][5]]
    return {
        text[name : text.index(b"\0", name)].decode(): elf[at : at + length] for name, _, _, _, at, length in headers
    }


def cuobjdump(*arguments: str, cwd: Path | None = None) -> str:
    """What the tool prints; it and nvdisasm, which it calls, are those of the toolkit or of their pip packages.

    Raises:
        MissingTool: one of them is not there.
    """
    folders = [os.environ.get("PATH", "")]
    package = importlib.util.find_spec("nvidia")
    for base in package.submodule_search_locations or [] if package else []:
        folders += [str(tool.parent) for tool in Path(base).glob("*/bin/cuobjdump")]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    if tool is None or shutil.which("nvdisasm", path=path) is None:
        raise MissingTool("needs cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    environment = {**os.environ, "PATH": path}
    return subprocess.run(
        [tool, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=True
    ).stdout


def demangled(symbols: Sequence[str]) -> list[tuple[str, str]]:
    """Name and template arguments of kernels, without namespaces, such as ("fused_kernel", "float, ..., true").

    Raises:
        MissingTool: c++filt, of the GNU binutils, is not there.
    """
    tool = shutil.which("c++filt")
    if tool is None:
        raise MissingTool("needs c++filt: install binutils")
    lines = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    found = [re.match(r"void .*?(\w+_kernel)<(.*?)>\(", line) for line in lines[: len(symbols)]]
    return [
        ("", "") if match is None else (match[1], re.sub(r"(pyglow|cuda|\(anonymous namespace\))::", "", match[2]))
        for match in found
    ]


def built_module(arch: str) -> Path | None:
    """The extension, if it has code for the architecture and no CUDA source is newer."""
    extension = _backend.extension()
    if (
        extension is None
        or extension.__file__ is None
        or arch not in re.findall(r"\d+", _backend.build_info().get("cuda_archs", ""))
    ):
        return None
    module = Path(extension.__file__)
    sources = [path for folder in ("cuda", "math") for path in (ROOT / "csrc" / folder).iterdir()]
    return module if max(path.stat().st_mtime for path in sources) <= module.stat().st_mtime else None


def extract(module: Path, arch: str, folder: Path) -> list[Cubin]:
    """The module's code for an architecture."""
    cuobjdump("-xelf", f"sm_{arch}", str(module), cwd=folder)
    return [Cubin(path, int(arch)) for path in sorted(folder.glob("*.cubin"))]


def compiled(arch: str, folder: Path, sources: Sequence[Path] = SOURCES) -> list[Cubin]:
    """Every source compiled for one architecture, two at a time.

    Raises:
        MissingTool: nvcc is not there.
        RuntimeError: a source does not compile, or not without warnings.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise MissingTool("needs nvcc (the CUDA toolkit) on the PATH")

    def compile_one(source: Path) -> Cubin:
        target = folder / f"{source.stem}.cubin"
        command = [nvcc, *FLAGS, f"-arch=sm_{arch}", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0 or "warning" in result.stderr.lower():
            raise RuntimeError(f"{source.name}: expected no warning of nvcc, found {result.stderr}")
        return Cubin(target, int(arch))

    with ThreadPoolExecutor(JOBS) as pool:
        return list(pool.map(compile_one, sources))


def cubins(arch: str, folder: Path) -> list[Cubin]:
    """The code of the built module; where it has none or is older than a source, what nvcc makes anew in ``folder``."""
    module = built_module(arch)
    return compiled(arch, folder) if module is None else extract(module, arch, folder)
