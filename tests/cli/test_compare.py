"""``pyglow-fast compare``: all runs, what it makes of them, and going on after whatever stopped it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyglow_fast.cli import main
from pyglow_fast.train import Checkpoint, RunFolder, TrainState

Capture = pytest.CaptureFixture[str]
NAMES = [f"{permutation}-additive-seed{seed}" for seed in (0, 1) for permutation in ("reverse", "invconv")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """24 images of 8x8 in a folder."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(generator.integers(0, 99, (8, 8), dtype=np.uint8)).save(root / f"{i:02}.png")
    return f"folder:{root}"


@pytest.fixture(scope="module")
def options(tiny: list[str]) -> list[str]:
    """Of the smallest comparison: two permutations, one coupling, two seeds, six steps."""
    small = ["--size", "8", "--gray", "--batch-size", "4", "--max-steps", "6", "--log-every", "1", "--eval-every", "3"]
    return ["--permutations", "reverse", "invconv", "--couplings", "additive", "--seeds", "0", "1", *small, *tiny]


@pytest.fixture(scope="module")
def compared(data: str, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole comparison. Not to be changed."""
    out = tmp_path_factory.mktemp("compared") / "c"
    assert main(["compare", data, "--out", str(out), *options, "--quiet"]) == 0
    return out


def test_a_run_of_it_is_a_run_of_train(compared: Path, data: str, options: list[str], tmp_path: Path) -> None:
    """To the bit, whatever was trained before it in the same process."""
    alone = options[options.index("--size") :]
    command = ["train", data, "--out", str(tmp_path / "r"), "--quiet", *alone, "--permutation", "reverse"]
    assert main([*command, "--coupling", "additive", "--seed", "1"]) == 0
    one, other = (
        Checkpoint.load(RunFolder(path).checkpoint).model
        for path in (tmp_path / "r", compared / "runs" / "reverse-additive-seed1")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.full
def test_a_signal_stops_all_and_the_same_command_goes_on(
    data: str, options: list[str], compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Stopped in the second run; in the end all is as if nothing had stopped."""
    out, options = tmp_path / "c", [*options, "--seeds", "0"]
    step = TrainState.step

    def interrupted(self: TrainState) -> float:
        if self.config.model.permutation == "invconv" and self.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", interrupted)
        assert main(["compare", data, "--out", str(out), *options]) == 128 + signal.SIGTERM
    text = capsys.readouterr().out
    assert f"stopped; the same command goes on in {out}" in text
    assert "- invconv, additive, seed 0: it is not at its end" in text
    assert sorted(os.listdir(out / "runs")) == ["invconv-additive-seed0", "reverse-additive-seed0"]
    assert main(["compare", data, "--out", str(out), *options]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 runs are finished already" in text
    assert "run 1 of 1: invconv-additive-seed0" in text
    for name in NAMES[:2]:
        one, other = (Checkpoint.load(RunFolder(path / "runs" / name).checkpoint).model for path in (out, compared))
        assert all(torch.equal(one[key], other[key]) for key in one)
