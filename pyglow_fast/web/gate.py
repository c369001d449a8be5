"""Guards Gradio: who may ask, for which addresses, and what the browser may load."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, cookie_parser

from pyglow_fast.web.brake import Brake

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
UPLOAD = f"{API}/upload"
HANDLERS = (f"{API}/queue/join", f"{API}/run/predict")  # the addresses of events, in a queue and at once
CLOSED = {  # addresses that are closed to all who have not logged in
    "GET": (
        "/config",
        "/config/",
        "/logout",
        *(f"{API}/{name}" for name in ("queue/data", "upload_progress", "login_check")),
    ),
    "POST": (*HANDLERS, UPLOAD, *(f"{API}/{name}" for name in ("cancel", "reset"))),
}
HEARTBEAT = f"{API}/heartbeat/"
FILE = f"{API}/file="
LARGEST_JSON = 2**20  # bytes of a request that is no upload: settings and names, never pixels
MAX_FILE_SIZE = 20 * 2**20  # bytes of an uploaded file, unless another limit is given
FILES_AT_ONCE = 16  # an upload is limited to so many times the largest file
FILES_STORED = 64  # and so are all that wait on the disk, or arrive
BLOCK = 4096  # bytes of the disk that the smallest file takes

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


def stored(folder: Path) -> int:
    """Count the bytes of the disk that the files in a folder take, at any depth."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += max(BLOCK, path.lstat().st_size)
        except OSError:  # gone meanwhile
            continue
    return total


class BadRequest(ValueError):
    """A request that is refused once it was read."""


class Gate:
    """An ASGI application around Gradio's that lets through what the page needs and nothing else.

    Args:
        app: the application that answers.
        folder: the only folder whose files are served and may be named by a request, beside Gradio's own assets.
        hosts: the names under which the page may be asked for; None for any. Another name means that a foreign page
            had its own name resolved to this machine.
        largest: bytes that one uploaded file may have.
        logged_in: tells from the values of its cookies whether a request comes from someone who logged in.
        brake: what slows down the guessing of the password; None where there is no login.
    """

    def __init__(
        self,
        app: App,
        folder: Path,
        hosts: frozenset[str] | None,
        largest: int,
        logged_in: Callable[[list[str]], bool],
        brake: Brake | None = None,
    ) -> None:
        self.app, self.folder, self.hosts = app, folder.resolve(), hosts
        self.largest, self.logged_in, self.brake = largest, logged_in, brake
        self._arriving = 0  # bytes of the uploads that are being received

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
            await _answer(303, "", send, (b"location", b"/"))  # Gradio's pages of settings and of its API
            return
        if path == "/manifest.json":  # asked for without cookies, and Gradio's has the title of the page
            manifest = (b"content-type", b"application/manifest+json")
            await _answer(200, '{"name": "pyglow-fast"}', send, manifest)
            return
        send = _with_headers(send, scope.get("scheme") == "https")
        try:
            if path in HANDLERS:
                receive = await self._checked(receive)
            if path == UPLOAD:
                await self._upload(int(headers["content-length"]), scope, receive, send)
            elif path in LOGIN.get(scope["method"], ()) and self.brake is not None:
                await self._login(self.brake, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except BadRequest as error:
            await _answer(400, str(error), send)
        except ClientDisconnect:  # who asked has gone: nothing to answer, and no fault for the log
            pass

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
        if "transfer-encoding" in headers:  # its parts would count, however many, and not the length
            return 411, "A request in parts is not taken: its length must be stated."
        if method == "POST":
            # The length that a request states is what arrives: the server reads no more than that.
            length = headers.get("content-length", "")
            largest = self.largest * FILES_AT_ONCE if path == UPLOAD else LARGEST_JSON
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

    async def _login(self, brake: Brake, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("",))[0]
        wait = math.ceil(brake.take(address))
        if wait > 0:
            said = f"There were too many wrong passwords: try again in {wait} s."
            await _answer(429, said, send, (b"retry-after", str(wait).encode()))
            return

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                brake.succeeded(address)
            await send(message)

        await self.app(scope, receive, seen)

    async def _upload(self, length: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._arriving += length
        try:
            there = await asyncio.to_thread(stored, self.folder)
            full = there + self._arriving > self.largest * FILES_STORED
            if full or shutil.disk_usage(self.folder).free < self._arriving:
                await _answer(507, "There is no room for more files: try again in ten minutes.", send)
            else:
                await self.app(scope, receive, send)
        finally:
            self._arriving -= length

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
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            raise BadRequest("The request is not JSON.") from None
        if not all(self._holds(path) for path in files_in(value)):
            raise BadRequest("The request names a file that was not uploaded here.")
        first = True

        async def again() -> Message:
            nonlocal first
            if first:
                first = False
                return {"type": "http.request", "body": bytes(body), "more_body": False}
            return await receive()

        return again


def _cookies(header: str) -> list[str]:
    """The values of the cookies of a login, among those that other servers of this machine may have set."""
    return [value for name, value in cookie_parser(header).items() if name.startswith("access-token-")]


def _with_headers(send: Send, encrypted: bool = False) -> Send:
    """Add HEADERS to an answer; other sites do not send its cookies, and where there is encryption nobody without."""

    def cookie(value: bytes) -> bytes:
        value = value.replace(b"SameSite=none", b"SameSite=lax")
        return value if not encrypted or b"; Secure" in value else value + b"; Secure"

    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in HEADERS}
            kept = [
                (name, cookie(value) if name.lower() == b"set-cookie" else value)
                for name, value in message.get("headers", [])
                if name.lower() not in ours
            ]
            message = {**message, "headers": [*kept, *HEADERS]}
        await send(message)

    return add


async def _answer(status: int, text: str, send: Send, *more: tuple[bytes, bytes]) -> None:
    send, body = _with_headers(send), text.encode()
    headers = {b"content-type": b"text/plain; charset=utf-8", b"content-length": str(len(body)).encode(), **dict(more)}
    await send({"type": "http.response.start", "status": status, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})
