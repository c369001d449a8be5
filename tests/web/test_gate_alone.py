"""The gate by itself: before an application that the tests write, without a server."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from support import web

web.require("gradio")

from pyglow_fast.web.gate import BLOCK, FILES_STORED, UPLOAD, Gate, files_in, host_name  # noqa: E402


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("localhost:7860", "localhost"),
        ("LocalHost", "localhost"),
        ("[::1]:7860", "::1"),
        ("[::1]", "::1"),
        ("a.:1", "a"),
        ("localhost.", "localhost"),
        ("", ""),
    ],
)
def test_the_name_of_a_host_header(header: str, name: str) -> None:
    assert host_name(header) == name


def test_files_are_found_at_any_depth() -> None:
    deep: Any = {"path": "deepest"}
    for _ in range(10_000):
        deep = [deep]
    assert files_in(deep) == ["deepest"]
    assert sorted(files_in({"a": [{"path": "x"}, {"b": {"path": "y", "url": "z"}}], "path": None})) == ["x", "y"]


def test_a_bound_address_of_its_own_is_a_name_too(tmp_path: Path) -> None:
    async def nothing(*_: Any) -> None: ...

    gate = Gate(nothing, tmp_path, frozenset({"127.0.0.5"}), 1, lambda cookies: True)
    scope = {"method": "GET", "path": "/"}
    assert gate._refused(scope, {"host": "127.0.0.5:7860"}) is None
    assert gate._refused(scope, {"host": "127.0.0.6:7860"}) is not None


def test_the_gate_follows_links_and_parents(tmp_path: Path) -> None:
    """By itself: Gradio looks again at what passes."""

    async def nothing(*_: Any) -> None: ...

    folder = tmp_path / "cache"
    folder.mkdir()
    (tmp_path / "secret").touch()
    (folder / "link").symlink_to(tmp_path / "secret")
    gate = Gate(nothing, folder, None, 1, lambda cookies: True)

    def status(path: str) -> int | None:
        refused = gate._refused({"method": "GET", "path": f"/gradio_api/file={path}"}, {})
        return None if refused is None else refused[0]

    assert status(f"{folder}/picture.png") is None
    for path in (
        f"{folder}/link",
        f"{folder}/../secret",
        f"{folder}-other/x",
        "picture.png",
        "",
        f"{folder}/\0",
        "x" * 5000,
    ):
        assert status(path) == 403, path


def asked(
    app: Callable[..., Awaitable[None]],
    folder: Path,
    path: str,
    *messages: dict[str, Any],
    largest: int = 1000,
    **scope: Any,
) -> list[Any]:
    """What a gate before ``app`` answers to a POST of 100 bytes, of which the messages arrive."""
    sent: list[Any] = []
    waiting = list(messages)

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"a"), (b"content-length", b"100")]
    whole = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers, **scope}
    web.completed(Gate(app, folder, None, largest, lambda cookies: True)(whole, receive, send))
    return sent


def test_a_request_that_is_broken_off_is_not_carried_out(tmp_path: Path) -> None:
    """Though what arrived of it is JSON by itself."""

    async def app(*_: Any) -> None:
        raise AssertionError("carried out")

    part = {"type": "http.request", "body": b"{}", "more_body": True}
    assert asked(app, tmp_path, "/gradio_api/queue/join", part, {"type": "http.disconnect"}) == []


@pytest.mark.parametrize("full", ["stored", "disk"])
def test_uploads_do_not_fill_the_disk(full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither many large ones nor many small ones; what is there is counted, at any depth."""
    done: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        done.append(scope["path"])

    def status() -> int | None:
        sent = asked(app, tmp_path, UPLOAD, largest=BLOCK)
        return sent[0]["status"] if sent else None

    assert status() is None
    (tmp_path / "hash").mkdir()
    if full == "stored":
        for i in range(FILES_STORED - 3):  # beside the folder and what arrives
            (tmp_path / "hash" / str(i)).touch()
        assert status() is None
        (tmp_path / "hash" / "large").write_bytes(bytes(3 * BLOCK))
    else:
        usage = shutil.disk_usage(tmp_path)._replace(free=99)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    count = len(done)
    assert status() == 507
    assert len(done) == count


@pytest.mark.parametrize(("scheme", "secure"), [("http", [True, False]), ("https", [True, True])])
def test_where_there_is_encryption_no_cookie_goes_without(scheme: str, secure: list[bool], tmp_path: Path) -> None:
    cookies = [b"access-token-x=1; HttpOnly; Path=/; SameSite=none; Secure", b"access-token-unsecure-x=1; SameSite=lax"]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "headers": [(b"set-cookie", cookie) for cookie in cookies]})

    (sent,) = asked(app, tmp_path, "/login", scheme=scheme)
    got = [value for name, value in sent["headers"] if name == b"set-cookie"]
    assert [b"; Secure" in cookie for cookie in got] == secure
    assert all(b"SameSite=lax" in cookie for cookie in got)
