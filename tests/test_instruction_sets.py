"""The kernels of every instruction set that runs here pass the same tests, not only those of the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import aarch64

from pyglow_fast import _backend

compiled = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
TESTS = Path(__file__).parent
FILES = (
    "ops",
    "ops_accuracy",
    "fused_ops",
    "gather_ops",
    "checkerboard_ops",
    "elementary",
    "coupling_net_op",
    "net_chain_op",
)
# These differ in the nets in bfloat16 alone.
FAMILY = ("avx512", "avx512_bf16", "amx")
# Hidden channels of nets that an emulator takes minutes for. 300 stay: a sum of several blocks, an image in parts.
WIDE = ("511", "600", "700")
# What is the same for all, being no kernel.
ELSEWHERE = ("opcheck", "compiled", "exported", "bad_input", "bad_backward_input", "bad_descriptions")


def _run(instruction_set: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYGLOW_CPU": instruction_set}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=TESTS.parent)


def _others() -> list[str]:
    """Those compiled in, but for the one the rest of the suite uses."""
    if _backend.extension() is None:
        return []
    current = _backend.require().instruction_set()
    return [name for name in _backend.build_info()["instruction_sets"].split(",") if name != current]


@compiled
@pytest.mark.parametrize("instruction_set", _others())
def test_kernels_of(instruction_set: str, request: pytest.FixtureRequest) -> None:
    found = _run(instruction_set, "-c", "from pyglow_fast import _backend; print(_backend.require().instruction_set())")
    if found.returncode != 0:
        pytest.skip(f"this processor has no {instruction_set}")
    assert found.stdout.strip() == instruction_set
    related = {instruction_set, _backend.require().instruction_set()} <= set(FAMILY)
    cases = ["--full"] if request.config.getoption("--full") else []
    arguments = _pytest(FILES[-1:] if related else FILES, *(("half",) if related else ()))
    _expect_passed(_run(instruction_set, *arguments, *cases))


def _pytest(files: tuple[str, ...], *kernels: str) -> list[str]:
    """Arguments of Python for the tests of kernels in these files."""
    chosen = " and ".join((*kernels, *(f"not {name}" for name in ELSEWHERE)))
    paths = [str(TESTS / f"test_{name}.py") for name in files]
    return ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *paths]


def _expect_passed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def cross_built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package that asks another process for its kernels, and the program of those of aarch64."""
    aarch64.require()
    return aarch64.package(tmp_path_factory.mktemp("aarch64")), aarch64.kernels()


@pytest.mark.full
@pytest.mark.parametrize("name", FILES)
def test_kernels_of_aarch64(cross_built: tuple[Path, Path], name: str) -> None:
    """Compiled by a cross compiler with the options of the build, and run by an emulator of that processor.

    Not on torch's threads: the program shares a loop in two parts by itself.
    """
    package, program = cross_built
    left_out = ["threads", *(WIDE if name == "coupling_net_op" else ())]
    kernels = [f"not {word}" for word in left_out]
    _expect_passed(aarch64.run(package, aarch64.emulated(program), *_pytest((name,), *kernels)))


@pytest.mark.full
def test_drawn_calls_on_aarch64(cross_built: tuple[Path, Path]) -> None:
    """Arguments in odd memory, of odd sizes and with faults: none ends the program, and what is taken is right."""
    package, program = cross_built
    result = aarch64.run(package, aarch64.emulated(program), "-m", "support.fuzzed_ops", "0", "400")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[-2000:]
    assert "400 calls, " in result.stdout


@pytest.mark.full
def test_the_program_of_aarch64_has_the_portable_kernels_alone(cross_built: tuple[Path, Path]) -> None:
    command = aarch64.emulated(cross_built[1]).split()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "portable\n"
    choice = {**os.environ, "PYGLOW_CPU": "avx2"}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=choice)
    assert "expected one of portable on this machine, found avx2" in refused.stderr


@pytest.mark.full
def test_no_kernel_is_left_in_the_package_of_aarch64(cross_built: tuple[Path, Path]) -> None:
    """Where the program ends at once, so does the first op: what passes above was computed by the program."""
    code = "import torch; from pyglow_fast import functional as f; f.log_abs_det(torch.eye(3))"
    result = aarch64.run(cross_built[0], "false", "-c", code)
    assert "RuntimeError: the kernels' process: it ended" in result.stderr


@compiled
def test_unknown_instruction_set_is_refused() -> None:
    result = _run("sse9", "-c", "from pyglow_fast import _backend; _backend.require().instruction_set()")
    assert result.returncode != 0
    assert "PYGLOW_CPU: expected one of" in result.stderr
    assert "found sse9" in result.stderr
