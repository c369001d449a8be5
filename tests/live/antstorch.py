"""Glow models of antsnormflows as ANTsTorch's create_glow_normalizing_flow_model_2d and _3d put them together.

Written from the interface of these functions, since ANTsTorch itself needs ANTsPy: level i has K blocks of
2^d C 2^((d - 1) (L - 1 - i)) channels, d the number of spatial dimensions, and gives the last half of them away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def glow(
    input_shape: Sequence[int],
    levels: int,
    steps: int,
    hidden: int,
    grad_checkpoint: bool | None = None,
    base: str = "glow",
    **block: Any,
) -> nn.Module:
    """A MultiscaleFlow of images (C, H, W) or volumes (C, D, H, W); ``block`` are options of its GlowBlocks.

    Raises:
        ImportError: antsnormflows is not installed.
    """
    import antsnormflows as nf  # type: ignore[import-not-found]

    channels, *sides = input_shape
    dims = len(sides)
    own_block, squeeze = {
        2: (nf.flows.GlowBlock2d, nf.flows.Squeeze2d),
        3: (nf.flows.GlowBlock3d, nf.flows.Squeeze3d),
    }[dims]
    options = {"scale_map": "tanh", "leaky": 0.0, "s_cap": 2.0, **block}
    bases, flows = [], []
    for level in range(levels):
        above = levels - 1 - level
        width = channels * 2 ** (dims + above * (dims - 1))
        flows.append([*(own_block(width, hidden, **options) for _ in range(steps)), squeeze()])
        shape = (width if level == 0 else width // 2, *(side // 2 ** (above + 1) for side in sides))
        bases.append(nf.distributions.GlowBase(shape) if base == "glow" else nf.distributions.DiagGaussian(shape))
    merges = [nf.flows.Merge() for _ in range(levels - 1)]
    # ANTsTorch leaves class_cond at True: the bases take a label y, and None of it.
    return nf.MultiscaleFlow(bases, flows, merges, grad_checkpoint=grad_checkpoint)
