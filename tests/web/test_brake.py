"""Who guesses the password must wait, and nobody else; with a clock that the tests turn."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support import web

web.require("gradio")

from pyglow_fast.web.brake import EACH, FREE, MOST_ADDRESSES, Brake, origin_of  # noqa: E402
from pyglow_fast.web.gate import Gate  # noqa: E402

pytestmark = pytest.mark.full

HERE, THERE = "203.0.113.5", "198.51.100.7"


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def brake(clock: Clock) -> Brake:
    return Brake(clock)


def test_after_some_tries_there_is_one_at_a_time(brake: Brake, clock: Clock) -> None:
    assert [brake.take(HERE) for _ in range(FREE)] == [0.0] * FREE
    for _ in range(3):
        assert brake.take(HERE) == EACH
    clock.now += EACH / 2
    assert brake.take(HERE) == EACH / 2
    for _ in range(3):
        clock.now += EACH
        assert brake.take(HERE) == 0.0
        assert brake.take(HERE) > 0.0
    assert brake.take(THERE) == 0.0


def test_the_wait_does_not_grow_by_trying(brake: Brake, clock: Clock) -> None:
    """Else a stranger could lock out who knows the password, for as long as he likes after he has left."""
    for _ in range(10_000):
        brake.take(HERE)
    clock.now += EACH
    assert brake.take(HERE) == 0.0
    clock.now += FREE * EACH
    assert [brake.take(HERE) for _ in range(FREE)] == [0.0] * FREE
    assert brake.take(HERE) == EACH


def test_tries_do_not_pile_up(brake: Brake, clock: Clock) -> None:
    brake.take(HERE)
    clock.now += 1000 * EACH
    assert [brake.take(HERE) for _ in range(FREE + 1)] == [0.0] * FREE + [EACH]


def test_the_right_password_gives_them_back(brake: Brake) -> None:
    for _ in range(FREE):
        brake.take(HERE)
    brake.succeeded(HERE)
    assert [brake.take(HERE) for _ in range(FREE + 1)] == [0.0] * FREE + [EACH]


def test_few_addresses_are_remembered(brake: Brake) -> None:
    """Those that tried last: many strangers do not fill the memory, and who goes on is not forgotten."""
    for i in range(3 * MOST_ADDRESSES):
        brake.take(f"10.0.{i // 256}.{i % 256}")
        if i % 100 == 0:
            brake.take(HERE)
    assert len(brake._spent) == MOST_ADDRESSES
    assert brake.take(HERE) == EACH


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("203.0.113.5", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5"),
        ("2001:db8:1:2:aaaa::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:bbbb::2", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_a_network_of_ipv6_is_one(address: str, origin: str) -> None:
    """It has more addresses than anyone could count."""
    assert origin_of(address) == origin


class Asked:
    """A gate before a login whose password is "right"; counts how often it was looked at."""

    def __init__(self, folder: Path, brake: Brake | None) -> None:
        self.looked = 0
        self.gate = Gate(self._app, folder, None, 1, lambda cookies: False, brake)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.looked += 1
        right = (await receive())["body"] == b"right"
        await send({"type": "http.response.start", "status": 200 if right else 400, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def __call__(self, password: bytes, address: str = HERE, path: str = "/login") -> tuple[int, dict[bytes, bytes]]:
        sent: list[Any] = []
        headers = [(b"host", b"a"), (b"content-length", str(len(password)).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}

        async def receive() -> Any:
            return {"type": "http.request", "body": password, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        web.completed(self.gate(scope | {"client": (address, 1)}, receive, send))
        return sent[0]["status"], dict(sent[0]["headers"])


def test_a_password_is_not_looked_at_while_one_must_wait(tmp_path: Path, brake: Brake, clock: Clock) -> None:
    ask = Asked(tmp_path, brake)
    assert [ask(b"wrong", path=path)[0] for path in ("/login", "/login/") * FREE] == [400] * FREE + [429] * FREE
    status, headers = ask(b"right")
    assert (status, headers[b"retry-after"], ask.looked) == (429, str(int(EACH)).encode(), FREE)
    assert ask(b"right", THERE)[0] == 200
    clock.now += EACH
    assert [ask(b"right")[0] for _ in range(3 * FREE)] == [200] * 3 * FREE


def test_many_at_once_have_no_more_tries(tmp_path: Path, brake: Brake) -> None:
    """A try is taken before the password is looked at, not when it was found wrong."""

    async def never(scope: Any, receive: Any, send: Any) -> None:
        nonlocal begun
        begun += 1
        await asyncio.sleep(60)

    async def nothing(*_: Any) -> Any:
        return None

    async def flood() -> None:
        gate = Gate(never, tmp_path, None, 1, lambda cookies: False, brake)
        scope = {"type": "http", "method": "POST", "path": "/login", "query_string": b"", "client": (HERE, 1)}
        scope["headers"] = [(b"host", b"a"), (b"content-length", b"1")]
        tasks = [asyncio.create_task(gate(dict(scope), nothing, nothing)) for _ in range(4 * FREE)]
        while sum(task.done() for task in tasks) < 3 * FREE:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()

    begun = 0
    web.completed(flood())
    assert begun == FREE
