"""Small models of normflows, nflows and FrEIA that ``accelerate`` takes over, and their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import torch
from torch import Tensor, nn

MEMORIES = (None, "store", "checkpoint", "reversible")
HIDDEN = 8


def subnet(c_in: int, c_out: int, first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Module:
    """Make a subnet with ReLUs, or with the activations given."""
    return nn.Sequential(
        nn.Conv2d(c_in, HIDDEN, 3, padding=1),
        first or nn.ReLU(),
        nn.Conv2d(HIDDEN, HIDDEN, 1),
        second or nn.ReLU(),
        nn.Conv2d(HIDDEN, c_out, 3, padding=1),
    )


def leaky_subnet(c_in: int, c_out: int) -> nn.Module:
    return subnet(c_in, c_out, nn.LeakyReLU(0.2), nn.LeakyReLU(0.2, inplace=True))


class ContextNet(nn.Module):
    """A net that takes a context, as nflows calls it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(part for part in subnet(c_in, c_out) if isinstance(part, nn.Conv2d))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        first, second, third = self.convs
        return third(torch.relu(second(torch.relu(first(inputs)))))


class LeakyContextNet(nn.Module):
    """A net with activations of two slopes, as modules, which the test may make one."""

    def __init__(self, c_in: int, c_out: int, slopes: tuple[float, float] = (0.01, 0.01)) -> None:
        super().__init__()
        self.body = subnet(c_in, c_out, *map(nn.LeakyReLU, slopes))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.body(inputs)


def from_normflows(levels: int = 2, steps: int = 3, **options: Any) -> nn.Module:
    """The Glow of its documentation, small."""
    flows, merges, bases = [], [], []
    shape = (3, 8, 8)
    for i in range(levels):
        channels = shape[0] * 2 ** (levels + 1 - i)
        blocks = [normflows.flows.GlowBlock(channels, HIDDEN, **options) for _ in range(steps)]
        flows.append([*blocks, normflows.flows.Squeeze()])
        if i > 0:
            merges.append(normflows.flows.Merge())
            side = (shape[0] * 2 ** (levels - i), shape[1] // 2 ** (levels - i), shape[2] // 2 ** (levels - i))
        else:
            side = (shape[0] * 2 ** (levels + 1), shape[1] // 2**levels, shape[2] // 2**levels)
        bases.append(normflows.distributions.DiagGaussian(side))
    return normflows.MultiscaleFlow(bases, flows, merges, class_cond=False)


def mask(channels: int, cut: str) -> Tensor:
    half = torch.arange(channels) >= channels // 2
    return (half if cut == "halves" else torch.arange(channels) % 2 == 1).float()


def from_nflows(
    cut: str = "halves", steps: int = 3, net: Callable[..., nn.Module] = ContextNet, runs: int = 1
) -> nn.Module:
    """Make runs of steps, with a Sigmoid, which is in no run, between two of them."""
    t = nflows.transforms
    parts: list[nn.Module] = [t.SqueezeTransform()]
    for i in range(runs * steps):
        parts += [t.Sigmoid()] if i and i % steps == 0 else []
        parts += [t.ActNorm(12), t.OneByOneConvolution(12), t.AffineCouplingTransform(mask(12, cut), net)]
    base = nflows.distributions.StandardNormal([12, 4, 4])
    return nflows.flows.Flow(t.CompositeTransform(parts), base)


def from_freia(steps: int = 3, net: Callable[..., nn.Module] = subnet, **options: Any) -> nn.Module:
    model = Ff.SequenceINN(3, 8, 8)
    model.append(Fm.IRevNetDownsampling)
    for _ in range(steps):
        model.append(Fm.AllInOneBlock, subnet_constructor=net, **options)
    return model


def normflows_loss(model: Any, x: Tensor) -> Tensor:
    return -model.log_prob(x, None).mean() if hasattr(model, "merges") else model.forward_kld(x)


def nflows_loss(model: Any, x: Tensor) -> Tensor:
    return -model.log_prob(x).mean()


def freia_loss(model: Any, x: Tensor) -> Tensor:
    z, log_det = model(x)
    return (z.square().flatten(1).sum(1) / 2 - log_det).mean()


CASES: dict[str, tuple[Callable[..., nn.Module], Callable[[Any, Tensor], Tensor], int]] = {
    "normflows": (from_normflows, normflows_loss, 6),
    "normflows plain exp": (lambda: from_normflows(use_lu=False, scale_map="exp"), normflows_loss, 6),
    "normflows additive": (lambda: from_normflows(scale=False), normflows_loss, 6),
    "normflows net_actnorm": (lambda: from_normflows(net_actnorm=True), normflows_loss, 6),
    "normflows leaky": (lambda: from_normflows(leaky=0.1), normflows_loss, 6),
    "normflows leaky net_actnorm": (lambda: from_normflows(leaky=0.1, net_actnorm=True), normflows_loss, 6),
    "nflows": (from_nflows, nflows_loss, 3),
    "nflows alternating": (lambda: from_nflows("alternating"), nflows_loss, 3),
    "nflows alternating, two runs": (lambda: from_nflows("alternating", 2, runs=2), nflows_loss, 4),
    "nflows leaky": (lambda: from_nflows(net=LeakyContextNet), nflows_loss, 3),
    "FrEIA": (from_freia, freia_loss, 3),
    "FrEIA leaky": (lambda: from_freia(net=leaky_subnet), freia_loss, 3),
    "FrEIA soft": (lambda: from_freia(permute_soft=True), freia_loss, 3),
    "FrEIA reverse householder": (
        lambda: from_freia(learned_householder_permutation=2, reverse_permutation=True),
        freia_loss,
        3,
    ),
}


def images(n: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(5), dtype=dtype) - 0.5


def prepared(name: str) -> tuple[nn.Module, Callable[[Any, Tensor], Tensor], int]:
    """A model that has seen data, with weights at work, in float64."""
    make, loss, steps = CASES[name]
    torch.manual_seed(3)
    model = make().double()
    with torch.no_grad():
        loss(model, images(16))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model, loss, steps


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def noisy(model: nn.Module) -> nn.Module:
    """Turn a model to float64 with weights at work; whoever wants actnorms initialised does it before."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model
