"""An accelerated model whose user goes on with it: hooks, other nets, modes, inputs, a second call."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import nflows.transforms
import normflows
import pytest
import torch
from support.accelerate_cases import (
    HIDDEN,
    LIBRARIES,
    ContextNet,
    WithContext,
    assert_same,
    from_normflows,
    images,
    mask,
    noisy,
    prepared,
    saved_bytes,
    subnet,
)
from support.covering import pairs
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

libraries = pytest.mark.parametrize("name", LIBRARIES)


def joined_lists(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "JoinedList"]


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for module in model.modules()]


# What changes later


@pytest.mark.parametrize("memory", [None, "reversible"])
@libraries
def test_hooks_are_called(name: str, memory: str | None) -> None:
    """On convolutions within the nets, in their order."""
    model, loss_of = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    found: list[list[str]] = []
    for item in (model, theirs):
        calls: list[str] = []
        for key, module in item.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda *args, key=key, calls=calls: calls.append(key))
        loss_of(item, images())
        found.append(calls)
    assert found[0] == found[1] != []


@libraries
def test_hooks_on_all_modules_are_called(name: str) -> None:
    """As layer by layer: they see nflows' transforms and FrEIA's blocks, and all convolutions."""
    model, loss_of = prepared(name)
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
            loss_of(item, images())
        finally:
            handle.remove()
        counts.append(Counter(calls))
    assert counts[0] == counts[1]
    assert counts[0]["Conv2d"] == 3 * {"normflows": 6}.get(name, 3)


@pytest.mark.parametrize("memory", [None, "store"])
@libraries
def test_a_forward_put_on_a_convolution(name: str, memory: str | None) -> None:
    model, loss_of = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    for item in (model, theirs):
        for module in item.modules():
            if type(module) is nn.Conv2d:
                module.forward = lambda x, own=module: 1.5 * nn.Conv2d.forward(own, x)  # type: ignore[method-assign]
    torch.testing.assert_close(loss_of(model, images()), loss_of(theirs, images()), rtol=1e-12, atol=0)


OTHERS: dict[str, tuple[str, str, Callable[[], nn.Module]]] = {  # the library, an attribute, what takes its place
    "a net of normflows": ("normflows", "param_map", lambda: subnet(12, 24)),
    "a net of nflows": ("nflows", "transform_net", lambda: ContextNet(6, 12)),
    "a net of FrEIA": ("FrEIA", "subnet", lambda: subnet(6, 12)),
    "a convolution": (
        "nflows",
        "convs",
        lambda: nn.ModuleList([nn.Conv2d(6, HIDDEN, 1), nn.Conv2d(HIDDEN, HIDDEN, 1), nn.Conv2d(HIDDEN, 12, 1)]),
    ),
}


@pytest.mark.parametrize("memory", ["store", "reversible"])
@pytest.mark.parametrize("case", OTHERS)
def test_another_net(case: str, memory: str) -> None:
    name, attribute, make = OTHERS[case]
    model, loss_of = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    for item in (model, theirs):
        owner = [module for module in item.modules() if hasattr(module, attribute)][1]
        torch.manual_seed(7)
        setattr(owner, attribute, make().double())
    assert_same(model, theirs, loss_of, images())


def test_a_net_that_does_more_in_training() -> None:
    """Joined in evaluation, where it is three convolutions and no more."""

    class InTraining(ContextNet):
        def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
            first, second, third = self.convs
            hidden = torch.relu(first(inputs))
            return third(torch.relu(second(2.0 * hidden if self.training else hidden)))

    torch.manual_seed(0)
    t = nflows.transforms
    steps = [(t.OneByOneConvolution(4), t.AffineCouplingTransform(mask(4, "halves"), InTraining)) for _ in range(3)]
    model = noisy(t.CompositeTransform([layer for step in steps for layer in step])).eval()
    theirs, x = copy.deepcopy(model), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert accelerate(model, "reversible").joined
    for mode in (False, True):
        model.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-12, atol=1e-12)


@libraries
def test_lists_are_not_changed(name: str) -> None:
    """Their length is that of what they show: an append would overwrite a step."""
    model, _ = prepared(name)
    shown = repr(model)
    done = accelerate(model, "store")
    steps = joined_lists(model)[0]
    for change in (
        lambda: steps.append(nn.Identity()),
        lambda: steps.insert(0, nn.Identity()),
        lambda: steps.extend([nn.Identity()]),
        lambda: steps.pop(0),
        lambda: steps.__setitem__(0, nn.Identity()),
        lambda: steps.__delitem__(0),
    ):
        with pytest.raises(RuntimeError, match="undo the acceleration before"):
            change()
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


def assert_same_buffers(ours: nn.Module, theirs: nn.Module) -> None:
    for own, wanted in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9, check_dtype=False)


@pairs(
    pytest.mark.parametrize("layer", ["BatchNorm", "spectral norm", "old spectral norm", "InstanceNorm"]),
    pytest.mark.parametrize("memory", ["checkpoint", "reversible"]),
    libraries,
)
def test_nets_that_change_when_they_run_are_left(name: str, memory: str, layer: str) -> None:
    torch.manual_seed(0)
    loss_of = LIBRARIES[name][1]
    model = from_normflows(levels=1) if name == "normflows" else LIBRARIES[name][0]()
    for module in model.modules():
        for attribute in ("param_map", "transform_net", "subnet"):
            if hasattr(module, attribute):
                net = normed(6, 12, layer)
                setattr(module, attribute, WithContext(net) if attribute == "transform_net" else net)
    model = noisy(model)
    theirs = copy.deepcopy(model)
    done = accelerate(model, memory)
    assert done.joined == {}
    assert sum("not joined: a" in reason and "in its net" in reason for reason in done.left.values()) == 3
    assert_same(model, theirs, loss_of, images())
    assert_same_buffers(model, theirs)


@pytest.mark.parametrize("norm_of", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("name", ["normflows", "FrEIA"])
def test_a_spectral_norm_put_on_a_joined_net(name: str, norm_of: Callable[[nn.Module], nn.Module]) -> None:
    """The steps run one by one then, in training: a net that changes when it runs cannot be run again."""
    model, loss_of = prepared(name)
    theirs = copy.deepcopy(model)
    assert accelerate(model, "reversible").joined
    for item in (model, theirs):
        torch.manual_seed(5)
        norm_of([module for module in item.modules() if type(module) is nn.Conv2d][1])
    assert_same(model, theirs, loss_of, images())
    assert_same_buffers(model, theirs)


# Inputs and calls


@libraries
def test_reversible_memory(name: str) -> None:
    make, loss_of = LIBRARIES[name]
    torch.manual_seed(0)
    model, x = make(steps=8, **({"levels": 1} if name == "normflows" else {})), images(32, torch.float32)
    with torch.no_grad():
        loss_of(model, x)
    before = saved_bytes(model, lambda: loss_of(model, x))
    accelerate(model, "reversible")
    assert saved_bytes(model, lambda: loss_of(model, x)) < before / 5


@pytest.mark.parametrize("memory", [None, "reversible"])
@pytest.mark.parametrize("name", ["normflows", "nflows"])
def test_inputs_of_a_dtype_that_is_promoted(name: str, memory: str | None) -> None:
    """A float64 model takes float32 images where the library's does."""
    model, loss_of = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    x = images(dtype=torch.float32)
    torch.testing.assert_close(loss_of(model, x), loss_of(theirs, x), rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("name", ["nflows", "FrEIA"])
def test_within_torch_func(name: str) -> None:
    """As layer by layer (those of normflows refuse it)."""
    model, loss_of = prepared(name)
    theirs = copy.deepcopy(model)
    accelerate(model, "reversible")
    found, wanted = (torch.func.grad(lambda x, item=item: loss_of(item, x))(images()) for item in (model, theirs))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_in_bfloat16_the_layers_are_called() -> None:
    model, loss_of = prepared("FrEIA")
    model = model.bfloat16()
    theirs = copy.deepcopy(model)
    accelerate(model, "reversible")
    x = images().bfloat16()
    torch.testing.assert_close(loss_of(model, x), loss_of(theirs, x))


@libraries
def test_calls_in_order(name: str) -> None:
    """Another memory is not taken in silence; what was done later is undone first."""
    model, loss_of = prepared(name)
    expected, own_classes = loss_of(model, images()), classes(model)
    layers = accelerate(model)
    joined = accelerate(model, "reversible")
    other = accelerate(model, "checkpoint")
    assert other.joined == other.replaced == {}
    assert sum("joined before, memory reversible" in reason for reason in other.left.values()) >= 3
    other.undo()  # of nothing
    with pytest.raises(RuntimeError, match="joined by a later call of accelerate; undo that first"):
        layers.undo()
    torch.testing.assert_close(loss_of(model, images()), expected, rtol=1e-12, atol=0)
    joined.undo()
    torch.testing.assert_close(loss_of(model, images()), expected, rtol=1e-12, atol=0)
    layers.undo()
    assert classes(model) == own_classes


def test_layers_that_were_ours_stay_ours() -> None:
    model = nn.ModuleList([normflows.flows.GlowBlock(4, 4), normflows.flows.GlowBlock(4, 4)])
    accelerate(model[0])
    before = classes(model)
    accelerate(model, "reversible").undo()
    assert classes(model) == before


def test_replicas_of_a_data_parallel_have_their_own_layers() -> None:
    model, _ = prepared("normflows")
    accelerate(model, "reversible")
    joined = joined_lists(model)[0]
    replica = joined._replicate_for_data_parallel()
    assert type(replica) is nn.ModuleList
    assert len(replica) == 4
    assert repr(joined).startswith("JoinedList")
