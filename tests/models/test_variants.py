"""Every permutation with every coupling, with and without learned priors and classes: one model, one density."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from support.helpers import assert_close
from support.plain_glow import plain_log_prob

import pyglow_fast as pgf
from pyglow_fast.layers.flow_step import PERMUTATIONS
from pyglow_fast.reference import COUPLINGS

CONDITION = 1000.0  # as for the models of glow_settings, which these are like
VARIANTS = list(product(PERMUTATIONS, COUPLINGS, [True, False], [None, 3]))


@pytest.mark.full
@pytest.mark.parametrize(("permutation", "coupling", "learn_prior", "n_classes"), VARIANTS)
def test_density_gradients_and_round_trip(
    permutation: str, coupling: str, learn_prior: bool, n_classes: int | None
) -> None:
    model = pgf.Glow(
        image_shape=(1, 4, 8),
        n_levels=2,
        n_steps=2,
        hidden=5,
        permutation=permutation,
        coupling=coupling,
        learn_prior=learn_prior,
        n_classes=n_classes,
    ).double()
    x = torch.rand(64, 1, 4, 8, dtype=torch.float64) - 0.5
    model.initialize(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, y = x[:4], None if n_classes is None else torch.tensor([2, 0, 1, 2])
    parameters = dict(model.named_parameters())
    log_prob = model.log_prob(x, y)
    gradients = torch.autograd.grad(log_prob.sum() / 32, list(parameters.values()))
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    leaves = [state[name].requires_grad_() for name in parameters]
    plain = plain_log_prob(state, model.config, x, y)
    assert_close(log_prob / 32, plain / 32, condition=CONDITION)
    for got, expected in zip(gradients, torch.autograd.grad(plain.sum() / 32, leaves), strict=True):
        assert_close(got, expected, condition=CONDITION)
    assert_close(model.decode(model.encode(x)), x, condition=CONDITION)
    noise, log_det = model.to_noise(x, y)
    again, back = model.from_noise(noise, y)
    assert_close(again, x, condition=CONDITION)
    assert_close(log_det / 32, -back / 32, condition=CONDITION)
