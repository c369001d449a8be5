"""Loading the extension: what it says of itself, and what is said where it is missing or does not fit."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import pytest
import torch

from pyglow_fast import _backend, functional, info, ops

CPU_ALONE = ("net_chain", "checkerboard")  # ops that the library does on a GPU
compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forgets what was loaded, before the test and after it."""
    caches = (_backend._load, _backend._facts, _backend._nets)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def run_python(code: str, **environment: str) -> str:
    """The output of a new interpreter, in which nothing is imported yet."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.skipif(os.environ.get("PYGLOW_NO_EXTENSION") != "0", reason="the extension is optional here")
def test_the_extension_is_there_where_it_is_a_must() -> None:
    assert _backend.reason() == ""
    assert isinstance(_backend.require(), ModuleType)


@compiled
def test_build_info_tells_what_was_built() -> None:
    facts = _backend.build_info()
    assert _backend.release(facts["torch"]) == _backend.release(torch.__version__)
    assert "portable" in facts["instruction_sets"].split(",")
    assert bool(facts["cuda"]) == bool(facts["cuda_archs"])
    assert re.match(r"(gcc|clang) \d+", facts["compiler"])


@compiled
def test_loops_are_shared_among_torchs_threads() -> None:
    if _backend.build_info()["parallel"] != "yes":
        pytest.skip("not built with threads")
    code = "import torch, pyglow_fast._C as c; torch.set_num_threads(2); print(c.parallel_threads())"
    assert run_python(code).strip() == "2"


@compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_second_openmp_runtime_is_loaded() -> None:
    code = """
import torch, pyglow_fast._C as c
c.parallel_threads()
print(*sorted({line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rsplit("/", 1)[-1]}), sep="\\n")"""
    assert len(run_python(code).split()) <= 1


@compiled
@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_no_openmp_or_cuda_library_is_linked() -> None:
    dynamic = subprocess.run(["readelf", "-d", _backend.require().__file__], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic.stdout)
    assert any(name.startswith("libc10") for name in needed)
    assert not [name for name in needed if re.search(r"omp|cuda", name)]
    assert "RPATH" not in dynamic.stdout
    assert "RUNPATH" not in dynamic.stdout


@pytest.mark.full
@compiled
def test_the_instruction_set_can_be_chosen() -> None:
    best = _backend.require().instruction_set()
    built = _backend.build_info()["instruction_sets"].split(",")
    for name in built[: built.index(best) + 1]:
        code = "import torch, pyglow_fast._C as c; print(c.instruction_set())"
        assert run_python(code, PYGLOW_CPU=name).strip() == name


@compiled
def test_an_unknown_instruction_set_is_refused() -> None:
    code = """
import torch, pyglow_fast._C as c
try:
    c.instruction_set()
except ValueError as error:
    print(error)"""
    assert re.match(r"PYGLOW_CPU: expected one of .*portable.*, found mmx", run_python(code, PYGLOW_CPU="mmx"))


@compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_clear_error() -> None:
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        _backend.require().cuda_device_count()


@pytest.mark.usefixtures("fresh")
def test_the_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGLOW_FORCE_REFERENCE", "1")
    assert _backend.extension() is None
    assert _backend.reason() == "PYGLOW_FORCE_REFERENCE is set"
    assert _backend.build_info() == {}
    with pytest.raises(ImportError, match=r"pyglow_fast\._C: PYGLOW_FORCE_REFERENCE"):
        _backend.require()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("setting", [None, "", "0"])
def test_nothing_and_zero_force_nothing(monkeypatch: pytest.MonkeyPatch, setting: str | None) -> None:
    monkeypatch.delenv("PYGLOW_FORCE_REFERENCE", raising=False)
    if setting is not None:
        monkeypatch.setenv("PYGLOW_FORCE_REFERENCE", setting)
    assert "PYGLOW_FORCE_REFERENCE" not in _backend.reason()


@compiled
@pytest.mark.usefixtures("fresh")
def test_nets_may_be_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 2, 4, 4)
    assert functional.net_as_products(x)
    for setting, expected in (("library", False), ("auto", True), ("", True)):
        monkeypatch.setenv("PYGLOW_NETS", setting)
        _backend._nets.cache_clear()
        assert functional.net_as_products(x) == expected
    monkeypatch.setenv("PYGLOW_NETS", "cudnn")
    _backend._nets.cache_clear()
    with pytest.raises(ValueError, match="PYGLOW_NETS: expected auto or library, found 'cudnn'"):
        functional.net_as_products(x)


@pytest.mark.usefixtures("fresh")
def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYGLOW_FORCE_REFERENCE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not installed .*pip install --no-build-isolation \."):
        _backend.require()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("built_for", ["2.10.1", "1.13.0+cu117"])
def test_an_extension_for_another_torch_is_not_used(monkeypatch: pytest.MonkeyPatch, built_for: str) -> None:
    other = SimpleNamespace(build_info=lambda: {"torch": built_for})
    monkeypatch.delenv("PYGLOW_FORCE_REFERENCE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: other)
    with pytest.warns(RuntimeWarning, match=f"built for torch {re.escape(built_for)}, but torch .* is installed"):
        assert _backend.extension() is None
    assert "pip install" in _backend.reason()


@pytest.mark.usefixtures("fresh")
def test_an_extension_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN2at4emptyEv")

    monkeypatch.delenv("PYGLOW_FORCE_REFERENCE", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="cannot be loaded beside torch .*undefined symbol"):
        assert _backend.extension() is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2.13.0+cpu", "2.13.0+cu130", True),
        ("2.13.0", "2.13.1", True),
        ("2.13.0", "2.1.3", False),
        ("2.1", "2.11", False),
    ],
)
def test_compatible_torch_releases(one: str, other: str, same: bool) -> None:
    assert (_backend.release(one) == _backend.release(other)) is same


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
print(*({"torch._dynamo"} & (set(sys.modules) - modules)))
assert not torch.cuda.is_initialized()
extras = {"torchvision", "PIL", "tqdm", "matplotlib", "sklearn", "scipy", "setuptools"}
print(*sorted(extras & (set(sys.modules) - modules)))"""
    assert run_python(code).strip() == ""


@pytest.mark.parametrize("forced", ["0", "1"])
def test_info_names_backend_and_reason(forced: str) -> None:
    text = run_python("from pyglow_fast import info; print(info.report())", PYGLOW_FORCE_REFERENCE=forced)
    for word in ("versions", "build", "devices", "backends", "ops", "python", torch.__version__):
        assert word in text
    if forced == "1":
        assert "reference: PYGLOW_FORCE_REFERENCE is set" in text


def test_info_tells_the_backend_of_every_op() -> None:
    facts = info.collect()
    for device, why in {"cpu": info.cpu_reason(), "cuda": info.cuda_reason()}.items():
        assert facts["backends"][device].startswith(f"reference: {why}" if why else "compiled")
        for op, text in facts["ops"].items():
            assert "reference everywhere" in text or f"{device}: {'reference' if why else 'compiled'}" in text, op


@compiled
def test_info_tells_which_ops_a_gpu_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a usable GPU, all that the dispatcher has a kernel for."""
    monkeypatch.setattr(info, "cuda_reason", lambda: "")
    monkeypatch.setattr(ops, "is_compiled", lambda op, device: device == "cpu" or not op.startswith(CPU_ALONE))
    facts = info.collect()["ops"]
    for op in ops.names():
        runs = "reference" if op.startswith(CPU_ALONE) else "compiled"
        runs += ": the library's convolutions" if op.startswith("net_chain") else ""
        assert facts[op] == f"cpu: compiled, cuda: {runs}", op


@compiled
def test_info_notices_a_missing_kernel() -> None:
    text = run_python(
        "import torch\nfrom pyglow_fast import info, ops\n"
        "ops._library.define('imagined(Tensor x) -> Tensor')\nprint(info.collect()['ops'])"
    )
    assert "'imagined': 'cpu: reference" in text
    assert "'coupling': 'cpu: compiled" in text


@compiled
def test_every_op_has_its_kernels() -> None:
    """On the CPU, and on a GPU if the extension is built for one, but for what the library does there."""
    assert len(ops.names()) >= 13
    for op in ops.names():
        assert ops.is_compiled(op, "cpu"), op
        on_gpus = bool(_backend.build_info()["cuda"]) and not op.startswith(CPU_ALONE)
        assert ops.is_compiled(op, "cuda") == on_gpus, op


@compiled
def test_an_op_that_is_called_first_loads_the_extension() -> None:
    run_python(
        "import sys, torch, pyglow_fast; assert 'pyglow_fast._C' not in sys.modules\n"
        "mean, _ = torch.ops.pyglow_fast.channel_moments(torch.ones(2, 3, 4))\n"
        "assert mean.tolist() == [1.0, 1.0, 1.0] and 'pyglow_fast._C' in sys.modules"
    )


def test_an_op_without_an_extension_says_why() -> None:
    code = "import torch, pyglow_fast\ntry:\n    torch.ops.pyglow_fast.channel_moments(torch.ones(2, 3, 4))\n"
    text = run_python(code + "except ImportError as error:\n    print(error)", PYGLOW_FORCE_REFERENCE="1")
    assert "pyglow_fast._C: PYGLOW_FORCE_REFERENCE is set" in text


@compiled
@pytest.mark.parametrize("argument", ["x.to_sparse()", "x.to_mkldnn()"])
def test_a_layout_without_kernels_is_refused(argument: str) -> None:
    """Also by the very first call, which loads the extension."""
    code = """
import torch, pyglow_fast
x = torch.ones(2, 3, 4, 4)
try:
    torch.ops.pyglow_fast.channel_moments(ARGUMENT)
except NotImplementedError as error:
    print(error)"""
    text = run_python(code.replace("ARGUMENT", argument))
    assert "channel_moments: expected strided tensors on cpu" in text
    assert "found cpu (torch." in text


@compiled
def test_an_operand_of_another_layout_is_refused() -> None:
    x, matrix, offset = torch.ones(2, 3, 4), torch.eye(3), torch.zeros(3)
    with pytest.raises(NotImplementedError, match=r"found cpu \(torch.strided\), cpu \(torch.sparse"):
        ops.channel_mix(x, matrix.to_sparse(), offset, False, 0)


@compiled
def test_the_first_call_under_the_python_dispatcher() -> None:
    run_python("""
import torch, pyglow_fast
from torch._dispatch.python import enable_python_dispatcher
for _ in range(2):
    with enable_python_dispatcher():
        mean, _ = torch.ops.pyglow_fast.channel_moments(torch.ones(2, 3, 4))
    assert mean.tolist() == [1.0, 1.0, 1.0]""")


@compiled
def test_kernels_of_other_schemas_are_refused() -> None:
    """All of them, by an error and not by the end of the process."""
    code = """
import importlib.util, torch
library = torch.library.Library("pyglow_fast", "DEF")
library.define("channel_moments(Tensor x, int extra) -> (Tensor, Tensor)")
spec = importlib.util.spec_from_file_location("pyglow_fast._C", PATH)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for _ in range(2):
    try:
        module.register_kernels()
    except RuntimeError as error:
        print("channel_moments" in str(error))"""
    assert run_python(code.replace("PATH", repr(_backend.require().__file__))).split() == ["True", "True"]


@compiled
@pytest.mark.parametrize("error", [AttributeError("register_kernels"), RuntimeError("another schema")])
def test_an_extension_that_cannot_register_is_not_used(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise error

    info = _backend.build_info()
    module = SimpleNamespace(build_info=lambda: info, register_kernels=refuse)
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    with pytest.warns(RuntimeWarning, match="built from other sources than these"):
        found, why = _backend._load.__wrapped__()
    assert found is None
    assert str(error) in why


def test_info_survives_a_bad_choice_of_instruction_set() -> None:
    if _backend.extension() is None:
        pytest.skip("no extension")
    assert "PYGLOW_CPU: expected" in run_python("from pyglow_fast import info; print(info.report())", PYGLOW_CPU="mmx")
