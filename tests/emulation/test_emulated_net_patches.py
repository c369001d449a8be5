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

    def __init__(self, shape: tuple[int, int, int], net: str, spec: CouplingSpec, transformed: int | None = None) -> None:
        dtype, net_dtype = NETS[net]
        self.spec = spec
        self.x, net_out = coupling_case(shape, spec, dtype)
        if transformed is not None:
            net_out = net_out[:, : transformed * (1 if spec.kind == "additive" else 2)]
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
            grads = emulator.coupling_mix_backward(*common, self.spec, added)
            results |= {f"mix {name} {split}": value for name, value in grads._asdict().items()}
            grads = emulator.gather_backward(
                self.x, self.gather, self.grad, added, net_out, self.grad_log_det, self.spec
            )
            results |= {f"gather sum {name} {split}": value for name, value in grads._asdict().items()}
        step = emulator.step_backward(*common, self.offset, self.spec)
        results |= {f"step {name}": value for name, value in step._asdict().items()}
        back = Gather(self.gather.scale, self.gather.index, None, self.offset)
        step = emulator.step_gather_backward(self.x, back, net_out, self.grad, self.grad_log_det, self.spec)
        results |= {f"gather step {name}": value for name, value in step._asdict().items()}
        return {name: value for name, value in results.items() if value is not None}


@pairs(shapes, nets, specs)
def test_channels_last_net(
    emulator: GatherEmulator, shape: tuple[int, int, int], net: str, spec: CouplingSpec
) -> None:
    """The same values to the bit; what is summed over positions (and for log_det over channels) may be in any order."""
    case = Case(shape, net, spec)
    expected = case.run(emulator, "contiguous")
    for name, got in case.run(emulator, "channels_last").items():
        assert_only_written(got)
        if "log_det" in name or ("sum" in name and got.dim() == 1):
            assert_close(got / shape[2], expected[name] / shape[2])
        else:
            assert torch.equal(got, expected[name]), name
