"""A Glow within a number of bytes: one plan for the whole model, cut into what each of its runs of steps does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast._core.tracing import call_untraced, kernels_step_aside
from pyglow_fast.runs.planner import RunPlan
from pyglow_fast.runs.plans import Forward, Plans

Model = Any  # a Glow, which calls these functions


def plan_of_step(model: Model, n: int) -> RunPlan:
    """Plan a training step on n images of the model's size, from shapes alone."""
    config, like = model.config, model._parameter().new_empty(())
    channels, conds = config.cond_channels, list[Tensor | None]()
    if isinstance(channels, int):
        conds += [like.expand(n, channels, *config.image_shape[1:]) if channels else None] * len(model.levels)
    else:
        conds += [like.expand(n, own, *s[1:]) for own, s in zip(channels, model.state_shapes, strict=True)]
    x = like.expand(n, *config.image_shape)
    return Plans().of(model, [x, _any_labels(model, x), *conds], _dry_pass(1, "log_prob"))


def plans_of_runs(
    model: Model, given: Sequence[Tensor], conds: Sequence[Tensor | None], name: str
) -> dict[nn.Module, RunPlan]:
    """Return the plan of each run of steps for a pass that is recorded, or None for one that is not.

    ``given`` is x, or all latents; ``name`` is that of the method that the pass is of.
    """
    if not torch.is_grad_enabled() or kernels_step_aside():
        return {}
    if torch.compiler.is_compiling():
        return call_untraced(plans_of_runs, model, given, conds, name)
    if not any(tensor is not None and tensor.requires_grad for tensor in (*model.parameters(), *given, *conds)):
        return {}
    inverse = name not in ("forward", "log_prob")
    runs = model._sequences()[:: -1 if inverse else 1]
    inputs = [*given, _any_labels(model, given[0]), *conds]
    whole = model._plans.of(model, inputs, _dry_pass(len(given), name), name, inverse=inverse)
    plans = whole.cut(map(len, runs))
    for run, plan in zip(runs, plans, strict=True):
        run.planned = plan
    return dict(zip(runs, plans, strict=True))


def _any_labels(model: Model, x: Tensor) -> Tensor | None:
    """Labels as x would have, for a dry run."""
    return None if model.config.n_classes is None else x.new_empty(x.shape[0], dtype=torch.int64)


def _dry_pass(count: int, name: str) -> Forward:
    """Return a dry run's ``name`` as a function of what :func:`plans_of_runs` knows: ``count`` tensors first."""

    def forward(twin: Model, inputs: Sequence[Tensor | None]) -> Sequence[Tensor]:
        given, (y, *conds) = cast("list[Tensor]", list(inputs[:count])), inputs[count:]
        one = isinstance(twin.config.cond_channels, int) and all(cond is conds[0] for cond in conds)
        cond: Any = conds[0] if one else conds
        if name == "log_prob":
            return [twin.log_prob(given[0], y, cond)]
        if name == "forward":
            latents, log_det = twin(given[0], cond)
            return [*latents, log_det]
        found: Sequence[Tensor] = twin.inverse(given, cond) if name == "inverse" else twin.from_noise(given, y, cond)
        return found

    return forward
