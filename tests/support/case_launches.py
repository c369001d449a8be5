"""What the cases of `bench kernels` launch on a GPU, told by the emulator, which runs none of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import CHANNELS_LAST, Case
from pyglow_fast import functional
from pyglow_fast.reference import CouplingSpec
from support.emulator import MAPS, ORDERS, Launch
from support.gather_emulator import Gather
from support.launch_cases import AllKernels

SCALE_MAPS = {index: name for name, index in MAPS.items() if name != "scaled_sigmoid"} | {
    MAPS["scaled_sigmoid"]: "sigmoid"
}
ORDER_NAMES = {index: name for name, index in ORDERS.items()}


class Recorded(NamedTuple):
    """One launch, the bytes of its arguments, and the tensors that it may touch.

    Each of ``tensors`` is (identity, first byte, byte behind the last). A tensor that the emulator made in place of an
    op's result has the identity of the result.
    """

    launch: Launch
    parameters: bytes
    tensors: list[tuple[int, int, int]]
    indices: list[Tensor]


class CaseLaunches(NamedTuple):
    """The launches of a case: of our kernels in order, and torch's own ops with the bytes that each moves."""

    ours: list[Recorded]
    others: list[tuple[str, int]]


class _Calls(TorchDispatchMode):
    """Keeps the ops that are run: ours, and torch's that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: list[tuple[str, tuple[Any, ...], object]] = []
        self.others: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        if namespace == "pyglow_fast":
            self.ours.append((name, args, result))
        elif not func.is_view and not name.startswith(("empty", "new_empty", "detach", "alias")):
            tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
            self.others.append((func.name(), sum(value.nbytes for value in tensors)))
        return result


def _spec(map_: int, order: int, bias: float, eps: float, clamp: float, factor: float) -> CouplingSpec:
    spec = CouplingSpec(bias=bias, eps=eps, clamp=clamp, factor=factor)
    if map_ == 0:
        return spec._replace(coupling="additive")
    return spec._replace(order=ORDER_NAMES[order], scale_map=SCALE_MAPS[map_])


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2)


class _Player:
    """Calls the emulator as the bindings call pyglow::cuda."""

    def __init__(self, emulator: AllKernels) -> None:
        self.e = emulator

    def channel_mix(
        self, x: Tensor, matrix: Tensor, offset: Tensor, first: bool, squeeze: int, index: Tensor | None = None
    ) -> object:
        given = x if squeeze == 1 else _flat(x)
        out = x.new_empty(x.shape[0], x.shape[1] // 4, *(2 * size for size in x.shape[2:])) if squeeze == 2 else None
        if index is None:
            return self.e.channel_mix(given, matrix, offset, first, out)
        gather = Gather(matrix, index, None if first else offset, offset if first else None)
        return self.e.gather(given, gather, out=out)

    def channel_mix_backward(
        self,
        x: Tensor,
        grad_u: Tensor,
        matrix: Tensor,
        center: Tensor | None,
        added: Tensor | None,
        squeezes: bool,
        index: Tensor | None = None,
    ) -> object:
        given, grad_x = (x, torch.empty_like(x)) if squeezes else (_flat(x), None)
        more = None if added is None else _flat(added)
        if index is None:
            return self.e.channel_mix_backward(given, _flat(grad_u), matrix, center, more, grad_x)
        return self.e.gather_backward(given, Gather(matrix, index, None, center), _flat(grad_u), more, grad_in=grad_x)

    def coupling(self, x: Tensor, net_out: Tensor, map_: int, order: int, inverse: bool, *rest: float) -> object:
        return self.e.coupling(_flat(x), _flat(net_out), _spec(map_, order, *rest), inverse)

    def coupling_backward(
        self,
        out: Tensor,
        net_out: Tensor,
        grad_out: Tensor,
        grad_log_det: Tensor,
        map_: int,
        order: int,
        inverse: bool,
        *rest: Any,
    ) -> object:
        *parameters, want = rest
        spec = _spec(map_, order, *parameters)
        return self.e.coupling_backward(_flat(out), _flat(net_out), _flat(grad_out), grad_log_det, spec, inverse, want)

    def coupling_mix(
        self,
        x: Tensor,
        net_out: Tensor,
        matrix: Tensor,
        offset: Tensor,
        map_: int,
        order: int,
        inverse: bool,
        *rest: Any,
    ) -> object:
        bias, eps, clamp, factor, index = (*rest, None)[:5]
        spec = _spec(map_, order, bias, eps, clamp, factor)
        if index is None:
            return self.e.coupling_mix(_flat(x), _flat(net_out), matrix, offset, spec, inverse)
        gather = Gather(matrix, index, None if inverse else offset, offset if inverse else None)
        return self.e.gather(_flat(x), gather, _flat(net_out), spec, inverse)

    def coupling_mix_backward(
        self,
        x: Tensor,
        net_out: Tensor,
        grad_out: Tensor,
        grad_log_det: Tensor,
        matrix: Tensor,
        map_: int,
        order: int,
        *rest: Any,
    ) -> object:
        bias, eps, clamp, factor, added, index = (*rest, None)[:6]
        spec, more = _spec(map_, order, bias, eps, clamp, factor), None if added is None else _flat(added)
        given = (_flat(x), _flat(net_out), _flat(grad_out))
        if index is None:
            return self.e.coupling_mix_backward(*given, grad_log_det, matrix, spec, more)
        return self.e.gather_backward(given[0], Gather(matrix, index), given[2], more, given[1], grad_log_det, spec)

    def step_backward(
        self,
        y: Tensor,
        net_out: Tensor,
        grad_y: Tensor,
        grad_log_det: Tensor,
        matrix: Tensor,
        offset: Tensor,
        map_: int,
        order: int,
        *rest: Any,
    ) -> object:
        bias, eps, clamp, factor, index = (*rest, None)[:5]
        spec = _spec(map_, order, bias, eps, clamp, factor)
        given = (_flat(y), _flat(net_out), _flat(grad_y), grad_log_det)
        if index is None:
            return self.e.step_backward(*given, matrix, offset, spec)
        gather = Gather(matrix, index, None, offset)
        return self.e.step_gather_backward(given[0], gather, *given[1:], spec)

    def channel_moments(self, x: Tensor) -> object:
        return self.e.channel_moments(_flat(x))

    def gaussian_log_prob(self, z: Tensor, mean: Tensor, log_sd: Tensor) -> object:
        return self.e.gaussian_log_prob(_flat(z), _flat(mean), _flat(log_sd))

    def gaussian_log_prob_backward(self, z: Tensor, mean: Tensor, log_sd: Tensor, grad: Tensor) -> object:
        return self.e.gaussian_log_prob_backward(_flat(z), _flat(mean), _flat(log_sd), grad)

    def gaussian_sample(self, noise: Tensor, mean: Tensor, log_sd: Tensor) -> object:
        return self.e.gaussian_sample(_flat(noise), _flat(mean), _flat(log_sd))


def _tensors(values: object) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def case_launches(case: Case, emulator: AllKernels) -> CaseLaunches:
    """Run a case on the CPU, and have the emulator tell what each of its ops would launch.

    Addresses are those of this process, which lie on multiples of 64 bytes, on a GPU on multiples of 512.

    Raises:
        NotImplementedError: the case runs an op of ours that is not known here.
    """
    run, calls = case.build(functional, False), _Calls()
    with calls:
        results = run()
    player, recorded = _Player(emulator), []
    alive: list[object] = [results]  # so that no two tensors have the same address
    emulator.only_recorded = True
    emulator.net_layout = "channels_last" if case.op.endswith(CHANNELS_LAST) else None
    for name, arguments, result in calls.ours:
        play = getattr(player, name, None)
        if play is None:
            raise NotImplementedError(f"{case.name}: expected an op that {__name__} has the emulator run, found {name}")
        made = play(*arguments)
        alive += [result, made]
        tensors = [(x.data_ptr(), x) for x in _tensors(arguments)] + _identities(made, result)
        ranges = [(key, x.data_ptr(), x.data_ptr() + x.nbytes) for key, x in tensors if x.nbytes]
        indices = [x for _, x in tensors if x.dtype == torch.int64]
        for at, launch in enumerate(emulator.launches()):
            recorded.append(Recorded(launch, emulator.parameters(at), list(dict.fromkeys(ranges)), indices))
    return CaseLaunches(recorded, calls.others)


def _identities(made: object, result: object) -> list[tuple[int, Tensor]]:
    left = list(_tensors(result))
    found = []
    for tensor in _tensors(made):
        same = next((x for x in left if (x.numel(), x.dtype) == (tensor.numel(), tensor.dtype)), tensor)
        left = [x for x in left if x is not same]
        found.append((same.data_ptr(), tensor))
    return found
