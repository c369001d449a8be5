"""Encoding and decoding ask for nets of a precision of their own: what rounds is amplified from step to step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyglow_fast._float32 import CONVOLUTIONS, has_tf32, rounds
from pyglow_fast.layers import Coupling
from pyglow_fast.nets.precision import HALF, check_precision, overridden

# The largest error of decode(encode(x)), as a part of the range of x, by the precision of the nets. Measured with 8
# images of 3x32x32, nets of 64 channels, L = 3, K = 8, trained 150 steps.
ROUND_TRIP_ERROR: dict[object, str] = {torch.bfloat16: "1e-3", torch.float16: "2e-4", "TF32": "1e-4"}


@contextlib.contextmanager
def exact_nets(couplings: Sequence[Coupling], like: Tensor, precision: str, what: str) -> Iterator[None]:
    """Runs nets, on tensors like ``like``, in the precision a call asks for; warns if that is not a full one."""
    check_precision(precision)
    found = couplings[0].precision if precision == "auto" else precision
    autocast = torch.is_autocast_enabled(like.device.type)
    coarse: object = HALF.get(found)
    if found == "auto" and autocast:
        coarse = torch.get_autocast_dtype(like.device.type)
    elif has_tf32(like) and (found == "tf32" or (found == "auto" and rounds(CONVOLUTIONS, like))):
        coarse = "TF32"
    if coarse in ROUND_TRIP_ERROR:
        warnings.warn(
            f"{what} with nets in {coarse}: decode(encode(x)) is off by about {ROUND_TRIP_ERROR[coarse]} of the "
            'range of x, by more the deeper and longer trained the model is; precision="fp32" repeats it to 1e-6',
            stacklevel=4,
        )
    settings = {coupling.precision for coupling in couplings}
    plain = precision == "fp32" and settings == {"auto"} and not has_tf32(like) and not autocast
    same = plain or settings <= {precision}
    with contextlib.nullcontext() if same or precision == "auto" else overridden(precision):
        yield
