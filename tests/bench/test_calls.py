"""The benchmark of what a call costs besides its kernel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import calls
from pyglow_fast import _backend


def test_cases_record_what_they_say() -> None:
    for record in (False, True):
        for name, case in calls.call_cases(record).items():
            out = case()
            first = out[0] if isinstance(out, tuple) else out
            assert isinstance(first, torch.Tensor)
            assert first.requires_grad == record, name


def test_every_call_is_timed_and_cases_take_turns() -> None:
    order: list[str] = []
    cases = {name: lambda name=name: order.append(name) for name in ("one", "other")}
    found = calls.time_calls(cases, calls.BLOCK + 3)
    assert {name: len(seconds) for name, seconds in found.items()} == {"one": calls.BLOCK + 3, "other": calls.BLOCK + 3}
    timed = order[2 * calls.WARM_UP_ROUNDS :]
    assert timed == ["one"] * calls.BLOCK + ["other"] * calls.BLOCK + ["one"] * 3 + ["other"] * 3


@pytest.mark.skipif(_backend.extension() is None, reason="no extension")
@pytest.mark.parametrize(("memory", "per_step"), [("store", 4), ("reversible", 6)])
def test_kernels_of_a_step_are_those_that_ran(memory: str, per_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixing with the coupling before it and the net, forward and backward; reversible, the net once more."""
    recorders = []

    class Watched(calls._Recorder):
        def __init__(self) -> None:
            super().__init__()
            recorders.append(self)

    monkeypatch.setattr(calls, "_Recorder", Watched)
    run, kernels = calls.step_cases(memory)
    (recorder,) = recorders
    assert per_step * calls.STEPS <= len(recorder.calls) <= (per_step + 1) * calls.STEPS
    run()
    with Watched() as again:
        kernels()
    assert [op for op, _ in again.calls] == [op for op, _ in recorder.calls]


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    assert calls.main(["--calls", "20", "--out", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads
    lines = capsys.readouterr().out.splitlines()
    names = [*calls.call_cases(record=False), "store", "reversible"]
    assert [line.split()[0] for line in lines] == ["call", *names[:5], "step", *names[5:]]
    content = json.loads((tmp_path / "calls-cpu.json").read_text(encoding="utf-8"))
    assert content["machine"]["threads"] == "1"
    assert len(content["rows"]) == 2 * 5 + 2
    for row in content["rows"][-2:]:
        assert row["rest_seconds"] == pytest.approx(row["seconds"] - row["kernel_seconds"])


def test_too_few_calls_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        calls.main(["--calls", "1"])
    assert "--calls: expected 2 or more, found 1" in capsys.readouterr().err
