"""A run that is killed at random moments, workers and all, and resumed each time, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import torch
from PIL import Image
from support.commands import Command

from pyglow_fast.train import Checkpoint, RunFolder
from pyglow_fast.train.metrics import COLUMNS, read_metrics

KILLS = int(os.environ.get("PYGLOW_TEST_KILLS", "2"))
STEPS = 60 * max(2, KILLS)
OPTIONS = ["--size", "8", "--crop-margin", "2", "--flip", "--from-files", "--workers", "2", "--n-levels", "2"]
OPTIONS += ["--n-steps", "2", "--hidden", "8", "--batch-size", "8", "--max-steps", str(STEPS), "--log-every", "5"]
OPTIONS += ["--eval-every", "20", "--save-every", "3", "--sample-every", "50", "--sample-count", "4", "--device", "cpu"]


def command(place: Path, out: str, *more: str) -> Command:
    words = ["-m", "pyglow_fast", "train", f"folder:{place / 'images'}", "--out", out, *OPTIONS, *more]
    return Command(words, place)


def to_the_end(process: Command) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def test_killed_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(50):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i:02}.png")
    to_the_end(command(tmp_path, "whole", "--quiet"))

    moments, reached = random.Random(0), []
    folder = RunFolder(tmp_path / "parts")
    for _ in range(KILLS):
        before = read_metrics(folder.metrics)[-1:] if folder.metrics.exists() else []
        more = ["--resume"] if folder.checkpoint.exists() else ["--overwrite"]
        process = command(tmp_path, "parts", *more)
        until = time.monotonic() + 60  # the moments are meant to fall into the steps, not into the imports
        while process.poll() is None and time.monotonic() < until:
            if folder.metrics.exists() and read_metrics(folder.metrics)[-1:] != before:
                break
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 1.5))
        process.kill()
        process.communicate()
        reached.append(int(folder.checkpoint.stem.removeprefix("step-")))
    assert reached == sorted(reached)
    assert len(set(reached)) > 1  # it got on between the kills
    to_the_end(command(tmp_path, "parts", "--quiet", "--resume"))

    whole, parts = (Checkpoint.load(RunFolder(tmp_path / name).checkpoint) for name in ("whole", "parts"))
    for part in ("model", "ema", "optimizer", "rank"):
        found, wanted = getattr(parts, part), getattr(whole, part)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
    timed = ("seconds", "images_per_s", "memory_mb")
    rows = [
        [{name: row[name] for name in COLUMNS if name not in timed} for row in read_metrics(run / "metrics.csv")]
        for run in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert rows[0] == rows[1]
    print(f"{KILLS} kills, after checkpoints of steps {reached}")
