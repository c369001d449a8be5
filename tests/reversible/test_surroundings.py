"""A reversible run under autocast and torch.compile."""

from __future__ import annotations

import pytest
import torch
from support.chain_cases import (
    CASES,
    WHOLE,
    Case,
    Mode,
    assert_same_gradients,
    counted_runs,
    gradients,
    objective,
    worst_error,
)
from support.user_steps import mixed
from torch import Tensor, nn

import pyglow_fast as pgf

PLAIN = next(case for case in CASES if case.name == "depth-3")


class TestAutocast:
    """Nets in bfloat16, the state in float32."""

    @pytest.mark.parametrize("backward_inside", [False, True])
    @pytest.mark.parametrize("mode", [Mode("checkpoint"), Mode("reversible", 1), Mode("reversible", 4)], ids=str)
    def test_gradients_are_as_near_as_bfloat16_is(self, mode: Mode, backward_inside: bool) -> None:
        case = Case("", 8, (4, 8, 8), options={"hidden": 16})
        sequence, (x, _) = case.build(), case.batch(8)
        Mode("store").apply(sequence)
        exact = gradients(sequence, x)
        sequence.float()
        single = x.float()

        def run(x: Tensor, cond: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z, log_det = sequence(x)
            assert z.dtype == log_det.dtype == torch.float32
            return objective((z, log_det))

        def found() -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
                return gradients(sequence, single, None, run)

        stored = found()
        cost = worst_error(stored, exact)
        mode.apply(sequence)
        got = found()
        assert all(grad.dtype == torch.float32 for grad in got.values())
        assert 1e-3 < cost < 0.5
        assert worst_error(got, stored) <= 2.0 * cost

    def test_an_exact_state_is_not_taken_for_a_drifted_one(self) -> None:
        """What judges the state must not be rounded to bfloat16: nets without any rounding show no drift."""
        sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=Constant()) for _ in range(6)], anchor_every=None).eval()
        x = torch.randn(4, 4, 8, 8, requires_grad=True)
        for inside in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                value = objective(sequence(x))
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                value.backward()
            report = sequence.memory_report()
            assert report["trips"] == 0, report


class Constant(nn.Module):
    """The same shift and scale everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.reshape(1, 4, 1, 1).expand(x.shape[0], 4, *x.shape[2:])


@pytest.mark.parametrize("fused", [True, False], ids=["steps", "modules"])
def test_code_around_it_compiles(fused: bool) -> None:
    """The run itself is called, not traced, and keeps what its memory mode says."""
    sequence, (x, _) = PLAIN.build() if fused else mixed(), PLAIN.batch()
    Mode("store").apply(sequence)
    expected = gradients(sequence, x)
    Mode("reversible", 2, WHOLE).apply(sequence)

    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        z, log_det = sequence(2.0 * x / 2.0)
        return objective((z * 1.0, log_det))

    with counted_runs(sequence) as runs:
        got = gradients(sequence, x, None, lambda x, _: run(x))
    assert_same_gradients(got, expected)
    per_net = 2 if fused else 3  # a module that is not known is inverted and differentiated in two runs
    assert len(runs) == per_net * sum(isinstance(module, pgf.Coupling) for module in sequence.modules())
    assert sequence.memory_report()["passes"] == 1
