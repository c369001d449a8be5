"""``pyglow-fast score`` and ``pyglow-fast ood``: the files they write, the figures they print, what they refuse."""

from __future__ import annotations

import csv
import errno
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.latent_runs import train, write_emoji
from torch import Tensor

from pyglow_fast import Glow
from pyglow_fast.cli import main
from pyglow_fast.data import load_digits, split

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 8x8 images of two classes, smooth and rough, the first one with a file that is no image."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, roughness in (("smooth", 8), ("rough", 255)):
        for i in range(24):
            path = root / name / f"class{i % 2}"
            path.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, roughness, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"{i:02}.png")
    (root / "smooth" / "class0" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return root


@pytest.fixture(scope="module")
def smooth(folders: Path, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the smooth ones, which reads them when needed and skips what it cannot read. Not to be changed."""
    out = tmp_path_factory.mktemp("run") / "smooth"
    options = ["--size", "8", "--gray", "--from-files", "--on-unreadable", "skip", "--workers", "0"]
    options += ["--batch-size", "4", "--max-steps", "30", "--held-out", "0.5", "--quiet"]
    assert main(["train", f"folder:{folders / 'smooth'}", "--out", str(out), *options, *tiny]) == 0
    return out


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def printed(text: str, name: str = "model") -> tuple[float, float]:
    """(mean, standard error) in the line that begins with ``name``."""
    found = re.search(rf"^  {re.escape(name)} +([\d.]+|nan) +± ([\d.]+|n/a) bits/dim", text, re.MULTILINE)
    assert found is not None, text
    return float(found.group(1)), float(found.group(2))


@pytest.mark.parametrize("part", ["held-out", "train", "all"])
def test_score_is_evaluate_image_by_image(trained: Path, tmp_path: Path, part: str, capsys: Capture) -> None:
    out = tmp_path / "x.csv"
    assert main(["evaluate", str(trained), "digits", "--part", part, "--seed", "3"]) == 0
    wanted = printed(capsys.readouterr().out)
    assert main(["score", str(trained), "digits", "--part", part, "--seed", "3", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert printed(text) == wanted
    assert text.splitlines()[-1] == str(out)
    found = rows(out)
    values = np.array([float(row["bits_per_dim"]) for row in found])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert wanted == (round(float(values.mean()), 3), round(float(error), 3))
    digits = load_digits()
    assert digits.labels is not None
    train, held_out = split(digits, None, 0)
    positions = {"held-out": held_out, "train": train, "all": torch.arange(len(digits))}[part].tolist()
    assert [int(row["index"]) for row in found] == positions  # in the whole set, whichever part is scored
    assert [int(row["label"]) for row in found] == digits.labels[positions].tolist()


def test_score_with_several_draws(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """The mean over draws has less noise of its own; what stays is the spread over images."""
    for draws in ("1", "4"):
        out = str(tmp_path / f"{draws}.csv")
        assert main(["score", str(trained), "digits", "--out", out, "--samples", draws]) == 0
    assert "4 draws each with a mean standard deviation of 0." in capsys.readouterr().out
    one, four = rows(tmp_path / "1.csv"), rows(tmp_path / "4.csv")
    assert list(one[0]) == ["index", "label", "bits_per_dim"]
    assert list(four[0]) == ["index", "label", "bits_per_dim", "bits_per_dim_sd"]
    assert all(float(row["bits_per_dim_sd"]) > 0 for row in four)


def test_a_full_disk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (out := tmp_path / "s.csv").write_text("before")

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr("pyglow_fast.train.files.os.replace", full)
    assert main(["score", str(trained), "digits", "--out", str(out)]) == 1
    assert capsys.readouterr().err == f"error: [Errno {errno.ENOSPC}] No space left on device: '{out}'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["s.csv"]
    assert out.read_text() == "before"


def test_score_names_files(smooth: Path, folders: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "x.csv"
    assert main(["score", str(smooth), f"folder:{folders / 'smooth'}", "--part", "all", "--out", str(out)]) == 0
    found = rows(out)
    assert [row["name"] for row in found[:3]] == ["class0/00.png", "class0/02.png", "class0/04.png"]
    assert [row["label"] for row in found] == ["class0"] * 12 + ["class1"] * 12
    assert [int(row["index"]) for row in found] == [*range(12), *range(13, 25)]
    assert "  1 image that cannot be read: 12 (class0/torn.png)\n" in capsys.readouterr().out
    own = {row["index"]: row for row in found}
    assert main(["score", str(smooth), f"folder:{folders / 'smooth'}", "--out", str(out)]) == 0
    held_out = rows(out)
    assert 0 < len(held_out) < len(found)
    assert all(own[row["index"]]["name"] == row["name"] for row in held_out)


def test_an_unreadable_image_of_another_run(folders: Path, tiny: list[str], tmp_path: Path, capsys: Capture) -> None:
    """Which does not skip such images: refused in a line that names it, and the former file is as it was."""
    options = ["--size", "8", "--gray", "--from-files", "--workers", "0", "--batch-size", "4", "--max-steps", "1"]
    rough, out = folders / "rough", tmp_path / "x.csv"
    spoilt = Path(shutil.copytree(rough, tmp_path / "spoilt"))
    assert main(["train", f"folder:{spoilt}", "--out", str(tmp_path / "r"), "--quiet", *options, *tiny]) == 0
    for path in spoilt.rglob("*.png"):
        path.write_bytes(b"\x89PNG\r\n\x1a\n".ljust(path.stat().st_size))
    out.write_text("precious")
    capsys.readouterr()
    assert main(["score", str(tmp_path / "r"), f"folder:{spoilt}", "--part", "all", "--out", str(out)]) == 2
    assert "class0/00.png: expected an image that Pillow can decode" in capsys.readouterr().err
    assert out.read_text() == "precious"


def spoil(monkeypatch: pytest.MonkeyPatch, values: dict[int, float]) -> None:
    """The model gives these images of a batch another likelihood."""
    log_prob = Glow.log_prob

    def spoilt(self: Glow, *args: Any, **options: Any) -> Tensor:
        found = log_prob(self, *args, **options).clone()
        for index, value in values.items():
            found[index] = value
        return found

    monkeypatch.setattr(Glow, "log_prob", spoilt)


def test_images_without_a_likelihood(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "x.csv"
    command = ["score", str(trained), "digits", "--part", "all", "--out", str(out), "--batch-size", "1797"]
    assert main(command) == 0
    before = rows(out)
    capsys.readouterr()
    spoil(monkeypatch, {2: float("nan"), 5: float("-inf")})
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "  2 images without a finite likelihood, left out of the figures: 2, 5\n" in text
    found = rows(out)
    assert (found[2]["bits_per_dim"], found[5]["bits_per_dim"]) == ("nan", "inf")
    kept = [float(row["bits_per_dim"]) for i, row in enumerate(before) if i not in (2, 5)]
    assert printed(text)[0] == round(float(np.mean(kept)), 3)
    assert "1795 images" in text
    monkeypatch.undo()
    spoil(monkeypatch, dict.fromkeys(range(180), float("nan")))
    assert main(["score", str(trained), "digits", "--out", str(out), "--batch-size", "180"]) == 0
    assert "no image has a likelihood" in capsys.readouterr().out
    both = ["digits", "digits", "--other-part", "train", "--batch-size", "180", "--n", "180"]
    assert main(["ood", str(trained), *both, "--out", str(tmp_path / "x.png")]) == 2
    message = "error: data: expected at least 2 images with a finite likelihood, found 0 in digits\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "x.png").exists()


def test_two_sets_of_one_name_are_told_apart(tmp_path: Path, capsys: Capture) -> None:
    """All emoji are named emoji, from whichever folder."""
    for name, emoji in (("a", 12), ("b", 4)):
        write_emoji(tmp_path / name, emoji)
    own, foreign = (f"emoji:{tmp_path / name}" for name in "ab")
    train(own, tmp_path / "run", "--size", "16", "--n-levels", "1")
    files = ["--out", str(tmp_path / "x.png"), "--csv", str(tmp_path / "x.csv")]
    assert main(["ood", str(tmp_path / "run"), own, foreign, "--part", "all", *files]) == 0
    assert f"  {own}, all " in capsys.readouterr().out
    sets = [row["set"] for row in rows(tmp_path / "x.csv")]
    assert sets == [f"{own}, all"] * (4 * 12) + [f"{foreign}, all"] * (4 * 4)


@pytest.mark.drawn
def test_ood_of_rougher_images(smooth: Path, folders: Path, tmp_path: Path, capsys: Capture) -> None:
    """Which have far more bits/dim: AUROC 1. The CSV file holds both sets, each with its indices and names."""
    own, foreign = (f"folder:{folders / name}" for name in ("smooth", "rough"))
    files = ["--out", str(tmp_path / "x.png"), "--csv", str(tmp_path / "x.csv")]
    assert main(["ood", str(smooth), own, foreign, *files, "--typicality"]) == 0
    text = capsys.readouterr().out
    assert "AUROC 1.0000 ± n/a: how often" in text
    assert "AUROC 1.0000 ± n/a by typicality" in text
    assert "MORE likely" not in text
    assert text.splitlines()[-2:] == [files[1], files[3]]
    found = rows(tmp_path / "x.csv")
    sets = {name: [row for row in found if row["set"] == name] for name in (f"{own}, held-out", f"{foreign}, all")}
    assert [len(part) for part in sets.values()] == [sum(map(len, sets.values())) - 24, 24]
    first, second = (printed(text, name) for name in (f"{own}, held-out", f"{foreign}, all"))
    for (mean, _), part in zip((first, second), sets.values(), strict=True):
        assert mean == round(float(np.mean([float(row["bits_per_dim"]) for row in part])), 3)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (960, 540)


def test_the_caveat(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Foreign images that are more likely: said, and typicality flags them all the same."""
    data = load_digits()
    out = str(tmp_path / "x.png")
    log_prob = Glow.log_prob

    def liking_flat_images(self: Glow, x: Tensor, *args: Any, **options: Any) -> Tensor:
        return log_prob(self, x, *args, **options) + 1e4 * (x.flatten(1).std(1) < 0.1)

    monkeypatch.setattr(Glow, "log_prob", liking_flat_images)
    pixels = torch.randint(3, data.pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sources = iter([data, replace(data, name="flat", pixels=pixels)])
    monkeypatch.setattr("pyglow_fast.studio.selection.load_data", lambda config: next(sources))
    assert main(["ood", str(trained), "digits", "digits", "--out", out, "--n", "150", "--typicality"]) == 0
    text = capsys.readouterr().out
    assert "AUROC 0.0000 ± n/a: how often an image of flat, all has more bits/dim than one of digits, held-out" in text
    assert "AUROC 1.0000 ± n/a by typicality" in text
    assert "note: the foreign images are the MORE likely ones." in text
    assert "note: the model has classes" in text
    assert "150 images" in text


def test_the_run_against_its_own_training_images(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """After 20 steps nothing is learnt by heart: chance, which is no reason for the caveat."""
    out = str(tmp_path / "x.png")
    assert main(["ood", str(trained), "digits", "digits", "--other-part", "train", "--out", out]) == 0
    text = capsys.readouterr().out
    found = re.search(r"^AUROC ([\d.]+) ± ([\d.]+):", text, re.MULTILINE)
    assert found is not None
    assert abs(float(found.group(1)) - 0.5) < 4 * float(found.group(2))
    assert "MORE likely" not in text
    assert "digits, train" in text


def test_a_missing_library(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Is missed before anything is computed."""
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)  # None makes the import fail
    monkeypatch.setattr("pyglow_fast.cli.ood.scored", lambda *args: pytest.fail("computed"))
    assert main(["ood", str(trained), "digits", "digits", "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.startswith("error: scikit-learn is needed for AUROC and histogram")


def test_typicality_without_the_training_images(
    smooth: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    rough = Path(shutil.copytree(folders / "rough", tmp_path / "rough"))
    other = Path(shutil.copytree(folders / "rough", tmp_path / "other"))
    (other / "class0" / "00.png").unlink()
    run = Path(shutil.copytree(smooth, tmp_path / "run"))
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace(str(folders / "smooth"), str(tmp_path / "gone")))
    command = ["ood", str(run), f"folder:{rough}", f"folder:{other}", "--out", str(tmp_path / "x.png")]
    monkeypatch.setattr("pyglow_fast.cli.ood.trained_on", lambda checkpoint: None)
    capsys.readouterr()
    assert main([*command, "--typicality"]) == 2
    assert re.fullmatch(
        "error: typicality: expected the images that the run was trained on, found folder:.*smooth, "
        "which is no longer there or has changed\n",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "x.png").exists()
