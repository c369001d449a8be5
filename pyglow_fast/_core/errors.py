"""Refusal of bad input, always as a ValueError that names the argument, what it must be and what it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

import torch

from pyglow_fast._core.tracing import is_batched, is_traced

_STATES = (torch.float32, torch.float64)
# What a terminal acts on rather than shows: control characters (ESC begins a command, line ends make a second line of
# one), Unicode's line ends, what turns the direction of writing, and lone surrogates, which no output can encode.
_ACTING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class SingularMatrixError(ValueError):
    """The error that a matrix of the flow has no inverse."""


def visible(text: str, lines: bool = False) -> str:
    r"""A text as a terminal may show it: what would act there is written out, as \n, \x1b, \u202e or \udcff.

    Names of files and classes and the values in a configuration may hold anything; a file's name that is no UTF-8 has
    lone surrogates. Every other text stays as it is, so that a second time changes nothing. With ``lines`` a text may
    have several lines of its own: their ends stay.
    """
    kept = "\n" if lines else ""
    return _ACTING.sub(lambda found: found[0] if found[0] == kept else found[0].encode("unicode_escape").decode(), text)


def expect(condition: bool, argument: str, expected: str, found: Any) -> None:
    """Raise ``ValueError("argument: expected ..., found ...")`` unless ``condition`` holds.

    ``argument`` is the name the caller knows the value by; the whole message is made :func:`visible`.
    """
    if not condition:
        raise ValueError(visible(f"{argument}: expected {expected}, found {found}"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Name the nearest of the known words, as the end of a message; empty if none is near."""
    near = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_count(name: str, value: int, least: int = 1) -> None:
    """Refuse a size that is not an int of at least ``least``."""
    expect(isinstance(value, int) and value >= least, name, f"an int, at least {least}", repr(value))


def check_seed(seed: int) -> None:
    """Refuse a seed that is not in 0..2^63-1, which is what torch's generators take."""
    expect(seed >= 0, "seed", "a whole number, 0 or more", seed)
    expect(seed < 2**63, "seed", f"at most {2**63 - 1}", seed)


def check_input(name: str, x: torch.Tensor, channels: int, like: torch.Tensor | None = None) -> None:
    """Refuse x unless it is (N, channels, *spatial), float32 or float64, on the device and of the dtype of ``like``."""
    fits = isinstance(x, torch.Tensor) and x.dim() >= 2 and x.shape[1] == channels and x.dtype in _STATES
    if fits and (like is None or (x.dtype == like.dtype and x.device == like.device)):
        return  # before any message is put together: this runs at every call of every layer
    expect(isinstance(x, torch.Tensor), name, "a Tensor", type(x).__name__)
    expect(x.dim() >= 2, name, "shape (N, C, *spatial)", f"shape {tuple(x.shape)}")
    expect(x.shape[1] == channels, name, f"{channels} channels (dimension 1)", f"shape {tuple(x.shape)}")
    if like is not None:
        kept = like.dtype in _STATES
        expect(kept, "parameters", "dtype float32 or float64: the flow needs their precision", like.dtype)
    expect(x.dtype in _STATES, name, "dtype float32 or float64", x.dtype)
    if like is not None:
        expect(x.device == like.device, name, f"device {like.device} (where the parameters are)", x.device)
        expect(x.dtype == like.dtype, name, f"dtype {like.dtype} (that of the parameters)", x.dtype)


def can_read(x: torch.Tensor) -> bool:
    """Tells whether a check may look at the values of x: on the CPU, not traced or exported, nor under vmap.

    On CUDA a look would stop the stream; there values that are not finite show in the results instead.
    """
    return x.device.type == "cpu" and not is_traced() and not is_batched()
