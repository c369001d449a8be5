"""The machine that executes compiled kernels: small listings whose results and costs are known."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from bench.sass.listing import decode
from bench.sass.machine import Counts, Machine
from bench.sass.state import Launch, UnknownInstruction

OTHER = 500  # cycles of a load


def listing(*lines: str) -> str:
    """As cuobjdump prints it: sixteen bytes an instruction."""
    return "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))


def machine(
    *lines: str, threads: int = 32, blocks: int = 1, parameters: bytes = b"", ranges: dict | None = None
) -> Machine:
    """All blocks of a launch of these instructions."""
    launch = Launch("test_kernel", (blocks, 1, 1), (threads, 1, 1), 0, parameters)
    return Machine(decode(listing(*lines)), b"", launch, range(blocks), {}, ranges or {}, OTHER)


def run(*lines: str, **settings: object) -> tuple[Machine, Counts]:
    """The machine after its end, and what it counted."""
    made = machine(*lines, "EXIT", **settings)  # type: ignore[arg-type]
    return made, made.run()


def register(made: Machine, index: int) -> list[int]:
    """Of every thread."""
    return made.registers["R"][index].tolist()


def test_a_loop_runs_as_often_as_it_does() -> None:
    """Each thread of two warps as often as its index says; a warp issues while one of its threads is in the loop."""
    made, counts = run(
        "S2R R0, SR_TID.X",
        "MOV R1, RZ",
        "ISETP.GE.AND P0, PT, R1, R0, PT",
        "@P0 BRA 0x60",
        "VIADD R1, R1, 0x1",
        "BRA 0x20",
        threads=64,
    )
    assert register(made, 1) == list(range(64))
    passes = 31 + 63
    assert counts.issued == 2 * 2 + 4 * passes + 2 * 2 + 2


@pytest.mark.parametrize(
    ("a", "b"), [(0, 0), (2**32 - 1, 1), (2**40 + 5, 2**40 + 6), (2**63 - 1, 2**33), (7, 2**32), (2**64 - 1, 2**64 - 1)]
)
def test_numbers_of_64_bits(a: int, b: int) -> None:
    """Sum, difference and order by carries between two registers, and a product of halves."""
    made, _ = run(
        "LDC.64 R2, c[0x0][0x210]",
        "LDC.64 R4, c[0x0][0x218]",
        "IADD3 R6, P0, R2, R4, RZ",
        "IADD3.X R7, R3, R5, RZ, P0, !PT",
        "IADD3 R8, P1, R2, -R4, RZ",
        "IADD3.X R9, R3, ~R5, RZ, P1, !PT",
        "ISETP.GE.U32.AND P2, PT, R2, R4, PT",
        "ISETP.GE.U32.AND.EX P2, PT, R3, R5, PT, P2",
        "SEL R10, RZ, 0x1, !P2",
        "IMAD.WIDE.U32 R12, R2, R4, R2",
        "LEA R14, P3, R2, R4, 0x3",
        "LEA.HI.X R15, R2, R5, R3, 0x3, P3",
        "SHF.R.U64 R16, R2, 0x9, R3",
        parameters=struct.pack("<QQ", a, b),
    )

    def pair(index: int) -> int:
        return register(made, index)[0] | register(made, index + 1)[0] << 32

    low = 2**32 - 1
    assert pair(6) == (a + b) % 2**64
    assert pair(8) == (a - b) % 2**64
    assert register(made, 10)[0] == int(a >= b)
    assert pair(12) == ((a & low) * (b & low) + a) % 2**64
    assert pair(14) == (8 * a + b) % 2**64
    assert register(made, 16)[0] == a >> 9 & low


@pytest.mark.parametrize(
    ("numerator", "divisor"), [(0, 1), (7, 3), (4095, 64), (262143, 12), (2**31, 7), (2**32 - 1, 1)]
)
def test_division_as_the_compiler_writes_it(numerator: int, divisor: int) -> None:
    """By an estimate of the reciprocal and two corrections: what loops over rows of a tensor hang on."""
    made, _ = run(
        f"MOV R10, {hex(numerator)}",
        f"MOV R11, {hex(divisor)}",
        "I2F.U32.RP R0, R11",
        "MUFU.RCP R0, R0",
        "IADD3 R2, R0, 0xffffffe, RZ",
        "F2I.FTZ.U32.TRUNC.NTZ R3, R2",
        "MOV R2, RZ",
        "IADD3 R5, RZ, -R3, RZ",
        "IMAD R5, R5, R11, RZ",
        "IMAD.HI.U32 R3, R3, R5, R2",
        "IMAD.HI.U32 R3, R3, R10, RZ",
        "IADD3 R5, -R3, RZ, RZ",
        "IMAD R10, R11, R5, R10",
        "ISETP.GE.U32.AND P0, PT, R10, R11, PT",
        "@P0 IADD3 R10, R10, -R11, RZ",
        "@P0 VIADD R3, R3, 0x1",
        "ISETP.GE.U32.AND P1, PT, R10, R11, PT",
        "@P1 VIADD R3, R3, 0x1",
    )
    assert register(made, 3)[0] == numerator // divisor


def test_logic_and_selection() -> None:
    made, _ = run(
        "S2R R0, SR_TID.X",
        "LOP3.LUT P0, R1, R0, 0x3, RZ, 0xc0, !PT",
        "LOP3.LUT R2, RZ, R0, RZ, 0x33, !PT",
        "ISETP.LT.AND P1, PT, R0, 0x10, P0",
        "PLOP3.LUT P2, PT, P0, P1, PT, 0x80, 0x0",
        "SEL R3, R0, 0x63, P2",
        "VIMNMX.U32 R4, R0, 0x5, PT",
        "HFMA2.MMA R5, -RZ, RZ, 1.875, 0",
        "FFMA R6, R5, R5, -R5",
        "FADD R7, |R5|, -0.5",
        "MOV R8, 0x44332291",
        "PRMT R9, R8, 0x8043, R0",
        "FADD R12, R5, 0.75",
        "FRND R13, R12",
        "FRND.FLOOR R14, R12",
        "ISETP.LT.AND P3, PT, R0, 0x3, PT",
        "VOTEU.ANY UR4, UPT, P3",
        "MOV R15, UR4",
        "SHFL.IDX PT, R10, R0, 0x3, 0x1f",
        "SHFL.BFLY PT, R11, R0, 0x10, 0x1f",
    )
    lanes = np.arange(32)
    assert register(made, 1) == (lanes & 3).tolist()
    assert register(made, 2) == (~lanes.astype(np.uint32)).tolist()
    assert register(made, 3) == np.where((lanes & 3 != 0) & (lanes < 16), lanes, 0x63).tolist()
    assert register(made, 4) == np.minimum(lanes, 5).tolist()
    assert made.registers["R"][5].view(np.float32).tolist() == [1.0] * 32
    assert made.registers["R"][6].view(np.float32).tolist() == [0.0] * 32
    assert made.registers["R"][7].view(np.float32).tolist() == [0.5] * 32
    assert register(made, 9) == [0xFF910044 | lane << 8 for lane in range(32)]
    assert register(made, 10) == [3] * 32
    assert made.registers["R"][13].view(np.float32).tolist() == [2.0] * 32
    assert made.registers["R"][14].view(np.float32).tolist() == [1.0] * 32
    assert register(made, 15) == [7] * 32
    assert register(made, 11) == (lanes ^ 16).tolist()


@pytest.mark.parametrize(("stride", "sectors"), [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors_are_counted(stride: int, sectors: int) -> None:
    """A warp's load of 32 numbers, neighbours or further apart, in a tensor that has a name."""
    made, counts = run(
        "LDC.64 R2, c[0x0][0x210]",
        "S2R R0, SR_TID.X",
        f"IMAD.WIDE.U32 R2, R0, {hex(4 * stride)}, R2",
        "LDG.E R4, desc[UR4][R2.64]",
        parameters=struct.pack("<Q", 1 << 20),
        ranges={"x": (1 << 20, (1 << 20) + 4096, 100)},
    )
    assert counts.requests == {"LDG.32": (1, sectors)}
    assert counts.sectors == {("x", "load"): sectors}
    assert made.registers["R"][4].view(np.float32).tolist() == [0.5] * 32


@pytest.mark.parametrize(("stride", "cycles"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_bank_conflicts_are_counted(stride: int, cycles: int) -> None:
    """A store to shared memory takes a cycle for each word that the busiest of 32 banks has to give."""
    _, counts = run("S2R R0, SR_TID.X", f"IMAD R1, R0, {hex(stride)}, RZ", "STS [R1+0x400], R0")
    assert counts.shared_cycles == cycles
    _, wide = run("S2R R0, SR_TID.X", "SHF.L.U32 R1, R0, 0x4, RZ", "LDS.128 R4, [R1+0x400]")
    assert wide.shared_cycles == 4


def test_dependent_loads_wait_and_independent_ones_do_not() -> None:
    address = ("LDC.64 R2, c[0x0][0x210]",)
    two = ("LDG.E R4, desc[UR4][R2.64]", "LDG.E R5, desc[UR4][R2.64+0x4]")
    settings = {"parameters": struct.pack("<Q", 1 << 20)}
    _, together = run(*address, *two, "FADD R6, R4, R5", **settings)
    _, in_turn = run(*address, two[0], "FADD R6, R4, R4", two[1], "FADD R6, R5, R6", **settings)
    assert OTHER < together.cycles < OTHER + 50 < 2 * OTHER < in_turn.cycles < 2 * OTHER + 50
    assert (together.round_trips, in_turn.round_trips) == (1, 2)


def test_copies_to_shared_memory_are_waited_for_once() -> None:
    copies = [f"LDGSTS.E [R1+{hex(0x400 + 4 * i)}], desc[UR4][R2.64+{hex(4 * i)}]" for i in range(4)]
    lines = ("LDC.64 R2, c[0x0][0x210]", "MOV R1, RZ", *copies, "LDGDEPBAR", "DEPBAR.LE SB0, 0x0")
    _, counts = run(*lines, parameters=struct.pack("<Q", 1 << 20))
    assert OTHER < counts.cycles < OTHER + 50
    assert counts.round_trips == 1
    assert counts.requests == {"LDGSTS.32": (4, 4)}
    assert counts.shared_cycles == 4


def test_a_store_waits_for_all_that_it_stores() -> None:
    address = ("LDC.64 R2, c[0x0][0x210]", "LDG.E R7, desc[UR4][R2.64]")
    parameters = struct.pack("<Q", 1 << 20)
    _, wide = run(*address, "STG.E.128 desc[UR4][R2.64+0x100], R4", parameters=parameters)
    _, narrow = run(*address, "STG.E.64 desc[UR4][R2.64+0x100], R4", parameters=parameters)
    assert narrow.cycles < 50 < OTHER < wide.cycles


def test_a_barrier_waits_for_the_slowest_warp() -> None:
    lines = (
        "S2R R0, SR_TID.X",
        "LDC.64 R2, c[0x0][0x210]",
        "ISETP.GE.AND P0, PT, R0, 0x20, PT",
        "@P0 LDG.E R4, desc[UR4][R2.64]",
        "@P0 FADD R4, R4, R4",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "VIADD R1, R0, 0x1",
    )
    parameters = struct.pack("<Q", 1 << 20)
    made, _ = run(*lines, threads=64, blocks=2, parameters=parameters)
    assert made.clock.min() > OTHER
    made, _ = run(*lines[:5], threads=64, blocks=2, parameters=parameters)
    assert made.clock.min() < 50


def test_what_is_not_known_is_an_error() -> None:
    with pytest.raises(UnknownInstruction, match=r"test_kernel: HMMA\.16816"):
        run("HMMA.16816.F32 R4, R4, R6, RZ")
    with pytest.raises(UnknownInstruction, match=r"SHFL\.UP"):
        run("SHFL.UP PT, R5, R7, 0x10, 0x1f")
    with pytest.raises(RuntimeError, match="expected an aligned address in shared memory"):
        run("STS [RZ], R0")
    with pytest.raises(RuntimeError, match="expected an end within 10 instructions"):
        machine("BRA 0x0").run(10)
