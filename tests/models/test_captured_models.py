"""Training steps and sampling of every kind of Glow, captured as a CUDA graph would be and replayed without Python.

Without a graph the host waits for next to nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.captures import Recording, capture_guard, like_a_gpu, use_library, waits
from support.covering import pairs
from support.glow_settings import CALM, CONFIGS, Setting
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyglow_fast as pgf

MEMORY = ("store", "checkpoint", "reversible")


def step(model: pgf.Glow, x: Tensor, y: Tensor | None, cond: Any) -> dict[str, Tensor]:
    """Loss and gradients by name."""
    loss = -model.log_prob(x, y, cond).mean()
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {"loss": loss.detach()} | {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def moved(model: pgf.Glow, gradients: dict[str, Tensor]) -> None:
    """An optimizer's step."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter.sub_(1e-3 * gradients[name])


def assert_replays(setting: Setting, replays: int = 3) -> None:
    """Of other batches and parameters each time: what the model itself gives, to the bit."""
    model, x, y, cond = setting.model, setting.x, setting.y, setting.cond
    n = len(x)
    for sequence in model._sequences():
        sequence.control.tolerance = 1e-3  # of a few positions one is soon beyond the default
    with like_a_gpu():
        for _ in range(2):
            step(model, x, y, cond)
            model.sample(n, x.new_ones(n), y, cond)
        with Recording() as training, capture_guard():
            found = step(model, x, y, cond)
        temperature = x.new_ones(n)
        with Recording() as sampling, capture_guard():
            samples = model.sample(n, temperature, y, cond)
        for k in range(replays):
            new_x, new_y, new_cond = setting.batch(n)
            for buffer, value in ((x, new_x), (y, new_y), (cond, new_cond)):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            training.replay()
            expected = step(model, x, y, cond)
            assert found.keys() == expected.keys()
            wrong = [name for name in found if not torch.equal(found[name], expected[name])]
            assert wrong == []
            torch.manual_seed(k)
            sampling.replay()
            torch.manual_seed(k)
            assert torch.equal(samples, model.sample(n, temperature, y, cond))
            moved(model, expected)
    for report in model.memory_report():
        assert report["trips"] == report["skipped"] == 0


@pytest.mark.full
@pairs(
    pytest.mark.parametrize("name", list(CONFIGS)),
    pytest.mark.parametrize("memory", MEMORY),
    pytest.mark.parametrize("nets", ["auto", "library", "rows"]),
    pytest.mark.parametrize("deferred", [False, True]),
)
def test_every_kind(name: str, memory: str, nets: str, deferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the nets are the library's, beside the kernels."""
    use_library(monkeypatch, nets)
    setting = Setting(name, spread=CALM)
    setting.model.memory = memory
    for sequence in setting.model._sequences():
        sequence.control.deferred = deferred
    assert_replays(setting)


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("nets", ["auto", "rows"])
def test_precisions(precision: str, nets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_library(monkeypatch, nets)
    setting = Setting("default", spread=CALM)
    setting.model.float().precision = precision
    setting.x = setting.x.float()
    assert_replays(setting)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_a_net_that_draws_random_numbers_is_refused_on_a_gpu(memory: str) -> None:
    """Its generator's state, which repeats the draw, cannot be read while a graph is captured."""
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, padding=1)]
    sequence = pgf.ReversibleSequence([pgf.FlowStep(4, net=nn.Sequential(*layers))], memory=memory)
    x = torch.randn(2, 4, 4, 4)
    sequence.initialize(x)
    with like_a_gpu():
        sequence(x)[0].sum().backward()
        refused = pytest.raises(ValueError, match="net: expected one of torch's modules without dropout")
        with refused, capture_guard():
            sequence(x)


class HostReads(TorchDispatchMode):
    """Notes operations whose result the host needs at once: on a GPU it would wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if waits(func, args) and not (name == "equal" and not args[0].numel()):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("memory", "deferred", "reads"),
    [("store", False, 0), ("checkpoint", False, 0), ("reversible", False, 2), ("reversible", True, 0)],
)
def test_what_the_host_waits_for(memory: str, deferred: bool, reads: int) -> None:
    """In training for a verdict on the drift of each level, if at all; for scores, samples and latents for nothing."""
    model = pgf.Glow(image_shape=(3, 16, 16), n_levels=2, n_steps=3, hidden=16, memory=memory)
    x = torch.rand(4, 3, 16, 16) - 0.5
    model.initialize(x)
    with like_a_gpu():
        for _ in range(2):  # caches, the anchors' spacing
            step(model, x, None, None)
        for sequence in model._sequences():
            sequence.control.deferred = deferred
        with HostReads() as trained:
            step(model, x, None, None)
        model.eval()
        with torch.no_grad(), HostReads() as scored:
            model.log_prob(x)
            model.sample(4, 0.7)
            model.decode(model.encode(x))
    assert trained.found == ["item"] * reads
    assert scored.found == []


def test_a_wait_is_seen() -> None:
    with HostReads() as reads:
        float(torch.ones(()))
        bool(torch.ones(2).isfinite().all())
        torch.equal(torch.ones(2), torch.ones(2))
    assert reads.found == ["_local_scalar_dense", "_local_scalar_dense", "equal"]
