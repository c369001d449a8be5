"""What one training step of a Glow costs, by formulas: arithmetic, memory, traffic and communication.

Functions of the model and its batch (bench.memory_models.Shape: L, K, hidden, resolution, N), the memory mode and the
number of ranks R; affine couplings, the LU form of the 1x1 convolutions, learned priors, float32. docs/scaling.md has
them in words, and the measurements that they are held against.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from bench.memory_models import Shape
from bench.model_cases import TRAIN, net_flops, net_products
from pyglow_fast import CouplingNet, GlowConfig
from pyglow_fast.coupling_nets import ChunkPlan, plan_chunks
from pyglow_fast.layers.flow_step import FOLDED_AT_ONCE
from pyglow_fast.reversible.drift import DriftControl
from pyglow_fast.reversible.parts import Pass, cut

FLOAT = 4  # bytes
# States that one step's backward has besides what is kept: the gradients of its input and output, and where these are
# recomputed they themselves.
WORKING_STATES = {"checkpoint": 2, "reversible": 4}
# C x C, per step: what autograd keeps of the folding in mode "store" (a stacked parameter, both factors, product, its
# rows permuted, folded map), and of the steps that are folded at one time in a backward that recomputes.
FOLDED_MATRICES = 6
OPTIMIZER_COPIES = 2  # of the parameters, both moments of Adam or Adamax


def states(shape: Shape) -> list[tuple[int, int]]:
    """(channels, positions of one image) of the flow state, level by level."""
    if not shape.squeezes:
        return [(shape.image[0], math.prod(shape.image[1:]))] * shape.n_levels
    found = GlowConfig(shape.image, shape.n_levels, shape.n_steps, shape.hidden).level_shapes()
    return [(channels, math.prod(spatial)) for channels, *spatial in found]


def state_bytes(shape: Shape) -> list[int]:
    """Compute the bytes of the state, S = 4 N C P, level by level."""
    return [FLOAT * shape.batch * channels * positions for channels, positions in states(shape)]


def net_parameters(channels: int, hidden: int) -> int:
    """9 (C/2) h + h + h^2 + h + 9 h C + C, and C log-gains."""
    return 9 * channels // 2 * hidden + hidden + hidden**2 + hidden + 9 * hidden * channels + 2 * channels


def level_parameters(shape: Shape) -> list[int]:
    """K (net + 2 C^2 + 3 C), and the split's prior 9 (C/2) C + 2 C or, of the top one, 2 C."""
    found = []
    for level, (channels, _) in enumerate(states(shape)):
        prior = 2 * channels + (9 * channels // 2 * channels if level + 1 < shape.n_levels else 0)
        step = net_parameters(channels, shape.hidden) + 2 * channels**2 + 3 * channels
        found.append(shape.n_steps * step + (prior if shape.squeezes else 0))
    return found


@functools.lru_cache(maxsize=256)
def chunk_plan(shape: Shape, level: int, device_type: str = "cpu") -> ChunkPlan:
    """How a net of that level is cut, within the default budget of the type of device."""
    channels, _ = states(shape)[level]
    # On the meta device the net is taken for one that runs library convolutions, as it does on a GPU.
    with torch.device("cpu" if device_type == "cpu" else "meta"):
        net = CouplingNet(channels // 2, channels, shape.hidden, dims=len(shape.image) - 1)
    side = [size // (2 ** (level + 1) if shape.squeezes else 1) for size in shape.image[1:]]
    return plan_chunks(net, (shape.batch, channels // 2, *side), FLOAT, device_type=device_type)


def multiply_adds(shape: Shape, mode: str, device_type: str = "cpu") -> list[int]:
    """Count the multiply-adds of a training step, level by level: nets (3 + r) w, flow and prior.

    A net's forward is N P (9 (C/2) h + h^2 + 9 h C); backward takes two more, and a mode that recomputes (r = 1) one
    more. w >= 1 is what strips with their halo compute twice. The 1x1 convolution is N P C^2, three times, and once
    more where it is inverted; a split's prior N P 9 (C/2) C, three times.
    """
    products, found = net_products(shape), []
    for level, (channels, positions) in enumerate(states(shape)):
        net = sum(rows * inner * columns for rows, inner, columns in products[3 * level : 3 * level + 3])
        net *= 3 if mode == "store" else 4
        work = 1.0 if mode == "store" else chunk_plan(shape, level, device_type).work
        where = shape.batch * positions
        flow = where * channels**2 * (4 if mode == "reversible" else 3)
        has_split = shape.squeezes and level + 1 < shape.n_levels
        prior = 3 * where * 9 * channels // 2 * channels if has_split else 0
        found.append(round(shape.n_steps * (net * work + flow)) + prior)
    return found


def folded_at_once(shape: Shape, level: int, device_type: str = "cpu") -> list[tuple[int, int]]:
    """Steps (first, one past the last) whose channel maps a level's backward folds together: on a GPU all of them."""
    channels, _ = states(shape)[level]
    if device_type != "cpu":
        return [(0, shape.n_steps)]
    return cut([FLOAT * channels**2] * shape.n_steps, range(1, shape.n_steps), FOLDED_AT_ONCE)


def n_parts(shape: Shape, level: int, device_type: str = "cpu") -> int:
    """Functions that a checkpointed level is cut into on a CPU, so that few gradients exist twice; each has a state."""
    if device_type != "cpu":
        return 1
    channels, positions = states(shape)[level]
    steps = [FLOAT * net_parameters(channels, shape.hidden)] * shape.n_steps
    ends = [end for _, end in folded_at_once(shape, level)]
    return len(Pass.of_couplings(None, steps, ends, state_bytes(shape)[level], positions, torch.empty(0)).parts)


def flops(shape: Shape, mode: str, device_type: str = "cpu") -> int:
    """Two for each multiply-add."""
    return 2 * sum(multiply_adds(shape, mode, device_type))


def net_share(shape: Shape) -> float:
    """Compute the share that the nets have of a stored step's arithmetic."""
    return net_flops(shape, TRAIN) / flops(shape, "store")


def traffic(shape: Shape, mode: str) -> int:
    """Bytes of flow state that a step moves outside its nets: K (3 + 5 + i) S, i = 3 where the step is inverted.

    Forward reads the state and the net's output and writes the next state; backward reads both and the gradient, and
    writes the gradients of both; the inversion reads two and writes one.
    """
    return shape.n_steps * sum(state_bytes(shape)) * (11 if mode == "reversible" else 8)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward at their peak, beyond parameters, their gradients and the images."""

    kept: int  # flow states that wait for the backward, and in mode "store" all activations of the nets
    chunk: int  # one net's activations
    working: int  # states that the backward of one step is at work on, and sums of its weights' gradients
    folded: int  # C x C matrices of all steps

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.kept + self.chunk + self.working + self.folded


def step_memory(shape: Shape, mode: str, device_type: str = "cpu", spacing: list[int] | None = None) -> Memory:
    """The largest over the levels, as the backward comes by: what lies above has been freed.

    - "store": all levels at once, K N P (2 h + 2 C) floats each: hidden layers, net output, state.
    - "checkpoint": K + 1 states of this level and of those below (on a CPU one more a part), one net's chunk.
    - "reversible": K / m states instead, anchors at every m-th step and the output, and N C floats a step to judge
      drift by.

    Args:
        shape, mode: model, batch and memory mode.
        device_type: "cpu" or "cuda", whose budgets and nets differ.
        spacing: m of each level; that of a run's beginning if None.
    """
    spacings = [DriftControl(shape.n_steps).first_spacing] * shape.n_levels if spacing is None else spacing
    sizes, folded, kept, found = state_bytes(shape), 0, 0, []
    for level, (channels, positions) in enumerate(states(shape)):
        weights, matrix = FLOAT * net_parameters(channels, shape.hidden), FLOAT * channels**2
        if mode == "store":
            folded += FOLDED_MATRICES * matrix * shape.n_steps
            kept += shape.n_steps * FLOAT * shape.batch * positions * (2 * shape.hidden + 2 * channels)
            found.append(Memory(kept, 0, 0, folded))
            continue
        if mode == "checkpoint":
            kept += (shape.n_steps + n_parts(shape, level, device_type)) * sizes[level]
        else:
            kept += math.ceil(shape.n_steps / spacings[level]) * sizes[level]
            kept += FLOAT * shape.batch * channels * shape.n_steps
        plan = chunk_plan(shape, level, device_type)
        # Gradients of parameters are not counted, but where chunks are summed those of one chunk exist beside the sum.
        working = WORKING_STATES[mode] * sizes[level] + (0 if plan.whole else weights)
        most = max(end - start for start, end in folded_at_once(shape, level, device_type))
        found.append(Memory(kept, plan.peak, working, FOLDED_MATRICES * matrix * most))
    return found[-1] if mode == "store" else max(found, key=lambda memory: memory.total)


def parameter_copies(ranks: int, average: bool = True) -> int:
    """Weights, gradients, the optimizer's moments, the average if any, and DistributedDataParallel's buckets."""
    return 2 + OPTIMIZER_COPIES + average + (ranks > 1)


def training_bytes(shape: Shape, mode: str, ranks: int, device_type: str = "cuda") -> int:
    """Sum up all that lives in the memory of one rank, with its N images, during a step."""
    parameters = FLOAT * sum(level_parameters(shape)) * parameter_copies(ranks)
    images = FLOAT * shape.batch * math.prod(shape.image)
    return parameters + images + step_memory(shape, mode, device_type).total


def largest_batch(shape: Shape, mode: str, ranks: int, limit: int) -> int:
    """The most images for which training_bytes is within the limit; 0 if not even one fits."""

    def fits(batch: int) -> bool:
        return training_bytes(dataclasses.replace(shape, batch=batch), mode, ranks) <= limit

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def all_reduced(gradient_bytes: float, ranks: int) -> float:
    """2 (R - 1) / R G: bytes that each rank sends, and receives, to have the sum of G bytes of all (ring)."""
    return 2 * (ranks - 1) / ranks * gradient_bytes


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of a step by assumed rates; ``exposed``: of the all-reduce, what the backward does not hide."""

    compute: float
    all_reduce: float
    exposed: float

    @property
    def total(self) -> float:
        """What a step takes."""
        return self.compute + self.exposed


def step_time(shape: Shape, mode: str, ranks: int, rate: float, bandwidth: float) -> StepTime:
    """T = max over levels l of (compute until the gradients of l are there + all-reduces of l and of those after it).

    A level hands its gradients out when its backward ends, the top one first, and they are reduced in that order while
    the backward goes on below. Never less than compute, nor than all all-reduces.

    Args:
        shape: of one rank's batch (weak scaling: the batch grows with R).
        mode: memory mode.
        ranks: R.
        rate: sustained FLOP/s of one rank, assumed.
        bandwidth: bytes/s that a rank sends in an all-reduce, assumed.
    """
    seconds = [2 * count / rate for count in multiply_adds(shape, mode, "cuda")]
    transfers = [all_reduced(FLOAT * count, ranks) / bandwidth for count in level_parameters(shape)]
    forward_share = 1 / (3 if mode == "store" else 4)
    done = sum(seconds) * forward_share  # the clock of the backward, and of the network
    sent = 0.0
    for backward, transfer in zip(reversed(seconds), reversed(transfers), strict=True):
        done += backward * (1 - forward_share)
        sent = max(sent, done) + transfer
    return StepTime(sum(seconds), sum(transfers), max(0.0, sent - sum(seconds)) if ranks > 1 else 0.0)
