"""Every check of helpers.py rejects what it is there to reject."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import helpers
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers import FlowLayer


class Linear(FlowLayer):
    """z = W x + b for x (N, D), right unless a test breaks it."""

    def __init__(self, n_values: int = 3) -> None:
        super().__init__()
        weight = torch.eye(n_values, dtype=torch.float64) + 0.3 * torch.randn(n_values, n_values, dtype=torch.float64)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(n_values, dtype=torch.float64))

    def log_det(self, x: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.weight).logabsdet.expand(x.shape[0])

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T + self.bias, self.log_det(x)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (z - self.bias) @ torch.linalg.inv(self.weight).T, -self.log_det(z)


class WrongSign(Linear):
    def log_det(self, x: Tensor) -> Tensor:
        return -super().log_det(x)


class DroppedLogDet(Linear):
    def log_det(self, x: Tensor) -> Tensor:
        return x.new_zeros(x.shape[0])


class LogDetOfTheBatch(Linear):
    def log_det(self, x: Tensor) -> Tensor:
        return super().log_det(x).sum()


class SlightlyWrongLogDet(Linear):
    def log_det(self, x: Tensor) -> Tensor:
        return super().log_det(x) + 1e-6


class LogDetNotNegated(Linear):
    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z, cond)
        return x, -log_det


class TransposedInverse(Linear):
    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (z - self.bias) @ torch.linalg.inv(self.weight), -self.log_det(z)


class TransposedForward(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x @ self.weight + self.bias, self.log_det(x)


class SlightlyWrongInverse(Linear):
    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z, cond)
        return x * (1.0 + 1e-9), log_det


class DetachedInverse(Linear):
    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse(z.detach(), cond)
        return x + 0.0 * z, log_det


class ChangesItsInput(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result = super().forward(x.clone(), cond)
        if not x.requires_grad:
            x[0, 0] += 1.0
        return result


class MixesSamples(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, cond)
        return z + x.cumsum(0), log_det


class Forgetful(Linear):
    """Its bias is no part of the state."""

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        super().load_state_dict(state_dict, strict=False)


class StartsAgain(Linear):
    """Takes its bias from the first batch it sees, loaded or not."""

    seen = False

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.seen and not x.requires_grad:
            self.seen = True
            with torch.no_grad():
                self.bias.copy_(-x.mean(0))
        return super().forward(x, cond)


class StartsAgainLater(StartsAgain):
    """Takes its bias from the second batch, which only the look at the state afterwards can see."""

    calls = 0

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.seen = self.calls != 2
        return super().forward(x, cond)


class FrozenBias(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T + self.bias.detach(), self.log_det(x)


class IdleBias(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T + 0.0 * self.bias, self.log_det(x)


class ExplodingBias(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x @ self.weight.T + (0.0 * self.bias).sqrt(), self.log_det(x)


class Noisy(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, cond)
        return z + 1e-15 * torch.randn_like(z), log_det


class NoisyGradient(Linear):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x, cond)
        noise = torch.randn_like(x)
        return z + noise * (x - x.detach()), log_det


class ReadsMemoryInOrder(Linear):
    """Takes the storage for the values, as a kernel does that ignores strides."""

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        dense = x.as_strided(x.shape, (x.shape[1], 1), 0)
        return super().forward(dense, cond)


class InverseReadsMemoryInOrder(Linear):
    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().inverse(z.as_strided(z.shape, (z.shape[1], 1), 0), cond)


class SharesItsBias(Linear):
    def __deepcopy__(self, memo: dict[int, object]) -> SharesItsBias:
        twin = SharesItsBias()
        twin.weight, twin.bias = nn.Parameter(self.weight.detach().clone()), self.bias
        return twin


class CopiedWrong(Linear):
    def __deepcopy__(self, memo: dict[int, object]) -> CopiedWrong:
        return CopiedWrong()


class ForgetsEmptyBatch(Linear):
    def log_det(self, x: Tensor) -> Tensor:
        return super().log_det(torch.cat([x, x[:0]])) if len(x) else x.new_zeros(1)


def _check_state(layer: nn.Module, x: Tensor) -> None:
    helpers.assert_state_round_trip(layer, type(layer)(), x)


def _check_learning(layer: nn.Module, x: Tensor) -> None:
    z, log_det = layer(x)
    helpers.assert_every_parameter_learns(layer, z.square().sum() + log_det.sum())


CHECKS: dict[Callable[..., None], list[type[Linear]]] = {
    helpers.assert_bijection: [
        WrongSign,
        DroppedLogDet,
        LogDetOfTheBatch,
        SlightlyWrongLogDet,
        LogDetNotNegated,
        TransposedInverse,
        TransposedForward,
        SlightlyWrongInverse,
        DetachedInverse,
        ChangesItsInput,
    ],
    _check_state: [Forgetful, StartsAgain, StartsAgainLater],
    _check_learning: [FrozenBias, IdleBias, ExplodingBias],
    helpers.assert_samples_independent: [MixesSamples],
    helpers.assert_repeatable: [Noisy, NoisyGradient],
    helpers.assert_layouts_equal: [ReadsMemoryInOrder, InverseReadsMemoryInOrder],
    helpers.assert_copies: [SharesItsBias, CopiedWrong],
    helpers.assert_empty_batch: [ForgetsEmptyBatch],
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_right_layer_passes(check: Callable[..., None]) -> None:
    check(Linear(), torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("check", "broken"),
    [(check, broken) for check, layers in CHECKS.items() for broken in layers],
    ids=lambda value: value.__name__,
)
def test_the_broken_layer_is_rejected(check: Callable[..., None], broken: type[Linear]) -> None:
    layer = broken()
    with pytest.raises(AssertionError):
        check(layer, torch.randn(4, 3, dtype=torch.float64))


def _forget_positions(layer: pgf.ActNorm, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
    z, log_det = pgf.ActNorm.forward(layer, x, cond)
    return z, log_det / x[0, 0].numel()


def test_a_log_det_of_one_position_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    layer = pgf.ActNorm(3).double()
    layer(2.0 * x)
    helpers.assert_bijection(layer, x)
    monkeypatch.setattr(layer, "forward", lambda *args: _forget_positions(layer, *args))
    with pytest.raises(AssertionError):
        helpers.assert_bijection(layer, x)


def test_an_ill_conditioned_case_decides_nothing_and_is_refused() -> None:
    layer = Linear()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1e-14])))
    with pytest.raises(AssertionError, match="decides nothing"):
        helpers.assert_bijection(layer, torch.randn(4, 3, dtype=torch.float64))


def test_jacobian_is_per_sample() -> None:
    x, factor = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    got = helpers.jacobian(lambda values, factors: values.square() * factors, x, factor)
    helpers.assert_close(got, torch.diag_embed(2.0 * x * factor))
    helpers.assert_close(helpers.log_abs_det(got), (2.0 * x * factor).abs().log().sum(1))


def test_close_is_close() -> None:
    x = torch.randn(4, 10, dtype=torch.float64)
    helpers.assert_close(x, x)
    helpers.assert_close(x + 1e-14, x)
    helpers.assert_close(x[:0], x[:0])
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(x + 1e-10, x)
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(x.float() + 1e-3, x)
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(torch.full_like(x, float("nan")), x)
    with pytest.raises(AssertionError, match="shape"):
        helpers.assert_close(x[:1], x)


def test_kernel_close_measures_against_plain_torch() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    plain = exact.float() + 1e-5 * torch.randn(1000)
    helpers.assert_kernel_close(plain, plain, exact)
    helpers.assert_kernel_close(exact.float(), plain, exact)
    helpers.assert_kernel_close(exact, exact, exact)
    helpers.assert_kernel_close(exact[:0].float(), plain[:0], exact[:0])
    three_times = (exact + 3.0 * (plain.double() - exact)).float()
    for wrong in (three_times, -exact.float(), torch.zeros(1000), plain * float("nan")):
        with pytest.raises(AssertionError):
            helpers.assert_kernel_close(wrong, plain, exact)
    with pytest.raises(AssertionError):
        helpers.assert_kernel_close(exact + 1e-8, exact, exact)
    with pytest.raises(AssertionError, match="dtype"):
        helpers.assert_kernel_close(exact, plain, exact)
    with pytest.raises(AssertionError, match="shapes"):
        helpers.assert_kernel_close(plain[:5], plain, exact)


def test_layouts_differ_in_strides_only() -> None:
    x = torch.randn(2, 3, 4, 5)
    layouts = helpers.memory_layouts(x)
    assert "channels_last" in layouts
    assert "channels_last_3d" in helpers.memory_layouts(torch.randn(2, 3, 4, 5, 2))
    for name, layout in layouts.items():
        assert torch.equal(layout, x)
        assert layout.stride() != x.stride() or layout.storage_offset() != 0, name
