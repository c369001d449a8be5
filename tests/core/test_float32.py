"""What the flow multiplies itself is as exact as float32, whatever torch's settings let its libraries round to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_kernel_close
from support.tf32 import SETTINGS, TF32_EPS, compiling, in_tf32, reset, rounded
from torch import Tensor
from torch.nn import functional as F

import pyglow_fast as pgf
from pyglow_fast import functional, ops, reference
from pyglow_fast.layers import GroupedInvConv
from pyglow_fast.layers.border import border_map
from pyglow_fast.layers.flow_step import after
from pyglow_fast.models.class_head import ClassHead
from pyglow_fast.reversible.drift import LEAST_EPS, PROJECTION_SLACK, norms, project
from pyglow_fast.reversible.steps import ChannelMap

C = 12
SHAPES = [(3, C), (3, C, 40), (3, C, 6, 8), (3, C, 4, 6, 2)]
by_setting = pytest.mark.parametrize("setting", SETTINGS)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_kernels = pytest.mark.parametrize("kernels", [True, False])
Backends: Any = torch.backends


class TestEmulation:
    """That the emulator rounds, where it should and only there: else no test with it could fail."""

    def test_rounds_to_the_nearest_half_away_from_zero(self) -> None:
        ulp = 2.0**-23
        x = torch.tensor(
            [1.0, 1 + 2**-11 - ulp, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11, 3e38, float("inf"), float("nan")]
        )
        expected = [1.0, 1.0, 1 + 2**-10, 1 + 2**-9, -1 - 2**-10]
        assert rounded(x)[:5].tolist() == expected
        assert rounded(x)[6] == float("inf")
        assert rounded(x)[7].isnan()
        drawn = torch.randn(1000)
        assert float(((rounded(drawn) - drawn) / drawn).abs().max()) <= TF32_EPS / 2
        assert torch.equal(rounded(rounded(drawn)), rounded(drawn))

    @by_setting
    def test_where_the_settings_say_so(self, setting: str) -> None:
        a, b = torch.randn(5, 8, 8), torch.randn(5, 8, 8)
        functions: dict[str, Callable[[], Tensor]] = {
            "mm": lambda: a[0] @ b[0],
            "addmm": lambda: torch.addmm(a[1], a[0], b[0]),
            "bmm": lambda: a @ b,
            "einsum": lambda: torch.einsum("kij,kjl->kil", a, b),
            "linear": lambda: F.linear(a, b[0], b[0, 0]),
            "conv": lambda: F.conv1d(a, b[0, :, :, None], b[0, 0]),
            "mv": lambda: a[0] @ b[0, 0],
        }
        for name, function in functions.items():
            exact = function()
            with in_tf32(setting):
                same = torch.equal(function(), exact)
            rounds = name == "conv" or (name != "mv" and setting != "as torch comes")
            assert same == (not rounds), name

    def test_in_the_backward_too(self) -> None:
        x, weight, grad = torch.randn(2, 4, 9), torch.randn(3, 4, 3), torch.randn(2, 3, 7)
        weight.requires_grad_()

        def gradient() -> Tensor:
            return torch.autograd.grad(F.conv1d(x, weight), weight, grad)[0]

        exact = gradient()
        with in_tf32() as mode:
            assert not torch.equal(gradient(), exact)
            Backends.cudnn.conv.fp32_precision = "ieee"
            assert torch.equal(gradient(), exact)
        assert mode.counts == {"matmul": 0, "conv": 2}

    def test_float64_is_not_rounded(self) -> None:
        a = torch.randn(8, 8, dtype=torch.float64)
        exact = a @ a
        with in_tf32("high") as mode:
            assert torch.equal(a @ a, exact)
        assert mode.counts["matmul"] == 0


def in_float64(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    return function(*(value.double() if value.is_floating_point() else value for value in values))


def assert_not_rounded(
    function: Callable[..., Tensor], *values: Tensor, setting: str, device: torch.device, magnitude: float = 0.0
) -> None:
    """In TF32 the error is at most twice that of the same in float32."""
    values = tuple(value.to(device) for value in values)
    exact, plain = in_float64(function, *(v.cpu() for v in values)), function(*(v.cpu() for v in values))
    with in_tf32(setting, device):
        found = function(*values)
    assert_kernel_close(found.cpu(), plain, exact, magnitude)


class TestState:
    @pairs(by_shape, by_setting, by_kernels)
    def test_channel_mix_there_and_back(
        self,
        shape: tuple[int, ...],
        setting: str,
        kernels: bool,
        device: torch.device,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if not kernels:
            monkeypatch.setattr(ops, "run_on", lambda x: False)
        x, matrix, offset = torch.randn(shape), torch.randn(C, C), torch.randn(C)
        for function in (functional.channel_mix, functional.channel_unmix):
            assert_not_rounded(
                function, x, matrix, offset, setting=setting, device=device, magnitude=float(x.abs().max()) * C**0.5
            )

    @by_setting
    def test_gradients_by_the_reference(self, setting: str, device: torch.device) -> None:
        x, matrix, offset = torch.randn(3, C, 40), torch.randn(C, C), torch.randn(C)
        for place in range(3):

            def gradient(*values: Tensor, place: int = place) -> Tensor:
                leaves = [value.detach().requires_grad_() for value in values]
                z = reference.channel_mix(*leaves)  # type: ignore[arg-type]
                return torch.autograd.grad((z * z).sum(), leaves[place])[0]

            assert_not_rounded(gradient, x, matrix, offset, setting=setting, device=device, magnitude=float(C * 40))

    @pairs(
        pytest.mark.parametrize("name", ["lu", "weight", "grouped", "permute"]),
        by_shape,
        by_setting,
        by_kernels,
    )
    def test_permutations_there_and_back(
        self,
        name: str,
        shape: tuple[int, ...],
        setting: str,
        kernels: bool,
        device: torch.device,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A rotation sums C terms each way, each rounded C times by half an eps, of entries and x at most 1."""
        if not kernels:
            monkeypatch.setattr(ops, "run_on", lambda x: False)
        layer: pgf.layers.FlowLayer = {
            "lu": pgf.InvConv(C),
            "weight": pgf.InvConv(C, lu=False),
            "grouped": GroupedInvConv(C),
            "permute": pgf.Permute(C),
        }[name].to(device)
        x = torch.rand(shape, device=device)
        with torch.no_grad(), in_tf32(setting, device):
            back, _ = layer.inverse(layer(x)[0])
        bound = 4 * C * C * 2.0**-24
        assert bound < TF32_EPS / 16
        assert float((back - x).abs().max()) <= bound


def bound_of_log_det(lower: Tensor, upper: Tensor) -> float:
    """What rounding of L U to float32, C terms to an entry, changes log|det| by, to first order: tr((LU)^-1 delta)."""
    product = lower @ upper
    return float((torch.linalg.inv(product).abs() * ((C + 1) * 2.0**-24 * (lower.abs() @ upper.abs())).T).sum())


class TestFolds:
    @by_setting
    def test_lu_weight_has_the_log_det_that_it_states(self, setting: str, device: torch.device) -> None:
        conv = pgf.InvConv(C).to(device)
        with torch.no_grad():
            for factor in (conv.lower, conv.upper):
                factor.add_(0.3 * torch.randn(C, C, device=device))
            with in_tf32(setting, device):
                weight, log_det = conv.weight_and_log_det()
            eye = torch.eye(C, dtype=torch.float64)
            lower = conv.lower.cpu().double().tril(-1) + eye
            upper = conv.upper.cpu().double().triu(1) + torch.diag(
                (conv.sign_diag * conv.log_diag.exp()).cpu().double()
            )
        found = torch.linalg.slogdet(weight.cpu().double()).logabsdet
        assert abs(float(found - log_det.double().cpu())) <= bound_of_log_det(lower, upper)

    @by_setting
    def test_maps(self, setting: str, device: torch.device) -> None:
        weight, log_scale, bias = torch.randn(4, C, C), torch.randn(4, C), torch.randn(4, C)
        second = torch.randn(C, C)

        def offset(weight: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
            return reference.fold_actnorm(weight, log_scale, bias)[1]

        def composed(which: str) -> Callable[..., Tensor]:
            def compose(first: Tensor, second: Tensor, c: Tensor) -> Tensor:
                nothing = c.new_zeros(())
                return getattr(after(ChannelMap(first, c, nothing), ChannelMap(second, c, nothing)), which)

            return compose

        for function, values in (
            (offset, (weight, log_scale, bias)),
            (composed("matrix"), (weight[0], second, bias[0])),
            (composed("offset"), (weight[0], second, bias[0])),
        ):
            assert_not_rounded(function, *values, setting=setting, device=device, magnitude=float(C))

    @pytest.mark.parametrize("dims", [1, 2, 3])
    @by_setting
    def test_log_prob_of_a_glow(self, setting: str, dims: int, device: torch.device) -> None:
        """With nets in float32, so that nothing but the flow is multiplied."""
        torch.manual_seed(0)
        shape = (3, *[8] * dims)
        model = pgf.Glow(image_shape=shape, n_levels=2, n_steps=4, hidden=8, precision="fp32", learn_prior=False)
        x = torch.rand(8, *shape) - 0.5
        model.initialize(x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        exact, plain = (model.to(dtype).log_prob(x.to(dtype)).detach() for dtype in (torch.float64, torch.float32))
        with in_tf32(setting, device):
            found = model.to(device).log_prob(x.to(device)).detach().cpu()
        assert_kernel_close(found, plain, exact, magnitude=float(model.config.n_steps * x[0].numel()))

    @by_setting
    def test_gradient_of_an_inverse_map(self, setting: str) -> None:
        u, inverse, offset = torch.randn(3, C, 40), torch.randn(C, C), torch.randn(C)

        def gradient(u: Tensor, inverse: Tensor, offset: Tensor) -> Tensor:
            offset = offset.detach().requires_grad_()
            return torch.autograd.grad(functional.channel_unmix(u, inverse, offset).square().sum(), offset)[0]

        assert_not_rounded(
            gradient, u, inverse, offset, setting=setting, device=torch.device("cpu"), magnitude=float(C * C * 40)
        )


class TestWitnesses:
    """Their own rounding, as a drift, is below the least tolerance of a state in float32."""

    LEAST = LEAST_EPS * torch.finfo(torch.float32).eps

    @pairs(
        pytest.mark.parametrize("shape", [*SHAPES, (2, C, 64, 64)], ids=str),
        by_setting,
        pytest.mark.parametrize("channels_last", [False, True]),
    )
    def test_of_a_state(self, shape: tuple[int, ...], setting: str, channels_last: bool, device: torch.device) -> None:
        x = torch.randn(shape, device=device)
        if channels_last and len(shape) == 4:
            x = x.to(memory_format=torch.channels_last)
        exact = project(x.cpu().double())
        with in_tf32(setting, device):
            found = project(x).cpu().double()
        scale = PROJECTION_SLACK * norms(x.cpu().double())
        assert float(((found - exact) / scale).abs().max()) <= self.LEAST


class TestCpu:
    """A CPU with instructions for it rounds to bfloat16, where the settings ask for it."""

    @pytest.fixture(autouse=True)
    def _asked_for(self) -> Any:
        a = torch.randn(64, 64)
        exact = a @ a
        torch.set_float32_matmul_precision("medium")
        try:
            if torch.equal(a @ a, exact):
                pytest.skip("this CPU rounds nothing")
            yield
        finally:
            reset()

    def test_folds_and_witnesses(self) -> None:
        conv, x = pgf.InvConv(48), torch.randn(4, 48, 32, 32)
        with torch.no_grad():
            weight, log_det = conv.weight_and_log_det()
        assert abs(float(torch.linalg.slogdet(weight.double()).logabsdet - log_det)) <= 48 * 48 * 2.0**-24
        error = (project(x) - project(x.double())).abs() / (PROJECTION_SLACK * norms(x))
        assert float(error.max()) <= TestWitnesses.LEAST

    def test_what_the_reference_mixes(self) -> None:
        x, matrix, offset = torch.randn(3, 48, 0), torch.randn(48, 48), torch.randn(48)
        assert reference.channel_mix(x, matrix, offset).shape == x.shape
        Backends.mkldnn.conv.fp32_precision = "bf16"
        x = torch.randn(3, 48, 256)
        exact = reference.channel_mix(x.double(), matrix.double(), offset.double())
        assert float((reference.channel_mix(x, matrix, offset) - exact).abs().max()) <= 49 * 2.0**-24 * 48 * 16


@by_setting
class TestSurroundings:
    """In all of torch that a product of the flow may be met in."""

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(3, C, 40), torch.randn(C, C), torch.randn(C)

    def assert_exact(self, function: Callable[..., Tensor], setting: str, *values: Tensor) -> None:
        assert_not_rounded(function, *values, setting=setting, device=torch.device("cpu"), magnitude=4.0 * C**0.5)

    def test_exported(self, setting: str) -> None:
        class Mix(torch.nn.Module):
            def forward(self, x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
                return reference.channel_mix(x, matrix, offset)

        def exported(*values: Tensor) -> Tensor:
            found: Tensor = torch.export.export(Mix(), values).module()(*values)
            return found

        self.assert_exact(exported, setting, *self.values())

    def test_in_torch_func(self, setting: str) -> None:
        def batched(x: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
            return torch.func.vmap(lambda one: reference.channel_mix(one[None], matrix, offset)[0])(x)

        self.assert_exact(batched, setting, *self.values())

    def test_under_autocast(self, setting: str) -> None:
        def cast(*values: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return reference.channel_mix(*values)

        self.assert_exact(cast, setting, *self.values())


def test_compiled_without_a_break_and_again_where_the_setting_of_products_changes() -> None:
    torch.compiler.reset()
    x, matrix, offset = torch.randn(3, C, 40), torch.randn(C, C), torch.randn(C)
    compiled = torch.compile(lambda x: reference.channel_mix(x, matrix, offset), fullgraph=True, backend=compiling)
    exact, plain = (reference.channel_mix(x.to(d), matrix.to(d), offset.to(d)) for d in (torch.float64, torch.float32))
    for setting in SETTINGS:
        with in_tf32(setting, rounds=False):
            found = compiled(x)
        assert_kernel_close(found, plain, exact, magnitude=4.0 * C**0.5)


@by_setting
def test_what_is_read_off_the_state(setting: str, device: torch.device) -> None:
    """The logits of a class head, and a border term, which a prior of the top latent may have."""

    def logits(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = ClassHead(C, 5).to(z)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            found: Tensor = head(z)
        return found

    values = torch.randn(3, C, 6, 8), torch.randn(5, C), torch.randn(5)
    assert_not_rounded(logits, *values, setting=setting, device=device, magnitude=C**0.5)
    kernel = torch.randn(5, 1, 3, 3)
    assert_not_rounded(lambda kernel: border_map(kernel, (6, 8)), kernel, setting=setting, device=device, magnitude=3.0)
