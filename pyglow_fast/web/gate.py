"""Guards Gradio: who may ask, for which addresses, and what the browser may load."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

API = "/gradio_api"
# The addresses that the page asks for, by method. All other addresses of Gradio do not exist here: its API and
# documentation, other people's servers (proxy), reloading, monitoring, recordings, histories and editing by a model.
OPEN = {"GET": ("/", "/theme.css", f"{API}/theme.css", "/favicon.ico", "/manifest.json")}
OPEN_FOLDERS = ("/assets/", "/static/")
LOGIN = {"POST": ("/login", "/login/")}
HANDLERS = (f"{API}/queue/join", f"{API}/run/predict")  # the addresses of events, in a queue and at once
CLOSED = {  # addresses that are closed to all who have not logged in
    "GET": (
        "/config",
        "/config/",
        "/logout",
        *(f"{API}/{name}" for name in ("queue/data", "upload_progress", "login_check")),
    ),
    "POST": (*HANDLERS, *(f"{API}/{name}" for name in ("upload", "cancel", "reset"))),
}
HEARTBEAT = f"{API}/heartbeat/"
FILE = f"{API}/file="
LARGEST_JSON = 2**20  # bytes of a request that is no upload: settings and names, never pixels
FILES_AT_ONCE = 16  # uploads are limited to so many times the largest file

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio compiles the templates of its HTML in the browser
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
)


def host_name(header: str) -> str:
    """Read the name in a Host header, without port: ``localhost`` of ``localhost:7860``, ``::1`` of ``[::1]:7860``."""
    name = header.rpartition("]")[0].lstrip("[") if header.startswith("[") else header.partition(":")[0]
    return name.lower().rstrip(".")


def files_in(value: Any) -> list[Any]:
    """Find every "path" in a value that came as JSON, at any depth: what Gradio takes for a file has one."""
    found: list[Any] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            if item.get("path") is not None:
                found.append(item["path"])
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return found


class Gate:
    """An ASGI application around Gradio's that lets through what the page needs and nothing else.

    Args:
        app: the application that answers.
        folder: the only folder whose files are served and may be named by a request, beside Gradio's own assets.
        hosts: the names under which the page may be asked for; None for any. Another name means that a foreign page
            had its own name resolved to this machine.
        largest: bytes that one uploaded file may have.
        logged_in: tells from the values of its cookies whether a request comes from someone who logged in.
    """

    def __init__(
        self,
        app: App,
        folder: Path,
        hosts: frozenset[str] | None,
        largest: int,
        logged_in: Callable[[list[str]], bool],
    ) -> None:
        self.app, self.folder, self.hosts, self.largest, self.logged_in = (
            app,
            folder.resolve(),
            hosts,
            largest,
            logged_in,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # Gradio has no web sockets
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused(scope, headers)
        if refused is not None:
            await _answer(*refused, send)
            return
        path = scope["path"]
        query = parse_qsl(scope["query_string"].decode("latin-1"))
        if path == "/" and any(name != "__theme" for name, _ in query):
            await _answer(303, "", send, location=b"/")  # Gradio's pages of settings and of its API
            return
        if path == "/manifest.json":  # asked for without cookies, and Gradio's has the title of the page
            await _answer(200, '{"name": "pyglow-fast"}', send, content_type=b"application/manifest+json")
            return
        try:
            if path in HANDLERS:
                receive = await self._checked(receive)
        except ValueError as error:
            await _answer(400, str(error), send)
            return
        await self.app(scope, receive, _with_headers(send))

    def _refused(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and a sentence if the request is not to be answered."""
        host = headers.get("host", "")
        if self.hosts is not None and host_name(host) not in self.hosts:
            return 421, "This page is served under other names."
        method, path = scope["method"], scope["path"]
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != host.lower():
            return 403, "Another page may not ask."
        visit = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not visit:
            return 403, "Another page may not ask."
        method = "GET" if method == "HEAD" else method
        if method == "POST":
            # The length that a request states is what arrives: the server reads no more than that.
            length = headers.get("content-length", "")
            largest = self.largest * FILES_AT_ONCE if path == f"{API}/upload" else LARGEST_JSON
            if not (length.isascii() and length.isdigit()):
                return 411, "The length of the request is missing."
            if int(length) > largest:
                return 413, "The request is too large."
        if path in OPEN.get(method, ()) or path in LOGIN.get(method, ()):
            return None
        if method == "GET" and path.startswith(OPEN_FOLDERS):
            return None
        known = path in CLOSED.get(method, ()) or (method == "GET" and path.startswith((HEARTBEAT, FILE)))
        if not known:
            return 404, "Not found."
        if not self.logged_in(_cookies(headers.get("cookie", ""))):
            return 401, "Log in first."
        if path.startswith(FILE) and not self._holds(path.removeprefix(FILE)):
            return 403, "Not a file of this page."
        return None

    def _holds(self, path: Any) -> bool:
        """Tells whether a path is a file of the folder, links followed."""
        try:
            return (
                isinstance(path, str) and Path(path).is_absolute() and Path(path).resolve().is_relative_to(self.folder)
            )
        except (OSError, ValueError):  # a zero byte, a name that is too long
            return False

    async def _checked(self, receive: Receive) -> Receive:
        """Reads the request of a handler and passes it on, unless it names a file or an address elsewhere."""
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise ValueError("The request is not JSON.") from None
        if not all(self._holds(path) for path in files_in(value)):
            raise ValueError("The request names a file that was not uploaded here.")
        first = True

        async def again() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        return again


def _cookies(header: str) -> list[str]:
    try:
        return [morsel.value for name, morsel in SimpleCookie(header).items() if name.startswith("access-token-")]
    except CookieError:
        return []


def _with_headers(send: Send) -> Send:
    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in HEADERS}
            kept = [(name, value) for name, value in message.get("headers", []) if name.lower() not in ours]
            message = {**message, "headers": [*kept, *HEADERS]}
        await send(message)

    return add


async def _answer(
    status: int,
    text: str,
    send: Send,
    content_type: bytes = b"text/plain; charset=utf-8",
    location: bytes | None = None,
) -> None:
    send, body = _with_headers(send), text.encode()
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    if location is not None:
        headers.append((b"location", location))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
