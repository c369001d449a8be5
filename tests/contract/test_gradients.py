"""Whatever the memory mode, gradients are those of ordinary autograd: for every kind of flow, loss and frozen part.

"Stored" gradients are those of mode "store". In float64 all others agree with them up to rounding; in float32 their
error is at most twice that of plain torch. Where a test below fails, training in a mode that saves memory is silently
wrong. Users' own nets, threads and torch's tools have files of their own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.bijections import BIJECTIONS, GlowAsLayer, softplus_scale
from support.covering import pairs
from support.glow_settings import Setting
from support.glow_tts_cases import mask_of_lengths
from support.gradients import (
    MEMORIES,
    PLANS,
    RECOMPUTING,
    REDONE,
    Gradients,
    Memory,
    assert_same_gradients,
    assert_stored_gradients,
    batch,
    both_ways,
    both_ways_in_full,
    gradients,
    least_bytes,
    memories_of,
    objective,
    perturbed,
    ready,
    steps,
    turn,
)
from support.helpers import memory_layouts
from support.plain_glow import plain_log_prob
from support.user_steps import Build, runs
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast import functional

# --------------------------------------------------------------------------------------------------- every kind of flow


@pairs(
    pytest.mark.parametrize("way", ["forward", "inverse"]),
    pytest.mark.parametrize("permutation", ["invconv", "invconv_plain", "shuffle", "reverse", "grouped"]),
    pytest.mark.parametrize(
        "scale",
        [
            {"scale_map": "sigmoid"},
            {"scale_map": "exp"},
            {"scale_map": "tanh", "scale_clamp": 0.5},
            {"scale_map": softplus_scale},
            {"scale_map": "atan", "scale_eps": 0.2},
        ],
        ids=["sigmoid", "exp", "tanh", "callable", "atan"],
    ),
    pytest.mark.parametrize("order", ["shift_scale", "scale_shift"]),
    pytest.mark.parametrize("coupling", ["affine", "additive"]),
    pytest.mark.parametrize("condition", ["", "cond", "injector"]),
    pytest.mark.parametrize("mask", ["channels", "checkerboard"]),
    pytest.mark.parametrize("dims", [1, 2, 3]),
    pytest.mark.parametrize("net_actnorm", [False, True]),
    pytest.mark.parametrize("squeeze", [False, True]),
    pytest.mark.parametrize("memory", [*MEMORIES, REDONE], ids=str),
)
def test_every_kind_of_step(
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    permutation: str,
    scale: dict[str, Any],
    order: str,
    coupling: str,
    condition: str,
    mask: str,
    dims: int,
    net_actnorm: bool,
    squeeze: bool,
    memory: Memory,
) -> None:
    """Also where the input is squeezed as it is read."""
    if way == "inverse":
        turn(monkeypatch)
    channels, sizes = {1: (4, (6,)), 2: (4, (4, 3)), 3: (8, (2, 3, 2))}[dims]
    injector = condition == "injector" and mask == "channels"
    options = {
        "coupling": coupling,
        "order": order,
        "net_actnorm": net_actnorm,
        "dims": dims,
        "mask": mask,
        "cond_channels": 2 if condition else 0,
        **scale,
    }
    steps = []
    for k in range(4):
        chosen = pgf.GroupedInvConv(channels) if permutation == "grouped" else permutation
        placed = {"parity": (k - (k > 0)) % 2} if mask == "checkerboard" else {"injector": injector and k % 2 == 0}
        steps.append(pgf.FlowStep(channels, 5, permutation=chosen, **options, **placed))
    cond = batch(64, 2, *sizes) if condition else None
    sequence = ready(steps, (channels, *sizes), cond)
    shape = (channels // 2**dims, *(2 * size for size in sizes)) if squeeze else (channels, *sizes)
    few = None if cond is None else cond[:2]
    x = batch(2, *shape)

    def run(own: pgf.ReversibleSequence, x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(own(x, cond, squeeze_first=squeeze))

    expected = gradients(sequence, x, few, partial(run, sequence))
    own = memory.of(sequence, functional.squeeze(x) if squeeze else x, few)
    assert_same_gradients(gradients(own, x, few, partial(run, own)), expected)
    assert (own.memory_report()["trips"] > 0) == (memory is REDONE)


@both_ways
@pytest.mark.parametrize("name", ["sequence-injectors", "sequence-without-couplings", "sequence-of-modules"])
def test_every_kind_of_run(name: str) -> None:
    """Injectors alone, steps without couplings, other layers between."""
    case = next(case for case in BIJECTIONS if case.name == name)
    sequence = case.trained(torch.device("cpu"))
    assert isinstance(sequence, pgf.ReversibleSequence)
    assert_stored_gradients(sequence, *case.batch(torch.device("cpu")))


MODELS = ["glow-cond-map", "glow-injectors", "glow-checkerboard", "glow-own-nets-cond"]
MODELS += ["glow", "glow-1d", "glow-3d", "glow-without-splits", "glow-own-nets", "glow-own-nets-additive"]
IN_FULL = [("inverse", name) for name in MODELS[2:]]


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(way, name, marks=[pytest.mark.full] * ((way, name) in IN_FULL))
        for way in ("forward", "inverse")
        for name in MODELS
    ],
)
def test_whole_models(way: str, name: str) -> None:
    """A Glow's log_prob, with its splits, priors, conditions and classes, in every mode and within a budget.

    Or its from_noise, the other way. A frozen model has the same.
    """
    case = next(case for case in BIJECTIONS if case.name == name)
    layer = case.trained(torch.device("cpu"))
    assert isinstance(layer, GlowAsLayer)
    model, (x, cond) = layer.glow, case.batch(torch.device("cpu"))
    y = None if model.config.n_classes is None else torch.arange(3) % model.config.n_classes
    if way == "inverse":
        x = torch.cat([part.detach().flatten(1) for part in model.to_noise(x, y, cond)[0]], dim=1)

    def run(x: Tensor, cond: Tensor | None, model: pgf.Glow = model) -> Tensor:
        if way == "inverse":
            return objective(model.from_noise(layer.latents(x), y, cond))
        return (model.log_prob(x, y, cond) * torch.arange(1.0, 4.0, dtype=torch.float64)).sum()

    model.memory = "store"
    expected = gradients(model, x, cond, run)
    memories: list[str | int] = ["checkpoint", "reversible"]
    if PLANS and "own-nets" not in name:
        model.memory = 2**40
        run(x, cond)
        most = model.memory_report()[0]["predicted_bytes"]
        model.memory = 1
        memories.append((least_bytes(lambda: run(x, cond)) + most) // 2)
    for memory in memories:
        model.memory = memory
        assert_same_gradients(gradients(model, x, cond, run), expected, memory)
        frozen = model.freeze()
        got = gradients(nn.Module(), x, cond, partial(run, model=frozen))
        assert_same_gradients(got, {key: expected[key] for key in got}, memory)


@both_ways
def test_sequences_with_padding() -> None:
    """Speech of different lengths: what is behind the end of one gives nothing and gets nothing."""
    nets = [pgf.WaveNet(4, 8, 6, 3, cond_channels=2) for _ in range(5)]
    steps = [pgf.FlowStep(8, permutation=pgf.GroupedInvConv(8), net=net) for net in nets]
    sequence = pgf.MaskedSequence(steps, "store")
    x, cond, mask = batch(3, 8, 9), batch(3, 2, 9), mask_of_lengths((9, 5, 2), 9)
    perturbed(sequence.double()).initialize(x, cond, mask)
    run = lambda own, x, cond: objective(own(x, cond, mask=mask))  # noqa: E731
    expected = gradients(sequence, x, cond, lambda *inputs: run(sequence, *inputs))
    padding = (mask == 0).expand_as(x)
    for memory in RECOMPUTING:
        own = memory.of(sequence)
        got = gradients(own, x, cond, lambda *inputs, own=own: run(own, *inputs))
        assert_same_gradients(got, expected, memory)
        assert not got["x"][padding].any()


@both_ways
@pytest.mark.parametrize("what", ["step", "actnorm", "permutation", "weight"])
def test_parameters_that_steps_share(what: str) -> None:
    """Each gives its part of the gradient, whatever of a step is in another one, too."""
    own = [pgf.FlowStep(4, 5, permutation="invconv_plain") for _ in range(4)]
    if what == "step":
        own[2] = own[0]
    elif what == "weight":
        own[2].coupling.net.conv1.weight = own[0].coupling.net.conv1.weight
    else:
        setattr(own[2], what, getattr(own[0], what))
    sequence = ready(own)
    assert len(list(sequence.parameters())) < sum(len(list(step.parameters())) for step in own)
    assert_stored_gradients(sequence, batch())


@both_ways
@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(n: int) -> None:
    """One sample, and an empty batch, as the last one of a rank may be."""
    assert_stored_gradients(steps(), batch(n))


@both_ways_in_full
@runs
def test_memory_layouts_of_input_and_incoming_gradient(build: Build) -> None:
    """Channels-last images, slices and transposed views are their values, whatever their strides."""
    sequence, x, weight = build(), batch(), batch()

    def run(own: pgf.ReversibleSequence, x: Tensor, weight: Tensor) -> Gradients:
        leaf = x.detach().requires_grad_()
        z, log_det = own(leaf)
        named = {"x": leaf, **dict(own.named_parameters())}
        found = torch.autograd.grad([z, log_det], list(named.values()), [weight, log_det.detach()])
        return dict(zip(named, found, strict=True))

    sequence.memory = "store"
    expected = run(sequence, x, weight)
    layouts = zip(memory_layouts(x).values(), memory_layouts(weight).values(), strict=True)
    for k, (x_as, weight_as) in enumerate(layouts):
        memory = RECOMPUTING[k % 4]
        assert_same_gradients(run(memory.of(sequence), x_as, weight_as), expected, memory)


@both_ways
@pytest.mark.parametrize("mode", ["store", "checkpoint", "reversible"])
def test_finite_differences(mode: str) -> None:
    """The stored gradients, which all others are compared with, are the derivative."""
    sequence = ready([pgf.FlowStep(2, 5) for _ in range(2)], (2, 2, 2))
    sequence.memory = mode
    assert torch.autograd.gradcheck(sequence, (batch(2, 2, 2, 2).requires_grad_(),))


# -------------------------------------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("name", ["three levels", "everything", "checkerboard"])
def test_float32_is_at_most_twice_as_far_off_as_plain_torch(name: str) -> None:
    """Else memory is saved at the price of a worse gradient."""
    setting = Setting(name)
    model, config = setting.model, setting.config
    x, y, cond = setting.x, setting.y, setting.cond

    draws = [x + 0.01 * torch.randn_like(x) for _ in range(4)]  # one draw's roundings are luck

    def plain(x: Tensor, dtype: torch.dtype) -> Tensor:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        leaves = {k: state[k].clone().requires_grad_() for k, _ in model.named_parameters()}
        given = None if cond is None else cond.to(dtype)
        value = plain_log_prob({**state, **leaves}, config, x.to(dtype), y, given).sum()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, list(leaves.values()))]).double()

    exact = torch.cat([plain(draw, torch.float64) for draw in draws])
    error = float((torch.cat([plain(draw, torch.float32) for draw in draws]) - exact).norm())
    model.float()

    def ours(x: Tensor) -> Tensor:
        value = model.log_prob(x.float(), y, None if cond is None else cond.float()).sum()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, list(model.parameters()))]).double()

    for memory in ("store", "checkpoint", "reversible", *([2**30] if PLANS else [])):
        model.memory = memory
        found = float((torch.cat([ours(draw) for draw in draws]) - exact).norm())
        assert found <= 2.0 * error, f"{memory}: error {found:.2e}, plain torch {error:.2e}"


@both_ways
@pytest.mark.parametrize(("depth", "spread"), [(32, 0.06), (64, 0.04), (32, 0.1)])
def test_states_that_drift_are_computed_again(way: str, depth: int, spread: float) -> None:
    """A flow that float32 cannot invert: other implementations of reversible training give a wrong gradient here.

    Its nets scale strongly, so that inverting the steps amplifies rounding by orders of magnitude.
    """
    steps: list[Any] = [pgf.FlowStep(12, 16) for _ in range(depth)]
    for step in steps:
        for parameter in step.coupling.net.conv3.parameters():
            nn.init.normal_(parameter, std=spread)
        nn.init.normal_(step.actnorm.log_scale, std=0.1)
        nn.init.normal_(step.actnorm.bias, std=0.3)
    sequence, x = pgf.ReversibleSequence(steps, "store").double().eval(), batch(2, 12, 8, 8)
    if way == "inverse":  # else values run away
        z = batch(64, 12, 8, 8)
        for step in list(sequence)[::-1]:
            step.actnorm.log_scale.data += step.inverse(z)[0].detach().std((0, 2, 3)).log()
            z = step.inverse(z)[0].detach()

    def found(own: pgf.ReversibleSequence, x: Tensor) -> Tensor:
        z, log_det = own(x)
        value = (0.5 * z.square().flatten(1).sum(1) - log_det).mean()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, list(own.parameters()))]).double()

    exact = found(sequence, x)
    sequence.float()
    x = x.float()
    error = float((found(sequence, x) - exact).norm())
    for every in ("auto", None, 4):
        own = pgf.ReversibleSequence(list(sequence), "reversible", every).eval()
        got = float((found(own, x) - exact).norm())
        assert got <= 2.0 * error, f"anchors at {every}: error {got:.2e}, stored {error:.2e}"
        assert every or own.memory_report()["redone_steps"] > 0, "a case that needs no control"


def test_states_that_cannot_be_inverted_at_all() -> None:
    """A scale that underflows to zero: the inverse divides by zero, the gradient is still the stored one."""
    sequence, x = steps(), batch()
    with torch.no_grad():
        sequence[1].coupling.net.conv3.bias[2:] = -1e4
    expected = gradients(sequence, x)
    for memory in RECOMPUTING:
        assert_same_gradients(gradients(memory.of(sequence), x), expected, memory)


# ------------------------------------------------------------------------------------------------ what wants a gradient


@both_ways
@runs
def test_frozen_parameters(build: Build) -> None:
    """Fine-tuning: what is frozen gets no gradient, the rest the same as ever; gradients of all or of x alone."""
    sequence, x = build(), batch()
    names = [name for name, _ in sequence.named_parameters()]
    wanted: list[Callable[[int, str], bool]] = [
        lambda i, name: i % 3 == 0,
        lambda i, name: "coupling" in name,
        lambda i, name: "coupling" not in name,
        lambda i, name: name[0] in "01",
        lambda i, name: name[0] in "34",
        lambda i, name: False,
    ]
    for choice in wanted:
        for i, (name, parameter) in enumerate(sequence.named_parameters()):
            parameter.requires_grad_(choice(i, name))
        found = assert_stored_gradients(sequence, x)
        assert found.keys() == {"x", *(name for i, name in enumerate(names) if choice(i, name))}
    sequence.requires_grad_(False)
    for name, parameter in sequence.named_parameters():
        parameter.requires_grad_(name[0] in "23")
    for memory in memories_of(sequence):  # no gradient of x either
        own = memory.of(sequence, x)
        objective(own(x)).backward()
        for name, parameter in own.named_parameters():
            assert (parameter.grad is not None) == (name[0] in "23"), name
        own.zero_grad()


@both_ways
def test_a_condition_alone() -> None:
    """An encoder in front of a frozen flow is trained through its condition."""
    cond = batch(64, 2, 6, 3)
    sequence = ready([pgf.FlowStep(4, 5, cond_channels=2) for _ in range(4)], cond=cond)
    sequence.requires_grad_(False)
    x, leaf = batch(), cond[:3].requires_grad_()
    (expected,) = torch.autograd.grad(objective(sequence(x, leaf)), leaf)
    for memory in MEMORIES:
        (got,) = torch.autograd.grad(objective(memory.of(sequence, x, leaf)(x, leaf)), leaf)
        assert_same_gradients({"cond": got}, {"cond": expected}, memory)
    for memory in RECOMPUTING[:4]:
        given = leaf.detach().clone().requires_grad_()
        value = objective(memory.of(sequence)(x, given))
        with torch.no_grad():
            given.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


@both_ways
@runs
def test_losses_of_single_outputs(build: Build) -> None:
    """z alone, log_det alone, a part of z, and sums, whose gradient comes in as one number, expanded."""
    sequence, x = build(), batch()
    losses: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda z, log_det: z.square().sum(),
        lambda z, log_det: log_det.square().sum(),
        lambda z, log_det: z[:, 2:].square().sum(),
        lambda z, log_det: z.sum() + log_det.sum(),
    ]
    for loss in losses:
        assert_stored_gradients(sequence, x, None, lambda own, x, cond, loss=loss: loss(*own(x)))
