"""accelerate on flows with Jet's interfaces: outputs, log-dets, inverses and gradients of their own code, in each mode.

The real packages are in tests/live/test_jet.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.jet_models import MODELS, ImageFlow, ProjectedCoupling, ProjectedFlow, Vit
from torch import Tensor, nn

from bench.memory_meter import MemoryMeter
from pyglow_fast.interop import accelerate
from pyglow_fast.interop.jet import tokens

MEMORY = (None, "reversible", "checkpoint", "store")
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
modes = pytest.mark.parametrize("memory", MEMORY)


def results(model: Any, x: Tensor) -> list[Tensor]:
    """z, log_det, the inverse of z and its log-det, and the gradients of x and the parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    z, log_det = model(x)
    weights = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    ((weights * z).sum() + log_det.sum()).backward()
    with torch.no_grad():
        back, back_log_det = model.inverse(z)
    assert x.grad is not None
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [z.detach(), log_det.detach(), back, back_log_det, x.grad, *grads]


@models
def test_bytes_are_refused_before_anything_changes(make: Any) -> None:
    model, _ = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"^memory: expected one of .* for layers of other libraries, found '4GB'$"):
        accelerate(model, memory="4GB")
    assert [type(module) for module in model.modules()] == classes


def test_one_run_of_a_net_in_the_reversible_backward() -> None:
    model = ProjectedFlow(6, 8, 5)
    accelerate(model, memory="reversible")
    runs = []
    for module in model.modules():
        if isinstance(module, Vit):
            module.encoder.register_forward_hook(lambda *args: runs.append(1))
    z, log_det = model(torch.randn(3, 6, 8))
    assert len(runs) == 5
    (z.square().sum() - log_det.sum()).backward()
    assert len(runs) == 10


@pytest.mark.full
def test_memory_does_not_grow_with_the_batch_beyond_the_states() -> None:
    """With a budget of one sample's net activations the rest of the peak are states."""

    def peak(batch: int, memory: str) -> int:
        model = ProjectedFlow(16, 8, 6, width=64)
        accelerate(model, memory=memory, memory_budget=1)
        x = torch.randn(batch, 16, 8)
        with MemoryMeter() as meter:
            z, log_det = model(x)
            (z.square().sum() - log_det.sum()).backward()
        return meter.peak

    state_bytes = 16 * 8 * 4
    grown = peak(12, "reversible") - peak(6, "reversible")
    # x, z and their gradients, anchors every 3 steps, and what one coupling handles at a time.
    assert grown <= 6 * 24 * state_bytes
    assert peak(12, "checkpoint") - peak(6, "checkpoint") > 2 * grown


@pytest.mark.parametrize("budget", ["auto", 1])
def test_dropout_is_drawn_again(budget: str | int) -> None:
    """The gradients of a reversible run are those of the very numbers that its forward has drawn."""
    plain = ProjectedFlow(6, 8, 5, dropout=0.3).double()
    found = {}
    for memory in ("store", "reversible"):
        model = copy.deepcopy(plain)
        accelerate(model, memory=memory, memory_budget=budget)
        torch.manual_seed(3)
        x = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
        z, log_det = model(x)
        (z.square().sum() - log_det.sum()).backward()
        found[memory] = [x.grad, *(parameter.grad for parameter in model.parameters())]
    for value, truth in zip(found["reversible"], found["store"], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)


def test_drift_is_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coupling whose inverse is wrong is found by its witness, and the gradient is right all the same."""
    model = ProjectedFlow(6, 8, 5).double()
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    expected = results(model, x)
    done = accelerate(model, memory="reversible")
    own = tokens.TokenCoupling.backward

    def wrong(self: Any, y: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, *grads = own(self, y, *rest)
        return x + 1e-3, grads[0], grads[1]

    monkeypatch.setattr(tokens.TokenCoupling, "backward", wrong)
    for value, truth in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)
    assert done.memory_report()[0]["redone_steps"] > 0


class Shifted(ProjectedCoupling):
    """y2 = u2 s + shift."""

    def forward(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        projections = is_channel, channel_proj, spatial_proj
        u1, u2, shift, scale, log_det = self._parts(x, *projections)
        return self._whole(u1, u2 * scale + shift, *projections), log_det


class WrongLogDet(ProjectedCoupling):
    """Without log m."""

    def forward(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward(x, is_channel, channel_proj, spatial_proj)
        return y, log_det - log_det.new_tensor(2.0).log()


class Broken(ProjectedCoupling):
    def inverse(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("no inverse yet")


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Shifted, "the output of its forward is another than"),
        (WrongLogDet, "the log-det of its forward is another than"),
        (Broken, "its arithmetic could not be compared: NotImplementedError: no inverse yet"),
    ],
)
def test_other_arithmetic_is_left(other: type[nn.Module], reason: str) -> None:
    model = ProjectedFlow(6, 8, 3)
    model.blocks[1].__class__ = other
    done = accelerate(model, memory="reversible")
    assert sorted(done.replaced) == ["blocks.0", "blocks.2"]
    assert reason in done.left["blocks.1"]
    assert type(model.blocks[1]) is other


class Twisted(ProjectedCoupling):
    """An option that its class's other layers do not have."""

    doubled = False

    def forward(self, x: Tensor, is_channel: bool, channel_proj: Any, spatial_proj: Any) -> tuple[Tensor, Tensor]:
        y, log_det = super().forward(x, is_channel, channel_proj, spatial_proj)
        return (2.0 * y if self.doubled else y), log_det


def test_layers_of_a_class_are_compared_by_their_options() -> None:
    model = ProjectedFlow(6, 8, 3)
    for block in model.blocks:
        block.__class__ = Twisted
    model.blocks[1].doubled = True
    model.blocks[2].inverse = model.blocks[2].forward
    done = accelerate(model)
    assert sorted(done.replaced) == ["blocks.0"]
    assert "the output of its forward is another than" in done.left["blocks.1"]
    assert done.left["blocks.2"] == "a forward or inverse of its own"


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), "2"])
def test_a_factor_out_of_range_is_left(factor: Any) -> None:
    model = ProjectedFlow(6, 8, 2)
    model.blocks[0].scale_factor = factor
    assert accelerate(model).left == {"blocks.0": f"a scale_factor of {factor!r}"}


def test_settings_of_images_that_are_left() -> None:
    model = ImageFlow((4, 4, 2), 2, 4)
    model.couplings[0].use_actnorm = True
    model.couplings[1].dnn = nn.Identity()
    model.couplings[2].masking_mode = "masking"
    done = accelerate(model)
    assert sorted(done.replaced) == ["couplings.3"]
    assert "ActNorm" in done.left["couplings.0"]
    assert "is no ViT" in done.left["couplings.1"]
    assert done.left["couplings.2"] == "masking by tokens"


@modes
def test_a_context_is_for_their_own_code(memory: str | None) -> None:
    model = ImageFlow((4, 6, 3), 2, 4).double()
    plain = copy.deepcopy(model)
    accelerate(model, memory=memory)
    x, context = torch.randn(2, 4, 6, 3, dtype=torch.float64), torch.randn(2, 1, 8, dtype=torch.float64)
    for found, expected in zip(model(x, context), plain(x, context), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x)[0], model(x, context)[0])


@modes
def test_a_projection_that_is_no_permutation(memory: str | None) -> None:
    """It is read again when it changes, and then their own products run."""
    model = ProjectedFlow(6, 8, 4).double()
    accelerate(model, memory=memory)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    before, _ = model(x)
    with torch.no_grad():
        model.channel_projections[0].copy_(torch.linalg.qr(torch.randn(8, 8)).Q)
    plain = ProjectedFlow(6, 8, 4).double()
    plain.load_state_dict(model.state_dict())
    found, _ = model(x)
    torch.testing.assert_close(found, plain(x)[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(found, before)


@modes
def test_hooks_and_transforms_run_one_by_one(memory: str | None) -> None:
    model = ProjectedFlow(6, 8, 4).double()
    plain = copy.deepcopy(model)
    accelerate(model, memory=memory)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    jac = torch.func.jacrev(lambda x: model(x)[0].sum())(x)
    torch.testing.assert_close(jac, torch.func.jacrev(lambda x: plain(x)[0].sum())(x), rtol=1e-9, atol=1e-9)
    block = model.blocks._modules["1"]
    assert block is not None
    seen = []
    block.register_forward_hook(lambda *args: seen.append(1))
    torch.testing.assert_close(model(x)[0], plain(x)[0], rtol=1e-9, atol=1e-9)
    assert seen == [1]


def test_a_run_called_with_other_projections_is_refused() -> None:
    model = ProjectedFlow(6, 8, 4)
    accelerate(model, memory="store")
    x, other = torch.randn(2, 6, 8), torch.eye(8)
    with pytest.raises(ValueError, match=r"couplings\[0\]: expected a call with the model's own projections"):
        model.blocks[0](x, True, other, None)


def test_a_list_of_no_such_model_is_not_joined() -> None:
    blocks = nn.ModuleList([ProjectedCoupling(Vit(6, 4, 8), 2.0) for _ in range(2)])
    done = accelerate(nn.ModuleDict({"steps": blocks}), memory="store")
    assert len(done.replaced) == 2
    assert all("its model has no kind_flags" in text for text in done.left.values())


def test_nothing_to_find_elsewhere() -> None:
    with pytest.raises(ValueError, match="model: expected layers of"):
        accelerate(nn.Sequential(nn.Linear(2, 2)))
