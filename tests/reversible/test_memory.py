"""What a run of steps keeps, counted in bytes: flat in depth but for its anchors, bounded in resolution."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.chain_cases import Mode

import pyglow_fast as pgf
from bench.memory_meter import MemoryMeter, peak_tensor_bytes

MiB = 2**20
STATE = 4 * 12 * 16 * 16 * 4  # bytes of a flow state of the level below: 4 samples, 12 channels, 16 x 16, float32


def level(depth: int, mode: Mode, channels: int = 12, hidden: int = 128, **options: object) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(channels, hidden, **options) for _ in range(depth)])
    for module in sequence.modules():
        if isinstance(module, pgf.ActNorm):
            module.initialized.fill_(True)
    mode.apply(sequence)
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)  # the gradients are no part of what is measured
    return sequence


def kept_bytes(depth: int, mode: Mode) -> int:
    """What is alive between forward and backward of a level at 3 x 32 x 32, beyond the parameters and x."""
    sequence, x = level(depth, mode), torch.randn(4, 12, 16, 16)
    with MemoryMeter() as meter:
        outputs = sequence(x)
        now = meter.now
    assert outputs[0].requires_grad
    return now


def peak_bytes(
    depth: int, mode: Mode, shape: tuple[int, ...] = (4, 12, 16, 16), hidden: int = 128, **options: object
) -> int:
    """Of a forward and backward, beyond the parameters, their accumulated gradients and x."""
    sequence, x = level(depth, mode, shape[1], hidden, **options), torch.randn(shape)

    def step() -> None:
        z, log_det = sequence(x)
        (z.square().sum() - log_det.sum()).backward()

    return peak_tensor_bytes(step)


def growth(measure: Callable[[int, Mode], int], mode: Mode) -> float:
    """Bytes per step."""
    return (measure(32, mode) - measure(8, mode)) / 24


# Per step: matrix, offset and what autograd keeps of their making (a few C x C, K of each), the witness (2 N C), and a
# torch random generator's state (5 kB) for nets that might draw.
PER_STEP = 8 * 12 * 12 * 4 + 2 * 4 * 12 * 4 + 6000


def test_kept_between_forward_and_backward() -> None:
    stored = growth(kept_bytes, Mode("store"))
    assert growth(kept_bytes, Mode("reversible", None)) <= PER_STEP
    assert growth(kept_bytes, Mode("reversible", None)) <= stored / 100
    assert growth(kept_bytes, Mode("reversible", 8)) <= PER_STEP + STATE / 8
    assert growth(kept_bytes, Mode("checkpoint")) <= PER_STEP + STATE
    assert stored > 4 * 2 * 128 * 16 * 16 * 4, "the hidden layers at least"


def test_peak_of_a_training_step() -> None:
    """The gradients of all parameters of a level are alive at its end, whatever the mode: those are set apart."""
    n_parameters = sum(parameter.numel() for parameter in level(1, Mode("store")).parameters())
    gradients = 4 * n_parameters
    stored = growth(peak_bytes, Mode("store"))
    reversible = growth(peak_bytes, Mode("reversible", None))
    assert reversible - gradients <= PER_STEP + 4 * 12 * 12 * 4
    assert reversible - gradients <= (stored - gradients) / 50


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_a_large_image_within_a_budget(memory: str) -> None:
    """64 x 64, hidden 64: each hidden layer of a step is 1 MiB, the budget a quarter of that."""
    shape, budget = (1, 4, 64, 64), MiB // 4
    state = 4 * 4 * 64 * 64
    mode = Mode(memory, None, budget)
    gradients = 4 * sum(parameter.numel() for parameter in level(4, mode, 4, 64).parameters())
    kept = 1 if memory == "reversible" else 4
    peak = peak_bytes(4, mode, shape, 64)
    # The chunk, all steps' gradients, z and what is kept, and while a step goes back: y, grad_y, x, grad_u, grad_x, the
    # net's output gradient and the gradient of the kept half.
    assert peak <= budget + gradients + (kept + 1 + 8) * state + 64 * 1024
    assert peak_bytes(4, Mode(memory, None, 2**40), shape, 64) > 2 * peak
    assert peak_bytes(4, Mode("store"), shape, 64) > 6 * peak


@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_checkerboards_within_a_budget(memory: str) -> None:
    """As above, of nets that run on whole images: each hidden layer of a step is 1 MiB."""
    shape, budget, mask = (1, 2, 64, 64), MiB // 4, {"mask": "checkerboard"}
    state = 4 * 2 * 64 * 64
    mode = Mode(memory, None, budget)
    gradients = 4 * sum(parameter.numel() for parameter in level(4, mode, 2, 64, **mask).parameters())
    kept = 1 if memory == "reversible" else 4
    peak = peak_bytes(4, mode, shape, 64, **mask)
    # Besides, x in halves.
    assert peak <= budget + gradients + (kept + 1 + 8 + 1) * state + 64 * 1024
    assert peak_bytes(4, Mode(memory, None, 2**40), shape, 64, **mask) > 2 * peak
    assert peak_bytes(4, Mode("store"), shape, 64, **mask) > 6 * peak


def test_checkerboards_keep_nothing_per_step() -> None:
    def kept(depth: int, mode: Mode) -> int:
        sequence, x = level(depth, mode, 3, 64, mask="checkerboard"), torch.randn(4, 3, 32, 32)
        with MemoryMeter() as meter:
            outputs = sequence(x)
            now = meter.now
        assert outputs[0].requires_grad
        return now

    assert growth(kept, Mode("reversible", None)) <= PER_STEP
    assert growth(kept, Mode("checkpoint")) <= PER_STEP + STATE
    assert growth(kept, Mode("store")) > 2 * 4 * 64 * 32 * 32 * 4, "the hidden layers"


def test_nothing_is_kept_after_the_backward() -> None:
    sequence, x = level(8, Mode("reversible", 2)), torch.randn(4, 12, 16, 16)
    with MemoryMeter() as meter:
        z, log_det = sequence(x)
        value = z.square().sum() - log_det.sum()
        del z, log_det
        value.backward()
        del value
        for parameter in sequence.parameters():
            parameter.grad = None
        assert meter.now <= 2 * 16 * 16 * 4 + 64, "but for the signs of the witnesses"
