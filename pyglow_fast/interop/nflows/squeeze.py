"""Computes nflows' squeeze, invertible for any factor."""

from __future__ import annotations

from nflows import transforms
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._errors import expect


class SqueezeTransform(transforms.SqueezeTransform):
    """outputs[:, c f^2 + f dh + dw, h, w] = inputs[:, c, f h + dh, f w + dw] with f = factor; logabsdet = 0.

    In place of ``nflows.transforms.SqueezeTransform``. What differs: the inverse asks for channels that divide by
    factor^2, where nflows asks for a multiple of 4 whatever the factor (and so refuses 9 channels for factor 3).

    Args:
        factor: f.

    Shapes: inputs (N, C, H, W) -> outputs (N, C f^2, H / f, W / f), any dtype; logabsdet (N,), zero.

    Raises:
        ValueError: ``factor`` is not an int above 1; inputs not 4D, or whose size does not divide.

    Reference: Dinh et al. 2017, section 3.6.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.nflows import SqueezeTransform
        >>> squeeze = SqueezeTransform(factor=3)
        >>> outputs, logabsdet = squeeze(torch.randn(2, 1, 6, 6))
        >>> outputs.shape, squeeze.inverse(outputs)[0].shape
        (torch.Size([2, 9, 2, 2]), torch.Size([2, 1, 6, 6]))
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map inputs to outputs, and 0 for logabsdet."""
        self._check(inputs)
        return functional.squeeze(inputs, self.factor), inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map outputs to inputs, and 0 for logabsdet."""
        self._check(inputs)
        return functional.unsqueeze(inputs, self.factor), inputs.new_zeros(inputs.shape[0])

    def _check(self, inputs: Tensor) -> None:
        expect(inputs.dim() == 4, "inputs", "4 dimensions", f"shape {tuple(inputs.shape)}")
