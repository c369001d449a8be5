"""The one chooser: it looks once at a run and a call, and has csrc/run compute it, or Python over the registered ops.

csrc/run computes runs whose nets are all chains of convolutions that kernels compute, where nothing watches the call.
Python computes all else: nets of the user's, hooks, subclasses, masked runs, scale maps that are callables, and what
torch.compile, torch.func and exports see.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyglow_fast import functional
from pyglow_fast._core import backend, float32
from pyglow_fast._core.backend import require
from pyglow_fast._core.dry import device_of, is_dry
from pyglow_fast._core.errors import expect
from pyglow_fast._core.float32 import has_tf32
from pyglow_fast._core.tracing import is_watched, kernels_step_aside
from pyglow_fast.functional import ops
from pyglow_fast.nets.chain import Chain
from pyglow_fast.nets.precision import dtype_on, in_precision, override
from pyglow_fast.runs.compiled import CompiledRun, folded_maps, run_plain, run_recorded
from pyglow_fast.runs.description import NetCoupling, Run
from pyglow_fast.runs.drift import DriftControl, lowest_of
from pyglow_fast.runs.maps import FACTORS, ChannelMap, Map
from pyglow_fast.runs.planner import NotCompiledError
from pyglow_fast.runs.python import in_turn, recomputed
from pyglow_fast.runs.python_steps import CouplingStep, ModuleStep, results

# (name, make) -> what was made of the parameters under that name: the maps of the couplings, their inverses, and the
# inverses of those and of what is behind, if they are known without being asked for.
Made = Callable[[str, Callable[[], Sequence[Tensor]]], Sequence[Tensor]]
MAPS, INVERSES, KNOWN = "maps", "inverses", "known inverses"


# Where a GPU computes nets as matrix products over rows; elsewhere by convolutions, as float32 in full precision.
ROWS_IN = ("tf32", "bfloat16", "float16")


class _Computes(NamedTuple):
    """How nets of one precision are computed on a state."""

    way: str  # of csrc/run/net.h
    always: bool  # rows for all nets that can, not only where they pay
    channels_last: bool
    narrow: torch.dtype | None  # None: as the state is
    lowest: torch.dtype


def _computes(precision: str, x: Tensor) -> _Computes | None:
    """Choose how csrc/run computes nets of this precision on x; None where it cannot."""
    with in_precision(precision, x):
        if functional.net_by_kernels(x):
            half = torch.bfloat16 if functional.net_in_half(x) else None
            return _Computes("kernels", False, False, half, lowest_of(x.dtype, half or x.dtype))
        if not functional.net_by_library(x):
            return None
        dtype, choice, on_gpu = dtype_on(x), backend.nets(), device_of(x).type == "cuda"
        own, may_round = dtype == x.dtype, has_tf32(x)
        products = may_round and float32.rounds(float32.PRODUCTS, x)
        convolutions = may_round and float32.rounds(float32.CONVOLUTIONS, x)
        named = "tf32" if own and products else str(dtype).removeprefix("torch.")
        rows = choice == "rows" or (choice == "auto" and on_gpu and named in ROWS_IN)
        rounds = convolutions or (rows and products)  # TF32 has as many bits as float16
        lowest = lowest_of(x.dtype, dtype, torch.float16 if rounds else dtype)
        # cuDNN's kernels for tensor cores take channels as neighbours, its others do not.
        channels_last = rows or not on_gpu or convolutions or not own
        way = "rows" if rows else "convolutions"
        return _Computes(way, choice == "rows", channels_last, None if own else dtype, lowest)


@functools.lru_cache(256)
def _forms_for(*settings: object) -> dict[tuple[object, ...], Any]:
    """Couplings and their nets as csrc/run takes them, by all that decides that: shapes and settings, and no values."""
    return {}


def _made(
    coupling: NetCoupling,
    chain: Chain,
    state: Sequence[int],
    x: Tensor,
    cond: Tensor | None,
    how: _Computes,
    budget: str | int,
    inverse: bool,
) -> Any:
    """The coupling and its net for states of a shape, in the form that csrc/run takes; refuses what the net does."""
    injects, board = coupling.injects, coupling.board
    like = x.new_empty(()).expand(state)
    seen = like[:, : coupling.kept] if board is None else board.shaped(like[:, : coupling.kept], None)[0]
    coupling.check_output(seen, (seen.shape[0], chain.last_weight.shape[0], *seen.shape[2:]))
    with in_precision(coupling.precision, x):
        plan = coupling.plan(*coupling.inputs(like, cond), budget)
    chunks = [] if plan[0].whole else [require().Chunk(**chunk.numbers) for chunk in plan]
    activations, parameters, dilations = ops.chain_arguments(chain.spec)
    own, way = chain.outputs, how.way
    if way == "rows" and not how.always and _patches_outweigh(chain):
        way = "convolutions"
    form = require().NetForm(
        activations=activations,
        dilations=dilations,
        parameters=parameters,
        powers=chain.powers,
        way=require().Way[way],
        channels_last=how.channels_last,
        narrow=how.narrow,
        takes_state=not injects,
        takes_cond=cond is not None and not injects,
        parity=None if board is None else board.parity,
        chunks=chunks,
        outputs=require().Outputs(in_turn=own.in_turn, signs=own.signs, caps=own.caps),
    )
    names = ("map", "order", "inverse", "bias", "eps", "clamp", "factor")
    arguments = ops.coupling_arguments(coupling.spec, inverse)
    kind = require().Kind(**dict(zip(names, arguments, strict=True)))
    return require().Step(kind=kind, net=form, reads=coupling.kept)


def _patches_outweigh(chain: Chain) -> bool:
    """Tell whether patches and taps, which rows add, outweigh the hidden layers: of wide ends, and in 3-d."""
    first, last = chain.tensors[0].shape, chain.last_weight.shape
    return first[1:].numel() + last[0] * last[2:].numel() > first[0] + last[1]


def _compiled(run: Run, x: Tensor, cond: Tensor | None, budget: str | int) -> CompiledRun | None:
    """The run, of one coupling at least, in the form that csrc/run takes, or None where it does not compute it.

    x is_runnable, and has entered the run's frame but for what that squeezes. cond has its dtype.
    """
    state, given = tuple(x.shape), None if cond is None else (cond.shape, cond.device)
    if run.frame.squeezes:
        n, channels, *spatial = x.shape
        state = (n, channels * 2 ** len(spatial), *(size // 2 for size in spatial))
    on_cpu = device_of(x).type == "cpu"
    forms: list[Any] = []
    nets: list[Tensor] = []
    ways: dict[str, tuple[_Computes, dict[tuple[object, ...], Any]]] = {}
    for coupling in run.couplings:
        chain = _chain_of(coupling, x) if on_cpu or coupling.board is None else None
        if chain is None or callable(coupling.spec.scale_map):
            return None
        if coupling.precision not in ways:
            how = _computes(coupling.precision, x)
            if how is None or (ways and has_tf32(x)):  # settings of the process decide, one for all
                return None
            ways[coupling.precision] = (
                how,
                _forms_for(state, x.dtype, device_of(x).type, given, how, budget, run.inverse),
            )
        how, known = ways[coupling.precision]
        net: Any = coupling.net
        first, last = chain.tensors[0].shape, chain.tensors[-2 if chain.powers[-1] == 0 else -3].shape
        settings = (coupling.spec, coupling.kept, coupling.changed, chain.spec, chain.powers, chain.outputs)
        key = (*settings, first, last, net.cond_channels if coupling.kept else 0, coupling.board)
        form = known.get(key)
        if form is None:
            if not ops.has_kernel(coupling.spec):
                return None
            form = known[key] = _made(coupling, chain, state, x, cond, how, budget, run.inverse)
        forms.append(form)
        nets += chain.tensors
    lowest = lowest_of(*(how.lowest for how, _ in ways.values()))
    return CompiledRun(run, forms, nets, lowest, next(iter(ways)))


def _chain_of(coupling: NetCoupling, x: Tensor) -> Chain | None:
    """The coupling's net as a chain of tensors of x's dtype and device; None where csrc/run, which halves, does not."""
    net: Any = coupling.net
    if not hasattr(net, "chain") or coupling.kept not in (0, coupling.changed):
        return None
    chain: Chain | None = net.chain(x)
    if chain is None or chain.tensors[0].device != x.device:
        return None
    dtype = x.dtype
    for part in chain.tensors:
        if part.dtype is not dtype:
            return None
    return chain


def _entered(
    run: Run, x: Tensor, cond: Tensor | None, budget: str | int, compiled: bool
) -> tuple[CompiledRun | None, Tensor, Tensor | None]:
    """The run for csrc/run, or None; with x and cond as the executors take them."""
    frame = run.frame
    runs = (
        compiled
        and len(run.couplings) > 0
        and any(run.maps)
        and not (frame.masked or run.inverted)
        and ops.is_runnable(x)
    )
    if not runs:
        return None, *frame.enter(x, cond)
    expect(cond is None or isinstance(cond, Tensor), "cond", "a Tensor or None", type(cond).__name__)
    reads = frame.squeezes and x.dim() == 4 and frame.first is None  # kernels squeeze these as they read them
    if not reads:
        x, cond = frame.enter(x, cond)
        run = run.changed(frame=frame.squeezed()) if frame.squeezes else run
    narrow = None if cond is None else cond.to(x.dtype)
    found = _compiled(run, x, narrow, budget)
    if found is None:
        return None, *(frame.enter(x, cond) if reads else (x, cond))
    return found, x, narrow


def through(
    run: Run,
    x: Tensor,
    cond: Tensor | None = None,
    *,
    mode: str = "store",
    budget: str | int = "auto",
    control: DriftControl | None = None,
    made: Made = lambda name, make: make(),
    whole: bool = False,
    alone: bool = False,
) -> tuple[Tensor, Tensor]:
    """Map x to z and log_det (N,), the way that the run goes.

    Args:
        run: what happens to x; a run that is turned maps latents to data.
        x: (N, C, *spatial); where the run's frame squeezes (N, C / 2^d, *(2 spatial)).
        cond: of the nets, or None.
        mode: "store", "checkpoint" or "reversible": what is kept where a backward may follow.
        budget: bytes of one net's activations, or "auto".
        control: of the drift, in mode "reversible".
        made: gives what inference makes of the parameters, where it is at hand.
        whole: nets that Python runs are not cut into chunks in mode "store".
        alone: the run is one step, whose nets are whole. Python is faster in its training but with maps by LU factors.
    """
    if (precision := override()) is not None:  # which a backward is to repeat
        run = run.changed(couplings=[coupling._replace(precision=precision) for coupling in run.couplings])
    if run.inverted and mode != "store" and _records(run, x, cond):
        run = run.of_own_inverses()
    compiled = not (alone and torch.is_grad_enabled()) or (
        run.frame.first is None and [[one.kind for one in own] for own in run.maps] == [[FACTORS]]
    )
    # Each run that recomputes has a map.
    if run.couplings and not any(run.maps) and (mode != "store" or ops.is_runnable(x)):
        nothing = ChannelMap.nothing(x.new_zeros(run.couplings[0].kept + run.couplings[0].changed))
        run = run.changed(maps=[[Map.of(nothing)], *run.maps[1:]])
    found, x, cond = _entered(run, x, cond, budget, compiled)
    if found is None and run.couplings and is_dry(x):
        raise NotCompiledError
    control, records = control if mode == "reversible" else None, _records(run, x, cond, found and found.nets)
    again = found is None and mode != "store" and len(run.couplings) > 0 and not kernels_step_aside() and records
    ends = run.ends if run.behind and (found is not None or again) else None
    gained: Tensor | None = None
    if ends is not None and run.inverse:
        x, gained = in_turn(ends, x, cond)
    if found is not None and records:
        x, log_det = run_recorded(found, mode, control, x, cond)
    elif found is not None:
        maps = made(INVERSES if run.inverse else MAPS, lambda: folded_maps(found))
        x, log_det = run_plain(found, x, cond, maps)
    elif again:
        x, log_det = recomputed([CouplingStep(own, run, budget) for own in run.couplings], control, x, cond, run)
    else:
        known = made(KNOWN, lambda: ()) if run.inverse else ()
        whole = whole or alone or torch.is_grad_enabled() or is_watched()  # a net that may be recorded runs whole
        x, log_det = in_turn(run, x, cond, None if whole else budget, known)
    if ends is not None and not run.inverse:
        x, gained = in_turn(ends, x, cond)
    log_det = log_det if gained is None else log_det + gained
    return run.frame.leave(x), log_det


def _records(run: Run, x: Tensor, cond: Tensor | None, nets: Sequence[Tensor] | None = None) -> bool:
    """Tell whether autograd asks for a backward; ``nets``: the tensors of the nets, where they are at hand."""
    if not torch.is_grad_enabled():
        return False
    nets = run.parameters() if nets is None else nets
    maps = [tensor for own in (*run.maps, run.behind) for one in own for tensor in one.tensors]
    asked = [tensor is not None and tensor.requires_grad for tensor in (x, cond, *nets, *maps)]
    return any(asked)


def folded(run: Run) -> ChannelMap:
    """Fold the maps of a run, behind the last coupling too, stacked."""
    raw, folding = run.folding()
    return ChannelMap(*folding(raw))


def through_modules(
    modules: Sequence[Any],
    x: Tensor,
    cond: Tensor | None,
    mode: str,
    control: DriftControl | None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Map x to z and log_det (N,) through any modules that have forward and inverse; arguments as of :func:`through`.

    There is no log_det of modules that give z alone. ``inverse``: by what undoes each, from the last to the first.
    """
    if is_dry(x):
        raise NotCompiledError
    numbered = [(f"steps[{k}]", module) for k, module in enumerate(modules)][:: -1 if inverse else 1]
    own = [parameter for module in modules for parameter in module.parameters()]
    asked = [tensor is not None and tensor.requires_grad for tensor in (x, cond, *own)]
    if mode != "store" and torch.is_grad_enabled() and any(asked) and not kernels_step_aside():
        again = [ModuleStep(module, name, inverse) for name, module in numbered]
        x, log_det = recomputed(again, control if mode == "reversible" else None, x, cond)
        given = [step.has_log_det for step in again]
    else:
        log_det, given = x.new_zeros(x.shape[0]), []
        for name, module in numbered:
            run = module.inverse if inverse else module
            x, gained = results(run(x) if cond is None else run(x, cond), len(x), name, inverse)
            given.append(gained is not None)
            log_det = log_det if gained is None else log_det + gained
    expect(len({*given}) == 1, "steps", "a log_det from all of them, or from none", given)
    return x, log_det if given[0] else None
