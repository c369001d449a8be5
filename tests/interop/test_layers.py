"""Layers of nflows, normflows and FrEIA with every option, what surrounds a replaced one, and what stays theirs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.transforms as t
import normflows
import numpy as np
import pytest
import torch
from support.accelerate_cases import ContextNet, assert_same, at_work, from_normflows, mask, subnet
from support.covering import pairs
from support.freia_copies import Block, Sized
from support.helpers import assert_kernel_close
from support.tf32 import SETTINGS, in_tf32
from torch import Tensor, nn

from pyglow_fast.interop import accelerate
from pyglow_fast.interop import nflows as of_nflows
from pyglow_fast.interop import normflows as of_normflows

IMAGES, VECTORS = (3, 6, 4, 5), (7, 6)


def both_ways(layer: Any, x: Tensor) -> Any:
    if isinstance(layer, Fm.InvertibleModule):
        return layer([x]), layer([x], rev=True)
    return layer(x), layer.inverse(x)


def assert_replaced(layer: nn.Module, x: Tensor) -> Any:
    """It is, and gives what it gave, both ways; returns a copy of what it was."""
    theirs = copy.deepcopy(layer)
    assert list(accelerate(layer).replaced) == [""]
    assert_same(layer, theirs, both_ways, x)
    return theirs


class Activated(t.AffineCouplingTransform):
    """A coupling as in nflows' git, whose scale is an attribute."""

    scale_activation: Callable[[Tensor], Tensor] = staticmethod(torch.nn.functional.softplus)

    def _scale_and_shift(self, params: Tensor) -> tuple[Tensor, Tensor]:
        shift, raw = params.split(self.num_transform_features, 1)
        return self.scale_activation(raw), shift


@pytest.mark.parametrize("cut", [[0, 0, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("kind", ["AffineCouplingTransform", "AdditiveCouplingTransform", "git"])
def test_couplings_of_nflows(kind: str, cut: list[int]) -> None:
    """Every mask, and the scale of nflows' git."""
    names = {name: getattr(t.AffineCouplingTransform, name) for name in ("__module__", "__qualname__")}
    made = type("AffineCouplingTransform", (Activated,), names) if kind == "git" else getattr(t, kind)
    assert_replaced(at_work(made(torch.tensor(cut), ContextNet)), torch.randn(IMAGES, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_convolutions_of_nflows(training: bool) -> None:
    """One that caches its matrices in evaluation keeps its own forward there, which is faster."""
    x = torch.randn(IMAGES, dtype=torch.float64)
    for cached in (False, True):
        layer = at_work(t.OneByOneConvolution(6, using_cache=cached, identity_init=False)).train(training)
        theirs = copy.deepcopy(layer) if cached else assert_replaced(layer, x)
    assert accelerate(layer).replaced
    with torch.no_grad():
        torch.testing.assert_close(layer(x), theirs(x))
        assert (layer.cache.weight is not None) is not training


@pytest.mark.parametrize("shape", [IMAGES, VECTORS], ids=str)
def test_actnorms_of_nflows(shape: tuple[int, ...]) -> None:
    assert_replaced(at_work(t.ActNorm(6)), torch.randn(shape, dtype=torch.float64))  # a probe leaves what is not theirs


@pairs(
    pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv", None]),
    pytest.mark.parametrize("options", [{}, {"use_lu": False}, {"net_actnorm": True, "leaky": 0.2}], ids=str),
    pytest.mark.parametrize("channels", [4, 5]),
)
def test_blocks_of_normflows(scale_map: str | None, options: dict[str, Any], channels: int) -> None:
    scale = {"scale": False} if scale_map is None else {"scale_map": scale_map}
    block = at_work(normflows.flows.GlowBlock(channels, 6, init_zeros=False, **scale, **options))
    assert_replaced(block, torch.randn(3, channels, 4, 5, dtype=torch.float64))


def test_what_stays_theirs() -> None:
    cases: dict[str, tuple[nn.Module, str]] = {
        "split": (normflows.flows.GlowBlock(4, 6, split_mode="checkerboard"), "splits by checkerboard"),
        "one channel": (normflows.flows.GlowBlock(1, 6, split_mode="checkerboard"), "not a coupling, a 1x1"),
        "subclass": (type("Mine", (normflows.flows.GlowBlock,), {})(4, 6), "a subclass of GlowBlock"),
        "coupling": (normflows.flows.AffineCouplingBlock(subnet(2, 4)), "no counterpart of AffineCouplingBlock"),
        "mask": (t.AffineCouplingTransform(torch.ones(4), lambda a, b: nn.Linear(1, 1)), "a mask that keeps 0"),
        "squeeze": (t.SqueezeTransform(), "no counterpart of SqueezeTransform"),
        "permutation": (t.RandomPermutation(4), "its own forward is as fast"),
    }
    for name, (layer, reason) in cases.items():
        done = accelerate(layer)
        assert done.replaced == {}, name
        assert reason in done.left[""], name


@pytest.mark.parametrize("memory", ["store", "reversible"])
@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_permutations_alone_are_joined_in_the_dtype_of_the_state(default: torch.dtype, memory: str) -> None:
    """They have none of their own; a run may begin with one."""
    layers = []
    for _ in range(3):
        layers += [
            t.RandomPermutation(6),
            t.ReversePermutation(6),
            t.AffineCouplingTransform(mask(6, "halves"), ContextNet),
        ]
    model = at_work(t.CompositeTransform(layers)).to(default)
    theirs = copy.deepcopy(model)
    done = accelerate(model, memory)
    assert sum(report["steps"] for report in done.memory_report()) == 3
    assert not done.left
    x = torch.randn(IMAGES, dtype=default)
    for direction in ("forward", "inverse"):
        torch.testing.assert_close(getattr(model, direction)(x), getattr(theirs, direction)(x))


def test_joined_steps_that_are_called_in_another_order_are_refused() -> None:
    """A run would go through them in the library's; one by one, and twice in a row, they are what they were."""
    theirs = at_work(nn.ModuleList([normflows.flows.GlowBlock(4, 6) for _ in range(3)])).double()
    ours, x = copy.deepcopy(theirs), torch.randn(IMAGES[0], 4, *IMAGES[2:], dtype=torch.float64)

    def called(blocks: Any, method: str, backwards: bool, x: Tensor) -> Tensor:
        for block in reversed(list(blocks)) if backwards else blocks:
            x, _ = getattr(block, method)(x)
        return x

    accelerate(ours, "store")
    for method, backwards in (("forward", False), ("inverse", True)):
        with pytest.raises(
            RuntimeError, match=r"steps that are joined: expected calls from the .*, found another order"
        ):
            called(ours, method, not backwards, x)
        found, expected = (called(m, method, backwards, called(m, method, backwards, x)) for m in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("memory", [None, "reversible"])
def test_a_net_in_lower_precision_and_an_empty_batch(memory: str | None) -> None:
    """Under autocast the state keeps its dtype; what no kernel takes is theirs."""
    model = from_normflows(levels=1)
    at_work(model).float()
    theirs = copy.deepcopy(model)
    accelerate(model, memory)
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = model.inverse_and_log_det(x), theirs.inverse_and_log_det(x)
    assert (found[0][0].dtype, found[1].dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(found[1], expected[1].float(), rtol=0.02, atol=0.5)
    torch.testing.assert_close(found[0][0], theirs.inverse_and_log_det(x)[0][0], rtol=0.0, atol=0.05)
    empty = model.flows[0][0].inverse(x.new_zeros(0, 12, 4, 4))
    assert [value.shape for value in empty] == [(0, 12, 4, 4), (0,)]


@pytest.mark.full
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("library", [of_nflows, of_normflows], ids=["nflows", "normflows"])
def test_matrices_on_a_gpu_whose_products_compute_in_tf32(library: Any, setting: str) -> None:
    """In TF32 the error is at most twice that in float32."""
    layer: Any = t.OneByOneConvolution(12) if library is of_nflows else normflows.flows.GlowBlock(12, 4)
    if library is of_normflows:
        layer.flows[2].data_dep_init_done.fill_(1.0)
    row = next(row for row in library.LIBRARY.rows if row.tells(layer))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        exact, plain = (row.elements(layer.to(dtype), False)[0].tensors[0] for dtype in (torch.float64, torch.float32))
        with in_tf32(setting):
            found = row.elements(layer, False)[0].tensors[0]
    assert_kernel_close(found, plain, exact, magnitude=12.0)


# FrEIA's blocks

SHAPE = (6, 4, 5)


def block(kind: Any = Fm.AllInOneBlock, shape: tuple[int, ...] = SHAPE, **options: Any) -> Any:
    torch.manual_seed(3)
    np.random.seed(3)
    return at_work(kind([shape], subnet_constructor=subnet, **options))


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
    """Also of an odd number of channels, which the kernels' run does not take."""
    assert_replaced(block(kind, (channels, 4, 5), **options), state(channels, 4, 5))


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
    assert_replaced(block(Block), x)


def test_channels_last_and_half_precision() -> None:
    ours, x = block(), state(*SHAPE).to(memory_format=torch.channels_last)
    theirs = assert_replaced(ours, x)
    small = x.bfloat16()
    with torch.no_grad():
        found, expected = (item.bfloat16()([small])[0][0] for item in (ours, theirs))
    assert torch.equal(found, expected)
