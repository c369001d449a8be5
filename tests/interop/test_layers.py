"""What surrounds a replaced layer: sizes, layouts and dtypes, and a probe that touches nothing."""

from __future__ import annotations

import copy
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import numpy as np
import pytest
import torch
from support.accelerate_cases import assert_same, at_work, subnet
from support.freia_copies import Block, Sized
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

SHAPE = (6, 4, 5)


def block(kind: Any = Fm.AllInOneBlock, shape: tuple[int, ...] = SHAPE, net: Any = subnet, **options: Any) -> Any:
    torch.manual_seed(3)
    np.random.seed(3)
    return at_work(kind([shape], subnet_constructor=net, **options))


def assert_both_ways(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for rev in (False, True):
        assert_same(ours, theirs, lambda of, x, rev=rev: of([x], rev=rev), x)


def state(*shape: int) -> Tensor:
    return torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Fm.AllInOneBlock, {"permute_soft": True, "reverse_permutation": True}),
        (Fm.AllInOneBlock, {"global_affine_type": "SIGMOID"}),
        (Sized, {}),
        *((Fm.GLOWCouplingBlock, {"clamp_activation": name}) for name in ("ATAN", "TANH", "SIGMOID", torch.sin)),
        (Fm.AffineCouplingOneSided, {"clamp": 1.3, "split_len": 0.3}),
    ],
    ids=lambda value: getattr(value, "__name__", None),  # a builtin's text has an address
)
@pytest.mark.parametrize("channels", [6, 5])
def test_a_block_of_freia(kind: Any, options: dict[str, Any], channels: int) -> None:
    """Also of an odd number of channels, which no run takes."""
    theirs = block(kind, (channels, 4, 5), **options)
    ours = copy.deepcopy(theirs)
    assert list(accelerate(ours).replaced) == [""]
    assert_both_ways(ours, theirs, state(channels, 4, 5))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer: setattr(layer, "splits", [4, 2]), "expected halves"),
        (lambda layer: setattr(layer, "global_scale", nn.Parameter(torch.ones(1, 6, 1))), "another global scale"),
        (lambda layer: delattr(layer, "householder"), "has no householder"),
        (lambda layer: setattr(layer, "forward", layer.forward), "a forward of its own"),
    ],
)
def test_what_is_no_block_of_ours_is_left_with_the_reason(change: Any, reason: str) -> None:
    layer = block()
    change(layer)
    done = accelerate(layer)
    assert not done.replaced
    assert reason in done.left[""]


def test_a_probe_touches_nothing() -> None:
    """Not the weights, the hooks, the nets, nor the random state."""
    model = Ff.SequenceINN(*SHAPE)
    model.append(Fm.AllInOneBlock, subnet_constructor=subnet)
    layer, calls = model.module_list[0], []
    for module in (layer, *layer.subnet.modules()):
        module.register_forward_hook(lambda *args: calls.append(1))
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert accelerate(model).replaced == {"module_list.0": "AllInOneBlock"}
    assert not calls
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("x", [state(6, 7, 3), state(6, 1, 2)], ids=["size", "few"])
def test_other_sizes(x: Tensor) -> None:
    theirs = block(Block)
    ours = copy.deepcopy(theirs)
    accelerate(ours)
    assert_both_ways(ours, theirs, x)


def test_channels_last_and_half_precision() -> None:
    theirs = block()
    ours, x = copy.deepcopy(theirs), state(*SHAPE).to(memory_format=torch.channels_last)
    accelerate(ours)
    assert_both_ways(ours, theirs, x)
    small = x.bfloat16()
    with torch.no_grad():
        found, expected = (item.bfloat16()([small])[0][0] for item in (ours, theirs))
    assert torch.equal(found, expected)
