"""What the server answers, to whom: every route of Gradio, files elsewhere, other names and other pages."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from support import web

web.require("gradio")

import gradio as gr  # noqa: E402

from pyglow_fast.web.gate import (  # noqa: E402
    CLOSED,
    HEADERS,
    LARGEST_JSON,
    LOGIN,
    OPEN,
    UPLOAD,
)
from pyglow_fast.web.server import application  # noqa: E402

pytestmark = pytest.mark.full  # what a user sees of the page is in tests/contract/test_page.py

USER, PASSWORD = "ada", "correct horse"
SECRET = "do not serve this"


class Client:
    """Sends requests as they are, without tidying a path or a header."""

    def __init__(self, server: web.Server) -> None:
        self.host = server.host
        self.cookie = ""

    def __call__(
        self, path: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, str, dict[str, str]]:
        """The status, the body (the first 100 KB, for what never ends) and the headers."""
        name, _, port = self.host.rpartition(":")
        connection = HTTPConnection(name, int(port), timeout=web.WAIT)
        sent = {"Host": self.host, **({"Cookie": self.cookie} if self.cookie else {})}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for header in sent.items():
                connection.putheader(*header)
            if body is not None and "Content-Length" not in sent and "Transfer-Encoding" not in sent:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            got = {name.lower(): value for name, value in answer.getheaders()}
            endless = "event-stream" in got.get("content-type", "")
            return answer.status, "" if endless else answer.read(100_000).decode("utf-8", "replace"), got
        finally:
            connection.close()

    def log_in(self, user: str, password: str) -> int:
        form = f"username={user}&password={password.replace(' ', '+')}".encode()
        connection = HTTPConnection(*self.host.split(":"), timeout=web.WAIT)  # type: ignore[arg-type]
        connection.request("POST", "/login", form, {"Content-Type": "application/x-www-form-urlencoded"})
        answer = connection.getresponse()
        cookies = [value.partition(";")[0] for name, value in answer.getheaders() if name.lower() == "set-cookie"]
        self.cookie = "; ".join(cookies)
        connection.close()
        return answer.status

    def join(self, value: Any) -> tuple[int, str]:
        body = json.dumps({"data": [value], "fn_index": 0, "session_hash": "abc"}).encode()
        return self("/gradio_api/queue/join", "POST", body, **{"Content-Type": "application/json"})[:2]


@pytest.fixture
def client(small: web.Server) -> Client:
    return Client(small)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[web.Server]:
    """The small page behind a login."""
    with web.small_server(tmp_path_factory.mktemp("guarded"), auth=[USER, PASSWORD]) as server:
        yield server


def routes(folder: Path) -> list[tuple[str, str]]:
    """Every method and path that Gradio answers, parameters filled in."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        gr.Button("x").click(lambda: None)
    found: set[tuple[str, str]] = set()

    def walk(holder: Any) -> None:
        for route in holder.routes:
            inner = getattr(route, "app", None) or getattr(route, "original_router", None) or route
            if getattr(route, "methods", None):
                path = "/".join("x" if part.startswith("{") else part for part in route.path.split("/"))
                found.update((method, path.split("{")[0]) for method in route.methods)
            elif hasattr(inner, "routes"):
                walk(inner)

    walk(application(blocks, folder, "127.0.0.1", None, 1, None, None, None).app)
    return sorted(found)


def test_the_walk_finds_gradios_routes(tmp_path: Path) -> None:
    found = routes(tmp_path)
    for known in (("POST", "/gradio_api/queue/join"), ("GET", "/gradio_api/proxy="), ("GET", "/monitoring/x")):
        assert known in found
    assert len(found) > 60


def test_without_a_login_nothing_is_given_but_the_login_page(guarded: web.Server, tmp_path: Path) -> None:
    client = Client(guarded)
    given = {}
    for method, path in routes(tmp_path):
        status, body, _ = client(path, method, b"" if method == "POST" else None)
        assert "Double" not in body, (method, path)  # a button of the page
        assert "slow" not in body, (method, path)  # a handler of it
        if status < 400:
            given[method, path] = status
    opened = [(method, path) for method in ("GET", "HEAD") for path in OPEN["GET"]]
    assert set(given) <= {*opened, ("GET", "/assets/x"), ("GET", "/static/x")}
    assert given["GET", "/"] == 200
    assert '"auth_required":true' in client("/")[1]


def test_a_login_opens_the_page(guarded: web.Server) -> None:
    client = Client(guarded)
    assert client.log_in(USER, "wrong") == 400
    assert client("/config")[0] == 401
    client.cookie = "access-token-unsecure-x=guess"
    assert client("/config")[0] == 401
    assert client.log_in(USER, PASSWORD) == 200
    status, body, _ = client("/config")
    assert (status, "Double" in body) == (200, True)
    assert client("/gradio_api/heartbeat/abc")[0] == 200
    assert client.join(1)[0] == 200


def test_a_made_up_cookie_is_no_login(guarded: web.Server) -> None:
    """Also where Gradio itself does not look: it lets everyone hold a session and cancel a handler."""
    client = Client(guarded)
    body = b'{"session_hash": "abc", "fn_index": 0, "event_id": "x"}'
    for cookie in ("", "access-token-unsecure-x=guess", "access-token-x=", "other=1", "\x7f;;="):
        client.cookie = cookie
        assert client("/gradio_api/heartbeat/abc")[0] == 401
        assert client("/gradio_api/cancel", "POST", body, **{"Content-Type": "application/json"})[0] == 401
        assert client("/gradio_api/reset", "POST", body)[0] == 401


def test_other_cookies_of_this_machine_do_not_hinder_a_login(guarded: web.Server) -> None:
    """Servers at other ports of it set them, which need not be as the standard has them."""
    client = Client(guarded)
    assert client.log_in(USER, PASSWORD) == 200
    for other in ('notes={"a": [1, 2]}', "ü=ä", "a b=c d", "only"):
        mine = client.cookie
        client.cookie = f"{other}; {mine}"
        assert client("/config")[0] == 200, other
        client.cookie = mine


def test_a_login_is_kept_from_scripts_and_other_sites(guarded: web.Server) -> None:
    form = f"username={USER}&password={PASSWORD.replace(' ', '+')}".encode()
    connection = HTTPConnection(*guarded.host.split(":"), timeout=web.WAIT)  # type: ignore[arg-type]
    connection.request("POST", "/login", form, {"Content-Type": "application/x-www-form-urlencoded"})
    cookies = [value for name, value in connection.getresponse().getheaders() if name.lower() == "set-cookie"]
    connection.close()
    assert len(cookies) == 2
    for cookie in cookies:
        assert "; HttpOnly" in cookie
        assert "; SameSite=lax" in cookie
        assert PASSWORD not in cookie


def test_nothing_that_belongs_into_the_queue_is_computed_outside_of_it(client: Client, small: web.Server) -> None:
    """There it waits until others are done, and the queue is limited."""
    body = json.dumps({"data": [1], "fn_index": web.handler_index(small, "Double"), "session_hash": "abc"}).encode()
    headers = {"Content-Type": "application/json"}
    assert client("/gradio_api/run/predict", "POST", body, **headers)[0] == 404
    assert client("/gradio_api/queue/join", "POST", body, **headers)[0] == 200


def test_only_what_the_page_asks_for_is_there(client: Client, tmp_path: Path) -> None:
    """Without a login too: no API pages, proxy, histories, monitoring, recordings or editing."""
    known = {*OPEN["GET"], *CLOSED["GET"], *CLOSED["POST"], *LOGIN["POST"]}
    known |= {"/assets/x", "/static/x", "/gradio_api/file=", "/gradio_api/heartbeat/x"}
    for method, path in routes(tmp_path):
        if path not in known:
            assert client(path, method, b"" if method == "POST" else None)[0] == 404, (method, path)
    for query in ("view=api", "view=settings", "deep_link=x", "__theme=dark&view=api"):
        status, _, headers = client(f"/?{query}")
        assert (status, headers["location"]) == (303, "/")
    assert client("/?__theme=dark")[0] == 200


@pytest.fixture
def secrets(small: web.Server) -> list[Path]:
    """Files that must stay where they are: one in the server's current folder, one in a run below it."""
    here = Path(f"/proc/{small.process.pid}/cwd").resolve()
    run = here / "runs" / "demo"
    run.mkdir(parents=True, exist_ok=True)
    files = [here / "secret.txt", run / "secret.png"]
    for path in files:
        path.write_text(SECRET)
    return [*files, Path("/etc/passwd")]


def cache_of(secrets: list[Path]) -> Path:
    (folder,) = secrets[0].parent.glob("pyglow-serve-*")
    return folder


def test_no_file_is_served_from_elsewhere(client: Client, secrets: list[Path]) -> None:
    cache = cache_of(secrets)
    (cache / "mine.txt").write_text("mine")
    (cache / "link.txt").symlink_to(secrets[0])
    assert client(f"/gradio_api/file={cache}/mine.txt")[:2] == (200, "mine")
    up = "/.." * 12
    asked = [f"{cache}/link.txt", f"{cache}{up}/etc/passwd", "secret.txt", "./secret.txt", "~/.profile", ""]
    for path in secrets:
        asked += [str(path), f"/{path}", str(path).replace("/", "%2f"), f"file://{path}", f"{cache}{up}{path}"]
        asked += [f"{path}%00.png", f"{cache}/%2e%2e/{path.name}", f"{cache}/..%5c{path.name}"]
    asked += [f"http://{client.host}/config", "https://example.org/", "ftp://example.org/a", "//example.org/a"]
    for path in asked:
        status, body, _ = client(f"/gradio_api/file={path}")
        assert status in (403, 404), path
        assert SECRET not in body, path
        assert "root:" not in body, path


def test_no_asset_is_served_from_elsewhere(client: Client, secrets: list[Path]) -> None:
    served = {}
    for top in ("/assets/", "/static/", "/gradio_api/custom_component/x/client/", "/gradio_api/file/", "/svelte/"):
        for path in secrets:
            for way in (
                str(path),
                f"..{'/..' * 12}{path}",
                f"%2e%2e{'%2f..' * 12}{path}",
                str(path).replace("/", "%2f"),
            ):
                status, body, _ = client(top + way)
                assert SECRET not in body
                assert "root:" not in body
                served[top + way] = status
    assert set(served.values()) <= {400, 403, 404}
    assert client("/static/img/logo_nosize.svg")[0] == 200
    for address in (f"http://{client.host}/", "https://x.hf.space/", "http://169.254.169.254/"):
        assert client(f"/gradio_api/proxy={address}")[0] == 404


def test_a_request_names_no_file_or_address_elsewhere(client: Client, secrets: list[Path]) -> None:
    """Gradio would fetch an address and copy a file of the current folder to where it can be asked for."""
    cache = cache_of(secrets)
    meta = {"_type": "gradio.FileData"}
    for path in [
        *secrets,
        f"http://{client.host}/config",
        "data:image/png;base64,AAAA",
        "secret.txt",
        f"{cache}/../x",
        3,
    ]:
        named = path if isinstance(path, int) else str(path)
        status, body = client.join({"a": [{"path": named, "meta": meta}]})
        assert (status, body) == (400, "The request names a file that was not uploaded here."), path
    assert client.join({"path": f"{cache}/x.png", "meta": meta})[0] == 200
    assert client.join(1)[0] == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_request_that_is_not_json_is_refused(client: Client, body: bytes) -> None:
    assert client("/gradio_api/queue/join", "POST", body)[:2] == (400, "The request is not JSON.")


def test_requests_have_a_size(client: Client) -> None:
    """A request in parts has none, whatever length it states beside them."""
    join = "/gradio_api/queue/join"
    assert client(join, "POST", b"", **{"Content-Length": str(LARGEST_JSON + 1)})[0] == 413
    assert client("/gradio_api/upload", "POST", b"", **{"Content-Length": str(2**40)})[0] == 413
    assert client(join, "POST", b"0\r\n\r\n", **{"Transfer-Encoding": "chunked"})[0] == 411
    for path in (join, "/login", "/gradio_api/upload"):
        both = {"Content-Length": "5", "Transfer-Encoding": "chunked"}
        assert client(path, "POST", b"0\r\n\r\n", **both)[0] == 411
    boundary = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n%s\r\n--b--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    status, body, _ = client("/gradio_api/upload", "POST", boundary % bytes(100 * 1024), **headers)
    assert (status, "pyglow-serve-" in body) == (200, True)
    status, body, _ = client("/gradio_api/upload", "POST", boundary % bytes(100 * 1024 + 1), **headers)
    assert (status, "size" in body) == (413, True)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil", "", "[::2]"]
)
def test_a_foreign_name_for_this_machine_is_refused(client: Client, host: str) -> None:
    assert client("/", Host=host)[0] == 421
    assert client("/config", Host=host)[0] == 421


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_the_names_of_this_machine_are_served(client: Client, name: str) -> None:
    assert client("/config", Host=f"{name}:{client.host.rpartition(':')[2]}")[0] == 200


def test_another_page_may_not_ask(client: Client) -> None:
    """Neither with its name (Origin) nor where the browser says so (Sec-Fetch-Site), but it may link to the page."""
    own = f"http://{client.host}"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", f"{own}.evil.example", "http://localhost"):
        for path, method in (("/gradio_api/queue/join", "POST"), ("/login", "POST"), ("/config", "GET"), ("/", "GET")):
            status, _, headers = client(path, method, b"{}" if method == "POST" else None, Origin=origin)
            assert status == 403, (origin, path)
            assert "access-control-allow-origin" not in headers
    preflight = client(
        "/gradio_api/queue/join", "OPTIONS", Origin="https://evil.example", Access_Control_Request_Method="POST"
    )
    assert (preflight[0], "access-control-allow-origin" in preflight[2]) == (403, False)
    assert client("/config", Origin=own)[0] == 200
    for site in ("cross-site", "same-site"):
        assert client("/config", Sec_Fetch_Site=site)[0] == 403
        assert client("/logout", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate")[0] == 403
        assert client("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors")[0] == 403
        assert client("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate")[0] == 200
    assert client("/config", Sec_Fetch_Site="same-origin")[0] == 200


@pytest.mark.parametrize(
    "path", ["/", "/static/img/logo_nosize.svg", "/nothing", "/gradio_api/file=/etc/passwd", "/?view=api"]
)
def test_every_answer_tells_the_browser_to_load_nothing_from_elsewhere(client: Client, path: str) -> None:
    headers = client(path)[2]
    for name, value in HEADERS:
        assert headers[name.decode()] == value.decode()
    assert "http" not in headers["content-security-policy"]
    assert "*" not in headers["content-security-policy"]


def test_the_page_names_no_font_of_a_network(client: Client) -> None:
    assert "fonts.g" not in client("/")[1]
    for sheet in ("/theme.css", "/gradio_api/theme.css"):
        status, body, _ = client(sheet)
        assert (status, "@import" in body, "@font-face" in body) == (200, False, False)
        assert re.findall(r"url\((?!['\"]?data:).*", body) == []


def test_a_visitor_who_leaves_is_no_fault(small: web.Server) -> None:
    """In the midst of an upload, and, where there is a login, anyone in the midst of that: the log would fill."""
    name, _, port = small.host.rpartition(":")
    before = small.log()
    for path, kind in ((UPLOAD, "multipart/form-data; boundary=b"), ("/login", "application/x-www-form-urlencoded")):
        connection = HTTPConnection(name, int(port), timeout=web.WAIT)
        connection.putrequest("POST", path)
        connection.putheader("Content-Type", kind)
        connection.putheader("Content-Length", "5000")
        connection.endheaders(b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\nbegun')
        connection.close()
    Client(small)("/gradio_api/heartbeat/abc")
    assert Client(small).join(1)[0] == 200  # what came first has been handled
    assert small.log() == before
