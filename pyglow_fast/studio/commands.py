"""Makes picture files that hold the command that repeats them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from pyglow_fast.studio.opened import OpenRun, Picked
from pyglow_fast.studio.words import File
from pyglow_fast.train.figures import png_bytes

COMMAND = "Command"  # the name of the text in a PNG


class Made(NamedTuple):
    """A file that was made, as bytes, and the command that makes the same bytes again.

    Args:
        data: the bytes of the file.
        command: the command without the name of the file.
        suffix: what the file's name ends in.
        option: the option of the command that takes the file's name.
        taken: names of files, in small letters, that the command would not write; see :func:`taken_names`.

    Examples:
        >>> from pyglow_fast.studio import Made
        >>> made = Made(b"a picture", "pyglow-fast sample runs/tiny --n 4")
        >>> made.whole_command("my samples.png")
        "pyglow-fast sample runs/tiny --n 4 --out 'my samples.png'"
        >>> again = Made(b"a picture", "pyglow-fast edit runs/tiny edit.png", taken=frozenset({"edit.png"}))
        >>> again.out_words("edit.png")  # a command does not write over what it reads
        '--out edit-2.png'
    """

    data: bytes
    command: str
    suffix: str = ".png"
    option: str = "--out"
    taken: frozenset[str] = frozenset()

    def file_name(self, name: str) -> str:
        """Choose the name of the file: ``name``, or where that is taken the same with a number before its ending."""
        return free_name(name, self.taken)

    def out_words(self, name: str) -> str:
        """Write the option that names the file, quoted for a shell: ``--out``, and :meth:`file_name`."""
        return f"{self.option} {shlex.quote(path_word(self.file_name(name)))}"

    def whole_command(self, name: str) -> str:
        """The command with ``--out``, to be copied: it writes the file ``name``, or one whose name is not taken."""
        return f"{self.command} {self.out_words(name)}"


def command_line(opened: OpenRun, name: str, words: Sequence[str]) -> str:
    """Join ``pyglow-fast NAME RUN ...``, quoted for a shell."""
    of_run = ["--best"] if opened.best else []
    of_run += ["--device", opened.device] if opened.device != "auto" else []
    return shlex.join(["pyglow-fast", name, path_word(opened.name), *words, *of_run])


def path_word(name: str) -> str:
    """Write a path as a word of a command line that is never taken for an option."""
    return f"./{name}" if name.startswith("-") else name


def free_name(name: str, taken: frozenset[str]) -> str:
    """Choose the name of a file: ``name``, or where that is taken the same with a number before its ending."""
    stem, ending = os.path.splitext(name)
    number, free = 1, name
    while free.lower() in taken:
        number += 1
        free = f"{stem}-{number}{ending}"
    return free


def taken_names(opened: OpenRun, images: Iterable[Picked] = ()) -> frozenset[str]:
    """Find the names of files, in small letters, that a command does not write in the folder where it is run.

    These are the files that it reads, and those that the run keeps if that folder is the run's own.
    """
    read = {os.path.normpath(picked.image.path) for picked in images if isinstance(picked.image, File)}
    here = opened.folder.path.resolve() == Path.cwd()
    return frozenset(name.lower() for name in (*read, *(path.name for path in opened.folder.kept if here)))


def made_png(picture: Tensor, command: str, taken: frozenset[str] = frozenset()) -> Made:
    """Encode a picture, uint8 (3, H, W), as a PNG that holds its command."""
    return Made(png_bytes(picture, {COMMAND: command}), command, taken=taken)
