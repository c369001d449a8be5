"""The op that inverts matrices: values, gradients, what has no inverse, and who goes by it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.captures import is_factorisation
from support.covering import pairs
from support.helpers import assert_kernel_close
from support.inverse_cases import IRREGULAR, MATRICES, assert_inverses, rotations, with_condition
from support.kernel_cases import DTYPES, assert_bits_do_not_depend_on_threads, case_name
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyglow_fast as pgf
from pyglow_fast import _backend, functional, ops, reference
from pyglow_fast.layers import FlowStep, InvConv
from pyglow_fast.layers.grouped_conv import GroupedInvConv

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=case_name)


@pairs(
    dtypes,
    # Less than a panel, whole panels, one column more, no multiple of a vector; on a GPU in scratch memory from 77 on.
    pytest.mark.parametrize("channels", [1, 2, 5, 8, 9, 12, 24, 33, 48, 76, 77, 130, 192]),
    pytest.mark.parametrize("name", MATRICES),
)
def test_inverses(name: str, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    matrices = MATRICES[name](3, channels).to(device, dtype)
    assert_inverses(matrices, *ops.invert_matrices(matrices))


@dtypes
def test_a_wrong_inverse_is_found(dtype: torch.dtype) -> None:
    """Rounded twice, or formed in the dtype of the matrices, or transposed, or a log-det of another sign."""
    matrices = with_condition(1e4)(2, 24).to(dtype)
    inverses, log_dets = ops.invert_matrices(matrices)
    assert_inverses(matrices, inverses, log_dets)
    wrong = [(inverses * (1.0 + 1e-6), log_dets), (inverses.mT, log_dets), (inverses, -log_dets)]
    if dtype == torch.float32:
        wrong += [(torch.linalg.inv(matrices), log_dets), (inverses, torch.linalg.slogdet(matrices).logabsdet + 1e-4)]
    for case in wrong:
        with pytest.raises(AssertionError, match="bound"):
            assert_inverses(matrices, *case)


@dtypes
@pytest.mark.parametrize("channels", [2, 12, 80])
@pytest.mark.parametrize("name", IRREGULAR)
def test_what_has_no_inverse_shows(name: str, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """NaN everywhere in the inverse of that matrix, and nothing in those beside it."""
    make, expected = IRREGULAR[name]
    regular = rotations(2, channels).to(device, dtype)
    matrices = torch.stack([regular[0], make(channels).to(regular), regular[1]])
    inverses, log_dets = ops.invert_matrices(matrices)
    assert inverses[1].isnan().all()
    assert_inverses(regular, inverses[[0, 2]], log_dets[[0, 2]])
    torch.testing.assert_close(log_dets[1], torch.tensor(expected).to(regular), equal_nan=True)
    torch.testing.assert_close(functional.log_abs_det(matrices), log_dets, equal_nan=True, rtol=0.0, atol=0.0)
    if device.type == "cpu" and expected == -math.inf:
        with pytest.raises(ValueError, match="matrix: expected an invertible matrix, found a singular one"):
            functional.invert_matrix(matrices)
    else:
        assert functional.invert_matrix(matrices)[1].isnan().all()


@dtypes
@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 0, 0), (0, 0), (2, 0, 4, 4), (2, 3, 4, 4), (4, 4)], ids=str)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Any number of matrices, also none, and matrices of no rows, whose determinant is 1."""
    matrices = rotations(math.prod(shape[:-2]), shape[-1]).reshape(shape).to(device, dtype)
    assert functional.invert_matrix(matrices).shape == shape
    log_dets = functional.log_abs_det(matrices)
    assert log_dets.shape == shape[:-2]
    torch.testing.assert_close(log_dets, torch.zeros_like(log_dets), rtol=0.0, atol=1e-5)


def test_layouts(device: torch.device) -> None:
    """Transposed, sliced and expanded matrices are what they look like."""
    base = rotations(3, 6).to(device)
    larger = torch.zeros(6, 9, 9, dtype=base.dtype, device=device)
    larger[::2, 2:8, 1:7] = base
    for view in (
        base.mT,
        larger[::2, 2:8, 1:7],
        base[:1].expand(3, -1, -1),
        base.movedim(0, 2).contiguous().movedim(2, 0),
    ):
        for got, expected in zip(ops.invert_matrices(view), ops.invert_matrices(view.contiguous()), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.alone
@pytest.mark.parametrize("threads", [2, 3])
@dtypes
def test_bits_do_not_depend_on_threads(threads: int, dtype: torch.dtype) -> None:
    matrices = rotations(40, 45).to(dtype)
    assert_bits_do_not_depend_on_threads(ops.invert_matrices, matrices, threads)


def both(home: Any, matrices: Tensor) -> Tensor:
    """A function of inverse and log-det."""
    return home.invert_matrix(matrices).square().sum() + home.log_abs_det(matrices).sum()


def test_gradcheck(device: torch.device) -> None:
    """First and second derivatives against finite differences in float64, of each output and of both."""
    matrices = rotations(2, 4).to(device).requires_grad_()
    for function in (functional.invert_matrix, functional.log_abs_det, lambda m: both(functional, m)):
        assert torch.autograd.gradcheck(function, (matrices,))
        assert torch.autograd.gradgradcheck(function, (matrices,))


@dtypes
@pytest.mark.parametrize("channels", [3, 12, 48, 96])
@pytest.mark.parametrize("name", ["invert_matrix", "log_abs_det"])
def test_gradients_are_as_good_as_torch_s(name: str, channels: int, dtype: torch.dtype, device: torch.device) -> None:
    matrices = with_condition(10.0)(3, channels).to(device, dtype)

    def gradient(home: Any, dtype: torch.dtype) -> Tensor:
        leaf = matrices.detach().to(dtype).clone().requires_grad_()
        out = getattr(home, name)(leaf)
        generator = torch.Generator().manual_seed(1)
        return torch.autograd.grad(out, leaf, torch.randn(out.shape, generator=generator).to(out))[0]

    exact = gradient(reference, torch.float64)
    # The inverse is rounded before the products, whose terms are this large.
    inverse = reference.invert_matrix(matrices.double()).abs()
    terms = inverse.mT @ torch.ones_like(inverse) @ inverse.mT if name == "invert_matrix" else inverse
    assert_kernel_close(gradient(functional, dtype), gradient(reference, dtype), exact, float(terms.max()))


def test_rows_of_a_jacobian_at_once(device: torch.device) -> None:
    """Gradients under torch's own vmap, of is_grads_batched."""
    matrices = rotations(1, 3).to(device).requires_grad_()
    inverse = functional.invert_matrix(matrices)
    rows = torch.eye(9, dtype=inverse.dtype, device=device).reshape(9, 1, 3, 3)
    (at_once,) = torch.autograd.grad(inverse, matrices, rows, is_grads_batched=True, retain_graph=True)
    for row, expected in zip(rows, at_once, strict=True):
        torch.testing.assert_close(torch.autograd.grad(inverse, matrices, row, retain_graph=True)[0], expected)


@dtypes
def test_opcheck(dtype: torch.dtype, device: torch.device) -> None:
    matrices = rotations(2, 5).to(device, dtype)
    for layout in (matrices, matrices.mT, matrices[:0]):
        torch.library.opcheck(ops.invert_matrices, (layout,))


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.zeros(3, 3), r"matrices: expected shape \(K, C, C\), found \[3, 3\]"),
        (torch.zeros(2, 3, 4), r"matrices: expected shape \(K, C, C\), found \[2, 3, 4\]"),
        (torch.zeros(2, 3, 3).half(), "matrices: expected dtype float32 or float64, found float16"),
    ],
)
def test_bad_input(matrices: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.invert_matrices(matrices)


class NoFactorisations(TorchDispatchMode):
    """Refuses what a CUDA graph cannot be relied on to capture: torch's factorisations and solvers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        assert not is_factorisation(func), f"{func} is called"
        return func(*args, **(kwargs or {}))


def test_a_factorisation_is_seen() -> None:
    matrices = rotations(2, 3)
    for call in (torch.linalg.inv, torch.linalg.slogdet, torch.linalg.qr, lambda m: torch.linalg.solve(m, m)):
        with pytest.raises(AssertionError, match="is called"), NoFactorisations():
            call(matrices)
    with NoFactorisations():
        torch.linalg.vector_norm(matrices)
        matrices @ matrices


def _train(model: pgf.Glow, x: Tensor) -> None:
    (-model.log_prob(x).mean()).backward()


@torch.no_grad()
def _use(model: pgf.Glow, x: Tensor) -> None:
    model.decode(model.encode(x))
    model.log_prob(x)
    model.sample(2)


@pytest.mark.parametrize("use", [_train, _use])
@pytest.mark.parametrize("memory", ["store", "checkpoint", "reversible"])
@pytest.mark.parametrize("lu", [True, False])
def test_no_factorisation_where_a_graph_may_be_captured(
    lu: bool, memory: str, use: Callable[[pgf.Glow, Tensor], None]
) -> None:
    """A training step, and all of inference."""
    model = pgf.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=2, hidden=8, memory=memory)
    for level in model.levels:
        for step in level.steps:
            step.permutation = InvConv(step.permutation.channels, lu=lu)
    x = torch.rand(2, 3, 8, 8) - 0.5
    model.initialize(x)
    with NoFactorisations():
        use(model, x)


def test_other_matrices_go_by_the_op_too() -> None:
    """A step with one matrix for all groups, and the inverse with a gradient."""
    step = FlowStep(4, 8)
    step.permutation = GroupedInvConv(4, 2)
    x = torch.randn(2, 4, 3, 3)
    step.initialize(x)
    other = copy.deepcopy(step.permutation)
    with NoFactorisations():
        z, log_det = step(x)
        (z.sum() + log_det.sum()).backward()
        back, log_det = other.inverse(x)
        (back.sum() + log_det.sum()).backward()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels", [12, 96])
def test_captured(channels: int) -> None:
    """A CUDA graph inverts what is in its matrices when it is replayed, in shared memory and in scratch."""
    matrices = rotations(3, channels).cuda()
    ops.invert_matrices(matrices)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.invert_matrices(matrices)
    for _ in range(2):
        matrices.copy_(with_condition(1e2)(3, channels))
        graph.replay()
        assert_inverses(matrices, *results)


@pytest.mark.parametrize("name", ["invert_matrix", "log_abs_det"])
def test_compiled(name: str) -> None:
    """torch.compile takes the op and its gradient as they are, in one graph."""
    torch._dynamo.reset()
    matrices = rotations(3, 4)
    results = []
    for function in (
        getattr(functional, name),
        torch.compile(getattr(functional, name), backend="aot_eager", fullgraph=True),
    ):
        leaf = matrices.clone().requires_grad_()
        out = function(leaf)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
        results.append((out, gradient))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
