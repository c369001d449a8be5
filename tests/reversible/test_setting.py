"""Memory said as a mode or in bytes: what is read, what is refused, and what a refusal shows of it."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.reversible.setting import MEMORY_MODES, memory_text, parse_memory

EXPECTED = 'one of ("reversible", "checkpoint", "store") or bytes such as "4GB"'
DECIMAL = {f"{prefix}B": 10 ** (3 * n) for n, prefix in enumerate(["", "k", "M", "G", "T", "P", "E"])}
BINARY = {f"{prefix}iB": 2 ** (10 * n) for n, prefix in enumerate(["K", "M", "G", "T", "P", "E"], 1)}
MOST = 2**63 - 1


@pytest.mark.parametrize("mode", ["reversible", "checkpoint", "store"])
def test_a_mode_is_itself(mode: str) -> None:
    assert parse_memory(mode) == memory_text(mode) == mode
    assert mode in MEMORY_MODES


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("4GB", 4_000_000_000),
        ("4 GB", 4_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("500MB", 500_000_000),
        ("64 MiB", 67_108_864),
        ("200000kB", 200_000_000),
        ("123B", 123),
        ("4000000000", 4_000_000_000),
        ("007", 7),
        ("2.0", 2),
        ("0.001kB", 1),
        ("0.0625 KiB", 64),
        ("8.000000000000000001EB", 8 * 10**18 + 1),  # more than a float64 tells apart
        (1, 1),
        (MOST, MOST),
        (str(MOST), MOST),
        (4e9, 4_000_000_000),
        (2.0**62, 2**62),
    ],
)
def test_bytes(said: str | int | float, found: int) -> None:
    parsed = parse_memory(said)
    assert parsed == found
    assert type(parsed) is int


@pytest.mark.parametrize("unit", [*DECIMAL, *BINARY])
def test_every_unit_in_letters_of_either_size(unit: str) -> None:
    size = (DECIMAL | BINARY)[unit]
    for text in (f"3{unit}", f"3 {unit.upper()}", f"3{unit.lower()}", f"3.0 {unit.swapcase()}"):
        assert parse_memory(text) == 3 * size


@pytest.mark.parametrize(
    "said",
    [
        *("", "GB", " GB", "4XB", "4G", "4iB", "4GBs", "GB4", "four GB", "4  GB", " 4GB", "4GB ", "4GB\n", "4_000"),
        *("-4GB", "+4GB", "0", "0GB", "0.0", "1.5", "1.5B", "0.5", "1.0001kB", "4.GB", ".5GB", "4,5GB", "nan", "inf"),
        *("4e9", "1e999999999GB", "0x10", f"{2**63}", "9.3 EB", "8EiB", "9" * 10**6, "0." + "0" * 10**6 + "1GB"),
        *("\u0664GB", "4 \u212ab", "\u00b2kB"),  # a digit of another script, the Kelvin sign, a superscript
        *("Store", "reversible ", "auto", "reversible 4GB", "none", "frozen"),
        *(True, False, 0, -1, 0.0, -0.0, -4e9, 0.5, 4e9 + 0.5, float("nan"), float("inf"), -float("inf")),
        *(2**63, 2.0**63, 1e300, b"4GB", bytearray(b"store"), None, [], ("store",), {}, 4 + 0j, object),
    ],
    ids=lambda said: ascii(said)[:24],
)
def test_refusals(said: Any) -> None:
    """By the name of the argument, with what was expected and what was found."""
    with pytest.raises(ValueError, match=f"^memory: expected {re.escape(EXPECTED)}, found ") as found:
        parse_memory(said)
    assert str(found.value).endswith(f"found {said!r}")
    with pytest.raises(ValueError, match=r"^--memory: expected one of"):
        parse_memory(said, "--memory")


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (4_000_000_000, "4 GB"),
        (2**30, "1 GiB"),
        (1_500_000_000, "1500 MB"),
        (3 * 2**29, "1536 MiB"),
        (1000, "1 kB"),
        (1024, "1 KiB"),
        (1_024_000, "1000 KiB"),  # or 1024 kB
        (1023, "1023 B"),
        (4_000_000_001, "4000000001 B"),
        (1, "1 B"),
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


class TestModels:
    """Whatever takes a mode takes bytes."""

    def glow(self, memory: Any) -> pgf.Glow:
        torch.manual_seed(0)
        model = pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden=4, memory=memory).double()
        model.initialize(torch.randn(8, 3, 8, 8, dtype=torch.float64).clamp(-0.5, 0.5))
        return model

    @pytest.mark.parametrize("memory", ["1GB", "1 GB", 10**9, 1e9])
    def test_a_model_is_told_in_bytes(self, memory: Any) -> None:
        model = self.glow(memory)
        assert parse_memory(model.memory) == 10**9
        model.memory = "store"
        assert model.memory == "store"
        model.memory = memory
        assert parse_memory(model.memory) == 10**9

    @pytest.mark.parametrize("memory", ["4XB", -1, 0, float("nan"), True, "", b"store"])
    def test_what_is_refused_changes_nothing(self, memory: Any) -> None:
        model = self.glow("checkpoint")
        with pytest.raises(ValueError, match=f"^memory: expected {re.escape(EXPECTED)}, found "):
            model.memory = memory
        assert {sequence.memory for sequence in model._sequences()} == {"checkpoint"}
        with pytest.raises(ValueError, match=f"^memory: expected {re.escape(EXPECTED)}, found "):
            self.glow(memory)

    @pytest.mark.parametrize(
        ("before", "after"), [("1GB", "reversible"), ("reversible", "1GB"), ("1GB", "store"), ("store", "1GB")]
    )
    def test_changed_between_forward_and_backward(self, before: str, after: str) -> None:
        x = torch.rand(4, 3, 8, 8, dtype=torch.float64) - 0.5
        found = []
        for now, then in ((before, after), ("store", "store")):
            model = self.glow(now)
            loss = -model.log_prob(x).mean()
            model.memory = then
            found.append(torch.autograd.grad(loss, list(model.parameters())))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def _least(sequence: pgf.ReversibleSequence, x: Tensor) -> int:
    sequence.memory = 1
    with pytest.raises(ValueError, match=r"^memory: expected at least \d+ bytes") as caught:
        sequence(x)
    found = re.search(r"\d+", str(caught.value))
    assert found is not None
    return int(found[0])


@pytest.mark.parametrize("samples", [1, 64])
def test_named_bytes_are_the_least(samples: int) -> None:
    """Also of states so small that to invert the steps takes more than to store all."""
    torch.manual_seed(0)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(8, 8, dims=3) for _ in range(8)])
    x = torch.randn(samples, 8, 4, 2, 2)
    sequence(x)  # initialises
    least = _least(sequence, x)
    sequence.memory = least
    sequence(x)[0].sum().backward()
    assert sequence.memory_report()["predicted_bytes"] <= least
    sequence.memory = least - 1
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        sequence(x)
