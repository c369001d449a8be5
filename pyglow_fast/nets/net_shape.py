"""The base class of the package's own coupling nets: checked inputs, memory that they take, shortcuts they allow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast._core.torch_private import has_global_hook
from pyglow_fast._core.tracing import is_altered
from pyglow_fast.reference import COUPLING_NETS


class NetShape(nn.Module):
    """A net of 3x3, 1x1 and 3x3 convolutions: it checks what it takes, says what it costs and how it may be run.

    ``halo`` and :meth:`bytes_per_position` are what chunked execution asks any net for: see traits.py.
    """

    halo = 2

    def __init__(
        self, in_channels: int, out_channels: int, hidden: int, cond_channels: int, dims: int, border: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("hidden", hidden)):
            check_count(name, value)
        check_count("cond_channels", cond_channels, least=0)
        self.in_channels, self.out_channels, self.hidden = in_channels, out_channels, hidden
        self.cond_channels, self.dims, self.border = cond_channels, dims, border

    @property
    def like(self) -> Tensor:
        """A tensor that has the dtype and device of the net."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        """Whether the net computes what its class says: it is no subclass and has no hooks."""
        own = type(self).__base__ is NetShape and not is_altered(self)
        return own and not has_global_hook()

    @property
    def writes_to_input(self) -> bool:
        """Whether the net may write to its inputs x1 and cond: a subclass, hooks or parametrizations may."""
        return not self.is_plain

    def bytes_per_position(self, element_size: int) -> int:
        """The most bytes of activations alive in forward and backward, per sample and position.

        These are the two hidden layers after their relu, the gradients of both, the output, its gradient and the input.
        By products of ours it is less. A hidden ActNorm costs nothing: it is folded into the weights.
        """
        # With a border term there is one input channel and one hidden unit more.
        hidden, inputs = self.hidden + self.border, self.in_channels + self.cond_channels + self.border
        return (4 * hidden + 5 * self.out_channels + 3 * inputs) * element_size

    def check_inputs(self, x: Tensor, cond: Tensor | None) -> None:
        """Refuse x or cond of the wrong shape, dtype or device."""
        check_input("x", x, self.in_channels, self.like)
        if x.dim() != self.dims + 2:
            # A convolution would take (N, C, L) for one image without a batch dimension.
            expect(False, "x", f"{self.dims} spatial dimensions", f"shape {tuple(x.shape)}")
        if not self.cond_channels:
            expect(cond is None, "cond", "None, since the net has cond_channels=0", cond.__class__.__name__)
            return
        expect(isinstance(cond, Tensor), "cond", f"a tensor with {self.cond_channels} channels", type(cond).__name__)
        assert cond is not None  # for the type checker: refused above
        expected = (x.shape[0], self.cond_channels, *x.shape[2:])
        expect(tuple(cond.shape) == expected, "cond", f"shape {expected}", f"shape {tuple(cond.shape)}")

    def with_condition(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """Check the inputs and join them along the channels."""
        self.check_inputs(x, cond)
        return x if cond is None else torch.cat([x, cond.to(x.dtype)], dim=1)

    def run_on(self, x: Tensor, cond: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
        """Check x and cond, and run the net by w1, b1, w2, b2, w3, b3 and maybe log_gain, a border term folded in."""
        self.check_inputs(x, cond)
        gain, beside = weights[6] if len(weights) > 6 else None, None if cond is None else cond.to(x.dtype)
        if self.border:  # which reads a channel of ones
            ones = x.new_ones(x.shape[0], 1, *x.shape[2:])
            beside = ones if beside is None else torch.cat([beside, ones], dim=1)
        return functional.net_chain(x, weights[:6:2], weights[1:6:2], COUPLING_NETS[self.dims], gain, beside)
