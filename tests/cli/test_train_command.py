"""``pyglow-fast train`` with settings from files, other data, and everything else it can write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyglow_fast.cli import main
from pyglow_fast.train import Checkpoint, RunFolder, read_config


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(RunFolder(run).checkpoint).model


def test_the_configuration_of_a_run_repeats_it(trained: Path, tmp_path: Path) -> None:
    assert main(["train", "--config", str(trained / "config.toml"), "--out", str(tmp_path / "r"), "--quiet"]) == 0
    assert (tmp_path / "r" / "config.toml").read_text() == (trained / "config.toml").read_text()
    found, wanted = weights(tmp_path / "r"), weights(trained)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_repeated_run_goes_beside_the_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    for number in (2, 3):
        assert main(["train", "--config", "config.toml", "--quiet", "--max-steps", "1"]) == 0
        assert RunFolder(run.with_name(f"run-{number}")).load().progress["step"] == 1
    assert RunFolder(run).load().progress["step"] == 20


def test_none_takes_back_what_a_file_says(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("patience = 3\nthreads = 2\nmax_steps = 1\ndata.held_out = 0.2\n")
    command = ["train", "digits", "--config", str(path), "--out", str(tmp_path / "r"), "--quiet", *tiny]
    assert main([*command, "--patience", "none", "--threads", "none", "--held-out", "none"]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert (config.patience, config.threads, config.data.held_out, config.max_steps) == (None, None, None, 1)


def test_options_come_before_the_file(tiny: list[str], tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("max_steps: 50\nmax_epochs: null\nlr: 0.5\nseed: 3\nmodel: {n_levels: 3}\ndata: {name: digits}\n")
    command = ["train", "--config", str(path), "--out", str(tmp_path / "r"), "--lr", "0.001", "--quiet", *tiny]
    assert main([*command, "--max-epochs", "1", "--batch-size", "800"]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert (config.lr, config.seed, config.model.n_levels) == (0.001, 3, 1)
    assert (config.max_steps, config.max_epochs) == (None, 1)  # a limit replaces those of the file
    assert config.weight_decay == 0.3  # the preset of the digits, which nobody changed


def test_every_option_ends_in_the_file(tiny: list[str], tmp_path: Path) -> None:
    options = ["--memory", "checkpoint", "--precision", "fp32", "--no-ema", "--accumulate", "2", "--max-skipped", "3"]
    options += ["--patience", "7", "--keep", "2", "--workers", "1", "--flip", "--crop-margin", "2", "--size", "10"]
    options += ["--clip", "5", "--check-ranks-every", "9", "--max-steps", "2", "--net-actnorm", "--held-out", "0.3"]
    assert main(["train", "digits", "--out", str(tmp_path / "r"), "--quiet", *options, *tiny]) == 0
    values = read_config(tmp_path / "r" / "config.toml")
    expected = {"memory": "checkpoint", "precision": "fp32", "ema_decay": None, "accumulate": 2, "max_skipped": 3}
    expected |= {"patience": 7, "keep": 2, "workers": 1, "clip_norm": 5.0, "check_ranks_every": 9, "max_steps": 2}
    assert {name: values[name] for name in expected} == expected
    assert {name: values["data"][name] for name in ("flip", "crop_margin", "size", "held_out")} == {
        "flip": True,
        "crop_margin": 2,
        "size": 10,
        "held_out": 0.3,
    }
    assert values["model"]["net_actnorm"] is True
    assert values["model"]["image_shape"] == [1, 10, 10]


def test_tensorboard(tiny: list[str], tmp_path: Path) -> None:
    command = ["train", "digits", "--out", str(tmp_path / "r"), "--quiet", "--tensorboard", *tiny]
    command += ["--log-every", "2", "--sample-every", "4", "--save-every", "4"]
    assert main([*command, "--max-steps", "6"]) == 0
    assert main([*command, "--max-steps", "10", "--resume"]) == 0
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train_bpd")] == [2, 4, 6, 8, 10]
    assert [event.step for event in events.Scalars("held_out_bpd")] == [0, 6, 10]
    assert [event.step for event in events.Images("samples")] == [4, 6, 8, 10]


def test_the_report_is_one_page(trained: Path) -> None:
    page = (trained / "report.html").read_text(encoding="utf-8")
    for part in (
        "digits",
        "held-out, untrained",
        "histogram",
        "learning rate",
        "torch",
        "n_levels",
        "samples at the end",
    ):
        assert part in page
    assert page.count("data:image/png;base64,") >= 6  # five curves and the samples
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("memory", ["checkpoint", "store"])
def test_a_resumed_run_may_change_how_it_computes(run: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "digits", "--out", str(run), "--resume", "--max-steps", "22", "--memory", memory]
    assert main(command) == 0
    assert f"resumed with memory = '{memory}' (it was 'reversible')" in capsys.readouterr().out
    assert RunFolder(run).load().config.memory == memory
