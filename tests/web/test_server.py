"""How the server starts and ends, for whom it may be, and where the login comes from."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path

import pytest
from support import web

web.require("gradio")

import gradio as gr  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from pyglow_fast.web import server  # noqa: E402
from pyglow_fast.web.server import VARIABLE, bind, can_open_browser, check_host, credentials  # noqa: E402

LOGIN = ("ada", "pass")


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.8.9.1", "127.8.9.1"),
        ("localhost", "localhost"),
        ("LocalHost", "LocalHost"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1"),
    ],
)
def test_this_machine_needs_no_login(host: str, bound: str) -> None:
    assert check_host(host, None) == bound


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "[::]", "192.168.1.4", "10.0.0.1", "myhost", "127.1", "localhost.evil"]
)
def test_every_other_address_needs_one(host: str) -> None:
    with pytest.raises(ValueError, match=f"^host: expected .*{VARIABLE}.*found .* without one$"):
        check_host(host, None)
    assert check_host(host, LOGIN) == host.strip("[]")


@pytest.mark.parametrize("host", ["", " ", "[]"])
def test_an_address_has_characters(host: str) -> None:
    with pytest.raises(ValueError, match=r"^host: expected an address"):
        check_host(host, LOGIN)


def refuse(prompt: str) -> str:
    raise AssertionError("asked")


def test_where_a_login_comes_from() -> None:
    prompts: list[str] = []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        return "pa:ss word"

    assert credentials(None, {}, refuse) is None
    assert credentials(None, {VARIABLE: "ada:pa:ss word"}, refuse) == ("ada", "pa:ss word")
    assert credentials("ada", {VARIABLE: "ada:pa:ss word"}, None) == ("ada", "pa:ss word")
    assert credentials("ada", {}, ask) == ("ada", "pa:ss word")
    assert prompts == ["Password of ada: "]


def test_a_prompt_that_is_closed() -> None:
    """Ctrl-D in the place of a password."""

    def closed(prompt: str) -> str:
        raise EOFError

    with pytest.raises(ValueError, match=r"^password: expected at least one character, found none$"):
        credentials("ada", {}, closed)


@pytest.mark.parametrize(
    ("flag", "environment", "answer", "message"),
    [
        ("ada:hunter2", None, "hunter2", "^auth: expected .*list of processes.*found a colon$"),
        (":hunter2", None, "hunter2", "^auth: expected"),
        ("ada:hunter2", "ada:hunter2", "hunter2", "^auth: expected"),
        ("", None, "hunter2", "^auth: expected .*found an empty one$"),
        (" ada", None, "hunter2", "^auth: expected .*without spaces"),
        ("ada", None, None, f"^auth: expected a terminal .*{VARIABLE}"),
        ("ada", None, "", "^password: expected at least one character"),
        ("bob", "ada:hunter2", None, "^auth: expected the user of"),
        (None, "hunter2", None, f"^{VARIABLE}: expected USER:PASSWORD, found no colon$"),
        (None, "", None, f"^{VARIABLE}: expected"),
        (None, ":hunter2", None, f"^{VARIABLE}: expected .*found an empty one$"),
        (None, "hunter2:", None, f"^{VARIABLE}: expected USER:PASSWORD, found an empty password$"),
        (None, "ada :hunter2", None, f"^{VARIABLE}: expected .*without spaces"),
    ],
)
def test_a_login_that_is_none_is_refused_and_no_password_shown(
    flag: str | None, environment: str | None, answer: str | None, message: str
) -> None:
    ask: Callable[[str], str] | None = None if answer is None else lambda prompt: answer
    with pytest.raises(ValueError, match=message) as raised:
        credentials(flag, {} if environment is None else {VARIABLE: environment}, ask)
    assert "hunter2" not in str(raised.value)


def test_a_browser_opens_on_a_desktop_only() -> None:
    assert can_open_browser({"DISPLAY": ":0"}, "linux")
    assert can_open_browser({"WAYLAND_DISPLAY": "wayland-0"}, "linux")
    assert can_open_browser({}, "darwin")
    assert can_open_browser({}, "win32")
    assert not can_open_browser({}, "linux")
    assert not can_open_browser({"DISPLAY": ""}, "linux")
    for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY"):
        assert not can_open_browser({"DISPLAY": "localhost:10.0", name: "x"}, "linux")
        assert not can_open_browser({name: "x"}, "darwin")


def test_a_port_that_is_taken_is_refused_or_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        why = re.escape(os.strerror(errno.EADDRINUSE))
        with pytest.raises(ValueError, match=rf"^port: expected a free port, found {taken} \({why}\)$"):
            bind("127.0.0.1", taken)
        monkeypatch.setattr(server, "FIRST_PORT", taken)
        with bind("127.0.0.1", None) as found:
            assert found.getsockname()[1] > taken
        monkeypatch.setattr(server, "PORTS", 1)
        with pytest.raises(ValueError, match=f"^port: expected a free port, found none from {taken} to {taken}$"):
            bind("127.0.0.1", None)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_is_a_port(port: int) -> None:
    with pytest.raises(ValueError, match=r"^port: expected a whole number"):
        bind("127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 64, "a..b"])
def test_an_address_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match=f"^host: expected an address of this machine, found {host}$"):
        bind(host, None)


def test_those_who_left_are_forgotten(tmp_path: Path) -> None:
    """Each reload of the page is another visit; who is there keeps what is on the desk."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        state = gr.State("none")
    server.application(blocks, tmp_path, "127.0.0.1", None, 1000, None, None, None)
    holder = blocks.state_holder
    holder["here"][state._id] = "mine"
    for i in range(3 * server.SESSIONS):
        holder[f"reload {i}"][state._id] = "another"
        assert holder["here"][state._id] == "mine"
    assert len(holder.session_data) <= server.SESSIONS + 1


@pytest.mark.full
def test_uploads_that_nobody_reads_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would fill the disk."""
    monkeypatch.setattr(server, "UPLOADS_LAST", 1)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.File()
    gate = server.application(blocks, tmp_path, "127.0.0.1", None, 1000, None, None, None)
    with TestClient(gate, base_url="http://127.0.0.1") as client:
        answer = client.post("/gradio_api/upload", files={"files": ("a.png", b"some bytes")})
        (path,) = answer.json()
        assert Path(path).is_relative_to(tmp_path)
        web.wait_for(Path(path).exists, False)


def connected(running: web.Server) -> HTTPConnection:
    return HTTPConnection(*running.host.split(":"), timeout=web.WAIT)  # type: ignore[arg-type]


@pytest.mark.full
def test_uploads_that_were_broken_off_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio forgets that it began to write them."""
    monkeypatch.setattr(server, "UPLOADS_LAST", 0.1)
    begun = tmp_path / "tmpbegun"
    begun.write_bytes(b"some bytes")
    gate = server.application(gr.Blocks(analytics_enabled=False), tmp_path, "127.0.0.1", None, 1000, None, None, None)
    with TestClient(gate, base_url="http://127.0.0.1"):
        web.wait_for(begun.exists, False)


def open_stream(running: web.Server, path: str) -> HTTPConnection:
    """A connection whose answer has begun and does not end."""
    connection = connected(running)
    connection.request("GET", path)
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.read(5) == b"data:"
    return connection


def start_handler(running: web.Server, index: int) -> None:
    body = f'{{"data": [], "fn_index": {index}, "session_hash": "abc"}}'
    connection = connected(running)
    connection.request("POST", "/gradio_api/queue/join", body, {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_ends_at_once_and_leaves_nothing(signum: int, tmp_path: Path) -> None:
    """Also while a browser listens and a handler computes, for ten minutes, in a thread that cannot be stopped."""
    with web.small_server(tmp_path) as running:
        (folder,) = tmp_path.glob("pyglow-serve-*")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        streams = [open_stream(running, "/gradio_api/heartbeat/abc") for _ in range(3)]
        start_handler(running, web.handler_index(running, "Slow"))
        web.wait_for((tmp_path / "computing").exists, True)
        assert running.end(signum) == 0  # and not killed, after a minute in vain
        for stream in streams:
            stream.close()
        assert not folder.exists()
        assert running.process.stdout is not None
        assert running.process.stdout.read() == ""  # the address was all
        assert running.log() == ""


@pytest.mark.full
@pytest.mark.alone
def test_a_signal_before_it_answers_ends_it_too(tmp_path: Path) -> None:
    """While the page is built, which loads a model."""
    code = (
        "import pathlib, time\nfrom pyglow_fast.web.server import serve\n"
        "def page():\n    print('http://building', flush=True)\n    time.sleep(600)\nserve(page)\n"
    )
    with web.Server(["-c", code], tmp_path) as running:
        assert list(tmp_path.glob("pyglow-serve-*"))
        assert running.end(signal.SIGTERM) == 0
        assert not list(tmp_path.glob("pyglow-serve-*"))
        assert running.log() == ""


@pytest.mark.full
@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_that_come_together_are_one(second: str, tmp_path: Path) -> None:
    """Such as that of a terminal which is closed under an impatient user."""
    code = (
        "import os, signal\nfrom pyglow_fast.web.server import serve\n"
        "def page():\n    print('http://building', flush=True)\n"
        f"    both = [signal.SIGINT, signal.{second}]\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, both)\n"
        "    for each in both:\n        os.kill(os.getpid(), each)\n"
        "    signal.pthread_sigmask(signal.SIG_UNBLOCK, both)\nserve(page)\n"
    )
    with web.Server(["-c", code], tmp_path) as running:
        running.process.wait(web.WAIT)
        assert running.process.returncode == 0
        assert not list(tmp_path.glob("pyglow-serve-*"))
        assert running.log() == ""


def test_a_page_that_cannot_be_built_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error comes through, signals have their effect again and the port is free."""

    def page() -> None:
        raise ValueError("no such run")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "as before")
    before = signal.getsignal(signal.SIGINT)
    assert threading.current_thread() is threading.main_thread()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match=r"^no such run$"):
        server.serve(page, port=port)  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is before
    assert tempfile.gettempdir() == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert os.environ["GRADIO_TEMP_DIR"] == os.environ["GRADIO_ANALYTICS_ENABLED"] == "as before"
    bind("127.0.0.1", port).close()


def test_a_server_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an end with code 0."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda self, sockets: None)
    with pytest.raises(RuntimeError, match="did not start"):
        server.serve(lambda: gr.Blocks(analytics_enabled=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", [True, False])
def test_a_browser_is_opened_where_one_is_wanted(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the address that is printed, once the server answers there; its user sees no other."""
    opened: list[str] = []
    asked = threading.Event()

    def run(self: object, sockets: list[socket.socket]) -> None:
        self.started = True  # type: ignore[attr-defined]
        if wanted:
            asked.wait(web.WAIT)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server.uvicorn.Server, "run", run)
    monkeypatch.setattr("webbrowser.open", lambda address: (opened.append(address), asked.set()))
    monkeypatch.setattr(server, "can_open_browser", lambda environment: True)
    with pytest.raises(RuntimeError, match="ended by itself"):
        server.serve(lambda: gr.Blocks(analytics_enabled=False), open_browser=wanted)
    (address,) = [word for word in capsys.readouterr().out.split() if word.startswith("http://127.0.0.1:")]
    assert opened == ([address] if wanted else [])


@pytest.mark.parametrize(
    ("host", "name"), [("0.0.0.0", socket.gethostname()), ("::1", "[::1]"), ("localhost", "localhost")]
)
def test_the_address_that_is_printed(
    host: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that a browser takes: the name of this machine for all of its addresses, brackets around colons."""
    if ":" in host:
        try:
            socket.create_server((host, 0), family=socket.AF_INET6).close()
        except OSError:
            pytest.skip("this machine has no ::1")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda self, sockets: setattr(self, "started", True))
    with pytest.raises(RuntimeError, match="ended by itself"):
        server.serve(lambda: gr.Blocks(analytics_enabled=False), host=host, auth=LOGIN)
    assert f" http://{name}:" in capsys.readouterr().out


@pytest.mark.full
def test_it_asks_nobody_else(tmp_path: Path) -> None:
    """No address outside is looked up or connected to, from the import of Gradio to the first page."""
    code = (
        "import sys\n"
        "def watch(event, arguments):\n"
        "    if event in ('socket.getaddrinfo', 'socket.connect'):\n"
        "        where = str(arguments)\n"
        "        if '127.0.0.1' not in where:\n"
        "            print(event, where, file=sys.stderr, flush=True)\n"
        "sys.addaudithook(watch)\n"
        "import runpy\n"
        f"sys.argv = ['small_page.py', '{{}}']\n"
        f"runpy.run_path({str(web.SMALL_PAGE)!r}, run_name='__main__')\n"
    )
    with web.Server(["-c", code], tmp_path) as running:
        connection = connected(running)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()
        start_handler(running, web.handler_index(running, "Count"))
        stream = open_stream(running, "/gradio_api/heartbeat/abc")
        assert running.end() == 0
        stream.close()
        assert running.log() == ""
