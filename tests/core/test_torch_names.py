"""Private names of torch: _core/torch_private.py alone has them, and the torch that is installed has what they name."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import ROOT
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.utils.data import dataloader
from torch.utils.flop_counter import FlopCounterMode

from pyglow_fast._core import torch_private

# A number that changes; attributes of torch's objects, and methods that are overridden: all without a public way,
# or with one that takes longer at every step.
ALLOWED: dict[Any, set[str]] = {
    torch.zeros(1): {"_backward_hooks", "_post_accumulate_grad_hooks", "_version"},
    nn.Module(): {
        *("_parameters", "_buffers", "_modules", "_apply", "_load_from_state_dict", "_replicate_for_data_parallel"),
        *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    },
    torch.distributions.Normal(0.0, 1.0): {"_validate_args", "_validate_sample"},
    forward_ad: {"_current_level"},
    dataloader._MultiProcessingDataLoaderIter: {"_shutdown_workers"},
    torch.ops.aten.add.Tensor: set(),
}
OF_TORCH = {name for thing in ALLOWED for name in dir(thing)} - set().union(*ALLOWED.values())


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def own_names(tree: ast.AST) -> Iterator[str]:
    """What a module defines, or sets on anything."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Names that are private to torch: imported, reached from what is imported, or attributes that its objects have."""
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                if f"{base}{alias.name}.".startswith("torch."):
                    imported.add((alias.asname or alias.name).split(".")[0])
                    if is_private(base + alias.name):
                        yield base + alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            name, root = node.attr, ast.unparse(node).split(".")[0]
            if (
                (root in imported and name not in ALLOWED[forward_ad])
                or "dynamo" in name
                or (name in OF_TORCH and name not in own)
            ):
                yield ast.unparse(node)


def test_one_module_has_private_names_of_torch() -> None:
    paths = [path for path in (ROOT / "pyglow_fast").rglob("*.py") if path.name != "torch_private.py"]
    trees = {str(path): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    own = {name for tree in trees.values() for name in own_names(tree)}
    assert {path: found for path, tree in trees.items() if (found := list(private_names(tree, own)))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C.f()",
        "import torch.utils._pytree as tree",
        "from torch._C import f",
        "from torch import nn\nnn.modules.conv._ConvNd",
        "from torch.autograd import forward_ad\nforward_ad._is_fwd_grad_enabled",
        "f._dynamo_marked_constant = True",
        "op._schema",
        "module._named_members",
    ],
)
def test_the_check_can_fail(source: str) -> None:
    assert len(list(private_names(ast.parse(source), set()))) == 1


def test_attributes_are_there() -> None:
    assert [name for thing, allowed in ALLOWED.items() for name in allowed if not hasattr(thing, name)] == []


def test_classes_of_modules() -> None:
    assert isinstance(nn.ConvTranspose3d(1, 1, 1), torch_private.AnyConv)
    assert isinstance(nn.SyncBatchNorm(1), torch_private.AnyBatchNorm)
    assert isinstance(nn.InstanceNorm2d(1), torch_private.AnyInstanceNorm)
    assert isinstance(nn.AlphaDropout(), torch_private.AnyDropout)
    assert isinstance(nn.CircularPad2d(1), torch_private.AnyCircularPad)
    layer: Any = parametrizations.weight_norm(nn.Linear(1, 1))
    assert isinstance(layer.parametrizations.weight[0], torch_private.ParametrizedWeightNorm)


def test_global_hooks_are_seen() -> None:
    assert not torch_private.has_global_hook()
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert torch_private.has_global_hook()


def test_vmap() -> None:
    def look(x: Tensor) -> Tensor:
        assert torch_private.has_functorch()
        assert [transform.key() for transform in torch_private.transforms()] == [torch_private.VMAP]
        with torch_private.without_functorch():
            assert torch.ones(1) > 0
        assert torch_private.is_batched_tensor(x)
        level = torch_private.level_of(x)
        rows = torch_private.remove_batch(x, level, 0, 0)
        with torch_private.outside_of_a_transform():
            assert not torch_private.transforms()
            assert rows.tolist() == [1.0, 2.0]
        return torch_private.add_batch(rows, 0, level) + 1

    assert torch.func.vmap(look)(torch.tensor([1.0, 2.0])).tolist() == [2.0, 3.0]
    assert not torch_private.has_functorch()


def test_what_a_transform_has_wrapped() -> None:
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x * x)[1])(torch.tensor(3.0))
    assert "GradTrackingTensor" in repr(kept[0])
    assert repr(torch_private.unwrapped_if_dead(kept[0])) == "tensor(3.)"


def test_old_vmap() -> None:
    level = torch_private.enter_old_vmap() - 1
    try:
        x = torch_private.add_old_batch(torch.zeros(2), 0, level)
        assert torch_private.is_old_batched_tensor(x)
        assert torch_private.remove_old_batch(x, level, 0, 0).shape == (2,)
    finally:
        assert torch_private.leave_old_vmap() == level


def test_the_level_of_forward_mode() -> None:
    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0


def test_traces_and_modes() -> None:
    states = []
    torch.jit.trace(
        lambda x: (states.append(torch_private.tracing_state()), x + 1)[1], torch.zeros(1), check_trace=False
    )
    assert None not in states
    assert torch_private.tracing_state() is None
    with FlopCounterMode(display=False):
        assert torch_private.count_dispatch_modes() == 1
        with torch_private.without_dispatch_modes():
            assert torch_private.count_dispatch_modes() == 0


def test_backward() -> None:
    x, events = torch.zeros(1, requires_grad=True), list[Any]()

    def hook(_: Tensor) -> None:
        torch_private.call_at_its_end(lambda: events.append("end"))
        events.append(torch_private.backward_id())

    y = x * 1
    y.register_hook(hook)
    y.sum().backward()
    assert events[0] >= 0
    assert events[1:] == ["end"]
    assert torch_private.backward_id() == -1


def test_operations() -> None:
    torch_private.assert_later(torch.ones(()) > 0, "this is true")
    values = [torch.ones(1), torch.ones(1)]
    moves = torch_private.subtract_each([torch.full((1,), 3.0)] * 2, values)
    torch_private.multiply_each_(moves, torch.tensor(0.5))
    torch_private.add_to_each_(values, moves)
    assert [float(x) for x in values] == [2.0, 2.0]


def test_ops() -> None:
    pure = torch.ops.aten.add.Tensor
    assert isinstance(pure, torch_private.Op)
    torch_private.forget_kernels(pure)
    assert torch_private.is_registered("aten::add.Tensor", "CPU")
    assert not torch_private.is_registered("pyglow_fast::channel_mix", "MPS")
    last = torch.zeros(2, 4, 3, 3).to(memory_format=torch.channels_last)
    assert torch_private.format_of_strides(last[:, :2]) == torch.channels_last
    tree = (1, {"a": [2, 3]})
    parts, structure = torch_private.flatten(tree)
    assert parts == torch_private.leaves(tree) == [1, 2, 3]
    assert torch_private.unflatten(parts, structure) == tree


def marks(function: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(function).items() if "dynamo" in name}


def test_marks_are_those_that_torch_sets() -> None:
    def f() -> int:
        return 0

    assert marks(torch_private.constant_in_graphs(lambda: 0)) == marks(torch.compiler.assume_constant_result(f))
    assert marks(torch_private.untraced(lambda: 0)).items() <= marks(torch.compiler.disable(f)).items()


@pytest.mark.parametrize("call", [torch_private.end_allocations, torch_private.release_pool])
def test_pools(call: Callable[[int, Any], None]) -> None:
    """They are called in tests/models/test_broken_captures.py, in a place of torch's; before 2.14 both are torch's."""
    (name,) = re.findall(r"torch\._C\.(\w+)", inspect.getsource(call))
    assert callable(getattr(torch._C, name))


def test_each_name_is_called_here() -> None:
    named = re.findall(r"^(?:def )?(\w+)(?:\(.*)?(?:: .+)? (?:=|->) ", inspect.getsource(torch_private), re.MULTILINE)
    assert len(named) > 40
    assert [name for name in named if f"torch_private.{name}" not in inspect.getsource(sys.modules[__name__])] == [
        "Function"
    ]
