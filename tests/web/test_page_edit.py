"""The tab of edits in a browser: each picture is, to the bit, what the library gives for the same latents."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, choose, drag, rgb_of, set_slider, slider, written  # noqa: E402
from support.web_runs import COLOUR, DIGITS, NAMES, encoded, photo  # noqa: E402

from pyglow_fast.data import load_data, split  # noqa: E402
from pyglow_fast.latents import edited, to_space  # noqa: E402
from pyglow_fast.likelihood import dequantize  # noqa: E402
from pyglow_fast.train import RunFolder, load_model, resolve_device, to_pixels  # noqa: E402
from pyglow_fast.train.figures import image_picture  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.full  # what a user sees of the page is in tests/contract/test_page.py

Sums = dict[tuple[str, str], float]  # (plus, minus): strength


class Own:
    """A run as a user of the library sees it; its means of latents are plain ones, in float64."""

    def __init__(self, site: Site, name: str) -> None:
        checkpoint = RunFolder(site.path(name)).load()
        self.model = load_model(checkpoint, name, resolve_device("cpu")).freeze()
        self.n_bins = checkpoint.data.n_bins
        self.names = checkpoint.data.class_names
        self.conditional = self.model.config.n_classes is not None
        self.data = load_data(checkpoint.config.data)
        self.train, self.held_out = split(self.data, checkpoint.config.data.held_out, checkpoint.config.seed)

    def x(self, pixels: Tensor) -> Tensor:
        half = torch.full(pixels.shape, 0.5)
        return dequantize(pixels.long(), self.n_bins, noise=half)

    @functools.cache  # noqa: B019 - as long as the tests
    def values(self, space: str) -> tuple[list[Tensor], Tensor]:
        """Latents and pixels of all training images, float64, and their classes."""
        pixels, labels = self.data.batch(self.train)
        assert labels is not None
        x = self.x(pixels)
        with torch.no_grad():
            latents = to_space(self.model, x, space, labels if self.conditional else None)
        return [part.double() for part in (*latents, x)], labels

    def shift(self, adds: Sums, space: str) -> list[Tensor]:
        """sum_j s_j (mean_plus_j - mean_minus_j) of the latents, and last of the pixels."""
        values, labels = self.values(space)
        total = [torch.zeros(part.shape[1:]) for part in values]
        for (plus, minus), strength in adds.items():
            with_it = labels == self.names.index(plus)
            without = ~with_it if minus == "rest" else labels == self.names.index(minus)
            for i, part in enumerate(values):
                total[i] = total[i] + strength * (part[with_it].mean(0).float() - part[without].mean(0).float())
        return total

    def edit(
        self, pixels: Tensor, label: int | None, space: str, adds: Sums | None = None, keep: list[float] | None = None
    ) -> Tensor:
        """The picture of an edit."""
        y = None if label is None else torch.tensor([label])
        shift = self.shift(adds, space)[:-1] if adds else None
        with torch.no_grad():
            x = edited(self.model, to_space(self.model, self.x(pixels[None]), space, y), shift, keep, space, y)
        return image_picture(to_pixels(x, self.n_bins)[0], self.n_bins)

    def shifted(self, pixels: Tensor, adds: Sums) -> Tensor:
        """The picture of its twin."""
        x = self.x(pixels[None]) + self.shift(adds, "latent")[-1]
        return image_picture(to_pixels(x, self.n_bins)[0], self.n_bins)

    def image(self, number: int) -> tuple[Tensor, int]:
        """Held-out image ``number``, and its class."""
        pixels, labels = self.data.batch(self.held_out[number : number + 1])
        assert labels is not None
        return pixels[0], int(labels[0])

    def picture(self, number: int) -> Tensor:
        return image_picture(self.image(number)[0].long(), self.n_bins)


@pytest.fixture(scope="module")
def own(site: Site) -> Callable[[str], Own]:
    return functools.cache(lambda name: Own(site, name))


@pytest.fixture
def editor(visitor: Visitor) -> Visitor:
    visitor.tab("Edit")
    return visitor


def value(visitor: Visitor, elem_id: str) -> float:
    return float(slider(visitor.page, elem_id).input_value())


def same_from_the_command_line(
    visitor: Visitor, patch: pytest.MonkeyPatch, link: str = "Save PNG", line: int = 0
) -> None:
    command = visitor.command("edit-command").splitlines()[line]
    assert visitor.download(link, "edited") == written(visitor.site.folder, patch, command)


def test_a_slider_follows_the_mouse(
    editor: Visitor, own: Callable[[str], Own], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several together, a level among them; then the original again, to the bit, with all sliders at rest."""
    run = own(DIGITS)
    pixels, label = run.image(0)
    wait_for(lambda: editor.edited("original"), run.picture(0))
    wait_for(editor.edited, run.picture(0))
    drag(editor.page, "add-3", 0.6, 0.9)
    s = value(editor, "add-3")
    assert 2 < s < 2.8
    adds: Sums = {("3", "rest"): s}
    wait_for(editor.edited, run.edit(pixels, label, "latent", adds))
    assert not torch.equal(editor.edited(), run.picture(0))
    same_from_the_command_line(editor, monkeypatch)
    drag(editor.page, "add-0", 0.2)
    drag(editor.page, "keep-0", 0.4)
    adds[("0", "rest")], keep = value(editor, "add-0"), value(editor, "keep-0")
    assert -2.2 < adds[("0", "rest")] < -1.4
    assert 0.3 < keep < 0.5
    wait_for(editor.edited, run.edit(pixels, label, "latent", adds, [keep]))
    editor.page.get_by_role("checkbox", name="beside it").check()
    wait_for(lambda: editor.edited("shifted"), run.shifted(pixels, adds))
    assert editor.command("edit-command").splitlines()[1].endswith("--pixel-shift --device cpu --out shifted.png")
    same_from_the_command_line(editor, monkeypatch)
    same_from_the_command_line(editor, monkeypatch, "Save the shifted one", 1)
    editor.page.get_by_role("button", name="Back to the original").click()
    wait_for(editor.edited, run.picture(0))
    wait_for(lambda: editor.edited("shifted"), run.picture(0))
    assert [value(editor, f"add-{i}") for i in range(6)] == [0] * 6
    assert value(editor, "keep-0") == 1
    assert editor.caption().replace("edited", "original", 1) == editor.caption("original")


def test_many_quick_drags_end_with_the_last(editor: Visitor, own: Callable[[str], Own]) -> None:
    """Of two sliders in turn: no earlier picture comes late."""
    run = own(DIGITS)
    pixels, label = run.image(0)
    for _ in range(2):
        drag(editor.page, "add-1", *(0.5 + i / 60 for i in range(30)))
        drag(editor.page, "add-2", *(0.5 - i / 60 for i in range(30)))
    adds: Sums = {("1", "rest"): value(editor, "add-1"), ("2", "rest"): value(editor, "add-2")}
    assert all(adds.values())
    wait_for(editor.edited, run.edit(pixels, label, "latent", adds))
    editor.idle()
    assert torch.equal(editor.edited(), run.edit(pixels, label, "latent", adds))


def test_both_spaces(editor: Visitor, own: Callable[[str], Own], monkeypatch: pytest.MonkeyPatch) -> None:
    """A slider keeps its value when the space changes, and the picture is that of the other space."""
    run = own(DIGITS)
    pixels, label = run.image(0)
    set_slider(editor.page, "add-5", 1.25)
    adds: Sums = {("5", "rest"): 1.25}
    wait_for(editor.edited, run.edit(pixels, label, "latent", adds))
    editor.page.get_by_role("radio", name="noise").check()
    wait_for(editor.edited, run.edit(pixels, label, "noise", adds))
    assert not torch.equal(run.edit(pixels, label, "noise", adds), run.edit(pixels, label, "latent", adds))
    assert value(editor, "add-5") == 1.25
    same_from_the_command_line(editor, monkeypatch)


def test_images_to_edit(editor: Visitor, own: Callable[[str], Own]) -> None:
    """By a thumb, by its number, among others; each with its own class, whatever was chosen for the last one."""
    run, page = own(DIGITS), editor.page
    page.get_by_role("button", name="held-out image 4:").click()
    wait_for(lambda: editor.edited("original"), run.picture(4))
    number = page.locator("#edit-number input")
    assert number.input_value() == "4"
    other = str((run.image(4)[1] + 1) % 10)
    choose(page, "edit-class", other)
    wait_for(lambda: f"class {other}" in editor.caption(), True)
    set_slider(page, "add-3", 1)
    wait_for(editor.edited, run.edit(run.image(4)[0], int(other), "latent", {("3", "rest"): 1.0}))
    number.fill("17")
    wait_for(lambda: editor.edited("original"), run.picture(17))
    wait_for(lambda: f"class {run.names[run.image(17)[1]]}" in editor.caption(), True)
    assert page.locator("#edit-class input").input_value() == "its own"
    wait_for(editor.edited, run.edit(*run.image(17), "latent", {("3", "rest"): 1.0}))
    before = page.locator("#edit-thumbs button").evaluate_all("found => found.map(button => button.ariaLabel)")
    page.get_by_role("button", name="Other images to choose from").click()
    thumbs = page.locator("#edit-thumbs button")
    wait_for(lambda: thumbs.evaluate_all("found => found.map(button => button.ariaLabel)") != before, True)
    picture = rgb_of(thumbs.nth(7).locator("img"))
    thumbs.nth(7).click()
    wait_for(lambda: editor.edited("original"), picture)
    assert torch.equal(picture, run.picture(int(number.input_value())))


def test_a_thumb_whose_number_stands_there_already(editor: Visitor, own: Callable[[str], Own]) -> None:
    """It is shown again after another image, whose number was none."""
    run = own(DIGITS)
    editor.page.locator("#edit-yours").get_by_text("An image of yours").click()
    editor.give("edit-upload", ("a.png", encoded(photo(20, 20), "PNG")))
    wait_for(lambda: torch.equal(editor.edited("original"), run.picture(0)), False)
    assert editor.page.locator("#edit-number input").input_value() == "0"
    editor.page.get_by_role("button", name="held-out image 0:").click()
    wait_for(lambda: editor.edited("original"), run.picture(0))


@pytest.mark.parametrize("number", ["100000", "-1"])
def test_a_number_that_there_is_not(number: str, editor: Visitor, own: Callable[[str], Own]) -> None:
    editor.page.locator("#edit-number input").fill(number)
    assert ("held-out image in 0..179" if number != "-1" else "a held-out image, from 0") in editor.toast()
    editor.page.locator("#edit-number input").fill("3")
    wait_for(lambda: editor.edited("original"), own(DIGITS).picture(3))


def test_other_sliders(editor: Visitor, own: Callable[[str], Own]) -> None:
    """A difference of two classes, and other classes; sliders that stay keep their values."""
    run, page = own(DIGITS), editor.page
    pixels, label = run.image(0)
    set_slider(page, "add-2", 1.5)
    page.get_by_text("Which attributes").click()
    choose(page, "edit-plus", "9")
    choose(page, "edit-minus", "4")
    page.get_by_role("button", name="Add a slider").click()
    wait_for(lambda: page.locator("#add-6 label").inner_text(), "9 minus 4")
    set_slider(page, "add-6", -0.75)
    wait_for(editor.edited, run.edit(pixels, label, "latent", {("2", "rest"): 1.5, ("9", "4"): -0.75}))
    page.locator("#edit-attributes .token-remove").first.click()
    wait_for(lambda: page.locator("#add-0 label").inner_text(), "1 minus rest")
    assert (value(editor, "add-1"), value(editor, "add-5")) == (1.5, -0.75)
    wait_for(editor.edited, run.edit(pixels, label, "latent", {("2", "rest"): 1.5, ("9", "4"): -0.75}))
    choose(page, "edit-minus", "9")
    page.get_by_role("button", name="Add a slider").click()
    assert editor.toast() == "minus: expected another attribute than plus, found '9'"


def test_names_of_attributes_are_text(
    editor: Visitor, own: Callable[[str], Own], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run without classes, whose folders have hostile names: sliders, captions, the command."""
    run = own(COLOUR)
    editor.choose_run(COLOUR)
    pixels, _ = run.image(0)
    wait_for(lambda: editor.edited("original"), run.picture(0))
    adds: Sums = {}
    for i, name in enumerate(sorted(NAMES)):
        adds[(name, "rest")] = (0.5, -0.25, 0.25, 0.1, 0.75)[i]
        set_slider(editor.page, f"add-{i}", adds[(name, "rest")])
    set_slider(editor.page, "keep-0", 0.35)
    wait_for(editor.edited, run.edit(pixels, None, "noise", adds, [0.35, 1.0]))
    same_from_the_command_line(editor, monkeypatch)


def test_two_visitors_have_nothing_in_common(visitors: Callable[..., Visitor], own: Callable[[str], Own]) -> None:
    """What one uploads, edits and samples the other never sees, and both go on at once."""
    run = own(DIGITS)
    one, other = visitors(), visitors()
    for each in (one, other):
        each.tab("Edit")
    set_slider(one.page, "add-0", 2)
    set_slider(other.page, "add-1", -2)
    one.page.get_by_role("button", name="held-out image 5:").click()
    other.page.get_by_role("button", name="held-out image 6:").click()
    wait_for(one.edited, run.edit(*run.image(5), "latent", {("0", "rest"): 2.0}))
    wait_for(other.edited, run.edit(*run.image(6), "latent", {("1", "rest"): -2.0}))
    one.page.get_by_text("An image of yours").click()
    one.give("edit-upload", ("mine.png", encoded(photo(30, 30), "PNG")))
    wait_for(lambda: "mine.png" in one.command("edit-command"), True)
    mine = one.page.locator("#edited [data-part=original] img").get_attribute("src")
    one.tab("Interpolate")
    one.page.get_by_role("button", name="from: the image under Edit").click()
    wait_for(lambda: "mine.png" in one.command("path-command"), True)
    set_slider(other.page, "add-1", 0.5)
    wait_for(other.edited, run.edit(*run.image(6), "latent", {("1", "rest"): 0.5}))
    other.page.get_by_role("button", name="Other images to choose from").click()
    for name in ("Sample", "Interpolate", "Score", "Run", "Edit"):
        other.tab(name)
    everything = other.page.content()
    assert mine is not None
    assert mine not in everything
    assert "mine.png" not in everything
    assert "held-out image 7:" not in other.command("edit-command")
    wait_for(lambda: other.edited("original"), run.picture(6))
