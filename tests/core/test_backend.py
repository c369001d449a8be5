"""Loading the extension: what it says of itself, and what is said where it is missing or does not fit."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from support.commands import Command

from pyglow_fast import functional
from pyglow_fast._core import backend
from pyglow_fast.functional import info, ops

CPU_ALONE = ("net_chain", "checkerboard")  # ops that the library does on a GPU
compiled = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forgets what was loaded, before the test and after it."""
    monkeypatch.delenv("PYGLOW_FORCE_REFERENCE", raising=False)
    caches = (backend._load, backend._nets, backend.require)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def run_python(code: str) -> str:
    """The output of a new interpreter, in which nothing is imported yet."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def run_forked(code: str, folder: Path, **environment: str) -> str:
    """The output of a process that has imported the package and loaded no extension yet."""
    return Command(["-c", code], folder, os.environ | environment).ended()[0]


@pytest.mark.skipif(os.environ.get("PYGLOW_NO_EXTENSION") != "0", reason="the extension is optional here")
def test_the_extension_is_there_where_it_is_a_must() -> None:
    assert backend.reason() == ""
    assert isinstance(backend.require(), ModuleType)


@compiled
def test_build_info_tells_what_was_built() -> None:
    facts = backend.build_info()
    assert backend.release(facts["torch"]) == backend.release(torch.__version__)
    assert "portable" in facts["instruction_sets"].split(",")
    assert bool(facts["cuda"]) == bool(facts["cuda_archs"])
    assert re.match(r"(gcc|clang) \d+", facts["compiler"])


@compiled
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_no_openmp_or_cuda_library_is_linked() -> None:
    """One module serves any torch: it finds the libraries of the torch that was imported before it."""
    dynamic = subprocess.run(
        ["readelf", "-d", str(backend.require().__file__)], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert any(name.startswith("libc10") for name in needed)
    assert not [name for name in needed if re.search(r"omp|cuda", name)]
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@compiled
def test_every_op_has_its_kernels() -> None:
    """On the CPU, and on a GPU if the extension is built for one, but for what the library does there."""
    assert len(ops.names()) >= 13
    for op in ops.names():
        assert ops.is_compiled(op, "cpu"), op
        on_gpus = bool(backend.build_info()["cuda"]) and not op.startswith(CPU_ALONE)
        assert ops.is_compiled(op, "cuda") == on_gpus, op


@compiled
def test_an_unknown_instruction_set_is_refused(tmp_path: Path) -> None:
    """By the kernels; ``info`` tells it and goes on."""
    code = """
import torch, pyglow_fast._C as c
from pyglow_fast.functional import info
try:
    c.instruction_set()
except ValueError as error:
    print(error)
print(info.report())"""
    said = run_forked(code, tmp_path, PYGLOW_CPU="mmx")
    assert re.match(r"PYGLOW_CPU: expected one of .*portable.*, found mmx", said)
    assert "PYGLOW_CPU: expected" in said.split("versions", 1)[1]


@compiled
@pytest.mark.usefixtures("fresh")
def test_nets_may_be_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 4, 4)
    for setting, expected in (("library", False), ("rows", False), ("auto", True), ("", True)):
        monkeypatch.setenv("PYGLOW_NETS", setting)
        backend._nets.cache_clear()
        assert functional.net_by_kernels(x) == expected
    monkeypatch.setenv("PYGLOW_NETS", "cudnn")
    backend._nets.cache_clear()
    with pytest.raises(ValueError, match="PYGLOW_NETS: expected auto, library or rows, found 'cudnn'"):
        functional.net_by_kernels(x)


@pytest.mark.usefixtures("fresh")
def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for nothing in ("", "0"):
        monkeypatch.setenv("PYGLOW_FORCE_REFERENCE", nothing)
        assert "PYGLOW_FORCE_REFERENCE" not in backend.reason()
        backend._load.cache_clear()
    monkeypatch.setenv("PYGLOW_FORCE_REFERENCE", "1")
    assert backend.extension() is None
    assert backend.build_info() == {}
    with pytest.raises(ImportError, match=r"pyglow_fast\._C: PYGLOW_FORCE_REFERENCE is set"):
        backend.require()


@pytest.mark.usefixtures("fresh")
def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed .*pip install --no-build-isolation \."):
        backend.require()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            lambda name: SimpleNamespace(build_info=lambda: {"torch": "1.13.0+cu117"}),
            r"built for torch 1\.13\.0\+cu117, but torch .* is installed",
        ),
        (mock.Mock(side_effect=ImportError("undefined symbol: f")), "cannot be loaded beside torch .*undefined symbol"),
        (
            lambda name: SimpleNamespace(
                build_info=lambda: {"torch": torch.__version__},
                register_kernels=mock.Mock(side_effect=RuntimeError("another schema")),
            ),
            "built from other sources than these.*another schema",
        ),
    ],
    ids=["another torch", "broken", "other sources"],
)
def test_an_extension_that_does_not_fit_is_not_used(
    monkeypatch: pytest.MonkeyPatch, found: object, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", found)
    with pytest.warns(RuntimeWarning, match=message):
        assert backend.extension() is None
    assert "pip install" in backend.reason()


def test_importing_the_package_changes_nothing() -> None:
    """No device, no global state, no warning filter, no build, and no library that may be missing."""
    code = """
import sys, warnings
import numpy, torch

def state():
    return {
        "dtype": torch.get_default_dtype(), "threads": torch.get_num_threads(), "grad": torch.is_grad_enabled(),
        "warning filters": list(warnings.filters), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.benchmark, "generator": hash(tuple(torch.get_rng_state().tolist())),
        "cuda": torch.cuda.is_initialized(),
    }

before, modules = state(), set(sys.modules)
import pyglow_fast
after = state()
print(*(f"{name}: {before[name]} -> {after[name]}" for name in after if after[name] != before[name]))
# torch's compiler doubles the time of the import and brings a warning filter along.
extras = {"torch._dynamo", "torchvision", "PIL", "tqdm", "matplotlib", "sklearn", "scipy", "setuptools"}
print(*sorted(extras & (set(sys.modules) - modules)))"""
    assert run_python(code).strip() == ""


def test_info_tells_the_backend_of_every_op() -> None:
    facts, text = info.collect(), info.report()
    for word in ("versions", "build", "devices", "backends", "ops", "python", torch.__version__):
        assert word in text
    for device, why in {"cpu": backend.reason(), "cuda": info.cuda_reason()}.items():
        assert facts["backends"][device].startswith(f"reference: {why}" if why else "compiled")
        for op, said in facts["ops"].items():
            assert "reference everywhere" in said or f"{device}: {'reference' if why else 'compiled'}" in said, op


def test_without_the_extension_info_and_ops_say_why(tmp_path: Path) -> None:
    code = """
import torch, pyglow_fast
from pyglow_fast.functional import info
try:
    torch.ops.pyglow_fast.invert_matrices(torch.ones(2, 3, 3))
except ImportError as error:
    print(error)
print(info.report())"""
    text = run_forked(code, tmp_path, PYGLOW_FORCE_REFERENCE="1")
    assert "pyglow_fast._C: PYGLOW_FORCE_REFERENCE is set" in text
    assert "reference: PYGLOW_FORCE_REFERENCE is set" in text


@compiled
def test_an_op_that_is_called_first_loads_the_extension(tmp_path: Path) -> None:
    """One that is refused, too, and under the dispatcher that torch.compile traces with."""
    code = """
import sys, torch, pyglow_fast
from torch._dispatch.python import enable_python_dispatcher
assert "pyglow_fast._C" not in sys.modules
x = torch.eye(3).expand(2, 3, 3)
try:
    torch.ops.pyglow_fast.invert_matrices(x.to_sparse())
except NotImplementedError as error:
    print(error)
with enable_python_dispatcher():
    inverses, _ = torch.ops.pyglow_fast.invert_matrices(x)
assert torch.equal(inverses, x) and "pyglow_fast._C" in sys.modules"""
    text = run_forked(code, tmp_path)
    assert "invert_matrices: expected strided tensors on cpu" in text
    assert "found cpu (torch.sparse" in text


@pytest.mark.full
@compiled
def test_kernels_of_other_schemas_are_refused() -> None:
    """All of them, by an error and not by the end of the process."""
    code = """
import importlib.util, torch
library = torch.library.Library("pyglow_fast", "DEF")
library.define("invert_matrices(Tensor x, int extra) -> (Tensor, Tensor)")
spec = importlib.util.spec_from_file_location("pyglow_fast._C", PATH)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for _ in range(2):
    try:
        module.register_kernels()
    except RuntimeError as error:
        print("invert_matrices" in str(error))"""
    assert run_python(code.replace("PATH", repr(backend.require().__file__))).split() == ["True", "True"]
