"""How ``train``, ``resume`` and ``demo`` end, and what they leave behind."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.program import done, pyglow_fast
from train.run_cases import weights

from pyglow_fast.app.cli import main, training
from pyglow_fast.app.experiments.ablation import Ablation
from pyglow_fast.train import RunFolder, TrainState
from pyglow_fast.train.page import duration


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
    assert checkpoint.progress["step"] == step
    planned = checkpoint.config.max_steps  # as many as nine minutes would hold, by the 22 steps of the run so far
    assert planned is None if checkpoint.config.max_minutes is None else planned > step


def test_divergence_exits_with_1(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hopeless = ["--lr", "1e6", "--warmup", "0", "--no-clip", "--max-steps", "50", "--quiet"]
    with pytest.warns(UserWarning, match="is the first step whose output is not finite"):
        assert main(["train", "digits", "--out", str(tmp_path / "r"), *hopeless, *tiny]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: training diverged at step ")
    assert "the last good checkpoint" in error
    assert "try: a lower learning rate" in error
    assert main(["sample", str(tmp_path / "r")]) == 0  # what is kept can be used


@pytest.mark.parametrize(("least", "code", "steps"), [(20, 0, 20), (40, 1, 30)])
def test_a_demo_on_a_busy_machine(
    least: int, code: int, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on for three times its minutes until it has the least steps, or ends with an error."""
    now, one_step = [time.monotonic()], TrainState.step

    def slow(self: TrainState) -> float:
        now[0] += 6.0  # a minute has time for 10 steps but for its end
        return one_step(self)

    monkeypatch.setattr(TrainState, "step", slow)
    monkeypatch.setattr("pyglow_fast.train.loop.time.monotonic", lambda: now[0])
    monkeypatch.setattr(training, "LEAST_DEMO", least)
    monkeypatch.setattr(training, "DEMO", training.DEMO | {"n_levels": 1, "n_steps": 1, "hidden": 4})
    ended = pyglow_fast("demo", "--minutes", 1, "--out", tmp_path / "demo")
    assert ended.code == code
    assert "are too few for samples: the demo takes up to 3 minutes" in ended.out
    reached = RunFolder(tmp_path / "demo").load().progress["step"]
    assert reached == steps or (code and 20 < reached < least)
    assert bool(code) == (f"expected {least} or more, in which a model learns" in ended.err)


def test_an_ablation_that_a_signal_stopped(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ablation, "execute", lambda *args, **options: signal.SIGTERM)
    ended = pyglow_fast("ablate", "digits", "--out", tmp_path / "c", *tiny)
    assert ended.code == 128 + signal.SIGTERM
    assert f"stopped; the same command goes on in {tmp_path / 'c'}" in ended.out


def test_an_end_that_cannot_be_written(run: Path) -> None:
    page, before = run / "report.html", weights(run)
    page.unlink(missing_ok=True)
    page.mkdir()
    ended = pyglow_fast("resume", run, "--quiet")
    assert ended.code == 1
    assert ended.err.startswith("error: the end of the run cannot be written: the page of the report ([Errno ")
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    page.rmdir()
    assert main(["resume", str(run), "--quiet"]) == 0
    assert page.is_file()


def test_a_report_while_it_trains_and_when_it_is_damaged(run: Path) -> None:
    """What a page lacks is no error; what is damaged is named."""
    page = run / "report.html"
    for path in (run / "report.json", page):
        path.unlink()
    assert main(["report", str(run)]) == 0
    assert "bits/dim" in page.read_text(encoding="utf-8")
    for damaged in ("{", "[]", "{}"):
        (run / "report.json").write_text(damaged)
        ended = pyglow_fast("report", run)
        assert (ended.code, "report.json as a run wrote it, found it damaged" in ended.err) == (2, True)


def test_times_in_units_that_people_read() -> None:
    found = [duration(seconds) for seconds in (0.2, 47, 60, 125, 3599.6, 12_000, 90_000)]
    assert found == ["0 s", "47 s", "1 min", "2 min 5 s", "1 h", "3 h 20 min", "25 h"]


def test_without_a_preset_a_cpu_gets_a_model_that_fits(tmp_path: Path) -> None:
    """Said before the first step, with how many steps follow; what is given comes first."""
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        values = torch.randint(256, (9, 12, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    command = ["train", f"folder:{tmp_path}", "--size", "8", "--device", "cpu", "--out", str(tmp_path / "run")]
    said = done(*command, "--n-steps", 1, "--hidden", 4, "--batch-size", 4, "--max-minutes", 0.05)
    assert "a model for 8x8 images without a preset: L 1, K 1, hidden 4, batch 4 (--list-presets has" in said
    assert re.search(r"million parameters; \d+ steps of \d+ ms fit into 0\.05 minutes, done at \d\d:\d\d", said)
    config = RunFolder(tmp_path / "run").read_config()
    assert (config.memory, config.max_minutes, config.model.scale_map) == ("store", 0.05, "tanh")
    assert config.max_steps is not None
