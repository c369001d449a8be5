"""What each command does when all is well."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyglow_fast import Glow
from pyglow_fast.cli import main
from pyglow_fast.data import histogram_bits_per_dim, load_folder, split
from pyglow_fast.train import RunFolder, TrainConfig, TrainState


def figure(text: str, name: str) -> float:
    """The number in the line that begins with ``name``."""
    found = re.search(rf"^\s*{re.escape(name)}\s+([-\d.]+)", text, re.MULTILINE)
    assert found is not None, text
    return float(found.group(1))


@pytest.mark.full
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


@pytest.mark.full
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


@pytest.mark.full
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["data"], ["--help"]], ids=" ".join)
def test_output_to_a_disk_that_is_full(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "pyglow_fast", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"
    assert ended.returncode == 1


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


def test_a_bug_keeps_its_traceback(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*args: object, **options: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("pyglow_fast.cli.sample.Grid.made", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["sample", str(trained), "--out", str(tmp_path / "x.png")])
