"""The multi-scale Glow: exact log-likelihood, exact latents, one-pass sampling."""

from __future__ import annotations

import copy
import numbers
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._errors import can_read, check_input, expect
from pyglow_fast.layers import ActNorm, Split
from pyglow_fast.layers.ranks import refused_alike
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.models.class_head import ClassHead
from pyglow_fast.models.config import GlowConfig
from pyglow_fast.models.distribution import GlowDistribution
from pyglow_fast.models.graphed import GraphedGlow
from pyglow_fast.models.level import FlowLevel
from pyglow_fast.models.prior import TopPrior, check_labels, check_temperature, scaled_noise, standardised
from pyglow_fast.models.settings import GlowSettings


class Glow(GlowSettings):
    """log p(x) = sum over levels of log N(z_l; prior(z_{>l})) + log|det dz/dx|.

    Each of the L levels squeezes, applies K flow steps, and (but for the last) factors half of the channels out as a
    latent whose prior the other half predicts. With ``n_checkerboard`` some of the steps come before the squeeze. x is
    float, (level + u) / n_bins - 0.5 with u uniform in [0, 1); see :mod:`pyglow_fast.likelihood`.

    Args:
        config: a GlowConfig; or pass its fields as keywords.
        memory: "reversible", "checkpoint" or "store": what training keeps for the backward; may be changed at any time.
        anchor_every, tolerance, memory_budget, deferred_check: see :class:`~pyglow_fast.ReversibleSequence`.

        precision: that the coupling nets compute in, the flow state staying float32: "bf16", "fp16", "tf32", "fp32" or
            "auto" (as torch.autocast says); may be changed at any time. Encoding and decoding use float32 nets whatever
            it is, unless they are told otherwise.

    Shapes: x (N, C, *spatial), float32 or float64; latents, shallowest first: L-1 halves of the levels' states, then
    the top state; log_det and log_prob (N,), nats.

    Raises:
        ValueError: bad configuration, shape, dtype, device, labels, condition or temperature, each named; NaN or inf in
            x (checked on the CPU; on CUDA, where the check would stop the stream, log_prob is NaN then).

    Reference: Kingma & Dhariwal 2018.
    """

    def __init__(
        self,
        config: GlowConfig | None = None,
        *,
        memory: str = "reversible",
        anchor_every: str | int | None = "auto",
        tolerance: float | None = None,
        memory_budget: str | int = "auto",
        deferred_check: bool = False,
        precision: str = "auto",
        **fields: Any,
    ) -> None:
        super().__init__()
        expect(
            config is None or not fields, "config", "a GlowConfig or its fields as keywords, not both", sorted(fields)
        )
        expect(config is None or isinstance(config, GlowConfig), "config", "a GlowConfig", type(config).__name__)
        self.config = GlowConfig.from_dict(fields) if config is None else config
        self.state_shapes = self.config.level_shapes()
        options = {
            "memory": memory,
            "anchor_every": anchor_every,
            "tolerance": tolerance,
            "memory_budget": memory_budget,
            "deferred_check": deferred_check,
        }
        self.levels = nn.ModuleList(FlowLevel(self.config, level, **options) for level in range(self.config.n_levels))
        self.splits = nn.ModuleList(
            Split(shape[0], self.config.learn_prior, self.config.dims, self.config.border)
            for shape in self.state_shapes[:-1]
        )
        self.precision = precision
        self.prior = TopPrior(
            self.state_shapes[-1][0],
            self.config.n_classes,
            self.config.learn_prior,
            self.config.border,
            self.config.dims,
        )
        self.head = ClassHead(self.state_shapes[-1][0], self.config.classify) if self.config.classify else None

    def freeze(self) -> Glow:
        """A copy for deployment: the same densities, latents and samples from folded weights in buffers.

        Actnorm, 1x1 convolution and their inverses are one matrix a step, the nets' gains and actnorms part of their
        weights: nothing is computed from parameters any more, none asks for a gradient, and the copy stays in
        evaluation mode. Its state_dict has other keys than this model's.

        Raises:
            ValueError: an actnorm has seen no data; steps with hooks or overridden methods.
        """
        frozen = copy.deepcopy(self)
        for level in frozen.levels:
            assert isinstance(level, FlowLevel)
            level.freeze()
        frozen.requires_grad_(False)
        return frozen.eval()

    def make_graphed(
        self, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None, n_samples: int | None = None
    ) -> GraphedGlow:
        """Training steps and sampling as CUDA graphs, for batches like these; see GraphedGlow.

        Args:
            x, y, cond: a batch as log_prob takes it.
            n_samples: of one call of ``sample``; as many as x has if None.

        Raises:
            ValueError: the model is not on a GPU, is frozen, or has actnorms that have seen no data.
        """
        return GraphedGlow(self, x, y, cond, n_samples)

    def train(self, mode: bool = True) -> Glow:
        """Training mode, in which fresh actnorms initialise from data; a frozen model stays in evaluation mode."""
        return super().train(mode and bool(self._sequences()))

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """(C, *spatial) of each latent, shallowest first."""
        return [(shape[0] // 2, *shape[1:]) for shape in self.state_shapes[:-1]] + [self.state_shapes[-1]]

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm has seen data (or was loaded so)."""
        return all(module.is_initialized for module in self.modules() if isinstance(module, ActNorm))

    def _refused_alike(self) -> AbstractContextManager[None]:
        """Around the checks of a forward: where it would initialise, all ranks refuse what one does."""
        return refused_alike(self._parameter().device, lambda: self.training and not self.is_initialized)

    def _parameter(self) -> Tensor:
        """A tensor of the model's dtype and device."""
        for tensor in self.parameters():
            return tensor
        return next(tensor for tensor in self.buffers() if tensor.is_floating_point())

    def _check_x(self, x: Tensor, cond: Tensor | None) -> None:
        check_input("x", x, self.config.image_shape[0], self._parameter())
        shape = self.config.image_shape
        expect(tuple(x.shape[1:]) == shape, "x", f"shape (N, {', '.join(map(str, shape))})", f"shape {tuple(x.shape)}")
        if can_read(x):
            expect(bool(x.isfinite().all()), "x", "finite values", "NaN or inf")
        self._check_cond(cond, x.shape[0])

    def _check_cond(self, cond: Tensor | None, n: int) -> None:
        channels = self.config.cond_channels
        if channels == 0:
            expect(cond is None, "cond", "None, since the model has cond_channels=0", type(cond).__name__)
            return
        expect(isinstance(cond, Tensor), "cond", f"a tensor with {channels} channels", type(cond).__name__)
        assert cond is not None  # for the type checker: refused above
        fits = cond.dim() in (2, self.config.dims + 2) and tuple(cond.shape[:2]) == (n, channels)
        expect(fits, "cond", f"shape ({n}, {channels}) or ({n}, {channels}, *spatial)", f"shape {tuple(cond.shape)}")
        expect(cond.is_floating_point(), "cond", "a floating dtype", cond.dtype)
        device = self._parameter().device
        expect(cond.device == device, "cond", f"device {device} (where the parameters are)", cond.device)
        if can_read(cond):
            expect(bool(cond.isfinite().all()), "cond", "finite values", "NaN or inf")

    def _check_latents(self, latents: list[Tensor]) -> None:
        shapes = self.latent_shapes
        expect(isinstance(latents, list | tuple), "latents", "a list of tensors", type(latents).__name__)
        expect(len(latents) == len(shapes), "latents", f"{len(shapes)} tensors, one a level", len(latents))
        expect(isinstance(latents[0], Tensor), "latents[0]", "a Tensor", type(latents[0]).__name__)
        for i, (latent, shape) in enumerate(zip(latents, shapes, strict=True)):
            check_input(f"latents[{i}]", latent, shape[0], self._parameter())
            expected = (latents[0].shape[0], *shape)
            expect(
                tuple(latent.shape) == expected, f"latents[{i}]", f"shape {expected}", f"shape {tuple(latent.shape)}"
            )

    @torch.no_grad()
    def initialize(self, x: Tensor, cond: Tensor | None = None) -> None:
        """Set every actnorm from x, level by level; happens by itself on the first training forward.

        x is checked first. Should a step still make NaN or inf of it, the error leaves the actnorms before it set.
        Under torch.distributed all ranks must call it, each with its part of the batch: see ActNorm.
        """
        with refused_alike(self._parameter().device, lambda: not self.is_initialized):
            self._check_x(x, cond)
        for i, level in enumerate(self.levels):
            assert isinstance(level, FlowLevel)
            x = level.initialize(x, cond)
            if i < len(self.splits):
                x, _ = x.chunk(2, dim=1)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x -> (latents, log_det)."""
        latents, _, log_det = self._encode(x, cond)
        return latents, log_det

    def _encode(self, x: Tensor, cond: Tensor | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Latents, the kept halves that predict their priors, and log_det."""
        with self._refused_alike():
            self._check_x(x, cond)
        if self.training and not self.is_initialized:
            self.initialize(x, cond)
        log_det = x.new_zeros(x.shape[0])
        latents, kept_halves = [], []
        for i, level in enumerate(self.levels):
            x, level_log_det = level(x, cond)
            log_det = log_det + level_log_det
            if i < len(self.splits):
                x, factored = x.chunk(2, dim=1)
                kept_halves.append(x)
                latents.append(factored)
        latents.append(x)
        return latents, kept_halves, log_det

    def inverse(self, latents: list[Tensor], cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """latents -> (x, log_det), log_det the negative of the forward one."""
        self._check_latents(latents)
        self._check_cond(cond, latents[0].shape[0])
        x = latents[-1]
        log_det = x.new_zeros(x.shape[0])
        for i in reversed(range(len(self.levels))):
            if i < len(self.splits):
                x = torch.cat([x, latents[i]], dim=1)
            level = self.levels[i]
            assert isinstance(level, FlowLevel)
            x, level_log_det = level.inverse(x, cond)
            log_det = log_det + level_log_det
        return x, log_det

    def log_prob(self, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """log p(x), or log p(x | y) for a model with classes, in nats, (N,)."""
        return self._log_prob(x, y, cond)[0]

    def _log_prob(self, x: Tensor, y: Tensor | None, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p(x), and the top latent that a head may look at: one pass for both."""
        with self._refused_alike():
            expect(isinstance(x, Tensor) and x.dim() >= 1, "x", "a Tensor (N, C, *spatial)", type(x).__name__)
            check_labels(y, x.shape[0], self.config.n_classes)
        latents, kept_halves, log_prob = self._encode(x, cond)
        for split, kept, factored in zip(self._splits(), kept_halves, latents[:-1], strict=True):
            log_prob = log_prob + split.log_prob(kept, factored)
        return log_prob + functional.gaussian_log_prob(latents[-1], *self.prior(latents[-1], y)), latents[-1]

    def class_logits(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Logits of the classes of x, (N, config.classify), by the head on its top latent; no label is asked for.

        Raises ValueError for a model without a head (classify=0). ``model.head(z)`` takes a top latent, see ClassHead.
        """
        return self._required_head()(self(x, cond)[0][-1])

    def log_prob_and_logits(
        self, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """:meth:`log_prob` (N,), nats, and :meth:`class_logits` (N, config.classify), from one pass."""
        head = self._required_head()
        log_prob, top = self._log_prob(x, y, cond)
        return log_prob, head(top)

    def _required_head(self) -> ClassHead:
        expect(self.head is not None, "model", "one with a classifier (classify=number of classes)", "classify=0")
        assert self.head is not None  # for the type checker: refused above
        return self.head

    def bits_per_dim(
        self,
        images: Tensor,
        n_bins: int = 256,
        y: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Bits per dimension of integer images (N, C, *spatial), dequantised with fresh noise; (N,).

        Levels are 0..n_bins-1; y and cond as in log_prob.
        """
        # Everything is checked before the noise is drawn: a refused call leaves the generator as it was.
        with self._refused_alike():
            expect(isinstance(images, Tensor), "images", "a Tensor", type(images).__name__)
            shape = (*images.shape[:1], *self.config.image_shape)
            expect(
                tuple(images.shape) == shape,
                "images",
                f"shape (N, {', '.join(map(str, shape[1:]))})",
                tuple(images.shape),
            )
            check_labels(y, images.shape[0], self.config.n_classes)
            self._check_cond(cond, images.shape[0])
            x = dequantize(images, n_bins, generator, dtype=self._parameter().dtype)
        return bits_per_dim(self.log_prob(x, y, cond), self.config.n_values, n_bins)

    def encode(self, x: Tensor, cond: Tensor | None = None, precision: str = "fp32") -> list[Tensor]:
        """The latents of x, all levels: decode(encode(x)) is x up to rounding.

        precision: of the nets; "auto" for the model's own. Rounding of 16 bits is amplified from step to step: a
        warning says by how much.
        """
        with self._exact(precision, "encode"):
            return self(x, cond)[0]

    def decode(self, latents: list[Tensor], cond: Tensor | None = None, precision: str = "fp32") -> Tensor:
        """The x whose latents these are; precision: that of encode."""
        with self._exact(precision, "decode"):
            return self.inverse(latents, cond)[0]

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float | Tensor = 1.0,
        y: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x = inverse of z_l = mean + temperature sd eps at every level; no gradient is recorded.

        Args:
            n: number of samples.
            temperature: multiplies the standard deviation of every prior; a number (0 gives the mode), or one per
                sample.
            y: labels (n,), drawn uniformly if the model has classes and None is given.
            cond: condition, if the model has one.
            generator: source of the noise.

        Returns:
            (n, C, *spatial) in about [-0.5, 0.5]; :func:`pyglow_fast.likelihood.quantize` gives levels.
        """
        whole = isinstance(n, numbers.Integral)  # numpy's integers too
        expect(whole and int(n) >= 0, "n", "a whole number of samples, 0 or more", repr(n))
        n = int(n)
        check_temperature(temperature, n)
        self._check_cond(cond, n)
        parameter = self._parameter()
        if y is None and self.config.n_classes is not None:
            device = parameter.device if generator is None else generator.device
            y = torch.randint(self.config.n_classes, (n,), generator=generator, device=device).to(parameter.device)
        check_labels(y, n, self.config.n_classes)
        # In the order in which the inverse needs it: the deepest latent's first.
        shapes = [parameter.new_empty(n, *shape) for shape in self.latent_shapes]
        noise = [scaled_noise(like, temperature, generator) for like in reversed(shapes)]
        return self._from_noise(noise[::-1], y, cond)[0]

    def _from_noise(self, noise: list[Tensor], y: Tensor | None, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, log_sd = self.prior(noise[-1], y)
        x = functional.gaussian_sample(noise[-1], mean, log_sd)
        log_det = log_sd.expand_as(x).flatten(1).sum(1)
        for i in reversed(range(len(self.levels))):
            if i < len(self.splits):
                split = self.splits[i]
                assert isinstance(split, Split)
                mean, log_sd = split.prior(x)
                x = torch.cat([x, functional.gaussian_sample(noise[i], mean, log_sd)], dim=1)
                log_det = log_det + log_sd.flatten(1).sum(1)
            level = self.levels[i]
            assert isinstance(level, FlowLevel)
            x, level_log_det = level.inverse(x, cond)
            log_det = log_det + level_log_det
        return x, log_det

    def from_noise(
        self, noise: list[Tensor], y: Tensor | None = None, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x, log|det dx/deps|: z_l = mean_l + exp(log_sd_l) eps_l by the priors, then the inverse flow.

        Args:
            noise: eps of every level, of ``latent_shapes``.
            y, cond: as in log_prob.
        """
        self._check_latents(noise)
        self._check_cond(cond, noise[0].shape[0])
        check_labels(y, noise[0].shape[0], self.config.n_classes)
        return self._from_noise(noise, y, cond)

    def to_noise(self, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """eps of every level and log|det deps/dx|, the inverse of :meth:`from_noise`: eps_l = (z_l - mean_l) / sd_l."""
        check_labels(y, x.shape[0], self.config.n_classes)
        latents, kept_halves, log_det = self._encode(x, cond)
        priors = [split.prior(kept) for split, kept in zip(self._splits(), kept_halves, strict=True)]
        noise = []
        for latent, (mean, log_sd) in zip(latents, [*priors, self.prior(latents[-1], y)], strict=True):
            noise.append(standardised(latent, mean, log_sd))
            log_det = log_det - log_sd.expand_as(latent).flatten(1).sum(1)
        return noise, log_det

    def _splits(self) -> list[Split]:
        return [split for split in self.splits if isinstance(split, Split)]

    def as_distribution(self, y: Tensor | int | None = None, cond: Tensor | None = None) -> GlowDistribution:
        """This model with the interface of torch.distributions; see GlowDistribution."""
        return GlowDistribution(self, y, cond)
