"""An opened run: its frozen model, the images that a text names, their bits/dim beside the run's own."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyglow_fast.studio.grids import Grid
from pyglow_fast.studio.samples import Draw
from support.edits import ByHand
from support.latent_runs import train

from pyglow_fast.data import ImageSet, UnreadableImageError
from pyglow_fast.latents import from_space, likeliest_class, to_space
from pyglow_fast.studio import opened as module
from pyglow_fast.studio.directions import Add, measure
from pyglow_fast.studio.edits import Edit, Subject, likelihood_text
from pyglow_fast.studio.opened import AbandonedError, OpenRun, Scores
from pyglow_fast.studio.words import File, HeldOut, parse_image
from pyglow_fast.train import RunFolder, load_model, score_images

ROUNDING = 1e-5  # 80 roundings of float32, of values around 1


@pytest.mark.parametrize("name", ["emoji", "digits"])
def test_the_frozen_model_gives_the_same(name: str, emoji_trained: Path, digits_run: Path) -> None:
    """As the model that is loaded without freezing it, but for rounding: latents, images, samples, likelihoods."""
    run = emoji_trained if name == "emoji" else digits_run
    opened, plain = OpenRun.open(str(run)), load_model(RunFolder(run).load(), "run")
    data = ByHand(run).data
    pixels, labels = data.batch(torch.arange(5))
    x, y = opened.x(pixels), labels if name == "digits" else None
    with torch.no_grad():
        for space in ("noise", "latent"):
            found, wanted = (to_space(model, x, space, y) for model in (opened.model, plain))
            torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING)
            images = (from_space(model, wanted, space, y) for model in (opened.model, plain))
            torch.testing.assert_close(*images, rtol=0, atol=ROUNDING)
        first, second = (
            model.sample(4, 0.7, y=None if y is None else y[:4], generator=torch.Generator().manual_seed(1))
            for model in (opened.model, plain)
        )
        torch.testing.assert_close(first, second, rtol=0, atol=ROUNDING)
    one = ImageSet("one", pixels, data.n_bins, y, data.class_names if y is not None else ())
    scores = (score_images(model, one, 5, 0).bits_per_dim for model in (opened.model, plain))
    torch.testing.assert_close(*scores, rtol=0, atol=ROUNDING)
    assert opened.checkpoint.model == opened.checkpoint.ema == {}


def test_held_out_images(digits_run: Path, emoji_trained: Path) -> None:
    opened, by_hand = OpenRun.open(str(digits_run)), ByHand(digits_run)
    for number in (0, 7, 179):
        pixels, label = by_hand.held(number)
        picked = opened.pick(HeldOut(number))
        assert torch.equal(picked.pixels, pixels.to(torch.uint8))
        assert picked.label == label
        assert opened.pick(HeldOut(number), 3).label == 3
    with pytest.raises(ValueError, match=r"^image: expected a held-out image in 0..179, found 180$"):
        opened.pick(HeldOut(180))
    assert OpenRun.open(str(emoji_trained)).pick(HeldOut(0)).label is None  # its classes are none of the model


def test_files(digits_run: Path, tmp_path: Path) -> None:
    """The likeliest class unless one is given; given back when asked for the own one."""
    opened = OpenRun.open(str(digits_run))
    values = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    picked = opened.pick(parse_image(str(tmp_path / "x.png")))
    assert torch.equal(picked.pixels[0], torch.from_numpy(values.astype(np.int64) * 17 // 256).byte())
    best = int(likeliest_class(opened.model, opened.x(picked.pixels[None]))[0])
    assert picked.label == best
    other = opened.relabelled(picked, (best + 1) % 10)
    assert other.label == (best + 1) % 10
    assert opened.relabelled(other, None).label == best
    with pytest.raises(ValueError, match=r"^label: expected a class in 0..9, found 10$"):
        opened.relabelled(picked, 10)
    with pytest.raises(UnreadableImageError, match=r"^gone.png: expected"):
        opened.pick(File("gone.png"))


@pytest.mark.parametrize("text", ["sample:2:n=5:seed=4", "sample:69:n=70:label=3:label=8"])
def test_samples(digits_run: Path, text: str) -> None:
    """Those of the grid with the same options, across batches too, and their own classes."""
    opened, image = OpenRun.open(str(digits_run)), parse_image(text)
    picked = opened.pick(image)
    draw = Draw(5, seed=4) if "seed" in text else Draw(70, labels=(3, 8))
    grid = Grid(opened, draw)
    number = int(text.split(":")[1])
    assert torch.equal(picked.pixels.long(), grid.drawn.pixels[number])
    assert picked.label == (number if "seed" in text else (3, 8)[number % 2])
    assert grid.picked(number)[1:] == picked[1:]
    assert torch.equal(grid.picked(number).pixels, picked.pixels)
    assert opened.relabelled(opened.relabelled(picked, 1), None).label == picked.label


def test_a_sample_is_that_of_the_checkpoint_that_it_is_looked_at_with(emoji_run: Path) -> None:
    """So that its name in a command means the image that is shown; held-out images stay what they are."""
    newest, image = OpenRun.open(str(emoji_run)), parse_image("sample:1:n=2")
    RunFolder(emoji_run).checkpoint.unlink()
    older = OpenRun.open(str(emoji_run))
    found = newest.relabelled(older.pick(image), None)
    assert torch.equal(found.pixels, newest.pick(image).pixels)
    assert not torch.equal(found.pixels, older.pick(image).pixels)
    held_out = older.pick(HeldOut(1))
    assert newest.relabelled(held_out, held_out.label).pixels is held_out.pixels


def test_spaces_and_classes(digits_run: Path, emoji_trained: Path) -> None:
    digits, emoji = OpenRun.open(str(digits_run)), OpenRun.open(str(emoji_trained))
    assert (digits.space, emoji.space) == ("latent", "noise")
    assert digits.classes == tuple("0123456789")
    assert emoji.classes == ()
    assert digits.label("3") == 3
    with pytest.raises(ValueError, match=r"^label: expected no label, since the model has no classes, found 'Discs'$"):
        emoji.label("Discs")
    with pytest.raises(ValueError, match=r"^train_images: expected a positive whole number, found 0$"):
        OpenRun.open(str(digits_run), train_images=0)


def test_images_are_shared_by_the_checkpoints_of_a_run_alone(emoji_run: Path, digits_run: Path) -> None:
    """Another run in the same folder has its own, even if its images would fit."""
    newest = OpenRun.open(str(emoji_run))
    RunFolder(emoji_run).checkpoint.unlink()
    assert OpenRun.open(str(emoji_run), images=newest.images).images is newest.images
    assert OpenRun.open(str(digits_run), images=newest.images).images is not newest.images
    whole = newest.checkpoint.data
    newest.checkpoint.data = replace(whole, fingerprint="of what was in the same folder before")
    assert OpenRun.open(str(emoji_run), images=newest.images).images is not newest.images
    newest.checkpoint.data = whole
    newest.checkpoint.config = replace(newest.checkpoint.config, seed=newest.checkpoint.config.seed + 1)
    assert OpenRun.open(str(emoji_run), images=newest.images).images is not newest.images  # split otherwise


def test_what_was_measured_waits_for_no_measurement(emoji_run: Path) -> None:
    """Directions are there for a drag while another thread scores images, and scores while one measures directions."""
    opened = OpenRun.open(str(emoji_run))
    found: list[object] = []

    def dragged(look: Callable[[], object]) -> Callable[[int, int], None]:
        first = look()

        def told(done: int, total: int) -> None:
            dragging = threading.Thread(target=lambda: found.append(look()), daemon=True)
            dragging.start()
            dragging.join(30)
            assert found[-1:] == [first]

        return told

    opened.scores(dragged(lambda: opened.directions("noise")))
    before = len(found)
    assert before
    opened.directions("latent", dragged(lambda: likelihood_text(opened, 2.5, wait=False)))
    assert len(found) > before


def test_the_device_that_was_asked_for_is_in_the_command(emoji_run: Path) -> None:
    """Another one draws other samples."""
    draw = Draw(1)
    asked, any_device = (OpenRun.open(str(emoji_run), device=device) for device in ("cpu", "auto"))
    assert Grid(asked, draw).made().command.endswith("--seed 0 --device cpu")
    assert Grid(any_device, draw).made().command.endswith("--seed 0")


@pytest.mark.parametrize("name", ["two\nlines", "esc\x1b[2J"])
def test_a_folder_whose_name_no_line_can_hold(digits_run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(digits_run, tmp_path / name)
    with pytest.raises(ValueError, match=r"^run: expected names of folder and classes without control characters, "):
        OpenRun.open(str(tmp_path / name))


def test_bits_of_one_image(digits_run: Path) -> None:
    """As score_images gives them of the image alone, at every call."""
    opened, by_hand = OpenRun.open(str(digits_run)), ByHand(digits_run)
    pixels, label = by_hand.held(3)
    assert label is not None
    one = ImageSet("one", pixels[None], 17, torch.tensor([label]), by_hand.data.class_names)
    wanted = float(score_images(by_hand.model, one, 1, seed=0).bits_per_dim[0])
    assert opened.bits(pixels, label) == opened.bits(pixels.long(), label) == wanted
    assert opened.bits(pixels, (label + 1) % 10) != wanted


def test_scores_are_kept(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of held-out and of training images that are finite; told how far it is."""
    opened, told = OpenRun.open(str(emoji_run)), list[tuple[int, int]]()
    found = opened.scores(lambda done, total: told.append((done, total)))
    by_hand = ByHand(emoji_run)
    for side, values in ((by_hand.held_out, found.held_out), (by_hand.train, found.train)):
        wanted = score_images(by_hand.model, by_hand.data.subset(side), 50, 0, 1000).bits_per_dim
        assert torch.equal(values, wanted)
    total = len(by_hand.train) + len(by_hand.held_out)
    assert told[-1] == (total, total)
    monkeypatch.setattr(module, "score_images", lambda *args, **options: pytest.fail("scored again"))
    again = OpenRun.open(str(emoji_run)).scores()
    assert torch.equal(again.train, found.train)
    assert torch.equal(again.held_out, found.held_out)


def test_scores_that_are_not_finite_are_left_out(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*args: Any, **options: Any) -> Any:
        found = score_images(*args, **options)
        found.draws[0] = torch.inf
        return found

    monkeypatch.setattr(module, "score_images", spoilt)
    opened, by_hand = OpenRun.open(str(emoji_run)), ByHand(emoji_run)
    assert len(opened.scores().train) == len(by_hand.train) - 1
    monkeypatch.setattr(module, "score_images", score_images)
    assert len(OpenRun.open(str(emoji_run)).scores().train) == len(by_hand.train) - 1  # from the folder


def test_the_share_of_training_images() -> None:
    scores = Scores(torch.zeros(0), torch.tensor([1.0, 2.0, 2.0, 5.0]).double())
    assert [scores.share_below(bits) for bits in (0.5, 2.0, 2.5, 9.0)] == [0.0, 0.25, 0.75, 1.0]
    assert np.isnan(Scores(torch.zeros(0), torch.zeros(0)).share_below(1.0))


def test_likelihoods_in_words(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = OpenRun.open(str(emoji_run))
    opened._scores.append(Scores(torch.zeros(3), torch.tensor([1.0, 2.0, 3.0, 4.0]).double()))
    assert likelihood_text(opened, 2.5) == "2.500 bits/dim, more than 50.0% of 4 training images"
    for bits in (float("nan"), float("inf")):
        assert likelihood_text(opened, bits) == "no finite likelihood"
    opened._scores[0] = Scores(torch.zeros(3), torch.zeros(0).double())
    assert likelihood_text(opened, 2.5) == "2.500 bits/dim"
    monkeypatch.setattr(module, "own_images", lambda checkpoint: (_ for _ in ()).throw(OSError("gone")))
    assert likelihood_text(OpenRun.open(str(emoji_run)), 2.5) == "2.500 bits/dim"


def test_edits_as_words() -> None:
    """What changes nothing is left out; a slider's last digits are rounded away; a shift of pixels keeps no latents."""
    edit = Edit((Add("-a", "rest", 0.1 + 0.2), Add("b", "c", 0.0)), (1.0, 0.1 + 0.2))
    assert edit.options() == ["--add", "\\-a", "rest", "0.3", "--keep", "1", "0.3"]
    assert edit.options(pixel_shift=True) == ["--add", "\\-a", "rest", "0.3"]
    assert not edit.is_none
    assert Edit((Add("b", "c", 0.0),), (1.0, 1.0)).options() == []
    assert Edit((Add("b", "c", 1e-9),), (1.0, 1.0)).is_none


def test_a_subject_is_edited_many_times(emoji_run: Path) -> None:
    """Each edit starts from the image."""
    opened = OpenRun.open(str(emoji_run))
    subject = Subject(opened, opened.pick(HeldOut(1)), "noise")
    edit = Edit((Add("Discs", "Squares", 1.0),), (0.5, 1.0))
    first = subject.edited(edit, pixel_shift=True)
    subject.edited(Edit((), (0.0, 0.0)))
    second = subject.edited(edit, pixel_shift=True)
    assert torch.equal(first.pixels, second.pixels)
    assert first.shifted is not None
    assert second.shifted is not None
    assert torch.equal(first.shifted, second.shifted)
    assert torch.equal(subject.edited(Edit()).pixels, subject.pixels)
    with pytest.raises(ValueError, match=r"^keep: expected 2 shares, one a level, found 1$"):
        subject.edited(Edit((), (0.5,)))


def test_images_go_on_to_the_next_checkpoint_of_the_same_run_alone(
    emoji_run: Path, digits_run: Path, tmp_path: Path
) -> None:
    """Another run may take the place of the former: with other images, or the same ones in another split."""
    first = OpenRun.open(str(emoji_run))
    assert OpenRun.open(str(emoji_run), images=first.images).images is first.images
    other = OpenRun.open(str(digits_run), images=first.images)
    assert other.images.find()[0].name == "digits"
    train("digits", tmp_path / "run", "--n-levels", "2", "--class-conditional", "--seed", "1")
    again = OpenRun.open(str(tmp_path / "run"), images=other.images)
    assert not torch.equal(again.images.find()[2], other.images.find()[2])


def test_a_measurement_is_abandoned_where_nobody_waits(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for another thread's is told how far it is, and gets its result; then it is not abandoned."""
    opened = OpenRun.open(str(emoji_run))
    passes: list[str] = []

    def counting(model: Any, data: Any, groups: Any, space: str, *rest: Any) -> dict[str, torch.Tensor]:
        passes.append(space)
        return measure(model, data, groups, space, *rest)

    monkeypatch.setattr(module, "measure", counting)

    def leave(done: int, total: int) -> None:
        raise AbandonedError

    with pytest.raises(AbandonedError):
        opened.directions("noise", leave)
    assert not opened.folder.cache.exists()
    other, told, found = threading.Event(), list[tuple[int, int]](), list[object]()

    def wait(done: int, total: int) -> None:
        told.append((done, total))
        other.set()

    waiting = threading.Thread(target=lambda: found.append(opened.directions("noise", wait)), daemon=True)

    def leave_to_the_other(done: int, total: int) -> None:
        if not waiting.is_alive():
            waiting.start()
        assert other.wait(30)
        raise AbandonedError

    first = opened.directions("noise", leave_to_the_other)
    waiting.join(30)
    assert found == [first]
    assert passes == ["noise", "noise"]
    assert 0 < told[0][0] <= told[0][1]
    with pytest.raises(AbandonedError):
        opened.scores(leave)
    assert not opened.has_scores


def test_a_likelihood_without_a_wait(emoji_run: Path) -> None:
    """As a drag needs it: what was not measured yet is not, but left out."""
    opened = OpenRun.open(str(emoji_run))
    assert likelihood_text(opened, 2.5, wait=False) == "2.500 bits/dim"
    assert not opened.has_scores
    assert "training images" in likelihood_text(opened, 2.5)
    assert "training images" in likelihood_text(opened, 2.5, wait=False)


def test_images_that_are_back(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are found once they are looked for again, and those that were found are not loaded a second time."""
    whole, tries = module.own_images, list[str]()

    def gone(checkpoint: Any) -> Any:
        tries.append("gone")
        raise OSError("gone")

    monkeypatch.setattr(module, "own_images", gone)
    images = OpenRun.open(str(emoji_run)).images
    assert images.missing == "gone"
    for _ in range(2):
        with pytest.raises(module.LostImagesError, match=r"^gone$"):
            images.find()
    assert tries == ["gone"]
    monkeypatch.setattr(module, "own_images", whole)
    assert images.missing == "gone"
    images.look_again()
    assert images.missing == ""
    data = images.find()[0]
    monkeypatch.setattr(module, "own_images", gone)
    images.look_again()
    assert images.find()[0] is data


def test_scores_of_images_that_cannot_be_read(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are none to compare with, rather than the end of what was asked."""
    opened = OpenRun.open(str(emoji_run))

    def unreadable(*args: Any, **options: Any) -> None:
        raise UnreadableImageError("image 3")

    monkeypatch.setattr(module, "score_images", unreadable)
    assert opened.scores_at_hand() is None
    assert likelihood_text(opened, 2.5) == "2.500 bits/dim"


def test_two_who_ask_at_once_measure_once(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directions, and scores: the second waits for the first."""
    opened, begun = OpenRun.open(str(emoji_run)), threading.Event()
    computed: list[str] = []
    kept = module.kept

    def slow(folder: Path, name: str, *rest: Any) -> Any:
        computed.append(name)
        begun.set()
        if len(computed) == 1:
            second.wait(0.5)  # set by one that does not wait
        else:
            second.set()
        return kept(folder, name, *rest)

    monkeypatch.setattr(module, "kept", slow)
    for ask in (lambda: opened.directions("noise"), opened.scores):
        computed.clear()
        begun.clear()
        second = threading.Event()
        found: list[object] = []
        threads = [threading.Thread(target=lambda ask, to: to.append(ask()), args=(ask, found)) for _ in range(2)]
        threads[0].start()
        assert begun.wait(60)
        threads[1].start()
        for thread in threads:
            thread.join(60)
        assert len(computed) == 1
        assert found[0] is found[1]


def test_strengths_keep_six_digits() -> None:
    assert Edit((Add("a", "b", 0.123456),), (0.654321,)).options()[-3:] == ["0.123456", "--keep", "0.654321"]
