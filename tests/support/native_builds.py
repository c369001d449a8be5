"""Builds of the compiled module beside the installed one: by CMake, and a package with what it made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from support import ROOT
from support.toolchain import JOBS


def cmake(source: Path, folder: Path, *targets: str, **options: object) -> None:
    """Configures ``source`` into ``folder`` with the options that setup.py gives and these, and builds the targets.

    The module's bindings are compiled as quickly.cmake says. ``folder`` is kept between runs, so that only what has
    changed is compiled again. The test is skipped where CMake or Ninja is missing.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if program is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    known = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_PROJECT_pyglow_fast_INCLUDE": Path(__file__).with_name("quickly.cmake"),
        "Python_EXECUTABLE": sys.executable,
        "PYGLOW_VERSION": "0",
        "PYGLOW_TORCH_DIR": Path(torch.__file__).parent,
        "PYGLOW_TORCH_VERSION": torch.__version__,
        "PYGLOW_CXX11_ABI": int(torch.compiled_with_cxx11_abi()),
        "PYGLOW_NVCC": "",
    }
    defines = [f"-D{name}={value}" for name, value in {**known, **options}.items()]
    wanted = ["--target", *targets] if targets else []
    for command in (
        [program, "-S", str(source), "-B", str(folder), "-GNinja", *defines],
        [program, "--build", str(folder), "--parallel", str(JOBS), *wanted],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]


def package(folder: Path, modules: Iterable[Path]) -> Path:
    """A folder to import pyglow_fast from, whose compiled modules are these."""
    made = folder / "pyglow_fast"
    made.mkdir()
    sources = [path for path in (ROOT / "pyglow_fast").iterdir() if path.suffix != ".so"]
    for source in (*sources, *modules):
        (made / source.name).symlink_to(source)
    return folder
