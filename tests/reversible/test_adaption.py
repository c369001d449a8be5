"""How the anchors' spacing follows the drift, and that what was learnt is saved with the weights."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.captures import drifting
from support.chain_cases import CASES, Mode, gradients
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.reversible import DriftControl, drift

DEEP = next(case for case in CASES if case.name == "depth-8")
LIMIT = 1e-6
CALM, TIGHT, TOO_MUCH = 0.01 * LIMIT, 0.51 * LIMIT, 2.0 * LIMIT


def record(control: DriftControl, value: float, spacing: int | None = None) -> None:
    """A pass with that drift: what drifts too much has all its steps redone."""
    used = control.spacing if spacing is None else spacing
    control.record(value, LIMIT, control.n_steps if not value <= LIMIT else 0, used)


def calm_until(control: DriftControl, spacing: int, most: int = 10_000) -> int:
    """Calm passes until the spacing is reached: how many."""
    for passes_so_far in range(most):
        if control.spacing == spacing:
            return passes_so_far
        control.record_checkpointed() if control.checkpoints else record(control, CALM)
    pytest.fail(f"spacing {control.spacing} after {most} calm passes")


def test_the_spacing_shrinks_with_each_trip_and_ends_at_checkpointing() -> None:
    control, spacings = DriftControl(32), []
    while not control.checkpoints:
        spacings.append(control.spacing)
        record(control, TOO_MUCH)
    assert spacings == [4, 2]
    assert control.learnt.trips == 2
    assert control.learnt.redone_steps == 64


def test_it_grows_while_calm_up_to_the_whole_run() -> None:
    control = DriftControl(24)
    spacings = [control.spacing]
    for _ in range(40):
        record(control, CALM)
        if control.spacing != spacings[-1]:
            spacings.append(control.spacing)
    assert spacings == [4, 8, 16, 24]
    assert control.anchors() == []


def test_it_stays_where_a_wider_one_might_not_fit() -> None:
    control = DriftControl(32)
    for _ in range(100):
        record(control, TIGHT)
    assert control.spacing == 4
    record(control, float("nan"))
    assert control.spacing == 2


def test_calm_is_counted_in_a_row() -> None:
    control = DriftControl(32)
    for _ in range(30):
        for _ in range(drift.GROW_AFTER - 1):
            record(control, CALM)
        record(control, TIGHT)
    assert control.spacing == 4


def test_a_spacing_that_drifted_is_tried_again_later_and_later() -> None:
    control, waits = DriftControl(32), []
    for _ in range(4):
        calm_until(control, 4)
        record(control, TOO_MUCH)
        waits.append(calm_until(control, 4))
    assert waits[0] >= drift.FIRST_HOLD
    assert all(1.8 * first < second < 2.2 * first for first, second in pairwise(waits)), waits


def test_checkpointing_is_left_again() -> None:
    control = DriftControl(32)
    record(control, TOO_MUCH)
    record(control, TOO_MUCH)
    assert control.checkpoints
    assert drift.FIRST_HOLD <= calm_until(control, 2) <= 2 * drift.FIRST_HOLD


def test_passes_that_began_with_another_spacing_do_not_shrink_it_twice() -> None:
    control = DriftControl(32)
    calm_until(control, 16)
    for _ in range(3):  # three forwards, then three backwards
        record(control, TOO_MUCH, spacing=16)
    assert control.spacing == 8


def test_calm_with_closer_anchors_says_nothing_of_wider_ones() -> None:
    """As of a graph, which goes on with the spacing that it was captured with."""
    control = DriftControl(32)
    for _ in range(100):
        record(control, CALM, spacing=4)
    assert control.spacing == 8, "the next one up, and no further"
    record(control, TOO_MUCH, spacing=4)
    assert control.spacing == 2, "half of what drifted"


@pytest.mark.parametrize(
    ("every", "anchors"), [(3, [3, 6]), (1, [1, 2, 3, 4, 5, 6, 7]), (None, []), (8, []), (100, [])]
)
def test_a_fixed_spacing_is_kept(every: int | None, anchors: list[int]) -> None:
    control = DriftControl(8, every)
    for value in (TOO_MUCH, CALM, CALM, CALM, CALM, CALM, CALM, TOO_MUCH):
        record(control, value)
        assert control.anchors() == anchors


@pytest.mark.parametrize("every", ["auto", None, 2])
def test_frequent_redos_are_warned_of_with_advice(every: str | int | None) -> None:
    control = DriftControl(8, every)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(drift.WINDOW // 4 - 1):
            record(control, TOO_MUCH)
    with pytest.warns(UserWarning, match=r'redone from their anchors.*memory="checkpoint"'):
        record(control, TOO_MUCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        for _ in range(4 * drift.WINDOW):
            record(control, TOO_MUCH)


def test_rare_redos_are_not_warned_of() -> None:
    control = DriftControl(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(4 * drift.WINDOW):
            record(control, TOO_MUCH if i % 8 == 7 else CALM)


class TestInTraining:
    """The same on a run of steps."""

    def passes(self, sequence: pgf.ReversibleSequence, count: int, x: Tensor) -> list[int]:
        spacings = []
        for _ in range(count):
            gradients(sequence, x)
            spacings.append(sequence.memory_report()["anchor_every"])
        return spacings

    def test_calm_steps(self) -> None:
        sequence, (x, _) = DEEP.build(tolerance=1e-9), DEEP.batch()
        assert self.passes(sequence, 6, x)[-1] == 8
        assert sequence.memory_report()["trips"] == 0

    def test_steps_that_drift_end_in_checkpointing_and_are_right_all_the_way(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sequence, (x, _) = DEEP.build(), DEEP.batch()
        drifting(monkeypatch, x).fill_(1.001)
        assert self.passes(sequence, 4, x) == [2, 1, 1, 1]
        report = sequence.memory_report()
        assert report["trips"] == 2
        assert report["redone_steps"] > 0
        assert report["passes"] == 4

    def test_report(self) -> None:
        sequence, (x, _) = DEEP.build(), DEEP.batch()
        Mode("reversible", 3).apply(sequence)
        gradients(sequence, x)
        report = sequence.memory_report()
        assert 0.0 < report["last_drift"] == report["largest_drift"] < 1e-13
        del report["last_drift"], report["largest_drift"]
        expected = {"memory": "reversible", "steps": 8, "anchor_every": 3, "passes": 1, "trips": 0, "redone_steps": 0}
        assert report.items() >= expected.items()


class TestState:
    """What the control has learnt goes where the weights go."""

    def learnt(self) -> pgf.ReversibleSequence:
        sequence = DEEP.build()
        record(sequence.control, TOO_MUCH)
        record(sequence.control, TOO_MUCH)
        for _ in range(5):
            sequence.control.record_checkpointed()
        return sequence

    def assert_same_future(self, one: pgf.ReversibleSequence, other: pgf.ReversibleSequence) -> None:
        assert torch.equal(one.control.state(), other.control.state())
        for value in [CALM] * 60 + [TOO_MUCH] + [CALM] * 100:
            for control in (one.control, other.control):
                control.record_checkpointed() if control.checkpoints else record(control, value)
            assert one.control.spacing == other.control.spacing
        assert torch.equal(one.control.state(), other.control.state())

    @pytest.mark.parametrize("how", ["state_dict", "file", "safetensors", "deepcopy", "pickle"])
    def test_travels(self, how: str, tmp_path: Path) -> None:
        source = self.learnt()
        target = DEEP.build()
        if how == "deepcopy":
            target = copy.deepcopy(source)
        elif how == "pickle":
            target = pickle.loads(pickle.dumps(source))
        elif how == "state_dict":
            target.load_state_dict(source.state_dict())
        elif how == "file":
            torch.save(source.state_dict(), tmp_path / "weights.pt")
            target.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        else:
            from safetensors.torch import load_file, save_file

            save_file(source.state_dict(), tmp_path / "weights.safetensors")
            target.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        self.assert_same_future(source, target)
        gradients(target, DEEP.batch()[0])  # locks and all

    def test_a_copy_learns_for_itself(self) -> None:
        source = self.learnt()
        before = source.control.state()
        record(copy.deepcopy(source).control, TOO_MUCH)
        assert torch.equal(source.control.state(), before)

    def test_weights_saved_without_it(self) -> None:
        state = {name: value for name, value in self.learnt().state_dict().items() if "_extra_state" not in name}
        target = DEEP.build()
        target.load_state_dict(state, strict=True)
        assert target.control.spacing == 4
        with pytest.raises(RuntimeError, match="Missing key"):
            target.load_state_dict({name: value for name, value in state.items() if not name.startswith("3.")})

    def test_a_glow(self) -> None:
        fields = {"image_shape": (1, 8, 8), "n_levels": 2, "n_steps": 4, "hidden": 4}
        source, target = pgf.Glow(**fields), pgf.Glow(**fields)
        source.levels[1].steps.control.record(TOO_MUCH, LIMIT, 4, 4)
        target.load_state_dict(source.state_dict())
        assert [report["anchor_every"] for report in target.memory_report()] == [4, 2]
        converted = {name: value for name, value in source.state_dict().items() if "_extra_state" not in name}
        pgf.Glow(**fields).load_state_dict(converted, strict=True)

    def test_of_another_depth(self) -> None:
        control = DriftControl(64)
        calm_until(control, 64)
        shorter = DriftControl(8)
        shorter.load_state(control.state())
        assert shorter.spacing == 8

    def test_checkpoints_have_the_numbers_in_this_order(self) -> None:
        control, saved = DriftControl(32), torch.arange(1.0, 12.0)
        control.load_state(saved)
        names = "spacing calm hold next_hold passes trips redone_steps skipped"
        names += " last_drift largest_drift recent_redone"
        assert vars(control.learnt) == dict(zip(names.split(), range(1, 12), strict=True))
        floats = {name for name, value in vars(control.learnt).items() if isinstance(value, float)}
        assert floats == {"last_drift", "largest_drift", "recent_redone"}
        assert torch.equal(control.state(), saved.double())

    @pytest.mark.parametrize("state", [torch.zeros(3), None, "drift"], ids=str)
    def test_what_is_no_state(self, state: object) -> None:
        with pytest.raises(ValueError, match="drift control state: expected 11 numbers, found"):
            DriftControl(8).load_state(state)

    @pytest.mark.parametrize(
        ("name", "value", "expected"),
        [
            ("passes", math.nan, "passes: expected a whole number, 0 or more, found nan"),
            ("spacing", math.inf, "spacing: expected a whole number, 0 or more, found inf"),
            ("calm", 0.5, "calm: expected a whole number, 0 or more, found 0.5"),
            ("trips", -1.0, "trips: expected a whole number, 0 or more, found -1.0"),
        ],
    )
    def test_numbers_that_no_pass_has_found(self, name: str, value: float, expected: str) -> None:
        control = DriftControl(8)
        state = control.state()
        state[list(vars(control.learnt)).index(name)] = value
        with pytest.raises(ValueError, match=f"drift control state: {re.escape(expected)}$"):
            control.load_state(state)
        assert control.state()[0] == control.spacing == DriftControl(8).spacing, "nothing of it was taken"

    @pytest.mark.parametrize("drift", [math.inf, math.nan])
    def test_states_that_were_not_finite_are_no_fault_of_the_record(self, drift: float) -> None:
        control, loaded = DriftControl(8), DriftControl(8)
        control.record(drift=drift, limit=1e-5, redone=4, spacing=control.spacing, drifted=True)
        loaded.load_state(control.state())
        torch.testing.assert_close(loaded.state(), control.state(), rtol=0, atol=0, equal_nan=True)
