"""Docstrings tell a stranger what a thing is, and show it: rules for first lines, and examples that run.

An example is what one would type at Python's prompt, imports and all, with what it prints. It runs with one thread,
from one seed, without a network, in an empty folder, and prints the same with and without the compiled extension.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import ROOT
from support.figures import leave_undrawn
from support.machine import no_network
from support.public_names import MODULES, PACKAGE, public

leave_undrawn()

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MOST_LINES = 20  # of an example: more is a page of docs/
# A first line that begins so has no subject: it goes on from a name that the reader may not know.
LEAVES_OUT_ITS_SUBJECT = re.compile(
    r"(After|Around|As|At|Because|Before|But|By|During|For|From|If|In|Inside|It|Its|Like|Of|On|Or|So|Such|That|Their|Them"
    r"|These|They|This|Those|To|Under|Unless|Until|With|Within|Without|[Tt]he same)\b"
)
FORMULA = {"log", "det", "exp", "sum"}  # of a formula, and no words
FEWEST_WORDS, FEWEST_NEW_WORDS = 4, 2


def first_line_faults(line: str, name: str) -> list[str]:
    """What is wrong with the first line of the docstring of a thing called ``name``, in words."""
    faults = []
    if LEAVES_OUT_ITS_SUBJECT.match(line):
        faults.append("begins without a subject or a verb")
    if len(line.split()) < FEWEST_WORDS:
        faults.append(f"has fewer than {FEWEST_WORDS} words")
    if not line.endswith("."):
        faults.append("does not end with a period")
    known = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", name)}
    if len(set(re.findall(r"[a-z]{3,}", line.lower())) - known - FORMULA) < FEWEST_NEW_WORDS:
        faults.append(f"has fewer than {FEWEST_NEW_WORDS} words beside its name and a formula")
    return [f"{name or 'the module'}: {line!r} {fault}" for fault in faults]


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name and docstring of a module ("") and of the public classes, methods and functions in it."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and child.name[0] != "_":
                yield f"{prefix}{child.name}", ast.get_docstring(child) or ""
                if isinstance(child, ast.ClassDef):
                    yield from visit(child, f"{prefix}{child.name}.")

    named = [("", ast.get_docstring(tree) or ""), *visit(tree, "")]
    yield from ((name, text) for name, text in named if text)  # overloads and setters have none


def module_of(path: Path) -> str:
    """The dotted name of a file of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
FILES_WITH_EXAMPLES = [path for path in FILES if ">>> " in path.read_text(encoding="utf-8")]


def imported(name: str) -> ModuleType:
    """The module, or a skip where the library that it is made for is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if is_ours(error):
            raise
        pytest.skip(str(error))


def is_ours(error: BaseException) -> bool:
    """Whether an ImportError is of something that is always installed."""
    return (getattr(error, "name", None) or "").split(".")[0] in (PACKAGE, "torch", "numpy", "safetensors")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_first_lines(path: Path) -> None:
    found = docstrings(ast.parse(path.read_text(encoding="utf-8")))
    assert [fault for name, text in found for fault in first_line_faults(text.split("\n")[0], name)] == []


@pytest.mark.parametrize(
    ("line", "name", "word"),
    [
        ("Of the parameters of a net, their names.", "names", "without a subject"),
        ("The same distribution for every element of a larger batch.", "expand", "without a subject"),
        ("Its own tensors, unless a subclass has others.", "weight_sources", "without a subject"),
        ("x -> z.", "Coupling.forward", "fewer than 4 words"),
        ("Draw the samples.", "write", "fewer than 4 words"),
        ("The samples that are drawn", "drawn", "a period"),
        ("x = W^-1 z, log_det = -P log|det W|.", "inverse", "beside its name"),
        ("The checkpoint that is to be saved.", "Writer.save_the_checkpoint_that_is_to_be_saved", "beside its name"),
    ],
)
def test_a_bad_first_line_is_found(line: str, name: str, word: str) -> None:
    assert any(word in fault for fault in first_line_faults(line, name))


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Map data x to latents z.", "Coupling.forward"),
        ("z = (x + bias) exp(log_scale) per channel; log_det = P sum log_scale.", "ActNorm"),
        ("Whether the parameters were set from data.", "is_initialized"),
        ("Aside from one thing, all begin with an ordinary word.", "thing"),
    ],
)
def test_a_good_first_line_passes(line: str, name: str) -> None:
    assert first_line_faults(line, name) == []


def examples_of(value: type) -> list[doctest.Example]:
    """The examples in a class's own docstring."""
    return doctest.DocTestParser().get_examples(vars(value).get("__doc__") or "")


def example_faults(value: type) -> list[str]:
    """What is wrong with the example of a class, in words."""
    examples = examples_of(value)
    source = "".join(example.source for example in examples)
    faults = []
    if not re.search(rf"\b{value.__name__}\b", source):
        faults.append("the docstring has no example that names the class")
    if not any(example.want for example in examples):
        faults.append("the docstring has no example with a result")
    if source.count("\n") > MOST_LINES:
        faults.append(f"the examples have more than {MOST_LINES} lines")
    return [f"{value.__module__}.{value.__name__}: {fault}" for fault in faults]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_class_has_an_example(name: str) -> None:
    classes = dict.fromkeys(value for value in public(imported(name)) if inspect.isclass(value))
    assert [fault for value in classes for fault in example_faults(value)] == []
    sources = ["".join(example.source for example in examples_of(value)) for value in classes]
    assert len(sources) == len(set(sources)), "two classes have the same example"


def test_a_missing_example_is_found() -> None:
    class Bare:
        """A class without one."""

    class Silent:
        """A class whose example shows nothing.

        >>> thing = Silent()
        """

    class Elsewhere:
        """A class whose example is of something else.

        >>> 1 + 1
        2
        """

    class Shown:
        """A class with an example.

        >>> type(Shown()).__name__
        'Shown'
        """

    words = ("names the class", "with a result")
    found = {
        value: [word for word in words if any(word in fault for fault in example_faults(value))]
        for value in (Bare, Silent, Elsewhere, Shown)
    }
    assert found == {Bare: list(words), Silent: [words[1]], Elsewhere: [words[0]], Shown: []}


class _Runner(doctest.DocTestRunner):
    """Runs examples; where one needs a library that is missing, its test is skipped."""

    def report_unexpected_exception(self, out: Any, test: Any, example: Any, exc_info: Any) -> None:
        if issubclass(exc_info[0], ImportError) and not is_ours(exc_info[1]):
            pytest.skip(str(exc_info[1]))
        super().report_unexpected_exception(out, test, example, exc_info)


def failures(test: doctest.DocTest) -> str:
    """What is to be said of a docstring's examples after a run; nothing if they print what they should."""
    said: list[str] = []
    torch.manual_seed(20180710)
    _Runner(optionflags=OPTIONS).run(test, out=said.append)
    return "".join(said)


def settings() -> tuple[object, ...]:
    """What an example must leave as it was, since whoever reads on would find it changed."""
    flags = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"))
    return torch.get_num_threads(), torch.get_default_dtype(), *flags


@pytest.mark.parametrize("path", FILES_WITH_EXAMPLES, ids=module_of)
def test_examples(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = imported(module_of(path))
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.chdir(tmp_path)
    before = settings()
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, module.__name__, globs={})
    written = sum(
        len(doctest.DocTestParser().get_examples(ast.get_docstring(node) or ""))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert sum(len(test.examples) for test in tests) == written, "some examples are where doctest does not look"
    said = "".join(failures(test) for test in tests)
    assert not said, said
    assert settings() == before, "the examples leave settings of torch changed"


def test_a_wrong_example_is_found() -> None:
    def check(text: str) -> str:
        return failures(doctest.DocTestParser().get_doctest(text, {}, "example", None, None))

    assert check(">>> 1 + 1\n2\n") == ""
    assert "Got:\n    2" in check(">>> 1 + 1\n3\n")
    assert "NameError" in check(">>> unknown\n3\n")
    with pytest.raises(pytest.skip.Exception, match="no_such_library"):
        check(">>> import no_such_library\n")


@pytest.mark.full
def test_examples_print_the_same_without_the_extension() -> None:
    environment = {**os.environ, "PYGLOW_FORCE_REFERENCE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_examples and not print"]
    result = subprocess.run(
        [*command, __file__], env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout
