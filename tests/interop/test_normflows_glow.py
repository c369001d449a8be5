"""The normflows adapter's GlowBlock against normflows' own."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from support.covering import pairs
from support.helpers import assert_kernel_close
from torch import Tensor, nn

nf = pytest.importorskip("normflows")

from support.normflows_cases import (  # noqa: E402
    DIRECTIONS,
    assert_equal_outcomes,
    assert_equal_states,
    built,
    outcome,
    pair,
    randomise,
    relative_error,
)

import pyglow_fast.interop.normflows as fast  # noqa: E402
from pyglow_fast import functional  # noqa: E402

SPLITS = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")
MAPS = [{"scale_map": name} for name in ("exp", "sigmoid", "sigmoid_inv")] + [{"scale": False}]
NETS = [
    {},
    {"leaky": 0.1},
    {"init_zeros": False, "use_lu": False},
    {"net_actnorm": True},
    {"net_actnorm": True, "leaky": 0.1, "use_lu": False},
]
OPTIONS = [a | b | {"split_mode": split} for a, b, split in itertools.product(MAPS, NETS, SPLITS)]
X = (3, 4, 4, 6)


def text(options: dict[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in options.items())


def glow(library: Any, channels: int = 4, hidden: int = 6, **options: Any) -> nn.Module:
    block: nn.Module = library.flows.GlowBlock(channels, hidden, **options)
    return block


def as_it_starts(library: Any, channels: int = 4, **options: Any) -> nn.Module:
    return built(lambda lib: glow(lib, channels, **options), library)


def batch(shape: tuple[int, ...] = X, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype) * 2.0 + 1.0


@pytest.mark.full
@pytest.mark.parametrize("options", OPTIONS, ids=text)
def test_outputs_log_dets_and_gradients_are_theirs(options: dict[str, Any]) -> None:
    theirs, ours = pair(lambda library: glow(library, **options))
    for direction in DIRECTIONS:
        z = batch()
        expected = outcome(theirs, direction, z)
        assert_equal_outcomes(outcome(ours, direction, z), expected)
        with torch.no_grad():
            for got, wanted in zip(getattr(ours, direction)(z), expected[0], strict=True):
                assert relative_error(got, wanted) < 1e-10


@pytest.mark.parametrize(
    ("channels", "split"), [(5, "channel"), (5, "channel_inv"), (1, "checkerboard"), (2, "channel")]
)
def test_other_numbers_of_channels(channels: int, split: str) -> None:
    theirs, ours = pair(lambda library: glow(library, channels, split_mode=split))
    for direction in DIRECTIONS:
        z = batch((3, channels, 2, 4))
        assert_equal_outcomes(outcome(ours, direction, z), outcome(theirs, direction, z))


@pytest.mark.full
@pairs(
    pytest.mark.parametrize("split", SPLITS[:3]),
    pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"]),
    pytest.mark.parametrize("direction", DIRECTIONS),
)
def test_float32_is_as_precise_as_theirs(split: str, scale_map: str, direction: str) -> None:
    """Also of data far from zero, which the actnorm centres: folded, it must not add and subtract large numbers."""
    exact, _ = pair(lambda library: glow(library, 8, split_mode=split, scale_map=scale_map))
    plain, ours = pair(lambda library: glow(library, 8, split_mode=split, scale_map=scale_map), torch.float32)
    for block in (exact, plain, ours):
        with torch.no_grad():
            block.flows[2].t.add_(100.0)
    for block in (plain, ours):
        exact.load_state_dict(block.state_dict())
    z = torch.randn(4, 8, 8, 8) + (100.0 if direction == "inverse" else 0.0)
    (expected, expected_log_det), _ = outcome(exact, direction, z.double())
    (given, given_log_det), _ = outcome(plain, direction, z)
    (got, got_log_det), _ = outcome(ours, direction, z)
    assert_kernel_close(got, given, expected)
    assert_kernel_close(got_log_det, given_log_det, expected_log_det, magnitude=float(z[0].numel()))


class TestStart:
    @pytest.mark.parametrize("options", NETS, ids=text)
    def test_same_draws_and_keys(self, options: dict[str, Any]) -> None:
        theirs, ours = as_it_starts(nf, **options), as_it_starts(fast, **options)
        after = torch.rand(1)
        as_it_starts(nf, **options)
        assert torch.equal(torch.rand(1), after)  # as many draws
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("net_actnorm", [False, True])
    def test_first_pass_in_either_direction_initialises(
        self, training: bool, direction: str, net_actnorm: bool
    ) -> None:
        options = {"net_actnorm": net_actnorm, "init_zeros": False}
        theirs, ours = (as_it_starts(lib, **options).double().train(training) for lib in (nf, fast))
        assert not ours.is_initialized
        for scale in (1.0, 3.0):  # the second batch must not initialise
            z = scale * batch()
            for got, expected in zip(getattr(ours, direction)(z), getattr(theirs, direction)(z), strict=True):
                assert relative_error(got, expected) < 1e-10
            assert_equal_states(ours, theirs)
        assert ours.is_initialized

    def test_flag_put_by_hand_or_by_weights_counts(self) -> None:
        block = as_it_starts(fast)
        block.inverse(batch(dtype=torch.float32))
        scale = block.flows[2].s.detach().clone()
        block.flows[2].data_dep_init_done.fill_(0.0)
        block.inverse(10.0 * batch(dtype=torch.float32))
        assert not torch.equal(block.flows[2].s, scale)
        fresh = as_it_starts(fast)
        block.load_state_dict(fresh.state_dict())
        assert not block.is_initialized
        fresh.flows[2].data_dep_init_done = torch.tensor(1.0)
        fresh.inverse(batch(dtype=torch.float32))
        assert not fresh.flows[2].s.any()


class TestState:
    @pytest.mark.parametrize("options", NETS, ids=text)
    def test_loads_both_ways(self, options: dict[str, Any]) -> None:
        theirs, ours = pair(lambda library: glow(library, **options))
        randomise(theirs)
        stream = io.BytesIO()
        torch.save(theirs.state_dict(), stream)
        stream.seek(0)
        ours.load_state_dict(torch.load(stream, weights_only=True))
        assert relative_error(ours.inverse(z := batch())[0], theirs.inverse(z)[0]) < 1e-10
        randomise(ours)
        theirs.load_state_dict(ours.state_dict())
        assert relative_error(ours(z)[0], theirs(z)[0]) < 1e-10

    @pytest.mark.parametrize("initialized", [True, False])
    def test_copies(self, initialized: bool) -> None:
        block, z = as_it_starts(fast, net_actnorm=True).double(), batch()
        if initialized:
            block.inverse(z)
        for duplicate in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
            assert duplicate.is_initialized == initialized
            assert type(duplicate.flows[2]) is fast.ActNorm
            expected = copy.deepcopy(block).inverse(z)
            for got, wanted in zip(duplicate.inverse(z), expected, strict=True):
                assert relative_error(got, wanted) < 1e-10
            with torch.no_grad():
                for value in duplicate.parameters():
                    value.zero_()
            assert block.flows[1].log_S.any()


def test_twenty_steps_of_training_are_theirs() -> None:
    losses: list[list[float]] = []
    x = batch((4, 4, 4, 4))
    for library in (nf, fast):
        block = as_it_starts(library, net_actnorm=True).double()
        optimizer, seen = torch.optim.Adam(block.parameters(), lr=1e-2), []
        for _ in range(20):
            z, log_det = block.inverse(x)
            loss = (0.5 * z.square().flatten(1).sum(1) - log_det).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


class TestSpeedUp:
    @pytest.mark.parametrize("net_actnorm", [False, True])
    def test_net_runs_in_our_executor(self, net_actnorm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        block, z = as_it_starts(fast, net_actnorm=net_actnorm), batch(dtype=torch.float32)
        if not functional.net_as_products(z):
            pytest.skip("the library's convolutions are chosen")
        block.inverse(z)

        def not_called(*_: object) -> None:
            raise AssertionError("the net was called layer by layer")

        monkeypatch.setattr(nf.nets.ConvNet2d, "forward", not_called)
        block.inverse(z)
        block(z)

    @pytest.mark.parametrize("of", ["flows.0", "flows.0.flows.0", "flows.0.flows.1", "flows.1", "flows.2"])
    def test_hooks_are_called(self, of: str) -> None:
        """Of every layer within the block; the forward calls modules, the inverse calls methods, as in normflows."""
        block, z = as_it_starts(fast), batch(dtype=torch.float32)
        expected, calls = block(z)[0], []
        block.get_submodule(of).register_forward_hook(lambda *_: calls.append(1))
        assert relative_error(block(z)[0], expected) < 1e-5
        assert calls == [1]

    @pytest.mark.parametrize("of", ["flows.0.flows.1.param_map", "flows.0.flows.1.param_map.net.2"])
    def test_hooks_within_the_net_are_called(self, of: str) -> None:
        block, z, calls = as_it_starts(fast), batch(dtype=torch.float32), []
        block.get_submodule(of).register_forward_hook(lambda *_: calls.append(1))
        block(z)
        block.inverse(z)
        assert calls == [1, 1]

    def test_exchanged_and_overridden_layers_count(self) -> None:
        theirs, ours = pair(lambda library: glow(library))
        for block in (theirs, ours):
            block.flows[1] = nn.ModuleList([nf.flows.Permute(4, "swap")])[0]
        z = batch()
        assert_equal_outcomes(outcome(ours, "inverse", z), outcome(theirs, "inverse", z))

        class Doubled(fast.Invertible1x1Conv):
            def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
                out, log_det = super().inverse(z)
                return 2.0 * out, log_det

        block = as_it_starts(fast).double()
        block.flows[0].flows[1].param_map = nn.Conv2d(2, 4, 1).double()
        nn.init.zeros_(block.flows[0].flows[1].param_map.weight)
        nn.init.zeros_(block.flows[0].flows[1].param_map.bias)
        expected = block.inverse(z)[0][:, :2]
        block.flows[1].__class__ = Doubled
        assert relative_error(block.inverse(z)[0][:, :2], 2.0 * expected) < 1e-10


class TestParts:
    @pytest.mark.parametrize("options", [a | b for a, b in itertools.product(MAPS, NETS[:4])], ids=text)
    @pytest.mark.parametrize("channels", [4, 5])
    def test_are_the_block_from_x_to_z(self, options: dict[str, Any], channels: int) -> None:
        _, block = pair(lambda library: glow(library, channels, **options))
        x = batch((3, channels, 4, 6))
        parts = fast.flow_parts(block)
        assert not isinstance(parts, str)
        u = functional.channel_mix(x, parts.channel_map.matrix, parts.channel_map.offset)
        z, log_det = functional.coupling(u, parts.run_net(u[:, : parts.kept]), parts.spec)
        log_det = log_det + functional.per_sample(x, parts.channel_map.log_det)
        expected, expected_log_det = block.inverse(x)
        assert relative_error(z, expected) < 1e-10
        assert relative_error(log_det, expected_log_det) < 1e-10
        wanted = list(block.parameters())
        grads = torch.autograd.grad(z.square().sum() + log_det.sum(), wanted, allow_unused=True)
        expected_grads = torch.autograd.grad(
            expected.square().sum() + expected_log_det.sum(), wanted, allow_unused=True
        )
        for got, grad in zip(grads, expected_grads, strict=True):
            assert got is not None
            assert relative_error(got, grad) < 1e-10

    def test_order_can_be_copied(self) -> None:
        parts = fast.flow_parts(as_it_starts(fast))
        assert pickle.loads(pickle.dumps(parts.order)) == parts.order == copy.deepcopy(parts.order)

    def test_what_has_none_says_why(self) -> None:
        assert "split" in fast.flow_parts(as_it_starts(fast, split_mode="checkerboard"))
        assert "scale map" in fast.flow_parts(as_it_starts(fast, scale_map="cubic"))
        assert "no GlowBlock of ours" in fast.flow_parts(as_it_starts(nf))
        block = as_it_starts(fast)
        block.flows[2].register_forward_hook(lambda *_: None)
        assert "actnorm" in fast.flow_parts(block)


class TestAdoption:
    def test_changes_the_layers_in_place_and_back(self) -> None:
        model = nn.ModuleList([as_it_starts(nf, net_actnorm=True).double(), nf.flows.Squeeze(), nf.flows.Split()])
        randomise(model)
        z = batch()
        expected = model[0].inverse(z)
        before = dict(model.named_parameters())
        names = fast.adopt(model)
        assert {"0", "0.flows.0", "0.flows.0.flows.1", "0.flows.1", "0.flows.2", "1"} < set(names)
        assert type(model[0]) is fast.GlowBlock
        assert type(model[2]) is nf.flows.Split
        assert all(value is before[name] for name, value in model.named_parameters())
        for got, wanted in zip(model[0].inverse(z), expected, strict=True):
            assert relative_error(got, wanted) < 1e-10
        assert fast.adopt(model) == []
        assert fast.release(model) == names
        assert type(model[0]) is nf.flows.GlowBlock
        for got, wanted in zip(model[0].inverse(z), expected, strict=True):
            assert relative_error(got, wanted) < 1e-10
        assert relative_error(pickle.loads(pickle.dumps(model[0])).inverse(z)[0], expected[0]) < 1e-10

    def test_subclasses_stay(self) -> None:
        class Mine(nf.flows.Squeeze):
            pass

        layer = Mine()
        assert fast.adopt(layer) == []
        assert type(layer) is Mine
