"""Runs of any invertible modules with constant memory: each step is inverted and differentiated in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._derivatives import check_leaves, differentiable_once
from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets import (
    GeneratorState,
    RunState,
    check_net,
    check_repeated,
    holding,
    is_repeatable,
    leaves_of,
    output_sums,
)
from pyglow_fast.coupling_nets.precision import in_precision, precisions_of
from pyglow_fast.reversible.drift import anchor_drift, lowest_precision, project, witness_drift
from pyglow_fast.reversible.limits import call_untraced
from pyglow_fast.reversible.parts import Part
from pyglow_fast.reversible.walk import Walk, added


class ModuleChain:
    """Runs K modules with ``forward(x, cond=None) -> (z, log_det)`` and ``inverse`` so that states are recomputed.

    A step that is a coupling may have three methods more; one run of its net then serves both the inversion and the
    gradient, some samples at a time: ``net_output(x)``, the same for the step's input and its output;
    ``step_backward(y, net_out, grad_y, grad_log_det) -> (x, grad_x, grad_net_out)`` from the step's output, grad_x
    without the net's part; and ``samples_at_once(x)``, the number of samples that net_output runs on at a time too, so
    that random numbers are drawn in the same order.
    """

    def __init__(self, steps: Sequence[nn.Module], part: Part) -> None:
        for step in steps:
            check_net(step)
        self.steps, self.part = list(steps), part
        by_step = [list(step.parameters()) for step in steps]
        self.counts = [len(params) for params in by_step]
        self.params = [parameter for params in by_step for parameter in params]

    def params_of(self, params: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Cut the flat list of parameters by step."""
        parts, at = [], 0
        for count in self.counts:
            parts.append(params[at : at + count])
            at += count
        return parts

    def call(self, k: int, x: Tensor, cond: Tensor | None, params: Sequence[Tensor], method: str = "forward") -> Any:
        """Call step k with the given parameters in the place of its own."""
        step = self.steps[k]
        run = step if method == "forward" else getattr(step, method)
        with holding(step, params):
            return run(x) if cond is None else run(x, cond)

    def run(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute z and log_det; memory is as the pass's anchors want it, or every step's input."""
        self.part.whole.joins(self.part.first, x, (cond, *self.params))
        return call_untraced(_RunModules.apply, self, x, cond, *self.params)


class _ModuleWalk(Walk):
    def __init__(
        self,
        chain: ModuleChain,
        x: Tensor,
        cond: Tensor | None,
        params: Sequence[Sequence[Tensor]],
        anchors: dict[int, Tensor],
        seen: Sequence[Tensor],
        memos: Sequence[tuple[RunState, Tensor | None]],
        lowest: torch.dtype,
        grad_log_det: Tensor,
    ) -> None:
        n = len(chain.steps)
        super().__init__(n, x, anchors, chain.part, lowest)
        self.chain, self.cond, self.params, self.seen, self.memos = chain, cond, params, seen, memos
        self.grad_log_det = grad_log_det
        self.grad_params: list[tuple[Tensor | None, ...]] = [()] * n

    def _repeated(self, k: int, run: Callable[[], Any]) -> Any:
        with self.memos[k][0].restored(self.chain.steps[k]):
            return run()

    def invert(self, k: int, y: Tensor, grad_y: Tensor, anchor: Tensor | None) -> tuple[Tensor, Tensor]:
        """The module's inverse, then its forward with gradients; of a coupling its net alone, once."""
        if self.cond is None and hasattr(self.chain.steps[k], "step_backward"):
            return self._repeated(k, partial(self._invert_coupling, k, y, grad_y))
        x, _ = self._repeated(k, partial(self.chain.call, k, y, self.cond, self.params[k], "inverse"))
        return x, self.differentiate(k, x if anchor is None else anchor, grad_y, anchor is not None)

    def _invert_coupling(self, k: int, y: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        step: Any = self.chain.steps[k]
        inputs, gradients, size = [], [], step.samples_at_once(y)
        totals: list[Tensor | None] = [None] * len(self.params[k])
        for part in zip(*(values.split(size) for values in (y, grad_y, self.grad_log_det)), strict=True):
            leaf, _, params = self._leaves(k, part[0])
            with torch.enable_grad():
                net_out = self.chain.call(k, leaf, None, params, "net_output")
            x, grad_x, grad_net_out = step.step_backward(part[0], net_out.detach(), *part[1:])
            own, _, *rest = _passed_back([net_out], [grad_net_out], [leaf, None, *params])
            inputs.append(x)
            gradients.append(grad_x if own is None else grad_x + own)
            totals = list(map(added, totals, rest))
        self.grad_params[k] = tuple(totals)
        self.cond_sum.put(None)
        return (inputs[0], gradients[0]) if len(inputs) == 1 else (torch.cat(inputs), torch.cat(gradients))

    def measure(self, k: int, x: Tensor, anchor: Tensor | None) -> Tensor:
        """Measure the drift of the recomputed input itself: by its witness, or by the anchor stored there."""
        return witness_drift(x, self.seen[k]) if anchor is None else anchor_drift(x, anchor)

    def redo(self, first: int, last: int, x: Tensor | None, grad: Tensor) -> Tensor:
        """Keep the inputs forward from the anchor, then go back through them."""
        assert x is not None  # parts begin at anchors
        inputs = [x]
        for k in range(first, last):
            inputs.append(self._repeated(k, partial(self.chain.call, k, inputs[-1], self.cond, self.params[k]))[0])
        for k in reversed(range(first, last + 1)):
            grad = self.differentiate(k, inputs[k - first], grad, True)
        return grad

    def differentiate(self, k: int, x: Tensor, grad_y: Tensor, same_x: bool) -> Tensor:
        """The gradient of step k's input; those of its parameters and of cond go to their slots.

        same_x: x is the very input of the forward.
        """
        leaf, cond, params = self._leaves(k, x)
        with torch.enable_grad():
            y, log_det = self._repeated(k, partial(self.chain.call, k, leaf, cond, params))
        sums = self.memos[k][1]
        if sums is not None and same_x:
            check_repeated(sums, output_sums(y), f"steps[{k + self.part.first}]")
        slots = [leaf, cond, *params]
        grad_x, grad_cond, *rest = _passed_back([y, log_det], [grad_y, self.grad_log_det], slots)
        self.cond_sum.put(grad_cond)
        self.grad_params[k] = tuple(rest)
        return torch.zeros_like(x) if grad_x is None else grad_x

    def _leaves(self, k: int, x: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """What step k is differentiated by: x, the condition and the parameters."""
        cond = None if self.cond is None else self.cond.detach().requires_grad_(self.cond.requires_grad)
        return x.detach().requires_grad_(), cond, leaves_of(self.chain.steps[k], self.params[k])


def _passed_back(
    outputs: Sequence[Tensor], output_grads: Sequence[Tensor], slots: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of a step's slots (input, condition, parameters) from those of its outputs; None where none is."""
    wanted = [slot for slot in slots if slot is not None and slot.requires_grad]
    for output in outputs:
        check_leaves(output, wanted)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, output_grads, strict=True) if o.requires_grad]
    own, grads = [o for o, _ in pairs], [g for _, g in pairs]
    found = iter(torch.autograd.grad(own, wanted, grads, allow_unused=True))
    return [next(found) if slot is not None and slot.requires_grad else None for slot in slots]


def _check_outputs(k: int, outputs: Any, n: int) -> None:
    pair = isinstance(outputs, tuple) and len(outputs) == 2 and all(isinstance(value, Tensor) for value in outputs)
    expect(pair, f"steps[{k}]", "a forward that returns tensors (z, log_det)", type(outputs).__name__)
    shape = tuple(outputs[1].shape)
    expect(shape == (n,), f"steps[{k}]", f"a log_det of shape ({n},)", f"shape {shape}")


class _RunModules(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: ModuleChain, x: Tensor, cond: Tensor | None, *params: Tensor) -> tuple[Tensor, Tensor]:
        """z, log_det (N,)."""
        by_step, keeps_states = chain.params_of(params), chain.part.whole.keeps_states
        keep = set(range(1, len(chain.steps)) if keeps_states else chain.part.anchors)
        anchors: dict[int, Tensor] = {}
        seen: list[Tensor] = []
        memos, log_det, z, lowest = [], x.new_zeros(x.shape[0]), x, x.dtype
        for param in params:
            lowest = lowest_precision(lowest, param) if param.is_floating_point() else lowest
        for k in range(len(chain.steps)):
            if k in keep:
                anchors[k] = z
            if not keeps_states:
                seen.append(project(z))
            known = is_repeatable(chain.steps[k], x.device)
            before = None if known else GeneratorState.capture(x.device)
            version = z._version
            outputs = chain.call(k, z, cond, by_step[k])
            _check_outputs(k, outputs, z.shape[0])
            expect(z._version == version, f"steps[{k}]", "a forward that leaves its input as it is", "one that writes")
            # A step may hand its input on as it is; an output of a function must be its own.
            z, step_log_det = outputs[0] if outputs[0] is not x else x.clone(), outputs[1]
            state = RunState.after(chain.steps[k], before, x.device)
            memos.append((state, None if known else output_sums(z)))
            lowest = lowest_precision(lowest, z)
            for precision in precisions_of(chain.steps[k]):  # which does not show in a float32 output
                with in_precision(precision, z):
                    lowest = lowest_precision(lowest, z, by_step[k])
            log_det = log_det + step_log_det
        ctx.lowest = lowest
        ctx.chain, ctx.memos, ctx.has_cond = chain, memos, cond is not None
        ctx.anchor_steps = list(anchors)
        ctx.save_for_backward(x, z, *([] if cond is None else [cond]), *params, *anchors.values(), *seen)
        return z, log_det

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, cond and the parameters."""
        chain: ModuleChain = ctx.chain
        x, z, *rest = ctx.saved_tensors
        cond = rest.pop(0) if ctx.has_cond else None
        n_params, n_anchors = len(chain.params), len(ctx.anchor_steps)
        params, inner = rest[:n_params], rest[n_params:]
        anchors = dict(zip(ctx.anchor_steps, inner[:n_anchors], strict=True))
        seen = inner[n_anchors:]
        kept = (anchors, seen, ctx.memos, ctx.lowest)
        walk = _ModuleWalk(chain, x, cond, chain.params_of(params), *kept, grad_log_det)
        if seen:
            grad_x = walk.run(z, grad_z)
        else:
            chain.part.whole.checkpointed(chain.part.first, z.device)
            grad_x = grad_z
            for k in reversed(range(len(chain.steps))):
                grad_x = walk.differentiate(k, x if k == 0 else anchors[k], grad_x, True)
        grads = (grad_x, walk.cond_sum.result(), *[grad for step in walk.grad_params for grad in step])
        return (None, *map(walk.accepted, grads))
