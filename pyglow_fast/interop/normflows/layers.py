"""Computes normflows' single layers: ActNorm, Invertible1x1Conv, Permute, Squeeze."""

from __future__ import annotations

from typing import Any

import normflows.flows
import torch
from normflows.flows import AffineConstFlow
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import can_read, expect
from pyglow_fast._tracing import is_traced
from pyglow_fast.interop import nets
from pyglow_fast.interop.normflows.adoption import is_untouched, stands_in
from pyglow_fast.layers.actnorm import has_no_spread, joint_moments
from pyglow_fast.reference import plu_weight

EPS = 1e-6  # what normflows adds to the standard deviation


def check_images(z: Tensor, channels: int | None = None) -> None:
    """Refuse what is not (N, channels, H, W)."""
    expect(isinstance(z, Tensor), "z", "a Tensor", type(z).__name__)
    fits = z.dim() == 4 and channels in (None, z.shape[1])
    expect(fits, "z", f"shape (N, {'C' if channels is None else channels}, H, W)", f"shape {tuple(z.shape)}")


def in_full(z: Tensor, like: Tensor) -> Tensor:
    """Convert a z that normflows' arithmetic would promote (16 bits under autocast, bytes) to the parameters' dtype."""
    return z.to(like.dtype) if torch.promote_types(z.dtype, like.dtype) == like.dtype else z


@stands_in
class ActNorm(normflows.flows.ActNorm):
    """x = z exp(s) + t, log_det = P sum s; inverse z = (x - t) exp(-s). P: positions that share a value of s and t.

    The first pass in either direction, in training or evaluation, sets s and t such that its output has mean 0 and
    standard deviation 1 per channel: by the unbiased deviation plus 1e-6 over the batches of all ranks. A channel
    without spread is centred only.

    Args:
        shape: the shape of s and t, (C, 1, 1) for images; dimensions of size 1 are shared by the positions along them.
        scale, shift: whether s and t are parameters (they are buffers else, and initialised all the same).

    Shapes: z (N, *sizes that fit shape); log_det (), nats.

    Raises:
        ValueError: the batch to initialise from is of another shape, empty or not finite, here or on another rank.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.normflows import ActNorm
        >>> norm = ActNorm((3, 1, 1))
        >>> z, log_det = norm.inverse(5 + 2 * torch.randn(8, 3, 4, 4))  # the first pass sets s and t
        >>> z.mean().abs() < 1e-5, f"{z.std():.2f}"
        (tensor(True), '1.00')
    """

    # The flag and its version when it was last read and found set: reading it stops a GPU's stream, and tracing.
    _flag_seen: tuple[Tensor, int] | None = None

    @property
    def is_initialized(self) -> bool:
        """Whether s and t were set from data, here or where they come from."""
        flag = self.data_dep_init_done
        if flag.is_meta:
            return False
        seen = self._flag_seen
        if seen is not None and is_traced():  # what is traced has another tensor in the place of the flag
            return True
        same = seen is not None and seen[0] is flag and not flag.is_inference() and seen[1] == flag._version
        if same and not can_read(flag):  # on the CPU it is read each time: a write through .data has no version
            return True
        done = bool(flag > 0)
        self._flag_seen = (flag, flag._version) if done and not flag.is_inference() else None
        return done

    def look_at_flag(self) -> None:
        """Read the flag now, so that what is traced later need not: a compiled graph would break, an export fail."""
        self._flag_seen = None
        _ = self.is_initialized

    @torch.no_grad()
    def initialize_from(self, z: Tensor, inverse: bool) -> None:
        """Set s and t from z, the input of ``inverse`` or of ``forward``, whether or not it happened before."""
        kept = [dim for dim in range(self.n_dim) if dim not in self.batch_dims]
        fits = z.dim() == self.n_dim and all(z.shape[dim] == self.s.shape[dim] for dim in kept)

        def check() -> None:
            sizes = ", ".join("*" if size == 1 else str(size) for size in self.s.shape)
            expect(fits, "z", f"shape ({sizes})", f"shape {tuple(z.shape)}")
            sharded = hasattr(self.s, "device_mesh")
            expect(not sharded, "parameters", "an actnorm that is initialised before it is sharded", "a sharded one")

        # Values that share parameters are brought along all dimensions but the second, where those of images are
        # already.
        rows = z.permute(self.batch_dims + kept).reshape(-1, self.s.numel()) if fits and kept != [1] else z
        count, mean, squared_deviations = joint_moments(rows, self.s.device, check)
        std = (squared_deviations / (count - 1.0).clamp_min(1.0)).sqrt()
        s = torch.where(has_no_spread(std, mean, z.dtype, EPS), torch.zeros_like(std), (std + EPS).log())
        t = mean
        if not inverse:
            s, t = -s, -mean * (-s).exp()
        self.s.copy_(s.view_as(self.s))
        self.t.copy_(t.view_as(self.t))
        self.data_dep_init_done.fill_(1.0)
        self.look_at_flag()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents z to data x."""
        if not self.is_initialized:
            self.initialize_from(z, inverse=False)
        out: tuple[Tensor, Tensor] = AffineConstFlow.forward(self, z)
        return out

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map data x to latents z."""
        if not self.is_initialized:
            self.initialize_from(z, inverse=True)
        out: tuple[Tensor, Tensor] = AffineConstFlow.inverse(self, z)
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.look_at_flag()


def net_actnorm(module: nn.Module, dims: int) -> tuple[Tensor, Tensor] | None:
    """Compute scale and offset, (C,), of the actnorm within normflows' ConvNet2d; None if it must be called itself.

    ``dims`` are the spatial dimensions of what it is called with.
    """
    actnorm: Any = module.actNorm
    ours = is_untouched(actnorm, ActNorm)
    if not ours and not is_untouched(actnorm, normflows.flows.ActNorm):
        return None
    initialized = actnorm.is_initialized if ours else bool(actnorm.data_dep_init_done > 0)
    if not initialized or actnorm.s.shape != (1, actnorm.s.numel(), *[1] * dims):
        return None
    return actnorm.s.exp().flatten(), actnorm.t.flatten()


nets.AFFINE_MAPS["normflows.utils.nn.ActNorm"] = net_actnorm


@stands_in
class Invertible1x1Conv(normflows.flows.Invertible1x1Conv):
    """x = W^-1 z, log_det = -H W log|det W|; inverse z = W x. With use_lu, W = P (tril(L, -1) + I) (triu(U, 1) + diag).

    The diagonal is sign_S exp(log_S). W starts as a random rotation.

    Args:
        num_channels: C.
        use_lu: whether the parameters are L, U and log_S, else W.

    Shapes: z (N, C, H, W); log_det (), nats.

    Raises:
        ValueError: z of another shape, a singular W to be inverted.

    Reference: Kingma & Dhariwal 2018, section 3.2.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.normflows import Invertible1x1Conv
        >>> conv = Invertible1x1Conv(4, use_lu=True)
        >>> x = torch.randn(2, 4, 3, 3)
        >>> z, log_det = conv.inverse(x)
        >>> torch.allclose(conv(z)[0], x, atol=1e-5), log_det.abs() < 1e-4  # a fresh matrix is a rotation
        (True, tensor(True))
    """

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """Compute the matrix W (C, C), differentiable, and log|det W| ()."""
        if not self.use_lu:
            return self.W, functional.log_abs_det(self.W)
        return plu_weight(self.P, self.L, self.U, self.log_S, self.sign_S), self.log_S.sum()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map latents z to data x."""
        check_images(z, self.num_channels)
        weight, log_det = self.weight_and_log_det()
        z = in_full(z, weight)
        x = functional.channel_mix(z, functional.invert_matrix(weight), weight.new_zeros(self.num_channels))
        return x, -log_det * functional.n_positions(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map data x to latents z."""
        check_images(z, self.num_channels)
        weight, log_det = self.weight_and_log_det()
        z = functional.channel_mix(in_full(z, weight), weight, weight.new_zeros(self.num_channels))
        return z, log_det * functional.n_positions(z)


@stands_in
class Permute(normflows.flows.Permute):
    """A permutation of channels: x = z[:, perm] ("shuffle"), or the second half before the first ("swap"); log_det = 0.

    Args:
        num_channels: C.
        mode: "shuffle" or "swap".

    Shapes: z (N, C, *spatial); log_det (N,).

    Raises:
        NotImplementedError: another mode, when it is called.

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.normflows import Permute
        >>> swap = Permute(4, mode="swap")
        >>> swap(torch.arange(4.0).reshape(1, 4))[0]
        tensor([[2., 3., 0., 1.]])
    """

    def forward(self, z: Tensor, context: object = None) -> tuple[Tensor, Tensor]:
        """Map latents z to data x."""
        out = z.index_select(1, self.perm) if self.mode == "shuffle" else super().forward(z)[0]
        return out, z.new_zeros(len(z))

    def inverse(self, z: Tensor, context: object = None) -> tuple[Tensor, Tensor]:
        """Map data x to latents z."""
        out = z.index_select(1, self.inv_perm) if self.mode == "shuffle" else super().inverse(z)[0]
        return out, z.new_zeros(len(z))


@stands_in
class Squeeze(normflows.flows.Squeeze):
    """x = unsqueeze(z), (N, C, H, W) -> (N, C / 4, 2 H, 2 W), from channel c*4 + 2*dh + dw; log_det = 0, an int.

    Raises:
        ValueError: z is no batch of images, C does not divide by 4, or H or W by 2 (inverse).

    Examples:
        >>> import torch
        >>> from pyglow_fast.interop.normflows import Squeeze
        >>> x, log_det = Squeeze()(torch.arange(4.0).reshape(1, 4, 1, 1))
        >>> x[0, 0]
        tensor([[0., 1.],
                [2., 3.]])
    """

    def forward(self, z: Tensor) -> tuple[Tensor, int]:
        """Map z to x, channels to space."""
        check_images(z)
        return functional.unsqueeze(z), 0

    def inverse(self, z: Tensor) -> tuple[Tensor, int]:
        """Map x to z, space to channels."""
        check_images(z)
        return functional.squeeze(z), 0
