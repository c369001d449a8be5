"""The commands that measure: the files they write, the figures they print, what they warn of."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.edits import ByHand
from support.program import done, pyglow_fast, rows
from torch import Tensor

from pyglow_fast import Glow
from pyglow_fast.data import ImageSet, load_digits, split
from pyglow_fast.train import score_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 8x8 images of two classes, smooth and rough, the first one with a file that is no image."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, roughness in (("smooth", 8), ("rough", 255)):
        for i in range(24):
            path = root / name / f"class{i % 2}"
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, roughness, (8, 8), dtype=np.uint8)).save(path / f"{i:02}.png")
    (root / "smooth" / "class0" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return root


@pytest.fixture(scope="module")
def smooth(folders: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the smooth ones, which reads them when needed and skips what it cannot read. Not to be changed."""
    out = tmp_path_factory.mktemp("run") / "smooth"
    options = "--size 8 --gray --from-files --on-unreadable skip --workers 0 --batch-size 4 --max-steps 30"
    command = ["train", f"folder:{folders / 'smooth'}", "--out", str(out), "--held-out", "0.5", "--quiet"]
    done(*command, *options.split(), *tiny)
    return out


def printed(text: str, name: str = "model") -> tuple[float, float]:
    """(mean, standard error) in the line that begins with ``name``."""
    found = re.search(rf"^  {re.escape(name)} +([\d.]+|nan) +± ([\d.]+|n/a) bits/dim", text, re.MULTILINE)
    assert found is not None, text
    return float(found.group(1)), float(found.group(2))


@pytest.mark.parametrize("part", ["held-out", "train", "all"])
def test_score_is_evaluate_image_by_image(trained: Path, tmp_path: Path, part: str) -> None:
    out = tmp_path / "x.csv"
    wanted = printed(done("evaluate", trained, "--part", part, "--seed", 3))
    text = done("score", trained, "digits", "--part", part, "--seed", 3, "--out", out)
    assert printed(text) == wanted
    assert text.splitlines()[-1] == str(out)
    found = rows(out)
    values = np.array([float(row["bits_per_dim"]) for row in found])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert wanted == (round(float(values.mean()), 3), round(float(error), 3))
    digits = load_digits()
    train, held_out = split(digits, None, 0)
    positions = {"held-out": held_out, "train": train, "all": torch.arange(len(digits))}[part].tolist()
    assert [int(row["index"]) for row in found] == positions  # in the whole set, whichever part is scored
    assert [int(row["label"]) for row in found] == digits.labels[positions].tolist()


def test_images_that_cannot_be_read(smooth: Path, folders: Path, tiny: list[str], tmp_path: Path) -> None:
    """They are left out and named where the run leaves them out, else refused in one line that names the file."""
    data, out = f"folder:{folders / 'smooth'}", tmp_path / "x.csv"
    assert "  1 image that cannot be read: 12 (class0/torn.png)\n" in done(
        "score", smooth, data, "--part", "all", "--out", out
    )
    assert [row["name"] for row in rows(out)[:2]] == ["class0/00.png", "class0/02.png"]
    assert [int(row["index"]) for row in rows(out)] == [*range(12), *range(13, 25)]
    spoilt = Path(shutil.copytree(folders / "rough", tmp_path / "spoilt"))
    options = "--size 8 --gray --from-files --workers 0 --batch-size 4 --max-steps 1 --quiet"
    done("train", f"folder:{spoilt}", "--out", tmp_path / "r", *options.split(), *tiny)
    for path in spoilt.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n".ljust(path.stat().st_size))
    out.write_text("precious")
    for command in (["score", "--part", "all", "--out", str(out)], ["evaluate"], ["levels"]):
        ended = pyglow_fast(command[0], tmp_path / "r", f"folder:{spoilt}", *command[1:])
        assert ended.code == 2
        assert "png: expected an image that Pillow can decode" in ended.err
    assert out.read_text() == "precious"


def test_images_without_a_likelihood(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, bad = tmp_path / "x.csv", {2: float("nan"), 5: float("-inf")}

    def spoilt(name: str) -> Any:
        whole = getattr(Glow, name)

        def log_prob(self: Glow, *args: Any, **options: Any) -> Tensor:
            found: Tensor = whole(self, *args, **options).clone()
            for index, value in bad.items():
                found[index] = value
            return found

        return log_prob

    command = ["score", trained, "digits", "--out", out, "--batch-size", 180]
    done(*command)
    kept = [float(row["bits_per_dim"]) for i, row in enumerate(rows(out)) if i not in bad]
    for name in ("log_prob", "class_log_probs"):
        monkeypatch.setattr(Glow, name, spoilt(name))
    text = done(*command)
    assert "  2 images without a finite likelihood, left out of the figures: " in text
    assert [rows(out)[i]["bits_per_dim"] for i in bad] == ["nan", "inf"]
    assert printed(text)[0] == round(float(np.mean(kept)), 3)
    bad.update(dict.fromkeys(range(180), float("nan")))
    assert "no image has a likelihood" in done(*command)
    ood = ["ood", str(trained), "digits", "--other-part", "train", "--batch-size", "180", "--n", "180"]
    message = "error: data: expected at least 2 images with a finite likelihood, found 0 in digits\n"
    assert pyglow_fast(*ood, "--out", tmp_path / "x.png") == (2, "", message)
    assert not (tmp_path / "x.png").exists()


def test_score_of_files(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image by itself, so that the order does not matter; samples and held-out images too."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("12", "it's $odd.png", "digits")):  # names that could be something else
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(name, "PNG")
    names = ["./12", "it's $odd.png", "3", "sample:1:n=2:seed=0:temperature=0.7:label=4"]
    texts = [done("score", trained, *order, "--out", "x.csv") for order in (names, names[::-1])]
    assert texts[0].splitlines()[1:5] == texts[1].splitlines()[4:0:-1]
    found = rows(Path("x.csv"))
    assert [row["name"] for row in found] == names[::-1]
    by_hand = ByHand(trained)
    pixels, label = by_hand.held(3)
    one = ImageSet("one", pixels[None], 17, torch.tensor([label]), by_hand.data.class_names)
    bits = float(score_images(by_hand.model, one, 1, seed=0).bits_per_dim[0])
    assert float(found[1]["bits_per_dim"]) == pytest.approx(bits, abs=1e-6)
    assert found[0]["label"] == "4"
    done("score", trained, "digits", "--out", "y.csv")  # the file of that name, not the images
    assert len(rows(Path("y.csv"))) == 1


def test_the_caveat(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign images that are more likely: said, and typicality flags them all the same."""
    data, log_probs = load_digits(), Glow.class_log_probs

    def liking_flat_images(self: Glow, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return log_probs(self, x, *args, **options) + 1e4 * (x.flatten(1).std(1) < 0.1)[:, None]

    monkeypatch.setattr(Glow, "class_log_probs", liking_flat_images)
    pixels = torch.randint(3, data.pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sources = iter([data, replace(data, name="flat", pixels=pixels)])
    monkeypatch.setattr("pyglow_fast.app.studio.opened.load_data", lambda config: next(sources))
    text = done("ood", trained, "digits", "digits", "--n", 150, "--typicality", "--out", tmp_path / "x.png")
    assert "AUROC 0.0000 ± n/a: how often an image of flat, all has more bits/dim than one of digits, held-out" in text
    assert "AUROC 1.0000 ± n/a by typicality" in text
    assert "note: the foreign images are the MORE likely ones." in text
    assert "note: the model has classes" in text
