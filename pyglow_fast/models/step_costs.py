"""Costs of a training step of a Glow: of its runs of steps, and of all that is beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyglow_fast._errors import expect
from pyglow_fast.layers import FrozenSteps, Split
from pyglow_fast.layers.step_costs import blocked, run_cost
from pyglow_fast.reversible.costs import SMALL, JoinCost, PriorCost, RestCost, RunCost

if TYPE_CHECKING:
    from pyglow_fast.models.glow import Glow


# The library's convolution of one image with fewer input numbers gathers what each tap of the kernel reads; of others
# it lays the channels out in blocks.
LEAST_BLOCKED = 20480


def _convolution_scratch(split: Split, samples: int, positions: int, size: int) -> tuple[int, int]:
    """Bytes that the library's convolution of a prior takes, and its backward."""
    inputs, outputs, places = split.kept + split.cond_channels, 2 * split.factored, samples * positions * size
    if size != 4 or (samples == 1 and positions * inputs <= LEAST_BLOCKED):
        gathered = places * inputs * 3**split.dims
        return gathered, gathered + places * inputs
    return 0, places * blocked(inputs, outputs)


def _split_cost(split: Split, samples: int, positions: int, size: int) -> PriorCost:
    """The prior of a split, whose state has so many positions; size is the bytes of a number."""
    each = samples * positions * size
    factored, kept = each * split.factored, each * split.kept
    if not split.learn_prior:
        return PriorCost(factored, factored, 3 * factored, factored)
    given, beside = 2 * factored, each * split.cond_channels
    read = kept + beside if beside else 0  # with the condition, in one tensor
    rim = 2 * split.factored * positions * size if split.border is not None else 0
    params = sum(parameter.nbytes for parameter in split.parameters())
    scratch, scratch_back = _convolution_scratch(split, samples, positions, size)
    # Kept are the convolution's output and its product with the gain, which mean and log_sd are parts of. The backward
    # frees them one by one: while the gradients of the product's factors come there is the gradient of the latent, too.
    after_product = factored + 3 * given - given
    after_convolution = factored + given + kept + read + 2 * params + scratch_back - 2 * given
    forward = max(2 * given + rim, given + kept + scratch) + read + rim
    return PriorCost(2 * given + read + rim, forward, max(after_product, after_convolution), factored + (read or kept))


def glow_costs(
    model: Glow, samples: int, spacings: Sequence[int], conds: Sequence[Sequence[int] | None] | None = None
) -> tuple[list[RunCost], RestCost]:
    """The cost of each run of steps in a training step of log_prob on so many samples, in order, and of the rest.

    Args:
        model: for its shapes, settings and dtype.
        samples: N.
        spacings: of the anchors of each run.
        conds: shape of the condition of each level as it is given, (N, C) or (N, C, *spatial); None: maps of other
            sizes than those of the states.

    Raises:
        ValueError: a frozen model, which cannot be trained.
    """
    config, like = model.config, model._parameter()
    size, base = like.element_size(), 4 * SMALL
    runs: list[RunCost] = []
    joins: list[JoinCost] = []
    priors: list[PriorCost] = []
    shapes = config.level_shapes()
    for index, level in enumerate(model.levels):
        channels, *spatial = shapes[index]
        state = samples * math.prod(shapes[index]) * size
        split = model.splits[index] if index < len(model.splits) else None
        cond_channels = config.cond_channels_of(index)
        for name, sizes in (
            ("checkerboard", [2 * s for s in spatial] if level.steps is not None else spatial),
            ("steps", spatial),
        ):
            steps = getattr(level, name)
            if steps is None:
                continue
            expect(not isinstance(steps, FrozenSteps), "model", "one that is not frozen", "a frozen one")
            squeezes, spacing = name == "steps", spacings[len(runs)]
            runs.append(run_cost(steps.flow_steps(), samples, sizes, cond_channels, spacing, squeezes))
            cond = None if conds is None else conds[index]
            if cond_channels and (cond is None or (len(cond) > 2 and tuple(cond[2:]) != tuple(sizes))):
                base += samples * cond_channels * math.prod(sizes) * size  # brought to the states' size
            joins.append(JoinCost(0, 0))
        if isinstance(split, Split):
            prior = _split_cost(split, samples, math.prod(spatial), size)
            priors.append(prior)
            kept = state * split.kept // channels
            joins[-1] = JoinCost(prior.gradient, kept + 3 * state)
    top = samples * math.prod(shapes[-1]) * size
    values = 2 * shapes[-1][0] * size * (samples if config.n_classes is not None else 1)
    rim = values * math.prod(shapes[-1][1:]) if model.prior.border is not None else 0
    priors.append(PriorCost(2 * values + rim, 2 * values + 2 * rim, 3 * top + 2 * values + rim, top))
    joins[-1] = JoinCost(joins[-1].gradients + top, joins[-1].joining)
    return runs, RestCost(base, tuple(joins), tuple(priors))
