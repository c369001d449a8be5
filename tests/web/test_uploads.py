"""Uploaded files become a name and bytes, and leave the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, web

web.require("gradio")

import gradio as gr  # noqa: E402
from gradio.data_classes import FileData, ImageData, ListFiles  # noqa: E402

from pyglow_fast.web.uploads import (  # noqa: E402
    LINGER,
    LONGEST_NAME,
    MOST_FILES,
    Upload,
    UploadedFiles,
    UploadedImage,
    clean_name,
    sweep,
    take,
)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("cat.png", "cat.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\cat.png", "cat.png"),
        ("a\x00b\n\x1b[31m.png", "ab[31m.png"),
        ("\u202egnp.exe", "gnp.exe"),
        ("dir/", "dir"),
        ("größe 1.png", "größe 1.png"),
        ("..", "upload"),
        ("", "upload"),
        (None, "upload"),
        (" ", "upload"),
        (" a .png", " a .png"),
        ("x" * 250 + ".jpeg", "x" * 250 + ".jpeg"),
        ("x" * 400 + ".jpeg", "x" * (LONGEST_NAME - 5) + ".jpeg"),
        ("." + "x" * 400, "." + "x" * (LONGEST_NAME - 1)),
    ],
)
def test_a_name_is_its_last_part_in_characters_that_print(name: str | None, clean: str) -> None:
    assert clean_name(name) == clean


def stored(cache: Path, data: bytes = b"not an image") -> Path:
    path = cache / "hash" / "cat.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def test_a_file_is_read_once(tmp_path: Path) -> None:
    path = stored(tmp_path)
    assert take(FileData(path=str(path), orig_name="a/cat.png"), str(tmp_path), linger=0) == Upload(
        "cat.png", b"not an image"
    )
    web.wait_for(path.parent.exists, False)
    with pytest.raises(gr.Error, match="choose the file again"):
        take(FileData(path=str(path), orig_name="cat.png"), str(tmp_path))


def test_a_file_that_came_again_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same picture has the same name; what forgets the first must leave the second."""
    later: list[Callable[[], None]] = []

    class Timer:
        """One that waits until the test calls what it was given."""

        def __init__(self, seconds: float, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            assert seconds == LINGER
            later.append(lambda: call(*arguments))

        def start(self) -> None: ...

    monkeypatch.setattr("pyglow_fast.web.uploads.threading.Timer", Timer)
    path = stored(tmp_path)
    take(FileData(path=str(path)), str(tmp_path))
    other = tmp_path / "new"
    other.write_bytes(b"again")
    os.replace(other, path)
    later[0]()
    assert take(FileData(path=str(path)), str(tmp_path)).data == b"again"
    later[1]()
    assert not path.parent.exists()


@pytest.mark.parametrize("where", ["beside", "link", "folder", "url", "data"])
def test_nothing_but_a_file_of_the_cache_is_read(where: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    outside = tmp_path / "secret"
    outside.write_bytes(b"secret")
    (cache / "link").symlink_to(outside)
    paths = {
        "beside": str(cache / ".." / "secret"),
        "link": str(cache / "link"),
        "folder": str(cache),
        "url": "http://127.0.0.1:1/a.png",
        "data": "data:image/png;base64,AAAA",
    }
    with pytest.raises(gr.Error, match="choose the file again"):
        take(FileData(path=paths[where], orig_name="a.png"), str(cache))
    assert outside.read_bytes() == b"secret"


def test_the_components_hand_bytes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what is no image; a data url beside the path is not looked at."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    path = str(stored(tmp_path))
    image, files = UploadedImage(), UploadedFiles(file_count="multiple")
    expected = Upload("cat.png", b"not an image")
    assert image.preprocess(ImageData(path=path, orig_name="cat.png", url="data:image/png;base64,AAAA")) == expected
    assert image.preprocess(None) is None
    assert files.preprocess(ListFiles(root=[FileData(path=path, orig_name="cat.png")] * 2)) == [expected, expected]
    assert files.preprocess(FileData(path=path, orig_name="cat.png")) == [expected]
    assert files.preprocess(None) == []
    assert (image.get_block_name(), files.get_block_name()) == ("image", "file")


def test_too_many_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file that is named often enough would fill the memory."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    one = FileData(path=str(stored(tmp_path)), orig_name="cat.png")
    files = UploadedFiles(file_count="multiple")
    assert len(files.preprocess(ListFiles(root=[one] * MOST_FILES))) == MOST_FILES
    monkeypatch.setattr("pyglow_fast.web.uploads.take", lambda *args: pytest.fail("read"))
    with pytest.raises(gr.Error, match="files: expected at most 64 at once, found 65"):
        files.preprocess(ListFiles(root=[one] * 65))


def test_too_many_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the limit is not read."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr("pyglow_fast.web.uploads.MOST_BYTES", 2 * 2**20)
    one = FileData(path=str(stored(tmp_path, bytes(2**20))), orig_name="cat.png")
    files = UploadedFiles(file_count="multiple")
    assert len(files.preprocess(ListFiles(root=[one] * 2))) == 2
    read: list[str] = []

    def counted(*arguments: Any) -> Upload:
        read.append("")
        return take(*arguments)

    monkeypatch.setattr("pyglow_fast.web.uploads.take", counted)
    with pytest.raises(gr.Error, match="files: expected at most 2 MB at once, found more"):
        files.preprocess(ListFiles(root=[one] * 9))
    assert len(read) == 3


def test_what_was_broken_off_is_swept_away(tmp_path: Path) -> None:
    """Not what is still being written, nor what arrived as a whole, nor what a link leads to."""
    outside = tmp_path / "outside"
    outside.touch()
    folder = tmp_path / "cache"
    (folder / "hash").mkdir(parents=True)
    for name in ("tmpold", "tmpnew", "hash/whole.png"):
        (folder / name).write_bytes(b"x")
    (folder / "link").symlink_to(outside)
    for path in (folder / "tmpold", folder / "hash" / "whole.png", outside):
        os.utime(path, (1000, 1000))
    os.utime(folder / "tmpnew", (2000, 2000))
    sweep(folder, 1500)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert left == {"tmpnew", "hash", "hash/whole.png", "link"}
    assert outside.exists()


def test_no_stub_is_written_beside_the_components() -> None:
    """Gradio writes a .pyi beside the source of a component's class."""
    assert list((ROOT / "pyglow_fast" / "web").glob("*.pyi")) == []
