"""The short texts of numbers, classes and images: what is written is read back, what is malformed is refused."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyglow_fast.studio.samples import Draw

from pyglow_fast.studio.words import (
    File,
    HeldOut,
    Image,
    Sample,
    name_word,
    number_text,
    one_line,
    parse_image,
    shown_name,
    word_name,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
LINES = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1).filter(one_line)
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
    found.add_argument("--keep", type=float, nargs="+")
    return found


@given(FINITE)
def test_numbers(value: float) -> None:
    """Exactly, as a word that argparse takes for a number."""
    text = number_text(value)
    assert float(text) == value
    assert "e" not in text
    args = parser().parse_args(["--add", "a", "b", text, "--keep", text])
    assert args.add[2] == text
    assert args.keep == [value]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (10.0, "10"), (-0.25, "-0.25"), (1e22, "1" + "0" * 22), (1e-7, "0.0000001")],
)
def test_a_number_by_hand(value: float, text: str) -> None:
    assert number_text(value) == text


@given(LINES, LINES)
@example("-odd", "--keep")
@example("\\-odd", "\\")
@example("-1", "-")
def test_names_of_classes(plus: str, minus: str) -> None:
    """Through a shell and argparse."""
    line = shlex.join(["--add", name_word(plus), name_word(minus), "-1.5"])
    found = parser().parse_args(shlex.split(line)).add
    assert [word_name(word) for word in found[:2]] == [plus, minus]


@given(
    st.one_of(
        st.builds(HeldOut, st.integers(0, 10**12)),
        DRAWS.flatmap(lambda draw: st.builds(Sample, st.integers(0, draw.n - 1), st.just(draw))),
    )
)
def test_numbers_and_samples_round_trip(image: Image) -> None:
    assert parse_image(image.text) == image


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


@pytest.mark.full
@given(st.text())
def test_any_text_is_read_or_refused_by_name(text: str) -> None:
    image = None
    with contextlib.suppress(ValueError):
        image = parse_image(text, "which")
    if image is not None:
        assert parse_image(image.text).text == image.text
        return
    with pytest.raises(ValueError, match=r"^(which|file): expected "):
        parse_image(text, "which")


MALFORMED = [
    "",
    "sample:",
    "sample:x",
    "sample:1.5",
    "sample:-1",
    "sample:64",
    "sample:4:n=4",
    "sample:0:n=0",
    "sample:0:n=-2",
    "sample:0:n",
    "sample:0:",
    "sample:0:n=",
    "sample:0:n=two",
    "sample:0:n=8:n=8",
    "sample:0:size=8",
    "sample:0:seed=-1",
    "sample:0:seed=1.5",
    f"sample:0:seed={2**63}",
    "sample:0:temperature=nan",
    "sample:0:temperature=inf",
    "sample:0:temperature=-1",
    "sample:0:temperature=warm",
    "sample:0:label=cat",
    "sample:0:label=",
    "sample:" + "9" * 5000,
    "9" * 5000,
]


@pytest.mark.parametrize("text", MALFORMED, ids=lambda text: text[:30])
def test_malformed(text: str) -> None:
    with pytest.raises(ValueError, match=r"^which: expected ") as caught:
        parse_image(text, "which")
    assert "\n" not in str(caught.value)
    assert not any(word in str(caught.value) for word in ("literal", "convert", "digit limit"))  # Python's words


@pytest.mark.parametrize("path", ["a\nb", "\x1b[2J", "tab\t", "\x7f", "\x9b2J", "\udcff", "nul\0", "\ufffe"])
def test_names_that_no_line_can_hold(path: str) -> None:
    with pytest.raises(ValueError, match=r"^file: expected a name without control characters, found '[ -~]*'$"):
        parse_image(path)


def test_text_of_samples_by_hand() -> None:
    draw = Draw(8, 0.7, 3)
    assert Sample(2, draw).text == "sample:2:n=8:seed=3:temperature=0.7"
    assert Sample(2, replace(draw, labels=(3, 5))).text == "sample:2:n=8:seed=3:temperature=0.7:label=3:label=5"
    assert parse_image("sample:2") == Sample(2, Draw())
    assert parse_image("12") == HeldOut(12)
    assert parse_image("./12") == File("./12")
    assert [File(name).text for name in ("12", "sample:1", "-n", "a b")] == ["./12", "./sample:1", "./-n", "a b"]


@pytest.mark.parametrize(
    ("image", "shown"),
    [
        (HeldOut(12), "held-out image 12"),
        (Sample(2, Draw(8)), "sample 2"),
        (File("photos/me.png"), "me.png"),
        (File(r"C:\photos\me.png"), "me.png"),
        (File("12"), "12"),
        (File("-n"), "-n"),
    ],
)
def test_names_for_people(image: Image, shown: str) -> None:
    assert shown_name(image) == shown
