"""``pyglow-fast train`` with settings from files, other data, and everything else it can write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyglow_fast.cli import main
from pyglow_fast.cli.train import from_file, make_config
from pyglow_fast.train import Checkpoint, RunFolder, TrainConfig, read_config


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(RunFolder(run).checkpoint).model


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


@pytest.mark.full
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


def test_help_says_how_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """With the default that there is."""
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "memory mode of training: reversible, checkpoint, store; or the bytes " in text
    assert f"such as 4GB: the fastest training within them (default: {TrainConfig().memory})" in text


def test_memory_in_bytes_from_options_and_file(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('memory = "1.5 GiB"\n')
    config, _ = make_config(from_file(str(path))[0], "digits")
    assert config.memory == 3 * 2**29
    config, _ = make_config({"memory": "4GB"}, "digits")
    assert config.memory == 4_000_000_000


@pytest.mark.parametrize("said", ["1GB", "1000000000"])
def test_a_run_within_bytes(tiny: list[str], said: str, tmp_path: Path) -> None:
    """There is room for all that it would store, so that it trains as if it did."""
    for name, memory in (("bytes", said), ("store", "store")):
        command = ["train", "digits", "--out", str(tmp_path / name), "--quiet", "--max-steps", "3", *tiny]
        assert main([*command, "--memory", memory]) == 0
    assert read_config(tmp_path / "bytes" / "config.toml")["memory"] == "1 GB"
    assert RunFolder(tmp_path / "bytes").load().config.memory == 10**9
    assert "1 GB" in (tmp_path / "bytes" / "report.html").read_text(encoding="utf-8")
    found, wanted = weights(tmp_path / "bytes"), weights(tmp_path / "store")
    for name, value in wanted.items():
        if not name.endswith("_extra_state"):  # what the control of drift has counted
            assert torch.equal(found[name], value), name


def test_too_few_bytes_are_refused_before_anything_is_made(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "digits", "--out", str(tmp_path / "r"), "--quiet", "--max-steps", "3", *tiny]
    assert main([*command, "--memory", "1kB"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"error: memory: expected at least \d.*, found .*\n", captured.err), captured.err
    assert not (tmp_path / "r").exists()


@pytest.mark.full
@pytest.mark.parametrize(("memory", "shown", "kept"), [("1GB", "1 GB", 10**9), ("1.5 GiB", "1536 MiB", 3 * 2**29)])
def test_a_resumed_run_may_have_bytes(
    run: Path, memory: str, shown: str, kept: int, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "digits", "--out", str(run), "--resume", "--max-steps", "22", "--memory", memory]
    assert main(command) == 0
    assert f"resumed with memory = '{shown}' (it was 'reversible')" in capsys.readouterr().out
    assert RunFolder(run).load().config.memory == kept
    assert main([*command[:-2], "--max-steps", "24"]) == 0  # the bytes that it has by now
    assert "resumed with memory" not in capsys.readouterr().out
    assert RunFolder(run).load().config.memory == kept


@pytest.mark.parametrize("memory", ["4XB", "0GB"])
def test_a_resumed_run_refuses_what_is_no_memory(run: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.toml").read_text()
    assert main(["train", "digits", "--out", str(run), "--resume", "--max-steps", "22", "--memory", memory]) == 2
    expected = 'memory: expected one of ("reversible", "checkpoint", "store") or bytes such as "4GB"'
    assert capsys.readouterr().err == f"error: {expected}, found {memory!r}\n"
    assert (run / "config.toml").read_text() == before


@pytest.mark.parametrize("memory", ["checkpoint", "store"])
def test_a_resumed_run_may_change_how_it_computes(run: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "digits", "--out", str(run), "--resume", "--max-steps", "22", "--memory", memory]
    assert main(command) == 0
    assert f"resumed with memory = '{memory}' (it was 'reversible')" in capsys.readouterr().out
    assert RunFolder(run).load().config.memory == memory


def test_an_end_that_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, before = run / "report.html", weights(run)
    page.unlink(missing_ok=True)
    page.mkdir()
    assert main(["train", "--resume", "--out", str(run), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the end of the run cannot be written: the page of the report ([Errno ")
    assert f"kept: {RunFolder(run).checkpoint}, with all weights; --resume writes the rest again" in said
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    page.rmdir()
    assert main(["train", "--resume", "--out", str(run), "--quiet"]) == 0
    assert page.is_file()
