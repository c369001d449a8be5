"""Makes a layer's forward run the parts that the layer holds: its class becomes one made of a row and its own class.

The object, its parameters, buffers, hooks, names and other methods stay, and it is still an instance of its own class,
whose forward runs wherever ours does not apply or does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyglow_fast import functional
from pyglow_fast._errors import expect
from pyglow_fast._tracing import is_watched
from pyglow_fast.interop.limits import check, note
from pyglow_fast.interop.table import Call, Couples, Part, Row, UnfitError, is_ready, spread, untouched
from pyglow_fast.layers.flow_step import after
from pyglow_fast.nets import plain_call
from pyglow_fast.nets.masks import (
    is_mask,
    log_scale_of_padding,
    masked_condition,
    positions_of,
    without_padding,
)
from pyglow_fast.nets.net_runner import condition_for
from pyglow_fast.nets.state import holding
from pyglow_fast.reference import n_positions
from pyglow_fast.runs.steps import ChannelMap

STATES = (torch.float32, torch.float64)


class Adopted(nn.Module):
    """A base that is put before the class of an adopted layer."""

    _pgf_row: Row
    _pgf_theirs: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by row and class, which can be imported; what is made of them is made again."""
        return _blank, (self._pgf_row, self._pgf_theirs), dict(vars(self))

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Look at the flags again, which may be other tensors now: see is_ready of table.py."""
        super()._apply(*args, **kwargs)
        is_ready(self._pgf_row, self)
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """Make a DataParallel's replica, which keeps no run of the original."""
        replica = cast(Any, super())._replicate_for_data_parallel()
        vars(replica).pop("_pgf_run", None)
        return replica


_made: dict[tuple[str, type[nn.Module]], type[Adopted]] = {}


def adopted_class(row: Row, theirs: type[nn.Module]) -> type[Adopted]:
    """Make the class, by the name of the layer's own, whose methods in the row's calls run the layer's parts."""
    key = (row.name, theirs)
    if key not in _made:
        body: dict[str, Any] = {method: _runs(method) for method in row.calls}
        body |= {name: getattr(theirs, name) for name in ("__module__", "__qualname__", "__doc__")}
        _made[key] = type(theirs.__name__, (Adopted, theirs), {**body, "_pgf_row": row, "_pgf_theirs": theirs})
    return _made[key]


def _blank(row: Row, theirs: type[nn.Module]) -> Adopted:
    made = adopted_class(row, theirs)
    return made.__new__(made)


def _runs(method: str) -> Callable[..., Any]:
    def run(self: Adopted, *args: Any, **kwargs: Any) -> Any:
        own = vars(self).get("_pgf_run") if torch.is_grad_enabled() else None
        row = self._pgf_row
        call = understood(row, self, method, args, kwargs, own is not None)
        ready = call is not None and is_ready(row, self)
        if call is not None and not ready:
            row.prepare(self, call)
            ready = is_ready(row, self)
        if call is not None and ready:
            try:
                if own is not None and row.run is None:
                    return call.give(*own(call))
                parts = row.parts(self, call.inverse)
                if row.run is not None:
                    return call.give(*row.run(self, call, parts, own))
                return call.give(*run_parts(parts, with_mask(call), limit=row.limit(self)))
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
    if (watched and not row.flags(layer)) or torch.nn.modules.module._has_any_global_hook():
        return None
    try:
        call = row.calls[method](layer, *args, **kwargs)
    except TypeError:  # other arguments than the row knows
        return None
    if call is None or call.x.dtype not in STATES:
        return None
    if not watched and (type(call.x) not in (Tensor, nn.Parameter) or not call.x.numel()):
        return None
    like = next(layer.parameters(), call.x)  # a permutation has none
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


def net_output(part: Couples, x: Tensor, cond: Tensor | None) -> Tensor:
    """Run a coupling's net on the first channels of a state: (N, width, *spatial).

    Raises:
        ValueError: it gives another shape.
    """
    net = plain_call(part.wrapped())
    out = net(x[:, : part.kept], cond) if part.kept else net(condition_for(x, cond), None)
    shape = (x.shape[0], part.width, *x.shape[2:])
    if out.shape != shape:
        expect(False, "subnet", f"an output of shape {shape}", tuple(out.shape))
    return out


NetOutput = Callable[[Couples, Tensor, Tensor | None], Tensor]


def run_parts(
    parts: Sequence[Part], call: Call, run_net: NetOutput = net_output, limit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run maps and couplings one after another, as autograd records them: z and log_det (N,).

    Neighbouring maps are one, and a map that follows a coupling is in one pass with it.

    Args:
        parts: in the order of data to latents, of an inverse call too, whose maps are inverted.
        call: see :func:`with_mask`; a mask sets the state to zero behind each map, and its changed channels behind each
            coupling.
        run_net: runs the net of a coupling on a state and the condition.
        limit: of the states, see limits.py.

    Raises:
        BeyondLimitError: a state may be beyond the limit.
    """
    x, log_dets, mask = call.x, [], call.mask
    seen: list[Tensor] = []
    waiting = spread(parts if call.inverse else parts[::-1], x.shape[1])

    def next_map() -> ChannelMap | None:
        found = None
        while waiting and isinstance(waiting[-1], ChannelMap):
            own = cast(ChannelMap, waiting.pop())
            found = own if found is None else after(found, own)
        if found is not None:
            positions = n_positions(x) if mask is None else positions_of(mask)
            log_dets.append((found.log_det * positions).expand(x.shape[0]))  # an export would fix len(x)
        return found

    while waiting:
        own = next_map()
        if own is not None:
            x = functional.channel_mix(x, own.matrix, own.offset, own.source)
        else:
            part = cast(Couples, waiting.pop())
            net_out = run_net(part, x, call.cond)
            if limit is not None:
                note(seen, part.spec, x, net_out)
            own = None if call.inverse else next_map()
            if call.inverse:
                x, log_det = functional.coupling_inverse(x, net_out, part.spec)
            elif own is None:
                x, log_det = functional.coupling(x, net_out, part.spec)
            else:
                x, log_det = functional.coupling_mix(x, net_out, own.matrix, own.offset, part.spec, own.source)
            log_dets.append(log_det)
            if mask is not None:
                padding = log_scale_of_padding([part.spec], mask, part.changed)
                log_dets.append(padding if call.inverse else -padding)
                if own is None:
                    x = torch.cat([x[:, : part.kept], without_padding(x[:, part.kept :], mask)], dim=1)
        x = x if mask is None or own is None else x * mask
    if limit is not None:
        check(limit, [part.spec for part in parts if isinstance(part, Couples)], call, seen, x)
    return x, functional.summed(log_dets)


def with_mask(call: Call) -> Call:
    """The call with what masked nets get as its condition, see nets/masks.py."""
    return call if call.mask is None else call._replace(cond=masked_condition(call.mask, call.cond))


def give_back(modules: Iterable[nn.Module]) -> None:
    """Give adopted layers their own class again."""
    for module in modules:
        if isinstance(module, Adopted):
            for name in ("_pgf_run", "_pgf_seen"):
                vars(module).pop(name, None)
            module.__class__ = module._pgf_theirs  # type: ignore[assignment]
