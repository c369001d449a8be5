"""The initialisation of the nflows adapter's ActNorm: nflows' values where those are finite, and what it gets wrong."""

from __future__ import annotations

import copy
import datetime
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("nflows")

from nflows import transforms as theirs
from support.commands import run_ranks
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast.interop.nflows import transforms as ours
from pyglow_fast.train.ranks import leave_group

SHAPES = {"images": (4, 3, 5, 6), "vectors": (9, 3)}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def data(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    per_channel = torch.arange(1.0, 4.0, dtype=dtype).view(-1, *[1] * (len(shape) - 2))
    return per_channel * torch.randn(shape, dtype=dtype) + 3.0 * per_channel


def assert_fresh(layer: nn.Module) -> None:
    assert not layer.initialized
    assert not layer.log_scale.any()
    assert not layer.shift.any()


@shapes
def test_first_training_forward_sets_the_same_values(shape: tuple[int, ...]) -> None:
    """The unbiased std, and no eps."""
    x = data(shape)
    layers = [library.ActNorm(3).double() for library in (theirs, ours)]
    (expected, expected_logabsdet), (found, logabsdet) = (layer(x) for layer in layers)
    assert_close(found, expected)
    assert_close(logabsdet, expected_logabsdet)
    for key, value in layers[0].state_dict().items():
        torch.testing.assert_close(layers[1].state_dict()[key], value, rtol=1e-12, atol=1e-12)
    flat = found.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(flat.std(dim=0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(flat.mean(dim=0), torch.zeros(3, dtype=torch.float64))
    gradients = [torch.autograd.grad(layer(x)[0].square().sum(), list(layer.parameters())) for layer in layers]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@shapes
def test_once_in_training_and_in_forward_only(shape: tuple[int, ...]) -> None:
    """Trap: of the libraries, this one alone initialises in training only; neither does the inverse."""
    for library in (theirs, ours):
        layer = library.ActNorm(3).double()
        layer.eval()(data(shape))
        assert_fresh(layer)
        layer.train().inverse(data(shape))
        assert_fresh(layer)
        layer(data(shape))
        state = copy.deepcopy(layer.state_dict())
        layer(5.0 * data(shape) + 1.0)
        assert all(torch.equal(state[key], value) for key, value in layer.state_dict().items())
        layer.initialized.fill_(False)  # a user's way to have it done again
        layer(5.0 * data(shape) + 1.0)
        assert not torch.equal(state["log_scale"], layer.log_scale)


def test_parameters_stay_the_optimizers() -> None:
    layer = ours.ActNorm(3).double()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    flag = layer.initialized
    layer(data(SHAPES["images"]))
    assert layer.initialized is flag
    before = layer.shift.detach().clone()
    layer(data(SHAPES["images"]))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(layer.shift, before)


def test_a_copy_made_before_the_first_batch_waits_for_its_own() -> None:
    layer = ours.ActNorm(3).double()
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    layer(data(SHAPES["images"]))
    for duplicate in copies:
        assert_fresh(duplicate)
        duplicate(data(SHAPES["images"]))
        assert duplicate.initialized


@shapes
@pytest.mark.parametrize("value", [0.0, 1000.1], ids=["zero", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_channel(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> None:
    """Trap: nflows divides by a std of 0 and is inf or NaN from then on; ours centres it and leaves its scale."""
    x = data(shape, dtype)
    x[:, 1] = value
    layer = ours.ActNorm(3).to(dtype)
    outputs, logabsdet = layer(x)
    assert outputs.isfinite().all()
    assert logabsdet.isfinite().all()
    assert layer.log_scale[1] == 0
    assert layer.shift[1] == -torch.tensor(value, dtype=dtype)
    assert not outputs[:, 1].any()
    expected = theirs.ActNorm(3).to(dtype)
    their_outputs = expected(x)[0]
    if value == 0.0:
        assert not their_outputs.isfinite().all()
    for channel in (0, 2):
        torch.testing.assert_close(layer.log_scale[channel], expected.log_scale[channel], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.shift[channel], expected.shift[channel], rtol=1e-5, atol=1e-5)


def test_one_value_per_channel_and_a_spread_that_is_hardly_any() -> None:
    """Trap: the unbiased std of one value is NaN."""
    layer = ours.ActNorm(3)
    outputs, _ = layer(torch.tensor([[1.0, -2.0, 3.0]]))
    assert torch.equal(outputs, torch.zeros(1, 3))
    assert not layer.log_scale.any()
    tiny = torch.tensor([[1e-42], [2e-42]])  # exp of its -log std would overflow
    assert ours.ActNorm(1)(tiny)[0].isfinite().all()


REFUSED: dict[str, Tensor] = {
    "NaN": torch.full((2, 3, 2, 2), float("nan")),
    "inf": torch.full((2, 3, 2, 2), float("inf")),
    "empty": torch.zeros(0, 3, 2, 2),
    "one channel": torch.randn(2, 1, 2, 2),  # nflows spreads it over three
    "other channels": torch.randn(2, 5, 2, 2),  # nflows takes on as many
    "three dimensions": torch.randn(2, 3, 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_first_batch_that_is_refused_changes_nothing(name: str) -> None:
    layer = ours.ActNorm(3)
    with pytest.raises(ValueError):
        layer(REFUSED[name])
    assert_fresh(layer)
    if name == "other channels":
        their_layer = theirs.ActNorm(3)
        their_layer(REFUSED[name])
        assert their_layer.log_scale.shape == (5,)  # of a layer of 3


def test_loaded_weights_are_not_initialised() -> None:
    trained = ours.ActNorm(3).double()
    trained(data(SHAPES["images"]))
    for assign in (False, True):
        fresh = ours.ActNorm(3).double()
        fresh.load_state_dict(copy.deepcopy(trained.state_dict()), assign=assign)
        fresh.train()(7.0 * data(SHAPES["images"]))
        assert torch.equal(fresh.log_scale, trained.log_scale)


RANKS = 2


def batch_of_all() -> torch.Tensor:
    """Draw the batch of both ranks together, unlike in its halves."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 2.0, 8, dtype=torch.float64).view(-1, 1, 1, 1) + torch.arange(8).view(-1, 1, 1, 1)


def work(rank: int, folder: str) -> None:
    """The first training forward of an ActNorm of either library, each rank with its half; then a refused batch."""
    torch.set_num_threads(1)
    store = Path(folder, "store").as_uri()
    dist.init_process_group("gloo", store, datetime.timedelta(seconds=60), RANKS, rank)
    x = batch_of_all()[4 * rank : 4 * rank + 4]
    results: dict[str, object] = {}
    for name, library in (("theirs", theirs), ("ours", ours)):
        layer = library.ActNorm(3).double()
        layer(x)
        results[name] = layer.state_dict()
    fresh = ours.ActNorm(3).double()
    try:
        fresh(x * float("nan") if rank == 1 else x)
    except ValueError as error:
        results["refusal"] = str(error)
    results["initialized after the refusal"] = bool(fresh.initialized)
    torch.save(results, Path(folder, f"{rank}.pt"))
    leave_group()


@pytest.mark.full
def test_ranks_agree(tmp_path: Path) -> None:
    """Trap: in nflows each rank sets its own values; ours are those of the whole batch, or refused by all."""
    first, second = run_ranks(work, tmp_path, RANKS)
    assert not torch.allclose(first["theirs"]["shift"], second["theirs"]["shift"], atol=0.1)
    alone = theirs.ActNorm(3).double()
    alone(batch_of_all())
    for key, value in alone.state_dict().items():
        assert torch.equal(first["ours"][key], second["ours"][key])
        torch.testing.assert_close(first["ours"][key], value, rtol=1e-12, atol=1e-12)
    assert "ranks [1]" in first["refusal"]
    assert "NaN" in second["refusal"]
    assert not first["initialized after the refusal"]
    assert not second["initialized after the refusal"]
