"""The one list of bijections that the laws of contract/test_laws.py are checked on.

A new layer or adapter joins the list and is tested by that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast.layers import FlowLayer, GroupedInvConv, MaskedSequence, WaveNet
from pyglow_fast.reference import ORDERS, SCALE_MAPS, CouplingSpec
from support.gradients import perturbed

PERMUTATIONS = ("invconv", "invconv_plain", "shuffle", "reverse")
_INJECTED: dict[str, Any] = {"cond_channels": 2, "net_actnorm": True}


def softplus_scale(raw: Tensor) -> tuple[Tensor, Tensor]:
    """A scale map that no kernel knows: s = softplus(raw + 1) + 0.1."""
    scale = nn.functional.softplus(raw + 1.0) + 0.1
    return scale, scale.log()


class GlowAsLayer(FlowLayer):
    """A whole Glow with the layer protocol: its latents flattened into one z (N, D)."""

    def __init__(self, glow: pgf.Glow) -> None:
        super().__init__()
        self.glow = glow

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x -> (latents side by side, log_det)."""
        latents, log_det = self.glow(x, cond)
        return torch.cat([latent.flatten(1) for latent in latents], dim=1), log_det

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents side by side -> (x, log_det)."""
        return self.glow.inverse(self.latents(z), cond)

    def latents(self, z: Tensor) -> list[Tensor]:
        """Take apart what lies side by side."""
        shapes = self.glow.latent_shapes
        parts = z.split([math.prod(shape) for shape in shapes], dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def objective(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """The loss of training, which reaches the priors too."""
        n_classes = self.glow.config.n_classes
        y = None if n_classes is None else torch.arange(x.shape[0], device=x.device) % n_classes
        return -self.glow.log_prob(x, y, cond).mean()


@dataclass(frozen=True)
class Bijection:
    """How to build one bijection and the shapes that it takes, without the batch dimension."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    cond_shape: tuple[int, ...] | None = None

    def fresh(self, device: torch.device) -> nn.Module:
        """Build the layer as it is constructed, in float64."""
        return self.build().to(device, torch.float64)

    def batch(self, device: torch.device, n: int = 3) -> tuple[Tensor, Tensor | None]:
        """Draw (x, cond), the moments of x far from those of the standard normal."""
        x = 2.0 * torch.randn(n, *self.shape, dtype=torch.float64, device=device) + 0.5
        if self.cond_shape is None:
            return x, None
        return x, torch.randn(n, *self.cond_shape, dtype=torch.float64, device=device)

    def trained(self, device: torch.device) -> nn.Module:
        """Build the layer initialised from data, then moved away from every special value that it starts at."""
        layer = self.fresh(device)
        assert isinstance(layer, FlowLayer)
        # Many samples: the scales that three of them would set can be extreme for the next three.
        layer.initialize(*self.batch(device, n=64))
        perturbed(layer)
        return layer


def _coupling(
    channels: int, coupling: str = "affine", dims: int = 2, cond_channels: int = 0, **options: object
) -> nn.Module:
    given = channels if options.get("mask") == "checkerboard" else channels // 2
    width = 2 * given if coupling == "affine" else given
    net = pgf.CouplingNet(given, width, 5, cond_channels=cond_channels, dims=dims)
    return pgf.Coupling(net, coupling, **options)


_checkerboard = partial(_coupling, mask="checkerboard")


def _sequence(memory: str, memory_budget: str | int = "auto", channels: int = 4, **options: object) -> nn.Module:
    boards = options.get("mask") == "checkerboard"
    steps = [pgf.FlowStep(channels, 5, **options, **({"parity": k % 2} if boards else {})) for k in range(3)]
    return pgf.ReversibleSequence(steps, memory, anchor_every=2, memory_budget=memory_budget)


def _injected(memory: str, memory_budget: str | int = "auto") -> nn.Module:
    """Every order of injectors, couplings and steps without."""
    options: list[dict[str, Any]] = [
        {"coupling": "none"},
        {**_INJECTED, "injector": True},
        {"coupling": "none"},
        {"coupling": "none"},
        {**_INJECTED, "coupling": "none", "injector": True},
        {**_INJECTED, "coupling": "additive", "injector": True},
        {"coupling": "none"},
    ]
    steps = [pgf.FlowStep(4, 5, **own) for own in options]
    return pgf.ReversibleSequence(steps, memory, anchor_every=2, memory_budget=memory_budget)


def _wavenets(memory: str) -> nn.Module:
    nets = [WaveNet(2, 4, 5, 3, 2, 2, cond_channels=2) for _ in range(3)]
    return MaskedSequence([pgf.FlowStep(4, permutation=GroupedInvConv(4), net=net) for net in nets], memory)


def _modules(memory: str) -> nn.Module:
    steps = [pgf.ActNorm(4), pgf.InvConv(4), _coupling(4), pgf.Permute(4, "reverse"), pgf.FlowStep(4, 5)]
    return pgf.ReversibleSequence(steps, memory, anchor_every=2)


class OwnNet(nn.Module):
    """A net of a user's own, which reads a condition if it is given one."""

    def __init__(self, inputs: int, outputs: int, cond_channels: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs + cond_channels, 5, 3, padding=1)
        self.last = nn.Conv2d(5, outputs, 1)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Map x, and cond, to the coupling's parameters."""
        return self.last(torch.tanh(self.first(x if cond is None else torch.cat([x, cond], dim=1))))


def _glow(name: str, cond_shape: tuple[int, ...] | None = None, **fields: Any) -> Bijection:
    given = {"n_levels": 2, "n_steps": 2, "hidden": 4, **fields}
    return Bijection(name, lambda: GlowAsLayer(pgf.Glow(**given)), fields["image_shape"], cond_shape)


BIJECTIONS = [
    Bijection("actnorm", lambda: pgf.ActNorm(3), (3, 2, 5)),
    Bijection("actnorm-flat", lambda: pgf.ActNorm(4), (4,)),
    Bijection("actnorm-3d", lambda: pgf.ActNorm(2), (2, 3, 1, 2)),
    Bijection("invconv-lu", lambda: pgf.InvConv(5), (5, 3, 2)),
    Bijection("invconv-plain", lambda: pgf.InvConv(5, lu=False), (5, 3, 2)),
    Bijection("invconv-lu-1d", lambda: pgf.InvConv(3), (3, 7)),
    Bijection("invconv-one-channel", lambda: pgf.InvConv(1, lu=False), (1, 3, 2)),
    Bijection("invconv-groups", lambda: GroupedInvConv(8, 4), (8, 3, 2)),
    Bijection("permute-shuffle", lambda: pgf.Permute(5, "shuffle"), (5, 1, 3)),
    Bijection("permute-reverse", lambda: pgf.Permute(4, "reverse"), (4, 3)),
    *(
        Bijection(f"coupling-{scale_map}-{order}", partial(_coupling, 4, scale_map=scale_map, order=order), (4, 3, 2))
        for scale_map, order in zip(SCALE_MAPS, 2 * ORDERS, strict=True)
    ),
    Bijection("coupling-eps", lambda: _coupling(4, scale_eps=0.2, scale_bias=-1.0), (4, 3, 2)),
    Bijection("coupling-factor", lambda: _coupling(4, scale_factor=2.0, scale_bias=0.0), (4, 3, 2)),
    Bijection("coupling-clamp", lambda: _coupling(4, scale_map="tanh", scale_clamp=0.5), (4, 3, 2)),
    Bijection("coupling-callable", lambda: _coupling(2, scale_map=softplus_scale), (2, 3, 5)),
    Bijection("coupling-additive", lambda: _coupling(6, "additive"), (6, 3, 2)),
    Bijection("coupling-additive-1d", lambda: _coupling(4, "additive", dims=1), (4, 5)),
    Bijection("coupling-cond", lambda: _coupling(4, cond_channels=2), (4, 3, 2), (2, 3, 2)),
    *(
        Bijection(
            f"coupling-checkerboard-{parity}-{coupling}",
            partial(_checkerboard, 3, coupling, parity=parity),
            (3, 4, 3),
        )
        for parity, coupling in ((0, "affine"), (1, "additive"))
    ),
    Bijection("coupling-checkerboard-1d", lambda: _checkerboard(2, dims=1, scale_map="exp"), (2, 6)),
    Bijection("coupling-checkerboard-3d", lambda: _checkerboard(1, dims=3, parity=1), (1, 4, 3, 2)),
    Bijection("coupling-checkerboard-cond", lambda: _checkerboard(2, cond_channels=1), (2, 4, 3), (1, 4, 3)),
    Bijection("step-dense", lambda: pgf.FlowStep(4, net=pgf.DenseNet(2, 4, 3)), (4, 3, 2)),
    Bijection("step-checkerboard", lambda: pgf.FlowStep(3, 5, mask="checkerboard", net_actnorm=True), (3, 4, 3)),
    Bijection(
        "sequence-checkerboard",
        lambda: _sequence("reversible", channels=3, mask="checkerboard", cond_channels=1),
        (3, 4, 2),
        (1, 4, 2),
    ),
    *(
        Bijection(
            f"step-{permutation}-{coupling}",
            partial(pgf.FlowStep, 4, 5, coupling=coupling, permutation=permutation),
            (4, 2, 3),
        )
        for permutation, coupling in zip(PERMUTATIONS, 2 * ("affine", "additive"), strict=True)
    ),
    Bijection("step-cond", lambda: pgf.FlowStep(4, 5, net_actnorm=True, cond_channels=1), (4, 3, 2), (1, 3, 2)),
    Bijection("step-scale-shift", lambda: pgf.FlowStep(4, 5, scale_map="exp", order="scale_shift"), (4, 3, 2)),
    Bijection("injector", lambda: pgf.AffineInjector(3, 2, 5), (3, 2, 3), (2, 2, 3)),
    Bijection(
        "injector-clamp",
        lambda: pgf.AffineInjector(3, 1, 5, net_actnorm=True, dims=1, spec=CouplingSpec(scale_map="tanh")),
        (3, 6),
        (1, 6),
    ),
    Bijection("step-injector", lambda: pgf.FlowStep(4, 5, injector=True, **_INJECTED), (4, 3, 2), (2, 3, 2)),
    Bijection(
        "step-injector-alone",
        lambda: pgf.FlowStep(4, 5, coupling="none", injector=True, **_INJECTED),
        (4, 3, 2),
        (2, 3, 2),
    ),
    Bijection("step-without-coupling", lambda: pgf.FlowStep(4, coupling="none"), (4, 3, 2)),
    Bijection("step-1d", lambda: pgf.FlowStep(2, 5, dims=1), (2, 7)),
    Bijection("step-3d", lambda: pgf.FlowStep(4, 3, dims=3), (4, 2, 1, 3)),
    *(
        Bijection(f"sequence-{memory}", partial(_sequence, memory), (4, 2, 3))
        for memory in ("reversible", "checkpoint", "store")
    ),
    Bijection("sequence-wavenet", lambda: _wavenets("reversible"), (4, 7), (2, 7)),
    Bijection("sequence-strips", lambda: _sequence("reversible", memory_budget=1), (4, 7, 1)),
    Bijection("sequence-cond", lambda: _sequence("reversible", cond_channels=1), (4, 2, 3), (1, 2, 3)),
    Bijection("sequence-of-modules", lambda: _modules("store"), (4, 3, 2)),
    Bijection("sequence-injectors", lambda: _injected("store"), (4, 2, 3), (2, 2, 3)),
    Bijection("sequence-injectors-strips", lambda: _injected("reversible", 1), (4, 7, 1), (2, 7, 1)),
    Bijection("sequence-without-couplings", lambda: _sequence("reversible", coupling="none"), (4, 2, 3)),
    Bijection("squeeze", lambda: pgf.Squeeze(), (2, 4, 2)),
    Bijection("squeeze-by-3", lambda: pgf.Squeeze(3), (1, 3, 6)),
    Bijection("squeeze-1d", lambda: pgf.Squeeze(), (3, 6)),
    Bijection("squeeze-3d", lambda: pgf.Squeeze(), (1, 2, 4, 2)),
    Bijection("haar", lambda: pgf.Haar(0.25), (3, 4, 2)),
    Bijection("haar-1d", lambda: pgf.Haar(-2.0, sign=-1), (2, 6)),
    Bijection("haar-3d", lambda: pgf.Haar(sign=-1), (1, 2, 4, 2)),
    Bijection("split", lambda: pgf.Split(4), (4, 3, 2)),
    Bijection("split-uneven-cond", lambda: pgf.Split(5, factored=2, dims=1, cond_channels=2), (5, 4), (2, 4)),
    Bijection("split-fixed-prior", lambda: pgf.Split(4, learn_prior=False), (4, 3, 2)),
    _glow("glow", image_shape=(3, 4, 8), n_steps=1),
    _glow("glow-one-channel", image_shape=(1, 8, 4)),
    _glow("glow-1d", image_shape=(2, 8)),
    _glow("glow-3d", image_shape=(1, 2, 2, 4), n_levels=1),
    _glow("glow-cond", (2,), image_shape=(1, 4, 4), cond_channels=2, net_actnorm=True),
    _glow("glow-cond-map", (1, 4, 8), image_shape=(1, 4, 8), cond_channels=1, n_classes=3),
    _glow(
        "glow-checkerboard",
        (1, 4, 4),
        image_shape=(2, 4, 4),
        n_checkerboard=1,
        n_last_checkerboard=2,
        cond_channels=1,
    ),
    _glow(
        "glow-injectors",
        (2, 8, 4),
        image_shape=(1, 8, 4),
        **_INJECTED,
        injector=True,
        n_steps=1,
        n_transitions=1,
        split_ratio=0.25,
        cond_splits=True,
    ),
    _glow("glow-own-nets", image_shape=(2, 4, 4), n_checkerboard=1, net=OwnNet),
    _glow("glow-own-nets-additive", image_shape=(1, 8, 4), coupling="additive", permutation="reverse", net=OwnNet),
    _glow(
        "glow-own-nets-cond",
        (2, 8, 4),
        image_shape=(1, 8, 4),
        cond_channels=2,
        injector=True,
        n_transitions=1,
        net=partial(OwnNet, cond_channels=2),
    ),
    _glow("glow-without-splits", image_shape=(1, 4, 4), n_splits=0, learn_top=False),
    _glow("glow-shuffle", image_shape=(1, 4, 4), permutation="shuffle", scale_map="atan"),
]
