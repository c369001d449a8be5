"""Couplings and well-conditioned random matrices in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from pyglow_fast.reference import ORDERS, SCALE_MAPS, CouplingSpec
from support.bijections import softplus_scale

SPECS = [
    CouplingSpec("additive"),
    *(CouplingSpec(scale_map=scale_map, order=order) for scale_map in SCALE_MAPS for order in ORDERS),
    *(CouplingSpec(scale_map=softplus_scale, order=order) for order in ORDERS),
    CouplingSpec(bias=-0.5, eps=0.3),
    CouplingSpec(bias=0.0, eps=1e-3, order="scale_shift"),
    *(CouplingSpec(bias=0.0, factor=2.0, order=order) for order in ORDERS),
    CouplingSpec(eps=0.3, factor=0.7),
    CouplingSpec(scale_map="tanh", clamp=0.7),
    CouplingSpec(scale_map="atan", clamp=3.0, order="scale_shift"),
]


def spec_name(spec: CouplingSpec) -> str:
    scale_map = spec.scale_map if isinstance(spec.scale_map, str) else "callable"
    return "-".join([spec.coupling, scale_map, spec.order, *map(str, (spec.bias, spec.eps, spec.clamp, spec.factor))])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def invertible(*shape: int) -> Tensor:
    """Random matrices with singular values between about 0.5 and 2."""
    size = shape[-1]
    left, right = (torch.linalg.qr(randn(*shape, size)).Q for _ in range(2))
    return left * (0.5 * randn(*shape).clamp(-1.3, 1.3)).exp().unsqueeze(-2) @ right
