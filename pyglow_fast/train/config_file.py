"""A run's configuration as a file: TOML, which is what run folders hold, or YAML or JSON.

The tables are those of TrainConfig: its own fields on top, ``[data]`` and ``[model]``. TOML knows no null, so that
fields which may be None say ``"none"``.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyglow_fast._errors import expect, visible
from pyglow_fast.data import optional
from pyglow_fast.train.config import OPTIONAL, TrainConfig

SUFFIXES = (".toml", ".yaml", ".yml", ".json")


def to_toml(config: TrainConfig) -> str:
    """Write every field of ``config`` as TOML text; :func:`read_config` and TrainConfig.from_dict read it back.

    Raises:
        MissingExtraError: tomli-w is not installed.
    """
    values = _without_nulls(config.to_dict())
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    text: str = optional("tomli_w", "configuration files").dumps(plain | tables)
    return text


def read_config(path: Path) -> dict[str, Any]:
    """Read the tables of a file as they are written there; TrainConfig decides which fields they may have.

    A table may hold values and lists of values; only the outermost may hold tables.

    Raises:
        ValueError: no such file, another kind of file, or one that cannot be parsed; the message names it.
        MissingExtraError: a YAML file, and PyYAML is not installed.
    """
    name = str(path)
    expect(path.suffix in SUFFIXES, "config", f"a file ending in one of {', '.join(SUFFIXES)}", repr(name))
    expect(path.is_file(), "config", "an existing file", repr(name))
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix == ".json":
            values = json.loads(text)
        else:
            yaml = optional("yaml", "YAML files")
            try:
                values = yaml.load(text, _loader(yaml))
            except yaml.YAMLError as error:
                raise ValueError(" ".join(str(error).split())) from error
    except OSError as error:
        raise ValueError(visible(f"{name}: expected a file that can be read, found {error}")) from error
    except RecursionError as error:
        raise ValueError(visible(f"{name}: expected tables of settings, found deeper ones than can be read")) from error
    except ValueError as error:  # raised by each parser, and for text that is not UTF-8
        file_format = path.suffix[1:].upper()
        raise ValueError(visible(f"{name}: expected a configuration as {file_format}, found {error}")) from error
    expect(isinstance(values, Mapping), name, "tables of settings", type(values).__name__)
    for key, value in values.items():
        for place, inner in value.items() if isinstance(value, Mapping) else ((key, value),):
            _check_value(f"{name}: {place}", inner)
    return _nulls(values)


def _check_value(place: str, value: Any) -> None:
    """Refuse a table, and a list of something else than plain values: YAML's may even hold themselves."""
    parts = value if isinstance(value, list) else [value]
    wrong = [type(part).__name__ for part in parts if isinstance(part, Mapping | list)]
    found = f"a {'table' if wrong[:1] == ['dict'] else 'list'}{' in a list' if isinstance(value, list) else ''}"
    expect(not wrong, place, "a value, or a list of them", found)


def _loader(yaml: Any) -> Any:
    """SafeLoader, to which 1e-3 is a number as in YAML 1.2 (PyYAML's 1.1 wants 1.0e-3)."""

    class Loader(yaml.SafeLoader):
        pass

    number = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Replace "none" by None in the fields that may be None."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[name] = _nulls(value)
        else:
            found[name] = None if name in OPTIONAL and value == "none" else value
    return found


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`_nulls`."""
    return {
        name: _without_nulls(value) if isinstance(value, Mapping) else "none" if value is None else value
        for name, value in values.items()
    }
