"""What moves a slider besides the mouse on its handle."""

from __future__ import annotations

import pytest
from support import web

web.require("gradio", "playwright", "chromium")

from support.web_page import Visitor, set_slider, wait_for  # noqa: E402


@pytest.mark.parametrize(
    ("tab", "elem_id", "command", "word", "rest"),
    [
        ("Sample", "temperature", "sample-command", "--temperature", "0.7"),
        ("Sample", "sample-n", "sample-command", "--n", "24"),
        ("Edit", "keep-0", "edit-command", "--keep", None),
        ("Interpolate", "path-at", "path-command", "--at", "0.5"),
        ("Interpolate", "path-steps", "path-command", "--frames", "9"),
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
