"""Makes a layer's forward run the elements that the layer holds: its class becomes one made of a row and its own class.

The object, its parameters, buffers, hooks, names and other methods stay, and it is still an instance of its own class,
whose forward runs wherever ours does not apply or does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyglow_fast._core.torch_private import has_global_hook
from pyglow_fast._core.tracing import is_watched
from pyglow_fast.interop.limits import within
from pyglow_fast.interop.table import Call, Element, Row, UnfitError, fitted, is_ready, untouched
from pyglow_fast.nets.masks import is_mask, log_scale_of_padding, masked_condition
from pyglow_fast.nets.state import holding
from pyglow_fast.runs.description import Run
from pyglow_fast.runs.maps import ChannelMap, Map, after
from pyglow_fast.runs.python import in_turn

STATES = (torch.float32, torch.float64)


class Adopted(nn.Module):
    """A base that is put before the class of an adopted layer."""

    _pgf_row: Row
    _pgf_theirs: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by row and class, which can be imported; what is made of them is made again."""
        state = {name: value for name, value in vars(self).items() if name not in ("_pgf_nets", "_pgf_log_scales")}
        return _blank, (self._pgf_row, self._pgf_theirs), state

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the flags again, which may be other tensors now: see is_ready of table.py."""
        super()._apply(*args, **kwargs)
        is_ready(self._pgf_row, self)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """Make a DataParallel's replica, which keeps nothing that is of the original's modules."""
        replica = cast(Any, super())._replicate_for_data_parallel()
        for name in ("_pgf_joined", "_pgf_nets"):
            vars(replica).pop(name, None)
        return replica


_made: dict[tuple[str, type[nn.Module]], type[Adopted]] = {}


def adopted_class(row: Row, theirs: type[nn.Module]) -> type[Adopted]:
    """Make the class, by the name of the layer's own, whose methods in the row's calls run the layer's elements."""
    key = (row.name, theirs)
    if key not in _made:
        body: dict[str, Any] = {method: _runs(method) for method in row.calls}
        body |= {name: method for name, method in row.methods.items() if hasattr(theirs, name)}
        body |= {name: getattr(theirs, name) for name in ("__module__", "__qualname__", "__doc__")}
        _made[key] = type(theirs.__name__, (Adopted, theirs), {**body, "_pgf_row": row, "_pgf_theirs": theirs})
    return _made[key]


def _blank(row: Row, theirs: type[nn.Module]) -> Adopted:
    made = adopted_class(row, theirs)
    return made.__new__(made)


def _runs(method: str) -> Callable[..., Any]:
    def run(self: Adopted, *args: Any, **kwargs: Any) -> Any:
        joined = vars(self).get("_pgf_joined") if torch.is_grad_enabled() else None
        row = self._pgf_row
        call = understood(row, self, method, args, kwargs, joined is not None)
        ready = call is not None and is_ready(row, self)
        if call is not None and not ready:
            row.prepare(self, call)
            ready = is_ready(row, self)
        if call is not None and ready:
            try:
                if row.run is not None:
                    return call.give(*row.run(self, call, joined))
                if joined is not None:
                    return call.give(*joined.run(call))
                return call.give(*run_alone(called(row.elements(self, call.inverse), call), call, row.limit(self)))
            except UnfitError:  # before anything was computed but maps, or what the layer itself would have bounded
                pass
        out = getattr(self._pgf_theirs, method)(self, *args, **kwargs)
        if not vars(self).get("_pgf_seen", ((), True))[1]:  # it may have seen data now
            is_ready(row, self)
        return out

    run.__name__ = method
    return run


def understood(
    row: Row, layer: nn.Module, method: str, args: Sequence[Any], kwargs: dict[str, Any], spares: bool
) -> Call | None:
    """Read a call that our arithmetic applies to; None of any other, which is the layer's own.

    So is one for which ours does not pay, unless it ``spares`` memory. Where torch traces or transforms, all are but
    those of a layer with flags, and sizes decide nothing.

    It applies to plain states, not empty, of the parameters' dtype, float32 or float64, where no hooks watch all
    modules; to a layer whose modules are as their classes say.
    """
    watched = is_watched()
    if (watched and not row.flags(layer)) or has_global_hook():
        return None
    try:
        call = row.calls[method](layer, *args, **kwargs)
    except TypeError:  # other arguments than the row knows
        return None
    if call is None or call.x.dtype not in STATES:
        return None
    if not watched and (type(call.x) not in (Tensor, nn.Parameter) or not call.x.numel()):
        return None
    held = (parameter for module in layer.modules() for parameter in module._parameters.values())
    like = next(filter(torch.is_tensor, held), call.x)  # a permutation has none
    if (call.x.dtype, call.x.device) != (like.dtype, like.device) or call.x.is_meta:
        return None
    if call.mask is not None and (call.mask.requires_grad or not is_mask(call.mask, call.x)):
        return None
    if not untouched(row.inside(layer)) or row.unfit(layer):
        return None
    return call if watched or spares or row.pays(layer, call) else None


def recomputed_later(
    layer: nn.Module, function: Callable[..., Any], *args: Any, only_reads: bool = False, **kwargs: Any
) -> Any:
    """Call function, of a layer, and once more in the backward, with the parameters that the layer has now.

    They may be lent to it for this call, as torch.func.functional_call does. The backward refuses those that were
    written to since, as autograd does. A function that ``only_reads`` draws no random numbers and writes to no buffer,
    so that the buffers are watched as well.
    """
    parameters = list(layer.parameters())
    watched = [*parameters, *(layer.buffers() if only_reads else ())]

    def run(*given: Any) -> Any:
        with holding(layer, given[: len(parameters)]):
            return function(*given[len(watched) :], **kwargs)

    return checkpoint(run, *watched, *args, use_reentrant=False, preserve_rng_state=not only_reads)


def called(elements: Iterable[Element], call: Call) -> Run:
    """Make a run of the elements of layers, for a call's state and in its direction; maps that meet are composed."""
    found: list[Element] = []
    for part in elements:
        own = fitted(part, call.x)
        if isinstance(own, Map) and found and isinstance(before := found[-1], Map):
            pair = ChannelMap(*before.tensors), ChannelMap(*own.tensors)
            own = Map.of(after(*(pair[::-1] if call.inverse else pair)))
            found.pop()
        found.append(own)
    run = Run.of(found, masked=call.mask is not None, inverted=call.inverse)
    return run.turned() if call.inverse else run


def run_alone(run: Run, call: Call, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a call of one layer as autograd records it: z and log_det (N,); a BeyondLimitError beyond the ``limit``.

    A mask sets the state to zero behind each map, and its changed channels behind each coupling, as the layer does; all
    else that the state holds there stays.
    """
    if call.mask is None:
        return within(limit, run, call, lambda run: in_turn(run, call.x, call.cond))
    cond = masked_condition(call.mask, call.cond)
    x, log_det = within(limit, run, call, lambda run: in_turn(run, call.x, cond))
    for coupling in run.couplings:
        padding = log_scale_of_padding([coupling.spec], call.mask, coupling.changed)
        log_det = log_det + padding if call.inverse else log_det - padding
    return x, log_det


def give_back(modules: Iterable[nn.Module]) -> None:
    """Give adopted layers their own class again."""
    for module in modules:
        if isinstance(module, Adopted):
            for name in ("_pgf_joined", "_pgf_nets", "_pgf_seen", "_pgf_log_scales"):
                vars(module).pop(name, None)
            module.__class__ = module._pgf_theirs  # type: ignore[assignment]
