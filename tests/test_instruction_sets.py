"""The kernels of every instruction set that runs here pass the same tests, not only those of the best one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyglow_fast import _backend

pytestmark = pytest.mark.skipif(_backend.extension() is None, reason=f"no extension: {_backend.reason()}")
TESTS = Path(__file__).parent
FILES = ("ops", "ops_accuracy", "fused_ops", "gather_ops", "elementary", "coupling_net_op", "net_chain_op")
# These differ in the nets in bfloat16 alone.
FAMILY = ("avx512", "avx512_bf16", "amx")
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


@pytest.mark.parametrize("instruction_set", _others())
def test_kernels_of(instruction_set: str, request: pytest.FixtureRequest) -> None:
    found = _run(instruction_set, "-c", "from pyglow_fast import _backend; print(_backend.require().instruction_set())")
    if found.returncode != 0:
        pytest.skip(f"this processor has no {instruction_set}")
    assert found.stdout.strip() == instruction_set
    related = {instruction_set, _backend.require().instruction_set()} <= set(FAMILY)
    files = [str(TESTS / f"test_{name}.py") for name in (FILES[-1:] if related else FILES)]
    kernels = " and ".join((*(("half",) if related else ()), *(f"not {name}" for name in ELSEWHERE)))
    cases = ["--full"] if request.config.getoption("--full") else []
    arguments = ["-q", "-x", "-p", "no:cacheprovider", *cases, "-k", kernels]
    result = _run(instruction_set, "-m", "pytest", *arguments, *files)
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_unknown_instruction_set_is_refused() -> None:
    result = _run("sse9", "-c", "from pyglow_fast import _backend; _backend.require().instruction_set()")
    assert result.returncode != 0
    assert "PYGLOW_CPU: expected one of" in result.stderr
    assert "found sse9" in result.stderr
