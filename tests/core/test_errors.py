"""Messages: whatever a name holds, what is shown of it is one line that does nothing to a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyglow_fast._core.errors import check_seed, expect, visible
from pyglow_fast.data import UnreadableImageError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07\x9b2J\x7f\0", r"\x1b]0;title\x07\x9b2J\x7f\x00"),
        ("gpj.\u202eevil\u2028", r"gpj.\u202eevil\u2028"),
        # All that turn the direction.
        *((chr(code), rf"\u{code:x}") for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))),
        ("caf\udcff", r"caf\udcff"),
        ("grün ✓ \u200d👩\u200d👧 \\n", "grün ✓ \u200d👩\u200d👧 \\n"),
    ],
)
def test_what_acts_is_written_out_and_the_rest_stays(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown
    with pytest.raises(ValueError, match=r"^x: ") as caught:
        expect(False, "x", f"not {text}", text)
    assert str(caught.value) == f"x: expected not {shown}, found {shown}"
    assert str(UnreadableImageError(text)) == shown


@given(st.text(st.characters()))
def test_any_text_is_one_line_that_can_be_encoded(text: str) -> None:
    shown = visible(text)
    assert shown.encode() is not None
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in shown)
    assert visible(text, lines=True).replace("\n", r"\n") == shown


def test_a_seed_is_told_which_bound_it_breaks() -> None:
    check_seed(2**63 - 1)
    with pytest.raises(ValueError, match=r"^seed: expected at most 9223372036854775807, found 9223372036854775808$"):
        check_seed(2**63)
    with pytest.raises(ValueError, match=r"^seed: expected a whole number, 0 or more, found -1$"):
        check_seed(-1)
