"""Flows on sequences of unequal lengths: masks, and time folded into channels.

A mask (N, 1, T) is 1 at the positions of a sample and 0 behind its end. What x holds there, NaN too, has no influence
on anything; z is zero there; log-dets count a sample's own positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyglow_fast._core.errors import check_count, check_input, expect
from pyglow_fast._core.tracing import kernels_step_aside
from pyglow_fast.layers.flow_step import FlowStep
from pyglow_fast.layers.reversible_sequence import ReversibleSequence
from pyglow_fast.layers.wavenet import WaveNet
from pyglow_fast.nets.masks import MaskedNet, check_mask, masked_condition, run_masked, without_padding
from pyglow_fast.runs import choice
from pyglow_fast.runs.description import Run
from pyglow_fast.runs.planner import RunPlan, refuse_bytes


def squeeze_time(x: Tensor, mask: Tensor, factor: int = 2) -> tuple[Tensor, Tensor]:
    """Fold time into channels: z[:, i C + c, t] = x[:, c, t factor + i], mask[..., factor - 1::factor].

    What is left of a sample's positions beyond a multiple of the factor is cut off, as in Glow-TTS.

    Args:
        x: (N, C, T).
        mask: (N, 1, T), 1 at the positions of a sample.
        factor: positions that become one.

    Returns:
        z (N, C factor, T // factor) and its mask (N, 1, T // factor).

    Raises:
        ValueError: a wrong factor, x or mask.

    Reference: Kim et al. 2020, appendix A.1.

    Examples:
        >>> import torch
        >>> from pyglow_fast.layers import squeeze_time
        >>> x, mask = torch.arange(6.0).reshape(1, 1, 6), torch.tensor([[[1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]])
        >>> squeeze_time(x, mask)  # a sample of 5 positions: two pairs are left
        (tensor([[[0., 2., 0.],
                 [1., 3., 0.]]]), tensor([[[1., 1., 0.]]]))
    """
    check_count("factor", factor)
    expect(isinstance(x, Tensor), "x", "a Tensor", type(x).__name__)
    expect(x.dim() == 3, "x", "shape (N, C, T)", f"shape {tuple(x.shape)}")
    mask = check_mask(mask, x)[:, :, factor - 1 :: factor]
    n, channels, time = x.shape
    x = x[:, :, : time - time % factor].reshape(n, channels, time // factor, factor)
    return without_padding(x.permute(0, 3, 1, 2).reshape(n, factor * channels, time // factor), mask), mask


def unsqueeze_time(z: Tensor, mask: Tensor, factor: int = 2) -> tuple[Tensor, Tensor]:
    """Undo squeeze_time: x[:, c, t factor + i] = z[:, i C + c, t], each position of the mask factor times.

    Args:
        z: (N, C factor, T).
        mask: (N, 1, T).
        factor: positions that one becomes.

    Returns:
        x (N, C, T factor) and its mask (N, 1, T factor).

    Raises:
        ValueError: a wrong factor or mask, channels that do not divide by the factor.
    """
    check_count("factor", factor)
    expect(isinstance(z, Tensor), "z", "a Tensor", type(z).__name__)
    divides = z.dim() == 3 and z.shape[1] % factor == 0
    expect(divides, "z", f"shape (N, C, T), C divisible by {factor}", f"shape {tuple(z.shape)}")
    mask = check_mask(mask, z)
    n, channels, time = z.shape
    x = without_padding(z, mask).reshape(n, factor, channels // factor, time).permute(0, 2, 3, 1)
    return x.reshape(n, channels // factor, time * factor), mask.repeat_interleave(factor, dim=2)


class MaskedSequence(ReversibleSequence):
    """z = f_K(... f_1(x)) of the positions that a mask says are there, log_det theirs; f_k FlowSteps of one width.

    A step's actnorm is initialised from the positions that are there, its net gets the mask, and where there is none z
    is zero. Without a mask, and in all else, it is a ReversibleSequence: memory modes and drift control in either
    direction, memory_budget. With a mask a gradient within bytes is refused.

    Args:
        steps: FlowSteps of one width with nets that state ``takes_mask = True``, such as WaveNet: called with x1, cond
            or None, and the mask, they give at a position what does not depend on how much padding follows.
        memory, anchor_every, tolerance, memory_budget, deferred_check: see ReversibleSequence.

    Shapes: x, z (N, C, T), float32 or float64; mask (N, 1, T), 0 and 1 or bool; cond (N, C_c, T), or (N, C_c, 1) for
    the same at all positions, such as a speaker's embedding; log_det (N,), nats.

    Raises:
        ValueError: steps that are no FlowSteps, or have been changed by hooks or in a subclass; nets that take no mask;
            scale maps that are callables; inputs of other shapes; a mask of other values.

    References: Kim et al. 2020 (Glow-TTS), Gomez et al. 2017 (reversible backward).

    Examples:
        >>> import torch
        >>> from pyglow_fast import FlowStep, MaskedSequence, WaveNet
        >>> flow = MaskedSequence([FlowStep(4, net=WaveNet(2, 4, hidden=8, layers=2)) for _ in range(2)])
        >>> x, mask = torch.randn(2, 4, 10), torch.ones(2, 1, 10)
        >>> mask[1, :, 6:] = 0  # the second sample ends behind its sixth position
        >>> z, log_det = flow(x, mask=mask)
        >>> z[1, :, 6:].count_nonzero().item(), torch.allclose(flow.inverse(z, mask=mask)[0], mask * x, atol=1e-5)
        (0, True)
    """

    def forward(
        self,
        x: Tensor,
        cond: Tensor | None = None,
        squeeze_first: bool = False,
        mask: Tensor | None = None,
        *,
        plan: RunPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map x to z at the positions that the mask says are there.

        Args:
            x, cond, squeeze_first, plan: see ReversibleSequence; with a mask, x is not squeezed.
            mask: (N, 1, T), or None for all positions.
        """
        if mask is None:
            return super().forward(x, cond, squeeze_first, plan=plan)
        expect(not squeeze_first, "squeeze_first", "False with a mask; see squeeze_time", squeeze_first)
        steps, mask = self._checked("x", x, cond, mask)
        if self.training and not self._is_initialized():
            self._initialize_masked(steps, x, cond, mask)
        return self._through_masked(_masked(steps, cond), x, cond, mask)

    def inverse(
        self, z: Tensor, cond: Tensor | None = None, mask: Tensor | None = None, *, plan: RunPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Map z back to x at the positions that the mask says are there; its backward keeps what forward's does."""
        if mask is None:
            return super().inverse(z, cond, plan=plan)
        steps, mask = self._checked("z", z, cond, mask)
        return self._through_masked(_masked(steps, cond).turned(), z, cond, mask)

    def _through_masked(self, run: Run, x: Tensor, cond: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        def way(x: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
            mode = self.memory
            if not isinstance(mode, str):
                if self._records(x, extra) and not kernels_step_aside():
                    refuse_bytes(mode)
                mode = "store"
            control = self.control_of(run.inverse)
            return choice.through(run, x, extra, mode=mode, budget=self.memory_budget, control=control)

        return run_masked(way, x, cond, mask, [coupling.spec for coupling in run.couplings], run.inverse)

    def initialize(self, x: Tensor, cond: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Initialise step after step from the positions that are there; returns z."""
        if mask is None:
            return super().initialize(x, cond)
        steps, mask = self._checked("x", x, cond, mask)
        return self._initialize_masked(steps, x, cond, mask)

    def _checked(self, name: str, x: Tensor, cond: Tensor | None, mask: Tensor) -> tuple[list[FlowStep], Tensor]:
        expect(self.is_fused, "steps", "FlowSteps without hooks or overridden methods, with a mask", "others")
        steps = self.flow_steps()
        check_input(name, x, steps[0].channels, steps[0].actnorm.bias)
        expect(x.dim() == 3, name, "shape (N, C, T)", f"shape {tuple(x.shape)}")
        for k, step in enumerate(steps):
            coupling = step.coupling
            plain = coupling is not None and step.injector is None and coupling.board is None
            expect(plain, f"steps[{k}]", "a step with a coupling of channels alone, with a mask", "another")
            assert coupling is not None  # for the type checker: refused above
            own = callable(coupling.spec.scale_map)
            expect(not own, f"steps[{k}].coupling", "a scale map by name, with a mask", "a callable")
        if cond is not None:
            expect(isinstance(cond, Tensor), "cond", "a Tensor or None", type(cond).__name__)
            fits = cond.dim() == 3 and len(cond) == len(x) and cond.shape[2] in (1, x.shape[2])
            expect(fits, "cond", f"shape ({len(x)}, C_c, {x.shape[2]} or 1)", f"shape {tuple(cond.shape)}")
        return steps, check_mask(mask, x)

    @torch.no_grad()
    def _initialize_masked(self, steps: list[FlowStep], x: Tensor, cond: Tensor | None, mask: Tensor) -> Tensor:
        for coupling in _masked(steps, cond).couplings:  # before any of them is changed
            if isinstance(coupling.net.net, WaveNet):
                coupling.net.net.check_inputs(x[:, : coupling.kept], cond)
        x, extra = without_padding(x, mask), masked_condition(mask, cond)
        there = mask[:, 0] != 0
        for step in steps:
            if not step.actnorm.is_initialized:
                step.actnorm.initialize_from(x.transpose(1, 2)[there])  # as a batch of vectors
            x, _ = choice.through(_masked([step], cond), x, extra)
        return x


def _masked(steps: Sequence[FlowStep], cond: Tensor | None) -> Run:
    """A run of steps whose nets get the mask beside the condition."""
    per_sample = cond is not None and cond.shape[2] == 1
    run = Run.of((one for step in steps for one in step.elements()), masked=True)
    nets = [coupling._replace(net=MaskedNet(coupling.net, per_sample)) for coupling in run.couplings]
    return run.changed(couplings=nets)
