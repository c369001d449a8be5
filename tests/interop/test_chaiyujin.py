"""Flow steps of chaiyujin's and SRFlow's kind in place: found by structure, equal, and left where they differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import srflow, y0ast
from support.accelerate_cases import saved_bytes
from support.srflow import FlowStep, randomised
from torch import Tensor, nn

from pyglow_fast.interop import accelerate
from pyglow_fast.interop import chaiyujin as adapter

FEATURES = 3
CASES: dict[str, dict[str, Any]] = {
    "affine": {},
    "additive": {"flow_coupling": "additive"},
    "no coupling": {"flow_coupling": "noCoupling"},
    "features": {"flow_coupling": "CondAffineSeparatedAndCond", "features": FEATURES, "position": "fea_up1"},
}
CHANNELS, SIDE = 4, 6


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours at any size: that small steps are left to theirs is tested by itself."""
    monkeypatch.setattr(adapter, "LEAST_POSITIONS", 0)
    monkeypatch.setattr(adapter, "LEAST_WITHOUT_NET", 0)


def step_of(name: str, hidden: int = 40, **options: Any) -> FlowStep:
    found = randomised(FlowStep(CHANNELS, hidden, **{**CASES[name], **options}).double())
    assert isinstance(found, FlowStep)
    return found


def call_of(step: nn.Module, name: str, n: int = 2) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x, logdet and what else the step is called with."""
    x = torch.randn(n, CHANNELS, SIDE, SIDE, dtype=torch.float64)
    features = torch.randn(n, FEATURES, SIDE, SIDE, dtype=torch.float64)
    return x, torch.randn(n, dtype=torch.float64), {"rrdbResults": features} if name == "features" else {}


def everything(step: nn.Module, x: Tensor, logdet: Tensor, more: dict[str, Any]) -> list[Tensor]:
    """Outputs, inverse and gradients."""
    leaf = x.clone().requires_grad_()
    own = {key: value.clone().requires_grad_() for key, value in more.items()}
    z, gained = step(leaf, logdet, **own)
    inputs = [leaf, *own.values(), *step.parameters()]
    grads = torch.autograd.grad(z.square().sum() + gained.sin().sum(), inputs, allow_unused=True)
    back, lost = step(z.detach(), gained.detach(), reverse=True, **more)
    return [z, gained, back, lost, *(grad for grad in grads if grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        assert value.shape == other.shape
        assert float((value - other).detach().abs().max()) <= 1e-9 * max(1.0, float(other.detach().abs().max()))


def test_features_in_a_dict_by_their_place() -> None:
    step = step_of("features", hidden=72)
    x, logdet, more = call_of(step, "features")
    by_name = {"fea_up1": more["rrdbResults"], "fea_up2": torch.zeros(1)}
    expected = everything(step, x, logdet, more)
    assert accelerate(step).replaced
    assert_same(everything(step, x, logdet, more), expected)
    assert_same(list(step(x, logdet, False, by_name)), expected[:2])


def test_another_dtype_and_autocast_go_to_their_own_code() -> None:
    step = step_of("affine")
    x, logdet, _ = call_of(step, "affine")
    theirs = copy.deepcopy(step)
    accelerate(step)
    assert_same(list(step(x.float(), logdet)), list(theirs(x.float(), logdet)))
    with torch.autocast("cpu", torch.bfloat16):
        for value, expected in zip(step(x, logdet), theirs(x, logdet), strict=True):
            assert torch.equal(value, expected)


def test_without_a_log_det() -> None:
    for name in ("no coupling", "additive"):
        step = step_of(name)
        x, _, _ = call_of(step, name)
        expected, scalar = (step(x), step(x, None, True)), step(x, 0.0)[1]
        accelerate(step)
        assert step(x, 0.0)[1].shape == scalar.shape == ()
        for (z, logdet), (other, _) in zip((step(x), step(x, None, True)), expected, strict=True):
            assert logdet is None
            assert_same([z], [other])


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_a_memory_mode_keeps_less_at_any_size(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves of a step besides its parameters; no copy of a weight is among it."""
    monkeypatch.undo()  # without a memory mode so few positions are left to theirs
    step = step_of("affine", hidden=64)
    x, logdet, _ = call_of(step, "affine", n=1)
    hidden_layers = 2 * 64 * SIDE**2 * x.element_size()
    assert saved_bytes(step, lambda: step(x, logdet)) > 2 * hidden_layers
    accelerate(step, memory=memory)
    most = 10 * x.nbytes + (hidden_layers if memory == "store" else 0)
    assert saved_bytes(step, lambda: step(x, logdet)) < most


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda step: setattr(step.affine, "affine_eps", "none"), "ValueError: could not convert string to float"),
        (lambda step: setattr(step, "flow_coupling", "bentIdentity"), "flow_coupling 'bentIdentity'"),
        (lambda step: setattr(step, "flow_permutation", "resqueeze"), "flow_permutation 'resqueeze'"),
        (lambda step: step.affine.register_forward_hook(lambda *_: None), "hooks in it"),
        (lambda step: setattr(step, "forward", step.forward), "a forward of its own"),
    ],
    ids=["eps", "coupling", "permutation", "hook", "own forward"],
)
def test_what_is_not_known_is_left_with_its_reason(change: Any, reason: str) -> None:
    step = step_of("features")
    change(step)
    done = accelerate(nn.ModuleList([step, step_of("affine")]))
    assert type(step) is FlowStep
    assert list(done.replaced) == ["1"]
    assert reason in done.left["0"]


def test_a_copy_of_y0asts_step_runs_the_permutation_of_its_original() -> None:
    """As in their code, whose step holds a function of the original: a copy that is accelerated is left to that."""
    step = randomised(y0ast.FlowStep(CHANNELS, 40).double())
    assert isinstance(step, y0ast.FlowStep)
    before = copy.deepcopy(step)
    accelerate(step)
    after = copy.deepcopy(step)
    with torch.no_grad():
        step.invconv.weight.mul_(2.0)
    x, logdet, _ = call_of(step, "affine")
    for reverse in (False, True):
        assert_same(list(after(x, logdet, reverse)), list(before(x, logdet, reverse)))
    assert accelerate(before).left == {"": "a flow_permutation that is another step's"}


class OtherScale(FlowStep):
    """The same attributes and call, but another arithmetic: the scale's offset is 1."""

    def _coupled(self, z: Tensor, logdet: Any, reverse: bool, rrdbResults: Any) -> tuple[Tensor, Any]:
        z1, z2 = z.chunk(2, dim=1)
        shift, raw = srflow.apart(self.f(z1))
        scale = torch.sigmoid(raw + 1.0)
        gained = scale.log().sum((1, 2, 3))
        if reverse:
            return torch.cat([z1, z2 / scale - shift], dim=1), logdet - gained
        return torch.cat([z1, (z2 + shift) * scale], dim=1), logdet + gained


class OtherConvolution(srflow.Conv2dZeros):
    """The attributes of a scaled convolution, which is scaled otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.logs.exp()


@pytest.mark.parametrize("part", ["step", "net"])
def test_another_arithmetic_is_found_by_the_probe(part: str) -> None:
    step = randomised((OtherScale if part == "step" else FlowStep)(CHANNELS, 72).double())
    if part == "net":
        step.f[4].__class__ = OtherConvolution
    state = torch.get_rng_state()
    done = accelerate(step)
    assert torch.equal(torch.get_rng_state(), state)
    assert not done.replaced
    assert done.left[""].startswith("its result 0 of forward")


class WithNorm(nn.Module):
    """A convolution as y0ast's net has it, and another norm."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.GroupNorm(2, 40).double()

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(input))
        return out


@pytest.mark.parametrize("wraps", [False, True])
def test_a_net_of_another_structure_runs_as_it_is(wraps: bool) -> None:
    step = step_of("affine")
    if wraps:
        step.f[0] = WithNorm(step.f[0])
    else:
        step.f.insert(1, nn.GroupNorm(2, 40).double())
    assert "GroupNorm" in accelerate(copy.deepcopy(step)).left[""]
    inputs = call_of(step, "affine")
    expected = everything(step, *inputs)
    done = accelerate(step, memory="reversible")
    assert "GroupNorm" in done.left["f"]
    assert_same(everything(step, *inputs), expected)
