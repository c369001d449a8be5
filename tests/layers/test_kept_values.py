"""Tensors are told from what they were: by place, version and layout, and by every bit where the host may look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.captures import capture_guard, like_a_gpu
from torch import Tensor, nn

from pyglow_fast._backend import extension
from pyglow_fast.layers import kept_values
from pyglow_fast.layers.kept_values import KeptTensors

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture(autouse=True, params=["the extension", "torch"])
def compared_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    by: str = request.param
    if by == "torch":
        monkeypatch.setattr(kept_values, "extension", lambda: None)
    elif extension() is None:
        pytest.skip("no extension")
    return by


def made(dtype: torch.dtype, size: int = 8) -> Tensor:
    return torch.arange(size * size).reshape(size, size).remainder(97).to(dtype)


def by_version(tensor: Tensor) -> None:
    tensor.copy_(tensor.clone())


def by_data(tensor: Tensor) -> None:
    tensor.data[-1, -1] = 0


def by_numpy(tensor: Tensor) -> None:
    values: np.ndarray[Any, Any] = tensor.data.view(torch.uint8).numpy()
    values[0, 0] ^= 1


def in_other_memory(tensor: Tensor) -> None:
    tensor.data = tensor.data.clone()


def transposed(tensor: Tensor) -> None:
    tensor.data = tensor.data.t()


def shorter(tensor: Tensor) -> None:
    tensor.data = tensor.data[:3]


@pytest.mark.full
@pytest.mark.parametrize("size", [8, 80])  # gathered, and compared by itself
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", [by_version, by_data, by_numpy, in_other_memory, transposed, shorter])
def test_each_change_is_seen(change: Callable[[Tensor], None], dtype: torch.dtype, size: int) -> None:
    others = [made(torch.float32), made(torch.bool), torch.empty(0), torch.tensor(True)]
    for first in (True, False):
        tensor = made(dtype, size)
        order = [tensor, *others] if first else [*others, tensor]
        kept = KeptTensors(order)
        assert kept.same(order)
        change(tensor)
        assert not kept.same(order)


@pytest.mark.parametrize("size", [8, 80])
def test_every_bit_of_what_does_not_lie_in_one_piece(size: int) -> None:
    whole = made(torch.float32, 2 * size)
    part = whole[::2, ::2]
    kept = KeptTensors([part])
    whole.data[1::2] += 1.0
    assert kept.same([part])
    whole.data[2, 2] += 1e-5
    assert not kept.same([part])


def test_a_storage_that_was_cut_off() -> None:
    """Nothing is read behind its end, whatever its place."""
    tensor = made(torch.float32, 80)
    kept = KeptTensors([tensor])
    tensor.untyped_storage().resize_(16)
    assert not kept.same([tensor])


def test_a_class_of_its_own() -> None:
    """What it holds is for it to say."""

    class Own(Tensor):
        pass

    tensor = made(torch.float32)
    kept = KeptTensors([tensor])
    assert not kept.same([tensor.as_subclass(Own)])


def test_not_a_number_is_itself_and_zeros_have_signs() -> None:
    tensor = torch.tensor([float("nan"), 0.0])
    kept = KeptTensors([tensor])
    assert kept.same([tensor])
    tensor.data[1] = -0.0
    assert not kept.same([tensor])


def test_more_or_fewer_or_in_another_order() -> None:
    one, other = made(torch.float32), made(torch.float32)
    kept = KeptTensors([one, other])
    assert kept.same([one, other])
    assert not any(map(kept.same, ([one], [one, other, one], [other, one])))


def test_another_object_on_the_same_memory() -> None:
    """As a projection is that is cut from a buffer at each call."""
    tensor = made(torch.float32)
    kept = KeptTensors([tensor])
    assert kept.same([tensor.view(tensor.shape)])
    assert kept.same([tensor.detach()])


def test_made_in_inference_mode() -> None:
    tensor = nn.Parameter(made(torch.float32))
    kept = KeptTensors([tensor])
    with torch.inference_mode():
        assert kept.same([tensor])
        assert not kept.same([tensor + 0])


def test_negated_when_it_is_read() -> None:
    """As the imaginary part of a conjugate is: its values are not those in its memory."""
    number = torch.complex(made(torch.float32), made(torch.float32))
    negated = number.conj().imag
    assert negated.is_neg()
    kept = KeptTensors([number.imag])
    assert kept.same([number.imag])
    assert not kept.same([negated])
    for by_version in (True, False):
        assert not KeptTensors([negated], by_version=by_version).same([negated])


@torch.no_grad()
def test_a_capture_reads_no_values() -> None:
    tensor = made(torch.float32, 80)
    with like_a_gpu():
        kept = KeptTensors([tensor])
        with capture_guard():
            assert kept.same([tensor])
        tensor.add_(1.0)
        with capture_guard():
            assert not kept.same([tensor])


def test_moved_to_a_gpu_and_back() -> None:
    """What could be compared no longer, or could not be then, is not believed; nor read, in a capture."""
    tensor = made(torch.float32)
    on_cpu = KeptTensors([tensor])
    with like_a_gpu(), capture_guard():
        assert not on_cpu.same([tensor])
    with like_a_gpu():
        on_gpu = KeptTensors([tensor])
        assert on_gpu.same([tensor])
    assert not on_gpu.same([tensor])


def test_by_version() -> None:
    tensor = made(torch.float32)
    kept = KeptTensors([tensor], by_version=True)
    with like_a_gpu(), capture_guard():
        assert kept.same([tensor])
    tensor.data.add_(1.0)
    assert kept.same([tensor])
    tensor.add_(1.0)
    assert not kept.same([tensor])


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_nothing_is_read_under_transforms(transform: Callable[..., Callable[..., object]]) -> None:
    """There even a copy of an ordinary tensor is none: what is kept inside is not for outside, nor the other way."""
    tensor = made(torch.float32, 80)
    outside, inside, found = KeptTensors([tensor]), [], []

    def watched(x: Tensor) -> Tensor:
        inside.append(KeptTensors([tensor]))
        found.append((outside.same([tensor]), inside[0].same([tensor]), inside[0].has_values))
        return x

    transform(watched)(torch.ones(2))
    assert found == [(False, True, False)]
    assert not inside[0].same([tensor])
    assert outside.same([tensor])
