"""The form that K flow steps are folded into for inference: computed once, kept until a parameter changes."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyglow_fast._captures import is_capturing
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import ChannelMap, FlowStep, couplings_of, fold_steps, invert_maps
from pyglow_fast.layers.kept_values import KeptTensors, has_version
from pyglow_fast.layers.known_steps import KnownSteps, same_objects
from pyglow_fast.reversible.maps import MapInverse


@dataclass
class FoldedSteps:
    """The channel maps of the steps, their inverses, and the weights of nets that are CouplingNets.

    Maps are as fold_in_one gives them. ``nets`` has an entry for each coupling, None for any other net. The inverses
    are computed when they are first asked for.
    """

    maps: list[ChannelMap]
    nets: list[list[Tensor] | None]
    _inverses: list[MapInverse] = field(default_factory=list)

    @property
    def inverses(self) -> list[MapInverse]:
        """The inverse matrix of each map, with an index where the map is a gather."""
        if not self._inverses:
            self._inverses = invert_maps(self.maps)
        return self._inverses

    @classmethod
    def of(cls, steps: Sequence[FlowStep]) -> FoldedSteps:
        """Fold the steps with the parameters that they have now."""
        nets = [coupling.net for coupling in couplings_of(steps)]
        weights = [net.folded_weights() if is_foldable(net) else None for net in nets]  # type: ignore[operator]
        return cls(fold_steps(steps), weights)


def is_foldable(net: object) -> bool:
    """Whether a net is a CouplingNet without hooks or changes, which its folded weights stand for."""
    return type(net) is CouplingNet and net.is_plain


def _tensors(steps: Sequence[FlowStep]) -> list[Tensor] | None:
    """All that the folded steps are made of; None if it cannot be told (parametrizations)."""
    found: list[Tensor] = []
    for step in steps:
        sources = step.permutation.weight_sources()
        if sources is None or hasattr(step.actnorm, "parametrizations"):
            return None
        found += [*sources, step.actnorm.log_scale, step.actnorm.bias]
        for net in (coupling.net for coupling in step.couplings):
            if isinstance(net, CouplingNet) and is_foldable(net):
                found += net.weight_sources()
    return found


@dataclass
class _Kept:
    folded: FoldedSteps
    boards: list[Checkerboard | None]
    made_of: KeptTensors
    looked: bool = False  # at the steps, to make them known


def _known_of(
    children: Mapping[str, nn.Module | None], steps: Sequence[FlowStep], tensors: Sequence[Tensor]
) -> KnownSteps | None:
    """Looks at steps once more; None unless all is known of them and they are still made of these tensors.

    Other threads may change modules meanwhile.
    """
    known, now = KnownSteps.of(children, steps, tensors), _tensors(steps)
    same = now is not None and same_objects(now, tensors)
    return known if known is not None and same and known.hold(children) else None


class FoldCache:
    """The folded steps of one run of steps.

    On the CPU they count as long as the parameters are at the same place, of the same version and, as writes through
    ``.data`` or numpy have no version, of the same bits: all are compared, but for those that the folded form is a view
    of. Where that would stop a stream nothing is kept. Inside :meth:`trusting` versions are believed, on any device.
    What a captured training step is made of, which its replays may change without a trace, is folded anew
    each time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trusted = 0
        self._kept: _Kept | None = None
        self._known: KnownSteps | None = None
        self._captured: dict[int, weakref.ref[Tensor]] = {}

    def __deepcopy__(self, memo: object) -> FoldCache:
        """A copy of a model has its own parameters."""
        return FoldCache()

    def __reduce__(self) -> tuple[type[FoldCache], tuple[()]]:
        """Nothing of it is saved."""
        return FoldCache, ()

    def clear(self) -> None:
        """Forget the folded steps, which frees their memory."""
        with self._lock:
            self._kept = self._known = None

    @contextlib.contextmanager
    def trusting(self) -> Iterator[None]:
        """A context in which parameters of the same version are taken to be the same: no write goes unseen by torch."""
        self._enter(1)
        try:
            yield
        finally:
            self._enter(-1)

    def _enter(self, by: int) -> None:
        with self._lock:
            self._trusted += by
            if self._trusted == max(by, 0):  # the first one in, the last one out
                self._kept = None

    def distrust(self, steps: Sequence[FlowStep]) -> None:
        """Stops trusting versions of parameters: a captured training step may change them at each replay, unseen."""
        with self._lock:
            self._captured = {key: kept for key, kept in self._captured.items() if kept() is not None}
            self._captured |= {id(tensor): weakref.ref(tensor) for tensor in _tensors(steps) or ()}
            self._kept = None

    def _was_captured(self, tensor: Tensor) -> bool:
        found = self._captured.get(id(tensor))
        return found is not None and found() is tensor

    def known(self, children: Mapping[str, nn.Module | None]) -> KnownSteps | None:
        """Returns what an earlier call found out about a run's modules; None if one of them holds another thing now."""
        known = self._known
        if known is None or known.hold(children):
            return known
        with self._lock:
            self._known = None
            if self._kept is not None:
                self._kept.looked = False
        return None

    def get(
        self,
        steps: Sequence[FlowStep],
        known: KnownSteps | None = None,
        children: Mapping[str, nn.Module | None] | None = None,
    ) -> FoldedSteps:
        """The folded steps, computed anew if something has changed. No gradient is recorded.

        Args:
            steps: of the run.
            known: of these steps, as :meth:`known` has just given it.
            children: the modules of the run, where all of them are these steps: then these are made known.
        """
        if is_capturing(steps[0].actnorm.bias.device):  # a graph must fold whatever the parameters are at its replay
            with torch.no_grad():
                return FoldedSteps.of(steps)
        with self._lock:
            tensors = _tensors(steps) if known is None else known.tensors
            boards = [coupling.board for coupling in couplings_of(steps)] if known is None else known.boards
            kept = self._kept
            if kept is not None and tensors is not None and kept.boards == boards and kept.made_of.same(tensors):
                if children is not None and not kept.looked:
                    self._known, kept.looked = _known_of(children, steps, tensors), True
                return kept.folded
            with torch.no_grad():
                return self._fold(steps, tensors, boards)

    def _fold(
        self, steps: Sequence[FlowStep], tensors: list[Tensor] | None, boards: list[Checkerboard | None]
    ) -> FoldedSteps:
        """The folded steps as the parameters are now, which are kept where they may be."""
        self._kept = None
        if tensors is None or not all(map(self._has_version, tensors)):
            return FoldedSteps.of(steps)
        before = KeptTensors(tensors, by_version=self._trusted > 0)
        folded = FoldedSteps.of(steps)
        if not (self._trusted or before.has_values):
            return folded
        weights = [weight for weights in folded.nets for weight in weights or ()]
        made_of = KeptTensors(tensors, weights, by_version=self._trusted > 0)
        if before.same(tensors):  # else another thread has written while they were folded
            self._kept = _Kept(folded, boards, made_of)
        return folded

    def _has_version(self, tensor: Tensor) -> bool:
        """Tells whether every write to a tensor changes its version, as a graph's replay does not."""
        return has_version(tensor) and not self._was_captured(tensor)
