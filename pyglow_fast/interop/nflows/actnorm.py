"""Corrects nflows' ActNorm: an initialisation that is finite, equal on all ranks, and refused before any change."""

from __future__ import annotations

import torch
from nflows import transforms
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.interop.nflows._state import is_initialized, ordinary
from pyglow_fast.layers.actnorm import has_no_spread, joint_moments


class ActNorm(transforms.ActNorm):
    """outputs = exp(log_scale) inputs + shift per channel; logabsdet = P sum log_scale, P the number of positions.

    In place of ``nflows.transforms.ActNorm``: the same argument, parameters, buffer and results. The first training
    forward (never the inverse, never in evaluation) sets log_scale = -log(std) and shift = -mean / std from its batch,
    with the unbiased std as there. What differs:

    - A channel without spread (constant up to rounding, or of one value) is centred and its scale stays 1; nflows
      divides by its std of zero, and everything is inf or NaN from then on.
    - Under torch.distributed the moments are those of the batches of all ranks, so that all set the same values; in
      nflows each rank keeps its own. All ranks must make that forward.
    - Inputs whose channels are not ``features``, and a first batch that is empty or not finite, are refused and change
      nothing. nflows spreads one channel over all, or takes on the number of channels of the first batch.
    - ``initialized`` stays on its device, and once it is true a GPU is not stopped to read it.

    Args:
        features: C.

    Shapes: inputs (N, C) or (N, C, H, W) of the parameters' dtype; logabsdet (N,), nats.

    Raises:
        TypeError: ``features`` is not a positive int.
        ValueError: inputs of another shape; a first batch that is empty or not finite, here or on another rank.

    Reference: Kingma & Dhariwal 2018, section 3.1.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.nflows import ActNorm
        >>> norm = ActNorm(features=3)
        >>> batch = torch.randn(8, 3, 4, 4)
        >>> batch[:, 2] = 7.0  # a channel without spread
        >>> outputs, logabsdet = norm(batch)
        >>> outputs.isfinite().all(), norm.log_scale[2] == 0
        (tensor(True), tensor(True))
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map inputs to outputs and logabsdet; the first training forward of a fresh layer initialises it."""
        self._check(inputs)
        if not ordinary(inputs, self.log_scale, self.shift):
            found: tuple[Tensor, Tensor] = super().forward(inputs, context)
            return found
        if self.training and not is_initialized(self):
            self._initialize(inputs)
        scale, shift = self._broadcastable_scale_shift(inputs)
        return torch.addcmul(shift, inputs, scale), self._logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map outputs to inputs and -logabsdet."""
        self._check(inputs)
        found: tuple[Tensor, Tensor] = super().inverse(inputs, context)
        return found

    def _check(self, inputs: Tensor) -> None:
        expect(inputs.dim() in (2, 4), "inputs", "a 2D or a 4D tensor", f"shape {tuple(inputs.shape)}")
        channels = self.log_scale.shape[0]
        expect(inputs.shape[1] == channels, "inputs", f"{channels} features", f"shape {tuple(inputs.shape)}")

    def _logabsdet(self, inputs: Tensor) -> Tensor:
        # Not expanded: callers add to it in place.
        return functional.per_sample(inputs, self.log_scale.sum()).contiguous()

    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        """Set log_scale and shift from the moments of the inputs of all ranks."""
        count, mean, squared_deviations = joint_moments(inputs, self.log_scale.device, lambda: None, "inputs")
        std = (squared_deviations / (count - 1.0).clamp_min(1.0)).sqrt()
        # Below the smallest normal number exp(log_scale) would overflow.
        constant = has_no_spread(std, mean, inputs.dtype, torch.finfo(inputs.dtype).tiny)
        std = torch.where(constant, torch.ones_like(std), std)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialized.fill_(True)
