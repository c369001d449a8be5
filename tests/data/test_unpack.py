"""Archives: what is taken out of them, where to, and what is said of damaged ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest
from support.archives import ar_archive, debian_package, tarball, zip_archive

from pyglow_fast.data.unpack import DamagedArchiveError, unpack

FILES = {"in/side/a.txt": b"1", "in/side/b/c.txt": b"2", "in/side/no.bin": b"3", "other/a.txt": b"4", "a.txt": b"5"}
MAKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "x.whl": zip_archive,
    "x.zip": zip_archive,
    "x.tgz": tarball,
    "x.deb": debian_package,
    "gz.deb": lambda files: debian_package(files, "gz"),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text(name: str) -> bool:
    return name.endswith(".txt")


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_wanted_comes_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(MAKERS[name](FILES))
    unpack(tmp_path / name, "in/side", tmp_path / "below", text)
    assert contents(tmp_path / "below") == {"a.txt": b"1", "b/c.txt": b"2"}
    unpack(tmp_path / name, "", tmp_path / "all", text)
    assert contents(tmp_path / "all") == {key: value for key, value in FILES.items() if text(key)}


@pytest.mark.parametrize("name", MAKERS)
def test_no_name_leads_out(tmp_path: Path, name: str) -> None:
    room = tmp_path / "a" / "b" / "c"
    room.mkdir(parents=True)
    evil = {f"top/{'../' * steps}evil.txt": b"x" for steps in (1, 2, 3)}
    evil |= {f"{tmp_path}/evil.txt": b"x", f"top/{tmp_path}/evil.txt": b"x", "../evil.txt": b"x"}
    (room / name).write_bytes(MAKERS[name]({**evil, "top/good.txt": b"y"}))
    unpack(room / name, "top", room / "out", text)
    assert contents(room / "out") == {"good.txt": b"y"}
    unpack(room / name, "", room / "all", text)
    assert (room / "all" / "top" / "good.txt").is_file()
    assert not [path for path in tmp_path.rglob("evil.txt") if not path.is_relative_to(room / "all" / "top")]


@pytest.mark.parametrize("name", MAKERS)
def test_no_name_leads_out_on_windows(tmp_path: Path, name: str) -> None:
    evil = dict.fromkeys(
        ["top/..\\..\\evil.txt", "top/C:\\evil.txt", "top/C:evil.txt", "top/\\\\host\\a\\evil.txt"], b"x"
    )
    (tmp_path / name).write_bytes(MAKERS[name]({**evil, "top/good.txt": b"y"}))
    unpack(tmp_path / name, "top", tmp_path / "out", text)
    assert contents(tmp_path / "out") == {"good.txt": b"y"}


@pytest.mark.skipif(which("dpkg-deb") is None, reason="dpkg-deb is not installed")
def test_a_package_that_dpkg_made(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"
    )
    (root / "usr" / "share").mkdir(parents=True)
    (root / "usr" / "share" / "a.txt").write_bytes(b"1")
    (root / "usr" / "share" / "link.txt").symlink_to("a.txt")
    subprocess.run(["dpkg-deb", "-Zxz", "-b", "root", "x.deb"], cwd=tmp_path, check=True, capture_output=True)
    unpack(tmp_path / "x.deb", "usr/share", tmp_path / "out", text)
    assert contents(tmp_path / "out") == {"a.txt": b"1"}  # what is no file of its own is left out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.whl", b"no zip", "not a zip file"),
        ("x.tgz", b"no tarball", "could not be opened"),
        ("x.tgz", tarball(FILES)[:-20], "ended before"),
        ("x.deb", tarball(FILES), "no Debian package"),
        ("x.deb", ar_archive({"debian-binary": b"2.0\n", "control.tar.xz": b""}), r"no data\.tar"),
        ("x.deb", b"!<arch>\n" + b"data.tar.xz".ljust(48) + b"many".ljust(12), r"no data\.tar"),
        ("x.deb", ar_archive({"data.tar.xz": b"no tarball"}), "could not be opened"),
    ],
)
def test_damaged_archives(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DamagedArchiveError, match=message):
        unpack(tmp_path / name, "in/side", tmp_path / "out", text)
