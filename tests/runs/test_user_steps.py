"""A ReversibleSequence of modules that the package does not know."""

from __future__ import annotations

import pytest
import torch
from support.covering import pairs
from support.gradients import Memory, assert_same_gradients, batch, both_ways, gradients
from support.user_steps import Conditioned, Identity, Scale
from torch import Tensor, nn

import pyglow_fast as pgf

MODES = [Memory("checkpoint"), *(Memory("reversible", every) for every in ("auto", None, 1, 2, 3))]


@both_ways
@pairs(
    pytest.mark.parametrize("mode", MODES, ids=str),
    pytest.mark.parametrize("where", [(0,), (2,), (0, 1, 2), (0, 2)], ids=str),
    pytest.mark.parametrize("handed", ["same", "view", "transposed"]),
)
def test_steps_that_hand_their_input_on(handed: str, where: tuple[int, ...], mode: Memory) -> None:
    steps = [Identity(handed) if i in where else Scale() for i in range(3)]
    sequence, x = pgf.ReversibleSequence(steps).double(), batch()
    if len(where) == 3:
        sequence = pgf.ReversibleSequence([*steps, Scale()]).double()
    Memory("store").apply(sequence)
    expected = gradients(sequence, x)
    mode.apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)


@both_ways
def test_a_shared_step_and_a_condition_that_several_read() -> None:
    step, x, cond = Scale(), batch(), batch()
    sequence = pgf.ReversibleSequence([step, Conditioned(), pgf.ActNorm(4), Conditioned(), step]).double().eval()
    Memory("store").apply(sequence)
    expected = gradients(sequence, x, cond)
    for mode in MODES:
        mode.apply(sequence)
        assert_same_gradients(gradients(sequence, x, cond), expected)


class WrongInverse(Scale):
    """Its inverse is that of another scale."""

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z, cond)
        return 1.001 * x, log_det


@both_ways
@pytest.mark.parametrize("every", ["auto", None, 2])
def test_an_inverse_that_is_wrong_is_found_and_the_gradient_right(every: str | int | None) -> None:
    sequence, x = pgf.ReversibleSequence([Scale(), WrongInverse(), Scale()]).double(), batch()
    Memory("store").apply(sequence)
    expected = gradients(sequence, x)
    Memory("reversible", every).apply(sequence)
    assert_same_gradients(gradients(sequence, x), expected)
    report = sequence.memory_report()
    assert report["trips"] == 1
    assert 1e-4 < report["last_drift"] < 1e-2


class Broken(nn.Module):
    """Returns what ``answer`` makes of its input."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer, self.weight = answer, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> object:
        return self.answer(x * self.weight) if callable(self.answer) else self.answer

    inverse = forward


class Writer(nn.Module):
    """Scales its input in place."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mul_(2.0), x.new_zeros(x.shape[0])

    inverse = forward


@both_ways
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Broken(lambda x: x), r"steps: expected a log_det from all of them, or from none, found \[True, False, True\]"),
        (
            Broken(lambda x: (x, 0.0)),
            r"steps\[1\]: expected {} that returns tensors \(z, log_det\), or z alone, found tuple",
        ),
        (Broken(lambda x: (x, x.sum())), r"steps\[1\]: expected a log_det of shape \(3,\), found shape \(\)"),
        (Writer(), r"steps\[1\]: expected {} that leaves its input as it is, found one that writes"),
    ],
    ids=["no pair", "number", "scalar", "in place"],
)
def test_what_a_step_must_not_do(way: str, step: nn.Module, message: str, memory: str) -> None:
    sequence = pgf.ReversibleSequence([Scale(), step, Scale()], memory=memory).double()
    with pytest.raises(ValueError, match=message.format("a forward" if way == "forward" else "an inverse")):
        sequence(batch())
