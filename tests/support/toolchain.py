"""Builds that tests make: of the CUDA sources for the CPU, and of the compiled module beside the installed one."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from support import ROOT

EMULATION = ROOT / "tests" / "emulation"
CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
JOBS = 2
KEPT = ROOT / "build" / "emulation"

FLAGS = [
    *("-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-fPIC"),
    *("-DPYGLOW_EMULATE_CUDA", f"-I{EMULATION / 'include'}", f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"),
]


def compiler() -> str:
    """The host's C++ compiler; the test is skipped where there is none."""
    found = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++")
    if found is None:
        pytest.skip("needs a C++ compiler: install g++ or set CXX")
    return found


def build(target: Path, sources: list[Path], *flags: str) -> Path:
    """Compile the sources (.cu ones as C++) with the flags, two at a time, and link them to ``target``.

    Objects are kept in build/emulation under the target's name, with a digest of the compiler, its flags and all that
    the source includes, and used again while that is the same.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulator changes stacks by assembly of x86-64 Linux")
    command = compiler()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    KEPT.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        arguments = [command, *FLAGS, *flags, "-x", "c++", str(source)]
        text = _run([*arguments, "-E"])
        digest = hashlib.sha256("\0".join([version, *arguments, text]).encode()).hexdigest()[:24]
        stem = f"{target.name}.{source.stem}"
        result = KEPT / f"{stem}.{digest}.o"
        if not result.exists():
            new = target.parent / result.name
            _run([*arguments, "-c", "-o", str(new)])
            for former in KEPT.glob(f"{stem}.*.o"):
                former.unlink(missing_ok=True)
            shutil.move(new, result)
        return result

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compile_one, sources))
    _run([command, *flags, *map(str, objects), "-o", str(target)])
    return target


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}{result.stderr}"
    return result.stdout


def supports(flag: str, folder: Path) -> bool:
    """Whether programs built with a sanitizer flag run here: its library may be missing, or the system forbid it."""
    source = folder / f"probe{re.sub(r'[^a-z]', '_', flag)}.cpp"
    source.write_text("int main() { return 0; }\n", encoding="utf-8")
    program = source.with_suffix("")
    built = subprocess.run([compiler(), flag, str(source), "-o", str(program)], capture_output=True, check=False)
    return built.returncode == 0 and execute(program).returncode == 0


def loaded_first(*libraries: str) -> str:
    """What LD_PRELOAD is for a program without sanitizers that loads a library with them; else the test is skipped."""
    names = (*libraries, "libstdc++.so.6")
    found = [_run([compiler(), f"-print-file-name={name}"]).strip() for name in names]
    if not all(os.path.isabs(path) for path in found):
        pytest.skip("needs GCC and its sanitizers' libraries")
    return " ".join(found)


def execute(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the tests to its end.

    Without address space randomisation where that can be had: ThreadSanitizer does not find its memory free otherwise.
    """
    setarch = shutil.which("setarch")
    prefix = [setarch, os.uname().machine, "-R"] if setarch else []
    # A stack for every variable whose address is taken is what would take AddressSanitizer's time.
    address = "detect_leaks=0:detect_stack_use_after_return=0"
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": address}
    command = [*prefix, str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if prefix and result.returncode != 0 and "setarch" in result.stderr:  # not permitted here
        command = command[len(prefix) :]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return result


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
    _run([program, "-S", str(source), "-B", str(folder), "-GNinja", *defines])
    _run([program, "--build", str(folder), "--parallel", str(JOBS), *wanted])


def package(folder: Path, modules: Iterable[Path]) -> Path:
    """A folder to import pyglow_fast from, whose compiled modules are these."""
    made = folder / "pyglow_fast"
    made.mkdir()
    sources = [path for path in (ROOT / "pyglow_fast").iterdir() if path.suffix != ".so"]
    for source in (*sources, *modules):
        (made / source.name).symlink_to(source)
    return folder
