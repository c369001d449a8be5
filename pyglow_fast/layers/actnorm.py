"""Activation normalisation with data-dependent initialisation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyglow_fast import functional, reference
from pyglow_fast._core.captures import refuse_first_use
from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast._core.tracing import has_transforms, is_of_several
from pyglow_fast.layers._base import FlowLayer


def _n_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(row: Tensor) -> Tensor:
    """Gather the rows of all ranks of the default group, (R, n), in the order of the ranks; (1, n) without a group."""
    if _n_ranks() == 1:
        return row.unsqueeze(0)
    rows = [torch.empty_like(row) for _ in range(_n_ranks())]
    dist.all_gather(rows, row.contiguous())
    return torch.stack(rows)


@contextlib.contextmanager
def refused_alike(device: torch.device) -> Iterator[None]:
    """A context for checks of a batch to initialise an actnorm from: what one rank refuses, all refuse.

    Args:
        device: where the parameters are.

    Raises:
        ValueError: the rank's own refusal; or where another rank refused its batch, one that names that rank.
    """
    if _n_ranks() == 1:
        yield
        return
    refusal: ValueError | None = None
    try:
        yield
    except ValueError as error:
        refusal = error
    refused = gather(torch.tensor([float(refusal is not None)], device=device)).flatten()
    if refusal is not None:
        raise refusal
    ranks = refused.nonzero().flatten().tolist()
    expect(not ranks, "x", "a batch that every rank can initialise from", f"one that was refused on ranks {ranks}")


class ActNorm(FlowLayer):
    """z = (x + bias) exp(log_scale) per channel; log_det = P sum log_scale.

    The first training forward sets bias = -mean and log_scale = -log(std + eps), with the biased moments over samples
    and positions of its input, so that z has mean 0 and variance 1 per channel. One sample is enough. A constant
    channel is centred and its scale stays 1: there is no spread to normalise.

    Where torch.distributed is initialised, the moments are those of the batches of all ranks of its default group, so
    that every rank sets the same values: all ranks must then make that first forward (or call of ``initialize``). A
    model to be sharded (FSDP) is initialised before: what is written into gathered parameters is lost.

    Args:
        channels: C.
        eps: added to the standard deviation.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: wrong shape, dtype or device; the initialising batch is empty or not finite (nothing is changed
            then), here or on another rank.

    Reference: Kingma & Dhariwal 2018, section 3.1.

    Examples:
        >>> import torch
        >>> from pyglow_fast import ActNorm
        >>> layer, x = ActNorm(channels=2), 3 * torch.randn(64, 2, 8, 8) + 5
        >>> z, log_det = layer(x)  # the first forward in training sets bias and log_scale from x
        >>> print(f"mean {x.mean():.0f} -> {z.mean().abs():.0f}, deviation {x.std():.0f} -> {z.std():.0f}")
        mean 5 -> 0, deviation 3 -> 1
        >>> torch.allclose(log_det, 8 * 8 * layer.log_scale.sum())  # of 8 x 8 positions, for each sample
        True
    """

    initialized: Tensor
    _shown = ("channels",)

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        check_count("channels", channels)
        expect(eps > 0, "eps", "a positive number", eps)
        self.channels, self.eps = channels, eps
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # The buffer travels with the weights; the hot path reads this host copy, since the buffer may be on a GPU.
        self._known_initialized = False

    @property
    def is_initialized(self) -> bool:
        """Whether the parameters were set from data, here or where the weights come from.

        While they seem not to be, the buffer is asked: another rank may have broadcast it.
        """
        if not self._known_initialized:
            self._ask_buffer()
        return self._known_initialized

    def _ask_buffer(self) -> None:
        refuse_first_use(self.initialized.device, "actnorms that have seen data")
        expected = "one that has seen data itself, or evaluation mode, where torch.func.vmap lends it several's buffers"
        expect(not is_of_several(self.initialized), "actnorm", expected, "a fresh one in training")
        self._known_initialized = not self.initialized.is_meta and bool(self.initialized)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data x to z; a fresh layer in training sets its parameters from x first."""
        if self.training and not self.is_initialized:
            self.initialize_from(x)
        else:
            check_input("x", x, self.channels, self.bias)
        return functional.actnorm(x, self.log_scale, self.bias)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x = z exp(-log_scale) - bias."""
        check_input("z", z, self.channels, self.bias)
        return functional.actnorm_inverse(z, self.log_scale, self.bias)

    def initialize(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise from x if that has not happened yet, and return z."""
        if not self.is_initialized:
            self.initialize_from(x)
        return super().initialize(x, cond)

    @torch.no_grad()
    def initialize_from(self, x: Tensor) -> None:
        """Set bias and log_scale from the moments of x (of all ranks' x), whether or not it happened before."""
        with refused_alike(self.bias.device):
            expected = (
                "one that has seen data before torch.func or forward-mode AD (a training forward, or initialize(x))"
            )
            expect(not has_transforms(), "actnorm", expected, "a fresh one")
            sharded = hasattr(self.bias, "device_mesh")
            expect(not sharded, "parameters", "an actnorm that is initialised before it is sharded", "a sharded one")
            check_input("x", x, self.channels, self.bias)
            expect(x.numel() > 0, "x", "a batch that is not empty to initialise from", tuple(x.shape))
            mean, squared_deviations = reference.channel_moments(x)
            finite = bool((squared_deviations.isfinite() & mean.isfinite()).all())
            expect(finite, "x", "finite values to initialise actnorm from", "NaN or inf")
        count = mean.new_full((1,), x.numel() // self.channels)
        rows = gather(torch.cat([count, mean, squared_deviations]))
        counts, means, m2s = rows.split([1, self.channels, self.channels], dim=1)
        mean, squared_deviations = reference.merge_moments(counts[:, 0], means, m2s)
        std = (squared_deviations / counts.sum()).sqrt()
        # At the level of rounding too a channel is constant: to divide by that would blow the next batch up by 1/eps.
        constant = std <= (torch.finfo(x.dtype).eps * mean.abs()).clamp_min(self.eps)
        self.bias.copy_(-mean)
        self.log_scale.copy_(torch.where(constant, torch.zeros_like(std), -(std + self.eps).log()))
        self.initialized.fill_(True)
        self._known_initialized = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ask_buffer()  # now: in a compiled forward it would break the graph
