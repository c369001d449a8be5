"""The same tests with other kernels: of every instruction set, of aarch64, under sanitizers, and without an extension.

Each runs the files of this folder once more, in a process of its own.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import ROOT, toolchain
from support.toolchain import KEPT, loaded_first

from pyglow_fast._core import backend

HERE = Path(__file__).parent
compiled = pytest.mark.skipif(backend.extension() is None, reason=f"no extension: {backend.reason()}")
FILES = ("channel_maps", "couplings", "densities", "nets", "elementary")
RUN = str(HERE.parent / "runs" / "test_run.py")  # of the loops over the kernels
# What is no kernel's, and so the same for all.
ELSEWHERE = ("gradcheck", "functions", "derivatives", "refused", "bad_", "autocast", "explicit", "second", "reference")
# These differ in the nets in bfloat16 alone.
FAMILY = {"avx512", "avx512_bf16", "amx"}
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
SAYS_WHICH = "from pyglow_fast._core import backend; print(backend.require().instruction_set())"
# Options of builds with the portable kernels at most.
PORTABLE = {f"PYGLOW_COMPILER_HAS_{name}": 0 for name in ("avx2", "avx512", "avx512_bf16", "amx")}


def pytest_of(files: tuple[str, ...], *words: str) -> list[str]:
    """Arguments of Python for the tests of kernels in these files."""
    chosen = " and ".join((*words, *(f"not {word}" for word in ELSEWHERE)))
    paths = [str(HERE / f"test_{name}.py") for name in files]
    return [*PYTEST, "-k", chosen, *paths]


def run(
    environment: dict[str, str], *arguments: str, package: Path | None = None, start: str = ""
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``; the module of another package is loaded as Python starts, after the lines ``start``.

    So it is before pytest finds this package, and before anything makes a tensor: those for aarch64 lie in its memory.
    """
    whole = {**os.environ, **environment}
    if package is not None:
        start += "from pyglow_fast._core import backend\nbackend.require()\n"
        (package / "sitecustomize.py").write_text(start, encoding="utf-8")
        whole |= {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=whole, capture_output=True, text=True, cwd=ROOT)


def expect_passed(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert " passed" in result.stdout


def other_sets() -> list[str]:
    """Those compiled in, but for the one the rest of the suite uses."""
    if backend.extension() is None:
        return []
    current = backend.require().instruction_set()
    return [name for name in backend.build_info()["instruction_sets"].split(",") if name != current]


@compiled
@pytest.mark.full
@pytest.mark.parametrize("instruction_set", other_sets())
def test_kernels_of(instruction_set: str) -> None:
    chosen = {"PYGLOW_CPU": instruction_set}
    found = run(chosen, "-c", SAYS_WHICH)
    if found.returncode != 0:
        pytest.skip(f"this processor has no {instruction_set}")
    assert found.stdout.strip() == instruction_set
    if {instruction_set, backend.require().instruction_set()} <= FAMILY:
        expect_passed(run(chosen, *pytest_of(("nets",), "half")))
    else:
        expect_passed(run(chosen, *pytest_of(FILES), RUN))


@pytest.mark.full
def test_without_the_extension() -> None:
    """What is promised of the functions holds of the reference, and what needs kernels is skipped by words."""
    files = ("channel_maps", "couplings", "densities", "every_op")
    paths = [str(HERE / f"test_{name}.py") for name in files]
    words = "functions or gradcheck or checkerboards or derivatives or transforms or exported or inverses"
    expect_passed(run({"PYGLOW_FORCE_REFERENCE": "1"}, *PYTEST, "-k", words, *paths))


# ---- aarch64 ----

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
STARTS = """
import os, subprocess
memory = os.memfd_create("tensors", 0)
ends = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0, "pass_fds": [memory]}
kernels = subprocess.Popen([*COMMAND, str(memory)], **ends)
os.environ["PYGLOW_KERNELS"] = f"{memory} {kernels.stdin.fileno()} {kernels.stdout.fileno()}"
"""


@pytest.fixture(scope="module")
def cross_built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The package whose bindings ask another process for every kernel, and the command that runs those of aarch64.

    Both are compiled by the project's own CMakeLists.txt, in half a minute the first time. What is missing skips a
    test, or with PYGLOW_AARCH64=must fails it.
    """
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the kernels of aarch64 are asked for from Linux on x86-64; on aarch64 all tests run them")
    missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
    if missing:
        packages = "on Debian: apt-get install g++-aarch64-linux-gnu qemu-user"
        said = f"the kernels of aarch64 need {' and '.join(missing)} ({packages})"
        (pytest.fail if os.environ.get("PYGLOW_AARCH64") == "must" else pytest.skip)(said)
    source, folder = ROOT / "tests" / "aarch64", KEPT.parent / "aarch64"
    options = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": COMPILER}
    options["Python_INCLUDE_DIR"] = sysconfig.get_paths()["include"]  # of which the kernels use nothing
    toolchain.cmake(source, folder / "kernels", "kernels", **options)
    toolchain.cmake(source, folder / "module", "_C", **PORTABLE)
    modules = (folder / "module" / "package").glob("_C*.so")
    package = toolchain.package(tmp_path_factory.mktemp("aarch64"), modules)
    return package, [EMULATOR, str(folder / "kernels" / "kernels")]


def run_with(command: list[str], package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``, whose kernels that command runs; tests draw less where an instruction set is named."""
    start = STARTS.replace("COMMAND", repr(command))
    return run({"PYGLOW_CPU": "portable"}, *arguments, package=package, start=start)


@pytest.mark.full
def test_kernels_of_aarch64(cross_built: tuple[Path, list[str]]) -> None:
    """Compiled by a cross compiler with the options of the build, and run by an emulator of that processor.

    Not on torch's threads: the program shares a loop in two parts by itself. In float32, since the emulator takes its
    time; of the nets' cuts, which take it minutes, those in half precision.
    """
    package, command = cross_built
    for files, words in ((FILES[:3], "float32"), (FILES[3:], "not (cuts and not half)")):
        expect_passed(run_with(command, package, *pytest_of(files, words, "not threads")))


@pytest.mark.full
def test_the_program_of_aarch64_computes(cross_built: tuple[Path, list[str]]) -> None:
    """It has the portable kernels alone, and where it ends at once, so does the first op: no other kernel is left."""
    package, command = cross_built
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "portable\n"
    choice = {**os.environ, "PYGLOW_CPU": "avx2"}
    refused = subprocess.run(command, capture_output=True, text=True, check=False, env=choice)
    assert "expected one of portable on this machine, found avx2" in refused.stderr
    code = "import torch; from pyglow_fast import functional as f; f.log_abs_det(torch.eye(3))"
    assert "RuntimeError: the kernels' process: it ended" in run_with(["false"], package, "-c", code).stderr


# ---- Sanitizers ----

SANITIZED = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"


@pytest.mark.full
def test_bindings_and_kernels_are_clean(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer find nothing, whatever form and memory the tensors have.

    What is compiled for them is kept in build/sanitized: minutes the first time.
    """
    folder = KEPT.parent / "sanitized"
    # The sanitizers' own symbols are not those that the build checks for by nm.
    options = {"CMAKE_CXX_FLAGS": SANITIZED, "CMAKE_NM": "", "PYGLOW_UNOPTIMISED": "pyglow_cpu_portable"}
    toolchain.cmake(ROOT, folder, CMAKE_BUILD_TYPE="None", **options, **PORTABLE)
    modules = [*folder.glob("_C*.so")]
    assert all(b"__asan_init" in module.read_bytes() for module in modules)
    package = toolchain.package(tmp_path, modules)
    environment = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "LD_PRELOAD": loaded_first("libasan.so", "libubsan.so"),
    }
    memory = [*PYTEST, "-k", "bad_ or beside or beyond or kept", str(HERE / "test_every_op.py")]
    for arguments in (pytest_of(FILES[:3], "float32"), memory, [*PYTEST, RUN]):
        expect_passed(run(environment, *arguments, package=package))
