"""A Glow as a torch Distribution and Transform: the same numbers, and it composes with torch.distributions and zuko."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zuko
from support.glow_settings import Setting
from torch import Tensor
from torch.distributions import AffineTransform, Independent, Normal, TransformedDistribution

from pyglow_fast import Glow
from pyglow_fast.models.distribution import GlowTransform

SHAPE = (2, 4, 4)


def make(**fields: Any) -> Glow:
    """A small Glow in float64 whose every parameter is at work."""
    torch.manual_seed(0)
    return Setting("default", spread=0.05, image_shape=SHAPE, **fields).model.eval()


@pytest.fixture(scope="module")
def model() -> Glow:
    return make()


def images(*lead: int) -> Tensor:
    return torch.rand(*lead, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 0.5


def test_log_prob_of_any_leading_shape(model: Glow) -> None:
    p = model.as_distribution()
    x = images(3, 2)
    assert (p.batch_shape, p.event_shape) == (torch.Size(), torch.Size(SHAPE))
    expected = model.log_prob(x.flatten(0, 1)).reshape(3, 2)
    torch.testing.assert_close(p.log_prob(x), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(p.log_prob(x[0, 0]), expected[0, 0], rtol=1e-12, atol=0)


def test_samples_are_the_model_s(model: Glow) -> None:
    p = model.as_distribution()
    assert p.sample().shape == SHAPE
    assert p.sample((3, 2)).shape == (3, 2, *SHAPE)
    assert not p.sample((2,)).requires_grad
    x = p.rsample((500,))
    assert bool(p.support.check(x).all())
    with torch.no_grad():  # both estimate the entropy: the samples are those of the density
        scores = p.log_prob(x.detach()), model.log_prob(model.sample(500))
    error = (scores[0].var() / 500 + scores[1].var() / 500).sqrt()
    assert abs(scores[0].mean() - scores[1].mean()) < 4 * error


def test_rsample_is_differentiable(model: Glow) -> None:
    (gradient,) = torch.autograd.grad(model.as_distribution().rsample((2,)).sum(), [model.prior.mean_log_sd])
    assert gradient.abs().sum() > 0
    eps = torch.randn(1, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(GlowTransform(model), eps)


def test_the_transform_against_an_explicit_jacobian(model: Glow) -> None:
    transform = GlowTransform(model)
    eps = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x, ladj = transform.call_and_ladj(eps)
    jacobian = torch.autograd.functional.jacobian(lambda value: transform(value).flatten(), eps)
    torch.testing.assert_close(ladj, torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.log_abs_det_jacobian(eps, x), ladj, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.inv(x), eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(transform.inv.log_abs_det_jacobian(x, eps), -ladj, rtol=1e-9, atol=1e-9)
    assert transform.forward_shape((7, 32)) == (7, *SHAPE)
    assert transform.inverse_shape((7, *SHAPE)) == (7, 32)
    assert bool(transform.domain.check(eps))
    assert bool(transform.codomain.check(x))


def test_it_composes_with_torch_distributions(model: Glow) -> None:
    base = Independent(Normal(torch.zeros(32).double(), 1.0), 1)
    p = TransformedDistribution(base, [GlowTransform(model)])
    x = images(5)
    torch.testing.assert_close(p.log_prob(x), model.log_prob(x), rtol=1e-10, atol=1e-10)
    assert p.rsample((2,)).shape == (2, *SHAPE)
    # What a level of [0, 256) is worth: the images stretched.
    stretched = TransformedDistribution(model.as_distribution(), [AffineTransform(0.5, 256.0, event_dim=3)])
    expected = model.log_prob(x) - 32 * math.log(256.0)
    torch.testing.assert_close(stretched.log_prob(0.5 + 256 * x), expected, rtol=1e-10, atol=1e-10)


def test_it_composes_with_zuko(model: Glow) -> None:
    flow = zuko.distributions.NormalizingFlow(
        GlowTransform(model).inv, zuko.distributions.DiagNormal(torch.zeros(32).double(), torch.ones(32).double())
    )
    x = images(5)
    torch.testing.assert_close(flow.log_prob(x), model.log_prob(x), rtol=1e-10, atol=1e-10)
    assert flow.rsample((3,)).shape == (3, *SHAPE)


def test_independent_and_expanded(model: Glow) -> None:
    p = model.as_distribution().expand((3,))
    assert p.batch_shape == (3,)
    assert p.sample((2,)).shape == (2, 3, *SHAPE)
    x = images(2, 3)
    torch.testing.assert_close(
        Independent(p, 1).log_prob(x), model.log_prob(x.flatten(0, 1)).reshape(2, 3).sum(1), rtol=1e-12, atol=0
    )
    assert p.log_prob(x[0, 0]).shape == (3,)
    assert p.expand((2, 3)).sample().shape == (2, 3, *SHAPE)
    for shape in ((2,), (), (3, 1)):
        with pytest.raises(RuntimeError, match="expand"):
            p.expand(shape)


def test_labels_and_conditions() -> None:
    classes = make(n_classes=3)
    y = torch.tensor([0, 2])
    p = classes.as_distribution(y)
    assert p.batch_shape == (2,)
    x = images(2)
    torch.testing.assert_close(p.log_prob(x), classes.log_prob(x, y), rtol=1e-12, atol=0)
    torch.testing.assert_close(classes.as_distribution(y.to(torch.uint8)).log_prob(x), p.log_prob(x), rtol=0, atol=0)
    torch.testing.assert_close(classes.as_distribution(1).log_prob(x), classes.log_prob(x, torch.tensor([1, 1])))
    assert p.sample((4,)).shape == (4, 2, *SHAPE)
    for channels, shape in ((2, (2,)), (2, (5, 2)), (2, (5, 2, 4, 4)), (4, (5, 4, 4, 4)), (4, (4, 4, 4))):
        told, cond = make(cond_channels=channels), torch.rand(shape).double()
        q = told.as_distribution(cond=cond)
        x = images(5)
        # Maps as wide as they have channels are maps all the same.
        assert q.batch_shape == ((5,) if shape[0] == 5 else ())
        wanted = cond if shape[0] == 5 else cond.expand(5, *shape)
        torch.testing.assert_close(q.log_prob(x), told.log_prob(x, None, wanted), rtol=1e-12, atol=0)
