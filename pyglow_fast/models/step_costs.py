"""What a training step of a Glow costs: its runs of steps, and all that is beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyglow_fast.layers import FrozenSteps, Split
from pyglow_fast.layers.step_costs import run_cost
from pyglow_fast.reversible.costs import SMALL, JoinCost, PriorCost, RestCost, RunCost

if TYPE_CHECKING:
    from pyglow_fast.models.glow import Glow


def _split_cost(split: Split, samples: int, spatial: Sequence[int], size: int) -> PriorCost:
    """The prior of a split; spatial are the sizes of its state, size the bytes of a number."""
    each = samples * math.prod(spatial) * size
    factored, kept = each * split.factored, each * split.kept
    if not split.learn_prior:
        return PriorCost(factored, factored, 3 * factored, factored)
    given, read = 2 * factored, each * (split.kept + split.cond_channels) if split.cond_channels else 0
    rim = 2 * split.factored * math.prod(spatial) * size if split.border is not None else 0
    params = sum(parameter.nbytes for parameter in split.parameters())
    # The convolution's output and its product with the gain, which mean and log_sd are parts of.
    scaling = factored + 2 * given  # the product's gradients and the latent's
    convolving = factored + kept + (each * split.cond_channels + kept if read else 0) + params
    return PriorCost(2 * given + read + rim, 2 * given + read + 2 * rim, max(scaling, convolving), factored + kept)


def glow_costs(model: Glow, samples: int, spacings: Sequence[int]) -> tuple[list[RunCost], RestCost]:
    """The runs of steps of a training step of log_prob on so many samples, in their order, and the rest.

    Raises:
        ValueError: a frozen model, which cannot be trained.
    """
    config, like = model.config, model._parameter()
    size, base = like.element_size(), SMALL
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
            assert not isinstance(steps, FrozenSteps)
            runs.append(run_cost(steps.flow_steps(), samples, sizes, cond_channels, spacings[len(runs)]))
            joins.append(JoinCost(0, 0))
        if isinstance(split, Split):
            prior = _split_cost(split, samples, spatial, size)
            priors.append(prior)
            kept = state * split.kept // channels
            joins[-1] = JoinCost(prior.gradient, kept + 3 * state)
    top = samples * math.prod(shapes[-1]) * size
    values = 2 * shapes[-1][0] * size * (samples if config.n_classes is not None else 1)
    rim = values * math.prod(shapes[-1][1:]) if model.prior.border is not None else 0
    priors.append(PriorCost(2 * values + rim, 2 * values + 2 * rim, 3 * top + 2 * values + rim, top))
    joins[-1] = JoinCost(joins[-1].gradients + top, joins[-1].joining)
    return runs, RestCost(base, tuple(joins), tuple(priors))
