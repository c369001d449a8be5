"""Laws that every bijection of the package obeys: each layer, each option, each memory mode, and the whole model."""

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

pytestmark = pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)


def test_likelihoods_are_exact_and_samples_are_the_models_own(case: Bijection, device: torch.device) -> None:
    """Otherwise a log-likelihood is wrong, or what a user decodes is not what was encoded.

    Forward and inverse undo each other and log_det is that of the Jacobian; a sample's result does not depend on the
    other samples, on the memory layout, or on whether gradients are recorded; float32 stays float32.
    """
    layer = case.trained(device)
    x, cond = case.batch(device)
    assert_bijection(layer, x, cond)
    assert_samples_independent(layer, x, cond)
    assert_layouts_equal(layer, x, cond)
    assert_empty_batch(layer, x, cond)
    z, log_det = layer(x, cond)
    with torch.no_grad():
        quiet, quiet_log_det = layer(x, cond)
        assert_close(quiet, z)
        assert_close(quiet_log_det, log_det)
        assert_close(layer.inverse(quiet, cond)[0], layer.inverse(z, cond)[0])
    single = None if cond is None else cond.float()
    z32, log_det32 = layer.float()(x.float(), single)
    assert z32.dtype == log_det32.dtype == layer.inverse(z32, single)[0].dtype == torch.float32
    assert_close(z32, z)
    n_values = x[0].numel()
    assert_close(log_det32 / n_values, log_det / n_values, condition=n_values)


def test_it_is_trained_saved_and_copied(case: Bijection, device: torch.device) -> None:
    """Otherwise a part of a model silently never trains, a run cannot be repeated, or a checkpoint is another model.

    Only a forward in training initialises a layer, and one sample is enough for it; every parameter gets a gradient;
    two runs give the same bits, and so does what is saved and loaded, copied or pickled.
    """
    layer = case.fresh(device)
    x, cond = case.batch(device)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    z, _ = layer.eval()(x, cond)
    layer.train()
    layer.inverse(z, cond)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, state[name]), f"{name} changed by an evaluation or an inverse"
    z, log_det = layer(x[:1], None if cond is None else cond[:1])
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert log_det.shape == (1,)

    layer = case.trained(device)
    assert_repeatable(layer, x, cond)
    assert_copies(layer, x, cond)
    assert_state_round_trip(layer, case.fresh(device), x, cond)
    x, cond = case.batch(device, n=32)  # enough for every ReLU to be on for some
    if hasattr(layer, "objective"):
        loss = layer.objective(x, cond)
    else:
        z, log_det = layer(x, cond)
        loss = (z * torch.randn_like(z)).sum() + log_det.sum()
    assert_every_parameter_learns(layer, loss)
