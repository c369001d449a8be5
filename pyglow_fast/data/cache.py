"""The former place of cached."""

from pyglow_fast.data.fetch import cached, data_folder

__all__ = ["cached", "data_folder"]
