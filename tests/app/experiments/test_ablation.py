"""An ablation: its runs, what it makes of them, and going on after whatever stopped it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.program import rows
from train.run_cases import assert_same_weights

from pyglow_fast import GlowConfig
from pyglow_fast.app.experiments.ablation import Ablation, variants
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.train import Checkpoint, RunFolder, TrainConfig, TrainState, start

BASE = TrainConfig(
    DataConfig("digits"),
    GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=2, hidden=4),
    batch_size=4,
    max_steps=4,
    log_every=1,
    eval_every=2,
    sample_count=1,
    device="cpu",
)
IMAGES = ImageSet("tiny", torch.randint(17, (24, 1, 4, 4), generator=torch.Generator().manual_seed(1)).byte(), 17)
CONFIGS = variants(BASE, ["reverse", "invconv"], ["additive"], [0, 1])
NAMES = [f"{permutation}-additive-seed{seed}" for seed in (0, 1) for permutation in ("reverse", "invconv")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole ablation. Not to be changed."""
    out = tmp_path_factory.mktemp("compared") / "c"
    assert Ablation(CONFIGS, out, IMAGES).execute(quiet=True) is None
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "c"))


def held_out(out: Path, name: str) -> float:
    return float(RunFolder(out / "runs" / name).read_report()["held_out"]["mean"])


def cells(table: str) -> dict[str, list[str]]:
    """The rows of the table below its head, by permutation."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in lines[2:]}


def test_means_and_spreads_over_the_seeds(whole: Path) -> None:
    assert sorted(os.listdir(whole)) == ["curves.csv", "curves.png", "runs", "table.md"]
    assert sorted(os.listdir(whole / "runs")) == sorted(NAMES)
    found = cells((whole / "table.md").read_text())
    curves = rows(whole / "curves.csv")
    assert [row["step"] for row in curves] == ["0", "2", "4"] * 2
    for permutation in ("reverse", "invconv"):
        values = [held_out(whole, f"{permutation}-additive-seed{seed}") for seed in (0, 1)]
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
        assert found[permutation][:4] == ["additive", f"{mean:.4f} ± {spread:.4f}", "2", "4"]
        last = next(row for row in curves if row["permutation"] == permutation and row["step"] == "4")
        assert float(last["held_out_bpd"]) == pytest.approx(mean, rel=1e-5)  # six digits in metrics.csv and here
        assert (float(last["held_out_bpd_sd"]), last["seeds"]) == (pytest.approx(spread, abs=2e-5 * mean), "2")
    scores = [float(row[1].split()[0]) for row in found.values()]
    assert scores == sorted(scores)  # the best first
    reverse, invconv = (int(found[name][4].replace(",", "")) for name in ("reverse", "invconv"))
    assert invconv - reverse == 2 * (4 * 4 + 4 * 4 + 4)  # L, U and log_diag, in two steps of 4 channels


def test_a_run_of_it_is_a_run_of_training(whole: Path, tmp_path: Path) -> None:
    """To the bit, whatever was trained before it in the same process."""
    start(CONFIGS[2], str(tmp_path / "r"), data=IMAGES).execute(quiet=True)
    assert_same_weights(tmp_path / "r", whole / "runs" / NAMES[2])


def test_a_signal_stops_all_and_it_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the second run; in the end all is as if nothing had stopped."""
    step, out = TrainState.step, tmp_path / "c"

    def interrupted(state: TrainState) -> float:
        if state.config.model.permutation == "invconv" and state.progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state)

    with monkeypatch.context() as patch:
        patch.setattr(TrainState, "step", interrupted)
        ablation = Ablation(CONFIGS[:2], out, IMAGES)
        assert ablation.execute(quiet=True) == signal.SIGTERM
    assert "- invconv, additive, seed 0: it is not at its end" in ablation.write()
    assert sorted(os.listdir(out / "runs")) == sorted(NAMES[:2])
    assert Ablation(CONFIGS[:2], out, IMAGES).execute(quiet=True) is None
    for name in NAMES[:2]:
        assert_same_weights(out / "runs" / name, whole / "runs" / name)


def test_what_is_finished_is_left_alone_and_the_rest_goes_on(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One was killed before its first checkpoint; another variant is new beside the former ones."""
    wanted = held_out(copy, NAMES[3])
    shutil.rmtree(copy / "runs" / NAMES[3] / "checkpoints")
    (more,) = variants(BASE, ["reverse"], ["affine"], [0], [1])
    trained: list[str] = []
    initialize = TrainState.initialize

    def noting(state: TrainState) -> None:
        trained.append(f"{state.config.model.permutation} {state.config.model.coupling}")
        initialize(state)

    monkeypatch.setattr(TrainState, "initialize", noting)
    ablation = Ablation([*CONFIGS, more], copy, IMAGES)
    ablation.execute(quiet=True)
    assert trained == ["invconv additive", "reverse affine"]
    assert held_out(copy, NAMES[3]) == wanted
    found = cells(ablation.write())
    assert {name: row[2] for name, row in found.items()} == {
        "reverse": "2",
        "invconv": "2",
        "reverse + 1 checkerboard": "1",
    }


def test_a_run_that_diverges_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TrainState.step

    def hopeless(state: TrainState) -> float:
        if state.config.model.permutation == "reverse" and state.progress.step == 2:
            with torch.no_grad():
                next(state.model.parameters()).fill_(math.nan)
        return step(state)

    monkeypatch.setattr(TrainState, "step", hopeless)
    ablation = Ablation([replace(config, max_skipped=0) for config in CONFIGS[:2]], tmp_path / "c", IMAGES)
    assert ablation.execute(quiet=True) is None
    assert list(ablation.failures) == ["reverse-additive-seed0"]
    table = ablation.write()
    found = cells(table)
    assert (found["reverse"][1:3], found["invconv"][2]) == (["none", "0 of 1"], "1")
    assert list(found) == ["invconv", "reverse"]
    assert "- reverse, additive, seed 0: training diverged at step " in table


def test_what_is_wrong_with_runs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure comes first, also of a run with a score; no checkpoint is read for the table."""
    invconv = RunFolder(copy / "runs" / NAMES[1])
    report = invconv.read_report()
    report["held_out"]["mean"] = None
    invconv.report.write_text(json.dumps(report))
    RunFolder(copy / "runs" / NAMES[3]).report.unlink()
    ablation = Ablation(CONFIGS, copy, IMAGES)
    ablation.failures[NAMES[0]] = "the end cannot be written"
    monkeypatch.setattr(Checkpoint, "load", lambda path: pytest.fail("read"))
    table = ablation.write()
    assert cells(table)["reverse"][2] == "2"
    assert [line for line in table.splitlines() if line.startswith("- ")] == [
        "- reverse, additive, seed 0: the end cannot be written",
        "- invconv, additive, seed 0: its held-out score is not finite",
        "- invconv, additive, seed 1: it is not at its end",
    ]


def test_settings_and_images_are_those_of_the_folder(copy: Path, tmp_path: Path) -> None:
    assert Ablation([replace(config, max_steps=5) for config in CONFIGS], copy, IMAGES).trials[0].report() is None
    with pytest.raises(ValueError, match=r"^lr: expected 0.004, as the run was started with, found 0.5$"):
        Ablation([replace(config, lr=0.5) for config in CONFIGS], copy, IMAGES)
    with pytest.raises(ValueError, match=r"^data: expected the images that the run was started with, found others"):
        Ablation(CONFIGS, copy, IMAGES.subset(range(20)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(ValueError, match=r"^out: expected a new or empty folder, or that of an ablation, found .*'x'"):
        Ablation(CONFIGS, tmp_path / "other", IMAGES)
