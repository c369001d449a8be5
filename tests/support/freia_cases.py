"""FrEIA's layers beside ours, with the same random weights: the cases of the tests of pyglow_fast.interop.freia."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import FrEIA.modules as Theirs
import numpy as np
import torch
from torch import Tensor, nn

import pyglow_fast.interop.freia as Ours
from pyglow_fast.train.ranks import leave_group

CONVS = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}


def fully_connected(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


def known_net(inputs: int, outputs: int) -> nn.Module:
    """Make a net that our executor takes."""
    first, second = nn.Conv2d(inputs, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1))


def convolutions(dims: int) -> Callable[[int, int], nn.Module]:
    """Make a net that runs as it is."""
    conv = CONVS[dims]
    return lambda inputs, outputs: nn.Sequential(conv(inputs, 8, 3, padding=1), nn.Tanh(), conv(8, outputs, 1))


@dataclass(frozen=True)
class Case:
    """A layer's class, shape and options; ``c`` are the channels of the conditions."""

    name: str
    dims: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    c: tuple[int, ...] = ()
    net: Callable[[int, int], nn.Module] | None = None
    label: str = ""
    spread: float = 0.3  # of what randomises the weights

    @property
    def id(self) -> str:
        options = ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in self.options.items())
        return "-".join(
            filter(None, [self.name, "x".join(map(str, self.dims)), options, *map(str, self.c), self.label])
        )

    def arguments(self) -> dict[str, Any]:
        found = dict(self.options)
        if self.c:
            found["dims_c"] = [(channels, *self.dims[1:]) for channels in self.c]
        if "Block" in self.name or "Coupling" in self.name:
            default = fully_connected if len(self.dims) == 1 else convolutions(len(self.dims))
            found["subnet_constructor"] = self.net or default
        return found


def seeded() -> None:
    """The state of the random generators that FrEIA draws from."""
    torch.manual_seed(11)
    np.random.seed(11)


def build(module: Any, case: Case, seed: int = 7) -> nn.Module:
    """The layer of FrEIA (Theirs) or of this package (Ours), from one state of the random generators."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    layer: nn.Module = getattr(module, case.name)([case.dims], **case.arguments())
    return layer


@torch.no_grad()
def randomise(layer: nn.Module, spread: float = 0.3) -> None:
    """Weights that leave no term at zero, and scales that stay moderate."""
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter)
            if spread < 0.3 and name.startswith("subnet"):
                parameter.copy_(spread * noise)
            else:
                parameter.add_(0.3 * noise)
    layer.init_on_next_batch = False  # of an ActNorm


@torch.no_grad()
def orthogonalise(layer: nn.Module) -> None:
    """A rotation is one in float64 too, whose entries FrEIA draws in float32: only then is log|det| 0."""
    if getattr(layer, "w_0", None) is not None:
        layer.w_0.copy_(torch.linalg.qr(layer.w_0).Q)
    elif getattr(layer, "w_perm", None) is not None:
        rotation = torch.linalg.qr(layer.w_perm.flatten(1)).Q
        layer.w_perm.copy_(rotation.view_as(layer.w_perm))
        layer.w_perm_inv.copy_(rotation.T.reshape(layer.w_perm.shape))


def pair(case: Case, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Theirs and ours with the same weights, ours by loading."""
    theirs, ours = build(Theirs, case).to(dtype), build(Ours, case, seed=8).to(dtype)
    randomise(theirs, case.spread)
    if case.options.get("permute_soft"):
        orthogonalise(theirs)
    ours.load_state_dict(theirs.state_dict())
    ours.init_on_next_batch = False
    return theirs, ours


def inputs(case: Case, dtype: torch.dtype = torch.float64, n: int = 3) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(n, *case.dims, dtype=dtype)
    return x, [torch.randn(n, channels, *case.dims[1:], dtype=dtype) for channels in case.c]


def run(layer: nn.Module, x: Tensor, c: list[Tensor], rev: bool) -> tuple[Tensor, Any]:
    """Compute output and log-det of a layer."""
    (out,), log_det = layer([x], c, rev=rev) if c else layer([x], rev=rev)
    return out, log_det


def results(layer: nn.Module, x: Tensor, c: list[Tensor], rev: bool) -> dict[str, Tensor]:
    """Output, log-det, and the gradients of a weighted sum of them in the inputs, conditions and parameters."""
    leaves = [value.clone().requires_grad_() for value in (x, *c)]
    out, log_det = run(layer, leaves[0], leaves[1:], rev)
    log_det = torch.as_tensor(log_det, dtype=x.dtype)
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in (out, log_det)]
    objective = (out * weights[0].to(x.dtype)).sum() + (log_det * weights[1].to(x.dtype)).sum()
    named = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    grads = torch.autograd.grad(objective, [*leaves, *named.values()], allow_unused=True)
    names = ["x", *(f"c{i}" for i in range(len(c))), *named]
    found = {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"output": out, "log-det": log_det, **found}


AIO = "AllInOneBlock"
COUPLINGS = ("AllInOneBlock", "GLOWCouplingBlock", "AffineCouplingOneSided", "NICECouplingBlock")
SHAPES: list[Case] = [
    *(Case(name, dims, label="") for name in (AIO, "GLOWCouplingBlock", "AffineCouplingOneSided", "NICECouplingBlock")
      for dims in ((6,), (5,), (6, 10), (5, 4, 6), (4, 2, 3, 4), (4, 1, 2))),
    *(Case(name, (5, 4, 6), c=(2, 3), net=known_net, label="known net")
      for name in (AIO, "GLOWCouplingBlock", "AffineCouplingOneSided", "NICECouplingBlock")),
    *(Case(name, (6,), c=(2,)) for name in (AIO, "GLOWCouplingBlock", "AffineCouplingOneSided", "NICECouplingBlock")),
    Case(AIO, (6, 10), c=(2,)),
    Case(AIO, (4, 2, 3, 4), c=(2,)),
    Case(AIO, (300,)),
    Case(AIO, (300,), {"reverse_permutation": True, "gin_block": True}),
]  # fmt: skip
ALL_IN_ONE: list[Case] = [
    Case(AIO, dims, options, net=known_net if len(dims) == 3 else None)
    for dims in ((5, 4, 6), (6,))
    for options in (
        {"affine_clamping": 0.7},
        {"affine_clamping": 0.0},
        {"affine_clamping": -1.5},
        {"affine_clamping": 3},
        {"gin_block": True},
        {"gin_block": True, "reverse_permutation": True},
        {"global_affine_type": "SIGMOID"},
        {"global_affine_type": "EXP", "global_affine_init": 0.7},
        {"global_affine_init": 1.4},
        {"permute_soft": True},
        {"learned_householder_permutation": 3},
        {"reverse_permutation": True},
        {"permute_soft": True, "reverse_permutation": True},
        {"permute_soft": True, "learned_householder_permutation": 2, "reverse_permutation": True, "gin_block": True},
    )
] + [Case(AIO, (4, 3, 3), {"affine_clamping": 100.0}, net=known_net, spread=0.1)]


def own_clamp(u: Tensor) -> Tensor:
    return u / (1 + u.abs())


CLAMPS: list[Case] = [
    Case(name, (5, 4, 6), options, net=known_net)
    for name in ("GLOWCouplingBlock", "AffineCouplingOneSided")
    for options in (
        {"clamp_activation": "TANH"},
        {"clamp_activation": "SIGMOID", "clamp": 1.3},
        {"clamp_activation": own_clamp},
        {"clamp_activation": torch.tanh, "clamp": 0.5},
        {"clamp": -1.0},
        {"clamp": 0.0},
        {"clamp_activation": "TANH", "clamp": -1.5},
        {"split_len": 2},
        {"split_len": 0.7},
    )
] + [
    *(Case(name, (4, 3, 3), {"clamp": 90.0, "clamp_activation": "TANH"}, net=known_net, spread=0.01)
      for name in ("GLOWCouplingBlock", "AffineCouplingOneSided")),
    *(Case("NICECouplingBlock", (5, 4, 6), {"split_len": split}, net=known_net) for split in (1, 0.7)),
]  # fmt: skip
OTHERS: list[Case] = [
    Case("ActNorm", (6,)),
    Case("ActNorm", (6, 5)),
    Case("ActNorm", (3, 4, 5)),
    Case("ActNorm", (3, 2, 3, 4)),
    *(Case("IRevNetDownsampling", (3, 4, 6), {"legacy_backend": legacy}) for legacy in (False, True)),
    *(Case("IRevNetUpsampling", (12, 2, 3), {"legacy_backend": legacy}) for legacy in (False, True)),
    *(Case(name, dims, {"order_by_wavelet": order, "rebalance": 0.7})
      for name, dims in (("HaarDownsampling", (3, 4, 6)), ("HaarUpsampling", (12, 2, 3))) for order in (False, True)),
]  # fmt: skip
CASES = SHAPES + ALL_IN_ONE + CLAMPS + OTHERS


RANKS = 2


def unequal_batches() -> list[Tensor]:
    """Draw a batch for each rank, of unequal sizes and spreads."""
    generator = torch.Generator().manual_seed(5)
    return [(rank + 1.0) * torch.randn(6 - 2 * rank, 3, 4, generator=generator) + rank for rank in range(RANKS)]


def initialise_on_a_rank(rank: int, folder: str) -> None:
    """What FrEIA's and our ActNorm set from the batches of two ranks, and what is said of a bad one, into a file."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=300)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=wait
    )
    results: dict[str, Any] = {}
    for name, module in (("theirs", Theirs), ("ours", Ours)):
        layer = module.ActNorm([(3, 4)])
        layer([unequal_batches()[rank]])
        results[name] = [layer.scale.detach(), layer.bias.detach()]
    bad = unequal_batches()[rank]
    bad[0, 0, 0] = float("nan") if rank == 0 else 0.0
    try:
        Ours.ActNorm([(3, 4)])([bad])
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    leave_group()
