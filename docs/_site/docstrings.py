"""For mkdocstrings: docstrings are plain text with Sphinx roles; here they become the Markdown of the site."""

from __future__ import annotations

import re
from collections.abc import Iterator

import griffe

_log = griffe.get_logger(__name__)
_ROLE = re.compile(r":(?:func|class|meth|mod|attr):`(~?)([\w.]+)`")
# What is kept as it is: code, and examples from their prompt to the empty line that ends what they print.
_CODE = re.compile(r"(^ *>>> .*(?:\n *\S.*)*|``.+?``|`[^`\n]+`)", re.MULTILINE)
_BLOCK = re.compile(r"::\n\n(?= )")
_SECTION = re.compile(r"( *)(Args|Attributes):\n")
_NAMES = re.compile(r"( +)(\w+(?:, \w+)+): ")


class DocstringsAsMarkdown(griffe.Extension):
    """Roles become links, what Markdown would take for markup is escaped, and "a, b: text" is a parameter each."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **options: object) -> None:
        """Rewrite the docstring of an object, once everything is loaded that it may refer to."""
        if obj.docstring is not None:
            text = "\n".join(_one_name_each(obj.docstring.value.split("\n")))
            parts = _CODE.split(_BLOCK.sub(":\n\n", _ROLE.sub(lambda match: _link(match, obj, loader), text)))
            parts[::2] = [_escaped(part) for part in parts[::2]]
            obj.docstring.value = "".join(parts)


def _link(match: re.Match[str], obj: griffe.Object, loader: griffe.GriffeLoader) -> str:
    """A link to the page of what a role names; where it has none, its name."""
    short, name = match.groups()
    shown = name.rpartition(".")[2] if short else name
    places = [f"{obj.path}.", *(f"{parent}." for parent in _parents(obj.path)), ""]
    for place in places:
        try:
            found = loader.modules_collection[f"{place}{name}"]
            path = found.target_path if found.is_alias else found.path
        except KeyError:
            continue
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
    _log.warning("%s: the docstring refers to %s, which is not there", obj.path, name)
    return f"`{shown}`"


def _parents(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _escaped(text: str) -> str:
    """*spatial and <= are not markup here; what was made a link above is."""
    text = re.sub(r"(?<=[^\s*])( ?)\*(?=[\w(])", r"\1\\*", text)
    return re.sub(r"<(?!/?(?:autoref|code)\b)", "&lt;", text)


def _one_name_each(lines: list[str]) -> Iterator[str]:
    """In "Args:", a line "a, b: text" and what continues it, once for a and once for b."""
    i, section = 0, -1
    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent <= section:
            section = -1
        if head := _SECTION.fullmatch(line + "\n"):
            section = len(head[1])
        names = _NAMES.match(line) if section >= 0 else None
        if names is None:
            yield line
            i += 1
            continue
        rest = [line[names.end() :]]
        i += 1
        while i < len(lines) and lines[i].strip() and len(lines[i]) - len(lines[i].lstrip()) > indent:
            rest.append(lines[i])
            i += 1
        for name in names[2].split(", "):
            yield f"{names[1]}{name}: {rest[0]}"
            yield from rest[1:]
