"""What is asked first of a GPU: layouts and precisions of nets, steps eager and graphed, whether updates agree.

    python -m bench.gpu_answers [--device cuda] [--quick] [--seconds S] [--out FILE]

Questions, in this order:

- nets: a coupling net of torch's convolutions, hidden width 512: channels-last or not, cuDNN's fused relu or not, in
  TF32 and in bfloat16;
- steps: a training step (zero_grad, forward, backward) of L 3, K 32, hidden 512, batch 64 at 32x32, in all modes, eager
  and as a CUDA graph: the clock, the kernels' time, launches by the profiler, peak memory;
- updates: 20 updates of the weights by this package's training, graphed against eager: time, and how far apart the
  weights are;
- deterministic: two steps under torch.use_deterministic_algorithms: whether their gradients are the same bits;
- poisoned: a step whose memory held NaN, against one before that: whether they are the same bits;
- large: as steps, of L 6, K 32, hidden 512, batch 2 at 256x256.

Where the clock shows more than the kernels take, the GPU waits for Python. With ``--device cpu``, to rehearse, launches
are operators that call no other, and nothing is captured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from bench.gpu_questions import Question, Row, run, stage_options
from bench.harness import Turns, autocast, synchronize
from bench.model_cases import OURS, PLAIN, Shape, ThreeConvolutions, build, images, plain_levels, wake
from pyglow_fast import graphed
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.models import GlowConfig
from pyglow_fast.models.replays import WARM_UPS
from pyglow_fast.train import TrainConfig, TrainState

ROUNDS, UPDATES = 5, 20
MARK = "pyglow"  # the namespace of our kernels, and of our operators
SMALL = Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=512, batch=64)
LARGE = Shape((3, 256, 256), n_levels=6, n_steps=32, hidden=512, batch=2)
COLUMNS = ("ms", "kernels ms", "launches", "ours", "peak MB")


def clock(function: Callable[[], object], device: torch.device) -> float:
    """The median milliseconds of a call that has run before."""
    turns = Turns({"": function}, device)
    return 1e3 * statistics.median(turns.round(number)[""][0] for number in range(ROUNDS))


def launched(function: Callable[[], object], device: torch.device) -> Row:
    """Count what a call launches, how much of that is ours, and how many milliseconds it takes together.

    Raises:
        RuntimeError: the profiler saw nothing on the GPU.
    """
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
    milliseconds = sum(e.time_range.elapsed_us() for e in chosen) / 1e3
    return {"launches": len(chosen), "ours": sum(MARK in e.name for e in chosen), "kernels ms": milliseconds}


class Answers:
    """The questions of a device, for models of two shapes."""

    def __init__(self, device: torch.device, small: Shape, large: Shape) -> None:
        self.device, self.small, self.large = device, small, large
        self.on_gpu = device.type == "cuda"
        self._built: tuple[Shape, Any] | None = None  # one model at a time

    def questions(self) -> Iterator[Question]:
        """All of them, in their order."""
        layouts = (torch.contiguous_format, torch.channels_last)
        for precision, layout, fused in itertools.product(("tf32", "bf16"), layouts, (False, True)):
            if self.on_gpu or not fused:
                name = f"net: {precision}, {str(layout).removeprefix('torch.')}{', fused relu' * fused}"
                yield name, functools.partial(self.net, precision, layout, fused)
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

    def net(self, precision: str, layout: torch.memory_format, fused: bool) -> Row:
        """Forward of a net, and with plain relus its backward too."""
        shape, hidden = self.small, self.small.hidden
        channels, size = shape.widths()[0] // 2, shape.image[1] // 2
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        net: Any = ThreeConvolutions(channels, 2 * channels, hidden)
        wake(net.to(self.device, dtype, memory_format=layout))
        x = torch.randn(shape.batch, channels, size, size, device=self.device, dtype=dtype).to(memory_format=layout)

        def forward() -> Tensor:
            h = x
            for layer in (net[0], net[2]):
                if fused:
                    pads = layer.stride, layer.padding, layer.dilation, layer.groups
                    h = torch.cudnn_convolution_relu(h, layer.weight, layer.bias, *pads)
                else:
                    h = layer(h).relu_()
            out: Tensor = net[4](h)
            return out

        def backward() -> object:
            return torch.autograd.grad(forward().sum(), list(net.parameters()))

        with torch.backends.cudnn.flags(allow_tf32=True):
            with torch.no_grad():
                forward()
                row: Row = {"ms": clock(forward, self.device), **launched(forward, self.device), "note": "forward"}
            if not fused:
                backward()
                row["note"] += f"; with backward {clock(backward, self.device):.3f} ms"
        return row

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

        replayed = graphed(model)
        step = functools.partial(replayed, x) if graph else eager
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(2 * WARM_UPS if self.on_gpu else 1):  # in which the anchors' spacing adapts
            step()
        row: Row = {"shape": shape.title, "ms": clock(step, self.device), **launched(step, self.device)}
        if self.on_gpu:
            row["peak MB"] = torch.cuda.max_memory_allocated(self.device) / 1e6
        words = [replayed.how] if graph else []
        if memory == "reversible":
            words.append(f"anchors every {[report['anchor_every'] for report in model.memory_report()]}")
        return row | {"note": "; ".join(words)}

    def updates(self, memory: str) -> Row:
        """The time of an update, and how far the weights are from those of eager ones, after some that are eager."""
        shape = self.small
        pixels = torch.randint(256, (2 * shape.batch, *shape.image), dtype=torch.uint8)
        channels, height, width = shape.image
        image, steps, hidden = (channels, height, width), min(shape.n_steps, 8), min(shape.hidden, 128)
        weights, milliseconds, how = {}, {}, {}
        for graph in ("auto", "off"):
            config = TrainConfig(
                data=DataConfig("digits", held_out=0.4),
                model=GlowConfig(image, shape.n_levels, steps, hidden),
                memory=memory,
                graph=graph,
                batch_size=shape.batch,
                device=self.device.type,
                precision="fp32",
            )
            state = TrainState(config, ImageSet("random", pixels, 256))
            state.initialize()
            for _ in range(WARM_UPS + 1):
                state.step()
            start = time.perf_counter()
            for _ in range(UPDATES):
                state.step()
            milliseconds[graph] = 1e3 * (time.perf_counter() - start) / UPDATES
            state.close()
            weights[graph] = torch.cat([value.detach().flatten() for value in state.model.parameters()])
            how[graph] = state.update.replays.how
        apart = float((weights["auto"] - weights["off"]).abs().max())
        note = f"weights at most {apart:.1e} apart; eager {milliseconds['off']:.2f} ms; {how['auto']}"
        return {"ms": milliseconds["auto"], "note": note}

    def _gradients(self, memory: str, precision: str) -> list[Tensor]:
        shape = self.small.small()
        model = self._model(shape, precision, memory)
        loss = -model.log_prob(images(shape, self.device)).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def deterministic(self, memory: str) -> Row:
        """Two steps, and whether anything refuses."""
        torch.use_deterministic_algorithms(True)
        try:
            return _compared(*(self._gradients(memory, "fp32") for _ in range(2)))
        finally:
            torch.use_deterministic_algorithms(False)

    def poisoned(self, precision: str) -> Row:
        """A step in memory that held NaN."""
        clean = self._gradients("reversible", precision)
        held = []
        if self.on_gpu:
            free, _ = torch.cuda.mem_get_info(self.device)
            held.append(torch.full((free // 4 // 4,), float("nan"), device=self.device))
        held += [torch.full((2**k,), float("nan"), device=self.device) for k in range(22) for _ in range(8)]
        synchronize(self.device)
        held.clear()  # the allocator hands these out again
        return _compared(clean, self._gradients("reversible", precision))


def _compared(one: Sequence[Tensor], other: Sequence[Tensor]) -> Row:
    differ = sum(not torch.equal(*pair) for pair in zip(one, other, strict=True))
    bad = sum(not bool(tensor.isfinite().all()) for tensor in other)
    words = f"{differ} of {len(one)} tensors differ, {bad} are not finite"
    return {"failed": bool(differ or bad), "note": words if differ or bad else "the same bits"}


def groups(arguments: argparse.Namespace) -> Iterator[list[Question]]:
    """The questions, in one group."""
    small, large = (SMALL.quick(), SMALL.quick()) if arguments.quick else (SMALL, LARGE)
    yield list(Answers(arguments.device, small, large).questions())


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, and print and write what was found; the exit code is that of ``gpu_questions.run``.

    Args:
        argv: the options; those of the process if None.
    """
    options = stage_options("gpu_answers", "what is asked first")
    options.add_argument("--quick", action="store_true", help="tiny models: to see that it works")
    return run(options, argv, COLUMNS, groups)


if __name__ == "__main__":
    raise SystemExit(main())
