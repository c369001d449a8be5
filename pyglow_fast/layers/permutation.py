"""Layers that mix the channels between couplings: the invertible 1x1 convolution and fixed permutations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast.layers._base import FlowLayer
from pyglow_fast.reference import full_precision, lu_weight
from pyglow_fast.runs.maps import FACTORS, INDEX, MATRIX, WEIGHT


class ChannelLinear(FlowLayer):
    """z = W x at every position; log_det = P log|det W|. A subclass says what W is, and sets ``channels``.

    A FlowStep runs any subclass as it does InvConv: it asks for W (outside of autocast), folds it with the actnorm
    before, and joins the product with the couplings around it. Where all steps of a run state a ``gather_index`` it
    gathers channels instead. It calls neither forward nor inverse, so whoever overrides them has to
    compute the same product. GlowConfig names InvConv and Permute only: any other is put into a Glow by assigning it to
    ``permutation`` of a step of ``model.levels[i].steps``, also before saved weights are loaded.

    Shapes: x (N, C, *spatial), float32 or float64; W (C, C) of the same dtype; log_det (N,), nats.

    Raises:
        TypeError: a subclass that does not define weight_and_log_det.
        ValueError: wrong shape, dtype or device; inverse of a singular W.

    Examples:
        >>> import torch
        >>> from pyglow_fast import FlowStep
        >>> from pyglow_fast.layers import ChannelLinear
        >>> class Double(ChannelLinear):
        ...     channels = 4
        ...     def weight_and_log_det(self):
        ...         return 2 * torch.eye(4), 4 * torch.tensor(2.0).log()
        >>> z, log_det = Double()(torch.ones(1, 4, 2, 2))
        >>> print(f"{z.mean():.0f}, {log_det.item():.3f}")  # 4 positions, 4 channels, log 2 for each
        2, 11.090
        >>> step = FlowStep(4, hidden=8, permutation=Double())  # in the place of an InvConv
    """

    channels: int
    _shown: tuple[str, ...] = ("channels",)

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """The matrix W (C, C) and log|det W| (); a subclass has to define it."""
        raise TypeError(f"{type(self).__name__} must define weight_and_log_det")

    def gather_index(self) -> Tensor | None:
        """The index (C,), int64, if W x is x[:, index] and nothing else: no matrix is needed then.

        None, as in this base class, if W is to be multiplied with.
        """
        return None

    def raw(self, like: Tensor) -> tuple[str, Sequence[Tensor]]:
        """Give the kind of W and the tensors that a run folds it from behind an actnorm, and again in a backward.

        In this base class, where it is not known what W is made of, they are W and log|det W| themselves. ``like`` is
        a tensor of the flow.
        """
        index = self.gather_index()
        if index is not None:
            return INDEX, (index,)
        with full_precision(like):
            return WEIGHT, self.weight_and_log_det()

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Multiply by W at every position: z = W x."""
        with full_precision(x):
            weight, log_det = self.weight_and_log_det()
        check_input("x", x, self.channels, weight)
        return functional.channel_linear(x, weight, log_det)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Divide by W at every position: x = W^-1 z."""
        with full_precision(z):
            weight, log_det = self.weight_and_log_det()
        check_input("z", z, self.channels, weight)
        return functional.channel_linear_inverse(z, weight, log_det)


class InvConv(ChannelLinear):
    """Invertible 1x1 convolution: z = W x at every position; log_det = P log|det W|.

    ``lu=True``: W = P L (U + diag(sign exp(log_diag))) with the permutation P and the signs fixed, so log|det W| =
    sum log_diag; ``lu=False``: W itself is the parameter and log|det W| comes from its LU factors. Either starts as a
    random rotation.

    Args:
        channels: C.
        lu: which parameterisation.

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), nats.

    Raises:
        ValueError: wrong shape, dtype or device; inverse of a singular W.

    Reference: Kingma & Dhariwal 2018, section 3.2.

    Examples:
        >>> import torch
        >>> from pyglow_fast import InvConv
        >>> layer, x = InvConv(channels=3), torch.randn(2, 3, 4, 4)
        >>> z, log_det = layer(x)
        >>> torch.allclose(z.norm(), x.norm()), log_det.abs().max() < 1e-4  # it starts as a rotation
        (True, tensor(True))
        >>> weight, _ = layer.weight_and_log_det()
        >>> torch.allclose(z, torch.einsum("ij,njhw->nihw", weight, x), atol=1e-5)
        True
    """

    permutation: Tensor
    sign_diag: Tensor
    _shown = ("channels", "lu")

    def __init__(self, channels: int, lu: bool = True) -> None:
        super().__init__()
        check_count("channels", channels)
        self.channels, self.lu = channels, lu
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
        if not lu:
            self.weight = nn.Parameter(rotation.to(torch.get_default_dtype()))
            return
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.argmax(dim=1))  # (P A)[i] = A[permutation[i]]
        self.register_buffer("sign_diag", diagonal.sign().to(torch.get_default_dtype()))
        self.lower = nn.Parameter(lower.tril(-1).to(torch.get_default_dtype()))
        self.upper = nn.Parameter(upper.triu(1).to(torch.get_default_dtype()))
        self.log_diag = nn.Parameter(diagonal.abs().log().to(torch.get_default_dtype()))

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """The matrix W (C, C) and log|det W| (), from the parameters."""
        if self.lu:
            weight = lu_weight(self.permutation, self.lower, self.upper, self.log_diag, self.sign_diag)
            return weight, self.log_diag.sum()
        return self.weight, functional.log_abs_det(self.weight)

    def raw(self, like: Tensor) -> tuple[str, Sequence[Tensor]]:
        """Give the LU factors, from which runs fold W; of a subclass with a W of its own, that."""
        if type(self).weight_and_log_det is not InvConv.weight_and_log_det:
            return super().raw(like)
        if not self.lu:
            return MATRIX, (self.weight,)
        held: Any = {**self._parameters, **self._buffers}  # as attributes they cost a multiple
        try:
            own = held["lower"], held["upper"], held["log_diag"], held["permutation"], held["sign_diag"]
        except KeyError:  # a parametrization, or pruning, is in the place of one
            own = self.lower, self.upper, self.log_diag, self.permutation, self.sign_diag
        return FACTORS, own


class Permute(ChannelLinear):
    """z[:, i] = x[:, index[i]], channels in another order; log_det = 0.

    Args:
        channels: C.
        permutation: "shuffle", a random order fixed at construction and saved with the weights, or "reverse".

    Shapes: x (N, C, *spatial), float32 or float64; log_det (N,), zero.

    Raises:
        ValueError: wrong permutation, shape, dtype or device.

    References: Dinh et al. 2014 and 2017 (reverse), Kingma & Dhariwal 2018, section 6 (shuffle).

    Examples:
        >>> import torch
        >>> from pyglow_fast import Permute
        >>> Permute(4, "reverse")(torch.tensor([[0.0, 1.0, 2.0, 3.0]]))
        (tensor([[3., 2., 1., 0.]]), tensor([0.]))
    """

    index: Tensor
    unit: Tensor
    _shown = ("channels", "permutation")

    def __init__(self, channels: int, permutation: str = "shuffle") -> None:
        super().__init__()
        check_count("channels", channels)
        expect(permutation in ("shuffle", "reverse"), "permutation", "'shuffle' or 'reverse'", repr(permutation))
        self.channels, self.permutation = channels, permutation
        index = torch.randperm(channels) if permutation == "shuffle" else torch.arange(channels).flip(0)
        self.register_buffer("index", index)
        # Not saved: it only tells the dtype that W must have, and follows .to() like a parameter.
        self.register_buffer("unit", torch.ones(()), persistent=False)

    def weight_and_log_det(self) -> tuple[Tensor, Tensor]:
        """The permutation matrix (C, C) and 0."""
        eye = torch.eye(self.channels, dtype=self.unit.dtype, device=self.unit.device)
        return eye[self.index], self.unit.new_zeros(())

    def gather_index(self) -> Tensor | None:
        """The index (C,); None for a subclass with another W."""
        return self.index if type(self).weight_and_log_det is Permute.weight_and_log_det else None

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map x to z by gathering channels."""
        check_input("x", x, self.channels, self.unit)
        return x.index_select(1, self.index), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map z back to x by gathering with the inverse order."""
        check_input("z", z, self.channels, self.unit)
        return z.index_select(1, self.index.argsort()), z.new_zeros(z.shape[0])
