"""Every command and every piece of Python in the guided tour runs, in order, and the pictures are what they write.

What docs/page.md shows of the command line follows it, with the same runs.
"""

from __future__ import annotations

import importlib.metadata
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support import ROOT
from support.figures import leave_undrawn
from support.pages import Block, blocks, page, shell_commands
from support.tiny_data import fill_cache

from pyglow_fast.cli import main

leave_undrawn()

TOUR, PAGE = "docs/tour.md", "docs/page.md"
TEXT, PAGE_TEXT = page(TOUR), page(PAGE)
BLOCKS = [
    (name, block)
    for name, text in (("tour", TEXT), ("page", PAGE_TEXT))
    for block in blocks(text)
    if block.language in ("sh", "python")
]
COMMANDS = [words for _, block in BLOCKS if block.language == "sh" for words in shell_commands(block.code)]
PICTURES = re.findall(r"!\[[^]]+\]\((pictures/.*?)\)", TEXT)

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
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


# One case a block, which all run in the order of the page: a block may need what those before it have made.
@pytest.mark.parametrize("block", [pytest.param(block, id=f"{name}-line{block.line}") for name, block in BLOCKS])
def test_block(block: Block, place: Path, names: dict[str, object]) -> None:
    if block.language == "python":
        exec(block.code, names)
        return
    for words in shell_commands(block.code):
        run(brief(words))


def test_only_this_packages_commands_are_shown() -> None:
    with pytest.raises(AssertionError, match="only this package's commands"):
        run(["rm", "runs"])


def test_commands_outside_of_shell_blocks_are_none() -> None:
    for block in (*blocks(TEXT), *blocks(PAGE_TEXT)):
        if block.language not in ("sh", "python"):
            assert "pyglow-fast " not in block.code.replace("usage: pyglow-fast ", "")
    assert not re.findall(r"^(?: {4}|\t)\S", re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE), re.M)


def test_pictures_are_made_by_the_commands(place: Path) -> None:
    outs = [out for out in map(out_of, COMMANDS) if out is not None]
    made = {out.name for out in outs if out.suffix == ".png"}
    made |= {f"{out.name}-{file.name}" for out in outs if not out.suffix for file in (place / out).glob("*.png")}
    assert PICTURES
    assert sorted({Path(name).name for name in PICTURES} - made) == []
    kept = {path.name: path for path in (ROOT / "docs" / "pictures").iterdir()}
    assert sorted(kept) == sorted(Path(name).name for name in PICTURES)
    for path in kept.values():
        assert path.stat().st_size < 200_000, path
        with Image.open(path) as picture:
            picture.verify()


def test_screenshots_are_there() -> None:
    """Those of tests/web/test_page_screenshots.py that the pages show."""
    shown = {
        name for text in (TEXT, PAGE_TEXT, page("README.md")) for name in re.findall(r"[(/](page/\w+\.png)\)", text)
    }
    assert shown == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs" / "page").iterdir()}
    for name in shown:
        with Image.open(ROOT / "docs" / name) as picture:
            assert picture.width == 1280
            picture.verify()


def test_commands_are_installed_under_their_name() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="pyglow-fast")
    assert entry.load() is main
