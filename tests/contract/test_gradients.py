"""Whatever the memory mode, gradients are those of ordinary autograd, and what users do around a flow goes on working.

"Stored" gradients are those of mode "store". In float64 all others agree with them up to rounding; in float32 their
error is at most twice that of plain torch. Where a test below fails, training in a mode that saves memory is silently
wrong, or a common tool of torch's breaks, as its name says.
"""

from __future__ import annotations

import copy
import pickle
import threading
import time
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
    BYTES,
    CONDITION,
    MEMORIES,
    RECOMPUTING,
    REDONE,
    Gradients,
    Memory,
    assert_same_gradients,
    gradients,
    least_bytes,
    objective,
    perturbed,
    relative_error,
    worst_error,
)
from support.helpers import assert_close, memory_layouts
from support.plain_glow import plain_log_prob
from support.user_steps import Checkpointed, Nested, mixed
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import pyglow_fast as pgf
from pyglow_fast import functional

SHAPE = (4, 6, 3)  # of the state of most runs below
Build = Callable[[], Any]


def ready(steps: list[pgf.FlowStep], shape: tuple[int, ...] = SHAPE, cond: Tensor | None = None) -> Any:
    """A run of these steps in mode "store": float64, initialised, away from the start."""
    sequence = pgf.ReversibleSequence(steps, "store").double()
    sequence.initialize(torch.randn(64, *shape, dtype=torch.float64), cond)
    return perturbed(sequence)


def steps(count: int = 5, **options: Any) -> Any:
    return ready([pgf.FlowStep(4, 5, **options) for _ in range(count)])


def with_nets(*nets: nn.Module, **options: Any) -> Any:
    return ready([pgf.FlowStep(4, net=net, **options) for net in nets])


def batch(n: int = 3, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or SHAPE), dtype=torch.float64)


# Runs that any feature below has to go with: FlowSteps, and layers and modules of a user's among them.
RUNS: dict[str, Build] = {"steps": steps, "modules": mixed}
runs = pytest.mark.parametrize("build", RUNS.values(), ids=RUNS)


def memories_of(sequence: pgf.ReversibleSequence) -> list[Memory]:
    """Byte budgets are for FlowSteps alone, and nothing but their nets is cut into chunks."""
    own = all(isinstance(step, pgf.FlowStep) for step in sequence)
    return MEMORIES if own else [memory for memory in RECOMPUTING if memory.budget == "auto"]


def assert_stored_gradients(
    sequence: pgf.ReversibleSequence,
    x: Tensor,
    cond: Tensor | None = None,
    run: Callable[[pgf.ReversibleSequence, Tensor, Tensor | None], Tensor] | None = None,
) -> Gradients:
    """Check that each memory mode gives the stored gradients (of ``run(sequence, x, cond)``), which are returned."""

    def found(own: pgf.ReversibleSequence) -> Gradients:
        return gradients(own, x, cond, None if run is None else lambda *inputs: run(own, *inputs))

    sequence.memory = "store"
    expected = found(sequence)
    assert expected
    for memory in memories_of(sequence):
        own = memory.of(sequence, x, cond)
        got = found(own)
        # An output that is not used gives no gradient, or one of zeros.
        wanted = {name: expected.get(name, torch.zeros_like(grad)) for name, grad in got.items()}
        assert expected.keys() <= got.keys()
        assert_same_gradients(got, wanted, memory)
        report = own.memory_report()
        assert report["trips"] == 0, f"{memory}: steps were computed again, so their inversion was not tested"
    return expected


# ---------------------------------------------------------------------------------------------- every kind of flow


@pairs(
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
)
def test_every_kind_of_step(
    permutation: str,
    scale: dict[str, Any],
    order: str,
    coupling: str,
    condition: str,
    mask: str,
    dims: int,
    net_actnorm: bool,
    squeeze: bool,
) -> None:
    """Also where the input is squeezed as it is read."""
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
    if not squeeze:
        assert_stored_gradients(sequence, x, few)

    def run(own: pgf.ReversibleSequence, x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(own(x, cond, squeeze_first=squeeze))

    expected = gradients(sequence, x, few, partial(run, sequence))
    for memory in [*(RECOMPUTING if squeeze else []), REDONE]:
        own = memory.of(sequence)
        assert_same_gradients(gradients(own, x, few, partial(run, own)), expected, memory)
        assert (own.memory_report()["trips"] > 0) == (memory is REDONE)


@pytest.mark.parametrize(
    "name", ["sequence-injectors-store", "sequence-without-couplings", "sequence-of-modules-store"]
)
def test_every_kind_of_run(name: str) -> None:
    """Injectors alone, steps without couplings, other layers between."""
    case = next(case for case in BIJECTIONS if case.name == name)
    sequence = case.trained(torch.device("cpu"))
    assert isinstance(sequence, pgf.ReversibleSequence)
    assert_stored_gradients(sequence, *case.batch(torch.device("cpu")))


@pytest.mark.parametrize(
    "name",
    ["glow", "glow-1d", "glow-3d", "glow-cond-map", "glow-checkerboard", "glow-injectors", "glow-without-splits"],
)
def test_whole_models(name: str) -> None:
    """A Glow's log_prob, with its splits, priors, conditions and classes, in every mode and within a budget."""
    case = next(case for case in BIJECTIONS if case.name == name)
    layer = case.trained(torch.device("cpu"))
    assert isinstance(layer, GlowAsLayer)
    model, (x, cond) = layer.glow, case.batch(torch.device("cpu"))
    y = None if model.config.n_classes is None else torch.arange(3) % model.config.n_classes

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        return (model.log_prob(x, y, cond) * torch.arange(1.0, 4.0, dtype=torch.float64)).sum()

    model.memory = "store"
    expected = gradients(model, x, cond, run)
    model.memory = 2**40
    most = model.memory_plan(3)
    assert most is not None
    model.memory = 1
    half = (least_bytes(lambda: run(x, cond)) + most.peak) // 2
    for memory in ("checkpoint", "reversible", half):
        model.memory = memory
        assert_same_gradients(gradients(model, x, cond, run), expected, memory)


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


@pytest.mark.parametrize("n", [0, 1])
def test_few_samples(n: int) -> None:
    """One sample, and an empty batch, as the last one of a rank may be."""
    assert_stored_gradients(steps(), batch(n))


class Pointwise(nn.Module):
    """A net that takes what convolutions refuse: no positions at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2))

    def forward(self, x1: Tensor) -> Tensor:
        return torch.einsum("oc,ncp->nop", self.weight, x1).sin()


def test_no_positions() -> None:
    """Sequences of length zero give gradients of zeros or none, and no crash."""
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=Pointwise(), dims=1) for _ in range(4)]).double().eval()
    x = batch(3, 4, 0)
    sequence.memory = "store"
    expected = gradients(perturbed(sequence), x)
    for memory in RECOMPUTING:
        assert_same_gradients(gradients(memory.of(sequence), x), expected, memory)


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


@pytest.mark.parametrize("mode", ["store", "checkpoint", "reversible"])
def test_finite_differences(mode: str) -> None:
    """The stored gradients, which all others are compared with, are the derivative."""
    sequence = ready([pgf.FlowStep(2, 5) for _ in range(2)], (2, 2, 2))
    sequence.memory = mode
    assert torch.autograd.gradcheck(sequence, (batch(2, 2, 2, 2).requires_grad_(),))


# --------------------------------------------------------------------------------------------- float32 and bfloat16


@pytest.mark.parametrize("name", ["three levels", "everything", "checkerboard"])
def test_float32_is_at_most_twice_as_far_off_as_plain_torch(name: str) -> None:
    """Else memory is saved at the price of a worse gradient."""
    setting = Setting(name)
    model, config = setting.model, setting.config
    x, y, cond = setting.x, setting.y, setting.cond

    def plain(dtype: torch.dtype) -> Tensor:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in model.state_dict().items()}
        leaves = {k: state[k].clone().requires_grad_() for k, _ in model.named_parameters()}
        given = None if cond is None else cond.to(dtype)
        value = plain_log_prob({**state, **leaves}, config, x.to(dtype), y, given).sum()
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, list(leaves.values()))]).double()

    exact = plain(torch.float64)
    error = float((plain(torch.float32) - exact).norm())
    model.float()
    for memory in ("store", "checkpoint", "reversible", 2**30):
        model.memory = memory
        value = model.log_prob(x.float(), y, None if cond is None else cond.float()).sum()
        got = torch.cat([grad.flatten() for grad in torch.autograd.grad(value, list(model.parameters()))]).double()
        found = float((got - exact).norm())
        assert found <= 2.0 * error, f"{memory}: error {found:.2e}, plain torch {error:.2e}"


def strong_steps(depth: int, spread: float) -> Any:
    """Random steps whose nets scale strongly: inverting them amplifies rounding by orders of magnitude. Float64."""
    steps: list[Any] = [pgf.FlowStep(12, 16) for _ in range(depth)]
    for step in steps:
        for parameter in (step.coupling.net.conv3.weight, step.coupling.net.conv3.bias):
            nn.init.normal_(parameter, std=spread)
        nn.init.normal_(step.actnorm.log_scale, std=0.1)
        nn.init.normal_(step.actnorm.bias, std=0.3)
    return pgf.ReversibleSequence(steps, "store").double().eval()


@pytest.mark.parametrize(("depth", "spread"), [(32, 0.06), (64, 0.04), (32, 0.1)])
def test_states_that_drift_are_computed_again(depth: int, spread: float) -> None:
    """A flow that float32 cannot invert: other implementations of reversible training give a wrong gradient here."""
    sequence, x = strong_steps(depth, spread), batch(2, 12, 8, 8)

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


def test_autocast() -> None:
    """Nets in bfloat16: the state and the gradients stay float32, and recomputing adds no more than bfloat16 costs."""
    sequence = ready([pgf.FlowStep(4, 16) for _ in range(8)], (4, 8, 8))
    x = batch(8, 4, 8, 8)
    exact = gradients(sequence, x)
    sequence.float()

    def found(own: pgf.ReversibleSequence, backward_inside: bool) -> Gradients:
        def run(x: Tensor, cond: Tensor | None) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                z, log_det = own(x)
            assert z.dtype == log_det.dtype == torch.float32
            return objective((z, log_det))

        with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
            return gradients(own, x.float(), None, run)

    for inside in (False, True):
        stored = found(sequence, inside)
        cost = worst_error(stored, exact)
        assert 1e-3 < cost < 0.5, "autocast reaches the nets"
        for mode, every in (("checkpoint", "auto"), ("reversible", 1), ("reversible", 4), ("reversible", "auto")):
            own = pgf.ReversibleSequence(list(sequence), mode, every)
            got = found(own, inside)
            assert all(grad.dtype == torch.float32 for grad in got.values())
            assert worst_error(got, stored) <= 2.0 * cost, (mode, every)


# ------------------------------------------------------------------------------------------------- users' own nets


class Dropped(nn.Module):
    """A net with dropout, in a module or hidden in its forward."""

    halo = 1

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.dropout = None if hidden else nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        found = self.dropout(found) if self.dropout else nn.functional.dropout(found, 0.4, self.training)
        out: Tensor = self.last(found)
        return out


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("leave_training", [False, True])
def test_dropout(hidden: bool, leave_training: bool) -> None:
    """The backward draws the masks of the forward, and whoever draws numbers meanwhile gets those that would have come.

    In chunks masks are drawn piece by piece: the stored gradient has other ones than these.
    """
    sequence, x = with_nets(*(Dropped(hidden) for _ in range(4))), batch()

    def run(own: pgf.ReversibleSequence) -> tuple[Gradients, Tensor, Tensor]:
        between: list[Tensor] = []

        def value(x: Tensor, cond: Tensor | None) -> Tensor:
            torch.manual_seed(7)
            own.train()
            found = objective(own(x))
            between.append(torch.rand(3))
            if leave_training:
                own.eval()
            return found

        return gradients(own, x, None, value), between[0], torch.rand(3)

    whole = run(sequence)
    in_rows = run(Memory("checkpoint", budget=1).of(sequence))
    for memory in memories_of(sequence):
        if memory.budget == 4000:
            continue
        expected = in_rows if memory.budget == 1 else whole
        got = run(memory.of(sequence, x))
        assert_same_gradients(got[0], expected[0], memory)
        assert torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2]), "the backward moved the caller's random stream"
    in_evaluation = sequence.eval()
    assert_stored_gradients(in_evaluation, x)


class Counted(nn.Module):
    """A net that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(2, 4, 3, padding=1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out: Tensor = self.conv(x)
        return out


@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_a_backward_runs_each_net_once_more(mode: str) -> None:
    """Else saving memory costs more time than the documentation says."""
    nets = [Counted() for _ in range(5)]
    own, x = Memory(mode, budget=2**40).of(with_nets(*nets)), batch()
    gradients(own, x)  # the first run of a net whose random numbers are not known may be another one
    before = [net.calls for net in nets]
    gradients(own, x)
    assert [net.calls - earlier for net, earlier in zip(nets, before, strict=True)] == [2] * 5


class Halved(pgf.CouplingNet):
    """A subclass: its own forward is what is differentiated, not the net that it derives from."""

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return 0.5 * super().forward(x, cond)


class Writing(nn.Module):
    """A net that writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(2, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def shared() -> list[nn.Module]:
    net = pgf.CouplingNet(2, 4, 5)
    return [net, pgf.CouplingNet(2, 4, 5), net]


def tied() -> list[nn.Module]:
    first, second = parametrizations.weight_norm(nn.Conv2d(2, 4, 1)), nn.Conv2d(4, 4, 1)
    net = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Conv2d(4, 4, 1))
    net[4].weight = second.weight
    return [net]


def repeated() -> list[nn.Module]:
    return [applied_twice(2, 4) for _ in range(2)]


def applied_twice(inputs: int, outputs: int) -> nn.Module:
    middle, relu = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
    first, last = nn.Conv2d(inputs, 6, 3, padding=1), nn.Conv2d(6, outputs, 3, padding=1)
    return nn.Sequential(first, relu, middle, relu, middle, relu, last)


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "shared between steps": shared,
    "tied and computed weights": tied,
    "one module twice": repeated,
    "of a subclass": lambda: [Halved(2, 4, 5), Halved(2, 4, 5)],
    "that checkpoint": lambda: [Checkpointed(), pgf.CouplingNet(2, 4, 5), Checkpointed()],
    "with flows inside": lambda: [Nested(), pgf.CouplingNet(2, 4, 5), Nested()],
    "that write to their input": lambda: [Writing(), Writing()],
}


@pytest.mark.parametrize("name", NETS)
def test_nets(name: str) -> None:
    """Coupling nets of a user's own, which share, repeat, checkpoint, nest or write, by torch.autograd.grad."""
    assert_stored_gradients(with_nets(*NETS[name]()).eval(), batch())


def accumulated(model: nn.Module, x: Tensor) -> Gradients:
    """The gradients as ``backward()`` leaves them in the parameters."""
    model.zero_grad()
    objective(model(x)).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


LOST = pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="what backward() accumulates for a module that a net applies twice is lost without a word",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[LOST] * (name == "one module twice")) for name in NETS],
)
def test_nets_that_are_trained(name: str) -> None:
    """With ``backward()`` rather than ``torch.autograd.grad``: else a part of a user's net would never be trained."""
    sequence, x = with_nets(*NETS[name]()).eval(), batch()
    expected = accumulated(sequence, x)
    for memory in RECOMPUTING:
        assert_same_gradients(accumulated(memory.of(sequence), x), expected, memory)


@LOST
@pytest.mark.parametrize("mode", ["checkpoint", "reversible"])
def test_an_accelerated_net_that_applies_a_module_twice(mode: str) -> None:
    """The same by ``accelerate``, of a model that trained rightly before."""
    framework, modules = pytest.importorskip("FrEIA.framework"), pytest.importorskip("FrEIA.modules")
    from pyglow_fast.interop import accelerate

    model = framework.SequenceINN(4, 4, 4)
    for _ in range(2):
        model.append(modules.AllInOneBlock, subnet_constructor=applied_twice)
    model = model.double()
    x = batch(2, 4, 4, 4)
    expected = accumulated(model, x)
    accelerate(model, memory=mode)
    assert_same_gradients(accumulated(model, x), expected)


class Slow(Dropped):
    """A net that several threads are within at a time."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(x)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="training in threads stops with a message that sends a user after parameters that the net does not have",
)
def test_threads_that_share_a_net_with_dropout() -> None:
    """Training in threads works, or the refusal says that threads are why."""

    net = Slow(hidden=False)
    sequence, x = Memory("reversible").of(with_nets(net, net)), batch()
    said = "no refusal that names threads"
    try:
        in_threads(*[lambda: [gradients(sequence, x) for _ in range(4)]] * 3)
    except ValueError as refusal:
        said = str(refusal)
    assert "thread" in said


@pytest.mark.xfail(
    strict=True,
    raises=(AssertionError, ValueError),
    reason="two backwards of one graph in threads get wrong gradients, or stop with a message about something else",
)
def test_threads_through_one_graph_of_ones_own_nets() -> None:
    """Two backwards at a time through nets that autograd runs give what one gives."""
    sequence, x = with_nets(*(Slow(hidden=False) for _ in range(3))).eval(), batch()
    own, named = Memory("reversible").of(sequence), dict(sequence.named_parameters())
    expected = gradients(sequence, x)
    value = objective(own(x))
    found: list[tuple[Tensor, ...]] = []
    in_threads(*[lambda: found.append(torch.autograd.grad(value, list(named.values()), retain_graph=True))] * 2)
    for got in found:
        assert_same_gradients(dict(zip(named, got, strict=True)), {name: expected[name] for name in named})


# ------------------------------------------------------------------------------- what wants a gradient, and how often


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


@runs
def test_several_backwards(build: Build) -> None:
    """Two losses of one forward, one after the other; some gradients first, then all; two batches in either order."""
    sequence, batches = build(), [batch(2), batch(3)]
    sequence.memory = "store"
    expected = [gradients(sequence, x) for x in batches]
    named = dict(sequence.named_parameters())
    last = next(name for name in reversed(named) if name.startswith("4"))
    for memory in memories_of(sequence):
        own = memory.of(sequence, batches[0])
        leaves = [x.detach().requires_grad_() for x in batches]
        z, log_det = own(leaves[0])
        parts = objective((z, torch.zeros_like(log_det))), objective((torch.zeros_like(z), log_det))
        wanted = [leaves[0], *named.values()]
        (late,) = torch.autograd.grad(parts[0] + parts[1], named[last], retain_graph=True)
        assert_same_gradients({last: late}, {last: expected[0][last]}, memory)
        found = [torch.autograd.grad(part, wanted, retain_graph=part is parts[0]) for part in parts]
        both = {name: one + other for name, one, other in zip(["x", *named], *found, strict=True)}
        assert_same_gradients(both, expected[0], memory)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(parts[0], wanted)
        for order in ((0, 1), (1, 0)):
            values = [objective(own(leaf)) for leaf in leaves]
            for i in order:
                got = torch.autograd.grad(values[i], [leaves[i], *named.values()])
                assert_same_gradients(dict(zip(["x", *named], got, strict=True)), expected[i], memory)
        for x in batches:  # accumulated, as over micro-batches
            objective(own(x)).backward()
        total = {name: value.grad for name, value in named.items() if value.grad is not None}
        assert_same_gradients(total, {name: expected[0][name] + expected[1][name] for name in named}, memory)
        own.zero_grad()


@runs
def test_batches_of_gradients(build: Build) -> None:
    """is_grads_batched, as torch.autograd.functional.jacobian uses it, gives row by row what a loop gives."""
    sequence, x = build().eval(), batch(2).requires_grad_()
    inputs = [x, *sequence.parameters()]
    rows = batch(3, 2, *SHAPE), batch(3, 2)
    sequence.memory = "store"
    outputs = sequence(x)
    loops = [torch.autograd.grad(outputs, inputs, [row[i] for row in rows], retain_graph=True) for i in range(3)]
    for memory in memories_of(sequence):
        got = torch.autograd.grad(memory.of(sequence, x)(x), inputs, rows, is_grads_batched=True)
        for i, expected in enumerate(loops):
            for found, wanted in zip(got, expected, strict=True):
                assert_same_gradients({"": found[i]}, {"": wanted}, memory)


@runs
def test_second_derivatives_are_refused(build: Build) -> None:
    """Not silently wrong; a gradient with create_graph that nobody differentiates is as ever."""
    sequence, x = build(), batch().requires_grad_()
    inputs = [x, *sequence.parameters()]
    for memory in memories_of(sequence):
        own = memory.of(sequence, x)
        expected = torch.autograd.grad(objective(own(x)), inputs)
        got = torch.autograd.grad(objective(own(x)), inputs, create_graph=True)
        for one, other in zip(got, expected, strict=True):
            assert_same_gradients({"": one}, {"": other}, memory)
        for power in (1, 2):
            z, log_det = own(x)
            value = z.pow(power).sum() + log_det.sum()
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            if memory != BYTES or gradient.requires_grad:
                with pytest.raises(RuntimeError, match="double backward"):
                    (value + gradient.square().sum()).backward()


def test_without_gradients_nothing_is_recorded() -> None:
    """Evaluation under no_grad or inference_mode, and of a frozen flow, keeps no graph."""
    sequence, x = steps(), batch()
    z, log_det = sequence(x)
    for memory in MEMORIES:
        own = memory.of(sequence, x)
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                found = own(x)
            assert not found[0].requires_grad
            assert_close(found[0], z, CONDITION)
            assert_close(found[1], log_det, CONDITION)
    for memory in RECOMPUTING:
        own = memory.of(sequence.requires_grad_(False))
        assert own(x)[0].grad_fn is None


# ----------------------------------------------------------------------------------------------------- torch's tools


def test_functional_call() -> None:
    """Gradients flow on to what the lent tensors are made of, after they are given back: hypernetworks, MAML."""
    sequence, x = steps(6), batch()
    leaves = {name: value.detach().clone().requires_grad_() for name, value in sequence.named_parameters()}

    def found(own: pgf.ReversibleSequence) -> Gradients:
        lent = {name: value + 0.05 * value.sin() for name, value in leaves.items()}
        value = objective(torch.func.functional_call(own, lent, (x,)))
        return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))

    expected = found(sequence)
    assert relative_error(gradients(sequence, x)["3.actnorm.bias"], expected["3.actnorm.bias"]) > 1e-3
    for memory in MEMORIES:
        assert_same_gradients(found(memory.of(sequence, x)), expected, memory)


def test_transforms_of_torch_func() -> None:
    """grad, vmap and per-sample gradients are what a loop of ordinary autograd finds, whatever the memory mode."""
    sequence, x = steps(3).eval(), batch(2)
    parameters = {name: value.detach() for name, value in sequence.named_parameters()}

    def of_one(x: Tensor, cond: Tensor | None) -> Tensor:
        z, log_det = sequence(x)
        return z.sin().sum() + log_det.square().sum()

    alone = [gradients(sequence, x[i : i + 1], None, of_one) for i in range(2)]
    expected = {name: torch.stack([one[name] for one in alone]) for name in alone[0]}
    along = torch.tensordot(torch.autograd.functional.jacobian(lambda x: sequence(x)[0], x), x.cos(), 4)
    for memory in MEMORIES:
        own = memory.of(sequence, x)

        def value(parameters: dict[str, Tensor], x: Tensor, own: nn.Module = own) -> Tensor:
            z, log_det = torch.func.functional_call(own, parameters, (x.unsqueeze(0),))
            return z.sin().sum() + log_det.square().sum()

        got, of_x = torch.func.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(None, 0))(parameters, x)
        assert_same_gradients({**got, "x": of_x.unsqueeze(1)}, expected, memory)
        _, found = torch.func.jvp(lambda x, own=own: own(x)[0], (x,), (x.cos(),))
        assert_close(found, along, CONDITION)


@runs
def test_hooks(build: Build) -> None:
    """A hook on a parameter is called once, with the whole gradient, and what it returns counts (clipping, FSDP, DDP).

    A hook on a module is called in the forward.
    """
    sequence, x = build(), batch()
    sequence.memory = "store"
    expected = gradients(sequence, x)
    calls: list[str] = []

    def doubled(name: str) -> Callable[[Tensor], Tensor]:
        def hook(grad: Tensor) -> Tensor:
            calls.append(name)
            return 2.0 * grad

        return hook

    handles = []
    for name, parameter in sequence.named_parameters():
        handles.append(parameter.register_hook(doubled(name)))
        handles.append(parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name)))
    names = sorted(name for name, _ in sequence.named_parameters())
    for memory in memories_of(sequence):
        calls.clear()
        objective(memory.of(sequence, x)(x)).backward()
        assert sorted(calls) == sorted(2 * names), memory
        found = {name: value.grad for name, value in sequence.named_parameters() if value.grad is not None}
        assert_same_gradients(found, {name: 2.0 * expected[name] for name in names}, memory)
        sequence.zero_grad()
    for handle in handles:
        handle.remove()

    seen: list[int] = []
    sequence[1].register_forward_hook(lambda module, inputs, outputs: seen.append(len(inputs)))
    for memory in RECOMPUTING[:4]:
        seen.clear()
        assert_same_gradients(gradients(memory.of(sequence), x), expected, memory)
        assert seen, "the hook on a step was not called"


@runs
def test_hooks_on_saved_tensors_and_anomaly_mode(build: Build) -> None:
    """save_on_cpu, torch.utils.checkpoint around the flow, and detect_anomaly go with every mode."""
    sequence, x = build().eval(), batch()

    def moved(own: nn.Module, x: Tensor, cond: Tensor | None) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda value: value.detach().clone(), lambda value: value):
            return objective(own(x))

    def checkpointed(own: nn.Module, x: Tensor, cond: Tensor | None) -> Tensor:
        return objective(checkpoint(own, x, use_reentrant=False))

    for run in (moved, checkpointed):
        assert_stored_gradients(sequence, x, None, run)
    with torch.autograd.set_detect_anomaly(True):
        assert_stored_gradients(sequence, x)


def test_parametrizations_and_pruning() -> None:
    """Weights that are computed from others: what is trained is what lies behind them."""

    class Bounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    sequence, x = steps(permutation="invconv_plain"), batch()
    for k, step in enumerate(sequence):
        if k != 3:
            parametrizations.orthogonal(step.permutation, "weight")
        parametrize.register_parametrization(step.actnorm, "log_scale", Bounded())
        parametrizations.weight_norm(step.coupling.net.conv1)
        prune.l1_unstructured(step.coupling.net.conv2, "weight", amount=0.4)
    found = assert_stored_gradients(sequence, x)
    assert any("parametrizations.weight" in name for name in found)
    pruned = found["0.coupling.net.conv2.weight_orig"]
    assert not pruned[sequence[0].coupling.net.conv2.weight_mask == 0].any()


def test_copies_in_the_middle_of_training() -> None:
    """A deepcopy (an average of weights) and a pickle (a spawned worker) train on as the original does."""
    x = batch()
    for memory in MEMORIES:
        sequence = memory.of(steps(), x)
        optimizer = torch.optim.SGD(sequence.parameters(), 1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            objective(sequence(x)).backward()
            optimizer.step()
        waiting = objective(sequence(x))  # between a forward and its backward
        copies = [copy.deepcopy(sequence), pickle.loads(pickle.dumps(sequence))]
        named = dict(sequence.named_parameters())
        expected = dict(zip(named, torch.autograd.grad(waiting, list(named.values())), strict=True))
        for other in copies:
            assert other.memory == sequence.memory
            got = gradients(other, x)
            assert_same_gradients({name: got[name] for name in expected}, expected, memory)
            assert other.memory_report().keys() == sequence.memory_report().keys()


def in_threads(*work: Callable[[], object]) -> None:
    """Run all at a time, and let none fail unheard."""
    gate, failed = threading.Barrier(len(work), timeout=60), []

    def run(each: Callable[[], object]) -> None:
        try:
            gate.wait()
            each()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@runs
def test_threads(build: Build) -> None:
    """Two models at a time, and two backwards of one graph where the nets are products of ours."""
    sequence, x = build().eval(), batch()
    sequence.memory = "store"
    expected = gradients(sequence, x)
    other = copy.deepcopy(sequence)
    named = dict(sequence.named_parameters())
    found: list[Gradients] = []

    def of_model(model: nn.Module) -> None:
        found.extend(gradients(model, x) for _ in range(3))

    def of_graph(value: Tensor, leaf: Tensor) -> None:
        got = torch.autograd.grad(value, [leaf, *named.values()], retain_graph=True)
        found.append(dict(zip(["x", *named], got, strict=True)))

    for memory in memories_of(sequence):
        own, leaf = memory.of(sequence, x), x.clone().requires_grad_()
        found.clear()
        in_threads(partial(of_model, own), partial(of_model, memory.of(other, x)))
        if build is steps and functional.net_as_products(x):
            value = objective(own(leaf))
            in_threads(*[partial(of_graph, value, leaf)] * 2)
        for got in found:
            assert_same_gradients(got, expected, memory)


def test_states_between_steps() -> None:
    """Glow.intermediates: a loss of features within the flow reaches all that comes before them, in every mode."""
    model = pgf.Glow(image_shape=(1, 8, 8), n_levels=2, n_steps=5, hidden=4, anchor_every=2).double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64) - 0.5
    model.initialize(x)
    perturbed(model, 0.05)

    def run(x: Tensor, cond: Tensor | None) -> Tensor:
        latents, states, log_det = model.intermediates(x, at=(0, 2))
        parts = [part for level in states for part in level] + latents
        return sum((k + 1.0) * part.sin().sum() for k, part in enumerate(parts)) + log_det.sum()

    def of_one(x: Tensor, cond: Tensor | None) -> Tensor:
        return model.intermediates(x, at=(0, 2))[1][0][1].square().sum()

    def of_a_latent(x: Tensor, cond: Tensor | None) -> Tensor:
        return model(x)[0][0].square().sum()

    for value in (run, of_one, of_a_latent):
        model.memory = "store"
        expected = gradients(model, x, None, value)
        for mode in ("checkpoint", "reversible"):
            model.memory = mode
            got = gradients(model, x, None, value)
            assert_same_gradients({name: got[name] for name in expected}, expected, mode)
            assert not any(got[name].any() for name in got.keys() - expected.keys())


def test_compiled() -> None:
    """torch.compile of a model in "store" is one graph; code around any other mode compiles and keeps its memory."""
    model = pgf.Glow(image_shape=(1, 2, 2), n_levels=1, n_steps=1, hidden=4, memory="store").double()
    x = batch(4, 1, 2, 2)
    model.initialize(x)
    expected = gradients(perturbed(model), x, None, lambda x, _: model.log_prob(x).sum())
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    assert_same_gradients(gradients(model, x, None, lambda x, _: compiled(x).sum()), expected)

    sequence, x = steps(2), batch()
    expected = gradients(sequence, x)
    own = Memory("reversible").of(sequence)

    @torch.compile(backend="aot_eager")
    def run(x: Tensor) -> Tensor:
        z, log_det = own(2.0 * x / 2.0)
        return objective((z * 1.0, log_det))

    assert_same_gradients(gradients(own, x, None, lambda x, _: run(x)), expected)
    assert own.memory_report()["passes"] == 1


@runs
def test_what_changes_before_the_backward_is_refused(build: Build) -> None:
    """A parameter or input that is written to in between never gives a wrong gradient, nor does it without a flow."""
    sequence, x = build(), batch()
    for memory in memories_of(sequence)[:4]:
        for parameter in list(sequence.parameters())[::3]:
            value = objective(memory.of(sequence)(x))
            with torch.no_grad():
                parameter.add_(0.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                value.backward()
        leaf = x.clone().requires_grad_()
        value = objective(memory.of(sequence)(leaf))
        with torch.no_grad():
            leaf.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
        sequence.zero_grad()
