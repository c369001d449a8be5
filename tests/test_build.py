"""The policy of setup.py, the checks of the build, and what is told of wheels; one is compiled with --full alone."""

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from support import ROOT

import pyglow_fast
from pyglow_fast import _backend

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
    assert len((ROOT / "setup.py").read_text(encoding="utf-8").splitlines()) < 170


def project() -> dict[str, Any]:
    """pyproject.toml as it is."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_torch_is_not_a_build_requirement() -> None:
    """An isolated build would otherwise compile against a torch of its own choice."""
    assert not [name for name in project()["build-system"]["requires"] if name.startswith("torch")]


@pytest.mark.parametrize("torch", ["2.11.0", "2.13.1+cu130", "2.14.0a0+git1234"])
def test_compiled_kernels_ask_for_their_torch(
    policy: ModuleType, monkeypatch: pytest.MonkeyPatch, torch: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(policy.importlib.metadata, "version", lambda name: {"torch": torch}[name])
    minor = ".".join(_backend.release(torch))
    required = Requirement(f"torch=={minor}.*")
    assert policy.built_for(compiled=True) == (str(required), "")
    assert policy.built_for(compiled=False) == ("torch>=2.11", "")
    assert required.specifier.contains(torch, prereleases=True)
    assert not required.specifier.contains("2.12.0")
    monkeypatch.setenv("PYGLOW_WHEEL_LABEL", "1")
    assert policy.built_for(compiled=True)[1] == f"+cputorch{minor}"
    assert policy.built_for(compiled=False)[1] == ""
    fake_nvcc(tmp_path, "12.8")
    label = policy.built_for(compiled=True)[1]
    assert label == f"+cu128torch{minor}"
    assert Version(policy.source_version() + label).public == policy.source_version()


def test_metadata_without_torch_asks_for_any(policy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """An isolated build asks for metadata before it is told that it cannot compile."""

    def missing(name: str) -> str:
        raise policy.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(policy.importlib.metadata, "version", missing)
    assert policy.built_for(compiled=True) == ("torch>=2.11", "")


def test_the_version_is_written_once(policy: ModuleType) -> None:
    """In the package; what else tells it must, in a format that cannot ask."""
    version = pyglow_fast.__version__
    assert policy.source_version() == version
    assert str(Version(version)) == version
    assert {"version", "dependencies"} <= set(project()["project"]["dynamic"])
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == version
    assert citation["license"] == project()["project"]["license"]
    other = re.compile(rf"(?<![\d.]){re.escape(version)}(?![\d.])")
    written = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "CMakeLists.txt", *(ROOT / "docs").glob("*.md")]
    found = [path.name for path in written if other.search(path.read_text(encoding="utf-8"))]
    assert not found, "these name the version too"


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_wheels_of_every_python_and_processor(arch: str) -> None:
    """What cibuildwheel makes of its configuration, and that torch's libraries do not go into a wheel."""
    pytest.importorskip("cibuildwheel", reason="needs cibuildwheel")
    command = [
        sys.executable,
        "-m",
        "cibuildwheel",
        "--platform",
        "linux",
        "--archs",
        arch,
        "--print-build-identifiers",
    ]
    result = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"cp3{minor}-manylinux_{arch}" for minor in (11, 12, 13, 14)]


MANYLINUX = {f"lib{name}" for name in ("stdc++", "m", "gcc_s", "c", "dl", "pthread", "rt")} | {
    f"ld-linux-{arch}" for arch in ("x86-64", "aarch64")
}


def test_the_module_needs_no_library_but_those_left_to_torch() -> None:
    """Beside those of manylinux, which auditwheel looks at: by its patterns the others are left out of a wheel."""
    module, readelf = _backend.extension(), shutil.which("readelf")
    if module is None or readelf is None:
        pytest.skip(_backend.reason() or "needs readelf")
    dynamic = subprocess.run([readelf, "-d", str(module.__file__)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    repair = project()["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    patterns = re.findall(r"--exclude '(.+?)'", repair)
    of_torch = {path.name for path in (Path(torch.__file__).parent / "lib").iterdir()}
    left = [name for name in needed if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    assert not of_torch & set(left)
    assert len(left) < len(needed)
    assert {name.split(".")[0] for name in left} <= MANYLINUX


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_actions_are_pinned_by_commit(path: Path) -> None:
    steps = [step for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used), used


def test_the_workflow_runs_the_tests_and_builds_wheels_and_documentation() -> None:
    """By what a developer runs; images, and the version of cibuildwheel, are those of pyproject.toml."""
    jobs = yaml.safe_load(WORKFLOWS[0].read_text(encoding="utf-8"))["jobs"]
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in jobs.items()}
    assert commands["test"][-1] == ".ci/run"
    assert commands["docs"] == ["make docs"]
    (cibuildwheel,) = (name for name in project()["project"]["optional-dependencies"]["dev"] if "cibuild" in name)
    assert commands["wheels"] == [f"pipx run {cibuildwheel} --output-dir dist"]
    matrix = jobs["wheels"]["strategy"]["matrix"]
    settings = project()["tool"]["cibuildwheel"]
    assert [f"{name}-*" for name in matrix["python"]] == settings["build"]
    images = {settings["linux"][f"manylinux-{arch}-image"] for arch in matrix["arch"]}
    assert images == {"manylinux_2_28"} == {entry["image"] for entry in matrix["include"] if entry["kernels"] == "cpu"}
    assert set(jobs["wheels"]["env"]) - {"CIBW_BUILD"} >= {"PYGLOW_CUDA", "TORCH"}
    passed = set(settings["linux"]["environment-pass"])
    assert {name for name in jobs["wheels"]["env"] if not name.startswith("CIBW_")} <= passed


@pytest.mark.full
def test_a_wheel_of_the_source_distribution_works(tmp_path: Path) -> None:
    """It has all that it needs to be compiled; installed elsewhere, the wheel computes what the reference does."""
    environment = {**os.environ, "PYGLOW_CUDA": "0", "PYGLOW_NO_EXTENSION": "0", "PYGLOW_WHEEL_LABEL": "1"}
    environment = {**environment, "MAX_JOBS": "2", "PIP_NO_INDEX": "1"}
    environment.pop("PYTHONPATH", None)

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    run("-m", "build", "--no-isolation", "--outdir", "dist", str(ROOT))
    (sources,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    label = f"cputorch{'.'.join(_backend.release(torch.__version__))}"
    assert sources.name == f"pyglow_fast-{pyglow_fast.__version__}.tar.gz"
    assert wheel.name.startswith(f"pyglow_fast-{pyglow_fast.__version__}+{label}-cp3")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", "installed", str(wheel))
    (metadata,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    assert f"Requires-Dist: torch=={'.'.join(_backend.release(torch.__version__))}.*" in metadata.read_text()
    environment["PYTHONPATH"] = str(tmp_path / "installed")
    version = re.escape(f"{pyglow_fast.__version__}+{label}")
    assert re.search(rf"^  extension +{version}$", run(str(ROOT / ".ci" / "smoke.py")), re.MULTILINE)
