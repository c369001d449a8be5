"""Starts and ends the server of the page: for this machine alone unless there is a login, with nothing from outside."""

from __future__ import annotations

import asyncio
import contextlib
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
import webbrowser
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import FrameType

import fastapi
import gradio as gr
import uvicorn
from gradio.routes import App as GradioApp

from pyglow_fast._errors import expect
from pyglow_fast.web.brake import EACH, FREE, Brake
from pyglow_fast.web.gate import MAX_FILE_SIZE, Gate
from pyglow_fast.web.uploads import sweep

VARIABLE = "PYGLOW_SERVE_AUTH"
SETTINGS = ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")  # environment variables that Gradio reads again and again
FIRST_PORT = 7860
PORTS = 100  # how many ports are tried
SESSIONS = 100  # visits that are remembered; each loading of the page is one, and may hold samples and latents
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
UPLOADS_LAST = 600  # seconds that an upload is kept which no handler reads
# Gradio's default fonts would be fetched; these are on every system.
FONT = ("ui-sans-serif", "system-ui", "sans-serif")
FONT_MONO = ("ui-monospace", "Consolas", "monospace")


def is_loopback(host: str) -> bool:
    """Tells whether ``host`` can be reached from this machine alone: localhost, 127.0.0.0/8 or ::1."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def check_host(host: str, auth: tuple[str, str] | None) -> str:
    """Check the address to bind, and return it without the brackets of an IPv6 address.

    Raises:
        ValueError: it is empty, or others can reach it and there is no login.
    """
    plain = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    expect(bool(plain.strip()), "host", "an address such as 127.0.0.1", repr(host))
    expect(
        auth is not None or is_loopback(plain),
        "host",
        f"127.0.0.1, or a login for all who can reach another address (--auth USER or {VARIABLE}=USER:PASSWORD)",
        f"{host} without one",
    )
    return plain


def credentials(
    flag: str | None, environment: Mapping[str, str], ask: Callable[[str], str] | None
) -> tuple[str, str] | None:
    """Read the user and the password of the login; None if none was asked for.

    Args:
        flag: the user, from the command line. A password there could be read by every user of the machine.
        environment: PYGLOW_SERVE_AUTH=USER:PASSWORD is looked up here.
        ask: a function that asks for the password with a prompt, such as ``getpass.getpass``; None where there is no
            terminal.

    Raises:
        ValueError: a part is empty or missing, or a password was given on the command line. No message has it.
    """
    given = environment.get(VARIABLE)
    if flag is not None:
        expect(
            ":" not in flag,
            "auth",
            f"a user alone; others see a command line in the list of processes, so the password is asked for or comes "
            f"from {VARIABLE}=USER:PASSWORD",
            "a colon",
        )
        _check_user("auth", flag)
    if given is not None:
        user, colon, password = given.partition(":")
        expect(bool(colon), VARIABLE, "USER:PASSWORD", "no colon")
        _check_user(VARIABLE, user)
        expect(bool(password), VARIABLE, "USER:PASSWORD", "an empty password")
        expect(flag in (None, user), "auth", f"the user of {VARIABLE}, or none", "another one")
        return user, password
    if flag is None:
        return None
    expect(ask is not None, "auth", f"a terminal to ask for the password on, or {VARIABLE}=USER:PASSWORD", "neither")
    assert ask is not None
    try:
        password = ask(f"Password of {flag}: ")
    except EOFError:  # Ctrl-D
        password = ""
    expect(bool(password), "password", "at least one character", "none")
    return flag, password


def _check_user(argument: str, user: str) -> None:
    expect(bool(user), argument, "the name of a user", "an empty one")
    expect(user == user.strip(), argument, "the name of a user without spaces around it", repr(user))


def check_certificate(certificate: str | None, key: str | None) -> None:
    """Check the files of an encrypted connection, which are in PEM format.

    Args:
        certificate: the certificate, with those that vouch for it after it; None for a connection without encryption.
        key: its private key; None if the first file has it too.

    Raises:
        ValueError: a file is missing or no such file, the key has a password or is that of another certificate.
    """
    expect(certificate is not None or key is None, "certificate", "the certificate of the key", "none")
    if certificate is None:
        return
    for argument, name in (("certificate", certificate), ("key", key)):
        expect(name is None or Path(name).is_file(), argument, "a file in PEM format", f"{name!r}, which is none")
    try:
        # Without a function that gives the password OpenSSL would ask for it on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=lambda: "")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        why = str(getattr(error, "reason", None) or error).replace("_", " ").lower()
        wanted = "the file of a certificate and that of its key, in PEM format and without a password"
        raise ValueError(f"certificate: expected {wanted}, found {why}") from None


def can_open_browser(environment: Mapping[str, str], platform: str = sys.platform) -> bool:
    """Tells whether a browser would open before the user's eyes: on a desktop, and not over ssh."""
    if any(environment.get(name) for name in ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")):
        return False
    return platform in ("win32", "darwin") or any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def bind(host: str, port: int | None) -> socket.socket:
    """Open a socket that listens on ``port``, or on the first free one from 7860.

    Raises:
        ValueError: the port is no port or is taken, or the address is not one of this machine.
    """
    expect(port is None or 1 <= port <= 65535, "port", "a whole number from 1 to 65535", port)
    try:
        address = "127.0.0.1" if host.lower() == "localhost" else host
        family, _, _, _, _ = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0]
        with socket.create_server((address, 0), family=family):
            pass  # the address is one of this machine
    except (OSError, UnicodeError):  # the latter of a name that no host can have
        raise ValueError(f"host: expected an address of this machine, found {host}") from None
    ports = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for number in ports:
        try:
            return socket.create_server((address, number), family=family)
        except OSError as error:
            refused = os.strerror(error.errno or 0)  # Python's own text has the address once more
    found = f"{port} ({refused})" if port is not None else f"none from {ports[0]} to {ports[-1]}"
    raise ValueError(f"port: expected a free port, found {found}")


class _Stop(BaseException):
    """Ctrl-C or SIGTERM; like a KeyboardInterrupt it is caught by nothing in between."""


def _stop(signum: int, frame: FrameType | None) -> None:
    for each in _signals():
        signal.signal(each, _stopping)
    raise _Stop


def _stopping(signum: int, frame: FrameType | None) -> None:
    """What follows a signal takes a second at most and must not be cut short by another.

    To ignore them (SIG_IGN) would put a traceback into the log where two come at once.
    """


def _signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _sweeping(folder: Path) -> Callable[[fastapi.FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    """What removes the uploads that were broken off, for as long as an application lives."""

    async def sweeping() -> None:
        while True:
            await asyncio.sleep(UPLOADS_LAST / 10)
            await asyncio.to_thread(sweep, folder, time.time() - UPLOADS_LAST)

    @contextlib.asynccontextmanager
    async def living(_: fastapi.FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(sweeping())
        try:
            yield
        finally:
            task.cancel()

    return living


def application(
    blocks: gr.Blocks,
    folder: Path,
    host: str,
    auth: tuple[str, str] | None,
    max_file_size: int,
    css: str | None,
    js: str | None,
    head: str | None,
) -> Gate:
    """Make the page an ASGI application behind its gate; the arguments are those of :func:`serve`, and its folder."""
    for handler in blocks.fns.values():
        handler.api_visibility = "private"  # else the login page holds the names of all handlers and their inputs
    blocks.api_open = False  # what belongs into the queue is not computed outside of it
    blocks.state_session_capacity = SESSIONS  # beyond it the one that was silent for longest is forgotten
    blocks.delete_cache = (UPLOADS_LAST, UPLOADS_LAST)
    outer = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=_sweeping(folder))
    gr.mount_gradio_app(
        outer,
        blocks,
        path="/",
        auth=auth,
        auth_message=f"After {FREE} wrong passwords another try is taken every {EACH:g} seconds.",
        footer_links=[],
        run_history=False,
        show_error=False,  # what is no gr.Error may name files
        max_file_size=max_file_size,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gr.themes.Default(font=list(FONT), font_mono=list(FONT_MONO)),
        css=css,
        js=js,
        head=head,
    )
    mounted = next(app for app in (getattr(route, "app", None) for route in outer.routes) if isinstance(app, GradioApp))
    blocks.has_launched = True  # without it Gradio checks no file that a request names

    def logged_in(cookies: list[str]) -> bool:
        return auth is None or any(cookie in mounted.tokens for cookie in cookies)

    names = LOOPBACK | {host.lower()} if is_loopback(host) else None
    return Gate(outer, folder, names, max_file_size, logged_in, None if auth is None else Brake())


def serve(
    page: Callable[[], gr.Blocks],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    auth: tuple[str, str] | None = None,
    open_browser: bool = False,
    max_file_size: int = MAX_FILE_SIZE,
    css: str | None = None,
    js: str | None = None,
    head: str | None = None,
    certificate: str | None = None,
    key: str | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> None:
    """Serves a page until Ctrl-C, SIGTERM or SIGHUP, from the main thread; prints its address once it answers.

    The process ends inside this call, with code 0: no handler is waited for, and what stands after the call is not
    reached.

    Args:
        page: a function that builds the page. It is called once the folder for the page's files is there, which is
            private to this process and removed at the end.
        host: the address to bind.
        port: the port; None for the first free one from 7860.
        auth: the user and the password.
        open_browser: whether to open the user's browser, where there is a desktop to see it on.
        max_file_size: bytes that an uploaded file may have.
        css, js, head: handed to Gradio.
        certificate, key: files for an encrypted connection, see :func:`check_certificate`.
        meanwhile: is called in a thread of its own once the page answers; the end of serving does not wait for it.

    Raises:
        ValueError: the address or the port cannot be had, the address needs a login, or the certificate is none.
        RuntimeError: the server ended without having been told to.
    """
    host = check_host(host, auth)
    check_certificate(certificate, key)
    listener = bind(host, port)
    former = {each: signal.signal(each, _stop) for each in _signals()}
    folder, stopped = None, False
    ended = threading.Event()  # a join that a signal interrupts would take the thread for ended (CPython 3.11)
    temporary, environment = tempfile.tempdir, dict(os.environ)
    try:
        folder = Path(tempfile.mkdtemp(prefix="pyglow-serve-")).resolve()
        os.environ |= dict(zip(SETTINGS, (str(folder), "False"), strict=True))
        tempfile.tempdir = str(folder)  # uploads that were broken off stay in it
        gate = application(page(), folder, host, auth, max_file_size, css, js, head)
        config = uvicorn.Config(
            gate,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            ws="none",
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        server = uvicorn.Server(config)
        threading.Thread(target=_run, args=(server, listener, ended), daemon=True).start()
        while not server.started and not ended.wait(0.01):
            pass
        if not server.started:
            raise RuntimeError("the server did not start; the log has the reason")
        address = _address(host, listener.getsockname()[1], certificate is not None)
        print(f"Serving on {address} (Ctrl-C ends it)", flush=True)
        if meanwhile is not None:
            threading.Thread(target=meanwhile, daemon=True).start()
        if open_browser and can_open_browser(os.environ):
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        while not ended.wait(0.5):  # at intervals, since on Windows no signal interrupts a wait
            pass
        raise RuntimeError("the server ended by itself")
    except _Stop:
        stopped = True
    finally:
        listener.close()
        tempfile.tempdir = temporary
        for name in SETTINGS:
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
        for _ in range(5):  # a handler may be writing its result there
            if folder is not None and folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
        if stopped:
            # Nothing is left to save. Connections stay open and handlers compute for as long as they like, and the
            # interpreter taken down under machine code may crash.
            with contextlib.suppress(OSError):  # nobody may read it any more
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(0)
        for each, handler in former.items():
            signal.signal(each, handler)


def _run(server: uvicorn.Server, listener: socket.socket, ended: threading.Event) -> None:
    try:
        server.run(sockets=[listener])
    finally:
        ended.set()


def _address(host: str, port: int, encrypted: bool) -> str:
    every = host in ("0.0.0.0", "::")
    name = socket.gethostname() if every else f"[{host}]" if ":" in host else host
    return f"http{'s' if encrypted else ''}://{name}:{port}/"
