"""Flow steps of chaiyujin's and SRFlow's kind in place: found by structure, equal, and left where they differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import srflow, y0ast
from support.accelerate_cases import assert_same, at_work, saved_bytes
from support.srflow import FlowStep
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
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours at any size: that small steps are left to theirs is tested by itself."""
    monkeypatch.setattr(adapter, "LEAST_POSITIONS", 0)
    monkeypatch.setattr(adapter, "LEAST_WITHOUT_NET", 0)


def step_of(name: str, hidden: int = 40, **options: Any) -> Any:
    return at_work(FlowStep(CHANNELS, hidden, **{**CASES[name], **options}), 0.1)


def inputs_of(name: str, n: int = 2) -> list[Tensor]:
    """x and logdet, and features where the step reads them."""
    x, features = (torch.randn(n, channels, SIDE, SIDE, dtype=torch.float64) for channels in (CHANNELS, FEATURES))
    return [x, torch.randn(n, dtype=torch.float64), *([features] if name == "features" else [])]


def both_ways(step: nn.Module, x: Tensor, logdet: Tensor, *features: Tensor) -> list[Tensor]:
    given = {"rrdbResults": features[0]} if features else {}
    return [*step(x, logdet, **given), *step(x, logdet, reverse=True, **given)]


def test_features_in_a_dict_by_their_place() -> None:
    step, inputs = step_of("features", hidden=72), inputs_of("features")
    theirs = copy.deepcopy(step)
    assert accelerate(step).replaced
    assert_same(step, theirs, both_ways, *inputs)
    by_name = {"fea_up1": inputs[2], "fea_up2": torch.zeros(1)}
    torch.testing.assert_close(step(*inputs[:2], False, by_name), theirs(*inputs[:2], False, inputs[2]), **CLOSE)


def test_another_dtype_and_autocast_go_to_their_own_code() -> None:
    step, (x, logdet) = step_of("affine"), inputs_of("affine")
    theirs = copy.deepcopy(step)
    accelerate(step)
    torch.testing.assert_close(step(x.float(), logdet), theirs(x.float(), logdet), **CLOSE)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(step(x, logdet), theirs(x, logdet), rtol=0, atol=0)


def test_without_a_log_det() -> None:
    for name in ("no coupling", "additive"):
        step, (x, _) = step_of(name), inputs_of(name)
        theirs = copy.deepcopy(step)
        accelerate(step)
        assert step(x, 0.0)[1].shape == theirs(x, 0.0)[1].shape == ()
        for reverse in (False, True):
            (z, logdet), (expected, _) = step(x, None, reverse), theirs(x, None, reverse)
            assert logdet is None
            torch.testing.assert_close(z, expected, **CLOSE)


@pytest.mark.parametrize("memory", ["store", "reversible"])
def test_a_memory_mode_keeps_less_at_any_size(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd saves of a step besides its parameters; no copy of a weight is among it."""
    monkeypatch.undo()  # without a memory mode so few positions are left to theirs
    step, (x, logdet) = step_of("affine", hidden=64), inputs_of("affine", n=1)
    hidden_layers = 2 * 64 * SIDE**2 * x.element_size()
    assert saved_bytes(step, lambda: step(x, logdet)) > 2 * hidden_layers
    accelerate(step, memory=memory)
    most = 10 * x.nbytes + (hidden_layers if memory == "store" else 0)
    assert saved_bytes(step, lambda: step(x, logdet)) < most


class OtherConvolution(srflow.Conv2dZeros):
    """The attributes of a scaled convolution, which is scaled otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.logs.exp()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda step: setattr(step.affine, "affine_eps", "none"), "ValueError: could not convert string to float"),
        (lambda step: setattr(step.affine, "channels_for_nn", 1), "4 channels not halved"),
        (lambda step: setattr(step, "flow_coupling", "bentIdentity"), "flow_coupling 'bentIdentity'"),
        (lambda step: setattr(step, "flow_permutation", "resqueeze"), "flow_permutation 'resqueeze'"),
        (lambda step: step.affine.register_forward_hook(lambda *_: None), "hooks in it"),
        (lambda step: setattr(step.affine.fAffine[4], "__class__", OtherConvolution), "its result 0 of forward"),
    ],
    ids=["eps", "channels", "coupling", "permutation", "hook", "arithmetic"],
)
def test_what_is_not_known_is_left_with_its_reason(change: Any, reason: str) -> None:
    step = step_of("features", hidden=72)
    change(step)
    done = accelerate(nn.ModuleList([step, step_of("affine")]))
    assert type(step) is FlowStep
    assert list(done.replaced) == ["1"]
    assert reason in done.left["0"]


def test_a_copy_of_y0asts_step_runs_the_permutation_of_its_original() -> None:
    """As in their code, whose step holds a function of the original: a copy that is accelerated is left to that."""
    step: Any = at_work(y0ast.FlowStep(CHANNELS, 40), 0.1)
    before = copy.deepcopy(step)
    accelerate(step)
    after = copy.deepcopy(step)
    with torch.no_grad():
        step.invconv.weight.mul_(2.0)
    inputs = inputs_of("affine")
    torch.testing.assert_close(both_ways(after, *inputs), both_ways(before, *inputs), **CLOSE)
    assert accelerate(before).left == {"": "a flow_permutation that is another step's"}


class WithNorm(nn.Module):
    """A convolution as y0ast's net has it, and another norm."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.GroupNorm(2, 40).double()

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(self.conv(input))


def test_a_net_of_another_structure_runs_as_it_is() -> None:
    step = step_of("affine")
    step.f[0] = WithNorm(step.f[0])
    theirs = copy.deepcopy(step)
    assert "GroupNorm" in accelerate(copy.deepcopy(step)).left[""]
    done = accelerate(step, memory="reversible")
    assert "GroupNorm" in done.left["f"]
    assert_same(step, theirs, both_ways, *inputs_of("affine"))
