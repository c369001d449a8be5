"""Read and show a memory mode or a budget in bytes: "reversible", "4GB", 4_000_000_000."""

from __future__ import annotations

import re
from fractions import Fraction

from pyglow_fast._core.errors import expect

MEMORY_MODES = ("reversible", "checkpoint", "store")
_QUOTED = ", ".join(f'"{mode}"' for mode in MEMORY_MODES)
MEMORY_EXPECTED = f'one of ({_QUOTED}) or bytes such as "4GB"'

_PREFIXES = "kMGTPE"
_UNITS = (  # decimal ones first: of two that say a number as shortly, the first is shown
    {"B": 1}
    | {f"{prefix}B": 1000**n for n, prefix in enumerate(_PREFIXES, 1)}
    | {f"{prefix.upper()}iB": 1024**n for n, prefix in enumerate(_PREFIXES, 1)}
)
_SIZES = {unit.lower(): size for unit, size in _UNITS.items()}
# Few digits, so that no text is slow to convert; ASCII, or the Kelvin sign were a k, and digits those of any script.
_TEXT = re.compile(rf"([0-9]{{1,20}}(?:\.[0-9]{{1,20}})?)(?: ?({'|'.join(_SIZES)}))?", re.ASCII | re.IGNORECASE)
_LIMIT = 2**63  # more than any machine addresses


def parse_memory(memory: str | int | float) -> str | int:
    """Read a memory mode, or a budget: bytes = number 1000^n (kB, MB, GB, ...) or number 1024^n (KiB, MiB, ...).

    Args:
        memory: one of MEMORY_MODES; or a whole number of bytes from 1 to 2^63 - 1, as an int, a float or a text, with
            a unit or without: "4GB", "1.5 GiB", "4000000000", in large or small letters.

    Returns:
        The mode, or the bytes as an int.

    Raises:
        ValueError: anything else.
    """
    if isinstance(memory, str) and memory in MEMORY_MODES:
        return memory
    number = Fraction(0)
    if isinstance(memory, str):
        if match := _TEXT.fullmatch(memory):
            number = Fraction(match[1]) * _SIZES[(match[2] or "B").lower()]
    elif isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory < _LIMIT:
        number = Fraction(memory)
    expect(0 < number < _LIMIT and number.denominator == 1, "memory", MEMORY_EXPECTED, repr(memory))
    return int(number)


def memory_text(memory: str | int) -> str:
    """Write what parse_memory gives as a text, which it reads back: the mode, or bytes in the best unit.

    The unit is the one that makes the number least without rounding it: 4_000_000_000 is "4 GB", 2**20 "1 MiB",
    1_500_000_000 "1500 MB", 1_234_567 "1234567 B".
    """
    if isinstance(memory, str):
        return memory
    count, unit = min(
        ((memory // size, unit) for unit, size in _UNITS.items() if memory % size == 0), key=lambda pair: pair[0]
    )
    return f"{count} {unit}"
