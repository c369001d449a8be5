"""The same multi-scale Glow by several implementations, as the memory benchmark trains it.

All but ours are run level by level here: squeeze, K steps, half of the channels leave. "plain", "torch checkpoint" and
"memcnn" have our model's own tensors and compute the same function with :mod:`pyglow_fast.reference` alone, step by
step; normflows and FrEIA have their own step, with their own permutation and scale, a net of the same three
convolutions and standard normal priors.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyglow_fast import Glow, reference
from pyglow_fast.layers import FlowStep

OURS = ("store", "checkpoint", "reversible")
SAME_FUNCTION = ("plain", "torch checkpoint", "memcnn")
OTHERS = ("normflows", "FrEIA")
IMPLEMENTATIONS = (*OURS, *SAME_FUNCTION, *OTHERS)
PACKAGES = {"memcnn": "memcnn", "normflows": "normflows", "FrEIA": "FrEIA"}
RAW_SIZE = (
    0.1  # of what the nets put out; at their start it would be zero, and so the gradient of all but the last layer
)

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model and its batch."""

    image: tuple[int, ...]
    n_levels: int
    n_steps: int
    hidden: int
    batch: int

    def small(self) -> Shape:
        """Images of two positions at the top level: for what does not depend on the resolution."""
        side = 2 ** (self.n_levels + 1)
        return dataclasses.replace(self, image=(self.image[0], *[side] * (len(self.image) - 1)), batch=4)


class PlainStep(nn.Module):
    """z = coupling(M x + c) with the tensors of a FlowStep, by the formulas of the reference."""

    def __init__(self, step: FlowStep) -> None:
        super().__init__()
        self.step = step

    def _map(self) -> tuple[Tensor, Tensor, Tensor]:
        mix: Any = self.step.permutation
        weight = reference.lu_weight(mix.permutation, mix.lower, mix.upper, mix.log_diag, mix.sign_diag)
        log_scale = self.step.actnorm.log_scale
        matrix, offset = reference.fold_actnorm(weight, log_scale, self.step.actnorm.bias)
        return matrix, offset, mix.log_diag.sum() + log_scale.sum()

    def _net(self, state: Tensor) -> Tensor:
        net: nn.Module = self.step.coupling.net
        out: Tensor = net(state[:, : self.step.channels // 2])
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> z, log_det (N,)."""
        matrix, offset, map_log_det = self._map()
        u = reference.channel_mix(x, matrix, offset)
        z, log_det = reference.coupling(u, self._net(u), self.step.coupling.spec)
        return z, log_det + reference.n_positions(x) * map_log_det

    def inverse(self, z: Tensor, _: Tensor) -> Tensor:
        """z -> x, as memcnn asks for it: from all outputs."""
        matrix, offset, _map_log_det = self._map()
        u, _log_det = reference.coupling_inverse(z, self._net(z), self.step.coupling.spec)
        return reference.channel_unmix(u, reference.invert_matrix(matrix), offset)


class Levels(nn.Module):
    """log_prob of steps in levels; ``prior(level, kept)`` gives mean and log_sd of what leaves there, or of the top."""

    def __init__(
        self, modules: nn.Module, steps: Sequence[Sequence[Step]], prior: Callable[[int, Tensor], Any]
    ) -> None:
        super().__init__()
        self.owned = modules  # the parameters
        self._steps, self._prior = steps, prior

    def log_prob(self, x: Tensor) -> Tensor:
        """(N,), nats."""
        total = x.new_zeros(x.shape[0])
        for index, steps in enumerate(self._steps):
            x = reference.squeeze(x)
            for step in steps:
                x, log_det = step(x)
                total = total + log_det
            if index + 1 < len(self._steps):
                x, factored = x.chunk(2, dim=1)
                total = total + reference.gaussian_log_prob(factored, *self._prior(index, x))
        return total + reference.gaussian_log_prob(x, *self._prior(len(self._steps) - 1, x))


def _glow(shape: Shape, memory: str, budget: str | int) -> Glow:
    return Glow(
        image_shape=shape.image,
        n_levels=shape.n_levels,
        n_steps=shape.n_steps,
        hidden=shape.hidden,
        memory=memory,
        memory_budget=budget,
    )


def plain_levels(glow: Glow, implementation: str) -> Levels:
    """The same function with the same tensors: "plain", "torch checkpoint" or "memcnn"."""

    def wrapped(step: FlowStep) -> Step:
        plain = PlainStep(step)
        if implementation == "torch checkpoint":
            return lambda x: checkpoint(plain, x, use_reentrant=False)
        if implementation == "memcnn":
            return memcnn_step(plain)
        return plain

    def prior(index: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = (
            glow.splits[index].prior(kept) if index < len(glow.splits) else glow.prior(kept, None)  # type: ignore[operator]
        )
        return found

    return Levels(glow, [[wrapped(step) for step in level.steps] for level in glow.levels], prior)  # type: ignore[union-attr]


def memcnn_step(plain: PlainStep) -> Step:
    """memcnn's reversible wrapper around the step; it frees its input, which must not be used elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import memcnn  # type: ignore[import-not-found]

    module = memcnn.InvertibleModuleWrapper(plain)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():  # TypedStorage is deprecated
            warnings.simplefilter("ignore")
            # The input of a level is a leaf or a view: its storage is not the wrapper's to free.
            z, log_det = module(x.clone() if x.grad_fn is None or x._is_view() else x)
        return z, log_det

    return run


def _standard(_: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    zero = kept.new_zeros(())
    return zero, zero


def _widths(shape: Shape) -> list[int]:
    blocks = 2 ** (len(shape.image) - 1)
    return [shape.image[0] * blocks * (blocks // 2) ** level for level in range(shape.n_levels)]


def _normflows(shape: Shape) -> Levels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from normflows.flows import GlowBlock  # type: ignore[import-not-found]

        levels = [[GlowBlock(width, shape.hidden) for _ in range(shape.n_steps)] for width in _widths(shape)]
    owned = nn.ModuleList(block for level in levels for block in level)
    return Levels(owned, [[block.inverse for block in level] for level in levels], _standard)


def _freia(shape: Shape) -> Levels:
    import FrEIA.modules as modules  # type: ignore[import-not-found]
    import numpy as np

    np.random.seed(0)  # its permutations come from there

    def net(inputs: int, outputs: int) -> nn.Module:
        last = nn.Conv2d(shape.hidden, outputs, 3, padding=1)
        nn.init.zeros_(last.weight)
        first, second = nn.Conv2d(inputs, shape.hidden, 3, padding=1), nn.Conv2d(shape.hidden, shape.hidden, 1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)

    def step(block: nn.Module) -> Step:
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            (z,), log_det = block([x])
            return z, log_det

        return run

    levels = [
        [modules.AllInOneBlock([(width, 1, 1)], subnet_constructor=net) for _ in range(shape.n_steps)]
        for width in _widths(shape)
    ]
    owned = nn.ModuleList(block for level in levels for block in level)
    return Levels(owned, [[step(block) for block in level] for level in levels], _standard)


def wake(module: nn.Module) -> None:
    """Weights in place of the zeros that nets end with, such that they put out about RAW_SIZE."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and not part.weight.any():
            nn.init.normal_(part.weight, std=RAW_SIZE / part.weight[0].numel() ** 0.5)


def images(shape: Shape, device: torch.device) -> Tensor:
    """Smooth random images with a little noise, (N, C, H, W) in -0.5 .. 0.5."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(shape.batch, shape.image[0], 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=shape.image[1:], mode="bilinear", align_corners=True)
    noise = torch.rand(smooth.shape, generator=generator)
    return (0.9 * smooth + 0.1 * noise - 0.5).to(device)


def build(implementation: str, shape: Shape, budget: str | int, device: torch.device) -> Glow | Levels:
    """The model, its actnorms initialised on small images, with nets that put out something.

    Raises:
        ImportError: the implementation's library is not there.
    """
    torch.manual_seed(0)
    model: Glow | Levels
    if implementation in OTHERS:
        model = _normflows(shape) if implementation == "normflows" else _freia(shape)
        wake(model)
        with torch.no_grad():
            model.log_prob(images(shape.small(), torch.device("cpu")))
        return model.to(device)
    memory = implementation if implementation in OURS else "store"
    small = _glow(shape.small(), memory, budget)
    wake(small)
    small.initialize(images(shape.small(), torch.device("cpu")))
    glow = _glow(shape, memory, budget)
    glow.load_state_dict(small.state_dict())
    del small
    glow.to(device)
    return glow if implementation in OURS else plain_levels(glow, implementation)
