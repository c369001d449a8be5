"""Whole runs: what they write, that a resumed one is the same run, and that a diverged one keeps what was good."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pyglow_fast import GlowConfig
from pyglow_fast.data import DataConfig, ImageSet, histogram_bits_per_dim, png_bits_per_dim, split
from pyglow_fast.layers import ActNorm
from pyglow_fast.reversible.setting import parse_memory
from pyglow_fast.train import (
    Checkpoint,
    FolderError,
    RunFolder,
    TrainConfig,
    TrainingDivergedError,
    TrainState,
    evaluate,
    load_model,
    read_config,
    resume,
    start,
)
from pyglow_fast.train.metrics import COLUMNS, read_metrics

MakeConfig = Callable[..., TrainConfig]


def train(config: TrainConfig, out: Path, data: ImageSet, **options: Any) -> Any:
    return start(config, str(out), data=data, **options).execute(quiet=True)


def assert_same_state(actual: Path, expected: Path) -> None:
    one, other = Checkpoint.load(RunFolder(actual).checkpoint), Checkpoint.load(RunFolder(expected).checkpoint)
    for part in ("model", "ema", "optimizer", "rank"):
        found, wanted = getattr(one, part), getattr(other, part)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), part
    assert one.progress["step"] == other.progress["step"]


def test_what_a_run_writes(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    config = tiny_config()
    result = train(config, tmp_path / "run", tiny_images)
    folder = RunFolder(tmp_path / "run")
    assert sorted(path.name for path in folder.path.iterdir() if path != folder.lock) == [
        "best.safetensors",
        "checkpoints",
        "config.toml",
        "curve.png",
        "metrics.csv",
        "report.html",
        "report.json",
        "samples",
        "samples.png",
    ]
    assert TrainConfig.from_dict(read_config(folder.config)) == config
    steps = [int(path.stem.removeprefix("step-")) for path in folder.saved()]
    assert steps == [12, 9, 6]  # the newest three
    assert sorted(path.name for path in folder.sample_history.iterdir()) == ["step-0000006.png", "step-0000012.png"]
    with Image.open(folder.samples) as picture:
        assert picture.size == (2 * 130 + 2, 2 * 130 + 2)  # four images of 4x4, enlarged 32 times, 2 pixels apart
    assert result.step == 12
    assert result.held_out.images == 10
    assert result.train.images == 30
    report = json.loads(folder.report.read_text())
    assert report["held_out"]["mean"] == result.held_out.mean
    assert [item["name"] for item in report["yardsticks"]] == ["histogram", "PNG"]


def test_scores_and_yardsticks_are_those_of_the_saved_model(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    result = train(tiny_config(), tmp_path, tiny_images)
    train_images, held_out = (tiny_images.subset(index) for index in split(tiny_images, 0.25, 0))
    found = {item.name: item.bits_per_dim for item in result.yardsticks}
    assert found == {
        "histogram": histogram_bits_per_dim(train_images, held_out),
        "PNG": png_bits_per_dim(held_out)[0],
    }
    model = load_model(RunFolder(tmp_path).load(), "x")
    again = evaluate(model, held_out, 64, seed=5)
    # Other dequantisation noise, so equal only within a few standard errors of the ten images.
    assert abs(again.mean - result.held_out.mean) < 5 * again.standard_error
    assert result.before.mean > result.held_out.mean


def test_metrics(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    train(tiny_config(), tmp_path, tiny_images)
    text = (tmp_path / "metrics.csv").read_text().splitlines()
    assert text[0] == ",".join(COLUMNS)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8, 10, 12]
    assert [row["epoch"] for row in rows] == [0, 0, 1, 2, 2, 3, 4]  # 30 training images: three batches of 8 an epoch
    assert [row["held_out_bpd"] is not None for row in rows] == [True, False, True, False, True, False, True]
    assert [row["train_bpd"] is not None for row in rows] == [False] + [True] * 6
    assert [row["lr"] for row in rows[1:4]] == pytest.approx([5e-4, 1e-3, 1e-3])  # four steps of warm-up
    for row in rows[1:]:
        assert row["images_per_s"] > 0  # type: ignore[operator]
        assert row["memory_mb"] > 0  # type: ignore[operator]
        assert row["grad_norm"] > 0  # type: ignore[operator]


def test_train_bpd_is_the_mean_of_the_steps(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    train(tiny_config(max_steps=4), tmp_path, tiny_images)
    state = TrainState(tiny_config(), tiny_images)
    state.initialize()
    losses = [state.step() for _ in range(4)]
    rows = read_metrics(tmp_path / "metrics.csv")
    assert rows[1]["train_bpd"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-5)
    assert rows[2]["train_bpd"] == pytest.approx(sum(losses[2:]) / 2, rel=1e-5)


def test_threads_are_those_asked_for_and_given_back(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny_config(max_steps=1, threads=2), str(tmp_path), data=tiny_images)
    step, found = run.state.step, []
    monkeypatch.setattr(run.state, "step", lambda: (found.append(torch.get_num_threads()), step()))
    run.execute(quiet=True)
    assert found == [2]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("memory", ["reversible", "checkpoint", "store", "1GB"])
def test_the_model_is_told_how_to_keep_memory(memory: str, tiny_config: MakeConfig, tiny_images: ImageSet) -> None:
    state = TrainState(tiny_config(memory=memory), tiny_images)
    assert parse_memory(state.model.memory) == parse_memory(memory)


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["adam", "adamax"])
def test_a_resumed_run_is_bit_identical(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, optimizer: str
) -> None:
    fields = {
        "optimizer": optimizer,
        "class_conditional": True,
        "model": GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=2, hidden=4, n_classes=2),
        "decay_steps": 10,
    }
    train(tiny_config(**fields), tmp_path / "whole", tiny_images)
    train(tiny_config(**fields, max_steps=5), tmp_path / "parts", tiny_images)
    torch.rand(5)
    result = resume(str(tmp_path / "parts"), max_steps=12).execute(quiet=True)
    assert result.step == 12
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    assert RunFolder(tmp_path / "parts").load().config.max_steps == 12


def test_a_run_that_crashed_goes_on_from_its_last_checkpoint(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_config(), tmp_path / "whole", tiny_images)
    run = start(tiny_config(), str(tmp_path / "parts"), data=tiny_images)
    step = run.state.step

    def crash() -> float:
        if run.state.progress.step == 8:  # saved at 6, rows written up to 8
            raise MemoryError("no more")
        return step()

    monkeypatch.setattr(run.state, "step", crash)
    with pytest.raises(MemoryError):
        run.execute(quiet=True)
    assert [row["step"] for row in read_metrics(tmp_path / "parts" / "metrics.csv")][-1] == 8
    with open(tmp_path / "parts" / "metrics.csv", "a") as file:
        file.write("9,2,0.")  # a line cut off by the crash
    with pytest.warns(UserWarning, match="1 row"):
        resume(str(tmp_path / "parts")).execute(quiet=True)
    assert_same_state(tmp_path / "parts", tmp_path / "whole")
    same = [name for name in COLUMNS if name not in ("seconds", "images_per_s", "memory_mb")]
    rows = [
        [{name: row[name] for name in same} for row in read_metrics(tmp_path / name / "metrics.csv")]
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


def test_resuming_a_finished_run_changes_no_weights(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    train(tiny_config(max_steps=3), tmp_path / "a", tiny_images)
    before = (tmp_path / "a" / "metrics.csv").read_text()
    weights = RunFolder(tmp_path / "a").load().model
    assert resume(str(tmp_path / "a")).execute(quiet=True).step == 3
    after = RunFolder(tmp_path / "a").load().model
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert (tmp_path / "a" / "metrics.csv").read_text() == before


@pytest.mark.parametrize(
    ("limits", "step"),
    [
        ({"max_steps": 2}, 2),
        ({"max_steps": None, "max_epochs": 2}, 6),
        ({"max_steps": 4, "max_epochs": 2}, 4),
        ({"max_steps": None, "max_minutes": 1.25}, 3),  # time is looked at between steps
    ],
)
def test_limits(
    tiny_config: MakeConfig,
    tiny_images: ImageSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, Any],
    step: int,
) -> None:
    """Of steps of half a minute."""
    run = start(tiny_config(**limits), str(tmp_path), data=tiny_images)
    one_step, clock = run.state.step, [0.0]

    def slow() -> float:
        clock[0] += 30.0
        return one_step()

    monkeypatch.setattr(run.state, "step", slow)
    monkeypatch.setattr("pyglow_fast.train.loop.time.monotonic", lambda: clock[0])
    assert run.execute(quiet=True).step == step


def poison(run: Any, at: int, monkeypatch: pytest.MonkeyPatch, value: float = math.nan) -> None:
    """Let a weight be no number before step ``at``."""
    step = run.state.step

    def poisoned() -> float:
        if run.state.progress.step == at:
            with torch.no_grad():
                run.state.model.prior.mean_log_sd.fill_(value)
        return step()

    monkeypatch.setattr(run.state, "step", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    run = start(tiny_config(max_skipped=0), str(tmp_path), data=tiny_images)
    poison(run, 7, monkeypatch, value)
    with pytest.raises(TrainingDivergedError) as caught:
        run.execute(quiet=True)
    report = str(caught.value)
    for part in (
        "diverged at step 8: loss",
        "gradient norm",
        "lr 0.001",
        "step-0000006.safetensors, the last good",
        "try: a lower",
    ):
        assert part in report
    checkpoint = RunFolder(tmp_path).load()
    assert checkpoint.progress["step"] == 6
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values())
    resume(str(tmp_path)).execute(quiet=True)  # and it can go on


def test_a_ruined_update_is_not_saved(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of step 3 is still finite and only its update ruins the weights, right before they are saved."""
    run = start(tiny_config(save_every=1), str(tmp_path), data=tiny_images)
    step = run.state.step

    def ruinous() -> float:
        loss = step()
        if run.state.progress.step == 3:
            with torch.no_grad():
                run.state.model.prior.mean_log_sd.fill_(math.nan)
        return loss

    monkeypatch.setattr(run.state, "step", ruinous)
    with pytest.raises(TrainingDivergedError, match="diverged at step 3: after its update"):
        run.execute(quiet=True)
    assert RunFolder(tmp_path).load().progress["step"] == 2


@pytest.mark.parametrize("sample_every", [1, 99])
def test_a_singular_matrix_is_a_divergence(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample_every: int
) -> None:
    """Samples need the inverses at once, else the next backward does."""
    run = start(tiny_config(sample_every=sample_every, save_every=2, eval_every=99), str(tmp_path), data=tiny_images)
    step = run.state.step

    def ruinous() -> float:
        loss = step()
        if run.state.progress.step == 3:
            with torch.no_grad():
                next(m for m in run.state.model.modules() if isinstance(m, ActNorm)).log_scale.fill_(-1e4)
            if run.state.ema is not None:
                run.state.ema.restart()
        return loss

    monkeypatch.setattr(run.state, "step", ruinous)
    report = "step 3: after its update a matrix of the flow is singular\n.*step-0000002.safetensors, the last good"
    with pytest.raises(TrainingDivergedError, match=report):
        run.execute(quiet=True)


def test_a_step_that_diverges_leaves_the_weights(tiny_config: MakeConfig, tiny_images: ImageSet) -> None:
    state = TrainState(tiny_config(clip_norm=None, max_skipped=0), tiny_images)
    state.initialize()
    state.step()
    with torch.no_grad():
        state.model.prior.mean_log_sd.fill_(math.nan)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items() if "_extra_state" not in name}
    with pytest.raises(TrainingDivergedError, match="step 2: loss nan bits/dim, gradient norm nan"):
        state.step()
    after = state.model.state_dict()
    assert all(torch.equal(after[name].nan_to_num(7.0), before[name].nan_to_num(7.0)) for name in before)
    assert state.progress.step == 1


def test_an_existing_run_is_left_alone(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    train(tiny_config(max_steps=1), tmp_path, tiny_images)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"out: expected a new folder \(or resume or overwrite\), found a run in"):
        start(tiny_config(), str(tmp_path), data=tiny_images)
    start(tiny_config(), str(tmp_path), overwrite=True, data=tiny_images)  # not executed: nothing is touched yet
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_overwrite_removes_the_old_run_and_nothing_else(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    train(tiny_config(max_steps=9), tmp_path, tiny_images)
    (tmp_path / "notes.txt").write_text("mine")
    train(tiny_config(max_steps=2), tmp_path, tiny_images, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-0000002.png"]
    assert RunFolder(tmp_path).load().progress["step"] == 2


def test_places_where_no_run_may_go(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    for out, message in [
        ("file", "out: expected a folder, found a file"),
        ("file/run", "out: expected a folder that can be made, found '.*file' is a file"),
        ("full", r"out: expected a new or empty folder, or a run, found '.*full', which holds \['thesis.tex'\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(tiny_config(), str(tmp_path / out), overwrite=True, data=tiny_images)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"


def test_a_folder_that_cannot_be_written(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny_config(), str(tmp_path / "run"), data=tiny_images)

    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(FolderError, match=r"out: expected a folder that can be written, found .*Permission denied"):
        run.execute(quiet=True)


def test_nothing_is_written_when_something_is_refused(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    wrong_shape = GlowConfig(image_shape=(1, 8, 8), n_levels=1, n_steps=1, hidden=4)
    unlabelled = ImageSet("x", tiny_images.pixels, 5)
    classes = GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4, n_classes=2)
    too_many = GlowConfig(image_shape=(1, 4, 4), n_levels=1, n_steps=1, hidden=4, n_classes=3)
    for fields, data, message in [
        ({"batch_size": 31}, tiny_images, "batch_size: expected at most the 30 training images, found 31"),
        ({"model": wrong_shape}, tiny_images, r"data: expected images of shape \(1, 8, 8\), .*, found \(1, 4, 4\)"),
        ({"model": classes, "class_conditional": True}, unlabelled, "class_conditional: expected images with labels"),
        ({"model": too_many, "class_conditional": True}, tiny_images, "data: expected 3 classes, .*, found 2"),
        ({"device": "cuda:99"}, tiny_images, "device: expected a device that torch finds, found 'cuda:99' with"),
        ({"data": DataConfig("digits", held_out=0.5)}, tiny_images.subset([0]), "data: expected at least 2 images"),
    ]:
        with pytest.raises(ValueError, match=message):
            start(tiny_config(**fields), str(tmp_path / "run"), data=data)
    assert not (tmp_path / "run").exists()
