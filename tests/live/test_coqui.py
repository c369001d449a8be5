"""coqui-tts's own layers of VITS: nets that are accelerated, and couplings that are a case of our layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live.peers import load
from support.glow_tts_cases import mask_of_lengths, moved
from support.helpers import assert_close
from torch import Tensor, nn

from pyglow_fast.interop import accelerate, glow_tts
from pyglow_fast.layers import MaskedSequence, Permute, WaveNet, wavenet
from pyglow_fast.layers.flow_step import FlowStep

networks = load("TTS.tts.layers.vits.networks")


@pytest.fixture(autouse=True)
def _sizes_that_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours runs on the small batches here."""
    monkeypatch.setattr(glow_tts, "LEAST_POSITIONS", 0)


def batch(cond: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    lengths = torch.randint(4, 24, (5,)).tolist()
    x = torch.randn(5, 6, max(lengths) + 1).double()
    return x, mask_of_lengths(lengths, x.shape[2]), torch.randn(5, cond, 1).double() if cond else None


def test_nets_of_vits_are_served() -> None:
    flows = moved(networks.ResidualCouplingBlocks(6, 8, 5, 1, 3, num_flows=4, cond_channels=4)).double()
    x, mask, g = batch(cond=4)
    expected = [flows(x * mask, mask, g=g), flows(x * mask, mask, g=g, reverse=True)]
    done = accelerate(flows)
    assert sorted(done.replaced) == [f"flows.{i}.enc" for i in range(4)]
    for reverse, theirs in enumerate(expected):
        assert_close(flows(x * mask, mask, g=g, reverse=bool(reverse)), theirs)


def weights_of(block: Any, net: WaveNet) -> None:
    """Give our net the weights of a coupling of VITS."""
    wn = block.enc
    pairs_of_convs = [(net.start, block.pre), (net.end, block.post), (net.cond, wn.cond_layer)]
    pairs_of_convs += [*zip(net.dilated, wn.in_layers, strict=True), *zip(net.mixing, wn.res_skip_layers, strict=True)]
    with torch.no_grad():
        for own, theirs in pairs_of_convs:
            if isinstance(own, wavenet.NormedConv):
                own.direction.copy_(theirs.weight)
                own.gain.copy_(torch.linalg.vector_norm(theirs.weight, dim=(1, 2), keepdim=True))
            else:
                own.weight.copy_(theirs.weight)
            own.bias.copy_(theirs.bias)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
@pytest.mark.parametrize("mean_only", [True, False])
def test_vits_is_a_case_of_our_layers(memory: str, mean_only: bool) -> None:
    """Mean only, then a flip, four times: FlowSteps that reverse the channels, on reversed ones, and so reversed."""
    blocks = moved(networks.ResidualCouplingBlocks(6, 8, 5, 1, 3, num_flows=4, cond_channels=4)).double()
    block_class = networks.ResidualCouplingBlock
    if not mean_only:
        own = [moved(block_class(6, 8, 5, 1, 3, cond_channels=4, mean_only=False)).double() for _ in range(4)]
        blocks.flows = nn.ModuleList(own)
    steps = []
    for block in blocks.flows:
        net = WaveNet(3, 3 if mean_only else 6, 8, 5, 1, 3, cond_channels=4).double()
        weights_of(block, net)
        options: Any = {"coupling": "additive"} if mean_only else {"scale_map": "exp", "order": "scale_shift"}
        steps.append(FlowStep(6, permutation=Permute(6, "reverse"), net=net, **options).double())
        steps[-1].actnorm.initialized.fill_(True)
    model = MaskedSequence(steps, memory)
    x, mask, g = batch(cond=4)
    z, log_det = model(x.flip(1), g, mask=mask)
    expected, total = x * mask, torch.zeros(5).double()
    for block in blocks.flows:
        expected, own_log_det = block(expected, mask, g=g)
        expected, total = expected.flip(1), total + own_log_det
    assert_close(z.flip(1), expected, condition=10.0)
    assert_close(log_det, total, condition=10.0)
    back, _ = model.inverse(z, g, mask=mask)
    assert_close(back.flip(1), blocks(expected, mask, g=g, reverse=True), condition=100.0)
