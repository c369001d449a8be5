"""The tabs of paths and of scores in a browser: pictures and numbers are those of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

import gradio as gr  # noqa: E402
from support.web import wait_for  # noqa: E402
from support.web_page import (  # noqa: E402
    Site,
    Visitor,
    all_pixels,
    data_of,
    decoded,
    drag,
    rgb_of,
    set_slider,
    slider,
    written,
)
from support.web_runs import CLASSES, COLOUR, DIGITS, NAMES, encoded, photo  # noqa: E402

from pyglow_fast.data import ImageSet, load_data, split  # noqa: E402
from pyglow_fast.data.single import read_single  # noqa: E402
from pyglow_fast.latents import interpolate  # noqa: E402
from pyglow_fast.likelihood import dequantize  # noqa: E402
from pyglow_fast.studio.words import HeldOut  # noqa: E402
from pyglow_fast.train import RunFolder, load_model, resolve_device, score_images, to_pixels  # noqa: E402
from pyglow_fast.train.figures import image_picture  # noqa: E402
from pyglow_fast.web.between_tab import BetweenTab  # noqa: E402
from pyglow_fast.web.desk import Desk  # noqa: E402
from pyglow_fast.web.edit_tab import EditTab  # noqa: E402
from pyglow_fast.web.shelf import Shelf  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor


def path(site: Site, ends: tuple[int | bytes, int | bytes], times: list[float], spherical: bool = False) -> Tensor:
    """Pictures of the path between two held-out images of the run in colours, or files."""
    checkpoint = RunFolder(site.path(COLOUR)).load()
    model = load_model(checkpoint, COLOUR, resolve_device("cpu")).freeze()
    config = checkpoint.config
    data = load_data(config.data)
    _, held_out = split(data, config.data.held_out, config.seed)
    both = []
    for end in ends:
        pixels = (
            data.batch(held_out[end : end + 1])[0][0]
            if isinstance(end, int)
            else read_single(end, "test", config.data, (3, 16, 16), 256)
        )
        half = torch.full((1, 3, 16, 16), 0.5)
        both.append(dequantize(pixels[None].long(), 256, noise=half))
    pixels = to_pixels(interpolate(model, both[0], both[1], spherical=spherical, space="noise", times=times)[0], 256)
    return torch.stack([image_picture(image, 256) for image in pixels])


def strip(visitor: Visitor) -> Tensor:
    return all_pixels(visitor.page.locator("#path-strip button img"))


def frame(visitor: Visitor) -> Tensor:
    return rgb_of(visitor.page.locator("#path-frame [data-part=frame] img"))


@pytest.fixture
def walker(visitor: Visitor) -> Visitor:
    visitor.choose_run(COLOUR)
    visitor.tab("Interpolate")
    return visitor


def test_a_path(walker: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """By numbers, linear and on circles, at a point, by clicks on the strip; and what is saved."""
    page = walker.page
    ninths = [i / 8 for i in range(9)]
    wait_for(lambda: strip(walker), path(site, (0, 1), ninths))
    wait_for(lambda: frame(walker), path(site, (0, 1), [0.5])[0])
    page.locator("#from-number input").fill("4")
    wait_for(lambda: strip(walker), path(site, (4, 1), ninths))
    page.locator("#to-number input").fill("7")
    wait_for(lambda: strip(walker), path(site, (4, 7), ninths))
    page.get_by_role("radio", name="spherical").check()
    wait_for(lambda: strip(walker), path(site, (4, 7), ninths, True))
    assert not torch.equal(path(site, (4, 7), ninths, True), path(site, (4, 7), ninths))
    drag(page, "path-at", 0.3)
    at = float(slider(page, "path-at").input_value())
    assert 0.2 < at < 0.4
    wait_for(lambda: frame(walker), path(site, (4, 7), [at], True)[0])
    lines = walker.command("path-command").splitlines()
    assert len(lines) == 4  # of the frame, and still of the strip and its animations
    page.locator("#path-strip button").nth(6).click()
    wait_for(lambda: frame(walker), path(site, (4, 7), [0.75], True)[0])
    assert slider(page, "path-at").input_value() == "0.75"
    set_slider(page, "path-count", 4)
    wait_for(lambda: strip(walker), path(site, (4, 7), [0, 1 / 3, 2 / 3, 1], True))
    wait_for(lambda: "--frames 4 " in walker.command("path-command"), True)
    one, *whole = walker.command("path-command").splitlines()
    assert walker.download("Save the frame", "path-frame") == written(site.folder, monkeypatch, one)
    for link, command in zip(("Save the strip", "Save as GIF", "Save as WebP"), whole, strict=True):
        assert walker.download(link, "path-strip") == written(site.folder, monkeypatch, command)


def test_ends_that_are_no_held_out_images(walker: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload, the image under Edit; then a number that stands there already."""
    page, ninths = walker.page, [i / 8 for i in range(9)]
    data = encoded(photo(40, 30), "PNG")
    page.get_by_role("button", name="to: an image of yours").click()
    walker.give("to-upload", ("my picture.png", data))
    wait_for(lambda: strip(walker), path(site, (0, data), ninths))
    (site.folder / "my picture.png").write_bytes(data)
    wait_for(lambda: "my picture.png' --space noise --frames" in walker.command("path-command"), True)
    assert walker.download("Save the strip", "path-strip") == written(
        site.folder, monkeypatch, walker.command("path-command").splitlines()[1]
    )
    walker.tab("Edit")
    page.get_by_role("button", name="held-out image 3:").click()
    wait_for(lambda: " 3 --space" in walker.command("edit-command"), True)
    walker.tab("Interpolate")
    page.get_by_role("button", name="from: the image under Edit").click()
    wait_for(lambda: strip(walker), path(site, (3, data), ninths))
    page.locator("#from-number input").press("Enter")
    wait_for(lambda: strip(walker), path(site, (0, data), ninths))


def test_an_edit_is_an_end(walker: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sliders have it then, by a file whose command stands first; and the sliders go on without it."""
    page, name = walker.page, sorted(NAMES)[0]
    walker.tab("Edit")
    set_slider(page, "add-0", 1.5)
    set_slider(page, "keep-1", 0.25)
    wait_for(lambda: "--keep 1 0.25" in walker.command("edit-command"), True)
    assert name in walker.command("edit-command")
    edit, picture = walker.command("edit-command").replace("edit.png", "edit-to.png"), walker.edited()
    walker.tab("Interpolate")
    page.get_by_role("button", name="to: the image under Edit").click()
    wait_for(lambda: len(walker.command("path-command").splitlines()), 5)
    first, one, *whole = walker.command("path-command").splitlines()
    assert first == edit
    (site.folder / "edit-to.png").write_bytes(data := written(site.folder, monkeypatch, first))
    try:
        assert torch.equal(decoded(data), picture)
        wait_for(lambda: strip(walker), path(site, (0, data), [i / 8 for i in range(9)]))
        assert walker.download("Save the frame", "path-frame") == written(site.folder, monkeypatch, one)
        assert walker.download("Save as GIF", "path-strip") == written(site.folder, monkeypatch, whole[1])
    finally:
        (site.folder / "edit-to.png").unlink()
    walker.tab("Edit")
    page.get_by_role("button", name="Back to the original").click()
    wait_for(lambda: " --add " in walker.command("edit-command"), False)
    walker.tab("Interpolate")
    assert walker.command("path-command").splitlines()[0] == edit
    page.get_by_role("button", name="to: the image under Edit").click()
    wait_for(lambda: strip(walker), path(site, (0, 0), [i / 8 for i in range(9)]))
    wait_for(lambda: len(walker.command("path-command").splitlines()), 4)


def test_ends_are_chosen_by_clicks(walker: Visitor, site: Site) -> None:
    """The images at both ends are seen with their names; a click on one at the top makes it that end which is set."""
    page, ninths = walker.page, [i / 8 for i in range(9)]

    def ends() -> Tensor:
        return all_pixels(page.locator("#path-frame :is([data-part=from], [data-part=to]) img"))

    def said(part: str) -> str:
        return page.locator(f"#path-frame [data-part={part}] figcaption").inner_text()

    wait_for(ends, path(site, (0, 1), [0, 1]))
    assert [said(part) for part in ("from", "frame", "to")] == [
        "from\nheld-out image 0",
        "50% of the way",
        "to\nheld-out image 1",
    ]
    thumbs = page.locator("#path-thumbs button")
    thumbs.nth(5).click()
    wait_for(lambda: strip(walker), path(site, (5, 1), ninths))
    page.get_by_role("radio", name="to", exact=True).check()
    thumbs.nth(6).click()
    wait_for(lambda: strip(walker), path(site, (5, 6), ninths))
    wait_for(ends, path(site, (5, 6), [0, 1]))
    assert [page.locator(f"#{name}-number input").input_value() for name in ("from", "to")] == ["5", "6"]
    walker.tab("Sample")
    page.get_by_role("button", name="sample 3: edit it").click()
    walker.filled("Edit")
    walker.tab("Interpolate")
    page.get_by_role("button", name="from: the image under Edit").click()
    wait_for(lambda: said("from"), "from\nsample 3")


def test_ends_of_the_last_run_are_no_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a handler of the run that was chosen before ends late, the labels of that run mean nothing."""
    monkeypatch.chdir(site.folder)
    shelf, desk = Shelf(["runs"], device="cpu"), Desk()
    with gr.Blocks():
        tab = BetweenTab(shelf, gr.State(desk), EditTab(shelf, gr.State(desk)))
    former = desk.choose(shelf, site.run(CLASSES))
    tab.show(desk, "linear", 3)
    assert "<img" in tab.drawn(desk, "linear", 3)[0]
    desk.choose(shelf, site.run(COLOUR))
    for i in range(2):
        desk.put_end(i, former.pick(HeldOut(i)), former)
    assert tab.drawn(desk, "linear", 3)[0] == ""


def bits(site: Site, name: str, data: bytes, label: int | None) -> float:
    """Bits/dim of a file by itself."""
    checkpoint = RunFolder(site.path(name)).load()
    model = load_model(checkpoint, name, resolve_device("cpu")).freeze()
    pixels = read_single(data, "test", checkpoint.config.data, (3, 16, 16), 256)
    labels = None if label is None else torch.tensor([label])
    names = () if label is None else checkpoint.data.class_names
    return float(score_images(model, ImageSet("one", pixels[None], 256, labels, names), 1, seed=0).bits_per_dim[0])


@pytest.mark.drawn
def test_scores(visitor: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several files, with hostile names; the table, the CSV and the histogram."""
    visitor.choose_run(COLOUR)
    visitor.tab("Score")
    names = ["<img src=x onerror=alert(1)>.png", "{{7*7}} ${1+1}.png", "=1+1.png"]
    files = [(name, encoded(photo(20 + i, 30, i), "PNG")) for i, name in enumerate(names)]
    for name, data in files:
        (site.folder / name).write_bytes(data)
    visitor.give("score-files", *files)
    cells = visitor.page.locator("#scores tbody tr")
    wait_for(cells.count, 3)
    shown = cells.evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText))")
    assert [row[1] for row in shown] == names
    assert [row[2] for row in shown] == [f"{bits(site, COLOUR, data, None):.3f}" for _, data in files]
    assert all(row[3].endswith("%") for row in shown)
    command = visitor.command("score-command")
    csv_command, _, picture = command.partition(" --picture ")
    assert picture == "scores.png"
    assert visitor.download("Save CSV", "scores") == written(site.folder, monkeypatch, csv_command)
    saved = visitor.download("Save PNG", "scores")
    written(site.folder, monkeypatch, command)
    drawn = site.folder / "scores.png"
    assert saved == drawn.read_bytes()
    assert saved == data_of(visitor.page.locator("#scores .pgf-plot").get_attribute("src") or "")
    drawn.unlink()
    assert visitor.page.locator("[onerror]").count() == 0
    numbers = "row => getComputedStyle(row.querySelector('.pgf-name'), '::before').content"
    assert cells.first.evaluate(numbers) == 'counter(pgf) " "'  # as in the picture
    visitor.give("score-files", files[1])
    wait_for(cells.count, 1)
    assert cells.first.evaluate(numbers) == "none"


def test_scores_of_a_run_with_classes(visitor: Visitor, site: Site) -> None:
    """Each under its likeliest class, which the table names."""
    visitor.choose_run(CLASSES)
    visitor.tab("Score")
    data = encoded(photo(20, 20), "PNG")
    visitor.give("score-files", ("a.png", data))
    row = visitor.page.locator("#scores tbody tr")
    row.wait_for()
    cells = row.evaluate("row => [...row.cells].map(cell => cell.innerText)")
    label = sorted(NAMES).index(cells[4])
    assert cells[2] == f"{bits(site, CLASSES, data, label):.3f}"
    assert DIGITS not in visitor.command("score-command")
