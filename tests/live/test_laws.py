"""What ``accelerate`` promises, on flows of anomalib, coqui-tts, antsnormflows, glasflow and jet-pytorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from live.antstorch import glow
from live.peers import load
from support.accelerate_cases import ContextNet, at_work, mask
from support.accelerate_laws import LAWS
from support.structures import Structure, normal, of_freia, of_glow_tts, of_jet, of_nflows, of_normflows
from torch import nn

from pyglow_fast.interop import accelerate


def of_fastflow(name: str, sizes: Sequence[tuple[int, int]], hidden_ratio: float = 1.0) -> Structure:
    """The flows of FastflowModel on features of so many channels and of about an eighth of their sides."""

    def build() -> nn.Module:
        fastflow = load("anomalib.models.image.fastflow.torch_model")
        options: dict[str, Any] = {"conv3x3_only": False, "hidden_ratio": hidden_ratio, "flow_steps": 2}
        blocks = [fastflow.create_fast_flow_block([channels, side, side], **options) for channels, side in sizes]
        return at_work(nn.ModuleList(blocks), 0.01)

    return Structure(
        f"fastflow-{name}",
        build,
        [(channels, side, side) for channels, side in sizes],
        lambda model, data, _: [flow(x) for flow, x in zip(model, data, strict=True)],
        lambda model, found, _: [flow(z, rev=True) for flow, z in zip(model, found[::2], strict=True)],
        2 * len(sizes),
    )


class Features(nn.Module):
    """In the place of a backbone: the numbers that UflowModel asks it for."""

    channels, scale_factors, scales = (64, 128, 256), (4, 8, 16), (4, 8, 16)


def uflow() -> nn.Module:
    module = load("anomalib.models.image.uflow.torch_model")
    others = {"get_feature_extractor": lambda *_: Features(), "AnomalyMapGenerator": lambda *_: nn.Identity()}
    with mock.patch.multiple(module, **others):
        return at_work(module.UflowModel((64, 64), flow_steps=4), 0.01)


def patchflow() -> nn.Module:
    """Nets that end in a BatchNorm and an activation."""
    fastflow, module = (load(f"anomalib.models.image.{name}.torch_model") for name in ("fastflow", "patchflow"))
    block = load("anomalib.models.components.flow.all_in_one_block").AllInOneBlock
    model: nn.Module = fastflow.SequenceINN(8, 5, 6)
    for _ in range(2):
        model.append(block, subnet_constructor=module._build_subnet_constructor(16))
    return model


def cflow() -> nn.Module:
    heads = load("anomalib.models.image.cflow.utils")
    return at_work(heads.cflow_head(condition_vector=16, coupling_blocks=4, clamp_alpha=1.9, n_features=32))


def decoder(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        decoders = load("TTS.tts.layers.glow_tts.decoder")
        rate = options.get("rate", 1)
        more = {name: value for name, value in options.items() if name != "rate"}
        return decoders.Decoder(6, 8, 5, rate, 3, 3, dropout_p=0.0, num_splits=4, num_squeeze=2, **more)

    return build


def of_antsx(name: str, dims: int, **options: Any) -> Structure:
    shape = (1, 8, 8, 8)[: dims + 1]

    def build() -> nn.Module:
        load("antsnormflows")
        return glow(shape, 2, 3, 12, **{"net_actnorm": False, **options})

    return of_normflows(f"antsx-{name}", build, shape)


def jet() -> nn.Module:
    """Pixels in patches of 4, couplings by channels and by tokens; nets that do something."""
    module = load("jet_pytorch.jet")
    model: Any = module.Jet(4, 48, 16, (16, 16), coupling_layers=7, block_depth=1, block_width=16, num_heads=2)
    for block in model.blocks:
        nn.init.normal_(block.dnn.final_proj.weight, std=0.1)
    return model


def real_nvp() -> nn.Module:
    flow: nn.Module = load("glasflow").RealNVP(6, 3, linear_transform="permutation", scale_activation="log2")
    return flow.get_submodule("_transform")


def glasflow_of_images() -> nn.Module:
    t, layers = load("glasflow.nflows.transforms"), []
    for coupling in (t.AffineCouplingTransform, load("glasflow.transforms").AffineCouplingTransform):
        layers += [t.ActNorm(4), t.OneByOneConvolution(4), coupling(mask(4, "halves"), ContextNet)]
    return t.CompositeTransform(layers)


FLOWS = [
    of_fastflow("resnet18", [(64, 8), (128, 4), (256, 3)]),
    of_fastflow("cait_m48_448", [(768, 7)], 0.16),
    Structure(
        "uflow",
        uflow,
        [(64, 16, 16), (128, 8, 8), (256, 4, 4)],
        lambda model, data, _: model.encode(data),
        lambda model, found, _: model.flow(found[:-1], rev=True),
        12,
    ),
    Structure(
        "cflow",
        cflow,
        [(32,)],
        lambda model, data, c: model(data[0], c),
        lambda model, found, c: model(found[0], c, rev=True),
        0,
        normal((16,)),
        pickles=False,
        left=(None, "reversible"),
    ),
    of_freia("patchflow", patchflow, (8, 5, 6), 0, trains=False, pickles=True),
    of_glow_tts("coqui", decoder(), 6, parametrized=True),
    of_glow_tts("coqui-speaker", decoder(sigmoid_scale=True, c_in_channels=4, rate=2), 6, 4, parametrized=True),
    replace(of_nflows("glasflow-vectors", real_nvp, (6,), 3), left=(None,), pickles=False),
    replace(of_nflows("glasflow-images", glasflow_of_images, (4, 5, 6), 2), pickles=False),
    of_antsx("volumes", 3),
    of_antsx("volumes-defaults", 3, leaky=0.1, net_actnorm=True),
    of_antsx("volumes-bounded", 3, shift_cap=1.5, actnorm_s_cap=1.0, conv_s_cap=2.5),
    of_antsx("volumes-sigmoid", 3, scale_map="sigmoid", shift_cap=2.0),
    of_antsx("volumes-additive-plain", 3, scale=False, use_lu=False),
    of_antsx("images", 2),
    of_antsx("images-net-actnorm", 2, net_actnorm=True),
    of_jet("pytorch", jet, (16, 16, 3), 7),
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", FLOWS, ids=lambda case: case.name)
def test_laws(case: Structure, law: Callable[[Structure], None]) -> None:
    law(case)


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("fastflow-resnet18", set()),
        ("uflow", {f"no counterpart of {name}" for name in ("Split", "Concat", "IRevNetUpsampling")}),
        ("cflow", {"vectors of 32 channels: its own forward is as fast"}),
    ],
)
def test_what_is_left_of_anomalibs(name: str, reasons: set[str]) -> None:
    case = next(case for case in FLOWS if case.name == name)
    assert set(accelerate(case.model(), "reversible").left.values()) == reasons


def test_csflow_is_named() -> None:
    """Its couplings over three scales and its permutations have no counterpart: 9/10 of their time is that of nets."""
    model = load("anomalib.models.image.csflow.torch_model").CrossScaleFlow((3, 128, 128), 2, 3.0, 64)
    done = accelerate(model)
    assert done.replaced == {}
    names = ("ParallelPermute", "ParallelGlowCouplingLayer")
    assert set(done.left.values()) == {f"no counterpart of {name}" for name in names}
