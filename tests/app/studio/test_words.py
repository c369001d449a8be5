"""The short texts of numbers and images: what is written is read back, what is malformed is refused."""

from __future__ import annotations

import argparse
import os
import shlex

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyglow_fast.app.studio import Draw, File, HeldOut, Sample, parse_image
from pyglow_fast.app.studio.words import Image, number_text

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LINES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).filter(lambda text: max(text) < "\ufffe")
DRAWS = st.builds(
    Draw,
    st.integers(1, 1 << 16),
    st.floats(0, allow_infinity=False, allow_nan=False),
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 999), max_size=4).map(tuple),
)


def parser() -> argparse.ArgumentParser:
    """Options as the commands have them."""
    found = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    found.add_argument("image", nargs="?")
    found.add_argument("--add", nargs=3)
    return found


@settings(deadline=None)
@given(FINITE)
@example(-0.0)
@example(1e22)
@example(1e-7)
def test_numbers(value: float) -> None:
    """Exactly, as a word that argparse takes for a number."""
    text = number_text(value)
    assert float(text) == value
    assert parser().parse_args(["--add", "a", "b", text]).add[2] == text
    assert text.lstrip("-").replace(".", "", 1).isdecimal()
    assert text != "-0"


@settings(deadline=None)
@given(
    st.one_of(
        st.builds(HeldOut, st.integers(0, 10**12)),
        DRAWS.flatmap(lambda draw: st.builds(Sample, st.integers(0, draw.n - 1), st.just(draw))),
    )
)
def test_numbers_and_samples_round_trip(image: Image) -> None:
    assert parse_image(image.text) == image


@settings(deadline=None)
@given(LINES)
@example("12")
@example("٣")
@example("sample:1")
@example("-x")
def test_files_round_trip(path: str) -> None:
    """The same file, through a shell and argparse, whatever its name."""
    text = File(path).text
    (word,) = shlex.split(shlex.join([text]))
    found = parse_image(parser().parse_args([word]).image)
    assert isinstance(found, File)
    assert os.path.normpath(found.path) == os.path.normpath(path)
    assert found.text == text


MALFORMED = [
    "",
    "9" * 5000,
    *(f"sample:{rest}" for rest in ("", "x", "1.5", "-1", "64", "4:n=4", "9" * 5000)),
    *(f"sample:0:{rest}" for rest in ("", "n", "n=", "n=two", "n=8:n=8", "size=8", "label=cat", "label=")),
    *(f"sample:0:seed={value}" for value in ("-1", "1.5", 2**63)),
    "sample:0:n=0",
    *(f"sample:0:temperature={value}" for value in ("nan", "inf", "-1", "warm")),
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:30])
def test_malformed(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(which|n|seed): expected ") as caught:
        parse_image(text, "which")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("path", ["a\nb", "\x1b[2J", "tab\t", "\x7f", "\x9b2J", "\udcff", "nul\0", "\ufffe"])
def test_names_that_no_line_can_hold(path: str) -> None:
    with pytest.raises(ValueError, match=r"^file: expected a name without control characters, found '[ -~]*'$"):
        parse_image(path)
