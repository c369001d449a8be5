"""Serves the page by Gradio: for this machine alone unless there is a login, and asked for by its own names alone."""

from __future__ import annotations

import ipaddress
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import gradio as gr
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pyglow_fast._errors import expect

VARIABLE = "PYGLOW_SERVE_AUTH"
SETTINGS = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ALLOWED_PATHS": ""}
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MAX_FILE_SIZE = 20 * 2**20  # bytes of an uploaded file
UPLOADS_LAST = 600  # seconds; as often those are removed that are older
SESSIONS = 100  # visits that are remembered; each loading of the page is one, and may hold samples and latents
# Gradio's default fonts would be fetched; these are on every system.
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
FONT_MONO = ("ui-monospace", "Consolas", "monospace")


class Guard:
    """ASGI middleware that refuses what other pages in a visitor's browser ask: by Origin, and by Host.

    Args:
        app: the application that answers.
        hosts: the names under which the page may be asked for; None for any. Another name means that a foreign page
            had its own name resolved to this machine.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.app if scope["type"] == "lifespan" else self._refusal(Headers(scope=scope)) or self.app
        await answer(scope, receive, send)

    def _refusal(self, headers: Headers) -> PlainTextResponse | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.hosts is not None and host_name(host) not in self.hosts:
            return PlainTextResponse("This page is served under other names.", 421)
        if origin is not None and origin.partition("://")[2].lower() != host:
            return PlainTextResponse("Another page may not ask.", 403)
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


def credentials(
    user: str | None, environment: Mapping[str, str], ask: Callable[[str], str] | None
) -> tuple[str, str] | None:
    """Read the user and the password of the login; None if none was asked for.

    Args:
        user: from the command line, where a password could be read by every user of the machine.
        environment: PYGLOW_SERVE_AUTH=USER:PASSWORD is looked up here.
        ask: a function that asks for the password with a prompt; None where there is no terminal.

    Raises:
        ValueError: a part is empty or missing, or a password was given on the command line. No message has it.
    """
    given = environment.get(VARIABLE)
    if user is None and given is None:
        return None
    name, colon, password = (user or "", ":", "") if given is None else given.partition(":")
    where = "auth" if given is None else VARIABLE
    expect(bool(colon), VARIABLE, "USER:PASSWORD", "no colon")
    expect(bool(name) and name == name.strip(), where, "the name of a user without spaces around it", repr(name))
    fits = user is None or (":" not in user and user == name)
    expect(fits, "auth", f"the name of the user alone, the same as in {VARIABLE}=USER:PASSWORD", "another text")
    if given is None:
        expect(ask is not None, where, f"a terminal to ask for the password on, or {VARIABLE}=USER:PASSWORD", "neither")
        assert ask is not None
        password = ask(f"Password of {name}: ")
    expect(bool(password), "password", "at least one character", "none")
    return name, password


class Place(NamedTuple):
    """Where the page is served, and to whom.

    Args:
        host: the address to bind.
        port: the port; None for the first free one from 7860.
        auth: the user and the password.
        certificate: a file in PEM format, for an encrypted connection.
        key: the file of its private key, if the first file has none.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    auth: tuple[str, str] | None = None
    certificate: str | None = None
    key: str | None = None

    @property
    def names(self) -> frozenset[str] | None:
        """The names under which the page may be asked for; with a login any, as behind a proxy: see :class:`Guard`."""
        return None if self.auth else LOOPBACK | {self.host.lower()}

    def check(self) -> None:
        """Refuse what cannot be served at.

        Raises:
            ValueError: others can reach the address and there is no login; address or port cannot be had; a certificate
                that is none.
        """
        login = f"127.0.0.1, or a login for all who can reach another address (--auth USER or {VARIABLE}=USER:PASSWORD)"
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
        expect(self.certificate is not None or self.key is None, "certificate", "the certificate of the key", "none")
        if self.certificate is not None:
            try:  # without a function that gives the password OpenSSL would ask for it on the terminal
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate, self.key, password=lambda: "")
            except (OSError, ValueError) as error:  # an SSLError is an OSError
                wanted = "the file of a certificate and that of its key, in PEM format and without a password"
                why = str(getattr(error, "reason", None) or error)
                raise ValueError(f"certificate: expected {wanted}, found {why}") from None


def can_open_browser(environment: Mapping[str, str], platform: str = sys.platform) -> bool:
    """Tells whether a browser would open before the user's eyes: on a desktop, and not over ssh."""
    if any(environment.get(name) for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")):
        return False
    return platform in ("win32", "darwin") or any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def serve(
    page: Callable[[], gr.Blocks],
    place: Place,
    *,
    css: str = "",
    open_browser: bool = False,
    max_file_size: int = MAX_FILE_SIZE,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Serves a page until Ctrl-C, SIGTERM or SIGHUP, from the main thread; prints its address once it answers.

    The process ends inside this call, with code 0: no handler is waited for.

    Args:
        page: builds the page. It is called once there is the folder of uploads, which is removed at the end.
        place: where, and to whom.
        css: the style of the page.
        open_browser: whether to open the user's browser, where there is a desktop to see it on.
        max_file_size: bytes that an uploaded file may have.
        meanwhile: is called in a thread of its own once the page answers.

    Raises:
        ValueError: see :meth:`Place.check`.
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
            ssl_certfile=place.certificate,
            ssl_keyfile=place.key or place.certificate,
            ssl_verify=False,  # of Gradio's own request, which looks whether the page answers
            app_kwargs={"middleware": [Middleware(Guard, hosts=place.names)]},
            max_file_size=max_file_size,
            state_session_capacity=SESSIONS,
            prevent_thread_lock=True,
            inbrowser=open_browser and can_open_browser(os.environ),
            inline=False,
            share=False,
            quiet=True,
            show_error=False,  # what is no gr.Error may name files
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=gr.themes.Default(font=list(FONT), font_mono=list(FONT_MONO)),
            css=css,
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
