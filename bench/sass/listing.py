"""The instructions of sm_90 as ``cuobjdump -sass`` prints them."""

from __future__ import annotations

import dataclasses
import re

# The units that execute an instruction, by what its name begins with; what is not listed is for "alu". Moves and loads
# of constants are counted as issued alone.
UNITS = {
    "fma": ("FFMA", "FADD", "FMUL", "HFMA2"),
    "imad": ("IMAD", "UIMAD"),
    "fp64": ("DFMA", "DADD", "DMUL", "DSETP"),
    "special": ("MUFU", "F2F", "F2I", "I2F"),
    "shared": ("LDS", "STS", "SHFL"),
    "global": ("LDGSTS", "LDG", "STG"),
    "control": (
        *("BRA", "BREAK", "BRX", "BSSY", "BSYNC", "CALL", "RET", "EXIT", "NOP", "BAR", "WARPSYNC", "ENDCOLLECTIVE"),
        *("LDGDEPBAR", "DEPBAR", "S2R", "S2UR", "CS2R", "LDC", "ULDC", "MOV", "UMOV", "R2UR", "P2R"),
    ),
}
# Cycles from issue to a result that another instruction can use.
LATENCY = {"fma": 4, "imad": 5, "alu": 5, "fp64": 8, "special": 22, "shared": 30, "global": 0, "control": 6}


@dataclasses.dataclass(frozen=True)
class Operand:
    """A register, a constant in memory, a predicate or a number, with the signs before it."""

    space: str  # R, UR, P, UP, c, number, memory
    index: int = 0
    negative: bool = False
    inverted: bool = False
    absolute: bool = False
    bank: int = 0
    text: str = ""
    more: tuple[Operand, ...] = ()


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    address: int
    name: str
    modifiers: tuple[str, ...]
    guard: Operand | None
    operands: tuple[Operand, ...]
    text: str

    @property
    def uniform(self) -> bool:
        """Whether it is for the registers that a warp has once."""
        return self.name.startswith("U") and self.name != "UNKNOWN"

    @property
    def unit(self) -> str:
        """Names the unit that executes it."""
        return next((unit for unit, names in UNITS.items() if self.name.startswith(names)), "alu")


_SPECIAL = {"RZ": ("R", 255), "URZ": ("UR", 63), "PT": ("P", 7), "UPT": ("UP", 7), "SRZ": ("number", 0)}


def _operand(text: str) -> Operand:
    text = text.strip()
    negative = inverted = absolute = False
    while text[:1] in "-!~|" and text[:1]:
        if text[0] == "-":
            if re.fullmatch(r"-(0x[0-9a-f]+|[\d.]+(e[+-]?\d+)?|INF|QNAN)", text):
                break
            negative = True
        elif text[0] == "|":
            absolute, text = True, text.replace("|", "")
            continue
        else:
            inverted = True
        text = text[1:]
    text = text.replace(".reuse", "").replace("|", "").strip()

    def operand(space: str, index: int = 0, bank: int = 0, more: tuple[Operand, ...] = ()) -> Operand:
        return Operand(space, index, negative, inverted, absolute, bank, text, more)

    if text in _SPECIAL:
        space, index = _SPECIAL[text]
        return operand(space, index)
    if found := re.fullmatch(r"(UR|R|UP|P)(\d+)(\.64)?", text):
        return operand(found[1], int(found[2]))
    if found := re.fullmatch(r"c\[(0x[0-9a-f]+)\]\[(.*)\]", text):
        return operand("c", bank=int(found[1], 16), more=_sum(found[2]))
    if found := re.fullmatch(r"(?:desc\[UR\d+\])?\[(.*)\]", text):
        return operand("memory", more=_sum(found[1]))
    return operand("number")


def _sum(text: str) -> tuple[Operand, ...]:
    return tuple(
        _operand(part.lstrip("+ ")) for part in re.findall(r"[+-]?[^+-]+", text.replace("+-", "-")) if part.strip("+ ")
    )


def decode(listing: str) -> list[Instruction]:
    """The instructions of one kernel in what ``cuobjdump -sass`` prints."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);", listing)
    instructions = []
    for address, guard, opcode, rest in found:
        name, *modifiers = opcode.split(".")
        rest = re.sub(r"\(\*.*?\*\)", "", rest).strip()
        parts = [part for piece in rest.split(",") for part in _pieces(piece)]
        instructions.append(
            Instruction(
                int(address, 16),
                name,
                tuple(modifiers),
                _operand(guard) if guard else None,
                tuple(_operand(part.lstrip("+")) for part in parts),
                f"{opcode} {rest}",
            )
        )
    return instructions


def _pieces(text: str) -> list[str]:
    """BRX and RET have two operands without a comma between them."""
    text = text.strip()
    return text.split() if re.fullmatch(r"R\d+ -?0x[0-9a-f]+", text) else [text] if text else []


def access_bytes(instruction: Instruction) -> int:
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "16": 2, "U8": 1, "S8": 1, "8": 1}
    return next((sizes[modifier] for modifier in instruction.modifiers if modifier in sizes), 4)


def sources(instruction: Instruction) -> list[tuple[str, int]]:
    """The registers that an instruction reads (and some that it writes, which in order is the same)."""
    pairs = instruction.name in ("DADD", "DMUL", "DFMA", "DSETP", "F2F") or "WIDE" in instruction.modifiers
    stored = instruction.operands[-1] if instruction.name in ("STG", "STS") else None
    found = []
    for operand in (*instruction.operands, *([instruction.guard] if instruction.guard else [])):
        for part in (operand, *operand.more):
            if part.space not in ("R", "UR", "P", "UP") or part.text in _SPECIAL:
                continue
            count = 2 if part.space == "R" and (pairs or part.text.endswith(".64")) else 1
            if part is stored:
                count = max(1, access_bytes(instruction) // 4)
            found += [(part.space, part.index + k) for k in range(count)]
    return found
