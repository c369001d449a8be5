"""accelerate on Glow of antsnormflows, in 2 and 3 dimensions, put together as ANTsTorch does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from live.antstorch import glow
from live.peers import load
from support import ROOT
from support.accelerate_cases import MEMORIES, at_work, saved_bytes
from torch import Tensor

from pyglow_fast.interop import accelerate

load("antsnormflows")
modes = pytest.mark.parametrize("memory", MEMORIES)


def built(**options: Any) -> tuple[Any, Tensor]:
    """A model of volumes that has seen data, none of whose parameters is zero, and a batch, in float64."""
    torch.manual_seed(0)
    model: Any = glow((1, 16, 16, 16), 2, 3, 24, **{"net_actnorm": False, **options}).double()
    x = torch.randn(2, 1, 16, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        model.inverse_and_log_det(x)
    return at_work(model, 0.02), x


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The error of all tensors together, relative, in the Euclidean norm."""
    pairs = list(zip(found, exact, strict=True))
    off = sum(float((value.double() - truth).square().sum()) for value, truth in pairs)
    return math.sqrt(off / sum(float(truth.square().sum()) for _, truth in pairs))


@modes
def test_what_they_bound_is_bounded(memory: str | None) -> None:
    for clamp, scale in ((0.5, 1.0), (1.0e4, 1.0e5), (1.0e4, math.inf)):
        model, x = built()
        other = copy.deepcopy(model)
        done = accelerate(other, memory)
        for own in (model, other):
            for module in own.modules():
                if hasattr(module, "_gen_clamp"):
                    module._gen_clamp = clamp  # also after the call of accelerate
        x[0, 0, 0, 0, 0] *= scale
        expected, found = (own.inverse_and_log_det(x) for own in (model, other))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        latents = [2 * scale * z if math.isfinite(scale) else z for z in expected[0]]
        with torch.no_grad():
            expected, found = (own.forward_and_log_det(latents) for own in (model, other))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        if memory is not None:
            assert sum(run["beyond_limit"] for run in done.memory_report()) > 0


def test_a_joined_run_recomputes_by_itself() -> None:
    """Their checkpoints around it are off until it is undone."""
    model, _ = built()
    model._grad_checkpoint_override = True
    done = accelerate(model, "reversible")
    assert model._grad_checkpoint_override is False
    done.undo()
    assert model._grad_checkpoint_override is True


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@modes
def test_autocast_is_no_worse_than_theirs(memory: str | None, dtype: torch.dtype) -> None:
    model, x = built()
    exact = model.inverse_and_log_det(x)
    single = model.float()
    other = copy.deepcopy(single)
    accelerate(other, memory)
    off = []
    for own in (single, other):
        latents, log_det = own.inverse_and_log_det(x.float(), dtype=dtype)  # their own argument
        off.append((error(latents, exact[0]), error([log_det], [exact[1]])))
    assert off[1][0] <= 2 * off[0][0]
    assert off[1][1] <= 2 * off[0][1]


def test_what_is_left_has_a_reason() -> None:
    model, _ = built(scale_map="sigmoid_inv")
    done = accelerate(model, "reversible")
    assert not done.replaced
    assert "flows.0.0: scale map 'sigmoid_inv': no kernel has it" in str(done)


@pytest.mark.parametrize("memory", [None, "reversible"])
def test_the_first_batch_may_be_trained_on_and_keeps_no_more_than_theirs(memory: str | None) -> None:
    torch.manual_seed(0)
    model: Any = glow((1, 16, 16, 16), 1, 6, 32, True, net_actnorm=False)  # checkpointed by itself
    x = torch.randn(1, 1, 16, 16, 16)
    other = copy.deepcopy(model)
    accelerate(other, memory)
    kept, found = [], []
    for own in (model, other):
        outputs: list[Any] = []
        kept.append(saved_bytes(own, lambda own=own, to=outputs: to.extend(own.inverse_and_log_det(x))))
        latents, log_det = outputs
        (latents[0].square().sum() - log_det.sum()).backward()
        found.append([parameter.grad for parameter in own.parameters() if parameter.grad is not None])
    assert kept[1] <= kept[0] + x.nbytes
    assert error(found[1], [value.double() for value in found[0]]) < 1e-4


@pytest.mark.full
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "examples" / "antsx.md").read_text(encoding="utf-8")
    script = text.split("```python\n")[2].partition("```")[0]
    exec(compile(script, "examples/antsx.md", "exec"), {"__name__": "example"})
    lines = capsys.readouterr().out.splitlines()
    losses = [float(line.split()[1]) for line in lines if line.endswith("nats a voxel")]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.1
    assert float(next(line for line in lines if line.startswith("round trip")).split()[2]) < 1e-4
