"""AllInOneBlocks whose permutation is hard gather their channels, alone and joined."""

from __future__ import annotations

import copy
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import pytest
import torch
from support.freia_cases import known_net
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast import functional, reference
from pyglow_fast.interop import freia
from pyglow_fast.interop.accelerate import accelerate
from pyglow_fast.interop.freia import verified

DOUBLE = torch.float64


def block_of(channels: int = 6, seed: int = 0, **options: Any) -> Fm.AllInOneBlock:
    """FrEIA's, with random global scale and offset, float64."""
    torch.manual_seed(seed)
    block = Fm.AllInOneBlock([(channels, 6, 5)], subnet_constructor=known_net, **options)
    with torch.no_grad():
        block.global_scale.add_(torch.randn_like(block.global_scale))
        block.global_offset.add_(torch.randn_like(block.global_offset))
    return block.double()


def ours_of(theirs: nn.Module) -> nn.Module:
    found = copy.deepcopy(theirs)
    freia.adopt(found)
    return found


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Gains an element for each channel map that is run as a product."""
    found: list[int] = []
    for name, place in (
        ("channel_mix", 2),
        ("channel_unmix", 2),
        ("coupling_mix", 3),
        ("coupling_mix_inverse", 3),
    ):
        true = getattr(functional, name)

        def call(*args: Any, true: Any = true, place: int = place, **options: Any) -> Any:
            if args[place - 1].dim() != 1:
                found.append(1)
            return true(*args, **options)

        monkeypatch.setattr(functional, name, call)
    probe = verified._variant

    def uncounted(*args: Any) -> Any:
        before = len(found)
        result = probe(*args)
        del found[before:]
        return result

    monkeypatch.setattr(verified, "_variant", uncounted)
    return found


OPTIONS = [{}, {"reverse_permutation": True}, {"gin_block": True}, {"global_affine_type": "SIGMOID"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_freia_without_a_product(options: dict[str, Any], products: list[int]) -> None:
    theirs = block_of(**options)
    ours = ours_of(theirs)
    results: list[list[Tensor]] = []
    for block in (theirs, ours):
        x = torch.randn(2, 6, 6, 5, generator=torch.Generator().manual_seed(1), dtype=DOUBLE).requires_grad_()
        (z,), log_det = block((x,))
        (back,), back_log_det = block((z.detach(),), rev=True)
        wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
        objective = (z.square().sum() + log_det.sum(), back.square().sum() + back_log_det.sum())
        grads = [torch.autograd.grad(part, wanted, allow_unused=True, materialize_grads=True) for part in objective]
        results.append([z, log_det, back, back_log_det, *grads[0], *grads[1]])
    for got, exact in zip(results[1], results[0], strict=True):
        assert_close(got, exact, condition=1000.0)
    assert not products


@pytest.mark.parametrize("options", [{"permute_soft": True}, {"learned_householder_permutation": 2}], ids=str)
def test_soft_permutations_stay_products(options: dict[str, Any], products: list[int]) -> None:
    ours = ours_of(block_of(**options))
    ours((torch.randn(2, 6, 6, 5, dtype=DOUBLE),))
    assert products
    assert freia.step_parts(ours).after.source is None


@pytest.mark.parametrize("memory", ["store", "reversible", "checkpoint"])
@pytest.mark.parametrize("reverse", [False, True], ids=["", "there and back"])
@pytest.mark.parametrize("soft", [None, 1], ids=["all hard", "one soft"])
def test_joined(memory: str, soft: int | None, reverse: bool, products: list[int]) -> None:
    """A run whose maps are all hard gathers; with a soft one among them it multiplies."""
    torch.manual_seed(0)
    theirs = Ff.SequenceINN(6, 6, 5)
    for k in range(4):
        options = {"permute_soft": k == soft, "reverse_permutation": reverse}
        theirs.append(Fm.AllInOneBlock, subnet_constructor=known_net, **options)
    theirs = theirs.double()
    ours = copy.deepcopy(theirs)
    accelerate(ours, memory=memory)
    x = torch.randn(2, 6, 6, 5, dtype=DOUBLE)
    results = []
    for model in (theirs, ours):
        leaf = x.clone().requires_grad_()
        z, log_det = model(leaf)
        wanted = [leaf, *(p for p in model.parameters() if p.requires_grad)]
        results.append([z, log_det, *torch.autograd.grad(z.square().sum() + log_det.sum(), wanted)])
    for got, exact in zip(results[1], results[0], strict=True):
        assert_close(got, exact, condition=1000.0)
    z = results[0][0].detach()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            back, log_det = ours(z, rev=True)
        assert_close(back, x, condition=1000.0)
        assert_close(log_det, -results[0][1], condition=1000.0)
    assert bool(products) == (soft is not None)


def permute_in_place(block: nn.Module, order: list[int], by_data: bool) -> None:
    for name, index in (("w_perm", torch.tensor(order)), ("w_perm_inv", torch.tensor(order).argsort())):
        w = getattr(block, name)
        values = torch.eye(len(order), dtype=w.dtype)[index].view_as(w)
        if by_data:
            w.data.copy_(values)
        else:
            with torch.no_grad():
                w.copy_(values)


@pytest.mark.parametrize("way", ["copy_", "data", "load", "new parameter", "rotation", "rotation by data"])
def test_a_permutation_that_changes_is_followed(way: str) -> None:
    theirs = block_of(seed=3)
    ours = ours_of(theirs)
    x = torch.randn(2, 6, 6, 5, dtype=DOUBLE)
    ours((x,))
    other = block_of(seed=4)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=DOUBLE)).Q
    for block in (theirs, ours):
        if way in ("copy_", "data"):
            permute_in_place(block, [2, 5, 0, 1, 3, 4], way == "data")
        elif way == "load":
            block.load_state_dict(other.state_dict())
        elif way == "new parameter":
            block.w_perm, block.w_perm_inv = (
                nn.Parameter(w.data.clone(), False) for w in (other.w_perm, other.w_perm_inv)
            )
        else:
            for name, values in (("w_perm", rotation), ("w_perm_inv", rotation.T)):
                w = getattr(block, name)
                (w.data if "data" in way else w.detach()).copy_(values.reshape(w.shape))
    for rev in (False, True):
        (expected,), log_det = theirs((x,), rev=rev)
        (got,), got_log_det = ours((x,), rev=rev)
        assert_close(got, expected, condition=100.0)
        assert_close(got_log_det, log_det, condition=100.0)
    assert (freia.step_parts(ours).after.source is None) == way.startswith("rotation")


def test_an_index_for_a_permutation() -> None:
    """FrEIA's later versions keep w_perm as indices."""
    theirs = block_of()
    ours = ours_of(theirs)
    expected = [ours((torch.ones(2, 6, 6, 5, dtype=DOUBLE),), rev=rev) for rev in (False, True)]
    order = ours.w_perm.flatten(1).argmax(1)
    ours.w_perm, ours.w_perm_inv = (nn.Parameter(index, requires_grad=False) for index in (order, order.argsort()))
    for rev, ((out,), log_det) in zip((False, True), expected, strict=True):
        (got,), got_log_det = ours((torch.ones(2, 6, 6, 5, dtype=DOUBLE),), rev=rev)
        assert_close(got, out)
        assert_close(got_log_det, log_det)


def test_log_det_is_that_of_the_jacobian() -> None:
    ours = ours_of(block_of(4))
    x = torch.randn(1, 4, 3, 3, dtype=DOUBLE)
    jacobian = torch.autograd.functional.jacobian(lambda x: ours((x.view(1, 4, 3, 3),))[0][0].flatten(), x.flatten())
    assert_close(ours((x,))[1], torch.linalg.slogdet(jacobian).logabsdet.view(1), condition=100.0)


def test_no_matrix_is_multiplied_or_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first look at w_perm it is compared with what it was, and nothing else of its size is computed."""
    ours = ours_of(block_of())
    x = torch.randn(2, 6, 6, 5, dtype=DOUBLE, requires_grad=True)
    ours((x,))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a matrix")

    for name in ("eye", "linalg.inv_ex", "linalg.slogdet"):
        monkeypatch.setattr(f"torch.{name}", refuse)
    for home in (reference, functional):
        for name in ("invert_matrix", "log_abs_det"):
            monkeypatch.setattr(home, name, refuse)
    (z,), log_det = ours((x,))
    (z.sum() + log_det.sum()).backward()
    ours((x,), rev=True)
