"""Makes picture files that hold the command that repeats them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyglow_fast.studio.opened import OpenRun
from pyglow_fast.train.figures import png_bytes

COMMAND = "Command"  # the name of the text in a PNG


class Made(NamedTuple):
    """A file that was made, as bytes, and the command that makes the same bytes again.

    Args:
        data: the bytes of the file.
        command: the command without the name of the file.
        suffix: what the file's name ends in.
        option: the option of the command that takes the file's name.

    Examples:
        >>> from pyglow_fast.studio import Made
        >>> made = Made(b"a picture", "pyglow-fast sample runs/tiny --n 4")
        >>> made.whole_command("my samples.png")
        "pyglow-fast sample runs/tiny --n 4 --out 'my samples.png'"
    """

    data: bytes
    command: str
    suffix: str = ".png"
    option: str = "--out"

    def whole_command(self, out: str) -> str:
        """The command with ``--out``, to be copied: it writes the file ``out``."""
        return f"{self.command} {self.option} {shlex.quote(out)}"


def command_line(opened: OpenRun, name: str, words: Sequence[str]) -> str:
    """Join ``pyglow-fast NAME RUN ...``, quoted for a shell."""
    of_run = ["--best"] if opened.best else []
    of_run += ["--device", opened.device] if opened.device != "auto" else []
    return shlex.join(["pyglow-fast", name, run_word(opened.name), *words, *of_run])


def run_word(name: str) -> str:
    """Write the folder of a run as a word of a command line that is never taken for an option."""
    return f"./{name}" if name.startswith("-") else name


def made_png(picture: Tensor, command: str) -> Made:
    """Encode a picture, uint8 (3, H, W), as a PNG that holds its command."""
    return Made(png_bytes(picture, {COMMAND: command}), command)
