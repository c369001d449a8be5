"""What instructions for moves, integers, predicates and floating-point numbers do."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from bench.sass.listing import Instruction, Operand
from bench.sass.state import WARP, Mask, State, lookup


class Arithmetic(State):
    """A method for each instruction, named after it; modifiers that change nothing for a count are ignored."""

    def nothing(self, i: Instruction) -> None:
        """Execute an instruction that changes no register."""

    def _MOV(self, i: Instruction) -> None:
        self._set(i.operands[0], self._word(i.operands[1]))

    _R2UR = _MOV

    def _CS2R(self, i: Instruction) -> None:
        if i.operands[1].text != "SRZ":
            self._fail(i)
        self._set_long(i.operands[0], np.zeros(self.lanes, np.uint64))

    def _S2R(self, i: Instruction) -> None:
        self._set(i.operands[0], self.special[i.operands[1].text])

    def _LDC(self, i: Instruction) -> None:
        if "64" in i.modifiers:
            self._set_long(i.operands[0], self._constant(i.operands[1], 8))
        else:
            self._set(i.operands[0], self._constant(i.operands[1], 1 if "U8" in i.modifiers else 4))

    def _SEL(self, i: Instruction) -> None:
        d, a, b, p = i.operands
        self._set(d, np.where(self._predicate(p), self._word(a), self._word(b)))

    def _P2R(self, i: Instruction) -> None:
        d, _, old, mask = i.operands
        packed = sum(
            (self.predicates["P"][k].astype(np.uint32) << np.uint32(k) for k in range(7)),
            np.zeros(self.lanes, np.uint32),
        )
        m = self._word(mask)
        self._set(d, (self._word(old) & ~m) | (packed & m))

    def _PRMT(self, i: Instruction) -> None:
        """Four bytes chosen among the eight of two registers."""
        d, a, choice, b = i.operands
        if i.modifiers:
            self._fail(i)
        both = self._word(a).astype(np.uint64) | self._word(b).astype(np.uint64) << np.uint64(32)
        value = np.zeros(self.lanes, np.uint64)
        for k in range(4):
            which = self._word(choice).astype(np.uint64) >> np.uint64(4 * k) & np.uint64(15)
            byte = both >> np.uint64(8) * (which & np.uint64(7)) & np.uint64(255)
            sign = np.where(byte > 127, np.uint64(255), np.uint64(0))  # repeated where the choice has its highest bit
            value |= np.where(which > 7, sign, byte) << np.uint64(8 * k)
        self._set(d, value.astype(np.uint32))

    def _VOTE(self, i: Instruction) -> None:
        """Which threads of a warp a predicate holds in, as bits, and whether in any or in all that take part."""
        *results, p = i.operands
        if i.modifiers not in (("ANY",), ("ALL",)):
            self._fail(i)
        taking = self.mask.reshape(-1, WARP)
        votes = taking & self._predicate(p).reshape(-1, WARP)
        bits = (votes.astype(np.uint32) << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        agreed = bits > 0 if i.modifiers == ("ANY",) else (votes == taking).all(axis=1)
        for result in results:
            self._set(result, np.repeat(agreed if result.space in self.predicates else bits, WARP))

    def _SHFL(self, i: Instruction) -> None:
        p, d, a, lane, _ = i.operands
        own, given = np.arange(self.lanes), self._word(lane).astype(np.int64) & 31
        if i.modifiers == ("BFLY",):
            source = own ^ given
        elif i.modifiers == ("IDX",):
            source = own // WARP * WARP + given
        else:
            self._fail(i)
        self._set(d, self._word(a)[source])
        self._set(p, np.ones(self.lanes, bool))

    def _split(self, i: Instruction, plain: int) -> tuple[list[Operand], list[Operand]]:
        """Results (predicates after the first) and sources; ``plain``: sources that are no predicates."""
        results = [i.operands[0]]
        rest = list(i.operands[1:])
        while rest and rest[0].space in self.predicates:
            results.append(rest.pop(0))
        if len(rest) < plain:
            self._fail(i)
        return results, rest

    def _carried(self, operand: Operand) -> NDArray[np.uint64]:
        """A summand of 33 bits: a negative one is the complement and one more."""
        value = self._plain(operand)
        if operand.negative:
            return (~value).astype(np.uint64) + np.uint64(1)
        return (~value if operand.inverted else value).astype(np.uint64)

    def _IADD3(self, i: Instruction) -> None:
        results, rest = self._split(i, 3)
        total = self._carried(rest[0]) + self._carried(rest[1]) + self._carried(rest[2])
        for p in rest[3:]:
            total = total + self._predicate(p).astype(np.uint64)
        self._set(results[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        for carry, p in enumerate(results[1:], 1):
            self._set(p, (total >> np.uint64(32)) >= carry)

    def _VIADD(self, i: Instruction) -> None:
        d, a, b = i.operands
        self._set(d, self._word(a) + self._word(b))

    def _IABS(self, i: Instruction) -> None:
        self._set(i.operands[0], np.abs(self._signed(i.operands[1])).astype(np.uint32))

    def _extreme(self, i: Instruction, a: NDArray[np.int64], b: Operand, p: Operand) -> NDArray[np.int64]:
        other = self._word(b).astype(np.int64) if "U32" in i.modifiers else self._signed(b)
        return np.where(self._predicate(p), np.minimum(a, other), np.maximum(a, other))

    def _VIMNMX(self, i: Instruction) -> None:
        d, a, b, p = i.operands
        first = self._word(a).astype(np.int64) if "U32" in i.modifiers else self._signed(a)
        self._set(d, self._extreme(i, first, b, p).astype(np.uint32))

    def _VIADDMNMX(self, i: Instruction) -> None:
        d, a, b, c, p = i.operands
        total = self._word(a) + self._word(b)
        first = total.astype(np.int64) if "U32" in i.modifiers else total.view(np.int32).astype(np.int64)
        self._set(d, self._extreme(i, first, c, p).astype(np.uint32))

    def _IMAD(self, i: Instruction) -> None:
        results, rest = self._split(i, 3)
        a, b, c, *carry = rest
        unsigned = "U32" in i.modifiers
        if "WIDE" in i.modifiers or "HI" in i.modifiers:
            if unsigned:
                product = self._word(a).astype(np.uint64) * self._word(b).astype(np.uint64)
            else:
                product = (self._signed(a) * self._signed(b)).view(np.uint64)
            total = product + self._long(c)
            for p in results[1:]:
                self._set(p, total < product)
            if "WIDE" in i.modifiers:
                self._set_long(results[0], total)
            else:
                self._set(results[0], (total >> np.uint64(32)).astype(np.uint32))
            return
        if "X" in i.modifiers or len(results) > 1:
            # A product by one or zero, and a carry in or out.
            total = self._word(a).astype(np.uint64) * self._word(b).astype(np.uint64) + self._carried(c)
            for p in carry:
                total = total + self._predicate(p).astype(np.uint64)
            self._set(results[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
            for p in results[1:]:
                self._set(p, (total >> np.uint64(32)) > 0)
            return
        self._set(results[0], self._word(a) * self._word(b) + self._word(c))

    def _LEA(self, i: Instruction) -> None:
        results, rest = self._split(i, 3)
        shift_at = 3 if "HI" in i.modifiers and "SX32" not in i.modifiers else 2
        shift = np.uint64(int(rest[shift_at].text, 0))
        a, b = rest[0], rest[1]
        if "HI" in i.modifiers:
            low = self._word(a).astype(np.uint64)
            if "SX32" in i.modifiers:
                pair = self._signed(a).view(np.uint64)
            else:
                pair = low | self._word(rest[2]).astype(np.uint64) << np.uint64(32)
            shifted = pair >> (np.uint64(32) - shift) & np.uint64(0xFFFFFFFF)
            if "SX32" in i.modifiers:
                shifted = (self._signed(a) >> np.int64(32 - int(shift))).view(np.uint64) & np.uint64(0xFFFFFFFF)
        else:
            shifted = self._carried(a) << shift & np.uint64(0xFFFFFFFF)
        total = shifted + self._carried(b)
        for p in rest[shift_at + 1 :]:
            total = total + self._predicate(p).astype(np.uint64)
        self._set(results[0], (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        for p in results[1:]:
            self._set(p, (total >> np.uint64(32)) > 0)

    def _SHF(self, i: Instruction) -> None:
        d, low, shift, high = i.operands
        count = self._word(shift).astype(np.uint64)
        long = "U64" in i.modifiers or "S64" in i.modifiers
        count = np.minimum(count, np.uint64(63 if long else 32))
        pair = self._word(low).astype(np.uint64) | self._word(high).astype(np.uint64) << np.uint64(32)
        if "L" in i.modifiers:
            value = pair << count
            value = value >> np.uint64(32) if "HI" in i.modifiers else value
        elif "S64" in i.modifiers or ("S32" in i.modifiers and "HI" not in i.modifiers):
            value = (pair.view(np.int64) >> count.astype(np.int64)).view(np.uint64)
        elif "HI" in i.modifiers:
            part = self._signed(high) if "S32" in i.modifiers else self._word(high).astype(np.int64)
            value = (part >> np.minimum(count, np.uint64(63)).astype(np.int64)).view(np.uint64)
        else:
            value = pair >> count
        self._set(d, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))

    def _LOP3(self, i: Instruction) -> None:
        operands = list(i.operands)
        p = operands.pop(0) if operands[0].space in self.predicates else None
        d, a, b, c, table = operands[:5]
        value = lookup(int(table.text, 0), self._word(a), self._word(b), self._word(c))
        self._set(d, value)
        if p is not None:
            self._set(p, value != 0)

    def _PLOP3(self, i: Instruction) -> None:
        p, q, a, b, c, *tables = i.operands
        ones = [self._predicate(x).astype(np.uint32) for x in (a, b, c)]
        for result, table in zip((p, q), tables, strict=True):
            self._set(result, (lookup(int(table.text, 0), *ones) & np.uint32(1)).astype(bool))

    def _ISETP(self, i: Instruction) -> None:
        p, q, a, b, combined, *low = i.operands
        unsigned = "U32" in i.modifiers
        x, y = (self._word(v).astype(np.int64) if unsigned else self._signed(v) for v in (a, b))
        compare = i.modifiers[0]
        if low:
            strict = {"GE": "GT", "LE": "LT", "GT": "GT", "LT": "LT"}.get(compare, compare)
            equal = (x == y) & self._predicate(low[0])
            result = {"NE": (x != y) | self._predicate(low[0]), "EQ": equal}.get(compare)
            result = _compare(strict, x, y) | equal if result is None else result
        else:
            result = _compare(compare, x, y)
        self._combine(i, p, q, result, combined)

    def _combine(self, i: Instruction, p: Operand, q: Operand, result: Mask, combined: Operand) -> None:
        other = self._predicate(combined)
        join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[
            next(m for m in i.modifiers if m in ("AND", "OR", "XOR"))
        ]
        both = join(result, other)
        self._set(q, join(~result, other))
        self._set(p, both)

    def _FFMA(self, i: Instruction) -> None:
        d, a, b, c = i.operands
        value = self._float(a) * self._float(b) + self._float(c)
        self._set_float(d, np.clip(value, 0, 1) if "SAT" in i.modifiers else value)

    def _FADD(self, i: Instruction) -> None:
        d, a, b = i.operands
        self._set_float(d, self._float(a) + self._float(b))

    def _FMUL(self, i: Instruction) -> None:
        d, a, b = i.operands
        self._set_float(d, self._float(a) * self._float(b))

    def _HFMA2(self, i: Instruction) -> None:
        d, _, zero, high, low = i.operands
        if zero.text != "RZ":
            self._fail(i)
        halves = [int(np.array(float(h.text), np.float16).view(np.uint16)) for h in (high, low)]
        self._set(d, np.full(self.lanes, halves[0] << 16 | halves[1], np.uint32))

    def _FSEL(self, i: Instruction) -> None:
        d, a, b, p = i.operands
        self._set_float(d, np.where(self._predicate(p), self._float(a), self._float(b)))

    def _FMNMX(self, i: Instruction) -> None:
        d, a, b, p = i.operands
        x, y = self._float(a), self._float(b)
        self._set_float(d, np.where(self._predicate(p), np.fmin(x, y), np.fmax(x, y)))

    def _FRND(self, i: Instruction) -> None:
        d, a = i.operands
        if i.modifiers not in ((), ("FLOOR",), ("CEIL",), ("TRUNC",)):
            self._fail(i)
        rounded = {"FLOOR": np.floor, "CEIL": np.ceil, "TRUNC": np.trunc}.get("".join(i.modifiers), np.rint)
        self._set_float(d, rounded(self._float(a)))

    def _FSETP(self, i: Instruction) -> None:
        p, q, a, b, combined = i.operands
        self._combine(i, p, q, _compare_floats(i.modifiers[0], self._float(a), self._float(b)), combined)

    def _DSETP(self, i: Instruction) -> None:
        p, q, a, b, combined = i.operands
        self._combine(i, p, q, _compare_floats(i.modifiers[0], self._double(a), self._double(b)), combined)

    def _FCHK(self, i: Instruction) -> None:
        self._set(i.operands[0], np.zeros(self.lanes, bool))  # no division needs the long way

    def _MUFU(self, i: Instruction) -> None:
        d, a = i.operands
        function = i.modifiers[0]
        if function in ("RCP64H", "RSQ64H"):
            value = (self._word(a).astype(np.uint64) << np.uint64(32)).view(np.float64)
            value = 1 / value if function == "RCP64H" else 1 / np.sqrt(value)
            self._set(d, (value.view(np.uint64) >> np.uint64(32)).astype(np.uint32))
            return
        x = self._float(a)
        one = np.float32(1)
        if function == "EX2":
            self._set_float(d, np.exp2(x))
        elif function == "LG2":
            self._set_float(d, np.log2(x))
        elif function == "RCP":
            self._set_float(d, np.divide(one, x))
        elif function in ("SQRT", "RSQ"):
            self._set_float(d, np.sqrt(x) if function == "SQRT" else np.divide(one, np.sqrt(x)))
        else:
            self._fail(i)

    def _I2F(self, i: Instruction) -> None:
        d, a = i.operands
        if "U64" in i.modifiers:
            exact = self._long(a).astype(np.float64)
        else:
            exact = self._word(a).astype(np.float64) if "U32" in i.modifiers else self._signed(a).astype(np.float64)
        value = exact.astype(np.float32)
        if "RP" in i.modifiers:
            value = np.where(value < exact, np.nextafter(value, np.float32(np.inf)), value)
        self._set_float(d, value)

    def _I2FP(self, i: Instruction) -> None:
        self._I2F(dataclasses.replace(i, modifiers=i.modifiers[1:]))

    def _F2I(self, i: Instruction) -> None:
        d, a = i.operands
        value = np.trunc(np.nan_to_num(self._float(a).astype(np.float64)))
        if "U64" in i.modifiers:
            self._set_long(d, np.clip(value, 0, 2.0**64 - 2048).astype(np.uint64))
        else:
            low, high = (0, 2**32 - 1) if "U32" in i.modifiers else (-(2**31), 2**31 - 1)
            self._set(d, np.clip(value, low, high).astype(np.int64).astype(np.uint32))

    def _F2F(self, i: Instruction) -> None:
        d, a = i.operands
        if i.modifiers == ("F64", "F32"):
            self._set_double(d, self._float(a).astype(np.float64))
        elif i.modifiers == ("F32", "F64"):
            self._set_float(d, self._double(a).astype(np.float32))
        else:
            self._fail(i)

    def _DADD(self, i: Instruction) -> None:
        d, a, b = i.operands
        self._set_double(d, self._double(a) + self._double(b))

    def _DMUL(self, i: Instruction) -> None:
        d, a, b = i.operands
        self._set_double(d, self._double(a) * self._double(b))

    def _DFMA(self, i: Instruction) -> None:
        d, a, b, c = i.operands
        self._set_double(d, self._double(a) * self._double(b) + self._double(c))


def _compare(name: str, x: NDArray[np.int64], y: NDArray[np.int64]) -> Mask:
    return {"EQ": x == y, "NE": x != y, "LT": x < y, "LE": x <= y, "GT": x > y, "GE": x >= y}[name]


def _compare_floats(name: str, x: NDArray[np.floating], y: NDArray[np.floating]) -> Mask:
    """A name that ends with U holds also where one is NaN."""
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("NAN", "NUM"):
        return unordered if name == "NAN" else ~unordered
    plain = {"EQ": x == y, "NE": (x != y) & ~unordered, "LT": x < y, "LE": x <= y, "GT": x > y, "GE": x >= y}
    return plain[name[:2]] | unordered if name.endswith("U") else plain[name]
