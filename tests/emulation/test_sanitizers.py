"""The kernels under AddressSanitizer and ThreadSanitizer, and the proof that these and the emulator find faults."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.toolchain import CUDA_SOURCES, EMULATION, build, execute, supports

# ThreadSanitizer keeps the last few accesses of each address only, and has 8128 slots for threads: small blocks.
SMALL_BLOCKS = "-DPYGLOW_BLOCK_THREADS={}"
FEW_BLOCKS = "-DPYGLOW_MAX_BLOCKS=2"  # so that the blocks of small grids loop
SANITIZERS = {
    # -g1: reports name lines. Without optimisation they compile thrice as fast, and run fast enough.
    "address": ["-O0", "-g1", "-fsanitize=address", FEW_BLOCKS],
    "thread": ["-O0", "-g1", "-fsanitize=thread", SMALL_BLOCKS.format(64), FEW_BLOCKS],
}


def require(name: str, folder: Path) -> None:
    if not supports(f"-fsanitize={name}", folder):
        pytest.skip(f"programs built with -fsanitize={name} do not run here")


@pytest.mark.parametrize("maps", ["few", pytest.param("all", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", SANITIZERS)
def test_kernels_are_clean(name: str, maps: str, tmp_path: Path) -> None:
    """The sanitizers find nothing; with few maps threads run in the order that shows missing barriers, else in both."""
    require(name, tmp_path)
    flags, order = (["-DPYGLOW_FEW_MAPS"], ["3"]) if maps == "few" else ([], [])
    program = build(
        tmp_path / f"{name}_{maps}",
        [*CUDA_SOURCES, *sorted(EMULATION.glob("sanitized*.cpp"))],
        *SANITIZERS[name],
        *flags,
    )
    # A stack for every variable whose address is taken is what takes AddressSanitizer's time here.
    result = execute(program, *order, address_options=f"detect_stack_use_after_return={int(maps == 'all')}")
    assert result.returncode == 0, result.stdout[-1000:] + result.stderr[:4000]
    assert result.stdout == "done\n"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """seeded.cu as it is and with each sanitizer that runs here. The blocks of "thread32" are a single warp."""
    folder = tmp_path_factory.mktemp("seeded")
    variants = {
        "plain": ["-O1"],
        **SANITIZERS,
        "thread32": ["-O1", "-g1", "-fsanitize=thread", SMALL_BLOCKS.format(32)],
    }
    runnable = {name: supports(f"-fsanitize={name}", folder) for name in SANITIZERS}
    return {
        name: build(folder / name, [EMULATION / "seeded.cu"], *flags)
        for name, flags in variants.items()
        if runnable.get(name.removesuffix("32"), True)
    }


@pytest.mark.parametrize("variant", ["plain", "address", "thread", "thread32"])
def test_a_correct_kernel_passes(programs: dict[str, Path], variant: str) -> None:
    if variant not in programs:
        pytest.skip(f"programs built for {variant} do not run here")
    result = execute(programs[variant])
    assert result.returncode == 0, result.stderr
    n_values = 2 * 4 * 4 * (32 if variant == "thread32" else 64)
    assert result.stdout == f"{n_values} of {n_values}\n"


@pytest.mark.parametrize(
    ("bug", "variant", "message"),
    [
        ("out_of_bounds", "address", "heap-buffer-overflow"),
        ("misaligned", "plain", "a vector is not aligned"),
        ("no_barrier", "plain", "nan of 2048"),  # unwritten shared memory is NaN
        ("no_barrier", "thread", "data race"),
        ("no_wait", "plain", "a thread ended without waiting for its copies"),
        ("no_second_barrier", "thread", "data race"),
        ("divergent_barrier", "plain", "the threads of a block wait at different __syncthreads"),
        ("early_return", "plain", "__syncthreads reached by 32 of 64 threads"),
        ("absent_lanes", "plain", "a warp operation waits for lanes that never come"),
        ("shared_overrun", "plain", "shared array: index 2 of 2"),
        ("no_warp_reduction", "plain", "64 of 2048"),
        ("no_block_reduction", "thread32", "data race"),
    ],
)
def test_a_seeded_bug_is_found(programs: dict[str, Path], bug: str, variant: str, message: str) -> None:
    if variant not in programs:
        pytest.skip(f"programs built for {variant} do not run here")
    result = execute(programs[variant], bug)
    assert message in result.stdout + result.stderr
    if variant != "plain":
        assert result.returncode != 0
        assert "seeded.cu" in result.stderr, "the report names no line of the kernel"
