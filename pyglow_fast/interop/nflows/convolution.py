"""Computes nflows' invertible 1x1 convolution as one product: permutation, L and U are one matrix."""

from __future__ import annotations

import weakref

import torch
from nflows import transforms
from nflows.transforms.permutations import Permutation
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._captures import is_capturing
from pyglow_fast.coupling_nets.traits import has_hooks
from pyglow_fast.interop.nflows._state import Derived, as_it_comes, ordinary
from pyglow_fast.reference import full_product

_MATRICES = ("_lu_forward_inverse", "forward_no_cache", "inverse_no_cache", "_create_lower_upper")
_unchanged: Derived[None] = Derived()
_captured: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # convolutions that a CUDA graph has


def channel_order(convolution: transforms.OneByOneConvolution) -> Tensor | None:
    """Find where channel i of the inputs goes, (C,) int64; None if the permutation is not one of channels.

    L U applied to the permuted channels is (L U)[:, order] applied to the channels.
    """
    permutation = convolution.permutation
    known = isinstance(permutation, Permutation) and as_it_comes(permutation, "forward", "inverse", "_permute")
    if not known or permutation._dim != 1 or has_hooks(permutation):
        return None
    order: Tensor = permutation._inverse_permutation
    return order


class OneByOneConvolution(transforms.OneByOneConvolution):
    """outputs = L U inputs[permutation] + bias at every position; logabsdet = P sum log diag(U), P = H W.

    In place of ``nflows.transforms.OneByOneConvolution``: the same arguments, parameters, buffer, draws at construction
    and results. ``using_cache``: in evaluation L U, its inverse and log-det are computed once and kept in ``cache``
    until ``train()``. What differs from nflows:

    - The cache notices that parameters were loaded, moved, converted or changed in place (on a GPU not through
      ``.data``). nflows goes on with the old matrix, or fails on another device.
    - A CUDA graph computes the matrices of the parameters as each replay finds them. From then on nothing is cached, as
      a graph that trains changes parameters without a trace.
    - Where a gradient is to flow to the parameters, cached values are not used. In nflows the second backward fails or,
      if the cache was filled without gradients, the parameters get none, silently; and a layer whose cache was filled
      with gradients cannot be copied.
    - The inverse is formed in float64 and rounded once; the cached one works in float64 and on a GPU.
    - Under autocast the result stays in the dtype of the parameters.

    Args:
        num_channels: C.
        using_cache: whether to keep the matrices in evaluation; also ``use_cache(mode)``.
        identity_init: L U = 1 at the start; else the triangles are uniform within 1 / sqrt(C).

    Shapes: inputs (N, C, H, W) of the parameters' dtype; logabsdet (N,), nats.

    Raises:
        TypeError: ``num_channels`` is not a positive int.
        ValueError: inputs not 4D or of other channels.

    Reference: Kingma & Dhariwal 2018, section 3.2.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.nflows import OneByOneConvolution
        >>> convolution = OneByOneConvolution(4, identity_init=False)
        >>> inputs = torch.randn(2, 4, 3, 3)
        >>> outputs, logabsdet = convolution(inputs)
        >>> restored, minus = convolution.inverse(outputs)
        >>> torch.allclose(restored, inputs, atol=1e-5), torch.allclose(logabsdet + minus, torch.zeros(2), atol=1e-5)
        (True, True)
    """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map inputs to outputs and logabsdet."""
        order = self._order_for(inputs)
        if order is None:
            found: tuple[Tensor, Tensor] = super().forward(inputs, context)
            return found
        if self._caches():
            self._check_forward_cache()
            weight, logabsdet = self.cache.weight, self.cache.logabsdet
            self._detach_cache()
        else:
            weight, logabsdet = self.weight_and_logabsdet()
        outputs = functional.channel_mix(inputs, weight.index_select(1, order), self.bias)
        return outputs, functional.per_sample(inputs, logabsdet).contiguous()

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map outputs to inputs and -logabsdet."""
        order = self._order_for(inputs)
        if order is None:
            found: tuple[Tensor, Tensor] = super().inverse(inputs, context)
            return found
        if self._caches():
            self._check_inverse_cache()
            inverse, logabsdet = self.cache.inverse, self.cache.logabsdet
            self._detach_cache()
        else:
            inverse, logabsdet = self.weight_inverse_and_logabsdet()
        outputs = functional.channel_unmix(inputs, inverse.index_select(0, order), self.bias)
        return outputs, functional.per_sample(inputs, -logabsdet).contiguous()

    def _order_for(self, inputs: Tensor) -> Tensor | None:
        """The order of channels, if our products take these inputs; else nflows' own code runs, or refuses them."""
        takes = inputs.dim() == 4 and inputs.shape[1] == self.features and ordinary(inputs, *self._triangles())
        return channel_order(self) if takes and as_it_comes(self, *_MATRICES) else None

    def _triangles(self) -> list[Tensor]:
        return [self.lower_entries, self.upper_entries, self.unconstrained_upper_diag]

    def _caches(self) -> bool:
        keeps = self.using_cache and not self.training and self not in _captured
        return keeps and not is_capturing(self.lower_entries.device)

    def _create_lower_upper(self) -> tuple[Tensor, Tensor]:
        """L and U, (C, C), by indices that are made where the parameters are; nflows copies its own there each time."""
        size, like = (self.features, self.features), self.lower_entries
        if is_capturing(like.device):
            _captured.add(self)
        below = torch.tril_indices(*size, -1, device=like.device).unbind()
        above = torch.triu_indices(*size, 1, device=like.device).unbind()
        ones = torch.eye(self.features, dtype=like.dtype, device=like.device)
        diagonal = torch.where(ones > 0.0, self.upper_diag, 0.0)  # torch.diag has no ONNX operator
        return ones.index_put(below, like), diagonal.index_put(above, self.upper_entries)

    def weight(self) -> Tensor:
        """Compute the matrix L U, (C, C)."""
        return full_product(*self._create_lower_upper())

    def weight_inverse(self) -> Tensor:
        """Compute the inverse matrix (L U)^-1, (C, C)."""
        return functional.invert_matrix(self.weight())

    def _check_forward_cache(self) -> None:
        self._drop_old_cache()
        super()._check_forward_cache()

    def _check_inverse_cache(self) -> None:
        self._drop_old_cache()
        super()._check_inverse_cache()

    def _drop_old_cache(self) -> None:
        """Empty the cache where it is not of the parameters as they are, or must carry a gradient to them."""
        triangles = self._triangles()
        records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in triangles)
        if records or not ordinary(*triangles):
            self.cache.invalidate()
        else:
            _unchanged.get(self, triangles, self.cache.invalidate)

    def _detach_cache(self) -> None:
        """Keep no graph: it could be gone back through once only, and not be copied."""
        for name, value in vars(self.cache).items():
            if value is not None and value.requires_grad:
                setattr(self.cache, name, value.detach())
