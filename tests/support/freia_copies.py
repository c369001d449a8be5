"""Blocks with the interface of AllInOneBlock, as other code bases have copies of it: right ones and wrong ones.

``Block`` is a layer of a project that derives its own from FrEIA's InvertibleModule, as anomalib does; ``LaterBlock``
computes what FrEIA's git does since August 2023. The others differ in one thing that a probe must find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import FrEIA.modules as Fm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tenth_softplus(a: Tensor) -> Tensor:
    return 0.1 * F.softplus(a, beta=0.5)


class Block(Fm.InvertibleModule):  # type: ignore[misc]
    """A copy of AllInOneBlock: z = R (a coupling(R0 x) + b)."""

    def __init__(
        self,
        dims_in: Sequence[Sequence[int]],
        dims_c: Sequence[Sequence[int]] = (),
        subnet_constructor: Callable[[int, int], nn.Module] | None = None,
        affine_clamping: float = 2.0,
        gin_block: bool = False,
        permute_soft: bool = False,
        learned_householder_permutation: int = 0,
        reverse_permutation: bool = False,
    ) -> None:
        super().__init__(dims_in, dims_c)
        assert subnet_constructor is not None
        channels, self.input_rank = dims_in[0][0], len(dims_in[0]) - 1
        ones = [1] * self.input_rank
        self.in_channels, self.splits = channels, [channels - channels // 2, channels // 2]
        self.conditional, self.condition_channels = bool(dims_c), sum(dims[0] for dims in dims_c)
        self.clamp, self.GIN, self.reverse_pre_permute = affine_clamping, gin_block, reverse_permutation
        self.householder = learned_householder_permutation
        self.permute_function = (F.linear, F.conv1d, F.conv2d, F.conv3d)[self.input_rank]
        self.global_scale_activation = tenth_softplus
        self.global_scale = nn.Parameter(torch.full((1, channels, *ones), 9.9865))
        self.global_offset = nn.Parameter(torch.zeros(1, channels, *ones))
        hard = torch.eye(channels)[torch.randperm(channels)]
        rotation = torch.linalg.qr(torch.randn(channels, channels)).Q if permute_soft else hard
        self.w_perm: Any = None
        self.w_perm_inv: Any = None
        if self.householder:
            self.vk_householder = nn.Parameter(0.2 * torch.randn(self.householder, channels))
            self.w_0 = nn.Parameter(rotation, requires_grad=False)
        else:
            self.keep_permutation(rotation)
        self.subnet = subnet_constructor(self.splits[0] + self.condition_channels, 2 * self.splits[1])

    def keep_permutation(self, rotation: Tensor) -> None:
        shape = (self.in_channels, self.in_channels, *[1] * self.input_rank)
        self.__dict__.pop("w_perm"), self.__dict__.pop("w_perm_inv")
        self.w_perm = nn.Parameter(rotation.reshape(shape).clone(), requires_grad=False)
        self.w_perm_inv = nn.Parameter(rotation.T.reshape(shape).clone(), requires_grad=False)

    def log_scale(self, a: Tensor) -> Tensor:
        return self.clamp * torch.tanh(a)

    def output_dims(self, input_dims: Any) -> Any:
        return input_dims

    def forward(self, x: Sequence[Tensor], c: Any = None, rev: bool = False, jac: bool = True) -> Any:
        state = x[0]
        if self.householder:
            matrix = self.w_0
            for v in self.vk_householder:
                matrix = matrix @ (torch.eye(self.in_channels).to(v) - 2.0 * torch.outer(v, v) / v.dot(v))
            self.w_perm = matrix.reshape(*matrix.shape, *[1] * self.input_rank)
            self.w_perm_inv = self.w_perm.transpose(0, 1).contiguous()
        scale = self.global_scale_activation(self.global_scale)
        log_scale = torch.zeros_like(scale).sum() if self.GIN else scale.log().sum()
        scale = torch.ones_like(scale) if self.GIN else scale
        if rev:
            state = (self.permute_function(state, self.w_perm_inv) - self.global_offset) / scale
        elif self.reverse_pre_permute:
            state = self.permute_function(state, self.w_perm_inv)
        kept, changed = state.split(self.splits, dim=1)
        a = 0.1 * self.subnet(torch.cat([kept, *c], dim=1) if self.conditional else kept)
        s, shift = self.log_scale(a[:, : self.splits[1]]), a[:, self.splits[1] :]
        dims = tuple(range(1, s.dim()))
        if self.GIN:
            s = s - s.mean(dims, keepdim=True)
        changed = (changed - shift) * torch.exp(-s) if rev else changed * torch.exp(s) + shift
        log_det = s.sum(dims) + state[0, :1].numel() * log_scale
        out = torch.cat([kept, changed], dim=1)
        if not rev:
            out = self.permute_function(out * scale + self.global_offset, self.w_perm)
        elif self.reverse_pre_permute:
            out = self.permute_function(out, self.w_perm)
        return (out,), -log_det if rev else log_det


class LaterBlock(Block):
    """A block with indices for a hard permutation, and another clamp."""

    def keep_permutation(self, rotation: Tensor) -> None:
        order = rotation.argmax(1)
        if not torch.equal(torch.eye(len(order))[order], rotation):
            super().keep_permutation(rotation)
            return
        self.permute_function = lambda x, order: x[:, order]
        self.__dict__.pop("w_perm"), self.__dict__.pop("w_perm_inv")
        self.w_perm = nn.Parameter(order, requires_grad=False)
        self.w_perm_inv = nn.Parameter(order.argsort(), requires_grad=False)

    def log_scale(self, a: Tensor) -> Tensor:
        return self.clamp * torch.tanh(a / self.clamp)


class Sized(LaterBlock):
    """A block for images of one size, as FrEIA's git has it."""

    def log_scale(self, a: Tensor) -> Tensor:
        if tuple(a.shape[2:]) != tuple(self.dims_in[0][1:]):
            raise RuntimeError(f"Expected input of shape {self.dims_in[0]}")
        return super().log_scale(a)


class AtanClamp(Block):
    def log_scale(self, a: Tensor) -> Tensor:
        return self.clamp * 0.636 * torch.atan(a)


class Detached(Block):
    """A block with the right values and wrong gradients."""

    def log_scale(self, a: Tensor) -> Tensor:
        s = super().log_scale(a)
        return s.detach() + 0.5 * (s - s.detach())


class InTraining(Block):
    """A block that is right in evaluation, and not in training."""

    def log_scale(self, a: Tensor) -> Tensor:
        return super().log_scale(1.001 * a if self.training else a)


class Counting(Block):
    """A block with the right numbers, and a count of its calls."""

    calls = 0

    def log_scale(self, a: Tensor) -> Tensor:
        self.calls += 1
        return super().log_scale(a)


class InEvaluation(Sized):
    """A block that is right in training, and not in evaluation."""

    def log_scale(self, a: Tensor) -> Tensor:
        return super().log_scale(a if self.training else 1.001 * a)
