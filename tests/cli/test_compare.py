"""``pyglow-fast compare``: all runs, what it makes of them, and going on after whatever stopped it."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pyglow_fast.cli import main
from pyglow_fast.cli.train import make_config
from pyglow_fast.data import DATA_HELP
from pyglow_fast.experiments import variants
from pyglow_fast.train import Checkpoint, Run, RunFolder, TrainState

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


@pytest.fixture
def copy(compared: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(compared, tmp_path / "c"))


@pytest.fixture
def forbid_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: TrainState) -> float:
        raise AssertionError("no step was to be taken")

    monkeypatch.setattr(TrainState, "step", step)


def times(out: Path) -> dict[str, int]:
    """When each file below ``out`` but the three of the comparison itself was written."""
    return {str(path): path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}


def held_out(out: Path, name: str) -> float:
    report = RunFolder(out / "runs" / name).report.read_text()
    return float(re.search(r'"held_out": \{\s*"mean": ([\d.]+)', report).group(1))  # type: ignore[union-attr]


def cells(out: Path) -> list[list[str]]:
    """The rows of table.md below its head."""
    lines = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_all_runs(compared: Path) -> None:
    assert sorted(os.listdir(compared)) == ["curves.csv", "curves.png", "runs", "table.md"]
    assert sorted(os.listdir(compared / "runs")) == sorted(NAMES)
    for name in NAMES:
        config = RunFolder(compared / "runs" / name).load().config
        assert f"{config.model.permutation}-{config.model.coupling}-seed{config.seed}" == name


def test_table_and_curves(compared: Path) -> None:
    """By the reports of the runs: means over seeds, and their standard deviation."""
    found = {row[0]: row for row in cells(compared)}
    with (compared / "curves.csv").open(newline="") as file:
        curves = list(csv.DictReader(file))
    assert [(row["permutation"], row["step"]) for row in curves] == [
        (permutation, step) for permutation in ("reverse", "invconv") for step in ("0", "3", "6")
    ]
    for permutation in ("reverse", "invconv"):
        values = [held_out(compared, f"{permutation}-additive-seed{seed}") for seed in (0, 1)]
        mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
        assert found[permutation][1:5] == ["additive", f"{mean:.4f} ± {spread:.4f}", "2", "6"]
        last = next(row for row in curves if row["permutation"] == permutation and row["step"] == "6")
        assert float(last["held_out_bpd"]) == pytest.approx(mean, rel=1e-5)  # six digits in metrics.csv and here
        assert float(last["held_out_bpd_sd"]) == pytest.approx(spread, abs=2e-5 * mean)
        assert last["seeds"] == "2"
    scores = [float(row[2].split()[0]) for row in cells(compared)]
    assert scores == sorted(scores)
    reverse, invconv = (int(found[name][5].replace(",", "")) for name in ("reverse", "invconv"))
    assert invconv - reverse == 2 * (4 * 4 + 4 * 4 + 4)  # L, U and log_diag, in two steps of 4 channels


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


def test_all_variants_of_a_seed_see_the_same(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"size": 8, "gray": True, "n_levels": 1, "n_steps": 1, "hidden": 4, "batch_size": 4, "max_steps": 2}
    base, images = make_config(given | {"device": "cpu"}, data)
    seen: dict[int, list[torch.Tensor]] = {}
    for config in variants(base, ["reverse", "shuffle", "invconv"], ["additive", "affine"], [0, 1]):
        state = TrainState(config, images)
        batches: list[torch.Tensor] = []
        backward = state._backward

        def spy(part: Any, *how: bool, batches: Any = batches, backward: Any = backward) -> Any:
            batches.append(part.x.clone())
            return backward(part, *how)

        monkeypatch.setattr(state, "_backward", spy)
        state.initialize()
        state.step()
        state.step()
        former = seen.setdefault(config.seed, batches)
        assert len(batches) == 2
        assert all(torch.equal(x, y) for x, y in zip(former, batches, strict=True))
    assert not torch.equal(seen[0][0], seen[1][0])


def test_finished_runs_are_left_alone(
    copy: Path, data: str, options: list[str], forbid_steps: None, capsys: Capture
) -> None:
    before, table = times(copy), (copy / "table.md").read_bytes()
    for name in ("table.md", "curves.csv", "curves.png"):
        (copy / name).unlink()
    assert main(["compare", data, "--out", str(copy), *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 of 4 runs are finished already\n")
    assert times(copy) == before
    assert (copy / "table.md").read_bytes() == table


@pytest.mark.full
@pytest.mark.drawn
def test_more_runs_beside_former_ones(copy: Path, data: str, options: list[str], capsys: Capture) -> None:
    """The table has all that are in the folder."""
    before = times(copy)
    more = ["--couplings", "affine", "--permutations", "reverse", "--seeds", "0"]
    assert main(["compare", data, "--out", str(copy), *options, *more]) == 0
    text = capsys.readouterr().out
    assert "run 1 of 1: reverse-affine-seed0\n" in text
    assert before.items() <= times(copy).items()
    assert sorted((row[0], row[1], row[3]) for row in cells(copy)) == [
        ("invconv", "additive", "2"),
        ("reverse", "additive", "2"),
        ("reverse", "affine", "1"),
    ]
    with Image.open(copy / "curves.png") as picture:
        assert picture.size == (1260, 540)


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
    assert "- invconv, additive, seed 0: not finished, at step 4" in text
    assert sorted(os.listdir(out / "runs")) == ["invconv-additive-seed0", "reverse-additive-seed0"]
    assert main(["compare", data, "--out", str(out), *options]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 runs are finished already" in text
    assert "run 1 of 1: invconv-additive-seed0" in text
    for name in NAMES[:2]:
        one, other = (Checkpoint.load(RunFolder(path / "runs" / name).checkpoint).model for path in (out, compared))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert {row[0]: row[2] for row in cells(out)} == {
        permutation: f"{held_out(compared, f'{permutation}-additive-seed0'):.4f}"
        for permutation in ("reverse", "invconv")
    }


def test_a_run_killed_before_its_first_checkpoint(copy: Path, data: str, options: list[str]) -> None:
    """It is begun anew."""
    run = copy / "runs" / NAMES[3]
    wanted = held_out(copy, NAMES[3])
    for path in (run / "report.json", run / "best.safetensors"):
        path.unlink()
    shutil.rmtree(run / "checkpoints")
    assert main(["compare", data, "--out", str(copy), *options, "--quiet"]) == 0
    assert held_out(copy, NAMES[3]) == wanted


@pytest.mark.full
def test_a_longer_comparison(copy: Path, data: str, options: list[str], capsys: Capture) -> None:
    """As with train --resume the limit may be raised: the runs asked for go on from where they ended."""
    assert main(["compare", data, "--out", str(copy), *options, "--max-steps", "7", "--seeds", "1"]) == 0
    assert "run 2 of 2" in capsys.readouterr().out
    assert [RunFolder(copy / "runs" / name).load().progress["step"] for name in NAMES] == [6, 6, 7, 7]
    assert {row[4] for row in cells(copy)} == {"6 to 7"}


def test_a_run_that_diverges_does_not_stop_the_others(
    data: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "c"
    execute = Run.execute

    def hopeless(self: Run, quiet: bool = False) -> Any:
        if self.state.config.model.permutation == "reverse":
            for parameter in self.state.model.parameters():
                parameter.register_hook(lambda gradient: gradient * float("nan"))
        return execute(self, quiet)

    monkeypatch.setattr(Run, "execute", hopeless)
    assert main(["compare", data, "--out", str(out), *options, "--seeds", "0", "--max-skipped", "0"]) == 1
    assert "reverse-additive-seed0 failed: training diverged at step 1" in capsys.readouterr().out
    found = {row[0]: row for row in cells(out)}
    assert found["reverse"][2:4] == ["none", "0 of 1"]
    assert found["invconv"][3] == "1"
    assert "- reverse, additive, seed 0: training diverged at step 1: loss" in (out / "table.md").read_text()


def test_another_process_trains_one_of_them(copy: Path, data: str, options: list[str], capsys: Capture) -> None:
    """That one is left to it."""
    run = RunFolder(copy / "runs" / NAMES[1])
    run.report.unlink()
    with run.locked():
        assert main(["compare", data, "--out", str(copy), *options]) == 1
    assert "out: expected a run that no other process trains" in capsys.readouterr().out
    assert {row[0]: row[3] for row in cells(copy)} == {"reverse": "2", "invconv": "1 of 2"}


@pytest.mark.full
def test_masks(copy: Path, data: str, options: list[str]) -> None:
    """Another number of checkerboards is another variant, beside the former ones."""
    more = ["--permutations", "reverse", "--seeds", "0", "--checkerboards", "0", "1", "--quiet"]
    assert main(["compare", data, "--out", str(copy), *options, *more]) == 0
    name = "reverse-checkerboard1-additive-seed0"
    assert sorted(os.listdir(copy / "runs")) == sorted([*NAMES, name])
    model = RunFolder(copy / "runs" / name).load().config.model
    assert (model.n_steps, model.n_checkerboard) == (2, 1)
    found = {row[0]: row for row in cells(copy)}
    assert found.keys() == {"reverse", "invconv", "reverse + 1 checkerboard"}
    assert found["reverse + 1 checkerboard"][2] == f"{held_out(copy, name):.4f}"


def test_settings_from_a_file_and_by_name(
    compared: Path, data: str, tmp_path: Path, capsys: Capture, forbid_steps: None
) -> None:
    """A run's own config.toml gives the settings of all; the names of what is varied are not taken from it."""
    out = Path(shutil.copytree(compared, tmp_path / "c"))
    config = str(out / "runs" / NAMES[0] / "config.toml")
    varied = ["--permutations", "reverse", "invconv", "--couplings", "additive", "--seeds", "0", "1"]
    assert main(["compare", "--config", config, "--out", str(out), *varied]) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out


def test_other_images(copy: Path, data: str, options: list[str], tmp_path: Path, capsys: Capture) -> None:
    moved = Path(shutil.copytree(data.removeprefix("folder:"), tmp_path / "moved"))
    assert main(["compare", f"folder:{moved}", "--out", str(copy), *options]) == 0  # the same ones elsewhere
    (moved / "00.png").unlink()
    capsys.readouterr()
    assert main(["compare", f"folder:{moved}", "--out", str(copy), *options]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch("error: data: expected the images that run .* was started with, found others\n", error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], f"data: expected {DATA_HELP}, found none"),
        (["cifar"], f"data: expected {DATA_HELP}, found 'cifar'"),
        (["digits", "--out", ""], "argument --out: expected the name of a folder, found '' .*"),
        (["digits", "--out", "file"], "out: expected a folder, found a file, 'file'"),
        (["digits", "--out", "file/c"], "out: expected a folder that can be made, found .*file' is a file"),
        (["digits", "--batch-size", "2000"], "batch_size: expected at most the 1617 training images, found 2000"),
        (["digits", "--n-levels", "4"], "image_shape: expected sides divisible by 2^n_levels = 16, found (1, 8, 8)"),
    ],
    ids=lambda value: " ".join(value) if type(value) is list else "",
)
def test_refusals_of_a_new_one(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    assert main(["compare", "--out", "c", *arguments]) == 2
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    error = capsys.readouterr().err
    assert re.fullmatch(f"error: {pattern}\n", error), error
    assert os.listdir() == ["file"]


def test_under_torchrun(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", data, "--out", str(tmp_path / "c")]) == 2
    assert capsys.readouterr().err.startswith("error: WORLD_SIZE: expected 1, since the runs follow one another")
