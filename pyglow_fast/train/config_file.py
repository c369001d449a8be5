"""A run's configuration as a file: TOML, which is what run folders hold, or YAML or JSON.

The tables are those of TrainConfig: its own fields on top, ``[data]`` and ``[model]``. TOML knows no null, so that
fields which may be None say ``"none"``.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyglow_fast._errors import expect, visible
from pyglow_fast.data import optional
from pyglow_fast.train.config import OPTIONAL, TrainConfig


def _yaml(text: str) -> Any:
    """Parse YAML by SafeLoader, to which 1e-3 is a number as in YAML 1.2 (PyYAML's 1.1 wants 1.0e-3)."""
    yaml: Any = optional("yaml", "YAML files")
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


_PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}


def to_toml(config: TrainConfig) -> str:
    """Write every field of ``config`` as TOML text; :func:`read_config` and TrainConfig.from_dict read it back.

    Raises:
        MissingExtraError: tomli-w is not installed.
    """
    values = _each(config.to_dict(), lambda name, value: "none" if value is None else value)
    tables_last = dict(sorted(values.items(), key=lambda item: isinstance(item[1], dict)))
    text: str = optional("tomli_w", "configuration files").dumps(tables_last)
    return text


def read_config(path: Path) -> dict[str, Any]:
    """Read the tables of a file as they are written there; TrainConfig decides which fields they may have.

    Raises:
        ValueError: no such file, another kind of file, or one that cannot be parsed; the message names it.
        MissingExtraError: a YAML file, and PyYAML is not installed.
    """
    name, kind = str(path), path.suffix
    expect(kind in _PARSERS, "config", f"a file ending in one of {', '.join(_PARSERS)}", repr(name))
    expect(path.is_file(), "config", "an existing file", repr(name))
    try:
        values = _PARSERS[kind](path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError, too
        raise ValueError(visible(f"{name}: expected a configuration as {kind[1:].upper()}, found {error}")) from error
    expect(isinstance(values, Mapping), name, "tables of settings", type(values).__name__)
    return _each(values, lambda name, value: None if name in OPTIONAL and value == "none" else value)


def _each(values: Mapping[str, Any], change: Any) -> dict[str, Any]:
    """The tables with every value changed."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        found[name] = {key: change(key, item) for key, item in value.items()} if inner else change(name, value)
    return found
