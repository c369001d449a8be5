"""Glow-TTS's decoder, by structure: coqui's, and copies of it or of the first code.

    z = (x_0, (t + s x_1) m), (t, log s) = end(wn(m start(x_0)))       u = W_groups ((bias + exp(logs) x) m) m

Recognised are WaveNet nets (modules with ``in_layers`` and ``res_skip_layers``), also alone, in the couplings and the
posterior encoder of VITS; convolutions in groups (a small square ``weight``); couplings (``start``, ``wn``, ``end``);
and, in runs, actnorms. Batches of less than 1000 positions (samples times time steps, as the layer sees them), such as
one sentence that is spoken, run by the layers' own code, which is faster there. What differs on purpose: dropout draws
other random numbers, of the same distribution; the log-det of a matrix whose determinant is negative is log|det| (NaN
in their code). Masks must be 0 and 1 (their own code runs for others) and take no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from pyglow_fast import functional
from pyglow_fast._core.errors import can_read
from pyglow_fast._core.torch_private import ParametrizedWeightNorm
from pyglow_fast.interop.table import AS_FAST, Call, Element, Library, Row, grouped, wrapped
from pyglow_fast.layers.wavenet import Conv, WaveNetParts, run_wavenet, wavenet_bytes, wavenet_halo
from pyglow_fast.nets.masks import MaskedNet
from pyglow_fast.reference import CouplingSpec
from pyglow_fast.runs.description import NetCoupling
from pyglow_fast.runs.maps import ChannelMap, Map

__all__ = ["LIBRARY"]

LEAST_POSITIONS = 1000  # samples times time steps from which on ours runs
SIGMOID_EPS = 1e-6  # what Glow-TTS adds to a scale
LENGTHS = (7, 4)  # of the samples of a probe
NO_NORM = "hooks in it, or parametrizations that are no weight norm"


def _is_wavenet(module: Any) -> bool:
    lists = [getattr(module, name, None) for name in ("in_layers", "res_skip_layers")]
    return all(isinstance(found, nn.ModuleList) and len(found) > 0 for found in lists)


def _is_coupling(module: nn.Module) -> bool:
    parts = [module._modules.get(name) for name in ("start", "wn", "end")]
    return all(part is not None for part in parts) and _is_wavenet(parts[1])


def _is_inv_conv(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and hasattr(module, "weight_inv") and not module._modules


def _is_actnorm(module: nn.Module) -> bool:
    return module._parameters.keys() == {"logs", "bias"} and hasattr(module, "initialized") and not module._modules


def _wavenet(layer: Any) -> Any:
    """The WaveNet that a layer is or has, or None."""
    return layer if _is_wavenet(layer) else layer._modules.get("wn")


def _ends(layer: Any) -> list[Any]:
    """The convolutions besides those of the WaveNet's layers: of the condition, before and behind it, or None."""
    return [_wavenet(layer)._modules.get("cond_layer"), *(layer._modules.get(name) for name in ("start", "end"))]


def _keeps_length(conv: Any) -> bool:
    if not isinstance(conv, nn.Conv1d):
        return False
    size, step = conv.kernel_size[0], conv.dilation[0]
    pads = conv.padding in ("same", (step * (size // 2),)) and conv.padding_mode == "zeros"
    return size % 2 == 1 and conv.stride == (1,) and conv.groups == 1 and pads


def _has_only_weight_norm(module: nn.Module) -> bool:
    """Tell whether its convolutions have no hooks or parametrizations but weight norms, old or new."""
    for part in module.modules():
        before = part._forward_pre_hooks.values() if part is not module else ()
        others = part is not module and (part._forward_hooks or part._backward_hooks or part._backward_pre_hooks)
        if others or "forward" in vars(part) or not all(isinstance(hook, WeightNorm) for hook in before):
            return False
        if isinstance(part, ParametrizationList) and not all(isinstance(item, ParametrizedWeightNorm) for item in part):
            return False
    return True


def _dropouts(wavenet: nn.Module) -> list[nn.Dropout]:
    return [child for child in wavenet.children() if type(child) is nn.Dropout]


def _unfit(layer: Any) -> str:
    """Why a WaveNet, or a coupling around one, is none that ours runs; channels of other numbers fail in a probe."""
    net = _wavenet(layer)
    if len(_dropouts(net)) != 1:
        return "another number of dropouts than a WaveNet's"
    for conv in (*net.in_layers, *net.res_skip_layers, *_ends(layer)):
        if conv is not None and not _keeps_length(conv):
            return f"{type(conv).__name__}({conv.extra_repr()}) where a WaveNet has another convolution"
    return "" if _has_only_weight_norm(layer) else NO_NORM


def _conv(conv: Any) -> Conv:
    """A convolution's tensors of now, its weight normalised where a hook does that."""
    weight = conv.weight
    for hook in conv._forward_pre_hooks.values():
        weight = hook.compute_weight(conv)
    return Conv.laid_out(weight, conv.bias, conv.dilation[0])


class BlockNet(nn.Module):
    """A WaveNet as a net for masked sequences, wn(x), or that of a coupling around one, end(wn(m start(x)))."""

    takes_mask = True
    writes_to_input = False

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block: Any = block

    @property
    def halo(self) -> int:
        """The number of positions to each side that an output depends on."""
        layers = _wavenet(self.block).in_layers
        return wavenet_halo(layers[0].kernel_size[0], [conv.dilation[0] for conv in layers])

    @property
    def dropout(self) -> float:
        """The probability that a value is dropped now."""
        return sum(dropout.p for dropout in _dropouts(_wavenet(self.block)) if dropout.training)

    @property
    def deterministic(self) -> bool:
        """Whether no dropout is active."""
        return not self.dropout

    def bytes_per_position(self, element_size: int) -> int:
        """The most bytes of activations alive in forward and backward, per sample and position."""
        layers, edges = self.block.wn.in_layers, self.block.start.in_channels + self.block.end.out_channels
        return wavenet_bytes(layers[0].in_channels, len(layers), edges, not self.deterministic, element_size)

    def forward(self, x: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
        """Map x (N, C / 2, T), cond (N, C_c, 1) or None, mask (N, 1, T) or None to (N, C, T); without ends H to H."""
        net = _wavenet(self.block)
        dilated, mixing = ([_conv(conv) for conv in convs] for convs in (net.in_layers, net.res_skip_layers))
        ends: Any = [_conv(conv) if conv is not None else None for conv in _ends(self.block)]
        return run_wavenet(WaveNetParts(dilated, mixing, *ends), x, cond, mask, self.dropout)


def _masked(block: nn.Module) -> nn.Module:
    return MaskedNet(BlockNet(block))


def _coupling_elements(block: Any, inverse: bool) -> list[Element]:
    spec, half = CouplingSpec("affine", "exp", order="scale_shift"), block.start.in_channels
    if getattr(block, "sigmoid_scale", False):
        spec = CouplingSpec("affine", "sigmoid", bias=2.0, eps=SIGMOID_EPS, order="scale_shift")
    return [NetCoupling(wrapped(block, _masked, block), spec, half, half)]


def _conv_elements(conv: Any, inverse: bool) -> list[Element]:
    log_det = functional.log_abs_det(conv.weight)
    if not inverse:
        return [grouped(conv.weight, log_det)]
    # A stored inverse is a constant, as theirs.
    return [grouped(functional.invert_matrix(conv.weight) if conv.weight_inv is None else conv.weight_inv, -log_det)]


def _actnorm_elements(actnorm: Any, inverse: bool) -> list[Element]:
    logs, bias = actnorm.logs.flatten(), actnorm.bias.flatten()
    scale, places = (-logs if inverse else logs).exp(), torch.arange(len(logs), device=logs.device)
    offset = -bias * scale if inverse else bias
    return [Map.of(ChannelMap(scale, offset, (-logs if inverse else logs).sum(), places))]


def _called(
    layer: Any, x: Tensor, x_mask: Tensor | None = None, reverse: bool = False, g: Tensor | None = None, **more: Any
) -> Call | None:
    """x (N, C, T), x_mask (N, 1, T), g (N, C_c, 1) -> z, log_det (N,), which is None if reverse."""
    if not isinstance(x, Tensor) or x.dim() != 3 or (g is not None and (g.dim() != 3 or g.shape[2] != 1)):
        return None
    mask = x.new_ones(x.shape[0], 1, x.shape[2]) if x_mask is None else x_mask.to(x.dtype)
    return Call(x, reverse, lambda z, log_det: (z, None if reverse else log_det), g, mask)


def _net_called(net: Any, x: Tensor, x_mask: Tensor | None = None, g: Tensor | None = None, **more: Any) -> Call | None:
    """x (N, H, T), x_mask (N, 1, T), g (N, C_c, 1) -> (N, H, T)."""
    call = _called(net, x, x_mask, False, g)
    if call is None or call.mask is None or (can_read(x) and bool(((x != 0) & (call.mask == 0)).any())):
        return None  # values behind the end of a sample would be cut off here, while their first layer sees them
    return call._replace(give=lambda out, _: out, mask=None if x_mask is None else call.mask)


def _pays(layer: Any, call: Call) -> bool:
    return call.x.shape[0] * call.x.shape[2] >= LEAST_POSITIONS


def _example(layer: Any, draw: Callable[..., Tensor]) -> list[tuple[str, Sequence[Any], dict[str, Any]]]:
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).unsqueeze(1)
    net = _wavenet(layer)
    if net is not None:
        channels = layer.in_layers[0].in_channels if net is layer else 2 * layer.start.in_channels
        cond = net._modules.get("cond_layer")
        given = {} if cond is None else {"g": draw(len(LENGTHS), cond.in_channels, 1)}
        for dropout in _dropouts(net) if layer.training else []:  # all is dropped, which shows where the dropout is
            dropout.p = 1.0
    elif _is_actnorm(layer):
        channels, given, layer.initialized = layer.logs.shape[1], {}, True
    else:
        channels, given = 4 * len(layer.weight), {}
        with torch.no_grad():  # far from singular, det > 0
            layer.weight.copy_(0.3 * layer.weight + 2.0 * torch.eye(len(layer.weight), dtype=torch.float64))
        inverse = torch.linalg.inv(layer.weight.detach())
        layer.weight_inv = None if layer.training else nn.Parameter(inverse, requires_grad=False)
    x = draw(len(LENGTHS), channels, max(LENGTHS)) * mask
    options: list[dict[str, Any]] = [given, *([{}] if given else [])]
    return [
        ("forward", (x, mask), more) for more in (options if net is layer else [*options, {**given, "reverse": True}])
    ]


LIBRARY = Library(
    "Glow-TTS",
    (
        Row(
            "WaveNet",
            _is_wavenet,
            {"forward": _net_called},
            lambda net, inverse: [],
            _example,
            _unfit,
            pays=_pays,
            run=lambda net, call, joined: (BlockNet(net)(call.x, call.cond, call.mask), call.x.new_zeros(len(call.x))),
        ),
        Row(
            "convolution in groups",
            _is_inv_conv,
            {"forward": _called},
            _conv_elements,
            _example,
            lambda conv: "its log-det is left out (no_jacobian)" if getattr(conv, "no_jacobian", False) else "",
            pays=_pays,
            inverts_in=(torch.float64, 1e-5),  # theirs is rounded to float32
        ),
        Row(
            "coupling around a WaveNet",
            _is_coupling,
            {"forward": _called},
            _coupling_elements,
            _example,
            _unfit,
            pays=_pays,
        ),
        Row(
            "actnorm of sequences",
            _is_actnorm,
            {"forward": _called},
            _actnorm_elements,
            _example,
            pays=_pays,
            waits=lambda actnorm: not actnorm.initialized,
            alone=lambda layer: AS_FAST,
        ),
    ),
)
