"""The package with CPU kernels that are compiled for aarch64 and run by an emulator of that processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import ROOT, native_builds
from support.toolchain import KEPT

MUST = "PYGLOW_AARCH64"  # "must": what is missing fails a test instead of skipping it
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
SOURCE = ROOT / "tests" / "aarch64"
FOLDER = KEPT.parent / "aarch64"


def require() -> None:
    """Skips the test unless cross compiler and emulator are there; with PYGLOW_AARCH64=must it fails instead."""
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        said = (
            f"the kernels of aarch64 need {' and '.join(missing)} (on Debian: apt-get install "
            "g++-aarch64-linux-gnu qemu-user)"
        )
        if os.environ.get(MUST) == "must":
            pytest.fail(f"{said}, and {MUST}=must says that they run", pytrace=False)
        pytest.skip(said)
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the kernels of aarch64 are asked for from Linux on x86-64; on aarch64 all tests run them")


def kernels() -> Path:
    """The program of the kernels, compiled by the project's own CMakeLists.txt. Half a minute the first time."""
    folder = FOLDER / "kernels"
    native_builds.cmake(
        SOURCE,
        folder,
        "kernels",
        CMAKE_SYSTEM_NAME="Linux",
        CMAKE_SYSTEM_PROCESSOR="aarch64",
        CMAKE_CXX_COMPILER=COMPILER,
        Python_INCLUDE_DIR=sysconfig.get_paths()["include"],  # of which the kernels use nothing
    )
    return folder / "kernels"


def package(folder: Path) -> Path:
    """A folder to import the package from, whose bindings ask the program of :func:`kernels` for every kernel."""
    left_out = {f"PYGLOW_COMPILER_HAS_{name}": 0 for name in ("avx2", "avx512", "avx512_bf16", "amx")}
    native_builds.cmake(SOURCE, FOLDER / "module", "_C", **left_out)
    return native_builds.package(folder, (FOLDER / "module" / "package").glob("_C*.so"))


def emulated(program: Path) -> str:
    """The command line that runs a program of aarch64 here."""
    return f"{EMULATOR} {program}"


def run(package: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with that package, whose kernels ``command`` runs.

    Its module is loaded as Python starts, before anything makes a tensor: all of them must lie in its memory.
    """
    first = package / "first"
    first.mkdir(exist_ok=True)
    start = "from pyglow_fast import _backend\n_backend.require()\n"
    (first / "sitecustomize.py").write_text(start, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(first), str(package), str(ROOT / "tests")]),
        "PYGLOW_CPU": "portable",  # by which tests know that others run the rest of their draws
        "PYGLOW_KERNELS_COMMAND": command,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=ROOT / "tests"
    )
