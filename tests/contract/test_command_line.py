"""The command line from end to end: what each command leaves behind and says, what repeats, and what is refused.

A user loses the command, its files or its reproducibility where one of these fails. Only arguments, exit codes, files
and words are looked at.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.edits import assert_repeatable, rgb_of
from support.html_page import Page
from support.program import contents, done, pyglow_fast, rows, untimed
from support.tiny_run import CLASSES, HELD_OUT, IMAGES, MODEL, SIDE, STEPS, made

DATA = "folder:images"


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: ``images`` and ``run``. Nothing in it may be changed."""
    found = made(tmp_path_factory)
    monkeypatch.chdir(found)
    return found


def size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture that can be read whole."""
    height, width, _ = rgb_of(path).shape
    return width, height


def figure(text: str, name: str) -> float:
    """The number behind ``name`` at the beginning of a line."""
    found = re.search(rf"^\s*{re.escape(name)}\s+([-\d.]+)", text, re.MULTILINE)
    assert found is not None, text
    return float(found[1])


def grid(columns: int, lines: int, image: int) -> tuple[int, int]:
    """The size of a grid of images of so many pixels a side, with two pixels around each."""
    return columns * (image + 2) + 2, lines * (image + 2) + 2


def test_train_leaves_a_whole_run(place: Path) -> None:
    """Checkpoints, metrics, samples, curve and report are there, and say what the terminal said."""
    run, said = place / "run", (place / "said.txt").read_text()
    names = {"config.toml", "metrics.csv", "best.safetensors", "samples.png", "curve.png", "report.html", "report.json"}
    assert names <= {path.name for path in run.iterdir()}
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == [f"step-{step:07d}.safetensors" for step in (10, 15, 20)]
    found = rows(run / "metrics.csv")
    assert [int(row["step"]) for row in found] == [0, 5, 10, 15, 20]
    assert all(float(row["train_bpd"]) > 0 for row in found[1:])
    assert [row["step"] for row in found if row["held_out_bpd"]] == ["0", "10", "20"]
    assert float(found[-1]["held_out_bpd"]) < float(found[0]["held_out_bpd"])
    for name in ("held-out, untrained", "held-out", "train", "histogram", "PNG"):
        assert figure(said, name) > 0
    assert figure(said, "held-out") == pytest.approx(float(found[-1]["held_out_bpd"]), abs=6e-4)
    assert "run/report.html" in said


def test_a_run_repeats_from_its_configuration(tiny: Path) -> None:
    """To the bit: weights and metrics, apart from what the clock says."""
    assert "run-2" in done("train", "--config", "run/config.toml", "--quiet")
    for run in ("run", "run-2"):
        done("convert", "pyglow", run, f"{run}.safetensors")
    assert Path("run.safetensors").read_bytes() == Path("run-2.safetensors").read_bytes()
    assert untimed(Path("run")) == untimed(Path("run-2"))


def test_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings, where the command line does not say others; and images that come with the package."""
    monkeypatch.chdir(tmp_path)
    assert "digits" in done("train", "--list-presets")
    options = ["--n-steps", "1", "--hidden", "4", "--max-steps", "2", "--eval-images", "16", "--device", "cpu"]
    done("train", "--preset", "digits", "--out", "run", "--quiet", *options)
    config = Path("run/config.toml").read_text()
    for line in ('name = "digits"', "n_steps = 1", "hidden = 4", "max_steps = 2", 'optimizer = "adamw"'):
        assert line in config.splitlines()


def test_sample(place: Path, tmp_path: Path) -> None:
    """The size is what is asked for; the seed, the temperature and the class decide what is drawn."""
    drawn = []
    options = ("--seed", 1), ("--seed", 1), ("--seed", 2), ("--seed", 1, "--label", "dark"), ("--temperature", 0)
    for i, chosen in enumerate(options):
        out = tmp_path / f"{i}.png"
        said = done("sample", "run", "--n", 6, "--columns", 3, "--scale", 2, "--out", out, *chosen)
        assert size(out) == grid(3, 2, 2 * SIDE)
        assert str(out) in said
        drawn.append(rgb_of(out).tobytes())
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 4


def test_sample_in_a_process(place: Path, tmp_path: Path) -> None:
    """As a user runs it, in a process of its own: the same bytes as here."""
    command = ["sample", "run", "--n", "2", "--out"]
    done(*command, tmp_path / "here.png")
    words = [sys.executable, "-m", "pyglow_fast", *command, str(tmp_path / "there.png")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as many threads as here: sums in the same order
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "said", "width", "height"),
    [
        ("sample run --n 3 --temperature 0 1 --scale 2", ["3 samples at temperature 0, 1"], 3 * 2 * SIDE, 2 * 2 * SIDE),
        (
            "manipulate run folder:images --plus bright --minus dark --n 2",
            ["bright minus dark", "2 held-out images"],
            5 * SIDE,
            2 * SIDE,
        ),
        (
            "interpolate run --from 0 --to 1 --from 2 --to 3 --frames 3",
            ["2 linear paths", ", 0 grey levels changed"],  # at the ends, which are the images
            3 * SIDE,
            2 * SIDE,
        ),
    ],
)
def test_a_picture_has_room_for_what_it_shows(
    place: Path, tmp_path: Path, words: str, said: list[str], width: int, height: int
) -> None:
    """Samples at each temperature; held-out images along a direction; paths between the images themselves."""
    found = done(*words.split(), "--out", tmp_path / "x.png")
    assert all(part in found for part in said), found
    columns, lines = size(tmp_path / "x.png")
    assert columns > width
    assert lines > height


def test_evaluate_and_score_agree(place: Path, tmp_path: Path) -> None:
    """One number of each image, whose mean is what evaluate says; yardsticks beside it."""
    said = done("evaluate", "run", DATA)
    assert f"{HELD_OUT} images" in said
    for name in ("model", "histogram", "PNG"):
        assert figure(said, name) > 0
    done("score", "run", DATA, "--out", tmp_path / "x.csv")
    found = rows(tmp_path / "x.csv")
    assert list(found[0]) == ["index", "name", "label", "bits_per_dim"]
    assert len(found) == HELD_OUT
    assert {row["label"] for row in found} <= set(CLASSES)
    assert all(row["name"].startswith(f"{row['label']}/") for row in found)
    mean = sum(float(row["bits_per_dim"]) for row in found) / len(found)
    assert figure(said, "model") == pytest.approx(mean, abs=6e-4)
    assert f"{2 * IMAGES} images" in done("evaluate", "run", DATA, "--part", "all")


def test_a_run_is_all_that_a_command_needs(tiny: Path) -> None:
    """Its own images are looked at, and what is made lies beside them, under the name of the command."""
    for command in ("sample", "levels", "interpolate"):
        out = tiny / "run" / f"{command}.png"
        assert str(out.relative_to(tiny)) in done(command, "run")
        assert max(size(out)) >= 256
    assert f"{HELD_OUT} images" in done("evaluate", "run")
    assert "run/score.csv" in done("score", "run")
    assert len(rows(Path("run/score.csv"))) == HELD_OUT
    assert "run/manipulate.png" in done("manipulate", "run", "--plus", "bright")
    assert "run/report.html" in done("report", "run")
    assert "page.html" in done("report", "run", "--out", "page.html")
    assert Path("page.html").read_bytes() == Path("run/report.html").read_bytes()
    said = done("resume", "run", "--max-steps", STEPS + 1)
    assert "next: pyglow-fast sample run\n" in said
    assert rows(Path("run/metrics.csv"))[-1]["step"] == str(STEPS + 1)


@pytest.mark.drawn
def test_ood(place: Path, tmp_path: Path) -> None:
    """The histogram, each image's number, and how often one of a pair has more bits/dim, as counted from these."""
    out, table = tmp_path / "x.png", tmp_path / "x.csv"
    part = ["--part", "train", "--other-part", "held-out"]
    said = done("ood", "run", DATA, DATA, *part, "--out", out, "--csv", table)
    width, height = size(out)
    assert width > 400 < height
    found = rows(table)
    assert list(found[0]) == ["set", "index", "name", "label", "bits_per_dim"]
    bits = np.array([float(row["bits_per_dim"]) for row in found])
    foreign = np.array([row["set"].endswith("held-out") for row in found])
    assert (foreign.sum(), len(found)) == (HELD_OUT, 2 * IMAGES)
    above = np.mean(bits[foreign][:, None] > bits[~foreign])
    assert figure(said, "AUROC") == pytest.approx(above, abs=1e-4)


def test_ablate(place: Path, tmp_path: Path) -> None:
    """Every variant with every seed: a run each, their table and their curves."""
    options = [*("--size", SIDE, "--batch-size", 8, "--max-steps", 2, "--eval-images", 8), *MODEL]
    variants = ["--permutations", "reverse", "invconv", "--couplings", "additive", "--seeds", 0, 1]
    out = tmp_path / "compared"
    done("ablate", DATA, "--out", out, "--quiet", *variants, *options)
    assert sorted(path.name for path in out.iterdir()) == ["curves.csv", "curves.png", "runs", "table.md"]
    names = sorted(f"{name}-additive-seed{seed}" for name in ("reverse", "invconv") for seed in (0, 1))
    assert sorted(path.name for path in (out / "runs").iterdir()) == names
    table = (out / "table.md").read_text()
    assert "reverse" in table
    assert "invconv" in table
    assert {row["permutation"] for row in rows(out / "curves.csv")} == {"reverse", "invconv"}


def test_compare(place: Path, tmp_path: Path) -> None:
    """Runs that are there: the figures that training said, on a page curves and samples of one size."""
    said = done("compare", "run", "shown", "--n", 16, "--device", "cpu", "--out", tmp_path)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.split("\n")[2:4]]
    (_, step, _, model, bits, *_), shown = lines
    (row,) = [row for row in rows(place / "run" / "metrics.csv") if row["step"] == step]
    assert (model, bits) == ("2, 2, 4", f"{float(row['held_out_bpd']):.3f} ± {float(row['held_out_se']):.3f}")
    assert " ".join(shown) == "shown 10000 3,191,904 3, 12, 160 2.213 ± 0.068 0.824 ± 0.003 51.2 emoji-small"
    assert "note: the images, or those held out, may not be the same: name (folder:images, emoji-small); " in said
    shutil.copytree("run", tmp_path / "copy")
    assert "note: the images are the same" in done(
        "compare", "run", tmp_path / "copy", "--n", 4, "--out", tmp_path / "copy.html"
    )
    page = Page((tmp_path / "compare.html").read_text(encoding="utf-8"))
    assert page.words["h2"] == ["Curves", "Samples, temperature 0.7, seed 0"]
    pngs = (io.BytesIO(base64.b64decode(str(image["src"]).split(",")[1])) for image in page.images[2:])
    assert [Image.open(png).size for png in pngs] == [grid(4, 4, 64)] * 2


def test_data_shows_what_a_model_will_see(place: Path, tmp_path: Path) -> None:
    """Counts, files, other codes' bits/dim and a picture; what cannot be read does not end it."""
    shutil.copytree("images", tmp_path / "images")
    (tmp_path / "images" / "dark" / "99.png").write_bytes(b"torn")
    Image.new("L", (40, 30), 255).save(tmp_path / "images" / "bright" / "99.png")
    options = ["--size", 20, "--fit", "pad", "--held-out", 0.25, "--n", 8, "--out", tmp_path / "x.png"]
    with pytest.warns(match="40 of 42 .* are smaller than 20x20 and enlarged"), pytest.warns(match="left out: 1 of 42"):
        said = done("data", *options, f"folder:{tmp_path / 'images'}")
    assert "41 images of shape (3, 20, 20) with 256 grey levels, 31 to train on and 10 held out\n" in said
    assert f"\nclasses: bright {IMAGES + 1}, dark {IMAGES}\n" in said
    assert "\n41 files: 16x16 the smallest, 16x16 the median, 40x30 the largest; RGB 40, L 1\n" in said
    assert figure(said, "PNG") > 0
    assert size(tmp_path / "x.png")[0] > 2 * 60


def test_data_lists_what_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a name the command fetches nothing and creates nothing."""
    monkeypatch.setenv("PYGLOW_DATA", str(tmp_path / "cache"))
    said = done("data")
    for name in ("mnist", "fashion-mnist", "emoji", "cifar10", "celeba"):
        assert re.search(rf"^{name}: ", said, re.MULTILINE)
    assert "not fetched" in said
    assert not (tmp_path / "cache").exists()


def test_demo(tmp_path: Path) -> None:
    """The first command that a user tries: it needs no data, leaves samples, and says so where there was no time."""
    ended = pyglow_fast("demo", "--out", tmp_path / "run", "--minutes", 0.001, "--device", "cpu")
    assert "training on 1617 handwritten digits; 180 are held out" in ended.out
    assert figure(ended.out, "held-out") > 0
    assert ended.code == 1
    assert "expected 300 or more, in which a model learns" in ended.err
    assert (tmp_path / "run" / "samples.png").is_file()


def test_info_version_and_help() -> None:
    """Every command can be found by ``--help``, and a report of a bug has its versions."""
    assert torch.__version__ in done("info")
    assert re.fullmatch(r"pyglow-fast \d+\.\d+\.\d+\S*\n", done("--version"))
    said = done("--help")
    commands = (
        "train resume demo ablate sample interpolate edit manipulate levels "
        "evaluate score ood serve convert data report compare info"
    )
    for command in commands.split():
        assert re.search(rf"^    {command}\b", said, re.MULTILINE)
        assert re.match(rf"[^\n]+\.\n\n  pyglow-fast {command}\b", done(command, "--help"))


def test_the_help_of_training_is_short_and_there_is_a_long_one() -> None:
    """A dozen options that most need, and every setting where it is asked for."""
    helps = [done("train", word) for word in ("--help", "--help-all")]
    short, long = (set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", said, re.MULTILINE)) for said in helps)
    assert {"--out", "--preset", "--n-steps", "--max-minutes", "--help-all"} <= short < long
    assert len(short) < 25 < 50 < len(long)


def test_the_help_of_resume_shows_the_settings_that_may_change() -> None:
    shown = set(re.findall(r"^  (--[a-z-]+)", done("resume", "--help-all"), re.MULTILINE))
    assert {"--max-steps", "--memory", "--workers"} < shown
    assert not {"--lr", "--size", "--hidden"} & shown


EDIT = ["--add", "bright", "dark", "0.5", "--keep", "0.5", "1", "--scale", "3"]
PICTURES = [
    ["sample", "run", "--n", "4", "--label", "dark", "--temperature", "0.8"],
    ["edit", "run", "sample:1:n=2:seed=3:temperature=0.9", *EDIT],
    ["edit", "run", "images/dark/01.png", "--label", "bright", "--scale", "3"],
    pytest.param(["score", "run", "images/dark/00.png", "images/bright/00.png"], marks=pytest.mark.drawn),
]


@pytest.mark.parametrize("words", PICTURES, ids=" ".join)
def test_a_picture_holds_the_command_that_makes_it(place: Path, tmp_path: Path, words: list[str]) -> None:
    """And it does, to the byte."""
    option = "--picture" if words[0] == "score" else "--out"
    done(*words, option, tmp_path / "first.png")
    if words[0] == "edit":
        assert size(tmp_path / "first.png") == (3 * SIDE, 3 * SIDE)
    assert_repeatable(tmp_path / "first.png", option)


def test_an_edit_of_nothing_is_the_image(place: Path, tmp_path: Path) -> None:
    """An edit changes what it is told to change, and nothing on the way there and back."""
    done("edit", "run", "images/dark/03.png", "--scale", 1, "--out", tmp_path / "x.png")
    assert np.array_equal(rgb_of(tmp_path / "x.png"), rgb_of(place / "images" / "dark" / "03.png"))


def test_convert_does_not_advise_to_run_code(tmp_path: Path) -> None:
    """A file that wants to run code is refused, and its user is not talked into it."""
    torch.save({"model": CodeOnLoading()}, tmp_path / "x.pt")
    ended = pyglow_fast("convert", "rosinality", tmp_path / "x.pt", tmp_path / "x.safetensors", "--image-size", 8)
    assert ended.code == 2
    assert not re.search("weights_only|can still be loaded", ended.err)


class CodeOnLoading:
    """A class of no library: a file that holds one of these runs code when it is loaded."""


REFUSED: list[tuple[str, str]] = [
    # The command itself.
    ("", "the following arguments are required: COMMAND.*"),
    ("fly", ".*COMMAND: invalid choice: 'fly'.*"),
    ("smaple run", ".*COMMAND: invalid choice: 'smaple' .*; did you mean 'sample'?.*"),
    ("sample", "the following arguments are required: RUN.*"),
    ("train digits --n-stpes 4 --out out", "unrecognized arguments: --n-stpes 4; did you mean '--n-steps'?.*"),
    # Data.
    ("train cifar --out out", "data: expected .*, found 'cifar'; did you mean 'cifar10'?"),
    ("train --out out", "data: expected .*, found none"),
    ("train folder:none --out out", "folder: expected an existing folder, found 'none'"),
    ("train folder:empty --out out", "folder: expected a folder with images that Pillow reads, found none in 'empty'"),
    ("train folder:torn --size 16 --out out", "torn/00.png: expected an image that Pillow can decode, found .*"),
    (
        "train folder:images --size 32 --no-enlarge --out out",
        ".*00.png: expected an image of at least 32x32, found 16x16",
    ),
    ("train folder:images --n-bits 9 --out out", "n_bits: expected a whole number in 1..8, or none, found 9"),
    ("train folder:images --gray --color --out out", "argument --color: not allowed with argument --gray.*"),
    ("train digits --held-out 1 --out out", "held_out: expected a number between 0 and 1, or none, found 1.0"),
    ("train digits --scale 2 --out out", "scale: expected no such option for digits .*, found 2"),
    ("data nothing", "data: expected one of .*, found 'nothing'"),
    # The model and its training.
    ("train digits --n-levels 4 --out out", "image_shape: expected sides divisible by 2^n_levels = 16, found .*"),
    ("train digits --optimizer sgd --out out", "optimizer: expected one of .*, found 'sgd'"),
    ("train digits --lr 0 --out out", "lr: expected a positive number, found 0.0"),
    ("train digits --lr fast --out out", "argument --lr: invalid float value: 'fast'.*"),
    ("train digits --ema 1 --out out", "ema_decay: expected a number between 0 and 1, or none, found 1.0"),
    ("train digits --memory 4XB --out out", "memory: expected one of .* or bytes such as .*, found '4XB'"),
    ("train digits --precision int8 --out out", "precision: expected one of .*, found 'int8'"),
    ("train digits --batch-size 2000 --out out", "batch_size: expected at most .* training images, found 2000"),
    ("train digits --accumulate 3 --out out", "accumulate: expected a divisor of batch_size, 64, found 3"),
    ("train digits --max-steps 0 --out out", "max_steps: expected a positive whole number, or none, found 0"),
    ("train digits --seed -1 --out out", "seed: expected a whole number, 0 or more, found -1"),
    ("train digits --device gpu --out out", "device: expected .*, found 'gpu'"),
    ("train digits --preset cifra10 --out out", "preset: expected .*, found 'cifra10'; did you mean 'cifar10'?"),
    ("train digits --config none.toml --out out", "config: expected an existing file, found 'none.toml'"),
    ("train --config odd.toml --out out", "odd.toml: expected settings among .*, found speed"),
    ("train --config torn.toml --out out", "torn.toml: expected a configuration as TOML, found .*"),
    # Folders of runs.
    ("train digits", "out: expected the folder of the run .*, found none"),
    ("train digits --out said.txt", "out: expected a folder, found a file, 'said.txt'"),
    ("train digits --out run", "out: expected a new folder .*, found a run in 'run'"),
    ("train digits --overwrite --out images", "out: expected a new or empty folder, or a run, found 'images', .*"),
    ("resume nowhere", "run: expected the folder of a run, found 'nowhere', which does not exist"),
    ("sample images --out x.png", "run: expected the folder of a run .*, found 'images' without one"),
    ("sample cut --last --out x.png", ".*step-0000020.safetensors: expected a complete safetensors file, found .*"),
    ("sample flipped --last --out x.png", ".*step-0000020.safetensors: expected .*, found .*"),
    ("evaluate changed folder:images", ".*config.toml: expected model.hidden = 4, .*, found 8"),
    # A run that is resumed as another, or on other images, which would let held-out ones slip into the training.
    ("resume run --lr 0.5", "lr: expected .*, as the run was started with, found 0.5"),
    ("resume run --hidden 8", "hidden: expected 4, as the run was started with, found 8"),
    ("resume run --batch-size 4", "batch_size: expected 8, as the run was started with, found 4"),
    ("resume run --held-out 0.3", "held_out: expected .*, as the run was started with, found 0.3"),
    ("resume run --seed 1", "seed: expected 0, as the run was started with, found 1"),
    ("resume run --flip", "flip: expected .*, as the run was started with, found .*"),
    ("resume run --max-steps 15", "max_steps: expected more than the 20 steps done, found 15"),
    ("resume run digits", "data: expected 'folder:images', as the run was started with, found 'digits'"),
    ("resume run folder:fewer --max-steps 25", "data: expected the images that the run was started with, found .*"),
    # What commands make of a run.
    ("sample run --n 1000000 --out x.png", "n: expected at most .*, found 1000000"),
    ("sample run --temperature nan --out x.png", "temperature: expected a number, 0 or more, found nan"),
    ("sample run --label ten --out x.png", "label: expected one of bright, dark, found 'ten'"),
    ("sample run --out x.jpg", "out: expected a name ending in .png, found 'x.jpg'"),
    ("sample run --out none/x.png", "out: expected a file in an existing folder, found 'none/x.png'"),
    ("sample run --out run/samples.png", "out: expected another file than those that a run keeps, found .*"),
    ("sample run --out images/x.png", "out: expected a file outside of the folder of folder:images, found .*"),
    ("sample run --temperature 0 1 --columns 2 --out x.png", "columns: expected no such option with several temp.*"),
    ("evaluate run emoji-small", "size: expected at least 32, the side of the images of emoji-small, found 16: .*"),
    ("score run none.png --out x.csv", ".*none.png.*"),
    ("edit run 99 --out x.png", "image: expected .*, found .*99.*"),
    ("edit run 0 --add blue rest 1 --out x.png", "plus: expected one of bright, dark, found 'blue'"),
    ("edit run 0 --keep 0.5 --out x.png", "keep: expected .*, found .*"),
    ("manipulate run folder:images --plus bright --minus bright --out x.png", "minus: expected another .*"),
    ("interpolate run --from 0 --from 1 --to 0 --out x.png", "to: expected 2 images, one for each --from, found 1"),
    ("interpolate run --frames 1 --out x.png", "frames: expected a whole number, 2 or more, found 1"),
    ("levels run folder:images --keep 2 --out x.png", "keep: expected levels in 0..1 .*, found 2"),
    ("ablate digits --couplings linear --out out", ".*coupling.*: expected .*, found .*linear.*"),
    ("compare run", "runs: expected two or more, each once, found run"),
    ("compare run nowhere", "run: expected the folder of a run, found 'nowhere', which does not exist"),
    ("data folder:images --size 0", "size: expected a positive whole number.*"),
    ("data digits --out x.jpg", "out: expected a name ending in .png, found 'x.jpg'"),
    ("convert pyglow run x.pt", "out: expected a name ending in .safetensors, found 'x.pt'"),
    ("convert glow run x.pt", ".*FORMAT: invalid choice: 'glow'.*"),
]
if importlib.util.find_spec("gradio"):  # before anything is served; without gradio the page itself is refused
    REFUSED += [
        ("serve nowhere --no-browser", "runs: expected .*, found 'nowhere'"),
        ("serve images --no-browser", "runs: expected .*, found 'images'"),
        ("serve run --host 0.0.0.0 --no-browser", "host: expected 127.0.0.1, or a login.*, found .*"),
        ("serve run --device gpu --no-browser", "device: expected .*, found .*gpu.*"),
        ("serve run --port 99999999 --no-browser", "port: expected .*, found 99999999"),
    ]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``images`` and ``run`` again, beside spoilt runs, images and configurations."""
    here = tmp_path_factory.mktemp("broken") / "place"
    shutil.copytree(made(tmp_path_factory), here)
    (here / "empty").mkdir()
    (here / "torn").mkdir()
    (here / "torn" / "00.png").write_bytes((here / "images" / "dark" / "00.png").read_bytes()[:60])
    (here / "odd.toml").write_text("speed = 3\n")
    (here / "torn.toml").write_text("lr = \n")
    shutil.copytree(here / "images", here / "fewer")
    (here / "fewer" / "dark" / "00.png").unlink()
    for name in ("cut", "flipped", "changed"):
        shutil.copytree(here / "run", here / name)
    for path in (here / "cut" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    for path in (here / "flipped" / "checkpoints").iterdir():
        found = bytearray(path.read_bytes())
        found[-3] ^= 16
        path.write_bytes(found)
    config = here / "changed" / "config.toml"
    config.write_text(config.read_text().replace("hidden = 4", "hidden = 8"))
    return here


@pytest.mark.parametrize(("command", "message"), REFUSED, ids=[command or "nothing" for command, _ in REFUSED])
def test_refused(broken: Path, command: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 2 and one line that names the argument; what was there is untouched, and nothing is new."""
    monkeypatch.chdir(broken)
    before = contents(broken)
    ended = pyglow_fast(*shlex.split(command))
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.fullmatch(rf"(warning: .*\n)*error: {pattern}\n", ended.err), ended.err
    assert (ended.code, ended.out) == (2, "")
    assert contents(broken) == before
