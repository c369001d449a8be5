"""The passes of pyglow::cuda that join a coupling with a channel mixing, run by the emulator."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast.reference import CouplingSpec
from support.emulator import Emulator, _net, _transformed, _variant, _view


class CouplingMixGrads(NamedTuple):
    """The gradients that coupling_mix_backward gives."""

    grad_in: Tensor
    grad_net_out: Tensor
    grad_matrix: Tensor
    grad_offset: Tensor


class StepGrads(NamedTuple):
    """The gradients that step_backward gives."""

    x: Tensor
    grad_u: Tensor
    grad_net_out: Tensor


class FusedEmulator(Emulator):
    """All tensors (N, C, P); the net's output in the dtype of the state or in bfloat16 or float16."""

    def coupling_mix(
        self, x: Tensor, net_out: Tensor, matrix: Tensor, offset: Tensor, spec: CouplingSpec, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """M couple(x) + c, or M (uncouple(x) - c), and the coupling's log_det."""
        out, log_det = self.output_like(x), x.new_full((x.shape[0],), torch.nan)
        inputs = (_variant(spec, inverse), _view(x), _net(net_out), matrix, offset)
        self._call("coupling_mix", x, _transformed(net_out, spec), *inputs, _view(out), log_det)
        return out, log_det

    def coupling_mix_backward(
        self,
        x: Tensor,
        net_out: Tensor,
        grad_out: Tensor,
        grad_log_det: Tensor,
        matrix: Tensor,
        spec: CouplingSpec,
        added: Tensor | None = None,
    ) -> CouplingMixGrads:
        """The gradients from the input of :meth:`coupling_mix`; ``added`` belongs to grad_out."""
        grads = CouplingMixGrads(
            self.output_like(x),
            self.net_grad_like(net_out),
            torch.full_like(matrix, torch.nan),
            matrix.new_full((x.shape[1],), torch.nan),
        )
        parts = (_view(grad_out), _view(added), ctypes.c_int64(0 if added is None else added.shape[1]))
        inputs = (_variant(spec, False), _view(x), _net(net_out), *parts, grad_log_det, matrix)
        outputs = (_view(grads.grad_in), _net(grads.grad_net_out), grads.grad_matrix, grads.grad_offset)
        self._call("coupling_mix_backward", x, _transformed(net_out, spec), *inputs, *outputs)
        return grads

    def step_backward(
        self,
        y: Tensor,
        net_out: Tensor,
        grad_y: Tensor,
        grad_log_det: Tensor,
        inverse_matrix: Tensor,
        offset: Tensor,
        spec: CouplingSpec,
    ) -> StepGrads:
        """x = A (uncouple(y) - c), the gradients of uncouple(y) and of the net's output."""
        results = StepGrads(self.output_like(y), self.output_like(y), self.net_grad_like(net_out))
        inputs = (_variant(spec, False), _view(y), _net(net_out), _view(grad_y), grad_log_det, inverse_matrix, offset)
        outputs = (_view(results.x), _view(results.grad_u), _net(results.grad_net_out))
        self._call("step_backward", y, _transformed(net_out, spec), *inputs, *outputs)
        return results
