"""The page of a run, parsed as a browser would, and the curves on it."""

from __future__ import annotations

import base64
import io
import math
import os
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from support.html_page import Page

from pyglow_fast import info
from pyglow_fast.data import MissingExtraError
from pyglow_fast.train.report import curve_png, environment, report_html

NASTY = """<script>alert("x")</script> & 'y'"""


def png(color: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """A picture of 3 x 2 pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), color).save(buffer, "PNG")
    return buffer.getvalue()


def page(**changes: Any) -> str:
    """With something in every part."""
    parts: dict[str, Any] = {
        "title": "digits",
        "facts": {"data": "digits, 1437 images", "steps": "2000"},
        "curves": [("loss", png())],
        "pictures": [("samples", png((0, 255, 0))), ("data", png((0, 0, 255)))],
        "settings": {"model": {"hidden": 64, "lr": 0.001, "n_classes": None, "image_shape": (1, 8, 8)}},
        "environment": {"torch": "2.13"},
        "scores": [("held out", "2.10 ± 0.02", "bits/dim")],
        "notes": ["no samples"],
    }
    return report_html(**(parts | changes))


def test_everything_is_on_the_page() -> None:
    found = Page(page())
    assert found.words["title"] == found.words["h1"] == ["digits"]
    assert found.words["h2"] == ["Scores", "Curves", "Pictures", "Settings", "Environment"]
    assert found.words["h3"] == ["model"]
    assert found.words["p"] == ["no samples"]
    assert found.words["figcaption"] == ["loss", "samples", "data"]
    expected = ["digits, 1437 images", "2000", "2.10 ± 0.02", "bits/dim", "64", "0.001", "none", "1, 8, 8", "2.13"]
    assert found.words["td"] == expected
    assert found.words["th"] == [
        *("data", "steps", "held out", "hidden", "lr", "n_classes", "image_shape", "torch"),
    ]


def test_pictures_are_inside_and_nothing_comes_from_elsewhere() -> None:
    source = page()
    found = Page(source)
    assert [image["alt"] for image in found.images] == ["loss", "samples", "data"]
    for image, color in zip(found.images, [(255, 0, 0), (0, 255, 0), (0, 0, 255)], strict=True):
        head, data = str(image["src"]).split(",", 1)
        assert head == "data:image/png;base64"
        assert Image.open(io.BytesIO(base64.b64decode(data, validate=True))).getpixel((1, 1)) == color
    assert {"script", "link"}.isdisjoint(found.tags)
    for remote in ("http:", "https:", "url(", "@import"):
        assert remote not in source
    assert "prefers-color-scheme: dark" in source


@pytest.mark.parametrize(
    "changes",
    [
        {"title": NASTY},
        {"facts": {NASTY: NASTY}},
        {"curves": [(NASTY, png())]},
        {"pictures": [(NASTY, png())]},
        {"settings": {NASTY: {NASTY: NASTY, "list": [NASTY]}}},
        {"environment": {NASTY: NASTY}},
        {"scores": [(NASTY, NASTY, NASTY)]},
        {"notes": [NASTY]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_all_text_is_escaped(changes: dict[str, Any]) -> None:
    source = page(**changes)
    found = Page(source)
    assert "script" not in found.tags
    assert "<script>" not in source
    shown = [text for words in found.words.values() for text in words]
    assert NASTY in shown
    if "curves" in changes:
        assert found.images[0]["alt"] == NASTY


def test_names_that_no_page_can_hold() -> None:
    """Of files: with a command to a terminal, and one that is no UTF-8."""
    source = page(title="n\x1b[2J\udcff", notes=["line\nend"])
    assert "<h1>n\\x1b[2J\\udcff</h1>" in source
    assert "<p>line\nend</p>" in source
    assert "\x1b" not in source.encode().decode()


def test_values_that_are_no_numbers() -> None:
    found = Page(page(settings={"a": {"none": None, "nan": math.nan, "inf": -math.inf, "flag": False, "empty": []}}))
    assert found.words["td"][4:-1] == ["none", "nan", "-inf", "False"]


def test_empty_parts_are_left_out() -> None:
    empty = {"facts": {}, "curves": [], "pictures": [], "settings": {}, "environment": {}, "scores": [], "notes": []}
    found = Page(page(**empty))
    assert found.words["h1"] == ["digits"]
    assert {"h2", "table", "figure", "p"}.isdisjoint(found.tags)


def test_bytes_that_are_no_picture_are_refused() -> None:
    with pytest.raises(ValueError, match="png: expected the bytes of a PNG for 'loss', found 4 others"):
        page(curves=[("loss", b"GIF8")])


ROWS = [
    {"step": 1, "lr": 1e-3, "grad_norm": None},
    {"step": 2, "lr": 2e-3, "grad_norm": math.nan},
    {"step": 3, "lr": 0.0, "grad_norm": math.inf},
    {"step": 4, "lr": 3e-3, "grad_norm": 7},
    {"step": 5, "lr": None},
]


def darkness(image: bytes) -> int:
    """Pixels that are not white."""
    return int((torch.tensor(list(Image.open(io.BytesIO(image)).convert("L").tobytes())) < 250).sum())


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.drawn
def test_curves_are_drawn_whatever_the_cells_hold(log: bool) -> None:
    image = curve_png(ROWS, {"lr": "learning rate", "grad_norm": "norm $"}, "both, in $", "rate", log=log)
    assert Image.open(io.BytesIO(image)).format == "PNG"
    assert darkness(image) > darkness(curve_png([], {"lr": "learning rate"}, "both", "rate", log=log))


@pytest.mark.parametrize("rows", [[], [{"step": 1, "lr": None}], [{"step": 1, "lr": math.nan}], [{"step": 1}]])
@pytest.mark.parametrize("log", [False, True])
def test_a_curve_without_points(rows: list[Any], log: bool) -> None:
    assert Page(page(curves=[("lr", curve_png(rows, {"lr": "lr"}, "lr", "lr", log=log))])).images[0]["alt"] == "lr"


def test_a_curve_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="matplotlib is needed for curves"):
        curve_png(ROWS, {"lr": "lr"}, "lr", "lr")


def test_the_environment_is_that_of_info() -> None:
    found, facts = environment(), info.collect()
    for name in ("pyglow_fast", "torch", "python"):
        assert found[name] == facts["versions"][name]
    assert found["cpu"] == facts["devices"]["cpu"]
    assert found["processor"].endswith(f", {os.cpu_count()} cores")
    assert found["ops on cpu"] == facts["backends"]["cpu"]
    assert ("ops on cuda" in found) == torch.cuda.is_available()
    assert all(isinstance(value, str) and value for value in found.values())
