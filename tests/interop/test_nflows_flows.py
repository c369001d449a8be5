"""Whole models of nflows with the import swapped: its example, composites, flows with context, training."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("nflows")

from nflows import distributions, flows
from nflows import transforms as theirs
from support.helpers import assert_close
from support.nflows_cases import (
    CONTEXT,
    ConvNet,
    assert_same,
    randomise,
    residual_conv_net_with_context,
    residual_net_with_context,
)
from torch import Tensor, nn

from pyglow_fast.interop.nflows import REPLACEMENTS, adopt, release
from pyglow_fast.interop.nflows import transforms as ours


def step(lib: Any, channels: int, net: Callable[[int, int], nn.Module] = ConvNet, **options: Any) -> list[nn.Module]:
    half = channels // 2
    mask = [0] * half + [1] * (channels - half)
    return [
        lib.ActNorm(channels),
        lib.OneByOneConvolution(channels, using_cache=True),
        lib.AffineCouplingTransform(mask, net, **options),
    ]


def glow(lib: Any, net: Callable[[int, int], nn.Module] = ConvNet) -> nn.Module:
    """Two levels for (2, 8, 8), the last without a split: 8 channels, of which 4 go on, squeezed to 16."""
    composite = lib.MultiscaleCompositeTransform(num_transforms=2)
    hidden = composite.add_transform(lib.CompositeTransform([lib.SqueezeTransform(), *step(lib, 8, net)]), (8, 4, 4))
    assert hidden == (4, 4, 4)
    last = [lib.SqueezeTransform(), *step(lib, 16, net), lib.AdditiveCouplingTransform([1, 0] * 8, net)]
    assert composite.add_transform(lib.CompositeTransform(last), (16, 2, 2)) is None
    return composite


def both(build: Callable[[Any], nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    layers = []
    for lib in (theirs, ours):
        torch.manual_seed(6)
        layers.append(build(lib).to(dtype))
    return layers[0], layers[1]


def test_the_documented_example() -> None:
    """nflows' README with ``from pyglow_fast.interop.nflows import transforms``."""

    def run(transforms: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        transform = transforms.CompositeTransform(
            [
                transforms.MaskedAffineAutoregressiveTransform(features=2, hidden_features=4),
                transforms.RandomPermutation(features=2),
            ]
        )
        base_distribution = distributions.StandardNormal(shape=[2])
        flow = flows.Flow(transform=transform, distribution=base_distribution)
        log_prob = flow.log_prob(torch.randn(5, 2))
        return log_prob, flow.sample(3)

    for found, expected in zip(run(ours), run(theirs), strict=True):
        torch.testing.assert_close(found, expected)


def test_every_other_transform_is_theirs() -> None:
    replaced = {
        "ActNorm",
        "OneByOneConvolution",
        "AffineCouplingTransform",
        "AdditiveCouplingTransform",
        "SqueezeTransform",
    }
    for name in (name for name in vars(theirs) if not name.startswith("_")):
        assert (getattr(ours, name) is getattr(theirs, name)) == (name not in replaced), name


def test_a_multiscale_composite() -> None:
    """Trap: it gives out the first half of the channels, flattened, and goes on with the second."""
    their_model, our_model = both(lambda lib: randomise(glow(lib)))
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    first_level = our_model._transforms[0](x)[0]
    outputs, _ = our_model(x)
    assert outputs.shape == (3, 128)
    assert torch.equal(outputs[:, :64], first_level[:, :4].flatten(1))
    (expected, expected_logabsdet), (found, logabsdet) = their_model(x), our_model(x)
    assert_close(found, expected)
    assert_close(logabsdet, expected_logabsdet)
    back, their_back = our_model.inverse(found), their_model.inverse(expected)
    condition = 1e5  # random triangles of 16 channels
    assert_close(back[0], x, condition)
    assert_close(back[0], their_back[0], condition)
    assert_close(back[1], their_back[1], condition)


def test_a_composite_and_its_inverse() -> None:
    layers = both(lambda lib: randomise(lib.CompositeTransform(step(lib, 6))))
    x = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    assert_same(*layers, x, condition=1e3)
    inverses = [theirs.InverseTransform(layer) for layer in layers]
    assert_same(*inverses, x, condition=1e3)


def pixel_context(context: Tensor) -> Tensor:
    return context.view(len(context), CONTEXT, 1, 1).expand(-1, -1, 4, 4)


class Embedding(nn.Module):
    """A vector for each sample, as a map."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, CONTEXT)

    def forward(self, context: Tensor) -> Tensor:
        return pixel_context(self.linear(context))


@pytest.mark.parametrize("images", [True, False], ids=["images", "vectors"])
def test_a_flow_with_context(images: bool) -> None:
    """log_prob, gradients, samples and their densities, with an embedding net."""

    def build(lib: Any) -> nn.Module:
        if images:
            layers = [part for _ in range(2) for part in step(lib, 4, residual_conv_net_with_context)]
            return flows.Flow(lib.CompositeTransform(layers), distributions.StandardNormal([4, 4, 4]), Embedding())
        layers = []
        for mask in ([0, 1, 0, 1], [1, 0, 1, 0]):
            layers += [lib.ActNorm(4), lib.AffineCouplingTransform(mask, residual_net_with_context)]
            layers += [lib.ReversePermutation(4), lib.AdditiveCouplingTransform(mask, residual_net_with_context)]
        return flows.Flow(lib.CompositeTransform(layers), distributions.StandardNormal([4]), nn.Linear(2, CONTEXT))

    their_flow, our_flow = both(lambda lib: randomise(build(lib)), torch.float64)
    x = torch.randn((3, 4, 4, 4) if images else (3, 4), dtype=torch.float64)
    context = torch.randn(3, 2, dtype=torch.float64)
    log_probs = [flow.log_prob(x, context) for flow in (their_flow, our_flow)]
    assert_close(log_probs[1], log_probs[0], 1e3)
    gradients = [
        torch.autograd.grad(value.sum(), list(flow.parameters()))
        for value, flow in zip(log_probs, (their_flow, our_flow), strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    assert_close(our_flow.transform_to_noise(x, context), their_flow.transform_to_noise(x, context), 1e3)
    samples = []
    for flow in (their_flow.float().eval(), our_flow.float().eval()):
        torch.manual_seed(7)
        with torch.no_grad():
            samples.append((flow.sample(2, context.float()), *flow.sample_and_log_prob(2, context.float())))
    for found, expected in zip(samples[1], samples[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def train(flow: nn.Module, steps: int = 20) -> list[float]:
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(8, 2, 8, 8, generator=generator, dtype=torch.float64).cumsum(2)
    losses = []
    for _ in range(steps):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_goes_the_same_way() -> None:
    """20 steps from the same draws, the first of which sets the ActNorms; then states load both ways."""
    models = both(lambda lib: flows.Flow(glow(lib), distributions.StandardNormal([128])))
    losses = [train(model) for model in models]
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    their_flow, our_flow = (model.eval() for model in models)
    fresh = both(lambda lib: flows.Flow(glow(lib), distributions.StandardNormal([128])))
    fresh[1].load_state_dict(their_flow.state_dict())
    fresh[0].load_state_dict(our_flow.state_dict())
    assert_close(fresh[1].eval().log_prob(x), their_flow.log_prob(x), 1e3)
    assert_close(fresh[0].eval().log_prob(x), our_flow.log_prob(x), 1e3)
    for duplicate in (copy.deepcopy(our_flow), pickle.loads(pickle.dumps(our_flow))):
        assert_close(duplicate.log_prob(x), our_flow.log_prob(x))


def test_a_live_model_is_adopted_and_released() -> None:
    """In place: the optimizer's parameters stay, a scale of nflows' own subclass stays, and release undoes it."""

    class Own(theirs.ActNorm):
        pass

    model = flows.Flow(
        theirs.CompositeTransform([glow(theirs), Own(128)]), distributions.StandardNormal([128])
    ).double()
    x = torch.randn(4, 2, 8, 8, dtype=torch.float64)
    model.log_prob(x)  # sets the ActNorms
    before, parameters = model.log_prob(x), list(model.parameters())
    classes = {name: type(module) for name, module in model.named_modules()}
    names = adopt(model)
    assert len(names) == 9
    assert {type(model.get_submodule(name)) for name in names} == set(REPLACEMENTS.values())
    assert type(model._transform._transforms[1]) is Own
    assert_close(model.log_prob(x), before, 1e3)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert release(model) == names
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert_close(model.log_prob(x), before)
    assert adopt(theirs.ActNorm(2)) == [""]


def test_a_scale_that_nflows_lacks_is_not_released() -> None:
    own = ours.AffineCouplingTransform
    layer = own([0, 1], residual_net_with_context, scale_activation=own.GENERAL_SCALE_ACTIVATION)
    if hasattr(theirs.AffineCouplingTransform, "DEFAULT_SCALE_ACTIVATION"):
        assert release(layer) == [""]
        return
    with pytest.raises(ValueError, match="scale_activation"):
        release(nn.Sequential(ours.ActNorm(2), layer))
    assert type(layer) is own
