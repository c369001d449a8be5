"""``pyglow-fast edit``: what it draws, that its picture tells the command that repeats it, what it refuses."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.edits import ByHand, assert_repeatable, kept_command, rgb_of
from support.latent_runs import train
from support.odd_names import CLASSES, FILES, train_odd, train_several, write_odd_files
from torch import Tensor

from pyglow_fast import Glow
from pyglow_fast.cli import main
from pyglow_fast.train.figures import image_picture

Capture = pytest.CaptureFixture[str]
ODD = 'odd "run" of $HOME\'s'


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two levels: on emoji, on labelled digits, and on images whose classes have odd names."""
    root = tmp_path_factory.mktemp("edits")
    train_several(root, ODD)
    return root


def edit(run: Path, image: str, out: Path, *options: str) -> None:
    assert main(["edit", str(run), image, "--out", str(out), *options]) == 0


def words(adds: Sequence[tuple[str, str, float]]) -> list[str]:
    """As options."""
    return [word for plus, minus, s in adds for word in ("--add", plus, minus, str(s))]


def assert_shows(out: Path, pixels: Tensor, n_bins: int) -> None:
    """The picture is the image, to the bit."""
    wanted = image_picture(pixels, n_bins).permute(1, 2, 0).numpy()
    assert np.array_equal(rgb_of(out), wanted)


EMOJI_EDITS: list[tuple[list[tuple[str, str, float]], list[float], str]] = [
    ([("Discs", "rest", 1.0)], [], "noise"),
    ([("skin tone dark", "rest", 0.75), ("Squares", "Discs", -0.5)], [], "noise"),
    ([("skin tone dark", "skin tone light", 1.5)], [], "latent"),
    ([("Squares", "rest", 0.25)], [0.5, 1.0], "latent"),
    ([], [0.0, 0.25], "noise"),
    ([], [0.75, 0.0], "latent"),
]


@pytest.mark.parametrize(("adds", "keep", "space"), EMOJI_EDITS)
def test_emoji(place: Path, tmp_path: Path, adds: list[tuple[str, str, float]], keep: list[float], space: str) -> None:
    """As the latents API gives it, and not the image itself."""
    run, out = place / "emoji run", tmp_path / "x.png"
    by_hand = ByHand(run)
    shares = ["--keep", *map(str, keep)] if keep else []
    edit(run, "2", out, *words(adds), *shares, "--space", space)
    pixels, label = by_hand.held(2)
    wanted = by_hand.edited(pixels, label, space, adds, keep or None)
    assert_shows(out, wanted, by_hand.n_bins)
    assert not torch.equal(wanted, pixels)
    assert_repeatable(out)


DIGITS_EDITS: list[tuple[list[tuple[str, str, float]], list[float], list[str]]] = [
    ([("3", "rest", 1.0)], [], []),
    ([("3", "8", 1.0), ("1", "rest", -0.5)], [1.0, 0.5], ["--space", "latent"]),
    ([("9", "4", 0.5)], [0.25, 1.0], ["--space", "noise"]),
    ([("9", "4", 0.5)], [0.25, 0.5], ["--label", "4"]),
]


@pytest.mark.parametrize(("adds", "keep", "options"), DIGITS_EDITS)
def test_digits(
    place: Path, tmp_path: Path, adds: list[tuple[str, str, float]], keep: list[float], options: list[str]
) -> None:
    """Of a model with classes latents are edited, unless noise is asked for, under the image's class or another."""
    run, out = place / "digits", tmp_path / "x.png"
    by_hand = ByHand(run)
    shares = ["--keep", *map(str, keep)] if keep else []
    edit(run, "7", out, *words(adds), *shares, *options)
    pixels, label = by_hand.held(7)
    assert label is not None
    given = dict(zip(options[::2], options[1::2], strict=True))
    wanted = by_hand.edited(
        pixels, int(given.get("--label", label)), given.get("--space", "latent"), adds, keep or None
    )
    assert_shows(out, wanted, by_hand.n_bins)
    assert not torch.equal(wanted, pixels)
    again = assert_repeatable(out)
    assert again[again.index("--label") + 1] == given.get("--label", str(label))


def test_the_shift_of_pixels(place: Path, tmp_path: Path) -> None:
    run, out = place / "emoji run", tmp_path / "x.png"
    by_hand, adds = ByHand(run), [("skin tone dark", "rest", 1.0), ("Squares", "Discs", 0.5)]
    edit(run, "0", out, *words(adds), "--pixel-shift", "--scale", "3")
    wanted = by_hand.edited(by_hand.held(0)[0], None, "noise", adds, pixel_shift=True)
    assert np.array_equal(rgb_of(out), image_picture(wanted, by_hand.n_bins, 3).permute(1, 2, 0).numpy())
    assert_repeatable(out)


def test_a_strength_is_repeated_exactly(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    edit(place / "digits", "1", out, "--add", "3", "rest", "0.3000000000000004", "--keep", "0.3333333333", "1")
    command = assert_repeatable(out)
    assert command[command.index("rest") + 1] == "0.3"
    assert command[command.index("--keep") + 1] == "0.333333"


@pytest.mark.full
def test_another_checkpoint_and_fewer_training_images(place: Path, tmp_path: Path) -> None:
    """Are in the command that a picture holds."""
    run, out = place / "digits", tmp_path / "x.png"
    edit(run, "2", out, "--add", "3", "rest", "1", "--train-images", "40", "--best")
    command = assert_repeatable(out)
    assert command[command.index("--train-images") + 1] == "40"
    assert "--best" in command
    few = rgb_of(out)
    edit(run, "2", out, "--add", "3", "rest", "1")
    assert not np.array_equal(few, rgb_of(out))
    assert not {"--train-images", "--best"} & set(kept_command(out))
    edit(run, "2", out, "--train-images", "40")
    assert "--train-images" not in assert_repeatable(out)


@pytest.mark.full
@pytest.mark.parametrize("plus", CLASSES)
def test_odd_names(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plus: str) -> None:
    """Of classes, of the run and of files: the command in the picture is whole."""
    monkeypatch.chdir(tmp_path)
    write_odd_files(tmp_path)
    by_hand, n = ByHand(place / ODD), CLASSES.index(plus)
    minus, out = CLASSES[n - 1], tmp_path / "x.png"
    as_words = [f"\\{name}" if name[0] in "-\\" else name for name in (plus, minus)]
    options = ["--add", *as_words, "0.5", "--add", as_words[1], "rest", "-0.25", "--label", as_words[0]]
    file = FILES[n]
    edit(place / ODD, file, out, *options)
    command = assert_repeatable(out)
    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture))[None]
    label = by_hand.data.class_names.index(plus)
    adds = [(plus, minus, 0.5), (minus, "rest", -0.25)]
    assert_shows(out, by_hand.edited(pixels, label, "latent", adds), by_hand.n_bins)
    assert command[:3] == ["edit", str(place / ODD), file]
    assert (
        main(
            ["sample", str(place / ODD), "--n", "3", "--label", as_words[0], "--label", as_words[1], "--out", str(out)]
        )
        == 0
    )
    assert assert_repeatable(out).count("--label") == 2
    Path("-run").symlink_to(place / ODD)
    assert main(["edit", "--out", str(out), "--", "-run", "3"]) == 0
    assert assert_repeatable(out)[1] == "./-run"


@pytest.mark.full
@pytest.mark.parametrize("file", FILES)
def test_odd_files(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """The label is the likeliest, and told."""
    monkeypatch.chdir(tmp_path)
    write_odd_files(tmp_path)
    edit(place / "digits", file, tmp_path / "x.png", "--keep", "0.5", "0.5")
    assert "--label" in assert_repeatable(tmp_path / "x.png")


@pytest.mark.full
def test_a_sample_is_the_one_in_the_grid(place: Path, tmp_path: Path) -> None:
    """Of `sample` with the same options, for models with and without classes."""
    for run, options, image in (
        ("digits", ["--label", "3", "--label", "5", "--temperature", "0.123456789"], ":label=3:label=5"),
        ("emoji run", ["--temperature", "0.123456789"], ""),
    ):
        grid, out = tmp_path / "grid.png", tmp_path / "x.png"
        command = ["sample", str(place / run), "--n", "5", "--seed", "3", "--columns", "5", "--scale", "1"]
        assert main([*command, "--out", str(grid), *options]) == 0
        assert_repeatable(grid)
        shown = rgb_of(grid)
        side = shown.shape[0] - 4
        for number in range(5):
            name = f"sample:{number}:n=5:seed=3:temperature=0.123456789{image}"
            edit(place / run, name, out)
            left = 2 + number * (side + 2)
            assert np.array_equal(rgb_of(out), shown[2 : 2 + side, left : left + side]), (run, number)
            assert kept_command(out)[2] == name
    assert_repeatable(out)


def test_what_is_said(place: Path, tmp_path: Path, capsys: Capture) -> None:
    """Bits/dim before and after; the former are those that score gives."""
    edit(place / "digits", "0", tmp_path / "x.png", "--add", "3", "rest", "1")
    before, after, picture = capsys.readouterr().out.splitlines()
    pattern = r": (\d\.\d{3}) bits/dim, more than (\d+\.\d)% of 1000 training images"
    found = [re.fullmatch(f"{name}{pattern}", line) for name, line in (("before", before), ("after", after))]
    assert found[0] is not None
    assert found[1] is not None
    assert picture == f"picture: {tmp_path / 'x.png'}"
    assert main(["score", str(place / "digits"), "0", "--out", str(tmp_path / "x.csv")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line == before.replace("before", "  0")


def test_an_edit_that_runs_away(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """Parts that are not finite are grey, and it is said; latents that are not finite are refused."""
    monkeypatch.setattr("pyglow_fast.studio.edits.edited", lambda model, z, *rest: torch.full((1, 1, 8, 8), torch.nan))
    edit(place / "digits", "0", tmp_path / "x.png", "--keep", "0.5", "1")
    assert capsys.readouterr().out.startswith("note: parts of the edit are not finite, shown grey")
    grey = image_picture(torch.full((1, 8, 8), 8), 17).permute(1, 2, 0).numpy()  # of 17 grey levels the middle one
    assert np.array_equal(rgb_of(tmp_path / "x.png"), grey)
    encode = Glow.encode
    monkeypatch.setattr(Glow, "encode", lambda *args: [z * torch.inf for z in encode(*args)])
    assert main(["edit", str(place / "digits"), "0", "--out", str(tmp_path / "y.png")]) == 2
    message = "error: image: expected one whose latents are finite, found NaN or inf in those of 0\n"
    assert capsys.readouterr().err == message
    assert not (tmp_path / "y.png").exists()


@pytest.mark.full
def test_without_the_images_of_the_run(place: Path, tmp_path: Path, capsys: Capture) -> None:
    """Files and samples can be edited; attributes if they were measured before; why not is said in one line."""
    images = Path(shutil.copytree(place / "odd images", tmp_path / "images"))
    run, out = tmp_path / "run", tmp_path / "x.png"
    train_odd(images, run)
    shutil.copy(images / "12" / "0.png", tmp_path / "own.png")
    add = ["--add", "12", "rest", "1", "--space", "noise"]
    edit(run, str(tmp_path / "own.png"), tmp_path / "before.png", *add)
    shutil.move(images, tmp_path / "elsewhere")
    capsys.readouterr()
    edit(run, str(tmp_path / "own.png"), out, *add)
    assert "% of " in capsys.readouterr().out  # the scores were kept too
    assert out.read_bytes() == (tmp_path / "before.png").read_bytes()
    assert main(["score", str(run), str(tmp_path / "own.png"), "--picture", str(tmp_path / "p.png")]) == 0
    shutil.rmtree(run / "cache")
    capsys.readouterr()
    for image in (str(tmp_path / "own.png"), "sample:1"):
        edit(run, image, out, "--keep", "0.5", "1")
        said = capsys.readouterr().out
        assert re.fullmatch(r"before: [\d.]+ bits/dim\nafter: [\d.]+ bits/dim\npicture: .*\n", said)
        assert_repeatable(out)
        capsys.readouterr()
    assert main(["sample", str(run), "--out", str(out)]) == 0
    out.unlink()
    capsys.readouterr()
    for command in (
        ["edit", str(run), str(tmp_path / "own.png"), *add, "--out", str(out)],
        ["edit", str(run), "0", "--out", str(out)],
        ["score", str(run), str(tmp_path / "own.png"), "--picture", str(out)],
    ):
        assert main(command) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == f"error: folder: expected an existing folder, found '{images}'\n"
        assert not out.exists()
    assert main(["score", str(run), str(tmp_path / "own.png"), "--out", str(tmp_path / "s.csv")]) == 0
    assert "bits/dim\n" in capsys.readouterr().out  # beside nothing
    shutil.copytree(place / "odd images", images)
    (images / "12" / "0.png").unlink()
    assert main(["edit", str(run), "0", "--out", str(out)]) == 2
    message = f"error: data: expected the images of folder:{images} that the run was trained on, found others\n"
    assert capsys.readouterr().err == message


def test_a_run_without_classes_has_no_attributes(tmp_path: Path, capsys: Capture) -> None:
    (images := tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(images / f"{i}.png")
    train(f"folder:{images}", tmp_path / "run", "--size", "8", "--n-levels", "1", "--batch-size", "2")
    capsys.readouterr()
    assert main(["edit", str(tmp_path / "run"), "0", "--add", "a", "rest", "1", "--out", str(tmp_path / "x.png")]) == 2
    message = "error: plus: expected no attribute, since the run's images have none, found 'a'\n"
    assert capsys.readouterr().err == message
