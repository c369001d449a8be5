"""The same tests with other kernels: of every instruction set, of aarch64, under sanitizers, and without an extension.

Each runs the files of this folder once more, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import aarch64, sanitized_module

from pyglow_fast import _backend

HERE = Path(__file__).parent
compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
FILES = ("channel_maps", "couplings", "densities", "nets", "elementary")
RUN = str(HERE.parent / "runs" / "test_run.py")  # of the loops over the kernels
# What is no kernel's, and so the same for all.
ELSEWHERE = ("gradcheck", "functions", "derivatives", "refused", "bad_", "autocast", "explicit", "second", "reference")
# These differ in the nets in bfloat16 alone.
FAMILY = {"avx512", "avx512_bf16", "amx"}
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
SAYS_WHICH = "from pyglow_fast import _backend; print(_backend.require().instruction_set())"


def pytest_of(files: tuple[str, ...], *words: str) -> list[str]:
    """Arguments of Python for the tests of kernels in these files."""
    chosen = " and ".join((*words, *(f"not {word}" for word in ELSEWHERE)))
    paths = [str(HERE / f"test_{name}.py") for name in files]
    return [*PYTEST, "-k", chosen, *paths]


def run_in(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    whole = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], env=whole, capture_output=True, text=True, cwd=HERE.parent.parent)


def expect_passed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


def other_sets() -> list[str]:
    """Those compiled in, but for the one the rest of the suite uses."""
    if _backend.extension() is None:
        return []
    current = _backend.require().instruction_set()
    return [name for name in _backend.build_info()["instruction_sets"].split(",") if name != current]


@compiled
@pytest.mark.full
@pytest.mark.parametrize("instruction_set", other_sets())
def test_kernels_of(instruction_set: str) -> None:
    chosen = {"PYGLOW_CPU": instruction_set}
    found = run_in(chosen, "-c", SAYS_WHICH)
    if found.returncode != 0:
        pytest.skip(f"this processor has no {instruction_set}")
    assert found.stdout.strip() == instruction_set
    if {instruction_set, _backend.require().instruction_set()} <= FAMILY:
        expect_passed(run_in(chosen, *pytest_of(("nets",), "half")))
    else:
        expect_passed(run_in(chosen, *pytest_of(FILES), RUN))


@pytest.mark.full
def test_without_the_extension() -> None:
    """What is promised of the functions holds of the reference, and what needs kernels is skipped by words."""
    files = ("channel_maps", "couplings", "densities", "every_op")
    paths = [str(HERE / f"test_{name}.py") for name in files]
    words = "functions or gradcheck or checkerboards or derivatives or transforms or exported or inverses"
    expect_passed(run_in({"PYGLOW_FORCE_REFERENCE": "1"}, *PYTEST, "-k", words, *paths))


# ---- aarch64 ----


@pytest.fixture(scope="module")
def cross_built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package that asks another process for its kernels, and the program of those of aarch64."""
    aarch64.require()
    return aarch64.package(tmp_path_factory.mktemp("aarch64")), aarch64.kernels()


@pytest.mark.full
def test_kernels_of_aarch64(cross_built: tuple[Path, Path]) -> None:
    """Compiled by a cross compiler with the options of the build, and run by an emulator of that processor.

    Not on torch's threads: the program shares a loop in two parts by itself. In float32, since the emulator takes its
    time; of the nets' cuts, which take it minutes, those in half precision.
    """
    package, program = cross_built
    chosen = ((FILES[:3], "float32"), (FILES[3:], "not (cuts and not half)"))
    for files, words in chosen:
        expect_passed(aarch64.run(package, aarch64.emulated(program), *pytest_of(files, words, "not threads")))


@pytest.mark.full
def test_the_program_of_aarch64_computes(cross_built: tuple[Path, Path]) -> None:
    """It has the portable kernels alone, and where it ends at once, so does the first op: no other kernel is left."""
    package, program = cross_built
    command = aarch64.emulated(program).split()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "portable\n"
    choice = {**os.environ, "PYGLOW_CPU": "avx2"}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=choice)
    assert "expected one of portable on this machine, found avx2" in refused.stderr
    code = "import torch; from pyglow_fast import functional as f; f.log_abs_det(torch.eye(3))"
    assert "RuntimeError: the kernels' process: it ended" in aarch64.run(package, "false", "-c", code).stderr


# ---- Sanitizers ----


@pytest.mark.full
def test_bindings_and_kernels_are_clean(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing, whatever form and memory the tensors have."""
    package = sanitized_module.package(tmp_path)
    memory = [*PYTEST, "-k", "bad_ or beside or beyond or kept", str(HERE / "test_every_op.py")]
    for arguments in (pytest_of(FILES[:3], "float32"), memory, [*PYTEST, RUN]):
        expect_passed(sanitized_module.run(package, *arguments))
