"""Blocks that run there and back: what is told of them, what they keep, what is left. tests/contract has the laws."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import accelerate_cases
from support.accelerate_cases import saved_bytes
from support.hiding_blocks import (
    GrownNet,
    Hides,
    InAttributes,
    InList,
    LooksBetween,
    Rescales,
    Shifts,
    plain_net,
)
from support.net_cases import halo_is_enough
from torch import Tensor, nn

from bench.memory_meter import peak_tensor_bytes
from pyglow_fast.interop import accelerate
from pyglow_fast.interop.hiding import Nets, dense_form


def assert_same(ours: Any, theirs: Any, x: Tensor, *flags: bool) -> None:
    accelerate_cases.assert_same(ours, theirs, lambda model, x: model(x, *flags), x)


def batch(channels: int = 8, n: int = 2) -> Tensor:
    return torch.randn(n, channels, 16, 5, dtype=torch.float64)


def test_blocks_in_a_list_keep_no_state_each() -> None:
    kept = {}
    for count in (2, 12):
        model, x = InList([Hides(4, 4) for _ in range(count)]).double(), batch()
        accelerate(model, "reversible")
        for _ in range(12):  # the anchors move apart
            model(x).sum().backward()
        kept[count] = saved_bytes(model, lambda model=model, x=x: model(x)) / x.nbytes
    assert kept[12] < kept[2] + 3  # 10 blocks more: projections, and an anchor


def test_blocks_in_attributes_keep_their_states_alone() -> None:
    model, x = InAttributes([Hides(4, 4) for _ in range(3)]).double(), batch()
    before = saved_bytes(model, lambda: model(x))
    accelerate(model, "reversible")
    assert before > 50 * x.nbytes
    assert saved_bytes(model, lambda: model(x)) < 5 * x.nbytes


def test_a_backward_takes_as_much_as_its_budget() -> None:
    """Nets run in strips of rows, where there is room for a quarter of one sample's."""
    model, x = InList([Hides(4, 4), Hides(4, 4)]).double(), torch.randn(1, 8, 256, 4, dtype=torch.float64)
    nets = Nets(model.operations[0].eta, model.operations[0].rho)
    count = nets.bytes_per_position
    whole, peaks = count(8) * 256 * 4, []
    for share in (1, 4):
        own = copy.deepcopy(model)
        accelerate(own, "reversible", memory_budget=whole // share)
        peaks.append(peak_tensor_bytes(lambda own=own: own(x).sum().backward()))
    assert peaks[1] < peaks[0] - whole // 4


def test_dense_nets_are_told_by_what_they_compute() -> None:
    class Residual(GrownNet):
        def forward(self, x: Tensor) -> Tensor:
            return 0.2 * super().forward(x) + x

    class Scaled(GrownNet):
        gain = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * super().forward(x)

    net = GrownNet(3, 4)
    assert dense_form(net) is not None
    assert Nets(net, GrownNet(3, 4, slope=0.1)).halo == 5
    assert halo_is_enough(Nets(net, GrownNet(3, 4)), (2, 3, 12, 4))
    assert dense_form(Residual(4, 4)) is None
    assert dense_form(plain_net(3, 4)) is None
    scaled = Scaled(3, 4)
    assert dense_form(scaled) is not None
    scaled.gain = 2.0
    assert dense_form(scaled) is None
    net.stages[1].register_forward_hook(lambda *_: None)
    assert dense_form(net) is None


@pytest.mark.parametrize("memory", [None, "store"])
def test_without_memory_to_save_there_is_nothing_to_gain(memory: str | None) -> None:
    done = accelerate(InList([Hides(4, 4), Rescales(8, 3)]), memory)
    assert (done.replaced, done.joined) == ({}, {})
    assert all("nothing to gain" in reason for reason in done.left.values())
    assert len(done.left) == 2


class TanhScale(Hides):
    def scale(self, raw: Tensor) -> Tensor:
        return torch.exp(self.strength * torch.tanh(raw))


class KeptForOthers(Hides):
    """It keeps its scale, which nobody knows who reads."""

    def scale(self, raw: Tensor) -> Tensor:
        self.kept = super().scale(raw)
        return self.kept


def with_a_learnt_clamp() -> nn.Module:
    block = Rescales(8, 4)
    block.clamp = torch.tensor(1.5, dtype=torch.float64)  # type: ignore[assignment]
    return block


def with_batch_norm(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, outputs, 1))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: TanhScale(4, 4), "expected a number above 0"),
        (lambda: KeptForOthers(4, 4), "it keeps kept of each call"),
        (lambda: Hides(4, 4, strength=0.0), "expected a number above 0"),
        (lambda: Hides(4, 4, with_batch_norm), "a BatchNorm2d in its net"),
        (with_a_learnt_clamp, "expected a number above 0"),
    ],
)
def test_what_is_left_and_why(build: Any, words: str) -> None:
    theirs = InList([build(), Hides(4, 4)]).double()
    ours, x = copy.deepcopy(theirs), batch()
    done = accelerate(ours, "reversible")
    assert list(done.replaced) == ["operations.1"]
    assert words in done.left["operations.0"]
    for rev in (False, True):
        assert_same(ours, theirs, x, rev)


def test_an_owner_that_looks_at_states_between_has_its_blocks_run_one_by_one() -> None:
    """Joined, the first block would give what all of them do."""
    theirs = LooksBetween([Hides(4, 4) for _ in range(3)]).double()
    ours, x = copy.deepcopy(theirs), batch()
    done = accelerate(ours, "reversible")
    assert list(done.joined) == [f"operations.{i}" for i in range(3)]
    for flags in ((False, False), (True, True)):
        assert_same(ours, theirs, x, *flags)


@pytest.mark.parametrize("rev", [False, True])
def test_blocks_that_run_by_themselves_again_give_the_same_jacobian(rev: bool) -> None:
    """A hook on one of the list's blocks: none of them is ours then."""
    theirs = InList([Rescales(8, 3) for _ in range(3)]).double()
    ours, x = copy.deepcopy(theirs), batch()
    accelerate(ours, "reversible")
    assert_same(ours, theirs, x, rev, True)
    for model, block in ((ours, ours.operations[1].layer), (theirs, theirs.operations[1])):
        block.register_forward_hook(lambda module, given, out: 1.1 * out)
        model(x)
    assert_same(InAttributes(list(ours._modules["operations"].children())), InAttributes(list(theirs.operations)), x)
    handle = next(iter(ours.operations[1].layer._forward_hooks))
    del ours.operations[1].layer._forward_hooks[handle]
    del theirs.operations[1]._forward_hooks[next(iter(theirs.operations[1]._forward_hooks))]
    assert_same(ours, theirs, x, rev, True)


def test_a_replica_of_dataparallel_runs_its_own_code() -> None:
    """It holds its parameters as plain attributes, which a recomputation would not find."""
    block, x = Hides(4, 4).double(), batch()
    expected = block(x)
    accelerate(block, "reversible")
    replica = block._replicate_for_data_parallel()
    assert "_pgf_joined" not in vars(replica)
    replica._forward = None
    saved = saved_bytes(block, lambda: replica(x))
    assert saved > 20 * x.nbytes  # all that autograd keeps
    assert torch.equal(replica(x), expected)


def test_a_state_of_more_channels_is_refused_as_by_them() -> None:
    block = Shifts(3, 5).double()
    accelerate(block, "reversible")
    with pytest.raises(RuntimeError, match="channels"):
        block(batch(9))
