"""Costs of runs of FlowSteps in a training step, in bytes and work, from which a plan of memory is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyglow_fast import functional, ops
from pyglow_fast.coupling_nets.inputs import may_write
from pyglow_fast.coupling_nets.net_shape import NetShape
from pyglow_fast.coupling_nets.plan import plan_chunks
from pyglow_fast.coupling_nets.precision import in_precision
from pyglow_fast.coupling_nets.traits import TENSORS_PER_LAYER, bytes_per_position
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import FlowStep, couplings_of, map_bounds, map_bytes
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.reference import coupling_net_spec
from pyglow_fast.reversible.costs import (
    FOLD_KEPT,
    FOLD_VECTORS,
    SMALL,
    ChainPart,
    ChunkCost,
    CouplingCost,
    NetCost,
    RunCost,
)
from pyglow_fast.reversible.drift import DriftControl
from pyglow_fast.reversible.parts import Pass


def _wanted(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _bytes_of(net: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in net.parameters())


def _made(net: nn.Module, half: bool) -> int:
    """Bytes of weights that a run of a net makes of its parameters: with ActNorms, a border term, in 16 bits."""
    if half:
        return sum(parameter.numel() * 2 for parameter in net.parameters())
    if not isinstance(net, CouplingNet):
        return 0
    convs = [net.conv1.weight, net.conv2.weight, net.conv3.weight]
    if net.border:  # each with an input channel more, the second also an output
        wider = [weight.nbytes + weight[:, :1].nbytes for weight in convs]
        return sum(wider) + wider[1] // net.hidden
    norms = (net.norm1, net.norm2)
    scaled = zip(norms, convs[:2], strict=True)
    return sum(weight.nbytes + 4 * weight[:, 0].nbytes for norm, weight in scaled if not isinstance(norm, nn.Identity))


def _laid_out(net: NetShape, half: bool) -> int:
    """Bytes of weights that a run makes besides: with the gain multiplied in, and of nets on images channels-last."""
    if half or not isinstance(net, CouplingNet):  # what these make has the right form at once
        return 0
    own = net.dims == 2 and not net.border and isinstance(net.norm1, nn.Identity)
    return net.conv3.weight.nbytes + (net.conv1.weight.nbytes if own else 0)


def net_cost(
    coupling: Coupling, channels: int, samples: int, spatial: Sequence[int], cond_channels: int, like: Tensor
) -> NetCost:
    """The cost of a coupling's net in a training step.

    Args:
        coupling: with its net.
        channels: of the state as the coupling has it, with a checkerboard those of both halves.
        samples, spatial: of the state.
        cond_channels: 0 without a condition.
        like: an empty tensor of the state's dtype, device and number of dimensions.
    """
    net, board = coupling.net, coupling.board
    reads, each = coupling.reads(channels), like.element_size()
    positions, seen = samples * math.prod(spatial), 1 if board is None else 2  # positions that the net sees for each
    injects = isinstance(coupling, AffineInjector)
    out = 2 * channels if injects else reads * (2 if coupling.spec.coupling == "affine" else 1)
    net_out = out  # channels
    inputs, beside = (cond_channels, 0) if injects else (reads, cond_channels)
    params = _wanted(net)
    copied = seen * reads if board is not None else 0
    margin, inside, freed = 4 * SMALL, 0, 0
    with in_precision(coupling.precision, like):
        as_products = isinstance(net, NetShape) and functional.net_as_products(like)
        half = torch.is_autocast_enabled(like.device.type)
        size = 2 if half else each
        if isinstance(net, NetShape) and net.border:
            copied = seen * (inputs + beside + 1)
        if as_products and not injects:
            assert isinstance(net, NetShape)
            hidden = (2 * net.hidden + net.border) * size
            shape = torch.empty(samples, inputs, *_whole(spatial, seen), device="meta")
            codes, _, dilations = ops.chain_arguments(coupling_net_spec(net.dims))
            weights = [shape.new_empty(width, 1, *[kernel] * net.dims) for width, kernel in _layers(net)]
            margin = ops.kept_elements(shape, weights, codes, dilations) * size - seen * positions * hidden
            made = _made(net, False)
        elif isinstance(net, NetShape) and functional.net_as_convolutions(like):  # which keep their own input too
            given = 0 if net.border else inputs + beside
            hidden = (2 * net.hidden + net.border + given) * size
            inside = (2 * net.hidden + (given if half else 0)) * size
            freed = net.hidden * size if net.is_plain and not net.border else 0
            made = _made(net, half) + _laid_out(net, half)
        elif isinstance(net, NetShape):  # library convolutions, relus in place, and the output before its gain
            hidden = (2 * net.hidden + net.border) * size
            hidden += 0 if beside == 0 or net.border else (inputs + beside) * each
            inside, made = 3 * net.hidden * size, _made(net, half) + net.out_channels * net.hidden * 3**net.dims * size
        elif (stated := getattr(net, "kept_bytes", None)) is not None:
            hidden, margin, made, inside = stated((samples, inputs + beside, *_whole(spatial, seen)), like)
        else:
            hidden, inside = _estimated(net, inputs + beside, net_out, each)
            inside += max((blocked(*conv.weight.shape[:2]) * size for conv in _convolutions(net)), default=0)
            made = _made(net, half)
        if coupling.has_own_scale:  # computed by torch, which keeps s and log s
            hidden += out * each

    @cache
    def chunk_for(budget: str | int) -> ChunkCost:
        with in_precision(coupling.precision, like):
            shape = (samples, inputs, *spatial)
            plan = plan_chunks(
                net, shape, each, budget, device_type=like.device.type, cond_channels=beside, rows_each=seen
            )
        row = math.prod(spatial[1:])
        height = spatial[0] if spatial else 1
        taken = max((c.samples.stop - c.samples.start) * (c.taken.stop - c.taken.start) * row for c in plan.chunks)
        given = max((c.samples.stop - c.samples.start) * (c.rows.stop - c.rows.start) * row for c in plan.chunks)
        assert height or not taken
        return ChunkCost(taken, given, plan.whole, math.ceil(1000 * plan.work))

    return NetCost(
        positions=positions,
        hidden=seen * hidden,
        out=out * each,
        grad_read=reads * each,
        params=sum(parameter.nbytes for parameter in params),
        work=seen * positions * _multiply_adds(net),
        chunk_for=chunk_for,
        margin=margin,
        copied=copied * each,
        cloned=seen * (inputs + beside) * each if may_write(net) else 0,
        raw_out=0 if board is None else seen * out * each,
        grad_inside=seen * inside,
        grad_cond=seen * beside * each,
        freed=seen * freed,
        made=made,
        largest=max((parameter.nbytes for parameter in params), default=0),
    )


BLOCK = 16  # the library's float32 convolutions lay channels out in blocks of so many, the last one filled up


def blocked(*channels: int) -> int:
    """Count the numbers by position that the library's backward of a convolution takes, of its inputs and outputs."""
    return sum(-(-count // BLOCK) * BLOCK for count in channels)


def _convolutions(net: nn.Module) -> list[nn.modules.conv._ConvNd]:
    return [module for module in net.modules() if isinstance(module, nn.modules.conv._ConvNd)]


def _multiply_adds(net: nn.Module) -> int:
    """By position: of matrices and kernels, which have more numbers than outputs."""
    return sum(weight.numel() for weight in net.parameters() if weight.dim() > 1 and weight.numel() > len(weight))


def _estimated(net: nn.Module, inputs: int, outputs: int, element_size: int) -> tuple[int, int]:
    """By position, of what a net states or is estimated to take: what it keeps inside, and gradients of that.

    The output and its gradient are counted by themselves. A statement does not tell the two apart: then all is kept.
    """
    most = max(0, bytes_per_position(net, inputs, element_size) - 2 * outputs * element_size)
    if getattr(net, "bytes_per_position", None) is not None:
        return most, 0
    kept = most * 2 // TENSORS_PER_LAYER
    return kept, most - kept


def _whole(spatial: Sequence[int], seen: int) -> tuple[int, ...]:
    return (seen * spatial[0], *spatial[1:]) if spatial else ()


def _layers(net: NetShape) -> list[tuple[int, int]]:
    return [(net.hidden, 3), (net.hidden + net.border, 1), (net.out_channels, 3)]


def _parts(
    step_bytes: Sequence[int],
    bounds: Sequence[tuple[int, int]],
    state: int,
    positions: int,
    keeps_states: bool,
    like: Tensor,
    anchored: DriftControl,
) -> list[ChainPart]:
    """The parts in which consecutive couplings run when they are recomputed, with their first anchors.

    Args:
        step_bytes: of the parameters of their nets.
        bounds: of those whose maps are folded together.
        state: bytes of a state.
        positions: of that.
        keeps_states: whether all states are kept.
        like: a tensor of the device.
        anchored: tells where anchors lie.
    """
    control = None if keeps_states else anchored
    whole = Pass.of_couplings(control, step_bytes, [end for _, end in bounds], state, positions, like)
    groups = {first: own for own in bounds for first in range(*own)}
    found = []
    for part in whole.parts:
        group = groups[part.first]
        anchors = tuple(part.first + k for k in part.anchors)
        opens, closes = part.end == group[1], part.first == group[0]
        found.append(ChainPart(part.first, part.end, anchors, part.knows_start, opens, closes, group))
    return found


def run_cost(
    steps: Sequence[FlowStep],
    samples: int,
    spatial: Sequence[int],
    cond_channels: int = 0,
    anchor_every: str | int | None = "auto",
    squeezes: bool = False,
) -> RunCost:
    """The cost of steps of one width that run joined, from their shapes.

    Args:
        steps: as they come, initialised or not.
        samples: N.
        spatial: sizes of the state that the steps see (behind a squeeze, if there is one).
        cond_channels: of the condition, 0 for none.
        anchor_every: as of the run; where it is "auto" the anchors lie as they do in the first step.
        squeezes: the run's input is squeezed first.
    """
    couplings = couplings_of(steps)
    first = steps[0]
    bias = first.actnorm.bias
    like = bias.new_empty([0] * (2 + len(spatial)))
    on_board = bool(couplings) and couplings[0].board is not None
    channels, sizes = first.channels, tuple(spatial)
    positions = math.prod(sizes)
    state = samples * channels * positions * bias.element_size()
    if on_board:
        channels, sizes, positions = 2 * channels, (sizes[0] // 2, *sizes[1:]), positions // 2
    known: dict[tuple[object, ...], NetCost] = {}

    def cost_of(coupling: Coupling) -> NetCost:
        net = coupling.net
        alike: tuple[object, ...] = (net,)
        if type(net) is CouplingNet:
            wanted = tuple((parameter.shape, parameter.requires_grad) for parameter in net.parameters())
            alike = (wanted, net.is_plain, net.border)
        key = (type(coupling), coupling.spec.coupling, coupling.precision, coupling.board is None, *alike)
        if key not in known:
            known[key] = net_cost(coupling, channels, samples, sizes, cond_channels, like)
        return known[key]

    found: list[CouplingCost] = []
    places = [(0, 0)]
    waiting = 0
    for k, step in enumerate(steps):
        waiting += map_bytes(step)
        for coupling in step.couplings:
            found.append(CouplingCost(cost_of(coupling), waiting, channels * bias.element_size()))
            waiting = 0
        if step.couplings:
            places.append((k + 1, len(found)))
    places[-1] = (len(steps), len(found))
    units = {at: unit for unit, (_, at) in enumerate(places)}
    step_bytes = [_bytes_of(coupling.net) for coupling in couplings]
    sizes_of_maps = [sum(part.matrix for part in found[start:end]) for (_, start), (_, end) in pairwise(places)]
    control = DriftControl(len(couplings), anchor_every)

    def parts(begin: int, end: int, keeps_states: bool) -> list[ChainPart]:
        first, last = units[begin], units[end]
        groups = map_bounds(sizes_of_maps[first:last], range(1, last - first + 1), like)
        bounds = [(places[first + a][1] - begin, places[first + b][1] - begin) for a, b in groups]
        return _parts(step_bytes[begin:end], bounds, state, positions, keeps_states, like, control)

    entry = state if on_board else 0
    squeezed = state if squeezes and (len(sizes) != 2 or not ops.run_on(like)) else 0
    witness = samples * channels * bias.element_size()
    return RunCost(
        tuple(found),
        state,
        witness,
        tuple(places),
        cache(parts),
        entry=entry,
        squeezed=squeezed,
        keeps_states=control.checkpoints,
    )


def given_run_cost(
    couplings: Sequence[Coupling],
    matrices: Sequence[int],
    shape: Sequence[int],
    like: Tensor,
    cond_channels: int = 0,
    anchor_every: str | int | None = "auto",
    behind: bool = False,
) -> RunCost:
    """The cost of couplings that run joined with channel maps which someone else makes before the run.

    Args:
        couplings: as they come, without checkerboards.
        matrices: bytes of the matrix of the map before each, of a gather those of its scales.
        shape: of the state, (N, C, *spatial).
        like: an empty tensor of the state's dtype, device and number of dimensions.
        cond_channels: of the condition, 0 for none.
        anchor_every: as of the run.
        behind: a channel map follows the last coupling.
    """
    samples, channels, *spatial = shape
    vector = channels * like.element_size()
    net = cache(lambda coupling: net_cost(coupling, channels, samples, spatial, cond_channels, like))
    found = [CouplingCost(net(part), size, vector) for part, size in zip(couplings, matrices, strict=True)]
    control, count = DriftControl(len(couplings), anchor_every), len(couplings)
    positions = math.prod(spatial)
    state = samples * positions * vector

    step_bytes = [_bytes_of(coupling.net) for coupling in couplings]

    def parts(begin: int, end: int, keeps_states: bool) -> list[ChainPart]:
        return _parts(step_bytes[begin:end], [(0, end - begin)], state, positions, keeps_states, like, control)

    # Autograd keeps as much of the making of these maps as of those that a FlowStep folds, and the maps stacked in one.
    kept = (FOLD_KEPT + 1) * sum(matrices) + (FOLD_VECTORS + 1) * vector * count
    places = tuple((k, k) for k in range(count + 1))
    last = state + (FOLD_KEPT * matrices[-1] + FOLD_VECTORS * vector) if behind else 0
    witness = samples * vector
    return RunCost(
        tuple(found),
        state,
        witness,
        places,
        cache(parts),
        first_entry=kept,
        behind=last,
        given=True,
        keeps_states=control.checkpoints,
    )
