"""Pieces of HTML: whatever is in a text, it is that text on the page, and adds no element and no attribute."""

from __future__ import annotations

import base64
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
from support import web

web.require("gradio")

from pyglow_fast.studio.commands import Made  # noqa: E402

from pyglow_fast.web.html import TYPES, buttons, figure, framed, image, note, plot, save_link, table  # noqa: E402

PIXELS = torch.arange(48).reshape(3, 4, 4) % 17
HOSTILE = "\"'><img src=x onerror=alert(1)> &amp; &lt;b&gt; </p></textarea><script>alert(1)</script>"
PLAIN = "a cat"


class Parsed(HTMLParser):
    """The elements of a text, as (tag, attributes), and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


PIECES: dict[str, Callable[[str], str]] = {
    "image": lambda text: image(PIXELS, 17, text),
    "title": lambda text: figure(PIXELS, 17, text),
    "caption": lambda text: figure(PIXELS, 17, "edited", text),
    "part": lambda text: figure(PIXELS, 17, "edited", "", text),
    "buttons": lambda text: buttons([PIXELS, PIXELS], 17, [text, "other"]),
    "file": lambda text: save_link(Made(b"x", "pyglow-fast"), text, "Save"),
    "link": lambda text: save_link(Made(b"x", "pyglow-fast"), "x.png", text),
    "note": note,
    "head": lambda text: table([text], [["a"]]),
    "plot": lambda text: plot(b"x", text),
    "frame": lambda text: framed("<p>page</p>", text),
    "page": lambda text: framed(text, "report"),
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_text_is_text(piece: str) -> None:
    """In whichever place: elements and attributes are those that a plain text gives, with this text in its place."""
    plain, hostile = (Parsed(PIECES[piece](text)) for text in (PLAIN, HOSTILE))
    wanted = [
        (tag, {name: value and value.replace(PLAIN, HOSTILE) for name, value in attributes.items()})
        for tag, attributes in plain.elements
    ]
    assert hostile.elements == wanted
    assert hostile.text == plain.text.replace(PLAIN, HOSTILE)
    held = plain.text + "".join(str(attributes) for _, attributes in plain.elements)
    assert PLAIN in held


def test_an_image_keeps_its_shape() -> None:
    """Its pixels are enlarged as much in both directions; one that is larger than its place is smoothed."""
    wide = torch.zeros(1, 10, 25, dtype=torch.int64)
    ((_, small),) = Parsed(image(wide, 2, "wide", 40)).elements
    assert (small["height"], small["width"]) == ("40", "100")
    ((_, large),) = Parsed(image(torch.zeros(1, 300, 150, dtype=torch.int64), 2, "large")).elements
    assert (large["height"], large["width"]) == ("300", "150")
    assert "pgf-smooth" not in str(large["class"])
    ((_, reduced),) = Parsed(image(torch.zeros(1, 300, 150, dtype=torch.int64), 2, "large", 100)).elements
    assert (reduced["height"], reduced["width"]) == ("100", "50")
    assert "pgf-smooth" in str(reduced["class"])


@pytest.mark.parametrize("suffix", TYPES)
def test_a_link_holds_the_file(suffix: str) -> None:
    """Every byte of it, as what it is."""
    data = bytes(range(256))
    ((tag, link),) = Parsed(save_link(Made(data, "pyglow-fast", suffix), f"x{suffix}", "Save")).elements
    head, _, body = str(link["href"]).partition(";base64,")
    assert (tag, link["download"]) == ("a", f"x{suffix}")
    assert head.startswith({".csv": "data:text/csv"}.get(suffix, f"data:image/{suffix[1:]}"))
    assert base64.b64decode(body) == data


def test_no_script_of_a_framed_page_runs() -> None:
    ((_, frame),) = Parsed(framed("<script>alert(1)</script>", "report")).elements
    assert frame["sandbox"] == ""


def test_buttons_are_numbered_in_order() -> None:
    found = [
        attributes for tag, attributes in Parsed(buttons([PIXELS] * 3, 17, list("abc"))).elements if tag == "button"
    ]
    assert [each["data-index"] for each in found] == ["0", "1", "2"]
    assert [each["aria-label"] for each in found] == list("abc")
