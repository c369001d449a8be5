"""Flows on sequences of unequal lengths: each sample as if it were alone, log-dets, memory modes, initialisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.covering import pairs
from support.glow_tts_cases import mask_of_lengths, moved
from support.gradients import both_ways
from support.helpers import assert_close
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.layers import GroupedInvConv, MaskedSequence, WaveNet, squeeze_time, unsqueeze_time
from pyglow_fast.layers.flow_step import FlowStep
from pyglow_fast.reference import CouplingSpec

MEMORY = ("store", "checkpoint", "reversible")
LENGTHS, TIME = (5, 9, 2), 9  # which run by length, and come back in this order
SPECS = {
    "exp": CouplingSpec("affine", "exp", order="scale_shift"),
    "sigmoid": CouplingSpec("affine", "sigmoid", eps=1e-6),  # whose log s of zero is not zero
    "tanh": CouplingSpec("affine", "tanh"),
    "additive": CouplingSpec("additive"),
}


def flow(
    memory: str = "store", spec: str = "exp", cond: int = 0, steps: int = 3, dropout: float = 0.0, **options: Any
) -> MaskedSequence:
    def step() -> FlowStep:
        net = WaveNet(4, 4 if spec == "additive" else 8, 6, 3, 1, 2, cond, dropout)
        return FlowStep(8, coupling=SPECS[spec], permutation=GroupedInvConv(8), net=net)

    model: MaskedSequence = moved(MaskedSequence([step() for _ in range(steps)], memory, **options)).double()
    for part in model.flow_steps():
        part.actnorm.initialized.fill_(True)
    return model


def batch(cond: int = 0, positions: int = 1) -> tuple[Tensor, Tensor | None, Tensor]:
    x = torch.randn(len(LENGTHS), 8, TIME, dtype=torch.float64)
    given = torch.randn(len(LENGTHS), cond, positions, dtype=torch.float64) if cond else None
    return x, given, mask_of_lengths(LENGTHS, TIME)


def outcome(model: MaskedSequence, x: Tensor, cond: Tensor | None, mask: Tensor) -> list[Tensor]:
    """z, log_det, and the gradients of a function of both."""
    inputs = [value.clone().requires_grad_() for value in (x, cond) if value is not None]
    z, log_det = model(*inputs, mask=mask)
    loss = z.square().sum() + z.sum() - (log_det * torch.tensor([1.0, 2.0, 3.0]).double()).sum()
    return [z, log_det, *torch.autograd.grad(loss, [*inputs, *model.parameters()])]


@pytest.mark.full
@pairs(
    pytest.mark.parametrize("memory", MEMORY),
    pytest.mark.parametrize("spec", list(SPECS)),
    pytest.mark.parametrize("positions", [0, 1, TIME]),
    pytest.mark.parametrize("budget", ["auto", 1]),
)
def test_each_sample_is_as_if_alone(memory: str, spec: str, positions: int, budget: Any) -> None:
    """z, log_det and gradients are those of the samples without padding, one by one, by plain autograd; and back."""
    cond = 2 if positions else 0
    torch.manual_seed(1)
    model = flow(memory, spec, cond, memory_budget=budget)
    x, given, mask = batch(cond, positions)
    z, log_det, *grads = outcome(model, x.masked_fill(mask == 0, float("nan")), given, mask)
    assert_close(z * mask, z)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            back, back_log_det = model.inverse(z.detach().masked_fill(mask == 0, float("inf")), given, mask=mask)
        assert_close(back, x * mask, condition=100.0)
        assert_close(back_log_det, -log_det, condition=100.0)
    model.memory = "store"
    inputs = [value.clone().requires_grad_() for value in (x, given) if value is not None]
    loss = torch.zeros((), dtype=torch.float64)
    for i, length in enumerate(LENGTHS):
        own = inputs[0][i : i + 1, :, :length]
        own_cond = None if given is None else inputs[1][i : i + 1, :, : length if positions > 1 else 1]
        own_z, own_log_det = model(own, own_cond, mask=torch.ones(1, 1, length).double())
        assert_close(z[i : i + 1, :, :length], own_z, condition=10.0)
        assert_close(log_det[i : i + 1], own_log_det, condition=100.0)
        loss = loss + own_z.square().sum() + own_z.sum() - (i + 1) * own_log_det.sum()
    for found, expected in zip(grads, torch.autograd.grad(loss, [*inputs, *model.parameters()]), strict=True):
        assert_close(found[None], expected[None], condition=100.0)


@pytest.mark.parametrize("spec", list(SPECS))
def test_log_det_is_that_of_the_jacobian(spec: str) -> None:
    model, (x, _, mask) = flow(spec=spec), batch()
    _, log_det = model(x, mask=mask)
    for i, length in enumerate(LENGTHS):

        def own(values: Tensor, i: int = i, length: int = length) -> Tensor:
            whole = torch.cat([values.reshape(1, 8, length), x[i : i + 1, :, length:]], dim=2)
            return model(whole, mask=mask[i : i + 1])[0][:, :, :length].flatten()

        jacobian = torch.autograd.functional.jacobian(own, x[i, :, :length].flatten())
        assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet, condition=100.0)


def test_initialisation_sees_the_positions_that_are_there() -> None:
    model = MaskedSequence([FlowStep(8, permutation=GroupedInvConv(8), net=WaveNet(4, 8, 6))]).double()
    x, _, mask = batch()
    model.initialize((3.0 * x + 2.0).masked_fill(mask == 0, float("nan")), mask=mask)
    actnorm = model.flow_steps()[0].actnorm
    there = (3.0 * x + 2.0).transpose(1, 2)[mask[:, 0] == 1]
    assert_close(actnorm.bias[None], -there.mean(0)[None], condition=10.0)
    assert_close(actnorm.log_scale[None], -(there.std(0, correction=0) + 1e-6).log()[None], condition=10.0)
    fresh = MaskedSequence([FlowStep(8, permutation=GroupedInvConv(8), net=WaveNet(4, 8, 6))]).double()
    fresh(3.0 * x + 2.0, mask=mask)  # a first forward in training does the same
    assert_close(fresh.flow_steps()[0].actnorm.bias[None], actnorm.bias.detach()[None])


@both_ways
def test_states_that_drift_are_redone() -> None:
    model, (x, _, mask) = flow("reversible", steps=4, anchor_every=None, tolerance=1e-30), batch()
    found = outcome(model, x, None, mask)
    assert model.memory_report()["redone_steps"] > 0
    model.memory = "store"
    for own, expected in zip(found, outcome(model, x, None, mask), strict=True):
        assert_close(own[None], expected[None], condition=10.0)


def test_without_a_mask_it_is_a_reversible_sequence() -> None:
    model, (x, _, _) = flow("reversible", "sigmoid"), batch()
    z, log_det = pgf.ReversibleSequence(list(model), "store")(x)
    for mask in (None, torch.ones(3, 1, TIME, dtype=torch.bool)):
        own, own_log_det = model(x, mask=mask)
        assert_close(own, z)
        assert_close(own_log_det, log_det, condition=10.0)
    assert_close(model.inverse(z)[0], x, condition=100.0)


@pytest.mark.parametrize(("total", "factor"), [(9, 2), (8, 2), (7, 3), (1, 2)])
def test_squeezed_time_comes_back(total: int, factor: int) -> None:
    lengths = (total, max(total - 2, 0))
    x, mask = torch.randn(2, 3, total), mask_of_lengths(lengths, total, torch.float32)
    z, squeezed = squeeze_time(x.masked_fill(mask == 0, float("nan")), mask, factor)
    assert z.shape == (2, 3 * factor, total // factor)
    assert squeezed.sum((1, 2)).tolist() == [length // factor for length in lengths]
    back, there = unsqueeze_time(z, squeezed, factor)
    assert torch.equal(back, x[:, :, : back.shape[2]] * there)
    for i, length in enumerate(lengths):
        assert there[i].sum() == length - length % factor
    if total == 9:
        assert torch.equal(z[0, :, 1], torch.cat([x[0, :, 2], x[0, :, 3]]))  # one position, then the next


def test_nets_and_scales_that_know_no_mask_are_refused() -> None:
    x, _, mask = batch()
    plain = MaskedSequence([FlowStep(8, 4, dims=1)]).double()
    with pytest.raises(ValueError, match="net: expected one for masked sequences"):
        plain(x, mask=mask)
    assert not plain[0].actnorm.is_initialized
    own_scale = MaskedSequence([FlowStep(8, net=WaveNet(4, 8, 4), scale_map=lambda raw: (raw.exp(), raw))]).double()
    with pytest.raises(ValueError, match=r"steps\[0\].coupling: expected a scale map by name"):
        own_scale(x, mask=mask)
