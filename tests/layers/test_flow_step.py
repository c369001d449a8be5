"""FlowStep: folded steps are their layers one after the other, and are initialised in their order.

A channel map that the package does not know runs as InvConv does: fused, kept, reversible, frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from support.gradients import assert_stored_gradients, batch, perturbed, ready
from support.helpers import assert_close
from support.user_steps import Transposed
from torch import Tensor, nn
from torch.nn.utils import prune

import pyglow_fast as pgf
from pyglow_fast.functional import CouplingSpec
from pyglow_fast.layers import ChannelLinear, FrozenSteps
from pyglow_fast.layers.flow_step import PERMUTATIONS


def in_order(steps: Iterable[pgf.FlowStep], x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ActNorm, permutation, injector and coupling of each step, each by itself."""
    total = x.new_zeros(x.shape[0])
    for step in steps:
        for layer in (step.actnorm, step.permutation, step.injector, step.coupling):
            if layer is not None:
                x, log_det = layer(x, cond if layer in (step.injector, step.coupling) else None)
                total = total + log_det
    return x, total


class Householder(ChannelLinear):
    """W = exp(gain) H_1 ... H_R, H = I - 2 v v^T / |v|^2; log|det W| = C gain."""

    def __init__(self, channels: int, reflections: int = 2) -> None:
        super().__init__()
        self.channels = channels
        self.vectors = nn.Parameter(torch.randn(reflections, channels))
        self.register_buffer("gain", torch.tensor(0.1))

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        weight = torch.eye(self.channels, dtype=self.vectors.dtype, device=self.vectors.device)
        for vector in self.vectors:
            weight = weight - 2.0 * torch.outer(weight @ vector, vector) / vector.dot(vector)
        return weight * self.gain.exp(), self.channels * self.gain


class Nested(ChannelLinear):
    """The same W, of parameters that a submodule has."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels, self.inner = channels, Householder(channels)

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        return self.inner.weight_and_log_det()


def of_maps(first: str, second: str) -> list[dict[str, Any]]:
    """Maps of steps without a coupling are part of the next step's."""
    kinds = [("affine", first), ("none", first), ("none", second), ("affine", first), ("none", second), ("none", first)]
    return [{"coupling": coupling, "permutation": permutation} for coupling, permutation in kinds]


CONDITIONED = {"cond_channels": 3, "scale_eps": 0.01}
RUNS: dict[str, list[dict[str, Any]]] = {
    "additive": [{"coupling": "additive"}] * 3,
    # Whatever parity follows which.
    "checkerboards": [{"mask": "checkerboard", "parity": parity} for parity in (1, 0, 0, 1, 1, 0)],
    "scale map": [{"scale_map": "tanh", "order": "scale_shift"}] * 3,
    "additive checkerboards": [{"mask": "checkerboard", "coupling": "additive", "permutation": "shuffle"}] * 2,
    "border": [{"border": True, "net_actnorm": True}] * 3,
    "injectors": [{**CONDITIONED, "injector": i % 2 == 0, "permutation": "invconv_plain"} for i in range(3)],
}
ONE_KIND = tuple(RUNS)
RUNS |= {f"{first}, {second}": of_maps(first, second) for first in PERMUTATIONS for second in PERMUTATIONS}
MAPS: dict[str, list[Callable[[int], nn.Module]]] = {
    "of ones own": [Householder] * 3,
    "nested": [Nested] * 3,
    "beside others": [pgf.InvConv, Householder, pgf.Permute],
    "of InvConv's factors": [Transposed, pgf.InvConv, Transposed],
    "of InvConv's weight": [partial(pgf.InvConv, lu=False), *[partial(Transposed, lu=False)] * 2],
}
RUNS |= {name: [{"permutation": make} for make in maps] for name, maps in MAPS.items()}


def steps_of(name: str) -> list[pgf.FlowStep]:
    """The steps of one of RUNS; of MAPS each step has a map of its own."""
    made = [{key: value(4) if callable(value) else value for key, value in own.items()} for own in RUNS[name]]
    return [pgf.FlowStep(4, 6, **options) for options in made]


def one_by_one(steps: Iterable[pgf.FlowStep], x: Tensor, cond: Tensor | None = None) -> Tensor:
    for step in steps:
        x, _ = step(x, cond)
    return x


@pytest.mark.parametrize(
    ("name", "budget"),
    [*((name, "auto") for name in RUNS), *((name, 1) for name in (*ONE_KIND, "invconv, shuffle"))],
)
def test_a_run_is_its_layers_in_order(name: str, budget: str | int) -> None:
    """Folded in one batch, and step by step; recorded or not, frozen, in strips of a row."""
    run = pgf.ReversibleSequence(steps_of(name), memory_budget=budget)
    x = 2.0 * torch.randn(16, 4, 4, 5, dtype=torch.float64) + 1.0
    cond = torch.randn(16, 3, 4, 5, dtype=torch.float64) if "cond_channels" in RUNS[name][0] else None
    run.double().initialize(x, cond)
    perturbed(run)
    expected, total = in_order(run, x, cond)
    assert_close(one_by_one(run, x, cond), expected, condition=100.0)
    frozen = FrozenSteps(run)
    for own, grad in ((run, True), (run, False), (frozen, True), (frozen, False)):
        with torch.set_grad_enabled(grad):
            z, log_det = own(x, cond)
            assert_close(z, expected, condition=1000.0)
            assert_close(log_det, total, condition=1000.0)
            assert_close(own.inverse(expected, cond)[0], x, condition=1000.0)


@pytest.mark.parametrize("name", MAPS)
def test_gradients_through_maps_of_ones_own(name: str) -> None:
    found = assert_stored_gradients(ready(steps_of(name)), batch())
    assert all(value.norm() > 1e-3 for key, value in found.items() if key.endswith("vectors"))


@pytest.mark.parametrize("grad", [True, False])
def test_autocast_is_not_for_channel_maps(grad: bool) -> None:
    step = pgf.FlowStep(4, 5, permutation=Householder(4), precision="fp32")
    sequence = pgf.ReversibleSequence([step]).eval()
    x = torch.randn(2, 4, 3, 3)
    with torch.set_grad_enabled(grad):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside, alone = sequence(x)[0], step.permutation(x)[0]
        assert torch.equal(inside, sequence(x)[0])
        assert torch.equal(alone, step.permutation(x)[0])


def test_a_weight_of_another_dtype_is_refused() -> None:
    step = pgf.FlowStep(4, 5, permutation=Householder(4).double())
    with pytest.raises(ValueError, match=r"permutation: expected a weight of dtype .*float32.*, found .*float64"):
        step.eval()(torch.randn(2, 4, 3, 3))


@torch.no_grad()
def test_states_between_steps_are_those_of_one_step_after_the_other() -> None:
    sequence, x = ready([pgf.FlowStep(4, 5) for _ in range(3)]).eval(), batch()
    states, _ = sequence.intermediates(x, at=range(2))
    for step, state in zip(sequence, states, strict=True):
        x, _ = step(x)
        assert_close(state, x, condition=100.0)


@pytest.mark.parametrize("injector", [False, True])
def test_initialises_in_order(injector: bool) -> None:
    x, cond = 2.0 * torch.randn(8, 4, 3, 5, dtype=torch.float64) + 1.0, torch.randn(8, 1, 3, 5, dtype=torch.float64)
    step = pgf.FlowStep(4, 6, net_actnorm=True, cond_channels=1, injector=injector).double()
    one_by_one = copy.deepcopy(step)
    in_order([one_by_one], x, cond)
    by_call = copy.deepcopy(step)
    z = by_call.initialize(x, cond)
    step(x, cond)
    states = [[value.double() for value in each.state_dict().values()] for each in (step, by_call, one_by_one)]
    assert_close(states[:2], [states[2]] * 2, condition=10.0)
    assert_close(z, step(x, cond)[0])
    assert not z.requires_grad
    assert step.actnorm.is_initialized
    assert step.coupling.net.is_initialized


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_keywords_are_the_fields_of_a_spec(coupling: str) -> None:
    fields = {"scale_map": "tanh", "scale_bias": 1.5, "scale_eps": 0.1, "scale_clamp": 1.25, "order": "scale_shift"}
    spec = CouplingSpec(coupling, "tanh", bias=1.5, eps=0.1, clamp=1.25, order="scale_shift")
    for step in (pgf.FlowStep(4, 5, spec, precision="fp32"), pgf.FlowStep(4, 5, coupling, precision="fp32", **fields)):
        assert step.coupling.spec == spec
        assert step.coupling.precision == "fp32"


@pytest.mark.parametrize(("part", "name"), [("actnorm", "bias"), ("permutation", "lower")])
def test_what_prunes_a_parameter_has_its_say(part: str, name: str) -> None:
    step, x = pgf.FlowStep(4, hidden=6), torch.randn(2, 4, 4, 6)
    step.initialize(x)
    prune.l1_unstructured(getattr(step, part), name, 0.5)
    expected = in_order([step], x)
    for own in (step, pgf.ReversibleSequence([step])):
        assert_close(own(x), expected)


def test_a_net_of_ones_own_runs_once_and_whole() -> None:
    """Its BatchNorm, which sees whole batches, counts one; so does a first forward in training."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
    step, x = pgf.FlowStep(4, net=net), torch.randn(4, 4, 6, 6)
    for count, run in enumerate((step, step, step.inverse), start=1):
        with torch.set_grad_enabled(count == 1):
            run(x)
        assert net[1].num_batches_tracked == count


def test_a_factory_of_nets_is_called_with_the_channels() -> None:
    """As Glow calls one; what is neither a module nor gives one is refused where the step is made."""
    step = pgf.FlowStep(6, net=lambda i, o: nn.Conv2d(i, o, 3, padding=1))
    assert (step.coupling.net.in_channels, step.coupling.net.out_channels) == (3, 6)
    assert step(torch.randn(2, 6, 4, 4))[0].shape == (2, 6, 4, 4)
    for net, message in (
        ("conv", "net: expected a module, or a factory net"),
        (lambda i, o: None, "net: expected a factory that gives a module, found NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            pgf.FlowStep(6, net=net)


class Unhashable:
    """A scale map, s = exp(tanh(raw) / 2), that can be no key."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = 0.5 * raw.tanh()
        return log_scale.exp(), log_scale


def test_a_scale_map_of_ones_own() -> None:
    step, x = pgf.FlowStep(4, hidden=6, scale_map=Unhashable()), torch.randn(2, 4, 4, 4)
    step.initialize(x)
    for own in (step, pgf.ReversibleSequence([step])):
        assert_close(own.inverse(own(x)[0])[0], x)
