"""What each command does when all is well."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.commands import Command

from pyglow_fast import Glow, __version__
from pyglow_fast.cli import main
from pyglow_fast.data import histogram_bits_per_dim, load_folder, split
from pyglow_fast.train import RunFolder, TrainConfig, TrainState


def figure(text: str, name: str) -> float:
    """The number in the line that begins with ``name``."""
    found = re.search(rf"^\s*{re.escape(name)}\s+([-\d.]+)", text, re.MULTILINE)
    assert found is not None, text
    return float(found.group(1))


def test_the_command_end_to_end(tiny: list[str], tmp_path: Path) -> None:
    """As a user runs it: another process, relative paths, then on from where it stopped."""
    command = [sys.executable, "-m", "pyglow_fast"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    train = [*command, "train", "digits", "--out", "r", *tiny, "--max-steps", "30"]
    train += ["--warmup", "0", "--eval-every", "20", "--eval-images", "200"]
    first = subprocess.run(train, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert [line.split(":")[0] for line in first.stdout.splitlines()[:3]] == ["step 0", "step 20", "step 30"]
    assert figure(first.stdout, "held-out, untrained") > figure(first.stdout, "held-out")
    assert figure(first.stdout, "histogram") == 2.430
    assert figure(first.stdout, "PNG") > 3
    again = subprocess.run(train, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr == "error: out: expected a new folder (or resume or overwrite), found a run in 'r'\n"
    assert again.stdout == ""


def test_sample(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = []
    for name, options in [
        ("a", ["--seed", "1"]),
        ("b", ["--seed", "1"]),
        ("c", ["--seed", "2"]),
        ("d", ["--seed", "1", "--label", "3", "--label", "4"]),
        ("e", ["--seed", "1", "--temperature", "0"]),
    ]:
        out = tmp_path / f"{name}.png"
        command = ["sample", str(trained), "--n", "6", "--columns", "3", "--scale", "2", "--out", str(out), *options]
        assert main(command) == 0
        with Image.open(out) as picture:
            assert picture.size == (3 * 18 + 2, 2 * 18 + 2)
            pictures.append(np.asarray(picture).tobytes())
    assert pictures[0] == pictures[1]
    assert len(set(pictures)) == 4
    assert "6 samples at temperature 0.7" in capsys.readouterr().out


def test_a_warning_is_one_line(trained: Path, tmp_path: Path) -> None:
    """Without the file and line of the code that warns."""
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-0000099.safetensors").mkdir()
    command = [sys.executable, "-m", "pyglow_fast", "sample", "run", "--n", "1", "--out", "x.png"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (0, 1)
    assert re.match(r"warning: \S*step-0000099.safetensors: .*is taken instead\n$", result.stderr), result.stderr


def test_samples_come_in_batches(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, drawn = Glow.sample, []

    def noting(model: Glow, n: int, *args: Any, y: torch.Tensor, **options: Any) -> torch.Tensor:
        drawn.append(y.tolist())
        return sample(model, n, *args, y=y, **options)

    monkeypatch.setattr(Glow, "sample", noting)
    assert main(["sample", str(trained), "--n", "70", "--out", str(tmp_path / "x.png"), "--scale", "1"]) == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (10 * 10 + 2, 7 * 10 + 2)  # a column for each class
    assert drawn == [[i % 10 for i in part] for part in (range(64), range(64, 70))]


def test_evaluate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "digits"]) == 0
    text = capsys.readouterr().out
    assert "at step 20 on digits, held-out:" in text
    assert "180 images" in text
    assert figure(text, "histogram") == 2.430
    report = RunFolder(trained).report.read_text()
    held_out = float(re.search(r'"held_out": \{\s*"mean": ([\d.]+)', report).group(1))  # type: ignore[union-attr]
    assert figure(text, "model") == pytest.approx(held_out, abs=0.05)  # other noise
    assert main(["evaluate", str(trained), "digits", "--part", "all", "--best"]) == 0
    assert "1797 images" in capsys.readouterr().out


def test_evaluate_on_other_images(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
        for i in range(10):
            Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / folder / f"{i}.png")
    options = ["--size", "4", "--gray", "--n-bits", "3", "--batch-size", "4", "--max-epochs", "1", "--quiet"]
    own, other = (f"folder:{tmp_path / name}" for name in ("own", "other"))
    assert main(["train", own, "--out", str(tmp_path / "r"), *options, *tiny]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert config.model.image_shape == (1, 4, 4)
    assert config.data.n_bits == 3
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "r"), own]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^  model +\d+\.\d{3}  ± n/a bits/dim, 1 images$", text, re.MULTILINE)
    assert "own training images" not in text
    assert main(["evaluate", str(tmp_path / "r"), other]) == 0
    text = capsys.readouterr().out
    assert "10 images" in text
    own_images, other_images = (
        load_folder(tmp_path / name, size=4, gray=True, n_bits=3, split_by="file") for name in ("own", "other")
    )
    fitted = own_images.subset(split(own_images, 0.1, 0)[0])
    assert figure(text, "histogram") == round(histogram_bits_per_dim(fitted, other_images), 3)
    assert "fitted on 9 training images" in text
    assert f"(the histogram model was fitted on the run's own training images, {own})" in text
    (tmp_path / "own" / "0.png").unlink()
    for found in ("changed", "gone"):
        assert main(["evaluate", str(tmp_path / "r"), other]) == 0
        text = capsys.readouterr().out
        assert f"(no histogram model: it would be fitted on the images that the run was trained on, but {own} " in text
        assert "PNG" in text, found
        shutil.rmtree(tmp_path / "own", ignore_errors=True)


def test_resume_after_the_images_moved(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    for i in range(8):
        Image.new("L", (8, 8), 30 * i).save(tmp_path / "here" / f"{i}.png")
    train = ["--out", str(tmp_path / "r"), "--size", "8", "--gray", "--batch-size", "4", "--quiet", *tiny]
    assert main(["train", f"folder:{tmp_path / 'here'}", "--max-steps", "2", *train]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    moved = ["train", f"folder:{tmp_path / 'there'}", "--max-steps", "4", "--resume", *train]
    with monkeypatch.context() as patch:
        patch.setattr("pyglow_fast.train.state.TrainState.step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # after config.json was written and before any new checkpoint
            main(moved)
    assert main(moved) == 0
    assert RunFolder(tmp_path / "r").load().config.data.name.endswith("there")
    Image.new("L", (8, 8), 1).save(tmp_path / "there" / "new.png")
    assert main(moved) == 2
    assert "data: expected the images that the run was started with" in capsys.readouterr().err


def test_reconstruct(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reconstruct", str(trained), "digits", "--n", "20", "--out", str(tmp_path / "x.png")]) == 0
    text = capsys.readouterr().out
    error = float(re.search(r"= ([\d.e+-]+)", text).group(1))  # type: ignore[union-attr]
    assert error < 1e-4
    assert "0 of 1280 grey levels changed" in text
    with Image.open(tmp_path / "x.png") as picture:
        pixels = np.asarray(picture)
    row = 66  # 8 pixels, 8 times enlarged, and 2 between the images
    assert pixels.shape[:2] == (4 * row + 2, 16 * row + 2)
    assert np.array_equal(pixels[:row], pixels[row : 2 * row])  # 16 images above their reconstructions
    assert np.array_equal(pixels[2 * row : 3 * row], pixels[3 * row : 4 * row])  # and the other four
    assert pixels[row:].max() == 255


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyglow-fast {__version__}\n"


@pytest.mark.parametrize("arguments", [["info"], ["--help"]], ids=" ".join)
def test_a_reader_that_has_seen_enough(arguments: list[str]) -> None:
    """As after ``| head -1``: nobody reads the output any more."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "pyglow_fast", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        ended = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert ended.stderr == ""
    assert ended.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["data"], ["--help"]], ids=" ".join)
def test_output_to_a_disk_that_is_full(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pyglow_fast", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"
    assert ended.returncode == 1


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "r"), "--minutes", "0.001", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "training on 1617 handwritten digits; 180 are held out" in text
    for name in ("held-out, untrained", "held-out", "train", "histogram", "PNG"):
        assert figure(text, name) > 0
    assert (tmp_path / "r" / "samples.png").is_file()
    assert main(["demo", "--out", str(tmp_path / "r")]) == 2


def test_resume_by_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "digits", "--out", str(run), "--resume", "--quiet", "--max-steps", "23", "--hidden", "4"]
    assert main(command) == 0
    assert "23 steps" in capsys.readouterr().out
    assert RunFolder(run).load().progress["step"] == 23


@pytest.mark.parametrize(("limit", "step"), [(["--max-minutes", "9"], 23), (["--max-epochs", "1"], 25)])
def test_a_limit_given_to_a_resumed_run(
    run: Path, limit: list[str], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended by max_steps, which does not count any more; 1617 images are 25 batches."""
    one_step = TrainState.step

    def slow(self: TrainState) -> float:
        if self.progress.step == 22:
            late = time.monotonic() + 600
            monkeypatch.setattr("pyglow_fast.train.loop.time.monotonic", lambda: late)
        return one_step(self)

    monkeypatch.setattr(TrainState, "step", slow)
    assert main(["train", "digits", "--out", str(run), "--resume", "--quiet", *limit]) == 0
    checkpoint = RunFolder(run).load()
    assert checkpoint.progress["step"] == step
    assert checkpoint.config.max_steps is None


@pytest.mark.parametrize("limit", ["--max-epochs", "--max-minutes"])
def test_a_given_limit_replaces_the_preset_one(tiny: list[str], tmp_path: Path, limit: str) -> None:
    command = ["train", "digits", "--out", str(tmp_path / "r"), "--quiet", limit, "0.001" if "min" in limit else "1"]
    assert main([*command, *tiny, "--batch-size", "800"]) == 0
    config: TrainConfig = RunFolder(tmp_path / "r").load().config
    assert config.max_steps is None
    assert config.decay_steps is None


def test_the_preset_suits_adamax_too(tiny: list[str], tmp_path: Path) -> None:
    command = ["train", "digits", "--out", str(tmp_path / "r"), "--quiet", "--max-steps", "1", "--optimizer", "adamax"]
    assert main([*command, *tiny]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert (config.optimizer, config.weight_decay, config.decay_steps) == ("adamax", 0.0, 1)


def test_divergence_exits_with_1(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hopeless = ["--lr", "1e6", "--warmup", "0", "--no-clip", "--max-steps", "50", "--quiet"]
    assert main(["train", "digits", "--out", str(tmp_path / "r"), *hopeless, *tiny]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: training diverged at step ")
    assert "the last good checkpoint" in error
    assert "try: a lower learning rate" in error
    assert main(["sample", str(tmp_path / "r"), "--out", str(tmp_path / "x.png")]) == 0  # what is kept can be used


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_process(tiny: list[str], tmp_path: Path, signum: int, code: int) -> None:
    words = ["-m", "pyglow_fast", "train", "digits", "--out", str(tmp_path / "r"), *tiny, "--log-every", "1"]
    process = Command(words, tmp_path)
    try:
        metrics = tmp_path / "r" / "metrics.csv"
        until = time.monotonic() + 60
        while time.monotonic() < until and not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
            time.sleep(0.05)
        process.send_signal(signum)
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in error
    assert RunFolder(tmp_path / "r").load().progress["step"] >= 3


def test_a_bug_keeps_its_traceback(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("pyglow_fast.cli.sample.Grid.made", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["sample", str(trained), "--out", str(tmp_path / "x.png")])
