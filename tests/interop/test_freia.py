"""The adapters for FrEIA against FrEIA itself: numbers, weights, calls."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
from typing import Any

import FrEIA.modules as Theirs
import pytest
import torch
from support.freia_cases import (
    AIO,
    ALL_IN_ONE,
    CASES,
    CLAMPS,
    OTHERS,
    Case,
    build,
    fully_connected,
    inputs,
    known_net,
    pair,
    results,
    run,
)
from support.helpers import assert_close, assert_kernel_close, jacobian, log_abs_det
from torch import nn

import pyglow_fast.interop.freia as Ours
from pyglow_fast import functional

IDS = [case.id for case in CASES]
RTOL = 1e-10
ADAPTED = [own.__name__ for own in Ours.OURS]


@pytest.mark.full
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "rev"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equal_in_float64(case: Case, rev: bool) -> None:
    theirs, ours = pair(case)
    x, c = inputs(case)
    if rev:
        x = run(theirs, x, c, False)[0].detach()
    expected = results(theirs, x.clone(), c, rev) if "Haar" not in case.name else results_of_a_copy(theirs, x, c, rev)
    got = results(ours, x, c, rev)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        largest = max(1.0, float(value.detach().abs().max()))
        assert float((got[name] - value).detach().abs().max()) <= RTOL * largest, name


class _OnACopy(nn.Module):
    """FrEIA's Haar layers change what they are given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any, **options: Any) -> Any:
        return self.layer([x[0].clone()], **options)


def results_of_a_copy(layer: nn.Module, x: torch.Tensor, c: list[torch.Tensor], rev: bool) -> Any:
    return results(_OnACopy(layer), x, c, rev)


@pytest.mark.full
@pytest.mark.parametrize("rev", [False, True], ids=["forward", "rev"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_as_exact_in_float32(case: Case, rev: bool) -> None:
    # Moderate nets: where a block amplifies its roundings a thousandfold, whose are larger is chance.
    case = dataclasses.replace(case, spread=min(case.spread, 0.15))
    theirs, ours = pair(case, torch.float32)
    exact_layer = build(Theirs, case).double()
    exact_layer.load_state_dict({name: value.double() for name, value in theirs.state_dict().items()})
    exact_layer.init_on_next_batch = False
    x, c = inputs(case, torch.float32)
    if rev:
        x = run(theirs, x, c, False)[0].detach()
    call = results if "Haar" not in case.name else results_of_a_copy
    plain = call(theirs, x, c, rev)
    exact = call(exact_layer, x.double(), [value.double() for value in c], rev)
    got = results(ours, x, c, rev)
    # Sums that may cancel: gradients over positions and samples, and the log-det over all values of a sample.
    terms = float(x[0].numel()) ** 0.5 * max(1.0, float(exact["output"].detach().abs().max()))
    for name, value in exact.items():
        assert_kernel_close(got[name], plain[name], value, terms)


@pytest.mark.full
@pytest.mark.parametrize("case", ALL_IN_ONE[:14] + CLAMPS + OTHERS, ids=lambda case: case.id)
def test_the_log_det_is_that_of_the_jacobian(case: Case) -> None:
    _, ours = pair(case)
    x, _ = inputs(case, n=2)
    z, log_det = run(ours, x, [], False)
    expected = log_abs_det(jacobian(lambda x: run(ours, x, [], False)[0], x))
    assert_close(torch.as_tensor(log_det, dtype=x.dtype).expand(2).clone(), expected, 100.0)
    back, log_det_back = run(ours, z, [], True)
    assert_close(back, x, 100.0)
    assert_close(torch.as_tensor(log_det_back, dtype=x.dtype).expand(2).clone(), -expected, 100.0)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_same_weights_from_the_same_draws(case: Case) -> None:
    theirs, ours = build(Theirs, case), build(Ours, case)
    first, second = theirs.state_dict(), ours.state_dict()
    assert list(first) == list(second)
    for name, value in first.items():
        assert torch.equal(second[name], value), name
        assert second[name].dtype == value.dtype
    assert [p.requires_grad for p in theirs.parameters()] == [p.requires_grad for p in ours.parameters()]
    assert isinstance(ours, type(theirs))
    assert ours.output_dims([case.dims]) == theirs.output_dims([case.dims])
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(pair(case, torch.float32)[1].state_dict())  # ours, randomised, back into theirs
    x, c = inputs(case, torch.float32)
    theirs.init_on_next_batch = False
    assert run(theirs, x, c, False)[0].isfinite().all()


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_copies(case: Case) -> None:
    _, ours = pair(case)
    x, c = inputs(case)
    expected = run(ours, x, c, False)[0]
    stream = io.BytesIO()
    torch.save(ours, stream)
    stream.seek(0)
    duplicates = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(stream, weights_only=False)]
    for duplicate in duplicates:
        assert_close(run(duplicate, x, c, False)[0], expected)
        with torch.no_grad():
            for parameter in duplicate.parameters():
                parameter.zero_()
    assert_close(run(ours, x, c, False)[0], expected)


@pytest.mark.parametrize("name", ADAPTED)
def test_signatures(name: str) -> None:
    theirs, ours = getattr(Theirs, name), getattr(Ours, name)
    for method in ("__init__", "forward"):
        first = inspect.signature(getattr(theirs, method)).parameters
        second = inspect.signature(getattr(ours, method)).parameters
        assert list(second)[: len(first)] == list(first)
        for key, parameter in first.items():
            default = second[key].default
            same = default == parameter.default or (parameter.default == [] and default == ())
            assert same or parameter.default is None, key


def test_every_other_name_is_theirs() -> None:
    assert Ours.GINCouplingBlock is Theirs.GINCouplingBlock
    names: dict[str, Any] = {}
    exec("from pyglow_fast.interop.freia import *", names)
    assert all(name in names for name in Theirs.__all__)
    assert names["AllInOneBlock"] is Ours.AllInOneBlock
    with pytest.raises(AttributeError, match="NoSuchBlock"):
        _ = Ours.NoSuchBlock


def test_jac_and_rev_by_position() -> None:
    for case in (Case(AIO, (6, 4, 4)), Case("GLOWCouplingBlock", (6, 4, 4)), Case("AffineCouplingOneSided", (6,))):
        theirs, ours = pair(case)
        x, _ = inputs(case)
        for layer in (theirs, ours):
            (out,), log_det = layer((x,), [], True, False)
            assert isinstance(layer((x,), [], True, False)[0], tuple)
            assert log_det.shape == (3,)
            assert_close(out, run(theirs, x, [], True)[0])


@pytest.mark.parametrize("case", ALL_IN_ONE[:14], ids=lambda case: case.id)
def test_step_parts_are_the_block(case: Case) -> None:
    _, ours = pair(case)
    x, _ = inputs(case)
    before, net, spec, after, after_inverse = Ours.step_parts(ours)
    u, total = x, 0.0
    if before is not None:
        u = functional.channel_mix(u, before.matrix, before.offset, index=before.source)
        total = before.log_det * 24
    y, log_det = functional.coupling(u, net(u[:, : ours.splits[0]]), spec)
    z = functional.channel_mix(y, after.matrix, after.offset, index=after.source)
    expected, expected_log_det = run(ours, x, [], False)
    assert_close(z, expected, 10.0)
    assert_close(log_det + after.log_det * 24 + total, expected_log_det, 10.0)
    back = functional.channel_mix(z, after_inverse.matrix, after_inverse.offset, index=after_inverse.source)
    assert_close(back, y, 100.0)
    assert_close(after.log_det, log_abs_det(after.as_product().matrix), 10.0)
    hard = not case.options.get("permute_soft") and not case.options.get("learned_householder_permutation")
    assert (after.source is not None) == hard
    assert (net.halo is None) == case.options.get("gin_block", False)
    mine, blocks = (set(map(id, part.parameters())) for part in (net, ours.subnet))
    assert mine == blocks
    with pytest.raises(TypeError, match="AllInOneBlock"):
        Ours.step_parts(build(Theirs, case))


def test_step_parts_with_a_condition() -> None:
    case = Case(AIO, (6, 4, 4), c=(2,), net=known_net)
    _, ours = pair(case)
    x, c = inputs(case)
    _, net, spec, after, _ = Ours.step_parts(ours)
    z, _ = functional.coupling_mix(x, net(x[:, :3], c[0]), after.matrix, after.offset, spec, after.source)
    assert_close(z, run(ours, x, c, False)[0])


@pytest.mark.parametrize(
    "case",
    [Case(AIO, (5, 4, 6), net=known_net), Case("GLOWCouplingBlock", (5, 4, 6)), Case("ActNorm", (3, 4, 5)),
     Case("NICECouplingBlock", (6,)), Case("IRevNetDownsampling", (3, 4, 6)), Case("HaarUpsampling", (12, 2, 3))],
    ids=lambda case: case.id,
)  # fmt: skip
def test_adopting_a_live_layer(case: Case) -> None:
    theirs, _ = pair(case)
    x, c = inputs(case)
    expected, log_det = run(theirs, x.clone(), c, False)  # FrEIA's Haar layers change their input
    parameters = list(theirs.parameters())
    assert Ours.adopt(nn.Sequential(nn.Identity(), theirs)) == ["1"]
    assert type(theirs) is getattr(Ours, case.name)
    assert all(a is b for a, b in zip(theirs.parameters(), parameters, strict=True))
    for actual, value in zip(run(theirs, x, c, False), (expected, log_det), strict=True):
        assert_close(torch.as_tensor(actual), torch.as_tensor(value), 10.0)
    assert Ours.adopt(theirs) == []
    assert Ours.release(theirs) == [""]
    assert type(theirs) is getattr(Theirs, case.name)
    assert_close(run(theirs, x.clone(), c, False)[0], expected, 10.0)
    assert Ours.adopt(nn.Linear(2, 2)) == []


def test_our_executor_runs_known_nets(monkeypatch: pytest.MonkeyPatch) -> None:
    if not functional.net_as_products(torch.zeros(1, 6, 4, 4).double()):
        pytest.skip("no extension, or PYGLOW_NETS says otherwise")
    seen: list[int] = []
    real = functional.net_chain

    def counting(*args: Any, **options: Any) -> torch.Tensor:
        seen.append(1)
        return real(*args, **options)

    monkeypatch.setattr(functional, "net_chain", counting)
    for name, runs in ((AIO, 1), ("GLOWCouplingBlock", 2), ("AffineCouplingOneSided", 1), ("NICECouplingBlock", 2)):
        case = Case(name, (6, 4, 4), net=known_net, c=(2,))
        _, ours = pair(case)
        seen.clear()
        run(ours, *inputs(case), False)
        assert len(seen) == runs, name


def test_a_wide_vector_follows_its_permutation() -> None:
    """What is gathered is looked up anew when the matrix has changed, also behind the version counter."""
    case = Case(AIO, (300,), net=fully_connected)
    theirs, ours = pair(case)
    x, _ = inputs(case)
    run(ours, x, [], False)
    for soft in (False, True):
        other = torch.linalg.qr(torch.randn(300, 300, dtype=x.dtype)).Q if soft else torch.eye(300, dtype=x.dtype)
        other = other[torch.randperm(300)]
        for layer in (theirs, ours):
            layer.w_perm.data.copy_(other)
            layer.w_perm_inv.data.copy_(other.T)
        for rev in (False, True):
            assert_close(run(ours, x, [], rev)[0], run(theirs, x, [], rev)[0], 10.0)
