"""What was found out about steps is believed as long as each of their modules holds the same, and no longer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyglow_fast as pgf
from pyglow_fast._backend import extension
from pyglow_fast.coupling_nets.checkerboard import Checkerboard
from pyglow_fast.layers import folded
from pyglow_fast.layers import known_steps as known_module
from pyglow_fast.layers.known_steps import KnownSteps

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.skipif(extension() is None, reason="without the extension nothing is believed")


def steps(**options: Any) -> pgf.ReversibleSequence:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 5, **options) for _ in range(3)])
    for step in sequence:
        nn.init.normal_(step.coupling.net.conv3.weight, std=0.2)
    sequence.initialize(X)
    return sequence.eval()


@torch.no_grad()
def run(sequence: pgf.ReversibleSequence) -> tuple[Tensor, ...]:
    z, log_det = sequence(X)
    return z, log_det, *sequence.inverse(z)


def known(sequence: pgf.ReversibleSequence) -> KnownSteps | None:
    found: KnownSteps | None = sequence._cache.known(sequence._modules)
    return found


def known_steps(**options: Any) -> pgf.ReversibleSequence:
    sequence = steps(**options)
    run(sequence)
    run(sequence)
    assert known(sequence) is not None
    return sequence


OPTIONS = [{}, {"net_actnorm": True}, {"permutation": "invconv_plain"}, {"permutation": "reverse"}]


@pytest.mark.parametrize("options", [*OPTIONS, {"mask": "checkerboard"}, {"coupling": "additive"}], ids=str)
def test_the_same_numbers_without_a_look_at_modules(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = steps(**options)
    first = run(sequence)
    run(sequence)

    def looked(*_: object) -> None:
        raise AssertionError("modules are looked at")

    monkeypatch.setattr(folded, "_tensors", looked)
    monkeypatch.setattr(pgf.ReversibleSequence, "is_fused", property(looked))
    assert all(map(torch.equal, run(sequence), first))


class Doubled(pgf.CouplingNet):
    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return 2.0 * super().forward(x, cond)


def hook(*_: object) -> None:
    return None


def on_a_step(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].register_forward_hook(hook)


def on_an_actnorm(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].actnorm.register_forward_pre_hook(hook)


def on_a_coupling(sequence: pgf.ReversibleSequence) -> None:
    sequence[2].coupling.register_full_backward_hook(hook)


def on_a_convolution(sequence: pgf.ReversibleSequence) -> None:
    sequence[0].coupling.net.conv2.register_full_backward_pre_hook(hook)


def in_a_new_dictionary(sequence: pgf.ReversibleSequence) -> None:
    sequence[0].permutation._forward_hooks = OrderedDict()


def forward_of_its_own(sequence: pgf.ReversibleSequence) -> None:
    net = sequence[1].coupling.net
    net.forward = lambda x, cond=None: 0.5 * pgf.CouplingNet.forward(net, x, cond)


def another_class(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].coupling.net.__class__ = Doubled


def attributes_of_its_own(sequence: pgf.ReversibleSequence) -> None:
    coupling = sequence[1].coupling
    coupling.__dict__ = {**vars(coupling), "spec": coupling.spec._replace(bias=1.0)}


def another_scale(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].coupling.spec = sequence[1].coupling.spec._replace(bias=1.0)


def another_precision(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].coupling.precision = "bf16"


def another_parameter(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].actnorm.bias = nn.Parameter(sequence[1].actnorm.bias.detach() + 0.1)


def exchanged(sequence: pgf.ReversibleSequence) -> None:
    """Two parameters of one shape and their modules: each is where it was, under the other's name."""
    held = sequence[1].actnorm._parameters
    held["log_scale"], held["bias"] = held["bias"], held["log_scale"]


def renamed(sequence: pgf.ReversibleSequence) -> None:
    """In their order, under each other's names."""
    held = sequence[1].actnorm._parameters
    first, second = held.pop("log_scale"), held.pop("bias")
    held["bias"], held["log_scale"] = first, second


def plain_tensor(sequence: pgf.ReversibleSequence) -> None:
    conv = sequence[2].coupling.net.conv3
    weight = 0.5 * conv.weight.detach()
    del conv.weight
    conv.weight = weight


def parametrized(sequence: pgf.ReversibleSequence) -> None:
    nn.utils.parametrizations.weight_norm(sequence[1].coupling.net.conv1)
    with torch.no_grad():
        sequence[1].coupling.net.conv1.parametrizations.weight.original0.mul_(2.0)


def another_net(sequence: pgf.ReversibleSequence) -> None:
    sequence[0].coupling.net = nn.Conv2d(2, 4, 1)


def another_step(sequence: pgf.ReversibleSequence) -> None:
    sequence._modules["1"] = steps()[0]


def fewer_steps(sequence: pgf.ReversibleSequence) -> None:
    del sequence._modules["2"]


def in_another_order(sequence: pgf.ReversibleSequence) -> None:
    sequence._modules["0"], sequence._modules["2"] = sequence._modules["2"], sequence._modules["0"]


def another_index(sequence: pgf.ReversibleSequence) -> None:
    layer = sequence[1].permutation
    layer.permutation = layer.permutation.flip(0)


def another_parity(sequence: pgf.ReversibleSequence) -> None:
    sequence[1].coupling.board = Checkerboard(1)


CHANGES = [
    on_a_step,
    on_an_actnorm,
    on_a_coupling,
    on_a_convolution,
    in_a_new_dictionary,
    forward_of_its_own,
    another_class,
    attributes_of_its_own,
    another_scale,
    another_precision,
    another_parameter,
    exchanged,
    renamed,
    plain_tensor,
    parametrized,
    another_net,
    another_step,
    fewer_steps,
    in_another_order,
    another_index,
]


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_believed_after_a_change(change: Callable[[pgf.ReversibleSequence], None]) -> None:
    sequence = known_steps()
    change(sequence)
    assert known(sequence) is None
    found = run(sequence)
    sequence._cache.clear()
    assert all(map(torch.equal, run(sequence), found))


def test_nothing_is_believed_with_another_parity() -> None:
    sequence = known_steps(mask="checkerboard")
    another_parity(sequence)
    assert known(sequence) is None


def test_nothing_is_believed_with_a_hook_for_all_modules() -> None:
    sequence, calls = known_steps(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        run(sequence)
    finally:
        handle.remove()
    assert pgf.CouplingNet in calls


@pytest.mark.parametrize("part", ["step", "net"])
def test_a_hook_that_comes_later_is_called(part: str) -> None:
    sequence, calls = known_steps(), []
    step = sequence[1]
    module = {"step": step, "net": step.coupling.net}[part]
    handle = module.register_forward_hook(lambda *_: calls.append(part))
    run(sequence)
    assert calls
    handle.remove()
    calls.clear()
    for _ in range(2):
        run(sequence)
    assert not calls


def test_writes_are_noticed_by_those_that_are_known() -> None:
    sequence = known_steps()
    before = run(sequence)
    sequence[0].coupling.net.conv3.weight.data[0, 0, 0, 0] += 0.5
    found = run(sequence)
    assert known(sequence) is not None
    assert not torch.equal(found[0], before[0])
    sequence._cache.clear()
    assert all(map(torch.equal, run(sequence), found))


def test_gradients_are_recorded() -> None:
    sequence = known_steps()
    z, _ = sequence(X)
    assert z.requires_grad
    x, _ = sequence.inverse(z.detach())
    assert x.requires_grad


@pytest.mark.parametrize("how", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_know_nothing(how: Callable[[pgf.ReversibleSequence], pgf.ReversibleSequence]) -> None:
    other = how(known_steps())
    assert known(other) is None


def same_as_anew(sequence: pgf.ReversibleSequence) -> bool:
    return all(map(torch.equal, run(sequence), run(copy.deepcopy(sequence))))


def test_a_shallow_copy_has_steps_of_its_own() -> None:
    sequence = known_steps()
    other = copy.copy(sequence)
    other._modules = {**sequence._modules, "1": steps()[1]}
    for which in (other, sequence, other):
        assert same_as_anew(which)


def test_modules_in_a_new_dictionary_are_seen() -> None:
    sequence = known_steps()
    sequence._modules = {**sequence._modules, "1": steps()[1]}
    assert same_as_anew(sequence)


def test_an_order_that_changes_in_place_is_seen() -> None:
    """As of modules that torch of former years has pickled."""
    sequence = steps()
    sequence._modules = OrderedDict(sequence._modules)
    run(sequence)
    run(sequence)
    sequence._modules.move_to_end("0")
    assert same_as_anew(sequence)


def by_another_thread(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, change: Callable[[], None], first: bool
) -> None:
    """Let a change happen before or behind the first call of a function, as another thread may make it."""
    found, changes = getattr(where, name), [change]

    def call(*arguments: Any) -> Any:
        if first and changes:
            changes.pop()()
        result = found(*arguments)
        if changes:
            changes.pop()()
        return result

    monkeypatch.setattr(where, name, call)


@pytest.mark.full
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", [(KnownSteps, "of"), (known_module, "_is_known"), (known_module, "couplings_of")])
@pytest.mark.parametrize("change", [on_a_step, another_parameter, another_net, another_step, another_scale])
def test_changes_while_steps_are_looked_at(
    change: Callable[[pgf.ReversibleSequence], None],
    where: tuple[Any, str],
    first: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequence = steps()
    run(sequence)
    sequence._cache.clear()
    with torch.no_grad():
        sequence(X)
        by_another_thread(monkeypatch, *where, lambda: change(sequence), first)
        sequence(X)
    monkeypatch.undo()
    assert same_as_anew(sequence)


@pytest.mark.full
def test_what_is_kept_no_longer_is_freed() -> None:
    sequence = known_steps()
    former = weakref.ref(sequence._cache._kept.folded)  # type: ignore[union-attr]
    sequence[0].actnorm.bias.data += 0.5
    run(sequence)
    gc.collect()
    assert former() is None
    with sequence.folded():
        run(sequence)
        run(sequence)
        inside = weakref.ref(sequence._cache._kept.folded)  # type: ignore[union-attr]
    gc.collect()
    assert inside() is None


@pytest.mark.parametrize("net", [nn.Conv2d(2, 4, 1), Doubled(2, 4, 5)], ids=lambda net: type(net).__name__)
def test_steps_with_other_nets_are_looked_at_each_time(net: nn.Module) -> None:
    sequence = steps()
    sequence[2].coupling.net = net
    run(sequence)
    run(sequence)
    assert known(sequence) is None


def test_fresh_steps_are_looked_at_each_time() -> None:
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, 5)]).eval()
    run(sequence)
    run(sequence)
    assert known(sequence) is None


def test_entries_are_told_by_identity_and_order() -> None:
    module: Any = extension()
    one, other = [1.5], [1.5]
    held = {"a": one, "b": other}
    dicts = ((held, ("a", one, "b", other)),)
    assert module.same_entries((), dicts)
    assert not module.same_entries((), ((held, ("a", other, "b", other)),))
    assert not module.same_entries((), ((held, ("a", one)),))
    assert not module.same_entries((), ((held, ("b", other, "a", one)),))
    assert not module.same_entries((), ((held, ("a", one, "c", other)),))
    held["c"] = one
    assert not module.same_entries((), dicts)


def test_objects_are_told_by_class_and_attributes() -> None:
    class First:
        pass

    class Second:
        pass

    module: Any = extension()
    thing, value = First(), [1.5]
    thing.value = value  # type: ignore[attr-defined]
    known = ((thing, First, ("value", value)),)
    assert module.same_entries(known, ())
    thing.__class__ = Second  # type: ignore[assignment]
    assert not module.same_entries(known, ())
    thing.__class__ = First
    thing.__dict__ = {"value": [1.5]}
    assert not module.same_entries(known, ())
