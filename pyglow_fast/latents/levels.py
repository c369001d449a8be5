"""Experiments on what each level of the latents holds, and on what the temperature does."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast.latents.spaces import check_images, check_levels, check_numbers, decode_chosen
from pyglow_fast.models import Glow
from pyglow_fast.models.prior import check_temperature, scaled_noise


@torch.no_grad()
def keep_levels(
    model: Glow,
    x: Tensor,
    levels: Iterable[int],
    temperature: float = 0.0,
    y: Tensor | None = None,
    cond: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x' = decode(z'): z'_l = z_l(x) in the kept levels, z'_l = mean_l + temperature sd_l eps in the others.

    From the deepest level up: each prior sees what the deeper levels are now, kept or drawn.

    Args:
        model: a Glow.
        x: images (N, C, *spatial), in about [-0.5, 0.5].
        levels: that are kept, 0 the shallowest; all of them give x back.
        temperature: of what is drawn; 0 takes the mean of the priors.
        y: labels (N,) of x, for a model with classes: the top prior is that of the class.
        cond: condition, if the model has one.
        generator: source of the noise, drawn for every level so that what is kept does not shift it.

    Returns:
        (N, C, *spatial).

    Raises:
        ValueError: levels that the model does not have, a temperature below 0, images that do not fit the model.

    Reference: Dinh et al. 2017, appendix on the semantics of latent variables; Kingma & Dhariwal 2018.
    """
    check_images("x", model, x, y)
    kept = check_levels(levels, len(model.latent_shapes))
    check_temperature(temperature, len(x))
    latents = model.encode(x, cond)

    def choose(level: int, prior: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        noise = scaled_noise(latents[level], temperature, generator)  # deepest first, as sample draws them
        return latents[level] if level in kept else functional.gaussian_sample(noise, *prior())

    return decode_chosen(model, latents, y, cond, choose)


@torch.no_grad()
def temperature_sweep(
    model: Glow,
    temperatures: Iterable[float] = (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0),
    n: int = 8,
    y: Tensor | None = None,
    cond: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """x = decode(mean_l + T sd_l eps_l) for every temperature T, with the same eps (and the same drawn labels).

    Args:
        model: a Glow.
        temperatures: T, 0 or more.
        n: samples of each.
        y: labels (n,), drawn uniformly if the model has classes and None is given.
        cond: condition, if the model has one.
        generator: source of the noise; it moves on as one call of :meth:`Glow.sample` moves it.

    Returns:
        (len(temperatures), n, C, *spatial); row i is ``model.sample(n, temperatures[i], ...)``.

    Raises:
        ValueError: a temperature below 0 or not finite, or what sample refuses.

    Reference: Kingma & Dhariwal 2018, figure 8.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    values = check_numbers("temperatures", temperatures)
    for value in values:
        expect(value >= 0.0, "temperatures", "numbers, 0 or more", value)
    if generator is None:
        generator = torch.Generator(next(iter(model.state_dict().values())).device)
        generator.manual_seed(int(torch.randint(2**63 - 1, ())))
    start = generator.get_state()
    rows = []
    for value in values:
        generator.set_state(start)
        rows.append(model.sample(n, value, y, cond, generator))
    return torch.stack(rows)
