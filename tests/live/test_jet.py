"""accelerate on jet-pytorch's own flow."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from live.peers import load
from support.helpers import assert_kernel_close
from torch import Tensor

from pyglow_fast.interop import accelerate

jet: Any = load("jet_pytorch.jet")
modes = pytest.mark.parametrize("memory", [None, "reversible", "checkpoint", "store"])


def flow() -> Any:
    """32 pixels of patches of 4, couplings by channels and by tokens; nets that do something."""
    model = jet.Jet(4, 48, 64, (32, 32), coupling_layers=7, block_depth=1, block_width=16, num_heads=2)
    for block in model.blocks:
        torch.nn.init.normal_(block.dnn.final_proj.weight, std=0.1)
    return model


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
    return [z.detach(), log_det.detach(), back, back_log_det, x.grad, *(own.grad for own in model.parameters())]


@modes
def test_equal_in_float64(memory: str | None) -> None:
    model = flow().double()
    x = torch.randn(2, 32, 32, 3, dtype=torch.float64)
    expected = results(model, x)
    done = accelerate(model, memory=memory)
    assert (len(done.replaced), len(done.left)) == ((7, 0) if memory in ("reversible", "checkpoint") else (0, 7))
    found = results(model, x)
    for index, (value, truth) in enumerate(zip(found, expected, strict=True)):
        assert value.shape == truth.shape
        # jet-pytorch adds up log-dets in float32, whatever the dtype.
        bound = 1e-6 if index in (1, 3) else 1e-9
        torch.testing.assert_close(value, truth, rtol=bound, atol=bound)
    torch.testing.assert_close(found[2], x, rtol=1e-9, atol=1e-9)


@modes
def test_as_accurate_as_theirs_in_float32(memory: str | None) -> None:
    model = flow()
    x = torch.randn(4, 32, 32, 3)
    exact = [value.double() for value in results(copy.deepcopy(model).double(), x.double())]
    plain = results(model, x)
    accelerate(model, memory=memory)
    for value, own, truth in zip(results(model, x), plain, exact, strict=True):
        assert_kernel_close(value, own, truth)


def test_a_state_dict_goes_on_and_it_is_undone() -> None:
    model, x = flow(), torch.randn(2, 32, 32, 3)
    z, log_det = model(x)
    done = accelerate(model, memory="reversible")
    fresh = flow()
    accelerate(fresh, memory="reversible")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x)[0], model(x)[0])
    done.undo()
    assert {type(block) for block in model.blocks} == {jet.Coupling}
    assert torch.equal(model(x)[0], z)
    assert torch.equal(model(x)[1], log_det)
