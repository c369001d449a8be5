"""Jet's couplings: left as they are, but where memory is to be saved; then their own code runs twice."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.accelerate_cases import assert_same, saved_bytes, slope
from support.helpers import assert_close
from support.jet_models import ImageFlow
from torch import Tensor, nn

from pyglow_fast.interop import accelerate


def test_a_coupling_keeps_its_input_alone() -> None:
    model, x = ImageFlow(6, 4), torch.randn(5, 2, 3, 6, requires_grad=True)
    before = saved_bytes(model, lambda: model(x))
    accelerate(model, "reversible")
    assert before > 30 * x.nbytes
    assert saved_bytes(model, lambda: model(x)) <= 10 * x.nbytes


def test_weights_that_were_written_to_since_are_refused() -> None:
    """As their own code refuses them."""
    for model in (ImageFlow(6, 4), ours := ImageFlow(6, 4)):
        if model is ours:
            accelerate(model, "reversible")
        z, log_det = model(torch.randn(5, 2, 3, 6))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (z.square().sum() - log_det.sum()).backward()


@pytest.mark.parametrize("budget", ["auto", 20_000])
def test_dropout_is_drawn_again(budget: str | int) -> None:
    """The gradients are those of the very numbers that the forward has drawn; a small budget cuts the batch."""
    theirs, x = ImageFlow(6, 4, 0.3).double(), torch.randn(5, 2, 3, 6, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    accelerate(ours, "reversible", budget)

    def loss(model: Any = ours) -> Tensor:
        torch.manual_seed(1)
        z, log_det = model(x)
        return z.square().sum() - log_det.sum()

    bias = ours.blocks[0].dnn.last.bias
    loss().backward()
    exact = float(bias.grad.sum())
    assert abs(slope(loss, bias) - exact) <= 1e-5 * abs(exact)
    if budget == "auto":
        loss(theirs).backward()
        found, expected = ([value.grad for value in model.parameters()] for model in (ours, theirs))
        assert_close(found, expected, 100.0)


def test_couplings_of_images_with_a_context() -> None:
    theirs, x = ImageFlow(6, 4).double(), torch.randn(3, 4, 3, 6, dtype=torch.float64)
    ours, context = copy.deepcopy(theirs), torch.ones(3, 1, 24, dtype=torch.float64)
    assert len(accelerate(ours, "checkpoint", memory_budget=1).joined) == 4
    assert_same(ours, theirs, lambda model, x: model(x, context=context), x)


def test_a_net_that_changes_when_it_runs_is_left() -> None:
    model = ImageFlow(6, 2)
    model.blocks[1].dnn.hidden = nn.BatchNorm1d(6)
    done = accelerate(model, "reversible")
    assert list(done.replaced) == ["blocks.0"]
    assert "BatchNorm1d" in done.left["blocks.1"]
