"""Memory said as a mode or in bytes: what is read, what is refused, and what a refusal shows of it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from support.gradients import least_bytes

import pyglow_fast as pgf
from pyglow_fast.runs.setting import MEMORY_MODES, memory_text, parse_memory

EXPECTED = 'one of ("reversible", "checkpoint", "store") or bytes such as "4GB"'
DECIMAL = {f"{prefix}B": 10 ** (3 * n) for n, prefix in enumerate(["", "k", "M", "G", "T", "P", "E"])}
BINARY = {f"{prefix}iB": 2 ** (10 * n) for n, prefix in enumerate(["K", "M", "G", "T", "P", "E"], 1)}
MOST = 2**63 - 1


@pytest.mark.parametrize(
    ("said", "found"),
    [
        *((mode, mode) for mode in MEMORY_MODES),
        ("4GB", 4_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("4000000000", 4_000_000_000),
        ("007", 7),
        ("0.001kB", 1),
        ("8.000000000000000001EB", 8 * 10**18 + 1),  # more than a float64 tells apart
        (str(MOST), MOST),
        (4e9, 4_000_000_000),
        (2.0**62, 2**62),
        *((text.format(unit), 3 * size) for unit, size in (DECIMAL | BINARY).items() for text in ("3{}", "3.0 {}")),
        *((f"3{unit.swapcase()}", 3 * size) for unit, size in (DECIMAL | BINARY).items()),
    ],
)
def test_modes_and_bytes(said: str | int | float, found: str | int) -> None:
    parsed = parse_memory(said)
    assert parsed == found
    assert type(parsed) is type(found)


@pytest.mark.parametrize(
    "said",
    [
        *("", "GB", " GB", "4XB", "4G", "4GBs", "GB4", "4  GB", " 4GB", "4GB\n", "4_000", "-4GB", "+4GB", "0GB", "0.0"),
        *("1.5B", "0.5", "1.0001kB", "4.GB", ".5GB", "4,5GB", "nan", "inf", "4e9", "1e999999999GB", "0x10"),
        *(f"{2**63}", "8EiB", "9" * 10**6, "0." + "0" * 10**6 + "1GB", "Store", "reversible 4GB", "auto"),
        *("\u0664GB", "4 \u212ab", "\u00b2kB"),  # a digit of another script, the Kelvin sign, a superscript
        *(True, 0, -1, 0.0, -4e9, 4e9 + 0.5, float("nan"), float("inf"), 2**63, 2.0**63, b"4GB", None, [], object),
    ],
    ids=lambda said: ascii(said)[:24],
)
def test_refusals(said: Any) -> None:
    """By the name of the argument, with what was expected and what was found."""
    with pytest.raises(ValueError, match=f"^memory: expected {re.escape(EXPECTED)}, found ") as found:
        parse_memory(said)
    assert str(found.value).endswith(f"found {said!r}")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (4_000_000_000, "4 GB"),
        (1_500_000_000, "1500 MB"),
        (3 * 2**29, "1536 MiB"),
        (1024, "1 KiB"),
        (1_024_000, "1000 KiB"),  # or 1024 kB
        (4_000_000_001, "4000000001 B"),
        (MOST, f"{MOST} B"),
    ],
)
def test_shown_in_the_unit_of_the_least_number(found: int, text: str) -> None:
    assert memory_text(found) == text


def test_what_is_shown_is_read_back() -> None:
    draw = random.Random(0)
    sizes = list((DECIMAL | BINARY).values())
    round_ones = [count * size for size in sizes for count in (1, 2, 7, 1000, 1024) if count * size <= MOST]
    for found in [*round_ones, *range(1, 3000), *(draw.randrange(1, 2 ** draw.randrange(2, 64)) for _ in range(2000))]:
        assert parse_memory(memory_text(found)) == found, memory_text(found)


@pytest.mark.parametrize(
    ("before", "after"), [("1GB", "reversible"), ("reversible", "1GB"), ("1GB", "store"), ("store", "1GB")]
)
def test_changed_between_forward_and_backward(before: str, after: str) -> None:
    """Whatever takes a mode takes bytes; a forward that waits for its backward keeps its own."""
    x, found = torch.rand(4, 3, 8, 8, dtype=torch.float64) - 0.5, []
    for now, then in ((before, after), ("store", "store")):
        torch.manual_seed(0)
        model = pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden=4, memory=now).double()
        model.initialize(torch.randn(8, 3, 8, 8, dtype=torch.float64).clamp(-0.5, 0.5))
        loss = -model.log_prob(x).mean()
        model.memory = then
        assert parse_memory(model.memory) == parse_memory(then)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("samples", [1, 64])
def test_named_bytes_are_the_least(samples: int) -> None:
    """Also of states so small that to invert the steps takes more than to store all."""
    torch.manual_seed(0)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(8, 8, dims=3) for _ in range(8)])
    x = torch.randn(samples, 8, 4, 2, 2)
    sequence(x)  # initialises
    sequence.memory = 1
    sequence.memory = least = least_bytes(lambda: sequence(x))
    sequence(x)[0].sum().backward()
    assert sequence.memory_report()["predicted_bytes"] <= least
    sequence.memory = least - 1
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        sequence(x)
