"""What is asked first of a GPU: layouts and precisions of nets, steps eager and graphed, whether updates agree.

    python -m bench.gpu_answers [--device cuda] [--quick] [--seconds S] [--out FILE]

Questions, in this order; the file is written after every row, and no row begins after ``--seconds``:

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
are our operators and those that call no other, and nothing is captured.
"""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from bench.cases import has_kernels, stage_options
from bench.gpu_kernels import table
from bench.gpu_stages import NO_KERNELS, Budget
from bench.harness import machine, synchronize, write_json
from bench.model_cases import OURS, PLAIN, Shape, build, images, plain_levels
from pyglow_fast import graphed
from pyglow_fast.data import DataConfig, ImageSet
from pyglow_fast.models import GlowConfig
from pyglow_fast.models.replays import WARM_UPS
from pyglow_fast.train import TrainConfig, TrainState

ROUNDS, UPDATES = 5, 20
MARK = "pyglow"  # the namespace of our kernels, and of our operators
SMALL = Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=512, batch=64)
LARGE = Shape((3, 256, 256), n_levels=6, n_steps=32, hidden=512, batch=2)
QUICK = Shape((3, 16, 16), n_levels=3, n_steps=2, hidden=8, batch=2)
COLUMNS = ["question", "case", "ms", "kernels ms", "launches", "ours", "peak MB", "answer"]
Row = dict[str, Any]
Question = tuple[str, str, Callable[[], Row]]  # the question, the case, what answers it


def clock(function: Callable[[], object], device: torch.device) -> float:
    """The median milliseconds of a call that has run before."""
    seconds = []
    for _ in range(ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


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
        inside = {id(child) for e in events if MARK in e.name for child in e.cpu_children}
        kernels = [e for e in events if MARK in e.name and not any(MARK in child.name for child in e.cpu_children)]
        chosen = [*kernels, *(e for e in events if not (MARK in e.name or e.cpu_children or id(e) in inside))]
    milliseconds = sum(e.time_range.elapsed_us() for e in chosen) / 1e3
    return {"launches": len(chosen), "ours": sum(MARK in e.name for e in chosen), "kernels ms": milliseconds}


class Answers:
    """The questions of a device, for models of two shapes."""

    def __init__(self, device: torch.device, small: Shape, large: Shape) -> None:
        self.device, self.small, self.large = device, small, large
        self._built: tuple[Shape, Any] | None = None  # one model at a time

    def questions(self) -> list[Question]:
        """All of them, in their order."""
        found: list[Question] = []
        for precision, layout, fused in itertools.product(
            ("tf32", "bf16"),
            (torch.contiguous_format, torch.channels_last),
            (False, True) if self.device.type == "cuda" else (False,),
        ):
            name = f"{precision}, {str(layout).removeprefix('torch.')}{', fused relu' if fused else ''}"
            found.append(("nets", name, functools.partial(self.net, precision, layout, fused)))
        found += self._steps("steps", self.small, ("tf32", "bf16"))
        found += [("updates", memory, functools.partial(self.updates, memory)) for memory in ("store", "reversible")]
        found += [("deterministic", memory, functools.partial(self.deterministic, memory)) for memory in OURS]
        for precision in ("fp32", "bf16", "fp16"):
            found.append(("poisoned", precision, functools.partial(self.poisoned, precision)))
        return [*found, *self._steps("large", self.large, ("bf16",))]

    def _steps(self, name: str, shape: Shape, precisions: Sequence[str]) -> Iterator[Question]:
        for precision, memory in itertools.product(precisions, ("reversible", "store", "checkpoint", PLAIN)):
            for graph in (False,) if memory == PLAIN else (True, False):
                case = f"{precision}, {memory}, {'graphed' if graph else 'eager'}"
                yield name, case, functools.partial(self.step, shape, precision, memory, graph)

    def _model(self, shape: Shape, precision: str, memory: str = "store") -> Any:
        if self._built is None or self._built[0] != shape:
            self._built = None
            gc.collect()
            self._built = shape, build("store", shape, "auto", self.device)
        model: Any = self._built[1]
        model.memory, model.precision = memory, precision
        model.zero_grad(set_to_none=True)
        return model

    def net(self, precision: str, layout: torch.memory_format, fused: bool) -> Row:
        """Forward of a net, and with plain relus its backward too."""
        shape, hidden = self.small, self.small.hidden
        channels, size = shape.widths()[0] // 2, shape.image[1] // 2
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        layers = (
            nn.Conv2d(channels, hidden, 3, 1, 1),
            nn.Conv2d(hidden, hidden, 1),
            nn.Conv2d(hidden, 2 * channels, 3, 1, 1),
        )
        net = nn.Sequential(*layers).to(self.device, dtype, memory_format=layout)  # type: ignore[call-overload]
        x = torch.randn(shape.batch, channels, size, size, device=self.device, dtype=dtype).to(memory_format=layout)

        def run() -> Tensor:
            h = x
            for layer in layers[:2]:
                if fused:
                    pads = layer.stride, layer.padding, layer.dilation, layer.groups
                    h = torch.cudnn_convolution_relu(h, layer.weight, layer.bias, *pads)
                else:
                    h = layer(h).relu_()
            out: Tensor = layers[2](h)
            return out

        with torch.backends.cudnn.flags(allow_tf32=True), torch.set_grad_enabled(not fused):
            found = {"answer": "forward" if fused else "forward and backward"}
            once = run if fused else lambda: torch.autograd.grad(run().sum(), list(net.parameters()))
            once()
            found |= {"ms": clock(once, self.device), **launched(once, self.device)}
            if not fused:
                with torch.no_grad():
                    run()
                    found["answer"] = f"forward and backward; forward {clock(run, self.device):.3f} ms"
        return found

    def step(self, shape: Shape, precision: str, memory: str, graph: bool) -> Row:
        """A training step."""
        model, x = self._model(shape, precision, "store" if memory == PLAIN else memory), images(shape, self.device)
        how, on_gpu = "", self.device.type == "cuda"
        if memory == PLAIN:
            plain = plain_levels(model, PLAIN)

            def step() -> object:
                plain.zero_grad(set_to_none=True)
                bf16 = precision == "bf16"
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                    loss = -plain.log_prob(x).mean()
                loss.backward()
                return loss
        elif graph:
            replayed = graphed(model)
            step = functools.partial(replayed, x)
        else:

            def step() -> object:
                model.zero_grad(set_to_none=True)
                loss = -model.log_prob(x).mean()
                loss.backward()
                return loss

        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        for _ in range(2 * WARM_UPS if on_gpu else 1):  # in which the anchors' spacing adapts
            step()
        found: Row = {"ms": clock(step, self.device), **launched(step, self.device)}
        if on_gpu:
            found["peak MB"] = torch.cuda.max_memory_allocated(self.device) / 1e6
        if memory != PLAIN:
            reports = model.memory_report()
            how = (
                f"anchors every {[report.get('anchor_every') for report in reports]}" if memory == "reversible" else ""
            )
        return found | {"answer": f"{replayed.how}; {how}" if graph else how}

    def updates(self, memory: str) -> Row:
        """20 updates, after some that are eager anyway."""
        shape = self.small
        pixels = torch.randint(256, (2 * shape.batch, *shape.image), dtype=torch.uint8)
        data = ImageSet("random", pixels, 256)
        model = GlowConfig(
            (shape.image[0], *shape.image[1:]), shape.n_levels, min(shape.n_steps, 8), min(shape.hidden, 128)
        )  # type: ignore[arg-type]
        seconds, found = {}, {}
        for graph in ("auto", "off"):
            config = TrainConfig(
                data=DataConfig("digits", held_out=0.4),
                model=model,
                memory=memory,
                graph=graph,
                batch_size=shape.batch,
                device=self.device.type,
                precision="fp32",
            )
            state = TrainState(config, data)
            state.initialize()
            for _ in range(WARM_UPS + 1):
                state.step()
            start = time.perf_counter()
            for _ in range(UPDATES):
                state.step()
            seconds[graph] = (time.perf_counter() - start) / UPDATES
            state.close()
            found[graph] = (
                torch.cat([value.detach().flatten() for value in state.model.parameters()]),
                state.update.replays.how,
            )
        apart = float((found["auto"][0] - found["off"][0]).abs().max())
        answer = f"weights at most {apart:.1e} apart; eager {1e3 * seconds['off']:.2f} ms; {found['auto'][1]}"
        return {"ms": 1e3 * seconds["auto"], "answer": answer}

    def _gradients(self, memory: str, precision: str) -> list[Tensor]:
        shape = self.small.small()
        model = self._model(shape, precision, memory)
        loss = -model.log_prob(images(shape, self.device)).mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    def deterministic(self, memory: str) -> Row:
        """Two steps, and whether anything refuses."""
        torch.use_deterministic_algorithms(True)
        try:
            return {"answer": _compared(*(self._gradients(memory, "fp32") for _ in range(2)))}
        finally:
            torch.use_deterministic_algorithms(False)

    def poisoned(self, precision: str) -> Row:
        """A step in memory that held NaN."""
        clean = self._gradients("reversible", precision)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            held = [torch.full((free // 4 // 4,), float("nan"), device=self.device)]
        else:
            held = []
        held += [torch.full((2**k,), float("nan"), device=self.device) for k in range(22) for _ in range(8)]
        synchronize(self.device)
        held.clear()  # the allocator hands these out again
        return {"answer": _compared(clean, self._gradients("reversible", precision))}


def _compared(one: Sequence[Tensor], other: Sequence[Tensor]) -> str:
    differ = sum(not torch.equal(*pair) for pair in zip(one, other, strict=True))
    bad = sum(not bool(tensor.isfinite().all()) for tensor in other)
    return f"{differ} of {len(one)} tensors differ, {bad} are not finite" if differ or bad else "the same bits"


def cells(row: Row) -> list[object]:
    """A row's values."""
    values = [row.get(name, "-") for name in COLUMNS]
    return [f"{value:.3f}" if isinstance(value, float) else value for value in values]


def main(argv: Sequence[str] | None = None) -> int:
    """Answer, print the table, write the file after every row; 1 if a question has no answer, or a wrong one.

    Args:
        argv: the options; those of the process if None.
    """
    options = stage_options("gpu_answers", "what is asked first")
    options.add_argument("--quick", action="store_true", help="tiny models: to see that it works")
    arguments = options.parse_args(argv)
    device: torch.device = arguments.device
    if not has_kernels(device):
        return NO_KERNELS
    small, large = (QUICK, QUICK) if arguments.quick else (SMALL, LARGE)
    facts, found, budget = machine(device), list[Row](), Budget(arguments.seconds)
    for question, case, answer in budget.take(Answers(device, small, large).questions()):
        row: Row = {"question": question, "case": case}
        try:
            row |= answer()
        except (RuntimeError, ValueError) as error:  # out of memory is one, too
            row |= {"answer": f"none: {str(error).strip().splitlines()[0][:200]}", "failed": True}
        found.append(row)
        print(*cells(row), sep=", ", flush=True)
        if arguments.out is not None:
            write_json(arguments.out, facts, found, small=small.title, large=large.title)
    print(f"\n{table(COLUMNS, map(cells, found))}")
    return budget.code(int(any(row.get("failed") or "differ" in row["answer"] for row in found)))


if __name__ == "__main__":
    raise SystemExit(main())
