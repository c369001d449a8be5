"""The meter counts what is alive, once, and no longer than it lives."""

from __future__ import annotations

import gc

import torch
from torch import Tensor

from bench.memory_meter import MemoryMeter, peak_tensor_bytes

KB = 1000  # bytes of 250 float32


def kb(count: int) -> Tensor:
    return torch.zeros(count * 250)


class TestPeak:
    def test_of_tensors_alive_together(self) -> None:
        def run() -> None:
            first = kb(3)
            second = kb(2)
            del first
            third = kb(1)
            del second, third

        assert peak_tensor_bytes(run) == 5 * KB

    def test_of_one_after_the_other(self) -> None:
        # A meter that never subtracts would say 10.
        def run() -> None:
            for _ in range(5):
                kb(2)

        assert peak_tensor_bytes(run) == 2 * KB

    def test_counts_an_operand_and_its_result(self) -> None:
        assert peak_tensor_bytes(lambda: kb(3) + 1.0) == 6 * KB

    def test_counts_a_loop_variable_that_lives_too_long(self) -> None:
        # The fault it is there to find: the old value is alive while the new one is made.
        def run() -> None:
            value = None
            for _ in range(3):
                value = kb(4)
            del value

        assert peak_tensor_bytes(run) == 8 * KB


class TestViews:
    def test_cost_nothing(self) -> None:
        def run() -> None:
            x = kb(4)
            views = [x[10:], x.view(10, -1).T, x.detach(), x.unsqueeze(0)[0].reshape(-1), x.expand(3, -1)]
            del x, views

        assert peak_tensor_bytes(run) == 4 * KB

    def test_keep_all_of_their_storage(self) -> None:
        def run() -> None:
            small = kb(4)[:1]
            other = kb(3)
            del small, other

        assert peak_tensor_bytes(run) == 7 * KB

    def test_in_place_ops_cost_nothing(self) -> None:
        def run() -> None:
            kb(4).add_(1.0).relu_().zero_()

        assert peak_tensor_bytes(run) == 4 * KB


class TestWhatExistedBefore:
    def test_is_not_counted(self) -> None:
        x = kb(5)
        assert peak_tensor_bytes(lambda: x.view(-1)[3:].mul_(2.0)) == 0

    def test_is_not_subtracted(self) -> None:
        held = [kb(5)]

        def run() -> None:
            held[0].view(-1)
            held.clear()
            kb(2)

        assert peak_tensor_bytes(run) == 2 * KB


class TestAutograd:
    def test_saved_tensors_count_until_backward(self) -> None:
        x = kb(2).requires_grad_()

        def run(n: int) -> None:
            y = x
            for _ in range(n):
                y = y.sin()  # keeps its input
            torch.autograd.grad(y.sum(), x)

        def run_without(n: int) -> None:
            with torch.no_grad():
                y = x
                for _ in range(n):
                    y = y.sin()

        assert peak_tensor_bytes(lambda: run_without(8)) == 4 * KB
        deep, shallow = peak_tensor_bytes(lambda: run(18)), peak_tensor_bytes(lambda: run(8))
        assert deep - shallow == 10 * 2 * KB

    def test_backward_frees_what_it_has_used(self) -> None:
        x = kb(2).requires_grad_()
        with MemoryMeter() as meter:
            y = x.sin().sin().sin()
            before = meter.now
            gradient = torch.autograd.grad(y, x, torch.ones_like(y))
            assert before == 3 * 2 * KB
            assert meter.now == 2 * 2 * KB  # y and the gradient
        del y, gradient
        assert meter.now == 0


def test_reference_cycles_are_freed_when_collected() -> None:
    with MemoryMeter() as meter:
        cycle: list[object] = [kb(3)]
        cycle.append(cycle)
        del cycle
        gc.collect()
        assert meter.now == 0
    assert meter.peak == 3 * KB


def test_tensors_from_python_values_count() -> None:
    assert peak_tensor_bytes(lambda: torch.tensor([1.0] * 250)) == KB


def test_a_result_is_counted_whole_while_it_is_held() -> None:
    with MemoryMeter() as meter:
        x = kb(3)
        copy = x.clone()
    assert meter.now == 6 * KB
    del x
    assert meter.now == 3 * KB
    del copy
    assert meter.now == 0
