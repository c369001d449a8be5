"""A Glow's training step, and its samples, as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyglow_fast._core.captures import Later, is_capturing
from pyglow_fast._core.errors import expect
from pyglow_fast.models import Glow
from pyglow_fast.models.condition import Condition
from pyglow_fast.models.prior import check_temperature
from pyglow_fast.models.replays import Replays
from pyglow_fast.nets.state import holding


class _Step(NamedTuple):
    """The results of a training step on the device; those of a graph are tensors that each replay fills."""

    loss: Tensor  # a scalar, nats
    gradients: Sequence[Tensor | None]  # of the parameters that want one, None of those that the loss does not use
    lost: Tensor  # whether some of them are zero instead, since states drifted; a bool scalar
    zeroed: Tensor  # how many gradients of levels have become zero so far, a scalar


class GraphedGlow:
    """loss = mean over the batch of -log p(x), its gradients, and samples, replayed from CUDA graphs where they can be.

    Made by :func:`pyglow_fast.graphed`. The first calls run eagerly, on any device; from the seventh in a row on with
    the same shapes, and anchors as far apart (which are at first moved apart, see DriftControl), a graph is replayed.
    On a CPU, and where a graph cannot hold (other shapes such as a last small
    batch's, a condition for each level, hooks, nets that read values), calls go on eagerly, and :attr:`how` says why.
    The parameters stay the model's own: an optimizer steps them as ever. Once captured, settings and hooks count as
    they were; after a change of those, or of where the parameters are, call :meth:`forget`.

    In memory mode "reversible" a graph cannot decide anything: where states drift, the gradients of that level, and of
    all before it, are zero, and :attr:`lost` is true. The host learns of it without a wait, a step or some later
    ("skipped" in ``model.memory_report()``); the next step then runs eagerly, the one after it is captured anew with
    anchors closer together. Leave a lost step's update out (``optimizer.found_inf = step.lost.float()`` does so for
    torch's fused Adam); pyglow-fast's own training takes the step once more.

    Examples:
        >>> import torch
        >>> import pyglow_fast as pgf
        >>> model, x = pgf.Glow(image_shape=(1, 8, 8), n_levels=1, n_steps=2, hidden=8), torch.rand(4, 1, 8, 8) - 0.5
        >>> step = pgf.graphed(model)
        >>> loss = step(x)  # forward and backward
        >>> loss.shape, all(parameter.grad is not None for parameter in model.parameters()), step.how
        (torch.Size([]), True, 'eagerly: the device is cpu')
    """

    def __init__(self, model: Glow) -> None:
        trains = model.memory != "frozen" and any(parameter.requires_grad for parameter in model.parameters())
        expect(trains, "model", "one that is not frozen", "a frozen one")
        self.model = model
        self._training = Replays(model, "", self._train)
        self._sampling = Replays(model, "", self._sample)
        self._why = ""  # the last step could not be replayed
        self._notice: Later | None = None  # of how many gradients have become zero
        self._zeroed = 0.0  # of which the host knows
        self._lost: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor | None = None, cond: Condition | None = None) -> Tensor:
        """Run one training step: returns the loss, in nats, and leaves every gradient in its parameter's ``.grad``.

        Gradients are replaced and not added to those of the step before.

        Args:
            x, y, cond: a batch as log_prob takes it.
        """
        if cond is None or isinstance(cond, Tensor):
            self._why = ""
            self._learn()
            step: _Step = self._training(x, y, cond)
        else:
            self._why = "eagerly: a condition for each level"
            step = self._train(x, y, cond)
        if self._training.replayed and not self._why:
            wanting = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
            for parameter, gradient in zip(wanting, step.gradients, strict=True):
                parameter.grad = gradient
            if self._notice is None:
                self._notice = Later(step.zeroed)
        self._lost = step.lost.clone()
        return step.loss.clone()

    @property
    def how(self) -> str:
        """The way in which steps run: "a CUDA graph", or "eagerly: " and why."""
        return self._why or self._training.how

    @property
    def lost(self) -> Tensor:
        """Whether gradients of the last step are zero because states drifted: a bool tensor () on the device."""
        return torch.zeros((), dtype=torch.bool, device=self._device()) if self._lost is None else self._lost

    def sample(
        self, n: int, temperature: float | Tensor = 1.0, y: Tensor | None = None, cond: Tensor | None = None
    ) -> Tensor:
        """Draw (n, C, *spatial) as the model does; y is drawn uniformly if it has classes and None is given."""
        expect(isinstance(n, int) and n > 0, "n", "a whole number, 1 or more", repr(n))
        check_temperature(temperature, n)
        n_classes = self.model.config.n_classes
        if y is None and n_classes is not None:
            y = torch.randint(n_classes, (n,), device=self._device())
        each = self.model._parameter().new_empty(n).copy_(torch.as_tensor(temperature))
        found: Tensor = self._sampling(each, y, cond).clone()
        return found

    def forget(self) -> None:
        """Drop the graphs and their memory; they are captured anew."""
        self._training.forget()
        self._sampling.forget()
        self._notice = None

    def _device(self) -> torch.device:
        return self.model._parameter().device

    def _learn(self) -> None:
        """Has the graph made anew once it is known that states have drifted."""
        known = None if self._notice is None else self._notice.read()
        if known is None:
            return
        self._notice = None
        if known[0] > self._zeroed:
            self._zeroed = known[0]
            self._training.forget()
            self.model.memory_report()  # takes the verdicts in: anchors move closer together

    def _train(self, x: Tensor, y: Tensor | None, cond: Condition | None) -> _Step:
        before, leaves = self._training.zeroed(), list[Tensor](self.model.parameters())
        captured = is_capturing(self._device())
        if captured:  # leaves of its own: those of the parameters may belong to a graph of the user's, and its stream
            leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        with torch.enable_grad():
            with holding(self.model, leaves) if captured else contextlib.nullcontext():
                loss = -self.model.log_prob(x, y, cond).mean()
            loss.backward()
        gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
        after = self._training.zeroed()
        return _Step(loss.detach(), gradients, after > before, after)

    def _sample(self, temperature: Tensor, y: Tensor | None, cond: Tensor | None) -> Tensor:
        return self.model.sample(len(temperature), temperature, y, cond)


def graphed(model: Glow) -> GraphedGlow:
    """loss = mean of -log p(x) and its gradients in one launch: makes a loop's step a CUDA graph where it can be.

    ``step = graphed(model)`` once; then ``loss = step(x)``, or ``step(x, y, cond)``, in the place of zero_grad, forward
    and backward, on any device; see :class:`pyglow_fast.models.graphed_glow.GraphedGlow`.

    Shapes: x (N, C, *spatial); loss (), nats; the gradients are in the parameters' ``.grad``.

    Raises:
        ValueError: a frozen model; what log_prob refuses.

    Reference: Kingma & Dhariwal 2018, "Glow", for the loss.
    """
    return GraphedGlow(model)
