"""State that repeats a run of a net, besides its inputs: parameters, random generators, autocast, modes, buffers."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglow_fast._core.captures import is_capturing
from pyglow_fast._core.errors import can_read, expect
from pyglow_fast.nets.traits import is_deterministic

REPEAT_TOLERANCE = 0.01  # of the norm of a net's output
_lending = threading.RLock()  # a net may have others inside, to which tensors are lent too


def leaves_of(net: nn.Module, params: Sequence[Tensor]) -> list[Tensor]:
    """List what a repeated run of a net is differentiated by: its own parameters, or views where that would show.

    Hooks on a parameter belong to the outer backward, which calls them with the whole gradient; so does what
    ``retain_grad`` puts on a tensor that is no leaf. Tensors that the net does not hold may be copies, by saved-tensor
    hooks, of one that has hooks. Another thread that meets a view in the net meanwhile still trains the parameter.
    """
    own = {id(param) for param in net.parameters() if param.is_leaf and not param._backward_hooks}
    with torch.enable_grad():
        return [param if id(param) in own else param.view_as(param) for param in params]


@contextlib.contextmanager
def holding(net: nn.Module, params: Sequence[Tensor]) -> Iterator[None]:
    """A context in which a net holds the given tensors for its parameters, as many, in their order, in each module.

    Mostly they are its own, and nothing is done. Others are lent to the net, by one thread at a time, since all of them
    see it.
    """
    if [*map(id, net.parameters())] == [*map(id, params)]:
        yield
        return
    with _lending:
        own = list(net.parameters())
        expect(len(own) == len(params), "net", f"the {len(params)} parameters that its forward ran with", len(own))
        lent = {id(mine): given for mine, given in zip(own, params, strict=True)}
        places = [(module._parameters, *item) for module in net.modules() for item in module._parameters.items()]
        try:
            for held, name, mine in places:
                held[name] = None if mine is None else lent[id(mine)]  # type: ignore[assignment]
            yield
        finally:
            for held, name, mine in places:
                held[name] = mine


@contextlib.contextmanager
def without_autocast_cache() -> Iterator[None]:
    """A context in which weights that are cast to low precision are not remembered.

    Autocast would keep a copy of every weight until its region ends: all nets' weights at once, where one net's matter.
    In some versions of torch it also hands what was cast under no_grad to code that records, which finds no gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def captured_autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Capture the autocast state of a type of device and of the CPU: makes a context, any number of times."""
    known = [name for name in dict.fromkeys((device_type, "cpu")) if torch.amp.is_autocast_available(name)]
    states = [(name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name)) for name in known]

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name, dtype, enabled in states:
                if enabled or torch.is_autocast_enabled(name):
                    stack.enter_context(torch.autocast(name, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    return enter


def generator_states(device: torch.device) -> list[Tensor]:
    """Read the states of torch's default generators that a net on ``device`` draws from; a capture refuses that.

    They are shared by all threads: nets that are not known to be deterministic must not run in two threads at a time.
    """
    expect(
        not is_capturing(device),
        "net",
        "one of torch's modules without dropout, one that states deterministic = True, or one that drew no random "
        "numbers in a step before, to be run again within a CUDA graph",
        "another",
    )
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


@contextlib.contextmanager
def drawing_from(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """A context in which the generators continue from these states; behind it from where they were."""
    with torch.random.fork_rng([device] if len(states) > 1 else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield


def training_modes(net: nn.Module) -> tuple[bool, ...]:
    """List of each submodule whether it is in training mode."""
    return tuple(module.training for module in net.modules())


# Nets whose last run drew no random numbers, and the modes that it ran in.
_drew_nothing: weakref.WeakKeyDictionary[nn.Module, tuple[bool, ...]] = weakref.WeakKeyDictionary()


def states_before(net: nn.Module, device: torch.device) -> list[Tensor] | None:
    """Read the generators for :meth:`RunState.after`; None if the net's output is known to depend on its input alone.

    It is known by the net's modules and what it states; while a CUDA graph is captured, in which nobody can look
    whether it draws random numbers, also since it drew none when it ran last.
    """
    if is_deterministic(net) or (is_capturing(device) and _drew_nothing.get(net) == training_modes(net)):
        return None
    return generator_states(device)


_Buffers = dict[str, tuple[int, int, Tensor]]


def _buffers(net: nn.Module) -> _Buffers:
    """The net's buffers with their ids and versions, all of which are equal if nothing has been changed."""
    found = net.named_buffers()
    return {name: (id(buffer), 0 if buffer.is_inference() else buffer._version, buffer) for name, buffer in found}


def _changed(before: _Buffers, after: _Buffers) -> list[str]:
    """The names of those that are others, or were written to."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


@dataclass(frozen=True)
class RunState:
    """All that a run of a net depended on besides its arguments and parameters."""

    modes: tuple[bool, ...]  # between forward and backward the net may have been put into evaluation
    device: torch.device
    generators: list[Tensor] | None  # their states before the run; None if it drew no random numbers
    buffers: _Buffers  # which a repetition must find as they were
    autocast: Callable[[], contextlib.AbstractContextManager[None]]  # makes the context that it ran in
    sums: Tensor | None  # of the output, (N, 2); None if the net is known to repeat

    @classmethod
    def after(cls, net: nn.Module, before: list[Tensor] | None, output: Tensor) -> RunState:
        """Note the state of a run that has just given an output, with :func:`states_before` it."""
        device, modes, sums = output.device, training_modes(net), None
        if before is not None:
            sums = output_sums(output)
            if all(map(torch.equal, before, generator_states(device))):
                _drew_nothing[net], before = modes, None
            else:
                _drew_nothing.pop(net, None)
        return cls(modes, device, before, _buffers(net), captured_autocast(device.type), sums)

    @contextlib.contextmanager
    def restored(self, net: nn.Module) -> Iterator[None]:
        """A context in which a run of the net repeats the one of this state.

        A buffer of the net that is not what it was in that run, or is changed by this one, is refused.
        """
        modules, now = list(net.modules()), training_modes(net)
        changed = _changed(self.buffers, _buffers(net))
        expected = "the buffers that its forward ran with, as it is run again in the backward"
        expect(not changed, "net", expected, f"{changed} changed since")
        switched = now != self.modes
        draws = contextlib.nullcontext() if self.generators is None else drawing_from(self.generators, self.device)
        with self.autocast(), draws:
            try:
                if switched:
                    _set_modes(modules, self.modes)
                yield
            finally:
                if switched:
                    _set_modes(modules, now)
        changed = _changed(self.buffers, _buffers(net))
        expected = "buffers that a run leaves as they are (it runs twice, maybe in chunks); .eval() it"
        expect(not changed, "net", expected, f"{changed} changed")


def _set_modes(modules: list[nn.Module], modes: tuple[bool, ...]) -> None:
    for module, mode in zip(modules, modes, strict=True):
        module.training = mode


def output_sums(net_out: Tensor) -> Tensor:
    """Sum the output and its square per sample, (N, 2), float64, to tell an output from another one."""
    flat = net_out.detach().flatten(1).double()
    return torch.stack([flat.sum(1), flat.square().sum(1)], dim=1)


def check_repeated(before: Tensor, again: Tensor, what: str = "net") -> None:
    """Refuse a net whose output has another sum than it had in the forward.

    Rounding changes the sum of n values by about eps sqrt(n) of their size, other random numbers by about sqrt(n): a
    hundredth tells them apart. Where reading a value would stop a stream, nothing is read.
    """
    if can_read(before):
        differs = (again[:, 0] - before[:, 0]).abs() > REPEAT_TOLERANCE * before[:, 1].maximum(again[:, 1]).sqrt()
        samples = differs.nonzero().flatten().tolist()
        expected = (
            "the same output when it is run again in the backward (random numbers of torch's default generators, from "
            "which no other thread draws meanwhile)"
        )
        expect(not samples, what, expected, f"another one in samples {samples[:8]}")
