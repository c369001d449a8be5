"""The models of the benchmarks: one multi-scale Glow by several implementations, its shapes and its arithmetic.

All but ours are run level by level here: squeeze, K steps, half of the channels leave. "plain", "torch checkpoint" (of
all steps, or a share of them) and "memcnn" have our model's own tensors and compute the same function with
:mod:`pyglow_fast.reference` alone, step by step; normflows, nflows and FrEIA have their own step, with their own
permutation and scale, a net of the same three convolutions and standard normal priors.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyglow_fast import FlowStep, Glow, ReversibleSequence, functional, reference
from pyglow_fast.layers import Coupling

OURS = ("store", "checkpoint", "reversible")
PLAIN, CHECKPOINTED, MEMCNN = "plain", "torch checkpoint", "memcnn"
SAME_FUNCTION = (*OURS, PLAIN, CHECKPOINTED, MEMCNN)
# Steps that torch.utils.checkpoint wraps, of how many: every 4th, every 2nd, all but every 4th.
PARTLY = {"torch checkpoint 1/4": (1, 4), "torch checkpoint 1/2": (1, 2), "torch checkpoint 3/4": (3, 4)}
TRAIN, LOG_PROB, SAMPLE = "train step", "log_prob", "sample"
# The size of what the nets put out; at their start it would be zero, and so the gradient of all but the last layer.
RAW_SIZE = 0.1

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

    @property
    def title(self) -> str:
        """The shape in tables."""
        image = "x".join(map(str, self.image))
        return f"{image} L {self.n_levels} K {self.n_steps} hidden {self.hidden} batch {self.batch}"

    def widths(self) -> list[int]:
        """Channels of the levels' states."""
        blocks = 2 ** (len(self.image) - 1) if self.squeezes else 1
        return [self.image[0] * blocks * max(1, blocks // 2) ** level for level in range(self.n_levels)]

    def top(self) -> tuple[int, ...]:
        """The shape (C, *spatial) of the top state."""
        shrink = 2**self.n_levels if self.squeezes else 1
        return (self.widths()[-1], *[size // shrink for size in self.image[1:]])

    def small(self) -> Shape:
        """Images of two positions at the top level: for what does not depend on the resolution."""
        side = 2 ** (self.n_levels + 1)
        return dataclasses.replace(self, image=(self.image[0], *[side] * (len(self.image) - 1)), batch=4)

    def quick(self) -> Shape:
        """Few steps, narrow nets and one or two small images: to see that all of it runs."""
        side = min(self.image[1], 2 ** (self.n_levels + 1))
        image = (self.image[0], *[side] * (len(self.image) - 1))
        steps, batch = min(self.n_steps, 2), min(self.batch, 2)
        return dataclasses.replace(self, image=image, n_steps=steps, hidden=8, batch=batch)


CONFIGS = {
    "a": Shape((3, 32, 32), n_levels=3, n_steps=8, hidden=512, batch=16),
    "b": Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=128, batch=16),
    "c": Shape((3, 256, 256), n_levels=4, n_steps=4, hidden=64, batch=1),
    "d": Shape((12, 64, 64), n_levels=1, n_steps=1, hidden=32, batch=8, squeezes=False),
    "e": Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=512, batch=16),
}


# Steps of other libraries


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


class PeerStep(nn.Module):
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


def _normflows_step(channels: int, hidden: int) -> PeerStep:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it starts from torch.lu, which is deprecated
        from normflows.flows import GlowBlock  # type: ignore[import-not-found]

        block = GlowBlock(channels, hidden)
    return PeerStep([block], lambda layer, x, rev: layer(x) if rev else layer.inverse(x))  # type: ignore[operator]


def _nflows_step(channels: int, hidden: int) -> PeerStep:
    from nflows import transforms  # type: ignore[import-not-found]

    mask = [0] * (channels // 2) + [1] * (channels - channels // 2)
    layers = [
        transforms.ActNorm(channels),
        transforms.OneByOneConvolution(channels, using_cache=True),  # its cache is for evaluation alone
        transforms.AffineCouplingTransform(mask, lambda inputs, outputs: ThreeConvolutions(inputs, outputs, hidden)),
    ]
    return PeerStep(layers, lambda layer, x, rev: layer.inverse(x) if rev else layer(x))  # type: ignore[operator]


def _freia_step(channels: int, hidden: int) -> PeerStep:
    import FrEIA.modules as modules  # type: ignore[import-not-found]

    def run(layer: nn.Module, x: Tensor, rev: bool) -> tuple[Tensor, Tensor]:
        (z,), log_det = layer([x], rev=rev)
        return z, log_det

    def net(inputs: int, outputs: int) -> nn.Module:
        return ThreeConvolutions(inputs, outputs, hidden)

    return PeerStep([modules.AllInOneBlock([(channels, 1, 1)], subnet_constructor=net)], run)


PEER_STEPS = {"normflows": _normflows_step, "nflows": _nflows_step, "FrEIA": _freia_step}
IMPLEMENTATIONS = (*SAME_FUNCTION, *PEER_STEPS)


# Models


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
        weights = net.conv1.weight, net.conv2.weight, net.conv3.weight * gain
        biases = net.conv1.bias, net.conv2.bias, net.conv3.bias * gain.flatten()
        return reference.net_chain(state[:, : self.step.channels // 2], weights, biases, reference.COUPLING_NETS[2])

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

    ``steps``: with their inverses; ``top``: (C, *spatial) of the top state; ``squeezes``: whether levels begin so.
    """

    library: ModuleType = reference  # whose densities it has

    def __init__(
        self,
        modules: nn.Module,
        steps: Sequence[Sequence[tuple[Step, Inverse]]],
        prior: Callable[[int, Tensor], Any],
        top: tuple[int, ...],
        squeezes: bool,
    ) -> None:
        super().__init__()
        self.owned = modules  # the parameters
        self._steps, self._prior, self.top, self._squeezes = steps, prior, top, squeezes

    def _encode(self, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Latents, what predicts their priors, and log_det."""
        latents, kept, total = [], [], x.new_zeros(x.shape[0])
        for index, steps in enumerate(self._steps):
            if self._squeezes:
                x = reference.squeeze(x)
            for step, _ in steps:
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
            total = total + self.library.gaussian_log_prob(latent.to(total.dtype), *self._prior(index, by))
        return total

    def encode(self, x: Tensor) -> list[Tensor]:
        """Compute the latents of x, shallowest first."""
        return self._encode(x)[0]

    def _decode(self, top: Tensor, latent: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Decode from the top state down; ``latent(level, kept)`` is what left at a level."""
        x = top
        for index in reversed(range(len(self._steps))):
            if index + 1 < len(self._steps):
                x = torch.cat([x, latent(index, x)], dim=1)
            for _, inverse in reversed(self._steps[index]):
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
            drawn: Tensor = self.library.gaussian_sample(noise, *self._prior(index, like))
            return drawn

        top = next(self.parameters()).new_empty(n, *self.top)
        return self._decode(draw(len(self._steps) - 1, top), draw)


class OurSteps(Levels):
    """Steps of ours of one level alone, without squeeze; the prior is the standard normal."""

    library = functional

    def __init__(self, shape: Shape, memory: str) -> None:
        steps = [FlowStep(shape.image[0], shape.hidden) for _ in range(shape.n_steps)]
        run = ReversibleSequence(steps, memory=memory)
        super().__init__(run, [[(run, self._inverse)]], _standard, shape.top(), squeezes=False)
        self.initialize = run.initialize

    def _inverse(self, z: Tensor) -> Tensor:
        x: Tensor = self.owned.inverse(z)[0]  # type: ignore[operator]
        return x


Model = Glow | Levels


def our_model(shape: Shape, memory: str) -> Glow | OurSteps:
    """A Glow, or where nothing is squeezed the steps of one level alone."""
    if not shape.squeezes:
        return OurSteps(shape, memory)
    fields: dict[str, Any] = {name: getattr(shape, name) for name in ("n_levels", "n_steps", "hidden")}
    return Glow(image_shape=shape.image, memory=memory, **fields)


def set_memory(model: Model, memory: str | int) -> None:
    """Give a model of ours its memory mode, or bytes."""
    owner: Any = model.owned if isinstance(model, OurSteps) else model
    owner.memory = memory


def set_precision(model: Model, precision: str) -> None:
    """Give all coupling nets of a model of ours their precision."""
    for module in model.modules():
        if isinstance(module, Coupling):
            module.precision = precision


def _is_checkpointed(implementation: str, index: int) -> bool:
    """Tell whether torch.utils.checkpoint wraps a level's step of that index; a share's steps are evenly spread."""
    some, of = PARTLY.get(implementation, (int(implementation == CHECKPOINTED), 1))
    return (index + 1) * some // of > index * some // of


def plain_levels(ours: Model, implementation: str) -> Levels:
    """Build the function from the same tensors: "plain", "torch checkpoint", one of PARTLY, or "memcnn"."""

    def wrapped(plain: PlainStep, index: int) -> Step:
        if _is_checkpointed(implementation, index):
            return lambda x: checkpoint(plain, x, use_reentrant=False)
        return memcnn_step(plain) if implementation == MEMCNN else plain

    def prior(index: int, kept: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(ours, Glow):
            return _standard(index, kept)
        found: tuple[Tensor, Tensor] = (
            ours.splits[index].prior(kept) if index < len(ours.splits) else ours.prior(kept, None)  # type: ignore[operator]
        )
        return found

    runs = [module for module in ours.modules() if isinstance(module, ReversibleSequence)]
    plain = [[PlainStep(step) for step in run.flow_steps()] for run in runs]
    steps = [[(wrapped(step, index), step.inverse) for index, step in enumerate(level)] for level in plain]
    top = ours.state_shapes[-1] if isinstance(ours, Glow) else ours.top
    return Levels(ours, steps, prior, top, isinstance(ours, Glow))


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


def _peer(name: str, shape: Shape) -> Levels:
    np.random.seed(0)  # permutations of nflows and FrEIA come from there
    levels = [[PEER_STEPS[name](width, shape.hidden) for _ in range(shape.n_steps)] for width in shape.widths()]
    owned = nn.ModuleList(step for level in levels for step in level)
    steps = [[(step, step.inverse) for step in level] for level in levels]
    return Levels(owned, steps, _standard, shape.top(), shape.squeezes)


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


def build(implementation: str, shape: Shape, device: torch.device) -> Model:
    """The model, its actnorms initialised on its images, with nets that put out something.

    Raises:
        ImportError: the implementation's library is not there.
    """
    torch.manual_seed(0)
    if implementation in PEER_STEPS:
        peer = _peer(implementation, shape)
        wake(peer)
        with torch.no_grad():
            peer.to(device).log_prob(images(shape, device))
        return peer
    ours = our_model(shape, implementation if implementation in OURS else "store")
    wake(ours)
    ours.to(device).initialize(images(shape, device))
    return ours if implementation in OURS else plain_levels(ours, implementation)


def training_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """Run forward and backward of the mean of -log_prob."""
    log_prob: Any = model.log_prob
    return lambda: (-log_prob(x)).mean().backward()


def gradient_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """sqrt(sum |g - e|^2 / sum |e|^2) over all tensors; NaN if a g has one."""
    error = sum(float((g.double() - e).square().sum()) for g, e in zip(found, exact, strict=True))
    return float((error / sum(float(e.square().sum()) for e in exact)) ** 0.5)
