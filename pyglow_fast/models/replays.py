"""Functions of tensors as CUDA graphs: thousands of small launches become one; and a Glow's training step as one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast._captures import Later, can_capture, is_capturing
from pyglow_fast._errors import expect
from pyglow_fast.models.prior import check_temperature
from pyglow_fast.nets.state import holding, without_autocast_cache
from pyglow_fast.nets.traits import has_hooks
from pyglow_fast.runs.drift import GROW_AFTER

if TYPE_CHECKING:
    from pyglow_fast.models.condition import Condition
    from pyglow_fast.models.glow import Glow

# Calls before a capture, in which libraries allocate, and no spacing of anchors has changed: one that is going to be
# wider is so after GROW_AFTER of them and those in which a verdict is on its way.
WARM_UPS = GROW_AFTER + 2


class Replays:
    """Calls of functions of tensors, replayed from CUDA graphs once WARM_UPS in a row were alike.

    Alike are calls with inputs of the same shapes, and anchors as far apart. Others run eagerly, and are captured in
    turn when as many of them have come in a row. What a graph cannot hold runs eagerly for good, and :attr:`how` says
    why. A result is overwritten by the next replay.

    Args:
        model: which the functions call; what has hooks is not captured.
        against: why there is to be no capture; "" if nothing is against it.
        functions: one called after the other, the first with the inputs, each other with what the one before it has
            returned. Each is a graph, but every second one, which changes what it gets, and is called between replays.

    Attributes:
        replayed: whether the last call was a replay.
    """

    def __init__(self, model: Glow, against: str, *functions: Callable[..., Any]) -> None:
        self._model, self._why, self._functions, self.replayed = model, against, functions, False
        self._runs, self._seen, self._key = 0, None, None  # alike calls in a row; what they were like; the captured one
        self._buffers: Sequence[Tensor | None] = ()
        self._graphs: list[tuple[Callable[[], None], Any]] = []  # what replays each, and its result
        self._stream: Any = None  # of runs before a capture, and of the capture

    @property
    def how(self) -> str:
        """How calls run: "a CUDA graph", or "eagerly: " and why."""
        if self.replayed:
            return "a CUDA graph"
        return f"eagerly: {self._why or self._against() or 'the first calls of a shape do'}"

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Run the functions, or replay them."""
        device = self._model._parameter().device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        shapes = [None if value is None else (value.shape, value.dtype) for value in inputs]
        key: Any = autocast, shapes, [sequence.control.spacing for sequence in self._model._sequences()]
        self.replayed = bool(self._graphs) and key == self._key
        if self.replayed:
            self._runs = 0
            for buffer, value in zip(self._buffers, inputs, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value, non_blocking=True)
            return self._replay()
        self._runs, self._seen = (self._runs + 1 if self._seen in (None, key) else 1), key
        if self._runs > WARM_UPS and not self._why:
            self._why = self._against()
            if not self._why:
                try:
                    self._capture(key, inputs)
                    self.replayed = True
                    return self._replay()
                except (RuntimeError, ValueError) as error:
                    self.forget()
                    self.replayed = False
                    self._why = str(error).strip().partition("\n")[0]
        with self._aside() if can_capture(device) and not self._why else contextlib.nullcontext():
            return self._eager(inputs)

    def forget(self) -> None:
        """Drop the graphs, and their memory: the next call runs eagerly, the one after it is captured anew."""
        self._graphs, self._buffers, self._runs, self._seen = [], (), WARM_UPS - 1, None

    def _against(self) -> str:
        device = self._model._parameter().device
        return hooks_of(self._model) if can_capture(device) else f"the device is {device}"

    def _aside(self) -> contextlib.AbstractContextManager[Any]:
        if self._stream is None:
            self._stream = _side_stream(self._model._parameter().device)
        return _on(self._stream)

    def _eager(self, inputs: Sequence[Tensor | None]) -> Any:
        first, *others = self._functions
        with without_autocast_cache():
            found = first(*inputs)
            for function in others:
                result = function(found)
                found = found if result is None else result
        return found

    def _capture(self, key: Any, inputs: Sequence[Tensor | None]) -> None:
        self._graphs, self._key = [], key  # an earlier graph's memory is free for this one
        self._buffers = [None if value is None else value.detach().clone() for value in inputs]
        arguments: Sequence[Any] = self._buffers
        made = list[tuple[Callable[[], None], Any]]()
        with self._aside(), without_autocast_cache():
            for function in self._functions[::2]:
                made.append(_capture(functools.partial(function, *arguments), self._stream))
                arguments = (made[-1][1],)
        self._graphs = made

    def _replay(self) -> Any:
        result = None
        for i, (replay, result) in enumerate(self._graphs):
            replay()
            if i + 1 < len(self._graphs):
                self._functions[2 * i + 1](result)
        return result


class _Step(NamedTuple):
    """What a training step leaves on the device; of a graph the tensors that each replay fills."""

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
            step = self._training(x, y, cond)
        else:
            self._why, step = "eagerly: a condition for each level", self._train(x, y, cond)
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
        """How steps run: "a CUDA graph", or "eagerly: " and why."""
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
        before, leaves = zeroed(self.model), list[Tensor](self.model.parameters())
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
        after = zeroed(self.model)
        return _Step(loss.detach(), gradients, after > before, after)

    def _sample(self, temperature: Tensor, y: Tensor | None, cond: Tensor | None) -> Tensor:
        return self.model.sample(len(temperature), temperature, y, cond)


def graphed(model: Glow) -> GraphedGlow:
    """loss = mean of -log p(x) and its gradients in one launch: makes a loop's step a CUDA graph where it can be.

    ``step = graphed(model)`` once; then ``loss = step(x)``, or ``step(x, y, cond)``, in the place of zero_grad, forward
    and backward, on any device; see :class:`pyglow_fast.models.GraphedGlow`.

    Shapes: x (N, C, *spatial); loss (), nats; the gradients are in the parameters' ``.grad``.

    Raises:
        ValueError: a frozen model; what log_prob refuses.

    Reference: Kingma & Dhariwal 2018, "Glow", for the loss.
    """
    return GraphedGlow(model)


def zeroed(model: Glow) -> Tensor:
    """Count the passes whose gradients have become zero since states drifted, of all runs of steps; on the device."""
    device = model._parameter().device
    counts = [sequence.control.zeroed(device) for sequence in model._sequences()]
    found = [count for count in counts if count is not None]
    return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=device)


def hooks_of(model: nn.Module) -> str:
    """Say that a module or a parameter has hooks, which a replay would not call; "" if none has."""
    for name, module in model.named_modules():
        if has_hooks(module):
            return f"module {name or 'itself'} has hooks"
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"parameter {name} has hooks"
    return ""


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    """A context whose work runs on a stream of its own, on which a capture may follow warm-ups.

    Libraries have handles and memory for each stream, and make them when they first use one.
    """
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


def _capture(function: Callable[[], Any], stream: torch.cuda.Stream) -> tuple[Callable[[], None], Any]:
    """Captures a function; returns what replays it, and its result, whose tensors each replay fills.

    What other threads do meanwhile, such as one that pins memory for a loader of data, does not disturb it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
