"""Nets in another precision than the flow state, which stays float32."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.chain_cases import only_python
from support.gradients import perturbed
from support.tf32 import SETTINGS, in_tf32
from torch import Tensor, nn

import pyglow_fast as pgf

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def model(precision: str = "auto", **options: object) -> pgf.Glow:
    torch.manual_seed(0)
    found = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=8, hidden=16, precision=precision, **options)
    for name, parameter in found.named_parameters():
        if "conv3" in name:
            nn.init.normal_(parameter, std=0.02)
    found.initialize(images(16))
    return found


def images(n: int) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1)) - 0.5


@pytest.mark.parametrize(
    ("mode", "home"),
    [
        *((mode, "compiled") for mode in ("store", "checkpoint", "reversible")),
        *((mode, "python") for mode in ("checkpoint", "reversible")),
        ("reversible", "modules"),
    ],
)
def test_what_is_decoded_in_fp32_is_differentiated_in_it(mode: str, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model is in: the call's precision holds in its backward, which comes later."""
    if home == "python":
        only_python(monkeypatch)
    latents = [latent.detach() for latent in model().encode(images(2))]

    def found(glow: pgf.Glow, own_precision: str, precision: str = "fp32") -> Tensor:
        glow.precision, dtype = own_precision, next(glow.parameters()).dtype
        if home == "modules":  # called one by one
            glow.levels[0].steps[0].register_forward_hook(lambda *_: None)
        leaves = [latent.to(dtype).requires_grad_() for latent in latents]
        value = glow.decode(leaves, precision=precision).square().sum()
        own = [value for name, value in glow.named_parameters() if "steps" in name]
        return torch.cat([grad.flatten().double() for grad in torch.autograd.grad(value, [*leaves, *own])])

    exact = found(model(memory="store").double(), "fp32")
    full, half = (float((found(model(memory=mode), own) - exact).norm()) for own in ("fp32", "bf16"))
    coarse = float((found(model(memory=mode), "bf16", "auto") - exact).norm())
    assert half <= 2.0 * full < 0.1 * coarse


def test_fp32_is_float32_under_autocast() -> None:
    x, glow = images(4), model(learn_prior=False)
    with torch.no_grad():
        expected = glow.log_prob(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.allclose(glow.log_prob(x), expected, rtol=1e-6)
            glow.precision = "fp32"
            assert torch.allclose(glow.log_prob(x), expected, rtol=1e-6)


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2**-7), ("fp16", 2**-10), ("fp32", 1e-5), ("auto", 1e-5)])
def test_round_trip(precision: str, bound: float) -> None:
    glow, x = model().eval(), images(8)
    with torch.no_grad():
        latents = glow.encode(x, precision=precision)
        error = float((glow.decode(latents, precision=precision) - x).abs().max())
    assert error < bound
    if precision in HALVES:
        assert error > 1e-6, "the nets were not in 16 bits"


class TestEncoding:
    def test_is_float32_whatever_the_model_is(self) -> None:
        x = images(4)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            expected = model().encode(x)
            for precision in HALVES:
                glow = model()  # actnorm's initialisation sees the nets, too
                glow.precision = precision
                torch.testing.assert_close(glow.encode(x), expected, rtol=1e-5, atol=1e-6)
                assert torch.allclose(glow.decode(glow.encode(x)), x, atol=1e-5)
                assert glow.precision == precision
            glow.precision = "auto"
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.allclose(glow.encode(x)[-1], expected[-1], rtol=1e-5, atol=1e-6)


class TestOnAGpu:
    """Which rounds what convolutions and products multiply to TF32, where torch's settings let it."""

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_encoding_is_undone_whatever_the_settings_are(self, setting: str, device: torch.device) -> None:
        """Nets and priors in float32: the bound is that of TestEncoding on the CPU."""
        glow, x = model().eval(), images(8)
        perturbed(glow.levels, 0.01)
        with torch.no_grad():
            expected = glow.encode(x)
            with in_tf32(setting, device):
                latents = glow.to(device).encode(x.to(device))
                back = glow.decode(latents)
        assert torch.allclose(back.cpu(), x, atol=1e-5)
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5, check_device=False)
