"""For mkdocs: what the site shows and docs/ does not hold, namely pictures beside the benchmark rows, and styles."""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

_OUTSIDE = re.compile(r"\]\(\.\./(bench/results/[\w.-]+\.png)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures that pages name outside of docs/, and the colours of code."""
    root = Path(config.config_file_path).parent
    for page in files.documentation_pages():
        for name in _OUTSIDE.findall(page.content_string):
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(root / name)))
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "css/pygments.css", content=colours))
    files.append(File.generated(config, "css/site.css", abs_src_path=str(Path(__file__).with_name("site.css"))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point to those pictures where they are in the site."""
    return _OUTSIDE.sub(r"](\1)", markdown)
