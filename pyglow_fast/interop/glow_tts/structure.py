"""Recognises layers of Glow-TTS by their structure, in coqui's package or in a copy of its or the first code.

A WaveNet net is a module with ``in_layers`` and ``res_skip_layers``, an invertible convolution one with a small square
``weight``, a coupling one with ``start``, ``wn`` and ``end``. What such modules compute is not read from their code: it
is compared with ours, see probe.py.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from pyglow_fast.layers.wavenet import Conv, WaveNetParts


def looks_like_wavenet(module: nn.Module) -> bool:
    """Whether a module may be a WaveNet net."""
    lists = [getattr(module, name, None) for name in ("in_layers", "res_skip_layers")]
    return all(isinstance(found, nn.ModuleList) and len(found) > 0 for found in lists)


def looks_like_inv_conv(module: nn.Module) -> bool:
    """Whether a module may be a 1x1 convolution in groups."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and hasattr(module, "weight_inv") and not module._modules


def looks_like_actnorm(module: nn.Module) -> bool:
    """Whether a module may be an actnorm of sequences."""
    parameters = module._parameters
    shapes = [value.shape for name in ("logs", "bias") if (value := parameters.get(name)) is not None]
    alike = len(shapes) == 2 == len(parameters) and shapes[0] == shapes[1] and len(shapes[0]) == 3
    return alike and shapes[0][0] == shapes[0][2] == 1 and hasattr(module, "initialized") and not module._modules


def looks_like_coupling(module: nn.Module) -> bool:
    """Whether a module may be a coupling with a WaveNet net."""
    parts = [module._modules.get(name) for name in ("start", "wn", "end")]
    return all(part is not None for part in parts) and looks_like_wavenet(parts[1])  # type: ignore[arg-type]


def dropout_of(wavenet: nn.Module) -> nn.Dropout | None:
    """Find a net's dropout, if it has just one."""
    found = [child for child in wavenet.children() if type(child) is nn.Dropout]
    return found[0] if len(found) == 1 else None


def convolutions(wavenet: nn.Module) -> list[Any]:
    """List all convolutions of a net, also that of the condition."""
    parts: Any = wavenet
    cond = wavenet._modules.get("cond_layer")
    return [*parts.in_layers, *parts.res_skip_layers, *([] if cond is None else [cond])]


def _normalised(conv: Any) -> bool:
    """Whether all that runs before a convolution is torch's older weight norm, a hook."""
    return all(isinstance(hook, WeightNorm) for hook in conv._forward_pre_hooks.values())


def _keeps_length(conv: Any, before: int, after: int) -> bool:
    if not isinstance(conv, nn.Conv1d) or (conv.in_channels, conv.out_channels) != (before, after):
        return False
    size, step = conv.kernel_size[0], conv.dilation[0]
    pads = conv.padding in ("same", (step * (size // 2),)) and conv.padding_mode == "zeros"
    return size % 2 == 1 and conv.stride == (1,) and conv.groups == 1 and pads


def _has_only_weight_norm(module: nn.Module) -> bool:
    """Whether nothing runs around its convolutions or in them but weight norms, old or new."""
    for part in module.modules():
        others = part._forward_hooks or part._backward_hooks or part._backward_pre_hooks
        if others or not _normalised(part) or "forward" in vars(part):
            return False
        if isinstance(part, ParametrizationList) and not all(isinstance(item, _WeightNorm) for item in part):
            return False
    return True


def wavenet_fault(module: nn.Module) -> str:
    """Say what of a WaveNet net is not as in this package; empty if all is."""
    convs = convolutions(module)
    own: Any = module
    layers, hidden = len(own.in_layers), getattr(own.res_skip_layers[0], "in_channels", 0)
    if len(own.res_skip_layers) != layers or dropout_of(module) is None:
        return "another number of layers or dropouts than a WaveNet's"
    widths = [(hidden, 2 * hidden)] * layers
    widths += [(hidden, 2 * hidden)] * (layers - 1) + [(hidden, hidden)]
    widths += [(convs[-1].in_channels, 2 * hidden * layers)] * (len(convs) - 2 * layers)
    for conv, (before, after) in zip(convs, widths, strict=True):
        if not _keeps_length(conv, before, after):
            return f"{type(conv).__name__}({conv.extra_repr()}) where a WaveNet has another convolution"
    if not _has_only_weight_norm(module):
        return "hooks in it, or parametrizations that are no weight norm"
    return ""


def coupling_fault(module: nn.Module) -> str:
    """Say what of a coupling is not as in this package; empty if all is."""
    own: Any = module
    start, end = own.start, own.end
    if found := wavenet_fault(own.wn):
        return found
    half, hidden = getattr(start, "in_channels", 0), own.wn.in_layers[0].in_channels
    if not _keeps_length(start, half, hidden) or not _keeps_length(end, hidden, 2 * half):
        return "other layers around its WaveNet than Glow-TTS's"
    return "" if _has_only_weight_norm(module) else "hooks in it, or parametrizations that are no weight norm"


def conv_parts(conv: Any) -> Conv:
    """Read a convolution's tensors of now, its weight normalised where a hook does that."""
    weight = conv.weight
    for hook in conv._forward_pre_hooks.values():
        weight = hook.compute_weight(conv)
    return Conv.laid_out(weight, conv.bias, conv.dilation[0])


def wavenet_parts(wavenet: Any, start: nn.Module | None = None, end: nn.Module | None = None) -> WaveNetParts:
    """Read the convolutions of now of a WaveNet net, and of a coupling around it."""
    cond = wavenet._modules.get("cond_layer")
    dilated, mixing = map(conv_parts, wavenet.in_layers), map(conv_parts, wavenet.res_skip_layers)
    around = [None if conv is None else conv_parts(conv) for conv in (cond, start, end)]
    return WaveNetParts(list(dilated), list(mixing), *around)


def dropout_probability(wavenet: nn.Module) -> float:
    """Read the dropout's probability where it is active, else 0."""
    dropout = dropout_of(wavenet)
    return dropout.p if dropout is not None and dropout.training else 0.0
