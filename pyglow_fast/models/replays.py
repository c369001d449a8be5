"""Functions of tensors as CUDA graphs: thousands of small launches become one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyglow_fast._core import torch_private
from pyglow_fast._core.captures import can_capture, rehearsed
from pyglow_fast._core.tracing import has_hooks
from pyglow_fast.layers import ReversibleSequence
from pyglow_fast.nets.state import without_autocast_cache
from pyglow_fast.runs.drift import GROW_AFTER

# Calls before a capture, in which libraries allocate, and no spacing of anchors has changed: one that is going to be
# wider is so after GROW_AFTER of them and those in which a verdict is on its way. The last one rehearses the capture.
WARM_UPS = GROW_AFTER + 3


_Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Replays:
    """Calls of functions of tensors, replayed from CUDA graphs once WARM_UPS in a row were alike.

    Alike are calls with inputs of the same shapes, and anchors as far apart. Others run eagerly, and are captured in
    turn when as many of them have come in a row. What a graph cannot hold runs eagerly for good, and :attr:`how` says
    why, as ``against`` does if it is not empty. A result is overwritten by the next replay. What drifted in a replay,
    or its rehearsal, was not redone: ``replayed`` says whether the last call was one.

    The functions are called one after the other, the first with the inputs, each other with what the one before it has
    returned. Each is a graph, but every second one, which changes what it gets, and is called between replays.
    """

    def __init__(self, model: nn.Module, against: str, *functions: Callable[..., Any]) -> None:
        self._model, self._why, self._functions, self.replayed = model, against, functions, False
        runs = [module for module in model.modules() if isinstance(module, ReversibleSequence)]
        self._controls = [control for run in runs for control in (run.control, run.inverse_control)]
        self._runs, self._seen, self._key = 0, None, None  # alike calls in a row; what they were like; the captured one
        self._buffers: Sequence[Tensor | None] = ()
        self._graphs: list[tuple[Callable[[], None], Any]] = []  # what replays each, and its result
        self._stream: Any = None  # of runs before a capture, and of the capture

    @property
    def how(self) -> str:
        """The way in which calls run: "a CUDA graph", or "eagerly: " and why."""
        if self._graphs and self.replayed:
            return "a CUDA graph"
        return f"eagerly: {self._why or self._against() or 'the first calls of a shape do'}"

    def __call__(self, *inputs: Tensor | None) -> Any:
        """Run the functions, or replay them."""
        device = self._device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        shapes = [None if value is None else (value.shape, value.dtype) for value in inputs]
        key: Any = autocast, shapes, [control.spacing for control in self._controls]
        self.replayed = bool(self._graphs) and key == self._key
        if self.replayed:
            self._runs = 0
            for buffer, value in zip(self._buffers, inputs, strict=True):
                if buffer is not None and value is not None:
                    buffer.copy_(value, non_blocking=True)
            return self._replay()
        self._runs, self._seen = (self._runs + 1 if self._seen in (None, key) else 1), key
        if self._runs >= WARM_UPS and not self._why:
            self._why = self._against()
            if not self._why:
                try:
                    return self._graphed(key, inputs)
                except (RuntimeError, ValueError) as error:
                    self.forget()
                    self.replayed = False
                    self._why = str(error).strip().partition("\n")[0]
        try:
            return self._aside_if_graphed(inputs)
        except torch.OutOfMemoryError:
            if not self._graphs:
                raise
            self.forget()  # the memory of a graph of other shapes is free for this call
        torch.cuda.empty_cache()
        return self._aside_if_graphed(inputs)

    def _graphed(self, key: Any, inputs: Sequence[Tensor | None]) -> Any:
        """Rehearse a capture, in which a read of a value is found without harm; at the next call capture and replay."""
        if self._runs == WARM_UPS:
            self._graphs = []  # as of those that the capture will replace
            with self._aside():
                found = self._eager(inputs, rehearsed)
        else:
            self._capture(key, inputs)
            found = self._replay()
        self.replayed = True
        return found

    def _aside_if_graphed(self, inputs: Sequence[Tensor | None]) -> Any:
        with self._aside() if can_capture(self._device) and not self._why else contextlib.nullcontext():
            return self._eager(inputs)

    def forget(self) -> None:
        """Drop the graphs, and their memory: the next call runs eagerly, the one after it rehearses a new capture."""
        self._graphs, self._buffers, self._runs, self._seen = [], (), WARM_UPS - 2, None

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        """A context of backward passes whose gradients stay as they are where states drifted; zeroed() tells of it."""
        for control in self._controls:
            control.leaves_out = True
        try:
            yield
        finally:
            for control in self._controls:
                control.leaves_out = False

    def zeroed(self) -> Tensor:
        """Count the passes whose gradients have become zero since states drifted, of all runs; on the device."""
        counts = [control.zeroed(self._device) for control in self._controls]
        found = [count for count in counts if count is not None]
        return torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _against(self) -> str:
        return hooks_of(self._model) if can_capture(self._device) else f"the device is {self._device}"

    def _aside(self) -> contextlib.AbstractContextManager[Any]:
        if self._stream is None:
            self._stream = _side_stream(self._device)
        return _on(self._stream)

    def _eager(self, inputs: Sequence[Tensor | None], within: _Context = contextlib.nullcontext) -> Any:
        """Call the functions; those that a graph would hold ``within`` a context."""
        found: Any = None
        with without_autocast_cache():
            for i, function in enumerate(self._functions):
                with contextlib.nullcontext() if i % 2 else within():
                    result = function(*(inputs if i == 0 else (found,)))
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

    What other threads do meanwhile, such as one that pins memory for a loader of data, does not disturb it. Where it
    fails, the process is as it was: torch before 2.12 goes on to allocate in the pool of a capture that CUDA has broken
    off, torch before 2.14 never releases it, and the generator would wait for a replay (pytorch 180395, 190348).
    """
    graph, pool, device = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), stream.device_index
    generator = torch.cuda.default_generators[device]
    before, failed = generator.clone_state(), None
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                result = function()
            except Exception as error:  # the capture is ended first
                failed = error
    except RuntimeError as broken:
        generator.graphsafe_set_state(before)
        with contextlib.suppress(RuntimeError):  # what torch has ended itself
            torch_private.end_allocations(device, pool)
        if torch.__version__ < (2, 14):  # type: ignore[operator]  # it compares with tuples
            with contextlib.suppress(RuntimeError):  # where the capture has not begun, there is none
                torch_private.release_pool(device, pool)
        raise failed or broken from broken
    if failed is not None:
        raise failed
    return graph.replay, result
