"""The channel mixing of pyglow::cuda by a permutation, run by the emulator."""

from __future__ import annotations

import ctypes
import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast.reference import CouplingSpec
from support.emulator import _image, _Net, _net, _transformed, _variant, _view, allocate
from support.fused_emulator import FusedEmulator, StepGrads

SPEC = CouplingSpec()


class Gather(NamedTuple):
    """scale_i (y_j - center_j) + offset_i, j = index_i; None: nothing is added, or taken off."""

    scale: Tensor
    index: Tensor
    offset: Tensor | None = None
    center: Tensor | None = None


class GatherGrads(NamedTuple):
    """The gradients that gather_backward gives."""

    grad_in: Tensor
    grad_net_out: Tensor | None
    grad_scale: Tensor
    grad_offset: Tensor


class _Map(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("scale", "offset", "center", "index"))


def _map(gather: Gather) -> _Map:
    ordered = (gather.scale, gather.offset, gather.center, gather.index)
    return _Map(*(None if value is None else value.data_ptr() for value in ordered))


def _net_or_none(x: Tensor | None) -> _Net:
    return _Net(_view(None), 0) if x is None else _net(x)


class GatherEmulator(FusedEmulator):
    """All tensors (N, C, P), or images that are squeezed; without a net's output nothing is coupled."""

    def gather(
        self,
        x: Tensor,
        gather: Gather,
        net_out: Tensor | None = None,
        spec: CouplingSpec = SPEC,
        inverse: bool = False,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The gather of couple(x), uncouple(x) or x, and log_det."""
        n, c = x.shape[0], gather.scale.shape[0]
        out = allocate(self.out_layout, (n, c, math.prod(x.shape[1:]) // max(c, 1)), x.dtype) if out is None else out
        log_det = None if net_out is None else x.new_full((n,), torch.nan)
        transformed = 0 if net_out is None else _transformed(net_out, spec)
        inputs = (_variant(spec, inverse), _image(x), _net_or_none(net_out), _map(gather))
        pointer = ctypes.c_void_p(None) if log_det is None else log_det
        self._call("gather", x if x.dim() == 3 else out, transformed, *inputs, _image(out), pointer)
        return out, log_det

    def gather_backward(
        self,
        x: Tensor,
        gather: Gather,
        grad_out: Tensor,
        added: Tensor | None = None,
        net_out: Tensor | None = None,
        grad_log_det: Tensor | None = None,
        spec: CouplingSpec = SPEC,
        grad_in: Tensor | None = None,
    ) -> GatherGrads:
        """The gradients from the input of :meth:`gather`; ``added`` belongs to grad_out."""
        grad_in = self.output_like(x) if grad_in is None else grad_in
        grad_net_out = None if net_out is None else self.net_grad_like(net_out)
        sums = [torch.full_like(gather.scale, torch.nan) for _ in range(2)]
        transformed = 0 if net_out is None else _transformed(net_out, spec)
        parts = (_view(grad_out), _view(added), ctypes.c_int64(0 if added is None else added.shape[1]))
        weights = ctypes.c_void_p(None) if grad_log_det is None else grad_log_det
        inputs = (_variant(spec, False), _image(x), _net_or_none(net_out), *parts, weights, _map(gather))
        outputs = (_image(grad_in), _net_or_none(grad_net_out), *sums)
        self._call("gather_backward", grad_out, transformed, *inputs, *outputs)
        return GatherGrads(grad_in, grad_net_out, *sums)

    def step_gather_backward(
        self, y: Tensor, gather: Gather, net_out: Tensor, grad_y: Tensor, grad_log_det: Tensor, spec: CouplingSpec
    ) -> StepGrads:
        """The gather of uncouple(y), the gradients of uncouple(y) and of the net's output."""
        results = StepGrads(self.output_like(y), self.output_like(y), self.net_grad_like(net_out))
        inputs = (_variant(spec, False), _view(y), _net(net_out), _view(grad_y), grad_log_det, _map(gather))
        outputs = (_view(results.x), _view(results.grad_u), _net(results.grad_net_out))
        self._call("step_gather_backward", y, _transformed(net_out, spec), *inputs, *outputs)
        return results
