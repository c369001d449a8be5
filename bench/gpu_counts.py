"""Counts what each case of `bench kernels` does on a GPU, without one: launches, instructions, sectors, cycles.

The emulator of the tests tells the launches with their arguments; nvcc's code for sm_90 is executed on some blocks of
each (bench/sass). ``python -m bench.gpu_tables --write`` writes it to bench/results/gpu-model.json, which
bench/gpu_model.py reads.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import machine_code
from bench.cases import BETWEEN, SHAPES, Case, Data, gpu_cases, step_cases
from bench.gpu_model import L2_LATENCY, MEMORY_LATENCY, SMALL
from bench.harness import ROOT
from bench.machine_code import Cubin, Kernel, MissingTool
from bench.sass.listing import Instruction, decode
from bench.sass.machine import Counts, Machine
from bench.sass.state import Launch, UnknownInstruction
from pyglow_fast import _backend

ARCH = "90"
ARCHITECTURES = ("80", "90", "100", "120")
BLOCKS = 16  # of a launch that are executed, spread over the grid
CPU = torch.device("cpu")
Tensors = dict[str, tuple[int, int]]  # address of the first byte, and behind the last


class NotModelled(RuntimeError):
    """Raised when a kernel is launched that has no code for the architecture."""


CANNOT_COUNT = (NotModelled, NotImplementedError, UnknownInstruction, MissingTool)


@dataclasses.dataclass(frozen=True)
class Code:
    """One kernel of the extension, compiled for sm_90."""

    kernel: Kernel
    constants: bytes
    instructions: list[Instruction]


class Codes:
    """The kernels of one architecture by name and template arguments, decoded when they are asked for."""

    def __init__(self, cubins: Sequence[Cubin]) -> None:
        found = [(cubin, kernel) for cubin in cubins for kernel in cubin.kernels]
        names = machine_code.demangled([kernel.symbol for _, kernel in found])
        self._found = dict(zip(names, found, strict=True))
        self._codes: dict[tuple[str, str], Code] = {}

    def of(self, kernel: str, arguments: str) -> Code:
        """Find one kernel by its name and template arguments.

        Raises:
            NotModelled: there is none of this name.
        """
        key = kernel, arguments
        if key not in self._found:
            raise NotModelled(f"{kernel}<{arguments}>: expected code for sm_{ARCH}, found none")
        if key not in self._codes:
            cubin, entry = self._found[key]
            self._codes[key] = Code(entry, cubin.constants(entry.symbol), decode(cubin.code[entry.symbol]))
        return self._codes[key]


def spread(count: int, most: int = BLOCKS) -> list[int]:
    """Up to ``most`` of the numbers below ``count``: one by chance of each of as many equal shares, always the same."""
    if count <= most:
        return list(range(count))
    chance = random.Random(count)
    borders = [i * count // most for i in range(most + 1)]
    return [chance.randrange(*share) for share in itertools.pairwise(borders)]


def execute(code: Code, launch: Any, parameters: bytes, tensors: Tensors, indices: Any, most: int = BLOCKS) -> Counts:
    """Run some blocks of a launch that the emulator told, or all if it has no more than ``most``."""
    given = Launch(code.kernel.symbol, (launch.blocks, 1, 1), (*launch.threads, 1), launch.dynamic_bytes, parameters)
    ranges = {
        name: (begin, end, L2_LATENCY if end - begin <= SMALL else MEMORY_LATENCY)
        for name, (begin, end) in tensors.items()
    }
    integers = {index.data_ptr(): index.numpy() for index in indices}
    machine = Machine(
        code.instructions, code.constants, given, spread(launch.blocks, most), integers, ranges, L2_LATENCY
    )
    return machine.run()


class Executed:
    """Counts of launches; one that differs from an earlier one in its addresses alone is not executed again."""

    def __init__(self, codes: Codes) -> None:
        self.codes = codes
        self._done: dict[tuple[Any, ...], Counts] = {}

    def counts(self, record: Any, tensors: Tensors) -> Counts:
        """The counts of a launch, its sectors by the names of ``tensors``."""
        numbered = {str(i): place for i, place in enumerate(tensors.values())}
        words = [word for (word,) in struct.iter_unpack("<Q", record.parameters[: len(record.parameters) // 8 * 8])]
        places = [_place(word, numbered) for word in words]
        key = (
            record.launch,
            *places,
            record.parameters[len(words) * 8 :],
            *(end - at for at, end in numbered.values()),
        )
        if key not in self._done:
            code = self.codes.of(record.launch.kernel, record.launch.arguments)
            self._done[key] = execute(code, record.launch, record.parameters, numbered, record.indices)
        counts, names = self._done[key], [*tensors, "other"]
        sectors = {
            (names[-1 if number == "other" else int(number)], way): count
            for (number, way), count in counts.sectors.items()
        }
        return dataclasses.replace(counts, sectors=sectors)


def _place(word: int, tensors: Tensors) -> object:
    """A word of a launch's arguments: an address in a tensor, another address, or a number."""
    for name, (begin, end) in tensors.items():
        if begin <= word < end:
            return name, word - begin
    return "elsewhere" if word >= 2**40 else word


def case_entry(case: Case, emulator: Any, executed: Executed) -> dict[str, Any]:
    """A case as it stands in the JSON: numbers of a launch are those of an average block."""
    from support.case_launches import case_launches  # of the tests, which are not there for who only reads the JSON

    told = case_launches(case, emulator)
    names: dict[int, str] = {}
    sizes, launches = {}, []
    for record in told.ours:
        tensors = {}
        for key, begin, end in record.tensors:
            name = names.setdefault(key, f"t{len(names)}")
            tensors[name], sizes[name] = (begin, end), end - begin
        code = executed.codes.of(record.launch.kernel, record.launch.arguments)
        counts = executed.counts(record, tensors)
        launches.append(
            {
                "kernel": record.launch.kernel,
                "arguments": record.launch.arguments,
                "blocks": record.launch.blocks,
                "threads": list(record.launch.threads),
                "dynamic_bytes": record.launch.dynamic_bytes,
                "static_bytes": code.kernel.shared_bytes,
                "registers": code.kernel.registers,
                "issued": round(counts.issued, 1),
                "units": {unit: round(count, 1) for unit, count in counts.units.items()},
                "shared_cycles": round(counts.shared_cycles, 1),
                "sectors": {f"{name} {way}": round(count, 2) for (name, way), count in counts.sectors.items()},
                "cycles": round(counts.cycles),
                "longest": round(counts.longest),
                "round_trips": round(counts.round_trips, 1),
            }
        )
    return {
        "op": case.op,
        "mode": case.mode,
        "shape": list(case.shape),
        "tensors": sizes,
        "launches": launches,
        "others": [list(other) for other in told.others],
    }


def emulator_in(folder: Path) -> Any:
    """The tests' emulator, built if need be (the objects are kept in build/emulation)."""
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from support.launch_cases import AllKernels
    from support.toolchain import CUDA_SOURCES, EMULATION, build

    sources = [*CUDA_SOURCES, *sorted(EMULATION.glob("driver*.cpp"))]
    return AllKernels(build(folder / "libemulated.so", sources, "-O1", "-shared"))


def glow_cases(shape: tuple[int, ...]) -> list[Case]:
    """A flow step between two nets, forward and backward, on the state of one level; none if `bench kernels` has it."""
    if shape in SHAPES:
        return []
    cases = step_cases(Data(shape, CPU))
    return [case for case in cases if (case.op, case.mode) == (BETWEEN, "forward+backward")]


def compiled_facts(cubins: Iterable[Cubin]) -> dict[str, dict[str, Any]]:
    """Sums up each kernel by name: what its instantiations have at most or at least.

    Of a kernel's instantiations those of float32 count (of float64 where there are no others) that move 16 bytes at a
    time (all of them where none does).
    """
    groups: dict[str, list[tuple[Kernel, str]]] = {}
    for cubin in cubins:
        listings = cubin.code if cubin.kernels else {}
        for kernel in cubin.kernels:
            groups.setdefault(kernel.name, []).append((kernel, listings[kernel.symbol]))
    facts = {}
    for name, group in sorted(groups.items()):
        single = [pair for pair in group if pair[0].dtype == "f"]
        group = single or group
        chosen = [pair for pair in group if pair[0].vector] or group
        kernels = [kernel for kernel, _ in chosen]
        accesses = [re.findall(r"\b(?:LDG|STG)\.[.\w]*", listing) for _, listing in chosen]
        registers = [kernel.registers for kernel in kernels]
        facts[name] = {
            "dtype": "float32" if single else "float64",
            "instantiations": len(group),
            "registers": [min(registers), max(registers)],
            "stack": max(kernel.stack + kernel.local for kernel, _ in group),
            "static_bytes": max(kernel.shared_bytes for kernel in kernels),
            "wide": min(sum(".128" in access for access in found) for found in accesses),
        }
    return facts


def commit_of_kernels() -> str:
    """The last commit that changed the kernels' sources, with -dirty if they were changed since."""
    folders = ["csrc/cuda", "csrc/math", "csrc/core.h"]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments, "--", *folders], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    try:
        found = git("log", "-1", "--format=%h")
        return f"{found}-dirty" if found and git("status", "--porcelain") else found or "unknown"
    except OSError:  # no git
        return "unknown"


def nvcc_version() -> str:
    """The version of the compiler on the PATH, or what the built module says it was compiled with."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return str(_backend.build_info().get("cuda", "unknown"))
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "unknown"


def content(shapes: Sequence[tuple[int, ...]] = tuple(SHAPES), more: Sequence[Case] = ()) -> dict[str, Any]:
    """Collect all that the JSON holds.

    Raises:
        NotModelled: a case launches a kernel that has no code.
        NotImplementedError: a case runs an op of ours that tests/support/case_launches.py does not know.
        UnknownInstruction: a kernel has an instruction that bench/sass does not execute.
        MissingTool: a tool to read or make the kernels' code is not there.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_arch = {}
        for arch in ARCHITECTURES:
            (folder / arch).mkdir()
            by_arch[arch] = machine_code.cubins(arch, folder / arch)
        executed, emulator = Executed(Codes(by_arch[ARCH])), emulator_in(folder)
        cases = [case for shape in shapes for case in gpu_cases(Data(shape, CPU))]
        return {
            "code": {"commit": commit_of_kernels(), "nvcc": nvcc_version(), "arch": f"sm_{ARCH}"},
            "compiled": {f"sm_{arch}": compiled_facts(cubins) for arch, cubins in by_arch.items()},
            "cases": [case_entry(case, emulator, executed) for case in (*cases, *more)],
        }
