"""Joins runs of Jet's couplings into one chain, whose backward runs each net once and keeps few states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyglow_fast._errors import expect
from pyglow_fast.coupling_nets.net_runner import NetRunner
from pyglow_fast.coupling_nets.traits import bytes_per_position, is_altered
from pyglow_fast.interop.jet.couplings import Adopted, OfImages, WithProjections, takes
from pyglow_fast.interop.jet.tokens import TokenCoupling
from pyglow_fast.interop.joined import Face, Place, unrepeatable
from pyglow_fast.layers.reversible_sequence import ReversibleSequence
from pyglow_fast.reversible import CouplingStep
from pyglow_fast.reversible.steps import Differentiated, Given, Outcome

STEPS = (Adopted,)  # what may be joined
_MODEL = ("kind_flags", "channel_indices", "spatial_indices", "channel_projections", "spatial_projections")


class _Called:
    """What a model of jet-pytorch's interface calls its i-th coupling with besides x; nothing in JetFormer."""

    def __init__(self, owner: nn.Module, index: int, projects: bool) -> None:
        self.owner, self.index, self.projects = owner, index, projects

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of now: (is_channel, channel_proj, spatial_proj), or nothing."""
        if not self.projects:
            return ()
        owner: Any = self.owner
        rows = owner.channel_indices[self.index], owner.spatial_indices[self.index]
        stacks = owner.channel_projections, owner.spatial_projections
        found = (stack[row] if row >= 0 else None for row, stack in zip(rows, stacks, strict=True))
        return (owner.kind_flags[self.index], *found)

    def check(self, x: Tensor, given: Sequence[Any]) -> None:
        """Refuse another call than the one that was joined; what traces or transforms has no tensors to compare."""
        if not self.projects or not takes(x):
            return

        def same(one: Any, other: Any) -> bool:
            if isinstance(one, Tensor) and isinstance(other, Tensor):
                return one.data_ptr() == other.data_ptr() and one.shape == other.shape
            return bool(one is other or one == other)

        fits = all(map(same, given, self.arguments()))
        expect(fits, f"couplings[{self.index}]", "a call with the model's own projections", "one with others")


class _Step(nn.Module):
    """One coupling of tokens, with the calls of a step of a reversible run."""

    def __init__(self, layer: nn.Module, called: _Called, budget: str | int) -> None:
        super().__init__()
        self.layer, self.called, self.budget = layer, called, budget
        self._nets: dict[tuple[int | bool, ...], _TokenNet] = {}  # not registered: their parameters are the layer's

    def coupling(self, x: Tensor) -> TokenCoupling | None:
        """How tokens are coupled with the projections of now."""
        layer: Any = self.layer
        found: TokenCoupling | None = layer.coupling(x, *self.called.arguments())
        return found

    def recomputed(self, x: Tensor) -> _Recomputed:
        """Make what runs again in the backward, on states of the shape of x."""
        found, layer = self.coupling(x), cast(Any, self.layer)
        assert found is not None  # asked before the run
        key = (*x.shape[1:], found.by_channel)
        if key not in self._nets:  # kept, since what a net does in a capture is known by what it did before
            self._nets[key] = _TokenNet(found.net, layer.dnn, x.shape[1:], found.by_channel)
        return _Recomputed(NetRunner(self._nets[key], 2, self.budget), found)

    def _known(self, x: Tensor) -> TokenCoupling:
        """How tokens are coupled; without a record the net runs in chunks."""
        own = self.recomputed(x)
        recorded = torch.is_grad_enabled()
        return own.coupling if recorded else own.coupling._replace(net=lambda kept: own.runner.run(kept, None))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x -> y, log_det (N,)."""
        return self._known(x).forward(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y -> x, log_det (N,)."""
        return self._known(y).inverse(y)


class _TokenNet(nn.Module):
    """A coupling's net (N, A / 2, B) -> (N, A, B) as it is cut into chunks of samples.

    Args:
        call: the net.
        dnn: what has its parameters.
        shape: of a sample of tokens, (T, C).
        by_channel: whether B are the tokens.
    """

    writes_to_input = False  # see plain_call in couplings.py

    def __init__(
        self, call: Callable[[Tensor], Tensor], dnn: nn.Module, shape: Sequence[int], by_channel: bool
    ) -> None:
        super().__init__()
        self.call, self.dnn, self.shape, self.by_channel = call, dnn, shape, by_channel

    def bytes_per_position(self, element_size: int) -> int:
        """Count the bytes of activations of a token, or of its part of a channel's."""
        tokens, channels = self.shape
        of_token = bytes_per_position(self.dnn, channels, element_size)
        return of_token if self.by_channel else math.ceil(of_token * tokens / channels)

    def forward(self, kept: Tensor) -> Tensor:
        """Predict shift and raw scale, one behind the other."""
        return self.call(kept)


class _Recomputed(CouplingStep):
    """A coupling of tokens as the generic path runs it."""

    def __init__(self, runner: NetRunner, coupling: TokenCoupling) -> None:
        super().__init__(runner, coupling.spec)
        self.coupling = coupling

    def forward(self, x: Tensor, given: Given) -> Outcome:
        """Run the coupling, and note what repeats the net."""
        found = super().forward(self.coupling.halved(x), given)
        return found._replace(z=self.coupling.whole(found.z))

    def repeat(self, x: Tensor, given: Given) -> Tensor:
        """Run the coupling again."""
        return self.coupling.whole(super().repeat(self.coupling.halved(x), given))

    def backward(
        self, y: Tensor | None, x: Tensor | None, grad_y: Tensor, grad_log_det: Tensor, given: Given
    ) -> Differentiated:
        """Run the net once more, chunk by chunk."""
        halved, whole = self.coupling.halved, self.coupling.whole
        y, x = (None if state is None else halved(state) for state in (y, x))
        found = super().backward(y, x, halved(grad_y), grad_log_det, given)
        return found._replace(x=whole(found.x), grad_x=whole(found.grad_x))


class TokenRun(Face):
    """A run of joined couplings, in the place of the first: its forward runs all, its inverse leaves that to the last.

    ``memory`` and ``memory_budget``: see ReversibleSequence.
    """

    def __init__(self, modules: Sequence[nn.Module], called: Sequence[_Called], memory: str, budget: str | int) -> None:
        steps = [_Step(module, call, budget) for module, call in zip(modules, called, strict=True)]
        super().__init__(modules, cast(Any, ReversibleSequence(steps, memory, memory_budget=budget)))
        self.steps = steps

    def __call__(self, x: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Any]:
        """x -> y through all of them."""
        return self._through(x, False, *given, **named)

    def inverse(self, x: Tensor, *given: Any, **named: Any) -> tuple[Tensor, int]:
        """Return x and 0: the last coupling's place has inverted the run already."""
        return x, 0

    def inverse_of_all(self, y: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Any]:
        """Map y to x through all couplings of the run."""
        return self._through(y, True, *given, **named)

    def _through(self, x: Tensor, inverse: bool, *given: Any, **named: Any) -> tuple[Tensor, Any]:
        first: Any = self.modules[0]
        self.steps[-1 if inverse else 0].called.check(x, given)
        of_images = isinstance(first, OfImages)
        tokens = None
        if self.takes(x) and not self._changed():
            if not of_images:
                tokens = x
            elif first.cuts(x, *given, **named):
                tokens = first.patches(x)
        if tokens is None or any(step.coupling(tokens) is None for step in self.steps):
            return self._one_by_one(x, inverse, named if of_images else {})
        run: Any = self.run
        out, log_det = run.inverse(tokens) if inverse else run(tokens)
        if of_images:
            return first.images(out, x.shape), -log_det if inverse else log_det
        return out.contiguous(), log_det.unsqueeze(-1)

    def takes(self, x: Tensor) -> bool:
        """Whether the run takes x: as every run does, and nothing that traces."""
        return takes(x) and super().takes(x)

    def _changed(self) -> bool:
        return any(not isinstance(module, Adopted) or is_altered(module) for module in self.modules)

    def _one_by_one(self, x: Tensor, inverse: bool, named: dict[str, Any]) -> tuple[Tensor, Any]:
        total: Any = 0
        for step in reversed(self.steps) if inverse else self.steps:
            layer: Any = step.layer
            x, log_det = (layer.inverse if inverse else layer)(x, *step.called.arguments(), **named)
            total = total + log_det
        return x, total


class Passed:
    """A placeholder of a coupling that the run does, so that others keep their numbers; the last begins the inverse.

    Args:
        called: what the coupling would be called with.
        run: the run, in the place of its last coupling; None in the others.
    """

    def __init__(self, called: _Called, run: TokenRun | None) -> None:
        self.called, self.run = called, run

    def __call__(self, x: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Any]:
        """x, 0."""
        self.called.check(x, given)
        return x, 0

    def inverse(self, x: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Any]:
        """Return x and 0; in the place of the last coupling, invert the whole run."""
        self.called.check(x, given)
        return (x, 0) if self.run is None else self.run.inverse_of_all(x, *given, **named)


def _reason(module: nn.Module, owner: nn.Module, memory: str) -> str:
    """Why a module is no step of a run, or nothing."""
    if not isinstance(module, Adopted):
        return "no coupling of ours"
    if isinstance(module, WithProjections) and not all(hasattr(owner, name) for name in _MODEL):
        return f"its model has no {', '.join(_MODEL)}"
    if is_altered(module):
        return "hooks or a forward of its own on it"
    return unrepeatable(module.dnn, memory)


def places(modules: Sequence[nn.Module], owner: nn.Module, memory: str) -> list[Place]:
    """Divide the modules of a list into steps: neighbours are joined that see the same tokens."""
    found = []
    for index, module in enumerate(modules):
        reason = _reason(module, owner, memory)
        called = _Called(owner, index, isinstance(module, WithProjections))
        takes = (called.projects, getattr(module, "ps", None))
        found.append(Place([module], reason=reason) if reason else Place([module], takes, called))
    return found


def stand_ins(run: Sequence[Place], memory: str, budget: str | int) -> list[TokenRun | Passed]:
    """Make what replaces a run: a TokenRun in the place of its first coupling, a Passed in each other."""
    called = [place.parts for place in run]
    whole = TokenRun([place.layers[0] for place in run], called, memory, budget)
    return [whole, *(Passed(call, None) for call in called[1:-1]), Passed(called[-1], whole)]
