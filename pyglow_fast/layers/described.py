"""Describes flow steps for the run of csrc/run, or says that it does not compute them.

This is the one place that chooses between the two paths: the run, for steps that the compiled kernels compute whole,
and Python over the registered ops (flow_step.py, runs/) for all else: nets of the user's, hooks, subclasses,
scale maps that are callables, and whatever watches calls, such as torch.compile and torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyglow_fast import functional, ops
from pyglow_fast._backend import require
from pyglow_fast._dry import device_of
from pyglow_fast._float32 import has_tf32
from pyglow_fast._tracing import is_watched
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.flow_step import FlowStep, fold_in_one, map_bytes, raw_maps
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import InvConv
from pyglow_fast.nets.chain import Chain
from pyglow_fast.nets.precision import dtype_on, in_precision
from pyglow_fast.runs.drift import lowest_of, lowest_precision
from pyglow_fast.runs.run import CONSTANTS, FACTORS, Fold, FoldByTorch, FoldFactors, Maps, Steps
from pyglow_fast.runs.steps import ChannelMap


class _Computes(NamedTuple):
    """How nets of one precision are computed on a state."""

    products: bool
    narrow: torch.dtype | None  # None: as the state is
    lowest: torch.dtype


def _computes(precision: str, x: Tensor) -> _Computes | None:
    """None where the run has no way to compute them."""
    with in_precision(precision, x):
        products = functional.net_as_products(x)
        if not products and not functional.net_as_convolutions(x):
            return None
        dtype = torch.bfloat16 if products and functional.net_in_half(x) else dtype_on(x)
        lowest = lowest_precision(x.dtype, x, [x.new_empty(0, 0, 0)] if has_tf32(x) else ())
        return _Computes(products, None if dtype == x.dtype else dtype, lowest)


@functools.lru_cache(256)
def _forms_for(*settings: object) -> dict[tuple[object, ...], Any]:
    """Couplings and their nets as csrc/run takes them, by all that decides that: shapes and settings, and no values."""
    return {}


def _made(
    coupling: Coupling,
    chain: Chain,
    state: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    how: _Computes,
    budget: str | int,
) -> Any:
    """The coupling and its net for states of a shape, in the form that csrc/run takes; refuses what the net does."""
    injects, board, runner = isinstance(coupling, AffineInjector), coupling.board, coupling.runner(budget)
    reads = runner.reads(state[1])
    kept = x.new_empty(()).expand(state[0], reads, *state[2:])
    runner.check_width(kept, chain.last_weight.shape[0])
    with in_precision(coupling.precision, x):
        plan = runner.plan(*runner.inputs(kept, cond))
    chunks = [] if plan[0].whole else [require().Chunk(**chunk.numbers) for chunk in plan]
    activations, parameters, dilations = ops.chain_arguments(chain.spec)
    own = chain.outputs
    form = require().NetForm(
        activations=activations,
        dilations=dilations,
        parameters=parameters,
        powers=chain.powers,
        products=how.products,
        narrow=how.narrow,
        takes_state=not injects,
        takes_cond=cond is not None and not injects,
        parity=None if board is None else board.parity,
        chunks=chunks,
        outputs=require().Outputs(in_turn=own.in_turn, signs=own.signs, caps=own.caps),
    )
    names = ("map", "order", "inverse", "bias", "eps", "clamp", "factor")
    arguments = ops.coupling_arguments(coupling.spec, inverse=False)
    kind = require().Kind(**dict(zip(names, arguments, strict=True)))
    return require().Step(kind=kind, net=form, reads=reads)


def is_runnable(x: Tensor) -> bool:
    """Tells whether csrc/run may compute on x: kernels exist for x, and nothing watches the calls."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or is_watched():
        return False
    return ops.run_on(x) and torch._C._len_torch_dispatch_stack() == 0


def described(
    couplings: Sequence[Coupling], maps: Maps, x: Tensor, cond: Tensor | None, squeezes: bool, budget: str | int
) -> Steps | None:
    """Describe couplings, with a channel map before each, for a run on x, or None where they are none for it.

    Args:
        couplings: at least one, initialised, of one mask.
        maps: before them.
        x: is_runnable, (N, C, *spatial), as their ``enter`` gives it; with squeezes before it is squeezed.
        cond: of the nets, or None; in the dtype of x.
        squeezes: x is squeezed as it is read.
        budget: bytes of one net's activations, or "auto".

    Raises:
        ValueError: a condition that a net does not take.
    """
    state, given = _state_shape(x, squeezes), None if cond is None else (cond.shape, cond.device)
    forms: list[Any] = []
    nets: list[Tensor] = []
    ways: dict[str, tuple[_Computes, dict[tuple[object, ...], Any]]] = {}
    for coupling in couplings:
        chain = chain_of(coupling, x)
        if chain is None:
            return None
        if coupling._precision not in ways:
            how = _computes(coupling._precision, x)
            if how is None or (ways and has_tf32(x)):  # settings of the process decide, one for all
                return None
            ways[coupling._precision] = how, _forms_for(state, x.dtype, device_of(x).type, given, how, budget)
        how, known = ways[coupling._precision]
        net: Any = coupling._modules["net"]
        injects = isinstance(coupling, AffineInjector)
        first, last = chain.tensors[0].shape, chain.last_weight.shape
        settings = (coupling.spec, chain.spec, chain.powers, chain.outputs)
        key = (*settings, first, last, 0 if injects else net.cond_channels, coupling.board, injects)
        form = known.get(key)
        if form is None:
            if not ops.has_kernel(coupling.spec):
                return None
            form = known[key] = _made(coupling, chain, state, x, cond, how, budget)
        forms.append(form)
        nets += chain.tensors
    lowest = lowest_of(*(how.lowest for how, _ in ways.values()))
    return Steps(forms, nets, maps, lowest, next(iter(ways)))


def _state_shape(x: Tensor, squeezes: bool) -> tuple[int, ...]:
    if not squeezes:
        return tuple(x.shape)
    n, channels, *spatial = x.shape
    return (n, channels * 2 ** len(spatial), *(size // 2 for size in spatial))


def chain_of(coupling: Coupling, x: Tensor) -> Chain | None:
    """The coupling's net as a chain of tensors of x's dtype and device; None where the run does not compute it."""
    net: Any = coupling._modules["net"]
    if not hasattr(net, "chain"):
        return None
    if coupling.board is not None and device_of(x).type != "cpu":
        return None
    chain: Chain | None = net.chain(x)
    if chain is None or chain.tensors[0].device != x.device:
        return None
    dtype = x.dtype
    for part in chain.tensors:
        if part.dtype is not dtype:
            return None
    return chain


def maps_of(steps: Sequence[FlowStep], by_step: Sequence[Sequence[Coupling]], runnable: bool = True) -> Maps:
    """The channel maps before the couplings of steps, given these couplings; not the maps behind the last coupling.

    runnable: csrc/run may fold them, see :func:`is_runnable`.
    """
    counts = list(map(len, by_step))
    bounds = list(pairwise([0, *(k for k, count in enumerate(counts, 1) if count)]))
    ends = [end for end, count in zip(accumulate(counts), counts, strict=True) if count]

    def of(begin: int, end: int) -> tuple[Sequence[Tensor], Fold]:
        start, stop = bounds[begin][0], bounds[end - 1][1]
        own = steps[start:stop]
        found = _factors_of(own) if runnable else None
        if found is not None:
            return found
        raw, function = raw_maps(own, steps[start - 1] if start else None)
        return raw, FoldByTorch(function)

    longest = max(stop - start for start, stop in bounds)  # units are of one width
    return Maps(ends, longest * map_bytes(steps[0]), of)


def folded_steps(steps: Sequence[FlowStep]) -> ChannelMap:
    """The maps before the couplings of steps, and perhaps one behind the last, stacked; as csrc/run folds them."""
    found = _factors_of(steps) if is_runnable(steps[0].actnorm.bias) else None
    if found is None:
        return fold_in_one(steps)
    raw, fold = found
    return ChannelMap(*fold(raw))


def _factors_of(steps: Sequence[FlowStep]) -> tuple[Sequence[Tensor], Fold] | None:
    """The maps of steps each of which is an actnorm, a convolution in LU factors and one coupling of channels."""
    found: list[list[Tensor]] = [[] for _ in (*FACTORS, *CONSTANTS)]
    for step in steps:
        parts: dict[str, Any] = step._modules
        actnorm, layer, coupling = parts["actnorm"], parts["permutation"], parts.get("coupling")
        if type(actnorm) is not ActNorm or type(layer) is not InvConv or not layer.lu:
            return None
        if coupling is None or parts.get("injector") is not None or coupling.board is not None:
            return None
        held = {**actnorm._parameters, **layer._parameters, **layer._buffers}
        for name, tensors in zip((*FACTORS, *CONSTANTS), found, strict=True):
            tensor = held.get(name)
            if tensor is None:
                return None
            tensors.append(tensor)
    return [tensor for some in found for tensor in some], FoldFactors()
