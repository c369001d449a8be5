"""Names of torch that torch does not promise to keep, each used once, under a name of ours.

Where torch has a public way, that is used instead. A test calls each of these, so that one which a version of torch has
changed fails by name, and sees to it that no other module knows such names. Most are torch's functions themselves: to
wrap one would cost a call of Python where a flow step has few, and torch.compile knows them by what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch._C import _functorch
from torch._functorch import pyfunctorch
from torch.nn.utils import parametrizations
from torch.utils import _python_dispatch, _pytree

Function = TypeVar("Function", bound=Callable[..., Any])

# Classes of modules that torch's own, and others', of each number of dimensions derive from.
AnyConv = nn.modules.conv._ConvNd
AnyBatchNorm = nn.modules.batchnorm._BatchNorm
AnyInstanceNorm = nn.modules.instancenorm._InstanceNorm
AnyDropout = nn.modules.dropout._DropoutNd
AnyCircularPad = nn.modules.padding._CircularPadNd
ParametrizedWeightNorm = parametrizations._WeightNorm  # what parametrizations.weight_norm registers

# Whether a hook runs around the calls of all modules.
has_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook

# Tensors that stand for many: torch.func.vmap's, and the old ones of torch.autograd's is_grads_batched.
is_batched_tensor = _functorch.is_batchedtensor  # (x) -> bool
is_old_batched_tensor = _functorch.is_legacy_batchedtensor  # (x) -> bool
level_of = _functorch.maybe_get_level  # (x) -> int, of torch.func.vmap's
unwrapped_if_dead = _functorch.unwrap_if_dead  # (x) -> Tensor, without what a transform that has ended left around it
add_batch = _functorch._add_batch_dim  # (x, dim, level) -> Tensor
remove_batch = _functorch._remove_batch_dim  # (x, level, size, dim) -> Tensor
add_old_batch = torch._add_batch_dim
remove_old_batch = torch._remove_batch_dim
enter_old_vmap = torch._C._vmapmode_increment_nesting  # () -> int, the depth
leave_old_vmap = torch._C._vmapmode_decrement_nesting  # () -> int

# What is at work now.
tracing_state = torch._C._get_tracing_state  # () -> what torch.jit.trace and torch.onnx write to, or None
has_functorch = torch._C._are_functorch_transforms_active  # () -> bool
transforms = pyfunctorch.retrieve_all_functorch_interpreters  # () -> list, each with a key()
VMAP = _functorch.TransformType.Vmap  # such a key
outside_of_a_transform = pyfunctorch.temporarily_pop_interpreter_stack  # () -> context
without_functorch = torch._C._DisableFuncTorch  # () -> context
count_dispatch_modes = torch._C._len_torch_dispatch_stack  # () -> int
without_dispatch_modes = _python_dispatch._disable_current_modes  # () -> context

# The backward that this thread is in.
backward_id = torch._C._current_graph_task_id  # () -> int, -1 outside of one
call_at_its_end = torch.autograd.Variable._execution_engine.queue_callback  # (function) -> None

# Operations without a public name.
assert_later = torch._assert_async  # (flag, message) -> None: a failure is told when the device comes to it
subtract_each = torch._foreach_sub  # (tensors, others) -> tensors, in one launch
multiply_each_ = torch._foreach_mul_  # (tensors, scalar) -> None
add_to_each_ = torch._foreach_add_  # (tensors, others) -> None

# Ops, and what their functions of shapes ask.
Op = torch._ops.OpOverload
is_registered = torch._C._dispatch_has_kernel_for_dispatch_key  # (name, key) -> bool
format_of_strides = torch._prims_common.suggest_memory_format  # (x) -> memory_format, of an output as C++ makes it
flatten = _pytree.tree_flatten  # (value) -> (leaves, structure)
leaves = _pytree.tree_leaves  # (value) -> leaves
unflatten = _pytree.tree_unflatten  # (leaves, structure) -> value


def forget_kernels(op: Op) -> None:
    """Have an op look for its kernels again when it is called."""
    op._dispatch_cache.clear()


def constant_in_graphs(function: Function) -> Function:
    """Decorate a function whose answer torch.compile is to take, without tracing how it is found.

    It is what torch.compiler.assume_constant_result does, which would import all of torch._dynamo: most of a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def untraced(function: Function) -> Function:
    """Decorate a function that torch.compile is not to trace, as torch.compiler.disable does, without that import."""
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def end_allocations(device: int, pool: Any) -> None:
    """Have the memory of a GPU be taken from elsewhere again than from a graph's pool, from which it must be taken."""
    torch._C._cuda_endAllocateToPool(device, pool)


def release_pool(device: int, pool: Any) -> None:
    """Give up a use of a graph's pool, which must have one."""
    torch._C._cuda_releasePool(device, pool)
