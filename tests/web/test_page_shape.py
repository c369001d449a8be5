"""How the page looks and is used: by the keyboard alone, on a narrow screen, in the dark, by a screen reader."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import PLACES, Visitor, decoded, set_slider, slider  # noqa: E402
from support.web_runs import CLASSES, COLOUR, DIGITS, encoded, photo  # noqa: E402

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
# What a finger can touch and is below 24 pixels high or wide (WCAG 2.2, 2.5.8); a label is taken for its field.
SMALL = """() => [...document.querySelectorAll("button, input, textarea, a")]
    .filter(element => element.checkVisibility({visibilityProperty: true, opacityProperty: true}))
    .filter(element => element.tabIndex >= 0 && !element.closest(".visually-hidden") && element.type !== "file")
    .map(element => [element.closest("label, .wrap-inner") ?? element, element.outerHTML.slice(0, 160)])
    .map(([target, words]) => [target.getBoundingClientRect(), words])
    .filter(([box]) => box.width < 24 || box.height < 24).map(([box, words]) => [box.width, box.height, words])"""
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
    wait_for(
        page.locator("#about p").inner_text, "step 10; images of 16 x 16 pixels, 256 levels of red, green and blue"
    )


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


@pytest.mark.parametrize("run", [DIGITS, CLASSES])
def test_a_narrow_screen(run: str, visitors: Callable[..., Visitor]) -> None:
    """Nothing is beside a screen of 400 pixels, however long a class's name is, and all tabs can be reached."""
    visitor = visitors(viewport={"width": 400, "height": 800}, has_touch=True)
    page = visitor.page
    page.locator("#tabs").wait_for()
    if run != DIGITS:
        visitor.choose_run(run)
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
        small = page.locator("body").evaluate(SMALL)
        assert small == [], (name, small)
    frame = page.frame_locator("#run-page iframe")
    assert (
        frame.locator("th").first.evaluate("cell => cell.getBoundingClientRect().width") >= 90
    )  # not letter by letter


def test_the_image_stays_in_sight_of_the_sliders(visitors: Callable[..., Visitor]) -> None:
    """On a narrow screen: at the top while the last slider is used, and the sliders come before the command."""
    visitor = visitors(viewport={"width": 400, "height": 800})
    visitor.tab("Edit")
    last = slider(visitor.page, "keep-0")
    last.scroll_into_view_if_needed()
    visitor.page.mouse.wheel(0, 300)
    place = "element => element.getBoundingClientRect().y"
    edited = visitor.page.locator("#edited")
    wait_for(lambda: abs(edited.evaluate(place)) < 1, True)
    assert visitor.page.evaluate("scrollY") > edited.evaluate("element => element.offsetHeight")
    assert last.evaluate(place) < visitor.page.locator("#edit-command").evaluate(place)
    x, y = 200, 40
    assert visitor.page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('#edited') !== null", [x, y])


def coloured(visitor: Visitor, elem_id: str) -> list[bool]:
    """Whether the track of a slider has a colour at eight places of its way, but for the handle's."""
    handle = slider(visitor.page, elem_id)
    picture = decoded(handle.screenshot(animations="disabled")).float()
    middle, wide = picture[:, picture.shape[1] // 2], picture.shape[2]
    shares = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]
    return [bool(middle[:, int(share * wide)].std() > 20) for share in shares]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sliders_of_attributes_are_filled_from_zero(scheme: str, visitors: Callable[..., Visitor]) -> None:
    visitor = visitors(color_scheme=scheme)
    visitor.tab("Edit")
    assert coloured(visitor, "add-0") == [False] * 8
    set_slider(visitor.page, "add-0", 1.5)  # at 3/4 of the way
    wait_for(lambda: coloured(visitor, "add-0"), [False] * 4 + [True] * 2 + [False] * 2)
    set_slider(visitor.page, "add-0", -1.5)
    wait_for(lambda: coloured(visitor, "add-0"), [False] * 2 + [True] * 2 + [False] * 4)
    assert coloured(visitor, "keep-0") == [True] * 8  # from the left


def test_the_command_is_copied_by_keys(visitors: Callable[..., Visitor]) -> None:
    visitor = visitors()
    visitor.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visitor.page.locator("#sample-command").get_by_role("button", name="Copy").focus()
    visitor.page.keyboard.press("Enter")
    wait_for(lambda: visitor.page.evaluate("navigator.clipboard.readText()"), visitor.command("sample-command"))


def test_a_command_that_came_while_it_was_hidden_is_seen_whole(visitor: Visitor) -> None:
    visitor.tab("Edit")
    visitor.tab("Sample")
    visitor.choose_run(CLASSES)
    visitor.tab("Edit")
    box = visitor.page.locator("#edit-command textarea")
    wait_for(lambda: box.evaluate("box => box.scrollHeight <= box.offsetHeight"), True)


def test_what_changes_by_itself_is_read_out(visitor: Visitor) -> None:
    visitor.tab("Edit")
    visitor.tab("Score")
    for name in ("about", "edited", "scores"):
        assert visitor.page.locator(f"#{name} [aria-live=polite]").count() == 1, name


def test_nothing_moves_for_those_who_want_that(visitors: Callable[..., Visitor]) -> None:
    moving = """() => [...document.querySelectorAll("*")].map(element => getComputedStyle(element))
        .filter(style => style.animationName !== "none" || parseFloat(style.transitionDuration) > 0).length"""
    assert visitors().page.evaluate(moving) > 0
    assert visitors(reduced_motion="reduce").page.evaluate(moving) == 0


def test_bits_per_dim_are_explained_where_they_stand(visitor: Visitor) -> None:
    for name in ("Edit", "Score"):
        visitor.tab(name)
        said = visitor.page.get_by_text("bits/dim: how many bits")
        assert said.filter(visible=True).count() == 1, name


def test_one_left_edge(visitors: Callable[..., Visitor]) -> None:
    """On every tab the pictures begin where the boxes do, at whatever width."""
    for width in (1280, 1920):
        visitor = visitors(viewport={"width": width, "height": 900})
        found = {}
        for name in PLACES:
            visitor.tab(name)
            parts = visitor.page.locator(
                "#run, [id$=-thumbs] button img, #edited img, #path-frame img, #scores p, iframe"
            )
            found[name] = parts.evaluate_all(
                """found => Math.min(...found.filter(part => part.checkVisibility() && part.id !== "run")
                    .map(part => part.getBoundingClientRect().x))"""
            )
            found[name, "run"] = parts.first.evaluate("part => part.getBoundingClientRect().x")
        del found["Sample"]  # its pictures are beside the controls
        assert max(found.values()) - min(found.values()) <= 1, found
