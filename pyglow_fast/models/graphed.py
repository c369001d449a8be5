"""A training step and sampling as CUDA graphs: thousands of small launches become one each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from pyglow_fast._captures import Later, can_capture
from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.state import without_autocast_cache
from pyglow_fast.models.prior import check_temperature

if TYPE_CHECKING:
    from pyglow_fast.models.glow import Glow

WARM_UPS = 3  # runs before a capture, in which libraries allocate and the anchors' spacing adapts

T = TypeVar("T")


class _Loss(nn.Module):
    """-log p(x), the mean over the batch: a forward that functional_call can call."""

    def __init__(self, model: Glow) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor | None, cond: Tensor | None) -> Tensor:
        return -self.model.log_prob(x, y, cond).mean()


class _Step(NamedTuple):
    """What a training step leaves on the device; of a graph the tensors that each replay fills."""

    loss: Tensor  # a scalar, nats
    gradients: Sequence[Tensor | None]  # of the parameters that want one, None of those that the loss does not use
    lost: Tensor  # whether some of them are zero instead, since states drifted; a bool scalar
    zeroed: Tensor  # how many gradients of levels have become zero so far, a scalar


class GraphedGlow:
    """loss = mean over the batch of -log p(x), its gradients, and samples, replayed from CUDA graphs.

    Made by :meth:`pyglow_fast.Glow.make_graphed`. The parameters stay the model's own: an optimizer steps them as ever,
    and both graphs read what they are at each replay. Replace none of them (by ``model.to``, say) afterwards. Hooks on
    parameters are not called, and the autocast of the making counts.

    In memory mode "reversible" a graph cannot decide anything: where states drift, the gradients of that level, and of
    all before it, are zero, and :attr:`lost` is true. The host learns of it without a wait, a step or some later
    ("skipped" in ``model.memory_report()``); the next step then captures anew, with anchors closer together. Leave a
    lost step's update out where your loop reads a value anyway, or repeat the step on the model itself, which redoes
    what has drifted; pyglow-fast's own training does so.

    Examples:
        >>> import torch
        >>> from pyglow_fast.models import Glow, GraphedGlow
        >>> model, x = Glow(image_shape=(1, 8, 8), n_levels=1, n_steps=2, hidden=8), torch.rand(4, 1, 8, 8) - 0.5
        >>> model.initialize(x)
        >>> if torch.cuda.is_available():
        ...     graphed: GraphedGlow = model.cuda().make_graphed(x.cuda())
        ...     loss = graphed.train_step(x.cuda())  # one launch runs all kernels, forward and backward
        ... else:  # CUDA graphs need a GPU; elsewhere the step is the model's own
        ...     loss = -model.log_prob(x).mean()
        ...     loss.backward()
        >>> loss.shape, all(parameter.grad is not None for parameter in model.parameters())
        (torch.Size([]), True)
    """

    def __init__(self, model: Glow, x: Tensor, y: Tensor | None, cond: Tensor | None, n_samples: int | None) -> None:
        parameter = next(model.parameters(), None)
        trains = parameter is not None and model.memory != "frozen"
        expect(trains, "model", "one that is not frozen", "a frozen one")
        assert parameter is not None  # for the type checker: refused above
        one = cond is None or isinstance(cond, Tensor)
        expect(one, "cond", "None or one tensor for all levels: graphs take no condition of each", type(cond).__name__)
        device = parameter.device
        on_gpu = can_capture(device)
        expect(on_gpu, "model", "one on a CUDA device: CUDA graphs are captured there", f"one on {device}")
        expect(model.is_initialized, "model", "actnorms that have seen data (model.initialize)", "fresh ones")
        with torch.no_grad():
            model.log_prob(x[:1], None if y is None else y[:1], None if cond is None else cond[:1])  # checks them
        n = x.shape[0] if n_samples is None else n_samples
        expect(isinstance(n, int) and n > 0, "n_samples", "a whole number, 1 or more", repr(n_samples))
        self.model, self.n_samples = model, n
        self._inputs = {"x": x.detach().clone(), "y": _copy(y), "cond": _copy(cond)}
        self._conditions = {
            "y": None if y is None else y.new_zeros(n),
            "cond": None if cond is None else cond[:1].expand(n, *cond.shape[1:]).clone(),
        }
        self._temperature = parameter.new_ones(n)
        self._loss = _Loss(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._notice: Later | None = None  # of how many gradients have become zero
        self._make_training()
        with _side_stream(device) as stream:
            _warm_up(self._sample)
            self._replay_sampling, self._samples = _capture(self._sample, stream)
        self._lost = torch.zeros((), dtype=torch.bool, device=device)

    def train_step(self, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Run one training step: returns the loss, in nats, and leaves every gradient in its parameter's ``.grad``.

        Gradients are replaced and not added to those of the step before.

        Args:
            x, y, cond: of the shapes and dtypes that the graph was made with.
        """
        _fill(self._inputs, {"x": x, "y": y, "cond": cond})
        known = None if self._notice is None else self._notice.read()
        if known is not None and known[0] > self._zeroed_before:
            self._attach([None] * len(self._parameters))
            del self._replay_training, self._step  # whose memory the new graph may have
            self._notice = None
            self._make_training()
        self._replay_training()
        self._attach(self._step.gradients)
        self._lost = self._step.lost.clone()
        if self._notice is None or known is not None:
            self._notice = Later(self._step.zeroed)
        return self._step.loss.clone()

    @property
    def lost(self) -> Tensor:
        """Whether gradients of the last train_step are zero because states drifted: a bool tensor () on the device."""
        return self._lost

    def sample(self, temperature: float | Tensor = 1.0, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Draw (n_samples, C, *spatial); y is drawn uniformly if the model has classes and None is given."""
        check_temperature(temperature, self.n_samples)
        n_classes = self.model.config.n_classes
        if y is None and n_classes is not None:
            y = torch.randint(n_classes, (self.n_samples,), device=self._temperature.device)
        _fill(self._conditions, {"y": y, "cond": cond})
        self._temperature.copy_(torch.as_tensor(temperature))
        self._replay_sampling()
        return self._samples.clone()

    def _make_training(self) -> None:
        """Captures a training step, with the anchors' spacing that the passes before have brought about."""
        device = self._temperature.device
        with _side_stream(device) as stream:
            _warm_up(self._train)
            self.model.memory_report()  # waits for the verdicts of those runs, and takes them in
            self._zeroed_before = float(self._zeroed())
            self._replay_training, self._step = _capture(self._train, stream)

    def _train(self) -> _Step:
        # Leaves of its own: those of the parameters may belong to a graph of the user's, and to its stream.
        leaves = {
            name: parameter.detach().requires_grad_(parameter.requires_grad)
            for name, parameter in self._loss.named_parameters()
        }
        before = self._zeroed()
        with torch.enable_grad():
            inputs = self._inputs["x"], self._inputs["y"], self._inputs["cond"]
            loss = torch.func.functional_call(self._loss, leaves, inputs)
            loss.backward()
        gradients = [leaf.grad for leaf in leaves.values() if leaf.requires_grad]
        zeroed = self._zeroed()
        return _Step(loss.detach(), gradients, zeroed > before, zeroed)

    def _zeroed(self) -> Tensor:
        """How many passes' gradients have become zero, of all runs of steps; a scalar on the device."""
        device = self._temperature.device
        counts = [sequence.control.zeroed(device) for sequence in self.model._sequences()]
        found = [count for count in counts if count is not None]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=device)

    def _sample(self) -> Tensor:
        with without_autocast_cache():
            return self.model.sample(self.n_samples, self._temperature, self._conditions["y"], self._conditions["cond"])

    def _attach(self, gradients: Sequence[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _fill(buffers: dict[str, Tensor | None], values: dict[str, Tensor | None]) -> None:
    """Copies, once all of them fit."""
    for name, buffer in buffers.items():
        expected = "None" if buffer is None else f"{buffer.dtype} of shape {tuple(buffer.shape)}, as captured"
        value = values[name]
        found = "None" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
        both = value is not None and buffer is not None
        fits = both and value.shape == buffer.shape and value.dtype == buffer.dtype  # type: ignore[union-attr]
        expect(fits or (value is None and buffer is None), name, expected, found)
    for name, buffer in buffers.items():
        if buffer is not None:
            buffer.copy_(values[name])  # type: ignore[arg-type]


@contextlib.contextmanager
def _side_stream(device: torch.device) -> Iterator[torch.cuda.Stream]:
    """A context whose work runs on a stream of its own, on which a capture may follow warm-ups.

    Libraries have handles and memory for each stream, and make them when they first use one.
    """
    outside, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield stream
    outside.wait_stream(stream)


def _warm_up(function: Callable[[], object]) -> None:
    for _ in range(WARM_UPS):
        function()


def _capture(function: Callable[[], T], stream: torch.cuda.Stream) -> tuple[Callable[[], None], T]:
    """Captures a function; returns what replays it, and its result, whose tensors each replay fills.

    What other threads do meanwhile, such as one that pins memory for a loader of data, does not disturb it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result
