"""A live model of another library made ours in place: the same outputs and gradients, less memory, and back again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
from support.accelerate_cases import (
    CASES,
    freia_loss,
    from_freia,
    from_nflows,
    from_normflows,
    images,
    nflows_loss,
    normflows_loss,
    prepared,
    subnet,
)
from torch import Tensor, nn

from pyglow_fast.interop import accelerate


@pytest.mark.parametrize("name", ["normflows", "nflows"])
def test_a_fresh_model_initialises_from_its_first_batch(name: str) -> None:
    make, loss_of, _ = CASES[name]
    torch.manual_seed(1)
    model = make().double()
    theirs = copy.deepcopy(model)
    accelerate(model, "reversible")
    for item in (model, theirs):
        loss_of(item, images(16)).backward()
    for (key, value), (_, wanted) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def saved_bytes(model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor], x: Tensor) -> int:
    """Of the tensors that autograd keeps for the backward, parameters left out."""
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss_of(model, x)
    return sum(seen.values())


of_each_library = pytest.mark.parametrize(
    ("make", "loss_of"),
    [
        (lambda: from_normflows(levels=1, steps=8), normflows_loss),
        (lambda: from_freia(steps=8), freia_loss),
        (lambda: from_nflows(steps=8), nflows_loss),
    ],
    ids=["normflows", "FrEIA", "nflows"],
)


@of_each_library
def test_reversible_memory(make: Callable[[], nn.Module], loss_of: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = make(), images(32, torch.float32)
    with torch.no_grad():
        loss_of(model, x)
    before = saved_bytes(model, loss_of, x)
    accelerate(model, "reversible")
    assert saved_bytes(model, loss_of, x) < before / 5


def test_the_report() -> None:
    model, _, _ = prepared("normflows leaky")
    done = accelerate(model, "store")
    text = str(done)
    assert "GlowBlock" in done.replaced["flows.0.0"]
    assert not any("net runs as it is" in reason for reason in done.left.values())
    assert done.joined == {f"flows.{i}": "3 steps in one chain each, memory 'store'" for i in range(2)}
    assert "joined: 2" in text
    done.undo()
    model.flows[0][0].flows[0].flows[1].param_map.net[1] = nn.Softplus()
    done = accelerate(model)
    reason = done.left["flows.0.0.flows.0.flows.1.param_map"]
    assert reason.startswith("its net runs as it is: net.1: Softplus(beta=1.0, threshold=20.0): expected ")
    other = nn.Sequential(normflows.flows.Planar((4,)), nn.Linear(2, 2))
    assert accelerate(other).left == {"0": "no counterpart of Planar"}


def test_what_is_not_joined() -> None:
    """Conditions of single steps, hooks and odd masks run layer by layer."""
    conditional = Ff.SequenceINN(3, 8, 8)
    for _ in range(2):
        conditional.append(Fm.AllInOneBlock, cond=0, cond_shape=(1, 8, 8), subnet_constructor=subnet)
    assert accelerate(conditional, "reversible").joined == {}
    single, _, _ = prepared("nflows")
    layers = list(single._transform._transforms)[:4]
    assert accelerate(nflows.transforms.CompositeTransform(layers), "reversible").joined == {}
    hooked = from_normflows(levels=1, steps=3)
    hooked.flows[0][1].register_forward_hook(lambda *args: None)
    assert accelerate(hooked, "reversible").joined == {}
    assert len(accelerate(hooked).replaced) == 0  # they are ours already


@pytest.mark.parametrize("memory", [None, "store", "reversible"], ids=str)
def test_a_slope_that_is_changed_later_counts(memory: str | None) -> None:
    for name in ("normflows leaky", "nflows leaky", "FrEIA leaky"):
        model, loss_of, _ = prepared(name)
        theirs = copy.deepcopy(model)
        accelerate(model, memory)
        before = loss_of(model, images())
        for item in (model, theirs):
            for part in item.modules():
                if isinstance(part, nn.LeakyReLU):
                    part.negative_slope = 0.7
        after = loss_of(model, images())
        assert (after - before).abs() > 1e-6
        torch.testing.assert_close(after, loss_of(theirs, images()), rtol=1e-10, atol=1e-10)
