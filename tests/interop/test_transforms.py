"""Accelerated models within torch.func and torch.compile: plain torch's derivatives, kernels in one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.export_cases import ACCELERATED
from torch import Tensor, nn

from pyglow_fast.functional import ops

Function = Callable[[Tensor], Any]


def squares(function: Function, x: Tensor) -> Tensor:
    parts = [value for value in torch.utils._pytree.tree_leaves(function(x)) if isinstance(value, Tensor)]
    return torch.stack([part.square().sum() for part in parts])


def rows(function: Function, x: Tensor) -> Tensor:
    """A Jacobian by vmap over the backward of what ran without it."""
    x = x.clone().requires_grad_()
    out = squares(function, x)
    return torch.func.vmap(lambda v: torch.autograd.grad(out, x, v, retain_graph=True)[0])(torch.eye(len(out)).to(out))


WAYS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "grad": lambda function, x: torch.func.grad(lambda x: squares(function, x).sum())(x),
    "jacrev": lambda function, x: torch.func.jacrev(lambda x: squares(function, x))(x),
    "jvp": lambda function, x: torch.func.jvp(lambda x: squares(function, x), (x,), (torch.ones_like(x),))[1],
    "vmap": lambda function, x: torch.func.vmap(lambda one: squares(function, one.unsqueeze(0)))(x),
    "vectorised jacobian": lambda function, x: torch.autograd.functional.jacobian(
        lambda x: squares(function, x), x, vectorize=True
    ),
    "vmap of a backward": rows,
}


@pytest.mark.parametrize("way", ["grad", *(pytest.param(way, marks=pytest.mark.full) for way in WAYS if way != "grad")])
@pytest.mark.parametrize("name", [name for name in ACCELERATED if "store" not in name])
def test_torch_func(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are no kernels at all."""
    model, x = ACCELERATED[name]()
    model, x = model.double(), x.double()
    found = WAYS[way](model, x)
    monkeypatch.setattr(ops, "_kernel_devices", lambda: ())
    expected = WAYS[way](model, x)
    # Of one formula in two orders of summation: 1e-9 is 1e6 units of rounding.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.full
@pytest.mark.parametrize("name", ACCELERATED)
def test_compiles_as_one_graph(name: str) -> None:
    model, x = ACCELERATED[name]()
    model, x = model.double(), x.double()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = [
        torch.autograd.grad(sum(part.square().sum() for part in out), wanted, allow_unused=True)
        for out in (found, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


def _set_flags(model: nn.Module, value: float) -> None:
    for name, flag in model.named_buffers():
        if name.endswith("data_dep_init_done"):
            flag.fill_(value)


@pytest.mark.parametrize("name", [pytest.param("normflows", marks=pytest.mark.full), "normflows, actnorms in nets"])
def test_what_waits_for_data_is_not_exported(name: str) -> None:
    """Whenever a flag was taken back, in its place or by another; a copy and a model that was moved are known."""
    model, x = ACCELERATED[name]()
    torch.export.export(copy.deepcopy(model).double(), (x.double(),))
    taken_back = copy.deepcopy(model)
    _set_flags(taken_back, 0.0)
    replaced = copy.deepcopy(model)
    replaced.load_state_dict(taken_back.state_dict(), assign=True)
    for waiting in (taken_back, replaced):
        with pytest.raises(Exception, match="data-dependent"):
            torch.export.export(waiting, (x,))
    _set_flags(taken_back, 1.0)
    torch.export.export(taken_back, (x,))


@pytest.mark.full
def test_a_graph_looks_at_flags_itself() -> None:
    model, x = ACCELERATED["normflows"]()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    _set_flags(model, 0.0)
    with pytest.raises(RuntimeError, match="waits for data: call the model once"):
        compiled(x)
    _set_flags(model, 1.0)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
