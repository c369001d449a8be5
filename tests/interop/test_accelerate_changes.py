"""An accelerated model whose user goes on with it: modes, inputs, a second call."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.accelerate_cases import (
    HIDDEN,
    MEMORIES,
    WithContext,
    assert_same,
    at_work,
    from_freia,
    from_nflows,
    from_normflows,
    results,
    saved_bytes,
)
from support.covering import pairs
from support.export_cases import Called
from support.structures import BY_NAME
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

MODELS: dict[str, Callable[..., nn.Module]] = {
    "normflows": lambda **options: from_normflows(levels=1, **options),
    "nflows": lambda **options: from_nflows(**options)._transform,
    "FrEIA": from_freia,
}
libraries = pytest.mark.parametrize("name", MODELS)
X = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def prepared(name: str, **options: Any) -> Any:
    torch.manual_seed(3)
    return at_work(MODELS[name](**options))


def call(model: Any, x: Tensor) -> Any:
    return model.inverse_and_log_det(x) if hasattr(model, "merges") else model(x)


def joined_lists(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "JoinedList"]


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


# What changes later


@libraries
def test_what_is_set_through_a_list_is_set_on_the_layer(name: str) -> None:
    model = prepared(name)
    children = [child for child in model.modules() if isinstance(child, nn.ModuleList)]
    before = [list(child) for child in children]
    accelerate(model, "reversible")
    for child, layers in zip(children, before, strict=True):
        for shown, layer in zip(child, layers, strict=True):
            shown.mark = mark = object()
            assert layer.mark is mark


@libraries
@pytest.mark.parametrize("memory", MEMORIES)
def test_parameters_that_are_lent_for_a_call_get_its_gradients(name: str, memory: str | None) -> None:
    """By torch.func.functional_call: in the backward the model has its own again."""
    model = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    found = []
    for each in (theirs, model):
        lent = {key: (1.1 * value).detach().requires_grad_() for key, value in each.named_parameters()}
        called = Called(each, "inverse_and_log_det" if name == "normflows" else "forward")
        z, log_det = torch.func.functional_call(called, {f"module.{key}": value for key, value in lent.items()}, X)
        latents = sum(part.square().sum() for part in (z if isinstance(z, tuple | list) else [z]))
        found.append(torch.autograd.grad(latents - log_det.sum(), list(lent.values()), allow_unused=True))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@libraries
def test_hooks_on_all_modules_are_called(name: str) -> None:
    """As layer by layer: they see nflows' transforms and FrEIA's blocks, and all convolutions."""
    model = prepared(name)
    alone = copy.deepcopy(model)
    accelerate(model, "reversible")
    accelerate(alone)
    counts = []
    for item in (model, alone):
        calls: list[str] = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, *args, calls=calls: calls.append(type(module).__name__)
        )
        try:
            call(item, X)
        finally:
            handle.remove()
        counts.append(Counter(calls))
    assert counts[0] == counts[1]
    assert counts[0]["Conv2d"] == 3 * 3


def test_lists_are_not_changed() -> None:
    """Their length is that of what they show: an append would overwrite a step."""
    model = prepared("normflows")
    shown = repr(model)
    done = accelerate(model, "store")
    steps = joined_lists(model)[0]
    for method, given in (("append", [nn.Identity()]), ("__setitem__", [0, nn.Identity()]), ("__delitem__", [0])):
        with pytest.raises(RuntimeError, match="undo the acceleration before"):
            getattr(steps, method)(*given)
    assert repr(model).replace("JoinedList", "ModuleList") == shown
    done.undo()
    steps.append(nn.Identity())
    assert list(steps._modules)[-1] == str(len(steps) - 1)


# Nets that cannot be run a second time


def normed(c_in: int, c_out: int, layer: str) -> nn.Module:
    first, last = nn.Conv2d(c_in, HIDDEN, 3, padding=1), nn.Conv2d(HIDDEN, c_out, 1)
    if layer == "spectral norm":
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(first), nn.ReLU(), last)
    if layer == "old spectral norm":  # a hook on the module, not a parametrization
        return nn.Sequential(nn.utils.spectral_norm(first), nn.ReLU(), last)
    norm = nn.BatchNorm2d(HIDDEN) if layer == "BatchNorm" else nn.InstanceNorm2d(HIDDEN, track_running_stats=True)
    return nn.Sequential(first, norm, nn.ReLU(), last)


@pairs(
    pytest.mark.parametrize("layer", ["BatchNorm", "spectral norm", "old spectral norm", "InstanceNorm"]),
    pytest.mark.parametrize("memory", ["checkpoint", "reversible"]),
    libraries,
)
def test_nets_that_change_when_they_run_are_left(name: str, memory: str, layer: str) -> None:
    model = prepared(name)
    for module in model.modules():
        for attribute in ("param_map", "transform_net", "subnet"):
            if hasattr(module, attribute):
                net = normed(6, 12, layer)
                setattr(module, attribute, WithContext(net) if attribute == "transform_net" else net)
    theirs = copy.deepcopy(at_work(model))
    done = accelerate(model, memory)
    assert done.joined == {}
    assert sum("not joined: a" in reason and "in its net" in reason for reason in done.left.values()) == 3
    assert_same(model, theirs, call, X)
    torch.testing.assert_close(list(model.buffers()), list(theirs.buffers()), rtol=1e-9, atol=1e-9)


# Inputs and calls


@libraries
def test_reversible_memory(name: str) -> None:
    model, x = prepared(name, steps=8).float(), torch.randn(32, 3, 8, 8)
    before = saved_bytes(model, lambda: call(model, x))
    accelerate(model, "reversible")
    assert saved_bytes(model, lambda: call(model, x)) < before / 5


@pytest.mark.parametrize("memory", [None, "reversible"])
@pytest.mark.parametrize("name", ["normflows", "nflows"])
def test_inputs_of_a_dtype_that_is_promoted(name: str, memory: str | None) -> None:
    """A float64 model takes float32 images where the library's does."""
    model = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    found, wanted = (results(item, call, X.float(), gradients=False) for item in (model, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize("name", ["normflows-lu-sigmoid", "nflows-halves", "freia", "freia-graph"])
def test_calls_in_order(name: str) -> None:
    """Another memory is not taken in silence; what was done later is undone first."""
    case = BY_NAME[name]
    model, (data, conditions) = case.model(), case.batch()
    own_classes = classes(model)
    layers, ours = accelerate(model), classes(model)
    joined = accelerate(model, "reversible")
    other = accelerate(model, "checkpoint")
    assert other.joined == other.replaced == {}
    assert sum("joined before, memory reversible" in reason for reason in other.left.values()) >= 3
    other.undo()  # of nothing
    with pytest.raises(RuntimeError, match="joined by a later call of accelerate; undo that first"):
        layers.undo()
    expected = case.forward(case.model(), data, conditions)
    torch.testing.assert_close(case.forward(model, data, conditions), expected, rtol=1e-12, atol=1e-12)
    joined.undo()
    assert classes(model) == ours, "layers that were ours stay ours"
    torch.testing.assert_close(case.forward(model, data, conditions), expected, rtol=1e-12, atol=1e-12)
    layers.undo()
    assert classes(model) == own_classes


def test_replicas_of_a_data_parallel_have_their_own_layers() -> None:
    model = prepared("normflows")
    accelerate(model, "reversible")
    joined = joined_lists(model)[0]
    replica = joined._replicate_for_data_parallel()
    assert type(replica) is nn.ModuleList
    assert len(replica) == 4
    assert repr(joined).startswith("JoinedList")
