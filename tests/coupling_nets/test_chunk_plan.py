"""The plan of chunks: complete, within the budget where that is possible, the fewest, and always the same."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from support.net_cases import DilatedNet, DropoutNet, WideNet, coupling_net
from torch import nn

import pyglow_fast as pgf
from pyglow_fast.coupling_nets import Chunk, check_net, plan_chunks
from pyglow_fast.coupling_nets.plan import AUTO_BUDGET_ACCELERATOR, AUTO_BUDGET_CPU
from pyglow_fast.coupling_nets.traits import bytes_per_position, has_hooks

PER_POSITION = 10


class Stated(nn.Module):
    """A net that says what it needs, and nothing else."""

    def __init__(self, halo: object, cost: object = PER_POSITION) -> None:
        super().__init__()
        self.halo, self.cost = halo, cost

    def bytes_per_position(self, element_size: int) -> object:
        return self.cost


def cases() -> list[tuple[int, int, int, int, int]]:
    """(N, H, W, halo, budget): all budgets from one row's cost to more than everything, on random sizes."""
    draw = random.Random(4)
    sizes = [(draw.randint(1, 5), draw.randint(1, 23), draw.randint(1, 4), draw.randint(0, 4)) for _ in range(60)]
    return [
        (n, h, w, halo, budget)
        for n, h, w, halo in sizes
        for budget in (1, *range(w * PER_POSITION, n * h * w * PER_POSITION + 50, max(1, n * h * w)))
    ]


Plan = tuple[Chunk, ...]
Plans = list[tuple[tuple[int, int, int, int, int], Plan]]


@pytest.fixture(scope="module")
def plans() -> Plans:
    return [(case, plan_chunks(Stated(case[3]), (case[0], 2, *case[1:3]), 4, case[4])) for case in cases()]


def cost(chunk: Chunk, width: int) -> int:
    return (chunk.samples.stop - chunk.samples.start) * (chunk.taken.stop - chunk.taken.start) * width * PER_POSITION


def peak(plan: Plan, width: int) -> int:
    return max(cost(chunk, width) for chunk in plan)


class TestEveryPlan:
    def test_gives_each_output_row_once(self, plans: Plans) -> None:
        for (n, h, *_), plan in plans:
            given = torch.zeros(n, 1, h, 1)
            for chunk in plan:
                chunk.outputs(given).add_(1)
            assert bool((given == 1).all())

    def test_takes_the_halo_as_far_as_the_image_reaches(self, plans: Plans) -> None:
        for (_, h, _, halo, _), plan in plans:
            for chunk in plan:
                assert chunk.taken == slice(max(0, chunk.rows.start - halo), min(h, chunk.rows.stop + halo))

    def test_is_within_the_budget_or_as_small_as_can_be(self, plans: Plans) -> None:
        outcomes = set()
        for (_, h, w, halo, budget), plan in plans:
            smallest = min(h, 2 * halo + 1) * w * PER_POSITION
            assert peak(plan, w) <= max(budget, smallest)
            outcomes.add(peak(plan, w) <= budget)
        assert outcomes == {True, False}

    def test_tells_what_is_whole(self, plans: Plans) -> None:
        for _, plan in plans:
            assert all(chunk.whole == (len(plan) == 1) for chunk in plan)

    def test_has_pieces_of_near_equal_size(self, plans: Plans) -> None:
        for _, plan in plans:
            for pick in (lambda chunk: chunk.samples, lambda chunk: chunk.rows):
                lengths = {pick(chunk).stop - pick(chunk).start for chunk in plan}
                assert max(lengths) - min(lengths) <= 1
                assert min(lengths) >= 1

    def test_has_the_fewest_chunks_that_fit(self, plans: Plans) -> None:
        for (n, h, w, halo, budget), plan in plans:
            if peak(plan, w) > budget or len(plan) == 1:
                continue
            strips = len({chunk.rows.start for chunk in plan})
            if strips == 1:
                fewer = -(-n // (len(plan) - 1))  # samples at once with one chunk less
                assert fewer * h * w * PER_POSITION > budget
                continue
            assert h * w * PER_POSITION > budget  # a whole sample does not fit
            # The highest counts with both halos, even where it lies at the border.
            bound = min(h, -(-h // (strips - 1)) + 2 * halo)
            assert bound * w * PER_POSITION > budget

    def test_runs_samples_in_order_and_strips_from_the_top(self, plans: Plans) -> None:
        for _, plan in plans:
            starts = [(chunk.samples.start, chunk.rows.start) for chunk in plan]
            assert starts == sorted(starts)

    def test_is_the_same_each_time(self, plans: Plans) -> None:
        for case, plan in plans:
            torch.rand(3)
            assert plan_chunks(Stated(case[3]), (case[0], 2, *case[1:3]), 4, case[4]) == plan


@pytest.mark.parametrize("spatial", [(6,), (6, 2), (6, 1, 2)], ids=str)
def test_strips_lie_along_the_first_spatial_dimension(spatial: tuple[int, ...]) -> None:
    width = torch.Size(spatial[1:]).numel()
    plan = plan_chunks(Stated(1), (1, 2, *spatial), 4, 5 * width * PER_POSITION)
    assert [chunk.rows for chunk in plan] == [slice(0, 3), slice(3, 6)]
    assert [chunk.taken for chunk in plan] == [slice(0, 4), slice(2, 6)]
    x = torch.arange(6 * width).reshape(1, 1, *spatial)
    assert torch.equal(plan[1].inputs(x), x[:, :, 2:])
    assert torch.equal(plan[1].outputs(x), x[:, :, 3:])
    assert torch.equal(plan[1].crop(plan[1].inputs(x)), plan[1].outputs(x))


def test_rows_that_stand_for_several_of_the_net() -> None:
    """Each costs as many as it stands for, and half as many of them hold the halo, rounded up."""
    cost = 2 * 4 * PER_POSITION
    for halo, reach in ((0, 0), (1, 1), (2, 1), (3, 2)):
        plan = plan_chunks(Stated(halo), (1, 2, 12, 4), 4, 10 * cost, rows_each=2)
        assert [chunk.rows for chunk in plan] == [slice(0, 6), slice(6, 12)], halo
        assert [chunk.taken for chunk in plan] == [slice(0, 6 + reach), slice(6 - reach, 12)]
    assert plan_chunks(Stated(1), (1, 2, 12, 4), 4, 12 * cost, rows_each=2)[0].whole


def test_a_cut_that_saves_nothing_is_not_made() -> None:
    # With a halo of 2, each strip of 5 rows would take all 5 of them in the middle.
    plan = plan_chunks(Stated(2), (3, 2, 5, 4), 4, 1)
    assert [chunk.rows for chunk in plan] == [slice(0, 5)] * 3


def test_data_without_positions_is_cut_by_samples_only() -> None:
    plan = plan_chunks(Stated(2), (5, 2), 4, 2 * PER_POSITION)
    x = torch.arange(10).reshape(5, 2)
    assert torch.equal(torch.cat([chunk.inputs(x) for chunk in plan]), x)
    assert len(plan) == 3


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (3, 2, 0, 4), (3, 2, 4, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("budget", [1, "auto"])
def test_nothing_is_one_chunk(shape: tuple[int, ...], budget: int | str) -> None:
    plan = plan_chunks(Stated(2), shape, 4, budget)
    assert len(plan) == 1
    assert plan[0].inputs(torch.zeros(shape)).shape == shape


class TestBudget:
    @pytest.mark.parametrize(("device_type", "expected"), [("cpu", AUTO_BUDGET_CPU), ("cuda", AUTO_BUDGET_ACCELERATOR)])
    def test_auto_is_a_fixed_number(self, device_type: str, expected: int) -> None:
        one = Stated(1, expected // 64)
        assert plan_chunks(one, (1, 2, 8, 8), 4, "auto", device_type=device_type)[0].whole
        auto = plan_chunks(one, (1, 2, 9, 9), 4, "auto", device_type=device_type)
        assert not auto[0].whole
        assert auto == plan_chunks(one, (1, 2, 9, 9), 4, expected)

    @pytest.mark.parametrize("budget", [0, -1, 1.5, True, None, "all", "32"])
    def test_wrong(self, budget: object) -> None:
        with pytest.raises(ValueError, match=r'memory_budget: expected "auto" or a positive int \(bytes\), found'):
            plan_chunks(Stated(1), (1, 2, 4, 4), 4, budget)

    def test_shape_without_channels(self) -> None:
        with pytest.raises(ValueError, match=r"shape: expected \(N, C, \*spatial\), found \(3,\)"):
            plan_chunks(Stated(1), (3,), 4)


class TestSampleChunksOnly:
    """Strips would be wrong or unsafe; the same net otherwise is cut into strips."""

    def n_strips(self, net: nn.Module) -> int:
        plan = plan_chunks(net, (2, 2, 12, 3), 8, 1)
        assert {chunk.samples.stop - chunk.samples.start for chunk in plan} == {1}
        return len({chunk.rows.start for chunk in plan})

    def test_unknown_halo(self) -> None:
        assert self.n_strips(DilatedNet(halo=None)) == 1
        assert self.n_strips(DilatedNet(halo=5)) > 1
        assert self.n_strips(nn.Conv2d(2, 4, 1)) == 1

    def test_dropout_in_training(self) -> None:
        net = DropoutNet()
        assert self.n_strips(net) == 1
        assert self.n_strips(net.eval()) == 12

    def test_dropout_that_never_drops(self) -> None:
        net = DropoutNet()
        net.dropout = nn.Dropout2d(0.0)
        assert self.n_strips(net) == 12

    @pytest.mark.parametrize(
        "layer", [nn.AlphaDropout(0.1), nn.Dropout3d(0.1), nn.RReLU(), nn.MultiheadAttention(4, 2, 0.1)]
    )
    def test_other_random_layers(self, layer: nn.Module) -> None:
        net = Stated(1)
        assert self.n_strips(net) == 12
        net.layer = layer
        assert self.n_strips(net) == 1
        assert self.n_strips(net.eval()) == 12

    @pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)])
    @pytest.mark.parametrize("training", [False, True])
    def test_statistics_over_positions(self, norm: nn.Module, training: bool) -> None:
        net = Stated(1)
        net.norm = norm
        assert self.n_strips(net.train(training)) == 1


class TestWhatNetsState:
    @pytest.mark.parametrize("halo", [-1, 1.0, True, "2"])
    def test_wrong_halo(self, halo: object) -> None:
        for refuse in (check_net, lambda net: plan_chunks(net, (1, 2, 4, 4), 4, 1)):
            with pytest.raises(ValueError, match=r"net.halo: expected an int, at least 0, or None, found"):
                refuse(Stated(halo))

    @pytest.mark.parametrize("size", [0, -4, 8.0, None, True])
    def test_wrong_cost(self, size: object) -> None:
        with pytest.raises(ValueError, match=r"net.bytes_per_position: expected a positive int, found"):
            plan_chunks(Stated(1, size), (1, 2, 4, 4), 4)

    def test_estimate_of_the_others(self) -> None:
        assert bytes_per_position(WideNet(2), 2, 8) == (3 * (3 + 4) + 2 * 2) * 8
        linear = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 4))
        assert bytes_per_position(linear, 2, 4) == (3 * 11 + 4) * 4
        assert bytes_per_position(nn.Identity(), 3, 4) == 24

    def test_the_condition_counts(self) -> None:
        budget = bytes_per_position(WideNet(2, 3), 5, 4) * 16
        with_cond, without = (
            plan_chunks(WideNet(2, 3), (2, 2, 4, 4), 4, 2 * budget - 1, cond_channels=channels) for channels in (3, 0)
        )
        assert len(without) == 1
        assert len(with_cond) == 2

    @pytest.mark.parametrize(("actnorm", "cond_channels"), list(itertools.product([False, True], [0, 3])))
    def test_coupling_net(self, actnorm: bool, cond_channels: int) -> None:
        net = pgf.CouplingNet(6, 12, 64, actnorm, cond_channels)
        check_net(net)
        assert net.halo == 2
        expected = 4 * 64 + 5 * 12 + 3 * (6 + cond_channels)  # an ActNorm is folded in
        assert net.bytes_per_position(4) == 4 * expected
        assert net.bytes_per_position(8) == 8 * expected


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_every_hook_is_seen(hook: str) -> None:
    net = nn.Identity()
    assert not has_hooks(net)
    handle = getattr(net, f"register_{hook}_hook")(lambda *_: None)
    assert has_hooks(net)
    handle.remove()
    assert not has_hooks(net)


class TestNormsThatAreRefused:
    @pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])
    def test_batch_norm_in_training(self, norm: nn.Module) -> None:
        net = nn.Sequential(nn.Conv2d(2, 4, 1), norm)
        with pytest.raises(ValueError, match=r"net.1: expected no BatchNorm that uses the statistics .* training mode"):
            check_net(net)
        check_net(net.eval())

    def test_one_frozen_by_itself_is_fine(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 1))
        net[0].eval()
        check_net(net)

    def test_batch_norm_without_running_statistics(self) -> None:
        net = nn.BatchNorm2d(2, track_running_stats=False).eval()
        with pytest.raises(ValueError, match=r"^net: expected no BatchNorm .* found BatchNorm2d in eval mode"):
            check_net(net)

    def test_instance_norm_that_learns_while_it_runs(self) -> None:
        net = nn.Sequential(nn.InstanceNorm2d(2, track_running_stats=True))
        with pytest.raises(ValueError, match=r"net.0: expected no running statistics that each run of the net updates"):
            check_net(net)
        check_net(net.eval())
        check_net(nn.Sequential(nn.InstanceNorm2d(2), nn.GroupNorm(1, 2)))


def test_coupling_net_strips_have_the_exact_halo() -> None:
    net = coupling_net()
    row = 7 * net.bytes_per_position(8)
    plan = plan_chunks(net, (2, 2, 9, 7), 8, 5 * row)
    assert len(plan) == 2 * 9  # one row with two above and two below
    assert plan[4] == Chunk(slice(0, 1), slice(4, 5), slice(2, 7))
    assert plan[0].taken == slice(0, 3)
