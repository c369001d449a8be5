"""The CUDA kernels that take a channels-last net's output beside a contiguous state, against their other paths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.covering import pairs
from support.emulated_cases import MAPS, SPECS, coupling_case, mix_case
from support.emulator import assert_only_written, laid_out
from support.gather_emulator import Gather, GatherEmulator
from support.helpers import assert_close
from torch import Tensor

from pyglow_fast.reference import CouplingSpec

SPEC = CouplingSpec()
NETS = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}
# (N, C, P): C2 of 2, 6, 10, 12, 24, 48 and 76, in fours and not; one tile and several, ragged ones, samples within a
# tile and across two; several chunks of channels and several groups of them.
SHAPES = [
    (3, 4, 20),
    (2, 12, 24),
    (1, 12, 1100),
    (5, 20, 36),
    (2, 24, 400),
    (2, 48, 36),
    (1, 96, 64),
    (2, 152, 12),
    (1, 260, 8),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
nets = pytest.mark.parametrize("net", NETS)
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture
def emulator(_library: Path) -> GatherEmulator:
    return GatherEmulator(_library)


class Case:
    """Inputs of all ops that take a net's output, and their results by name."""

    def __init__(
        self, shape: tuple[int, int, int], net: str, spec: CouplingSpec, transformed: int | None = None
    ) -> None:
        dtype, net_dtype = NETS[net]
        self.spec = spec
        self.x, net_out = coupling_case(shape, spec, dtype)
        if transformed is not None:
            net_out = net_out[:, : transformed * (1 if spec.coupling == "additive" else 2)]
        self.net_out = net_out.to(net_dtype)
        self.grad, self.matrix, self.offset = mix_case(shape, dtype)
        self.added = torch.randn_like(self.x[:, : shape[1] // 2])
        self.grad_log_det = torch.randn(shape[0], dtype=dtype)
        self.gather = Gather(torch.randn(shape[1], dtype=dtype), torch.randperm(shape[1]), self.offset)

    def run(self, emulator: GatherEmulator, layout: str) -> dict[str, Tensor]:
        """The results with a net's output and a gradient of it in that layout; the state is contiguous."""
        emulator.net_layout = layout
        net_out = laid_out(self.net_out, layout)
        results: dict[str, Tensor | None] = {}
        for inverse in (False, True):
            way = "inverse" if inverse else "forward"
            out = emulator.coupling_mix(self.x, net_out, self.matrix, self.offset, self.spec, inverse)
            results |= dict(zip((f"mixed {way}", f"mixed log_det {way}"), out, strict=True))
            out = emulator.coupling(self.x, net_out, self.spec, inverse)
            results |= dict(zip((f"coupled {way}", f"log_det {way}"), out, strict=True))
            for recover in (False, True):
                grads = emulator.coupling_backward(
                    self.x, net_out, self.grad, self.grad_log_det, self.spec, inverse, recover
                )
                results |= {f"{name} {way} {recover}": value for name, value in grads._asdict().items()}
            gathered = emulator.gather(self.x, self.gather, net_out, self.spec, inverse)
            results |= dict(zip((f"gathered {way}", f"gathered log_det {way}"), gathered, strict=True))
        common = (self.x, net_out, self.grad, self.grad_log_det, self.matrix)
        for added in (None, self.added):
            split = "whole" if added is None else "split"
            mixed = emulator.coupling_mix_backward(*common, self.spec, added)
            results |= {f"mix {name} {split}": value for name, value in mixed._asdict().items()}
            gathers = emulator.gather_backward(
                self.x, self.gather, self.grad, added, net_out, self.grad_log_det, self.spec
            )
            results |= {f"gather sum {name} {split}": value for name, value in gathers._asdict().items()}
        step = emulator.step_backward(*common, self.offset, self.spec)
        results |= {f"step {name}": value for name, value in step._asdict().items()}
        back = Gather(self.gather.scale, self.gather.index, None, self.offset)
        step = emulator.step_gather_backward(self.x, back, net_out, self.grad, self.grad_log_det, self.spec)
        results |= {f"gather step {name}": value for name, value in step._asdict().items()}
        return {name: value for name, value in results.items() if value is not None}


@pairs(shapes, nets, specs)
def test_channels_last_net(emulator: GatherEmulator, shape: tuple[int, int, int], net: str, spec: CouplingSpec) -> None:
    """The same values to the bit; what is summed over positions (and for log_det over channels) may be in any order."""
    case = Case(shape, net, spec)
    expected = case.run(emulator, "contiguous")
    for name, got in case.run(emulator, "channels_last").items():
        assert_only_written(got)
        if "log_det" in name or ("sum" in name and got.dim() == 1):
            assert_close(got / shape[2], expected[name] / shape[2])
        else:
            assert torch.equal(got, expected[name]), name


KERNELS = {
    "coupling": "coupling_patches_kernel",
    "coupling_backward": "coupling_backward_patches_kernel",
    "gather": "gather_patches_kernel",
    "gather_backward": "gather_backward_patches_kernel",
    "step_gather_backward": "step_gather_backward_patches_kernel",
    "coupling_mix": "CoupledSource<float, true, true>",
    "coupling_mix_backward": "CouplingSink<float, true>",
    "step_backward": "StepSource<float, true>",
}


def launched(emulator: GatherEmulator, op: str, net_out: Tensor, net_layout: str, x: Tensor) -> bool:
    """Whether the op takes the net's output in patches."""
    emulator.only_recorded, emulator.net_layout = True, net_layout
    channels = x.shape[1]
    weight, matrix, offset = torch.zeros(x.shape[0]), torch.eye(channels), torch.zeros(channels)
    gather = Gather(offset, torch.arange(channels))
    calls = {
        "coupling": lambda: emulator.coupling(x, net_out, SPEC),
        "coupling_backward": lambda: emulator.coupling_backward(x, net_out, x, weight, SPEC),
        "gather": lambda: emulator.gather(x, gather, net_out, SPEC),
        "gather_backward": lambda: emulator.gather_backward(x, gather, x, None, net_out, weight, SPEC),
        "step_gather_backward": lambda: emulator.step_gather_backward(x, gather, net_out, x, weight, SPEC),
        "coupling_mix": lambda: emulator.coupling_mix(x, net_out, matrix, offset, SPEC),
        "coupling_mix_backward": lambda: emulator.coupling_mix_backward(x, net_out, x, weight, matrix, SPEC),
        "step_backward": lambda: emulator.step_backward(x, net_out, x, weight, matrix, offset, SPEC),
    }
    calls[op]()
    return any(KERNELS[op] in f"{launch.kernel} {launch.arguments}" for launch in emulator.launches())


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(
    ("channels", "positions", "layout", "net_layout", "patches"),
    [
        (24, 64, "channels_last", "channels_last", True),
        (12, 64, "channels_last", "channels_last", True),
        (12, 64, "channels_last_slice", "channels_last_slice", True),
        (12, 64, "contiguous", "contiguous", False),
        (10, 64, "channels_last", "channels_last", False),  # odd halves
        (12, 63, "channels_last", "channels_last", False),  # no whole vectors of positions
        (12, 64, "strided", "strided", False),
    ],
)
def test_which_path(
    emulator: GatherEmulator, op: str, channels: int, positions: int, layout: str, net_layout: str, patches: bool
) -> None:
    """Patches are for even halves of channels-last tensors beside states of whole vectors, and for nothing else."""
    x, net_out = coupling_case((2, channels, positions), SPEC, torch.float32)
    assert launched(emulator, op, laid_out(net_out, layout), net_layout, x) == patches


@pytest.mark.parametrize("op", [op for op in KERNELS if op.endswith("backward")])
def test_a_gradient_of_another_layout_than_the_net(emulator: GatherEmulator, op: str) -> None:
    """Then no tensor of the net is taken in patches, but by what reads alone."""
    x, net_out = coupling_case((2, 12, 64), SPEC, torch.float32)
    assert not launched(emulator, op, laid_out(net_out, "channels_last"), "contiguous", x)
    assert not launched(emulator, op, net_out, "channels_last", x)


@nets
@pytest.mark.parametrize("kept", [0, 2, 6])
@pytest.mark.parametrize("transformed", [2, 6, 8])
@pytest.mark.parametrize("layout", ["channels_last", "channels_last_slice"])
def test_any_split_of_the_channels(
    emulator: GatherEmulator, kept: int, transformed: int, layout: str, net: str
) -> None:
    """The halves begin and end anywhere; what lies around them is not touched."""
    case = Case((2, kept + transformed, 40), net, SPEC, transformed)
    expected = case.run(emulator, "contiguous")
    for name, got in case.run(emulator, layout).items():
        assert_only_written(got)
        if "log_det" in name or ("sum" in name and got.dim() == 1):
            assert_close(got / 40, expected[name] / 40)
        else:
            assert torch.equal(got, expected[name]), name


@pytest.mark.parametrize("net", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 12, 700), (1, 76, 84)], ids=lambda s: "x".join(map(str, s)))
def test_any_order_of_threads_gives_the_same_bits(
    emulator: GatherEmulator, shape: tuple[int, int, int], net: str
) -> None:
    case = Case(shape, net, SPEC)
    first = case.run(emulator, "channels_last")
    for seed in (1, 12345):
        emulator.seed = seed
        for name, got in case.run(emulator, "channels_last").items():
            assert torch.equal(got, first[name]), name


@pytest.mark.parametrize("wrong", [-1, 12, 2**40])
def test_an_index_that_names_no_channel_shows(emulator: GatherEmulator, wrong: int) -> None:
    """NaN comes of the channel that asks, also beside patches; the channel that nobody asks for stays in bounds."""
    x, net_out = coupling_case((2, 12, 20), SPEC, torch.float32)
    index = torch.arange(12)
    index[9] = wrong
    gather, net = Gather(torch.ones(12), index, torch.zeros(12)), laid_out(net_out, "channels_last")
    emulator.net_layout = "channels_last"
    out, _ = emulator.gather(x, gather, net)
    step = emulator.step_gather_backward(x, gather, net, x, torch.zeros(2), SPEC)
    grads = emulator.gather_backward(x, gather, x, None, net, torch.zeros(2))
    for found in (out.isnan().all(2).all(0), step.x.isnan().all(2).all(0), grads.grad_scale.isnan()):
        assert found.tolist() == [channel == 9 for channel in range(12)]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(70, 4, 4), (5, 4, 100), (1, 4, 70_004), (601, 4, 100)], ids=str)
def test_log_det_of_every_sample(emulator: GatherEmulator, shape: tuple[int, int, int], inverse: bool) -> None:
    """log_det counts each position once. With exp, log s is the net's own output."""
    spec = MAPS["exp"]
    net_out = torch.randint(-3, 4, shape).float()
    net_out[:, :2] = 0.0
    x, net = torch.zeros(shape), laid_out(net_out, "channels_last")
    eye, zeros = torch.eye(4), torch.zeros(4)
    gather = Gather(zeros, torch.tensor([2, 0, 3, 1]))
    expected = net_out[:, 2:].double().sum((1, 2)) * (-1 if inverse else 1)  # small whole numbers: exact in any order
    for log_det in (
        emulator.coupling(x, net, spec, inverse)[1],
        emulator.gather(x, gather, net, spec, inverse)[1],
        emulator.coupling_mix(x, net, eye, zeros, spec, inverse)[1],
    ):
        assert log_det is not None
        assert torch.equal(log_det.double(), expected)
