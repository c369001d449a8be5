"""Corrects FrEIA's ActNorm: its initialisation knows of directions, constant channels and several processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import FrEIA.modules as Fm
import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.layers.actnorm import has_no_spread, joint_moments


def forgets_closure(layer: nn.Module) -> None:
    """Take away FrEIA's hook on loading: it tells the first instance, not a copy, and cannot be pickled."""
    hooks = layer._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(getattr(hook, "hook", hook), "__qualname__", "").endswith("on_load_state_dict"):
            del hooks[key]


def tells_itself(layer: nn.Module) -> None:
    """Give FrEIA's layer a hook that does what its own does, to the layer that has it."""
    layer._register_load_state_dict_pre_hook(_on_load_state_dict, with_module=True)


def _on_load_state_dict(layer: Any, *args: Any) -> None:
    layer.init_on_next_batch = False


class ActNorm(Fm.ActNorm):
    """z = x exp(scale) + bias per channel; log_det = P sum scale, (N,); its negative with ``rev=True``.

    The first forward batch sets scale = -log(std) with the unbiased std over samples and positions, and
    bias = -mean exp(scale), so that z has mean 0 and variance 1. Arguments, parameters and calls are those of
    ``FrEIA.modules.ActNorm``; a condition ``c`` is accepted and not used.

    FrEIA's layer has faults that this one has not:

    - A pass with ``rev=True`` does not initialise: FrEIA sets the parameters from latent values as if they were data.
      Parameters that were trained before the first forward batch, going backwards only, are kept.
    - A channel without spread (constant, or a single value) is centred and keeps its scale; FrEIA's becomes inf or NaN.
    - A batch that is empty or not finite is refused with a ValueError before anything is set.
    - Where torch.distributed is initialised, the moments are those of the batches of all ranks, so that all ranks set
      the same values; each of FrEIA's keeps its own.
    - ``init_data`` may be a tensor; FrEIA asks for its truth value, which a tensor does not have.
    - A state dict that is loaded ends the wait for data only if it has this layer's values; copies and pickles work.
    - The log-det counts the positions of x itself, not those of ``dims_in``.

    Shapes: x ((N, C, *spatial),), any floating dtype.

    Raises:
        AssertionError: the first batch has another shape than dims_in, as in FrEIA.
        ValueError: see above, on this or another rank; another number of channels or dimensions later on.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.freia import ActNorm
        >>> norm = ActNorm([(3, 4, 4)])
        >>> (z,), log_det = norm([5 + 2 * torch.randn(8, 3, 4, 4)])  # the first forward batch initialises
        >>> z.mean().abs() < 1e-5, f"{z.std():.2f}"
        (tensor(True), '1.00')
    """

    _went_back = False  # a pass with rev=True has come before the first forward batch

    def __init__(self, dims_in: Sequence[Sequence[int]], dims_c: Any = None, init_data: Tensor | None = None) -> None:
        super().__init__(dims_in, dims_c)
        forgets_closure(self)
        if init_data is not None:
            self._initialize_with_data(init_data)

    @torch.no_grad()
    def _initialize_with_data(self, data: Tensor) -> None:
        def check() -> None:
            same = tuple(data.shape[1:]) == tuple(self.dims_in)
            assert same, "Can't initialize ActNorm layer, provided data don't match input dimensions."

        count, mean, squared_deviations = joint_moments(data, self.bias.device, check)
        std = (squared_deviations / (count - 1.0).clamp_min(1.0)).sqrt()
        constant = has_no_spread(std, mean, data.dtype, 0.0)
        scale = torch.where(constant, torch.zeros_like(std), -std.log())
        self.scale.copy_(scale.view_as(self.scale))
        self.bias.copy_((-mean * scale.exp()).view_as(self.bias))
        self.init_on_next_batch = False

    def _await_data(self, x: Tensor, rev: bool) -> None:
        """Let a layer that has seen no data initialise itself from a forward batch, unless it was trained backwards."""
        if rev:
            self._went_back = True
        elif self._went_back and bool((self.scale != 0).any() | (self.bias != 0).any()):
            self.init_on_next_batch = False
        else:
            self._initialize_with_data(x)

    def forward(
        self, x: Sequence[Tensor], rev: bool = False, jac: bool = True, c: Any = None
    ) -> tuple[list[Tensor], Tensor]:
        """Map x to z, or z to x with ``rev``; the first forward batch initialises."""
        state = x[0]
        if self.init_on_next_batch:
            self._await_data(state, rev)
        fits = state.dim() == self.scale.dim() and state.shape[1] == self.scale.shape[1]
        shape = f"(N, {self.scale.shape[1]}) and {self.scale.dim() - 2} spatial sizes"
        expect(fits, "x", f"shape {shape}", tuple(state.shape))
        log_scale = self.scale.flatten()
        bias = self.bias.flatten() * (-log_scale).exp()  # ours is added before scaling
        out, log_det = (functional.actnorm_inverse if rev else functional.actnorm)(state, log_scale, bias)
        return [out], log_det.contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "scale" in state_dict and prefix + "bias" in state_dict:
            self.init_on_next_batch = False
