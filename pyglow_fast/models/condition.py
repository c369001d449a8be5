"""The condition of a Glow: one tensor for all levels, or one for each level at its resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pyglow_fast._core.errors import can_read, expect

Condition = Tensor | Sequence[Tensor] | Mapping[int, Tensor]


def level_conditions(
    cond: Condition | None,
    channels: int | tuple[int, ...],
    n: int,
    shapes: Sequence[tuple[int, ...]],
    device: torch.device,
) -> list[Tensor | None]:
    """Check a condition and list it by level, as it was given: :func:`fitted` brings it to a size.

    Args:
        cond: None; one tensor (n, channels) or (n, channels, *spatial), which every level brings to its size; or one of
            each level, as a list or a dict with the keys 0 .. L-1 (0 the shallowest), each (n, channels of that level)
            or (n, channels of that level, *spatial of that level).
        channels: of the condition, 0 for none; a tuple: of each level's.
        n: samples.
        shapes: (C, *spatial) of the state in each level.
        device: where it must be.

    Raises:
        ValueError: one that does not fit, or with NaN or inf in it (looked for on the CPU).
    """
    if channels == 0:
        expect(cond is None, "cond", "None, since the model has cond_channels=0", type(cond).__name__)
        return [None] * len(shapes)
    if isinstance(cond, Tensor) and isinstance(channels, int):
        _check(cond, "cond", channels, n, None, len(shapes[0]) + 1, device)
        return [cond] * len(shapes)
    widths = channels if isinstance(channels, tuple) else (channels,) * len(shapes)
    expected = f"a list or dict of {len(shapes)} tensors, one a level"
    if isinstance(channels, int):
        expected = f"a tensor with {channels} channels, or {expected}"
    several = isinstance(cond, Mapping | list | tuple)
    expect(several, "cond", expected, type(cond).__name__)
    assert isinstance(cond, Mapping | list | tuple)  # for the type checker: refused above
    if isinstance(cond, Mapping):
        keys = set(cond) == set(range(len(shapes)))
        expect(keys, "cond", f"the keys 0..{len(shapes) - 1}, the levels", sorted(map(str, cond)))
        cond = [cond[i] for i in range(len(shapes))]
    expect(len(cond) == len(shapes), "cond", expected, f"{len(cond)}")
    for i, (part, width, shape) in enumerate(zip(cond, widths, shapes, strict=True)):
        _check(part, f"cond[{i}]", width, n, shape[1:], len(shape) + 1, device)
    return list(cond)


def fitted(cond: Tensor | None, spatial: Sequence[int]) -> Tensor | None:
    """Bring a condition to the spatial size of a state: a vector is spread over it, a map averaged down to it."""
    if cond is None or tuple(cond.shape[2:]) == tuple(spatial):
        return cond
    if cond.dim() == 2:
        return cond.reshape(*cond.shape, *[1] * len(spatial)).expand(*cond.shape, *spatial)
    return F.interpolate(cond, size=tuple(spatial), mode="area")


def _check(
    cond: Tensor, name: str, channels: int, n: int, spatial: tuple[int, ...] | None, dims: int, device: torch.device
) -> None:
    expect(isinstance(cond, Tensor), name, f"a tensor with {channels} channels", type(cond).__name__)
    fits = cond.dim() in (2, dims) and tuple(cond.shape[:2]) == (n, channels)
    fits = fits and (spatial is None or tuple(cond.shape[2:]) in ((), spatial))
    sizes = "*spatial" if spatial is None else ", ".join(map(str, spatial))
    expect(fits, name, f"shape ({n}, {channels}) or ({n}, {channels}, {sizes})", f"shape {tuple(cond.shape)}")
    expect(cond.is_floating_point(), name, "a floating dtype", cond.dtype)
    expect(cond.device == device, name, f"device {device} (where the parameters are)", cond.device)
    if can_read(cond):
        expect(bool(cond.isfinite().all()), name, "finite values", "NaN or inf")
