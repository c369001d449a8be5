"""Tells whether a layer computes what this package's would: both are run on the same numbers, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast.coupling_nets.traits import is_altered
from pyglow_fast.interop.glow_tts.layers import WN, AdoptedLayer, CouplingBlock, InvConvNear
from pyglow_fast.interop.glow_tts.structure import (
    coupling_fault,
    looks_like_actnorm,
    looks_like_coupling,
    looks_like_inv_conv,
    looks_like_wavenet,
    wavenet_fault,
)
from pyglow_fast.interop.stand_in import stand_in

TOLERANCE = 1e-9  # relative to the largest number
LENGTHS = (7, 4)  # lengths of the probe's samples


def adopted_class(module: nn.Module) -> type[AdoptedLayer] | None:
    """Find the class here for a module that looks like one of Glow-TTS; None for others, and adopted ones."""
    if isinstance(module, AdoptedLayer):
        return None
    looks_like: dict[type[AdoptedLayer], Callable[[nn.Module], bool]] = {
        WN: looks_like_wavenet,
        InvConvNear: looks_like_inv_conv,
        CouplingBlock: looks_like_coupling,
    }
    return next((ours for ours, looks in looks_like.items() if looks(module)), None)


def fault(module: nn.Module) -> str:
    """Say why a module that looks like one of Glow-TTS is not to be replaced; empty if it is."""
    ours = adopted_class(module)
    assert ours is not None  # it looks like one
    if is_altered(module):
        return "hooks on it, or a forward of its own"
    try:
        found = {WN: wavenet_fault, CouplingBlock: coupling_fault}.get(ours, lambda module: "")(module)
        if found:
            return found
        theirs = _twin(module)
        mine: Any = _twin(module)
        mine.__class__ = stand_in(ours, type(theirs))
        mine.least_positions = 0
        return _difference(theirs, mine, _calls(module, ours))
    except Exception as error:  # whatever a module of a foreign class may do
        return f"it cannot be called as Glow-TTS's layers are: {type(error).__name__}: {error}"


def actnorm_fault(module: nn.Module) -> str:
    """Say why a module is no actnorm that can be folded; empty if it is one."""
    if not looks_like_actnorm(module) or is_altered(module):
        return "no actnorm without hooks before the convolution"
    try:
        twin: Any = _twin(module)
        x, mask, _ = _inputs(twin.logs.shape[1], 0)
        expected = (twin.bias + twin.logs.exp() * x) * mask, twin.logs.sum() * mask.sum(dim=(1, 2))
        with torch.no_grad():
            same = all(_alike(one, other) for one, other in zip(twin(x, mask), expected, strict=True))
        return "" if same else "the actnorm before it computes something else than (bias + exp(logs) x) mask"
    except Exception as error:
        return f"its actnorm cannot be called as Glow-TTS's is: {type(error).__name__}: {error}"


@torch.no_grad()
def _twin(module: nn.Module) -> nn.Module:
    """A copy in float64 and evaluation mode with random parameters."""
    generator = torch.Generator().manual_seed(0)
    # Torch's older weight norm leaves its result on the module, of which there are no deep copies: it is made again.
    computed = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    twin = copy.deepcopy(module, {id(value): value.detach() for value in computed}).to("cpu", torch.float64).eval()
    for parameter in twin.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = max(1, parameter[0].numel()) if parameter.dim() > 1 else 4
        parameter.copy_(drawn / fan_in**0.5)
        if looks_like_inv_conv(twin) and parameter.dim() == 2:
            parameter.add_(torch.eye(len(parameter), dtype=torch.float64), alpha=3.0)  # far from singular, det > 0
    if hasattr(twin, "initialized"):
        twin.initialized = True  # type: ignore[assignment]
    return twin


def _inputs(channels: int, cond_channels: int) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    n, time = len(LENGTHS), max(LENGTHS)
    mask = (torch.arange(time) < torch.tensor(LENGTHS)[:, None]).double()[:, None]
    x = torch.randn(n, channels, time, generator=generator, dtype=torch.float64) * mask
    cond = torch.randn(n, cond_channels, 1, generator=generator, dtype=torch.float64) if cond_channels else None
    return x, mask, cond


Call = Callable[[nn.Module], Any]


def _calls(module: Any, ours: type[AdoptedLayer]) -> list[Call]:
    """The calls that a layer is probed by."""
    if ours is InvConvNear:
        x, mask, _ = _inputs(3 * len(module.weight), 0)

        def exact_inverse(layer: Any) -> Any:
            """Invert by a kept inverse, since the one that their code computes is rounded to float32."""
            layer.weight_inv = nn.Parameter(torch.linalg.inv(layer.weight), requires_grad=False)
            return layer(x, mask, reverse=True)

        def rounded_inverse(layer: Any) -> Any:
            layer.weight_inv = None
            return layer(x, mask, reverse=True)[0].float()

        return [lambda layer: layer(x, mask), lambda layer: layer(x), exact_inverse, rounded_inverse]
    wavenet = module if ours is WN else module.wn
    cond_layer: Any = wavenet._modules.get("cond_layer")
    first = wavenet.in_layers[0] if ours is WN else module.start
    channels = first.in_channels * (1 if ours is WN else 2)
    x, mask, cond = _inputs(channels, 0 if cond_layer is None else cond_layer.in_channels)

    def silenced(layer: nn.Module) -> Any:
        """Run in training with all of what dropout sees dropped, which shows where the dropout is."""
        dropouts = [part for part in layer.modules() if isinstance(part, nn.Dropout)]
        kept = [part.p for part in dropouts]
        layer.train()
        for part in dropouts:
            part.p = 1.0
        try:
            return layer(x, mask, g=cond)
        finally:
            layer.eval()
            for part, p in zip(dropouts, kept, strict=True):
                part.p = p

    calls: list[Call] = [lambda layer: layer(x, mask, g=cond), silenced]
    if cond is not None:
        calls.append(lambda layer: layer(x, mask))
    if ours is CouplingBlock:
        calls.append(lambda layer: layer(x, mask, g=cond, reverse=True))
    return calls


def _difference(theirs: nn.Module, mine: nn.Module, calls: list[Call]) -> str:
    with torch.no_grad():
        for call in calls:
            expected, found = call(theirs), call(mine)
            if not isinstance(expected, tuple):
                expected, found = (expected,), (found,)
            if len(expected) != len(found) or not all(map(_alike, expected, found)):
                return "its output is another one than ours on the same numbers"
    return ""


def _alike(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    if not isinstance(one, Tensor) or one.shape != other.shape:
        return False
    tolerance = TOLERANCE if one.dtype == torch.float64 else 1e-5
    return float((one - other).abs().max()) <= tolerance * max(1.0, float(one.abs().max()))
