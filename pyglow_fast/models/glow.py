"""The multi-scale Glow: exact log-likelihood, exact latents, one-pass sampling."""

from __future__ import annotations

import contextlib
import copy
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast._core.errors import can_read, check_count, check_input, expect
from pyglow_fast._core.float32 import has_tf32
from pyglow_fast._core.tracing import is_watched
from pyglow_fast.layers import ActNorm, Coupling, FrozenSteps, ReversibleSequence, Split
from pyglow_fast.layers.reshape import standardised
from pyglow_fast.likelihood import bits_per_dim, dequantize
from pyglow_fast.models.class_head import ClassHead
from pyglow_fast.models.condition import Condition, fitted, level_conditions
from pyglow_fast.models.config import GlowConfig
from pyglow_fast.models.distribution import GlowDistribution
from pyglow_fast.models.level import FlowLevel, NetFactory
from pyglow_fast.models.planned import plan_of_step, plans_of_runs
from pyglow_fast.models.prior import TopPrior, check_labels, check_temperature, scaled_noise
from pyglow_fast.models.warned import warn_of_fresh, warn_of_not_finite, warn_of_other_range
from pyglow_fast.nets.precision import check_precision, overridden
from pyglow_fast.runs.planner import RunPlan
from pyglow_fast.runs.plans import Plans
from pyglow_fast.runs.setting import parse_memory


class _Encoded(NamedTuple):
    latents: list[Tensor]
    kept: list[Tensor]  # what the prior of each latent reads; the top latent itself at the end
    conds: list[Tensor | None]
    log_det: Tensor
    states: list[list[Tensor]]
    can_read: bool  # whether the host may look at values


class Glow(nn.Module):
    """log p(x) = sum over levels of log N(z_l; prior(z_{>l})) + log|det dz/dx|.

    Each of the L levels squeezes, applies K flow steps, and (but for the last) factors half of the channels out as a
    latent whose prior the other half predicts. With ``n_checkerboard`` some of the steps come before the squeeze;
    GlowConfig says what else there is. x is float, (level + u) / n_bins - 0.5 with u uniform in [0, 1); see
    :mod:`pyglow_fast.likelihood`. Integers are refused, and there is a warning if the first x on a CPU looks like
    pixels in [0, 1] or 0..255; both say the line that mends it.

    Args:
        config: a GlowConfig; or pass its fields as keywords.
        net: a factory net(in_channels, out_channels) -> nn.Module of coupling nets of your own, called once for each
            coupling, those of the first level first; :class:`~pyglow_fast.Coupling` says what a net is given and must
            give. In a model with a condition it is called as net(x1, cond), and in_channels counts x1 alone. ``hidden``
            and ``net_actnorm`` are then of the injectors' nets alone, which stay CouplingNets, and ``border`` of the
            priors. Neither config nor model holds the factory: a state_dict is loaded into a Glow made with the same.
        memory: "reversible", "checkpoint" or "store": what is kept for the backward, of log_prob as of decode,
            from_noise and sample(differentiable=True). Or bytes, as a number or a text such as "4GB": the fastest
            pass and backward whose tensors take at most so many beyond parameters and their gradients
            (docs/memory.md). May be changed at any time.
        anchor_every, tolerance, memory_budget, deferred_check: see :class:`~pyglow_fast.ReversibleSequence`.
        precision: that the coupling nets compute in, the flow state staying float32: "bf16", "fp16", "tf32", "fp32" or
            "auto" (as torch.autocast and torch's settings say, which on a GPU is "tf32" for convolutions as torch
            comes); may be changed at any time. Encoding and decoding use float32 nets whatever it is, unless they are
            told otherwise.

    Shapes: x (N, C, *spatial), float32 or float64; latents, shallowest first: L-1 halves of the levels' states, then
    the top state; log_det and log_prob (N,), nats. cond: one tensor (N, C_cond) or (N, C_cond, *spatial), spread or
    averaged to the size of each level; or a list, or a dict with the keys 0 .. L-1, of one a level at its size.

    Raises:
        ValueError: bad configuration, shape, dtype, device, labels, condition or temperature, each named; NaN or inf in
            x (checked on the CPU; on CUDA, where the check would stop the stream, log_prob is NaN then).

    Reference: Kingma & Dhariwal 2018.

    Examples:
        >>> import torch
        >>> from pyglow_fast import Glow
        >>> model = Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden=8)
        >>> images = torch.randint(256, (4, 3, 8, 8))
        >>> model.bits_per_dim(images).mean().backward()  # a training step but for the optimizer
        >>> latents, log_det = model(images / 256 - 0.5)
        >>> [tuple(z.shape) for z in latents], torch.allclose(model.inverse(latents)[0], images / 256 - 0.5, atol=1e-4)
        ([(4, 6, 4, 4), (4, 24, 2, 2)], True)
        >>> model.sample(2, temperature=0.7).shape
        torch.Size([2, 3, 8, 8])
    """

    _range_is_known = False  # of x: looked at once, or told by whoever made the model

    def __init__(
        self,
        config: GlowConfig | None = None,
        *,
        net: NetFactory | None = None,
        memory: str | int | float = "reversible",
        anchor_every: str | int | None = "auto",
        tolerance: float | None = None,
        memory_budget: str | int = "auto",
        deferred_check: bool = False,
        precision: str = "auto",
        **fields: Any,
    ) -> None:
        super().__init__()
        alone = config is None or not fields
        expect(alone, "config", "a GlowConfig or its fields as keywords, not both", sorted(fields))
        expect(config is None or isinstance(config, GlowConfig), "config", "a GlowConfig", type(config).__name__)
        makes = net is None or (callable(net) and not isinstance(net, nn.Module))
        expect(makes, "net", "a factory net(in_channels, out_channels) -> nn.Module", type(net).__name__)
        self.config = GlowConfig.from_dict(fields) if config is None else config
        self.state_shapes = self.config.level_shapes()
        options = (parse_memory(memory), anchor_every, tolerance, memory_budget, deferred_check)
        levels = [FlowLevel(self.config, i, net, *options) for i in range(self.config.n_levels)]
        splits = [
            Split(
                self.state_shapes[i][0],
                self.config.learn_prior,
                self.config.dims,
                self.config.border,
                self.latent_shapes[i][0],
                self.config.cond_channels_of(i) if self.config.cond_splits else 0,
            )
            for i in range(self.config.splits)
        ]
        self.levels = cast("list[FlowLevel]", nn.ModuleList(levels))
        self.splits = cast("list[Split]", nn.ModuleList(splits))
        self.precision = precision
        self._plans = Plans()
        self.prior = TopPrior(
            self.state_shapes[-1][0],
            self.config.n_classes,
            self.config.learn_prior and self.config.learn_top,
            self.config.border,
            self.config.dims,
        )
        self.head = ClassHead(self.state_shapes[-1][0], self.config.classify) if self.config.classify else None

    def _sequences(self) -> list[ReversibleSequence]:
        """All runs of steps, in their order; none of a frozen model."""
        return [run for level in self.levels for run in level.children() if isinstance(run, ReversibleSequence)]

    @property
    def memory(self) -> str | int:
        """The memory mode of all levels, or the bytes of the whole model; "frozen" for a frozen model."""
        return self._sequences()[0].memory if self._sequences() else "frozen"

    @memory.setter
    def memory(self, memory: str | int | float) -> None:
        expect(bool(self._sequences()), "memory", "a model that is not frozen", memory)
        found = parse_memory(memory)
        for sequence in self._sequences():
            sequence.memory = found

    def memory_plan(self, n: int) -> RunPlan | None:
        """Plan a training step on n images of the model's size, from shapes alone; None without a budget.

        A gradient through decode or sample has a plan of its own, made when it is first asked for.

        What the nets run in is reckoned as it would be now: within torch.autocast call it there.

        Args:
            n: images of a batch.

        Raises:
            ValueError: the budget is too small for them; the message says how many bytes are enough.
        """
        check_count("n", n)
        return None if isinstance(self.memory, str) else plan_of_step(self, n)

    def _couplings(self) -> list[Coupling]:
        return [module for module in self.modules() if isinstance(module, Coupling)]

    @property
    def precision(self) -> str:
        """The precision that all coupling nets compute in."""
        return self._couplings()[0].precision

    @precision.setter
    def precision(self, precision: str) -> None:
        for coupling in self._couplings():
            coupling.precision = precision

    def memory_report(self) -> list[dict[str, Any]]:
        """Report on each run of steps, two a level with checkerboards: see ReversibleSequence.memory_report.

        With a budget "predicted_bytes" are those of the whole model's last recorded pass, of either direction.
        """
        return [sequence.memory_report() for sequence in self._sequences()]

    def freeze(self) -> Glow:
        """Make a copy for deployment: the same densities, latents and samples from folded weights in buffers.

        Actnorm, 1x1 convolution and their inverses are one matrix a step, the nets' gains and actnorms part of their
        weights: nothing is computed from parameters any more, none asks for a gradient, and the copy stays in
        evaluation mode. Its state_dict has other keys than this model's. Gradients flow to x, latents and condition;
        from latents to x they take what the memory mode of this model says, of bytes what "reversible" does.

        Raises:
            ValueError: an actnorm has seen no data; steps with hooks or overridden methods.
        """
        frozen = copy.deepcopy(self)
        for level in frozen.levels:
            level.freeze()
        frozen.requires_grad_(False)
        return frozen.eval()

    def train(self, mode: bool = True) -> Glow:
        """Set training mode, in which fresh actnorms initialise from data; a frozen model stays in evaluation mode."""
        return super().train(mode and bool(self._sequences()))

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """List (C, *spatial) of each latent, shallowest first."""
        return self.config.latent_shapes()

    @property
    def is_initialized(self) -> bool:
        """Whether every actnorm of the model has been initialised, from data or by loading."""
        return all(module.is_initialized for module in self.modules() if isinstance(module, ActNorm))

    def _parameter(self) -> Tensor:
        """A tensor of the model's dtype and device."""
        for steps in self.levels[0].children():
            if isinstance(steps, FrozenSteps):  # whose parameters would have to be searched for
                return steps.like
        return next(self.parameters())

    def _check_x(self, x: Tensor, cond: Condition | None) -> tuple[list[Tensor | None], bool]:
        """Checks both, and gives the condition of each level, and whether the host may look at values."""
        if isinstance(x, Tensor) and not x.is_floating_point():
            expect(False, "x", "float values, pyglow_fast.likelihood.dequantize(x) of integer levels", x.dtype)
        check_input("x", x, self.config.image_shape[0], self._parameter())
        self._check_shape("x", x)
        reads = can_read(x)
        if reads:
            expect(bool(x.isfinite().all()), "x", "finite values", "NaN or inf")
            if not self._range_is_known and not is_watched() and x.numel():
                warn_of_other_range(x)
                self._range_is_known = True
                if not (self.training or self.levels[0].has_begun):
                    warn_of_fresh(stacklevel=6)
        return self._check_cond(cond, x.shape[0]), reads

    def _check_shape(self, name: str, x: Tensor) -> None:
        shape = self.config.image_shape
        fits = x.dim() > 0 and tuple(x.shape[1:]) == shape
        expect(fits, name, f"shape (N, {', '.join(map(str, shape))})", f"shape {tuple(x.shape)}")

    def _check_cond(self, cond: Condition | None, n: int) -> list[Tensor | None]:
        """Checks it, and gives that of each level."""
        if cond is None and not self.config.cond_channels:
            return [None] * len(self.state_shapes)
        device = self._parameter().device
        return level_conditions(cond, self.config.cond_channels, n, self.state_shapes, device)

    def _check_latents(self, latents: list[Tensor]) -> None:
        shapes = self.latent_shapes
        expect(isinstance(latents, list | tuple), "latents", "a list of tensors", type(latents).__name__)
        expect(len(latents) == len(shapes), "latents", f"{len(shapes)} tensors, one a level", len(latents))
        expect(isinstance(latents[0], Tensor), "latents[0]", "a Tensor", type(latents[0]).__name__)
        for i, (latent, shape) in enumerate(zip(latents, shapes, strict=True)):
            check_input(f"latents[{i}]", latent, shape[0], self._parameter())
            found, expected = tuple(latent.shape), (latents[0].shape[0], *shape)
            expect(found == expected, f"latents[{i}]", f"shape {expected}", f"shape {found}")

    @torch.no_grad()
    def initialize(self, x: Tensor, cond: Condition | None = None) -> None:
        """Set every actnorm from x, level by level, as the first training forward does by itself.

        x is checked first. Should a step still make NaN or inf of it, the error leaves the actnorms before it set.
        Under torch.distributed all ranks must call it, each with its part of the batch: see ActNorm.
        """
        conds, _ = self._check_x(x, cond)
        for i, level in enumerate(self.levels):
            x = level.initialize(x, conds[i])
            if i < len(self.splits):
                x, _ = self.splits[i].parts(x)

    def forward(self, x: Tensor, cond: Condition | None = None) -> tuple[list[Tensor], Tensor]:
        """Map x to its latents, shallowest first, and log_det = log|det dz/dx|."""
        found = self._encode(x, cond, name="forward")
        return found.latents, found.log_det

    def intermediates(
        self, x: Tensor, cond: Condition | None = None, at: Sequence[int] = ()
    ) -> tuple[list[Tensor], list[list[Tensor]], Tensor]:
        """Map x to (latents, states, log_det): what :meth:`forward` gives, and states between the steps.

        ``states[l]`` are those of level l behind its steps ``at`` and behind its last one, before its split. Gradients
        flow from each, in every memory mode; they are kept for it.

        Args:
            x, cond: as of forward.
            at: numbers of steps within a level, ascending, without the last; transitions count.

        Raises:
            ValueError: a step that there is not; a frozen model, or one with checkerboards; what forward refuses.
        """
        boards = self.config.n_checkerboard + self.config.n_last_checkerboard
        expect(boards == 0, "model", "one without checkerboards", f"{boards} of them a level")
        expect(self.memory != "frozen", "model", "one that is not frozen", "a frozen one")
        found = self._encode(x, cond, at)
        return found.latents, found.states, found.log_det

    def _encode(self, x: Tensor, cond: Condition | None, at: Sequence[int] = (), name: str = "log_prob") -> _Encoded:
        """Map x to its latents, with the states of each level behind its steps ``at`` and its last one."""
        conds, reads = self._check_x(x, cond)
        if self.training and not self.levels[0].has_begun:  # all levels, while none of them is gathered for its call
            self.initialize(x, cond)
        log_det = x.new_zeros(x.shape[0])
        latents: list[Tensor] = []
        kept: list[Tensor] = []
        states: list[list[Tensor]] = []
        plans = {} if isinstance(self.memory, str) else plans_of_runs(self, [x], conds, name)
        for i, level in enumerate(self.levels):
            found, level_log_det = level(x, conds[i], plans, at)
            states.append(found)
            x, log_det = found[-1], log_det + level_log_det
            if i < len(self.splits):
                x, factored = self.splits[i].parts(x)
                kept.append(x)
                latents.append(factored)
        return _Encoded([*latents, x], [*kept, x], conds, log_det, states, reads)

    def _prior(self, i: int, kept: Tensor, cond: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log_sd of latent i, given the channels that its split keeps, or a tensor like the top latent."""
        if i == len(self.splits):
            found: tuple[Tensor, Tensor] = self.prior(kept, y)
            return found
        return self.splits[i].prior(kept, None if cond is None else fitted(cond, kept.shape[2:]))

    def _decode(
        self,
        given: Sequence[Tensor],
        y: Tensor | None,
        conds: Sequence[Tensor | None],
        choose: Callable[[int, Callable[[], tuple[Tensor, Tensor]]], Tensor],
        name: str = "inverse",
    ) -> tuple[Tensor, Tensor]:
        """x and the log-det of the inverse flow; ``choose(i, prior)`` gives latent i, and prior() its mean and log_sd.

        The deepest latent is chosen first: a prior sees what those below it are. ``given`` are like the latents;
        ``name`` is that of the method.
        """
        if not (self._range_is_known or is_watched() or self.levels[0].has_begun):
            warn_of_fresh(stacklevel=5 if name == "from_noise" else 4)
        plans = {} if isinstance(self.memory, str) else plans_of_runs(self, given, conds, name)
        x = choose(len(self.splits), partial(self._prior, len(self.splits), given[-1], None, y))
        log_det = x.new_zeros(x.shape[0])
        for i, level in reversed(list(enumerate(self.levels))):
            if i < len(self.splits):
                x = torch.cat([x, choose(i, partial(self._prior, i, x, conds[i], y))], dim=1)
            x, level_log_det = level.inverse(x, conds[i], plans)
            log_det = log_det + level_log_det
        return x, log_det

    def inverse(self, latents: list[Tensor], cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """Map latents back to x; log_det is the negative of the forward one. Its backward keeps to ``memory``."""
        self._check_latents(latents)
        conds = self._check_cond(cond, latents[0].shape[0])
        return self._decode(latents, None, conds, lambda i, _: latents[i])

    def log_prob(self, x: Tensor, y: Tensor | None = None, cond: Condition | None = None) -> Tensor:
        """log p(x), or log p(x | y) for a model with classes, in nats, (N,)."""
        return self._log_prob(x, y, cond)[0]

    def _log_prob(self, x: Tensor, y: Tensor | None, cond: Condition | None) -> tuple[Tensor, Tensor]:
        """log p(x), and the top latent that a head may look at: one pass for both."""
        expect(isinstance(x, Tensor) and x.dim() >= 1, "x", "a Tensor (N, C, *spatial)", type(x).__name__)
        check_labels(y, x.shape[0], self.config.n_classes)
        found = self._encode(x, cond)
        log_prob = found.log_det
        for i, (latent, kept) in enumerate(zip(found.latents, found.kept, strict=True)):
            log_prob = log_prob + functional.gaussian_log_prob(latent, *self._prior(i, kept, found.conds[i], y))
        if found.can_read and not log_prob.isfinite().all():
            warn_of_not_finite(self, x, found.conds, log_prob)
        return log_prob, found.latents[-1]

    def class_log_probs(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        """log p(x | y) of every class y, in nats, float64 (N, n_classes), in one pass: y decides the top prior alone.

        With classes that are equally common, log p(x) = logsumexp over them - log n_classes. In float64, since classes
        may differ by less than a sum over many values is rounded by.

        Raises:
            ValueError: a model without classes.
        """
        n_classes = self.config.n_classes
        expect(n_classes is not None, "model", "one with classes (n_classes)", "n_classes=None")
        found = self._encode(x, cond)
        *latents, top = found.latents
        rest = found.log_det.double()
        for i, latent in enumerate(latents):
            mean, log_sd = self._prior(i, found.kept[i], found.conds[i], None)
            rest = rest + functional.gaussian_log_prob(latent.double(), mean.double(), log_sd.double())
        columns = []
        for label in range(n_classes or 0):
            mean, log_sd = self.prior(top, torch.full((len(top),), label, device=top.device))
            columns.append(rest + functional.gaussian_log_prob(top.double(), mean.double(), log_sd.double()))
        log_probs = torch.stack(columns, 1)
        if found.can_read and not log_probs.isfinite().all():
            warn_of_not_finite(self, x, found.conds, log_probs)
        return log_probs

    def class_logits(self, x: Tensor, cond: Condition | None = None) -> Tensor:
        """Logits of the classes of x, (N, config.classify), by the head on its top latent; no label is asked for.

        Raises ValueError for a model without a head (classify=0). ``model.head(z)`` takes a top latent, see ClassHead.
        """
        logits: Tensor = self._required_head()(self(x, cond)[0][-1])
        return logits

    def log_prob_and_logits(
        self, x: Tensor, y: Tensor | None = None, cond: Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute :meth:`log_prob` (N,), nats, and :meth:`class_logits` (N, config.classify) in one pass."""
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
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Bits per dimension of integer images (N, C, *spatial), dequantised with fresh noise; (N,).

        Levels are 0..n_bins-1; y and cond as in log_prob.
        """
        # Everything is checked before the noise is drawn: a refused call leaves the generator as it was.
        expect(isinstance(images, Tensor), "images", "a Tensor", type(images).__name__)
        self._check_shape("images", images)
        check_labels(y, images.shape[0], self.config.n_classes)
        self._check_cond(cond, images.shape[0])
        x = dequantize(images, n_bins, generator, dtype=self._parameter().dtype)
        return bits_per_dim(self.log_prob(x, y, cond), self.config.n_values, n_bins)

    def encode(self, x: Tensor, cond: Condition | None = None, precision: str = "fp32") -> list[Tensor]:
        """Compute the latents of x, all levels: decode(encode(x)) is x up to rounding.

        precision: of the nets; "auto" for the model's own. Rounding to 16 bits, or to TF32, is amplified from step to
        step: docs/speed.md has a table of the errors of 16 bits.
        """
        with self._nets_in(precision):
            latents: list[Tensor] = self(x, cond)[0]
        return latents

    def decode(self, latents: list[Tensor], cond: Condition | None = None, precision: str = "fp32") -> Tensor:
        """Compute the x whose latents these are; precision as in :meth:`encode`.

        A gradient to latents, condition or parameters is recorded where one is asked for, by the memory mode.
        """
        with self._nets_in(precision):
            return self.inverse(latents, cond)[0]

    def _nets_in(self, precision: str) -> contextlib.AbstractContextManager[None]:
        """A context in which all nets compute in a precision, or for "auto" as they are set."""
        check_precision(precision)
        like, settings = self._parameter(), {coupling.precision for coupling in self._couplings()}
        full = not (has_tf32(like) or torch.is_autocast_enabled(like.device.type))
        same = precision == "auto" or settings <= {precision} or (precision == "fp32" and settings == {"auto"} and full)
        return contextlib.nullcontext() if same else overridden(precision)  # which torch.compile could not trace

    def sample(
        self,
        n: int,
        temperature: float | Tensor = 1.0,
        y: Tensor | int | None = None,
        cond: Condition | None = None,
        generator: torch.Generator | None = None,
        differentiable: bool = False,
    ) -> Tensor:
        """Draw x = inverse of z_l = mean + temperature sd eps at every level.

        Args:
            n: number of samples.
            temperature: multiplies the standard deviation of every prior; a number (0 gives the mode), or one per
                sample.
            y: labels (n,), or one for all; drawn uniformly if the model has classes and None is given.
            cond: condition, if the model has one.
            generator: source of the noise.
            differentiable: a gradient is recorded, to the parameters, priors included, and to the condition, for what
                the memory mode keeps; the numbers drawn are the same.

        Returns:
            (n, C, *spatial) in about [-0.5, 0.5]; :func:`pyglow_fast.likelihood.quantize` gives levels.
        """
        whole = isinstance(n, numbers.Integral)  # numpy's integers too
        expect(whole and int(n) >= 0, "n", "a whole number of samples, 0 or more", repr(n))
        n = int(n)
        check_temperature(temperature, n)
        conds = self._check_cond(cond, n)
        parameter = self._parameter()
        if y is None and self.config.n_classes is not None:
            device = parameter.device if generator is None else generator.device
            y = torch.randint(self.config.n_classes, (n,), generator=generator, device=device).to(parameter.device)
        labels = torch.full((n,), y, device=parameter.device) if isinstance(y, int) else y
        check_labels(labels, n, self.config.n_classes)
        # In the order in which the inverse needs it: the deepest latent's first.
        shapes = [parameter.new_empty(n, *shape) for shape in self.latent_shapes]
        noise = [scaled_noise(like, temperature, generator) for like in reversed(shapes)]
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return self._from_noise(noise[::-1], labels, conds)[0]

    def _from_noise(self, noise: list[Tensor], y: Tensor | None, conds: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        scales: list[Tensor] = []

        def drawn(i: int, prior: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
            mean, log_sd = prior()
            scales.append(log_sd.expand_as(noise[i]).flatten(1).sum(1))
            return functional.gaussian_sample(noise[i], mean, log_sd)

        x, log_det = self._decode(noise, y, conds, drawn, "from_noise")
        return x, log_det + functional.summed(scales)

    def from_noise(
        self, noise: list[Tensor], y: Tensor | None = None, cond: Condition | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute x and log|det dx/deps|: z_l = mean_l + exp(log_sd_l) eps_l by the priors, then the inverse flow.

        Args:
            noise: eps of every level, of ``latent_shapes``.
            y, cond: as in log_prob.
        """
        self._check_latents(noise)
        conds = self._check_cond(cond, noise[0].shape[0])
        check_labels(y, noise[0].shape[0], self.config.n_classes)
        return self._from_noise(noise, y, conds)

    def to_noise(
        self, x: Tensor, y: Tensor | None = None, cond: Condition | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Compute eps_l = (z_l - mean_l) / sd_l of every level and log|det deps/dx|, undoing :meth:`from_noise`."""
        check_labels(y, x.shape[0], self.config.n_classes)
        found = self._encode(x, cond)
        noise, log_det = [], found.log_det
        for i, (latent, kept) in enumerate(zip(found.latents, found.kept, strict=True)):
            mean, log_sd = self._prior(i, kept, found.conds[i], y)
            noise.append(standardised(latent, mean, log_sd))
            log_det = log_det - log_sd.expand_as(latent).flatten(1).sum(1)
        return noise, log_det

    def as_distribution(self, y: Tensor | int | None = None, cond: Tensor | None = None) -> GlowDistribution:
        """Wrap the model in the interface of torch.distributions; see GlowDistribution."""
        return GlowDistribution(self, y, cond)
