"""The policy of setup.py, the checks of the build, and what is told of wheels; one is made with --full alone."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from packaging.requirements import Requirement
from support import ROOT

import pyglow_fast
from pyglow_fast._core import backend

SWITCHES = (
    "PYGLOW_CUDA",
    "PYGLOW_NO_EXTENSION",
    "PYGLOW_WHEEL_LABEL",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDACXX",
    "CXX",
)
TOOLS = str(Path(sys.executable).parent)
CMAKE = shutil.which("cmake", path=TOOLS) or shutil.which("cmake")


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """setup.py as a module beside a torch for CUDA, with no switch set, an empty PATH and no CUDA toolkit."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "no-toolkit"))
    spec = importlib.util.spec_from_file_location("pyglow_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "torch_has_cuda", lambda: True)
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


def test_switches_take_three_values(policy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "auto", "0", "1"):
        monkeypatch.setenv("PYGLOW_CUDA", value)
        assert policy.switch("PYGLOW_CUDA") == (value or "auto")
    monkeypatch.setenv("PYGLOW_CUDA", "yes")
    assert refusal(lambda: policy.switch("PYGLOW_CUDA")) == "PYGLOW_CUDA: expected auto, 0 or 1, found 'yes'"


def test_what_is_missing_leaves_the_reference(
    policy: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A compiler, then Python's headers; with both there is an extension, unless it is unwanted."""
    assert policy.extensions() == []
    note = capsys.readouterr().err
    assert "WITHOUT its compiled kernels" in note
    assert "no C++ compiler was found" in note
    monkeypatch.setenv("PYGLOW_NO_EXTENSION", "0")
    assert "asks for the compiled extension, but no C++ compiler" in refusal(policy.extensions)
    monkeypatch.setenv("PYGLOW_NO_EXTENSION", "auto")
    monkeypatch.setattr(policy.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    fake_tool(tmp_path, "g++")
    assert policy.extensions() == []
    assert "apt-get install python3-dev" in capsys.readouterr().err
    (tmp_path / "Python.h").touch()
    assert [extension.name for extension in policy.extensions()] == ["pyglow_fast._C"]
    monkeypatch.setenv("PYGLOW_NO_EXTENSION", "1")
    assert policy.extensions() == []


def test_cuda_where_nvcc_is_found(policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert policy.cuda_options() == ["-DPYGLOW_NVCC="]
    monkeypatch.setenv("PYGLOW_CUDA", "1")
    assert "PYGLOW_CUDA=1 asks for the CUDA kernels, but no nvcc was found" in refusal(policy.cuda_options)
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


@pytest.mark.parametrize(
    ("archs", "expected"),
    [("8.6", "86-real"), ("8.0 9.0a;12.0+PTX", "80-real;90a-real;120"), ("8.0;Hopper", "found 'Hopper'")],
)
def test_architectures_are_taken_from_the_environment(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archs: str, expected: str
) -> None:
    fake_nvcc(tmp_path, "12.8")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    if expected.startswith("found"):
        assert refusal(policy.cuda_options).endswith(expected)
    else:
        assert policy.cuda_options()[1] == f"-DCMAKE_CUDA_ARCHITECTURES={expected}"


def test_an_nvcc_that_is_too_old_or_does_not_work_is_explained(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_nvcc(tmp_path, "12.4")
    text = refusal(policy.cuda_options)
    assert "is CUDA 12.4, but architecture 10.0 needs 12.8" in text
    assert "PYGLOW_CUDA=0" in text
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert policy.cuda_options()[1] == "-DCMAKE_CUDA_ARCHITECTURES=80-real;90"
    fake_tool(tmp_path, "nvcc", "no version here")
    assert "nvcc --version does not work" in refusal(policy.cuda_options)


ISOLATED = """
namespace pyglow { inline namespace avx2 {
template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }
}}
float kernel(float x) { return pyglow::twice(x); }
"""


@pytest.mark.parametrize(("isa", "passes"), [("avx2", True), ("avx512", False)])
def test_instruction_sets_keep_their_symbols_apart(tmp_path: Path, isa: str, passes: bool) -> None:
    """Else the linker may take for a processor the function that was compiled for another one."""
    compiler, nm = shutil.which("g++") or shutil.which("c++"), shutil.which("nm")
    if compiler is None or nm is None or CMAKE is None:
        pytest.skip("needs a C++ compiler, nm and cmake")
    (tmp_path / "kernel.cpp").write_text(ISOLATED, encoding="utf-8")
    subprocess.run([compiler, "-O1", "-c", "kernel.cpp", "-o", "kernel.o"], cwd=tmp_path, check=True)
    script = ROOT / "cmake" / "check_isa_symbols.cmake"
    command = [CMAKE, f"-DNM={nm}", f"-DISA={isa}", "-DOBJECTS=kernel.o", "-DSTAMP=checked", "-P", str(script)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode == 0) == passes, result.stderr
    assert (tmp_path / "checked").exists() == passes
    assert passes or "twice" in result.stderr


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.1+cu130", "2.14.0a0+git1234"])
def test_compiled_kernels_ask_for_their_torch(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, torch: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(policy.importlib.metadata, "version", lambda name: {"torch": torch}[name])
    minor = ".".join(backend.release(torch))
    required = Requirement(f"torch=={minor}.*")
    assert policy.built_for(compiled=True) == (str(required), "")
    assert policy.built_for(compiled=False) == ("torch>=2.11", "")
    assert required.specifier.contains(torch, prereleases=True)
    monkeypatch.setenv("PYGLOW_WHEEL_LABEL", "1")
    assert policy.built_for(compiled=True)[1] == f"+cputorch{minor}"
    assert policy.built_for(compiled=False)[1] == ""
    fake_nvcc(tmp_path, "12.8")
    assert policy.built_for(compiled=True)[1] == f"+cu128torch{minor}"


def test_metadata_without_torch_asks_for_any(policy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An isolated build asks for metadata before it is told that it cannot compile."""

    def missing(name: str) -> str:
        raise policy.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(policy.importlib.metadata, "version", missing)
    assert policy.built_for(compiled=True) == ("torch>=2.11", "")


def test_the_version_is_that_of_the_package(policy: ModuleType) -> None:
    assert policy.source_version() == pyglow_fast.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == pyglow_fast.__version__


def test_every_requirement_has_a_floor_that_ci_installs() -> None:
    done = subprocess.run([sys.executable, ".ci/lowest.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    lowest = dict(line.split("==") for line in done.stdout.split())
    assert lowest["torch"] == "2.11"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    asked = [Requirement(text) for text in (*extras["train"], *extras["web"]) if not text.startswith("pyglow-fast")]
    assert {"torch", "numpy", "safetensors", *(requirement.name for requirement in asked)} == lowest.keys()
    assert all(requirement.specifier.contains(lowest[requirement.name]) for requirement in asked)


USE = """
import torch, pyglow_fast
model = pyglow_fast.Glow(image_shape=(3, 8, 8), n_levels=2, n_steps=1, hidden=4)
print(pyglow_fast.__file__, bool(model.log_prob(torch.rand(2, 3, 8, 8) - 0.5).isfinite().all()))
"""


@pytest.mark.full
def test_a_wheel_of_the_source_distribution_works(tmp_path: Path) -> None:
    """The sources have all that is compiled; the wheel, here without kernels, works where it is installed."""
    environment = {**os.environ, "PYGLOW_CUDA": "0", "PYGLOW_NO_EXTENSION": "1", "PIP_NO_INDEX": "1"}
    environment.pop("PYTHONPATH", None)

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    run("-m", "build", "--no-isolation", "--outdir", "dist", str(ROOT))
    (sources,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    name = f"pyglow_fast-{pyglow_fast.__version__}"
    assert sources.name == f"{name}.tar.gz"
    assert wheel.name.startswith(f"{name}-py3-none")
    with tarfile.open(sources) as archive:
        packed = {member.removeprefix(f"{name}/") for member in archive.getnames()}
    needed = [ROOT / file for file in ("setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE")]
    needed += [path for folder in ("csrc", "cmake", "tools") for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in needed} <= packed
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", "installed", str(wheel))
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    assert run("-c", USE).split() == [str(tmp_path / "installed" / "pyglow_fast" / "__init__.py"), "True"]
