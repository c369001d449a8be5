"""Exports programs for other runtimes: torch.export with all that depends on parameters alone computed before."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyglow_fast import _torch
from pyglow_fast._errors import expect


def folded(
    model: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any = None, kwargs: dict[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """Export a model by torch.export, every value in the program that no input changes being a constant.

    Such values are the inverse and log|det W| of a plain 1x1 convolution, for which ONNX has no operators, actnorms
    folded into products, Householder reflections, global scales. The program consists of torch's own ops, is
    differentiable in its inputs alone, and can be passed to torch.onnx.export, torch.export.save and
    torch._inductor.aoti_compile_and_package.

    Args:
        model: in the mode to be exported, initialised; it is left as it is.
        args, kwargs: example inputs, as of torch.export.export.
        dynamic_shapes: as of torch.export.export, such as ``({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)``.

    Raises:
        ValueError: args is no tuple; a matrix of the model is singular.
    """
    expect(isinstance(args, tuple), "args", "a tuple of example inputs", type(args).__name__)
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
        module = _folded(program.run_decompositions({}).module(check_guards=False))
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes)


def _folded(module: fx.GraphModule) -> fx.GraphModule:
    """Make the program that holds what this one computes from its own tensors, and no tensor that is not read."""
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            values[node] = attrgetter(node.target)(module)
        elif node.op == "call_function" and _is_pure(node) and all(known in values for known in node.all_input_nodes):
            given = fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            values[node] = node.target(*given[0], **given[1])
            _check(node, values[node])
    held: dict[str, Any] = {}
    for count, (node, value) in enumerate(values.items()):
        if node.op == "get_attr":
            held[str(node.target)] = value
        elif isinstance(value, Tensor) and any(user not in values for user in node.users):
            held[f"constant_{count}"] = value.detach().contiguous()
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.create_node("get_attr", f"constant_{count}"))
    for node in reversed(values):  # also nodes of checks, which no other node reads
        if not node.users:
            module.graph.erase_node(node)
    return fx.GraphModule(held, module.graph)


def _check(node: fx.Node, value: Any) -> None:
    """Refuse the inverse or the log-det of a singular matrix, which an exported program does not look for."""
    if "linalg" in str(node.target):
        parts = [value] if isinstance(value, Tensor) else value
        regular = all(bool(part.isfinite().all()) for part in parts)
        expect(regular, "model", "regular matrices", f"a singular one in {node.target}")


def _is_pure(node: fx.Node) -> bool:
    """Whether it gives the same values each time and changes nothing."""
    if not isinstance(node.target, _torch.Op):
        return getattr(node.target, "__module__", "") in ("_operator", "operator", "math")
    random = torch.Tag.nondeterministic_seeded in node.target.tags
    return not random and not _torch.writes(node.target)
