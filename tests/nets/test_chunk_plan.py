"""The plan of chunks: complete, within the budget where that is possible, the fewest, and always the same."""

from __future__ import annotations

import random

import pytest
import torch
from support.net_cases import DilatedNet, WideNet
from torch import nn

from pyglow_fast.nets.plan import AUTO_BUDGET_ACCELERATOR, AUTO_BUDGET_CPU, Chunk, plan_chunks
from pyglow_fast.nets.traits import bytes_per_position, check_net

PER_POSITION = 10


class Stated(nn.Module):
    """A net that says what it needs, and nothing else."""

    def __init__(self, halo: object, cost: object = PER_POSITION) -> None:
        super().__init__()
        self.halo, self.cost = halo, cost

    def bytes_per_position(self, element_size: int) -> object:
        return self.cost


Plan = tuple[Chunk, ...]
Plans = list[tuple[tuple[int, int, int, int, int], Plan]]


@pytest.fixture(scope="module")
def plans() -> Plans:
    """By (N, H, W, halo, budget): all budgets from one row's cost to more than everything, on random sizes."""
    draw = random.Random(4)
    sizes = [(draw.randint(1, 5), draw.randint(1, 23), draw.randint(1, 4), draw.randint(0, 4)) for _ in range(60)]
    return [
        ((n, h, w, halo, budget), plan_chunks(Stated(halo), (n, 2, h, w), 4, budget))
        for n, h, w, halo in sizes
        for budget in (1, *range(w * PER_POSITION, n * h * w * PER_POSITION + 50, max(1, n * h * w)))
    ]


def peak(plan: Plan, width: int) -> int:
    sizes = [(c.samples.stop - c.samples.start) * (c.taken.stop - c.taken.start) for c in plan]
    return max(sizes) * width * PER_POSITION


class TestEveryPlan:
    def test_gives_each_output_row_once_in_pieces_of_near_equal_size_with_their_halo(self, plans: Plans) -> None:
        """The halo is as far as the image reaches."""
        for (n, h, _, halo, _), plan in plans:
            given = torch.zeros(n, 1, h, 1)
            for chunk in plan:
                chunk.outputs(given).add_(1)
                assert chunk.taken == slice(max(0, chunk.rows.start - halo), min(h, chunk.rows.stop + halo))
            assert bool((given == 1).all())
            for pick in (lambda chunk: chunk.samples, lambda chunk: chunk.rows):
                lengths = {pick(chunk).stop - pick(chunk).start for chunk in plan}
                assert max(lengths) - min(lengths) <= 1
                assert min(lengths) >= 1

    def test_is_within_the_budget_or_as_small_as_can_be(self, plans: Plans) -> None:
        outcomes = set()
        for (_, h, w, halo, budget), plan in plans:
            smallest = min(h, 2 * halo + 1) * w * PER_POSITION
            assert peak(plan, w) <= max(budget, smallest)
            outcomes.add(peak(plan, w) <= budget)
        assert outcomes == {True, False}

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


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (3, 2, 0, 4), (3, 2, 4, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("budget", [1, "auto"])
def test_nothing_is_one_chunk(shape: tuple[int, ...], budget: int | str) -> None:
    plan = plan_chunks(Stated(2), shape, 4, budget)
    assert len(plan) == 1
    assert plan[0].inputs(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize(("device_type", "expected"), [("cpu", AUTO_BUDGET_CPU), ("cuda", AUTO_BUDGET_ACCELERATOR)])
def test_auto_is_a_fixed_number(device_type: str, expected: int) -> None:
    one = Stated(1, expected // 64)
    assert plan_chunks(one, (1, 2, 8, 8), 4, "auto", device_type=device_type)[0].whole
    auto = plan_chunks(one, (1, 2, 9, 9), 4, "auto", device_type=device_type)
    assert not auto[0].whole
    assert auto == plan_chunks(one, (1, 2, 9, 9), 4, expected)


def stated_with(layer: nn.Module) -> nn.Module:
    net = Stated(1)
    net.layer = layer
    return net


# How many strips there are of 12 rows, in training and in evaluation: one where more would be wrong or unsafe.
STRIPS = [
    (DilatedNet(halo=5), 12, 12),
    (DilatedNet(halo=None), 1, 1),
    (nn.Conv2d(2, 4, 1), 1, 1),
    (Stated(1), 12, 12),
    (stated_with(nn.Dropout2d(0.0)), 12, 12),
    *((stated_with(layer), 1, 12) for layer in (nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.Dropout3d(0.1))),
    *((stated_with(layer), 1, 12) for layer in (nn.RReLU(), nn.MultiheadAttention(4, 2, 0.1))),
    *((stated_with(norm), 1, 1) for norm in (nn.GroupNorm(2, 4), nn.InstanceNorm2d(4))),
]


@pytest.mark.parametrize(("net", "in_training", "in_evaluation"), STRIPS)
def test_strips_are_cut_where_they_change_nothing(net: nn.Module, in_training: int, in_evaluation: int) -> None:
    """Samples are cut from each other in any case."""
    for training, strips in ((True, in_training), (False, in_evaluation)):
        plan = plan_chunks(net.train(training), (2, 2, 12, 3), 8, 1)
        assert {chunk.samples.stop - chunk.samples.start for chunk in plan} == {1}
        assert len({chunk.rows.start for chunk in plan}) == strips


class TestWhatNetsState:
    @pytest.mark.parametrize(
        ("net", "said"),
        [
            *((Stated(halo), "net.halo: expected an int, at least 0, or None") for halo in (-1, 1.0, True)),
            *((Stated(1, size), "net.bytes_per_position: expected a positive int") for size in (0, 8.0, None)),
        ],
    )
    def test_wrong_ones_are_refused(self, net: nn.Module, said: str) -> None:
        with pytest.raises(ValueError, match=f"{said}, found"):
            plan_chunks(net, (1, 2, 4, 4), 4, 1)

    def test_the_condition_counts(self) -> None:
        budget = bytes_per_position(WideNet(2, 3), 5, 4) * 16
        with_cond, without = (
            plan_chunks(WideNet(2, 3), (2, 2, 4, 4), 4, 2 * budget - 1, cond_channels=channels) for channels in (3, 0)
        )
        assert len(without) == 1
        assert len(with_cond) == 2


NORMS: list[tuple[nn.Module, str]] = [
    (nn.BatchNorm2d(4), "no BatchNorm that uses the statistics .* training mode"),
    (nn.SyncBatchNorm(4), "no BatchNorm that uses the statistics .* training mode"),
    (nn.BatchNorm2d(4, track_running_stats=False).eval(), "no BatchNorm .* found BatchNorm2d in eval mode"),
    (nn.InstanceNorm2d(4, track_running_stats=True), "no running statistics that each run of the net updates"),
]


@pytest.mark.parametrize(("norm", "said"), NORMS)
def test_norms_that_are_refused(norm: nn.Module, said: str) -> None:
    """One frozen by itself is fine."""
    with pytest.raises(ValueError, match=f"net.1: expected {said}"):
        check_net(nn.Sequential(nn.Conv2d(2, 4, 1), norm))
    if norm.track_running_stats:
        check_net(nn.Sequential(nn.Conv2d(2, 4, 1), norm.eval()))


def test_norms_that_are_taken() -> None:
    check_net(nn.Sequential(nn.InstanceNorm2d(2), nn.GroupNorm(1, 2)))
