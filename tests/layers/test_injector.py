"""AffineInjector, steps without a coupling, and states taken between steps. Laws are in contract/test_laws.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import assert_close
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import reference
from pyglow_fast.layers.flow_step import fold_steps
from pyglow_fast.reference import CouplingSpec

X, COND = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 3, 3, 5, dtype=torch.float64)


def moved(layer: nn.Module, spread: float = 0.1) -> nn.Module:
    """Initialised, and away from where it starts."""
    layer.double()
    layer.initialize(torch.randn(16, 4, 3, 5, dtype=torch.float64), torch.randn(16, 3, 3, 5, dtype=torch.float64))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("order", ["shift_scale", "scale_shift"])
def test_the_condition_alone_shifts_and_scales_every_channel(order: str) -> None:
    spec = CouplingSpec(bias=1.0, eps=0.1, order=order)
    layer = moved(pgf.AffineInjector(4, 3, 6, net_actnorm=True, spec=spec))
    shift, raw = layer.net(COND).chunk(2, dim=1)
    scale = torch.sigmoid(raw + 1.0) + 0.1
    z, log_det = layer(X, COND)
    assert_close(z, (X + shift) * scale if order == "shift_scale" else X * scale + shift)
    assert_close(log_det, scale.log().sum((1, 2, 3)))
    other = torch.randn_like(X)
    assert_close(layer(other, COND)[1], log_det)  # it knows nothing of x


def test_actnorms_of_the_net_start_from_the_condition() -> None:
    layer = pgf.AffineInjector(4, 3, 6, net_actnorm=True).double()
    layer(X, COND)
    hidden, _ = layer.net.norm1(layer.net.conv1(COND))
    assert float(hidden.mean((0, 2, 3)).detach().abs().max()) < 1e-12
    # Of the 1e-6 that is added to the standard deviation.
    assert float((hidden.var((0, 2, 3), correction=0) - 1.0).detach().abs().max()) < 1e-4


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_a_condition_that_wants_no_gradient_changes_none(memory: str) -> None:
    """Then the gradient of what the injector reads is not computed; the others are what they were."""
    steps = [pgf.FlowStep(4, 6, cond_channels=3, net_actnorm=True, injector=True) for _ in range(3)]
    sequence = moved(pgf.ReversibleSequence(steps, memory))
    found = []
    for wanted in (True, False):
        z, log_det = sequence(X, COND.clone().requires_grad_(wanted))
        found.append(torch.autograd.grad(z.square().sum() + log_det.sum(), list(sequence.parameters())))
    for with_condition, without in zip(*found, strict=True):
        assert_close(without, with_condition, 10.0)


def test_a_step_is_its_layers_in_order() -> None:
    step = moved(pgf.FlowStep(4, 6, cond_channels=3, injector=True, permutation="invconv_plain", scale_eps=0.01))
    assert step.injector.spec == step.coupling.spec
    u, first = step.actnorm(X)
    u, second = step.permutation(u)
    u, third = step.injector(u, COND)
    expected, fourth = step.coupling(u, COND)
    z, log_det = step(X, COND)
    assert_close(z, expected)
    assert_close(log_det, first + second + third + fourth)


def test_maps_of_steps_without_a_coupling_are_part_of_the_next_ones() -> None:
    options: list[dict[str, Any]] = [{"coupling": "none"}, {"coupling": "none"}, {}, {"coupling": "none"}]
    steps = [moved(pgf.FlowStep(4, 6, **own), 0.3) if own else pgf.FlowStep(4, 6).double() for own in options]
    maps = fold_steps(steps)  # type: ignore[arg-type]
    assert len(maps) == 2
    own = [fold_steps([step])[0] for step in steps]  # type: ignore[list-item]
    x = X
    for part in own[:3]:
        x = reference.channel_mix(x, part.matrix, part.offset)
    assert_close(reference.channel_mix(X, maps[0].matrix, maps[0].offset), x, 10.0)
    assert_close(maps[0].log_det, own[0].log_det + own[1].log_det + own[2].log_det)
    assert_close(maps[1].matrix, own[3].matrix)


def _sequence(memory: str, hooked: bool) -> pgf.ReversibleSequence:
    torch.manual_seed(3)
    options: list[dict[str, Any]] = [
        {"coupling": "none"},
        {"injector": True},
        {"injector": True},
        {},
        {"coupling": "none"},
    ]
    steps = [pgf.FlowStep(4, 6, cond_channels=3, **own) for own in options]
    sequence = moved(pgf.ReversibleSequence(steps, memory))
    assert isinstance(sequence, pgf.ReversibleSequence)
    if hooked:  # then the steps run one by one
        sequence[0].register_forward_hook(lambda *_: None)
    return sequence


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_states_between_steps_and_their_gradients(memory: str, hooked: bool) -> None:
    def run(sequence: pgf.ReversibleSequence, one_by_one: bool) -> list[Tensor]:
        x, cond = X.clone().requires_grad_(), COND.clone().requires_grad_()
        if one_by_one:
            states, log_det, state = [], torch.zeros(2, dtype=torch.float64), x
            for i, step in enumerate(sequence):
                state, gained = step(state, cond)
                log_det = log_det + gained
                states += [state] if i in (0, 2, 4) else []
        else:
            states, log_det = sequence.intermediates(x, cond, at=(0, 2))
        loss = states[0].sin().sum() + states[1].pow(3).sum() + states[2].cos().sum() + log_det.sum()
        return [*states, log_det, *torch.autograd.grad(loss, [x, cond, *sequence.parameters()])]

    for found, expected in zip(
        run(_sequence(memory, hooked), False), run(_sequence("store", False), True), strict=True
    ):
        assert_close(found, expected, 100.0)


def test_the_last_state_is_the_output() -> None:
    sequence = _sequence("reversible", False)
    states, log_det = sequence.intermediates(X, COND)
    z, expected = sequence(X, COND)
    assert len(states) == 1
    assert torch.equal(states[0], z)
    assert torch.equal(log_det, expected)


@pytest.mark.parametrize("at", [(4,), (2, 1), (1, 1), (-1,), (7,), 1, (0.5,)])
def test_steps_that_there_are_not(at: Any) -> None:
    with pytest.raises(ValueError, match=r"at: expected (ascending numbers of steps in 0\.\.3|a sequence of ints)"):
        _sequence("store", False).intermediates(X, COND, at)


def test_memory_does_not_grow_with_the_steps() -> None:
    """What autograd keeps between forward and backward, of 4 and of 12 steps with injectors."""

    def kept(n_steps: int) -> int:
        steps = [pgf.FlowStep(4, 16, cond_channels=3, net_actnorm=True, injector=True) for _ in range(n_steps)]
        sequence = moved(pgf.ReversibleSequence(steps, "reversible", anchor_every=None))
        own = {parameter.data_ptr() for parameter in sequence.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.dim() == 4 and tensor.shape[2:] == (24, 24) and tensor.data_ptr() not in own:
                found[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sequence(torch.randn(2, 4, 24, 24, dtype=torch.float64), torch.randn(2, 3, 24, 24, dtype=torch.float64))
        return sum(found.values())

    assert kept(4) == kept(12) == 2 * 24 * 24 * (4 + 4 + 3)  # x, z and the condition
