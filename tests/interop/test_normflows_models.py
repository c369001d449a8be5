"""Models of normflows with the adapter's layers in them: its Glow example, MultiscaleFlow, NormalizingFlow."""

from __future__ import annotations

import copy
import io
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

nf = pytest.importorskip("normflows")

from support.normflows_cases import assert_equal_states, built, mark_initialized, randomise, relative_error  # noqa: E402

import pyglow_fast.interop.normflows as fast  # noqa: E402

LEVELS, STEPS, HIDDEN, CLASSES, SHAPE = 3, 2, 8, 10, (3, 32, 32)


def glow_example(nf: Any, conditional: bool = True, **options: Any) -> Any:
    """The class-conditional Glow for CIFAR-10 of normflows' documentation, on the names of either library, smaller."""
    channels, height, width = SHAPE
    q0, merges, flows = [], [], []
    for i in range(LEVELS):
        level = [nf.flows.GlowBlock(channels * 2 ** (LEVELS + 1 - i), HIDDEN, **options) for _ in range(STEPS)]
        flows.append([*level, nf.flows.Squeeze()])
        if i > 0:
            merges.append(nf.flows.Merge())
            shape = (channels * 2 ** (LEVELS - i), height // 2 ** (LEVELS - i), width // 2 ** (LEVELS - i))
        else:
            shape = (channels * 2 ** (LEVELS + 1), height // 2**LEVELS, width // 2**LEVELS)
        if conditional:
            q0.append(nf.distributions.ClassCondDiagGaussian(shape, CLASSES))
        else:
            q0.append(nf.distributions.DiagGaussian(shape))
    return nf.MultiscaleFlow(q0, flows, merges, class_cond=conditional)


def images(n: int = 4) -> tuple[Tensor, Tensor]:
    """Dequantised, and classes."""
    return (torch.randint(256, (n, *SHAPE)) + torch.rand(n, *SHAPE)) / 256.0, torch.randint(CLASSES, (n,))


def train_example(nf: Any, steps: int) -> tuple[Any, list[float]]:
    """The loop of the example: Adamax, and no step where the loss is not finite."""
    model = built(glow_example, nf)
    optimizer = torch.optim.Adamax(model.parameters(), lr=1e-3, weight_decay=1e-5)
    torch.manual_seed(1)
    batches, losses = [images() for _ in range(2)], []
    for step in range(steps):
        x, y = batches[step % 2]
        optimizer.zero_grad()
        loss = model.forward_kld(x, y)
        if ~(torch.isnan(loss) | torch.isinf(loss)):
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return model, losses


class TestGlowExample:
    def test_trains_and_samples_as_theirs(self) -> None:
        (theirs, expected), (ours, losses) = (train_example(library, 20) for library in (nf, fast))
        # Rounding differs, and training amplifies it.
        assert losses == pytest.approx(expected, rel=1e-3)
        assert losses[0] == pytest.approx(expected[0], rel=1e-6)
        assert losses[-1] < losses[0] - 100.0
        ours.load_state_dict(theirs.state_dict())
        x, y = images()
        with torch.no_grad():
            for model in (theirs, ours):
                model.eval()
            bits = [model.log_prob(x, y) / (-math.log(2.0) * x[0].numel()) for model in (ours, theirs)]
            assert relative_error(*bits) < 1e-5
            samples = []
            for model in (ours, theirs):
                torch.manual_seed(2)
                samples.append(model.sample(CLASSES, torch.arange(CLASSES), temperature=0.7))
            for got, wanted in zip(*samples, strict=True):
                assert got.shape == wanted.shape
                assert relative_error(got, wanted) < 1e-4

    def test_saves_and_loads_by_their_methods(self, tmp_path: Any) -> None:
        x, y = images()
        models = [built(glow_example, library) for library in (nf, fast)]
        for one, other in (models, models[::-1]):
            one.forward_kld(x, y)
            randomise(one, 0.02)
            one.save(tmp_path / "model.pth")
            other.load(tmp_path / "model.pth")
            assert_equal_states(other, one)
            assert relative_error(one.log_prob(x, y), other.log_prob(x, y)) < 1e-5

    def test_whole_model_is_copied_and_pickled(self) -> None:
        x, y = images(2)
        model = built(glow_example, fast)
        expected = model.log_prob(x, y)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        for duplicate in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(stream, weights_only=False),
        ):
            # The first pass, which initialises, runs layer by layer.
            assert relative_error(duplicate.log_prob(x, y), expected) < 1e-5

    @pytest.mark.parametrize("options", [{}, {"split_mode": "checkerboard"}, {"scale": False, "net_actnorm": True}])
    def test_every_way_through_it(self, options: dict[str, Any]) -> None:
        x, _ = images(2)
        theirs, ours = (
            randomise(mark_initialized(built(lambda lib: glow_example(lib, False, **options), library).double()), 0.05)
            for library in (nf, fast)
        )
        z, log_det = ours.inverse_and_log_det(x.double())
        expected, expected_log_det = theirs.inverse_and_log_det(x.double())
        for got, wanted in zip(z, expected, strict=True):
            assert relative_error(got, wanted) < 1e-10
        assert relative_error(log_det, expected_log_det) < 1e-10
        back, back_log_det = ours.forward_and_log_det(z)
        assert relative_error(back, x.double()) < 1e-8
        assert relative_error(back_log_det, -log_det) < 1e-8
        # In 1.7.3 log_prob has no default for y.
        assert relative_error(ours.log_prob(x.double(), None), theirs.log_prob(x.double(), None)) < 1e-10
        assert relative_error(ours(x.double()), -ours.log_prob(x.double(), None)) < 1e-12


def test_single_names_are_enough() -> None:
    """``from pyglow_fast.interop.normflows import GlowBlock`` as the only changed line: the rest stays normflows'."""

    flows = SimpleNamespace(GlowBlock=fast.GlowBlock, Squeeze=nf.flows.Squeeze, Merge=nf.flows.Merge)
    mixed = SimpleNamespace(flows=flows, distributions=nf.distributions, MultiscaleFlow=nf.MultiscaleFlow)
    x, y = images(2)
    expected, model = (built(glow_example, library).double() for library in (nf, mixed))
    assert relative_error(model.log_prob(x.double(), y), expected.log_prob(x.double(), y)) < 1e-10


class TestNormalizingFlow:
    @staticmethod
    def real_nvp(nf: Any) -> Any:
        """RealNVP of points in the plane as in normflows' README, with an actnorm."""
        flows: list[nn.Module] = []
        for _ in range(4):
            net = nf.nets.MLP([1, 16, 16, 2], init_zeros=True)
            flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(2, mode="swap"), nf.flows.ActNorm(2)]
        return nf.NormalizingFlow(nf.distributions.base.DiagGaussian(2), flows, nf.distributions.TwoMoons())

    def test_trains_on_points_as_theirs(self) -> None:
        losses = []
        points = nf.distributions.TwoMoons().sample(64).double()
        for library in (nf, fast):
            model, seen = built(self.real_nvp, library).double(), []
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            for _ in range(20):
                loss = model.forward_kld(points)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append(loss.item())
            losses.append(seen)
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # their total is float32
        assert losses[0][-1] < losses[0][0]

    def test_reverse_kld_and_samples(self) -> None:
        found = []
        for library in (nf, fast):
            model = randomise(built(self.real_nvp, library).double(), 0.05)
            torch.manual_seed(3)
            values = [model.reverse_kld(32), model.reverse_kld(32, score_fn=False), model.reverse_alpha_div(32)]
            values[0].backward()
            found.append([*values, *model.sample(5), *(parameter.grad for parameter in model.parameters())])
        for got, wanted in zip(*found, strict=True):
            if wanted is not None:
                assert relative_error(got, wanted) < 1e-6

    def test_reversed_blocks(self) -> None:
        block = built(lambda lib: lib.flows.GlowBlock(4, 6), fast).double()
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        expected = block.inverse(x)
        for got, wanted in zip(nf.flows.Reverse(block)(x), expected, strict=True):
            assert torch.equal(got, wanted) or relative_error(got, wanted) < 1e-12
