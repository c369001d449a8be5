"""A single training step: its learning rate, gradients, average, and the bits of the labels in its loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.run_cases import TINY_MODEL, MakeState

from pyglow_fast import Glow, GlowConfig
from pyglow_fast.data import ImageSet, batches
from pyglow_fast.data.loader import Batch
from pyglow_fast.models.replays import Replays
from pyglow_fast.train import Checkpoint, TrainingDivergedError, TrainState
from pyglow_fast.train.optim import Average


def test_gradients_are_clipped(new_state: MakeState) -> None:
    norms = []
    for clip in (None, 1e-3):
        state = new_state(clip_norm=clip)
        state.step()
        squares = [p.grad.square().sum() for p in state.model.parameters() if p.grad is not None]
        norms.append((state.grad_norm, float(torch.stack(squares).sum().sqrt())))
    assert norms[0][0] == norms[1][0]  # what is reported is the norm before clipping
    assert norms[0][1] == pytest.approx(norms[0][0], rel=1e-5)
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_parts_are_the_batch(new_state: MakeState) -> None:
    gradients = []
    for accumulate in (1, 2, 4):
        state = new_state(accumulate=accumulate, clip_norm=None, memory="store")
        loss = state.step()
        gradients.append([loss, *(p.grad.clone() for p in state.model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert other[0] == pytest.approx(gradients[0][0], rel=1e-6)
        # The same 8 terms in another order: each rounds by at most eps, some 16 roundings in a row.
        torch.testing.assert_close(other[1:], gradients[0][1:], rtol=2e-5, atol=2e-6)


def test_an_average_begins_with_what_no_state_dict_has() -> None:
    """A buffer that is not saved, and parameters that torch.compile has put behind another name."""
    model = Glow(GlowConfig((1, 4, 4), n_levels=1, n_steps=1, hidden=4))
    model.register_buffer("seen", torch.zeros(()), persistent=False)
    average = Average(model, 0.9)
    model.seen.fill_(2.0)
    model.levels[0].steps[0].coupling.net = torch.compile(model.levels[0].steps[0].coupling.net)
    with torch.no_grad():
        model.levels[0].steps[0].actnorm.bias.fill_(3.0)
    average.begin(model)
    assert average.module.seen == 2.0
    assert bool((average.module.levels[0].steps[0].actnorm.bias == 3.0).all())


def test_the_average_is_that_of_the_formula(new_state: MakeState, tiny_images: ImageSet, tmp_path: Path) -> None:
    """average = d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)), from the initialised weights on."""
    state = new_state(ema_decay=0.25, warmup_steps=0, lr=0.01)
    expected = state.model.prior.mean_log_sd.detach().double()
    for t in range(1, 7):
        state.step()
        decay = min(0.25, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * state.model.prior.mean_log_sd.detach().double()
    found = state.averaged.prior.mean_log_sd
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-8)  # six roundings of float32
    assert not torch.allclose(found, state.model.prior.mean_log_sd, rtol=1e-3)
    other = TrainState(state.config, tiny_images)
    state.checkpoint().save(tmp_path / "x.safetensors")
    other.restore(Checkpoint.load(tmp_path / "x.safetensors"), "x")
    assert state.step() == other.step()
    assert torch.equal(other.averaged.prior.mean_log_sd, state.averaged.prior.mean_log_sd)


def test_steps_that_are_not_finite_are_left_out(new_state: MakeState, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no weights; too many in a row end the run, and the first two are forgotten after a good one."""
    state = new_state(max_skipped=2, optimizer="adamax")
    log_prob, factors = state.model.log_prob, (math.nan, math.inf, 1.0, math.nan, math.nan, math.nan)
    monkeypatch.setattr(state.model, "log_prob", lambda x, y: log_prob(x, y) * factors[state.progress.step])
    for finite in map(math.isfinite, factors[:5]):
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        state.step()
        assert all(map(torch.equal, before, state.model.parameters())) != finite
    with pytest.raises(TrainingDivergedError, match=r"diverged at step 6: loss nan .*, 3 steps in a row without"):
        state.step()
    assert (state.progress.step, state.progress.skipped, state.progress.steps_summed) == (5, 5, 1)


def test_the_gradient_of_a_step_is_that_of_the_loss(
    new_state: MakeState, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step on its own batch, against the same loss written out, with the bits of labels that brightness tells."""
    pixels = tiny_images.pixels % 3 + 2 * tiny_images.labels.reshape(-1, 1, 1, 1).byte()
    fields = {"model": GlowConfig(**TINY_MODEL, classify=2), "class_weight": 0.5, "lr": 0.01, "clip_norm": None}
    state, other = (new_state(replace(tiny_images, pixels=pixels), **fields) for _ in range(2))
    both, seen = state.model.log_prob_and_logits, list[torch.Tensor]()
    monkeypatch.setattr(state.model, "log_prob_and_logits", lambda x, y: (seen.append(x), both(x, y))[1])
    value = state.step()
    x = seen[0]
    labels = (x.flatten(1).max(1).values > 0.1).long()  # only bright images have levels 3 and 4
    bits = -other.model.log_prob(x).mean() / (16 * math.log(2)) + math.log2(5)
    cost = torch.nn.functional.cross_entropy(other.model.class_logits(x), labels) / math.log(2)
    assert value == pytest.approx(float(bits.detach()), rel=1e-5)
    assert state.progress.class_sum == pytest.approx(float(cost.detach()), rel=1e-5) == 1.0  # a fresh head: one bit
    (bits + 0.5 * cost).backward()
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter.grad, other.model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    assert state.model.head.weight.grad.abs().max() > 0.01


def test_images_of_the_next_step_are_read_before_the_host_waits_for_this_one(
    new_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = list[str]()

    class Row(torch.Tensor):
        def tolist(self) -> list[float]:  # on a GPU it waits
            events.append("wait")
            return self.as_subclass(torch.Tensor).tolist()

    state, call = new_state(), Replays.__call__
    read = state._read
    monkeypatch.setattr(Replays, "__call__", lambda *inputs: call(*inputs).as_subclass(Row))
    monkeypatch.setattr(state, "_read", lambda step: (events.append(f"read {step}"), read(step))[1])
    state.step()
    state.step()
    assert events == ["read 0", "read 1", "wait", "read 2", "wait"]


def test_a_step_is_done_though_the_images_of_the_next_one_cannot_be_read(
    new_state: MakeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_alone(*arguments: object) -> Iterator[Batch]:
        yield next(batches(*arguments))  # type: ignore[arg-type]
        raise ValueError("broken")

    state = new_state()
    monkeypatch.setattr("pyglow_fast.train.state.batches", first_alone)
    state.step()
    with pytest.raises(ValueError, match="broken"):
        state.step()
    assert state.progress.step == 1
    monkeypatch.undo()
    other = new_state()
    other.step()
    found = state.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in other.model.state_dict().items())
