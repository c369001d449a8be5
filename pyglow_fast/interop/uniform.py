"""Runs layers each of which is a coupling and then one map, and bounds its states: their maps are made in a few ops.

In "checkpoint" and "reversible" each node of a run makes its maps of the layers' parameters, again in its backward, so
that only parameters are kept for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from pyglow_fast import functional
from pyglow_fast.interop.adoption import Adopted, run_parts
from pyglow_fast.interop.health import health
from pyglow_fast.interop.limits import Watch
from pyglow_fast.interop.runs import Run, check_layer, parts_of, unrepeatable
from pyglow_fast.interop.table import Call, Couples, Part, Row, UnfitError, untouched
from pyglow_fast.layers import Coupling
from pyglow_fast.layers.described import described, is_runnable
from pyglow_fast.layers.flow_step import recomputed, unstack_maps
from pyglow_fast.reversible import run_steps
from pyglow_fast.reversible.run import (
    Fold,
    FoldByTorch,
    Maps,
    folded_maps,
    given_maps_of,
    run_plain,
    run_recorded,
)
from pyglow_fast.reversible.steps import ChannelMap

Raw = Sequence[Tensor]
MapsOf = Callable[[Sequence[Any]], tuple[Raw, Callable[[Raw], ChannelMap]]]
# Where memory is to be saved a net takes as much as so many states. On volumes of 16^3 and 32^3 (8 channels, hidden 96)
# that is two strips; eight took twice as long and saved little, as the rest then counts.
MOST_STATES = 64


class UniformRun(Run):
    """Layers in one chain, see :class:`Run`; where a state may be bounded by them they are called one by one.

    Args:
        layers, rows, memory, budget: see Run.
        couples: the coupling of a layer.
        maps: the tensors that the maps of layers are made of, and what makes them of these, stacked.
        limit: of the states of layers, see limits.py.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        rows: Sequence[Row],
        memory: str,
        budget: str | int,
        *,
        couples: Callable[[Any], Couples],
        maps: MapsOf,
        limit: Callable[[Sequence[Any]], Tensor],
    ) -> None:
        self._couples, self._maps, self._limit = couples, maps, limit
        self._pairs = list(zip(layers, rows, strict=True))
        super().__init__(layers, rows, memory, budget)
        self.beyond = 0  # calls with values that may have been beyond the limit
        self._shape: Sequence[int] | None = None  # of the states of the last call

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        """Run the layers: z and log_det (N,), or with an inverse call x and log_det.

        Raises:
            UnfitError: the layers are to be called one by one.
        """
        for layer, row in self._pairs:
            check_layer(layer, row)
        self.rows[0].prepare(self.layers, call)
        if call.inverse and self.spares and self._trains(call.x):
            raise UnfitError("nets that would keep what they need for a backward")
        watch, self._shape = Watch(), call.x.shape
        couples = [self._couples(layer) for layer in self.layers]
        couplings = self._couplings(couples)
        if call.inverse:
            found = self._in_turn(self.parts(True), couples, couplings, call, watch)
        else:
            found = self._chain(couples, couplings, call, watch)
        try:
            watch.check(self._limit(self.layers), [part.spec for part in couples], call, found[0])
        except UnfitError:
            self.beyond += 1
            raise
        return found

    def _trains(self, x: Tensor) -> bool:
        """Whether a backward may follow."""
        given = [x, *(parameter for layer in self.layers for parameter in layer.parameters())]
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)

    def _chain(
        self, couples: Sequence[Couples], couplings: Sequence[Coupling], call: Call, watch: Watch
    ) -> tuple[Tensor, Tensor]:
        x, records = call.x, self._trains(call.x)
        mode = self.memory if records else "store"
        if reason := next(filter(None, (unrepeatable(part.net, mode) for part in couples)), ""):
            raise UnfitError(reason)  # put on a net since it was joined
        budget = self.budget
        if mode != "store" and budget == "auto":
            budget = MOST_STATES * x.nbytes
        nothing = ChannelMap.nothing(x.new_zeros(x.shape[1])).as_product()
        if mode == "store":
            raw, fold = self._maps(self.layers)
            stacked = fold(raw)
            own = unstack_maps(stacked)
            maps = given_maps_of(_before(nothing, stacked, len(own) - 1))
        else:
            own = []
            maps = Maps(range(1, len(couples) + 1), nothing.matrix.nbytes, partial(self._folded, nothing))
        steps = described(couplings, maps, x, None, False, budget) if is_runnable(x) else None
        if steps is not None:
            steps = steps._replace(watch=watch)
            run = partial(run_recorded, steps, mode, self.control, x) if records else None
            z, log_det = run_plain(steps, x, None, False, folded_maps(steps)) if run is None else run()
        elif mode == "store":
            parts = [part for pair in zip(couples, own, strict=True) for part in pair]
            return self._in_turn(parts, couples, couplings, call, watch)
        else:
            control, again = self.control if mode == "reversible" else None, recomputed(couplings, budget)
            for step, part in zip(again, couples, strict=True):
                step.watch = partial(watch.look, part)
            z, log_det = run_steps(again, control, x, None, maps)
        if not own:  # made behind the run, so that a backward is done with it before that of the run
            raw, fold = self._maps(self.layers[-1:])
            own = unstack_maps(fold(raw))
        last = own[-1]
        z = functional.channel_mix(z, last.matrix, last.offset)
        return z, log_det + functional.per_sample(z, last.log_det)

    def _folded(self, nothing: ChannelMap, first: int, end: int) -> tuple[Raw, Fold]:
        """The maps before couplings first .. end - 1, which are those of the layers before them."""
        if end == 1:
            return [], FoldByTorch(lambda _: ChannelMap(*(part.unsqueeze(0) for part in nothing[:3])))
        raw, fold = self._maps(self.layers[max(0, first - 1) : end - 1])
        if first:
            return raw, FoldByTorch(fold)
        return raw, FoldByTorch(lambda given: ChannelMap(*_before(nothing, fold(given), end - 1)))

    def _in_turn(
        self,
        parts: Sequence[Part],
        couples: Sequence[Couples],
        couplings: Sequence[Coupling],
        call: Call,
        watch: Watch,
    ) -> tuple[Tensor, Tensor]:
        budget, own = self._budget(), dict(zip(couples, couplings, strict=True))

        def run_net(part: Couples, x: Tensor, cond: Tensor | None) -> Tensor:
            coupling, kept = own[part], x[:, : part.kept]
            net_out = coupling.run_net(kept, None) if budget is None else coupling.runner(budget).run(kept, None)
            return watch.look(part, x, net_out)

        return run_parts(parts, call, run_net)

    def alone(self, layer: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call one of the layers by itself, past ours; where memory is to be saved only its input is kept."""
        if not self.spares or not isinstance(layer, Adopted) or not untouched([layer]):
            return super().alone(layer, method, *args, **kwargs)
        own = partial(getattr(layer._pgf_theirs, method), layer)
        return torch.utils.checkpoint.checkpoint(own, *args, use_reentrant=False, **kwargs)

    def report(self) -> dict[str, Any]:
        """Report what :meth:`Run.report` does, the calls beyond the limit, and how well the layers can be inverted."""
        found = super().report() | {"beyond_limit": self.beyond}
        try:
            there, back = ([parts_of(*pair, inverse) for pair in self._pairs] for inverse in (False, True))
        except UnfitError:
            return found
        return found | health(there, back, self._shape)


def _before(nothing: ChannelMap, maps: ChannelMap, count: int) -> list[Tensor]:
    """No map, and then so many of the stacked ones."""
    pairs = zip(nothing[:3], maps[:3], strict=True)
    return [torch.cat([none.unsqueeze(0), own[:count]]) for none, own in pairs]
