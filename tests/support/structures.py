"""The one list of flows of other projects that ``accelerate`` is held against: how each is built, called and inverted.

Those of normflows, nflows and FrEIA are made of the installed libraries. The others have the interface and the
equations of their project, small: msflow, coqui's Glow-TTS, the steps of chaiyujin, y0ast and SRFlow, HiNet, DeepMIH,
IRN and JetFormer. Those of anomalib and jet-pytorch are in tests/live, by their own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import FrEIA.framework as Ff
import FrEIA.modules as Fm
import nflows.nn.nets
import nflows.transforms
import numpy as np
import torch
from torch import Tensor, nn

from support import y0ast
from support.accelerate_cases import (
    at_work,
    from_freia,
    from_nflows,
    from_normflows,
    leaky_context_net,
    leaky_subnet,
    nflows_steps,
    sequence,
    subnet,
)
from support.freia_copies import Block, LaterBlock
from support.glow_tts_cases import TextDecoder, mask_of_lengths, moved
from support.hiding_blocks import HaarOperation, Hides, InAttributes, InList, Rescales, ScalesBoth, Shifts, plain_net
from support.jet_models import ImageFlow
from support.srflow import FlowStep

Tensors = list[Tensor]
Call = Callable[[Any, Tensors, Tensors], Any]  # of a model, its data and its conditions


@dataclass(frozen=True)
class Structure:
    """How one flow is built and called.

    Attributes:
        name: of the case.
        build: makes the model, whose weights are at work, in float64.
        shapes: of the data, without the batch.
        forward: (model, data, conditions) -> latents and log-det.
        inverse: (model, what the forward gave, conditions) -> data, and its log-det where there is one.
        conditions: makes what the model is conditioned on.
        joined: how many steps run in chains with memory="reversible".
        masked: whether the first condition is a mask, which has no gradient.
        trains: whether it is run in training too; else it looks at whole batches there, in its BatchNorms.
        copies: whether a copy is a model of its own; nets with weight_norm's hooks are not copied, and y0ast's steps
            call what is the original's.
        pickles: whether the original can be pickled; FrEIA's own layers and parametrized nets cannot.
        samples: of a batch.
        left: the memory modes, of None and "reversible", in which all its layers are left, being as fast as ours.
        budget: bytes for its nets that cut them into rows, or into some strips where rows would be many.
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: Sequence[tuple[int, ...]]
    forward: Call
    inverse: Call
    joined: int
    conditions: Callable[[int], Tensors] = lambda n: []
    masked: bool = False
    trains: bool = True
    copies: bool = True
    pickles: bool = True
    samples: int = 3
    left: tuple[str | None, ...] = ()
    budget: int = 1

    def model(self) -> Any:
        """Build the model, the same every time."""
        torch.manual_seed(17)
        np.random.seed(17)
        return self.build().train(self.trains)

    def batch(self, seed: int = 0) -> tuple[Tensors, Tensors]:
        """Draw data and conditions, the same every time for a seed."""
        torch.manual_seed(18 + seed)
        data = [torch.randn(self.samples, *shape, dtype=torch.float64) for shape in self.shapes]
        return data, self.conditions(self.samples)


def normal(*shapes: tuple[int, ...]) -> Callable[[int], Tensors]:
    """Make conditions of these shapes."""
    return lambda n: [torch.randn(n, *shape, dtype=torch.float64) for shape in shapes]


# normflows: data -> latents is the inverse of its flows


def of_normflows(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...] = (3, 8, 8)) -> Structure:
    return Structure(
        name,
        lambda: at_work(build()),
        [shape],
        lambda model, data, _: model.inverse_and_log_det(data[0]),
        lambda model, found, _: model.forward_and_log_det(found[:-1]),
        6,
    )


# nflows


def of_nflows(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], joined: int, cond: int = 0
) -> Structure:
    def given(c: Tensors) -> Tensors:
        return c if cond else []

    return Structure(
        f"nflows-{name}",
        lambda: at_work(build()),
        [shape],
        lambda model, data, c: model.forward(data[0], *given(c)),
        lambda model, found, c: model.inverse(found[0], *given(c)),
        joined,
        normal(*[(cond, *shape[1:])][: bool(cond)]),
    )


def net_with_context(inputs: int, outputs: int) -> nn.Module:
    return nflows.nn.nets.ConvResidualNet(inputs, outputs, hidden_channels=6, context_channels=3, num_blocks=1)


def nflows_with_context() -> nn.Module:
    return nflows.transforms.CompositeTransform(nflows_steps([1, 0, 1, 0], net_with_context))


def residual_net(inputs: int, outputs: int) -> nn.Module:
    return nflows.nn.nets.ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1)


def nflows_of_vectors() -> nn.Module:
    t = nflows.transforms
    return t.CompositeTransform(nflows_steps([0, 0, 0, 1, 1, 1], residual_net, mix=t.RandomPermutation))


# FrEIA, and blocks with its interface


def of_freia(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    joined: int,
    conditions: Sequence[tuple[int, ...]] = (),
    trains: bool = True,
    pickles: bool = False,
) -> Structure:
    def run(model: Any, x: Tensor, c: Tensors, rev: bool) -> Any:
        return model(x, rev=rev, **({"c": c} if c else {}))

    return Structure(
        name,
        lambda: at_work(build()),
        [shape],
        lambda model, data, c: run(model, data[0], c, False),
        lambda model, found, c: run(model, found[0], c, True),
        joined,
        normal(*conditions),
        trains=trains,
        pickles=pickles,
    )


def net_of_volumes(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(c_in, 6, 3, padding=1), nn.ReLU(), nn.Conv3d(6, c_out, 3, padding=1))


def net_with_a_module_twice(c_in: int, c_out: int) -> nn.Module:
    """One convolution and one activation in two places."""
    parts = [nn.Conv2d(6, 6, 3, padding=1), nn.Tanh()] * 2
    return nn.Sequential(nn.Conv2d(c_in, 6, 1), parts[1], *parts, nn.Conv2d(6, c_out, 1))


def net_of_far_rows(c_in: int, c_out: int) -> nn.Module:
    """A net that looks further along one dimension than along the other: strips overlap by that."""
    first, pad = nn.Conv2d(c_in, 6, (5, 3), padding=(4, 1), dilation=(2, 1)), nn.ZeroPad2d((0, 0, 1, 1))
    return nn.Sequential(first, nn.Tanh(), nn.Conv2d(6, 6, 1), pad, nn.Conv2d(6, c_out, (3, 1)))


class NetWithLayerNorm(nn.Module):
    """msflow's net: conv, LayerNorm over channels, relu, conv."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.ln = nn.Conv2d(c_in, c_in, 3, padding=1), nn.LayerNorm(c_in)
        self.conv2 = nn.Conv2d(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.ln(self.conv1(x).movedim(1, -1)).movedim(-1, 1)
        return self.conv2(torch.relu(hidden))


def blocks_after(start: Any, count: int, name: str, block: Any = Block, **options: Any) -> list[Any]:
    """Nodes of a graph with blocks, one after another."""
    nodes = [start]
    for i in range(count):
        nodes.append(Ff.Node(nodes[-1], block, {"subnet_constructor": subnet}, name=f"{name}{i}", **options))
    return nodes[1:]


def graph_of_stages() -> nn.Module:
    """Stages of blocks from coarse to fine, with half of each going up, as U-Flow has them."""
    coarse, fine = Ff.InputNode(8, 4, 4, name="coarse"), Ff.InputNode(3, 8, 8, name="fine")
    first = blocks_after(coarse, 3, "first")
    split = Ff.Node(first[-1], Fm.Split, {"section_sizes": (4, 4), "dim": 0}, name="split")
    up = Ff.Node(split.out0, Fm.IRevNetUpsampling, {}, name="up")
    cat = Ff.Node([fine.out0, up.out0], Fm.Concat, {"dim": 0}, name="cat")
    second = blocks_after(cat, 2, "second")
    ends = [Ff.OutputNode(split.out1, name="o1"), Ff.OutputNode(second[-1], name="o2")]
    return Ff.GraphINN([coarse, fine, *first, split, up, cat, *second, *ends])


def glow_couplings() -> nn.Module:
    options = {"subnet_constructor": subnet}
    return sequence((4, 5, 6), [(Fm.ActNorm, {}), (Fm.GLOWCouplingBlock, options), (Fm.PermuteRandom, {})] * 2)


def two_conditions() -> nn.Module:
    """Neighbours with the same condition, or with none, and a block alone with its own."""
    model = Ff.SequenceINN(4, 5, 6)
    for cond in (0, 0, None, None, 1, 1, 0):
        given = {} if cond is None else {"cond": cond, "cond_shape": (2 + cond, 5, 6)}
        model.append(Fm.AllInOneBlock, subnet_constructor=subnet, **given)
    return model


def like_msflow() -> nn.Module:
    """Copies of FrEIA's block in a module of their own, as anomalib has them, given features."""
    given = {"cond": 0, "cond_shape": (5, 5, 6), "subnet_constructor": NetWithLayerNorm, "affine_clamping": 1.9}
    return sequence((4, 5, 6), [(Block, given)] * 3)


def plain(
    shape: tuple[int, ...], net: Callable[[int, int], nn.Module], block: Any = Fm.AllInOneBlock, **options: Any
) -> Callable[[], nn.Module]:
    return lambda: sequence(shape, [(block, {"subnet_constructor": net, **options})] * 3)


# Glow-TTS


def of_glow_tts(
    name: str, decoder: Callable[[], nn.Module], channels: int = 4, cond: int = 0, parametrized: bool = False
) -> Structure:
    lengths, total = (680, 679, 431), 680  # in batches of fewer positions the decoder's own code runs

    def build() -> nn.Module:
        model: nn.Module = moved(decoder()).double()
        for module in model.modules():
            if hasattr(module, "weight_inv"):  # theirs would be rounded to float32
                module.weight_inv = nn.Parameter(torch.inverse(module.weight.detach()), requires_grad=False)
        return model

    def given(n: int) -> Tensors:
        mask = mask_of_lengths(lengths, total)
        return [mask, *([torch.randn(n, cond, 1, dtype=torch.float64)] if cond else [])]

    return Structure(
        f"glow-tts-{name}",
        build,
        [(channels, total)],
        lambda model, data, c: model(data[0], c[0], *c[1:]),
        lambda model, found, c: model(found[0], c[0], *c[1:], reverse=True),
        3,
        given,
        masked=True,
        copies=parametrized,
        pickles=not parametrized,
        budget=100_000,
    )


def text_decoder(**options: Any) -> Callable[[], nn.Module]:
    return lambda: TextDecoder(4, 6, 3, kernel=3, rate=2, layers=2, **options)


# Steps of chaiyujin and SRFlow, which their models call one by one


class InTurn(nn.Module):
    """Steps one after another, which may be given features."""

    def __init__(self, steps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(steps)

    def forward(
        self, z: Tensor, log_det: Tensor, reverse: bool = False, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = {} if features is None else {"rrdbResults": features}
        for layer in reversed(self.layers) if reverse else self.layers:
            z, log_det = layer(z, log_det, reverse=reverse, **given)
        return z, log_det


def of_chaiyujin(name: str, step: type[FlowStep] = FlowStep, **options: Any) -> Structure:
    return Structure(
        f"chaiyujin-{name}",
        lambda: at_work(InTurn([step(4, 40, **options) for _ in range(2)]), 0.1),
        [(4, 29, 28)],  # steps of fewer positions run as they are
        lambda model, data, _: model(data[0], data[0].new_zeros(len(data[0]))),
        lambda model, found, _: model(found[0], found[0].new_zeros(len(found[0])), reverse=True),
        2,
        copies=step is FlowStep,
        samples=2,
    )


def srflow_steps() -> nn.Module:
    coupling = {"flow_coupling": "CondAffineSeparatedAndCond", "features": 2}
    steps = [FlowStep(4, 16, **options) for options in ({"flow_coupling": "noCoupling"}, coupling, coupling)]
    return at_work(InTurn(steps), 0.1)


# Jet


def of_jet(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], joined: int) -> Structure:
    return Structure(
        f"jet-{name}",
        lambda: build().double(),
        [shape],
        lambda model, data, _: model(data[0]),
        lambda model, found, _: model.inverse(found[0]),
        joined,
        left=(None,),
    )


# Blocks that run there and back


def of_hiding(name: str, build: Callable[[], nn.Module], channels: int, joined: int, *flags: bool) -> Structure:
    """Flags of the model's forward besides its direction."""
    return Structure(
        f"hiding-{name}",
        lambda: moved(build(), 0.02).double(),
        [(channels, 16, 12)],
        lambda model, data, _: model(data[0], False, *flags),
        lambda model, found, _: model(found[0], True, *flags),
        joined,
        samples=2,
        left=(None,),
    )


def like_irn() -> nn.Module:
    """Haar between blocks in a list, of unequal parts."""
    stages = [[HaarOperation(), Rescales(4, 1), Rescales(4, 1)], [HaarOperation(), Rescales(16, 3), Rescales(16, 3)]]
    return InList([op for stage in stages for op in stage])


STRUCTURES = [
    of_normflows("normflows-lu-sigmoid", from_normflows),
    of_normflows("normflows-plain-exp", partial(from_normflows, use_lu=False, scale_map="exp")),
    of_normflows("normflows-additive", partial(from_normflows, scale=False)),
    of_normflows("normflows-leaky-net-actnorm", partial(from_normflows, leaky=0.1, net_actnorm=True)),
    of_nflows("halves", lambda: from_nflows()._transform, (3, 8, 8), 3),
    of_nflows(
        "alternating-leaky",
        lambda: from_nflows("alternating", net=leaky_context_net)._transform,
        (3, 8, 8),
        3,
    ),
    of_nflows("context", nflows_with_context, (4, 5, 6), 2, cond=3),
    replace(of_nflows("vectors", nflows_of_vectors, (6,), 2), left=(None,)),
    of_freia("freia", from_freia, (3, 8, 8), 3),
    of_freia("freia-leaky-gin", lambda: from_freia(net=leaky_subnet, gin_block=True), (3, 8, 8), 3),
    of_freia("freia-soft", plain((4, 5, 6), subnet, permute_soft=True), (4, 5, 6), 3),
    of_freia(
        "freia-householder",
        lambda: from_freia(learned_householder_permutation=2, reverse_permutation=True),
        (3, 8, 8),
        3,
    ),
    of_freia("freia-glow-couplings", glow_couplings, (4, 5, 6), 0),
    of_freia("freia-odd", plain((5, 4, 6), subnet), (5, 4, 6), 3),
    of_freia("freia-volumes", plain((4, 3, 4, 2), net_of_volumes), (4, 3, 4, 2), 3),
    replace(
        of_freia("freia-few-positions", plain((8, 2, 2), subnet), (8, 2, 2), 0),
        left=(None, "reversible"),
    ),
    of_freia("freia-two-conditions", two_conditions, (4, 5, 6), 6, [(2, 5, 6), (3, 5, 6)]),
    of_freia("freia-module-twice", plain((4, 5, 6), net_with_a_module_twice), (4, 5, 6), 3),
    of_freia("freia-far-rows", plain((4, 20, 3), net_of_far_rows), (4, 20, 3), 3),
    of_freia("freia-git", plain((4, 5, 6), subnet, LaterBlock), (4, 5, 6), 3),
    of_freia("msflow", like_msflow, (4, 5, 6), 3, [(5, 5, 6)], pickles=True),
    Structure(
        "freia-graph",
        lambda: at_work(graph_of_stages()),
        [(8, 4, 4), (3, 8, 8)],
        lambda model, data, _: model(data),
        lambda model, found, _: model(found[:-1], rev=True),
        5,
    ),
    of_glow_tts("weight-norm", text_decoder()),
    of_glow_tts("no-norm", text_decoder(norm="none", n_split=2)),
    of_chaiyujin("affine"),
    of_chaiyujin("lu-additive", LU_decomposed=True, flow_coupling="additive"),
    of_chaiyujin("shuffle", flow_permutation="shuffle"),
    of_chaiyujin("y0ast-lu-additive", y0ast.FlowStep, LU_decomposed=True, flow_coupling="additive"),
    of_chaiyujin("y0ast-shuffle", y0ast.FlowStep, flow_permutation="shuffle"),
    Structure(
        "srflow",
        srflow_steps,
        [(4, 8, 6)],
        lambda model, data, c: model(data[0], data[0].new_zeros(len(data[0])), features=c[0]),
        lambda model, found, c: model(found[0], found[0].new_zeros(len(found[0])), True, features=c[0]),
        4,  # an injector and a coupling each
        normal((2, 8, 6)),
    ),
    replace(of_hiding("hinet", lambda: InAttributes([Hides(4, 4) for _ in range(3)]), 8, 6), budget=180_000),
    of_hiding("hinet-in-a-list", lambda: InList([Hides(3, 5, plain_net) for _ in range(3)]), 8, 6),
    of_hiding("irn", like_irn, 1, 8, True),
    replace(of_hiding("irn-additive", lambda: InAttributes([Shifts(3, 9) for _ in range(2)]), 12, 4), budget=110_000),
    replace(of_hiding("deepmih", lambda: InList([ScalesBoth(4, 3), ScalesBoth(4, 3)]), 7, 4), budget=180_000),
    of_jet("images", lambda: ImageFlow(6, 4), (4, 3, 6), 4),
]
BY_NAME = {case.name: case for case in STRUCTURES}
