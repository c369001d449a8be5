"""How the anchors' spacing follows the drift, and that what was learnt is saved with the weights."""

from __future__ import annotations

import copy
import math
import warnings
from itertools import groupby, pairwise

import pytest
import torch
from support.captures import drifting
from support.chain_cases import chain
from support.gradients import Memory, batch, both_ways, gradients

import pyglow_fast as pgf
from pyglow_fast.runs import drift
from pyglow_fast.runs.drift import DriftControl

LIMIT = 1e-6
CALM, TIGHT, TOO_MUCH = 0.01 * LIMIT, 0.51 * LIMIT, 2.0 * LIMIT


def record(control: DriftControl, value: float, spacing: int | None = None) -> None:
    """A pass with that drift: what drifts too much has all its steps redone."""
    if control.checkpoints:
        control.record_checkpointed()
    else:
        used = control.spacing if spacing is None else spacing
        control.record(value, LIMIT, control.n_steps if not value <= LIMIT else 0, used)


def calm_until(control: DriftControl, spacing: int, most: int = 10_000) -> int:
    """Calm passes until the spacing is reached: how many."""
    for passes_so_far in range(most):
        if control.spacing == spacing:
            return passes_so_far
        record(control, CALM)
    pytest.fail(f"spacing {control.spacing} after {most} calm passes")


@pytest.mark.parametrize(
    ("steps", "passes", "spacings"),
    [
        (32, [TOO_MUCH] * 2, [4, 2, 1]),  # with each trip, to checkpointing
        (24, [CALM] * 40, [4, 8, 16, 24]),  # up to the whole run
        (32, [TIGHT] * 100, [4]),  # a wider one might not fit
        (32, [TIGHT, math.nan], [4, 2]),
        (32, ([CALM] * (drift.GROW_AFTER - 1) + [TIGHT]) * 30, [4]),  # calm is counted in a row
    ],
    ids=["shrinks", "grows", "stays", "not a number", "not in a row"],
)
def test_the_spacing_follows_the_drift(steps: int, passes: list[float], spacings: list[int]) -> None:
    control, found = DriftControl(steps), []
    for value in passes:
        found.append(control.spacing)
        record(control, value)
    assert [spacing for spacing, _ in groupby([*found, control.spacing])] == spacings


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
    for _ in range(2):
        record(control, TOO_MUCH)
    assert control.checkpoints
    assert drift.FIRST_HOLD <= calm_until(control, 2) <= 2 * drift.FIRST_HOLD


def test_passes_that_began_with_another_spacing() -> None:
    """Three forwards, then three backwards, shrink it once; a graph goes on with the one that it was captured with."""
    control = DriftControl(32)
    calm_until(control, 16)
    for _ in range(3):
        record(control, TOO_MUCH, spacing=16)
    assert control.spacing == 8
    control = DriftControl(32)
    for _ in range(100):
        record(control, CALM, spacing=4)
    assert control.spacing == 8, "the next one up, and no further"
    record(control, TOO_MUCH, spacing=4)
    assert control.spacing == 2, "half of what drifted"


@pytest.mark.parametrize(("every", "anchors"), [(3, [3, 6]), (1, [1, 2, 3, 4, 5, 6, 7]), (None, []), (100, [])])
def test_a_fixed_spacing_is_kept(every: int | None, anchors: list[int]) -> None:
    control = DriftControl(8, every)
    for value in (TOO_MUCH, *[CALM] * 6, TOO_MUCH):
        record(control, value)
        assert control.anchors() == anchors


@pytest.mark.parametrize("skipped", [False, True])
def test_frequent_redos_are_warned_of_once_and_rare_ones_not(skipped: bool) -> None:
    def passes(control: DriftControl, count: int, bad: int) -> None:
        for i in range(count):
            drifts = i % bad == bad - 1
            redone = 8 * drifts * (not skipped)
            control.record(1.0 if drifts else CALM, LIMIT, redone, 4, drifted=drifts, skipped=drifts and skipped)

    control = DriftControl(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(DriftControl(8, 4), 4 * drift.WINDOW, 8)
        passes(control, drift.WINDOW // 4 - 1, 1)
    with pytest.warns(UserWarning, match="lost, with all gradients" if skipped else "redone from their anchors"):
        passes(control, 1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        passes(control, 4 * drift.WINDOW, 1)


@both_ways
def test_steps_that_drift_end_in_checkpointing(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sequence, x = chain(8), batch()
    drifting(monkeypatch, x).fill_(1.001)
    spacings = []
    for _ in range(4):
        gradients(sequence, x)
        spacings.append(sequence.memory_report()["anchor_every"])
    assert spacings == [2, 1, 1, 1]
    report = sequence.memory_report()
    assert (report["passes"], report["trips"]) == (4, 2)
    assert report["redone_steps"] > 0
    assert sequence.control_of(way == "forward").report()["passes"] == 0, "each direction has its own record"


@both_ways
def test_report() -> None:
    sequence, x = chain(8, tolerance=1e-9), batch()
    Memory("reversible", 3).apply(sequence)
    gradients(sequence, x)
    report = sequence.memory_report()
    assert 0.0 < report["last_drift"] == report["largest_drift"] < 1e-13
    expected = {"memory": "reversible", "steps": 8, "anchor_every": 3, "passes": 1, "trips": 0, "redone_steps": 0}
    assert report.items() >= expected.items()


class TestState:
    """What the control has learnt goes where the weights go."""

    def test_a_glow(self) -> None:
        fields = {"image_shape": (1, 8, 8), "n_levels": 2, "n_steps": 4, "hidden": 4}
        source, target = pgf.Glow(**fields), pgf.Glow(**fields)
        source.levels[1].steps.control.record(TOO_MUCH, LIMIT, 4, 4)
        target.load_state_dict(source.state_dict())
        assert [report["anchor_every"] for report in target.memory_report()] == [4, 2]
        before = source.memory_report()
        copy.deepcopy(source).levels[0].steps.control.record(TOO_MUCH, LIMIT, 4, 4)  # a copy learns for itself
        assert source.memory_report() == before
        converted = {name: value for name, value in source.state_dict().items() if "_extra_state" not in name}
        pgf.Glow(**fields).load_state_dict(converted, strict=True)
        with pytest.raises(RuntimeError, match="Missing key"):
            target.load_state_dict({name: value for name, value in converted.items() if "actnorm" not in name})

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

    def test_each_direction_has_its_own(self) -> None:
        source = chain(8)
        source.control.record(TOO_MUCH, LIMIT, 4, 4)
        source.inverse_control.record(CALM, LIMIT, 0, 4)
        state = source.get_extra_state()

        def passes(saved: object) -> list[tuple[int, int]]:
            target = chain(8)
            target.load_state_dict({**source.state_dict(), "_extra_state": saved})
            return [(own.spacing, own.report()["passes"]) for own in (target.control, target.inverse_control)]

        assert passes(state) == [(2, 1), (4, 1)]
        assert passes(state[0]) == [(2, 1), (4, 0)], "as it was saved before inverses had one"
        for wrong in (state[:1], state[:, :-1], torch.cat([state, state]), state.T):
            with pytest.raises(ValueError, match="drift control state: "):
                passes(wrong)

    @pytest.mark.parametrize("spoiled", [torch.zeros(3), None, "drift", *[{at: 0.5} for at in range(8)]], ids=str)
    def test_what_is_no_state_is_refused(self, spoiled: object) -> None:
        control = DriftControl(8)
        state = control.state()
        for at, value in spoiled.items() if isinstance(spoiled, dict) else ():
            state[at] = value
        with pytest.raises(ValueError, match="drift control state: "):
            control.load_state(state if isinstance(spoiled, dict) else spoiled)
        assert control.spacing == DriftControl(8).spacing, "nothing of it was taken"

    @pytest.mark.parametrize("drift", [math.inf, math.nan])
    def test_states_that_were_not_finite_are_no_fault_of_the_record(self, drift: float) -> None:
        control, loaded = DriftControl(8), DriftControl(8)
        control.record(drift=drift, limit=1e-5, redone=4, spacing=control.spacing, drifted=True)
        loaded.load_state(control.state())
        torch.testing.assert_close(loaded.state(), control.state(), rtol=0, atol=0, equal_nan=True)
