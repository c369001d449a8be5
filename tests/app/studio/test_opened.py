"""An opened run: its frozen model, the images that a text names, and what is measured once for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.edits import ByHand

from pyglow_fast.app.studio import Draw, File, Grid, HeldOut, OpenRun, Scores, likelihood_text, parse_image
from pyglow_fast.app.studio.directions import measure
from pyglow_fast.app.studio.opened import kept
from pyglow_fast.data import Attributes, ImageSet, UnreadableImageError, from_dataset, load_digits
from pyglow_fast.latents import likeliest_class
from pyglow_fast.train import RunFolder, score_images, to_pixels


def test_held_out_images(digits_run: Path, emoji_run: Path) -> None:
    opened, by_hand = OpenRun.open(str(digits_run)), ByHand(digits_run)
    for number in (0, 7, 179):
        pixels, label = by_hand.held(number)
        picked = opened.pick(HeldOut(number))
        assert torch.equal(picked.pixels, pixels.to(torch.uint8))
        assert picked.label == label
        assert opened.pick(HeldOut(number), 3).label == 3
    with pytest.raises(ValueError, match=r"^image: expected a held-out image in 0..179, found 180$"):
        opened.pick(HeldOut(180))
    assert OpenRun.open(str(emoji_run)).pick(HeldOut(0)).label is None  # its classes are none of the model


def test_files(digits_run: Path, tmp_path: Path) -> None:
    """The likeliest class unless one is given."""
    opened = OpenRun.open(str(digits_run))
    values = np.random.default_rng(1).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "x.png")
    picked = opened.pick(parse_image(str(tmp_path / "x.png")))
    assert torch.equal(picked.pixels[0], torch.from_numpy(values.astype(np.int64) * 17 // 256).byte())
    best = int(likeliest_class(opened.model, opened.x(picked.pixels[None]))[0])
    assert picked.label == best
    assert opened.pick(picked.image, (best + 1) % 10).label == (best + 1) % 10
    with pytest.raises(ValueError, match=r"^label: expected a class in 0..9, found 10$"):
        opened.pick(parse_image("sample:0:label=10"))
    with pytest.raises(UnreadableImageError, match=r"^gone.png: expected"):
        opened.pick(File("gone.png"))


def test_images_of_other_levels_and_channels(emoji_run: Path) -> None:
    """Digits of 17 levels for a model of larger colour images: nothing of them is lost."""
    opened = OpenRun.open(str(emoji_run))
    digits = load_digits().pixels
    with pytest.warns(UserWarning, match="digits: grey becomes 3 equal channels, 17 grey levels become 256, as the"):
        found = opened.select("digits").images
    assert found.n_bins == opened.n_bins
    assert found.image_shape == opened.model.config.image_shape
    edge = (found.image_shape[1] - 8) // 2
    inner = found.pixels[:, :, edge:-edge, edge:-edge]
    most = opened.n_bins - 1
    assert torch.equal(inner, (digits.double() * most / 16).round().byte().expand(-1, 3, -1, -1))
    assert torch.equal((inner[:, :1].double() * 16 / most).round(), digits.double())


class Torn(list[torch.Tensor]):
    """Six images of which the second cannot be read."""

    def __getitem__(self, index: Any) -> Any:
        return self[6] if index == 1 else super().__getitem__(index)


def test_no_image_stands_for_another(emoji_run: Path) -> None:
    """One that cannot be read is no part of means, and refused where it is asked for."""
    opened = OpenRun.open(str(emoji_run))
    items = Torn(torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8))
    options: dict[str, Any] = {"labels": [0, 0, 0, 1, 1, 1], "on_unreadable": "skip", "in_memory": False}
    data = from_dataset(items, "torn", **options)
    opened._images = (data, torch.arange(2, 6), torch.arange(2))
    with pytest.raises(UnreadableImageError, match=r"^torn\[1\]: expected an image, found IndexError"):
        opened.pick(HeldOut(1))
    found, wanted = (
        measure(opened.model, data, chosen, "noise") for chosen in (torch.arange(6), torch.tensor([0, 2, 3, 4, 5]))
    )
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("labels", [(), (3, 8, 5)])
def test_samples(digits_run: Path, labels: tuple[int, ...]) -> None:
    """More than the model takes at a time: one stream of random numbers, and the classes in turn; each by its name."""
    opened, draw = OpenRun.open(str(digits_run)), Draw(70, 0.7, 3, labels)
    found, turn = Grid(opened, draw), labels or tuple(range(10))
    y = torch.tensor([turn[i % len(turn)] for i in range(70)])
    generator = torch.Generator().manual_seed(3)
    wanted = [opened.model.sample(len(part), 0.7, y=part, generator=generator) for part in y.split(64)]
    assert torch.equal(found.drawn.pixels, to_pixels(torch.cat(wanted), opened.n_bins))
    one = found.picked(69)
    assert (one.label, found.heads) == (int(y[69]), () if labels else opened.classes)
    again = opened.pick(parse_image(one.image.text))
    assert torch.equal(again.pixels, one.pixels)
    assert again[1:] == one[1:]


def test_classes(digits_run: Path, emoji_run: Path) -> None:
    """A model with classes is edited in latents; the folders' names of images are no classes of another model."""
    digits, emoji = OpenRun.open(str(digits_run)), OpenRun.open(str(emoji_run))
    assert (digits.space, digits.classes, digits.label("3")) == ("latent", tuple("0123456789"), 3)
    assert (emoji.space, emoji.classes) == ("noise", ())
    for ask in (lambda: emoji.label("Discs"), lambda: emoji.drawn(Draw(labels=(1,)))):
        with pytest.raises(ValueError, match=r"^label: expected no label, since the model has no classes, found "):
            ask()


def test_a_newer_checkpoint(emoji_run: Path) -> None:
    """Means by a sample's name another one."""
    newest, image = OpenRun.open(str(emoji_run), last=True), parse_image("sample:1:n=2")
    RunFolder(emoji_run).checkpoint.unlink()
    older = OpenRun.open(str(emoji_run), last=True)
    assert not torch.equal(newest.pick(image).pixels, older.pick(image).pixels)


def test_scores(emoji_run: Path) -> None:
    """Those of held-out and of training images; where an image stands among them, in words."""
    opened = OpenRun.open(str(emoji_run))
    assert likelihood_text(opened, 2.5, wait=False) == "2.500 bits/dim"
    assert opened.scores_at_hand(wait=False) is None
    found, by_hand = opened.scores(), ByHand(emoji_run)
    for side, values in ((by_hand.held_out, found.held_out), (by_hand.train, found.train)):
        wanted = score_images(by_hand.model, by_hand.data.subset(side), 50, 0, 1000).bits_per_dim
        assert torch.allclose(values, wanted, rtol=1e-5)
    middle = float(found.held_out.quantile(0.5, interpolation="higher"))
    share = found.share_below(middle)
    text = f"{middle:.3f} bits/dim, more than {share:.1%} of {len(by_hand.held_out)} held-out images"
    assert likelihood_text(opened, middle, wait=False) == likelihood_text(opened, middle) == text
    assert likelihood_text(opened, float("nan")) == "no finite likelihood"
    four = Scores(torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.zeros(0))
    assert [four.share_below(bits) for bits in (0.5, 2.0, 2.5, 9.0)] == [0.0, 0.25, 0.75, 1.0]


def test_what_is_far_from_held_out_images() -> None:
    """An image is far if it lies beyond their range by more than its length; a single outlier does not lengthen it."""
    scores = Scores(torch.cat([torch.linspace(2.0, 3.0, 999), torch.tensor([90.0])]).double(), torch.zeros(1))
    assert [scores.bounded(bits) for bits in (1.2, 2.5, 3.8)] == [1.2, 2.5, 3.8]
    assert [scores.bounded(bits) for bits in (-9.0, 9.0)] == pytest.approx([1.0, 4.0], abs=0.05)


def test_the_image_to_which_most_can_be_added(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that lacks most of what others of its class have; without attributes the first of all."""
    opened, held_out = OpenRun.open(str(emoji_run)), torch.tensor([3, 2, 1, 0])
    both = Attributes(("x", "y"), torch.tensor([[True, False], [False, False], [False, True], [False, False]]))
    pixels = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)

    def plainest(labels: list[int], attributes: Attributes | None) -> int:
        data = ImageSet("four", pixels, 256, torch.tensor(labels), ("a", "b"), attributes=attributes)
        monkeypatch.setattr(opened, "_images", (data, held_out, held_out))
        return opened.plainest()

    assert [plainest([0, 0, 0, 1], both), plainest([0, 1, 0, 0], both), plainest([0] * 4, None)] == [2, 0, 0]


def measured(opened: OpenRun) -> tuple[object, ...]:
    """All that is measured of a checkpoint, as lists."""
    directions, scores = opened.directions(), opened.scores()
    tensors = (*directions.means, directions.reach, *scores)
    return directions.names, directions.n_classes, [tensor.tolist() for tensor in tensors]


def test_measured_once_for_a_checkpoint(emoji_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured is read without the images; of an older checkpoint it is other."""
    first = measured(OpenRun.open(str(emoji_run)))
    files = sorted(RunFolder(emoji_run).cache.iterdir())
    monkeypatch.setattr(OpenRun, "images", lambda opened: pytest.fail("measured again"))
    assert measured(OpenRun.open(str(emoji_run))) == first
    monkeypatch.undo()
    RunFolder(emoji_run).checkpoint.unlink()
    assert measured(OpenRun.open(str(emoji_run), last=True)) != first
    assert set(files) < set(RunFolder(emoji_run).cache.iterdir())


def test_few_files_stay(tmp_path: Path) -> None:
    """Of all checkpoints that a page saw while a run was trained."""
    for number in range(7):
        kept(tmp_path, "scores", {"digest": number}, lambda: {"x": torch.zeros(1)})
    assert len(list(tmp_path.iterdir())) == 4
