"""The one way bad input is refused: a ValueError that names the argument, what it must be and what it is."""

from __future__ import annotations

from typing import Any

import torch


class SingularMatrixError(ValueError):
    """A matrix of the flow has no inverse."""


def expect(condition: bool, argument: str, expected: str, found: Any) -> None:
    """Raise ``ValueError("argument: expected ..., found ...")`` unless ``condition`` holds.

    Args:
        condition: what must be true.
        argument: the name the caller knows the value by.
        expected: what it must be, in words.
        found: the offending value, shown with ``str``.
    """
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, found {found}")


def can_read(x: torch.Tensor) -> bool:
    """Whether a check may look at the values of x: on the CPU, and not while torch.compile or torch.export traces.

    On CUDA a look would stop the stream; there values that are not finite show in the results instead.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
