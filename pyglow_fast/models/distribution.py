"""A Glow as a torch Distribution, and as a Transform from standard normal noise, to compose with others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Size, Tensor
from torch.distributions import Independent, Normal, Transform, TransformedDistribution, constraints

from pyglow_fast._core.errors import expect
from pyglow_fast.models.prior import check_labels


def _flat(values: Tensor, event_dims: int) -> tuple[Tensor, Size]:
    """(n, *event) and the shape before the event."""
    lead = values.shape[: values.dim() - event_dims]
    return values.reshape(-1, *values.shape[values.dim() - event_dims :]), lead


def _condition_dims(cond: Tensor, channels: int, spatial: Sequence[int]) -> int:
    """Dimensions of one condition: 1 for a vector (C,), or 1 + dims for a map (C, *spatial)."""
    spread = 1 + len(spatial)
    expect(isinstance(cond, Tensor), "cond", "a Tensor", type(cond).__name__)
    is_map = cond.dim() >= spread and cond.shape[cond.dim() - spread] == channels
    is_vector = cond.dim() >= 1 and cond.shape[-1] == channels
    expected = f"shape (*batch, {channels}) or (*batch, {channels}, *spatial)"
    expect(is_map or is_vector, "cond", expected, tuple(cond.shape))
    if is_map and is_vector and tuple(cond.shape[cond.dim() - len(spatial) :]) != tuple(spatial):
        expected = f"{expected}, with the spatial sizes {tuple(spatial)} of x where a shape can be read as both"
        expect(False, "cond", expected, tuple(cond.shape))
    return spread if is_map else 1


class GlowTransform(Transform):
    """x = T(eps): every latent z_l = mean_l + exp(log_sd_l) eps_l by its prior, then the inverse flow.

    log|det dx/deps| = sum_l sum log_sd_l - log|det dz/dx|. So with eps ~ N(0, 1), D numbers flattened (shallowest
    latent first), TransformedDistribution(base, [T]) is the model itself.

    Args:
        model: a Glow.
        y: label of a model with classes: a number, or a tensor that broadcasts to the leading shape of the events.
        cond: condition of a model that takes one, (*batch, C) or (*batch, C, *spatial); what can be read as both is a
            map if it has the spatial sizes of x, and refused else.

    Shapes: eps (..., D), x (..., C, *spatial).

    Raises:
        ValueError: labels or a condition that the model does not take.
    """

    bijective = True

    def __init__(self, model: Any, y: Tensor | int | None = None, cond: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.event_dims = model, 1 + model.config.dims
        self.sizes = [math.prod(shape) for shape in model.latent_shapes]
        self.domain = constraints.real_vector
        self.codomain = constraints.independent(constraints.real, self.event_dims)
        channels, n_classes = model.config.cond_channels, model.config.n_classes
        wanted = n_classes is not None
        expect((y is not None) == wanted, "y", "labels exactly if the model has classes", type(y).__name__)
        one = not isinstance(channels, tuple)
        expect(one, "model", "one with one condition for all levels", "one with a condition of each")
        expect((cond is not None) == bool(channels), "cond", f"a condition of {channels} channels or none", type(cond))
        self._y = None if y is None else torch.as_tensor(y, device=model._parameter().device)
        if self._y is not None:
            whole = not self._y.is_floating_point() and self._y.dtype != torch.bool
            self._y = self._y.long() if whole else self._y
            check_labels(self._y.flatten(), self._y.numel(), n_classes)
        self._cond = cond
        shapes = [Size() if self._y is None else self._y.shape]
        if cond is not None:
            self._cond_dims = _condition_dims(cond, channels, model.config.image_shape[1:])
            shapes.append(cond.shape[: cond.dim() - self._cond_dims])
        try:
            self.batch_shape = torch.broadcast_shapes(*shapes)
        except RuntimeError:
            expected = f"a batch shape that goes with {tuple(shapes[0])} of y"
            raise ValueError(f"cond: expected {expected}, found {tuple(shapes[1])}") from None

    def given(self, lead: Size) -> tuple[Tensor | None, Tensor | None]:
        """Spread y and cond, (n,) and (n, C, ...), over events of a leading shape, which ends in ``batch_shape``."""
        y = None if self._y is None else self._y.expand(lead).reshape(-1)
        if self._cond is None:
            return y, None
        rest = self._cond.shape[self._cond.dim() - self._cond_dims :]
        return y, self._cond.expand(*lead, *rest).reshape(-1, *rest)

    def call_and_ladj(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Compute T(eps) and log|det dx/deps| in one pass, which zuko asks of a transform."""
        flat, lead = _flat(eps, 1)
        parts = flat.split(self.sizes, dim=1)
        noise = [part.reshape(-1, *shape) for part, shape in zip(parts, self.model.latent_shapes, strict=True)]
        x, log_det = self.model.from_noise(noise, *self.given(lead))
        return x.reshape(*lead, *x.shape[1:]), log_det.reshape(lead)

    def _call(self, eps: Tensor) -> Tensor:
        return self.call_and_ladj(eps)[0]

    def _back(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat, lead = _flat(x, self.event_dims)
        noise, log_det = self.model.to_noise(flat, *self.given(lead))
        return torch.cat([part.flatten(1) for part in noise], dim=1).reshape(*lead, -1), log_det.reshape(lead)

    def _inverse(self, x: Tensor) -> Tensor:
        return self._back(x)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute log|det dT/deps| at eps = x, where T(eps) = y, in nats, (...)."""
        return -self._back(y)[1]

    def forward_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape (..., C, *spatial) of x for noise of shape (..., D)."""
        expect(len(shape) >= 1 and shape[-1] == sum(self.sizes), "eps", f"shape (..., {sum(self.sizes)})", tuple(shape))
        return (*shape[:-1], *self.model.config.image_shape)

    def inverse_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape (..., D) of noise for x of shape (..., C, *spatial)."""
        event = tuple(self.model.config.image_shape)
        expect(tuple(shape[-len(event) :]) == event, "x", f"shape (..., {', '.join(map(str, event))})", tuple(shape))
        return (*shape[: -len(event)], sum(self.sizes))


class GlowDistribution(TransformedDistribution):
    """p(x) of a Glow, or p(x | y, cond), with the interface of torch.distributions.

    ``rsample`` is x = T(eps), eps ~ N(0, 1), differentiable in the parameters (see GlowTransform), for what the model's
    memory mode keeps; events are x as ``Glow.log_prob`` takes it, log_prob is in nats.

    Args:
        model: a Glow.
        y: label of a model with classes, () or (*batch,).
        cond: condition of a model that takes one, (*batch, C) or (*batch, C, *spatial).
        validate_args: see torch's Distribution.

    Shapes: batch_shape is that of y and cond, () without them; event_shape (C, *spatial).

    Raises:
        ValueError: labels or a condition that the model does not take; events of another shape.
    """

    def __init__(
        self,
        model: Any,
        y: Tensor | int | None = None,
        cond: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        transform = GlowTransform(model, y, cond)
        zeros = model._parameter().detach().new_zeros(sum(transform.sizes))
        noise = Independent(Normal(zeros, zeros + 1), 1).expand(transform.batch_shape)
        super().__init__(noise, [transform], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> GlowDistribution:
        """Spread the distribution over a larger batch shape, the same for every new element."""
        found: GlowDistribution = super().expand(Size(batch_shape), _instance or self.__new__(type(self)))  # type: ignore[no-untyped-call]
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value) in nats; value (..., *batch_shape, C, *spatial) -> (..., *batch_shape)."""
        if self._validate_args:
            self._validate_sample(value)
        transform = cast(GlowTransform, self.transforms[0])
        _, lead = _flat(value, transform.event_dims)
        lead = torch.broadcast_shapes(lead, self.batch_shape)
        flat, _ = _flat(value.expand(*lead, *value.shape[value.dim() - transform.event_dims :]), transform.event_dims)
        found: Tensor = transform.model.log_prob(flat, *transform.given(lead))
        return found.reshape(lead)
