"""Masks of sequences of unequal lengths: which positions of a batch exist, and how a net sees no others.

A mask m (N, 1, T) is 1 at the positions that a sample has and 0 behind them, where its values are padding. Nets of
couplings get one tensor besides the channels that they read: of a masked run its first channel is the mask, and what
else the nets are given follows. So whatever cuts a batch into chunks cuts the mask with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyglow_fast import reference
from pyglow_fast._core.errors import can_read, expect
from pyglow_fast.nets.traits import bytes_per_position, halo_of, is_deterministic, may_write
from pyglow_fast.reference import CouplingSpec

# Samples run together while the shortest has this part of the positions of the longest at least: the rest is computed
# for nothing. More groups would compute less, but a net's calls have a price of their own.
ALIKE = 0.8

MaskedCall = Callable[..., Tensor]  # (x, cond or None, mask or None) -> output


def check_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Give the mask in x's dtype, (N, 1, T); refuse one of another shape or device, or of other values than 0 and 1."""
    expect(isinstance(mask, Tensor), "mask", "a Tensor", type(mask).__name__)
    expected = (x.shape[0], 1, *x.shape[2:])
    expect(tuple(mask.shape) == expected, "mask", f"shape {expected}", f"shape {tuple(mask.shape)}")
    expect(mask.device == x.device, "mask", f"device {x.device}", mask.device)
    expect(is_mask(mask, x), "mask", "values 0 and 1", "others")
    return mask.detach().to(x.dtype)


def is_mask(mask: Tensor, x: Tensor) -> bool:
    """Whether a tensor is a mask for x; its values are looked at where that takes no pause."""
    if tuple(mask.shape) != (x.shape[0], 1, *x.shape[2:]) or mask.device != x.device:
        return False
    return mask.dtype == torch.bool or not can_read(mask) or bool(((mask == 0) | (mask == 1)).all())


def without_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Set x to zero where the mask is, whatever x holds there: NaN and inf too, which get no gradient."""
    return x.masked_fill(mask == 0, 0.0)


def mask_of(cond: Tensor) -> Tensor:
    """Take the mask (N, 1, T) from what the nets of a masked run get besides x1."""
    return cond[:, :1]


def positions_of(cond: Tensor) -> Tensor:
    """Count the positions of each sample, (N,), in the dtype of the flow."""
    return mask_of(cond).sum(dim=(1, 2))


def lengths(mask: Tensor) -> list[int]:
    """List where the last position of each sample ends, at least 1: a sample may be cut behind it."""
    ends = torch.arange(1, mask.shape[2] + 1, device=mask.device)
    return ((mask[:, 0] != 0) * ends).amax(dim=1).clamp_min(1).tolist() if mask.shape[2] else [0] * mask.shape[0]


def groups_alike(ends: Sequence[int]) -> list[list[int]]:
    """Group samples of similar lengths, longest first, by their numbers."""
    found: list[list[int]] = []
    for sample in sorted(range(len(ends)), key=lambda i: -ends[i]):
        if not found or ends[sample] < ALIKE * ends[found[-1][0]]:
            found.append([])
        found[-1].append(sample)
    return found


def run_by_length(call: MaskedCall, x: Tensor, cond: Tensor | None, mask: Tensor | None) -> Tensor:
    """call(x, cond, mask) without the work for padding: samples of like lengths together, cut behind the longest.

    What call gives must be zero where the mask is, and not depend on how much padding follows. Where the mask's values
    cannot be read without a pause (CUDA, traced code) nothing is cut.

    Args:
        call: gives (n, C_out, t) of x (n, C, t), cond (n, C_c, t or 1) or None and mask (n, 1, t) or None.
        x: (N, C, T).
        cond: (N, C_c, T), or (N, C_c, 1) for the same at all positions, or None.
        mask: (N, 1, T), or None: all positions are there.
    """
    if mask is None or not can_read(mask) or 0 in x.shape:
        return call(x, cond, mask)
    ends, total = lengths(mask), x.shape[2]
    groups = groups_alike(ends)
    if len(groups) == 1 and max(ends) == total:
        return call(x, cond, mask)
    outputs = []
    for group in groups:
        samples, end = torch.tensor(group), ends[group[0]]
        inputs = (None if part is None else part[:, :, :end].index_select(0, samples) for part in (x, cond, mask))
        outputs.append(F.pad(call(*inputs), (0, total - end)))
    order = torch.tensor([sample for group in groups for sample in group])
    return torch.cat(outputs).index_select(0, order.argsort())


def masked_condition(mask: Tensor, cond: Tensor | None) -> Tensor:
    """Join mask and condition, (N, 1 + C_c, T), as nets of a masked run get them."""
    return mask if cond is None else torch.cat([mask, cond.to(mask.dtype).expand(-1, -1, mask.shape[2])], dim=1)


def log_scale_of_padding(specs: Sequence[CouplingSpec], mask: Tensor, channels: int) -> Tensor:
    """Sum the log s that couplings of so many channels count at masked positions, where a net gives zero: (N,)."""
    zero = mask.new_zeros(1)
    scaled = [reference.scale_and_log(zero, spec)[1] for spec in specs if spec.coupling == "affine"]
    total = torch.cat(scaled).sum() if scaled else zero
    return (mask.shape[2] - mask.sum(dim=(1, 2))) * (channels * total)


def run_masked(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,
    cond: Tensor | None,
    mask: Tensor,
    specs: Sequence[CouplingSpec],
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """z and log_det (N,) of the positions that are there; z is zero at the others, whatever x holds there.

    The samples run by length, so that chunks of them have little padding. ``run`` gives z and log_det of x (N, C, T),
    zero at masked positions, and of what nets get besides; ``inverse``: with minus the log s of the couplings' specs.
    """
    channels, x, extra = x.shape[1], without_padding(x, mask), masked_condition(mask, cond)
    ends = lengths(mask) if can_read(mask) and mask.numel() else []
    if ends == sorted(ends, reverse=True):
        z, log_det = run(x, extra)
    else:
        order = torch.tensor(sorted(range(len(ends)), key=lambda i: -ends[i]))
        z, log_det = run(x.index_select(0, order), extra.index_select(0, order))
        z, log_det = (part.index_select(0, order.argsort()) for part in (z, log_det))
    padding = log_scale_of_padding(specs, mask, channels // 2)
    return without_padding(z, mask), log_det + padding if inverse else log_det - padding


class MaskedNet(nn.Module):
    """m net(m x1, cond, m): a net of sequences as a net of a coupling, m the first channel of its second input.

    Args:
        net: a module called with x1 (N, C1, T), cond or None, and the mask (N, 1, T); it states ``takes_mask = True``:
            what it gives at a position does not depend on how much padding follows.
        per_sample: cond is the same at every position: the net gets (N, C_c, 1).

    Raises:
        ValueError: a net that does not state it.
    """

    def __init__(self, net: nn.Module, per_sample: bool = True) -> None:
        super().__init__()
        stated = getattr(net, "takes_mask", False) is True
        expect(stated, "net", "one for masked sequences, which states takes_mask = True", type(net).__name__)
        self.net, self.per_sample = net, per_sample

    @property
    def halo(self) -> int | None:
        """The positions to each side that an output position depends on, or None where the net does not state it."""
        return halo_of(self.net)

    @property
    def deterministic(self) -> bool:
        """Whether the net gives the same output again, whatever the random generators."""
        return is_deterministic(self.net)

    @property
    def writes_to_input(self) -> bool:
        """Whether the net may write to its inputs."""
        return may_write(self.net)

    def bytes_per_position(self, element_size: int) -> int:
        """Give what the net states, or else an estimate for it."""
        return bytes_per_position(self.net, 1, element_size)

    def forward(self, x1: Tensor, extra: Tensor) -> Tensor:
        """Predict (N, C_out, T) from x1 (N, C1, T) and extra (N, 1 + C_c, T): the mask, then the condition."""
        mask = mask_of(extra).detach()
        cond = None if extra.shape[1] == 1 else extra[:, 1:, :1] if self.per_sample else extra[:, 1:]
        out: Tensor = self.net(x1 * mask, cond, mask)
        return out * mask
