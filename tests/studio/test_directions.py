"""Mean latents with and without attributes: their values, and that they are measured once for a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.commands import Command
from support.data_layouts import write_celeba
from support.edits import ByHand
from support.latent_runs import train, write_emoji

from pyglow_fast.cli import main
from pyglow_fast.data import load_data
from pyglow_fast.latents import to_space
from pyglow_fast.studio import opened as module
from pyglow_fast.studio.directions import Add, Directions, measure
from pyglow_fast.studio.opened import LostImagesError, OpenRun
from pyglow_fast.train import RunFolder


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The spaces of the passes over training images that were made."""
    made: list[str] = []

    def counting(model: Any, data: Any, groups: Any, space: str, *rest: Any) -> dict[str, torch.Tensor]:
        made.append(space)
        return measure(model, data, groups, space, *rest)

    monkeypatch.setattr(module, "measure", counting)
    return made


def same(a: Directions, b: Directions) -> bool:
    tensors = [(*item.means, item.pixels, item.counts) for item in (a, b)]
    return a[:2] == b[:2] and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("space", ["noise", "latent"])
def test_the_means(emoji_run: Path, space: str) -> None:
    """Of each attribute and of the rest, image by image in float64; the counts of both."""
    by_hand, told = ByHand(emoji_run), list[tuple[int, int]]()
    found = OpenRun.open(str(emoji_run)).directions(space, lambda done, total: told.append((done, total)))
    assert found.space == space
    assert found.names == ("Discs", "Squares", "skin tone light", "skin tone dark")
    for a, name in enumerate(found.names):
        for side, indices in enumerate(by_hand.chosen(name)):
            pixels, _ = by_hand.data.batch(indices)
            x = by_hand.x(pixels)
            with torch.no_grad():
                values = [*to_space(by_hand.model, x, space), x]
            assert int(found.counts[a, side]) == len(indices)
            for mean, value in zip((*found.means, found.pixels), values, strict=True):
                wanted = value.double().mean(0)
                # float32 latents in batches of other sizes, and the mean rounded to float32
                scale = float(value.abs().max())
                assert torch.allclose(mean[a, side].double(), wanted, rtol=0, atol=1e-5 * scale)
    total = len(by_hand.train)
    assert told[-1] == (total, total)


def test_the_sum_of_shifts(emoji_run: Path) -> None:
    found = OpenRun.open(str(emoji_run)).directions("noise")
    adds = [Add("Discs", "rest", 0.5), Add("skin tone dark", "skin tone light", -2.0), Add("Squares", "rest", 0.0)]
    shift, pixels = found.shift(adds)
    assert shift is not None
    assert pixels is not None
    for part, mean in zip((*shift, pixels), (*found.means, found.pixels), strict=True):
        assert torch.equal(part, 0.5 * (mean[0, 0] - mean[0, 1]) + -2.0 * (mean[3, 0] - mean[2, 0]))
    assert found.shift([]) == (None, None)
    assert found.shift(adds[2:]) == (None, None)
    for wrong, message in (
        (Add("Circles", "rest", 1.0), "plus: expected one of Discs, Squares, .*, found 'Circles'"),
        (Add("Circles", "rest", 0.0), "plus: expected one of"),
        (Add("Discs", "others", 1.0), "minus: expected rest or one of Discs, "),
        (Add("Discs", "Discs", 1.0), "minus: expected another attribute than plus"),
        (Add("Discs", "rest", float("nan")), "strength: expected a finite number, found nan"),
        (Add("Discs", "rest", float("-inf")), "strength: expected a finite number, found -inf"),
        (Add("Discs", "rest", 3e38 * 1e10), "strength: expected numbers whose edit float32 can hold"),
    ):
        with pytest.raises(ValueError, match=message):
            found.shift([*adds, wrong])


def test_images_without_any_attribute_count(tmp_path: Path) -> None:
    """Of the 12 training images 6 smile, and those that do not have no attribute at all."""
    write_celeba(tmp_path, "0" * 12 + "22")
    train(f"celeba:{tmp_path}", tmp_path / "run", "--size", "16", "--n-levels", "1")
    found = OpenRun.open(str(tmp_path / "run")).directions("noise")
    assert found.names == ("Smiling",)
    assert found.counts.tolist() == [[6, 6]]
    data = load_data(RunFolder(tmp_path / "run").read_config().data)
    x = (data.batch(torch.arange(12))[0].double() + 0.5) / data.n_bins - 0.5
    for side, mean in enumerate((x[1::2].mean(0), x[::2].mean(0))):
        assert torch.allclose(found.pixels[0, side].double(), mean, rtol=0, atol=2**-24)  # |x| <= 1/2, and 12 of them


def test_a_class_named_rest() -> None:
    """As minus the word is the images without, whatever the classes are called."""
    means = torch.arange(6.0).reshape(3, 2, 1)
    found = Directions("noise", ("a", "b", "rest"), torch.ones(3, 2), (means,), 10 * means)
    for plus, difference in (("a", -1.0), ("rest", -1.0)):
        shift, _ = found.shift([Add(plus, "rest", 1.0)])
        assert shift is not None
        assert shift[0].item() == difference
    shift, _ = found.shift([Add("rest", "a", 1.0)])
    assert shift is not None
    assert shift[0].item() == 4.0


def test_measured_once(emoji_run: Path, passes: list[str]) -> None:
    """For each space and checkpoint, whoever opens the run."""
    opened = OpenRun.open(str(emoji_run))
    first = opened.directions("noise")
    assert opened.directions("noise") is first
    assert same(OpenRun.open(str(emoji_run)).directions("noise"), first)
    assert passes == ["noise"]
    opened.directions("latent")
    assert passes == ["noise", "latent"]
    few = OpenRun.open(str(emoji_run), train_images=10).directions("noise")
    assert passes == ["noise", "latent", "noise"]
    assert few.counts[0].tolist() == [5, 5]
    assert same(OpenRun.open(str(emoji_run), train_images=10).directions("noise"), few)
    assert len(passes) == 3
    newest, older, *_ = RunFolder(emoji_run).saved()
    newest.rename(emoji_run / "aside")
    other = OpenRun.open(str(emoji_run))
    assert other.step == int(older.stem.partition("-")[2])
    assert not same(other.directions("latent"), opened.directions("latent"))
    assert len(passes) == 4
    (emoji_run / "aside").rename(newest)
    assert same(OpenRun.open(str(emoji_run)).directions("latent"), opened.directions("latent"))
    assert len(passes) == 4


@pytest.mark.full
def test_read_by_another_process_without_the_images(tmp_path: Path) -> None:
    """What was not measured before they went away cannot be had."""
    write_emoji(tmp_path / "emoji")
    run = tmp_path / "run"
    train(f"emoji:{tmp_path / 'emoji'}", run, "--size", "16", "--n-levels", "2")
    code = (
        "import json, sys\nfrom pyglow_fast.studio.opened import OpenRun\n"
        "found = OpenRun.open(sys.argv[1]).directions('latent')\n"
        "print(json.dumps([found.names, found.counts.tolist(), [float(mean.double().sum()) for mean in found.means]]))"
    )
    first = OpenRun.open(str(run)).directions("latent")
    (tmp_path / "emoji").rename(tmp_path / "elsewhere")
    command = Command(["-c", code, str(run)], tmp_path)
    out, err = command.communicate()
    assert command.returncode == 0, err
    sums = [float(mean.double().sum()) for mean in first.means]
    assert json.loads(out) == [list(first.names), first.counts.tolist(), sums]
    with pytest.raises(LostImagesError, match="emoji: expected"):
        OpenRun.open(str(run)).directions("noise")


def test_a_damaged_file_is_measured_again(emoji_run: Path, passes: list[str]) -> None:
    first = OpenRun.open(str(emoji_run)).directions("noise")
    (path,) = RunFolder(emoji_run).cache.iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    assert same(OpenRun.open(str(emoji_run)).directions("noise"), first)
    assert len(passes) == 2
    assert {name: tensor.dtype for name, tensor in load_file(path).items() if name[:5] == "level"} == {
        "level0": torch.float32,
        "level1": torch.float32,
    }


def test_a_folder_that_cannot_be_written(emoji_run: Path, passes: list[str]) -> None:
    RunFolder(emoji_run).cache.write_text("a file")
    for _ in range(2):
        with pytest.warns(UserWarning, match="not kept"):
            OpenRun.open(str(emoji_run)).directions("noise")
    assert len(passes) == 2


def test_a_new_run_in_the_folder_begins_without(emoji_images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--size", "16", "--n-levels", "1", "--max-steps", "2"]
    train(f"emoji:{emoji_images}", out, *options)
    OpenRun.open(str(out)).directions("noise")
    assert len(list(RunFolder(out).cache.iterdir())) == 1
    train(f"emoji:{emoji_images}", out, *options, "--overwrite")
    assert not RunFolder(out).cache.exists()


def folder(root: Path) -> Path:
    """Twelve images of each of two classes."""
    for name, bright in (("dark", 0), ("light", 150)):
        (root / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(bright, bright + 90, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return root


@pytest.mark.full
def test_images_that_cannot_be_read(tmp_path: Path) -> None:
    """Are left out of both means, with "skip", and never counted for another one that stands in for them."""
    images = folder(tmp_path / "images")
    options = ["--size", "8", "--n-levels", "1", "--from-files", "--workers", "0", "--held-out", "0.25"]
    train(f"folder:{images}", tmp_path / "run", *options, "--on-unreadable", "skip")
    train(f"folder:{images}", tmp_path / "strict", *options)
    by_hand = ByHand(tmp_path / "run")
    whole = OpenRun.open(str(tmp_path / "run")).directions("noise")
    shutil.rmtree(tmp_path / "run" / "cache")
    trained_on = by_hand.train.tolist()
    bad = [i for i in range(11) if {i, i + 1} <= set(trained_on)][::2][:2]  # the next one stands in: a training image
    assert len(bad) == 2
    paths = sorted(images.rglob("*.png"))
    for index in bad:
        size = paths[index].stat().st_size
        paths[index].write_bytes(b"no image".ljust(size))
    found = OpenRun.open(str(tmp_path / "run")).directions("noise")
    assert whole.counts.tolist() == [[len(side) for side in by_hand.chosen(name)] for name in ("dark", "light")]
    dark, light = whole.counts[:, 0].tolist()
    assert found.counts.tolist() == [[dark - 2, light], [light, dark - 2]]
    good = [i for i in trained_on if i not in bad and i < 12]
    pixels, _ = load_data(by_hand.config.data).batch(torch.tensor(good))
    wanted = by_hand.x(pixels).double().mean(0)
    assert torch.allclose(found.pixels[0, 0].double(), wanted, rtol=0, atol=1e-7)
    out = str(tmp_path / "x.png")
    assert main(["edit", str(tmp_path / "strict"), "0", "--add", "light", "dark", "1", "--out", out]) == 2


def test_one_attribute_without_an_image_left(tmp_path: Path) -> None:
    """Is refused, in words."""
    images = folder(tmp_path / "images")
    options = ["--size", "8", "--n-levels", "1", "--from-files", "--workers", "0", "--on-unreadable", "skip"]
    train(f"folder:{images}", tmp_path / "run", *options)
    for path in (images / "dark").iterdir():
        path.write_bytes(b"no image".ljust(path.stat().st_size))
    with pytest.raises(ValueError, match="latents: expected at least one image, found none"):
        OpenRun.open(str(tmp_path / "run")).directions("noise")
