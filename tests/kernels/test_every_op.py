"""What holds of every op: its schema and shapes, refusals, threads, far memory, torch.compile and export."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernels.kernel_cases import (
    MAPS,
    Case,
    Kernels,
    assert_bits_do_not_depend_on_threads,
    codes,
    gathers,
    laid_out,
    option,
    orders,
)
from support.bijections import softplus_scale
from support.covering import pairs
from support.helpers import assert_close
from support.sparse_memory import SparseMemory
from torch import Tensor, float32, nn

from pyglow_fast import functional, reference
from pyglow_fast._core import backend
from pyglow_fast.functional import ops
from pyglow_fast.reference import Activation, ChainSpec, CouplingSpec, SplineSpec

compiled = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")
SPEC = CouplingSpec()
FORWARD, BACKWARD = codes(SPEC, False), codes(SPEC)
SHAPE = (2, 4, 6, 5)
CHAIN = ChainSpec((Activation("silu"),), ((1, 1), (2, 1)))
COUPLINGS = ("coupling", "coupling_inverse", "coupling_mix", "coupling_mix_inverse")


def drawn(*shape: int) -> Tensor:
    """Numbers that are the same each time."""
    return torch.linspace(-1.0, 2.0, torch.Size(shape).numel()).sin().reshape(shape)


X, NET, GRAD, ADDED = drawn(*SHAPE), drawn(*SHAPE).cos(), drawn(*SHAPE).exp(), drawn(2, 2, 6, 5)
MATRIX, VECTOR, WEIGHT, INDEX = torch.eye(4) + 0.1 * drawn(4, 4), drawn(4) + 2.0, drawn(2), torch.tensor([2, 0, 3, 1])
NUMBERS, SPLINE = drawn(*SHAPE, 5), ops.spline_arguments(SplineSpec(), False)
BIAS = drawn(4).cos()  # torch.compile takes no tensor twice
WEIGHTS, BIASES = [drawn(6, 4, 3, 3) / 4, drawn(2, 6, 1, 3) / 2], [drawn(6), drawn(2)]
GAIN = 0.1 * drawn(2, 1, 1)
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "channel_mix": (X, MATRIX, VECTOR, False, 0),
    "channel_mix of a gather": (X, VECTOR, VECTOR, True, 0, INDEX),
    "channel_mix squeezed": (drawn(2, 1, 6, 4), MATRIX, VECTOR, False, 1),
    "channel_mix unsqueezed": (X, MATRIX, VECTOR, True, 2),
    "channel_mix_backward": (X, GRAD, MATRIX, VECTOR, ADDED, False),
    "channel_mix_backward of a gather": (X, GRAD, VECTOR, VECTOR, ADDED, False, INDEX),
    "channel_mix_backward squeezed": (drawn(2, 1, 6, 4), drawn(2, 4, 3, 2), MATRIX, None, None, True),
    "coupling": (X, NET, *FORWARD),
    "coupling_backward": (X, NET, GRAD, WEIGHT, *FORWARD, True),
    "coupling_backward without input": (X, NET, GRAD, WEIGHT, *FORWARD, False),
    "coupling_mix": (X, NET, MATRIX, VECTOR, *FORWARD),
    "coupling_mix of a gather": (X, NET, VECTOR, VECTOR, *FORWARD, INDEX),
    "coupling_mix_backward": (X, NET, GRAD, WEIGHT, MATRIX, *BACKWARD, ADDED),
    "coupling_mix_backward of a gather": (X, NET, GRAD, WEIGHT, VECTOR, *BACKWARD, ADDED, INDEX),
    "step_backward": (X, NET, GRAD, WEIGHT, MATRIX, VECTOR, *BACKWARD),
    "step_backward of a gather": (X, NET, GRAD, WEIGHT, VECTOR, VECTOR, *BACKWARD, INDEX),
    "gaussian_log_prob": (X, NET, GRAD),
    "gaussian_log_prob_backward": (X, NET, GRAD, WEIGHT),
    "gaussian_sample": (X, NET, GRAD),
    "spline": (X, NUMBERS, *SPLINE),
    "spline_backward": (X, NUMBERS, GRAD, NET, *SPLINE, False, True),
    "spline_backward from the output": (X, NUMBERS, GRAD, NET, *SPLINE, True, False),
    "invert_matrices": (torch.stack([MATRIX, 2.0 * MATRIX]),),
    "patches": (X, (3, 3), (1, 2), False, float32),
    "patches backward in half": (X, (3, 1), (1, 1), True, torch.bfloat16),
    "tap_sums": (drawn(60, 36), BIAS, SHAPE, (3, 3), (1, 2), False, float32),
    "tap_sums backward in half": (drawn(60, 12), None, SHAPE, (3, 1), (1, 1), True, torch.float16),
    "relu_backward": (drawn(6, 5), drawn(6, 5)),
    "checkerboard_split": (X, 1, True),
    "checkerboard_split of one half": (X, 0, False),
    "checkerboard_merge": (X, 1, True),
    "checkerboard_merge of one half": (X, 0, False),
    "net_chain": (X[:, :3], X[:, 3:], WEIGHTS, BIASES, GAIN, *ops.chain_arguments(CHAIN), False, False),
    "net_chain in half": (X, None, WEIGHTS, BIASES, None, *ops.chain_arguments(CHAIN), True, False),
}


def arguments_of(case: str) -> tuple[Any, ...]:
    if not case.startswith("net_chain_backward"):
        return ARGUMENTS[case]
    half, chain = "half" in case, ops.chain_arguments(CHAIN)
    _, kept = ops.net_chain(*ARGUMENTS["net_chain"][:-2], half, True)
    return (X[:, :2], X[:, :3], X[:, 3:], kept, WEIGHTS, BIASES[-1], GAIN, *chain, half, "without" not in case)


CASES = [*ARGUMENTS, *(f"net_chain_backward{rest}" for rest in ("", " in half", " without weights"))]


def op_of(case: str) -> Any:
    return getattr(ops, case.split(" ", maxsplit=1)[0])


def test_every_op_has_a_case() -> None:
    assert {case.split(" ", maxsplit=1)[0] for case in CASES} == set(ops.names())


# ---- The schema, and results without values ----


@compiled
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    """Schema and fake kernel, by torch's own checker, in layouts that results follow or not.

    Dispatch with symbolic sizes, which is slow, once for an op and each way of squeezing: there a fake kernel branches.
    """
    brief = ("test_schema", "test_faketensor")
    dispatches = " " not in case or "squeezed" in case
    torch.library.opcheck(op_of(case), arguments_of(case), **({} if dispatches else {"test_utils": brief}))
    changes: list[Callable[[Tensor], Tensor]] = [partial(laid_out, layout="channels_last")]
    changes += [partial(laid_out, layout="channels_inside"), lambda v: v[:, :1].expand_as(v)]
    if not case.startswith(("net", "patches", "tap_sums", "spline")) and "squeezed" not in case:
        changes += [lambda v: v.flatten(2).double(), lambda v: v.unsqueeze(-1).expand(*v.shape, 2)]
    for change in changes:
        double = change(X).dtype == torch.float64
        given = [change(v) if isinstance(v, Tensor) and v.dim() == 4 else v for v in arguments_of(case)]
        given = [v.double() if double and isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
        torch.library.opcheck(op_of(case), tuple(given), test_utils=brief)


@compiled
def test_tensors_without_values_among_others_are_refused() -> None:
    for at in range(3):
        changed = [v.to("meta") if at == i else v for i, v in enumerate(ARGUMENTS["channel_mix"][:3])]
        with pytest.raises(ValueError, match="device: expected meta for all tensors or for none"):
            ops.channel_mix(*changed, False, 0)


# ---- Refusals ----

FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda x: x.half() if x.dtype != torch.int64 else x.int(),
    "other dtype": lambda x: x.double() if x.dtype != torch.int64 else x.float(),
    "scalar": lambda x: x.new_zeros(()),
    "sparse": lambda x: x.to_sparse(),
    "more dimensions": lambda x: x.unsqueeze(-1).expand(*x.shape, 3),
    "grown": lambda x: torch.cat([x, x[:1]]),
    "shrunk": lambda x: x[..., :-1],
    "vast": lambda x: x.flatten()[:1].expand(2**20 + 1, *[2**5] * (x.dim() - 1)),
    "empty": lambda x: x[:0],
}
WORDS = re.compile(r"^[\w ,\[\]]+: expected .+, found ", re.DOTALL)
# Of the first tensor alone, which has the others refused; other forms are as good.
FIRST_DECIDES = {name: {"grown", "shrunk", "empty", "more dimensions"} for name in ("channel_mix", "net_chain")}
FIRST_DECIDES |= {"patches": {"dtype", "grown", "shrunk", "empty", "vast"}, "tap_sums": {"dtype"}}
FIRST_DECIDES |= {"invert_matrices": {"other dtype", "grown", "empty", "vast"}}
FIRST_DECIDES |= {
    name: {"other dtype", "grown", "empty", "more dimensions", "shrunk", "vast"}
    for name in ("checkerboard_split", "checkerboard_merge")
}
ANY_FORM = {("log_gain", "more dimensions"), ("log_gain", "grown"), ("net_out", "dtype"), ("raw", "dtype")}


@compiled
@pytest.mark.parametrize("case", [case for case in CASES if case != "net_chain_backward without weights"])
def test_bad_tensors_are_refused(case: str) -> None:
    """Each tensor in turn, of another dtype, layout or shape: by words, and before anything is read."""
    name, arguments = case.split(" ", maxsplit=1)[0], arguments_of(case)
    names = [argument.name for argument in op_of(case)._schema.arguments]
    op_of(case)(*arguments)
    for at, (argument, value) in enumerate(zip(names, arguments, strict=False)):
        several = isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)
        for fault, spoil in FAULTS.items() if several or isinstance(value, Tensor) else ():
            if (at == 0 and fault in FIRST_DECIDES.get(name, ())) or (argument, fault) in ANY_FORM:
                continue
            wrong = [*value[:-1], spoil(value[-1])] if several else spoil(value)
            changed = [*arguments[:at], wrong, *arguments[at + 1 :]]
            with pytest.raises((ValueError, NotImplementedError), match=WORDS):
                op_of(case)(*changed)
                pytest.fail(f"{argument}, {fault}: taken")


HALF_X = X.half()
ODD: list[tuple[Callable[[], object], str]] = [
    (lambda: ops.channel_mix(X, MATRIX, VECTOR, False, 0, INDEX), r"matrix: expected shape \[4\], found \[4, 4\]"),
    (lambda: ops.channel_mix(X, MATRIX, VECTOR, False, 3), "squeeze: expected 0 .none., 1 .input. or 2 .output."),
    (lambda: ops.channel_mix(X, MATRIX, VECTOR, False, 1), "x: expected even sides to squeeze, found"),
    (lambda: ops.channel_mix(X[:, :3], MATRIX, VECTOR, False, 2), "x: expected channels in fours to unsqueeze, found"),
    (lambda: ops.channel_mix(X[0], MATRIX, VECTOR, False, 1), r"x: expected images \(N, C, H, W\) to squeeze, found"),
    (
        lambda: ops.channel_mix_backward(X[:, :1], X[:, :1], MATRIX[:1, :1], None, X, False),
        "added: expected .N, at most 1",
    ),
    (lambda: ops.coupling(X, X[:, :3], *FORWARD), "net_out: expected 2 times at most 4 channels"),
    (lambda: ops.coupling(X.double(), HALF_X, *FORWARD), "net_out: expected dtype float64 like x .16 bits go with"),
    (lambda: ops.coupling(X, NET, 6, *FORWARD[1:]), "map: expected a ScaleMap, found 6"),
    (lambda: ops.coupling(X, NET, 1, 2, *FORWARD[2:]), "order: expected 0 or 1, found 2"),
    (lambda: ops.coupling(X, NET, 2, 0, False, 2.0, -0.1, 1.0, 1.0), "eps: expected 0 or more, found -0.1"),
    (lambda: ops.coupling(X, NET, 4, 0, False, 2.0, 0.0, 89.0, 1.0), "clamp: expected a positive number, at most 88"),
    (lambda: ops.coupling(X, NET, 2, 0, False, 2.0, 0.0, 1.0, 1e-40), "factor: expected 1, or with the scaled sigmoid"),
    (lambda: ops.checkerboard_split(X, 2, True), "parity: expected 0 or 1, found 2"),
    (lambda: ops.checkerboard_split(X[:, :, :5], 1, True), "x: expected an even first side"),
    (lambda: ops.checkerboard_merge(X[:, :3], 0, True), "halves: expected an even number of channels"),
    *(
        (lambda index=index: ops.channel_mix(X, VECTOR, VECTOR, False, 0, torch.tensor(index)), message)
        for index, message in (
            ([0, -1, 2, 3], "index: expected a permutation of 0 to 3, found -1 at place 1"),
            ([0, 1, 1, 3], "index: expected a permutation of 0 to 3, found 1 at place 2"),
        )
    ),
]


@compiled
@pytest.mark.parametrize(("call", "message"), ODD)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@compiled
def test_sizes_past_any_memory_beside_nothing() -> None:
    """Sizes past any memory beside an empty one are refused."""
    vast = torch.empty(0, 1, 1, 1).expand(0, 3, 2**40, 2**40)
    with pytest.raises(ValueError, match="z: expected sizes above 0 of a product of at most"):
        ops.gaussian_log_prob(vast, vast, vast)
    with pytest.raises(ValueError, match="x: expected sizes above 0 of a product of at most"):
        ops.net_chain(vast, None, [torch.ones(1, 3, 7, 7)], [torch.ones(1)], None, [], [], [9, 9], False, True)


# ---- Threads and memory ----


@compiled
@pytest.mark.parametrize(("channels", "threads"), [(12, 3), (48, 2)])
def test_bits_do_not_depend_on_threads(channels: int, threads: int) -> None:
    """With work for all of them at the same time; in channels-last every tile goes through scratch memory."""
    case = Case(Kernels(ops), (10, channels, 24, 32), float32, MAPS[0])

    def run(x: Tensor) -> list[Tensor]:
        given, last = case.replaced(x=x), case.replaced(x=x.to(memory_format=torch.channels_last))
        return case.of([*(given.calls() if channels == 12 else given.map_calls()), *last.map_calls()])

    assert_bits_do_not_depend_on_threads(run, case.x, threads)
    matrices = torch.linalg.qr(torch.randn(40, 45, 45)).Q.contiguous()
    assert_bits_do_not_depend_on_threads(ops.invert_matrices, matrices, threads)


@compiled
@pytest.mark.parametrize("case", CASES)
def test_elements_beyond_32_bits(case: str) -> None:
    """Strides of more than 2^31 elements, in memory that is mostly not there; of nets' outputs in 16 bits too."""
    names = [argument.name for argument in op_of(case)._schema.arguments]
    for dim in ("sample", "channel", "position", "row"):
        memory, small, near, far = SparseMemory(float32), SparseMemory(torch.bfloat16), [], []
        for name, value in zip(names, arguments_of(case), strict=False):
            positions = isinstance(value, Tensor) and value.dim() == 4 and min(value.shape[:2]) > 1
            low = name == "net_out" and dim == "channel"
            near.append(value.bfloat16() if low else value)
            far.append((small if low else memory).far(near[-1], dim) if positions else near[-1])
        found, expected = (op_of(case)(*given) for given in (far, near))
        for actual, exact in zip(*([r] if isinstance(r, Tensor) else r for r in (found, expected)), strict=True):
            if not (case.startswith("net_chain") and actual.dim() == 1):  # of what is kept a margin is nobody's
                assert_close(actual.float(), exact.float(), condition=2.0)


# ---- The functions over the ops ----


@pairs(
    option("name", ["channel_mix", "channel_unmix", *COUPLINGS, "gaussian_log_prob", "gaussian_sample"]),
    option("shape", [(3, 4), (2, 4, 5), (2, 6, 3, 2), (2, 2, 3, 1, 2), (0, 4, 3, 2)]),
    option("spec", [*MAPS, CouplingSpec(scale_map=softplus_scale)]),
    orders,
    gathers,
    option("rows", [None, 1, 0]),
)
def test_functions_equal_the_reference(
    name: str,
    shape: tuple[int, ...],
    spec: CouplingSpec,
    order: str,
    gathers: bool,
    rows: int | None,
    device: torch.device,
) -> None:
    """Values and gradients, of one tensor alone and of all, and without a gradient, where an inverse is one pass.

    Mean and log_sd are of the full shape, of one per channel, or of one per sample and channel: gradients sum back.
    """
    kernels, others = Kernels(None, str(device)), tuple[object, ...]()
    inputs = [kernels.randn(shape, torch.float64)]
    if name.startswith("gaussian"):
        column = (shape[0] if rows == 0 else 1, shape[1], *[1] * (len(shape) - 2))
        inputs += [kernels.randn(shape if rows is None else column, torch.float64) for _ in range(2)]
    if name in COUPLINGS:
        inputs.append(kernels.net_out(shape, spec, torch.float64))
        others = (spec._replace(order=order),)
    if "mix" in name:
        *channel_map, index = kernels.channel_map(shape[1], torch.float64, gathers)
        inputs, others = [*inputs, *channel_map], (*others, index)
    for wanted in ([], *([at] for at in range(len(inputs))), [*range(len(inputs))]):
        results = []
        for home in (functional, reference):
            leaves = [value.detach().requires_grad_(at in wanted) for at, value in enumerate(inputs)]
            found = getattr(home, name)(*leaves, *others)
            outputs = [found] if isinstance(found, Tensor) else [*found]
            value = sum(part.square().sum() + part.sin().sum() for part in outputs)
            gradients = torch.autograd.grad(value, [leaves[at] for at in wanted]) if wanted else ()
            results.append([*outputs, *gradients])
        assert_close(*results, condition=1000.0 * max(1, inputs[0].numel()))


# ---- torch's machinery ----

FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "channel_mix": lambda home, x: home.channel_mix(x, MATRIX, VECTOR),
    "channel_unmix": lambda home, x: home.channel_unmix(x, MATRIX, VECTOR),
    "gather": lambda home, x: home.channel_mix(x, VECTOR, BIAS, index=INDEX),
    "coupling": lambda home, x: home.coupling(x, NET, SPEC)[0],
    "coupling_inverse": lambda home, x: home.coupling_inverse(x, NET, SPEC)[0],
    "coupling_mix": lambda home, x: home.coupling_mix(x, NET, MATRIX, VECTOR, SPEC)[0],
    "coupling_mix_inverse": lambda home, x: home.coupling_mix_inverse(x, NET, MATRIX, VECTOR, SPEC)[0],
    "coupling_net": lambda home, x: home.net_chain(x, WEIGHTS, BIASES, CHAIN, GAIN),
    "invert_matrix": lambda home, x: home.invert_matrix(3.0 * torch.eye(5) + x[..., :5, :]),
    "log_abs_det": lambda home, x: home.log_abs_det(3.0 * torch.eye(5) + x[..., :5, :].flatten(0, 1)),
    "gaussian_log_prob": lambda home, x: home.gaussian_log_prob(x, NET, GRAD),
    "gaussian_sample": lambda home, x: home.gaussian_sample(x, NET, GRAD),
    "spline": lambda home, x: home.spline(x, NUMBERS)[0],
    "checkerboard_split": lambda home, x: home.checkerboard_split(x, 1),
    "checkerboard_merge": lambda home, x: home.checkerboard_merge(x, 1),
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor | None]] = {
    "jvp": lambda f: torch.func.jvp(f, (X,), (GRAD,))[1],
    "dual": lambda f: dual_tangent(f),
    "vmap": lambda f: torch.func.vmap(f)(torch.stack([X, GRAD])),
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(X),
}
# The functions of which torch.compile is asked by default, one of each kind; all others with --full.
COMPILED = ("channel_mix", "coupling_mix", "coupling_net", "invert_matrix")


def dual_tangent(function: Callable[[Tensor], Tensor]) -> Tensor | None:
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(X, GRAD))).tangent


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", TRANSFORMS)
def test_transforms_are_those_of_plain_torch(name: str, way: str) -> None:
    """Kernels step aside: a tangent or gradient of zero, or the values of another sample, would be believed."""
    found, expected = (
        TRANSFORMS[way](lambda x, home=home: FUNCTIONS[name](home, x)) for home in (functional, reference)
    )
    if expected is None:
        assert found is None
    else:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.full) for n in FUNCTIONS])
def test_compiled_and_exported(name: str) -> None:
    """torch.compile takes op and gradient as they are, in one graph; an exported program has no op of this package.

    Within a graph that is compiled torch.func has torch's own ops.
    """
    torch.compiler.reset()

    class Program(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return FUNCTIONS[name](functional, x)

    results = []
    for call in (Program(), torch.compile(Program(), backend="aot_eager", fullgraph=True)):
        leaf = X.clone().requires_grad_()
        out = call(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
        with torch.no_grad():
            results[-1].append(call(X))
    torch.testing.assert_close(*results)
    with torch.no_grad():
        exported = torch.export.export(Program(), (X,))
    assert "pyglow_fast" not in str(exported.graph)
    torch.testing.assert_close(exported.module()(X), results[0][2])
    gradient = torch.func.grad(lambda x: FUNCTIONS[name](functional, x).square().sum())
    torch.testing.assert_close(torch.compile(gradient, backend="eager")(X), results[0][1])


@compiled
@pytest.mark.parametrize(
    "name", [n for n in FUNCTIONS if n.startswith(("channel", "gather", "coupling", "gaussian_log", "spline"))]
)
def test_second_derivatives_are_refused(name: str) -> None:
    leaf = X.clone().requires_grad_()
    out = FUNCTIONS[name](functional, leaf)
    if not out.requires_grad:
        return
    for value in (out.square().sum(), out.sum()):  # the gradient that comes into the second one wants none itself
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            gradient.square().sum().backward()


def test_names_and_arguments_are_those_of_the_reference() -> None:
    shared = [name for name in functional.__all__ if hasattr(reference, name)]
    assert {"channel_mix", "channel_unmix", "coupling", "coupling_inverse", "squeeze"} <= set(shared)
    for name in shared:
        ours, theirs = getattr(functional, name), getattr(reference, name)
        if name == "spline":  # which others call: no spec, but its fields
            assert list(inspect.signature(ours).parameters) == ["x", "raw", *SplineSpec._fields, "inverse"]
        elif inspect.isfunction(ours):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    assert functional.__all__ == sorted(functional.__all__)


# ---- GPUs ----


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [12, 96])
def test_inverses_captured(channels: int) -> None:
    """A CUDA graph inverts what is in its matrices when it is replayed, in shared memory and in scratch."""
    matrices = torch.linalg.qr(torch.randn(3, channels, channels)).Q.contiguous().cuda()
    ops.invert_matrices(matrices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inverses, _ = ops.invert_matrices(matrices)
    matrices.mul_(2.0)
    graph.replay()
    torch.testing.assert_close(inverses @ matrices, torch.eye(channels).cuda().expand_as(matrices))


def test_which_gpus_run_what_was_compiled() -> None:
    shipped = "80-real,90-real,100-real,120"
    assert all(ops.runs_on_capability(shipped, capability) for capability in ((8, 0), (13, 0)))
    assert not any(ops.runs_on_capability(shipped, capability) for capability in ((7, 5), (11, 0)))
    assert ops.runs_on_capability("90a-real", (9, 0))
    assert not ops.runs_on_capability("86-real", (8, 0))
    assert not ops.runs_on_capability("", (9, 0))
