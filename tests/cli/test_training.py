"""How ``train``, ``resume`` and ``demo`` end, and what they leave behind."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from pyglow_fast.cli import main
from pyglow_fast.cli._output import duration
from pyglow_fast.train import Checkpoint, RunFolder, TrainState, read_config

Capture = pytest.CaptureFixture[str]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(RunFolder(run).checkpoint).model


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
    assert main(["resume", str(run), "--quiet", *limit]) == 0
    checkpoint = RunFolder(run).load()
    assert (checkpoint.progress["step"], checkpoint.config.max_steps) == (step, None)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ("--max-epochs 1", {"max_steps": None, "decay_steps": None}),
        ("--max-minutes 0.001", {"max_steps": None, "decay_steps": None}),
        ("--max-steps 1 --optimizer adamax", {"optimizer": "adamax", "weight_decay": 0.0, "decay_steps": 1}),
    ],
)
def test_an_option_takes_away_what_the_preset_has_for_it(
    tiny: list[str], tmp_path: Path, options: str, wanted: dict[str, object]
) -> None:
    command = ["train", "digits", "--out", str(tmp_path / "r"), "--quiet", "--batch-size", "800"]
    assert main([*command, *options.split(), *tiny]) == 0
    config = RunFolder(tmp_path / "r").load().config
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_labels_that_are_told_apart_are_reported(tmp_path: Path, capsys: Capture) -> None:
    options = "--class-weight 1 --class-conditional --n-levels 1 --n-steps 1 --hidden 4 --max-steps 1 --eval-images 8"
    assert main(["train", "digits", "--out", str(tmp_path / "r"), "--quiet", *options.split()]) == 0
    assert "; labels " in capsys.readouterr().out


def test_divergence_exits_with_1(tiny: list[str], tmp_path: Path, capsys: Capture) -> None:
    hopeless = ["--lr", "1e6", "--warmup", "0", "--no-clip", "--max-steps", "50", "--quiet"]
    assert main(["train", "digits", "--out", str(tmp_path / "r"), *hopeless, *tiny]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: training diverged at step ")
    assert "the last good checkpoint" in error
    assert "try: a lower learning rate" in error
    assert main(["sample", str(tmp_path / "r")]) == 0  # what is kept can be used


@pytest.mark.parametrize("said", ["1GB", "1000000000"])
def test_a_run_within_bytes(tiny: list[str], said: str, tmp_path: Path) -> None:
    """There is room for all that it would store, so that it trains as if it did."""
    for name, memory in (("bytes", said), ("store", "store")):
        command = ["train", "digits", "--out", str(tmp_path / name), "--quiet", "--max-steps", "3", *tiny]
        assert main([*command, "--memory", memory]) == 0
    assert read_config(tmp_path / "bytes" / "config.toml")["memory"] == "1 GB"
    found, wanted = weights(tmp_path / "bytes"), weights(tmp_path / "store")
    for name, value in wanted.items():
        if not name.endswith("_extra_state"):  # what the control of drift has counted
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("memory", "shown"), [("store", "store"), ("1.5 GiB", "1536 MiB")])
def test_a_resumed_run_may_change_how_it_computes(run: Path, memory: str, shown: str, capsys: Capture) -> None:
    assert main(["resume", str(run), "--max-steps", "22", "--memory", memory]) == 0
    assert f"resumed with memory = '{shown}' (it was 'reversible')" in capsys.readouterr().out
    assert main(["resume", str(run), "--max-steps", "23"]) == 0  # the memory that it has by now
    assert "resumed with memory" not in capsys.readouterr().out


def test_an_end_that_cannot_be_written(run: Path, capsys: Capture) -> None:
    page, before = run / "report.html", weights(run)
    page.unlink(missing_ok=True)
    page.mkdir()
    assert main(["train", "--resume", "--out", str(run), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the end of the run cannot be written: the page of the report ([Errno ")
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    page.rmdir()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert page.is_file()


def test_a_report_while_it_trains_and_when_it_is_damaged(run: Path) -> None:
    """Whatever a page could lack is no error."""
    page = run / "report.html"
    for path in (run / "report.json", page):
        path.unlink()
    assert main(["report", str(run)]) == 0
    assert "bits/dim" in page.read_text(encoding="utf-8")
    (run / "report.json").write_text("{")
    assert main(["report", str(run)]) == 0


def test_where_a_run_goes_is_said_and_what_may_come_next(run: Path, capsys: Capture) -> None:
    again = run.with_name("run-2")
    assert main(["train", "--config", str(run / "config.toml"), "--max-steps", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"the run goes to \S*run-2, since no --out is given", said[0])
    assert RunFolder(again).exists
    assert re.fullmatch(r"next: pyglow-fast sample \S*run-2", said[-2])
    assert re.fullmatch(r"next: pyglow-fast serve \S*run-2", said[-1])


def test_times_in_units_that_people_read() -> None:
    found = [duration(seconds) for seconds in (0.2, 47, 60, 125, 3599.6, 12_000, 90_000)]
    assert found == ["0 s", "47 s", "1 min", "2 min 5 s", "1 h", "3 h 20 min", "25 h"]
