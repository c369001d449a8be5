"""Runs that change while they are looked at, and faults of the page itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import Site, Visitor, all_pixels, choose, set_slider  # noqa: E402
from support.web_runs import COLOUR, DIGITS, train_on  # noqa: E402

from pyglow_fast.train import Checkpoint, RunFolder, load_model, resolve_device, to_pixels  # noqa: E402
from pyglow_fast.train.figures import image_picture  # noqa: E402
from pyglow_fast.web.sample_tab import SHOWN  # noqa: E402

pytestmark = pytest.mark.full  # what a user sees of the page is in tests/contract/test_page.py


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
