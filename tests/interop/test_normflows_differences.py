"""Where normflows 1.7.3 goes wrong, and what its adapter does instead; each case shows both."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

nf = pytest.importorskip("normflows")

from support.commands import run_ranks  # noqa: E402
from support.normflows_cases import DIRECTIONS, built, mark_initialized, randomise, relative_error  # noqa: E402

import pyglow_fast.interop.normflows as fast  # noqa: E402
from pyglow_fast.train.ranks import leave_group  # noqa: E402

RANKS = 2


def actnorm(library: Any) -> nn.Module:
    return library.flows.ActNorm((3, 1, 1))


def glow(library: Any, **options: Any) -> nn.Module:
    return built(lambda lib: lib.flows.GlowBlock(4, 6, **options), library)


def assert_refused_unchanged(layer: nn.Module, call: Callable[[], object], match: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=match):
        call()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.filterwarnings("ignore:std\\(\\)")
@pytest.mark.parametrize("direction", DIRECTIONS)
class TestInitialisation:
    def test_one_value_per_channel_is_centred(self, direction: str) -> None:
        z = torch.randn(1, 3, 1, 1) + 5.0
        assert getattr(actnorm(nf), direction)(z)[0].isnan().all()
        out, log_det = getattr(actnorm(fast), direction)(z)
        assert not out.any()
        assert log_det == 0.0

    def test_constant_channel_keeps_its_scale(self, direction: str) -> None:
        z = torch.randn(4, 3, 5, 5)
        z[:, 1] = 7.0
        theirs, ours = actnorm(nf), actnorm(fast)
        getattr(theirs, direction)(z)
        getattr(ours, direction)(z)
        assert theirs.s[0, 1].abs() > 10.0  # the next batch is multiplied by a million
        assert ours.s[0, 1] == 0.0
        assert getattr(ours, direction)(z)[0][:, 1].abs().max() < 1e-5
        for channel in (0, 2):
            assert relative_error(ours.s[0, channel], theirs.s[0, channel]) < 1e-5

    @pytest.mark.parametrize(
        ("shape", "value", "match"),
        [
            ((0, 3, 4, 4), 1.0, "not empty"),
            ((2, 3, 4, 4), float("nan"), "finite"),
            ((2, 3, 4, 4), float("inf"), "finite"),
            ((2, 6, 4, 4), 1.0, r"shape \(\*, 3, \*, \*\)"),
            ((2, 3), 1.0, r"shape \(\*, 3, \*, \*\)"),
        ],
    )
    def test_unusable_batch_is_refused(self, direction: str, shape: tuple[int, ...], value: float, match: str) -> None:
        layer = actnorm(fast)
        z = torch.randn(shape) * value
        assert_refused_unchanged(layer, lambda: getattr(layer, direction)(z), match)
        assert not layer.is_initialized

    @pytest.mark.parametrize("net_actnorm", [False, True])
    def test_block_refuses_before_any_of_its_actnorms_is_set(self, direction: str, net_actnorm: bool) -> None:
        block = glow(fast, net_actnorm=net_actnorm)
        half = torch.randn(2, 4, 4, 4)
        half[:, 3] = float("nan")  # what the net reads is fine
        for z, match in ((half, "finite"), (half[:0], "not empty"), (half[:, :3], r"shape \(N, 4, H, W\)")):
            assert_refused_unchanged(block, lambda z=z: getattr(block, direction)(z), match)

    def test_of_another_dtype_leaves_the_parameters_theirs(self, direction: str) -> None:
        theirs, ours = actnorm(nf), actnorm(fast)
        for layer in (theirs, ours):
            getattr(layer, direction)(torch.randn(2, 3, 4, 4, dtype=torch.float64))
        assert theirs.s.dtype == torch.float64
        assert ours.s.dtype == torch.float32

    def test_flag_stays_the_buffer_that_it_is(self, direction: str) -> None:
        """Theirs is a new one on the CPU, wherever the model is."""
        theirs, ours = actnorm(nf).double(), actnorm(fast).double()
        flags = [layer.data_dep_init_done for layer in (theirs, ours)]
        for layer in (theirs, ours):
            getattr(layer, direction)(torch.randn(2, 3, 4, 4, dtype=torch.float64))
        assert theirs.data_dep_init_done is not flags[0]
        assert ours.data_dep_init_done is flags[1]
        assert flags[1] == 1.0


class TestArithmetic:
    def test_log_sigmoid_stays_finite_where_the_sigmoid_underflows(self) -> None:
        found = []
        for library in (nf, fast):
            layer = library.flows.AffineCoupling(nn.Conv2d(1, 2, 1), scale_map="sigmoid")
            nn.init.zeros_(layer.param_map.weight)
            with torch.no_grad():
                layer.param_map.bias.copy_(torch.tensor([0.0, -200.0]))
            found.append(layer.inverse([torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)])[1])
        assert found[0].isinf()
        assert found[1].item() == pytest.approx(-198.0)

    @pytest.mark.parametrize(("direction", "raw"), [("forward", 200.0), ("inverse", -200.0)])
    def test_exp_that_overflows_is_refused(self, direction: str, raw: float) -> None:
        """Only where their result is inf; an underflow in the other direction is as theirs."""
        z, layers = [torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)], []
        for library in (nf, fast):
            layer = library.flows.AffineCoupling(nn.Conv2d(1, 2, 1))
            nn.init.zeros_(layer.param_map.weight)
            with torch.no_grad():
                layer.param_map.bias.copy_(torch.tensor([0.5, raw]))
            layers.append(layer)
        theirs, ours = layers
        assert getattr(theirs, direction)(z)[0][1].isinf()
        with pytest.raises(ValueError, match="overflow"):
            getattr(ours, direction)(z)
        other = "inverse" if direction == "forward" else "forward"
        (_, expected), expected_log_det = getattr(theirs, other)(z)
        (_, got), log_det = getattr(ours, other)(z)
        assert torch.equal(got, expected)
        assert torch.equal(log_det, expected_log_det)

    def test_inverse_is_that_of_the_matrix_that_is_applied(self) -> None:
        """Theirs is a product of rounded inverses of the factors."""
        errors = []
        x = torch.randn(4, 24, 4, 4)
        for library in (nf, fast):
            layer = randomise(built(lambda lib: lib.flows.Invertible1x1Conv(24, True), library), 0.3)
            errors.append(float((layer(layer.inverse(x)[0])[0] - x).detach().abs().max()))
        assert errors[1] <= errors[0]

    def test_flow_keeps_its_dtype_under_autocast(self) -> None:
        x = torch.randn(2, 4, 4, 4)
        theirs, ours = (randomise(mark_initialized(glow(library))) for library in (nf, fast))
        exact = copy.deepcopy(ours).double().inverse(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = theirs.inverse(x), ours.inverse(x)
            assert expected[0].dtype == torch.bfloat16
            for value, wanted, plain in zip(got, exact, expected, strict=True):
                assert value.dtype == torch.float32
                assert relative_error(value.double(), wanted) <= relative_error(plain.double(), wanted)
            half = ours.inverse(x.bfloat16())[0]  # from a layer that is not ours
            assert half.dtype == ours(half.bfloat16())[0].dtype == torch.float32


class TestRefusals:
    @pytest.mark.parametrize("scale", [True, False])
    def test_map_of_the_wrong_shape(self, scale: bool) -> None:
        z = [torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3)]
        wide = 4 if scale else 2
        nets = [nn.Conv2d(2, wide - 1, 1), nn.Conv2d(2, wide // 2, 1), nn.Conv2d(2, wide, 3)]
        # Their log-det of a map that is broadcast over the positions counts one of these alone.
        nets.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, wide, 1)))
        for net in nets:
            for direction in DIRECTIONS:
                layer = fast.AffineCoupling(net, scale)
                with pytest.raises(
                    ValueError, match=rf"param_map: expected an output of (shape \(1, {wide}, 3, 3\)|{wide} channels)"
                ):
                    getattr(layer, direction)(z)
        broadcast = nf.flows.AffineCoupling(nets[-1], scale)
        assert broadcast(z)[0][1].shape == z[1].shape

    def test_recognised_net_of_the_wrong_width(self) -> None:
        block = glow(fast)
        block.flows[0].flows[1].param_map = nf.nets.ConvNet2d((2, 6, 6, 6), (3, 1, 3))
        with pytest.raises(ValueError, match="param_map: expected an output of"):
            block(torch.randn(2, 4, 4, 4))

    @pytest.mark.parametrize("direction", DIRECTIONS)
    def test_inputs_that_do_not_fit(self, direction: str) -> None:
        block = mark_initialized(glow(fast))
        for shape in ((2, 6, 4, 4), (4, 4, 4), (2, 4)):
            with pytest.raises(ValueError, match=r"z: expected shape \(N, 4, H, W\)"):
                getattr(block, direction)(torch.randn(shape))
            with pytest.raises(ValueError, match=r"z: expected shape \(N, 4, H, W\)"):
                getattr(fast.Invertible1x1Conv(4), direction)(torch.randn(shape))

    def test_singular_matrix(self) -> None:
        layer = fast.Invertible1x1Conv(3)
        nn.init.zeros_(layer.W)
        with pytest.raises(ValueError, match="singular"):
            layer(torch.randn(1, 3, 2, 2))

    def test_squeeze(self) -> None:
        with pytest.raises(ValueError, match="divisible by 2"):
            fast.Squeeze().inverse(torch.randn(1, 3, 3, 4))
        with pytest.raises(ValueError, match="divisible by 4"):
            fast.Squeeze()(torch.randn(1, 3, 4, 4))
        with pytest.raises(ValueError, match="N, C, H, W"):
            fast.Squeeze()(torch.randn(1, 8, 4))

    @pytest.mark.filterwarnings("ignore:Initializing zero-element")
    @pytest.mark.parametrize("library", [nf, fast], ids=["theirs", "ours"])
    def test_unknown_options_are_refused_as_by_them(self, library: Any) -> None:
        x = torch.randn(2, 4, 4, 4)
        with pytest.raises(NotImplementedError):
            glow(library, split_mode="half")
        with pytest.raises(NotImplementedError):
            glow(library, scale_map="cubic").inverse(x)
        with pytest.raises(NotImplementedError):
            library.flows.AffineCouplingBlock(nn.Conv2d(2, 4, 1), split_mode="half")(x)
        with pytest.raises(NotImplementedError):
            library.flows.Permute(4, "roll").inverse(x)
        with pytest.raises(ValueError):
            library.flows.GlowBlock(1, 6).inverse(x[:, :1])  # nothing to split

    def test_second_derivatives_raise(self) -> None:
        block, x = mark_initialized(glow(fast)), torch.randn(2, 4, 4, 4, requires_grad=True)
        (grad,) = torch.autograd.grad(block.inverse(x)[0].square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            grad.square().sum().backward()

    def test_changed_outputs_raise_in_the_backward(self) -> None:
        block = mark_initialized(glow(fast))
        z, _ = block.inverse(torch.randn(2, 4, 4, 4))
        z += 1.0
        with pytest.raises(RuntimeError, match="inplace"):
            z.sum().backward()
        x, _ = block(torch.randn(2, 4, 4, 4))
        x -= 1.0  # as normflows' Shift does after the last block
        x.sum().backward()


def first_passes(library: Any, batch: Tensor) -> list[Tensor]:
    """The actnorms of a block with one in its net, set from a batch."""
    block = glow(library, net_actnorm=True)
    block.inverse(batch)
    return [value.detach() for name, value in block.named_parameters() if name.endswith((".s", ".t"))]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    timeout = datetime.timedelta(seconds=300)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timeout)
    batch = whole_batch()[rank::RANKS]
    found = {"theirs": first_passes(nf, batch), "ours": first_passes(fast, batch)}
    torch.save(found, Path(folder) / f"{rank}.pt")
    leave_group()


def whole_batch() -> Tensor:
    return torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(5)) * 3.0 + 1.0


@pytest.mark.full
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_ranks_are_initialised_alike_from_all_batches(tmp_path: Path) -> None:
    ranks = run_ranks(work, tmp_path, RANKS)
    assert not torch.equal(ranks[0]["theirs"][0], ranks[1]["theirs"][0])  # they diverge
    alone = first_passes(fast, whole_batch())
    assert len(alone) == 6
    for one, other, expected in zip(ranks[0]["ours"], ranks[1]["ours"], alone, strict=True):
        assert torch.equal(one, other)
        assert relative_error(one, expected) < 1e-5
