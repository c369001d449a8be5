"""Builds one multi-scale Glow by several implementations, for the benchmarks of memory and of models.

All but ours are run level by level here: squeeze, K steps, half of the channels leave. "plain", "torch checkpoint" (of
all steps, or a share of them) and "memcnn" have our model's own tensors and compute the same function with
:mod:`pyglow_fast.reference` alone, step by step; normflows, nflows and FrEIA have their own step, with their own
permutation and scale, a net of the same three convolutions and standard normal priors.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.model_peers import PEER_STEPS
from pyglow_fast import Glow, functional, reference
from pyglow_fast.layers import Coupling, FlowStep, ReversibleSequence

OURS = ("store", "checkpoint", "reversible")
SAME_FUNCTION = ("plain", "torch checkpoint", "memcnn")
# Steps that torch.utils.checkpoint wraps, of how many: every 4th, every 2nd, all but every 4th.
PARTLY = {"torch checkpoint 1/4": (1, 4), "torch checkpoint 1/2": (1, 2), "torch checkpoint 3/4": (3, 4)}
OTHERS = ("normflows", "FrEIA")
IMPLEMENTATIONS = (*OURS, *SAME_FUNCTION, *OTHERS)
PACKAGES = {"memcnn": "memcnn", "normflows": "normflows", "FrEIA": "FrEIA"}
# The size of what the nets put out; at their start it would be zero, and so the gradient of all but the last layer.
RAW_SIZE = 0.1
INITIAL, PARTS = 32, 16  # pixels: of larger images actnorms see some parts

Step = Callable[[Tensor], tuple[Tensor, Tensor]]
Inverse = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model and its batch. ``squeezes``: False for the steps of one level alone, on images as wide as they are."""

    image: tuple[int, ...]
    n_levels: int
    n_steps: int
    hidden: int
    batch: int
    squeezes: bool = True

    @classmethod
    def of(cls, values: dict[str, Any]) -> Shape:
        """Read a shape from JSON."""
        return cls(**values | {"image": tuple(values["image"])})

    def top(self) -> tuple[int, ...]:
        """The shape (C, *spatial) of the top state."""
        if not self.squeezes:
            return self.image
        return (_widths(self)[-1], *[size // 2**self.n_levels for size in self.image[1:]])

    def initial(self) -> Shape:
        """The shape of the parts of images that actnorms are initialised on."""
        return self if self.image[1] <= INITIAL else self.small()

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
        net: Any = self.step.coupling.net
        gain = (3.0 * net.log_gain).exp().reshape(-1, 1, 1, 1)
        first, second = (net.conv1.weight, net.conv1.bias), (net.conv2.weight, net.conv2.bias)
        third = (net.conv3.weight * gain, net.conv3.bias * gain.flatten())
        return reference.coupling_net(state[:, : self.step.channels // 2], *first, *second, *third)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x to z and log_det (N,)."""
        matrix, offset, map_log_det = self._map()
        u = reference.channel_mix(x, matrix, offset)
        z, log_det = reference.coupling(u, self._net(u), self.step.coupling.spec)
        return z, log_det + reference.n_positions(x) * map_log_det

    def inverse(self, z: Tensor, _: Tensor | None = None) -> Tensor:
        """Map z to x; memcnn asks for x from all outputs."""
        matrix, offset, _map_log_det = self._map()
        u, _log_det = reference.coupling_inverse(z, self._net(z), self.step.coupling.spec)
        return reference.channel_unmix(u, reference.invert_matrix(matrix), offset)


class Levels(nn.Module):
    """A flow of steps in levels; ``prior(level, kept)`` gives mean and log_sd of what leaves there, or of the top.

    ``inverses``: of the steps, in their order; ``top``: (C, *spatial) of the top state; ``squeezes``: whether levels
    begin so.
    """

    def __init__(
        self,
        modules: nn.Module,
        steps: Sequence[Sequence[Step]],
        inverses: Sequence[Sequence[Inverse]],
        prior: Callable[[int, Tensor], Any],
        top: tuple[int, ...],
        squeezes: bool,
    ) -> None:
        super().__init__()
        self.owned = modules  # the parameters
        self._steps, self._inverses, self._prior, self._top, self._squeezes = steps, inverses, prior, top, squeezes

    def _encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Latents, what predicts their priors, and log_det."""
        latents, kept, total = [], [], x.new_zeros(x.shape[0])
        for index, steps in enumerate(self._steps):
            if self._squeezes:
                x = reference.squeeze(x)
            for step in steps:
                x, log_det = step(x)
                total = total + log_det
            if index + 1 < len(self._steps):
                x, factored = x.chunk(2, dim=1)
                latents.append(factored)
                kept.append(x)
        return [*latents, x], [*kept, x], total

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute log p(x), (N,), in nats."""
        latents, kept, total = self._encode(x)
        for index, (latent, by) in enumerate(zip(latents, kept, strict=True)):
            # The densities are in the dtype of x: that of a state that autocast has rounded would be rounded again, as
            # a sum.
            total = total + reference.gaussian_log_prob(latent.to(total.dtype), *self._prior(index, by))
        return total

    def encode(self, x: Tensor) -> list[Tensor]:
        """Compute the latents of x, shallowest first."""
        return self._encode(x)[0]

    def _decode(self, top: Tensor, latent: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Decode from the top state down; ``latent(level, kept)`` is what left at a level."""
        x = top
        for index in reversed(range(len(self._inverses))):
            if index + 1 < len(self._inverses):
                x = torch.cat([x, latent(index, x)], dim=1)
            for inverse in reversed(self._inverses[index]):
                x = inverse(x)
            if self._squeezes:
                x = reference.unsqueeze(x)
        return x

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Compute the x whose latents these are."""
        return self._decode(latents[-1], lambda index, _: latents[index])

    def sample(self, n: int) -> Tensor:
        """Draw samples (n, C, H, W); noise is drawn from the top down."""

        def draw(index: int, like: Tensor) -> Tensor:
            noise = torch.randn_like(like, dtype=top.dtype)  # also where autocast has rounded the state
            return reference.gaussian_sample(noise, *self._prior(index, like))

        top = next(self.parameters()).new_empty(n, *self._top)
        return self._decode(draw(len(self._inverses) - 1, top), draw)


class OurSteps(nn.Module):
    """Steps of ours of one level alone, without squeeze; the prior is the standard normal."""

    def __init__(self, shape: Shape, memory: str, budget: str | int) -> None:
        super().__init__()
        steps = [FlowStep(shape.image[0], shape.hidden) for _ in range(shape.n_steps)]
        self.steps = ReversibleSequence(steps, memory=memory, memory_budget=budget)
        self.top = shape.top()

    @property
    def memory(self) -> str:
        """The memory mode of the steps."""
        return self.steps.memory

    @memory.setter
    def memory(self, memory: str) -> None:
        self.steps.memory = memory

    @property
    def precision(self) -> str:
        """The precision that the nets compute in."""
        return self._couplings()[0].precision

    @precision.setter
    def precision(self, precision: str) -> None:
        for coupling in self._couplings():
            coupling.precision = precision

    def _couplings(self) -> list[Coupling]:
        return [module for module in self.modules() if isinstance(module, Coupling)]

    def memory_report(self) -> list[dict[str, Any]]:
        """Report as the method of a Glow does."""
        return [self.steps.memory_report()]

    def initialize(self, x: Tensor) -> None:
        """Set the actnorms from x."""
        self.steps.initialize(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Compute log p(x), (N,), in nats."""
        z, log_det = self.steps(x)
        return log_det + functional.gaussian_log_prob(z, *_standard(0, z))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Compute the latent of x, alone in its list."""
        return [self.steps(x)[0]]

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """Compute the x whose latent this is."""
        x: Tensor = self.steps.inverse(latents[0])[0]
        return x

    def sample(self, n: int) -> Tensor:
        """Draw samples (n, C, H, W)."""
        return self.decode([torch.randn_like(next(self.parameters()).new_empty(n, *self.top))])


Ours = Glow | OurSteps


def _ours(shape: Shape, memory: str, budget: str | int) -> Ours:
    if not shape.squeezes:
        return OurSteps(shape, memory, budget)
    return Glow(
        image_shape=shape.image,
        n_levels=shape.n_levels,
        n_steps=shape.n_steps,
        hidden=shape.hidden,
        memory=memory,
        memory_budget=budget,
    )


def is_checkpointed(implementation: str, index: int) -> bool:
    """Tell whether torch.utils.checkpoint wraps a level's step of that index; a share's steps are evenly spread."""
    some, of = PARTLY.get(implementation, (int(implementation == "torch checkpoint"), 1))
    return (index + 1) * some // of > index * some // of


def plain_levels(ours: Ours, implementation: str) -> Levels:
    """Build the function from the same tensors: "plain", "torch checkpoint", one of PARTLY, or "memcnn"."""

    def wrapped(plain: PlainStep, index: int) -> Step:
        if is_checkpointed(implementation, index):
            return lambda x: checkpoint(plain, x, use_reentrant=False)
        if implementation == "memcnn":
            return memcnn_step(plain)
        return plain

    def prior(index: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(ours, OurSteps):
            return _standard(index, kept)
        found: tuple[Tensor, Tensor] = (
            ours.splits[index].prior(kept) if index < len(ours.splits) else ours.prior(kept, None)  # type: ignore[operator]
        )
        return found

    single = isinstance(ours, OurSteps)
    sequences: Any = [ours.steps] if single else [level.steps for level in ours.levels]  # type: ignore[union-attr]
    plain = [[PlainStep(step) for step in sequence] for sequence in sequences]
    steps = [[wrapped(step, index) for index, step in enumerate(level)] for level in plain]
    inverses = [[step.inverse for step in level] for level in plain]
    return Levels(ours, steps, inverses, prior, ours.top if single else ours.state_shapes[-1], not single)


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
    """Channels of the levels' states."""
    if not shape.squeezes:
        return [shape.image[0]] * shape.n_levels
    blocks = 2 ** (len(shape.image) - 1)
    return [shape.image[0] * blocks * (blocks // 2) ** level for level in range(shape.n_levels)]


def _peer(name: str, shape: Shape) -> Levels:
    np.random.seed(0)  # permutations of nflows and FrEIA come from there
    levels = [[PEER_STEPS[name](width, shape.hidden) for _ in range(shape.n_steps)] for width in _widths(shape)]
    owned = nn.ModuleList(step for level in levels for step in level)
    inverses = [[step.inverse for step in level] for level in levels]
    return Levels(owned, levels, inverses, _standard, shape.top(), shape.squeezes)


def wake(module: nn.Module) -> None:
    """Weights in place of the zeros that nets end with, such that they put out about RAW_SIZE."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d) and not part.weight.any():
            nn.init.normal_(part.weight, std=RAW_SIZE / part.weight[0].numel() ** 0.5)


def images(shape: Shape, device: torch.device) -> Tensor:
    """Smooth random images with a little noise, alike at all resolutions, (N, C, H, W) in -0.5 .. 0.5."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(
        shape.batch, shape.image[0], *(max(4, size // 8) for size in shape.image[1:]), generator=generator
    )
    smooth = nn.functional.interpolate(coarse, size=shape.image[1:], mode="bilinear", align_corners=True)
    noise = torch.rand(smooth.shape, generator=generator)
    return (0.9 * smooth + 0.1 * noise - 0.5).to(device)


def parts(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Up to PARTS parts of images, of that size, from all over them.

    Actnorms that are set on other statistics than those of the images let deep models blow up, and their states drift.
    """
    for dim, length in enumerate(size, start=2):
        x = torch.cat(x.split(length, dim=dim))
    return x[:: max(1, x.shape[0] // PARTS)][:PARTS]


def build(implementation: str, shape: Shape, budget: str | int, device: torch.device) -> Ours | Levels:
    """The model, its actnorms initialised on small images, with nets that put out something.

    Raises:
        ImportError: the implementation's library is not there.
    """
    torch.manual_seed(0)
    small_images = parts(images(shape, torch.device("cpu")), shape.initial().image[1:])
    if implementation in PEER_STEPS:
        peer = _peer(implementation, shape)
        wake(peer)
        with torch.no_grad():
            peer.log_prob(small_images)
        return peer.to(device)
    memory = implementation if implementation in OURS else "store"
    small = _ours(shape.initial(), memory, budget)
    wake(small)
    small.initialize(small_images)
    ours = _ours(shape, memory, budget)
    ours.load_state_dict(small.state_dict())
    del small
    ours.to(device)
    return ours if implementation in OURS else plain_levels(ours, implementation)
