"""Runs that change while they are looked at, and faults of the page itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, all_pixels, choose, set_slider  # noqa: E402
from support.web_runs import COLOUR, DIGITS, encoded, photo, train_on  # noqa: E402

from pyglow_fast.train import Checkpoint, RunFolder, load_model, resolve_device, to_pixels  # noqa: E402
from pyglow_fast.train.figures import image_picture  # noqa: E402
from pyglow_fast.web.sample_tab import SHOWN  # noqa: E402


@pytest.fixture
def training(site: Site, tmp_path: Path) -> Iterator[RunFolder]:
    """A run that may be changed."""
    folder = site.path("zz training")
    shutil.copytree(site.path(COLOUR), folder)
    yield RunFolder(folder)
    folder.rename(tmp_path / "gone")  # at once: the server may be writing into it what it measures


def sampled(checkpoint: Checkpoint, n: int) -> torch.Tensor:
    model = load_model(checkpoint, "run", resolve_device("cpu")).freeze()
    pixels = to_pixels(model.sample(n, 0.7, generator=torch.Generator().manual_seed(0)), 256)
    return torch.stack([image_picture(image, 256) for image in pixels])


def shown(visitor: Visitor) -> torch.Tensor:
    return all_pixels(visitor.page.locator("#samples button img"))


def test_the_newest_whole_checkpoint_is_used(training: RunFolder, visitor: Visitor) -> None:
    """By the next action: in Sample, in Edit, and not one of which a half was written."""
    page = visitor.page
    visitor.choose_run("zz training")
    first = training.load()
    wait_for(lambda: shown(visitor), sampled(first, SHOWN))
    visitor.tab("Edit")
    before = visitor.caption("original")
    second = train_on(training, 1000)
    assert not torch.equal(sampled(second, 5), sampled(first, 5))
    set_slider(page, "keep-1", 0.9)
    wait_for(lambda: visitor.caption("original") not in ("", before), True)
    visitor.tab("Sample")
    set_slider(page, "sample-n", 5)
    wait_for(lambda: shown(visitor), sampled(second, 5))
    torn = training.checkpoint.read_bytes()
    (training.checkpoints / "step-0002000.safetensors").write_bytes(torn[: len(torn) // 2])
    set_slider(page, "sample-n", 6)
    wait_for(lambda: shown(visitor), sampled(second, 6))


def test_a_newer_checkpoint_comes_by_itself(training: RunFolder, visitor: Visitor) -> None:
    """Where nothing is done: samples and their command, the image under edit; the report by its button."""
    page = visitor.page
    visitor.choose_run("zz training")
    visitor.tab("Run")
    report = page.frame_locator("#run-page iframe").locator("body")
    assert "1000" not in report.inner_text()
    visitor.tab("Edit")
    before = visitor.caption("original")
    second = train_on(training, 1000)
    wait_for(lambda: "step 1,000" in page.locator("#about").inner_text(), True)
    wait_for(lambda: shown(visitor), sampled(second, SHOWN))
    wait_for(lambda: visitor.caption("original") != before and "training images" in visitor.caption("original"), True)
    visitor.tab("Run")
    wait_for(lambda: "1000" in report.inner_text(), True)
    train_on(training, 2000)
    page.get_by_role("button", name="Read again").click()
    wait_for(lambda: "2000" in report.inner_text(), True)


def test_a_run_whose_images_are_gone(training: RunFolder, visitor: Visitor, site: Site, tmp_path: Path) -> None:
    """What needs none of them works: samples, uploads, levels. Once they are back, the rest does."""
    page, away = visitor.page, tmp_path / "away"
    checkpoint = training.load()
    images = Path(checkpoint.config.data.name.partition(":")[2])
    elsewhere = replace(checkpoint.config.data, name=f"folder:{away / images.name}")
    checkpoint.config = replace(checkpoint.config, data=elsewhere)
    checkpoint.progress["step"] += 1
    training.save(checkpoint, keep=9)
    visitor.choose_run("zz training")
    wait_for(lambda: shown(visitor), sampled(checkpoint, SHOWN))
    page.get_by_role("tab", name="Edit", exact=True).click()
    why = page.locator("#edit-why")
    wait_for(lambda: "No attributes: " in why.inner_text(), True)
    assert str(tmp_path) not in page.content()
    assert page.locator("#edit-number").count() == page.locator("#edit-thumbs button").count() == 0
    wait_for(lambda: visitor.edited("original"), sampled(checkpoint, SHOWN)[0])
    set_slider(page, "keep-0", 0.5)
    wait_for(
        lambda: f"sample:0:n={SHOWN}:seed=0:temperature=0.7 --keep 0.5 1 " in visitor.command("edit-command"), True
    )
    assert "bits/dim" in visitor.caption()
    assert "training images" not in visitor.caption()
    page.get_by_role("tab", name="Interpolate", exact=True).click()
    wait_for(lambda: "Choose two images" in page.locator("#path-frame").inner_text(), True)
    page.locator("#from-take").click()
    data = encoded(photo(30, 40), "PNG")
    page.get_by_role("button", name="to: an image of yours").click()
    visitor.give("to-upload", ("mine.png", data))
    wait_for(page.locator("#path-strip button").count, 9)
    page.get_by_role("tab", name="Score", exact=True).click()
    visitor.give("score-files", ("mine.png", data))
    page.locator("#scores td", has_text="mine.png").wait_for()
    assert "No histogram: " in page.locator("#scores").inner_text()
    assert page.locator("#scores tbody td").nth(3).inner_text() == ""
    shutil.copytree(images, away / images.name)
    visitor.choose_run(DIGITS)
    visitor.choose_run("zz training")
    visitor.tab("Edit")
    assert page.locator("#add-0 label").inner_text().endswith(" minus rest")
    assert page.locator("#edit-thumbs button").count() > 1


def test_a_run_is_opened_once_it_has_a_checkpoint(training: RunFolder, visitor: Visitor) -> None:
    """It was chosen before its first one; the page is about the other run until then."""
    page, first = visitor.page, training.load()
    away = training.path.parent.parent / "checkpoints of the run in training"
    training.checkpoints.rename(away)
    visitor.filled("Sample")
    choose(page, "run", visitor.site.run("zz training"))
    assert visitor.toast().startswith("run: expected a checkpoint in checkpoints/, found none in ")
    wait_for(page.locator("#about").inner_text, f"still about runs/{DIGITS}")
    away.rename(training.checkpoints)
    wait_for(lambda: all_pixels(page.locator("#samples button img")), sampled(first, SHOWN))
    wait_for(lambda: "zz training" in page.locator("#about").inner_text(), True)


def test_a_path_follows_the_checkpoint_and_the_space(training: RunFolder, visitor: Visitor) -> None:
    """Its strip as its frame: else what is saved is not what its command gives."""
    page = visitor.page

    def strip() -> torch.Tensor:
        return all_pixels(page.locator("#path-strip button img"))

    visitor.choose_run("zz training")
    visitor.tab("Interpolate")
    before = strip()
    train_on(training, 1000)
    wait_for(lambda: torch.equal(strip(), before), False)
    visitor.tab("Edit")
    page.get_by_role("radio", name="latent").check()
    visitor.idle()
    visitor.tab("Interpolate")
    wait_for(lambda: [" --space latent " in line for line in visitor.command("path-command").splitlines()], [True] * 4)


def test_another_run_in_the_same_folder(site: Site, visitors: Callable[..., Visitor], tmp_path: Path) -> None:
    """It is as if it had been chosen: nothing of the last one stays, neither its class nor its sliders."""
    runs = tmp_path / "runs"
    shutil.copytree(site.path(DIGITS), runs / "one")
    words = ["-m", "pyglow_fast", "serve", "runs", "--no-browser", "--device", "cpu"]
    with web.Server(words, tmp_path) as server:
        visitor = visitors(opened=False)
        visitor.site, page = Site(server, tmp_path), visitor.page
        visitor.open()
        choose(page, "sample-class", "3")
        visitor.tab("Edit")
        choose(page, "edit-class", "3")
        set_slider(page, "add-0", 1)
        wait_for(lambda: "--add 0 rest 1 --space latent --label 3 " in visitor.command("edit-command"), True)
        (runs / "one").rename(tmp_path / "former")
        shutil.copytree(site.path(COLOUR), runs / "one")
        start = "pyglow-fast edit runs/one 0 --space noise --device cpu"
        wait_for(lambda: visitor.command("edit-command"), f"{start} --out edit.png")
        visitor.filled("Edit")
        wait_for(page.locator("#edit-class").count, 0)
        visitor.tab("Sample")
        wait_for(lambda: "--label" in visitor.command("sample-command"), False)
        set_slider(page, "sample-n", 3)
        wait_for(page.locator("#samples button").count, 3)
        assert page.get_by_test_id("toast-text").count() == 0
        page.goto("about:blank")


FAULTY = """
import json, sys
import pyglow_fast.web.sample_tab as tab
from pyglow_fast.cli import main
drawn = tab.SampleTab.draw
def draw(self, desk, temperature, label, n, seed):
    if n == 13:
        raise RuntimeError("/srv/secret/folder is broken")
    return drawn(self, desk, temperature, label, n, seed)
tab.SampleTab.draw = draw
sys.exit(main(json.loads(sys.argv[1])))
"""


def test_a_fault_is_one_sentence(site: Site, visitors: Callable[..., Visitor], tmp_path: Path) -> None:
    """The log has its traceback, the page no path; and the next action works."""
    shutil.copytree(site.path(DIGITS), tmp_path / "runs" / DIGITS)
    words = ["serve", "runs", "--no-browser", "--device", "cpu"]
    with web.Server(["-c", FAULTY, json.dumps(words)], tmp_path) as server:
        visitor = visitors(opened=False)
        visitor.site = Site(server, tmp_path)
        visitor.open()
        set_slider(visitor.page, "sample-n", 13)
        said = visitor.toast()
        assert said == "RuntimeError: this should not have happened; the traceback is in the log of the server."
        assert "secret" not in visitor.page.content()
        wait_for(lambda: "RuntimeError: /srv/secret/folder is broken" in server.log(), True)
        assert "Traceback" in server.log()
        set_slider(visitor.page, "sample-n", 3)
        wait_for(visitor.page.locator("#samples button").count, 3)
        visitor.page.goto("about:blank")
