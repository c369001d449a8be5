"""The classifier on the top latent: its formula, its gradients through every memory mode, and one pass for all."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.glow_settings import CONDITION, Setting
from support.helpers import assert_close
from support.plain_glow import plain_encode, plain_log_prob
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast.models.class_head import ClassHead, class_bits

WEIGHT = 0.7
LABELS = torch.tensor([2, 0, 1, 2])


def small(n_classes: int | None) -> Setting:
    """A model with a classifier."""
    return Setting("classes", image_shape=(1, 4, 8), n_classes=n_classes, classify=3)


def plain_loss(model: pgf.Glow, state: dict[str, Tensor], x: Tensor, labels: Tensor, y: Tensor | None) -> Tensor:
    """Bits/dim + WEIGHT times the bits of the labels, written out, by ordinary autograd."""
    n_values = model.config.n_values
    top = plain_encode(state, model.config, x, y)[0][-1][0]
    pooled = top.mean(dim=tuple(range(2, top.dim())))
    logits = (pooled @ state["head.weight"].T + state["head.bias"]) * (3 * state["head.log_gain"]).exp()
    cost = (logits.logsumexp(1) - logits[torch.arange(len(x)), labels]) / math.log(2)
    bits = -plain_log_prob(state, model.config, x, y) / (n_values * math.log(2))
    return (bits + WEIGHT * cost).mean()


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 4, 3, 5), (2, 4, 1, 2, 3)], ids=str)
def test_the_formula(shape: tuple[int, ...]) -> None:
    head, z = ClassHead(4, 3).double(), torch.randn(shape, dtype=torch.float64)
    assert not head(z).any()  # a fresh one finds all classes equally likely
    assert torch.allclose(class_bits(head(z), torch.tensor([0, 2])), torch.full((2,), math.log2(3)).double())
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    pooled = z.flatten(2).sum(2) / math.prod(shape[2:])
    expected = torch.stack([(head.weight[k] * pooled).sum(1) + head.bias[k] for k in range(3)], 1)
    assert_close(head(z), expected * torch.exp(3 * head.log_gain))
    with torch.autocast("cpu"):
        assert head.float()(z.float()).dtype == torch.float32


@pytest.mark.parametrize("memory", ["reversible", "checkpoint", "store"])
@pytest.mark.parametrize("n_classes", [None, 3])
def test_gradients_are_those_of_the_plain_computation(memory: str, n_classes: int | None) -> None:
    setting = small(n_classes)
    model, x, y = setting.model, setting.x, setting.y
    model.memory = memory
    parameters = dict(model.named_parameters())
    log_prob, logits = model.log_prob_and_logits(x, y)
    value = (WEIGHT * class_bits(logits, LABELS) - log_prob / (model.config.n_values * math.log(2))).mean()
    gradients = torch.autograd.grad(value, list(parameters.values()))
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    leaves = [state[name].requires_grad_() for name in parameters]
    plain = plain_loss(model, state, x, LABELS, y)
    assert_close(value, plain, condition=CONDITION)
    for name, got, expected in zip(parameters, gradients, torch.autograd.grad(plain, leaves), strict=True):
        assert expected.abs().max() > 0, name
        assert_close(got, expected, condition=CONDITION)


def test_one_call_gives_the_likelihood_of_the_model_without_it_and_the_logits() -> None:
    setting = small(3)
    model, x, y = setting.model.eval(), setting.x, setting.y
    log_prob, logits = model.log_prob_and_logits(x, y)
    assert torch.equal(log_prob, model.log_prob(x, y))
    assert torch.equal(logits, model.class_logits(x))
    assert model.head is not None
    assert torch.equal(logits, model.head(model(x)[0][-1]))
    assert logits.shape == (4, 3)
    assert torch.equal(model.freeze().class_logits(x), model.freeze().log_prob_and_logits(x, y)[1])
    plain = pgf.Glow(replace(setting.config, classify=0)).double()
    missing, extra = plain.load_state_dict(model.state_dict(), strict=False)
    assert (missing, sorted(extra)) == ([], ["head.bias", "head.log_gain", "head.weight"])
    assert torch.equal(plain.eval().log_prob(x, y), log_prob)
