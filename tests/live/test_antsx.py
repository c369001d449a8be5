"""accelerate on Glow of antsnormflows, in 2 and 3 dimensions, put together as ANTsTorch does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from live.peers import load
from support import ROOT
from support.antstorch import glow
from torch import Tensor, nn

from pyglow_fast.interop import accelerate

load("antsnormflows")
MODES = (None, "store", "checkpoint", "reversible")
modes = pytest.mark.parametrize("memory", MODES)
MODELS: dict[str, dict[str, Any]] = {
    "volumes": {"dims": 3},
    "volumes, the blocks' own defaults": {"dims": 3, "leaky": 0.1, "net_actnorm": True},
    "volumes, bounded shifts": {"dims": 3, "shift_cap": 1.5, "actnorm_s_cap": 1.0, "conv_s_cap": 2.5},
    "volumes, sigmoid": {"dims": 3, "scale_map": "sigmoid", "shift_cap": 2.0},
    "volumes, additive, without LU": {"dims": 3, "scale": False, "use_lu": False},
    "images": {"dims": 2},
    "images, actnorms in nets": {"dims": 2, "net_actnorm": True},
}
models = pytest.mark.parametrize("name", MODELS)
# A relu's argument that is off by one rounding has another sign with this probability: see bench/live.py.
OTHER_SIGNS = math.sqrt(2.0 / math.pi * 2.0**-23)
FLOOR = 4 * 2.0**-23  # of sums over a sample, of which theirs may be right by chance


def built(name: str, side: int = 16, levels: int = 2, steps: int = 3, **changed: Any) -> tuple[Any, Tensor]:
    """A model that has seen data, none of whose parameters is zero, and a batch, in float64."""
    options = {"net_actnorm": False, **MODELS[name], **changed}
    dims = options.pop("dims")
    torch.manual_seed(0)
    model: Any = glow((1, *[side] * dims), levels, steps, 24, **options).double()
    x = torch.randn(2, 1, *[side] * dims, dtype=torch.float64)
    with torch.no_grad():
        model.inverse_and_log_det(x)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, x


def results(model: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Latents and what is generated of them; both log-dets and log_prob; the gradients of x and the parameters."""
    model.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_()
    latents, log_det = model.inverse_and_log_det(x)
    loss = sum((z.square() + z.square() * z / 10).sum() for z in latents) - log_det.sum()
    loss.backward()
    with torch.no_grad():
        back, back_log_det = model.forward_and_log_det(latents)
        log_prob = model.log_prob(x)
    own = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert x.grad is not None
    states, sums = [*(z.detach() for z in latents), back], [log_det.detach(), back_log_det, log_prob]
    return states, sums, [x.grad, *own]


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The error of all tensors together, relative, in the Euclidean norm."""
    pairs = list(zip(found, exact, strict=True))
    off = sum(float((value.double() - truth).square().sum()) for value, truth in pairs)
    return math.sqrt(off / sum(float(truth.square().sum()) for _, truth in pairs))


def check(name: str, memory: str | None, side: int) -> None:
    """In float64 to 1e-9 theirs, back to x; in float32 off by at most twice as much as they are."""
    model, x = built(name, side)
    exact = results(model, x)
    single = copy.deepcopy(model).float()
    theirs = [error(*pair) for pair in zip(results(single, x.float()), exact, strict=True)]
    for dtype, own in ((torch.float64, model), (torch.float32, single)):
        done = accelerate(own, memory)
        assert len(done.replaced) == 6
        assert sum(run["steps"] for run in done.memory_report()) == (0 if memory is None else 6)
        found = results(own, x.to(dtype))
        states, sums, gradients = (error(*pair) for pair in zip(found, exact, strict=True))
        if dtype == torch.float64:
            assert max(states, sums, gradients) <= 1e-9
            torch.testing.assert_close(found[0][-1], x, rtol=1e-9, atol=1e-9)
        else:
            assert states <= 2 * theirs[0]
            assert sums <= max(2 * theirs[1], FLOOR)
            assert gradients <= max(2 * theirs[2], OTHER_SIGNS)
        assert all(run["beyond_limit"] == 0 for run in done.memory_report())


@models
@modes
def test_the_same_numbers(name: str, memory: str | None) -> None:
    check(name, memory, 16)


@pytest.mark.full
@pytest.mark.parametrize("name", ["volumes", "images"])
@modes
def test_the_same_numbers_of_large_ones(name: str, memory: str | None) -> None:
    check(name, memory, 48)


@models
@pytest.mark.parametrize("data_first", [True, False])
def test_initialised_as_theirs_in_either_direction(name: str, data_first: bool) -> None:
    options = {"net_actnorm": False, **MODELS[name]}
    dims = options.pop("dims")
    torch.manual_seed(0)
    model: Any = glow((1, 8, 8, 8)[: dims + 1], 2, 2, 8, **options)
    other = copy.deepcopy(model)
    assert len(accelerate(other, "reversible").joined) == 2
    x = 2 * torch.randn(2, *(1, 8, 8, 8)[: dims + 1]) + 1
    z, _ = copy.deepcopy(model).inverse_and_log_det(x)
    for own in (model, other):
        with torch.no_grad():
            own.inverse_and_log_det(x) if data_first else own.forward_and_log_det(z)
    for value, exact in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)
    assert all(flag == 1 for key, flag in other.state_dict().items() if key.endswith("data_dep_init_done"))
    for found, exact in zip(other.inverse_and_log_det(x)[0], model.inverse_and_log_det(x)[0], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)


@modes
def test_what_they_bound_is_bounded(memory: str | None) -> None:
    for clamp, scale in ((0.5, 1.0), (1.0e4, 1.0e5), (1.0e4, math.inf)):
        model, x = built("volumes")
        other = copy.deepcopy(model)
        done = accelerate(other, memory)
        for own in (model, other):
            for module in own.modules():
                if hasattr(module, "_gen_clamp"):
                    module._gen_clamp = clamp  # also after the call of accelerate
        x[0, 0, 0, 0, 0] *= scale
        latents, log_det = model.inverse_and_log_det(x)
        found, found_log_det = other.inverse_and_log_det(x)
        for value, truth in zip([*found, found_log_det], [*latents, log_det], strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9, equal_nan=True)
        latents = [2 * scale * z if math.isfinite(scale) else z for z in latents]
        with torch.no_grad():
            for value, truth in zip(
                other.forward_and_log_det(latents), model.forward_and_log_det(latents), strict=True
            ):
                torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9, equal_nan=True)
        if memory is not None:
            assert sum(run["beyond_limit"] for run in done.memory_report()) > 0


def test_an_average_a_state_dict_and_undo() -> None:
    model, x = built("volumes")
    kept = copy.deepcopy(model)
    before = [type(module) for module in model.modules()]
    model._grad_checkpoint_override = True
    done = accelerate(model, "reversible")
    assert model._grad_checkpoint_override is False  # a joined run recomputes by itself
    average = copy.deepcopy(model).eval()
    average.load_state_dict(kept.state_dict())
    assert list(average.state_dict()) == list(kept.state_dict())
    latents, log_det = average.inverse_and_log_det(x)
    done.undo()
    assert [type(module) for module in model.modules()] == before
    assert model._grad_checkpoint_override is True
    for value, truth in zip([*latents, log_det], [*(own := kept.inverse_and_log_det(x))[0], own[1]], strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@modes
def test_autocast_is_no_worse_than_theirs(memory: str | None, dtype: torch.dtype) -> None:
    model, x = built("volumes")
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


def train(model: Any, batches: list[Tensor], dtype: torch.dtype) -> list[float]:
    """As their trainer does it: autocast, a scaler, clipping, an average of the weights."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=1e-5)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    average, losses = copy.deepcopy(model).eval(), []
    for x in batches:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=dtype):
            loss = -model.log_prob(x).mean() / x[0].numel()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        scaler.step(optimizer)
        scaler.update()
        for kept, own in zip(average.parameters(), model.parameters(), strict=True):
            kept.data.mul_(0.9).add_(own.data, alpha=0.1)
        losses.append(float(loss))
    with torch.no_grad():
        return [*losses, float(-average.log_prob(batches[0]).mean() / batches[0][0].numel())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trains_as_they_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model: Any = glow((1, 16, 16, 16), 2, 3, 16, net_actnorm=False).train()
    ramp = torch.linspace(-1, 1, 16)
    batches = [ramp * ramp[:, None] + 0.3 * torch.randn(2, 1, 16, 16, 16) for _ in range(12)]
    other = copy.deepcopy(model)
    accelerate(other, "reversible")
    theirs, ours = train(model, batches, dtype), train(other, batches, dtype)
    assert all(map(math.isfinite, ours))
    assert ours[-2] < ours[0]
    assert ours == pytest.approx(theirs, abs=0.02)


def test_the_report_tells_how_well_steps_can_be_inverted() -> None:
    model, x = built("volumes")
    done = accelerate(model.float(), "reversible")
    model.inverse_and_log_det(x.float())
    before = [max(run["round_trips"]) for run in done.memory_report()]
    with torch.no_grad():
        model.flows[1][2].flows[0].s[0, 0] = -8.0  # bounded by 2: a scale of about e^2
        model.flows[1][2].flows[1].log_S[1] = 12.0
    level = done.memory_report()[1]
    assert len(level["conditions"]) == len(level["round_trips"]) == 3
    assert max(before) < 1e-5
    assert level["conditions"][0] > 4 * level["conditions"][1]  # from data to latents the last block is the first


def test_what_is_left_has_a_reason() -> None:
    model, _ = built("volumes", scale_map="sigmoid_inv")
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
        known = {parameter.data_ptr() for parameter in own.parameters()}
        sizes: dict[int, int] = {}

        def noted(value: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[value.data_ptr()] = value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(noted, lambda value: value):
            latents, log_det = own.inverse_and_log_det(x)
            loss = latents[0].square().sum() - log_det.sum()
        loss.backward()
        kept.append(sum(size for place, size in sizes.items() if place not in known))
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
