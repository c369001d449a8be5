"""What moves a slider besides the mouse on its handle."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Visitor, data_of, set_slider  # noqa: E402


@pytest.mark.parametrize(
    ("tab", "elem_id", "command", "word", "rest"),
    [
        ("Sample", "temperature", "sample-command", "--temperature", "0.7"),
        ("Sample", "sample-n", "sample-command", "--n", "24"),
        ("Edit", "keep-0", "edit-command", "--keep", None),
        ("Interpolate", "path-at", "path-command", "--at", "0.5"),
        ("Interpolate", "path-count", "path-command", "--frames", "9"),
    ],
)
def test_a_slider_is_reset(tab: str, elem_id: str, command: str, word: str, rest: str | None, visitor: Visitor) -> None:
    """By the button beside it, and the picture follows."""
    visitor.tab(tab)
    low = visitor.page.locator(f"#{elem_id} input[type=range]").get_attribute("min")
    assert low is not None

    def said() -> str | None:
        words = visitor.command(command).split()
        return words[words.index(word) + 1] if word in words else None

    set_slider(visitor.page, elem_id, float(low))
    wait_for(said, low)
    visitor.page.locator(f"#{elem_id}").get_by_role("button", name="Reset to default value").click()
    wait_for(said, rest)


def test_a_number_beyond_an_end_is_the_end(visitor: Visitor) -> None:
    """At once, as the field says when it is left; where it is emptied the lower end."""
    page = visitor.page
    visitor.tab("Edit")
    for elem_id, text, value, word in (
        ("add-0", "99999", "3", "--add 0 rest 3 "),
        ("add-0", "-4", "-3", "--add 0 rest -3 "),
        ("keep-0", "", "0", "--keep 0 "),
        ("keep-0", "0.25", "0.25", "--keep 0.25 "),
    ):
        field = page.locator(f"#{elem_id} input[type=number]")
        field.fill(text)
        field.press("Tab")
        wait_for(field.input_value, value)
        wait_for(lambda word=word: word in visitor.command("edit-command"), True)  # type: ignore[misc]
        assert page.get_by_test_id("toast-text").count() == 0


def test_a_picture_on_the_page_holds_its_command(visitor: Visitor) -> None:
    """So that the browser's own menu saves it too."""
    page = visitor.page
    visitor.tab("Edit")
    page.get_by_role("checkbox", name="beside it").check()
    set_slider(page, "add-0", 1)
    wait_for(lambda: visitor.command("edit-command").count("--add 0 rest 1 "), 2)
    visitor.tab("Interpolate")
    shown = ("#edited [data-part=edited]", "#edited [data-part=shifted]", "#path-frame [data-part=frame]")
    commands = [*visitor.command("edit-command").splitlines(), visitor.command("path-command").splitlines()[0]]
    for place, command in zip(shown, commands, strict=True):
        data = data_of(page.locator(f"{place} img").get_attribute("src") or "")
        held = Image.open(io.BytesIO(data)).text["Command"]  # type: ignore[attr-defined]
        assert command.rpartition(" --out ")[0] == held
