"""The cache of the nflows adapter's OneByOneConvolution: used where nflows uses its own, and never wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("nflows")

from support.helpers import assert_close
from support.nflows_cases import IMAGES, assert_same, pair, randomise
from torch import nn

from pyglow_fast.interop.nflows import transforms as ours
from pyglow_fast.interop.nflows._state import Derived


def cached(seed: int = 3) -> nn.Module:
    return randomise(ours.OneByOneConvolution(6, using_cache=True), seed).double().eval()


def x_of(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(IMAGES, dtype=dtype)


def uncached(layer: nn.Module) -> nn.Module:
    plain = ours.OneByOneConvolution(6).to(layer.bias.dtype)
    plain.load_state_dict(layer.state_dict())
    return plain


def assert_up_to_date(layer: nn.Module, x: torch.Tensor) -> None:
    plain = uncached(layer)
    for found, expected in zip(layer(x) + layer.inverse(x), plain(x) + plain.inverse(x), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("identity_init", [True, False])
def test_same_numbers_as_nflows(training: bool, identity_init: bool) -> None:
    build = lambda lib: lib.OneByOneConvolution(6, True, identity_init)  # noqa: E731
    their_layer, our_layer = pair(build)
    if not training:
        their_layer.use_cache(False)  # its cached inverse is made in float32, and fails beside float64
    assert_same(their_layer.train(training), our_layer.train(training), x_of())


def test_the_cached_inverse_in_float64() -> None:
    """Trap: nflows 0.14 forms it from a float32 identity on the CPU, and fails beside any other dtype or device."""
    layer, x = cached(), x_of()
    assert_close(layer.inverse(layer(x)[0])[0], x, 100.0)
    with torch.no_grad():
        assert_close(layer.inverse(layer(x)[0])[0], x, 100.0)


def test_matrices_are_computed_once_until_training(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = cached(), x_of()
    calls: list[str] = []
    for name in ("weight", "weight_inverse", "logabsdet"):
        own = getattr(type(layer), name)
        monkeypatch.setattr(type(layer), name, lambda self, own=own, name=name: calls.append(name) or own(self))
    with torch.no_grad():
        layer(x)
        layer(x)
        assert calls == ["weight", "logabsdet"]
        layer.inverse(x)
        layer.inverse(x)
        assert calls == ["weight", "logabsdet", "weight_inverse", "weight"]
        layer.train()
        assert layer.cache.weight is layer.cache.inverse is layer.cache.logabsdet is None
        layer(x)
        assert layer.cache.weight is None
        layer.eval().use_cache(False)
        layer(x)
        assert layer.cache.weight is None


def test_the_cache_follows_the_parameters() -> None:
    """Trap: nflows keeps the old matrix after load_state_dict, an average swapped in, or a conversion."""
    layer, x = cached(), x_of()
    with torch.no_grad():
        layer(x), layer.inverse(x)
        layer.load_state_dict(cached(seed=8).state_dict())
        assert_up_to_date(layer, x)
        layer.unconstrained_upper_diag.mul_(1.5)
        assert_up_to_date(layer, x)
        single = layer.float()(x.float())[0]
    assert single.dtype == torch.float32


def test_gradients_in_evaluation() -> None:
    """Trap: in nflows the second backward fails, and a cache filled without gradients gives the parameters none."""
    layer, x = cached(), x_of()
    with torch.no_grad():
        layer(x), layer.inverse(x)
    for direction in ("forward", "inverse"):
        reference = uncached(layer)
        for one in (layer, layer, reference):
            one.zero_grad()
            outputs, logabsdet = getattr(one, direction)(x)
            (outputs.square().sum() + logabsdet.sum()).backward()
        for parameter, counterpart in zip(layer.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, counterpart.grad, rtol=1e-10, atol=1e-10)


def test_a_filled_cache_is_copied() -> None:
    """Trap: deepcopy of nflows' layer fails once its cache was filled where gradients are recorded."""
    their_layer, our_layer = (layer.eval() for layer in pair(lambda lib: lib.OneByOneConvolution(6, using_cache=True)))
    x = x_of()
    their_layer(x)
    with pytest.raises(RuntimeError):
        copy.deepcopy(their_layer)
    our_layer(x), our_layer.inverse(x)
    for duplicate in (copy.deepcopy(our_layer), pickle.loads(pickle.dumps(our_layer))):
        with torch.no_grad():
            duplicate.upper_entries.zero_()
            assert_close(duplicate(x)[0], uncached(duplicate)(x)[0])
        assert_close(our_layer(x)[0], uncached(our_layer)(x)[0])


def test_another_permutation_and_overridden_matrices() -> None:
    """What a user puts in its place is what runs."""
    their_layer, our_layer = pair(lambda lib: lib.OneByOneConvolution(6))
    for layer, library in ((their_layer, ours), (our_layer, ours)):
        layer.permutation = library.ReversePermutation(6)
    assert_same(their_layer, our_layer, x_of())
    for layer in (their_layer, our_layer):
        layer.permutation = ours.InverseTransform(ours.Permutation(torch.tensor([2, 0, 1, 4, 5, 3])))
    assert_same(their_layer, our_layer, x_of())
    lower, upper = (value.detach() for value in our_layer._create_lower_upper())
    for layer in (their_layer, our_layer):
        layer._create_lower_upper = lambda: (lower, 2.0 * upper)
    assert_same(their_layer, our_layer, x_of())


def test_what_is_derived_from_tensors_follows_them() -> None:
    derived: Derived[float] = Derived()
    layer = nn.Linear(1, 1)
    calls: list[int] = []

    def value() -> float:
        def derive() -> float:
            calls.append(1)
            return layer.bias.item()

        return derived.get(layer, [layer.bias, layer.weight], derive)

    def changes() -> Iterator[None]:
        with torch.no_grad():
            yield
            layer.bias.fill_(2.0)
            yield
            layer.bias.data = torch.full((1,), 3.0)
            yield
            layer.bias = nn.Parameter(torch.full((1,), 4.0))
            yield
            layer.double()
            yield

    for count, _ in enumerate(changes(), 1):
        assert value() == value() == layer.bias.item()
        assert len(calls) == count
    assert derived.get(copy.deepcopy(layer), [layer.bias, layer.weight], lambda: 7.0) == 7.0
    with torch.inference_mode():
        unversioned = torch.ones(1)
        assert [derived.get(layer, [unversioned], lambda: 8.0), derived.get(layer, [unversioned], lambda: 9.0)] == [
            8.0,
            9.0,
        ]
