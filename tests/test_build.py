"""The policy of setup.py and the checks of the build, without compiling the module."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from support import ROOT

SWITCHES = ("PYGLOW_CUDA", "PYGLOW_NO_EXTENSION", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CUDACXX", "CXX")
TOOLS = str(Path(sys.executable).parent)
CMAKE = shutil.which("cmake", path=TOOLS) or shutil.which("cmake")


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module, with no switch set, an empty PATH and no CUDA toolkit."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-toolkit"))
    spec = importlib.util.spec_from_file_location("pyglow_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fake_tool(folder: Path, name: str, output: str = "", status: int = 0) -> None:
    tool = folder / name
    tool.write_text(f"#!/bin/sh\necho '{output}'\nexit {status}\n", encoding="utf-8")
    tool.chmod(0o755)


def fake_nvcc(folder: Path, release: str) -> None:
    fake_tool(folder, "nvcc", f"Cuda compilation tools, release {release}, V{release}.99")


def refusal(call: Callable[[], object]) -> str:
    """The text that a refusing build prints."""
    with pytest.raises(SystemExit) as refused:
        call()
    assert isinstance(refused.value.code, str)
    return refused.value.code


@pytest.mark.parametrize("name", ["PYGLOW_CUDA", "PYGLOW_NO_EXTENSION"])
def test_switches_take_three_values(policy: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert policy.switch(name) == "auto"
    for value in ("", "auto", "0", "1"):
        monkeypatch.setenv(name, value)
        assert policy.switch(name) == (value or "auto")
    monkeypatch.setenv(name, "yes")
    assert refusal(lambda: policy.switch(name)) == f"{name}: expected auto, 0 or 1, found 'yes'"


def test_without_a_compiler_the_reference_is_installed(
    policy: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert policy.extensions() == []
    note = capsys.readouterr().err
    assert "WITHOUT its compiled kernels" in note
    assert "no C++ compiler was found" in note
    monkeypatch.setenv("PYGLOW_NO_EXTENSION", "0")
    assert "asks for the compiled extension, but no C++ compiler" in refusal(policy.extensions)


def test_without_python_headers_the_reference_is_installed(
    policy: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(tmp_path, "g++")
    monkeypatch.setattr(policy.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert policy.extensions() == []
    assert "apt-get install python3-dev" in capsys.readouterr().err


def test_with_a_compiler_the_extension_is_built_unless_unwanted(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_tool(tmp_path, "mycxx")
    monkeypatch.setenv("CXX", "mycxx -fdiagnostics-color")
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(policy.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert [extension.name for extension in policy.extensions()] == ["pyglow_fast._C"]
    monkeypatch.setenv("PYGLOW_NO_EXTENSION", "1")
    assert policy.extensions() == []


def test_no_cuda_without_nvcc(policy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy.cuda_options() == ["-DPYGLOW_NVCC="]
    monkeypatch.setenv("PYGLOW_CUDA", "1")
    assert "PYGLOW_CUDA=1 asks for the CUDA kernels, but no nvcc was found" in refusal(policy.cuda_options)


def test_cuda_where_nvcc_is_found(policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_nvcc(tmp_path, "13.0")
    archs = "-DCMAKE_CUDA_ARCHITECTURES=80-real;90-real;100-real;120"
    assert policy.cuda_options() == [f"-DPYGLOW_NVCC={tmp_path / 'nvcc'}", archs]
    monkeypatch.setenv("PYGLOW_CUDA", "0")
    assert policy.cuda_options() == ["-DPYGLOW_NVCC="]


def test_the_named_toolkit_comes_before_the_path(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "toolkit" / "bin").mkdir(parents=True)
    fake_nvcc(tmp_path, "11.0")
    fake_nvcc(tmp_path / "toolkit" / "bin", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert policy.cuda_options()[0] == f"-DPYGLOW_NVCC={tmp_path / 'toolkit' / 'bin' / 'nvcc'}"


@pytest.mark.parametrize("value", ["8.6", "8.0 9.0a;12.0+PTX", "8.0,9.0a,12.0+PTX"])
def test_architectures_are_taken_from_the_environment(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str
) -> None:
    fake_nvcc(tmp_path, "12.8")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    expected = "86-real" if value == "8.6" else "80-real;90a-real;120"
    assert policy.cuda_options()[1] == f"-DCMAKE_CUDA_ARCHITECTURES={expected}"


def test_an_unknown_architecture_is_refused(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;Hopper")
    assert refusal(policy.cuda_options).endswith("found 'Hopper'")


@pytest.mark.parametrize(("release", "needed"), [("11.2", "9.0 needs 11.8"), ("12.4", "10.0 needs 12.8")])
def test_an_old_nvcc_is_refused(policy: ModuleType, tmp_path: Path, release: str, needed: str) -> None:
    fake_nvcc(tmp_path, release)
    text = refusal(policy.cuda_options)
    assert f"is CUDA {release}, but architecture {needed}" in text
    assert "PYGLOW_CUDA=0" in text


def test_an_old_nvcc_may_serve_old_architectures(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "12.4")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert policy.cuda_options()[1] == "-DCMAKE_CUDA_ARCHITECTURES=80-real;90"


@pytest.mark.parametrize(("output", "status"), [("release 13.0,", 1), ("no version here", 0)])
def test_an_nvcc_that_does_not_work_is_explained(policy: ModuleType, tmp_path: Path, output: str, status: int) -> None:
    fake_tool(tmp_path, "nvcc", output, status)
    assert "nvcc --version does not work" in refusal(policy.cuda_options)


def check_symbols(folder: Path, source: str, isa: str) -> subprocess.CompletedProcess[str]:
    compiler, nm = shutil.which("g++") or shutil.which("c++"), shutil.which("nm")
    if compiler is None or nm is None or CMAKE is None:
        pytest.skip("needs a C++ compiler, nm and cmake")
    (folder / "kernel.cpp").write_text(source, encoding="utf-8")
    subprocess.run([compiler, "-O1", "-c", "kernel.cpp", "-o", "kernel.o"], cwd=folder, check=True)
    script = ROOT / "cmake" / "check_isa_symbols.cmake"
    command = [CMAKE, f"-DNM={nm}", f"-DISA={isa}", "-DOBJECTS=kernel.o", "-DSTAMP=checked", "-P", str(script)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


ISOLATED = """
#include <utility>
namespace pyglow { inline namespace avx2 {
struct Value { float x; };
template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }
}}
template <class T> __attribute__((noinline)) void outside(T& a, T& b) { T c = a; a = b; b = c; }
static int count() { return 1; }
float kernel(float x) {
  pyglow::Value a{x}, b{1};
  outside(a, b);  // named after a type of the instruction set
  return pyglow::twice(a.x) + count();
}
"""
SHARED = """
template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }
float kernel(float x) { return twice(x); }
"""


def test_objects_of_an_instruction_set_may_keep_their_symbols_apart(tmp_path: Path) -> None:
    result = check_symbols(tmp_path, ISOLATED, "avx2")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "checked").exists()


@pytest.mark.parametrize(("source", "isa"), [(SHARED, "avx2"), (ISOLATED, "avx512")])
def test_objects_that_share_weak_symbols_fail_the_build(tmp_path: Path, source: str, isa: str) -> None:
    result = check_symbols(tmp_path, source, isa)
    assert result.returncode != 0
    assert "twice" in result.stderr
    assert not (tmp_path / "checked").exists()


def test_setup_stays_policy() -> None:
    assert len((ROOT / "setup.py").read_text(encoding="utf-8").splitlines()) < 120


def test_torch_is_not_a_build_requirement() -> None:
    """An isolated build would otherwise compile against a torch of its own choice."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert not [name for name in project["build-system"]["requires"] if name.startswith("torch")]
    assert "torch>=2.11" in project["project"]["dependencies"]
