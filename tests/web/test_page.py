"""The page of runs in a browser: it loads, samples, tells of a run and changes to another."""

from __future__ import annotations

import json
import shutil
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support import web

web.require("gradio", "playwright", "chromium")

from support.web import wait_for  # noqa: E402
from support.web_page import PLACES, Site, Visitor, all_pixels, choose, drag, set_slider, written  # noqa: E402
from support.web_runs import CLASSES, COLOUR, DIGITS, NAMES, UNBORN  # noqa: E402

from pyglow_fast.train import RunFolder, load_model, resolve_device, to_pixels  # noqa: E402
from pyglow_fast.train.figures import image_picture  # noqa: E402
from pyglow_fast.web.sample_tab import SHOWN  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.full  # what a user sees of the page is in tests/contract/test_page.py

# The run, what it was trained on (of a folder only its name), how long, and on what images.
TITLE_OF_DIGITS = f"{DIGITS}: a Glow on digits\n\nstep 20; images of 8 x 8 pixels, 17 grey levels"
TITLE_OF_COLOUR = (
    f"{COLOUR}: a Glow on folder:images\n\nstep 10; images of 16 x 16 pixels, 256 levels of red, green and blue"
)


def sampled(site: Site, name: str, n: int, temperature: float, seed: int, classes: list[int] | None) -> Tensor:
    """The samples as the library gives them, uint8 (n, 3, H, W)."""
    checkpoint = RunFolder(site.path(name)).load()
    model = load_model(checkpoint, name, resolve_device("cpu")).freeze()
    y = None if classes is None else torch.tensor([classes[i % len(classes)] for i in range(n)])
    x = model.sample(n, temperature, y=y, generator=torch.Generator().manual_seed(seed))
    pixels = to_pixels(x, checkpoint.data.n_bins)
    return torch.stack([image_picture(image, checkpoint.data.n_bins) for image in pixels])


def shown(visitor: Visitor) -> Tensor:
    return all_pixels(visitor.page.locator("#samples button img"))


def test_it_loads_and_asks_nobody_else(visitor: Visitor) -> None:
    """All tabs have something to show, and their pictures are whole."""
    page = visitor.page
    assert page.title() == "pyglow_fast"
    assert page.locator("#about .html-container").inner_text() == TITLE_OF_DIGITS
    for (name, place), count in zip(PLACES.items(), (SHOWN, 2, 9, 0, 0), strict=True):
        visitor.tab(name)
        assert page.locator(f"#{place}").is_visible()
        images = page.locator(f"#{place} img")
        assert images.count() == count
        whole = "found => found.every(image => image.complete && image.naturalWidth > 0)"
        wait_for(lambda images=images, whole=whole: images.evaluate_all(whole), True)  # type: ignore[misc]
        assert page.locator(f"#{place}").inner_text() != "" or name == "Run"
    assert len(visitor.watched.requests) > 10  # it was watched


def test_samples_are_those_of_the_library(visitor: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, after each of the controls; and the file that is saved is what the command writes."""
    page, start, every = visitor.page, "pyglow-fast sample runs/digits", list(range(10))
    visitor.says("sample-command", f"{start} --n {SHOWN} --temperature 0.7 --seed 0 --device cpu --out samples.png")
    wait_for(lambda: shown(visitor), sampled(site, DIGITS, SHOWN, 0.7, 0, every))
    drag(page, "temperature", 1.0)
    visitor.says("sample-command", f"{start} --n {SHOWN} --temperature 1.2 --seed 0 --device cpu --out samples.png")
    wait_for(lambda: shown(visitor), sampled(site, DIGITS, SHOWN, 1.2, 0, every))
    set_slider(page, "sample-n", 7)
    page.locator("#sample-seed input").fill("5")
    choose(page, "sample-class", "3")
    command = f"{start} --n 7 --temperature 1.2 --seed 5 --label 3 --device cpu --out samples.png"
    visitor.says("sample-command", command)
    wait_for(lambda: shown(visitor), sampled(site, DIGITS, 7, 1.2, 5, [3]))
    assert visitor.download("Save PNG", "samples") == written(site.folder, monkeypatch, command)
    page.get_by_role("button", name="Another seed").click()
    wait_for(lambda: " --seed 5 " in visitor.command("sample-command"), False)
    seed = int(page.locator("#sample-seed input").input_value())
    visitor.says("sample-command", command.replace("--seed 5", f"--seed {seed}"))
    wait_for(lambda: shown(visitor), sampled(site, DIGITS, 7, 1.2, seed, [3]))


def test_of_many_drags_the_last_counts(visitor: Visitor, site: Site) -> None:
    drag(visitor.page, "temperature", *(i / 30 for i in range(30)), 0.5)
    visitor.says(
        "sample-command",
        f"pyglow-fast sample runs/digits --n {SHOWN} --temperature 0.6 --seed 0 --device cpu --out samples.png",
    )
    wait_for(lambda: shown(visitor), sampled(site, DIGITS, SHOWN, 0.6, 0, list(range(10))))


def test_a_click_on_a_sample_takes_it_to_edit(visitor: Visitor, site: Site) -> None:
    """Its pixels, and its name in the command; the class that was chosen for another image is forgotten."""
    page = visitor.page
    visitor.tab("Edit")
    choose(page, "edit-class", "5")
    wait_for(lambda: "class 5" in visitor.caption(), True)
    visitor.tab("Sample")
    page.get_by_role("button", name="sample 13, 3: edit it").click()
    page.locator("#edited").wait_for()
    wait_for(lambda: visitor.edited("original"), sampled(site, DIGITS, SHOWN, 0.7, 0, list(range(10)))[13])
    assert torch.equal(visitor.edited(), visitor.edited("original"))
    assert "class 3" in visitor.caption()
    assert page.locator("#edit-class input").input_value() == "its own"
    start = f"pyglow-fast edit runs/digits sample:13:n={SHOWN}:seed=0:temperature=0.7"
    visitor.says("edit-command", f"{start} --space latent --label 3 --device cpu --out edit.png")


def test_another_run_leaves_nothing_of_the_last(visitor: Visitor, site: Site) -> None:
    """Neither pictures nor sliders nor settings; hostile names are text everywhere."""
    page = visitor.page
    for name in PLACES:
        visitor.tab(name)
    visitor.tab("Edit")
    set_slider(page, "add-1", 1.5)
    wait_for(lambda: "--add 1 rest 1.5" in visitor.command("edit-command"), True)
    former = set(page.locator("img").evaluate_all("found => found.map(image => image.src)"))
    assert len(former) > 30
    visitor.choose_run(COLOUR)
    assert page.locator("#about .html-container").inner_text() == TITLE_OF_COLOUR
    wait_for(lambda: former & set(page.locator("img").evaluate_all("found => found.map(image => image.src)")), set())
    start = "pyglow-fast edit 'runs/it'\"'\"'s <b>$HOME & co' 0 "
    wait_for(lambda: visitor.command("edit-command").startswith(start), True)
    assert "--add" not in visitor.command("edit-command")
    assert page.locator("#sample-class").count() == 0
    labels = [page.locator(f"#add-{i} label").inner_text() for i in range(len(NAMES))]
    assert labels == [f"{name} minus rest" for name in sorted(NAMES)]
    assert [page.locator(f"#add-{i} input[type=number]").input_value() for i in range(5)] == ["0"] * 5
    visitor.tab("Sample")
    wait_for(lambda: shown(visitor), sampled(site, COLOUR, SHOWN, 0.7, 0, None))
    visitor.choose_run(CLASSES)
    names = page.locator("#samples button").evaluate_all("found => found.map(button => button.ariaLabel)")
    assert names[:5] == [f"sample {i}, {name}: edit it" for i, name in enumerate(sorted(NAMES))]
    choose(page, "sample-class", sorted(NAMES)[0])
    wait_for(lambda: f"--label '{sorted(NAMES)[0]}'" in visitor.command("sample-command"), True)
    assert page.locator("[onerror]").count() == 0


def test_hostile_names_are_quoted_in_commands(visitor: Visitor, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a shell makes of the shown line is the same picture, for each class."""
    visitor.choose_run(CLASSES)
    for name in NAMES:
        choose(visitor.page, "sample-class", name)
        classes = [sorted(NAMES).index(name)]
        wait_for(lambda classes=classes: shown(visitor), sampled(site, CLASSES, SHOWN, 0.7, 0, classes))  # type: ignore[misc]
        assert visitor.download("Save PNG", "samples") == written(
            site.folder, monkeypatch, visitor.command("sample-command")
        )


def test_the_report_is_framed_and_cannot_act(visitor: Visitor) -> None:
    visitor.tab("Run")
    frame = visitor.page.locator("#run-page iframe")
    assert frame.get_attribute("sandbox") == ""
    inside = visitor.page.frame_locator("#run-page iframe")
    inside.get_by_role("heading", name="digits: a Glow on digits").wait_for()
    inside.get_by_role("heading", name="Curves").wait_for()
    assert inside.locator("img").count() > 0
    assert visitor.command("run-command") == "pyglow-fast report runs/digits --out report.html"
    visitor.choose_run(COLOUR)
    inside.get_by_role("heading", name=f"{COLOUR}: a Glow on folder").wait_for()


def test_a_run_that_appears_is_offered(visitor: Visitor, site: Site) -> None:
    """After a reload; and one that goes away says so in a sentence."""
    page, new = visitor.page, site.path("zz new")
    page.locator("#run input").click()
    offered = [site.run(name) for name in sorted((DIGITS, COLOUR, CLASSES, UNBORN))]
    wait_for(lambda: page.get_by_role("option").all_inner_texts(), [f"✓\n{offered[0]}", *offered[1:]])
    page.keyboard.press("Escape")
    shutil.copytree(site.path(COLOUR), new)
    try:
        visitor.idle()  # what a reload breaks off is an error in the console
        page.reload()
        visitor.filled("Sample")
        visitor.choose_run("zz new")
        assert page.locator("#about .html-container").inner_text() == TITLE_OF_COLOUR.replace(COLOUR, "zz new")
    finally:
        new.rename(site.folder / "zz gone")  # at once: the server may be writing into it what it measures
    set_slider(page, "sample-n", 3)
    assert visitor.toast().startswith("run: expected one of runs/digits, ")
    visitor.idle()
    page.reload()
    visitor.filled("Sample")
    assert page.locator("#about .html-container").inner_text() == TITLE_OF_DIGITS


def test_a_run_without_a_checkpoint_says_so(visitor: Visitor, site: Site) -> None:
    page = visitor.page
    before = shown(visitor)
    choose(page, "run", site.run(UNBORN))
    assert visitor.toast() == (
        f"run: expected a checkpoint in checkpoints/, found none in '{site.run(UNBORN)}' (it has not written its first)"
    )
    wait_for(page.locator("#about .html-container").inner_text, "still about runs/digits")
    set_slider(page, "sample-n", 3)
    wait_for(lambda: shown(visitor), before[:3])


def forged(site: Site, name: object) -> dict[str, Any]:
    """What the server answers to a request that says the visitor chose ``name``."""
    address = site.server.address
    with urllib.request.urlopen(f"{address}config") as answer:
        config = json.load(answer)
    (run,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == "run"]
    (handler,) = [found for found in config["dependencies"] if [run, "change"] in found["targets"]]
    event = {"fn_index": handler["id"], "session_hash": "forged", "data": [None, name]}
    head = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}gradio_api/queue/join", json.dumps(event).encode(), head)
    ):
        pass
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=forged") as answer:
        for line in answer:
            message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
            if message.get("msg") == "process_completed":
                return dict(message)
    raise AssertionError("no answer")


def test_only_what_is_served_is_opened(site: Site) -> None:
    """Whatever a request says the run is; with the name of a run the same request is answered."""
    assert forged(site, site.run(DIGITS))["success"]
    absolute = str(site.path(DIGITS))
    for name in ("images", "runs", "..", "runs/../runs/digits", absolute, "/", "", None, [site.run(DIGITS)], {"a": 1}):
        answer = forged(site, name)
        assert not answer["success"], name
        said = json.dumps(answer)
        assert "Traceback" not in said
        assert str(site.folder) not in said.replace(json.dumps(absolute)[1:-1], "")
