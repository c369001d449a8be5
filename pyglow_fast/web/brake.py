"""Slows down the guessing of a password, without a way to lock out who knows it for longer than the guessing lasts."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable

FREE = 5  # tries that an address has at once
EACH = 30.0  # seconds until it has another
MOST_ADDRESSES = 1024  # that are remembered; beyond it the one that was silent for longest is forgotten


def origin_of(address: str) -> str:
    """Find what has tries of its own: an IPv4 address, or the 64 bits of an IPv6 address that one network has."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped) if mapped is not None else str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


class Brake:
    """Counts the failed logins of each address: FREE at once, then one every EACH seconds.

    A try that must wait costs nothing, so the wait does not grow. Each address has its own: who guesses stops nobody
    elsewhere.

    Args:
        clock: tells the seconds since some moment.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._spent: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tries, and when they were so many

    def take(self, address: str) -> float:
        """Take a try of ``address`` before its password is looked at; returns the seconds to wait if there is none."""
        now, key = self._clock(), origin_of(address)
        spent, since = self._spent.pop(key, (0.0, now))
        spent = max(0.0, spent - (now - since) / EACH) + 1
        wait = max(0.0, (spent - FREE) * EACH)
        self._spent[key] = (spent if wait == 0 else spent - 1, now)
        if len(self._spent) > MOST_ADDRESSES:
            self._spent.popitem(last=False)
        return wait

    def succeeded(self, address: str) -> None:
        """Give all tries back: the password was right."""
        self._spent.pop(origin_of(address), None)
