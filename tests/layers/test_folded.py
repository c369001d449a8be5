"""Inside ``folded()`` steps are folded once for many calls; outside anew at each, as the contract has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import pyglow_fast as pgf

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def steps(hidden: int = 5, **options: Any) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, hidden, **options) for _ in range(3)])
    for step in sequence:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
        nn.init.normal_(step.coupling.net.log_gain, std=0.2)
    sequence.double().initialize(X)
    return sequence.eval()


@torch.no_grad()
def inference(sequence: pgf.ReversibleSequence) -> Tensor:
    z, log_det = sequence(X)
    x, inverse_log_det = sequence.inverse(z)
    assert torch.allclose(x, X, atol=1e-11)
    assert torch.allclose(log_det, -inverse_log_det, atol=1e-11)
    return z


def check(sequence: pgf.ReversibleSequence) -> None:
    """What is computed without gradients is what the steps give one by one, with gradients."""
    x = X
    for step in sequence:
        x = step(x)[0]
    assert torch.allclose(inference(sequence), x, rtol=1e-11, atol=1e-11)


def test_inside_folded_the_maps_are_those_of_the_first_call() -> None:
    """That they are kept is all that it saves; outside the next call is by what the parameters hold then."""
    sequence = steps()
    with sequence.folded():
        before = inference(sequence)
        with torch.no_grad():
            sequence[0].actnorm.bias.add_(1.0)
        assert torch.equal(inference(sequence), before)
    check(sequence)
    assert not torch.allclose(inference(sequence), before, atol=1e-4)


@torch.no_grad()
def test_each_part_of_a_run_has_its_own_maps_inside_folded() -> None:
    sequence, x = steps(), X
    places = range(len(sequence) - 1)
    states, log_det = sequence.intermediates(x, at=places)
    with sequence.folded():
        for first in (True, False):  # before the whole run, and after it
            found, own_log_det = sequence.intermediates(x, at=places)
            for state, own in zip(states, found, strict=True):
                torch.testing.assert_close(own, state, rtol=0, atol=0)
            torch.testing.assert_close(own_log_det, log_det, rtol=0, atol=0)
            torch.testing.assert_close(sequence(x)[0], states[-1], msg=str(first))


def test_a_training_step_inside_folded_has_its_own_maps() -> None:
    sequence = steps()
    with sequence.folded():
        inference(sequence)
        with torch.no_grad():
            sequence[0].actnorm.bias.add_(1.0)
        x = X
        for step in sequence:
            x = step(x)[0]
        assert torch.allclose(sequence(X)[0], x, rtol=1e-11, atol=1e-11)
    check(sequence)
