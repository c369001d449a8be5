"""The former place of read_single."""

from pyglow_fast.data.files import read_single

__all__ = ["read_single"]
