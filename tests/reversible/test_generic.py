"""The generic path, cut into parts of few steps: all that may happen around a run gives stored gradients.

It computes here what csrc/run is for: steps with CouplingNets, whose gradients are known by every kind of step.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.captures import drifting
from support.chain_cases import (
    CASES,
    EVERY_STEP,
    Case,
    Mode,
    assert_same_gradients,
    counted_runs,
    cut_parts,
    gradients,
    objective,
    perturbed,
    relative_error,
)
from support.covering import pairs
from support.glow_tts_cases import mask_of_lengths
from support.user_steps import Checkpointed, Nested
from torch import Tensor, nn

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter
from pyglow_fast.layers import GroupedInvConv, MaskedSequence, WaveNet, reversible_sequence
from pyglow_fast.reversible import generic
from pyglow_fast.reversible import steps as steps_module

BY_NAME = {case.name: case for case in CASES}
DEEP = BY_NAME["depth-8"]
KEEPING = [Mode("checkpoint"), Mode("reversible", None), Mode("reversible", 3)]
modes = pytest.mark.parametrize("mode", KEEPING, ids=["checkpoint", "reversible", "anchors"])


@pytest.fixture(autouse=True)
def _generic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reversible_sequence, "is_runnable", lambda x: False)


@pytest.fixture(params=[1, 3, 8], ids=lambda steps: f"parts-of-{steps}")
def cuts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of a part."""
    cut_parts(monkeypatch, EVERY_STEP, request.param)
    return int(request.param)


def stored(sequence: pgf.ReversibleSequence, *inputs: Any) -> dict[str, Tensor]:
    """The gradients by ordinary autograd; what follows is not redone."""
    sequence.control.tolerance = 1e-11
    Mode("store").apply(sequence)
    return gradients(sequence, *inputs)


def assert_calm(sequence: pgf.ReversibleSequence, passes_: int = 1) -> None:
    """Nothing was redone, and every backward was heard of once."""
    report = sequence.memory_report()
    assert (report["passes"], report["trips"]) == (passes_ * (sequence.memory == "reversible"), 0), report


@pytest.mark.full
@modes
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_kind_of_step(case: Case, mode: Mode, cuts: int) -> None:
    sequence, (x, cond) = case.build(), case.batch()
    expected = stored(sequence, x, cond)
    outputs = [value.detach() for value in sequence(x, cond)]
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x, cond), expected)
    for found, wanted in zip(sequence(x, cond), outputs, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12, atol=1e-12)
    assert_calm(sequence)


def mixed_steps(where: str, injectors: bool) -> pgf.ReversibleSequence:
    """Eight steps, of which some have no coupling, first, in the middle or last."""
    cond = 2 if injectors else 0
    without = {"first": (0, 1), "middle": (3, 4), "last": (6, 7), "none": ()}[where]
    steps = []
    for k in range(8):
        permutation = ("invconv", "shuffle", "invconv_plain")[k % 3]
        if k in without:
            steps.append(pgf.FlowStep(4, coupling="none", permutation=permutation))
        else:
            injector = pgf.AffineInjector(4, cond, 5) if injectors and k % 2 == 0 else False
            steps.append(pgf.FlowStep(4, 5, cond_channels=cond, permutation=permutation, injector=injector))
    sequence = pgf.ReversibleSequence(steps).double()
    sequence.initialize(*(torch.randn(16, c, 6, 3, dtype=torch.float64) for c in ((4, cond) if cond else (4,))))
    return perturbed(sequence)


@pairs(
    pytest.mark.parametrize("where", ["first", "middle", "last", "none"]),
    pytest.mark.parametrize("injectors", [False, True]),
    pytest.mark.parametrize("memory", ["checkpoint", "reversible"]),
    pytest.mark.parametrize("squeeze_first", [False, True]),
    pytest.mark.parametrize("steps", [1, 3]),
)
def test_injectors_and_steps_without_coupling(
    where: str,
    injectors: bool,
    memory: str,
    squeeze_first: bool,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut_parts(monkeypatch, EVERY_STEP, steps)
    sequence = mixed_steps(where, injectors)
    x = torch.randn(3, *((1, 12, 6) if squeeze_first else (4, 6, 3)), dtype=torch.float64)
    cond = torch.randn(3, 2, 6, 3, dtype=torch.float64) if injectors else None

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(sequence(x, cond, squeeze_first))

    expected = stored(sequence, x, cond, run)
    for every in (None, 3):
        Mode(memory, every).apply(sequence)
        assert_same_gradients(gradients(sequence, x, cond, run), expected)
        assert_calm(sequence)


@pytest.mark.full
@modes
def test_a_mask(mode: Mode, cuts: int) -> None:
    steps = [pgf.FlowStep(8, permutation=GroupedInvConv(8), net=WaveNet(4, 8, 6, 3)) for _ in range(6)]
    model = MaskedSequence(steps)
    perturbed(model).double().eval()
    x, mask = torch.randn(3, 8, 9, dtype=torch.float64), mask_of_lengths((9, 5, 2), 9)

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(model(x, mask=mask))

    expected = stored(model, x, None, run)
    mode.apply(model)
    assert_same_gradients(gradients(model, x, None, run), expected)
    assert_calm(model)


@pytest.mark.full
@modes
@pytest.mark.parametrize("net", [Checkpointed, Nested])
def test_a_net_that_recomputes_itself(net: type[nn.Module], mode: Mode, cuts: int) -> None:
    steps = [pgf.FlowStep(4, net=net()) if k % 2 else pgf.FlowStep(4, 5) for k in range(6)]
    sequence = pgf.ReversibleSequence(steps).double().eval()
    x = torch.randn(3, 4, 6, 3, dtype=torch.float64)
    expected = stored(perturbed(sequence), x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)
    assert_calm(sequence)


@modes
def test_maps_that_want_no_gradient(mode: Mode, cuts: int) -> None:
    """Of a step one kind of them or all."""
    sequence, (x, _) = DEEP.build(), DEEP.batch()
    for step in list(sequence)[2:4]:
        step.actnorm.requires_grad_(False)
        step.permutation.requires_grad_(False)
    sequence[5].actnorm.bias.requires_grad_(False)
    sequence[6].permutation.requires_grad_(False)
    expected = stored(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)


@modes
def test_autocast(mode: Mode, cuts: int) -> None:
    """Nets in bfloat16 repeat to its eps alone where states are inverted, to the bit where they are kept."""
    torch.manual_seed(0)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 16) for _ in range(6)])
    x = torch.randn(4, 4, 8, 8)
    sequence.initialize(x)
    with torch.no_grad():
        for step in sequence:
            step.coupling.net.conv3.weight.normal_(std=0.03)  # type: ignore[union-attr, operator]

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return objective(sequence(x))

    Mode("checkpoint").apply(sequence)
    with pytest.MonkeyPatch.context() as patch:
        cut_parts(patch, 2**60)
        expected = gradients(sequence, x, None, run)
    mode.apply(sequence)
    found = gradients(sequence, x, None, run)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    bound = 64 * torch.finfo(torch.bfloat16).eps if mode.memory == "reversible" else 64 * torch.finfo(torch.float32).eps
    assert max(relative_error(found[name], grad) for name, grad in expected.items()) < bound
    assert_calm(sequence)


class TestKept:
    """Bytes from forward to backward."""

    N, C, SIDE = 2, 24, 8

    def saved(self, depth: int, mode: Mode) -> tuple[list[Tensor], int]:
        """The tensors that are saved for the backward but for parameters, and bytes that live beyond these and x."""
        sequence = pgf.ReversibleSequence([pgf.FlowStep(self.C, 4) for _ in range(depth)], tolerance=1e-3)
        x = torch.randn(self.N, self.C, self.SIDE, self.SIDE)
        sequence.initialize(x)
        mode.apply(sequence)
        known = {value.data_ptr() for value in (*sequence.parameters(), *sequence.buffers())}
        found: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.data_ptr() not in known:
                found.append(tensor)
            return tensor

        sequence(x)  # signs are made once
        with MemoryMeter() as meter, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            z, log_det = sequence(x)
            del log_det
            now = meter.now
        assert z.requires_grad
        return found, now

    @pytest.mark.full
    @modes
    def test_no_matrices(self, mode: Mode, cuts: int) -> None:
        found, _ = self.saved(16, mode)
        assert found
        square = [tensor.shape for tensor in found if tensor.shape[-2:] == (self.C, self.C)]
        assert not square, "what autograd keeps of the making of channel maps"

    @pytest.mark.full
    def test_growth_by_a_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """N C floats of projections; where parts end, a state."""
        # Log-dets of parts and of nets wait to be summed.
        projections, slack = 4 * self.N * self.C, 64 + 16 * self.N
        cut_parts(monkeypatch, 2**60)
        growth = (self.saved(64, Mode("reversible", None))[1] - self.saved(16, Mode("reversible", None))[1]) / 48
        assert projections <= growth <= projections + slack
        assert projections + slack < 4 * self.C**2, "one matrix a step would be seen"
        state = 4 * self.N * self.C * self.SIDE**2
        checkpointed = (self.saved(64, Mode("checkpoint"))[1] - self.saved(16, Mode("checkpoint"))[1]) / 48
        assert state <= checkpointed <= 2 * state + slack


class TestDrift:
    """What drifts is redone from the anchor before it, and the gradient is right in any case."""

    def planted(self, monkeypatch: pytest.MonkeyPatch, at: int) -> list[int]:
        """The state that the inversion of step ``at`` of 0..7 gives is wrong; an item for each inversion."""
        true, seen = steps_module.coupling_backward_from_output, []

        def wrong(*inputs: Any) -> tuple[Tensor, ...]:
            found, *grads = true(*inputs)
            seen.append(7 - len(seen))  # the step: none before this one is redone
            return (1.01 * found if seen[-1] == at else found, *grads)

        monkeypatch.setattr(steps_module, "coupling_backward_from_output", wrong)
        return seen

    @pytest.mark.parametrize("cond", [False, True])
    @pytest.mark.parametrize(
        ("steps", "every", "at", "redone"),
        [
            (1, None, 6, 1),  # the input of a part, which is known
            (1, 4, 7, 1),
            (3, None, 7, 2),  # parts 0..2, 3..5, 6 and 7: in the middle, which a projection tells of
            (3, None, 4, 3),
            (3, 5, 7, 2),
            (8, None, 3, 8),  # one part alone is judged as one
            (8, None, 0, 8),
            (8, 4, 6, 8),
        ],
        ids=str,
    )
    def test_a_planted_drift(
        self, steps: int, every: int | None, at: int, redone: int, cond: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = Case("conditioned", 8, cond_shape=(2, 6, 3)) if cond else DEEP
        sequence, (x, given) = case.build(), case.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x, given)
        sequence.control.tolerance = 1e-9
        cut_parts(monkeypatch, EVERY_STEP, steps)
        Mode("reversible", every).apply(sequence)
        self.planted(monkeypatch, at)
        assert_same_gradients(gradients(sequence, x, given), expected)
        report = sequence.memory_report()
        assert (report["passes"], report["trips"], report["redone_steps"]) == (1, 1, redone)
        assert 1e-3 < report["last_drift"] < 1e-1

    @pytest.mark.parametrize("at", [5, 7])
    def test_behind_parts_without_a_gradient(self, at: int, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of steps 0..2, which are frozen, nothing is kept: the input of the first that is trained is."""
        sequence, (x, _) = DEEP.build(), DEEP.batch()
        for step in list(sequence)[:3]:
            step.requires_grad_(False)
        expected = stored(sequence, x)
        sequence.control.tolerance = 1e-9
        Mode("reversible", None).apply(sequence)
        self.planted(monkeypatch, at)
        objective(sequence(x)).backward()
        found = {name: p.grad for name, p in sequence.named_parameters() if p.requires_grad}
        assert_same_gradients(found, {name: expected[name] for name in found})
        assert (sequence.memory_report()["passes"], sequence.memory_report()["trips"]) == (1, 1)

    def test_runs_of_the_nets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each net once; where states have drifted once more, and forward from the anchors but for the last of each."""
        sequence, (x, _) = DEEP.build(tolerance=1e-9), DEEP.batch()
        Mode("reversible", 4, 2**40).apply(sequence)
        cut_parts(monkeypatch, 2**60)
        self.planted(monkeypatch, 7)
        value = objective(sequence(x))
        with counted_runs(sequence) as runs:
            value.backward()
        inverted, redone = [7, 6, 5, 4, 3, 2, 1, 0], [4, 5, 6, 7, 6, 5, 4, 0, 1, 2, 3, 2, 1, 0]
        assert [int(name.split(".")[0]) for name in runs] == [*inverted, *redone]

    def test_projections_are_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without them the gradient is wrong, and an anchor tells of it too late."""
        sequence, (x, _) = DEEP.build(tolerance=1e-9), DEEP.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        Mode("reversible", None).apply(sequence)
        monkeypatch.setattr(generic, "projected_drift", lambda *_: torch.zeros(()).double())
        monkeypatch.setattr(generic, "anchor_drift", lambda *_: torch.zeros(()).double())
        self.planted(monkeypatch, 5)
        with pytest.raises(AssertionError, match="relative error"):
            assert_same_gradients(gradients(sequence, x), expected)

    @pytest.mark.parametrize("every", ["auto", None, 3])
    @pytest.mark.parametrize("name", ["depth-1", "depth-8", "callable", "cond"])
    def test_the_tolerance_decides(self, name: str, every: str | int | None, cuts: int) -> None:
        sequence, (x, cond) = BY_NAME[name].build(), BY_NAME[name].batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x, cond)
        for limit, trips in ((1e-9, 0), (1e-30, 1)):
            sequence.control.tolerance = limit
            Mode("reversible", every).apply(sequence)
            assert_same_gradients(gradients(sequence, x, cond), expected)
            assert sequence.memory_report()["trips"] == trips

    @pytest.mark.parametrize("factor", [1.0, 1.001, float("nan"), float("inf")])
    def test_deferred(self, factor: float, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """All parts invert; what has drifted makes its own gradients zero, and those of the parts before it."""
        sequence, (x, _) = DEEP.build(tolerance=1e-9), DEEP.batch()
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        Mode("reversible", 3).apply(sequence)
        sequence.control.deferred = True
        drifting(monkeypatch, x).fill_(factor)
        found = gradients(sequence, x)
        report = sequence.memory_report()
        drifted = factor != 1.0
        assert (report["passes"], report["redone_steps"]) == (1, 0)
        assert (report["trips"], report["skipped"]) == (drifted, drifted)
        if drifted:
            assert not any(grad.any() for grad in found.values())
        else:
            assert_same_gradients(found, expected)

    def test_a_scale_that_is_zero(self, cuts: int) -> None:
        """The inverse is a division by zero, the gradient is still the stored one."""
        sequence, (x, _) = DEEP.build(), DEEP.batch()
        with torch.no_grad():
            sequence[1].coupling.net.conv3.bias[2:] = -1e4  # type: ignore[union-attr, index]
        Mode("store").apply(sequence)
        expected = gradients(sequence, x)
        for every in ("auto", None, 2):
            Mode("reversible", every).apply(sequence)
            assert_same_gradients(gradients(sequence, x), expected)
            assert sequence.memory_report()["trips"] == 1
