"""Registers, predicates and constants of all threads, and how an operand reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from bench.sass.listing import Instruction, Operand

WARP = 32
PARAMETERS_AT = 0x210  # in constant bank 0
Words = NDArray[np.uint32]
Mask = NDArray[np.bool_]


class UnknownInstruction(RuntimeError):
    """Raised by an instruction, or a form of it, that this machine does not execute."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: symbol, numbers of blocks and threads, dynamic shared memory, and the arguments as bytes."""

    symbol: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_bytes: int
    parameters: bytes

    @property
    def blocks(self) -> int:
        """How many blocks the grid has."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def threads(self) -> int:
        """How many threads a block has."""
        return self.block[0] * self.block[1] * self.block[2]


class State:
    """The threads of some blocks of one launch, as lanes of arrays.

    Args:
        launch: grid, block and arguments.
        constants: of bank 2, as the cubin has them.
        blocks: their indices in the grid.
    """

    def __init__(self, launch: Launch, constants: bytes, blocks: Sequence[int]) -> None:
        self.launch = launch
        per_block = -(-launch.threads // WARP) * WARP
        self.n_blocks, self.lanes = len(blocks), per_block * len(blocks)
        self.warps = self.lanes // WARP
        thread = np.arange(self.lanes) % per_block
        index = np.repeat(np.asarray(blocks), per_block)
        bx, by, _ = launch.block
        gx, gy, _ = launch.grid
        self.special = {
            "SR_TID.X": thread % bx,
            "SR_TID.Y": thread // bx % by,
            "SR_TID.Z": thread // (bx * by),
            "SR_CTAID.X": index % gx,
            "SR_CTAID.Y": index // gx % gy,
            "SR_CTAID.Z": index // (gx * gy),
            "SR_CgaCtaId": np.zeros_like(thread),  # of a cluster of one block
            "SR_LANEID": thread % WARP,
        }
        dimensions = np.array([*launch.block, *launch.grid], np.uint32).tobytes()
        self.banks = {0: dimensions.ljust(PARAMETERS_AT, b"\0") + launch.parameters, 2: constants}
        self.registers = {"R": np.zeros((256, self.lanes), np.uint32), "UR": np.zeros((64, self.lanes), np.uint32)}
        self.predicates = {"P": np.zeros((8, self.lanes), bool), "UP": np.zeros((8, self.lanes), bool)}
        for file in self.predicates.values():
            file[7] = True
        self.alive: Mask = thread < launch.threads
        self.mask = self.alive  # of the instruction that is executed
        self.latency = 0  # of its results,
        self.targets: list[tuple[str, int]] = []  # which are these

    def _fail(self, instruction: Instruction) -> NoReturn:
        raise UnknownInstruction(f"{self.launch.symbol}: {instruction.text}")

    def _predicate(self, operand: Operand) -> Mask:
        value = self.predicates[operand.space][operand.index]
        return ~value if operand.inverted else value

    def _constant(self, operand: Operand, size: int = 4) -> NDArray[np.uint64]:
        bank = np.frombuffer(self.banks[operand.bank] + bytes(16), np.uint8)
        offset = sum((self._word(part).astype(np.int64) for part in operand.more), np.zeros(self.lanes, np.int64))
        if int(offset[self.mask].max()) + size > len(bank):
            raise RuntimeError(
                f"{self.launch.symbol}: expected a constant in bank {operand.bank}, found {operand.text}"
            )
        offset = np.minimum(offset, len(bank) - size)
        value = np.zeros(self.lanes, np.uint64)
        for i in range(size):
            value |= bank[offset + i].astype(np.uint64) << np.uint64(8 * i)
        return value

    def _plain(self, operand: Operand) -> Words:
        if operand.space in self.registers:
            return self.registers[operand.space][operand.index]
        if operand.space == "c":
            return self._constant(operand).astype(np.uint32)
        if operand.text.startswith("SR"):
            return np.zeros(self.lanes, np.uint32)
        return np.full(self.lanes, int(operand.text or "0", 0) & 0xFFFFFFFF, np.uint32)

    def _word(self, operand: Operand) -> Words:
        """32 bits, an integer's signs applied."""
        value = self._plain(operand)
        if operand.absolute:
            value = np.abs(value.view(np.int32)).view(np.uint32)
        if operand.inverted:
            value = ~value
        return (~value + np.uint32(1)) if operand.negative else value

    def _signed(self, operand: Operand) -> NDArray[np.int64]:
        return self._word(operand).view(np.int32).astype(np.int64)

    def _long(self, operand: Operand) -> NDArray[np.uint64]:
        """64 bits, of two registers."""
        if operand.space == "c":
            return self._constant(operand, 8)
        if operand.space == "number":
            return np.full(self.lanes, int(operand.text, 0) & 0xFFFFFFFFFFFFFFFF, np.uint64)
        file = self.registers[operand.space]
        zero = operand.index == len(file) - 1
        high = np.zeros(self.lanes, np.uint32) if zero else file[operand.index + 1]
        return file[operand.index].astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def _float(self, operand: Operand) -> NDArray[np.float32]:
        if operand.space == "number" and not operand.text.startswith(("0x", "-0x")):
            number = {"INF": np.inf, "+INF": np.inf, "-INF": -np.inf, "QNAN": np.nan, "-QNAN": np.nan}
            value = np.full(self.lanes, number.get(operand.text) or float(operand.text.strip("+")), np.float32)
        else:
            value = self._plain(operand).view(np.float32)
        if operand.absolute:
            value = np.abs(value)
        return -value if operand.negative else value

    def _double(self, operand: Operand) -> NDArray[np.float64]:
        if operand.space == "number":
            value = np.full(self.lanes, {"+INF": np.inf, "-INF": -np.inf}.get(operand.text) or float(operand.text))
        else:
            value = self._long(operand).view(np.float64)
        if operand.absolute:
            value = np.abs(value)
        return -value if operand.negative else value

    def _set(self, operand: Operand, value: NDArray[np.generic]) -> None:
        if operand.space in self.predicates:
            if operand.index != 7:
                np.copyto(self.predicates[operand.space][operand.index], value, where=self.mask)
        elif operand.index != len(self.registers[operand.space]) - 1:
            np.copyto(
                self.registers[operand.space][operand.index], value.astype(np.uint32, copy=False), where=self.mask
            )
        self.targets.append((operand.space, operand.index))

    def _set_float(self, operand: Operand, value: NDArray[np.float32]) -> None:
        self._set(operand, np.ascontiguousarray(value, np.float32).view(np.uint32))

    def _set_long(self, operand: Operand, value: NDArray[np.uint64]) -> None:
        if operand.text in ("RZ", "URZ"):
            return
        self._set(operand, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        self._set(dataclasses.replace(operand, index=operand.index + 1), (value >> np.uint64(32)).astype(np.uint32))

    def _set_double(self, operand: Operand, value: NDArray[np.float64]) -> None:
        self._set_long(operand, np.ascontiguousarray(value, np.float64).view(np.uint64))


def lookup(table: int, a: Words, b: Words, c: Words) -> Words:
    """Bit by bit the function of three bits whose values are those of the table."""
    value = np.zeros_like(a)
    for k in range(8):
        if table >> k & 1:
            value |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return value
