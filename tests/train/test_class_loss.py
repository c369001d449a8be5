"""Training with the bits of the labels in the loss: what is recorded, and that every way of computing it agrees."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_cases import train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pyglow_fast import GlowConfig
from pyglow_fast.data import ImageSet
from pyglow_fast.train import TrainConfig, TrainState, evaluate, resume, start
from pyglow_fast.train.metrics import read_metrics

MakeConfig = Callable[..., TrainConfig]
MODEL: dict[str, Any] = {"image_shape": (1, 4, 4), "n_levels": 1, "n_steps": 2, "hidden": 4, "classify": 2}


@pytest.fixture
def judged(tiny_config: MakeConfig) -> MakeConfig:
    """tiny_config with a classifier of two classes."""

    def make(**fields: Any) -> TrainConfig:
        return tiny_config(**({"model": GlowConfig(**MODEL), "class_weight": 0.5, "lr": 0.01} | fields))

    return make


@pytest.fixture
def bright(tiny_images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """40 images of two classes that differ in how bright they are."""
    assert tiny_images.labels is not None
    data = replace(tiny_images, pixels=tiny_images.pixels % 3 + 2 * tiny_images.labels.reshape(-1, 1, 1, 1).byte())
    monkeypatch.setattr("pyglow_fast.train.runs.load_data", lambda config: data)
    return data


def test_the_gradient_of_a_step_is_that_of_the_loss(judged: MakeConfig, bright: ImageSet) -> None:
    """One step on its own batch, against the same loss written out."""
    state = TrainState(judged(clip_norm=None), bright)
    state.initialize()
    other = TrainState(judged(), bright)
    other.model.load_state_dict(state.model.state_dict())
    seen: dict[str, Any] = {}
    state._loss.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0], labels=inputs[2]))
    value = state.step()
    log_prob = other.model.log_prob(seen["x"])
    logits = other.model.class_logits(seen["x"])
    bits = -log_prob.mean() / (16 * math.log(2)) + math.log2(5)
    cost = torch.nn.functional.cross_entropy(logits, seen["labels"]) / math.log(2)
    assert value == pytest.approx(float(bits.detach()), rel=1e-5)
    assert state.progress.class_sum == pytest.approx(float(cost.detach()), rel=1e-5) == 1.0  # a fresh head: one bit
    (bits + 0.5 * cost).backward()
    for name, parameter in state.model.named_parameters():
        expected = other.model.get_parameter(name).grad
        assert parameter.grad is not None
        assert expected is not None
        assert torch.allclose(parameter.grad, expected, rtol=1e-4, atol=1e-6), name
    assert state.model.head is not None
    assert state.model.head.weight.grad.abs().max() > 0.01
    state.close()


def test_memory_modes_and_parts_of_a_batch_agree(judged: MakeConfig, bright: ImageSet) -> None:
    found = []
    for fields in ({}, {"memory": "store"}, {"memory": "checkpoint"}, {"accumulate": 4}):
        state = TrainState(judged(**fields), bright)
        state.initialize()
        bits = [state.step() for _ in range(6)]
        found.append([*bits, state.progress.class_sum])
        state.close()
    assert found[0][-1] < 5.99  # of 6 bits, were nothing learned
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


@pytest.mark.full
def test_it_learns_to_tell_the_classes_apart_and_says_so(judged: MakeConfig, bright: ImageSet, tmp_path: Path) -> None:
    run = train(judged(max_steps=60, ema_decay=None, tensorboard=True, class_conditional=False), tmp_path / "r", bright)
    rows = read_metrics(tmp_path / "r" / "metrics.csv")
    assert rows[0]["held_out_class_bits"] == pytest.approx(1.0)  # a fresh head: one bit of two classes
    assert rows[-1]["held_out_accuracy"] == 1.0
    assert rows[-1]["held_out_class_bits"] < 0.9
    logged = [row["train_class_bits"] for row in rows if row["train_bpd"] is not None]
    assert None not in logged
    assert logged[-1] < logged[0]
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["held_out"]["accuracy"] == 1.0
    events = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= {"train_class_bits", "held_out_class_bits", "held_out_accuracy"}
    state = run.state
    with torch.no_grad():
        score = evaluate(state.model, state.held_out, 4, 3)
        x = state.held_out.pixels.float().add(0.5) / 5 - 0.5  # the middle of the bins is near enough
        right = state.model.eval().class_logits(x).argmax(1) == state.held_out.labels
    assert score.accuracy == pytest.approx(float(right.double().mean()))
    unlabelled = replace(state.held_out, labels=None, class_names=())
    assert evaluate(state.model, unlabelled, 4, 3).accuracy is None  # a density that needs no labels
    assert evaluate(state.model, unlabelled, 4, 3).mean == score.mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None, "class_names": ()}, "class_weight: expected images with labels, found none in tiny"),
        ({"class_names": ("a", "b", "c")}, "classify: expected 3, the classes of the images, found 2"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(
    judged: MakeConfig, bright: ImageSet, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        start(judged(), str(tmp_path / "r"), data=replace(bright, **change))
    assert not (tmp_path / "r").exists()


def test_the_weight_is_part_of_what_a_run_is(judged: MakeConfig, bright: ImageSet, tmp_path: Path) -> None:
    train(judged(max_steps=2), tmp_path / "r", bright)
    with pytest.raises(ValueError, match=r"^class_weight: expected 0.5, as the run was started with, found 1.0$"):
        resume(str(tmp_path / "r"), data=bright, class_weight=1.0)


def test_a_label_that_costs_no_finite_number_is_left_out(judged: MakeConfig, bright: ImageSet) -> None:
    state = TrainState(judged(), bright)
    state.initialize()
    assert state.model.head is not None
    with torch.no_grad():
        state.model.head.bias.fill_(math.inf)
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    state.step()
    assert (state.progress.skipped, state.progress.steps_summed) == (1, 0)
    assert all(map(torch.equal, before, state.model.parameters()))
    state.close()
