"""Serves the page by Gradio: for this machine alone unless there is a login, and asked for by its own names alone."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyglow_fast._core.errors import expect

VARIABLE = "PYGLOW_SERVE_AUTH"
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ALLOWED_PATHS": ""}
# Of Gradio; with show_error the page would tell what is no gr.Error, which may name files.
OFF: dict[str, Any] = dict.fromkeys(
    ("inline", "share", "show_error", "run_history", "enable_monitoring", "ssr_mode", "pwa", "mcp_server"), False
)
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_FILE_SIZE = 20 * 2**20  # bytes of an uploaded file
MAX_UPLOADS = 2**30  # bytes of all uploads that are not removed yet
MAX_BODY = 2**20  # bytes of any other request
UPLOADS_LAST = 600  # seconds; as often those are removed that are older
HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": "frame-ancestors 'self'"}
SESSIONS = 100  # visits that are remembered; each loading of the page is one, and may hold samples and latents
# Gradio's default fonts would be fetched; these are on every system.
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
FONT_MONO = ("ui-monospace", "Consolas", "monospace")


class Guard:
    """ASGI middleware that refuses what is too large, and what other pages in a visitor's browser ask.

    Another Host than ``hosts`` (None: any) means that a foreign page had its own name resolved to this machine.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts
        self._uploads: dict[object, tuple[float, int]] = {}  # by request: when it came, and its bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = object()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                if message["status"] != 200:
                    self._uploads.pop(request, None)
            await send(message)

        refusal = None if scope["type"] == "lifespan" else self._refusal(Headers(scope=scope), scope["path"], request)
        await (refusal or self.app)(scope, receive, sending)

    def _refusal(self, headers: Headers, path: str, request: object) -> PlainTextResponse | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts is not None and host_name(host) not in self.hosts:
            return PlainTextResponse("This page is served under other names.", 421)
        if origin is not None and origin.partition("://")[2].lower() != host:
            return PlainTextResponse("Another page may not ask.", 403)
        if any(part in path for part in ("/proxy=", "/file=http", "/file/http")):  # where Gradio would ask another one
            return PlainTextResponse("This page asks no other server.", 403)
        now, size, upload = time.monotonic(), int(headers.get("content-length", 0)), path == "/gradio_api/upload"
        self._uploads = {key: each for key, each in self._uploads.items() if each[0] > now - 2 * UPLOADS_LAST}
        room = MAX_UPLOADS - sum(taken for _, taken in self._uploads.values()) if upload else MAX_BODY
        if size > room or "transfer-encoding" in headers:  # a length that is not said may be any
            return PlainTextResponse("Too much at a time; uploads are removed after some minutes.", 413)
        if upload:
            self._uploads[request] = now, size
        return None


def host_name(header: str) -> str:
    """Read the name in a Host header, without port: ``localhost`` of ``localhost:7860``, ``::1`` of ``[::1]:7860``."""
    name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    return name.rstrip(".")


def is_loopback(host: str) -> bool:
    """Tells whether ``host`` can be reached from this machine alone: localhost, 127.0.0.0/8 or ::1."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def credentials(given: str | None) -> tuple[str, str] | None:
    """Read the login, USER:PASSWORD; None if none was asked for. No message has the password."""
    user, _, password = (given or "").partition(":")
    expect(given is None or bool(user.strip() and password), VARIABLE, "USER:PASSWORD", "another text")
    return None if given is None else (user, password)


class Place(NamedTuple):
    """The address at which the page is served, and the login that it asks for."""

    host: str = "127.0.0.1"
    port: int | None = None  # None: the first free one from 7860
    auth: tuple[str, str] | None = None  # user and password

    @property
    def names(self) -> frozenset[str] | None:
        """The names under which the page may be asked for; with a login any, as behind a proxy: see :class:`Guard`."""
        return None if self.auth else LOOPBACK | {self.host.lower()}

    def check(self) -> None:
        """Refuse what cannot be served at."""
        login = f"127.0.0.1, or a login for all who can reach another address ({VARIABLE}=USER:PASSWORD)"
        expect(self.auth is not None or is_loopback(self.host), "host", login, f"{self.host!r} without one")
        expect(self.port is None or 1 <= self.port <= 65535, "port", "a whole number from 1 to 65535", self.port)
        try:
            family = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)[0][0]
            socket.create_server((self.host, 0), family=family).close()
        except (OSError, UnicodeError):  # the latter of a name that no host can have
            raise ValueError(f"host: expected an address of this machine, found {self.host}") from None
        try:
            socket.create_server((self.host, self.port or 0), family=family).close()
        except OSError as error:
            why = os.strerror(error.errno or 0)
            raise ValueError(f"port: expected a free port, found {self.port} ({why})") from None


def serve(
    page: Callable[[], gr.Blocks],
    place: Place,
    *,
    open_browser: bool = False,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Serves a page until Ctrl-C, SIGTERM or SIGHUP, from the main thread; prints its address once it answers.

    The process ends inside this call, with code 0: no handler is waited for.
    """
    place.check()
    folder = tempfile.mkdtemp(prefix="pyglow-serve-")
    os.environ |= SETTINGS | {"GRADIO_TEMP_DIR": folder}
    tempfile.tempdir = folder  # uploads that were broken off stay in it
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    code = 1
    try:
        blocks = page()
        blocks.delete_cache = (UPLOADS_LAST, UPLOADS_LAST)
        _, address, _ = blocks.launch(
            server_name=f"[{place.host}]" if ":" in place.host else place.host,
            server_port=place.port,
            auth=place.auth,
            app_kwargs={"middleware": [Middleware(Guard, hosts=place.names)]},
            max_file_size=MAX_FILE_SIZE,
            state_session_capacity=SESSIONS,
            prevent_thread_lock=True,
            inbrowser=open_browser,
            quiet=True,
            footer_links=[],
            **OFF,
            theme=gr.themes.Default(font=list(FONT), font_mono=list(FONT_MONO)),
            css_paths=[Path(__file__).with_name("page.css")],
        )
        print(f"Serving on {address} (Ctrl-C ends it)", flush=True)
        if meanwhile is not None:
            threading.Thread(target=meanwhile, daemon=True).start()
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        code = 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if code == 0:
            # Connections stay open and handlers compute for as long as they like, and the interpreter taken down under
            # machine code may crash. Nothing is left to save.
            sys.stdout.flush()
            os._exit(0)
