"""State that repeats a run of a net, besides its inputs: parameters, random generators, autocast, modes, buffers."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyglow_fast._captures import is_capturing
from pyglow_fast._errors import can_read, expect
from pyglow_fast.coupling_nets.traits import is_deterministic
from pyglow_fast.reference import autocast_is_on

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
    """A context in which a net holds the given tensors for its parameters, in their order, in each of its modules.

    Mostly they are its own, and nothing is done. Others are lent to the net, by one thread at a time, since all of them
    see it.

    Raises:
        ValueError: the net has another number of parameters now.
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
def _without_autocast_cache() -> Iterator[None]:
    """Weights cast to low precision here are not remembered.

    Autocast would keep a copy of every weight until its region ends: all nets' weights at once, where one net's matter.
    In some versions of torch it also hands what was cast under no_grad to code that records, which finds no gradient.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def without_autocast_cache(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast keeps no casts of weights; nothing where autocast is off."""
    return _without_autocast_cache() if autocast_is_on(device_type) else contextlib.nullcontext()


def captured_autocast(device_type: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Capture the autocast state, on or off and dtype, to be entered later, any number of times.

    Args:
        device_type: of the net's tensors; the CPU's state is captured as well.

    Returns:
        A function that makes a context manager.
    """
    known = [name for name in dict.fromkeys((device_type, "cpu")) if torch.amp.is_autocast_available(name)]
    states = [(name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name)) for name in known]

    def enter() -> contextlib.AbstractContextManager[None]:
        changed = [state for state in states if state[2] or torch.is_autocast_enabled(state[0])]
        return _autocast(changed) if changed else contextlib.nullcontext()

    return enter


@contextlib.contextmanager
def _autocast(states: Sequence[tuple[str, torch.dtype, bool]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device_type, dtype, enabled in states:
            stack.enter_context(torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False))
        yield


@dataclass(frozen=True)
class GeneratorState:
    """The states of torch's default generators, of the CPU and, for tensors on CUDA, of their device.

    They are shared by all threads: nets that are not known to be deterministic must not run in two threads at a time.

    Attributes:
        cpu: as ``torch.get_rng_state`` gives it, 5 kB.
        device: the CUDA device, or None.
        on_device: its generator's state, a few bytes in host memory, or None.

    Examples:
        >>> import torch
        >>> from pyglow_fast.coupling_nets import GeneratorState
        >>> before = GeneratorState.capture(torch.device("cpu"))
        >>> drawn = torch.rand(2)
        >>> with before.replayed():
        ...     again = torch.rand(2)
        >>> torch.equal(drawn, again), before.moved()
        (True, True)
    """

    cpu: Tensor
    device: torch.device | None
    on_device: Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> GeneratorState:
        """Capture the present states, for nets that run on ``device``, without waiting for the device.

        Raises:
            ValueError: a CUDA graph is being captured, where the device's generator has no state to be read.
        """
        expect(
            not is_capturing(device),
            "net",
            "one of torch's modules without dropout, one that states deterministic = True, or one that drew no random "
            "numbers in a step before, to be run again within a CUDA graph",
            "another",
        )
        if device.type != "cuda":
            return cls(torch.get_rng_state(), None, None)
        return cls(torch.get_rng_state(), device, torch.cuda.get_rng_state(device))

    def moved(self) -> bool:
        """Whether random numbers have been drawn (or a seed set) since the capture."""
        now = self._now()
        if not torch.equal(self.cpu, now.cpu):
            return True
        return (
            self.on_device is not None and now.on_device is not None and not torch.equal(self.on_device, now.on_device)
        )

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """A context in which the generators continue from the captured state; behind it from where they were."""
        outside = self._now()
        self._set()
        try:
            yield
        finally:
            outside._set()

    def _now(self) -> GeneratorState:
        return self.capture(self.device or torch.device("cpu"))

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.on_device is not None and self.device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)


def training_modes(net: nn.Module) -> tuple[bool, ...]:
    """List of each submodule whether it is in training mode."""
    return tuple(module.training for module in net.modules())


# Nets whose last run drew no random numbers, and the modes that it ran in.
_drew_nothing: weakref.WeakKeyDictionary[nn.Module, tuple[bool, ...]] = weakref.WeakKeyDictionary()


def is_repeatable(net: nn.Module, device: torch.device) -> bool:
    """Whether a net's output is known to be a function of its input.

    By its modules and what it states; while a CUDA graph is captured, in which nobody can look whether it draws random
    numbers, also since it drew none when it ran last.
    """
    return is_deterministic(net) or (is_capturing(device) and _drew_nothing.get(net) == training_modes(net))


_Buffers = dict[str, tuple[Tensor, int]]


def _buffers(net: nn.Module) -> _Buffers:
    """The net's buffers and their versions."""
    return {name: (buffer, 0 if buffer.is_inference() else buffer._version) for name, buffer in net.named_buffers()}


def _changed(before: _Buffers, after: _Buffers) -> list[str]:
    """The names of those that are others, or were written to."""

    def same(name: str) -> bool:
        if name not in before or name not in after:
            return False
        (one, version), (other, now) = before[name], after[name]
        return one is other and version == now

    return sorted(name for name in before.keys() | after.keys() if not same(name))


@dataclass(frozen=True)
class RunState:
    """All that a run of a net depended on besides its arguments and parameters.

    Attributes:
        modes: of :func:`training_modes`: between forward and backward the net may have been put into evaluation.
        generators: before the run; None if it drew no random numbers.
        buffers: of the net, which a repetition must find as they were.
        autocast: makes the context that it ran in.
    """

    modes: tuple[bool, ...]
    generators: GeneratorState | None
    buffers: _Buffers
    autocast: Callable[[], contextlib.AbstractContextManager[None]]

    @classmethod
    def after(cls, net: nn.Module, before: GeneratorState | None, device: torch.device) -> RunState:
        """Note the state of a run that has just ended on ``device``, given the generators before it."""
        drew, modes = before is not None and before.moved(), training_modes(net)
        if before is not None and not drew:
            _drew_nothing[net] = modes
        elif drew:
            _drew_nothing.pop(net, None)
        return cls(modes, before if drew else None, _buffers(net), captured_autocast(device.type))

    @contextlib.contextmanager
    def restored(self, net: nn.Module) -> Iterator[None]:
        """A context in which a run of the net repeats the one of this state.

        Raises:
            ValueError: a buffer of the net is not what it was in that run (at the entry), or this run has changed one
                (at the exit): it would be, or was, no repetition.
        """
        modules, now = list(net.modules()), training_modes(net)
        changed = _changed(self.buffers, _buffers(net))
        expected = "the buffers that its forward ran with, as it is run again in the backward"
        expect(not changed, "net", expected, f"{changed} changed since")
        switched = now != self.modes
        with self.autocast(), contextlib.nullcontext() if self.generators is None else self.generators.replayed():
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

    Raises:
        ValueError: with the samples for which it has.
    """
    if can_read(before):
        differs = (again[:, 0] - before[:, 0]).abs() > REPEAT_TOLERANCE * before[:, 1].maximum(again[:, 1]).sqrt()
        samples = differs.nonzero().flatten().tolist()
        expected = (
            "the same output when it is run again in the backward (random numbers of torch's default generators, from "
            "which no other thread draws meanwhile)"
        )
        expect(not samples, what, expected, f"another one in samples {samples[:8]}")
