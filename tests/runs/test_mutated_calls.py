"""The entries of csrc/run, given what no call of theirs gives: an error that says so, or an answer, and no crash."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import ROOT
from torch import Tensor

import pyglow_fast as pgf
from pyglow_fast import _backend
from pyglow_fast.runs import compiled

ENTRIES = ("run_forward", "run_backward", "inverted", "fold", "fold_backward")
MADE = ("BackwardArgs", "Kept", "Part")
SAID = (ValueError, TypeError, RuntimeError, IndexError)
UNCLEAR = ("INTERNAL ASSERT", "vector::", "bad_function_call", "undefined Tensor")

Call = tuple[str, list[Any], dict[str, Any]]


class Recorder:
    """The extension, whose calls are noted; of a struct that is made, what it is made of."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._made: list[tuple[Any, Call]] = []  # holds the structs, so that none has another's place

    def __getattr__(self, name: str) -> Any:
        real = getattr(_backend.require(), name)
        if name not in (*ENTRIES, *MADE):
            return real

        def noted(*args: Any, **named: Any) -> Any:
            call = (name, [self._plain(arg) for arg in args], {key: self._plain(arg) for key, arg in named.items()})
            found = real(*args, **named)
            self.calls.append(call) if name in ENTRIES else self._made.append((found, call))
            return found

        return noted

    def _plain(self, arg: Any) -> Any:
        """Tensors without a record, sequences as lists; of a struct the call that makes it."""
        if isinstance(arg, Tensor):
            return arg.detach().clone()
        if isinstance(arg, list | tuple):
            return [self._plain(one) for one in arg]
        return next((call for made, call in self._made if made is arg), arg)


def made(arg: Any) -> Any:
    """An argument, from what a recorder has noted."""
    if isinstance(arg, list):
        return [made(one) for one in arg]
    return called(arg) if isinstance(arg, tuple) else arg


def called(call: Call) -> Any:
    name, args, named = call
    return getattr(_backend.require(), name)(*map(made, args), **{key: made(arg) for key, arg in named.items()})


def tensors(x: Tensor) -> Iterator[Any]:
    """Others than x: of other dimensions, sizes and dtypes."""
    yield from (None, x[None], x[..., None], x.new_empty(0), x.double(), x.long(), x.bfloat16(), x.to("meta"))
    for dim in range(x.dim()):
        yield from (x.select(dim, 0), x.narrow(dim, 0, 0), torch.cat([x, x], dim), x.narrow(dim, 0, x.shape[dim] - 1))
    if x.dtype == torch.int64:
        yield from (x + 1000, x - 1000)


def turned(step: Any) -> Any:
    """A step in the other direction."""
    extension, names = _backend.require(), ("map", "order", "inverse", "bias", "eps", "clamp", "factor")
    kind = {name: getattr(step.kind, name) for name in names} | {"inverse": not step.kind.inverse}
    return extension.Step(kind=extension.Kind(**kind), net=step.net, reads=step.reads)


def others(arg: Any) -> Iterator[Any]:
    """What may stand in the place of an argument."""
    if isinstance(arg, Tensor):
        yield from tensors(arg)
    elif isinstance(arg, list):
        yield from (None, [], arg[1:], arg[:-1], arg + arg[-1:], arg[::-1])
        for i in {0, 1, len(arg) - 1} & set(range(len(arg))):
            yield from ([*arg[:i], other, *arg[i + 1 :]] for other in others(arg[i]))
        if all(hasattr(one, "kind") for one in arg):
            yield [turned(one) for one in arg]
    elif hasattr(arg, "kind"):
        yield from (None, turned(arg))
    elif isinstance(arg, tuple):
        yield from changed(arg)
    elif isinstance(arg, bool):
        yield not arg
    elif isinstance(arg, int):
        yield from (-1, arg + 1, 2**40)
    elif hasattr(arg, "name"):  # of an enumeration
        yield from type(arg)
    elif arg is None:
        yield from (torch.zeros(()), torch.zeros(3, 4, 2, 2))
    else:
        yield None


def changed(call: Call) -> Iterator[Call]:
    """The call with one argument changed."""
    name, args, named = call
    for i, arg in enumerate(args):
        yield from ((name, [*args[:i], other, *args[i + 1 :]], named) for other in others(arg))
    for key, arg in named.items():
        yield from ((name, args, {**named, key: other}) for other in others(arg))


def recorded(memory: str, options: dict[str, Any], budget: str | int, autocast: bool) -> list[Call]:
    """The calls of a tiny run of steps."""
    recorder, cond = Recorder(), options.get("cond_channels", 0)
    turns = [{"parity": k % 2} if "mask" in options else {} for k in range(3)]
    steps = [pgf.FlowStep(4, 5, **options, **turn) for turn in turns]
    sequence = pgf.ReversibleSequence(steps, memory, anchor_every=2, memory_budget=budget)
    x, given = torch.randn(3, 4, 4, 2), torch.randn(3, cond, 4, 2) if cond else None
    sequence.initialize(x, given)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patch.setattr(compiled, "require", lambda: recorder)
        for way in (sequence, sequence.inverse):
            z, log_det = way(x, given)
            (z.sum() + log_det.sum()).backward()
            with torch.no_grad():
                way(x, given)
    return recorder.calls


OPTIONS: list[tuple[dict[str, Any], str | int, bool]] = [
    ({}, "auto", False),
    ({}, 1500, False),
    ({}, "auto", True),
    ({"permutation": "shuffle", "cond_channels": 2, "injector": True}, "auto", False),
    ({"mask": "checkerboard", "cond_channels": 2, "net_actnorm": True}, "auto", False),
]


def main(thinned: int) -> None:
    """Make one changed call in so many; prints each unclear error, and last how many were refused and how many not."""
    torch.set_num_threads(1)
    seen, refused, answered = set(), 0, 0
    for memory, options in itertools.product(("store", "checkpoint", "reversible"), OPTIONS):
        for call in recorded(memory, *options):
            of_run = (memory, call[1][0][2]["steps"][0].kind.inverse) if "run" in call[0] else ()
            if (text := repr((call[0], of_run, options))) in seen:
                continue
            seen.add(text)
            called(call)
            for other in itertools.islice(changed(call), len(seen) % thinned, None, thinned):
                print(memory, options, other[0], file=sys.stderr)
                try:
                    called(other)
                    answered += 1
                except SAID as error:
                    refused += 1
                    if any(part in str(error) for part in UNCLEAR):
                        print(memory, options, other[0], type(error).__name__, str(error).split("\n")[0])
    print(f"{refused} refused, {answered} answered")


@pytest.mark.skipif(_backend.extension() is None, reason="the run is compiled")
@pytest.mark.parametrize(
    ("nets", "thinned"),
    [("auto", 24), *(pytest.param(nets, 8, marks=pytest.mark.full) for nets in ("auto", "library", "rows"))],
)
def test_no_argument_ends_the_process(nets: str, thinned: int) -> None:
    command = [sys.executable, "-c", f"from runs import test_mutated_calls as t; t.main({thinned})"]
    environment = {**os.environ, "PYGLOW_NETS": nets}
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT / "tests", env=environment)
    assert found.returncode == 0, found.stderr[-1000:]
    *unclear, counts = found.stdout.splitlines()
    assert unclear == []
    refused, answered = (int(words.split()[0]) for words in counts.split(","))
    assert refused > answered > 100
