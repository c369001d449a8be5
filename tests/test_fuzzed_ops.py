"""Every op with drawn arguments, in a process of its own: right or refused by words, whatever memory holds them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from support import fuzzed_ops, sanitized_module
from support.commands import Command
from support.fuzzed_expectations import EXPECTED, Arguments
from torch import Tensor

from pyglow_fast import _backend, ops

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
FAST, SLICE = 1600, 8000  # calls, of all ops in turn
CODES = (1, 0, False, 2.0, 0.0, 1.0, 1.0)


def finish(*arguments: str) -> str:
    """What a command wrote; fails with its last line and its error where it does not end well."""
    command = Command([*arguments], Path(__file__).parent)
    try:
        out, err = command.communicate(timeout=600)
    finally:
        command.kill()
    assert command.returncode == 0, (
        f"ended with {command.returncode}: {out.strip().rpartition('seed ')[2]}\n{err[-3000:]}"
    )
    return out


@pytest.mark.parametrize(
    ("first", "count"),
    [(0, FAST), *(pytest.param(FAST + i * SLICE, SLICE, marks=pytest.mark.full) for i in range(8))],
)
def test_drawn_calls(first: int, count: int) -> None:
    out = finish("-m", "support.fuzzed_ops", str(first), str(count))
    found = re.search(rf"^{count} calls, (\d+) taken$", out, re.MULTILINE)
    assert found, out[-1000:]
    assert 0.3 * count < int(found[1]) < 0.9 * count, "nearly all are refused, or nearly none"
    for name in ops.names():
        assert f": {name}(" in out, f"no call of {name}"


@pytest.mark.full
def test_drawn_calls_are_clean(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing in the bindings and the CPU kernels."""
    folder = sanitized_module.package(tmp_path)
    ran = []
    for name in ("portable", "avx512"):
        probe = "from pyglow_fast import _backend; print(_backend.require().instruction_set())"
        if sanitized_module.run(folder, name, "-c", probe).stdout.strip() != name:
            continue  # not of this processor
        result = sanitized_module.run(folder, name, "-m", "support.fuzzed_ops", "0", str(FAST))
        last = result.stdout.strip().rpartition("seed ")[2]
        assert result.returncode == 0, f"{name}: {last}\n{result.stderr[:4000]}"
        ran.append(name)
    assert "portable" in ran


def test_the_end_of_a_process_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="ended with -11: 5: an op"):
        finish("-c", "import os; print('seed 5: an op', flush=True); os.kill(os.getpid(), 11)")
    with pytest.raises(AssertionError, match=r"(?s)ended with 1: .*AssertionError"):
        finish("-c", "print('seed 5: an op', flush=True); assert False")


def good_arguments(name: str) -> Arguments:
    """Without a fault, in float64, none of them empty."""
    for draw in map(fuzzed_ops.Draw, itertools.count()):
        arguments = fuzzed_ops.BUILDERS[name](draw)
        if draw.dtype == torch.float64 and all(
            value.numel() for value in arguments.values() if isinstance(value, Tensor)
        ):
            break
    return arguments


@pytest.mark.parametrize("name", sorted(fuzzed_ops.BUILDERS))
def test_a_wrong_result_is_seen(name: str) -> None:
    """One number of a result, each in turn, that is off by a thousandth, or was never written."""
    arguments = good_arguments(name)
    found = [torch.zeros(0) if value is None else value.detach() for value in EXPECTED[name](arguments)]
    fuzzed_ops.expect_results(name, found, arguments)
    assert any(value.numel() for value in found)
    for index, value in enumerate(found):
        for wrong in (0.001 * float(value.abs().max()) + 0.001, torch.nan) if value.numel() else ():
            changed = value.clone(memory_format=torch.contiguous_format)
            changed.view(-1)[-1] += wrong
            with pytest.raises(AssertionError, match=f"result {index}: "):
                fuzzed_ops.expect_results(name, [*found[:index], changed, *found[index + 1 :]], arguments)


# ---- Memory that ops are not used to ----


@pytest.mark.parametrize("half", [False, True])
def test_kept_by_any_strides(half: bool) -> None:
    """Of the nets' backward, too: what is kept may come back as a slice, or as one number that repeats."""
    x, weights = torch.randn(1, 4, 9, 8), [torch.randn(6, 4, 3, 3), torch.randn(2, 6, 1, 1)]
    chain = ([2], [0.1], [1, 1, 1, 1], half)
    out, kept = ops.net_chain(x, None, weights, [torch.randn(6), torch.randn(2)], None, *chain, True)

    def backward(kept: Tensor) -> list[Tensor]:
        found: list[Tensor] = ops.net_chain_backward(out, x, None, kept, weights, None, None, *chain, True)
        return found

    sliced = torch.stack([kept, torch.full_like(kept, torch.nan)], dim=1)[:, 0]
    repeated = kept.new_ones(1).expand(kept.shape)
    for odd, plain in ((sliced, kept), (repeated, repeated.contiguous())):
        assert not odd.is_contiguous()
        assert all(map(torch.equal, backward(odd), backward(plain)))
    with pytest.raises(ValueError, match="kept: expected shape"):
        backward(kept.new_zeros(1).expand(kept.numel() + 1))


def test_layers_of_no_channels_are_refused() -> None:
    x = torch.randn(1, 4, 3, 3)
    weights, biases = [torch.empty(0, 4, 3, 3), torch.empty(2, 0, 1, 1)], [torch.empty(0), torch.empty(2)]
    with pytest.raises(ValueError, match="at least one channel each way"):
        ops.net_chain(x, None, weights, biases, None, [1], [0.0], [1, 1, 1, 1], False, False)


def test_shapes_are_checked_before_anything_is_copied() -> None:
    """A matrix of 2^40 numbers that are one."""
    with pytest.raises(ValueError, match=r"matrix: expected shape \[2, 2\], found \[1048576, 1048576\]"):
        ops.channel_mix(torch.ones(1, 2, 3), torch.ones(1).expand(2**20, 2**20), torch.ones(2), False, 0)


def test_sizes_beside_nothing() -> None:
    """However many, beside a size of 0 there is nothing to walk over; what is past any memory is refused."""
    rows = torch.empty(1, 2, 2**46, 0)
    assert ops.checkerboard_split(rows, 0, True).shape == (1, 4, 2**45, 0)
    assert ops.checkerboard_merge(rows, 0, True).shape == (1, 1, 2**47, 0)
    for log_det in (
        ops.coupling(torch.empty(1, 0, 2**47), torch.empty(1, 0, 2**47), *CODES)[1],
        ops.gaussian_log_prob(*[torch.empty(1, 0, 2**47)] * 3),
    ):
        assert log_det.tolist() == [0.0]
    vast = torch.empty(0, 1, 1, 1).expand(0, 3, 2**40, 2**40)
    with pytest.raises(ValueError, match="x: expected sizes above 0 of a product of at most"):
        ops.channel_moments(vast)
    with pytest.raises(ValueError, match="x: expected sizes above 0 of a product of at most"):
        ops.net_chain(vast, None, [torch.ones(1, 3, 7, 7)], [torch.ones(1)], None, [], [], [9, 9], False, True)


def test_tensors_without_values_among_others_are_refused() -> None:
    """The results would be of x's device, and nothing would have written them."""
    x, matrix, offset = torch.ones(1, 2, 3), torch.ones(2, 2), torch.ones(2)
    for changed in ((x.to("meta"), matrix, offset), (x, matrix.to("meta"), offset), (x, matrix, offset.to("meta"))):
        with pytest.raises(ValueError, match="device: expected meta for all tensors or for none"):
            ops.channel_mix(*changed, False, 0)
    assert ops.channel_mix(x.to("meta"), matrix.to("meta"), offset.to("meta"), False, 0).is_meta
