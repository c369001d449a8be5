"""A live model of another library made ours in place: the same outputs and gradients, less memory, and back again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.distributions
import nflows.flows
import nflows.transforms
import normflows
import pytest
import torch
from support.accelerate_cases import (
    CASES,
    MEMORIES,
    freia_loss,
    from_freia,
    from_nflows,
    from_normflows,
    gradients,
    images,
    nflows_loss,
    noisy,
    normflows_loss,
    prepared,
    subnet,
)
from torch import Tensor, nn

from bench.memory_meter import MemoryMeter
from pyglow_fast.interop import accelerate


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_same(name: str, memory: str | None) -> None:
    model, loss_of, steps = prepared(name)
    theirs = copy.deepcopy(model)
    done = accelerate(model, memory)
    assert sum(len(face.run) for face in done._faces) == (steps if memory else 0)
    ours_loss, their_loss = loss_of(model, images()), loss_of(theirs, images())
    torch.testing.assert_close(ours_loss, their_loss, rtol=1e-10, atol=1e-10)
    found, wanted = gradients(model, ours_loss), gradients(theirs, their_loss)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    if memory == "reversible":
        assert all(report["passes"] == 1 for report in done.memory_report())


@pytest.mark.parametrize("memory", [None, "reversible"])
@pytest.mark.parametrize(
    "name",
    [
        "normflows",
        "nflows",
        "nflows alternating",
        "nflows alternating, two runs",
        "FrEIA",
        "FrEIA reverse householder",
    ],
)
def test_inverses(name: str, memory: str | None) -> None:
    model, _, _ = prepared(name)
    theirs = copy.deepcopy(model).eval()
    accelerate(model.eval(), memory)
    x = images()
    with torch.no_grad():
        if name.startswith("FrEIA"):
            (z, log_det), (their_z, _) = model(x), theirs(x)
            back, inverse_log_det = model(their_z, rev=True)
            torch.testing.assert_close(z, their_z, rtol=1e-10, atol=1e-10)
        elif name.startswith("nflows"):
            z, log_det = model._transform(x)
            back, inverse_log_det = model._transform.inverse(theirs._transform(x)[0])
        else:
            z, log_det = model.inverse_and_log_det(x)
            back, inverse_log_det = model.forward_and_log_det(theirs.inverse_and_log_det(x)[0])
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", ["normflows", "nflows", "FrEIA"])
def test_an_optimizer_goes_on_and_it_is_undone(name: str, memory: str | None) -> None:
    model, loss_of, _ = prepared(name)
    theirs = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(item.parameters(), 1e-3) for item in (model, theirs)]
    classes = {key: type(module) for key, module in model.named_modules()}
    keys = list(model.state_dict())
    done = accelerate(model, memory)
    assert list(model.state_dict()) == keys
    for step in range(6):
        if step >= 4:
            done.undo()  # of nothing, the second time
            assert {key: type(module) for key, module in model.named_modules()} == classes
            assert (done.replaced, done.joined, done.left) == ({}, {}, {})
        losses = []
        for item, optimizer in zip((model, theirs), optimizers, strict=True):
            loss = loss_of(item, images())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    theirs.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["normflows", "nflows"])
def test_a_fresh_model_initialises_from_its_first_batch(name: str) -> None:
    make, loss_of, _ = CASES[name]
    torch.manual_seed(1)
    model = make().double()
    theirs = copy.deepcopy(model)
    accelerate(model, "reversible")
    for item in (model, theirs):
        loss_of(item, images(16)).backward()
    for (key, value), (_, wanted) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["normflows", "nflows", "FrEIA"])
def test_copies_and_pickles(name: str) -> None:
    model, loss_of, _ = prepared(name)
    done = accelerate(model, "reversible")
    expected = loss_of(model, images())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    torch.testing.assert_close(loss_of(twin, images()), expected, rtol=1e-12, atol=1e-12)
    done.undo()
    if name != "FrEIA":  # whose blocks hold functions that pickle does not take
        again = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(loss_of(again, images()), loss_of(model, images()))


def saved_bytes(model: nn.Module, loss_of: Callable[[Any, Tensor], Tensor], x: Tensor) -> int:
    """Of the tensors that autograd keeps for the backward, parameters left out."""
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    seen: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss_of(model, x)
    return sum(seen.values())


of_each_library = pytest.mark.parametrize(
    ("make", "loss_of"),
    [
        (lambda: from_normflows(levels=1, steps=8), normflows_loss),
        (lambda: from_freia(steps=8), freia_loss),
        (lambda: from_nflows(steps=8), nflows_loss),
    ],
    ids=["normflows", "FrEIA", "nflows"],
)


@of_each_library
def test_reversible_memory(make: Callable[[], nn.Module], loss_of: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = make(), images(32, torch.float32)
    with torch.no_grad():
        loss_of(model, x)
    before = saved_bytes(model, loss_of, x)
    accelerate(model, "reversible")
    assert saved_bytes(model, loss_of, x) < before / 5


def test_the_report() -> None:
    model, _, _ = prepared("normflows leaky")
    done = accelerate(model, "store")
    text = str(done)
    assert "GlowBlock" in done.replaced["flows.0.0"]
    assert not any("net runs as it is" in reason for reason in done.left.values())
    assert done.joined == {f"flows.{i}": "3 steps in one chain each, memory 'store'" for i in range(2)}
    assert "joined: 2" in text
    done.undo()
    model.flows[0][0].flows[0].flows[1].param_map.net[1] = nn.Softplus()
    done = accelerate(model)
    reason = done.left["flows.0.0.flows.0.flows.1.param_map"]
    assert reason.startswith("its net runs as it is: net.1: Softplus(beta=1.0, threshold=20.0): expected ")
    other = nn.Sequential(normflows.flows.Planar((4,)), nn.Linear(2, 2))
    assert accelerate(other).left == {"0": "no counterpart of Planar"}


def test_what_is_not_joined() -> None:
    """Conditions of single steps, hooks and odd masks run layer by layer."""
    conditional = Ff.SequenceINN(3, 8, 8)
    for _ in range(2):
        conditional.append(Fm.AllInOneBlock, cond=0, cond_shape=(1, 8, 8), subnet_constructor=subnet)
    assert accelerate(conditional, "reversible").joined == {}
    single, _, _ = prepared("nflows")
    layers = list(single._transform._transforms)[:4]
    assert accelerate(nflows.transforms.CompositeTransform(layers), "reversible").joined == {}
    hooked = from_normflows(levels=1, steps=3)
    hooked.flows[0][1].register_forward_hook(lambda *args: None)
    assert accelerate(hooked, "reversible").joined == {}
    assert len(accelerate(hooked).replaced) == 0  # they are ours already


@pytest.mark.parametrize(
    ("model", "memory", "message"),
    [
        (nn.Linear(2, 2), None, "model: expected layers of normflows, nflows, FrEIA, .*, found none"),
        *(
            (nn.Linear(2, 2), memory, r'memory: expected one of \("reversible", .*\) or bytes such as "4GB", found ')
            for memory in ("disk", "4XB", "", 0, -1, 0.5, float("nan"), True)
        ),
        (3, None, "model: expected a Module, found int"),
    ],
)
def test_refusals(model: Any, memory: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accelerate(model, memory)


@pytest.mark.parametrize("memory", ["4XB", "0GB", -1])
@pytest.mark.parametrize("name", ["normflows", "nflows", "FrEIA"])
def test_a_wrong_memory_changes_nothing(name: str, memory: Any) -> None:
    model, _, _ = prepared(name)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"^memory: expected one of"):
        accelerate(model, memory)
    assert [type(module) for module in model.modules()] == classes


@of_each_library
def test_within_bytes(make: Callable[[], nn.Module], loss_of: Callable[[Any, Tensor], Tensor]) -> None:
    """With room for all of it a run stores; halfway between two modes it takes less, and its gradients are theirs."""
    torch.manual_seed(0)
    theirs, x = noisy(make()), images(32)
    with torch.no_grad():
        loss_of(theirs, x)
    expected = gradients(theirs, loss_of(theirs, x))

    def measured(memory: str | int) -> tuple[int, int]:
        """Bytes that are kept for the backward, and that there are at most."""
        model = copy.deepcopy(theirs)
        accelerate(model, memory)
        kept = saved_bytes(model, loss_of, x)
        with MemoryMeter() as meter:
            found = gradients(model, loss_of(model, x))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-9)
        return kept, meter.peak

    stored, recomputed = measured("store"), measured("reversible")
    assert measured("1GB") == pytest.approx(stored, rel=1e-2)
    kept, peak = measured((stored[1] + recomputed[1]) // 2)
    assert recomputed[0] < kept < stored[0]
    assert recomputed[1] < peak < stored[1]


def test_bytes_in_the_report() -> None:
    model, _, _ = prepared("normflows leaky")
    done = accelerate(model, 4e9)
    assert done.joined == {f"flows.{i}": "3 steps in one chain each, memory '4 GB'" for i in range(2)}
    left = accelerate(model, "store").left
    assert sum("joined before, memory 4 GB" in reason for reason in left.values()) == 6
