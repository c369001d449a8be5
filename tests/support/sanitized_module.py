"""The package with a module that is compiled for AddressSanitizer and UndefinedBehaviorSanitizer, and how to run it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import ROOT
from support.toolchain import JOBS, KEPT, compiler

FOLDER = KEPT.parent / "sanitized"
FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so.6")  # that a python without them must load first
LEFT_OUT = ("avx2", "avx512_bf16", "amx")  # kernels that are those of the other sets with other vectors
OPTIONS = {
    # GCC's frames on its fake stack are less aligned than the vectors of AVX-512 that lie in them.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def _libraries() -> str:
    command = [compiler(), "-print-file-name="]
    found = [
        subprocess.run([command[0], command[1] + name], capture_output=True, text=True, check=False).stdout.strip()
        for name in LIBRARIES
    ]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("needs GCC and its sanitizers' libraries")
    return " ".join(found)


def package(folder: Path) -> Path:
    """A folder to import the package from. What was compiled is kept in build/sanitized: minutes the first time."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": FLAGS,
        "CMAKE_NM": "",  # the sanitizers' own symbols are not those that the build checks for
        "Python_EXECUTABLE": sys.executable,
        "PYGLOW_VERSION": "0",
        "PYGLOW_TORCH_DIR": Path(torch.__file__).parent,
        "PYGLOW_TORCH_VERSION": torch.__version__,
        "PYGLOW_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        "PYGLOW_NVCC": "",
        **{f"PYGLOW_COMPILER_HAS_{name}": 0 for name in LEFT_OUT},
    }
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(FOLDER), "-GNinja", *(f"-D{key}={value}" for key, value in options.items())],
        [cmake, "--build", str(FOLDER), "--parallel", str(JOBS)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    modules = [*FOLDER.glob("_C*.so")]
    assert all(b"__asan_init" in module.read_bytes() for module in modules)
    made = folder / "pyglow_fast"
    made.mkdir()
    for source in (*(ROOT / "pyglow_fast").iterdir(), *modules):
        if source.parent == FOLDER or source.suffix != ".so":
            (made / source.name).symlink_to(source)
    return folder


def run(package: Path, instruction_set: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with that package and these CPU kernels."""
    paths = os.pathsep.join([str(package), str(ROOT / "tests")])
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": paths, "PYGLOW_CPU": instruction_set}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "LD_PRELOAD": _libraries(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "tests",
    )
