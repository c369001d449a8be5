"""Every command and every piece of Python in the guided tour runs, in order.

What docs/page.md shows of the command line follows it, with the same runs.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.figures import leave_undrawn
from support.pages import Block, blocks, page, shell_commands
from support.tiny_data import fill_cache

from pyglow_fast.cli import main

leave_undrawn()

BLOCKS = [
    (name, block)
    for name in ("tour", "page")
    for block in blocks(page(f"docs/{name}.md"))
    if block.language in ("sh", "python")
]

# What follows each command here, so that the tour takes half a minute and not some hours; all else is as shown.
SMALL_MODEL = "--n-steps 1 --hidden 4 --batch-size 8 --init-images 8 --eval-images 8 --sample-count 4 --device cpu"
BRIEF = {
    "compare": f"--max-steps 2 --permutations invconv --couplings affine {SMALL_MODEL}",
    "convert": "",
    "data": "",
    "depths": "--device cpu",
    "edit": "--device cpu",
    "evaluate": "--device cpu",
    "info": "",
    "interpolate": "--device cpu",
    "levels": "--device cpu",
    "manipulate": "--device cpu",
    "ood": "--device cpu",
    "reconstruct": "--device cpu",
    "sample": "--device cpu",
    "score": "--device cpu",
    "serve": "--device cpu --no-browser",
    "temperatures": "--device cpu",
    "train": f"--max-minutes none --max-steps 2 {SMALL_MODEL}",
    "train --resume": f"--max-minutes none --max-steps 3 {SMALL_MODEL}",
}


def brief(words: list[str]) -> list[str]:
    """The command with what makes it short."""
    command = words[words.index("pyglow_fast" if words[0] == "torchrun" else "pyglow-fast") + 1]
    return [*words, *BRIEF[f"{command} --resume" if "--resume" in words else command].split()]


def out_of(words: list[str]) -> Path | None:
    """The file or folder that a command writes."""
    return Path(words[words.index("--out") + 1]) if "--out" in words else None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that the tour is taken in, with data in miniature."""
    folder = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        fill_cache(folder / "cache", patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def names() -> dict[str, object]:
    """What the tour's Python knows: later pieces go on from earlier ones."""
    return {}


def run(words: list[str]) -> None:
    """Run one command, and see that it ends well and has written what it says."""
    if words[:2] == ["pyglow-fast", "serve"]:
        look_at(words[1:])
    elif words[0] == "torchrun":
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words[1:]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert words[0] == "pyglow-fast", f"only this package's commands can be shown: {words}"
        assert main(words[1:]) == 0
    out = out_of(words)
    assert out is None or out.exists()


def look_at(words: list[str]) -> None:
    """Serve a page, read it, and end it by Ctrl-C."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "pyglow_fast", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            (address,) = re.findall(r"http://\S+", process.stdout.readline())
            with urllib.request.urlopen(address) as answer:
                assert b"pyglow_fast" in answer.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=300) == 0
        finally:
            process.kill()


# One case a block; they run in the order of the page: a block may need what those before it have made.
@pytest.mark.full
@pytest.mark.parametrize("block", [pytest.param(block, id=f"{name}-line{block.line}") for name, block in BLOCKS])
def test_block(block: Block, place: Path, names: dict[str, object]) -> None:
    if block.language == "python":
        exec(block.code, names)
        return
    for words in shell_commands(block.code):
        run(brief(words))
