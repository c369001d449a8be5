"""A machine that executes compiled kernels of sm_90, as cuobjdump prints them, on a few blocks of a grid.

It exists to count, not to compute: what a block issues, which sectors of memory and which banks of shared memory its
accesses touch, and how long the longest of its chains of dependent instructions takes. Addresses, integers, predicates
and branches are exact, so that loops run as often as they do on a device. Memory is not read: floating-point numbers
that kernels load are all 0.5, and an integer tensor that steers them has to be given.

All warps of all blocks run side by side, the lanes at the lowest address first: lanes that part meet again where the
paths do. An instruction that is not known here is an error, never a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from bench.sass.arithmetic import Arithmetic
from bench.sass.listing import LATENCY, Instruction, Operand, access_bytes, sources
from bench.sass.state import WARP, Launch, Mask, UnknownInstruction

LONG_WAIT = 100  # cycles: longer than any instruction takes that does not load from global memory
SHARED_START = 1024  # of the shared memory of sm_90; the system has what is before


@dataclasses.dataclass
class Counts:
    """What an average block of a launch does.

    Attributes:
        issued: instructions, of all warps.
        units: of them by the unit that executes them.
        shared_cycles: cycles of the shared memory, bank conflicts among them.
        requests: of global memory, by "LDG.128" and the like, with the sectors of 32 bytes that they touch.
        sectors: the same sectors, by range of memory ("other" if in none that was named) and "load" or "store".
        cycles: from the first to the last instruction, as if the block were alone;
        longest: the same of the slowest block.
        round_trips: how often the warp that does so most waits for global memory or L2.
    """

    issued: float
    units: dict[str, float]
    shared_cycles: float
    requests: dict[str, tuple[float, float]]
    sectors: dict[tuple[str, str], float]
    cycles: float
    longest: float
    round_trips: float


class Machine(Arithmetic):
    """Some blocks of one launch.

    Args:
        code: the kernel's instructions.
        constants: of bank 2, as the cubin has them.
        launch: grid, block and arguments.
        blocks: their indices in the grid.
        integers: tensors whose values matter, int64 by the address of the first.
        ranges: begin and end of tensors, and the cycles from a load to its value, by name.
        other_latency: of loads from elsewhere, such as scratch memory.
    """

    def __init__(
        self,
        code: Sequence[Instruction],
        constants: bytes,
        launch: Launch,
        blocks: Sequence[int],
        integers: Mapping[int, NDArray[np.int64]],
        ranges: Mapping[str, tuple[int, int, int]],
        other_latency: int,
    ) -> None:
        super().__init__(launch, constants, blocks)
        self.integers, self.ranges, self.other_latency = integers, dict(ranges), other_latency
        self.code = {instruction.address: instruction for instruction in code}
        self.pc = np.zeros(self.lanes, np.int64)
        self.waiting = np.zeros(self.lanes, bool)  # at a barrier
        self.clock, self.round_trips = (np.zeros(self.warps, np.int64) for _ in range(2))
        self.copied = np.zeros(self.warps, np.int64)  # when copies from global to shared memory are there
        self.ready: dict[tuple[str, int], NDArray[np.int64]] = {}
        self.issued = self.shared_cycles = 0
        self.units: dict[str, int] = {}
        self.requests: dict[str, list[int]] = {}
        self.sectors: dict[tuple[str, str], int] = {}

    def run(self, most: int = 2_000_000) -> Counts:
        """Execute until all threads have ended; returns what an average block did."""
        with np.errstate(all="ignore"):
            for _ in range(most):
                ready = self.alive & ~self.waiting
                if not ready.any():
                    if not self.alive.any():
                        return self._counts()
                    self._open_barrier()
                    continue
                at = int(self.pc[ready].min())
                self._step(self.code[at], ready & (self.pc == at))
        raise RuntimeError(f"{self.launch.symbol}: expected an end within {most} instructions")

    def _counts(self) -> Counts:
        n = self.n_blocks
        cycles = self.clock.reshape(n, -1).max(axis=1)
        return Counts(
            self.issued / n,
            {unit: count / n for unit, count in sorted(self.units.items())},
            self.shared_cycles / n,
            {name: (count / n, sectors / n) for name, (count, sectors) in sorted(self.requests.items())},
            {key: count / n for key, count in sorted(self.sectors.items())},
            float(cycles.mean()),
            float(cycles.max()),
            float(self.round_trips.reshape(n, -1).max(axis=1).mean()),
        )

    def _open_barrier(self) -> None:
        """Open the barrier of every block all of whose threads that have not ended wait."""
        clock = self.clock.reshape(self.n_blocks, -1)
        clock[:] = clock.max(axis=1, keepdims=True)
        self.waiting[:] = False

    def _warps(self, mask: Mask) -> Mask:
        return np.asarray(mask.reshape(self.warps, WARP).any(axis=1))

    def _step(self, instruction: Instruction, mask: Mask) -> None:
        warps = self._warps(mask)
        count = int(warps.sum())
        unit = instruction.unit
        self.issued += count
        self.units[unit] = self.units.get(unit, 0) + count
        self.pc[mask] += 16
        if instruction.guard is not None:
            mask = mask & self._predicate(instruction.guard)
        self.mask = mask
        self.latency = LATENCY[unit]
        self.targets = []
        handler: Callable[[Instruction], None] | None = getattr(self, f"_{_base(instruction)}", None)
        if handler is None:
            raise UnknownInstruction(f"{self.launch.symbol}: {instruction.text}")
        if mask.any():
            handler(instruction)
        self._time(instruction, warps)

    def _time(self, instruction: Instruction, warps: Mask) -> None:
        """Count cycles in order: an instruction waits for what it reads; results come after its unit's latency."""
        start = self.clock + 1
        for key in sources(instruction):
            if key in self.ready:
                start = np.maximum(start, self.ready[key])
        self.round_trips += warps & (start - self.clock > LONG_WAIT)
        self.clock = np.where(warps, start, self.clock)
        if self.targets:
            done = np.where(self._warps(self.mask), start + self.latency, 0)
            for key in self.targets:
                self.ready[key] = np.maximum(self.ready.get(key, done), done)

    _BREAK = _BSSY = _BSYNC = _NOP = _WARPSYNC = _ENDCOLLECTIVE = Arithmetic.nothing

    def _BRA(self, i: Instruction) -> None:
        if "DIV" in i.modifiers:  # taken where the lanes of a warp are not together, which they are
            return
        *conditions, target = i.operands
        taken = self.mask
        for condition in conditions:
            taken = taken & self._predicate(condition)
        self.pc[taken] = int(target.text, 0)

    def _BRX(self, i: Instruction) -> None:
        base, offset = i.operands
        target = self._long(base).astype(np.int64) + int(offset.text, 0) + i.address + 16
        self.pc[self.mask] = target[self.mask]

    def _CALL(self, i: Instruction) -> None:
        self.pc[self.mask] = int(i.operands[0].text, 0)

    def _RET(self, i: Instruction) -> None:
        self.pc[self.mask] = self._word(i.operands[0]).astype(np.int64)[self.mask]

    def _EXIT(self, i: Instruction) -> None:
        self.alive = self.alive & ~self.mask

    def _BAR(self, i: Instruction) -> None:
        self.waiting |= self.mask

    def _address(self, operand: Operand, long: bool) -> NDArray[np.int64]:
        total = np.zeros(self.lanes, np.int64)
        for part in operand.more:
            if long and part.space in self.registers and (part.text.endswith(".64") or part.space == "UR"):
                total = total + self._long(part).view(np.int64)
            elif part.space == "number":
                total = total + int(part.text.replace("+", ""), 0)
            else:
                total = total + self._word(part).astype(np.int64)
        return total

    def _LDG(self, i: Instruction) -> None:
        address, size = self._address(i.operands[1], True), access_bytes(i)
        self.latency = self._touch(i, address, size)
        words = [np.full(self.lanes, 0x3F000000, np.uint32) for _ in range(max(1, size // 4))]
        for begin, values in self.integers.items():
            inside = self.mask & (address >= begin) & (address < begin + 8 * len(values))
            if inside.any():
                raw = values.view(np.uint32)
                for k, word in enumerate(words):
                    word[inside] = raw[(address[inside] - begin) // 4 + k]
        for k, word in enumerate(words):
            self._set(dataclasses.replace(i.operands[0], index=min(255, i.operands[0].index + k)), word)

    def _STG(self, i: Instruction) -> None:
        self._touch(i, self._address(i.operands[0], True), access_bytes(i))

    def _LDGSTS(self, i: Instruction) -> None:
        """Global to shared memory, not waited for but by DEPBAR."""
        latency = self._touch(i, self._address(i.operands[1], True), access_bytes(i))
        self._banks(i, i.operands[0], access_bytes(i))
        warps = self._warps(self.mask)
        self.copied = np.where(warps, np.maximum(self.copied, self.clock + latency), self.copied)

    _LDGDEPBAR = Arithmetic.nothing

    def _DEPBAR(self, i: Instruction) -> None:
        """Waits for all of them, also where some could be left under way."""
        warps = self._warps(self.mask) & (self.copied > self.clock)
        self.round_trips += warps & (self.copied - self.clock > LONG_WAIT)
        self.clock = np.where(warps, self.copied, self.clock)

    def _touch(self, i: Instruction, address: NDArray[np.int64], size: int) -> int:
        """Counts the sectors; returns the longest latency of them."""
        where = np.flatnonzero(self.mask)
        if np.any(address[where] % size):
            raise RuntimeError(f"{self.launch.symbol}: expected addresses that {size} divides, found {i.text}")
        sectors, first = np.unique((where // WARP << 48) + (address[where] >> 5), return_index=True)
        entry = self.requests.setdefault(f"{i.name}.{8 * size}", [0, 0])
        entry[0] += len(np.unique(where // WARP))
        entry[1] += len(sectors)
        at = address[where][first]
        direction = "store" if i.name == "STG" else "load"
        left, longest = np.ones(len(at), bool), 0
        for name, (begin, end, latency) in (*self.ranges.items(), ("other", (-(2**63), 2**63 - 1, self.other_latency))):
            inside = left & (at >= begin) & (at < end)
            left &= ~inside
            if inside.any():
                self.sectors[name, direction] = self.sectors.get((name, direction), 0) + int(inside.sum())
                longest = max(longest, latency)
        return longest

    def _LDS(self, i: Instruction) -> None:
        size = access_bytes(i)
        self._banks(i, i.operands[1], size)
        for k in range(max(1, size // 4)):
            target = dataclasses.replace(i.operands[0], index=min(255, i.operands[0].index + k))
            self._set(target, np.full(self.lanes, 0x3F000000, np.uint32))

    def _STS(self, i: Instruction) -> None:
        self._banks(i, i.operands[0], access_bytes(i))

    def _banks(self, i: Instruction, operand: Operand, size: int) -> None:
        """Adds the cycles: 32 lanes of 4 bytes, 16 of 8 or 8 of 16 at a time, each bank giving one word a cycle."""
        address = self._address(operand, False)
        where = np.flatnonzero(self.mask)
        if np.any(address[where] < SHARED_START) or np.any(address[where] % size):
            raise RuntimeError(f"{self.launch.symbol}: expected an aligned address in shared memory, found {i.text}")
        together = where // (WARP * 4 // max(size, 4))
        words = [address[where] // 4 + k for k in range(max(1, size // 4))]
        keys = np.unique(np.concatenate([together << 24 | word for word in words]))
        per_bank = np.bincount((keys >> 24 << 5 | keys & 31).astype(np.int64))
        rows = np.zeros(-(-len(per_bank) // 32) * 32, np.int64)
        rows[: len(per_bank)] = per_bank
        self.shared_cycles += int(rows.reshape(-1, 32).max(axis=1).sum())


def _base(instruction: Instruction) -> str:
    known = {"S2UR": "S2R", "VOTEU": "VOTE"}
    return instruction.name[1:] if instruction.uniform else known.get(instruction.name, instruction.name)
