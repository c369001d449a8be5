"""The specification itself, in float64: against autograd Jacobians, torch's own functions and written-out sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.bijections import softplus_scale
from support.helpers import assert_close, jacobian
from torch import Tensor
from torch.distributions import Normal

from pyglow_fast import reference
from pyglow_fast.reference import ORDERS, SCALE_MAPS, CouplingSpec

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


SHAPES = [(2, 4), (2, 3, 5), (3, 4, 3, 2), (1, 5, 1, 7), (2, 2, 2, 1, 3), (0, 4, 3, 2), (2, 4, 0, 3), (0, 3)]


def kept_half_net(n_out: int, n_kept: int) -> Callable[[Tensor], Tensor]:
    """A smooth net of the kept half that mixes positions, as a coupling net does."""
    weight = randn(n_out, n_kept)

    def net(kept: Tensor) -> Tensor:
        mixed = torch.einsum("oc,nc...->no...", weight, kept.sin())
        return mixed + 0.3 * mixed.flatten(1).mean(1).reshape(-1, *[1] * (kept.dim() - 1))

    return net


def test_lu_weight_is_the_product_of_its_factors() -> None:
    permutation, sign = torch.randperm(4), torch.randint(2, (4,)).double() * 2.0 - 1.0
    lower, upper, log_diag = randn(4, 4), randn(4, 4), 0.5 * randn(4)
    matrix = torch.zeros(4, 4, dtype=torch.float64)
    for row, source in enumerate(permutation):
        matrix[row, source] = 1.0
    left = torch.tril(lower, -1) + torch.diag(torch.ones(4, dtype=torch.float64))
    right = torch.triu(upper, 1) + torch.diag(sign * log_diag.exp())
    weight = reference.lu_weight(permutation, lower, upper, log_diag, sign)
    assert_close(weight, matrix @ left @ right)
    assert_close(torch.linalg.slogdet(weight).logabsdet, log_diag.sum(), condition=torch.linalg.cond(weight).item())


class TestChannelMix:
    def test_fold_is_actnorm_then_weight(self) -> None:
        weight, log_scale, bias, x = invertible(2, 3), 0.3 * randn(2, 3), randn(2, 3), randn(2, 3)
        matrix, offset = reference.fold_actnorm(weight, log_scale, bias)
        expected = torch.einsum("kij,kj->ki", weight, (x + bias) * log_scale.exp())
        assert_close(torch.einsum("kij,kj->ki", matrix, x) + offset, expected)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_mix_is_the_product_at_each_position(self, shape: tuple[int, ...]) -> None:
        x, matrix, offset = randn(*shape), invertible(shape[1]), randn(shape[1])
        u = reference.channel_mix(x, matrix, offset)
        column = offset.reshape(-1, *[1] * (len(shape) - 2))
        assert_close(u, torch.einsum("ij,nj...->ni...", matrix, x) + column)
        assert_close(reference.channel_unmix(u, torch.linalg.inv(matrix), offset), x, condition=4.0)


class TestInvertMatrix:
    @pytest.mark.parametrize("channels", [reference.LAPACK_BATCHED, 192])
    def test_many_channels(self, channels: int) -> None:
        """Beyond the limit one by one: in a batch MKL may fail on them."""
        matrix = invertible(3, channels)
        identity = torch.eye(channels).double().expand(3, -1, -1)
        condition = float(torch.stack([torch.linalg.cond(one) for one in matrix]).max())
        assert_close(reference.invert_matrix(matrix) @ matrix, identity, condition=channels * condition)
        expected = torch.stack([torch.linalg.slogdet(one).logabsdet for one in matrix])
        assert_close(reference.log_abs_det(matrix), expected, condition=channels)

    def test_float32_is_rounded_once(self) -> None:
        matrix = invertible(4, 6).float()
        inverse = reference.invert_matrix(matrix)
        assert inverse.dtype == torch.float32
        assert torch.equal(inverse, torch.linalg.inv(matrix.double()).float())

    @pytest.mark.parametrize("singular", [torch.zeros(2, 2), torch.ones(3, 3), torch.eye(3) * torch.tensor([1, 0, 1])])
    def test_singular_is_refused(self, singular: Tensor) -> None:
        with pytest.raises(ValueError, match="matrix: expected an invertible matrix, found a singular one"):
            reference.invert_matrix(torch.stack([torch.eye(len(singular)), singular]))


class TestScaleMaps:
    RAW = torch.linspace(-30.0, 30.0, 121, dtype=torch.float64)

    @pytest.mark.parametrize(
        ("spec", "formula"),
        [
            (CouplingSpec(), lambda raw: 1.0 / (1.0 + (-(raw + 2.0)).exp())),
            (CouplingSpec(bias=-1.0, eps=0.25), lambda raw: 1.0 / (1.0 + (1.0 - raw).exp()) + 0.25),
            (CouplingSpec(bias=0.0, factor=2.0), lambda raw: 2.0 / (1.0 + (-raw).exp())),
            (CouplingSpec(bias=0.5, eps=0.25, factor=0.7), lambda raw: 0.7 / (1.0 + (-(raw + 0.5)).exp()) + 0.25),
            (CouplingSpec(scale_map="exp"), lambda raw: raw.exp()),
            (CouplingSpec(scale_map="tanh", clamp=3.0), lambda raw: (3.0 * (raw / 3.0).tanh()).exp()),
            (CouplingSpec(scale_map="atan", clamp=3.0), lambda raw: (3.0 * 0.636 * raw.atan()).exp()),
            (CouplingSpec(scale_map=softplus_scale), lambda raw: softplus_scale(raw)[0]),
        ],
        ids=lambda value: spec_name(value) if isinstance(value, CouplingSpec) else "",
    )
    def test_scale_and_its_log(self, spec: CouplingSpec, formula: Callable[[Tensor], Tensor]) -> None:
        scale, log_scale = reference.scale_and_log(self.RAW, spec)
        # Ratios, so that the small ones count as much as the large.
        assert_close(scale / formula(self.RAW), torch.ones_like(scale))
        assert_close(log_scale.exp() / scale, torch.ones_like(scale), condition=30.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("spec", [spec for spec in SPECS[1:] if isinstance(spec.scale_map, str)], ids=spec_name)
    def test_log_is_finite_where_the_scale_underflows(self, spec: CouplingSpec, dtype: torch.dtype) -> None:
        raw = torch.tensor([-800.0, -110.0, -100.0, 100.0, 110.0, 800.0], dtype=dtype)
        if spec.scale_map == "exp":  # the one map that can overflow, which is refused: see below
            raw = raw.clamp(max=80.0)
        raw.requires_grad_()
        _, log_scale = reference.scale_and_log(raw, spec)
        assert log_scale.isfinite().all()
        assert torch.autograd.grad(log_scale.sum(), raw)[0].isfinite().all()

    def test_log_is_not_the_log_of_the_scale(self) -> None:
        raw = torch.tensor([-800.0, -100.0, 100.0], dtype=torch.float64)
        _, log_scale = reference.scale_and_log(raw, CouplingSpec())
        # log sigmoid(z) = z - log(1 + e^z) below, -log(1 + e^-z) = -e^-z above: neither is 0 or -inf.
        expected = torch.tensor([-798.0, -98.0, -math.exp(-102.0)], dtype=torch.float64)
        assert_close(log_scale / expected, torch.ones_like(expected))


class TestCoupling:
    @pytest.mark.parametrize("spec", SPECS, ids=spec_name)
    @pytest.mark.parametrize("n_transformed", [1, 2, 3])
    def test_by_the_formula(self, spec: CouplingSpec, n_transformed: int) -> None:
        u = randn(2, 5, 3, 2)
        net_out = randn(2, (2 if spec.coupling == "affine" else 1) * n_transformed, 3, 2)
        y, log_det = reference.coupling(u, net_out, spec)
        n_kept = 5 - n_transformed
        scale, log_scale = torch.ones(2, n_transformed, 3, 2).double(), torch.zeros(2, n_transformed, 3, 2).double()
        if spec.coupling == "affine":
            scale, log_scale = reference.scale_and_log(net_out[:, n_transformed:], spec)
        shift, half = net_out[:, :n_transformed], u[:, n_kept:]
        expected = (half + shift) * scale if spec.order == "shift_scale" else half * scale + shift
        assert torch.equal(y[:, :n_kept], u[:, :n_kept])
        assert_close(y[:, n_kept:], expected)
        assert_close(log_det, log_scale.sum((1, 2, 3)), condition=6.0 * n_transformed)

    @pytest.mark.parametrize("spec", SPECS, ids=spec_name)
    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 4, 2, 3), (1, 2, 2, 1, 3)], ids=str)
    def test_against_the_jacobian(self, spec: CouplingSpec, shape: tuple[int, ...]) -> None:
        u, half = randn(*shape), shape[1] // 2
        net = kept_half_net(2 * half if spec.coupling == "affine" else half, shape[1] - half)

        def forward(values: Tensor) -> tuple[Tensor, Tensor]:
            return reference.coupling(values, net(values[:, : shape[1] - half]), spec)

        y, log_det = forward(u)
        derivative = jacobian(lambda values: forward(values)[0], u)
        condition = float(torch.linalg.cond(derivative).max())
        assert_close(log_det, torch.linalg.slogdet(derivative).logabsdet, condition * u[0].numel())
        again, inverse_log_det = reference.coupling_inverse(y, net(y[:, : shape[1] - half]), spec)
        assert_close(again, u, condition)
        assert torch.equal(inverse_log_det, -log_det)


class TestSqueeze:
    @pytest.mark.parametrize("factor", [1, 2, 3])
    def test_is_pixel_unshuffle(self, factor: int) -> None:
        x = randn(2, 3, 2 * factor, 5 * factor)
        z = reference.squeeze(x, factor)
        assert torch.equal(z, F.pixel_unshuffle(x, factor))
        assert torch.equal(reference.unsqueeze(z, factor), F.pixel_shuffle(z, factor))

    def test_order_in_three_dimensions(self) -> None:
        x = randn(1, 2, 2, 4, 6)
        z = reference.squeeze(x)
        assert z.shape == (1, 16, 1, 2, 3)
        for c, d, h, w in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[1:])).tolist():
            channel = c * 8 + 4 * (d % 2) + 2 * (h % 2) + w % 2
            assert z[0, channel, d // 2, h // 2, w // 2] == x[0, c, d, h, w]


class TestGaussian:
    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (2, 3, 4, 2), (0, 3, 2)], ids=str)
    def test_log_prob(self, shape: tuple[int, ...]) -> None:
        per_channel = (1, shape[1], *[1] * (len(shape) - 2))
        z = randn(*shape)
        for mean, log_sd in ((randn(*shape), randn(*shape)), (randn(*per_channel), randn(*per_channel))):
            expected = Normal(mean, log_sd.exp()).log_prob(z).flatten(1).sum(1)
            got = reference.gaussian_log_prob(z, mean, log_sd)
            assert_close(got, expected, condition=4.0 * math.prod(shape[1:]))

    def test_sample_is_the_reparametrisation(self) -> None:
        noise, mean, log_sd = randn(3, 2, 4), randn(1, 2, 1), randn(1, 2, 1)
        z = reference.gaussian_sample(noise, mean, log_sd)
        expected = Normal(0.0, 1.0).log_prob(noise).flatten(1).sum(1) - 4.0 * log_sd.sum()
        assert_close(reference.gaussian_log_prob(z, mean, log_sd), expected, condition=8.0)


@pytest.mark.parametrize("spec", SPECS, ids=spec_name)
def test_what_lies_between_two_nets(spec: CouplingSpec) -> None:
    u, matrix, offset = randn(2, 4, 3), invertible(4), randn(4)
    net_out = randn(2, 4 if spec.coupling == "affine" else 2, 3)
    y, log_det = reference.coupling(u, net_out, spec)
    mixed, mixed_log_det = reference.coupling_mix(u, net_out, matrix, offset, spec)
    assert_close(mixed, torch.einsum("ij,njp->nip", matrix, y) + offset[:, None])
    assert torch.equal(mixed_log_det, log_det)
    back, back_log_det = reference.coupling_mix_inverse(y, net_out, matrix, offset, spec)
    assert_close(back, torch.einsum("ij,njp->nip", matrix, u - offset[:, None]), condition=100.0)
    assert_close(back_log_det, -log_det, condition=6.0)
