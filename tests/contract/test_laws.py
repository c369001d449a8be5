"""Laws that every bijection of the package obeys: each layer, each option, each memory mode, and the whole model."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from support.bijections import BIJECTIONS, Bijection
from support.helpers import assert_bijection, assert_close, assert_equal, memory_layouts
from torch import Tensor

pytestmark = pytest.mark.parametrize("case", BIJECTIONS, ids=lambda case: case.name)


def test_likelihoods_are_exact_and_samples_are_the_models_own(case: Bijection, device: torch.device) -> None:
    """Otherwise a log-likelihood is wrong, or what a user decodes is not what was encoded.

    Forward and inverse undo each other and log_det is that of the Jacobian; a sample's result does not depend on the
    other samples, on the memory layout, or on whether gradients are recorded; float32 stays float32.
    """
    layer = case.trained(device)
    x, cond = case.batch(device)
    assert_bijection(layer, x, cond)
    leaf = x.clone().requires_grad_()
    z, log_det = layer(leaf, cond)
    (gradient,) = torch.autograd.grad(z.square().sum() + log_det.sum(), leaf)
    expected_inverse = layer.inverse(z, cond)
    for some in (torch.arange(len(x), device=device).roll(1), slice(1, 2), slice(0, 0)):  # all, one and none
        given = None if cond is None else cond[some]
        assert_close(layer(x[some], given), (z[some], log_det[some]))
    assert_close(layer.inverse(z[:0], None if cond is None else cond[:0]), [value[:0] for value in expected_inverse])
    for layout in memory_layouts(x).values():
        leaf = layout.detach().requires_grad_()
        got = layer(leaf, cond)
        assert_close(got, (z, log_det))
        assert_close(torch.autograd.grad(got[0].square().sum() + got[1].sum(), leaf)[0], gradient)
    for layout in memory_layouts(z.detach()).values():
        assert_close(layer.inverse(layout, cond), expected_inverse)
    with torch.no_grad():
        quiet = layer(x, cond)
        assert_close(quiet, (z, log_det))
        assert_close(layer.inverse(quiet[0], cond)[0], expected_inverse[0])
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
    assert_equal(layer.state_dict(), state)  # which neither an evaluation nor an inverse changes
    z, log_det = layer(x[:1], None if cond is None else cond[:1])
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert log_det.shape == (1,)

    layer = case.trained(device)

    def run() -> list[Tensor]:
        leaf = x.detach().clone().requires_grad_()
        z, log_det = layer(leaf, cond)
        inputs = [leaf, *layer.parameters()]
        gradients = torch.autograd.grad(z.square().sum() + log_det.sum(), inputs, allow_unused=True)
        return [z, log_det, *layer.inverse(z, cond), *(gradient for gradient in gradients if gradient is not None)]

    expected = run()
    assert_equal(run(), expected)
    for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_equal([*duplicate(x, cond)], expected[:2])
        with torch.no_grad():
            for value in (*duplicate.parameters(), *duplicate.buffers()):
                value.zero_()
    assert torch.equal(layer(x, cond)[0], expected[0]), "a copy shares memory with its original"

    stream, fresh = io.BytesIO(), case.fresh(device)
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    fresh.load_state_dict(state)
    fresh.train()  # its first forward would initialise it from x, had it not loaded that this was done
    assert_equal([*fresh(x, cond)], expected[:2])
    fresh(3.0 * x + 1.0, cond)  # a batch that would initialise quite differently
    assert_equal(fresh.state_dict(), state)

    x, cond = case.batch(device, n=32)  # enough for every ReLU to be on for some
    if hasattr(layer, "objective"):
        loss = layer.objective(x, cond)
    else:
        z, log_det = layer(x, cond)
        loss = (z * torch.randn_like(z)).sum() + log_det.sum()
    parameters = dict(layer.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) if parameters else ()
    for name, gradient in zip(parameters, found, strict=True):
        assert gradient is not None, f"{name} gets no gradient"
        assert gradient.isfinite().all(), f"{name} gets a gradient with NaN or inf"
        assert gradient.any(), f"{name} gets a gradient of zeros"
