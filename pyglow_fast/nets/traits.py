"""Traits that a coupling net states, or that its submodules show: how it may be cut and what it costs.

A net is any ``nn.Module`` called as ``net(x1)`` or ``net(x1, cond)``: (N, C1, *spatial) and (N, Cc, *spatial) to
(N, C_out, *spatial), each sample by itself. It may state

- ``halo``: int, how many positions to each side, in every spatial dimension, an output position depends on: the sum of
  dilation (kernel_size - 1) / 2 over its convolutions. A net that states none is never cut inside a sample.
- ``deterministic``: True if it gives the same output when run again, whatever the state of random generators. Nets of
  torch's and of our own modules alone are known to be, but for dropout and the like.
- ``writes_to_input``: False if it leaves what it is called with as it is. Nets are called with copies of their inputs
  else.
- ``bytes_per_position(element_size) -> int``: the most bytes of activations, per sample and position, that are alive at
  one time during its forward and backward. For a net without it, see :func:`bytes_per_position`.
"""

from __future__ import annotations

from torch import nn

from pyglow_fast._core.errors import expect
from pyglow_fast._core.torch_private import AnyBatchNorm, AnyCircularPad, AnyConv, AnyDropout, AnyInstanceNorm
from pyglow_fast._core.tracing import is_altered

# Of each Conv or Linear of a net that does not state its cost: its output, the activation's, and half of the gradients
# of both (the other half is not there yet or no longer, as the backward passes through).
TENSORS_PER_LAYER = 3


def halo_of(net: nn.Module) -> int | None:
    """Read the halo that a net states, an int of at least 0; None where it states none."""
    halo: int | None = getattr(net, "halo", None)
    if halo is None:
        return None
    stated = isinstance(halo, int) and not isinstance(halo, bool) and halo >= 0
    expect(stated, "net.halo", "an int, at least 0, or None", repr(halo))
    return halo


def bytes_per_position(net: nn.Module, in_channels: int, element_size: int) -> int:
    """Count the bytes of activations per sample and position at the peak of forward and backward.

    The net states them, or they are estimated: (TENSORS_PER_LAYER sum of out_channels + 2 in_channels) element_size,
    the sum over the distinct Conv and Linear submodules, in_channels those of x1 and the condition. The estimate is
    right within a factor of two for chains of convolutions that keep the resolution, and too low for attention or for
    layers called many times: such a net states its own.
    """
    stated = getattr(net, "bytes_per_position", None)
    if stated is not None:
        size = stated(element_size)
        valid = isinstance(size, int) and not isinstance(size, bool) and size > 0
        expect(valid, "net.bytes_per_position", "a positive int", repr(size))
        return int(size)
    width = 0
    for module in net.modules():
        if isinstance(module, AnyConv):
            width += module.out_channels
        elif isinstance(module, nn.Linear):
            width += module.out_features
    return (TENSORS_PER_LAYER * width + 2 * in_channels) * element_size


def draws_random_numbers(net: nn.Module) -> bool:
    """Whether a submodule is a dropout or the like in training mode.

    Calls of ``F.dropout`` inside a forward do not show here: they are told by what they do to torch's generators.
    """

    def draws(module: nn.Module) -> bool:
        if not module.training:
            return False
        if isinstance(module, AnyDropout):
            return module.p > 0
        dropout = getattr(module, "dropout", 0.0)  # attention and recurrent layers
        return isinstance(module, nn.RReLU) or (isinstance(dropout, float) and dropout > 0)

    return any(draws(module) for module in net.modules())


def is_deterministic(net: nn.Module) -> bool:
    """Whether a net gives one output for an input: as it states, or if its known modules draw no random numbers."""
    stated = getattr(net, "deterministic", None)
    if stated is not None:
        expect(isinstance(stated, bool), "net.deterministic", "a bool or None", repr(stated))
        return bool(stated)
    for module in net.modules():
        home = type(module).__module__
        if not home.startswith(("torch.nn.modules.", "pyglow_fast.")) or is_altered(module):
            return False  # code that we cannot know
    return not draws_random_numbers(net)


def may_write(net: nn.Module) -> bool:
    """Whether a net may write to its inputs x1 and cond: it does not state ``writes_to_input = False``."""
    stated = getattr(net, "writes_to_input", None)
    expect(stated is None or isinstance(stated, bool), "net.writes_to_input", "a bool or None", repr(stated))
    return stated is not False


def mixes_positions(net: nn.Module) -> bool:
    """Whether a strip alone gives other values: a net normalises over all positions or pads with the far side."""
    norms = (nn.GroupNorm, AnyInstanceNorm, AnyCircularPad)
    return any(
        isinstance(module, norms) or getattr(module, "padding_mode", "zeros") == "circular" for module in net.modules()
    )


def check_net(net: nn.Module) -> None:
    """Refuse a net whose output for one sample depends on the others, or that changes when it is run again.

    Such has a BatchNorm that uses the statistics of the batch, or an InstanceNorm that updates running ones.
    """
    for name, module in net.named_modules():
        where, found = f"net.{name}" if name else "net", type(module).__name__
        if isinstance(module, AnyBatchNorm):
            own = not module.training and module.running_mean is not None
            expected = (
                "no BatchNorm that uses the statistics of the batch (the net runs in chunks, and twice); .eval() it"
            )
            expect(own, where, expected, f"{found} in {'training' if module.training else 'eval'} mode")
        if isinstance(module, AnyInstanceNorm):
            still = not (module.training and module.track_running_stats)
            expect(still, where, "no running statistics that each run of the net updates", f"{found} in training mode")
    halo_of(net)
