"""The promise that the package is for: training memory that depth and resolution do not exhaust, and budgets that hold.

Where a test below fails, a training runs out of memory where the documentation says that it does not. Counted are bytes
of tensors (for budgets those of torch's allocator), so the numbers are the same on every machine and at any load.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from support.gradients import PLANS, Memory, both_ways_in_full

import pyglow_fast as pgf
from bench.memory_meter import AllocatorTrace, MemoryMeter, peak_tensor_bytes

KiB = 2**10
MiB = 2**20
N, C, HIDDEN = 4, 12, 64
STORED, CHECKPOINT = Memory("store"), Memory("checkpoint")
REVERSIBLE, WITHOUT_ANCHORS = Memory("reversible"), Memory("reversible", None)


def level(depth: int, memory: Memory, channels: int = C, hidden: int = HIDDEN, **options: Any) -> Any:
    """A run of steps whose gradients are there already, as from the second training step on."""
    steps = [pgf.FlowStep(channels, hidden, **options) for _ in range(depth)]
    sequence = memory.of(pgf.ReversibleSequence(steps)).eval()
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return sequence


def step(sequence: Any, x: torch.Tensor) -> None:
    z, log_det = sequence(x)
    (z.square().sum() - log_det.sum()).backward()


def peak_bytes(depth: int, memory: Memory, shape: tuple[int, ...], **options: Any) -> int:
    """The most that a forward and backward have at a time, beyond parameters, their accumulated gradients and x."""
    sequence, x = level(depth, memory, shape[1], **options), torch.randn(shape)
    return peak_tensor_bytes(lambda: step(sequence, x))


def kept_bytes(depth: int, memory: Memory, shape: tuple[int, ...], **options: Any) -> int:
    """What is alive between forward and backward, beyond parameters and x."""
    sequence, x = level(depth, memory, shape[1], **options), torch.randn(shape)
    with MemoryMeter() as meter:
        outputs = sequence(x)
        now = meter.now
    assert outputs[0].requires_grad
    return now


# What a step may keep whatever the resolution: a number for each sample and channel, four where parts meet; the ends of
# its map's making, a few C x C; how to repeat random numbers (5 kB), if nets might draw some.
PER_STEP = (1 + 4) * N * C * 4 + 8 * C * C * 4 + 6000


@pytest.mark.parametrize(
    ("mask", "side", "way"),
    [
        ("channels", 8, "forward"),
        ("channels", 16, "forward"),
        ("checkerboard", 8, "forward"),
        ("channels", 8, "inverse"),
    ],
    indirect=["way"],
)
def test_memory_is_flat_in_depth(side: int, mask: str, way: str) -> None:
    """Reversible: a step more costs next to nothing, at both resolutions; checkpoint: a state; store: its net."""
    shape, state = (N, C, side, side), N * C * side * side * 4
    nets = 2 * N * HIDDEN * side * side * 4 // (2 if mask == "checkerboard" else 1)
    gradients = 4 * sum(parameter.numel() for parameter in level(1, STORED, mask=mask).parameters())
    depths = (4, 8, 16)
    for measure, of_gradients in ((kept_bytes, 0), (peak_bytes, gradients)):
        # Where nets are recomputed, gradients of a part exist a second time until they are accumulated: these are set
        # apart. What is stored is freed before they are all there.
        growth = {}
        for memory in (STORED, CHECKPOINT, WITHOUT_ANCHORS):
            found = [measure(depth, memory, shape, mask=mask) for depth in depths]
            slopes = [(found[i + 1] - found[i]) / (depths[i + 1] - depths[i]) for i in (0, 1)]
            growth[memory] = min(slopes) if memory is STORED else max(slopes) - of_gradients
        assert growth[WITHOUT_ANCHORS] <= PER_STEP, measure
        assert growth[CHECKPOINT] <= PER_STEP + state, measure
        assert growth[STORED] >= nets, measure


@both_ways_in_full
def test_anchors_are_bounded() -> None:
    """By default some states are kept, to find drift: at most 12 of a level however deep it is."""
    shape, state = (N, C, 16, 16), N * C * 16 * 16 * 4
    for depth in (24, 48):
        anchors = kept_bytes(depth, REVERSIBLE, shape) - kept_bytes(depth, WITHOUT_ANCHORS, shape)
        assert 0 < anchors <= 12 * state + 4 * KiB


@both_ways_in_full
def test_nothing_is_kept_after_the_backward() -> None:
    """Else memory grows from training step to training step."""
    for memory in (STORED, CHECKPOINT, REVERSIBLE, WITHOUT_ANCHORS, Memory("reversible", 2, 1)):
        sequence, x = level(6, memory), torch.randn(2, C, 8, 8)
        step(sequence, x)
        gc.collect()
        with MemoryMeter() as meter:
            for _ in range(3):
                step(sequence, x)
            gc.collect()
            assert meter.now <= KiB, memory


@both_ways_in_full
@pytest.mark.parametrize(("mode", "mask"), [("checkpoint", "checkerboard"), ("reversible", "channels")])
def test_a_large_image_within_a_budget_of_the_nets(mode: str, mask: str) -> None:
    """Each hidden layer of a step is 1 MiB, the budget of a net's activations a quarter of that."""
    channels = 2 if mask == "checkerboard" else 4
    shape, budget = (1, channels, 64, 64), MiB // 4
    state = 4 * channels * 64 * 64
    gradients = 4 * sum(parameter.numel() for parameter in level(4, STORED, channels, mask=mask).parameters())
    kept = 1 if mode == "reversible" else 4
    peak = peak_bytes(4, Memory(mode, None, budget), shape, mask=mask)
    # The chunk, all steps' gradients, z and what is kept, and while a step goes back: y, grad_y, x, grad_u, grad_x, the
    # net's output gradient and the gradient of the kept half; of a checkerboard also x in halves.
    assert peak <= budget + gradients + (kept + 1 + 8 + 1) * state + 64 * KiB
    assert peak_bytes(4, Memory(mode, None, 2**40), shape, mask=mask) > 2 * peak
    assert peak_bytes(4, STORED, shape, mask=mask) > 6 * peak


def test_inference_needs_a_net_at_a_time() -> None:
    """Without gradients the peak grows with depth by no more than a copy of the parameters, whatever the mode."""
    of_parameters = 4 * sum(parameter.numel() for parameter in level(1, STORED).parameters())
    for memory in (STORED, REVERSIBLE):
        peaks = []
        for depth in (2, 8):
            sequence, x = level(depth, memory), torch.randn(N, C, 16, 16)
            with torch.no_grad():
                peaks.append(peak_tensor_bytes(lambda: sequence.inverse(sequence(x)[0])))  # noqa: B023
        assert peaks[1] - peaks[0] <= 6 * of_parameters


MODELS: dict[str, dict[str, Any]] = {
    "two levels": {"n_levels": 2, "n_steps": 4},
    "conditions": {"n_levels": 2, "n_steps": 3, "cond_channels": 3},
}


def measured(model: pgf.Glow, **inputs: torch.Tensor) -> int:
    """What torch's allocator gives out at most in a training step, beyond parameters, gradients and batch.

    The larger one of gradients that are there before, and of gradients that begin as None and are not counted.
    """
    peaks = []
    for held in (True, False):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if held else None
        gc.collect()
        with AllocatorTrace() as trace:
            (-model.log_prob(**inputs)).mean().backward()
        given = [] if held else [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        peaks.append(trace.peak_without(given))
    return max(peaks)


@pytest.mark.skipif(not PLANS, reason="bytes are planned by the compiled run")
@pytest.mark.parametrize("name", MODELS)
def test_budgets_of_bytes_are_never_exceeded(name: str) -> None:
    """Bytes 25, 50 and 75 % of the way from "reversible" to "store" hold, and the plan says what is taken."""
    model = pgf.Glow(image_shape=(3, 32, 32), hidden=128, **MODELS[name])
    inputs = {"x": torch.rand(8, 3, 32, 32) - 0.5}
    if "cond_channels" in MODELS[name]:
        inputs["cond"] = torch.randn(8, 3, 32, 32)
    model.initialize(**inputs)
    ends = []
    for mode in ("reversible", "store"):
        model.memory = mode
        (-model.log_prob(**inputs)).mean().backward()
        ends.append(measured(model, **inputs))
    low, high = ends
    assert low < 0.6 * high
    stored = []
    for share in (0.25, 0.5, 0.75):
        model.memory = budget = int(low + share * (high - low))
        (-model.log_prob(**inputs)).mean().backward()
        plan = model.memory_plan(8)
        assert plan is not None
        found = measured(model, **inputs)
        assert found <= plan.peak <= budget, share
        assert plan.peak <= 1.1 * found, f"{share}: planned {plan.peak}, measured {found}"
        stored.append(sum(report["stored"] for report in model.memory_report()))
    assert stored == sorted(stored), "more bytes never cost time"
