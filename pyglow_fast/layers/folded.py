"""The form that K flow steps are folded into for inference: computed once, kept until a parameter changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyglow_fast._captures import is_capturing
from pyglow_fast._errors import can_read
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.layers.coupling_net import CouplingNet
from pyglow_fast.layers.flow_step import ChannelMap, FlowStep, couplings_of, fold_steps, invert_maps
from pyglow_fast.reversible.maps import MapInverse

Identity = tuple["weakref.ref[Tensor]", int, int]  # the tensor, where its data is, its version


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
        own = (*step.actnorm._parameters.values(), *step.actnorm._buffers.values())
        found += [*sources, *(tensor for tensor in own if tensor is not None)]
        for net in (coupling.net for coupling in step.couplings if is_foldable(coupling.net)):
            found += [tensor for part in net.modules() for tensor in part._parameters.values() if tensor is not None]
    return found


def _identities(tensors: Sequence[Tensor]) -> list[Identity] | None:
    if any(tensor.is_inference() for tensor in tensors):
        return None  # they have no version
    return [(weakref.ref(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors]


class FoldCache:
    """The folded steps of one run of steps.

    They count as long as the parameters are the same objects, at the same place and of the same version. Writes through
    ``.data`` have no version: so that an optimizer or average which writes all parameters like that is noticed too, the
    small parameters are compared by value (where reading them does not stop a stream). What a captured training step is
    made of, which its replays may change without a trace, is folded anew each time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folded: FoldedSteps | None = None
        self._identities: list[Identity] = []
        self._boards: list[Checkerboard | None] = []
        self._small = torch.empty(0)
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
            self._folded, self._identities = None, []

    def distrust(self, steps: Sequence[FlowStep]) -> None:
        """Stops trusting versions of parameters: a captured training step may change them at each replay, unseen."""
        with self._lock:
            self._captured = {key: kept for key, kept in self._captured.items() if kept() is not None}
            self._captured |= {id(tensor): weakref.ref(tensor) for tensor in _tensors(steps) or ()}

    def _was_captured(self, tensor: Tensor) -> bool:
        found = self._captured.get(id(tensor))
        return found is not None and found() is tensor

    def get(self, steps: Sequence[FlowStep]) -> FoldedSteps:
        """The folded steps, computed anew if something has changed. No gradient is recorded."""
        if is_capturing(steps[0].actnorm.bias.device):  # a graph must fold whatever the parameters are at its replay
            with torch.no_grad():
                return FoldedSteps.of(steps)
        with torch.no_grad(), self._lock:
            tensors = _tensors(steps)
            if self._captured and any(map(self._was_captured, tensors or ())):
                return FoldedSteps.of(steps)
            small = self._small_values(steps)
            boards = [coupling.board for coupling in couplings_of(steps)]  # which are folded into the maps too
            known = self._folded if boards == self._boards else None
            if tensors is not None and known is not None and self._matches(tensors, small):
                return known
            folded = FoldedSteps.of(steps)
            identities = None if tensors is None else _identities(tensors)
            self._folded, self._identities = (None, []) if identities is None else (folded, identities)
            self._small, self._boards = small, boards
            return folded

    @staticmethod
    def _small_values(steps: Sequence[FlowStep]) -> Tensor:
        first = steps[0].actnorm.bias
        if not can_read(first):
            return first.new_empty(0)
        nets = [coupling.net for coupling in couplings_of(steps)]
        gains = [net.log_gain.flatten() for net in nets if isinstance(net, CouplingNet)]
        small = [*(step.actnorm.log_scale for step in steps), *(step.actnorm.bias for step in steps), *gains]
        return torch.cat(small)

    def _matches(self, tensors: Sequence[Tensor], small: Tensor) -> bool:
        if len(tensors) != len(self._identities):
            return False
        for tensor, (reference, place, version) in zip(tensors, self._identities, strict=True):
            same = reference() is tensor and not tensor.is_inference()
            if not same or tensor.data_ptr() != place or tensor._version != version:
                return False
        return small.dtype == self._small.dtype and torch.equal(small, self._small)
