"""Models and layers to export: small, initialised, with random weights, and an input of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import FrEIA.modules as Fm
import normflows as nf
import torch
from nflows import transforms
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.interop.accelerate import accelerate
from support.accelerate_cases import ContextNet, nflows_steps, sequence, subnet
from support.gradients import perturbed
from support.helpers import tensors

Case = tuple[nn.Module, Tensor]


class InverseOrder(nn.Module):
    """normflows' blocks from x to z."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.flows = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for block in reversed(self.flows):
            x, log_det = block.inverse(x)
            total = total + log_det
        return x, total


class LikelihoodMap(nn.Module):
    """What FastFlow makes of a feature map: -z^2 / 2, averaged over channels, and the log-det."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.flow(x)
        return -0.5 * z.square().mean(1, keepdim=True), log_det


class Called(nn.Module):
    """One method of a module, as a module."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, x: Tensor) -> Any:
        return getattr(self.module, self.method)(x)


def freia(memory: str | None = None, **options: Any) -> Case:
    own = [{"subnet_constructor": subnet, "permute_soft": soft, **options} for soft in (True, False)]
    flow = sequence((4, 6, 6), [(Fm.AllInOneBlock, given) for given in own])
    accelerate(flow, memory)
    return LikelihoodMap(perturbed(flow)).eval(), torch.randn(3, 4, 6, 6)


def normflows(memory: str | None = None, **options: Any) -> Case:
    model, x = InverseOrder([nf.flows.GlowBlock(4, 8, **options) for _ in range(2)]), torch.randn(3, 4, 6, 6)
    accelerate(model, memory)
    with torch.no_grad():
        model(x)
    return perturbed(model).eval(), x


def nflows(memory: str | None = None) -> Case:
    layers = [layer for cut in ([0, 1, 0, 1], [1, 0, 1, 0]) for layer in nflows_steps(cut, ContextNet, 1)]
    model, x = transforms.CompositeTransform(layers), torch.randn(3, 4, 6, 6)
    model.train()(x)
    accelerate(model, memory)
    return perturbed(model).eval(), x


def glow(frozen: bool = False, **options: Any) -> Case:
    model = pgf.Glow(image_shape=(2, 8, 8), n_levels=2, n_steps=2, hidden=8, **options)
    x = torch.rand(3, 2, 8, 8) - 0.5
    model.initialize(x)
    perturbed(model).eval()
    return Called(model.freeze() if frozen else model, "log_prob"), x


def layer(made: nn.Module, inverse: bool = False) -> Case:
    perturbed(made).eval()
    return (Called(made, "inverse") if inverse else made), torch.randn(3, 4, 6, 6)


def _step() -> pgf.FlowStep:
    return pgf.FlowStep(4, hidden=8)


ACCELERATED: dict[str, Callable[[], Case]] = {
    "FrEIA": freia,
    "FrEIA, reflections": lambda: freia(learned_householder_permutation=2),
    "FrEIA, store": lambda: freia("store"),
    "FrEIA, reversible": lambda: freia("reversible"),
    "normflows": normflows,
    "normflows, store": lambda: normflows("store"),
    "normflows, reversible": lambda: normflows("reversible"),
    "normflows, actnorms in nets": lambda: normflows(net_actnorm=True),
    "nflows": nflows,
    "nflows, store": lambda: nflows("store"),
    "nflows, reversible": lambda: nflows("reversible"),
}
OURS: dict[str, Callable[[], Case]] = {
    "glow": glow,
    "glow, shuffle": lambda: glow(permutation="shuffle", memory="store"),
    "glow, border": lambda: glow(border=True),
    "frozen": lambda: glow(frozen=True),
    "frozen plain": lambda: glow(frozen=True, permutation="invconv_plain"),
    "actnorm": lambda: layer(pgf.ActNorm(4)),
    "invconv": lambda: layer(pgf.InvConv(4)),
    "permute": lambda: layer(pgf.Permute(4)),
    "coupling": lambda: layer(pgf.Coupling(pgf.CouplingNet(2, 4, 8))),
    "coupling, exp": lambda: layer(pgf.Coupling(pgf.CouplingNet(2, 4, 8), scale_map="exp"), inverse=True),
    "step": lambda: layer(_step()),
    "sequence": lambda: layer(pgf.ReversibleSequence([_step(), _step()])),
    "squeeze": lambda: layer(pgf.Squeeze()),
    "unsqueeze": lambda: layer(pgf.Squeeze(), inverse=True),
    "split": lambda: layer(pgf.Split(4)),
}
# Cases with an inverse or log-determinant of a matrix, for which ONNX has no operator.
LINEAR_ALGEBRA: dict[str, Callable[[], Case]] = {
    "normflows, plain": lambda: normflows(use_lu=False),
    "plain glow": lambda: glow(permutation="invconv_plain"),
    "plain invconv": lambda: layer(pgf.InvConv(4, lu=False)),
    "inverse of invconv": lambda: layer(pgf.InvConv(4), inverse=True),
    "inverse of a step": lambda: layer(_step(), inverse=True),
}
# In an export "store" and "reversible" are the same steps.
ALL = {name: case for name, case in (ACCELERATED | OURS | LINEAR_ALGEBRA).items() if not name.endswith("store")}


def other_input(x: Tensor, name: str) -> Tensor:
    """Draw an input of another batch size, and of other sides where the model takes these."""
    if "glow" in name or "frozen" in name:  # images of one size
        return torch.rand(5, *x.shape[1:]) - 0.5
    return torch.randn(5, x.shape[1], 8, 10)


def dynamic_shapes(name: str) -> tuple[dict[int, Any], ...]:
    auto = torch.export.Dim.AUTO
    return ({0: auto} if "glow" in name or "frozen" in name else {0: auto, 2: auto, 3: auto},)


def assert_same(found: Any, expected: Any) -> None:
    """Check values to 1e-4 of the largest of each tensor, or of 1 where all are small: as exports promise."""
    for got, exact in zip(map(Tensor.detach, tensors(found)), map(Tensor.detach, tensors(expected)), strict=True):
        assert got.shape == exact.shape
        assert got.isfinite().all()
        assert float((got - exact).abs().max()) <= 1e-4 * max(1.0, float(exact.abs().max()))
