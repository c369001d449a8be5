"""CouplingNet: its formula, its start, its condition, and the ring of ones around the image that a border term is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.captures import use_library
from support.covering import pairs
from support.gradients import assert_stored_gradients, batch, ready
from support.helpers import assert_close
from support.net_cases import randomised
from support.plain_glow import plain_net, with_ring
from torch import nn

import pyglow_fast as pgf
from pyglow_fast.models.prior import TopPrior


@pairs(
    pytest.mark.parametrize("border", [False, True]),
    pytest.mark.parametrize("actnorm", [False, True]),
    pytest.mark.parametrize("cond_channels", [0, 2]),
    pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 1, 3), (1, 1)], ids=str),
)
def test_formula(actnorm: bool, cond_channels: int, spatial: tuple[int, ...], border: bool) -> None:
    """Folded, and layer by layer, as where a hook keeps the net from being folded."""
    net = randomised(pgf.CouplingNet(2, 5, 4, actnorm, cond_channels, border=border, dims=len(spatial))).eval()
    x = torch.randn(3, 2, *spatial, dtype=torch.float64)
    cond = torch.randn(3, cond_channels, *spatial, dtype=torch.float64) if cond_channels else None
    expected = plain_net(dict(net.named_parameters()), x if cond is None else torch.cat([x, cond], dim=1))
    out = net(x, cond)
    assert out.shape == (3, 5, *spatial)
    assert_close(out, expected, condition=10.0)
    net.conv2.register_forward_hook(lambda *_: None)
    assert_close(net(x, cond), expected, condition=10.0)


def test_starts_with_the_variance_kept_and_no_border_term() -> None:
    net = pgf.CouplingNet(64, 2, 512, border=True)
    # 1x1 of 512 inputs: sqrt(2 / 512) is about the paper's 0.05 (0.0625); the standard error is below one percent.
    assert net.conv2.weight.std().item() == pytest.approx((2.0 / 512) ** 0.5, rel=0.03)
    assert net.conv1.weight.std().item() == pytest.approx((2.0 / (9 * 64)) ** 0.5, rel=0.03)
    assert not any(value.any() for value in (net.conv1.bias, net.conv2.bias, net.border1, net.border3))


@pytest.mark.parametrize("border", [False, True])
def test_hidden_actnorms_initialise_from_what_reaches_them(border: bool) -> None:
    net = pgf.CouplingNet(2, 4, 6, actnorm=True, cond_channels=1, border=border).double()
    nn.init.normal_(net.border1 if border else net.log_gain, std=0.3)
    x, cond = (torch.randn(8, channels, 4, 5, dtype=torch.float64) * 3.0 for channels in (2, 1))
    assert not net.is_initialized
    net.initialize(x, cond)
    assert net.is_initialized
    hidden = with_ring(torch.cat([x, cond], dim=1), net.conv1.weight, net.border1 if border else None, None)
    for norm in (net.norm1, net.norm2):
        std = hidden.std((0, 2, 3), correction=0)
        hidden = norm(hidden)[0]
        assert_close(hidden.mean((0, 2, 3)), torch.zeros(6).double(), condition=10.0)
        assert_close(hidden.square().mean((0, 2, 3)).sqrt(), std / (std + norm.eps), condition=10.0)
        hidden = net.conv2(hidden.relu())


# ---- The border term ----


@pytest.mark.parametrize("backend", ["own", "library"])
@pytest.mark.parametrize("actnorm", [False, True])
def test_gradients(actnorm: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "library":
        use_library(monkeypatch)
    net = randomised(pgf.CouplingNet(2, 3, 4, actnorm, border=True)).eval()
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs, weights = [x, *net.parameters()], torch.randn(2, 3, 3, 4, dtype=torch.float64)
    found = torch.autograd.grad((net(x) * weights).sum(), inputs)
    expected = torch.autograd.grad((plain_net(dict(net.named_parameters()), x) * weights).sum(), inputs)
    assert_close(found, expected, condition=100.0)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"net_actnorm": True}, (6, 3)),
        ({"coupling": "additive", "cond_channels": 2}, (6, 3)),
        ({"dims": 1}, (7,)),
        ({"dims": 3}, (4, 2, 3)),
    ],
    ids=str,
)
def test_gradients_of_runs_in_strips(options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """A budget of one byte cuts every sample into strips of a row or so: the border stays that of the image."""
    cond = torch.randn(64, 2, *sizes, dtype=torch.float64) if "cond_channels" in options else None
    sequence = ready([pgf.FlowStep(4, 5, border=True, **options) for _ in range(3)], (4, *sizes), cond)
    found = assert_stored_gradients(sequence, batch(3, 4, *sizes), None if cond is None else cond[:3])
    assert all(found[key].any() for key in found if "border" in key)


def test_the_term_changes_the_rim_alone() -> None:
    prior = randomised(TopPrior(3, border=True))
    mean, log_sd = prior(torch.zeros(2, 3, 4, 5).double(), None)
    assert mean.shape == log_sd.shape == (1, 3, 4, 5)
    assert_close(mean[0, :, 1:-1, 1:-1], prior.mean_log_sd[:3].reshape(3, 1, 1).expand(3, 2, 3))
    split = randomised(pgf.Split(4, border=True))
    kept = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    expected = with_ring(kept, split.conv.weight, split.border, split.conv.bias) * (3.0 * split.log_gain).exp()
    assert_close(torch.cat(split.prior(kept), dim=1), expected, condition=10.0)
