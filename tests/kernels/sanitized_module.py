"""The package with a module that is compiled for AddressSanitizer and UndefinedBehaviorSanitizer, and how to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT, native_builds
from support.toolchain import KEPT, loaded_first

FOLDER = KEPT.parent / "sanitized"
FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
LEFT_OUT = ("avx2", "avx512", "avx512_bf16", "amx")  # the same kernels with other vectors
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}


def package(folder: Path) -> Path:
    """A folder to import the package from. What was compiled is kept in build/sanitized: minutes the first time."""
    left_out = {f"PYGLOW_COMPILER_HAS_{name}": 0 for name in LEFT_OUT}
    # The sanitizers' own symbols are not those that the build checks for by nm.
    options = {"CMAKE_CXX_FLAGS": FLAGS, "CMAKE_NM": "", "PYGLOW_UNOPTIMISED": "pyglow_cpu_portable"}
    native_builds.cmake(ROOT, FOLDER, CMAKE_BUILD_TYPE="None", **options, **left_out)
    modules = [*FOLDER.glob("_C*.so")]
    assert all(b"__asan_init" in module.read_bytes() for module in modules)
    return native_builds.package(folder, modules)


def run(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` with that package."""
    path = os.pathsep.join([str(package), str(ROOT / "tests")])
    preload = loaded_first("libasan.so", "libubsan.so")
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **OPTIONS, "PYTHONPATH": path, "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT / "tests",
    )
