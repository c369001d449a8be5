"""The CUDA kernel that inverts matrices, run on the CPU: against elimination in extended precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.covering import pairs
from support.inverse_cases import IRREGULAR, MATRICES, assert_inverses, rotations, signs
from support.inverse_emulator import UNWRITTEN, InverseEmulator

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
LARGEST_IN_SHARED = 76  # of invert_matrices in csrc/cuda/inverse.cu


@pytest.fixture
def emulator(_library: Path) -> InverseEmulator:
    return InverseEmulator(_library)


@pairs(
    dtypes,
    # Less than a panel, whole panels, one column more, whole and ragged warps, in shared memory and in scratch.
    pytest.mark.parametrize("channels", [1, 2, 5, 8, 9, 12, 24, 33, 48, LARGEST_IN_SHARED, LARGEST_IN_SHARED + 1, 130]),
    pytest.mark.parametrize("name", MATRICES),
)
def test_inverses(emulator: InverseEmulator, name: str, channels: int, dtype: torch.dtype) -> None:
    matrices = MATRICES[name](2, channels).to(dtype)
    assert_inverses(matrices, *emulator.invert_matrices(matrices))


@dtypes
def test_many_channels(emulator: InverseEmulator, dtype: torch.dtype) -> None:
    matrices = MATRICES["condition 1e2"](1, 192).to(dtype)
    assert_inverses(matrices, *emulator.invert_matrices(matrices))


@dtypes
@pytest.mark.parametrize("channels", [2, 3, 12, 80])
@pytest.mark.parametrize("name", IRREGULAR)
def test_what_has_no_inverse_shows(emulator: InverseEmulator, name: str, channels: int, dtype: torch.dtype) -> None:
    """NaN everywhere in the inverse of that matrix, and nothing in those beside it."""
    make, expected = IRREGULAR[name]
    regular = rotations(2, channels).to(dtype)
    inverses, log_dets = emulator.invert_matrices(torch.stack([regular[0], make(channels).to(dtype), regular[1]]))
    assert inverses[1].isnan().all()
    torch.testing.assert_close(log_dets[1], torch.tensor(expected, dtype=dtype), equal_nan=True)
    assert_inverses(regular, inverses[[0, 2]], log_dets[[0, 2]])


@dtypes
@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0), (0, 0, 0)], ids=str)
def test_nothing_to_invert(emulator: InverseEmulator, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The determinant of no rows is 1."""
    inverses, log_dets = emulator.invert_matrices(torch.empty(shape, dtype=dtype))
    assert inverses.shape == shape
    assert torch.equal(log_dets, torch.zeros(shape[0], dtype=dtype))


@dtypes
@pytest.mark.parametrize("channels", [12, 40, 80])
def test_any_order_of_threads_gives_the_same_bits(emulator: InverseEmulator, channels: int, dtype: torch.dtype) -> None:
    """Also where several rows have the largest pivot: of equals the first is taken."""
    matrices = torch.cat([rotations(1, channels), signs(1, channels)]).to(dtype)
    first = emulator.invert_matrices(matrices)
    assert_inverses(matrices, *first)
    for seed in (1, 2, 12345):
        emulator.seed = seed
        for got, expected in zip(emulator.invert_matrices(matrices), first, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.full
def test_scratch_memory_for_some_at_a_time(emulator: InverseEmulator) -> None:
    """16 MB, to which the driver holds it, are room for 14 of these matrices; the last ones wait for it."""
    matrices = rotations(1, 384).float() * torch.arange(1.0, 16.0)[:, None, None]
    inverses, log_dets = emulator.invert_matrices(matrices)
    assert_inverses(matrices[13:], inverses[13:], log_dets[13:])


def test_more_matrices_than_blocks(emulator: InverseEmulator) -> None:
    """The last one of many is no other than if it were alone."""
    matrices = rotations(2600, 3).float()
    inverses, log_dets = emulator.invert_matrices(matrices)
    assert not (inverses == UNWRITTEN).any()
    assert not (log_dets == UNWRITTEN).any()
    for k in (0, 2303, 2304, 2599):
        alone = emulator.invert_matrices(matrices[k : k + 1].clone())
        assert torch.equal(inverses[k : k + 1], alone[0])
        assert torch.equal(log_dets[k : k + 1], alone[1])
