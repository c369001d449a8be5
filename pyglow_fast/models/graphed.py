"""A training step and sampling as CUDA graphs: thousands of small launches become one each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyglow_fast._errors import expect
from pyglow_fast.models.prior import check_temperature

if TYPE_CHECKING:
    from pyglow_fast.models.glow import Glow

WARM_UPS = 3  # runs before a capture, in which libraries allocate and the anchors' spacing adapts


class GraphedGlow:
    """loss = mean over the batch of -log p(x), its gradients, and samples, replayed from CUDA graphs.

    Made by :meth:`pyglow_fast.Glow.make_graphed`. The parameters stay the model's own: an optimizer steps them as ever,
    and both graphs read what they are at each replay. Replace none of them (by ``model.to``, say) afterwards.

    In memory mode "reversible" a graph cannot decide anything: the gradients of a step whose states drifted are zero
    ("skipped" in ``model.memory_report()``). Where that happens, make the graphs again: they take the spacing of the
    anchors that the report has brought about.
    """

    def __init__(self, model: Glow, x: Tensor, y: Tensor | None, cond: Tensor | None, n_samples: int | None) -> None:
        parameter = next(model.parameters(), None)
        trains = parameter is not None and model.memory != "frozen"
        expect(trains, "model", "one that is not frozen", "a frozen one")
        assert parameter is not None  # for the type checker: refused above
        one = cond is None or isinstance(cond, Tensor)
        expect(one, "cond", "None or one tensor for all levels: graphs take no condition of each", type(cond).__name__)
        _require_gpu(parameter.device)
        expect(model.is_initialized, "model", "actnorms that have seen data (model.initialize)", "fresh ones")
        one = cond is None or isinstance(cond, Tensor)
        expect(one, "cond", "None or a Tensor, one condition for all levels", type(cond).__name__)
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
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kept = [parameter.grad for parameter in self._parameters]
        _warm_up([self._train, self._sample], parameter.device)
        self._attach([None] * len(kept))  # the capture makes tensors that every replay fills
        self._replay_training, self._loss = _capture(self._train)
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._replay_sampling, self._samples = _capture(self._sample)
        self._attach(kept)

    def train_step(self, x: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """The loss, in nats; afterwards every parameter's ``.grad`` is its gradient (nothing is accumulated).

        Args:
            x, y, cond: of the shapes and dtypes that the graph was made with.
        """
        _fill(self._inputs, {"x": x, "y": y, "cond": cond})
        self._replay_training()
        self._attach(self._gradients)
        return self._loss.clone()

    def sample(self, temperature: float | Tensor = 1.0, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """(n_samples, C, *spatial); y is drawn uniformly if the model has classes and None is given."""
        check_temperature(temperature, self.n_samples)
        n_classes = self.model.config.n_classes
        if y is None and n_classes is not None:
            y = torch.randint(n_classes, (self.n_samples,), device=self._temperature.device)
        _fill(self._conditions, {"y": y, "cond": cond})
        self._temperature.copy_(torch.as_tensor(temperature))
        self._replay_sampling()
        return self._samples.clone()

    def _train(self) -> Tensor:
        x, y, cond = self._inputs["x"], self._inputs["y"], self._inputs["cond"]
        assert x is not None
        with torch.enable_grad():
            loss = -self.model.log_prob(x, y, cond).mean()
            loss.backward()
        return loss.detach()

    def _sample(self) -> Tensor:
        return self.model.sample(self.n_samples, self._temperature, self._conditions["y"], self._conditions["cond"])

    def _attach(self, gradients: list[Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient


def _require_gpu(device: torch.device) -> None:
    expect(device.type == "cuda", "model", "one on a CUDA device: CUDA graphs are captured there", f"one on {device}")


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


def _warm_up(functions: list[Callable[[], Tensor]], device: torch.device) -> None:
    """Runs them on a stream of their own, as captures do."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            for function in functions:
                function()
    torch.cuda.current_stream(device).wait_stream(stream)


def _capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """What replays it, and the tensor that holds its result after each replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result
