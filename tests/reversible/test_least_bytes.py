"""The bytes that a refused budget's error names are enough, and no more than that."""

import re

import pytest
import torch

import pyglow_fast as pgf


def _least(sequence: pgf.ReversibleSequence, x: torch.Tensor) -> int:
    sequence.memory = 1
    with pytest.raises(ValueError, match=r"^memory: expected at least \d+ bytes") as caught:
        sequence(x)
    found = re.search(r"\d+", str(caught.value))
    assert found is not None
    return int(found[0])


@pytest.mark.parametrize("samples", [1, 64])
def test_named_bytes_are_the_least(samples: int) -> None:
    """Also of states so small that to invert the steps takes more than to store all."""
    torch.manual_seed(0)
    sequence = pgf.ReversibleSequence([pgf.FlowStep(8, 8, dims=3) for _ in range(8)])
    x = torch.randn(samples, 8, 4, 2, 2)
    sequence(x)  # initialises
    least = _least(sequence, x)
    sequence.memory = least
    sequence(x)[0].sum().backward()
    assert sequence.memory_report()["predicted_bytes"] <= least
    sequence.memory = least - 1
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        sequence(x)
