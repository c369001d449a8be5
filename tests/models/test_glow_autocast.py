"""The model under autocast: the nets may run in bfloat16, the flow keeps its dtype."""

from __future__ import annotations

import pytest
import torch

import pyglow_fast as pgf


@pytest.mark.parametrize("classes", [None, 3])
def test_autocast_is_for_the_nets_only(classes: int | None) -> None:
    model = pgf.Glow(image_shape=(2, 8, 8), n_levels=2, n_steps=2, hidden=8, n_classes=classes)
    x = torch.rand(8, 2, 8, 8) - 0.5
    y = None if classes is None else torch.arange(8) % classes
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    exact = model.log_prob(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = model.log_prob(x, y)
        latents = model.encode(x)
        decoded = model.decode(latents)
    assert log_prob.dtype == torch.float32
    assert all(latent.dtype == torch.float32 for latent in latents)
    # The nets see the same kept halves both ways up to rounding of the state, so the round trip stays close to exact.
    assert (decoded - x).abs().max() < 0.02
    # bfloat16 has 8 bits: the nets' outputs, and with them log_prob, differ by about that much.
    assert torch.allclose(log_prob, exact, rtol=0.05)
    assert not torch.equal(log_prob, exact), "autocast did not reach the nets"
    log_prob.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
