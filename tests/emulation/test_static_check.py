"""What nvcc made of the kernels, without a GPU: registers, local and shared memory, vector accesses.

Looked at is the code in the module that was built, as users get it. Where it has none for an architecture, or is older
than a source, nvcc compiles the kernels anew as the build would.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import pytest
from support import toolchain

from bench.machine_code import Cubin, Kernel, parse

# The others differ in what their instructions cost, hardly in which ones there are.
ARCHITECTURES = ("90", *(pytest.param(arch, marks=pytest.mark.full) for arch in ("80", "100", "120")))
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
    "invert_kernel": Limit({"f": 2, "d": 2}, 64 + 64, 2),
    "step_gather_backward_kernel": Limit({"f": 4, "d": 2}, 0, 2, narrow_loads=4, nets=True),
    "coupling_patches_kernel": Limit({"f": 2, "d": 2}, 64, 1, 0, 3, in_flight=7, nets=True),
    "coupling_backward_patches_kernel": Limit({"f": 2, "d": 2}, 0, 1, 1, in_flight=10, nets=True),
    # Four more where nvcc unrolls the loop that reads the index, as for sm_100 and sm_120.
    "gather_patches_kernel": Limit({"f": 2, "d": 2}, 64, 1, 8, 2, in_flight=6, nets=True),
    "gather_backward_patches_kernel": Limit({"f": 2, "d": 2}, 2048, 1, 8, 1, in_flight=10, nets=True),
    "step_gather_backward_patches_kernel": Limit({"f": 2, "d": 2}, 0, 1, 8, in_flight=8, nets=True),
}


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def cubins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Cubin]:
    """The kernels' code for one architecture."""
    return toolchain.cubins(tmp_path_factory, request.param)


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
        blocks = kernel.blocks(BLOCK_THREADS)
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
