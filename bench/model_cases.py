"""What the model benchmark runs: configurations, their arithmetic, and the implementations with their variants.

Model FLOPs are those of the coupling nets alone, a fused multiply-add being two: of log_prob and sample the forward's,
of a training step three times those, whatever an implementation computes a second time. The product rate is that of the
library's matrix products at the shapes that the nets' convolutions have as products over positions; where the library's
convolutions are faster than its products, a fraction of it is more than 1.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.memory_models import OURS, Levels, Ours, Shape, build, images, plain_levels
from bench.model_peers import PEER_STEPS
from bench.precisions import NAMES, TF32, autocast, dtype_name, tf32_products
from pyglow_fast import Glow

CONFIGS = {
    "a": Shape((3, 32, 32), n_levels=3, n_steps=8, hidden=512, batch=16),
    "b": Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=128, batch=16),
    "c": Shape((3, 256, 256), n_levels=4, n_steps=4, hidden=64, batch=1),
    "d": Shape((12, 64, 64), n_levels=1, n_steps=1, hidden=32, batch=8, squeezes=False),
    "e": Shape((3, 32, 32), n_levels=3, n_steps=32, hidden=512, batch=16),
}
TRAIN, LOG_PROB, SAMPLE = "train step", "log_prob", "sample"
WORKLOADS = (TRAIN, LOG_PROB, SAMPLE)
PLAIN, CHECKPOINTED, MEMCNN = "plain", "torch checkpoint", "memcnn"
EXTERNAL = (*PEER_STEPS, MEMCNN)
FLOAT_BESIDE = (OURS[0], OURS[2], *PEER_STEPS)  # of what runs in bfloat16, what runs in float32 beside it
IMPLEMENTATIONS = (*OURS, PLAIN, CHECKPOINTED, *EXTERNAL)
RECOMPUTING = (*OURS[1:], CHECKPOINTED, MEMCNN)  # in training; else they run as the others do
EAGER, CHANNELS_LAST, COMPILED = "eager", "channels_last", "torch.compile"
NOTES = {
    "normflows": "its own LU 1x1 and y = (u - shift) / s; standard normal priors",
    "nflows": "its own LU 1x1, cached in evaluation; y = u s + shift; standard normal priors",
    "FrEIA": "less work: a fixed permutation, no actnorm from data; standard normal priors",
    MEMCNN: "its wrapper around the plain step",
}
WITHOUT_GRADIENTS = "all memory modes run alike without gradients"
MEMCNN_COMPILES_NOT = "memcnn under torch.compile is left out: it frees the storage of tensors by hand"
COMPILATIONS = 512  # of one function, such as a peer's step after a graph break; past the limit it would run eagerly


@dataclasses.dataclass
class Candidate:
    """An implementation in a variant: its model, the images as it takes them, and the model's two entry points.

    ``memory``: the mode that a model of ours is set to before each run; models are shared between modes. ``dtype``: in
    bfloat16 a model of ours has that precision itself, the others run under torch.autocast. ``tf32``: float32 whose
    convolutions the library may round.
    """

    implementation: str
    variant: str
    model: Any
    x: Tensor
    memory: str | None = None
    note: str = ""
    dtype: torch.dtype = torch.float32
    tf32: bool = False

    def __post_init__(self) -> None:
        self.log_prob: Callable[[Tensor], Tensor] = self.model.log_prob
        self.sample: Callable[[int], Tensor] = self.model.sample

    @property
    def name(self) -> str:
        """The name of the candidate in tables and messages."""
        precision = "" if self.dtype_name == "float32" else f", {self.dtype_name}"
        return f"{self.implementation}, {self.variant}{precision}"

    @property
    def dtype_name(self) -> str:
        """The precision as rows name it."""
        return TF32 if self.tf32 else dtype_name(self.dtype)

    def context(self) -> contextlib.AbstractContextManager[object]:
        """Gives the context that its forward runs in: autocast, but for ours, whose nets have the precision."""
        return autocast(self.x.device, torch.float32 if self.memory is not None else self.dtype)

    def run(self, workload: str) -> Callable[[], Any]:
        """Make the function that is timed. A training step is zero_grad, forward and backward, without an optimizer."""

        def train() -> None:
            self.select()
            self.model.zero_grad(set_to_none=True)
            with self.context():
                loss = (-self.log_prob(self.x)).mean()
            loss.backward()

        def without_gradient() -> Tensor:
            with torch.no_grad(), self.context():
                return self.log_prob(self.x) if workload == LOG_PROB else self.sample(self.x.shape[0])

        return train if workload == TRAIN else without_gradient

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The x of these latents, in the precision that it samples in, which that of decode is not unless asked."""
        own = {"precision": "auto"} if isinstance(self.model, Glow) else {}
        with self.context():
            x: Tensor = self.model.decode(latents, **own)
        return x

    def eager(self) -> Candidate:
        """The candidate that is not compiled."""
        return dataclasses.replace(self)

    def select(self) -> None:
        """Set the memory mode, where there is one."""
        if self.memory is not None:
            self.model.memory = self.memory

    def gradients(self) -> list[Tensor]:
        """The gradients of the last training step."""
        return [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]


def net_flops(shape: Shape, workload: str) -> int:
    """Count the operations of all coupling nets, over the batch."""
    products = [2 * rows * inner * columns for rows, inner, columns in net_products(shape)]
    return sum(products) * shape.n_steps * (3 if workload == TRAIN else 1)


def net_products(shape: Shape) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the matrix products that one step of each level has in its net's forward."""
    found, hidden = [], shape.hidden
    channels, *spatial = shape.image
    for _ in range(shape.n_levels):
        if shape.squeezes:
            channels, spatial = channels * 2 ** len(spatial), [size // 2 for size in spatial]
        positions = shape.batch
        for size in spatial:
            positions *= size
        found += [(positions, 9 * channels // 2, hidden), (positions, hidden, hidden)]
        found += [(positions, hidden, 9 * channels)]
        channels = channels // 2 if shape.squeezes else channels
    return found


def products_case(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32, tf32: bool = False
) -> tuple[Callable[[], None], int]:
    """All those products, one after another into memory that is already there, and their FLOPs; in TF32 if asked."""
    sizes = net_products(shape)
    operands = [
        tuple(torch.randn(size, device=device).to(dtype) for size in ((rows, inner), (inner, columns), (rows, columns)))
        for rows, inner, columns in sizes
    ]

    def run() -> None:
        with tf32_products() if tf32 else contextlib.nullcontext():
            for left, right, out in operands:
                torch.mm(left, right, out=out)

    return run, sum(2 * rows * inner * columns for rows, inner, columns in sizes)


class Candidates:
    """The implementations of a configuration in their variants, and a line for each that is left out.

    Ours and those of our function share one set of tensors per variant, and per precision of ours. In bfloat16 those of
    FLOAT_BESIDE are there in float32, too. ``compiled``: those that are there under torch.compile as well.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        names: Sequence[str],
        compiled: Sequence[str],
        dtype: torch.dtype = torch.float32,
        tf32: bool = False,
    ) -> None:
        self.shape, self.device, self.dtype, self.tf32 = shape, device, dtype, tf32
        self.found: list[Candidate] = []
        self.missing: list[str] = []
        self.x = images(shape, device)
        ours = build("store", shape, "auto", device)
        assert not isinstance(ours, Levels)
        self.ours: Ours = ours
        for variant in (EAGER, CHANNELS_LAST):
            models = self._models(variant)
            for name in names:
                self._add(name, variant, models)
        for name in compiled:
            if name in names:
                self._add_compiled(name)

    def exact(self, implementation: str = PLAIN) -> Levels:
        """Build the function of an implementation in float64; ours by the reference."""
        if implementation in PEER_STEPS:
            peer = build(implementation, self.shape, "auto", self.device)
            assert isinstance(peer, Levels)
            return peer.double()
        return plain_levels(copy.deepcopy(self.ours).double(), CHECKPOINTED)

    def of(self, workload: str) -> list[Candidate]:
        """Choose what the workload is measured on; our memory modes differ in training alone."""
        if workload == TRAIN:
            return list(self.found)
        return [c for c in self.found if c.implementation not in RECOMPUTING]

    def _models(self, variant: str) -> dict[torch.dtype, Ours]:
        """Ours by dtype; the original is the eager one in float32."""
        models = {torch.float32: self.ours if variant == EAGER else copy.deepcopy(self.ours)}
        if self.dtype != torch.float32:
            models[self.dtype] = copy.deepcopy(self.ours)
            models[self.dtype].precision = NAMES[self.dtype]
        if variant == CHANNELS_LAST:
            return {dtype: _channels_last(model) for dtype, model in models.items()}
        return models

    def _dtypes(self, name: str) -> list[torch.dtype]:
        beside = self.dtype != torch.float32 and name in FLOAT_BESIDE
        return [self.dtype, torch.float32] if beside else [self.dtype]

    def _model(self, name: str, models: dict[torch.dtype, Ours], dtype: torch.dtype) -> Any:
        """A peer's is built for each dtype: some keep what they compute in evaluation, in the dtype of then."""
        if name in OURS:
            return models[dtype]
        if name in PEER_STEPS:
            return build(name, self.shape, "auto", self.device)
        return plain_levels(models[torch.float32], name)

    def _add(self, name: str, variant: str, models: dict[torch.dtype, Ours]) -> None:
        """Add an implementation's variant in all its dtypes."""
        memory = name if name in OURS else None
        for dtype in self._dtypes(name):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    model, x = self._model(name, models, dtype), self.x
            except ImportError as error:
                self._leave_out(f"{name} is left out: it cannot be imported ({error})")
                return
            if variant == CHANNELS_LAST:
                model, x = _channels_last(model), _channels_last(x)
            self.found.append(Candidate(name, variant, model, x, memory, NOTES.get(name, ""), dtype, self.tf32))

    def _add_compiled(self, name: str) -> None:
        if name in OURS[1:] or name == CHECKPOINTED:
            return  # recomputation is no single graph
        if name == MEMCNN:
            self._leave_out(MEMCNN_COMPILES_NOT)
            return
        before = len(self.found)
        self._add(name, COMPILED, self._models(COMPILED))
        for candidate in self.found[before:]:
            suffix = f"{name}_{dtype_name(candidate.dtype)}"
            candidate.log_prob = _compiled(candidate.model.log_prob, f"log_prob_of_{suffix}")
            candidate.sample = _compiled(candidate.model.sample, f"sample_of_{suffix}")

    def _leave_out(self, line: str) -> None:
        if line not in self.missing:
            self.missing.append(line)


def _channels_last(of: Any) -> Any:
    """A model or images in that layout; a model is changed itself."""
    return of.to(memory_format=torch.channels_last)


def _compiled(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """Compiled as code of its own: what shares its code is looked through at every call, and costs up to 0.4 ms."""

    def call(*arguments: Any) -> Tensor:
        return function(*arguments)

    own = types.FunctionType(call.__code__.replace(co_name=name), globals(), name, None, call.__closure__)
    compiled: Callable[..., Tensor] = torch.compile(own, dynamic=False)
    return compiled


def reset_compiler() -> None:
    """Forget what was compiled, and let one function be compiled for many models."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = COMPILATIONS
    torch._dynamo.config.accumulated_recompile_limit = 4 * COMPILATIONS
