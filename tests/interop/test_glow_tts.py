"""Glow-TTS's decoder accelerated: a model of its interface that the tests write, with both of torch's weight norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.accelerate_cases import slope
from support.glow_tts_cases import TextDecoder, TextInvConv, TextWaveNet, mask_of_lengths, moved
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast.interop import accelerate, glow_tts

LENGTHS, TIME = (17, 16, 9, 3), 17


@pytest.fixture(autouse=True)
def _sizes_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours runs on the small batches here."""
    monkeypatch.setattr(glow_tts, "LEAST_POSITIONS", 0)


def decoder(steps: int = 3, **options: Any) -> TextDecoder:
    settings: dict[str, Any] = {"kernel": 3, "rate": 2, "layers": 2, **options}
    return moved(TextDecoder(4, 6, steps, **settings)).double()


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(len(LENGTHS), 4, TIME, dtype=torch.float64), mask_of_lengths(LENGTHS, TIME)


@pytest.mark.full
@pytest.mark.parametrize("memory", [None, "reversible"])
def test_autocast_is_within_twice_their_error(memory: str | None) -> None:
    errors: list[list[Tensor]] = [[], []]
    for _ in range(4):
        model, (x, mask) = decoder(), batch()
        exact = dict(zip(("z", "log_det"), model(x, mask), strict=True))
        model.float()
        for kept in errors:
            with torch.autocast("cpu", torch.bfloat16):
                z, log_det = model(x.float(), mask.float())
            assert z.dtype == torch.float32
            for name, value in {"z": z, "log_det": log_det}.items():
                kept.append(((value.double() - exact[name]).norm() / exact[name].norm()).square())
            accelerate(model, memory=memory)
    theirs, ours = (torch.stack(kept).mean().sqrt() for kept in errors)
    assert 1e-4 < ours <= 2.0 * theirs


def test_what_lies_behind_the_end_has_no_influence() -> None:
    model = decoder()
    done = accelerate(model, memory="reversible")
    run = model.flows[0]
    x, mask = torch.randn(3, 8, 7, dtype=torch.float64), mask_of_lengths((7, 5, 1), 7)
    z, log_det = run(x * mask, mask)
    spoilt = x.masked_fill(mask == 0, float("nan")).requires_grad_()
    again, again_log_det = run(spoilt, mask)
    (again.sum() + again_log_det.sum()).backward()
    torch.testing.assert_close((again, again_log_det), (z, log_det), rtol=1e-12, atol=1e-12)
    assert torch.equal(again * mask, again)
    assert bool(spoilt.grad.isfinite().all())
    assert done.joined


def test_dropout_repeats_in_the_backward() -> None:
    """The gradient of a chain that runs its nets again is that of the numbers that the forward drew."""
    gradients = []
    for memory in ("checkpoint", "reversible"):
        torch.manual_seed(0)
        model, (x, mask) = decoder(drop=0.4), batch()
        accelerate(model, memory=memory)

        def loss(model: nn.Module = model, x: Tensor = x, mask: Tensor = mask) -> Tensor:
            torch.manual_seed(5)
            z, log_det = model(x, mask)
            return z.square().sum() - log_det.sum()

        loss().backward()
        bias = model.get_submodule("flows.2").end.bias
        gradients.append(bias.grad)
        exact = float(bias.grad.sum())
        assert abs(slope(loss, bias) - exact) <= 1e-4 * abs(exact)
    assert torch.allclose(*gradients, rtol=1e-9)


def test_stored_inverses_pass_through_a_run() -> None:
    x, mask = batch()
    model = decoder(norm="none")
    accelerate(model, memory="reversible")
    model.store_inverse()
    assert all(module.weight_inv is not None for module in model.modules() if isinstance(module, TextInvConv))
    z, _ = model(x, mask)
    there = mask[:, :, 1::2].repeat_interleave(2, dim=2)
    back = model(z, mask[:, :, :16], reverse=True)[0]
    assert_close(back, x[:, :, :16] * there, dtype=torch.float32)  # theirs inverts in it
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TextInvConv):
                module.weight_inv.mul_(2.0)  # no longer the inverse: theirs goes by it, and so does ours
    scaled, _ = model(z, mask[:, :, :16], reverse=True)
    assert float((scaled - x[:, :, :16] * there).abs().max()) > 0.1


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
def test_a_list_that_ends_with_maps(memory: str) -> None:
    """Their log-dets count the positions of each sample, and their offsets are nowhere else."""
    model, (x, mask) = decoder(), batch()
    model.flows = nn.ModuleList([*model.flows[3:], *model.flows[:2]])
    expected = model(x, mask)
    accelerate(model, memory=memory)
    for records in (True, False):
        with torch.set_grad_enabled(records):
            assert_close(model(x, mask), expected)


def test_a_mask_of_other_numbers_goes_to_their_own_code() -> None:
    model, (x, mask) = decoder(), batch()
    expected = model(x, mask * 0.5)[0]
    accelerate(model, memory="reversible")
    assert_close(model(x, mask * 0.5)[0], expected)


class LateDropout(TextWaveNet):
    def forward(self, x: Tensor, x_mask: Tensor | None = None, g: Tensor | None = None, **kwargs: Any) -> Tensor:
        kept, self.drop.p = self.drop.p, 0.0
        out = super().forward(x, x_mask, g)
        self.drop.p = kept
        return self.drop(out)


def test_other_arithmetic_is_left_with_its_reason() -> None:
    model = decoder(steps=1)
    model.flows[2].wn.__class__ = LateDropout
    done = accelerate(model)
    assert sorted(done.replaced) == ["flows.1"]
    assert "its result 0 of forward differs" in done.left["flows.2.wn"]
    assert "flows.2" in done.left


def test_other_structures_are_left_with_their_reason() -> None:
    model = decoder(steps=4, norm="none")
    nn.utils.parametrizations.spectral_norm(model.flows[11].wn.in_layers[1])
    model.flows[2].wn.in_layers[0].stride = (2,)
    model.flows[5].wn.res_skip_layers[1].register_forward_hook(lambda *_: None)
    done = accelerate(model, memory="reversible")
    assert "stride=(2,)" in done.left["flows.2.wn"]
    assert "hooks" in done.left["flows.5"]
    assert "flows.8" in done.replaced
    assert "not joined" in done.left["flows.8"]
    assert "no weight norm" in done.left["flows.11.wn"]


def test_a_wavenet_alone_is_served() -> None:
    net = moved(TextWaveNet(6, 5, 1, 3, cond=2)).double()
    x, mask, g = torch.randn(3, 6, 9).double(), mask_of_lengths((9, 4, 2), 9), torch.randn(3, 2, 1).double()
    calls = [lambda: net(x * mask, mask, g=g), lambda: net(x), lambda: net(x, mask)]  # the last with padding not zero
    expected = [call() for call in calls]
    assert list(accelerate(net).replaced) == [""]
    assert_close([call() for call in calls], expected)
