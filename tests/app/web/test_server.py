"""The server of the page: what Gradio's login, limits and checks of files do for us, and what ours add."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import web
from support.web import Server, wait_for

web.require("gradio")

import httpx  # noqa: E402
from app.web.small_page import page  # noqa: E402
from gradio.routes import App  # noqa: E402
from starlette.responses import PlainTextResponse  # noqa: E402

from pyglow_fast.app.web import server  # noqa: E402
from pyglow_fast.app.web.server import VARIABLE, Place, credentials, is_loopback  # noqa: E402

LOGIN = ("ada", "pass word")
API = "gradio_api/"
# What is answered without a login: the page of the login, Gradio's own files, and what tells nothing of the page.
OPEN = {"/", "/login", "/login/", "/logout", "/theme.css", "/robots.txt", "/favicon.ico", "/manifest.json"}
OPEN |= {"/gradio_api/" + name for name in ("user", "user/", "token", "token/", "app_id", "app_id/", "theme.css")}
OPEN |= {"/gradio_api/" + name for name in ("reset", "reset/", "cancel", "startup-events", "heartbeat/{session_hash}")}


def small(folder: Path, **options: Any) -> Server:
    return Server([str(web.SMALL_PAGE), json.dumps(options)], folder)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The small page behind a login, whose uploads are 1 MiB together; the last test here ends it."""
    with small(tmp_path_factory.mktemp("locked"), auth=LOGIN, max_uploads=2**20) as server:
        yield server


@pytest.fixture
def stranger(locked: Server) -> Iterator[httpx.Client]:
    """Someone who has not logged in."""
    with httpx.Client(base_url=locked.address, timeout=web.WAIT, trust_env=False) as client:
        yield client


@pytest.fixture
def ada(locked: Server) -> Iterator[httpx.Client]:
    """Someone who has."""
    with httpx.Client(base_url=locked.address, timeout=web.WAIT, trust_env=False) as client:
        answer = client.post("login", data=dict(zip(("username", "password"), LOGIN, strict=True)))
        assert answer.status_code == 200
        yield client


def join(client: httpx.Client, button: str, *data: Any, session: str = "s") -> httpx.Response:
    """Clicks a button."""
    config = client.get("config").json()
    (target,) = [part["id"] for part in config["components"] if part["props"].get("value") == button]
    (index,) = [handler["id"] for handler in config["dependencies"] if [target, "click"] in handler["targets"]]
    event = {"data": data, "fn_index": index, "session_hash": session}
    return client.post(f"{API}queue/join", json=event)


def result(client: httpx.Client, button: str, *data: Any) -> Any:
    """Clicks a button and waits: what comes out, or what the error says."""
    assert join(client, button, *data).status_code == 200
    with client.stream("GET", f"{API}queue/data", params={"session_hash": "s"}) as lines:
        for line in lines.iter_lines():
            message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            if message.get("msg") == "process_completed":
                output = message["output"]
                return output["data"][0] if message["success"] else output.get("error")
    raise AssertionError("no end")


def upload(client: httpx.Client, name: str, data: bytes) -> httpx.Response:
    return client.post(f"{API}upload", files={"files": (name, data)})


def file(path: str, **more: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def test_a_login_guards_every_route(locked: Server, stranger: httpx.Client, ada: httpx.Client) -> None:
    """All that Gradio has; it tells nothing of the page, nor takes a wrong password."""
    paths = App.create_app(page()).openapi()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    assert len(routes) > 60
    told = set()
    for method, path in routes:
        filled = path.replace("{session_hash}", "s").replace(":path}", "}").lstrip("/")
        with stranger.stream(method.upper(), filled, follow_redirects=False) as answer:
            if answer.status_code < 400:
                told.add(path)
    assert told <= OPEN, told - OPEN
    (path,) = upload(ada, "mine.png", b"mine").json()
    assert ada.get(f"{API}file={path}").content == b"mine"
    for asked in (f"{API}file={path}", "config", f"{API}queue/data?session_hash=s"):
        assert stranger.get(asked).status_code == 401
    for name in ("queue/join", "run/predict", "upload"):
        assert stranger.post(API + name, json={}).status_code == 401
    assert "Secret label" not in stranger.get("").text
    assert "Secret label" in ada.get("").text
    wrong = stranger.post("login", data={"username": "ada", "password": "guess"})
    assert (wrong.status_code, wrong.cookies) == (400, httpx.Cookies())


def test_no_file_but_uploads_is_read(locked: Server, ada: httpx.Client) -> None:
    """Neither by its address nor by an event that names it, be it in the server's folder."""
    (locked.cwd / "mine.txt").write_text("mine")
    for path in ("/etc/hostname", str(locked.cwd / "mine.txt"), "mine.txt", str(web.SMALL_PAGE), "../../etc/hostname"):
        assert ada.get(f"{API}file={path}").status_code in (403, 404), path
        assert "hostname" not in str(result(ada, "Received", file(path)) or "").replace(path, ""), path
        assert "bytes" not in str(result(ada, "Received", file(path))), path
    (path,) = upload(ada, "mine.png", b"four").json()
    assert result(ada, "Received", file(path, orig_name="C:\\a\\mine.png")) == "mine.png: 4 bytes"
    assert "bytes" not in str(result(ada, "Received", file(path + "/../../../mine.txt")))
    assert "bytes" not in str(result(ada, "Received", file(locked.address + "config")))


def test_the_size_of_a_file_is_limited(ada: httpx.Client, locked: Server) -> None:
    """While it arrives, and nothing of it stays."""
    assert upload(ada, "small.png", bytes(99 * 1024)).status_code == 200
    before = sorted(locked.files())
    assert upload(ada, "large.png", bytes(101 * 1024)).status_code == 413
    assert sorted(locked.files()) == before


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:{port}", None, 200),
        ("LOCALHOST:{port}", "http://localhost:{port}", 200),
        ("[::1]:{port}", "http://[::1]:{port}", 200),
        ("evil.example:{port}", None, 421),
        ("127.0.0.1.evil.example", None, 421),
        ("", None, 421),
        ("127.0.0.1:{port}", "http://evil.example", 403),
        ("127.0.0.1:{port}", "http://127.0.0.1:80", 403),
        ("127.0.0.1:{port}", "null", 403),
    ],
)
def test_other_pages_may_not_ask(host: str, origin: str | None, status: int) -> None:
    """By a foreign name that leads here, or from a foreign page; whatever they ask for."""
    headers = {"Host": host.format(port=7860)} | ({"Origin": origin.format(port=7860)} if origin else {})

    async def ask() -> list[int]:
        guard = httpx.ASGITransport(server.Guard(PlainTextResponse("the page"), Place().names))
        async with httpx.AsyncClient(transport=guard) as client:
            return [(await client.get(f"http://a/{path}", headers=headers)).status_code for path in ("", "config")]

    assert asyncio.run(ask()) == [status] * 2


def test_no_other_server_is_asked_and_no_other_page_frames_it(ada: httpx.Client) -> None:
    """By no address; nor does a browser guess the type of an answer, be it a refusal."""
    for path in ("file=http://example.com/a.png", "file=https%3A//a", "file/http://a", "proxy=https://a.hf.space"):
        answer = ada.get(API + path)
        assert (answer.status_code, answer.text) == (403, "This page asks no other server."), path
    for found in (answer, ada.get("")):
        assert found.headers["Content-Security-Policy"] == "frame-ancestors 'self'"
        assert found.headers["X-Content-Type-Options"] == "nosniff"


def test_bodies_are_limited(ada: httpx.Client) -> None:
    """Before they are read: of the page's events, where no length is said, and of all files of an upload together."""
    for path, content in (("queue/join", bytes(2**20 + 1)), ("run/upload", bytes(2**20 + 1)), ("run/a", iter([b"{}"]))):
        assert ada.post(API + path, content=content).status_code == 413
    assert ada.post(f"{API}upload", files=[("files", ("a.png", bytes(99 * 1024)))] * 11).status_code == 413


def test_uploads_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those count that were taken, until they are removed."""
    monkeypatch.setattr(server, "MAX_UPLOADS", 100)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("", int(scope["query_string"]))(scope, receive, send)

    async def ask() -> list[int]:
        asked = [(200, 60), (200, 60), (400, 40), (200, 40), (200, 1)]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server.Guard(app, None))) as client:
            return [
                (await client.post(f"http://a/{API}upload?{code}", content=bytes(n))).status_code for code, n in asked
            ]

    assert asyncio.run(ask()) == [200, 413, 400, 200, 413]
    monkeypatch.setattr(server, "UPLOADS_LAST", 0)
    assert asyncio.run(ask()) == [200, 200, 400, 200, 200]


def test_behind_a_proxy_any_name_will_do(locked: Server) -> None:
    """Where there is a login, whose cookie no other name has; another page may not ask."""
    for origin, status in (({}, 200), ({"Origin": "https://glow.example"}, 200), ({"Origin": "https://a.b"}, 403)):
        headers = {"Host": "glow.example"} | origin
        assert httpx.get(locked.address, headers=headers, trust_env=False).status_code == status


def test_addresses_that_are_refused() -> None:
    """Before anything is served: what others reach without a login, and what cannot be had."""
    for host in ("0.0.0.0", "::", "192.168.1.4", "myhost", "127.1", "localhost.evil", ""):
        assert not is_loopback(host)
        with pytest.raises(ValueError, match=f"^host: expected .*{VARIABLE}.* without one$"):
            Place(host).check()
    for host in ("127.0.0.1", "localhost", "::1", "127.8.9.1"):
        assert is_loopback(host)
    with pytest.raises(ValueError, match=r"^host: expected an address of this machine, found 192.0.2.1$"):
        Place("192.0.2.1", auth=LOGIN).check()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"^port: expected a free port, found {port} \(.*in use\)$"):
            Place(port=port).check()


def test_where_a_login_comes_from() -> None:
    """The environment: a password on the command line others can see, and no message has it."""
    assert credentials(None) is None
    assert credentials("ada:pa:ss word") == ("ada", "pa:ss word")
    for given in ("hunter2", ":hunter2", "hunter2:", ""):
        with pytest.raises(ValueError, match=f"^{VARIABLE}: expected USER:PASSWORD, found another text$"):
            credentials(given)


def assert_ends(server: Server, client: httpx.Client, signum: signal.Signals) -> None:
    """The queue of events is bounded; a signal does not wait for the queue, and the uploads are removed."""
    assert upload(client, "mine.png", b"mine").status_code == 200
    (folder,), before = server.cwd.glob("pyglow-serve-*"), len(server.log())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for i in range(2):
        assert join(client, "Slow", session=str(i)).status_code == 200
        wait_for(lambda: (server.cwd / "computing").exists(), True)
    answers = [join(client, "Slow", session=str(i)).status_code for i in range(2, 8)]
    assert 503 in answers
    assert server.end(signum) == 0
    assert not folder.exists()
    assert "Traceback" not in server.log()[before:]


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_without_a_login(tmp_path: Path, signum: signal.Signals) -> None:
    """It is asked for by its own names alone, and uploads are removed some minutes later; a second here."""
    with (
        small(tmp_path, uploads_last=1) as server,
        httpx.Client(base_url=server.address, timeout=web.WAIT, trust_env=False) as client,
    ):
        assert client.get("", headers={"Host": "evil.example"}).status_code == 421
        (path,) = upload(client, "mine.png", b"mine").json()
        assert Path(path).is_file()
        wait_for(lambda: Path(path).exists(), False)
        assert_ends(server, client, signum)


def test_it_ends_at_once_with_a_full_queue(locked: Server, ada: httpx.Client) -> None:
    """The last test, which ends the server of the others."""
    assert_ends(locked, ada, signal.SIGTERM)
