"""Describes flow steps for the run of csrc/run, or says that it does not compute them.

This is the one place that chooses between the two paths: the run, for steps that the compiled kernels compute whole,
and Python over the registered ops (flow_step.py, reversible/) for all else: nets of the user's, hooks, subclasses,
scale maps that are callables, and whatever watches calls, such as torch.compile and torch.func.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from pyglow_fast import functional, ops
from pyglow_fast._backend import require
from pyglow_fast._dry import device_of
from pyglow_fast._float32 import has_tf32
from pyglow_fast._tracing import is_watched
from pyglow_fast.coupling_nets.chain import Chain
from pyglow_fast.coupling_nets.net_runner import condition_for
from pyglow_fast.coupling_nets.plan import plan_chunks
from pyglow_fast.coupling_nets.precision import dtype_on, in_precision
from pyglow_fast.layers.actnorm import ActNorm
from pyglow_fast.layers.coupling import Coupling
from pyglow_fast.layers.flow_step import FlowStep, fold_in_one, map_bytes, raw_maps
from pyglow_fast.layers.injector import AffineInjector
from pyglow_fast.layers.permutation import InvConv
from pyglow_fast.reversible.drift import lowest_precision
from pyglow_fast.reversible.run import CONSTANTS, FACTORS, Fold, FoldByTorch, FoldFactors, Maps, Steps
from pyglow_fast.reversible.steps import ChannelMap


class ChainNet(Protocol):
    """A net that may be a chain, and states its width and what of a condition it reads."""

    in_channels: int
    cond_channels: int

    def chain(self, x: Tensor) -> Chain | None:
        """The net as a chain for states like x, None where it is none, or something else than its tensors decides."""


class _Computes(NamedTuple):
    """How nets of one precision are computed on a state."""

    products: bool
    narrow: str  # "bfloat16", "float16" or, as the state is, ""
    lowest: torch.dtype


def _computes(precision: str, x: Tensor) -> _Computes | None:
    """None where the run has no way to compute them."""
    with in_precision(precision, x):
        products = functional.net_as_products(x)
        if not products and not functional.net_as_convolutions(x):
            return None
        dtype = torch.bfloat16 if products and functional.net_in_half(x) else dtype_on(x)
        lowest = lowest_precision(x.dtype, x, [x.new_empty(0, 0, 0)] if has_tf32(x) else ())
        return _Computes(products, "" if dtype == x.dtype else str(dtype).removeprefix("torch."), lowest)


# Couplings and their nets as csrc/run takes them, by all that decides that: shapes and settings, and no values.
_forms: dict[tuple[object, ...], dict[tuple[object, ...], Any]] = {}
_REMEMBERED = 256  # shapes and settings


def _forms_for(*settings: object) -> dict[tuple[object, ...], Any]:
    found = _forms.get(settings)
    if found is None:
        if len(_forms) >= _REMEMBERED:
            _forms.clear()
        found = _forms[settings] = {}
    return found


def _made(
    coupling: Coupling,
    chain: Chain,
    state: Sequence[int],
    x: Tensor,
    how: _Computes,
    budget: str | int,
    cond_channels: int,
) -> Any:
    """The coupling and its net for states of a shape, in the form that csrc/run takes."""
    injects, board = isinstance(coupling, AffineInjector), coupling.board
    reads = coupling.reads(state[1])
    coupling.runner(budget).check_width(x.new_empty(()).expand(state[0], reads, *state[2:]), chain.last_weight.shape[0])
    inputs = (state[0], cast("ChainNet", coupling.net).in_channels if injects else reads, *state[2:])
    with in_precision(coupling.precision, x):
        plan = plan_chunks(
            coupling.net,
            inputs,
            x.element_size(),
            budget,
            device_type=device_of(x).type,
            cond_channels=cond_channels,
            rows_each=1 if board is None else 2,
        )
    chunks = [] if plan[0].whole else [chunk.numbers for chunk in plan]
    activations, parameters, dilations = ops.chain_arguments(chain.spec)
    form = require().NetForm(
        activations,
        parameters,
        dilations,
        chain.powers,
        how.products,
        how.narrow,
        not injects,
        cond_channels > 0,
        None if board is None else board.parity,
        chunks,
        chain.outputs.in_turn,
        chain.outputs.signs,
        chain.outputs.caps,
    )
    scale_map, order, _, *numbers = ops.coupling_arguments(coupling.spec, inverse=False)
    return require().Step(scale_map, order, *numbers, form, reads)


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
    state = _state_shape(x, squeezes)
    forms: list[Any] = []
    nets: list[Tensor] = []
    counts: list[int] = []
    nbytes: list[int] = []
    ways: dict[str, tuple[_Computes, dict[tuple[object, ...], Any]]] = {}
    for coupling in couplings:
        chain = chain_of(coupling, x)
        if chain is None:
            return None
        if coupling._precision not in ways:
            how = _computes(coupling._precision, x)
            if how is None or (ways and has_tf32(x)):  # settings of the process decide, one for all
                return None
            ways[coupling._precision] = how, _forms_for(state, x.dtype, device_of(x).type, how, budget)
        how, known = ways[coupling._precision]
        net: Any = coupling._modules["net"]
        injects = isinstance(coupling, AffineInjector)
        cond_channels = 0 if injects else net.cond_channels
        if cond is not None or cond_channels or injects:
            _check_condition(coupling, state, x, cond)
        first, last = chain.tensors[0].shape, chain.last_weight.shape
        settings = (coupling.spec, chain.spec, chain.powers, chain.outputs)
        key = (*settings, first, last, cond_channels, coupling.board, injects)
        form = known.get(key)
        if form is None:
            if not ops.has_kernel(coupling.spec):
                return None
            form = known[key] = _made(coupling, chain, state, x, how, budget, cond_channels)
        forms.append(form)
        nets += chain.tensors
        counts.append(len(chain.tensors))
        nbytes.append(chain.nbytes)
    lowest = max((how.lowest for how, _ in ways.values()), key=lambda dtype: torch.finfo(dtype).eps)
    return Steps(forms, nets, counts, nbytes, maps, lowest, next(iter(ways)))


class Entered(NamedTuple):
    """Couplings described for a run, with a state and a condition as the run takes them."""

    steps: Steps
    x: Tensor
    cond: Tensor | None
    squeezes: bool


def entered(
    couplings: Sequence[Coupling],
    maps: Maps,
    x: Tensor,
    cond: Tensor | None,
    squeezes: bool,
    budget: str | int,
    backwards: bool = False,
) -> Entered | None:
    """Bring x and cond into the form of a run, and describe the couplings for it, see :func:`described`.

    Args:
        couplings, maps, budget: as of :func:`described`.
        x: (N, C, *spatial), with squeezes (N, C / 2^d, *(2 spatial)).
        cond: of the nets, or None.
        squeezes: x is to be squeezed.
        backwards: x is the run's output.
    """
    if squeezes and (x.dim() != 4 or couplings[0].board is not None):  # the kernels do not squeeze these as they read
        x, squeezes = functional.squeeze(x), False
    x, cond = couplings[-1 if backwards else 0].enter(x, cond)
    cond = None if cond is None else cond.to(x.dtype)
    found = described(couplings, maps, x, cond, squeezes, budget)
    return None if found is None else Entered(found, x, cond, squeezes)


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


def _check_condition(coupling: Coupling, state: Sequence[int], x: Tensor, cond: Tensor | None) -> None:
    """Refuse a condition that the net does not take, in the words of the net."""
    net: Any = coupling.net
    injects = isinstance(coupling, AffineInjector)
    board = coupling.board
    seen = state if board is None else (state[0], state[1] // 2, 2 * state[2], *state[3:])
    if cond is None and (injects or net.cond_channels):
        pass
    elif injects:
        assert cond is not None
        if cond.shape == (seen[0], net.in_channels, *seen[2:]) and cond.device == x.device:
            return
    elif net.cond_channels == 0 and cond is None:
        return
    elif cond is not None and board is not None:
        return  # which has been checked as it was viewed by pairs of rows
    elif cond is not None and net.cond_channels and cond.shape == (seen[0], net.cond_channels, *seen[2:]):
        return
    like = x.new_empty(()).expand(seen[0], net.in_channels, *seen[2:])
    if injects:
        net.check_inputs(condition_for(like, cond), None)
    else:
        net.check_inputs(like, cond)


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
    *factors, permutations, signs = found
    return [tensor for some in factors for tensor in some], FoldFactors(permutations, signs)
