"""The compiled kernels as torch ops, ``torch.ops.pyglow_fast.*``: schema, implementation and fake (shape-only) kernel each.

The ops are the thin layer below autograd: they check their arguments (in csrc/bindings/checks.h), allocate outputs and run
one kernel. Equations and shapes are in :mod:`pyglow_fast.reference` and csrc/core.h. They have no derivative of their own;
:mod:`pyglow_fast.autograd` combines them into differentiable functions.

torch.library define and impl are used rather than custom_op, which costs about 15 us a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyglow_fast import _backend
from pyglow_fast.reference import CouplingSpec

SCALE_MAP_CODES = {"none": 0, "sigmoid": 1, "sigmoid_eps": 2, "exp": 3, "tanh": 4, "atan": 5}  # csrc/math/kinds.h
ORDER_CODES = {"shift_scale": 0, "scale_shift": 1}

_KIND = "int map, int order, bool inverse, float bias, float eps, float clamp"
_library = torch.library.Library("pyglow_fast", "DEF")


def _define(schema: str, fake: Callable[..., Any]) -> None:
    """Declare an op whose implementation on every device is the extension's function of the same name."""
    name = schema.split("(")[0]
    _library.define(schema)

    def run(*args: Any) -> Any:
        return getattr(_backend.require(), name)(*args)

    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"pyglow_fast::{name}", fake, lib=_library)


def _fake_channel_mix(x: Tensor, matrix: Tensor, offset: Tensor, subtract_first: bool) -> Tensor:
    return torch.empty_like(x)


def _fake_channel_mix_backward(
    x: Tensor, grad_u: Tensor, matrix: Tensor, center: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(matrix.shape), x.new_empty(x.shape[1])


def _fake_coupling(x: Tensor, net_out: Tensor, *kind: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0])


def _fake_coupling_backward(
    out: Tensor, net_out: Tensor, grad_out: Tensor, grad_log_det: Tensor, *kind_and_want: Any
) -> tuple[Tensor, Tensor, Tensor]:
    recovered = torch.empty_like(out) if kind_and_want[-1] else out.new_empty(0)
    return torch.empty_like(out), torch.empty_like(net_out), recovered


_define("channel_mix(Tensor x, Tensor matrix, Tensor offset, bool subtract_first) -> Tensor", _fake_channel_mix)
_define(
    "channel_mix_backward(Tensor x, Tensor grad_u, Tensor matrix, Tensor? center) -> (Tensor, Tensor, Tensor)",
    _fake_channel_mix_backward,
)
_define(f"coupling(Tensor x, Tensor net_out, {_KIND}) -> (Tensor, Tensor)", _fake_coupling)
_define(
    "coupling_backward(Tensor out, Tensor net_out, Tensor grad_out, Tensor grad_log_det, "
    f"{_KIND}, bool want_input) -> (Tensor, Tensor, Tensor)",
    _fake_coupling_backward,
)

# The callables: torch.ops.pyglow_fast.<name>, resolved once.
channel_mix = torch.ops.pyglow_fast.channel_mix.default
channel_mix_backward = torch.ops.pyglow_fast.channel_mix_backward.default
coupling = torch.ops.pyglow_fast.coupling.default
coupling_backward = torch.ops.pyglow_fast.coupling_backward.default


def run_on(x: Tensor) -> bool:
    """Whether the compiled kernels serve the device and dtype of x."""
    if x.dtype not in (torch.float32, torch.float64) or _backend.extension() is None:
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and bool(_backend.build_info()["cuda"]))


def has_kernel(spec: CouplingSpec) -> bool:
    """Whether the coupling is one that the kernels know; a scale map given as a callable is not."""
    return isinstance(spec.scale_map, str)


def kind_arguments(spec: CouplingSpec, inverse: bool) -> tuple[int, int, bool, float, float, float]:
    """The trailing arguments of the coupling ops."""
    name = str(spec.scale_map)
    if spec.kind == "additive":
        name = "none"
    elif name == "sigmoid" and spec.eps > 0:
        name = "sigmoid_eps"
    return SCALE_MAP_CODES[name], ORDER_CODES[spec.order], inverse, spec.bias, spec.eps, spec.clamp
