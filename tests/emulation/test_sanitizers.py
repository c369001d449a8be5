"""The kernels under AddressSanitizer and ThreadSanitizer, and the proof that these and the emulator find faults."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from emulation.emulator import EMULATED, GIVEN
from support.toolchain import EMULATION, build, execute, loaded_first, supports

# ThreadSanitizer keeps the last few accesses of each address only, and has 8128 slots for threads: small blocks, and
# full ones, which are cut otherwise, of some grids.
BLOCKS_OF = "-DPYGLOW_BLOCK_THREADS={}"
FEW_BLOCKS = "-DPYGLOW_MAX_BLOCKS=2"  # so that the blocks of small grids loop
ASAN, TSAN = ["-fsanitize=address,alignment", "-DEMU_ASAN"], ["-fsanitize=thread", "-DEMU_TSAN"]
SANITIZERS = {
    # -g1: reports name lines. Without optimisation they compile thrice as fast, and run fast enough.
    "address": ["-O0", "-g1", *ASAN, "-fno-sanitize-recover=alignment", FEW_BLOCKS],
    "thread": ["-O0", "-g1", *TSAN, BLOCKS_OF.format(64), FEW_BLOCKS],
    "thread256": ["-O0", "-g1", *TSAN, BLOCKS_OF.format(256), FEW_BLOCKS],
}


def require(flags: list[str], folder: Path) -> None:
    chosen = next(flag for flag in flags if flag.startswith("-fsanitize="))
    if not supports(chosen, folder):
        pytest.skip(f"programs built with {chosen} do not run here")


@pytest.mark.full
@pytest.mark.parametrize("name", SANITIZERS)
def test_kernels_are_clean(name: str, tmp_path: Path) -> None:
    """The sanitizers find nothing in small grids, with a few of the scale maps, nor in folded maps.

    In full blocks ThreadSanitizer has those of 37 and 76 channels, whose sums are cut as in no small block.
    """
    require(SANITIZERS[name], tmp_path)
    library = build(tmp_path / f"lib{name}.so", EMULATED, *SANITIZERS[name], "-DPYGLOW_FEW_MAPS", "-shared")
    # 300 channels are more than ThreadSanitizer has slots for; 70 are more than a small block has threads.
    grids = "small_grids[1- and (37 or 76)" if name == "thread256" else "(small_grids or folded) and not 300"
    chosen = ("--full", "-k", grids, str(EMULATION / "test_emulator.py"))
    command = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen)
    variables = {GIVEN: library, "LD_PRELOAD": loaded_first(f"lib{name[0]}san.so"), "OMP_NUM_THREADS": 1}
    result = execute(Path("/usr/bin/env"), *(f"{key}={value}" for key, value in variables.items()), *command)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[:4000]
    assert " passed" in result.stdout


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles seeded.cu as it is or with a sanitizer, when it is asked for. Blocks of "thread32" are a single warp."""
    folder = tmp_path_factory.mktemp("seeded")
    flags = {
        "plain": ["-O1"],
        **SANITIZERS,
        "thread32": ["-O1", "-g1", *TSAN, BLOCKS_OF.format(32)],
    }

    @functools.cache
    def program(variant: str) -> Path:
        if variant != "plain":
            require(flags[variant], folder)
        return build(folder / variant, [EMULATION / "seeded.cu"], *flags[variant])

    return program


def of(bug: str, variant: str, message: str) -> object:
    """A case; compiling with a sanitizer takes seconds."""
    return pytest.param(bug, variant, message, marks=pytest.mark.full if variant != "plain" else ())


@pytest.mark.parametrize(
    ("bug", "variant", "message"),
    [
        of("none", "plain", "2048 of 2048"),
        of("none", "address", "2048 of 2048"),
        of("none", "thread", "2048 of 2048"),
        of("none", "thread32", "1024 of 1024"),
        of("none", "thread256", "8192 of 8192"),
        of("out_of_bounds", "address", "heap-buffer-overflow"),
        of("misaligned", "plain", "a vector is not aligned"),
        of("misaligned_pair", "address", "which requires 8 byte alignment"),
        of("no_barrier", "plain", "nan of 2048"),  # unwritten shared memory is NaN
        of("no_barrier", "thread", "data race"),
        of("no_full_barrier", "thread256", "data race"),
        of("no_wait", "plain", "a thread ended without waiting for its copies"),
        of("no_second_barrier", "thread", "data race"),
        of("divergent_barrier", "plain", "the threads of a block wait at different __syncthreads"),
        of("early_return", "plain", "__syncthreads reached by 32 of 64 threads"),
        of("absent_lanes", "plain", "a warp operation waits for lanes that never come"),
        of("shared_overrun", "plain", "shared array: index 2 of 2"),
        of("array_overrun", "plain", "dynamic shared memory beside an array was written"),
        of("array_overrun", "address", "use-after-poison"),
        of("no_warp_reduction", "plain", "64 of 2048"),
        of("no_block_reduction", "thread32", "data race"),
    ],
)
def test_a_seeded_bug_is_found(seeded: Callable[[str], Path], bug: str, variant: str, message: str) -> None:
    """Without a bug the sum is right."""
    result = execute(seeded(variant), bug)
    assert message in result.stdout + result.stderr
    if bug == "none":
        assert result.returncode == 0, result.stderr
    elif variant != "plain":
        assert result.returncode != 0
        assert "seeded.cu" in result.stderr, "the report names no line of the kernel"
