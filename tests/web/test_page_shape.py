"""How the page looks and is used: by the keyboard alone, on a narrow screen, in the dark, by a screen reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import PLACES, Visitor, slider  # noqa: E402
from support.web_runs import COLOUR, encoded, photo  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Page

ENOUGH = 4.5  # contrast of small text, by WCAG 2.2, 1.4.3
SIGN = 3.0  # of a sign that is no text, 1.4.11
# The name of what has the focus, and whether its looks differ from those without.
FOCUSED = """() => {
    const looks = element => {
        const style = getComputedStyle(element);
        return [style.outlineStyle + style.outlineWidth, style.boxShadow, style.borderColor].join();
    };
    const element = document.activeElement;
    const around = [element, element.parentElement, element.parentElement.parentElement];
    const before = around.map(looks);
    element.blur();
    const after = around.map(looks);
    element.focus({focusVisible: true});
    return {
        name: element.getAttribute("aria-label") || element.innerText || element.id || element.className,
        tag: element.tagName, seen: before.join() !== after.join()};
}"""
# Contrast of each text that is seen with what is behind it: the ratio of luminances, with translucent colours mixed.
CONTRASTS = """() => {
    const parse = text => {
        const numbers = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number);
        const scaled = text.startsWith("color(srgb") ? numbers.map((n, i) => i < 3 ? 255 * n : n) : numbers;
        return scaled.length < 4 ? [...scaled, 1] : scaled;
    };
    const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
        if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        if (["SCRIPT", "STYLE"].includes(element.tagName) || element.closest(".sr-only, .visually-hidden")) continue;
        const chain = [];
        for (let each = element; each; each = each.parentElement) chain.unshift(each);
        const dark = matchMedia("(prefers-color-scheme: dark)").matches;
        let behind = dark ? [0, 0, 0, 1] : [255, 255, 255, 1], opacity = 1;
        for (const each of chain) {
            const style = getComputedStyle(each);
            opacity *= Number(style.opacity);
            behind = over(parse(style.backgroundColor), behind);
        }
        const colour = parse(getComputedStyle(element).color);
        const front = over([colour[0], colour[1], colour[2], colour[3] * opacity], behind);
        const [a, b] = [light(front), light(behind)].sort((x, y) => y - x);
        found.push([text.slice(0, 40), (a + 0.05) / (b + 0.05), getComputedStyle(element).color, behind.join()]);
    }
    return found;
}"""
UNNAMED = """() => [...document.querySelectorAll("button, input, select, textarea, [role=button], iframe, img")]
    .filter(element => element.checkVisibility({visibilityProperty: true}) && element.type !== "file")
    .filter(element => !(element.getAttribute("aria-label") || element.innerText?.trim() || element.title ||
        element.labels?.[0]?.innerText.trim() || element.alt || element.getAttribute("aria-labelledby") ||
        element.closest("label")?.innerText.trim()))
    .map(element => element.outerHTML.slice(0, 200))"""


def fill(visitor: Visitor) -> None:
    """Brings notes, captions, tables and a command to all tabs."""
    visitor.choose_run(COLOUR)
    for name in PLACES:
        visitor.tab(name)
    visitor.tab("Score")
    visitor.give("score-files", ("a.png", encoded(photo(20, 20), "PNG")))
    visitor.page.locator("#scores td", has_text="a.png").wait_for()
    visitor.tab("Edit")
    visitor.page.get_by_role("checkbox", name="beside it").check()
    visitor.page.locator("#edited [data-part=shifted]").wait_for()
    for name in ("Which attributes", "An image of yours"):
        visitor.page.locator("#edit button", has_text=name).or_(
            visitor.page.get_by_role("button", name=f"{name} ")
        ).first.click()


def tab_to(page: Page, name: str) -> str:
    """Presses Tab until what has this name, or whose name begins with it, has the focus, which must be seen."""
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUSED)
        if found["name"].startswith(name):
            assert found["seen"], found
            return str(found["tag"])
    raise AssertionError(f"no {name}")


def test_the_keyboard_is_enough(visitor: Visitor) -> None:
    """Tabs, thumbs, sliders, buttons; and a picture follows the arrow keys."""
    page = visitor.page
    page.add_style_tag(content="* { transition: none !important; }")  # looks are compared at once
    tab_to(page, "Sample")
    page.keyboard.press("ArrowRight")
    if page.get_by_role("tab", name="Edit").get_attribute("aria-selected") != "true":
        tab_to(page, "Edit")
        page.keyboard.press("Enter")
    visitor.filled("Edit")
    first = visitor.edited("original")
    assert tab_to(page, "held-out image 3:") == "BUTTON"
    page.keyboard.press("Enter")
    wait_for(lambda: torch.equal(visitor.edited("original"), first), False)
    visitor.idle()
    third = visitor.edited("original")
    assert tab_to(page, "range slider for 0 minus rest") == "INPUT"
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    wait_for(lambda: slider(page, "add-0").input_value(), "0.4")
    wait_for(lambda: "--add 0 rest 0.4" in visitor.command("edit-command"), True)
    page.locator("#edit-thumbs button").first.focus()
    tab_to(page, "Back to the original")
    page.keyboard.press("Enter")
    wait_for(lambda: slider(page, "add-0").input_value(), "0")
    wait_for(visitor.edited, third)


def test_a_run_is_chosen_by_keys(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#run input").focus()
    page.keyboard.press("ArrowDown")
    wait_for(page.get_by_role("option").count, 4)
    page.keyboard.press("Enter")
    wait_for(page.locator("#about").inner_text, "step 10, images 3x16x16, 256 grey levels")


def test_all_controls_have_names(visitor: Visitor) -> None:
    fill(visitor)
    for name in PLACES:
        visitor.tab(name)
        assert visitor.page.evaluate(UNNAMED) == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_told_from_its_ground(scheme: str, visitors: Callable[..., Visitor]) -> None:
    visitor = visitors(color_scheme=scheme)
    fill(visitor)
    dark = visitor.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
    for name in PLACES:
        visitor.tab(name)
        visitor.idle()
        found = visitor.page.locator("body").evaluate(CONTRASTS)
        assert len(found) > 5
        low = [each for each in found if each[1] < (ENOUGH if len(each[0]) > 1 else SIGN)]
        assert low == [], (name, low)


def test_a_narrow_screen(visitors: Callable[..., Visitor]) -> None:
    """Nothing is beside a screen of 400 pixels, and all tabs can be reached."""
    visitor = visitors(viewport={"width": 400, "height": 800}, has_touch=True)
    page = visitor.page
    page.locator("#tabs").wait_for()
    for name in PLACES:
        tab = page.get_by_role("tab", name=name, exact=True)
        if not tab.is_visible():
            page.locator("#tabs .overflow-menu > button").click()
            page.locator("#tabs .overflow-dropdown").get_by_role("button", name=name, exact=True).click()
            visitor.filled(name)
        else:
            visitor.tab(name)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 400, name
        beside = page.locator("button, input, img, textarea, iframe").evaluate_all(
            """found => found.filter(element => element.checkVisibility())
                .filter(element => !element.closest(".pgf-strip, .visually-hidden, .hidden"))
                .filter(element => element.tabIndex >= 0)
                .map(element => [element.getBoundingClientRect().right, element.outerHTML.slice(0, 120)])
                .filter(([right]) => right > 401)"""
        )
        assert beside == [], name
