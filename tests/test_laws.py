"""What every bijection of the package obeys: each layer, each option, and the whole model."""

from __future__ import annotations

import pytest
import torch
from support.bijections import BIJECTIONS, Bijection
from support.helpers import (
    assert_bijection,
    assert_close,
    assert_copies,
    assert_empty_batch,
    assert_every_parameter_learns,
    assert_layouts_equal,
    assert_repeatable,
    assert_samples_independent,
    assert_state_round_trip,
)

pytestmark = [
    pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name),
]


def test_forward_and_inverse_undo_each_other_and_log_det_is_that_of_the_jacobian(
    case: Bijection, device: torch.device
) -> None:
    assert_bijection(case.trained(device), *case.batch(device))


def test_the_inverse_needs_no_data_before_it(case: Bijection, device: torch.device) -> None:
    layer = case.fresh(device)
    x, cond = case.batch(device)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    z, _ = layer.eval()(x, cond)
    layer.train()
    layer.inverse(z, cond)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed by an evaluation or an inverse"


def test_one_sample_is_enough_to_start_from(case: Bijection, device: torch.device) -> None:
    layer = case.fresh(device)
    x, cond = case.batch(device, n=1)
    z, log_det = layer(x, cond)
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert log_det.shape == (1,)


def test_saved_and_loaded(case: Bijection, device: torch.device) -> None:
    assert_state_round_trip(case.trained(device), case.fresh(device), *case.batch(device))


def test_every_parameter_learns(case: Bijection, device: torch.device) -> None:
    layer = case.trained(device)
    x, cond = case.batch(device, n=32)  # enough for every ReLU to be on for some
    if hasattr(layer, "objective"):
        loss = layer.objective(x, cond)
    else:
        z, log_det = layer(x, cond)
        loss = (z * torch.randn_like(z)).sum() + log_det.sum()
    assert_every_parameter_learns(layer, loss)


def test_samples_do_not_mix(case: Bijection, device: torch.device) -> None:
    assert_samples_independent(case.trained(device), *case.batch(device))


def test_two_runs_give_the_same_bits(case: Bijection, device: torch.device) -> None:
    assert_repeatable(case.trained(device), *case.batch(device))


def test_any_memory_layout(case: Bijection, device: torch.device) -> None:
    assert_layouts_equal(case.trained(device), *case.batch(device))


def test_copies_and_pickles(case: Bijection, device: torch.device) -> None:
    assert_copies(case.trained(device), *case.batch(device))


def test_no_samples(case: Bijection, device: torch.device) -> None:
    assert_empty_batch(case.trained(device), *case.batch(device))


def test_without_gradients(case: Bijection, device: torch.device) -> None:
    layer = case.trained(device)
    x, cond = case.batch(device)
    z, log_det = layer(x, cond)
    with torch.no_grad():
        quiet, quiet_log_det = layer(x, cond)
        assert_close(quiet, z)
        assert_close(quiet_log_det, log_det)
        assert_close(layer.inverse(quiet, cond)[0], layer.inverse(z, cond)[0])


def test_float32_stays_float32(case: Bijection, device: torch.device) -> None:
    layer = case.trained(device)
    x, cond = case.batch(device)
    z, log_det = layer(x, cond)
    single = None if cond is None else cond.float()
    z32, log_det32 = layer.float()(x.float(), single)
    assert z32.dtype == log_det32.dtype == layer.inverse(z32, single)[0].dtype == torch.float32
    assert_close(z32, z)
    assert_close(log_det32 / x[0].numel(), log_det / x[0].numel(), condition=x[0].numel())
