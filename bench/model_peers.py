"""A step of Glow by the layers of other libraries, each with a net of the same three convolutions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class ThreeConvolutions(nn.Sequential):
    """The net of the peers that ask for one: 3x3, 1x1, 3x3, the last of them zero; nflows gives a context, too."""

    def __init__(self, inputs: int, outputs: int, hidden: int) -> None:
        last = nn.Conv2d(hidden, outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        first, second = nn.Conv2d(inputs, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 1)
        super().__init__(first, nn.ReLU(), second, nn.ReLU(), last)

    def forward(self, x: Tensor, context: None = None) -> Tensor:
        """x -> what the coupling takes."""
        out: Tensor = super().forward(x)
        return out


class Both(nn.Module):
    """Layers of a peer, in order, as one step: ``run(layer, x, rev)`` gives what it maps x to, and log_det."""

    def __init__(self, layers: Sequence[nn.Module], run: Callable[[nn.Module, Tensor, bool], Any]) -> None:
        super().__init__()
        self.layers, self._run = nn.ModuleList(layers), run

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to z and log_det (N,)."""
        total: Any = 0.0
        for layer in self.layers:
            x, log_det = self._run(layer, x, False)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """Map z to x through the layers in reverse."""
        for layer in reversed(self.layers):
            z, _ = self._run(layer, z, True)
        return z


def _normflows_step(channels: int, hidden: int) -> Both:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it starts from torch.lu, which is deprecated
        from normflows.flows import GlowBlock  # type: ignore[import-not-found]

        block = GlowBlock(channels, hidden)
    return Both([block], lambda layer, x, rev: layer(x) if rev else layer.inverse(x))  # type: ignore[operator]


def _nflows_step(channels: int, hidden: int) -> Both:
    from nflows import transforms  # type: ignore[import-not-found]

    mask = [0] * (channels // 2) + [1] * (channels - channels // 2)
    layers = [
        transforms.ActNorm(channels),
        transforms.OneByOneConvolution(channels, using_cache=True),  # its cache is for evaluation alone
        transforms.AffineCouplingTransform(mask, lambda inputs, outputs: ThreeConvolutions(inputs, outputs, hidden)),
    ]
    return Both(layers, lambda layer, x, rev: layer.inverse(x) if rev else layer(x))  # type: ignore[operator]


def _freia_step(channels: int, hidden: int) -> Both:
    import FrEIA.modules as modules  # type: ignore[import-not-found]

    def run(layer: nn.Module, x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        (z,), log_det = layer([x], rev=rev)
        return z, log_det

    def net(inputs: int, outputs: int) -> nn.Module:
        return ThreeConvolutions(inputs, outputs, hidden)

    return Both([modules.AllInOneBlock([(channels, 1, 1)], subnet_constructor=net)], run)


PEER_STEPS = {"normflows": _normflows_step, "nflows": _nflows_step, "FrEIA": _freia_step}
