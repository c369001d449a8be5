"""What each level of the latents holds, which class the top one fits, and what the temperature does."""

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
        model, x: a Glow, and images (N, C, *spatial) in about [-0.5, 0.5].
        levels: that are kept, 0 the shallowest; all of them give x back.
        temperature: of what is drawn; 0 takes the mean of the priors.
        y, cond: labels of x, for a model with classes, and condition, if the model has one.
        generator: source of the noise, drawn for every level so that what is kept does not shift it.

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

    Row i of (len(temperatures), n, C, *spatial) is ``model.sample(n, temperatures[i], y, cond, generator)``, and the
    generator moves on as in one such call.

    Reference: Kingma & Dhariwal 2018, figure 8.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    values = check_numbers("temperatures", temperatures)
    for value in values:
        expect(value >= 0.0, "temperatures", "numbers, 0 or more", value)
    if generator is None:
        generator = torch.Generator(model._parameter().device).manual_seed(int(torch.randint(2**63 - 1, ())))
    start, rows = generator.get_state(), []
    for value in values:
        generator.set_state(start)
        rows.append(model.sample(n, value, y, cond, generator))
    return torch.stack(rows)


@torch.no_grad()
def likeliest_class(model: Glow, x: Tensor, cond: Tensor | None = None) -> Tensor:
    """argmax_y log p(x | y), int64 (N,): the class under which each image is likeliest, all equally common.

    Of log p(x | y) the prior of the top latent alone depends on y, so one pass encodes x. A classifier that was trained
    beside the flow (:meth:`Glow.class_logits`) is not asked.

    Raises:
        ValueError: a model without classes, or images that have no finite density under any class.
    """
    expect(isinstance(model, Glow), "model", "a Glow", type(model).__name__)
    n_classes = model.config.n_classes
    expect(n_classes is not None, "model", "one with classes (n_classes)", "n_classes=None")
    top = model.encode(x, cond)[-1]
    scores = top.new_zeros(len(top), n_classes or 0, dtype=torch.float64)
    for label in range(scores.shape[1]):
        mean, log_sd = model.prior(top, torch.full((len(top),), label, device=top.device))
        # Doubles: classes may differ by less than a sum over many values is rounded by.
        scores[:, label] = functional.gaussian_log_prob(top.double(), mean.double(), log_sd.double())
    decided = ~scores.isnan().any(1) & scores.amax(1).isfinite()
    expect(bool(decided.all()), "x", "images with a finite log-likelihood", f"{int((~decided).sum())} without one")
    return scores.argmax(1)
