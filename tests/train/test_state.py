"""A single training step: its learning rate, gradients, average, and the bits of the labels in its loss."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_cases import MakeConfig, train

from pyglow_fast import GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.reversible.setting import parse_memory
from pyglow_fast.train import (
    Checkpoint,
    RunFolder,
    TrainConfig,
    TrainingDivergedError,
    TrainState,
    evaluate,
    learning_rate,
    load_model,
)
from pyglow_fast.train.metrics import read_metrics


def begun(config: TrainConfig, data: ImageSet) -> TrainState:
    state = TrainState(config, data)
    state.initialize()
    return state


def test_learning_rate() -> None:
    assert [learning_rate(step, 1.0, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(0, 1.0) == 1.0
    falling = [learning_rate(step, 1.0, 4, 104) for step in (0, 4, 54, 104, 1000)]
    assert falling == pytest.approx([0.25, 1.0, 0.505, 0.01, 0.01])  # half way down from 1 to 0.01


@pytest.mark.parametrize("memory", ["reversible", "checkpoint", "store", "1GB"])
def test_the_model_is_told_how_to_keep_memory(memory: str, tiny_config: MakeConfig, tiny_images: ImageSet) -> None:
    state = TrainState(tiny_config(memory=memory), tiny_images)
    assert not state.model.is_initialized
    assert parse_memory(state.model.memory) == parse_memory(memory)


def test_gradients_are_clipped(tiny_config: MakeConfig, tiny_images: ImageSet) -> None:
    norms = []
    for clip in (None, 1e-3):
        state = begun(tiny_config(clip_norm=clip), tiny_images)
        state.step()
        squares = [p.grad.square().sum() for p in state.model.parameters() if p.grad is not None]
        norms.append((state.grad_norm, float(torch.stack(squares).sum().sqrt())))
    assert norms[0][0] == norms[1][0]  # what is reported is the norm before clipping
    assert norms[0][1] == pytest.approx(norms[0][0], rel=1e-5)
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-3)


def test_accumulated_parts_are_the_batch(tiny_config: MakeConfig, tiny_images: ImageSet) -> None:
    gradients = []
    for accumulate in (1, 2, 4):
        state = begun(tiny_config(accumulate=accumulate, clip_norm=None, memory="store"), tiny_images)
        loss = state.step()
        gradients.append([loss, *(p.grad.clone() for p in state.model.parameters() if p.grad is not None)])
    for other in gradients[1:]:
        assert other[0] == pytest.approx(gradients[0][0], rel=1e-6)
        for found, wanted in zip(other[1:], gradients[0][1:], strict=True):
            # The same 8 terms in another order: each rounds by at most eps, some 16 roundings in a row.
            torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-6)


def test_the_average_is_that_of_the_formula(tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path) -> None:
    """average = d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)), from the initialised weights on."""
    state = begun(tiny_config(ema_decay=0.25, warmup_steps=0, lr=0.01), tiny_images)
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


def test_a_run_is_scored_and_kept_with_its_average(
    tiny_config: MakeConfig, tiny_images: ImageSet, tmp_path: Path
) -> None:
    runs = {
        name: train(tiny_config(ema_decay=decay), tmp_path / name, tiny_images)
        for name, decay in (("none", None), ("slow", 0.999))
    }
    plain, slow = (Checkpoint.load(RunFolder(tmp_path / name).checkpoint) for name in runs)
    assert plain.ema == {}
    assert torch.equal(plain.model["prior.mean_log_sd"], slow.model["prior.mean_log_sd"])  # training is the same
    model, state = load_model(slow, "x"), runs["slow"].state
    assert all(torch.equal(model.state_dict()[name], value) for name, value in slow.ema.items())
    assert not torch.equal(model.state_dict()["prior.mean_log_sd"], slow.model["prior.mean_log_sd"])
    reported = RunFolder(tmp_path / "slow").read_report()["held_out"]["mean"]
    assert reported == state.score(state.held_out).mean != runs["none"].state.score(state.held_out).mean


def test_weights_that_fail_for_the_last_images_only_are_found(
    tiny_config: MakeConfig, sorted_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = begun(tiny_config(), sorted_images)
    state.check()
    log_prob = state.model.log_prob

    def no_number_for_white(x: torch.Tensor, *others: Any) -> torch.Tensor:
        return log_prob(x, *others).masked_fill(x.flatten(1)[:, 0] >= 0.3, math.nan)

    monkeypatch.setattr(state.model, "log_prob", no_number_for_white)
    assert (state.train.pixels[:50] == 0).all()
    with pytest.raises(TrainingDivergedError, match="after its update training images have nan bits/dim"):
        state.check()


def test_steps_that_are_not_finite_are_left_out(
    tiny_config: MakeConfig, tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They change no weights; too many in a row end the run, and the first two are forgotten after a good one."""
    state = begun(tiny_config(max_skipped=2, optimizer="adamax"), tiny_images)
    log_prob, factors = state.model.log_prob, (math.nan, math.inf, 1.0, math.nan, math.nan, math.nan)
    monkeypatch.setattr(state.model, "log_prob", lambda x, y: log_prob(x, y) * factors[state.progress.step])
    for finite in map(math.isfinite, factors[:5]):
        before = [parameter.detach().clone() for parameter in state.model.parameters()]
        state.step()
        assert all(map(torch.equal, before, state.model.parameters())) != finite
    with pytest.raises(TrainingDivergedError, match=r"diverged at step 6: loss nan .*, 3 steps in a row without"):
        state.step()
    assert (state.progress.step, state.progress.skipped, state.progress.steps_summed) == (5, 5, 1)


# Labels in the loss.


@pytest.fixture
def judged(tiny_config: MakeConfig) -> MakeConfig:
    """tiny_config with a classifier of two classes."""
    model = GlowConfig((1, 4, 4), n_levels=1, n_steps=2, hidden=4, classify=2)
    return lambda **fields: tiny_config(**({"model": model, "class_weight": 0.5, "lr": 0.01} | fields))


@pytest.fixture
def bright(tiny_images: ImageSet) -> ImageSet:
    """40 images of two classes that differ in how bright they are."""
    assert tiny_images.labels is not None
    return replace(tiny_images, pixels=tiny_images.pixels % 3 + 2 * tiny_images.labels.reshape(-1, 1, 1, 1).byte())


def test_the_gradient_of_a_step_is_that_of_the_loss(
    judged: MakeConfig, bright: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step on its own batch, against the same loss written out."""
    state, other = (begun(judged(clip_norm=None), bright) for _ in range(2))
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
    assert state.model.head is not None
    assert state.model.head.weight.grad.abs().max() > 0.01


def test_memory_modes_and_parts_of_a_batch_agree(judged: MakeConfig, bright: ImageSet) -> None:
    found = []
    for fields in ({}, {"memory": "store"}, {"memory": "checkpoint"}, {"accumulate": 4}):
        state = begun(judged(**fields), bright)
        found.append([*(state.step() for _ in range(6)), state.progress.class_sum])
    assert found[0][-1] < 5.99  # of 6 bits, were nothing learned
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


@pytest.mark.full
def test_it_learns_to_tell_the_classes_apart_and_says_so(judged: MakeConfig, bright: ImageSet, tmp_path: Path) -> None:
    run = train(judged(max_steps=60, ema_decay=None), tmp_path / "r", bright)
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert rows[0]["held_out_class_bits"] == pytest.approx(1.0)  # a fresh head: one bit of two classes
    assert rows[-1]["held_out_accuracy"] == 1.0
    assert rows[-1]["held_out_class_bits"] < 0.9
    assert rows[-1]["train_class_bits"] < rows[1]["train_class_bits"]
    assert json.loads((tmp_path / "r" / "report.json").read_text())["held_out"]["accuracy"] == 1.0
    unlabelled = replace(run.state.held_out, labels=None, class_names=())  # a density that needs no labels
    with_labels, without = (evaluate(run.state.model, data, 4, 3) for data in (run.state.held_out, unlabelled))
    assert (without.accuracy, without.mean) == (None, with_labels.mean)
