"""What is asked first of a GPU: who should compute nets, steps eager and graphed, whether updates agree.

    python -m bench.gpu_answers [--device cuda] [--quick] [--until T] [--out FILE]

docs/gpu.md lists the questions. The file has of each step the TOP kernels by time: name, count, microseconds.
Where the clock shows more than the kernels take, the GPU waits for Python. What was to run as a CUDA graph and did not
is wrong. With ``--device cpu``, to rehearse, launches are operators that call no other, and nothing is captured.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from bench.gpu_questions import Question, Row, replayed, run, stage_options, until_replayed
from bench.harness import Turns, autocast, synchronize
from bench.model_cases import OURS, PLAIN, Shape, build, images, plain_levels, wake
from pyglow_fast import FlowStep, ReversibleSequence, graphed
from pyglow_fast._core import backend
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.models import GlowConfig
from pyglow_fast.models.replays import WARM_UPS
from pyglow_fast.runs.choice import ROWS_IN
from pyglow_fast.runs.drift import LAST_HOLD
from pyglow_fast.train import TrainConfig, TrainState

ROUNDS, UPDATES, TOP = 5, 20, 40
MARK = "pyglow"  # the namespace of our kernels, and of our operators
SMALL = Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=512, batch=64)
LARGE = Shape((3, 256, 256), n_levels=6, n_steps=32, hidden=512, batch=2)
NETS = 8  # flow steps whose nets are timed
NAMES = {"tf32": "tf32", "bf16": "bfloat16"}  # precisions, as ROWS_IN has them
COLUMNS = ("ms", "kernels ms", "launches", "ours", "peak MB")


def clock(function: Callable[[], object], device: torch.device) -> float:
    """The median milliseconds of a call that has run before."""
    turns = Turns({"": function}, device)
    return 1e3 * statistics.median(turns.round(number)[""][0] for number in range(ROUNDS))


def launched(function: Callable[[], object], device: torch.device) -> Row:
    """Count what a call launches, how much of that is ours, the milliseconds together, and of TOP names which."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        function()
        synchronize(device)
    events: list[Any] = list(profiler.events())
    if on_gpu:
        chosen = [e for e in events if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)]
        if not chosen:
            raise RuntimeError("the profiler saw no kernel: CUPTI may be missing, or need rights")
    else:
        chosen = [event for event in events if not event.cpu_children]
    counts, us = collections.Counter(e.name for e in chosen), collections.Counter[str]()
    for e in chosen:
        us[e.name] += e.time_range.elapsed_us()
    row: Row = {"launches": len(chosen), "ours": sum(MARK in e.name for e in chosen), "kernels ms": us.total() / 1e3}
    return row | {"kernels": [(name[:200], counts[name], time) for name, time in us.most_common(TOP)]}


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """A context in which equal inputs give equal bits. Memory is not filled, which is a launch for each tensor."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def nets_by(way: str) -> Iterator[None]:
    """A context in which coupling nets are computed as PYGLOW_NETS in the environment would say."""
    try:
        with mock.patch.dict(os.environ, PYGLOW_NETS=way):
            backend._nets.cache_clear()
            yield
    finally:
        backend._nets.cache_clear()


class Answers:
    """The questions of a device, for models of two shapes. ``captures``: whether it has CUDA graphs."""

    def __init__(self, device: torch.device, small: Shape, large: Shape) -> None:
        self.device, self.small, self.large = device, small, large
        self.on_gpu = self.captures = device.type == "cuda"
        self._built: tuple[Shape, Any] | None = None  # one model at a time

    def questions(self) -> Iterator[Question]:
        """All of them, in their order."""
        for precision, level in itertools.product(NAMES, range(self.small.n_levels)):
            yield f"nets: {precision}, level {level + 1}", functools.partial(self.nets, precision, level)
        yield from self._steps("step", self.small, ("tf32", "bf16"))
        for memory in ("store", "reversible"):
            yield f"{UPDATES} updates: {memory}", functools.partial(self.updates, memory)
        for memory in OURS:
            yield f"deterministic: {memory}", functools.partial(self.deterministic, memory)
        for precision in ("fp32", "bf16", "fp16"):
            yield f"poisoned: {precision}", functools.partial(self.poisoned, precision)
        yield from self._steps("large step", self.large, ("bf16",))

    def _steps(self, name: str, shape: Shape, precisions: Sequence[str]) -> Iterator[Question]:
        for precision, memory in itertools.product(precisions, ("reversible", "store", "checkpoint", PLAIN)):
            for graph in (False,) if memory == PLAIN else (True, False):
                case = f"{name}: {precision}, {memory}, {'graphed' if graph else 'eager'}"
                yield case, functools.partial(self.step, shape, precision, memory, graph)

    def _model(self, shape: Shape, precision: str, memory: str = "store") -> Any:
        if self._built is None or self._built[0] != shape:
            self._built = None
            gc.collect()
            self._built = shape, build("store", shape, self.device)
        model: Any = self._built[1]
        model.memory, model.precision = memory, precision
        model.zero_grad(set_to_none=True)
        return model

    def nets(self, precision: str, level: int) -> Row:
        """A training step of NETS flow steps, their nets by convolutions and by products, and which it should be."""
        shape, found = self.small, dict[str, Row]()
        channels, side = shape.widths()[level], shape.image[1] // 2 ** (level + 1)
        steps = [FlowStep(channels, shape.hidden, precision=precision) for _ in range(NETS)]
        sequence = ReversibleSequence(steps, "store").to(self.device)
        x = torch.randn(shape.batch, channels, side, side, device=self.device)
        wake(sequence)
        sequence.initialize(x)

        def step() -> object:
            z, log_det = sequence(x)
            return torch.autograd.grad([z, log_det], list(sequence.parameters()), [z.detach(), log_det.detach()])

        for way in ("library", "rows"):
            with nets_by(way):
                step()
                found[way] = {"ms": clock(step, self.device), **launched(step, self.device)}
        products, convolutions = found["rows"]["ms"], found["library"]["ms"]
        name, note = NAMES[precision], f"convolutions {convolutions:.3f} ms"
        if self.on_gpu and (products < convolutions) != (name in ROWS_IN):
            note += f": ROWS_IN of runs/choice.py should {'' if products < convolutions else 'not '}have {name}"
        return found["rows"] | {"note": note}

    def step(self, shape: Shape, precision: str, memory: str, graph: bool) -> Row:
        """A training step."""
        model, x = self._model(shape, precision, "store" if memory == PLAIN else memory), images(shape, self.device)
        run_by: Any = plain_levels(model, PLAIN) if memory == PLAIN else model
        cast = torch.bfloat16 if (memory, precision) == (PLAIN, "bf16") else torch.float32

        def eager() -> object:
            run_by.zero_grad(set_to_none=True)
            with autocast(self.device, cast):
                loss = -run_by.log_prob(x).mean()
            loss.backward()
            return loss

        own = graphed(model)
        step = functools.partial(own, x) if graph else eager
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        if graph:
            until_replayed(step, lambda: own.how)
        else:  # of the model of the question before, which has learnt how far apart its anchors may be
            for _ in range(WARM_UPS):
                step()
        row: Row = {"shape": shape.title, "ms": clock(step, self.device), **launched(step, self.device)}
        row |= {"failed": False, "note": ""}
        if self.on_gpu:
            row["peak MB"] = torch.cuda.max_memory_allocated(self.device) / 1e6
        if memory == "reversible":
            row["note"] = f"anchors every {[report['anchor_every'] for report in model.memory_report()]}"
        return replayed(row, own.how, self.captures) if graph else row

    def updates(self, memory: str) -> Row:
        """The time of an update, and whether the weights are those of eager ones: both go on from the same state."""
        shape: Any = self.small
        pixels = torch.randint(256, (2 * shape.batch, *shape.image), dtype=torch.uint8)
        steps, hidden, milliseconds = min(shape.n_steps, 8), min(shape.hidden, 128), list[float]()
        config = TrainConfig(
            data=DataConfig("digits", held_out=0.4),
            model=GlowConfig(shape.image, shape.n_levels, steps, hidden),
            memory=memory,
            batch_size=shape.batch,
            device=self.device.type,
            precision="fp32",
        )
        with deterministic_algorithms():
            data = ImageSet("random", pixels, 256)
            configs = config, dataclasses.replace(config, graph="off")
            graph, eager = states = [TrainState(each, data) for each in configs]
            for state in states:
                state.initialize()
                state.step()
            until_replayed(graph.step, lambda: graph.update.replays.how)
            for sequence in graph.model._sequences():  # recomputed states are the same bits between the same anchors
                sequence.control.learnt.hold = LAST_HOLD
            eager.restore(copy.deepcopy(graph.checkpoint()), "the graphed run")
            for state in states:
                start = time.perf_counter()
                for _ in range(UPDATES):
                    state.step()
                milliseconds.append(1e3 * (time.perf_counter() - start) / UPDATES)
                state.close()
        weights = [torch.cat([value.detach().flatten() for value in state.model.parameters()]) for state in states]
        differ = int((weights[0] != weights[1]).sum())  # of which NaN is one
        note = f"{differ} of {len(weights[0])} weights differ; eager {milliseconds[1]:.2f} ms"
        row = {"ms": milliseconds[0], "failed": differ > 0, "note": note}
        return replayed(row, graph.update.replays.how, self.captures)

    def _gradients(self, model: Any) -> list[Tensor]:
        loss = -model.log_prob(images(self.small.small(), self.device)).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def _twice(self, memory: str, precision: str) -> list[Any]:
        """The model of small images for two steps: what one learns of drift does not move the anchors of the other."""
        model = self._model(self.small.small(), precision, memory)
        return [copy.deepcopy(model) for _ in range(2)]

    def deterministic(self, memory: str) -> Row:
        """Two steps, and whether anything refuses."""
        with deterministic_algorithms():
            return _compared(*map(self._gradients, self._twice(memory, "fp32")))

    def poisoned(self, precision: str) -> Row:
        """A step in memory that held NaN."""
        one, other = self._twice("reversible", precision)
        clean, held = self._gradients(one), []
        if self.on_gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            held.append(torch.full((free // 4 // 4,), float("nan"), device=self.device))
        held += [torch.full((2**k,), float("nan"), device=self.device) for k in range(22) for _ in range(8)]
        synchronize(self.device)
        held.clear()  # the allocator hands these out again
        return _compared(clean, self._gradients(other))


def _compared(one: Sequence[Tensor], other: Sequence[Tensor]) -> Row:
    differ = sum(not torch.equal(*pair) for pair in zip(one, other, strict=True))
    bad = sum(not bool(tensor.isfinite().all()) for tensor in other)
    words = f"{differ} of {len(one)} tensors differ, {bad} are not finite"
    return {"failed": bool(differ or bad), "note": words if differ or bad else "the same bits"}


def groups(arguments: argparse.Namespace) -> list[Callable[[], Iterator[Question]]]:
    """The questions, in one group."""
    small, large = (SMALL.quick(), SMALL.quick()) if arguments.quick else (SMALL, LARGE)
    return [Answers(arguments.device, small, large).questions]


if __name__ == "__main__":
    options = stage_options("gpu_answers", "what is asked first")
    options.add_argument("--quick", action="store_true", help="tiny models: to see that it works")
    raise SystemExit(run(options, COLUMNS, groups))
